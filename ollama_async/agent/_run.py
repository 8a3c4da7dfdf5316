"""``AgentRun``: one conversation of an agent, driven by whoever reads it.

A run has no task: its reader reads the model's stream and waits for the tools, which have one each. What ends a run
early decides its outcome and aborts its token, without an ``await``: that closes the connection and cancels the tools.
The messages are always put together from what is there, so no step at the end can be missed.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

from ollama_async._call.awaitable import Guarded
from ollama_async._call.condition import Condition, Predicate
from ollama_async._call.observe import CallEnd, ObservedWork, begin_work, scope_of
from ollama_async._call.stream import Stream
from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken, LiveObject, SetOnce
from ollama_async._client import AsyncClient, Messages
from ollama_async._errors import (
    AbortError,
    OllamaError,
    PhaseTimeout,
    RequestError,
    StreamBusy,
    StreamClosed,
    StreamTruncated,
    shown,
)
from ollama_async._loops import in_loop
from ollama_async._model.input import encode_messages
from ollama_async._model.types import ChatResponse, Message, ToolCall, plain
from ollama_async._secret import showable
from ollama_async.pool import Pool

from ._errors import LimitReached
from ._events import AgentEvent, AgentResult, Done, RunOutcome, Text, Thinking, TurnEnded, Usage, counted
from ._tools import NOT_BEGUN, Board, Terms, ToolRun, tool_message

__all__ = ["AgentRun", "Setup"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an agent was made with."""

    client: AsyncClient | Pool
    model: str
    name: str | None
    system: str | None
    max_turns: int
    max_tokens: int | None
    timeouts: Timeouts | None
    options: Mapping[str, Any]
    terms: Terms


class _End:
    """How a run has ended, and when."""

    __slots__ = ("at", "cause", "error", "kind")

    def __init__(self, kind: RunOutcome, cause: object = None, error: OllamaError | None = None) -> None:
        self.kind: RunOutcome = kind
        self.cause: object = cause
        # What is raised, if the kind does not say that.
        self.error = error
        self.at: float = time.monotonic()

    @property
    def comes_last(self) -> bool:
        """Whether the reader gets the events that are ready first."""
        return self.kind in ("done", "stopped", "until", "limit")


