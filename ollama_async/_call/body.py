"""Bodies that are read as a whole: the answer to a plain call, and what an error says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_async._errors import ProtocolError
from ollama_async._wire.guard import MAX_BODY_BYTES
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome

from .failures import json_object, status_error, stream_error

if TYPE_CHECKING:
    from .exchange import Exchange

# More of an error's body than this is of no use.
_MAX_ERROR_BODY = 64 * 1024


async def read_body(exchange: Exchange) -> bytes:
    """Wait for the whole body.

    Raises:
        StreamError: The body is an error that came with a status of success.
        ExchangeEnded: By whatever ended it; also when the body is over the limit.

    Cancellation: the socket is closed at once.
    """
    blocks: list[bytes] = []
    size = 0
    while block := await _read(exchange):
        blocks.append(block)
        size += len(block)
        if size > MAX_BODY_BYTES:
            error = ProtocolError(f"the server's answer is over {MAX_BODY_BYTES:,} bytes")
            exchange.reader.close(ExchangeOutcome("error", error))
            exchange.reader.check()
    body = blocks[0] if len(blocks) == 1 else b"".join(blocks)
    # By find(), as in the decoder.
    if body.find(b'"error"') >= 0:
        frame = json_object(body)
        if frame.get("error") is not None:
            raise stream_error(frame, exchange.reader)
    return body


async def raise_for_status(exchange: Exchange) -> None:
    """Raise the ``ResponseError`` that the server answered with.

    Cancellation: the socket is closed at once.
    """
    reader = exchange.reader
    error = status_error(reader, await _error_body(exchange))
    reader.close(ExchangeOutcome("error", error))
    if reader.outcome is not None and reader.outcome.kind == "error":
        # Also if the connection broke after the status arrived: the status says more.
        reader.outcome.cause = error
    try:
        # This raises the error, unless another end came first; an answer that is complete when it has arrived was
        # complete by then.
        reader.check()
        raise error
    finally:
        # Raised, it holds this frame.
        del error


async def _error_body(exchange: Exchange) -> bytes:
    body = b""
    try:
        while len(body) < _MAX_ERROR_BODY and (block := await _read(exchange)):
            body += block
    except ExchangeEnded as ended:
        if ended.outcome.kind != "error":
            raise
    return body[:_MAX_ERROR_BODY]


async def _read(exchange: Exchange) -> bytes:
    try:
        return await exchange.reader.read()
    except BaseException:
        await exchange.wait_closed()
        raise
