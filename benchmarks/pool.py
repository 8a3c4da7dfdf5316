"""How long many calls take over hosts of different speed, by the way in which a host is chosen.

``python benchmarks/pool.py [--calls 500] [--at-once 20] [--scale 1.0]``: three hosts of 4 x 250, 4 x 125 and 2 x 50
tokens a second; then two models on three hosts of 4 x 250 that hold one each; then three of these, of which one hangs
after 30 calls. Each way runs by itself. LiteLLM's router takes part where it is installed: ``pip install litellm
httptools`` in an environment of its own, with this one's path in ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ollama_async import AsyncClient, Host, OllamaError, Pool, Timeouts

HOSTS = [(4, 250.0), (4, 125.0), (2, 50.0)]
LOAD_SECONDS = 2.0


@dataclass
class Server:
    """A server with slots, a speed, one loaded model, and perhaps a hang after some calls."""

    slots: int
    speed: float
    one_model: bool = False
    hangs_after: int | None = None
    url: str = ""
    calls: int = 0
    answered: int = 0
    loads: int = 0
    loaded: str = ""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self) -> asyncio.Server:
        self.free = asyncio.Semaphore(self.slots)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                fields = head.lower().split(b"content-length: ")
                body = await reader.readexactly(int(fields[1].split(b"\r\n")[0])) if len(fields) > 1 else b"{}"
                await self._answer(path, json.loads(body or b"{}"), writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        if path != "/api/chat":
            names = ["a", "b"] if path == "/api/tags" else [self.loaded] if self.loaded else []
            text = json.dumps({"models": [{"model": f"{n}:latest", "name": f"{n}:latest"} for n in names]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            await writer.drain()
            return
        self.calls += 1
        if self.hangs_after is not None and self.calls > self.hangs_after:
            await asyncio.Event().wait()
        async with self.free:
            await self._load(str(body["model"]))
            messages = body["messages"]
            assert isinstance(messages, list)
            tokens = int(messages[-1]["content"])
            await asyncio.sleep(tokens / self.speed)
            frame = {"model": body["model"], "message": {"role": "assistant", "content": "x"}, "done": True}
            line = json.dumps(frame | {"eval_count": tokens}).encode() + b"\n"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(line), line))
            self.answered += 1
            await writer.drain()

    async def _load(self, model: str) -> None:
        async with self.loading:
            if self.one_model and self.loaded != model:
                self.loaded, self.loads = model, self.loads + 1
                await asyncio.sleep(LOAD_SECONDS)
        self.loaded = model


Choice = Callable[[list[int]], int]


def choices() -> dict[str, Choice]:
    turn = itertools.count()
    return {
        "random": lambda running: random.randrange(len(running)),
        "round robin": lambda running: next(turn) % len(running),
        "least outstanding": lambda running: min(range(len(running)), key=lambda n: (running[n], random.random())),
    }


LITELLM = ["simple-shuffle", "least-busy", "latency-based-routing"]


async def at_a_time(calls: list[tuple[str, int]], at_once: int, ask: Callable[[str, int], Awaitable[bool]]) -> int:
    """Make so many calls at once, and return how many failed."""
    left, failed = iter(calls), 0

    async def work() -> None:
        nonlocal failed
        for model, tokens in left:
            failed += not await ask(model, tokens)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return failed


async def blind(
    servers: list[Server], calls: list[tuple[str, int]], at_once: int, choose: Choice, first_chunk: float
) -> int:
    """Choose among clients without knowing models, slots or faults, as a simple balancer does."""
    clients = [AsyncClient(server.url, timeout=Timeouts(first_chunk=first_chunk)) for server in servers]
    running = [0] * len(clients)

    async def ask(model: str, tokens: int) -> bool:
        place = choose(running)
        running[place] += 1
        try:
            await clients[place].chat(model, str(tokens))
        except OllamaError:
            return False
        finally:
            running[place] -= 1
        return True

    failed = await at_a_time(calls, at_once, ask)
    for client in clients:
        await client.close()
    return failed


async def litellm(
    servers: list[Server], calls: list[tuple[str, int]], at_once: int, strategy: str, limit: float
) -> int:
    """Have LiteLLM's router choose, which asks another host up to three times."""
    import litellm
    from litellm import Router

    litellm.suppress_debug_info = True
    models = [
        {
            "model_name": model,
            "litellm_params": {"model": f"ollama_chat/{model}", "api_base": server.url, "timeout": limit},
        }
        for server in servers
        for model in "ab"
    ]
    router: Any = Router(model_list=models, routing_strategy=strategy, num_retries=3, timeout=limit)

    async def ask(model: str, tokens: int) -> bool:
        try:
            await router.acompletion(model, messages=[{"role": "user", "content": str(tokens)}])
        except Exception:
            return False
        return True

    return await at_a_time(calls, at_once, ask)