@showable
class AgentRun(LiveObject):
    """A run of an agent.

    Nothing is sent before it is first iterated or awaited. These are the ways to use it::

        result = await run                          # to the end
        async for event in run: ...                 # leaving the loop early, in any way, stops everything at once
        async with run: ...                         # stopped at the end of the block; its tools are waited for
        event = await anext(run)                    # one event; to pause and resume

    It has one reader at a time. ``abort()``, ``stop()`` and ``aclose()`` may be called from anywhere.

    After an abort, a timeout, a limit or an error, reading raises that error, whose ``partial`` is the result; after a
    cancellation or ``aclose()`` it raises ``StreamClosed``; after the natural end, ``stop()`` or ``until=`` it ends the
    iteration.
    """

    def __init__(
        self, setup: Setup, messages: Messages, token: CancelToken | None, until: Condition | Predicate | None
    ) -> None:
        self._setup = setup
        self._until = until
        self._own = CancelToken()
        # What the model and all tools are under.
        self._token = self._own if token is None else CancelToken.any(token, self._own)
        self._ended = SetOnce()
        self._stop = SetOnce()
        self._board = Board()
        self._begun_at: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading = False
        # The conversation up to the present turn; then what belongs to that.
        self._messages, self._flaw = _conversation(messages)
        self._stream: Stream[ChatResponse] | None = None
        self._source: AsyncIterator[ChatResponse] | None = None
        self._response: ChatResponse | None = None
        self._tools: list[ToolRun] = []
        # Calls of earlier turns whose tools were left.
        self._left: list[ToolCall] = []
        self._usage = Usage()
        self._release: Callable[[], object] = lambda: None
        self._observed: ObservedWork | None = None

    # -- async for event in run --

    def __aiter__(self) -> AsyncIterator[AgentEvent]:
        """Return an iterator that stops the run when it is dropped, as leaving a loop early does."""
        return _RunIterator(self)

    # -- event = await anext(run) --

    def __anext__(self) -> Coroutine[Any, Any, AgentEvent]:
        """Return the next event.

        Raises:
            AbortError: The run, its token or its client was aborted.
            PhaseTimeout: One of its timeouts passed.
            LimitReached: ``max_turns`` or ``max_tokens`` is reached.
            ToolError: With ``on_tool_error="raise"``: a call of a tool failed.
            OllamaError: The model's answer failed, as ``Stream.__anext__`` says.
            StreamBusy: Another task is reading.
            StreamClosed: It was closed.

        Cancellation: closes the connection and cancels all tools at once, then waits for these for the grace period.
        """
        return Guarded(self._next_event(), self._reader_cancelled, "AgentRun.__anext__")

    async def _next_event(self) -> AgentEvent:
        """Do what has to be done until there is an event; for the iterators."""
        if self._reading:
            raise StreamBusy("another task is reading this run; a run has one reader at a time")
        self._reading = True
        try:
            while (end := self._ended.value) is None or end.comes_last:
                if self._board.events:
                    return self._board.events.popleft()
                if end is not None:
                    break
                await self._advance()
            await self._join()
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError):
                self._close("cancelled")
                await self._join()
            self._close("error" if isinstance(exc, Exception) else "closed")
            raise
        finally:
            self._reading = False
        self._finish()
        raise self._raised()

    # -- await run --

    def __await__(self) -> Generator[Any, Any, AgentResult]:
        """Run to the end, as ``collect()`` does."""
        return self.collect().__await__()

    def collect(self) -> Coroutine[Any, Any, AgentResult]:
        """Run to the end and return the result.

        Raises:
            OllamaError: As ``anext()`` does; the result so far is in ``partial``.

        Cancellation: as for ``anext()``.
        """
        return Guarded(self._collect(), self._reader_cancelled, "AgentRun.collect")

    async def _collect(self) -> AgentResult:
        async for _ in self:
            pass
        return self.result

    # -- async with run --

    async def __aenter__(self) -> Self:
        """Return the run."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it, and wait for its tools."""
        await self.aclose()

    # -- ending it --

    def abort(self, reason: object = None) -> bool:
        """End the run now, from any task, thread or signal handler.

        When it returns, the connection is closed and every tool has been told to stop; the reader gets an
        ``AbortError`` once the tools have ended, or the grace period is over.

        Args:
            reason: What ``AbortError.reason`` and the result's ``reason`` will be.

        Returns:
            True if this call ended it, False if it was at its end already.
        """
        return self._close("aborted", reason)

    def stop(self, reason: object = None, *, after: Literal["turn"] = "turn") -> bool:
        """End the run after the present turn: the model's answer and the tools that it calls. From any thread.

        The iteration then ends normally, with the outcome ``"stopped"``; or ``"done"``, if that turn is the last.

        Args:
            reason: What the result's ``reason`` will be.
            after: What is finished first.

        Returns:
            True if this call will end it, False if it was at its end, or had been told to stop.
        """
        if after != "turn":
            raise RequestError(f"after={shown(after)}: give 'turn', or use abort() to end the run at once")
        return self._ended.value is None and self._stop.try_set(_End("stopped", reason))

    async def aclose(self) -> None:
        """Stop the run, from any task, and wait for its tools for the grace period; idempotent.

        Cancellation: safe; once it has begun, everything has been told to stop.
        """
        self._close("closed")
        if self._loop is asyncio.get_running_loop():
            await self._join()

    def _close(self, kind: RunOutcome, cause: object = None, error: OllamaError | None = None) -> bool:
        """End it early; from any thread, and repeatable. Return whether this call decided how."""
        decided = self._ended.try_set(_End(kind, cause, error))
        if not self._ended.value.comes_last:
            # Again, too, for what Ctrl-C kept the first one from. Not with an error: it holds the frames of a tool.
            self._own.abort(cause if kind == "aborted" else f"the run has ended: {kind}")
        self._finish()
        return decided

    def _reader_cancelled(self) -> None:
        """Notice a cancellation before the first step."""
        if not self._reading:
            self._close("cancelled")

    def _dropped(self) -> None:
        """Stop it because nothing will read on: called from ``__del__``, that is from anywhere."""
        if not self._reading and self._begun_at is not None:
            self._close("closed")

    def __del__(self) -> None:
        # Its last attribute is missing if Ctrl-C came before it was made.
        if hasattr(self, "_observed") and self._begun_at is not None:
            self._close("closed")

    # -- the result --

    @property
    def outcome(self) -> RunOutcome | None:
        """How it ended, as ``AgentResult.outcome``; ``None`` while it runs."""
        end: _End | None = self._ended.value
        return None if end is None else end.kind

    @property
    def result(self) -> AgentResult:
        """The result so far: while it runs, as if it were stopped now."""
        end: _End | None = self._ended.value
        messages, response = [*self._messages], self._response
        answers = [tool.message() for tool in self._tools]
        partial = None if self._stream is None else self._stream.response
        if partial is not None:
            response = partial
            message = partial.message
            answers = [tool_message(call, NOT_BEGUN, "aborted") for call in message.tool_calls or ()]
            if message.content or message.thinking or answers:
                messages.append(message.model_copy(update={"outcome": self.outcome or "aborted"}))
        left = (*self._left, *(tool.call for tool in self._tools if tool.left))
        reason = None if end is None else end.cause
        return AgentResult([*messages, *answers], self.outcome, reason, self._usage, response, left)

    def __repr__(self) -> str:
        state = self.outcome or ("running" if self._begun_at is not None else "not started")
        return f"<AgentRun with {self._setup.model}: {state}, turn {self._usage.turns}>"

    # -- one step after the other --

    async def _advance(self) -> None:
        if self._begun_at is None:
            self._begin()
        elif self._source is not None:
            await self._read_model(self._source)
        elif self._tools:
            await self._wait_for_tools()
        else:
            self._begin_turn()

    def _begin(self) -> None:
        setup, ended, board = self._setup, self._ended, self._board
        self._loop = loop = asyncio.get_running_loop()
        self._begun_at = time.monotonic()
        total = setup.timeouts.total if setup.timeouts else None
        limit = CancelToken() if total is None else CancelToken.timeout(total)
        # What aborts the client's calls aborts the tools, too.
        above: list[CancelToken] = setup.client._tokens()  # noqa: SLF001
        self._token = CancelToken.any(self._token, limit, *above)

        # It must not hold the run, which closes itself when it is dropped.
        def aborted(reason: object) -> None:
            timed_out = reason is not None and reason is limit.reason
            ended.try_set(_End("timeout", "total") if timed_out else _End("aborted", reason))
            in_loop(loop, board.changed.set)

        self._release = self._token.on_abort(aborted).remove
        self._observed = begin_work("invoke_agent", setup.name, {"model": setup.model})
        if self._flaw is not None:
            self._fail(self._flaw)

    def _begin_turn(self) -> None:
        setup, usage = self._setup, self._usage
        told: _End | None = self._stop.value
        if told is not None:
            self._complete(_End("stopped", told.cause))
        elif usage.turns >= setup.max_turns:
            self._limit("max_turns", setup.max_turns)
        elif setup.max_tokens is not None and usage.eval_count >= setup.max_tokens:
            self._limit("max_tokens", setup.max_tokens)
        else:
            try:
                self._stream = self._chat()
            except OllamaError as exc:
                self._fail(exc)
                return
            self._source = aiter(self._stream)
            self._usage = replace(usage, turns=usage.turns + 1)

    def _chat(self) -> Stream[ChatResponse]:
        setup = self._setup
        options = dict(setup.options)
        if setup.timeouts is not None:
            options["timeout"] = replace(setup.timeouts, total=None)
        if setup.max_tokens is not None:
            given: dict[str, Any] = plain(options.get("options") or {})
            remaining = setup.max_tokens - self._usage.eval_count
            wanted = given.get("num_predict")
            limit = min(wanted, remaining) if isinstance(wanted, int) and wanted > 0 else remaining
            options["options"] = {**given, "num_predict": limit}
        system = [Message(role="system", content=setup.system)] if setup.system else []
        tools = [tool.schema for tool in setup.terms.tools.values()]
        messages = [*system, *self._messages]
        client: Any = setup.client
        stream: Stream[ChatResponse] = client.chat(
            setup.model, messages, tools=tools or None, stream=True, token=self._token, until=self._until, **options
        )
        return stream

    async def _read_model(self, source: AsyncIterator[ChatResponse]) -> None:
        try:
            with scope_of(self._observed):
                chunk = await anext(source)
        except StopAsyncIteration:
            self._model_answered()
        except OllamaError as exc:
            self._fail(exc)
        else:
            if chunk.message.thinking:
                self._board.post(Thinking(chunk.message.thinking))
            if chunk.message.content:
                self._board.post(Text(chunk.message.content))
            if chunk.done:
                self._model_answered()
                # Courtesy: what is left of the body, for at most 0.1 s, so that the connection can be used again.
                with suppress(OllamaError):
                    await anext(source, None)

    def _model_answered(self) -> None:
        stream = self._stream
        response = None if stream is None else stream.response
        if stream is None or response is None or stream.outcome not in ("done", "until"):
            self._close("truncated", None, StreamTruncated("the model's answer ended without its last chunk"))
            return
        calls = response.message.tool_calls or ()
        self._usage = counted(self._usage, response)
        met, message = stream.outcome == "until", response.message
        self._messages.append(message.model_copy(update={"outcome": "until"}) if met else message)
        self._response, self._stream, self._source = response, None, None
        if met or self._ended.value is not None:
            # Enough, or aborted just now: the answer is kept, and no tool is begun.
            self._messages += [tool_message(call, NOT_BEGUN, "aborted") for call in calls]
            if met and self._ended.value is None:
                self._board.post(TurnEnded(self._usage.turns, response))
                self._complete(_End("until", stream.reason))
            return
        with scope_of(self._observed):
            self._tools = [ToolRun(call, self._setup.terms, self._board, self._token) for call in calls]
        if not calls:
            self._turn_ended(response)

    async def _wait_for_tools(self) -> None:
        failed = next((tool for tool in self._tools if tool.failure), None)
        if failed is not None and failed.failure is not None:
            self._fail(failed.failure)
            failed.failure = None
        elif all(tool.outcome for tool in self._tools):
            assert self._response is not None
            self._messages += [tool.message() for tool in self._tools]
            self._left += [tool.call for tool in self._tools if tool.left]
            self._tools = []
            self._turn_ended(self._response)
        else:
            self._board.changed.clear()
            await self._board.changed.wait()

    def _turn_ended(self, response: ChatResponse) -> None:
        self._board.post(TurnEnded(self._usage.turns, response))
        limit = self._setup.max_tokens
        if response.message.tool_calls:
            return
        if limit is not None and self._usage.eval_count >= limit and response.done_reason == "length":
            # It was cut for it.
            self._limit("max_tokens", limit)
        else:
            self._complete(_End("done"))

    # -- the end --

    def _limit(self, name: str, value: int) -> None:
        self._complete(_End("limit", name, LimitReached(name, value)))

    def _complete(self, end: _End) -> None:
        if self._ended.try_set(end):
            if end.error is None:
                self._board.post(Done(self.result))
            self._finish()

    def _fail(self, exc: OllamaError) -> None:
        kept = copy.copy(exc)
        kept.__cause__ = exc.__cause__
        if isinstance(exc, AbortError):
            self._close("aborted", exc.reason)
        elif isinstance(exc, PhaseTimeout):
            self._close("timeout", exc.phase, kept)
        elif isinstance(exc, StreamClosed):
            self._close("closed")
        else:
            self._close("error", kept, kept)

    async def _join(self) -> None:
        """Wait for the tools, which end within the grace period, or are left."""
        while not all(tool.outcome for tool in self._tools):
            self._board.changed.clear()
            await self._board.changed.wait()

    def _finish(self) -> None:
        """Leave the token, and tell the observer; from any thread, and repeatable."""
        self._release()
        observed, self._observed = self._observed, None
        end, began = self._ended.value, self._begun_at
        if observed is not None and self._loop is not None and end is not None and began is not None:
            error = AbortError(end.cause) if end.kind == "aborted" else end.error
            report = CallEnd(end.kind, error, end.at - began, None, self._usage)
            # It takes locks, which a signal handler must not.
            if self._loop.is_closed():
                observed.ended(report)
            else:
                in_loop(self._loop, observed.ended, report)

    def _raised(self) -> BaseException:
        end: _End = self._ended.value
        if end.kind in ("done", "stopped", "until"):
            return StopAsyncIteration()
        if end.error is not None:
            error = copy.copy(end.error)
            error.__cause__ = end.error.__cause__
        elif end.kind == "aborted":
            error = AbortError(end.cause)
        elif end.kind == "timeout":
            assert self._setup.timeouts is not None
            error = PhaseTimeout("total", self._setup.timeouts.total or 0.0)
        else:
            error = StreamClosed("the run is closed")
        error.partial = self.result
        return error


