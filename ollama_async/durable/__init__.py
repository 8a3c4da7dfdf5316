"""``DurableAnswers``: answers that outlive whoever watches them, and still stop.

An answer is produced once, in the process where it was begun, and its events are numbered. Whoever knows its owner and
id attaches to it after any event, again and again, from any process. Three gestures have three names: a viewer
*detaches* and the answer goes on; an answer is *stopped*, and whoever watches it sees its end; durable answers are
*closed*, and all that this process produces ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ollama_async._cancel import LiveObject
from ollama_async._errors import OllamaError, RequestError
from ollama_async.registry import AbortRegistry, Name, Stopped

from ._carrier import Carrier, Listed, State
from ._errors import (
    AnswerGap,
    AnswerGone,
    AnswerInUse,
    AnswersClosed,
    AnswersUnavailable,
    BadOffset,
    RedisFull,
    RedisRefuses,
    RedisTooOld,
    UnknownAnswer,
)
from ._events import Event, split
from ._log import Viewer
from ._memory import Memory
from ._producer import CLOSED, SUPERSEDED, TOO_LONG, UNATTENDED, AnswerOutcome, OnEnd, Producer, Result, Source, Terms

__all__ = [
    "CLOSED",
    "SUPERSEDED",
    "TOO_LONG",
    "UNATTENDED",
    "Answer",
    "AnswerGap",
    "AnswerGone",
    "AnswerInUse",
    "AnswerOutcome",
    "AnswersClosed",
    "AnswersUnavailable",
    "BadOffset",
    "DurableAnswers",
    "Event",
    "Listed",
    "RedisFull",
    "RedisRefuses",
    "RedisTooOld",
    "Result",
    "State",
    "UnknownAnswer",
    "Viewer",
]

# Thirty years.
_ENDLESS = 1e9
# With a shorter one, a pause of the garbage collector or of the network is a death.
_SHORTEST_LEASE = 0.5
# How long a viewer waits for events that it has seen elsewhere already, and that are still on their way here.
_CATCH_UP = 2.0
_MAX_OFFSET = 10**15


class Answer(LiveObject):
    """An answer that was begun in this process."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    @property
    def id(self) -> str:
        """Its id."""
        return self._producer.name.id

    @property
    def owner(self) -> str:
        """Whose answer it is."""
        return self._producer.name.owner

    @property
    def claimed(self) -> bool:
        """Whether other processes know of it: ``False`` if it was begun while Redis was away."""
        return self._producer.claimed.result()

    @property
    def opened(self) -> Event:
        """Its first event."""
        return Event(1, *split(self._producer.log.fragments[0]))

    @property
    def error(self) -> OllamaError | None:
        """What ended it, if it was an error; ``None`` while it runs, and after any other end."""
        return self._producer.failure

    def stop(self, reason: object = None) -> bool:
        """Stop it, before this returns; from any thread.

        Args:
            reason: What the ``reason`` in its ``end`` will be.

        Returns:
            True if this call ended it.
        """
        return self._producer.abort(reason)

    def attach(self, *, after: int = 0) -> Viewer:
        """Watch it from here; that needs no Redis.

        Args:
            after: The number of the event to go on after.

        Raises:
            BadOffset: The answer has no such event.
        """
        _check_offset(after)
        if after > len(self._producer.log):
            raise _beyond(after, len(self._producer.log))
        return Viewer(self._producer.log, after)

    async def wait(self) -> None:
        """Wait until it has ended, and ``on_end`` has returned.

        Cancellation: safe; the answer goes on.
        """
        await asyncio.wait({self._producer.task})


