"""A connection without a network: what it needs of asyncio's transport, and of the pool that it belongs to."""

from __future__ import annotations

import socket
from contextvars import Context

from ollama_async._wire.connection import Connection, PlainConnection
from ollama_async._wire.http1 import Origin
from ollama_async._wire.socket import GuardedSocket

OK = b"HTTP/1.1 200 OK\r\n"
# What nobody has asked for.
POISON = OK + b"Content-Length: 6\r\n\r\npoison"


class Wire:
    """Stands for the transport and the pool of one connection.

    Attributes:
        closed: Whether the connection has closed it.
        paused: Whether the connection wants nothing more for now.
        kept: Whether the connection could take another request.
    """

    def __init__(self) -> None:
        self.closed = self.paused = self.kept = False
        self.buffer = memoryview(bytearray(65536))
        self.context = Context()
        self.sock = GuardedSocket(socket.AF_INET)
        self.connection = PlainConnection(self.sock, Origin("http", "h", 80), self)
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def receive(self, data: bytes) -> None:
        """Have bytes come in, and others after them."""
        view = self.connection.get_buffer(-1)
        assert len(data) <= len(view)
        view[: len(data)] = data
        self.connection.buffer_updated(len(data))
        # The next connection of the loop reads into the same buffer.
        view[:] = b"?" * len(view)

    def write(self, data: bytes) -> None: ...
    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def release(self, connection: Connection) -> None:
        self.kept = True

    def connection_lost(self, connection: Connection) -> None: ...
