"""What the server saw: written by its thread, read and waited for by the test's.

Every change that somebody can wait for happens under `Journal.changed`; the byte counters have one writer and no lock.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

from ollama_async._secret import showable

T = TypeVar("T")


@showable
@dataclass(eq=False, kw_only=True)
class RequestRecord:
    """One request whose head has been read.

    Attributes:
        method: as sent.
        path: the request's target as sent, with its query.
        headers: pairs in the order of arrival, names in lower case.
        at: `time.monotonic()` when the head was complete.
        complete: the whole body has arrived.
        connection: the connection that carried it.
    """

    method: str
    path: str
    headers: list[tuple[str, str]] = field(repr=False)
    at: float
    connection: "ConnectionRecord" = field(repr=False)
    complete: bool = False
    # The server appends what arrives: joining on demand keeps a large upload linear.
    _parts: list[bytes] = field(repr=False)
    _changed: threading.Condition = field(repr=False)

    @property
    def body(self) -> bytes:
        """The body as far as it has arrived."""
        return b"".join(tuple(self._parts))

    @property
    def route(self) -> str:
        """The decoded path without scheme, host and query: what scripts are looked up by."""
        # Not urlsplit(): it refuses some targets, and takes the first part of `//x/y` for a host.
        return unquote(re.sub("^[a-z]+://[^/]*", "", self.path.partition("?")[0]))

    def header(self, name: str) -> str | None:
        """Return the first header of that name.

        Args:
            name: in any case.

        Returns:
            Its value, or None when the request had no such header.
        """
        return next((value for key, value in self.headers if key == name.lower()), None)

    def json(self, timeout: float = 5.0) -> Any:
        """Decode the body, which may still be under way when the head has been read.

        Args:
            timeout: seconds to wait for the end of the body.

        Returns:
            The decoded JSON value.

        Raises:
            TimeoutError: the body did not end in time.
            ValueError: the body is not JSON.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.complete, timeout):
                raise TimeoutError(f"{self.method} {self.path}: the body did not end within {timeout} s")
        return json.loads(self.body)


@showable
@dataclass(eq=False, kw_only=True)
class ConnectionRecord:
    """One accepted connection. Byte counts are HTTP bytes: under TLS what was inside it, on a silent server raw bytes.

    Attributes:
        number: counts from 1 in the order of acceptance.
        opened_at: `time.monotonic()` at which the server took it.
        requests: those that came over it.
        bytes_received: read from the socket.
        bytes_sent: handed to the socket; some of them may still be in the server's buffer (bounded) or the kernel's.
        left_at: `time.monotonic()` at which the server saw the client's FIN (or TLS close_notify) or RST.
        left_how: which of them came first.
        bytes_after_left: of `bytes_sent`, those after `left_at`.
        closed_at: `time.monotonic()` at which the server's side ended: its FIN or RST, or the end of the connection.
    """

    number: int
    opened_at: float
    requests: list[RequestRecord] = field(default_factory=list["RequestRecord"])
    bytes_received: int = 0
    bytes_sent: int = 0
    left_at: float | None = None
    left_how: Literal["fin", "reset"] | None = None
    bytes_after_left: int = 0
    closed_at: float | None = None
    _changed: threading.Condition = field(repr=False)

    @property
    def open(self) -> bool:
        """Neither side has ended the connection."""
        return self.left_at is None and self.closed_at is None

    def wait_left(self, timeout: float = 5.0) -> bool:
        """Block until the client has left; works while the client's event loop is blocked by this very call.

        Args:
            timeout: seconds to wait.

        Returns:
            Whether the client has left.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.left_at is not None, timeout)


class Journal:
    """All records of one server, in order, and the condition that announces each change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.connections: list[ConnectionRecord] = []
        self.requests: list[RequestRecord] = []
        self._accepted = 0

    @contextmanager
    def change(self) -> Generator[None, None, None]:
        """Hold the lock for a change, then wake whoever waits."""
        with self.changed:
            yield
            self.changed.notify_all()

    def opened(self) -> ConnectionRecord:
        """Record an accepted connection."""
        with self.change():
            self._accepted += 1
            record = ConnectionRecord(number=self._accepted, opened_at=time.monotonic(), _changed=self.changed)
            self.connections.append(record)
        return record

    def headed(
        self, connection: ConnectionRecord, method: str, path: str, headers: list[tuple[str, str]], parts: list[bytes]
    ) -> RequestRecord:
        """Record a request whose head is complete; the caller goes on appending to `parts`."""
        request = RequestRecord(
            method=method,
            path=path,
            headers=headers,
            at=time.monotonic(),
            connection=connection,
            _parts=parts,
            _changed=self.changed,
        )
        with self.change():
            connection.requests.append(request)
            self.requests.append(request)
        return request

    def forget_ended(self) -> None:
        """Drop the connections that are over, and their requests."""
        with self.changed:
            self.connections = [record for record in self.connections if record.open]
            self.requests = [request for request in self.requests if request.connection.open]

    def wait(self, select: Callable[[], Sequence[T]], count: int, what: str, timeout: float) -> tuple[T, ...]:
        """Block until `select()` has found at least `count` records."""
        with self.changed:
            if self.changed.wait_for(lambda: len(select()) >= count, timeout):
                return tuple(select())
            came = "\n".join(f"  {entry!r}" for entry in [*self.connections, *self.requests]) or "  nothing"
            raise TimeoutError(f"{what}: {len(select())} of {count} within {timeout} s; the server saw:\n{came}")
