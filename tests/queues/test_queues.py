"""Jobs that stream, in a queue: the same promises for each engine, with real servers and workers in their own process.

What runs are docs/queue.md's recipes and examples/queue_docket.py. `nox -s queues` has the engines installed; one that
is missing is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from queues import engines, recipes, servers
from real.needs import needs
from real.redis_server import RealRedis, find_redis

from ollama_async.registry import AbortRegistry
from ollama_async.testing import Cut, FakeOllama, Gate, Pause, Reply, RequestRecord, Stall

# SAQ's abort says setex to redis-py.
pytestmark = pytest.mark.filterwarnings("default:Call to deprecated setex:DeprecationWarning")

HERE = Path(__file__).parent
BOUND = engines.BOUND
START = 120.0  # importing an engine can take a while
AT_ONCE = 10.0  # for a machine that is busy
MARK = "OLLAMA_ASYNC_QUEUES"


@pytest.fixture(params=[*engines.ENGINES], scope="module")
def engine(request: pytest.FixtureRequest) -> type[engines.Engine]:
    engine = engines.ENGINES[request.param]
    if importlib.util.find_spec(engine.package) is None:
        pytest.skip(f"needs {engine.package}; to get it: nox -s queues")
    return engine


@pytest.fixture(scope="module")
def backend(
    engine: type[engines.Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], dict[str, str]]]:
    """The server that an engine needs besides Redis: says the variables for a test by that name."""
    with ExitStack() as stack:
        if engine.name == "procrastinate":
            binaries = servers.find_postgres()
            if binaries is None:
                needs("PostgreSQL", how="apt-get install postgresql")
            variables = stack.enter_context(servers.postgres(binaries))
            yield lambda name: servers.new_database(variables, name)
        elif engine.name == "temporal":
            binary = shutil.which("temporal")
            if binary is None:
                needs("Temporal's command line", how="nox -s queues builds it, with Go")
            address = stack.enter_context(servers.temporal(Path(binary), tmp_path_factory.mktemp("temporal")))
            yield lambda name: {"TEMPORAL": address, "QUEUE": name}
        else:
            yield lambda name: {}


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    with FakeOllama(models=["fake"]) as server:
        yield server


@dataclass
class Place:
    """Servers, by variables of the environment, and the processes that a test has started; all of these are ended."""

    engine: type[engines.Engine]
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    async def start(self, command: list[str | Path], says: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        assert (await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), START)).strip() == says
        return process

    async def worker(self) -> subprocess.Popen[str]:
        return await self.start(self.engine.command(self.folder), "ready")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(BOUND)
            assert process.stdout is not None
            process.stdout.close()


def left_behind(mark: str) -> list[str]:
    """The processes that have our variable, as all have that a test starts, and all that these start."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.name != str(os.getpid()) and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.fixture
def place(
    engine: type[engines.Engine],
    backend: Callable[[str], dict[str, str]],
    ollama: FakeOllama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    binary = find_redis()
    if binary is None:
        needs("redis-server", how="run .ci/install-parts")
    name = f"t{uuid.uuid4().hex}"
    with RealRedis(binary, tmp_path) as redis:
        variables = {"REDIS_URL": redis.url, "OLLAMA_HOST": ollama.url, **backend(name), MARK: name}
        example = {"OLLAMA_MODEL": "fake", "LEASE": str(recipes.LEASE)}
        for variable, value in (variables | example).items():
            monkeypatch.setenv(variable, value)
        made = Place(engine, tmp_path / "recipe")
        if engine is not engines.Docket:
            recipes.write(engine.name, made.folder, name)
        try:
            yield made
        finally:
            made.stop()
        assert left_behind(name) == []


@pytest_asyncio.fixture
async def registry(place: Place) -> AsyncIterator[AbortRegistry]:
    async with AbortRegistry.from_url(os.environ["REDIS_URL"]) as registry:
        yield registry


@pytest_asyncio.fixture
async def queue(place: Place) -> AsyncIterator[engines.Engine]:
    await place.worker()
    async with place.engine.connected(place.folder) as queue:
        yield queue


def new_id(what: str = "job") -> str:
    return f"{time.monotonic_ns()}-{what}"


def questions(ollama: FakeOllama) -> list[str]:
    """What the model was asked, in order; the question of a job is its id."""
    return [request.json()["messages"][0]["content"] for request in ollama.requests if request.path == "/api/chat"]


async def asked(ollama: FakeOllama, count: int = 1) -> tuple[RequestRecord, ...]:
    return await asyncio.to_thread(ollama.wait_for_requests, count, path="/api/chat", timeout=BOUND)


async def left(request: RequestRecord, bound: float = AT_ONCE) -> bool:
    return await asyncio.to_thread(request.connection.wait_left, bound)


def line(text: str) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False}


