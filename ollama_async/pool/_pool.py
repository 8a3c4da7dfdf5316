"""``Pool``: many servers behind the methods of one client."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from types import NoneType, TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, cast, overload

import httpx

from ollama_async._call.asked import full_name
from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._client import AsyncClient, Format, Messages, _ChatOptions, _GenerateOptions
from ollama_async._errors import RequestError, shown
from ollama_async._host import parse_host
from ollama_async._model.input import checked_stream, model_name
from ollama_async._model.types import ChatResponse, EmbedResponse, GenerateResponse
from ollama_async._secret import showable
from ollama_async._session import hide

from ._calls import TIMEOUTS, Ask, Calls, Kind, check_kind, collected, embedded, is_count
from ._hosts import Host, HostState, Server
from ._map import Mapper
from ._stream import PoolStream

__all__ = ["Pool"]


class _Place(TypedDict, total=False):
    sticky: Hashable | None
    key: Hashable | None
    priority: float


class _PoolChatOptions(_Place, _ChatOptions, total=False): ...


class _PoolGenerateOptions(_Place, _GenerateOptions, total=False): ...


@showable
class Pool(Mapper, LiveObject):
    """Many servers, or the slots of one, behind the methods of one client.

    A call waits in the pool, without a connection, until a host has a free slot for it. The host is chosen by what only
    a client knows: which has the model, which has it loaded, which has held this conversation, how many calls of this
    pool each runs. A call fails over to another host only before the first byte of its answer. Calls that run are never
    more than the slots.

    Use a pool in one event loop at a time. Close it with ``await pool.aclose()`` or ``async with``.

    Args:
        hosts: The servers: URLs, or ``Host(url, slots=..., models=...)``. A pool of one is a limiter.
        slots: How many calls each host runs at once: its ``OLLAMA_NUM_PARALLEL``, which cannot be asked for. With too
            few it is slower than it could be; with too many, calls queue in the server, where a timeout for the first
            chunk cannot tell that from a server that hangs.
        models: The models that the hosts may be asked for; ``None`` to ask each which it has.
        timeout: Default for every call, as ``AsyncClient`` takes it. ``first_chunk`` counts from when the request is
            sent, ``total`` from the call.
        token: A token that every call is under, besides its own.
        patience: Seconds that a call waits for a host while all that could serve it are out of service.
        **client_options: Further options of each host's ``AsyncClient``: ``headers``, ``verify``, ``strict`` ...

    Raises:
        RequestError: There is no host, or a parameter is of the wrong kind.
        HostError: A host is not a usable address.
    """

    def __init__(
        self,
        hosts: str | Host | Iterable[str | Host],
        *,
        slots: int = 1,
        models: Sequence[str] | None = None,
        timeout: Timeouts | httpx.Timeout | float | None = TIMEOUTS,
        token: CancelToken | None = None,
        patience: float = 30.0,
        **client_options: Any,
    ) -> None:
        self._timeouts = Timeouts.of(timeout)
        check_kind("token", token, CancelToken)
        if not _is_number(patience) or patience < 0:
            raise RequestError(f"patience={shown(patience)}: give a number of seconds, 0 or more")
        self._token = token
        # What a host gets that does not say it, and the options of its client.
        self._slots, self._models, self._client_options = slots, models, client_options
        servers: list[Server] = []
        places: set[Hashable] = set()
        for host in self._given(hosts):
            servers.append(self._server(host))
            if (place := self._place(host)) in places:
                raise RequestError(f"hosts: {_address(host)} is there twice; give it once, with all of its slots")
            places.add(place)
        self._calls = Calls(servers, self._timeouts, patience)
        # What all calls are under; replaced by abort(), so that later ones are not.
        self._all = CancelToken()

    # -- calls --

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[True],
        until: Callable[[ChatResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_PoolChatOptions],
    ) -> PoolStream[ChatResponse]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[False] = False,
        format: Format = None,
        **options: Unpack[_PoolChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse]: ...

    def chat(
        self,
        model: str = "",
        messages: Messages = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Coroutine[Any, Any, ChatResponse] | PoolStream[ChatResponse]:
        """Have a model answer a chat, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.chat``.
            messages: As in ``AsyncClient.chat``.
            stream: Whether to return the answer as a stream.
            **options: All others of ``AsyncClient.chat``, and of the pool: ``sticky=``, the name of the conversation,
                which goes to the host that had it last while that has a free slot (the beginning of the prompt is still
                in its cache); ``key=``, who calls: callers with different keys take turns; ``priority=``, a number:
                calls with a higher one go first.

        Returns:
            The answer, with its host in ``answer["host"]``; with ``stream=True`` a stream of its chunks.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.chat``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/chat``
        """
        return self._answer("chat", model, (messages,), options, stream=stream)

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[True],
        until: Callable[[GenerateResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_PoolGenerateOptions],
    ) -> PoolStream[GenerateResponse]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[False] = False,
        format: Format = None,
        **options: Unpack[_PoolGenerateOptions],
    ) -> Coroutine[Any, Any, GenerateResponse]: ...

    def generate(
        self,
        model: str = "",
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Coroutine[Any, Any, GenerateResponse] | PoolStream[GenerateResponse]:
        """Have a model complete a prompt, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.generate``.
            prompt: As in ``AsyncClient.generate``.
            suffix: As in ``AsyncClient.generate``.
            stream: Whether to return the answer as a stream.
            **options: All others of ``AsyncClient.generate``; ``sticky=``, ``key=`` and ``priority=`` as in ``chat``.

        Returns:
            The answer, with its host in ``answer["host"]``; with ``stream=True`` a stream of its chunks.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.generate``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/generate``
        """
        return self._answer("generate", model, (prompt, suffix), options, stream=stream)

    async def embed(
        self,
        model: str = "",
        input: str | Sequence[str] = "",  # noqa: A002  (the name in Ollama's API)
        **options: Any,
    ) -> EmbedResponse:
        """Turn texts into vectors, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.embed``.
            input: As in ``AsyncClient.embed``.
            **options: All others of ``AsyncClient.embed``; ``key=`` and ``priority=`` as in ``chat``.

        Returns:
            The answer, with its host in ``answer["host"]``.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.embed``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/embed``
        """
        answer: EmbedResponse = await self._whole(self._ask("embed", model, (input,), options))
        return answer

    # -- hosts --

    @property
    def hosts(self) -> tuple[HostState, ...]:
        """What is known of each host now."""
        return tuple(server.state(self._calls.queue.waiting_for(server)) for server in self._calls.servers)

    def client(self, url: str) -> AsyncClient:
        """Return the client of a host, as the pool was given it: to manage its models, say.

        Its calls do not count for the slots.

        Raises:
            RequestError: The pool has no such host.
        """
        found = [server.client for server in self._calls.servers if server.url == url]
        if len(found) != 1:
            which = ", ".join(server.url for server in self._calls.servers)
            raise RequestError(f"the pool has {'several hosts' if found else 'no host'} {url!r}; it has: {which}")
        client: AsyncClient = found[0]
        return client

    # -- ending --

    def abort(self, reason: object = None) -> None:
        """End all calls that wait or run, from any task, thread or signal handler. The pool stays usable.

        Args:
            reason: What ``AbortError.reason`` will be.
        """
        calls, self._all = self._all, CancelToken()
        calls.abort(reason)

    async def aclose(self) -> None:
        """Close the pool and everything that is open on it; idempotent. Waiting calls and readers get ``StreamClosed``.

        Cancellation: safe; once it has begun, all sockets of the pool are closed.
        """
        await self._calls.aclose()

    close = aclose

    async def __aenter__(self) -> Self:
        """Return the pool."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the pool."""
        await self.aclose()

    def __repr__(self) -> str:
        running = sum(server.running for server in self._calls.servers)
        return f"<Pool of {len(self._calls.servers)} hosts: {running} calls run, {self._calls.queue.waiting} wait>"

    # -- inside --

    def _tokens(self) -> list[CancelToken]:
        """Return what aborts a call that begins now, besides its own token: for work that is more than calls."""
        return [token for token in (self._all, self._token) if token is not None]

    def _answer(
        self, kind: Kind, model: str, arguments: tuple[Any, ...], options: dict[str, Any], *, stream: bool
    ) -> Coroutine[Any, Any, Any] | PoolStream[Any]:
        ask = self._ask(kind, model, arguments, options, stream=stream)
        return PoolStream(self._calls, ask) if stream else self._whole(ask)

    def _whole(self, ask: Ask) -> Coroutine[Any, Any, Any]:
        """Return what gives a whole answer."""
        return self._calls.at_hosts(ask, embedded if ask.kind == "embed" else collected)

    def _ask(
        self, kind: Kind, model: str, arguments: tuple[Any, ...], options: dict[str, Any], *, stream: bool = False
    ) -> Ask:
        """Return what a call is; what is wrong with it is raised when it is awaited, as a client does."""
        if "headers" in options:
            hide(options)
        token: Any = options.pop("token", None)
        place = {name: options.pop(name) for name in ("sticky", "key", "priority") if name in options}
        ask = Ask(kind, model, arguments, options, token, self._tokens(), self._timeouts, **place)
        try:
            model_name(model)
            ask.full_name = full_name(model)
            checked_stream(stream)
            if place:
                _check_place(ask)
            check_kind("token", token, CancelToken)
            if "timeout" in options:
                ask.timeouts = Timeouts.of(options["timeout"])
        except RequestError as exc:
            ask.flaw, ask.model, ask.token = exc.with_traceback(None), "", None
        return ask

    # -- what RayPool does in its own way --

    def _given(self, hosts: Any) -> list[Any]:
        """Return the hosts that were given."""
        given = as_list([hosts] if isinstance(hosts, (str, Host)) else hosts)
        if given is None:
            raise RequestError(f"hosts={type(hosts).__name__}: give a URL, a Host, or a list of these")
        if not given:
            raise RequestError("hosts=[]: give at least one URL or Host")
        for each in given:
            if not isinstance(each, (str, Host)):
                raise RequestError(
                    f"hosts has a {type(each).__name__} in it: give URLs, or Host(url, slots=..., models=...)"
                )
        return [Host(each) if isinstance(each, str) else each for each in given]

    def _place(self, host: Any) -> Hashable:
        """Return what no two hosts may have in common."""
        return _address(host)

    def _client(self, host: Any) -> AsyncClient:
        """Return a client of a host."""
        return AsyncClient(host.url, timeout=self._timeouts, **self._client_options)

    def _server(self, host: Any) -> Server:
        count: object = self._slots if host.slots is None else host.slots
        where = _address(host)
        if not is_count(count):
            raise RequestError(f"slots={shown(count)} of {where}: give how many calls it runs at once, 1 or more")
        names = self._models if host.models is None else host.models
        listed = None if names is None else as_list(names)
        if names is not None and (listed is None or not all(isinstance(name, str) for name in listed)):
            raise RequestError(f"models={shown(names)} of {where}: give a list of names, or None to ask the host")
        return Server(host.url, count, listed, self._client(host))


