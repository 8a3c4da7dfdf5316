"""An agent on a real Ollama server: a stop, and the conversation that is left, with its marks, goes on there."""

from __future__ import annotations

import asyncio

import pytest
from real.ollama_server import RealOllama

from ollama_async import AbortError, AsyncClient, Message, ToolCall
from ollama_async.agent import Agent, Text

pytestmark = pytest.mark.real

LIMIT = 60.0
CALL = ToolCall(id="1", function=ToolCall.Function(name="weather", arguments={"city": "Lima"}))
MESSAGES = [
    Message(role="user", content="What is the weather in Lima?"),
    Message(role="assistant", content="I look.", tool_calls=[CALL]),
    Message(role="tool", content="aborted", tool_name="weather", tool_call_id="1").model_copy(
        update={"outcome": "aborted"}
    ),
]


# The server refuses tools for a model whose template does not show them.
TEMPLATE = (
    "{{ range .Messages }}{{ .Role }}: {{ .Content }}{{ range .ToolCalls }}"
    '{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}{{ end }}\n{{ end }}{{ .Tools }}'
)


def weather(city: str) -> str:
    """Tell the weather."""
    return f"{city}: 20 C"


async def test_an_agent_is_stopped_and_goes_on(real_ollama: RealOllama) -> None:
    before = real_ollama.client_connections()
    async with asyncio.timeout(LIMIT), AsyncClient(real_ollama.url) as client:
        await client.create("tiny-tools", from_=real_ollama.model, template=TEMPLATE)
        try:
            await stop_and_go_on(client, real_ollama, before)
        finally:
            await client.delete("tiny-tools")


async def stop_and_go_on(client: AsyncClient, real_ollama: RealOllama, connections: int) -> None:
    mark = real_ollama.mark()
    endless = Agent(client, "tiny-tools", [weather], options={"num_predict": -1, "num_thread": 1})
    run = endless.run(MESSAGES)
    with pytest.raises(AbortError) as caught:
        async for event in run:
            if isinstance(event, Text):
                run.abort("Stop")
                # With the loop standing still.
                real_ollama.wait_for_request_end(mark, "/api/chat", timeout=20)
                real_ollama.wait_for_connections(connections, timeout=20)
    kept = caught.value.partial
    assert (kept.messages[-1].role, kept.messages[-1].get("outcome")) == ("assistant", "aborted")
    brief = Agent(client, "tiny-tools", [weather], max_turns=1, options={"num_predict": 5, "seed": 1})
    result = await brief.run([*kept.messages, {"role": "user", "content": "Go on."}])
    assert result.outcome == "done"
    assert result.messages[: len(kept.messages)] == kept.messages
    assert result.usage.eval_count == 5
