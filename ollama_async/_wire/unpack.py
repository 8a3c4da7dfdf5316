"""Bodies that come packed where that was asked for: packed bytes in, a bounded number of bytes out."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from ollama_async._errors import ProtocolError

from .outcome import Framing

if TYPE_CHECKING:
    from .parser import Head

UNPACKS = frozenset({"gzip", "deflate"})
_OTHER_NAMES = {"x-gzip": "gzip"}

# A block of what is packed is at most 256 KiB, and text rarely shrinks to less than a thirtieth. Zeros shrink to a
# thousandth: who sends such a block does not mean well.
MAX_UNPACKED = 16 * 1024 * 1024

# As zlib counts: a header of gzip, one of zlib, none.
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def encodings_asked_for(accept_encoding: str) -> frozenset[str]:
    """Return the encodings that an ``Accept-Encoding`` header allows and that can be unpacked."""
    allowed: set[str] = set()
    for part in accept_encoding.lower().split(","):
        name, _, quality = part.replace(" ", "").partition(";q=")
        if quality.strip("0.") or not quality:
            allowed |= UNPACKS if name == "*" else {_OTHER_NAMES.get(name, name)}
    return frozenset(allowed & UNPACKS)


def encoding_of(head: Head) -> str | None:
    """Return how a body is packed, ``None`` if it is not."""
    if b"content-encoding" not in head.names:
        return None
    for name, value in head.headers:
        if name.lower() == b"content-encoding":
            given = value.strip().lower().decode("latin-1")
            if given not in ("", "identity"):
                return _OTHER_NAMES.get(given, given)
    return None


class Unpacker:
    """Unpacks a body that comes in blocks.

    Args:
        encoding: One of ``UNPACKS``.
    """

    __slots__ = ("_begun", "_encoding", "_first", "_inner")

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inner = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
        # Of deflate: the first byte, if it has come by itself; two tell whether there is a header.
        self._first: bytes = b""
        self._begun = False

    @property
    def whole(self) -> bool:
        """Whether the bytes so far are all of it."""
        return not self._begun or (self._inner is not None and self._inner.eof)

    def feed(self, block: bytes) -> bytes:
        """Take the next block, and return what it unpacks to, which may be nothing yet.

        Raises:
            ProtocolError: It is not packed as it should be, or unpacks to more than the limit.
        """
        self._begun = True
        inner = self._inner
        if inner is None:
            block = self._first + block
            if len(block) < 2:
                self._first = block
                return b""
            headed = block[0] & 15 == 8 and (block[0] << 8 | block[1]) % 31 == 0
            inner = self._inner = zlib.decompressobj(_ZLIB if headed else _RAW)
        parts: list[bytes] = []
        left = MAX_UNPACKED
        while block:
            if inner.eof:
                if self._encoding != "gzip":
                    raise ProtocolError("the answer has data after the end of its compressed body")
                # Of gzip, several files in a row are one.
                inner = self._inner = zlib.decompressobj(_GZIP)
            try:
                parts.append(inner.decompress(block, left))
            except zlib.error as exc:
                raise ProtocolError(f"the answer is not valid {self._encoding}: {exc}") from exc
            left -= len(parts[-1])
            if inner.unconsumed_tail or left <= 0:
                raise ProtocolError(f"a block of the answer decompresses to more than {MAX_UNPACKED:,} bytes")
            block = inner.unused_data
        return parts[0] if len(parts) == 1 else b"".join(parts)


class BodyForm:
    """What the body of an answer is made of, and what unpacks it, where it is compressed."""

    __slots__ = ("framing", "unpacker")

    def __init__(self, framing: Framing, unpacker: Unpacker | None = None) -> None:
        self.framing: Framing = framing
        self.unpacker: Unpacker | None = unpacker


# Those that are not compressed: almost all, so they are made once; by name, since Python hashes an enum by a call.
FORMS = {framing: BodyForm(framing) for framing in Framing}
LINES, WHOLE, PAGE = FORMS[Framing.LINES], FORMS[Framing.WHOLE], FORMS[Framing.PAGE]
