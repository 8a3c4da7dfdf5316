"""``ResponseReader``: one answer on its way from a connection to its consumer, and the one place that ends it.

It has one writer (a connection, or the task that drives a foreign transport) and one consumer. Its outcome is decided
once, by whoever comes first: the consumer, the writer, a timer, or ``abort()`` from any thread or signal handler.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ollama_async._cancel import SetOnce
from ollama_async._errors import ProtocolError
from ollama_async._loops import in_loop, resolve

from .link import HIGH_WATER, NO_OWNER
from .outcome import ExchangeEnded, ExchangeOutcome, Framing
from .parser import Head
from .phase import Phase
from .release import release_in_turn
from .unpack import FORMS, WHOLE, BodyForm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .link import Link, Owner
    from .unpack import Unpacker


class ResponseReader:
    """Blocks of one answer's body in the order in which they arrived, until the end.

    Attributes:
        loop: The event loop in which it is read.
        phase: How far the attempt is.
        head: The head of the answer, once it has arrived.
        body_form: What the body is made of, and what unpacks it.
        paused: Whether the connection has been told to read no more.
        entered_at: When the attempt entered its phase, by the loop's clock; from HEAD on, when it entered the one
            before that: from there the limits of connecting, of the upload and of the first chunk are counted.
        first_line_at: When the first line arrived; 0 before that, as with the next two.
        last_activity_at: When the exchange last made progress.
        received_at: When the data that is being fed arrived: noted once for all that one read brings.
        tidied: Whether everything that follows from the outcome has been done, or will be in the loop's next round.
            Set after the deed.
    """

    # In a dict, so many attributes would be 1.3 KiB more for each open stream.
    __slots__ = (
        "__weakref__",
        "_blocks",
        "_buffered_bytes",
        "_failure",
        "_link",
        "_outcome",
        "_waiter",
        "body_form",
        "entered_at",
        "first_line_at",
        "head",
        "last_activity_at",
        "loop",
        "owner",
        "paused",
        "phase",
        "received_at",
        "tidied",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner = NO_OWNER, body_form: BodyForm = WHOLE) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.phase: Phase = Phase.NEW
        self.head: Head = _NO_HEAD
        self.body_form: BodyForm = body_form
        self.paused: bool = False
        self.entered_at: float = 0.0
        self.first_line_at: float = 0.0
        self.last_activity_at: float = 0.0
        self.received_at: float = 0.0
        self.tidied: bool = False
        self._blocks: list[bytes] = []
        self._buffered_bytes = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._link: Link | None = None
        self._outcome = SetOnce()
        # The exchange, which has this: the circle is opened when the exchange is over.
        self.owner: Owner = owner

    # -- the writer's side, in the loop's thread --

    def enter(self, phase: Phase) -> None:
        """Note how far the attempt is; nothing follows CLOSED, whatever a foreign transport still says."""
        if self.phase is _CLOSED:
            return
        self.phase = phase
        if phase < _HEAD:
            self.last_activity_at = self.entered_at = self.loop.time()

    def restart(self) -> None:
        """Begin anew: the answer was a redirect, or asked for credentials, and another one follows."""
        self.head = _NO_HEAD
        self.body_form = FORMS[self.body_form.framing]
        self.paused = False
        self.first_line_at = 0.0
        self.read_buffered()

    def attach(self, link: Link) -> None:
        """Attach the reader to a link; if the exchange has ended in the meantime, the link is closed at once."""
        self._link = link
        # close_threadsafe() decides first and then looks for the link; this does it the other way round. One of both
        # sees the other.
        if self._outcome:
            link.shutdown_for(self)
            link.close_for(self)

    def detach(self) -> None:
        """Let go of the link: the answer has arrived, and the connection may serve others."""
        self._link = None
        if self._outcome:
            self._let_go_of_owner()
            self.tidied = self.failure_outcome is None

    def drop_link(self) -> None:
        """Close the link, and leave the outcome to others."""
        link = self._link
        if link is not None:
            link.shutdown_for(self)
            link.close_for(self)
            self._link = None

    def feed_head(self, head: Head) -> None:
        """Take the head of the answer."""
        self.head = head
        self.enter(_HEAD)
        # From here on the server may not fall silent for longer than the idle limit.
        self.last_activity_at = self.received_at
        self.owner.head_arrived(head)
        self.wake()

    def feed_data(self, block: bytes) -> bool:
        """Take a block of the body, and wake the consumer.

        Returns:
            Whether there is room for more; if not, the link's ``resume_reading()`` is called when there is.
        """
        body = self.body_form
        if body.unpacker is not None:
            block = self._unpacked(body.unpacker, block)
            if not block:
                return not self.paused
        # A byte now and then is not an answer: whole lines count where the answer is made of lines.
        if body.framing is not _LINES or _LINE_FEED in block:
            if not self.first_line_at:
                self.first_line_at = self.received_at
                self.enter(_BODY)
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
        if self._outcome:
            return b""
        try:
            return unpacker.feed(block)
        except ProtocolError as exc:
            # Released in the next round: the writer is in the middle of a read.
            self.close_threadsafe(ExchangeOutcome("error", exc))
            return b""

    def feed_eof(self) -> None:
        """Note that the whole answer has arrived."""
        body = self.body_form
        if body.unpacker is not None and not body.unpacker.whole:
            self.detach()
            self.set_exception(ProtocolError("the answer ends in the middle of its compressed body"))
            return
        self.enter(_EOF)
        if body.framing is _WHOLE:
            self.decide(ExchangeOutcome("complete"))
        self.detach()
        self.wake()

    def set_exception(self, error: Exception) -> None:
        """Note that the answer broke off; what has arrived is delivered before the consumer gets the error."""
        self._failure = error
        # An error that a waiting consumer is about to get has been reached: an abort after it is too late.
        if self._waiter is not None and not self._blocks:
            self.close(ExchangeOutcome("error", error))
        self.wake()

    def wake(self) -> None:
        """Let the consumer look again."""
        if self._waiter is not None:
            resolve(self._waiter)

    # -- the consumer's side, in the loop's thread --

    @property
    def status(self) -> int:
        """The HTTP status; 0 before the head has arrived."""
        return self.head.status

    @property
    def eof(self) -> bool:
        """Whether the whole answer has arrived, or nothing of it can arrive any more."""
        return self.phase >= _EOF

    @property
    def failed(self) -> bool:
        """Whether the answer broke off, and the consumer has not got the error yet."""
        return self._failure is not None

    @property
    def outcome(self) -> ExchangeOutcome | None:
        """How the exchange ended, ``None`` while it is open."""
        # As SetOnce.value, without the call: a stream asks ten times.
        outcome: ExchangeOutcome | None = self._outcome.get(0)
        return outcome

    @property
    def outcome_slot(self) -> Mapping[int, object]:
        """A mapping that is empty until the outcome is decided, and stays the same object: for those who ask often."""
        return self._outcome

    @property
    def failure_outcome(self) -> ExchangeOutcome | None:
        """The outcome, unless the exchange is open or at its natural end."""
        outcome: ExchangeOutcome | None = self._outcome.get(0)
        return None if outcome is None or outcome.kind == "complete" else outcome

    def check(self) -> None:
        """Raise ``ExchangeEnded`` if the outcome is decided and is not the natural end."""
        if self._failure is not None and not self._blocks:
            self.close(ExchangeOutcome("error", self._failure))
        # As `failure_outcome`, without the call.
        outcome: ExchangeOutcome | None = self._outcome.get(0)
        if outcome is not None and outcome.kind != "complete":
            raise ExchangeEnded(outcome)

    @property
    def is_attached(self) -> bool:
        """Whether something may still arrive."""
        return self._link is not None

    @property
    def is_read(self) -> bool:
        """Whether a task waits for what arrives."""
        return self._waiter is not None

    async def wait(self) -> None:
        """Wait until something has happened.

        Cancellation: the connection is closed at once, then the cancellation is raised.
        """
        # Whether there is anything to check is asked here, and in read_nowait(), without a call: it is for every token.
        if self._outcome or self._failure is not None:
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
        if self._outcome or self._failure is not None:
            self.check()

    async def wait_for_head(self) -> None:
        """Wait until the head of the answer has arrived.

        Cancellation: as ``wait()``.
        """
        while not self.head.status:
            await self.wait()

    async def read(self) -> bytes:
        """Wait for the next bytes of the body.

        Returns:
            All that has arrived and not been read; ``b""`` after the end.

        Cancellation: as ``wait()``.
        """
        while (data := self.read_nowait()) is None:
            await self.wait()
        return data

    def read_nowait(self) -> bytes | None:
        """Return what ``read()`` would return without waiting, ``None`` if it would have to wait."""
        if not self._blocks and self.phase < _EOF:
            return None
        if self._outcome or self._failure is not None:
            self.check()
        if not self._blocks:
            return b""
        # As read_buffered(), which would be one more call for each token.
        blocks = self._blocks
        self._blocks = []
        self._buffered_bytes = 0
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def read_buffered(self) -> bytes:
        """Return the bytes that wait to be read, without waiting for more."""
        blocks, self._blocks = self._blocks, []
        self._buffered_bytes = 0
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def resume_reading(self) -> None:
        """Let more come in, after a pause."""
        # Not when the consumer takes a block, but when none is left: until then another one would be held.
        self.paused = False
        # The time that the consumer took is not the server's silence.
        self.last_activity_at = self.loop.time()
        if self._link is not None:
            self._link.resume_reading()

    # -- the end --

    def close_threadsafe(self, outcome: ExchangeOutcome) -> bool:
        """Decide the outcome and send the FIN, from any thread or signal handler.

        The rest (waking the consumer, giving the transport back) follows in the loop's next round: a signal handler may
        have interrupted the loop in the middle of its bookkeeping, which must not be entered again.

        Everything in here can be repeated, and is, until one call got through all of it: Ctrl-C may come at any line.

        Returns:
            Whether this call decided.
        """
        decided = self._outcome.try_set(outcome)
        if self.tidied:
            return False
        owner = self.owner
        if self.failure_outcome is None:
            # At its natural end, and what was dealing with that may have been interrupted.
            owner.outcome_decided()
            in_loop(self.loop, self._release_if_not_tidied)
            return False
        # The FIN before everything else: the server works until it has seen it.
        link = self._link
        try:
            if link is not None:
                link.shutdown_for(self)
        finally:
            release_in_turn(self)
        # At last, since it takes this from the tokens: through them the next abort finds it.
        owner.outcome_decided()
        self.tidied = True
        return decided

    def close(self, outcome: ExchangeOutcome) -> None:
        """Decide the outcome if it is not decided, and release everything now; in the loop's thread, idempotent."""
        self.decide(outcome)
        if self._link is not None:
            self._link.shutdown_for(self)
        self.release()
        self.tidied = True

    def commit(self) -> bool:
        """Decide for the natural end: the consumer has all that it wanted, and nothing can end this any more.

        Returns:
            Whether that is the outcome; False if another one came first.
        """
        decided = self.decide(ExchangeOutcome("complete"))
        if not decided:
            # Whoever decided may have been interrupted before the owner was told.
            self.owner.outcome_decided()
        self.owner.link_released()
        if self._link is None:
            self._drop_owner()
        self.tidied = decided or self.failure_outcome is None
        return self.tidied

    def decide(self, outcome: ExchangeOutcome) -> bool:
        """Decide the outcome if it is not decided, and release nothing yet.

        Returns:
            Whether this call decided.
        """
        decided = self._outcome.try_set(outcome)
        if decided:
            self.owner.outcome_decided()
        return decided

    def release(self) -> None:
        """Let go of everything and wake the consumer; in the event loop's thread, when the outcome is decided."""
        self._let_go_of_owner()
        link = self._link
        if link is not None:
            link.close_for(self)
            # Not before: a Ctrl-C in between would leave nothing that knows the link.
            self._link = None
        self.wake()

    def _release_if_not_tidied(self) -> None:
        # Mostly it is by now: another thread was dealing with the end.
        if not self.tidied:
            self.release()
            self.tidied = True

    def _tell_owner(self) -> None:
        owner = self.owner
        owner.outcome_decided()
        owner.link_released()

    def _let_go_of_owner(self) -> None:
        self._tell_owner()
        self._drop_owner()

    def _drop_owner(self) -> None:
        self.owner = NO_OWNER
        self.enter(_CLOSED)

    def pause_reading(self) -> None:
        """Read no more until the link is released; in the event loop's thread."""
        if self._link is not None:
            self._link.pause_reading()

    def __repr__(self) -> str:
        outcome = self.outcome
        end = "" if outcome is None else f", {outcome.kind}"
        return f"<{type(self).__name__}: {self.phase.name.lower()}{end}, {self._buffered_bytes} bytes buffered>"


_NO_HEAD = Head()
# A number: `in` first takes bytes for one, and drops the error.
_LINE_FEED = ord("\n")
# Separate names: Python 3.11 looks a member up in its enum by a call, and these are asked for every token or answer.
_LINES, _WHOLE = Framing.LINES, Framing.WHOLE
_HEAD, _BODY, _EOF, _CLOSED = Phase.HEAD, Phase.BODY, Phase.EOF, Phase.CLOSED
