"""Every way to stop, on a real Ollama server: what its log, its sockets and its runner's CPU say.

``Watch.saw_end`` blocks the loop's thread right after the stop: what ends the request must have happened by then.
"""

from __future__ import annotations

import asyncio
import pathlib
import signal
import statistics
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import uvloop
from real.ollama_server import RealOllama
from teardown.harness import BOUND, Baseline, nothing_left_behind, registrations, ticks, until

from ollama_async import AbortError, AsyncClient, CancelToken, ChatResponse, Stream, StreamClosed, Timeouts
from ollama_async._wire.phase import Phase

pytestmark = pytest.mark.real

# One thread: with more, the tiny model's threads spin and make a small machine too busy to observe anything.
ENDLESS = {"num_predict": -1, "num_thread": 1}


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Watch:
    """What the server shows of one request."""

    def __init__(self, server: RealOllama) -> None:
        self.server = server
        self.mark = server.mark()
        self.before = server.client_connections()

    def saw_end(self, path: str = "/api/chat") -> None:
        """Block this thread until the server has logged the request's end and the connection is gone."""
        self.server.wait_for_request_end(self.mark, path, timeout=BOUND)
        self.server.wait_for_connections(self.before, timeout=BOUND)


@pytest_asyncio.fixture
async def nothing_left(real_ollama: RealOllama) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(real_ollama: RealOllama, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(real_ollama.url) as made:
        yield made


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()


@pytest.fixture
def watch(real_ollama: RealOllama) -> Watch:
    return Watch(real_ollama)


@pytest.fixture
def stream(client: AsyncClient, real_ollama: RealOllama, token: CancelToken) -> Stream[ChatResponse]:
    return client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, token=token)


class Reader:
    """A task that reads a stream, and looks at the server as soon as that ends."""

    def __init__(self, stream: Stream[ChatResponse], watch: Watch) -> None:
        self.text: list[str] = []
        self.looked = False
        self._stream = stream
        self._watch = watch
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for chunk in self._stream:
                self.text.append(chunk.message.content or "")
        except BaseException:
            self._watch.saw_end()
            self.looked = True
            raise

    async def has(self, count: int) -> None:
        await until(lambda: len(self.text) >= count or self.task.done(), f"{count} chunks")
        assert not self.task.done(), self.task.exception()


def abort_here(token: CancelToken, stream: Stream[Any], client: AsyncClient) -> None:
    assert token.abort("stop")


def abort_in_thread(token: CancelToken, stream: Stream[Any], client: AsyncClient) -> None:
    thread = threading.Thread(target=token.abort, args=("stop",))
    thread.start()
    thread.join(BOUND)


def abort_in_signal_handler(token: CancelToken, stream: Stream[Any], client: AsyncClient) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: token.abort("stop"))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def abort_stream(token: CancelToken, stream: Stream[Any], client: AsyncClient) -> None:
    assert stream.abort("stop")


def abort_client(token: CancelToken, stream: Stream[Any], client: AsyncClient) -> None:
    client.abort("stop")


@pytest.mark.parametrize("stop", [abort_here, abort_in_thread, abort_in_signal_handler, abort_stream, abort_client])
async def test_abort(
    stop: Callable[[CancelToken, Stream[Any], AsyncClient], None],
    token: CancelToken,
    stream: Stream[ChatResponse],
    client: AsyncClient,
    watch: Watch,
) -> None:
    reader = Reader(stream, watch)
    await reader.has(5)
    stop(token, stream, client)
    watch.saw_end()
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(reader.task, BOUND)
    assert caught.value.reason == "stop"
    assert stream.text.startswith("".join(reader.text))
    assert caught.value.partial.message.content == stream.text
    assert registrations(token) == 0


