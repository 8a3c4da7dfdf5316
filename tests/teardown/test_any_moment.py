"""Stops at moments that are easily forgotten: before a first step, during a merge, before there is a connection.

Garbage collection is off: what closes a stream must not be the collector.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import gc
import inspect
import pickle
import socket
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import httptools
import pydantic
import pytest
import uvloop
from teardown.harness import BOUND, in_thread, registrations, saw_leave, ticks

import ollama_async._call.exchange
import ollama_async._call.iterators
import ollama_async._call.stream
import ollama_async._wire.connection
import ollama_async._wire.parser
import ollama_async._wire.transport
from ollama_async import AbortError, AsyncClient, CancelToken, ChatResponse, DirectTransport, Stream, Timeouts
from ollama_async._call.awaitable import Guarded
from ollama_async._call.chunk_reader import ChunkReader
from ollama_async._call.decoder import NdjsonDecoder
from ollama_async._wire import dial
from ollama_async._wire.pool import Dialling
from ollama_async._wire.socket import GuardedSocket
from ollama_async.registry import AbortRegistry
from ollama_async.testing import FakeOllama, Reply, Stall
from ollama_async.testing._script import encode

pytestmark = pytest.mark.parametrize("server", ["tcp"], indirect=True)

PROMPT = [{"role": "user", "content": "x"}]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def client(fake_ollama: FakeOllama) -> AsyncIterator[AsyncClient]:
    fake_ollama.script("/api/chat", Reply([*Reply.chat("a", "b", done=False).steps, Stall()]), always=True)
    async with AsyncClient(fake_ollama.url) as made:
        yield made


async def opened(client: AsyncClient, **options: Any) -> Stream[ChatResponse]:
    """Return a stream that has had all chunks which come."""
    stream = client.chat("fake", PROMPT, stream=True, **options)
    assert (await anext(stream)).message.content == "a"
    assert (await anext(stream)).message.content == "b"
    return stream


# -- before the first step --

Make = Callable[[Stream[ChatResponse]], Coroutine[Any, Any, Any]]

READS: dict[str, Make] = {
    "anext": lambda stream: anext(stream),
    "anext of an iterator": lambda stream: anext(aiter(stream)),
    "collect": lambda stream: stream.collect(),
}


async def cancelled_at_once(read: Coroutine[Any, Any, Any]) -> None:
    task = asyncio.create_task(read)
    task.cancel()
    await task


async def cancelled_in_the_same_round(read: Coroutine[Any, Any, Any]) -> None:
    async def wait() -> None:
        await asyncio.wait_for(asyncio.ensure_future(read), BOUND)

    task = asyncio.create_task(wait())
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


async def no_time_at_all(read: Coroutine[Any, Any, Any]) -> None:
    await asyncio.wait_for(asyncio.ensure_future(read), 0)


async def in_a_group_that_fails(read: Coroutine[Any, Any, Any]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(read)
        raise KeyError


async def in_a_scope_that_is_cancelled(read: Coroutine[Any, Any, Any]) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: read)
            scope.cancel()


async def thrown_into(read: Coroutine[Any, Any, Any]) -> None:
    read.throw(asyncio.CancelledError())


WAYS = [
    cancelled_at_once,
    cancelled_in_the_same_round,
    no_time_at_all,
    in_a_group_that_fails,
    in_a_scope_that_is_cancelled,
    thrown_into,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", READS)
async def test_a_reader_that_is_cancelled_before_its_first_step_closes_the_stream(
    fake_ollama: FakeOllama, client: AsyncClient, read: str, way: Callable[[Coroutine[Any, Any, Any]], Awaitable[None]]
) -> None:
    stream = await opened(client)
    iterator = aiter(stream)
    made = anext(iterator) if "iterator" in read else READS[read](stream)
    if not inspect.iscoroutine(made):
        # What wait_for() and tasks take.
        assert asyncio.iscoroutine(made)
    with contextlib.suppress(asyncio.CancelledError, TimeoutError, BaseExceptionGroup):
        await way(made)
    saw_leave(fake_ollama)
    assert stream.outcome == "cancelled"
    assert stream.text == "ab"


@pytest.mark.parametrize("end", ["never awaited", "closed"])
@pytest.mark.parametrize("read", READS)
async def test_a_reader_that_is_dropped_before_its_first_step_changes_nothing(
    fake_ollama: FakeOllama, client: AsyncClient, read: str, end: str
) -> None:
    stream = client.chat("fake", PROMPT, stream=True)
    await anext(stream)
    iterator = aiter(stream)
    made = anext(iterator) if "iterator" in read else READS[read](stream)
    if end == "closed":
        made.close()
        del made
    else:
        with pytest.warns(RuntimeWarning, match="never awaited"):
            del made
    assert (await anext(stream)).message.content == "b"
    assert fake_ollama.connections[-1].open
    await stream.aclose()
    del iterator


def not_begun(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Make a task whose first step is still to come, also where tasks are eager."""
    return asyncio.Task(coroutine)


