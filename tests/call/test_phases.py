"""The phases of an attempt: only the transitions of the table are taken, and each limit acts in its phases."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from teardown.harness import BOUND, until

from ollama_async import AbortError, AsyncClient, CancelToken, PhaseTimeout, ServerBusyError, Timeouts
from ollama_async._call import retry as _retry
from ollama_async._wire.link import NO_OWNER
from ollama_async._wire.phase import TRANSITIONS, Phase
from ollama_async._wire.reader import ResponseReader
from ollama_async.testing import FakeOllama, Gate, Reply, Stall

WAYS = pytest.mark.parametrize("way", ["direct", "foreign"])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Phase]]]:
    """The phases of each attempt in their order, of which none may follow another that the table does not name."""
    readers: dict[ResponseReader, list[Phase]] = {}
    attempts: list[list[Phase]] = []
    wrong: list[tuple[Phase, Phase]] = []
    original = ResponseReader.enter

    def enter(reader: ResponseReader, phase: Phase) -> None:
        before = reader.phase
        original(reader, phase)
        if reader.owner is NO_OWNER and reader not in readers:
            # The inner reader of a foreign request, or one of a bare transport.
            return
        if reader not in readers:
            readers[reader] = []
            attempts.append(readers[reader])
        if reader.phase is not before:
            readers[reader].append(reader.phase)
            if reader.phase not in TRANSITIONS[before]:
                wrong.append((before, reader.phase))

    monkeypatch.setattr(ResponseReader, "enter", enter)
    yield attempts
    assert wrong == []


def client_of(server: FakeOllama, way: str, **options: Any) -> AsyncClient:
    transport = httpx.AsyncHTTPTransport() if way == "foreign" else None
    return AsyncClient(server.url, transport=transport, **options)


NAMES = {phase.name: phase for phase in Phase}


def phases(text: str) -> list[Phase]:
    return [NAMES[name] for name in text.split()]


async def test_a_stream_on_a_new_and_on_an_idle_connection(fake_ollama: FakeOllama, taken: list[list[Phase]]) -> None:
    async with client_of(fake_ollama, "direct") as client:
        for _ in range(2):
            await client.chat("fake", "hi", stream=True).collect()
    rest = phases("WAITING HEAD BODY EOF CLOSED")
    assert taken == [[Phase.CONNECTING, *rest], rest]


async def test_a_stream_over_a_foreign_transport(fake_ollama: FakeOllama, taken: list[list[Phase]]) -> None:
    async with client_of(fake_ollama, "foreign") as client:
        await client.chat("fake", "hi", stream=True).collect()
    assert taken == [phases("WAITING HEAD BODY EOF CLOSED")]


async def test_a_redirect_goes_back(fake_ollama: FakeOllama, taken: list[list[Phase]]) -> None:
    fake_ollama.script("/api/chat", Reply(status=307, headers={"Location": "/elsewhere"}))
    fake_ollama.script("/elsewhere", Reply.chat("hi"))
    async with client_of(fake_ollama, "direct") as client:
        await client.chat("fake", "hi", stream=True).collect()
    [phases_taken] = taken
    assert phases_taken[:3] == phases("CONNECTING WAITING HEAD")
    assert phases_taken[-5:] == phases("WAITING HEAD BODY EOF CLOSED")


async def test_another_attempt_waits_first(
    fake_ollama: FakeOllama, taken: list[list[Phase]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "_FIRST_DELAY", 0.001)
    fake_ollama.script("/api/chat", Reply.error(503, "busy"))
    async with client_of(fake_ollama, "direct", retries=1) as client:
        await client.chat("fake", "hi", stream=True).collect()
    assert len(taken) == 2
    assert (taken[0][-1], taken[1][0], taken[1][-1]) == (Phase.CLOSED, Phase.BACKOFF, Phase.CLOSED)


@WAYS
async def test_an_abort_closes_in_any_phase(fake_ollama: FakeOllama, taken: list[list[Phase]], way: str) -> None:
    gate = Gate()
    fake_ollama.script("/api/chat", Reply(before_head=[gate, Stall()]))
    async with client_of(fake_ollama, way) as client:
        token = CancelToken()
        task = asyncio.create_task(client.chat("fake", "hi", token=token))
        await until(lambda: gate.reached, "the request")
        token.abort("stop")
        with pytest.raises(AbortError):
            await task
    assert taken[0][-2:] == phases("WAITING CLOSED")


# -- the limits --


async def blocks(more: asyncio.Event) -> AsyncIterator[bytes]:
    yield b"x" * 1000
    await more.wait()
    yield b"x"


@WAYS
@pytest.mark.parametrize("limit", ["upload", "idle"])
async def test_an_upload_that_does_not_get_on_has_a_limit(
    fake_ollama: FakeOllama, taken: list[list[Phase]], way: str, limit: str
) -> None:
    limits = Timeouts(**{"idle": None, limit: 0.2})
    async with client_of(fake_ollama, way, timeout=limits) as client:
        request = client._build("POST", "/api/blobs/sha256:0", blocks(asyncio.Event()))
        with pytest.raises(PhaseTimeout) as caught:
            await asyncio.wait_for(client._send(request, {}), BOUND)
    assert (caught.value.phase, caught.value.seconds) == (limit, 0.2)
    assert taken[0][-2:] == phases("SENDING CLOSED")
    assert fake_ollama.connections[0].wait_left(BOUND)


@WAYS
async def test_the_limit_of_the_upload_ends_with_the_upload(fake_ollama: FakeOllama, way: str) -> None:
    fake_ollama.script("/api/blobs/sha256:0", Reply(before_head=[Stall()]))
    more = asyncio.Event()
    more.set()
    limits = Timeouts(upload=0.3, first_chunk=0.6, idle=None)
    async with client_of(fake_ollama, way, timeout=limits) as client:
        request = client._build("POST", "/api/blobs/sha256:0", blocks(more))
        with pytest.raises(PhaseTimeout) as caught:
            await asyncio.wait_for(client._send(request, {}), BOUND)
    assert caught.value.phase == "first_chunk"


def test_timeouts_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Timeouts(1.0)  # type: ignore[misc]


# -- the log --


@pytest.mark.parametrize("end", ["done", "aborted", "error"])
async def test_a_log_tells_phases_and_stops_and_nothing_that_is_secret(
    fake_ollama: FakeOllama, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    caplog.set_level("DEBUG", "ollama_async")
    secret = "s3cret-words"
    fake_ollama.script("/api/chat", Reply.error(503, secret) if end == "error" else Reply.chat(secret, secret))
    token = CancelToken()
    async with AsyncClient(fake_ollama.url, headers={"Authorization": f"Bearer {secret}"}) as client:
        stream = client.chat("fake", secret, stream=True, token=token)
        endings: dict[str, Callable[[], object]] = {"aborted": lambda: token.abort(secret)}
        with contextlib.suppress(AbortError, ServerBusyError):
            async for _ in stream:
                endings.get(end, bool)()
        await until(lambda: "CLOSED" in caplog.text, "the end in the log")
    said = [record for record in caplog.records if record.name.startswith("ollama_async.exchange")]
    text = "\n".join(record.getMessage() for record in said)
    assert ": CONNECTING" in text
    assert f"CLOSED, {'complete' if end == 'done' else end}" in text
    assert secret not in text
    assert secret not in caplog.text


async def test_a_retry_is_logged(
    fake_ollama: FakeOllama, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "_FIRST_DELAY", 0.001)
    caplog.set_level("INFO", "ollama_async")
    fake_ollama.script("/api/chat", Reply.error(503, "busy with s3cret"))
    async with AsyncClient(fake_ollama.url, retries=1) as client:
        await client.chat("fake", "hi")
    [record] = [record for record in caplog.records if record.name == "ollama_async.retry"]
    assert "after ServerBusyError" in record.getMessage()
    assert "s3cret" not in caplog.text
