"""``RayPool`` on a real cluster of two nodes on this machine: `nox -s ray`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ollama_async import (
    AbortError,
    BadRequestError,
    CancelToken,
    ConnectError,
    ConnectionBroken,
    NoHost,
    OllamaError,
    PhaseTimeout,
    PoolStream,
    StreamClosed,
    Timeouts,
)
from ollama_async.batch import batch
from ollama_async.ray import RayHost, RayPool
from ollama_async.testing import FakeOllama, Gate, Reply, Stall

ray = pytest.importorskip("ray", reason="needs ray; to get it: nox -s ray")
BOUND = 120.0  # an actor is a process that imports Ray
Servers = tuple[FakeOllama, FakeOllama]
# Ray leaves sockets and files to the collector; what is ours is asserted by the servers.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)  # Ray writes a file there, and does not make the folder
    head = {"num_cpus": 1, "resources": {"m1": 1}, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=1, resources={"m2": 1})
        ray.init(address=made.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with FakeOllama(models=["fake"]) as one, FakeOllama(models=["fake"]) as two:
        yield one, two


@pytest_asyncio.fixture
async def pool(servers: Servers) -> AsyncIterator[RayPool]:
    hosts = [RayHost(server.url, 2, {f"m{n}": 1}) for n, server in enumerate(servers, 1)]
    async with RayPool(hosts) as made:
        yield made


def chats(servers: Servers) -> list[Any]:
    return [request for server in servers for request in server.requests if request.path == "/api/chat"]


def line(text: str) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False}


async def asked(servers: Servers, count: int) -> None:
    async with asyncio.timeout(BOUND):
        while len(chats(servers)) < count:
            await asyncio.sleep(0.01)


async def test_calls_go_to_both_nodes_and_say_where(servers: Servers, pool: RayPool) -> None:
    answers = await asyncio.wait_for(asyncio.gather(*(pool.chat("fake", f"{n}") for n in range(8))), BOUND)
    assert {answer["host"] for answer in answers} == {server.url for server in servers}
    assert len(chats(servers)) == 8
    assert [host.running for host in pool.hosts] == [0, 0]


@pytest.mark.parametrize("phase", ["loading", "streaming"])
async def test_an_abort_closes_every_socket_and_brings_the_partial_answers(
    phase: str, servers: Servers, pool: RayPool
) -> None:
    loading = phase == "loading"
    for server in servers:
        reply = Reply(before_head=[Stall()]) if loading else Reply([line("one "), Stall()])
        server.script("/api/chat", reply, always=True)
    token = CancelToken()
    tasks = [asyncio.create_task(pool.chat("fake", "hi", token=token)) for _ in range(6)]
    await asked(servers, 4)  # two slots each; two calls wait in the driver
    await asyncio.sleep(0.3)  # the lines are on their way to the actors
    token.abort("enough")
    errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
    assert all(isinstance(error, AbortError) and error.reason == "enough" for error in errors)
    texts = [error.partial.message.content for error in errors if error.partial is not None]
    assert texts == [] if loading else texts == ["one "] * 4
    for request in chats(servers):
        assert await asyncio.to_thread(request.connection.wait_left, BOUND)
    assert len(chats(servers)) == 4


async def test_no_abort_within_milliseconds_of_a_call_is_lost(servers: Servers, pool: RayPool) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
    for turn in range(30):
        token = CancelToken()
        task = asyncio.create_task(pool.chat("fake", "hi", token=token))
        await asyncio.sleep(turn % 6 / 1000)
        token.abort("early")
        with pytest.raises(AbortError):
            await asyncio.wait_for(task, BOUND)
    for request in chats(servers):
        assert await asyncio.to_thread(request.connection.wait_left, BOUND)


async def test_a_cancelled_call_closes_its_socket(servers: Servers, pool: RayPool) -> None:
    for server in servers:
        server.script("/api/chat", Reply([line("one "), Stall()]))
    task = asyncio.create_task(pool.chat("fake", "hi"))
    await asked(servers, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [request] = chats(servers)
    assert await asyncio.to_thread(request.connection.wait_left, BOUND)


async def test_a_killed_actor_closes_its_sockets_and_its_calls_are_made_anew(servers: Servers) -> None:
    one, _ = servers
    one.script("/api/chat", Reply([line("one "), Stall()]))
    async with RayPool([RayHost(one.url, 2, {"m1": 1})]) as pool:
        task = asyncio.create_task(pool.chat("fake", "hi"))
        await asked(servers, 1)
        [request] = chats(servers)
        ray.kill(pool._transports[0].actor)
        assert await asyncio.to_thread(request.connection.wait_left, BOUND)
        assert (await asyncio.wait_for(task, BOUND)).done
    assert len(chats(servers)) == 2


async def test_a_host_without_the_model_is_passed_over(servers: Servers, pool: RayPool) -> None:
    one, two = servers
    two.script("/api/chat", Reply.error(404, "model 'fake' not found"), always=True)
    answers = await asyncio.wait_for(asyncio.gather(*(pool.chat("fake", f"{n}") for n in range(6))), BOUND)
    assert {answer["host"] for answer in answers} == {one.url}


async def test_batch_and_map_run_on_it_unchanged(servers: Servers, pool: RayPool, tmp_path: Path) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"id": f"{n}", "prompt": f"{n}"}) + "\n" for n in range(40)))
    result = await asyncio.wait_for(batch(rows, tmp_path / "out.jsonl", pool=pool, model="fake"), BOUND)
    assert (result.done, result.failed) == (40, 0)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(int(line["id"]) for line in lines) == list(range(40))
    seen = {result.index async for result in pool.map([f"{n}" for n in range(10)], model="fake")}
    assert seen == set(range(10))


async def test_closing_the_pool_leaves_no_socket_and_no_actor(servers: Servers) -> None:
    one, _ = servers
    one.script("/api/chat", Reply([line("one "), Stall()]))
    async with RayPool([RayHost(one.url, 2, {"m1": 1})]) as pool:
        task = asyncio.create_task(pool.chat("fake", "hi"))
        await asked(servers, 1)
    with pytest.raises(OllamaError):
        await asyncio.wait_for(task, BOUND)
    [request] = chats(servers)
    assert await asyncio.to_thread(request.connection.wait_left, BOUND)


# -- streams --


async def test_a_stream_is_that_of_a_pool(servers: Servers, pool: RayPool) -> None:
    for server in servers:
        server.script("/api/chat", Reply.chat("a", "b", "c"), always=True)
    async with asyncio.timeout(BOUND):
        stream = pool.chat("fake", "hi", stream=True, key="me", sticky="talk")
        assert [chunk.message.content async for chunk in stream] == ["a", "b", "c", ""]
        assert (stream.text, stream.outcome, stream.status_code) == ("abc", "done", 200)
        assert stream.host in {server.url for server in servers}
        enough = pool.chat("fake", "hi", stream=True, until=lambda answer: "b" in (answer.message.content or ""))
        assert (await enough.collect()).message.content == "ab"
        assert enough.outcome == "until"
        assert (await pool.generate("fake", "hi", options={"num_predict": 2}, stream=True).collect()).response
        assert len((await pool.embed("fake", ["a", "b"])).embeddings) == 2
        assert [model.model for model in (await pool.client(servers[0].url).list()).models] == ["fake:latest"]
        # What a server answers to a request that is wrong is said as it is.
        servers[0].script("/api/generate", Reply.error(400, "no"), always=True)
        servers[1].script("/api/generate", Reply.error(400, "no"), always=True)
        with pytest.raises(BadRequestError, match="no"):
            await pool.generate("fake", "hi", stream=True)
    assert [host.running for host in pool.hosts] == [0, 0]


async def test_chunks_arrive_while_the_answer_is_made(servers: Servers, pool: RayPool) -> None:
    gate = Gate()
    for server in servers:
        server.script("/api/chat", Reply([line("one "), gate, *Reply.chat("two").steps]))
    async with asyncio.timeout(BOUND):
        stream = pool.chat("fake", "hi", stream=True)
        assert (await anext(stream)).message.content == "one "
        assert stream.outcome is None
        gate.open()
        assert (await stream.collect()).message.content == "one two"


async def leave_by_break(stream: PoolStream[Any]) -> None:
    async for _ in stream:
        break


async def leave_by_abort(stream: PoolStream[Any]) -> None:
    await anext(stream)
    assert stream.abort("enough")
    with pytest.raises(AbortError, match="enough") as raised:
        await anext(stream)
    assert raised.value.partial.message.content.startswith("This")


async def leave_by_close(stream: PoolStream[Any]) -> None:
    async with stream:
        await anext(stream)


async def leave_by_cancel(stream: PoolStream[Any]) -> None:
    task = asyncio.create_task(stream.collect())
    while not stream.text:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream.text.startswith("This")


async def abort_from_a_thread(stream: PoolStream[Any]) -> None:
    await anext(stream)
    await asyncio.to_thread(stream.abort, "enough")
    with pytest.raises(AbortError):
        await stream.collect()


async def pass_its_time(stream: PoolStream[Any]) -> None:
    with pytest.raises(PhaseTimeout):
        await stream.collect()


WAYS = [leave_by_break, leave_by_abort, leave_by_close, leave_by_cancel, abort_from_a_thread, pass_its_time]


@pytest.mark.parametrize("leave", WAYS)
async def test_a_stream_that_is_left_is_closed_at_the_server(servers: Servers, pool: RayPool, leave: Any) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
    limits = Timeouts(total=1.0) if leave is pass_its_time else None
    async with asyncio.timeout(BOUND):
        stream = pool.chat("fake", "hi", stream=True, timeout=limits)
        await leave(stream)
        assert stream.outcome in ("closed", "aborted", "cancelled", "timeout")
        [request] = chats(servers)
        assert await asyncio.to_thread(request.connection.wait_left, BOUND)
        assert [host.running for host in pool.hosts] == [0, 0]


async def test_the_stream_of_an_actor_that_dies_is_not_asked_for_twice(servers: Servers, pool: RayPool) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
    async with asyncio.timeout(BOUND):
        stream = pool.chat("fake", "hi", stream=True)
        await anext(stream)
        place = next(place for place, host in enumerate(pool.hosts) if host.running)
        ray.kill(pool._transports[place].actor)
        with pytest.raises(ConnectionBroken, match="the actor for") as raised:
            await stream.collect()
    assert raised.value.partial.message.content.startswith("This")
    assert len(chats(servers)) == 1


# -- hosts --


async def test_an_actor_that_dies_before_the_first_byte_has_its_call_made_anew(servers: Servers) -> None:
    one, _ = servers
    one.script("/api/chat", Reply(before_head=[Stall()]))
    async with RayPool([RayHost(one.url, 2, {"m1": 1})]) as pool, asyncio.timeout(BOUND):
        task = asyncio.create_task(pool.chat("fake", "hi"))
        await asked(servers, 1)
        ray.kill(pool._transports[0].actor)
        assert (await task).done
    assert len(chats(servers)) == 2


async def test_a_host_that_gives_no_first_chunk_is_taken_out(servers: Servers) -> None:
    one, two = servers
    one.script("/api/chat", Reply(before_head=[Stall()]), always=True)
    hosts = [RayHost(one.url, 8, {"m1": 1}), RayHost(two.url, 1, {"m2": 1})]
    async with RayPool(hosts, timeout=Timeouts(first_chunk=0.5)) as pool, asyncio.timeout(BOUND):
        assert (await pool.chat("fake", "hi"))["host"] == two.url
        assert pool.hosts[0].out_models == {"fake:latest"}
    [hung] = [request for request in one.requests if request.path == "/api/chat"]
    assert await asyncio.to_thread(hung.connection.wait_left, BOUND)


async def test_servers_that_are_not_there_are_said_with_what_went_wrong(servers: Servers) -> None:
    dead = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    async with RayPool([RayHost(url) for url in dead], patience=0.2) as pool, asyncio.timeout(BOUND):
        with pytest.raises(NoHost) as raised:
            await pool.chat("fake", "hi")
        assert all("ConnectError: cannot connect to" in raised.value.errors[url] for url in dead)
    async with RayPool([RayHost(dead[0])]) as pool, asyncio.timeout(BOUND):
        with pytest.raises(ConnectError, match="cannot connect to"):
            await pool.embed("fake", "hi")


async def test_a_place_that_the_cluster_does_not_have_is_said(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_async.ray._START_SECONDS", 3.0)
    nowhere = RayHost(servers[0].url, 4, {"m9": 1})
    async with RayPool([nowhere, RayHost(servers[1].url, 1, {"m2": 1})]) as pool, asyncio.timeout(BOUND):
        assert (await pool.chat("fake", "hi"))["host"] == servers[1].url
    async with RayPool([nowhere], patience=0.2) as pool, asyncio.timeout(BOUND):
        with pytest.raises(ConnectError, match=r"no machine of the Ray cluster had room for .*{'m9': 1}"):
            await pool.chat("fake", "hi", stream=True)
    assert not chats((servers[0], servers[0]))


async def test_without_hosts_there_is_an_actor_on_each_machine(servers: Servers) -> None:
    async with RayPool(url=servers[0].url, slots=2) as pool, asyncio.timeout(BOUND):
        assert [(host.url, host.slots) for host in pool.hosts] == [(servers[0].url, 2)] * 2
        answers = await asyncio.gather(*(pool.chat("fake", f"{n}") for n in range(6)))
        assert all(answer.done for answer in answers)
    with pytest.raises(StreamClosed, match="the pool is closed"):
        await pool.chat("fake", "hi")


async def test_a_pool_joins_the_cluster_at_its_first_call(servers: Servers) -> None:
    pool = RayPool([RayHost(servers[0].url, 2, {"m1": 1})])
    token = CancelToken()
    token.abort("early")
    async with asyncio.timeout(BOUND):
        with pytest.raises(AbortError, match="early"):
            await pool.chat("fake", "hi", token=token)
        assert (await pool.chat("fake", "hi")).done
        await pool.aclose()


# -- drivers of their own --


DRIVER = """
import asyncio, sys
from ollama_async.ray import RayHost, RayPool
async def main(address, url):
    async with RayPool([RayHost(url, 2)], address=address) as pool:
        await pool.chat("fake", "hi")