async def test_a_second_reader_cancelled_before_its_first_step_does_not_take_the_stream_from_the_first(
    fake_ollama: FakeOllama, client: AsyncClient
) -> None:
    stream = await opened(client)
    first = asyncio.create_task(stream.collect())
    await ticks(3)
    second = not_begun(anext(stream))  # type: ignore[arg-type]
    second.cancel()
    await asyncio.wait([second])
    assert second.cancelled()
    assert stream.outcome is None
    assert fake_ollama.connections[-1].open
    stream.abort("enough")
    with pytest.raises(AbortError):
        await first


async def test_a_call_that_is_cancelled_before_its_first_step_sends_nothing(
    fake_ollama: FakeOllama, client: AsyncClient
) -> None:
    token = CancelToken()
    stream = client.chat("fake", PROMPT, stream=True, token=token)
    calls: list[Coroutine[Any, Any, Any]] = [
        client.chat("fake", PROMPT, token=token),
        client.version(token=token),
        anext(stream),  # type: ignore[list-item]
        token.wait(),
    ]
    tasks = [not_begun(call) for call in calls]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert stream.outcome == "cancelled"
    assert not fake_ollama.connections
    assert registrations(token) == 0


async def test_what_closes_is_a_coroutine_function_for_frameworks_that_ask(client: AsyncClient) -> None:
    # They take what is none for a plain function, and never await what it returns.
    stream = await opened(client)
    for function in (client.close, client.aclose, stream.aclose, DirectTransport().aclose):
        assert inspect.iscoroutinefunction(function)
    await stream.aclose()


async def test_a_task_shows_the_coroutine_that_it_runs(client: AsyncClient) -> None:
    stream = await opened(client)
    task = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await ticks(2)
    assert "Stream.__anext__()" in repr(task)
    assert task.get_stack()
    task.cancel()
    await asyncio.wait([task])


