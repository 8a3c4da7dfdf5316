"""How any thread or signal handler reaches an event loop, and what runs in one at a later time."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

if TYPE_CHECKING:
    from collections.abc import Callable

# Unlike asyncio.get_running_loop() it returns None where no loop runs.
running_loop = asyncio._get_running_loop  # noqa: SLF001

# Our timers run in an empty context. A loop keeps a cancelled timer until its time comes, and with it the context in
# which it was made: the caller's request, user, database session.
EmptyContext = contextvars.Context


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Call a function in a loop, from any thread; not at all if the loop is closed."""
    # Also in the thread of that loop, although the loop seems to be awake: this may be a signal handler, and the loop
    # may sleep inside a task (nest_asyncio does that).
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def raise_in_loop(loop: asyncio.AbstractEventLoop, exc: BaseException) -> None:
    """Raise an exception out of a loop, where Python or a library below would drop it.

    Ctrl-C and ``sys.exit()`` in a signal handler raise wherever the program is at that moment. Python prints and drops
    an exception from a ``__del__``; uvloop takes an exception from a protocol for an error of the connection.
    """
    in_loop(loop, _raise, exc)


def _raise(exc: BaseException) -> NoReturn:
    raise exc


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that waits for a future, unless something else has."""
    if not future.done():
        try:
            future.set_result(None)
        except asyncio.InvalidStateError:
            # A signal handler has cancelled the waiting task in between, as asyncio.run() does at Ctrl-C.
            return


class DeadlineTimer:
    """Calls a function at a deadline, in the loop that was running when it was made, or else in a thread.

    Args:
        deadline: By ``time.monotonic()``.
        expire: Called with the context variables of the code that made the timer.
    """

    __slots__ = ("_context", "_deadline", "_expire", "_loop", "_running")

    def __init__(self, deadline: float, expire: Callable[[], object]) -> None:
        self._deadline = deadline
        self._expire = expire
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._loop = running_loop()
        self._running: asyncio.TimerHandle | threading.Timer | None = None

    def start(self) -> None:
        """Let the time run."""
        delay = max(0.0, self._deadline - time.monotonic())
        if self._loop is not None:
            self._running = self._loop.call_later(delay, self._pass, context=EmptyContext())
            return
        timer = threading.Timer(delay, self._pass)
        timer.daemon = True
        self._running = timer
        timer.start()

    def _pass(self) -> None:
        context = self._context
        if context is not None:
            context.run(self._expire)

    def cancel(self) -> None:
        """Stop it; from any thread, idempotent."""
        self._context = None
        running, loop = self._running, self._loop
        if running is None:
            return
        if loop is None or running_loop() is loop:
            running.cancel()
        else:
            in_loop(loop, running.cancel)
        self._running = None


def report(exc: Exception, callback: object) -> None:
    """Tell of an error in somebody's callback, which nobody is there to catch."""
    message = f"a callback of a CancelToken raised: {callback!r}"
    loop = running_loop()
    if loop is not None:
        loop.call_exception_handler({"message": message, "exception": exc})
    else:
        sys.unraisablehook(
            cast(
                "sys.UnraisableHookArgs",
                SimpleNamespace(
                    exc_type=type(exc), exc_value=exc, exc_traceback=exc.__traceback__, err_msg=message, object=None
                ),
            )
        )
