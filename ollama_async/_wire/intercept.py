"""Mocks and instrumentation of httpx and httpx2: whether there are any, and how a request of ours passes through them.

respx, pytest-httpx, OpenTelemetry and Sentry replace methods of httpx or httpcore. A request that takes the quick way
past httpx would not meet them: then a test reaches the real server, and a trace has a gap.
"""

from __future__ import annotations

import importlib
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType

# What each of the two rests on.
_CORES = {"httpx": "httpcore", "httpx2": "httpcore2"}

# The methods that a request passes on its way through httpx, from the outside to the inside, when none of them was
# replaced: each request looks there, which is a quarter of what it takes to ask what kind of function they are.
_untouched: tuple[object, object, object] = (None, None, None)


def is_intercepted() -> bool:
    """Whether somebody has replaced a method of httpx or httpcore that a request passes on its way."""
    global _untouched
    client, transport = httpx.AsyncClient, httpx.AsyncHTTPTransport
    send, for_url, handle = _untouched
    if not (
        client.send is send
        and client._transport_for_url is for_url  # noqa: SLF001  (httpx has no other name for it)
        and transport.handle_async_request is handle
    ):
        seams = ((client, "send"), (client, "_transport_for_url"), (transport, "handle_async_request"))
        if not all(_is_untouched(*seam) for seam in seams):
            return True
        _untouched = client.send, client._transport_for_url, transport.handle_async_request  # noqa: SLF001  (as above)
    return _core_is_intercepted()


def transport_is_intercepted(package: ModuleType = httpx) -> bool:
    """Whether a method below the client has been replaced: of the transport of httpx or httpx2, or of its core."""
    return not _is_untouched(package.AsyncHTTPTransport, "handle_async_request") or _core_is_intercepted(package)


def _core_is_intercepted(package: ModuleType = httpx) -> bool:
    # httpx imports it when the first of its transports is made; until then nobody can have replaced anything.
    core = sys.modules.get(_CORES[package.__name__])
    # Not yet there while another thread imports it.
    pool = getattr(core, "AsyncConnectionPool", None)
    return pool is not None and not _is_untouched(pool, "handle_async_request")


# The methods that have been found untouched, so that the next look costs next to nothing.
_originals: dict[tuple[type, str], object] = {}


def _is_untouched(owner: Any, name: str) -> bool:
    method = getattr(owner, name)
    if method is _originals.get((owner, name)):
        return True
    # A wrapper is another kind of object (wrapt, mock), comes from another module, or says what it wraps.
    untouched = (
        type(method) is FunctionType
        and method.__module__.partition(".")[0] in (*_CORES, *_CORES.values())
        and not hasattr(method, "__wrapped__")
    )
    if untouched:
        _originals[owner, name] = method
    return untouched


async def through_httpx(package: ModuleType, request: Any, send: Callable[[Any], Awaitable[Any]]) -> Any:
    """Pass a request through the package's transport and its core's pool, as they have been replaced; then send it.

    Args:
        package: httpx or httpx2.
        request: The request.
        send: Sends it, if the replaced methods call what they replaced.
    """
    transport = object.__new__(package.AsyncHTTPTransport)
    transport._pool = _Pool(package, send)
    return await package.AsyncHTTPTransport.handle_async_request(transport, request)


class _Pool:
    """Stands for httpcore's pool, below httpx's transport."""

    def __init__(self, package: ModuleType, send: Callable[[Any], Awaitable[Any]]) -> None:
        self._package = package
        self._send = send

    async def handle_async_request(self, request: Any) -> Any:
        core: Any = importlib.import_module(_CORES[self._package.__name__])
        if _core_is_intercepted(self._package):
            # What the mock does not know goes through this one, which keeps no connection.
            return await core.AsyncConnectionPool(max_keepalive_connections=0).handle_async_request(request)
        url = request.url
        port = "" if url.port is None else f":{url.port}"
        target = f"{url.scheme.decode()}://{url.host.decode()}{port}{url.target.decode()}"
        response = await self._send(
            self._package.Request(
                request.method.decode(),
                target,
                headers=request.headers,
                stream=request.stream,
                extensions=request.extensions,
            )
        )
        return core.Response(
            response.status_code,
            headers=response.headers.raw,
            content=response.stream,
            extensions=response.extensions,
        )
