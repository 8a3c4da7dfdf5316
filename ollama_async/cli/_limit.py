"""A limit on how long a text of others can keep the program busy."""

from __future__ import annotations

import contextlib
import signal
import threading
from _thread import interrupt_main
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["Limit"]

T = TypeVar("T")

# It rings again: an object's finaliser may have had the first one, which no caller sees.
_AGAIN_SECONDS = 0.1


class _TooMuch(BaseException):
    """The work has used up its time. No library takes it for its own error, and goes on."""


class Limit:
    """Bounds how long work takes.

    Parsers, and the hundreds of expressions that colour code, are not ours, and no length or depth tells what a text
    costs them. So the processor's time is measured, and a signal ends what takes too long: also within one regular
    expression, which looks for signals now and then.
    """

    def __init__(self) -> None:
        self._armed = False
        # Windows has no timers that send signals.
        self._clock: _Timer | _Thread = _Timer() if hasattr(signal, "setitimer") else _Thread()

    @contextlib.contextmanager
    def ready(self) -> Generator[None]:
        """Have the signal end what takes too long, while in the block."""
        before = signal.signal(self._clock.signal, self._ring)
        try:
            yield
        finally:
            signal.signal(self._clock.signal, before)

    def run(self, work: Callable[[], T], seconds: float) -> T | None:
        """Return what the work returns, or ``None`` if it takes longer, or fails."""
        if seconds <= 0:
            return None
        try:
            try:
                self._armed = True
                self._clock.start(seconds)
                return work()
            finally:
                self._disarm()
        except (_TooMuch, Exception):
            self._disarm()
            return None

    def _disarm(self) -> None:
        self._armed = False
        self._clock.stop()

    def _ring(self, *_: object) -> None:
        if self._armed:
            raise _TooMuch


class _Timer:
    """The system's timer, which counts the processor's time and sends a signal."""

    def __init__(self) -> None:
        self._system: Any = signal  # not each system has these names
        self.signal: signal.Signals = self._system.SIGVTALRM

    def start(self, seconds: float) -> None:
        self._system.setitimer(self._system.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)

    def stop(self) -> None:
        self._system.setitimer(self._system.ITIMER_VIRTUAL, 0)


class _Thread:
    """A thread that counts time as it passes, and simulates a signal.

    It has its turn between two instructions of Python only: it does not end what one regular expression does.
    """

    def __init__(self) -> None:
        # Nobody sends it, and a process that aborts itself ends with any handler.
        self.signal: signal.Signals = signal.SIGABRT
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, seconds: float) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(self._over, seconds), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            # Nothing rings after this: the handler may not be there any more.
            self._thread.join()

    def _wait(self, over: threading.Event, seconds: float) -> None:
        while not over.wait(seconds):
            interrupt_main(self.signal)
            seconds = _AGAIN_SECONDS
