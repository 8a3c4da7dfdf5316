"""Bulk work: every row of a file, or every item of an iterable, asked of one server or many; resumable at any time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, closing
from pathlib import Path
from typing import Any, cast

from ollama_async._cancel import CancelToken
from ollama_async._errors import RequestError
from ollama_async.pool import Caller, Host, Kind, Pool

from ._errors import BatchError, DiskError, HostsGone, InputRefused, OutputRefused
from ._items import Item, Reader, Shape
from ._journal import Journal
from ._parquet import write_parquet
from ._records import Embedding, Form, can_pass
from ._run import BatchProgress, BatchResult, Run

__all__ = [
    "BatchError",
    "BatchProgress",
    "BatchResult",
    "DiskError",
    "HostsGone",
    "InputRefused",
    "OutputRefused",
    "batch",
]

# Raised when what a job file says changes its meaning.
_FORMAT_VERSION = 1
_PATIENCE = 5.0


async def batch(
    input: str | os.PathLike[str] | Iterable[Any] | AsyncIterable[Any],  # noqa: A002
    output: str | os.PathLike[str],
    *,
    pool: Caller | str | Host | Iterable[str | Host],
    model: str | None = None,
    kind: Kind = "chat",
    id_field: str = "id",
    prompt_field: str | None = None,
    template: str | None = None,
    system: str | None = None,
    format: str | Mapping[str, Any] | None = None,  # noqa: A002
    options: Mapping[str, Any] | None = None,
    think: bool | str | None = None,
    keep_alive: float | str | None = None,
    concurrency: int | None = None,
    embed_size: int = 16,
    retries: int = 2,
    wait_hosts: float = 300.0,
    limit: int | None = None,
    retry_failed: bool = False,
    changed: bool = False,
    restart: bool = False,
    force: bool = False,
    fsync: float = 1.0,
    openai: bool = False,
    embedding: Embedding = "list",
    sort: bool = False,
    parquet: str | os.PathLike[str] | None = None,
    on_progress: Callable[[BatchProgress], object] | None = None,
    token: CancelToken | None = None,
    **call: Any,
) -> BatchResult:
    """Ask for an answer to each row of an input, and write the answers to a file.

    The same call resumes what was interrupted, however that was: by an abort, a crash, or a full disk. An answer that
    is in the output is whole and is there once.

    Args:
        input: Path of a JSONL or Parquet file, or an iterable of rows, also an asynchronous one. A row is a prompt, or
            a dict with ``prompt``, ``messages`` (a chat) or ``input`` (an embedding), perhaps ``id``, ``model`` and
            further parameters of the call; or a line of an OpenAI batch.
        output: Path of the JSONL file to write, a line for each answer, in the order in which they end. What failed is
            in the file of this name with ``.failed.jsonl`` behind it.
        pool: A ``Pool``, another ``Caller``, or hosts to make a pool of.
        model: The model of rows that name none.
        kind: What prompts are for: ``"chat"``, ``"generate"`` or ``"embed"``.
        id_field: The field of a row with its id; without one its id is its line number.
        prompt_field: The field of a row with its prompt; the other fields are then data.
        template: The prompt, with ``{field}`` for fields of the row, which are all data then.
        system: System prompt of chats and completions.
        format: As in ``AsyncClient.chat``, for rows that have none.
        options: As in ``AsyncClient.chat``, for rows that have none.
        think: As in ``AsyncClient.chat``, for rows that have none.
        keep_alive: As in ``AsyncClient.chat``, for rows that have none.
        concurrency: How many calls are made at once, at most; by default as many as the pool has slots, and one more
            for each host if there are several, or if the next row may be long in coming.
        embed_size: How many texts are embedded by one call.
        retries: How often an item is asked for again that failed in a way that can pass.
        wait_hosts: Seconds to wait while no host is in service.
        limit: How many rows are read at most.
        retry_failed: Whether what failed for good is asked for again.
        changed: Whether rows are asked for again that are not what was answered under their ids.
        restart: Whether what is in the output is dropped.
        force: Whether to go on although the output is of another job.
        fsync: Seconds between two times at which the output is given to the disk.
        openai: Whether to write lines of an OpenAI batch.
        embedding: How vectors are written: ``"list"``, or ``"base64"`` of little-endian 32-bit floats.
        sort: Whether to put the output in the order of the input at the end.
        parquet: Path of a Parquet file to write at the end, too.
        on_progress: Called a few times a second with a ``BatchProgress``.
        token: Aborts the batch.
        **call: ``timeout=`` and ``headers=`` of every call.

    Returns:
        What this run has done.

    Raises:
        InputRefused: A row is not a call, or two have the same id; nothing was asked.
        OutputRefused: The output is another batch's, or cannot be created.
        DiskError: The disk is full.
        HostsGone: No host was in service for ``wait_hosts`` seconds.
        BatchError: The first 20 items failed in the same way.
        AbortError: The token was aborted; ``partial`` is the ``BatchResult``.

    Cancellation: closes all connections at once and keeps the partial answers, as an abort does.
    """
    defaults = {"format": format, "options": options, "think": think, "keep_alive": keep_alive}
    defaults = {name: value for name, value in defaults.items() if value is not None}
    shape = Shape(kind, model, id_field, prompt_field, template, system, defaults)
    if embed_size < 1 or retries < 0 or fsync <= 0:
        raise RequestError("give embed_size= of 1 or more, retries= of 0 or more, and fsync= above 0")
    path = Path(output)
    source = os.fspath(input) if isinstance(input, os.PathLike) else input
    reader = Reader(source, shape, limit)
    # In a thread: it takes a second for 100,000 rows, and another one to read the finished rows.
    total = await asyncio.to_thread(reader.check, path)
    journal = Journal(path)
    try:
        if restart:
            journal.restart()
        job: dict[str, Any] = {
            "version": _FORMAT_VERSION,
            "kind": kind,
            "model": model,
            "id_field": id_field,
            "openai": openai,
        }
        job |= {
            "prompt_field": prompt_field,
            "template": template,
            "system": system,
            "embedding": embedding,
            **defaults,
        }
        journal.check_job(job, force=force)
        skip = await asyncio.to_thread(_Skip, journal, retry_failed=retry_failed)
        own = Pool(pool, patience=min(wait_hosts, _PATIENCE)) if isinstance(pool, (str, Host, Iterable)) else None
        caller = own or cast("Caller", pool)
        try:
            run = Run(
                caller,
                journal,
                Form(openai=openai, embedding=embedding),
                retries=retries,
                wait_hosts=wait_hosts,
                embed_size=embed_size,
                token=token,
                call=call,
            )
            run.total = total
            if changed and total is not None:
                skip.drop_changed(reader.items())
            count = _at_once(caller, waits=reader.waits) if concurrency is None else concurrency
            async with AsyncExitStack() as stack:
                items: Iterator[Item] | AsyncIterator[Item]
                if reader.waits:
                    coming = await stack.enter_async_context(aclosing(reader.items_as_they_come()))
                    items = (item async for item in coming if not skip.has(item, run))
                else:
                    items = (item for item in stack.enter_context(closing(reader.items())) if not skip.has(item, run))
                result = await run.run(items, count, fsync, on_progress)
        finally:
            if own is not None:
                await own.aclose()
        if sort:
            journal.sort()
        if parquet is not None:
            write_parquet(path, Path(parquet))
        return result
    finally:
        journal.close()


def _at_once(pool: Caller, *, waits: bool) -> int:
    """Return how many calls are made at once: so many that no slot is without one."""
    slots = [host.slots for host in pool.hosts]
    # A worker writes an answer and makes its next call within one step, in which its slot waits for nobody. One more
    # for each host helps where a row is long in coming, and where the next call may be for another host.
    return slots[0] if len(slots) == 1 and not waits else sum(slots) + len(slots)


class _Skip:
    """What earlier runs have done, by id: it is not asked for again."""

    def __init__(self, journal: Journal, *, retry_failed: bool) -> None:
        self._journal = journal
        self._done = {_id(record): record["input_hash"] for record in journal.done()}
        # Of the failures those stay that are not asked for again: none is in the file twice.
        self._given_up = {} if retry_failed else {_id(r): r["input_hash"] for r in journal.failed() if _lasts(r)}
        journal.rewrite_failed(lambda r: self._given_up.get(_id(r)) == r["input_hash"] and _id(r) not in self._done)

    def drop_changed(self, items: Iterable[Item]) -> None:
        """Take out of the output what is not what the input has under its id."""
        stale = {item.id for item in items if item.id in self._done and self._done[item.id] != item.input_hash}
        if stale:
            self._journal.rewrite(lambda record: _id(record) not in stale)
            for each in stale:
                del self._done[each]

    def has(self, item: Item, run: Run) -> bool:
        """Whether an item is not to be asked for; a run is told which are not."""
        before = self._done.get(item.id)
        given_up = self._given_up.get(item.id)
        if before is None and (given_up is None or given_up != item.input_hash):
            return False
        run.skipped += 1
        run.changed += before is not None and before != item.input_hash
        return True


def _id(record: dict[str, Any]) -> str:
    return str(record["custom_id"] if "custom_id" in record else record["id"])


def _lasts(record: dict[str, Any]) -> bool:
    """Whether a failure would be the same again."""
    if record["status"] != "error":
        return False
    error: dict[str, Any] = record["error"]
    response: dict[str, Any] = record.get("response") or {}
    return not can_pass(
        str(error.get("type") or error.get("code")), error.get("status_code", response.get("status_code"))
    )
