"""How a connection is made: names, addresses, sockets, TLS; the caller knows every socket from the start."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import ssl
import sys
import types
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._secret import Secret

from .http1 import MAX_HEAD_BYTES, HttpProxy, Origin, encode_headers
from .socket import GuardedSocket
from .tasks import cancel_once

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Coroutine, Generator, Iterable, MutableMapping

    from .connection import TlsConnection
    from .reader import ResponseReader

# RFC 8305, section 5: how long one address may take before the next one is tried beside it.
_STAGGER = 0.25

# Python on Windows does not have this name.
_AF_UNIX: int | None = getattr(socket, "AF_UNIX", None)

# How long to wait before a unix socket whose server has a full queue is tried again.
_QUEUE_FULL = 0.01

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: ([^\r\n]*))?\r\n")


class Sockets:
    """The sockets of a connection in the making; all of them can be shut down, also those still to come."""

    __slots__ = ("_open", "_shut_down")

    def __init__(self) -> None:
        self._open: set[GuardedSocket] = set()
        self._shut_down = False

    def add(self, sock: GuardedSocket) -> None:
        """Take in a socket, before it connects."""
        self._open.add(sock)
        # shutdown() sets the mark first and then looks at the set; this does it the other way round. One of the two
        # sees the other.
        if self._shut_down:
            sock.shutdown()

    def discard(self, sock: GuardedSocket) -> None:
        """Let go of a socket."""
        self._open.discard(sock)

    def shutdown(self) -> None:
        """Send the FIN on each socket; from any thread or signal handler."""
        self._shut_down = True
        for sock in list(self._open):
            sock.shutdown()

    def close(self) -> None:
        """Close the sockets, after their loop was closed."""
        self.shutdown()
        for sock in list(self._open):
            sock.close()


class SocketDial:
    """A TCP connection to one address in the making, as the link of a reader: the loop watches its socket.

    There is no task: with its timeout and its callbacks it would cost more than the connection. There need be one
    only where more than one thing is awaited: a name, several addresses, a proxy's answer, a handshake.

    Args:
        loop: The event loop.
        family: The address family.
        dialling: The pool's connections in the making, by reader.

    Attributes:
        sock: The socket.
    """

    __slots__ = ("_connected", "_dialling", "_loop", "_owned", "_watched", "sock")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, family: int, dialling: MutableMapping[ResponseReader, Any]
    ) -> None:
        self._loop = loop
        self._dialling = dialling
        self._connected = False
        # The descriptor that the loop watches.
        self._watched: int | None = None
        self._owned = True
        self.sock: GuardedSocket = GuardedSocket(family, socket.SOCK_STREAM)

    async def connect(self, reader: ResponseReader, address: tuple[str, int]) -> None:
        """Connect, for a reader whose link this is.

        Raises:
            OSError: There is no connection.
            ExchangeEnded: The exchange was ended meanwhile.

        Cancellation: the socket is closed at once.
        """
        sock = self.sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(address)
        except (BlockingIOError, InterruptedError):
            self._watched = sock.fileno()
            self._loop.add_writer(self._watched, self._writable, reader)
            while not self._connected:
                await reader.wait()
            # Again, if Ctrl-C came between the steps of _writable(): the loop calls that until it is not watched.
            self._unwatch()
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None

    def _writable(self, reader: ResponseReader) -> None:
        self._connected = True
        reader.wake()
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watched is not None and not self._loop.is_closed():
            self._loop.remove_writer(self._watched)
        self._watched = None

    def hand_over(self) -> None:
        """Leave the socket to a transport of the loop, which closes it."""
        self._owned = False

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Send the FIN; from any thread."""
        self.sock.shutdown()

    def close_for(self, reader: ResponseReader) -> None:
        """Close the socket, unless a transport has it; then the reader's task closes that in the next round."""
        # The task does that as well, unless Ctrl-C comes there.
        self._dialling.pop(reader, None)
        if self._owned:
            self.close()

    def close(self) -> None:
        """Close the socket, also after its loop was closed; idempotent."""
        self._unwatch()
        self.sock.shutdown()
        self.sock.close()

    def pause_reading(self) -> None:
        """Nothing is read yet."""

    def resume_reading(self) -> None:
        """Nothing is read yet."""


