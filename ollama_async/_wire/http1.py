"""HTTP/1.1 as text: where a request goes, and how its head is written."""

from __future__ import annotations

import re
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from ollama_async._secret import Secret

from .family import package_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Iterable

# The most that the head of an answer may have, its lines and numbers included.
MAX_HEAD_BYTES = 64 * 1024

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NOT_IN_VALUE = re.compile(rb"[\x00\r\n]")
_NOT_IN_TARGET = re.compile(rb"[\x00-\x20\x7f]")

_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Where a connection goes."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Origin:
        """Return the origin of a URL.

        Raises:
            httpx.UnsupportedProtocol: The URL has no host, or a scheme or port that cannot be connected to.
        """
        if url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol(f"the URL has the scheme {url.scheme!r}, not http or https")
        # Not url.host, which decodes the name, and fails if the name cannot be decoded.
        if not url.raw_host:
            raise httpx.UnsupportedProtocol("the URL has no host")
        port = _PORTS[url.scheme] if url.port is None else url.port
        if not 0 < port < 65536:
            raise httpx.UnsupportedProtocol(f"the URL has the port {str(port)[:20]}, which is not from 1 to 65535")
        return cls(url.scheme, url.raw_host.decode("ascii"), port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class HttpProxy(NamedTuple):
    """A proxy that is spoken to in plain HTTP.

    Attributes:
        origin: The proxy's address.
        headers: Headers for the proxy alone, such as credentials.
    """

    origin: Origin
    headers: tuple[tuple[bytes, bytes], ...]

    def extra_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the proxy's headers, without those that a request has itself: a second ``Host`` is a bad request."""
        names = {name.lower() for name, _ in headers}
        return [pair for pair in self.headers if pair[0].lower() not in names]

    def __repr__(self) -> str:
        # Without the headers: they may have a password.
        return f"<HttpProxy {self.origin}>"


def encode_head(request: httpx.Request, proxy: HttpProxy | None = None) -> bytes:
    """Write the head of a request.

    Args:
        request: The request.
        proxy: The proxy that the request goes through. Over TLS the proxy does not see the request: it goes through a
            tunnel.

    Raises:
        httpx.LocalProtocolError: A method, target or header would break out of its place.
    """
    method = request.method.encode("ascii", "replace")
    target = request.url.raw_path
    if not _TOKEN.fullmatch(method):
        raise httpx.LocalProtocolError(f"illegal method {request.method!r}", request=request)
    if _NOT_IN_TARGET.search(target):
        raise httpx.LocalProtocolError("illegal character in the path of the URL", request=request)
    headers = Secret(request.headers.raw)
    if proxy is not None and request.url.scheme == "http":
        target = b"http://%b%b" % (request.url.netloc, target)
        headers = Secret([*headers.value, *proxy.extra_headers(headers.value)])
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, encode_headers(headers))


def encode_headers(headers: Secret[list[tuple[bytes, bytes]]]) -> bytes:
    """Write header lines; raises ``httpx.LocalProtocolError``."""
    flaw = next(filter(None, starmap(header_flaw, headers.value)), None)
    if flaw is not None:
        raise httpx.LocalProtocolError(flaw)
    return b"".join([b"%b: %b\r\n" % header for header in headers.value])


def header_flaw(name: bytes, value: bytes) -> str | None:
    """Return what in a header would break out of its place; ``None`` if nothing would."""
    if not _TOKEN.fullmatch(name):
        return f"illegal header name {name!r}"
    if _NOT_IN_VALUE.search(value):
        # The value is not shown: it may be a key.
        return f"illegal character in the value of header {name!r}"
    return None


class EncodedRequest:
    """A request as it goes over the wire; what cannot go is refused here, before there is a connection.

    Attributes:
        method: The request's.
        origin: Where it goes.
        data: The head, and the body if it is bytes.
        blocks: The body otherwise.
        length: Bytes that ``blocks`` must have in all, ``None`` if they are sent in chunks.
    """

    __slots__ = ("blocks", "data", "length", "method", "origin")

    def __init__(self, method: str, origin: Origin, data: bytes) -> None:
        self.method: str = method
        self.origin: Origin = origin
        self.data: bytes = data
        self.blocks: AsyncIterable[bytes] | None = None
        self.length: int | None = None

    @classmethod
    def of(cls, request: httpx.Request, proxy: HttpProxy | None) -> EncodedRequest:
        """Make it of a request of httpx or httpx2; raises an ``httpx.TransportError`` for one that cannot be sent."""
        made = cls(request.method, Origin.of(request.url), encode_head(request, proxy))
        made.length = _body_length(request)
        # Any: the classes of httpx2 are of no type known here.
        package: Any = package_of(request, "Request")
        stream: Any = request.stream
        if isinstance(stream, package.ByteStream):
            body = b"".join(stream)
            if made.length is None:
                raise httpx.LocalProtocolError("the request has a Transfer-Encoding, but its body is bytes")
            if made.length != len(body):
                raise httpx.LocalProtocolError(WRONG_LENGTH)
            made.data += body
        else:
            made.blocks = stream if isinstance(stream, package.AsyncByteStream) else _as_async(stream)
        return made


def _body_length(request: httpx.Request) -> int | None:
    if "transfer-encoding" in request.headers:
        if "content-length" in request.headers:
            raise httpx.LocalProtocolError("the request has a Content-Length and a Transfer-Encoding")
        return None
    length: str = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise httpx.LocalProtocolError(f"the request has an invalid Content-Length, {length!r}: give a number")
    return int(length)


async def _as_async(stream: httpx.SyncByteStream) -> AsyncGenerator[bytes, None]:
    for block in stream:
        yield block


WRONG_LENGTH = "the request's body is not as long as its Content-Length says"
