"""Chunks of a stream, merged into the answer they are parts of."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import TypeAdapter

from ._progress import Meter, ProgressResponse
from ._types import ChatResponse, GenerateResponse, Model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ChatMerge", "Chunk", "GenerateMerge", "Merge", "ProgressMerge", "validate_list"]


class Chunk(Protocol):
    """What a stream needs to know of a chunk."""

    @property
    def done(self) -> bool:
        """Whether it is the last one."""
        ...


ChunkT = TypeVar("ChunkT", bound=ChatResponse | GenerateResponse | ProgressResponse)


class Merge(Protocol[ChunkT]):
    """The answer so far. Adding a chunk is cheap; the merged answer is made when it is asked for."""

    model: type[ChunkT]

    together: int
    """How many chunks may be made at once, before the first of them is delivered."""

    def add(self, chunk: ChunkT) -> None:
        """Add the next chunk."""
        ...

    def text(self) -> str:
        """Return the text so far."""
        ...

    def result(self) -> ChunkT | None:
        """Return the answer so far, ``None`` before the first chunk."""
        ...


class _Lists:
    """Fields that come in parts, and are joined: lists of strings, and lists of lists."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.thinking: list[str] = []
        self.tool_calls: list[Any] = []
        self.logprobs: list[Any] = []

    def add_rest(self, chunk: Mapping[str, Any], part: Mapping[str, Any]) -> None:
        """Take what a chunk may have besides text: most have nothing."""
        if part["thinking"]:
            self.thinking.append(part["thinking"])
        if part["tool_calls"]:
            self.tool_calls += part["tool_calls"]
        if chunk["logprobs"]:
            self.logprobs += chunk["logprobs"]

    def update(self) -> dict[str, Any]:
        """Return what the joined fields have, but for the text."""
        fields: dict[str, Any] = {}
        if self.thinking:
            fields["thinking"] = "".join(self.thinking)
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        return fields


# Enough that what a call costs is shared by many; few enough that what a reader has not read yet stays small.
_TOGETHER = 64


def validate_list(model: type[ChunkT], data: bytes) -> list[ChunkT]:
    """Make chunks of a JSON array; raises pydantic's ``ValidationError``."""
    # mypy takes a class for unhashable whose instances are.
    key: Any = model
    chunks: list[ChunkT] = _list_validator(key)(data)
    return chunks


@cache
def _list_validator(model: type[Any]) -> Callable[[bytes], list[Any]]:
    validate: Callable[[bytes], list[Any]] = TypeAdapter(list[model]).validator.validate_json  # type: ignore[valid-type]
    return validate


class ChatMerge(_Lists):
    """Merges chunks of a chat."""

    model = ChatResponse
    together = _TOGETHER

    def __init__(self) -> None:
        super().__init__()
        self._last: ChatResponse | None = None

    def add(self, chunk: ChatResponse) -> None:
        """Add the next chunk."""
        self._last = chunk
        # Its fields as a dict: this runs for every token, and a field of a pydantic model is first looked for, in vain,
        # in its class.
        fields = chunk.__dict__
        part = fields["message"].__dict__
        if part["content"]:
            self.content.append(part["content"])
        if part["thinking"] or part["tool_calls"] or fields["logprobs"]:
            self.add_rest(fields, part)

    def text(self) -> str:
        """Return the content so far."""
        return "".join(self.content)

    def result(self) -> ChatResponse | None:
        """Return the answer so far, ``None`` before the first chunk."""
        last = self._last
        if last is None:
            return None
        message = last.message.model_copy(update={"content": self.text(), **self.update()})
        return _copy(last, self.logprobs, message=message)


class GenerateMerge(_Lists):
    """Merges chunks of a completion."""

    model = GenerateResponse
    together = _TOGETHER

    def __init__(self) -> None:
        super().__init__()
        self._last: GenerateResponse | None = None

    def add(self, chunk: GenerateResponse) -> None:
        """Add the next chunk."""
        self._last = chunk
        fields = chunk.__dict__
        if fields["response"]:
            self.content.append(fields["response"])
        if fields["thinking"] or fields["tool_calls"] or fields["logprobs"]:
            self.add_rest(fields, fields)

    def text(self) -> str:
        """Return the response so far."""
        return "".join(self.content)

    def result(self) -> GenerateResponse | None:
        """Return the answer so far, ``None`` before the first chunk."""
        if self._last is None:
            return None
        return _copy(self._last, self.logprobs, response=self.text(), **self.update())


class ProgressMerge:
    """Of progress, the last step is what counts."""

    model = ProgressResponse
    # How far the whole is, is noted on each when it is merged.
    together = 1

    def __init__(self) -> None:
        self._last: ProgressResponse | None = None
        self._meter = Meter()

    def add(self, chunk: ProgressResponse) -> None:
        """Add the next step, and note on it how far the whole is."""
        self._meter.add(chunk)
        self._last = chunk

    def text(self) -> str:
        """Return the last status."""
        return (self._last and self._last.status) or ""

    def result(self) -> ProgressResponse | None:
        """Return the last step, ``None`` before the first one."""
        return self._last


ModelT = TypeVar("ModelT", bound=Model)


def _copy(last: ModelT, logprobs: list[Any], **fields: Any) -> ModelT:
    if logprobs:
        fields["logprobs"] = list(logprobs)
    return last.model_copy(update=fields)
