"""One client connection: reads requests, plays replies, and notes the moment the client leaves.

The protocol callbacks run on the server's own loop, so that they see FIN and RST while the client's loop is blocked.
"""

import asyncio
import json
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, cast

import httptools

from ._records import ConnectionRecord, Journal, RequestRecord
from ._script import Block, Cut, Endless, Gate, Live, NoEnd, Pause, Raw, Reply, Reset, Stall, Step, Trickle, encode

# What may wait in user space for a client that does not read: small, so that `bytes_sent` tells how far the kernel got.
_WRITE_BUFFER = 32 * 1024
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request"
)


# Plays a reply to its end; returns whether the connection can serve another request.
Play: TypeAlias = Callable[[Reply], Awaitable[bool]]


@dataclass(eq=False)
class Host:
    """What connections share with their server."""

    journal: Journal
    tls: ssl.SSLContext | None
    silent: bool
    scripted: Callable[[str], Reply | None]
    answer: Callable[[RequestRecord, Play], Awaitable[bool]]
    failed: Callable[[Exception], None]
    live: set["Connection"] = field(default_factory=set["Connection"])


class _Tls:
    """The server's end of TLS, in memory.

    asyncio's own would show a connection only after its handshake, and could not write any more after the client's FIN.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._shaken = False

    def receive(self, data: bytes) -> tuple[bytes, bool]:
        """Take bytes from the socket; return what was in it and whether the client has said goodbye."""
        self._incoming.write(data)
        plain: list[bytes] = []
        with suppress(ssl.SSLWantReadError):
            if not self._shaken:
                self._object.do_handshake()
                self._shaken = True
            while part := self._object.read(65536):
                plain.append(part)
            return b"".join(plain), True
        return b"".join(plain), False

    def send(self, data: bytes) -> bytes:
        self._object.write(data)
        return self._outgoing.read()

    def pending(self) -> bytes:
        """Return what TLS itself has to tell the client: handshake, tickets, alerts."""
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        # It is only said: the client's own goodbye is not waited for.
        with suppress(ssl.SSLError):
            self._object.unwrap()
        return self._outgoing.read()


@dataclass(eq=False)
class Exchange:
    """A request and the reply chosen for it."""

    request: RequestRecord
    reply: Reply | None
    http11: bool
    keep_alive: bool
    ready: bool


class Connection(asyncio.Protocol):
    """The server's end of one connection."""

    record: ConnectionRecord
    _transport: asyncio.Transport

    def __init__(self, host: Host) -> None:
        self._host = host
        self._parser = httptools.HttpRequestParser(self)
        self._tls = None if host.tls is None or host.silent else _Tls(host.tls)
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._parts: list[bytes] = []
        self._arriving: Exchange | None = None
        self._pending: deque[Exchange] = deque()
        self._playing: Exchange | None = None
        self._player: asyncio.Task[None] | None = None
        self._finished = False
        self.writable = asyncio.Event()
        self.writable.set()

    # The socket's events.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._host.live.add(self)
        self.record = self._host.journal.opened()

    def data_received(self, data: bytes) -> None:
        if self._tls is None or self._finished:
            self._received(data)
            return
        try:
            plain, left = self._tls.receive(data)
        except ssl.SSLError:  # not TLS, or the client refuses the certificate: it is told why by an alert
            self._transport.write(self._tls.pending())
            self.finish(clean=False)
            return
        self._transport.write(self._tls.pending())
        if plain:
            self._received(plain)
        if left and self._leave("fin", time.monotonic()):
            self._transport.write(self._tls.goodbye())
            self.abort()

    def eof_received(self) -> bool:
        gone = self._leave("fin", time.monotonic())
        if gone:
            # Not close(): that would first deliver what is still buffered to somebody who has left.
            self.abort()
        return not gone

    def connection_lost(self, exc: Exception | None) -> None:
        now = time.monotonic()
        if exc is not None:
            # A broken pipe is a FIN that was overtaken by the RST which followed it: the kernel tells them apart.
            self._leave("fin" if isinstance(exc, BrokenPipeError) else "reset", now)
        if self._player is not None:
            self._player.cancel()
        self._ended(now)
        self._host.live.discard(self)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    # The parser's events.

    def on_message_begin(self) -> None:
        self._target, self._headers, self._parts = b"", [], []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        method, path = self._parser.get_method().decode("latin-1"), self._target.decode("latin-1")
        request = self._host.journal.headed(self.record, method, path, self._headers, self._parts)
        reply = self._host.scripted(request.route)
        early = reply is not None and not reply.read_body
        self._arriving = Exchange(
            request,
            reply,
            http11=self._parser.get_http_version() == "1.1",
            keep_alive=self._parser.should_keep_alive() and not early,
            ready=early,
        )
        self._pending.append(self._arriving)
        if early:
            self._transport.pause_reading()
            self._advance()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        assert self._arriving is not None
        with self._host.journal.change():
            self._arriving.request.complete = True
        self._arriving.ready = True
        self._advance()

    # What the player and the server do to the connection.

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket; raises `Over` when nobody can get them any more."""
        if self._finished or self._transport.is_closing():
            raise Over
        if not data:  # OpenSSL has no empty write
            return
        self._transport.write(data if self._tls is None else self._tls.send(data))
        if self._transport.is_closing():  # the write itself found out, and nothing of it was sent
            raise Over
        self.record.bytes_sent += len(data)
        if self.record.left_at is not None:
            self.record.bytes_after_left += len(data)

    def finish(self, *, clean: bool) -> None:
        """Send FIN after what has been written, and watch for the client to leave.

        The socket is closed only then: a close with unread input would turn the FIN into a RST, and lose the answer.
        """
        if self._finished or self._transport.is_closing():
            return
        if self._tls is not None and clean:
            self._transport.write(self._tls.goodbye())
        self._finished = True
        self._ended(time.monotonic())
        if self.record.left_at is not None:
            self._transport.close()
            return
        with suppress(OSError):  # the client's RST may have come in the meantime: connection_lost follows
            self._transport.write_eof()
        self._transport.resume_reading()

    def reset(self) -> None:
        """Send RST and drop what was not sent yet."""
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.abort()

    def abort(self) -> None:
        """Close the socket now."""
        self._ended(time.monotonic())
        self._transport.abort()

    def _received(self, data: bytes) -> None:
        self.record.bytes_received += len(data)
        if self._finished or self._host.silent:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # like the real server, which ignores the wish
        except httptools.HttpParserCallbackError:
            raise  # a defect of this module, not of the request
        except httptools.HttpParserError:
            self._refuse()

    def _refuse(self) -> None:
        if self._player is not None:
            self._player.cancel()
        with suppress(Over):
            self.write(_BAD_REQUEST)
        self.finish(clean=True)

    def _leave(self, how: Literal["fin", "reset"], now: float) -> bool:
        """Note that the client has left; tell whether the connection is over with that."""
        if self.record.left_at is None:
            with self._host.journal.change():
                self.record.left_at, self.record.left_how = now, how
        reply = None if self._playing is None else self._playing.reply
        return self._finished or reply is None or not reply.ignore_leave

    def _ended(self, now: float) -> None:
        if self.record.closed_at is None:
            with self._host.journal.change():
                self.record.closed_at = now

    def _advance(self) -> None:
        """Start the next reply when the one before it is over and its request is there."""
        if self._playing is None and self._pending and self._pending[0].ready:
            self._playing = self._pending.popleft()
            self._player = asyncio.get_running_loop().create_task(self._play(self._playing))

    async def _play(self, exchange: Exchange) -> None:
        async def play(reply: Reply) -> bool:
            if reply.whole is not None and not _asks_for_stream(exchange.request):
                reply = reply.unstreamed()
            return await _Player(self, exchange, reply).play()

        try:
            if exchange.reply is not None:
                keep = await play(exchange.reply)
            else:
                keep = await self._host.answer(exchange.request, play)
        except Over:
            return
        except Exception as exc:  # a defect of a script or a handler: stop() tells the test
            self._host.failed(exc)
            self.reset()
            return
        if keep and self.record.left_at is None:
            self._playing = None
            self._advance()
        else:
            self.finish(clean=True)


class Over(Exception):  # noqa: N818 -- not an error: the script has ended the connection, or lost its reader
    """There is nobody left to play to."""


class _Player:
    """Plays one reply."""

    def __init__(self, connection: Connection, exchange: Exchange, reply: Reply) -> None:
        self._connection = connection
        self._reply = reply
        self._keep_alive = exchange.keep_alive
        self._bodiless = exchange.request.method == "HEAD" or reply.status in {204, 304}
        self._framing = "close" if reply.framing == "chunked" and not exchange.http11 else reply.framing
        self._in_body = False
        self._never_ends = False
        self._written = 0

    async def play(self) -> bool:
        """Play it to its end; return whether the connection can serve another request."""
        reply = self._reply
        for step in reply.before_head:
            await self._step(step)
        if reply.raw is not None:
            await self._write(reply.raw)
            self._bodiless = False
        else:
            await self._write(self._head())
            self._in_body = True
        for step in reply.steps:
            await self._step(step)
        if self._never_ends:
            await _for_ever()
        if self._in_body and self._framing == "chunked" and not self._bodiless:
            await self._write(b"0\r\n\r\n")
        return self._keep_alive

    def _head(self) -> bytes:
        reply = self._reply
        own = {name.lower(): value for name, value in reply.header_pairs}
        if self._framing == "close" or "close" in own.get("connection", "").lower():
            self._keep_alive = False
        usual = [("Content-Type", "application/x-ndjson"), ("Date", formatdate(usegmt=True))]
        if self._framing == "length":
            usual.append(("Content-Length", str(reply.length)))
        elif self._framing == "chunked" and not self._bodiless:
            usual.append(("Transfer-Encoding", "chunked"))
        if not self._keep_alive:
            usual.append(("Connection", "close"))
        pairs = [(name, value) for name, value in usual if name.lower() not in own] + list(reply.header_pairs)
        lines = [f"HTTP/1.1 {reply.status} {_phrase(reply.status)}", *(f"{name}: {value}" for name, value in pairs)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def _step(self, step: Step) -> None:
        match step:
            case bytes() | dict() | Block():
                await self._block(encode(step))
            case Pause(seconds=seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await _pass(step)
            case Stall():
                await _for_ever()
            case Raw(data=data):
                await self._write(data)
            case Trickle():
                await self._trickle(step)
            case Endless():
                await self._endless(step)
            case Live(steps=steps):
                async for each in steps:
                    await self._step(each)
            case NoEnd():
                self._never_ends = True
            case Cut():
                self._cut()
            case Reset():
                self._connection.reset()
                raise Over

    async def _trickle(self, step: Trickle) -> None:
        for at in range(len(step.data)):
            if at:
                await asyncio.sleep(step.interval)
            await self._block(step.data[at : at + 1])

    async def _endless(self, step: Endless) -> None:
        n = 0
        while True:
            await self._block(encode(step.make(n)))
            n += 1
            if step.interval:
                await asyncio.sleep(step.interval)

    async def _block(self, data: bytes) -> None:
        if self._in_body and self._bodiless:
            data = b""
        elif self._in_body and self._framing == "chunked" and data:  # an empty chunk would be the end of the body
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        """Write when the client's window allows it, then let others run: also when there is nothing to write."""
        await self._connection.writable.wait()
        cut_at = self._reply.cut_at
        if cut_at is None:
            self._connection.write(data)
        else:
            data = data[: cut_at - self._written]
            self._written += len(data)
            self._connection.write(data)
            if self._written == cut_at:
                self._cut()
        await asyncio.sleep(0)

    def _cut(self) -> None:
        self._connection.finish(clean=False)
        raise Over


def _asks_for_stream(request: RequestRecord) -> bool:
    body: Any = None
    # A script is played to whatever comes, with or without a body.
    with suppress(ValueError, RecursionError):
        body = json.loads(request.body)
    asked = body.get("stream") if isinstance(body, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return asked if isinstance(asked, bool) else not request.route.startswith("/v1/")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"status code {status}"  # Go's way with the 499 of Ollama


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def _pass(gate: Gate) -> None:
    loop, passed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(passed.set)

    gate.arrive(wake)
    try:
        await passed.wait()
    finally:
        gate.depart(wake)
