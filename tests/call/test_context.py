"""A prompt that is longer than the context, and answers that only look like good ones."""

from __future__ import annotations

import asyncio
import copy
import pickle
import warnings
from typing import Any

import pytest
from teardown.harness import BOUND, nothing_left_behind, registrations, until

from ollama_async import (
    AbortError,
    AsyncClient,
    BadRequestError,
    CancelToken,
    ChatResponse,
    ContextLengthError,
    ContextUsage,
    GenerateResponse,
    RequestError,
    StreamClosed,
    TruncationWarning,
)
from ollama_async.testing import FakeOllama, Reply, Stall

# The texts of Ollama 0.24, of llama-server, which newer ones pass on, and of Ollama's own check there.
REFUSALS = [
    "the input length exceeds the context length",
    "request (4127 tokens) exceeds the available context size (4096 tokens), try increasing it",
    "the prompt is longer than the context length currently available to the model; shorten the prompt",
]
TOO_LONG = Reply.error(400, REFUSALS[0])
PS = {"models": [{"name": "fake:latest", "model": "fake:latest", "context_length": 4096}]}


def ask(client: AsyncClient, path: str, *, stream: bool, **options: Any) -> Any:
    call = client.chat if path == "/api/chat" else client.generate
    made: Any = call("fake", "hi", stream=stream, **options)
    return made.collect() if stream else made


def answer(path: str, **options: Any) -> Reply:
    make = Reply.chat if path == "/api/chat" else Reply.generate
    return make("a", "b", **options)


each = pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@each
@both
async def test_nothing_is_asked_or_changed_by_default(fake_ollama: FakeOllama, path: str, stream: bool) -> None:
    fake_ollama.script(path, answer(path))
    async with AsyncClient(fake_ollama.url) as client:
        reply = await ask(client, path, stream=stream)
    (request,) = fake_ollama.requests
    assert "truncate" not in request.json()
    assert reply.context_usage == ContextUsage(prompt=11, answer=2, limit=None, cut=None)
    assert reply.context_usage.share is None


@each
@both
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_raise_has_the_server_refuse(fake_ollama: FakeOllama, path: str, stream: bool, refusal: str) -> None:
    fake_ollama.script(path, Reply.error(400, refusal))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ContextLengthError) as caught:
            await ask(client, path, stream=stream, on_truncation="raise")
    assert isinstance(caught.value, BadRequestError)
    assert caught.value.status_code == 400
    (request,) = fake_ollama.requests
    assert request.json()["truncate"] is False


async def test_another_bad_request_stays_one(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.error(400, "invalid model name"))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(BadRequestError) as caught:
            await client.chat("fake", "hi", on_truncation="warn")
    assert not isinstance(caught.value, ContextLengthError)
    assert len(fake_ollama.requests) == 1


@each
@both
async def test_warn_has_the_server_cut_after_it_refused(fake_ollama: FakeOllama, path: str, stream: bool) -> None:
    fake_ollama.script(path, TOO_LONG, answer(path))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.warns(TruncationWarning, match="context of fake:latest"):
            reply = await ask(client, path, stream=stream, on_truncation="warn", options={"num_ctx": 64})
    first, second = (request.json() for request in fake_ollama.requests)
    assert first.pop("truncate") is False
    assert second == first
    assert reply.text == "ab"
    assert reply.context_usage == ContextUsage(prompt=11, answer=2, limit=64, cut=True)


@both
async def test_a_prompt_that_fits_is_asked_once_and_known_to_be_whole(fake_ollama: FakeOllama, stream: bool) -> None:
    fake_ollama.script("/api/chat", answer("/api/chat"))
    async with AsyncClient(fake_ollama.url) as client:
        reply = await ask(client, "/api/chat", stream=stream, on_truncation="warn", options={"num_ctx": 26})
    assert len(fake_ollama.requests) == 1
    assert reply.context_usage == ContextUsage(prompt=11, answer=2, limit=26, cut=False)
    assert reply.context_usage.share == 0.5


@both
async def test_the_context_is_asked_for_once_a_model(fake_ollama: FakeOllama, stream: bool) -> None:
    fake_ollama.script("/api/chat", answer("/api/chat"), always=True)
    fake_ollama.script("/api/ps", Reply.json(PS), always=True)
    async with AsyncClient(fake_ollama.url) as client:
        replies = [await ask(client, "/api/chat", stream=stream, on_truncation="raise") for _ in range(3)]
        replies.append(await ask(client, "/api/chat", stream=stream))
    assert [reply.context_usage.limit for reply in replies] == [4096] * 4
    assert [request.path for request in fake_ollama.requests].count("/api/ps") == 1


