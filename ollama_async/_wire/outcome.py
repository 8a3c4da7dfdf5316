"""How an exchange ends, and what its body is made of."""

from __future__ import annotations

from enum import Enum
from typing import Literal

Kind = Literal["complete", "error", "aborted", "timeout", "closed", "cancelled"]


class ExchangeOutcome:
    """How an exchange ended; ``cause`` is the error, the abort reason, or the phase that timed out."""

    __slots__ = ("cause", "kind")

    def __init__(self, kind: Kind, cause: object = None) -> None:
        self.kind: Kind = kind
        self.cause: object = cause


class ExchangeEnded(Exception):  # noqa: N818  (not an error: it tells the consumer that the outcome is decided)
    """Raised to the consumer when the exchange ends before it is complete."""

    def __init__(self, outcome: ExchangeOutcome) -> None:
        super().__init__(outcome.kind)
        self.outcome = outcome


class Framing(Enum):
    """What the body of an answer is made of."""

    LINES = "lines"
    """Lines; the answer is complete when its consumer says so."""
    WHOLE = "whole"
    """One document; complete when its last byte has arrived."""
    PAGE = "page"
    """What a redirect, a challenge or an error of a stream says; complete when its consumer says so."""
