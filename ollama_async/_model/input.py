"""What callers give, turned into what goes over the wire; what cannot go is refused before anything is sent."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import anyio.to_thread
import httpx
import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_serializer

from ollama_async._errors import RequestError, shown
from ollama_async._regular import read_file

from .options import Options
from .types import Message, base64_text, has_dump, plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def model_name(value: object, parameter: str = "model") -> str:
    """Check the name of a model."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{parameter}={value!r}: give the name of a model")
    return value


def encode_json(body: Mapping[str, Any]) -> bytes | JsonBody:
    """Encode the body of a request, without the parameters that are None.

    Raises:
        RequestError: Something in it cannot be written as JSON; the text says what, and where.
    """
    given = {name: value for name, value in body.items() if value is not None}
    if _has_images(given):
        # They are written while the request goes out, when it is too late to say what is wrong with the rest.
        _to_json(_without_images(given))
        return JsonBody(given)
    return _to_json(given)


def _to_json(body: Mapping[str, Any]) -> bytes:
    try:
        written = pydantic_core.to_json(body, inf_nan_mode="constants")
    except (ValueError, TypeError, pydantic_core.PydanticSerializationError) as exc:
        place, flaw = next(_flaws(body), ("the request", str(exc)))
        raise RequestError(f"{place} cannot be written as JSON: {flaw}") from exc
    # As words they are in many a text: only then is it worth to look for numbers.
    # By find(), as in the decoder.
    if written.find(b"NaN") >= 0 or written.find(b"Infinity") >= 0:
        for place, flaw in _flaws(body):
            raise RequestError(f"{place} cannot be written as JSON: {flaw}")
    return written


