"""How soon a Stop in another process is felt by a real Ollama server: `python benchmarks/durable_stop.py --stops 200`.

The tests' server with its tiny model and 64 slots, a Redis, a process that produces the answers, and this one, which
watches each, and stops it: until `stop()` has returned, until the server's socket is not open any more (the kernel's
table, looked at every 0.5 ms), and until the server's log says that the request is over (looked at as often).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from real.ollama_server import ANSWERS_BEFORE_UNLOAD, RealOllama, find_server
from real.redis_server import RealRedis, find_redis

from ollama_async import AsyncClient
from ollama_async.durable import DurableAnswers

LOOK = 0.0005
BOUND = 20.0


async def _produce(redis: str, ollama: str, model: str) -> None:
    """The other process: begin an answer for each line that comes."""
    options = {"num_predict": -1, "num_thread": 1}
    async with AsyncClient(ollama) as client, DurableAnswers.from_url(redis) as answers:
        while name := (await asyncio.to_thread(sys.stdin.readline)).strip():
            await answers.begin(client.chat(model, "hi", stream=True, options=options), name)
            print(name, flush=True)


async def _stop(server: RealOllama, redis: RealRedis, stops: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"stop() returned": [], "socket closed": [], "request over": []}
    producer = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--produce", redis.url, server.url, server.model,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert producer.stdin is not None
    assert producer.stdout is not None
    async with DurableAnswers.from_url(redis.url) as here:
        for number in range(stops):
            if number % ANSWERS_BEFORE_UNLOAD == 0:
                await asyncio.to_thread(server.make_ready)
            await asyncio.to_thread(server.wait_for_connections, 0, timeout=BOUND)
            mark, name = server.mark(), str(number)
            producer.stdin.write(f"{name}\n".encode())
            await producer.stdout.readline()
            async with await here.attach(name) as viewer:
                while viewer.after < 20:
                    await viewer.read()

                def look(mark: int = mark) -> tuple[float, float]:
                    """From a thread, so that it sees the socket close while stop() waits."""
                    closed, end = 0.0, time.monotonic() + BOUND
                    while not (over := server.request_ends(mark, "/api/chat")) or not closed:
                        if not closed and server.client_connections() == 0:
                            closed = time.monotonic()
                        assert time.monotonic() < end
                        time.sleep(LOOK)
                    assert over
                    return closed, time.monotonic()

                looking = asyncio.create_task(asyncio.to_thread(look))
                await asyncio.sleep(0.01)
                begun = time.monotonic()
                assert await here.stop(name) == "stopped"
                times["stop() returned"].append(time.monotonic() - begun)
                closed, over = await looking
                times["socket closed"].append(closed - begun)
                times["request over"].append(over - begun)
                events = [event async for event in viewer]
                assert events[-1].data["outcome"] == "aborted"
    producer.stdin.close()
    await producer.wait()
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--produce", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.produce:
        asyncio.run(_produce(*options.produce))
        return
    ollama, redis = find_server(), find_redis()
    if ollama is None or redis is None:
        sys.exit("this needs an Ollama server and a Redis: .ci/install-ollama, apt-get install redis-server")
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as two,
        RealOllama(ollama, Path(one)) as server,
        RealRedis(redis, Path(two)) as store,
    ):
        times = asyncio.run(_stop(server, store, options.stops))
    for name, found in times.items():
        cuts = statistics.quantiles(found, n=100)
        print(f"{name:16} p50 {cuts[49] * 1e3:6.1f} ms   p99 {cuts[98] * 1e3:6.1f} ms   of {len(found)} stops")


if __name__ == "__main__":
    main()
