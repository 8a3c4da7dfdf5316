"""Scenarios S1 to S25: a call is aborted in each phase of its request. The number of each is in its test's name."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pathlib
import select
import ssl
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest
from teardown.harness import (
    BOUND,
    black_hole,
    client_of,
    live_timers,
    open_fds,
    over_the_network,
    paths,
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
    DirectTransport,
    NotFoundError,
    OllamaError,
    ServerError,
    StreamError,
)
from ollama_async.testing import Block, ConnectionRecord, Endless, FakeOllama, Gate, NoEnd, Pause, Reply, Stall, Trickle

streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
over_tcp_only = pytest.mark.parametrize("server", ["tcp"], indirect=True)


def line(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}


def texts(chunks: list[Any]) -> list[str]:
    return [chunk.message.content for chunk in chunks]


async def ask(client: AsyncClient, token: CancelToken, *, streaming: bool, prompt: str = "hi") -> Any:
    """Make one call from its beginning to its end."""
    if streaming:
        return await client.chat("fake", prompt, stream=True, token=token).collect()
    return await client.chat("fake", prompt, token=token)


async def aborted(task: asyncio.Task[Any], reason: object = "stop") -> AbortError:
    """Wait for a task that must end by an abort."""
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(task, BOUND)
    assert caught.value.reason is reason
    return caught.value


async def next_request_works(client: AsyncClient) -> None:
    assert (await asyncio.wait_for(client.version(), BOUND)).version


async def only_this_was_sent(server: FakeOllama, client: AsyncClient) -> None:
    """A request made now is the first one, on the first connection: connections are accepted in order."""
    await next_request_works(client)
    assert paths(server) == ["/api/version"]
    assert len(server.connections) == 1


def more_sent(record: ConnectionRecord, than: int) -> bool:
    return record.bytes_sent > than


async def arrived(server: FakeOllama, count: int = 1) -> None:
    """Wait, with the loop running, until the server has read the heads of so many requests."""
    await until(lambda: len(server.requests) >= count, f"{count} requests at the server")


# -- before there is a connection --


@streaming_or_not
async def test_s01_a_token_aborted_before_the_call_opens_no_connection(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    token.abort("stop")
    await aborted(asyncio.create_task(ask(client, token, streaming=streaming)))
    assert registrations(token) == 0
    await only_this_was_sent(server, client)


@pytest.mark.parametrize("way", ["call", "stream", "streams_own_abort"])
async def test_s02_an_abort_between_the_call_and_its_first_await_opens_no_connection(
    server: FakeOllama, client: AsyncClient, token: CancelToken, way: str
) -> None:
    if way == "call":
        call = client.chat("fake", "hi", token=token)
        token.abort("stop")
        await aborted(asyncio.ensure_future(call))
    else:
        stream = client.chat("fake", "hi", stream=True, token=token)
        assert (stream.abort if way == "streams_own_abort" else token.abort)("stop") is True
        await aborted(asyncio.create_task(stream.collect()))
        assert (stream.outcome, stream.reason) == ("aborted", "stop")
    assert registrations(token) == 0
    await only_this_was_sent(server, client)


@over_the_network
async def test_s03_an_abort_during_the_name_lookup_does_not_wait_for_it_and_connects_nowhere(
    server: FakeOllama, client_tls: ssl.SSLContext, token: CancelToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    lookup, asked, answer = loop.getaddrinfo, asyncio.Event(), threading.Event()

    async def slow_lookup(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        await loop.run_in_executor(None, answer.wait, BOUND)  # as the real one: in a thread, which cannot be stopped
        return await lookup(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "getaddrinfo", slow_lookup)
        async with AsyncClient(server.url.replace("127.0.0.1", "localhost"), verify=client_tls) as client:
            task = asyncio.create_task(client.chat("fake", "hi", token=token))
            try:
                await asyncio.wait_for(asked.wait(), BOUND)
                token.abort("stop")
                await aborted(task)
                assert not answer.is_set()
            finally:
                answer.set()
            await loop.shutdown_default_executor()
            await ticks(20)
    assert registrations(token) == 0
    assert server.connections == ()


@over_tcp_only
async def test_s04_an_abort_while_the_syn_is_unanswered_closes_the_socket(token: CancelToken) -> None:
    with black_hole() as host:
        async with AsyncClient(host) as client:
            before = len(open_fds())
            task = asyncio.create_task(client.chat("fake", "hi", token=token))
            await until(lambda: len(open_fds()) > before, "the connecting socket")
            token.abort("stop")
            await aborted(task)
            assert len(open_fds()) == before
            assert registrations(token) == 0


@streaming_or_not
async def test_s05_a_cancel_at_any_tick_is_never_swallowed_and_leaves_nothing(
    server: FakeOllama,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    token: CancelToken,
    streaming: bool,
) -> None:
    context = server_tls if server.url.startswith("https") else None
    frames = [line("one "), line("two"), line("", done=True)] if streaming else [line("one two", done=True)]
    body = b"".join(json.dumps(frame).encode() + b"\n" for frame in frames)
    pieces = [step for at in range(0, len(body), 40) for step in (body[at : at + 40], Pause(0.001))]
    tick, accepted = 0, True
    while accepted or tick <= 60:
        assert tick < 500, "the scan does not get to the end of the call"
        with FakeOllama(ssl=context) as fresh:
            fresh.script("/api/chat", Reply(pieces))
            async with client_of(fresh, verify=client_tls) as client:
                task = asyncio.create_task(ask(client, token, streaming=streaming))
                for _ in range(tick):
                    await asyncio.sleep(0)
                    time.sleep(0.0002)  # the server's turn, so that not all ticks pass before it answers
                accepted = task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() is accepted, f"tick {tick}: a cancel was swallowed"
                assert accepted or task.result().message.content == "one two"
                assert registrations(token) == 0, f"tick {tick}"
                # Either the connection was left and this one is new, or it is whole and used again.
                await next_request_works(client)
                for record in fresh.connections[:-1]:
                    assert record.wait_left(BOUND), f"tick {tick}: connection {record.number} was left open"
            for record in fresh.connections:
                assert record.wait_left(BOUND), f"tick {tick}: connection {record.number} outlived the client"
        tick += 1


@over_tcp_only
@streaming_or_not
async def test_s06_an_abort_during_the_tls_handshake_closes_the_socket(token: CancelToken, streaming: bool) -> None:
    with FakeOllama(silent=True) as silent:
        async with AsyncClient(silent.url.replace("http://", "https://")) as client:
            before = len(open_fds())
            task = asyncio.create_task(ask(client, token, streaming=streaming))
            await until(lambda: silent.connections and silent.connections[0].bytes_received, "the ClientHello")
            token.abort("stop")
            saw_leave(silent)
            await aborted(task)
            await until(lambda: len(open_fds()) == before, "both ends of the connection closed")
            assert registrations(token) == 0


@pytest.mark.parametrize("tick", [0, 1, 2, 5])
async def test_s07_of_two_requests_started_together_the_aborted_one_does_not_touch_the_other(
    server: FakeOllama, client: AsyncClient, token: CancelToken, tick: int
) -> None:
    server.script("/api/generate", Reply.generate("whole ", "answer"))
    one = asyncio.create_task(client.chat("fake", "hi", token=token))
    other = asyncio.create_task(client.generate("fake", "hi", stream=True).collect())
    await ticks(tick)
    token.abort("stop")
    await aborted(one)
    assert (await asyncio.wait_for(other, BOUND)).response == "whole answer"
    await next_request_works(client)


# -- while the request is written --


async def test_s08_an_abort_during_a_stalled_write_returns_at_once(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply(read_body=False, before_head=[gate]))
    task = asyncio.create_task(ask(client, token, streaming=False, prompt="x" * 16 * 1024 * 1024))
    await until(lambda: gate.reached, "the head of the request")
    await ticks(20)
    started = time.monotonic()
    token.abort("stop")
    assert time.monotonic() - started < BOUND / 2, "abort() waited for the network"
    gate.open()  # only now does the server look at its socket again
    saw_leave(server)
    assert not server.requests[0].complete
    await aborted(task)
    await next_request_works(client)


async def test_s09_an_aborted_upload_has_closed_its_file(
    server: FakeOllama, client: AsyncClient, token: CancelToken, tmp_path: pathlib.Path
) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(16 * 1024 * 1024))
    gate = Gate()
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    server.script(f"/api/blobs/sha256:{digest}", Reply(read_body=False, before_head=[gate]))
    task = asyncio.create_task(client.create_blob(big, token=token))
    await until(lambda: gate.reached, "the head of the request")
    await ticks(20)
    assert os.fspath(big) in open_fds().values()
    token.abort("stop")
    gate.open()
    saw_leave(server)
    assert not server.requests[0].complete
    await aborted(task)
    # At once, unless a worker thread is reading a block of it: then when that has been read.
    await until(lambda: os.fspath(big) not in open_fds().values(), "the end of the file")
    assert registrations(token) == 0


@over_the_network
async def test_s09_the_finally_of_a_body_generator_has_run_when_its_cancelled_request_ends(
    server: FakeOllama, client_tls: ssl.SSLContext
) -> None:
    closed = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            yield b"the beginning"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed = True

    async with httpx.AsyncClient(transport=DirectTransport(verify=client_tls)) as http:
        task = asyncio.create_task(http.post(f"{server.url}/api/chat", content=body()))
        await until(lambda: server.requests and server.requests[0].body, "the beginning of the body")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed
        saw_leave(server)


# -- while the answer is waited for --


@streaming_or_not
async def test_s10_an_abort_before_the_headers(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply(before_head=[Stall()]))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await arrived(server)
    token.abort("stop")
    saw_leave(server)
    assert (await aborted(task)).partial is None
    await next_request_works(client)


async def test_s11_an_abort_between_headers_and_first_chunk(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([Stall()]))
    stream = await client.chat("fake", "hi", stream=True, token=token)
    assert stream.status_code == 200
    task = asyncio.create_task(stream.collect())
    await ticks(3)
    token.abort("stop")
    saw_leave(server)
    assert (await aborted(task)).partial is None
    await next_request_works(client)


async def test_s12_a_reader_that_waits_for_a_silent_server_is_told_within_two_ticks(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    assert (await anext(stream)).message.content == "one "
    task = asyncio.ensure_future(stream.__anext__())
    await ticks(10)
    token.abort("stop")
    saw_leave(server)
    await ticks(2)
    assert task.done()
    assert (await aborted(task)).partial.message.content == "one "


async def test_s13_an_abort_while_the_consumer_is_elsewhere_closes_at_once_and_is_raised_at_the_next_pull(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply.endless_chat())
    stream = client.chat("fake", "hi", stream=True, token=token)
    first = await anext(stream)
    token.abort("stop")
    saw_leave(server)
    await ticks(20)
    with pytest.raises(AbortError) as caught:
        await anext(stream)
    assert caught.value.reason == "stop"
    assert caught.value.partial.message.content.startswith(first.message.content)


async def test_s14_of_lines_that_are_buffered_none_is_delivered_after_the_abort(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([Block(line("one "), line("two "), line("three")), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    assert (await anext(stream)).message.content == "one "
    token.abort("stop")
    saw_leave(server)
    with pytest.raises(AbortError) as caught:
        await anext(stream)
    # Not delivered, and not lost.
    assert caught.value.partial.message.content == stream.text == "one two three"


async def test_s15_an_abort_inside_a_character_that_is_cut_in_two(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    half = '{"model":"fake","message":{"role":"assistant","content":"\N{GRINNING FACE}'.encode()[:-2]
    server.script("/api/chat", Reply([Block(line("one "), half), Stall()]))
    seen: list[Any] = []
    task = asyncio.create_task(read_all(client.chat("fake", "hi", stream=True, token=token), seen))
    await until(lambda: seen, "the line and the half that came with it")
    token.abort("stop")
    saw_leave(server)
    assert (await aborted(task)).partial.message.content == "one "
    assert texts(seen) == ["one "]


async def test_s16_data_in_the_same_tick_as_the_abort_is_not_delivered_after_it(
    server: FakeOllama, client: AsyncClient
) -> None:
    delivered = {tick: await delivered_when_both_come_at_once(server, client, tick) for tick in range(6)}
    assert delivered[0] == 1  # the abort was first
    assert delivered[5] == 2  # the reader was


async def delivered_when_both_come_at_once(server: FakeOllama, client: AsyncClient, tick: int) -> int:
    """Have a chunk arrive, and the abort come so many rounds of the loop later."""
    token, gate, seen, delivered = CancelToken(), Gate(), list[Any](), list[int]()

    def stop(countdown: int) -> None:
        if countdown:
            asyncio.get_running_loop().call_soon(stop, countdown - 1)
        else:
            token.abort("stop")
            delivered.append(len(seen))

    server.script("/api/chat", Reply([line("one "), gate, line("two"), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    task = asyncio.create_task(read_all(stream, seen))
    await until(lambda: seen and gate.reached, "the first line")
    await ticks(5)
    record = server.connections[-1]
    gate.open()
    # In this thread: the loop shall find the data only when the abort is due as well.
    exchange: Any = stream._reader.call.exchange
    assert select.select([exchange.reader._link.sock], [], [], BOUND)[0]
    asyncio.get_running_loop().call_soon(stop, tick)
    error = await aborted(task)
    assert len(seen) == delivered[0], "a chunk was delivered after abort()"
    assert record.wait_left(BOUND)
    # Whatever had come, delivered or not, is kept.
    assert error.partial.message.content == stream.text == "one two"
    return len(seen)


# -- at the end --


async def test_s17_an_abort_after_done_and_before_the_end_of_the_body_changes_nothing(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([line("one "), line("two", done=True), gate]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen = []
    async for chunk in stream:
        record = server.connections[0]
        seen.append(chunk)
        if chunk.done:
            assert token.abort("late") is True
            assert stream.abort("late") is False
            await until(lambda: gate.reached, "the server before the end of the body")
            sent = record.bytes_sent
            gate.open()
            await until(partial(more_sent, record, sent), "the end of the body on its way")
    assert texts(seen) == ["one ", "two"]
    assert (stream.outcome, stream.reason, stream.text) == ("done", None, "one two")
    await next_request_works(client)
    assert len(server.connections) == 1, "the connection of a complete answer was not used again"


async def test_s17_an_abort_after_done_when_the_body_never_ends_changes_nothing_but_the_socket_goes(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), line("two", done=True), NoEnd()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    async for chunk in stream:
        if chunk.done:
            assert token.abort("late") is True
    saw_leave(server)
    assert (stream.outcome, stream.text) == ("done", "one two")
    await next_request_works(client)


async def test_s18_an_abort_after_the_end_of_the_iteration_is_a_no_op(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply.chat("one ", "two"))
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[Any] = []
    await read_all(stream, seen)
    assert stream.abort("late") is False
    token.abort("late")
    assert (stream.outcome, stream.reason, stream.text) == ("done", None, "one two")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await next_request_works(client)
    assert len(server.connections) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "came"),
    [
        (Reply.error(404, "model 'fake' not found"), NotFoundError, None),
        (Reply([line("one "), {"error": "the runner died"}]), StreamError, "one "),
    ],
    ids=["http_error", "error_line"],
)
async def test_s19_an_abort_after_an_error_keeps_the_error(
    server: FakeOllama,
    client: AsyncClient,
    token: CancelToken,
    reply: Reply,
    kind: type[OllamaError],
    came: str | None,
) -> None:
    server.script("/api/chat", reply)
    stream = client.chat("fake", "hi", stream=True, token=token)
    with pytest.raises(kind):
        await read_all(stream, [])
    assert stream.abort("late") is False
    token.abort("late")
    assert stream.outcome == "error"
    with pytest.raises(kind) as again:
        await anext(stream)
    assert (again.value.partial and again.value.partial.message.content) == came
    assert registrations(token) == 0


# -- other answers --


async def test_s20_an_abort_of_a_call_that_is_not_a_stream(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/embed", Reply([b'{"model":"fake","embeddings":[[0.1,', Stall()]))
    task = asyncio.create_task(client.embed("fake", "text", token=token))
    await arrived(server)
    await ticks(20)
    token.abort("stop")
    saw_leave(server)
    await aborted(task)
    assert registrations(token) == 0
    await next_request_works(client)


@streaming_or_not
async def test_s21_an_abort_while_a_slow_error_body_arrives_is_an_abort_error(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([Trickle(b'{"error":"' + b"slow " * 100_000, 0.001)], status=500))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await until(lambda: server.connections and server.connections[0].bytes_sent > 200, "some of the error body")
    token.abort("stop")
    saw_leave(server)
    await aborted(task)
    await next_request_works(client)


@streaming_or_not
async def test_s22_without_retries_an_aborted_call_has_made_one_attempt(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([b'{"error":"busy', Stall()], status=503))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await arrived(server)
    token.abort("stop")
    await aborted(task)
    assert live_timers(asyncio.get_running_loop()) == []
    await next_request_works(client)
    assert paths(server) == ["/api/chat", "/api/version"]


@streaming_or_not
async def test_s23_without_an_abort_a_redirect_is_followed(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([b"moved"], status=307, headers={"Location": "/moved/chat"}))
    answer = Reply.chat("one ", "two") if streaming else Reply.json(line("one two", done=True))
    server.script("/moved/chat", answer)
    reply = await asyncio.wait_for(ask(client, token, streaming=streaming), BOUND)
    assert reply.message.content == "one two"
    first, second = server.requests
    assert (second.method, paths(server)[1], second.body) == ("POST", "/moved/chat", first.body)
    assert registrations(token) == 0


@streaming_or_not
async def test_s23_an_abort_between_redirects_makes_no_second_hop(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([b"moved", Stall()], status=307, headers={"Location": "/moved/chat"}))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await until(lambda: server.connections and server.connections[0].bytes_sent > 100, "the redirect")
    await ticks(20)
    token.abort("stop")
    saw_leave(server)
    await aborted(task)
    await next_request_works(client)
    assert paths(server) == ["/api/chat", "/api/version"]


@streaming_or_not
async def test_s23_an_abort_in_the_second_hop_closes_its_connection(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([b"moved"], status=307, headers={"Location": "/moved/chat"}))
    server.script("/moved/chat", Reply(before_head=[Stall()]))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await until(lambda: len(server.requests) == 2 or task.done(), "the second hop")
    token.abort("stop")
    saw_leave(server)
    await aborted(task)
    await next_request_works(client)


async def test_s24_an_abort_error_looks_like_nothing_that_is_retried(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    await anext(stream)
    token.abort("stop")
    with pytest.raises(OllamaError) as caught:
        await anext(stream)
    error = caught.value
    assert type(error) is AbortError
    retried = (OSError, ConnectionError, TimeoutError, EOFError, httpx.HTTPError, ServerError, asyncio.CancelledError)
    assert not isinstance(error, retried)
    # Nor does what policies look at besides the error itself: its cause and what it came out of.
    assert error.__cause__ is None
    assert error.__suppress_context__ or not isinstance(error.__context__, retried)


@streaming_or_not
async def test_s25_an_abort_while_the_server_trickles_bytes_that_make_no_line(
    server: FakeOllama, client: AsyncClient, token: CancelToken, streaming: bool
) -> None:
    server.script("/api/chat", Reply([Endless(lambda _: b" ", 0.001)]))
    task = asyncio.create_task(ask(client, token, streaming=streaming))
    await until(lambda: server.connections and server.connections[0].bytes_sent > 300, "some of the trickle")
    token.abort("stop")
    saw_leave(server)
    await aborted(task)
    await next_request_works(client)
