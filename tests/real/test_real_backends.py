"""HAProxy, nginx and Envoy in front of two servers, with the configurations of docs/proxies.md."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from real.ports import free_port
from real.proxies import Balancer
from real.test_real_proxies import REPLIES, line
from teardown.harness import BOUND, Baseline, nothing_left_behind, until

from ollama_async import AbortError, AsyncClient, CancelToken, ConnectionBroken, ServerError
from ollama_async.testing import FakeOllama, Reply, Reset, Stall

pytestmark = pytest.mark.real

KINDS = ["haproxy", "nginx", "envoy"]
Servers = tuple[FakeOllama, FakeOllama]


@pytest.fixture
def servers() -> Iterator[Servers]:
    with FakeOllama() as one, FakeOllama() as two:
        yield one, two


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(servers: Servers) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest.fixture(params=KINDS)
def proxy(request: pytest.FixtureRequest, servers: Servers, tmp_path: pathlib.Path) -> Iterator[Balancer]:
    with Balancer(tmp_path, request.param, [server.port for server in servers]) as program:
        yield program


def asked(servers: Servers) -> list[int]:
    """How many chats each server has been asked."""
    return [sum(request.path == "/api/chat" for request in server.requests) for server in servers]


@pytest.mark.parametrize("phase", [*REPLIES])
async def test_an_abort_reaches_the_server_that_runs_the_call(phase: str, servers: Servers, proxy: Balancer) -> None:
    for server in servers:
        server.script("/api/chat", REPLIES[phase])
    async with AsyncClient(proxy.url) as client:
        token = CancelToken()
        reading = asyncio.create_task(client.chat("fake", "hi", stream=True, token=token).collect())
        await until(lambda: sum(asked(servers)) == 1, "the request")
        [request] = [request for server in servers for request in server.requests if request.path == "/api/chat"]
        token.abort("stop")
        # An abort shuts the socket down before it returns; so the proxy acts while our loop stands still.
        assert request.connection.wait_left(BOUND)
        with pytest.raises(AbortError):
            await asyncio.wait_for(reading, BOUND)
    assert sum(asked(servers)) == 1


async def test_calls_at_once_go_to_different_servers_and_chunks_pass_as_they_come(
    servers: Servers, proxy: Balancer
) -> None:
    for server in servers:
        server.script("/api/chat", Reply([line("one "), Stall()]), Reply([line("one "), Stall()]))
    async with AsyncClient(proxy.url) as client:
        streams = [client.chat("fake", "hi", stream=True) for _ in range(4)]
        for stream in streams:
            assert (await asyncio.wait_for(anext(stream), BOUND)).message.content == "one "
        assert asked(servers) == [2, 2]
        client.abort("stop")


@pytest.mark.parametrize("kind", KINDS)
async def test_while_a_server_is_down_the_other_gets_all_calls(
    kind: str, servers: Servers, tmp_path: pathlib.Path
) -> None:
    _, up = servers
    with Balancer(tmp_path, kind, [free_port(), up.port]) as proxy:
        async with AsyncClient(proxy.url) as client:
            for _ in range(4):
                assert (await asyncio.wait_for(client.chat("fake", "hi"), BOUND)).done
    assert asked(servers) == [0, 4]


async def test_a_request_whose_server_dies_is_not_sent_again(servers: Servers, proxy: Balancer) -> None:
    for server in servers:
        server.script("/api/chat", Reply(before_head=[Reset()]), Reply(before_head=[Reset()]))
    async with AsyncClient(proxy.url) as client:
        with pytest.raises((ServerError, ConnectionBroken)):
            await asyncio.wait_for(client.chat("fake", "hi", stream=True).collect(), BOUND)
    assert sum(asked(servers)) == 1


@pytest.mark.parametrize("proxy", ["haproxy"], indirect=True)
async def test_a_call_that_waits_in_haproxy_is_aborted_there(servers: Servers, proxy: Balancer) -> None:
    for server in servers:
        server.script("/api/chat", *[Reply([line("one "), Stall()]) for _ in range(8)])
    async with AsyncClient(proxy.url) as client:
        running = [client.chat("fake", "hi", stream=True) for _ in range(8)]  # maxconn 4 on each of two
        for stream in running:
            await asyncio.wait_for(anext(stream), BOUND)
        token = CancelToken()
        waiting = asyncio.create_task(client.chat("fake", "hi", stream=True, token=token).collect())
        await asyncio.sleep(0.1)  # nothing tells that HAProxy has read it; without a queue it reaches a server by then
        assert asked(servers) == [4, 4]
        token.abort("stop")
        with pytest.raises(AbortError):
            await asyncio.wait_for(waiting, BOUND)
        # The next one gets the first free place: the aborted one is not in front of it any more.
        running[0].abort("stop")
        last = client.chat("fake", "hi", stream=True)
        assert (await asyncio.wait_for(anext(last), BOUND)).message.content == "one "
        assert sum(asked(servers)) == 9
        client.abort("stop")
