"""Answers of a model, served: a response for Starlette and FastAPI that streams one, and a route that stops it.

Not built on ``StreamingResponse`` or sse-starlette: both send the status line before they ask for the first item, so
that no error can become an HTTP error any more and nobody listens while a prompt is read; and both end a stream by
cancelling a task, where here it is aborted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import socket
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ._call.stream import Stream
from ._errors import AbortError, ConnectError, OllamaError, RequestError, ResponseError
from .durable import Answer, AnswersClosed, AnswersUnavailable, BadOffset, DurableAnswers, Event, UnknownAnswer, Viewer
from .durable._told import ABOUT_THE_REQUEST, MAX_TEXT, NOT_SENT, STATUSES, Told, summary, tell
from .registry import AbortRegistry
from .registry._local import checked_reason

Owner: TypeAlias = Callable[[Request], str | Awaitable[str]]

__all__ = [
    "BROWSER_MODULE",
    "CLIENT_LEFT",
    "CLIENT_STUCK",
    "ID_HEADER",
    "RECONNECTED",
    "AnswerResponse",
    "StreamResponse",
    "attach_route",
    "list_route",
    "module_route",
    "stop_route",
]

_log = logging.getLogger(__name__)

ID_HEADER = "X-Stream-Id"
CLIENT_LEFT = "the client left"
"""The reason of a stream that was aborted because whoever asked for it went away."""
CLIENT_STUCK = "the client took nothing for too long"
"""The reason of a stream that was aborted because the client read nothing within ``send_timeout``."""
RECONNECTED = "the client connected again to an answer that is over"
"""The reason of a stream that was never opened, since its request continues an earlier response."""
BROWSER_MODULE: Path = Path(__file__).with_name("durable") / "answers.js"
"""The ES module with which a page starts, watches and stops durable answers."""

# 22 characters of base64 are 128 bits.
_ID = re.compile(r"[A-Za-z0-9_-]{22,128}")
_ID_RULE = "a stream's id has 22 to 128 of the characters A-Z a-z 0-9 _ -: take 128 random bits or more"
_MAX_STOP_BODY = 4096
# How often the connection itself is looked at, in seconds, and how long a server has to notice that it was closed.
_LOOK = 2.0
# Bytes that the kernel may hold for a client. By itself it takes 4 MB, minutes of an answer, before a send has to wait
# and anybody can tell that the client takes nothing.
_SEND_BUFFER = 65536
_NEVER_STORED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
# Of the number of an event.
_MAX_DIGITS = 15
_MEDIA_TYPES = {"sse": "text/event-stream", "ndjson": "application/x-ndjson"}


def _check_delivery(format: object, **times: float | None) -> None:  # noqa: A002  (the parameter's public name)
    if format not in _MEDIA_TYPES:
        raise RequestError(f'format={format!r}: give "sse" or "ndjson"')
    for name, seconds in times.items():
        if seconds is not None and not seconds > 0:
            raise RequestError(f"{name}={seconds!r}: give a number of seconds above 0")


class StreamResponse(Response):
    """A response that streams an answer, and aborts it as soon as the client leaves.

    The model's stream is opened first. If that fails, the response is a JSON error with its own status; otherwise the
    events ``open``, ``chunk`` for each chunk, and ``end`` follow, as Server-Sent Events or as lines of JSON.
    A client that leaves is noticed at once, also while the model is silent or the client reads slowly.

    With ``answers`` it is the first viewer of a durable answer: the events have numbers (the ``id`` of an SSE event,
    the ``number`` in a line of JSON), and others can attach behind any of them, see ``attach_route()``.

    A request that continues an earlier response, as a browser's ``EventSource`` sends it each time a response has
    ended, is answered 204, which tells the browser to stop: the model is not asked a second time.

    Args:
        stream: What ``chat(..., stream=True)`` or ``generate(..., stream=True)`` returned, not read yet.
        registry: Where the stream is registered while the response lasts, so that it can be stopped by its id.
        owner: Who may stop it.
        answers: Where the stream is begun as a durable answer; these have a registry, and so does the response.
        on_leave: What a client that leaves, or takes nothing for too long, does to a durable answer: ``"abort"`` ends
            it; with ``"continue"`` it goes on.
        stream_id: The id; by default the one in the request's header ``X-Stream-Id``, or a new random one. The
            response has it in the same header and in its first event.
        format: ``"sse"`` or ``"ndjson"``.
        heartbeat: After how many seconds of silence something is sent, so that no proxy takes the connection for dead.
        head_within: After how many seconds the status line is sent even if the model is still silent, for proxies that
            do not wait. An error that comes later is in the ``end`` event only. ``None``: when the model has answered.
        send_timeout: Seconds within which the client must take each send. A client that takes nothing for longer loses
            its stream, with the reason ``CLIENT_STUCK``. ``None``: no limit.
        explain: Returns the text that a client gets for an error. By default that is a fixed text for each kind of
            error, and the text of the model's server with the statuses 400, 404 and 413, because other texts can name
            addresses and files, and quote what others wrote. The error itself is logged.
        headers: Further headers.
        background: What runs afterwards, however the response ended, unless the server cancelled it.

    Raises:
        RequestError: The format, the id, a time, or what happens when the client leaves is not valid.
    """

    def __init__(
        self,
        stream: Stream[Any],
        *,
        registry: AbortRegistry | None = None,
        owner: str = "",
        answers: DurableAnswers | None = None,
        on_leave: Literal["abort", "continue"] = "abort",
        stream_id: str | None = None,
        format: Literal["sse", "ndjson"] = "sse",  # noqa: A002
        heartbeat: float = 15.0,
        head_within: float | None = None,
        send_timeout: float | None = 120.0,
        explain: Callable[[OllamaError], str] | None = None,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        _check_delivery(format, heartbeat=heartbeat, head_within=head_within, send_timeout=send_timeout)
        if stream_id is not None and not _ID.fullmatch(stream_id):
            raise RequestError(f"stream_id={stream_id[:130]!r}: {_ID_RULE}")
        if on_leave not in ("abort", "continue"):
            raise RequestError(f'on_leave={on_leave!r}: give "abort" or "continue"')
        if answers is None and on_leave == "continue":
            raise RequestError('on_leave="continue" needs answers=: without it no client could come back to the answer')
        if answers is not None and registry not in (None, answers.registry):
            raise RequestError(
                "registry= cannot be combined with answers=: give it to DurableAnswers.from_url(registry=)"
            )
        self.stream = stream
        self.registry = registry
        self.answers = answers
        self.on_leave = on_leave
        self.owner = owner
        self.stream_id = stream_id
        self.format: Literal["sse", "ndjson"] = format
        self.heartbeat = heartbeat
        self.head_within = head_within
        self.send_timeout = send_timeout
        self.explain = explain
        self.status_code = 200
        self.media_type: str = _MEDIA_TYPES[format]
        self.background = background
        self.init_headers({**_NEVER_STORED, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Cancellation: the stream is closed at once.
        """
        given = self.stream_id or Headers(scope=scope).get(ID_HEADER) or secrets.token_urlsafe(24)
        source = _Direct(self) if self.answers is None else _Begun(self, self.answers)
        delivery = _Delivery(self, source, given, scope, receive, send)
        if _continues(scope):
            self.stream.abort(RECONNECTED)
            await delivery.answer(Response(status_code=204, headers={"Cache-Control": "no-store"}))
        elif _ID.fullmatch(given):
            await delivery.run()
        else:
            await delivery.answer(_error(400, f"the header {ID_HEADER}: {_ID_RULE}"))
        if self.background is not None:
            await self.background()