def _conversation(given: Messages) -> tuple[list[Message], RequestError | None]:
    """Return messages as they are kept, or what is wrong with them, which is raised when the run begins."""
    try:
        return [Message.model_validate(message) for message in encode_messages(given)], None
    except RequestError as exc:
        return [], exc.with_traceback(None)


class _RunIterator:
    """An iterator over a run. When it is dropped, that stops the run."""

    __slots__ = ("_reads", "_run")

    def __init__(self, run: AgentRun) -> None:
        # Not after it was turned away: dropped later, it must not take the run from its reader.
        self._reads = True
        self._run = run

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, AgentEvent]:
        # The step holds this iterator: `anext(aiter(run))` gets its event before the run is stopped.
        return Guarded(self._step(), self._reader_cancelled, "AgentRun.__anext__")

    async def _step(self) -> AgentEvent:
        try:
            event = await self._run._next_event()  # noqa: SLF001
        except StreamBusy:
            self._reads = False
            raise
        self._reads = True
        return event

    def _reader_cancelled(self) -> None:
        self._run._reader_cancelled()  # noqa: SLF001

    def __del__(self) -> None:
        # None if Ctrl-C came before it was made.
        run = getattr(self, "_run", None)
        if run is not None and self._reads:
            run._dropped()  # noqa: SLF001
