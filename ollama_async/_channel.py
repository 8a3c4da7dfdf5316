"""One answer on its way from a connection to its reader: the buffer, the end, and the handle that cuts it off.

A reader has one writer (a connection, or the task that drives somebody else's transport) and one reader. How it ends
is decided once, by the first to say so: the reader, the writer, a timer, or ``abort()`` from any thread or signal
handler.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ._cancel import SetOnce, in_loop, resolve
from ._errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._unpack import Unpacker

__all__ = ["HIGH_WATER", "ExchangeEnded", "ExchangeOutcome", "Link", "ResponseReader", "cancel_once", "join_cancelled"]

# Reading from the socket stops when this many bytes wait to be read, and goes on when the reader waits for more, so
# that a slow reader of a fast server holds a bounded amount. One read brings up to as much on top of it, over TLS up to
# 256 KiB.
HIGH_WATER = 64 * 1024

Kind = Literal["complete", "error", "aborted", "timeout", "closed", "cancelled"]


# How long a caller waits for a task of ours that has been told to stop.
_JOIN_SECONDS = 0.5


class ExchangeOutcome:
    """How a reader ended; ``cause`` is the error, the abort reason, or the phase that timed out."""

    __slots__ = ("cause", "kind")

    def __init__(self, kind: Kind, cause: object = None) -> None:
        self.kind: Kind = kind
        self.cause = cause


class ExchangeEnded(Exception):  # noqa: N818  (no error by itself: the reader is told that the reader's end is decided)
    """Raised out of whatever the reader was waiting for when the reader ends before it is complete."""

    def __init__(self, end: ExchangeOutcome) -> None:
        super().__init__(end.kind)
        self.end = end


class Link(Protocol):
    """What a reader hangs on: a connection, a connection in the making, a task that drives a foreign transport."""

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Put the FIN on its way, at once. From any thread or signal handler; touches nothing of the event loop."""

    def close_for(self, reader: ResponseReader) -> None:
        """Give everything back. In the event loop's thread."""

    def pause_reading(self) -> None:
        """Take nothing in for now. In the event loop's thread."""

    def resume_reading(self) -> None:
        """There is room again. In the event loop's thread."""