def _flaws(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Find what JSON does not have, and where it is."""
    if isinstance(value, Mapping):
        for name, field in cast("Mapping[object, object]", value).items():
            yield from _flaws(field, f"{place}.{name}" if place else str(name))
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(cast("Sequence[Any]", value)):
            yield from _flaws(item, f"{place}[{at}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield place, f"JSON has no number {value}"
    elif not isinstance(value, Image):
        try:
            pydantic_core.to_json(value)
        except (ValueError, TypeError, pydantic_core.PydanticSerializationError) as exc:
            yield place, str(exc)
        else:
            if not isinstance(value, (str, int, type(None))):
                # A set, a dataclass, a pydantic model: what is in there has no name in a request.
                written = pydantic_core.to_jsonable_python(value, inf_nan_mode="constants")
                yield from _flaws(written, place) if isinstance(written, (dict, list, float)) else ()


def _has_images(body: Mapping[str, Any]) -> bool:
    for holder in (body, *body.get("messages", ())):
        images = holder.get("images")
        if images and any(isinstance(image, Image) for image in images):
            return True
    return False


def _without_images(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{**message, "images": None} for message in body.get("messages", ())]
    return {**body, "images": None, "messages": messages}


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
    return {name: _check_kind(kind, name, value) for name, value in given.items()}


def _check_kind(kind: str, name: str, value: Any) -> Any:
    types, wanted = _KINDS[kind]
    if kind == "mapping":
        value = plain(value)
    # True is an int for Python, not for the server.
    if value is not None and (not isinstance(value, types) or (kind == "number" and isinstance(value, bool))):
        raise RequestError(f"{name}={type(value).__name__}: give {wanted}")
    return value


def checked_stream(value: object) -> bool:
    """Check ``stream``: it decides what a call returns."""
    if not isinstance(value, bool):
        raise RequestError(f"stream={value!r}: give True or False")
    return value


def encoded(*given: tuple[str, Any]) -> dict[str, Any]:
    """Check and encode parameters of a call to a model; what is ``None`` was not given, and is left out.

    Args:
        *given: The parameters, each with its name. (Of two dozen keyword arguments Python makes a dict, which takes
            longer than all that follows.)
    """
    body: dict[str, Any] = {}
    for name, value in given:
        if value is not None:
            how = _PARAMETERS[name]
            sent = _check_kind(how, name, value) if isinstance(how, str) else how(value)
            body[_SENT_AS.get(name, name)] = sent
    return body


def _encode_think(value: object) -> bool | str:
    """Check ``think``; any text is allowed, since servers learn new levels."""
    if not isinstance(value, bool | str):
        raise RequestError(f"think={type(value).__name__}: give True, False, or a level such as 'high'")
    return value


# Each text can be read in one way only: with `\d+\.?\d*` digits could be split anywhere, in quadratic time.
_GO_DURATION = re.compile(r"[-+]?((\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h))+|[-+]?0", re.ASCII)


# The server counts in nanoseconds, in 64 bits.
_MAX_SECONDS = (2**63 - 1) // 10**9


def _encode_keep_alive(value: object) -> float | str:
    """Turn ``keep_alive`` into seconds, or leave it a duration such as ``"1h30m"``."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str) and _GO_DURATION.fullmatch(value):
        return value
    # Not by isfinite(), which is for floats: it fails for an int too large for a float.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_SECONDS:
        return value
    raise RequestError(f"keep_alive={shown(value)}: give seconds, a timedelta, or a text such as '5m' or '1h30m'")


def seconds_of(keep_alive: float | str) -> float:
    """Return how many seconds an encoded ``keep_alive`` is; negative is for ever."""
    if not isinstance(keep_alive, str):
        return keep_alive
    # Numbers and units by turns, and what stands behind the last unit: nothing, or the 0 that needs none.
    parts = _GO_UNIT.split(keep_alive.lstrip("+-"))
    seconds = sum(float(number) * _GO_UNITS[unit] for number, unit in zip(parts[:-1:2], parts[1::2], strict=True))
    return -seconds if keep_alive.startswith("-") else seconds


_GO_UNIT = re.compile(r"(ns|us|µs|μs|ms|s|m|h)")
_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


# Each JSON schema has one of them; a model of somebody's own rarely has a field of such a name.
_SCHEMA_WORDS = {"type", "properties", "$ref", "$defs", "anyOf", "allOf", "oneOf", "enum", "const", "items"}


def _encode_format(value: object) -> str | dict[str, Any]:
    """Turn ``format`` into ``"json"`` or a JSON schema."""
    if isinstance(value, str) and value in ("", "json"):
        return value
    if isinstance(value, Mapping) or has_dump(value):
        schema: Any = plain(value)
        if isinstance(value, BaseModel) and not (isinstance(schema, dict) and _SCHEMA_WORDS & schema.keys()):
            kind = type(value).__name__
            raise RequestError(f"format={kind}(...): give the class {kind} itself, not an object of it")
        return cast("dict[str, Any]", schema)
    form = format_model(value)
    if form is None:
        raise RequestError(f"format={value!r}: give 'json', a JSON schema as a dict, or a pydantic model class")
    try:
        return form.model_json_schema()
    except Exception as exc:
        raise RequestError(f"format={form.__name__}: it has no JSON schema: {exc}") from exc


def format_model(value: object) -> type[BaseModel] | None:
    """Return the pydantic model class that was given as ``format``, ``None`` if it is something else."""
    return value if isinstance(value, type) and issubclass(value, BaseModel) else None


def encode_options(given: Any, parameter: str = "options") -> dict[str, Any] | None:
    """Check the options of a model against those that are known; others are passed on."""
    if given is None:
        return None
    # Of a model what is None was not given; in a dict it is there because somebody put it there.
    given = plain(given)
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
        # Asking an abstract class takes a microsecond.
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
            message = Message.model_validate(_plain_message(message))
        except ValidationError as exc:
            raise RequestError(f"messages[{place}] is not a message: {first_error(exc)}") from exc
        except RequestError as exc:
            raise RequestError(f"messages[{place}] is not a message: {exc}") from exc
    # Dumping an image reads its file.
    sent: dict[str, Any] = message.model_dump(exclude_none=True, exclude={"images"})
    if message.images is not None:
        sent["images"] = _encode_images(message.images)
    return sent


def _plain_message(message: Any) -> Any:
    """Return a message as a dict, its images as they are."""
    if isinstance(message, Mapping):
        images = cast("Mapping[str, Any]", message).get("images")
    elif hasattr(message, "images"):
        images = message.images
    else:
        return plain(message)
    fields = plain(message, without="images")
    return {**fields, "images": images} if isinstance(fields, dict) else fields  # pyright: ignore[reportUnknownVariableType]


def _is_plain(message: Any) -> bool:
    """Whether it is as it is sent: what most messages are, and of a long chat every one at every turn."""
    if type(message) is not dict:
        return False
    fields: dict[object, object] = message  # pyright: ignore[reportUnknownVariableType]  (a cast is a call)
    return fields.keys() == _PLAIN and type(fields["role"]) is type(fields["content"]) is str


_PLAIN = {"role", "content"}


class Image(BaseModel):
    """An image to send: a path, bytes, base64 text, a ``data:`` URL, or a file that is open for reading bytes.

    A text is a path if there is such a file, else base64. Dumping it reads the file.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, defer_build=True)

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
    text = base64_text(value)
    if text is None:
        raise ValueError("an image given as str must be the path of an existing file, base64, or a data: URL")
    return text


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
    if has_dump(image):
        # That of ollama-python reads its file when it is dumped: here, what it would read is taken.
        image = image.value if hasattr(image, "value") else plain(image)
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
