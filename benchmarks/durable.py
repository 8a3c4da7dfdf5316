"""What durable answers cost: in the producer, in Redis, in a process that watches, and how long a token takes there.

    python benchmarks/durable.py --answers 100 --rate 100 --seconds 4
    python benchmarks/durable.py --answers 1000 --rate 2 --seconds 5      # many answers, followed by one process
    python benchmarks/durable.py --with assistant-stream --answers 10     # by another library, with a load for it
    python benchmarks/durable.py --weigh                                  # what an answer takes in Redis
    python benchmarks/durable.py --left 1000                              # what so many answers leave behind

It starts a Redis, and a second process that watches every answer; the tokens begin when that one is ready. The
producer's tokens come from a generator in its own process. What that costs by itself is measured in a third process,
which makes and reads the same tokens at the same time, so that both have the same machine, and is taken off. The first
round is not counted: it is for what is done once in each of these processes.

CPU is that of the process. It depends less than the times on what else runs, but on it, too: on how long a process
keeps its core and its cache. Each token is the time at which it was made, so a viewer knows how old it is. A round that
takes longer than `--longest` is given up, and the program says how far it came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import redis

from ollama_async import AsyncClient, CancelToken, ChatResponse
from ollama_async._model.merge import validators
from ollama_async.durable import DurableAnswers
from ollama_async.testing import FakeOllama, Reply

ROUNDS = 5
# As a stream makes them.
_chunk_of = validators(ChatResponse).one


class Clock:
    """When tokens come: one timer for all loads of a process, which come a millisecond apart from each other."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._loads: list[Load] = []

    def load(self, count: int) -> Load:
        load = Load(self._rate, count)
        self._loads.append(load)
        return load

    async def run(self) -> None:
        """Give each load its tokens."""
        period = 1 / self._rate
        turns = max(1, min(len(self._loads), int(period * 1000)))
        loop = asyncio.get_running_loop()
        begun, turn = loop.time(), 0
        while any(load.left for load in self._loads):
            await asyncio.sleep(max(0.0, begun + turn * period / turns - loop.time()))
            for load in self._loads[turn % turns :: turns]:
                load.give()
            turn += 1


class Load:
    """In place of a model's stream: so many chunks, each when the clock gives it."""

    def __init__(self, rate: float, count: int) -> None:
        self.left = count
        self.read = 0
        self._given: list[float] = []
        self._waiting: asyncio.Future[None] | None = None
        self._token = CancelToken()
        self.outcome: str | None = None
        self.reason = self.response = None
        self.text = ""
        self.timing = SimpleNamespace(first_chunk=None, total=0.0, chunks=count, chunks_per_second=rate)

    def give(self) -> None:
        if self.left:
            self.left -= 1
            self._given.append(time.time())
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(None)

    def end(self) -> None:
        """Give no more."""
        self.left = 0
        self._given.clear()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def abort(self, reason: object = None) -> bool:
        return self._token.abort(reason)

    async def aclose(self) -> None:
        self.abort()

    async def __aiter__(self) -> AsyncIterator[ChatResponse]:
        while self.left or self._given:
            if not self._given:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            given, self._given = self._given, []
            for made in given:
                self.read += 1
                yield _chunk_of(_CHUNK % made)
        self.outcome = "done"


_CHUNK = b'{"model":"load","created_at":"x","message":{"role":"assistant","content":"%.6f "},"done":false}'
_MADE = b'"content":"'


# -- the libraries --


class Ours:
    """Durable answers."""

    def __init__(self, url: str) -> None:
        self.answers = DurableAnswers.from_url(url, keep=60)
        self._made: list[Any] = []

    async def begin(self, name: str, load: Load) -> None:
        self._made.append(await self.answers.begin(load, name))  # type: ignore[arg-type]

    async def all_ended(self) -> None:
        for answer in self._made:
            await answer.wait()
        await self.answers._carrier.drain()  # noqa: SLF001

    async def view(self, name: str, ready: Any) -> AsyncIterator[tuple[int, list[float]]]:
        async with await self.answers.attach(name) as viewer:
            ready()
            while found := await viewer.read():
                chunks = [each.json for each in found if each.name == "chunk"]
                yield len(found), [float(chunk.partition(_MADE)[2][:17]) for chunk in chunks]

    async def aclose(self) -> None:
        await self.answers.aclose()

    @staticmethod
    def key(name: str) -> str:
        return f"{{ollama-async}}:log::{name}"


