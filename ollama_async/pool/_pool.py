"""``Pool``: many servers behind the methods of one client."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Coroutine, Hashable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx

from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._client import AsyncClient, Messages, _ChatOptions, _GenerateOptions
from ollama_async._errors import RequestError
from ollama_async._model.types import ChatResponse, EmbedResponse, GenerateResponse
from ollama_async._secret import showable

from ._calls import TIMEOUTS, Call, Calls, Kind
from ._hosts import Host, HostState, Server
from ._map import PoolMap
from ._stream import PoolStream, with_host

__all__ = ["Pool"]


@showable
class Pool(LiveObject):
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
        HostError: A host is no usable address.
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
        given = [hosts] if isinstance(hosts, (str, Host)) else list(hosts)
        self._timeouts = Timeouts.of(timeout)
        self._token = token
        self._clients: dict[str, AsyncClient] = {}
        servers: list[Server] = []
        for each in given:
            host = each if isinstance(each, Host) else Host(each)
            count = slots if host.slots is None else host.slots
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:  # type: ignore[redundant-expr]
                raise RequestError(f"slots={count!r}: give how many calls a host runs at once, 1 or more")
            if host.url in self._clients:
                raise RequestError(f"the host {host.url!r} is there twice: give it once, with all of its slots")
            self._clients[host.url] = AsyncClient(host.url, timeout=self._timeouts, **client_options)
            servers.append(Server(host.url, count, host.models if host.models is not None else models))
        if not servers:
            raise RequestError("a pool needs at least one host")
        self._calls = Calls(self._clients, servers, self._timeouts, patience)
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
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Unpack[_ChatOptions],
    ) -> PoolStream[ChatResponse]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[False] = False,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse]: ...

    def chat(
        self,
        model: str = "",
        messages: Messages = None,
        *,
        stream: bool = False,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Any,
    ) -> Coroutine[Any, Any, ChatResponse] | PoolStream[ChatResponse]:
        """Have a model answer a chat, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.chat``.
            messages: As in ``AsyncClient.chat``.
            stream: Whether to return the answer as a stream.
            sticky: Name of the conversation, which goes to the host that had it last while that has a free slot: it
                still has the beginning of the prompt in its cache.
            key: Who calls: callers with different keys take turns.
            priority: Calls with a higher one go first.
            **options: All others of ``AsyncClient.chat``.

        Returns:
            The answer, with its host in ``answer["host"]``; with ``stream=True`` a stream of its chunks.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.chat``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/chat``
        """
        call = self._call("chat", model, (messages,), options, sticky=sticky, key=key, priority=priority)
        made: PoolStream[ChatResponse] = PoolStream(self._calls, call)
        return made if stream else made.whole()

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[True],
        until: Callable[[GenerateResponse], object] | None = None,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Unpack[_GenerateOptions],
    ) -> PoolStream[GenerateResponse]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[False] = False,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Unpack[_GenerateOptions],
    ) -> Coroutine[Any, Any, GenerateResponse]: ...

    def generate(
        self,
        model: str = "",
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: bool = False,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Any,
    ) -> Coroutine[Any, Any, GenerateResponse] | PoolStream[GenerateResponse]:
        """Have a model complete a prompt, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.generate``.
            prompt: As in ``AsyncClient.generate``.
            suffix: As in ``AsyncClient.generate``.
            stream: Whether to return the answer as a stream.
            sticky: As in ``chat``.
            key: As in ``chat``.
            priority: As in ``chat``.
            **options: All others of ``AsyncClient.generate``.

        Returns:
            The answer, with its host in ``answer["host"]``; with ``stream=True`` a stream of its chunks.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.generate``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/generate``
        """
        call = self._call("generate", model, (prompt, suffix), options, sticky=sticky, key=key, priority=priority)
        made: PoolStream[GenerateResponse] = PoolStream(self._calls, call)
        return made if stream else made.whole()

    async def embed(
        self,
        model: str = "",
        input: str | Sequence[str] = "",  # noqa: A002  (the name in Ollama's API)
        *,
        key: Hashable | None = None,
        priority: float = 0,
        **options: Any,
    ) -> EmbedResponse:
        """Turn texts into vectors, at the host that is best for it.

        Args:
            model: As in ``AsyncClient.embed``.
            input: As in ``AsyncClient.embed``.
            key: As in ``chat``.
            priority: As in ``chat``.
            **options: All others of ``AsyncClient.embed``.

        Returns:
            The answer, with its host in ``answer["host"]``.

        Raises:
            NoHost: No host could take the call.
            OllamaError: As ``AsyncClient.embed``.

        Cancellation: while it waits, nothing has been sent; later it closes the connection at once.

        Server: ``POST /api/embed``
        """
        call = self._call("embed", model, (input,), options, key=key, priority=priority)
        lease, answer = await self._calls.begin(call, _embed)
        lease.release()
        return with_host(answer, lease.server.url)

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        model: str | None = None,
        kind: Kind | None = None,
        ordered: bool = False,
        concurrency: int | None = None,
        token: CancelToken | None = None,
        **options: Any,
    ) -> PoolMap:
        """Make a call for each item: ``async for result in pool.map(items, model="llama3.2")``.

        Items are read as slots become free. A call that fails is a result, with its error. Leaving the loop aborts the
        calls that run, and no more are made.

        Args:
            items: Each a prompt, or a dict of a call's parameters: with ``messages`` it is a chat, with ``prompt`` a
                completion, with ``input`` an embedding. Any iterable, also an asynchronous one.
            model: The model of items that name none.
            kind: What prompts are for: ``"chat"`` (the default), ``"generate"`` or ``"embed"``.
            ordered: Whether results come in the order of the items: each then waits for those before it.
            concurrency: How many calls are made at once; by default one more for each host than it has slots.
            token: Aborts all: results of what runs come with their partial answers, then the loop raises
                ``AbortError``.
            **options: Options of every call.

        Returns:
            An asynchronous iterable of ``MapResult``.

        Raises:
            RequestError: ``concurrency`` is below 1.
        """
        count = sum(server.slots + 1 for server in self._calls.servers) if concurrency is None else concurrency
        if count < 1:
            raise RequestError(f"concurrency={count!r}: give how many calls are made at once, 1 or more")
        defaults = options | ({} if model is None else {"model": model})
        return PoolMap(self, items, kind, defaults, ordered=ordered, concurrency=count, token=token)

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
        try:
            return self._clients[url]
        except KeyError:
            raise RequestError(f"the pool has no host {url!r}; it has: {', '.join(self._clients)}") from None

    # -- ending --

    def abort(self, reason: object = None) -> None:
        """End all calls that wait or run, from any task, thread or signal handler. The pool stays usable.

        Args:
            reason: What ``AbortError.reason`` will be.
        """
        calls, self._all = self._all, CancelToken()
        calls.abort(reason)

    async def aclose(self) -> None:
        """Close the pool and everything that is open on it; idempotent. Whoever waits or reads gets ``StreamClosed``.

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

    def _call(
        self,
        kind: Kind,
        model: str,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        *,
        sticky: Hashable | None = None,
        key: Hashable | None = None,
        priority: float = 0,
    ) -> Call:
        timeouts = Timeouts.of(options.pop("timeout")) if "timeout" in options else self._timeouts
        given, own = options.pop("token", None), CancelToken()
        tokens = [each for each in (given, self._token) if each is not None]
        return Call(
            kind=kind,
            model=model,
            arguments=arguments,
            options=options,
            given=given,
            own=own,
            token=CancelToken.any(own, self._all, *tokens),
            timeouts=timeouts,
            sticky=sticky,
            key=key,
            priority=priority,
            tried={},
        )


async def _embed(client: AsyncClient, call: Call) -> EmbedResponse:
    return await client.embed(call.model, *call.arguments, token=call.token, timeout=call.limits(), **call.options)
