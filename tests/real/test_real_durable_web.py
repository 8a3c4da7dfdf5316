"""Durable answers on real web servers: uvicorn with several workers, nginx in front of it, a real model's server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from durable.harness import BOUND, telling, words
from programs import Program, running
from real.ollama_server import RealOllama
from real.proxies import BIND, UPSTREAM, Nginx
from real.redis_server import RealRedis

from ollama_async.asgi import ID_HEADER
from ollama_async.testing import FakeOllama, Gate, Reply

pytestmark = pytest.mark.real

# More of what takes long: `nox -s durable`.
LONG = os.environ.get("OLLAMA_ASYNC_DURABLE") == "long"
ANN = {"X-User": "ann"}
ENDLESS = Reply.endless_chat(0.005)
DURABLE = Path(__file__).parents[2] / "docs" / "durable.md"


@contextmanager
def site(redis: RealRedis, model: str, workers: int, **environment: str) -> Iterator[tuple[Program, int]]:
    """The web server with so many workers; yields it and its port."""
    command = ("-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "durable_site:app", "--port", "0")
    options = ("--workers", str(workers), "--log-level", "info", "--timeout-graceful-shutdown", "1")
    with running(*command, *options, OLLAMA_HOST=model, ANSWERS_URL=redis.url, **environment) as program:
        port = int(program.said(r"running on http://127\.0\.0\.1:(\d+)")[1])
        program.said(f"(?s)(Application startup complete.*){{{workers}}}")
        yield program, port


@contextmanager
def nginx(folder: Path, port: int) -> Iterator[Nginx]:
    """nginx as docs/durable.md has it, in front of a port."""
    [config] = re.findall(r"^```nginx\n(.*?)^```$", DURABLE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert BIND in config
    proxy = Nginx(folder, config.replace("127.0.0.1:8000", UPSTREAM), port)
    with proxy:
        yield proxy


def tab(url: str) -> httpx.AsyncClient:
    """A browser's connection: the kernel gives it to one of the workers, and it stays there."""
    return httpx.AsyncClient(base_url=url, headers=ANN, timeout=BOUND, trust_env=False, verify=False)


@asynccontextmanager
async def tab_of_another(url: str, worker: str) -> AsyncIterator[httpx.AsyncClient]:
    """A connection that is with another worker."""
    async with asyncio.timeout(BOUND):
        while True:
            client = tab(url)
            if (await client.get("/answers")).headers["X-Worker"] != worker:
                break
            await client.aclose()
    try:
        yield client
    finally:
        await client.aclose()