def _continues(scope: Scope) -> bool:
    """Return whether a client asks for the rest of an earlier response, not for an answer.

    Browsers, and libraries that read events with ``fetch``, say in a header which event they had last. A browser may
    not send that header to another site without asking first, so the usual stand-in for ``EventSource`` says it in
    the query.
    """
    last = Headers(scope=scope).get("Last-Event-ID") or QueryParams(scope.get("query_string", b"")).get("lastEventId")
    return bool(last)


class _Left(Exception):  # noqa: N818
    """Nothing can be sent to the client any more."""


class _Delivery:
    """One response on its way."""

    def __init__(
        self, response: _Terms, source: _Source, stream_id: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._response = response
        self._source = source
        self._id = stream_id
        self._scope = scope
        self._receive = receive
        self._asgi_send = send
        self._connection = _connection(receive)
        if self._connection is not None and response.send_timeout is not None:
            _limit_buffer(self._connection)
        self._begun = False
        self._left = False
        self._stuck = False
        # The pulse sends, too.
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def run(self) -> None:
        watching = asyncio.create_task(self._watch())
        helpers = [watching, asyncio.create_task(self._pulse())]
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(suppress(_Left))
                try:
                    await self._source.begin(self._id, stack)
                except OllamaError as exc:
                    await self._refuse(exc)
                else:
                    await self._deliver()
            if self._stuck and self._connection is not None:
                # Else it would complain of a response that is not complete.
                await asyncio.wait({watching}, timeout=_LOOK)
        finally:
            for helper in helpers:
                helper.cancel()

    async def answer(self, response: Response) -> None:
        """Send another response than the stream."""
        with suppress(_Left):
            await response(self._scope, self._receive, self._pass)

    # -- beside the sending --

    async def _watch(self) -> None:
        """Wait for the client to leave, all the time: what is sent to it may be long in coming, or not get away."""
        try:
            while not await self._has_left():
                pass
        except Exception:
            # A stream that nobody could stop any more is worse than one that ends early.
            _log.exception("the ASGI server, or a middleware, failed while the client was watched; its stream is ended")
        self._leave()

    async def _has_left(self) -> bool:
        """Wait until the server says something, but not for ever: it may never say that the client has left.

        With a second request behind this one, uvicorn stops reading and so does not see the client leave; asking anew
        makes it read on. With httptools it then tells only the second request. The connection itself shows it.
        """
        connection = self._connection
        limit = asyncio.timeout(None if connection is None else _LOOK)
        try:
            async with limit:
                message = await self._receive()
        except TimeoutError:
            if connection is None or not limit.expired():
                raise
            return connection.is_closing()
        return bool(message["type"] == "http.disconnect")

    async def _pulse(self) -> None:
        """Send something when nothing else is sent."""
        heartbeat, head_within = self._response.heartbeat, self._response.head_within
        with suppress(_Left):
            if head_within is not None:
                await asyncio.sleep(head_within)
                await self.begin()
            pause = heartbeat
            while True:
                await asyncio.sleep(pause)
                pause = self._sent_at + heartbeat - asyncio.get_running_loop().time()
                if pause <= 0:
                    pause = heartbeat
                    # Where something waits to be sent, it is not our silence.
                    if self._begun and not self._sending.locked():
                        await self.send(self._ping())

    def _leave(self) -> None:
        self._left = True
        self._source.leave(CLIENT_LEFT)

    def _give_up(self) -> None:
        """Let go of a client that takes nothing: first of the model, then of the connection, which has it all buffered.

        Where the connection cannot be had, the server closes it, as soon as the client has read what is buffered.
        """
        self._left = self._stuck = True
        self._source.leave(CLIENT_STUCK)
        if self._connection is not None:
            self._connection.abort()
        _log.info("stream %s: the client took nothing for %g s", self._id, self._response.send_timeout)

    # -- what is sent --

    async def _deliver(self) -> None:
        error: OllamaError | None = None
        try:
            await self._source.deliver(self)
        except OllamaError as exc:
            error = exc
        if self._left:
            await self._say_goodbye()
        elif error is None or isinstance(error, AbortError):
            await self.begin()
            await self._end(None)
        else:
            await self._refuse(error)

    async def begin(self) -> None:
        """Send the head, once."""
        async with self._sending:
            if self._begun:
                return
            self._begun = True
            headers = MutableHeaders(raw=list(self._response.raw_headers))
            if self._id:
                headers[ID_HEADER] = self._id
            if self._scope.get("http_version", "").startswith("1"):
                # Nobody has a reason to send a second request behind this one; see _has_left().
                headers["Connection"] = "close"
            await self._pass({"type": "http.response.start", "status": 200, "headers": headers.raw})
            opening = self._source.opening(self._id)
            if opening is not None:
                await self._pass({"type": "http.response.body", "body": self.event(*opening), "more_body": True})

    async def send(self, event: bytes, *, more: bool = True) -> None:
        """Send one event, or several."""
        async with self._sending:
            if self._connection is not None and self._connection.is_closing():
                self._leave()
                raise _Left
            await self._pass({"type": "http.response.body", "body": event, "more_body": more})

    async def _pass(self, message: Message) -> None:
        if self._stuck:
            raise _Left
        try:
            # It waits while the client is slow. Then the stream is not read, and soon the model's socket is not either.
            if not await _within(self._response.send_timeout, self._asgi_send, message, self._give_up):
                raise _Left
        except (OSError, ClientDisconnect) as exc:
            self._leave()
            raise _Left from exc
        self._sent_at = asyncio.get_running_loop().time()

    async def _refuse(self, error: OllamaError) -> None:
        """Send an error: as the whole response if that has not begun, else as its last event."""
        told = tell(error, self._response.explain)
        _record(self._id, error, told)
        async with self._sending:
            begun, self._begun = self._begun, True
            if not begun:
                await _refusal(error, told)(self._scope, self._receive, self._pass)
        if begun:
            await self._end(told, error)

    async def _end(self, told: Told | None, error: OllamaError | None = None) -> None:
        ending = self._source.ending(told, error)
        await self.send(b"" if ending is None else self.event(*ending), more=False)

    async def _say_goodbye(self) -> None:
        """Leave a status to what stands between the client and us: nobody else will see it."""
        if not self._begun:
            await self._pass({"type": "http.response.start", "status": 499, "headers": []})
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    # -- in which form --

    def event(self, name: str, data: bytes, number: int | None = None) -> bytes:
        """Return an event as it is sent."""
        # JSON has no line breaks, so one "data" line is enough.
        if self._response.format == "sse":
            counted = b"" if number is None else b"id: %d\n" % number
            return b"%bevent: %b\ndata: %b\n\n" % (counted, name.encode(), data)
        counted = b"" if number is None else b'"number":%d,' % number
        return b'{"event":"%b",%b"data":%b}\n' % (name.encode(), counted, data)

    def _ping(self) -> bytes:
        return b": ping\n\n" if self._response.format == "sse" else b'{"event":"ping"}\n'


# -- what is delivered --


class _Terms(Protocol):
    """How something is delivered."""

    format: Literal["sse", "ndjson"]
    heartbeat: float
    head_within: float | None
    send_timeout: float | None
    explain: Callable[[OllamaError], str] | None

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]: ...


