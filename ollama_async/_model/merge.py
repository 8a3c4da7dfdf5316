"""Chunks of a stream, merged into the answer they are parts of."""

from __future__ import annotations

import threading
from collections.abc import Reversible, Sized
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel
from pydantic_core import core_schema as cs

from ollama_async._call.chunk import ChunkT, Validators

from .progress import Meter, ProgressResponse
from .types import ChatResponse, GenerateResponse, Message, Sparse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_ModelT = TypeVar("_ModelT", bound=BaseModel)


class _Parts(Sized, Reversible[str], Protocol):
    """_Parts of a text in order."""


class _GrowingText:
    """The beginning of a text whose parts come one by one; adding to it does not copy it."""

    __slots__ = ("_before", "_count", "_text")

    def __init__(self, before: str = "") -> None:
        self._before = before
        # The text of the first so many parts.
        self._text, self._count = "", 0

    def of(self, parts: _Parts) -> str:
        """Return the text of all parts so far."""
        # Python makes a string longer in place if a local variable is all that holds it: this takes it out of the
        # attribute meanwhile. Interrupted, it begins anew.
        count, self._count = self._count, 0
        text, self._text = self._text if count else self._before, ""
        newest = list(islice(reversed(parts), len(parts) - count))
        for part in reversed(newest):
            text += part
        self._text = text
        self._count = count + len(newest)
        return text


class _Lists:
    """Fields that come in parts, and are joined.

    Each part but the text is under the number of its chunk: a chunk that is added again, since Ctrl-C came while it was
    added, is not in the answer twice.
    """

    __slots__ = ("_before", "_grown_content", "_grown_thinking", "content", "logprobs", "thinking", "tool_calls")

    def __init__(self, before: str = "", thinking: str | None = None, logprobs: Sequence[Any] | None = None) -> None:
        # Of the answer that this one continues.
        self._before = before
        # Made at the first question: most streams are never asked.
        self._grown_content: _GrowingText | None = None
        self._grown_thinking: _GrowingText | None = None
        self.content: list[str] = []
        # Made when one comes: most answers have none.
        self.thinking: dict[int, str] | None = {-1: thinking} if thinking else None
        self.tool_calls: dict[int, Sequence[Any]] | None = None
        self.logprobs: dict[int, Sequence[Any]] | None = {-1: logprobs} if logprobs else None

    def add_rest(self, chunk: Mapping[str, Any], part: Mapping[str, Any]) -> None:
        """Take what a chunk may have besides text: most have nothing."""
        number = len(self.content)
        if part["thinking"]:
            self.thinking = self.thinking or {}
            self.thinking[number] = part["thinking"]
        if part.get("tool_calls"):
            self.tool_calls = self.tool_calls or {}
            self.tool_calls[number] = part["tool_calls"]
        if chunk.get("logprobs"):
            self.logprobs = self.logprobs or {}
            self.logprobs[number] = chunk["logprobs"]

    def count(self) -> int:
        """Return how many chunks have been added."""
        return len(self.content)

    def text(self) -> str:
        """Return the text so far."""
        return self._before + "".join(self.content)

    def growing_text(self) -> str:
        """Return the text so far, at a cost that does not grow with it; for the reader alone."""
        if self._grown_content is None:
            self._grown_content = _GrowingText(self._before)
        return self._grown_content.of(self.content)

    def growing_thinking(self) -> str | None:
        """Return the thinking so far, in the same way."""
        if not self.thinking:
            return None
        if self._grown_thinking is None:
            self._grown_thinking = _GrowingText()
        return self._grown_thinking.of(self.thinking.values())

    def of_message(self, thinking: str | None = None) -> dict[str, Any]:
        """Return the joined fields that a message has, but for the text; the thinking as given, if it is."""
        fields: dict[str, Any] = {}
        if self.thinking:
            fields["thinking"] = "".join(list(self.thinking.values())) if thinking is None else thinking
        if self.tool_calls:
            fields["tool_calls"] = _joined(self.tool_calls)
        return fields

    def of_chunk(self) -> dict[str, Any]:
        """Return the joined fields that a chunk has beside the message."""
        return {"logprobs": _joined(self.logprobs)} if self.logprobs else {}