def _address(host: Any) -> str:
    """Return the address of a host, without a password."""
    if not isinstance(host.url, str):
        raise RequestError(f"url={shown(host.url)} of a host: give a str such as 'http://127.0.0.1:11434'")
    return parse_host(host.url).url


def as_list(given: Any) -> list[Any] | None:
    """Return what was given as a list; ``None`` if it is a text, say, where a list is meant."""
    listable = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    return list(cast("Iterable[Any]", given)) if listable else None


def _check_place(ask: Ask) -> None:
    """Refuse what does not say a call's place in the queue."""
    for name, value in (("sticky", ask.sticky), ("key", ask.key)):
        try:
            hash(value)
        except TypeError:
            raise RequestError(f"{name}={shown(value)}: give something that can be hashed, such as a str") from None
    if not _is_number(ask.priority):
        raise RequestError(f"priority={shown(ask.priority)}: give a number; calls with a higher one go first")


def _is_number(value: object) -> bool:
    # NaN is the one that is not what it is.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_talk(client: object, system: object) -> None:
    """Check who makes the calls of a conversation, or of an agent, and its system prompt."""
    if not isinstance(client, (AsyncClient, Pool)):
        raise RequestError(f"client={type(client).__name__}: give an AsyncClient or a Pool")
    if not isinstance(system, (str, NoneType)):
        raise RequestError(f"system={shown(system)}: give a str, or None")
