"""Reads streams and prints what that took: counted, not timed. Run by test_costs.py: URL, what, chunks a stream."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import sys
import tracemalloc
from collections import Counter
from typing import Any

from ollama_async import AbortError, AsyncClient, CancelToken

# What makes spans and metrics of calls.
WATCHING = re.compile(r"opentelemetry|ollama_async.telemetry\.py$|observe\.py$")


async def read(client: AsyncClient, chunks: int, token: CancelToken, *, slowly: bool = False) -> int:
    count = 0
    async for _ in client.chat("fake", "hi", stream=True, token=token, options={"num_predict": chunks}):
        count += 1
        if slowly:
            await asyncio.sleep(0)
    return count


async def calls(url: str, chunks: int) -> dict[str, int]:
    """Python functions called by the whole loop while a stream is read, by name."""
    counted: Counter[str] = Counter()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            counted["calls"] += 1
            if frame.f_code.co_name in ("_run_once", "call_at"):
                counted[frame.f_code.co_name] += 1
            counted["watching"] += WATCHING.search(frame.f_code.co_filename) is not None

    async with AsyncClient(url) as client:
        await read(client, 1, CancelToken())
        gc.disable()
        sys.setprofile(note)
        counted["chunks"] = await read(client, chunks, CancelToken())
        sys.setprofile(None)
    return dict(counted)


async def watched(url: str, chunks: int) -> dict[str, int]:
    """The same, of a stream with a span and metrics."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

    from ollama_async import telemetry

    telemetry.instrument(TracerProvider(), MeterProvider())
    return await calls(url, chunks)


async def idle(url: str, streams: int) -> dict[str, float]:
    """What that many streams hold that wait for their second chunk."""
    token = CancelToken()
    async with AsyncClient(url) as client:
        warm = client.chat("fake", "hi", stream=True, token=token)
        await anext(warm)
        await warm.aclose()
        gc.collect()
        objects = len(gc.get_objects())
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        held = [client.chat("fake", "hi", stream=True, token=token) for _ in range(streams)]
        for stream in held:
            await anext(stream)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        grown = len(gc.get_objects()) - objects
        token.abort()
        await asyncio.sleep(0.1)
    return {"objects": grown / streams, "bytes": size / streams}


async def slow(url: str, chunks: int) -> dict[str, int]:
    """The most that a stream holds whose reader lets the loop go round at each chunk."""
    async with AsyncClient(url) as client:
        await read(client, 1, CancelToken())
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        seen = await read(client, chunks, CancelToken(), slowly=True)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
    assert seen == chunks
    return {"peak": peak}


async def plain(url: str, chunks: int) -> dict[str, Any]:
    async with AsyncClient(url) as client:
        count = await read(client, chunks, CancelToken())
    return {"chunks": count, "packages": sorted({name.partition(".")[0] for name in sys.modules})}


async def aborted(url: str, streams: int) -> dict[str, int]:
    """Streams that are aborted after their first chunk, by the task that reads them."""
    async with AsyncClient(url) as client:
        for _ in range(streams):
            stream = client.chat("fake", "hi", stream=True)
            await anext(stream)
            stream.abort()
            with contextlib.suppress(AbortError):
                await anext(stream)
    return {"aborted": streams}


if __name__ == "__main__":
    ways = {"calls": calls, "watched": watched, "idle": idle, "slow": slow, "plain": plain, "aborted": aborted}
    print(json.dumps(asyncio.run(ways[sys.argv[2]](sys.argv[1], int(sys.argv[3])))))
