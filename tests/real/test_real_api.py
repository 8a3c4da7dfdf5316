"""The endpoints, on a real Ollama server."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Literal

import pytest
import pytest_asyncio
from pydantic import BaseModel
from real.ollama_server import RealOllama
from real.tiny_model import TEMPLATE, write_tiny_model

from ollama_async import AsyncClient, NotFoundError, Options, ParseError, ProgressResponse, ResponseError

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
    assert f"{real_ollama.model}:latest" in [model.model for model in (await client.ps()).models]
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


async def test_a_model_from_a_file(client: AsyncClient, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_model(path)
    with path.open("ab") as file:
        file.write(os.urandom(16))  # so that no server has it yet
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert not await client.blob_exists(digest)
    steps: list[ProgressResponse] = []
    last = await client.create_from("uploaded", path, template=TEMPLATE, on_progress=steps.append)
    try:
        assert last.done
        assert last.overall.fraction == 1.0
        statuses = [step.status for step in steps]
        assert statuses[0] == "hashing model.gguf"
        assert "uploading model.gguf" in statuses
        assert statuses[-1] == "success"
        assert await client.blob_exists(digest)
        assert await client.upload(path, on_progress=steps.append) == digest
        assert steps[-1].status == "already there: model.gguf"
        assert (await client.generate("uploaded", "hi", options=SHORT)).eval_count == 12
    finally:
        # It runs in a process of its own, which would stay for a while.
        await client.unload("uploaded")
        await client.delete("uploaded")


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
    with pytest.raises(ResponseError, match="format"):
        await client.chat(real_ollama.model, "hi", format={"type": "no type"})


class Answer(BaseModel):
    name: Literal["ant", "bee"]
    big: bool


@pytest.mark.parametrize("streaming", [False, True])
async def test_structured_output(client: AsyncClient, real_ollama: RealOllama, streaming: bool) -> None:
    # The grammar that the server makes of the schema forces valid JSON even out of random weights.
    options = {"num_predict": 200, "num_thread": 1, "temperature": 0}
    if streaming:
        chat = await client.chat(real_ollama.model, "hi", format=Answer, options=options, stream=True).collect()
        generated = await client.generate(
            real_ollama.model, "hi", format=Answer, options=options, stream=True
        ).collect()
    else:
        chat = await client.chat(real_ollama.model, "hi", format=Answer, options=options)
        generated = await client.generate(real_ollama.model, "hi", format=Answer, options=options)
    assert isinstance(chat.parsed, Answer)
    assert isinstance(generated.parsed, Answer)


async def test_an_answer_cut_short_does_not_match_its_format(client: AsyncClient, real_ollama: RealOllama) -> None:
    reply = await client.chat(real_ollama.model, "hi", format=Answer, options={**SHORT, "num_predict": 2})
    assert reply.done_reason == "length"
    with pytest.raises(ParseError) as caught:
        _ = reply.parsed
    assert caught.value.text == reply.message.content


async def test_what_the_model_would_read(client: AsyncClient, real_ollama: RealOllama) -> None:
    reply = await client.chat(real_ollama.model, "why so?", debug_render_only=True)
    assert reply.debug_info is not None
    assert "why so?" in reply.debug_info.rendered_template
    reply2 = await client.generate(real_ollama.model, "why so?", debug_render_only=True)
    assert reply2.debug_info is not None
    assert "why so?" in reply2.debug_info.rendered_template


async def test_load_and_unload(client: AsyncClient, real_ollama: RealOllama) -> None:
    assert (await client.load(real_ollama.model, timedelta(hours=2))).done_reason == "load"
    assert f"{real_ollama.model}:latest" in [model.name for model in (await client.ps()).models]
    assert (await client.unload(real_ollama.model)).done_reason == "unload"


async def test_the_rest_of_the_server(client: AsyncClient) -> None:
    assert (await client.status()).cloud.disabled in (True, False)
    assert (await client.version()).status_code == 200
    assert (await client.list()).headers["content-type"].startswith("application/json")


async def test_options_reach_the_server(client: AsyncClient, real_ollama: RealOllama) -> None:
    options = Options(num_predict=5, num_thread=1, temperature=0, stop=["never said"])
    first, second = [await client.generate(real_ollama.model, "hi", options=options) for _ in range(2)]
    assert first.eval_count == 5
    assert first.response == second.response
