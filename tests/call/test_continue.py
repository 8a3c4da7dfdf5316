"""Continuing an answer that ended early: nothing of it twice, nothing lost, or a reason why not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel
from teardown.harness import BOUND, nothing_left_behind, until

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    CannotContinue,
    ChatResponse,
    ConnectionBroken,
    GenerateResponse,
    Message,
    OllamaError,
    RequestError,
    Stream,
    StreamError,
)
from ollama_async.testing import Cut, FakeOllama, Reply, Stall

CHAT, GENERATE = "/api/chat", "/api/generate"
MODEL = "fake"
WORDS = ["This", " answer", " comes"]
each = pytest.mark.parametrize("path", [CHAT, GENERATE])


def ask(client: AsyncClient, path: str, **options: Any) -> Stream[Any]:
    call: Any = client.chat if path == CHAT else client.generate
    made: Stream[Any] = call(MODEL, "hi", stream=True, **options)
    return made


async def whole(client: AsyncClient, path: str) -> str:
    return str((await ask(client, path).collect()).text)


def begun(path: str, *after: Any, **options: Any) -> Reply:
    """The beginning of what the fake model says, and then something else."""
    made = Reply.chat(*WORDS, done=False, **options) if path == CHAT else Reply.generate(*WORDS, done=False, **options)
    return replace(made, steps=[*made.steps, *after])


async def end_by(way: str, stream: Stream[Any], token: CancelToken) -> type[OllamaError] | None:
    """Read three chunks, and have the stream end."""
    if way in ("until", "length"):
        await stream.collect()
        return None
    if way in ("cut", "error"):
        expected: type[OllamaError] = ConnectionBroken if way == "cut" else StreamError
        with pytest.raises(expected):
            await stream.collect()
        return expected
    if way == "break":
        n = 0
        async for _ in stream:
            n += 1
            if n == 3:
                break
        return None
    for _ in range(3):
        await anext(stream)
    if way == "cancel":
        reader = asyncio.create_task(stream.collect())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader], timeout=BOUND)
        return None
    end: dict[str, Callable[[str], bool]] = {"abort": stream.abort, "token": token.abort}
    end[way]("stop")
    return AbortError


AFTER: dict[str, list[Any]] = {"cut": [Cut()], "error": [{"error": "model runner has unexpectedly stopped"}]}
WAYS = ["abort", "token", "cut", "error", "break", "cancel", "until", "length"]


@each
@pytest.mark.parametrize("way", WAYS)
async def test_the_joined_answer_is_the_whole_one(fake_ollama: FakeOllama, path: str, way: str) -> None:
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        expected = await whole(client, path)
        options: dict[str, Any] = {"token": token}
        if way == "length":
            options["options"] = {"num_predict": 3}
        elif way == "until":
            options["until"] = lambda merged: merged.text.endswith("comes")
        else:
            fake_ollama.script(path, begun(path, *AFTER.get(way, [Stall()])))
        stream = ask(client, path, **options)
        await end_by(way, stream, token)
        assert stream.text == "".join(WORDS)
        seen = fake_ollama.requests
        resumed = await stream.resume(token=CancelToken())
        assert resumed.text == stream.text
        assert resumed.response is not None
        assert not resumed.response.done
        if way == "length":
            # num_predict counts anew.
            assert (await resumed.collect()).text == stream.text + " from a fake"
            return
        new = [chunk.text async for chunk in resumed]
        assert resumed.outcome == "done"
        assert resumed.response.is_whole
        assert resumed.text == expected == stream.text + "".join(new)
    question, answer = fake_ollama.requests[len(seen) :][-2:]
    assert question.json()["_debug_render_only"] is True
    assert question.json()["options"]["num_predict"] == 1
    if path == CHAT:
        messages = answer.json()["messages"]
        assert messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "".join(WORDS)}]
    else:
        assert (answer.json()["prompt"], answer.json()["raw"]) == ("hi" + "".join(WORDS), True)


@each
async def test_it_can_be_resumed_again_and_again(fake_ollama: FakeOllama, path: str) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        expected = await whole(client, path)
        stream, times = ask(client, path), 0
        while stream.outcome != "done":
            async for _ in stream:
                if stream.timing.chunks == 9:
                    break
            if stream.outcome != "done":
                stream, times = await stream.resume(), times + 1
        assert times == 4
        assert stream.text == expected


@each
async def test_an_answer_of_another_process_is_continued(fake_ollama: FakeOllama, path: str) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        expected = await whole(client, path)
        kind = ChatResponse if path == CHAT else GenerateResponse
        message = {"message": {"role": "assistant", "content": "This answer"}}
        kept: Any = kind.model_validate({"model": MODEL, **(message if path == CHAT else {"response": "This answer"})})
        for partial, options in ((kept, {}), ("This answer", {"model": MODEL}), (None, {"model": MODEL})):
            asked: Any = {"messages": "hi"} if path == CHAT else {"prompt": "hi"}
            stream: Any = await client.continue_from(partial, **asked, **options)
            assert (await stream.collect()).text == expected


async def test_the_beginning_that_a_caller_wrote_stays_his(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        messages = [Message(role="user", content="hi"), Message(role="assistant", content="This answer")]
        stream = client.chat(MODEL, messages, stream=True, until=lambda merged: merged.text.endswith("from"))
        await stream.collect()
        assert stream.text == " comes from"
        resumed = await stream.resume(until=lambda merged: merged.text == " comes from a fake")
        assert (await resumed.collect()).text == " comes from a fake"
    assert fake_ollama.requests[-1].json()["messages"][-1] == {
        "role": "assistant",
        "content": "This answer comes from",
    }


async def test_characters_that_the_network_cut_are_neither_lost_nor_broken(fake_ollama: FakeOllama) -> None:
    text = ["Grüße ", "🌊", "海"]
    lines = [json.dumps(frame, ensure_ascii=False).encode() + b"\n" for frame in Reply.chat(*text).steps[:-1]]
    cut_within = lines[0] + lines[1][: lines[1].index("🌊".encode()) + 2]
    fake_ollama.script(
        CHAT,
        Reply([cut_within, Cut()]),
        Reply.json({"_debug_info": {"rendered_template": "user: hi\nGrüße "}, "message": {"role": "assistant"}}),
        Reply.chat("🌊", "海"),
    )
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        with pytest.raises(ConnectionBroken):
            await stream.collect()
        assert stream.text == "Grüße "
        assert (await (await stream.resume()).collect()).text == "Grüße 🌊海"


async def test_white_space_that_a_template_trims_is_left_to_the_model(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(
        CHAT,
        Reply.chat("One.", "\n\n", done=False),
        Reply.json({"_debug_info": {"rendered_template": "hi One."}, "message": {"role": "assistant"}}),
        Reply.chat("\n\n", "Two."),
    )
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        await stream.collect()
        assert stream.text == "One.\n\n"
        assert (await (await stream.resume()).collect()).text == "One.\n\nTwo."


async def test_thinking_that_is_over_goes_with_it(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(CHAT, begun(CHAT, Cut(), thinking=["Let me", " see."]))
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        with pytest.raises(ConnectionBroken):
            await stream.collect()
        reply = await (await stream.resume()).collect()
    assert reply.message.thinking == "Let me see."
    assert reply.text.startswith("This answer comes from")
    assert fake_ollama.requests[-1].json()["messages"][-1]["thinking"] == "Let me see."


class Answer(BaseModel):
    text: str


CALL = {"function": {"name": "weather", "arguments": {}}}
NOT: list[tuple[str, Any, Any, str]] = [
    (CHAT, Reply.chat("a", done=True), {}, "it is complete"),
    (CHAT, Reply.chat(done_reason="load"), {}, "only loaded"),
    (CHAT, Reply.chat("a", tool_calls=[CALL], done=False), {}, "it has called tools"),
    (CHAT, Reply.chat(thinking=["hm"], done=False), {}, "still thinking"),
    (CHAT, Reply.chat("{", done=False), {"format": Answer}, "begin the JSON text anew"),
    (GENERATE, Reply.generate("a", thinking=["hm"], done=False), {}, "no place for the model's thinking"),
    (GENERATE, Reply.generate("a", done=False), {"images": [b"an image"]}, "where its images are"),
]


@pytest.mark.parametrize(("path", "reply", "options", "text"), NOT, ids=[row[3] for row in NOT])
async def test_what_cannot_be_continued_says_why(
    fake_ollama: FakeOllama, path: str, reply: Reply, options: Any, text: str
) -> None:
    fake_ollama.script(path, reply)
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, path, **options)
        await stream.collect()
        with pytest.raises(CannotContinue, match=text) as caught:
            await stream.resume()
    assert caught.value.partial == stream.response
    assert len(fake_ollama.requests) == 1


ENDED = {"_debug_info": {"rendered_template": "user: hi\nassistant: This\nassistant: "}}
UNSAID: dict[str, Any] = {}


@pytest.mark.parametrize(("said", "text"), [(ENDED, "ends the assistant's message"), (UNSAID, "does not say what")])
async def test_a_template_that_ends_the_message_is_found_out(fake_ollama: FakeOllama, said: Any, text: str) -> None:
    answer = Reply.json({"model": MODEL, "message": {"role": "assistant", "content": ""}, **said})
    fake_ollama.script(CHAT, Reply.chat("This", done=False), answer)
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        await stream.collect()
        with pytest.raises(CannotContinue, match=text):
            await stream.resume()
    assert len(fake_ollama.requests) == 2


async def test_a_completion_that_the_server_takes_apart_is_not_continued(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(GENERATE, Reply.generate("This", done=False))
    fake_ollama.script("/api/show", Reply.json({"parser": "harmony"}))
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, GENERATE)
        await stream.collect()
        with pytest.raises(CannotContinue, match="harmony"):
            await stream.resume()


async def test_a_raw_prompt_needs_no_question(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(GENERATE, Reply.generate("This", done=False))
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, GENERATE, raw=True)
        await stream.collect()
        await (await stream.resume()).collect()
    assert [request.json()["prompt"] for request in fake_ollama.requests] == ["hi", "hiThis"]


async def test_a_token_that_was_aborted_stays_so(fake_ollama: FakeOllama) -> None:
    token = CancelToken()
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT, token=token)
        await anext(stream)
        token.abort("stop")
        with pytest.raises(AbortError, match="stop"):
            await stream.resume()
    assert len(fake_ollama.requests) == 1


async def test_a_stop_while_the_template_is_looked_at(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(CHAT, begun(CHAT, Cut()), Reply(before_head=[Stall()]))
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        with pytest.raises(ConnectionBroken):
            await stream.collect()
        resuming = asyncio.create_task(stream.resume(token=token))
        await until(lambda: len(fake_ollama.requests) == 2, "the question")
        token.abort("stop")
        assert fake_ollama.connections[-1].wait_left()
        with pytest.raises(AbortError):
            await asyncio.wait_for(resuming, BOUND)


async def test_what_has_not_ended_is_not_resumed(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        with pytest.raises(CannotContinue, match="it has not ended"):
            await stream.resume()
        async with stream:
            await anext(stream)
            with pytest.raises(CannotContinue, match="it has not ended"):
                await stream.resume()
        fake_ollama.script("/api/pull", Reply([{"status": "success"}]))
        pull = client.pull(MODEL, stream=True)
        await pull.collect()
        with pytest.raises(CannotContinue, match="no answer of chat or generate"):
            await pull.resume()


async def test_before_the_first_chunk_it_is_asked_again(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(CHAT, Reply(before_head=[Cut()]))
    async with AsyncClient(fake_ollama.url) as client:
        stream = ask(client, CHAT)
        with pytest.raises(ConnectionBroken):
            await stream.collect()
        assert (await (await stream.resume()).collect()).is_whole
    first, second = fake_ollama.requests
    assert first.json() == second.json()


@pytest.mark.parametrize(
    "options",
    [{}, {"messages": "hi", "prompt": "hi"}, {"prompt": "hi", "options": {"temperature": "hot"}}],
    ids=["neither", "both", "option"],
)
async def test_wrong_parameters_are_refused(fake_ollama: FakeOllama, options: Any) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError):
            await client.continue_from("text", model=MODEL, **options)
        wrong: Any = GenerateResponse(model=MODEL, response="x")
        with pytest.raises(RequestError, match="give a ChatResponse"):
            await client.continue_from(wrong, "hi")
    assert fake_ollama.requests == ()
