"""The slots of the hosts: the calls that wait for one, and what is found out about the hosts meanwhile."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, cast

from ollama_async._call.asked import full_name
from ollama_async._call.failures import fresh
from ollama_async._call.observe import CallEnd, Observed
from ollama_async._call.timeouts import Timeouts, look_timeouts
from ollama_async._cancel import CancelToken
from ollama_async._errors import (
    ConnectError,
    ConnectionBroken,
    NoHost,
    NotFoundError,
    OllamaError,
    PhaseTimeout,
    RequestError,
    ResponseError,
    StreamClosed,
    StreamTruncated,
    shown,
)
from ollama_async._loops import in_loop, resolve, running_loop

from ._hosts import Outage, Queue, Server, Waiter

if TYPE_CHECKING:
    from ollama_async._call.answer import Answer
    from ollama_async._call.exchange import Exchange
    from ollama_async._call.stream import Stream

__all__ = ["TIMEOUTS", "Ask", "Calls", "Kind", "Lease", "check_kind", "is_count", "with_host"]

_log = logging.getLogger("ollama_async.pool")

T = TypeVar("T")
Attempt = Callable[["Lease", dict[str, Any]], Awaitable[T]]
Kind = Literal["chat", "generate", "embed"]

TIMEOUTS = Timeouts(connect=5.0, first_chunk=300.0)
_FIRST_LOOK_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 60.0
_LOADED_AGAIN_SECONDS = 5.0
_LONGEST_TICK = 1.0
# Nanoseconds of an answer's total time that nothing in it accounts for: it waited in the server.
_QUEUED_NS = 250_000_000
# A model that was loaded already takes less than this.
_LOADED_NS = 100_000_000

# The statuses of proxies whose server is away.
_FAILED_OVER = {502, 503, 504}


@dataclass(slots=True)
class Ask:
    """What a call of a pool is, how it waits, and what has become of it at the hosts so far.

    Attributes:
        kind: The method of a client that it is made by.
        model: The first argument of that.
        arguments: The other ones.
        options: Its options, without those that are the pool's.
        token: The caller's token, if one was given.
        tokens: Those of the pool.
        timeouts: Its limits.
        sticky: The name of its conversation.
        key: Who calls.
        priority: Calls with a higher one go first.
        flaw: What is wrong with it, which is raised when it begins.
        full_name: Its model as a server lists it.
        deadline: When it must be over, by the loop's clock; waiting and earlier attempts are part of its time.
        tried: What the hosts said that have failed.
    """

    kind: Kind
    model: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    token: CancelToken | None
    tokens: list[CancelToken]
    timeouts: Timeouts
    sticky: Hashable | None = None
    key: Hashable | None = None
    priority: float = 0
    flaw: RequestError | None = None
    full_name: str = ""
    deadline: float | None = None
    tried: dict[Server, OllamaError] = field(default_factory=dict["Server", OllamaError])


class Lease:
    """A slot that a call has; given back once.

    A stream keeps it as long as its exchange is open, whose end it is told of as one that observes it.
    """

    __slots__ = ("_answer", "_calls", "_observed", "ask", "begun", "headers", "server")

    def __init__(self, calls: Calls, server: Server, ask: Ask) -> None:
        self._calls = calls
        # None until it holds for an exchange: another attempt at the same host takes its observer with it.
        self._answer: Answer[Any] | None = None
        self._observed: Observed | None = None
        self.headers: Mapping[str, str] = {}
        self.server: Server = server
        self.ask: Ask = ask
        # Whether an answer has begun: it is not asked for at another host.
        self.begun: bool = False

    def release(self) -> None:
        """Give the slot back; idempotent."""
        self._calls.give_back(self)

    def hold_for(self, exchange: Exchange, answer: Answer[Any]) -> None:
        """Keep the slot until the exchange ends."""
        if self._answer is not None:
            return
        self._answer = answer
        self._observed = exchange.observed
        exchange.observed = Observed(self, _nothing if self._observed is None else self._observed.partial)
        # Ended by another thread, which may have looked for whom to tell before this one was there.
        if exchange.reader.failure_outcome is not None:
            self.release()

    def retrying(self, error: BaseException, delay: float) -> None:
        """Hear that an attempt at the same host has failed, and another one follows."""
        if self._observed is not None:
            self._observed.retrying(error, delay)

    def ended(self, end: CallEnd) -> None:
        """Hear that the exchange is over."""
        if isinstance(end.error, OllamaError):
            self.note_end(end.error)
        self.release()
        if end.outcome == "done" and self._answer is not None:
            # The chunk that is being delivered, which is the last.
            self.note_answer(self._answer.chunks[self._answer.index - 1])
        if self._observed is not None:
            self._observed.ended(end)

    def note_answer(self, last: Any) -> None:
        """Learn from the last chunk of an answer, or from all of it."""
        self._calls.note_answer(self, last)

    def note_end(self, error: OllamaError) -> None:
        """Learn from the end of an answer that has begun: a host may send the head, and hang."""
        if isinstance(error, PhaseTimeout) and error.phase == "first_chunk":
            self._calls.note_failure(self.server, self.ask, error)


def _nothing() -> None:
    """Return no partial answer: it is not read."""


class Calls:
    """The calls of a pool that wait and run, and what they do with its hosts."""

    def __init__(self, servers: list[Server], timeouts: Timeouts, patience: float) -> None:
        self.servers = servers
        self.queue: Queue = Queue(servers)
        self.closed: bool = False
        self.timeouts = timeouts
        # What is to be done before the first call, if anything is.
        self.connect: Callable[[CancelToken], Awaitable[None]] | None = None
        self._patience = patience
        # What ends the last call whose answer came as a whole, and the token of all of that.
        self._made_of: list[CancelToken] = []
        self._joint_token = CancelToken()
        self._leases: set[Lease] = set()
        # Looks at hosts, and probes.
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Until then calls wait for the first looks: to tell which host has a model loaded.
        self._choose_at = float("-inf")

    async def aclose(self) -> None:
        """End what waits, and looks and probes; all sockets are closed before it waits for anything."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for waiter in self.queue.all():
            waiter.wake()
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        closes = [loop.create_task(server.client.aclose()) for server in self.servers]
        await asyncio.gather(*closes, *tasks, return_exceptions=True)

    async def acquire(self, ask: Ask, token: CancelToken) -> Lease:
        """Wait for a slot.

        Args:
            ask: What waits.
            token: All that ends the wait.

        Raises:
            OllamaError: No host is left for the call, or it was ended.
        """
        self._check_open(token)
        if self.connect is not None:
            await self.connect(token)
            self._check_open(token)
        loop = self._enter(ask)
        server = None if ask.tried else self.queue.at_once(ask.full_name, ask.key)
        if server is not None:
            return self._lease(server, ask)
        waiter = Waiter(ask.full_name, frozenset(ask.tried), ask.sticky)
        self.queue.add(waiter, ask.key, ask.priority)
        try:
            self._dispatch()
            if waiter.server is None and not waiter.gone:
                await self._turn(loop, waiter, ask, token)
            if waiter.server is None:
                if waiter.gone or not self._in_service(ask):
                    raise self.refusal(ask)
                raise PhaseTimeout("total", ask.timeouts.total or 0.0)
        except BaseException:
            self.queue.remove(waiter)
            if waiter.server is not None:
                waiter.server.running -= 1
                self._dispatch()
            raise
        return self._lease(waiter.server, ask)

    def _lease(self, server: Server, ask: Ask) -> Lease:
        lease = Lease(self, server, ask)
        self._leases.add(lease)
        return lease

    async def _turn(self, loop: asyncio.AbstractEventLoop, waiter: Waiter, ask: Ask, token: CancelToken) -> None:
        """Wait for a host, for the end of the call's time, or for what ends it."""
        woken: asyncio.Future[None] = loop.create_future()
        waiter.wake = partial(resolve, woken)
        timer = None if ask.deadline is None else loop.call_at(ask.deadline, resolve, woken)
        end = token.on_abort(lambda _: in_loop(loop, resolve, woken))
        try:
            await woken
        finally:
            end.remove()
            if timer is not None:
                timer.cancel()
        self._check_open(token)

    def _joint(self, ask: Ask) -> CancelToken:
        """Return a token of all that ends a call; one for all calls of a map or a batch, which share theirs."""
        made_of = ask.tokens if ask.token is None else [ask.token, *ask.tokens]
        if len(made_of) == 1:
            return made_of[0]
        if made_of != self._made_of:
            self._made_of, self._joint_token = made_of, CancelToken.any(*made_of)
        return self._joint_token

    def give_back(self, lease: Lease) -> None:
        """Take a slot back, in the loop that it was given in; idempotent."""
        if lease in self._leases:
            self._leases.discard(lease)
            lease.server.running -= 1
            if running_loop() is not None:
                self._dispatch()

    async def at_hosts(self, ask: Ask, attempt: Attempt[T]) -> T:
        """Make a call whose answer comes as a whole, at one host after the other until one answers.

        Args:
            ask: The call.
            attempt: Makes it at the host of a lease, with the options that it is given.
        """
        token = self._joint(ask)
        host: str | None = None
        while True:
            try:
                lease = await self.acquire(ask, token)
            except OllamaError as exc:
                exc.host = exc.host or host
                raise
            host = lease.server.url
            options: dict[str, Any] = {**ask.options, "token": token}
            if ask.deadline is not None:
                left = max(ask.deadline - asyncio.get_running_loop().time(), 1e-6)
                options["timeout"] = replace(ask.timeouts, total=left)
            try:
                return with_host(await attempt(lease, options), host)
            except OllamaError as exc:
                exc.host = host
                _say_whole_limit(exc, ask)
                if lease.begun:
                    lease.note_end(exc)
                    raise
                if not self.goes_on(lease, exc):
                    raise
            finally:
                lease.release()

    def goes_on(self, lease: Lease, exc: OllamaError) -> bool:
        """Note that a call has failed at a host; return whether it is made at another one."""
        lease.release()
        exc.host = lease.server.url
        if not self.note_failure(lease.server, lease.ask, exc):
            return False
        lease.ask.tried[lease.server] = fresh(exc, exc.partial)
        return True

    def note_failure(self, server: Server, ask: Ask, exc: OllamaError) -> bool:
        """Note what a failed call says of its host; return whether another host may do better."""
        why = _said(exc)
        model = ask.full_name
        if isinstance(exc, NotFoundError):
            # One that is alone is asked each time: nothing else finds out that it has got the model.
            if len(self.servers) == 1:
                return False
            server.lacking(model)
            return True
        if isinstance(exc, ConnectError) or (isinstance(exc, PhaseTimeout) and exc.phase == "connect"):
            server.put_out(None, ask.kind, why)
            return True
        # Also what fails at once: the host would seem to be the least busy one, and draw all calls to it.
        broken = isinstance(exc, ConnectionBroken) or (isinstance(exc, PhaseTimeout) and exc.phase == "first_chunk")
        if broken or (isinstance(exc, ResponseError) and exc.status_code in _FAILED_OVER):
            server.put_out(model, ask.kind, why)
            return True
        return False

    def note_answer(self, lease: Lease, last: Any) -> None:
        """Learn from the last chunk of an answer."""
        server = lease.server
        server.loaded.add(lease.ask.full_name)
        load, total = last.load_duration or 0, last.total_duration or 0
        if load > _LOADED_NS:
            # Another model may have made room for it.
            server.loaded_at = float("-inf")
        queued = total - load - (last.prompt_eval_duration or 0) - (last.eval_duration or 0)
        others = server.running - (lease in self._leases)
        if queued > max(_QUEUED_NS, total // 10) and others and not server.warned:
            server.warned = True
            _log.warning(
                "%s let a call wait for %.1f s while %d calls of this pool ran there: slots=%d seems too high, or "
                "others use it, too",
                server.url,
                queued / 1e9,
                others,
                server.slots,
            )

    def _in_service(self, ask: Ask) -> bool:
        model = ask.full_name
        return any(server.has(model) and server.outage(model) is None for server in self.servers)

    def refusal(self, ask: Ask) -> OllamaError:
        """Return the error of a call that no host is left for."""
        model = ask.full_name
        if len(self.servers) == 1 and ask.tried:
            error_there = ask.tried[self.servers[0]]
            return fresh(error_there, error_there.partial)
        if not any(server.has(model) for server in self.servers):
            where = ", ".join(server.url for server in self.servers)
            return NotFoundError(f"model {ask.model!r} not found at any host: {where}", 404)
        said: dict[str, str] = {}
        for server in self.servers:
            error, outage = ask.tried.get(server), server.outage(model)
            why = f"has no model {ask.model!r}" if outage is None else outage.why
            said[server.url] = why if error is None else _said(error)
        return NoHost(said)

    # -- looks and probes --

    def _check_open(self, token: CancelToken) -> None:
        if self.closed:
            raise StreamClosed("the pool is closed")
        token.raise_if_aborted()

    def _enter(self, ask: Ask) -> asyncio.AbstractEventLoop:
        """Begin a call, and return the running loop; forget what belonged to one that has ended."""
        if ask.flaw is not None:
            raise copy.copy(ask.flaw)
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed() and (self._leases or self.queue.waiting):
                raise RequestError("the pool is in use in another event loop: make a pool for each")
            self._loop, self._timer = loop, None
            self._tasks.clear()
            self._leases.clear()
            for server in self.servers:
                server.looking, server.running = False, 0
        if len(ask.tried) == len(self.servers):
            raise self.refusal(ask)
        if ask.deadline is None and ask.timeouts.total is not None:
            ask.deadline = loop.time() + ask.timeouts.total
        return loop

    def _dispatch(self) -> None:
        """Give free slots to the calls whose turn it is, and see to the hosts that are not known or out of service."""
        if not self.queue.groups or self.closed:
            return
        if len(self.servers) > 1:
            self._look_where_needed()
        for server, model, outage in self.queue.due_probes():
            outage.probing = True
            server.running += model is not None
            self._start(self._probe(server, model, outage))
        if time.monotonic() < self._choose_at and any(server.looking for server in self.servers):
            self._tick()
            return
        for waiter in self.queue.grant():
            waiter.wake()
        for waiter in self.queue.stranded(self._patience):
            if self._in_doubt(waiter.model):
                continue
            self.queue.remove(waiter)
            waiter.wake()
        self._tick()

    def _tick(self) -> None:
        """While calls wait, look again: probes become due, patience ends, streams end that nobody reads."""
        if self._loop is None or not self.queue.groups:
            return
        # Asked twice for each call: mostly nothing is out of service, and one timer does for many calls.
        if self._timer is not None and not any(server.outages for server in self.servers):
            return
        now = time.monotonic()
        dues = [outage.until for server in self.servers for outage in server.outages.values()]
        next_due = min((due - now for due in dues if due > now), default=_LONGEST_TICK)
        delay = min(_LONGEST_TICK, max(next_due, 0.001), max(self._patience / 4, 0.001))
        # One that is due before is as good.
        if self._timer is None or self._timer.when() > self._loop.time() + delay:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(delay, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()

    def _look_where_needed(self) -> None:
        now = time.monotonic()
        lacking = self.queue.lacking()
        for server in self.servers:
            unknown = server.looked_at == float("-inf")
            old = lacking and now - server.looked_at > _LOOK_AGAIN_SECONDS
            # Which models are loaded matters while there is a choice to make.
            choice = len(self.queue.models) > 1 and now - server.loaded_at > _LOADED_AGAIN_SECONDS
            if not server.looking and None not in server.outages and (unknown or old or choice):
                if unknown:
                    self._choose_at = now + _FIRST_LOOK_SECONDS
                server.looking = True
                self._start(self._look(server, models=unknown or old))

    def _in_doubt(self, model: str) -> bool:
        """Whether a look that is under way may find a model."""
        return any(server.looking for server in self.servers) and not any(s.has(model) for s in self.servers)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self, server: Server, *, models: bool) -> None:
        client, limits = server.client, look_timeouts()
        try:
            server.loaded_at = time.monotonic()
            if models:
                server.looked_at = time.monotonic()
                listed = await client.list(timeout=limits)
                server.listed(map(_name, listed.models))
            loaded = await client.ps(timeout=limits)
            # What is being loaded is not listed yet.
            coming = {lease.ask.full_name for lease in self._leases if lease.server is server}
            server.loaded = coming | {*map(_name, loaded.models)}
        except (ConnectError, ConnectionBroken, PhaseTimeout) as exc:
            server.put_out(None, "version", _said(exc))
            server.looked_at = float("-inf")
        except OllamaError:
            # It does not tell. It is asked for any model, and says so if it has not got one.
            pass
        finally:
            server.looking = False
        self._dispatch()

    async def _probe(self, server: Server, model: str | None, outage: Outage) -> None:
        client, limits = server.client, self.timeouts
        try:
            if model is None:
                await client.version(timeout=look_timeouts())
            elif outage.kind == "embed":
                await client.embed(model, "a", timeout=limits)
            else:
                # Read to its end: an abort is what makes some servers lose a slot.
                await client.generate(model, "a", options={"num_predict": 1}, stream=True, timeout=limits).collect()
        except NotFoundError:
            if model is not None:
                server.lacking(model)
            server.outages.pop(model, None)
        except OllamaError as exc:
            outage.add(_said(exc))
        else:
            server.outages.pop(model, None)
        finally:
            outage.probing = False
            server.running -= model is not None
        self._dispatch()


async def embedded(lease: Lease, options: dict[str, Any]) -> Any:
    """Turn texts into vectors at the host of a lease."""
    return await lease.server.client.embed(lease.ask.model, *lease.ask.arguments, **options)


async def collected(lease: Lease, options: dict[str, Any]) -> Any:
    """Have an answer from the host of a lease: never a part of one.

    It streams inside: else the limit of the first chunk would be one of the answer.
    """
    method = getattr(lease.server.client, lease.ask.kind)
    stream: Stream[Any] = method(lease.ask.model, *lease.ask.arguments, stream=True, **options)
    await stream
    lease.begun = True
    answer = await stream.collect()
    if stream.outcome == "truncated":
        raise StreamTruncated("the answer ended without a last chunk that says that it is done", answer)
    lease.note_answer(answer)
    return answer


def _say_whole_limit(error: OllamaError, ask: Ask) -> None:
    """Have an error say the limit that the caller gave, not what the wait for a slot has left of it."""
    if isinstance(error, PhaseTimeout) and error.phase == "total" and ask.timeouts.total is not None:
        given = PhaseTimeout("total", ask.timeouts.total)
        error.seconds, error.args = given.seconds, given.args


def _said(error: OllamaError) -> str:
    """Say what went wrong at a host, in one line."""
    return f"{type(error).__name__}: {getattr(error, 'detail', '') or error}"


def _name(listed: Any) -> str:
    return full_name(str(listed.get("model") or listed.get("name")))


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse a parameter that was given and is not of its kind."""
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name}={shown(value)}: give a {kind.__name__}")


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number from 1 on; True is an int for Python, not for a user."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def with_host(answer: T, url: str) -> T:
    """Say in an answer which host it is from."""
    extra = cast("Any", answer).model_extra
    if extra is None:
        cast("Any", answer).host = url
    else:
        # As the line above does, which takes pydantic as long as a token.
        extra["host"] = url
    return answer
