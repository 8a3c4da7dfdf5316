"""Every endpoint: what each parameter puts on the wire, and what becomes of each bad parameter and bad answer.

One table says what there is to call. A parameter or an endpoint that is not in it fails a test.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import ssl
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import respx
from pydantic import BaseModel
from teardown.harness import BOUND, nothing_left_behind, until

from ollama_async import (
    AbortError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    ConnectError,
    ConnectionBroken,
    NotFoundError,
    OllamaError,
    Options,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RequestError,
    ResponseError,
    ServerBusyError,
    ServerError,
    StreamBusy,
    StreamClosed,
    StreamError,
    SystemOneNoulQuestion,
)
from ollama_async.testing import Cut, FakeOllama, Raw, Reply, Reset, Stall

FILE = Path(__file__)
DIGEST = "sha256:" + "0a" * 32
USER = {"role": "user", "content": "hi"}
STEP = {"status": "success"}
# What goes wrong with nearly every kind of value.
NO_TEXT, NO_FLAG, NO_NUMBER, NO_MAPPING = (5, b"x", ["a"]), (1, "yes"), (True, "1", 1.5), (5, "a", [1])
NO_OPTIONS = (5, "seed=1", {"seed": object()})
NO_KEEP_ALIVE = (object(), "soon", float("nan"), True, [1])


class Country(BaseModel):
    """A form of an answer."""

    name: str


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return city


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Sent:
    """Values of a parameter: those that go, each with the fields of the body that it makes, and those that do not."""

    good: list[tuple[Any, dict[str, Any]]]
    bad: tuple[Any, ...]


def as_it_is(name: str, bad: tuple[Any, ...], *values: Any, field: str = "") -> Sent:
    return Sent([(value, {field or name: value}) for value in values], bad)


def flag(name: str) -> Sent:
    return as_it_is(name, NO_FLAG, True, False)


def text(name: str) -> Sent:
    return as_it_is(name, NO_TEXT, "text")


def number(name: str) -> Sent:
    return as_it_is(name, NO_NUMBER, 0, 7)


OPTIONS = Sent(
    [
        ({"seed": 1, "new": [1]}, {"options": {"seed": 1, "new": [1]}}),
        (Options(num_ctx=8), {"options": {"num_ctx": 8}}),
        ({"stop": "end"}, {"options": {"stop": ["end"]}}),
    ],
    NO_OPTIONS,
)
KEEP_ALIVE = Sent(
    [
        (0, {"keep_alive": 0}),
        (-1, {"keep_alive": -1}),
        ("5m", {"keep_alive": "5m"}),
        (timedelta(minutes=1), {"keep_alive": 60.0}),
    ],
    NO_KEEP_ALIVE,
)
MODEL = Sent([("other", {"model": "other"})], (None, 5, "", b"m"))
FORMAT = Sent(
    [
        ("json", {"format": "json"}),
        ({"type": "object"}, {"format": {"type": "object"}}),
        (Country, {"format": Country.model_json_schema()}),
    ],
    (object(), 5, [1], int),
)
THINK = Sent([(value, {"think": value}) for value in (True, False, "high")], (5, [1], object()))
IMAGES = Sent([([b"a", "Yg=="], {"images": ["YQ==", "Yg=="]})], (5, [5], "a.png", ["/no/such.png"]))
MESSAGES = Sent(
    [("hi", {"messages": [USER]}), ([USER, {**USER, "new": 1}], {"messages": [USER, {**USER, "new": 1}]})],
    (5, b"hi", USER, [5], [{}], [{"role": "user", "content": 5}], [{"role": "user", "images": [5]}]),
)
STREAM = Sent([], (1, "yes", None))
ANSWERING = {"options": OPTIONS, "keep_alive": KEEP_ALIVE, "format": FORMAT, "think": THINK, "stream": STREAM} | {
    "truncate": flag("truncate"),
    "shift": flag("shift"),
    "logprobs": flag("logprobs"),
    "top_logprobs": number("top_logprobs"),
    "debug_render_only": as_it_is("debug_render_only", NO_FLAG, True, field="_debug_render_only"),
}
OF_MODELS = {"model": MODEL, "insecure": flag("insecure"), "stream": STREAM}


@dataclass(frozen=True)
class Endpoint:
    """A call: the least that it needs, the route and body which that makes, an answer, and all its parameters."""

    name: str
    route: str
    least: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | bytes | None = None
    answer: Any = field(default_factory=dict)
    parameters: dict[str, Sent] = field(default_factory=dict)
    wrong_type: bytes | None = None  # an answer with a field of another type; None where the answer is not read
    of: str = ""  # the call's method, where that is not its name

    @property
    def method(self) -> str:
        return self.route.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.route.partition(" ")[2]

    @property
    def streams(self) -> bool:
        return "stream" in self.parameters

    def call(self, client: AsyncClient, **given: Any) -> Any:
        return getattr(client, self.of or self.name)(**{**self.least, **given})


BAD_STEP = b'{"status":5}'
ENDPOINTS = [
    Endpoint(
        "chat",
        "POST /api/chat",
        {"model": "m"},
        {"model": "m", "messages": [], "tools": []},
        {"model": "m", "message": USER, "done": True},
        ANSWERING
        | {
            "model": MODEL,
            "messages": MESSAGES,
            "tools": Sent(
                [([weather], {"tools": [WEATHER]}), ([{"type": "web"}], {"tools": [{"type": "web"}]})],
                (5, "weather", [object()], [5]),
            ),
        },
        b'{"model":"m","message":{"role":"assistant","content":5},"done":true}',
    ),
    Endpoint(
        "generate",
        "POST /api/generate",
        {"model": "m"},
        {"model": "m"},
        {"model": "m", "response": "hi", "done": True},
        ANSWERING
        | {"model": MODEL, "images": IMAGES, "raw": flag("raw")}
        | {name: text(name) for name in ("prompt", "suffix", "system", "template")}
        | {name: number(name) for name in ("width", "height", "steps")}
        | {"context": as_it_is("context", (5, "1", ["1"], [True]), [1, 2])},
        b'{"model":"m","response":5,"done":true}',
    ),
    Endpoint(
        "embed",
        "POST /api/embed",
        {"model": "m", "input": "a"},
        {"model": "m", "input": "a"},
        {"embeddings": [[1.0]]},
        {"model": MODEL, "options": OPTIONS, "keep_alive": KEEP_ALIVE}
        | {"truncate": flag("truncate"), "dimensions": number("dimensions")}
        | {"input": as_it_is("input", (5, b"a", [5], {"a": 1}), "b", ["b", "c"])},
        b'{"embeddings":5}',
    ),
    Endpoint(
        "embeddings",
        "POST /api/embeddings",
        {"model": "m", "prompt": "a"},
        {"model": "m", "prompt": "a"},
        {"embedding": [1.0]},
        {"model": MODEL, "prompt": text("prompt"), "options": OPTIONS, "keep_alive": KEEP_ALIVE},
        b'{"embedding":5}',
    ),
    Endpoint(
        "systemone",
        "POST /v1/systemone",
        {"model": "m", "state": "s", "questions": {"q": {"type": "noul", "instructions": "?"}}},
        {"model": "m", "state": "s", "questions": {"q": {"type": "noul", "instructions": "?"}}},
        {
            "model": "m",
            "answers": {"q": {"type": "noul", "noul": 0.5, "confidence": 1.0}},
            "usage": {"input_tokens": 1, "output_tokens": 1},
        },
        {
            "model": MODEL,
            "keep_alive": KEEP_ALIVE,
            "state": as_it_is("state", (object(),), "text", {"a": [1]}),
            "questions": Sent(
                [
                    (
                        {"a": SystemOneNoulQuestion(type="noul", instructions="?")},
                        {"questions": {"a": {"type": "noul", "instructions": "?"}}},
                    )
                ],
                (5, {"q": 5}, {"q": {"type": "other"}}),
            ),
        },
        b'{"answers":5}',
    ),
    Endpoint(
        "load",
        "POST /api/generate",
        {"model": "m"},
        {"model": "m"},
        {"done": True},
        {"model": MODEL, "keep_alive": KEEP_ALIVE, "options": OPTIONS},
        b'{"done":"x"}',
    ),
    Endpoint(
        "unload",
        "POST /api/generate",
        {"model": "m"},
        {"model": "m", "keep_alive": 0},
        {"done": True},
        {"model": MODEL},
        b'{"done":"x"}',
    ),
    Endpoint("list", "GET /api/tags", answer={"models": [{"name": "m"}]}, wrong_type=b'{"models":5}'),
    Endpoint("ps", "GET /api/ps", answer={"models": [{"name": "m"}]}, wrong_type=b'{"models":5}'),
    Endpoint("version", "GET /api/version", answer={"version": "1"}, wrong_type=b'{"version":5}'),
    Endpoint(
        "status", "GET /api/status", answer={"cloud": {"disabled": True, "source": "env"}}, wrong_type=b'{"cloud":5}'
    ),
    Endpoint(
        "recommendations",
        "GET /api/experimental/model-recommendations",
        answer={"recommendations": [{"model": "m"}]},
        wrong_type=b'{"recommendations":5}',
    ),
    Endpoint("whoami", "POST /api/me", answer={"name": "me"}, wrong_type=b'{"name":5}'),
    Endpoint("signout", "POST /api/signout", answer=None),
    Endpoint(
        "show",
        "POST /api/show",
        {"model": "m"},
        {"model": "m"},
        {"template": "t"},
        {"model": MODEL, "options": OPTIONS, "verbose": flag("verbose")}
        | {name: text(name) for name in ("system", "template")},
        b'{"template":5}',
    ),
    Endpoint(
        "copy",
        "POST /api/copy",
        {"source": "a", "destination": "b"},
        {"source": "a", "destination": "b"},
        parameters={name: as_it_is(name, (None, 5, ""), "c") for name in ("source", "destination")},
    ),
    Endpoint("delete", "DELETE /api/delete", {"model": "m"}, {"model": "m"}, parameters={"model": MODEL}),
    Endpoint(
        "create",
        "POST /api/create",
        {"model": "m"},
        {"model": "m"},
        STEP,
        {
            "model": MODEL,
            "stream": STREAM,
            "from_": as_it_is("from_", (5, ""), "b", field="from"),
            "messages": Sent([([USER], {"messages": [USER]})], MESSAGES.bad),
            "license": as_it_is("license", (5, [5]), "l", ["l", "k"]),
            "parameters": Sent([({"seed": 1}, {"parameters": {"seed": 1}})], NO_OPTIONS),
        }
        | {name: as_it_is(name, NO_MAPPING, {"f": DIGEST}) for name in ("files", "adapters", "draft_files", "info")}
        | {name: text(name) for name in ("quantize", "template", "system", "renderer", "parser", "requires")}
        | {name: text(name) for name in ("remote_host", "draft_quantize")},
        BAD_STEP,
    ),
    Endpoint(
        "pull",
        "POST /api/pull",
        {"model": "m"},
        {"model": "m", "insecure": False},
        STEP,
        OF_MODELS | {"resume": Sent([(True, {"stream": True})], NO_FLAG)},
        BAD_STEP,
    ),
    Endpoint("push", "POST /api/push", {"model": "m"}, {"model": "m", "insecure": False}, STEP, OF_MODELS, BAD_STEP),
    Endpoint(
        "web_search",
        "POST /api/experimental/web_search",
        {"query": "q", "via_server": True},
        {"query": "q", "max_results": 3},
        {"results": [{"title": "t"}]},
        {
            "query": Sent([("other", {"query": "other"})], (None, *NO_TEXT)),
            "max_results": number("max_results"),
            "via_server": Sent([], NO_FLAG),
        },
        b'{"results":5}',
    ),
    Endpoint(
        "web_fetch",
        "POST /api/experimental/web_fetch",
        {"url": "u", "via_server": True},
        {"url": "u"},
        {"title": "t"},
        {"url": Sent([("other", {"url": "other"})], (None, *NO_TEXT)), "via_server": Sent([], NO_FLAG)},
        b'{"title":5}',
    ),
    Endpoint(
        "create_blob",
        f"POST /api/blobs/sha256:{hashlib.sha256(FILE.read_bytes()).hexdigest()}",
        {"path": FILE},
        FILE.read_bytes(),
        parameters={"path": Sent([(str(FILE), {})], (None, 5, b"\0", "", FILE.parent, FILE / "missing"))},
    ),
    Endpoint(
        "blob_exists",
        f"HEAD /api/blobs/{DIGEST}",
        {"digest": DIGEST},
        parameters={"digest": Sent([], (None, 5, "", "sha256:../tags", DIGEST + "0", DIGEST[:-1], DIGEST.upper()))},
    ),
]
# They are made of the calls above; see test_files.py.
MADE_OF_OTHERS = {"upload", "create_from", "continue_from", "context_length", "loaded", "require"}
# They say what is done around a request, not what it says.
AROUND = {"on_truncation", "preflight", "recover"}
NO_CALLS = {"abort", "aclose", "close", "scope"}
STREAMING = [endpoint for endpoint in ENDPOINTS if endpoint.streams]


def forms(endpoints: list[Endpoint]) -> list[Any]:
    """Each endpoint as a call and, if it can, as a stream."""
    return [
        pytest.param(endpoint, stream, id=endpoint.name + "-stream" * stream)
        for endpoint in endpoints
        for stream in ((False, True) if endpoint.streams else (False,))
    ]


async def result(endpoint: Endpoint, client: AsyncClient, stream: bool = False, **given: Any) -> Any:
    if not stream:
        return await endpoint.call(client, **given)
    return await endpoint.call(client, stream=True, **given).collect()


def test_every_call_and_every_parameter_is_in_the_table() -> None:
    calls = {name for name, _ in inspect.getmembers(AsyncClient, callable) if not name.startswith("_")}
    assert {endpoint.name for endpoint in ENDPOINTS} == calls - MADE_OF_OTHERS - NO_CALLS
    for endpoint in ENDPOINTS:
        parameters = set(inspect.signature(getattr(AsyncClient, endpoint.name)).parameters)
        assert set(endpoint.parameters) == parameters - {"self", "call", "until"} - AROUND, endpoint.name


# -- what goes over the wire --


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(base_url="http://127.0.0.1:11434", assert_all_called=False)


@pytest.fixture
async def mapped(router: respx.MockRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=httpx.MockTransport(router.async_handler)) as made:
        yield made


VALUES = [
    pytest.param(endpoint, stream, {name: value}, fields, id=f"{endpoint.name}{'-stream' * stream}-{name}-{number}")
    for endpoint in ENDPOINTS
    for stream in ((False, True) if endpoint.streams else (False,))
    for name, sent in endpoint.parameters.items()
    for number, (value, fields) in enumerate(sent.good)
]


@pytest.mark.parametrize(
    ("endpoint", "stream", "given", "fields"),
    [*(pytest.param(*form.values, {}, {}, id=form.id) for form in forms(ENDPOINTS)), *VALUES],
)
async def test_the_body_is_exactly_this(
    router: respx.MockRouter,
    mapped: AsyncClient,
    endpoint: Endpoint,
    stream: bool,
    given: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    answer = endpoint.answer
    if isinstance(given.get("input"), list):
        answer = {"embeddings": [[1.0] for _ in given["input"]]}
    router.request(endpoint.method, endpoint.path).respond(json=answer)
    await result(endpoint, mapped, stream, **given)
    [call] = router.calls
    content = call.request.content
    if not isinstance(endpoint.body, dict):
        assert content == (endpoint.body or b"")
        return
    streaming = {"stream": stream} if endpoint.streams or endpoint.path == "/api/generate" else {}
    assert json.loads(content) == {**endpoint.body, **streaming, **fields}
    assert call.request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_what_a_newer_server_answers_is_kept(
    router: respx.MockRouter, mapped: AsyncClient, endpoint: Endpoint
) -> None:
    router.request(endpoint.method, endpoint.path).respond(json={**(endpoint.answer or {}), "new": [1]})
    answer = await result(endpoint, mapped)
    if endpoint.wrong_type is not None:
        assert answer["new"] == [1]
        assert answer.model_dump(exclude_unset=True) == {**endpoint.answer, "new": [1]}
        assert answer.status_code == 200


# -- what does not --


WRONG = [
    pytest.param(endpoint, stream, {name: value}, id=f"{endpoint.name}{'-stream' * stream}-{name}-{number}")
    for endpoint in ENDPOINTS
    for stream in ((False, True) if endpoint.streams else (False,))
    for name, sent in {
        **endpoint.parameters,
        "token": Sent([], ("token",)),
        "timeout": Sent([], ("5", -1, float("nan"), True)),
        "headers": Sent([], (5, {"X": 5}, {"X": "a\r\nY: b"}, {"X Y": "a"})),
        "retries": Sent([], (-1, True, "1")),
    }.items()
    for number, value in enumerate(sent.bad)
]


@pytest.mark.parametrize(("endpoint", "stream", "given"), WRONG)
async def test_a_parameter_of_the_wrong_type_is_refused_before_anything_is_sent(
    router: respx.MockRouter, mapped: AsyncClient, endpoint: Endpoint, stream: bool, given: dict[str, Any]
) -> None:
    if stream:
        given = {"stream": True, **given}
    with pytest.raises(RequestError) as caught:
        call = endpoint.call(mapped, **given)
        await (call if inspect.iscoroutine(call) else call.collect())
    assert isinstance(caught.value, ValueError)
    assert caught.value.error
    assert not router.calls


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_a_parameter_that_does_not_exist_is_a_type_error(
    router: respx.MockRouter, mapped: AsyncClient, endpoint: Endpoint
) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        await endpoint.call(mapped, nonsense=1)
    assert not router.calls


# -- what a server may answer --


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest_asyncio.fixture
async def client(server: FakeOllama) -> AsyncIterator[AsyncClient]:
    """A client after which nothing is left, and which after all that a server has done to it still works."""
    async with nothing_left_behind(), AsyncClient(server.url, max_line_bytes=4096) as made:
        yield made
        server.script("/api/version", Reply.json({"version": "1"}))
        assert (await made.version()).version == "1"


async def failure(endpoint: Endpoint, client: AsyncClient, stream: bool, *kinds: type[BaseException]) -> OllamaError:
    with pytest.raises(BaseException) as caught:
        await result(endpoint, client, stream, timeout=30)
    assert type(caught.value) in kinds, "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value, OllamaError)
    return caught.value


STATUSES: dict[int, type[ResponseError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ResponseError,
    429: RateLimitError,
    500: ServerError,
    502: ServerError,
    503: ServerBusyError,
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_an_error_of_the_server(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool, status: int
) -> None:
    told = {"error": "so it is", "signin_url": "https://ollama.com/connect"}
    if endpoint.method == "HEAD":
        if status == 404:
            pytest.skip("that is the answer no")
        server.script(endpoint.path, Reply(status=status))
        await failure(endpoint, client, stream, STATUSES[status])
        return
    server.script(endpoint.path, Reply.json(told, status=status))
    error = await failure(endpoint, client, stream, STATUSES[status])
    assert isinstance(error, ResponseError)
    assert (error.status_code, error.error, error.signin_url) == (status, "so it is", told["signin_url"])


# What is no JSON, or other JSON than a call of Ollama's API answers.
BODIES = {
    "html": b"<html>a captive portal</html>",
    "text": b"Ollama is running",
    "list": b"[1]",
    "number": b"5",
    "nothing": b"",
    "half": b'{"model":"m","mess',
    "nul": b"\0\0",
    "no_utf8": b'{"model":"\xff"}',
    "deep": b"[" * 4000,
}
READ = [endpoint for endpoint in ENDPOINTS if endpoint.wrong_type is not None]


@pytest.mark.parametrize("body", [*BODIES, "wrong_type"])
@pytest.mark.parametrize(("endpoint", "stream"), forms(READ))
async def test_an_invalid_answer(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool, body: str
) -> None:
    bad = BODIES.get(body, endpoint.wrong_type)
    assert bad is not None
    server.script(endpoint.path, Reply([bad] if bad else []))
    error = await failure(endpoint, client, stream, ProtocolError)
    assert len(str(error)) < 300


@pytest.mark.parametrize(("endpoint", "stream"), forms(READ))
async def test_an_error_with_status_200(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool
) -> None:
    server.script(endpoint.path, Reply.json({"error": "the gateway is upset"}))
    error = await failure(endpoint, client, stream, StreamError, ResponseError, ServerError, ProtocolError)
    assert "the gateway is upset" in str(error)


@pytest.mark.parametrize("endpoint", STREAMING, ids=lambda endpoint: endpoint.name)
async def test_a_line_over_the_limit(server: FakeOllama, client: AsyncClient, endpoint: Endpoint) -> None:
    server.script(endpoint.path, Reply([b'{"model":"' + b"x" * 5000]))
    assert "4,096" in str(await failure(endpoint, client, True, ProtocolError))


NO_HTTP = {
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "no_status": b"HTTP/1.1 yes\r\n\r\n",
    "no_header": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "big_header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    "two_lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "strange_chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "compressed": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 2\r\n\r\n\x1f\x8b",
}


@pytest.mark.parametrize("answer", NO_HTTP)
@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_an_answer_that_is_not_http(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool, answer: str
) -> None:
    if endpoint.method == "HEAD" and answer in {"strange_chunk", "compressed"}:
        pytest.skip("an answer to HEAD has no body")
    server.script(endpoint.path, Reply(raw=NO_HTTP[answer], steps=[Cut()]))
    await failure(endpoint, client, stream, ProtocolError)


CUTS = {
    "before_the_head": Reply(before_head=[Cut()]),
    "reset_before_the_head": Reply(before_head=[Reset()]),
    "in_the_head": Reply(cut_at=20),
    "mid_line": Reply([b'{"model":"m', Cut()]),
    "mid_chunk_size": Reply([Raw(b"f"), Cut()]),
    "short_of_its_length": Reply([b"{}"], headers={"Content-Length": "1000"}, framing="close"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_a_connection_that_is_cut(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool, cut: str
) -> None:
    if endpoint.method == "HEAD" and cut in {"mid_line", "mid_chunk_size", "short_of_its_length"}:
        pytest.skip("an answer to HEAD has no body")
    server.script(endpoint.path, CUTS[cut])
    error = await failure(endpoint, client, stream, ConnectionBroken)
    assert not isinstance(error, ConnectionError)


@pytest.mark.parametrize("endpoint", STREAMING, ids=lambda endpoint: endpoint.name)
async def test_an_error_within_a_stream(server: FakeOllama, client: AsyncClient, endpoint: Endpoint) -> None:
    first = {**endpoint.answer, "done": False, "status": "going on"}
    server.script(endpoint.path, Reply([first, {"error": "the runner died"}]))
    error = await failure(endpoint, client, True, StreamError)
    assert isinstance(error, StreamError)
    assert (error.error, error.status_code) == ("the runner died", -1)
    assert error.partial is not None


# -- no answer at all --


@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_a_server_that_is_not_there(unused_tcp_port: int, endpoint: Endpoint, stream: bool) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    async with nothing_left_behind(), AsyncClient(f"http://user:hidden@{address}") as made:
        error = await failure(endpoint, made, stream, ConnectError)
    assert isinstance(error, ConnectError)
    assert address in error.detail
    assert "hidden" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_tls_to_a_plain_port(server: FakeOllama, endpoint: Endpoint, stream: bool) -> None:
    async with nothing_left_behind(), AsyncClient(f"https://127.0.0.1:{server.port}", verify=PLAIN) as made:
        error = await failure(endpoint, made, stream, ConnectError)
    assert isinstance(error, ConnectError)
    assert "http://" in error.detail


# It asks for no certificates, of which reading those of the machine takes longest.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_a_port_that_speaks_tls(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool
) -> None:
    # The alert that OpenSSL answers a request with.
    server.script(endpoint.path, Reply(raw=b"\x15\x03\x01\x00\x02\x02\x46", steps=[Cut()]))
    assert "TLS" in str(await failure(endpoint, client, stream, ProtocolError))


@pytest.mark.parametrize(("endpoint", "stream"), forms(ENDPOINTS))
async def test_a_client_that_is_closed(server: FakeOllama, endpoint: Endpoint, stream: bool) -> None:
    async with nothing_left_behind():
        made = AsyncClient(server.url)
        await made.close()
        assert "closed" in str(await failure(endpoint, made, stream, StreamClosed))
    assert not server.connections


@pytest.mark.parametrize("endpoint", STREAMING, ids=lambda endpoint: endpoint.name)
async def test_a_second_reader(server: FakeOllama, client: AsyncClient, endpoint: Endpoint) -> None:
    server.script(endpoint.path, Reply([Stall()]))
    stream = endpoint.call(client, stream=True)
    first = asyncio.create_task(stream.collect())
    await until(lambda: bool(server.requests), "the first reader at work")
    with pytest.raises(StreamBusy):
        await stream.collect()
    stream.abort("enough")
    with pytest.raises(AbortError):
        await asyncio.wait_for(first, BOUND)


@pytest.mark.parametrize(("endpoint", "stream"), forms(READ))
async def test_what_divides_lines_elsewhere_is_text(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool
) -> None:
    text = "a\x85b\u2028c\u2029d\x0be"
    body = json.dumps({**endpoint.answer, "new": text}, ensure_ascii=False).encode()
    server.script(endpoint.path, Reply([body + b"\n"]))
    assert (await result(endpoint, client, stream))["new"] == text


@pytest.mark.parametrize(("endpoint", "stream"), forms(READ))
async def test_a_connection_that_is_cut_in_a_character(
    server: FakeOllama, client: AsyncClient, endpoint: Endpoint, stream: bool
) -> None:
    server.script(endpoint.path, Reply(['{"new":"\N{EURO SIGN}'.encode()[:-1], Cut()]))
    await failure(endpoint, client, stream, ConnectionBroken)
