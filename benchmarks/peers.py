"""The clients that are compared: each reads one streamed answer, asks one short question, and leaves a stream.

All make typed objects of what comes, as they do by default; where a client has no types of its own (aiohttp, httpx), it
uses ours. The floor is what no client in Python can be much below: a protocol that parses HTTP with httptools and
validates each line with pydantic in the callback, with no stream, queue, token, timeout or error handling.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

MESSAGES = [{"role": "user", "content": "hi"}]


class Peer(Protocol):
    """A client under test, for one server."""

    pause: float
    """Seconds that the reader of a stream takes for each chunk."""

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        """Read a stream to its end, call tick() after each chunk, and return how many there were."""

    async def ask(self) -> None:
        """Ask a question that is answered at once."""

    def leave(self, task: asyncio.Task[int]) -> Any:
        """Stop the stream that a task reads, the way this client is meant to be stopped."""

    def leave_all(self, tasks: list[asyncio.Task[int]]) -> None:
        """Stop all streams."""

    async def close(self) -> None:
        """Close the client."""


class Ours:
    """ollama_async: typed chunks, a token, default timeouts."""

    pause = 0.0

    def __init__(self, url: str) -> None:
        from ollama_async import AbortError, AsyncClient, CancelToken

        self._client = AsyncClient(url)
        self._make_token = CancelToken
        self._aborted = AbortError
        self._token = CancelToken()

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        self._token = self._make_token()
        count = 0
        with contextlib.suppress(self._aborted):
            async for _ in self._client.chat(model, MESSAGES, stream=True, token=self._token):
                count += 1
                tick()
                if self.pause:
                    await asyncio.sleep(self.pause)
        return count

    async def ask(self) -> None:
        await self._client.chat("short", MESSAGES)

    def leave(self, task: asyncio.Task[int]) -> Any:
        self._token.abort()

    def leave_all(self, tasks: list[asyncio.Task[int]]) -> None:
        self._client.abort()

    async def close(self) -> None:
        await self._client.aclose()


class OllamaPython:
    """ollama-python, by its AsyncClient; a stream is left by cancelling its task."""

    pause = 0.0

    def __init__(self, url: str) -> None:
        import ollama

        self._client = ollama.AsyncClient(url)

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        count = 0
        async for _ in await self._client.chat(model, MESSAGES, stream=True):
            count += 1
            tick()
            if self.pause:
                await asyncio.sleep(self.pause)
        return count

    async def ask(self) -> None:
        await self._client.chat("short", MESSAGES)

    def leave(self, task: asyncio.Task[int]) -> Any:
        task.cancel()

    async def close(self) -> None:
        await self._client.close()


class OpenAI:
    """openai-python on the server's other API; a stream is left by closing it."""

    pause = 0.0

    def __init__(self, url: str) -> None:
        import openai

        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._stream: Any = None

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        count = 0
        self._stream = await self._client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        async for _ in self._stream:
            count += 1
            tick()
            if self.pause:
                await asyncio.sleep(self.pause)
        return count

    async def ask(self) -> None:
        await self._client.chat.completions.create(model="short", messages=MESSAGES)

    def leave(self, task: asyncio.Task[int]) -> Any:
        return self._stream.close()

    async def close(self) -> None:
        await self._client.close()


class Httpx:
    """httpx (or httpx2), line by line, with our types; a stream is left by closing the response."""

    pause = 0.0

    def __init__(self, url: str, module: str) -> None:
        from ollama_async import ChatResponse

        library = __import__(module)
        # Its own limits would let 100 streams through at a time.
        limits = library.Limits(max_connections=None)
        self._client = library.AsyncClient(base_url=url, timeout=None, limits=limits)
        self._validate = ChatResponse.__pydantic_validator__.validate_json
        self._response: Any = None

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        count = 0
        body = {"model": model, "messages": MESSAGES, "stream": True}
        async with self._client.stream("POST", "/api/chat", json=body) as self._response:
            async for line in self._response.aiter_lines():
                self._validate(line)
                count += 1
                tick()
                if self.pause:
                    await asyncio.sleep(self.pause)
        return count

    async def ask(self) -> None:
        answer = await self._client.post("/api/chat", json={"model": "short", "messages": MESSAGES, "stream": False})
        self._validate(answer.content)

    def leave(self, task: asyncio.Task[int]) -> Any:
        return self._response.aclose()

    async def close(self) -> None:
        await self._client.aclose()


class Aiohttp:
    """aiohttp, line by line, with our types; a stream is left by closing the response, which closes its connection."""

    pause = 0.0

    def __init__(self, url: str) -> None:
        import aiohttp

        from ollama_async import ChatResponse

        self._session = aiohttp.ClientSession(
            url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
        )
        self._validate = ChatResponse.__pydantic_validator__.validate_json
        self._response: Any = None

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        count = 0
        body = {"model": model, "messages": MESSAGES, "stream": True}
        async with self._session.post("/api/chat", json=body) as self._response:
            async for line in self._response.content:
                self._validate(line)
                count += 1
                tick()
                if self.pause:
                    await asyncio.sleep(self.pause)
        return count

    async def ask(self) -> None:
        body = {"model": "short", "messages": MESSAGES, "stream": False}
        async with self._session.post("/api/chat", json=body) as response:
            self._validate(await response.read())

    def leave(self, task: asyncio.Task[int]) -> Any:
        self._response.close()

    async def close(self) -> None:
        await self._session.close()


class Floor:
    """httptools and pydantic in a protocol, and nothing else."""

    pause = 0.0

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).hostname, urlsplit(url).port
        self._idle: list[Any] = []
        self._last: Any = None

    async def _send(self, body: dict[str, Any], tick: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        content = json.dumps(body).encode()
        if self._idle:
            protocol = self._idle.pop()
        else:
            _, protocol = await loop.create_connection(floor_protocol(), *self._address)
        self._last = protocol
        done = protocol.begin(loop.create_future(), tick)
        protocol.transport.write(b"POST /api/chat HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        count: int = await done
        self._idle.append(protocol)
        return count

    async def read(self, model: str, tick: Callable[[], None]) -> int:
        return await self._send({"model": model, "messages": MESSAGES, "stream": True}, tick)

    async def ask(self) -> None:
        await self._send({"model": "short", "messages": MESSAGES, "stream": False}, lambda: None)

    def leave(self, task: asyncio.Task[int]) -> Any:
        self._last.transport.abort()
        task.cancel()

    async def close(self) -> None:
        for protocol in self._idle:
            protocol.transport.abort()


def floor_protocol() -> Any:
    import httptools

    from ollama_async import ChatResponse

    validate = ChatResponse.__pydantic_validator__.validate_json

    class FloorProtocol(asyncio.Protocol):
        def begin(self, done: asyncio.Future[int], tick: Callable[[], None]) -> asyncio.Future[int]:
            self.parser = httptools.HttpResponseParser(self)
            self.rest, self.count, self.done, self.tick = b"", 0, done, tick
            return done

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_body(self, body: bytes) -> None:
            *lines, self.rest = (self.rest + body).split(b"\n")
            for line in lines:
                validate(line)
                self.count += 1
                self.tick()

        def on_message_complete(self) -> None:
            if self.rest:
                validate(self.rest)
            self.done.set_result(self.count)

    return FloorProtocol


PEERS: dict[str, Callable[[str], Peer]] = {
    "ollama_async": Ours,
    "ollama-python": OllamaPython,
    "openai": OpenAI,
    "httpx": lambda url: Httpx(url, "httpx"),
    "httpx2": lambda url: Httpx(url, "httpx2"),
    "aiohttp": Aiohttp,
    "floor": Floor,
}
