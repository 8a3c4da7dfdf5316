"""Scenarios S61 to S86: lifetime and misuse of the iterator; clients, reuse of connections, platforms.

S84 (asyncio and uvloop) is every test of this directory: each runs on both. S87 is in tests/real/test_real_stops.py.
"""

from __future__ import annotations

import asyncio
import gc
import pathlib
import random
import ssl
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
import trustme
from teardown.harness import (
    BOUND,
    client_of,
    live_timers,
    over_the_network,
    read_all,
    registrations,
    saw_leave,
    through_proxy,
    ticks,
    until,
)
from wire.tunnel import TunnelProxy

from ollama_async import AbortError, AsyncClient, CancelToken, ChatResponse, Stream, StreamBusy, StreamClosed
from ollama_async._call import exchange as _exchange
from ollama_async._wire import reader as _reader
from ollama_async.testing import Endless, FakeOllama, Gate, NoEnd, Pause, Reply, Stall

TEXTS = [f"word{number} " for number in range(20)]
DONE = {"model": "fake", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}


def line(text: str) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False}


def chat(client: AsyncClient, token: CancelToken | None = None) -> Stream[ChatResponse]:
    return client.chat("fake", "hi", stream=True, token=token)


@pytest.fixture
def stalled(server: FakeOllama, client: AsyncClient, token: CancelToken) -> Iterator[Stream[ChatResponse]]:
    """A stream that has two chunks, and then nothing more."""
    server.script("/api/chat", Reply([line("one "), line("two"), Stall()]))
    yield chat(client, token)
    assert registrations(token) == 0


async def bounded(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, BOUND)


# -- D. lifetime of the iterator --


