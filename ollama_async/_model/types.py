"""What the server sends, as pydantic models.

Every model keeps fields that it does not know, so that a newer server's are never lost, and can be read like a dict:
``reply.message.content`` and ``reply["message"]["content"]`` are the same. Durations are in nanoseconds, as sent.
"""

from __future__ import annotations

import base64
import os
import urllib.parse
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import GetSetDescriptorType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    cast,
)

import httpx
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import from_json

from ollama_async._call.chunk import ResponseInfo  # noqa: TC001  (so that typing.get_type_hints() finds it)
from ollama_async._errors import ParseError, RequestError
from ollama_async._secret import showable

T = TypeVar("T")


# -- what others give --


class Dumpable(Protocol):
    """An object of a pydantic model, such as one of ollama-python's, or of anything else that can be dumped."""

    def model_dump(self) -> Any:
        """Return what it consists of."""
        ...


def has_dump(value: object) -> bool:
    """Whether it is an object of a pydantic model, or of anything else with ``model_dump()``."""
    return not isinstance(value, type) and callable(getattr(value, "model_dump", None))


def plain(value: Any, *, without: str | None = None) -> Any:
    """Return dicts, lists and plain values in place of the objects with ``model_dump()`` that a value is made of.

    Args:
        value: Anything.
        without: A field to leave out of the value itself, before it is dumped.

    Raises:
        RequestError: An object cannot be dumped, or it is nested too deeply.
    """
    try:
        return _plain(value, without)
    except RecursionError:
        raise RequestError(f"{type(value).__name__}: it contains itself, or is nested too deeply") from None


def _plain(value: Any, without: str | None = None) -> Any:
    if isinstance(value, Mapping):
        fields = cast("Mapping[object, object]", value)
        return {name: _plain(field) for name, field in fields.items() if name != without}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if not has_dump(value):
        return value
    dumped = _dumped(value, without)
    # Not what stands for anything, such as a mock, whose model_dump() returns another one without end.
    return value if has_dump(dumped) else _plain(dumped, without)


def _dumped(value: Any, without: str | None) -> Any:
    try:
        if isinstance(value, BaseModel):
            return value.model_dump(exclude_none=True, by_alias=True, exclude=None if without is None else {without})
        dumped = value.model_dump()
    except Exception as exc:
        raise RequestError(f"{type(value).__name__}.model_dump() failed: {exc}") from exc
    if not isinstance(dumped, Mapping):
        return dumped
    return {name: field for name, field in cast("Mapping[object, object]", dumped).items() if field is not None}


