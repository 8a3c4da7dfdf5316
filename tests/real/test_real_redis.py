"""Stops that land in another process than their stream, over a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import pytest_asyncio
from programs import QUESTION, last_event, serving
from real.redis_server import RealRedis

from ollama_async import CancelToken
from ollama_async.registry import AbortRegistry, _local, _redis
from ollama_async.testing import ConnectionRecord, FakeOllama, Reply

pytestmark = pytest.mark.real

BOUND = 60.0
WORKER = Path(__file__).with_name("web_worker.py")


@pytest_asyncio.fixture
async def here(redis: RealRedis) -> AsyncIterator[AbortRegistry]:
    """The registry of the process where the streams are."""
    async with AbortRegistry.from_url(redis.url) as made:
        yield made


@pytest_asyncio.fixture
async def there(redis: RealRedis) -> AsyncIterator[AbortRegistry]:
    """The registry of the process where the Stops land."""
    async with AbortRegistry.from_url(redis.url) as made:
        yield made


async def aborted(token: CancelToken) -> Any:
    return await asyncio.wait_for(token.wait(), BOUND)


async def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND} s: {what}"
        await asyncio.sleep(0.005)


# -- two registries --


async def test_a_stop_from_elsewhere(here: AbortRegistry, there: AbortRegistry) -> None:
    async with here.token("one", owner="ann") as token, here.token("two", owner="ann") as other:
        assert await there.abort("one", "gr\u00fcn \u2028", owner="ann") == "stopped"
        assert await aborted(token) == "gr\u00fcn \u2028"
        assert await there.abort("one", "again", owner="ann") == "stopped"
        assert token.reason == "gr\u00fcn \u2028"
        assert await there.abort("two", owner="bob") == "kept"
        assert await there.abort("two") == "kept"
        assert not other.aborted
        assert here.connected
        assert there.connected


async def test_a_registry_that_was_entered_is_connected(redis: RealRedis) -> None:
    registry = AbortRegistry.from_url(redis.url)
    assert registry.connected is None
    async with registry:
        assert registry.connected is True
    assert registry.connected is False


async def test_a_stop_that_comes_before_its_stream(here: AbortRegistry, there: AbortRegistry) -> None:
    assert await there.abort("one", "early") == "kept"
    async with here.token("one") as token:
        assert (token.aborted, token.reason) == (True, "early")


async def test_a_stop_does_not_hold_for_ever(redis: RealRedis, there: AbortRegistry) -> None:
    async with AbortRegistry.from_url(redis.url, ttl=0.2) as brief:
        await brief.abort("one")
    await there.abort("two")
    assert 0 < redis.ask("PTTL", "ollama-async:stop::two") <= 600_000
    await until(lambda: redis.ask("KEYS", "*:stop:*") == ["ollama-async:stop::two"], "the end of the first key")
    await there.abort("two")
    # What is counted ends with it, and what counts it does, too.
    assert redis.ask("ZRANGE", "ollama-async:unheard", "0", "-1") == [":two"]
    assert 0 < redis.ask("PTTL", "ollama-async:unheard") <= 600_000
    assert 0 < redis.ask("PTTL", "ollama-async:unheard:") <= 600_000


async def test_a_stop_for_what_has_ended(here: AbortRegistry, there: AbortRegistry) -> None:
    async with here.token("one"):
        pass
    async with here.token("two") as two:
        assert await there.abort("one") in {"kept", "stopped"}  # its subscription may be on its way out
        assert await there.abort("one") in {"kept", "stopped"}
        async with here.token("three") as three:
            assert not two.aborted
            assert not three.aborted


async def test_namespaces_are_apart(redis: RealRedis, here: AbortRegistry) -> None:
    async with AbortRegistry.from_url(redis.url, namespace="other") as other, here.token("one") as token:
        assert await other.abort("one") == "kept"
        assert await other.list() == []
        assert not token.aborted


async def test_the_list_is_of_all_processes(here: AbortRegistry, there: AbortRegistry) -> None:
    async with here.token("*", owner="a:b"), there.token("2", owner="ann"):
        assert await here.list() == await there.list() == [("a:b", "*"), ("ann", "2")]
        assert await here.list("ann") == [("ann", "2")]


async def test_what_a_process_leaves_when_it_ends(redis: RealRedis, there: AbortRegistry) -> None:
    dying = AbortRegistry.from_url(redis.url)
    entered = contextlib.AsyncExitStack()
    await entered.enter_async_context(dying.token("one"))
    assert await there.list() == [("", "one")]
    await dying.aclose()
    async with asyncio.timeout(BOUND):
        while await there.list():
            await asyncio.sleep(0.005)
    await entered.aclose()


async def test_a_redis_user_with_few_rights_on_a_unix_socket(
    tmp_path: Path, redis: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that docs/serving.md names, and no others."""
    monkeypatch.setattr(_redis, "_MAX_UNHEARD", 2)
    path = tmp_path / "redis.sock"
    rights = "+subscribe +unsubscribe +publish +pubsub +ping +set +mget +eval +time +del +pttl +pexpire"
    rights += " +zadd +zrem +zcard +zpopmin +zremrangebyscore"
    redis.ask("ACL", "SETUSER", "app", "on", ">pw", "~ollama-async:*", "&ollama-async:*", "-@all", *rights.split())
    for url in (f"unix://app:pw@{path}", redis.url.replace("//", "//app:pw@")):
        async with AbortRegistry.from_url(url) as one, AbortRegistry.from_url(url) as other, one.token("1") as token:
            assert await other.abort("1", "reason") == "stopped"
            assert await aborted(token) == "reason"
            assert await other.list() == [("", "1")]
            for number in range(3):
                assert await other.abort(f"unknown {number}") == "kept"


