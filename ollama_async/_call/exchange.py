"""``Exchange``: one attempt: a request and its answer, under tokens and limits, over any transport.

It has two forms. Over ``DirectTransport`` the caller's task sends the request and waits on the reader, and ``abort()``
shuts the socket down. Over anything else (a proxy that speaks TLS, somebody's own httpx client, a mock), and where
somebody's code runs on the way (an auth flow, event hooks), the request runs in a task that the library owns, which is
cancelled once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._errors import AbortError, PhaseTimeout, StreamClosed
from ollama_async._loops import EmptyContext, in_loop
from ollama_async._wire.intercept import is_intercepted
from ollama_async._wire.logged import new_reader
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome
from ollama_async._wire.phase import Phase
from ollama_async._wire.transport import ANSWERED, READER
from ollama_async._wire.unpack import LINES, PAGE, WHOLE, BodyForm, Unpacker, encoding_of
from ollama_async._wire.watch import EndByToken

from .chunk import ResponseInfo
from .failures import strange_encoding, translate
from .foreign import ForeignRequest
from .observe import CallEnd
from .timeouts import HOLDING, TO_COME

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ollama_async._cancel import CancelToken, Watch
    from ollama_async._wire.parser import Head
    from ollama_async._wire.reader import ResponseReader

    from .asked import Asked
    from .observe import Observed
    from .request import Request
    from .retry import RetryBudget
    from .sender import Sender
    from .timeouts import Limit, Timeouts

_FOR_HTTPX = {b"location", b"set-cookie"}

# How long the end of the body may take after the last chunk said that it is the last (it is one packet away).
DISCARD_SECONDS = 0.1


class Exchange:
    """One request and its answer.

    Args:
        sender: What it is sent with.
        request: The request.
        streaming: Whether the answer is complete when its reader has got to the end, not when it has arrived.
        timeouts: How long each phase may last.
        budget: How often the request may be sent again.
        asked: What it asks of a model, if it does.

    Attributes:
        reader: The reader of the answer; it knows the phase and decides the outcome.
        loop: The event loop in which it runs.
        started_at: When the call began, by the loop's clock; later than that for no attempt.
        ended_at: When the outcome was decided; 0 before that.
        budget: As given.
        asked: As given.
        observed: The observer to tell how the call ended, until that has happened; ``None`` for almost all calls.
    """

    __slots__ = (
        "__weakref__",
        "_deadline",
        "_foreign",
        "_not_before",
        "_registrations",
        "_request",
        "_sender",
        "_streaming",
        "_timeouts",
        "_timer",
        "asked",
        "budget",
        "ended_at",
        "loop",
        "observed",
        "reader",
        "started_at",
    )

    def __init__(
        self,
        sender: Sender,
        request: Request,
        streaming: bool,
        timeouts: Timeouts,
        budget: RetryBudget,
        asked: Asked | None = None,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.reader: ResponseReader = new_reader(self.loop, self, LINES if streaming else WHOLE)
        self.started_at: float = self.loop.time()
        self.ended_at: float = 0.0
        self._sender = sender
        self._request = request
        self._streaming = streaming
        self._timeouts = timeouts
        self.budget: RetryBudget = budget
        self.asked: Asked | None = asked
        self.observed: Observed | None = None
        # Not before this time of the loop's clock is it sent.
        self._not_before = 0.0
        self._foreign: ForeignRequest | None = None
        self._registrations: tuple[Watch, ...] = ()
        self._timer: asyncio.TimerHandle | None = None
        # How many seconds after its first line it is complete whatever comes, and the cause that it has then.
        self._deadline: tuple[float, object] | None = None

    def again(self, delay: float) -> Exchange:
        """Return another attempt at the same, which waits for ``delay`` seconds before it sends the request."""
        attempt = Exchange(self._sender, self._request, self._streaming, self._timeouts, self.budget, self.asked)
        attempt.started_at = self.started_at
        # What this one still has to say is not the end of the call.
        attempt.observed, self.observed = self.observed, None
        attempt._not_before = self.loop.time() + delay
        return attempt

    def backoff(self, error: BaseException) -> float | None:
        """Return how many seconds to wait before another attempt after that error; ``None`` if none is allowed."""
        return self.budget.backoff(error, answered=self.reader.status != 0)

    def register(self, token: CancelToken) -> None:
        """End with the token; and at once, if the client has been closed meanwhile."""
        watch = EndByToken(token, self.reader)
        self._registrations = (*self._registrations, watch)
        watch.arm()
        closed = self._sender.calls.closed
        if closed is not None:
            # Whoever closed the client may have looked at the token before this was on it.
            self.reader.close_threadsafe(ExchangeOutcome("closed", closed))
        if self.reader.outcome_slot:
            # Whoever decided may have looked at the list before this one was in it.
            watch.remove()

    async def open(self) -> None:
        """Send the request and wait for the head of the answer.

        Raises:
            ExchangeEnded: By whatever ended it.

        Cancellation: the socket is closed at once.
        """
        reader = self.reader
        try:
            reader.check()
            if self._not_before:
                await self._wait_for_backoff()
            await self._send()
            reader.check()
        except BaseException as exc:
            reader.close(ExchangeOutcome("error" if isinstance(exc, Exception) else "cancelled", exc))
            await self.wait_closed()
            if isinstance(exc, Exception):
                assert reader.outcome is not None
                raise ExchangeEnded(reader.outcome) from exc
            raise
        finally:
            # It holds the reader, which holds it.
            self._request.discard(for_good=self.budget.exhausted)

    async def _send(self) -> None:
        reader, transport = self.reader, self._sender.transport
        # A mock or an instrumentation of httpx runs somebody's code on the way of the request.
        foreign = transport is None or is_intercepted()
        at_once = not foreign and self._send_at_once()
        if self._timer is None:
            # After that, since the server is at work meanwhile.
            self._arm()
        if foreign:
            self._foreign = ForeignRequest(reader, self._sender.client, self._httpx_request())
            reader.attach(self._foreign)
            self._foreign.start()
            await reader.wait_for_head()
        elif transport is None or self._request.encoded is None:
            await self._send_by_httpx()
        else:
            if not at_once:
                # The limit of connecting is this exchange's, as all others are.
                await transport.send(reader, self._request.encoded, None)
            await reader.wait_for_head()
            if self._concerns_httpx():
                await self._send_by_httpx(answered=True)

    def _send_at_once(self) -> bool:
        encoded, transport = self._request.encoded, self._sender.transport
        return encoded is not None and transport is not None and transport.send_at_once(self.reader, encoded)

    def _httpx_request(self) -> httpx.Request:
        request = self._request.http
        connect = self._timeouts.connect
        limits = {"connect": connect, "pool": connect, "read": None, "write": None}
        request.extensions = {**request.extensions, "timeout": limits}
        return request

    def _concerns_httpx(self) -> bool:
        """Whether the answer is one that httpx acts upon: it follows redirects and keeps cookies."""
        return not _FOR_HTTPX.isdisjoint(self.reader.head.names)

    async def _send_by_httpx(self, *, answered: bool = False) -> None:
        request = self._httpx_request()
        request.extensions.update({READER: self.reader, ANSWERED: answered})
        response = await self._sender.client.send(request, stream=True)
        # The response and its stream hold each other; nothing of it is needed but what the reader has.
        response.stream = httpx.ByteStream(b"")

    async def _wait_for_backoff(self) -> None:
        self.reader.enter(Phase.BACKOFF)
        self._arm()
        while self.loop.time() < self._not_before:
            timer = self.loop.call_at(self._not_before, self.reader.wake, context=EmptyContext())
            try:
                await self.reader.wait()
            finally:
                timer.cancel()

    def response_info(self, response_model: type[BaseModel] | None = None) -> ResponseInfo:
        """Return what an answer made of this is to know of where it comes from."""
        head = self.reader.head
        return ResponseInfo(head.status, head.headers, response_model, self.asked)

    async def discard_body(self) -> None:
        """Wait a moment for the rest of a committed answer, so that its connection can be used again.

        Cancellation: the socket is closed at once.
        """
        reader = self.reader
        if not reader.is_attached or reader.is_read:
            # All of it has arrived, or another task waits for it already.
            return
        self._discard_body_soon()
        while reader.is_attached:
            reader.read_buffered()
            await reader.wait()

    def discard_body_soon(self) -> None:
        """Do what ``discard_body()`` does, without waiting for it; from any thread."""
        # Telling the loop is a syscall or two, and mostly the whole answer has arrived.
        if self.reader.is_attached:
            in_loop(self.loop, self._discard_body_soon)

    def _discard_body_soon(self) -> None:
        reader = self.reader
        if reader.is_attached and self._timer is None:
            if reader.paused:
                reader.read_buffered()
                reader.resume_reading()
            complete = ExchangeOutcome("complete")
            self._timer = self.loop.call_later(DISCARD_SECONDS, reader.close, complete, context=EmptyContext())

    def error(self, partial: Any = None) -> BaseException:
        """Return what to raise for how this ended, to a caller that has ``partial``; a new instance each time."""
        outcome = self.reader.outcome
        assert outcome is not None
        cause = outcome.cause
        if outcome.kind == "aborted":
            return AbortError(cause, partial)
        if outcome.kind == "timeout" and not isinstance(cause, BaseException):
            return PhaseTimeout(str(cause), getattr(self._timeouts, str(cause)), partial)
        if isinstance(cause, BaseException):
            return translate(cause, self._timeouts, partial)
        return StreamClosed(cause if isinstance(cause, str) else _CLOSED[outcome.kind], partial)

    async def wait_closed(self) -> None:
        """Wait a moment for what an exchange that has ended leaves behind.

        Cancellation: safe; it ends anyway.
        """
        if self._foreign is not None:
            await self._foreign.wait_closed()

    def __repr__(self) -> str:
        outcome = self.reader.outcome
        end = "" if outcome is None else f", {outcome.kind}"
        return f"<Exchange: {self.reader.phase.name.lower()}{end}>"

    # -- as the owner of the reader --

    def head_arrived(self, head: Head) -> None:
        """Tell what the body is made of, and refuse what cannot be read."""
        reader = self.reader
        leads_on = 300 <= head.status < 400
        form = (LINES if head.status < 300 else PAGE) if self._streaming else PAGE if leads_on else WHOLE
        reader.body_form = form
        # Decided here, because an answer that comes all at once is at its end before its reader has seen the head.
        encoding = None if leads_on else encoding_of(head)
        if encoding is not None and encoding in self._sender.unpackable:
            reader.body_form = BodyForm(form.framing, Unpacker(encoding))
        elif encoding is not None and self._sender.transport is not None:
            reader.decide(ExchangeOutcome("error", strange_encoding(encoding)))

    def outcome_decided(self) -> None:
        """Leave the tokens: one that outlives many calls must not collect what is left of them; in any thread."""
        self.ended_at = self.ended_at or self.loop.time()
        if self._registrations:
            for watch in self._registrations:
                watch.remove()
            self._registrations = ()
        # An observer may take locks, which a signal handler must not, and an abort waits for nothing.
        if self.observed is not None and self.reader.failure_outcome is not None:
            if self.loop.is_closed():
                self._report_failure_outcome()
            else:
                in_loop(self.loop, self._report_failure_outcome)

    def link_released(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- for whoever watches; in the loop's thread --

    def report_end(self, outcome: str, error: BaseException | None = None, response: Any = None) -> None:
        """Tell how the call ended, once."""
        observed, self.observed = self.observed, None
        if observed is not None:
            first = self.reader.first_line_at if self._streaming else 0.0
            observed.ended(
                CallEnd(
                    outcome,
                    error,
                    (self.ended_at or self.loop.time()) - self.started_at,
                    first - self.started_at if first else None,
                    observed.partial() if response is None else response,
                )
            )

    def report_error(self, error: BaseException) -> BaseException:
        """Tell that the caller gets an error, after which there is no other attempt; return it."""
        if self.observed is not None:
            ended = self.reader.failure_outcome
            kind = ended.kind if ended is not None else "error" if isinstance(error, Exception) else "cancelled"
            self.report_end(kind, error)
        return error

    def _report_failure_outcome(self) -> None:
        # An attempt that another one may follow leaves it to its caller, which is about to ask for that.
        if self.observed is not None:
            error = self.error()
            if self.backoff(error) is None:
                self.report_error(error)

    # -- the one timer --

    def set_deadline(self, seconds: float, cause: object) -> None:
        """Make the answer complete, as far as it has come, so many seconds after its first line."""
        self._deadline = (seconds, cause)
        if self._timer is not None:
            self._timer.cancel()
        self._arm()

    def _arm(self) -> None:
        due = self._due()
        if due is not None:
            self._timer = self.loop.call_at(due[0], self._check_limits, context=EmptyContext())

    def _due(self) -> tuple[float, Limit | None] | None:
        """Return when the next limit passes, and which it is, as things stand now; ``None`` is the deadline."""
        now, reader = self.loop.time(), self.reader
        phase = Phase.EOF if reader.failed else reader.phase
        holding = HOLDING[phase]
        first: tuple[float, Limit | None] | None = None
        if self._deadline is not None:
            first = (reader.first_line_at or now) + self._deadline[0], None
        for name in TO_COME[phase]:
            seconds: float | None = getattr(self._timeouts, name)
            if seconds is None:
                continue
            if name not in holding:
                # A limit of a later phase has not begun: look again after its time at the latest.
                began = now
            elif name == "total":
                began = self.started_at
            elif name == "idle":
                began = now if reader.paused else reader.last_activity_at
            else:
                began = reader.entered_at
            if first is None or began + seconds < first[0]:
                first = began + seconds, name
        return first

    def _check_limits(self) -> None:
        # Chunks only note when they came. The timer, when it goes off, finds out how long the silence has been, and
        # sets itself anew: one timer a stream, not one a chunk.
        self._timer = None
        due = self._due()
        if due is None or self.reader.outcome is not None:
            return
        if due[0] <= self.loop.time():
            passed = due[1]
            if passed is None and self._deadline is not None:
                self.reader.close(ExchangeOutcome("complete", self._deadline[1]))
            else:
                self.reader.close(ExchangeOutcome("timeout", passed))
        else:
            self._timer = self.loop.call_at(due[0], self._check_limits, context=EmptyContext())


_CLOSED = {
    "closed": "the stream is closed",
    "cancelled": "the stream is closed: the task that read it was cancelled",
    "error": "the stream is closed",
    "complete": "the stream is at its end",
}
