"""A proxy that passes on what comes after ``CONNECT``, and remembers what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class TunnelProxy:
    """The proxy, in a thread of its own; a context manager.

    Args:
        answer: What it says to ``CONNECT``. It passes on if that ends with ``ESTABLISHED``, waits if it is nothing,
            else closes.
        by_byte: Whether it says that byte by byte.
    """

    def __init__(self, answer: bytes = ESTABLISHED, *, by_byte: bool = False) -> None:
        self.heads: list[bytes] = []
        self.left = threading.Event()
        self.asked = threading.Event()
        self._answer = answer
        self._step = 1 if by_byte else len(answer) or 1
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            self.asked.set()
            for start in range(0, len(self._answer), self._step):
                writer.write(self._answer[start : start + self._step])
                # asyncio sends what is written at once, with TCP_NODELAY; the round lets the other side read it.
                await asyncio.sleep(0)
            if self._answer.endswith(ESTABLISHED):
                host, _, port = head.split()[1].decode().rpartition(":")
                there, back = await asyncio.open_connection(host, int(port))
                with contextlib.closing(back):
                    await self._pass_on(reader, writer, there, back)
            elif not self._answer:
                await reader.read()
        self.left.set()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there: asyncio.StreamReader,
        back: asyncio.StreamWriter,
    ) -> None:
        pumps = [asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