@types.coroutine
def in_context(context: contextvars.Context, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a coroutine in this task and another context: what it makes does not keep the context of the caller.

    Cancellation: as that of the coroutine.
    """
    step, value = coroutine.send, None
    try:
        while True:
            try:
                awaited = context.run(step, value)
            except StopIteration as stop:
                return stop.value
            try:
                step, value = coroutine.send, (yield awaited)
            except BaseException as exc:
                step, value = coroutine.throw, exc
    finally:
        coroutine.close()


@lru_cache(maxsize=64)
def family_of(host: str) -> int | None:
    """Return the address family of a host that is an IP address, ``None`` for a name."""
    try:
        return socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    except ValueError:
        return None


# The default loop of Windows watches no sockets; it only connects them.
WATCHES_SOCKETS = sys.platform != "win32"


async def open_socket(
    loop: asyncio.AbstractEventLoop, origin: Origin, uds: str | None, sockets: Sockets
) -> GuardedSocket:
    """Connect to an origin, or to a unix socket in its place.

    Args:
        loop: The event loop.
        origin: Where to.
        uds: Path of a unix socket, or None.
        sockets: Takes in each socket before it connects, so that it can be shut down.

    Cancellation: safe; all sockets are closed.
    """
    if uds is not None:
        if _AF_UNIX is None:
            raise OSError("this system has no unix sockets")
        return await _connect_socket(loop, _AF_UNIX, 0, uds, sockets)
    addresses = await _resolve(loop, origin)
    if len(addresses) == 1:
        return await _connect_socket(loop, *addresses[0], sockets)
    return await _first_connected(loop, addresses, sockets)


async def start_tls(
    connection: TlsConnection, create: Any, sock: GuardedSocket, context: ssl.SSLContext | None, name: str
) -> None:
    """Make a TLS connection in two steps; raise if there is no context.

    In one step (``create_connection(ssl=...)``) uvloop, cancelled between the two, leaves a future behind whose
    exception is never retrieved.
    """
    if not isinstance(context, ssl.SSLContext):
        sock.close()
        raise httpx.ConnectError("there is no TLS context, and the connection would not be encrypted")
    plain = _Plain()
    try:
        await create(lambda: plain, sock=sock)
        tls = await asyncio.get_running_loop().start_tls(plain.transport, connection, context, server_hostname=name)
        if tls is None or tls.is_closing():
            raise ConnectionResetError("the connection was lost as soon as it was made")
        connection.secured(plain.transport, tls)
    except BaseException:
        if plain.transport is not None:
            plain.transport.abort()
        raise


class _Plain(asyncio.Protocol):
    """The protocol of a connection until its TLS handshake; it keeps the transport as soon as there is one."""

    transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


async def open_tunnel(loop: asyncio.AbstractEventLoop, sock: GuardedSocket, origin: Origin, proxy: HttpProxy) -> None:
    """Ask the proxy at the other end of a socket for a tunnel to an origin.

    Raises:
        httpx.ProxyError: The proxy refuses.

    Cancellation: safe; the socket is closed.
    """
    where = str(origin).encode("ascii")
    host = (b"Host", where)
    try:
        headers = Secret(encode_headers(Secret([host, *proxy.extra_headers([host])])))
        await loop.sock_sendall(sock, b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (where, headers.value))
        status, rest = await _answer_to_connect(loop, sock)
        if not status[1].startswith(b"2"):
            # The body is not shown: it may have come with the head, or not.
            raise httpx.ProxyError(b" ".join(filter(None, status.groups())).decode("ascii", "replace"))
        if rest:
            # In a tunnel we speak first, so an answer with more than a head is not a tunnel.
            raise httpx.ProxyError("its answer to CONNECT has more than an HTTP head")
    except BaseException:
        sock.close()
        raise


async def _answer_to_connect(loop: asyncio.AbstractEventLoop, sock: GuardedSocket) -> tuple[re.Match[bytes], bytes]:
    """Return the status line of the final answer, and the bytes after its head."""
    rest, left = b"", MAX_HEAD_BYTES
    while True:
        # All heads together are bounded: bytes that have arrived are read without a pause, so a proxy that never ends
        # its heads would block the loop.
        while b"\r\n\r\n" not in rest:
            block = await loop.sock_recv(sock, MAX_HEAD_BYTES)
            rest, left = rest + block, left - len(block)
            if not block or left < 0:
                raise httpx.ProxyError("its answer to CONNECT does not have a complete HTTP head")
        head, _, rest = rest.partition(b"\r\n\r\n")
        status = _STATUS_LINE.match(head + b"\r\n")
        if status is None:
            raise httpx.ProxyError("its answer to CONNECT is not HTTP")
        if not status[1].startswith(b"1") or status[1] == b"101":
            return status, rest


async def _resolve(loop: asyncio.AbstractEventLoop, origin: Origin) -> list[tuple[int, int, Any]]:
    family = family_of(origin.host)
    if family is None:
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        return [(family, proto, where) for family, _, proto, _, where in found]
    return [(family, 0, (origin.host, origin.port))]


async def _connect_socket(
    loop: asyncio.AbstractEventLoop, family: int, proto: int, address: Any, sockets: Sockets
) -> GuardedSocket:
    sock = GuardedSocket(family, socket.SOCK_STREAM, proto)
    try:
        sockets.add(sock)
        if family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it only on sockets that name their protocol; without it a second small write waits 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == _AF_UNIX:
            await _connect_unix(sock, address)
        else:
            # The loop of Windows connects without the socket's own connect(), which looks at the mark of an abort.
            sock.raise_if_shut_down()
            await loop.sock_connect(sock, address)
            sock.raise_if_shut_down()
        return sock  # noqa: TRY300  (Ctrl-C at this line leaves nothing either)
    except BaseException:
        sock.close()
        sockets.discard(sock)
        raise


async def _connect_unix(sock: GuardedSocket, path: str) -> None:
    # A unix socket connects at once, or the server's queue is full. asyncio and uvloop take that for "in progress", and
    # then for connected.
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_QUEUE_FULL)
        else:
            return


async def _first_connected(
    loop: asyncio.AbstractEventLoop, addresses: Iterable[tuple[int, int, Any]], sockets: Sockets
) -> GuardedSocket:
    """Connect to the addresses in order, starting the next beside a slow one; return the first that succeeds."""
    waiting = list(addresses)
    running: set[asyncio.Task[GuardedSocket]] = set()
    error: BaseException | None = None
    winner: asyncio.Task[GuardedSocket] | None = None
    try:
        while winner is None and (waiting or running):
            if waiting:
                running.add(loop.create_task(_connect_socket(loop, *waiting.pop(0), sockets)))
            done, running = await asyncio.wait(
                running, timeout=_STAGGER if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if task.exception() is None and winner is None:
                    winner = task
                elif task.exception() is None:
                    task.result().close()
                error = error or task.exception()
        _stop_dialling(running)
        if running:
            await asyncio.wait(running)
    except BaseException:
        _stop_dialling(running)
        if winner is not None:
            winner.result().close()
        raise
    if winner is None:
        raise error or OSError("the name has no address")
    return winner.result()


def _stop_dialling(tasks: Iterable[asyncio.Task[GuardedSocket]]) -> None:
    for task in tasks:
        if not task.cancelling():
            task.add_done_callback(_close_late)
        cancel_once(task)


def _close_late(task: asyncio.Task[GuardedSocket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def explain_error(exc: OSError) -> str:
    """Return a readable text for an ``OSError``."""
    # asyncio's text contains the address as a tuple.
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc) or "the connection was lost"


def explain_tls_error(exc: ssl.SSLError) -> str:
    """Return a readable text for an error of TLS."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {exc.verify_message}"
    if exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return f"the server does not speak TLS at this port; try http:// instead of https:// ({exc.reason})"
    return str(exc.reason or exc)
