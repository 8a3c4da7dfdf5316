"""Scenarios S28 to S60 over a server: one token and many streams, threads and signals; cancellation from outside.

The reader's task is cancelled and the token aborted at every tick, twice, in both orders and in the same tick. What
must come out of it: an external cancellation is never swallowed, the server sees the client leave while the loop of
the client is blocked, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from teardown.harness import (
    BOUND,
    Baseline,
    black_hole,
    client_of,
    open_fds,
    over_the_network,
    read_all,
    registrations,
    saw_leave,
    ticks,
    until,
)

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ChatResponse,
    ConnectionBroken,
    Stream,
    StreamClosed,
)
from ollama_async._wire import dial as _dial
from ollama_async._wire.connection import Connection
from ollama_async._wire.socket import GuardedSocket
from ollama_async.testing import Block, FakeOllama, Gate, NoEnd, Raw, Reply, Stall

ONE_SERVER = pytest.mark.parametrize("server", ["tcp"], indirect=True)


def line(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}


async def paced(count: int) -> None:
    """Let the loop go round so slowly that the server and the kernel get on meanwhile."""
    for _ in range(count):
        await asyncio.sleep(0)
        time.sleep(0.0002)


def texts(seen: list[ChatResponse]) -> list[str]:
    return [chunk.message.content or "" for chunk in seen]


def all_left(server: FakeOllama) -> None:
    """Block this thread until every client of the server has left."""
    for record in server.connections:
        assert record.wait_left(BOUND), f"still there: {record!r}"
        assert record.bytes_after_left == 0


def thinly(server: FakeOllama, numbers: range, step: int = 5) -> range:
    """All numbers over TCP under asyncio, every n-th elsewhere."""
    plain = server.url.startswith("http:") and isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    return numbers if plain else numbers[::step]


async def fds_back_to(count: int) -> None:
    await until(lambda: len(open_fds()) <= count, f"descriptors left: {open_fds()}, {count} before")


@pytest.fixture
async def mid_stream(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> AsyncIterator[tuple[Stream[ChatResponse], asyncio.Task[None], list[ChatResponse]]]:
    """A stream, its reader that has got one chunk and waits for the next one, and the chunks."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[ChatResponse] = []
    task = asyncio.create_task(read_all(stream, seen))
    await until(lambda: seen, "the first chunk")
    await ticks(3)
    yield stream, task, seen
    task.cancel()
    await asyncio.wait([task])


MidStream = tuple[Stream[ChatResponse], "asyncio.Task[None]", list[ChatResponse]]


# -- one token, many streams --


async def test_s28_one_token_ends_its_20_streams_and_no_others(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), Stall()]), always=True)
    rest = [{"model": "fake", "response": f"{number} ", "done": number == 9} for number in range(10)]
    server.script("/api/generate", Reply([*rest[:5], gate, *rest[5:]]), always=True)
    mine = [client.chat("fake", "hi", stream=True, token=token) for _ in range(20)]
    others = [client.generate("fake", "hi", stream=True, token=CancelToken()) for _ in range(5)]
    seen: list[list[Any]] = [[] for _ in [*mine, *others]]
    tasks = [asyncio.create_task(read_all(stream, into)) for stream, into in zip([*mine, *others], seen, strict=True)]
    await until(lambda: all(seen[:20]) and all(len(into) == 5 for into in seen[20:]), "all streams")
    assert token.abort("all of mine") is True
    left = [record for record in server.connections if record.requests[0].route == "/api/chat"]
    assert len(left) == 20
    assert all(record.wait_left(BOUND) for record in left)
    gate.open()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
    errors = results[:20]
    assert [(type(error), error.reason) for error in errors] == [(AbortError, "all of mine")] * 20
    assert len(set(map(id, errors))) == 20
    assert results[20:] == [None] * 5
    assert [stream.text for stream in others] == ["0 1 2 3 4 5 6 7 8 9 "] * 5
    assert [stream.outcome for stream in others] == ["done"] * 5
    assert registrations(token) == 0


def mock_client(reply: Callable[[], httpx.Response], **options: Any) -> AsyncClient:
    return AsyncClient("http://fake", transport=httpx.MockTransport(lambda _: reply()), **options)


BODY = b'{"model":"fake","message":{"role":"assistant","content":"hi"},"done":true}\n'


@ONE_SERVER
async def test_s31_a_long_lived_token_keeps_nothing_of_10_000_calls_over_a_mock(token: CancelToken) -> None:
    async with mock_client(lambda: httpx.Response(200, content=BODY), token=token) as client:
        await leave_nothing(client, token, 5_000)


@ONE_SERVER
async def test_s31_a_long_lived_token_keeps_nothing_of_2_000_calls_over_connections(
    server: FakeOllama, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([BODY]), always=True)
    async with client_of(server, token=token) as client:
        await leave_nothing(client, token, 1_000)
        assert len(server.connections) == 1


async def leave_nothing(client: AsyncClient, token: CancelToken, count: int) -> None:
    """Make that many streams and as many other calls, under one token; the garbage collector is off."""
    for number in range(count):
        stream = client.chat("fake", "hi", stream=True, token=token)
        dead = weakref.ref(stream)
        async for chunk in stream:
            assert chunk.done
        assert stream.outcome == "done"
        assert stream._reader.call.exchange is not None
        exchange = weakref.ref(stream._reader.call.exchange)
        del stream, chunk
        assert dead() is None, f"stream {number}"
        assert registrations(token) == 0
        await client.chat("fake", "hi", token=token)
        await asyncio.sleep(0)  # with eager tasks the loop has not gone round yet, and still holds its next callbacks
        assert exchange() is None, f"the exchange of stream {number}"
        assert registrations(token) == 0
    assert not token.aborted


