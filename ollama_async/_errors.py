"""Every error of the library, as one tree.

::

    OllamaError
    ├── AbortError            you aborted a token, a stream or a client
    ├── RequestError          the request cannot be sent as given (also a ValueError)
    │   └── HostError         the host is not a usable address
    ├── ConnectError          no connection to the server (also a builtin ConnectionError)
    │   └── NoHost                no host of a pool could take the call
    ├── ConnectionBroken      the connection was lost before the answer was complete
    ├── PhaseTimeout          one of the Timeouts passed (also a builtin TimeoutError)
    │   └── HungModel             the model is loaded and the server answers, but the model does not
    ├── ProtocolError         the answer is not what an Ollama server sends
    ├── ResponseError         the server answered with an error status
    │   ├── BadRequestError           400
    │   │   └── ContextLengthError        the prompt is longer than the context
    │   ├── AuthenticationError       401
    │   ├── PermissionDeniedError     403
    │   ├── NotFoundError             404
    │   ├── RateLimitError            429
    │   ├── ServerError               5xx
    │   │   └── ServerBusyError       503
    │   └── StreamError               an error frame inside a stream that had begun
    ├── ParseError            the answer does not match ``format=`` (also a ValueError)
    ├── CannotContinue        a partial answer cannot be continued
    ├── CapabilityError       the model, or the server's version, lacks what was asked for
    ├── ModelNotReady         a model could not be loaded as it was asked for
    ├── StreamTruncated       the stream ended without ``done`` (only with ``strict=True``)
    ├── StreamClosed          a stream or client was used after it was closed (also a RuntimeError)
    └── StreamBusy            a second task read a stream that another one is reading (also a RuntimeError)

Each error that ends a stream has the partial answer in ``partial``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Word for word what ollama-python says: programs compare it.
CONNECTION_ERROR_MESSAGE = (
    "Failed to connect to Ollama. Please check that Ollama is downloaded, running and accessible. "
    "https://ollama.com/download"
)


def shown(value: object) -> str:
    """Return a wrong parameter in the form that error messages show."""
    try:
        text = repr(value)
    except Exception:
        # An int with more than 4,300 digits has no repr.
        return f"({type(value).__name__})"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


_MAX_SHOWN = 100


class OllamaError(Exception):
    """The base of all errors of this library."""

    partial: Any = None
    """The partial answer, merged, such as a ``ChatResponse``; ``None`` if nothing had arrived."""

    host: str | None = None
    """The host of a ``Pool`` that the call was sent to last; ``None`` if it was sent to no host, or has no pool."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python copies and pickles an exception by calling its class with its text. Our classes take other arguments.
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[OllamaError], args: tuple[Any, ...]) -> OllamaError:
    error = kind.__new__(kind)
    error.args = args
    return error


class AbortError(OllamaError):
    """``abort()`` on its token, its stream or its client ended the call.

    Attributes:
        reason: The object that was given to ``abort()``; ``None`` if none was given. If it is an exception, it is also
            the ``__cause__``.
    """

    def __init__(self, reason: object = None, partial: Any = None) -> None:
        super().__init__("aborted" if reason is None else f"aborted: {reason}")
        self.reason: object = reason
        self.partial = partial
        if isinstance(reason, BaseException):
            self.__cause__: BaseException | None = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class sets the cause again.
        return type(self), (self.reason, self.partial), self.__dict__


class RequestError(OllamaError, ValueError):
    """The request cannot be sent as given: a parameter is missing, has the wrong type, or is not allowed.

    Attributes:
        error: The text of the error.
    """

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


class HostError(RequestError):
    """The host given to the client, or in ``OLLAMA_HOST``, is not a usable address."""


