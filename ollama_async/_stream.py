"""``Stream``: an answer as it comes."""

from __future__ import annotations

import asyncio
import dis
import json
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn

import httpx
from pydantic import ValidationError

from ._awaitable import Guarded
from ._cancel import CancelToken, LiveObject, SetOnce, raise_in_loop
from ._channel import ExchangeEnded, ExchangeOutcome, Kind
from ._errors import ProtocolError, StreamBusy, StreamError, StreamTruncated
from ._failures import json_object, misfit, stream_error
from ._merge import Chunk, ChunkT, Merge, validators
from ._ndjson import LineSplitter
from ._secret import showable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
    from types import TracebackType
    from typing import Self

    from pydantic import BaseModel

    from ._exchange import Exchange
    from ._types import ResponseInfo

__all__ = ["Outcome", "Stream", "Timing"]

Outcome = Literal["done", "aborted", "timeout", "cancelled", "closed", "until", "error", "truncated"]


@showable
@dataclass(frozen=True, slots=True)
class Timing:
    """How fast an answer came.

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
    """An answer as it comes, chunk by chunk.

    Nothing is sent before the stream is first iterated, awaited or entered. These are the ways to use it::

        async for chunk in stream: ...              # left early, by break or whatever else, it is closed at once
        async for chunk in await stream: ...        # awaited, it is opened: errors of the request are raised here
        async with stream: ...                      # closed at the end of the block
        chunk = await anext(stream)                 # one chunk; to pause and go on
        answer = await stream.collect()             # all of it, merged

    It has one reader at a time. ``abort()`` and ``aclose()`` may be called by anyone.

    An end by ``abort()``, by a timeout, or by an error raises the same error for whoever reads, also later; after a
    cancellation or ``aclose()`` reading raises ``StreamClosed``; after the natural end it ends the iteration.
    """

    def __init__(
        self,
        start: Callable[[ExchangeOutcome | None], Exchange],
        merge: Merge[ChunkT],
        *,
        token: CancelToken | None = None,
        until: Callable[[ChunkT], object] | None = None,
        form: type[BaseModel] | None = None,
        strict: bool = False,
        max_line_bytes: int,
    ) -> None:
        self._start = start
        self._merge = merge
        self._add = merge.add
        self._validate = validators(merge.model).one
        self._token = token
        self._until = until
        self._response_model = form
        self._info: ResponseInfo | None = None
        self._strict = strict
        self._splitter = LineSplitter(max_line_bytes)
        self._exchange: Exchange | None = None
        # How it was ended before it was opened.
        self._outcome_before_start = SetOnce()
        self._opened = False
        # Lines that have arrived and are no chunks yet, the next one last.
        self._lines: list[bytes] = []
        # Chunks made of lines that came together: which is the next to deliver, up to where nothing can happen at one
        # but its delivery, and how many chunks were delivered before them. They are merged one by one, by the reader
        # alone: whoever looks at the answer, from a thread or a signal handler, then finds a beginning of it.
        self._chunks: list[ChunkT] = []
        self._index = self._fast_until = 0
        self._delivered_before = 0
        # Not empty once the end is decided.
        self._ended: Mapping[int, object] = self._outcome_before_start.slot
        self._reading = False
        self._outcome: Outcome | None = None
        self._body_read = False
        self._absorbed = False
        # Whether the reader is making chunks, or lines, of what has arrived; and somebody merges the rest of it.
        self._taking = self._merging = False
        # Reentrant: a signal handler that looks at the answer may interrupt another look.
        self._absorbing = threading.RLock()
        # Bytes that were done when it was last resumed.
        self._bytes_done = 0
        self._last_at = 0.0

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
        place = self._index
        # First: from here on a signal handler that looks at the answer leaves this chunk to us, as _absorb() says.
        self._index = place + 1
        # The usual case by itself, since this runs for every token. A second reader finds nothing that is ready while
        # the first one waits, and so is turned away below.
        if place < self._fast_until and not self._ended:
            chunk = self._chunks[place]
            try:
                self._add(chunk)
            except BaseException:
                self._interrupted()
                raise
            # A signal handler may have come meanwhile, and no chunk is delivered after an abort.
            if not self._ended:
                return chunk
        else:
            self._index = place
        while True:
            if self._reading or not (self._lines or self._index < len(self._chunks)):
                await self._fill()
            exchange = self._exchange
            assert exchange is not None
            if self._ended and exchange.failure_outcome is not None:
                raise self._broken_off()
            if not self._lines and self._index == len(self._chunks):
                raise StopAsyncIteration
            try:
                chunk = self._deliver(exchange)
            except StreamError:
                if self._retry(exchange) is None:
                    raise
            else:
                # As above: this is the last look before it is delivered.
                if not self._ended or exchange.failure_outcome is None:
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
        return self._close_threadsafe(ExchangeOutcome("aborted", reason))

    async def aclose(self) -> None:
        """Close the stream, from any task; idempotent. A task that is reading it gets ``StreamClosed``.

        Cancellation: safe; once it has begun, the stream is closed.
        """
        exchange = self._exchange
        if exchange is None:
            self._outcome_before_start.try_set(ExchangeOutcome("closed"))
            return
        if exchange.loop is not asyncio.get_running_loop():
            exchange.close_threadsafe(ExchangeOutcome("closed"))
            return
        if self._outcome == "done":
            await exchange.discard_body()
        else:
            exchange.close(ExchangeOutcome("closed"))
        await exchange.wait_closed()

    # -- what has come --

    @property
    def response(self) -> ChunkT | None:
        """The answer so far, merged; ``None`` before the first chunk.

        After an early end it also has the chunks that had arrived and had not been read.
        """
        self._absorb()
        response = self._merge.result()
        if response is not None and self._exchange is not None:
            if self._info is None:
                self._info = self._exchange.response_info(self._response_model)
            response.set_response_info(self._info)
        return response

    @property
    def text(self) -> str:
        """The text of ``response``."""
        self._absorb()
        return self._merge.text()

    @property
    def outcome(self) -> Outcome | None:
        """How the stream ended; ``None`` while it is open.

        ``"done"`` (the last chunk came), ``"aborted"``, ``"timeout"``, ``"cancelled"`` (the reading task was),
        ``"closed"`` (by ``aclose()``, by leaving the loop, or dropped), ``"until"``, ``"error"``, or ``"truncated"``
        (the body ended properly, but the last chunk never came).
        """
        if self._outcome is not None:
            return self._outcome
        end = self._exchange_outcome()
        return None if end is None or end.kind == "complete" else end.kind

    @property
    def reason(self) -> Any:
        """Why it ended: the reason given to ``abort()``, the phase that timed out, or the error; else ``None``."""
        end = self._exchange_outcome()
        if end is None:
            return None
        if end.kind == "error" and self._exchange is not None:
            return self._broken_off()
        return end.cause

    @property
    def timing(self) -> Timing:
        """How fast it came."""
        exchange = self._exchange
        if exchange is None:
            return Timing(None, 0.0, 0, None)
        chunks = self._delivered_before + self._index
        first = exchange.first_line_at - exchange.started_at if exchange.first_line_at else None
        now = exchange.ended_at or exchange.loop.time()
        span = (self._last_at or now) - exchange.first_line_at
        rate = (chunks - 1) / span if chunks > 1 and span > 0 else None
        return Timing(first, now - exchange.started_at, chunks, rate)

    @property
    def token(self) -> CancelToken:
        """The token that was given to the call; if none was, one of the stream's own."""
        if self._token is None:
            self._token = CancelToken()
            if self._exchange is not None:
                self._exchange.register(self._token)
        return self._token

    @property
    def status_code(self) -> int | None:
        """The HTTP status; ``None`` before it has come."""
        return (self._exchange and self._exchange.status) or None

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the answer; empty before they have come."""
        return httpx.Headers(list(self._exchange.headers) if self._exchange else None)

    def __repr__(self) -> str:
        state = self.outcome or ("open" if self._opened else "not started" if self._exchange is None else "opening")
        return f"<Stream of {self._merge.model.__name__}: {state}, {self._delivered_before + self._index} chunks>"

    def __del__(self) -> None:
        # Its last attribute is missing if Ctrl-C came before it was made.
        if hasattr(self, "_last_at") and self._dropped():
            chunks = self._delivered_before + self._index
            text = f"unclosed <Stream of {self._merge.model.__name__}: open, {chunks} chunks>"
            warnings.warn(text, ResourceWarning, source=self, stacklevel=1)

    # -- inside --

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
        if self._exchange is not None and self._exchange.loop is not asyncio.get_running_loop():
            raise StreamBusy("the stream belongs to another event loop")

    async def _open(self) -> Exchange:
        exchange = self._exchange
        if exchange is None:
            exchange = self._exchange = self._start(self._outcome_before_start.value)
            # It holds the call and its body, which an answer of minutes does not need.
            self._start = _started
            if self._token is not None:
                exchange.register(self._token)
            early = self._outcome_before_start.value
            if early is not None:
                # Ended by another thread in this very moment.
                exchange.close(early)
        while True:
            with suppress(ExchangeEnded):
                await exchange.open()
                await exchange.raise_for_status()
                self._opened = True
                self._ended = exchange.outcome_slot
                return exchange
            successor = self._retry(exchange)
            if successor is None:
                raise self._broken_off()
            exchange = successor

    def _retry(self, failed: Exchange) -> Exchange | None:
        """Put the exchange that tries again in the place of one that has failed, if that is allowed."""
        self._clear()
        if self._merge.bytes_done > self._bytes_done:
            self._bytes_done = self._merge.bytes_done
            failed.note_progress()
        # In one statement, so that Ctrl-C finds either one or the other.
        self._exchange = failed.next_attempt() or failed
        successor = self._exchange
        if successor is failed:
            return None
        self._opened = self._body_read = self._absorbed = False
        self._info = None
        self._lines = []
        self._splitter.flush()
        # Ended by somebody who found the one that had failed.
        early = self._outcome_before_start.value
        if early is not None:
            successor.close(early)
        return successor

    async def _fill(self) -> None:
        """Get lines, or get to the end."""
        self._check_reader()
        try:
            self._reading = True
            self._clear()
            exchange = self._exchange
            if exchange is None or not self._opened:
                exchange = await self._open()
            if self._outcome is not None:
                await self._rest(exchange)
                return
            while True:
                try:
                    while not self._lines and not self._body_read:
                        try:
                            self._taking = True
                            if self._splitter.too_long:
                                self._too_long(exchange)
                            block = exchange.read_nowait()
                            if block is not None:
                                self._feed(exchange, block)
                        finally:
                            self._taking = False
                        if block is None:
                            await exchange.wait()
                except ExchangeEnded:
                    pass
                if not self._ended or exchange.failure_outcome is None or self._retry(exchange) is None:
                    break
                exchange = await self._open()
        finally:
            self._reading = False
        if not self._lines and exchange.failure_outcome is None:
            self._truncated(exchange)

    async def _rest(self, exchange: Exchange) -> None:
        if self._outcome == "done":
            await exchange.discard_body()
        elif self._strict:
            raise self._truncation()

    def _too_long(self, exchange: Exchange) -> None:
        try:
            self._splitter.check()
        except ProtocolError as exc:
            self._fail(exchange, exc)

    def _feed(self, exchange: Exchange, block: bytes) -> None:
        try:
            lines = self._splitter.feed(block) if block else []
        except ProtocolError as exc:
            self._fail(exchange, exc)
        if not block:
            self._body_read = True
            rest = self._splitter.flush()
            lines = [rest] if rest else []
        lines.reverse()
        self._lines = lines

    def _deliver(self, exchange: Exchange) -> ChunkT:
        """Return the next chunk, and act upon it if it is the last, or if its reader wants to stop at one."""
        chunk: ChunkT | None = None
        try:
            self._taking = True
            # Looked at after the mark was set: whoever ends it and then looks at the answer does it the other way
            # round. So one of both leaves the chunk to the other.
            if not self._ended or exchange.failure_outcome is None:
                if self._index == len(self._chunks):
                    self._next_batch(exchange)
                chunk = self._chunks[self._index]
                self._index += 1
                self._add(chunk)
        except BaseException:
            self._interrupted()
            raise
        finally:
            self._taking = False
        if chunk is None:
            raise self._broken_off()
        if chunk.done:
            self._commit(exchange, "done")
        elif self._until is not None:
            self._stop_if_enough(exchange, self._until)
        return chunk

    def _interrupted(self) -> None:
        """After Ctrl-C or the like: a chunk that it kept from being merged waits again."""
        if self._merge.count() < self._delivered_before + self._index:
            self._index -= 1

    def _next_batch(self, exchange: Exchange) -> None:
        """Make chunks of the next lines, together if they allow it: that is cheaper than one by one."""
        if self._index:
            self._clear()
        self._last_at = exchange.received_at
        lines, chunks = self._lines, []
        # The first one by itself: it is what is waited for, and does not wait for those that came with it.
        if len(lines) > 1 and self._merge.batch_size > 1 and self._delivered_before:
            chunks = _parse_batch(self._merge, lines[: -self._merge.batch_size - 1 : -1])
        if not chunks:
            try:
                chunks = [self._parse(exchange, lines[-1])]
            except (ProtocolError, StreamError) as exc:
                self._fail(exchange, exc)
        lines = lines[: -len(chunks)]
        plain = len(chunks)
        if any(map(_is_done, chunks)):
            plain = next(place for place, chunk in enumerate(chunks) if chunk.done)
            del chunks[plain + 1 :]
            lines = []
        # In one statement, within which no signal handler runs: none finds a line twice, or not at all.
        self._chunks, self._lines, self._fast_until = chunks, lines, 0 if self._until is not None else plain

    def _clear(self) -> None:
        """Let go of chunks that are delivered."""
        self._delivered_before, self._chunks, self._index, self._fast_until = (
            self._delivered_before + self._index,
            [],
            0,
            0,
        )

    def _parse(self, exchange: Exchange, line: bytes) -> ChunkT:
        # A key "error" can only be here if these bytes are (inside a string the quotes would be escaped).
        if b'"error"' in line:
            _raise_error_frame(line, exchange)
        try:
            return self._validate(line)
        except ValidationError as exc:
            raise ProtocolError(_explain_line(self._merge.model, line, last=self._body_read)) from exc

    def _stop_if_enough(self, exchange: Exchange, until: Callable[[ChunkT], object]) -> None:
        merged = self.response
        assert merged is not None
        try:
            enough = until(merged)
        except BaseException:
            exchange.close(ExchangeOutcome("closed", "the stream is closed: its until= raised an error"))
            raise
        if exchange.failure_outcome is not None:
            # Aborted in there.
            raise self._broken_off()
        if enough:
            exchange.close(ExchangeOutcome("complete"))
            self._commit(exchange, "until")

    def _truncated(self, exchange: Exchange) -> None:
        self._commit(exchange, "truncated")
        if self._strict:
            raise self._truncation()

    def _truncation(self) -> StreamTruncated:
        text = "the stream ended without a last chunk that says that the answer is done"
        return StreamTruncated(text, self.response)

    def _commit(self, exchange: Exchange, outcome: Outcome) -> None:
        # From here on no abort can end it any more; one that came first (from another thread) has ended it.
        if not exchange.commit():
            raise self._broken_off()
        self._lines = []
        del self._chunks[self._index :]
        self._outcome = outcome

    def _fail(self, exchange: Exchange, error: Exception) -> NoReturn:
        # What follows what cannot be read is no part of the answer: with a hole in it, it would be another one.
        self._lines = []
        self._absorbed = True
        exchange.close(ExchangeOutcome("error", error))
        raise self._broken_off() from error.__cause__

    def _broken_off(self) -> BaseException:
        """Return what to raise now that the exchange has ended early."""
        assert self._exchange is not None
        return self._exchange.error(self.response)

    def _absorb(self) -> None:
        """After an early end, merge what had arrived and was not delivered, as far as it can be read."""
        exchange = self._exchange
        if exchange is None or exchange.failure_outcome is None or self._absorbed:
            return
        if self._taking or self._merge.count() < self._delivered_before + self._index:
            # The reader is at it: a signal handler has interrupted it, or this is another thread. It finds the end
            # right after, and merges the rest in order.
            return
        # Its reader, and the thread that aborted it, may both be here to see what has come.
        with self._absorbing:
            self._absorb_once(exchange)

    def _absorb_once(self, exchange: Exchange) -> None:
        # A signal handler that looks may have interrupted another look: it sees what that has merged.
        if not (self._absorbed or self._merging):
            self._merging = True
            try:
                self._merge_rest(exchange)
                self._absorbed = True
            finally:
                self._merging = False

    def _merge_rest(self, exchange: Exchange) -> None:
        """Merge what has arrived and was not delivered, as far as it can be read."""
        while (place := self._merge.count() - self._delivered_before) < len(self._chunks):
            self._add(self._chunks[place])
            if self._chunks[place].done:
                return
        with suppress(ProtocolError, StreamError):
            while True:
                while self._lines:
                    chunk = self._parse(exchange, self._lines[-1])
                    self._add(chunk)
                    self._lines.pop()
                    if chunk.done:
                        return
                data = exchange.read_buffered()
                if not data:
                    return
                self._lines = self._splitter.feed(data)[::-1]

    def _exchange_outcome(self) -> ExchangeOutcome | None:
        end: ExchangeOutcome | None = (
            self._exchange.outcome if self._exchange is not None else self._outcome_before_start.value
        )
        return end

    def _close_threadsafe(self, end: ExchangeOutcome) -> bool:
        failed = self._exchange
        if failed is not None:
            if failed.close_threadsafe(end):
                return True
            if self._outcome is not None or failed.retry_delay() is None:
                return False
        decided = self._outcome_before_start.try_set(end)
        # Opened by its own loop in this very moment, while this is another thread.
        exchange = self._exchange
        if decided and exchange is not None and exchange is not failed:
            exchange.close_threadsafe(end)
        return decided

    def _abandon(self, kind: Kind = "closed") -> None:
        """Nobody will read on; from any thread, and repeatable."""
        exchange = self._exchange
        if exchange is None:
            self._outcome_before_start.try_set(ExchangeOutcome(kind))
        elif self._outcome == "done":
            exchange.discard_body_soon()
        else:
            exchange.close_threadsafe(ExchangeOutcome(kind))

    def _reader_cancelled(self) -> None:
        # Before its first step. If another task is reading, that one goes on: this one would have been turned away.
        if not self._reading:
            self._abandon("cancelled")

    def _dropped(self) -> bool:
        """Nobody will read on: called from ``__del__``, that is from anywhere.

        Returns:
            Whether it was open.
        """
        exchange = self._exchange
        if exchange is None:
            return False
        unclosed = False
        try:
            unclosed = self._opened and exchange.outcome is None and exchange.is_attached
            self._abandon()
        except BaseException as exc:
            # The second time for what Ctrl-C kept it from.
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
    """What an ``async for`` holds of a stream; it is dropped when the loop is left."""

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


def _started(_: ExchangeOutcome | None) -> NoReturn:
    raise RuntimeError("the stream has been started")


_is_done: Callable[[Chunk], bool] = attrgetter("done")


def _parse_batch(merge: Merge[ChunkT], lines: list[bytes]) -> list[ChunkT]:
    """Make chunks of the first of some lines, as if they were one JSON array.

    Returns:
        Chunks of so many of the first lines as can be taken together; none if the first has to be looked at by itself.
    """
    if len(lines) < 2:
        return []
    # Each of these has to be a JSON text of its own, and what is none may become one with its neighbours. Not here: a
    # string cannot span a line end, and without a list in them the lines nest by objects only, within which no "{"
    # follows a comma. So each "{" at the start of a line begins a new element.
    body = b",\n".join(lines)
    count = len(lines)
    for sign in (b"[", b'"error"'):
        at = body.find(sign)
        if at >= 0:
            count = body.count(b"\n", 0, at)
            body = b",\n".join(lines[:count])
    if count < 2 or not body.startswith(b"{") or body.count(b",\n{") != count - 1:
        return []
    try:
        chunks = validators(merge.model).many(b"[%b]" % body)
    except ValidationError:
        return []
    # Several elements in one line.
    return chunks if len(chunks) == count else []


def _raise_error_frame(line: bytes, exchange: Exchange) -> None:
    """Raise a ``StreamError`` if the line is an error frame, in any of the shapes that servers send."""
    frame = json_object(line)
    if frame.get("error") is not None:
        raise stream_error(frame, exchange)


def _explain_line(model: type[BaseModel], line: bytes, *, last: bool) -> str:
    shown = line[:80].decode("utf-8", "replace")
    more = "..." if len(line) > 80 else ""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        if last:
            return f"the server's answer ends in the middle of a line: {shown!r}{more}"
        return f"the server's answer is not NDJSON, it has the line {shown!r}{more}"
    try:
        # What chunks are made by has two descriptions of one, and says what is wrong by both.
        model.model_validate_json(line)
    except ValidationError as exc:
        return f"the server's answer has a line that is no chunk of an answer: {misfit(exc, line)}"
    return f"the server's answer has a line that is no chunk of an answer: {shown!r}{more}"
