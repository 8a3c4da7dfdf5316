"""What produces an answer: one task, in the process where it was begun, whoever watches."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, Literal, Protocol, TypeAlias, cast

from ollama_async._call.stream import Stream, Timing
from ollama_async._cancel import LiveObject
from ollama_async._errors import AbortError, OllamaError
from ollama_async._model.types import ChatResponse, GenerateResponse
from ollama_async.registry import AbortRegistry, Name

from ._carrier import Carrier
from ._events import TEXT, Encoder, kept_end, merged, named
from ._log import Log
from ._told import NOT_SENT, Summed, Told, summary, tell

OnEnd: TypeAlias = Callable[["Result"], Awaitable[object] | object]

__all__ = ["CLOSED", "SUPERSEDED", "TOO_LONG", "UNATTENDED", "AnswerOutcome", "Producer", "Result", "Source"]

_log = logging.getLogger("ollama_async.durable")

AnswerOutcome = Literal[
    "done", "aborted", "timeout", "cancelled", "closed", "until", "error", "truncated", "superseded", "lost"
]

UNATTENDED = "nobody watched"
"""The reason of an answer that was aborted because nobody had watched it for ``unattended`` seconds."""
TOO_LONG = "the answer is too long to be kept"
"""The reason of an answer that was aborted because its events had reached ``max_bytes``."""
CLOSED = "the server is shutting down"
"""The reason of an answer that was aborted because the durable answers of its process were closed."""
SUPERSEDED = "another answer has its place"
"""The reason of an answer that was aborted because somebody else's log stands under its id: it was declared lost, or
begun a second time while Redis was away."""


@dataclass(frozen=True, slots=True)
class Result:
    """How an answer ended: what ``on_end`` is given.

    Attributes:
        owner: Whose answer it is.
        id: Its id.
        outcome: As ``stream.outcome``; ``"superseded"`` if another log stands under its id.
        reason: As ``stream.reason``.
        text: All of its text.
        response: All of it, merged; ``None`` if nothing came.
        error: What ended it early, if it was an error.
        timing: How fast it came.
    """

    owner: str
    id: str
    outcome: AnswerOutcome
    reason: object
    text: str = field(repr=False)
    response: ChatResponse | GenerateResponse | None = field(repr=False)
    error: BaseException | None
    timing: Timing


class Source(Summed, Protocol):
    """What a producer reads: a ``Stream``, or what looks like one and delivers all that it has."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def abort(self, reason: object = None) -> bool:
        """End it, from any thread."""
        ...

    async def aclose(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which conditions answers are produced."""

    keep: float
    unattended: float | None
    max_bytes: int
    on_end: OnEnd | None
    explain: Callable[[OllamaError], str] | None


def _tell_nobody() -> None:
    """Do nothing: no carrier has asked for news yet."""


# What grows while an answer is made.
_GROWING = ("content", "response", "thinking", "tool_calls")


class Producer(LiveObject):
    """Reads a model's stream into a log.

    Attributes:
        name: Whose answer it is, and its id.
        log: Its events.
        nonce: What tells it from another one under the same name.
        claimed: Done once it is known that the name is free; ``False`` if Redis could not be asked.
        size: How many bytes its chunks have.
        limit: The size at which it is too long.
        on_news: What the carrier has called for news: for the end, and for other events from ``ring_at`` on. It never
            waits.
        ring_at: The size from which on the carrier is told of an event; 0 for the next one, at most ``limit``.
        failure: What the model's stream ended with, if it was an error.
    """

    def __init__(self, name: Name, stream: Source, registry: AbortRegistry, carrier: Carrier, terms: Terms) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.keep: float = terms.keep
        self.unattended: float | None = terms.unattended
        self.nonce: str = secrets.token_hex(8)
        self.log: Log = Log()
        self.log.append(
            named("open", {"id": name.id, "begun": time.time(), "unattended": terms.unattended, "nonce": self.nonce})
        )
        self.claimed: asyncio.Future[bool] = loop.create_future()
        self.failure: OllamaError | None = None
        self._stream = stream
        self._registry = registry
        self._carrier = carrier
        self._terms = terms
        self._encoder = Encoder()
        self.size: int = 0
        self.limit: int = terms.max_bytes + 1
        self.on_news: Callable[[], object] = _tell_nobody
        self.ring_at: int = 0
        self._superseded = False
        self.task: asyncio.Task[None] = loop.create_task(self._run(), name=f"ollama_async answer {name.id[:40]}")

    def abort(self, reason: object) -> bool:
        """End the answer; its log gets an ``end``, and ``on_end`` is called, as ever."""
        return self._stream.abort(reason)

    def supersede(self) -> None:
        """End it because somebody else's log stands under its name: what comes now is nobody's."""
        self._superseded = True
        self._stream.abort(SUPERSEDED)

    # -- the task --

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            async with self._registry.token(self.name.id, owner=self.name.owner) as token:
                stopping = token.on_abort(self._stream.abort)
                try:
                    claimed = await self._carrier.claim(self)
                    if not self.claimed.done():
                        self.claimed.set_result(claimed)
                    error = await self._read()
                finally:
                    stopping.remove()
        except BaseException as exc:
            # Nothing was begun: the model's server has not been asked.
            await self._stream.aclose()
            if self.claimed.done() or not isinstance(exc, Exception):
                self.claimed.cancel()
                raise
            self.claimed.set_exception(exc)
            return
        await self._tell_end(error)
        if isinstance(error, asyncio.CancelledError):
            raise error

    async def _read(self) -> BaseException | None:
        """Read the stream to its end, however it comes; return what it was, unless it is the natural one."""
        error: BaseException | None = None
        try:
            encode, log, size = self._encoder.chunk, self.log, 0
            append = log.fragments.append
            async for chunk in self._stream:
                # This runs for every token: nearly each one is a text that nobody waits for.
                fragment = encode(chunk)
                if fragment[0] != TEXT or log.waiting:
                    log.append(fragment)
                else:
                    append(fragment)
                self.size = size = size + len(fragment)
                if size >= self.ring_at:
                    self.on_news()
                    if size >= self.limit:
                        self._stream.abort(TOO_LONG)
        except AbortError:
            pass
        except (Exception, asyncio.CancelledError) as exc:
            error = exc
            if not isinstance(exc, (OllamaError, asyncio.CancelledError)):
                _log.exception("answer %s: reading the model's stream failed", self.name.id)
        self._end(error)
        return error

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, OllamaError):
            self.failure = error
        if self._superseded:
            self.log.close_with(self._ending(error))
            return
        rest = self._rest()
        if rest is not None:
            self.log.append(rest)
        self.log.append(self._ending(error))
        self.on_news()

    def _rest(self) -> bytes | None:
        """Return as a chunk what had arrived when the stream was ended, and was not delivered as chunks any more."""
        # Another source keeps nothing back.
        keeps_back = isinstance(self._stream, Stream)
        if self._stream.outcome == "done" or not keeps_back:
            return None
        whole, kept = self._stream.response, merged(self.log.fragments)
        if whole is None:
            return None
        rest = whole.model_dump(mode="json", exclude_none=True, exclude=NOT_SENT)
        known = {} if kept is None else kept.model_dump(mode="json", exclude_none=True)
        holder, before = rest.get("message", rest), known.get("message", known)
        # Texts and lists alike: what is known of them is their beginning.
        news = {key: holder[key][len(before.get(key, "")) :] for key in _GROWING if key in holder}
        holder |= news
        return named("chunk", rest) if any(news.values()) else None

    def _ending(self, error: BaseException | None) -> bytes:
        told: Told | None = None
        if isinstance(error, OllamaError):
            told = tell(error, self._terms.explain)
        elif isinstance(error, Exception):
            told = Told(500, "the answer failed", "OllamaError")
        data = summary(self._stream, told)
        if self._superseded:
            data |= {"outcome": "superseded", "reason": SUPERSEDED}
        elif told is not None and data["error"] is not None and not isinstance(error, OllamaError):
            data["outcome"] = "error"
        return kept_end(data, self.log.fragments)

    async def _tell_end(self, error: BaseException | None) -> None:
        on_end = self._terms.on_end
        if on_end is None:
            return
        stream = self._stream
        outcome: Any = "superseded" if self._superseded else stream.outcome
        reason = SUPERSEDED if self._superseded else stream.reason
        response = cast("ChatResponse | GenerateResponse | None", stream.response)
        result = Result(self.name.owner, self.name.id, outcome, reason, stream.text, response, error, stream.timing)
        try:
            told = on_end(result)
            if isawaitable(told):
                await told
        except Exception:
            _log.exception("answer %s: on_end failed", self.name.id)
