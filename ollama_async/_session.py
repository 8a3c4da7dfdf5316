"""A session with one server: its address, headers, transport and tokens, and what every call has in common."""

from __future__ import annotations

import asyncio
import inspect
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypedDict, TypeVar, cast

import anyio
import httpx
from pydantic import ValidationError

from . import __version__
from ._call import observe
from ._call.asked import Asked, full_name
from ._call.body import read_body
from ._call.call import Call
from ._call.chunk_reader import ChunkReader
from ._call.decoder import NdjsonDecoder
from ._call.exchange import Exchange
from ._call.failures import misfit
from ._call.hold import Hold
from ._call.ndjson import MAX_LINE_BYTES
from ._call.request import RequestWriter
from ._call.retry import RetryBudget
from ._call.sender import Sender
from ._call.staged import Stage, StagedCall
from ._call.stream import Stream
from ._call.timeouts import DEFAULT_TIMEOUTS, Timeouts, look_timeouts
from ._cancel import CancelToken, LiveObject
from ._errors import AbortError, ProtocolError, RequestError, StreamClosed
from ._group import CallGroup
from ._host import EnvironmentProxies, env_api_key, is_loopback, is_ollama_com, parse_host
from ._model.input import encode_json
from ._model.types import StatusResponse
from ._secret import Secret, showable
from ._wire.family import package_of
from ._wire.guard import HttpClient, guarded
from ._wire.http1 import header_flaw
from ._wire.phase import Phase
from ._wire.routes import EnvironmentTransport, is_direct, transport_through
from ._wire.tls import TlsOptions
from ._wire.transport import KEEPALIVE_EXPIRY, ClosableTransport, DirectTransport
from ._wire.unpack import encodings_asked_for
from ._wire.watch import EndByToken

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType
    from typing import Self

    from pydantic import BaseModel

    from ._call.chunk import ChunkT, Merge
    from ._call.observe import Observed
    from ._call.request import Request
    from ._call.staged import Begin
    from ._model.types import Model

ModelT = TypeVar("ModelT", bound="Model")
P = ParamSpec("P")
R = TypeVar("R")


class _Default:
    """Stands for a timeout that was not given, where ``None`` says something."""

    def __repr__(self) -> str:
        return "DEFAULT"


_DEFAULT: Final = _Default()

_USER_AGENT = (
    f"ollama-async/{__version__} ({platform.machine()} {platform.system().lower()}) Python/{platform.python_version()}"
)


