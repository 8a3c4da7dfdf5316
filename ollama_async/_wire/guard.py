"""Limits on httpx: what a request may carry to another origin, and how much of a body httpx may hold."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import httpx

from .family import as_error_of, mixed, package_of
from .http1 import Origin

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    # The class it is mixed into; that of httpx2 is alike.
    _Client = httpx.AsyncClient
else:
    _Client = object

# A non-streaming answer is held as a whole. 1,000 embeddings of 4,096 numbers are about 50 MB of JSON.
MAX_BODY_BYTES = 512 * 1024 * 1024

# The body of a redirect, a challenge or an error is at most a page.
MAX_PAGE_BYTES = 1024 * 1024

# Under this name, the extensions of a redirected request have the origin of the first request.
_HOME = "ollama_async.home"

# Under this name, the extensions of a request to another server than the client's have all headers it may carry.
ABROAD = "ollama_async.abroad"

# httpx reads these answers itself: they lead to another request.
LEADS_ON = {301, 302, 303, 307, 308, 401}

# The headers that another origin may see after a redirect. A header of any other name could contain a key.
_CROSSES = {
    "host", "accept", "accept-encoding", "content-type", "content-length", "transfer-encoding", "user-agent",
}  # fmt: skip

_USERINFO = re.compile(r"//[^/?#]*@")


class _Guard(_Client):
    """A layer on a client of httpx or httpx2, below everything that writes headers and reads bodies.

    httpx adds cookies after it has made the headers of a redirect; auth flows and event hooks write even later, and
    each of them may read an answer. All of them end in ``_send_single_request``.
    """

    def _redirect_method(self, request: Any, response: Any) -> Any:
        # Browsers make a GET of a POST that is moved (301, 302), and httpx does as they do. A call of an API is made
        # again as it was.
        if response.status_code in (301, 302):
            return request.method
        return super()._redirect_method(request, response)

    def _build_redirect_request(self, request: Any, response: Any) -> Any:
        try:
            # httpx's rules; they raise many kinds of errors for what a server may send here.
            made = super()._build_redirect_request(request, response)
            here, there = Origin.of(request.url), Origin.of(made.url)
            # Some transports ask for the host as text, which fails if a label cannot be decoded.
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
        raise httpx.RemoteProtocolError(f"the server redirects to {where!r}, which is not a usable URL: {why}")

    def _build_request_auth(self, request: Any, auth: Any = httpx.USE_CLIENT_DEFAULT) -> Any:
        # The default has another class in httpx2, and means the same.
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
            # From here on this library reads it, with limits for each kind of answer.
            response.stream = getattr(response.stream, "unlimited", response.stream)
        return response


class HttpClient(_Guard, httpx.AsyncClient):
    """An ``httpx.AsyncClient`` with this guard."""


def guarded(client: Any) -> Any:
    """Return a guarded client that shares the state of the given one.

    The given client stays as it is for its other users. An object that is not an httpx client is returned unchanged.
    """
    kind = cast("Any", type(client))
    if not hasattr(kind, "_send_single_request"):
        return client
    view = cast("Any", object.__new__(_guarded_kind(kind)))
    view.__dict__ = client.__dict__
    return view


@lru_cache(16)
def _guarded_kind(kind: type) -> type:
    # A client whose __del__ closes it must not be closed when this view of it is dropped.
    return type(kind.__name__, (_Guard, kind), {"__del__": _nothing} if hasattr(kind, "__del__") else {})


def _nothing(_: object) -> None:
    return


def _at_home(home: Origin, there: Origin) -> bool:
    # A redirect from http to https on the same host stays at home.
    return home == there or (home, there) == (("http", there.host, 80), ("https", home.host, 443))


class _Digest:
    """httpx's Digest flow, which raises many kinds of errors for what a server may ask."""

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
                # Raised outside of the handler: httpx's frames in that traceback hold the password.
                raise httpx.RemoteProtocolError(f"the server asks for credentials in an unknown way: {kind}")
        finally:
            await flow.aclose()


class _Limited:
    """A body with a limit, and without compression: its decompressed size cannot be known in advance."""

    def __init__(self, stream: Any, status: int, encoding: str | None) -> None:
        self.unlimited = stream
        self._limit = MAX_BODY_BYTES if status < 300 else MAX_PAGE_BYTES
        self._encoding = None if encoding in (None, "", "identity") else encoding
        self._leads_on = status in LEADS_ON

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding is not None:
            if self._leads_on:
                # Its body is not needed: a reader finds it empty.
                return
            raise self._error(f"the answer is encoded as {self._encoding!r}, which was not asked for")
        left = self._limit
        blocks = aiter(self.unlimited)
        try:
            async for block in blocks:
                left -= len(block)
                if left < 0:
                    raise self._error(f"the body of the server's answer is over {self._limit:,} bytes")
                yield block
        finally:
            close = getattr(blocks, "aclose", None)
            if close is not None:
                await close()

    def _error(self, text: str) -> BaseException:
        return as_error_of(package_of(self.unlimited, "AsyncByteStream"), httpx.RemoteProtocolError(text))

    async def aclose(self) -> None:
        await self.unlimited.aclose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unlimited, name)


def limited(stream: Any, status: int, encoding: str | None) -> Any:
    """Return a body of httpx or httpx2 that raises beyond the limit of answers with that status."""
    return like_stream(_Limited, stream)(stream, status, encoding)


def like_stream(kind: type, stream: Any) -> Any:
    """Return a subclass of ``kind`` in a stream's family: httpx and httpx2 take only their own kind of streams."""
    ancestors = cast("Any", type(stream)).__mro__
    return mixed(kind, next((each for each in ancestors if each.__name__ == "AsyncByteStream"), object))
