"""``Agent``: chat, tool calls, chat, until the model has answered; one token stops all of it.

::

    agent = Agent(client, "llama3.2", tools=[weather])
    result = await agent.run("What is the weather in Lima?")

    async for event in agent.run(result.messages, token=token):
        match event:
            case Text(text=text): print(text, end="")
            case ToolStarted(call=call): print(call.function.name)
"""

from ._agent import Agent
from ._errors import (
    ApprovalError,
    LimitReached,
    ToolArgumentError,
    ToolError,
    ToolResultError,
    ToolTimeout,
    UnknownTool,
)
from ._events import (
    AgentEvent,
    AgentResult,
    Done,
    RunOutcome,
    Text,
    Thinking,
    ToolFinished,
    ToolOutcome,
    ToolStarted,
    TurnEnded,
    Usage,
)
from ._run import AgentRun

__all__ = [
    "Agent",
    "AgentEvent",
    "AgentResult",
    "AgentRun",
    "ApprovalError",
    "Done",
    "LimitReached",
    "RunOutcome",
    "Text",
    "Thinking",
    "ToolArgumentError",
    "ToolError",
    "ToolFinished",
    "ToolOutcome",
    "ToolResultError",
    "ToolStarted",
    "ToolTimeout",
    "TurnEnded",
    "UnknownTool",
    "Usage",
]