async def test_abort_with_lines_buffered(
    token: CancelToken, stream: Stream[ChatResponse], real_ollama: RealOllama, watch: Watch
) -> None:
    await anext(stream)
    # The loop stands still while the server writes on; what it wrote is there when the loop goes round again.
    real_ollama.wait_for_log(watch.mark, ".", timeout=BOUND)
    busy = real_ollama.runner_cpu_seconds()
    while real_ollama.runner_cpu_seconds() < busy + 0.05:
        pass
    # The first of these may still be a line that had come alone, before the loop stood still.
    while not stream._reader.answer.decoder.lines and stream._reader.answer.index == len(stream._reader.answer.chunks):
        await anext(stream)
    read = stream.timing.chunks
    token.abort("stop")
    watch.saw_end()
    with pytest.raises(AbortError) as caught:
        await anext(stream)
    assert stream.timing.chunks == read
    assert caught.value.partial.message.content == stream.text


@pytest.mark.parametrize("times", [1, 2])
async def test_cancel(times: int, token: CancelToken, stream: Stream[ChatResponse], watch: Watch) -> None:
    reader = Reader(stream, watch)
    await reader.has(5)
    for _ in range(times):
        reader.task.cancel()
        await ticks(1)
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert reader.looked
    assert stream.outcome == "cancelled"
    assert stream.text.startswith("".join(reader.text))
    assert registrations(token) == 0


@pytest.mark.parametrize("tick", range(61))
@pytest.mark.parametrize("gap", [None, 1])
async def test_cancel_at_every_tick(
    tick: int, gap: int | None, client: AsyncClient, real_ollama: RealOllama, watch: Watch
) -> None:
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS)
    task = asyncio.create_task(stream.collect())
    await ticks(tick)
    task.cancel()
    if gap is not None:
        await ticks(gap)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # This thread waits, and with it the loop: whatever closed the connection has done so before.
    real_ollama.wait_for_connections(watch.before, timeout=BOUND)


async def test_asyncio_timeout(token: CancelToken, stream: Stream[ChatResponse], watch: Watch) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            async for _ in stream:
                pass
    watch.saw_end()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert stream.text
    assert registrations(token) == 0


async def test_task_group_sibling_fails(token: CancelToken, stream: Stream[ChatResponse], watch: Watch) -> None:
    async def read() -> None:
        try:
            async for _ in stream:
                reading.set()
        except asyncio.CancelledError:
            watch.saw_end()
            raise

    async def fail() -> None:
        await reading.wait()
        raise RuntimeError("the sibling's")

    reading = asyncio.Event()
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(fail())
    assert [str(exc) for exc in caught.value.exceptions] == ["the sibling's"]
    assert registrations(token) == 0


async def test_break_with_the_stream_kept(stream: Stream[ChatResponse], watch: Watch) -> None:
    async for _ in stream:
        break
    watch.saw_end()
    assert stream.outcome == "closed"


async def test_return_with_the_stream_kept(stream: Stream[ChatResponse], watch: Watch) -> None:
    async def first() -> ChatResponse:
        async for chunk in stream:
            return chunk
        raise AssertionError

    await first()
    watch.saw_end()


async def test_exception_in_the_loop_kept(stream: Stream[ChatResponse], watch: Watch) -> None:
    kept = None
    try:
        async for _ in stream:
            raise RuntimeError("the body's")
    except RuntimeError as exc:
        kept = exc
    watch.saw_end()
    assert kept is not None


async def test_aclose_from_another_task(stream: Stream[ChatResponse], watch: Watch) -> None:
    reader = Reader(stream, watch)
    await reader.has(3)
    await stream.aclose()
    watch.saw_end()
    with pytest.raises(StreamClosed):
        await asyncio.wait_for(reader.task, BOUND)


async def test_until(client: AsyncClient, real_ollama: RealOllama, watch: Watch) -> None:
    enough = 60
    stream = client.chat(
        real_ollama.model,
        "hi",
        stream=True,
        options=ENDLESS,
        until=lambda merged: len(merged["message"]["content"]) > enough,
    )
    final = await stream.collect()
    watch.saw_end()
    assert stream.outcome == "until"
    assert len(final.message.content or "") > enough


async def test_dropped(client: AsyncClient, real_ollama: RealOllama, watch: Watch) -> None:
    stream = await client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del stream
    watch.saw_end()


