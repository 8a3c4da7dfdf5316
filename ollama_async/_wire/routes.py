"""``EnvironmentTransport``: sends each request directly or through the proxy that the environment names for its URL."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._errors import RequestError
from ollama_async._secret import Secret

from .proxy import ProxyTransport, http_proxy
from .transport import DirectTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from .tls import TlsOptions


def transport_through(proxy: Secret[Any], tls: TlsOptions, **options: Any) -> httpx.AsyncBaseTransport:
    """Return a transport through a proxy of any scheme, or without one.

    Args:
        proxy: URL of the proxy, an ``httpx.Proxy``, or ``None``.
        tls: How certificates are checked.
        **options: Further options of ``DirectTransport``.

    Raises:
        RequestError: The proxy is invalid.
    """
    if proxy.value is not None and http_proxy(proxy.value) is None:
        return ProxyTransport(proxy.value, tls=tls)
    return DirectTransport(
        verify=tls.verify, cert=tls.cert.value, trust_env=tls.trust_env, proxy=proxy.value, **options
    )


def is_direct(proxy: str) -> bool:
    """Whether ``DirectTransport`` speaks to a proxy; also if it is invalid, which is said when it is used."""
    try:
        return http_proxy(proxy) is not None
    except RequestError:
        return True


class EnvironmentTransport(httpx.AsyncBaseTransport):
    """A transport for each proxy that the environment names, and one without.

    A client asks other servers than its own: ollama.com for a web search, and whatever a redirect leads to.

    Args:
        choose: Returns the proxy for a URL, ``None`` for none.
        tls: How certificates are checked.
        options: Further options of ``DirectTransport``.
    """

    def __init__(self, choose: Callable[[httpx.URL], str | None], tls: TlsOptions, options: dict[str, Any]) -> None:
        self._choose = choose
        self._tls = tls
        self._options = options
        self._transports: dict[Secret[str | None], httpx.AsyncBaseTransport] = {}
        # Several loops, each in a thread, may need the first one at once; nothing waits while it is held.
        self._making = threading.Lock()

    def for_url(self, url: httpx.URL) -> httpx.AsyncBaseTransport:
        """Return the transport for a URL; raises ``RequestError`` if its proxy is invalid."""
        proxy = Secret(self._choose(url))
        with self._making:
            for known, transport in self._transports.items():
                if known.value == proxy.value:
                    return transport
            made = self._transports[proxy] = transport_through(proxy, self._tls, **self._options)
            return made

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Cancellation: as in the transport that is chosen.
        """
        return await self.for_url(request.url).handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections.

        Cancellation: as in the transports.
        """
        for transport in list(self._transports.values()):
            await transport.aclose()
