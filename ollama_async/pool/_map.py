"""``Pool.map``: a call for each of many items."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self, cast

from ollama_async._cancel import CancelToken
from ollama_async._errors import OllamaError, RequestError, shown
from ollama_async._loops import in_loop
from ollama_async._secret import showable

from ._calls import Kind, check_kind, is_count
from ._hosts import HostState

__all__ = ["Caller", "MapResult", "Mapper", "PoolMap"]


class Caller(Protocol):
    """What ``Pool.map`` and ``batch`` need of a pool: whatever has these can stand in for one.

    ``chat``, ``generate`` and ``embed`` return an awaitable of the whole answer, with the URL of its host in
    ``answer["host"]``. They wait for a slot, take ``token=`` beside the parameters of ``AsyncClient``, and may be
    called more often than there are slots. An ``OllamaError`` that they raise has the partial answer in ``partial``,
    and in ``host`` where the call was sent to; ``None`` there says that it was not sent.
    """

    @property
    def hosts(self) -> tuple[HostState, ...]:
        """What is known of each host now."""
        ...

    @property
    def chat(self) -> Callable[..., Any]:
        """Have a model answer a chat."""
        ...

    @property
    def generate(self) -> Callable[..., Any]:
        """Have a model complete a prompt."""
        ...

    @property
    def embed(self) -> Callable[..., Any]:
        """Turn texts into vectors."""
        ...


@showable
@dataclass(frozen=True, slots=True)
class MapResult:
    """What became of one item of ``Pool.map``.

    Attributes:
        index: Place of the item, from 0.
        item: The item.
        response: The answer; ``None`` if the call failed.
        error: What went wrong, with the partial answer in ``error.partial``; ``None`` if nothing did.
        host: URL of the host that answered, or was asked last; ``None`` if none was.
        seconds: How long it took, waiting included.
    """

    index: int
    item: Any
    response: Any
    error: Exception | None
    host: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None


@showable
class PoolMap:
    """The results of ``Pool.map``: iterate it with ``async for``, once."""

    def __init__(
        self,
        pool: Caller,
        items: Iterable[Any] | AsyncIterable[Any],
        kind: Kind | None,
        defaults: dict[str, Any],
        *,
        ordered: bool,
        concurrency: int,
        token: CancelToken | None,
    ) -> None:
        self._pool = pool
        self._kind: Kind | None = kind
        self._defaults = defaults
        self._ordered = ordered
        self._concurrency = concurrency
        self._given = token
        # What ends the calls of this map, and nothing else.
        self.token: CancelToken = CancelToken() if token is None else token.child()
        self._source = enumerate_items(items)
        self._reading = asyncio.Lock()
        self._read_all = False
        # Places for items that are read and not delivered: what is held at any time is bounded.
        self._room = asyncio.Semaphore(concurrency)
        self._results: dict[int, MapResult] = {}
        self._next = 0
        self._came = asyncio.Event()
        self._failure: BaseException | None = None
        self._workers: set[asyncio.Task[None]] = set()

    def __aiter__(self) -> AsyncIterator[MapResult]:
        """Return an iterator that aborts what is left when it is dropped.

        Only the ``for`` loop holds it, so leaving the loop early drops it, and CPython frees it before the next
        statement runs.
        """
        if self._workers or self._next:
            raise RequestError("the results of a map are there once: call map() again")
        loop = asyncio.get_running_loop()
        for _ in range(self._concurrency):
            worker = loop.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._worker_done)
        return _MapIterator(self)

    def _worker_done(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and worker.exception() is not None:
            self._failure = self._failure or worker.exception()
            self.token.abort(self._failure)
        self._came.set()

    async def _work(self) -> None:
        while True:
            await self._room.acquire()
            async with self._reading:
                if self._read_all or self.token.aborted:
                    return
                try:
                    index, item = await anext(self._source)
                except StopAsyncIteration:
                    self._read_all = True
                    return
            result = await self._ask(index, item)
            self._results[index] = result
            self._came.set()

    async def _ask(self, index: int, item: Any) -> MapResult:
        began = time.monotonic()
        response: Any = None
        error: Exception | None = None
        try:
            kind, given = as_call(item, self._kind)
            response = await getattr(self._pool, kind)(**{**self._defaults, **given, "token": self.token})
            host = response["host"]
        except Exception as exc:
            error, host = exc, exc.host if isinstance(exc, OllamaError) else None
        return MapResult(index, item, response, error, host, time.monotonic() - began)

    async def next_result(self) -> MapResult:
        """Return the next result that is to be delivered."""
        while True:
            index = self._next if self._ordered else next(iter(self._results), self._next)
            if index in self._results:
                self._next += 1
                self._room.release()
                return self._results.pop(index)
            if not self._workers:
                if self._results:
                    # Aborted: those before them were never asked for.
                    self._next = min(self._results)
                    continue
                self._end()
            self._came.clear()
            await self._came.wait()

    def _end(self) -> NoReturn:
        if self._failure is not None:
            raise self._failure
        if self._given is not None:
            self._given.raise_if_aborted()
        raise StopAsyncIteration

    def stop(self) -> None:
        """Abort what is left, from any thread."""
        self.token.abort("the loop over the results was left")
        for worker in tuple(self._workers):
            loop = worker.get_loop()
            if asyncio._get_running_loop() is loop:  # noqa: SLF001
                worker.cancel()
            else:
                in_loop(loop, worker.cancel)


class _MapIterator:
    """What an ``async for`` holds of a map; when it is dropped, that aborts what is left."""

    __slots__ = ("_map",)

    def __init__(self, results: PoolMap) -> None:
        self._map = results

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> MapResult:
        try:
            return await self._map.next_result()
        except BaseException:
            self._map.stop()
            raise

    def __del__(self) -> None:
        results = getattr(self, "_map", None)
        if results is not None:
            results.stop()


class Mapper:
    """Gives a ``Caller`` its ``map``."""

    def map(
        self: Caller,
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
            RequestError: A parameter is not valid.
        """
        count = sum(host.slots + 1 for host in self.hosts) if concurrency is None else concurrency
        if not is_count(count):
            raise RequestError(f"concurrency={shown(count)}: give how many calls are made at once, 1 or more")
        if isinstance(items, (str, bytes)) or not isinstance(items, (Iterable, AsyncIterable)):
            raise RequestError(f"items={type(items).__name__}: give a list of prompts or dicts, or another iterable")
        if kind not in (None, *_KIND_OF.values()):
            raise RequestError(f"kind={shown(kind)}: give 'chat', 'generate' or 'embed'")
        check_kind("token", token, CancelToken)
        defaults = options | ({} if model is None else {"model": model})
        return PoolMap(self, items, kind, defaults, ordered=ordered, concurrency=count, token=token)


_KIND_OF: dict[str, Kind] = {"messages": "chat", "prompt": "generate", "input": "embed"}


def as_call(item: Any, kind: Kind | None) -> tuple[Kind, dict[str, Any]]:
    """Return the kind and the parameters of the call that an item stands for.

    Raises:
        RequestError: It stands for none.
    """
    if isinstance(item, str):
        kind = kind or "chat"
        return kind, {next(name for name, of in _KIND_OF.items() if of == kind): item}
    if isinstance(item, Mapping):
        parameters = dict(cast("Mapping[str, Any]", item))
        found: list[Kind] = [of for name, of in _KIND_OF.items() if name in parameters]
        if len(found) == 1:
            return found[0], parameters
    kind_of_item = type(cast("object", item)).__name__
    raise RequestError(
        f"an item of the type {kind_of_item}: give a prompt, or a dict with one of messages, prompt, input"
    )


async def enumerate_items(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[tuple[int, Any]]:
    """Yield items with their places."""
    index = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield index, item
            index += 1
    else:
        for item in items:
            yield index, item
            index += 1
