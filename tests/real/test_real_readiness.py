"""Readiness, and a model that hangs, on a real server with one slot.

The server loses its slot when a client leaves while a token is on its way to it: see ``benchmarks/server_leak.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
from real.ollama_server import MODEL, RealOllama, need_server, poll
from real.tiny_model import CONTEXT
from teardown.harness import Baseline, nothing_left_behind

from ollama_async import (
    AbortError,
    AsyncClient,
    CapabilityError,
    HungModel,
    ModelNotReady,
    NotFoundError,
    Timeouts,
)

pytestmark = pytest.mark.real

ENDLESS = {"num_predict": -1}
ONE = {"num_predict": 1}
# One token takes some milliseconds, and a load 0.4 s.
LIMITS = Timeouts(first_chunk=4.0, total=60.0)
# One abort in ten to ninety costs the slot.
ABORTS = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealOllama]:
    folder = tmp_path_factory.mktemp("one-slot")
    with RealOllama(need_server(), folder, OLLAMA_NUM_PARALLEL="1") as started:
        yield started


@pytest_asyncio.fixture
async def nothing_left() -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(server: RealOllama, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    server.unload()
    async with AsyncClient(server.url) as made:
        yield made
    server.unload()


async def lose_the_slot(client: AsyncClient, server: RealOllama) -> None:
    """Leave answers until one has cost the server its slot."""
    for _ in range(ABORTS):
        mark = server.mark()
        stream = client.chat(MODEL, "hi", stream=True, options=ENDLESS)
        await anext(stream)
        reader = asyncio.create_task(stream.collect())
        await asyncio.sleep(random.uniform(0.002, 0.05))
        stream.abort()
        with contextlib.suppress(AbortError):
            await reader
        await asyncio.to_thread(server.wait_for_request_end, mark)
        try:
            await client.chat(MODEL, "hi", options=ONE, timeout=Timeouts(first_chunk=3.0))
        except TimeoutError:
            return
    pytest.skip(f"the server has lost no slot in {ABORTS} aborts")


async def test_a_model_that_has_lost_its_slot_is_recognised_and_healed(client: AsyncClient, server: RealOllama) -> None:
    await lose_the_slot(client, server)
    before = server.runner_pids()
    with pytest.raises(HungModel, match="unload it"):
        await client.chat(MODEL, "hi", options=ONE, timeout=LIMITS, recover=False)
    assert server.runner_pids() == before
    # Several at once: each has a limit of its own, and they have the model unloaded once. That is told by how often it
    # is loaded, not by requests: a model that was not idle since its load is also asked whether it takes one.
    mark = server.mark()
    calls = [client.chat(MODEL, "hi", options=ONE, timeout=LIMITS, recover=True) for _ in range(3)]
    assert [reply.text != "" for reply in await asyncio.gather(*calls)] == [True] * 3
    assert set(server.runner_pids()).isdisjoint(before)
    assert server.loads(mark) == 1


@contextlib.contextmanager
def held_while_it_loads(server: RealOllama) -> Iterator[Callable[[], None]]:
    """Have the next load take until the block ends; to be called once the load has been asked for."""
    held: list[int] = []

    def hold() -> None:
        held.extend(poll(server.runner_pids, "a runner", timeout=10))
        for pid in held:
            os.kill(pid, signal.SIGSTOP)

    try:
        yield hold
    finally:
        # The server ends a runner whose load nobody waits for.
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def test_a_model_that_is_loading_does_not_hang(client: AsyncClient, server: RealOllama) -> None:
    mark = server.mark()
    with held_while_it_loads(server) as hold:
        limits = Timeouts(first_chunk=1.0)
        asking = asyncio.create_task(client.chat(MODEL, "hi", options=ONE, timeout=limits, recover=True))
        await asyncio.to_thread(hold)
        with pytest.raises(TimeoutError) as caught:
            await asking
        assert not isinstance(caught.value, HungModel)
        assert server.request_ends(mark, "/api/generate") == []


async def test_a_model_is_not_unloaded_while_it_answers_another_call(client: AsyncClient, server: RealOllama) -> None:
    await client.load(MODEL)
    other = client.chat(MODEL, "hi", stream=True, options=ENDLESS)
    await anext(other)
    before = server.runner_pids()
    reader = asyncio.create_task(other.collect())
    with pytest.raises(TimeoutError):
        await client.chat(MODEL, "hi", options=ONE, timeout=Timeouts(first_chunk=0.5), recover=True)
    assert server.runner_pids() == before
    assert not reader.done()
    other.abort()
    with pytest.raises(AbortError):
        await reader


async def test_a_block_loads_keeps_and_unloads(client: AsyncClient, server: RealOllama) -> None:
    async with client.loaded(MODEL, num_ctx=512, keep_alive="4s") as model:
        runners = server.runner_pids()
        assert (model.context_length, model.vram_share) == (512, 0.0)
        await client.chat(MODEL, "hi", options=ONE)
        await client.generate(MODEL, "hi", options=ONE)
        # Longer than the server would keep it by itself.
        await asyncio.sleep(6.0)
        assert server.runner_pids() == runners
        assert await client.context_length(MODEL) == 512
    async with asyncio.timeout(10):
        while (await client.ps()).models:
            await asyncio.sleep(0.05)


async def test_a_call_without_the_block_s_context_would_load_it_anew(client: AsyncClient, server: RealOllama) -> None:
    await client.load(MODEL, options={"num_ctx": 512})
    runners = server.runner_pids()
    await client.chat(MODEL, "hi", options=ONE)
    assert server.runner_pids() != runners


async def test_an_abort_while_it_loads(client: AsyncClient, server: RealOllama) -> None:
    mark = server.mark()
    entering = asyncio.create_task(client.loaded(MODEL).__aenter__())
    await asyncio.to_thread(server.wait_for_load, mark)
    client.abort()
    with pytest.raises(AbortError):
        await entering
    await asyncio.to_thread(server.wait_for_connections, 0)


async def test_what_the_server_cannot_do(client: AsyncClient) -> None:
    with pytest.raises(ModelNotReady, match=f"{CONTEXT} tokens, not {2 * CONTEXT}"):
        await client.loaded(MODEL, num_ctx=2 * CONTEXT).__aenter__()
    with pytest.raises(ModelNotReady, match="0% of it is in VRAM"):
        await client.loaded(MODEL, min_vram_share=0.5).__aenter__()
    with pytest.raises(NotFoundError):
        await client.loaded("nobody-has-this").__aenter__()
    with pytest.raises(CapabilityError, match="vision"):
        await client.chat(MODEL, [{"role": "user", "content": "?", "images": ["aGk="]}], preflight=True)
    await client.require(MODEL, "completion")
