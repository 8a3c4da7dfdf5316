"""What is done while something is injected: each way through the core, short and the same every time."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from ollama_async import AsyncClient, CancelToken, DirectTransport, Timeouts
from ollama_async.testing import Block, FakeOllama, Pause, Reply, Stall

PATH = "/api/chat"
ELSEWHERE = "/elsewhere"
# Far enough away not to pass, near enough to be a timer.
LIMITS = Timeouts(connect=50.0, first_chunk=50.0, idle=50.0, total=50.0)


class World:
    """What a scene has to do with.

    Attributes:
        server: The server; it has the scene's script.
        client: A client of it.
        token: What an abort is called on.
        tokens: On all of these nothing may be registered in the end.
        seen: The text of each chunk that was delivered.
        late: Of them, those that were delivered after an abort had returned.
        aborted: Whether an abort has returned.
    """

    def __init__(self, server: FakeOllama, client: AsyncClient, http: Any) -> None:
        self.server = server
        self.client = client
        self.http = http
        self.token = CancelToken()
        self.tokens = [self.token]
        self.streams: list[Any] = []
        self.seen: list[str] = []
        self.late: list[str] = []
        self.aborted = False
        self.abort: Callable[[], object] = lambda: self.token.abort("injected")

    def stream(self, **options: Any) -> Any:
        stream = self.client.chat("m", "hi", stream=True, **{"token": self.token, "timeout": LIMITS, **options})
        self.streams.append(stream)
        return stream

    def deliver(self, chunk: Any) -> int:
        text = chunk.message.content
        self.seen.append(text)
        if self.aborted:
            self.late.append(text)
        return len(self.seen)

    def derived(self, token: CancelToken) -> CancelToken:
        self.tokens.append(token)
        return token


@dataclass(frozen=True)
class Scene:
    """A way through the core.

    Attributes:
        play: Does it; an error of the library's comes out.
        replies: What the server answers to ``PATH``; the last one always.
        elsewhere: What it answers where it redirects to.
        stalls: Whether no answer ends by itself: after an abort the server must see all clients leave.
        kept: Whether there is a connection to be used again.
        client: Makes the client.
        keeps: Whether what it registers is there until an abort.
        closes: Whether the client is closed in it.
        answers: Whether the server is there.
        abortable: Whether there is a token, stream or client to abort it with.
        ends: How it may end besides the way it ends when nothing is injected.
    """

    play: Callable[[World], Awaitable[object]]
    replies: tuple[Reply, ...] = ()
    elsewhere: Reply | None = None
    stalls: bool = False
    kept: bool = False
    tls: bool = False
    client: Callable[[FakeOllama, Any], tuple[AsyncClient, Any]] = field(
        default=lambda server, tls: (AsyncClient(server.url, verify=tls, trust_env=False), None)
    )
    keeps: bool = False
    closes: bool = False
    answers: bool = True
    abortable: bool = True
    ends: tuple[str, ...] = ()


def _frame(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "m", "message": {"role": "assistant", "content": text}, "done": done}


ANSWER = Reply.json(_frame("hello", done=True))
WHOLE = Reply([_frame("a"), Block(*[_frame(text) for text in "bcdef"]), _frame("", done=True)])
# Each part is read by itself, also on a machine that is slow or quick.
PACED = Reply([Pause(0.02), _frame("a"), Pause(0.02), _frame("b"), Pause(0.02), _frame("", done=True), Pause(0.02)])
BEGUN = Reply([_frame("a"), Block(_frame("b"), _frame("c"), _frame("d")), Stall()])
SILENT = Reply(before_head=[Stall()])


# -- calls --


async def plain(world: World) -> None:
    reply = await world.client.chat("m", "hi", token=world.token, timeout=LIMITS)
    assert reply.message.content == "hello"


async def read_to_end(world: World) -> None:
    async for chunk in world.stream():
        world.deliver(chunk)


async def collect(world: World) -> None:
    await world.stream().collect()


async def one_by_one(world: World) -> None:
    stream = await world.stream()
    with suppress(StopAsyncIteration):
        while True:
            world.deliver(await anext(stream))


async def until(world: World) -> None:
    async for chunk in world.stream(until=lambda merged: len(merged.message.content) > 2):
        world.deliver(chunk)


# -- stops --


async def abort_self(world: World) -> None:
    async for chunk in world.stream():
        if world.deliver(chunk) == 2:
            world.token.abort("own")
            world.aborted = True


async def abort_stream(world: World) -> None:
    stream = world.stream()
    world.abort = lambda: stream.abort("injected")
    async for chunk in stream:
        if world.deliver(chunk) == 4:
            asyncio.get_running_loop().call_soon(stream.abort, "own")


async def abort_client(world: World) -> None:
    world.abort = lambda: world.client.abort("injected")
    async for chunk in world.stream():
        if world.deliver(chunk) == 4:
            asyncio.get_running_loop().call_soon(world.client.abort, "own")


async def leave(world: World) -> None:
    async for chunk in world.stream():
        if world.deliver(chunk) == 2:
            break


async def enter_and_leave(world: World) -> None:
    async with world.stream() as stream:
        world.deliver(await anext(stream))


async def drop(world: World) -> None:
    stream = world.stream()
    world.streams.clear()
    await anext(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del stream


async def cancelled(world: World) -> None:
    me = asyncio.current_task()
    assert me is not None
    try:
        async for chunk in world.stream():
            if world.deliver(chunk) == 4:
                asyncio.get_running_loop().call_soon(me.cancel)
    except asyncio.CancelledError:
        if me.uncancel():
            raise


async def idle_passes(world: World) -> None:
    async for chunk in world.stream(timeout=Timeouts(connect=50.0, first_chunk=50.0, idle=0.005, total=50.0)):
        world.deliver(chunk)


async def timeout_around(world: World) -> None:
    try:
        async with asyncio.timeout(0.02):
            async for chunk in world.stream():
                world.deliver(chunk)
    except TimeoutError:
        return


async def waits_for_head(world: World) -> None:
    asyncio.get_running_loop().call_later(0.01, world.token.abort, "own")
    await world.client.chat("m", "hi", token=world.token, timeout=LIMITS)


async def close_client(world: World) -> None:
    stream, other = world.stream(), world.stream()
    reader = asyncio.create_task(other.collect())
    # Looked at even if this is cancelled while it waits for it.
    reader.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        world.deliver(await anext(stream))
        await asyncio.sleep(0.005)
        await world.client.close()
    except BaseException:
        stream.abort("the scene has failed")
        reader.cancel()
        raise
    finally:
        await asyncio.wait([reader])


# -- what is on the way --


async def upload(world: World) -> None:
    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 1000
            await asyncio.sleep(0)

    async def send() -> None:
        await world.http.post(world.server.url + "/up", content=blocks())

    await send()


async def upload_file(world: World) -> None:
    await world.client.create_blob(__file__, token=world.token, timeout=LIMITS)


async def retry(world: World) -> None:
    await world.client.chat("m", "hi", token=world.token, timeout=LIMITS, retries=1)


async def retry_stream(world: World) -> None:
    async for chunk in world.stream(retries=1):
        world.deliver(chunk)


async def bare_httpx(world: World) -> None:
    async with world.http.stream("POST", world.server.url + PATH, json={}) as response:
        async for _ in response.aiter_lines():
            pass


# -- tokens alone --


def _all_kinds(world: World) -> list[CancelToken]:
    child = world.derived(world.token.child())
    either = world.derived(CancelToken.any(child, world.derived(CancelToken())))
    limited = world.derived(CancelToken.timeout(50.0))
    return [world.token, child, either, limited]


async def tokens_registered(world: World) -> None:
    for token in _all_kinds(world):
        registration = token.on_abort(world.seen.append)
        try:
            registration.remove()
        except BaseException:
            registration.remove()
            raise


async def tokens_aborted(world: World) -> None:
    tokens = _all_kinds(world)

    def abort() -> None:
        for token in tokens:
            token.abort("injected")

    world.abort = abort
    for token in tokens:
        token.on_abort(world.seen.append)
    world.token.abort("own")
    tokens[-1].abort("own")


async def token_waits(world: World) -> None:
    child = world.derived(world.token.child())
    asyncio.get_running_loop().call_later(0.005, world.token.abort, "own")
    await child.wait()


async def token_passes(world: World) -> None:
    await world.derived(CancelToken.timeout(0.005)).wait()


async def token_scope(world: World) -> None:
    asyncio.get_running_loop().call_later(0.005, world.token.abort, "own")
    with world.token.scope():
        await asyncio.sleep(50)


def _of_nobody(server: FakeOllama, _: Any) -> tuple[AsyncClient, Any]:
    return AsyncClient("http://127.0.0.1:1", trust_env=False), None


def _bare(server: FakeOllama, _: Any) -> tuple[AsyncClient, Any]:
    return AsyncClient(server.url, trust_env=False), httpx.AsyncClient(transport=DirectTransport(), timeout=50.0)


def _foreign(server: FakeOllama, tls: Any) -> tuple[AsyncClient, Any]:
    http = httpx.AsyncClient(verify=tls, timeout=None, trust_env=False)
    return AsyncClient(server.url, http_client=http), http


MOVED = Reply(status=307, headers={"Location": ELSEWHERE}, framing="length")
BUSY = Reply.error(503, "busy")

SCENES: dict[str, Scene] = {
    "plain": Scene(plain, (ANSWER,)),
    "plain, kept": Scene(plain, (ANSWER,), kept=True),
    "plain, tls": Scene(plain, (ANSWER,), tls=True),
    "plain, silent": Scene(waits_for_head, (SILENT,), stalls=True),
    "plain, error": Scene(plain, (Reply.error(404, "no such model"),)),
    "stream": Scene(read_to_end, (WHOLE,)),
    "stream, kept": Scene(read_to_end, (WHOLE,), kept=True),
    "stream, tls": Scene(read_to_end, (WHOLE,), tls=True),
    "stream, error": Scene(read_to_end, (Reply.error(404, "no such model"),)),
    "stream, broken line": Scene(read_to_end, (Reply([_frame("a"), b"nonsense\n", _frame("b")]),)),
    "stream, error frame": Scene(read_to_end, (Reply([_frame("a"), {"error": "out of memory"}]),)),
    "stream, until": Scene(until, (BEGUN,), stalls=True),
    "collect": Scene(collect, (WHOLE,)),
    "anext": Scene(one_by_one, (WHOLE,)),
    "abort in the loop": Scene(abort_self, (BEGUN,), stalls=True),
    "abort in the loop, tls": Scene(abort_self, (BEGUN,), stalls=True, tls=True),
    "abort of the stream": Scene(abort_stream, (BEGUN,), stalls=True),
    "abort of the client": Scene(abort_client, (BEGUN,), stalls=True),
    "break": Scene(leave, (BEGUN,), stalls=True),
    "async with": Scene(enter_and_leave, (BEGUN,), stalls=True),
    "drop": Scene(drop, (BEGUN,), stalls=True),
    "cancel": Scene(cancelled, (BEGUN,), stalls=True),
    "idle timeout": Scene(idle_passes, (BEGUN,), stalls=True),
    "asyncio.timeout": Scene(timeout_around, (BEGUN,), stalls=True),
    "close": Scene(close_client, (BEGUN,), stalls=True, closes=True, ends=("StreamClosed",)),
    "upload": Scene(upload, client=_bare, abortable=False),
    "upload of a file": Scene(upload_file),
    "bare httpx": Scene(bare_httpx, (WHOLE,), client=_bare, abortable=False),
    "refused, retried": Scene(retry, client=_of_nobody, answers=False),
    "busy, retried": Scene(retry, (BUSY, ANSWER)),
    "busy, retried stream": Scene(retry_stream, (BUSY, WHOLE)),
    "redirect": Scene(plain, (MOVED,), ANSWER),
    "redirect of a stream": Scene(read_to_end, (MOVED,), WHOLE),
    "foreign": Scene(plain, (ANSWER,), client=_foreign),
    "foreign stream": Scene(read_to_end, (WHOLE,), client=_foreign),
    "foreign abort": Scene(abort_self, (BEGUN,), client=_foreign),
    "tokens registered": Scene(tokens_registered),
    "tokens aborted": Scene(tokens_aborted, keeps=True),
    "token.wait()": Scene(token_waits),
    "a token's time": Scene(token_passes),
    "token.scope()": Scene(token_scope),
}
