"""What the endpoints that manage models and files send, as pydantic models.

In their own module, which is imported when one of them is wanted: who chats needs none, and to make a class of
pydantic's takes longer than to import a module of Python.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (pydantic reads the annotations)
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BeforeValidator, ByteSize

from .types import IfSent, Message, Model


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
    context_length: IfSent[int | None] = None
    """Tokens of context that it was trained with."""
    embedding_length: IfSent[int | None] = None
    """Length of its embeddings."""


# Servers that are not Ollama's leave it empty where they do not know it.
_Time = Annotated[datetime | None, BeforeValidator(lambda value: value or None)]


class ListedModel(Model):
    """A model that the server has."""

    name: IfSent[str | None] = None
    """Name with tag."""
    model: str | None = None
    """Name with tag."""
    modified_at: _Time = None
    """When it was last changed."""
    size: ByteSize | None = None
    """Bytes on disk."""
    digest: str | None = None
    """SHA-256 of its manifest."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    capabilities: IfSent[Sequence[str] | None] = None
    """What it can do, such as ``"tools"``."""
    remote_model: IfSent[str | None] = None
    """Name on the server that it really runs on."""
    remote_host: IfSent[str | None] = None
    """That server."""


class ListResponse(Model):
    """An answer of ``list``."""

    if TYPE_CHECKING:
        Model: TypeAlias = ListedModel  # type: ignore[misc]
    else:
        Model = ListedModel

    models: Sequence[ListedModel]
    """The models."""


class LoadedModel(Model):
    """A model that is loaded."""

    name: str | None = None
    """Name with tag."""
    model: str | None = None
    """Name with tag."""
    size: ByteSize | None = None
    """Bytes of memory."""
    digest: str | None = None
    """SHA-256 of its manifest."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    expires_at: _Time = None
    """When it will be unloaded."""
    size_vram: ByteSize | None = None
    """Bytes of it on the GPU."""
    context_length: int | None = None
    """Tokens of context that it was loaded with."""

    @property
    def vram_share(self) -> float | None:
        """How much of it is on the GPU, 0 to 1; ``None`` if the server does not say."""
        return self.size_vram / self.size if self.size and self.size_vram is not None else None


class ProcessResponse(Model):
    """An answer of ``ps``."""

    if TYPE_CHECKING:
        Model: TypeAlias = LoadedModel  # type: ignore[misc]
    else:
        Model = LoadedModel

    models: Sequence[LoadedModel]
    """The models."""


class Tensor(Model):
    """A tensor of a model."""

    name: str
    """Its name."""
    type: str
    """Its kind of numbers, such as ``"F32"``."""
    shape: Sequence[int]
    """Its dimensions."""


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
    system: IfSent[str | None] = None
    """Its system prompt."""
    renderer: IfSent[str | None] = None
    """Name of the built-in renderer of prompts."""
    parser: IfSent[str | None] = None
    """Name of the built-in parser of answers."""
    details: ModelDetails | None = None
    """What kind of model it is."""
    messages: IfSent[Sequence[Message] | None] = None
    """Messages that each chat begins with."""
    remote_model: IfSent[str | None] = None
    """Name on the server that it really runs on."""
    remote_host: IfSent[str | None] = None
    """That server."""
    model_info: dict[str, Any] | None = None
    """Metadata of the model file."""
    projector_info: IfSent[dict[str, Any] | None] = None
    """Metadata of the projector file of a vision model."""
    tensors: IfSent[Sequence[Tensor] | None] = None
    """Names, types and shapes of the tensors (verbose)."""
    capabilities: Sequence[str] | None = None
    """What it can do, such as ``"tools"``."""
    modified_at: _Time = None
    """When it was last changed."""
    requires: IfSent[str | None] = None
    """The server version that it needs."""

    @property
    def modelinfo(self) -> dict[str, Any] | None:
        """The ``model_info``, by the name that it has in ollama-python."""
        return self.model_info

    def __contains__(self, key: object) -> bool:
        return super().__contains__("model_info" if key == "modelinfo" else key)


class VersionResponse(Model):
    """An answer of ``version``."""

    version: str
    """The server's version."""


class CloudStatus(Model):
    """Whether the server uses models in the cloud."""

    disabled: bool
    """Whether that is switched off."""
    source: str
    """By what: ``"none"``, ``"env"``, ``"config"`` or ``"both"``."""


class CloudStatusResponse(Model):
    """An answer of ``status``."""

    cloud: CloudStatus
    """Whether the server uses models in the cloud."""


class UserResponse(Model):
    """An answer of ``whoami``."""

    id: str | None = None
    """UUID of the account."""
    email: str | None = None
    """Its e-mail address."""
    name: str | None = None
    """Its name."""
    bio: str | None = None
    """What its owner says of themselves."""
    avatarurl: str | None = None
    """Where its picture is."""
    firstname: str | None = None
    """First name."""
    lastname: str | None = None
    """Last name."""
    plan: str | None = None
    """What is paid for, such as ``"free"``."""


class ModelRecommendation(Model):
    """A model that the server recommends."""

    model: str
    """Its name."""
    description: str | None = None
    """What it is good for."""
    context_length: int | None = None
    """Tokens of context."""
    max_output_tokens: int | None = None
    """Most tokens that it answers with."""
    vram_bytes: int | None = None
    """Bytes of memory that it needs."""
    required_plan: str | None = None
    """The plan that it needs, if it runs in the cloud."""


class RecommendationsResponse(Model):
    """An answer of ``recommendations``."""

    recommendations: Sequence[ModelRecommendation]
    """The models."""


class WebSearchResult(Model):
    """A page that was found."""

    title: str | None = None
    """Its title."""
    url: str | None = None
    """Its address."""
    content: str | None = None
    """What stands there, in short."""


class WebSearchResponse(Model):
    """An answer of ``web_search``."""

    results: Sequence[WebSearchResult]
    """The pages."""


class WebFetchResponse(Model):
    """An answer of ``web_fetch``."""

    title: str | None = None
    """The page's title."""
    content: str | None = None
    """Its text."""
    links: Sequence[str] | None = None
    """The addresses that it links to."""
