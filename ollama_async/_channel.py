"""One answer on its way from a connection to its reader: the buffer, the end, and the handle that cuts it off.

A channel has one writer (a connection, or the task that drives somebody else's transport) and one reader. How it ends
is decided once, by the first to say so: the reader, the writer, a timer, or ``abort()`` from any thread or signal
handler.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ._cancel import Once, in_loop, resolve
from ._errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._unpack import Unpacker

__all__ = ["HIGH_WATER", "Channel", "End", "Ended", "Link", "cancel_once", "settled"]

# Reading from the socket stops when this many bytes wait to be read, and goes on when the reader waits for more, so
# that a slow reader of a fast server holds a bounded amount. One read brings up to as much on top of it, over TLS up to
# 256 KiB.
HIGH_WATER = 64 * 1024

Kind = Literal["complete", "error", "aborted", "timeout", "closed", "cancelled"]


# How long a caller waits for a task of ours that has been told to stop.
_SETTLE_SECONDS = 0.5


class End:
    """How a channel ended; ``cause`` is the error, the abort reason, or the phase that timed out."""

    __slots__ = ("cause", "kind")

    def __init__(self, kind: Kind, cause: object = None) -> None:
        self.kind: Kind = kind
        self.cause = cause


class Ended(Exception):  # noqa: N818  (no error by itself: the reader is told that the channel's end is decided)
    """Raised out of whatever the reader was waiting for when the channel ends before it is complete."""

    def __init__(self, end: End) -> None:
        super().__init__(end.kind)
        self.end = end


class Link(Protocol):
    """What a channel hangs on: a connection, a connection in the making, a task that drives a foreign transport."""

    def sever(self, channel: Channel) -> None:
        """Put the FIN on its way, at once. From any thread or signal handler; touches nothing of the event loop."""

    def dispose(self, channel: Channel) -> None:
        """Give everything back. In the event loop's thread."""

    def pause(self) -> None:
        """Take nothing in for now. In the event loop's thread."""

    def resume(self) -> None:
        """There is room again. In the event loop's thread."""


