"""``ForeignRequest``: runs a request in a task we own, over a transport we do not."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from ollama_async._wire.guard import like_stream
from ollama_async._wire.logged import new_reader
from ollama_async._wire.outcome import ExchangeOutcome
from ollama_async._wire.parser import Head
from ollama_async._wire.phase import Phase
from ollama_async._wire.tasks import cancel_once, join_cancelled
from ollama_async._wire.transport import READER
from ollama_async._wire.unpack import FORMS, PAGE, encoding_of

from .failures import strange_encoding

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    import httpx

    from ollama_async._wire.reader import ResponseReader


class ForeignRequest:
    """A request over somebody else's transport, or with somebody else's code on its way; the link of its reader.

    Args:
        reader: The reader of the answer.
        client: The httpx client to send with.
        request: The request.
    """

    def __init__(self, reader: ResponseReader, client: httpx.AsyncClient, request: httpx.Request) -> None:
        self._reader = reader
        self._client = client
        self._request = request
        self._socket: Any = None
        # If one of our transports is under the foreign client, its connection is attached to this one. It may serve
        # several requests in turn, if credentials are asked for or a redirect is followed.
        self._inner = new_reader(reader.loop, body_form=PAGE)
        self._room = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, unless it has been closed already; after this has become the reader's link.

        Before that would be too early: an eager task may be through at once.
        """
        if not self._closed:
            self._task = self._reader.loop.create_task(self._run())

    def shutdown_for(self, reader: ResponseReader) -> None:
        """Send the FIN, as far as the socket is known and may be touched; from any thread."""
        self._inner.close_threadsafe(ExchangeOutcome("closed"))
        # Only in the loop's own thread: elsewhere the foreign pool may be closing this very descriptor, and its number
        # may belong to another file before it is duplicated.
        if self._socket is None or asyncio._get_running_loop() is not reader.loop:  # noqa: SLF001
            return
        try:
            # Not os.dup(), which on Windows knows files only.
            duplicate = socket.socket(fileno=socket.dup(self._socket.fileno()))
        except OSError:
            return
        with duplicate:
            try:
                duplicate.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def close_for(self, reader: ResponseReader) -> None:
        """Stop the task."""
        self._closed = True
        if self._task is not None:
            cancel_once(self._task)

    async def wait_closed(self) -> None:
        """Wait a moment for the task, which has been told to stop.

        Cancellation: safe; the task ends anyway.
        """
        if self._task is not None:
            await join_cancelled(self._task)

    def pause_reading(self) -> None:
        """Nothing to do: the task waits by itself when there is no room."""

    def resume_reading(self) -> None:
        """Let the task read on."""
        self._room.set()

    async def _run(self) -> None:
        reader = self._reader
        try:
            self._enter_sending()
            self._request.extensions[READER] = self._inner
            response = await self._client.send(self._request, stream=True)
            try:
                await self._pass_on(response)
            finally:
                await response.aclose()
        except Exception as exc:
            reader.set_exception(exc)
        except BaseException:
            reader.close(ExchangeOutcome("closed", "the event loop is shutting down"))
            raise
        else:
            reader.feed_eof()

    def _enter_sending(self) -> None:
        """Tell an upload from what is sent at once; a foreign transport does not say when it is connected."""
        stream = self._request.stream
        if not hasattr(stream, "__iter__"):
            self._request.stream = like_stream(_WatchedUpload, stream)(self._reader, stream)
        self._reader.enter(Phase.WAITING)

    async def _pass_on(self, response: httpx.Response) -> None:
        reader = self._reader
        network = response.extensions.get("network_stream")
        # A connection of HTTP/2 carries other requests as well.
        if network is not None and response.http_version != "HTTP/2":
            self._socket = network.get_extra_info("socket")
        headers = response.headers.raw
        reason = response.extensions.get("reason_phrase", b"")
        version = response.extensions.get("http_version", b"HTTP/1.1")
        reader.received_at = reader.loop.time()
        head = Head(response.status_code, reason, headers, version)
        reader.feed_head(head)
        encoding = encoding_of(head)
        if encoding is not None and reader.body_form.unpacker is None:
            raise strange_encoding(encoding)
        if response.is_stream_consumed:
            # A mock has made it of what httpx has unpacked by then.
            reader.body_form = FORMS[reader.body_form.framing]
        # Not even httpx may unpack it: a block of it may become a thousand times as much.
        async for block in response.aiter_bytes() if reader.body_form.unpacker is None else response.aiter_raw():
            reader.received_at = reader.loop.time()
            room = reader.feed_data(block)
            if not room:
                self._room.clear()
                await self._room.wait()


class _WatchedUpload:
    """The body of a request, which notes how far a foreign transport is with it."""

    def __init__(self, reader: ResponseReader, stream: Any) -> None:
        self._reader = reader
        self._stream = stream
        self._blocks: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> Self:
        # The transport asks for the body when it is connected.
        self._reader.enter(Phase.SENDING)
        self._blocks = aiter(self._stream)
        return self

    async def __anext__(self) -> bytes:
        # It asks for the next block when it has sent the one before.
        self._reader.last_activity_at = self._reader.loop.time()
        assert self._blocks is not None
        try:
            return await anext(self._blocks)
        except StopAsyncIteration:
            # Unless the answer came before.
            if self._reader.phase is Phase.SENDING:
                self._reader.enter(Phase.WAITING)
            raise

    async def aclose(self) -> None:
        await self._stream.aclose()