async def test_stops_and_registrations_that_cross(here: AbortRegistry, there: AbortRegistry) -> None:
    async def stream(number: int) -> None:
        await asyncio.sleep(random.random() * 0.3)
        async with here.token(f"crossing {number}") as token:
            assert await aborted(token) == f"reason {number}"

    async def stop(number: int) -> None:
        await asyncio.sleep(random.random() * 0.3)
        await there.abort(f"crossing {number}", f"reason {number}")

    async with here.token("another") as another:
        await asyncio.gather(*(job(number) for number in range(300) for job in (stream, stop)))
        assert not another.aborted


async def test_an_id_that_comes_and_goes(here: AbortRegistry, there: AbortRegistry) -> None:
    for number in range(100):
        name = f"again {number}"
        for _ in range(number % 4):
            async with here.token(name):
                pass
        stopping = asyncio.create_task(there.abort(name))
        for _ in range(number % 3):
            async with here.token(name):
                pass
        async with here.token(name) as token:
            await aborted(token)
        await stopping


async def test_the_connections_of_a_process(redis: RealRedis, here: AbortRegistry, there: AbortRegistry) -> None:
    def clients() -> int:
        return len(redis.ask("CLIENT", "LIST").splitlines()) - 1  # without the one that asks

    def commands() -> int:
        return int(redis.ask("INFO", "stats")["total_commands_processed"])

    async with here.token("first"):
        pass
    before = commands()
    async with contextlib.AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(here.token(str(number))) for number in range(500)))
        assert len(await there.list()) in {500, 501}
        await asyncio.gather(*(here.abort(str(number)) for number in range(500)))
        assert clients() <= 2 + 2  # one to listen and one for commands each
    async with asyncio.timeout(BOUND):
        while await there.list():
            await asyncio.sleep(0.02)
    # A key and a message for each Stop; registrations go together.
    assert commands() - before < 500 * 3 + 200


# -- Stops that no stream hears --


def kept(redis: RealRedis) -> set[str]:
    """The Stops that Redis keeps."""
    prefix = "ollama-async:stop:"
    return {key.removeprefix(prefix) for key in redis.ask("KEYS", f"{prefix}*")}


