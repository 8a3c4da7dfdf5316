"""``DirectTransport``: a transport of httpx or httpx2 whose every connection can be closed at once, from anywhere.

Everything it owns (sockets, the tasks that dial and upload, the timer of idle connections) hangs on the reader of an
answer or in the pool of an event loop, and both are closed synchronously.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._errors import RequestError
from ollama_async._group import CallGroup
from ollama_async._loops import EmptyContext
from ollama_async._secret import Secret

from . import dial
from .connection import Connection, PlainConnection, TlsConnection
from .dial import SocketDial, Sockets, explain_error, explain_tls_error, open_socket, open_tunnel, start_tls
from .family import as_error_of, package_of
from .guard import LEADS_ON, limited
from .http1 import EncodedRequest
from .intercept import through_httpx, transport_is_intercepted
from .logged import new_reader
from .outcome import ExchangeEnded, ExchangeOutcome
from .phase import Phase
from .pool import ConnectionPool, Dialling
from .proxy import http_proxy
from .reader import ResponseReader
from .response import Body, as_httpx_error, body_of, response_of
from .tasks import join_cancelled
from .tls import TlsOptions
from .upload import Upload
from .watch import EndByToken

if TYPE_CHECKING:
    from .http1 import HttpProxy, Origin
    from .parser import Head
    from .socket import GuardedSocket

# Under this name in ``request.extensions`` the library hands its reader through an httpx client to the transport.
READER = "ollama_async.reader"

# Under this name it says that the answer has arrived already, and httpx is to see to what concerns it alone: redirects
# and cookies.
ANSWERED = "ollama_async.answered"

# Shorter than the idle limits of common servers (uvicorn 5 s, nginx 75 s): if both ends close an idle connection at the
# same moment, the client's next request is the one that suffers.
KEEPALIVE_EXPIRY = 4.0


class ClosableTransport(LiveObject):
    """``DirectTransport``, but for the one base class that httpx and httpx2 each want."""

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | str | bool | None = True,
        cert: str | tuple[str, str] | tuple[str, str, str] | None = None,
        trust_env: bool = True,
        uds: str | None = None,
        proxy: str | httpx.Proxy | None = None,
        keepalive_expiry: float = KEEPALIVE_EXPIRY,
        token: CancelToken | None = None,
        close_on_cancel: bool = False,
    ) -> None:
        # Passwords may be in both.
        via, certificate = Secret(proxy), Secret(cert)
        del proxy, cert
        self.proxy: HttpProxy | None = None if via.value is None else http_proxy(via.value)
        if via.value is not None and (self.proxy is None or uds is not None):
            raise RequestError("proxy= needs an http:// proxy, and cannot be combined with uds=")
        self._tls = TlsOptions(verify, certificate, trust_env)
        self._ssl_context: ssl.SSLContext | None = None
        self._uds = uds
        self._expiry = keepalive_expiry
        if token is not None and not issubclass(type(token), CancelToken):
            raise RequestError(f"token={type(token).__name__}: give a CancelToken")
        self._token = token
        self._close_on_cancel = close_on_cancel
        self._calls = CallGroup()
        self._pools: dict[asyncio.AbstractEventLoop, ConnectionPool] = {}

    def abort(self, reason: object = None) -> None:
        """End all requests of this transport that are under way, from any task, thread or signal handler.

        When it returns, their sockets have been shut down. A task that waits for an answer, or reads one, gets an
        ``AbortError``. The transport stays usable.

        Args:
            reason: What ``AbortError.reason`` will be.
        """
        self._calls.abort(reason)

    def scope(self) -> AbstractContextManager[anyio.CancelScope]:
        """Put a block under this transport: ``with transport.scope(): await framework(...)``.

        ``abort()`` of the transport, and its token, then cancel the block as ``CancelToken.scope()`` does: nothing in
        it begins anew, whatever it catches.

        Raises:
            AbortError: The transport or its token was aborted, and that ended the block.
        """
        return self._calls.scope(self._token)

    @property
    def tokens(self) -> list[CancelToken]:
        """The tokens that a request that begins now is under."""
        current = self._calls.current()
        return [current] if self._token is None else [current, self._token]

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request and return its answer as soon as its head has arrived.

        Args:
            request: The request. Its body may be bytes, a sync or an async iterator; an answer that comes before an
                async iterator has ended ends the upload.

        Raises:
            TransportError: As the transports of httpx and httpx2 raise them, of the package that the request is of.
            AbortError: ``abort()`` of the transport or of its token ended the request.

        Cancellation: the connection is closed at once.
        """
        package = package_of(request, "Request")
        if transport_is_intercepted(package):
            return await through_httpx(package, request, self._handle)
        return await self._handle(request)

    async def _handle(self, request: Any) -> Any:
        package = package_of(request, "Request")
        ours = READER not in request.extensions
        # A call of ``AsyncClient`` is under the tokens of this transport already.
        reader = request.extensions.get(READER) or self._new_reader()
        timeouts: dict[str, float | None] = request.extensions.get("timeout") or {}
        body = body_of(package, reader, timeouts.get("read"), ours=ours)
        try:
            # Taken out: httpx hands the extensions on to the request that follows a redirect.
            if not request.extensions.pop(ANSWERED, False):
                await self._exchange(reader, body, request, timeouts)
        except ExchangeEnded as ended:
            raise as_httpx_error(ended.outcome, package) from ended
        except BaseException as exc:
            reader.close(ExchangeOutcome("error", exc))
            error = as_error_of(package, exc)
            if error is not exc:
                raise error from exc
            raise
        stream: Any = body
        if ours and reader.status in LEADS_ON:
            stream = limited(body, reader.status, httpx.Headers(list(reader.head.headers)).get("content-encoding"))
        return response_of(package, reader, body, stream)

    def _new_reader(self) -> ResponseReader:
        return _Stops(self.tokens, asyncio.current_task() if self._close_on_cancel else None).reader

    async def _exchange(
        self, reader: ResponseReader, body: Body, request: Any, timeouts: dict[str, float | None]
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
                # Ctrl-C: the next close() does the rest.
                self._pools.setdefault(loop, pool)
                raise

    def __del__(self) -> None:
        if hasattr(self, "_pools"):
            self.close()

    def _pool(self, loop: asyncio.AbstractEventLoop) -> ConnectionPool:
        pool = self._pools.get(loop)
        if pool is None:
            # Other threads, with their own loops, change the dict at the same time.
            for old in list(self._pools):
                if old.is_closed():
                    self._drop_pool(old)
            pool = self._pools[loop] = ConnectionPool(loop, self._expiry)
        return pool

    # -- connecting --

    async def _new_connection(
        self, pool: ConnectionPool, reader: ResponseReader, origin: Origin, timeout: float | None
    ) -> Connection:
        reader.enter(Phase.CONNECTING)
        await pool.turn(reader)
        bare = origin.scheme == "http" and self.proxy is None and self._uds is None and timeout is None
        family = dial.family_of(origin.host) if bare and dial.WATCHES_SOCKETS else None
        if family is not None:
            return await self._connect_at(pool, reader, origin, family)
        link = Dialling(Sockets())
        try:
            pool.dialling[reader] = link
            # Before there is a task: an eager one opens sockets while it is being made.
            reader.attach(link)
            reader.check()
            # The task, and all that it makes, gets a copy of the pool's context in place of the caller's.
            task = link.task = pool.context.run(pool.loop.create_task, self._dial(pool, origin, link.sockets, timeout))
            task.add_done_callback(partial(pool.dialled, reader))
            while not task.done():
                await reader.wait()
            reader.check()
            return task.result()
        except BaseException:
            # Mostly the reader has told it so already.
            link.shutdown_for(reader)
            link.close_for(reader)
            raise
        finally:
            # As dialled() does, if Ctrl-C came there.
            pool.dialling.pop(reader, None)
            if link.task is not None:
                await join_cancelled(link.task)

    async def _connect_at(self, pool: ConnectionPool, reader: ResponseReader, to: Origin, family: int) -> Connection:
        """Connect in the task of the caller: its only other wait is one round of the loop, for the transport."""
        link: SocketDial | None = None
        connection: PlainConnection | None = None
        try:
            link = pool.dialling[reader] = SocketDial(pool.loop, family, pool.dialling)
            reader.attach(link)
            reader.check()
            await link.connect(reader, (to.host, to.port))
            plain = connection = PlainConnection(link.sock, to, pool)
            link.hand_over()
            await dial.in_context(pool.context, pool.loop.create_connection(lambda: plain, sock=link.sock))
            pool.add(connection)
            reader.check()
            return connection  # noqa: TRY300  (Ctrl-C at this line leaves nothing either)
        except BaseException as exc:
            if connection is not None:
                connection.close()
            elif link is not None:
                link.close()
            if isinstance(exc, OSError):
                raise httpx.ConnectError(f"cannot connect to {to}: {explain_error(exc)}") from exc
            raise
        finally:
            pool.dialling.pop(reader, None)

    async def _dial(self, pool: ConnectionPool, origin: Origin, sockets: Sockets, timeout: float | None) -> Connection:
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
            # Whichever of the two hops it was: what ends a tunnel does not say.
            raise httpx.ConnectError(f"cannot connect to {self._uds or origin}{via}: {explain_error(exc)}") from exc
        except UnicodeError as exc:
            raise httpx.ConnectError(f"cannot connect to {origin}{via}: invalid host name ({exc})") from exc

    async def _connect(self, pool: ConnectionPool, origin: Origin, sockets: Sockets) -> Connection:
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
        if (context := self._ssl_context) is None:
            context = await loop.run_in_executor(None, self._tls.context)
            self._ssl_context = context
        return context

    # -- sending --

    def send_at_once(self, reader: ResponseReader, request: EncodedRequest) -> bool:
        """Send a request whose body is bytes, if there is an idle connection to its server.

        Args:
            reader: The reader of the answer.
            request: The request.

        Returns:
            Whether it has been sent; if not, use ``send()``.

        Raises:
            httpx.TransportError: The connection was lost in this moment.
        """
        if request.blocks:
            return False
        pool = self._pool(reader.loop)
        connection = pool.find(request.origin)
        if connection is None:
            return False
        _begin(connection, reader, request)
        pool.taken(connection)
        return True

    async def send(self, reader: ResponseReader, request: EncodedRequest, connect_timeout: float | None) -> None:
        """Send a request over a connection, which becomes the reader's link.

        Args:
            reader: The reader of the answer.
            request: The request.
            connect_timeout: Seconds until a new connection must stand, ``None`` for no limit.

        Raises:
            ExchangeEnded: The exchange was ended meanwhile.
            httpx.TransportError: There is no connection, or the body cannot be sent.

        Cancellation: the connection is closed at once; so it is when the reader is closed after an error.
        """
        reader.check()
        pool, origin = self._pool(reader.loop), request.origin
        found = pool.find(origin)
        connection = found or await self._new_connection(pool, reader, origin, connect_timeout)
        _begin(connection, reader, request)
        if found is not None:
            pool.taken(found)
        if request.blocks is None:
            return
        upload = Upload(reader, connection, request.blocks, request.length)
        reader.attach(upload)
        await upload.finished(reader)


class DirectTransport(ClosableTransport, httpx.AsyncBaseTransport):
    """An httpx transport for HTTP/1.1 over TCP, TLS and unix sockets whose connections can be closed at any moment.

    ``AsyncClient`` uses it by default, and it works under any ``httpx.AsyncClient(transport=DirectTransport())``;
    ``ollama_async.httpx2`` has the same for httpx2.
    Connections are kept for reuse, one pool for each event loop, without an upper limit to their number. It honours
    httpx's ``connect`` and ``read`` timeouts. Leaving a response without its ``aclose()`` closes the connection at
    once: a loop over it by ``break`` or an exception, its iterator by ``aclose()``, the response by dropping it unread.

    Args:
        verify: As httpx: True (also for None), False, or an ``ssl.SSLContext``. The context is made when the first TLS
            connection is.
        cert: As httpx: a client certificate.
        trust_env: Whether ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are followed.
        uds: Path of a unix socket to connect to, whatever the URL's host.
        proxy: URL of a proxy of the scheme ``http``, or such an ``httpx.Proxy``. Requests to an ``https`` server go
            through a tunnel (``CONNECT``).
        keepalive_expiry: Seconds for which an idle connection is kept.
        token: A token for every request. Tasks that wait for an answer, or read one, get an ``AbortError``.
        close_on_cancel: Whether an answer is closed when the task that asked for it ends cancelled, even if other code
            holds the answer: for programs whose clean-up a second cancellation interrupts.

    Raises:
        RequestError: The proxy's URL is invalid, or has another scheme; or the token is not a ``CancelToken``.
    """

    if TYPE_CHECKING:

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            """Send a request and return its answer as soon as its head has arrived."""
            raise NotImplementedError


class _Stops:
    """Ends a request that is not a call of ours with the tokens of its transport, and its task; it owns the reader."""

    def __init__(self, tokens: list[CancelToken], task: asyncio.Task[Any] | None) -> None:
        self.reader: ResponseReader = new_reader(asyncio.get_running_loop(), self)
        self._task = task
        if task is not None:
            task.add_done_callback(self._task_ended, context=EmptyContext())
        self._watches = [EndByToken(token, self.reader) for token in tokens]
        for watch in self._watches:
            watch.arm()
        if self.reader.outcome is not None:
            self.outcome_decided()

    def head_arrived(self, head: Head) -> None:
        """There are no limits here that the head would change."""

    def outcome_decided(self) -> None:
        """Leave the tokens; in any thread."""
        for watch in self._watches:
            watch.remove()

    def link_released(self) -> None:
        """Leave the task, which may make many requests."""
        task, self._task = self._task, None
        if task is not None:
            task.remove_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        # One that ends by itself may have handed the answer on: asyncio.wait_for() of Python 3.11 makes such tasks.
        if task.cancelled():
            self.reader.close(ExchangeOutcome("cancelled"))


def _begin(connection: Connection, reader: ResponseReader, request: EncodedRequest) -> None:
    try:
        if connection.is_closing:
            raise httpx.ReadError("the connection was lost as soon as it was made")
        connection.begin(reader, request.method, request.data, more=request.blocks is not None)
    except BaseException:
        connection.close()
        raise
