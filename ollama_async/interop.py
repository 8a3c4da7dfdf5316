"""ollama-python's ``AsyncClient`` with this library's engine, for programs and frameworks that are built on it.

``AsyncClient`` is a subclass of ``ollama.AsyncClient``. Its methods, arguments, answers and errors are those of
ollama-python; requests and streams are ours, so an abort or a cancellation closes the connection at once.
``install()`` puts it in the place of the original. The synchronous ``ollama.Client`` stays as it is.

ollama-python makes the body of each request and says which class its answer has. It does so in public methods that
rest on two private ones, ``_request()`` and ``_request_raw()``. Only these two are replaced, so the public methods are
those of the version that is installed.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, cast, overload

import httpx
from pydantic import ValidationError

import ollama_async._errors as _errors

from ._call.chunk import Validators
from ._call.chunk_reader import ChunkReader
from ._call.failures import misfit
from ._call.stream import Stream as _Stream
from ._client import AsyncClient as _AsyncClient
from ._extras import check_version
from ._model.input import encode_json
from ._model.merge import ChatMerge, GenerateMerge, ProgressMerge
from ._session import CallOptions, hide

try:
    import ollama
except ModuleNotFoundError as _missing:
    raise ImportError(
        'ollama_async.interop needs ollama-python; install it with: pip install "ollama-async[interop]"',
        name=_missing.name,
    ) from _missing

__all__ = ["AsyncClient", "Stream", "install", "installed", "uninstall"]


def _check_methods(version: str, client: type) -> None:
    """Refuse an ollama-python that this module does not know how to replace."""
    missing = [name for name in ("_request", "_request_raw") if not callable(getattr(client, name, None))]
    if missing:
        raise ImportError(
            f"ollama_async.interop does not know ollama-python {version}: its AsyncClient has no {missing[0]}(); "
            "install an older ollama, or a newer ollama-async"
        )


_ORIGINAL = ollama.AsyncClient
_check_methods(check_version("ollama_async.interop", "ollama", (0, 6), "'ollama-async[interop]'"), _ORIGINAL)


# -- errors: each is ours and ollama-python's, or httpx's where ollama-python lets that through --


class ResponseError(_errors.ResponseError, ollama.ResponseError):
    """The server answered with an error status."""


class BadRequestError(_errors.BadRequestError, ResponseError):
    """Status 400."""


class AuthenticationError(_errors.AuthenticationError, ResponseError):
    """Status 401."""


class PermissionDeniedError(_errors.PermissionDeniedError, ResponseError):
    """Status 403."""


class NotFoundError(_errors.NotFoundError, ResponseError):
    """Status 404."""


class RateLimitError(_errors.RateLimitError, ResponseError):
    """Status 429."""


class ServerError(_errors.ServerError, ResponseError):
    """Status 500 and above."""


class ServerBusyError(_errors.ServerBusyError, ServerError):
    """Status 503."""


class StreamError(_errors.StreamError, ResponseError):
    """An error frame inside a stream that had begun."""


class RequestError(_errors.RequestError, ollama.RequestError):
    """The request cannot be sent as given."""


class ProtocolError(_errors.ProtocolError, ValueError):
    """The answer is not what Ollama sends; ollama-python lets a ``ValueError`` of its JSON or of pydantic through."""


class _HttpxError(httpx.RequestError):
    # What `request` of httpx's errors looks at. There is no request of httpx.
    _request: httpx.Request | None = None


class ConnectError(_errors.ConnectError, _HttpxError, httpx.ConnectError):
    """No connection to the server: a builtin ``ConnectionError``, and httpx's, which ollama-python's streams raise."""


class ConnectionBroken(_errors.ConnectionBroken, _HttpxError, httpx.ReadError, httpx.RemoteProtocolError):
    """The connection was lost before the answer was complete."""


class ConnectTimeout(_errors.PhaseTimeout, _HttpxError, httpx.ConnectTimeout):
    """The limit of ``connect`` passed."""


class WriteTimeout(_errors.PhaseTimeout, _HttpxError, httpx.WriteTimeout):
    """The limit of ``upload`` passed."""


class ReadTimeout(_errors.PhaseTimeout, _HttpxError, httpx.ReadTimeout):
    """Another limit passed."""


_CLASSES: dict[type, type[_errors.OllamaError]] = {
    kind.__bases__[0]: kind
    for kind in (
        ResponseError,
        BadRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        RateLimitError,
        ServerError,
        ServerBusyError,
        StreamError,
        RequestError,
        ProtocolError,
        ConnectError,
        ConnectionBroken,
        ReadTimeout,
    )
}
_TIMEOUTS: dict[str, type[_errors.OllamaError]] = {"connect": ConnectTimeout, "upload": WriteTimeout}


def _theirs(exc: _errors.OllamaError) -> _errors.OllamaError:
    """Return an error as one that code for ollama-python catches; an abort, which that does not know, stays ours."""
    kind = _CLASSES.get(type(exc))
    if isinstance(exc, _errors.PhaseTimeout):
        kind = _TIMEOUTS.get(exc.phase, kind)
    if kind is None:
        return exc
    error = kind.__new__(kind)
    error.args = exc.args
    vars(error).update(vars(exc))
    return error.with_traceback(exc.__traceback__)


@contextmanager
def _their_errors() -> Generator[None]:
    try:
        yield
    except _errors.OllamaError as exc:
        raise _theirs(exc) from exc.__cause__


# -- streams --


class Stream(_Stream[Any]):
    """An answer as it arrives, as the stream of ``ollama_async``, with ollama-python's chunks and errors.

    As with ollama-python, nothing is sent before it is iterated.
    """


class _Reader(ChunkReader[Any]):
    """Reads an answer for code that is written for ollama-python."""

    __slots__ = ()

    async def read(self) -> Any:
        # Not by _their_errors(), which would be several calls more for each token.
        try:
            return await super().read()
        except _errors.OllamaError as exc:
            raise _theirs(exc) from exc.__cause__

    async def ready(self) -> None:
        with _their_errors():
            await super().ready()

    def with_info(self, response: Any) -> Any:
        # Their classes have no place for it; the stream itself has `status_code` and `headers`.
        return response


class _ProgressReader(_Reader):
    """Steps of a long operation. They are read as ours, which know the last one."""

    __slots__ = ()

    async def read(self) -> Any:
        return _their_step(await super().read())

    def with_info(self, response: Any) -> Any:
        return None if response is None else _their_step(response)


def _their_step(step: Any) -> Any:
    return ollama.ProgressResponse.model_validate(step.model_dump(exclude_unset=True))


@cache
def _validators(model: type[Any]) -> Validators[Any]:
    return Validators[Any].of(model)


class _TheirChunks:
    """Chunks are of ollama-python's class."""

    __slots__ = ()

    model: Any

    @property
    def validators(self) -> Validators[Any]:
        """How chunks are made."""
        return _validators(self.model)