class ConnectError(OllamaError, ConnectionError):
    """No connection to the server could be made.

    The text begins as that of ollama-python does, and ends with ``detail``: what went wrong, and with which address.
    """

    def __init__(self, detail: str = "") -> None:
        super().__init__(CONNECTION_ERROR_MESSAGE)
        self.detail = detail

    def __str__(self) -> str:
        return _DetailedText(f"{CONNECTION_ERROR_MESSAGE} ({self.detail})" if self.detail else CONNECTION_ERROR_MESSAGE)


class _DetailedText(str):
    """A text that says more than ollama-python's, and is equal to that: programs (its own tests, too) compare it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == CONNECTION_ERROR_MESSAGE or super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(CONNECTION_ERROR_MESSAGE)


class NoHost(ConnectError):
    """No host of a ``Pool`` could take the call.

    Attributes:
        errors: What went wrong at each host, by its URL.
    """

    def __init__(self, errors: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {error}" for url, error in errors.items()))
        self.errors: dict[str, str] = dict(errors)

    def __str__(self) -> str:
        return f"no host can take the call: {self.detail}"


class ConnectionBroken(OllamaError):
    """The connection was lost before the answer was complete.

    Not a ``ConnectionError``: code that was written for ollama-python takes that for "no server", and would drop the
    partial answer.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class PhaseTimeout(OllamaError, TimeoutError):
    """A limit of the call's ``Timeouts`` passed.

    Attributes:
        phase: ``"connect"``, ``"upload"``, ``"first_chunk"``, ``"idle"`` or ``"total"``: the limit that passed.
        seconds: That limit, in seconds.
    """

    def __init__(self, phase: str, seconds: float, partial: Any = None) -> None:
        super().__init__(_PHASE_TEXT[phase].format(seconds=f"{seconds:g}"))
        self.phase = phase
        self.seconds = seconds
        self.partial = partial


_PHASE_TEXT = {
    "connect": "no connection to the server within {seconds} s (connect timeout)",
    "upload": "the body of the request was not sent within {seconds} s (upload timeout)",
    "first_chunk": (
        "the server sent nothing within {seconds} s of the request (first_chunk timeout): "
        "the model may still be loading, or the server's queue may be full; if /api/version and /api/ps answer, the "
        "model is listed there and the server does nothing, earlier aborts may have cost its slots: unload the model "
        "(keep_alive=0) and ask again"
    ),
    "idle": "the server neither sent nor took anything for {seconds} s (idle timeout)",
    "total": "the answer was not complete within {seconds} s (total timeout)",
}


class HungModel(PhaseTimeout):
    """The model is loaded and the server answers, but the model gave no first chunk (``recover=``).

    Its ``phase`` is ``"first_chunk"``. The server has probably lost the model's slots: see docs/hung-model.md.

    Attributes:
        model: Name of the model, with its tag.
        detail: What was done about it, or why nothing was done.
    """

    def __init__(self, model: str, seconds: float, detail: str, partial: Any = None) -> None:
        super().__init__("first_chunk", seconds, partial)
        text = f"{model} hangs: it sent nothing within {seconds:g} s of the request (first_chunk timeout), although "
        self.args: tuple[Any, ...] = (f"{text}it is loaded (/api/ps) and the server answers (/api/version); {detail}",)
        self.model = model
        self.detail = detail


