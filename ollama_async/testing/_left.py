"""What a piece of code leaves behind in its process, its event loop, and at the server, in words."""

import asyncio
import gc
import os
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ollama_async._cancel import CancelToken

from ._fake import FakeOllama

# What an event loop opens for itself when it first needs it is nobody's leak.
_OF_THE_LOOP = ("pipe:", "anon_inode:", "/dev/", "/proc/")

_LOOK_AGAIN = 0.001

FDS_UNTOLD = "descriptors, for this system has neither /proc/self/fd nor /dev/fd"

AT_ONCE = 0.1
"""Seconds that a teardown takes on a busy machine: what needs longer is named, though it passes."""


class LeakCheckWarning(UserWarning):
    """A leak check passed, but only after it had waited for something, or without being able to look at everything."""


class Wait(NamedTuple):
    """That a check had to wait: how many seconds, and for what."""

    seconds: float
    what: str


def open_fds() -> dict[str, str] | None:
    """Sockets and files of this process (a fake server's are among them), by descriptor.

    What an event loop opens for itself when it first needs it (pipes, /dev/null under uvloop) is left out.

    Returns:
        None where the system does not tell: Windows has no folder of them.
    """
    for folder, look in (("/proc/self/fd", _linked), ("/dev/fd", _examined)):
        with suppress(OSError):
            numbers = os.listdir(folder)
            # The folder itself was open for that. A system that shows the first three only, shows no more to anybody.
            if any(int(number) > 2 for number in numbers):
                return {number: target for number in numbers if (target := look(number)) is not None}
    return None


def _linked(number: str) -> str | None:
    """On Linux, what a descriptor is."""
    with suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{number}")
        return None if target.startswith(_OF_THE_LOOP) else target
    return None


def _examined(number: str) -> str | None:
    """On macOS and the BSDs, where no link says what a descriptor is."""
    with suppress(OSError):
        found = os.fstat(int(number))
        if stat.S_ISSOCK(found.st_mode):
            return f"socket:[{number}]"
        # What is neither is the loop's: kqueue, pipes, terminals.
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            return f"file {found.st_dev}:{found.st_ino}"
    return None


