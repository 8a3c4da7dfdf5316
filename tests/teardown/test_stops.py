"""Every way to stop, in every phase of a call: the server sees the client leave while the client's loop is blocked.

``saw_leave`` blocks the loop's thread right after the stop, so a close that would only come in a later round of the
loop is caught. What is left behind (descriptors, tasks, timers) is looked at by the fixture ``nothing_left``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pathlib
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from teardown.harness import (
    BOUND,
    black_hole,
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
    Stream,
    StreamClosed,
    Timeouts,
)
from ollama_async.testing import Block, FakeOllama, Reply, Stall


def line(text: str) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False}


@dataclass
class Scene:
    """A call that waits for a server which says nothing more."""

    server: FakeOllama
    client: AsyncClient
    token: CancelToken
    call: Callable[[], Awaitable[Any]]
    stream: Stream[Any] | None = None
    seen: list[Any] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    left: bool = False

    async def run(self) -> Any:
        """Be the caller; when the call ends by whatever exception, look at once whether the server saw the leave."""
        try:
            return await self.call()
        except BaseException:
            saw_leave(self.server)
            self.left = True
            raise

    async def parked(self) -> None:
        """Wait until the server has got to where it says nothing more, and the caller has all it had said."""
        if len(self.seen) < len(self.expected):
            await until(lambda: len(self.seen) == len(self.expected), "the chunks before the stall")
        await asyncio.to_thread(self.server.wait_for_connections, 1, timeout=BOUND)
        await ticks(20)

    def texts(self) -> list[str]:
        return [chunk.message.content for chunk in self.seen]


STREAMS: dict[str, tuple[Reply, list[str]]] = {
    "before_headers": (Reply(before_head=[Stall()]), []),
    "after_headers": (Reply([Stall()]), []),
    "mid_stream": (Reply([line("one "), line("two"), Stall()]), ["one ", "two"]),
    "mid_line": (Reply([line("one "), b'{"model":"fake","message":{"role":"assistant","con', Stall()]), ["one "]),
    "after_done_line_cut": (Reply([line("one "), b'{"done":tr', Stall()]), ["one "]),
}
CALLS: dict[str, Reply] = {
    "call_before_headers": Reply(before_head=[Stall()]),
    "call_mid_body": Reply([b'{"model":"fake","message":{"role":"assi', Stall()]),
    "call_error_body": Reply([b'{"error":"mod', Stall()], status=500),
}


@pytest.fixture(params=[*STREAMS, *CALLS, "handshake", "upload"])
async def scene(
    request: pytest.FixtureRequest, server: FakeOllama, client: AsyncClient, token: CancelToken, tmp_path: pathlib.Path
) -> AsyncIterator[Scene]:
    phase = request.param
    if phase in STREAMS:
        reply, expected = STREAMS[phase]
        server.script("/api/chat", reply)
        stream = client.chat("fake", "hi", stream=True, token=token)
        seen: list[Any] = []
        yield Scene(server, client, token, lambda: read_all(stream, seen), stream, seen, expected)
    elif phase in CALLS:
        server.script("/api/chat", CALLS[phase])
        yield Scene(server, client, token, lambda: client.chat("fake", "hi", token=token))
    elif phase == "upload":
        big = tmp_path / "big"
        big.write_bytes(os.urandom(8 * 1024 * 1024))
        digest = hashlib.sha256(big.read_bytes()).hexdigest()
        server.script(f"/api/blobs/sha256:{digest}", Reply(before_head=[Stall()]))
        yield Scene(server, client, token, lambda: client.create_blob(big, token=token))
    else:
        if server.url.startswith("https"):
            pytest.skip("the silent server plays the TLS server that never answers")
        with FakeOllama(silent=True) as silent:
            host = silent.url.replace("http://", "https://")
            async with AsyncClient(host) as other:
                yield Scene(silent, other, token, lambda: other.chat("fake", "hi", token=token))


def abort_in_thread(scene: Scene) -> None:
    """Abort in another thread, while the loop is blocked in this one."""
    thread = threading.Thread(target=scene.token.abort, args=("stop",))
    thread.start()
    saw_leave(scene.server)
    thread.join()


def abort_in_signal_handler(scene: Scene) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: scene.token.abort("stop"))
    try:
        signal.raise_signal(signal.SIGUSR1)
        saw_leave(scene.server)
    finally:
        signal.signal(signal.SIGUSR1, before)


def abort_here(scene: Scene) -> None:
    """Abort in another task than the caller's, and block the loop at once."""
    scene.token.abort("stop")
    saw_leave(scene.server)


