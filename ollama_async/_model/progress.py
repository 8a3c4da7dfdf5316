"""Progress of a long operation: the steps that the server reports, and one figure over all of them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from ollama_async._secret import showable

from .types import Model

# The rate is taken over this many seconds: long enough for bursts, short enough to show a change.
_WINDOW = 10.0


@showable
@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is, over all files and reconnects; neither bytes nor fraction ever go back.

    Attributes:
        completed: Bytes done.
        total: Bytes in all, as far as the server has told; it grows while it tells of further files.
        fraction: Part that is done, 0 to 1; ``None`` while no size is known.
        bytes_per_second: Over the last ten seconds; ``None`` before there is a rate.
        eta: Seconds until all is done at that rate; ``None`` before there is a rate.
    """

    completed: int = 0
    total: int = 0
    fraction: float | None = None
    bytes_per_second: float | None = None
    eta: float | None = None


class ProgressResponse(Model):
    """A step of ``pull``, ``push``, ``create`` or an upload."""

    __slots__ = ("_overall",)

    status: str | None = None
    """What is being done; ``"success"`` at the end."""
    digest: str | None = None
    """Of what."""
    total: int | None = None
    """Bytes of it."""
    completed: int | None = None
    """Bytes of it that are done; left out by the server while it is 0."""

    @property
    def done(self) -> bool:
        """Whether this is the last step."""
        return self.status == "success"

    @property
    def overall(self) -> Progress:
        """How far the whole operation was at this step."""
        progress: Progress = getattr(self, "_overall", _NOTHING)
        return progress

    def set_overall(self, progress: Progress) -> None:
        """Note how far the whole operation was."""
        object.__setattr__(self, "_overall", progress)


_NOTHING = Progress()


class Meter:
    """Adds the steps of an operation up, and notes on each how far all of it is."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._completed: dict[str, int] = {}
        self._fraction: float | None = None
        # Bytes that were there at the start are done, but nobody has moved them: they do not count for the rate.
        self._moved = 0
        self._samples: deque[tuple[float, int]] = deque()

    def expect(self, what: str, total: int) -> None:
        """Count on so many bytes, of which none is done yet."""
        self._count(what, total, 0)

    def rename(self, what: str, digest: str) -> None:
        """What was expected under one name comes under another one; the same file twice counts once."""
        total, completed = self._totals.pop(what, 0), self._completed.pop(what, 0)
        self._count(digest, total, completed)

    def add(self, step: ProgressResponse) -> None:
        """Take the next step."""
        what = step.digest or step.status
        if what and step.total is not None and step.total > 0:
            self._count(what, step.total, step.completed or 0)
        step.set_overall(self._progress(finished=step.done))

    def _count(self, digest: str, total: int, completed: int) -> None:
        known = self._completed.get(digest)
        self._totals[digest] = max(total, self._totals.get(digest, 0))
        # After a reconnect the server may begin with less than it had said before.
        self._completed[digest] = max(known or 0, min(completed, total))
        if known is not None:
            self._moved += self._completed[digest] - known

    def _progress(self, *, finished: bool) -> Progress:
        completed, total = sum(self._completed.values()), sum(self._totals.values())
        if total:
            done = 1.0 if finished else completed / total
            self._fraction = max(done, self._fraction or 0.0)
        rate = self._rate()
        return Progress(completed, total, self._fraction, rate, (total - completed) / rate if rate else None)

    def _rate(self) -> float | None:
        now, samples = time.monotonic(), self._samples
        samples.append((now, self._moved))
        while len(samples) > 2 and samples[1][0] <= now - _WINDOW:
            samples.popleft()
        then, moved = samples[0]
        if now <= then or self._moved == moved:
            return None
        return (self._moved - moved) / (now - then)
