"""What a piece of code leaves behind in its process, its event loop, and at the server, in words."""

import asyncio
import gc
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from ollama_async._cancel import CancelToken

from ._fake import FakeOllama

# What an event loop opens for itself when it first needs it is nobody's leak.
_OF_THE_LOOP = ("pipe:", "anon_inode:", "/dev/", "/proc/")

_LOOK_AGAIN = 0.001


def open_fds() -> dict[str, str]:
    """Sockets and files of this process (a fake server's are among them), by descriptor.

    What an event loop opens for itself when it first needs it (pipes, /dev/null under uvloop) is left out. Where there
    is no `/proc` nothing is found.
    """
    found: dict[str, str] = {}
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if not target.startswith(_OF_THE_LOOP):
                    found[name] = target
    return found


def live_timers(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """Timers that would still fire; uvloop does not tell."""
    return [handle for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled()]


def registrations(token: CancelToken) -> int:
    """How many callbacks wait on a token."""
    return len(token._registrations)  # noqa: SLF001  (a kit for looking inside)


class Watch:
    """What is open when it is made, to tell later what has been left behind.

    Attributes:
        fds: how many descriptors were open.
        timers: how many timers were live.
        errors: the calls of the loop's exception handler since then.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        servers: Iterable[FakeOllama] = (),
        tokens: Iterable[CancelToken] = (),
    ) -> None:
        """Look at what is open now, and listen to the loop's exception handler from now on.

        Args:
            loop: whose tasks and timers count.
            servers: those that shall see no connection open in the end.
            tokens: those on which nothing shall be registered in the end.
        """
        self._loop = loop
        self._servers, self._tokens = tuple(servers), tuple(tokens)
        self._tasks = asyncio.all_tasks(loop)
        self._targets = set(open_fds().values())
        self.fds = len(open_fds())
        self.timers = len(live_timers(loop))
        self.errors: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def left(self) -> list[str]:
        """Say what is open beyond what was open at first, one line a kind."""
        now = asyncio.current_task() if asyncio._get_running_loop() is self._loop else None  # noqa: SLF001
        found = [
            f"a task that still runs: {_task(task)}" for task in asyncio.all_tasks(self._loop) - self._tasks - {now}
        ]
        timers = live_timers(self._loop)
        if len(timers) > self.timers:
            found.append(f"timers: {_more(timers, self.timers)}, of {', '.join(map(_timer, timers))}")
        found += self.left_outside()
        found += [f"callbacks on the token: {count}" for count in map(registrations, self._tokens) if count]
        found += [f"a call of the loop's exception handler: {_context(context)}" for context in self.errors]
        return found

    def left_outside(self) -> list[str]:
        """As `left()`, of what outlives the loop: descriptors, and connections as the server sees them."""
        found: list[str] = []
        fds = open_fds()
        if len(fds) > self.fds:
            new = [_fd(*fd) for fd in fds.items() if fd[1] not in self._targets]
            found.append(f"descriptors: {_more(fds, self.fds)}; new are {', '.join(new)}")
        for server in self._servers:
            for record in server.connections:
                if record.open:
                    asked = (
                        ", ".join(f"{request.method} {request.route}" for request in record.requests) or "no request"
                    )
                    found.append(f"a connection that the server still sees open: number {record.number} ({asked})")
        return found

    async def settle(self, seconds: float) -> list[str]:
        """Let the loop run until nothing is left, or that much time has passed.

        Returns:
            What is left.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.left()
            if not found or self.errors or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(_LOOK_AGAIN)


@asynccontextmanager
async def nothing_left_behind(seconds: float = 5.0) -> AsyncGenerator[Watch, None]:
    """Check that a block leaves nothing behind in the running loop and the process, with the garbage collector off.

    Args:
        seconds: how long what ends in the background may take to end.

    Yields:
        What was open before.

    Raises:
        AssertionError: there are more descriptors, tasks or timers than before, the loop's exception handler was
            called, or the task has a cancellation pending; the text says so.
    """
    gc.collect()
    gc.disable()
    try:
        watch = Watch(asyncio.get_running_loop())
        yield watch
        found = await watch.settle(seconds)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            found.append(f"task.cancelling() is {task.cancelling()}")
        if found:
            raise AssertionError("left behind:\n" + "\n".join(f"- {line}" for line in found))
    finally:
        gc.enable()


def _more(items: Any, before: int) -> str:
    return f"{len(items)}, {before} before"


def _task(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    where = [f" at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" for frame in task.get_stack(limit=1)]
    return f"{name}(){''.join(where)}"


def _timer(handle: Any) -> str:
    callback = getattr(handle, "_callback", None)
    return str(getattr(callback, "__qualname__", callback))


def _fd(number: str, target: str) -> str:
    if target.startswith("socket:"):
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(int(number))) as copy:
            name = copy.getpeername()
            return f"{number} (socket to {name[0]}:{name[1]})" if isinstance(name, tuple) else f"{number} (unix socket)"
    return f"{number} ({target})"


def _context(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')}{f': {error!r}' if error is not None else ''}"
