"""Objects of other libraries as input, and answers that look to code for ollama-python as its own do."""

from __future__ import annotations

import base64
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, model_serializer

from ollama_async import (
    AsyncClient,
    ChatResponse,
    GenerateResponse,
    ListResponse,
    Message,
    RequestError,
    ShowResponse,
    SystemOneChoiceQuestion,
    ToolCall,
    tool_schema,
)
from ollama_async.testing import FakeOllama, Reply

# -- the classes of ollama-python 0.6.3, as far as they are given to a client --


class Image(BaseModel):
    value: Any

    @model_serializer
    def serialize(self) -> str:
        raise AssertionError("dumping an image reads its file, in the event loop")


class Function(BaseModel):
    name: str
    arguments: dict[str, Any]


class Call(BaseModel):
    function: Function


class TheirMessage(BaseModel):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: Sequence[Image] | None = None
    tool_name: str | None = None
    tool_calls: Sequence[Call] | None = None


class Parameters(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    type: str = "object"
    defs: Any = Field(None, alias="$defs")
    items: Any = None


class TheirFunction(BaseModel):
    name: str | None = None
    description: str | None = None
    parameters: Parameters | None = None


class TheirTool(BaseModel):
    type: str = "function"
    function: TheirFunction | None = None


class TheirOptions(BaseModel):
    temperature: float | None = None
    seed: int | None = None


class TheirQuestion(BaseModel):
    type: str = "choice"
    instructions: str
    criteria: dict[str, str | None]


class Duck:
    """Of no library that is known here."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self) -> Any:
        return self.fields


class Dumped:
    """Dumps to something that is no dict."""

    def __init__(self, dump: Any) -> None:
        self.dump = dump

    def model_dump(self) -> Any:
        return self.dump


class Broken:
    def model_dump(self) -> Any:
        raise KeyError("lost")


CALL = Call(function=Function(name="f", arguments={"a": None, "b": [1]}))
SENT_CALL = {"function": {"name": "f", "arguments": {"a": None, "b": [1]}}}


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama(models=["m"]) as fake:
        yield fake


def sent(server: FakeOllama) -> Any:
    return server.requests[-1].json()


@pytest.mark.parametrize(
    ("message", "on_the_wire"),
    [
        (TheirMessage(role="user", content="x"), {"role": "user", "content": "x"}),
        (
            TheirMessage(role="assistant", content="", thinking="t", tool_calls=[CALL]),
            {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [SENT_CALL]},
        ),
        (
            TheirMessage(role="user", images=[Image(value=b"abc"), Image(value="YWJj")]),
            {"role": "user", "images": ["YWJj", "YWJj"]},
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [SENT_CALL]}),
        ({"role": "user", "images": (Image(value=b"abc"), b"abc")}, {"role": "user", "images": ["YWJj", "YWJj"]}),
        (
            {"role": "assistant", "tool_calls": [{"function": CALL.function}]},
            {"role": "assistant", "tool_calls": [SENT_CALL]},
        ),
        (Message(role="assistant", tool_calls=[CALL]), {"role": "assistant", "tool_calls": [SENT_CALL]}),  # type: ignore[list-item]
        (Message(role="user", images=[Image(value=b"abc")]), {"role": "user", "images": ["YWJj"]}),
        (Duck(role="user", content="x", thinking=None), {"role": "user", "content": "x"}),
        (Duck(role="user", images=[b"abc"]), {"role": "user", "images": ["YWJj"]}),
        (
            {"role": "assistant", "tool_calls": [Duck(function=Duck(name="f", arguments={"a": None, "b": [1]}))]},
            {"role": "assistant", "tool_calls": [SENT_CALL]},
        ),
    ],
)
async def test_a_message_of_others(server: FakeOllama, message: Any, on_the_wire: dict[str, Any]) -> None:
    async with AsyncClient(server.url) as client:
        await client.chat("m", [message])
        assert sent(server)["messages"] == [on_the_wire]
        await client.create("n", from_="m", messages=(message,))
        assert sent(server)["messages"] == [on_the_wire]


async def test_an_image_of_others_is_read_in_a_worker_thread(server: FakeOllama, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"abc")
    async with AsyncClient(server.url) as client:
        await client.generate("m", "x", images=[Image(value=path), Image(value=str(path)), Dumped("YWJj")])
    assert sent(server)["images"] == ["YWJj"] * 3


async def test_tools_options_formats_and_questions_of_others(server: FakeOllama) -> None:
    tool = TheirTool(function=TheirFunction(name="f", parameters=Parameters.model_validate({"$defs": {"N": {}}})))
    wire = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$defs": {"N": {}}}}}
    assert tool_schema(tool) == wire
    nested = {"type": "function", "function": tool.function}
    async with AsyncClient(server.url) as client:
        await client.chat(
            "m", "x", tools=[tool, nested, Duck(type="t")], options=TheirOptions(seed=1), format=Duck(type="object")
        )
        body = sent(server)
        assert body["tools"] == [wire, wire, {"type": "t"}]
        assert (body["options"], body["format"]) == ({"seed": 1}, {"type": "object"})
        await client.create("n", from_="m", parameters=Duck(seed=2), info={"a": Duck(b=1)})
        assert (sent(server)["parameters"], sent(server)["info"]) == ({"seed": 2}, {"a": {"b": 1}})
        answers = {"q": {"type": "noul", "noul": 0.5}}
        usage = {"input_tokens": 1, "output_tokens": 1}
        server.script("/v1/systemone", Reply.json({"model": "m", "answers": answers, "usage": usage}))
        question = TheirQuestion(instructions="?", criteria={"a": None, "b": "x"})
        await client.systemone("m", Duck(facts=[Duck(a=1)]), {"q": question})  # type: ignore[arg-type]
        assert sent(server)["state"] == {"facts": [{"a": 1}]}
        assert sent(server)["questions"] == {
            "q": SystemOneChoiceQuestion(instructions="?", criteria={"a": None, "b": "x"}).model_dump()
        }


def circle() -> dict[str, Any]:
    message: dict[str, Any] = {"role": "user", "content": ""}
    message["more"] = [message]
    return message


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Broken(), r"messages\[1\] .*Broken.model_dump\(\) failed: 'lost'"),
        ({"role": "assistant", "tool_calls": [Broken()]}, r"messages\[1\] .*Broken.model_dump\(\) failed"),
        (mock.MagicMock(), r"messages\[1\] is not a message"),
        (Duck(content="x"), r"messages\[1\] .*role"),
        (TheirMessage, r"messages\[1\] is not a message"),
        (circle(), r"messages\[1\] .*contains itself"),
        ({"role": "user", "images": [Duck(a=1)]}, "an image is dict"),
    ],
    ids=["broken", "broken within", "mock", "no role", "class", "circle", "no image"],
)
async def test_an_object_that_is_still_not_a_message(server: FakeOllama, message: Any, says: str) -> None:
    async with AsyncClient(server.url) as client:
        with pytest.raises(RequestError, match=says):
            await client.chat("m", [{"role": "user", "content": "x"}, message])
    assert not server.requests


async def test_where_the_client_goes_is_where_it_is_in_ollama_python(server: FakeOllama) -> None:
    async with AsyncClient(server.url) as client:
        assert str(client._client.base_url).rstrip("/") == server.url
        assert (await client.version()).version
        assert server.requests[-1].path == "/api/version"


# -- keys --

FRAME: dict[str, Any] = {"model": "m", "created_at": "now", "done": True}
THEIR_ANSWER = {
    *("model", "created_at", "done", "done_reason", "total_duration", "load_duration"),
    *("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration", "logprobs"),
}
THEIR_MESSAGE = {"role", "content", "thinking", "images", "tool_name", "tool_calls"}


def keys(value: Any) -> set[str]:
    """All keys that a look at everything shows, which are the same however it looks."""
    looks = [value.model_dump(), dict(value), json.loads(value.model_dump_json()), value.model_dump(mode="json")]
    assert all(set(look) == set(looks[0]) for look in looks)
    return set(looks[0])


async def test_an_answer_has_the_keys_of_ollama_pythons_and_what_was_sent(server: FakeOllama) -> None:
    async with AsyncClient(server.url) as client:
        chat = await client.chat("m", "x")
        assert (keys(chat), keys(chat.message)) == (THEIR_ANSWER | {"message"}, THEIR_MESSAGE)
        stream = client.chat("m", "x", stream=True)
        async for chunk in stream:
            assert keys(chunk) == THEIR_ANSWER | {"message"}
            assert set(chunk.model_dump()["message"]) == THEIR_MESSAGE
        assert keys(stream.response) == THEIR_ANSWER | {"message"}
        theirs = THEIR_ANSWER | {"response", "thinking", "context", "image", "completed", "total"}
        assert keys(await client.generate("m", "x")) == theirs
    [model] = ListResponse.model_validate({"models": [{"model": "m", "details": {"family": "f"}}]}).models
    assert keys(model) == {"model", "modified_at", "digest", "size", "details"}
    assert "context_length" not in model.model_dump()["details"]
    assert keys(ShowResponse()) == {
        *("modified_at", "template", "modelfile", "license", "details", "model_info", "parameters", "capabilities")
    }


def test_further_keys_are_there_when_they_were_sent() -> None:
    message = {
        "role": "tool",
        "content": "",
        "tool_call_id": "1",
        "tool_calls": [{"id": "1", "function": {"index": 0, "name": "f", "arguments": {}}}],
    }
    sent: dict[str, Any] = {"remote_host": "h", "remote_model": None, "_debug_info": {"rendered_template": "r"}}
    chat = ChatResponse.model_validate({**FRAME, **sent, "message": message})
    assert keys(chat) == THEIR_ANSWER | {"message", "remote_host", "remote_model", "debug_info"}
    assert keys(chat.message) == THEIR_MESSAGE | {"tool_call_id"}
    assert chat.model_dump(exclude_unset=True, by_alias=True)["_debug_info"] == {"rendered_template": "r"}
    dumped = chat.model_dump(exclude_unset=True)["message"]
    assert dumped == message
    assert keys(GenerateResponse(done=True, tool_calls=[])) >= {"tool_calls"}
    assert "_debug_info" not in ChatResponse.model_validate({**FRAME, "message": message}).model_dump(by_alias=True)


def test_a_key_that_was_not_sent_reads_as_none() -> None:
    chat = ChatResponse.model_validate({**FRAME, "message": {"role": "assistant"}})
    assert (chat.debug_info, chat.remote_host, chat.message.tool_call_id) == (None, None, None)
    chat.message.tool_call_id = "1"
    assert chat.message.model_dump()["tool_call_id"] == "1"
    assert chat.message.model_copy(update={"tool_call_id": "2"}).model_dump()["tool_call_id"] == "2"
    assert Message.model_validate(chat.message.model_dump()) == chat.message


def test_the_schema_of_an_answer_still_names_all_fields() -> None:
    for mode in ("validation", "serialization"):
        schema = Message.model_json_schema(mode=mode)  # type: ignore[arg-type]
        assert set(schema["properties"]) == set(Message.model_fields)


# -- arguments of tools that come as text --


@pytest.mark.parametrize(("text", "arguments"), [('{"city": "Lima"}', {"city": "Lima"}), ("", {}), (" \n", {})])
async def test_arguments_that_come_as_json_are_read(server: FakeOllama, text: str, arguments: dict[str, Any]) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": text}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    server.script("/api/chat", Reply([{**FRAME, "message": message}]), always=True)
    async with AsyncClient(server.url) as client:
        for reply in (await client.chat("m", "x"), await client.chat("m", "x", stream=True).collect()):
            assert reply.message.tool_calls is not None
            assert reply.message.tool_calls[0].function.arguments == arguments
        # And a conversation that somebody has kept in OpenAI's form is sent in Ollama's.
        await client.chat("m", [message])
    assert sent(server)["messages"][0]["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("text", ["[1]", "5", "{", '{"a": NaN}', "plain"])
def test_arguments_that_are_not_an_object_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="arguments"):
        ToolCall.model_validate({"function": {"name": "f", "arguments": text}})


# -- the real one --


async def test_ollama_python_itself(server: FakeOllama) -> None:
    ollama = pytest.importorskip("ollama")
    if Version(importlib.metadata.version("ollama")) < Version("0.6.3"):
        pytest.skip("an older release knows fewer fields; ours stands in for 0.6.3")
    call = ollama.Message.ToolCall(function=ollama.Message.ToolCall.Function(name="f", arguments={"a": 1}))
    image = ollama.Image(value=b"abc")
    messages = [ollama.Message(role="user", content="x", images=[image]), {"role": "assistant", "tool_calls": [call]}]
    async with AsyncClient(server.url) as ours, ollama.AsyncClient(server.url) as theirs:
        for client in (theirs, ours):
            await client.chat("m", messages, options=ollama.Options(seed=1))
        first, second = (request.json() for request in server.requests)
        assert second["messages"] == first["messages"]
        assert base64.b64decode(second["messages"][0]["images"][0]) == b"abc"
        for call_of in (
            lambda client: client.chat("m", [{"role": "user", "content": "x"}]),
            lambda client: client.generate("m", "x"),
            lambda client: client.ps(),
        ):
            assert keys(await call_of(ours)) == keys(await call_of(theirs))
