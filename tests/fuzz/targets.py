"""What is fuzzed, and all that the fuzzing knows of the package's inside: each function takes plain values and no loop.

The oracles are in ``oracles.py``. Whoever renames something in the package adapts it here.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import httpx

from ollama_async import AsyncClient, HostError, ProtocolError, RequestError, StreamError
from ollama_async._call.chunk import Merge
from ollama_async._call.decoder import NdjsonDecoder
from ollama_async._call.ndjson import MAX_LINE_BYTES, LineSplitter
from ollama_async._host import ServerAddress, env_proxy, parse_host
from ollama_async._model.merge import ChatMerge, GenerateMerge, validators
from ollama_async._model.tools import convert_function_to_tool, encode_tools, tool_schema
from ollama_async._secret import Secret
from ollama_async._wire.dial import _answer_to_connect
from ollama_async._wire.http1 import MAX_HEAD_BYTES, HttpProxy, Origin, encode_head, encode_headers
from ollama_async._wire.parser import ResponseParser
from ollama_async._wire.proxy import ProxyTransport, http_proxy
from ollama_async._wire.tls import TlsOptions

__all__ = [
    "MAX_HEAD_BYTES",
    "MAX_LINE_BYTES",
    "MODELS",
    "HostError",
    "RequestError",
    "convert_function_to_tool",
    "encode_tools",
    "is_of_the_package",
    "make_alone",
    "make_together",
    "open_tunnel",
    "parse_answer",
    "parse_host",
    "proxy_of_environment",
    "read_proxy",
    "read_stream",
    "request_head",
    "split_lines",
    "tool_schema",
]


class Answer(NamedTuple):
    """What a parser has made of the bytes of an answer.

    Attributes:
        head: Status, reason, headers and version; ``None`` before the end of the head.
        body: What has come of the body.
        complete: Whether the answer has come to its end.
        kept: Whether the connection may take another request.
        error: What was wrong with the answer.
    """

    head: tuple[int, bytes, tuple[tuple[bytes, bytes], ...], bytes] | None
    body: bytes
    complete: bool
    kept: bool
    error: str | None


def parse_answer(method: str, pieces: Iterable[bytes], *, closed: bool) -> Answer:
    """Feed an answer in pieces; ``closed``: the server closes the connection after them."""
    parser, body = ResponseParser(method), b""
    for piece in pieces:
        if parser.complete:
            # As a connection that serves no request: it is closed.
            parser.trailing_data = True
            break
        body += parser.feed_data(memoryview(piece))
        if parser.error is not None:
            break
    kept = parser.complete and parser.keep_alive and not parser.trailing_data
    if closed:
        parser.feed_eof()
    parser.close()
    head = parser.head and (parser.head.status, parser.head.reason, tuple(parser.head.headers), parser.head.version)
    return Answer(head, body, parser.complete, kept, None if parser.error is None else str(parser.error))


def split_lines(pieces: Iterable[bytes], limit: int) -> tuple[list[bytes], bool]:
    """Return the lines of a body that comes in pieces, and whether it was refused for a line over the limit."""
    splitter = LineSplitter(limit)
    lines: list[bytes] = []
    for piece in pieces:
        lines += splitter.feed_data(piece)
        if splitter.failure is not None:
            return lines, True
    rest = splitter.flush()
    return [*lines, rest] if rest else lines, False


class _Pieces(httpx.AsyncBaseTransport):
    """A transport whose answers are a body in pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=self._blocks())

    async def _blocks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def read_stream(pieces: Iterable[bytes], limit: int) -> tuple[list[Any], str]:
    """Return the chunks of a chat whose body comes in pieces, and its outcome or the kind of its error."""
    chunks: list[Any] = []
    async with AsyncClient("http://h", transport=_Pieces(pieces), max_line_bytes=limit) as client:
        stream = client.chat("m", "hi", stream=True)
        try:
            async for chunk in stream:
                chunks.append(chunk)
        except (ProtocolError, StreamError) as exc:
            return chunks, type(exc).__name__
        return chunks, str(stream.outcome)


MODELS: tuple[Merge[Any], ...] = (ChatMerge(), GenerateMerge())


def make_together(merge: Merge[Any], lines: list[bytes]) -> list[Any]:
    """Make chunks of the first of some lines, of as many as can be taken together."""
    return NdjsonDecoder(merge.validators, len(lines), MAX_LINE_BYTES)._decode_batch(lines)


def make_alone(merge: Merge[Any], line: bytes) -> Any:
    """Make a chunk of one line; raises ``ValueError``."""
    return validators(merge.model).one(line)


def request_head(host: ServerAddress) -> bytes:
    """Write the head of a request to a host."""
    request = httpx.Request("POST", f"{host.url}/api/chat")
    Origin.of(request.url)
    return encode_head(request)


_TLS = TlsOptions(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), Secret(None), trust_env=False)


def read_proxy(given: str) -> tuple[Origin, bytes] | None:
    """Return where a proxy is and the header lines for it, ``None`` for one that httpx speaks to.

    Raises:
        RequestError: It is not a proxy.
    """
    proxy: HttpProxy | None = http_proxy(given)
    if proxy is None:
        ProxyTransport(given, tls=_TLS)
        return None
    assert repr(proxy) == f"<HttpProxy {proxy.origin}>"
    return proxy.origin, encode_headers(Secret(list(proxy.headers)))


class _Arriving:
    """Stands for the event loop, and the socket, from which the answer of a proxy is read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    async def sock_recv(self, sock: object, count: int) -> bytes:
        return next(self._pieces, b"")


def open_tunnel(pieces: Iterable[bytes]) -> tuple[bytes, bytes] | None:
    """Return the status that a proxy answers to CONNECT, and what follows so far; ``None`` if that is not HTTP."""
    reading = _answer_to_connect(_Arriving(pieces), None)  # type: ignore[arg-type]
    try:
        reading.send(None)
    except StopIteration as exc:
        status, rest = exc.value
        return status[1], rest
    except httpx.ProxyError:
        return None
    raise AssertionError("it waits for something else than the proxy")


def proxy_of_environment(host: ServerAddress) -> str | None:
    """Return the proxy that the environment names for a host."""
    return env_proxy(host)


def is_of_the_package(path: str) -> bool:
    """Whether a file is one of the package's."""
    return "/ollama_async/" in path
