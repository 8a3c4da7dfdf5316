"""``ConnectionPool``: the connections of one event loop, those that are idle and those that are being made."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Any

from ollama_async._loops import EmptyContext, in_loop

from .link import HIGH_WATER
from .outcome import ExchangeOutcome
from .tasks import cancel_once

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .connection import Connection
    from .dial import SocketDial, Sockets
    from .http1 import Origin
    from .reader import ResponseReader

_CLOSED = "the event loop or the client was closed"

# So many connections are begun in one round of the loop: a thousand at once would keep everything else waiting, and
# themselves: the first of them would be connected when the last of them has been begun.
_BEGUN_A_ROUND = 32


class ConnectionPool:
    """The connections of one event loop.

    Args:
        loop: The event loop.
        expiry: Seconds for which an idle connection is kept.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expiry: float) -> None:
        self.loop = loop
        self._expiry = expiry
        self._idle: dict[Origin, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        # As much as may wait to be read before reading pauses.
        self.buffer = memoryview(bytearray(HIGH_WATER))
        # A connection serves many calls, and must not keep what the first of them has in its context variables.
        self.context = EmptyContext()
        # The readers whose connection is being made.
        self.dialling: dict[ResponseReader, Dialling | SocketDial] = {}
        # The readers whose connection is begun in a later round, in order.
        self._waiting: dict[ResponseReader, None] = {}
        # One for each connection that was begun in this round.
        self._begun: list[None] = []
        self._loop_end = _close_with_loop(self)
        # asyncio.run() finishes the loop's async generators before it closes the loop: a generator that waits at a
        # yield is a hook into that moment which costs no task. Stepped by hand it neither awaits nor suspends.
        _step(self._loop_end.__anext__())

    def add(self, connection: Connection) -> None:
        """Take in a connection that has been made."""
        self._all.add(connection)

    def connection_lost(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._all.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)

    def release(self, connection: Connection) -> None:
        """Take back a connection that can serve another request."""
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

    async def turn(self, reader: ResponseReader) -> None:
        """Wait until a connection may be begun: at once, unless many were begun in this round of the loop.

        Raises:
            ExchangeEnded: The exchange was ended meanwhile.

        Cancellation: safe; nothing has been begun.
        """
        begun, waiting = self._begun, self._waiting
        if not begun:
            # Python calls no signal handler inside this function: after Ctrl-C at any line the count is right.
            self.loop.call_soon(begun.clear, context=self.context)
            if waiting:
                self.loop.call_soon(self._next_turns, context=self.context)
        begun.append(None)
        if len(begun) <= _BEGUN_A_ROUND:
            return
        try:
            if not waiting:
                self.loop.call_soon(self._next_turns, context=self.context)
            waiting[reader] = None
            while reader in waiting:
                await reader.wait()
        finally:
            waiting.pop(reader, None)

    def _next_turns(self) -> None:
        try:
            for reader in list(islice(self._waiting, _BEGUN_A_ROUND)):
                self._waiting.pop(reader, None)
                self._begun.append(None)
                reader.wake()
        finally:
            self.loop.call_soon(self._begun.clear, context=self.context)
            if self._waiting:
                self.loop.call_soon(self._next_turns, context=self.context)

    def dialled(self, reader: ResponseReader, _: asyncio.Task[Connection]) -> None:
        """Note that the attempt to make a connection has ended, well or badly."""
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
        for reader in [*self.dialling, *self._waiting]:
            reader.close(ExchangeOutcome("closed", _CLOSED))
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in list(self._all):
            connection.close_exchange(_CLOSED)
        self._all.clear()

    def close(self) -> None:
        """Close every connection and the hook into the loop's end; in the loop's thread, or when the loop is closed."""
        self.close_connections()
        _step(self._loop_end.aclose())

    def close_threadsafe(self) -> None:
        """Send every FIN now, and ``close()`` in the loop's thread; from any thread."""
        for connection in list(self._all):
            connection.shutdown()
        if self.loop.is_closed():
            # Its tasks and futures cannot be told anything any more.
            for connection in list(self._all):
                connection.sock.close()
            for reader, dialling in list(self.dialling.items()):
                dialling.close()
                # It leaves the tokens, which would hold it and its loop.
                reader.decide(ExchangeOutcome("closed"))
            for reader in list(self._waiting):
                reader.decide(ExchangeOutcome("closed"))
            self._all.clear()
            self.dialling.clear()
            self._waiting.clear()
            self.close()
        elif asyncio._get_running_loop() is self.loop:  # noqa: SLF001
            self.close()
        else:
            in_loop(self.loop, self.close)

    def __repr__(self) -> str:
        idle = sum(map(len, list(self._idle.values())))
        state = (
            "closed" if self._closed else f"{len(self._all)} connections, {idle} idle, {len(self.dialling)} dialling"
        )
        return f"<ConnectionPool: {state}>"


async def _close_with_loop(pool: ConnectionPool) -> AsyncGenerator[None, None]:
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


class Dialling:
    """A connection in the making, as the link of a reader: the sockets that are open, and the task that makes it."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets
        self.task: asyncio.Task[Connection] | None = None

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Send the FIN on each socket; from any thread."""
        self.sockets.shutdown()

    def close_for(self, reader: ResponseReader) -> None:
        """Stop the task, if there is one yet."""
        task = self.task
        if task is None:
            return
        if not task.done():
            cancel_once(task)
        elif not task.cancelled() and task.exception() is None:
            # Connected in the very moment in which the exchange ended.
            task.result().close()

    def close(self) -> None:
        """Close the sockets, after their loop was closed."""
        self.sockets.close()

    def pause_reading(self) -> None:
        """Nothing is read yet."""

    def resume_reading(self) -> None:
        """Nothing is read yet."""