class ResponseReader:
    """Blocks of one answer's body in the order they came, until the end."""

    # So many attributes in a dict are 1.3 KiB more for each open stream.
    __slots__ = (
        "__weakref__",
        "_blocks",
        "_buffered_bytes",
        "_failure",
        "_link",
        "_outcome",
        "_waiter",
        "by_line",
        "complete_at_eof",
        "eof",
        "first_line_at",
        "headers",
        "http_version",
        "last_activity_at",
        "loop",
        "paused",
        "reason_phrase",
        "received_at",
        "sent_at",
        "status",
        "tidied",
        "unpacker",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # Whether the answer is settled once its last byte has arrived (else: once the reader has got to it), and
        # whether it is made of lines.
        self.complete_at_eof = True
        self.by_line = False
        # Unpacks the body, where it is packed.
        self.unpacker: Unpacker | None = None
        self.status = 0
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.reason_phrase = b""
        self.http_version = b"HTTP/1.1"
        # Times of the loop's clock, 0 for not yet: the request is out; the first line is there; the exchange last got
        # on; and the one at which what is being pushed has arrived, noted once for all that one read brings.
        self.sent_at = 0.0
        self.first_line_at = 0.0
        self.last_activity_at = 0.0
        self.received_at = 0.0
        self.eof = False
        self.paused = False
        self._blocks: list[bytes] = []
        self._buffered_bytes = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._link: Link | None = None
        self._outcome = SetOnce()
        # Whether all that follows from the end has been done, or will be in the loop's next round. Set after the deed.
        self.tidied = False

    # -- the writer's side, in the loop's thread --

    def restart(self) -> None:
        """Begin anew: the answer that has come was a redirect, or asked for credentials, and another one follows."""
        self.status = 0
        self.headers = ()
        self.unpacker = None
        self.eof = False
        self.paused = False
        self.sent_at = self.first_line_at = 0.0
        self._blocks = []
        self._buffered_bytes = 0

    def attach(self, link: Link) -> None:
        """Hang the reader on a link; if it has ended in the meantime, the link is cut at once."""
        self._link = link
        # finish() decides first and looks for the link then; this does it the other way round. One of both sees it.
        if self._outcome.slot:
            link.shutdown_for(self)
            link.close_for(self)

    def detach(self) -> None:
        """Let go of the link: the answer has arrived, the connection may serve others."""
        self._link = None

    def drop_link(self) -> None:
        """Close what the reader hangs on, and leave it to others how it ends."""
        link = self._link
        if link is not None:
            link.shutdown_for(self)
            link.close_for(self)
            self._link = None

    def feed_head(self, status: int, reason: bytes, headers: Sequence[tuple[bytes, bytes]], version: bytes) -> None:
        """Take the head of the answer."""
        self.reason_phrase = reason
        self.headers = headers
        self.http_version = version
        self.status = status
        self.wake()

    def feed_data(self, block: bytes) -> bool:
        """Take a block of the body, and wake the reader.

        Returns:
            Whether there is room for more; if not, the link's ``resume()`` is called when there is.
        """
        if self.unpacker is not None:
            block = self._unpacked(self.unpacker, block)
            if not block:
                return not self.paused
        # A byte now and then is not an answer: what counts is whole lines where the answer is made of lines.
        if not self.by_line or b"\n" in block:
            if not self.first_line_at:
                self.first_line_at = self.received_at
            self.last_activity_at = self.received_at
        self._blocks.append(block)
        self._buffered_bytes += len(block)
        if self._buffered_bytes > HIGH_WATER:
            self.paused = True
        # As wake() does, which would be two more calls for each token.
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            try:
                waiter.set_result(None)
            except asyncio.InvalidStateError:
                # As in resolve().
                return not self.paused
        return not self.paused

    def _unpacked(self, unpacker: Unpacker, block: bytes) -> bytes:
        if self._outcome.slot:
            return b""
        try:
            return unpacker.feed(block)
        except ProtocolError as exc:
            # Given back in the next round: the writer is in the middle of a read.
            self.close_threadsafe(ExchangeOutcome("error", exc))
            return b""

    def feed_eof(self) -> None:
        """The whole answer has arrived."""
        if self.unpacker is not None and not self.unpacker.whole:
            self.detach()
            self.set_exception(ProtocolError("the answer ends in the middle of what is packed in it"))
            return
        self.eof = True
        if self.complete_at_eof:
            self._decide(ExchangeOutcome("complete"))
        self.detach()
        self.wake()

    def set_exception(self, error: Exception) -> None:
        """The answer broke off; what has arrived is still delivered before the reader gets the error."""
        self._failure = error
        # An error that a waiting reader is about to get has been reached: an abort that comes after it is too late.
        if self._waiter is not None and not self._blocks:
            self.close(ExchangeOutcome("error", error))
        self.wake()

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None:
            resolve(self._waiter)

    # -- the reader's side, in the loop's thread --

    @property
    def outcome(self) -> ExchangeOutcome | None:
        """How it ended, ``None`` while open."""
        # As its value, without the call: a stream asks ten times.
        end: ExchangeOutcome | None = self._outcome.slot.get(0)
        return end

    @property
    def outcome_slot(self) -> Mapping[int, object]:
        """What is empty as long as the end is not decided, and stays the same object: for those who look very often."""
        return self._outcome.slot

    @property
    def failure_outcome(self) -> ExchangeOutcome | None:
        """How it ended, unless it is open or at its natural end."""
        end = self.outcome
        return None if end is None or end.kind == "complete" else end

    def check(self) -> None:
        """Raise ``Ended`` if the end is decided and is not the natural one."""
        if self._failure is not None and not self._blocks:
            self.close(ExchangeOutcome("error", self._failure))
        if self._outcome.slot:
            end = self.failure_outcome
            if end is not None:
                raise ExchangeEnded(end)

    @property
    def is_attached(self) -> bool:
        """Whether something may still arrive."""
        return self._link is not None

    async def wait(self) -> None:
        """Wait until something has happened.

        Cancellation: the reader is torn down, then the cancellation goes on.
        """
        # Whether there is anything to check is asked here, and in at_hand(), without a call: it is for every token.
        try:
            if self._outcome.slot or self._failure is not None:
                self.check()
            if self.paused and not self._blocks:
                self.resume_reading()
            waiter = self._waiter = self.loop.create_future()
            try:
                await waiter
            except BaseException:
                self.close(ExchangeOutcome("cancelled"))
                raise
            finally:
                self._waiter = None
            if self._outcome.slot or self._failure is not None:
                self.check()
        except BaseException:
            await self.wait_closed()
            raise

    async def wait_closed(self) -> None:
        """Wait until nothing is left of a reader that has ended.

        Cancellation: safe, it ends all the same.
        """

    async def wait_for_head(self) -> None:
        """Wait until the head of the answer is there."""
        while not self.status:
            await self.wait()

    async def read(self) -> bytes:
        """Wait for the next bytes of the body.

        Returns:
            All that has arrived and not been read; ``b""`` after the end.

        Cancellation: the reader is torn down, then the cancellation goes on.
        """
        while (data := self.read_nowait()) is None:
            await self.wait()
        return data

    def read_nowait(self) -> bytes | None:
        """Return what ``receive()`` would without waiting, ``None`` if it would have to wait."""
        if not self._blocks and not self.eof:
            return None
        if self._outcome.slot or self._failure is not None:
            self.check()
        return self.read_buffered() if self._blocks else b""

    def read_buffered(self) -> bytes:
        """Return the bytes that wait to be read, without waiting for more."""
        blocks = self._blocks
        data = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        self._blocks = []
        self._buffered_bytes = 0
        return data

    def resume_reading(self) -> None:
        """Let more come in, after a pause."""
        # Not when the reader takes a block, but when it has nothing left of it: meanwhile another one would be held.
        self.paused = False
        # The time the reader took is not the server's silence.
        self.last_activity_at = self.loop.time()
        if self._link is not None:
            self._link.resume_reading()

    # -- the end --

    def close_threadsafe(self, end: ExchangeOutcome) -> bool:
        """End the reader and put the FIN on its way, from any thread or signal handler.

        The rest (waking the reader, giving the transport back) follows in the loop's next round: a signal handler may
        have interrupted the loop in the middle of its own bookkeeping, which must not be entered again.

        What it does can be repeated, and is, until one call got through all of it: Ctrl-C may come at any line.

        Returns:
            Whether this call decided.
        """
        decided = self._outcome.try_set(end)
        if self.tidied:
            return False
        if self.failure_outcome is None:
            self._tidy_up()
            return False
        # The FIN before everything else: the server works until it has seen it.
        link = self._link
        try:
            if link is not None:
                link.shutdown_for(self)
        finally:
            _release_in_turn(self)
        # At last, since it takes this from the tokens: by them the next abort gets here.
        self._on_decided()
        self.tidied = True
        return decided

    def _tidy_up(self) -> None:
        """Do what is left of the natural end, if what was doing it did not get through; from any thread."""

    def close(self, end: ExchangeOutcome) -> None:
        """End the reader if it has not ended, and give everything back now; for coroutines and timers of the loop."""
        self._decide(end)
        link = self._link
        if link is not None:
            link.shutdown_for(self)
        self.release()
        self.tidied = True

    def _decide(self, end: ExchangeOutcome) -> bool:
        decided = self._outcome.try_set(end)
        if decided:
            self._on_decided()
        return decided

    def _on_decided(self) -> None:
        """Note that the end is decided; in whatever thread that was."""

    def pause_reading(self) -> None:
        """Take nothing in any more, until the link is given back; in the event loop's thread."""
        if self._link is not None:
            self._link.pause_reading()

    def release(self) -> None:
        """Let go of the link and wake the reader; in the event loop's thread, when the end is decided."""
        link = self._link
        if link is not None:
            link.close_for(self)
            # Not before: a Ctrl-C in between would leave nobody who knows the link.
            self._link = None
        self.wake()


class _ReleaseQueue:
    """Who is to be given back in a loop, some in each of its rounds.

    One abort may end thousands of readers. Their sockets are shut down when it returns, that is its promise; but to
    close them all and to wake all their readers in one round would keep the loop from everything else meanwhile.
    """

    def __init__(self) -> None:
        self._new: deque[ResponseReader] = deque()
        self._waiting: deque[ResponseReader] = deque()
        # When a round was scheduled that has not begun yet; 0 for none is.
        self._scheduled_at = 0.0

    def add(self, reader: ResponseReader) -> None:
        """Put in a reader, from any thread or signal handler."""
        self._new.append(reader)
        # A round takes this back before it looks at what is new. So whoever finds it set is seen by a round to come,
        # and of two who set it at once both are, by one round more than is needed.
        now = time.monotonic()
        # A loop loses a callback at whose first instruction Ctrl-C comes: a round that is long due does not count.
        if not self._scheduled_at or now - self._scheduled_at > _LOST_SECONDS:
            try:
                self._scheduled_at = now
                in_loop(reader.loop, self._round, reader.loop)
            except BaseException:
                self._scheduled_at = 0.0
                raise

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._scheduled_at = 0.0
            for _ in range(_RELEASES_A_ROUND):
                queue = self._waiting or self._new
                if not queue:
                    break
                self._release_first(queue)
            while self._new:
                # Else the loop would see the ends of all these sockets in this very round.
                self._new[0].pause_reading()
                self._waiting.append(self._new.popleft())
        finally:
            # Also when one of them could not be given back: the others are owed it.
            if (self._waiting or self._new) and not self._scheduled_at:
                self._scheduled_at = time.monotonic()
                loop.call_soon(self._round, loop)

    @staticmethod
    def _release_first(queue: deque[ResponseReader]) -> None:
        try:
            queue[0].release()
        except Exception:
            queue.popleft()
            raise
        # After the deed: if Ctrl-C interrupts it, the next round repeats it.
        queue.popleft()


# After so long a round that has not begun is taken for lost; in a loop that is merely blocked, another one is harmless.
_LOST_SECONDS = 1.0

# How many readers are given back in one round of a loop: a few milliseconds' worth.
_RELEASES_A_ROUND = 64

_release_queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _ReleaseQueue] = weakref.WeakKeyDictionary()


def _release_in_turn(reader: ResponseReader) -> None:
    turns = _release_queues.get(reader.loop)
    if turns is None:
        # What waits in a loop that was closed holds that loop, which would be kept here for good.
        for reference in _release_queues.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                _release_queues.pop(loop, None)
        turns = _release_queues.setdefault(reader.loop, _ReleaseQueue())
    turns.add(reader)


def cancel_once(task: asyncio.Task[Any]) -> None:
    """Tell a task of ours to stop, unless it has been told.

    A second cancellation would interrupt somebody else's code in it (the caller's generator, the pool of a foreign
    transport) while that cleans up after the first.
    """
    if not task.cancelling():
        task.cancel()


async def join_cancelled(task: asyncio.Task[Any]) -> None:
    """Give a task of ours that has been told to stop the few rounds it needs, so that nothing of it is left behind.

    A courtesy: everything decisive has been done. When this wait is cancelled the task ends all the same.
    """
    if not task.done():
        # Somebody else's code may be on its way out in it: abort() waits for nobody.
        await asyncio.wait([task], timeout=_JOIN_SECONDS)
