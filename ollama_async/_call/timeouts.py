"""``Timeouts``: how long each phase of a call may last, and the one table of which limit holds in which phase."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal

import httpx

from ollama_async._errors import RequestError, shown
from ollama_async._secret import showable
from ollama_async._wire.phase import Phase

Limit = Literal["connect", "upload", "first_chunk", "idle", "total"]

# ``total`` always holds, ``idle`` not while reading is paused: then the reader keeps the server from sending.
LIMITS: Final[dict[Phase, frozenset[Limit]]] = {
    Phase.NEW: frozenset({"total"}),
    Phase.BACKOFF: frozenset({"total"}),
    Phase.CONNECTING: frozenset({"connect", "total"}),
    Phase.SENDING: frozenset({"upload", "idle", "total"}),
    Phase.WAITING: frozenset({"first_chunk", "total"}),
    Phase.HEAD: frozenset({"first_chunk", "idle", "total"}),
    Phase.BODY: frozenset({"idle", "total"}),
    # What the reader has not read yet is not the server's silence.
    Phase.EOF: frozenset({"total"}),
    Phase.CLOSED: frozenset(),
}

# The same by number, since Python hashes an enum by a call: the limits that hold in a phase, and those that hold in it
# or in one that follows it.
HOLDING: Final = tuple(LIMITS[phase] for phase in Phase)
TO_COME: Final = tuple(frozenset[Limit]().union(*HOLDING[phase:]) for phase in Phase)

# Thirty years; for no limit there is None.
_ENDLESS = 1e9


@showable
@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long each phase of a call may last, in seconds; ``None`` means without limit.

    Attributes:
        connect: Until a new connection stands, name lookup and TLS handshake included. Not used when a connection
            is reused.
        upload: From the head of the request until its whole body is sent (for a body that is sent in blocks, as a file
            is); an answer that comes before ends it.
        first_chunk: From the request until the first line of the answer. Ollama sends nothing, not even headers,
            while it queues the request, loads the model and reads the prompt, so this limits all of that; for a
            call without ``stream=True`` it limits the whole generation. Giving up during a load makes the server start
            that load again at the next request, which is why there is no default.
        idle: Between two lines of the answer, from its head on (between two blocks of bytes where the answer is not a
            stream), and between two steps of an upload. Time in which you do not read does not count once the buffer
            is full or the whole answer is there.
        total: From the start of the call until its end.
    """

    connect: float | None = 10.0
    upload: float | None = None
    first_chunk: float | None = None
    idle: float | None = 300.0
    total: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not _is_time(value):
                raise RequestError(
                    f"timeout {field.name}={shown(value)}: give a number of seconds above 0, or None for no limit"
                )

    @classmethod
    def of(cls, value: Timeouts | httpx.Timeout | float | None) -> Timeouts:
        """Read the ``timeout=`` parameter of a call or client.

        Args:
            value: ``Timeouts`` as they are; a number of seconds for the whole call (``total``), the connect
                timeout being no longer than that; ``None`` for no limit at all; or an ``httpx.Timeout``, whose ``read``
                limits each silence of the server, before the first chunk and after it.

        Raises:
            RequestError: It is something else.
        """
        if isinstance(value, Timeouts):
            return value
        if isinstance(value, httpx.Timeout):
            return cls(connect=value.connect, first_chunk=value.read, idle=value.read)
        if value is None:
            return cls(connect=None, first_chunk=None, idle=None, total=None)
        if not _is_time(value):
            raise RequestError(f"timeout={shown(value)}: give Timeouts(...), a number of seconds above 0, or None")
        return cls(connect=min(10.0, value), idle=None, total=value)


def _is_time(value: object) -> bool:
    # Neither True nor NaN, and nothing that the clock cannot be added to.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _ENDLESS


DEFAULT_TIMEOUTS: Final = Timeouts()

_LOOK_CONNECT, _LOOK_TOTAL = 2.0, 5.0


def look_timeouts(left: float | None = None) -> Timeouts:
    """Return the limits for what is asked beside a call, which must not keep the caller of that waiting.

    Args:
        left: Seconds that are left of the call, if it is limited.
    """
    total = _LOOK_TOTAL if left is None else min(left, _LOOK_TOTAL)
    return Timeouts(connect=min(total, _LOOK_CONNECT), total=total)
