"""The endpoints, on a real Ollama server."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from real.ollama_server import RealOllama
from real.tiny_model import TEMPLATE, write_tiny_model

from ollama_async import AsyncClient, NotFoundError, ResponseError

pytestmark = pytest.mark.real

SHORT = {"num_predict": 12, "num_thread": 1}


@pytest_asyncio.fixture
async def client(real_ollama: RealOllama) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(real_ollama.url) as made:
        yield made


async def test_chat(client: AsyncClient, real_ollama: RealOllama) -> None:
    reply = await client.chat(real_ollama.model, "hi", options=SHORT)
    assert reply.done
    assert reply.done_reason == "length"
    assert reply.eval_count == 12
    assert reply["message"]["content"] == reply.message.content
    assert len((reply.message.content or "").split()) == 12


async def test_chat_as_a_stream(client: AsyncClient, real_ollama: RealOllama) -> None:
    stream = client.chat(real_ollama.model, "hi", options=SHORT, stream=True)
    text = "".join([chunk.message.content or "" async for chunk in stream])
    assert stream.outcome == "done"
    assert stream.text == text
    assert stream.response is not None
    assert stream.response.eval_count == 12
    assert stream.status_code == 200


async def test_generate_both_ways(client: AsyncClient, real_ollama: RealOllama) -> None:
    whole = await client.generate(real_ollama.model, "hi", options={**SHORT, "seed": 7})
    merged = await client.generate(real_ollama.model, "hi", options={**SHORT, "seed": 7}, stream=True).collect()
    assert whole.eval_count == merged.eval_count == 12
    assert len(merged.response.split()) == 12


async def test_logprobs(client: AsyncClient, real_ollama: RealOllama) -> None:
    reply = await client.chat(real_ollama.model, "hi", options=SHORT, logprobs=True, top_logprobs=2)
    assert reply.logprobs is not None
    assert len(reply.logprobs) == 12
    assert len(reply.logprobs[0].top_logprobs or ()) == 2


async def test_embed(client: AsyncClient, real_ollama: RealOllama) -> None:
    reply = await client.embed(real_ollama.model, ["one", "two"])
    assert [len(vector) for vector in reply.embeddings] == [64, 64]


async def test_what_the_server_has(client: AsyncClient, real_ollama: RealOllama) -> None:
    names = [model.model for model in (await client.list()).models]
    assert f"{real_ollama.model}:latest" in names
    assert [model.model for model in (await client.ps()).models] == [f"{real_ollama.model}:latest"]
    assert (await client.version()).version == "0.0.0"
    shown = await client.show(real_ollama.model)
    assert shown.details is not None
    assert shown.details.family == "llama"
    assert shown.capabilities == ["completion"]
    assert shown.model_info is not None


async def test_create_copy_and_delete(client: AsyncClient, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_model(path)
    digest = await client.create_blob(path)
    steps = [step async for step in client.create("made", files={"model.gguf": digest}, template=TEMPLATE, stream=True)]
    assert steps[-1].status == "success"
    assert (await client.create("made", files={"model.gguf": digest}, template=TEMPLATE)).status == "success"
    assert (await client.copy("made", "copied")).status == "success"
    assert (await client.delete("made")).status == "success"
    with pytest.raises(NotFoundError, match="made"):
        await client.show("made")
    reply = await client.generate("copied", "hi", options=SHORT)
    assert reply.eval_count == 12
    await client.delete("copied")


async def test_connections_are_reused(client: AsyncClient, real_ollama: RealOllama) -> None:
    before = real_ollama.client_connections()
    for _ in range(5):
        await client.chat(real_ollama.model, "hi", options=SHORT, stream=True).collect()
        await client.version()
    assert real_ollama.client_connections() == before + 1


async def test_errors(client: AsyncClient, real_ollama: RealOllama) -> None:
    with pytest.raises(NotFoundError, match="absent") as caught:
        await client.chat("absent", "hi")
    assert caught.value.status_code == 404
    with pytest.raises(NotFoundError, match="absent"):
        await client.chat("absent", "hi", stream=True)
    with pytest.raises(ResponseError):
        await client.chat(real_ollama.model, "hi", options={"temperature": "warm"})
