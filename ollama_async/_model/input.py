"""What callers give, turned into what goes over the wire; what cannot go is refused before anything is sent."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread
import httpx
import pydantic_core
from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError, field_validator, model_serializer

from ollama_async._errors import RequestError
from ollama_async._regular import read_file

from .options import Options
from .types import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def model_name(value: object, parameter: str = "model") -> str:
    """Check the name of a model."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{parameter}={value!r}: give the name of a model")
    return value


def encode_json(body: Mapping[str, Any]) -> bytes | JsonBody:
    """Encode the body of a request, without the parameters that are None."""
    given = {name: value for name, value in body.items() if value is not None}
    if _has_images(given):
        return JsonBody(given)
    return _to_json(given)


def _to_json(body: Mapping[str, Any]) -> bytes:
    try:
        return pydantic_core.to_json(body, inf_nan_mode="constants")
    except (ValueError, TypeError, pydantic_core.PydanticSerializationError) as exc:
        raise RequestError(f"the request cannot be written as JSON: {exc}") from exc


def _has_images(body: Mapping[str, Any]) -> bool:
    for holder in (body, *body.get("messages", ())):
        images = holder.get("images")
        if images and any(isinstance(image, Image) for image in images):
            return True
    return False


class JsonBody(httpx.AsyncByteStream):
    """The body of a request with images that have to be read and encoded, which is done in a worker thread."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield await anyio.to_thread.run_sync(_to_json, self._body, abandon_on_cancel=True)


# -- plain parameters --

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "flag": ((bool,), "True or False"),
    "text": ((str,), "a str"),
    "number": ((int,), "an int"),
    "mapping": ((Mapping,), "a dict"),
}


def checked(kind: str, **given: Any) -> dict[str, Any]:
    """Check parameters that go over the wire as they are, all of one kind; ``None`` is always allowed.

    Args:
        kind: ``"flag"``, ``"text"``, ``"number"`` or ``"mapping"``.
        **given: The parameters by name.

    Returns:
        The parameters.
    """
    types, wanted = _KINDS[kind]
    for name, value in given.items():
        # True is an int for Python, not for the server.
        if value is not None and (not isinstance(value, types) or (kind == "number" and isinstance(value, bool))):
            raise RequestError(f"{name}={type(value).__name__}: give {wanted}")
    return given


def checked_stream(value: object) -> bool:
    """Check ``stream``: it decides what a call returns."""
    if not isinstance(value, bool):
        raise RequestError(f"stream={value!r}: give True or False")
    return value


def encoded(**given: Any) -> dict[str, Any]:
    """Check and encode parameters of a call to a model; what is ``None`` was not given, and is left out."""
    body: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            how = _PARAMETERS[name]
            sent = checked(how, **{name: value})[name] if isinstance(how, str) else how(value)
            body[_SENT_AS.get(name, name)] = sent
    return body


def _encode_think(value: object) -> bool | str:
    """Check ``think``; any text is allowed, since servers learn new levels."""
    if not isinstance(value, bool | str):
        raise RequestError(f"think={type(value).__name__}: give True, False, or a level such as 'high'")
    return value


# Each text can be read in one way only: with `\d+\.?\d*` digits could be split anywhere, in quadratic time.
_GO_DURATION = re.compile(r"[-+]?((\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h))+|[-+]?0")


def _encode_keep_alive(value: object) -> float | str:
    """Turn ``keep_alive`` into seconds, or leave it a duration such as ``"1h30m"``."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str) and _GO_DURATION.fullmatch(value):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise RequestError(f"keep_alive={value!r}: give seconds, a timedelta, or a text such as '5m' or '1h30m'")


def _encode_format(value: object) -> str | dict[str, Any]:
    """Turn ``format`` into ``"json"`` or a JSON schema."""
    if isinstance(value, str) and value in ("", "json"):
        return value
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    form = format_model(value)
    if form is None:
        raise RequestError(f"format={value!r}: give 'json', a JSON schema as a dict, or a pydantic model class")
    try:
        return form.model_json_schema()
    except PydanticUserError as exc:
        raise RequestError(f"format={form.__name__}: it has no JSON schema: {exc.message}") from exc


def format_model(value: object) -> type[BaseModel] | None:
    """Return the pydantic model class that was given as ``format``, ``None`` if it is something else."""
    return value if isinstance(value, type) and issubclass(value, BaseModel) else None


def encode_options(given: Any, parameter: str = "options") -> dict[str, Any] | None:
    """Check the options of a model against those that are known; others are passed on."""
    if given is None:
        return None
    if isinstance(given, BaseModel):
        # Of a model what is None was not given; in a dict it is there because somebody put it there.
        given = given.model_dump(exclude_none=True)
    if not isinstance(given, Mapping):
        raise RequestError(f"{parameter}={type(given).__name__}: give a dict or Options")
    try:
        return Options.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as exc:
        raise RequestError(f"{parameter}: {first_error(exc)}") from exc


def first_error(exc: ValidationError) -> str:
    """Say the first thing that is wrong."""
    first = exc.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def encode_input(given: Any) -> str | list[str]:
    """Check the texts to embed."""
    if isinstance(given, str):
        return given
    texts = list(sequence(given, "input"))
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"input[{place}]={type(text).__name__}: give a str")
    return texts


