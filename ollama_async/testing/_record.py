"""The recorder: passes requests on to a real server, and keeps what happened in a file."""

import base64
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Literal, cast
from urllib.parse import parse_qsl, quote

import httpx

from ollama_async._host import parse_host
from ollama_async._wire.transport import DirectTransport

from ._connection import Play
from ._recording import HEADER, HIDDEN, SECRET_NAME, RecordingError, block_line, body_fields
from ._records import RequestRecord
from ._script import Cut, Frame, Live, Reply, Step

# Headers that hold for one connection only.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# What is kept of an answer's head. Of a request's head nothing is.
_KEPT = {"content-type", "retry-after"}
# A shorter value is not a key, and could be part of any word.
_SHORTEST_KEY = 6

_ORIGIN = re.compile("^[a-z]+://[^/]*")

_End = Literal["complete", "cut", "client left"]


class Recorder:
    """Relays requests to a server, and writes each exchange to the file when it is over.

    It runs on the loop of the fake server. An exchange ends in the moment in which its client leaves: the relaying task
    is cancelled, and the connection to the server is closed.
    """

    def __init__(self, upstream: str | None, path: str | os.PathLike[str]) -> None:
        self._upstream = parse_host(os.environ.get("OLLAMA_HOST") if upstream is None else upstream)
        self._path = os.fspath(path)
        self._transport = DirectTransport()
        self._begun = False
        # The keys that have come: the server may repeat one, also later.
        self._secrets: set[str] = set()
        if self._upstream.credentials is not None:
            self._secrets |= _of_header(self._upstream.credentials)

    def begin(self) -> None:
        """Make the file; only the user can read it."""
        if self._begun:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise RecordingError(self._path, None, "the file exists: name another one, or delete it") from None
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(HEADER) + "\n")
        self._begun = True

    def close(self) -> None:
        """Close the connections to the server."""
        self._transport.close()

    async def relay(self, request: RequestRecord, play: Play) -> bool:
        """Have the server answer a request, and pass the answer on while it comes."""
        exchange = _Taken(request)
        response: httpx.Response | None = None
        try:
            try:
                response = await self._transport.handle_async_request(self._passed_on(request))
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.LocalProtocolError) as exc:
                exchange.reached = False
                how = "start it, or record another one"
                return await play(Reply.error(502, f"the recorder cannot reach {self._upstream.url}: {exc}; {how}"))
            except httpx.TransportError:
                exchange.finish("cut")
                return await play(Reply([Cut()], raw=b""))
            exchange.begin(response)
            headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _HOP_BY_HOP]
            live = Live(_Passing(response, exchange))
            return await play(Reply([live], status=response.status_code, headers=headers, framing=exchange.framing))
        finally:
            if response is not None:
                await response.aclose()
            if exchange.reached:
                self._write(exchange)

    def _passed_on(self, request: RequestRecord) -> httpx.Request:
        not_passed_on = _HOP_BY_HOP | {"accept-encoding", "content-length", "host"}
        headers = [pair for pair in request.headers if pair[0] not in not_passed_on]
        # What is compressed could not be read in the file.
        headers.append(("accept-encoding", "identity"))
        if self._upstream.credentials is not None and request.header("authorization") is None:
            headers.append(("authorization", self._upstream.credentials))
        path = _ORIGIN.sub("", request.path)
        return httpx.Request(request.method, self._upstream.url + path, headers=headers, content=request.body)

    def _write(self, exchange: "_Taken") -> None:
        self._secrets |= _secrets(exchange.request)
        text = exchange.text()
        # The longest first: one may be part of another.
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(json.dumps(secret, ensure_ascii=False)[1:-1], HIDDEN)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text)


class _Taken:
    """An exchange while it goes on.

    Attributes:
        request: What the client asked.
        reached: Whether it has come to the server.
        framing: How the server tells where the answer ends.
    """

    def __init__(self, request: RequestRecord) -> None:
        self.request = request
        self.reached = True
        self.framing: Literal["chunked", "length", "close"] = "chunked"
        self._since = time.monotonic()
        self._status: Frame = {}
        self._lines: list[Frame] = []
        self._end: Frame = {}

    def begin(self, response: httpx.Response) -> None:
        """Take the head of the answer."""
        headers = response.headers
        if "transfer-encoding" not in headers:
            self.framing = "length" if "content-length" in headers else "close"
        kept = {name: headers[name] for name in _KEPT if name in headers}
        length = {"content-length": headers["content-length"]} if self.framing == "length" else {}
        self._status = {"at": self._now(), "status": response.status_code, "headers": kept | length}
        if self.framing != "chunked":
            self._status["framing"] = self.framing
        self._lines.append(self._status)

    def add(self, block: bytes) -> None:
        """Take a block of the body."""
        self._lines.append({"at": self._now(), **block_line(block)})

    def finish(self, end: _End) -> None:
        """Take how the answer ended."""
        self._end = {"at": self._now(), "end": end}
        if end == "complete" and self.request.method != "HEAD":
            # It is counted when it is played, also if somebody has changed the body.
            self._status["headers"].pop("content-length", None)

    def text(self) -> str:
        """Return the lines of the file."""
        query = "&".join(f"{quote(name)}={HIDDEN}" for name, _ in _query(self.request))
        path = quote(self.request.route) + (f"?{query}" if query else "")
        asked = {"request": f"{self.request.method} {path}", **body_fields(self.request)}
        # Its client has left before there was an end.
        end = self._end or {"at": self._now(), "end": "client left"}
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (asked, *self._lines, end))

    def _now(self) -> float:
        return round((time.monotonic() - self._since) * 1000, 1)


class _Passing(AsyncIterator[Step]):
    """The body of the server's answer on its way to the client."""

    def __init__(self, response: httpx.Response, exchange: _Taken) -> None:
        self._blocks = aiter(cast("httpx.AsyncByteStream", response.stream))
        self._exchange = exchange

    async def __anext__(self) -> Step:
        try:
            block = await anext(self._blocks)
        except StopAsyncIteration:
            self._exchange.finish("complete")
            raise
        except httpx.TransportError:
            self._exchange.finish("cut")
            return Cut()
        self._exchange.add(block)
        return block


# -- secrets --


def _query(request: RequestRecord) -> list[tuple[str, str]]:
    return parse_qsl(request.path.partition("?")[2], keep_blank_values=True)


def _secrets(request: RequestRecord) -> set[str]:
    """Return the keys that came with a request."""
    found = _keys(value for _, value in _query(request))
    for name, value in request.headers:
        if SECRET_NAME.search(name):
            found |= _of_header(value)
    return found


def _of_header(value: str) -> set[str]:
    """Return a header as a whole, without its scheme (``Bearer``), the values of cookies, and a password."""
    scheme, _, credentials = value.partition(" ")
    found = {value, credentials, *(pair.partition("=")[2] for pair in value.split(";"))}
    if scheme.lower() == "basic":
        with suppress(ValueError):
            found.add(base64.b64decode(credentials).decode().partition(":")[2])
    return _keys(found)


def _keys(values: Iterable[str]) -> set[str]:
    return {value for value in values if len(value) >= _SHORTEST_KEY}
