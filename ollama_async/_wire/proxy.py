"""Proxies: what ``DirectTransport`` has to know of one of HTTP, and a transport through any other, which is httpx's."""

from __future__ import annotations

import asyncio
import base64
import weakref
from typing import TYPE_CHECKING

import httpx

from ollama_async._cancel import in_loop
from ollama_async._errors import RequestError
from ollama_async._secret import Secret

from .http1 import HttpProxy, Origin

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .tls import TlsOptions

_SCHEMES = ("http://", "https://", "socks5://", "socks5h://")


def http_proxy(given: str | httpx.Proxy) -> HttpProxy | None:
    """Return a proxy that is spoken to in plain HTTP, as ``DirectTransport`` takes it; ``None`` for any other.

    Raises:
        RequestError: It is not a proxy. The text does not show its password.
    """
    proxy, flaw = _read(Secret(given))
    del given
    if flaw:
        raise RequestError(f"the proxy cannot be used: {flaw}")
    return proxy


def _read(given: Secret[str | httpx.Proxy]) -> tuple[HttpProxy | None, str]:
    """Return a proxy, or what is wrong with it."""
    # Nothing of what httpx says is shown but of a URL without a host: it may have the password in it. Of one without a
    # scheme it takes the user for that, and shows the rest.
    try:
        proxy = given.value if isinstance(given.value, httpx.Proxy) else httpx.Proxy(given.value)
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
        return None, f"its URL begins with none of {', '.join(_SCHEMES)}"
    except (TypeError, AttributeError):
        return None, f"proxy={type(given.value).__name__}: give a URL as str, or an httpx.Proxy"
    except httpx.UnsupportedProtocol as exc:
        return None, str(exc)


# httpx's own limit of 100 connections would make the 101st stream wait for the end of another one.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class ProxyTransport(httpx.AsyncBaseTransport):
    """Sends requests through a proxy that speaks TLS or SOCKS; usable in several event loops, in turn or at once.

    A pool of httpx belongs to the loop that it was first used in, and says so by an error of asyncio's in the next.
    """

    def __init__(self, proxy: str | httpx.Proxy, *, tls: TlsOptions) -> None:
        self._proxy = Secret(proxy)
        del proxy
        self._context = tls.context()
        try:
            # The first pool, and so an error in the options, is made before anything is sent.
            self._spare: httpx.AsyncHTTPTransport | None = self._make()
        except (ImportError, ValueError) as exc:
            flaw = str(exc)
        else:
            flaw = ""
        if flaw:
            # Raised out here: frames of httpx, on the way of that error, have the proxy's password.
            raise RequestError(f"the proxy cannot be used: {flaw}")
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = weakref.WeakKeyDictionary()

    def _make(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(proxy=self._proxy.value, verify=self._context, limits=_LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Cancellation: as httpx has it.
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

        Cancellation: as httpx has it.
        """
        here = asyncio.get_running_loop()
        # keyrefs() is one step; a walk would meet what other threads add and take away.
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
        # A loop holds its tasks weakly.
        self.closing: asyncio.Task[None] | None = None
        # asyncio.run() finishes the loop's async generators before it closes the loop.
        self.guard = _open_until_the_end(http)


async def _open_until_the_end(http: httpx.AsyncHTTPTransport) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await http.aclose()