class _TheirChatMerge(_TheirChunks, ChatMerge):
    """Merges chunks of ollama-python's class."""

    __slots__ = ()

    model: Any = ollama.ChatResponse

    def add(self, chunk: Any) -> None:
        """Add the next chunk."""
        self._last = chunk
        fields = chunk.__dict__
        part = fields["message"].__dict__
        if part.get("thinking") or part.get("tool_calls") or fields.get("logprobs"):
            self.add_rest(fields, part)
        self.content.append(part["content"] or "")


class _TheirGenerateMerge(_TheirChunks, GenerateMerge):
    """Merges chunks of ollama-python's class."""

    __slots__ = ()

    model: Any = ollama.GenerateResponse

    def add(self, chunk: Any) -> None:
        """Add the next chunk."""
        self._last = chunk
        fields = chunk.__dict__
        if fields.get("thinking") or fields.get("logprobs"):
            self.add_rest(fields, fields)
        self.content.append(fields["response"] or "")


_STREAMS: dict[Any, tuple[type[Any], type[_Reader]]] = {
    ollama.ChatResponse: (_TheirChatMerge, _Reader),
    ollama.GenerateResponse: (_TheirGenerateMerge, _Reader),
    ollama.ProgressResponse: (ProgressMerge, _ProgressReader),
}


# -- the client --


class _Engine(_AsyncClient):
    """Our client, asked for requests by path and body."""

    def open(self, model: type[Any], path: str, body: dict[str, Any], call: CallOptions) -> Stream:
        """Return the stream of an answer."""
        merge, reader_type = _STREAMS[model]
        stream = self._stream(merge(), path, body, call, stream_type=Stream, reader_type=reader_type)
        return cast("Stream", stream)

    async def send(self, method: str, path: str, body: Any, content: Any, call: CallOptions) -> tuple[int, bytes]:
        """Return the status and the whole of an answer."""
        headers = self._web_headers(call) if path.startswith("https://") else call.get("headers")
        request = self._build(
            method, path, content if body is None else encode_json(body), cast("Any", headers) if headers else None
        )
        answer, exchange = await self._send(request, call)
        return exchange.reader.status, answer


