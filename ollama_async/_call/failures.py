"""Failures of transports, error statuses and error frames, as our errors."""

from __future__ import annotations

import html
import json
import re
from typing import TYPE_CHECKING, Any, cast

import httpx

from ollama_async._errors import (
    ConnectError,
    ConnectionBroken,
    HostError,
    OllamaError,
    PhaseTimeout,
    ProtocolError,
    RequestError,
    ResponseError,
    StreamError,
    response_error,
)
from ollama_async._wire.outcome import ExchangeEnded
from ollama_async._wire.parser import PeerClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import ValidationError

    from ollama_async._wire.reader import ResponseReader

    from .timeouts import Timeouts


def _connection_broken(exc: BaseException, limits: Timeouts) -> OllamaError:
    return ConnectionBroken(f"the connection was lost before the answer was complete: {str(exc) or type(exc).__name__}")


def _remote_protocol(exc: BaseException, limits: Timeouts) -> OllamaError:
    # The texts of h11, under other transports, for a connection that ended.
    if isinstance(exc, PeerClosed) or str(exc).startswith(("peer closed", "Server disconnected")):
        return _connection_broken(exc, limits)
    return ProtocolError(str(exc))


# By name, so that the exceptions of httpx2 (a continuation of httpx) are known without importing it. The first class in
# the exception's __mro__ that has a row decides.
_TRANSLATIONS: dict[str, Callable[[BaseException, Timeouts], OllamaError]] = {
    "ConnectTimeout": lambda _, limits: PhaseTimeout("connect", limits.connect or 0.0),
    "PoolTimeout": lambda _, limits: PhaseTimeout("connect", limits.connect or 0.0),
    "TimeoutException": lambda _, limits: PhaseTimeout("idle", limits.idle or 0.0),
    "ConnectError": lambda exc, _: ConnectError(str(exc)),
    "ProxyError": lambda exc, _: ConnectError(f"the proxy refused: {exc}"),
    "NetworkError": _connection_broken,
    "RemoteProtocolError": _remote_protocol,
    "LocalProtocolError": lambda exc, _: RequestError(str(exc)),
    "UnsupportedProtocol": lambda exc, _: HostError(str(exc)),
    "InvalidURL": lambda exc, _: HostError(str(exc)),
    "TransportError": _connection_broken,
    "RequestError": lambda exc, _: ProtocolError(str(exc)),
}


def translate(exc: BaseException, limits: Timeouts, partial: Any) -> BaseException:
    """Turn an error of a transport into one of ours; return any other exception unchanged."""
    if isinstance(exc, OllamaError):
        _strip(exc)
        return fresh(exc, partial)
    for ancestor in type(exc).__mro__:
        translation = _TRANSLATIONS.get(ancestor.__name__)
        if translation is not None and ancestor.__module__.partition(".")[0] in ("httpx", "httpx2"):
            _strip(exc)
            error = translation(exc, limits)
            error.partial = partial
            error.__cause__ = exc
            return error
    return exc


def _strip(exc: BaseException | None) -> None:
    """Drop the tracebacks of an error that the exchange keeps.

    They hold frames that hold the exchange: a cycle that only the garbage collector would free.
    """
    while exc is not None:
        exc.__traceback__ = None
        if isinstance(exc.__cause__, ExchangeEnded):
            exc.__cause__ = None
        if isinstance(exc.__context__, ExchangeEnded):
            exc.__context__ = None
        exc = exc.__cause__ or exc.__context__


def fresh(exc: OllamaError, partial: Any) -> OllamaError:
    """Copy an error that may be raised again: one instance would get a longer traceback at each raise."""
    copy = type(exc).__new__(type(exc))
    copy.args = exc.args
    copy.__dict__.update(exc.__dict__)
    copy.__cause__ = exc.__cause__
    copy.partial = partial
    return copy


_MAX_ERROR_TEXT = 500

