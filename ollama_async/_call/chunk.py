"""What a stream needs to know of its chunks: that one is the last, how they are made of JSON, how they are merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from pydantic_core import SchemaValidator
from pydantic_core import core_schema as cs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Self

    from pydantic import BaseModel

    from .asked import Asked


class ResponseInfo:
    """Where an answer comes from: what is known of it besides its body.

    Attributes:
        status_code: The HTTP status.
        raw_headers: The headers, as they came.
        response_model: The model that the caller wants the answer's text to be, if any.
        asked: What the call asked of a model, if it did.
    """

    __slots__ = ("asked", "raw_headers", "response_model", "status_code")

    def __init__(
        self,
        status_code: int,
        raw_headers: Sequence[tuple[bytes, bytes]],
        response_model: type[BaseModel] | None = None,
        asked: Asked | None = None,
    ) -> None:
        self.status_code: int = status_code
        self.raw_headers: Sequence[tuple[bytes, bytes]] = raw_headers
        self.response_model: type[BaseModel] | None = response_model
        self.asked: Asked | None = asked


class Chunk(Protocol):
    """One part of a streamed answer: any pydantic model that knows whether it is the last."""

    @property
    def done(self) -> bool:
        """Whether it is the last one."""
        ...

    def set_response_info(self, info: ResponseInfo) -> None:
        """Note where the answer comes from; only told to a merged answer."""
        ...


ChunkT = TypeVar("ChunkT", bound=Chunk)


class Validators(Generic[ChunkT]):
    """How chunks are made of JSON: one of an object, or many of an array; both raise pydantic's ``ValidationError``."""

    __slots__ = ("many", "one", "whole")

    def __init__(self, schema: cs.CoreSchema, whole: Callable[[bytes], object] | None = None) -> None:
        self.one: Callable[[bytes], ChunkT] = SchemaValidator(schema).validate_json
        # Says what is wrong with a chunk, once where the schema describes it in two ways.
        self.whole: Callable[[bytes], object] = whole or self.one
        self.many: Callable[[bytes], list[ChunkT]] = SchemaValidator(cs.list_schema(schema)).validate_json

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the validators of a pydantic model."""
        model.model_rebuild()
        return cls(model.__pydantic_core_schema__)


class Merge(Protocol[ChunkT]):
    """The answer so far. Adding a chunk is cheap; the merged answer is made when it is asked for."""

    model: type[ChunkT]

    batch_size: int
    """How many chunks may be made at once, before the first of them is delivered."""

    bytes_done: int
    """Bytes that are done, if it is about bytes; else 0."""

    @property
    def validators(self) -> Validators[ChunkT]:
        """How chunks are made."""
        ...

    def add(self, chunk: ChunkT) -> None:
        """Add the next chunk; when ``count()`` counts it, it has been added."""
        ...

    def count(self) -> int:
        """Return how many chunks have been added."""
        ...

    def text(self) -> str:
        """Return the text so far."""
        ...

    def result(self) -> ChunkT | None:
        """Return the answer so far, ``None`` before the first chunk."""
        ...

    def growing_result(self) -> ChunkT | None:
        """Return what ``result()`` does, at a cost that does not grow with the answer; for the reader alone."""
        ...