def counted(redis: RealRedis, *owners: str) -> list[set[str]]:
    """What is counted of all, and of each owner."""
    return [
        set(redis.ask("ZRANGE", f"ollama-async:unheard{index}", "0", "-1"))
        for index in ("", *(f":{owner}" for owner in owners))
    ]


async def test_there_is_an_end_to_them(
    redis: RealRedis, here: AbortRegistry, there: AbortRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis, "_MAX_UNHEARD", 10)
    monkeypatch.setattr(_redis, "_MAX_UNHEARD_OF_ALL", 25)
    assert await here.abort("his only one", owner="bob") == "kept"
    for number in range(30):
        # From wherever they come.
        assert await (here, there)[number % 2].abort(str(number), owner="ann") == "kept"
    last = {f"ann:{number}" for number in range(20, 30)}
    assert kept(redis) == last | {"bob:his%20only%20one"}
    assert counted(redis, "ann", "bob") == [kept(redis), last, {"bob:his%20only%20one"}]
    async with there.token("29", owner="ann") as token, there.token("his only one", owner="bob") as his:
        assert token.aborted
        assert his.aborted
    # One that is given again is the newest, and is no second one.
    await here.abort("20", owner="ann")
    await here.abort("30", owner="ann")
    assert "ann:20" in kept(redis)
    assert len(kept(redis)) == 11
    for number in range(30):
        await here.abort("x", owner=f"owner {number}")
    assert kept(redis) == {f"owner%20{number}:x" for number in range(5, 30)}
    assert counted(redis, "ann", "bob") == [kept(redis), set(), set()]
    assert len(redis.ask("KEYS", "*:unheard:*")) == 25


async def test_what_they_take_of_memory(redis: RealRedis, here: AbortRegistry) -> None:
    def used() -> int:
        return int(redis.ask("INFO", "memory")["used_memory"])

    # The longest reason, in letters of 4 bytes, and as many again as are kept.
    reason = "\U0001f600" * 1000
    for start in range(0, 2000, 500):
        await asyncio.gather(*(here.abort(f"{start + number:022}", reason, owner="ann") for number in range(500)))
    assert len(kept(redis)) == 1000
    assert redis.ask("MEMORY", "USAGE", f"ollama-async:stop:ann:{1999:022}") < 4400
    assert used() < 8_000_000


async def test_a_stop_that_was_heard_is_not_dropped_for_them(
    redis: RealRedis, here: AbortRegistry, there: AbortRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis, "_MAX_UNHEARD", 3)
    monkeypatch.setattr(_redis, "_MAX_UNHEARD_OF_ALL", 3)
    await there.abort("early")
    async with contextlib.AsyncExitStack() as stack:
        tokens = [await stack.enter_async_context(here.token(str(number))) for number in range(20)]
        early = await stack.enter_async_context(here.token("early"))
        assert early.aborted
        assert await there.abort("early") == "stopped"
        assert set(await asyncio.gather(*(there.abort(str(number)) for number in range(20)))) == {"stopped"}
        for token in tokens:
            await aborted(token)
        for number in range(10):
            await there.abort(f"unknown {number}")
        assert kept(redis) == {
            ":early",
            *(f":{number}" for number in range(20)),
            *(f":unknown%20{number}" for number in range(7, 10)),
        }
        assert counted(redis, "") == [{f":unknown%20{number}" for number in range(7, 10)}] * 2


async def test_none_is_lost_of_more_than_a_process_remembers(
    here: AbortRegistry, there: AbortRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_local, "_MAX_STOPS", 3)
    monkeypatch.setattr(_redis, "_STOPS_AT_ONCE", 7)
    async with contextlib.AsyncExitStack() as stack:
        tokens = [await stack.enter_async_context(here.token(str(number))) for number in range(50)]
        answers = await asyncio.gather(*(there.abort(str(number), f"reason {number}") for number in range(50)))
        assert [await aborted(token) for token in tokens] == [f"reason {number}" for number in range(50)]
        assert set(answers) == {"stopped"}


