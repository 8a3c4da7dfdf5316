"""``ollama_async.interop``: ollama-python's interface over this library's engine, beside the original."""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.metadata
import inspect
import pickle
import socket
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from teardown.harness import BOUND, nothing_left_behind

import ollama_async
from ollama_async import AbortError, CancelToken, StreamClosed, Timeouts
from ollama_async.testing import Cut, FakeOllama, Reply, Reset, Stall

ollama = pytest.importorskip("ollama")
from ollama_async import interop  # noqa: E402  (it needs ollama-python)

ORIGINAL = interop._ORIGINAL
# `ollama._client` is the client of its functions, which hides the module.
THEIR_MODULE: Any = sys.modules["ollama._client"]
FILE = Path(__file__)
USER = [{"role": "user", "content": "hi"}]
STEPS = [
    {"status": "pulling"},
    {"status": "a part", "digest": "sha256:1", "total": 4, "completed": 2},
    {"status": "success"},
]
SYSTEM_ONE = {
    "model": "m",
    "answers": {"a": {"type": "noul", "noul": 0.5, "yes": 0.5}},
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return city


TOOL_CALL = {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
OPTIONS = {"options": ollama.Options(temperature=0), "keep_alive": "5m"}
# What each method is called with; the fake server answers those without a reply.
CALLS: dict[str, tuple[str, dict[str, Any], Reply | None]] = {
    "chat": (
        "/api/chat",
        {"model": "fake", "messages": [ollama.Message(role="user", content="x")], "tools": [weather], **OPTIONS},
        Reply.chat("a", "b", thinking=["t"], tool_calls=[TOOL_CALL]),
    ),
    "generate": ("/api/generate", {"model": "fake", "prompt": "x", "images": [b"i"], **OPTIONS}, Reply.generate("a")),
    "embed": ("/api/embed", {"model": "fake", "input": ["a", "b"]}, None),
    "embeddings": ("/api/embeddings", {"model": "fake", "prompt": "a"}, None),
    "pull": ("/api/pull", {"model": "fake"}, Reply(STEPS)),
    "push": ("/api/push", {"model": "fake", "insecure": True}, Reply(STEPS)),
    "create": ("/api/create", {"model": "new", "from_": "fake", "system": "s"}, Reply(STEPS)),
    "create_blob": ("", {"path": FILE}, None),
    "list": ("/api/tags", {}, None),
    "show": ("/api/show", {"model": "fake"}, None),
    "ps": ("/api/ps", {}, None),
    "copy": ("/api/copy", {"source": "fake", "destination": "b"}, Reply(status=200)),
    "delete": ("/api/delete", {"model": "fake"}, Reply(status=200)),
    "systemone": (
        "/v1/systemone",
        {"model": "fake", "state": "s", "questions": {"a": {"type": "noul", "instructions": "q"}}},
        Reply.json(SYSTEM_ONE),
    ),
}
ABROAD = {
    "web_search": ({"query": "q", "max_results": 2}, {"results": [{"title": "t", "url": "u", "content": "c"}]}),
    "web_fetch": ({"url": "https://example.com"}, {"title": "t", "content": "c", "links": ["l"]}),
}
STREAMS = ["chat", "generate", "pull", "push", "create"]
METHODS = [
    name for name, value in vars(ORIGINAL).items() if inspect.iscoroutinefunction(value) and not name.startswith("_")
]


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@asynccontextmanager
async def original(*args: Any) -> AsyncIterator[Any]:
    # Its oldest release has no close().
    client = ORIGINAL(*args)
    try:
        yield client
    finally:
        await client._client.aclose()


def streamed(client: Any, **options: Any) -> Any:
    return client.chat("fake", USER, stream=True, **options)


async def chunks_of(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


# -- the same as the original --


def test_every_method_of_the_installed_version_is_tried_here() -> None:
    assert set(METHODS) - {"close"} <= CALLS.keys() | ABROAD.keys()


async def test_it_is_the_class_that_others_check_for(server: FakeOllama) -> None:
    async with interop.AsyncClient(server.url) as client:
        assert isinstance(client, ORIGINAL)
        assert str(client._client.base_url).rstrip("/") == server.url
        assert "interop.AsyncClient" in repr(client)
        for name in METHODS:
            assert inspect.iscoroutinefunction(getattr(interop.AsyncClient, name)), name


@pytest.mark.parametrize(
    ("name", "stream"),
    [(name, False) for name in METHODS if name in CALLS] + [(name, True) for name in METHODS if name in STREAMS],
)
async def test_requests_and_answers_are_those_of_the_original(server: FakeOllama, name: str, stream: bool) -> None:
    path, arguments, reply = CALLS[name]
    if reply is not None and name in ("pull", "push", "create") and not stream:
        reply = Reply.json(STEPS[-1])
    if reply is not None:
        server.script(path, reply, always=True)
    if stream:
        arguments = {**arguments, "stream": True}
    answers = []
    async with original(server.url) as theirs, interop.AsyncClient(server.url) as ours:
        for client in (theirs, ours):
            answer = await getattr(client, name)(**arguments)
            answers.append(await chunks_of(answer) if stream else answer)
    first, second = server.requests
    assert (first.method, first.path) == (second.method, second.path)
    assert first.body == second.body or first.json() == second.json()
    # pydantic takes objects of two classes for different, also of a class and a subclass.
    assert answers[0] == answers[1]
    assert answers[0]


@pytest.mark.parametrize("name", [name for name in METHODS if name in ABROAD])
@respx.mock
async def test_calls_of_the_web_are_those_of_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "key")
    arguments, reply = ABROAD[name]
    route = respx.post(f"https://ollama.com/api/{name}").respond(json=reply)
    async with original() as theirs, interop.AsyncClient() as ours:
        answers = [await getattr(client, name)(**arguments) for client in (theirs, ours)]
    assert answers[0] == answers[1]
    first, second = (call.request for call in route.calls)
    assert httpx.Response(200, content=first.content).json() == httpx.Response(200, content=second.content).json()
    assert first.headers["Authorization"] == second.headers["Authorization"] == "Bearer key"


async def test_headers_go_with_each_request_and_none_is_left_out(server: FakeOllama) -> None:
    async with interop.AsyncClient(server.url, headers={"X-One": "1", "X-No": None}) as client:
        await client.list(headers={"X-Two": "2"})
        await client.list()
    first, second = server.requests
    assert (first.header("x-one"), first.header("x-two"), first.header("x-no")) == ("1", "2", None)
    assert (second.header("x-one"), second.header("x-two")) == ("1", None)


async def test_a_method_that_was_patched_on_the_original_is_called(
    server: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    wrapped = ORIGINAL.chat

    async def traced(self: Any, *args: Any, **arguments: Any) -> Any:
        seen.append(arguments["model"])
        return await wrapped(self, *args, **arguments)

    monkeypatch.setattr(ORIGINAL, "chat", traced)
    async with interop.AsyncClient(server.url) as client:
        await client.chat(model="fake", messages=USER)
    assert seen == ["fake"]


def test_the_signature_is_that_of_the_original_and_the_options_of_a_call() -> None:
    added = inspect.signature(interop.AsyncClient.chat).parameters.keys() - inspect.signature(ORIGINAL.chat).parameters
    assert added == {"token", "timeout", "headers", "retries"}


async def test_an_unknown_argument_is_refused_as_by_the_original(server: FakeOllama) -> None:
    async with interop.AsyncClient(server.url) as client:
        with pytest.raises(TypeError, match="unknown_thing"):
            await client.chat("fake", USER, unknown_thing=1)


# -- errors --


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ollama_async.BadRequestError),
        (401, ollama_async.AuthenticationError),
        (403, ollama_async.PermissionDeniedError),
        (404, ollama_async.NotFoundError),
        (409, ollama_async.ResponseError),
        (429, ollama_async.RateLimitError),
        (500, ollama_async.ServerError),
        (503, ollama_async.ServerBusyError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_status_is_theirs_and_ours(
    server: FakeOllama, status: int, kind: type[Exception], stream: bool
) -> None:
    server.script("/api/chat", Reply.error(status, "no"), always=True)
    async with original(server.url) as theirs, interop.AsyncClient(server.url) as ours:
        errors: list[Any] = []
        for client in (theirs, ours):
            with pytest.raises(ollama.ResponseError) as caught:
                answer = await client.chat("fake", USER, stream=stream)
                await chunks_of(answer)
            errors.append(caught.value)
    first, second = errors
    assert (first.error, first.status_code, str(first)) == (second.error, second.status_code, str(second))
    assert isinstance(second, kind)
    again = pickle.loads(pickle.dumps(second))
    assert (type(again), again.error, again.status_code) == (type(second), "no", status)


async def test_an_error_frame_is_theirs_and_has_the_partial_answer(server: FakeOllama) -> None:
    server.script("/api/chat", Reply([*Reply.chat("a", done=False).steps, {"error": "lost"}]))
    async with interop.AsyncClient(server.url) as client:
        with pytest.raises(ollama.ResponseError) as caught:
            await chunks_of(await streamed(client))
    assert (caught.value.error, caught.value.status_code) == ("lost", -1)
    assert isinstance(caught.value.partial, ollama.ChatResponse)
    assert caught.value.partial.message.content == "a"


@pytest.mark.parametrize("stream", [False, True])
async def test_no_server_is_a_connection_error_and_that_of_httpx(closed_port: int, stream: bool) -> None:
    async with interop.AsyncClient(f"127.0.0.1:{closed_port}") as client:
        with pytest.raises(ConnectionError) as caught:
            await chunks_of(await client.chat("fake", USER, stream=stream))
    assert isinstance(caught.value, httpx.ConnectError)
    assert str(caught.value) == THEIR_MODULE.CONNECTION_ERROR_MESSAGE
    with pytest.raises(RuntimeError, match="request"):
        caught.value.request  # as httpx says that there is none


@pytest.mark.parametrize("failure", [Cut(), Reset()])
async def test_a_broken_connection_is_a_transport_error_of_httpx(server: FakeOllama, failure: Any) -> None:
    server.script("/api/chat", Reply([*Reply.chat("a", done=False).steps, failure]))
    async with interop.AsyncClient(server.url) as client:
        with pytest.raises(httpx.TransportError) as caught:
            await chunks_of(await streamed(client))
    assert isinstance(caught.value, ollama_async.ConnectionBroken)
    assert caught.value.partial.message.content == "a"


@pytest.mark.parametrize(
    "error",
    [
        ollama_async.ConnectError("x"),
        ollama_async.ConnectionBroken("x"),
        ollama_async.PhaseTimeout("connect", 1),
        ollama_async.PhaseTimeout("upload", 1),
        ollama_async.PhaseTimeout("total", 1),
        ollama_async.RequestError("x"),
        ollama_async.ProtocolError("x"),
    ],
)
def test_a_translated_error_says_the_same_and_can_be_copied(error: Any) -> None:
    theirs = interop._theirs(error)
    assert isinstance(theirs, type(error))
    assert theirs is not error
    for made in (theirs, copy.copy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert (type(made), str(made), vars(made)) == (type(theirs), str(error), vars(error))


async def test_a_timeout_limits_each_silence_and_not_a_whole_answer(server: FakeOllama) -> None:
    texts = [str(number) for number in range(6)]
    server.script("/api/chat", Reply.chat(*texts, interval=0.1), Reply([Stall()]))
    async with interop.AsyncClient(server.url, timeout=0.3) as client:
        assert len(await chunks_of(await streamed(client))) == 7
        with pytest.raises(httpx.ReadTimeout) as caught:
            await chunks_of(await streamed(client))
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_of_one_call_is_for_the_whole_of_it(server: FakeOllama, stream: bool) -> None:
    server.script("/api/chat", Reply.endless_chat(0.01))
    async with interop.AsyncClient(server.url) as client:
        with pytest.raises(httpx.ReadTimeout) as caught:
            await chunks_of(await client.chat("fake", USER, stream=stream, timeout=0.2))
        assert isinstance(caught.value, ollama_async.PhaseTimeout)
        assert caught.value.phase == "total"
        assert server.requests[0].connection.wait_left(BOUND)


@pytest.mark.parametrize("timeout", [None, 5, (1, 2, 3, 4), httpx.Timeout(7), Timeouts(idle=9)])
async def test_a_timeout_is_taken_in_each_form_of_httpx(timeout: Any) -> None:
    async with interop.AsyncClient(timeout=timeout) as client:
        idle = {None: None, 5: 5, (1, 2, 3, 4): 2, httpx.Timeout: 7, Timeouts: 9}
        assert client._engine._timeouts.idle == idle[timeout if not hasattr(timeout, "connect") else type(timeout)]


async def test_an_answer_that_no_ollama_sends_is_a_value_error(server: FakeOllama) -> None:
    server.script("/api/chat", Reply([b"no json"]), Reply.json({"message": 5}), Reply([b"no json\n"]))
    async with interop.AsyncClient(server.url) as client:
        for stream in (False, False, True):
            with pytest.raises(ValueError, match="not") as caught:
                await chunks_of(await client.chat("fake", USER, stream=stream))
            assert isinstance(caught.value, ollama_async.ProtocolError)


async def test_wrong_options_are_a_request_error_of_both() -> None:
    with pytest.raises(ollama.RequestError) as caught:
        interop.AsyncClient(token=5)
    assert isinstance(caught.value, ollama_async.RequestError)
    async with interop.AsyncClient() as client:
        with pytest.raises(ollama.RequestError):
            await client.list(timeout=-1)
        with pytest.raises(ollama.RequestError):
            await client.chat("fake", USER, stream=True, token="x")
        with pytest.raises(FileNotFoundError):
            await client.create_blob("/no/such/file")


# -- stops --


@pytest.mark.parametrize("by", ["token", "client's token", "client", "stream"])
async def test_an_abort_closes_the_socket_before_it_returns(server: FakeOllama, by: str) -> None:
    server.script("/api/chat", Reply.endless_chat())
    token = CancelToken()
    async with nothing_left_behind():
        client = interop.AsyncClient(server.url, token=token if by == "client's token" else None)
        stream = await streamed(client, **({"token": token} if by == "token" else {}))
        first = await anext(stream)
        assert type(first) is ollama.ChatResponse
        {"client": client.abort, "stream": stream.abort}.get(by, token.abort)("enough")
        connection = server.requests[0].connection
        # It blocks the loop: the socket has been closed already.
        assert connection.wait_left(BOUND)
        assert connection.bytes_after_left == 0
        with pytest.raises(AbortError) as caught:
            await anext(stream)
        assert caught.value.reason == "enough"
        assert isinstance(caught.value.partial, ollama.ChatResponse)
        assert caught.value.partial.message.content.startswith(first.message.content)
        assert stream.outcome == "aborted"
        await client.close()


async def test_an_abort_ends_a_plain_call(server: FakeOllama) -> None:
    server.script("/api/chat", Reply(before_head=[Stall()]))
    async with nothing_left_behind():
        client, token = interop.AsyncClient(server.url), CancelToken()
        task = asyncio.ensure_future(client.chat("fake", USER, token=token))
        await asyncio.to_thread(server.wait_for_requests, 1)
        token.abort("enough")
        assert server.requests[0].connection.wait_left(BOUND)
        with pytest.raises(AbortError, match="enough"):
            await task
        await client.close()


async def test_a_token_of_one_call_leaves_the_others_alone(server: FakeOllama) -> None:
    async with interop.AsyncClient(server.url) as client:
        aborted = CancelToken()
        aborted.abort()
        results = await asyncio.gather(client.list(token=aborted), client.list(), return_exceptions=True)
    assert isinstance(results[0], AbortError)
    assert isinstance(results[1], ollama.ListResponse)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("delay", range(4))
async def test_a_task_that_is_cancelled_leaves_nothing_open(server: FakeOllama, times: int, delay: int) -> None:
    server.script("/api/chat", Reply.endless_chat())
    async with nothing_left_behind():
        client = interop.AsyncClient(server.url)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in await streamed(client):
                begun.set()

        task = asyncio.ensure_future(read())
        await asyncio.wait_for(begun.wait(), BOUND)
        for _ in range(times):
            task.cancel()
            for _ in range(delay):
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.requests[0].connection.wait_left(BOUND)
        await client.close()


async def test_a_step_that_is_cancelled_before_it_begins_closes_the_stream(server: FakeOllama) -> None:
    server.script("/api/chat", Reply.endless_chat())
    async with nothing_left_behind():
        client = interop.AsyncClient(server.url)
        stream = await streamed(client)
        await anext(stream)
        step = asyncio.ensure_future(anext(stream))
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert server.requests[0].connection.wait_left(BOUND)
        with pytest.raises(StreamClosed):
            await anext(stream)
        await client.close()


async def test_break_closes_the_connection_before_the_next_statement_also_if_the_stream_is_kept(
    server: FakeOllama,
) -> None:
    server.script("/api/chat", Reply.endless_chat())
    async with nothing_left_behind():
        client = interop.AsyncClient(server.url)
        kept = await streamed(client)
        async for _ in kept:
            break
        assert server.requests[0].connection.wait_left(BOUND)
        assert kept.outcome == "closed"
        await client.close()


async def test_a_stream_merges_what_arrives(server: FakeOllama) -> None:
    server.script("/api/chat", CALLS["chat"][2], always=True)  # type: ignore[arg-type]
    async with interop.AsyncClient(server.url) as client:
        answer = await (await streamed(client)).collect()
        assert type(answer) is ollama.ChatResponse
        assert (answer.message.content, answer.message.thinking, answer.done) == ("ab", "t", True)
        assert answer.message.tool_calls == [ollama.Message.ToolCall(**TOOL_CALL)]
        whole = await (await client.generate("fake", "x", stream=True)).collect()
        assert type(whole) is ollama.GenerateResponse
        assert whole.response == (await client.generate("fake", "x")).response
        server.script("/api/pull", Reply(STEPS))
        steps = await client.pull("fake", stream=True)
        assert await steps.collect() == ollama.ProgressResponse(status="success")
        assert steps.outcome == "done"


async def test_clients_that_are_dropped_leave_no_connection(server: FakeOllama) -> None:
    async with nothing_left_behind():
        for _ in range(3):
            await interop.AsyncClient(server.url).list()


# -- in the place of the original --


@pytest.fixture
def program() -> Iterator[types.ModuleType]:
    """A module that has imported the class."""
    module = types.ModuleType("a_program")
    vars(module).update(AsyncClient=ORIGINAL, OllamaAsyncClient=ORIGINAL, kept=ORIGINAL, Client=ollama.Client)
    sys.modules["a_program"] = module
    yield module
    interop.uninstall()
    del sys.modules["a_program"]


def test_install_changes_every_name_and_uninstall_takes_them_back(program: Any) -> None:
    synchronous = ollama.Client
    names = interop.install()
    assert names == (
        "a_program.AsyncClient",
        "a_program.OllamaAsyncClient",
        "ollama.AsyncClient",
        "ollama._client.AsyncClient",
    )
    assert ollama.AsyncClient is THEIR_MODULE.AsyncClient is program.AsyncClient is interop.AsyncClient
    assert program.OllamaAsyncClient is interop.AsyncClient
    assert program.kept is ORIGINAL
    assert ollama.Client is THEIR_MODULE.Client is program.Client is synchronous
    assert interop.install() == ()
    assert interop.uninstall() == names
    assert ollama.AsyncClient is THEIR_MODULE.AsyncClient is program.AsyncClient is ORIGINAL
    assert interop.AsyncClient is not ORIGINAL
    assert interop.uninstall() == ()


def test_a_name_that_was_bound_meanwhile_is_taken_back_and_one_that_was_meant_is_not(program: Any) -> None:
    program.MyClient = interop.AsyncClient
    with interop.installed():
        program.LateClient = ollama.AsyncClient
    assert program.LateClient is ORIGINAL
    assert program.MyClient is interop.AsyncClient


def test_an_inner_block_changes_nothing(program: Any) -> None:
    with interop.installed() as outer:
        assert "ollama.AsyncClient" in outer
        with interop.installed() as inner:
            assert inner == ()
        assert ollama.AsyncClient is interop.AsyncClient
    assert ollama.AsyncClient is ORIGINAL
    with pytest.raises(KeyError), interop.installed():
        raise KeyError
    assert ollama.AsyncClient is ORIGINAL


def test_the_synchronous_client_works_beside_it(server: FakeOllama) -> None:
    with interop.installed():
        client = ollama.Client(server.url)
        assert client.chat("fake", USER).message.content
        client._client.close()


# -- versions --


@pytest.mark.parametrize(
    ("module", "package", "needs"),
    [("interop", "ollama", r"ollama 0\.6"), ("telemetry", "opentelemetry-api", r"opentelemetry-api 1\.31")],
)
@pytest.mark.parametrize("version", ["0.5.4", "0.4", "0"])
def test_a_version_that_is_too_old_is_named(
    module: str, package: str, needs: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {package: version}.__getitem__)
    monkeypatch.delitem(sys.modules, f"ollama_async.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"{needs} or newer, {version} is installed: pip install --upgrade 'ollama-"):
        importlib.import_module(f"ollama_async.{module}")


def test_an_unknown_version_is_named() -> None:
    with pytest.raises(ImportError, match=r"ollama-python 9\.0: its AsyncClient has no _request\(\)"):
        interop._check_methods("9.0", object)
    interop._check_methods(importlib.metadata.version("ollama"), ORIGINAL)


@pytest.mark.parametrize(
    ("module", "missing", "said"),
    [
        ("interop", "ollama", 'needs ollama-python; install it with: pip install "ollama-async[interop]"'),
        ("telemetry", "opentelemetry", 'needs opentelemetry; install it with: pip install "ollama-async[otel]"'),
    ],
)
def test_without_its_package_a_module_says_what_to_install(module: str, missing: str, said: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\nimport ollama_async, ollama_async.{module}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert f"ImportError: ollama_async.{module} {said}" in run.stderr