class AssistantStream:
    """The nearest thing that others have: `pip install "assistant-stream[redis]"`."""

    def __init__(self, url: str) -> None:
        import redis.asyncio

        resumable: Any = importlib.import_module("assistant_stream.resumable")

        self._redis = redis.asyncio.Redis.from_url(url, max_connections=10_000)
        # It keeps no answer's task where others find it.
        self._tasks: list[asyncio.Task[None]] = []
        self._context = resumable.create_resumable_stream_context(
            store=resumable.create_redis_resumable_stream_store(self._redis), wait_until=self._tasks.append
        )

    async def begin(self, name: str, load: Load) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in load:
                yield (chunk.message.content or "").encode()

        await self._context.run(name, chunks)

    async def all_ended(self) -> None:
        # Not gather(): if that is cancelled, it waits for tasks that have lost their cancellation to redis-py.
        await asyncio.wait(self._tasks)

    async def view(self, name: str, ready: Any) -> AsyncIterator[tuple[int, list[float]]]:
        found = await self._context.resume(name)
        ready()
        async for chunk in found:
            yield 1, [float(chunk)]

    async def aclose(self) -> None:
        await self._redis.aclose()

    @staticmethod
    def key(name: str) -> str:
        return f"aui:resumable:{{{name}}}:data"


LIBRARIES: dict[str, Any] = {"ours": Ours, "assistant-stream": AssistantStream}


async def _watch(url: str, options: argparse.Namespace) -> None:
    """The second process: watch all, and say what it saw."""
    ages: list[float] = []
    events, waiting = 0, options.answers * options.viewers
    begun = 0.0

    def ready() -> None:
        nonlocal waiting, begun
        waiting -= 1
        if not waiting:
            print("ready", flush=True)
            begun = time.process_time()

    async def view(number: int) -> None:
        nonlocal events
        async for count, made in there.view(str(number), ready):
            now = time.time()
            events += count
            ages.extend(now - when for when in made)

    there = LIBRARIES[options.library](url)
    await asyncio.gather(*(view(number) for number in range(options.answers) for _ in range(options.viewers)))
    used = time.process_time() - begun
    await there.aclose()
    ages.sort()
    middle, late = ages[len(ages) // 2], ages[len(ages) * 99 // 100]
    print(json.dumps({"events": events, "us": used / events * 1e6, "p50": middle, "p99": late}))


@contextlib.contextmanager
def redis_server() -> Iterator[redis.Redis]:
    binary = shutil.which("redis-server") or sys.exit("redis-server is missing: sudo apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--save", "", "--dir", folder]
        server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port, retry_on_error=[redis.ConnectionError])
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.05)
            yield client
        finally:
            server.kill()
            server.wait()


def _cpu(client: redis.Redis) -> float:
    info: Any = client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


async def _alone(options: argparse.Namespace) -> None:
    """The third process: for each line that comes, say the CPU time of the load by itself, read as a producer does."""

    async def read(load: Load) -> None:
        async for _ in load:
            pass

    count = int(options.rate * options.seconds)
    while True:
        clock = Clock(options.rate)
        tasks = [asyncio.create_task(read(clock.load(count))) for _ in range(options.answers)]
        await asyncio.sleep(0)
        gc.collect()
        print("ready", flush=True)
        if not sys.stdin.readline():
            return
        begun = time.process_time()
        await clock.run()
        await asyncio.gather(*tasks)
        print(time.process_time() - begun, flush=True)


