"""The registry's link to Redis, for Stops that land in another process than their stream.

A Stop is a key with a TTL, set first, and a message to the stream's channel, published afterwards. A stream subscribes
first and looks at the key afterwards. One of both sees the other, whatever comes in between. The same again after each
loss of the connection: channels are subscribed anew, then all their keys are looked at, and what was stopped here is
set and published once more, since a Redis that was restarted may have forgotten it.

A Stop that no stream has heard waits for one that may never come, and anybody who may press Stop can make as many as
he likes. So these are counted, for each owner and in all, and beyond a limit Redis drops the oldest. A Stop that was
heard is not counted: there are no more of these than streams.

Only one task talks to Redis: a caller that is cancelled in the middle of a command would take the connection with it
that all the others share. So whatever callers want is noted, and the task does it for all of them together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, unquote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ollama_async._errors import RequestError

from ._errors import RegistryUnavailable
from ._local import Book, Name, Stop, checked_reason

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Link", "end_tasks"]

_log = logging.getLogger("ollama_async.registry")

# How long a caller waits for Redis; a stream begins without it, and a Stop is kept for it.
_PATIENCE = 2.0
# How long Redis may be silent: then it is asked for a sign of life, and has as long again for it.
_SILENCE = 10.0
_CONNECT = 5.0
_LONGEST_PAUSE = 3.0
# How long a task may take to end before its connections are taken from it.
_LOST_CANCELLATION = 0.2
# Channels or keys in one command.
_AT_ONCE = 500
# Stops in one call of the script below, during which Redis does nothing else.
_STOPS_AT_ONCE = 100
# How many Stops that no stream has heard Redis keeps: of one owner, and of all.
_MAX_UNHEARD = 1_000
_MAX_UNHEARD_OF_ALL = 10_000

# In one piece, so that no two processes count beside each other, and none that dies in between leaves a key uncounted.
# Sorted sets have the names of the unheard Stops, the owner's and everybody's, each under the time at which it ends.
_SEND_STOPS = """
local prefix, most, most_of_all = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local everybody = prefix .. ':unheard'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function owners(name)
    return everybody .. ':' .. string.match(name, '^[^:]*')
end

local function keep(index, limit, name, left)
    redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
    redis.call('ZADD', index, now + left, name)
    if redis.call('PTTL', index) < left then redis.call('PEXPIRE', index, left) end
    local excess = redis.call('ZCARD', index) - limit
    if excess > 0 then
        local oldest = redis.call('ZPOPMIN', index, excess)
        for place = 1, #oldest, 2 do
            redis.call('DEL', prefix .. ':stop:' .. oldest[place])
            redis.call('ZREM', everybody, oldest[place])
            redis.call('ZREM', owners(oldest[place]), oldest[place])
        end
    end
end

