"""What callers give, turned into what goes over the wire; what cannot go is refused before anything is sent."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import httpx
import pydantic_core
from pydantic import BaseModel, ValidationError

from ._errors import RequestError
from ._types import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import BinaryIO

__all__ = [
    "FileBody",
    "blob_digest",
    "encode_images",
    "encode_json",
    "encode_messages",
    "encode_options",
    "encode_tools",
    "hash_file",
    "model_name",
    "open_file",
]

_DIGEST = re.compile("sha256[:-][0-9a-fA-F]{64}")

# How much of a file is read and hashed in one go in a worker thread.
_FILE_BLOCK = 1024 * 1024


def model_name(value: object, parameter: str = "model") -> str:
    """Check the name of a model."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{parameter}={value!r}: give the name of a model")
    return value


def blob_digest(value: object) -> str:
    """Check the digest of a file: it goes into a path."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise RequestError(f"digest={value!r}: give 'sha256:' and 64 hexadecimal digits")
    return value


def encode_json(body: Mapping[str, Any]) -> bytes:
    """Encode the body of a request, without the parameters that are None."""
    try:
        return pydantic_core.to_json({name: value for name, value in body.items() if value is not None})
    except (ValueError, TypeError, pydantic_core.PydanticSerializationError) as exc:
        raise RequestError(f"the request cannot be written as JSON: {exc}") from exc


def encode_model(value: Any) -> Any:
    """Turn a pydantic model into a dict, without the fields that are None; leave everything else as it is."""
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def encode_messages(given: Any) -> list[dict[str, Any]]:
    """Turn the messages of a chat into dicts; a ``str`` is one message of the user."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [_encode_message(message, place) for place, message in enumerate(_sequence(given, "messages"))]


def _sequence(given: Any, parameter: str) -> Sequence[Any]:
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError(f"{parameter}={type(given).__name__}: give a list")
    return given  # pyright: ignore[reportUnknownVariableType]


def _encode_message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Message):
        try:
            message = Message.model_validate(message)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RequestError(f"messages[{place}] is no message: {where}: {first['msg']}") from exc
    encoded: dict[str, Any] = message.model_dump(exclude_none=True)
    if "images" in encoded:
        encoded["images"] = [encode_image(image) for image in encoded["images"]]
    return encoded


def encode_tools(given: Any) -> list[Any]:
    """Turn the tools of a chat into dicts."""
    if given is None:
        return []
    return [encode_model(tool) for tool in _sequence(given, "tools")]


def encode_options(given: Any, parameter: str = "options") -> Any:
    """Check the options of a model."""
    if given is not None and not isinstance(given, (Mapping, BaseModel)):
        raise RequestError(f"{parameter}={type(given).__name__}: give a dict")
    return encode_model(given)


def encode_images(given: Any) -> list[str] | None:
    """Turn images into base64."""
    if given is None:
        return None
    return [encode_image(image) for image in _sequence(given, "images")]


def encode_image(image: Any) -> str:
    """Turn an image into base64; a ``str`` is base64 already."""
    if isinstance(image, bytes):
        return base64.b64encode(image).decode("ascii")
    if not isinstance(image, str):
        raise RequestError(f"an image is {type(image).__name__}: give bytes, or base64 as str")
    try:
        base64.b64decode(image, validate=True)
    except ValueError:
        # Such as the name of a file, which no server would take for one.
        raise RequestError("an image given as str is not base64; to send a file, give its bytes") from None
    return image


def open_file(path: str | Path) -> BinaryIO:
    """Open a file that is to be uploaded."""
    try:
        return Path(path).open("rb")
    except (OSError, TypeError, ValueError, AttributeError) as exc:
        raise RequestError(f"cannot read {str(path)!r}: {exc}") from exc


async def hash_file(file: BinaryIO) -> str:
    """Return the SHA-256 of a file as hex, worked out in worker threads.

    Cancellation: safe, after at most one block.
    """
    digest = hashlib.sha256()

    def step() -> bool:
        block = file.read(_FILE_BLOCK)
        digest.update(block)
        return bool(block)

    while await anyio.to_thread.run_sync(step):
        pass
    return digest.hexdigest()


class FileBody(httpx.AsyncByteStream):
    """A file as the body of a request, read in worker threads, no faster than it is sent."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while block := await anyio.to_thread.run_sync(self._file.read, _FILE_BLOCK):
            yield block