# -- Redis goes --


async def test_redis_is_killed_and_comes_back(redis: RealRedis, here: AbortRegistry, there: AbortRegistry) -> None:
    async with here.token("during") as during, here.token("after") as after, here.token("never") as never:
        await there.abort("early", "before the crash")
        redis.kill()
        await until(lambda: not here.connected and not there.connected, "the loss of the connections")
        assert await there.abort("during", "while it was away") == "queued"
        async with here.token("local") as local:
            assert await here.abort("local") == "stopped"
            assert local.aborted
        redis.start()
        assert await aborted(during) == "while it was away"
        await until(lambda: here.connected and there.connected, "new connections")
        # Its subscription is there again, or will be, and then its key is looked at.
        await there.abort("after", "afterwards")
        assert await aborted(after) == "afterwards"
        # The Redis that came back had forgotten that one.
        async with asyncio.timeout(BOUND):
            while not redis.ask("EXISTS", "ollama-async:stop::early"):
                await asyncio.sleep(0.005)
        async with here.token("early") as late:
            assert late.reason == "before the crash"
        assert not never.aborted


async def test_a_stop_while_only_the_stream_is_cut_off(redis: RealRedis, there: AbortRegistry) -> None:
    async with (
        Passage(redis.port) as passage,
        AbortRegistry.from_url(f"redis://127.0.0.1:{passage.port}") as cut_off,
        cut_off.token("one") as token,
        cut_off.token("two") as other,
    ):
        passage.close()
        await until(lambda: not cut_off.connected, "the loss of the connection")
        await until(lambda: redis.ask("PUBSUB", "NUMSUB", "ollama-async:stop::one")[1] == 0, "Redis to notice")
        assert await there.abort("one", "was not heard") == "kept"
        assert not token.aborted
        passage.open()
        assert await aborted(token) == "was not heard"
        assert not other.aborted


async def test_a_lost_connection_is_made_anew_once(redis: RealRedis) -> None:
    """Redis counts: what it has taken in were the new connections of the registry, and the questions of this test."""
    questions = 0

    def ask(*command: str) -> Any:
        nonlocal questions
        questions += 1
        return redis.ask(*command)

    def listening() -> set[str]:
        return {line.split()[0] for line in ask("CLIENT", "LIST", "TYPE", "pubsub").splitlines()}

    async with AbortRegistry.from_url(redis.url) as registry, registry.token("one") as token:
        before, questions = int(ask("INFO", "stats")["total_connections_received"]), 0
        for _ in range(5):
            known = listening()
            ask("CLIENT", "KILL", "TYPE", "pubsub")
            await until(lambda known=known: listening() - known, "a new connection")
            async with registry.token("two"):
                assert await registry.abort("two") == "stopped"
        assert int(ask("INFO", "stats")["total_connections_received"]) - before == 5 + questions
        assert len(listening()) == 1
        assert not token.aborted


async def test_losing_connections_leaves_none_open(redis: RealRedis) -> None:
    """Also if it meets the moment at which names are subscribed."""
    gc.collect()
    gc.disable()
    try:
        open_before = len(os.listdir("/proc/self/fd"))
        async with AbortRegistry.from_url(redis.url) as registry:
            over = False

            async def come_and_go(turn: int) -> None:
                number = 0
                while not over:
                    number += 1
                    async with registry.token(f"{turn} {number}"):
                        await asyncio.sleep(0.001)

            tasks = [asyncio.create_task(come_and_go(turn)) for turn in range(10)]
            for _ in range(10):
                await asyncio.sleep(0.1)
                redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
            over = True
            await asyncio.gather(*tasks)
        await until(lambda: len(os.listdir("/proc/self/fd")) == open_before, "that all sockets are closed")
    finally:
        gc.enable()


