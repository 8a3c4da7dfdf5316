"""What an answer is worth, on a real server with a real small model and one slot.

The model is no part of the project: see ``real.small_model``. Temperature 0 and a seed make its answers the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from pydantic import BaseModel
from real.ollama_server import MODEL, RealOllama, need_server
from real.small_model import CLOSED, TOOLS, install_small_model
from real.tiny_model import CONTEXT as CONTEXT_OF_MODEL
from teardown.harness import Baseline, nothing_left_behind

from ollama_async import (
    AsyncClient,
    CannotContinue,
    ConnectionBroken,
    ContextLengthError,
    Stream,
    StreamError,
    Timeouts,
    TruncationWarning,
)
from ollama_async.agent import Agent

pytestmark = pytest.mark.real

SAME = {"temperature": 0, "seed": 7}
# Each message has some 30 tokens for the tiny model: the context has room for a few.
CONTEXT = {"num_ctx": 128, "num_predict": 2}
LONG = [{"role": ("user", "assistant")[n % 2], "content": f"{n} hello hello hello hello"} for n in range(21)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealOllama]:
    folder = tmp_path_factory.mktemp("one-slot")
    with RealOllama(need_server(), folder, OLLAMA_NUM_PARALLEL="1") as started:
        yield started


@pytest.fixture(scope="module")
def small(server: RealOllama) -> str:
    return install_small_model(server)


@pytest_asyncio.fixture
async def nothing_left(server: RealOllama) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(server: RealOllama, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, timeout=Timeouts(first_chunk=120)) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_chat_that_lost_its_oldest_messages_is_noticed(client: AsyncClient, stream: bool) -> None:
    async def ask(mode: str) -> object:
        made = client.chat(MODEL, LONG, options=CONTEXT, stream=stream, on_truncation=mode)  # type: ignore[call-overload]
        reply = await (made.collect() if stream else made)
        return reply.context_usage

    silent = await ask("ignore")
    with pytest.warns(TruncationWarning):
        warned = await ask("warn")
    with pytest.raises(ContextLengthError):
        await ask("raise")
    assert (warned.limit, warned.cut, warned.answer) == (128, True, 2)  # type: ignore[attr-defined]
    # The messages that are left do not fill the context: the figures alone do not show that others are missing.
    assert silent.prompt == warned.prompt < 128  # type: ignore[attr-defined]
    assert silent.cut is None  # type: ignore[attr-defined]


async def test_a_prompt_that_fits_is_known_to_be_whole(client: AsyncClient) -> None:
    reply = await client.generate(MODEL, "hello", options={"num_predict": 4}, on_truncation="raise")
    usage = reply.context_usage
    assert usage is not None
    assert (usage.limit, usage.cut, usage.answer) == (CONTEXT_OF_MODEL, False, 4)
    assert reply.is_cut
    assert not reply.is_whole


async def test_a_chat_without_messages_is_a_load(client: AsyncClient) -> None:
    reply = await client.chat(MODEL, [])
    assert reply.done
    assert reply.is_load
    assert not reply.is_whole


# -- an answer that is continued --

PROMPTS = {"prose": "The capital of France is", "characters": "🌊 海 ü 🌊 海 ü 🌊 海 ü"}
TOKENS = 8


def stream_of(client: AsyncClient, way: str, model: str, prompt: str) -> Stream[Any]:
    call: Any = client.chat if way == "chat" else client.generate
    raw = {"raw": True} if way == "raw" else {}
    made: Stream[Any] = call(model, prompt, stream=True, options={**SAME, "num_predict": TOKENS}, **raw)
    return made


@pytest.mark.parametrize(
    ("way", "prompt"), [("chat", "prose"), ("chat", "characters"), ("generate", "prose"), ("raw", "characters")]
)
async def test_a_stopped_answer_goes_on_where_it_was(client: AsyncClient, small: str, way: str, prompt: str) -> None:
    whole = (await stream_of(client, way, small, PROMPTS[prompt]).collect()).text
    assert len(whole) > TOKENS / 4
    for stop_at in (1, 5):
        stream = stream_of(client, way, small, PROMPTS[prompt])
        for _ in range(stop_at):
            await anext(stream)
        stream.abort("stop")
        kept = stream.text
        resumed = await stream.resume()
        new = [chunk.text async for chunk in resumed]
        assert resumed.text == kept + "".join(new)
        # num_predict counts anew, so the joined answer is a little longer.
        assert kept
        assert resumed.text.startswith(whole)


async def test_an_answer_goes_on_after_its_runner_has_died(client: AsyncClient, small: str, server: RealOllama) -> None:
    whole = (await stream_of(client, "chat", small, PROMPTS["prose"]).collect()).text
    stream = stream_of(client, "chat", small, PROMPTS["prose"])
    for _ in range(4):
        await anext(stream)
    for pid in server.runner_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((StreamError, ConnectionBroken)):
        await stream.collect()
    assert (await (await stream.resume()).collect()).text.startswith(whole)


async def test_a_template_that_ends_each_message_is_found_out(client: AsyncClient, small: str) -> None:
    assert small
    stream = stream_of(client, "chat", CLOSED, PROMPTS["prose"])
    await anext(stream)
    stream.abort()
    with pytest.raises(CannotContinue, match="ends the assistant's message"):
        await stream.resume()


# -- an object, and a tool --

EXAMPLES = """Each country as one line of JSON.
France: {"name": "France", "capital": "Paris"}
Austria: {"name": "Austria", "capital": "Vienna"}
"""


class Country(BaseModel):
    name: str
    capital: str


async def test_an_object_that_is_whole_saves_what_the_model_would_write_behind_it(
    client: AsyncClient, small: str, server: RealOllama
) -> None:
    def ask() -> Stream[Any]:
        options = {**SAME, "num_predict": 36}
        made: Stream[Any] = client.generate(small, f"{EXAMPLES}Peru:", format=Country, options=options, stream=True)
        return made

    whole = await ask().collect()
    mark, stream = server.mark(), ask()
    async for partial in stream.objects():
        last = partial
    server.wait_for_request_end(mark, "/api/generate")
    assert isinstance(last.value, Country)
    assert (last.complete, stream.outcome, last.value.name) == (True, "until", "Peru")
    assert whole.text.startswith(stream.text)
    assert stream.timing.chunks < whole.eval_count


async def test_a_model_calls_a_tool_and_tells_its_result(client: AsyncClient, small: str) -> None:
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"{city}: 20 C"

    assert small
    agent = Agent(client, TOOLS, [weather], max_turns=2, options={**SAME, "num_predict": 30, "stop": ["\n"]})
    result = await agent.run("What is the weather in Lima?")
    assert [message.role for message in result.messages] == ["user", "assistant", "tool", "assistant"]
    assert result.messages[2].content == "Lima: 20 C"
    assert "20 C in Lima" in result.text
    assert (result.outcome, result.usage.turns, result.usage.tool_calls) == ("done", 2, 1)