def _encode_context(given: Any) -> list[int]:
    """Check the tokens of an earlier answer."""
    tokens = list(sequence(given, "context"))
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise RequestError("context: give the list of int that an earlier answer had")
    return tokens


def sequence(given: Any, parameter: str) -> Sequence[Any]:
    """Check that it is a list or something like it."""
    if isinstance(given, list):
        # To ask an abstract class takes a microsecond.
        return given  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes, bytearray)):
        raise RequestError(f"{parameter}={type(given).__name__}: give a list")
    return given  # pyright: ignore[reportUnknownVariableType]


# -- messages and images --


def encode_messages(given: Any) -> list[dict[str, Any]]:
    """Turn the messages of a chat into dicts; a ``str`` is one message of the user."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [_encode_message(message, place) for place, message in enumerate(sequence(given, "messages"))]


def _encode_message(message: Any, place: int) -> dict[str, Any]:
    if _is_plain(message):
        return dict(message)
    if not isinstance(message, Message):
        try:
            message = Message.model_validate(message)
        except ValidationError as exc:
            raise RequestError(f"messages[{place}] is no message: {first_error(exc)}") from exc
    # Dumping an image reads its file.
    sent: dict[str, Any] = message.model_dump(exclude_none=True, exclude={"images"})
    if message.images is not None:
        sent["images"] = _encode_images(message.images)
    return sent


def _is_plain(message: Any) -> bool:
    """Whether it is as it is sent: what most messages are, and of a long chat every one at every turn."""
    if type(message) is not dict:
        return False
    fields = cast("dict[object, object]", message)
    return fields.keys() == _PLAIN and type(fields["role"]) is type(fields["content"]) is str


_PLAIN = {"role", "content"}


class Image(BaseModel):
    """An image to send: a path, bytes, base64 text, or a file that is open for reading bytes.

    A text is a path if there is such a file, else base64. Dumping it reads the file.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, defer_build=True)

    value: Any
    """What was given."""

    @field_validator("value")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if isinstance(value, bytearray):
            return bytes(value)
        if isinstance(value, str):
            return _text_or_path(value)
        if isinstance(value, os.PathLike):
            path = Path(cast("os.PathLike[str]", value))
            if not path.is_file():
                raise ValueError(f"the file {str(path)!r} {_flaw(path)}")
            return path
        if isinstance(value, bytes) or callable(getattr(value, "read", None)):
            return value
        raise ValueError(f"an image is {type(value).__name__}: give a path, bytes, base64, or an open file")

    @model_serializer
    def _encode(self) -> str:
        value = self.value
        if isinstance(value, str):
            return value
        if isinstance(value, Path):
            try:
                value = read_file(value)
            except RequestError as exc:
                raise ValueError(f"the image cannot be read: {exc}") from exc
        elif not isinstance(value, bytes):
            # It can be read once, and may be wanted again.
            value = self.value = _read(value)
        return base64.b64encode(value).decode("ascii")


_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Longer than any path that a system takes.
_MAX_PATH = 4096


def _text_or_path(value: str) -> str | Path:
    if 0 < len(value) <= _MAX_PATH and "\0" not in value and os.path.isfile(value):
        return Path(value)
    if value.lower().endswith(_IMAGE_SUFFIXES):
        raise ValueError(f"the file {value!r} {_flaw(value)}")
    try:
        base64.b64decode(value, validate=True)
    except ValueError:
        raise ValueError("an image given as str is neither base64 nor a file that exists") from None
    return value


def _flaw(path: str | Path) -> str:
    return "cannot be sent: give a regular file" if os.path.exists(path) else "does not exist"


def _read(file: Any) -> bytes:
    data = file.read()
    if not isinstance(data, bytes):
        raise ValueError(f"the image's read() returned {type(data).__name__}, not bytes; open it with 'rb'")  # noqa: TRY004  (pydantic takes a ValueError for a finding)
    return data


def _encode_images(given: Any) -> list[str | Image]:
    """Check images; base64 goes as it is, the others are read and encoded when the request goes out."""
    images = [_encode_image(image) for image in sequence(given, "images")]
    return [image.value if isinstance(image.value, str) else image for image in images]


def _encode_image(image: Any) -> Image:
    if isinstance(image, Image):
        return image
    try:
        return Image(value=image)
    except ValidationError as exc:
        raise RequestError(exc.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from exc


_SENT_AS = {"debug_render_only": "_debug_render_only"}

# By name, how it is encoded, or of what kind it is where it goes as it is.
_PARAMETERS: dict[str, str | Callable[[Any], Any]] = {
    "context": _encode_context,
    "debug_render_only": "flag",
    "dimensions": "number",
    "format": _encode_format,
    "height": "number",
    "images": _encode_images,
    "keep_alive": _encode_keep_alive,
    "logprobs": "flag",
    "options": encode_options,
    "prompt": "text",
    "raw": "flag",
    "shift": "flag",
    "steps": "number",
    "suffix": "text",
    "system": "text",
    "template": "text",
    "think": _encode_think,
    "top_logprobs": "number",
    "truncate": "flag",
    "verbose": "flag",
    "width": "number",
}