class Passage:
    """A way to a port that can be closed: what goes through is cut off, and what comes is turned away."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        self._server.close()
        await self._server.wait_closed()

    def open(self) -> None:
        self._open = True

    def close(self) -> None:
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, there_writer}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while block := await source.read(65536):
                    sink.write(block)
            sink.transport.abort()

        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        self._writers -= {writer, there_writer}


# -- several uvicorn processes --


class Worker:
    """A uvicorn process, and what a browser does with it."""

    def __init__(self, redis: RealRedis, fake: FakeOllama) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER, redis.url, fake.url], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(BOUND)
        finally:
            self._process.kill()
            self._process.communicate()

    async def post(self, path: str, body: Any, **headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body)
        headers |= {"Host": "x", "Connection": "close", "Content-Length": str(len(data))}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n{data}".encode())
        return reader, writer

    async def stop(self, stream_id: str, reason: str) -> int:
        async with asyncio.timeout(BOUND):
            reader, writer = await self.post(f"/stop/{stream_id}", {"reason": reason})
            answer = await reader.read()
        writer.close()
        return int(answer.split()[1])


@dataclass
class Chat:
    """A stream that a browser reads."""

    stream_id: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def begin(cls, worker: Worker, number: int) -> Chat:
        stream_id = f"stream-number-{number:010}"
        body = {"model": "fake", "messages": [{"role": "user", "content": stream_id}]}
        chat = cls(stream_id, *await worker.post("/chat", body, X_Stream_Id=stream_id))
        async with asyncio.timeout(BOUND):
            await chat.reader.readuntil(b"event: chunk")
        return chat

    async def end(self) -> dict[str, Any]:
        """Read to the end and return what the last event says."""
        async with asyncio.timeout(BOUND):
            rest = await self.reader.read()
        self.writer.close()
        data = rest.rpartition(b"event: end\ndata: ")[2].partition(b"\n\n")[0]
        return dict(json.loads(data))


def model_connections(fake: FakeOllama) -> dict[str, ConnectionRecord]:
    """What carries each stream between a worker and the model's server."""
    return {request.json()["messages"][0]["content"]: request.connection for request in fake.requests}


@contextlib.contextmanager
def workers_of(redis: RealRedis, fake: FakeOllama, count: int) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(count):
            workers.append(Worker(redis, fake))
            stack.callback(workers[-1].end)
        yield workers


async def test_a_stream_is_stopped_through_another_process(redis: RealRedis) -> None:
    with FakeOllama() as fake, workers_of(redis, fake, 2) as (one, other):
        fake.script("/api/chat", Reply.endless_chat(0.02), always=True)
        chat, left_alone = await Chat.begin(one, 1), await Chat.begin(one, 2)
        assert await other.stop(chat.stream_id, "Stop was pressed") == 200
        end = await chat.end()
        assert (end["outcome"], end["reason"]) == ("aborted", "Stop was pressed")
        connections = model_connections(fake)
        assert await asyncio.to_thread(connections[chat.stream_id].wait_left, BOUND)
        assert connections[left_alone.stream_id].left_at is None
        left_alone.writer.transport.abort()
        assert await asyncio.to_thread(connections[left_alone.stream_id].wait_left, BOUND)


async def test_redis_is_killed_while_streams_run(redis: RealRedis) -> None:
    with FakeOllama() as fake, workers_of(redis, fake, 2) as (one, other):
        fake.script("/api/chat", Reply.endless_chat(0.02), always=True)
        chats = [await Chat.begin(one, number) for number in range(3)]
        redis.kill()
        await chats[0].reader.readuntil(b"event: chunk")  # what streams goes on streaming
        assert await one.stop(chats[0].stream_id, "its own") == 200
        assert (await chats[0].end())["reason"] == "its own"
        async with asyncio.timeout(BOUND):
            while await other.stop(chats[1].stream_id, "queued") != 202:
                await asyncio.sleep(0.01)
        redis.start()
        assert (await chats[1].end())["reason"] == "queued"
        await other.stop(chats[2].stream_id, "afterwards")
        assert (await chats[2].end())["reason"] == "afterwards"
        for connection in model_connections(fake).values():
            assert await asyncio.to_thread(connection.wait_left, BOUND)


