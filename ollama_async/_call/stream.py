"""``Stream``: an answer as it arrives, as its user sees it."""

from __future__ import annotations

import asyncio
import dis
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Self

import httpx
from pydantic import BaseModel

from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._errors import ProtocolError, StreamBusy, StreamError, StreamTruncated
from ollama_async._loops import raise_in_loop
from ollama_async._secret import showable
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome, Kind

from .answer import Answer
from .awaitable import Guarded
from .call import Call
from .chunk import ChunkT, Merge, ResponseInfo
from .decoder import Decoder, ErrorFrame
from .failures import stream_error

if TYPE_CHECKING:
    from .exchange import Exchange

Outcome = Literal["done", "aborted", "timeout", "cancelled", "closed", "until", "error", "truncated"]


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

    def __init__(
        self,
        call: Call,
        merge: Merge[ChunkT],
        decoder: Decoder[ChunkT],
        *,
        until: Callable[[ChunkT], object] | None = None,
        response_model: type[BaseModel] | None = None,
        strict: bool = False,
    ) -> None:
        self._call = call
        self._answer = Answer(merge, decoder)
        self._until = until
        self._response_model = response_model
        self._info: ResponseInfo | None = None
        self._strict = strict
        # Whether the head of the answer of the present attempt has arrived.
        self._opened = False
        # Not empty once the outcome of the present attempt is decided.
        self._ended: Mapping[int, object] = {}
        self._reading = False
        self._outcome: Outcome | None = None
        # Bytes that were done when it was last resumed.
        self._bytes_done = 0

    # -- async for chunk in stream --

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        """Return an iterator that closes the stream when it is dropped.

        Only the ``for`` loop holds it, so leaving the loop early drops it, and CPython frees it before the next
        statement runs.
        """
        # An `async for` awaits each step at once. Whoever calls aiter() may make a task of one, and cancel it.
        if _called_by_async_for():
            return _LoopIterator(self)  # pyright: ignore[reportReturnType]  (it takes the slot for a method without self)
        return _ClosingIterator(self)

    # -- chunk = await anext(stream) --

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        """Return the next chunk.

        Raises:
            AbortError: The stream, its token or its client was aborted.
            PhaseTimeout: One of its timeouts passed.
            ResponseError: The server answered with an error; a ``StreamError`` if it came after the first chunk.
            ConnectError: No connection.
            ConnectionBroken: The connection was lost before the end.
            ProtocolError: What came is no stream of JSON lines as Ollama sends them.
            StreamBusy: Another task is reading.
            StreamClosed: It was closed.

        Cancellation: closes the stream at once, also before the first step; the partial answer stays in ``response``.
        """
        return Guarded(self._read_chunk(), self._reader_cancelled, "Stream.__anext__")

    async def _read_chunk(self) -> ChunkT:
        answer = self._answer
        place = answer.index
        # First: from here on a signal handler that looks at the answer leaves this chunk to us (see Answer.absorb()).
        answer.index = place + 1
        # The usual case by itself, since this runs for every token. A second reader finds nothing that is ready while
        # the first one waits, and so is turned away below.
        if place < answer.fast_until and not self._ended:
            chunk = answer.chunks[place]
            try:
                answer.add(chunk)
            except BaseException:
                answer.interrupted()
                raise
            # A signal handler may have come meanwhile, and no chunk is delivered after an abort.
            if not self._ended:
                return chunk
        else:
            answer.index = place
        while True:
            if self._reading or not (answer.decoder.lines or answer.index < len(answer.chunks)):
                await self._fill()
            exchange = self._call.exchange
            assert exchange is not None
            reader = exchange.reader
            if self._ended and reader.failure_outcome is not None:
                raise self._broken_off()
            if not answer.decoder.lines and answer.index == len(answer.chunks):
                raise StopAsyncIteration
            try:
                chunk = self._deliver(exchange)
            except StreamError:
                if not self._retry():
                    raise
            else:
                # As above: this is the last look before it is delivered.
                if not self._ended or reader.failure_outcome is None:
                    return chunk

    # -- await stream --

    def __await__(self) -> Generator[Any, Any, Self]:
        """Open the stream: send the request and wait for the head of the answer (Ollama sends it with the first token).

        Returns:
            The stream itself.

        Raises:
            OllamaError: As ``anext()`` does.

        Cancellation: closes the stream at once.
        """
        return self._ready().__await__()

    # -- async with stream --

    async def __aenter__(self) -> Self:
        """Open the stream, as ``await stream`` does."""
        return await self._ready()

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
        return Guarded(self._collect(), self._reader_cancelled, "Stream.collect")

    async def _collect(self) -> ChunkT:
        async for _ in self:
            pass
        response = self.response
        if response is None:
            raise ProtocolError("the server's answer is empty")
        return response

    # -- ending it --

    def abort(self, reason: object = None) -> bool:
        """End the stream now, from any task, thread or signal handler.

        When it returns, the socket has been shut down; the reader gets an ``AbortError``.

        Args:
            reason: What ``AbortError.reason`` and ``reason`` will be.

        Returns:
            True if this call ended it, False if it was at its end already.
        """
        return self._call.close_threadsafe(ExchangeOutcome("aborted", reason))

    async def aclose(self) -> None:
        """Close the stream, from any task; idempotent. A task that is reading it gets ``StreamClosed``.

        Cancellation: safe; once it has begun, the stream is closed.
        """
        exchange = self._call.exchange
        if exchange is None or exchange.loop is not asyncio.get_running_loop():
            self._call.close_threadsafe(ExchangeOutcome("closed"))
            return
        if self._outcome == "done":
            await exchange.discard_body()
        else:
            exchange.reader.close(ExchangeOutcome("closed"))
        await exchange.wait_closed()

    # -- what has arrived --

    @property
    def response(self) -> ChunkT | None:
        """The answer so far, merged; ``None`` before the first chunk.

        After an early end it also has the chunks that had arrived and had not been read.
        """
        self._absorb()
        return self._with_info(self._answer.merge.result())

    @property
    def text(self) -> str:
        """The text of ``response``."""
        self._absorb()
        return self._answer.merge.text()

    @property
    def outcome(self) -> Outcome | None:
        """How the stream ended; ``None`` while it is open.

        ``"done"`` (the last chunk came), ``"aborted"``, ``"timeout"``, ``"cancelled"`` (the reading task was),
        ``"closed"`` (by ``aclose()``, by leaving the loop, or dropped), ``"until"``, ``"error"``, or ``"truncated"``
        (the body ended properly, but the last chunk never came).
        """
        if self._outcome is not None:
            return self._outcome
        end = self._call.outcome
        return None if end is None or end.kind == "complete" else end.kind

    @property
    def reason(self) -> object:
        """Why it ended: the reason given to ``abort()``, the phase that timed out, or the error; else ``None``."""
        end = self._call.outcome
        if end is None:
            return None
        if end.kind == "error" and self._call.exchange is not None:
            return self._broken_off()
        return end.cause

    @property
    def timing(self) -> Timing:
        """How fast it arrived."""
        exchange = self._call.exchange
        if exchange is None:
            return Timing(None, 0.0, 0, None)
        chunks, began = self._answer.delivered, exchange.reader.first_line_at
        first = began - exchange.started_at if began else None
        now = exchange.ended_at or exchange.loop.time()
        span = (self._answer.last_at or now) - began
        rate = (chunks - 1) / span if chunks > 1 and span > 0 else None
        return Timing(first, now - exchange.started_at, chunks, rate)

    @property
    def token(self) -> CancelToken:
        """The token that was given to the call, or else one of the stream's own."""
        token = self._call.token
        if token is None:
            token = CancelToken()
            self._call.register(token)
        return token

    @property
    def status_code(self) -> int | None:
        """The HTTP status; ``None`` before it has arrived."""
        return (self._call.exchange and self._call.exchange.reader.status) or None

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the answer; empty before they have arrived."""
        exchange = self._call.exchange
        return httpx.Headers(list(exchange.reader.head.headers) if exchange else None)

    def __repr__(self) -> str:
        exchange = self._call.exchange
        state = self.outcome or ("open" if self._opened else "not started" if exchange is None else "opening")
        return f"<Stream of {self._answer.merge.model.__name__}: {state}, {self._answer.delivered} chunks>"

    def __del__(self) -> None:
        # Its last attribute is missing if Ctrl-C came before it was made.
        if hasattr(self, "_bytes_done") and self._dropped():
            text = f"unclosed <Stream of {self._answer.merge.model.__name__}: open, {self._answer.delivered} chunks>"
            warnings.warn(text, ResourceWarning, source=self, stacklevel=1)

    # -- reading --

    async def _ready(self) -> Self:
        if not self._opened:
            self._check_reader()
            try:
                self._reading = True
                await self._open()
            finally:
                self._reading = False
        return self

    def _check_reader(self) -> None:
        if self._reading:
            raise StreamBusy("another task is reading this stream; a stream has one reader at a time")
        exchange = self._call.exchange
        if exchange is not None and exchange.loop is not asyncio.get_running_loop():
            raise StreamBusy("the stream belongs to another event loop")

    async def _open(self) -> Exchange:
        return await self._call.run(self._note_opened, self._result)

    async def _note_opened(self, exchange: Exchange) -> Exchange:
        self._opened = True
        self._info = None
        self._ended = exchange.reader.outcome_slot
        return exchange

    def _result(self) -> ChunkT | None:
        return self.response

    def _retry(self) -> bool:
        """Make another attempt after one that broke off, if that is allowed."""
        answer, exchange = self._answer, self._call.exchange
        answer.clear()
        if answer.merge.bytes_done > self._bytes_done and exchange is not None:
            self._bytes_done = answer.merge.bytes_done
            exchange.budget.note_progress()
        if not self._call.retry():
            return False
        self._opened = False
        answer.restart()
        return True

    async def _fill(self) -> None:
        """Get lines, or get to the end."""
        self._check_reader()
        answer = self._answer
        try:
            self._reading = True
            answer.clear()
            exchange = self._call.exchange
            if exchange is None or not self._opened:
                exchange = await self._open()
            if self._outcome is not None:
                await self._rest(exchange)
                return
            while True:
                decoder, reader = answer.decoder, exchange.reader
                try:
                    while not decoder.lines and not decoder.eof:
                        try:
                            answer.taking = True
                            if decoder.failure is not None:
                                self._fail(exchange, decoder.failure)
                            data = reader.read_nowait()
                            if data is not None:
                                lines = decoder.feed_data(data) if data else decoder.feed_eof()
                                lines.reverse()
                                decoder.lines = lines
                        finally:
                            answer.taking = False
                        if data is None:
                            await reader.wait()
                except ExchangeEnded:
                    pass
                if not self._ended or exchange.reader.failure_outcome is None or not self._retry():
                    break
                exchange = await self._open()
        except BaseException:
            await self._wait_closed()
            raise
        finally:
            self._reading = False
        if not answer.decoder.lines and exchange.reader.failure_outcome is None:
            self._truncated(exchange)

    async def _wait_closed(self) -> None:
        if self._call.exchange is not None:
            await self._call.exchange.wait_closed()

    async def _rest(self, exchange: Exchange) -> None:
        if self._outcome == "done":
            await exchange.discard_body()
        elif self._strict:
            raise self._truncation()

    def _deliver(self, exchange: Exchange) -> ChunkT:
        """Return the next chunk, and act upon it if it is the last, or if its reader wants to stop at one."""
        answer, reader = self._answer, exchange.reader
        chunk: ChunkT | None = None
        try:
            answer.taking = True
            # Looked at after the mark was set: whoever ends it and then looks at the answer does it the other way
            # round. So one of both leaves the chunk to the other.
            if not self._ended or reader.failure_outcome is None:
                chunk = answer.next_chunk(reader.received_at, plainly=self._until is None)
        except (ProtocolError, ErrorFrame) as exc:
            self._fail(exchange, stream_error(exc.frame, reader) if isinstance(exc, ErrorFrame) else exc)
        except BaseException:
            answer.interrupted()
            raise
        finally:
            answer.taking = False
        if chunk is None:
            raise self._broken_off()
        if chunk.done:
            self._commit(exchange, "done")
        elif self._until is not None:
            self._stop_if_enough(exchange, self._until)
        return chunk

    def _stop_if_enough(self, exchange: Exchange, until: Callable[[ChunkT], object]) -> None:
        merged = self._with_info(self._answer.merge.growing_result())
        assert merged is not None
        try:
            enough = until(merged)
        except BaseException:
            exchange.reader.close(ExchangeOutcome("closed", "the stream is closed: its until= raised an error"))
            raise
        if exchange.reader.failure_outcome is not None:
            # Aborted in there.
            raise self._broken_off()
        if enough:
            exchange.reader.close(ExchangeOutcome("complete"))
            self._commit(exchange, "until")

    # -- the end --

    def _truncated(self, exchange: Exchange) -> None:
        self._commit(exchange, "truncated")
        if self._strict:
            raise self._truncation()

    def _truncation(self) -> StreamTruncated:
        text = "the stream ended without a last chunk that says that the answer is done"
        return StreamTruncated(text, self.response)

    def _commit(self, exchange: Exchange, outcome: Outcome) -> None:
        # From here on no abort can end it any more; one that came first (from another thread) has ended it.
        if not exchange.reader.commit():
            raise self._broken_off()
        self._answer.drop_rest()
        self._outcome = outcome
        if exchange.observed is not None:
            exchange.report_end(outcome)

    def _fail(self, exchange: Exchange, error: Exception) -> NoReturn:
        # What follows what cannot be decoded is not a part of the answer: with a hole in it, it would be another one.
        self._answer.decoder.lines = []
        self._answer.absorbed = True
        exchange.reader.close(ExchangeOutcome("error", error))
        raise self._broken_off() from error.__cause__

    def _broken_off(self) -> BaseException:
        """Return what to raise now that the exchange has ended early."""
        assert self._call.exchange is not None
        return self._call.exchange.error(self.response)

    def _absorb(self) -> None:
        """After an early end, merge what had arrived and was not delivered."""
        exchange = self._call.exchange
        if exchange is not None and exchange.reader.failure_outcome is not None:
            self._answer.absorb(exchange)

    def _with_info(self, response: ChunkT | None) -> ChunkT | None:
        exchange = self._call.exchange
        if response is not None and exchange is not None:
            if self._info is None:
                self._info = exchange.response_info(self._response_model)
            response.set_response_info(self._info)
        return response

    def _abandon(self, kind: Kind = "closed") -> None:
        """Close it because nothing will read on; from any thread, and repeatable."""
        exchange = self._call.exchange
        if exchange is not None and self._outcome == "done":
            exchange.discard_body_soon()
        elif exchange is not None:
            exchange.reader.close_threadsafe(ExchangeOutcome(kind))
        else:
            self._call.close_threadsafe(ExchangeOutcome(kind))

    def _reader_cancelled(self) -> None:
        # Before its first step. If another task is reading, that one goes on: this one would have been turned away.
        if not self._reading:
            self._abandon("cancelled")

    def _dropped(self) -> bool:
        """Close it because it was dropped: called from ``__del__``, that is from anywhere.

        Returns:
            Whether it was open.
        """
        exchange = self._call.exchange
        if exchange is None:
            return False
        unclosed = False
        try:
            unclosed = self._opened and exchange.reader.outcome is None and exchange.reader.is_attached
            self._abandon()
        except BaseException as exc:
            # Once more, for what Ctrl-C kept it from.
            self._abandon()
            if isinstance(exc, Exception):
                raise
            raise_in_loop(exchange.loop, exc)
        return unclosed


class _ClosingIterator(Generic[ChunkT]):
    """An iterator over a stream. When it is dropped, that closes the stream."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream[ChunkT]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        # The step holds this iterator: `anext(aiter(stream))` gets its chunk before the stream is closed.
        return Guarded(self._stream._read_chunk(), self._reader_cancelled, "Stream.__anext__")  # noqa: SLF001

    def _reader_cancelled(self) -> None:
        self._stream._reader_cancelled()  # noqa: SLF001

    def __del__(self) -> None:
        # None if Ctrl-C came before it was made.
        stream = getattr(self, "_stream", None)
        # A second reader that was turned away must not take the stream from the first.
        if stream is not None and not stream._reading:  # noqa: SLF001
            stream._dropped()  # noqa: SLF001


class _LoopIterator(_ClosingIterator[ChunkT]):
    """What an ``async for`` holds of a stream; leaving the loop drops it."""

    # Its __anext__ is a method of the stream. Python looks it up in the class, where a slot stands for what the object
    # has; a method that calls the stream's would be one more call for each token.
    __slots__ = ("__anext__",)

    __anext__: Callable[[], Coroutine[Any, Any, ChunkT]]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, stream: Stream[ChunkT]) -> None:
        super().__init__(stream)
        self.__anext__ = stream._read_chunk  # noqa: SLF001


_GET_AITER = dis.opmap.get("GET_AITER")


def _called_by_async_for() -> bool:
    """Whether the caller's caller is at the head of an ``async for``, not at a call.

    Where that cannot be told it is taken for a call, which is right for both and costs more for each chunk.
    """
    try:
        frame = sys._getframe(2)  # noqa: SLF001  (the one that leads to nothing but the code's own instruction)
    except ValueError:
        return False
    return frame.f_code.co_code[frame.f_lasti] == _GET_AITER
