"""One framework on one client: ``python conformance.py FRAMEWORK original|ours [ROUNDS]``; prints its findings as JSON.

``ours`` is ``ollama_async.interop`` for what is built on ollama-python, and ``DirectTransport`` for what is built on
httpx2. Either client has a pool of one place, where it has a pool. Each finding is what the server saw, on a FakeOllama
that answers without an end; the garbage collector is off. A connection counts as open if the client has not left it two
seconds after the task that read it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import random
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ollama_async import CancelToken
from ollama_async.testing import Endless, FakeOllama, Reply

ROUNDS = 120
BOUND = 2.0  # seconds
MODEL = "fake"
PATHS = ("/api/chat", "/v1/chat/completions", "/v1/messages")

Stream = Callable[[], AsyncIterator[object]]
Use = Callable[[], Awaitable[object]]


@dataclass
class Framework:
    """How a framework is used.

    Attributes:
        stream: Begins a streamed answer and returns its texts.
        uses: What it is typically used for; each returns what its caller makes of the answer.
        with_token: Begins a streamed answer under the token of this call, where the framework passes keywords on.
        read: Reads a streamed answer, where the framework does that itself.
    """

    stream: Stream
    uses: dict[str, Use]
    with_token: Callable[[CancelToken], AsyncIterator[object]] | None = None
    read: Use | None = None


# -- built on ollama-python --


def langchain_ollama(url: str) -> Framework:
    from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

    model = ChatOllama(model=MODEL, base_url=url)

    async def stream(**options: Any) -> AsyncIterator[object]:
        async for part in model.astream("hi", **options):
            yield part.content

    async def answer() -> object:
        return (await model.ainvoke("hi")).content

    async def tool() -> object:
        return [(call["name"], call["args"]) for call in (await model.bind_tools([weather]).ainvoke("hi")).tool_calls]

    async def structured() -> object:
        return await model.with_structured_output(SCHEMA).ainvoke("hi")

    return Framework(
        stream,
        {
            "answer": answer,
            "tool": tool,
            "structured": structured,
            "completion": lambda: OllamaLLM(model=MODEL, base_url=url).ainvoke("hi"),
            "embedding": lambda: OllamaEmbeddings(model=MODEL, base_url=url).aembed_query("hi"),
        },
        lambda token: stream(token=token),
    )


def llama_index(url: str) -> Framework:
    import ollama
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.ollama import OllamaEmbedding
    from llama_index.llms.ollama import Ollama

    model = Ollama(model=MODEL, context_window=4096, async_client=ollama.AsyncClient(url))

    async def stream() -> AsyncIterator[object]:
        async for part in await model.astream_chat([ChatMessage("hi")]):
            yield part.delta

    async def answer() -> object:
        return (await model.achat([ChatMessage("hi")])).message.content

    async def tool() -> object:
        told = await model.achat_with_tools([FunctionTool.from_defaults(weather)], user_msg="hi")
        return [(call.tool_name, call.tool_kwargs) for call in model.get_tool_calls_from_response(told)]

    return Framework(
        stream,
        {
            "answer": answer,
            "tool": tool,
            "completion": lambda: model.acomplete("hi"),
            "embedding": lambda: OllamaEmbedding(MODEL, base_url=url).aget_query_embedding("hi"),
        },
    )


def ollama_haystack(url: str) -> Framework:
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from haystack_integrations.components.embedders.ollama import OllamaTextEmbedder
    from haystack_integrations.components.generators.ollama import OllamaChatGenerator

    async def stream() -> AsyncIterator[object]:
        # It calls back for each chunk, so the loop over them is its own.
        parts: asyncio.Queue[Any] = asyncio.Queue()
        running = asyncio.ensure_future(ask(streaming_callback=parts.put))
        try:
            while not running.done() or not parts.empty():
                getting = asyncio.ensure_future(parts.get())
                try:
                    await asyncio.wait([running, getting], return_when=asyncio.FIRST_COMPLETED)
                    if getting.done():
                        yield getting.result().content
                finally:
                    getting.cancel()
            await running
        finally:
            running.cancel()

    model = OllamaChatGenerator(model=MODEL, url=url)

    async def ask(**options: Any) -> Any:
        return (await model.run_async([ChatMessage.from_user("hi")], **options))["replies"][0]

    async def answer() -> object:
        return (await ask()).text

    async def tool() -> object:
        told = await ask(tools=[create_tool_from_function(weather)])
        return [(call.tool_name, call.arguments) for call in told.tool_calls]

    async def embedding() -> object:
        return (await OllamaTextEmbedder(model=MODEL, url=url).run_async("hi"))["embedding"]

    async def ignore(_: object) -> None:
        pass

    return Framework(
        stream,
        {"answer": answer, "tool": tool, "embedding": embedding},
        read=lambda: ask(streaming_callback=ignore),
    )


def autogen_ext(url: str) -> Framework:
    from autogen_core.models import UserMessage
    from autogen_core.tools import FunctionTool
    from autogen_ext.models.ollama import OllamaChatCompletionClient

    about = {
        "vision": False,
        "function_calling": True,
        "json_output": False,
        "family": "x",
        "structured_output": False,
    }
    model = OllamaChatCompletionClient(model=MODEL, host=url, model_info=about)
    messages = [UserMessage(content="hi", source="user")]

    async def stream() -> AsyncIterator[object]:
        async for part in model.create_stream(messages):
            yield part if isinstance(part, str) else part.content

    async def answer() -> object:
        return (await model.create(messages)).content

    async def tool() -> object:
        told = await model.create(messages, tools=[FunctionTool(weather, "the weather")])
        return [(call.name, json.loads(call.arguments)) for call in told.content]

    return Framework(stream, {"answer": answer, "tool": tool})


def agno(url: str) -> Framework:
    from agno.agent import Agent
    from agno.knowledge.embedder.ollama import OllamaEmbedder
    from agno.models.ollama import Ollama

    def agent(**options: Any) -> Any:
        tools = options.pop("tools", None)
        return Agent(model=Ollama(id=MODEL, host=url, **options), telemetry=False, tools=tools)

    one = agent()

    async def stream(one: Any = one) -> AsyncIterator[object]:
        async for event in one.arun("hi", stream=True):
            # It catches each exception, and tells of it in an event.
            if type(event).__name__ == "RunErrorEvent":
                raise Told(type(event).__name__)
            yield event.content

    async def answer() -> object:
        told = await one.arun("hi")
        if told.status.name == "error":
            raise Told("RunStatus.error")
        return told.content

    async def tool() -> object:
        called: list[object] = []

        def weather(city: str) -> str:
            """Tell the weather."""
            called.append(city)
            return "sunny"

        await agent(tools=[weather]).arun("hi")
        return called

    return Framework(
        stream,
        {
            "answer": answer,
            "tool": tool,
            "embedding": lambda: OllamaEmbedder(id=MODEL, host=url, dimensions=8).async_get_embedding("hi"),
        },
        lambda token: stream(agent(request_params={"token": token})),
    )


def strands_agents(url: str) -> Framework:
    from strands.models.ollama import OllamaModel

    async def stream(tools: Any = None, **options: Any) -> AsyncIterator[object]:
        model = OllamaModel(url, model_id=MODEL, **options)
        async for event in model.stream([{"role": "user", "content": [{"text": "hi"}]}], tools):
            yield event.get("contentBlockDelta", {}).get("delta", {}).get("text", "")

    async def answer() -> object:
        return "".join([part async for part in stream()])

    async def tool() -> object:
        spec = {"name": "weather", "description": "the weather", "inputSchema": {"json": SCHEMA}}
        model = OllamaModel(url, model_id=MODEL)
        events = model.stream([{"role": "user", "content": [{"text": "hi"}]}], [spec])
        starts = [event["contentBlockStart"]["start"] async for event in events if "contentBlockStart" in event]
        return [start["toolUse"]["name"] for start in starts if "toolUse" in start]

    return Framework(stream, {"answer": answer, "tool": tool}, lambda token: stream(additional_args={"token": token}))


def any_llm_sdk(url: str) -> Framework:
    from any_llm import AnyLLM

    messages: Any = [{"role": "user", "content": "hi"}]
    model = AnyLLM.create("ollama", api_base=url)

    async def stream() -> AsyncIterator[object]:
        chunks: Any = await model.acompletion(MODEL, messages, stream=True)
        async for chunk in chunks:
            yield chunk.choices[0].delta.content

    async def ask(**options: Any) -> Any:
        return (await model.acompletion(MODEL, messages, **options)).choices[0].message

    async def answer() -> object:
        return (await ask()).content

    async def tool() -> object:
        told = await ask(tools=[OPENAI_TOOL])
        return [(call.function.name, json.loads(call.function.arguments)) for call in told.tool_calls]

    async def embedding() -> object:
        return (await model.aembedding(MODEL, "hi")).data[0].embedding

    return Framework(stream, {"answer": answer, "tool": tool, "embedding": embedding})


def semantic_kernel(url: str) -> Framework:
    from semantic_kernel.connectors.ai.ollama import (
        OllamaChatCompletion,
        OllamaChatPromptExecutionSettings,
        OllamaTextEmbedding,
    )
    from semantic_kernel.contents import ChatHistory

    model = OllamaChatCompletion(ai_model_id=MODEL, host=url)
    history = ChatHistory()
    history.add_user_message("hi")
    settings = OllamaChatPromptExecutionSettings()

    async def stream() -> AsyncIterator[object]:
        async for part in model.get_streaming_chat_message_content(history, settings):
            yield part and part.content

    async def answer() -> object:
        told = await model.get_chat_message_content(history, settings)
        return told and told.content

    async def embedding() -> object:
        vectors = await OllamaTextEmbedding(ai_model_id=MODEL, host=url).generate_embeddings(["hi"])
        return [float(value) for value in vectors[0]]

    return Framework(stream, {"answer": answer, "embedding": embedding})


# -- built on httpx2 --


def over_httpx2() -> Any:
    """Return a client of httpx2: as it comes, or over our transport."""
    import httpx2

    if OURS:
        from ollama_async.httpx2 import DirectTransport

        return httpx2.AsyncClient(transport=DirectTransport(close_on_cancel=True), timeout=BOUND)
    return httpx2.AsyncClient(limits=httpx2.Limits(max_connections=1), timeout=BOUND)


def openai_client(url: str) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{url}/v1", api_key="ollama", http_client=over_httpx2())


def openai(url: str) -> Framework:
    client = openai_client(url)
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}

    async def stream() -> AsyncIterator[object]:
        # Its stream is left open by `break`, with any client, unless it is closed.
        async with await client.chat.completions.create(**asked, stream=True) as parts:
            async for part in parts:
                yield part.choices[0].delta.content

    async def answer() -> object:
        return (await client.chat.completions.create(**asked)).choices[0].message.content

    async def tool() -> object:
        told = (await client.chat.completions.create(**asked, tools=[OPENAI_TOOL])).choices[0].message
        return [(call.function.name, json.loads(call.function.arguments)) for call in told.tool_calls]

    return Framework(stream, {"answer": answer, "tool": tool})


def anthropic(url: str) -> Framework:
    from anthropic import AsyncAnthropic

    client = AsyncAnthropic(base_url=url, api_key="ollama", http_client=over_httpx2())
    asked: Any = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}

    async def stream() -> AsyncIterator[object]:
        async with await client.messages.create(**asked, stream=True) as events:
            async for event in events:
                yield event.delta.text if event.type == "content_block_delta" else ""

    async def answer() -> object:
        return (await client.messages.create(**asked)).content[0].text

    return Framework(stream, {"answer": answer})


def pydantic_ai(url: str) -> Framework:
    from pydantic_ai import Agent
    from pydantic_ai.models.ollama import OllamaModel
    from pydantic_ai.providers.ollama import OllamaProvider

    agent = Agent(OllamaModel(MODEL, provider=OllamaProvider(openai_client=openai_client(url))))

    async def stream() -> AsyncIterator[object]:
        async with agent.run_stream("hi") as told:
            async for part in told.stream_text(delta=True, debounce_by=None):
                yield part

    async def answer() -> object:
        return (await agent.run("hi")).output

    return Framework(stream, {"answer": answer})


def openai_agents(url: str) -> Framework:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled

    set_tracing_disabled(True)
    agent = Agent(name="x", model=OpenAIChatCompletionsModel(MODEL, openai_client(url)))

    async def stream() -> AsyncIterator[object]:
        # Leaving its events does not end its run, as its documentation says.
        run = Runner.run_streamed(agent, "hi")
        try:
            async for event in run.stream_events():
                yield getattr(getattr(event, "data", None), "delta", "")
        finally:
            run.cancel()

    async def answer() -> object:
        return (await Runner.run(agent, "hi")).final_output

    return Framework(stream, {"answer": answer})


def instructor(url: str) -> Framework:
    import instructor as package
    from pydantic import BaseModel

    class City(BaseModel):
        city: str

    client = package.from_openai(openai_client(url), mode=package.Mode.JSON)
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_retries": 1}

    async def stream() -> AsyncIterator[object]:
        async for part in client.create_partial(**asked, response_model=City):
            yield str(part)

    async def structured() -> object:
        return (await client.create(**asked, response_model=City)).city

    return Framework(stream, {"structured": structured})


FRAMEWORKS: dict[str, Callable[[str], Framework]] = {
    "langchain-ollama": langchain_ollama,
    "llama-index": llama_index,
    "ollama-haystack": ollama_haystack,
    "autogen-ext": autogen_ext,
    "agno": agno,
    "strands-agents": strands_agents,
    "any-llm-sdk": any_llm_sdk,
    "semantic-kernel": semantic_kernel,
    "openai": openai,
    "anthropic": anthropic,
    "pydantic-ai": pydantic_ai,
    "openai-agents": openai_agents,
    "instructor": instructor,
}
OURS = False


class Told(Exception):
    """A framework has told of an error otherwise than by an exception."""


# -- what the server answers --


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return city


SCHEMA = {
    "title": "weather",
    "description": "Tell the weather.",
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
OPENAI_TOOL = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": SCHEMA}}
LIMA = {"city": "Lima"}


def event(kind: str, **data: object) -> bytes:
    """Return an event of Anthropic's API."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def messages(*steps: object) -> Reply:
    """Return an answer of Anthropic's API."""
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": "m", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": None, "usage": usage}
    begin = [
        event("message_start", message={**message, "content": []}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    ]
    end = [event("content_block_stop", index=0), event("message_stop")]
    whole = {**message, "stop_reason": "end_turn", "content": [{"type": "text", "text": "one two"}]}
    return Reply([*begin, *steps, *end], headers={"Content-Type": "text/event-stream"}, whole=whole)  # type: ignore[list-item]


def delta(text: str) -> bytes:
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def openai_event(n: int) -> bytes:
    # The beginning of an object, for frameworks that parse an answer as it arrives.
    content = f"{n} " if n else '{"city": "'
    choice = {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n".encode()


def answer_without_end(server: FakeOllama) -> None:
    server.forget()
    server.script("/api/chat", Reply.endless_chat(0.001), always=True)
    events = {"Content-Type": "text/event-stream"}
    server.script("/v1/chat/completions", Reply([Endless(openai_event, 0.001)], headers=events), always=True)
    server.script("/v1/messages", messages(Endless(lambda n: delta(f"{n} "), 0.001)), always=True)


def answer_use(server: FakeOllama, use: str) -> None:
    """Answer as that use expects."""
    server.forget()
    call = {"function": {"name": "weather", "arguments": LIMA}}
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(LIMA)}}
    # Some take nothing but an object.
    texts = ['{"city": ', '"Lima"}'] if use in ("structured", "stream") else ["one ", "two"]
    if use == "error":
        for path in PATHS:
            server.script(path, Reply.error(404, "model 'fake' not found"), always=True)
        return
    calls = (Reply.chat(tool_calls=[call]), Reply.openai_chat(tool_calls=[called]))
    plain = (Reply.chat(*texts), Reply.openai_chat(*texts))
    # An agent asks once more, with what the tool has returned.
    for path, first, rest in zip(PATHS, calls if use == "tool" else plain, plain, strict=False):
        server.script(path, first)
        server.script(path, rest, always=True)
    server.script("/api/generate", Reply.generate(*texts), always=True)
    server.script("/v1/messages", messages(*map(delta, texts)), always=True)