def abort_twice(scene: Scene) -> None:
    assert scene.token.abort("stop") is True
    assert scene.token.abort("later") is False
    saw_leave(scene.server)


def abort_client(scene: Scene) -> None:
    scene.client.abort("stop")
    saw_leave(scene.server)


@pytest.mark.parametrize("stop", [abort_here, abort_twice, abort_in_thread, abort_in_signal_handler, abort_client])
async def test_abort(scene: Scene, stop: Callable[[Scene], None]) -> None:
    task = asyncio.create_task(scene.run())
    await scene.parked()
    stop(scene)
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(task, BOUND)
    assert caught.value.reason == "stop"
    assert scene.left
    assert scene.texts() == scene.expected
    kept(scene, caught.value.partial)
    assert registrations(scene.token) == 0
    if scene.stream is not None:
        assert (scene.stream.outcome, scene.stream.reason) == ("aborted", "stop")


def kept(scene: Scene, partial: ChatResponse | None) -> None:
    """What had come is kept, on the error and on the stream."""
    if scene.stream is None:
        return
    text = "".join(scene.expected)
    assert scene.stream.text == text
    assert (partial.message.content if partial else "") == text


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_cancel(scene: Scene, times: int) -> None:
    task = asyncio.create_task(scene.run())
    await scene.parked()
    for _ in range(times):
        task.cancel()
        await ticks(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert scene.left
    kept(scene, scene.stream.response if scene.stream else None)
    assert registrations(scene.token) == 0
    if scene.stream is not None:
        assert scene.stream.outcome == "cancelled"
        with pytest.raises(StreamClosed):
            await anext(scene.stream)


async def test_asyncio_timeout(scene: Scene) -> None:
    async def limited() -> None:
        async with asyncio.timeout(None) as limit:
            asyncio.get_running_loop().call_soon(expire.append, limit)
            await scene.run()

    expire: list[asyncio.Timeout] = []
    task = asyncio.create_task(limited())
    await scene.parked()
    expire[0].reschedule(asyncio.get_running_loop().time())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, BOUND)
    assert scene.left
    assert task.cancelling() == 0
    assert registrations(scene.token) == 0


async def test_task_group_sibling_fails(scene: Scene) -> None:
    async def sibling() -> None:
        await scene.parked()
        raise RuntimeError("the sibling's")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(scene.run())
            group.create_task(sibling())
    assert [str(exc) for exc in caught.value.exceptions] == ["the sibling's"]
    assert scene.left
    assert registrations(scene.token) == 0


async def test_client_close(scene: Scene) -> None:
    task = asyncio.create_task(scene.run())
    await scene.parked()
    await scene.client.aclose()
    with pytest.raises(StreamClosed, match="the client was closed"):
        await asyncio.wait_for(task, BOUND)
    assert scene.left
    assert registrations(scene.token) == 0


async def test_aclose_from_another_task(scene: Scene) -> None:
    if scene.stream is None:
        pytest.skip("only streams have aclose()")
    task = asyncio.create_task(scene.run())
    await scene.parked()
    await scene.stream.aclose()
    saw_leave(scene.server)
    with pytest.raises(StreamClosed):
        await asyncio.wait_for(task, BOUND)
    assert scene.stream.outcome == "closed"
    kept(scene, scene.stream.response)
    assert registrations(scene.token) == 0