async def test_an_answer_knows_the_context_once_it_is_asked_for(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", answer("/api/chat"))
    fake_ollama.script("/api/ps", Reply.json(PS))
    async with AsyncClient(fake_ollama.url) as client:
        reply = await client.chat("fake", "hi")
        assert await client.context_length("fake") == 4096
        assert await client.context_length("other") is None
    assert reply.context_usage is not None
    assert reply.context_usage.limit == 4096
    for copied in (copy.deepcopy(reply), pickle.loads(pickle.dumps(reply))):
        assert copied.context_usage == reply.context_usage


@both
async def test_a_server_that_does_not_say_the_context_costs_no_answer(fake_ollama: FakeOllama, stream: bool) -> None:
    fake_ollama.script("/api/chat", answer("/api/chat"), always=True)
    fake_ollama.script("/api/ps", Reply.error(500, "no"), always=True)
    async with AsyncClient(fake_ollama.url) as client:
        replies = [await ask(client, "/api/chat", stream=stream, on_truncation="raise") for _ in range(2)]
    assert [reply.text for reply in replies] == ["ab", "ab"]
    assert [request.path for request in fake_ollama.requests].count("/api/ps") == 1


async def test_a_prompt_that_fills_the_context_was_cut(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", answer("/api/chat"))
    async with AsyncClient(fake_ollama.url) as client:
        reply = await client.chat("fake", "hi", options={"num_ctx": 11})
    assert reply.context_usage is not None
    assert reply.context_usage.cut is True


@each
@both
async def test_answers_that_are_not_good_ones_are_told_apart(fake_ollama: FakeOllama, path: str, stream: bool) -> None:
    reasons = ["stop", "length", "load"]
    fake_ollama.script(path, *[answer(path, done_reason=reason) for reason in reasons], answer(path, done=False))
    async with AsyncClient(fake_ollama.url) as client:
        replies = [await ask(client, path, stream=stream) for _ in range(4)]
    assert [(reply.is_whole, reply.is_cut, reply.is_load) for reply in replies] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ]
    assert [reply.context_usage is None for reply in replies] == [False, False, True, True]


def test_the_properties_are_not_fields() -> None:
    for reply in (ChatResponse(message={"role": "assistant"}), GenerateResponse()):  # type: ignore[arg-type]
        assert not {"is_whole", "is_cut", "is_load", "context_usage"} & reply.model_dump().keys()
        assert reply.context_usage is None


@pytest.mark.parametrize("options", [{"on_truncation": "stop"}, {"on_truncation": "warn", "truncate": True}])
async def test_what_makes_no_sense_is_refused(fake_ollama: FakeOllama, options: Any) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match="on_truncation="):
            await client.chat("fake", "hi", **options)
    assert fake_ollama.requests == ()


async def test_a_warning_that_is_an_error_ends_the_call(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", TOO_LONG, answer("/api/chat"))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, on_truncation="warn")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(TruncationWarning):
                await anext(stream)
        assert stream.outcome == "error"
    assert len(fake_ollama.requests) == 1


@pytest.mark.parametrize("way", ["token", "abort", "client", "aclose", "cancel"])
async def test_a_stop_while_the_context_is_asked_for(fake_ollama: FakeOllama, way: str) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    fake_ollama.script("/api/ps", Reply(before_head=[Stall()]))
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True, on_truncation="raise", token=token)
        reader = asyncio.create_task(stream.collect())
        await until(lambda: len(fake_ollama.requests) == 2, "the question for the context")
        if way == "aclose":
            await stream.aclose()
        else:
            end = {"token": token.abort, "abort": stream.abort, "client": client.abort, "cancel": reader.cancel}
            end[way]()
        if way != "cancel":
            # The loop stands still: the sockets are shut down already.
            assert all(connection.wait_left() for connection in fake_ollama.connections)
        expected = {"aclose": StreamClosed, "cancel": asyncio.CancelledError}.get(way, AbortError)
        with pytest.raises(expected):
            await asyncio.wait_for(reader, BOUND)
        assert all(connection.wait_left() for connection in fake_ollama.connections)
        assert stream.outcome == {"aclose": "closed", "cancel": "cancelled"}.get(way, "aborted")
    assert registrations(token) == 0