def live_timers(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """Timers that would still fire; uvloop does not tell."""
    return [handle for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled()]


def registrations(token: CancelToken) -> int:
    """How many callbacks wait on a token."""
    return len(token._registrations)  # noqa: SLF001  (a kit for looking inside)


class Watch:
    """What is open when it is made, to tell later what has been left behind.

    Attributes:
        fds: how many descriptors were open; None where the system does not tell.
        timers: how many timers were live.
        errors: the calls of the loop's exception handler since then.
        unchecked: what cannot be looked at here, in words.
        wait: what `settle()` had to wait for, if it was longer than a teardown takes.
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
        fds = open_fds()
        self._targets = set((fds or {}).values())
        self.fds = None if fds is None else len(fds)
        self.timers = len(live_timers(loop))
        self.unchecked = tuple(_unchecked(loop, self.fds))
        self.wait: Wait | None = None
        self.errors: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def left(self) -> list[str]:
        """Say what is open beyond what was open at first, one line a kind."""
        now = asyncio.current_task() if asyncio._get_running_loop() is self._loop else None  # noqa: SLF001
        found = [
            f"a task that still runs: {task_shown(task)}"
            for task in asyncio.all_tasks(self._loop) - self._tasks - {now}
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
        if fds is not None and self.fds is not None and len(fds) > self.fds:
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

    async def settle(self, limit: float) -> list[str]:
        """Let the loop run until nothing is left, or `limit` seconds have passed.

        Returns:
            What is left.
        """
        started = time.monotonic()
        before: list[str] = []
        while True:
            found = self.left()
            seconds = time.monotonic() - started
            if not found and seconds >= AT_ONCE:
                self.wait = Wait(seconds, "; ".join(before))
            if not found or self.errors or seconds >= limit:
                return found
            before = found
            await asyncio.sleep(_LOOK_AGAIN)


@asynccontextmanager
async def nothing_left_behind(limit: float = 1.0) -> AsyncGenerator[Watch, None]:
    """Check that a block leaves nothing behind in the running loop and the process, with the garbage collector off.

    A `LeakCheckWarning` says so if that was the case only after a while, or where the system does not tell which
    descriptors are open.

    Args:
        limit: seconds that what ends in the background may take to end.

    Yields:
        What was open before.

    Raises:
        AssertionError: there are more descriptors, tasks or timers than before, the loop's exception handler was
            called, or the task has one more cancellation pending; the text says so.
    """
    gc.collect()
    gc.disable()
    try:
        watch = Watch(asyncio.get_running_loop())
        task = asyncio.current_task()
        pending = task.cancelling() if task is not None else 0
        with task_groups.watched(task) as forgotten:
            yield watch
            found = await watch.settle(limit)
        if task is not None and task.cancelling() > pending + forgotten():
            found.append(f"task.cancelling() is {task.cancelling()}, {pending} before")
        if found:
            raise AssertionError("left behind:\n" + "\n".join(f"- {line}" for line in found))
        if watch.wait is not None:
            # The caller is behind contextlib's frame.
            warnings.warn(
                f"nothing was left behind, but only after {watch.wait.seconds:.2f} s: {watch.wait.what}",
                LeakCheckWarning,
                stacklevel=3,
            )
        if watch.fds is None:
            warnings.warn(f"not checked: {FDS_UNTOLD}", LeakCheckWarning, stacklevel=3)
    finally:
        gc.enable()


class _TaskGroups:
    """Looks at asyncio's task groups while a check runs, for one flaw of theirs.

    Before Python 3.13 a group whose child fails while the group waits at its end cancels its task, and does not take
    that back: `task.cancelling()` stays one too high, whatever the code does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers = 0
        self._forgotten: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()

    @contextmanager
    def watched(self, task: asyncio.Task[Any] | None) -> Generator[Callable[[], int], None, None]:
        """Watch groups that end meanwhile; blocks may overlap, in several threads.

        Yields:
            What tells how many cancellations of the task such groups have not taken back.
        """
        if task is None or sys.version_info >= (3, 13):
            yield lambda: 0
            return
        before = self._forgotten.get(task, 0)
        with self._lock:
            self._watchers += 1
            if self._watchers == 1:
                self._exit: Any = asyncio.TaskGroup.__aexit__
                asyncio.TaskGroup.__aexit__ = self._watch(self._exit)  # type: ignore[method-assign]
        try:
            yield lambda: self._forgotten.get(task, 0) - before
        finally:
            with self._lock:
                self._watchers -= 1
                if not self._watchers:
                    asyncio.TaskGroup.__aexit__ = self._exit  # type: ignore[method-assign]

    def _watch(self, leave: Any) -> Any:
        async def __aexit__(group: Any, *exc_info: object) -> Any:  # noqa: N807
            early = group._parent_cancel_requested  # noqa: SLF001
            try:
                return await leave(group, *exc_info)
            finally:
                if group._parent_cancel_requested and not early:  # noqa: SLF001
                    task = group._parent_task  # noqa: SLF001
                    self._forgotten[task] = self._forgotten.get(task, 0) + 1

        return __aexit__


task_groups = _TaskGroups()


def _unchecked(loop: asyncio.AbstractEventLoop, fds: int | None) -> Generator[str, None, None]:
    if fds is None:
        yield FDS_UNTOLD
    if not hasattr(loop, "_scheduled"):
        yield "timers, for this event loop does not tell which it has"


def _more(items: Any, before: int) -> str:
    return f"{len(items)}, {before} before"


def task_shown(task: asyncio.Task[Any]) -> str:
    """Say what a task runs, and where it is."""
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