# Two patterns without a repetition, each searched for once: the page may be hostile, and `<title[^>]*>(.*?)</title>`
# takes quadratic time where many titles begin and none ends.
_TITLE_BEGINS = re.compile("<title", re.IGNORECASE)
_TITLE_ENDS = re.compile("</title>", re.IGNORECASE)


def status_error(reader: ResponseReader, body: bytes) -> ResponseError:
    """Make the error for an answer with an error status, from a body of JSON, HTML, text or nothing."""
    text = body.decode("utf-8", "replace").strip()
    frame = json_object(text)
    if frame.get("error"):
        error = response_error(_error_text(frame["error"]), reader.status)
        _sign_in(error, frame)
    else:
        error = response_error(_plain(text) or reader.head.reason.decode("latin-1") or "no text", reader.status)
    error.headers = httpx.Headers(list(reader.head.headers))
    return error


def json_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object; return an empty one for anything else."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _plain(text: str) -> str:
    if text[:1] == "<":
        title = _html_title(text)
        text = "(HTML page without a title)" if title is None else f"(HTML) {title}"
    return text if len(text) <= _MAX_ERROR_TEXT else text[:_MAX_ERROR_TEXT] + "..."


def _html_title(page: str) -> str | None:
    begins = _TITLE_BEGINS.search(page)
    start = page.find(">", begins.end()) + 1 if begins else 0
    ends = _TITLE_ENDS.search(page, start) if start else None
    if ends is None:
        return None
    # Cut before html.unescape() as well: a character reference with thousands of digits raises ValueError there.
    return html.unescape(page[start : ends.start()].strip()[: 2 * _MAX_ERROR_TEXT]).strip()


def _error_text(error: object) -> str:
    if isinstance(error, dict):
        # The form of the OpenAI-compatible routes and of many gateways.
        error = cast("dict[str, object]", error).get("message", cast("object", error))
    return _showable(error) if isinstance(error, str) else json.dumps(error)


def _sign_in(error: ResponseError, frame: dict[str, Any]) -> None:
    url = frame.get("signin_url")
    error.signin_url = _showable(url) if isinstance(url, str) else None


def _showable(text: str) -> str:
    """Replace lone surrogates, which JSON can contain and no log or terminal can print."""
    return text.encode("utf-8", "replace").decode("utf-8")


def stream_error(frame: dict[str, Any], reader: ResponseReader) -> StreamError:
    """Make the error for an error frame inside a stream."""
    code = frame.get("StatusCode")
    error = StreamError(_error_text(frame["error"]), code if isinstance(code, int) else -1)
    _sign_in(error, frame)
    error.headers = httpx.Headers(list(reader.head.headers))
    return error


def strange_encoding(encoding: str) -> ProtocolError:
    """Refuse a compressed answer that was not requested: its decompressed size is unknown."""
    return ProtocolError(
        f"the answer is encoded as {encoding[:40]!r}, which was not asked for; "
        "headers={'Accept-Encoding': 'gzip, deflate'} allows these two"
    )


# How much of a path, of a value and of an answer the text of an error shows.
_PATH, _VALUE, _ANSWER = 80, 40, 80


def misfit(exc: ValidationError, answer: bytes) -> str:
    """Say which field of an answer is wrong, what was expected there, and what arrived."""
    first = exc.errors(include_url=False)[0]
    begins = _cut(repr(answer[:_ANSWER].decode("utf-8", "replace")), 2 * _ANSWER)
    if first["type"] == "json_invalid":
        return f"it is not JSON: {begins}"
    place, expected = _path(first["loc"]), first["msg"]
    if first["type"] == "missing":
        return f"{place} is missing; it begins with {begins}"
    expected = expected.removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{place}: expected {expected}, got {_came(first['input'])}; it begins with {begins}"


def _path(place: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return _cut("".join(parts).removeprefix(".") or "the whole", _PATH)


def _came(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        return f"the text {_cut(repr(value[:_VALUE]), _VALUE)}"
    return _cut(json.dumps(value), _VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