def deferred(merge: Callable[[], Merge[Any]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a method that is not ``async`` raise what is wrong with its input when it is awaited, as an async one does.

    One bad call then does not lose the others of a ``gather(return_exceptions=True)``, and ``mock.patch()`` makes an
    ``AsyncMock`` of it.

    Args:
        merge: Makes the merge of the method's stream.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def call(*args: P.args, **options: P.kwargs) -> R:
            # The method itself does not: for most calls this look is enough.
            if "headers" in options:
                hide(options)
            try:
                return method(*args, **options)
            except Exception as exc:
                # Without a frame of the method, the arguments do not fit its signature.
                if exc.__traceback__ is None or exc.__traceback__.tb_next is None:
                    raise
                error = exc.with_traceback(None)
            session = cast("Session", args[0])
            if options.get("stream") is True:
                return cast("R", session._failed_stream(merge(), error))  # noqa: SLF001  (a method of this class)
            return cast("R", _failed(error))

        _mark_coroutine_function(call)
        return call

    return decorate


async def _failed(error: Exception) -> NoReturn:
    raise error


def _mark_coroutine_function(function: Any) -> None:
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(function)
    else:
        # What asyncio.iscoroutinefunction() and unittest.mock look for; inspect has no mark before Python 3.12.
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # noqa: SLF001


class CallOptions(TypedDict, total=False):
    """What every call takes."""

    token: CancelToken | None
    """Aborts the call."""
    timeout: Timeouts | httpx.Timeout | float | None
    """Limits of this call in place of the client's; a number is seconds for the whole call, ``None`` for no limit."""
    headers: Mapping[str, str] | None
    """Headers of this call; they go before the client's."""
    retries: int | None
    """How often this call is sent again, in place of the client's."""


@showable
class Session(LiveObject):
    """What ``AsyncClient`` is made on: everything but the endpoints."""

    def __init__(
        self,
        host: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: Timeouts | httpx.Timeout | float | _Default | None = _DEFAULT,
        token: CancelToken | None = None,
        retries: int = 0,
        strict: bool = False,
        compat: bool = False,
        max_line_bytes: int = MAX_LINE_BYTES,
        transport: httpx.AsyncBaseTransport | None = None,
        http_client: httpx.AsyncClient | None = None,
        proxy: str | httpx.Proxy | None = None,
        verify: Any = True,
        cert: Any = None,
        uds: str | None = None,
        trust_env: bool = True,
        follow_redirects: bool = True,
        **options: Any,
    ) -> None:
        # What may have a key or a password in it is in no variable from here on.
        address, given, via, certificate, others = map(Secret[Any], (host, headers, proxy, cert, options))
        del host, headers, proxy, cert, options
        if not isinstance(address.value, str | None):
            kind = type(address.value).__name__
            raise RequestError(f"host={kind}: give a str such as 'http://127.0.0.1:11434', or None")
        _check_kind("token", token, CancelToken)
        _check_kind("max_line_bytes", max_line_bytes, int)
        if transport is not None and not hasattr(transport, "handle_async_request"):
            raise RequestError(f"transport={type(transport).__name__}: give an httpx.AsyncBaseTransport")
        if package_of(transport, "AsyncBaseTransport") is not httpx and not isinstance(transport, ClosableTransport):
            raise RequestError(
                f"transport={type(transport).__name__}: it is a transport of httpx2, not of httpx; give "
                "http_client=httpx2.AsyncClient(transport=...)"
            )
        if http_client is not None and not (hasattr(http_client, "send") and hasattr(http_client, "build_request")):
            raise RequestError(f"http_client={type(http_client).__name__}: give an httpx.AsyncClient")
        if "base_url" in others.value:
            raise RequestError("base_url= is made from host=: give host= instead")
        if uds is not None and (via.value is not None or transport is not None):
            raise RequestError("uds= cannot be combined with proxy= or transport=: give one of them")
        if via.value is not None and transport is not None:
            raise RequestError("proxy= cannot be combined with transport=: give the proxy to that transport")
        self._host = parse_host(os.environ.get("OLLAMA_HOST") if address.value is None else address.value)
        if isinstance(timeout, _Default):
            timeout = None if compat else DEFAULT_TIMEOUTS
        elif compat and isinstance(timeout, (int, float)):
            # A number is a limit of each phase for httpx, and would cut a long answer that flows.
            timeout = httpx.Timeout(timeout)
        self._timeouts = Timeouts.of(timeout)
        self._retries = _retries(retries)
        self._compat = compat
        self._trust_env = trust_env
        self._token = token
        self._strict = strict
        self._max_line_bytes = max_line_bytes
        self._owns_http = http_client is None
        self._client: Any = http_client
        self._direct: DirectTransport | None = None
        own = self._own_headers(trust_env=trust_env)
        self._headers = (_headers(own, given) if given.value else own).value
        if http_client is None:
            tls = TlsOptions(verify, certificate, trust_env)
            # The transport to the session's host, if it is one that was made here.
            home: httpx.AsyncBaseTransport | None = None
            proxies = EnvironmentProxies(even_local=compat)
            if transport is None and via.value is None and uds is None and trust_env and proxies:
                routes = transport = EnvironmentTransport(proxies.for_url, tls, _kept_options(others))
                # Also that of a redirect must be ours: it is followed within the same request.
                home = routes.for_url(httpx.URL(self._host.url)) if all(map(is_direct, proxies.urls)) else None
            elif transport is None:
                home = transport = transport_through(via, tls, uds=uds, **_kept_options(others))
            # Where somebody's code runs within the request, the request needs its own task.
            if isinstance(home, DirectTransport) and not any(map(others.value.get, ("auth", "event_hooks", "mounts"))):
                self._direct = home
            # Each request names its URL; programs written for ollama-python look here for where it goes.
            self._client = HttpClient(
                base_url=self._host.url,
                transport=transport,
                follow_redirects=follow_redirects,
                timeout=None,
                trust_env=False,
                **others.value,
            )
        elif transport is not None or via.value is not None or uds is not None or others.value:
            raise RequestError("http_client= has its options of the connection already: give them to that client")
        else:
            self._client = guarded(http_client)
        self._writer = RequestWriter(self._client, Secret(self._headers), self._direct)
        self._calls = CallGroup()
        unpackable = encodings_asked_for(self._headers.get("Accept-Encoding", ""))
        self._sender = Sender(self._client, self._direct, self._calls, unpackable)
        # Tokens of context of the models that the server was asked about.
        self._context_lengths: dict[str, int | None] = {}
        # What they can do, and the server's version that they need; under "" the server's own version.
        self._abilities: dict[str, tuple[frozenset[str] | None, str | None]] = {}
        # The models that blocks of loaded() keep.
        self._holds: dict[str, Hold] = {}
        self._closing = CancelToken()

    # -- ending --

    def abort(self, reason: object = None) -> None:
        """End all calls of this client that are under way, from any task, thread or signal handler.

        The client stays usable.

        Args:
            reason: What ``AbortError.reason`` will be.
        """
        self._calls.abort(reason)

    def scope(self) -> AbstractContextManager[anyio.CancelScope]:
        """Put a block under this client: ``with client.scope(): await framework(...)``.

        ``abort()`` of the client, and its token, then cancel the block as ``CancelToken.scope()`` does: nothing in it
        begins anew, whatever it catches.

        Raises:
            AbortError: The client or its token was aborted, and that ended the block.
        """
        return self._calls.scope(self._token)

    async def aclose(self) -> None:
        """Close the client and everything that is open on it; idempotent. Its readers get ``StreamClosed``.

        Cancellation: safe; once it has begun, all sockets of the client's own are closed.
        """
        self._shut_down()
        if self._owns_http:
            await self._client.aclose()

    def _shut_down(self) -> None:
        self._calls.close("the client was closed")
        self._closing.abort(self._calls.closed)
        if self._direct is not None:
            self._direct.close()

    close = aclose

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._host.url}{'' if self._calls.closed is None else ', closed'}>"

    # -- inside --

    def _own_headers(self, *, trust_env: bool) -> Secret[httpx.Headers]:
        key = Secret(env_api_key(self._host, anywhere=self._compat) if trust_env else None)
        if self._host.credentials is not None:
            return _headers(_plain_headers(), Secret({"Authorization": self._host.credentials}))
        if key.value is not None:
            return _headers(_plain_headers(), Secret({"Authorization": f"Bearer {key.value}"}))
        return _plain_headers()

    def _web_headers(self, call: CallOptions) -> Secret[Mapping[str, str]]:
        """Return the headers of a call that goes to ollama.com, whatever the server of this session is.

        Of those of the session it has the key, if that is meant for ollama.com; and all, if they are.
        """
        key = Secret(env_api_key(self._host, anywhere=True) if self._trust_env else None)
        headers = _plain_headers()
        if self._compat or is_ollama_com(self._host):
            headers = Secret(httpx.Headers(self._headers))
        elif is_loopback(self._host.name):
            headers.value["Authorization"] = self._headers.get("Authorization", "")
        if key.value is not None:
            headers = _headers(headers, Secret({"Authorization": f"Bearer {key.value}"}))
        given = given_headers(call)
        return Secret[Mapping[str, str]]((headers if given is None else _headers(headers, given)).value)

    def _build(self, method: str, path: str, content: Any, headers: Secret[Mapping[str, str]] | None = None) -> Request:
        if not path.startswith("https://"):
            merged = None if headers is None else _headers(Secret(self._headers), headers)
            return self._writer.write(method, self._host.url + path, content, merged)
        assert headers is not None
        return self._writer.write_abroad(method, path, content, Secret(httpx.Headers(headers.value)))

    def _begin(
        self,
        request: Request,
        options: CallOptions,
        *,
        streaming: bool,
        resume: bool = False,
        observation: Callable[[], Observed | None] | None = None,
        asked: Asked | None = None,
    ) -> tuple[Exchange, list[CancelToken]]:
        if self._calls.closed is not None:
            raise StreamClosed("the client is closed")
        retries = options.get("retries")
        given = given_headers(options)
        accepted = None if given is None else httpx.Headers(given.value).get("Accept-Encoding")
        sender = self._sender
        if accepted is not None:
            sender = Sender(sender.client, sender.transport, sender.calls, encodings_asked_for(accepted))
        budget = RetryBudget.of(self._retries if retries is None else retries, resume=resume)
        # By position: keywords are a dict that Python makes of them for a class.
        exchange = Exchange(sender, request, streaming, self._limits(options), budget, asked)
        if observation is not None:
            exchange.observed = observation()
            if exchange.observed is not None:
                request.add_headers(exchange.observed.headers)
        tokens = self._tokens()
        if self._direct is None:
            beneath = getattr(self._client, "_transport", None)
            if isinstance(beneath, ClosableTransport):
                # It belongs to somebody else, who may stop everything on it.
                tokens.extend(beneath.tokens)
        return exchange, tokens

    def _limits(self, call: CallOptions) -> Timeouts:
        return Timeouts.of(call["timeout"]) if "timeout" in call else self._timeouts

    def _complete(self, body: dict[str, Any]) -> None:
        """Have a call of a model that is kept loaded say how."""
        hold = self._holds.get(full_name(body["model"]))
        if hold is not None:
            hold.complete(body)

    def _answering(self, model: str) -> int:
        """Return how many calls of this client are getting an answer from a model."""
        # Each call that is under way is on the group's token; a step of a job twice, since its own token is below that.
        watches = [watch for token in tuple(self._calls.tokens) for watch in tuple(token._registrations)]  # noqa: SLF001
        readers = {watch.reader for watch in watches if isinstance(watch, EndByToken)}
        return sum(
            isinstance(reader.owner, Exchange)
            and reader.owner.asked is not None
            and reader.owner.asked.model == model
            and reader.phase in (Phase.HEAD, Phase.BODY)
            for reader in readers
        )

    def _stream(
        self,
        merge: Merge[ChunkT],
        path: str,
        body: dict[str, Any],
        options: CallOptions,
        until: Callable[[ChunkT], object] | None = None,
        *,
        response_model: type[BaseModel] | None = None,
        resume: bool = False,
        strict: bool = False,
        stream_type: type[Stream[Any]] = Stream,
        reader_type: type[ChunkReader[Any]] = ChunkReader,
        stages: Sequence[Stage] = (),
    ) -> Stream[ChunkT]:
        check_call(options)
        if until is not None and not callable(until):
            raise RequestError(
                f"until={type(until).__name__}: give a condition of ollama_async.until, or a function of the answer"
            )

        def make(body: Mapping[str, Any]) -> Begin:
            request = self._build("POST", path, encode_json(body), given_headers(options))
            seen = observe.prepare(self._host.url, path, body, streaming=True, partial=merge.result)
            asked = self._asked(path, body)
            return lambda: self._begin(request, options, streaming=True, resume=resume, observation=seen, asked=asked)

        return stream_type(
            reader_type(
                _call(body, make, stages, options.get("token")),
                merge,
                NdjsonDecoder(merge.validators, merge.batch_size, self._max_line_bytes),
                until=until,
                response_model=response_model,
                strict=strict or self._strict,
            )
        )

    def _failed_stream(self, merge: Merge[ChunkT], error: Exception) -> Stream[ChunkT]:
        """Return a stream whose input is wrong: it says so when it is awaited, entered or iterated."""

        def begin() -> NoReturn:
            raise error

        return Stream(ChunkReader(Call(begin), merge, NdjsonDecoder(merge.validators, 1, self._max_line_bytes)))

    async def _request(
        self,
        model: type[ModelT],
        method: str,
        path: str,
        body: dict[str, Any] | None,
        call: CallOptions,
        *,
        response_model: type[BaseModel] | None = None,
        stages: Sequence[Stage] = (),
    ) -> ModelT:
        def make(body: Mapping[str, Any]) -> Begin:
            content = encode_json(body) if has_body else None
            request = self._build(method, path, content, given_headers(call))
            seen = observe.prepare(self._host.url, path, body, streaming=False)
            asked = self._asked(path, body)
            return lambda: self._begin(request, call, streaming=False, observation=seen, asked=asked)

        has_body = body is not None
        check_call(call)
        answer, exchange = await _call(body or {}, make, stages, call.get("token")).run(_read_whole)
        try:
            reply: ModelT = model.__pydantic_validator__.validate_json(answer)
        except ValidationError as exc:
            raise exchange.report_error(
                ProtocolError(f"the answer to {method} {path} is not what Ollama sends: {misfit(exc, answer)}")
            ) from exc
        reply.set_response_info(exchange.response_info(response_model))
        if exchange.observed is not None:
            exchange.report_end("done", response=reply)
        return reply

    async def _command(self, method: str, path: str, body: dict[str, Any] | None, call: CallOptions) -> StatusResponse:
        """Send a request whose answer has nothing to say but its status."""
        content = None if body is None else encode_json(body)
        _, exchange = await self._send(self._build(method, path, content, given_headers(call)), call)
        reply = StatusResponse(status="success")
        reply.set_response_info(exchange.response_info())
        return reply

    def _asked(self, path: str, body: Mapping[str, Any]) -> Asked | None:
        return Asked(body, self._context_lengths) if path in _ASKS_A_MODEL else None

    async def _send(
        self, request: Request, options: CallOptions, observation: Callable[[], Observed | None] | None = None
    ) -> tuple[bytes, Exchange]:
        check_call(options)
        call = Call(
            lambda: self._begin(request, options, streaming=False, observation=observation), options.get("token")
        )
        return await call.run(_read_whole)

    def _tokens(self) -> list[CancelToken]:
        """Return what aborts a call that begins now, besides its own token."""
        current = self._calls.current()
        return [current] if self._token is None else [current, self._token]

    @contextmanager
    def _scope(self, call: CallOptions) -> Generator[None]:
        """Put awaits that are not exchanges under the tokens of a call."""
        check_call(call)
        given = call.get("token")
        try:
            with CancelToken.any(self._closing, *self._tokens(), *([] if given is None else [given])).scope():
                yield
        except AbortError:
            if self._calls.closed is not None:
                raise StreamClosed("the client is closed") from None
            raise


def _call(
    body: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], Begin],
    stages: Sequence[Stage],
    token: CancelToken | None,
) -> Call:
    return StagedCall(body, make, stages, token) if stages else Call(make(body), token)


