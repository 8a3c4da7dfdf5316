"""``Partial``: an object as far as it has come, and ``PartialReader``, which makes them of a growing text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar, cast

from pydantic import ValidationError

from ollama_async._errors import RequestError, shown

from .jsontext import Frame, JsonReader

if TYPE_CHECKING:
    from .shape import Container, Shape

__all__ = ["Fault", "FieldState", "Partial", "PartialReader", "Path", "fault", "first_fault", "path_of"]

T = TypeVar("T")

FieldState = Literal["absent", "growing", "complete"]

Path: TypeAlias = str | Sequence[str | int]
"""Where a value is: keys and indices joined by dots, as ``"cities.0.name"``, or one by one; ``""`` is the whole."""

# What is not shown, or not there.
_NOTHING: Final = object()


class Fault(Exception):  # noqa: N818  (it becomes the reason of a ParseError)
    """A value is complete and not what it is meant to be."""


def path_of(given: object) -> tuple[str, ...]:
    """Read a path.

    Raises:
        RequestError: It is not a path.
    """
    if isinstance(given, str):
        return tuple(given.split(".")) if given else ()
    said = f"path={shown(given)}: give keys joined by dots, as 'answer.cities', or a list of keys"
    parts = list(cast("Sequence[object]", given)) if isinstance(given, (list, tuple)) else [None]
    if all(isinstance(part, (str, int)) for part in parts):
        return tuple(map(str, parts))
    raise RequestError(said)


def first_fault(exc: ValidationError, path: tuple[object, ...]) -> tuple[str, str]:
    """Return where the first thing is that is wrong below a path, and what it is."""
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(map(str, (*path, *first["loc"]))), first["msg"]


def fault(where: str, what: str) -> Fault:
    """Return the fault of something that is wrong."""
    return Fault(f"{where}: {what}" if where else what)


class _Note:
    """What is kept of an object or a list that is open.

    Attributes:
        container: What it is; ``None`` if it is not shown before it is complete.
        built: Its complete parts as they are shown; nothing is ever taken out or replaced.
        errors: How many errors there were when it began.
    """

    __slots__ = ("built", "container", "errors")

    def __init__(self, frame: Frame, container: Container | None, errors: int) -> None:
        self.container = container
        self.errors = errors
        self.built: Any = {} if frame.kind == "{" else []


class Partial(Generic[T]):
    """The part of an object that has arrived.

    What one partial object shows, those after it show as well: strings only grow, lists only get longer, and all else
    is shown when it is complete.

    Attributes:
        complete: Whether it is whole; then ``value`` has been validated.
        errors: What is wrong with parts that are complete, by their paths.
    """

    __slots__ = ("_levels", "_scalar", "_string", "_value", "complete", "errors")

    def __init__(
        self,
        levels: Sequence[tuple[Frame, str | int | None, int, int]],
        string: tuple[list[str], int] | None,
        *,
        scalar: bool,
        value: Any,
        complete: bool,
        errors: Mapping[str, str],
    ) -> None:
        # Of each frame the key under which more comes, how many parts are complete, and how many of them are shown.
        # All that these point to only grows, so that the past can be seen in it.
        self._levels = levels
        self._string = string
        self._scalar = scalar
        self._value = value
        self.complete: bool = complete
        self.errors: Mapping[str, str] = errors

    @property
    def value(self) -> T:
        """The object: an instance of the model that was given as ``format=``, or else what JSON makes of it.

        It is made when it is first asked for. In a model that is not complete, what has not come is None, also where
        that has a default (``model_fields_set`` tells it from a null); such a model has not been validated.
        """
        if self._value is _NOTHING:
            self._value = self._built()
        value: T = self._value
        return value

    def state(self, path: Path = "") -> FieldState:
        """Return how far a part of it is.

        Args:
            path: Where it is, by the keys of the JSON: ``"cities.0.name"``, or ``["cities", 0, "name"]``; ``""`` is
                the whole.

        Raises:
            RequestError: That is not a path.
        """
        keys = path_of(path)
        if self.complete:
            return _state_within(self._value_as_json(), keys)
        for place, (frame, key, count, _) in enumerate(self._levels):
            if place == len(keys):
                return "growing"
            sought = keys[place]
            if frame.kind == "[":
                complete = sought.isdecimal() and int(sought) < count
            else:
                complete = sought in islice(frame.value, count)
            if complete:
                part = frame.value[sought if frame.kind == "{" else int(sought)]
                return _state_within(part, keys[place + 1 :])
            last = place == len(self._levels) - 1
            if str(key) != sought or (last and not self._scalar):
                return "absent"
        return "growing" if len(keys) <= len(self._levels) else "absent"

    def _value_as_json(self) -> Any:
        return self._levels[0][0].value if self._levels else None

    def _built(self) -> Any:
        value = _NOTHING if self._string is None else "".join(islice(self._string[0], self._string[1]))
        for frame, key, _, count in reversed(self._levels):
            note: _Note = frame.note
            if note.container is None:
                value = _NOTHING
                continue
            if frame.kind == "{":
                parts: Any = dict(islice(note.built.items(), count))
                if value is not _NOTHING:
                    parts[key] = value
            else:
                parts = note.built[:count]
                if value is not _NOTHING:
                    parts.append(value)
            value = note.container.built(parts)
        return None if value is _NOTHING else value

    def __repr__(self) -> str:
        return f"<Partial{', complete' if self.complete else ''}: {shown(self.value)}>"


def _state_within(value: Any, keys: Sequence[str]) -> FieldState:
    """Return the state of a part of a complete value."""
    for key in keys:
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (LookupError, TypeError, ValueError):
            return "absent"
    return "complete"


class PartialReader:
    """Makes partial objects of a growing text; sans-IO.

    Args:
        shape: What the object is meant to be.
        fail_fast: Whether the first part that is complete and wrong is a fault.

    Attributes:
        complete: Whether the object is whole.
    """

    def __init__(self, shape: Shape, *, fail_fast: bool = False) -> None:
        self._shape = shape
        self._fail_fast = fail_fast
        self._reader = JsonReader(self)
        self._root: Frame | None = None
        self._value: Any = _NOTHING
        self._errors: dict[str, str] = {}
        self._changes = 0
        self._seen: tuple[int, int] = (0, -1)

    @property
    def complete(self) -> bool:
        """Whether the object is whole."""
        return self._reader.complete

    def feed(self, text: str) -> None:
        """Take the next piece of the text.

        Raises:
            JsonFault: It is not JSON alone.
            Fault: The object is whole and wrong; with ``fail_fast`` a part of it.
        """
        self._reader.feed(text)

    def feed_eof(self) -> None:
        """Take the end of the text.

        Raises:
            JsonFault, Fault: As ``feed()`` does; also if the object is not whole.
        """
        self._reader.feed_eof()

    def changed(self) -> Partial[Any] | None:
        """Return the object as it is now, if more of it can be shown than when this was last asked."""
        string = self._shown_string()
        seen = (self._changes, len(string) if string is not None else -1)
        if seen == self._seen or not self._reader.begun:
            return None
        self._seen = seen
        errors = dict(self._errors)
        if self.complete:
            whole = [] if self._root is None else [(self._root, None, 0, 0)]
            return Partial(whole, None, scalar=False, value=self._value, complete=True, errors=errors)
        levels = [(frame, frame.key, len(frame.value), len(frame.note.built)) for frame in self._reader.stack]
        parts = None if string is None else (string, len(string))
        growing = self._reader.growing
        return Partial(levels, parts, scalar=growing, value=_NOTHING, complete=False, errors=errors)

    def _shown_string(self) -> list[str] | None:
        string, stack = self._reader.growing_string, self._reader.stack
        if string is None:
            return None
        shape = self._part(stack[-1]) if stack else self._shape
        return string if shape is not None and shape.shows_text else None

    # -- as the listener of the reader --

    def opened(self, parent: Frame | None, frame: Frame) -> None:
        """Note what an object or a list is meant to be."""
        shape = self._shape if parent is None else self._part(parent)
        frame.note = _Note(frame, None if shape is None else shape.container(frame.kind), len(self._errors))
        self._root = self._root or frame
        self._changes += 1

    def completed(self, parent: Frame | None, value: Any, frame: Frame | None) -> None:
        """Check what is complete."""
        self._changes += 1
        shape = self._shape if parent is None else self._part(parent)
        if shape is None:
            return
        note: _Note | None = None if frame is None else frame.note
        try:
            made = shape.validated(value)
        except ValidationError as exc:
            # It stays as it has been shown.
            made = value if note is None or note.container is None else note.container.built(note.built)
            # What is wrong with a part of it has been said.
            if parent is None or note is None or len(self._errors) == note.errors:
                self._note_error(tuple(frame.key for frame in self._reader.stack), exc, whole=parent is None)
        if parent is None:
            self._value = made
        elif parent.kind == "{":
            parent.note.built[parent.key] = made
        else:
            parent.note.built.append(made)

    def _note_error(self, path: tuple[object, ...], exc: ValidationError, *, whole: bool) -> None:
        where, what = first_fault(exc, path)
        self._errors[where] = what
        if whole or self._fail_fast:
            raise fault(where, what) from exc

    def _part(self, parent: Frame) -> Shape | None:
        """Return the shape of the part of an object or list that is next or has begun."""
        container = parent.note.container
        return None if container is None or parent.key is None else container.part(parent.key)
