"""``CancelToken``: the handle that aborts calls, from anywhere.

Nothing here holds a lock. Other tasks, threads and signal handlers abort a token. A signal handler runs between any two
bytecodes of the thread that it interrupts, also in the middle of this module. A lock would deadlock there. A reentrant
lock would let the handler in on half-changed state. So all shared state changes by single atomic dict operations
(``setdefault`` decides, ``pop`` claims a callback), and every order of them is right.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self, SupportsIndex

import anyio

from ._errors import AbortError, RequestError, shown
from ._loops import DeadlineTimer, in_loop, report, resolve
from ._secret import showable

# Thirty years: a later deadline does not count.
_ENDLESS = 1e9

_order = itertools.count()


class SetOnce(dict[int, Any]):
    """A value that is set once, by the task, thread or signal handler that comes first; false until then.

    It is a dict because looking whether one is empty is the cheapest check there is, and ``setdefault()`` is one step.
    """

    __slots__ = ()

    def try_set(self, value: object) -> bool:
        """Set the value if it is not set; return whether this call set it. Each call must pass a different object."""
        return self.setdefault(0, value) is value

    @property
    def value(self) -> Any:
        """The value; ``None`` until it is set."""
        return self.get(0)


class _Decision:
    """Why a token was aborted, and when, compared with other tokens."""

    __slots__ = ("order", "reason")

    def __init__(self, reason: object, at: float | None = None) -> None:
        self.order = (time.monotonic() if at is None else at, next(_order))
        self.reason = reason


class LiveObject:
    """An object that stands for running work: a copy of it is the object itself, and it cannot be pickled.

    Nothing would reach a real copy: a Stop on one of the two would leave the work of the other running.
    """

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise TypeError(
            f"cannot pickle {type(self).__name__!r}: it belongs to this process. To stop a call from another process, "
            "send that process an id, and register the call under it in an ollama_async.registry.AbortRegistry"
        )


class Registration(LiveObject):
    """A callback that runs when a token is aborted; ``remove()`` removes it."""

    __slots__ = ("_callback", "_timers", "_token")

    def __init__(self, token: CancelToken, callback: Callable[[Any], object] | None = None) -> None:
        self._token = token
        self._callback = callback
        self._timers: Sequence[DeadlineTimer] = ()

    def remove(self) -> bool:
        """Remove the callback; idempotent, from any thread.

        Returns:
            True if this call prevented the callback; False if it has run, is running in another thread, or was removed
            before.
        """
        token = self._token
        claimed = token._registrations.pop(self, None) is not None
        if token._parents:
            for ancestor in token._ancestors():
                ancestor._registrations.pop(self, None)
        if self._timers:
            for timer in self._timers:
                timer.cancel()
        self._callback = None
        return claimed

    def _arm(self) -> Self:
        """Register for the abort; fire at once if the token is aborted."""
        token = self._token
        tokens = (token, *token._ancestors()) if token._parents else (token,)
        try:
            for each in tokens:
                each._registrations[self] = True
            for each in tokens:
                if each._deadline is not None and each._decided.get(0) is None:
                    timer = DeadlineTimer(each._deadline, each._expire)
                    self._timers = (*self._timers, timer)
                    timer.start()
            # An abort that came before this point has not seen the registration; an abort that comes now will.
            decision = token._decision()
            if decision is not None:
                self._fire(decision.reason)
            return self  # noqa: TRY300  (Ctrl-C at this line leaves nothing either)
        except BaseException:
            self.remove()
            raise

    def _close(self, reason: object) -> None:
        """End what it is there for, though the token is not aborted; a callback is for aborts alone."""

    def _fire(self, reason: object) -> None:
        """Call the callback, unless another thread does, or it was removed."""
        callback, claimed = self._callback, None
        try:
            # Only the caller that takes the registration out of its token may call the callback.
            claimed = self._token._registrations.pop(self, None)
            if claimed and callback is not None:
                callback(reason)
        except BaseException as exc:
            if claimed and not _was_called(exc):
                if self._callback is not None:
                    self._token._registrations[self] = True
                raise
            self.remove()
            if not isinstance(exc, Exception):
                raise
            report(exc, callback)
        self.remove()


class Watch(Registration):
    """A registration of the library itself: an abort ends something through it.

    ``end()`` can be repeated. So the registration stays until ``end()`` has returned: an interrupted abort (Ctrl-C, no
    memory, a full stack) raises, and the next abort does the rest.
    """

    __slots__ = ()

    arm = Registration._arm

    def end(self, reason: object) -> None:
        """End what the abort is to end; from any thread or signal handler."""
        raise NotImplementedError

    def _fire(self, reason: object) -> None:
        if self in self._token._registrations:
            self.end(reason)
        self.remove()


class _Waker(Watch):
    """Calls a function in a loop when a token is aborted."""

    __slots__ = ("_args", "_function", "_loop")

    def __init__(
        self, token: CancelToken, loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object
    ) -> None:
        super().__init__(token)
        self._loop = loop
        self._function = function
        self._args = args

    def end(self, reason: object) -> None:
        in_loop(self._loop, self._function, *self._args)

    def __enter__(self) -> None:
        self.arm()

    def __exit__(self, *_: object) -> None:
        try:
            self.remove()
        except BaseException:
            # Once more, for what Ctrl-C interrupted.
            self.remove()
            raise


@showable
class CancelToken(LiveObject):
    """A handle that aborts the calls it was given to.

    A token is aborted once and stays aborted. Its first reason stays. One token can serve any number of calls, on any
    number of event loops, and any task, thread or signal handler can abort it. Dropping a token aborts nothing.

    Example:
        >>> token = CancelToken()
        >>> token.abort("the user pressed Stop"), token.abort("again")
        (True, False)
        >>> token.aborted, token.reason
        (True, 'the user pressed Stop')
    """

    __slots__ = ("__weakref__", "_deadline", "_decided", "_parents", "_registrations", "_seconds")

    def __init__(self) -> None:
        self._decided = SetOnce()
        # Its own, and those of tokens that were derived from it.
        self._registrations: dict[Registration, bool] = {}
        # A derived token is not registered on its parents (a long-lived parent would collect the remains of short-lived
        # children). It looks at its parents when it is asked, and each of its registrations is also in the dicts of all
        # its ancestors. Nothing here recurses: users build chains of any length.
        self._parents: tuple[CancelToken, ...] = ()
        self._deadline: float | None = None
        self._seconds = 0.0

    @classmethod
    def any(cls, *tokens: CancelToken) -> CancelToken:
        """Return a token that is aborted as soon as one of the given tokens is, with its reason.

        You can also abort the new token alone, which does not touch the given ones. Once its calls are done it leaves
        nothing on them, so you can make a new one for each call.

        Raises:
            RequestError: No token was given, or one of them is not a ``CancelToken``.
        """
        if not tokens:
            raise RequestError("CancelToken.any() needs at least one token")
        for token in tokens:
            # Not by isinstance(): a weak proxy says that it is one.
            if not issubclass(type(token), CancelToken):
                raise RequestError(f"CancelToken.any() takes CancelTokens, not {type(token).__name__}")
        derived = cls()
        derived._parents = tuple(dict.fromkeys(tokens))
        return derived

    @classmethod
    def timeout(cls, seconds: float) -> CancelToken:
        """Return a token that is aborted when its time has passed, with a ``TimeoutError`` as reason.

        The time starts now. A timer runs only while calls or callbacks are registered.

        Args:
            seconds: Seconds from now; 0 or less returns an aborted token, infinity a token without a deadline.

        Raises:
            RequestError: ``seconds`` is not a number, or is too large for a clock.
        """
        given: object = seconds
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not _is_comparable(given):
            raise RequestError(f"CancelToken.timeout({shown(seconds)}): give a number of seconds")
        token = cls()
        if seconds < _ENDLESS:
            token._seconds = float(seconds)
            token._deadline = time.monotonic() + token._seconds
        return token

    def child(self) -> CancelToken:
        """Return a token that is aborted with this one; aborting it does not touch this one."""
        return CancelToken.any(self)

    def abort(self, reason: object = None) -> bool:
        """Abort every call that this token was given to, and run the callbacks.

        When it returns, the sockets of these calls have been shut down, and the calls deliver no further chunk. This
        also holds in another thread or a signal handler.

        Args:
            reason: Any object; it becomes ``AbortError.reason``.

        Returns:
            True if this call aborted the token, False if the token was aborted before (its first reason stays).
        """
        decided = self._decision() is None and self._decided.try_set(_Decision(reason))
        # A second call fires too: the first one may still be running in another thread, or may have been interrupted.
        self._fire()
        return decided

    @property
    def aborted(self) -> bool:
        """Whether the token is aborted."""
        return self._decision() is not None

    @property
    def reason(self) -> object:
        """The reason given to the first ``abort()``; ``None`` if it is not aborted or no reason was given."""
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
        woken: asyncio.Future[None] = loop.create_future()
        with _Waker(self, loop, resolve, woken):
            await woken
        return self.reason

    def on_abort(self, callback: Callable[[Any], object]) -> Registration:
        """Call a function when the token is aborted.

        The callback runs once, with the reason, in the thread that aborts and before ``abort()`` returns; at once if
        the token is already aborted. For a deadline it runs in the event loop that was running at registration, or in a
        thread if no loop was. If it raises, the error is reported (to the exception handler of the running loop, else
        to ``sys.unraisablehook``); ``abort()`` and the other callbacks go on.

        Args:
            callback: Called with the reason. It may register, remove and abort.

        Returns:
            The registration. Call its ``remove()`` if the token lives longer than you need the callback.
        """
        return Registration(self, callback)._arm()

    @contextmanager
    def scope(self) -> Generator[anyio.CancelScope]:
        """Put other awaits under this token: ``with token.scope(): await anything()``.

        An abort cancels the block through its own ``anyio.CancelScope``, which leaves ``task.cancelling()`` balanced.

        Raises:
            AbortError: The token was aborted before or during the block, and that ended the block. An external
                cancellation at the same time wins, and so does an exception that the block raises.
        """
        self.raise_if_aborted()
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope, _Waker(self, loop, scope.cancel):
            yield scope
        if scope.cancelled_caught:
            self.raise_if_aborted()

    def _ancestors(self) -> Collection[CancelToken]:
        """Return the tokens that this one is derived from, the nearest first, each once."""
        found = dict.fromkeys(self._parents)
        waiting = list(found)
        # It grows while it is walked.
        for token in waiting:
            for parent in token._parents:
                if parent not in found:
                    found[parent] = None
                    waiting.append(parent)
        return waiting

    def _decision(self) -> _Decision | None:
        # As SetOnce.value, without the call: each registration asks.
        decided: _Decision | None = self._decided.get(0)
        if decided is None and (self._parents or self._deadline is not None):
            decided = self._derive()
        return decided

    def _derive(self) -> _Decision | None:
        """Check whether an ancestor was aborted or a deadline has passed, and keep the earliest decision."""
        first: _Decision | None = None
        waiting: list[CancelToken] = [self]
        seen = set(waiting)
        # It grows while it is walked.
        for token in waiting:
            if token._deadline is not None and time.monotonic() >= token._deadline:
                token._decided.try_set(token._timed_out())
            decided: _Decision | None = token._decided.get(0)
            if decided is None:
                new = [parent for parent in token._parents if parent not in seen]
                waiting += new
                seen.update(new)
            elif first is None or decided.order < first.order:
                # Its decision already covers its ancestors, so the walk stops here.
                first = decided
        if first is not None:
            self._decided.try_set(first)
        kept: _Decision | None = self._decided.get(0)
        return kept

    def _expire(self) -> None:
        # The timer has fired, so the deadline has passed, even if a coarse clock says a moment less.
        self._decided.try_set(self._timed_out())
        self._fire()

    def _timed_out(self) -> _Decision:
        return _Decision(TimeoutError(f"the token's {self._seconds:g} s have passed"), self._deadline)

    def _fire(self, closed: str | None = None) -> None:
        """Do what is registered; with ``closed``, end the calls for that reason instead, without an abort."""
        # First: this takes as much of the stack as a callback, so a full one is found before a registration is taken.
        reason = self.reason
        failure: BaseException | None = None
        try:
            for registration in list(self._registrations):
                token = registration._token
                try:
                    if closed is None:
                        registration._fire(reason if token is self else token.reason)
                    else:
                        registration._close(closed)
                except BaseException as exc:
                    # Ctrl-C inside a callback, or a full stack: still end the other calls.
                    failure = exc
            if failure is not None:
                raise failure
        finally:
            # Raised, it holds this frame.
            failure = None

    def __repr__(self) -> str:
        decision = self._decision()
        state = "open" if decision is None else f"aborted, reason={decision.reason!r}"
        return f"<CancelToken {state}, {len(self._registrations)} registered>"


def _was_called(exc: BaseException) -> bool:
    """Whether the callback raised the exception, and not the attempt to call it."""
    if isinstance(exc, (RecursionError, MemoryError)) or not isinstance(exc, Exception):
        # Its traceback then leads from the frame that caught it into the callback's.
        return exc.__traceback__ is not None and exc.__traceback__.tb_next is not None
    return True


def _is_comparable(number: float) -> bool:
    """Whether the clock can be compared with a number: not with NaN, nor with an int that no float holds."""
    try:
        return not math.isnan(number)
    except OverflowError:
        return False