async def test_only_a_step_that_a_task_may_be_made_of_is_guarded(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An `async for` awaits each step at once: what costs each token is not for it.
    guarded: list[object] = []

    class Counted(Guarded[Any]):
        def __init__(self, *args: Any) -> None:
            guarded.append(args)
            super().__init__(*args)

    monkeypatch.setattr(ollama_async._call.iterators, "Guarded", Counted)
    monkeypatch.setattr(ollama_async._call.stream, "Guarded", Counted)
    fake_ollama.script("/api/chat", Reply.chat("a", "b", "c"), always=True)
    async for _ in client.chat("fake", PROMPT, stream=True):
        pass
    assert [chunk.done async for chunk in client.chat("fake", PROMPT, stream=True)][-1]
    assert not guarded
    iterator = aiter(client.chat("fake", PROMPT, stream=True))
    await anext(iterator)
    await iterator.__anext__()
    assert len(guarded) == 2
    async for _ in iterator:
        pass
    assert (await anext(aiter(client.chat("fake", PROMPT, stream=True)))).message.content == "a"


# -- while a chunk is merged --


@pytest.mark.parametrize("what", ["chat", "generate"])
@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_no_chunk_is_delivered_when_a_signal_handler_aborts_while_it_is_merged(
    fake_ollama: FakeOllama, client: AsyncClient, what: str, chunk: int, when: str
) -> None:
    words = [f"{number} " for number in range(20)]
    fake_ollama.script("/api/generate", Reply([b"".join(_lines(Reply.generate(*words)))]), always=True)
    fake_ollama.script("/api/chat", Reply([b"".join(_lines(Reply.chat(*words)))]), always=True)
    stream: Stream[Any] = (
        client.chat("fake", PROMPT, stream=True) if what == "chat" else client.generate("fake", "x", stream=True)
    )
    add, count, looked = stream._reader.answer.add, 0, []

    def interrupted(part: Any) -> None:
        nonlocal count
        count += 1
        if when == "after":
            add(part)
        if count == chunk:
            assert stream.abort("a signal")
            looked.append(stream.text)
        if when == "before":
            add(part)

    stream._reader.answer.add = interrupted
    seen: list[Any] = []
    with pytest.raises(AbortError) as caught:
        async for part in stream:
            seen.append(part)
    assert len(seen) == chunk - 1
    # Of what had arrived nothing is lost, doubled or in another order; and nobody saw more than a beginning of it.
    assert stream.text == "".join(words)
    assert "".join(words).startswith(looked[0])
    assert caught.value.partial is not None


def _lines(reply: Reply) -> list[bytes]:
    return [encode(step) for step in reply.steps if isinstance(step, (dict, bytes))]


@pytest.mark.parametrize("until", [False, True])
@pytest.mark.parametrize("inside", ["_deliver", "decode", "feed_data"])
@pytest.mark.parametrize("who", ["a signal handler", "a thread"])
async def test_an_abort_while_chunks_are_made_shows_a_beginning_and_loses_nothing(
    fake_ollama: FakeOllama,
    client: AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    inside: str,
    who: str,
    until: bool,
) -> None:
    words = [f"{number} " for number in range(200)]
    lines = _lines(Reply.chat(*words))
    fake_ollama.script("/api/chat", Reply([b"".join(lines[:90]), b"".join(lines[90:])]), always=True)
    owner = ChunkReader if inside == "_deliver" else NdjsonDecoder
    original = getattr(owner, inside)
    for nth in range(1, 5):
        options: dict[str, Any] = {"until": lambda _: False} if until else {}
        stream = client.chat("fake", PROMPT, stream=True, **options)
        calls, looked = 0, []

        def stop(stream: Stream[ChatResponse] = stream, looked: list[str] = looked) -> bool:
            stream.abort("stop")
            looked.append(stream.text)
            return True

        def watched(self: Any, *args: Any, nth: int = nth, stop: Callable[[], bool] = stop, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            for when in ("before", "after"):
                if calls == nth and when == ("before" if nth % 2 else "after"):
                    assert stop() if who == "a signal handler" else in_thread(stop)
                if when == "before":
                    result = original(self, *args, **keywords)
            return result

        monkeypatch.setattr(owner, inside, watched)
        seen: list[str] = []
        with contextlib.suppress(AbortError):
            async for chunk in stream:
                seen.append(chunk.message.content or "")
        monkeypatch.setattr(owner, inside, original)
        whole = "".join(words)
        assert all(whole.startswith(text) for text in (*looked, "".join(seen), stream.text))
        assert stream.text.startswith("".join(seen))
        if stream.outcome == "aborted":
            assert len(stream.text) >= len("".join(words[:88]))


@pytest.mark.parametrize("where", ["before", "after"])
async def test_a_chunk_whose_merge_is_interrupted_is_merged_once(
    fake_ollama: FakeOllama, client: AsyncClient, where: str
) -> None:
    words = [f"{number} " for number in range(20)]
    fake_ollama.script("/api/chat", Reply([b"".join(_lines(Reply.chat(*words)))]), always=True)
    stream = client.chat("fake", PROMPT, stream=True)
    add, count = stream._reader.answer.add, 0

    def interrupted(part: Any) -> None:
        nonlocal count
        count += 1
        if count == 5 and where == "before":
            raise KeyboardInterrupt
        add(part)
        if count == 5 and where == "after":
            raise KeyboardInterrupt

    stream._reader.answer.add = interrupted
    with pytest.raises(KeyboardInterrupt):
        async for _ in stream:
            pass
    assert stream.outcome == "closed"
    assert stream.text == "".join(words)


# -- in a callback of the parser --


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "callback", ["on_status", "on_header", "on_headers_complete", "on_message_complete", "_complete"]
)
def test_what_a_signal_handler_raises_in_the_parser_comes_out_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop], callback: str, error: type
) -> None:
    pending = [error]
    original = getattr(ollama_async._wire.parser.ResponseParser, callback)

    def interrupted(*args: Any) -> None:
        if pending:
            raise pending.pop()
        original(*args)

    monkeypatch.setattr(ollama_async._wire.parser.ResponseParser, callback, interrupted)
    loop = new_loop()
    with FakeOllama() as server:
        client = AsyncClient(server.url)
        first = loop.create_task(client.version())
        with pytest.raises(error):
            loop.run_until_complete(asyncio.wait([first], timeout=BOUND))
        # The loop goes on, as in an interactive shell: the reader is not left asleep, and the next call works.
        loop.run_until_complete(asyncio.wait([first], timeout=BOUND))
        assert first.done()
        assert first.exception() is not None
        assert server.connections[0].wait_left(BOUND)
        assert loop.run_until_complete(client.version()).version
        loop.run_until_complete(client.aclose())
    loop.close()


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop


