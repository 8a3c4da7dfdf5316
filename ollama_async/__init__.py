"""An asyncio-native streaming SDK for Ollama: every call can be aborted, and the socket is gone when it is."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._call.stream import Stream, Timing
    from ._call.timeouts import Timeouts
    from ._cancel import CancelToken, Registration
    from ._client import AsyncClient
    from ._errors import (
        AbortError,
        AuthenticationError,
        BadRequestError,
        CannotContinue,
        CapabilityError,
        ConnectError,
        ConnectionBroken,
        ContextLengthError,
        HostError,
        HungModel,
        ModelNotReady,
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
        TruncationWarning,
    )
    from ._loaded import Loaded
    from ._model.input import Image
    from ._model.manage_types import (
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
    from ._model.options import Options
    from ._model.progress import Progress, ProgressResponse
    from ._model.systemone import (
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
    from ._model.tools import Tool, convert_function_to_tool, tool_schema
    from ._model.types import (
        ChatResponse,
        ContextUsage,
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
    from ._wire.transport import DirectTransport
    from .conversation import Chat, ConversationError
    from .pool import Host, HostState, MapResult, Pool, PoolStream

__all__ = [
    "AbortError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "CancelToken",
    "CannotContinue",
    "CapabilityError",
    "Chat",
    "ChatResponse",
    "CloudStatus",
    "CloudStatusResponse",
    "ConnectError",
    "ConnectionBroken",
    "ContextLengthError",
    "ContextUsage",
    "ConversationError",
    "DebugInfo",
    "DirectTransport",
    "EmbedResponse",
    "EmbeddingsResponse",
    "GenerateResponse",
    "Host",
    "HostError",
    "HostState",
    "HungModel",
    "Image",
    "ListResponse",
    "ListedModel",
    "Loaded",
    "LoadedModel",
    "Logprob",
    "MapResult",
    "Message",
    "ModelDetails",
    "ModelNotReady",
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
    "TruncationWarning",
    "UserResponse",
    "VersionResponse",
    "WebFetchResponse",
    "WebSearchResponse",
    "WebSearchResult",
    "convert_function_to_tool",
    "tool_schema",
]


__version__ = "0.1.0"


# Not for type checkers, which would take any misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Imported when something is first asked for: a program that imports this package for its types, as a plugin (of
        # pytest), or on the way to something else does not pay for it. By statements, which tools that pack programs
        # can follow.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _client  # noqa: F401  (and with it all others but the next two)

        _publish()
        if name not in globals():
            # What only some endpoints take and give is half of all models, and of the time that it takes to make them.
            from ._model import manage_types, systemone  # noqa: F401

            _publish()
        if name not in globals():
            from . import conversation, pool

            for leaf in (conversation, pool):
                globals().update({public: vars(leaf)[public] for public in leaf.__all__ if public in __all__})
        return globals()[name]


def _publish() -> None:
    """Take over the public names of the modules that have been imported."""
    for path, module in tuple(sys.modules.items()):
        if path.startswith(f"{__name__}._"):
            for public in vars(module).keys() & __all__:
                globals().setdefault(public, vars(module)[public])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
