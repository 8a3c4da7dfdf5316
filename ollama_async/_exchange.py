"""``Exchange``: one request and its answer, under tokens and timeouts, over any transport.

It has two forms. Over ``DirectTransport`` the caller's task sends the request and waits on the channel, and ``abort()``
shuts the socket down. Over anything else (a proxy that speaks TLS, somebody's own httpx client, a mock) and where
somebody's code runs on the way (an auth flow, event hooks), the request runs in a task that the library owns, which is
cancelled once.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import httpx

from ._cancel import EmptyContext, Watch, in_loop
from ._channel import Channel, End, Ended, Kind, cancel_once, settled
from ._errors import AbortError, PhaseTimeout, ProtocolError, StreamClosed
from ._failures import json_object, status_error, stream_error, translate
from ._guard import MAX_BODY_BYTES
from ._transport import ANSWERED, CHANNEL
from ._types import Origin

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic import BaseModel

    from ._cancel import CancelToken
    from ._request import Request
    from ._retry import Attempts
    from ._timeouts import Timeouts
    from ._transport import DirectTransport

__all__ = ["MAX_BODY_BYTES", "Exchange"]

# More of an error's body than this is of use to nobody.
_MAX_ERROR_BODY = 64 * 1024

_FOR_HTTPX = {b"location", b"set-cookie"}

# How long the end of the body may take after the last chunk said that it is the last (it is one packet away).
DRAIN_SECONDS = 0.1


class Exchange(Channel):
    """One request and its answer.

    Args:
        client: The httpx client to send with.
        request: The request.
        transport: The ``DirectTransport`` under the client, if the request can be sent in the caller's task; else None.
        streaming: Whether the answer is settled when the reader has got to its end, not when it has arrived.
        timeouts: How long each phase may last.
        attempts: How often the request may be sent again.
    """

    __slots__ = (
        "_attempts",
        "_client",
        "_due_at",
        "_registrations",
        "_request",
        "_streaming",
        "_task",
        "_timeouts",
        "_timer",
        "_transport",
        "_watched",
        "ended_at",
        "started",
    )

    def __init__(
        self,
        client: httpx.AsyncClient,
        request: Request,
        *,
        transport: DirectTransport | None,
        streaming: bool,
        timeouts: Timeouts,
        attempts: Attempts,
    ) -> None:
        super().__init__(asyncio.get_running_loop())
        self._streaming = streaming
        self.settles_on_arrival = not streaming
        self.by_line = streaming
        self.started = self.loop.time()
        self.ended_at = 0.0
        self._client = client
        self._request = request
        self._transport = transport
        self._timeouts = timeouts
        self._attempts = attempts
        # Not before this time of the loop's clock is it sent.
        self._due_at = 0.0
        # What a successor is put under, if there may be one.
        self._watched: list[tuple[CancelToken, Kind]] | None = [] if attempts.allowed else None
        # The task that runs the request where somebody else's transport or code is on the way.
        self._task: asyncio.Task[None] | None = None
        self._registrations: list[Watch] = []
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, token: CancelToken, kind: Kind = "aborted") -> None:
        """End with the token."""
        if self._watched is not None:
            self._watched.append((token, kind))
        watch = _EndByToken(token, self, kind)
        self._registrations.append(watch)
        watch.arm()
        if self._end.slot:
            # Whoever decided may have looked at the list before this one was in it.
            watch.remove()

    async def open(self) -> None:
        """Send the request and wait for the head of the answer.

        Raises:
            Ended: By whatever ended it.

        Cancellation: the socket is closed at once.
        """
        self.check()
        if self._due_at:
            self._arm()
            await self._wait_until_due()
        try:
            at_once = self._send_at_once()
            if not self._due_at:
                # After that, since the server is at work meanwhile.
                self._arm()
            if self._transport is None:
                errand = _Errand(self, self._client, self._httpx_request())
                self.attach(errand)
                self._task = errand.start()
                await self.wait_for_head()
            elif self._request.outgoing is None:
                await self._send_by_httpx()
            else:
                if not at_once:
                    await self._transport.send(self, self._request.outgoing, self._timeouts.connect)
                await self.wait_for_head()
                if self._concerns_httpx():
                    await self._send_by_httpx(answered=True)
            self.check()
        except BaseException as exc:
            self.teardown(End("error" if isinstance(exc, Exception) else "cancelled", exc))
            if isinstance(exc, Exception):
                assert self.end is not None
                raise Ended(self.end) from exc
            raise
        finally:
            # It holds this exchange, which holds it.
            self._request.forget(for_good=self._attempts.spent)

    def _send_at_once(self) -> bool:
        outgoing = self._request.outgoing
        return outgoing is not None and self._transport is not None and self._transport.send_at_once(self, outgoing)

    def _httpx_request(self) -> httpx.Request:
        request = self._request.http
        connect = self._timeouts.connect
        limits = {"connect": connect, "pool": connect, "read": None, "write": None}
        request.extensions = {**request.extensions, "timeout": limits}
        return request

    def _concerns_httpx(self) -> bool:
        """Whether the answer is one that httpx acts upon: it follows redirects and keeps cookies."""
        return not _FOR_HTTPX.isdisjoint([name.lower() for name, _ in self.headers])

    async def _send_by_httpx(self, *, answered: bool = False) -> None:
        request = self._httpx_request()
        request.extensions.update({CHANNEL: self, ANSWERED: answered})
        response = await self._client.send(request, stream=True)
        # The response and its stream hold each other; nothing of it is needed but what the channel has.
        response.stream = httpx.ByteStream(b"")

    async def _wait_until_due(self) -> None:
        while self.loop.time() < self._due_at:
            timer = self.loop.call_at(self._due_at, self.wake, context=EmptyContext())
            try:
                await self.pause()
            finally:
                timer.cancel()

    def retry_delay(self, error: BaseException | None = None) -> float | None:
        """Return after how many seconds the request is sent again, now that it has failed; ``None`` for not at all."""
        if not self._attempts.left or (error is None and self.ended_early is None):
            return None
        return self._attempts.delay(error or self.error(), answered=self.status != 0)

    def successor(self, error: BaseException | None = None) -> Exchange | None:
        """Return the exchange that tries again what this one has failed to do, if that is allowed.

        It is under the same tokens and the same limit for the whole call.

        Args:
            error: What the answer said, where that had arrived as a whole: then it has not ended early.
        """
        delay = self.retry_delay(error)
        if delay is None:
            return None
        self._attempts.failed()
        successor = Exchange(
            self._client,
            self._request,
            transport=self._transport,
            streaming=self._streaming,
            timeouts=self._timeouts,
            attempts=self._attempts,
        )
        try:
            successor.started = self.started
            successor._due_at = self.loop.time() + delay
            for token, kind in self._watched or ():
                successor.watch(token, kind)
            return successor  # noqa: TRY300  (Ctrl-C at this line leaves nothing either)
        except BaseException as exc:
            successor.teardown(End("cancelled", exc))
            raise

    def got_on(self) -> None:
        """What is being done has got on: earlier failures do not count any more."""
        self._attempts.got_on()

    async def read(self) -> bytes:
        """Wait for the whole body.

        Raises:
            Ended: By whatever ended it; also when the body is over the limit.

        Cancellation: the socket is closed at once.
        """
        blocks: list[bytes] = []
        size = 0
        while block := await self.receive():
            blocks.append(block)
            size += len(block)
            if size > MAX_BODY_BYTES:
                self.teardown(End("error", ProtocolError(f"the server's answer is over {MAX_BODY_BYTES:,} bytes")))
                self.check()
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    async def raise_for_status(self) -> None:
        """Raise the ``ResponseError`` that the server answered with, if it did.

        Cancellation: the socket is closed at once.
        """
        if self.status < 300:
            return
        error = status_error(self, await self._error_body())
        self.teardown(End("error", error))
        if self.end is not None and self.end.kind == "error":
            # Also where the connection broke after the status had come: the status says more.
            self.end.cause = error
        try:
            # Says so itself, unless something else came first; an answer that settled on arrival was complete by then.
            self.check()
            raise error
        finally:
            # Raised, it holds this frame.
            del error

    async def _error_body(self) -> bytes:
        body = b""
        try:
            while len(body) < _MAX_ERROR_BODY and (block := await self.receive()):
                body += block
        except Ended as ended:
            if ended.end.kind != "error":
                raise
        return body[:_MAX_ERROR_BODY]

    def no_error(self, body: bytes) -> bytes:
        """Return the body of an answer, unless it is an error that came with a status of success."""
        if b'"error"' in body:
            frame = json_object(body)
            if frame.get("error") is not None:
                raise stream_error(frame, self)
        return body

    def origin(self, form: type[BaseModel] | None = None) -> Origin:
        """Return what an answer made of this shall know of where it comes from."""
        return Origin(self.status, self.headers, form)

    def settle(self) -> bool:
        """The reader has all it wanted: from now on nothing can end this any more.

        Returns:
            Whether it is so; False if something had ended it before.
        """
        decided = self.end
        settled = self._decide(End("complete")) or (decided is not None and decided.kind == "complete")
        self._release()
        self.tidied = settled
        return settled

    async def drain(self) -> None:
        """Wait a moment for the rest of a settled answer, so that its connection can be used again.

        Cancellation: the socket is closed at once.
        """
        if not self.linked or self._waiter is not None:
            # It is all there, or another task waits for it already.
            return
        self._drain_behind()
        while self.linked:
            self.take()
            await self.pause()

    def drain_behind(self) -> None:
        """As ``drain()``, when nobody waits for it; from any thread."""
        # To tell the loop is a syscall or two, and mostly the whole answer has arrived.
        if self.linked:
            in_loop(self.loop, self._drain_behind)

    def _drain_behind(self) -> None:
        if self.linked and self._timer is None:
            if self.paused:
                self.take()
                self.go_on()
            self._timer = self.loop.call_later(DRAIN_SECONDS, self.teardown, End("complete"), context=EmptyContext())

    def error(self, partial: Any = None) -> BaseException:
        """Return what to raise for how this ended, to a reader that has got ``partial``; an own instance each time."""
        end = self.end
        assert end is not None
        cause = end.cause
        if end.kind == "aborted":
            return AbortError(cause, partial)
        if end.kind == "timeout":
            return PhaseTimeout(str(cause), getattr(self._timeouts, str(cause)), partial)
        if isinstance(cause, BaseException):
            return translate(cause, self._timeouts, partial)
        return StreamClosed(cause if isinstance(cause, str) else _CLOSED[end.kind], partial)

    async def gone(self) -> None:
        """Wait until nothing is left of an exchange that has ended.

        Cancellation: safe, it ends all the same.
        """
        if self._task is not None:
            await settled(self._task)

    # -- the end --

    def take_head(self, status: int, reason: bytes, headers: Sequence[tuple[bytes, bytes]], version: bytes) -> None:
        """Take the head of the answer."""
        # What httpx follows is not the answer yet, and an error is no stream.
        self.by_line = self._streaming and status < 300
        self.settles_on_arrival = not self._streaming and not 300 <= status < 400
        # From here on the server may not fall silent for longer than the idle limit.
        self.touched = self.loop.time()
        super().take_head(status, reason, headers, version)
        # Decided here, because an answer that comes all at once is at its end before its reader has seen the head.
        error = _encoding_error(headers)
        if error is not None and self._transport is not None and not 300 <= status < 400:
            self._decide(End("error", error))

    def detach(self) -> None:
        """Let go of the link; if the answer is settled, nothing can come any more."""
        super().detach()
        if self.end is not None:
            self._release()
            self.tidied = self.ended_early is None

    def _on_decided(self) -> None:
        self.ended_at = self.ended_at or self.loop.time()
        # In whatever thread this is: a token that outlives many calls must not collect what is left of them.
        self._unwatch()

    def give_back(self) -> None:
        """Let go of everything and wake the reader."""
        self._release()
        super().give_back()

    def _unwatch(self) -> None:
        if self._registrations:
            for watch in tuple(self._registrations):
                watch.remove()
            self._registrations.clear()

    def _tidy_up(self) -> None:
        self._unwatch()
        in_loop(self.loop, self._give_back_if_not_tidied)

    def _give_back_if_not_tidied(self) -> None:
        # Mostly it is by now: the end was being dealt with in another thread.
        if not self.tidied:
            self.give_back()
            self.tidied = True

    def _release(self) -> None:
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the one timer --

    def _arm(self) -> None:
        due = self._due()
        if due is not None:
            self._timer = self.loop.call_at(due[0], self._check_time, context=EmptyContext())

    def _due(self) -> tuple[float, str] | None:
        """Return when the next limit passes, and which it is, as things stand now."""
        limits, now = self._timeouts, self.loop.time()
        due: list[tuple[float, str]] = []
        if limits.total is not None:
            due.append((self.started + limits.total, "total"))
        if self.arrived or self._failure is not None:
            # What the reader has not read yet is not the server's silence.
            return min(due, default=None)
        if not self.first and limits.first_chunk is not None:
            # Before the request is out there is nothing to wait for yet: look again after that time at the latest.
            due.append(((self.sent or now) + limits.first_chunk, "first_chunk"))
        if limits.idle is not None:
            # Not while the server is at work on the first token, nor while it is the reader who keeps it from sending.
            counts = (self.status or not self.sent) and not self.paused
            due.append((((counts and self.touched) or now) + limits.idle, "idle"))
        return min(due, default=None)

    def _check_time(self) -> None:
        # Chunks only note when they came. The timer, when it goes off, finds out how long the silence has been, and
        # sets itself anew: one timer a stream, not one a chunk.
        self._timer = None
        due = self._due()
        if due is None or self.end is not None:
            return
        if due[0] <= self.loop.time():
            self.teardown(End("timeout", due[1]))
        else:
            self._timer = self.loop.call_at(due[0], self._check_time, context=EmptyContext())


class _EndByToken(Watch):
    """Ends an exchange with a token."""

    __slots__ = ("_exchange", "_kind")

    def __init__(self, token: CancelToken, exchange: Exchange, kind: Kind) -> None:
        super().__init__(token)
        self._exchange = exchange
        self._kind: Kind = kind

    def end(self, reason: object) -> None:
        self._exchange.finish(End(self._kind, reason))


class _Errand:
    """A request that runs in a task of ours, over a transport that is not; the link of its exchange."""

    def __init__(self, exchange: Exchange, client: httpx.AsyncClient, request: httpx.Request) -> None:
        self._exchange = exchange
        self._client = client
        self._request = request
        self._socket: Any = None
        # If the foreign client has one of our transports under it, its connection hangs on this.
        self._inner = Channel(exchange.loop)
        # It may be used for several requests in turn, if credentials are asked for or a redirect is followed.
        self._inner.settles_on_arrival = False
        self._room = asyncio.Event()
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None] | None:
        """Begin, unless it has been stopped already; after the errand has become the exchange's link.

        Before that it would be too early: an eager task may be through at once.
        """
        if not self._stopped:
            self._task = self._exchange.loop.create_task(self._run())
        return self._task

    def sever(self, channel: Channel) -> None:
        self._inner.finish(End("closed"))
        # Only in the loop's own thread: elsewhere the foreign pool may be closing this very descriptor, and its number
        # may belong to somebody else before it is duplicated.
        if self._socket is None or asyncio._get_running_loop() is not channel.loop:  # noqa: SLF001
            return
        try:
            # Not os.dup(), which on Windows knows files only.
            duplicate = socket.socket(fileno=socket.dup(self._socket.fileno()))
        except OSError:
            return
        with duplicate:
            try:
                duplicate.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def dispose(self, channel: Channel) -> None:
        self._stopped = True
        if self._task is not None:
            cancel_once(self._task)

    def pause(self) -> None:
        return

    def resume(self) -> None:
        self._room.set()

    async def _run(self) -> None:
        exchange = self._exchange
        try:
            exchange.touched = exchange.sent = exchange.loop.time()
            self._request.extensions[CHANNEL] = self._inner
            response = await self._client.send(self._request, stream=True)
            try:
                await self._pass_on(response)
            finally:
                await response.aclose()
        except Exception as exc:
            exchange.fail(exc)
        except BaseException:
            exchange.teardown(End("closed", "the event loop is shutting down"))
            raise
        else:
            exchange.complete()

    async def _pass_on(self, response: httpx.Response) -> None:
        exchange = self._exchange
        network = response.extensions.get("network_stream")
        # A connection of HTTP/2 carries other requests as well.
        if network is not None and response.http_version != "HTTP/2":
            self._socket = network.get_extra_info("socket")
        exchange.take_head(
            response.status_code,
            response.extensions.get("reason_phrase", b""),
            response.headers.raw,
            response.extensions.get("http_version", b"HTTP/1.1"),
        )
        error = _encoding_error(response.headers.raw)
        if error is not None:
            # Not even httpx shall unpack it: a block of it may become a thousand times as much.
            raise error
        async for block in response.aiter_bytes():
            exchange.now = exchange.loop.time()
            room = exchange.push(block)
            if not room:
                self._room.clear()
                await self._room.wait()


def _encoding_error(headers: Iterable[tuple[bytes, bytes]]) -> ProtocolError | None:
    """Refuse what is packed: it was not asked for, and nobody can know its size before it is unpacked."""
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return ProtocolError(f"the answer is encoded as {value.decode('latin-1')!r}, which was not asked for")
    return None


_CLOSED = {
    "closed": "the stream is closed",
    "cancelled": "the stream is closed: the task that read it was cancelled",
    "error": "the stream is closed",
    "complete": "the stream is at its end",
}
