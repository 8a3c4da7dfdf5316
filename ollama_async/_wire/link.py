"""What a reader has on its two sides: the link that brings its answer, and the owner that is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .parser import Head


# Reading from the socket pauses when this many bytes wait for the consumer, and resumes when the consumer waits for
# more, so that a slow consumer of a fast server holds a bounded amount. One read brings up to as much on top of it,
# over TLS up to 256 KiB.
HIGH_WATER = 64 * 1024


class Link(Protocol):
    """What a reader is attached to: a connection, a connection in the making, an upload, a foreign request."""

    # The reader is a ResponseReader, whose module rests on this one.
    def shutdown_for(self, reader: Any) -> None:
        """Send the FIN now. From any thread or signal handler; touches nothing of the event loop."""

    def close_for(self, reader: Any) -> None:
        """Release everything now. In the event loop's thread; idempotent."""

    def pause_reading(self) -> None:
        """Read no more for now. In the event loop's thread."""

    def resume_reading(self) -> None:
        """Read on. In the event loop's thread."""


class Owner(Protocol):
    """Whoever is told what happens to a reader: an exchange."""

    def head_arrived(self, head: Head) -> None:
        """Take note of the head, before it is delivered. In the event loop's thread."""

    def outcome_decided(self) -> None:
        """Leave the tokens. In the thread that decided; may be repeated."""

    def link_released(self) -> None:
        """Stop the timers: the outcome is decided, and nothing can arrive any more. In the event loop's thread."""


class _NoOwner:
    """Stands for an owner where nobody is told, or nobody any more."""

    __slots__ = ()

    def head_arrived(self, head: Head) -> None: ...
    def outcome_decided(self) -> None: ...
    def link_released(self) -> None: ...


NO_OWNER: Owner = _NoOwner()
