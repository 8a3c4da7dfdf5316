"""``Agent``: a model, its tools, and the terms on which they work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import httpx

from ollama_async._call.condition import Condition, Predicate
from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._client import AsyncClient, Messages
from ollama_async._errors import RequestError, shown
from ollama_async._model.input import model_name, sequence
from ollama_async._secret import showable
from ollama_async.pool import Pool
from ollama_async.pool._pool import check_talk

from ._run import AgentRun, Setup
from ._tools import AgentTool, Approval, Terms

__all__ = ["Agent"]

_NOT_GIVEN: Final = object()
# Thirty years.
_ENDLESS = 1e9
_OF_THE_RUN = ("messages", "stream", "token", "until")


@showable
class Agent(LiveObject):
    """A model that calls tools until it has answered.

    Each turn is one answer of the model and the tools that it calls. They run at the same time: ``async`` functions as
    tasks, others in threads. An agent has no state: it can run any number of conversations at once.

    Args:
        client: An ``AsyncClient`` or a ``Pool``.
        model: Name of the model.
        tools: Functions, methods of objects, or objects that can be called. A parameter that is annotated as a
            ``CancelToken`` gets the token of the call; the model does not see it.
        name: Name of the agent, for telemetry.
        system: System prompt before each conversation; it is not in the messages of the result.
        max_turns: How many turns a run may have.
        max_tokens: How many tokens the model may write in a run, its thinking included.
        timeout: As ``AsyncClient`` takes it: ``total`` limits the whole run, the other limits each call of the model.
        tool_timeout: Seconds that one tool may take.
        grace: Seconds that a tool gets to end after it was stopped. What still runs then is left, and said so.
        approve: Called with each ``ToolCall`` before it is run; returns True, False, or a text that tells the model why
            not; may be ``async``. It is asked about one call at a time.
        on_tool_error: Whether the model reads what went wrong with a tool (``"feed"``), or the run ends (``"raise"``).
        **options: Further parameters of ``client.chat()``: ``think``, ``options``, ``keep_alive``, ``format`` ...

    Raises:
        RequestError: A parameter is of the wrong kind, a tool has no schema, or two tools have the same name.
    """

    def __init__(
        self,
        client: AsyncClient | Pool,
        model: str,
        tools: Sequence[Any] = (),
        *,
        name: str | None = None,
        system: str | None = None,
        max_turns: int = 10,
        max_tokens: int | None = None,
        timeout: Timeouts | httpx.Timeout | float | object | None = _NOT_GIVEN,
        tool_timeout: float | None = None,
        grace: float = 1.0,
        approve: Approval | None = None,
        on_tool_error: Literal["feed", "raise"] = "feed",
        **options: Any,
    ) -> None:
        for reserved in _OF_THE_RUN:
            if reserved in options:
                raise RequestError(f"an agent takes no {reserved}=: give run() the messages, token= and until=")
        if on_tool_error not in ("feed", "raise"):
            raise RequestError(f"on_tool_error={shown(on_tool_error)}: give 'feed' or 'raise'")
        check_talk(client, system)
        if approve is not None and not callable(approve):
            raise RequestError(f"approve={shown(approve)}: give a function of a ToolCall, or None")
        made = [AgentTool(tool) for tool in sequence(tools, "tools")]
        by_name = {tool.name: tool for tool in made}
        if len(by_name) < len(made):
            raise RequestError("two tools have the same name: the model could not tell them apart")
        self._setup = Setup(
            client=client,
            model=model_name(model),
            name=name,
            system=system,
            max_turns=_count("max_turns", max_turns),
            max_tokens=None if max_tokens is None else _count("max_tokens", max_tokens),
            timeouts=None if timeout is _NOT_GIVEN else Timeouts.of(timeout),  # type: ignore[arg-type]
            options=options,
            terms=Terms(
                tools=by_name,
                approve=approve,
                on_tool_error=on_tool_error,
                tool_timeout=None if tool_timeout is None else _seconds("tool_timeout", tool_timeout),
                grace=_seconds("grace", grace),
            ),
        )

    def run(
        self, messages: Messages, *, token: CancelToken | None = None, until: Condition | Predicate | None = None
    ) -> AgentRun:
        """Let the model answer a conversation.

        Nothing is sent before the run is first iterated, awaited or entered.

        Args:
            messages: The conversation so far, such as the messages of an earlier result; a ``str`` is one message of
                the user. It is not changed.
            token: Stops the model and every tool.
            until: As in ``AsyncClient.chat``, for each answer of the model by itself. When it is met the run ends
                normally, with the outcome ``"until"``; tools that the answer calls are not begun.

        Returns:
            The run: iterate over it for events, or await it for the result.

        Server: ``POST /api/chat``, once a turn
        """
        return AgentRun(self._setup, messages, token, until)

    def __repr__(self) -> str:
        setup = self._setup
        return f"<Agent {setup.name or setup.model}: {', '.join(setup.terms.tools) or 'no tools'}>"


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name}={shown(value)}: give an int of 1 or more")
    return value


def _seconds(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < _ENDLESS:
        raise RequestError(f"{name}={shown(value)}: give a number of seconds")
    return value