async def test_s61_break_inside_async_with(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    async with stalled as stream:
        async for _ in stream:
            break
        saw_leave(server)
    assert stalled.outcome == "closed"


async def test_s61_async_with_left_in_mid_stream(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    async with stalled as stream:
        assert (await anext(stream)).message.content == "one "
        assert server.connections[0].open
    saw_leave(server)
    assert stalled.outcome == "closed"


async def test_s62_bare_break_with_the_stream_dropped(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    """No warning: to leave a loop is a proper way to end."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    async for _ in chat(client, token):
        break
    saw_leave(server)
    await ticks(3)
    assert registrations(token) == 0


async def test_s63_bare_break_with_the_stream_kept(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    """By design it is closed as well: the iterator that only the loop held is gone."""
    async for _ in stalled:
        break
    saw_leave(server)
    assert stalled.outcome == "closed"
    assert stalled.text in {"one ", "one two"}
    with pytest.raises(StreamClosed):
        await anext(stalled)


async def test_s63_anext_leaves_the_stream_open_until_the_client_is_closed(
    server: FakeOllama, client: AsyncClient, stalled: Stream[ChatResponse]
) -> None:
    assert (await anext(stalled)).message.content == "one "
    await ticks(10)
    assert server.connections[0].open
    assert (await anext(stalled)).message.content == "two"
    assert server.connections[0].open
    await client.aclose()
    saw_leave(server)
    with pytest.raises(StreamClosed, match="the client was closed"):
        await anext(stalled)


async def test_s64_exception_in_the_loop_body(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    async def reader() -> None:
        async for _ in stalled:
            raise LookupError("the body's")

    with pytest.raises(LookupError, match="the body's"):
        await reader()
    saw_leave(server)
    assert stalled.outcome == "closed"


async def test_s64_exception_inside_async_with(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    with pytest.raises(LookupError):
        async with stalled as stream:
            async for _ in stream:
                raise LookupError
    saw_leave(server)


async def test_s65_exception_kept_with_its_traceback(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))

    async def reader() -> None:
        stream = chat(client)
        async for _ in stream:
            raise LookupError

    kept: list[BaseException] = []
    try:
        await reader()
    except LookupError as exc:
        kept.append(exc)
    saw_leave(server)
    assert kept[0].__traceback__ is not None
    kept.clear()


async def test_s65_abort_error_kept_with_its_traceback(
    server: FakeOllama, stalled: Stream[ChatResponse], token: CancelToken
) -> None:
    kept: list[AbortError] = []
    try:
        async for chunk in stalled:
            if chunk.message.content == "two":
                token.abort("stop")
    except AbortError as exc:
        kept.append(exc)
    saw_leave(server)
    assert kept[0].partial.message.content == "one two"


async def test_s66_stream_in_a_reference_cycle(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream: Any = chat(client, token)
    stream.itself = stream
    await anext(stream)
    del stream
    assert server.connections[0].open
    with pytest.warns(ResourceWarning, match="unclosed <Stream"):
        gc.collect()
    saw_leave(server)
    await ticks(3)
    assert registrations(token) == 0


async def test_s66_loop_iterator_in_a_reference_cycle(server: FakeOllama, client: AsyncClient) -> None:
    """Held by a frame that an exception holds that the frame holds."""
    server.script("/api/chat", Reply([line("one "), Stall()]))

    async def reader() -> None:
        iterator = aiter(chat(client))
        await anext(iterator)
        try:
            raise LookupError
        except LookupError as exc:
            itself = exc
        assert itself.__traceback__ is not None

    await reader()
    assert server.connections[0].open
    with warnings.catch_warnings():
        # Due when the stream is finalised before the iterator: the collector goes in no particular order.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    saw_leave(server)


async def test_s67_a_second_consumer_is_refused_at_once(
    server: FakeOllama, stalled: Stream[ChatResponse], token: CancelToken
) -> None:
    seen: list[Any] = []
    first = asyncio.create_task(read_all(stalled, seen))
    await until(lambda: len(seen) == 2, "two chunks")
    for _ in range(2):
        with pytest.raises(StreamBusy):
            await bounded(anext(stalled))
    await ticks(5)
    assert server.connections[0].open
    assert not first.done()
    token.abort("stop")
    with pytest.raises(AbortError):
        await bounded(first)


async def test_s67_a_second_consumer_that_was_refused_takes_nothing_with_it(
    server: FakeOllama, client: AsyncClient
) -> None:
    """Its iterator is dropped later, at a moment at which the first consumer does not wait."""
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), gate, line("two "), DONE]))
    stream = chat(client)
    reader = aiter(stream)
    assert (await bounded(anext(reader))).message.content == "one "
    reading = asyncio.create_task(anext(reader))  # type: ignore[arg-type]
    await ticks(5)
    second = aiter(stream)
    with pytest.raises(StreamBusy):
        await bounded(anext(second))
    gate.open()
    assert (await bounded(reading)).message.content == "two "
    del second
    gc.collect()
    assert stream.outcome is None
    assert [chunk.done async for chunk in reader] == [True]


async def test_s67_a_second_consumer_while_opening(server: FakeOllama, client: AsyncClient) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), DONE], before_head=[gate]))
    stream = chat(client)
    first = asyncio.create_task(stream.collect())
    await asyncio.to_thread(gate.wait_reached)
    for _ in range(2):
        with pytest.raises(StreamBusy):
            await bounded(stream.__aenter__())
    gate.open()
    assert (await bounded(first)).message.content == "one "


async def test_s68_aclose_while_another_task_is_in_anext(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    assert (await anext(stalled)).message.content == "one "
    assert (await anext(stalled)).message.content == "two"
    reader = asyncio.create_task(anext(stalled))  # type: ignore[arg-type]
    await ticks(5)
    assert not reader.done()
    await stalled.aclose()
    saw_leave(server)
    with pytest.raises(StreamClosed):
        await bounded(reader)
    assert stalled.outcome == "closed"


async def test_s68_aclose_while_another_task_opens(server: FakeOllama, client: AsyncClient) -> None:
    for tick in range(30):
        gate = Gate()
        server.script("/api/chat", Reply(before_head=[gate]))
        stream = chat(client)
        reader = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await ticks(tick)
        await stream.aclose()
        with pytest.raises(StreamClosed):
            await bounded(reader)
        server.forget()
    await until(lambda: not any(record.open for record in server.connections), "every connection closed")


async def test_s69_aclose_twice(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    await anext(stalled)
    await stalled.aclose()
    saw_leave(server)
    await stalled.aclose()
    assert stalled.outcome == "closed"


async def test_s69_aclose_from_many_tasks_at_once(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    await anext(stalled)
    await bounded(asyncio.gather(*(stalled.aclose() for _ in range(5))))
    saw_leave(server)


async def test_s69_aclose_before_anything_was_sent(server: FakeOllama, client: AsyncClient) -> None:
    stream = chat(client)
    await stream.aclose()
    await stream.aclose()
    for _ in range(2):
        with pytest.raises(StreamClosed):
            await anext(stream)
    assert server.connections == ()


async def test_s70_iterating_after_close_raises_each_time(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    await anext(stalled)
    await anext(stalled)
    await stalled.aclose()
    for _ in range(2):
        with pytest.raises(StreamClosed, match="closed") as caught:
            async for _ in stalled:
                pytest.fail("a chunk of a closed stream")
        assert caught.value.partial.message.content == "one two"
        with pytest.raises(StreamClosed):
            await stalled.collect()
        with pytest.raises(StreamClosed):
            await anext(stalled)


async def test_s70_iterating_after_the_natural_end_ends_at_once(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply.chat(*TEXTS))
    stream = chat(client)
    assert (await stream.collect()).message.content == "".join(TEXTS)
    await stream.aclose()
    assert [chunk async for chunk in stream] == []
    assert (await stream.collect()).message.content == "".join(TEXTS)
    assert len(server.requests) == 1


async def test_s71_a_stream_that_was_never_iterated_has_sent_nothing(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    chat(client, token)
    stream = chat(client, token)
    assert registrations(token) == 0
    await stream.aclose()
    del stream
    async with client:
        pass
    assert server.connections == ()


async def test_s72_enter_anext_and_close_in_three_tasks(server: FakeOllama, stalled: Stream[ChatResponse]) -> None:
    async def step(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    stream = await asyncio.create_task(step(stalled.__aenter__()))
    chunk = await asyncio.create_task(step(anext(stream)))
    assert chunk.message.content == "one "
    assert (await asyncio.create_task(step(anext(stream)))).message.content == "two"
    await asyncio.create_task(step(stream.__aexit__(None, None, None)))
    saw_leave(server)
    assert stream.text == "one two"


CHILD = """
import asyncio, ssl, sys
import uvloop
from ollama_async import AsyncClient, CancelToken

url, authority, kind, way = sys.argv[1:]
factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[kind]
client = AsyncClient(url, verify=ssl.create_default_context(cafile=authority))
token = CancelToken()
kept = []

def new_loop():
    loop = factory()
    loop.slow_callback_duration = 20.0  # on a busy machine -X dev would say what was slow
    return loop

async def main():
    stream = client.chat("fake", "hi", stream=True, token=token)
    if way != "opening":
        kept.append(stream)
    if way == "loop":
        kept.append(aiter(stream))
        await anext(kept[-1])
    elif way == "task":
        kept.append(asyncio.create_task(stream.collect()))
        await asyncio.sleep(0.05)
    elif way == "opening":
        kept.append(asyncio.create_task(stream.collect()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    else:
        await anext(stream)
        await anext(stream)

def ended():
    print("ended", flush=True)
    sys.stdin.readline()
"""


def child(
    server: FakeOllama, authority: trustme.CA, tmp_path: pathlib.Path, kind: str, way: str, body: str, *options: str
) -> str:
    """Run a program with an open stream; have it wait when it says so, until the server has seen it leave.

    Returns:
        What it wrote to stderr.
    """
    pem = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(pem))
    program = CHILD + textwrap.dedent(body)
    command = [sys.executable, *options, "-c", program, server.url, str(pem), kind, way]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            told = process.stdout.readline()
            if told and server.connections:
                saw_leave(server)
            _, errors = process.communicate("\n", timeout=20)
        finally:
            process.kill()
    assert (told, process.returncode) == ("ended\n", 0), errors
    return errors


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@pytest.mark.parametrize("way", ["anext", "loop", "task", "opening"])
@over_the_network
def test_s73_asyncio_run_returns_with_an_open_stream(
    server: FakeOllama, authority: trustme.CA, tmp_path: pathlib.Path, kind: str, way: str
) -> None:
    server.script("/api/chat", Reply([line("one "), line("two"), Stall()]))
    body = """
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
        assert not token._registrations, "registrations left"
        ended()
        if way == "anext":
            assert kept[0].outcome == "closed", kept[0]
            assert kept[0].text == "one two"
    """
    errors = child(server, authority, tmp_path, kind, way, body, "-X", "dev", "-W", "error")
    assert errors == ""


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@over_the_network
def test_s74_stream_deleted_after_its_loop_was_closed_in_order(
    server: FakeOllama, authority: trustme.CA, tmp_path: pathlib.Path, kind: str
) -> None:
    server.script("/api/chat", Reply([line("one "), line("two"), Stall()]))
    body = """
        import gc
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
        kept.clear()
        del client
        gc.collect()
        ended()
    """
    assert child(server, authority, tmp_path, kind, "anext", body, "-X", "dev", "-W", "error") == ""


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@over_the_network
def test_s74_stream_deleted_after_its_loop_was_closed_without_order(
    server: FakeOllama, authority: trustme.CA, tmp_path: pathlib.Path, kind: str
) -> None:
    """Without the steps of ``asyncio.run()``. A ResourceWarning is due then, but no traceback."""
    server.script("/api/chat", Reply([line("one "), line("two"), Stall()]))
    body = """
        loop = new_loop()
        loop.run_until_complete(main())
        loop.close()
        assert kept[0].outcome is None
        kept.clear()
        assert token.abort() is True
        ended()
    """
    errors = child(server, authority, tmp_path, kind, "anext", body, "-X", "dev")
    assert "Event loop is closed" not in errors
    assert "Traceback" not in errors
    assert "unclosed <Stream of ChatResponse: open, 2 chunks>" in errors


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@over_the_network
def test_s74_abort_after_the_loop_was_closed(
    server: FakeOllama, authority: trustme.CA, tmp_path: pathlib.Path, kind: str
) -> None:
    server.script("/api/chat", Reply([line("one "), line("two"), Stall()]))
    body = """
        loop = new_loop()
        loop.run_until_complete(main())
        loop.close()
        assert token.abort("late") is True
        assert (kept[0].outcome, kept[0].reason) == ("aborted", "late")
        ended()
    """
    errors = child(server, authority, tmp_path, kind, "anext", body, "-X", "dev")
    assert "Event loop is closed" not in errors
    assert "Traceback" not in errors


async def parts(stream: Stream[ChatResponse]) -> AsyncIterator[bytes]:
    """A user's own async generator, as handed to a web framework's streaming response."""
    async for chunk in stream:
        yield chunk.message.content.encode()


@pytest.mark.parametrize("place", ["waiting for a chunk", "sending one"])
@pytest.mark.parametrize("scoped", [False, True], ids=["task", "anyio scope"])
async def test_s75_wrapped_in_a_users_async_generator_whose_client_is_gone(
    server: FakeOllama, client: AsyncClient, token: CancelToken, place: str, scoped: bool
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    sent: list[bytes] = []

    async def respond() -> None:
        async for part in parts(chat(client, token)):
            sent.append(part)
            if place == "sending one":
                await asyncio.Event().wait()

    async def serve() -> None:
        if not scoped:
            await respond()
            return
        async with anyio.create_task_group() as group:
            group.start_soon(respond)

    task = asyncio.create_task(serve())
    await until(lambda: sent == [b"one "], "the first part")
    await ticks(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if place == "sending one":
        # The generator stands at its yield: asyncio closes it in a task of its own, a few rounds later.
        await until(lambda: registrations(token) == 0, "the generator closed")
    saw_leave(server)


async def test_s76_a_consumer_that_suppresses_its_cancellation_finds_the_stream_closed(
    server: FakeOllama, stalled: Stream[ChatResponse]
) -> None:
    ends: list[type[BaseException]] = []

    async def stubborn() -> None:
        iterator = aiter(stalled)
        for _ in range(5):
            try:
                await anext(iterator)
            except BaseException as exc:
                ends.append(type(exc))

    task = asyncio.create_task(stubborn())
    await until(lambda: stalled.timing.chunks == 2, "two chunks")
    await ticks(3)
    task.cancel()
    await bounded(task)
    assert ends == [asyncio.CancelledError, StreamClosed, StreamClosed]
    saw_leave(server)


async def test_s76_a_cancellation_suppressed_in_the_loop_body_does_not_touch_the_stream(
    server: FakeOllama, client: AsyncClient
) -> None:
    server.script("/api/chat", Reply.chat(*TEXTS, interval=0.001))
    texts: list[str] = []

    async def stubborn() -> None:
        async for chunk in chat(client):
            texts.append(chunk.message.content)
            if len(texts) == 3:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.sleep(BOUND)
                task.uncancel()

    task = asyncio.create_task(stubborn())
    await bounded(task)
    assert "".join(texts) == "".join(TEXTS)


# -- E. client, reuse, platform --


async def test_s77_soak_1000_stops_at_random_ticks(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    chance = random.Random(77)
    server.script("/api/chat", Reply.endless_chat(interval=0.0005), always=True)
    outcomes: list[str] = []

    async def one() -> None:
        stopper = token.child()
        stream = chat(client, stopper)
        reader = asyncio.create_task(read_all(stream, []))
        await ticks(chance.choice([chance.randrange(12), chance.randrange(100)]))
        way = chance.choice(["abort", "abort", "cancel", "aclose"])
        if way == "abort":
            stopper.abort("stop")
        elif way == "cancel":
            reader.cancel()
        else:
            await stream.aclose()
        await asyncio.wait([reader], timeout=BOUND)
        assert reader.done()
        if reader.cancelled():
            outcomes.append("cancelled")
        else:
            outcomes.append(type(reader.exception()).__name__)

    for _ in range(200):
        await asyncio.gather(*(one() for _ in range(5)))
    assert set(outcomes) == {"AbortError", "StreamClosed", "cancelled"}
    assert len(outcomes) == 1000
    assert registrations(token) == 0
    await until(lambda: not any(record.open for record in server.connections), "every connection closed")
    assert sum(record.bytes_after_left for record in server.connections) == 0
    assert (await client.version()).version
    assert [record.open for record in server.connections].count(True) == 1


async def test_s78_abort_one_of_two_streams(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stopped = chat(client, token)
    await anext(stopped)
    server.script("/api/chat", Reply([*map(line, TEXTS[:10]), gate, *map(line, TEXTS[10:]), DONE]))
    other = chat(client)
    seen: list[Any] = []
    reader = asyncio.create_task(read_all(other, seen))
    await until(lambda: len(seen) == 10, "ten chunks")
    token.abort("stop")
    saw_leave(server, 0)
    gate.open()
    await bounded(reader)
    assert [chunk.message.content for chunk in seen] == [*TEXTS, ""]
    assert other.outcome == "done"
    assert server.connections[1].open
    with pytest.raises(AbortError):
        await anext(stopped)


async def test_s79_closing_the_client_ends_all_its_streams(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]), always=True)
    streams = [chat(client) for _ in range(10)]
    seen: list[list[Any]] = [[] for _ in streams]
    readers = [asyncio.create_task(read_all(stream, into)) for stream, into in zip(streams, seen, strict=True)]
    await until(lambda: all(seen), "a chunk each")
    await client.aclose()
    for number in range(10):
        saw_leave(server, number)
    ends = await bounded(asyncio.gather(*readers, return_exceptions=True))
    assert [type(end) for end in ends] == [StreamClosed] * 10
    assert [end.partial.message.content for end in ends] == ["one "] * 10
    assert {stream.outcome for stream in streams} == {"closed"}


async def test_s80_use_after_the_client_was_closed(server: FakeOllama, client: AsyncClient) -> None:
    assert (await client.version()).version
    made_before = chat(client)
    await client.aclose()
    await client.aclose()
    saw_leave(server)
    for call in (
        lambda: client.version(),
        lambda: client.chat("fake", "hi"),
        lambda: anext(chat(client)),
        lambda: chat(client).collect(),
        lambda: anext(made_before),
    ):
        with pytest.raises(StreamClosed, match="the client is closed"):
            await call()
    assert len(server.connections) == 1


async def test_s81_three_natural_ends_share_one_connection(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", *[Reply.chat(*TEXTS)] * 4)
    text = "".join(TEXTS)
    assert (await chat(client).collect()).message.content == text
    async with chat(client) as stream:
        assert "".join([chunk.message.content async for chunk in stream]) == text
    seen: list[Any] = []
    await read_all(chat(client), seen)
    assert len(seen) == len(TEXTS) + 1
    stream = chat(client)
    while not (await anext(stream)).done:
        pass
    await stream.aclose()
    assert (await client.version()).version
    assert [len(record.requests) for record in server.connections] == [5]


ENDINGS: dict[str, Callable[[Stream[ChatResponse]], Awaitable[object]]] = {
    "loop": lambda stream: read_all(stream, []),
    "collect": lambda stream: stream.collect(),
}


@pytest.mark.parametrize("finish", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("after", [NoEnd(), Endless(lambda _: b"\n" * 1000)], ids=["silence", "flood"])
async def test_s82_done_and_the_body_never_ends(
    server: FakeOllama, client: AsyncClient, token: CancelToken, finish: Callable[[Any], Awaitable[object]], after: Any
) -> None:
    server.script("/api/chat", Reply([line("one "), DONE, after]))
    stream = chat(client, token)
    started = time.monotonic()
    await bounded(finish(stream))
    assert time.monotonic() - started < 2, "the drain is bounded by 0.1 s"
    saw_leave_of_flood(server)
    assert (stream.outcome, stream.text) == ("done", "one ")
    assert registrations(token) == 0
    assert (await client.version()).version


def saw_leave_of_flood(server: FakeOllama) -> None:
    # A server that writes all the time may get some bytes out between the client's FIN and its own look at it.
    assert server.connections[-1].wait_left(BOUND)


async def test_s82_async_with_and_the_body_never_ends(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([line("one "), DONE, NoEnd()]))
    started = time.monotonic()
    async with chat(client) as stream:
        while not (await anext(stream)).done:
            pass
        assert server.connections[0].open
    assert time.monotonic() - started < 2
    saw_leave(server)


async def test_s82_left_at_the_last_chunk_while_reading_is_paused(
    server: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the end of the body, which has to be read all the same for the connection to be used again."""
    monkeypatch.setattr(_reader, "HIGH_WATER", 10)
    server.script("/api/chat", Reply([line("one "), DONE, Pause(0.02)]))
    stream = chat(client)
    async for chunk in stream:
        if chunk.done:
            break
    exchange = stream._reader.call.exchange
    assert exchange is not None
    await until(lambda: not exchange.reader.is_attached, "the end of the body")
    assert (await client.version()).version
    assert len(server.connections) == 1


async def test_s82_a_body_that_ends_during_the_drain_is_worth_the_wait(
    server: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exchange, "DISCARD_SECONDS", BOUND)  # a loaded machine takes more than a tenth of a second
    server.script("/api/chat", *[Reply([line("one "), DONE, Pause(0.02)])] * 3)
    for _ in range(3):
        assert (await chat(client).collect()).message.content == "one "
    assert len(server.connections) == 1


@pytest.fixture
async def draining(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> AsyncIterator[tuple[Stream[ChatResponse], asyncio.Task[Any]]]:
    """A stream whose last chunk has come, and a reader who waits for the end of the body, which does not come."""
    server.script("/api/chat", Reply([line("one "), DONE, NoEnd()]))
    stream = chat(client, token)
    while not (await anext(stream)).done:
        pass

    async def reader() -> bool:
        return await anext(stream, None) is None

    task = asyncio.create_task(reader())
    await ticks(2)
    assert not task.done()
    yield stream, task
    assert (stream.outcome, stream.text) == ("done", "one ")
    assert stream.response is not None
    assert stream.response.done_reason == "stop"
    assert registrations(token) == 0


@pytest.mark.parametrize("way", ["token", "stream", "client"])
async def test_s83_abort_during_the_drain_changes_nothing(
    server: FakeOllama,
    client: AsyncClient,
    token: CancelToken,
    draining: tuple[Stream[ChatResponse], asyncio.Task[Any]],
    way: str,
) -> None:
    stream, task = draining
    if way == "token":
        token.abort("late")
    elif way == "stream":
        assert stream.abort("late") is False
    else:
        client.abort("late")
    assert await bounded(task) is True
    saw_leave(server)
    assert stream.reason is None


async def test_s83_cancel_during_the_drain(
    server: FakeOllama, draining: tuple[Stream[ChatResponse], asyncio.Task[Any]]
) -> None:
    stream, task = draining
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    saw_leave(server)
    assert await anext(stream, None) is None


async def test_s83_timeout_during_the_drain(
    server: FakeOllama, draining: tuple[Stream[ChatResponse], asyncio.Task[Any]]
) -> None:
    _, task = draining
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await task
    saw_leave(server)


async def test_s83_client_closed_during_the_drain(
    server: FakeOllama, client: AsyncClient, draining: tuple[Stream[ChatResponse], asyncio.Task[Any]]
) -> None:
    await client.aclose()
    saw_leave(server)
    assert await bounded(draining[1]) is True


async def test_s83_aclose_during_the_drain_of_another_task(
    server: FakeOllama, draining: tuple[Stream[ChatResponse], asyncio.Task[Any]]
) -> None:
    """Both of them get to the end."""
    stream, task = draining
    await bounded(stream.aclose())
    assert await bounded(task) is True
    saw_leave(server)


async def test_s83_two_tasks_close_at_once_after_done(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([line("one "), DONE, NoEnd()]))
    stream = chat(client)
    while not (await anext(stream)).done:
        pass
    await bounded(asyncio.gather(stream.aclose(), stream.aclose(), stream.aclose()))
    saw_leave(server)
    assert stream.outcome == "done"


async def leave_at_done(stream: Stream[ChatResponse]) -> None:
    async for chunk in stream:
        if chunk.done:
            break


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
async def test_s83_leaving_at_the_done_chunk_frees_the_connection_when_the_body_ends(
    server: FakeOllama, client: AsyncClient, token: CancelToken, kept: bool
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), DONE, gate]), Reply.chat("two"))
    stream: Stream[ChatResponse] | None = chat(client, token)
    await leave_at_done(stream)
    if not kept:
        stream = None
    gate.open()
    record = server.connections[0]
    sent = record.bytes_sent
    await until(lambda: record.bytes_sent > sent or not record.open, "the end of the body")
    await asyncio.sleep(0.02)
    assert (await chat(client).collect()).message.content == "two"
    assert len(server.connections) == 1
    if stream is not None:
        assert stream.outcome == "done"
    assert registrations(token) == 0


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
async def test_s83_leaving_at_the_done_chunk_closes_when_the_body_does_not_end(
    server: FakeOllama, client: AsyncClient, token: CancelToken, kept: bool
) -> None:
    server.script("/api/chat", Reply([line("one "), DONE, NoEnd()]))
    stream: Stream[ChatResponse] | None = chat(client, token)
    await leave_at_done(stream)
    if not kept:
        stream = None
    await until(lambda: server.connections[0].left_at is not None, "the end of the drain")
    assert registrations(token) == 0


@pytest.mark.parametrize("closes", [0, 1], ids=["dropped", "closed"])
async def test_s83_no_timer_is_left_of_a_drain_that_was_over_early(
    server: FakeOllama, client: AsyncClient, closes: int
) -> None:
    """Two parties may begin the drain: the loop that was left, and the stream that is closed or dropped."""
    loop = asyncio.get_running_loop()
    before = len(live_timers(loop))
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), DONE, gate]))
    stream = chat(client)
    await leave_at_done(stream)
    exchange = stream._reader.call.exchange
    assert exchange is not None
    await ticks(2)
    if closes:
        gate.open()
        await bounded(stream.aclose())
    else:
        del stream
        await ticks(2)
        gate.open()
        while exchange.reader.is_attached:
            await asyncio.sleep(0)
    # The timer of idle connections is the pool's.
    assert len(live_timers(loop)) <= before + 1
    assert not server.connections[0].wait_left(0)