LOADING = Reply(before_head=[Stall()])
ONE = Reply([line("one "), Stall()])


async def streaming(queue: engines.Engine, ollama: FakeOllama, name: str) -> tuple[str, RequestRecord]:
    """Put a job in the queue, and wait until the beginning of its answer is kept."""
    ollama.script("/api/chat", ONE)
    job_id = new_id(name)
    await queue.submit(job_id)
    [request] = await asked(ollama)
    await queue.kept(job_id, "one ")
    return job_id, request


async def test_an_answer_that_nobody_stops_comes_back(queue: engines.Engine, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply.chat("one ", "two"))
    job_id = new_id()
    await queue.submit(job_id)
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"], result["reason"]) == ("one two", "done", None)
    assert questions(ollama) == [job_id]


async def test_an_answer_may_take_its_time(queue: engines.Engine, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply([line("one "), Pause(queue.limit), *Reply.chat("two").steps]))
    job_id = new_id("slow")
    await queue.submit(job_id)
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"]) == ("one two", "done")
    assert questions(ollama) == [job_id]


async def test_a_stop_while_the_model_loads(queue: engines.Engine, registry: AbortRegistry, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", LOADING)
    job_id = new_id()
    await queue.submit(job_id)
    [request] = await asked(ollama)
    assert await registry.abort(job_id, "enough") == "stopped"
    assert await left(request)
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"], result["reason"]) == ("", "aborted", "enough")
    assert questions(ollama) == [job_id]


async def test_a_stop_in_mid_stream_closes_the_socket_and_the_job_returns_the_partial_answer(
    queue: engines.Engine, registry: AbortRegistry, ollama: FakeOllama
) -> None:
    job_id, request = await streaming(queue, ollama, "stopped")
    assert await registry.abort(job_id, "enough") == "stopped"
    assert await left(request)
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"], result["reason"]) == ("one ", "aborted", "enough")
    assert questions(ollama) == [job_id]


async def test_a_job_that_is_stopped_in_the_queue_never_reaches_the_server(
    queue: engines.Engine, registry: AbortRegistry, ollama: FakeOllama
) -> None:
    ollama.script("/api/chat", ONE, always=True)
    running = [new_id(f"{n}") for n in range(4)]  # as many as the worker runs at once
    for job_id in running:
        await queue.submit(job_id)
    requests = await asked(ollama, 4)
    queued = new_id("queued")
    await queue.submit(queued)
    assert await registry.abort(queued, "not wanted") == "kept"
    for job_id in running:
        await registry.abort(job_id, "enough")
    result = await queue.result(queued)
    assert (result["text"], result["outcome"], result["reason"]) == ("", "aborted", "not wanted")
    for job_id in running:
        assert (await queue.result(job_id))["outcome"] == "aborted"
    for request in requests:
        assert await left(request)
    assert sorted(questions(ollama)) == sorted(running)


async def test_a_stop_within_milliseconds_of_the_submission_is_never_lost(
    queue: engines.Engine, registry: AbortRegistry, ollama: FakeOllama
) -> None:
    ollama.script("/api/chat", Reply.endless_chat(0.02), always=True)
    jobs = []
    for turn in range(12):
        job_id = new_id("early")
        jobs.append(job_id)
        await queue.submit(job_id)
        await asyncio.sleep(turn % 6 / 1000)
        assert await registry.abort(job_id, "early") in ("stopped", "kept")
    for job_id in jobs:
        result = await queue.result(job_id)
        assert (result["outcome"], result["reason"]) == ("aborted", "early")
    for request in ollama.requests:
        assert await left(request)
    assert len(set(questions(ollama))) == len(questions(ollama))


@pytest.mark.parametrize(
    ("reply", "text"),
    [(Reply([line("one "), Cut()]), "one "), (Reply.error(500, "the runner has crashed"), "")],
    ids=["cut off", "500"],
)
async def test_an_answer_that_breaks_off_comes_back_as_far_as_it_went_and_is_not_asked_for_again(
    queue: engines.Engine, ollama: FakeOllama, reply: Reply, text: str
) -> None:
    ollama.script("/api/chat", reply)
    job_id = new_id()
    await queue.submit(job_id)
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"]) == (text, "error")
    assert result["error"]
    assert questions(ollama) == [job_id]


async def test_the_same_id_is_the_same_question(
    queue: engines.Engine, registry: AbortRegistry, ollama: FakeOllama
) -> None:
    job_id, request = await streaming(queue, ollama, "twice")
    await queue.submit(job_id)
    await registry.abort(job_id, "enough")
    assert await left(request)
    assert (await queue.result(job_id))["text"] == "one "
    await queue.submit(job_id)  # and when it has ended
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"], result["reason"]) == ("one ", "aborted", "enough")
    assert questions(ollama) == [job_id]


async def test_the_engines_own_cancel_closes_the_socket(queue: engines.Engine, ollama: FakeOllama) -> None:
    job_id, request = await streaming(queue, ollama, "cancelled")
    await queue.cancel(job_id)
    assert await left(request, BOUND)
    result = await queue.result_of_cancelled(job_id)
    assert result["text"] == "one "
    assert result["outcome"] in {"aborted", "cancelled"}
    assert questions(ollama) == [job_id]


async def test_kill_of_the_worker_closes_the_socket_and_asks_nothing_twice(
    queue: engines.Engine, place: Place, ollama: FakeOllama
) -> None:
    job_id, request = await streaming(queue, ollama, "killed")
    place.processes[0].send_signal(signal.SIGKILL)
    assert await left(request)
    await place.worker()
    result = await queue.result_of_dead(job_id)
    assert (result["text"], result["outcome"]) == ("one ", "lost")
    assert questions(ollama) == [job_id]


async def test_a_worker_that_is_told_to_end_keeps_the_partial_answer_and_the_next_one_asks_nothing(
    queue: engines.Engine, place: Place, ollama: FakeOllama
) -> None:
    job_id, request = await streaming(queue, ollama, "ended")
    worker = place.processes[0]
    worker.send_signal(signal.SIGTERM)
    assert await left(request, BOUND)
    await asyncio.to_thread(worker.wait, BOUND)
    await place.worker()
    result = await queue.result(job_id)
    assert result["text"] == "one "
    assert result["outcome"] in {"aborted", "cancelled"}
    assert questions(ollama) == [job_id]


async def test_kill_of_the_driver_leaves_the_job_stoppable_and_its_result_to_another(
    place: Place, registry: AbortRegistry, ollama: FakeOllama
) -> None:
    ollama.script("/api/chat", ONE)
    job_id = new_id("driver")
    await place.worker()
    driver = await place.start([HERE / "driver.py", place.engine.name, place.folder, job_id], "submitted")
    [request] = await asked(ollama)
    driver.kill()
    driver.wait(BOUND)
    async with place.engine.connected(place.folder) as queue:
        await queue.kept(job_id, "one ")
        assert not request.connection.left_at
        assert await registry.abort(job_id, "nobody waits for it") == "stopped"
        assert await left(request)
        result = await queue.result(job_id)
    assert (result["text"], result["outcome"], result["reason"]) == ("one ", "aborted", "nobody waits for it")
    assert questions(ollama) == [job_id]


@pytest.mark.parametrize("engine", ["saq"], indirect=True)
async def test_an_answer_outlives_a_sweep(queue: engines.Saq, ollama: FakeOllama) -> None:
    gate = Gate()
    ollama.script("/api/chat", Reply([line("one "), gate, *Reply.chat("two").steps]))
    job_id = new_id("swept")
    await queue.submit(job_id)
    [request] = await asked(ollama)
    await queue.kept(job_id, "one ")
    await queue.sweep(job_id)
    assert request.connection.left_at is None
    gate.open()
    result = await queue.result(job_id)
    assert (result["text"], result["outcome"]) == ("one two", "done")
    assert questions(ollama) == [job_id]


@pytest.mark.parametrize("name", ["saq", "procrastinate", "temporal"])
def test_the_recipes_are_programs(name: str) -> None:
    for source in recipes.modules(name, "queue").values():
        compile(source, name, "exec")


def test_the_page_and_the_example_have_the_same_job() -> None:
    on_the_page = recipes.functions(recipes.block("The job"))
    in_the_example = recipes.functions(recipes.EXAMPLE.read_text("utf-8"))
    assert on_the_page["answer"] == in_the_example["answer"]
