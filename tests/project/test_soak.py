"""Many streams that are stopped in every way at random moments, 200 at a time: at the end nothing is left of them.

``nox -s soak`` makes it 10,000, a tenth of them on a real Ollama server, and prints the figures. Garbage is not
collected meanwhile: whatever only the collector would free is left.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from real.ollama_server import RealOllama, established
from teardown.harness import nothing_left_behind, registrations, ticks, until

from ollama_async import AbortError, AsyncClient, CancelToken, Stream, StreamClosed, Timeouts

STREAMS = int(os.environ.get("OLLAMA_ASYNC_SOAK", "1000"))
AT_ONCE = 200
SAMPLES = 20
# Bytes a stream. Each transport of asyncio's is a circle by itself, which takes some 600 bytes until it is collected;
# those of uvloop are none. What else is left of a stream would be more than this.
MOST_GROWTH = 2048.0
PATIENCE = 60.0

LOAD_SERVER = Path(__file__).parents[2] / "benchmarks" / "load_server.py"
EXPECTED = (AbortError, StreamClosed, TimeoutError, type(None))
ENDLESS = {"num_predict": -1, "num_thread": 1}
MODELS = ("mute", "silent", "paced-100000-200", "burst-300", "burst-5", "paced-5-500")
WAYS = (
    "token", "stream", "thread", "cancel", "cancel_twice", "aclose", "break", "asyncio_timeout", "total", "drop", "end",
)  # fmt: skip


@dataclass
class Soak:
    """A run of many streams, and what came of them."""

    client: AsyncClient
    models: tuple[str, ...]
    chance: random.Random
    token: CancelToken = field(default_factory=CancelToken)
    outcomes: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    left: int = 0

    async def run(self, streams: int) -> None:
        self.left = streams
        every = max(1, streams // SAMPLES)

        async def worker() -> None:
            while self.left > 0:
                self.left -= 1
                if self.left % every == 0:
                    self.memory.append(resident())
                await self.one()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, streams)):
                group.create_task(worker())

    async def moment(self) -> None:
        """Wait for a random moment: some rounds of the loop, or some time."""
        if self.chance.random() < 0.5:
            await ticks(self.chance.randrange(60))
        else:
            await asyncio.sleep(self.chance.random() * 0.05)

    async def one(self) -> None:
        way, model = self.chance.choice(WAYS), self.chance.choice(self.models)
        endless = model in ("mute", "silent", "paced-100000-200", "tiny")
        if way == "end" and endless:
            way = "token"
        limit = 0.001 + self.chance.random() * 0.05
        stopper = self.token.child()
        stream = self.client.chat(
            model,
            "hi",
            stream=True,
            token=stopper,
            options=ENDLESS,
            timeout=Timeouts(total=limit if way == "total" else PATIENCE),
        )
        reader = asyncio.create_task(read(stream, way, limit))
        if way in ACTIONS:
            await self.moment()
            ACTIONS[way](stopper, stream, reader)
        elif way == "aclose":
            await self.moment()
            await stream.aclose()
        elif way in ("break", "drop"):
            # Where no chunk ever comes there is nothing to leave in the middle of.
            await asyncio.wait([reader], timeout=0.05)
            stream.abort()
        # To raise the reader's error here would make a circle of it, its traceback, this frame and the reader.
        await asyncio.wait([reader], timeout=PATIENCE)
        assert reader.cancelled() or isinstance(reader.exception(), EXPECTED)
        self.outcomes[stream.outcome or "not begun"] += 1


async def read(stream: Stream[Any], way: str, limit: float) -> None:
    if way == "asyncio_timeout":
        # Caught here: asyncio makes a circle of such an error and its task.
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await stream.collect()
    elif way == "drop":
        # The loop's iterator is lost with its frame, and nobody closes anything.
        loop = aiter(stream)
        await anext(loop)
    else:
        async for _ in stream:
            if way == "break":
                break


def cancel_twice(reader: asyncio.Task[None]) -> None:
    reader.cancel()
    asyncio.get_running_loop().call_soon(reader.cancel)


ACTIONS: dict[str, Callable[[CancelToken, Stream[Any], asyncio.Task[None]], object]] = {
    "token": lambda token, stream, reader: token.abort("stop"),
    "stream": lambda token, stream, reader: stream.abort("stop"),
    "thread": lambda token, stream, reader: threading.Thread(target=token.abort, args=("stop",)).start(),
    "cancel": lambda token, stream, reader: reader.cancel(),
    "cancel_twice": lambda token, stream, reader: cancel_twice(reader),
}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(memory: list[int], streams: int) -> float:
    """Bytes a stream: the slope of the line through the second half of the samples, by least squares."""
    half = memory[len(memory) // 2 :]
    middle, mean = (len(half) - 1) / 2, sum(half) / len(half)
    slope = sum((at - middle) * (value - mean) for at, value in enumerate(half))
    return slope / sum((at - middle) ** 2 for at in range(len(half))) / (streams / SAMPLES)


async def soak(url: str, models: tuple[str, ...], streams: int, *, seed: int = 1) -> Soak:
    """Run it, and see to it that nothing is left."""
    async with nothing_left_behind(limit=5.0):
        async with AsyncClient(url) as client:
            run = Soak(client, models, chance=random.Random(seed))
            await run.run(streams)
            assert sum(run.outcomes.values()) == streams
            assert registrations(run.token) == 0
            assert (await client.chat(*NEXT[models], options={"num_predict": 1})).done
            # Those that may be used again are kept for 4 seconds. What was stopped is not among them.
            port, begun = int(url.rpartition(":")[2]), time.monotonic()
            while established(port) and models == MODELS:
                assert time.monotonic() - begun < PATIENCE, f"{established(port)} connections were left open"
                await asyncio.sleep(0.05)
        await until(lambda: established(port) == 0, "every connection closed")
    return run


NEXT = {MODELS: ("short", "hi"), ("tiny",): ("tiny", "hi")}


@pytest.fixture
def load_server() -> Iterator[str]:
    with subprocess.Popen([sys.executable, LOAD_SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.kill()


def tell(outcomes: Counter[str], server: str, begun: float) -> None:
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    ends = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"soak: {outcomes.total()} streams of {server}, {loop}, {time.monotonic() - begun:.1f} s: {ends}")


async def test_many_streams_leave_nothing(load_server: str) -> None:
    begun = time.monotonic()
    run = await soak(load_server, MODELS, STREAMS)
    tell(run.outcomes, "the load server", begun)
    slope = growth(run.memory, STREAMS)
    first, last = run.memory[0] / 2**20, run.memory[-1] / 2**20
    print(
        f"soak: memory {first:.1f} MiB at first, {last:.1f} MiB at last; {slope:+.0f} bytes a stream in the second half"
    )
    if STREAMS >= 10000:
        assert slope < MOST_GROWTH


@pytest.mark.real
async def test_many_streams_of_a_real_server_leave_nothing(real_ollama: RealOllama) -> None:
    begun = time.monotonic()
    outcomes: Counter[str] = Counter()
    # The server loses slots when it is left, and gets them back when its model is unloaded: so not all in one run.
    for number in range(max(1, STREAMS // 1000)):
        outcomes += (await soak(real_ollama.url, ("tiny",), 100, seed=number)).outcomes
        await asyncio.to_thread(real_ollama.unload)
        await asyncio.to_thread(real_ollama.generate, 1, timeout=PATIENCE)
    tell(outcomes, "Ollama", begun)