class _Source(Protocol):
    """Where events come from."""

    async def begin(self, stream_id: str, stack: AsyncExitStack) -> None:
        """Prepare; what is to be undone at the end of the response goes onto the stack."""
        ...

    def opening(self, stream_id: str) -> _Event | None:
        """Return what is sent behind the head."""
        ...

    async def deliver(self, delivery: _Delivery) -> None:
        """Send all events but those that the delivery sends itself."""
        ...

    def ending(self, told: Told | None, error: OllamaError | None) -> _Event | None:
        """Return what is sent at last."""
        ...

    def leave(self, reason: str) -> None:
        """Take note that the client will get nothing any more."""
        ...


# Its name, its data, and its number in a durable answer.
_Event: TypeAlias = "tuple[str, bytes, int | None]"


class _Direct:
    """A model's stream, which lives as long as its response."""

    def __init__(self, response: StreamResponse) -> None:
        self._response = response
        self._stream = response.stream
        self._events = 0

    def _numbered(self, name: str, data: bytes) -> _Event:
        # With the number, a browser says which event it had last when it connects again; see _continues().
        self._events += 1
        return name, data, self._events if self._response.format == "sse" else None

    async def begin(self, stream_id: str, stack: AsyncExitStack) -> None:
        registry = self._response.registry
        if registry is not None:
            token = await stack.enter_async_context(registry.token(stream_id, owner=self._response.owner))
            stack.callback(token.on_abort(self._stream.abort).remove)

    def opening(self, stream_id: str) -> _Event:
        return self._numbered("open", json.dumps({"id": stream_id}).encode())

    async def deliver(self, delivery: _Delivery) -> None:
        await self._stream
        await delivery.begin()
        async for chunk in self._stream:
            data = chunk.model_dump_json(exclude_none=True, exclude=NOT_SENT).encode()
            await delivery.send(delivery.event(*self._numbered("chunk", data)))

    def ending(self, told: Told | None, error: OllamaError | None) -> _Event:
        return self._numbered("end", json.dumps(summary(self._stream, told)).encode())

    def leave(self, reason: str) -> None:
        self._stream.abort(reason)


