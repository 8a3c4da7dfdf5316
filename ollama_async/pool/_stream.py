"""``PoolStream``: a stream whose call waits for a host first."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, cast

import httpx

from ollama_async._call.awaitable import Guarded
from ollama_async._call.chunk import ChunkT
from ollama_async._call.stream import Outcome, Stream, Timing
from ollama_async._cancel import CancelToken
from ollama_async._client import AsyncClient
from ollama_async._errors import AbortError, OllamaError, PhaseTimeout, StreamBusy, StreamClosed, StreamTruncated
from ollama_async._secret import showable

from ._calls import Call, Calls, Lease

__all__ = ["PoolStream", "with_host"]

T = TypeVar("T")

# The reason with which aclose() ends a stream that waits.
_CLOSED = object()


@showable
class PoolStream(Stream[ChunkT]):
    """A ``Stream`` whose call waits for a host first: the same in all else.

    It is a ``Stream`` to whoever asks, and has nothing of one: once opened, it stands for the stream of the host's
    client, and before that for the call that waits.

    Attributes:
        host: URL of the host that answers; ``None`` until one has been found.
    """

    def __init__(self, calls: Calls, call: Call) -> None:  # not Stream's: its state is that of the client's stream
        self._calls = calls
        self._pooled = call
        self._lease: Lease | None = None
        self._inner: Stream[ChunkT] | None = None
        # What ended it before it was opened.
        self._failure: BaseException | None = None
        self._reading = False

    @property
    def host(self) -> str | None:
        """URL of the host that answers; ``None`` until one has been found."""
        return None if self._lease is None else self._lease.server.url

    # -- opening --

    async def _ready_inner(self) -> Stream[ChunkT]:
        if self._inner is not None:
            return self._inner
        if self._reading:
            raise StreamBusy("another task is reading this stream; a stream has one reader at a time")
        if self._failure is not None:
            self._raise_again(self._failure)
        self._reading = True
        try:
            self._lease, inner = await self._calls.begin(self._pooled, self._attempt)
            self._inner = inner
            self._lease.hold_for(inner)
            return inner  # noqa: TRY300  (Ctrl-C at this line is a failure like any other)
        except AbortError as exc:
            self._failure = StreamClosed("the stream is closed") if exc.reason is _CLOSED else exc
            if self._failure is exc:
                raise
            raise self._failure from None
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            self._reading = False
            if self._failure is not None:
                # Kept, it would hold the frames that hold this stream.
                self._failure = _without_frames(self._failure)

    async def _attempt(self, client: AsyncClient, call: Call) -> Stream[ChunkT]:
        method: Callable[..., Stream[ChunkT]] = getattr(client, call.kind)
        limits = call.limits()
        return await method(call.model, *call.arguments, stream=True, token=call.token, timeout=limits, **call.options)

    def _raise_again(self, failure: BaseException) -> NoReturn:
        if isinstance(failure, OllamaError):
            raise copy.copy(failure)
        raise StreamClosed("the stream is closed: its reader was cancelled")

    async def _ready(self) -> Self:
        await self._ready_inner()
        return self

    def __await__(self) -> Generator[Any, Any, Self]:
        """Wait for a host and open the stream there, as ``Stream`` does."""
        return self._ready().__await__()

    # -- reading --

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        """Return an iterator that closes the stream when it is dropped."""
        return _PoolIterator(self)

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        """Return the next chunk, as ``Stream`` does."""
        return Guarded(self._next_chunk(), self._reader_cancelled, "PoolStream.__anext__")

    async def _next_chunk(self) -> ChunkT:
        return await self.read(anext, await self._ready_inner())

    async def read(self, read: Callable[[Any], Any], source: object) -> ChunkT:
        """Read something of the opened stream, and give its slot back when that was the end."""
        try:
            chunk: ChunkT = await read(source)
        except BaseException as exc:
            self._see_end(exc)
            raise
        if chunk.done:
            self._see_end(None)
        return chunk

    def collect(self) -> Coroutine[Any, Any, ChunkT]:
        """Read to the end and return the merged answer, as ``Stream`` does."""
        return Guarded(self._collect(), self._reader_cancelled, "PoolStream.collect")

    async def _collect(self) -> ChunkT:
        inner = await self._ready_inner()
        try:
            return await inner.collect()
        except BaseException as exc:
            self._see_end(exc)
            raise
        finally:
            self._see_end(None)

    async def whole(self) -> ChunkT:
        """Return the whole answer, for a call without ``stream=True``: part of one is none."""
        answer = await self._collect()
        if self.outcome == "truncated":
            raise StreamTruncated("the answer ended without a last chunk that says that it is done", answer)
        assert self.host is not None
        return with_host(answer, self.host)

    def _see_end(self, exc: BaseException | None) -> None:
        """Learn from how it ended, if it has, and give its slot back."""
        inner, lease = self._inner, self._lease
        if inner is None or lease is None or inner.outcome is None:
            return
        if isinstance(exc, PhaseTimeout) and exc.phase == "first_chunk":
            self._calls.note_failure(lease.server, self._pooled, exc)
        elif inner.outcome == "done":
            self._calls.note_answer(lease, inner.response)
        lease.release()

    def _reader_cancelled(self) -> None:
        # Before its first step: the host's stream notices it in the same way.
        if self._inner is not None and not self._reading:
            step = self._inner.__anext__()
            with suppress(asyncio.CancelledError):
                step.throw(asyncio.CancelledError())
            self.left()

    # -- ending --

    def abort(self, reason: object = None) -> bool:
        """End the stream now, also while it waits, from any task, thread or signal handler; as ``Stream`` does."""
        if self._inner is None:
            return self._failure is None and self._pooled.own.abort(reason)
        aborted = self._inner.abort(reason)
        self.left()
        return aborted

    async def aclose(self) -> None:
        """Close the stream, also while it waits; as ``Stream`` does."""
        if self._inner is None:
            self._pooled.own.abort(_CLOSED)
            return
        try:
            await self._inner.aclose()
        finally:
            self.left()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        await self.aclose()

    def left(self) -> None:
        """Give the slot back if the stream is over; from any thread."""
        if self._inner is not None and self._lease is not None and self._inner.outcome is not None:
            self._lease.release()

    # -- what has come --

    @property
    def response(self) -> ChunkT | None:
        """The answer so far, as ``Stream`` has it."""
        return None if self._inner is None else self._inner.response

    @property
    def text(self) -> str:
        """The text of ``response``."""
        return "" if self._inner is None else self._inner.text

    @property
    def outcome(self) -> Outcome | None:
        """How the stream ended, as ``Stream`` has it; ``None`` while it waits or is open."""
        if self._inner is not None:
            return self._inner.outcome
        failure, own = self._failure, self._pooled.own
        if isinstance(failure, StreamClosed) or (failure is None and own.aborted and own.reason is _CLOSED):
            return "closed"
        if isinstance(failure, AbortError) or (failure is None and own.aborted):
            return "aborted"
        if failure is None:
            return None
        if isinstance(failure, PhaseTimeout):
            return "timeout"
        return "error" if isinstance(failure, Exception) else "cancelled"

    @property
    def reason(self) -> object:
        """Why it ended, as ``Stream`` has it."""
        if self._inner is not None:
            return self._inner.reason
        failure, own = self._failure, self._pooled.own
        if isinstance(failure, AbortError):
            return failure.reason
        if isinstance(failure, PhaseTimeout):
            return failure.phase
        if failure is None and own.aborted and own.reason is not _CLOSED:
            return own.reason
        return failure if self.outcome == "error" else None

    @property
    def timing(self) -> Timing:
        """How fast it came, from when the host was asked."""
        return Timing(None, 0.0, 0, None) if self._inner is None else self._inner.timing

    @property
    def token(self) -> CancelToken:
        """The token that was given to the call; if none was, one of the stream's own."""
        return self._pooled.given or self._pooled.own

    @property
    def status_code(self) -> int | None:
        """The HTTP status; ``None`` before it has come."""
        return None if self._inner is None else self._inner.status_code

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the answer; empty before they have come."""
        return httpx.Headers() if self._inner is None else self._inner.headers

    def __repr__(self) -> str:
        if self._inner is not None:
            return f"<Pool{repr(self._inner)[1:-1]} at {self.host}>"
        return f"<PoolStream of {self._pooled.kind}: {self.outcome or ('waiting' if self._reading else 'not started')}>"

    def __del__(self) -> None:
        # Without one if Ctrl-C came before it was made.
        lease = getattr(self, "_lease", None)
        if lease is not None:
            # Its connection first: the next call may be given the slot at once.
            self._inner = None
            lease.release()


class _PoolIterator(Generic[ChunkT]):
    """An iterator over a stream of a pool. When it is dropped, that closes the stream."""

    __slots__ = ("_source", "_stream")

    def __init__(self, stream: PoolStream[ChunkT]) -> None:
        self._stream = stream
        # The iterator of the host's stream, which closes that when it is dropped, in turn.
        self._source: AsyncIterator[ChunkT] | None = None

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        return Guarded(self._step(), self._stream._reader_cancelled, "PoolStream.__anext__")  # noqa: SLF001

    async def _step(self) -> ChunkT:
        if self._source is None:
            self._source = aiter(await self._stream._ready_inner())  # noqa: SLF001
        return await self._stream.read(anext, self._source)

    def __del__(self) -> None:
        stream = getattr(self, "_stream", None)
        if stream is not None:
            self._source = None
            stream.left()


def _without_frames(exc: BaseException) -> BaseException:
    return copy.copy(exc) if isinstance(exc, OllamaError) else exc.with_traceback(None)


def with_host(answer: T, url: str) -> T:
    """Say in an answer which host it is from."""
    cast("Any", answer).host = url
    return answer
