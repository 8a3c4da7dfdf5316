"""An asyncio-native streaming SDK for Ollama: every call can be aborted, and the socket is gone when it is."""

from importlib import import_module
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
    "HostError",
    "Image",
    "ListResponse",
    "ListedModel",
    "LoadedModel",
    "Logprob",
    "Message",
    "ModelDetails",
    "ModelRecommendation",
    "NotFoundError",
    "OllamaError",
    "Options",
    "ParseError",
    "PermissionDeniedError",
    "PhaseTimeout",
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


# Imported when they are first asked for: what is imported for its types, by the plugin of pytest, or by a program that
# does not come to use it, costs nothing.
_HOMES = {
    "_cancel": "CancelToken Registration",
    "_client": "AsyncClient",
    "_errors": """
        AbortError AuthenticationError BadRequestError ConnectError ConnectionBroken HostError
        NotFoundError OllamaError ParseError PermissionDeniedError PhaseTimeout ProtocolError
        RateLimitError RequestError ResponseError ServerBusyError ServerError StreamBusy StreamClosed
        StreamError StreamTruncated
    """,
    "_input": "Image",
    "_manage_types": """
        CloudStatus CloudStatusResponse ListedModel ListResponse LoadedModel ModelDetails
        ModelRecommendation ProcessResponse RecommendationsResponse ShowResponse Tensor UserResponse
        VersionResponse WebFetchResponse WebSearchResponse WebSearchResult
    """,
    "_options": "Options",
    "_progress": "Progress ProgressResponse",
    "_stream": "Stream Timing",
    "_systemone": """
        SystemOneAnswer SystemOneChoiceAnswer SystemOneChoiceQuestion SystemOneContent
        SystemOneNoulAnswer SystemOneNoulQuestion SystemOneQuestion SystemOneRequest SystemOneResponse
        SystemOneScoreAnswer SystemOneScoreQuestion SystemOneUsage
    """,
    "_timeouts": "Timeouts",
    "_tools": "Tool convert_function_to_tool tool_schema",
    "_transport": "DirectTransport",
    "_types": """
        ChatResponse DebugInfo EmbeddingsResponse EmbedResponse GenerateResponse Logprob Message
        StatusResponse TokenLogprob ToolCall
    """,
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


# Not for type checkers, which would take any misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
