"""The Redis that carries answers: its clients, the names of its keys, and whether it can be used."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from zlib import crc32

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)

from ._errors import RedisFull, RedisRefuses, RedisTooOld

if TYPE_CHECKING:
    from ollama_async.registry import Name

__all__ = [
    "FIELD",
    "LOST",
    "PATIENCE",
    "Connecting",
    "Keys",
    "Server",
    "entry_id",
    "first_number",
    "packed",
    "refusal",
    "run_packed",
]

LOST = (RedisError, OSError, asyncio.TimeoutError)
"""What the connection can end with, beside what Redis itself says."""
PATIENCE = 2.0
"""How many seconds a caller waits for Redis."""
FIELD = b"e"
"""The one field of an entry: its events, a line each."""
_CONNECT = 5.0
# XADD NOMKSTREAM, exclusive ranges, SET with GET.
_OLDEST = (6, 2)


class Keys:
    """The names of keys. Those of an answer have one hash tag; one that nobody can write into it from outside."""

    def __init__(self, namespace: str, shards: int = 1) -> None:
        self._namespace = quote(namespace, safe="")
        self._shards = shards

    def _of(self, kind: str, name: Name) -> str:
        owner, answer = quote(name.owner, safe=""), quote(name.id, safe="")
        return f"{self._tag(crc32(f'{owner}:{answer}'.encode()) % self._shards)}:{kind}:{owner}:{answer}"

    def _tag(self, shard: int) -> str:
        return f"{{{self._namespace}}}" if self._shards == 1 else f"{{{self._namespace}:{shard}}}"

    def log(self, name: Name) -> str:
        """A stream: the events."""
        return self._of("log", name)

    def run(self, name: Name) -> str:
        """The lease of the producer."""
        return self._of("run", name)

    def seen(self, name: Name) -> str:
        """Whether somebody watches."""
        return self._of("seen", name)

    def wake(self, process: str, shard: int = 0) -> str:
        """A stream: wakes the reader of a process."""
        return f"{self._tag(shard)}:wake:{process}"

    def of(self, owner: str) -> str:
        """A sorted set: the ids of an owner's answers, by when they were last heard of."""
        return f"{{{self._namespace}}}:of:{quote(owner, safe='')}"


def entry_id(first: int) -> str:
    """Return the id of the entry whose first event has this number."""
    return f"{first}-0"


def first_number(given: Any) -> int:
    """Return the number of an entry's first event.

    Raises:
        ValueError: It is not the id of an entry of ours.
    """
    number, _, sequence = given.decode("ascii").partition("-")
    if sequence != "0":
        raise ValueError("the id of an entry of somebody else")
    return int(number)


class Connecting:
    """Decides when a client may connect.

    By itself redis-py connects anew, in silence, before a command whose connection it finds closed. But behind a new
    connection there may be a Redis that has forgotten what the command is built on.
    """

    def __init__(self) -> None:
        self._allowed = False

    async def on_connect(self, connection: Any) -> None:
        """Greet Redis over a new connection, or refuse to have one (redis-py calls this)."""
        if not self._allowed:
            raise RedisConnectionError("the connection to Redis was lost")
        await connection.on_connect()

    async def connect(self, server: Server, client: Any) -> None:
        """Connect, and see whether Redis can be used.

        Raises:
            RedisTooOld: It is too old.
        """
        self._allowed = True
        try:
            await server.check(client)
        finally:
            self._allowed = False


class Server:
    """A Redis under a url.

    Attributes:
        lost_at: When a connection of this process was last lost, by the loop's clock.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.lost_at = float("-inf")

    def client(self, *, connections: int, silence: float, connecting: Connecting | None = None) -> Any:
        """Make a client.

        Args:
            connections: How many connections it has at most; a command waits until one is free.
            silence: How many seconds a command may go without an answer.
            connecting: Decides when it may connect; ``None`` for whenever it wants.
        """
        untyped: Any = BlockingConnectionPool
        pool = untyped.from_url(
            self._url,
            max_connections=connections,
            timeout=PATIENCE,
            socket_connect_timeout=min(_CONNECT, silence),
            socket_timeout=silence,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),  # connecting again is for those who know what was lost
            decode_responses=False,
            **({} if connecting is None else {"redis_connect_func": connecting.on_connect}),
        )
        return Redis(connection_pool=pool)

    def note_lost(self) -> None:
        """Take note that a connection was lost."""
        self.lost_at = asyncio.get_running_loop().time()

    async def check(self, client: Any) -> None:
        """See whether it is new enough.

        Raises:
            RedisTooOld: It is not.
        """
        try:
            version: str = (await client.info("server"))["redis_version"]
        except NoPermissionError:
            # Nobody has to allow INFO.
            return
        with suppress(ValueError):
            if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
                raise RedisTooOld(f"Redis {version} is too old for durable answers: use 6.2 or newer, or Valkey")


def packed(argument: bytes) -> bytes:
    """Return an argument as it goes over the wire."""
    return b"$%d\r\n%b\r\n" % (len(argument), argument)


async def run_packed(client: Any, arguments: list[bytes]) -> Any:
    """Run a command whose arguments are packed already, and return what Redis replies.

    redis-py packs them anew for each command, by a loop that takes as long for each as a token of an answer takes.

    Raises:
        RedisError: As the command does by redis-py's own methods.

    Cancellation: as that of those; redis-py closes a connection whose reply has not come.
    """
    pool = client.connection_pool
    connection = await pool.get_connection()
    try:
        await connection.send_packed_command(b"*%d\r\n%b" % (len(arguments), b"".join(arguments)))
        return await connection.read_response()
    finally:
        await pool.release(connection)


def refusal(error: BaseException) -> RedisRefuses | None:
    """Return what to raise if Redis answers, and would answer the same again; else ``None``."""
    if isinstance(error, RedisRefuses):
        return error
    if isinstance(error, OutOfMemoryError):
        return RedisFull("Redis has reached its maxmemory: raise it, keep answers for less time (keep=), or keep fewer")
    if isinstance(error, NoPermissionError):
        return RedisRefuses(f"Redis does not give its user the rights that durable answers need: {error}")
    if isinstance(error, ReadOnlyError):
        return RedisRefuses("Redis is a replica that takes no writes: give the url of the primary")
    if isinstance(error, AuthenticationError):
        return RedisRefuses("Redis does not accept the user and password of the url")
    return None
