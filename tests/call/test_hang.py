"""A model that hangs is told from one that is slow; with ``recover=True`` it is unloaded, and asked again once."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
from teardown.harness import BOUND, STOPS, nothing_left_behind, registrations, stop_the_reader, until

from ollama_async import (
    AsyncClient,
    CancelToken,
    HungModel,
    PhaseTimeout,
    Pool,
    RequestError,
    StreamTruncated,
    Timeouts,
)
from ollama_async.testing import FakeOllama, Reply, Stall

HANGS = Reply(before_head=[Stall()])
SOON = Timeouts(first_chunk=0.1)
EXPIRES = "2030-01-01T00:00:0{}Z"


def listed(*, expires: int = 0) -> Reply:
    model = {"name": "fake:latest", "model": "fake:latest", "expires_at": EXPIRES.format(expires)}
    return Reply.json({"models": [model]})


LOADED = listed()
NONE = Reply.json({"models": []})
BOTH = ["version", "ps", "ps"]

each = pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def ask(client: AsyncClient, path: str = "/api/chat", *, stream: bool = True, **options: Any) -> Any:
    made: Any = (client.chat if path == "/api/chat" else client.generate)(
        "fake", "hi", stream=stream, **{"timeout": SOON, **options}
    )
    return made.collect() if stream else made


def paths(server: FakeOllama) -> list[str]:
    return [request.path.removeprefix("/api/") for request in server.requests]


@both
async def test_nothing_is_asked_by_default(fake_ollama: FakeOllama, stream: bool) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", LOADED, always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await ask(client, stream=stream)
    assert type(caught.value) is PhaseTimeout
    assert paths(fake_ollama) == ["chat"]


@each
@both
async def test_a_hang_has_an_error_of_its_own(fake_ollama: FakeOllama, path: str, stream: bool) -> None:
    fake_ollama.script(path, HANGS)
    fake_ollama.script("/api/ps", LOADED, always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(HungModel, match=r"fake:latest hangs: it sent nothing within 0\.1 s") as caught:
            await ask(client, path, stream=stream, recover=False)
        assert paths(fake_ollama) == [path.removeprefix("/api/"), *BOTH]
        assert fake_ollama.requests[0].connection.wait_left(BOUND)
    error = caught.value
    assert (error.phase, error.seconds, error.model) == ("first_chunk", 0.1, "fake:latest")
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(copied), copied.model, copied.detail) == (str(error), error.model, error.detail)


async def test_the_outcome_of_a_hang_is_a_timeout(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", LOADED, always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, timeout=SOON, recover=False)
        for _ in range(2):
            with pytest.raises(HungModel):
                await anext(stream)
        assert stream.outcome == "timeout"
        assert isinstance(stream.reason, HungModel)


@pytest.mark.parametrize(
    ("version", "ps"),
    [
        (Reply.json({"version": "0.30.0"}), [NONE]),
        (Reply.json({"version": "0.30.0"}), [LOADED, NONE]),
        (Reply.error(500, "no"), [LOADED]),
        (Reply.json({"version": "0.30.0"}), [Reply.error(500, "no")]),
        # It is loading: the time until it expires has not begun, and it keeps a question for it waiting.
        (Reply.json({"version": "0.30.0"}), [listed(expires=1), listed(expires=2)]),
    ],
    ids=["not loaded", "unloaded", "no version", "no ps", "loading"],
)
@pytest.mark.parametrize("recover", [False, True])
async def test_what_is_only_slow_is_not_unloaded(
    fake_ollama: FakeOllama, version: Reply, ps: list[Reply], recover: bool
) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/version", version)
    fake_ollama.script("/api/ps", *ps, always=True)
    fake_ollama.script("/api/generate", Reply.error(503, "loading"), always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await ask(client, recover=recover)
    assert type(caught.value) is PhaseTimeout
    assert not any(request.json().get("keep_alive") == 0 for request in fake_ollama.requests if request.body)


async def test_a_model_that_was_never_idle_hangs_if_it_is_loaded(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", listed(expires=1), listed(expires=2))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(HungModel):
            await ask(client, recover=False, options={"num_ctx": 64})
    assert paths(fake_ollama) == ["chat", *BOTH, "generate"]
    # With the same options, or the server would load it anew.
    assert fake_ollama.requests[-1].json() == {"model": "fake:latest", "options": {"num_ctx": 64}, "stream": False}


@each
@both
async def test_a_hang_is_healed(fake_ollama: FakeOllama, path: str, stream: bool) -> None:
    make = Reply.chat if path == "/api/chat" else Reply.generate
    unloaded = Reply.generate(done_reason="unload")
    chat = [HANGS, make("a", "b")] if path == "/api/chat" else [HANGS, unloaded, make("a", "b")]
    fake_ollama.script(path, *chat)
    # It stays for a moment, as with other requests that wait for it.
    fake_ollama.script("/api/ps", LOADED, LOADED, LOADED, NONE)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        reply = await ask(client, path, stream=stream, recover=True, options={"seed": 1})
        assert reply.text == "ab"
    kind = path.removeprefix("/api/")
    assert paths(fake_ollama) == [kind, *BOTH, "generate", "ps", "ps", kind]
    first, unload, second = (request.json() for request in fake_ollama.requests if request.body)
    assert (unload["keep_alive"], unload["model"]) == (0, "fake:latest")
    assert second == first
    # The request that hangs was given up before the model was unloaded.
    given_up = fake_ollama.requests[0].connection
    assert given_up.wait_left(BOUND)


@both
async def test_it_is_asked_again_once(fake_ollama: FakeOllama, stream: bool) -> None:
    fake_ollama.script("/api/chat", HANGS, always=True)
    fake_ollama.script("/api/ps", LOADED, LOADED, NONE, always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(HungModel, match="unloaded and asked again"):
            await ask(client, stream=stream, recover=True)
    assert paths(fake_ollama) == ["chat", *BOTH, "generate", "ps", "chat"]


async def test_it_is_not_unloaded_while_another_call_of_ours_gets_tokens(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01), HANGS)
    fake_ollama.script("/api/ps", LOADED, always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        other = client.chat("fake:latest", "hi", stream=True)
        await anext(other)
        with pytest.raises(HungModel, match=r"not unloaded: 1 other call\(s\)"):
            await ask(client, recover=True)
        await anext(other)
        assert other.outcome is None
        other.abort()
    assert paths(fake_ollama) == ["chat", "chat", *BOTH]


async def test_a_call_of_ours_that_waits_or_asks_another_model_does_not_keep_it(fake_ollama: FakeOllama) -> None:
    with FakeOllama(models=["fake", "other"]) as server:
        server.script("/api/chat", Reply.endless_chat(0.01), HANGS, HANGS, Reply.chat("a"))
        server.script("/api/ps", LOADED, LOADED, NONE)
        async with nothing_left_behind(), AsyncClient(server.url) as client:
            other = client.chat("other", "hi", stream=True)
            await anext(other)
            waits = asyncio.create_task(client.chat("fake", "hi"))
            await until(lambda: len(server.requests) == 2, "the one that waits")
            assert (await ask(client, recover=True)).text == "a"
            waits.cancel()
            other.abort()


async def test_several_calls_have_it_unloaded_once(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS, HANGS, HANGS, *[Reply.chat("a")] * 4)
    fake_ollama.script("/api/ps", LOADED, LOADED, NONE)
    # As long as it is being unloaded, all that have passed their limit wait for it.
    fake_ollama.script("/api/generate", Reply.generate("", done_reason="unload", interval=0.5))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        calls = [asyncio.create_task(ask(client, recover=True)) for _ in range(3)]
        await until(lambda: "generate" in paths(fake_ollama), "the unload")
        # Also one that begins then: it would keep the model from being unloaded.
        calls.append(asyncio.create_task(ask(client, recover=True)))
        assert [reply.text for reply in await asyncio.gather(*calls)] == ["a"] * 4
    assert paths(fake_ollama) == ["chat"] * 3 + [*BOTH, "generate", "ps"] + ["chat"] * 4


async def test_a_model_that_cannot_be_unloaded(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", LOADED, always=True)
    fake_ollama.script("/api/generate", Reply.error(500, "no way"))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(HungModel, match="could not be unloaded: no way"):
            await ask(client, recover=True)


async def test_a_hang_in_a_block_that_keeps_the_model(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        async with client.loaded("fake", num_ctx=64, keep_alive=60):
            fake_ollama.script("/api/chat", HANGS)
            assert (await ask(client, recover=True)).done
            (model,) = (await client.ps()).models
            # The one that was loaded anew is kept as the first one was.
            assert model.context_length == 64
            assert fake_ollama.requests[-2].json()["keep_alive"] == 60
        assert (await client.ps()).models == []


async def test_a_whole_answer_is_never_a_part_of_one(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a", done=False))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(StreamTruncated):
            await ask(client, stream=False, recover=True)


async def test_a_long_whole_answer_does_not_hang(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat(*["a"] * 10, interval=0.03))
    async with AsyncClient(fake_ollama.url) as client:
        assert (await ask(client, stream=False, recover=True)).text == "a" * 10
    assert paths(fake_ollama) == ["chat"]


@pytest.mark.parametrize("options", [{"recover": "yes"}, {"recover": True, "timeout": None}, {"recover": True}])
async def test_what_makes_no_sense_is_refused(fake_ollama: FakeOllama, options: Any) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match="recover="):
            await client.chat("fake", "hi", **options)
    assert fake_ollama.requests == ()


async def test_a_pool_lets_its_calls_recover(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS, Reply.chat("a"))
    fake_ollama.script("/api/ps", LOADED, LOADED, NONE, always=True)
    async with nothing_left_behind(), Pool([fake_ollama.url]) as pool:
        assert (await pool.chat("fake", "hi", timeout=SOON, recover=True)).text == "a"


async def test_an_error_that_was_dropped_is_freed_without_the_collector(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS, always=True)
    fake_ollama.script("/api/ps", NONE, LOADED, LOADED, always=True)
    async with AsyncClient(fake_ollama.url) as client:
        for kind in (PhaseTimeout, HungModel):
            gc.collect()
            gc.disable()
            try:
                stream = client.chat("fake", "hi", stream=True, timeout=SOON, recover=False)
                with pytest.raises(kind):
                    await anext(stream)
                freed = weakref.ref(stream._reader.call.exchange)
                del stream
                assert freed() is None
            finally:
                gc.enable()


PLACES: dict[str, tuple[list[Reply], list[Reply], list[str]]] = {
    "ps": ([HANGS], [HANGS], ["chat", "version", "ps"]),
    "unload": ([HANGS], [LOADED, LOADED], ["chat", *BOTH, "generate"]),
    "unloading": ([HANGS], [LOADED, LOADED, HANGS], ["chat", *BOTH, "generate", "ps"]),
    "asked again": ([HANGS, HANGS], [LOADED, LOADED, NONE], ["chat", *BOTH, "generate", "ps", "chat"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", STOPS)
async def test_a_stop_at_any_place(fake_ollama: FakeOllama, place: str, way: str) -> None:
    chat, ps, before = PLACES[place]
    fake_ollama.script("/api/chat", *chat)
    fake_ollama.script("/api/ps", *ps)
    if place == "unload":
        fake_ollama.script("/api/generate", HANGS)
    token = CancelToken()
    # Long enough that the second limit does not come before the stop.
    limits = Timeouts(first_chunk=0.3)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, token=token, timeout=limits, recover=True)
        reader = asyncio.create_task(stream.collect())
        await until(lambda: paths(fake_ollama) == before, place)
        await stop_the_reader(way, reader, stream, token, client, fake_ollama)
        # Nothing is asked after the stop, and the next call does not wait for this one.
        assert paths(fake_ollama) == before
        fake_ollama.forget()
        fake_ollama.script("/api/chat", Reply.chat("a"))
        assert (await ask(client, recover=True)).text == "a"
    assert registrations(token) == 0


async def test_the_limit_of_the_whole_call_holds_while_the_server_is_asked(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", LOADED, LOADED, HANGS)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(PhaseTimeout):
            await asyncio.wait_for(ask(client, recover=True, timeout=Timeouts(first_chunk=0.1, total=0.4)), 3)


async def test_the_limit_of_the_whole_call_holds_while_another_call_recovers(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", HANGS)
    fake_ollama.script("/api/ps", LOADED, LOADED, HANGS)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        recovers = asyncio.create_task(ask(client, recover=True))
        await until(lambda: paths(fake_ollama).count("ps") == 3, "the recovery")
        limits = Timeouts(first_chunk=0.1, total=0.1)
        stream = client.chat("fake", "hi", stream=True, timeout=limits, recover=True)
        with pytest.raises(PhaseTimeout) as caught:
            await anext(stream)
        assert (caught.value.phase, stream.outcome) == ("total", "timeout")
        recovers.cancel()
        with pytest.raises(asyncio.CancelledError):
            await recovers
    assert paths(fake_ollama) == ["chat", *BOTH, "generate", "ps"]
