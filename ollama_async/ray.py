"""``RayPool``: a pool whose requests are sent by actors of a Ray cluster, each beside its Ollama server.

It is for servers that only their own machine reaches, or for a cluster that is there already; a ``Pool`` in one process
is faster for all others. It is a ``Pool`` in all but the way of a request: the driver has the queue, the slots, the
limits and the partial answers, and an actor sends bytes on. Nothing waits in Ray, and Ray tries nothing again. Requests
are stopped by tokens in the actors: ``ray.cancel`` loses some of the cancels that follow a call at once.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import logging
import ssl
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import httpx

from ._cancel import CancelToken
from ._client import AsyncClient
from ._errors import ConnectError, ConnectionBroken, NoHost, OllamaError, RequestError, StreamClosed, shown
from ._wire.tasks import cancel_once
from ._wire.transport import DirectTransport
from .pool import Pool
from .pool._pool import as_list

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable

    from .pool._calls import Ask

__all__ = ["RayHost", "RayPool"]

# How long an actor may take to start: Ray keeps one that fits on no machine waiting for ever.
_START_SECONDS = 30.0
# How long a cluster may take to accept a connection.
_LOOK_SECONDS = 10.0
# An answer is sent on in blocks of this many seconds for each answer that the actor sends: a message of Ray takes the
# driver longer than a whole request over a socket does.
_PACE = 0.02
# How long an actor waits for what comes with the first bytes: a short answer is then one message.
_GATHER_SECONDS = 0.002
# Marks of aborts whose calls have not arrived; of one whose call is over it stays.
_EARLY_KEPT = 1024
# How often a call is made anew after its actor has died.
_LIVES = 5
# What the actor connects to the server with, and the driver does not need.
_OF_THE_CONNECTION = ("verify", "cert", "proxy", "uds")


@dataclass(frozen=True, slots=True)
class RayHost:
    """An Ollama server, and where in the cluster the actor for it runs.

    Attributes:
        url: Address of the server, as the actor's machine reaches it.
        slots: How many calls run there at once: its ``OLLAMA_NUM_PARALLEL``.
        resources: What Ray must find on the machine: ``{"gpu1": 1}`` if it was started with ``--resources``.
        node_id: Id of the machine in Ray, which the actor must run on.
        models: The models that it may be asked for; ``None`` to ask the server which it has.
    """

    url: str = "http://127.0.0.1:11434"
    slots: int = 1
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    node_id: str | None = None
    models: Iterable[str] | None = None


# Method, URL, headers and body of a request, and how many seconds there are for its connection.
_Sent = tuple[str, str, list[tuple[bytes, bytes]], bytes, float | None]
# The news of an answer (status and headers, blocks, an error), and whether that is the last of it.
_Came = tuple[list[Any], bool]


class _Relay:
    """What runs in an actor: sends requests from its machine, each under a token, and the answers back.

    Ray runs what is in the group "control" and the other methods in threads with a loop each. So each of the two writes
    first and then looks at what the other writes: an abort that comes before its request is kept for it.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._sending: dict[str, _Sending] = {}
        self._early: dict[str, None] = {}

    async def ready(self) -> None:
        """Return when the actor runs."""

    async def send(self, id: str, request: _Sent) -> _Came:  # noqa: A002
        """Send a request, and return how its answer begins. Nothing is raised, since Ray would wrap it."""
        sending = self._sending[id] = _Sending(DirectTransport(token=(token := CancelToken()), **self._options), token)
        if id in self._early:
            self._early.pop(id, None)
            token.abort()
        sending.begin(request)
        return await self.more(id)

    async def more(self, id: str) -> _Came:  # noqa: A002
        """Wait for more of an answer."""
        sending = self._sending.get(id)
        if sending is None:
            return [], True
        came, ended = await sending.take(_PACE * len(self._sending))
        if ended:
            self._sending.pop(id, None)
        return came, ended

    async def abort(self, id: str) -> None:  # noqa: A002
        """Abort a request, also one that has not arrived yet."""
        self._early[id] = None
        sending = self._sending.pop(id, None)
        if sending is not None:
            sending.token.abort()
            self._early.pop(id, None)
        while len(self._early) > _EARLY_KEPT:
            del self._early[next(iter(self._early))]


