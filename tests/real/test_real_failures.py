"""A real server that fails: killed, restarted, without its runner, out of memory, full."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from real.ollama_server import RealOllama, need_server, poll
from real.tiny_model import write_tiny_model
from teardown.harness import Baseline, nothing_left_behind, until

from ollama_async import (
    AbortError,
    AsyncClient,
    ConnectError,
    ConnectionBroken,
    PhaseTimeout,
    ServerBusyError,
    ServerError,
    Stream,
    StreamError,
    Timeouts,
)

pytestmark = pytest.mark.real

ENDLESS = {"num_predict": -1, "num_thread": 1}
ONE = {"num_predict": 1, "num_thread": 1}
PATIENCE = 30.0  # seconds for whatever waits for a model to be loaded


@pytest.fixture(scope="module")
def _mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealOllama]:
    # One model and one waiting request at a time, so that the server is soon full.
    settings = {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_MAX_QUEUE": "1", "OLLAMA_MAX_LOADED_MODELS": "1"}
    with RealOllama(need_server(), tmp_path_factory.mktemp("mortal"), **settings) as server:
        yield server


@pytest.fixture
def mortal(_mortal: RealOllama) -> RealOllama:
    """A server that may be harmed. Its model is loaded anew: an earlier stop may have cost it its only slot."""
    _mortal.unload()
    return _mortal


@pytest_asyncio.fixture
async def nothing_left(mortal: RealOllama) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(mortal: RealOllama, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(mortal.url) as made:
        yield made


async def read_on(stream: Stream[Any], seen: list[Any]) -> None:
    async for chunk in stream:
        seen.append(chunk.message.content)


async def test_a_server_that_is_killed_in_the_middle_and_comes_back(client: AsyncClient, mortal: RealOllama) -> None:
    stream = client.chat(mortal.model, "hi", stream=True, options=ENDLESS)
    seen: list[Any] = []
    reader = asyncio.create_task(read_on(stream, seen))
    await until(lambda: len(seen) > 5, "some chunks")
    try:
        await asyncio.to_thread(mortal.kill)
        with pytest.raises(ConnectionBroken) as caught:
            await asyncio.wait_for(reader, PATIENCE)
        assert caught.value.partial.message.content == stream.text == "".join(seen)
        with pytest.raises(ConnectError):
            await client.version()
    finally:
        await asyncio.to_thread(mortal.start)
    answer = await asyncio.wait_for(client.chat(mortal.model, "hi", options={**ONE, "num_predict": 3}), PATIENCE)
    assert answer.eval_count == 3


async def test_kept_connections_of_a_server_that_was_restarted_are_not_used(
    client: AsyncClient, mortal: RealOllama
) -> None:
    await asyncio.gather(*(client.version() for _ in range(5)))
    await asyncio.to_thread(mortal.stop)
    await asyncio.to_thread(mortal.start)
    for _ in range(5):
        assert (await client.version()).version


async def test_a_call_is_sent_again_until_the_server_is_back(mortal: RealOllama, nothing_left: Baseline) -> None:
    async with AsyncClient(mortal.url, retries=30) as client:
        await asyncio.to_thread(mortal.stop)
        call = asyncio.create_task(client.chat(mortal.model, "hi", options=ONE))
        await asyncio.to_thread(mortal.start)
        assert (await asyncio.wait_for(call, 2 * PATIENCE)).done


async def test_a_runner_that_is_killed_is_an_error_of_the_stream(client: AsyncClient, mortal: RealOllama) -> None:
    stream = client.chat(mortal.model, "hi", stream=True, options=ENDLESS)
    seen: list[Any] = []
    reader = asyncio.create_task(read_on(stream, seen))
    await until(lambda: len(seen) > 5, "some chunks")
    for pid in mortal.runner_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(StreamError) as caught:
        await asyncio.wait_for(reader, PATIENCE)
    assert caught.value.partial.message.content == stream.text == "".join(seen)
    await asyncio.to_thread(poll, lambda: not mortal.runner_pids(), "the end of the runner", timeout=PATIENCE)
    assert (await asyncio.wait_for(client.chat(mortal.model, "hi", options=ONE), PATIENCE)).done


async def test_a_model_that_does_not_fit_into_memory(
    client: AsyncClient, mortal: RealOllama, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "vast.gguf"
    write_tiny_model(file, blocks=16, context=1 << 30)  # 1 TB of cache
    digest = await client.create_blob(file)
    await client.create("vast", files={file.name: digest}, parameters={"num_thread": 1})
    with pytest.raises(ServerError, match="memory") as caught:
        await asyncio.wait_for(client.chat("vast", "hi", stream=True, options={"num_ctx": 1 << 30}).collect(), PATIENCE)
    assert caught.value.status_code == 500
    assert not isinstance(caught.value, ServerBusyError)
    assert (await asyncio.wait_for(client.chat(mortal.model, "hi", options=ONE), PATIENCE)).done


def has_room(server: RealOllama) -> bool:
    """Unload the model, which gives lost slots back, and see whether the server answers."""
    with contextlib.suppress(OSError):
        server.unload()
        server.generate(1, timeout=PATIENCE)
        return True
    return False


async def test_a_full_server_and_an_abort_in_its_queue(client: AsyncClient, mortal: RealOllama) -> None:
    busy = client.chat(mortal.model, "hi", stream=True, options={**ENDLESS, "num_ctx": 512})
    await anext(busy)
    # Another context needs a runner of its own, for which there is no place: these wait, until the queue is full.
    waiting: list[Stream[Any]] = []
    readers: list[asyncio.Task[Any]] = []
    while not any(reader.done() for reader in readers):
        assert len(readers) < 20
        waiting.append(client.chat(mortal.model, "hi", stream=True, options={**ONE, "num_ctx": 1024}))
        readers.append(asyncio.create_task(waiting[-1].collect()))
        await asyncio.wait(readers, timeout=0.2)
    refused = 0
    for stream, reader in zip(waiting, readers, strict=True):
        if stream.abort("not worth the wait"):
            with pytest.raises(AbortError):
                await asyncio.wait_for(reader, PATIENCE)
        else:
            with pytest.raises(ServerBusyError) as caught:
                await reader
            assert caught.value.status_code == 503
            refused += 1
    assert 0 < refused < len(readers)
    mark = mortal.mark()
    busy.abort("make room")
    await asyncio.to_thread(mortal.wait_for_request_end, mark)
    # It takes the server a moment to forget those that waited; until then it is full.
    await asyncio.to_thread(poll, lambda: has_room(mortal), "room at the server", timeout=PATIENCE)
    assert (await asyncio.wait_for(client.chat(mortal.model, "hi", options=ONE), PATIENCE)).done


async def test_a_limit_that_goes_off_where_no_slot_is_free_says_what_to_look_at(
    client: AsyncClient, mortal: RealOllama
) -> None:
    busy = client.chat(mortal.model, "hi", stream=True, options=ENDLESS)
    await anext(busy)
    with pytest.raises(PhaseTimeout, match=r"/api/version and /api/ps answer.*keep_alive=0") as caught:
        await client.chat(mortal.model, "hi", options=ONE, timeout=Timeouts(first_chunk=0.5))
    assert caught.value.phase == "first_chunk"
    assert (await client.version()).version
    assert [model.model for model in (await client.ps()).models] == [f"{mortal.model}:latest"]
    mark = mortal.mark()
    busy.abort("make room")
    await asyncio.to_thread(mortal.wait_for_request_end, mark)
    # Whether that abort has lost the slot or not: this gives it back.
    await asyncio.to_thread(mortal.unload)
    assert (await asyncio.wait_for(client.chat(mortal.model, "hi", options=ONE), PATIENCE)).done