_ASKS_A_MODEL = {"/api/chat", "/api/generate"}


async def _read_whole(exchange: Exchange) -> tuple[bytes, Exchange]:
    return await read_body(exchange), exchange


def _plain_headers() -> Secret[httpx.Headers]:
    return Secret(
        httpx.Headers(
            {
                "Accept": "application/json",
                # Answers are cut into lines as they come; Ollama does not compress, and proxies shall not, unless a
                # caller asks for it.
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": _USER_AGENT,
            }
        )
    )


def _headers(defaults: Secret[httpx.Headers], given: Secret[Mapping[str, str]]) -> Secret[httpx.Headers]:
    merged, flaw = _merged(defaults, given)
    if flaw is not None:
        raise RequestError(f"the headers cannot be sent: {flaw}")
    return merged


def _merged(
    defaults: Secret[httpx.Headers], given: Secret[Mapping[str, str]]
) -> tuple[Secret[httpx.Headers], str | None]:
    merged = httpx.Headers(defaults.value)
    try:
        merged.update(given.value)
    except Exception as exc:
        # Only its name: its text may have the value, which may be a key.
        return defaults, f"give a dict of ASCII strings ({type(exc).__name__})"
    # Not every transport looks, and what breaks out of a header may be a separate request.
    return Secret(merged), next(filter(None, (header_flaw(name, value) for name, value in merged.raw)), None)


