"""How a request goes out: its head, its body, and the task that reads the caller's iterator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import httpx

from ._channel import ExchangeOutcome, ResponseReader, cancel_once, join_cancelled
from ._http import Connection, HttpProxy, Origin, encode_head

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, AsyncIterable

__all__ = ["EncodedRequest", "Upload"]


class EncodedRequest:
    """A request as it goes over the wire; what cannot go is refused here, before there is a connection.

    Attributes:
        method: The request's.
        origin: Where it goes.
        data: The head, and the body if it is bytes.
        blocks: The body otherwise.
        length: Bytes that ``blocks`` must have in all, ``None`` if they are sent in chunks.
    """

    __slots__ = ("blocks", "data", "length", "method", "origin")

    def __init__(self, method: str, origin: Origin, data: bytes) -> None:
        self.method = method
        self.origin = origin
        self.data = data
        self.blocks: AsyncIterable[bytes] | None = None
        self.length: int | None = None

    @classmethod
    def of(cls, request: httpx.Request, proxy: HttpProxy | None) -> EncodedRequest:
        """Make it of a request of httpx; raises ``httpx.LocalProtocolError`` or ``httpx.UnsupportedProtocol``."""
        made = cls(request.method, Origin.of(request.url), encode_head(request, proxy))
        made.length = _body_length(request)
        stream = request.stream
        if isinstance(stream, httpx.ByteStream):
            body = b"".join(stream)
            if made.length is None:
                raise httpx.LocalProtocolError("the request has a Transfer-Encoding, but its body is bytes")
            if made.length != len(body):
                raise httpx.LocalProtocolError(_WRONG_LENGTH)
            made.data += body
        else:
            made.blocks = stream if isinstance(stream, httpx.AsyncByteStream) else _as_async(stream)
        return made


def _body_length(request: httpx.Request) -> int | None:
    if "transfer-encoding" in request.headers:
        if "content-length" in request.headers:
            raise httpx.LocalProtocolError("the request has a Content-Length and a Transfer-Encoding")
        return None
    length: str = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise httpx.LocalProtocolError(f"the request's Content-Length is no number: {length!r}")
    return int(length)


async def _as_async(stream: httpx.SyncByteStream) -> AsyncGenerator[bytes, None]:
    for block in stream:
        yield block


_WRONG_LENGTH = "the request's body is not as long as its Content-Length says"


async def _upload(
    reader: ResponseReader, connection: Connection, blocks: AsyncIterable[bytes], length: int | None
) -> None:
    """Write a request's body, no faster than the server takes it."""
    left = length
    iterator = aiter(blocks)
    try:
        async for block in iterator:
            if not block:
                continue
            if left is None:
                block = b"%x\r\n%b\r\n" % (len(block), block)
            else:
                left -= len(block)
                if left < 0:
                    raise httpx.LocalProtocolError(_WRONG_LENGTH)
            if connection.is_closing:
                return
            connection.write(block)
            reader.last_activity_at = reader.loop.time()
            await connection.writable()
    finally:
        # The caller's generator holds files: it is closed here, in the task that ran it. httpx puts an iterator of its
        # own around it, whose end does not end it (and has no other name for it than this one).
        for source in (iterator, getattr(blocks, "_stream", None)):
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()
    if left:
        raise httpx.LocalProtocolError(_WRONG_LENGTH)
    if left is None:
        connection.write(b"0\r\n\r\n")
    connection.request_sent()
    reader.last_activity_at = reader.sent_at = reader.loop.time()


class Upload:
    """A request's body on its way: the task that reads the caller's iterator, over the connection that it writes to."""

    def __init__(
        self, reader: ResponseReader, connection: Connection, blocks: AsyncIterable[bytes], length: int | None
    ) -> None:
        self._connection = connection
        self._stopped = False
        self._task = reader.loop.create_task(_upload(reader, connection, blocks, length))
        self._task.add_done_callback(partial(self._ended, reader))

    async def finished(self, reader: ResponseReader) -> None:
        """Wait until the body is out, or until an answer comes, which ends it.

        Cancellation: the connection is closed at once.
        """
        try:
            while not self._task.done() and not reader.status:
                await reader.wait()
        finally:
            self.stop()
            await join_cancelled(self._task)

    def _ended(self, reader: ResponseReader, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not self._stopped:
                reader.close(ExchangeOutcome("error", httpx.LocalProtocolError("the request's body was cancelled")))
        elif task.exception() is not None:
            reader.close(ExchangeOutcome("error", task.exception()))
        reader.wake()

    def stop(self) -> None:
        """Tell the task to stop."""
        self._stopped = True
        cancel_once(self._task)

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Put the FIN on its way."""
        self._connection.shutdown_for(reader)

    def close_for(self, reader: ResponseReader) -> None:
        """Give everything back."""
        self.stop()
        self._connection.close_for(reader)

    def pause_reading(self) -> None:
        """Read no more for now."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._connection.resume_reading()
