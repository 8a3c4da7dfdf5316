"""Answers that Redis carries from process to process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._carrier import Listed
from ._memory import begun
from ._reader import Reader
from ._server import Keys, Server
from ._writer import Writer

if TYPE_CHECKING:
    from ollama_async.registry import Name

    from ._log import Log
    from ._producer import Producer

__all__ = ["RedisCarrier"]


class RedisCarrier:
    """A carrier over Redis: what this process produces is read from its own list, the rest from Redis."""

    def __init__(self, url: str, namespace: str, lease: float) -> None:
        server, keys = Server(url), Keys(namespace)
        self._writer = Writer(server, keys, lease)
        self._reader = Reader(server, keys, lease)

    async def claim(self, producer: Producer) -> bool:
        """Take the name."""
        return await self._writer.claim(producer)

    async def find(self, name: Name) -> Log:
        """Return the log."""
        producer = self._writer.producer(name)
        return await self._reader.find(name) if producer is None else producer.log

    async def names(self, owner: str) -> list[Listed]:
        """Return the owner's answers."""
        here = {producer.name.id: producer.log for producer in self._writer.producers(owner)}
        there = [listed for listed in await self._reader.names(owner) if listed.id not in here]
        return there + [Listed(each, "ended" if log.ended else "running", begun(log)) for each, log in here.items()]

    async def drain(self) -> None:
        """Wait until Redis has all that has ended."""
        await self._writer.drain()

    async def aclose(self) -> None:
        """Let go of Redis."""
        await self._writer.aclose()
        await self._reader.aclose()
