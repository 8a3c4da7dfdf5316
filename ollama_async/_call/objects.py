"""``Objects`` and ``Items``: the JSON of a streamed answer as objects, while it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from ollama_async._errors import ParseError, RequestError

from .awaitable import Guarded
from .condition import Condition, Watch
from .jsontext import Frame, JsonFault, JsonReader
from .partial import Fault, Partial, PartialReader, Path, fault, first_fault, path_of
from .shape import ANY, Shape, shape_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

__all__ = ["JSON_COMPLETE", "Items", "Objects", "Parsing", "Structured"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _HasParsed(Protocol[T_co]):
    @property
    def parsed(self) -> T_co: ...


class Parsing(Protocol[T_co]):
    """A stream whose answer can be parsed, as type checkers see it."""

    def __anext__(self) -> Coroutine[Any, Any, _HasParsed[T_co]]: ...


class Structured(Protocol):
    """What is needed of a stream: to read it, and to end it."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    @property
    def outcome(self) -> str | None: ...

    @property
    def text(self) -> str: ...

    @property
    def _response_model(self) -> type[BaseModel] | None: ...

    @property
    def response(self) -> Any: ...

    def _stop_with(self, met: Condition) -> None: ...

    def _fail_with(self, error: Exception) -> NoReturn: ...

    def _reader_cancelled(self) -> None: ...


class JsonComplete(Condition):
    """Met when the answer's text is a whole JSON value."""

    def watch(self) -> Watch:
        reader, seen, broken = JsonReader(), 0, False

        def look(answer: Any) -> Condition | None:
            nonlocal seen, broken
            text = answer.text
            if not broken:
                try:
                    reader.feed(text[seen:])
                except JsonFault:
                    broken = True
            seen = len(text)
            return self if reader.complete else None

        return look

    def __repr__(self) -> str:
        return "json_complete()"


JSON_COMPLETE: Final = JsonComplete()


class _View(ABC, Generic[T]):
    """A stream as what is in its JSON. Leaving the loop over it, in any way, closes the stream at once."""

    def __init__(self, stream: Structured, name: str) -> None:
        self._stream = stream
        self._name = name

    def __aiter__(self) -> AsyncIterator[T]:
        """Return an iterator that only the loop has, and that closes the stream when it is dropped."""
        return _Iterator(self._stream, self._name, self._source())

    @abstractmethod
    def _source(self) -> _Source[T]:
        """Return what makes, of the text, what is delivered."""


class _Source(Protocol[T_co]):
    """Takes pieces of the text; raises ``JsonFault`` or ``Fault``."""

    @property
    def complete(self) -> bool: ...

    def feed(self, text: str) -> None: ...

    def feed_eof(self) -> None: ...

    def ready(self) -> bool: ...

    def take(self) -> T_co: ...


class Objects(_View[Partial[T]]):
    """The answer's object as it grows: ``async for partial in stream.objects()``."""

    def __init__(self, stream: Structured, *, fail_fast: bool) -> None:
        model = stream._response_model  # noqa: SLF001
        super().__init__(stream, _name_of(model))
        self._shape = ANY if model is None else shape_of(model)
        self._fail_fast = fail_fast

    def _source(self) -> _Source[Partial[T]]:
        return _GrowingObject(PartialReader(self._shape, fail_fast=self._fail_fast))


class Items(_View[T]):
    """The elements of a list in the answer, each when it is whole: ``async for city in stream.items("cities")``."""

    def __init__(self, stream: Structured, path: Path, item: Any) -> None:
        model = stream._response_model  # noqa: SLF001
        super().__init__(stream, _name_of(model))
        self._path = path_of(path)
        given = _element(self._path, shape_of(model), model) if model is not None else ANY
        self._shape = given if item is None else shape_of(item)
        # A model may do without it, or else says that it is missing.
        self._needed = model is None

    def _source(self) -> _Source[T]:
        return _Elements(self._path, self._shape, needed=self._needed)


class _GrowingObject:
    def __init__(self, reader: PartialReader) -> None:
        self._reader = reader
        self._partial: Partial[Any] | None = None

    @property
    def complete(self) -> bool:
        return self._reader.complete

    def feed(self, text: str) -> None:
        self._reader.feed(text)
        self._partial = self._reader.changed()

    def feed_eof(self) -> None:
        self._reader.feed_eof()
        self._partial = self._reader.changed()

    def ready(self) -> bool:
        return self._partial is not None

    def take(self) -> Partial[Any]:
        partial, self._partial = self._partial, None
        assert partial is not None
        return partial


