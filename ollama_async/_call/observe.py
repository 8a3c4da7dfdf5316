"""What watches calls from outside is told when a call begins, and once how it ended; by default nothing watches."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

_log = logging.getLogger("ollama_async.observe")


@dataclass(frozen=True, slots=True)
class CallEnd:
    """How a call ended.

    Attributes:
        outcome: As ``Stream.outcome``.
        error: What the caller gets, if it gets an error.
        seconds: How long the call took, until its outcome was decided.
        first_chunk: Seconds until the first chunk of a stream arrived; ``None`` if none did, or for a plain call.
        response: The answer, or the partial answer; ``None`` if nothing has arrived.
    """

    outcome: str
    error: BaseException | None
    seconds: float
    first_chunk: float | None
    response: Any


class Observation(Protocol):
    """One call that is watched; all methods are called in its event loop's thread."""

    headers: Mapping[str, str]
    """Headers that its request gets as well."""

    def retrying(self, error: BaseException, delay: float) -> None:
        """An attempt has failed, and another one follows after ``delay`` seconds."""

    def ended(self, end: CallEnd) -> None:
        """The call is over: called once."""


class Observer(Protocol):
    """Asked about each call before it begins."""

    def __call__(
        self, url: str, path: str, body: Mapping[str, Any], *, streaming: bool
    ) -> Callable[[], Observation] | None:
        """Return what to call when the request is about to be sent; ``None`` for a call that is not watched."""


class WorkObservation(Observation, Protocol):
    """Work of an agent that is watched: a run, or a tool."""

    def scope(self) -> AbstractContextManager[object]:
        """Return a context manager within which calls and tools are parts of this work."""
        ...


class WorkObserver(Protocol):
    """Asked about each run of an agent, and each tool, when it begins."""

    def __call__(self, operation: str, name: str | None, details: Mapping[str, Any]) -> WorkObservation:
        """Begin to watch ``"invoke_agent"`` or ``"execute_tool"``."""
        ...


class Observed:
    """Lets no fault of an observer reach the call.

    Args:
        observation: What the observer made of the call.
        partial: Returns the partial answer.

    Attributes:
        headers: Those that the request gets, as far as they can be sent.
    """

    __slots__ = ("_observation", "headers", "partial")

    def __init__(self, observation: Observation, partial: Callable[[], Any]) -> None:
        self._observation = observation
        self.partial: Callable[[], Any] = partial
        self.headers: dict[str, str] = {
            name: value
            for name, value in observation.headers.items()
            if f"{name}{value}".isascii() and value.isprintable()
        }

    def retrying(self, error: BaseException, delay: float) -> None:
        """Tell of another attempt."""
        try:
            self._observation.retrying(error, delay)
        except Exception:
            _log.exception("the observer failed at a retry")

    def ended(self, end: CallEnd) -> None:
        """Tell of the end."""
        try:
            self._observation.ended(end)
        except Exception:
            _log.exception("the observer failed at the end of a call")


class ObservedWork(Observed):
    """The same for work of an agent."""

    __slots__ = ("_scope",)

    def __init__(self, observation: WorkObservation) -> None:
        super().__init__(observation, lambda: None)
        self._scope = observation.scope

    def scope(self) -> AbstractContextManager[object]:
        """Return what calls and tools run in that are parts of this work."""
        try:
            return self._scope()
        except Exception:
            _log.exception("the observer failed within work")
            return nullcontext()


observer: Observer | None = None
work_observer: WorkObserver | None = None


def set_observer(new: Observer | None, work: WorkObserver | None = None) -> None:
    """Set who watches the calls that are made from now on; those that are under way keep their observer."""
    global observer, work_observer
    observer, work_observer = new, work


def begin_work(operation: str, name: str | None, details: Mapping[str, Any]) -> ObservedWork | None:
    """Tell the observer that a run of an agent, or a tool, begins."""
    if work_observer is None:
        return None
    try:
        return ObservedWork(work_observer(operation, name, details))
    except Exception:
        _log.exception("the observer failed at the beginning of work")
        return None


def scope_of(observed: ObservedWork | None) -> AbstractContextManager[object]:
    """Return what the parts of work run in, whether it is watched or not."""
    return nullcontext() if observed is None else observed.scope()


def prepare(
    url: str, path: str, body: Mapping[str, Any], *, streaming: bool, partial: Callable[[], Any] = lambda: None
) -> Callable[[], Observed | None] | None:
    """Ask the observer about a call; return what is to be called when it begins."""
    if observer is None:
        return None
    try:
        begin = observer(url, path, body, streaming=streaming)
    except Exception:
        _log.exception("the observer failed before a call")
        return None
    return None if begin is None else lambda: _begin(begin, partial)


def _begin(begin: Callable[[], Observation], partial: Callable[[], Any]) -> Observed | None:
    try:
        return Observed(begin(), partial)
    except Exception:
        _log.exception("the observer failed at the beginning of a call")
        return None