def test_httptools_hides_what_a_callback_raises_where_it_is_looked_for() -> None:
    class Target:
        def on_header(self, *_: bytes) -> None:
            raise KeyboardInterrupt

    with pytest.raises(httptools.HttpParserCallbackError) as caught:
        httptools.HttpResponseParser(Target()).feed_data(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n")
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


def test_ctrl_c_in_a_destructor_comes_out_of_the_loop_and_the_stream_is_closed(
    monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    loop = new_loop()
    severed = GuardedSocket.shutdown
    pending = [KeyboardInterrupt()]

    def interrupted(sock: GuardedSocket) -> None:
        if pending:
            raise pending.pop()
        severed(sock)

    with FakeOllama() as server:
        server.script("/api/chat", Reply.endless_chat(0.001), always=True)

        async def leave(client: AsyncClient) -> Stream[Any]:
            stream = client.chat("fake", PROMPT, stream=True)
            async for _ in stream:
                monkeypatch.setattr(GuardedSocket, "shutdown", interrupted)
                break
            saw_leave(server)
            return stream

        client = AsyncClient(server.url)
        task = loop.create_task(leave(client))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.wait([task], timeout=BOUND))
        loop.run_until_complete(asyncio.wait([task], timeout=BOUND))
        assert task.result().outcome == "closed"
        loop.run_until_complete(client.aclose())
    loop.close()


# -- an abort that does not get through --


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RecursionError, MemoryError])
@pytest.mark.parametrize(
    "where",
    ["_wire.socket.GuardedSocket.shutdown", "_wire.reader.release_in_turn", "_call.exchange.Exchange.outcome_decided"],
)
async def test_an_abort_that_fails_half_way_says_so_and_is_finished_by_the_next_one(
    fake_ollama: FakeOllama,
    client: AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: type[BaseException],
) -> None:
    token = CancelToken()
    stream = await opened(client, token=token)
    *path, name = where.split(".")
    place: Any = ollama_async
    for part in path:
        place = getattr(place, part)
    original = getattr(place, name)
    failed: list[bool] = []

    def fails_once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise error
        return original(*args)

    monkeypatch.setattr(place, name, fails_once)
    with pytest.raises(error):
        token.abort("first")
    assert token.aborted
    assert token.abort("second") is False
    saw_leave(fake_ollama)
    assert registrations(token) == 0
    with pytest.raises(AbortError) as caught:
        await anext(stream)
    assert caught.value.reason == "first"


def test_a_callback_that_was_not_called_for_want_of_stack_is_called_by_the_next_abort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    refused = 0

    def down(levels: int, function: Callable[[], object]) -> object:
        return down(levels - 1, function) if levels else function()

    room = sys.getrecursionlimit() - len(inspect.stack())
    for free in range(2, 40):
        token = CancelToken()
        seen: list[object] = []

        def callback(reason: object, seen: list[object] = seen) -> None:
            # Without a call, which could be one too many.
            seen += [reason]

        token.on_abort(callback)
        try:
            down(room - free, lambda token=token: token.abort("deep"))
        except RecursionError:
            refused += 1
        token.abort("again")
        assert seen in (["deep"], ["again"])
        assert seen == [token.reason]
        assert registrations(token) == 0
    assert refused > 3
    assert not reported


