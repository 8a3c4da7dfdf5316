"""``Condition``: when a stream has enough, as a value that any number of streams can share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from ollama_async._errors import RequestError, shown

Predicate: TypeAlias = Callable[[Any], object]
"""A function of the merged answer that says whether it is enough."""

Watch: TypeAlias = Callable[[Any], "Condition | None"]
"""Looks at one growing answer, chunk after chunk; returns the condition that is met."""


class Condition(ABC):
    """When a stream has enough; give it as ``until=``.

    It is a value: what has to be remembered of an answer is kept for each stream apart, so one condition can be used
    for any number of streams at once. ``a | b`` is met when one of them is, ``a & b`` when both are at the same chunk;
    each may also be a function of the merged answer.
    """

    @abstractmethod
    def watch(self) -> Watch:
        """Return what looks at one answer from its first chunk on."""

    def deadline(self) -> tuple[float, Condition] | None:
        """Return how many seconds after the first chunk it is met whatever comes, and what is met then.

        Returns:
            ``None`` if time alone never meets it.
        """
        return None

    @abstractmethod
    def __repr__(self) -> str: ...

    def __call__(self, answer: Any) -> bool:
        """Return whether an answer, taken by itself, meets it."""
        return self.watch()(answer) is not None

    def __or__(self, other: Condition | Predicate) -> Condition:
        return _Any(self, condition_of(other))

    def __ror__(self, other: Predicate) -> Condition:
        return _Any(condition_of(other), self)

    def __and__(self, other: Condition | Predicate) -> Condition:
        return _All(self, condition_of(other))

    def __rand__(self, other: Predicate) -> Condition:
        return _All(condition_of(other), self)


def condition_of(given: object) -> Condition:
    """Return what was given as ``until=`` as a condition.

    Raises:
        RequestError: It is neither a condition nor a function.
    """
    if isinstance(given, Condition):
        return given
    if not callable(given):
        raise RequestError(f"until={shown(given)}: give a condition of ollama_async.until, or a function of the answer")
    return _Function(given)


class _Function(Condition):
    def __init__(self, function: Predicate) -> None:
        self._function = function

    def watch(self) -> Watch:
        return lambda answer: self if self._function(answer) else None

    def __repr__(self) -> str:
        return str(getattr(self._function, "__qualname__", None) or type(self._function).__qualname__)


class _Pair(Condition):
    sign: str

    def __init__(self, first: Condition, second: Condition) -> None:
        self._first = first
        self._second = second

    def __repr__(self) -> str:
        return f" {self.sign} ".join(
            f"({part!r})" if isinstance(part, _Pair) and part.sign != self.sign else repr(part)
            for part in (self._first, self._second)
        )


class _Any(_Pair):
    sign = "|"

    def deadline(self) -> tuple[float, Condition] | None:
        deadlines = filter(None, (self._first.deadline(), self._second.deadline()))
        return min(deadlines, key=lambda deadline: deadline[0], default=None)

    def watch(self) -> Watch:
        first, second = self._first.watch(), self._second.watch()

        def look(answer: Any) -> Condition | None:
            # Both, at each chunk: each remembers how far it has looked.
            met, other = first(answer), second(answer)
            return met or other

        return look


class _All(_Pair):
    sign = "&"

    def watch(self) -> Watch:
        first, second = self._first.watch(), self._second.watch()

        def look(answer: Any) -> Condition | None:
            met, other = first(answer), second(answer)
            return self if met and other else None

        return look
