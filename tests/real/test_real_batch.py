"""A batch on real Ollama servers: two processes, one of them with a single slot, which aborts make it lose."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from real.ollama_server import MODEL, RealOllama, need_server
from real.small_model import install_small_model

from ollama_async import AbortError, AsyncClient, Host, PhaseTimeout, Pool, Timeouts
from ollama_async.batch import batch

pytestmark = pytest.mark.real

SAME = {"temperature": 0, "seed": 7}
ABORTS = 400


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealOllama]]:
    binary = need_server()
    with (
        RealOllama(binary, tmp_path_factory.mktemp("one")) as one,
        RealOllama(binary, tmp_path_factory.mktemp("two"), OLLAMA_NUM_PARALLEL="1") as two,
    ):
        yield [one, two]


def hosts(servers: list[RealOllama]) -> list[Host]:
    return [Host(servers[0].url, slots=4), Host(servers[1].url, slots=1)]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


async def test_a_batch_over_two_servers_has_each_answer_once(servers: list[RealOllama], tmp_path: Path) -> None:
    output, rows = tmp_path / "out.jsonl", [{"id": f"r{n}", "prompt": f"say {n}"} for n in range(60)]
    options = {"num_predict": 20, "num_thread": 1}
    result = await batch(rows, output, pool=hosts(servers), model=MODEL, options=options, limit=40)
    assert (result.done, result.failed, result.tokens) == (40, 0, 800)
    result = await batch(rows, output, pool=hosts(servers), model=MODEL, options=options)
    assert (result.done, result.skipped) == (20, 40)
    found = records(output)
    assert sorted(record["id"] for record in found) == sorted(row["id"] for row in rows)
    assert {record["host"] for record in found} == {server.url for server in servers}
    assert all(record["response"]["text"] for record in found)


class City(BaseModel):
    name: str = Field(max_length=12)
    large: bool


@pytest.mark.timeout(300)
async def test_structured_answers_of_a_small_model(servers: list[RealOllama], tmp_path: Path) -> None:
    # Of the two servers one has it, and is asked.
    small = install_small_model(servers[0])
    output = tmp_path / "out.jsonl"
    pool = Pool(hosts(servers), timeout=Timeouts(first_chunk=120))
    async with pool:
        result = await batch(
            [f"Describe a city that begins with the letter {letter}." for letter in "ABC"],
            output,
            pool=pool,
            model=small,
            format=City.model_json_schema(),
            options={**SAME, "num_predict": 60},
        )
    assert (result.done, result.failed) == (3, 0)
    assert {record["host"] for record in records(output)} == {servers[0].url}
    for record in records(output):
        City.model_validate_json(record["response"]["text"])


async def test_of_many_texts_the_one_that_is_too_long_fails_alone(servers: list[RealOllama], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rows = [{"id": f"r{n}", "input": "hello " * (5000 if n == 11 else 3), "truncate": False} for n in range(24)]
    result = await batch(rows, output, pool=hosts(servers), model=MODEL, kind="embed")
    assert (result.done, result.failed) == (23, 1)
    (failure,) = records(tmp_path / "out.jsonl.failed.jsonl")
    assert (failure["id"], failure["error"]["status_code"]) == ("r11", 400)
    assert {len(record["response"]["embedding"]) for record in records(output)} == {64}


async def lose_its_slot(server: RealOllama) -> bool:
    """Leave answers early until the server has lost its only slot, which is a fault of the server."""
    by_chance = random.Random(3)
    options = {"num_predict": -1, "num_thread": 1}
    async with AsyncClient(server.url, timeout=Timeouts(first_chunk=3)) as client:
        with suppress(PhaseTimeout):
            for _ in range(ABORTS):
                stream = client.chat(MODEL, "hi", stream=True, options=options)
                left = by_chance.randint(1, 30)
                with suppress(AbortError):
                    async for _ in stream:
                        left -= 1
                        if not left:
                            stream.abort()
            return False
        return True


async def test_a_server_that_has_lost_its_only_slot_does_not_end_a_batch(
    servers: list[RealOllama], tmp_path: Path
) -> None:
    good, leaky = servers
    if not await lose_its_slot(leaky):
        pytest.skip(f"the server has not lost its slot in {ABORTS} aborts")
    try:
        pool = Pool(hosts(servers), timeout=Timeouts(first_chunk=2))
        async with pool:
            result = await batch(
                [f"say {n}" for n in range(40)],
                tmp_path / "out.jsonl",
                pool=pool,
                model=MODEL,
                options={"num_predict": 20, "num_thread": 1},
            )
            assert (result.done, result.failed, result.aborted) == (40, 0, 0)
            assert {record["host"] for record in records(tmp_path / "out.jsonl")} == {good.url}
            state = pool.hosts[1]
            assert state.out_models == {f"{MODEL}:latest"}
            assert "first_chunk" in (state.why or "")
    finally:
        leaky.unload()
