"""What a run tells while it goes on, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ollama_async._model.types import ChatResponse, Message, ToolCall
from ollama_async._secret import showable

from ._errors import ToolError

__all__ = [
    "AgentEvent",
    "AgentResult",
    "Done",
    "RunOutcome",
    "Text",
    "Thinking",
    "ToolFinished",
    "ToolOutcome",
    "ToolStarted",
    "TurnEnded",
    "Usage",
    "counted",
]

RunOutcome = Literal[
    "done", "stopped", "until", "limit", "aborted", "timeout", "cancelled", "closed", "truncated", "error"
]
ToolOutcome = Literal["done", "error", "denied", "timeout", "aborted"]


@dataclass(frozen=True, slots=True)
class Text:
    """A part of the model's answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """A part of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A tool begins to run: its arguments are valid, and the call is approved."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """A call of a tool is over. A call that was refused has no ``ToolStarted``.

    Attributes:
        call: The call.
        outcome: ``"done"``, ``"error"``, ``"denied"`` (by ``approve``), ``"timeout"`` or ``"aborted"``.
        content: What the model reads of it.
        error: What went wrong, if the outcome is ``"error"`` or ``"timeout"``.
        seconds: How long the tool ran.
        left: Whether it ignored its end for the grace period, and still runs.
    """

    call: ToolCall
    outcome: ToolOutcome
    content: str
    error: ToolError | None
    seconds: float
    left: bool


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """The model has answered, and the tools that it called are done.

    Attributes:
        turn: Number of the turn, from 1.
        response: What the model answered, merged, with the server's figures.
    """

    turn: int
    response: ChatResponse


@showable
@dataclass(frozen=True, slots=True)
class Usage:
    """What a run has used so far, as the server counts it at the end of each answer.

    Attributes:
        turns: Turns that were begun.
        tool_calls: Calls of tools that the model has asked for.
        prompt_eval_count: Tokens of all prompts.
        eval_count: Tokens of all answers; those of an answer that was stopped are unknown, and not in it.
        total_duration: Nanoseconds that the server took.
    """

    turns: int = 0
    tool_calls: int = 0
    prompt_eval_count: int = 0
    eval_count: int = 0
    total_duration: int = 0


def counted(usage: Usage, response: ChatResponse) -> Usage:
    """Return what has been used with one answer more."""
    return replace(
        usage,
        tool_calls=usage.tool_calls + len(response.message.tool_calls or ()),
        prompt_eval_count=usage.prompt_eval_count + (response.prompt_eval_count or 0),
        eval_count=usage.eval_count + (response.eval_count or 0),
        total_duration=usage.total_duration + (response.total_duration or 0),
    )


@showable
@dataclass(frozen=True, slots=True)
class AgentResult:
    """What a run came to, however it ended.

    Attributes:
        messages: The whole conversation, from the messages that were given. It is always valid: each call of a tool
            has its answer. A message that is not whole has ``message.outcome``, such as ``"aborted"``.
        outcome: ``"done"`` (the model has answered), ``"stopped"`` (by ``stop()``), ``"until"`` (its condition was
            met), ``"limit"``, ``"aborted"``, ``"timeout"``, ``"cancelled"``, ``"closed"`` (the loop was left),
            ``"truncated"`` or ``"error"``; ``None`` while it runs.
        reason: The object given to ``abort()`` or ``stop()``, the condition that was met, the limit or the phase that
            passed, or the error.
        usage: What it has used.
        response: The model's last answer, merged; perhaps a part of one.
        left: Calls of tools that ignored their end, and still ran after the grace period.
    """

    messages: list[Message] = field(repr=False)
    outcome: RunOutcome | None
    reason: object
    usage: Usage
    response: ChatResponse | None = field(repr=False)
    left: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text of the model's last answer."""
        return "" if self.response is None else self.response.text


@dataclass(frozen=True, slots=True)
class Done:
    """The run is over, and has its result."""

    result: AgentResult


AgentEvent: TypeAlias = Text | Thinking | ToolStarted | ToolFinished | TurnEnded | Done
