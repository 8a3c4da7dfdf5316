"""``Stream``: an answer as it arrives, as its user sees it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar, cast, overload

import httpx
from pydantic import BaseModel

from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._errors import CannotContinue, PhaseTimeout, ProtocolError
from ollama_async._secret import showable
from ollama_async._wire.outcome import ExchangeOutcome

from .awaitable import Guarded
from .chunk import ChunkT
from .chunk_reader import ChunkReader, Outcome
from .condition import Condition
from .iterators import ClosingIterator, LoopIterator, called_by_async_for
from .objects import Items, Objects, Parsing, Structured
from .partial import Path

T = TypeVar("T")


class Continuation(Protocol):
    """How to go on with an answer."""

    async def stream(self, partial: Any, *, token: CancelToken | None, until: Any) -> Stream[Any]: ...


@showable
@dataclass(frozen=True, slots=True)
class Timing:
    """How fast an answer arrived.

    Attributes:
        first_chunk: Seconds from the start of the call until the first chunk arrived; ``None`` before that.
        total: Seconds from the start of the call until its end, or until now.
        chunks: Number of chunks so far.
        chunks_per_second: Chunks per second after the first one; ``None`` before there are two.
    """

    first_chunk: float | None
    total: float
    chunks: int
    chunks_per_second: float | None


@showable
class Stream(LiveObject, Generic[ChunkT]):
    """An answer as it arrives, chunk by chunk.

    Nothing is sent before the stream is first iterated, awaited or entered. These are the ways to use it::

        async for chunk in stream: ...              # leaving the loop early, in any way, closes it at once
        async for chunk in await stream: ...        # awaiting opens it: errors of the request are raised here
        async with stream: ...                      # closed at the end of the block
        chunk = await anext(stream)                 # one chunk; to pause and resume
        answer = await stream.collect()             # all of it, merged

    It has one reader at a time. ``abort()`` and ``aclose()`` may be called from anywhere.

    After ``abort()``, a timeout or an error, reading raises the same error again; after a cancellation or ``aclose()``
    it raises ``StreamClosed``; after the natural end it ends the iteration.
    """

    # Its user may set others; the dict for those is made when the first one comes.
    __slots__ = ("__dict__", "__weakref__", "_reader", "continuation")

    def __init__(self, reader: ChunkReader[ChunkT]) -> None:
        self._reader = reader
        # What resume() needs; set by the client where an answer can be continued.
        self.continuation: Continuation | None = None

    # -- async for chunk in stream --

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        """Return an iterator that closes the stream when it is dropped.

        Only the ``for`` loop holds it, so leaving the loop early drops it, and CPython frees it before the next
        statement runs.
        """
        # An `async for` awaits each step at once. Whoever calls aiter() may make a task of one, and cancel it.
        if called_by_async_for():
            return LoopIterator(self, self._reader)  # pyright: ignore[reportReturnType]  (it takes the slot for a method without self)
        return ClosingIterator(self, self._reader)

    # -- chunk = await anext(stream) --

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        """Return the next chunk.

        Raises:
            AbortError: The stream, its token or its client was aborted.
            PhaseTimeout: One of its timeouts passed.
            ResponseError: The server answered with an error; a ``StreamError`` if it came after the first chunk.
            ConnectError: No connection.
            ConnectionBroken: The connection was lost before the end.
            ProtocolError: The answer is not a stream of JSON lines as Ollama sends them.
            StreamBusy: Another task is reading.
            StreamClosed: It was closed.

        Cancellation: closes the stream at once, also before the first step; the partial answer stays in ``response``.
        """
        return Guarded(self._reader.read(), self._reader.reader_cancelled, "Stream.__anext__")

    # -- await stream --

    def __await__(self) -> Generator[Any, Any, Self]:
        """Open the stream: send the request and wait for the head of the answer (Ollama sends it with the first token).

        Returns:
            The stream itself.

        Raises:
            OllamaError: As ``anext()`` does.

        Cancellation: closes the stream at once.
        """
        return self._opened().__await__()

    async def _opened(self) -> Self:
        await self._reader.ready()
        return self

    # -- async with stream --

    async def __aenter__(self) -> Self:
        """Open the stream, as ``await stream`` does."""
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        await self.aclose()

    # -- all of it --

    def collect(self) -> Coroutine[Any, Any, ChunkT]:
        """Read to the end and return the merged answer.

        Raises:
            OllamaError: As ``anext()`` does; the partial answer is in ``partial``.
            ProtocolError: The answer was empty.

        Cancellation: closes the stream at once, also before the first step.
        """
        return Guarded(self._collect(), self._reader.reader_cancelled, "Stream.collect")

    async def _collect(self) -> ChunkT:
        # Dropped at the end, whatever that is, it closes the stream.
        _closing = ClosingIterator(self, self._reader)
        await self._reader.read_all()
        response = self.response
        if response is None:
            raise ProtocolError("the server's answer is empty")
        return response

    async def resume(
        self, *, token: CancelToken | None = None, until: Callable[[ChunkT], object] | None = None
    ) -> Stream[ChunkT]:
        """Return a stream that continues this one, which ended early (docs/continue.md).

        Its chunks are new; its ``response`` and ``text`` also have the text of this one.

        Args:
            token: Aborts the new stream, instead of the token of this one.
            until: As in ``chat``.

        Raises:
            CannotContinue: This stream has not ended, or cannot be continued; the text says why.
            OllamaError: As ``anext()`` does.

        Cancellation: closes the connection at once.
        """
        if self.outcome is None or self.continuation is None:
            flaw = "it has not ended" if self.outcome is None else "it is no answer of chat or generate"
            raise CannotContinue(f"the stream cannot be resumed: {flaw}", self.response)
        return await self.continuation.stream(self.response, token=token, until=until)

    # -- what is in its JSON --

    def objects(self: Parsing[T], *, fail_fast: bool = False) -> Objects[T]:
        """Return the answer's JSON object while it grows: ``async for partial in stream.objects()``.

        After each chunk that shows more of it, the loop gets a ``Partial``. The connection is closed as soon as the
        object is whole (outcome ``"until"``), and, like the stream itself, when the loop is left.

        Args:
            fail_fast: Whether the first field that is complete and not valid ends it.

        Returns:
            An asynchronous iterable of ``Partial``: of the model that was given as ``format=``, else of plain values.

        Raises:
            ParseError: In the loop: the answer is not JSON alone, ends before it is whole, or does not match the model.
            OllamaError: In the loop: as ``anext()`` does.

        Cancellation: closes the stream at once.
        """
        return Objects(cast("Structured", self), fail_fast=fail_fast)

    @overload
    def items(self: Parsing[object], path: Path = "") -> Items[Any]: ...

    @overload
    def items(self: Parsing[object], path: Path, item: type[T]) -> Items[T]: ...

    def items(self: Parsing[object], path: Path = "", item: Any = None) -> Items[Any]:
        """Return the elements of a list in the answer, each when it is complete and valid.

        The connection is closed as soon as the answer's JSON is whole (outcome ``"until"``), and, like the stream
        itself, when the loop is left.

        Args:
            path: Where the list is: ``"cities"``, ``"country.cities"``; ``""`` if the answer is a list.
            item: The type of an element; by default the one that the model given as ``format=`` has there.

        Raises:
            RequestError: The model has no list there.
            ParseError: In the loop: as with ``objects()``; an element that is not valid; there is no list.
            OllamaError: In the loop: as ``anext()`` does.

        Cancellation: closes the stream at once.
        """
        return Items(cast("Structured", self), path, item)

    @property
    def _response_model(self) -> type[BaseModel] | None:
        return self._reader.response_model

    def _stop_with(self, met: Condition) -> None:
        self._reader.stop(met)

    def _fail_with(self, error: Exception) -> NoReturn:
        self._reader.fail(error)

    def _reader_cancelled(self) -> None:
        self._reader.reader_cancelled()

    # -- ending it --

    def abort(self, reason: object = None) -> bool:
        """End the stream now, from any task, thread or signal handler.

        When it returns, the socket has been shut down; the reader gets an ``AbortError``.

        Args:
            reason: What ``AbortError.reason`` and ``reason`` will be.

        Returns:
            True if this call ended it, False if it was at its end already.
        """
        return self._reader.call.close_threadsafe(ExchangeOutcome("aborted", reason))

    async def aclose(self) -> None:
        """Close the stream, from any task; idempotent. A task that is reading it gets ``StreamClosed``.

        Cancellation: safe; once it has begun, the stream is closed.
        """
        exchange = self._reader.call.exchange
        if exchange is None or exchange.loop is not asyncio.get_running_loop():
            self._reader.call.close_threadsafe(ExchangeOutcome("closed"))
            return
        if self._reader.committed == "done":
            await exchange.discard_body()
        else:
            self._reader.call.close(exchange, ExchangeOutcome("closed"))
        await exchange.wait_closed()

    # -- what has arrived --

    @property
    def response(self) -> ChunkT | None:
        """The answer so far, merged; ``None`` before the first chunk.

        After an early end it also has the chunks that had arrived and had not been read.
        """
        return self._reader.response()

    @property
    def text(self) -> str:
        """The text of ``response``."""
        return self._reader.text()

    @property
    def outcome(self) -> Outcome | None:
        """How the stream ended; ``None`` while it is open.

        ``"done"`` (the last chunk came), ``"aborted"``, ``"timeout"``, ``"cancelled"`` (the reading task was),
        ``"closed"`` (by ``aclose()``, by leaving the loop, or dropped), ``"until"``, ``"error"``, or ``"truncated"``
        (the body ended properly, but the last chunk never came).
        """
        if self._reader.committed is not None:
            return self._reader.committed
        end = self._reader.call.outcome
        return None if end is None or end.kind == "complete" else end.kind

    @property
    def reason(self) -> object:
        """Why it ended; ``None`` if ``outcome`` says that already.

        The reason given to ``abort()``, the phase that timed out, the error, or the condition of ``until=`` that was
        met.
        """
        end = self._reader.call.outcome
        if end is None or (end.kind == "complete" and self._reader.committed != "until"):
            return None
        if end.kind == "error" and self._reader.call.exchange is not None:
            return self._reader.broken_off()
        if isinstance(end.cause, PhaseTimeout) and end.kind == "timeout" and self._reader.call.exchange is None:
            # It passed before a request was sent.
            return end.cause.phase
        return end.cause

    @property
    def timing(self) -> Timing:
        """How fast it arrived."""
        exchange = self._reader.call.exchange
        if exchange is None:
            return Timing(None, 0.0, 0, None)
        chunks, began = self._reader.answer.delivered, exchange.reader.first_line_at
        first = began - exchange.started_at if began else None
        now = exchange.ended_at or exchange.loop.time()
        span = (self._reader.answer.last_at or now) - began
        rate = (chunks - 1) / span if chunks > 1 and span > 0 else None
        return Timing(first, now - exchange.started_at, chunks, rate)

    @property
    def token(self) -> CancelToken:
        """The token that was given to the call; without one, a token of this stream alone."""
        token = self._reader.call.token
        if token is None:
            token = CancelToken()
            self._reader.call.register(token)
        return token

    @property
    def status_code(self) -> int | None:
        """The HTTP status; ``None`` before it has arrived."""
        return (self._reader.call.exchange and self._reader.call.exchange.reader.status) or None

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the answer; empty before they have arrived."""
        exchange = self._reader.call.exchange
        return httpx.Headers(list(exchange.reader.head.headers) if exchange else None)

    def __repr__(self) -> str:
        exchange = self._reader.call.exchange
        state = self.outcome or ("open" if self._reader.opened else "not started" if exchange is None else "opening")
        return (
            f"<Stream of {self._reader.answer.merge.model.__name__}: {state}, {self._reader.answer.delivered} chunks>"
        )

    def __del__(self) -> None:
        # Its attribute is missing if Ctrl-C came before it was made.
        if hasattr(self, "_reader") and self._reader.dropped():
            answer = self._reader.answer
            text = f"unclosed <Stream of {answer.merge.model.__name__}: open, {answer.delivered} chunks>"
            warnings.warn(text, ResourceWarning, source=self, stacklevel=1)
