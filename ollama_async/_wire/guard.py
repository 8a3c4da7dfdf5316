"""The last word over httpx: what of a request crosses to another origin, and how much of a body httpx may hold."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, cast

import httpx

from .http1 import Origin

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    # Of which it is a part; httpx2's is alike.
    _Client = httpx.AsyncClient
else:
    _Client = object

# An answer that is no stream is held as a whole. 1,000 embeddings of 4,096 numbers are about 50 MB of JSON.
MAX_BODY_BYTES = 512 * 1024 * 1024

# The body of a redirect, of a challenge, of an error: a page at most.
MAX_PAGE_BYTES = 1024 * 1024

# Under this name a redirected request says in its extensions where the first one went.
_HOME = "ollama_async.home"

# Under this name a request to another server than the client's says what it is to have, and nobody else adds to that.
ABROAD = "ollama_async.abroad"

# What httpx reads by itself: answers that lead to another request.
LEADS_ON = {301, 302, 303, 307, 308, 401}

# What another origin may see, however it is redirected to: nothing that a key could be in, whatever that is called.
_CROSSES = {
    "host", "accept", "accept-encoding", "content-type", "content-length", "transfer-encoding", "user-agent",
}  # fmt: skip

_USERINFO = re.compile(r"//[^/?#]*@")


class _Guard(_Client):
    """A layer on an httpx client, of httpx or of httpx2, below everything that writes headers and reads bodies.

    Cookies come from the jar after the headers of a redirect are made, auth flows and event hooks write later still,
    and each of them may read an answer. They all end in ``_send_single_request``.
    """

    def _redirect_method(self, request: Any, response: Any) -> Any:
        # Browsers make a GET of a POST that is moved (301, 302), and httpx does as they do. A call of an API is made
        # again as it was.
        if response.status_code in (301, 302):
            return request.method
        return super()._redirect_method(request, response)

    def _build_redirect_request(self, request: Any, response: Any) -> Any:
        try:
            # The rules of httpx, which fails in many ways with what a server may write there.
            made = super()._build_redirect_request(request, response)
            here, there = Origin.of(request.url), Origin.of(made.url)
            # Some transports ask for it as text, which is none if its label cannot be decoded.
            _ = made.url.host
        except Exception as exc:
            why = str(exc) if isinstance(exc, httpx.UnsupportedProtocol) else type(exc).__name__
        else:
            if here.scheme == "https" and there.scheme == "http":
                raise httpx.RemoteProtocolError(f"the server redirects from https to plain http, to {there}")
            if made.method != request.method:
                raise httpx.RemoteProtocolError(
                    f"the server redirects {request.method} {request.url.path} to a GET of {there} "
                    f"(status {response.status_code}), which is not the same call"
                )
            made.extensions = {**made.extensions, _HOME: request.extensions.get(_HOME, here)}
            return made
        where = _USERINFO.sub("//", response.headers.get("location", ""))[:100]
        raise httpx.RemoteProtocolError(f"the server redirects to {where!r}, where nothing can be asked: {why}")

    def _build_request_auth(self, request: Any, auth: Any = httpx.USE_CLIENT_DEFAULT) -> Any:
        # The default is of another class in httpx2, and means the same.
        given = () if auth is httpx.USE_CLIENT_DEFAULT else (auth,)
        if ABROAD in request.extensions:
            # The client's credentials are for its own server.
            given = (None,)
        made = super()._build_request_auth(request, *given)
        kind = type(made)
        theirs = kind.__name__ == "DigestAuth" and kind.__module__.partition(".")[0] in ("httpx", "httpx2")
        return _Digest(made) if theirs else made

    async def _send_single_request(self, request: Any) -> Any:
        home, abroad = request.extensions.get(_HOME), request.extensions.get(ABROAD)
        there = Origin.of(request.url)
        strange = home is not None and not _at_home(home, there)
        if strange or abroad is not None:
            for name in {name.lower() for name in request.headers} - _CROSSES:
                del request.headers[name]
        if abroad is not None and not strange:
            request.headers.update(abroad.value)
        response = await super()._send_single_request(request)
        response.stream = limited(response.stream, response.status_code, response.headers.get("content-encoding"))
        return response

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **options)
        if options.get("stream"):
            # Its reader is this library from here on, which has limits for each kind of answer.
            response.stream = getattr(response.stream, "unlimited", response.stream)
        return response


class HttpClient(_Guard, httpx.AsyncClient):
    """httpx's client, guarded."""