@ONE_SERVER
@pytest.mark.parametrize("way", ["broken_off", "aborted", "error"])
async def test_s31_nor_of_calls_that_ended_early(server: FakeOllama, way: str, token: CancelToken) -> None:
    if way == "error":
        server.script("/api/chat", Reply.error(500, "no"), always=True)
    else:
        server.script("/api/chat", Reply([line("one "), Stall()]), always=True)
    async with client_of(server) as client:
        for _ in range(100):
            own = token.child()
            stream = client.chat("fake", "hi", stream=True, token=CancelToken.any(own, token))
            dead = weakref.ref(stream), weakref.ref(own)
            with contextlib.suppress(AbortError, Exception):
                async for _chunk in stream:
                    if way == "broken_off":
                        break
                    own.abort()
            assert registrations(token) == 0
            del stream, own
            await ticks(2)
            assert [ref() for ref in dead] == [None, None]


# -- aborted from elsewhere --


async def test_s36_abort_from_a_thread_while_the_loop_sleeps(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken
) -> None:
    stream, task, seen = mid_stream
    found: list[object] = []

    def other_thread() -> None:
        time.sleep(0.02)  # the loop is in select() by now
        try:
            found.append(token.abort("from a thread"))
            found.append(server.connections[-1].wait_left(BOUND))
        except BaseException as exc:
            found.append(exc)

    thread = threading.Thread(target=other_thread)
    thread.start()
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(task, BOUND)
    await asyncio.to_thread(thread.join, BOUND)
    assert found == [True, True]
    assert (caught.value.reason, stream.outcome, texts(seen)) == ("from a thread", "aborted", ["one "])
    assert registrations(token) == 0


async def test_s36_threads_that_abort_while_chunks_pour_in(server: FakeOllama, client: AsyncClient) -> None:
    """The reader's end, the writer's end and the abort race; the abort decides, and raises nowhere."""
    server.script("/api/chat", Reply.endless_chat(interval=0), always=True)
    for number in range(thinly(server, range(60))[-1]):
        token = CancelToken()
        stream = client.chat("fake", "hi", stream=True, token=token)
        seen: list[ChatResponse] = []
        task = asyncio.create_task(read_all(stream, seen))
        await until(lambda seen=seen: seen, "the first chunk")
        aborting = asyncio.get_running_loop().run_in_executor(None, token.abort, number)
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(task, BOUND)
        assert await aborting is True
        assert caught.value.reason == number
        saw_leave(server)
        assert registrations(token) == 0


async def test_s36_threads_that_abort_at_the_very_end_raise_nowhere(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([BODY]), always=True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in thinly(server, range(300)):
            token = CancelToken()
            stream = client.chat("fake", "hi", stream=True, token=token)
            await stream
            aborting = asyncio.get_running_loop().run_in_executor(None, token.abort)
            seen: list[ChatResponse] = []
            try:
                await read_all(stream, seen)
            except AbortError:
                assert stream.outcome == "aborted"
            else:
                assert (stream.outcome, texts(seen)) == ("done", ["hi"])
            assert await aborting is True
            assert registrations(token) == 0
    finally:
        sys.setswitchinterval(before)


async def test_s38_abort_from_a_handler_of_the_loop(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken
) -> None:
    stream, task, _ = mid_stream
    loop = asyncio.get_running_loop()
    handled: list[bool] = []

    def handler() -> None:
        handled.append(token.abort("signal"))
        saw_leave(server)

    loop.add_signal_handler(signal.SIGUSR1, handler)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(AbortError, match="signal"):
            await asyncio.wait_for(task, BOUND)
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)
    assert handled == [True]
    assert stream.outcome == "aborted"
    assert registrations(token) == 0


@pytest.mark.parametrize("idle", [True, False])
async def test_s38_abort_from_a_handler_of_the_process(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken, idle: bool
) -> None:
    """While the loop sleeps in select(), and while it computes."""
    stream, task, _ = mid_stream
    handled: list[bool] = []

    def handler(*_: object) -> None:
        handled.append(token.abort("signal"))
        saw_leave(server)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        if idle:
            thread = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
            thread.start()
        else:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(AbortError, match="signal"):
            await asyncio.wait_for(task, BOUND)
        if idle:
            thread.join(BOUND)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [True]
    assert stream.outcome == "aborted"
    assert registrations(token) == 0


async def test_s38_a_storm_of_signals_aborts_streams_in_whatever_they_do(
    server: FakeOllama, client: AsyncClient
) -> None:
    """The handler interrupts the loop's thread anywhere: in connecting, parsing, delivering, closing."""
    server.script("/api/chat", Reply([Block(*(line(f"{n} ") for n in range(20)), line("", done=True))]), always=True)
    current = [CancelToken()]
    before = signal.signal(signal.SIGALRM, lambda *_: current[0].abort("storm"))
    outcomes = set()
    try:
        for number in range(300):
            token = current[0] = CancelToken()
            stream = client.chat("fake", "hi", stream=True, token=token)
            seen: list[ChatResponse] = []
            signal.setitimer(signal.ITIMER_REAL, 0.00005 + 0.00001 * (number % 300))
            try:
                await asyncio.wait_for(read_all(stream, seen), BOUND)
            except AbortError:
                assert stream.reason == "storm"
            else:
                assert stream.text == "".join(texts(seen))
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes.add(stream.outcome)
            assert stream.outcome in ("done", "aborted")
            assert registrations(token) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "aborted" in outcomes


