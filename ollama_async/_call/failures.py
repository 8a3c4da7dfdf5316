"""What went wrong, as one of our errors: failures of transports, error statuses, error frames."""

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
from ollama_async._wire.parser import PeerClosed
from ollama_async._wire.reader import ExchangeEnded, ResponseReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .timeouts import Timeouts


def _connection_broken(exc: BaseException, limits: Timeouts) -> OllamaError:
    return ConnectionBroken(f"the connection was lost before the answer was complete: {str(exc) or type(exc).__name__}")


def _remote_protocol(exc: BaseException, limits: Timeouts) -> OllamaError:
    # What h11, under other transports, says of a connection that ended.
    if isinstance(exc, PeerClosed) or str(exc).startswith(("peer closed", "Server disconnected")):
        return _connection_broken(exc, limits)
    return ProtocolError(str(exc))


# By name, so that the exceptions of httpx2 (a continuation of httpx) are known without importing it. The first class in
# the exception's line of descent that stands here decides.
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
    """Turn an error of a transport into one of ours; leave everything else as it is."""
    if isinstance(exc, OllamaError):
        _strip(exc)
        return _fresh(exc, partial)
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
    """Drop what an error that the exchange keeps has collected on its way here.

    Its tracebacks hold the frames that hold the exchange: a circle that only the garbage collector would open.
    """
    while exc is not None:
        exc.__traceback__ = None
        if isinstance(exc.__cause__, ExchangeEnded):
            exc.__cause__ = None
        if isinstance(exc.__context__, ExchangeEnded):
            exc.__context__ = None
        exc = exc.__cause__ or exc.__context__


def _fresh(exc: OllamaError, partial: Any) -> OllamaError:
    """Copy an error that may be raised again: one instance would collect a traceback at each raise."""
    copy = type(exc).__new__(type(exc))
    copy.args = exc.args
    copy.__dict__.update(exc.__dict__)
    copy.__cause__ = exc.__cause__
    copy.partial = partial
    return copy


_MAX_ERROR_TEXT = 500

# Two patterns without a repetition, each searched for once: a stranger wrote the page, and `<title[^>]*>(.*?)</title>`
# takes quadratic time where many titles begin and none ends.
_TITLE_BEGINS = re.compile("<title", re.IGNORECASE)
_TITLE_ENDS = re.compile("</title>", re.IGNORECASE)


def status_error(reader: ResponseReader, body: bytes) -> ResponseError:
    """Make the error that an answer with an error status stands for, out of JSON, HTML, text or nothing."""
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
    """Read a JSON object; anything else is an empty one."""
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
    # Cut before it is unescaped, too: there a character reference with thousands of digits is a ValueError.
    return html.unescape(page[start : ends.start()].strip()[: 2 * _MAX_ERROR_TEXT]).strip()


def _error_text(error: object) -> str:
    if isinstance(error, dict):
        # As the OpenAI-compatible routes and many gateways send it.
        error = cast("dict[str, object]", error).get("message", cast("object", error))
    return _showable(error) if isinstance(error, str) else json.dumps(error)


def _sign_in(error: ResponseError, frame: dict[str, Any]) -> None:
    url = frame.get("signin_url")
    error.signin_url = _showable(url) if isinstance(url, str) else None


def _showable(text: str) -> str:
    """Replace halves of characters, which JSON can have and no log or terminal can take."""
    return text.encode("utf-8", "replace").decode("utf-8")


def stream_error(frame: dict[str, Any], reader: ResponseReader) -> StreamError:
    """Make the error for an error frame inside a stream."""
    code = frame.get("StatusCode")
    error = StreamError(_error_text(frame["error"]), code if isinstance(code, int) else -1)
    _sign_in(error, frame)
    error.headers = httpx.Headers(list(reader.head.headers))
    return error


def encoding_error(headers: Iterable[tuple[bytes, bytes]]) -> ProtocolError | None:
    """Refuse a compressed answer: it was not asked for, and its size is not known before it is unpacked."""
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return ProtocolError(f"the answer is encoded as {value.decode('latin-1')!r}, which was not asked for")
    return None
