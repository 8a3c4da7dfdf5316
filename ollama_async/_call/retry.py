"""When a request that failed may be sent again, and after how long."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

from ollama_async._errors import ConnectError, ConnectionBroken, PhaseTimeout, ResponseError, StreamError

# Too many requests; and what a gateway or a busy server says before anything has been done.
_PASSING = {429, 502, 503, 504}

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 8.0
# A server that asks for more patience than this is not waited for.
_LONGEST_ASKED = 120.0

# How often in a row an operation is resumed that does not get on.
_RESUMES = 8


class RetryBudget:
    """How often a request may still be sent, shared by all the exchanges that do so.

    Args:
        retries: How often it is sent again when it fails before the first byte of the answer.
        resume: Whether it is sent again when its answer breaks off, too: for operations that go on where they were.
    """

    __slots__ = ("_failures", "_resume", "limit")

    def __init__(self, retries: int, *, resume: bool = False) -> None:
        self.limit = max(retries, _RESUMES) if resume else retries
        self._resume = resume
        self._failures = 0

    @classmethod
    def of(cls, retries: int, *, resume: bool) -> RetryBudget:
        """As ``Attempts()``; where there can be none, all calls share them."""
        return cls(retries, resume=resume) if retries or resume else _NONE

    @property
    def remaining(self) -> bool:
        """Whether there is one left."""
        return self._failures < self.limit

    @property
    def exhausted(self) -> bool:
        """Whether there will not be one left any more, whatever happens."""
        return not self.remaining and not self._resume

    def note_progress(self) -> None:
        """The operation has got on: what failed before is forgotten."""
        self._failures = 0

    def backoff(self, error: BaseException, *, answered: bool) -> float | None:
        """Return after how many seconds to try again, ``None`` for not at all.

        Args:
            error: How it failed.
            answered: Whether an answer had begun to come.
        """
        if not self.remaining or not self._passing(error, answered=answered):
            return None
        asked = _asked_for(error)
        if asked is None:
            # Spread out, so that many clients of a server that was away do not come back all at once.
            return min(_LONGEST_DELAY, _FIRST_DELAY * 2.0**self._failures) * random.uniform(0.75, 1.0)  # noqa: S311
        return asked if asked <= _LONGEST_ASKED else None

    def record_failure(self) -> None:
        """One more has failed and is followed by another one."""
        self._failures += 1

    def _passing(self, error: BaseException, *, answered: bool) -> bool:
        if isinstance(error, StreamError):
            # What a server says that has given up downloading; the parts that it has got are kept.
            return self._resume and "max retries exceeded" in error.error
        if isinstance(error, ResponseError):
            return error.status_code in _PASSING
        if isinstance(error, PhaseTimeout):
            return error.phase == "connect" or (self._resume and error.phase == "idle")
        if isinstance(error, ConnectionBroken):
            return self._resume or not answered
        return isinstance(error, ConnectError) and not _refused_by_proxy(error)


_NONE = RetryBudget(0)


def _refused_by_proxy(error: ConnectError) -> bool:
    # By name, as httpx2 has one, too. What such a proxy does not like it will not like the next time, and to repeat a
    # wrong password may lock an account.
    cause = error.__cause__
    return type(cause).__name__ == "ProxyError" and str(cause).startswith("4")


def _asked_for(error: BaseException) -> float | None:
    """Read ``Retry-After``: seconds, or a date."""
    if not isinstance(error, ResponseError):
        return None
    value = str(error.headers.get("retry-after", "")).strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
