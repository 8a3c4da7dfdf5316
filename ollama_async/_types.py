"""What the server sends, as pydantic models.

Every model keeps fields that it does not know, so that a newer server's are never lost, and can be read like a dict:
``reply.message.content`` and ``reply["message"]["content"]`` are the same. Durations are in nanoseconds, as sent.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (pydantic reads the annotations)
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatResponse",
    "EmbedResponse",
    "EmbeddingsResponse",
    "GenerateResponse",
    "ListResponse",
    "ListedModel",
    "LoadedModel",
    "Logprob",
    "Message",
    "Model",
    "ModelDetails",
    "ProcessResponse",
    "ProgressResponse",
    "ShowResponse",
    "StatusResponse",
    "TokenLogprob",
    "ToolCall",
    "VersionResponse",
]


class Model(BaseModel):
    """Base of all models: unknown fields are kept, fields can be read like those of a dict."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="allow", protected_namespaces=(), validate_by_name=True, validate_by_alias=True
    )

    def __getitem__(self, key: str) -> Any:
        if key in self:
            return getattr(self, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        if key in self.model_fields_set:
            return True
        field = type(self).model_fields.get(str(key))
        return field is not None and field.default is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or ``default`` if there is none of that name."""
        return getattr(self, key) if hasattr(self, key) else default


class ToolCall(Model):
    """A tool that the model wants called."""

    class Function(Model):
        """Which function, with which arguments."""

        name: str
        """Name of the function."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """Arguments by name, in the model's order."""
        index: int | None = None
        """Place of this call among those of one answer."""

    id: str | None = None
    """Names the call; goes into ``Message.tool_call_id`` of the message with its result."""
    function: Function
    """The function to call."""


class Message(Model):
    """A message of a chat."""

    role: str
    """``"system"``, ``"user"``, ``"assistant"`` or ``"tool"``."""
    content: str | None = None
    """The text; of a chunk, the part that is new."""
    thinking: str | None = None
    """What the model thought before it answered; of a chunk, the part that is new."""
    images: Sequence[Any] | None = None
    """Images, each as base64."""
    tool_calls: Sequence[ToolCall] | None = None
    """The tools that the model wants called."""
    tool_name: str | None = None
    """Of a message with role ``"tool"``: whose result it is."""
    tool_call_id: str | None = None
    """Of a message with role ``"tool"``: the id of the call whose result it is."""


class TokenLogprob(Model):
    """The log probability of one token."""

    token: str
    """The token's text."""
    logprob: float
    """Natural logarithm of its probability."""
    bytes: Sequence[int] | None = None
    """The token's UTF-8 bytes."""


class Logprob(TokenLogprob):
    """The log probability of a token of the answer, and of those that could have stood in its place."""

    top_logprobs: Sequence[TokenLogprob] | None = None
    """The most likely tokens at this place."""


class _Answer(Model):
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
    remote_model: str | None = None
    """Name of the model on the server that it really runs on."""
    remote_host: str | None = None
    """That server."""


class ChatResponse(_Answer):
    """An answer of ``chat``, or one chunk of it."""

    message: Message
    """The message; of a chunk, the part that is new."""


class GenerateResponse(_Answer):
    """An answer of ``generate``, or one chunk of it."""

    response: str = ""
    """The text; of a chunk, the part that is new."""
    thinking: str | None = None
    """What the model thought before it answered; of a chunk, the part that is new."""
    context: Sequence[int] | None = None
    """The conversation as tokens (deprecated by the server); on the last chunk."""
    tool_calls: Sequence[ToolCall] | None = None
    """The tools that the model wants called."""


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


class ModelDetails(Model):
    """What kind of model it is."""

    parent_model: str | None = None
    """The model that it was made from."""
    format: str | None = None
    """File format, such as ``"gguf"``."""
    family: str | None = None
    """Architecture."""
    families: Sequence[str] | None = None
    """All architectures in it."""
    parameter_size: str | None = None
    """Number of parameters, such as ``"8.0B"``."""
    quantization_level: str | None = None
    """Such as ``"Q4_K_M"``."""
    context_length: int | None = None
    """Tokens of context that it was trained with."""
    embedding_length: int | None = None
    """Length of its embeddings."""


class ListedModel(Model):
    """A model that the server has."""

    name: str | None = None
    """Name with tag."""
    model: str | None = None
    """Name with tag."""
    modified_at: str | None = None
    """When it was last changed, as RFC 3339."""
    size: int | None = None
    """Bytes on disk."""
    digest: str | None = None
    """SHA-256 of its manifest."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    capabilities: Sequence[str] | None = None
    """What it can do, such as ``"tools"``."""
    remote_model: str | None = None
    """Name on the server that it really runs on."""
    remote_host: str | None = None
    """That server."""


class ListResponse(Model):
    """An answer of ``list``."""

    Model: ClassVar[type[ListedModel]] = ListedModel

    models: Sequence[ListedModel]
    """The models."""


class LoadedModel(Model):
    """A model that is loaded."""

    name: str | None = None
    """Name with tag."""
    model: str | None = None
    """Name with tag."""
    size: int | None = None
    """Bytes of memory."""
    digest: str | None = None
    """SHA-256 of its manifest."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    expires_at: str | None = None
    """When it will be unloaded, as RFC 3339."""
    size_vram: int | None = None
    """Bytes of it on the GPU."""
    context_length: int | None = None
    """Tokens of context that it was loaded with."""


class ProcessResponse(Model):
    """An answer of ``ps``."""

    Model: ClassVar[type[LoadedModel]] = LoadedModel

    models: Sequence[LoadedModel]
    """The models."""


class ShowResponse(Model):
    """An answer of ``show``."""

    license: str | None = None
    """Licence texts."""
    modelfile: str | None = None
    """The Modelfile that makes this model."""
    parameters: str | None = None
    """Its default options, a line each."""
    template: str | None = None
    """Its prompt template."""
    system: str | None = None
    """Its system prompt."""
    renderer: str | None = None
    """Name of the built-in renderer of prompts."""
    parser: str | None = None
    """Name of the built-in parser of answers."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    messages: Sequence[Message] | None = None
    """Messages that each chat begins with."""
    remote_model: str | None = None
    """Name on the server that it really runs on."""
    remote_host: str | None = None
    """That server."""
    model_info: dict[str, Any] | None = None
    """Metadata of the model file."""
    projector_info: dict[str, Any] | None = None
    """Metadata of the projector file of a vision model."""
    tensors: Sequence[Any] | None = None
    """Names, types and shapes of the tensors (verbose)."""
    capabilities: Sequence[str] | None = None
    """What it can do, such as ``"tools"``."""
    modified_at: str | None = None
    """When it was last changed, as RFC 3339."""
    requires: str | None = None
    """The server version that it needs."""


class VersionResponse(Model):
    """An answer of ``version``."""

    version: str
    """The server's version."""


class StatusResponse(Model):
    """Outcome of a call whose answer has no body."""

    status: str
    """``"success"``."""


class ProgressResponse(Model):
    """A step of ``create`` (``pull``, ``push``)."""

    status: str | None = None
    """What is being done; ``"success"`` at the end."""
    digest: str | None = None
    """Of what."""
    total: int | None = None
    """Bytes of it."""
    completed: int | None = None
    """Bytes done; left out by the server while it is 0."""

    @property
    def done(self) -> bool:
        """Whether this is the last step."""
        return self.status == "success"