asyncio.run(main(*sys.argv[1:]))
"""


def address() -> str:
    return str(ray.get_runtime_context().gcs_address)


async def test_kill_of_the_driver_closes_the_sockets(servers: Servers) -> None:
    one, _ = servers
    one.script("/api/chat", Reply([line("one "), Stall()]))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address(), one.url])
    try:
        await asked(servers, 1)
        begun = time.monotonic()
        os.kill(driver.pid, signal.SIGKILL)
        [request] = chats(servers)
        assert await asyncio.to_thread(request.connection.wait_left, BOUND)
        print(f"closed {time.monotonic() - begun:.2f} s after the driver was killed")
    finally:
        driver.kill()
        driver.wait(BOUND)


STREAMING_DRIVER = """
import asyncio, json, sys
from ollama_async.ray import RayHost, RayPool
async def read(stream, found):
    try:
        async for _ in stream:
            pass
    finally:
        found.append([stream.outcome, stream.text])
async def main(address, one, two):
    found = []
    hosts = [RayHost(one, 8, {"m1": 1}), RayHost(two, 8, {"m2": 1})]
    try:
        async with RayPool(hosts, address=address) as pool, asyncio.TaskGroup() as group:
            for n in range(16):
                group.create_task(read(pool.chat("fake", f"{n}", stream=True), found))
    finally:
        print(json.dumps(found))