local reached = {}
for place, key in ipairs(KEYS) do
    local data, left = ARGV[2 * place + 2], tonumber(ARGV[2 * place + 3])
    local name = string.sub(key, #prefix + 7)
    redis.call('SET', key, data, 'PX', left)
    reached[place] = redis.call('PUBLISH', key, data)
    if reached[place] == 0 then
        keep(owners(name), most, name, left)
        keep(everybody, most_of_all, name, left)
    elseif redis.call('ZREM', owners(name), name) == 1 then
        redis.call('ZREM', everybody, name)
    end
end
return reached
"""

# What the connection can end with, beside what Redis itself says.
_LOST = (RedisError, OSError, asyncio.TimeoutError)


class Link:
    """What a registry has in Redis."""

    def __init__(self, url: str, book: Book, namespace: str) -> None:
        self._book = book
        self._prefix = quote(namespace, safe="")
        # Two connections at most, used by the one task: that of the channels, and one for commands.
        untyped: Any = Redis
        self._redis: Any = untyped.from_url(
            url,
            socket_connect_timeout=_CONNECT,
            socket_timeout=_CONNECT,
            retry=Retry(NoBackoff(), 0),  # connecting again is the task's
            decode_responses=False,
        )
        connection = self._redis.connection_pool.connection_kwargs
        self._secrets = [str(value)[:8] for name, value in connection.items() if "password" in name and value]
        # Nothing is connected; what the url has of unknown options comes to light.
        self._redis.connection_pool.make_connection()
        self._backoff = ExponentialWithJitterBackoff(cap=_LONGEST_PAUSE, base=0.05)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        # The task looks at this as well, see end_tasks().
        self._closing = False
        self._wake = asyncio.Event()
        # Not known before the first attempt: callers wait for that one.
        self.connected: bool | None = None
        self._known = asyncio.Event()
        # Names that were registered or taken back since the task last looked.
        self._changed: set[Name] = set()
        # Names that the present connection was told to subscribe.
        self._asked: set[Name] = set()
        # Names whose keys are to be looked at.
        self._unread: set[Name] = set()
        # Stops that are to be given to Redis: themselves, for the book may have to drop one before it is sent.
        self._unsent: dict[Name, Stop] = {}
        self._entering: dict[Name, set[asyncio.Future[bool]]] = {}
        self._stopping: dict[Name, set[asyncio.Future[int | None]]] = {}

    # -- for the registry --

    async def connect(self) -> None:
        """Begin, and wait until it is known whether Redis can be reached."""
        self._start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._known.wait()

    async def added(self, name: Name) -> None:
        """Have a name subscribed, and wait until it is known whether it has been stopped, if Redis can be reached."""
        self._start()
        self._note(name)
        await self._wait(self._entering, name)

    def removed(self, name: Name) -> None:
        """Have a name unsubscribed, unless it is still in use."""
        self._note(name)

    async def send(self, name: Name) -> int | None:
        """Give the Stop of a name to Redis.

        Returns:
            How many processes have such a stream; ``None`` if Redis is away.
        """
        self._start()
        stop = self._book.stop(name)
        if stop is not None and not self._away:
            self._unsent[name] = stop
            self._wake.set()
        reached: int | None = await self._wait(self._stopping, name)
        return reached

    async def names(self) -> list[Name]:
        """Return the names that are registered in all processes: those of the channels that somebody has subscribed."""
        try:
            channels = await self._redis.pubsub_channels(f"{self._prefix}:stop:*")
        except _LOST as exc:
            error = RegistryUnavailable(f"Redis does not answer: {self._shown(exc)}")
        else:
            names = [self._name(channel) for channel in channels]
            return [name for name in names if name is not None]
        # Out here, so that it does not bring along what it was made of.
        raise error

    async def aclose(self) -> None:
        """End the task and the connections."""
        self._closing = True
        task, self._task = self._task, None
        if task is None:
            await self._redis.aclose()
        else:
            await end_tasks({task}, self._redis.connection_pool)

    @property
    def _away(self) -> bool:
        return self.connected is False

    def _now(self, *, connected: bool) -> None:
        self.connected = connected
        self._known.set()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._loop = loop
            self._task = loop.create_task(self._run(), name="ollama_async registry")
        elif self._loop is not loop:
            raise RequestError("the registry belongs to another event loop: make one for each loop")

    def _note(self, name: Name) -> None:
        # While Redis is away nothing is collected: the book has it all, and it is looked at when Redis is back.
        if not self._away:
            self._changed.add(name)
            self._wake.set()

    async def _wait(self, waiting: dict[Name, set[asyncio.Future[Any]]], name: Name) -> Any:
        if self._away:
            return None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting.setdefault(name, set()).add(future)
        try:
            # Not wait_for(): what comes with a cancellation at the same time would be lost there.
            await asyncio.wait({future}, timeout=_PATIENCE)
            return future.result() if future.done() else None
        finally:
            futures = waiting.get(name)
            if futures is not None:
                futures.discard(future)
                if not futures:
                    del waiting[name]

    # -- the task --

    async def _run(self) -> None:
        failures = 0
        try:
            while not self._closing:
                try:
                    await self._serve()
                except Exception as exc:
                    # Whatever it is: a registry that had given up would lose Stops without a word.
                    failures = 1 if self.connected else failures + 1
                    self._lost(exc)
                await asyncio.sleep(self._backoff.compute(failures))
        finally:
            self._now(connected=False)
            self._give_up_waiting()
            await self._redis.aclose()

    def _lost(self, error: BaseException) -> None:
        if not self._away:
            _log.warning(
                "Redis is away (%s): until it is back, a Stop works for streams of its own process", self._shown(error)
            )
        self._now(connected=False)
        self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        for name in list(self._entering):
            self._resolve(self._entering, name, False)
        for name in list(self._stopping):
            self._resolve(self._stopping, name, None)

    async def _serve(self) -> NoReturn:
        """Be connected, until that ends by an error."""
        channels = _Channels(self._redis.connection_pool)
        reader: asyncio.Task[NoReturn] | None = None
        try:
            # Its own channel, so that there is always one: without any, the connection takes other commands.
            await channels.open(f"{self._prefix}:link")
            reader = asyncio.create_task(self._read(channels))
            self._start_over()
            while True:
                self._wake.clear()
                await self._subscribe(channels)
                await self._look()
                await self._send_stops()
                await self._until_woken(reader)
        finally:
            # This ends the reader even if its cancellation is lost.
            await channels.disconnect()
            if reader is not None:
                reader.cancel()
                # Not awaited itself: a cancellation of this task, at this moment, could not be told from the reader's.
                await asyncio.wait({reader})
                if not reader.cancelled():
                    reader.exception()
            await channels.give_back()

    def _start_over(self) -> None:
        """Take up a new connection, which knows of nothing."""
        if self._away:
            _log.info("Redis is back")
        self._asked.clear()
        self._unread.clear()
        self._changed = set(self._book.names())
        self._unsent = self._book.stops() | self._unsent
        self._now(connected=True)

    async def _until_woken(self, reader: asyncio.Task[NoReturn]) -> None:
        woken = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({woken, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        if reader.done():
            reader.result()

    async def _read(self, channels: _Channels) -> NoReturn:
        silent = False
        while True:
            message = await channels.read(_SILENCE)
            if message is None:
                if silent:
                    raise TimeoutError(f"Redis was silent for {2 * _SILENCE:g} s")
                silent = True
                await channels.send("PING")
                continue
            silent = False
            kind, channel, *rest = message
            name = self._name(channel)
            if name is not None and kind == b"message":
                self._book.abort(name, _reason(*rest))
            elif name is not None and kind == b"subscribe":
                # Only now: a Stop that came before the subscription is in the key.
                self._unread.add(name)
                self._wake.set()

    async def _subscribe(self, channels: _Channels) -> None:
        changed, self._changed = self._changed, set()
        wanted = {name for name in changed if name in self._book}
        # Registered anew before it was unsubscribed: a message may have come while nobody was there for it.
        self._unread |= wanted & self._asked
        new, gone = wanted - self._asked, (changed - wanted) & self._asked
        self._asked = (self._asked | new) - gone
        for names in _portions(gone):
            await channels.send("UNSUBSCRIBE", *map(self._channel, names))
        for names in _portions(new):
            await channels.send("SUBSCRIBE", *map(self._channel, names))

    async def _look(self) -> None:
        unread, self._unread = self._unread, set()
        for names in _portions(name for name in unread if name in self._book):
            # The key of a Stop has the name of its channel.
            for name, found in zip(names, await self._redis.mget(map(self._channel, names)), strict=True):
                if found is not None:
                    self._book.abort(name, _reason(found))
                self._resolve(self._entering, name, True)

    async def _send_stops(self) -> None:
        unsent = self._unsent.copy()
        for names in _portions(unsent, _STOPS_AT_ONCE):
            arguments: list[Any] = [self._prefix, _MAX_UNHEARD, _MAX_UNHEARD_OF_ALL]
            for name in names:
                left = math.ceil((unsent[name].until - time.monotonic()) * 1000)
                arguments += [_message(unsent[name].reason), max(left, 1)]
            answers = await self._redis.eval(_SEND_STOPS, len(names), *map(self._channel, names), *arguments)
            for name, reached in zip(names, answers, strict=True):
                # Only now, for the connection may be lost meanwhile; and not one that was given meanwhile.
                if self._unsent.get(name) is unsent[name]:
                    del self._unsent[name]
                self._resolve(self._stopping, name, reached)

    @staticmethod
    def _resolve(waiting: dict[Name, set[asyncio.Future[Any]]], name: Name, result: Any) -> None:
        for future in waiting.pop(name, ()):
            if not future.done():
                future.set_result(result)

    def _shown(self, error: BaseException) -> str:
        """Return what an error says, without secrets: a server that does not know AUTH shows its arguments."""
        text = str(error).partition(", with args")[0] or type(error).__name__
        return type(error).__name__ if any(secret in text for secret in self._secrets) else text

    # -- names --

    def _channel(self, name: Name) -> str:
        # Escaped, so that no id can be read as another one, as another namespace, or as a pattern.
        return f"{self._prefix}:stop:{quote(name.owner, safe='')}:{quote(name.id, safe='')}"

    def _name(self, channel: Any) -> Name | None:
        with suppress(ValueError, AttributeError):
            prefix, kind, owner, stream_id = channel.decode("ascii").split(":")
            if (prefix, kind) == (self._prefix, "stop"):
                return Name(unquote(owner, errors="strict"), unquote(stream_id, errors="strict"))
        return None


class _Channels:
    """The connection over which channels are listened to, from one task, and subscribed, from another.

    Not redis-py's ``PubSub``: after a loss that one connects anew by itself, and subscribes all again, in each of its
    methods. Of two that do so at the same moment one leaves a socket behind that nobody closes.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._connection: Any = None

    async def open(self, channel: str) -> None:
        """Connect, and subscribe a first channel."""
        self._connection = await self._pool.get_connection()
        await self.send("SUBSCRIBE", channel)

    async def send(self, *command: str) -> None:
        """Send a command; its answer is read as a message."""
        if not self._connection.is_connected:
            # It would connect anew.
            raise RedisConnectionError("the connection to Redis was lost")
        await self._connection.send_command(*command, check_health=False)

    async def read(self, timeout: float) -> list[Any] | None:
        """Return the next message: its kind, the channel, its data; ``None`` if none comes in time."""
        reply: Any = await self._connection.read_response(timeout=timeout, disconnect_on_error=False, push_request=True)
        # The answer to a PING has a different form in RESP3.
        message: list[Any] | None = reply if type(reply) in (list, type(None)) else [b"pong", b""]
        return message

    async def disconnect(self) -> None:
        """Close the connection; reading and sending fail from now on."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def give_back(self) -> None:
        """Let the pool have the connection, for whoever needs one."""
        if self._connection is not None:
            await self._pool.release(self._connection)


async def end_tasks(tasks: set[asyncio.Task[Any]], *pools: Any) -> None:
    """Cancel tasks that talk to Redis, see them end, and close what they talked over.

    A cancellation can be lost: redis-py sends each command within ``asyncio.wait_for()``, and up to Python 3.11 that
    returns as if nothing had happened if the command has just been sent. A task of ours is cancelled once only. So its
    owner tells it by a state that it looks at before each wait, and the end of its connection wakes it.
    """
    for task in tasks:
        task.cancel()
    try:
        if tasks:
            _, lost = await asyncio.wait(tasks, timeout=_LOST_CANCELLATION)
            if lost:
                await asyncio.gather(*(pool.disconnect() for pool in pools))
                await asyncio.wait(lost)
    finally:
        for pool in pools:
            await pool.disconnect()


def _portions(names: Iterable[Name], size: int = _AT_ONCE) -> Iterable[list[Name]]:
    every = list(names)
    return (every[start : start + size] for start in range(0, len(every), size))


def _message(reason: str | None) -> bytes:
    # A letter takes up to 12 bytes where it is escaped. Halves of characters are read back by json.loads().
    return json.dumps({"reason": reason}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _reason(data: bytes) -> str | None:
    # Others can write to Redis, too.
    try:
        return checked_reason(json.loads(data)["reason"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