class ProtocolError(OllamaError):
    """The server's answer is not HTTP, not NDJSON, not what Ollama sends, or over a limit."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class ResponseError(OllamaError):
    """The server answered with an error status.

    Attributes:
        error: The text that the server sent.
        status_code: The HTTP status.
        signin_url: Where to sign in, if the server sent it with a 401.
        headers: The headers of the answer, as a mapping; empty if there was no answer.
    """

    def __init__(self, error: str, status_code: int = -1) -> None:
        super().__init__(error)
        self.error = error
        self.status_code = status_code
        self.signin_url: str | None = None
        self.headers: Any = {}

    def __str__(self) -> str:
        return self.error if self.status_code == -1 else f"{self.error} (status code: {self.status_code})"


class BadRequestError(ResponseError):
    """Status 400: the server does not accept the request."""


class ContextLengthError(BadRequestError):
    """The prompt is longer than the context of the model, and the server was asked not to cut it."""


class TruncationWarning(UserWarning):
    """The server cut the prompt of a call with ``on_truncation="warn"``: the model did not read all of it."""


class AuthenticationError(ResponseError):
    """Status 401: the key is missing or wrong; see ``signin_url``."""


class PermissionDeniedError(ResponseError):
    """Status 403: forbidden; a local server answers this to a ``Host`` header that is not its own."""


class NotFoundError(ResponseError):
    """Status 404: the model, blob or route does not exist."""


class RateLimitError(ResponseError):
    """Status 429: too many requests."""


class ServerError(ResponseError):
    """Status 500 and above: the server failed."""


class ServerBusyError(ServerError):
    """Status 503: the server's queue is full."""


class StreamError(ResponseError):
    """The server sent an error frame inside a stream that had begun.

    ``status_code`` is that of the frame if it has one, else -1, as in ollama-python: the HTTP status was a success.
    """


class ParseError(OllamaError, ValueError):
    """The text of an answer does not match the pydantic model that was given as ``format=``, or is not JSON.

    Attributes:
        text: The text of the answer.
        reason: What is wrong with it, and where.
    """

    def __init__(
        self, name: str, text: str, partial: Any = None, reason: str | None = None, *, cut: bool = False
    ) -> None:
        said = f"{reason}; it is " if reason else ""
        shortened = f"{text[:200]!r}{'...' if len(text) > 200 else ''}"
        advice = (
            "the server cut it for its length: raise num_predict, or num_ctx"
            if cut
            else "ask again, and tell the model what is wrong"
        )
        super().__init__(f"the answer does not match {name}: {said}{shortened}; {advice}")
        self.text = text
        self.reason: str | None = reason
        self.partial = partial


class CannotContinue(OllamaError):
    """A partial answer cannot be continued; the text says why, and the partial answer is unchanged."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class CapabilityError(OllamaError):
    """The model, or the version of the server, lacks what a call needs; the request was not sent.

    Attributes:
        model: Name of the model, as you gave it.
        missing: What is missing, such as ``("tools",)``; ``("version",)`` if it is the server that is too old.
        available: What the model can do; for the server, its version.
    """

    def __init__(self, model: str, missing: tuple[str, ...], available: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.model = model
        self.missing = missing
        self.available = available


class ModelNotReady(OllamaError):
    """The server has loaded a model in another way than ``client.loaded()`` asked for, or does not list it.

    Attributes:
        model: Name of the model, as you gave it.
        loaded: How it is loaded, a ``LoadedModel``; ``None`` if the server does not list it.
    """

    def __init__(self, model: str, loaded: Any, flaw: str) -> None:
        super().__init__(f"{model} is not loaded as it was asked for: {flaw}")
        self.model = model
        self.loaded: Any = loaded


class StreamTruncated(OllamaError):
    """The stream ended properly, but no chunk said ``done`` (raised with ``strict=True``)."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class StreamClosed(OllamaError, RuntimeError):
    """A stream or a client was used after it was closed."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class StreamBusy(OllamaError, RuntimeError):
    """A second task tried to read a stream that another task is reading."""


_BY_STATUS: dict[int, type[ResponseError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    429: RateLimitError,
    503: ServerBusyError,
}


# The server has no code for it: its own text, with which it refuses a prompt or an input, and that of llama-server.
_TOO_LONG = ("exceeds the context length", "exceeds the available context", "longer than the context length")


def response_error(error: str, status_code: int) -> ResponseError:
    """Return a ``ResponseError`` of the class that belongs to an HTTP status."""
    kind = _BY_STATUS.get(status_code, ServerError if status_code >= 500 else ResponseError)
    if kind is BadRequestError and any(text in error.lower() for text in _TOO_LONG):
        kind = ContextLengthError
    return kind(error, status_code)
