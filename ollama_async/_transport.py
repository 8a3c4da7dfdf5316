"""``DirectTransport``: an ``httpx.AsyncBaseTransport`` whose every connection can be cut off at once, from anywhere.

Everything it owns (sockets, the tasks that dial and upload, the timer of idle connections) hangs on the reader of a
request or in the pool of an event loop, and both are given back synchronously.
"""

from __future__ import annotations

import asyncio
import ssl
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import httpx

from ._cancel import EmptyContext, LiveObject, in_loop
from ._channel import HIGH_WATER, ExchangeEnded, ExchangeOutcome, ResponseReader, cancel_once, join_cancelled
from ._dial import Sockets, explain_error, explain_tls_error, open_socket, open_tunnel, start_tls
from ._errors import RequestError
from ._guard import LEADS_ON, limited
from ._http import Connection, GuardedSocket, Origin, PlainConnection, TlsConnection
from ._proxy import http_proxy
from ._secret import Secret
from ._tls import TlsOptions
from ._upload import EncodedRequest, Upload

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
    from datetime import timedelta

__all__ = ["ANSWERED", "READER", "DirectTransport"]

Part = TypeVar("Part")
T = TypeVar("T")

# Under this name in ``request.extensions`` the library hands its reader through an httpx client to the transport.
READER = "ollama_async.reader"

# Under this name it says that the answer is there already, and httpx is to see to what concerns it alone: redirects
# and cookies.
ANSWERED = "ollama_async.answered"

# Shorter than the idle limits of common servers (uvicorn 5 s, nginx 75 s): of two ends that close an idle connection
# at the same moment the client's next request is the one that suffers.
KEEPALIVE_EXPIRY = 4.0

_CLOSED = "the event loop or the client was closed"


class _Pool:
    """The connections of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expiry: float) -> None:
        self.loop = loop
        self._expiry = expiry
        self._idle: dict[Origin, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        # As much as may wait to be read before reading stops.
        self.buffer = memoryview(bytearray(HIGH_WATER))
        # A connection serves many calls, and must not keep what the first of them has in its context variables.
        self.context = EmptyContext()
        # Channels whose connection is in the making.
        self.dialling: dict[ResponseReader, _Dialling] = {}
        self._guard = _close_with_loop(self)
        # asyncio.run() finishes the loop's async generators before it closes the loop: one generator that waits at a
        # yield is a hook into that moment which costs no task. Stepped by hand it neither awaits nor suspends.
        _step(self._guard.__anext__())

    def add(self, connection: Connection) -> None:
        self._all.add(connection)

    def connection_lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)

    def release(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
            return
        connection.idle_since = self.loop.time()
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._timer is None:
            self._timer = self.loop.call_later(self._expiry, self._sweep, context=self.context)

    def find(self, origin: Origin) -> Connection | None:
        """Return the connection that was used last, of those that are still good.

        It stays idle until it is ``taken()``: Ctrl-C in between leaves it where it was.
        """
        idle = self._idle.get(origin, [])
        oldest = self.loop.time() - self._expiry
        while idle:
            connection = idle[-1]
            if connection.idle_since >= oldest and connection.usable():
                return connection
            connection.close()
            idle.pop()
        return None

    def taken(self, connection: Connection) -> None:
        """Note that a connection that was found idle serves a request."""
        idle = self._idle[connection.origin]
        # Unless it was lost as soon as it was asked.
        if idle and idle[-1] is connection:
            idle.pop()

    def dialled(self, reader: ResponseReader, _: asyncio.Task[Connection]) -> None:
        """A connection has been made, or not."""
        self.dialling.pop(reader, None)
        reader.wake()

    def _sweep(self) -> None:
        self._timer = None
        oldest = self.loop.time() - self._expiry
        for connections in self._idle.values():
            while connections and connections[0].idle_since <= oldest:
                connections.pop(0).close()
        left = [connections[0].idle_since for connections in self._idle.values() if connections]
        if left:
            self._timer = self.loop.call_at(min(left) + self._expiry, self._sweep, context=self.context)

    def close_connections(self) -> None:
        """Close every connection now; in the loop's thread."""
        self._closed = True
        for reader in list(self.dialling):
            reader.close(ExchangeOutcome("closed", _CLOSED))
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in list(self._all):
            connection.close_exchange(_CLOSED)
        self._all.clear()

    def close(self) -> None:
        """Close every connection and the hook into the loop's end; in the loop's thread, or when it is closed."""
        self.close_connections()
        _step(self._guard.aclose())

    def close_threadsafe(self) -> None:
        """As ``retire()``, from anywhere."""
        for connection in list(self._all):
            connection.shutdown()
        if self.loop.is_closed():
            # Neither tasks nor futures of it can be told anything any more.
            for connection in list(self._all):
                connection.sock.close()
            for dialling in list(self.dialling.values()):
                dialling.sockets.close()
            self._all.clear()
            self.dialling.clear()
            self.close()
        elif asyncio._get_running_loop() is self.loop:  # noqa: SLF001
            self.close()
        else:
            in_loop(self.loop, self.close)