@contextlib.asynccontextmanager
async def _beside(options: argparse.Namespace, *what: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run this program once more, as another part of it, until that has said that it is ready."""
    given = [f"--{name}={getattr(options, name)}" for name in ("answers", "rate", "seconds", "viewers")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *what, *given, f"--with={options.library}",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await _line(process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline() or sys.exit("a process beside this one failed")


def _connections(client: redis.Redis) -> int:
    return len(client.client_list()) - 1


class Figures:
    """Of each round."""

    def __init__(self) -> None:
        self.added: list[float] = []
        self.load: list[float] = []
        self.redis: list[float] = []
        self.took: list[float] = []
        self.seen: dict[str, list[float]] = {}
        self.connections = 0
        self.held = 0


async def _round(
    client: redis.Redis, options: argparse.Namespace, third: asyncio.subprocess.Process, figures: Figures
) -> None:
    url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
    count = int(options.rate * options.seconds)
    client.flushall()
    here, clock = LIBRARIES[options.library](url), Clock(options.rate)
    loads = [clock.load(count) for _ in range(options.answers)]
    for number, load in enumerate(loads):
        await here.begin(str(number), load)
    own = _connections(client)
    async with _beside(options, "--watch", url) as watching:
        gc.collect()
        before, begun, since = _cpu(client), time.process_time(), time.monotonic()
        assert third.stdin is not None
        third.stdin.write(b"\n")
        running = asyncio.create_task(clock.run())
        try:
            async with asyncio.timeout(options.longest):
                await asyncio.sleep(options.seconds / 2)
                at = time.process_time()
                figures.connections = _connections(client) - own
                begun += time.process_time() - at
                await running
                await here.all_ended()
                took, used = time.monotonic() - since, time.process_time() - begun
                load_used, seen = float(await _line(third)), json.loads(await _line(watching))
        except TimeoutError:
            used, spent = time.process_time() - begun, _cpu(client) - before
            read, all_of_them = sum(load.read for load in loads), count * options.answers
            for load in loads:
                load.end()
            sys.exit(
                f"{options.library}: {options.answers} answers of {options.rate:g} tokens/s for {options.seconds:g} s "
                f"were not over after {options.longest:g} s\n"
                f"{read} of {all_of_them} tokens were produced, with {used / max(1, read) * 1e6:.1f} us CPU a token in "
                f"the producer, which used {used / options.longest:.0%} of a core, and Redis "
                f"{spent / options.longest:.0%}\n"
                f"the load average of this machine was {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            )
        figures.took.append(took)
        figures.load.append(load_used)
        figures.added.append(used - load_used)
        for name, figure in seen.items():
            figures.seen.setdefault(name, []).append(figure)
        figures.redis.append(_cpu(client) - before)
        figures.held = int(client.memory_usage(here.key("0"), samples=0) or 0)
    await here.aclose()


async def _produce(client: redis.Redis, options: argparse.Namespace) -> None:
    count = int(options.rate * options.seconds)
    tokens = count * options.answers
    async with _beside(options, "--alone") as third:
        await _round(client, options, third, Figures())
        figures = Figures()
        for _ in range(ROUNDS):
            await _line(third)
            await _round(client, options, third, figures)

    def middle(figures: list[float], scale: float) -> str:
        low, between, high = (f"{of(figures) * scale:.1f}" for of in (min, statistics.median, max))
        return f"{between:>6} ({low} to {high})"

    seen, besides = figures.seen, middle(figures.load, 1e6 / tokens)
    print(
        f"{options.library}: {options.answers} answers of {options.rate:g} tokens/s for {options.seconds:g} s, "
        f"{options.viewers} viewers each; median of {ROUNDS} (least to most)"
    )
    print(f"producer    {middle(figures.added, 1e6 / tokens)} us CPU a token, besides {besides} of the load")
    print(
        f"Redis       {middle(figures.redis, 1e6 / tokens)} us CPU a token; "
        f"{figures.held / count:.1f} KB for 1,000 tokens"
    )
    print(f"viewers     {middle(seen['us'], 1)} us CPU an event, {seen['events'][-1]} events")
    print(f"token there {middle(seen['p50'], 1e3)} ms p50, {middle(seen['p99'], 1e3)} ms p99")
    print(f"the answers {middle(figures.took, 1)} s; the process that watches had {figures.connections} connections")
    print(f"other programs: the load average of this machine was {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


async def _leave(client: redis.Redis, options: argparse.Namespace) -> None:
    """Say what so many answers leave behind, in this process and in Redis, once they are kept no more."""
    url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
    async with DurableAnswers.from_url(url, keep=5, lease=6) as here, DurableAnswers.from_url(url, lease=6) as there:

        async def answer(number: int) -> None:
            clock = Clock(1000)
            made = await here.begin(clock.load(20), f"{number}")  # type: ignore[arg-type]
            async with await there.attach(f"{number}") as viewer:
                await clock.run()
                async for _ in viewer:
                    pass
            await made.wait()

        async def all_of_them(first: int, last: int) -> tuple[int, ...]:
            for start in range(first, last, 50):
                await asyncio.gather(*(answer(number) for number in range(start, min(start + 50, last))))
            await here._carrier.drain()  # noqa: SLF001
            while client.keys("*:log:*") or client.keys("*:of:*"):
                await asyncio.sleep(0.1)
            gc.collect()
            tasks, sockets = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
            used: Any = client.info("memory")
            memory = used["used_memory"], tracemalloc.get_traced_memory()[0]
            return len(client.keys()), tasks, sockets, _connections(client), *memory

        tracemalloc.start()
        # What is made once is there after the first ones; pydantic keeps the last 16,384 texts, so it takes that many.
        before = await all_of_them(0, options.left)
        after = await all_of_them(options.left, 2 * options.left)
    names = ("keys", "tasks", "descriptors", "connections", "bytes in Redis", "bytes here")
    print(f"after {options.left} answers of 20 tokens, each watched in another process's place, and after their time:")
    for name, was, became in zip(names, before, after, strict=True):
        print(f"{name:15} {became:>9} ({became - was:+})")


async def _weigh(client: redis.Redis) -> None:
    """Say what an answer of 1,000 tokens takes in Redis: of a whole client, with all that its end has."""
    url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
    with FakeOllama() as fake:
        fake.script("/api/chat", Reply.chat(*[" word", " of", "y"] * 333, " end", interval=0.01))
        async with AsyncClient(fake.url) as model, DurableAnswers.from_url(url) as here:
            answer = await here.begin(model.chat("fake", "hi", stream=True), "0")
            await answer.wait()
            await here._carrier.drain()  # noqa: SLF001
            held: Any = client.memory_usage(Ours.key("0"), samples=0)
            entries: Any = client.xrange(Ours.key("0"))
            first, last = entries[0][1][b"e"], entries[-1][1][b"e"].split(b"\n")[-1]
            async with await here.attach("0", after=1) as viewer:
                text = [event async for event in viewer][-1].data["text"]
    print(f"1,000 tokens, {len(text)} characters, at 100 tokens/s: {held / 1000:.1f} KB in {len(entries)} entries")
    print(f"of that, {len(last)} B are the end, and {len(first)} B the beginning")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0, help="tokens a second, of each answer")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--viewers", type=int, default=1, help="of each answer")
    parser.add_argument("--with", dest="library", choices=LIBRARIES, default="ours")
    parser.add_argument("--left", type=int, help="how many answers, to see what they leave behind")
    parser.add_argument("--weigh", action="store_true", help="what one answer takes in Redis")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds that a round may take")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if options.watch:
        asyncio.run(_watch(options.watch, options))
        return
    if options.alone:
        asyncio.run(_alone(options))
        return
    with redis_server() as client:
        if options.weigh:
            asyncio.run(_weigh(client))
        else:
            asyncio.run(_leave(client, options) if options.left else _produce(client, options))


if __name__ == "__main__":
    main()
