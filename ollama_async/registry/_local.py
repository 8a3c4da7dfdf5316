"""The streams and Stops of this process: all that a registry in memory is, and what one over Redis keeps at hand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ollama_async._errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ollama_async._cancel import CancelToken

__all__ = ["MAX_NAME", "Book", "Name", "Stop", "checked_reason"]

MAX_NAME = 200
_MAX_REASON = 1000
# Each is some hundred bytes; beyond that the oldest go first.
_MAX_STOPS = 100_000


class Name(NamedTuple):
    """What a stream is registered under."""

    owner: str
    id: str

    @classmethod
    def of(cls, owner: object, id: object) -> Name:  # noqa: A002  (the parameter's public name)
        """Check what was given.

        Raises:
            RequestError: The id or the owner is not a text or too long, or the id is empty.
        """
        if not isinstance(id, str) or not 0 < len(id) <= MAX_NAME:
            raise RequestError(f"a stream's id must be a text of 1 to {MAX_NAME} characters, not {_shown(id)}")
        if not isinstance(owner, str) or len(owner) > MAX_NAME:
            raise RequestError(f"a stream's owner must be a text of at most {MAX_NAME} characters, not {_shown(owner)}")
        for text in (id, owner):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RequestError(f"a stream's id and owner must be valid Unicode, not {_shown(text)}")
        return cls(owner, id)


class Stop(NamedTuple):
    """That the streams of a name are to be aborted: why, and until when that holds (by ``time.monotonic()``)."""

    reason: str | None
    until: float


def checked_reason(reason: object) -> str | None:
    """Return the reason if it is one that can be passed on to another process.

    Raises:
        RequestError: It is not a text, or too long.
    """
    if reason is None or (isinstance(reason, str) and len(reason) <= _MAX_REASON):
        return reason
    raise RequestError(f"the reason of a Stop must be a text of at most {_MAX_REASON} characters, not {_shown(reason)}")


class Book:
    """Which streams are under way in this process, and which Stops were given here and still hold."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._tokens: dict[Name, list[CancelToken]] = {}
        # In the order in which they end.
        self._stops: dict[Name, Stop] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._tokens

    def add(self, name: Name, token: CancelToken) -> None:
        """Register a stream; it is aborted at once if a Stop for its name holds."""
        self._tokens.setdefault(name, []).append(token)
        stop = self.stop(name)
        if stop is not None:
            token.abort(stop.reason)

    def remove(self, name: Name, token: CancelToken) -> None:
        """Take back what ``add()`` did."""
        tokens = self._tokens[name]
        tokens.remove(token)
        if not tokens:
            del self._tokens[name]

    def names(self) -> list[Name]:
        """Return the names of the streams that are under way."""
        return list(self._tokens)

    def abort(self, name: Name, reason: str | None) -> bool:
        """Abort the streams of a name; return whether there are any."""
        tokens = self._tokens.get(name, ())
        for token in list(tokens):
            token.abort(reason)
        return bool(tokens)

    def keep(self, name: Name, reason: str | None) -> None:
        """Have a Stop hold from now on; of several for one name the first reason stays."""
        now = time.monotonic()
        before = self._stops.pop(name, None)
        if before is not None and before.until > now:
            reason = before.reason
        self._stops[name] = Stop(reason, now + self._ttl)
        for oldest in list(self._oldest(now)):
            del self._stops[oldest]

    def _oldest(self, now: float) -> Iterator[Name]:
        too_many = len(self._stops) - _MAX_STOPS
        for place, (name, stop) in enumerate(self._stops.items()):
            if stop.until > now and place >= too_many:
                return
            yield name

    def stop(self, name: Name) -> Stop | None:
        """Return the Stop that holds for a name."""
        stop = self._stops.get(name)
        return stop if stop is not None and stop.until > time.monotonic() else None

    def stops(self) -> dict[Name, Stop]:
        """Return the Stops that were given here and still hold, the oldest first."""
        now = time.monotonic()
        return {name: stop for name, stop in self._stops.items() if stop.until > now}


def _shown(given: object) -> str:
    shown = repr(given)
    return shown if len(shown) <= 60 else f"{shown[:60]}... ({len(str(given))} characters)"
