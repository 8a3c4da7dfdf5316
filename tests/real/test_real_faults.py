"""A real server behind a bad network: Toxiproxy between the client and Ollama.

Whatever the network does, a stop is answered at once, a limit of time goes off, and what had come is kept. The times
that stops took are printed (``pytest -s``); the bounds only tell "at once" from "when the network comes back".
"""

from __future__ import annotations

import asyncio
import pathlib
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from real.ollama_server import RealOllama, established, poll
from real.proxies import Toxiproxy
from teardown.harness import BOUND, Baseline, nothing_left_behind, ticks, until

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectError,
    ConnectionBroken,
    PhaseTimeout,
    StreamClosed,
    Timeouts,
)

pytestmark = pytest.mark.real

ENDLESS = {"num_predict": -1, "num_thread": 1}
NO_LIMIT = Timeouts(idle=None)
LONG = 60_000  # milliseconds; longer than any bound here

# What the network does to what the server sends, and (but for the slicer) to what the client sends.
DEAD: dict[str, list[tuple[str, str, dict[str, int]]]] = {
    "latency": [("latency", way, {"latency": LONG}) for way in ("downstream", "upstream")],
    "black_hole": [("timeout", way, {"timeout": 0}) for way in ("downstream", "upstream")],
    "bandwidth": [("bandwidth", way, {"rate": 1}) for way in ("downstream", "upstream")],
    "slicer": [("slicer", "downstream", {"average_size": 1, "size_variation": 0, "delay": 200_000})],
}


@pytest.fixture
def network(real_ollama: RealOllama, tmp_path: pathlib.Path) -> Iterator[Toxiproxy]:
    with Toxiproxy(tmp_path, real_ollama.port) as program:
        yield program


@pytest_asyncio.fixture
async def nothing_left(network: Toxiproxy) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(network: Toxiproxy, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(network.link_url, timeout=NO_LIMIT) as made:
        yield made


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()


def infect(network: Toxiproxy, fault: str) -> None:
    for kind, way, attributes in DEAD[fault]:
        network.add(kind, way, **attributes)


def gone(network: Toxiproxy) -> None:
    """Block this thread, and with it the loop, until the kernel has no connection to the proxy that stands."""
    poll(lambda: established(network.link) == 0, "the end of the connection", timeout=BOUND)


@pytest.mark.parametrize("fault", [*DEAD])
@pytest.mark.parametrize("way", ["abort", "thread", "cancel", "aclose"])
async def test_a_stop_does_not_wait_for_the_network(
    fault: str, way: str, network: Toxiproxy, client: AsyncClient, token: CancelToken, real_ollama: RealOllama
) -> None:
    mark = real_ollama.mark()
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, token=token)
    await anext(stream)
    infect(network, fault)
    reader = asyncio.create_task(stream.collect())
    await ticks(20)
    begun = time.perf_counter()
    if way == "abort":
        token.abort("stop")
    elif way == "thread":
        thread = threading.Thread(target=token.abort, args=("stop",))
        thread.start()
        thread.join(BOUND)
    elif way == "cancel":
        reader.cancel()
        await ticks(2)
    else:
        await stream.aclose()
    took = time.perf_counter() - begun
    gone(network)
    expected = {"cancel": asyncio.CancelledError, "aclose": StreamClosed}.get(way, AbortError)
    with pytest.raises(expected):
        await asyncio.wait_for(reader, BOUND)
    print(f"{way} under {fault}: {took * 1e3:.2f} ms")
    assert took < BOUND / 2
    assert stream.text
    network.stop()  # what it still held back is lost now, and with it the way to the server
    await asyncio.to_thread(real_ollama.wait_for_request_end, mark, timeout=BOUND)
    async with AsyncClient(real_ollama.url) as direct:
        assert (await direct.chat(real_ollama.model, "hi", options={"num_predict": 1})).done


