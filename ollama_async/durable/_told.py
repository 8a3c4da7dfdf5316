"""What a client is told of how an answer ended, and of an error: the only place that decides it.

The events of an answer are read by whoever watches it, so what its ``end`` says is decided when it is written.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ollama_async._errors import (
    CONNECTION_ERROR_MESSAGE,
    ConnectError,
    ConnectionBroken,
    HostError,
    OllamaError,
    PhaseTimeout,
    ProtocolError,
    RequestError,
    ResponseError,
    StreamClosed,
    StreamTruncated,
)
from ollama_async.registry import RegistryClosed, RegistryUnavailable

from ._errors import (
    AnswerGap,
    AnswerGone,
    AnswerInUse,
    AnswersClosed,
    AnswersUnavailable,
    BadOffset,
    RedisFull,
    RedisRefuses,
    RedisTooOld,
    UnknownAnswer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ollama_async._call.stream import Timing
    from ollama_async._model.types import ContextUsage

__all__ = ["ABOUT_THE_REQUEST", "MAX_TEXT", "NOT_SENT", "STATUSES", "Told", "summary", "tell", "told_reason"]

# The address of another server.
NOT_SENT = {"remote_host"}


class Told(NamedTuple):
    """What the client is told of an error."""

    status: int
    text: str
    kind: str


# By the class of the error, the first in its line of descent. The text of an error is for whoever runs this server: it
# names addresses, files and what other servers said. Nothing of it is sent but what tell() lets through.
_KINDS: dict[type[BaseException], tuple[int, str]] = {
    ConnectError: (502, CONNECTION_ERROR_MESSAGE),
    ConnectionBroken: (502, "the connection to the model's server was lost before the answer was complete"),
    ProtocolError: (502, "the model's server sent an answer that cannot be read"),
    StreamTruncated: (502, "the model's server ended the answer before it was complete"),
    HostError: (502, "the model's server cannot be reached at its address"),
    RequestError: (400, "the request is not valid"),
    StreamClosed: (503, "the answer was closed; this server may be shutting down"),
    RegistryClosed: (503, "this server is shutting down"),
    AnswerInUse: (409, "you already have an answer with this id"),
    AnswerGap: (500, "parts of the answer are missing"),
    AnswerGone: (404, "the answer is no longer kept"),
    UnknownAnswer: (404, "you have no answer with this id, or it is no longer kept"),
    BadOffset: (400, "the answer has no such event"),
    AnswersClosed: (503, "this server is shutting down"),
    RedisTooOld: (501, "the server that keeps the answers is too old"),
    RedisFull: (507, "the server that keeps the answers has no room for one more"),
    RedisRefuses: (500, "the server that keeps the answers refuses access"),
    AnswersUnavailable: (503, "the server that keeps the answers does not answer; try again later"),
    RegistryUnavailable: (503, "the registry of streams does not answer"),
    OllamaError: (502, "the answer failed"),
}
_PHASES = {
    "connect": "no connection to the model's server in time (connect timeout)",
    "first_chunk": "the model did not begin to answer in time (first_chunk timeout)",
    "idle": "the model's server was silent for too long (idle timeout)",
    "total": "the answer was not complete in time (total timeout)",
}
# These statuses are passed on.
STATUSES = {
    400: "the model's server does not accept the request",
    404: "the model's server does not have what was asked for",
    413: "the request is too large for the model's server",
    429: "too many requests; try again later",
    503: "the model's server is busy; try again later",
}
# With these, the text of the server is passed on, too: it speaks of the request, which is the client's. What it says
# with others is about our access to it, or about its inside.
ABOUT_THE_REQUEST = {400, 404, 413}
# Even so: something between us and the server may have written it.
_PLACE_OR_KEY = re.compile(
    r"://|@|\*\*\*|\bsk-|\d\.\d{1,3}\.\d{1,3}\.\d|:\d{2,5}(?!\w)|\.(?:internal|lan|local|svc)\b|(?<!\S)[\"'(]?/\w|:\\"
)
MAX_TEXT = 500


def tell(error: OllamaError, explain: Callable[[OllamaError], str] | None = None) -> Told:
    """Decide what the client is told of an error."""
    # The name that is in the documentation: a class of somebody else's derived from it says nothing to the client.
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__.startswith("ollama_async."))
    if isinstance(error, ResponseError):
        status, text = error.status_code, STATUSES.get(error.status_code)
        if text is None:
            status, text = 502, "the model's server failed"
        elif status in ABOUT_THE_REQUEST and not _PLACE_OR_KEY.search(error.error):
            text = error.error[:MAX_TEXT]
    elif isinstance(error, PhaseTimeout):
        status, text = 504, _PHASES.get(error.phase, "the model's server took too long")
    else:
        status, text = next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)
    return Told(status, text if explain is None else explain(error), kind)


def told_reason(reason: object) -> str | None:
    """Decide what the client is told of why a stream ended: a text was written to be shown, an exception was not."""
    if reason is None or isinstance(reason, str):
        return reason
    return str(reason) if isinstance(reason, (int, float)) else type(reason).__name__


class Summed(Protocol):
    """What an ``end`` tells of a stream."""

    @property
    def text(self) -> str: ...

    @property
    def response(self) -> Any: ...

    @property
    def outcome(self) -> str | None: ...

    @property
    def reason(self) -> object: ...

    @property
    def timing(self) -> Timing: ...


def summary(stream: Summed, error: Told | None) -> dict[str, Any]:
    """Return the data of the event ``end``."""
    timing, merged, outcome = stream.timing, stream.response, stream.outcome
    usage: ContextUsage | None = None if merged is None else merged.context_usage
    return {
        "outcome": outcome,
        "reason": None if outcome == "error" else told_reason(stream.reason),
        "error": None if error is None else error.text,
        "error_type": None if error is None else error.kind,
        "text": stream.text,
        "timing": {
            "first_chunk": timing.first_chunk,
            "total": timing.total,
            "chunks": timing.chunks,
            "chunks_per_second": timing.chunks_per_second,
        },
        "context_usage": None if usage is None else {**dataclasses.asdict(usage), "share": usage.share},
        "response": None if merged is None else merged.model_dump(mode="json", exclude_none=True, exclude=NOT_SENT),
    }
