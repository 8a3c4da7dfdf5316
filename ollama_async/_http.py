"""HTTP/1.1 on one connection: a protocol of asyncio's over httptools, and the socket under it."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import threading
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import httptools
import httpx

from ._cancel import raise_in_loop, resolve
from ._channel import ExchangeOutcome, ResponseReader
from ._secret import Secret

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Iterable


__all__ = [
    "MAX_HEAD_BYTES",
    "Connection",
    "GuardedSocket",
    "HttpProxy",
    "Origin",
    "PeerClosed",
    "PlainConnection",
    "TlsConnection",
    "encode_head",
    "encode_headers",
]

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
        """Return where a URL leads; raises ``httpx.UnsupportedProtocol`` if nothing can connect to that."""
        if url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol(f"the URL has the scheme {url.scheme!r}, not http or https")
        # Not url.host, which decodes the name, and fails with one that cannot be.
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
        origin: Where it is.
        headers: What it is told besides, such as who asks.
    """

    origin: Origin
    headers: tuple[tuple[bytes, bytes], ...]

    def extra_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers that are not among others, which go before them: a second ``Host`` is a bad request."""
        names = {name.lower() for name, _ in headers}
        return [pair for pair in self.headers if pair[0].lower() not in names]

    def __repr__(self) -> str:
        # Without the headers: a password is in them.
        return f"<HttpProxy {self.origin}>"


class PeerClosed(httpx.RemoteProtocolError):
    """The server ended the connection before its answer was complete."""


class GuardedSocket(socket.socket):
    """A socket that another thread can shut down without ever hitting a descriptor that was closed and given out anew.

    asyncio closes it by ``close()``, under the same guard that ``sever()`` holds. uvloop closes the descriptor itself
    and calls ``detach()``; what protects there is that a connection learns of its loss, under the guard, before that.
    So no duplicate of the descriptor is needed. The guard is reentrant: a signal handler may come at any time.
    """

    __slots__ = ("_pid", "_shut_down", "guard")

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1) -> None:
        self.guard = threading.RLock()
        self._pid = os.getpid()
        # A socket that is not connected yet cannot be shut down: what connects it looks at this.
        self._shut_down = False
        super().__init__(family, kind, proto)
        self.setblocking(False)

    def connect(self, address: Any) -> None:
        """Connect, unless it has been severed.

        Raises:
            ConnectionAbortedError: It has been.
        """
        with self.guard:
            if self._shut_down:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was aborted before it was made")
            super().connect(address)

    def close(self) -> None:
        """Close the descriptor."""
        with self.guard:
            super().close()

    def detach(self) -> int:
        """Give the descriptor away."""
        with self.guard:
            return super().detach()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Hand the FIN to the kernel, and never connect any more; from any thread or signal handler."""
        if self._pid != os.getpid():
            # In a fork: the connection is still the parent's, which a shutdown would end there too.
            return
        with self.guard:
            self._shut_down = True
            try:
                super().shutdown(how)
            except OSError:
                # Not connected (yet, or any more), or closed: nothing to end.
                return

    def stale(self) -> bool:
        """Whether there is something to read: on an idle connection that is the peer's FIN, or nonsense."""
        try:
            self.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        return True