@pytest.mark.parametrize("by", ["token", "parent", "stream", "client"])
async def test_s41_the_reader_aborts_in_its_own_loop_with_more_lines_at_hand(
    server: FakeOllama, client: AsyncClient, token: CancelToken, by: str
) -> None:
    server.script("/api/chat", Reply([Block(*(line(f"{number} ") for number in range(5))), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token.child())
    aborts = {"token": stream.token.abort, "parent": token.abort, "stream": stream.abort, "client": client.abort}
    seen: list[ChatResponse] = []
    with pytest.raises(AbortError) as caught:
        async for chunk in stream:
            seen.append(chunk)
            aborts[by]("enough")
            saw_leave(server)
    assert texts(seen) == ["0 "]
    assert caught.value.reason == "enough"
    assert stream.text == "0 1 2 3 4 "
    with pytest.raises(AbortError):
        await anext(stream)
    assert registrations(token) == 0


@pytest.mark.parametrize("enough", [False, True])
async def test_s42_abort_from_a_hook_on_the_chunk(
    server: FakeOllama, client: AsyncClient, token: CancelToken, enough: bool
) -> None:
    """``until=`` sees each chunk before the reader does: what it aborts at is not delivered."""
    server.script("/api/chat", Reply([line("one "), line("two "), Stall()]))

    def hook(merged: ChatResponse) -> bool:
        if merged.message.content == "one two ":
            token.abort("seen enough")
            saw_leave(server)
            return enough
        return False

    stream = client.chat("fake", "hi", stream=True, token=token, until=hook)
    seen: list[ChatResponse] = []
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(read_all(stream, seen), BOUND)
    assert caught.value.reason == "seen enough"
    assert texts(seen) == ["one "], "a chunk was delivered after abort()"
    assert (stream.outcome, stream.text) == ("aborted", "one two ")
    assert registrations(token) == 0


async def test_s42_abort_from_the_callback_of_another_token(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken
) -> None:
    stream, task, _ = mid_stream
    other = CancelToken()
    other.on_abort(lambda reason: token.abort(f"by way of {reason}"))
    other.abort("another")
    saw_leave(server)
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(task, BOUND)
    assert caught.value.reason == "by way of another"
    assert stream.outcome == "aborted"
    assert registrations(token) == 0


@pytest.mark.parametrize("event", ["request", "response"])
async def test_s42_abort_from_an_event_hook(
    server: FakeOllama, client_tls: Any, token: CancelToken, event: str
) -> None:
    async def hook(_: object) -> None:
        token.abort("by a hook")

    server.script("/api/chat", Reply([line("one "), Stall()]))
    async with client_of(server, verify=client_tls, event_hooks={event: [hook]}) as client:
        stream = client.chat("fake", "hi", stream=True, token=token)
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(stream.__anext__(), BOUND)
        assert caught.value.reason == "by a hook"
        all_left(server)
        assert len(server.connections) == (0 if event == "request" else 1)
        assert registrations(token) == 0


# -- cancelled from outside --


async def test_s45_cancel_in_the_middle_of_a_stream(
    server: FakeOllama, client: AsyncClient, mid_stream: MidStream, token: CancelToken
) -> None:
    stream, task, _ = mid_stream
    task.cancel("the message")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    saw_leave(server)
    assert caught.value.args == ("the message",)
    assert task.cancelled()
    assert (stream.outcome, stream.text) == ("cancelled", "one ")
    assert registrations(token) == 0
    assert not token.aborted
    assert await asyncio.wait_for(client.version(), BOUND)


SHORT = Reply([line("one "), Block(line("two "), line("three ")), line("", done=True)])
WAITS = Reply([line("one "), Stall()])


@pytest.mark.parametrize("gap", range(6))
@pytest.mark.parametrize("ends", [True, False])
async def test_s46_cancel_twice_at_every_tick(
    server: FakeOllama, client_tls: Any, nothing_left: Baseline, ends: bool, gap: int
) -> None:
    server.script("/api/chat", SHORT if ends else WAITS, always=True)
    await scan(server, client_tls, nothing_left, gap, ends, lambda client: read_all(chat(client), []))


def chat(client: AsyncClient) -> Stream[ChatResponse]:
    return client.chat("fake", "hi", stream=True)


@pytest.mark.parametrize("gap", range(6))
@pytest.mark.parametrize("ends", [True, False])
async def test_s46_cancel_a_call_without_stream_twice_at_every_tick(
    server: FakeOllama, client_tls: Any, nothing_left: Baseline, ends: bool, gap: int
) -> None:
    server.script("/api/chat", Reply([BODY]) if ends else Reply([BODY[:20], Stall()]), always=True)
    await scan(server, client_tls, nothing_left, gap, ends, lambda client: client.chat("fake", "hi"))


async def scan(
    server: FakeOllama,
    client_tls: Any,
    nothing_left: Baseline,
    gap: int,
    ends: bool,
    call: Callable[[AsyncClient], Any],
) -> None:
    """Where the server does not end its answer, whoever is cancelled leaves at once.

    Where it does, the cancellation may come when the answer has arrived and the connection waits for the next request:
    that one finds it, or has a new one, and in no case are there two.
    """
    cancelled = 0
    for start in thinly(server, range(61), 4):
        async with client_of(server, verify=client_tls) as client:
            task = asyncio.create_task(call(client))
            await paced(start)
            accepted = task.cancel()
            await paced(gap)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() is accepted, f"start {start}: the cancellation was swallowed"
            cancelled += accepted
            if accepted and not ends:
                all_left(server)
            assert await asyncio.wait_for(client.version(), BOUND), f"start {start}: the next request"
            assert sum(record.open for record in server.connections) == 1, f"start {start}: {server.connections}"
        all_left(server)
        assert await nothing_left.settle(BOUND) == []
    assert cancelled > 1


@pytest.mark.parametrize("gap", range(9))
@pytest.mark.parametrize("leave", ["aclose", "async_with"])
async def test_s47_cancel_twice_while_a_settled_stream_is_drained(
    server: FakeOllama, client: AsyncClient, token: CancelToken, leave: str, gap: int
) -> None:
    server.script("/api/chat", Reply([line("one ", done=True), NoEnd()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    await anext(stream)
    task = asyncio.create_task(stream.aclose() if leave == "aclose" else enter_and_leave(stream))
    await ticks(3)
    assert not task.done(), "it drains for a moment"
    task.cancel()
    await ticks(gap)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    saw_leave(server)
    assert (stream.outcome, stream.text) == ("done", "one ")
    assert registrations(token) == 0
    assert await asyncio.wait_for(client.version(), BOUND)


async def enter_and_leave(stream: Stream[Any]) -> None:
    async with stream:
        pass


@ONE_SERVER
@pytest.mark.parametrize("gap", range(9))
@pytest.mark.parametrize("start", range(4))
async def test_s47_cancel_twice_while_a_stream_over_a_foreign_pool_is_closed(
    server: FakeOllama, client_tls: Any, token: CancelToken, start: int, gap: int
) -> None:
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(verify=client_tls, limits=limits, timeout=None, trust_env=False) as pool:
        server.script("/api/chat", Reply([line("one "), Stall()]))
        client = AsyncClient(server.url, http_client=pool)
        stream = client.chat("fake", "hi", stream=True, token=token)
        await anext(stream)
        task = asyncio.create_task(enter_and_leave(stream))
        await ticks(start)
        accepted = task.cancel()
        await ticks(gap)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() is accepted
        if task.cancelled() and stream.outcome is None:
            await stream.aclose()  # cancelled before it began to be left
        assert stream.outcome in ("closed", "cancelled")
        saw_leave(server)
        assert registrations(token) == 0
        assert await asyncio.wait_for(client.version(), BOUND), "the pool's only slot is free again"


@ONE_SERVER
async def test_s47_a_stream_over_a_foreign_pool_is_closed_when_it_is_dropped(server: FakeOllama) -> None:
    async with httpx.AsyncClient(timeout=None, trust_env=False) as pool:
        server.script("/api/chat", Reply([line("one "), Stall()]))
        stream = AsyncClient(server.url, http_client=pool).chat("fake", "hi", stream=True)
        await anext(stream)
        await stream.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        saw_leave(server)


async def test_s48_asyncio_timeout_in_the_middle_of_a_stream(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(BOUND) as limit:
            async for _ in stream:
                limit.reschedule(asyncio.get_running_loop().time() + 0.01)
    saw_leave(server)
    assert cancelling() == 0
    assert (stream.outcome, stream.text) == ("cancelled", "one ")
    assert registrations(token) == 0


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


@pytest.mark.parametrize("gap", range(5))
@pytest.mark.parametrize("first", ["timeout", "abort"])
async def test_s49_timeout_and_abort_at_the_same_time(
    server: FakeOllama, client: AsyncClient, token: CancelToken, first: str, gap: int
) -> None:
    """The timeout's error if it went off, else the abort's; never neither."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    limit = asyncio.timeout(None)
    seen: list[ChatResponse] = []
    caught: list[BaseException] = []

    async def reader() -> None:
        try:
            async with limit:
                await read_all(stream, seen)
        except BaseException as exc:
            saw_leave(server)
            caught.append(exc)
        assert cancelling() == 0

    task = asyncio.create_task(reader())
    await until(lambda: seen, "the first chunk")
    await ticks(3)
    acts: list[Callable[[], object]] = [limit._on_timeout, lambda: token.abort("stop")]  # type: ignore[attr-defined]
    for act in acts if first == "timeout" else reversed(acts):
        if not (task.done() and act is acts[0]):
            act()
        await ticks(gap)
    await asyncio.wait_for(task, BOUND)
    expected = TimeoutError if limit.expired() else AbortError
    assert [type(error) for error in caught] == [expected]
    assert gap > 0 or limit.expired()
    assert registrations(token) == 0


@pytest.mark.parametrize("gap", range(4))
@pytest.mark.parametrize("order", ["abort_cancel", "cancel_abort"])
async def test_s50_abort_and_cancel_at_the_same_time(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken, order: str, gap: int
) -> None:
    _stream, task, seen = mid_stream
    accepted = False
    for act in order.split("_"):
        if act == "abort":
            token.abort("stop")
            saw_leave(server)
        else:
            accepted = task.cancel()
        await ticks(gap)
    await asyncio.wait([task])
    assert task.cancelled() is accepted, "the cancellation was swallowed"
    assert accepted or order == "abort_cancel"
    assert accepted or isinstance(task.exception(), AbortError)
    assert gap > 0 or accepted
    saw_leave(server)
    assert texts(seen) == ["one "]
    assert registrations(token) == 0


async def test_s51_a_timeout_that_goes_off_after_a_handled_abort_is_a_timeout(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    handled = False
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            try:
                async for _ in client.chat("fake", "hi", stream=True, token=token):
                    asyncio.get_running_loop().call_soon(token.abort)
            except AbortError:
                handled = True
                saw_leave(server)
                assert cancelling() == 0
            limit.reschedule(asyncio.get_running_loop().time() + 0.01)
            await asyncio.wait_for(asyncio.Event().wait(), BOUND)
    assert handled
    assert limit.expired()
    assert cancelling() == 0


async def test_s51_a_task_group_after_a_handled_abort_keeps_its_errors(
    server: FakeOllama, mid_stream: MidStream, token: CancelToken
) -> None:
    _stream, reading, _ = mid_stream

    async def child() -> None:
        await ticks(2)
        raise ValueError("the child's")

    async def main() -> None:
        with pytest.raises(AbortError):
            await reading
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.Event().wait()

    task = asyncio.create_task(main())
    await ticks(2)
    token.abort()
    saw_leave(server)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(task, BOUND)
    assert caught.group_contains(ValueError, match="the child's")


async def test_s52_a_sibling_that_fails_ends_the_stream_and_the_group_has_only_its_error(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[ChatResponse] = []

    async def sibling() -> None:
        await until(lambda: seen, "the first chunk")
        raise RuntimeError("the sibling's")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(sibling())
            await read_all(stream, seen)
    saw_leave(server)
    assert [str(error) for error in caught.value.exceptions] == ["the sibling's"]
    assert stream.outcome == "cancelled"
    assert cancelling() == 0
    assert registrations(token) == 0


async def test_s53_an_abort_in_a_task_group_is_an_error_that_except_star_catches(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]), Reply([line("one "), Stall()]))
    seen: list[ChatResponse] = []
    caught: list[BaseException] = []
    sibling = client.chat("fake", "hi", stream=True)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read_all(client.chat("fake", "hi", stream=True, token=token), seen))
            group.create_task(read_all(sibling, seen))
            await until(lambda: len(seen) == 2, "both first chunks")
            token.abort("stop")
            # Not left yet: the TaskGroup of Python 3.11 and 3.12 leaves cancelling() unbalanced in its __aexit__.
            await asyncio.Event().wait()
    except* AbortError as errors:
        caught += errors.exceptions
    all_left(server)
    assert [error.reason for error in caught] == ["stop"]  # type: ignore[attr-defined]
    assert sibling.outcome == "cancelled"
    assert cancelling() == 0


async def test_s54_wait_for_on_one_chunk_closes_the_stream_and_loses_nothing(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    half = b'{"model":"fake","message":{"role":"assistant","con'
    server.script("/api/chat", Reply([line("one "), half, Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    assert (await asyncio.wait_for(anext(stream), BOUND)).message.content == "one "
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.02)
    saw_leave(server)
    for _ in range(2):
        with pytest.raises(StreamClosed, match="cancelled") as caught:
            await anext(stream)
        assert caught.value.partial.message.content == "one "
    assert (stream.outcome, stream.text) == ("cancelled", "one ")
    assert registrations(token) == 0


async def test_s54_a_chunk_that_comes_with_the_cancellation_is_kept(
    server: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    happen = same_tick(monkeypatch, "received")
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), gate, line("two "), Stall()]))
    stream = client.chat("fake", "hi", stream=True)
    assert (await anext(stream)).message.content == "one "
    task = asyncio.create_task(stream.__anext__())
    await ticks(3)
    happen([None, task.cancel])
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), BOUND)
    saw_leave(server)
    assert stream.text == "one two "


async def test_s55_anyio_move_on_after(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    with anyio.move_on_after(BOUND) as scope:
        async for _ in stream:
            scope.deadline = anyio.current_time() + 0.01
    saw_leave(server)
    assert scope.cancelled_caught
    assert cancelling() == 0
    assert (stream.outcome, stream.text) == ("cancelled", "one ")
    assert registrations(token) == 0
    assert await asyncio.wait_for(client.version(), BOUND)


async def test_s55_anyio_fail_after(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply(before_head=[Stall()]))
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.5):
            await client.chat("fake", "hi", token=token)
    saw_leave(server)
    assert cancelling() == 0
    assert registrations(token) == 0


@pytest.mark.parametrize("inside", [True, False])
async def test_s55_anyio_cancel_scope_cancelled_by_the_body(
    server: FakeOllama, client: AsyncClient, token: CancelToken, inside: bool
) -> None:
    """In the body of the loop, and in a block around ``async with``."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    with anyio.CancelScope() as scope:
        if inside:
            async for _ in stream:
                scope.cancel()
        else:
            async with stream:
                scope.cancel()
                await anyio.sleep(BOUND)
    saw_leave(server)
    assert scope.cancelled_caught
    assert cancelling() == 0
    assert stream.outcome in ("cancelled", "closed")
    assert registrations(token) == 0


async def test_s55_anyio_task_group_around_a_stream(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]), Reply([line("one "), Stall()]))
    streams = [client.chat("fake", "hi", stream=True, token=token) for _ in range(2)]
    seen: list[ChatResponse] = []
    async with anyio.create_task_group() as group:
        for stream in streams:
            group.start_soon(read_all, stream, seen)
        await until(lambda: len(seen) == 2, "both first chunks")
        group.cancel_scope.cancel()
    all_left(server)
    assert [stream.outcome for stream in streams] == ["cancelled", "cancelled"]
    assert cancelling() == 0
    assert registrations(token) == 0


async def test_s55_abort_in_an_anyio_task_group(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            async for _ in client.chat("fake", "hi", stream=True, token=token):
                group.start_soon(asyncio.to_thread, token.abort, "stop")
    saw_leave(server)
    assert [type(error) for error in caught.value.exceptions] == [AbortError]
    assert cancelling() == 0


async def test_s56_cancel_while_the_peer_reads_nothing_and_answers_nothing(
    server: FakeOllama, client_tls: Any, token: CancelToken, nothing_left: Baseline
) -> None:
    """Its window is full: no FIN and no goodbye of TLS can be delivered. That is nobody's to wait for."""
    gate = Gate()
    server.script("/api/chat", Reply(read_body=False, before_head=[gate, Stall()]))
    async with client_of(server, verify=client_tls) as client:
        before = len(open_fds())
        big = "x" * (16 * 1024 * 1024)
        task = asyncio.create_task(client.chat("fake", big, token=token))
        await asyncio.to_thread(gate.wait_reached, BOUND)
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), BOUND)
        await fds_back_to(before + 1)  # the server's own
        assert server.connections[-1].left_at is None
        assert registrations(token) == 0
        gate.open()
        server.stop()


async def test_s57_ctrl_c_in_the_middle_of_an_abort_still_ends_the_stream(
    server: FakeOllama, token: CancelToken, mid_stream: MidStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task, seen = mid_stream
    original = GuardedSocket.shutdown

    def interrupted(sock: GuardedSocket) -> None:
        monkeypatch.undo()
        original(sock)
        raise KeyboardInterrupt

    monkeypatch.setattr(GuardedSocket, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token.abort("why")
    with pytest.raises(AbortError, match="why"):
        await asyncio.wait_for(task, BOUND)
    assert texts(seen) == ["one "]
    saw_leave(server)
    assert registrations(token) == 0


CTRL_C = """
import asyncio, signal, sys
from ollama_async import AsyncClient
{loop}
stream = None

async def main():
    global stream
    asyncio.get_running_loop().slow_callback_duration = 20.0  # on a busy machine -X dev would say what was slow
    client = AsyncClient(sys.argv[1])
    {how}

async def read(client):
    global stream
    stream = client.chat("fake", "hi", stream=True)
    async for _ in stream:
        print("reading", flush=True)

try:
    with asyncio.Runner(loop_factory={factory}) as runner:
        runner.run(main())
except KeyboardInterrupt:
    print("interrupted", stream.outcome, flush=True)
    sys.stdin.readline()
"""
HOWS = {
    "in_main": "await read(client)",
    "in_a_task": "await asyncio.gather(asyncio.create_task(read(client)))",
    "left_alone": "task = asyncio.create_task(read(client)); await asyncio.sleep(60)",
    "in_async_with": "async with client: await read(client)",
}


@contextlib.contextmanager
def noticed(process: subprocess.Popen[str]) -> Iterator[None]:
    """See to it that a process notices the Ctrl-C that it has been sent.

    asyncio's own handler has no descriptor that wakes the loop. A signal that comes in the few hundred nanoseconds
    between Python's last look for signals and the loop's sleep is noticed when something else wakes it, which may be
    never. A process that is stopped and continued looks again.
    """
    done = threading.Event()

    def look_again() -> None:
        while not done.wait(1.0):
            process.send_signal(signal.SIGSTOP)
            process.send_signal(signal.SIGCONT)

    looking = threading.Thread(target=look_again)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


@ONE_SERVER
@pytest.mark.parametrize("how", HOWS)
async def test_s57_ctrl_c_under_asyncio_run(server: FakeOllama, how: str) -> None:
    """The process lives on after the interrupt, so that it is not its end that closes the socket."""
    server.script("/api/chat", Reply([line("one "), Stall()]))
    plain = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    program = CTRL_C.format(
        how=HOWS[how],
        loop="" if plain else "import uvloop",
        factory="asyncio.new_event_loop" if plain else "uvloop.new_event_loop",
    )

    def run() -> tuple[str, str, int]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-X", "dev", "-c", program, server.url]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            bound = threading.Timer(4 * BOUND, process.kill)
            bound.start()
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "reading\n"
                process.send_signal(signal.SIGINT)
                with noticed(process):
                    told = process.stdout.readline()
                saw_leave(server)
                _, errors = process.communicate("go\n", timeout=2 * BOUND)
                return told, errors, process.returncode
            finally:
                bound.cancel()
                process.kill()

    # All at once: without what it wrote to stderr, nobody knows why it said nothing.
    assert await asyncio.to_thread(run) == ("interrupted cancelled\n", "", 0)


def same_tick(monkeypatch: pytest.MonkeyPatch, event: str) -> Callable[[list[Callable[[], object] | None]], None]:
    """Make a number of things happen in one callback of the loop: at the connection's next event of that name.

    Returns:
        A function that takes them in their order; ``None`` stands for the event itself.
    """
    original = getattr(Connection, event)
    waiting: list[list[Callable[[], object] | None]] = []

    def happens(connection: Any, *args: Any) -> None:
        for act in waiting.pop() if waiting else [None]:
            if act is None:
                original(connection, *args)
            else:
                act()

    monkeypatch.setattr(Connection, event, happens)
    return waiting.append


def last_chunk_and_end() -> bytes:
    """The last line and the end of the body, which arrive together."""
    last = json.dumps(line("two", done=True)).encode() + b"\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)


ORDERS = ["-".join(order) for order in itertools.permutations(("cancel", "abort", "end"))]
PAIRS = ["abort-end", "end-abort", "cancel-end", "end-cancel"]


@pytest.mark.parametrize("order", [*ORDERS, *PAIRS])
@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "call"])
async def test_s58_cancel_abort_and_the_natural_end_in_the_same_tick(
    server: FakeOllama,
    client: AsyncClient,
    token: CancelToken,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    streaming: bool,
) -> None:
    happen = same_tick(monkeypatch, "received")
    gate = Gate()
    seen: list[ChatResponse] = []
    if streaming:
        server.script("/api/chat", Reply([line("one "), gate, Raw(last_chunk_and_end()), NoEnd()]))
        stream = client.chat("fake", "hi", stream=True, token=token)
        task: asyncio.Task[Any] = asyncio.create_task(read_all(stream, seen))
        await until(lambda: seen, "the first chunk")
    else:
        body = b'{"model":"fake","message":{"role":"assistant","content":"two"},"done":true}'
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        server.script("/api/chat", Reply(before_head=[gate], raw=head + body))
        task = asyncio.create_task(client.chat("fake", "hi", token=token))
    await asyncio.to_thread(gate.wait_reached, BOUND)
    await ticks(3)
    acts = {"cancel": task.cancel, "abort": lambda: token.abort("stop"), "end": None}
    happen([acts[name] for name in order.split("-")])
    gate.open()
    await asyncio.wait([task], timeout=BOUND)
    assert task.done()
    if "cancel" in order:
        assert task.cancelled()
    elif streaming or order == "abort-end":
        # A stream is at its end when the reader has got the last chunk; any other call when the answer is there.
        assert isinstance(task.exception(), AbortError)
    else:
        assert task.result().message.content == "two"
    assert texts(seen) == (["one "] if streaming else []), "a chunk was delivered after abort()"
    if streaming:
        # What had arrived is kept, though it is not delivered.
        assert stream.text in ("one ", "one two")
        assert stream.outcome in ("aborted", "cancelled")
    await client.aclose()
    all_left(server)
    assert registrations(token) == 0


@pytest.mark.parametrize("order", ["abort-error", "error-abort", "error-abort-cancel", "abort-error-cancel"])
async def test_s58_abort_and_an_error_of_the_server_in_the_same_tick(
    server: FakeOllama,
    client: AsyncClient,
    mid_stream: MidStream,
    token: CancelToken,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
) -> None:
    """What came first, unless the caller was cancelled."""
    happen = same_tick(monkeypatch, "_broken")
    stream, task, seen = mid_stream
    acts = {"cancel": task.cancel, "abort": lambda: token.abort("stop"), "error": None}
    happen([acts[name] for name in order.split("-")])
    await asyncio.to_thread(server.stop)
    await asyncio.wait([task], timeout=BOUND)
    assert task.done()
    if "cancel" in order:
        assert task.cancelled()
    else:
        assert isinstance(task.exception(), AbortError if order.startswith("abort") else ConnectionBroken)
    assert stream.outcome == ("aborted" if order.startswith("abort") else "error")
    assert (texts(seen), stream.text) == (["one "], "one ")
    assert registrations(token) == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.eager_task_factory is new in Python 3.12")
@pytest.mark.parametrize("way", ["aborted_before", "aborted_after", "cancelled"])
async def test_s59_eager_tasks(server: FakeOllama, client: AsyncClient, token: CancelToken, way: str) -> None:
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.BaseEventLoop):
        pytest.skip("uvloop calls a task factory in a way that asyncio's eager one does not take")
    server.script("/api/chat", Reply([line("one "), Stall()]))
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    try:
        if way == "aborted_before":
            token.abort("stop")
        task = asyncio.create_task(read_all(client.chat("fake", "hi", stream=True, token=token), []))
        if way == "aborted_after":
            token.abort("stop")
        elif way == "cancelled":
            task.cancel()
        await asyncio.wait([task], timeout=BOUND)
        assert task.cancelled() is (way == "cancelled")
        assert way == "cancelled" or isinstance(task.exception(), AbortError)
    finally:
        loop.set_task_factory(None)
    all_left(server)
    assert way != "aborted_before" or not server.connections
    assert registrations(token) == 0


@pytest.fixture(params=["refused_first", "dead_first", "both_good", "one_good"])
def addresses(request: pytest.FixtureRequest, server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A name with several addresses, all of which are tried without waiting."""
    with contextlib.ExitStack() as stack:
        good = ("127.0.0.1", server.port)
        dead = ("127.0.0.1", int(stack.enter_context(black_hole()).rpartition(":")[2]))
        found = {
            "refused_first": [("127.0.0.1", 1), good],
            "dead_first": [dead, good],
            "both_good": [good, good],
            "one_good": [good],
        }[request.param]

        async def resolve(*_: object) -> list[Any]:
            await asyncio.sleep(0)
            return [(2, 6, address) for address in found]

        monkeypatch.setattr(_dial, "_resolve", resolve)
        monkeypatch.setattr(_dial, "_STAGGER", 0.0)
        yield


@pytest.mark.parametrize("way", ["cancel", "cancel_twice", "abort"])
async def test_s60_stopped_at_every_tick_of_connecting_to_a_name_with_two_addresses(
    server: FakeOllama, client_tls: Any, addresses: None, way: str
) -> None:
    server.script("/api/chat", Reply(before_head=[Stall()]), always=True)
    loop = asyncio.get_running_loop()
    async with client_of(server, verify=client_tls) as client:
        fds = len(open_fds())
        for start in thinly(server, range(25), 2):
            token = CancelToken()
            task = asyncio.create_task(client.chat("fake", "hi", token=token))
            await paced(start)
            if way == "abort":
                token.abort("stop")
            else:
                task.cancel()
                if way == "cancel_twice":
                    await paced(start % 3)
                    task.cancel()
            await asyncio.wait([task], timeout=BOUND)
            assert task.done(), f"start {start}"
            assert task.cancelled() is (way != "abort"), f"start {start}"
            assert way != "abort" or isinstance(task.exception(), AbortError), f"start {start}"
            all_left(server)
            await fds_back_to(fds)
            assert registrations(token) == 0
        assert await asyncio.wait_for(client.version(), BOUND)
    assert loop is asyncio.get_running_loop()


@over_the_network
async def test_s60_cancelled_at_every_tick_of_connecting_to_localhost(server: FakeOllama, client_tls: Any) -> None:
    server.script("/api/chat", Reply(before_head=[Stall()]), always=True)
    for start in thinly(server, range(0, 60, 2), 5):
        url = server.url.replace("127.0.0.1", "localhost")
        async with AsyncClient(url, verify=client_tls) as client:
            task = asyncio.create_task(client.chat("fake", "hi"))
            await paced(start)
            task.cancel()
            await asyncio.wait([task], timeout=BOUND)
            assert task.cancelled(), f"start {start}"
            all_left(server)
            assert await asyncio.wait_for(client.version(), BOUND)
        all_left(server)


# -- token.scope() --

# A scope acts in the next rounds of the loop; each test of one that does not would wait for this long.
SCOPE_BOUND = 5.0


async def parked(entered: list[object]) -> None:
    entered.append(1)
    await asyncio.Event().wait()


@ONE_SERVER
async def test_scope_of_an_aborted_token_is_not_entered(token: CancelToken) -> None:
    token.abort("before")
    with pytest.raises(AbortError) as caught, token.scope():
        raise AssertionError("entered")
    assert caught.value.reason == "before"


@ONE_SERVER
@pytest.mark.parametrize("derived", ["itself", "child", "any"])
async def test_scope_is_left_by_an_abort(token: CancelToken, derived: str) -> None:
    under = {"itself": token, "child": token.child(), "any": CancelToken.any(CancelToken(), token)}[derived]
    entered: list[object] = []

    async def user() -> str:
        try:
            with under.scope():
                await parked(entered)
        except AbortError as exc:
            assert cancelling() == 0
            assert registrations(token) == 0
            await asyncio.sleep(0)  # nothing of the cancellation is left
            return str(exc.reason)
        raise AssertionError("went on")

    task = asyncio.create_task(user())
    await until(lambda: entered, "the block")
    token.abort("during")
    assert await asyncio.wait_for(task, SCOPE_BOUND) == "during"


@ONE_SERVER
async def test_scope_is_left_by_an_abort_from_a_thread(token: CancelToken) -> None:
    threading.Timer(0.02, token.abort, ("thread",)).start()
    with pytest.raises(AbortError, match="thread"), token.scope():
        await asyncio.sleep(SCOPE_BOUND)
    assert cancelling() == 0


@ONE_SERVER
async def test_scope_that_has_been_left_is_not_touched_by_an_abort(token: CancelToken) -> None:
    with token.scope() as scope:
        await asyncio.sleep(0)
    assert registrations(token) == 0
    token.abort("after")
    await ticks(3)
    assert not scope.cancel_called
    assert cancelling() == 0


@ONE_SERVER
async def test_scope_whose_block_ends_before_it_is_cancelled_ends_normally(token: CancelToken) -> None:
    with token.scope():
        token.abort("too late for this block")
    await ticks(3)
    assert cancelling() == 0
    assert registrations(token) == 0


@ONE_SERVER
async def test_scope_that_is_left_by_an_error_of_the_block_leaves_it_as_it_is(token: CancelToken) -> None:
    with pytest.raises(ValueError, match="the block's"), token.scope():
        token.abort("stop")
        raise ValueError("the block's")
    await ticks(3)
    assert cancelling() == 0
    assert registrations(token) == 0


@ONE_SERVER
@pytest.mark.parametrize("gap", range(3))
@pytest.mark.parametrize("order", ["abort_cancel", "cancel_abort"])
async def test_scope_aborted_and_cancelled_at_the_same_time_is_cancelled(
    token: CancelToken, order: str, gap: int
) -> None:
    entered: list[object] = []

    async def user() -> None:
        with token.scope():
            await parked(entered)

    task = asyncio.create_task(user())
    await until(lambda: entered, "the block")
    accepted = False
    for act in order.split("_"):
        if act == "abort":
            token.abort("stop")
        else:
            accepted = task.cancel()
        await ticks(gap)
    await asyncio.wait([task], timeout=SCOPE_BOUND)
    assert task.cancelled() is accepted, "the cancellation was swallowed"
    assert accepted or isinstance(task.exception(), AbortError)
    assert gap > 0 or accepted
    assert registrations(token) == 0


@ONE_SERVER
@pytest.mark.parametrize("gap", range(3))
@pytest.mark.parametrize("first", ["timeout", "abort"])
async def test_scope_in_an_asyncio_timeout(token: CancelToken, first: str, gap: int) -> None:
    """The timeout's error if it went off, else the abort's."""
    entered: list[object] = []
    limit = asyncio.timeout(None)

    async def user() -> None:
        try:
            async with limit:
                with token.scope():
                    await parked(entered)
        finally:
            assert cancelling() == 0

    task = asyncio.create_task(user())
    await until(lambda: entered, "the block")
    acts: list[Callable[[], object]] = [limit._on_timeout, lambda: token.abort("stop")]  # type: ignore[attr-defined]
    for act in acts if first == "timeout" else reversed(acts):
        if not (task.done() and act is acts[0]):
            act()
        await ticks(gap)
    await asyncio.wait([task], timeout=SCOPE_BOUND)
    assert isinstance(task.exception(), TimeoutError if limit.expired() else AbortError)
    assert gap > 0 or limit.expired()


@ONE_SERVER
async def test_scope_handled_and_the_enclosing_timeout_still_works(token: CancelToken) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            asyncio.get_running_loop().call_soon(token.abort)
            with contextlib.suppress(AbortError), token.scope():
                await asyncio.sleep(SCOPE_BOUND)
            limit.reschedule(asyncio.get_running_loop().time() + 0.01)
            await asyncio.sleep(SCOPE_BOUND)
    assert cancelling() == 0


@ONE_SERVER
@pytest.mark.parametrize("stop", ["inner", "outer", "both", "same"])
async def test_scopes_in_scopes(stop: str) -> None:
    outer, inner = CancelToken(), CancelToken()
    if stop == "same":
        inner = outer
    entered: list[object] = []
    steps: list[str] = []

    async def user() -> None:
        with outer.scope():
            try:
                with inner.scope():
                    await parked(entered)
            except AbortError as exc:
                steps.append(f"inner {exc.reason}")
                raise

    task = asyncio.create_task(user())
    await until(lambda: entered, "the block")
    if stop in ("inner", "both"):
        inner.abort("inner")
    if stop in ("outer", "both", "same"):
        outer.abort("outer")
    await asyncio.wait([task], timeout=SCOPE_BOUND)
    error = task.exception()
    assert isinstance(error, AbortError)
    assert error.reason == ("inner" if stop == "inner" else "outer")
    assert steps == (["inner inner"] if stop == "inner" else [])
    assert (registrations(outer), registrations(inner)) == (0, 0)


async def test_scope_around_a_stream_under_the_same_token(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    with pytest.raises(AbortError) as caught, token.scope():
        async for _ in stream:
            asyncio.get_running_loop().call_soon(token.abort, "stop")
    saw_leave(server)
    assert caught.value.reason == "stop"
    assert stream.outcome == "aborted"
    assert cancelling() == 0
    assert registrations(token) == 0