class AsyncClient(_ORIGINAL):
    """``ollama.AsyncClient`` with the engine of ``ollama_async``.

    Each of its methods also takes ``token=``, ``timeout=``, ``headers=`` and ``retries=``, as those of
    ``ollama_async.AsyncClient`` do. A stream is a ``Stream``.

    Args:
        host: Address of the server, as in ``OLLAMA_HOST``.
        **options: As ``ollama.AsyncClient`` takes them: ``headers``, ``timeout`` (for httpx: a number is a limit of
            each silence of the server, no limit by default and for ``None``), ``follow_redirects`` and the options of
            httpx. Also those of ``ollama_async.AsyncClient``: ``token``, ``retries``, ``http_client`` ...

    Raises:
        RequestError: Options that do not go together, or an address that cannot be used.
    """

    def __init__(self, host: str | None = None, **options: Any) -> None:
        # Not the original's, which makes a client of httpx.
        headers = options.pop("headers", None)
        if headers is not None:
            headers = {name: value for name, value in headers.items() if value is not None}
        timeout = options.pop("timeout", None)
        if isinstance(timeout, tuple):
            timeout = httpx.Timeout(cast("Any", timeout))
        with _their_errors():
            self._engine = _Engine(host or None, headers=headers, timeout=timeout, compat=True, **options)
        # Programs look here for where requests go.
        self._client = self._engine._client  # noqa: SLF001  (the engine is this client's)
        self._call = CallOptions()

    if TYPE_CHECKING:
        # Made below, of those of the installed version. A checker of types knows what they return, and that they take
        # the options of a call.

        @overload  # type: ignore[override]
        async def chat(self, *args: Any, stream: Literal[False] = False, **others: Any) -> ollama.ChatResponse: ...
        @overload
        async def chat(self, *args: Any, stream: Literal[True], **others: Any) -> Stream: ...
        async def chat(self, *args: Any, stream: bool = False, **others: Any) -> Any: ...  # noqa: D102

        @overload  # type: ignore[override]
        async def generate(
            self, *args: Any, stream: Literal[False] = False, **others: Any
        ) -> ollama.GenerateResponse: ...
        @overload
        async def generate(self, *args: Any, stream: Literal[True], **others: Any) -> Stream: ...
        async def generate(self, *args: Any, stream: bool = False, **others: Any) -> Any: ...  # noqa: D102

        @overload  # type: ignore[override]
        async def pull(self, *args: Any, stream: Literal[False] = False, **others: Any) -> ollama.ProgressResponse: ...
        @overload
        async def pull(self, *args: Any, stream: Literal[True], **others: Any) -> Stream: ...
        async def pull(self, *args: Any, stream: bool = False, **others: Any) -> Any: ...  # noqa: D102

        @overload  # type: ignore[override]
        async def push(self, *args: Any, stream: Literal[False] = False, **others: Any) -> ollama.ProgressResponse: ...
        @overload
        async def push(self, *args: Any, stream: Literal[True], **others: Any) -> Stream: ...
        async def push(self, *args: Any, stream: bool = False, **others: Any) -> Any: ...  # noqa: D102

        @overload  # type: ignore[override]
        async def create(
            self, *args: Any, stream: Literal[False] = False, **others: Any
        ) -> ollama.ProgressResponse: ...
        @overload
        async def create(self, *args: Any, stream: Literal[True], **others: Any) -> Stream: ...
        async def create(self, *args: Any, stream: bool = False, **others: Any) -> Any: ...  # noqa: D102

    def abort(self, reason: object = None) -> None:
        """End all calls of this client that are under way, from any task, thread or signal handler.

        The client stays usable.

        Args:
            reason: What ``AbortError.reason`` will be.
        """
        self._engine.abort(reason)

    async def close(self) -> None:
        """Close the client and everything that is open on it; idempotent.

        Cancellation: safe; once it has begun, all sockets are closed.
        """
        await self._engine.aclose()

    aclose = close

    # The oldest ollama-python that is supported has neither these nor close().

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the client."""
        await self.close()

    async def create_blob(self, path: str | os.PathLike[str], **call: Unpack[CallOptions]) -> str:
        """Upload a file for ``create()``; returns its digest.

        Args:
            path: The file.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Returns:
            The file's digest, ``"sha256:..."``.

        Raises:
            OSError: The file cannot be read.
            ResponseError: The server refused it.

        Cancellation: closes the connection and the file at once.

        Server: ``POST /api/blobs/:digest``
        """
        try:
            with _their_errors():
                return await self._engine.create_blob(path, **call)
        except RequestError as exc:
            if isinstance(exc.__cause__, OSError):
                raise exc.__cause__ from None
            raise

    def __repr__(self) -> str:
        return repr(self._engine).replace("<AsyncClient", "<interop.AsyncClient", 1)

    async def _request(  # type: ignore[override]
        self, cls: Any, method: str, path: str, *, json: Any = None, stream: bool = False
    ) -> Any:
        with _their_errors():
            if stream:
                return self._engine.open(cls, path, json, self._call)
            _, answer = await self._engine.send(method, path, json, None, self._call)
            try:
                return _validators(cls).one(answer)
            except ValidationError as exc:
                text = f"the answer to {method} {path} is not what Ollama sends: {misfit(exc, answer)}"
                raise _errors.ProtocolError(text) from exc

    async def _request_raw(self, method: str, path: str, *, json: Any = None, content: Any = None) -> httpx.Response:
        with _their_errors():
            status, answer = await self._engine.send(method, path, json, content, self._call)
            return httpx.Response(status, content=answer)


def _taking_options(name: str, original: Any) -> Any:
    """Return a method of ollama-python's that also takes what each call of ours takes."""
    signature = inspect.signature(original)
    added = [option for option in CallOptions.__optional_keys__ if option not in signature.parameters]

    @wraps(original)
    async def method(self: AsyncClient, *args: Any, **arguments: Any) -> Any:
        call = cast("CallOptions", {option: arguments.pop(option) for option in added if option in arguments})
        client = self
        if call:
            hide(call)
            client = copy.copy(self)
            client._call = call  # noqa: SLF001  (a copy of this client, for this call)
        # Looked up at each call: telemetry puts its own function there.
        return await getattr(super(AsyncClient, client), name)(*args, **arguments)

    parameters = [*signature.parameters.values()]
    parameters += [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None) for option in sorted(added)]
    cast("Any", method).__signature__ = signature.replace(parameters=parameters)
    return method


