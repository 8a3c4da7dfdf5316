"""What a model or a server cannot do is said before the request is sent."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
from teardown.harness import STOPS, nothing_left_behind, registrations, stop_the_reader, until

from ollama_async import (
    AsyncClient,
    CancelToken,
    CapabilityError,
    NotFoundError,
    PhaseTimeout,
    RequestError,
    Timeouts,
)
from ollama_async.testing import FakeOllama, Reply, Stall

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
IMAGE = "aGk="


def shown(*capabilities: str, **fields: object) -> Reply:
    return Reply.json({"capabilities": capabilities, **fields})


def paths(server: FakeOllama) -> list[str]:
    return [request.path.removeprefix("/api/") for request in server.requests]


async def call(client: AsyncClient, kind: str, *, stream: bool = False, **options: Any) -> Any:
    if kind == "embed":
        return await client.embed("fake", "hi", **options)
    made: Any = (client.chat if kind == "chat" else client.generate)("fake", stream=stream, **options)
    return await (made.collect() if stream else made)


NEEDS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("chat", {"tools": [TOOL]}, ("tools",)),
    ("chat", {"think": "low"}, ("thinking",)),
    ("chat", {"messages": [{"role": "user", "content": "what?", "images": [IMAGE]}]}, ("vision",)),
    ("chat", {"messages": "hi"}, ("completion",)),
    ("generate", {"prompt": "a", "suffix": "b"}, ("insert",)),
    ("generate", {"prompt": "a", "images": [IMAGE]}, ("vision",)),
    ("embed", {}, ("embedding",)),
]


@pytest.mark.parametrize(("kind", "options", "missing"), NEEDS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_is_missing_is_said_before_the_request(
    fake_ollama: FakeOllama, kind: str, options: dict[str, Any], missing: tuple[str, ...], stream: bool
) -> None:
    able = {"completion"} - set(missing)
    fake_ollama.script("/api/show", shown(*able, "audio"), shown("completion", *missing))
    fake_ollama.script("/api/chat", Reply.chat("a"), always=True)
    fake_ollama.script("/api/generate", Reply.generate("a"), always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(CapabilityError, match=missing[0]) as caught:
            await call(client, kind, stream=stream, preflight=True, **options)
        error = caught.value
        assert (error.model, error.missing, set(error.available)) == ("fake", missing, able | {"audio"})
        assert paths(fake_ollama) == ["show"]
        # A no is asked for again: the model may have been pulled anew.
        await call(client, kind, stream=stream, preflight=True, **options)
        # A yes is kept.
        await call(client, kind, stream=stream, preflight=True, **options)
    assert paths(fake_ollama) == ["show", "show", kind, kind]
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(copied), copied.missing) == (str(error), error.missing)


async def test_nothing_is_asked_by_default(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.chat("fake", "hi", tools=[TOOL])
        await client.embed("fake", "hi")
        await client.chat("fake", "hi", think=False, preflight=True)
    assert paths(fake_ollama) == ["chat", "embed", "show", "chat"]


@pytest.mark.parametrize(
    "answer", [Reply.error(404, "404 page not found"), Reply.error(500, "no"), Reply.json({}), Reply([b"<html>"])]
)
async def test_a_server_that_does_not_tell_is_asked_for_the_answer(fake_ollama: FakeOllama, answer: Reply) -> None:
    fake_ollama.script("/api/show", answer)
    async with AsyncClient(fake_ollama.url) as client:
        assert (await client.chat("fake", "hi", tools=[TOOL], preflight=True)).done


async def test_an_unknown_model_is_the_error_of_the_request(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(NotFoundError):
            await client.chat("other", "hi", preflight=True)
        with pytest.raises(NotFoundError):
            await client.require("other", "tools")


async def test_the_version_that_the_model_needs(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/show", shown("completion", requires="0.13.1"))
    fake_ollama.script("/api/version", Reply.json({"version": "0.12.9"}), Reply.json({"version": "0.13.1-rc2"}))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(CapabilityError, match=r"0\.12\.9, and fake needs 0\.13\.1") as caught:
            await client.chat("fake", "hi", preflight=True)
        assert (caught.value.missing, caught.value.available) == (("version",), ("0.12.9",))
        await client.chat("fake", "hi", preflight=True)
        await client.chat("fake", "hi", preflight=True)
    assert paths(fake_ollama) == ["show", "version", "version", "chat", "chat"]


@pytest.mark.parametrize(
    ("has", "wanted", "passes"),
    [
        ("0.9.10", "0.9.9", True),
        ("0.9.10", "0.10", False),
        ("v0.35.0", "0.35", True),
        ("0.0.0", "0.35", True),
        ("built by hand", "0.35", True),
        ("1.0", "0.35.9", True),
    ],
)
async def test_versions_are_compared_as_numbers(fake_ollama: FakeOllama, has: str, wanted: str, passes: bool) -> None:
    fake_ollama.script("/api/version", Reply.json({"version": has}))
    async with AsyncClient(fake_ollama.url) as client:
        if passes:
            await client.require("fake", version=wanted)
        else:
            with pytest.raises(CapabilityError, match=has):
                await client.require("fake", version=wanted)


async def test_require_says_what_is_missing(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.require("fake", "tools", "completion")
        with pytest.raises(CapabilityError, match="vision, thinking; it can: completion, embedding, tools"):
            await client.require("fake", "tools", "vision", "thinking")
        # What is not known is not there.
        fake_ollama.script("/api/show", Reply.json({}))
        with pytest.raises(CapabilityError, match="nothing that the server tells"):
            await client.require("fake", "vision")


async def test_what_makes_no_sense_is_refused(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        for bad in ({"version": "new"}, {"version": 1}):
            with pytest.raises(RequestError, match="version="):
                await client.require("fake", **bad)  # type: ignore[arg-type]
        for capability in ("", 1, None):
            with pytest.raises(RequestError, match="capability"):
                await client.require("fake", capability)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="preflight="):
            await client.chat("fake", "hi", preflight="yes")  # type: ignore[call-overload]
        with pytest.raises(RequestError, match="preflight="):
            await client.embed("fake", "hi", preflight=1)  # type: ignore[arg-type]
    assert fake_ollama.requests == ()


async def test_the_call_s_headers_and_limit_are_those_of_what_is_asked(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/show", shown("embedding"), Reply(before_head=[Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        await client.embed("fake", "hi", preflight=True, headers={"Authorization": "Bearer x"})
        assert [("authorization", "Bearer x") in request.headers for request in fake_ollama.requests] == [True] * 2
        with pytest.raises(PhaseTimeout) as caught:
            late = client.chat("other", "hi", preflight=True, timeout=Timeouts(total=0.1))
            # By itself the question may take five seconds.
            await asyncio.wait_for(late, 3)
        assert caught.value.phase == "total"


@pytest.mark.parametrize("way", STOPS)
async def test_a_stop_while_the_server_is_asked(fake_ollama: FakeOllama, way: str) -> None:
    fake_ollama.script("/api/show", Reply(before_head=[Stall()]))
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, preflight=True, token=token)
        reader = asyncio.create_task(stream.collect())
        await until(lambda: len(fake_ollama.requests) == 1, "the question")
        await stop_the_reader(way, reader, stream, token, client, fake_ollama)
    assert paths(fake_ollama) == ["show"]
    assert registrations(token) == 0
