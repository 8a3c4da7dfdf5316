"""What the tests of served answers have in common: a web server, and a browser that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, Literal, Self

import uvicorn

BOUND = 30.0


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    async with uvicorn_server(app) as server:
        yield port_of(server)


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def uvicorn_server(app: Any, http: Any = "auto") -> AsyncIterator[uvicorn.Server]:
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=0, log_level="warning", lifespan="off", ws="none", http=http, timeout_graceful_shutdown=10
        )
    )
    # Not serve(), which takes the process's signals.
    running = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(BOUND):
            while not server.started:
                await asyncio.sleep(0.001)
        yield server
    finally:
        server.should_exit = True
        await running


class Tab:
    """A client of raw sockets, which can leave in any way, and not read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def ask(cls, port: int, path: str, question: Any, times: int = 1, **headers: str) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = json.dumps(question)
        headers = {"Host": "x", "Connection": "close", "Content-Length": str(len(body))} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n{body}".encode() * times)
        return cls(reader, writer)

    async def until(self, text: str) -> str:
        seen = b""
        async with asyncio.timeout(BOUND):
            while text.encode() not in seen:
                block = await self.reader.read(1000)
                assert block, f"the response ended: {seen!r}"
                seen += block
        return seen.decode()

    def stop_reading(self) -> None:
        transport: Any = self.writer.transport
        transport.pause_reading()

    def leave(self, how: Literal["fin", "reset"] = "fin") -> None:
        if how == "reset":
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def events(text: str) -> list[tuple[str, Any]]:
    """What a browser makes of Server-Sent Events."""
    found: list[tuple[str, Any]] = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            found.append(("comment", block[1:].strip()))
            continue
        number, name, data = block.split("\n")
        assert number == f"id: {1 + sum(name != 'comment' for name, _ in found)}"
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        found.append((name[7:], json.loads(data[6:])))
    return found
