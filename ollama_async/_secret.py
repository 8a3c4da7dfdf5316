"""``Secret``: keeps keys out of reports, since crash reporters show the local variables of every frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)


class Secret(Generic[T]):
    """A value that may be a key, or may contain one.

    Functions hold such values only in this form. A function that takes the value out returns what is wrong with it, and
    its caller raises the error: a frame that has returned is not in the traceback.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<secret>"


def showable(kind: Kind) -> Kind:
    """Give a class a ``repr`` that also works before ``__init__`` is done, which may be what failed."""
    whole = cast("Callable[[Any], str]", kind.__repr__)

    def shown(self: Any) -> str:
        try:
            return whole(self)
        except AttributeError:
            return f"<{type(self).__name__}, not made yet>"

    shown.__name__ = "__repr__"
    shown.__qualname__ = f"{kind.__qualname__}.__repr__"
    kind.__repr__ = shown  # type: ignore[method-assign, assignment]
    return kind