@pytest.mark.parametrize("phase", ["first_chunk", "idle", "total"])
async def test_phase_timeout(server: FakeOllama, client: AsyncClient, token: CancelToken, phase: str) -> None:
    server.script("/api/chat", Reply([Stall()] if phase == "first_chunk" else [line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token, timeout=Timeouts(**{"idle": None, phase: 0.05}))
    seen: list[Any] = []
    with pytest.raises(TimeoutError) as caught:
        await read_all(stream, seen)
    saw_leave(server)
    assert caught.value.phase == phase  # type: ignore[attr-defined]
    assert stream.outcome == "timeout"
    assert stream.text == "".join(chunk.message.content for chunk in seen)
    assert registrations(token) == 0


# -- stopped by the reader itself, in the body of its loop --

BODIES = {
    "alone": Reply([line("one "), Stall()]),
    "lines_buffered": Reply([Block(*(line(f"{number} ") for number in range(5))), Stall()]),
    "endless": Reply.endless_chat(interval=0.001),
    "flood": Reply.endless_chat(interval=0),
}


@pytest.fixture(params=[*BODIES])
def stream(
    request: pytest.FixtureRequest, server: FakeOllama, client: AsyncClient, token: CancelToken
) -> Stream[ChatResponse]:
    server.script("/api/chat", BODIES[request.param])
    return client.chat("fake", "hi", stream=True, token=token)


def left_early(server: FakeOllama, stream: Stream[Any], token: CancelToken, outcome: str) -> None:
    record = server.connections[-1]
    assert record.wait_left(BOUND), "the server did not see the client leave while the client's loop was blocked"
    assert stream.outcome == outcome
    assert stream.text
    assert registrations(token) == 0


async def test_break_with_the_stream_kept(server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken) -> None:
    async for _ in stream:
        break
    record = server.connections[-1]
    assert record.wait_left(BOUND)
    await ticks(3)
    left_early(server, stream, token, "closed")


async def test_return_with_the_stream_kept(
    server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken
) -> None:
    async def first() -> ChatResponse:
        async for chunk in stream:
            return chunk
        raise AssertionError

    assert (await first()).message.content
    assert server.connections[-1].wait_left(BOUND)
    await ticks(3)
    left_early(server, stream, token, "closed")


async def test_exception_in_the_loop_kept(server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken) -> None:
    error = None
    try:
        async for _ in stream:
            raise RuntimeError("the body's")
    except RuntimeError as exc:
        error = exc
    assert server.connections[-1].wait_left(BOUND)
    assert error is not None
    await ticks(3)
    left_early(server, stream, token, "closed")


async def test_abort_by_the_reader_itself(server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken) -> None:
    after = 0
    with pytest.raises(AbortError) as caught:
        async for _ in stream:
            assert not token.aborted, "a chunk was delivered after abort()"
            assert token.abort("enough") is True
            after += 1
            assert server.connections[-1].wait_left(BOUND)
    assert after == 1
    assert caught.value.reason == "enough"
    left_early(server, stream, token, "aborted")


async def test_abort_by_the_streams_own_method(
    server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken
) -> None:
    with pytest.raises(AbortError):
        async for _ in stream:
            assert stream.abort("enough") is True
            assert stream.abort("again") is False
            assert server.connections[-1].wait_left(BOUND)
    assert not token.aborted
    left_early(server, stream, token, "aborted")


async def test_cancelled_in_the_body(server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken) -> None:
    in_body = asyncio.Event()

    async def reader() -> None:
        try:
            async for _ in stream:
                in_body.set()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert server.connections[-1].wait_left(BOUND)
            raise

    task = asyncio.create_task(reader())
    await in_body.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ticks(3)
    left_early(server, stream, token, "closed")


async def test_async_with_left_by_exception(
    server: FakeOllama, stream: Stream[ChatResponse], token: CancelToken
) -> None:
    with pytest.raises(RuntimeError):
        async with stream:
            await anext(stream)
            raise RuntimeError("the block's")
    left_early(server, stream, token, "closed")


async def test_until_ends_the_loop_normally(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply.endless_chat(interval=0.001))
    stream = client.chat("fake", "hi", stream=True, token=token, until=lambda merged: len(merged.message.content) > 20)
    seen: list[Any] = []
    await read_all(stream, seen)
    left_early(server, stream, token, "until")
    assert stream.text == "".join(chunk.message.content for chunk in seen)


async def test_dropped_without_a_word(server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    server.script("/api/chat", Reply([line("one "), Stall()]))
    stream = client.chat("fake", "hi", stream=True, token=token)
    await anext(stream)
    with pytest.warns(ResourceWarning, match="unclosed <Stream"):
        del stream
    saw_leave(server)
    await ticks(3)
    assert registrations(token) == 0


# -- without a connection --


@pytest.mark.parametrize("way", ["abort", "cancel", "client"])
async def test_while_connecting(token: CancelToken, way: str) -> None:
    """S4: the SYN is not answered."""
    with black_hole() as host:
        async with AsyncClient(host) as client:
            task = asyncio.create_task(client.chat("fake", "hi", token=token))
            await ticks(20)
            assert not task.done()
            if way == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif way == "abort":
                token.abort("stop")
                with pytest.raises(AbortError):
                    await asyncio.wait_for(task, BOUND)
            else:
                await client.aclose()
                with pytest.raises(StreamClosed):
                    await asyncio.wait_for(task, BOUND)
            assert registrations(token) == 0


async def test_lines_that_had_arrived_and_were_not_read_are_kept(
    server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    server.script("/api/chat", BODIES["lines_buffered"])
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[Any] = []
    with pytest.raises(AbortError) as caught:
        async for chunk in stream:
            seen.append(chunk)
            token.abort("enough")
    assert [chunk.message.content for chunk in seen] == ["0 "]
    assert caught.value.partial.message.content == stream.text == "0 1 2 3 4 "