def base64_text(text: str) -> str | None:
    """Return the base64 that a server takes, out of any kind of base64 or a ``data:`` URL; ``None`` if it is neither.

    Line ends do not count, as for the server and for the programs that write them. Of the alphabet of URLs the server
    knows nothing, nor of ``data:``.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma:
            return None
        if not head.lower().endswith(";base64"):
            return base64.b64encode(urllib.parse.unquote_to_bytes(data)).decode("ascii")
        text = urllib.parse.unquote(data).strip()
    if "\n" in text or "\r" in text:
        text = text.replace("\r", "").replace("\n", "")
    if "-" in text or "_" in text:
        text = text.replace("-", "+").replace("_", "/")
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return text


# -- the base of all models --


class _OnlyIfSent:
    """Marks a field that ollama-python's model does not have.

    A program that was written for that one sees the field in a dump of all fields (``model_dump()``,
    ``dict()``) only if it was sent.
    """


IfSent = Annotated[T, _OnlyIfSent()]


@cache
def _only_if_sent(model: type[BaseModel]) -> Mapping[str, str]:
    """Return names and aliases of the fields that are marked."""
    return {
        name: field.alias or name
        for name, field in model.model_fields.items()
        if any(isinstance(mark, _OnlyIfSent) for mark in field.metadata)
    }


class Model(BaseModel):
    """Base of all models: unknown fields are kept, fields can be read like those of a dict."""

    # Beside the fields: it is neither compared nor dumped, and a chunk, which has none, does not pay for it.
    __slots__ = ("_info",)

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="allow",
        protected_namespaces=(),
        validate_by_name=True,
        validate_by_alias=True,
        defer_build=True,
        # A class in a class is a name that ollama-python has there, not a field's default. For pydantic it must have no
        # annotation; to be a type for mypy it must have one, which mypy then takes for a field's.
        ignored_types=(type(BaseModel), GetSetDescriptorType),
    )

    @property
    def status_code(self) -> int | None:
        """The HTTP status of the answer; ``None`` for a part of one."""
        info = self._response_info()
        return None if info is None else info.status_code

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the answer; empty for a part of one."""
        info = self._response_info()
        return httpx.Headers() if info is None else httpx.Headers(list(info.raw_headers))

    def set_response_info(self, info: ResponseInfo) -> None:
        """Note where the answer comes from."""
        object.__setattr__(self, "_info", info)

    def _response_info(self) -> ResponseInfo | None:
        # Past __getattr__, by which pydantic answers for what is not set: the merged answer is asked at every chunk.
        try:
            info: ResponseInfo = object.__getattribute__(self, "_info")
        except AttributeError:
            return None
        return info

    # A copy, by model_copy() as well, and what comes out of a pickle, come from where the original does.

    def __copy__(self) -> Self:
        return self._with_same_info(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self._with_same_info(super().__deepcopy__(memo))

    def __getstate__(self) -> dict[Any, Any]:
        return {**super().__getstate__(), "info": self._response_info()}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        info = state.pop("info", None)
        super().__setstate__(state)
        if info is not None:
            self.set_response_info(info)

    def _with_same_info(self, copied: Self) -> Self:
        info = self._response_info()
        if info is not None:
            copied.set_response_info(info)
        return copied

    if not TYPE_CHECKING:
        # Without annotations, since pydantic would take what it returns for what the schema says.

        @model_serializer(mode="wrap")
        def _without_unsent(self, handler):
            dumped = handler(self)
            for name, alias in _only_if_sent(type(self)).items():
                if name not in self.model_fields_set:
                    dumped.pop(name, None)
                    dumped.pop(alias, None)
            return dumped

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:
        marked, sent = _only_if_sent(type(self)), self.model_fields_set
        return ((name, value) for name, value in super().__iter__() if name not in marked or name in sent)

    def __getitem__(self, key: str) -> Any:
        if key in self:
            return getattr(self, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        # An old pydantic does not count an extra attribute as a set field.
        if key in self.model_fields_set or key in (self.model_extra or ()):
            return True
        field = type(self).model_fields.get(str(key))
        return field is not None and field.default is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or ``default`` if there is none of that name."""
        return getattr(self, key) if hasattr(self, key) else default


_set = object.__setattr__
_slot: Any = BaseModel.__dict__["__dict__"]
_write_down: Callable[[BaseModel, dict[str, Any]], None] = _slot.__set__


# In what is written down of an instance before it is complete, no field's name.
_COMPLETE = "\0"


class Sparse(Model):
    """Base of what a token is made of: an instance may have been made with only the fields that came.

    Storing that a dozen fields were not sent is a third of the work of making a token's two objects, and is mostly
    useless. So it is done when code needs everything that an instance holds. Such code (pydantic's serializer,
    comparison, copies, pickles, ``vars()``) reads its ``__dict__``, which is why this is a property.
    """

    if TYPE_CHECKING:

        @property
        def fields_that_came(self) -> Mapping[str, Any]:
            """What is written down; among it, everything that came."""
            ...
    else:
        fields_that_came = _slot

    def replaced(self, **fields: Any) -> Self:
        """Return a copy with other values of some fields, as ``model_copy(update=fields)`` does by way of pydantic."""
        made = type(self).__new__(type(self))
        _write_down(made, {**vars(self), **fields})
        extra, private = self.__pydantic_extra__, self.__pydantic_private__
        _set(made, "__pydantic_fields_set__", self.__pydantic_fields_set__ | fields.keys())
        _set(made, "__pydantic_extra__", None if extra is None else dict(extra))
        _set(made, "__pydantic_private__", None if private is None else dict(private))
        return self._with_same_info(made)

    @classmethod
    def may_lack_fields(cls) -> None:
        """From now on there are instances of this class that have only the fields that came."""
        fields = cls.model_fields
        defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
        # What has to come is there to keep its place. The last of those that have not come is in all instances that
        # were made in another way, also in those that somebody has constructed without what has to come.
        _absent[cls] = _Absent([*defaults][-1], dict.fromkeys(fields) | defaults, defaults)

    if not TYPE_CHECKING:

        @property
        def __dict__(self) -> dict[str, Any]:
            fields = self.fields_that_came
            absent = _absent.get(type(self))
            if absent is None or absent.last in fields:
                return fields
            # A new dict at once, not name by name: another thread may be looking. Of several that look, or a signal
            # handler that interrupts one, the first decides which it is: else what one of them sets would be lost.
            complete: dict[str, Any] = fields.setdefault(_COMPLETE, {**absent.in_order, **fields})
            _write_down(self, complete)
            return complete

        __dict__ = __dict__.setter(_write_down)

        def __getattr__(self, name: str) -> Any:
            absent = _absent.get(type(self))
            if absent is not None and name in absent.defaults and absent.last not in self.fields_that_came:
                return absent.defaults[name]
            return super().__getattr__(name)

        def __delattr__(self, name: str) -> None:
            # What is not written down cannot be deleted.
            vars(self)
            super().__delattr__(name)


class _Absent(NamedTuple):
    """What the fields of a class are that have not come."""

    last: str
    in_order: dict[str, Any]
    defaults: dict[str, Any]


# Only the classes of which chunks are made: not those derived from them.
_absent: dict[type[Sparse], _Absent] = {}


def _read_arguments(given: Any) -> Any:
    # Some servers send them as OpenAI does: as the text of a JSON object, and an empty one for none.
    if not isinstance(given, str):
        return given
    try:
        return from_json(given, allow_inf_nan=False) if given.strip() else {}
    except ValueError:
        return given


class ToolCall(Model):
    """A tool that the model wants called."""

    class Function(Model):
        """Which function, with which arguments."""

        name: str
        """Name of the function."""
        arguments: Annotated[dict[str, Any], BeforeValidator(_read_arguments)] = Field(default_factory=dict)
        """Arguments by name, in the model's order."""
        index: IfSent[int | None] = None
        """Place of this call among those of one answer."""

    id: IfSent[str | None] = None
    """Names the call; goes into ``Message.tool_call_id`` of the message with its result."""
    function: Function
    """The function to call."""


# Within Message its name is taken by the one that it has there in ollama-python.
_ToolCall: TypeAlias = ToolCall


class Message(Sparse):
    """A message of a chat."""

    if TYPE_CHECKING:
        ToolCall: TypeAlias = _ToolCall  # type: ignore[misc]
    else:
        ToolCall = _ToolCall

    role: str
    """``"system"``, ``"user"``, ``"assistant"`` or ``"tool"``."""
    content: str | None = None
    """The text; of a chunk, the part that is new."""
    thinking: str | None = None
    """What the model thought before it answered; of a chunk, the part that is new."""
    images: Sequence[Any] | None = None
    """Images, each as base64."""
    tool_calls: Annotated[Sequence[_ToolCall] | None, BeforeValidator(plain)] = None
    """The tools that the model wants called."""
    tool_name: str | None = None
    """Of a message with role ``"tool"``: whose result it is."""
    tool_call_id: IfSent[str | None] = None
    """Of a message with role ``"tool"``: the id of the call whose result it is."""

    @field_validator("images")
    @classmethod
    def _received(cls, images: Sequence[Any] | None, info: ValidationInfo) -> Sequence[Any] | None:
        # A caller's text may be a path. A server's, in the message that it answered and that is sent back to it as part
        # of the conversation, would have us read any file for it.
        if info.mode == "json" and not all(map(_is_base64, images or ())):
            raise ValueError("an image in JSON is base64, never the path of a file")
        return images


def _is_base64(image: object) -> bool:
    if not isinstance(image, str) or base64_text(image) is None:
        return False
    # "//etc/passwd" is base64, too.
    return len(image) > _MAX_PATH or not os.path.lexists(image)


# Longer than any path that a system takes.
_MAX_PATH = 4096


class TokenLogprob(Model):
    """The log probability of one token."""

    token: str
    """The token's text."""
    logprob: float
    """Natural logarithm of its probability."""
    bytes: IfSent[Sequence[int] | None] = None
    """The token's UTF-8 bytes."""


class Logprob(TokenLogprob):
    """The log probability of a token of the answer, and of those that could have stood in its place."""

    top_logprobs: Sequence[TokenLogprob] | None = None
    """The most likely tokens at this place."""


class DebugInfo(Model):
    """What a model would have read."""

    rendered_template: str
    """The prompt, rendered."""
    image_count: int | None = None
    """Number of images."""


@showable
@dataclass(frozen=True, slots=True)
class ContextUsage:
    """How much of a model's context a call has used.

    Attributes:
        prompt: Tokens of the prompt that the model read; ``None`` if the server did not say.
        answer: Tokens of the answer.
        limit: Tokens that the context has: the ``num_ctx`` of the request, else what ``context_length()`` has found
            out; ``None`` if neither is known.
        cut: Whether the server cut the prompt. ``None`` where the figures do not show it: of a chat it leaves out the
            oldest messages without a word. With ``on_truncation="warn"`` or ``"raise"`` it is known.
    """

    prompt: int | None
    answer: int | None
    limit: int | None
    cut: bool | None

    @property
    def share(self) -> float | None:
        """Which part of the context is used, from 0 on; above 1 if the context was shifted on the way."""
        if not self.limit or self.prompt is None:
            return None
        return (self.prompt + (self.answer or 0)) / self.limit


class _Answer(Sparse):
    """What answers of chat and generate have in common."""

    model: str | None = None
    """The model that answers."""
    created_at: str | None = None
    """When, as RFC 3339."""
    done: bool = False
    """Whether this is the last chunk."""
    done_reason: str | None = None
    """``"stop"``, ``"length"``, ``"load"`` or ``"unload"``; on the last chunk."""
    total_duration: int | None = None
    """Nanoseconds for all of it; on the last chunk."""
    load_duration: int | None = None
    """Nanoseconds for loading the model."""
    prompt_eval_count: int | None = None
    """Tokens of the prompt that were read."""
    prompt_eval_duration: int | None = None
    """Nanoseconds for reading the prompt."""
    eval_count: int | None = None
    """Tokens of the answer."""
    eval_duration: int | None = None
    """Nanoseconds for writing the answer."""
    logprobs: Sequence[Logprob] | None = None
    """Log probabilities, if asked for."""
    remote_model: IfSent[str | None] = None
    """Name of the model on the server that it really runs on."""
    remote_host: IfSent[str | None] = None
    """That server."""
    debug_info: IfSent[DebugInfo | None] = Field(default=None, alias="_debug_info")
    """What the model would have read, if that was asked for."""

    @property
    def text(self) -> str:
        """The text of the answer, ``""`` if there is none; of a chunk, the part that is new."""
        raise NotImplementedError

    @property
    def is_whole(self) -> bool:
        """Whether the model ended the answer by itself: it was not cut for length, and it is more than a load."""
        return self.done and not self.is_cut and not self.is_load

    @property
    def is_cut(self) -> bool:
        """Whether the server ended the answer for its length: ``num_predict`` was reached, or the context was full."""
        return self.done_reason == "length"

    @property
    def is_load(self) -> bool:
        """Whether the model was only loaded or unloaded, and not asked: the request had no prompt, or no messages."""
        return self.done_reason in ("load", "unload")

    @property
    def context_usage(self) -> ContextUsage | None:
        """How much of the context was used; ``None`` of a chunk, and before the last chunk has come."""
        info = self._response_info()
        if info is None or info.asked is None or not self.done or self.is_load:
            return None
        asked = info.asked
        cut = asked.cut
        if cut is None and asked.limit and (self.prompt_eval_count or 0) >= asked.limit:
            cut = True
        return ContextUsage(self.prompt_eval_count, self.eval_count, asked.limit, cut)

    @property
    def parsed(self) -> Any:
        """The answer as an instance of the pydantic model that was given as ``format=``; ``None`` if none was.

        Raises:
            ParseError: The text does not match; it may have been cut short (see ``done_reason``).
        """
        info = self._response_info()
        if info is None or info.response_model is None:
            return None
        try:
            return info.response_model.model_validate_json(self.text)
        except ValidationError as exc:
            from ollama_async._call.partial import first_fault

            reason = ": ".join(filter(None, first_fault(exc, ())))
            raise ParseError(info.response_model.__name__, self.text, self, reason, cut=self.is_cut) from exc


class ChatResponse(_Answer):
    """An answer of ``chat``, or one chunk of it."""

    message: Message
    """The message; of a chunk, the part that is new."""

    @property
    def text(self) -> str:
        """The text of the answer, ``""`` if there is none; of a chunk, the part that is new."""
        return self.message.content or ""


class GenerateResponse(_Answer):
    """An answer of ``generate``, or one chunk of it."""

    response: str = ""
    """The text; of a chunk, the part that is new."""
    thinking: str | None = None
    """What the model thought before it answered; of a chunk, the part that is new."""
    context: Sequence[int] | None = None
    """The conversation as tokens (deprecated by the server); on the last chunk."""
    tool_calls: IfSent[Sequence[ToolCall] | None] = None
    """The tools that the model wants called."""
    image: str | None = None
    """The image that was made, as base64 (image models); on the last chunk."""
    completed: int | None = None
    """Steps done of making an image."""
    total: int | None = None
    """Steps that making the image has."""

    @property
    def text(self) -> str:
        """The text of the answer, ``""`` if there is none; of a chunk, the part that is new."""
        return self.response


if TYPE_CHECKING:
    ParsedT = TypeVar("ParsedT", bound=BaseModel)

    # For type checkers alone: with format=Model, `parsed` is an instance of Model.

    class ParsedChatResponse(ChatResponse, Generic[ParsedT]):
        """An answer of ``chat`` whose ``parsed`` has a known type."""

        @property
        def parsed(self) -> ParsedT: ...

    class ParsedGenerateResponse(GenerateResponse, Generic[ParsedT]):
        """An answer of ``generate`` whose ``parsed`` has a known type."""

        @property
        def parsed(self) -> ParsedT: ...


class EmbedResponse(Model):
    """An answer of ``embed``."""

    model: str | None = None
    """The model that answers."""
    embeddings: Sequence[Sequence[float]]
    """One vector of length 1 for each input, in order."""
    total_duration: int | None = None
    """Nanoseconds for all of it."""
    load_duration: int | None = None
    """Nanoseconds for loading the model."""
    prompt_eval_count: int | None = None
    """Tokens that were read."""


class EmbeddingsResponse(Model):
    """An answer of ``embeddings``."""

    embedding: Sequence[float]
    """The vector, not normalised."""


class StatusResponse(Model):
    """Outcome of a call whose answer has no body."""

    status: str
    """``"success"``."""