@pytest.mark.parametrize(("levels", "frames"), [(50, 0), (300, 500), (5000, 0), (20_000, 700)])
async def test_a_chain_of_any_length_is_aborted_from_its_root(
    fake_ollama: FakeOllama, client: AsyncClient, levels: int, frames: int
) -> None:
    root = token = CancelToken()
    seen: list[object] = []
    for _ in range(levels):
        token = token.child()
    token.on_abort(seen.append)
    stream = await opened(client, token=token)

    def down(left: int) -> bool:
        return down(left - 1) if left else root.abort("stop")

    assert down(frames)
    saw_leave(fake_ollama)
    assert (seen, token.reason, registrations(token), registrations(root)) == (["stop"], "stop", 0, 0)
    with pytest.raises(AbortError):
        await anext(stream)


# -- before there is a connection --


@pytest.mark.parametrize("rounds", range(1, 8))
async def test_no_connection_is_opened_after_abort_has_returned(
    fake_ollama: FakeOllama, client: AsyncClient, rounds: int
) -> None:
    token = CancelToken()
    call = asyncio.create_task(client.chat("fake", PROMPT, stream=True, token=token).collect())
    await ticks(rounds)
    token.abort("stop")
    # The loop is blocked. The server takes connections in their order: when it has this one, it has all before it.
    with socket.create_connection(("127.0.0.1", fake_ollama.port)) as probe:
        probe.sendall(b"GET /probe HTTP/1.1\r\nHost: x\r\n\r\n")
        fake_ollama.wait_for_requests(1, path="/probe", timeout=BOUND)
        before = len(fake_ollama.connections)
        with pytest.raises(AbortError):
            await call
        assert (await client.version()).version
    assert len(fake_ollama.connections) == before + 1