@pytest.mark.parametrize("fault", ["latency", "black_hole"])
async def test_a_stop_before_the_headers_does_not_wait_for_the_network(
    fault: str, network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    infect(network, fault)
    took: list[float] = []
    for _ in range(10):
        each = CancelToken()
        call = asyncio.create_task(client.chat(real_ollama.model, "hi", token=each))
        await until(lambda: established(network.link) > 0, "the connection")
        await ticks(20)
        begun = time.perf_counter()
        each.abort("stop")
        took.append(time.perf_counter() - begun)
        gone(network)
        with pytest.raises(AbortError):
            await asyncio.wait_for(call, BOUND)
    print(f"abort before the headers under {fault}: median {statistics.median(took) * 1e3:.2f} ms, {max(took):.4f} s")
    assert max(took) < BOUND / 2


async def test_the_idle_limit_fires_in_a_black_hole_and_keeps_the_partial_answer(
    network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, timeout=Timeouts(idle=2))
    seen = [(await anext(stream)).message.content]
    infect(network, "black_hole")
    with pytest.raises(PhaseTimeout) as caught:
        async for chunk in stream:
            seen.append(chunk.message.content)
    gone(network)
    assert caught.value.phase == "idle"
    assert caught.value.partial.message.content == stream.text == "".join(seen)


@pytest.mark.parametrize("fault", ["latency", "black_hole"])
async def test_the_first_chunk_limit_goes_off(
    fault: str, network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    infect(network, fault)
    with pytest.raises(PhaseTimeout) as caught:
        await client.chat(real_ollama.model, "hi", stream=True, timeout=Timeouts(first_chunk=0.3)).collect()
    gone(network)
    assert caught.value.phase == "first_chunk"
    assert caught.value.partial is None


async def test_the_total_limit_goes_off_in_a_trickle(
    network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    infect(network, "bandwidth")
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, timeout=Timeouts(total=4))
    with pytest.raises(PhaseTimeout) as caught:
        await stream.collect()
    gone(network)
    assert caught.value.phase == "total"
    assert stream.text


@pytest.mark.parametrize("fault", ["latency", "slicer", "bandwidth"])
async def test_a_slow_network_changes_no_byte(
    fault: str, network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    options = {"num_predict": 60, "seed": 1, "temperature": 0.0}
    async with AsyncClient(real_ollama.url) as direct:
        expected = await direct.chat(real_ollama.model, "hi", options=options)
    if fault == "latency":
        network.add("latency", latency=100, jitter=50)
    elif fault == "slicer":
        network.add("slicer", average_size=7, size_variation=5, delay=100)
    else:
        network.add("bandwidth", rate=20)
    answer = await client.chat(real_ollama.model, "hi", stream=True, options=options).collect()
    assert answer.message.content == expected.message.content
    assert answer.eval_count == 60


@pytest.mark.parametrize("fault", ["reset_peer", "limit_data", "disabled"])
async def test_a_connection_that_breaks_in_the_middle_keeps_the_partial_answer(
    fault: str, network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    mark = real_ollama.mark()
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS)
    seen: list[Any] = [(await anext(stream)).message.content]
    with pytest.raises(ConnectionBroken) as caught:
        broken = asyncio.create_task(break_connection(network, fault))
        async for chunk in stream:
            seen.append(chunk.message.content)
    await broken
    assert caught.value.partial.message.content == stream.text == "".join(seen)
    await asyncio.to_thread(real_ollama.wait_for_request_end, mark, timeout=BOUND)


async def break_connection(network: Toxiproxy, fault: str) -> None:
    if fault == "disabled":
        await asyncio.to_thread(network.enable, enabled=False)
    elif fault == "limit_data":
        await asyncio.to_thread(network.add, "limit_data", bytes=2000)
    else:
        await asyncio.to_thread(network.add, "reset_peer", timeout=0)


async def test_a_connection_that_is_reset_before_the_headers(
    network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    network.add("reset_peer", timeout=50)
    with pytest.raises(ConnectionBroken) as caught:
        await client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS).collect()
    assert caught.value.partial is None


async def test_a_network_that_is_down_and_up_again(
    network: Toxiproxy, client: AsyncClient, real_ollama: RealOllama
) -> None:
    assert (await client.version()).version
    network.enable(enabled=False)
    with pytest.raises(ConnectError):
        await client.version()
    network.enable(enabled=True)
    assert (await client.version()).version