async def test_s83_leaving_at_the_done_chunk_as_the_loop_ends(server: FakeOllama, client: AsyncClient) -> None:
    """The drain behind is no reason to keep the client's close waiting."""
    server.script("/api/chat", Reply([line("one "), DONE, NoEnd()]))
    await leave_at_done(chat(client))
    await client.aclose()
    saw_leave(server)


# -- S85: unix sockets and proxies --


@pytest.fixture
def uds_server(tmp_path: pathlib.Path, nothing_left: Any) -> Iterator[FakeOllama]:
    with FakeOllama(uds=str(tmp_path / "ollama.sock")) as fake:
        yield fake


async def over_abort(stream: Stream[Any], task: asyncio.Task[Any], token: CancelToken) -> type[BaseException]:
    token.abort("stop")
    return AbortError


async def over_cancel(stream: Stream[Any], task: asyncio.Task[Any], token: CancelToken) -> type[BaseException]:
    task.cancel()
    await ticks(2)
    return asyncio.CancelledError


async def over_aclose(stream: Stream[Any], task: asyncio.Task[Any], token: CancelToken) -> type[BaseException]:
    await stream.aclose()
    return StreamClosed


Stop = Callable[[Stream[Any], asyncio.Task[Any], CancelToken], Awaitable[type[BaseException]]]


