"""``DirectTransport`` under httpx2 and the clients that are made on it; a Stop that no retry undoes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import httpx2
import openai
import pytest
import stamina
import tenacity
from teardown.harness import BOUND, nothing_left_behind

import ollama_async
from ollama_async import AbortError, AsyncClient, CancelToken, RequestError
from ollama_async.httpx2 import DirectTransport
from ollama_async.testing import Endless, FakeOllama, Raw, Reply, Reset, Stall
from ollama_async.testing._script import chat_frame

URL = "/x"
V1 = "/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'

# Before the head, and in the middle of the body.
SILENT = Reply(before_head=[Stall()])
FLOWING = Reply([Raw(EVENT), Stall()], raw=HEAD)


@pytest.fixture(params=[DirectTransport, ollama_async.DirectTransport], ids=["httpx2's", "httpx's"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_an_answer_and_its_stream_are_of_httpx2(fake_ollama: FakeOllama, kind: Any) -> None:
    fake_ollama.script(URL, Reply([b"hello"]), always=True)

    async def upload() -> Any:
        yield b"ab"

    async with nothing_left_behind(), httpx2.AsyncClient(transport=kind(), base_url=fake_ollama.url) as http:
        answer = await http.post(URL, content=b"body")
        assert isinstance(answer, httpx2.Response)
        assert answer.text == "hello"
        async with http.stream("POST", URL, content=upload()) as answer:
            assert [block async for block in answer.aiter_raw()] == [b"hello"]
    assert [request.body for request in fake_ollama.requests] == [b"body", b"ab"]


ERRORS: dict[str, tuple[Reply, type[Exception]]] = {
    "silence": (SILENT, httpx2.ReadTimeout),
    "silence in the body": (FLOWING, httpx2.ReadTimeout),
    "reset": (Reply(before_head=[Reset()]), httpx2.ReadError),
    "not HTTP": (Reply(raw=b"garbage\r\n\r\n"), httpx2.RemoteProtocolError),
    "an endless page that leads on": (
        Reply([Endless(lambda _: b"x" * 65536)], status=302, headers={"Location": "/y"}),
        httpx2.RemoteProtocolError,
    ),
}


@pytest.mark.parametrize("what", ERRORS)
async def test_errors_and_timeouts_are_of_httpx2(fake_ollama: FakeOllama, what: str, kind: Any) -> None:
    reply, error = ERRORS[what]
    fake_ollama.script(URL, reply, always=True)
    limits = httpx2.Timeout(BOUND, read=0.05 if "silence" in what else BOUND)
    async with (
        nothing_left_behind(),
        httpx2.AsyncClient(transport=kind(), base_url=fake_ollama.url, timeout=limits, follow_redirects=True) as http,
    ):
        with pytest.raises(error):
            await http.get(URL)


async def test_a_connection_that_cannot_be_made_is_httpx2s_error() -> None:
    async with httpx2.AsyncClient(transport=DirectTransport()) as http:
        with pytest.raises(httpx2.ConnectError, match="cannot connect"):
            await http.get("http://127.0.0.1:1/")
        with pytest.raises(httpx2.UnsupportedProtocol):
            await http.get("ftp://127.0.0.1/")


async def test_leaving_a_stream_of_httpx2_closes_its_connection_at_once(fake_ollama: FakeOllama, kind: Any) -> None:
    fake_ollama.script(URL, FLOWING)
    async with httpx2.AsyncClient(transport=kind(), base_url=fake_ollama.url) as http:
        answer = await http.send(http.build_request("GET", URL), stream=True)
        async for _ in answer.aiter_raw():
            break
        assert fake_ollama.connections[0].wait_left(BOUND)


STOPS: dict[str, Callable[[Any, CancelToken], object]] = {
    "token": lambda _, token: token.abort("enough"),
    "transport": lambda transport, _: transport.abort("enough"),
}


@pytest.mark.parametrize("package", [httpx, httpx2], ids=["httpx", "httpx2"])
@pytest.mark.parametrize("reply", [SILENT, FLOWING], ids=["before the head", "in the body"])
@pytest.mark.parametrize("stop", STOPS)
async def test_a_stop_from_another_thread_ends_all_that_is_on_a_transport(
    fake_ollama: FakeOllama, package: Any, reply: Reply, stop: str
) -> None:
    fake_ollama.script(URL, reply, always=True)
    token = CancelToken()
    made = ollama_async.DirectTransport if package is httpx else DirectTransport
    async with nothing_left_behind():
        transport = made(token=token)
        async with package.AsyncClient(transport=transport, base_url=fake_ollama.url, timeout=None) as http:
            calls = [asyncio.ensure_future(http.get(URL)) for _ in range(3)]
            await asyncio.to_thread(fake_ollama.wait_for_requests, 3)
            await asyncio.to_thread(STOPS[stop], transport, token)
            # The loop has not run since.
            assert all(connection.wait_left(BOUND) for connection in fake_ollama.connections)
            for call in calls:
                with pytest.raises(AbortError) as caught:
                    await call
                assert caught.value.reason == "enough"
            if stop == "token":
                with pytest.raises(AbortError):
                    await http.get(URL)
                assert len(fake_ollama.requests) == 3
            assert not token._registrations


async def test_a_transport_that_was_aborted_serves_the_next_request(fake_ollama: FakeOllama) -> None:
    async with httpx2.AsyncClient(transport=(transport := DirectTransport()), base_url=fake_ollama.url) as http:
        transport.abort()
        assert (await http.get("/api/version")).status_code == 200
        assert not any(token._registrations for token in transport.tokens)


@pytest.mark.parametrize("lent", [False, True], ids=["transport=", "http_client="])
async def test_a_stop_of_a_transport_reaches_the_calls_of_our_client(fake_ollama: FakeOllama, lent: bool) -> None:
    fake_ollama.script("/api/chat", Reply([chat_frame(0, "m", content="a"), Stall()]), always=True)
    async with nothing_left_behind():
        transport = DirectTransport() if lent else ollama_async.DirectTransport()
        options: Any = {"http_client": httpx2.AsyncClient(transport=transport)} if lent else {"transport": transport}
        async with AsyncClient(fake_ollama.url, **options) as client:
            with pytest.raises(AbortError, match="enough") as caught:
                async for _ in client.chat("m", "x", stream=True):
                    await asyncio.to_thread(transport.abort, "enough")
            assert caught.value.partial.message.content == "a"
        await transport.aclose()


def test_a_transport_of_httpx2_is_refused_with_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"http_client=httpx2\.AsyncClient"):
        AsyncClient(transport=httpx2.AsyncHTTPTransport())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="give a CancelToken"):
        DirectTransport(token="x")  # type: ignore[arg-type]


def test_without_httpx2_the_module_says_what_it_needs() -> None:
    program = (
        "import sys; sys.modules['httpx2'] = None\n"
        "import ollama_async; ollama_async.DirectTransport()\n"
        "try:\n    import ollama_async.httpx2\nexcept ImportError as exc:\n    print(exc)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "ollama_async.httpx2 needs httpx2; install it with: pip install httpx2"


# -- a clean-up that a second cancellation interrupts --


async def careless(http: httpx2.AsyncClient, held: list[httpx2.Response]) -> None:
    """Read an answer, and close it too late."""
    held.append(await http.send(http.build_request("POST", URL), stream=True))
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        await held[0].aclose()


@pytest.mark.parametrize(("close_on_cancel", "left"), [(True, True), (False, False)])
async def test_a_task_that_is_cancelled_twice_leaves_its_answer_open(
    fake_ollama: FakeOllama, kind: Any, close_on_cancel: bool, left: bool
) -> None:
    fake_ollama.script(URL, FLOWING, always=True)
    held: list[httpx2.Response] = []
    async with nothing_left_behind():
        transport = kind(close_on_cancel=close_on_cancel)
        async with httpx2.AsyncClient(transport=transport, base_url=fake_ollama.url) as http:
            task = asyncio.create_task(careless(http, held))
            while not held:
                await asyncio.sleep(0)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([task], timeout=BOUND)
            assert task.cancelled()
            assert await asyncio.to_thread(fake_ollama.connections[0].wait_left, BOUND if left else 0.2) is left
            held.clear()


async def test_an_answer_that_its_task_hands_on_stays_open(fake_ollama: FakeOllama, kind: Any) -> None:
    fake_ollama.script(URL, FLOWING, always=True)
    transport = kind(close_on_cancel=True)
    async with nothing_left_behind(), httpx2.AsyncClient(transport=transport, base_url=fake_ollama.url) as http:
        answer = await asyncio.create_task(http.send(http.build_request("POST", URL), stream=True))
        await asyncio.sleep(0)
        assert await anext(answer.aiter_raw()) == EVENT


async def test_a_task_of_many_requests_is_left_by_each(fake_ollama: FakeOllama, kind: Any) -> None:
    fake_ollama.script(URL, Reply([b"hello"]), always=True)
    task: Any = asyncio.current_task()
    before = len(task._callbacks or ())
    transport = kind(close_on_cancel=True)
    async with nothing_left_behind(), httpx2.AsyncClient(transport=transport, base_url=fake_ollama.url) as http:
        for _ in range(3):
            await http.post(URL)
        fake_ollama.script(URL, FLOWING, always=True)
        async with http.stream("POST", URL):
            assert len(task._callbacks) == before + 1
    assert len(task._callbacks or ()) == before


# -- Stop and retries --


def openai_over(server: FakeOllama, transport: Any) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=transport, timeout=BOUND)
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="k", http_client=http)


@pytest.mark.parametrize("reply", [SILENT, FLOWING], ids=["before the head", "in the body"])
@pytest.mark.parametrize("stop", STOPS)
async def test_openai_does_not_retry_what_was_aborted(fake_ollama: FakeOllama, reply: Reply, stop: str) -> None:
    fake_ollama.script(V1, reply, always=True)
    token = CancelToken()
    transport = DirectTransport(token=token)

    async def ask(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        async for _ in stream:
            pass

    async with nothing_left_behind(), openai_over(fake_ollama, transport) as client:
        asked = asyncio.ensure_future(ask(client))
        await asyncio.to_thread(fake_ollama.wait_for_requests, 1)
        STOPS[stop](transport, token)
        with pytest.raises(AbortError, match="enough"):
            await asyncio.wait_for(asked, BOUND)
        assert len(fake_ollama.requests) == 1


async def test_openai_retries_what_httpx2_would(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(V1, Reply(before_head=[Reset()]), always=True)
    async with openai_over(fake_ollama, DirectTransport()) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.with_options(max_retries=1).chat.completions.create(model="m", messages=[])
    assert len(fake_ollama.requests) == 2


async def with_tenacity(call: Callable[[], Awaitable[Any]]) -> Any:
    wrapped = tenacity.retry(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(3600), reraise=True)
    return await wrapped(call)()


async def with_tenacity_at_once(call: Callable[[], Awaitable[Any]]) -> Any:
    return await tenacity.retry(stop=tenacity.stop_after_attempt(5), reraise=True)(call)()


async def with_stamina(call: Callable[[], Awaitable[Any]]) -> Any:
    wrapped = stamina.retry(on=Exception, attempts=5, timeout=None, wait_initial=3600, wait_max=3600)
    return await wrapped(call)()


# A scope acts in the next rounds of the loop; each test of one that does not would wait for this long.
SCOPE_BOUND = 5.0
WRAPPERS = [with_tenacity, with_tenacity_at_once, with_stamina]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("way", ["client.abort()", "client's token", "token.scope()"])
async def test_no_wrapper_retries_under_a_scope(fake_ollama: FakeOllama, wrapper: Any, way: str) -> None:
    fake_ollama.script("/api/chat", Reply(before_head=[Stall()]), always=True)
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, token=token) as client:
        # As `async def`: tenacity would take a lambda for a synchronous function, and retry nothing.
        async def call() -> Any:
            return await client.chat("m", "x")

        async def ask() -> None:
            with token.scope() if way == "token.scope()" else client.scope():
                await wrapper(call)

        asked = asyncio.ensure_future(ask())
        await asyncio.to_thread(fake_ollama.wait_for_requests, 1)
        client.abort("enough") if way == "client.abort()" else token.abort("enough")
        with pytest.raises(AbortError, match="enough"):
            await asyncio.wait_for(asked, SCOPE_BOUND)
        assert len(fake_ollama.requests) == 1
        assert asked.cancelling() == 0
        assert not token._registrations


async def test_an_abort_of_the_transport_ends_its_scope(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(URL, Reply(before_head=[Stall()]), always=True)
    async with httpx2.AsyncClient(transport=(transport := DirectTransport()), base_url=fake_ollama.url) as http:

        async def call() -> Any:
            return await http.get(URL)

        async def ask() -> None:
            with transport.scope():
                await with_tenacity_at_once(call)

        asked = asyncio.ensure_future(ask())
        await asyncio.to_thread(fake_ollama.wait_for_requests, 1)
        transport.abort("enough")
        with pytest.raises(AbortError, match="enough"):
            await asyncio.wait_for(asked, SCOPE_BOUND)
    assert len(fake_ollama.requests) == 1
