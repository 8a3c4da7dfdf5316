"""A server of tokens that is not the bottleneck: what it sends is built beforehand, and written in one piece.

It runs in a process of its own: ``python benchmarks/load_server.py`` prints its address. The name of the model says
what it does:

* ``short``: a whole answer at once, without streaming;
* ``burst-N``: N tokens as fast as they are read, each in an HTTP chunk of its own;
* ``paced-N-RATE``: N tokens, RATE a second, and so for any number of streams;
* ``endless``: tokens as fast as they are read, without end;
* ``silent``: one token, then nothing;
* ``mute``: nothing, not even headers.

``GET /left`` tells when clients have left before the end of their stream, in nanoseconds of the machine's monotonic
clock, and forgets it; ``GET /pace`` tells how long the slowest of the paced streams took, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from functools import lru_cache
from typing import Any, NamedTuple

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
BLOCK = 500  # tokens written at once in a burst
GROUPS = 10  # parts of a period at which paced streams get their tokens, so that they do not come all at once
MODEL = re.compile(rb'"model"\s*:\s*"([^"]+)"')
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache
def token(style: str, *, last: bool = False) -> bytes:
    """One token as an HTTP chunk, in the form of Ollama's API or of OpenAI's."""
    if style == "ollama":
        message = {"role": "assistant", "content": "" if last else " token"}
        body: dict[str, Any] = {"model": "bench", "created_at": "2026-01-01T00:00:00.000000Z", "message": message}
        figures = {"done_reason": "stop", "total_duration": 1, "eval_count": 1, "eval_duration": 1}
        body |= {"done": last, **(figures if last else {})}
        return chunk(json.dumps(body).encode() + b"\n")
    delta = {} if last else {"role": "assistant", "content": " token"}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if last else None}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": [choice]}
    return chunk(b"data: " + json.dumps(body).encode() + b"\n\n" + (b"data: [DONE]\n\n" if last else b""))


class Request(NamedTuple):
    """What a client wants: where, in which style, and what the name of its model says."""

    path: bytes
    style: str
    kind: str
    numbers: tuple[int, ...]


@lru_cache
def parsed(received: bytes) -> Request | None:
    """Read a request, ``None`` while it is not whole; a client that sends the same again does not wait for that."""
    head, found, body = received.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    if not found or (length and len(body) < int(length[1])):
        return None
    path = head.split(b" ", 2)[1]
    model = MODEL.search(body)
    kind, *numbers = (model[1].decode() if model else "short").split("-")
    return Request(path, "openai" if path.startswith(b"/v1/") else "ollama", kind, tuple(map(int, numbers)))


@lru_cache
def head(style: str) -> bytes:
    return HEAD % (b"application/x-ndjson" if style == "ollama" else b"text/event-stream")


@lru_cache
def few(style: str, tokens: int) -> bytes:
    """An answer that is written at once."""
    return head(style) + token(style) * tokens + token(style, last=True) + LAST_CHUNK


class Pacer:
    """One timer for all paced streams of a rate: a thousand timers of their own would be the bottleneck."""

    def __init__(self, rate: int) -> None:
        self.period = 1 / rate
        self.groups: list[list[Connection]] = [[] for _ in range(GROUPS)]
        self._ticks = 0
        self._begun = 0.0

    def add(self, connection: Connection) -> None:
        if not any(self.groups):
            self._ticks, self._begun = 0, time.monotonic()
            self._next()
        min(self.groups, key=len).append(connection)

    def _next(self) -> None:
        self._ticks += 1
        due = self._begun + self._ticks * self.period / GROUPS
        asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        group = self.groups[self._ticks % GROUPS]
        group[:] = [connection for connection in group if connection.step()]
        if any(self.groups):
            self._next()


class Connection(asyncio.Protocol):
    """A connection; it answers one request after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.transport: Any = None
        self.received = b""
        self.style = "ollama"
        self.tokens_left = 0
        self.streaming = False
        self.begun = 0.0
        self.room = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.streaming:
            self.server.left.append(time.monotonic_ns())
        self.streaming = False

    def pause_writing(self) -> None:
        self.room = False

    def resume_writing(self) -> None:
        self.room = True
        self.fill()

    def data_received(self, data: bytes) -> None:
        self.received += data
        request = parsed(self.received)
        if request is not None:
            self.received = b""
            self.answer(*request)

    def answer(self, path: bytes, style: str, kind: str, numbers: tuple[int, ...]) -> None:
        if path in {b"/left", b"/pace"}:
            self.send_json(self.server.left if path == b"/left" else self.server.slowest)
            self.server.left, self.server.slowest = [], 0.0
            return
        self.style = style
        if kind == "short":
            self.send_json(SHORT[style])
            return
        if kind == "burst" and numbers[0] <= BLOCK:
            self.transport.write(few(style, numbers[0]))
            return
        self.streaming, self.begun = True, time.monotonic()
        if kind == "mute":
            return
        self.transport.write(head(style) + (token(style) if kind == "silent" else b""))
        if kind == "paced":
            self.tokens_left = numbers[0]
            self.server.pacer(numbers[1]).add(self)
        elif kind != "silent":
            self.tokens_left = numbers[0] if kind == "burst" else -1
            self.fill()

    def fill(self) -> None:
        """Write a burst while there is room; ``tokens_left`` below 0 is without end."""
        while self.room and self.streaming and self.tokens_left:
            size = BLOCK if self.tokens_left < 0 else min(BLOCK, self.tokens_left)
            if self.tokens_left > 0:
                self.tokens_left -= size
            self.transport.write(token(self.style) * size)
            if not self.tokens_left:
                self.finish()

    def step(self) -> bool:
        """Write one token of a paced stream; returns whether more are to come."""
        if not self.streaming:
            return False
        self.tokens_left -= 1
        if self.tokens_left > 0:
            self.transport.write(token(self.style))
            return True
        self.transport.write(token(self.style))
        self.server.slowest = max(self.server.slowest, time.monotonic() - self.begun)
        self.finish()
        return False

    def finish(self) -> None:
        self.streaming = False
        self.transport.write(token(self.style, last=True) + LAST_CHUNK)

    def send_json(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


SHORT = {
    "ollama": {
        "model": "bench",
        "created_at": "2026-01-01T00:00:00.000000Z",
        "message": {"role": "assistant", "content": "an answer"},
        "done": True,
        "done_reason": "stop",
        "eval_count": 2,
    },
    "openai": {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "an answer"}},
        ],
    },
}


class Server:
    """What all connections share."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.slowest = 0.0
        self._pacers: dict[int, Pacer] = {}

    def pacer(self, rate: int) -> Pacer:
        return self._pacers.setdefault(rate, Pacer(rate))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: Connection(self), "127.0.0.1", 0, backlog=4096)
        print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(Server().run())
