"""Chunks of a stream, merged into the answer they are parts of."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic_core import core_schema as cs

from ollama_async._call.chunk import ChunkT, Validators

from .progress import Meter, ProgressResponse
from .types import ChatResponse, GenerateResponse, Message, Sparse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class _Lists:
    """Fields that come in parts, and are joined.

    Each part but the text is under the number of its chunk: a chunk that is added again, since Ctrl-C came while it was
    added, is not in the answer twice.
    """

    __slots__ = ("_grown", "_grown_count", "content", "logprobs", "thinking", "tool_calls")

    def __init__(self) -> None:
        # The text of the first so many chunks, for growing_text().
        self._grown, self._grown_count = "", 0
        self.content: list[str] = []
        self.thinking: dict[int, str] = {}
        self.tool_calls: dict[int, Sequence[Any]] = {}
        self.logprobs: dict[int, Sequence[Any]] = {}

    def add_rest(self, chunk: Mapping[str, Any], part: Mapping[str, Any]) -> None:
        """Take what a chunk may have besides text: most have nothing."""
        number = len(self.content)
        if part["thinking"]:
            self.thinking[number] = part["thinking"]
        if part.get("tool_calls"):
            self.tool_calls[number] = part["tool_calls"]
        if chunk.get("logprobs"):
            self.logprobs[number] = chunk["logprobs"]

    def count(self) -> int:
        """Return how many chunks have been added."""
        return len(self.content)

    def text(self) -> str:
        """Return the text so far."""
        return "".join(self.content)

    def growing_text(self) -> str:
        """Return the text so far, at a cost that does not grow with it; for the reader alone."""
        # Python makes a string longer in place if a local variable is all that holds it: this takes it out of the
        # attribute meanwhile. Interrupted, it begins anew.
        count, self._grown_count = self._grown_count, 0
        text, self._grown = self._grown if count else "", ""
        for part in self.content[count:]:
            text += part
        self._grown = text
        self._grown_count = len(self.content)
        return text

    def of_message(self) -> dict[str, Any]:
        """Return the joined fields that a message has, but for the text."""
        fields: dict[str, Any] = {}
        if self.thinking:
            fields["thinking"] = "".join(list(self.thinking.values()))
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
        # moment has the same, only not shared. Who completes a class in this moment is noticed by us.
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


class ChatMerge(_Lists):
    """Merges chunks of a chat."""

    __slots__ = ("_last",)

    model = ChatResponse
    batch_size = _BATCH_SIZE
    bytes_done = 0

    def __init__(self) -> None:
        super().__init__()
        self._last: ChatResponse | None = None

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
        return self._with_text(self.growing_text())

    def _with_text(self, text: str) -> ChatResponse | None:
        last = self._last
        if last is None:
            return None
        message = last.message.model_copy(update={"content": text, **self.of_message()})
        return last.model_copy(update={"message": message, **self.of_chunk()})


class GenerateMerge(_Lists):
    """Merges chunks of a completion."""

    __slots__ = ("_last",)

    model = GenerateResponse
    batch_size = _BATCH_SIZE
    bytes_done = 0

    def __init__(self) -> None:
        super().__init__()
        self._last: GenerateResponse | None = None

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
        return self._with_text(self.growing_text())

    def _with_text(self, text: str) -> GenerateResponse | None:
        if self._last is None:
            return None
        return self._last.model_copy(update={"response": text, **self.of_message(), **self.of_chunk()})


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