class DurableAnswers(LiveObject):
    """Answers by owner and id, which go on without a viewer.

    They belong to one event loop. Close them with ``await answers.aclose()`` or ``async with``: that aborts the answers
    which this process produces.

    Example:
        >>> answers = DurableAnswers.from_url("memory://")
        >>> answer = await answers.begin(client.chat("llama3.2", "hi", stream=True), "4f1c", owner="ann")
        >>> async with await answers.attach("4f1c", owner="ann", after=0) as viewer:
        ...     async for event in viewer:
        ...         print(event.number, event.name)
        >>> await answers.stop("4f1c", "Stop was pressed", owner="ann")  # meanwhile, from anywhere
        'stopped'

    Attributes:
        registry: Where the answers are registered: a Stop that it is given is one for an answer.
    """

    def __init__(self, registry: AbortRegistry, carrier: Carrier, terms: Terms, *, owns_registry: bool) -> None:
        """Use ``from_url()`` instead."""
        self.registry = registry
        self._carrier = carrier
        self._terms = terms
        self._owns_registry = owns_registry
        self._closed = False
        self._running: set[Producer] = set()

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        keep: float = 600.0,
        lease: float = 15.0,
        unattended: float | None = None,
        max_bytes: int = 4 * 1024 * 1024,
        on_end: OnEnd | None = None,
        explain: Callable[[OllamaError], str] | None = None,
        registry: AbortRegistry | None = None,
        namespace: str = "ollama-async",
    ) -> DurableAnswers:
        """Return durable answers; nothing is connected before they are first used.

        Args:
            url: ``memory://`` for this process alone; ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads
                them, for all processes that use the same Redis (6.2 or newer, or Valkey).
            keep: How many seconds an answer is kept after its end.
            lease: After how many seconds without a sign of life the producer of an answer is taken for dead, in Redis;
                at least 0.5, and longer than its event loop is ever held up: 5 or more.
            unattended: After how many seconds without a viewer an answer is aborted, with the reason
                ``UNATTENDED``; ``None``: never.
            max_bytes: How many bytes the events of an answer may have; beyond that it is aborted, with the reason
                ``TOO_LONG``.
            on_end: Called with a ``Result`` once for each answer that was begun here, however it ended: the place to
                save it. It may be a coroutine function; what it raises is logged.
            explain: Returns the text that viewers get for an error; by default a fixed text for each kind of error.
            registry: Where answers are registered, to be stopped. By default one with the same url and namespace, which
                is closed with the answers.
            namespace: What the names of keys begin with, in Redis.

        Raises:
            RequestError: A parameter is not valid.
            ImportError: The extra ``redis`` is not installed.
        """
        times = {"keep": keep, "lease": lease, "unattended": unattended, "max_bytes": max_bytes}
        for name, given in times.items():
            _check_number(name, given, may_lack=name == "unattended")
        if lease < _SHORTEST_LEASE:
            raise RequestError(f"lease={lease!r}: give {_SHORTEST_LEASE} seconds or more; 5 or more are advisable")
        terms = Terms(keep, unattended, max_bytes, on_end, explain)
        ours = AbortRegistry.from_url(url, namespace=namespace)
        carrier: Carrier = Memory() if url.partition("://")[0] == "memory" else _redis(url, namespace, lease)
        return cls(registry or ours, carrier, terms, owns_registry=registry is None)

    async def begin(
        self,
        stream: Source,
        id: str,  # noqa: A002
        *,
        owner: str = "",
        keep: float | None = None,
        unattended: float | None = None,
        on_end: OnEnd | None = None,
        explain: Callable[[OllamaError], str] | None = None,
    ) -> Answer:
        """Begin an answer: read a stream in the background, with or without viewers.

        If a Stop for it has already arrived, it is aborted at once. While Redis is away it is begun without it, and
        carried there once Redis is back.

        Args:
            stream: What ``chat(..., stream=True)`` or ``generate(..., stream=True)`` returned, not read yet. It is
                closed if the answer cannot be begun.
            id: The answer's, of at most 200 characters; one that cannot be guessed, used for this answer only.
            owner: Whose answer it is: part of its address.
            keep: As in ``from_url()``, for this answer.
            unattended: As in ``from_url()``, for this answer.
            on_end: As in ``from_url()``, for this answer.
            explain: As in ``from_url()``, for this answer.

        Raises:
            AnswerInUse: There is one with this owner and id; the model was not asked.
            RedisRefuses: Redis cannot be used as it is.
            RequestError: A parameter is not valid.
            AnswersClosed: The durable answers are closed.

        Cancellation: aborts the answer; its log gets its end.
        """
        try:
            name = Name.of(owner, id)
            self._check_open()
            terms = self._terms
            for parameter, given in {"keep": keep, "unattended": unattended}.items():
                _check_number(parameter, given, may_lack=True)
            terms = Terms(
                terms.keep if keep is None else keep,
                terms.unattended if unattended is None else unattended,
                terms.max_bytes,
                on_end or terms.on_end,
                explain or terms.explain,
            )
        except BaseException:
            stream.abort()
            raise
        producer = Producer(name, stream, self.registry, self._carrier, terms)
        self._running.add(producer)
        producer.task.add_done_callback(lambda _: self._running.discard(producer))
        try:
            await asyncio.wait({producer.claimed})
        except asyncio.CancelledError:
            producer.abort("begin() was cancelled")
            producer.claimed.add_done_callback(_retrieve)
            raise
        producer.claimed.result()
        return Answer(producer)

    async def attach(self, id: str, *, owner: str = "", after: int = 0) -> Viewer:  # noqa: A002
        """Watch an answer, wherever it is produced.

        Args:
            id: The answer's.
            owner: Whose answer it is.
            after: The number of the event to go on after, ``0`` for all of it.

        Raises:
            UnknownAnswer: The owner has none with this id, or it is no longer kept.
            BadOffset: The answer has no event with the number ``after``.
            AnswersUnavailable: Redis is away, and the answer is not in this process; try again later.
            AnswerGap: What is in Redis is not the log of an answer.
            AnswersClosed: The durable answers are closed.

        Cancellation: safe.
        """
        name = Name.of(owner, id)
        _check_offset(after)
        self._check_open()
        log = await self._carrier.find(name)
        if len(log) < after and not log.closed:
            # Its producer's viewers are ahead of Redis.
            log.attend(1)
            try:
                await asyncio.wait_for(log.reaches(after), _CATCH_UP)
            except TimeoutError:
                pass
            finally:
                # Only once the viewer is there: a log that nobody watches is not followed any more.
                asyncio.get_running_loop().call_soon(log.attend, -1)
        if len(log) < after:
            raise _beyond(after, len(log))
        return Viewer(log, after)

    async def stop(self, id: str, reason: str | None = None, *, owner: str = "") -> Stopped:  # noqa: A002
        """Stop an answer, wherever it is produced; the same as ``registry.abort()``.

        Its viewers get its ``end``, with the reason. After its end, it changes nothing.

        Args:
            id: The answer's.
            reason: What the ``reason`` in its ``end`` will be.
            owner: Whose answer it is.

        Returns:
            As ``AbortRegistry.abort()``.

        Cancellation: safe; the Stop holds nevertheless.
        """
        self._check_open()
        return await self.registry.abort(id, reason, owner=owner)

    async def list(self, owner: str = "") -> list[Listed]:
        """Return the answers of an owner that run or are kept, the oldest first.

        Raises:
            AnswersUnavailable: Redis is away.
            AnswersClosed: The durable answers are closed.

        Cancellation: safe.
        """
        Name.of(owner, "-")
        self._check_open()
        return sorted(await self._carrier.names(owner), key=lambda listed: (listed.begun, listed.id))

    def close(self) -> None:
        """Abort all answers that this process produces, before it returns; idempotent, and only from the loop's thread.

        Each gets its ``end``, with the reason ``CLOSED``.
        """
        self._closed = True
        for producer in list(self._running):
            producer.abort(CLOSED)

    async def aclose(self, *, drain: float = 5.0) -> None:
        """Close: abort all answers of this process, call ``on_end`` for each, and leave Redis; idempotent.

        Args:
            drain: How many seconds their ends have to get into Redis.

        Cancellation: the answers are aborted in any case; ``on_end`` and the last writes go on.
        """
        self.close()
        producers = [producer.task for producer in self._running]
        if producers:
            await asyncio.wait(producers)
        try:
            async with asyncio.timeout(drain):
                await self._carrier.drain()
        except TimeoutError:
            pass
        finally:
            await self._carrier.aclose()
            if self._owns_registry:
                await self.registry.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise AnswersClosed("the durable answers are closed: create new ones")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _retrieve(future: asyncio.Future[bool]) -> None:
    if not future.cancelled():
        future.exception()


def _redis(url: str, namespace: str, lease: float) -> Carrier:
    # Only now: it needs redis-py.
    from ._relay import RedisCarrier

    return RedisCarrier(url, namespace, lease)


def _check_number(name: str, given: object, *, may_lack: bool) -> None:
    if given is None and may_lack:
        return
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < _ENDLESS:
        raise RequestError(f"{name}={given!r}: give a number above 0")


def _check_offset(after: object) -> None:
    if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < _MAX_OFFSET:
        raise BadOffset(f"after={str(after)[:40]!r}: give the number of an event, or 0 for the whole answer")


def _beyond(after: int, last: int) -> BadOffset:
    return BadOffset(f"after={after}: the answer's last event is number {last}; attach with after=0 for all of it")
