"""``Guarded``: a coroutine that notices a cancellation before its first step."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from types import TracebackType

ResultT = TypeVar("ResultT")


class Guarded(Coroutine[Any, Any, ResultT]):
    """A coroutine around another one that notices a cancellation at any moment.

    A task that is cancelled before its first step throws the cancellation into its coroutine, and Python ends a
    coroutine that has not begun without running any of it. So ``wait_for(anext(stream), 0)`` would leave the stream
    open, whatever ``__anext__()`` does.

    Args:
        coroutine: The coroutine that does the work.
        cancelled: Called if an exception is thrown in before the first step. Not called if the coroutine is closed or
            dropped before that: then nothing has begun.
        name: The qualified name of the method that returns this coroutine.
    """

    __slots__ = ("__weakref__", "_begun", "_cancelled", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, ResultT], cancelled: Callable[[], object], name: str) -> None:
        # Tasks and warnings show this name: the method that the user has called.
        cast("Any", coroutine).__qualname__ = name
        self._coroutine = coroutine
        self._cancelled = cancelled
        self._begun = False

    def send(self, value: Any) -> Any:
        """Run to the next point where the coroutine waits."""
        self._begun = True
        return self._coroutine.send(value)

    def throw(
        self,
        typ: Any,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """Raise an exception where the coroutine waits."""
        if not self._begun:
            self._cancelled()
        # Not the form with three arguments, which newer Pythons warn about.
        return self._coroutine.throw(typ if val is None and tb is None else _instance(typ, val, tb))

    def close(self) -> None:
        """End the coroutine where it waits."""
        self._coroutine.close()

    def __await__(self) -> Any:
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        # The coroutine's name, frame and code, which tasks show and debuggers follow.
        return getattr(self._coroutine, name)


def _instance(typ: Any, val: BaseException | object, tb: TracebackType | None) -> BaseException:
    exc = val if isinstance(val, BaseException) else typ() if val is None else typ(val)
    return exc.with_traceback(tb)