class _Sending:
    """A request that an actor has sent, and the news of its answer that were not sent on."""

    def __init__(self, transport: DirectTransport, token: CancelToken) -> None:
        self.token: CancelToken = token
        self._transport = transport
        self._reading: asyncio.Task[None] | None = None
        self._came: list[Any] = []
        self._more = asyncio.Event()
        # When the next block may be sent on.
        self._due = 0.0

    def begin(self, request: _Sent) -> None:
        """Send the request."""
        self._reading = asyncio.create_task(self._read(request))
        self._reading.add_done_callback(lambda _: self._more.set())

    async def _read(self, request: _Sent) -> None:
        method, url, headers, content, connect = request
        limits = {"timeout": {"connect": connect}}
        try:
            sent = httpx.Request(method, url, headers=headers, content=content, extensions=limits)
            response = await self._transport.handle_async_request(sent)
            self._came.append((response.status_code, response.headers.raw))
            self._more.set()
            async for block in response.aiter_raw():
                self._came.append(block)
                self._more.set()
        except (httpx.HTTPError, OllamaError) as exc:
            self._came.append(exc)
        finally:
            self._transport.close()

    async def take(self, pace: float) -> _Came:
        """Wait until something has come and is due, and take it."""
        reading = self._reading
        assert reading is not None
        await self._more.wait()
        loop = asyncio.get_running_loop()
        await asyncio.wait({reading}, timeout=max(self._due - loop.time(), _GATHER_SECONDS))
        self._more.clear()
        self._due = loop.time() + pace
        came, self._came = self._came, []
        return came, reading.done()


class _ActorDied(httpx.ReadError):
    """The actor that an answer came through has died."""


class _NoActor(httpx.ConnectError):
    """There is no actor to send a request by."""


class _ActorTransport(httpx.AsyncBaseTransport):
    """Sends requests by an actor, which it starts when it needs one.

    Args:
        where: What the actor is for, for errors.
        start: Starts an actor.

    Attributes:
        actor: The actor, if there is one.
        ray: The package.
    """

    def __init__(self, where: str, start: Callable[[], Any]) -> None:
        self._where = where
        self._start = start
        self.ray: Any = _import_ray()
        self.actor: Any = None
        # The one that is known to run.
        self._running: Any = None

    async def connect(self) -> Any:
        """Return the actor when it runs.

        Raises:
            httpx.ConnectError: It does not.
        """
        actor = self.actor = self.actor or self._start()
        if actor is self._running:
            return actor
        try:
            await asyncio.wait_for(asyncio.wrap_future(actor.ready.remote().future()), _START_SECONDS)
        except TimeoutError:
            why = f"no machine of the Ray cluster had room for {self._where} within {_START_SECONDS:g} s"
            self.give_up(actor)
        except self.ray.exceptions.RayError as exc:
            why = f"the actor for {self._where} did not start: {_first_line(exc)}"
            self.give_up(actor)
        else:
            self._running = actor
            return actor
        raise _NoActor(why)

    def give_up(self, actor: Any) -> None:
        """End an actor; the next request starts another one."""
        if self.actor is actor:
            self.actor = None
        if self.ray.is_initialized():
            self.ray.kill(actor)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Have the actor send a request, and return the answer when its head has come.

        Cancellation: the actor is told to close the connection.
        """
        content = await request.aread()
        actor = await self.connect()
        connect = request.extensions.get("timeout", {}).get("connect")
        answer = _Answer(self, actor)
        try:
            sent = (request.method, str(request.url), request.headers.raw, content, connect)
            status, headers = await answer.begin(sent)
        except BaseException:
            answer.abort()
            raise
        return httpx.Response(status, headers=headers, stream=answer)

    async def aclose(self) -> None:
        """End the actor, and with it its connections.

        Cancellation: safe; there is nothing to wait for.
        """
        if self.actor is not None:
            self.give_up(self.actor)

    def failure(self, actor: Any, exc: Exception) -> httpx.ReadError:
        """Return what is to be raised for an error of Ray."""
        text = f"the actor for {self._where} has failed: {_first_line(exc)}"
        if not isinstance(exc, self.ray.exceptions.RayActorError):
            return httpx.ReadError(text)
        self.give_up(actor)
        return _ActorDied(text)


class _Answer(httpx.AsyncByteStream):
    """The answer to a request that an actor has sent."""

    def __init__(self, transport: _ActorTransport, actor: Any) -> None:
        self._transport = transport
        self._actor = actor
        self._id = uuid.uuid4().hex
        self._came: list[Any] = []
        self._ended = False

    async def begin(self, request: _Sent) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Send the request, and return status and headers of the answer."""
        try:
            await self._take(self._actor.send.remote(self._id, request))
        except _ActorDied as exc:
            raise _NoActor(str(exc)) from None
        head: Any = self._came.pop(0)
        if isinstance(head, Exception):
            raise head
        status, headers = head
        return status, headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            for block in self._came:
                if isinstance(block, Exception):
                    raise block
                yield block
            if self._ended:
                return
            await self._take(self._actor.more.remote(self._id))

    async def _take(self, reference: Any) -> None:
        try:
            self._came, self._ended = await reference
        except self._transport.ray.exceptions.RayError as exc:
            self._ended = True
            raise self._transport.failure(self._actor, exc) from None

    async def aclose(self) -> None:
        """Have the actor close the connection, unless the answer is at its end.

        Cancellation: safe; there is nothing to wait for.
        """
        self.abort()

    def abort(self) -> None:
        """Do so; in the loop, since Ray takes locks."""
        if not self._ended:
            self._ended = True
            self._actor.abort.remote(self._id)


