"""The list of an answer's events in this process, and those who watch it.

There is one list for each answer, whoever fills it: the answer's producer, or what reads Redis where the answer is
produced elsewhere. A viewer is an index into it. So one that is slow lags, and holds up nobody; what is replayed to it
and what comes live is one list, with nothing to hand over in between.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from typing import TYPE_CHECKING

from ollama_async._cancel import LiveObject

from ._errors import AnswerGap
from ._events import TEXT, Event, Expander, ends, is_whole_chunk, shown_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from types import TracebackType
    from typing import Self

    from ollama_async._errors import OllamaError

__all__ = ["Log", "Viewer"]

# A viewer that is far behind takes so much at once, and lets others have their turn.
_AT_ONCE = 256


class Log:
    """The events of an answer so far, as fragments."""

    def __init__(self) -> None:
        self.fragments: list[bytes] = []
        self.ended: bool = False
        # Why no more events come though the last one is not there; raised to its viewers once they have read all.
        self.failure: OllamaError | None = None
        # What tells the viewers of this process the end where that cannot be an event of the log.
        self.epilogue: bytes | None = None
        self.viewers: int = 0
        # Called when the first viewer has come and when the last one has gone.
        self.on_attended: Callable[[], object] | None = None
        # Which of the fragments are chunks that are kept whole.
        self._wholes: list[int] = []
        # Those who wait for news.
        self.waiting: set[asyncio.Future[None]] = set()
        self._shown_end: bytes | None = None

    def __len__(self) -> int:
        return len(self.fragments)

    @property
    def closed(self) -> bool:
        """Whether nothing will be added any more."""
        return self.ended or self.failure is not None or self.epilogue is not None

    def append(self, fragment: bytes) -> None:
        """Add the next event."""
        # As is_text() has it: this runs for every token.
        if fragment[0] != TEXT:
            if is_whole_chunk(fragment):
                self._wholes.append(len(self.fragments))
            self.ended = ends(fragment)
        self.fragments.append(fragment)
        if self.waiting:
            self._wake()

    def extend(self, fragments: Iterable[bytes]) -> None:
        """Add the next events, up to the last one that an answer can have."""
        for fragment in fragments:
            if self.closed:
                return
            self.append(fragment)

    def fail(self, error: OllamaError) -> None:
        """Tell the viewers that no more events come."""
        if not self.closed:
            self.failure = error
            self._wake()

    def close_with(self, epilogue: bytes) -> None:
        """Tell the viewers of this process an end that is not an event of the log."""
        if not self.closed:
            self.epilogue = epilogue
            self._wake()

    def shown_end(self) -> bytes:
        """Return the data of the end, with all of the answer's text; it is made once for all viewers.

        Raises:
            ValueError: It cannot be made.
        """
        if self._shown_end is None:
            kept = self.fragments[-1] if self.epilogue is None else self.epilogue
            self._shown_end = shown_end(kept, self.fragments)
        return self._shown_end

    def expander(self, after: int) -> Expander:
        """Return what makes events of the fragments behind an event."""
        place = bisect_right(self._wholes, after - 1)
        return Expander(self.fragments[self._wholes[place - 1]] if place else None)

    async def reaches(self, number: int) -> None:
        """Wait until the log has so many events, or is closed.

        Cancellation: safe.
        """
        while len(self.fragments) < number and not self.closed:
            await self.news()

    async def news(self) -> None:
        """Wait until something has been added.

        Cancellation: safe.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.add(future)
        try:
            await future
        finally:
            self.waiting.discard(future)

    def _wake(self) -> None:
        waiting, self.waiting = self.waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def attend(self, change: int) -> None:
        """Count a viewer that comes (1) or goes (-1)."""
        before = self.viewers
        self.viewers += change
        if (before == 0 or self.viewers == 0) and self.on_attended is not None:
            self.on_attended()

    def wake_all(self) -> None:
        """Have all viewers look again, since one of them was detached."""
        self._wake()


class Viewer(LiveObject):
    """A viewer of an answer: ``async for event in viewer``.

    It ends with the event ``end``. Detaching affects neither the answer nor its other viewers.
    """

    def __init__(self, log: Log, after: int) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._attached = True
        self._over = False
        self._at = after
        self._expander = log.expander(after)
        # Events that were read and not handed out yet, the next one last.
        self._ready: list[Event] = []
        log.attend(1)

    @property
    def after(self) -> int:
        """The number of the last event that was handed out: where to attach to go on."""
        return self._at - len(self._ready)

    @property
    def at_end(self) -> bool:
        """Whether the event ``end`` was handed out, here or before."""
        return self._log.ended and self.after == len(self._log)

    async def read(self) -> list[Event]:
        """Return all events that have arrived, at least one; none when no further event will come.

        Raises:
            AnswerGap: Events are missing from the log, or something else wrote into it.
            AnswerGone: Redis lost the answer, and its producer did not bring it back.
            AnswersClosed: The durable answers of this process were closed; those that they produced themselves have an
                ``end`` then.

        Cancellation: safe, no event is lost.
        """
        if self._ready:
            events, self._ready = self._ready[::-1], []
            return events
        while self._attached and not self._over and not self.at_end:
            events = self._take()
            if events:
                return events
            if self._log.failure is not None:
                raise self._log.failure
            await self._log.news()
        return []

    def _take(self) -> list[Event]:
        log, events = self._log, list[Event]()
        for fragment in log.fragments[self._at : self._at + _AT_ONCE]:
            try:
                if ends(fragment):
                    event = Event(self._at + 1, "end", log.shown_end())
                else:
                    event = self._expander.event(self._at + 1, fragment)
            except ValueError as exc:
                if events:
                    break
                raise AnswerGap(f"event {self._at + 1} of the answer cannot be read: {exc}") from None
            events.append(event)
            self._at += 1
            self._over = event.name == "end"
        if not events and log.epilogue is not None:
            self._over = True
            events.append(Event(None, "end", log.shown_end()))
        return events

    def detach(self) -> None:
        """Stop watching; idempotent. The answer goes on."""
        if self._attached:
            self._attached = False
            self._log.attend(-1)
            self._log.wake_all()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            self._ready = (await self.read())[::-1]
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.pop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __del__(self) -> None:
        # Dropped without detach(), by a loop that was left, say; in whichever thread.
        if getattr(self, "_attached", False) and not self._loop.is_closed():
            self._attached = False
            self._loop.call_soon_threadsafe(self._log.attend, -1)