def encode_head(request: httpx.Request, proxy: HttpProxy | None = None) -> bytes:
    """Write the head of a request.

    Args:
        request: The request.
        proxy: Through which it goes. Over TLS it does not see the request: there is a tunnel through it.

    Raises:
        httpx.LocalProtocolError: A method, target or header that would break out of its place.
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
    """Return what of a header would break out of its place, if something would."""
    if not _TOKEN.fullmatch(name):
        return f"illegal header name {name!r}"
    if _NOT_IN_VALUE.search(value):
        # The value is not shown: it may be a key.
        return f"illegal character in the value of header {name!r}"
    return None


class ResponseParser:
    """The answer that is being read from a connection: the target of one httptools parser."""

    __slots__ = (
        "bodies",
        "done",
        "head_size",
        "headers",
        "keep_alive",
        "length",
        "method",
        "on_body",
        "parser",
        "reader",
        "reason",
        "room",
        "status",
        "trailing_data",
        "unparsed",
    )

    def __init__(self, reader: ResponseReader, method: str) -> None:
        self.reader = reader
        self.method = method
        # What the parser has found of the body in what it is being fed, a part an HTTP chunk. A server that sends a
        # token a chunk sends many at once to a reader that is behind: a list takes them at a twentieth of the cost of
        # a method of ours.
        self.bodies: list[bytes] = []
        self.on_body = self.bodies.append
        # How many of these are the answer's, once it is whole.
        self.length = 0
        self.parser: Any = httptools.HttpResponseParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.reason = b""
        self.status = 0
        self.head_size = 0
        self.unparsed = 0
        self.keep_alive = False
        self.done = False
        self.trailing_data = False
        self.room = True

    # -- called by the parser --

    def on_message_begin(self) -> None:
        self.trailing_data = self.trailing_data or self.done

    def on_status(self, reason: bytes) -> None:
        if not self.done:
            self.reason += reason
            self._count(len(reason))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if not self.status:
            self.headers.append((name, value.strip(b" \t")))

    def _count(self, size: int) -> None:
        self.head_size += size
        if self.head_size > MAX_HEAD_BYTES:
            raise _Refused(_TOO_LARGE)

    def on_headers_complete(self) -> None:
        if self.done:
            # Another answer behind this one, which only spoils the connection.
            return
        if self.bodies:
            raise _Refused(_BODY_FIRST)
        status = self.parser.get_status_code()
        if status < 200:
            if status == 101:
                raise _Refused("the server switched protocols, which nobody asked for")
            if status < 100:
                raise _Refused(f"the server's answer has the status {status:03}, which HTTP does not know")
            self.headers = []
            self.reason = b""
            return
        self.status = status
        version = b"HTTP/" + self.parser.get_http_version().encode("ascii")
        self.reader.feed_head(status, self.reason, self.headers, version)
        if self.method == "HEAD":
            # The parser cannot be told that no body follows, whatever the headers say.
            self._complete()

    def on_message_complete(self) -> None:
        if self.status and not self.done:
            self._complete()

    def _complete(self) -> None:
        self.done = True
        self.length = len(self.bodies)
        self.keep_alive = self.parser.should_keep_alive()

    # -- called by the connection --

    def feed(self, data: bytes | memoryview) -> None:
        """Parse what arrived; raises ``httpx.RemoteProtocolError``."""
        # A head, a trailer or the head of a chunk that has no end is kept by the parser: body resets the count.
        self.unparsed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise httpx.RemoteProtocolError("the server switched protocols, which nobody asked for") from None
        except httptools.HttpParserError as exc:
            # What a callback raises, the parser turns into an error of its own.
            cause = exc.__context__
            if cause is not None and not isinstance(cause, Exception):
                raise cause from None
            if self.done:
                # The answer is whole; whatever followed it only spoils the connection.
                self.trailing_data = True
                return
            raise httpx.RemoteProtocolError(self._explain(exc, data)) from exc
        finally:
            bodies = self.bodies
            if bodies:
                if not self.status:
                    # Of an interim answer, which has none: it would become a part of the answer's.
                    raise httpx.RemoteProtocolError(_BODY_FIRST)
                self.unparsed = 0
                if self.done:
                    self._only_the_answers()
                if bodies:
                    self.room = self.reader.feed_data(bodies[0] if len(bodies) == 1 else b"".join(bodies))
                    bodies.clear()
        if self.unparsed > MAX_HEAD_BYTES and not self.done:
            raise httpx.RemoteProtocolError(_TOO_LARGE)

    def _only_the_answers(self) -> None:
        if len(self.bodies) > self.length:
            self.trailing_data = True
            del self.bodies[self.length :]

    def _explain(self, exc: httptools.HttpParserError, received: bytes | memoryview) -> str:
        data = bytes(received[:8])
        cause = exc.__context__
        if isinstance(cause, _Refused):
            return str(cause)
        if not self.status and not data.startswith(b"HTTP/"):
            hint = "; is this a TLS port?" if data[:1] in (b"\x15", b"\x16") else ""
            return f"the server's answer is not HTTP{hint}"
        return f"the server's answer is broken HTTP: {exc}"

    def until_close(self) -> bool:
        """Whether the body has no end but that of the connection."""
        names = {name.lower() for name, _ in self.headers}
        return bool(self.status) and not names & {b"content-length", b"transfer-encoding"}


class _Refused(Exception):  # noqa: N818  (only for the way through the parser)
    """An answer that the parser would take, and we do not."""


_BODY_FIRST = "the server's answer has a body before its head"
_TOO_LARGE = f"the head of the server's answer is over {MAX_HEAD_BYTES:,} bytes"


class ConnectionOwner(Protocol):
    """Where a connection belongs.

    Attributes:
        buffer: Into which the connections of a loop read, one after the other.
        context: An empty one, in which everything runs that outlives the call that began it.
    """

    buffer: memoryview
    context: contextvars.Context

    def release(self, connection: Connection) -> None:
        """Its answer has come; it can take another request."""

    def connection_lost(self, connection: Connection) -> None:
        """It is gone."""


class Connection(asyncio.BaseProtocol):
    """One connection, used for one exchange at a time; what it reads is given to ``received()``."""

    __slots__ = (
        "_full",
        "_owner",
        "_parser",
        "_reader",
        "_sending",
        "_shut_down",
        "_source",
        "_transport",
        "_writable",
        "idle_since",
        "origin",
        "sock",
    )

    def __init__(self, sock: GuardedSocket, origin: Origin, home: ConnectionOwner) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.sock = sock
        self._owner = home
        self._transport: asyncio.Transport | None = None
        # What is paused.
        self._source: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._parser: ResponseParser | None = None
        self._sending = False
        self._shut_down = False
        self._writable: asyncio.Future[None] | None = None
        self._full = False

    # -- use, in the loop's thread --

    def begin(self, reader: ResponseReader, method: str, data: bytes, *, more: bool) -> None:
        """Send the head of a request (and its body, if it is all in ``data``), and await its answer.

        Args:
            reader: Where the answer goes.
            method: The request's.
            data: The first bytes.
            more: Whether the body is still to be written with ``write()``, up to ``end()``.
        """
        self._parser = ResponseParser(reader, method)
        self._reader = reader
        self._sending = more
        # First: once it is on the reader, an abort shuts the socket down, and nothing goes out any more.
        reader.attach(self)
        self.write(data)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the bytes written so far are few enough to write more; return at once when the connection is gone.

        Cancellation: safe.
        """
        if self._full and self._transport is not None:
            self._writable = asyncio.get_running_loop().create_future()
            try:
                await self._writable
            finally:
                self._writable = None

    @property
    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def request_sent(self) -> None:
        """The request's body has been written."""
        self._sending = False

    def usable(self) -> bool:
        """Whether an idle connection can take another request."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and not self._shut_down and not self.sock.stale()

    def close_exchange(self, why: str) -> None:
        """Close the connection at once, whatever it is doing."""
        reader = self._reader
        if reader is not None:
            reader.close(ExchangeOutcome("closed", why))
        self.close()

    def close(self) -> None:
        """Close an idle connection at once."""
        if not self._shut_down:
            self.sock.shutdown()
        if self._transport is not None:
            self._transport.abort()
        else:
            self.sock.close()

    # -- as the link of a reader --

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Put the FIN on its way, unless the connection serves another reader by now; from any thread."""
        with self.sock.guard:
            if self._reader is reader:
                self._shut_down = True
                self.sock.shutdown()

    def close_for(self, reader: ResponseReader) -> None:
        """Close the connection, unless it serves another reader by now."""
        if self._reader is reader:
            self.close()
            self._let_go()

    def shutdown(self) -> None:
        """Put the FIN on its way, whatever the connection is doing; from any thread."""
        with self.sock.guard:
            if self._transport is not None:
                self._shut_down = True
                self.sock.shutdown()

    def pause_reading(self) -> None:
        """Read no more for now."""
        if self._source is not None and not self.is_closing:
            self._source.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._source is not None and not self.is_closing:
            # The loop keeps the context in which it was told to read as long as it reads.
            self._owner.context.run(self._source.resume_reading)

    # -- called by the event loop --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self._transport = self._source = cast("asyncio.Transport", transport)

    def received(self, data: bytes | memoryview) -> None:
        """Parse what has been read, and hand over all that came at once, so that the reader is woken once."""
        answer, reader = self._parser, self._reader
        if answer is None or reader is None:
            # Nothing was asked.
            self.close()
            return
        try:
            reader.received_at = reader.loop.time()
            try:
                answer.feed(data)
            except httpx.RemoteProtocolError as exc:
                self._broken(exc)
                return
            if answer.done:
                self._finished(answer, reader)
            elif not answer.room:
                answer.room = True
                self.pause_reading()
        except BaseException as exc:
            self._interrupted(answer, reader, exc)

    def eof_received(self) -> bool:
        """The peer will send nothing more: that ends a body without framing, and breaks any other."""
        if self._shut_down:
            # Our own doing. Whoever did it gives the connection back in its turn; uvloop sees the ends of all that were
            # severed together before that. (Over TLS, asyncio does not let it wait.)
            return self.origin.scheme == "http"
        answer, reader = self._parser, self._reader
        if answer is not None and reader is not None:
            try:
                self._ended_by_peer(answer, reader)
            except BaseException as exc:
                self._interrupted(answer, reader, exc)
        return False

    def _ended_by_peer(self, answer: ResponseParser, reader: ResponseReader) -> None:
        if answer.until_close():
            answer.done = True
            self._let_go()
            reader.feed_eof()
            return
        where = "in the middle of its answer" if answer.status else "before it answered"
        # What a TLS server does with a request in the clear.
        hint = "" if answer.status or self.origin.scheme == "https" else "; if this is a TLS port, use https://"
        self._broken(PeerClosed(f"the server closed the connection {where}{hint}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone, by whoever's doing."""
        try:
            with self.sock.guard:
                self._transport = self._source = None
            detail = f": {exc}" if exc is not None else ""
            self._broken(httpx.ReadError(f"the connection was lost{detail}"))
            self.resume_writing()
        finally:
            self._owner.connection_lost(self)

    def pause_writing(self) -> None:
        """The peer reads too slowly."""
        self._full = True

    def resume_writing(self) -> None:
        """The peer has caught up, or is gone."""
        self._full = False
        if self._writable is not None:
            resolve(self._writable)

    def _finished(self, answer: ResponseParser, reader: ResponseReader) -> None:
        # An answer that came before the whole request was sent leaves the connection in the middle of that request.
        reusable = answer.keep_alive and not answer.trailing_data and not self._sending
        self._let_go()
        if reusable and not self._shut_down:
            self._owner.release(self)
        else:
            self.close()
        reader.feed_eof()

    def _interrupted(self, answer: ResponseParser, reader: ResponseReader, exc: BaseException) -> None:
        """Close the connection after Ctrl-C or the like: where the parser was in the answer, nobody knows any more."""
        # By itself: uvloop takes what its callbacks raise for an error of the connection.
        raise_in_loop(reader.loop, exc)
        if answer.done:
            reader.feed_eof()
        else:
            reader.set_exception(httpx.ReadError(f"reading the answer was interrupted by {type(exc).__name__}"))
            reader.drop_link()
        self.close()

    def _broken(self, error: Exception) -> None:
        reader = self._reader
        if reader is not None:
            self._let_go()
            reader.detach()
            reader.set_exception(error)
        self.close()

    def _let_go(self) -> None:
        # Under the guard: a thread that is about to sever on behalf of this reader does it before, or not at all.
        with self.sock.guard:
            self._reader = None
        # The parser holds bound methods of the answer, which holds the parser.
        if self._parser is not None:
            self._parser.parser = None
        self._parser = None


class PlainConnection(Connection, asyncio.BufferedProtocol):
    """A connection without TLS, which reads into the buffer of its loop.

    Left to itself, asyncio makes a buffer of 256 KiB for each read. So much memory is, depending on what the program
    has done before, got from the kernel and given back every time, which costs more than all the rest.
    """

    __slots__ = ()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read into; what is there has been parsed when the next one asks."""
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has been read."""
        self.received(self._owner.buffer[:nbytes])


class TlsConnection(Connection, asyncio.Protocol):
    """A connection with TLS.

    When the server has closed it, the event loops drop what they have not handed over yet: asyncio what is more than
    one buffer, if it is given buffers; uvloop all of it. So it takes everything that they have decrypted, at once, and
    what pauses is the connection under it.
    """

    __slots__ = ()

    def secured(self, plain: asyncio.Transport, tls: asyncio.Transport) -> None:
        """Start, when TLS has been agreed on over a connection."""
        self.connection_made(tls)
        self._source = plain

    def data_received(self, data: bytes) -> None:
        """Take what has been read."""
        self.received(data)
