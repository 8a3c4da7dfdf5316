"""Many streams that one abort ends: their sockets at once, everything else a part in each round of the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from teardown.harness import BOUND, registrations, ticks, until

from ollama_async import AbortError, AsyncClient, CancelToken, ChatResponse
from ollama_async._wire.reader import ResponseReader
from ollama_async._wire.release import RELEASES_A_ROUND
from ollama_async.testing import FakeOllama, Reply, Stall

MANY = 3 * RELEASES_A_ROUND
CHUNK = {"model": "m", "message": {"role": "assistant", "content": "one"}, "done": False}

Readers = list["asyncio.Task[ChatResponse]"]


@pytest.fixture
async def readers(server: FakeOllama, client: AsyncClient, token: CancelToken) -> Readers:
    """Tasks that have read a chunk each and wait for the next."""
    server.script("/api/chat", Reply([CHUNK, Stall()]), always=True)
    streams = [client.chat("fake", "hi", stream=True, token=token) for _ in range(MANY)]
    for stream in streams:
        await anext(stream)
    tasks = [asyncio.create_task(stream.collect()) for stream in streams]
    await ticks(3)
    return tasks


def here(abort: Callable[[], object]) -> None:
    abort()


def in_thread(abort: Callable[[], object]) -> None:
    thread = threading.Thread(target=abort)
    thread.start()
    thread.join(BOUND)


@pytest.mark.parametrize("where", [here, in_thread])
async def test_hundreds_are_left_at_once_and_given_back_in_turn(
    server: FakeOllama, readers: Readers, token: CancelToken, where: Callable[[Callable[[], object]], None]
) -> None:
    where(lambda: token.abort("stop"))
    # The loop stands still meanwhile.
    for record in server.connections:
        assert record.wait_left(BOUND)
        assert record.bytes_after_left == 0
    assert registrations(token) == 0
    ended, most = 0, 0
    while ended < MANY:
        await asyncio.sleep(0)
        before, ended = ended, sum(task.done() for task in readers)
        most = max(most, ended - before)
    assert most <= RELEASES_A_ROUND
    for result in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(result, AbortError)
        assert result.partial.message.content == "one"


async def test_one_that_cannot_be_given_back_does_not_keep_the_others(
    readers: Readers, token: CancelToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, give_back, broken = asyncio.get_running_loop(), ResponseReader.release, []
    told: list[dict[str, Any]] = []

    def fail_once(reader: ResponseReader) -> None:
        give_back(reader)
        if not broken:
            broken.append(reader)
            raise RuntimeError("broken")

    monkeypatch.setattr(ResponseReader, "release", fail_once)
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        token.abort("stop")
        await until(lambda: all(task.done() for task in readers), "the end of all")
    finally:
        loop.set_exception_handler(before)
    assert [str(context["exception"]) for context in told] == ["broken"]
    for result in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(result, AbortError)