async def stop_after_a_chunk(server: FakeOllama, client: AsyncClient, token: CancelToken, stop: Stop) -> None:
    """Stop a stream while its reader waits for the second chunk; the server sees that at once, and nothing is lost."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = chat(client, token)
    seen: list[Any] = []
    task = asyncio.create_task(read_all(stream, seen))
    await until(lambda: seen, "the first chunk")
    expected = await stop(stream, task, token)
    saw_leave(server)
    with pytest.raises(expected):
        await bounded(task)
    assert stream.text == "one "
    assert registrations(token) == 0


@pytest.mark.parametrize("stop", [over_abort, over_cancel, over_aclose])
async def test_s85_stops_over_a_unix_socket(uds_server: FakeOllama, token: CancelToken, stop: Stop) -> None:
    async with client_of(uds_server) as client:
        await stop_after_a_chunk(uds_server, client, token, stop)


async def test_s85_break_over_a_unix_socket(uds_server: FakeOllama) -> None:
    uds_server.script("/api/chat", Reply([line("one "), Stall()]))
    async with client_of(uds_server) as client:
        stream = chat(client)
        async for _ in stream:
            break
        saw_leave(uds_server)


async def test_s85_abort_at_every_tick_over_a_unix_socket(uds_server: FakeOllama) -> None:
    uds_server.script("/api/chat", Reply([line("one "), Stall()]), always=True)
    async with client_of(uds_server) as client:
        for tick in range(30):
            token = CancelToken()
            task = asyncio.create_task(read_all(chat(client, token), []))
            await ticks(tick)
            token.abort("stop")
            with pytest.raises(AbortError):
                await bounded(task)
        await until(lambda: not any(record.open for record in uds_server.connections), "every connection closed")


async def test_s85_natural_ends_over_a_unix_socket_share_one_connection(uds_server: FakeOllama) -> None:
    async with client_of(uds_server) as client:
        for _ in range(3):
            uds_server.script("/api/chat", Reply.chat(*TEXTS))
            assert (await chat(client).collect()).message.content == "".join(TEXTS)
    assert [len(record.requests) for record in uds_server.connections] == [3]
    saw_leave(uds_server)


@over_the_network
@pytest.mark.parametrize("stop", [over_abort, over_cancel, over_aclose])
async def test_s85_stops_through_a_proxy(
    server: FakeOllama, token: CancelToken, stop: Stop, tunnel: TunnelProxy, client_tls: ssl.SSLContext
) -> None:
    async with through_proxy(server, tunnel, client_tls) as client:
        await stop_after_a_chunk(server, client, token, stop)


# -- S86 --


async def test_s86_an_aborted_pull_leaves_another_one_alone(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    gate = Gate()
    steps = [{"status": "pulling", "digest": "sha256:a", "total": 9, "completed": done} for done in range(1, 10)]
    server.script("/api/pull", Reply([*steps[:3], Stall()]))
    stopped = client.pull("fake", stream=True, token=token)
    await anext(stopped)
    server.script("/api/pull", Reply([*steps[:3], gate, *steps[3:], {"status": "success"}]))
    other = client.pull("fake", stream=True)
    seen: list[Any] = []
    reader = asyncio.create_task(read_all(other, seen))
    await until(lambda: len(seen) == 3, "three steps")
    token.abort("stop")
    saw_leave(server, 0)
    gate.open()
    await bounded(reader)
    assert [step.completed for step in seen] == [*range(1, 10), None]
    assert other.outcome == "done"
    with pytest.raises(AbortError) as caught:
        await anext(stopped)
    assert caught.value.partial.overall.completed == 3
