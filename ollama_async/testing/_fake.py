"""`FakeOllama`: a real HTTP/1.1 server on its own thread and event loop."""

import asyncio
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from ._connection import Connection, Host, Play
from ._ollama import Ollama
from ._recording import Recording
from ._records import ConnectionRecord, Journal, RequestRecord
from ._script import Reply

_BACKLOG = 1024
_STOP_TIMEOUT = 10.0
# Python on Windows has none, not even the name.
_AF_UNIX: int | None = getattr(socket, "AF_UNIX", None)


if TYPE_CHECKING:
    from ._record import Recorder


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
        self._host = Host(self._journal, ssl, silent, self._scripted, self._answer, self._failed)
        self._thread: threading.Thread | None = None
        # What answers the requests that no script answers, before the built-in behaviour does.
        self._recorder: Recorder | None = None
        self._recording: Recording | None = None

    @classmethod
    def record(cls, upstream: str | None, file: str | os.PathLike[str], **options: Any) -> Self:
        """Make a server that passes requests on to a real one, and keeps what happens in a file.

        Scripts go before the real server, and are not recorded. A client that leaves ends its request there at once.

        Args:
            upstream: address of the real server, in the form of `OLLAMA_HOST`; None for what that says.
            file: is made by `start()`. Each exchange is in it as soon as it is over; keys never are.
            **options: those of the class.

        Returns:
            The server, not started yet.

        Raises:
            HostError: the address is invalid.
        """
        # Imported here: it needs httpx, and each run of pytest imports this module.
        from ._record import Recorder

        server = cls(**options)
        server._recorder = Recorder(upstream, file)
        return server

    @classmethod
    def replay(cls, file: str | os.PathLike[str], *, speed: float = 1.0, **options: Any) -> Self:
        """Make a server that answers as a recording says; the built-in behaviour answers what is not in it.

        A request gets the answer of the first exchange with its method, path and body that has not been played yet; if
        none has its body, that of the first one with its method and path. When all have been played, they start again.

        Args:
            file: the recording, as `record()` has made it, or written by hand.
            speed: how many times as fast as it was recorded; `math.inf` plays without pauses.
            **options: those of the class.

        Returns:
            The server, not started yet.

        Raises:
            RecordingError: the file is not a recording; the text names the line.
            RequestError: the speed is not a positive number.
        """
        server = cls(**options)
        server._recording = Recording(file, speed)
        return server

    def start(self) -> Self:
        """Listen; does nothing when the server is running.

        Returns:
            The server.

        Raises:
            OSError: the address cannot be used, or the file of a recording cannot be made.
            RecordingError: the file of a recording exists.
        """
        if self._thread is None:
            # Whatever can fail does so here, and clients can connect as soon as this returns: the kernel queues them.
            if self._recorder is not None:
                self._recorder.begin()
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
            TimeoutError: there were fewer; the text lists them.
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
            TimeoutError: there were fewer; the text lists them.
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
        if self._recorder is not None:
            self._recorder.close()

    async def _answer(self, request: RequestRecord, play: Play) -> bool:
        if self._recorder is not None:
            return await self._recorder.relay(request, play)
        reply = None if self._recording is None else self._recording.answer(request)
        return await play(reply or self._ollama.answer(request))

    def _scripted(self, path: str) -> Reply | None:
        with self._journal.changed:
            queue = self._queued.get(path)
            return queue.popleft() if queue else self._repeated.get(path)

    def _failed(self, failure: Exception) -> None:
        self._failure = self._failure or failure

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Keep a defect for `stop()`; a client that vanishes in the middle of a system call does not count."""
        failure = context.get("exception")
        if isinstance(failure, Exception) and not isinstance(failure, OSError):
            self._failed(failure)
