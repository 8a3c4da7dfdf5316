"""``Phase``: how far an attempt is, and the table from which the picture in docs/design.md is drawn."""

from __future__ import annotations

import logging
from enum import IntEnum, unique
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .outcome import ExchangeOutcome

_log = logging.getLogger("ollama_async.exchange")


@unique
class Phase(IntEnum):
    """How far an attempt is; set by the event loop's thread, and never for each token.

    How an attempt ends (its outcome) is another matter: any thread decides that once, in any phase.
    """

    NEW = 0
    """Nothing has happened."""
    BACKOFF = 1
    """The pause before another attempt."""
    CONNECTING = 2
    """A connection is being made: name lookup, TCP, proxy, TLS."""
    SENDING = 3
    """The head of the request is sent, and its body is being uploaded."""
    WAITING = 4
    """The whole request is sent."""
    HEAD = 5
    """The head of the answer has arrived."""
    BODY = 6
    """The first line of the answer has arrived (the first bytes, where the answer is not a stream)."""
    EOF = 7
    """The whole answer has arrived."""
    CLOSED = 8
    """Nothing is held any more: no connection, no timer, no registration."""


# From HEAD back to CONNECTING, SENDING or WAITING: a redirect, or a 401 that is answered with credentials. From WAITING
# to SENDING: a foreign transport does not say when it is connected, but when it takes the first block of the body.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset({Phase.BACKOFF, Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.BACKOFF: frozenset({Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.CONNECTING: frozenset({Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.SENDING: frozenset({Phase.WAITING, Phase.HEAD, Phase.CLOSED}),
    Phase.WAITING: frozenset({Phase.HEAD, Phase.SENDING, Phase.CLOSED}),
    Phase.HEAD: frozenset({Phase.BODY, Phase.EOF, Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.BODY: frozenset({Phase.EOF, Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.EOF: frozenset({Phase.CONNECTING, Phase.SENDING, Phase.WAITING, Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


def phases_are_logged() -> bool:
    """Whether anybody reads the log of phases."""
    return _log.isEnabledFor(logging.DEBUG)


def log_phase(exchange: int, phase: Phase, outcome: ExchangeOutcome | None) -> None:
    """Log that an attempt has entered a phase; ``exchange`` is a number that tells it from others."""
    # Never the cause: an abort's reason is the caller's, and an error may quote what the server sent.
    _log.debug("exchange %#x: %s%s", exchange, phase.name, f", {outcome.kind}" if outcome else "")