async def test_a_call_that_is_not_a_stream(
    client: AsyncClient, real_ollama: RealOllama, token: CancelToken, watch: Watch
) -> None:
    rested = real_ollama.runner_cpu_seconds()
    task = asyncio.create_task(client.chat(real_ollama.model, "hi", options=ENDLESS, token=token))
    await until(lambda: real_ollama.runner_cpu_seconds() > rested + 0.1, "the runner at work")
    token.abort("stop")
    watch.saw_end()
    with pytest.raises(AbortError):
        await asyncio.wait_for(task, BOUND)


async def test_s87_while_the_model_is_being_loaded(
    client: AsyncClient, real_ollama: RealOllama, token: CancelToken, watch: Watch
) -> None:
    """Before the headers: the commonest moment for a Stop."""
    real_ollama.unload()
    task = asyncio.create_task(client.chat(real_ollama.model, "hi", stream=True, token=token).collect())
    await asyncio.to_thread(real_ollama.wait_for_load, watch.mark, timeout=BOUND)
    token.abort("stop")
    watch.saw_end()
    with pytest.raises(AbortError):
        await asyncio.wait_for(task, BOUND)


def at_work(client: AsyncClient) -> list[Any]:
    """The readers of the answers that the client waits for."""
    pools = client._client._transport._pools.values()
    return [connection._reader for pool in pools for connection in pool._all if connection._reader]


async def test_during_an_upload(
    client: AsyncClient, real_ollama: RealOllama, token: CancelToken, watch: Watch, tmp_path: pathlib.Path
) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 27)
    task = asyncio.create_task(client.create_blob(big, token=token))
    await until(
        lambda: task.done() or any(connection.phase is Phase.SENDING for connection in at_work(client)), "the upload"
    )
    await ticks(50)
    token.abort("stop")
    real_ollama.wait_for_connections(watch.before, timeout=BOUND)
    with pytest.raises(AbortError):
        await asyncio.wait_for(task, BOUND)
    await asyncio.to_thread(real_ollama.wait_for_log, watch.mark, '"/api/blobs/')


def test_asyncio_run_ends_with_an_open_stream(real_ollama: RealOllama, loop_name: str) -> None:
    kept: list[Any] = []
    watch = Watch(real_ollama)

    async def main() -> None:
        client = AsyncClient(real_ollama.url)
        stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS)
        kept.extend((client, stream, await anext(stream)))

    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    watch.saw_end()


async def test_s87_the_runner_rests_after_an_abort(
    client: AsyncClient, real_ollama: RealOllama, stream: Stream[ChatResponse], token: CancelToken, watch: Watch
) -> None:
    reader = Reader(stream, watch)
    await reader.has(20)
    busy = real_ollama.runner_cpu_seconds()
    token.abort("stop")
    watch.saw_end()
    real_ollama.wait_until_idle()
    assert real_ollama.runner_cpu_seconds() >= busy
    with pytest.raises(AbortError):
        await asyncio.wait_for(reader.task, BOUND)


async def first_token_seconds(client: AsyncClient, model: str) -> float:
    stream = client.chat(model, "hi", stream=True, options={"num_predict": 1, "num_thread": 1})
    await stream.collect()
    first = stream.timing.first_chunk
    assert first is not None
    return first


async def test_s87_the_next_first_token_comes_as_on_an_idle_server(
    client: AsyncClient, real_ollama: RealOllama, watch: Watch
) -> None:
    """Were an aborted answer still being made, its runner would share its time with the next one's prompt."""
    idle = statistics.median([await first_token_seconds(client, real_ollama.model) for _ in range(9)])
    after: list[float] = []
    for _ in range(9):
        stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS)
        await anext(stream)
        stream.abort("stop")
        await stream.aclose()
        after.append(await first_token_seconds(client, real_ollama.model))
    # A generous bound: it holds the order of magnitude, no more. The figures are the benchmarks' business.
    assert statistics.median(after) < 20 * idle + 0.2


async def test_phase_timeout(client: AsyncClient, real_ollama: RealOllama, watch: Watch) -> None:
    stream = client.chat(real_ollama.model, "hi", stream=True, options=ENDLESS, timeout=Timeouts(total=0.3))
    with pytest.raises(TimeoutError) as caught:
        async for _ in stream:
            pass
    watch.saw_end()
    assert caught.value.partial.message.content == stream.text  # type: ignore[attr-defined]
