"""What callers may give: images, formats, options, durations; and what an answer knows besides its body."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import respx
from pydantic import BaseModel, RootModel

from ollama_async import (
    AsyncClient,
    AuthenticationError,
    ChatResponse,
    Image,
    Message,
    Options,
    ParseError,
    RequestError,
    SystemOneChoiceAnswer,
    SystemOneChoiceQuestion,
)
from ollama_async.testing import FakeOllama

PIXEL = b"\x89PNG\xff\xfe pixel"
ENCODED = base64.b64encode(PIXEL).decode()
NO_KEY = "^Authorization header with Bearer token is required for web "
CHAT = {"model": "m", "message": {"role": "assistant", "content": "hi"}, "done": True}


HI = {"role": "user", "content": "hi"}


class Endless(BaseModel):
    most: float = float("inf")


class Country(BaseModel):
    name: str
    area: int


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(assert_all_called=False)


@pytest.fixture
async def client(router: respx.MockRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=httpx.MockTransport(router.async_handler), host="http://server") as made:
        yield made


def sent(router: respx.MockRouter) -> Any:
    return json.loads(router.calls.last.request.content)


# -- images --


def as_path(path: Path) -> Any:
    return path


def as_text(path: Path) -> Any:
    return str(path)


def as_bytes(path: Path) -> Any:
    return path.read_bytes()


def as_bytearray(path: Path) -> Any:
    return bytearray(path.read_bytes())


def as_base64(path: Path) -> Any:
    return base64.b64encode(path.read_bytes()).decode()


def as_file(path: Path) -> Any:
    return io.BytesIO(path.read_bytes())


def as_image(path: Path) -> Any:
    return Image(value=path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(PIXEL)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [as_path, as_text, as_bytes, as_bytearray, as_base64, as_file, as_image])
async def test_an_image_may_be_given_in_many_forms(
    router: respx.MockRouter, client: AsyncClient, picture: Path, form: Callable[[Path], Any], streaming: bool
) -> None:
    router.post("/api/chat").respond(json=CHAT)
    router.post("/api/generate").respond(json={"response": "", "done": True})
    messages = [{"role": "user", "content": "what?", "images": [form(picture)]}, Message(role="user")]
    if streaming:
        await client.chat("m", messages, stream=True).collect()
    else:
        await client.chat("m", messages)
    assert sent(router)["messages"] == [{"role": "user", "content": "what?", "images": [ENCODED]}, {"role": "user"}]
    if streaming:
        await client.generate("m", "p", images=[form(picture), ENCODED], stream=True).collect()
    else:
        await client.generate("m", "p", images=[form(picture), ENCODED])
    assert sent(router)["images"] == [ENCODED, ENCODED]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("missing.png", "'missing.png' does not exist"),
        (Path("/nowhere/at/all"), "'/nowhere/at/all' does not exist"),
        ("not base64 !", "must be the path of an existing file, base64"),
        (7, "an image is int"),
        (None, "an image is NoneType"),
        ({"url": "x"}, "an image is dict"),
    ],
)
async def test_an_invalid_image_is_refused_before_anything_is_sent(
    router: respx.MockRouter, client: AsyncClient, image: Any, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        await client.generate("m", "p", images=[image])
    with pytest.raises(RequestError, match=says):
        await client.chat("m", [{"role": "user", "images": [image]}], stream=True)
    assert not router.calls


async def test_an_image_over_a_real_connection(fake_ollama: FakeOllama, picture: Path) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.chat("fake", [{"role": "user", "content": "x", "images": [picture]}])
        [request] = fake_ollama.requests
        assert json.loads(request.body)["messages"][0]["images"] == [ENCODED]


async def test_an_image_that_vanishes_or_cannot_be_read_is_a_request_error(
    fake_ollama: FakeOllama, picture: Path
) -> None:
    image = Image(value=picture)
    picture.unlink()
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match="cannot be read"):
            await client.generate("m", "p", images=[image])
        with pytest.raises(RequestError, match="not bytes; open it with 'rb'"):
            await client.generate("m", "p", images=[io.StringIO("text")])  # type: ignore[list-item]
        assert (await client.version()).version


WRAPPED = base64.encodebytes(PIXEL * 20).decode()
PLAIN = base64.b64encode(PIXEL * 20).decode()


@pytest.mark.parametrize(
    "text",
    [
        WRAPPED,
        WRAPPED.replace("\n", "\r\n"),
        PLAIN + "\n",
        f"  {PLAIN}\n",
        PLAIN.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{PLAIN}",
        f"DATA:;BASE64,{WRAPPED}",
        "data:image/png;base64," + urllib.parse.quote(PLAIN, safe=""),
        "data:image/svg+xml," + urllib.parse.quote(PIXEL * 20),
    ],
    ids=["lines", "crlf", "newline", "blanks", "urlsafe", "data", "data_lines", "data_quoted", "data_percent"],
)
@pytest.mark.parametrize("kept", [False, True], ids=["given", "kept_as_json"])
async def test_base64_may_be_written_in_many_ways(
    router: respx.MockRouter, client: AsyncClient, text: str, kept: bool
) -> None:
    assert set(PLAIN) > set("+/"), "the alphabets do not differ"
    router.post("/api/chat").respond(json=CHAT)
    message: Any = {"role": "user", "images": [text]}
    await client.chat("m", [Message.model_validate_json(json.dumps(message)) if kept else message])
    assert sent(router)["messages"][0]["images"] == [PLAIN]


@pytest.mark.parametrize("text", ["data:image/png;base64,???", "data:nothing", "YWJj YWJj", "YWJ"])
async def test_what_looks_like_base64_and_is_not(client: AsyncClient, text: str) -> None:
    with pytest.raises(RequestError, match="must be the path of an existing file, base64, or a data: URL"):
        await client.generate("m", "p", images=[text])
    with pytest.raises(ValueError, match="an image in JSON is base64"):
        Message.model_validate_json(json.dumps({"role": "user", "images": [text]}))


# -- what JSON does not have --

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (lambda c: c.chat("m", "x", options={"temperature": INF}), "options.temperature"),
        (lambda c: c.chat("m", "x", options=Options(top_p=NAN)), "options.top_p"),
        (lambda c: c.chat("m", "x", stream=True, options={"new": [1, {"a b": -INF}]}), "options.new[1].a b"),
        (lambda c: c.chat("m", "x", options={"new": {1.5, INF}}), "options.new"),
        (lambda c: c.chat("m", "x", format={"properties": {"a": {"maximum": INF}}}), "format.properties.a.maximum"),
        (lambda c: c.chat("m", "x", format=Endless), "format.properties.most.default"),
        (lambda c: c.chat("m", "x", tools=[{"function": {"limit": NAN}}]), "tools[0].function.limit"),
        (lambda c: c.chat("m", [{"role": "user", "content": "NaN", "score": NAN}]), "messages[0].score"),
        (
            lambda c: c.chat(
                "m", [HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": INF}}}]}]
            ),
            "messages[1].tool_calls[0].function.arguments.x",
        ),
        (lambda c: c.generate("m", "x", images=[b"a"], options={"temperature": INF}), "options.temperature"),
        (lambda c: c.chat("m", [{**HI, "images": [b"a"], "score": INF}]), "messages[0].score"),
        (lambda c: c.embed("m", "x", options={"temperature": INF}), "options.temperature"),
        (lambda c: c.show("m", options={"temperature": INF}), "options.temperature"),
        (lambda c: c.create("m", parameters={"temperature": INF}), "parameters.temperature"),
        (lambda c: c.create("m", info={"a": [INF]}), "info.a[0]"),
        (lambda c: c.systemone("m", {"a": NAN}, {"q": {"type": "noul", "instructions": "?"}}), "state.a"),
    ],
)
async def test_a_number_that_json_does_not_have_is_named(
    router: respx.MockRouter, client: AsyncClient, call: Callable[[AsyncClient], Any], place: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(place) + r".* cannot be written as JSON: JSON has no number"):
        made = call(client)
        await (made.collect() if hasattr(made, "collect") else made)
    assert not router.calls


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (lambda c: c.chat("m", "\ud800"), "messages[0].content"),
        (
            lambda c: c.chat("m", [{**HI, "images": [b"a"]}, {"role": "user", "content": "\ud800"}]),
            "messages[1].content",
        ),
        (lambda c: c.chat("m", "x", options={"a": object()}), "options.a"),
        (lambda c: c.generate("m\ud800", "x"), "model"),
    ],
)
async def test_what_cannot_be_written_is_named_before_anything_is_sent(
    router: respx.MockRouter, client: AsyncClient, call: Callable[[AsyncClient], Any], place: str
) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(place)} cannot be written as JSON"):
        await call(client)
    assert not router.calls


async def test_words_that_look_like_such_numbers_are_words(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").respond(json=CHAT)
    await client.chat("m", "is NaN < Infinity?")
    assert sent(router)["messages"][0]["content"] == "is NaN < Infinity?"


# -- format, options, keep_alive --


@pytest.mark.parametrize("value", ["xml", 1, True, int, ["json"]])
async def test_an_invalid_format_is_refused(client: AsyncClient, value: Any) -> None:
    with pytest.raises(RequestError, match="format="):
        await client.chat("m", format=value)


async def test_an_object_in_place_of_its_class_is_refused_as_format(client: AsyncClient) -> None:
    with pytest.raises(RequestError, match=r"format=Country\(\.\.\.\): give the class Country itself"):
        await client.chat("m", format=cast("Any", Country(name="France", area=1)))
    with pytest.raises(RequestError, match=r"format=RootModel\[list\[int\]\]"):
        await client.chat("m", format=cast("Any", RootModel[list[int]]([1])))


async def test_an_object_that_is_a_schema_is_a_format(router: respx.MockRouter, client: AsyncClient) -> None:
    class Schema(BaseModel):
        type: str = "object"

    router.post("/api/chat").respond(json=CHAT)
    await client.chat("m", "x", format=cast("Any", Schema()))
    assert sent(router)["format"] == {"type": "object"}


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_answer_is_parsed_as_the_format_that_was_asked_for(
    router: respx.MockRouter, client: AsyncClient, streaming: bool
) -> None:
    text = '{"name": "Peru", "area": 1285216}'
    router.post("/api/chat").respond(json={**CHAT, "message": {"role": "assistant", "content": text}})
    router.post("/api/generate").respond(json={"response": text, "done": True})
    if streaming:
        chat = await client.chat("m", "x", format=Country, stream=True).collect()
        generated = await client.generate("m", "x", format=Country, stream=True).collect()
    else:
        chat = await client.chat("m", "x", format=Country)
        generated = await client.generate("m", "x", format=Country)
    assert chat.parsed == generated.parsed == Country(name="Peru", area=1285216)
    assert sent(router)["format"] == Country.model_json_schema()
    assert "parsed" not in chat.model_dump()


async def test_an_answer_that_does_not_fit_its_format(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").respond(json={**CHAT, "message": {"role": "assistant", "content": '{"name": "Pe'}})
    reply = await client.chat("m", "x", format=Country)
    with pytest.raises(ParseError, match="does not match Country") as caught:
        _ = reply.parsed
    assert caught.value.text == '{"name": "Pe'
    assert "EOF while parsing" in (caught.value.reason or "")
    assert str(caught.value).endswith("; ask again, and tell the model what is wrong")
    assert caught.value.partial is reply
    assert isinstance(caught.value, ValueError)
    assert (await client.chat("m", "x", format="json")).parsed is None
    assert ChatResponse(message=Message(role="assistant")).parsed is None


async def test_an_answer_that_was_cut_before_it_fits_says_so(router: respx.MockRouter, client: AsyncClient) -> None:
    message = {"role": "assistant", "content": '{"name": "Peru"}'}
    router.post("/api/chat").respond(json={**CHAT, "message": message, "done": True, "done_reason": "length"})
    reply = await client.chat("m", "x", format=Country)
    with pytest.raises(ParseError, match="the server cut it for its length: raise num_predict, or num_ctx") as caught:
        _ = reply.parsed
    assert caught.value.reason == "area: Field required"


async def test_until_may_look_at_what_is_parsed(router: respx.MockRouter, client: AsyncClient) -> None:
    def part(text: str) -> bytes:
        return json.dumps({"message": {"role": "assistant", "content": text}, "done": False}).encode() + b"\n"

    parts = [part('{"name": "Peru",'), part('"area": 1}'), part("  "), part("  ")]
    router.post("/api/chat").respond(content=b"".join(parts))

    def complete(reply: ChatResponse) -> bool:
        try:
            return bool(reply.parsed)
        except ParseError:
            return False

    stream = client.chat("m", "x", format=Country, stream=True, until=complete)
    assert (await stream.collect()).parsed == Country(name="Peru", area=1)
    assert (stream.outcome, stream.timing.chunks) == ("until", 2)


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (Options(temperature=0.5, min_p=0.1, new_one=3), {"temperature": 0.5, "min_p": 0.1, "new_one": 3}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"num_ctx": 8, "new_one": None}, {"num_ctx": 8, "new_one": None}),
        ({}, {}),
    ],
)
async def test_options_are_checked_and_unknown_ones_passed_on(
    router: respx.MockRouter, client: AsyncClient, options: Any, body: dict[str, Any]
) -> None:
    router.post("/api/generate").respond(json={"response": "", "done": True})
    await client.generate("m", "p", options=options)
    assert sent(router)["options"] == body


@pytest.mark.parametrize("options", [{"num_ctx": "many"}, {"stop": [1]}, {"use_mmap": []}, [("seed", 1)], "seed=1"])
async def test_options_of_the_wrong_type_are_refused(client: AsyncClient, options: Any) -> None:
    with pytest.raises(RequestError, match="options"):
        await client.generate("m", "p", options=options)


@pytest.mark.parametrize(
    ("given", "body"),
    [
        (0, 0),
        (-1, -1),
        (1.5, 1.5),
        ("5m", "5m"),
        ("-1h30m", "-1h30m"),
        ("0", "0"),
        (timedelta(minutes=1, milliseconds=500), 60.5),
    ],
)
async def test_keep_alive(router: respx.MockRouter, client: AsyncClient, given: Any, body: Any) -> None:
    router.post("/api/generate").respond(json={"response": "", "done": True})
    await client.load("m", given)
    assert sent(router)["keep_alive"] == body


@pytest.mark.parametrize(
    "given",
    [
        *("five minutes", "300", "5 m", "", True, float("nan"), float("inf"), [1]),
        *(1e300, *(pytest.param(sign * 10**size, id=f"{sign}e{size}") for sign in (1, -1) for size in (400, 5000))),
        *("\N{ARABIC-INDIC DIGIT FIVE}m", "\N{FULLWIDTH DIGIT FIVE}m"),
    ],
)
async def test_an_invalid_keep_alive_is_refused(client: AsyncClient, given: Any) -> None:
    with pytest.raises(RequestError, match="keep_alive="):
        await client.load("m", given)


# -- the other endpoints --


@pytest.mark.parametrize(
    ("call", "method", "path", "body", "answer"),
    [
        (
            lambda c: c.status(),
            "GET",
            "/api/status",
            None,
            {"cloud": {"disabled": True, "source": "env"}},
        ),
        (
            lambda c: c.recommendations(),
            "GET",
            "/api/experimental/model-recommendations",
            None,
            {"recommendations": [{"model": "m", "description": "d", "vram_bytes": 1, "required_plan": "pro"}]},
        ),
        (lambda c: c.whoami(), "POST", "/api/me", None, {"id": "i", "name": "n", "avatarurl": "u", "plan": "free"}),
        (
            lambda c: c.web_search("q", via_server=True),
            "POST",
            "/api/experimental/web_search",
            {"query": "q", "max_results": 3},
            {"results": [{"title": "t", "url": "u", "content": "c"}]},
        ),
        (
            lambda c: c.web_fetch("http://x", via_server=True),
            "POST",
            "/api/experimental/web_fetch",
            {"url": "http://x"},
            {"title": "t", "content": "c", "links": ["u"]},
        ),
        (
            lambda c: c.show("m", system="s", template="t", options={"seed": 1}),
            "POST",
            "/api/show",
            {"model": "m", "system": "s", "template": "t", "options": {"seed": 1}},
            {"renderer": "r", "projector_info": {"a": 1}},
        ),
        (
            lambda c: c.create(
                "m",
                renderer="r",
                parser="p",
                requires="0.30",
                info={"a": 1},
                remote_host="h",
                draft_files={"f": "sha256:1"},
                draft_quantize="q4_0",
            ),
            "POST",
            "/api/create",
            {
                "model": "m",
                "stream": False,
                "renderer": "r",
                "parser": "p",
                "requires": "0.30",
                "info": {"a": 1},
                "remote_host": "h",
                "draft_files": {"f": "sha256:1"},
                "draft_quantize": "q4_0",
            },
            {"status": "success"},
        ),
        (
            lambda c: c.chat("m", truncate=False, shift=False, debug_render_only=True),
            "POST",
            "/api/chat",
            {
                "model": "m",
                "stream": False,
                "messages": [],
                "tools": [],
                "truncate": False,
                "shift": False,
                "_debug_render_only": True,
            },
            {**CHAT, "_debug_info": {"rendered_template": "r", "image_count": 1}},
        ),
        (
            lambda c: c.generate(
                "m", "p", truncate=False, shift=True, debug_render_only=True, width=64, height=32, steps=4
            ),
            "POST",
            "/api/generate",
            {
                "model": "m",
                "stream": False,
                "prompt": "p",
                "truncate": False,
                "shift": True,
                "_debug_render_only": True,
                "width": 64,
                "height": 32,
                "steps": 4,
            },
            {"response": "", "image": ENCODED, "completed": 4, "total": 4, "done": True},
        ),
    ],
)
async def test_a_call_sends_exactly_this_and_knows_where_its_answer_is_from(
    router: respx.MockRouter,
    client: AsyncClient,
    call: Callable[[AsyncClient], Awaitable[Any]],
    method: str,
    path: str,
    body: dict[str, Any] | None,
    answer: dict[str, Any],
) -> None:
    router.request(method, path).respond(201, json={**answer, "new_field": 1}, headers={"X-Request-Id": "7"})
    result = await call(client)
    content = router.calls.last.request.content
    assert (json.loads(content) if content else None) == body
    assert result.model_dump(exclude_unset=True, by_alias=True) == {**answer, "new_field": 1}
    assert (result.status_code, result.headers["x-request-id"]) == (201, "7")


async def test_signout_and_what_it_says_to_nobody(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/signout").respond(content=b"null", headers={"X-Request-Id": "7"})
    reply = await client.signout()
    assert (reply.status, reply.status_code, reply.headers["x-request-id"]) == ("success", 200, "7")
    router.post("/api/me").respond(401, json={"error": "unauthorized", "signin_url": "https://ollama.com/connect"})
    with pytest.raises(AuthenticationError) as caught:
        await client.whoami()
    assert caught.value.signin_url == "https://ollama.com/connect"


async def test_the_answer_of_a_stream_knows_where_it_is_from(router: respx.MockRouter, client: AsyncClient) -> None:
    router.post("/api/chat").respond(json=CHAT, headers={"X-Request-Id": "7"})
    stream = client.chat("m", "x", stream=True)
    async for chunk in stream:
        assert chunk.status_code is None
        assert not chunk.headers
    assert stream.response is not None
    assert (stream.response.status_code, stream.response.headers["x-request-id"]) == (200, "7")


async def test_systemone(router: respx.MockRouter, client: AsyncClient) -> None:
    answer = {
        "model": "m",
        "answers": {
            "kind": {"type": "choice", "choice": "cat", "probabilities": {"cat": 0.9, "dog": 0.1}, "confidence": 0.8},
            "big": {"type": "noul", "noul": 0.25},
        },
        "usage": {"input_tokens": 5, "output_tokens": 1},
    }
    router.post("/v1/systemone").respond(json=answer)
    reply = await client.systemone(
        "m",
        {"animal": None},
        {
            "kind": SystemOneChoiceQuestion(instructions="which?", criteria={"dog": None, "cat": "it meows"}),
            "big": {"type": "noul", "instructions": "is it big?"},
        },
        timedelta(minutes=5),
    )
    assert reply.model_dump() == answer
    assert isinstance(reply["answers"]["kind"], SystemOneChoiceAnswer)
    # The order of the choices counts, and null says that the name describes the choice.
    assert router.calls.last.request.content == (
        b'{"model":"m","state":{"animal":null},"questions":{'
        b'"kind":{"type":"choice","instructions":"which?","criteria":{"dog":null,"cat":"it meows"}},'
        b'"big":{"type":"noul","instructions":"is it big?"}},"keep_alive":300.0}'
    )
    with pytest.raises(RequestError, match="systemone: questions"):
        await client.systemone("m", "s", {"q": {"type": "riddle", "instructions": "?"}})


# -- keys for the web --


@pytest.mark.parametrize(
    ("host", "options", "environment", "key"),
    [
        (None, {"headers": {"Authorization": "Bearer mine"}}, None, "Bearer mine"),
        ("https://ollama.com", {"headers": {"Authorization": "Bearer mine"}}, None, "Bearer mine"),
        (None, {"headers": {"Authorization": "Bearer mine"}}, "theirs", "Bearer theirs"),
        ("http://gate.example", {}, "theirs", "Bearer theirs"),
        ("http://gate.example", {"headers": {"Authorization": "Bearer gate"}}, None, None),
        ("http://gate.example", {"headers": {"Authorization": "Bearer gate"}, "compat": True}, None, "Bearer gate"),
        (None, {"trust_env": False}, "theirs", None),
        (None, {}, None, None),
    ],
)
async def test_which_key_goes_to_the_web(
    router: respx.MockRouter,
    monkeypatch: pytest.MonkeyPatch,
    host: str | None,
    options: dict[str, Any],
    environment: str | None,
    key: str | None,
) -> None:
    monkeypatch.delenv("OLLAMA_API_KEY", raising=False)
    if environment:
        monkeypatch.setenv("OLLAMA_API_KEY", environment)
    route = router.post("https://ollama.com/api/web_search").respond(json={"results": []})
    router.post("https://ollama.com/api/web_fetch").respond(json={"content": "c"})
    async with AsyncClient(host, transport=httpx.MockTransport(router.async_handler), **options) as client:
        if key is None:
            with pytest.raises(ValueError, match=NO_KEY + "search$"):
                await client.web_search("q")
            with pytest.raises(ValueError, match=NO_KEY + "fetch$"):
                await client.web_fetch("u")
            assert not router.calls
        else:
            await client.web_search("q", 5)
            assert sent(router) == {"query": "q", "max_results": 5}
            assert route.calls.last.request.headers["authorization"] == key
            assert (await client.web_fetch("u", headers={"Authorization": "Bearer once"})).content == "c"
            assert router.calls.last.request.headers["authorization"] == "Bearer once"


@pytest.mark.parametrize(("compat", "key"), [(False, None), (True, "Bearer k")])
def test_compat_sends_the_key_of_the_environment_anywhere(
    monkeypatch: pytest.MonkeyPatch, compat: bool, key: str | None
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "k")
    client = AsyncClient("http://gate.example", compat=compat)
    assert client._headers.get("authorization") == key
    assert (client._timeouts.idle is None) is compat