def guarded(client: Any) -> Any:
    """Return a client that does as the given one, with the same state, and is guarded.

    The given one stays as it is for whoever else uses it. What is no client of httpx's making is returned itself.
    """
    kind = cast("Any", type(client))
    if not hasattr(kind, "_send_single_request"):
        return client
    view = cast("Any", object.__new__(_guarded_kind(kind)))
    view.__dict__ = client.__dict__
    return view


@lru_cache(16)
def _guarded_kind(kind: type) -> type:
    # One that closes itself when it is dropped must not do so for this one.
    return type(kind.__name__, (_Guard, kind), {"__del__": _nothing} if hasattr(kind, "__del__") else {})


def _nothing(_: object) -> None:
    return


def _at_home(home: Origin, there: Origin) -> bool:
    # The step up to TLS on the same host is what such a redirect is mostly for.
    return home == there or (home, there) == (("http", there.host, 80), ("https", home.host, 443))


class _Digest:
    """httpx's flow of Digest, which fails in many ways with what a server may ask for."""

    def __init__(self, auth: Any) -> None:
        self._auth = auth

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        flow = self._auth.async_auth_flow(request)
        try:
            wanted = await anext(flow)
            while True:
                response = yield wanted
                try:
                    wanted = await flow.asend(response)
                except StopAsyncIteration:
                    return
                except Exception as exc:
                    kind = type(exc).__name__
                else:
                    continue
                # Out here: frames of httpx, on the way of that error, have the password.
                raise httpx.RemoteProtocolError(f"the server asks for credentials in no way that is known: {kind}")
        finally:
            await flow.aclose()


class _Limited:
    """A body up to a limit, and one that is not packed: what it would be unpacked, nobody knows before."""

    def __init__(self, stream: Any, status: int, encoding: str | None) -> None:
        self.unlimited = stream
        self._limit = MAX_BODY_BYTES if status < 300 else MAX_PAGE_BYTES
        self._encoding = None if encoding in (None, "", "identity") else encoding
        self._leads_on = status in LEADS_ON

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding is not None:
            if self._leads_on:
                # Nobody needs its body: whoever reads it finds it empty.
                return
            raise httpx.RemoteProtocolError(f"the answer is encoded as {self._encoding!r}, which was not asked for")
        left = self._limit
        blocks = aiter(self.unlimited)
        try:
            async for block in blocks:
                left -= len(block)
                if left < 0:
                    raise httpx.RemoteProtocolError(f"the body of the server's answer is over {self._limit:,} bytes")
                yield block
        finally:
            close = getattr(blocks, "aclose", None)
            if close is not None:
                await close()

    async def aclose(self) -> None:
        await self.unlimited.aclose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unlimited, name)


def limited(stream: Any, status: int, encoding: str | None) -> Any:
    """Return a body of httpx or httpx2 that is an error beyond what an answer with that status may have."""
    return like_stream(_Limited, stream)(stream, status, encoding)


def like_stream(kind: type, stream: Any) -> Any:
    """Return a class that is ``kind`` and of a stream's family: httpx and httpx2 take only streams of their own."""
    ancestors = cast("Any", type(stream)).__mro__
    return _in_family(kind, next((each for each in ancestors if each.__name__ == "AsyncByteStream"), object))


@cache
def _in_family(kind: type, family: type) -> type:
    return type(kind.__name__.strip("_"), (kind, family), {})
