"""One run of a batch: workers pull items, ask the pool, and write the answer before they take the next."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ollama_async._cancel import CancelToken
from ollama_async._errors import (
    AbortError,
    BadRequestError,
    ConnectError,
    OllamaError,
    ResponseError,
    StreamTruncated,
)
from ollama_async.pool import Caller, HostState

from ._errors import BatchError, DiskError, HostsGone
from ._items import Item
from ._journal import Journal
from ._records import Form, can_pass

__all__ = ["BatchProgress", "BatchResult", "Run"]

_PROGRESS_SECONDS = 0.25
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_DOUBLINGS = 16
_HOST_PAUSE = 0.25
# So many of the first items that fail with the same lasting error tell what would become of the others.
_SAME_FAILURES = 20


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a run of a batch has done.

    Attributes:
        done: Items that were answered in this run.
        skipped: Items that earlier runs have answered, or given up.
        changed: Of those, items that are not what was answered under their id.
        failed: Items that failed for good, or too often.
        aborted: Items whose answers were stopped; their partial answers are kept.
        seconds: How long the run took.
        tokens: Tokens that were generated, or read for embeddings.
    """

    done: int
    skipped: int
    changed: int
    failed: int
    aborted: int
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is: given to ``on_progress``.

    Attributes:
        result: What has been done so far.
        total: How many items the input has; ``None`` if that is not known.
        hosts: The hosts of the pool.
    """

    result: BatchResult
    total: int | None
    hosts: tuple[HostState, ...]


class Run:
    """One run of a batch over a pool."""

    def __init__(
        self,
        pool: Caller,
        journal: Journal,
        form: Form,
        *,
        retries: int,
        wait_hosts: float,
        embed_size: int,
        token: CancelToken | None,
        call: dict[str, Any],
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._form = form
        self._retries = retries
        self._wait_hosts = wait_hosts
        self._embed_size = embed_size
        self._call = call
        self._given = token
        # What ends all calls of this run.
        self._token = CancelToken() if token is None else token.child()
        self._failure: BaseException | None = None
        self._items: Iterator[Item] | None = None
        self._items_as_they_come: AsyncIterator[Item] | None = None
        self._reading = asyncio.Lock()
        # Read already, and not to be embedded with those before it.
        self._ahead: Item | None = None
        self._began = time.monotonic()
        self.total: int | None = None
        self.skipped = self.changed = 0
        self._done = self._failed = self._aborted = self._tokens = 0
        self._same_failures: Counter[str] = Counter()
        # When the last sign of life came from any host.
        self._alive_at = self._began

    @property
    def result(self) -> BatchResult:
        """What has been done so far."""
        return BatchResult(
            done=self._done,
            skipped=self.skipped,
            changed=self.changed,
            failed=self._failed,
            aborted=self._aborted,
            seconds=time.monotonic() - self._began,
            tokens=self._tokens,
        )

    @property
    def progress(self) -> BatchProgress:
        """How far it is."""
        return BatchProgress(self.result, self.total, self._pool.hosts)

    async def run(
        self,
        items: Iterator[Item] | AsyncIterator[Item],
        concurrency: int,
        fsync: float,
        on_progress: Callable[[BatchProgress], object] | None,
    ) -> BatchResult:
        """Ask for all items.

        Raises:
            AbortError: The token was aborted; ``partial`` is the result so far.
            BatchError: The disk is full, or the hosts are gone.
        """
        loop = asyncio.get_running_loop()
        if isinstance(items, Iterator):
            self._items = items
        else:
            self._items_as_they_come = items
        helpers = [loop.create_task(self._sync(fsync))]
        if on_progress is not None:
            helpers.append(loop.create_task(self._tell(on_progress)))
        workers = [loop.create_task(self._work()) for _ in range(concurrency)]
        try:
            await asyncio.wait(workers)
        except asyncio.CancelledError:
            # The sockets are closed here; what follows takes no more than writing the answers.
            self._token.abort("the batch was cancelled")
            await asyncio.wait(workers)
            raise
        finally:
            for task in (*helpers, *workers):
                task.cancel()
            self._end_all()
        await asyncio.gather(*helpers, return_exceptions=True)
        if on_progress is not None:
            on_progress(self.progress)
        return self._ended()

    def _end_all(self) -> None:
        # On every way out, so also where a second cancellation came.
        self._token.abort("the batch is over")
        try:
            self._journal.sync()
        except DiskError as exc:
            self._failure = self._failure or exc

    def _ended(self) -> BatchResult:
        result, failure = self.result, self._failure
        if failure is not None:
            if isinstance(failure, OllamaError):
                failure.partial = result
            raise failure
        if self._given is not None and self._given.aborted:
            raise AbortError(self._given.reason, result)
        return result

    def _fail(self, failure: BaseException) -> None:
        """End the run: the disk is full, the hosts are gone, the input is broken."""
        if self._failure is None:
            self._failure = failure
        self._token.abort(failure)

    # -- beside the work --

    async def _sync(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self._journal.sync)
            except DiskError as exc:
                self._fail(exc)

    async def _tell(self, on_progress: Callable[[BatchProgress], object]) -> None:
        while True:
            try:
                on_progress(self.progress)
            except Exception as exc:
                self._fail(exc)
                return
            await asyncio.sleep(_PROGRESS_SECONDS)

    # -- the work --

    async def _work(self) -> None:
        try:
            while not self._token.aborted and (batch := await self._take()):
                if batch[0].kind == "embed":
                    await self._embed(batch)
                else:
                    await self._answer(batch[0])
        except Exception as exc:
            self._fail(exc)

    async def _take(self) -> list[Item]:
        """Return what is asked for next: an item, or some to embed together; nothing at the end."""
        if self._items is not None:
            return await self._some()
        async with self._reading:
            return await self._some()

    async def _some(self) -> list[Item]:
        first = self._ahead or await self._next()
        self._ahead = None
        if first is None:
            return []
        batch = [first]
        while first.kind == "embed" and _size(batch) < self._embed_size:
            item = await self._next()
            if item is None:
                break
            if not _goes_with(item, first):
                self._ahead = item
                break
            batch.append(item)
        return batch

    async def _next(self) -> Item | None:
        if self._items is not None:
            return next(self._items, None)
        assert self._items_as_they_come is not None
        # Whatever the caller's source waits for, an abort does not wait for that.
        try:
            with self._token.scope():
                return await anext(self._items_as_they_come, None)
        except AbortError:
            return None

    async def _answer(self, item: Item) -> None:
        """Ask for an answer until there is one, or an error that lasts."""
        ask: Callable[..., Any] = getattr(self._pool, item.kind)
        answer, error, attempts = await self._attempts(lambda: ask(token=self._token, **item.parameters, **self._call))
        if error is None:
            # In the step of the task that the answer came in: nobody has been given its slot yet.
            self._journal.add_done(self._form.answer(item, answer, answer["host"]))
            self._done += 1
            self._tokens += answer.get("eval_count") or 0
        else:
            self._write_failure(item, error, attempts)

    async def _embed(self, batch: list[Item]) -> None:
        """Embed some items together; what a server refuses is halved until the guilty one is alone."""
        texts = [text for item in batch for text in _texts(item)]
        parameters = {**batch[0].parameters, "input": texts}
        answer, error, attempts = await self._attempts(
            lambda: self._pool.embed(token=self._token, **parameters, **self._call)
        )
        if isinstance(error, BadRequestError) and len(batch) > 1:
            middle = len(batch) // 2
            # This worker takes both: none other may be there any more.
            await self._embed(batch[:middle])
            await self._embed(batch[middle:])
        elif error is not None:
            for item in batch:
                self._write_failure(item, error, attempts)
        else:
            host, place = answer["host"], 0
            self._tokens += answer.get("prompt_eval_count") or 0
            for item in batch:
                count = len(_texts(item))
                mine = answer.model_copy(update={"embeddings": answer.embeddings[place : place + count]})
                place += count
                self._journal.add_done(self._form.answer(item, mine, host))
                self._done += 1

    async def _attempts(self, attempt: Callable[[], Awaitable[Any]]) -> tuple[Any, Exception | None, int]:
        """Make attempts; return the answer, or the error of the last one, and how many there were."""
        attempts = 0
        while True:
            finished = self._done
            try:
                answer = await attempt()
            except (AbortError, DiskError) as exc:
                return None, exc, attempts + 1
            except Exception as exc:
                error = exc
            else:
                self._alive_at = time.monotonic()
                return answer, None, attempts + 1
            if isinstance(error, ConnectError) and finished == self._done:
                # All hosts are away, which is not this item's doing.
                if time.monotonic() - self._alive_at > self._wait_hosts:
                    self._fail(HostsGone(f"no host came back within {self._wait_hosts:g} s: {error.detail or error}"))
                pause = _HOST_PAUSE
            else:
                attempts += 1
                code = error.status_code if isinstance(error, ResponseError) else None
                if not isinstance(error, ConnectError):
                    self._alive_at = time.monotonic()
                if not can_pass(type(error).__name__, code) or attempts > self._retries:
                    return None, error, attempts
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempts - 1, _DOUBLINGS))
            with suppress(AbortError):
                with self._token.scope():
                    await asyncio.sleep(pause)
                continue
            return None, AbortError(self._token.reason), attempts

    def _write_failure(self, item: Item, error: Exception, attempts: int) -> None:
        host = error.host if isinstance(error, OllamaError) else None
        if isinstance(error, DiskError):
            raise error
        if isinstance(error, AbortError):
            if host is None or isinstance(self._failure, DiskError):
                # It was waiting: it is as if it had not been read.
                return
            self._journal.add_failed(self._form.failure(item, "aborted", error, host, attempts))
            self._aborted += 1
            return
        status = "truncated" if isinstance(error, StreamTruncated) else "error"
        self._journal.add_failed(self._form.failure(item, status, error, host, attempts))
        self._failed += 1
        code = error.status_code if isinstance(error, ResponseError) else None
        if not self._done and not can_pass(type(error).__name__, code):
            self._same_failures[f"{type(error).__name__}: {error}"] += 1
            if self._failed == _SAME_FAILURES and len(self._same_failures) == 1:
                self._fail(
                    BatchError(f"the first {_SAME_FAILURES} items failed alike, so the rest was not asked: {error}")
                )


def _texts(item: Item) -> list[str]:
    texts: Any = item.parameters["input"]
    return [texts] if isinstance(texts, str) else list(texts)


def _size(batch: list[Item]) -> int:
    return sum(len(_texts(item)) for item in batch)


def _goes_with(item: Item, first: Item) -> bool:
    """Whether two items can be embedded by one call."""
    if item.kind != "embed":
        return False
    mine, others = item.parameters, first.parameters
    return {**mine, "input": None} == {**others, "input": None}
