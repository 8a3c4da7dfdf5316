"""nginx and HAProxy in front of a server: what it takes for a stop to get through, with the settings of the docs.

What the settings do is measured with a fake server, which can be silent when it is wanted, and proven on the real one.
``docs/deploying.md`` has the configurations (the tests read them there) and the results.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from real.ollama_server import RealOllama
from real.proxies import Haproxy, Nginx, Program, snippet, without
from teardown.harness import BOUND, Baseline, nothing_left_behind, ticks, until

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectionBroken,
    PermissionDeniedError,
    ResponseError,
    ServerError,
)
from ollama_async.testing import FakeOllama, Gate, Reply, Stall

pytestmark = pytest.mark.real

KINDS: dict[str, type[Nginx | Haproxy]] = {"nginx": Nginx, "haproxy": Haproxy}
HELD = 1.0  # seconds without a sign of the stop, after which a proxy counts as one that keeps it to itself
ENDLESS = {"num_predict": -1, "num_thread": 1}


def line(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}


REPLIES = {
    "before_headers": Reply(before_head=[Stall()]),
    "silent": Reply([line("one "), Stall()]),
    "flowing": Reply.endless_chat(0.02),
}


def configuration(kind: str, change: str) -> str:
    """The one of the docs, changed: "-x" leaves the lines out that begin with x, "a -> b" replaces."""
    config = snippet(kind)
    for step in filter(None, change.split("; ")):
        if step.startswith("-"):
            config = without(config, step[1:])
        else:
            old, new = step.split(" -> ")
            assert old in config
            config = config.replace(old, new)
    return config


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(server: FakeOllama) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


async def stop(server: FakeOllama, client: AsyncClient, phase: str) -> None:
    """Abort a stream in a phase of it."""
    server.script("/api/chat", REPLIES[phase])
    token = CancelToken()
    stream = client.chat("fake", "hi", stream=True, token=token)
    if phase == "before_headers":
        reader = asyncio.create_task(stream.collect())
        await asyncio.to_thread(server.wait_for_requests, 1, timeout=BOUND)
        await ticks(20)
        token.abort("stop")
        with pytest.raises(AbortError):
            await asyncio.wait_for(reader, BOUND)
    else:
        await asyncio.wait_for(anext(stream), BOUND)
        token.abort("stop")


@pytest.mark.parametrize("phase", [*REPLIES])
@pytest.mark.parametrize(
    ("kind", "change", "held_in"),
    [
        ("nginx", "", set()),
        ("nginx", "-proxy_buffering", set()),
        ("nginx", "proxy_pass -> proxy_ignore_client_abort on;proxy_pass", {"before_headers", "silent"}),
        ("haproxy", "", set()),
        ("haproxy", "-option abortonclose", {"before_headers", "silent"}),
    ],
)
async def test_which_settings_let_an_abort_through(
    kind: str, change: str, held_in: set[str], phase: str, server: FakeOllama, tmp_path: pathlib.Path
) -> None:
    with KINDS[kind](tmp_path, configuration(kind, change), server.port) as proxy:
        async with AsyncClient(proxy.url) as client:
            await stop(server, client, phase)
            left = server.requests[0].connection.wait_left
            if phase in held_in:
                assert not await asyncio.to_thread(left, HELD)
            else:
                # An abort shuts the socket down before it returns; so the proxy acts while our loop stands still.
                assert left(BOUND)


@pytest.mark.parametrize(
    ("kind", "change", "comes"),
    [
        ("nginx", "", True),
        ("nginx", "-proxy_http_version", True),
        ("nginx", "-proxy_http_version; -proxy_buffering", False),
        ("haproxy", "", True),
    ],
)
async def test_which_settings_let_each_chunk_through_as_it_comes(
    kind: str, change: str, comes: bool, server: FakeOllama, tmp_path: pathlib.Path
) -> None:
    gates = [Gate(), Gate()]
    server.script("/api/chat", Reply([line("one "), gates[0], line("two "), gates[1], line("", done=True)]))
    with KINDS[kind](tmp_path, configuration(kind, change), server.port) as proxy:
        async with AsyncClient(proxy.url) as client:
            stream = client.chat("fake", "hi", stream=True)
            if comes:
                for gate, text in zip(gates, ("one ", "two "), strict=True):
                    assert (await asyncio.wait_for(anext(stream), BOUND)).message.content == text
                    gate.open()
            else:
                first = asyncio.ensure_future(anext(stream))
                await asyncio.to_thread(gates[0].wait_reached, BOUND)
                assert not (await asyncio.wait([first], timeout=HELD))[0]
                for gate in gates:
                    gate.open()
                assert (await asyncio.wait_for(first, BOUND)).message.content == "one "
            assert (await asyncio.wait_for(stream.collect(), BOUND)).message.content == "one two "


@pytest.mark.parametrize(("kind", "limit"), [("nginx", "proxy_read_timeout 1h"), ("haproxy", "timeout server 1h")])
async def test_a_proxy_that_loses_patience_is_a_server_error_or_a_broken_connection(
    kind: str, limit: str, server: FakeOllama, tmp_path: pathlib.Path
) -> None:
    config = configuration(kind, f"{limit} -> {limit.replace('1h', '1s')}")
    with KINDS[kind](tmp_path, config, server.port) as proxy:
        async with AsyncClient(proxy.url) as client:
            server.script("/api/chat", REPLIES["before_headers"], REPLIES["silent"])
            with pytest.raises(ServerError) as caught:
                await asyncio.wait_for(client.chat("fake", "hi", stream=True).collect(), BOUND)
            assert caught.value.status_code == 504
            stream = client.chat("fake", "hi", stream=True)
            with pytest.raises(ConnectionBroken) as broken:
                await asyncio.wait_for(stream.collect(), BOUND)
            assert broken.value.partial.message.content == "one "


async def test_nginx_takes_large_bodies_only_when_told_to(server: FakeOllama, tmp_path: pathlib.Path) -> None:
    question = "x" * (1 << 21)
    with Nginx(tmp_path, configuration("nginx", "-client_max_body_size"), server.port) as proxy:
        async with AsyncClient(proxy.url) as client:
            # nginx answers, or closes, before it has read everything.
            with pytest.raises((ResponseError, ConnectionBroken)):
                await asyncio.wait_for(client.chat("fake", question), BOUND)
    assert server.requests == ()


# -- the real server behind the configurations of the docs --


@pytest.fixture(params=[*KINDS])
def proxy(request: pytest.FixtureRequest, real_ollama: RealOllama, tmp_path: pathlib.Path) -> Iterator[Program]:
    with KINDS[request.param](tmp_path, snippet(request.param), real_ollama.port) as program:
        yield program


async def test_a_stop_reaches_ollama(real_ollama: RealOllama, proxy: Program) -> None:
    async with AsyncClient(proxy.url) as client:
        for way in ("abort", "cancel", "break"):
            mark = real_ollama.mark()
            token = CancelToken()
            stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, token=token)
            if way == "break":
                async for _ in stream:
                    break
            elif way == "abort":
                await anext(stream)
                token.abort("stop")
            else:
                reader = asyncio.create_task(stream.collect())
                await until(lambda stream=stream: stream.timing.chunks, "the first chunk")
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            real_ollama.wait_for_request_end(mark, timeout=BOUND)
        real_ollama.wait_until_idle()
        assert (await client.chat(real_ollama.model, "hi", options={"num_predict": 3})).eval_count == 3


async def test_an_answer_comes_whole_and_uploads_pass(
    real_ollama: RealOllama, proxy: Program, tmp_path: pathlib.Path
) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 22))  # never seen before: what the server has already it does not read
    async with AsyncClient(proxy.url) as client:
        answer = await client.chat(real_ollama.model, "hi", stream=True, options={"num_predict": 200}).collect()
        assert answer.eval_count == 200
        digest = await client.create_blob(big)
        assert await client.blob_exists(digest)


@pytest.mark.parametrize(
    ("kind", "change", "accepted"),
    [
        ("nginx", "", True),
        ("nginx", "proxy_pass -> proxy_set_header Host $host;proxy_pass", False),
        ("haproxy", "", True),
        ("haproxy", "-http-request set-header Host", False),
    ],
)
async def test_ollama_refuses_the_name_of_the_proxy(
    kind: str, change: str, accepted: bool, real_ollama: RealOllama, tmp_path: pathlib.Path
) -> None:
    with KINDS[kind](tmp_path, configuration(kind, change), real_ollama.port) as proxy:
        async with AsyncClient(proxy.url, headers={"Host": "models.example"}) as client:
            if accepted:
                assert (await client.version()).version
            else:
                with pytest.raises(PermissionDeniedError):
                    await client.version()
