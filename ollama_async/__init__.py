"""An asyncio-native streaming SDK for Ollama: every call can be aborted, and the socket is gone when it is."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._cancel import CancelToken, Registration
    from ._client import AsyncClient
    from ._errors import (
        AbortError,
        AuthenticationError,
        BadRequestError,
        ConnectError,
        ConnectionBroken,
        HostError,
        NoHost,
        NotFoundError,
        OllamaError,
        ParseError,
        PermissionDeniedError,
        PhaseTimeout,
        ProtocolError,
        RateLimitError,
        RequestError,
        ResponseError,
        ServerBusyError,
        ServerError,
        StreamBusy,
        StreamClosed,
        StreamError,
        StreamTruncated,
    )
    from ._input import Image
    from ._manage_types import (
        CloudStatus,
        CloudStatusResponse,
        ListedModel,
        ListResponse,
        LoadedModel,
        ModelDetails,
        ModelRecommendation,
        ProcessResponse,
        RecommendationsResponse,
        ShowResponse,
        Tensor,
        UserResponse,
        VersionResponse,
        WebFetchResponse,
        WebSearchResponse,
        WebSearchResult,
    )
    from ._options import Options
    from ._progress import Progress, ProgressResponse
    from ._stream import Stream, Timing
    from ._systemone import (
        SystemOneAnswer,
        SystemOneChoiceAnswer,
        SystemOneChoiceQuestion,
        SystemOneContent,
        SystemOneNoulAnswer,
        SystemOneNoulQuestion,
        SystemOneQuestion,
        SystemOneRequest,
        SystemOneResponse,
        SystemOneScoreAnswer,
        SystemOneScoreQuestion,
        SystemOneUsage,
    )
    from ._timeouts import Timeouts
    from ._tools import Tool, convert_function_to_tool, tool_schema
    from ._transport import DirectTransport
    from ._types import (
        ChatResponse,
        DebugInfo,
        EmbeddingsResponse,
        EmbedResponse,
        GenerateResponse,
        Logprob,
        Message,
        StatusResponse,
        TokenLogprob,
        ToolCall,
    )
    from .pool import Host, HostState, MapResult, Pool, PoolStream

__all__ = [
    "AbortError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "CancelToken",
    "ChatResponse",
    "CloudStatus",
    "CloudStatusResponse",
    "ConnectError",
    "ConnectionBroken",
    "DebugInfo",
    "DirectTransport",
    "EmbedResponse",
    "EmbeddingsResponse",
    "GenerateResponse",
    "Host",
    "HostError",
    "HostState",
    "Image",
    "ListResponse",
    "ListedModel",
    "LoadedModel",
    "Logprob",
    "MapResult",
    "Message",
    "ModelDetails",
    "ModelRecommendation",
    "NoHost",
    "NotFoundError",
    "OllamaError",
    "Options",
    "ParseError",
    "PermissionDeniedError",
    "PhaseTimeout",
    "Pool",
    "PoolStream",
    "ProcessResponse",
    "Progress",
    "ProgressResponse",
    "ProtocolError",
    "RateLimitError",
    "RecommendationsResponse",
    "Registration",
    "RequestError",
    "ResponseError",
    "ServerBusyError",
    "ServerError",
    "ShowResponse",
    "StatusResponse",
    "Stream",
    "StreamBusy",
    "StreamClosed",
    "StreamError",
    "StreamTruncated",
    "SystemOneAnswer",
    "SystemOneChoiceAnswer",
    "SystemOneChoiceQuestion",
    "SystemOneContent",
    "SystemOneNoulAnswer",
    "SystemOneNoulQuestion",
    "SystemOneQuestion",
    "SystemOneRequest",
    "SystemOneResponse",
    "SystemOneScoreAnswer",
    "SystemOneScoreQuestion",
    "SystemOneUsage",
    "Tensor",
    "Timeouts",
    "Timing",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "UserResponse",
    "VersionResponse",
    "WebFetchResponse",
    "WebSearchResponse",
    "WebSearchResult",
    "convert_function_to_tool",
    "tool_schema",
]


# Not for type checkers, which would take any misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Imported when something is first asked for: who imports this for its types, as a plugin (of pytest), or on the
        # way to something else does not pay for it. By statements, which those that pack programs can follow.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _client  # noqa: F401  (and with it all the others)

        _publish("cancel", "client", "errors", "input", "options", "progress")
        _publish("stream", "timeouts", "tools", "transport", "types")
        if name not in globals():
            # What only some endpoints take and give is half of all models, and of the time that it takes to make them.
            from . import _manage_types, _systemone  # noqa: F401

            _publish("manage_types", "systemone")
        if name not in globals():
            from . import pool

            globals().update({public: getattr(pool, public) for public in pool.__all__ if public in __all__})
        return globals()[name]


def _publish(*homes: str) -> None:
    for home in homes:
        module = sys.modules[f"{__name__}._{home}"]
        for public in set(module.__all__).intersection(__all__):
            globals().setdefault(public, getattr(module, public))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