asyncio.run(main(*sys.argv[1:]))
"""


async def test_ctrl_c_in_a_driver_closes_every_stream_and_keeps_the_partial_answers(servers: Servers) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.05), always=True)
    driver = start("-c", STREAMING_DRIVER, address(), *(server.url for server in servers))
    try:
        await asked(servers, 16)
        await asyncio.sleep(1.0)  # the chunks are on their way to the driver
        begun = time.monotonic()
        driver.send_signal(signal.SIGINT)
        for request in chats(servers):
            assert await asyncio.to_thread(request.connection.wait_left, BOUND)
        print(f"closed {time.monotonic() - begun:.2f} s after Ctrl-C")
        out, err = await asyncio.to_thread(driver.communicate, timeout=BOUND)
        found = json.loads(out)
        assert len(found) == len(chats(servers)) == 16, err
        assert all(outcome == "cancelled" and text.startswith("This") for outcome, text in found)
        assert "KeyboardInterrupt" in err
    finally:
        driver.kill()
        driver.communicate()


# -- the command --


def start(*arguments: str) -> subprocess.Popen[str]:
    # As on a terminal, where Ctrl-C is not ignored, whatever has started these tests.
    program = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", program, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OLLAMA_HOST"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(folder: Path, servers: Servers, count: int, *options: str) -> tuple[subprocess.Popen[str], Path]:
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"id": f"{n}", "prompt": f"{n}"}) + "\n" for n in range(count)))
    hosts = [part for server in servers for part in ("--host", f"{server.url}=4")]
    arguments = ["batch", str(source), "-o", str(output), "-m", "fake", *hosts, *options]
    return start("-m", "ollama_async", *arguments), output


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_the_command_runs_on_a_cluster_and_resumes(servers: Servers, tmp_path: Path) -> None:
    process, output = command(tmp_path, servers, 40, "--ray", address(), "--json")
    out, err = await asyncio.to_thread(process.communicate, timeout=BOUND)
    assert process.returncode == 0, err
    assert (json.loads(out)["done"], json.loads(out)["failed"]) == (40, 0)
    assert sorted(int(record["id"]) for record in records(output)) == list(range(40))
    assert {record["host"] for record in records(output)} == {server.url for server in servers}
    assert len(chats(servers)) == 40
    process, _ = command(tmp_path, servers, 44, "--ray", address(), "--json")
    out, err = await asyncio.to_thread(process.communicate, timeout=BOUND)
    assert (json.loads(out)["done"], json.loads(out)["skipped"]) == (4, 40), err
    assert len(chats(servers)) == 44


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_ends_the_command_and_keeps_the_partial_answers(
    servers: Servers, tmp_path: Path, number: int, status: int
) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.05), always=True)
    process, output = command(tmp_path, servers, 40, "--ray", address())
    try:
        await asked(servers, 8)
        await asyncio.sleep(1.0)  # the chunks are on their way to the driver
        begun = time.monotonic()
        process.send_signal(number)
        for request in chats(servers):
            assert await asyncio.to_thread(request.connection.wait_left, BOUND)
        print(f"closed {time.monotonic() - begun:.2f} s after the signal")
        _, err = await asyncio.to_thread(process.communicate, timeout=BOUND)
        assert process.returncode == status, err
        assert len(chats(servers)) == 8
        failed = records(output.with_name("out.jsonl.failed.jsonl"))
        assert len({record["id"] for record in failed}) == len(failed) == 8, err
        assert all(record["partial"]["text"].startswith("This") for record in failed)
        assert "8 stopped, partial answers kept" in err
    finally:
        process.kill()
        process.communicate()


async def test_the_command_says_that_there_is_no_cluster(servers: Servers, tmp_path: Path) -> None:
    process, output = command(tmp_path, servers, 4, "--ray", "127.0.0.1:1")
    _, err = await asyncio.to_thread(process.communicate, timeout=BOUND)
    assert process.returncode == 69, err
    assert "the Ray cluster at '127.0.0.1:1'" in err
    assert "ray start --head" in err
    assert not records(output)