def hide(call: Any) -> None:
    """Put what may be a key where nothing shows it: the first thing that is done with the options of every method."""
    headers = call.get("headers")
    if headers is not None and not isinstance(headers, Secret):
        call["headers"] = Secret(headers)


def beside(call: CallOptions, left: float | None = None) -> CallOptions:
    """Return the options of what is asked beside a call: its headers, and limits that do not keep it waiting.

    Args:
        call: Options of the call.
        left: Seconds that are left of the call, if it is limited.
    """
    options: CallOptions = {"timeout": look_timeouts(left)}
    headers = call.get("headers")
    return options if headers is None else {**options, "headers": headers}


def given_headers(call: CallOptions) -> Secret[Mapping[str, str]] | None:
    """Return the headers of a call, if it has any."""
    # Most have none, and this is for every call.
    if "headers" not in call:
        return None
    hide(call)
    given = cast("Secret[Mapping[str, str]] | None", call["headers"])
    return given if given is not None and given.value else None


def check_call(call: CallOptions) -> None:
    """Refuse what no call takes, before anything is sent."""
    if not call:
        return
    hide(call)
    if not call.keys() <= _CALL_OPTIONS:
        raise TypeError(f"unknown parameter {min(call.keys() - _CALL_OPTIONS)!r}")
    _check_kind("token", call.get("token"), CancelToken)
    headers: Any = call.get("headers")
    if headers is not None and not isinstance(headers.value, Mapping):
        raise RequestError(f"headers={type(headers.value).__name__}: give a mapping, such as a dict")
    if "timeout" in call:
        Timeouts.of(call["timeout"])
    retries = call.get("retries")
    if retries is not None:
        _retries(retries)


def _kept_options(others: Secret[dict[str, Any]]) -> dict[str, Any]:
    """Return what our own transports can take of httpx's options for its transport, and warn of what they cannot."""
    limits, http2 = others.value.pop("limits", None), others.value.pop("http2", None)
    ignored = ["http2=True: the connections are HTTP/1.1, which is all that Ollama speaks"] if http2 else []
    if limits is not None and limits.max_connections is not None:
        ignored.append("limits.max_connections: a limit would make a queue; use a semaphore")
    for text in ignored:
        warnings.warn(f"{text} (or give a transport= of httpx)", UserWarning, stacklevel=3)
    return {} if limits is None else {"keepalive_expiry": limits.keepalive_expiry or KEEPALIVE_EXPIRY}


def _check_kind(parameter: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{parameter}={type(value).__name__}: give {kind.__name__}")


def _retries(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"retries={value!r}: give how often to try again, 0 or more")
    return value


_CALL_OPTIONS = set(CallOptions.__optional_keys__)