async def pooled(servers: list[Server], calls: list[tuple[str, int]], at_once: int, first_chunk: float) -> int:
    """Have the pool choose."""
    hosts = [Host(server.url, slots=server.slots) for server in servers]
    items = ({"model": model, "messages": [{"role": "user", "content": str(tokens)}]} for model, tokens in calls)
    async with Pool(hosts, timeout=Timeouts(first_chunk=first_chunk)) as pool:
        return sum([not result.ok async for result in pool.map(items, concurrency=at_once)])


def ways() -> list[str]:
    found = importlib.util.find_spec("litellm") is not None
    return ["Pool", *choices(), *(f"LiteLLM {strategy}" for strategy in LITELLM if found)]


async def run(scenario: str, way: str, count: int, at_once: int, scale: float, limit: float) -> str:
    slots_and_speeds = HOSTS if scenario == "speeds" else [(4, 250.0)] * 3
    servers = [Server(slots, speed * scale, one_model=scenario == "models") for slots, speed in slots_and_speeds]
    if scenario == "hang":
        servers[0].hangs_after = 30
    listening = [await server.start() for server in servers]
    order = random.Random(1)
    calls = [(order.choice("ab") if scenario == "models" else "a", order.randint(4, 70)) for _ in range(count)]
    # Without failover, a limit turns a hang into an error.
    first_chunk = 3.0 if scenario == "hang" else 1000.0
    if way == "Pool":
        work = pooled(servers, calls, at_once, first_chunk)
    elif way in choices():
        work = blind(servers, calls, at_once, choices()[way], first_chunk)
    else:
        work = litellm(servers, calls, at_once, way.removeprefix("LiteLLM "), first_chunk)
    what = f"{scenario:6} {at_once:3} at once  {way:29}"
    began = time.monotonic()
    try:
        async with asyncio.timeout(limit):
            failed = await work
    except TimeoutError:
        answered, loads = sum(server.answered for server in servers), [server.loads for server in servers]
        return f"{what} not done in {limit:g} s: {answered} of {count}, loads {loads}"
    finally:
        for server in listening:
            server.close()
    seconds = time.monotonic() - began
    return f"{what} {seconds:6.1f} s, {failed} failed, loads {[server.loads for server in servers]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=[20], nargs="*")
    parser.add_argument("--scale", type=float, default=1.0, help="how much faster the hosts are")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a way is given up")
    parser.add_argument("--scenario", choices=["speeds", "models", "hang"], nargs="*")
    parser.add_argument("--way", choices=ways(), nargs="*")
    given = parser.parse_args()
    # Its prices are not needed, and it would look for new ones.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    for way in given.way or ways():
        if way.startswith("LiteLLM"):
            # It imports most of itself at its first calls.
            asyncio.run(run("speeds", way, 2, 1, 100.0, 60.0))
    for scenario in given.scenario or ["speeds", "models", "hang"]:
        for at_once, way in itertools.product(given.at_once, given.way or ways()):
            print(asyncio.run(run(scenario, way, given.calls, at_once, given.scale, given.limit)), flush=True)


if __name__ == "__main__":
    main()
