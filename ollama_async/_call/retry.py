"""``RetryBudget``: whether a failed request may be sent again, and after how long."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

from ollama_async._errors import ConnectError, ConnectionBroken, PhaseTimeout, ResponseError, StreamError

# Too many requests; and what a gateway or a busy server answers before it has done anything.
_PASSING = {429, 502, 503, 504}

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 8.0
# So many doublings lead from the one to the other; after a thousand more a float overflows.
_DOUBLINGS = 4
# If a server asks for a longer pause than this, the call fails instead.
_LONGEST_ASKED = 120.0

# How often in a row an operation is resumed without progress.
_RESUMES = 8


class RetryBudget:
    """How often a request may still be sent; all attempts of a call share it.

    Args:
        retries: How often to send the request again if it fails before the first byte of the answer.
        resume: Whether to send it again if its answer breaks off, too: for operations that continue where they were.
    """

    __slots__ = ("_failures", "_resume", "limit")

    def __init__(self, retries: int, *, resume: bool = False) -> None:
        self.limit: int = max(retries, _RESUMES) if resume else retries
        self._resume = resume
        self._failures = 0

    @classmethod
    def of(cls, retries: int, *, resume: bool) -> RetryBudget:
        """Return a budget; calls without retries share one."""
        return cls(retries, resume=resume) if retries or resume else _NONE

    @property
    def remaining(self) -> bool:
        """Whether another attempt is allowed."""
        return self._failures < self.limit

    @property
    def exhausted(self) -> bool:
        """Whether no other attempt can be allowed any more, whatever happens."""
        return not self.remaining and not self._resume

    def note_progress(self) -> None:
        """Forget earlier failures: the operation has made progress."""
        self._failures = 0

    def backoff(self, error: BaseException, *, answered: bool) -> float | None:
        """Return how many seconds to wait before the next attempt; ``None`` if none is allowed.

        Args:
            error: How the last attempt failed.
            answered: Whether the head of an answer had arrived.
        """
        if not self.remaining or not self._passing(error, answered=answered):
            return None
        asked = _asked_for(error)
        if asked is None:
            # Random, so that the many clients of a server that was away do not return all at once.
            pause = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(self._failures, _DOUBLINGS))
            return pause * random.uniform(0.75, 1.0)  # noqa: S311
        return asked if asked <= _LONGEST_ASKED else None

    def record_failure(self) -> None:
        """Count a failed attempt that another one follows."""
        self._failures += 1

    def _passing(self, error: BaseException, *, answered: bool) -> bool:
        if isinstance(error, StreamError):
            # The server gave up a download; it keeps the parts that it has.
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
    # By name, since httpx2 has this class, too. Such a proxy refuses the next time as well, and repeating a wrong
    # password may lock an account.
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