async def test_a_socket_that_was_severed_never_connects(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From another thread, at the last moment before connect().
    token = CancelToken()
    original = GuardedSocket.connect

    def late(sock: GuardedSocket, address: Any) -> None:
        aborting = threading.Thread(target=token.abort)
        aborting.start()
        aborting.join(BOUND)
        original(sock, address)

    monkeypatch.setattr(GuardedSocket, "connect", late)
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(AbortError):
            await client.version(token=token)
    await ticks(20)
    assert not fake_ollama.connections


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_socket_that_the_loop_connects_past_it_looks_at_the_abort(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As the loop of Windows does: by the descriptor, without the socket's connect()."""
    token = CancelToken()
    loop = asyncio.get_running_loop()

    async def sock_connect(sock: GuardedSocket, address: Any) -> None:
        if when == "meanwhile":
            in_thread(token.abort)
        sock.setblocking(True)
        socket.socket.connect(sock, address)
        sock.setblocking(False)

    open_socket = dial._connect_socket

    async def late(*args: Any) -> Any:
        if when == "before":
            in_thread(token.abort)
        return await open_socket(*args)

    monkeypatch.setattr(dial, "WATCHES_SOCKETS", False)
    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    monkeypatch.setattr(dial, "_connect_socket", late)
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(AbortError):
            await client.version(token=token)
    await ticks(20)
    assert all(connection.wait_left(BOUND) for connection in fake_ollama.connections)
    assert not fake_ollama.requests
    assert len(fake_ollama.connections) <= (1 if when == "meanwhile" else 0)


async def test_an_abort_before_there_is_a_task_that_connects_connects_nowhere(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, begun = CancelToken(), list[object]()

    class Aborted(Dialling):
        def __init__(self, sockets: dial.Sockets) -> None:
            super().__init__(sockets)
            token.abort("a signal")

    def begin(*args: object) -> None:
        begun.append(args)

    monkeypatch.setattr(ollama_async._wire.transport, "Dialling", Aborted)
    monkeypatch.setattr(DirectTransport, "_dial", begin)
    # What has a name is connected to by a task.
    async with AsyncClient(fake_ollama.url.replace("127.0.0.1", "localhost")) as client:
        with pytest.raises(AbortError):
            await client.version(token=token)
    assert not begun
    assert not fake_ollama.connections
    assert registrations(token) == 0


async def test_nothing_is_sent_over_a_kept_connection_after_abort_has_returned(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.version()
    token = CancelToken()
    write = ollama_async._wire.connection.Connection.write

    def late(connection: Any, data: bytes) -> None:
        token.abort("a signal")
        write(connection, data)

    monkeypatch.setattr(ollama_async._wire.connection.Connection, "write", late)
    with pytest.raises(AbortError):
        await client.ps(token=token)
    saw_leave(fake_ollama)
    assert [request.path for request in fake_ollama.requests] == ["/api/version"]


# -- what is left of the call that came first --


class _Marked:
    pass


_current: contextvars.ContextVar[_Marked | None] = contextvars.ContextVar("current", default=None)


@pytest.mark.parametrize("what", ["plain", "timeout", "token with a deadline", "slow reader"])
async def test_a_connection_keeps_nothing_of_the_context_of_the_call_that_opened_it(
    fake_ollama: FakeOllama, client: AsyncClient, what: str
) -> None:
    held: list[weakref.ref[_Marked]] = []
    fake_ollama.script("/api/generate", Reply.generate(*["x" * 30_000] * 20), always=True)

    async def first() -> None:
        marked = _Marked()
        held.append(weakref.ref(marked))
        _current.set(marked)
        if what == "slow reader":
            stream = client.generate("fake", "x", stream=True)
            await anext(stream)
            # It reads on from within this task.
            await stream.collect()
        elif what == "timeout":
            await client.version(timeout=Timeouts(connect=600, first_chunk=600, idle=600, total=600))
        elif what == "plain":
            await client.version()
        else:
            await client.version(token=CancelToken.timeout(600))

    await asyncio.create_task(first())
    for _ in range(3):
        await client.version()
        await ticks(3)
    gc.collect()
    assert held[0]() is None
    assert len(fake_ollama.connections) == 1


# -- several threads --


def test_threads_with_a_loop_each_share_a_client() -> None:
    errors: list[BaseException] = []
    stop = time.monotonic() + 6
    interval = sys.getswitchinterval()

    def work(client: AsyncClient) -> None:
        while time.monotonic() < stop and not errors:
            try:
                asyncio.run(client.version())
            except BaseException as exc:
                errors.append(exc)

    with FakeOllama() as server:
        client = AsyncClient(server.url)
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work, args=(client,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(BOUND * 3)
        finally:
            sys.setswitchinterval(interval)
        asyncio.run(client.aclose())
    assert not errors


# -- copies --


@dataclasses.dataclass
class Ask:
    live: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    live: Any


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "asdict": lambda live: dataclasses.asdict(Ask(live))["live"],
    "replace": lambda live: dataclasses.replace(Ask(live)).live,
    "model_copy": lambda live: Model(live=live).model_copy(deep=True).live,
    "in a container": lambda live: copy.deepcopy({"a": [live, live]})["a"][1],
}


@pytest.mark.parametrize("how", COPIES)
async def test_a_copy_of_something_live_is_the_thing_itself(how: str) -> None:
    with FakeOllama() as server:
        client, token = AsyncClient(server.url), CancelToken()
        stream = client.chat("fake", PROMPT, stream=True, token=token)
        registry = AbortRegistry.from_url("memory://")
        live = [token, token.child(), token.on_abort(print), client, stream, DirectTransport(), registry]
        for each in live:
            assert COPIES[how](each) is each, type(each)
        await client.aclose()
    assert copy.deepcopy(Timeouts(total=3)) == Timeouts(total=3)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
async def test_something_live_is_not_pickled_and_the_error_says_what_to_do(protocol: int) -> None:
    client, token = AsyncClient(), CancelToken()
    live = [token, token.on_abort(print), client, client.chat("m", "x", stream=True), DirectTransport()]
    for each in live:
        with pytest.raises(TypeError, match=f"cannot pickle '{type(each).__name__}'.*AbortRegistry"):
            pickle.dumps({"given": each}, protocol)
    assert pickle.loads(pickle.dumps(Timeouts(total=3), protocol)) == Timeouts(total=3)
    await client.aclose()
