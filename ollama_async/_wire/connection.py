"""One connection: asyncio's protocol over a ``GuardedSocket``, which gives what it reads to a ``ResponseReader``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, cast

import httpx

from ollama_async._loops import raise_in_loop, resolve

from .outcome import ExchangeOutcome
from .parser import PeerClosed, ResponseParser
from .phase import Phase

if TYPE_CHECKING:
    import contextvars

    from .http1 import Origin
    from .reader import ResponseReader
    from .socket import GuardedSocket


# Separate names: Python 3.11 looks a member up in its enum by a call, and these are asked for every token or answer.
_SENDING, _WAITING, _HEAD = Phase.SENDING, Phase.WAITING, Phase.HEAD


class ConnectionOwner(Protocol):
    """The pool that a connection belongs to.

    Attributes:
        buffer: The buffer into which the connections of a loop read, one after the other.
        context: An empty one, in which everything runs that outlives the call that began it.
    """

    buffer: memoryview
    context: contextvars.Context

    def release(self, connection: Connection) -> None:
        """Take back a connection whose answer has arrived; it can serve another request."""

    def connection_lost(self, connection: Connection) -> None:
        """Forget a connection that is closed."""


class Connection(asyncio.BaseProtocol):
    """One connection, used for one exchange at a time; subclasses give what they read to ``received()``."""

    __slots__ = (
        "_full",
        "_owner",
        "_parser",
        "_reader",
        "_sending",
        "_served",
        "_shut_down",
        "_source",
        "_transport",
        "_writable",
        "idle_since",
        "origin",
        "sock",
    )

    def __init__(self, sock: GuardedSocket, origin: Origin, owner: ConnectionOwner) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.sock = sock
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        # The transport that is paused: over TLS the one below it.
        self._source: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._parser: ResponseParser | None = None
        # Answers that have arrived over this connection.
        self._served = 0
        self._sending = False
        self._shut_down = False
        self._writable: asyncio.Future[None] | None = None
        self._full = False

    # -- use, in the loop's thread --

    def begin(self, reader: ResponseReader, method: str, data: bytes, *, more: bool) -> None:
        """Send the head of a request (and its body, if ``data`` has all of it), and await its answer.

        Args:
            reader: The reader of the answer.
            method: The request's method.
            data: The first bytes of the request.
            more: Whether the body is still to be written with ``write()``, up to ``request_sent()``.
        """
        reader.enter(_SENDING if more else _WAITING)
        self._parser = ResponseParser(method)
        self._reader = reader
        self._sending = more
        # First: once the reader is attached, an abort shuts the socket down, and nothing goes out any more.
        reader.attach(self)
        self.write(data)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the bytes written so far are few enough to write more; return at once when the connection is lost.

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
        """Note that the request's body has been written."""
        self._sending = False

    def usable(self) -> bool:
        """Whether an idle connection can take another request."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and not self._shut_down and not self.sock.stale()

    def close_exchange(self, why: str) -> None:
        """Close the connection at once, whatever it is doing, and its exchange with it."""
        reader = self._reader
        if reader is not None:
            reader.close(ExchangeOutcome("closed", why))
        self.close()

    def close(self) -> None:
        """Close the connection at once; idempotent."""
        if not self._shut_down:
            self.sock.shutdown()
        if self._transport is not None:
            self._transport.abort()
        else:
            self.sock.close()

    def shutdown(self) -> None:
        """Send the FIN, whatever the connection is doing; from any thread."""
        with self.sock.guard:
            if self._transport is not None:
                self._shut_down = True
                self.sock.shutdown()

    def __repr__(self) -> str:
        if self._shut_down or self.is_closing:
            state = "closed"
        elif self._reader is None:
            state = "idle"
        else:
            state = self._reader.phase.name.lower()
        return f"<{type(self).__name__} to {self.origin}: {state}, {self._served} answered>"

    # -- as the link of a reader --

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Send the FIN, unless the connection serves another reader by now; from any thread."""
        with self.sock.guard:
            if self._reader is reader:
                self._shut_down = True
                self.sock.shutdown()

    def close_for(self, reader: ResponseReader) -> None:
        """Close the connection, unless it serves another reader by now."""
        if self._reader is reader:
            self.close()
            self._let_go()

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
        parser, reader = self._parser, self._reader
        if parser is None or reader is None:
            # Nothing was asked.
            self.close()
            return
        try:
            reader.received_at = reader.loop.time()
            body = parser.feed_data(data)
            if reader.phase < _HEAD and parser.head is not None:
                reader.feed_head(parser.head)
            room = not body or reader.feed_data(body)
            if parser.complete:
                self._finished(parser, reader)
            elif parser.error is not None:
                self._broken(parser.error)
            elif not room:
                self.pause_reading()
        except BaseException as exc:
            self._interrupted(parser, reader, exc)

    def eof_received(self) -> bool:
        """The peer will send nothing more: that ends a body without framing, and breaks any other."""
        if self._shut_down:
            # Our own FIN was the reason. The release queue gives the connection back in its turn; uvloop sees the ends
            # of all that were shut down together before that. (Over TLS, asyncio does not let it wait.)
            return self.origin.scheme == "http"
        parser, reader = self._parser, self._reader
        if parser is not None and reader is not None:
            try:
                self._ended_by_peer(parser, reader)
            except BaseException as exc:
                self._interrupted(parser, reader, exc)
        return False

    def _ended_by_peer(self, parser: ResponseParser, reader: ResponseReader) -> None:
        parser.feed_eof()
        if parser.error is None:
            self._let_go()
            reader.feed_eof()
            return
        self._broken(PeerClosed(f"{parser.error}{'' if parser.head else self._hint()}"))

    def _hint(self) -> str:
        """Say why a server may close a connection without an answer."""
        if self._served:
            return "; the connection had been kept open after an earlier answer, and the server may have given it up"
        # What a TLS server does with a request in the clear.
        return "" if self.origin.scheme == "https" else "; if this is a TLS port, use https://"

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the connection, whoever closed it."""
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
        """The peer has caught up, or the connection is lost."""
        self._full = False
        if self._writable is not None:
            resolve(self._writable)

    def _finished(self, parser: ResponseParser, reader: ResponseReader) -> None:
        # An answer that came before the whole request was sent leaves the connection in the middle of that request.
        reusable = parser.keep_alive and not parser.trailing_data and not self._sending
        self._served += 1
        self._let_go()
        if reusable and not self._shut_down:
            self._owner.release(self)
        else:
            self.close()
        reader.feed_eof()

    def _interrupted(self, parser: ResponseParser, reader: ResponseReader, exc: BaseException) -> None:
        """Close the connection after Ctrl-C or the like: the parser may have stopped anywhere in the answer."""
        # In its own callback: uvloop takes what its callbacks raise for an error of the connection.
        raise_in_loop(reader.loop, exc)
        if reader.phase < _HEAD and parser.head is not None:
            reader.feed_head(parser.head)
        body = parser.take_body()
        if body:
            reader.feed_data(body)
        if parser.complete:
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
        # Under the guard: a thread that is about to shut down on behalf of this reader does it before, or not at all.
        with self.sock.guard:
            self._reader = None
        if self._parser is not None:
            self._parser.close()
        self._parser = None


class PlainConnection(Connection, asyncio.BufferedProtocol):
    """A connection without TLS, which reads into the buffer of its loop.

    Left to itself, asyncio makes a buffer of 256 KiB for each read. Depending on what the program has done before, so
    much memory is got from the kernel and given back every time, which costs more than all the rest.
    """

    __slots__ = ()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer to read into; what is in it has been parsed when the next connection asks."""
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has been read."""
        self.received(self._owner.buffer[:nbytes])


class TlsConnection(Connection, asyncio.Protocol):
    """A connection with TLS.

    When the server has closed it, the event loops drop what they have not handed over yet: asyncio what is more than
    one buffer, if it is given buffers; uvloop all of it. So this takes everything that they have decrypted, at once,
    and the connection under it is paused.
    """

    __slots__ = ()

    def secured(self, plain: asyncio.Transport, tls: asyncio.Transport) -> None:
        """Start, when TLS has been agreed on over a connection."""
        self.connection_made(tls)
        self._source = plain

    def data_received(self, data: bytes) -> None:
        """Take what has been read."""
        self.received(data)