class _Watched:
    """A durable answer, from any of its events on."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer

    async def begin(self, stream_id: str, stack: AsyncExitStack) -> None:
        stack.callback(self._viewer.detach)

    def opening(self, stream_id: str) -> _Event | None:
        return None

    async def deliver(self, delivery: _Delivery) -> None:
        await delivery.begin()
        while events := await self._viewer.read():
            await delivery.send(b"".join(delivery.event(*_shown(event)) for event in events))

    def ending(self, told: Told | None, error: OllamaError | None) -> _Event | None:
        # The answer's own end was among its events.
        if told is None or isinstance(error, AnswersClosed):
            return None
        return _failed(told, error)

    def leave(self, reason: str) -> None:
        self._viewer.detach()


class _Begun:
    """A durable answer that begins with this response."""

    def __init__(self, response: StreamResponse, answers: DurableAnswers) -> None:
        self._response = response
        self._answers = answers
        self._answer: Answer | None = None
        self._viewer: Viewer | None = None
        self._opened = False
        # Its end, where that may still become an HTTP error.
        self._last: Event | None = None

    async def begin(self, stream_id: str, stack: AsyncExitStack) -> None:
        response = self._response
        self._answer = await self._answers.begin(
            response.stream, stream_id, owner=response.owner, explain=response.explain
        )
        self._viewer = self._answer.attach(after=1)
        stack.callback(self._viewer.detach)

    def opening(self, stream_id: str) -> _Event | None:
        # Without an answer the head goes out before Redis has said that it may begin.
        if self._answer is None or self._opened:
            return None
        self._opened = True
        return _shown(self._answer.opened) if self._answer.claimed else _shown(self._answer.opened, away=True)

    async def deliver(self, delivery: _Delivery) -> None:
        answer, viewer = self._answer, self._viewer
        assert answer is not None
        assert viewer is not None
        events = await viewer.read()
        if events and events[0].name == "end" and answer.error is not None:
            # An HTTP error, if there can still be one.
            self._last = events[0]
            raise answer.error
        await delivery.begin()
        opening = self.opening("")
        if opening is not None:
            await delivery.send(delivery.event(*opening))
        while events:
            await delivery.send(b"".join(delivery.event(*_shown(event)) for event in events))
            events = await viewer.read()

    def ending(self, told: Told | None, error: OllamaError | None) -> _Event | None:
        if told is None or isinstance(error, AnswersClosed):
            return None
        return _failed(told, error) if self._last is None else _shown(self._last)

    def leave(self, reason: str) -> None:
        if self._response.on_leave == "abort":
            self._response.stream.abort(reason)
        elif self._viewer is not None:
            self._viewer.detach()


def _failed(told: Told, error: OllamaError | None) -> _Event:
    # Without a number: whoever reconnects asks for the same again.
    return "error", json.dumps({"error": told.text, "code": _code(error)}).encode(), None


def _shown(event: Event, **more: object) -> _Event:
    """Return an event as viewers get it; what tells one producer from another is not theirs."""
    data = event.json
    if event.name == "open":
        data = json.dumps({key: value for key, value in event.data.items() if key != "nonce"} | more).encode()
    return event.name, data, event.number


# -- sending, for so long --


async def _call(send: Send, message: Message) -> None:
    # What a server's send returns may know no throw() and no close(); a coroutine does.
    await send(message)


@types.coroutine
def _within(
    seconds: float | None, send: Send, message: Message, give_up: Callable[[], None]
) -> Generator[Any, Any, bool]:
    """Send a message; return whether it was sent in time.

    The server's send is made to wait here, in the caller's task, for what it waits for, or for the time to pass. So it
    can be left without cancelling anybody: not the caller's task, which is the server's, nor one of ours, which would
    have to be made for each chunk, and would stay behind where the server's send swallows a cancellation.

    Args:
        seconds: How long the server may take; ``None`` for no limit.
        send: The server's.
        message: What is sent.
        give_up: Called when the time has passed, before anything else happens.
    """
    sending = _call(send, message)
    if seconds is None:
        yield from sending.__await__()
        return True
    limit = _Limit(seconds, give_up)
    try:
        while True:
            try:
                waits_for = limit.step(sending)
            except StopIteration:
                return True
            yield from limit.wait(waits_for)
            if limit.passed:
                return False
    finally:
        limit.cancel()
        # What it does at its end is the server's affair; it has no say in ours.
        with suppress(Exception):
            sending.close()


class _Limit:
    """The time that a send has, from the moment at which it first has to wait."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._seconds = seconds
        self._give_up = give_up
        self._timer: asyncio.TimerHandle | None = None
        self._gate: asyncio.Future[None] | None = None
        # What ended the last wait, if it was an exception.
        self._thrown: BaseException | None = None
        self.passed = False

    def step(self, sending: Coroutine[Any, Any, None]) -> Any:
        """Go on with the send, as the task that runs it would; return what it waits for."""
        thrown, self._thrown = self._thrown, None
        return sending.send(None) if thrown is None else sending.throw(thrown)

    def wait(self, waits_for: Any) -> Generator[Any, Any, None]:
        """Wait for it, or for the time to pass."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._pass)
        if getattr(waits_for, "_asyncio_future_blocking", None) is None:
            # No future: it wants to be resumed in the next round.
            gate, waits_for = None, None
        else:
            waits_for._asyncio_future_blocking = False  # noqa: SLF001  (as a task does)
            gate = self._gate = loop.create_future()
            waits_for.add_done_callback(self._open)
        try:
            if gate is None:
                yield
            else:
                yield from gate
        except BaseException as exc:
            # A cancellation, mostly. It goes to what is waited for, and through the send, as if it were awaited here.
            if waits_for is not None:
                waits_for.cancel()
            self._thrown = exc
        finally:
            self._gate = None
            if waits_for is not None:
                waits_for.remove_done_callback(self._open)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _pass(self) -> None:
        self.passed = True
        self._give_up()
        self._open(None)

    def _open(self, _: object) -> None:
        if self._gate is not None and not self._gate.done():
            self._gate.set_result(None)


def _connection(receive: Receive) -> asyncio.Transport | None:
    """Return the client's connection, where the server lets it be seen.

    No part of ASGI, but uvicorn's ``receive`` is a method of what has it. A server, or a middleware, that hides it is
    taken at its word as to whether the client has left.
    """
    connection = getattr(getattr(receive, "__self__", None), "transport", None)
    return connection if hasattr(connection, "is_closing") and hasattr(connection, "abort") else None


def _limit_buffer(connection: asyncio.Transport) -> None:
    sock = connection.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


# -- errors --

# Seconds in which a Redis that is restarted has most answers back.
_TRY_AGAIN = "3"
_RETRY_AFTER = re.compile(r"[A-Za-z0-9 ,:]{1,40}")


def _refusal(error: OllamaError, told: Told) -> JSONResponse:
    wait = error.headers.get("retry-after", "") if isinstance(error, ResponseError) else ""
    if isinstance(error, AnswersUnavailable):
        wait = _TRY_AGAIN
    known = told.status in (429, 503) and _RETRY_AFTER.fullmatch(wait)
    return _error(told.status, told.text, {"Retry-After": wait} if known else None, code=_code(error))


def _record(stream_id: str, error: OllamaError, told: Told) -> None:
    """Log what the client is not told."""
    level, status, about = logging.WARNING, told.status, str(error)
    if isinstance(error, ResponseError):
        status, about = error.status_code, error.error
        if status in ABOUT_THE_REQUEST:
            # The client's own fault, and the prompt may be in the text.
            level, about = logging.INFO, STATUSES[status]
    elif isinstance(error, ConnectError):
        about = error.detail or about
    else:
        # What is quoted there may be of an answer.
        about = re.split(r"(?<!\w)['\"]", about, maxsplit=1)[0]
    _log.log(level, "stream %s: %s, status %s: %s", stream_id, type(error).__name__, status, _loggable(about))


def _loggable(text: str) -> str:
    """Cut what others wrote to one short line without keys."""
    words = text[:MAX_TEXT].split()
    shown = " ".join("[...]" if _like_a_key(word) else word for word in words)
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def _like_a_key(word: str) -> bool:
    bare = word.strip("\"'`.,:;()")
    mixed = any(map(str.isdigit, bare)) and any(map(str.isalpha, bare))
    return "***" in word or bare.startswith("sk-") or (len(bare) >= 20 and mixed and "/" not in bare)


def _error(
    status: int, text: str, headers: Mapping[str, str] | None = None, *, code: str | None = None
) -> JSONResponse:
    body: dict[str, object] = {"error": text, "status_code": status}
    return JSONResponse(body if code is None else body | {"code": code}, status, headers)


def _code(error: OllamaError | None) -> str | None:
    """Return what a program can tell the errors of durable answers by."""
    code: str | None = getattr(error, "code", None)
    return code


async def _asked_by(request: Request, owner: Owner | None) -> str:
    who = "" if owner is None else owner(request)
    return who if isinstance(who, str) else await who


class AnswerResponse(Response):
    """A response that streams a durable answer, from any of its events on; leaving it ends nothing.

    Args:
        viewer: What ``attach()`` returned.
        format: As in ``StreamResponse``.
        heartbeat: As in ``StreamResponse``.
        send_timeout: As in ``StreamResponse``; a client that takes nothing for so long is detached.
        headers: Further headers.

    Raises:
        RequestError: The format or a time is not valid.
    """

    format: Literal["sse", "ndjson"]
    head_within: float | None = None
    explain: Callable[[OllamaError], str] | None = None

    def __init__(
        self,
        viewer: Viewer,
        *,
        format: Literal["sse", "ndjson"] = "sse",  # noqa: A002
        heartbeat: float = 15.0,
        send_timeout: float | None = 120.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        _check_delivery(format, heartbeat=heartbeat, send_timeout=send_timeout)
        self.viewer = viewer
        self.format = format
        self.heartbeat = heartbeat
        self.send_timeout = send_timeout
        self.status_code = 200
        self.media_type: str = _MEDIA_TYPES[format]
        self.background: None = None
        self.init_headers({**_NEVER_STORED, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Cancellation: the viewer is detached at once; the answer goes on.
        """
        try:
            await _Delivery(self, _Watched(self.viewer), "", scope, receive, send).run()
        finally:
            self.viewer.detach()


