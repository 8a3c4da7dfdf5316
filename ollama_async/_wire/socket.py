"""``GuardedSocket``: a socket that any thread can shut down; here the FIN of every abort is sent."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
from typing import Any


class GuardedSocket(socket.socket):
    """A socket that another thread can shut down without ever hitting a descriptor that was closed and reused.

    asyncio closes the socket by ``close()``, under the same guard that ``shutdown()`` holds. uvloop closes the
    descriptor itself and calls ``detach()``; there the protection is that a connection learns of its loss, under the
    guard, before that. So no duplicate of the descriptor is needed. The guard is reentrant: a signal handler may run at
    any time.
    """

    __slots__ = ("_pid", "_shut_down", "guard")

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1) -> None:
        self.guard = threading.RLock()
        self._pid = os.getpid()
        # A socket that is not connected yet cannot be shut down: connect() looks at this mark.
        self._shut_down = False
        super().__init__(family, kind, proto)
        self.setblocking(False)

    def connect(self, address: Any) -> None:
        """Connect, unless the socket has been shut down.

        Raises:
            ConnectionAbortedError: The socket has been shut down.
        """
        with self.guard:
            self.raise_if_shut_down()
            super().connect(address)

    def raise_if_shut_down(self) -> None:
        """Raise ``ConnectionAbortedError`` if the socket has been shut down."""
        if self._shut_down:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was aborted before it was made")

    def close(self) -> None:
        """Close the descriptor."""
        with self.guard:
            super().close()

    def detach(self) -> int:
        """Give the descriptor away."""
        with self.guard:
            return super().detach()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Hand the FIN to the kernel and never connect again; from any thread or signal handler."""
        if self._pid != os.getpid():
            # In a forked child: the connection still belongs to the parent, and a shutdown would end it there too.
            return
        with self.guard:
            self._shut_down = True
            try:
                super().shutdown(how)
            except OSError:
                # Not connected (yet, or any more), or closed: there is nothing to end.
                return

    def stale(self) -> bool:
        """Whether there is something to read: on an idle connection that is the peer's FIN, or garbage."""
        if sys.platform == "win32":  # pragma: no cover  (it has no poll(); the coverage is measured on Linux)
            try:
                self.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True
            return True
        # Where there is poll(): each request asks, and an exception takes twice as long.
        if self.fileno() < 0:
            return True
        look = select.poll()
        look.register(self, select.POLLIN)
        return bool(look.poll(0))
