"""What carries answers from those who produce them to those who watch them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from ollama_async.registry import Name

    from ._log import Log
    from ._producer import Producer

__all__ = ["Carrier", "Listed", "State"]

State = Literal["running", "silent", "ended"]


class Listed(NamedTuple):
    """An answer in a list.

    Attributes:
        id: Its id.
        state: ``"running"``, ``"ended"``, or ``"silent"``: its producer has not been heard of for a lease.
        begun: When it was begun, in seconds since 1970.
    """

    id: str
    state: State
    begun: float


class Carrier(Protocol):
    """What carries answers: this process's memory, or Redis."""

    async def claim(self, producer: Producer) -> bool:
        """Take the name of an answer that is about to begin; its log has the event ``open``.

        The producer is given what to call for news (``on_news``), and from which size on (``ring_at``).

        Returns:
            Whether it is known that the name was free.

        Raises:
            AnswerInUse: It was not.
            RedisRefuses: Redis cannot be used.
        """
        ...

    async def find(self, name: Name) -> Log:
        """Return the log of an answer, with all events that are there.

        Raises:
            UnknownAnswer: There is no such answer.
            AnswersUnavailable: It cannot be known.
            AnswerGap: What is there is not the log of an answer.
        """
        ...

    async def names(self, owner: str) -> list[Listed]:
        """Return the answers of an owner that are kept.

        Raises:
            AnswersUnavailable: They cannot be known.
        """
        ...

    async def drain(self) -> None:
        """Wait until all answers of this process that have ended are kept."""
        ...

    async def aclose(self) -> None:
        """Let go of everything."""
        ...