for _name, _method in vars(_ORIGINAL).items():
    if not _name.startswith("_") and _name not in vars(AsyncClient) and inspect.iscoroutinefunction(_method):
        setattr(AsyncClient, _name, _taking_options(_name, _method))


# -- in the place of the original --

# Names that were bound to our class before it was installed: they are meant, and stay.
_meant: set[tuple[str, str]] = set()


def install() -> tuple[str, ...]:
    """Put ``AsyncClient`` wherever ``ollama.AsyncClient`` is bound: in ollama-python and in modules that imported it.

    A module that imported the class under a name that has no "client" in it keeps it, and so do clients that are there
    and subclasses. Call this before your program makes its clients.

    Returns:
        The names that it changed, such as ``"ollama.AsyncClient"``; none if it was installed.
    """
    if ollama.AsyncClient is not AsyncClient:
        _meant.clear()
        _meant.update(_bindings(AsyncClient))
    return _rebind(_ORIGINAL, AsyncClient)


def uninstall() -> tuple[str, ...]:
    """Put ollama-python's class back, also in modules that have imported ours from ``ollama`` since.

    Returns:
        The names that it changed; none if it was not installed.
    """
    return _rebind(AsyncClient, _ORIGINAL) if ollama.AsyncClient is AsyncClient else ()


@contextmanager
def installed() -> Generator[tuple[str, ...]]:
    """Install for the length of a ``with`` block; within another one, or after ``install()``, it changes nothing.

    Returns:
        The names that it changed.
    """
    names = install()
    try:
        yield names
    finally:
        if "ollama.AsyncClient" in names:
            uninstall()


def _bindings(kind: type) -> list[tuple[str, str]]:
    return [
        (key, name)
        for key, module in cast("dict[str, object]", sys.modules).copy().items()
        if isinstance(module, ModuleType) and key != __name__
        for name, value in [*vars(module).items()]
        if value is kind
    ]


def _rebind(old: type, new: type) -> tuple[str, ...]:
    changed: list[str] = []
    for module, name in _bindings(old):
        # Under a name that says nothing of a client a patcher holds the class for its own sake, to put it back.
        if "client" in name.lower() and (module, name) not in _meant:
            setattr(sys.modules[module], name, new)
            changed.append(f"{module}.{name}")
    return tuple(sorted(changed))