def _joined(parts: dict[int, Sequence[Any]]) -> list[Any]:
    # Of a copy: this may be another thread than the reader's.
    return [item for part in list(parts.values()) for item in part]


# Enough that what a call costs is shared by many; few enough that what a reader has not read yet stays small.
_BATCH_SIZE = 64


def validators(model: type[ChunkT]) -> Validators[ChunkT]:
    """Return how chunks of a class are made."""
    # mypy takes a class for unhashable whose instances are.
    key: Any = model
    made: Validators[ChunkT] = _validators(key)
    return made


@cache
def _validators(model: type[Any]) -> Validators[Any]:
    if not issubclass(model, Sparse):
        return Validators[Any].of(model)
    with _building:
        model.model_rebuild()
        made = _sparse(model)
        Message.may_lack_fields()
        model.may_lack_fields()
    return made


# Reentrant: a signal handler may begin a stream.
_building = threading.RLock()


def _schema(model: type[Any]) -> cs.CoreSchema:
    schema: cs.CoreSchema = model.__pydantic_core_schema__
    return schema


def _sparse(model: type[Sparse]) -> Validators[Any]:
    """Make validators whose chunks have only the fields that came, where they are what a line of a token has."""
    while True:
        # For a class that is complete, pydantic does not follow the schema that it is given, but takes the validator
        # that the class has. It asks for that only when it builds one, so nobody else notices: who builds one in this
        # moment has the same, only not shared. We notice a class that is completed in this moment.
        complete = [cls for cls in (Message, model) if cls.__pydantic_complete__]
        try:
            for cls in complete:
                cls.__pydantic_complete__ = False
            schema = cs.union_schema([_token(model), _schema(model)], mode="left_to_right")
            made: Validators[Any] = Validators(schema, model.model_validate_json)
            if not (Message.__pydantic_complete__ or model.__pydantic_complete__):
                return made
        finally:
            for cls in complete:
                cls.__pydantic_complete__ = True


def _token(model: type[Sparse]) -> cs.CoreSchema:
    """Describe what nearly all lines of an answer are; those that are more have to be described as a whole."""
    text, flag = cs.str_schema(), cs.bool_schema()
    perhaps = cs.with_default_schema(text, default=None)
    if model is ChatResponse:
        message = _just(Message, role=text, content=text, thinking=perhaps)
        return _just(model, model=text, created_at=text, message=message, done=flag)
    return _just(model, model=text, created_at=text, response=text, thinking=perhaps, done=flag)


def _just(cls: type[Sparse], /, **fields: cs.CoreSchema) -> cs.CoreSchema:
    # Unknown fields are allowed, as they are in the whole, so that instances are alike; but no JSON is valid as one.
    fits = {name: cs.model_field(schema) for name, schema in fields.items()}
    return cs.model_schema(
        cls, cs.model_fields_schema(fits, extra_behavior="allow", extras_schema=cs.is_instance_schema(cls))
    )


# An answer that was cut and is continued is not at its end.
_OPEN = {"done": False, "done_reason": None}


