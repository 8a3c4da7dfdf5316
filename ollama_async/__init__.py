"""An asyncio-native streaming SDK for Ollama: every call can be aborted, and the socket is gone when it is."""

from typing import TYPE_CHECKING, Any

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
from ._options import Options
from ._progress import Progress, ProgressResponse
from ._stream import Stream, Timing
from ._timeouts import Timeouts
from ._tools import Tool, convert_function_to_tool, tool_schema
from ._transport import DirectTransport
from ._types import (
    ChatResponse,
    CloudStatus,
    CloudStatusResponse,
    DebugInfo,
    EmbeddingsResponse,
    EmbedResponse,
    GenerateResponse,
    ListedModel,
    ListResponse,
    LoadedModel,
    Logprob,
    Message,
    ModelDetails,
    ModelRecommendation,
    ProcessResponse,
    RecommendationsResponse,
    ShowResponse,
    StatusResponse,
    Tensor,
    TokenLogprob,
    ToolCall,
    UserResponse,
    VersionResponse,
    WebFetchResponse,
    WebSearchResponse,
    WebSearchResult,
)

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # What one endpoint of newer servers takes and gives is a tenth of all models, and of the time they take to make.
    if name in __all__ and name.startswith("SystemOne"):
        from . import _systemone

        return getattr(_systemone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