async def _close_with_loop(pool: _Pool) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        pool.close_connections()


def _step(awaitable: Any) -> None:
    """Run an awaitable that never suspends."""
    try:
        awaitable.send(None)
    except (StopIteration, StopAsyncIteration):
        return


class _Dialling:
    """A connection in the making: the task that makes it, and the sockets that it has opened."""

    def __init__(self, sockets: Sockets, task: asyncio.Task[Connection]) -> None:
        self.sockets = sockets
        self._task = task

    def shutdown_for(self, reader: ResponseReader) -> None:
        self.sockets.shutdown()

    def close_for(self, reader: ResponseReader) -> None:
        task = self._task
        if not task.done():
            cancel_once(task)
        elif not task.cancelled() and task.exception() is None:
            # Connected in the very moment in which nobody wanted it any more.
            task.result().close()

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return


class DirectTransport(LiveObject, httpx.AsyncBaseTransport):
    """An httpx transport for HTTP/1.1 over TCP, TLS and unix sockets that can be cut off at any moment.

    It is what ``AsyncClient`` uses by itself, and works under any ``httpx.AsyncClient(transport=DirectTransport())``.
    Connections are kept for reuse, one pool for each event loop, without an upper limit to their number. It honours
    httpx's ``connect`` and ``read`` timeouts. Leaving a response without its ``aclose()`` closes the connection at
    once: a loop over it by ``break`` or an exception, its iterator by ``aclose()``, the response by dropping it unread.

    Args:
        verify: As httpx: True (also for None), False, or an ``ssl.SSLContext``. The context is made when the first TLS
            connection is.
        cert: As httpx: a client certificate.
        trust_env: Whether ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are followed.
        uds: Path of a unix socket to connect to, whatever the URL's host.
        proxy: URL of a proxy of the scheme ``http``, or such an ``httpx.Proxy``. What goes to an ``https`` server goes
            through a tunnel (``CONNECT``).
        keepalive_expiry: Seconds for which an idle connection is kept.

    Raises:
        RequestError: A proxy that is none, or has another scheme.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | str | bool | None = True,
        cert: str | tuple[str, str] | tuple[str, str, str] | None = None,
        trust_env: bool = True,
        uds: str | None = None,
        proxy: str | httpx.Proxy | None = None,
        keepalive_expiry: float = KEEPALIVE_EXPIRY,
    ) -> None:
        # Passwords may be in both.
        via, certificate = Secret(proxy), Secret(cert)
        del proxy, cert
        self.proxy = None if via.value is None else http_proxy(via.value)
        if via.value is not None and (self.proxy is None or uds is not None):
            raise RequestError("proxy= takes a proxy of the scheme http, and does not go with uds=")
        self._tls = TlsOptions(verify, certificate, trust_env)
        self._ssl_context: ssl.SSLContext | None = None
        self._uds = uds
        self._expiry = keepalive_expiry
        self._pools: dict[asyncio.AbstractEventLoop, _Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its answer as soon as its head is there.

        Args:
            request: The request. Its body may be bytes, a sync or an async iterator; an answer that comes before an
                async iterator has ended ends the upload.

        Raises:
            httpx.TransportError: As httpx's own transport raises them.

        Cancellation: the connection is closed at once.
        """
        reader = request.extensions.get(READER) or ResponseReader(asyncio.get_running_loop())
        timeouts: dict[str, float | None] = request.extensions.get("timeout") or {}
        body = _Body(reader, timeouts.get("read"), ours=READER not in request.extensions)
        try:
            # Taken out: httpx hands the extensions on to the request that follows a redirect.
            if not request.extensions.pop(ANSWERED, False):
                await self._exchange(reader, body, request, timeouts)
        except ExchangeEnded as ended:
            raise _as_httpx(ended.end) from ended
        except BaseException as exc:
            reader.close(ExchangeOutcome("error", exc))
            raise
        ours = READER not in request.extensions
        stream: Any = body
        if ours and reader.status in LEADS_ON:
            stream = limited(body, reader.status, httpx.Headers(list(reader.headers)).get("content-encoding"))
        return _Response(reader, body, stream)

    async def _exchange(
        self, reader: ResponseReader, body: _Body, request: httpx.Request, timeouts: dict[str, float | None]
    ) -> None:
        if reader.status:
            reader.restart()
        await self.send(reader, EncodedRequest.of(request, self.proxy), timeouts.get("connect"))
        await body.in_time(reader.wait_for_head())

    async def aclose(self) -> None:
        """Close all connections, of every event loop, at once.

        Cancellation: safe; there is nothing to wait for.
        """
        self.close()

    def close(self) -> None:
        """Close all connections, of every event loop, at once; idempotent, from any thread."""
        for loop in list(self._pools):
            self._drop_pool(loop)

    def _drop_pool(self, loop: asyncio.AbstractEventLoop) -> None:
        pool = self._pools.pop(loop, None)
        if pool is not None:
            try:
                pool.close_threadsafe()
            except BaseException:
                # Ctrl-C: the next one who closes does the rest.
                self._pools.setdefault(loop, pool)
                raise

    def __del__(self) -> None:
        if hasattr(self, "_pools"):
            self.close()

    def _pool(self, loop: asyncio.AbstractEventLoop) -> _Pool:
        pool = self._pools.get(loop)
        if pool is None:
            # Other threads, with loops of their own, change the dict at the same time.
            for old in list(self._pools):
                if old.is_closed():
                    self._drop_pool(old)
            pool = self._pools[loop] = _Pool(loop, self._expiry)
        return pool

    # -- connecting --

    async def _new_connection(
        self, pool: _Pool, reader: ResponseReader, origin: Origin, timeout: float | None
    ) -> Connection:
        sockets = Sockets()
        task: asyncio.Task[Connection] | None = None
        try:
            dial = self._dial(pool, origin, sockets, timeout)
            # The task, and all that it makes, gets a copy of the pool's context in place of the caller's.
            task = pool.context.run(reader.loop.create_task, dial)
            dialling = pool.dialling[reader] = _Dialling(sockets, task)
            task.add_done_callback(partial(pool.dialled, reader))
            reader.attach(dialling)
            while not task.done():
                await reader.wait()
            return task.result()
        except BaseException:
            if task is not None and not task.done():
                # Mostly the reader has told it so already.
                sockets.shutdown()
                cancel_once(task)
            raise
        finally:
            # As dialled() does, if Ctrl-C came there.
            pool.dialling.pop(reader, None)
            if task is not None:
                await join_cancelled(task)

    async def _dial(self, pool: _Pool, origin: Origin, sockets: Sockets, timeout: float | None) -> Connection:
        via = f" through the proxy {self.proxy.origin}" if self.proxy else ""
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(pool, origin, sockets)
        except TimeoutError as exc:
            # The kernel's own "connection timed out" is a TimeoutError as well, with a number.
            if timeout is None or exc.errno is not None:
                raise httpx.ConnectError(f"cannot connect to {origin}{via}: {exc}") from exc
            raise httpx.ConnectTimeout(f"no connection to {origin} within {timeout:g} s") from exc
        except ssl.SSLError as exc:
            raise httpx.ConnectError(f"TLS with {origin} failed: {explain_tls_error(exc)}") from exc
        except OSError as exc:
            # Whichever of both it was: what ends a tunnel does not say.
            raise httpx.ConnectError(f"cannot connect to {self._uds or origin}{via}: {explain_error(exc)}") from exc
        except UnicodeError as exc:
            raise httpx.ConnectError(f"cannot connect to {origin}{via}: this is no host name ({exc})") from exc

    async def _connect(self, pool: _Pool, origin: Origin, sockets: Sockets) -> Connection:
        loop = pool.loop
        # The scheme alone says whether there is TLS, never that something is missing.
        secure = origin.scheme != "http"
        context = await self._context(loop) if secure else None
        proxy = self.proxy
        sock: GuardedSocket | None = None
        connection: Connection | None = None
        try:
            sock = await open_socket(loop, proxy.origin if proxy else origin, self._uds, sockets)
            if proxy and secure:
                await open_tunnel(loop, sock, origin, proxy)
            create = loop.create_connection if self._uds is None else loop.create_unix_connection
            if not secure:
                plain = connection = PlainConnection(sock, origin, pool)
                await create(lambda: plain, sock=sock)
            else:
                connection = TlsConnection(sock, origin, pool)
                await start_tls(connection, create, sock, context, origin.host)
            pool.add(connection)
            return connection  # noqa: TRY300  (Ctrl-C at this line leaves nothing either)
        except BaseException:
            if connection is not None:
                connection.close()
            elif sock is not None:
                sock.close()
            raise

    async def _context(self, loop: asyncio.AbstractEventLoop) -> ssl.SSLContext:
        context = self._ssl_context
        if context is None:
            context = await loop.run_in_executor(None, self._tls.context)
            self._ssl_context = context
        return context

    # -- sending --

    def send_at_once(self, reader: ResponseReader, outgoing: EncodedRequest) -> bool:
        """Send a request whose body is bytes, if there is a connection to its server already.

        Args:
            reader: Where the answer goes.
            outgoing: The request.

        Returns:
            Whether it has been sent; else use ``send()``.

        Raises:
            httpx.TransportError: The connection was lost in this moment.
        """
        if outgoing.blocks:
            return False
        pool = self._pool(reader.loop)
        connection = pool.find(outgoing.origin)
        if connection is None:
            return False
        _begin(connection, reader, outgoing)
        pool.taken(connection)
        return True

    async def send(self, reader: ResponseReader, outgoing: EncodedRequest, connect_timeout: float | None) -> None:
        """Send a request over a connection, on which the reader then hangs.

        Args:
            reader: Where the answer goes.
            outgoing: The request.
            connect_timeout: Seconds until a new connection must stand.

        Raises:
            Ended: The reader was ended meanwhile.
            httpx.TransportError: No connection, or a body that cannot go.

        Cancellation: the connection is closed at once; so is it when the reader is torn down after an error.
        """
        reader.check()
        pool, origin = self._pool(reader.loop), outgoing.origin
        found = pool.find(origin)
        connection = found or await self._new_connection(pool, reader, origin, connect_timeout)
        _begin(connection, reader, outgoing)
        if found is not None:
            pool.taken(found)
        blocks = outgoing.blocks
        if blocks is None:
            return
        reader.sent_at = 0.0
        upload = Upload(reader, connection, blocks, outgoing.length)
        reader.attach(upload)
        await upload.finished(reader)


