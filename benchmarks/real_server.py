"""On a real Ollama server: what reading an answer costs, and how soon a stop is felt: ``nox -s bench-real``.

The tests' server, with a tiny model of random weights that makes about a thousand tokens a second, and 64 slots (its
own loss of slots would otherwise be in the figures; see docs/stopping.md). The clients take turns. Three times are
taken from the moment of a stop: until the server's log says that the request has ended, until its runner's CPU time
stands still (looked at every 10 ms, the kernel's own grain), and until the next answer's first token has come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness import cpu_seconds
from real.ollama_server import RealOllama, find_server

ENDLESS = {"num_predict": -1, "num_thread": 1}
MESSAGES = [{"role": "user", "content": "hi"}]
GRAIN = 1 / os.sysconf("SC_CLK_TCK")

Figures = dict[str, list[float]]


# -- reading --


async def read_ours(server: RealOllama, tokens: int) -> int:
    from ollama_async import AsyncClient

    count = 0
    async with AsyncClient(server.url) as client:
        options = {**ENDLESS, "num_predict": tokens}
        async for _ in client.chat(server.model, MESSAGES, stream=True, options=options):
            count += 1
    return count


async def read_ollama_python(server: RealOllama, tokens: int) -> int:
    import ollama

    count = 0
    client = ollama.AsyncClient(server.url)
    options = {**ENDLESS, "num_predict": tokens}
    async for _ in await client.chat(server.model, MESSAGES, stream=True, options=options):
        count += 1
    await client.close()
    return count


READERS: dict[str, Callable[[RealOllama, int], Awaitable[int]]] = {
    "ollama_async": read_ours,
    "ollama-python": read_ollama_python,
}


async def reading(server: RealOllama, rounds: int, tokens: int) -> dict[str, Figures]:
    seen: dict[str, Figures] = {name: {"tokens_per_second": [], "cpu_us_per_token": []} for name in READERS}
    for turn in range(rounds + 1):
        for name, read in READERS.items():
            cpu, begun = cpu_seconds(), time.monotonic()
            count = await read(server, tokens)
            wall = time.monotonic() - begun
            if turn:  # the first one imports
                seen[name]["tokens_per_second"].append(count / wall)
                seen[name]["cpu_us_per_token"].append((cpu_seconds() - cpu) / count * 1e6)
    return seen


# -- stopping: each opens an endless answer, reads some of it, and returns what stops it --


async def stop_ours(server: RealOllama) -> tuple[Callable[[], object], Callable[[], Awaitable[None]]]:
    from ollama_async import AbortError, AsyncClient, CancelToken

    client, token = AsyncClient(server.url), CancelToken()
    stream = client.chat(server.model, MESSAGES, stream=True, options=ENDLESS, token=token)
    for _ in range(20):
        await anext(stream)
    task = asyncio.create_task(stream.collect())
    await asyncio.sleep(0.02)

    async def clean_up() -> None:
        with contextlib.suppress(AbortError):
            await task
        await client.aclose()

    return token.abort, clean_up


async def stop_ollama_python(server: RealOllama) -> tuple[Callable[[], object], Callable[[], Awaitable[None]]]:
    import ollama

    client = ollama.AsyncClient(server.url)
    some = asyncio.Event()

    async def read() -> None:
        count = 0
        async for _ in await client.chat(server.model, MESSAGES, stream=True, options=ENDLESS):
            count += 1
            if count == 20:
                some.set()

    task = asyncio.create_task(read())
    await some.wait()
    await asyncio.sleep(0.02)

    async def clean_up() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.close()

    return task.cancel, clean_up


async def stop_curl(server: RealOllama) -> tuple[Callable[[], object], Callable[[], Awaitable[None]]]:
    body = json.dumps({"model": server.model, "messages": MESSAGES, "options": ENDLESS})
    command = ["curl", "-sN", "-d", body, f"{server.url}/api/chat"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(20):
        await process.stdout.readline()
    # It must not be stuck in a full pipe when it is killed.
    rest = asyncio.create_task(process.stdout.read())
    await asyncio.sleep(0.02)

    async def clean_up() -> None:
        await rest
        await process.wait()

    return lambda: process.send_signal(signal.SIGKILL), clean_up


STOPS = {"ollama_async, abort": stop_ours, "ollama-python, task.cancel": stop_ollama_python, "curl, killed": stop_curl}


def watch(server: RealOllama, mark: int, begun: float) -> tuple[float, float]:
    """Wait for the log's line and for a runner at rest; milliseconds from the stop. Runs in a thread."""
    while not server.request_ends(mark, "/api/chat"):
        time.sleep(0.0002)
    logged = time.monotonic() - begun
    cpu, changed = server.runner_cpu_seconds(), time.monotonic()
    while time.monotonic() - changed < 0.15:
        time.sleep(GRAIN)
        now = server.runner_cpu_seconds()
        if now != cpu:
            cpu, changed = now, time.monotonic()
    return logged * 1e3, (changed - begun) * 1e3


async def stopping(server: RealOllama, rounds: int) -> dict[str, Figures]:
    names = ("log_line_ms", "runner_at_rest_ms", "next_first_token_ms")
    seen: dict[str, Figures] = {who: {name: [] for name in names} for who in ("an idle server", *STOPS)}
    for _ in range(rounds):
        seen["an idle server"]["next_first_token_ms"].append(await first_token(server))
        for who, start in STOPS.items():
            server.make_ready()
            mark = server.mark()
            stop, clean_up = await start(server)
            begun = time.monotonic()
            watching = asyncio.get_running_loop().run_in_executor(None, watch, server, mark, begun)
            stop()
            await clean_up()
            logged, rested = await watching
            seen[who]["log_line_ms"].append(logged)
            seen[who]["runner_at_rest_ms"].append(rested)
            # Once more, for what the next one feels.
            stop, clean_up = await start(server)
            stop()
            await clean_up()
            seen[who]["next_first_token_ms"].append(await first_token(server))
    return seen


async def first_token(server: RealOllama) -> float:
    from ollama_async import AsyncClient

    async with AsyncClient(server.url) as client:
        stream = client.chat(server.model, MESSAGES, stream=True, options={"num_predict": 1, "num_thread": 1})
        await stream.collect()
        first = stream.timing.first_chunk
    assert first is not None
    return first * 1e3


def table(title: str, seen: dict[str, Figures]) -> str:
    figures = list(next(iter(seen.values())))
    lines = [f"**{title}**", "", "| client | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for name, values in seen.items():
        cells = [
            f"{statistics.median(values[figure]):,.1f} ({min(values[figure]):,.1f}-{max(values[figure]):,.1f})"
            if values[figure]
            else ""
            for figure in figures
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1000)
    given = parser.parse_args()
    binary = find_server()
    if binary is None:
        raise SystemExit("no Ollama server: run .ci/install-ollama, or set OLLAMA_ASYNC_TEST_SERVER")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, RealOllama(binary, Path(folder)) as server:
        results["reading"] = asyncio.run(reading(server, given.rounds, given.tokens))
        results["stopping"] = asyncio.run(stopping(server, given.rounds))
    print(f"`nox -s bench-real -- --rounds {given.rounds}`: medians, with the least and the most in brackets.\n")
    print(table("Reading an answer", results["reading"]))
    print(table("From a stop on", results["stopping"]))


if __name__ == "__main__":
    main()
