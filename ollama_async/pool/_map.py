"""``Pool.map``: a call for each of many items."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self, cast

from ollama_async._cancel import CancelToken
from ollama_async._errors import RequestError
from ollama_async._loops import in_loop

from ._calls import Kind
from ._stream import PoolStream

__all__ = ["MapResult", "PoolMap", "as_call"]

from ollama_async._secret import showable


class Caller(Protocol):
    """What makes the calls: a ``Pool``, which is made on this module."""

    async def embed(self, **parameters: Any) -> Any:
        """Embed texts."""


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
        stream: PoolStream[Any] | None = None
        response: Any = None
        error: Exception | None = None
        try:
            kind, given = as_call(item, self._kind)
            parameters: dict[str, Any] = {**self._defaults, **given, "token": self.token}
            if kind == "embed":
                response = await self._pool.embed(**parameters)
            else:
                stream = cast("PoolStream[Any]", getattr(self._pool, kind)(stream=True, **parameters))
                response = await stream.whole()
        except Exception as exc:
            error = exc
        host = stream.host if stream is not None else response and response["host"]
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

    def __anext__(self) -> Coroutine[Any, Any, MapResult]:
        return self._step()

    async def _step(self) -> MapResult:
        try:
            return await self._map.next_result()
        except BaseException:
            self._map.stop()
            raise

    def __del__(self) -> None:
        results = getattr(self, "_map", None)
        if results is not None:
            results.stop()


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
    raise RequestError("an item is a prompt, or a dict with messages, prompt or input")


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
