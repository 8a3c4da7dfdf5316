"""What durable answers cost: in the producer, in Redis, in a process that watches, and how long a token takes there.

    python benchmarks/durable.py --answers 100 --rate 100 --seconds 4

It starts a Redis, and a second process that watches every answer. The producer's tokens come from a generator in its
own process; what that costs by itself is measured first, and taken off. Each token is the time at which it was made,
so a viewer knows how old it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import redis

from ollama_async import CancelToken, ChatResponse
from ollama_async.durable import DurableAnswers


class Load:
    """In place of a model's stream: so many chunks, at a rate."""

    def __init__(self, rate: float, count: int) -> None:
        self._rate, self._count = rate, count
        self._token = CancelToken()
        self.outcome: str | None = None
        self.reason = self.response = None
        self.text = ""
        self.timing = SimpleNamespace(first_chunk=None, total=0.0, chunks=count, chunks_per_second=rate)

    def abort(self, reason: object = None) -> bool:
        return self._token.abort(reason)

    async def aclose(self) -> None:
        self.abort()

    async def __aiter__(self) -> AsyncIterator[ChatResponse]:
        due = time.monotonic()
        for _ in range(self._count):
            due += 1 / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            content = f"{time.time():.6f} "
            message = {"role": "assistant", "content": content}
            chunk = {"model": "load", "created_at": "x", "message": message, "done": False}
            yield ChatResponse.model_validate_json(json.dumps(chunk))
        self.outcome = "done"


async def _idle(load: Load) -> None:
    async for _ in load:
        pass


async def _watch(url: str, answers: int, viewers: int) -> None:
    """The second process: watch all, and say what it saw."""
    ages: list[float] = []
    events = 0

    async def view(number: int) -> None:
        nonlocal events
        async with await there.attach(str(number)) as viewer:
            since = time.time()
            while found := await viewer.read():
                now = time.time()
                events += len(found)
                made = [float(each.data["message"]["content"]) for each in found[:1] if each.name == "chunk"]
                # What was there before says nothing.
                ages.extend(now - when for when in made if when > since)

    async with DurableAnswers.from_url(url) as there:
        begun = time.process_time()
        await asyncio.gather(*(view(number) for number in range(answers) for _ in range(viewers)))
        used = time.process_time() - begun
    if not ages:
        sys.exit("all was over before anybody watched: give more --seconds")
    ages.sort()
    found = {
        "events": events,
        "us": used / events * 1e6,
        "p50": ages[len(ages) // 2],
        "p99": ages[len(ages) * 99 // 100],
    }
    print(json.dumps(found))


@contextlib.contextmanager
def _redis() -> Iterator[redis.Redis]:
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


async def _produce(client: redis.Redis, options: argparse.Namespace) -> None:
    url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
    count = int(options.rate * options.seconds)
    tokens = count * options.answers
    begun = time.process_time()
    await asyncio.gather(*(_idle(Load(options.rate, count)) for _ in range(options.answers)))
    alone = time.process_time() - begun
    async with DurableAnswers.from_url(url) as here:
        # What a process does once is not counted.
        await (await here.begin(Load(1000, 1), "first")).wait()  # type: ignore[arg-type]
        before, begun = _cpu(client), time.process_time()
        made = [
            await here.begin(Load(options.rate, count), str(number))  # type: ignore[arg-type]
            for number in range(options.answers)
        ]
        watching = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--watch", url, "--answers", str(options.answers), "--viewers",
            str(options.viewers), stdout=subprocess.PIPE,
        )  # fmt: skip
        for answer in made:
            await answer.wait()
        used = time.process_time() - begun - alone
        seen = json.loads((await watching.communicate())[0])
        spent = _cpu(client) - before
        held: Any = client.memory_usage("{ollama-async}:log::0", samples=0)
    print(
        f"{options.answers} answers of {options.rate:g} tokens/s for {options.seconds:g} s, "
        f"{options.viewers} viewers each"
    )
    print(f"producer    {used / tokens * 1e6:6.1f} us CPU a token, besides {alone / tokens * 1e6:.1f} us of the load")
    print(f"Redis       {spent / tokens * 1e6:6.1f} us CPU a token, {held / count:.1f} KB for 1,000 tokens")
    print(f"viewers     {seen['us']:6.1f} us CPU an event, {seen['events']} events")
    print(f"token there {seen['p50'] * 1e3:6.1f} ms p50, {seen['p99'] * 1e3:.1f} ms p99")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0, help="tokens a second, of each answer")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--viewers", type=int, default=1, help="of each answer")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        asyncio.run(_watch(options.watch, options.answers, options.viewers))
        return
    with _redis() as client:
        asyncio.run(_produce(client, options))


if __name__ == "__main__":
    main()
