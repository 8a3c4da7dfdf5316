"""Many servers behind one client: slots, turns, choice of a host, failover, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytest

from ollama_async import (
    AbortError,
    BadRequestError,
    CancelToken,
    ConnectError,
    ConnectionBroken,
    GenerateResponse,
    Host,
    NoHost,
    NotFoundError,
    PhaseTimeout,
    Pool,
    PoolStream,
    ProtocolError,
    RequestError,
    ServerBusyError,
    Stream,
    StreamBusy,
    StreamClosed,
    StreamTruncated,
    Timeouts,
)
from ollama_async.pool import _calls, _hosts
from ollama_async.pool._hosts import Outage, Queue, Server, Waiter
from ollama_async.testing import Cut, FakeOllama, Gate, Reply, Stall

LIMIT = 10.0
DEAD = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hosts, "FIRST_OUTAGE", 0.05)


@pytest.fixture
def servers() -> Iterator[list[FakeOllama]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeOllama(interval=0.001, models=["fake", "other"])) for _ in range(3)]


def gated(gate: Gate, *texts: str) -> Reply:
    return replace(Reply.chat(*(texts or ("a",))), before_head=[gate])


def asked(server: FakeOllama, path: str = "/api/chat") -> list[str]:
    """The prompts that a server got, in order."""
    return [
        request.json()["messages"][-1]["content"] if path == "/api/chat" else request.json()["prompt"]
        for request in server.requests
        if request.route == path
    ]


async def until(condition: Any) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.002)


def idle(pool: Pool) -> bool:
    return all(host.running == host.waiting == 0 for host in pool.hosts)


async def nothing_left(pool: Pool) -> None:
    await until(lambda: idle(pool))
    assert not pool._calls._leases
    assert not pool._calls.queue.groups
    assert not pool._all._registrations


# -- slots and turns --


async def test_calls_are_never_more_than_the_slots_and_wait_without_a_connection(fake_ollama: FakeOllama) -> None:
    gate = Gate()
    fake_ollama.script("/api/chat", gated(gate), always=True)
    async with Pool(fake_ollama.url, slots=2) as pool:
        calls = [asyncio.create_task(pool.chat("fake", str(n))) for n in range(6)]
        await asyncio.to_thread(gate.wait_reached, count=2)
        assert [(host.running, host.waiting) for host in pool.hosts] == [(2, 4)]
        assert len(fake_ollama.connections) == len(fake_ollama.requests) == 2
        gate.open()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*calls)
        assert len(fake_ollama.connections) == 2
        assert asked(fake_ollama)[2:] == ["2", "3", "4", "5"]
        await nothing_left(pool)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_host_that_lets_calls_wait_is_told_of_once(
    fake_ollama: FakeOllama, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    gate = Gate()
    last = {
        "model": "fake",
        "message": {"role": "assistant", "content": "a"},
        "done": True,
        "total_duration": 2 * 10**9,
    }
    fake_ollama.script("/api/chat", Reply([last], before_head=[gate]), always=True)

    async def ask() -> None:
        if stream:
            await pool.chat("fake", "a", stream=True).collect()
        else:
            await pool.chat("fake", "a")

    async with Pool(fake_ollama.url, slots=3) as pool, asyncio.timeout(LIMIT):
        calls = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.to_thread(gate.wait_reached, count=3)
        gate.open()
        await asyncio.gather(*calls)
    said = [record.getMessage() for record in caplog.records if record.name == "ollama_async.pool"]
    assert len(said) == 1
    assert "let a call wait for 2.0 s" in said[0]
    assert "slots=3 seems too high" in said[0]


@pytest.mark.parametrize("how", ["token", "pool", "cancel", "timeout", "stream", "close_stream", "thread", "close"])
async def test_a_call_that_waits_ends_at_once(fake_ollama: FakeOllama, how: str) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), always=True)
    pool, token = Pool(fake_ollama.url), CancelToken()
    running = pool.chat("fake", "first", stream=True)
    await anext(running)
    limits = Timeouts(total=0.05) if how == "timeout" else None
    stream = pool.chat("fake", "second", stream=True, token=token, timeout=limits)
    task = asyncio.create_task(stream.collect())
    await until(lambda: pool.hosts[0].waiting == 1)
    expected: type[BaseException] = AbortError
    match how:
        case "token":
            token.abort("enough")
        case "thread":
            thread = threading.Thread(target=token.abort, args=["enough"])
            thread.start()
            await asyncio.to_thread(thread.join)
        case "pool":
            pool.abort("enough")
        case "stream":
            assert stream.abort("enough") is True
            assert stream.abort("again") is False
        case "cancel":
            task.cancel()
            expected = asyncio.CancelledError
        case "timeout":
            expected = PhaseTimeout
        case "close_stream":
            await stream.aclose()
            expected = StreamClosed
        case "close":
            await pool.aclose()
            expected = StreamClosed
    with pytest.raises(expected) as raised:
        async with asyncio.timeout(LIMIT):
            await task
    outcome = {PhaseTimeout: "timeout", asyncio.CancelledError: "cancelled", StreamClosed: "closed"}
    assert stream.outcome == outcome.get(expected, "aborted")
    if expected is AbortError:
        assert raised.value.reason == stream.reason == "enough"
    if expected is PhaseTimeout:
        assert (stream.reason, raised.value.seconds) == ("total", 0.05)
    # The same again for whoever reads later, and nothing was sent for it.
    with pytest.raises(StreamClosed if expected is asyncio.CancelledError else expected):
        await anext(stream)
    assert pool.hosts[0].waiting == 0
    assert asked(fake_ollama) == ["first"]
    await running.aclose()
    await nothing_left(pool)
    await pool.aclose()


async def leave_by_break(stream: PoolStream[Any], token: CancelToken) -> None:
    async for _ in stream:
        break


async def leave_by_error(stream: PoolStream[Any], token: CancelToken) -> None:
    with suppress(ZeroDivisionError):
        async for _ in stream:
            raise ZeroDivisionError


async def abort_unread(stream: PoolStream[Any], token: CancelToken) -> None:
    await stream
    token.abort("unread")


async def abort_stream(stream: PoolStream[Any], token: CancelToken) -> None:
    await stream
    assert stream.abort("over")


async def close_it(stream: PoolStream[Any], token: CancelToken) -> None:
    async with stream:
        await anext(stream)


async def cancel_before_the_first_step(stream: PoolStream[Any], token: CancelToken) -> None:
    await stream
    task = asyncio.ensure_future(stream.__anext__())
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert stream.outcome == "cancelled"


async def cancel_while_reading(stream: PoolStream[Any], token: CancelToken) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await stream.collect()
    assert stream.outcome == "cancelled"


async def drop_it(stream: PoolStream[Any], token: CancelToken) -> None:
    await anext(stream)


async def pass_its_time(stream: PoolStream[Any], token: CancelToken) -> None:
    await anext(stream)
    # Nobody reads it any more.
    await until(lambda: stream.outcome == "timeout")
    KEPT.append(stream)


KEPT: list[object] = []
WAYS = [
    leave_by_break,
    leave_by_error,
    abort_unread,
    abort_stream,
    close_it,
    cancel_before_the_first_step,
    cancel_while_reading,
    drop_it,
    pass_its_time,
]


@pytest.mark.parametrize("leave", WAYS)
async def test_the_slot_is_given_on_however_a_stream_ends(fake_ollama: FakeOllama, leave: Any) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), Reply.chat("next"))
    limits = Timeouts(total=0.1) if leave is pass_its_time else None
    async with Pool(fake_ollama.url) as pool:
        gc.disable()
        try:
            token = CancelToken()
            # The collector is off: what is dropped is freed by its reference count.
            with pytest.warns(ResourceWarning) if leave is drop_it else nullcontext():
                await leave(pool.chat("fake", "a", stream=True, token=token, timeout=limits), token)
            async with asyncio.timeout(LIMIT):
                answer = await pool.chat("fake", "b")
        finally:
            gc.enable()
            KEPT.clear()
        assert answer.message.content == "next"
        assert answer["host"] == fake_ollama.url
        first = fake_ollama.requests[0].connection
        assert await asyncio.to_thread(first.wait_left)
        await nothing_left(pool)


async def test_an_abort_gives_the_slot_to_the_next_waiter(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is found out by looking from time to time.
    monkeypatch.setattr(_calls, "_LONGEST_TICK", 1000.0)
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), Reply.chat("next"))
    async with Pool(fake_ollama.url, patience=4000.0) as pool:
        token = CancelToken()
        stream = await pool.chat("fake", "a", stream=True, token=token)
        second = asyncio.create_task(pool.chat("fake", "b"))
        await until(lambda: pool.hosts[0].waiting)
        thread = threading.Thread(target=token.abort)
        thread.start()
        await asyncio.to_thread(thread.join)
        async with asyncio.timeout(LIMIT):
            assert (await second).message.content == "next"
        assert stream.outcome == "aborted"


async def test_the_slot_is_free_when_the_last_chunk_is_delivered(fake_ollama: FakeOllama) -> None:
    async with Pool(fake_ollama.url) as pool:
        async for chunk in pool.generate("fake", "a", options={"num_predict": 2}, stream=True):
            if chunk.done:
                assert pool.hosts[0].running == 0
        await nothing_left(pool)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("more", [(), (Stall(),)], ids=["whole", "endless"])
async def test_an_answer_that_cannot_be_unpacked_gives_the_slot_and_the_connection_back(
    fake_ollama: FakeOllama, streaming: bool, more: tuple[Stall, ...]
) -> None:
    packed = {"model": "fake", "message": {"role": "assistant", "content": "?"}, "done": True}
    fake_ollama.script("/api/chat", Reply([packed, *more], headers={"Content-Encoding": "strange"}))
    async with Pool(fake_ollama.url) as pool:
        with pytest.raises(ProtocolError, match="strange"):
            await (pool.chat("fake", "1", stream=True).collect() if streaming else pool.chat("fake", "1"))
        await nothing_left(pool)
        (first,) = fake_ollama.connections
        assert await asyncio.to_thread(first.wait_left, LIMIT)
        assert (await asyncio.wait_for(pool.chat("fake", "2"), LIMIT)).done


async def test_callers_take_turns_and_priorities_go_first(fake_ollama: FakeOllama) -> None:
    gate = Gate()
    fake_ollama.script("/api/chat", gated(gate), always=True)
    async with Pool(fake_ollama.url) as pool:
        calls = [asyncio.create_task(pool.chat("fake", "first", key="a"))]
        await asyncio.to_thread(gate.wait_reached)
        for name, key, priority in [
            ("a1", "a", 0),
            ("a2", "a", 0),
            ("a3", "a", 0),
            ("b1", "b", 0),
            ("b2", "b", 0),
            ("soon", "a", 1),
        ]:
            calls.append(asyncio.create_task(pool.chat("fake", name, key=key, priority=priority)))
            await asyncio.sleep(0)
        gate.open()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*calls)
        assert asked(fake_ollama) == ["first", "soon", "b1", "a1", "b2", "a2", "a3"]
        await nothing_left(pool)


async def test_waiting_is_part_of_the_whole_time(fake_ollama: FakeOllama) -> None:
    gate = Gate()
    fake_ollama.script("/api/chat", gated(gate), Reply.endless_chat(0.001))
    async with Pool(fake_ollama.url) as pool:
        first = asyncio.create_task(pool.chat("fake", "a"))
        await asyncio.to_thread(gate.wait_reached)
        second = asyncio.create_task(pool.chat("fake", "b", timeout=0.6))
        began = time.monotonic()
        await asyncio.sleep(0.3)
        gate.open()
        with pytest.raises(PhaseTimeout) as raised:
            await second
        assert (raised.value.phase, raised.value.seconds) == ("total", 0.6)
        assert "within 0.6 s" in str(raised.value)
        assert time.monotonic() - began < 0.85
        await first


async def test_one_token_is_for_all_calls(servers: list[FakeOllama]) -> None:
    for server in servers:
        server.script("/api/chat", Reply.endless_chat(0.001), always=True)
    token = CancelToken()
    async with Pool([server.url for server in servers], slots=2, token=token) as pool:
        calls = [asyncio.create_task(pool.chat("fake", str(n))) for n in range(9)]
        await until(lambda: sum(host.running for host in pool.hosts) == 6 and sum(map(len, map(asked, servers))) == 6)
        token.abort("stop all")
        for server in servers:
            for request in server.requests:
                if request.route == "/api/chat":
                    # The loop is blocked by this: the sockets were shut down before abort() returned.
                    assert request.connection.wait_left()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(end, "reason", end) for end in ends] == ["stop all"] * 9
        await nothing_left(pool)


async def test_abort_of_the_pool_ends_what_runs_and_leaves_it_usable(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    async with Pool(fake_ollama.url) as pool:
        stream = pool.chat("fake", "a", stream=True)
        await anext(stream)
        pool.abort("all")
        with pytest.raises(AbortError, match="all"):
            await anext(stream)
        assert (await pool.chat("fake", "b")).done


async def test_a_closed_pool_takes_no_calls(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    pool = Pool(fake_ollama.url)
    stream = pool.chat("fake", "a", stream=True)
    await anext(stream)
    await pool.aclose()
    await pool.aclose()
    with pytest.raises(StreamClosed):
        await stream.collect()
    with pytest.raises(StreamClosed, match="the pool is closed"):
        await pool.chat("fake", "b")


def test_a_pool_serves_event_loops_one_after_the_other(fake_ollama: FakeOllama) -> None:
    pool = Pool(fake_ollama.url)

    async def leave_one_running() -> None:
        assert (await pool.chat("fake", "a", options={"num_predict": 1})).done
        stream = pool.chat("fake", "b", stream=True)
        await anext(stream)
        KEPT.append(stream)

    for _ in range(2):
        asyncio.run(leave_one_running())
        KEPT.clear()
    assert idle(pool)
    asyncio.run(pool.aclose())


# -- the stream's face --


def test_its_stream_is_a_stream_in_all_but_what_it_reads() -> None:
    said = {"__module__", "__doc__", "__annotations__", "__orig_bases__", "__parameters__"}
    # Nothing of a stream is made anew, so nothing of it can be forgotten or differ.
    made_anew = {name for name in vars(PoolStream) if name in vars(Stream)} - said
    assert made_anew <= {"__init__", "__repr__", "__static_attributes__", "__firstlineno__"}


async def test_a_stream_of_a_pool_is_read_in_all_ways(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a", "b", "c"), always=True)
    async with Pool(fake_ollama.url) as pool:
        stream = pool.chat("fake", "x", stream=True)
        assert isinstance(stream, Stream)
        assert (stream.response, stream.text, stream.outcome, stream.status_code, stream.host) == (
            None,
            "",
            None,
            None,
            None,
        )
        assert repr(stream) == "<PoolStream of chat: not started>"
        texts = [chunk.message.content async for chunk in stream]
        assert texts == ["a", "b", "c", ""]
        assert (stream.text, stream.outcome, stream.status_code, stream.host) == ("abc", "done", 200, fake_ollama.url)
        assert stream.timing.chunks == 4
        assert [chunk async for chunk in stream] == []
        async for _ in await pool.chat("fake", "x", stream=True):
            pass
        async with pool.chat("fake", "x", stream=True) as entered:
            assert (await entered.collect()).message.content == "abc"
        enough = await pool.chat("fake", "x", stream=True, until=lambda a: "b" in (a.message.content or "")).collect()
        assert enough.message.content == "ab"
        fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
        stream = pool.chat("fake", "x", stream=True)
        reader = asyncio.create_task(stream.collect())
        await until(lambda: stream.text)
        with pytest.raises(StreamBusy):
            await anext(stream)
        assert stream.outcome is None
        stream.abort("over")
        with pytest.raises(AbortError) as raised:
            await reader
        assert raised.value.partial.message.content
        await nothing_left(pool)


async def test_part_of_an_answer_is_not_an_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("half", done=False))
    async with Pool(fake_ollama.url) as pool:
        with pytest.raises(StreamTruncated) as raised:
            await pool.chat("fake", "x")
        assert raised.value.partial.message.content == "half"
        await nothing_left(pool)


# -- failing over --


@pytest.mark.parametrize(
    "fault",
    [
        Reply.error(503, "busy"),
        Reply.error(502, "bad gateway"),
        Reply.error(404, "model 'fake' not found"),
        Reply(before_head=[Cut()]),
        Reply(before_head=[Stall()]),
    ],
    ids=["503", "502", "model", "broken", "hangs"],
)
async def test_a_call_goes_to_another_host_before_its_first_byte(servers: list[FakeOllama], fault: Reply) -> None:
    bad, good = servers[:2]
    bad.script("/api/chat", fault, always=True)
    limits = Timeouts(first_chunk=0.1)
    # More slots: the better choice, were it not for the fault.
    async with Pool([Host(bad.url, slots=9), Host(good.url, slots=1)], timeout=limits) as pool:
        for n in range(3):
            answer = await pool.chat("fake", str(n), sticky=n, options={"num_predict": 1})
            assert answer["host"] == good.url
        assert len(asked(bad)) <= 3
        assert [asked(bad).count(str(n)) <= 1 for n in range(3)] == [True] * 3
        assert asked(good) == ["0", "1", "2"]
        await nothing_left(pool)


async def test_a_host_that_is_not_there_is_passed_over(servers: list[FakeOllama]) -> None:
    async with Pool([DEAD, servers[0].url], slots=4) as pool:
        answers = await asyncio.gather(*(pool.chat("fake", "a", options={"num_predict": 1}) for _ in range(8)))
        assert {answer["host"] for answer in answers} == {servers[0].url}
        dead = pool.hosts[0]
        assert "ConnectError" in (dead.why or "")
        assert dead.out_until is not None
        assert pool.hosts[1].why is None


async def test_there_is_no_second_attempt_after_the_first_byte(servers: list[FakeOllama]) -> None:
    for server in servers[:2]:
        server.script("/api/chat", Reply([*Reply.chat("half", done=False).steps, Cut()]), always=True)
    async with Pool([server.url for server in servers[:2]]) as pool:
        with pytest.raises(ConnectionBroken) as raised:
            await pool.chat("fake", "x")
        assert raised.value.partial.message.content == "half"
        assert sum(len(asked(server)) for server in servers[:2]) == 1
        with pytest.raises(ConnectionBroken):
            await pool.chat("fake", "x", stream=True).collect()
        assert sum(len(asked(server)) for server in servers[:2]) == 2
        await nothing_left(pool)


async def test_there_is_no_second_attempt_after_an_abort_or_for_what_no_host_takes(servers: list[FakeOllama]) -> None:
    for server in servers[:2]:
        server.script("/api/chat", Reply(before_head=[Stall()]))
        server.script("/api/generate", Reply.error(400, "no"), always=True)
    async with Pool([server.url for server in servers[:2]]) as pool:
        token = CancelToken()
        call = asyncio.create_task(pool.chat("fake", "x", token=token))
        await until(lambda: asked(servers[0]) or asked(servers[1]))
        token.abort()
        with pytest.raises(AbortError):
            await call
        with pytest.raises(BadRequestError):
            await pool.generate("fake", "x")
        assert sum(len(asked(server)) for server in servers[:2]) == 1
        assert sum(len(asked(server, "/api/generate")) for server in servers[:2]) == 1
        await nothing_left(pool)


async def test_the_error_of_a_call_that_failed_everywhere_lists_the_hosts(servers: list[FakeOllama]) -> None:
    servers[0].script("/api/chat", Reply.error(503, "busy"))
    async with Pool([servers[0].url, DEAD], patience=0.01) as pool:
        with pytest.raises(NoHost) as raised:
            await pool.chat("fake", "x")
        assert isinstance(raised.value, ConnectError)
        assert "ServerBusyError: busy" in raised.value.errors[servers[0].url]
        assert "ConnectError" in raised.value.errors[DEAD]
        assert servers[0].url in str(raised.value)
    # A pool of one is a limiter: it says what the host said.
    servers[0].script("/api/chat", Reply.error(503, "busy"))
    async with Pool(servers[0].url) as pool:
        with pytest.raises(ServerBusyError):
            await pool.chat("fake", "x")
        with pytest.raises(NotFoundError):
            await pool.chat("unheard-of", "x")


async def test_a_call_waits_for_a_host_to_come_back(servers: list[FakeOllama]) -> None:
    server = servers[0]
    server.stop()
    async with Pool(server.url, patience=LIMIT) as pool:
        with pytest.raises(ConnectError):
            await pool.chat("fake", "first")
        call = asyncio.create_task(pool.chat("fake", "second", options={"num_predict": 1}))
        await until(lambda: pool.hosts[0].waiting)
        server.start()
        async with asyncio.timeout(LIMIT):
            assert (await call).done
        assert pool.hosts[0].why is None
        # The probe was one, and no call was sent before it.
        assert [request.route for request in server.requests] == ["/api/version", "/api/chat"]


async def test_a_call_does_not_wait_for_ever_for_a_host() -> None:
    async with Pool(DEAD, patience=0.1) as pool:
        with pytest.raises(ConnectError):
            await pool.chat("fake", "first")
        async with asyncio.timeout(LIMIT):
            with pytest.raises(NoHost):
                await pool.chat("fake", "second")
            with pytest.raises(NoHost):
                await pool.chat("fake", "third", timeout=0.05)
        await nothing_left(pool)


async def test_a_hang_takes_one_model_out_and_one_probe_brings_it_back(servers: list[FakeOllama]) -> None:
    hung, good = servers[:2]
    gate = Gate()
    hung.script("/api/chat", Reply(before_head=[Stall()]))
    hung.script("/api/generate", replace(Reply.generate("a"), before_head=[gate]), always=True)
    hosts = [Host(hung.url, slots=8), Host(good.url, models=["fake"])]
    async with Pool(hosts, timeout=Timeouts(first_chunk=0.2)) as pool:
        assert (await pool.chat("fake", "a", options={"num_predict": 1}))["host"] == good.url
        assert asked(hung) == ["a"]
        state = pool.hosts[0]
        assert state.out_models == {"fake:latest"}
        assert "first_chunk" in (state.why or "")
        # The other model is not there anywhere else.
        assert (await pool.chat("other", "b", options={"num_predict": 1}))["host"] == hung.url
        await until(lambda: (pool.hosts[0].out_until or 0) < time.time())
        # Whoever calls has it probed, and is not the probe.
        calls = [asyncio.create_task(pool.chat("fake", "c", options={"num_predict": 1})) for _ in range(5)]
        await asyncio.to_thread(gate.wait_reached)
        assert {(await call)["host"] for call in calls} == {good.url}
        gate.open()
        await until(lambda: not pool.hosts[0].out_models)
        assert len(asked(hung, "/api/generate")) == 1
        await nothing_left(pool)


async def test_a_failed_probe_leaves_a_host_out_for_longer(servers: list[FakeOllama]) -> None:
    servers[0].script("/api/chat", Reply.error(503, "busy"), Reply.chat("a"))
    servers[0].script("/api/generate", Reply.error(503, "busy"), Reply.error(503, "busy"), Reply.generate("a"))
    async with Pool(servers[0].url) as pool:
        with pytest.raises(ServerBusyError):
            await pool.chat("fake", "a")
        began = time.monotonic()
        async with asyncio.timeout(LIMIT):
            assert (await pool.chat("fake", "b")).done
        # 0.05, 0.1 and 0.2 s, each at least three quarters of that.
        assert time.monotonic() - began > 0.26
        assert len(asked(servers[0], "/api/generate")) == 3


# -- choosing --


async def test_a_call_goes_where_its_model_is(servers: list[FakeOllama]) -> None:
    with FakeOllama(interval=0.001, models=["rare"]) as server:
        async with Pool([*(each.url for each in servers), server.url], slots=2) as pool:
            answers = await asyncio.gather(
                *(pool.chat("rare", "a", options={"num_predict": 1}) for _ in range(5)),
                *(pool.chat("other", "a", options={"num_predict": 1}) for _ in range(5)),
            )
            assert {answer["host"] for answer in answers[:5]} == {server.url}
            assert server.url not in {answer["host"] for answer in answers[5:]}
            with pytest.raises(NotFoundError, match="unheard-of"):
                await pool.chat("unheard-of", "a")
            assert not any(
                request.route == "/api/chat" and "unheard" in str(request.json()) for request in server.requests
            )


async def test_a_call_goes_where_its_model_is_loaded(servers: list[FakeOllama]) -> None:
    for _ in range(3):
        servers[2].script("/api/ps", Reply.json({"models": [{"model": "fake:latest", "name": "fake:latest"}]}))
    async with Pool([server.url for server in servers]) as pool:
        assert (await pool.chat("fake", "a", options={"num_predict": 1}))["host"] == servers[2].url


def queue_of(*servers: Server) -> Queue:
    return Queue(list(servers))


def granted(queue: Queue, *models: str) -> list[str]:
    """Queue calls, and return the hosts of those that are given one."""
    for model in models:
        queue.add(Waiter(model, frozenset(), None), None, 0)
    return [waiter.server.url for waiter in queue.grant() if waiter.server is not None]


def test_a_call_that_need_not_wait_is_counted_as_one_that_was_queued() -> None:
    quick, queued = (queue_of(Server("one", 3, {"m:latest", "n:latest"})) for _ in range(2))
    for model, key in (("m:latest", "a"), ("m:latest", "b"), ("n:latest", "a")):
        server = quick.at_once(model, key)
        assert server is quick.servers[0]
        queued.add(Waiter(model, frozenset(), None), key, 0)
        assert len(list(queued.grant())) == 1
        assert (server.running, server.loaded) == (queued.servers[0].running, queued.servers[0].loaded)
        assert (quick.models, quick._turn, quick._last_turns) == (queued.models, queued._turn, queued._last_turns)
    assert quick.at_once("m:latest", None) is None
    assert quick.servers[0].running == 3


def test_a_call_is_queued_where_there_is_something_to_decide() -> None:
    free, out, waited_for = (Server("one", 2, {"m:latest"}) for _ in range(3))
    out.put_out("m:latest", "error", "it is out of service")
    assert queue_of(free).at_once("other:latest", None) is None
    assert queue_of(free, Server("two", 1, None)).at_once("m:latest", None) is None
    assert queue_of(out).at_once("m:latest", None) is None
    queue = queue_of(waited_for)
    queue.add(Waiter("m:latest", frozenset(), None), None, 0)
    assert queue.at_once("m:latest", None) is None
    assert queue_of(free).at_once("m:latest", None) is free


def test_a_conversation_stays_where_it_was_while_there_is_room() -> None:
    queue = queue_of(*(Server(name, 8, None) for name in "abc"))
    for server in queue.servers:
        server.loaded = {"m"}

    def host_of(conversation: str) -> str:
        queue.add(Waiter("m", frozenset(), conversation), None, 0)
        (waiter,) = queue.grant()
        assert waiter.server is not None
        return waiter.server.url

    first = host_of("talk")
    assert [host_of("talk") for _ in range(7)] == [first] * 7
    assert host_of("talk") != first


def test_calls_go_to_the_host_with_the_most_room() -> None:
    queue = queue_of(Server("big", 4, None), Server("small", 2, None))
    for server in queue.servers:
        server.loaded = {"m"}
    hosts = granted(queue, *["m"] * 6)
    assert (hosts[0], hosts.count("big"), hosts.count("small")) == ("big", 4, 2)
    assert granted(queue, "m") == []


def test_a_loaded_model_is_waited_for_up_to_three_calls_a_slot() -> None:
    one, two = Server("one", 1, None), Server("two", 1, None)
    queue = queue_of(one, two)
    assert granted(queue, "a") == ["one"] or (one.running, two.running) == (0, 1)
    if two.running:
        one, two = two, one
    assert granted(queue, "b") == [two.url]
    two.running = 0
    # It is idle, but calls wait for what it has loaded.
    queue.add(Waiter("a", frozenset(), None), None, 0)
    two.running = 1
    queue.add(Waiter("b", frozenset(), None), None, 0)
    two.running = 0
    assert [(waiter.model, waiter.server and waiter.server.url) for waiter in queue.grant()] == [("b", two.url)]
    two.running = 0
    # Now none waits for it: it may load the other one.
    assert [(waiter.model, waiter.server and waiter.server.url) for waiter in queue.grant()] == [("a", two.url)]


def test_a_model_that_is_asked_for_too_much_gets_another_host() -> None:
    one, two = Server("one", 1, None), Server("two", 2, None)
    one.loaded, two.loaded, one.running, two.running = {"a"}, {"b"}, 1, 1
    queue = queue_of(one, two)
    assert granted(queue, "a", "a") == []
    assert granted(queue, "a") == ["two"]
    assert two.loaded == {"a"}


def test_two_models_on_hosts_of_one_each_are_loaded_seldom() -> None:
    queue = queue_of(*(Server(name, 4, None) for name in "abc"))
    order = random.Random(7)
    loads, running = 0, []
    for n in range(500):
        # 24 at once, each of a model by chance.
        queue.add(Waiter(order.choice("xy"), frozenset(), None), None, 0)
        if n >= 24:
            running.pop(order.randrange(len(running))).running -= 1
        loaded = {server: set(server.loaded) for server in queue.servers}
        for waiter in queue.grant():
            assert waiter.server is not None
            loads += waiter.model not in loaded[waiter.server]
            loaded[waiter.server] = set(waiter.server.loaded)
            running.append(waiter.server)
    assert loads <= 20
    assert queue.waiting + len(running) == 24


# -- many items --


async def test_map_yields_each_result_as_it_comes(servers: list[FakeOllama]) -> None:
    async with Pool([server.url for server in servers], slots=2) as pool:
        found = {}
        async for result in pool.map((f"p{n}" for n in range(30)), model="fake", options={"num_predict": 1}):
            assert result.ok
            assert result.host in [server.url for server in servers]
            assert result.response.message.content == "This"
            found[result.index] = result.item
        assert found == {n: f"p{n}" for n in range(30)}
        await nothing_left(pool)


async def test_map_takes_all_kinds_of_items_and_an_error_is_a_result(fake_ollama: FakeOllama) -> None:
    async def items() -> AsyncIterator[Any]:
        yield {"messages": [{"role": "user", "content": "a"}]}
        yield {"prompt": "b", "model": "fake"}
        yield {"input": ["c", "d"]}
        yield {"prompt": "e", "model": "unheard-of"}
        yield {"neither": 1}
        yield "text"

    async with Pool(fake_ollama.url) as pool:
        results = [result async for result in pool.map(items(), model="fake", kind="generate", ordered=True)]
    assert [result.index for result in results] == list(range(6))
    kinds = [type(result.response or result.error).__name__ for result in results]
    assert kinds == [
        "ChatResponse",
        "GenerateResponse",
        "EmbedResponse",
        "NotFoundError",
        "RequestError",
        "GenerateResponse",
    ]
    assert not results[3].ok


@pytest.mark.parametrize("ordered", [False, True])
async def test_leaving_a_map_aborts_the_rest(fake_ollama: FakeOllama, ordered: bool) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a"), Reply.endless_chat(0.001), always=True)
    read = 0

    def items() -> Iterator[str]:
        nonlocal read
        for n in range(1000):
            read = n + 1
            yield str(n)

    async with Pool(fake_ollama.url, slots=3) as pool:
        async for result in pool.map(items(), model="fake", ordered=ordered):
            assert result.index == 0
            await until(lambda: len(asked(fake_ollama)) == 4)
            break
        for request in fake_ollama.requests[1:]:
            # Before the loop runs again.
            assert request.connection.wait_left()
        assert read <= 5
        await nothing_left(pool)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert len(asked(fake_ollama)) == 4


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_map_does_not_read_ahead_of_its_reader(fake_ollama: FakeOllama, ordered: bool) -> None:
    read = 0

    def items() -> Iterator[str]:
        nonlocal read
        for n in range(40):
            read = n + 1
            yield str(n)

    async with Pool(fake_ollama.url, slots=3) as pool:
        taken = 0
        async for _ in pool.map(items(), model="fake", options={"num_predict": 1}, ordered=ordered):
            taken += 1
            if taken in (1, 10):
                await until(lambda taken=taken: read == taken + 4)
                await asyncio.sleep(0.05)
            assert read <= taken + 4
        assert taken == 40


async def test_aborting_a_map_yields_what_ran_with_its_partial_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a"), Reply.endless_chat(0.001), always=True)
    token = CancelToken()
    async with Pool(fake_ollama.url, slots=2) as pool:
        results = []
        with pytest.raises(AbortError, match="stop"):
            async for result in pool.map(map(str, range(100)), model="fake", token=token):
                if not results:
                    await until(lambda: len(asked(fake_ollama)) == 3)
                    await asyncio.sleep(0.02)
                    token.abort("stop")
                results.append(result)
        assert results[0].ok
        errors = [result.error for result in results[1:]]
        assert {type(error) for error in errors} == {AbortError}
        assert sum(bool(error.partial and error.partial.message.content) for error in errors) >= 1
        assert len(asked(fake_ollama)) == 3
        await nothing_left(pool)


async def test_what_the_items_raise_ends_the_map(fake_ollama: FakeOllama) -> None:
    def items() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    async with Pool(fake_ollama.url) as pool:
        results = []
        with pytest.raises(ZeroDivisionError):
            async for result in pool.map(items(), model="fake", options={"num_predict": 1}):
                results.append(result)
        await nothing_left(pool)


# -- what is refused --


def test_what_a_pool_does_not_take() -> None:
    for wrong in ([], [DEAD, DEAD]):
        with pytest.raises(RequestError):
            Pool(wrong)
    for slots in (0, -1, True, "2"):
        with pytest.raises(RequestError, match="slots="):
            Pool(DEAD, slots=slots)  # type: ignore[arg-type]
    pool = Pool([DEAD])
    assert repr(pool) == "<Pool of 1 hosts: 0 calls run, 0 wait>"
    with pytest.raises(RequestError, match="concurrency"):
        pool.map(["a"], concurrency=0)
    with pytest.raises(RequestError, match="the pool has no host"):
        pool.client("http://elsewhere")
    assert pool.client(DEAD) is pool.client(DEAD)


NAN = float("nan")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"hosts": []}, r"hosts=\[\]: give at least one URL or Host"),
        ({"hosts": None}, "hosts=NoneType: give a URL"),
        ({"hosts": 3}, "hosts=int: give a URL"),
        ({"hosts": b"http://a"}, "hosts=bytes: give a URL"),
        ({"hosts": {DEAD: 2}}, "hosts=dict: give a URL"),
        ({"hosts": [DEAD, 3]}, r"hosts has a int in it: give URLs, or Host\("),
        ({"hosts": [DEAD, None]}, "hosts has a NoneType in it"),
        ({"hosts": [Host(5)]}, "url=5 of a host: give a str"),
        ({"hosts": ["ftp://a"]}, "invalid host: it has the scheme 'ftp'"),
        ({"hosts": ["http://a:x"]}, "invalid host"),
        ({"hosts": [DEAD, DEAD]}, f"{DEAD} is there twice; give it once"),
        ({"hosts": [DEAD, "127.0.0.1:1/"]}, f"{DEAD} is there twice"),
        ({"hosts": [DEAD, "http://user:secret@127.0.0.1:1"]}, f"{DEAD} is there twice"),
        ({"slots": 0}, f"slots=0 of {DEAD}: give how many calls"),
        ({"slots": "3"}, f"slots='3' of {DEAD}"),
        ({"slots": True}, f"slots=True of {DEAD}"),
        ({"slots": 1.5}, f"slots=1.5 of {DEAD}"),
        ({"slots": [4, 2]}, r"slots=\[4, 2\] of"),
        ({"hosts": [Host("http://user:secret@127.0.0.1:1", slots=-1)]}, f"slots=-1 of {DEAD}"),
        ({"models": "fake"}, f"models='fake' of {DEAD}: give a list of names"),
        ({"hosts": [Host(DEAD, models=[3])]}, rf"models=\[3\] of {DEAD}"),
        ({"patience": -1}, "patience=-1: give a number of seconds"),
        ({"patience": "1"}, "patience='1': give"),
        ({"patience": NAN}, "patience=nan: give"),
        ({"timeout": "5"}, "timeout='5': give"),
        ({"token": "stop"}, "token='stop': give a CancelToken"),
    ],
)
def test_a_pool_says_what_is_wrong_with_what_it_is_given(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        Pool(**{"hosts": DEAD, **given})
    assert "secret" not in str(raised.value)


def test_a_host_may_have_a_path() -> None:
    # One behind a proxy that gives each server a folder: as a client takes it.
    assert [host.url for host in Pool([f"{DEAD}/one", f"{DEAD}/two"]).hosts] == [f"{DEAD}/one", f"{DEAD}/two"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sticky": ["talk"]}, r"sticky=\['talk'\]: give something that can be hashed"),
        ({"key": {}}, "key={}: give something that can be hashed"),
        ({"priority": "high"}, "priority='high': give a number"),
        ({"priority": None}, "priority=None: give a number"),
        ({"priority": True}, "priority=True: give a number"),
        ({"priority": NAN}, "priority=nan: give a number"),
        ({"token": "stop"}, "token='stop': give a CancelToken"),
        ({"timeout": "5"}, "timeout='5': give"),
        ({"model": ""}, "model='': give the name of a model"),
        ({"model": 5}, "model=5: give the name of a model"),
        ({"retries": -1}, "retries=-1"),
        ({"headers": 3}, "headers=int"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "stream", "generate", "embed"])
async def test_a_call_says_what_is_wrong_with_it_when_it_is_awaited(
    fake_ollama: FakeOllama, kind: str, wrong: dict[str, Any], says: str
) -> None:
    async with Pool(fake_ollama.url) as pool:
        method = pool.chat if kind == "stream" else getattr(pool, kind)
        options = {"model": "fake", **({"stream": True} if kind == "stream" else {}), **wrong}
        call = method(**options)
        good = pool.generate("fake", "a", options={"num_predict": 1})
        # One bad call does not lose the other.
        bad, answer = await asyncio.gather(call, good, return_exceptions=True)
        assert isinstance(bad, RequestError)
        assert re.search(says, str(bad))
        assert isinstance(answer, GenerateResponse)
        if kind == "stream":
            with pytest.raises(RequestError, match=says):
                await anext(call)
            assert call.outcome == "error"
        assert len(fake_ollama.requests) == 1
        await nothing_left(pool)


async def test_a_stream_is_true_or_false(fake_ollama: FakeOllama) -> None:
    async with Pool(fake_ollama.url) as pool:
        with pytest.raises(RequestError, match="stream='yes': give True or False"):
            await pool.chat("fake", "a", stream="yes")  # type: ignore[call-overload]


async def test_an_unknown_parameter_is_a_type_error_and_gives_the_slot_back(fake_ollama: FakeOllama) -> None:
    async with Pool(fake_ollama.url) as pool:
        for call in (pool.chat("fake", "a", colour="red"), pool.embed("fake", "a", colour="red")):  # type: ignore[call-arg]
            with pytest.raises(TypeError, match="colour"):
                await call
        await nothing_left(pool)
        assert (await pool.chat("fake", "a", options={"num_predict": 1})).done


async def test_a_pool_that_is_in_use_is_refused_in_another_loop(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    async with Pool(fake_ollama.url, slots=2) as pool:
        stream = pool.chat("fake", "a", stream=True)
        await anext(stream)

        def elsewhere() -> None:
            with pytest.raises(RequestError, match="in use in another event loop: make a pool for each"):
                asyncio.run(pool.generate("fake", "b"))  # type: ignore[arg-type]

        await asyncio.to_thread(elsewhere)
        # The one that runs is not touched.
        assert (await anext(stream)).message.content
        await stream.aclose()
        await nothing_left(pool)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"items": "a prompt"}, "items=str: give a list of prompts"),
        ({"items": 5}, "items=int: give a list"),
        ({"kind": "answer"}, "kind='answer': give 'chat', 'generate' or 'embed'"),
        ({"concurrency": "3"}, "concurrency='3': give how many"),
        ({"concurrency": True}, "concurrency=True: give how many"),
        ({"token": 5}, "token=5: give a CancelToken"),
    ],
)
def test_a_map_says_what_is_wrong_with_what_it_is_given(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Pool(DEAD).map(**{"items": ["a"], **given})


def test_a_host_may_be_out_for_days() -> None:
    outage = Outage("version")
    for _ in range(3000):
        outage.add("refused")
    assert outage.until - time.monotonic() <= _hosts.LONGEST_OUTAGE