def test_the_example_with_two_workers(redis: RealRedis) -> None:
    with FakeOllama(models=["llama3.2"]) as fake, contextlib.ExitStack() as stack:
        fake.script("/api/chat", Reply.endless_chat(0.02), always=True)
        _, browser = stack.enter_context(serving(fake, "--workers", "2", REGISTRY_URL=redis.url))
        responses = []
        for _ in range(8):
            # A connection of its own each: the kernel gives it to the one worker or the other.
            tab = stack.enter_context(httpx.Client(base_url=browser.base_url, timeout=BOUND, headers=browser.headers))
            responses.append(stack.enter_context(tab.stream("POST", "/chat", json=QUESTION)))
        for response in responses:
            with httpx.Client(base_url=browser.base_url, timeout=BOUND, headers=browser.headers) as tab:
                assert tab.post(f"/stop/{response.headers['X-Stream-Id']}").json() == {"stopped": True}
        for response in responses:
            assert last_event(response.iter_lines())["outcome"] == "aborted"
        for connection in fake.connections:
            assert connection.wait_left(BOUND)


# A cut, for machines that are busy with other things; the whole is OLLAMA_ASYNC_STOPS=1000x4.
STREAMS, PROCESSES = map(int, os.environ.get("OLLAMA_ASYNC_STOPS", "200x2").split("x"))


async def test_many_streams_and_as_many_stops(redis: RealRedis, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with FakeOllama() as fake, workers_of(redis, fake, PROCESSES) as workers:
            fake.script("/api/chat", Reply.endless_chat(1.0), always=True)
            times = await stop_them_all(fake, workers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    cuts = statistics.quantiles(times, n=100)
    with capsys.disabled():
        print(
            f"\n{STREAMS} streams in {PROCESSES} processes, each stopped through another one: from Stop to socket "
            f"closed median {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms, longest {max(times) * 1000:.1f} ms"
        )


async def stop_them_all(fake: FakeOllama, workers: list[Worker]) -> list[float]:
    """Return for each Stop how long it took until the model's server saw the stream's socket closed."""
    room = asyncio.Semaphore(50)

    async def begin(number: int) -> Chat:
        async with room:
            return await Chat.begin(workers[number % PROCESSES], number)

    # Some more, which nobody stops.
    untouched = STREAMS // 10
    chats = await asyncio.gather(*(begin(number) for number in range(STREAMS + untouched)))
    connections = model_connections(fake)
    assert all(connection.left_at is None for connection in connections.values())
    pressed: dict[str, float] = {}
    in_hand = asyncio.Semaphore(4)

    async def stop(number: int) -> int:
        async with in_hand:
            chat = chats[number]
            pressed[chat.stream_id] = time.monotonic()
            return await workers[(number + 1) % PROCESSES].stop(chat.stream_id, f"stop {number}")

    order = random.sample(range(STREAMS), STREAMS)
    answers = Counter(await asyncio.gather(*(stop(number) for number in order)))
    # Where the machine is very slow, a Stop may be answered before Redis has.
    assert answers[200] > STREAMS / 2
    assert set(answers) <= {200, 202, 404}
    ends = await asyncio.gather(*(chat.end() for chat in chats[:STREAMS]))
    # None is lost, and each stream has its own.
    assert [(end["outcome"], end["reason"]) for end in ends] == [
        ("aborted", f"stop {number}") for number in range(STREAMS)
    ]
    times = []
    for chat in chats[:STREAMS]:
        connection = connections[chat.stream_id]
        assert await asyncio.to_thread(connection.wait_left, BOUND)
        assert connection.left_at is not None
        times.append(connection.left_at - pressed[chat.stream_id])
    for chat in chats[STREAMS:]:
        assert connections[chat.stream_id].left_at is None
        chat.writer.transport.abort()
    for chat in chats[STREAMS:]:
        assert await asyncio.to_thread(connections[chat.stream_id].wait_left, BOUND)
    return times
