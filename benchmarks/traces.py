"""The spans of a call that is stopped, by our telemetry and by ``opentelemetry-instrumentation-ollama``.

``nox -s traces`` installs both. Each call is stopped in each way; the table says what the in-memory exporter has got
once it is over.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import ollama
from opentelemetry import trace
from opentelemetry.instrumentation.ollama import OllamaInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ollama_async import AsyncClient, telemetry
from ollama_async.testing import FakeOllama, Reply, Stall

MESSAGES = [{"role": "user", "content": "hi"}]
SOON = 0.5  # seconds


async def ask(client: Any) -> None:
    await client.chat("fake", MESSAGES)


async def read(client: Any) -> None:
    async for _ in await client.chat("fake", MESSAGES, stream=True):
        pass


async def break_off(client: Any) -> None:
    stream = await client.chat("fake", MESSAGES, stream=True)
    async for _ in stream:
        break
    # The stream is kept.
    kept.append(stream)


kept: list[object] = []


async def cancelled(call: Callable[[Any], Awaitable[None]], client: Any) -> None:
    task = asyncio.ensure_future(call(client))
    await asyncio.wait([task], timeout=SOON)
    task.cancel()
    await asyncio.wait([task], timeout=SOON)


WAYS: dict[str, Callable[[Any], Awaitable[None]]] = {
    "a call without stream, cancelled": lambda client: cancelled(ask, client),
    "a stream, cancelled": lambda client: cancelled(read, client),
    "a stream, `break`, kept": break_off,
    "an answer that is complete": read,
}


async def spans(way: str, server: FakeOllama, client: Any, exporter: InMemorySpanExporter) -> str:
    server.forget()
    whole = "complete" in way
    server.script(
        "/api/chat", Reply.chat("one ", "two") if whole else Reply([*Reply.chat("one ", done=False).steps, Stall()])
    )
    exporter.clear()
    await WAYS[way](client)
    await asyncio.sleep(SOON)
    ended = [span for span in exporter.get_finished_spans() if span.attributes]
    if not ended:
        return "**no span**"
    outcomes = {str((span.attributes or {}).get("ollama_async.outcome", "")) for span in ended} - {""}
    return ", ".join([f"{len(ended)} span", *outcomes])


async def main() -> None:
    gc.disable()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with FakeOllama() as server:
        OllamaInstrumentor().instrument(tracer_provider=provider)
        theirs = {way: await spans(way, server, ollama.AsyncClient(server.url), exporter) for way in WAYS}
        telemetry.instrument(provider)
        async with AsyncClient(server.url) as client:
            ours = {way: await spans(way, server, client, exporter) for way in WAYS}
    print("| the call | opentelemetry-instrumentation-ollama | ollama_async.telemetry |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {theirs[way]} | {ours[way]} |")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
