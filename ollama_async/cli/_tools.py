"""Tools in a chat: functions by their names, and a run of an agent as the stream that a screen shows."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import typer

from ollama_async._call.stream import Timing
from ollama_async._errors import OllamaError, RequestError
from ollama_async._model.types import ChatResponse, Message, ToolCall
from ollama_async.agent import AgentRun, Text, Thinking, ToolFinished, ToolStarted
from ollama_async.agent._tools import AgentTool, tool_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from ollama_async.agent import AgentEvent, RunOutcome

__all__ = ["AgentStream", "load_tools"]


def load_tools(names: Sequence[str], option: str) -> list[Any]:
    """Import functions that are named ``module:function``; modules may lie in the current folder."""
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return [_load(name, option) for name in names]


def _load(name: str, option: str) -> Any:
    module, _, function = name.partition(":")
    if not module or not function:
        raise typer.BadParameter(f"{name!r}: write it as module:function", param_hint=option)
    try:
        tool = getattr(importlib.import_module(module), function)
        AgentTool(tool)
    except RequestError as exc:
        raise typer.BadParameter(f"{name}: {exc}", param_hint=option) from exc
    except Exception as exc:
        # Importing runs the module, which may fail in any way.
        raise typer.BadParameter(f"cannot load {name}: {type(exc).__name__}: {exc}", param_hint=option) from exc
    return tool


class AgentStream:
    """A run of an agent, as the stream of an answer: calls of tools and their results are chunks, too.

    It delivers all that it has: after a stop, what the model had written and the tools that have no result come before
    the error.

    Attributes:
        text: What the model has answered so far, in all turns.
    """

    def __init__(self, run: AgentRun) -> None:
        self._run = run
        # The earlier messages are not part of the answer.
        self._before = len(run.result.messages)
        self._times: list[float] = [time.monotonic()]
        self.text: str = ""
        self._begun: list[ToolCall] = []
        self._over: list[ToolCall] = []
        self._ready: deque[Message] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatResponse:
        while not self._ready:
            try:
                self._ready.extend(self._messages(await anext(self._run)))
            except (OllamaError, StopAsyncIteration):
                # It is raised again, behind what is left.
                self._ready.extend(self._rest())
                if not self._ready:
                    raise
        message = self._ready.popleft()
        self._times.append(time.monotonic())
        self.text += (message.content or "") if message.role == "assistant" else ""
        return ChatResponse(message=message)

    def abort(self, reason: object = None) -> bool:
        """Stop the model and all tools, before this returns; from anywhere."""
        return self._run.abort(reason)

    async def aclose(self) -> None:
        """Stop it, and wait for the tools."""
        await self._run.aclose()

    @property
    def response(self) -> ChatResponse | None:
        """The last answer of the model."""
        return self._run.result.response

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, with the tools' calls and results."""
        return self._run.result.messages

    @property
    def outcome(self) -> RunOutcome | None:
        """How it ended."""
        return self._run.outcome

    @property
    def reason(self) -> object:
        """Why it ended."""
        return self._run.result.reason

    @property
    def timing(self) -> Timing:
        """How fast it came; the tools' time is part of it."""
        began, *chunks = self._times
        first = chunks[0] - began if chunks else None
        span = chunks[-1] - chunks[0] if len(chunks) > 1 else 0.0
        return Timing(first, self._times[-1] - began, len(chunks), (len(chunks) - 1) / span if span > 0 else None)

    def _messages(self, event: AgentEvent) -> list[Message]:
        match event:
            case Text(text=text):
                return [Message(role="assistant", content=text)]
            case Thinking(text=text):
                return [Message(role="assistant", thinking=text)]
            case ToolStarted(call=call):
                return self._called(call)
            case ToolFinished(call=call, content=content, outcome=outcome):
                self._over.append(call)
                return [*self._called(call), tool_message(call, content, outcome)]
            case _:
                return []

    def _called(self, call: ToolCall) -> list[Message]:
        """Return the call, once: what was refused has not been begun."""
        if any(call is begun for begun in self._begun):
            return []
        self._begun.append(call)
        return [Message(role="assistant", tool_calls=[call])]

    def _rest(self) -> list[Message]:
        """Return what the run has come to, and has not told as events."""
        added = self.messages[self._before :]
        text = "".join(message.content or "" for message in added if message.role == "assistant")[len(self.text) :]
        rest = [Message(role="assistant", content=text)] if text else []
        answers = [message for message in added if message.role == "tool"]
        calls = [call for message in added for call in message.tool_calls or ()]
        for call, answer in zip(calls, answers, strict=True):
            if not any(call is over for over in self._over):
                self._over.append(call)
                rest += [*self._called(call), answer]
        return rest
