"""The short way of a request, past httpx: the same goes over the wire, and httpx still sees what concerns it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ollama_async import AsyncClient
from ollama_async.testing import FakeOllama, Reply

ANSWER = {"model": "m", "message": {"role": "assistant", "content": "hi"}, "done": True}


def with_headers(**headers: str) -> Reply:
    shown = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return Reply([ANSWER], headers=shown)


@pytest.fixture
async def client(fake_ollama: FakeOllama) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_ollama.url, headers={"X-Mine": "1"}) as made:
        yield made


async def ask(client: AsyncClient, **options: Any) -> Any:
    return await client.chat("fake", "hi", **options)


@pytest.mark.parametrize("call", ["chat", "ps", "delete"])
async def test_the_same_goes_over_the_wire_by_either_way(
    fake_ollama: FakeOllama, client: AsyncClient, call: str
) -> None:
    calls = {"chat": lambda: ask(client), "ps": client.ps, "delete": lambda: client.delete("fake")}
    fake_ollama.script("/api/chat", with_headers(), with_headers())
    fake_ollama.script("/api/delete", Reply(), Reply())
    await calls[call]()
    # A cookie that no request is for: httpx is on the way because of it, and adds nothing.
    client._client.cookies.set("a", "b", domain="elsewhere.example")
    await calls[call]()
    short, long = fake_ollama.requests
    assert (short.method, short.path, short.body) == (long.method, long.path, long.body)
    assert sorted(short.headers) == sorted(long.headers)
    assert short.header("x-mine") == "1"


async def test_the_short_way_is_taken(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    def send(*_: Any, **__: Any) -> Any:
        raise AssertionError("httpx is on the way")

    client._client.send = send
    assert (await ask(client)).done
    assert (await client.chat("fake", "hi", stream=True).collect()).done


async def test_a_cookie_is_kept_and_sent_with_the_next_request(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", with_headers(Set_Cookie="id=7"), with_headers())
    await ask(client)
    await ask(client)
    assert [request.header("cookie") for request in fake_ollama.requests] == [None, "id=7"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_redirect_is_followed_and_nothing_sent_twice(
    fake_ollama: FakeOllama, client: AsyncClient, stream: bool
) -> None:
    fake_ollama.script("/api/chat", Reply(status=307, headers={"Location": "/other"}))
    fake_ollama.script("/other", Reply([ANSWER]))
    if stream:
        reply = await client.chat("fake", "hi", stream=True).collect()
    else:
        reply = await ask(client)
    assert reply.message.content == "hi"
    assert [request.path for request in fake_ollama.requests] == ["/api/chat", "/other"]
    assert fake_ollama.requests[0].body == fake_ollama.requests[1].body


async def test_headers_of_a_call_are_for_that_call_only(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    await ask(client)
    await ask(client, headers={"X-Mine": "2"})
    await ask(client)
    assert [request.header("x-mine") for request in fake_ollama.requests] == ["1", "2", "1"]
