"""``ChunkReader``: reads an answer chunk by chunk, and commits its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, Literal

from ollama_async._errors import OllamaError, ProtocolError, StreamBusy, StreamError, StreamTruncated
from ollama_async._loops import raise_in_loop
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome

from .answer import Answer
from .chunk import ChunkT
from .condition import Condition
from .decoder import ErrorFrame
from .failures import stream_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from pydantic import BaseModel

    from ollama_async._wire.outcome import Kind

    from .call import Call
    from .chunk import Merge, ResponseInfo
    from .decoder import Decoder
    from .exchange import Exchange

Outcome = Literal["done", "aborted", "timeout", "cancelled", "closed", "until", "error", "truncated"]


class ChunkReader(Generic[ChunkT]):
    """What a stream reads its answer with, over all attempts of its call.

    Args:
        call: Makes the attempts.
        merge: Merges the chunks.
        decoder: Makes chunks of bytes.
        until: A condition, or a predicate on the merged answer: where it is met, the answer ends.
        response_model: The class that the text of the answer is to be read as.
        strict: Whether an answer without a last chunk is an error.

    Attributes:
        call: As given.
        answer: What has arrived.
        opened: Whether the head of the answer of the present attempt has arrived.
        busy: Whether a task is reading.
        committed: How it ended, if nothing can end it in another way any more.
        response_model: As given.
    """

    __slots__ = (
        "_bytes_done",
        "_deadline",
        "_ended",
        "_info",
        "_strict",
        "_until",
        "answer",
        "busy",
        "call",
        "committed",
        "opened",
        "response_model",
    )

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
        self.call: Call = call
        self.answer: Answer[ChunkT] = Answer(merge, decoder)
        self._until = until
        self._deadline: tuple[float, object] | None = None
        # Most streams have none, and an abstract class is slow to say whether an object is one of its.
        if until is not None and isinstance(until, Condition):
            self._until, self._deadline = until.watch(), until.deadline()
        self.response_model: type[BaseModel] | None = response_model
        self._info: ResponseInfo | None = None
        self._strict = strict
        self.opened: bool = False
        # Not empty once the outcome of the present attempt is decided.
        self._ended: Mapping[int, object] = {}
        self.busy: bool = False
        self.committed: Outcome | None = None
        # Bytes that were done when it was last resumed.
        self._bytes_done = 0

    async def read(self) -> ChunkT:
        """Return the next chunk.

        Raises:
            StopAsyncIteration: The answer is at its end.
            OllamaError: As ``Stream.__anext__()`` says.

        Cancellation: the socket is closed at once.
        """
        answer = self.answer
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
            # The step that finds the end of a good answer, which nothing can end any more.
            exchange = self.call.exchange
            if self.committed == "done" and exchange is not None and not exchange.reader.is_attached:
                raise StopAsyncIteration
        while True:
            if self.busy or not (answer.decoder.lines or answer.index < len(answer.chunks)):
                await self._fill()
            exchange = self.call.exchange
            assert exchange is not None
            reader = exchange.reader
            if self._ended and reader.failure_outcome is not None:
                raise self.broken_off()
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

    async def read_all(self) -> None:
        """Read to the end, as a loop over ``read()`` does, for less: nobody waits for the first chunk, or for each.

        Cancellation: the socket is closed at once.
        """
        answer = self.answer
        answer.together = True
        while not self._at_end:
            try:
                await self.read()
            except StopAsyncIteration:
                return
            # As read() does.
            while (place := answer.index) < answer.fast_until and not self._ended:
                answer.index = place + 1
                try:
                    answer.add(answer.chunks[place])
                except BaseException:
                    answer.interrupted()
                    raise

    @property
    def _at_end(self) -> bool:
        """Whether nothing of a good answer is to come, and nothing can end it any more."""
        # As in read(), for which a call more would be one for each token.
        exchange = self.call.exchange
        return self.committed == "done" and exchange is not None and not exchange.reader.is_attached

    async def ready(self) -> None:
        """Send the request and wait for the head of the answer, unless it has arrived.

        Raises:
            OllamaError: As ``read()`` does.

        Cancellation: the socket is closed at once.
        """
        if not self.opened:
            self._check_reader()
            try:
                self.busy = True
                await self._open()
            finally:
                self.busy = False

    def response(self) -> ChunkT | None:
        """Return the answer so far, merged; after an early end, with what had arrived and was not read."""
        self._absorb()
        return self.with_info(self.answer.merge.result())

    def text(self) -> str:
        """Return the text of ``response()``."""
        self._absorb()
        return self.answer.merge.text()

    def _check_reader(self) -> None:
        if self.busy:
            raise StreamBusy("another task is reading this stream; a stream has one reader at a time")
        exchange = self.call.exchange
        if exchange is not None and exchange.loop is not asyncio.get_running_loop():
            raise StreamBusy("the stream belongs to another event loop: read it in the loop in which it was opened")

    async def _open(self) -> Exchange:
        return await self.call.run(self._note_opened, self.response)

    async def _note_opened(self, exchange: Exchange) -> Exchange:
        self.opened = True
        self._info = None
        self._ended = exchange.reader.outcome_slot
        if self._deadline is not None:
            exchange.set_deadline(*self._deadline)
        return exchange

    def _retry(self) -> bool:
        """Make another attempt after one that broke off, if that is allowed."""
        answer, exchange = self.answer, self.call.exchange
        answer.clear()
        if answer.merge.bytes_done > self._bytes_done and exchange is not None:
            self._bytes_done = answer.merge.bytes_done
            exchange.budget.note_progress()
        if not self.call.retry():
            return False
        self.opened = False
        answer.restart()
        return True

    async def _fill(self) -> None:
        """Get lines, or get to the end."""
        self._check_reader()
        answer = self.answer
        try:
            self.busy = True
            answer.clear()
            exchange = self.call.exchange
            if exchange is None or not self.opened:
                exchange = await self._open()
            if self.committed is not None:
                await self._rest(exchange)
                return
            while True:
                decoder, reader = answer.decoder, exchange.reader
                try:
                    while not decoder.lines and not decoder.eof and not self._ended:
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
            self.busy = False
        if self._ended and exchange.reader.failure_outcome is None:
            # Nothing but the deadline of until= ends it while it is read.
            self._commit(exchange, "until")
        elif not answer.decoder.lines and exchange.reader.failure_outcome is None:
            self._truncated(exchange)

    async def _wait_closed(self) -> None:
        if self.call.exchange is not None:
            await self.call.exchange.wait_closed()

    async def _rest(self, exchange: Exchange) -> None:
        if self.committed == "done":
            await exchange.discard_body()
        elif self._strict and self.committed == "truncated":
            raise self._truncation()

    def _deliver(self, exchange: Exchange) -> ChunkT:
        """Return the next chunk, and act upon it if it is the last, or if its reader wants to stop at one."""
        answer, reader = self.answer, exchange.reader
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
            raise self.broken_off()
        if chunk.done:
            self._commit(exchange, "done")
        elif self._until is not None:
            self._stop_if_enough(exchange, self._until)
        return chunk

    def _stop_if_enough(self, exchange: Exchange, until: Callable[[ChunkT], object]) -> None:
        merged = self.with_info(self.answer.merge.growing_result())
        assert merged is not None
        try:
            enough = until(merged)
        except BaseException:
            exchange.reader.close(ExchangeOutcome("closed", "the stream is closed: its until= raised an error"))
            raise
        if exchange.reader.failure_outcome is not None:
            # Aborted in there.
            raise self.broken_off()
        if enough:
            self._stop(exchange, enough if isinstance(enough, Condition) else None)

    # -- the end --

    def stop(self, met: Condition) -> None:
        """End it, unless it is at its end: what reads it has enough."""
        if self.committed is None and self.call.exchange is not None:
            self._stop(self.call.exchange, met)

    def fail(self, error: Exception) -> NoReturn:
        """End it, unless it is at its end, and raise an error that was found in it by what reads it."""
        if self.committed is None and self.call.exchange is not None:
            self._fail(self.call.exchange, error)
        if isinstance(error, OllamaError):
            error.partial = self.response()
        raise error

    def _stop(self, exchange: Exchange, met: Condition | None) -> None:
        exchange.reader.close(ExchangeOutcome("complete", met))
        self._commit(exchange, "until")

    def _truncated(self, exchange: Exchange) -> None:
        self._commit(exchange, "truncated")
        if self._strict:
            raise self._truncation()

    def _truncation(self) -> StreamTruncated:
        text = "the stream ended without a last chunk that says that the answer is done"
        return StreamTruncated(text, self.response())

    def _commit(self, exchange: Exchange, outcome: Outcome) -> None:
        # From here on no abort can end it any more; one that came first (from another thread) has ended it.
        if not exchange.reader.commit():
            raise self.broken_off()
        self.answer.drop_rest()
        self.committed = outcome
        if exchange.observed is not None:
            exchange.report_end(outcome)

    def _fail(self, exchange: Exchange, error: Exception) -> NoReturn:
        # What follows what cannot be decoded is not a part of the answer: with a hole in it, it would be another one.
        self.answer.decoder.lines = []
        self.answer.absorbed = True
        exchange.reader.close(ExchangeOutcome("error", error))
        raise self.broken_off() from error.__cause__

    def broken_off(self) -> BaseException:
        """Return what to raise now that the exchange has ended early."""
        assert self.call.exchange is not None
        return self.call.exchange.error(self.response())

    def _absorb(self) -> None:
        """After an early end, merge what had arrived and was not delivered."""
        exchange = self.call.exchange
        if exchange is not None and exchange.reader.failure_outcome is not None:
            self.answer.absorb(exchange)

    def with_info(self, response: ChunkT | None) -> ChunkT | None:
        """Tell a merged answer where it comes from."""
        exchange = self.call.exchange
        if response is not None and exchange is not None:
            if self._info is None:
                self._info = exchange.response_info(self.response_model)
            response.set_response_info(self._info)
        return response

    def _abandon(self, kind: Kind = "closed") -> None:
        """Close it because nothing will read on; from any thread, and repeatable."""
        exchange = self.call.exchange
        if exchange is not None and self.committed == "done":
            exchange.discard_body_soon()
        elif exchange is not None:
            exchange.reader.close_threadsafe(ExchangeOutcome(kind))
        else:
            self.call.close_threadsafe(ExchangeOutcome(kind))

    def reader_cancelled(self) -> None:
        """Close it because the task that was to read was cancelled before its first step."""
        # If another task is reading, that one goes on: this one would have been turned away.
        if not self.busy:
            self._abandon("cancelled")

    def dropped(self) -> bool:
        """Close it because it was dropped: called from ``__del__``, that is from anywhere.

        Returns:
            Whether it was open.
        """
        exchange = self.call.exchange
        # The usual case by itself: it is at its end, and the iterator was dropped before the stream is.
        if exchange is None or (exchange.reader.tidied and not exchange.reader.is_attached):
            return False
        unclosed = False
        try:
            unclosed = self.opened and exchange.reader.outcome is None and exchange.reader.is_attached
            self._abandon()
        except BaseException as exc:
            # Once more, for what Ctrl-C kept it from.
            self._abandon()
            if isinstance(exc, Exception):
                raise
            raise_in_loop(exchange.loop, exc)
        return unclosed
