"""``client.loaded()``: what the server sees of a block that keeps a model, and what each stop leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from teardown.harness import BOUND, nothing_left_behind, registrations, until

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ModelNotReady,
    NotFoundError,
    PhaseTimeout,
    ProgressResponse,
    RequestError,
    StreamClosed,
    StreamError,
    Timeouts,
)
from ollama_async.testing import FakeOllama, Pause, Reply, Stall

STALL = Reply(before_head=[Stall()])
UNKNOWN = Reply.error(404, "model 'fake' not found")


def paths(server: FakeOllama) -> list[str]:
    return [request.path.removeprefix("/api/") for request in server.requests]


def bodies(server: FakeOllama, path: str) -> list[dict[str, Any]]:
    return [request.json() for request in server.requests if request.path == path]


def listed(context: int, *, vram: int = 100) -> Reply:
    model = {"name": "fake:latest", "model": "fake:latest", "size": 100, "size_vram": vram, "context_length": context}
    return Reply.json({"models": [model]})


NONE = Reply.json({"models": []})


async def test_a_block_loads_checks_and_unloads(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", num_ctx=8192, keep_alive="10m") as model:
            assert (model.model, model.context_length, model.vram_share) == ("fake:latest", 8192, 1.0)
            assert paths(fake_ollama) == ["ps", "generate", "ps"]
        assert paths(fake_ollama) == ["ps", "generate", "ps", "generate"]
        load, unload = bodies(fake_ollama, "/api/generate")
        assert (load["options"], load["keep_alive"], load.get("prompt")) == ({"num_ctx": 8192}, "10m", None)
        assert unload["keep_alive"] == 0
        assert (await client.ps()).models == []


async def test_calls_in_the_block_do_not_have_the_model_loaded_anew(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", num_ctx=8192, keep_alive=60):
            fake_ollama.forget()
            await client.chat("fake", "hi", options={"num_predict": 1})
            await client.generate("fake:latest", "hi", stream=True, options={"num_predict": 1}).collect()
            await client.embed("fake", "hi")
            await client.embeddings("fake", "hi")
            await client.load("fake")
            for request in fake_ollama.requests[-5:]:
                assert request.json()["options"]["num_ctx"] == 8192, request.path
                assert request.json()["keep_alive"] == 60
            await client.chat("fake", "hi", options={"num_ctx": 64, "num_predict": 1}, keep_alive=5)
            assert (said := fake_ollama.requests[-1].json())["options"]["num_ctx"] == 64
            assert said["keep_alive"] == 5
        await client.load("fake")
        assert not {"options", "keep_alive"} & fake_ollama.requests[-1].json().keys()


async def test_what_somebody_else_has_loaded_stays(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.load("fake")
        async with client.loaded("fake"):
            pass
        assert [model.model for model in (await client.ps()).models] == ["fake:latest"]


async def test_what_was_loaded_anew_for_the_block_is_unloaded(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.load("fake")
        async with client.loaded("fake", num_ctx=8192):
            pass
        assert (await client.ps()).models == []


async def test_the_last_of_several_blocks_unloads(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", num_ctx=8192):
            async with client.loaded("fake:latest"):
                with pytest.raises(RequestError, match="keeps fake:latest with num_ctx=8192"):
                    await client.loaded("fake", num_ctx=64).__aenter__()
            assert len((await client.ps()).models) == 1
            with pytest.raises(RequestError, match=r"1 loaded\(\) block"):
                await client.unload("fake")
            assert all(body["keep_alive"] != 0 for body in bodies(fake_ollama, "/api/generate"))
        assert (await client.ps()).models == []
        await client.unload("fake")


async def test_a_block_that_begins_while_another_one_unloads_loads_again(fake_ollama: FakeOllama) -> None:
    unload = Reply([{"done": True, "done_reason": "unload"}], before_head=[Pause(0.3)])
    fake_ollama.script("/api/ps", NONE, listed(4096), NONE, listed(4096))
    fake_ollama.script("/api/generate", Reply.generate(done_reason="load"), unload)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        first = client.loaded("fake")
        await first.__aenter__()
        leaving = asyncio.create_task(first.__aexit__(None, None, None))
        await until(lambda: paths(fake_ollama).count("generate") == 2, "the request to unload")
        async with client.loaded("fake"):
            assert leaving.done()
            assert paths(fake_ollama) == ["ps", "generate", "ps", "generate", "ps", "generate", "ps"]
        await leaving
    assert [body["keep_alive"] for body in bodies(fake_ollama, "/api/generate")] == ["5m", 0, "5m", 0]


async def test_a_model_that_answers_another_call_of_ours_is_not_unloaded(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake"):
            stream = client.chat("fake", "hi", stream=True)
            await anext(stream)
        assert len((await client.ps()).models) == 1
        stream.abort()
        async with client.loaded("fake"):
            pass
        # It was there: it goes when its keep_alive has passed.
        assert len((await client.ps()).models) == 1


async def test_the_time_is_renewed_while_no_call_is_made(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", keep_alive=timedelta(seconds=1), num_ctx=64):
            await until(lambda: paths(fake_ollama).count("generate") == 3, "two renewals")
            # A server that fails does not end it.
            fake_ollama.script("/api/generate", Reply.error(500, "no"))
            await until(lambda: paths(fake_ollama).count("generate") == 5, "another one")
        *loads, unload = bodies(fake_ollama, "/api/generate")
        assert all((body["keep_alive"], body["options"]) == (1.0, {"num_ctx": 64}) for body in loads)
        assert unload["keep_alive"] == 0


async def test_a_model_that_only_embeds_is_loaded(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.error(400, '"fake" does not support generate'))
    async with AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", num_ctx=64):
            (body,) = bodies(fake_ollama, "/api/embed")
        assert body == {"model": "fake", "input": "", "keep_alive": "5m", "options": {"num_ctx": 64}}


@pytest.mark.parametrize(
    ("reply", "options", "text"),
    [
        (NONE, {}, "does not list it"),
        (listed(2048), {"num_ctx": 8192}, "2048 tokens, not 8192"),
        (listed(4096, vram=40), {"min_vram_share": 0.9}, "40% of it is in VRAM, less than 90%"),
        (Reply.json({"models": [{"model": "fake:latest"}]}), {"min_vram_share": 0.1}, "an unknown share"),
    ],
    ids=["not listed", "context", "vram", "vram unknown"],
)
async def test_a_model_that_is_not_loaded_as_asked(
    fake_ollama: FakeOllama, reply: Reply, options: Any, text: str
) -> None:
    fake_ollama.script("/api/ps", NONE, reply)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ModelNotReady, match=text) as caught:
            await client.loaded("fake", **options).__aenter__()
        assert caught.value.model == "fake"
        assert (caught.value.loaded is None) == (reply is NONE)
        # What was loaded for nothing is unloaded.
        assert bodies(fake_ollama, "/api/generate")[-1]["keep_alive"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_ctx": 0},
        {"num_ctx": -5},
        {"num_ctx": "8k"},
        {"num_ctx": True},
        {"keep_alive": 0},
        {"keep_alive": "0s"},
        {"keep_alive": None},
        {"keep_alive": "soon"},
        {"min_vram_share": 90},
        {"min_vram_share": "all"},
        {"auto_pull": "yes"},
        {"model": ""},
    ],
    ids=repr,
)
async def test_what_makes_no_sense_is_refused(fake_ollama: FakeOllama, options: Any) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match=next(iter(options))):
            client.loaded(**{"model": "fake", **options})
        block = client.loaded("fake", on_progress="print")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="on_progress"):
            await block.__aenter__()
        async with client.loaded("fake") as model:
            assert model
        with pytest.raises(RequestError, match="entered only once"):
            block = client.loaded("fake")
            async with block, block:
                pass


# -- pulling --

PART = {"status": "pulling 00", "digest": "sha256:00", "total": 100}
PULLED = Reply([{**PART, "completed": 40}, {**PART, "completed": 100}, {"status": "success"}])


async def test_an_unknown_model_is_an_error_without_auto_pull(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(NotFoundError):
            await client.loaded("other").__aenter__()
    assert paths(fake_ollama) == ["ps", "generate"]


async def test_a_missing_model_is_pulled(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", UNKNOWN)
    fake_ollama.script("/api/pull", PULLED)
    steps: list[ProgressResponse] = []
    async with (
        nothing_left_behind(),
        AsyncClient(fake_ollama.url) as client,
        client.loaded("fake", auto_pull=True, on_progress=steps.append),
    ):
        assert paths(fake_ollama) == ["ps", "generate", "pull", "generate", "ps"]
    assert [step.status for step in steps] == ["pulling 00", "pulling 00", "success"]
    assert steps[0].overall.fraction == 0.4


async def test_a_model_that_cannot_be_pulled(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", UNKNOWN)
    fake_ollama.script("/api/pull", Reply([{"error": "pull model manifest: file does not exist"}]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(StreamError, match="manifest"):
            await client.loaded("fake", auto_pull=True).__aenter__()
        with pytest.raises(ZeroDivisionError):
            fake_ollama.script("/api/generate", UNKNOWN)
            fake_ollama.script("/api/pull", PULLED)
            await client.loaded("fake", auto_pull=True, on_progress=lambda _: 1 / 0).__aenter__()


# -- stops --

Block = Callable[[AsyncClient, CancelToken], Awaitable[None]]


async def enter(client: AsyncClient, token: CancelToken) -> None:
    async with client.loaded("fake", token=token, auto_pull=True):
        raise AssertionError


async def leave(client: AsyncClient, token: CancelToken) -> None:
    async with client.loaded("fake", token=token):
        pass


PLACES: dict[str, tuple[Block, dict[str, list[Reply]], list[str]]] = {
    "look": (enter, {"ps": [STALL]}, ["ps"]),
    "load": (enter, {"generate": [STALL]}, ["ps", "generate"]),
    "pull": (enter, {"generate": [UNKNOWN], "pull": [Reply([PART, Stall()])]}, ["ps", "generate", "pull"]),
    "check": (enter, {"ps": [NONE, STALL]}, ["ps", "generate", "ps"]),
    "unload": (
        leave,
        {"generate": [Reply.generate(done_reason="load"), STALL], "ps": [NONE, listed(4096)]},
        ["ps", "generate", "ps", "generate"],
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["token", "client", "close", "cancel", "cancel twice"])
async def test_a_stop_at_any_place(fake_ollama: FakeOllama, place: str, way: str) -> None:
    block, replies, before = PLACES[place]
    for path, scripted in replies.items():
        fake_ollama.script(f"/api/{path}", *scripted)
    token = CancelToken()
    client = AsyncClient(fake_ollama.url)
    async with nothing_left_behind(), client:
        task = asyncio.create_task(block(client, token))  # type: ignore[arg-type]
        await until(lambda: paths(fake_ollama) == before, place)
        stalled = fake_ollama.connections[-1]
        if way == "close":
            await client.aclose()
        elif way in ("token", "client"):
            (token if way == "token" else client).abort()
            # The loop stands still: the socket is shut down already.
            assert stalled.wait_left(BOUND)
        else:
            task.cancel()
            if way == "cancel twice":
                await asyncio.sleep(0)
                task.cancel()
        expected = {"close": StreamClosed, "token": AbortError, "client": AbortError}.get(way, asyncio.CancelledError)
        quiet = contextlib.nullcontext() if (place, way) == ("unload", "close") else pytest.raises(expected)
        with quiet:
            await asyncio.wait_for(task, BOUND)
        assert stalled.wait_left(BOUND)
        assert registrations(token) == 0
        assert client._holds == {}
        after = paths(fake_ollama)[len(before) :]
        # Only what was loaded before the stop is unloaded, if the client can still ask for that.
        unloads = place == "check" and way != "close"
        assert after == (["generate"] if unloads else []) or (unloads and way == "cancel twice")


async def test_a_block_that_is_left_by_an_abort_unloads(fake_ollama: FakeOllama) -> None:
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(AbortError):
            async with client.loaded("fake", token=token):
                stream = client.chat("fake", "hi", stream=True, token=token, options={"num_predict": -1})
                await anext(stream)
                token.abort("enough")
                await anext(stream)
        assert (await client.ps()).models == []


async def test_a_stop_while_another_block_loads(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", STALL)
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        first = asyncio.create_task(enter(client, CancelToken()))
        await until(lambda: len(fake_ollama.requests) == 2, "the load")
        second = asyncio.create_task(enter(client, token))
        await until(lambda: client._holds["fake:latest"].users == 2, "the second block")
        token.abort()
        with pytest.raises(AbortError):
            await asyncio.wait_for(second, BOUND)
        with pytest.raises(PhaseTimeout):
            await client.loaded("fake", timeout=0.05).__aenter__()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(first, BOUND)
        assert client._holds == {}


async def test_the_timeout_is_for_all_until_the_block_begins(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", STALL)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await client.loaded("fake", timeout=Timeouts(total=0.2)).__aenter__()
        assert caught.value.phase == "total"
    assert fake_ollama.connections[-1].wait_left(BOUND)


async def test_a_model_that_cannot_be_unloaded_does_not_spoil_the_block(
    fake_ollama: FakeOllama, caplog: pytest.LogCaptureFixture
) -> None:
    fake_ollama.script("/api/generate", Reply.generate(done_reason="load"), Reply.error(500, "no"))
    fake_ollama.script("/api/ps", NONE, listed(4096))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client, client.loaded("fake"):
        pass
    assert "stays loaded until its keep_alive has passed" in caplog.text


async def test_headers_of_the_call_are_those_of_all_its_requests(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client, client.loaded("fake", headers={"Authorization": "Bearer x"}):
        pass
    assert [("authorization", "Bearer x") in request.headers for request in fake_ollama.requests] == [True] * 4
