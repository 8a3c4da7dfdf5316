"""What callers' type checkers are told; never run, but read by mypy and pyright with the package."""

from collections.abc import Coroutine
from datetime import datetime
from typing import Any, assert_type

from pydantic import BaseModel

import ollama_async
from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ChatResponse,
    GenerateResponse,
    Image,
    ListResponse,
    Message,
    Options,
    ProgressResponse,
    Stream,
    Timeouts,
    Tool,
)


class City(BaseModel):
    name: str


def add(a: int, b: int) -> int:
    return a + b


async def answers(client: AsyncClient, token: CancelToken, either: bool) -> None:
    reply = await client.chat("m", "hi", token=token, timeout=Timeouts(idle=3))
    assert_type(reply, ChatResponse)
    for call in reply.message.tool_calls or ():
        assert_type(call, Message.ToolCall)
        assert_type(call.function.arguments, dict[str, Any])
    stream = client.chat("m", "hi", stream=True, until=lambda so_far: so_far.done)
    assert_type(stream, Stream[ChatResponse])
    assert_type(await stream, Stream[ChatResponse])
    assert_type(await stream.collect(), ChatResponse)
    async for chunk in await client.chat(model="m", messages=[Message(role="user", content="hi")], stream=True):
        assert_type(chunk, ChatResponse)
    async with client.generate("m", "hi", stream=True) as opened:
        assert_type(opened, Stream[GenerateResponse])
    assert_type(await client.generate("m", "hi"), GenerateResponse)
    assert_type(client.chat("m", "hi", stream=either), Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse])
    assert_type(
        client.generate("m", "hi", stream=either), Coroutine[Any, Any, GenerateResponse] | Stream[GenerateResponse]
    )


async def reasons(client: AsyncClient, token: CancelToken) -> None:
    stream = client.chat("m", "hi", stream=True, token=token)
    assert_type(stream.reason, object)
    assert_type(token.reason, object)
    assert_type(AbortError("stop").reason, object)


async def parsed(client: AsyncClient) -> None:
    reply = await client.chat("m", "hi", format=City)
    assert_type(reply.parsed, City)
    assert_type(reply.text, str)
    reply.parsed.no_such_field  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert_type((await client.generate("m", "hi", format=City)).parsed.name, str)
    assert_type((await client.chat("m", "hi", format=City, stream=True).collect()).parsed, City)
    async for chunk in client.generate("m", "hi", format=City, stream=True, think=False):
        assert_type(chunk.text, str)


async def steps(client: AsyncClient, either: bool) -> None:
    assert_type(await client.pull("m"), ProgressResponse)
    assert_type(client.pull("m", stream=True), Stream[ProgressResponse])
    for started in (
        client.pull("m", stream=either, resume=True),
        client.push("m", stream=either),
        client.create("m", from_="n", stream=either),
    ):
        assert_type(started, Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse])


def misspelt() -> None:
    # An error for both; an ignore that nothing needs is one for mypy.
    ollama_async.ListRespons  # type: ignore[attr-defined]


def row(model: ListResponse.Model) -> tuple[str | None, datetime | None]:
    return model.name, model.modified_at


async def parameters(client: AsyncClient, history: list[dict[str, str]], messages: list[Message]) -> None:
    await client.chat("m", history)
    await client.chat("m", messages)
    await client.chat("m", [{"role": "user", "content": "hi", "images": [b"png"]}, messages[0]])
    await client.chat("m", tools=[add, City, Tool(), {"type": "function"}], format=City, options={"seed": 1})
    await client.generate("m", images=["a.png", b"png", Image(value="a.png")], options=Options(seed=1), think="low")
