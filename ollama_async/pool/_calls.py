"""The calls of a pool: each waits for a slot and is made at one host after the other until one answers."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ollama_async._call.stream import Stream
from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken, Registration
from ollama_async._client import AsyncClient
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
)
from ollama_async._loops import in_loop, resolve

from ._hosts import Outage, Queue, Server, Waiter, full_name

__all__ = ["TIMEOUTS", "Call", "Calls", "Kind", "Lease"]

_log = logging.getLogger("ollama_async.pool")

T = TypeVar("T")
Kind = Literal["chat", "generate", "embed"]

TIMEOUTS = Timeouts(connect=5.0, first_chunk=300.0)
_LOOK_SECONDS = 5.0
_FIRST_LOOK_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 60.0
_LOADED_AGAIN_SECONDS = 5.0
_LONGEST_TICK = 1.0
# Nanoseconds of an answer's total time that nothing in it accounts for: it waited in the server.
_QUEUED_NS = 250_000_000
# A model that was loaded already takes less than this.
_LOADED_NS = 100_000_000

_FAILED_OVER = {502, 503, 504}


@dataclass(slots=True)
class Call:
    """One call, and what has become of it at the hosts that were tried."""

    kind: Kind
    model: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    # What was given with the call; its own, for what ends nothing but this call; and all that it is under.
    given: CancelToken | None
    own: CancelToken
    token: CancelToken
    timeouts: Timeouts
    sticky: Hashable | None
    key: Hashable | None
    priority: float
    tried: dict[Server, OllamaError]
    deadline: float | None = None

    def limits(self) -> Timeouts:
        """Return the limits of the next attempt: waiting and earlier attempts are part of the whole time."""
        if self.deadline is None:
            return self.timeouts
        return replace(self.timeouts, total=max(self.deadline - time.monotonic(), 1e-6))


class Lease:
    """A slot that a call has; given back once, by whoever comes first."""

    __slots__ = ("_calls", "_given_back", "_loop", "call", "registration", "server", "stream")

    def __init__(self, calls: Calls, server: Server, call: Call) -> None:
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._given_back: dict[int, object] = {}
        self.server: Server = server
        self.call: Call = call
        self.stream: Callable[[], Stream[Any] | None] | None = None
        self.registration: Registration | None = None

    def release(self) -> None:
        """Give the slot back, from any thread; idempotent."""
        mine = object()
        if self._given_back.setdefault(0, mine) is not mine:
            return
        if self.registration is not None:
            self.registration.remove()
        if asyncio._get_running_loop() is self._loop or self._loop.is_closed():  # noqa: SLF001
            self._calls.give_back(self)
        else:
            in_loop(self._loop, self._calls.give_back, self)

    def hold_for(self, stream: Stream[Any]) -> None:
        """Keep the slot for a stream, as long as it is open: also where nobody reads it when it is aborted."""
        self.stream = weakref.ref(stream)
        self.registration = self.call.token.on_abort(lambda _: self.release())

    def release_if_over(self) -> None:
        """Give the slot back if its stream has ended: by a timeout, say, while nobody reads it."""
        stream = None if self.stream is None else self.stream()
        if self.stream is not None and (stream is None or stream.outcome is not None):
            self.release()


class Calls:
    """The calls of a pool that wait and run, and what they do with its hosts."""

    def __init__(self, clients: dict[str, AsyncClient], servers: list[Server], timeouts: Timeouts, patience: float):
        self.clients = clients
        self.servers = servers
        self.queue: Queue = Queue(servers)
        self.closing: CancelToken = CancelToken()
        self._timeouts = timeouts
        self._patience = patience
        self._leases: set[Lease] = set()
        # Looks at hosts, and probes.
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Until then calls wait for the first looks: to tell which host has a model loaded.
        self._choose_at = float("-inf")

    async def aclose(self) -> None:
        """End what waits, and looks and probes; all sockets are closed before it waits for anything."""
        self.closing.abort("the pool is closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        closes = [loop.create_task(client.aclose()) for client in self.clients.values()]
        await asyncio.gather(*closes, *tasks, return_exceptions=True)

    async def begin(
        self, call: Call, attempt: Callable[[AsyncClient, Call], Coroutine[Any, Any, T]]
    ) -> tuple[Lease, T]:
        """Wait for a slot and make an attempt there, at one host after the other until one gives a first byte."""
        if call.timeouts.total is not None:
            call.deadline = time.monotonic() + call.timeouts.total
        while True:
            lease = await self._acquire(call)
            server = lease.server
            try:
                return lease, await attempt(self.clients[server.url], call)
            except OllamaError as exc:
                lease.release()
                if not self.note_failure(server, call, exc):
                    raise
                call.tried[server] = exc
                if len(call.tried) == len(self.servers):
                    raise self._refusal(call) from exc
            except BaseException:
                lease.release()
                raise

    async def _acquire(self, call: Call) -> Lease:
        if self.closing.aborted:
            raise StreamClosed("the pool is closed")
        call.token.raise_if_aborted()
        loop = self._enter()
        waiter = Waiter(full_name(call.model), frozenset(call.tried), call.sticky)
        self.queue.add(waiter, call.key, call.priority)
        try:
            self._dispatch()
            if waiter.server is None and not waiter.gone:
                await self._wait(loop, waiter, call)
            if self.closing.aborted:
                raise StreamClosed("the pool is closed")
            call.token.raise_if_aborted()
            if waiter.server is None:
                assert call.timeouts.total is not None or waiter.gone
                if waiter.gone or not self._in_service(call):
                    raise self._refusal(call)
                raise PhaseTimeout("total", call.timeouts.total or 0.0)
        except BaseException:
            self.queue.remove(waiter)
            if waiter.server is not None:
                waiter.server.running -= 1
                self._dispatch()
            raise
        lease = Lease(self, waiter.server, call)
        self._leases.add(lease)
        return lease

    async def _wait(self, loop: asyncio.AbstractEventLoop, waiter: Waiter, call: Call) -> None:
        woken: asyncio.Future[None] = loop.create_future()
        waiter.wake = lambda: resolve(woken)
        ends = [token.on_abort(lambda _: in_loop(loop, resolve, woken)) for token in (call.token, self.closing)]
        timer = None
        if call.deadline is not None:
            timer = loop.call_later(max(0.0, call.deadline - time.monotonic()), resolve, woken)
        try:
            await woken
        finally:
            for registration in ends:
                registration.remove()
            if timer is not None:
                timer.cancel()

    def give_back(self, lease: Lease) -> None:
        """Take a slot back, in the loop that it was given in."""
        self._leases.discard(lease)
        lease.server.running -= 1
        if asyncio._get_running_loop() is not None:  # noqa: SLF001
            self._dispatch()

    def note_failure(self, server: Server, call: Call, exc: OllamaError) -> bool:
        """Note what a failed call says of its host; return whether another host may do better."""
        why = f"{type(exc).__name__}: {getattr(exc, 'detail', '') or exc}"
        model = full_name(call.model)
        if isinstance(exc, NotFoundError):
            # One that is alone is asked each time: nothing else finds out that it has got the model.
            if len(self.servers) == 1:
                return False
            server.lacking(model)
            return True
        if isinstance(exc, ConnectError) or (isinstance(exc, PhaseTimeout) and exc.phase == "connect"):
            server.put_out(None, call.kind, why)
            return True
        # Also what fails at once: the host would seem to be the least busy one, and draw all calls to it.
        broken = isinstance(exc, ConnectionBroken) or (isinstance(exc, PhaseTimeout) and exc.phase == "first_chunk")
        if broken or (isinstance(exc, ResponseError) and exc.status_code in _FAILED_OVER):
            server.put_out(model, call.kind, why)
            return True
        return False

    def note_answer(self, lease: Lease, answer: Any) -> None:
        """Learn from an answer that is complete."""
        server = lease.server
        server.loaded.add(full_name(lease.call.model))
        if (getattr(answer, "load_duration", None) or 0) > _LOADED_NS:
            # Another model may have made room for it.
            server.loaded_at = float("-inf")
        spent = sum(
            getattr(answer, name, None) or 0 for name in ("load_duration", "prompt_eval_duration", "eval_duration")
        )
        total = getattr(answer, "total_duration", None) or 0
        if total - spent > max(_QUEUED_NS, total // 10) and server.running > 1 and not server.warned:
            server.warned = True
            _log.warning(
                "%s let a call wait for %.1f s while %d calls of this pool ran there: slots=%d seems too high, or "
                "others use it, too",
                server.url,
                (total - spent) / 1e9,
                server.running,
                server.slots,
            )

    def _in_service(self, call: Call) -> bool:
        model = full_name(call.model)
        return any(server.has(model) and server.outage(model) is None for server in self.servers)

    def _refusal(self, call: Call) -> OllamaError:
        """Return the error of a call that no host is left for."""
        model = full_name(call.model)
        if len(self.servers) == 1 and call.tried:
            return copy.copy(call.tried[self.servers[0]])
        said: dict[str, str] = {}
        for server in self.servers:
            outage, error = server.outage(model), call.tried.get(server)
            if error is not None:
                said[server.url] = f"{type(error).__name__}: {getattr(error, 'detail', '') or error}"
            elif outage is not None:
                said[server.url] = outage.why
            else:
                said[server.url] = f"has no model {call.model!r}"
        if not any(server.has(model) for server in self.servers):
            where = ", ".join(server.url for server in self.servers)
            return NotFoundError(f"model {call.model!r} not found at any host: {where}", 404)
        return NoHost(said)

    # -- looks and probes --

    def _enter(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; forget what belonged to one that has ended."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed() and (self._leases or self.queue.waiting):
                raise RequestError("the pool is in use in another event loop: make a pool for each")
            self._loop, self._timer = loop, None
            self._tasks.clear()
            for server in self.servers:
                server.looking = False
        return loop

    def _dispatch(self) -> None:
        """Give free slots to the calls whose turn it is, and see to the hosts that are not known or out of service."""
        if not self.queue.waiting or self.closing.aborted:
            return
        if len(self.servers) > 1:
            self._look_where_needed()
        for lease in tuple(self._leases) if not any(server.free for server in self.servers) else ():
            lease.release_if_over()
        for server, model, outage in self.queue.due_probes():
            outage.probing = True
            server.running += model is not None
            self._start(self._probe(server, model, outage))
        if any(server.looking for server in self.servers) and time.monotonic() < self._choose_at:
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.queue.waiting and self._loop is not None:
            now = time.monotonic()
            dues = [outage.until for server in self.servers for outage in server.outages.values()]
            next_due = min((due - now for due in dues if due > now), default=_LONGEST_TICK)
            delay = min(_LONGEST_TICK, max(next_due, 0.001), max(self._patience / 4, 0.001))
            self._timer = self._loop.call_later(delay, self._dispatch)

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
        client, limits = self.clients[server.url], replace(TIMEOUTS, total=_LOOK_SECONDS)
        try:
            server.loaded_at = time.monotonic()
            if models:
                server.looked_at = time.monotonic()
                listed = await client.list(timeout=limits)
                server.listed(full_name(str(each.get("model") or each.get("name"))) for each in listed.models)
            loaded = await client.ps(timeout=limits)
            # What is being loaded is not listed yet.
            coming = {full_name(lease.call.model) for lease in self._leases if lease.server is server}
            server.loaded = coming | {full_name(str(each.get("model") or each.get("name"))) for each in loaded.models}
        except (ConnectError, ConnectionBroken, PhaseTimeout) as exc:
            server.put_out(None, "version", f"{type(exc).__name__}: {getattr(exc, 'detail', '') or exc}")
            server.looked_at = float("-inf")
        except OllamaError:
            # It does not tell. It is asked for any model, and says so if it has not got one.
            pass
        finally:
            server.looking = False
        self._dispatch()

    async def _probe(self, server: Server, model: str | None, outage: Outage) -> None:
        client, limits = self.clients[server.url], self._timeouts
        try:
            if model is None:
                await client.version(timeout=replace(limits, total=_LOOK_SECONDS))
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
            outage.add(f"{type(exc).__name__}: {getattr(exc, 'detail', '') or exc}")
        else:
            server.outages.pop(model, None)
        finally:
            outage.probing = False
            server.running -= model is not None
        self._dispatch()
