"""``ResponseParser``: the bytes of one answer in, its head and body out; no socket, no event loop."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import httptools
import httpx

from .http1 import MAX_HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class PeerClosed(httpx.RemoteProtocolError):
    """The server ended the connection before its answer was complete."""


_name: Callable[[tuple[bytes, bytes]], bytes] = itemgetter(0)


@lru_cache(64)
def _in_lower_case(names: tuple[bytes, ...]) -> frozenset[bytes]:
    # Cached, since the answers of a server have the same names again and again.
    return frozenset(map(bytes.lower, names))


class Head:
    """The head of an answer.

    Attributes:
        status: The HTTP status; 0 before the head has arrived.
        reason: What the status line says behind it.
        headers: The headers, as they came.
        version: Of HTTP.
        names: Those of the headers, in lower case.
    """

    __slots__ = ("headers", "names", "reason", "status", "version")

    def __init__(
        self,
        status: int = 0,
        reason: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        version: bytes = b"HTTP/1.1",
    ) -> None:
        self.status: int = status
        self.reason: bytes = reason
        self.headers: Sequence[tuple[bytes, bytes]] = headers
        self.version: bytes = version
        self.names: frozenset[bytes] = _in_lower_case(tuple(map(_name, headers)))


class ResponseParser:
    """Parses the answer to one request, as an HTTP/1.1 client reads it.

    Args:
        method: The request's method: an answer to HEAD has no body.

    Attributes:
        head: The head of the final answer (not of a 1xx before it), once it has arrived.
        complete: Whether the whole answer has arrived.
        keep_alive: Whether the connection can serve another request after this answer.
        trailing_data: Whether bytes followed the answer that were not asked for: they spoil the connection.
        error: What is wrong with the answer; nothing can be parsed after it.
    """

    # One object is both: what the connection asks, and what httptools calls back. Two would be one call more a token.
    __slots__ = (
        "_body_parts",
        "_headers",
        "_method",
        "_own_parts",
        "_parser",
        "_reason",
        "_size",
        "_unparsed",
        "complete",
        "error",
        "head",
        "keep_alive",
        "on_body",
        "trailing_data",
    )

    def __init__(self, method: str) -> None:
        self.head: Head | None = None
        self.complete = False
        self.keep_alive = False
        self.trailing_data = False
        self.error: httpx.RemoteProtocolError | None = None
        self._method = method
        # The parts of the body in the data that is being fed, one for each HTTP chunk. A server that sends a token a
        # chunk sends many at once to a reader that is behind: a list takes them at a twentieth of the cost of a method.
        self._body_parts: list[bytes] = []
        self.on_body = self._body_parts.append
        # How many of these belong to the answer, once it is complete.
        self._own_parts = 0
        self._parser: Any = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        # Bytes of the heads and trailers that were counted; and bytes that may be held by the parser since it last gave
        # out a part of the body.
        self._size = 0
        self._unparsed = 0

    # -- called by the connection --

    def feed_data(self, data: bytes | memoryview) -> bytes:
        """Parse the bytes that one read has brought.

        Returns:
            The part of the body among them; ``b""`` if there is none. What precedes an error is returned too.
        """
        # A head, a trailer or the head of a chunk without an end is held by the parser: a part of the body resets this.
        self._unparsed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Only behind the answer, where on_message_begin() has noticed it: on_headers_complete() refuses it as the
            # answer.
            pass
        except httptools.HttpParserError as exc:
            # What a callback raises, the parser turns into its own error.
            cause = exc.__context__
            if cause is not None and not isinstance(cause, Exception):
                raise cause from None
            if self.complete:
                self.trailing_data = True
            else:
                self.error = httpx.RemoteProtocolError(self._explain(exc, data))
                self.error.__cause__ = exc
        if self._body_parts:
            return self.take_body()
        if self._unparsed > MAX_HEAD_BYTES and not self.complete:
            self.error = self.error or httpx.RemoteProtocolError(_TOO_LARGE)
        return b""

    def feed_eof(self) -> None:
        """Note that the server will send nothing more: that ends a body without framing, and breaks any other."""
        if self.complete or self.error is not None:
            return
        if self._until_close():
            self.complete = True
            return
        where = "before it answered" if self.head is None else "in the middle of its answer"
        self.error = PeerClosed(f"the server closed the connection {where}")

    def take_body(self) -> bytes:
        """Return the part of the body that was parsed and not returned yet, as after an interrupted ``feed_data()``."""
        parts = self._body_parts
        if parts and self.head is None:
            # The body of an interim answer, which has none: it would become a part of the answer's.
            parts.clear()
            self.error = self.error or httpx.RemoteProtocolError(_BODY_FIRST)
        if self.complete and len(parts) > self._own_parts:
            self.trailing_data = True
            del parts[self._own_parts :]
        if not parts:
            return b""
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._unparsed = 0
        # The list stays the same: the parser has its append method.
        parts.clear()
        return body

    def close(self) -> None:
        """Let go of httptools' parser, whose callbacks hold this object, which holds it."""
        self._parser = None

    # -- called by httptools --

    # It asks for these as well, and an attribute that is not there costs an exception.
    on_chunk_header = on_chunk_complete = None

    def on_message_begin(self) -> None:
        self.trailing_data = self.trailing_data or self.complete

    def on_status(self, reason: bytes) -> None:
        if not self.complete:
            self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:
            self._headers.append((name, value.strip(b" \t")))
        else:
            # A trailer, which is dropped.
            self._count_head()
            self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if self.complete:
            # Another answer behind this one, which only spoils the connection.
            return
        if self._body_parts:
            raise _Refused(_BODY_FIRST)
        headers, reason, status = self._headers, self._reason, self._parser.get_status_code()
        if status < 200 or self._unparsed > MAX_HEAD_BYTES:
            # Else all of it is within the limit.
            self._count_head()
        if status < 200:
            if status == 101:
                raise _Refused("the server switched protocols, which was not asked for")
            if status < 100:
                raise _Refused(f"the server's answer has the status {status:03}, which HTTP does not know")
            return
        version = b"HTTP/" + self._parser.get_http_version().encode("ascii")
        self.head = Head(status, reason, headers, version)
        if self._method == "HEAD":
            # The parser cannot be told that no body follows, whatever the headers say.
            self._complete()

    def on_message_complete(self) -> None:
        if self.head is not None and not self.complete:
            self._complete()

    # -- inside --

    def _count_head(self) -> None:
        """Count the head that has arrived last, once."""
        headers, self._headers = self._headers, []
        reason, self._reason = self._reason, b""
        self._count(len(reason) + sum(map(len, chain.from_iterable(headers))) + 4 * len(headers))

    def _count(self, size: int) -> None:
        """Hold heads and trailers to the limit, in whichever reads they come; without an end, feed_data() does."""
        self._size += size
        if self._size > MAX_HEAD_BYTES:
            raise _Refused(_TOO_LARGE)

    def _complete(self) -> None:
        self.complete = True
        self._own_parts = len(self._body_parts)
        self.keep_alive = self._parser.should_keep_alive()

    def _until_close(self) -> bool:
        """Whether the body ends only where the connection does."""
        return self.head is not None and self.head.names.isdisjoint({b"content-length", b"transfer-encoding"})

    def _explain(self, exc: httptools.HttpParserError, received: bytes | memoryview) -> str:
        data = bytes(received[:8])
        cause = exc.__context__
        if isinstance(cause, _Refused):
            return str(cause)
        if self.head is None and not data.startswith(b"HTTP/"):
            hint = "; is this a TLS port?" if data[:1] in (b"\x15", b"\x16") else ""
            return f"the server's answer is not HTTP{hint}"
        return f"the server's answer is broken HTTP: {exc}"


class _Refused(Exception):  # noqa: N818  (only for the way through httptools)
    """An answer that httptools would take and we do not."""


_BODY_FIRST = "the server's answer has a body before its head"
_TOO_LARGE = f"the head of the server's answer is over {MAX_HEAD_BYTES:,} bytes"
