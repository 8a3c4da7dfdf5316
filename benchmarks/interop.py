"""CPU that a chunk costs ollama-python's client, ``interop`` and ours: ``python benchmarks/interop.py``.

Each round reads the same answer with each client, one after the other; the figures are medians of the rounds, of the
CPU of the client's thread. The server is a process of its own. It sends the answer twice: 64 chunks in each block,
which measures what the client does with a chunk; and each chunk by itself, where the wake-up and the read cost most,
and no client can be cheaper than the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import ollama

from ollama_async import AsyncClient, interop
from ollama_async.testing import FakeOllama, Raw, Reply

MESSAGES = [{"role": "user", "content": "hi"}]


# Chunks in each block that the server sends.
BLOCKS = {"64 chunks at once": 64, "each chunk alone": 1}


def serve(chunks: int, pipe: Connection) -> None:
    lines = [json.dumps(frame).encode() + b"\n" for frame in Reply.chat(*["word "] * chunks).steps]
    # As Ollama frames them: each line is a chunk of the transfer encoding.
    framed = [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]
    with FakeOllama() as server:
        while block := pipe.recv():
            steps = [Raw(b"".join(framed[at : at + block])) for at in range(0, chunks + 1, block)]
            server.script("/api/chat", Reply(steps), always=True)
            pipe.send(server.url)


async def read(client: Any, chunks: int) -> float:
    """Read an answer; return the seconds of CPU."""
    read = 0
    began = time.thread_time()
    async for _ in await client.chat("fake", MESSAGES, stream=True):
        read += 1
    taken = time.thread_time() - began
    assert read == chunks + 1, f"{read} chunks of {chunks} were read"
    return taken


async def measure(url: str, chunks: int, rounds: int) -> dict[str, float]:
    clients: dict[str, Callable[[str], Any]] = {
        f"ollama-python {version('ollama')}": ollama.AsyncClient,
        "ollama_async.interop": interop.AsyncClient,
        "ollama_async": AsyncClient,
    }
    made = {name: make(url) for name, make in clients.items()}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name, client in made.items():
            gc.collect()
            seconds = await read(client, chunks)
            # The first round warms up.
            if turn:
                taken[name].append(seconds / chunks * 1e6)
    closing: list[Awaitable[object]] = [made[name].close() for name in made]
    await asyncio.gather(*closing)
    return {name: median(each) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(given.chunks, theirs), daemon=True)
    server.start()
    for title, block in BLOCKS.items():
        ours.send(block)
        found = asyncio.run(measure(ours.recv(), given.chunks, given.rounds))
        print(f"{title}:")
        original = next(iter(found.values()))
        for name, microseconds in found.items():
            print(f"  {name:24} {microseconds:5.1f} us a chunk, {microseconds / original:4.0%} of the original")
    ours.send(0)
    server.join(10)


if __name__ == "__main__":
    main()
