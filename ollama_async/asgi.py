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
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ._errors import AbortError, OllamaError, PhaseTimeout, RequestError, ResponseError, StreamClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.background import BackgroundTask
    from starlette.types import Message, Receive, Scope, Send

    from ._stream import Stream
    from .registry import AbortRegistry

    Owner: TypeAlias = Callable[[Request], str | Awaitable[str]]

__all__ = ["CLIENT_LEFT", "ID_HEADER", "StreamResponse", "stop_route"]

_log = logging.getLogger(__name__)

ID_HEADER = "X-Stream-Id"
CLIENT_LEFT = "the client left"
"""The reason of a stream that was aborted because whoever asked for it went away."""

# 22 characters of base64 are 128 bits.
_ID = re.compile(r"[A-Za-z0-9_-]{22,128}")
_ID_RULE = "a stream's id has 22 to 128 of the characters A-Z a-z 0-9 _ -: take 128 random bits or more"
_MAX_STOP_BODY = 4096
# What the model's server says about the request is the client's concern. What it says about our access to it is not.
_PASSED_ON = {400, 404, 413, 429, 503}
_MEDIA_TYPES = {"sse": "text/event-stream", "ndjson": "application/x-ndjson"}


class StreamResponse(Response):
    """A response that streams an answer, and aborts it as soon as the client leaves.

    The model's stream is opened first. If that fails, the response is a JSON error with a status of its own; else the
    events ``open``, ``chunk`` for each chunk, and ``end`` follow, as Server-Sent Events or as lines of JSON.
    A client that leaves is noticed at once, also while the model is silent or the client reads slowly.

    Args:
        stream: What ``chat(..., stream=True)`` or ``generate(..., stream=True)`` returned, not read yet.
        registry: Where the stream is registered while the response lasts, so that it can be stopped by its id.
        owner: Who may stop it.
        stream_id: The id; by default the one in the request's header ``X-Stream-Id``, else a new random one. The
            response has it in the same header and in its first event.
        format: ``"sse"`` or ``"ndjson"``.
        heartbeat: After how many seconds of silence something is sent, so that no proxy takes the connection for dead.
        head_within: After how many seconds the status line is sent even if the model is still silent, for proxies that
            do not wait. An error that comes later is in the ``end`` event only. ``None``: when the model has answered.
        headers: Further headers.
        background: What runs when all is sent.

    Raises:
        RequestError: The format, the id or a time is none.
    """

    def __init__(
        self,
        stream: Stream[Any],
        *,
        registry: AbortRegistry | None = None,
        owner: str = "",
        stream_id: str | None = None,
        format: Literal["sse", "ndjson"] = "sse",  # noqa: A002
        heartbeat: float = 15.0,
        head_within: float | None = None,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        if format not in _MEDIA_TYPES:
            raise RequestError(f'format={format!r}: give "sse" or "ndjson"')
        if stream_id is not None and not _ID.fullmatch(stream_id):
            raise RequestError(f"stream_id={stream_id[:130]!r}: {_ID_RULE}")
        for name, seconds in (("heartbeat", heartbeat), ("head_within", head_within)):
            if seconds is not None and not seconds > 0:
                raise RequestError(f"{name}={seconds!r}: give a number of seconds above 0")
        self.stream = stream
        self.registry = registry
        self.owner = owner
        self.stream_id = stream_id
        self.format = format
        self.heartbeat = heartbeat
        self.head_within = head_within
        self.status_code = 200
        self.media_type = _MEDIA_TYPES[format]
        self.background = background
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Cancellation: the stream is closed at once.
        """
        given = self.stream_id or Headers(scope=scope).get(ID_HEADER) or secrets.token_urlsafe(24)
        if _ID.fullmatch(given):
            await _Delivery(self, given, scope, receive, send).run()
        else:
            await _error(400, f"the header {ID_HEADER}: {_ID_RULE}")(scope, receive, send)
        if self.background is not None:
            await self.background()


class _Left(Exception):  # noqa: N818
    """The client is gone, the server says."""


class _Delivery:
    """One response on its way."""

    def __init__(self, response: StreamResponse, stream_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._response = response
        self._stream = response.stream
        self._id = stream_id
        self._scope = scope
        self._receive = receive
        self._asgi_send = send
        self._begun = False
        self._left = False
        # The pulse sends, too.
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def run(self) -> None:
        helpers = [asyncio.create_task(self._watch()), asyncio.create_task(self._pulse())]
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(suppress(_Left))
                registry = self._response.registry
                if registry is not None:
                    token = await stack.enter_async_context(registry.token(self._id, owner=self._response.owner))
                    stack.callback(token.on_abort(self._stream.abort).remove)
                await self._deliver()
        finally:
            for helper in helpers:
                helper.cancel()

    # -- beside the sending --

    async def _watch(self) -> None:
        """Wait for the client to leave, all the time: what is sent to it may be long in coming, or not get away."""
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            # A stream that nobody could stop any more is worse than one that ends early.
            _log.exception("the ASGI server, or a middleware, failed while the client was watched; its stream is ended")
        self._leave()

    async def _pulse(self) -> None:
        """Send something when nothing else is sent."""
        heartbeat, head_within = self._response.heartbeat, self._response.head_within
        with suppress(_Left):
            if head_within is not None:
                await asyncio.sleep(head_within)
                await self._begin()
            pause = heartbeat
            while True:
                await asyncio.sleep(pause)
                pause = self._sent_at + heartbeat - asyncio.get_running_loop().time()
                if pause <= 0:
                    pause = heartbeat
                    # Where something waits to be sent, it is not our silence.
                    if self._begun and not self._sending.locked():
                        await self._send(self._ping())

    def _leave(self) -> None:
        self._left = True
        self._stream.abort(CLIENT_LEFT)

    # -- what is sent --

    async def _deliver(self) -> None:
        error: OllamaError | None = None
        try:
            await self._stream
            await self._begin()
            async for chunk in self._stream:
                await self._send(self._event("chunk", chunk.model_dump_json(exclude_none=True)))
        except OllamaError as exc:
            error = exc
        if self._left:
            await self._say_goodbye()
        elif error is None or self._begun or isinstance(error, AbortError):
            await self._begin()
            await self._send(self._event("end", json.dumps(self._summary(error))), more=False)
        else:
            await self._refuse(error)

    async def _begin(self) -> None:
        async with self._sending:
            if self._begun:
                return
            self._begun = True
            headers = MutableHeaders(raw=list(self._response.raw_headers))
            headers[ID_HEADER] = self._id
            await self._pass({"type": "http.response.start", "status": 200, "headers": headers.raw})
            event = self._event("open", json.dumps({"id": self._id}))
            await self._pass({"type": "http.response.body", "body": event, "more_body": True})

    async def _send(self, event: bytes, *, more: bool = True) -> None:
        async with self._sending:
            await self._pass({"type": "http.response.body", "body": event, "more_body": more})

    async def _pass(self, message: Message) -> None:
        try:
            # It waits while the client is slow. Then the stream is not read, and soon the model's socket is not either.
            await self._asgi_send(message)
        except (OSError, ClientDisconnect) as exc:
            self._leave()
            raise _Left from exc
        self._sent_at = asyncio.get_running_loop().time()

    async def _refuse(self, error: OllamaError) -> None:
        async with self._sending:
            begun, self._begun = self._begun, True
            if not begun:
                await _refusal(error)(self._scope, self._receive, self._pass)
        if begun:
            # By the pulse, in this very moment.
            await self._send(self._event("end", json.dumps(self._summary(error))), more=False)

    async def _say_goodbye(self) -> None:
        """Leave a status to what stands between the client and us: nobody else will see it."""
        if not self._begun:
            await self._pass({"type": "http.response.start", "status": 499, "headers": []})
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    # -- in which form --

    def _event(self, name: str, data: str) -> bytes:
        # JSON has no line breaks of its own, so one "data" line is enough.
        if self._response.format == "sse":
            return f"event: {name}\ndata: {data}\n\n".encode()
        return f'{{"event":"{name}","data":{data}}}\n'.encode()

    def _ping(self) -> bytes:
        return b": ping\n\n" if self._response.format == "sse" else b'{"event":"ping"}\n'

    def _summary(self, error: OllamaError | None) -> dict[str, Any]:
        stream = self._stream
        timing, merged, outcome = stream.timing, stream.response, stream.outcome
        reason = None if outcome == "error" else stream.reason
        return {
            "outcome": outcome,
            "reason": reason if reason is None or isinstance(reason, str) else str(reason),
            "error": None if error is None or isinstance(error, AbortError) else str(error),
            "error_type": None if error is None or isinstance(error, AbortError) else type(error).__name__,
            "text": stream.text,
            "timing": {
                "first_chunk": timing.first_chunk,
                "total": timing.total,
                "chunks": timing.chunks,
                "chunks_per_second": timing.chunks_per_second,
            },
            "response": None if merged is None else merged.model_dump(mode="json", exclude_none=True),
        }


def _refusal(error: OllamaError) -> JSONResponse:
    if isinstance(error, ResponseError):
        status = error.status_code if error.status_code in _PASSED_ON else 502
        wait = error.headers.get("retry-after")
        return _error(status, error.error, {"Retry-After": wait} if wait and status in (429, 503) else None)
    if isinstance(error, PhaseTimeout):
        return _error(504, str(error))
    if isinstance(error, RequestError):
        return _error(400, str(error))
    if isinstance(error, StreamClosed):
        return _error(503, str(error))
    return _error(502, str(error))


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text, "status_code": status}, status, headers)


def stop_route(path: str, registry: AbortRegistry, *, owner: Owner | None = None) -> Route:
    """Make the route ``POST <path>/{id}``, which stops a stream of the registry, for whoever started it.

    The body may be ``{"reason": text}``. The answer is 200 ``{"stopped": true}``, or 404 where the caller has no such
    stream: then the Stop is kept, in case the stream is still on its way here. It is 202 where Redis is away and the
    stream is not in this process; the Stop then goes out when Redis is back.

    Args:
        path: Of the route, without the id.
        registry: The one that the streams are registered in.
        owner: Tells from a request who sent it, with the same answer as was given to ``StreamResponse(owner=)``; it
            may be a coroutine function, and raise ``HTTPException``. Without it everybody who knows an id may stop it.
    """

    async def stop(request: Request) -> Response:
        who = "" if owner is None else owner(request)
        if not isinstance(who, str):
            who = await who
        try:
            reason = await _reason(request)
            # One that no stream can have is unknown like any other.
            stream_id = request.path_params["id"]
            stopped = await registry.abort(stream_id, reason, owner=who) if _ID.fullmatch(stream_id) else "kept"
        except RequestError as exc:
            return _error(400, str(exc))
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
        raise RequestError('the body of a Stop is empty or {"reason": text}')
    return cast("dict[str, Any]", given).get("reason")