class RayPool(Pool):
    """Ollama servers on the machines of a Ray cluster: a ``Pool`` with an actor beside each server that sends requests.

    ``async with`` starts its actors, and ends them and whatever runs in them. Where an actor dies, a whole answer that
    it was getting is asked for again; a stream ends with ``ConnectionBroken``.

    Args:
        hosts: Servers, each with its place in the cluster; ``None`` for one on each machine, at ``url``.
        address: Address of the cluster, as ``ray.init()`` takes it; not used where Ray is connected already.
        url: Address of the server on each machine, if no hosts are given.
        slots: How many calls a host runs at once, if no hosts are given.
        patience: How many seconds a call waits while no host is in service.
        token: A token that every call is under.
        **options: Further options of ``Pool``, such as ``timeout``, ``models`` or ``headers``.

    Raises:
        ImportError: The extra ``ray`` is not installed.
        RequestError: A parameter is not valid.

    Example:
        >>> async with RayPool([RayHost(slots=4, resources={"gpu1": 1})], address="auto") as pool:
        ...     result = await batch("prompts.jsonl", "answers.jsonl", pool=pool, model="llama3.2")
    """

    def __init__(
        self,
        hosts: Iterable[RayHost] | None = None,
        *,
        address: str | None = None,
        url: str = "http://127.0.0.1:11434",
        slots: int = 1,
        patience: float = 30.0,
        token: CancelToken | None = None,
        **options: Any,
    ) -> None:
        self._ray = _import_ray()
        if address is not None and not (isinstance(address, str) and address):  # type: ignore[redundant-expr]
            raise RequestError(f"address={shown(address)}: give the address of a Ray cluster, such as 'auto', or None")
        for name in ("transport", "http_client"):
            if name in options:
                raise RequestError(f"{name}= does not go with RayPool: its actors make the connections")
        self._address = address
        self._connection = {name: options.pop(name) for name in _OF_THE_CONNECTION if name in options}
        if isinstance(self._connection.get("verify"), ssl.SSLContext):
            raise RequestError("verify=SSLContext: give True, False, or the path of a file that each machine has")
        # Says now what is wrong with them.
        DirectTransport(**self._connection)
        # None if there is not one on each machine.
        self._each = RayHost(url, slots) if hosts is None else None
        self._transports: list[_ActorTransport] = []
        self._joining: asyncio.Task[None] | None = None
        given: Any = [self._each] if hosts is None else hosts
        super().__init__(given, slots=slots, patience=patience, token=token, **options)
        self._calls.connect = self._connect

    async def __aenter__(self) -> Self:
        """Join the cluster, start the actors, and return the pool.

        Raises:
            NoHost: There is no such cluster.
            AbortError: The token of the pool was aborted.
        """
        await self._connect(CancelToken.any(*self._tokens()))
        return self

    def _whole(self, ask: Ask) -> Any:
        return self._while_actors_die(ask)

    async def _while_actors_die(self, ask: Ask) -> Any:
        for _ in range(_LIVES):
            try:
                return await super()._whole(ask)
            except (ConnectError, ConnectionBroken) as exc:
                if not isinstance(exc.__cause__, (_ActorDied, _NoActor)):
                    raise
                # Nothing of the answer was given to anybody.
                ask = replace(ask, tried={})
        return await super()._whole(ask)

    # -- the cluster --

    async def _connect(self, token: CancelToken) -> None:
        """Join the cluster, once."""
        joining = self._joining
        if joining is None:
            joining = self._joining = asyncio.get_running_loop().create_task(self._join())
        if not joining.done():
            # None of those who wait ends it for the others.
            with token.scope():
                await asyncio.wait({joining})
        if joining.cancelled():
            raise StreamClosed("the pool is closed")
        error = joining.exception()
        if error is not None:
            if self._joining is joining:
                self._joining = None
            raise copy.copy(error)

    async def _join(self) -> None:
        if not self._ray.is_initialized():
            try:
                await _look_for(self._address or "")
                quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
                await asyncio.to_thread(self._ray.init, address=self._address, **quiet)
            except Exception as exc:
                raise NoHost({f"the Ray cluster at {self._address!r}": _first_line(exc)}) from exc
        if self._each is not None:
            nodes = [node["NodeID"] for node in await asyncio.to_thread(self._ray.nodes) if node["Alive"]]
            self._transports.clear()
            self._calls.servers[:] = [self._server(replace(self._each, node_id=node)) for node in nodes]
        # What does not start is found out by the first call for it.
        await asyncio.gather(*(transport.connect() for transport in self._transports), return_exceptions=True)

    async def aclose(self) -> None:
        """Close the pool and everything that is open on it, and end its actors; the connection to the cluster stays.

        Cancellation: safe; once it has begun, all sockets of the pool are closed.
        """
        if self._joining is not None:
            cancel_once(self._joining)
        await super().aclose()

    close = aclose

    # -- what a Pool does in another way --

    def _given(self, hosts: Any) -> list[Any]:
        given = as_list(hosts)
        if given is None:
            raise RequestError(f"hosts={type(hosts).__name__}: give a list of RayHost, or None for each machine")
        if not given:
            raise RequestError("hosts=[]: give at least one RayHost, or None for each machine of the cluster")
        for host in given:
            if not isinstance(host, RayHost):
                raise RequestError(f"hosts has a {type(host).__name__} in it: give RayHost(url, slots, resources)")
            if not _are_resources(host.resources):
                text = f"resources={shown(host.resources)}: give names and amounts, such as {{'gpu1': 1}}"
                raise RequestError(text)
            if host.node_id is not None and not isinstance(host.node_id, str):
                raise RequestError(f"node_id={shown(host.node_id)}: give the NodeID of one of ray.nodes(), or None")
        return given

    def _place(self, host: Any) -> Hashable:
        return super()._place(host), frozenset(host.resources.items()), host.node_id

    def _client(self, host: Any) -> AsyncClient:
        where = " and ".join([host.url, *([shown(dict(host.resources))] if host.resources else [])])
        transport = _ActorTransport(where, partial(_start, self._ray, host, self._connection))
        self._transports.append(transport)
        return AsyncClient(host.url, transport=transport, timeout=self._timeouts, **self._client_options)


async def _look_for(address: str) -> None:
    """Find out whether anything listens at an address: Ray tries for minutes, in a thread that nothing can stop."""
    name, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        async with asyncio.timeout(_LOOK_SECONDS):
            _, writer = await asyncio.open_connection(name.strip("[]"), int(port))
        writer.close()


def _start(ray: Any, host: RayHost, connection: dict[str, Any]) -> Any:
    """Start an actor for a host."""
    relay = type("OllamaRelay", (_Relay,), {"abort": ray.method(concurrency_group="control")(_Relay.abort)})
    options: dict[str, Any] = {"num_cpus": 0, "resources": dict(host.resources)}
    if host.node_id is not None:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(host.node_id, soft=False)
    elif not host.resources:
        options["scheduling_strategy"] = "SPREAD"
    remote = ray.remote(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)(relay)
    return remote.options(**options).remote(connection)


def _are_resources(given: Any) -> bool:
    amounts = given
    return isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(amount, (int, float)) and not isinstance(amount, bool) and amount > 0
        for name, amount in amounts.items()
    )


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), type(exc).__name__)


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as exc:
        raise ImportError('RayPool needs ray; install it with: pip install "ollama-async[ray]"') from exc
