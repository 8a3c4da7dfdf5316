"""The readers that an abort has ended are released some in each round of their loop."""

from __future__ import annotations

import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from ollama_async._loops import in_loop

if TYPE_CHECKING:
    import asyncio


# After this many seconds a round that has not begun is taken for lost; in a loop that is merely blocked, another one is
# harmless.
_LOST_SECONDS = 1.0

# How many readers are released in one round of a loop: a few milliseconds' worth.
RELEASES_A_ROUND = 64


class Ended(Protocol):
    """A reader whose outcome is decided."""

    loop: asyncio.AbstractEventLoop

    def release(self) -> None:
        """Let go of everything."""

    def pause_reading(self) -> None:
        """Read no more."""


class _ReleaseQueue:
    """The readers that are to be released in a loop, some in each of its rounds.

    One abort may end thousands of exchanges. Their sockets are shut down when it returns, as promised; but to close
    them all and to wake all their consumers in one round would keep the loop from everything else meanwhile.
    """

    def __init__(self) -> None:
        self._new: deque[Ended] = deque()
        self._waiting: deque[Ended] = deque()
        # When a round was scheduled that has not begun yet; 0 if none is scheduled.
        self._scheduled_at = 0.0

    def add(self, reader: Ended) -> None:
        """Put in a reader, from any thread or signal handler."""
        self._new.append(reader)
        # A round takes this mark back before it looks at what is new. So whoever finds it set is seen by a round to
        # come; and if two set it at once there is one round more than needed.
        now = time.monotonic()
        # A loop loses a callback if Ctrl-C comes at its first instruction: a round that is long due does not count.
        if not self._scheduled_at or now - self._scheduled_at > _LOST_SECONDS:
            try:
                self._scheduled_at = now
                in_loop(reader.loop, self._round, reader.loop)
            except BaseException:
                self._scheduled_at = 0.0
                raise

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._scheduled_at = 0.0
            for _ in range(RELEASES_A_ROUND):
                queue = self._waiting or self._new
                if not queue:
                    break
                self._release_first(queue)
            while self._new:
                # Else the loop would see the ends of all these sockets in this very round.
                self._new[0].pause_reading()
                self._waiting.append(self._new.popleft())
        finally:
            # Also when one of them could not be released: the others still have to be.
            if (self._waiting or self._new) and not self._scheduled_at:
                self._scheduled_at = time.monotonic()
                loop.call_soon(self._round, loop)

    @staticmethod
    def _release_first(queue: deque[Ended]) -> None:
        try:
            queue[0].release()
        except Exception:
            queue.popleft()
            raise
        # After the deed: if Ctrl-C interrupts it, the next round repeats it.
        queue.popleft()


_release_queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _ReleaseQueue] = weakref.WeakKeyDictionary()


def release_in_turn(reader: Ended) -> None:
    """Release a reader whose FIN has been sent in one of the next rounds of its loop; from anywhere."""
    queue = _release_queues.get(reader.loop)
    if queue is None:
        # What waits in a loop that was closed holds that loop, which would be kept here for good.
        for reference in _release_queues.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                _release_queues.pop(loop, None)
        queue = _release_queues.setdefault(reader.loop, _ReleaseQueue())
    queue.add(reader)
