"""``CancelToken``: the handle with which calls are stopped, from anywhere.

Nothing here holds a lock. A token is aborted by other tasks, by threads, and by signal handlers, which run between any
two bytecodes of the thread they interrupt, also in the middle of this module. A lock would deadlock there or, if
reentrant, let the handler in on half-made state. So all shared state changes by single dict operations that are atomic
(``setdefault`` decides, ``pop`` claims a callback), and every order of them is right.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio

from ._errors import AbortError, RequestError
from ._secret import showable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["CancelToken", "Once", "Registration", "drained", "in_loop"]

Item = TypeVar("Item")

# Thirty years: what is later is never.
_ENDLESS = 1e9

_order = itertools.count()


class Once:
    """A value that is decided once, by whichever task, thread or signal handler comes first."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        # Empty while undecided; to look at it is the cheapest question there is.
        self.slot: dict[int, Any] = {}

    def decide(self, value: object) -> bool:
        """Set the value if none is set; return whether this call decided. Each call must bring an object of its own."""
        return self.slot.setdefault(0, value) is value

    @property
    def value(self) -> Any:
        """The value, ``None`` while undecided."""
        return self.slot.get(0)


class _Decision:
    """That a token is aborted, why, and when compared with other tokens."""

    __slots__ = ("order", "reason")

    def __init__(self, reason: object, at: float | None = None) -> None:
        self.order = (time.monotonic() if at is None else at, next(_order))
        self.reason = reason


class Registration:
    """A callback that waits for a token's abort; ``remove()`` takes it back."""

    __slots__ = ("_cleanups", "_token")

    def __init__(self, token: CancelToken) -> None:
        self._token = token
        # What this registration left elsewhere: on parent tokens, in timers.
        self._cleanups: list[Callable[[], object]] = []

    def remove(self) -> bool:
        """Take the callback back; idempotent, from any thread.

        Returns:
            True if this call kept the callback from being called; False if it has been called, is being called in
            another thread, or had been removed before.
        """
        claimed = self._claim() is not None
        # Mostly there are none, and to begin a generator for nothing is as much as all the rest of a removal.
        if self._cleanups:
            for clean_up in drained(self._cleanups):
                clean_up()
        return claimed

    def _claim(self) -> Callable[[Any], object] | None:
        # Whoever gets the callback out of the token's dict may call it; nobody else can.
        return self._token._callbacks.pop(self, None)  # noqa: SLF001

    def _follow(self, _reason: object) -> None:
        # A parent was aborted. Each registration answers for itself only: to call the others' callbacks here would
        # take them from the thread that is aborting, whose abort() would then return before they had been called.
        self._fire(self._token.reason)

    def _fire(self, reason: object) -> None:
        callback = self._claim()
        try:
            if callback is not None:
                callback(reason)
        except Exception as exc:
            _report(exc, callback)
        finally:
            self.remove()


