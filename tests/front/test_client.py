"""How each call maps to a request, and each answer to a result. No socket: what is aborted is tested elsewhere."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from pydantic import BaseModel

from ollama_async import (
    AbortError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    ChatResponse,
    ConnectError,
    ConnectionBroken,
    ListResponse,
    Message,
    NotFoundError,
    OllamaError,
    ParseError,
    PermissionDeniedError,
    PhaseTimeout,
    ProcessResponse,
    ProtocolError,
    RateLimitError,
    RequestError,
    ResponseError,
    ServerBusyError,
    ServerError,
    ShowResponse,
    Stream,
    StreamClosed,
    StreamError,
    StreamTruncated,
    Timeouts,
)
from ollama_async._model.types import ResponseInfo

CHAT = {"model": "m", "created_at": "now", "message": {"role": "assistant", "content": "hi"}, "done": True}
GENERATED = {"model": "m", "response": "hi", "done": True, "context": [1, 2]}


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(base_url="http://127.0.0.1:11434", assert_all_called=False)


@pytest.fixture
async def client(router: respx.MockRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=httpx.MockTransport(router.async_handler)) as made:
        yield made


def sent(router: respx.MockRouter) -> Any:
    return json.loads(router.calls.last.request.content)


def ndjson(*frames: dict[str, Any]) -> httpx.Response:
    body = b"".join(json.dumps(frame).encode() + b"\n" for frame in frames)
    return httpx.Response(200, content=body, headers={"Content-Type": "application/x-ndjson"})


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ({}, {}),
        ({"messages": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}),
        ({"messages": [Message(role="user", content="a")]}, {"messages": [{"role": "user", "content": "a"}]}),
        (
            {"messages": [{"role": "user", "content": "", "extra": 1}]},
            {"messages": [{"role": "user", "content": "", "extra": 1}]},
        ),
        (
            {"messages": [{"role": "user", "content": "x", "images": [b"\xff\xfe", "aGk="]}]},
            {"messages": [{"role": "user", "content": "x", "images": ["//4=", "aGk="]}]},
        ),
        (
            {"messages": [{"role": "tool", "content": "1", "tool_name": "f", "tool_call_id": "call_1"}]},
            {"messages": [{"role": "tool", "content": "1", "tool_name": "f", "tool_call_id": "call_1"}]},
        ),
        ({"tools": [{"type": "function"}]}, {"tools": [{"type": "function"}]}),
        ({"think": False}, {"think": False}),
        ({"think": "high"}, {"think": "high"}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"format": "json"}, {"format": "json"}),
        ({"format": {"type": "object"}}, {"format": {"type": "object"}}),
        ({"options": {"num_ctx": 8, "new_one": None}}, {"options": {"num_ctx": 8, "new_one": None}}),
        ({"keep_alive": 0}, {"keep_alive": 0}),
        ({"keep_alive": "5m"}, {"keep_alive": "5m"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_chat(
    router: respx.MockRouter, client: AsyncClient, arguments: dict[str, Any], body: dict[str, Any], stream: bool
) -> None:
    router.post("/api/chat").mock(return_value=ndjson(CHAT))
    if stream:
        reply = await client.chat("m", **arguments, stream=True).collect()
    else:
        reply = await client.chat("m", **arguments)
    assert sent(router) == {"model": "m", "stream": stream, "messages": [], "tools": [], **body}
    assert (reply.message.content, reply.done, reply["message"]["role"]) == ("hi", True, "assistant")


@pytest.mark.parametrize(
    ("call", "method", "path", "body"),
    [
        (lambda c: c.copy("a", "b"), "POST", "/api/copy", {"source": "a", "destination": "b"}),
        (lambda c: c.delete("a"), "DELETE", "/api/delete", {"model": "a"}),
    ],
)
async def test_an_empty_answer_is_success(
    router: respx.MockRouter,
    client: AsyncClient,
    call: Callable[[AsyncClient], Awaitable[Any]],
    method: str,
    path: str,
    body: dict[str, Any],
) -> None:
    router.request(method, path).respond(200)
    assert (await call(client)).status == "success"
    assert sent(router) == body


async def test_create_blob_sends_the_file_under_its_digest(
    router: respx.MockRouter, client: AsyncClient, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest = "sha256:ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    route = router.post(f"/api/blobs/{digest}").respond(201)
    assert await client.create_blob(path) == digest
    request = route.calls.last.request
    assert request.headers["content-length"] == "7"
    assert "transfer-encoding" not in request.headers


@pytest.mark.parametrize(("status", "there"), [(200, True), (404, False)])
async def test_blob_exists(router: respx.MockRouter, client: AsyncClient, status: int, there: bool) -> None:
    digest = "sha256:" + "0a" * 32
    route = router.head(f"/api/blobs/{digest}").respond(status)
    assert await client.blob_exists(digest) is there
    assert route.called
    with pytest.raises(RequestError, match="hexadecimal"):
        await client.blob_exists("sha256:../../tags")


async def test_progress_is_a_stream_of_steps(router: respx.MockRouter, client: AsyncClient) -> None:
    steps = [{"status": "parsing GGUF"}, {"status": "x", "digest": "d", "total": 5, "completed": 2}]
    router.post("/api/create").mock(return_value=ndjson(*steps, {"status": "success"}))
    stream = client.create("m", from_="b", stream=True)
    assert [step.status async for step in stream] == ["parsing GGUF", "x", "success"]
    assert stream.outcome == "done"


async def test_chunks_are_merged(router: respx.MockRouter, client: AsyncClient) -> None:
    def part(**message: Any) -> dict[str, Any]:
        return {"model": "m", "message": {"role": "assistant", **message}, "done": False}

    call = {"id": "call_1", "function": {"name": "f", "arguments": {"error": 1}}}
    frames = [
        part(thinking="hm", content=""),
        part(thinking="m", content=""),
        {**part(content="a"), "logprobs": [{"token": "a", "logprob": -1.0}]},
        part(content="", tool_calls=[call]),
        {**part(content="b"), "logprobs": [{"token": "b", "logprob": -2.0}]},
        {**part(content="", tool_calls=[call]), "done": True, "done_reason": "stop", "eval_count": 4},
    ]
    router.post("/api/chat").mock(return_value=ndjson(*frames))
    stream = client.chat("m", "x", stream=True)
    merged = await stream.collect()
    assert (merged.message.content, merged.message.thinking, stream.text) == ("ab", "hmm", "ab")
    assert [tool.id for tool in merged.message.tool_calls or ()] == ["call_1", "call_1"]
    assert (merged.message.tool_calls or ())[0].function.arguments == {"error": 1}
    assert [probability.token for probability in merged.logprobs or ()] == ["a", "b"]
    assert (merged.done_reason, merged.eval_count, stream.timing.chunks) == ("stop", 4, 6)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ResponseError),
        (429, RateLimitError),
        (499, ResponseError),
        (500, ServerError),
        (502, ServerError),
        (503, ServerBusyError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_by_status(
    router: respx.MockRouter, client: AsyncClient, status: int, kind: type[ResponseError], stream: bool
) -> None:
    answer = {"error": "so it is", "signin_url": "https://ollama.com/connect"}
    router.post("/api/chat").respond(status, json=answer, headers={"X-Id": "7"})
    with pytest.raises(kind, match="so it is") as caught:
        await (client.chat("m", "x", stream=True).collect() if stream else client.chat("m", "x"))
    assert type(caught.value) is kind
    assert (caught.value.status_code, caught.value.error) == (status, "so it is")
    assert caught.value.signin_url == "https://ollama.com/connect"
    assert caught.value.headers["x-id"] == "7"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "Bad Gateway"),
        (b"<html><head><title>502 Bad &amp; Gateway</title></head>" + b"x" * 9999, "(HTML) 502 Bad & Gateway"),
        (b"<html>", "(HTML page without a title)"),
        (b"no route", "no route"),
        (b"y" * 5000, "y" * 500 + "..."),
        (b'{"error":{"message":"nested"}}', "nested"),
        (b'{"other":1}', '{"other":1}'),
        (b"[1]", "[1]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
async def test_error_bodies_that_are_not_ollamas(
    router: respx.MockRouter, client: AsyncClient, content: bytes, text: str
) -> None:
    router.get("/api/version").mock(
        return_value=httpx.Response(502, content=content, extensions={"reason_phrase": b"Bad Gateway"})
    )
    with pytest.raises(ServerError) as caught:
        await client.version()
    assert caught.value.error == text


@pytest.mark.parametrize(
    ("frame", "text", "code", "url"),
    [
        (b'{"error":"the runner died"}\n', "the runner died", -1, None),
        (b'{"StatusCode":503,"Status":"503 Busy","error":"busy"}', "busy", 503, None),
        (b'{"error":"unauthorized","signin_url":"https://o/c"}\n', "unauthorized", -1, "https://o/c"),
    ],
)
async def test_an_error_inside_a_stream_keeps_the_partial_answer(
    router: respx.MockRouter, client: AsyncClient, frame: bytes, text: str, code: int, url: str | None
) -> None:
    first = json.dumps({**CHAT, "done": False}).encode()
    router.post("/api/chat").respond(200, content=first + b"\n" + frame)
    stream = client.chat("m", "x", stream=True)
    for _ in range(2):  # the same each time it is read
        with pytest.raises(StreamError) as caught:
            await stream.collect()
        assert (caught.value.error, caught.value.status_code, caught.value.signin_url) == (text, code, url)
        assert caught.value.partial.message.content == "hi"
    assert stream.outcome == "error"
    assert isinstance(stream.reason, StreamError)


async def test_a_stream_without_its_end_is_truncated(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").mock(side_effect=lambda _: ndjson({**CHAT, "done": False}))
    stream = client.chat("m", "x", stream=True)
    assert (await stream.collect()).message.content == "hi"
    assert stream.outcome == "truncated"
    async with AsyncClient(transport=httpx.MockTransport(router.async_handler), strict=True) as strict:
        with pytest.raises(StreamTruncated) as caught:
            await strict.chat("m", "x", stream=True).collect()
        assert caught.value.partial.message.content == "hi"


async def test_an_empty_stream_has_nothing_to_return(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").respond(200)
    with pytest.raises(ProtocolError, match="empty"):
        await client.chat("m", "x", stream=True).collect()


async def test_headers_of_call_and_client(router: respx.MockRouter) -> None:
    router.get("/api/version").respond(json={"version": "1"})
    transport = httpx.MockTransport(router.async_handler)
    async with AsyncClient(transport=transport, headers={"User-Agent": "mine", "X-A": "1"}) as client:
        await client.version(headers={"X-A": "2", "Authorization": "Bearer k"})
        headers = router.calls.last.request.headers
        assert (headers["user-agent"], headers["x-a"], headers["authorization"]) == ("mine", "2", "Bearer k")
        assert headers["accept-encoding"] == "identity"
        await client.version()
        assert router.calls.last.request.headers["x-a"] == "1"
        assert "authorization" not in router.calls.last.request.headers


async def test_a_call_without_stream_is_a_coroutine(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").mock(return_value=ndjson(CHAT))
    call = client.chat("m", "x")
    assert inspect.iscoroutine(call)
    reply = await asyncio.create_task(call)
    assert isinstance(reply, ChatResponse)
    assert isinstance(client.chat("m", "x", stream=True), Stream)


async def test_nothing_is_sent_before_a_stream_is_used(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").mock(return_value=ndjson(CHAT))
    stream = client.chat("m", "x", stream=True)
    await asyncio.sleep(0)
    assert not router.calls
    assert (stream.outcome, stream.text, stream.response, stream.status_code) == (None, "", None, None)
    assert "not started" in repr(stream)
    async for _ in await stream:
        pass
    assert stream.status_code == 200
    assert stream.headers["content-type"] == "application/x-ndjson"


def test_options_of_the_connection_do_not_go_with_a_given_client() -> None:
    with pytest.raises(RequestError, match="http_client"):
        AsyncClient(http_client=httpx.AsyncClient(), proxy="http://p")


def test_a_proxy_does_not_go_with_a_given_transport() -> None:
    with pytest.raises(RequestError, match="transport="):
        AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200)), proxy="http://p")


def test_models_are_read_like_dicts() -> None:
    reply = ChatResponse.model_validate(CHAT)
    assert reply["model"] == "m"
    assert "created_at" in reply
    assert "eval_count" not in reply
    assert reply.get("eval_count") is None
    assert reply.get("absent", 5) == 5
    with pytest.raises(KeyError):
        reply["absent"]
    reply["model"] = "n"
    assert reply.model == "n"


def test_a_copy_knows_where_its_original_is_from() -> None:
    reply = ChatResponse.model_validate(CHAT)
    reply.set_response_info(ResponseInfo(201, [(b"x-test", b"1")], Copied))
    for other in (copy.copy(reply), copy.deepcopy(reply), reply.model_copy(), pickle.loads(pickle.dumps(reply))):
        assert other == reply
        assert other is not reply
        assert (other.status_code, other.headers["x-test"]) == (201, "1")
        with pytest.raises(ParseError, match="Copied"):
            other.parsed
    chunk = ChatResponse.model_validate(CHAT)
    assert pickle.loads(pickle.dumps(chunk)).status_code is None
    assert copy.copy(chunk).status_code is None


class Copied(BaseModel):
    number: int


ERRORS: list[OllamaError] = [
    AbortError("stopped", "partial"),
    AbortError(KeyError("why")),
    AbortError(),
    RequestError("wrong"),
    ConnectError("127.0.0.1:1: refused"),
    ConnectionBroken("cut", "partial"),
    PhaseTimeout("idle", 3, "partial"),
    ParseError("Model", "text", "partial"),
    NotFoundError("no model", 404),
    StreamClosed("closed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_pass_from_one_process_to_another(error: OllamaError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert repr(vars(other)) == repr(vars(error))
        assert repr(other.__cause__) == repr(error.__cause__)


def test_names_and_types_of_ollama_python() -> None:
    call = Message.ToolCall(function=Message.ToolCall.Function(name="add", arguments={"a": 1}))
    assert Message(role="assistant", tool_calls=[call]).tool_calls == [call]
    shown = ShowResponse.model_validate(
        {"model_info": {"general.architecture": "llama"}, "modified_at": "2026-01-02T03:04:05.123456789+02:00"}
    )
    assert shown.modelinfo == shown["modelinfo"] == shown.get("modelinfo") == {"general.architecture": "llama"}
    assert "modelinfo" in shown
    assert "modelinfo" not in shown.model_dump()
    assert shown.modified_at is not None
    assert shown.modified_at.isoformat() == "2026-01-02T03:04:05.123456+02:00"
    listed = ListResponse.Model.model_validate({"size": 2048, "modified_at": ""})
    assert (listed.size, listed.modified_at) == (2048, None)
    assert listed.size is not None
    assert listed.size.human_readable() == "2.0KiB"
    loaded = ProcessResponse.Model.model_validate({"expires_at": "2318-01-01T00:00:00Z", "size_vram": 1})
    assert loaded.expires_at is not None
    assert loaded.expires_at.year == 2318


@pytest.mark.parametrize(
    ("given", "compat", "meant"),
    [
        (httpx.Timeout(5, connect=1), False, Timeouts(connect=1, first_chunk=5, idle=5, total=None)),
        (httpx.Timeout(None), False, Timeouts.of(None)),
        (30, False, Timeouts(connect=10, first_chunk=None, idle=None, total=30)),
        (30, True, Timeouts(connect=30, first_chunk=30, idle=30, total=None)),
        (Timeouts(idle=1), True, Timeouts(idle=1)),
        (None, True, Timeouts.of(None)),
    ],
)
async def test_a_timeout_of_httpx(given: Any, compat: bool, meant: Timeouts) -> None:
    async with AsyncClient(timeout=given, compat=compat) as client:
        assert client._timeouts == meant


@pytest.mark.parametrize(
    "timeout",
    [True, 0, "5", httpx.Timeout(0), *(pytest.param(10**size, id=f"1e{size}") for size in (400, 5000))],
)
@pytest.mark.parametrize("compat", [False, True])
def test_an_invalid_timeout_is_refused(timeout: Any, compat: bool) -> None:
    with pytest.raises(RequestError, match="timeout"):
        AsyncClient(timeout=timeout, compat=compat)


def test_the_address_is_the_host_alone() -> None:
    with pytest.raises(RequestError, match="host"):
        AsyncClient(base_url="http://other")
