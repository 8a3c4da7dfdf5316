"""Through a proxy of HTTP: the fake server is the proxy, and is asked for addresses that are not its own."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest
from teardown.harness import BOUND, in_thread, nothing_left_behind

from ollama_async import AbortError, AsyncClient, CancelToken, ConnectError, RequestError
from ollama_async.testing import Block, FakeOllama, Reply, Stall

ELSEWHERE = "http://models.example:8080"
ONE = {"model": "fake", "message": {"role": "assistant", "content": "one "}, "done": False}


async def test_a_request_goes_to_the_proxy_and_names_the_server(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(ELSEWHERE, proxy=fake_ollama.url) as client:
        assert (await client.version()).version
    [request] = fake_ollama.requests
    assert dict(request.headers)["host"] == "models.example:8080"


async def test_the_proxy_of_the_environment(fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake_ollama.url)
    monkeypatch.setenv("http_proxy", fake_ollama.url)
    async with AsyncClient(ELSEWHERE) as client:
        assert (await client.version()).version
    assert len(fake_ollama.requests) == 1


async def test_one_client_in_several_loops_one_after_the_other(fake_ollama: FakeOllama) -> None:
    client = AsyncClient(ELSEWHERE, proxy=fake_ollama.url)

    async def twice() -> list[str]:
        return [(await client.version()).version for _ in range(2)]

    def run() -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return asyncio.run(twice())

    for number in range(3):
        assert len(in_thread(run)) == 2
        assert fake_ollama.connections[number].wait_left(BOUND), "what was idle is closed when its loop ends"
    assert [len(record.requests) for record in fake_ollama.connections] == [2, 2, 2]
    await client.aclose()


async def test_two_loops_at_once(fake_ollama: FakeOllama) -> None:
    client = AsyncClient(ELSEWHERE, proxy=fake_ollama.url)
    await client.version()
    assert in_thread(lambda: asyncio.run(client.version())).version
    await client.version()
    assert [len(record.requests) for record in fake_ollama.connections] == [2, 1]
    await client.aclose()


@pytest.mark.parametrize("stage", ["before_the_head", "within"])
async def test_an_abort_closes_the_connection_to_the_proxy(fake_ollama: FakeOllama, stage: str) -> None:
    stall: list[Any] = [Stall()]
    reply = Reply(before_head=stall) if stage == "before_the_head" else Reply([Block(ONE), Stall()])
    fake_ollama.script("/api/chat", reply)
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(ELSEWHERE, proxy=fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, token=token)
        if stage == "within":
            await anext(stream)
        reading = asyncio.create_task(stream.collect())
        await asyncio.to_thread(fake_ollama.wait_for_requests)
        token.abort("stop")
        with pytest.raises(AbortError):
            await asyncio.wait_for(reading, BOUND)
        assert await asyncio.to_thread(fake_ollama.connections[0].wait_left, BOUND)


async def test_a_proxy_that_is_not_there() -> None:
    async with AsyncClient(ELSEWHERE, proxy="http://127.0.0.1:1") as client:
        with pytest.raises(ConnectError):
            await client.version()


@pytest.mark.parametrize("proxy", ["nonsense", "ftp://a"])
def test_an_address_that_is_no_proxys(proxy: str) -> None:
    with pytest.raises(RequestError, match="proxy"):
        AsyncClient(ELSEWHERE, proxy=proxy)