# -- the checks --


@dataclass
class Cancelled:
    """What cancellations have left."""

    open: int = 0
    refused: int = 0


@dataclass
class Conformance:
    """The checks of one framework."""

    server: FakeOllama
    make: Callable[[str], Framework]
    rounds: int
    # Those that have lost the place of their pool: their collection would close what they have left open.
    kept: list[Framework] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.framework = self.make(self.server.url)

    async def read(self) -> None:
        if self.framework.read is not None:
            await self.framework.read()
            return
        async for _ in self.framework.stream():
            pass

    def begin_anew(self) -> None:
        self.kept.append(self.framework)
        self.framework = self.make(self.server.url)

    async def left_open(self, before: int) -> int:
        """Count the connections since then that the client has not left in time."""
        records = self.server.connections[before:]
        until = time.monotonic() + BOUND
        while any(record.open for record in records) and time.monotonic() < until:
            await asyncio.sleep(0.005)
        return sum(record.open for record in records)

    async def uses(self) -> dict[str, str]:
        """Tell what each use gives."""
        self.begin_anew()
        told = {}
        for use, ask in {**self.framework.uses, "stream": self.text, "error": self.text}.items():
            answer_use(self.server, use)
            try:
                async with asyncio.timeout(10 * BOUND):
                    told[use] = str(await ask())
            except Exception as exc:
                told[use] = "; ".join(sorted(public_classes(exc)))
        return told

    async def text(self) -> str:
        return "".join([str(part or "") async for part in self.framework.stream()])

    async def cancelled(self, times: int) -> Cancelled:
        """Cancel a reader at random moments, in every second round only once its request has arrived."""
        moments = random.Random(times)
        found = Cancelled()
        self.begin_anew()
        before = len(self.server.connections)
        for turn in range(self.rounds):
            if not await self.cancel(times, moments, gated=turn % 2 == 0):
                # The place of the pool is lost.
                found.refused += 1
                self.begin_anew()
                await self.cancel(times, moments, gated=True)
        found.open = await self.left_open(before)
        return found

    async def cancel(self, times: int, moments: random.Random, *, gated: bool) -> bool:
        """Tell whether the request arrived; ``True`` for a round that does not wait for it."""
        asked = len(self.server.requests)
        reading = asyncio.ensure_future(self.read())
        until = time.monotonic() + BOUND
        while gated and len(self.server.requests) == asked and not reading.done() and time.monotonic() < until:
            await asyncio.sleep(0)
        arrived = not gated or len(self.server.requests) > asked
        await asyncio.sleep(moments.uniform(0, 0.01))
        for _ in range(times):
            reading.cancel()
            for _ in range(moments.randrange(3)):
                await asyncio.sleep(0)
        await asyncio.wait([reading], timeout=BOUND)
        return arrived

    async def timed_out(self) -> int:
        """Count the connections that stay open after a timeout."""
        self.begin_anew()
        before = len(self.server.connections)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.read()
        return await self.left_open(before)

    async def broken_off(self) -> int:
        """Count the connections that stay open after `break`, with the generator closed."""
        before = len(self.server.connections)
        parts = self.framework.stream()
        async for _ in parts:
            break
        await parts.aclose()  # type: ignore[attr-defined]
        return await self.left_open(before)

    async def stopped(self) -> str:
        """Tell what a caller gets inside `token.scope()`."""
        token = CancelToken()

        async def ask() -> None:
            with token.scope():
                await self.read()

        return await self.told(ask(), token)

    async def stopped_by_its_token(self) -> str | None:
        """Tell what a caller gets whose call has a token."""
        token = CancelToken()
        if not OURS or self.framework.with_token is None:
            return None
        parts = self.framework.with_token(token)

        async def ask() -> None:
            async for _ in parts:
                pass

        return await self.told(ask(), token)

    async def told(self, asked: Any, token: CancelToken) -> str:
        before = len(self.server.connections)
        asyncio.get_running_loop().call_later(0.2, token.abort, "stop")
        told = "nothing"
        try:
            async with asyncio.timeout(2 * BOUND):
                await asked
        except Told as exc:
            told = str(exc)
        except Exception as exc:
            told = type(exc).__name__
        left_open = await self.left_open(before)
        return told if not left_open else f"{told}, connection open"


