"""Answers that are kept in this process alone."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from ._carrier import Listed
from ._errors import AnswerInUse, UnknownAnswer
from ._events import split
from ._producer import UNATTENDED

if TYPE_CHECKING:
    from ollama_async.registry import Name

    from ._log import Log
    from ._producer import Producer

__all__ = ["Memory", "begun"]


class _Kept:
    """A log, and the one timer that it has: until somebody has to watch, or how long it is kept."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.timer: asyncio.TimerHandle | None = None

    def attended(self) -> None:
        producer = self.producer
        if producer.unattended is None or producer.log.closed:
            return
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not producer.log.viewers:
            self.timer = asyncio.get_running_loop().call_later(producer.unattended, producer.abort, UNATTENDED)


class Memory:
    """A carrier that keeps the logs, and carries nothing."""

    def __init__(self) -> None:
        self._kept: dict[Name, _Kept] = {}

    async def claim(self, producer: Producer) -> bool:
        """Take the name."""
        if producer.name in self._kept:
            raise AnswerInUse("an answer with this id exists already: use another id, or attach to it")
        kept = self._kept[producer.name] = _Kept(producer)
        producer.log.on_attended = kept.attended
        kept.attended()
        producer.on_news = lambda: self._news(kept)
        producer.ring_at = producer.limit
        return True

    def _news(self, kept: _Kept) -> None:
        """Begin to count how long an answer is kept, once it has ended."""
        producer = kept.producer
        if producer.log.ended:
            if kept.timer is not None:
                kept.timer.cancel()
            kept.timer = asyncio.get_running_loop().call_later(producer.keep, self._kept.pop, producer.name, None)

    async def find(self, name: Name) -> Log:
        """Return the log."""
        kept = self._kept.get(name)
        if kept is None:
            raise UnknownAnswer("there is no answer with this id, or it is no longer kept")
        return kept.producer.log

    async def names(self, owner: str) -> list[Listed]:
        """Return the owner's answers."""
        return [
            Listed(name.id, "ended" if kept.producer.log.ended else "running", begun(kept.producer.log))
            for name, kept in self._kept.items()
            if name.owner == owner
        ]

    async def drain(self) -> None:
        """Do nothing: what has ended is kept."""

    async def aclose(self) -> None:
        """Forget all."""
        for kept in self._kept.values():
            if kept.timer is not None:
                kept.timer.cancel()
        self._kept.clear()


def begun(log: Log) -> float:
    """Return when an answer was begun."""
    when: float = json.loads(split(log.fragments[0])[1])["begun"]
    return when
