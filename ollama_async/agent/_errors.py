"""What ends a run, or a call of a tool, besides the errors of the model's answers."""

from __future__ import annotations

from ollama_async._errors import OllamaError
from ollama_async._model.types import ToolCall

__all__ = [
    "ApprovalError",
    "LimitReached",
    "ToolArgumentError",
    "ToolError",
    "ToolResultError",
    "ToolTimeout",
    "UnknownTool",
]


class LimitReached(OllamaError):
    """A run reached ``max_turns`` or ``max_tokens`` before the model had answered; ``partial`` is its result.

    Attributes:
        limit: ``"max_turns"`` or ``"max_tokens"``.
        value: The limit's value.
    """

    def __init__(self, limit: str, value: int) -> None:
        super().__init__(f"the run ended without an answer: {limit}={value} is reached; raise it, or run(messages) on")
        self.limit = limit
        self.value = value


class ToolError(OllamaError):
    """A call of a tool failed; what the tool raised is its ``__cause__``.

    Attributes:
        call: The call.
    """

    def __init__(self, message: str, call: ToolCall) -> None:
        super().__init__(message)
        self.call = call


class UnknownTool(ToolError, LookupError):
    """The model called a tool that the agent does not have."""


class ToolArgumentError(ToolError, ValueError):
    """The model called a tool with arguments that it does not take; it was not called."""


class ToolResultError(ToolError, TypeError):
    """A tool returned something that cannot be written as JSON."""


class ToolTimeout(ToolError, TimeoutError):
    """A tool did not finish within ``tool_timeout``."""


class ApprovalError(ToolError):
    """``approve()`` raised, or returned something else than a ``bool`` or a ``str``; the tool was not called."""
