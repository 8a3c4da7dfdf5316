"""A request: as bytes where only our code is on its way, else as an httpx request."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._secret import Secret
from ollama_async._wire.guard import ABROAD
from ollama_async._wire.http1 import EncodedRequest, Origin, encode_head

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ollama_async._wire.transport import DirectTransport

# More than there are endpoints; the other URLs have digests, and each is used once.
_HEADS = 64


class Request:
    """A request, in the form in which it is sent.

    Attributes:
        encoded: Its bytes, if it needs nothing of httpx; else None.
    """

    __slots__ = ("_http", "_make", "encoded")

    def __init__(
        self,
        make: Callable[[], httpx.Request],
        outgoing: EncodedRequest | None = None,
        http: httpx.Request | None = None,
    ) -> None:
        # None once it has been sent for the last time.
        self._make: Callable[[], httpx.Request] | None = make
        self._http = http
        self.encoded = outgoing

    @property
    def http(self) -> httpx.Request:
        """The same as an httpx request."""
        if self._http is None:
            assert self._make is not None
            self._http = self._make()
        return self._http

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """Add headers that its maker did not know of; none of them if the caller has given one of them itself.

        Together they are one thing, such as the context of a trace, which must not be mixed with another one.
        """
        make = self._make

        def make_with_headers() -> httpx.Request:
            assert make is not None
            made = make()
            if not any(name in made.headers for name in headers):
                made.headers.update(headers)
            return made

        self._make = make_with_headers
        if self._http is not None:
            self._http = make_with_headers()
        if self.encoded is not None:
            head = self.encoded.data.partition(b"\r\n\r\n")[0].lower()
            if any(f"\r\n{name.lower()}:".encode("ascii") in head for name in headers):
                return
            line, end, rest = self.encoded.data.partition(b"\r\n")
            added = b"".join(f"{name}: {value}\r\n".encode("ascii") for name, value in headers.items())
            self.encoded.data = line + end + added + rest

    def discard(self, *, for_good: bool) -> None:
        """Drop the extensions that were added to the httpx request; with ``for_good``, drop the whole request.

        A stream that is open for minutes does not keep what it has sent, unless it may be sent again.
        """
        if self._http is not None:
            kept = self._http.extensions.get(ABROAD)
            self._http.extensions = {} if kept is None else {ABROAD: kept}
        if for_good:
            self._make = None
            self._http = self.encoded = None


class RequestWriter:
    """Writes the requests of a client.

    httpx takes longer to make and send a request than everything else in a short call together. What it adds to the
    request of a client without cookies is always the same. So httpx makes the head once for each endpoint.

    Args:
        client: The httpx client.
        headers: The headers of all requests.
        transport: The ``DirectTransport`` under the client, if nothing is between them; else None.
    """

    def __init__(self, client: Any, headers: Secret[httpx.Headers], transport: DirectTransport | None) -> None:
        self._client = client
        self._headers = headers
        self._direct = transport is not None
        proxy = None if transport is None else transport.proxy

        # Not a method: the cache would hold this object, and this object the cache.
        @lru_cache(_HEADS)
        def head_of(method: str, url: str, has_body: bool) -> tuple[Origin, Secret[bytes]] | None:
            request = client.build_request(method, url, content=b"{}" if has_body else None, headers=headers.value)
            if has_body:
                del request.headers["content-length"]
            try:
                return Origin.of(request.url), Secret(encode_head(request, proxy).removesuffix(b"\r\n"))
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol):
                # This raises again when the request is sent, like every error of a request.
                return None

        self._head_of = head_of

    def write_abroad(self, method: str, url: str, content: Any, headers: Secret[httpx.Headers]) -> Request:
        """Write a request to another server than the client's, without the client's headers, cookies and parameters.

        Args:
            method: The method.
            url: The URL.
            content: The body, in a form that httpx takes.
            headers: All headers of the request.
        """

        def make() -> httpx.Request:
            return httpx.Request(method, url, content=content, headers=headers.value, extensions={ABROAD: headers})

        return Request(make, http=make())

    def write(self, method: str, url: str, content: Any, headers: Secret[httpx.Headers] | None) -> Request:
        """Write a request.

        Args:
            method: The method.
            url: The URL.
            content: The body, in a form that httpx takes.
            headers: Headers in place of the client's; ``None`` for the client's.
        """

        def make() -> httpx.Request:
            given = self._headers if headers is None else headers
            made: httpx.Request = self._client.build_request(method, url, content=content, headers=given.value)
            return made

        plain = self._direct and headers is None and (content is None or type(content) is bytes)
        head = self._head_of(method, url, content is not None) if plain and not self._has_cookies() else None
        if head is None:
            return Request(make, http=make())
        end = b"\r\n" if content is None else b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
        return Request(make, EncodedRequest(method, head[0], head[1].value + end))

    def _has_cookies(self) -> bool:
        cookies = self._client.cookies
        # A jar that never had one has nothing in there; whether another one has one left takes four times as long.
        return bool(getattr(cookies.jar, "_cookies", True)) and bool(cookies)