def _begin(connection: Connection, reader: ResponseReader, outgoing: EncodedRequest) -> None:
    try:
        if connection.is_closing:
            raise httpx.ReadError("the connection was lost as soon as it was made")
        reader.last_activity_at = reader.sent_at = reader.loop.time()
        connection.begin(reader, outgoing.method, outgoing.data, more=outgoing.blocks is not None)
    except BaseException:
        connection.close()
        raise


def _as_httpx(end: ExchangeOutcome) -> BaseException:
    if isinstance(end.cause, BaseException):
        return end.cause
    return httpx.ReadError(f"the exchange was ended: {end.kind}")


class _Body(httpx.AsyncByteStream):
    """The body of an answer, for whoever reads it through httpx."""

    def __init__(self, reader: ResponseReader, read_timeout: float | None, *, ours: bool) -> None:
        self._reader = reader
        self._read_timeout = read_timeout
        self._timer: asyncio.TimerHandle | None = None
        # Whether nobody but the reader of this body says how the reader ends.
        self._ours = ours

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Reading(self, self._blocks())

    async def _blocks(self) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                block = await self.in_time(self._reader.read())
            except ExchangeEnded as ended:
                raise _as_httpx(ended.end) from ended
            if not block:
                return
            yield block

    async def in_time(self, awaitable: Awaitable[T]) -> T:
        """Wait for something, for as long as httpx lets a read wait."""
        seconds, loop = self._read_timeout, self._reader.loop
        try:
            if seconds is not None:
                late = ExchangeOutcome("error", httpx.ReadTimeout(f"the server sent nothing for {seconds:g} s"))
                self._timer = loop.call_later(seconds, self._reader.close, late, context=EmptyContext())
            return await awaitable
        finally:
            self._stop_timer()

    async def aclose(self) -> None:
        if self._reader.eof:
            return
        if self._ours:
            self._reader.close(ExchangeOutcome("closed"))
        else:
            # httpx closes a redirect that it does not follow before it says why: the end is what it says then.
            self._reader.drop_link()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self) -> None:
        """Nobody reads on: close the connection, unless the whole answer has arrived; from any thread."""
        if self._ours:
            self._reader.close_threadsafe(ExchangeOutcome("closed"))
        if self._timer is not None:
            # A Ctrl-C came before it was stopped.
            in_loop(self._reader.loop, self._stop_timer)

    def __del__(self) -> None:
        if hasattr(self, "_ours"):
            self.leave()