def public_classes(error: BaseException) -> set[str]:
    """Return the classes by which a program for the framework could catch an error; ours are additions to them."""
    own = (object, BaseException, Exception)
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__ if kind not in own}
    return {name for name in names if not name.startswith("ollama_async.")}


async def check(make: Callable[[str], Framework], server: FakeOllama, rounds: int) -> dict[str, object]:
    checks = Conformance(server, make, rounds)
    # What they log, warn of or retry is not asked here.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    found: dict[str, object] = {"uses": await checks.uses()}
    if rounds:
        gc.collect()
        gc.disable()
        answer_without_end(server)
        for times, name in ((1, "once"), (2, "twice")):
            found[name] = vars(await checks.cancelled(times))
        found |= {
            "timeout": await checks.timed_out(),
            "break": await checks.broken_off(),
            "scope": await checks.stopped(),
            "token": await checks.stopped_by_its_token(),
        }
    return found


def give_one_place() -> None:
    """Give each client of ollama-python a pool of one place."""
    import httpx
    import ollama

    client: Any = ollama.AsyncClient
    made = client.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **{"limits": httpx.Limits(max_connections=1), **options})

    client.__init__ = init


def main() -> None:
    global OURS
    framework, client, rounds = sys.argv[1], sys.argv[2], int((*sys.argv[3:], ROUNDS)[0])
    OURS = client == "ours"
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("ollama") is not None:
        if OURS:
            from ollama_async import interop

            interop.install()
        else:
            give_one_place()
    with FakeOllama(models=[MODEL]) as server:
        print(json.dumps(asyncio.run(check(FRAMEWORKS[framework], server, rounds))))


if __name__ == "__main__":
    main()
