"""``NdjsonDecoder``: the bytes of a body in, chunks out; no socket, no event loop.

A decoder of another framing (SSE, say) has the same methods; a stream asks for nothing else.
"""

from __future__ import annotations

import json
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Protocol

from pydantic import ValidationError

from ollama_async._errors import ProtocolError

from .chunk import Chunk, ChunkT
from .failures import json_object, misfit
from .ndjson import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from .chunk import Validators


class ErrorFrame(Exception):  # noqa: N818  (turned into the StreamError that it stands for by whoever knows the answer)
    """A line that says that the server failed; ``frame`` is its JSON object."""

    def __init__(self, frame: dict[str, Any]) -> None:
        super().__init__("error frame")
        self.frame = frame


class Decoder(Protocol[ChunkT]):
    """Turns the bytes of a body into chunks."""

    lines: list[bytes]
    """What has arrived and is not decoded yet, the next one last; assigned by whoever feeds or decodes."""
    eof: bool
    """Whether the body has ended."""

    @property
    def failure(self) -> ProtocolError | None:
        """What is wrong with the body behind these lines."""
        ...

    def feed_data(self, data: bytes) -> list[bytes]:
        """Return the lines that are complete with the next bytes of the body; only while there is no ``failure``."""
        ...

    def feed_eof(self) -> list[bytes]:
        """Return the lines that are complete with the end of the body."""
        ...

    def decode(self, *, alone: bool) -> tuple[list[ChunkT], list[bytes], int]:
        """Make chunks of the next lines, without taking them; raises ``ProtocolError`` or ``ErrorFrame``.

        Args:
            alone: Whether to make a single one.

        Returns:
            The chunks in order, at least one, none behind one that is the last of the answer; the lines that are left,
            the next one last; and how many of the chunks come before one that is the last of the answer.
        """
        ...

    def restart(self) -> None:
        """Begin anew, with another body."""
        ...


class NdjsonDecoder(LineSplitter, Generic[ChunkT]):
    """Turns the lines of a body into chunks.

    Args:
        validators: How a chunk is made.
        batch_size: How many lines may be decoded at once.
        max_line_bytes: The most that a line may have.
    """

    __slots__ = ("_batch_size", "_validators", "eof", "lines")

    def __init__(self, validators: Validators[ChunkT], batch_size: int, max_line_bytes: int) -> None:
        super().__init__(max_line_bytes)
        self._validators = validators
        self._batch_size = batch_size
        self.lines: list[bytes] = []
        self.eof = False

    def feed_eof(self) -> list[bytes]:
        """Take the end of the body: what has no line end is the last line."""
        self.eof = True
        rest = self.flush()
        return [rest] if rest else []

    def decode(self, *, alone: bool) -> tuple[list[ChunkT], list[bytes], int]:
        """Make chunks of the next lines, without taking them; together if they allow it: that is cheaper.

        Args:
            alone: Whether to make a single one.

        Returns:
            The chunks in order, at least one, none behind one that is the last of the answer; the lines that are left,
            the next one last; and how many of the chunks come before one that is the last of the answer.

        Raises:
            ProtocolError: The next line is not JSON, or not a chunk.
            ErrorFrame: The next line says that the server failed.
        """
        lines, chunks = self.lines, []
        if not alone and len(lines) > 1 and self._batch_size > 1:
            chunks = self._decode_batch(lines[: -self._batch_size - 1 : -1])
        if not chunks:
            chunk = self._decode_line(lines[-1])
            return ([chunk], [], 0) if chunk.done else ([chunk], lines[:-1], 1)
        lines = lines[: -len(chunks)]
        plain = len(chunks)
        if any(map(_is_done, chunks)):
            plain = next(place for place, chunk in enumerate(chunks) if chunk.done)
            del chunks[plain + 1 :]
            lines = []
        return chunks, lines, plain

    def restart(self) -> None:
        """Begin anew, with another body."""
        self.flush()
        self.failure = None
        self.lines = []
        self.eof = False

    def _decode_line(self, line: bytes) -> ChunkT:
        # A key "error" can only be here if these bytes are (inside a string the quotes would be escaped). By find():
        # `in` first takes them for a number, and drops the error.
        if line.find(b'"error"') >= 0:
            frame = json_object(line)
            if frame.get("error") is not None:
                raise ErrorFrame(frame)
        try:
            return self._validators.one(line)
        except ValidationError as exc:
            raise ProtocolError(_explain(line, self._validators.whole, last=self.eof)) from exc

    def _decode_batch(self, lines: list[bytes]) -> list[ChunkT]:
        """Make chunks of the first of some lines, as if they were one JSON array.

        Returns:
            Chunks of as many of the first lines as can be decoded together; none if the first has to be decoded alone.
        """
        # Each line has to be a JSON text by itself, and an invalid one may become valid with its neighbours. Not here:
        # a string cannot span a line end, and without a list in them the lines nest by objects only, within which no
        # "{" follows a comma. So each "{" at the start of a line begins a new element.
        body = b",\n".join(lines)
        count = len(lines)
        for sign in (b"[", b'"error"'):
            at = body.find(sign)
            if at >= 0:
                count = body.count(b"\n", 0, at)
                body = b",\n".join(lines[:count])
        if count < 2 or not body.startswith(b"{") or body.count(b",\n{") != count - 1:
            return []
        try:
            chunks = self._validators.many(b"[%b]" % body)
        except ValidationError:
            return []
        # Several elements in one line.
        return chunks if len(chunks) == count else []


_is_done: Callable[[Chunk], bool] = attrgetter("done")


def _explain(line: bytes, validate: Callable[[bytes], object], *, last: bool) -> str:
    shown = line[:80].decode("utf-8", "replace")
    more = "..." if len(line) > 80 else ""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        if last:
            return f"the server's answer ends in the middle of a line: {shown!r}{more}"
        return f"the server's answer is not NDJSON, it has the line {shown!r}{more}"
    what = f"{shown!r}{more}"
    try:
        validate(line)
    except ValidationError as exc:
        what = misfit(exc, line)
    return f"the server's answer has a line that is not a chunk of an answer: {what}"