def attach_route(path: str, answers: DurableAnswers, *, owner: Owner | None = None) -> Route:
    """Make the route ``GET <path>/{id}``, which streams a durable answer to its owner, as often as asked.

    It continues after the event whose number is in the header ``Last-Event-ID``, which browsers send when they
    reconnect, or in ``?after=``; without either it begins at the start. ``?format=ndjson`` gives lines of JSON instead
    of Server-Sent Events. If no event is to come, the response is 204, which ends an ``EventSource``; 400 means that
    the answer has no event with that number, 404 that there is no such answer (any more), 503 that Redis does not
    answer. No request to this route begins an answer again.

    Args:
        path: Of the route, without the id.
        answers: Where the answers are.
        owner: As for ``stop_route()``. Without it, everyone who knows an id may watch.
    """

    async def attach(request: Request) -> Response:
        who = await _asked_by(request, owner)
        query = request.query_params
        given = request.headers.get("last-event-id") or query.get("lastEventId") or query.get("after") or "0"
        kind = request.query_params.get("format", "sse")
        if kind not in _MEDIA_TYPES:
            return _error(400, 'format is "sse" or "ndjson"')
        try:
            viewer = await answers.attach(_answer_id(request), owner=who, after=_offset(given))
        except OllamaError as exc:
            return _refused("(a viewer)", exc)
        if viewer.at_end:
            viewer.detach()
            return Response(status_code=204)
        return AnswerResponse(viewer, format=cast("Any", kind))

    return Route(f"{path}/{{id}}", attach, methods=["GET"])


