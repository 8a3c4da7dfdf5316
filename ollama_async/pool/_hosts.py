"""Which call goes to which host: the queue, the slots, and what is known of each host. No I/O and no event loop."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ollama_async._call.asked import full_name
from ollama_async._secret import showable

__all__ = ["Host", "HostState", "Outage", "Queue", "Server", "Waiter"]

FIRST_OUTAGE = 1.0
LONGEST_OUTAGE = 60.0
_DOUBLINGS = 16
# A model that is loaded somewhere is worth waiting for, up to this many calls for each slot that it has.
_CALLS_PER_SLOT = 3
_STICKY_KEPT = 4096
_KEYS_KEPT = 1024


@showable
@dataclass(frozen=True, slots=True)
class Host:
    """A server of a pool.

    Attributes:
        url: Address of the server, as ``AsyncClient`` takes it.
        slots: How many calls run there at once, at most: the server's ``OLLAMA_NUM_PARALLEL``. ``None`` for the pool's.
        models: The models that it may be asked for; ``None`` to ask the server which it has.
    """

    url: str
    slots: int | None = None
    models: Collection[str] | None = None


@showable
@dataclass(frozen=True, slots=True)
class HostState:
    """What a pool knows of a host at one moment.

    Attributes:
        url: Address of the server.
        slots: How many calls run there at once, at most.
        running: How many calls of this pool run there.
        waiting: How many calls wait in the pool that this host may be given.
        models: The models that it has; ``None`` while that is not known.
        loaded: The models that it has loaded, as far as this pool knows.
        out_models: The models that it is out of service for.
        out_until: The time (as ``time.time()``) of its next probe if it is out of service, for one model or for all.
        why: Why it is out of service.
    """

    url: str
    slots: int
    running: int
    waiting: int
    models: frozenset[str] | None
    loaded: frozenset[str]
    out_models: frozenset[str]
    out_until: float | None
    why: str | None


class Outage:
    """Why and until when a host is not asked, for one model or for all."""

    __slots__ = ("_failures", "began", "kind", "probing", "until", "why")

    def __init__(self, kind: str) -> None:
        self.kind: str = kind
        self.began: float = time.monotonic()
        self.probing: bool = False
        self.until: float = 0.0
        self.why: str = ""
        self._failures = 0

    def add(self, why: str) -> None:
        """Note one more failure: the next probe comes after a pause that doubles."""
        pause = min(LONGEST_OUTAGE, FIRST_OUTAGE * 2.0 ** min(self._failures, _DOUBLINGS))
        self._failures += 1
        self.why = why
        # Spread out, so that many clients of a host that was away do not come back all at once.
        self.until = time.monotonic() + pause * random.uniform(0.75, 1.0)  # noqa: S311


class Server:
    """A host of a pool, its client, and what is known of it."""

    def __init__(self, url: str, slots: int, models: Collection[str] | None, client: Any = None) -> None:
        self.url = url
        self.slots = slots
        self.client = client
        self.running = 0
        self.given: frozenset[str] | None = None if models is None else frozenset(map(full_name, models))
        # None while it is not known, and for good where the server does not tell: it is then asked for any model.
        self.models: set[str] | None = None
        self.loaded: set[str] = set()
        # What it said it has not. Only a look at its list makes this forgotten.
        self.lacks: set[str] = set()
        # By model; under None what concerns all of them.
        self.outages: dict[str | None, Outage] = {}
        self.looked_at: float = float("-inf")
        self.loaded_at: float = self.looked_at
        self.looking = False
        # Whether it has been said that its slots are too many.
        self.warned = False

    @property
    def free(self) -> bool:
        """Whether it has a free slot."""
        return self.running < self.slots

    def has(self, model: str) -> bool:
        """Whether it has a model, as far as is known."""
        models = self.models if self.given is None else self.given
        return model not in self.lacks and (models is None or model in models)

    def outage(self, model: str) -> Outage | None:
        """Return why it is not asked for a model, if it is not."""
        return self.outages.get(None) or self.outages.get(model)

    def put_out(self, model: str | None, kind: str, why: str) -> None:
        """Take it out of service, for a model or for all; one outage for calls that fail at the same time."""
        if model not in self.outages:
            self.outages[model] = Outage(kind)
            self.outages[model].add(why)

    def listed(self, models: Iterable[str]) -> None:
        """Note which models it has."""
        self.models, self.lacks = set(models), set()
        self.looked_at = time.monotonic()

    def lacking(self, model: str) -> None:
        """Note that it says it has not got a model."""
        self.lacks.add(model)
        self.loaded.discard(model)

    def state(self, waiting: int) -> HostState:
        """Return what is known of it now."""
        models = self.models if self.given is None else self.given
        worst = self.outages.get(None) or max(self.outages.values(), key=lambda outage: outage.until, default=None)
        return HostState(
            url=self.url,
            slots=self.slots,
            running=self.running,
            waiting=waiting,
            models=None if models is None else frozenset(models - self.lacks),
            loaded=frozenset(self.loaded),
            out_models=frozenset(model for model in self.outages if model is not None),
            out_until=None if worst is None else worst.until - time.monotonic() + time.time(),
            why=None if worst is None else worst.why,
        )


class Waiter:
    """A call that waits for a slot."""

    __slots__ = ("began", "gone", "group", "model", "order", "server", "sticky", "tried", "wake")

    def __init__(self, model: str, tried: frozenset[Server], sticky: Hashable | None) -> None:
        self.model: str = model
        self.tried: frozenset[Server] = tried
        self.sticky: Hashable | None = sticky
        self.began: float = time.monotonic()
        self.order: tuple[float, float, int] = (0, 0, 0)
        self.group: _Group | None = None
        # The host that it was given.
        self.server: Server | None = None
        self.gone: bool = False
        # Called when it was given a host, and when there is none for it.
        self.wake: Callable[[], object] = _nothing


def _nothing() -> None:
    """Wake nobody: the call has not begun to wait."""


class _Group:
    """The waiting calls of one model that the same hosts are left for."""

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[float, float, int], Waiter]] = []
        self.waiting: int = 0

    def head(self) -> Waiter | None:
        """Return the call whose turn it is."""
        while self.heap and self.heap[0][1].gone:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None

    def remove(self, waiter: Waiter) -> None:
        waiter.gone = True
        self.waiting -= 1
        # Many that leave while none is served would stay for good; together this is linear.
        if len(self.heap) > 2 * self.waiting + 16:
            self.heap = [entry for entry in self.heap if not entry[1].gone]
            heapq.heapify(self.heap)

    def __iter__(self) -> Iterator[Waiter]:
        return (waiter for _, waiter in sorted(self.heap) if not waiter.gone)


class Queue:
    """The calls that wait, and the choice of a host for each: in turn, and none past a free host that may serve it.

    By priority first; within one, callers (by their keys) take turns; each caller's calls in their order.
    """

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        # None of them is empty.
        self.groups: dict[tuple[str, frozenset[Server]], _Group] = {}
        self._numbers = itertools.count()
        # Start-time fair queueing: each call of a key starts one turn after the key's last one, or now.
        self._turn = 0.0
        self._last_turns: dict[Hashable, float] = {}
        self._sticky: OrderedDict[Hashable, Server] = OrderedDict()
        self.models: set[str] = set()

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(group.waiting for group in self.groups.values())

    def all(self) -> list[Waiter]:
        """Return the calls that wait."""
        return [waiter for group in self.groups.values() for waiter in group]

    def waiting_for(self, server: Server) -> int:
        """How many calls wait that a host may be given."""
        groups = self.groups.items()
        return sum(group.waiting for (model, tried), group in groups if server not in tried and server.has(model))

    def at_once(self, model: str, key: Hashable | None) -> Server | None:
        """Return the host of a call for which there is nothing to decide: none waits, and one host is there and free.

        It is what ``add()`` and ``grant()`` would come to, for a fraction of what they cost.
        """
        server = self.servers[0]
        if self.groups or len(self.servers) > 1 or server.outages or not server.free or not server.has(model):
            return None
        self._turn = self._next_turn(key)
        self.models.add(model)
        self._occupy(server, model)
        return server

    def add(self, waiter: Waiter, key: Hashable | None, priority: float) -> None:
        """Put a call in its place."""
        turn = self._next_turn(key)
        waiter.order = (-priority, turn, next(self._numbers))
        group = self.groups.setdefault((waiter.model, waiter.tried), _Group())
        waiter.group = group
        group.waiting += 1
        heapq.heappush(group.heap, (waiter.order, waiter))
        self.models.add(waiter.model)

    def _next_turn(self, key: Hashable | None) -> float:
        turn = max(self._turn, self._last_turns.get(key, -1.0) + 1.0)
        if len(self._last_turns) > _KEYS_KEPT:
            self._last_turns = {each: last for each, last in self._last_turns.items() if last > self._turn}
        self._last_turns[key] = turn
        return turn

    def remove(self, waiter: Waiter) -> None:
        """Take a call out of the queue."""
        if not waiter.gone and waiter.group is not None:
            waiter.group.remove(waiter)
            if not waiter.group.waiting:
                self.groups.pop((waiter.model, waiter.tried), None)

    def grant(self) -> Iterator[Waiter]:
        """Give hosts to the calls whose turn it is; yield each."""
        blocked: set[_Group] = set()
        while any(server.free for server in self.servers):
            heads = [head for group in self.groups.values() if group not in blocked and (head := group.head())]
            waiter = min(heads, key=lambda head: head.order, default=None)
            if waiter is None or waiter.group is None:
                return
            server = self._choose(waiter)
            if server is None:
                blocked.add(waiter.group)
                continue
            self._turn = max(self._turn, waiter.order[1])
            self.remove(waiter)
            self._give(server, waiter)
            yield waiter

    def _give(self, server: Server, waiter: Waiter) -> None:
        waiter.server = server
        self._occupy(server, waiter.model)
        if waiter.sticky is not None:
            self._sticky[waiter.sticky] = server
            self._sticky.move_to_end(waiter.sticky)
            if len(self._sticky) > _STICKY_KEPT:
                self._sticky.popitem(last=False)

    def _occupy(self, server: Server, model: str) -> None:
        server.running += 1
        if model not in server.loaded:
            # It may hold one model only, and calls for what it held before would have it load that again. Where it
            # holds several, the next look at it says so.
            server.loaded = {model}

    def _choose(self, waiter: Waiter) -> Server | None:
        """Return the host with a free slot that is best for a call; ``None`` to have it wait."""
        model = waiter.model
        able = [
            server
            for server in self.servers
            if server not in waiter.tried and server.has(model) and server.outage(model) is None
        ]
        free = [server for server in able if server.free]
        if len(self.servers) == 1:
            return free[0] if free else None
        last = None if waiter.sticky is None else self._sticky.get(waiter.sticky)
        if last in free:
            return last
        loaded = [server for server in able if model in server.loaded]
        ready = [server for server in loaded if server.free]
        if loaded and not ready and self._demand(model, loaded) <= _CALLS_PER_SLOT * sum(s.slots for s in loaded):
            ready = [server for server in free if not self._is_used(server)]
        elif not ready:
            # Somebody has to make room for it: first a host that none waits for.
            ready = [server for server in free if not self._is_used(server)] or free
        return min(ready, key=lambda s: ((s.running + 1) / s.slots, random.random()), default=None)  # noqa: S311

    def _demand(self, model: str, loaded: list[Server]) -> int:
        waiting = sum(group.waiting for (name, _), group in self.groups.items() if name == model)
        return waiting + sum(server.running for server in loaded)

    def _is_used(self, server: Server) -> bool:
        """Whether a host runs a call, or calls wait for a model that it has loaded."""
        return server.running > 0 or any(model in server.loaded for model, _ in self.groups)

    def stranded(self, patience: float) -> list[Waiter]:
        """Return the calls that no host is left for, or none in service for longer than their patience, in seconds."""
        found: list[Waiter] = []
        now = time.monotonic()
        for (model, tried), group in self.groups.items():
            began: list[float] = []
            for server in self.servers:
                if server not in tried and server.has(model):
                    outage = server.outage(model)
                    if outage is None:
                        break
                    began.append(outage.began)
            else:
                since = max(began, default=now)
                found += [each for each in group if not began or now - max(since, each.began) >= patience]
        return found

    def lacking(self) -> bool:
        """Whether a call waits for a model that no host has."""
        return any(not any(server.has(model) for server in self.servers) for model, _ in self.groups)

    def due_probes(self) -> Iterator[tuple[Server, str | None, Outage]]:
        """Yield the outages whose end is worth finding out: a call waits, or has come, and the pause is over."""
        now = time.monotonic()
        for server in self.servers:
            for model, outage in tuple(server.outages.items()):
                if not outage.probing and outage.until <= now and (model is None or server.free):
                    yield server, model, outage