class ChatMerge(_Lists):
    """Merges chunks of a chat.

    Args:
        before: The partial answer that they continue.
    """

    __slots__ = ("_last",)

    model = ChatResponse
    batch_size = _BATCH_SIZE
    bytes_done = 0

    def __init__(self, before: ChatResponse | None = None) -> None:
        if before is None:
            super().__init__()
        else:
            super().__init__(before.text, before.message.thinking, before.logprobs)
        self._last: ChatResponse | None = before and before.model_copy(update=_OPEN)

    def add(self, chunk: ChatResponse) -> None:
        """Add the next chunk."""
        self._last = chunk
        # Its fields as a dict: this runs for every token, and a field of a pydantic model is first looked for, in vain,
        # in its class.
        fields = chunk.fields_that_came
        part = fields["message"].fields_that_came
        if part["thinking"] or part.get("tool_calls") or fields.get("logprobs"):
            self.add_rest(fields, part)
        # At last, and also if it is empty: it is what is counted.
        self.content.append(part["content"] or "")

    @property
    def validators(self) -> Validators[ChatResponse]:
        """How chunks are made."""
        return validators(ChatResponse)

    def result(self) -> ChatResponse | None:
        """Return the answer so far, ``None`` before the first chunk."""
        return self._with_text(self.text())

    def growing_result(self) -> ChatResponse | None:
        """Return what ``result()`` does, at a cost that does not grow with the answer; for the reader alone."""
        return self._with_text(self.growing_text(), self.growing_thinking())

    def _with_text(self, text: str, thinking: str | None = None) -> ChatResponse | None:
        last = self._last
        if last is None:
            return None
        message = _replaced(last.message, content=text, **self.of_message(thinking))
        return _replaced(last, message=message, **self.of_chunk())


class GenerateMerge(_Lists):
    """Merges chunks of a completion.

    Args:
        before: The partial answer that they continue.
    """

    __slots__ = ("_last",)

    model = GenerateResponse
    batch_size = _BATCH_SIZE
    bytes_done = 0

    def __init__(self, before: GenerateResponse | None = None) -> None:
        if before is None:
            super().__init__()
        else:
            super().__init__(before.text, before.thinking, before.logprobs)
        self._last: GenerateResponse | None = before and before.model_copy(update=_OPEN)

    def add(self, chunk: GenerateResponse) -> None:
        """Add the next chunk."""
        self._last = chunk
        fields = chunk.fields_that_came
        if fields["thinking"] or fields.get("tool_calls") or fields.get("logprobs"):
            self.add_rest(fields, fields)
        self.content.append(fields["response"] or "")

    @property
    def validators(self) -> Validators[GenerateResponse]:
        """How chunks are made."""
        return validators(GenerateResponse)

    def result(self) -> GenerateResponse | None:
        """Return the answer so far, ``None`` before the first chunk."""
        return self._with_text(self.text())

    def growing_result(self) -> GenerateResponse | None:
        """Return what ``result()`` does, at a cost that does not grow with the answer; for the reader alone."""
        return self._with_text(self.growing_text(), self.growing_thinking())

    def _with_text(self, text: str, thinking: str | None = None) -> GenerateResponse | None:
        if self._last is None:
            return None
        return _replaced(self._last, response=text, **self.of_message(thinking), **self.of_chunk())


def _replaced(chunk: _ModelT, **fields: Any) -> _ModelT:
    # interop merges ollama-python's chunks, too.
    return chunk.replaced(**fields) if isinstance(chunk, Sparse) else chunk.model_copy(update=fields)


class ProgressMerge:
    """Of progress, the last step is what counts."""

    model = ProgressResponse
    # How far the whole is, is noted on each when it is merged.
    batch_size = 1

    def __init__(self) -> None:
        self.bytes_done = 0
        self._count = 0
        self._last: ProgressResponse | None = None
        self._meter = Meter()

    def add(self, chunk: ProgressResponse) -> None:
        """Add the next step, and note on it how far the whole is."""
        self._meter.add(chunk)
        self.bytes_done = chunk.overall.completed
        self._last = chunk
        self._count += 1

    def count(self) -> int:
        """Return how many chunks have been added."""
        return self._count

    def text(self) -> str:
        """Return the last status."""
        return (self._last and self._last.status) or ""

    @property
    def validators(self) -> Validators[ProgressResponse]:
        """How steps are made."""
        return validators(ProgressResponse)

    def result(self) -> ProgressResponse | None:
        """Return the last step, ``None`` before the first one."""
        return self._last

    growing_result = result
