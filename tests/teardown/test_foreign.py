"""The second form of an exchange: over somebody else's transport or client, or with somebody's code on the way.

What can be promised there: the task that runs the request is ours, it is cancelled once, and nothing of it is left.
The socket is shut down at once where it is known (from the answer's head on, or when one of our own transports is
below); before that, a foreign transport closes it when its task has run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import httpx2
import pytest
import pytest_asyncio
from teardown.harness import BOUND, Baseline, over_the_network, read_all, registrations, saw_leave, ticks, until

from ollama_async import AbortError, AsyncClient, CancelToken, DirectTransport, PhaseTimeout, StreamClosed, Timeouts
from ollama_async.testing import Block, FakeOllama, Reply, Stall


def line(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}


class Auth(httpx.Auth):
    """Somebody's code within the request."""

    async def async_auth_flow(self, request: httpx.Request) -> AsyncIterator[httpx.Request]:  # type: ignore[override]
        await asyncio.sleep(0)
        request.headers["Authorization"] = "Bearer made-up"
        yield request


pytestmark = over_the_network  # test_matrix.py has unix sockets, too


async def hook(_: object) -> None:
    await asyncio.sleep(0)


FORMS: dict[str, Callable[[str, Any], tuple[AsyncClient, Any]]] = {
    "httpx_transport": lambda url, tls: (AsyncClient(url, transport=httpx.AsyncHTTPTransport(verify=tls)), None),
    "http_client": lambda url, tls: (
        AsyncClient(url, http_client=(made := httpx.AsyncClient(verify=tls, timeout=None))),
        made,
    ),
    "httpx2": lambda url, tls: (
        AsyncClient(url, http_client=(made := httpx2.AsyncClient(verify=tls, timeout=None))),
        made,
    ),
    "http_client_direct": lambda url, tls: (
        AsyncClient(url, http_client=(made := httpx.AsyncClient(transport=DirectTransport(verify=tls)))),
        made,
    ),
    "auth": lambda url, tls: (AsyncClient(url, verify=tls, auth=Auth()), None),
    "event_hooks": lambda url, tls: (
        AsyncClient(url, verify=tls, event_hooks={"request": [hook], "response": [hook]}),
        None,
    ),
}
# With one of our own transports below, the FIN is as immediate as without the detour.
IMMEDIATE = {"http_client_direct", "auth", "event_hooks"}


@pytest.fixture(params=[*FORMS])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def client(form: str, server: FakeOllama, client_tls: Any, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    made, http_client = FORMS[form](server.url, client_tls)
    async with made:
        yield made
    if http_client is not None:
        await http_client.aclose()


PHASES = {
    "before_headers": (Reply(before_head=[Stall()]), 0),
    "after_headers": (Reply([Stall()]), 0),
    "mid_stream": (Reply([line("one "), line("two"), Stall()]), 2),
    "buffered": (Reply([Block(line("one "), line("two")), Stall()]), 2),
}


@pytest.mark.parametrize("phase", [*PHASES])
@pytest.mark.parametrize("way", ["abort", "cancel", "aclose", "client"])
async def test_stop(
    form: str, phase: str, way: str, server: FakeOllama, client: AsyncClient, token: CancelToken
) -> None:
    reply, count = PHASES[phase]
    server.script("/api/chat", reply)
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[Any] = []
    task = asyncio.create_task(read_all(stream, seen))
    await asyncio.to_thread(server.wait_for_requests)
    await until(lambda: len(seen) == count, "the chunks")
    await until(lambda: bool(stream.status_code) or phase == "before_headers", "the head")
    await ticks(10)
    if way == "abort":
        token.abort("stop")
        if form in IMMEDIATE or phase != "before_headers":
            saw_leave(server)
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(task, BOUND)
        assert caught.value.reason == "stop"
    elif way == "cancel":
        task.cancel()
        await ticks(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "aclose":
        await stream.aclose()
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(task, BOUND)
    else:
        await client.aclose()
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(task, BOUND)
    assert stream.text == ("one two" if count else "")
    assert await asyncio.to_thread(server.connections[-1].wait_left, BOUND)
    assert registrations(token) == 0


@pytest.mark.parametrize("phase", [*PHASES])
async def test_timeout(phase: str, server: FakeOllama, client: AsyncClient, token: CancelToken) -> None:
    reply, count = PHASES[phase]
    server.script("/api/chat", reply, always=True)
    for limit in (0.2, 2.0, BOUND):
        stream = client.chat("fake", "hi", stream=True, token=token, timeout=Timeouts(total=limit))
        seen: list[Any] = []
        with pytest.raises(PhaseTimeout):
            await read_all(stream, seen)
        assert registrations(token) == 0
        for record in server.connections:
            assert await asyncio.to_thread(record.wait_left, BOUND)
        if len(seen) == count:  # else the machine was too busy for so short a limit
            break
    assert stream.text == ("one two" if count else "")


async def test_whole_answers_come_through(server: FakeOllama, client: AsyncClient) -> None:
    many = [line(f"{number} ") for number in range(2000)]
    server.script("/api/chat", Reply([*many, line("", done=True)]), Reply.error(404, "no such model"))
    stream = client.chat("fake", "hi", stream=True)
    assert len([chunk async for chunk in stream]) == 2001
    assert stream.outcome == "done"
    with pytest.raises(Exception, match="no such model"):
        await client.chat("fake", "hi")
    assert (await client.version()).version
    assert len(server.connections) == 1


async def test_a_slow_reader_holds_a_bounded_number_of_bytes(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply.endless_chat(interval=0))
    stream = client.chat("fake", "hi", stream=True)
    await anext(stream)
    sent = -1
    while sent != (sent := server.connections[-1].bytes_sent):
        for _ in range(20):
            await asyncio.sleep(0.005)
    before = stream.timing.chunks
    for _ in range(3000):
        await anext(stream)
    assert stream.timing.chunks == before + 3000
    stream.abort()


async def test_errors_of_hooks_are_the_callers(server: FakeOllama, client_tls: Any, nothing_left: Baseline) -> None:
    async def broken(_: httpx.Request) -> None:
        raise LookupError("the hook's")

    async with AsyncClient(server.url, verify=client_tls, event_hooks={"request": [broken]}) as client:
        with pytest.raises(LookupError, match="the hook's"):
            await client.chat("fake", "hi")
        with pytest.raises(LookupError, match="the hook's"):
            await client.chat("fake", "hi", stream=True)
    assert server.connections == ()


async def test_a_hook_that_never_returns_is_aborted(
    server: FakeOllama, client_tls: Any, token: CancelToken, nothing_left: Baseline
) -> None:
    entered = asyncio.Event()

    async def stuck(_: httpx.Request) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with AsyncClient(server.url, verify=client_tls, event_hooks={"request": [stuck]}) as client:
        task = asyncio.create_task(client.chat("fake", "hi", token=token))
        await entered.wait()
        token.abort("stop")
        with pytest.raises(AbortError):
            await asyncio.wait_for(task, BOUND)


async def test_a_mock_transport_is_aborted(token: CancelToken, nothing_left: Baseline) -> None:
    entered = asyncio.Event()

    async def handler(_: httpx.Request) -> httpx.Response:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with AsyncClient(transport=httpx.MockTransport(handler)) as client:
        task = asyncio.create_task(client.chat("fake", "hi", token=token))
        await entered.wait()
        token.abort("stop")
        with pytest.raises(AbortError):
            await asyncio.wait_for(task, BOUND)
