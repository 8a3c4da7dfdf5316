"""Whoever mocks or instruments httpx in the usual way is obeyed, and the contract holds where only somebody listens."""

from __future__ import annotations

import asyncio
import functools
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest import mock

import httpx
import pytest
import respx
from teardown.harness import BOUND, nothing_left_behind, until

from ollama_async import AbortError, AsyncClient, CancelToken, ResponseError
from ollama_async._wire.intercept import is_intercepted
from ollama_async.testing import FakeOllama, Gate, Reply

ANSWER = {"model": "m", "created_at": "x", "message": {"role": "assistant", "content": "mocked"}, "done": True}


@pytest.fixture
async def client(fake_ollama: FakeOllama) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_ollama.url) as client:
        yield client


async def test_a_core_that_another_thread_is_importing_has_nothing_replaced(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpcore", types.ModuleType("httpcore"))
    assert not is_intercepted()
    assert (await client.version()).version


# -- mocks --


@pytest.mark.parametrize("using", ["httpx", "httpcore"])
async def test_respx_answers_in_place_of_the_server(fake_ollama: FakeOllama, client: AsyncClient, using: str) -> None:
    with respx.mock(base_url=fake_ollama.url, using=using) as router:
        chat = router.post("/api/chat").respond(200, json=ANSWER)
        delete = router.delete("/api/delete").respond(200)
        assert (await client.chat("m", "hi")).message.content == "mocked"
        await client.delete("m")
        stream = client.chat("m", "hi", stream=True)
        assert [chunk.message.content async for chunk in stream] == ["mocked"]
        router.post("/api/generate").respond(404, json={"error": "no such model"})
        with pytest.raises(ResponseError, match="no such model"):
            await client.generate("m", "x")
    assert (chat.call_count, delete.call_count, fake_ollama.requests) == (2, 1, ())
    assert not is_intercepted()
    assert (await client.chat("fake", "hi")).done
    assert len(fake_ollama.requests) == 1


@pytest.mark.parametrize("using", ["httpx", "httpcore"])
async def test_respx_lets_through_what_it_is_told_to(fake_ollama: FakeOllama, client: AsyncClient, using: str) -> None:
    with respx.mock(base_url=fake_ollama.url, using=using) as router:
        route = router.post("/api/chat").pass_through()
        assert (await client.chat("fake", "hi", stream=True).collect()).done
    assert route.called
    assert len(fake_ollama.requests) == 1


async def test_pytest_httpx_answers_in_place_of_the_server(
    fake_ollama: FakeOllama, client: AsyncClient, httpx_mock: Any
) -> None:
    httpx_mock.add_response(url=f"{fake_ollama.url}/api/chat", json=ANSWER)
    assert (await client.chat("m", "hi")).message.content == "mocked"
    assert not fake_ollama.requests


async def test_mock_patch_of_a_method_is_awaited(client: AsyncClient) -> None:
    for name in ("chat", "generate", "pull", "push", "create", "embed", "list", "delete"):
        assert asyncio.iscoroutinefunction(getattr(client, name)) or sys.version_info >= (3, 14)
        with mock.patch.object(AsyncClient, name) as patched:
            assert isinstance(patched, mock.AsyncMock), name


# -- instrumentation --


def wrap_transport(seen: list[httpx.Request]) -> Callable[[], None]:
    """As OpenTelemetry's httpx instrumentation does, but for wrapt."""
    original = httpx.AsyncHTTPTransport.handle_async_request

    async def traced(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        request.headers["traceparent"] = "00-1-1-01"
        seen.append(request)
        return await original(self, request)

    httpx.AsyncHTTPTransport.handle_async_request = traced  # type: ignore[method-assign]
    return lambda: setattr(httpx.AsyncHTTPTransport, "handle_async_request", original)


def wrap_client(seen: list[httpx.Request]) -> Callable[[], None]:
    """As Sentry's httpx integration does."""
    original = httpx.AsyncClient.send

    @functools.wraps(original)
    async def traced(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        request.headers["traceparent"] = "00-1-1-01"
        seen.append(request)
        return await original(self, request, **options)

    httpx.AsyncClient.send = traced  # type: ignore[method-assign]
    return lambda: setattr(httpx.AsyncClient, "send", original)


@pytest.fixture(params=[wrap_transport, wrap_client], ids=["transport", "client"])
def traced(request: pytest.FixtureRequest) -> Iterator[list[httpx.Request]]:
    seen: list[httpx.Request] = []
    undo = request.param(seen)
    assert is_intercepted()
    yield seen
    undo()
    assert not is_intercepted()


async def test_an_instrumentation_sees_each_call_and_sets_its_header(
    fake_ollama: FakeOllama, client: AsyncClient, traced: list[httpx.Request]
) -> None:
    await client.chat("fake", "hi")
    assert [chunk.done async for chunk in client.chat("fake", "hi", stream=True)][-1]
    await client.version()
    assert [request.url.path for request in traced] == ["/api/chat", "/api/chat", "/api/version"]
    assert [dict(request.headers)["traceparent"] for request in fake_ollama.requests] == ["00-1-1-01"] * 3
    assert len(fake_ollama.connections) == 1


@pytest.mark.parametrize("how", ["abort", "cancel", "break"])
async def test_a_stop_closes_the_connection_at_once_also_when_somebody_listens(
    fake_ollama: FakeOllama, client: AsyncClient, traced: list[httpx.Request], how: str
) -> None:
    gate = Gate()
    async with nothing_left_behind():
        fake_ollama.script("/api/chat", Reply([{**ANSWER, "done": False}, gate]))
        token = CancelToken()
        stream = client.chat("m", "hi", stream=True, token=token)
        if how == "break":
            async for _ in stream:
                break
        else:
            await anext(stream)
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            token.abort("stop") if how == "abort" else reader.cancel()
            if how == "abort":
                assert fake_ollama.connections[0].wait_left(BOUND)
            with pytest.raises((AbortError, asyncio.CancelledError)):
                await reader
        await until(lambda: fake_ollama.connections[0].wait_left(0), "the server to see the end")
        assert stream.text == "mocked"
    assert len(traced) == 1