class _Reading(Generic[Part]):
    """What a loop holds while it reads a body. When it is dropped before the end, the connection is closed at once.

    An async generator alone is finished by the event loop, some rounds later, and each that it reads from later still.
    """

    __slots__ = ("_begun", "_body", "_generator")

    def __init__(self, body: _Body, generator: AsyncIterator[Part]) -> None:
        # One that has not begun has left nothing: the body can still be read by another one.
        self._begun = False
        self._body = body
        self._generator = generator

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        # What is waited for holds this: ``await anext(response.aiter_lines())`` drops it before the first line comes.
        self._begun = True
        return await self._generator.__anext__()

    async def aclose(self) -> None:
        """Close the connection, as leaving the loop does.

        Cancellation: safe; the connection is closed before anything is waited for.
        """
        self._leave()
        await cast("AsyncGenerator[Part, None]", self._generator).aclose()

    def _leave(self) -> None:
        if self._begun:
            self._body.leave()

    def __del__(self) -> None:
        if hasattr(self, "_generator"):
            self._leave()


class _Response(httpx.Response):
    """httpx's, but that dropping it unread, or what reads it, closes the connection."""

    # Not in its __dict__, which is what is pickled of a response.
    __slots__ = ("_body",)

    def __init__(self, reader: ResponseReader, body: _Body, stream: httpx.AsyncByteStream) -> None:
        self._body = body
        extensions = {"http_version": reader.http_version, "reason_phrase": reader.reason_phrase}
        super().__init__(reader.status, headers=list(reader.headers), stream=stream, extensions=extensions)

    # httpx's client puts a stream around the body that notes how long the answer took. It holds the response, which
    # holds it: only the garbage collector would free the two.
    @property
    def stream(self) -> httpx.SyncByteStream | httpx.AsyncByteStream:
        stream: httpx.SyncByteStream | httpx.AsyncByteStream = self.__dict__["stream"]
        return stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        if getattr(stream, "_response", None) is self:
            stream._response = _Elapsed(self)  # noqa: SLF001  (httpx has no other name for it)
        self.__dict__["stream"] = stream

    def aiter_raw(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._reading(super().aiter_raw(chunk_size))

    def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._reading(super().aiter_bytes(chunk_size))

    def aiter_text(self, chunk_size: int | None = None) -> AsyncIterator[str]:
        return self._reading(super().aiter_text(chunk_size))

    def aiter_lines(self) -> AsyncIterator[str]:
        return self._reading(super().aiter_lines())

    def _reading(self, generator: AsyncIterator[Part]) -> AsyncIterator[Part]:
        # One that was pickled has no body to be closed.
        return _Reading(self._body, generator) if hasattr(self, "_body") else generator


class _Elapsed:
    """Where httpx notes how long an answer took; it does not keep the response alive."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = weakref.ref(response)

    def _note(self, elapsed: timedelta) -> None:
        response = self._response()
        if response is not None:
            response.elapsed = elapsed

    elapsed = property(fset=_note)