class Channel:
    """Blocks of one answer's body in the order they came, until the end."""

    # So many attributes in a dict are 1.3 KiB more for each open stream.
    __slots__ = (
        "__weakref__",
        "_blocks",
        "_end",
        "_failure",
        "_link",
        "_size",
        "_waiter",
        "arrived",
        "by_line",
        "first",
        "headers",
        "http_version",
        "loop",
        "now",
        "paused",
        "reason_phrase",
        "sent",
        "settles_on_arrival",
        "status",
        "tidied",
        "touched",
        "unpacker",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # Whether the answer is settled once its last byte has arrived (else: once the reader has got to it), and
        # whether it is made of lines.
        self.settles_on_arrival = True
        self.by_line = False
        # Unpacks the body, where it is packed.
        self.unpacker: Unpacker | None = None
        self.status = 0
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.reason_phrase = b""
        self.http_version = b"HTTP/1.1"
        # Times of the loop's clock, 0 for not yet: the request is out; the first line is there; the exchange last got
        # on; and the one at which what is being pushed has arrived, noted once for all that one read brings.
        self.sent = 0.0
        self.first = 0.0
        self.touched = 0.0
        self.now = 0.0
        self.arrived = False
        self.paused = False
        self._blocks: list[bytes] = []
        self._size = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._link: Link | None = None
        self._end = Once()
        # Whether all that follows from the end has been done, or will be in the loop's next round. Set after the deed.
        self.tidied = False

    # -- the writer's side, in the loop's thread --

    def restart(self) -> None:
        """Begin anew: the answer that has come was a redirect, or asked for credentials, and another one follows."""
        self.status = 0
        self.headers = ()
        self.unpacker = None
        self.arrived = False
        self.paused = False
        self.sent = self.first = 0.0
        self._blocks = []
        self._size = 0

    def attach(self, link: Link) -> None:
        """Hang the channel on a link; if it has ended in the meantime, the link is cut at once."""
        self._link = link
        # finish() decides first and looks for the link then; this does it the other way round. One of both sees it.
        if self._end.slot:
            link.sever(self)
            link.dispose(self)

    def detach(self) -> None:
        """Let go of the link: the answer has arrived, the connection may serve others."""
        self._link = None

    def cut(self) -> None:
        """Close what the channel hangs on, and leave it to others how it ends."""
        link = self._link
        if link is not None:
            link.sever(self)
            link.dispose(self)
            self._link = None

    def take_head(self, status: int, reason: bytes, headers: Sequence[tuple[bytes, bytes]], version: bytes) -> None:
        """Take the head of the answer."""
        self.reason_phrase = reason
        self.headers = headers
        self.http_version = version
        self.status = status
        self.wake()

    def push(self, block: bytes) -> bool:
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
            if not self.first:
                self.first = self.now
            self.touched = self.now
        self._blocks.append(block)
        self._size += len(block)
        if self._size > HIGH_WATER:
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
        if self._end.slot:
            return b""
        try:
            return unpacker.feed(block)
        except ProtocolError as exc:
            # Given back in the next round: the writer is in the middle of a read.
            self.finish(End("error", exc))
            return b""

    def complete(self) -> None:
        """The whole answer has arrived."""
        if self.unpacker is not None and not self.unpacker.whole:
            self.detach()
            self.fail(ProtocolError("the answer ends in the middle of what is packed in it"))
            return
        self.arrived = True
        if self.settles_on_arrival:
            self._decide(End("complete"))
        self.detach()
        self.wake()

    def fail(self, error: Exception) -> None:
        """The answer broke off; what has arrived is still delivered before the reader gets the error."""
        self._failure = error
        # An error that a waiting reader is about to get has been reached: an abort that comes after it is too late.
        if self._waiter is not None and not self._blocks:
            self.teardown(End("error", error))
        self.wake()

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None:
            resolve(self._waiter)

    # -- the reader's side, in the loop's thread --

    @property
    def end(self) -> End | None:
        """How it ended, ``None`` while open."""
        # As its value, without the call: a stream asks ten times.
        end: End | None = self._end.slot.get(0)
        return end

    @property
    def decided(self) -> Mapping[int, object]:
        """What is empty as long as the end is not decided, and stays the same object: for those who look very often."""
        return self._end.slot

    @property
    def ended_early(self) -> End | None:
        """How it ended, unless it is open or at its natural end."""
        end = self.end
        return None if end is None or end.kind == "complete" else end

    def check(self) -> None:
        """Raise ``Ended`` if the end is decided and is not the natural one."""
        if self._failure is not None and not self._blocks:
            self.teardown(End("error", self._failure))
        if self._end.slot:
            end = self.ended_early
            if end is not None:
                raise Ended(end)

    @property
    def linked(self) -> bool:
        """Whether something may still arrive."""
        return self._link is not None

    async def pause(self) -> None:
        """Wait until something has happened.

        Cancellation: the channel is torn down, then the cancellation goes on.
        """
        # Whether there is anything to check is asked here, and in at_hand(), without a call: it is for every token.
        try:
            if self._end.slot or self._failure is not None:
                self.check()
            if self.paused and not self._blocks:
                self.go_on()
            waiter = self._waiter = self.loop.create_future()
            try:
                await waiter
            except BaseException:
                self.teardown(End("cancelled"))
                raise
            finally:
                self._waiter = None
            if self._end.slot or self._failure is not None:
                self.check()
        except BaseException:
            await self.gone()
            raise

    async def gone(self) -> None:
        """Wait until nothing is left of a channel that has ended.

        Cancellation: safe, it ends all the same.
        """

    async def wait_for_head(self) -> None:
        """Wait until the head of the answer is there."""
        while not self.status:
            await self.pause()

    async def receive(self) -> bytes:
        """Wait for the next bytes of the body.

        Returns:
            All that has arrived and not been read; ``b""`` after the end.

        Cancellation: the channel is torn down, then the cancellation goes on.
        """
        while (data := self.at_hand()) is None:
            await self.pause()
        return data

    def at_hand(self) -> bytes | None:
        """Return what ``receive()`` would without waiting, ``None`` if it would have to wait."""
        if not self._blocks and not self.arrived:
            return None
        if self._end.slot or self._failure is not None:
            self.check()
        return self.take() if self._blocks else b""

    def take(self) -> bytes:
        """Return the bytes that wait to be read, without waiting for more."""
        blocks = self._blocks
        data = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        self._blocks = []
        self._size = 0
        return data

    def go_on(self) -> None:
        """Let more come in, after a pause."""
        # Not when the reader takes a block, but when it has nothing left of it: meanwhile another one would be held.
        self.paused = False
        # The time the reader took is not the server's silence.
        self.touched = self.loop.time()
        if self._link is not None:
            self._link.resume()

    # -- the end --

    def finish(self, end: End) -> bool:
        """End the channel and put the FIN on its way, from any thread or signal handler.

        The rest (waking the reader, giving the transport back) follows in the loop's next round: a signal handler may
        have interrupted the loop in the middle of its own bookkeeping, which must not be entered again.

        What it does can be repeated, and is, until one call got through all of it: Ctrl-C may come at any line.

        Returns:
            Whether this call decided.
        """
        decided = self._end.decide(end)
        if self.tidied:
            return False
        if self.ended_early is None:
            self._tidy_up()
            return False
        # The FIN before everything else: the server works until it has seen it.
        link = self._link
        try:
            if link is not None:
                link.sever(self)
        finally:
            _in_turn(self)
        # At last, since it takes this from the tokens: by them the next abort gets here.
        self._on_decided()
        self.tidied = True
        return decided

    def _tidy_up(self) -> None:
        """Do what is left of the natural end, if what was doing it did not get through; from any thread."""

    def teardown(self, end: End) -> None:
        """End the channel if it has not ended, and give everything back now; for coroutines and timers of the loop."""
        self._decide(end)
        link = self._link
        if link is not None:
            link.sever(self)
        self.give_back()
        self.tidied = True

    def _decide(self, end: End) -> bool:
        decided = self._end.decide(end)
        if decided:
            self._on_decided()
        return decided

    def _on_decided(self) -> None:
        """Note that the end is decided; in whatever thread that was."""

    def pause_link(self) -> None:
        """Take nothing in any more, until the link is given back; in the event loop's thread."""
        if self._link is not None:
            self._link.pause()

    def give_back(self) -> None:
        """Let go of the link and wake the reader; in the event loop's thread, when the end is decided."""
        link = self._link
        if link is not None:
            link.dispose(self)
            # Not before: a Ctrl-C in between would leave nobody who knows the link.
            self._link = None
        self.wake()


class _Turns:
    """Who is to be given back in a loop, some in each of its rounds.

    One abort may end thousands of channels. Their sockets are shut down when it returns, that is its promise; but to
    close them all and to wake all their readers in one round would keep the loop from everything else meanwhile.
    """

    def __init__(self) -> None:
        self._new: deque[Channel] = deque()
        self._waiting: deque[Channel] = deque()
        # When a round was scheduled that has not begun yet; 0 for none is.
        self._scheduled_at = 0.0

    def add(self, channel: Channel) -> None:
        """Put in a channel, from any thread or signal handler."""
        self._new.append(channel)
        # A round takes this back before it looks at what is new. So whoever finds it set is seen by a round to come,
        # and of two who set it at once both are, by one round more than is needed.
        now = time.monotonic()
        # A loop loses a callback at whose first instruction Ctrl-C comes: a round that is long due does not count.
        if not self._scheduled_at or now - self._scheduled_at > _LOST_SECONDS:
            try:
                self._scheduled_at = now
                in_loop(channel.loop, self._round, channel.loop)
            except BaseException:
                self._scheduled_at = 0.0
                raise

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._scheduled_at = 0.0
            for _ in range(_A_ROUND):
                queue = self._waiting or self._new
                if not queue:
                    break
                self._give_back_first(queue)
            while self._new:
                # Else the loop would see the ends of all these sockets in this very round.
                self._new[0].pause_link()
                self._waiting.append(self._new.popleft())
        finally:
            # Also when one of them could not be given back: the others are owed it.
            if (self._waiting or self._new) and not self._scheduled_at:
                self._scheduled_at = time.monotonic()
                loop.call_soon(self._round, loop)

    @staticmethod
    def _give_back_first(queue: deque[Channel]) -> None:
        try:
            queue[0].give_back()
        except Exception:
            queue.popleft()
            raise
        # After the deed: if Ctrl-C interrupts it, the next round repeats it.
        queue.popleft()


# After so long a round that has not begun is taken for lost; in a loop that is merely blocked, another one is harmless.
_LOST_SECONDS = 1.0

# How many channels are given back in one round of a loop: a few milliseconds' worth.
_A_ROUND = 64

_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()


def _in_turn(channel: Channel) -> None:
    turns = _turns.get(channel.loop)
    if turns is None:
        # What waits in a loop that was closed holds that loop, which would be kept here for good.
        for reference in _turns.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                _turns.pop(loop, None)
        turns = _turns.setdefault(channel.loop, _Turns())
    turns.add(channel)


def cancel_once(task: asyncio.Task[Any]) -> None:
    """Tell a task of ours to stop, unless it has been told.

    A second cancellation would interrupt somebody else's code in it (the caller's generator, the pool of a foreign
    transport) while that cleans up after the first.
    """
    if not task.cancelling():
        task.cancel()


async def settled(task: asyncio.Task[Any]) -> None:
    """Give a task of ours that has been told to stop the few rounds it needs, so that nothing of it is left behind.

    A courtesy: everything decisive has been done. When this wait is cancelled the task ends all the same.
    """
    if not task.done():
        # Somebody else's code may be on its way out in it: abort() waits for nobody.
        await asyncio.wait([task], timeout=_SETTLE_SECONDS)
