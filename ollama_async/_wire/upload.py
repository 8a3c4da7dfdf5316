"""``Upload``: a request's body on its way, in a task of ours that reads the caller's iterator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import httpx

from .http1 import WRONG_LENGTH
from .outcome import ExchangeOutcome
from .phase import Phase
from .tasks import cancel_once, join_cancelled

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterable

    from .connection import Connection
    from .reader import ResponseReader


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
                    raise httpx.LocalProtocolError(WRONG_LENGTH)
            if connection.is_closing:
                return
            connection.write(block)
            reader.last_activity_at = reader.loop.time()
            await connection.writable()
    finally:
        # The caller's generator holds files, so it is closed here, in the task that ran it. httpx wraps it in an
        # iterator that does not close it, and offers no other name for it than this one.
        for source in (iterator, getattr(blocks, "_stream", None)):
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()
    if left:
        raise httpx.LocalProtocolError(WRONG_LENGTH)
    if left is None:
        connection.write(b"0\r\n\r\n")
    connection.request_sent()
    # Unless the answer came before.
    if reader.phase is Phase.SENDING:
        reader.enter(Phase.WAITING)


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
        """Wait until the body is sent, or until an answer arrives, which ends the upload.

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
        """Send the FIN; from any thread."""
        self._connection.shutdown_for(reader)

    def close_for(self, reader: ResponseReader) -> None:
        """Stop the task and close the connection."""
        self.stop()
        self._connection.close_for(reader)

    def pause_reading(self) -> None:
        """Read no more for now."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._connection.resume_reading()
