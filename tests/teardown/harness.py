"""What the teardown tests have in common: scenes to stop in, and a look at what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from ollama_async import AsyncClient, CancelToken, Stream
from ollama_async.testing import ConnectionRecord, FakeOllama

over_the_network = pytest.mark.parametrize("server", ["tcp", "tls"], indirect=True)
"""For what has no meaning over a unix socket, or makes clients of its own that know an address only."""

BOUND = 5.0
"""Seconds after which a wait for something that must come counts as failed."""


def open_fds() -> dict[str, str]:
    """Sockets and files of this process (the fake server's are among them), by descriptor.

    What an event loop opens for itself when it first needs it (pipes, /dev/null under uvloop) is left out.
    """
    found: dict[str, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith(("pipe:", "anon_inode:", "/dev/", "/proc/")):
                found[name] = target
    return found


def live_timers(loop: asyncio.AbstractEventLoop) -> list[object]:
    """Timers that would still fire; uvloop does not tell."""
    return [handle for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled()]


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until something is so, or fail."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND} s: {what}"
        await asyncio.sleep(0.001)


async def ticks(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class Baseline:
    """What is open now, to compare with what is open later."""

    loop: asyncio.AbstractEventLoop
    fds: int = field(default_factory=lambda: len(open_fds()))
    timers: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.timers = len(live_timers(self.loop))
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))

    async def check(self) -> None:
        """Nothing has been left: no descriptor, task, timer, no call of the loop's exception handler."""
        me = {asyncio.current_task()}
        await until(lambda: asyncio.all_tasks() <= me, f"tasks left: {asyncio.all_tasks() - me}")
        await until(lambda: len(open_fds()) <= self.fds, f"descriptors left: {open_fds()}, {self.fds} before")
        # The check's own sleep is not among them: it is over whenever this line runs.
        await until(lambda: len(live_timers(self.loop)) <= self.timers, f"timers left: {live_timers(self.loop)}")
        assert self.errors == []
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


@contextlib.asynccontextmanager
async def nothing_left_behind() -> AsyncIterator[Baseline]:
    """Before and after the block the same is open, with the garbage collector off in between."""
    gc.collect()
    gc.disable()
    baseline = Baseline(asyncio.get_running_loop())
    try:
        yield baseline
        await baseline.check()
    finally:
        gc.enable()


def registrations(token: CancelToken) -> int:
    """How many callbacks wait on a token."""
    return len(token._callbacks)


def saw_leave(server: FakeOllama, number: int = -1) -> ConnectionRecord:
    """Block this thread (and with it the loop that runs in it) until the server has seen a client leave.

    What closes the socket must have happened before: nothing of the loop runs in the meantime.
    """
    record = server.connections[number]
    assert record.wait_left(BOUND), "the server did not see the client leave while the client's loop was blocked"
    assert record.bytes_after_left == 0
    return record


def in_thread(function: Callable[[], Any]) -> Any:
    """Run in another thread, while this one is blocked, and return what it returned."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)
    thread.start()
    thread.join(BOUND)
    assert result, "it did not end, or raised"
    return result[0]


async def read_all(stream: Stream[Any], seen: list[Any]) -> None:
    """Be a stream's reader."""
    async for chunk in stream:
        seen.append(chunk)


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address where a SYN is never answered: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def client_of(server: FakeOllama, **options: Any) -> AsyncClient:
    """A client of a fake server, whatever it listens on."""
    if server.uds is not None:
        return AsyncClient(server.url, uds=server.uds, **options)
    return AsyncClient(server.url, **options)
