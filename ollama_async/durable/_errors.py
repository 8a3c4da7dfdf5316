"""What can be wrong with durable answers: each error has a code that a program can read, and says what to do."""

from __future__ import annotations

from typing import ClassVar

from ollama_async._errors import OllamaError, RequestError

__all__ = [
    "AnswerGap",
    "AnswerGone",
    "AnswerInUse",
    "AnswersClosed",
    "AnswersUnavailable",
    "BadOffset",
    "RedisFull",
    "RedisRefuses",
    "RedisTooOld",
    "UnknownAnswer",
]


class AnswerInUse(OllamaError):
    """There is an answer with this owner and id already, running or kept; nothing was sent to the model."""

    code: ClassVar[str] = "in_use"


class UnknownAnswer(OllamaError, LookupError):
    """The owner has no answer with this id: there never was one, or it is no longer kept."""

    code: ClassVar[str] = "unknown"


class AnswerGone(UnknownAnswer):
    """The answer vanished while it was being watched: Redis lost it, and its producer did not bring it back."""

    code: ClassVar[str] = "gone"


class AnswerGap(OllamaError):
    """The log of an answer does not continue where it should: events are missing, or something else wrote into it."""

    code: ClassVar[str] = "gap"


class BadOffset(RequestError):
    """The number of the event to go on after is not valid for this answer."""

    code: ClassVar[str] = "bad_offset"


class AnswersUnavailable(OllamaError, ConnectionError):
    """Redis does not answer, and the answer is not in this process."""

    code: ClassVar[str] = "away"


class RedisRefuses(AnswersUnavailable):
    """Redis answers, and refuses: this user lacks a right, or this server takes no writes."""

    code: ClassVar[str] = "refused"


class RedisFull(RedisRefuses):
    """Redis takes no more data: it has reached its ``maxmemory``."""

    code: ClassVar[str] = "full"


class RedisTooOld(RedisRefuses):
    """Redis is older than 6.2."""

    code: ClassVar[str] = "too_old"


class AnswersClosed(OllamaError, RuntimeError):
    """Durable answers were used after they had been closed."""

    code: ClassVar[str] = "closed"
