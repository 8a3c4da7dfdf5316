"""Carries the answers of this process into Redis: one task, one connection, one pipeline at a time for all of them.

An answer's log is a stream whose entries have the numbers of their first events as ids. Redis takes no id that is not
above the last one. So an entry that is sent again after a lost connection is not there twice, of two producers only one
writes, and one that was taken for dead finds its place taken. Two things it does take: an entry that leaves a hole
before it, where Redis has lost the end of a log; and one that begins a log anew that it has forgotten. Against the
second one each append says that it must not; against the first one the log's last entry is looked at after each loss of
the connection, and its length from time to time.

Whatever the model sends is in a list first, and goes to Redis when that answers. A slow Redis makes entries larger, and
no model slower. What was sent once keeps its bounds: whoever has read a part of a log that was lost, reads on behind it
once it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import bisect_right
from copy import copy
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ResponseError

from ollama_async.registry._redis import end_tasks

from ._errors import AnswerInUse, RedisRefuses
from ._producer import UNATTENDED
from ._server import FIELD, LOST, PATIENCE, Connecting, entry_id, first_number, packed, refusal, run_packed

if TYPE_CHECKING:
    from ollama_async.registry import Name

    from ._producer import Producer
    from ._server import Keys, Server

__all__ = ["Writer"]

_log = logging.getLogger("ollama_async.durable")

# Seconds between two entries of an answer, but for its first events, its last one, and many bytes. What an entry costs
# is shared by its tokens: with many answers, fewer and larger ones leave the process to the models' streams.
_WINDOW = 0.04
_WINDOW_EACH = 0.0007
_LONGEST_WINDOW = 0.07
_MANY_BYTES = 4096
_MAX_ENTRY = 65536
_LONGEST_PAUSE = 3.0
# One call for all answers, which says only of which ones Redis did not take the entry: redis-py needs five times as
# long for as many commands and replies. All entries are one argument, each behind its first number and its length.
_EVAL = packed(b"EVAL")
_APPEND = packed(b"""
local refused, at = {}, 1
for place, key in ipairs(KEYS) do
    local _, head, number, size = string.find(ARGV[1], '^(%d+) (%d+) ', at)
    at = head + size + 1
    local id = redis.pcall('XADD', key, 'NOMKSTREAM', number .. '-0', 'e', string.sub(ARGV[1], head + 1, at - 1))
    if type(id) ~= 'string' then refused[#refused + 1] = place end
end
return refused
""")
_IN_USE = "an answer with this id exists already: use another id, or attach to it"


class State(IntEnum):
    """How far an answer has come."""

    UNCLAIMED = 0
    RUNNING = 1
    ENDING = 2
    LOGGED = 3
    SUPERSEDED = 4


# Separate names: Python 3.11 looks a member up in its enum by a call, and these are asked for each answer and entry.
_UNCLAIMED, _RUNNING, _ENDING, _LOGGED, _SUPERSEDED = State


class _Writing:
    """An answer on its way into Redis."""

    def __init__(self, producer: Producer, keys: Keys) -> None:
        self.producer = producer
        self.fragments = producer.log.fragments
        self.log, self.run, self.seen = (key(producer.name) for key in (keys.log, keys.run, keys.seen))
        self.log_key = packed(self.log.encode())
        self.index = keys.of(producer.name.owner)
        self.state = _UNCLAIMED
        loop = asyncio.get_running_loop()
        self.claimed: asyncio.Future[bool] = loop.create_future()
        self.kept: asyncio.Future[None] = loop.create_future()
        # The first numbers of the entries whose bounds are settled, the last number in them, and how many of them Redis
        # has. The first one is the event ``open`` alone.
        self.starts, self.bounded, self.held = [1], 1, 0
        # The producer's size when the last entry was cut.
        self.cut_at = 0
        # The size from which on its news are urgent; those of the first chunk are.
        self.urgent_at = 0
        self.renew_at = 0.0
        # Whether somebody in this process has begun or ceased to watch since it was last told.
        self.watched = False
        # Nothing is sent before, after Redis has refused.
        self.not_before = 0.0
        self.refused = 0

    def entry(self, place: int) -> tuple[int, bytes]:
        """Return the first number of an entry, and what is in it."""
        first = self.starts[place]
        last = self.starts[place + 1] - 1 if place + 1 < len(self.starts) else self.bounded
        return first, b"\n".join(self.fragments[first - 1 : last])

    def next_entry(self) -> bytes:
        """Return the next entry as the script takes it, if there is one; its bounds are settled from here on."""
        if self.held < len(self.starts):
            # One that was sent before.
            return _measured(*self.entry(self.held))
        first, last, size = self.bounded + 1, len(self.fragments), self.producer.size
        if first > last:
            return b""
        if size - self.cut_at > _MAX_ENTRY:
            last, length = first, len(self.fragments[first - 1])
            while last < len(self.fragments) and length < _MAX_ENTRY:
                length += len(self.fragments[last])
                last += 1
        self.starts.append(first)
        self.bounded, self.cut_at = last, size
        self.urgent_at = min(size + _MANY_BYTES, self.producer.limit)
        return _measured(first, b"\n".join(self.fragments[first - 1 : last]))

    def holds(self, tail: Any) -> bool:
        """Take over what Redis has as the last entry; return whether it is one of this answer."""
        fields: dict[bytes, bytes] = tail[1] or {}
        try:
            first = first_number(tail[0])
        except ValueError:
            return False
        place = bisect_right(self.starts, first) - 1
        if place < 0 or self.entry(place) != (first, fields.get(FIELD)):
            return False
        self.held = place + 1
        return True

    def stands_back(self, now: float) -> None:
        """Leave Redis in peace for a while: longer each time."""
        self.refused += 1
        self.not_before = now + min(_LONGEST_PAUSE, 0.05 * 2**self.refused)


class Writer:
    """What brings the answers of this process into Redis."""

    def __init__(self, server: Server, keys: Keys, lease: float) -> None:
        self._server = server
        self._keys = keys
        self._lease = lease
        self._connecting = Connecting()
        self._client = server.client(connections=1, silence=max(PATIENCE, lease / 3), connecting=self._connecting)
        self._backoff = ExponentialWithJitterBackoff(cap=min(_LONGEST_PAUSE, lease / 6), base=0.05)
        self._task: asyncio.Task[None] | None = None
        # The task looks at this as well, see end_tasks().
        self._closing = False
        self._wake = asyncio.Event()
        self._writings: dict[Name, _Writing] = {}
        self._claims: list[_Writing] = []
        # Those with news: for the next time, and at once.
        self._news: set[_Writing] = set()
        self._urgent: set[_Writing] = set()
        self._flush_at = 0.0
        # No lease has to be renewed before.
        self._renew_at = math.inf
        self._connected = False
        # Whether Redis lets us run a script, as far as is known.
        self._scripts = True
        # Not at the first attempt: those who begin wait for that one.
        self._away = False
        self._refuses: RedisRefuses | None = None

    # -- for producers --

    async def claim(self, producer: Producer) -> bool:
        """Take the name of an answer; return whether Redis was there to ask."""
        if producer.name in self._writings:
            raise AnswerInUse(_IN_USE)
        if self._refuses is not None:
            raise copy(self._refuses)
        writing = self._writings[producer.name] = _Writing(producer, self._keys)
        if producer.unattended is not None:
            producer.log.on_attended = lambda: self._attended(writing)
        producer.on_news = partial(self._ring, writing)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="ollama_async answers, writer")
        if self._away:
            return False
        self._claims.append(writing)
        self._wake.set()
        await asyncio.wait({writing.claimed}, timeout=PATIENCE)
        return writing.claimed.result() if writing.claimed.done() else False

    def _ring(self, writing: _Writing) -> None:
        """Take note of news."""
        producer, state = writing.producer, writing.state
        if state >= _LOGGED:
            return
        ended = producer.log.ended
        if ended and state is _RUNNING:
            writing.state = _ENDING
        if ended or producer.size >= writing.urgent_at:
            producer.ring_at = producer.limit
            self._urgent.add(writing)
            self._wake.set()
        else:
            producer.ring_at = writing.urgent_at
            if not self._news:
                self._wake.set()
            self._news.add(writing)

    def _attended(self, writing: _Writing) -> None:
        writing.watched = True
        writing.renew_at = self._renew_at = 0.0
        self._wake.set()

    def producer(self, name: Name) -> Producer | None:
        """Return the producer of a name, while its answer is not all in Redis."""
        writing = self._writings.get(name)
        return None if writing is None else writing.producer

    def producers(self, owner: str) -> list[Producer]:
        """Return the producers of an owner's answers."""
        return [writing.producer for name, writing in self._writings.items() if name.owner == owner]

    async def drain(self) -> None:
        """Wait until Redis has all answers that have ended."""
        ended = [writing.kept for writing in self._writings.values() if writing.producer.log.ended]
        if ended:
            await asyncio.wait(ended)

    async def aclose(self) -> None:
        """End the task and its connection."""
        task, self._task = self._task, None
        self._closing = True
        self._wake.set()
        await end_tasks(set() if task is None else {task}, self._client.connection_pool)

    # -- the task --

    async def _run(self) -> None:
        failures = 0
        while not self._closing:
            try:
                await self._serve()
            except Exception as exc:
                if self._closing:
                    return
                # Whatever it is: a writer that had given up would leave logs without their ends.
                failures = 1 if self._connected else failures + 1
                self._lost(exc)
            await asyncio.sleep(self._backoff.compute(failures))

    def _lost(self, error: BaseException) -> None:
        self._refuses = refusal(error)
        if not self._away:
            why = self._refuses or type(error).__name__
            _log.warning("Redis is away (%s): answers are kept in this process until it is back", why)
        if self._refuses is None and not isinstance(error, LOST):
            _log.error("the writer of answers failed", exc_info=error)
        self._connected, self._away = False, True
        self._server.note_lost()
        claims, self._claims = self._claims, []
        for writing in claims:
            if self._refuses is None:
                self._settle_claim(writing, False)
            else:
                self._refuse_claim(writing, self._refuses)

    async def _serve(self) -> None:
        """Be connected, until that ends by an error, or by closing."""
        await self._connecting.connect(self._server, self._client)
        self._refuses, self._scripts = None, True
        await self._repair([writing for writing in self._writings.values() if writing not in self._claims])
        if self._away:
            _log.info("Redis is back")
        self._connected, self._away = True, False
        while not self._closing:
            self._wake.clear()
            # First what others would take for death.
            await self._renew()
            await self._take_claims()
            await self._flush()
            await self._pause()

    async def _pause(self) -> None:
        """Wait for news, or for the next thing that is due."""
        loop = asyncio.get_running_loop()
        due = [writing.not_before for writing in self._urgent]
        if self._news:
            due.append(self._flush_at)
        if self._renew_at < math.inf:
            due.append(self._renew_at)
        timer = loop.call_at(min(due), self._wake.set) if due else None
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    # -- to begin --

    async def _take_claims(self) -> None:
        claims = list(self._claims)
        if not claims:
            return
        # Together, so that there is no log without an end to its life.
        pipeline = self._client.pipeline(transaction=True)
        for writing in claims:
            self._open(pipeline, writing)
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except ResponseError as exc:
            replies = [exc] * (2 * len(claims))
        refused = dict[_Writing, Exception]()
        for writing, reply in zip(claims, replies[::2], strict=True):
            if isinstance(reply, Exception) and (refusal(reply) is not None or not await self._is_mine(writing)):
                refused[writing] = refusal(reply) or AnswerInUse(_IN_USE)
        refused |= await self._claimed([writing for writing in claims if writing not in refused])
        # Only now: if the connection is lost before, they are told so.
        self._claims = [writing for writing in self._claims if writing not in claims]
        for writing in claims:
            if writing in refused:
                self._refuse_claim(writing, refused[writing])
            else:
                self._settle_claim(writing, True)

    def _open(self, pipeline: Any, writing: _Writing) -> None:
        first, data = writing.entry(0)
        pipeline.xadd(writing.log, {FIELD: data}, id=entry_id(first))
        pipeline.pexpire(writing.log, _ms(writing.producer.keep))

    async def _is_mine(self, writing: _Writing) -> bool:
        try:
            found = await self._client.xrange(writing.log, min=entry_id(1), max=entry_id(1))
        except ResponseError:
            return False
        return bool(found) and found[0][1].get(FIELD) == writing.entry(0)[1]

    async def _claimed(self, writings: list[_Writing]) -> dict[_Writing, RedisRefuses]:
        """Go on with answers whose logs have begun; return those of which Redis refuses what they need besides."""
        refused = await self._sign(writings)
        if refused:
            pipeline = self._client.pipeline(transaction=False)
            pipeline.delete(*(writing.log for writing in refused))
            await pipeline.execute(raise_on_error=False)
        for writing in writings:
            if writing not in refused:
                writing.held = 1
                writing.state = _ENDING if writing.producer.log.ended else _RUNNING
                self._urgent.add(writing)
        return refused

    def _settle_claim(self, writing: _Writing, known: bool) -> None:
        if not writing.claimed.done():
            writing.claimed.set_result(known)

    def _refuse_claim(self, writing: _Writing, error: Exception) -> None:
        if writing.claimed.done():
            # It has begun already, without being asked.
            if isinstance(error, AnswerInUse):
                self._supersede(writing)
            else:
                writing.stands_back(asyncio.get_running_loop().time())
                self._urgent.add(writing)
            return
        self._drop(writing, _SUPERSEDED)
        writing.claimed.set_exception(error)

    # -- to go on --

    async def _flush(self) -> None:
        taken = self._take_news(asyncio.get_running_loop().time())
        due = [each for each in taken if each.state is not _UNCLAIMED]
        for writing in [each for each in taken if each.state is _UNCLAIMED]:
            await self._rebuild(writing)
        entries = {writing: entry for writing in due if (entry := writing.next_entry())}
        replies = await self._append(entries) if entries else {}
        for writing in entries:
            reply = replies.get(writing, b"")
            if isinstance(reply, Exception):
                await self._refused(writing, reply)
            elif reply is None:
                await self._rebuild(writing)
            else:
                writing.held += 1
                writing.refused = 0
                if writing.held < len(writing.starts):
                    self._urgent.add(writing)
                elif writing.bounded < len(writing.fragments):
                    self._ring(writing)
        await self._finish([each for each in due if each.state is _ENDING])

    def _take_news(self, now: float) -> list[_Writing]:
        """Take those whose events shall go to Redis now; their producers ring again for what comes next."""
        found, self._urgent = self._urgent, set()
        if self._news and now >= self._flush_at:
            found, self._news = found | self._news if found else self._news, set()
            self._flush_at = now + min(_LONGEST_WINDOW, max(_WINDOW, len(found) * _WINDOW_EACH))
        due = list[_Writing]()
        for writing in found:
            if writing.not_before > now:
                self._urgent.add(writing)
            else:
                writing.producer.ring_at = 0
                due.append(writing)
        return due

    async def _append(self, entries: dict[_Writing, bytes]) -> dict[_Writing, Any]:
        """Append entries; return what Redis says of those that the script could not append."""
        missing = writings = list(entries)
        if self._scripts:
            keys, parts = [writing.log_key for writing in writings], packed(b"".join(entries.values()))
            try:
                places: list[int] = await run_packed(
                    self._client, [_EVAL, _APPEND, packed(b"%d" % len(keys)), *keys, parts]
                )
                missing = [writings[place - 1] for place in places]
            except ResponseError:
                # It need not be allowed.
                self._scripts = False
        if not missing:
            return {}
        # A script does not tell of each error what it is.
        pipeline = self._client.pipeline(transaction=False)
        for writing in missing:
            first, data = writing.entry(writing.held)
            pipeline.xadd(writing.log, {FIELD: data}, id=entry_id(first), nomkstream=True)
        return dict(zip(missing, await pipeline.execute(raise_on_error=False), strict=True))

    async def _refused(self, writing: _Writing, error: Exception) -> None:
        if refusal(error) is None:
            before = writing.held
            await self._reconcile([writing])
            if writing.state >= _LOGGED or writing.held != before:
                return
        elif not writing.refused:
            _log.warning("answer %s: %s", writing.producer.name.id, refusal(error))
        writing.stands_back(asyncio.get_running_loop().time())
        self._urgent.add(writing)

    async def _finish(self, ending: list[_Writing]) -> None:
        done = [each for each in ending if each.held == len(each.starts) and each.bounded == len(each.fragments)]
        if not done:
            return
        pipeline = self._client.pipeline(transaction=False)
        for writing in done:
            pipeline.pexpire(writing.log, _ms(writing.producer.keep))
            self._list(pipeline, writing)
            pipeline.delete(writing.run)
        await pipeline.execute(raise_on_error=False)
        for writing in done:
            self._drop(writing, _LOGGED)

    # -- to be alive --

    async def _sign(self, writings: list[_Writing]) -> dict[_Writing, RedisRefuses]:
        """Have it known that there is a producer; return of which answers Redis refuses that."""
        pipeline = self._client.pipeline(transaction=False)
        # Whose command it is.
        whose: list[_Writing] = []
        for writing in writings:
            producer = writing.producer
            pipeline.set(writing.run, producer.nonce, px=_ms(self._lease))
            self._list(pipeline, writing)
            pipeline.zremrangebyscore(writing.index, "-inf", time.time() - producer.keep - 2 * self._lease - 60)
            if producer.unattended is not None:
                # Absence counts from when Redis was there to take note of presence.
                pipeline.set(writing.seen, "1", px=_ms(producer.unattended), nx=True)
            whose += [writing] * (len(pipeline) - len(whose))
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        now = asyncio.get_running_loop().time()
        for writing in writings:
            writing.renew_at = now + self._interval(writing.producer)
            self._renew_at = min(self._renew_at, writing.renew_at)
        errors = [(writing, refusal(reply)) for writing, reply in zip(whose, replies, strict=True) if _is_error(reply)]
        return {writing: error for writing, error in errors if error is not None}

    def _interval(self, producer: Producer) -> float:
        return min(self._lease, producer.unattended or self._lease) / 3

    def _list(self, pipeline: Any, writing: _Writing) -> None:
        pipeline.zadd(writing.index, {writing.producer.name.id: time.time()})
        pipeline.pexpire(writing.index, _ms(writing.producer.keep + self._lease))

    async def _renew(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._renew_at:
            return
        alive = [each for each in self._writings.values() if each.state > _UNCLAIMED]
        due = [each for each in alive if each.renew_at <= now]
        # Noted before anything is waited for, in which others may come.
        self._renew_at = min((each.renew_at for each in alive if each.renew_at > now), default=math.inf)
        if not due:
            return
        pipeline = self._client.pipeline(transaction=False)
        for writing in due:
            producer = writing.producer
            pipeline.xlen(writing.log)
            pipeline.pexpire(writing.log, _ms(producer.keep))
            pipeline.set(writing.run, producer.nonce, px=_ms(self._lease))
            self._list(pipeline, writing)
            if producer.unattended is not None and (producer.log.viewers or writing.watched):
                writing.watched = False
                pipeline.set(writing.seen, "1", px=_ms(producer.unattended))
            else:
                pipeline.exists(writing.seen)
        replies = await pipeline.execute(raise_on_error=False)
        for place, writing in enumerate(due):
            length, *_, seen = replies[6 * place : 6 * place + 6]
            writing.renew_at = now + self._interval(writing.producer)
            self._renew_at = min(self._renew_at, writing.renew_at)
            if length == 0:
                await self._rebuild(writing)
            elif length != writing.held:
                await self._reconcile([writing])
            elif seen == 0 and writing.producer.unattended is not None:
                await self._unattended(writing)

    async def _unattended(self, writing: _Writing) -> None:
        producer = writing.producer
        if producer.log.viewers or writing.watched or producer.log.ended:
            return
        # One of both finds the other: whoever comes sets it, too, and sees what was there.
        if await self._client.set(writing.seen, "ended", px=_ms(producer.keep), nx=True):
            producer.abort(UNATTENDED)

    # -- after a loss --

    async def _repair(self, writings: list[_Writing]) -> None:
        claimed = [writing for writing in writings if writing.state is not _UNCLAIMED]
        # Those first whose leases run.
        await self._reconcile(claimed)
        alive = [writing for writing in claimed if writing.state < _LOGGED]
        await self._sign(alive)
        self._urgent.update(alive)
        for writing in writings:
            if writing.state is _UNCLAIMED:
                await self._rebuild(writing)

    async def _reconcile(self, writings: list[_Writing]) -> None:
        """Find out what Redis has of answers."""
        pipeline = self._client.pipeline(transaction=False)
        for writing in writings:
            pipeline.xrevrange(writing.log, count=1)
            pipeline.xlen(writing.log)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        for writing, tail, length in zip(writings, replies[::2], replies[1::2], strict=True):
            await self._continue(writing, tail, length)

    async def _continue(self, writing: _Writing, tail: Any, length: Any) -> None:
        """Go on with an answer behind what Redis has of it."""
        if isinstance(tail, Exception):
            # It is the key of something else, unless it is kept from us.
            if refusal(tail) is None:
                self._supersede(writing)
        elif not tail:
            await self._rebuild(writing)
        elif not writing.holds(tail[0]):
            self._supersede(writing)
        elif length != writing.held:
            # Redis has lost a part of it, and nobody noticed before it went on behind that.
            await self._client.delete(writing.log)
            await self._rebuild(writing)
        else:
            self._urgent.add(writing)

    async def _rebuild(self, writing: _Writing) -> None:
        """Begin the log of an answer, of which Redis has nothing."""
        pipeline = self._client.pipeline(transaction=True)
        self._open(pipeline, writing)
        try:
            reply = (await pipeline.execute(raise_on_error=False))[0]
        except ResponseError as exc:
            reply = exc
        if isinstance(reply, Exception):
            if refusal(reply) is not None:
                writing.stands_back(asyncio.get_running_loop().time())
                self._urgent.add(writing)
                return
            if not await self._is_mine(writing):
                self._supersede(writing)
                return
        if await self._claimed([writing]):
            writing.stands_back(asyncio.get_running_loop().time())
            self._urgent.add(writing)

    def _supersede(self, writing: _Writing) -> None:
        _log.warning("answer %s: another log has its place; it is ended", writing.producer.name.id)
        self._drop(writing, _SUPERSEDED)
        writing.producer.supersede()

    def _drop(self, writing: _Writing, state: State) -> None:
        writing.state = state
        if self._writings.get(writing.producer.name) is writing:
            del self._writings[writing.producer.name]
        self._urgent.discard(writing)
        self._news.discard(writing)
        if not writing.kept.done():
            writing.kept.set_result(None)


def _measured(first: int, data: bytes) -> bytes:
    return b"%d %d %b" % (first, len(data), data)


def _is_error(reply: Any) -> bool:
    return isinstance(reply, Exception)


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
