"""Follows answers of other processes: one task and one connection, whatever the number of answers and viewers.

What is there already is read by whoever attaches; then the task reads on, from the last entry that is here. Both are
reads from an offset, so nothing can come between them. Losing the connection is a silence for the viewers: the same
reads are done again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, Any, cast

from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ResponseError

from ollama_async.registry import Name
from ollama_async.registry._redis import end_tasks

from ._carrier import Listed
from ._errors import AnswerGap, AnswerGone, AnswersClosed, AnswersUnavailable, UnknownAnswer
from ._events import ends, kept_end, merged, split, taken_apart
from ._log import Log
from ._server import FIELD, LOST, PATIENCE, Connecting, entry_id, first_number, refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ollama_async._errors import OllamaError

    from ._server import Keys, Server

__all__ = ["Reader"]

_log = logging.getLogger("ollama_async.durable")

_PORTION = 128
_LONGEST_BLOCK = 5.0
# After each reply, so that many answers cost what one costs.
_REST = 0.005
_LONGEST_PAUSE = 3.0
_CONNECTIONS = 4
# Seconds after which these are closed, if nobody attaches or asks for a list.
_IDLE = 1.0
_MOST_LISTED = 1000
_KEEP_WAKE = 600
_NOT_A_LOG = "what Redis has under this id is not the log of an answer, or not all of it"


class _Mirror:
    """The log of an answer that is produced elsewhere."""

    def __init__(self, name: Name, keys: Keys) -> None:
        self.name = name
        self.key, self.run, self.seen = keys.log(name), keys.run(name), keys.seen(name)
        self.log = Log()
        # The id of the last entry that is in the log, by the number of its first event.
        self.last = 0
        self.filling: asyncio.Task[None] | None = None
        self.full = False
        # By the loop's clock: of the last entry, of the first look that found no lease, of the next note of presence.
        self.heard_at = 0.0
        self.missed_at: float | None = None
        self.note_at = 0.0

    @property
    def unattended(self) -> float | None:
        """After how much absence its producer aborts it."""
        given = _opened(self.log.fragments[0]).get("unattended") if self.log.fragments else None
        return given if isinstance(given, (int, float)) and given > 0 else None

    def take(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> None:
        """Add what entries have that is not here yet."""
        try:
            for number, fields in entries:
                first, fragments = first_number(number), taken_apart(fields[FIELD])
                known = len(self.log)
                if first > known + 1:
                    self.log.fail(AnswerGap(f"events {known + 1} to {first - 1} of the answer are missing"))
                    return
                self.last = first
                self.log.extend(fragments[known + 1 - first :])
        except (ValueError, LookupError, AttributeError, RecursionError):
            self.log.fail(AnswerGap(_NOT_A_LOG))


class Reader:
    """What brings the answers of other processes here."""

    def __init__(self, server: Server, keys: Keys, lease: float) -> None:
        self._server = server
        self._keys = keys
        self._lease = lease
        self._commands = self._new_commands()
        # What has been replaced by that: its connections are closed, or are about to be.
        self._retired: Any = None
        self._asking = 0
        # When somebody last needed a connection for commands; 0 if there are none.
        self._used_at = 0.0
        self._connecting = Connecting()
        self._connected = False
        self._blocking = server.client(connections=1, silence=_LONGEST_BLOCK + 5, connecting=self._connecting)
        self._backoff = ExponentialWithJitterBackoff(cap=min(_LONGEST_PAUSE, lease / 6), base=0.05)
        self._mirrors: dict[Name, _Mirror] = {}
        self._wake_key = keys.wake(secrets.token_hex(8))
        self._wake_offset = "0"
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # The tasks look at this as well, see end_tasks().
        self._closing = False
        self._jobs: set[asyncio.Task[None]] = set()
        # Whoever waits for a turn is not told that Redis is away, as one who waits for a connection is. One connection
        # is left for what is short.
        self._turns = asyncio.Semaphore(_CONNECTIONS - 1)
        self._checked = False
        self._look_at = 0.0

    # -- for viewers --

    async def find(self, name: Name) -> Log:
        """Return the log of an answer of another process, filled with what is there."""
        mirror = self._mirrors.get(name)
        if mirror is None:
            mirror = self._mirrors[name] = _Mirror(name, self._keys)
            mirror.log.on_attended = lambda: self._attended(mirror)
            mirror.filling = self._start(self._fill(mirror))
        # Counted as a viewer until there is one, so that nobody drops what it waits for.
        mirror.log.attend(1)
        try:
            if mirror.filling is not None:
                await asyncio.wait({mirror.filling})
            failure = mirror.log.failure
            # Of a log that is damaged, viewers get what is before the damage.
            if failure is not None and not (mirror.log.fragments and isinstance(failure, AnswerGap)):
                raise copy(failure)
        finally:
            asyncio.get_running_loop().call_soon(mirror.log.attend, -1)
        return mirror.log

    async def names(self, owner: str) -> list[Listed]:
        """Return the answers of an owner."""
        self._asking += 1
        try:
            await self._check()
            found = await self._commands.zrevrange(self._keys.of(owner), 0, _MOST_LISTED - 1)
            return await self._listed(owner, [each.decode() for each in found])
        except LOST as exc:
            error = self._unavailable(exc)
        finally:
            self._asking -= 1
            self._used_at = asyncio.get_running_loop().time()
        raise error

    async def _listed(self, owner: str, ids: list[str]) -> list[Listed]:
        names = [Name(owner, each) for each in ids]
        pipeline = self._commands.pipeline(transaction=False)
        for name in names:
            pipeline.xrange(self._keys.log(name), count=1)
            pipeline.exists(self._keys.run(name))
            pipeline.xrevrange(self._keys.log(name), count=1)
        replies = await pipeline.execute(raise_on_error=False)
        listed, forgotten = list[Listed](), list[str]()
        for place, answer in enumerate(ids):
            first, alive, last = replies[3 * place : 3 * place + 3]
            try:
                begun = float(_opened(taken_apart(first[0][1][FIELD])[0])["begun"])
                ended = ends(last[0][1][FIELD].split(b"\n")[-1])
            except (ValueError, LookupError, TypeError):
                forgotten.append(answer)
                continue
            listed.append(Listed(answer, "ended" if ended else "running" if alive else "silent", begun))
        if forgotten:
            await self._commands.zrem(self._keys.of(owner), *forgotten)
        return listed

    async def aclose(self) -> None:
        """End the tasks and the connections."""
        task, self._task = self._task, None
        self._closing = True
        self._wake.set()
        tasks: set[asyncio.Task[Any]] = {*self._jobs} if task is None else {*self._jobs, task}
        try:
            pools = [self._blocking.connection_pool, self._commands.connection_pool, self._retired]
            await end_tasks(tasks, *filter(None, pools))
            for mirror in list(self._mirrors.values()):
                mirror.log.fail(AnswersClosed("the durable answers are closed"))
            self._mirrors.clear()
            if task is not None:
                with suppress(*LOST):
                    await self._commands.delete(self._wake_key)
        finally:
            await self._commands.connection_pool.disconnect()

    def _start(self, job: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    def _new_commands(self) -> Any:
        return self._server.client(connections=_CONNECTIONS, silence=PATIENCE)

    def _retire_commands(self) -> None:
        """Have the connections closed that nobody has needed for a while."""
        if self._until_idle() <= 0:
            self._used_at = 0.0
            # Not those of a client that somebody may take meanwhile.
            self._retired, self._commands = self._commands.connection_pool, self._new_commands()
            self._start(self._retired.disconnect())

    def _until_idle(self) -> float:
        if self._jobs or self._asking or not self._used_at:
            return math.inf
        return self._used_at + _IDLE - asyncio.get_running_loop().time()

    async def _check(self) -> None:
        if not self._checked:
            await self._server.check(self._commands)
            self._checked = True

    def _attended(self, mirror: _Mirror) -> None:
        if mirror.log.viewers:
            return
        if self._mirrors.get(mirror.name) is mirror:
            del self._mirrors[mirror.name]
        if mirror.full and mirror.unattended is not None and not mirror.log.closed:
            # Once more: absence counts from now on.
            self._start(self._note_presence(mirror))

    async def _note_presence(self, mirror: _Mirror) -> None:
        with suppress(*LOST):
            await self._commands.set(mirror.seen, "1", px=_ms(mirror.unattended), get=True)
        self._used_at = asyncio.get_running_loop().time()

    # -- what is there --

    async def _fill(self, mirror: _Mirror) -> None:
        came_at = asyncio.get_running_loop().time()
        async with self._turns:
            try:
                if self._server.lost_at > came_at:
                    # Those before have waited for it long enough.
                    raise TimeoutError
                await self._check()
                await self._read_all(mirror)
            except LOST as exc:
                mirror.log.fail(self._unavailable(exc))
        if mirror.log.failure is not None and self._mirrors.get(mirror.name) is mirror:
            # Whoever comes next asks Redis again.
            del self._mirrors[mirror.name]
        mirror.filling = None
        self._used_at = asyncio.get_running_loop().time()

    async def _read_all(self, mirror: _Mirror) -> None:
        start = "-"
        while not mirror.log.closed:
            entries = await self._commands.xrange(mirror.key, min=start, count=_PORTION)
            mirror.take(entries)
            if len(entries) < _PORTION:
                break
            start = f"({entries[-1][0].decode()}"
        if not mirror.log.fragments and mirror.log.failure is None:
            mirror.log.fail(self._missing())
        if mirror.log.closed:
            return
        if mirror.unattended is not None:
            # With what was there: the producer does the same the other way round, and one of both notices.
            await self._note_presence(mirror)
        mirror.heard_at = asyncio.get_running_loop().time()
        mirror.full = True
        if self._task is None and not self._closing:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="ollama_async answers, reader")
        self._wake.set()
        # After it is full: a reader that was woken before would go to sleep without it.
        await self._commands.xadd(self._wake_key, {FIELD: b""}, maxlen=1, approximate=False)
        await self._commands.expire(self._wake_key, _KEEP_WAKE)

    def _missing(self) -> OllamaError:
        if asyncio.get_running_loop().time() - self._server.lost_at < self._lease:
            return AnswersUnavailable("Redis was away a moment ago, and may not have all answers back; try again later")
        return UnknownAnswer("there is no answer with this id, or it is no longer kept")

    def _unavailable(self, error: BaseException) -> OllamaError:
        refused = refusal(error)
        if refused is not None:
            return refused
        if isinstance(error, ResponseError):
            return AnswerGap(_NOT_A_LOG)
        self._checked = False
        self._server.note_lost()
        return AnswersUnavailable(f"Redis does not answer ({type(error).__name__}); try again later")

    # -- what comes --

    async def _run(self) -> None:
        failures = 0
        while not self._closing:
            try:
                await self._follow()
                failures = 0
            except Exception as exc:
                if self._closing:
                    return
                failures += 1
                if failures == 1:
                    _log.warning("Redis is away (%s): viewers of other processes' answers wait", type(exc).__name__)
                if not isinstance(exc, LOST):
                    _log.error("the reader of answers failed", exc_info=exc)
                self._start_over()
                await asyncio.sleep(self._backoff.compute(failures))

    def _start_over(self) -> None:
        """Know nothing of what only time tells: leases run out while Redis is away, too."""
        self._connected = False
        self._server.note_lost()
        self._wake_offset = "0"
        for mirror in self._mirrors.values():
            mirror.missed_at = None
            mirror.note_at = 0.0

    async def _follow(self) -> None:
        """Read once what there is to read."""
        followed = {mirror.key: mirror for mirror in self._mirrors.values() if mirror.full and not mirror.log.closed}
        if not followed:
            self._wake.clear()
            await self._wake.wait()
            return
        if not self._connected:
            await self._connecting.connect(self._server, self._blocking)
            self._connected = True
        self._retire_commands()
        await self._look(list(followed.values()))
        streams = {self._wake_key: self._wake_offset, **{key: entry_id(each.last) for key, each in followed.items()}}
        reply = await self._blocking.xread(streams, block=_ms(self._until_look()))
        for key, entries in _by_stream(reply):
            if key == self._wake_key:
                self._wake_offset = entries[-1][0]
                continue
            mirror = followed[key]
            mirror.heard_at, mirror.missed_at = asyncio.get_running_loop().time(), None
            mirror.take(entries)
        await asyncio.sleep(_REST)

    # -- leases --

    def _until_look(self) -> float:
        until = min(self._look_at - asyncio.get_running_loop().time(), self._until_idle())
        return min(_LONGEST_BLOCK, max(0.001, until))

    async def _look(self, followed: list[_Mirror]) -> None:
        """Look after producers that are silent, and have it known that somebody watches."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at and all(mirror.note_at for mirror in followed):
            return
        silent = [mirror for mirror in followed if now - mirror.heard_at >= self._lease / 3]
        watched = [mirror for mirror in followed if mirror.unattended is not None and mirror.note_at <= now]
        pipeline = self._blocking.pipeline(transaction=False)
        for mirror in silent:
            pipeline.exists(mirror.run)
        for mirror in watched:
            pipeline.set(mirror.seen, "1", px=_ms(mirror.unattended))
        replies: list[Any] = await pipeline.execute(raise_on_error=False) if silent or watched else []
        every = self._lease / 6
        for mirror in followed:
            mirror.note_at = mirror.note_at or now
        for mirror in watched:
            mirror.note_at = now + min(self._lease / 6, (mirror.unattended or self._lease) / 3)
            every = min(every, mirror.note_at - now)
        self._look_at = now + every
        for mirror, alive in zip(silent, replies, strict=False):
            if alive:
                mirror.missed_at = None
            elif mirror.missed_at is None:
                mirror.missed_at = now
            elif now - mirror.missed_at >= self._lease / 2:
                await self._declare_lost(mirror)

    async def _declare_lost(self, mirror: _Mirror) -> None:
        """Write the end of an answer whose producer is dead: Redis takes it from one only."""
        mirror.missed_at = None
        fields = {FIELD: _lost(mirror.log)}
        try:
            number = entry_id(len(mirror.log) + 1)
            written = await self._blocking.xadd(mirror.key, fields, id=number, nomkstream=True)
        except ResponseError:
            # Somebody was faster; or the producer is alive.
            return
        if written is None:
            mirror.log.fail(AnswerGone("Redis lost the answer, and its producer did not bring it back"))


def _by_stream(reply: Any) -> list[tuple[str, list[Any]]]:
    """Return the entries of each stream; RESP2 and RESP3 have different forms for it."""
    if isinstance(reply, dict):
        of_streams = cast("dict[bytes, list[list[Any]]]", reply)
        return [(key.decode(), [entry for part in parts for entry in part]) for key, parts in of_streams.items()]
    return [(key.decode(), entries) for key, entries in reply or ()]


def _opened(fragment: bytes) -> dict[str, Any]:
    opened: dict[str, Any] = json.loads(split(fragment)[1])
    return opened


def _lost(log: Log) -> bytes:
    response = merged(log.fragments)
    data = None if response is None else response.model_dump(mode="json", exclude_none=True)
    text = "" if data is None else data["message"].get("content", "") if "message" in data else data["response"]
    chunks = len(log) - 1
    end = {
        "outcome": "lost",
        "reason": None,
        "error": "the process that made the answer has died",
        "error_type": "AnswerLost",
        "text": text,
        "timing": {"first_chunk": None, "total": None, "chunks": chunks, "chunks_per_second": None},
        "response": data,
    }
    return kept_end(end, log.fragments)


def _ms(seconds: float | None) -> int:
    return max(1, int((seconds or 0) * 1000))
