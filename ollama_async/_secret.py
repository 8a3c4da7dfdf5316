"""What is never shown: crash reporters take the local variables of every frame on an error's way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)


class Secret(Generic[T]):
    """Something that may be a key, or have one in it.

    Functions have such things in their variables in this form only. Those that take it out return what is wrong with
    it, and leave it to their callers to raise the error: a frame that has returned is in no traceback.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<secret>"


def showable(kind: Kind) -> Kind:
    """Give objects of a class a ``repr`` from the first moment on: their ``__init__`` may be what has failed."""
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
