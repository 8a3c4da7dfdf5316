"""NDJSON framing: blocks of bytes in, whole lines out."""

from __future__ import annotations

from ._errors import ProtocolError

__all__ = ["MAX_LINE_BYTES", "LineSplitter"]

# Ollama's own Go client reads lines of up to 8 MB; twice that leaves room for what proxies and newer servers send.
MAX_LINE_BYTES = 16 * 1024 * 1024


class LineSplitter:
    r"""Cuts a body that arrives in blocks into lines.

    It works on bytes and knows one separator, ``b"\n"``. Text-based splitters also cut at U+0085 and U+2028, which
    Go does not escape inside JSON strings, and they have to decode a character that a block may have cut in two.
    """

    __slots__ = ("_limit", "_parts", "_size", "too_long")

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        # The unfinished line as the blocks it came in: joining them at each block would cost the square of its length.
        self._parts: list[bytes] = []
        self._size = 0
        # Whether the lines that were returned are followed by one over the limit.
        self.too_long = False

    def feed(self, block: bytes) -> list[bytes]:
        """Take the next block of the body.

        Args:
            block: Any number of bytes, cut anywhere.

        Returns:
            The lines that are complete now, without their line ends; blank ones are left out.

        Raises:
            ProtocolError: A line is over the limit; first, however, the lines before it are returned.
        """
        if self.too_long:
            self.check()
        reach = self._size + len(block)
        lines = block.split(b"\n")
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

    def check(self) -> None:
        """Raise the ``ProtocolError`` that is due after the lines that were returned, if one is."""
        if self.too_long:
            raise ProtocolError(f"the server sent a line of more than {self._limit:,} bytes")

    def _up_to_limit(self, lines: list[bytes]) -> list[bytes]:
        for place, line in enumerate(lines):
            if len(line) > self._limit:
                self.too_long = True
                lines = lines[:place]
                break
        self.too_long = self.too_long or self._size > self._limit
        if not lines:
            self.check()
        return lines

    def flush(self) -> bytes:
        """End the body: return the last line if it had no line end, else ``b""``."""
        rest = b"".join(self._parts)
        self._parts = []
        self._size = 0
        return b"" if rest.isspace() else rest
