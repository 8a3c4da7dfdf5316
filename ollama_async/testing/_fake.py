"""`FakeOllama`: a real HTTP/1.1 server on a thread and an event loop of its own."""

import asyncio
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from ._connection import Connection, Host
from ._ollama import Ollama
from ._records import ConnectionRecord, Journal, RequestRecord
from ._script import Reply

_BACKLOG = 1024
_STOP_TIMEOUT = 10.0
# Python on Windows has none, not even the name.
_AF_UNIX: int | None = getattr(socket, "AF_UNIX", None)


class FakeOllama:
    """An Ollama server on loopback that can be scripted, injects faults, and records what each client connection did.

    It answers and observes from its own thread, so its blocking methods may be called while the client's event loop
    stands still. Where the client has to make progress meanwhile, call them through `asyncio.to_thread`.

    Attributes:
        uds: the path of the unix socket, if it listens on one.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        uds: str | None = None,
        ssl: ssl.SSLContext | None = None,
        models: Sequence[str] = ("fake",),
        paths: Sequence[str] = (),
        interval: float = 0.02,
        silent: bool = False,
    ) -> None:
        """Configure the server; `start()` or `with` starts it.

        Args:
            host: the address to listen on.
            port: the port, 0 for a free one; a server that is started again takes the same one again.
            uds: the path of a unix socket to listen on instead.
            ssl: a server context: the server then speaks TLS.
            models: the names that the built-in behaviour knows.
            paths: under `/api` and `/v1` that may be scripted although this version knows no such route of Ollama's.
            interval: seconds between two tokens of the built-in behaviour.
            silent: accept and record connections, but never answer anything, not even a TLS handshake.
        """
        self.uds = uds
        self._address, self._port = host, port
        self._scheme = "http" if ssl is None else "https"
        self._journal = Journal()
        self._queued: dict[str, deque[Reply]] = {}
        self._repeated: dict[str, Reply] = {}
        self._failure: Exception | None = None
        self._ollama, self._paths = Ollama(models, interval), frozenset(paths)
        self._host = Host(self._journal, ssl, silent, self._scripted, self._ollama.answer, self._failed)
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen; does nothing when the server is running.

        Returns:
            The server.

        Raises:
            OSError: the address cannot be used.
        """
        if self._thread is None:
            # Whatever can fail does so here, and clients can connect as soon as this returns: the kernel queues them.
            listener = self._listen()
            try:
                # Always asyncio's own loop, whatever policy the code under test has installed.
                self._loop, self._quit = asyncio.SelectorEventLoop(), asyncio.Event()
            except BaseException:
                listener.close()
                raise
            self._thread = threading.Thread(target=self._run, args=(listener,), name="fake-ollama", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Close every connection and end the thread; does nothing when the server is not running.

        Raises:
            RuntimeError: a script failed on the server's side (the cause says how), or the thread did not end.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._loop.call_soon_threadsafe(self._quit.set)
            thread.join(_STOP_TIMEOUT)
            if thread.is_alive():
                raise RuntimeError(f"the fake server is still busy after {_STOP_TIMEOUT} s")
            if self.uds is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self.uds)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError("the fake server failed") from failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The TCP port; 0 until it is known, and on a unix socket."""
        return self._port

    @property
    def url(self) -> str:
        """The base URL for a client, without a slash at the end."""
        if self.uds is not None:
            return f"{self._scheme}://localhost"
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"{self._scheme}://{host}:{self._port}"

    def script(self, path: str, *replies: Reply, always: bool = False) -> None:
        """Queue replies for the next requests to a path; when none is left, the built-in behaviour answers.

        Args:
            path: without a query, for any method. Under `/api` and `/v1` it is one that Ollama has, or one of the
                server's `paths`; others, such as a redirect's target, are taken as they are.
            *replies: one for each request, in order of the requests' heads.
            always: the last one is not used up: it answers whenever nothing is queued.

        Raises:
            ValueError: no reply was given, or Ollama has no such path.
            TypeError: one of the replies is not a `Reply`.
        """
        if not replies:
            raise ValueError("a script needs at least one reply")
        for reply in replies:
            if not isinstance(reply, Reply):
                raise TypeError(f"a script takes replies, such as Reply.chat('Hi') or Reply.json(...), not {reply!r}")
        mistake = None if path in self._paths else self._ollama.mistake_in(path)
        if mistake is not None:
            raise ValueError(f"{mistake}; to script it in any case: FakeOllama(paths=[{path!r}])")
        with self._journal.changed:
            once = replies[:-1] if always else replies
            self._queued.setdefault(path, deque()).extend(once)
            if always:
                self._repeated[path] = replies[-1]

    @property
    def connections(self) -> tuple[ConnectionRecord, ...]:
        """The connections, in order of acceptance."""
        with self._journal.changed:
            return tuple(self._journal.connections)

    @property
    def requests(self) -> tuple[RequestRecord, ...]:
        """All requests whose head has been read, in order."""
        with self._journal.changed:
            return tuple(self._journal.requests)

    def wait_for_requests(
        self, count: int = 1, *, path: str | None = None, timeout: float = 5.0
    ) -> tuple[RequestRecord, ...]:
        """Block until the heads of that many requests have been read.

        Args:
            count: how many.
            path: only requests to this path (without a query) count.
            timeout: seconds to wait.

        Returns:
            All of them that there are.

        Raises:
            TimeoutError: there were fewer; the text lists what came.
        """

        def select() -> list[RequestRecord]:
            return [request for request in self._journal.requests if path is None or request.route == path]

        return self._journal.wait(select, count, f"requests to {path or 'any path'}", timeout)

    def wait_for_connections(self, count: int = 1, *, timeout: float = 5.0) -> tuple[ConnectionRecord, ...]:
        """Block until that many connections have been accepted.

        Args:
            count: how many.
            timeout: seconds to wait.

        Returns:
            All of them that there are.

        Raises:
            TimeoutError: there were fewer; the text lists what came.
        """
        return self._journal.wait(lambda: self._journal.connections, count, "connections", timeout)

    def forget(self) -> None:
        """Drop all scripts, and the records of connections that are over."""
        with self._journal.changed:
            self._queued.clear()
            self._repeated.clear()
            self._journal.forget_ended()

    def _listen(self) -> socket.socket:
        if self.uds is None:
            family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
            listener = socket.create_server((self._address, self._port), family=family, backlog=_BACKLOG)
            self._port = listener.getsockname()[1]
            return listener
        if _AF_UNIX is None:
            raise OSError("this system has no unix sockets: leave out uds= to listen on a port")
        listener = socket.socket(_AF_UNIX)
        try:
            listener.bind(self.uds)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(debug=False, loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        """Accept until `stop()`.

        Not `loop.create_server`: when it is closed just as a connection comes in, that socket is left behind (3.11).
        """
        self._loop.set_exception_handler(self._on_loop_error)
        arrivals: set[asyncio.Task[object]] = set()

        def accept() -> None:
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            if self.uds is None:
                # asyncio sets it only on sockets that name their protocol; a reply in small writes would take 40 ms.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            arrival = self._loop.create_task(self._loop.connect_accepted_socket(lambda: Connection(self._host), sock))
            arrivals.add(arrival)
            arrival.add_done_callback(arrivals.discard)

        listener.setblocking(False)
        self._loop.add_reader(listener, accept)
        await self._quit.wait()
        self._loop.remove_reader(listener)
        listener.close()
        if arrivals:
            await asyncio.wait(arrivals)
        while self._host.live:
            for connection in tuple(self._host.live):
                connection.abort()
            await asyncio.sleep(0)

    def _scripted(self, path: str) -> Reply | None:
        with self._journal.changed:
            queue = self._queued.get(path)
            return queue.popleft() if queue else self._repeated.get(path)

    def _failed(self, failure: Exception) -> None:
        self._failure = self._failure or failure

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Keep a defect for `stop()`; a client that vanishes in the middle of a system call is none."""
        failure = context.get("exception")
        if isinstance(failure, Exception) and not isinstance(failure, OSError):
            self._failed(failure)
