"""A recording of a real Ollama server: played again it gives the same chunks, and an abort reaches the real server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from real.ollama_server import RealOllama

from ollama_async import AsyncClient, Chat
from ollama_async.testing import FakeOllama

pytestmark = pytest.mark.real


async def chunks_of(url: str, model: str) -> list[dict[str, Any]]:
    async with AsyncClient(url, timeout=60) as client:
        stream = client.chat(model, "hi", stream=True, options={"num_predict": 20, "num_thread": 1})
        return [chunk.model_dump() async for chunk in stream]


async def test_a_real_answer_is_played_again_chunk_by_chunk(real_ollama: RealOllama, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with FakeOllama.record(real_ollama.url, path) as server:
        recorded = await chunks_of(server.url, real_ollama.model)
        async with AsyncClient(server.url, timeout=60) as client:
            listed = await client.list()
    with FakeOllama.replay(path, speed=math.inf) as server:
        assert await chunks_of(server.url, real_ollama.model) == recorded
        async with AsyncClient(server.url, timeout=60) as client:
            assert await client.list() == listed
    assert len(recorded) > 2
    assert recorded[-1]["done_reason"] in ("stop", "length")


async def test_an_abort_through_the_recorder_ends_the_real_request(real_ollama: RealOllama, tmp_path: Path) -> None:
    mark, before = real_ollama.mark(), real_ollama.client_connections()
    with FakeOllama.record(real_ollama.url, tmp_path / "run.jsonl") as server:
        async with AsyncClient(server.url, timeout=60) as client:
            stream = client.chat(real_ollama.model, "hi", stream=True, options={"num_predict": -1, "num_thread": 1})
            await anext(stream)
            stream.abort("enough")
            # These block the loop: the recorder has closed its connection by itself.
            real_ollama.wait_for_request_end(mark, "/api/chat", timeout=20)
            real_ollama.wait_for_connections(before, timeout=20)
            real_ollama.wait_until_idle(timeout=20)
    assert '"end": "client left"' in (tmp_path / "run.jsonl").read_text("utf-8")


async def test_a_conversation_counts_its_context_with_a_real_server(real_ollama: RealOllama, tmp_path: Path) -> None:
    options = {"num_predict": 5, "num_thread": 1}
    async with AsyncClient(real_ollama.url, timeout=60) as client:
        chat = Chat(client, real_ollama.model, options=options)
        counts: list[int] = []
        for _ in range(3):
            answer = await chat.send("hi")
            assert chat.context_tokens == (answer.prompt_eval_count or 0) + (answer.eval_count or 0)
            counts.append(chat.context_tokens)
        await chat.save(tmp_path / "chat.json")
        assert (await Chat.load(tmp_path / "chat.json", client)).context_tokens == counts[-1]
    assert counts == sorted(set(counts))