class Page:
    """What a page keeps of an answer: its events, by number; and which workers they came from."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = secrets.token_urlsafe(24)
        self.events: list[dict[str, Any]] = []
        self.workers: list[str] = []

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1]["event"] == "end"

    @property
    def text(self) -> str:
        return "".join(each["data"]["message"]["content"] for each in self.events if each["event"] == "chunk")

    async def begin(self, count: int = 10**9, **query: str) -> None:
        async with (
            tab(self.url) as client,
            client.stream("POST", "/chat", params=query, headers={ID_HEADER: self.id}) as response,
        ):
            await self._take(response, count)

    async def attach(self, count: int = 10**9) -> None:
        """Go on in a new connection, and read so many events at most; then cut it."""
        headers = {"Last-Event-ID": str(len(self.events))} if self.events else {}
        async with (
            tab(self.url) as client,
            client.stream("GET", f"/answers/{self.id}", headers=headers) as response,
        ):
            await self._take(response, count)

    async def _take(self, response: httpx.Response, count: int) -> None:
        assert response.status_code == 200, await response.aread()
        self.workers.append(response.headers["X-Worker"])
        fields: dict[str, str] = {}
        buffer = ""
        async for block in response.aiter_text():
            *lines, buffer = (buffer + block).split("\n")
            for line in lines:
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                    continue
                if "event" in fields:
                    # No event twice, and none missing.
                    assert int(fields["id"]) == len(self.events) + 1
                    self.events.append({"event": fields["event"], "data": json.loads(fields["data"])})
                    count -= 1
                fields = {}
                if self.ended or count <= 0:
                    return


@pytest.mark.parametrize("workers", [2, *[4] * LONG])
async def test_workers_share_their_answers(redis: RealRedis, workers: int) -> None:
    """Begun in one, watched through all of them, cut and attached to again, stopped through another."""
    luck = random.Random(workers)
    with FakeOllama(interval=0) as fake, site(redis, fake.url, workers) as (_, port):
        url = f"http://127.0.0.1:{port}"
        fake.script("/api/chat", telling(200, 0.01), always=True)

        async def watch(page: Page) -> None:
            while not page.ended:
                await page.attach(luck.randrange(10, 120))

        async def converse() -> Page:
            page = Page(url)
            await page.begin(luck.randrange(1, 50))
            second = Page(url)
            second.id = page.id
            await asyncio.gather(watch(page), watch(second))
            assert page.events == second.events
            page.workers += second.workers
            return page

        async with asyncio.timeout(2 * BOUND):
            pages = await asyncio.gather(*(converse() for _ in range(6)))
        for page in pages:
            assert page.text == page.events[-1]["data"]["text"] == "".join(words(200))
        assert any(set(page.workers) - {page.workers[0]} for page in pages)
        assert len({worker for page in pages for worker in page.workers}) == workers
        assert len(fake.requests) == 6

        fake.script("/api/chat", ENDLESS, always=True)
        for _ in range(3):
            page = Page(url)
            await page.begin(5)
            connection = fake.connections[-1]
            watching = asyncio.create_task(page.attach())
            async with tab_of_another(url, page.workers[0]) as other:
                stopped = await other.post(f"/answers/{page.id}", json={"reason": "enough"})
                assert stopped.json() == {"stopped": True}
                assert stopped.headers["X-Worker"] != page.workers[0]
            assert await asyncio.to_thread(connection.wait_left, BOUND)
            await asyncio.wait_for(watching, BOUND)
            end = page.events[-1]["data"]
            assert (end["outcome"], end["reason"], end["text"]) == ("aborted", "enough", page.text)


async def test_a_worker_that_is_killed(redis: RealRedis) -> None:
    """uvicorn starts another one in its place; the answers of the first one are lost, and say so."""
    with FakeOllama(interval=0) as fake, site(redis, fake.url, 2) as (_, port):
        url = f"http://127.0.0.1:{port}"
        fake.script("/api/chat", ENDLESS, always=True)
        page = Page(url)
        await page.begin(5)
        async with (
            tab_of_another(url, page.workers[0]) as other,
            other.stream("GET", f"/answers/{page.id}", headers={"Last-Event-ID": "5"}) as response,
        ):
            os.kill(int(page.workers[0]), signal.SIGKILL)
            assert await asyncio.to_thread(fake.connections[-1].wait_left, BOUND)
            await page._take(response, 10**9)
        end = page.events[-1]["data"]
        assert (end["outcome"], end["text"]) == ("lost", page.text)
        assert page.workers[0] != page.workers[1]


async def test_behind_nginx(redis: RealRedis, tmp_path: Path) -> None:
    """What the documentation's settings do: nothing is held back, a leaving is passed on, and a cut is survived."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    gate = Gate()
    steps = telling(200, 0.005).steps
    with FakeOllama(interval=0) as fake, site(redis, fake.url, 2) as (_, port), nginx(folder, port) as proxy:
        # The model says nothing more until the first words are here: nobody holds them back.
        fake.script("/api/chat", Reply([*steps[:1], gate, *steps[1:]]))
        page = Page(proxy.url)
        await page.begin(2)
        assert [each["event"] for each in page.events] == ["open", "chunk"]
        gate.open()
        # All connections are cut, and nginx comes back.
        watching = asyncio.create_task(page.attach())
        while len(page.events) < 50:
            await asyncio.sleep(0.005)
        proxy.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(watching, BOUND)
        with proxy:
            page.url = proxy.url
            await asyncio.wait_for(page.attach(), BOUND)
            assert page.text == page.events[-1]["data"]["text"] == "".join(words(200))
            over = str(len(page.events))
            async with tab(proxy.url) as client:
                again = await client.get(f"/answers/{page.id}", headers={"Last-Event-ID": over})
                assert (again.status_code, again.content) == (204, b"")
            # A tab that leaves ends an answer that does not go on without it, and no other one.
            fake.script("/api/chat", ENDLESS, always=True)
            for query, ends in (({}, False), ({"abort": ""}, True)):
                other = Page(proxy.url)
                await other.begin(5, **query)
                connection = fake.connections[-1]
                if ends:
                    assert await asyncio.to_thread(connection.wait_left, BOUND)
                else:
                    await other.attach(50)
                    assert connection.left_at is None
                async with tab(proxy.url) as client:
                    await client.post(f"/answers/{other.id}")
                assert await asyncio.to_thread(connection.wait_left, BOUND)


async def test_a_stop_of_a_real_model_through_another_worker(real_ollama: RealOllama, redis: RealRedis) -> None:
    with site(redis, real_ollama.url, 2, MODEL=real_ollama.model) as (_, port):
        url = f"http://127.0.0.1:{port}"
        for _ in range(3):
            page = Page(url)
            mark = real_ollama.mark()
            await page.begin(5)
            watching = asyncio.create_task(page.attach())
            assert real_ollama.request_ends(mark, "/api/chat") == []
            async with tab_of_another(url, page.workers[0]) as other:
                assert (await other.post(f"/answers/{page.id}")).json() == {"stopped": True}
            await asyncio.to_thread(real_ollama.wait_for_request_end, mark, timeout=BOUND)
            await asyncio.wait_for(watching, BOUND)
            end = page.events[-1]["data"]
            assert (end["outcome"], end["text"]) == ("aborted", page.text)
        await asyncio.to_thread(real_ollama.wait_until_idle, timeout=BOUND)