class _Elements:
    """Finds the elements of one list."""

    def __init__(self, path: tuple[str, ...], shape: Shape, *, needed: bool) -> None:
        self._path = path
        self._shape = shape
        self._needed = needed
        self._reader = JsonReader(self)
        self._elements: deque[Any] = deque()
        self._found = False

    @property
    def complete(self) -> bool:
        return self._reader.complete

    def feed(self, text: str) -> None:
        self._reader.feed(text)
        if self.complete:
            self._check_found()

    def feed_eof(self) -> None:
        self._reader.feed_eof()
        self._check_found()

    def ready(self) -> bool:
        return bool(self._elements)

    def take(self) -> Any:
        return self._elements.popleft()

    def opened(self, parent: Frame | None, frame: Frame) -> None:
        """Notice the list."""
        if self._is_there(len(self._reader.stack)):
            self._found = True
            if frame.kind != "[":
                raise Fault(f"the value at {'.'.join(self._path)!r} is an object, not a list")
            frame.note = True

    def completed(self, parent: Frame | None, value: Any, frame: Frame | None) -> None:
        """Take an element of the list."""
        if parent is not None and parent.note:
            try:
                self._elements.append(self._shape.validated(value))
            except ValidationError as exc:
                raise fault(*first_fault(exc, (*self._path, parent.key))) from exc
        elif frame is None and self._is_there(len(self._reader.stack)):
            self._found = True
            # A null is a list that is not there.
            if value is not None:
                raise Fault(f"the value at {'.'.join(self._path)!r} is {value!r}, not a list")

    def _is_there(self, depth: int) -> bool:
        stack = self._reader.stack
        return depth == len(self._path) and all(
            str(frame.key) == key for frame, key in zip(stack, self._path, strict=True)
        )

    def _check_found(self) -> None:
        if not self._found and self._needed:
            raise Fault(f"there is no list at {'.'.join(self._path)!r}")


class _Iterator(Generic[T]):
    """Reads a stream's chunks and delivers what is in them. When it is dropped, that closes the stream."""

    __slots__ = ("_chunks", "_name", "_source", "_stream")

    def __init__(self, stream: Structured, name: str, source: _Source[T]) -> None:
        self._stream = stream
        self._name = name
        self._source = source
        # Only this has it, and it closes the stream when it is dropped.
        self._chunks: AsyncIterator[Any] = aiter(stream)
        if stream.text:
            self._feed(stream.text)

    def __aiter__(self) -> _Iterator[T]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        return Guarded(self._next(), self._stream._reader_cancelled, f"{type(self).__name__}.__anext__")  # noqa: SLF001

    async def _next(self) -> T:
        stream, source = self._stream, self._source
        while True:
            # After an abort nothing is delivered; the next chunk raises it.
            if source.ready() and stream.outcome in _DELIVERS:
                return source.take()
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                if source.complete or stream.outcome == "until":
                    raise
                self._feed_eof()
                if not source.ready():
                    raise
            else:
                if chunk.text:
                    self._feed(chunk.text)

    def _feed(self, text: str) -> None:
        self._try(lambda: self._source.feed(text))
        if self._source.complete:
            self._stream._stop_with(JSON_COMPLETE)  # noqa: SLF001

    def _feed_eof(self) -> None:
        self._try(self._source.feed_eof)

    def _try(self, feed: Callable[[], None]) -> None:
        try:
            feed()
        except (JsonFault, Fault) as exc:
            cut = getattr(self._stream.response, "done_reason", None) == "length"
            error = ParseError(self._name, self._stream.text, reason=str(exc), cut=cut)
            self._stream._fail_with(error)  # noqa: SLF001
        except Exception as exc:
            # A validator of the caller's model.
            self._stream._fail_with(exc)  # noqa: SLF001


_DELIVERS = {None, "done", "until", "truncated"}


def _name_of(model: type[BaseModel] | None) -> str:
    return "JSON" if model is None else model.__name__


def _element(path: tuple[str, ...], shape: Shape, model: type[BaseModel]) -> Shape:
    """Return the shape of the elements of a list of a model.

    Raises:
        RequestError: It has no list there.
    """
    at: list[str] = []
    for key in path:
        container = shape.container("[" if key.isdecimal() else "{")
        part = None if container is None else container.part(key)
        if container is None or part is None:
            known = container and container.parts()
            raise RequestError(
                f"items({'.'.join(path)!r}): {model.__name__} has no {'.'.join([*at, key])!r}"
                + (f"; it has {', '.join(known)}" if known else "")
            )
        at.append(key)
        shape = part
    container = shape.container("[")
    element = None if container is None else container.part(0)
    if element is None:
        raise RequestError(
            f"items({'.'.join(path)!r}): that field of {model.__name__} is not a list; give the path of a list"
        )
    return element
