"""Proxies: what ``DirectTransport`` has to know of an HTTP proxy, and httpx's transport for any other."""

from __future__ import annotations

import asyncio
import base64
import weakref
from typing import TYPE_CHECKING

import httpx

from ollama_async._errors import RequestError
from ollama_async._loops import in_loop
from ollama_async._secret import Secret

from .http1 import HttpProxy, Origin

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .tls import TlsOptions

_SCHEMES = ("http://", "https://", "socks5://", "socks5h://")


def http_proxy(given: str | httpx.Proxy) -> HttpProxy | None:
    """Return a proxy that takes plain HTTP, in the form that ``DirectTransport`` uses; ``None`` for any other.

    Raises:
        RequestError: The proxy is invalid. The text does not show its password.
    """
    proxy, flaw = _read(Secret(given))
    del given
    if flaw:
        raise RequestError(f"the proxy cannot be used: {flaw}")
    return proxy


def _read(given: Secret[str | httpx.Proxy]) -> tuple[HttpProxy | None, str]:
    """Return the proxy, or what is wrong with it."""
    # httpx's texts are not shown, since they may contain the password: of a URL without a scheme it takes the user for
    # the scheme and shows the rest. Only our own text about the origin is shown.
    try:
        proxy = given.value if isinstance(given.value, httpx.Proxy) else httpx.Proxy(given.value)
        if proxy.url.port == 0:
            # httpx would take it for none, and dial the port of the scheme.
            return None, "its URL has the port 0, which is not from 1 to 65535"
        if proxy.url.scheme != "http":
            return None, ""
        headers = list(proxy.headers.raw)
        if proxy.raw_auth is not None:
            headers.append((b"Proxy-Authorization", b"Basic " + base64.b64encode(b":".join(proxy.raw_auth))))
        return HttpProxy(Origin.of(proxy.url), tuple(headers)), ""
    except httpx.InvalidURL:
        return None, "its URL cannot be read; write a '/' in a password as %2F"
    except UnicodeEncodeError:
        return None, "its user or password cannot be encoded"
    except ValueError:
        return None, f"its URL does not begin with one of {', '.join(_SCHEMES)}"
    except (TypeError, AttributeError):
        return None, f"proxy={type(given.value).__name__}: give a URL as str, or an httpx.Proxy"
    except httpx.UnsupportedProtocol as exc:
        return None, str(exc)


# httpx's own limit of 100 connections would make the 101st stream wait for the end of another one.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class ProxyTransport(httpx.AsyncBaseTransport):
    """Sends requests through a proxy that speaks TLS or SOCKS; usable in several event loops, in turn or at once.

    A pool of httpx belongs to the loop in which it was first used; in another loop it raises an error of asyncio.
    """

    def __init__(self, proxy: str | httpx.Proxy, *, tls: TlsOptions) -> None:
        self._proxy = Secret(proxy)
        del proxy
        self._context = tls.context()
        try:
            # The first pool is made now, so that an error in the options is raised before anything is sent.
            self._spare: httpx.AsyncHTTPTransport | None = self._make()
        except (ImportError, ValueError) as exc:
            flaw = str(exc)
        else:
            flaw = ""
        if flaw:
            # Raised outside of the handler: httpx's frames in that traceback hold the proxy's password.
            raise RequestError(f"the proxy cannot be used: {flaw}")
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = weakref.WeakKeyDictionary()

    def _make(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(proxy=self._proxy.value, verify=self._context, limits=_LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Cancellation: as in httpx.
        """
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            spare, self._spare = self._spare, None
            pool = self._pools[loop] = _Pool(spare or self._make())
            await anext(pool.guard)
        return await pool.http.handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections, of every event loop.

        Cancellation: as in httpx.
        """
        here = asyncio.get_running_loop()
        # keyrefs() is one step; other threads change the dict while it is walked.
        for reference in self._pools.keyrefs():
            loop = reference()
            pool = None if loop is None else self._pools.pop(loop, None)
            if pool is None or loop is None:
                continue
            if loop is here:
                await pool.guard.aclose()
            else:
                in_loop(loop, _close_soon, pool, loop)


def _close_soon(pool: _Pool, loop: asyncio.AbstractEventLoop) -> None:
    pool.closing = loop.create_task(pool.http.aclose())


class _Pool:
    """The connections of one event loop, closed when that loop shuts down."""

    def __init__(self, http: httpx.AsyncHTTPTransport) -> None:
        self.http = http
        # A loop holds its tasks only weakly.
        self.closing: asyncio.Task[None] | None = None
        # asyncio.run() finishes the loop's async generators before it closes the loop.
        self.guard = _open_until_the_end(http)


async def _open_until_the_end(http: httpx.AsyncHTTPTransport) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await http.aclose()