@showable
class CancelToken:
    """A handle to give to calls, with which they are aborted.

    A token is aborted once and stays aborted. The first reason stays. One token can serve any number of calls, on any
    number of event loops, and be aborted by any task, thread or signal handler. To drop a token aborts nothing.

    Example:
        >>> token = CancelToken()
        >>> token.abort("the user pressed Stop"), token.abort("again")
        (True, False)
        >>> token.aborted, token.reason
        (True, 'the user pressed Stop')
    """

    __slots__ = ("__weakref__", "_callbacks", "_deadline", "_decided", "_parents", "_seconds")

    def __init__(self) -> None:
        self._decided = Once()
        self._callbacks: dict[Registration, Callable[[Any], object]] = {}
        # A derived token is not registered on its parents by itself (a long-lived parent would collect the remains
        # of short-lived children): it looks at them when it is asked, and each of its own registrations registers
        # there as well.
        self._parents: tuple[CancelToken, ...] = ()
        self._deadline: float | None = None
        self._seconds = 0.0

    @classmethod
    def any(cls, *tokens: CancelToken) -> CancelToken:
        """Return a token that is aborted as soon as one of the given tokens is, with its reason.

        The new token can also be aborted by itself, which does not touch the given ones. It leaves nothing on them
        once its users are done, so that it can be made anew for each call.

        Raises:
            RequestError: No token was given, or something that is no ``CancelToken``.
        """
        if not tokens:
            raise RequestError("CancelToken.any() needs at least one token")
        for token in tokens:
            if not isinstance(token, CancelToken):
                raise RequestError(f"CancelToken.any() takes CancelTokens, not {type(token).__name__}")
        derived = cls()
        derived._parents = tuple(dict.fromkeys(tokens))
        return derived

    @classmethod
    def timeout(cls, seconds: float) -> CancelToken:
        """Return a token that is aborted by the passing of time, with a ``TimeoutError`` as reason.

        The clock starts now. A timer runs only while calls or callbacks are registered.

        Args:
            seconds: From now; 0 or less is an aborted token, infinity one without a deadline.

        Raises:
            RequestError: That is no number.
        """
        given: object = seconds
        if isinstance(given, bool) or not isinstance(given, (int, float)) or math.isnan(given):
            raise RequestError(f"CancelToken.timeout({seconds!r}): give a number of seconds")
        token = cls()
        if seconds < _ENDLESS:
            token._seconds = float(seconds)
            token._deadline = time.monotonic() + token._seconds
        return token

    def child(self) -> CancelToken:
        """Return a token that is aborted with this one, and can be aborted by itself without touching this one."""
        return CancelToken.any(self)

    def abort(self, reason: object = None) -> bool:
        """Abort every call that this token was given to, and call the callbacks.

        When it returns, the sockets of these calls have been shut down and they deliver no further chunk, also when
        it was called from another thread or a signal handler.

        Args:
            reason: Any object; it is what ``AbortError.reason`` will be.

        Returns:
            True if this call aborted the token, False if it had been aborted before (its first reason stays).
        """
        decided = self._decision() is None and self._decided.decide(_Decision(reason))
        # Also by a call that comes second: the first one may be in another thread, or interrupted, and not through yet.
        self._fire()
        return decided

    @property
    def aborted(self) -> bool:
        """Whether the token is aborted."""
        return self._decision() is not None

    @property
    def reason(self) -> Any:
        """What was given to the first ``abort()``; ``None`` while not aborted, or if nothing was given."""
        decision = self._decision()
        return None if decision is None else decision.reason

    def raise_if_aborted(self) -> None:
        """Raise ``AbortError`` if the token is aborted.

        Raises:
            AbortError: With the token's reason; a new instance at each call.
        """
        decision = self._decision()
        if decision is not None:
            raise AbortError(decision.reason)

    async def wait(self) -> Any:
        """Wait until the token is aborted.

        Returns:
            The reason.

        Cancellation: safe; the token is unaffected and nothing stays registered on it.
        """
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        registration = self.on_abort(lambda _: in_loop(loop, _resolve, woken))
        try:
            await woken
        finally:
            registration.remove()
        return self.reason

    def on_abort(self, callback: Callable[[Any], object]) -> Registration:
        """Have a function called when the token is aborted.

        It is called once, with the reason, in the thread that aborts and before ``abort()`` returns; at once if the
        token is aborted already. For a deadline it is called in the event loop that was running at registration, in a
        thread if none was. What it raises is reported (to the running loop's exception handler, else to
        ``sys.unraisablehook``) and keeps neither ``abort()`` nor the other callbacks from going on.

        Args:
            callback: Called with the reason. It may register, remove and abort.

        Returns:
            A registration; ``remove()`` it when the token outlives what the callback is for.
        """
        registration = Registration(self)
        self._callbacks[registration] = callback
        cleanups = registration._cleanups  # noqa: SLF001
        for parent in self._parents:
            cleanups.append(parent.on_abort(registration._follow).remove)  # noqa: SLF001
        if self._deadline is not None and self._decided.value is None:
            cleanups.append(_call_at(self._deadline, self._expire))
        # An abort that came before the callback was in place has not seen it; one that comes now will.
        decision = self._decision()
        if decision is not None:
            registration._fire(decision.reason)  # noqa: SLF001
        return registration

    @contextmanager
    def scope(self) -> Generator[anyio.CancelScope]:
        """Put other awaits under this token: ``with token.scope(): await anything()``.

        The block is cancelled when the token is aborted, through an ``anyio.CancelScope`` of its own, which leaves
        ``task.cancelling()`` balanced.

        Raises:
            AbortError: The token was aborted before or during the block and that ended it. A cancellation from
                outside that comes at the same time wins, and so does an exception that the block raises.
        """
        self.raise_if_aborted()
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            registration = self.on_abort(lambda _: in_loop(loop, scope.cancel))
            try:
                yield scope
            finally:
                registration.remove()
        if scope.cancelled_caught:
            self.raise_if_aborted()

    def _decision(self) -> _Decision | None:
        # As its value, without the call: each registration asks.
        decided: _Decision | None = self._decided.slot.get(0)
        if decided is None and (self._parents or self._deadline is not None):
            decisions = [parent._decision() for parent in self._parents]  # noqa: SLF001
            earlier = [decision for decision in decisions if decision is not None]
            first = min(earlier, key=lambda decision: decision.order, default=None)
            if first is None and self._deadline is not None and time.monotonic() >= self._deadline:
                first = self._timed_out()
            if first is not None:
                self._decided.decide(first)
                decided = self._decided.value
        return decided

    def _expire(self) -> None:
        # The timer says that it is time: clocks with a coarse grain may disagree by a hair.
        self._decided.decide(self._timed_out())
        self._fire()

    def _timed_out(self) -> _Decision:
        return _Decision(TimeoutError(f"the token's {self._seconds:g} s have passed"), self._deadline)

    def _fire(self) -> None:
        reason = self.reason
        fatal: BaseException | None = None
        for registration in list(self._callbacks):
            try:
                registration._fire(reason)  # noqa: SLF001
            except BaseException as exc:
                # Ctrl-C inside a callback: the other calls are aborted all the same.
                fatal = exc
        if fatal is not None:
            raise fatal

    def __repr__(self) -> str:
        decision = self._decision()
        state = "open" if decision is None else f"aborted, reason={decision.reason!r}"
        return f"<CancelToken {state}, {len(self._callbacks)} registered>"


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Call a function in a loop, from any thread; not at all if the loop is closed."""
    # Also from a task of that loop, which seems to be awake: this may be a signal handler, and a loop that runs within
    # a task, as nest_asyncio does, sleeps there.
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def drained(items: list[Item]) -> Generator[Item]:
    """Take everything out of a list, beside other threads and signal handlers that do the same."""
    while True:
        try:
            item = items.pop()
        except IndexError:
            return
        yield item


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _call_at(deadline: float, function: Callable[[], None]) -> Callable[[], object]:
    """Call a function at a time of the monotonic clock, in the running loop or else in a thread.

    Returns:
        A function that takes it back, from any thread.
    """
    delay = max(0.0, deadline - time.monotonic())
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        timer = threading.Timer(delay, function)
        timer.daemon = True
        timer.start()
        return timer.cancel
    handle = loop.call_later(delay, function)

    def cancel() -> None:
        if asyncio._get_running_loop() is loop:  # noqa: SLF001  (documented for library authors)
            handle.cancel()
        else:
            in_loop(loop, handle.cancel)

    return cancel


def _report(exc: Exception, callback: object) -> None:
    message = f"a callback of a CancelToken raised: {callback!r}"
    loop = asyncio._get_running_loop()  # noqa: SLF001
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
