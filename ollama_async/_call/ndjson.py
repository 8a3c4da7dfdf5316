"""``LineSplitter``: blocks of bytes in, whole lines out."""

from __future__ import annotations

from ollama_async._errors import ProtocolError

# Ollama's own Go client reads lines of up to 8 MB; twice that leaves room for what proxies and newer servers send.
MAX_LINE_BYTES = 16 * 1024 * 1024


class LineSplitter:
    r"""Cuts a body that arrives in blocks into lines.

    It works on bytes and knows one separator, ``b"\n"``. Text splitters also cut at U+0085 and U+2028, which Go does
    not escape inside JSON strings, and they have to decode characters that a block may cut in two.
    """

    __slots__ = ("_limit", "_parts", "_size", "failure")

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        # The blocks of the unfinished line: joining them at each block would cost the square of its length.
        self._parts: list[bytes] = []
        self._size = 0
        # What is wrong after the lines that were returned; nothing can be read behind it.
        self.failure: ProtocolError | None = None

    def feed_data(self, data: bytes) -> list[bytes]:
        """Take the next block of the body; only while there is no ``failure``.

        Args:
            data: Any number of bytes; it may end anywhere.

        Returns:
            The lines that are complete now, without line ends and without blank lines. If a line is over the limit,
            only the lines before it, and ``failure`` is set.
        """
        reach = self._size + len(data)
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._parts:
            self._parts.append(lines[0])
            lines[0] = b"".join(self._parts)
            self._parts = []
            self._size = 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if reach > self._limit:
            lines = self._up_to_limit(lines)
        if len(lines) == 1 and lines[0] and not lines[0].isspace():
            return lines
        return [line for line in lines if line and not line.isspace()]

    def _up_to_limit(self, lines: list[bytes]) -> list[bytes]:
        place = next((place for place, line in enumerate(lines) if len(line) > self._limit), None)
        if place is not None or self._size > self._limit:
            self.failure = ProtocolError(f"the server sent a line of more than {self._limit:,} bytes")
        return lines[:place]

    def flush(self) -> bytes:
        """End the body; return the last line if it has no line end, else ``b""``."""
        rest = b"".join(self._parts)
        self._parts = []
        self._size = 0
        return b"" if rest.isspace() else rest