def list_route(path: str, answers: DurableAnswers, *, owner: Owner | None = None) -> Route:
    """Make the route ``GET <path>``, which lists the durable answers of the owner who asks.

    The answer is ``[{"id": text, "state": "running" | "silent" | "ended", "begun": seconds}]``, the oldest first; 503
    if Redis is away.

    Args:
        path: Of the route.
        answers: Where the answers are.
        owner: As for ``stop_route()``. Without it, everyone sees the answers that have no owner.
    """

    async def list_answers(request: Request) -> Response:
        try:
            listed = await answers.list(await _asked_by(request, owner))
        except OllamaError as exc:
            return _refused("(a list)", exc)
        return JSONResponse([each._asdict() for each in listed], headers={"Cache-Control": "no-store"})

    return Route(path, list_answers, methods=["GET"])


def module_route(path: str) -> Route:
    """Make the route ``GET <path>``, which serves ``BROWSER_MODULE``: the browser's part of durable answers.

    Browsers ask each time whether there is a newer one: the module belongs to the version of the routes that it uses.

    Args:
        path: Of the route, as in ``"/answers.js"``.
    """

    async def module(_: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return FileResponse(BROWSER_MODULE, media_type="text/javascript", headers=headers)

    return Route(path, module, methods=["GET"])


def _answer_id(request: Request) -> str:
    answer_id: str = request.path_params["id"]
    if not _ID.fullmatch(answer_id):
        # One that no answer can have is unknown like any other.
        raise UnknownAnswer("no answer has such an id")
    return answer_id


def _offset(given: str) -> int:
    if not (given.isascii() and given.isdigit() and len(given) <= _MAX_DIGITS):
        raise BadOffset(f"{given[:40]!r} is not the number of an event")
    return int(given)


def _refused(what: str, error: OllamaError) -> Response:
    told = tell(error)
    _record(what, error, told)
    return _refusal(error, told)


def stop_route(path: str, registry: AbortRegistry, *, owner: Owner | None = None) -> Route:
    """Make the route ``POST <path>/{id}``, which stops a stream of the registry for its owner.

    The body may be ``{"reason": text}``. The answer is 200 ``{"stopped": true}``, or 404 where the caller has no such
    stream: then the Stop is kept, in case the stream is still on its way here. It is 202 where Redis is away and the
    stream is not in this process; the Stop then goes out when Redis is back.

    Args:
        path: Of the route, without the id.
        registry: The one that the streams are registered in.
        owner: Tells from a request who sent it, with the same answer as was given to ``StreamResponse(owner=)``; it
            may be a coroutine function, and raise ``HTTPException``. Without it, everyone who knows an id may stop it.
    """

    async def stop(request: Request) -> Response:
        who = await _asked_by(request, owner)
        try:
            reason = checked_reason(await _reason(request))
        except RequestError as exc:
            return _error(400, str(exc))
        # One that no stream can have is unknown like any other.
        stream_id = request.path_params["id"]
        try:
            stopped = await registry.abort(stream_id, reason, owner=who) if _ID.fullmatch(stream_id) else "kept"
        except OllamaError as exc:
            return _refused("(a Stop)", exc)
        if stopped == "stopped":
            return JSONResponse({"stopped": True})
        status, text = _NOT_STOPPED[stopped]
        return JSONResponse({"stopped": False, "error": text, "status_code": status}, status)

    return Route(f"{path}/{{id}}", stop, methods=["POST"])


_NOT_STOPPED = {
    "kept": (404, "you have no stream with this id; one that comes late is stopped when it begins"),
    "queued": (202, "the registry cannot reach the other servers; the stream is stopped as soon as it can"),
}


async def _reason(request: Request) -> str | None:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_STOP_BODY:
            raise RequestError(f"the body of a Stop has at most {_MAX_STOP_BODY} bytes")
    if not body:
        return None
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise RequestError('invalid body: a Stop has no body, or {"reason": text}')
    return cast("dict[str, Any]", given).get("reason")
