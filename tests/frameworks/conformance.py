"""One framework on one client: ``python conformance.py FRAMEWORK original|interop``; prints its findings as JSON.

Each finding is what the server saw, on a FakeOllama that answers without an end. A connection counts as open if the
client has not left it two seconds after the task that read it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ollama_async import CancelToken, interop
from ollama_async.testing import FakeOllama, Reply

ROUNDS = 120
BOUND = 2.0  # seconds
MODEL = "fake"

Stream = Callable[[], AsyncIterator[object]]
Ask = Callable[[], Awaitable[object]]


def langchain(url: str) -> tuple[Stream, Ask]:
    from langchain_ollama import ChatOllama

    model = ChatOllama(model=MODEL, base_url=url)
    return lambda: model.astream("hi"), lambda: model.ainvoke("hi")


def llama_index(url: str) -> tuple[Stream, Ask]:
    import ollama
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.ollama import Ollama

    model = Ollama(model=MODEL, context_window=4096, async_client=ollama.AsyncClient(url))

    async def stream() -> AsyncIterator[object]:
        async for part in await model.astream_chat([ChatMessage("hi")]):
            yield part

    return stream, lambda: model.achat([ChatMessage("hi")])


def haystack(url: str) -> tuple[Stream, Ask]:
    from haystack.dataclasses import ChatMessage
    from haystack_integrations.components.generators.ollama import OllamaChatGenerator

    async def stream() -> AsyncIterator[object]:
        # It calls back for each chunk, so the loop over them is its own.
        parts: asyncio.Queue[object] = asyncio.Queue()
        model = OllamaChatGenerator(model=MODEL, url=url, streaming_callback=parts.put)
        running = asyncio.ensure_future(model.run_async([ChatMessage.from_user("hi")]))
        try:
            while not running.done() or not parts.empty():
                getting = asyncio.ensure_future(parts.get())
                try:
                    await asyncio.wait([running, getting], return_when=asyncio.FIRST_COMPLETED)
                    if getting.done():
                        yield getting.result()
                finally:
                    getting.cancel()
            await running
        finally:
            running.cancel()

    async def ask() -> object:
        return await OllamaChatGenerator(model=MODEL, url=url).run_async([ChatMessage.from_user("hi")])

    return stream, ask


def autogen(url: str) -> tuple[Stream, Ask]:
    from autogen_core.models import UserMessage
    from autogen_ext.models.ollama import OllamaChatCompletionClient

    about = {
        "vision": False,
        "function_calling": False,
        "json_output": False,
        "family": "x",
        "structured_output": False,
    }

    model = OllamaChatCompletionClient(model=MODEL, host=url, model_info=about)
    messages = [UserMessage(content="hi", source="user")]
    return lambda: model.create_stream(messages), lambda: model.create(messages)


def agno(url: str) -> tuple[Stream, Ask]:
    from agno.agent import Agent
    from agno.models.ollama import Ollama

    agent = Agent(model=Ollama(id=MODEL, host=url), telemetry=False)
    return lambda: agent.arun("hi", stream=True), lambda: agent.arun("hi")


def strands(url: str) -> tuple[Stream, Ask]:
    from strands.models.ollama import OllamaModel

    model = OllamaModel(url, model_id=MODEL)

    def stream() -> AsyncIterator[object]:
        return model.stream([{"role": "user", "content": [{"text": "hi"}]}])

    async def ask() -> object:
        return [part async for part in stream()]

    return stream, ask


def any_llm(url: str) -> tuple[Stream, Ask]:
    from any_llm import AnyLLM

    messages: Any = [{"role": "user", "content": "hi"}]

    model = AnyLLM.create("ollama", api_base=url)

    async def stream() -> AsyncIterator[object]:
        chunks: Any = await model.acompletion(MODEL, messages, stream=True)
        async for chunk in chunks:
            yield chunk

    return stream, lambda: model.acompletion(MODEL, messages)


FRAMEWORKS: dict[str, Callable[[str], tuple[Stream, Ask]]] = {
    "langchain-ollama": langchain,
    "llama-index-llms-ollama": llama_index,
    "ollama-haystack": haystack,
    "autogen-ext": autogen,
    "agno": agno,
    "strands-agents": strands,
    "any-llm-sdk": any_llm,
}


class Conformance:
    """The checks of one framework."""

    def __init__(self, server: FakeOllama, stream: Stream, ask: Ask) -> None:
        self.server = server
        self.stream = stream
        self.ask = ask

    async def read(self) -> None:
        async for _ in self.stream():
            pass

    async def left_open(self, before: int) -> int:
        """Count the connections since then that the client has not left in time."""
        records = self.server.connections[before:]
        for record in records:
            until = time.monotonic() + BOUND
            while record.open and time.monotonic() < until:
                await asyncio.sleep(0.005)
        return sum(record.open for record in records)

    async def uses(self) -> str:
        """Ask for an answer, and read one."""
        self.server.forget()
        self.server.script("/api/chat", Reply.chat("one ", "two"), always=True)
        await self.ask()
        parts = [part async for part in self.stream()]
        return "works" if parts else "nothing came"

    async def cancelled(self, times: int) -> int:
        """Count the connections that stay open after cancellations at random moments."""
        moments = random.Random(times)
        left_open = 0
        for _ in range(ROUNDS):
            before, asked = len(self.server.connections), len(self.server.requests)
            reading = asyncio.ensure_future(self.read())
            until = time.monotonic() + BOUND
            while len(self.server.requests) == asked and not reading.done() and time.monotonic() < until:
                await asyncio.sleep(0)
            await asyncio.sleep(moments.uniform(0, 0.01))
            for _ in range(times):
                reading.cancel()
                for _ in range(moments.randrange(3)):
                    await asyncio.sleep(0)
            await asyncio.wait([reading], timeout=BOUND)
            left_open += await self.left_open(before)
        return left_open

    async def timed_out(self) -> int:
        """Count the connections that stay open after a timeout."""
        before = len(self.server.connections)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.read()
        return await self.left_open(before)

    async def broken_off(self) -> int:
        """Count the connections that stay open after `break`, with the generator closed."""
        before = len(self.server.connections)
        parts = self.stream()
        async for _ in parts:
            break
        await parts.aclose()  # type: ignore[attr-defined]
        return await self.left_open(before)

    async def stopped(self) -> str:
        """Tell what a caller gets inside `token.scope()`."""
        before, token = len(self.server.connections), CancelToken()
        asyncio.get_running_loop().call_later(0.2, token.abort, "stop")
        told = "nothing"
        try:
            with token.scope():
                async with asyncio.timeout(BOUND):
                    await self.read()
        except Exception as exc:
            told = type(exc).__name__
        left_open = await self.left_open(before)
        return told if not left_open else f"{told}, connection open"


async def check(framework: str, server: FakeOllama) -> dict[str, object]:
    server.script("/api/chat", Reply.endless_chat(0.001), always=True)
    checks = Conformance(server, *FRAMEWORKS[framework](server.url))
    # What they log, warn of or retry is not asked here.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    gc.disable()
    return {
        "cancelled once": await checks.cancelled(1),
        "cancelled twice": await checks.cancelled(2),
        "timeout": await checks.timed_out(),
        "break": await checks.broken_off(),
        "token.scope()": await checks.stopped(),
        # Last: it leaves connections that are kept for reuse.
        "uses": await checks.uses(),
    }


def main() -> None:
    framework, client = sys.argv[1:]
    if client == "interop":
        interop.install()
    with FakeOllama() as server:
        print(json.dumps(asyncio.run(check(framework, server))))


if __name__ == "__main__":
    main()
