"""Tools as an agent has them: their schemas, checked arguments, and calls that can be stopped."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import time
import typing
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from ollama_async._call.observe import CallEnd, ObservedWork, begin_work, scope_of
from ollama_async._cancel import CancelToken
from ollama_async._errors import AbortError, RequestError, shown
from ollama_async._loops import EmptyContext, in_loop
from ollama_async._model.input import first_error
from ollama_async._model.tools import tool_parameters, tool_schema
from ollama_async._model.types import Message, ToolCall
from ollama_async._wire.tasks import cancel_once

from ._errors import ApprovalError, ToolArgumentError, ToolError, ToolResultError, ToolTimeout, UnknownTool
from ._events import AgentEvent, ToolFinished, ToolOutcome, ToolStarted

Approval: TypeAlias = Callable[[ToolCall], bool | str | Awaitable[bool | str]]


class AgentTool:
    """A function that a model may call.

    Args:
        function: A function, a method of an object, or an object that can be called. A parameter that is annotated as
            a ``CancelToken`` gets the token of the call, and the model does not see it.

    Attributes:
        schema: What the server gets.
        name: Its name there.
        is_async: Whether calling it returns a coroutine.
    """

    def __init__(self, function: Any) -> None:
        if not _can_be_called(function):
            raise RequestError(
                f"{shown(function)}: an agent calls its tools itself: give a function, a method of an object, or an "
                "object that can be called"
            )
        self._function: Callable[..., Any] = function
        taken = tool_parameters(function)
        tokens = [parameter.name for parameter, hint in taken if _is_token(hint)]
        self._tokens = tokens
        self._parameters = {
            parameter.name: (parameter, TypeAdapter[Any](hint))
            for parameter, hint in taken
            if parameter.name not in tokens
        }
        # What a partial has filled in is not the model's.
        filled = functools.partial(function, **dict.fromkeys(tokens)) if tokens else function
        self.schema: dict[str, Any] = tool_schema(filled)
        self.name: str = self.schema["function"]["name"]
        self.is_async: bool = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (of an object that can be called)
        )
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds

    def bind(self, call: ToolCall, token: CancelToken) -> Callable[[], Any]:
        """Check the arguments of a call, and return what makes it.

        Raises:
            ToolArgumentError: One is missing, unknown, or of the wrong type; the text names all that are.
        """
        given = call.function.arguments
        values: dict[str, Any] = dict.fromkeys(self._tokens, token)
        flaws: list[str] = []
        for name, (parameter, adapter) in self._parameters.items():
            if name in given:
                try:
                    values[name] = adapter.validate_python(given[name])
                except ValidationError as exc:
                    flaws.append(f"{name}: {first_error(exc)}")
            elif parameter.default is inspect.Parameter.empty:
                default = adapter.get_default_value()
                if default is None:
                    flaws.append(f"{name}: it is missing")
                else:
                    values[name] = default.value
        for name in given.keys() - self._parameters.keys():
            if self._takes_any and name not in values:
                values[name] = given[name]
            else:
                flaws.append(f"{name}: there is no such argument")
        if flaws:
            raise ToolArgumentError(f"{self.name}() does not take these arguments: {'; '.join(sorted(flaws))}", call)
        ordered = [
            values.pop(name)
            for name, (parameter, _) in self._parameters.items()
            if parameter.kind is parameter.POSITIONAL_ONLY and name in values
        ]
        return functools.partial(self._function, *ordered, **values)


def _can_be_called(given: object) -> bool:
    return callable(given) and not isinstance(given, (type, Mapping))


def _is_token(hint: Any) -> bool:
    return hint is CancelToken or CancelToken in typing.get_args(hint)


class _ForModel(str):
    """What a tool has returned, as the model reads it: a text as it is, anything else as JSON."""

    __slots__ = ()


def _for_model(value: object, call: ToolCall) -> _ForModel:
    try:
        if isinstance(value, str):
            value.encode()
            return _ForModel(value)
        written = pydantic_core.to_json(value, inf_nan_mode="constants")
        if pydantic_core.to_json(value, inf_nan_mode="null") != written:
            raise ValueError("it has a NaN or an infinity")
        return _ForModel(written.decode())
    except (ValueError, TypeError, RecursionError) as exc:
        name, kind = call.function.name, type(value).__name__
        text = (
            f"{name}() returned {kind}, which cannot be written as JSON: {_text_of(exc)}; return text, or what JSON has"
        )
        raise ToolResultError(text, call) from exc


@dataclass(frozen=True)
class Terms:
    """How the tools of an agent are called."""

    tools: Mapping[str, AgentTool]
    approve: Approval | None
    on_tool_error: Literal["feed", "raise"]
    tool_timeout: float | None
    grace: float


class Board:
    """What a run and its tools tell the reader. It does not know the run, which can be dropped while tools still end.

    Attributes:
        events: Those that the reader has not got yet.
        changed: Set when there is something to look at.
        turn_to_ask: Held while an approval is asked for: people are asked one thing at a time.
    """

    def __init__(self) -> None:
        self.events: deque[AgentEvent] = deque()
        self.changed: asyncio.Event = asyncio.Event()
        self.turn_to_ask: asyncio.Lock = asyncio.Lock()

    def post(self, event: AgentEvent) -> None:
        """Tell the reader something."""
        self.events.append(event)
        self.changed.set()


# A loop holds its tasks weakly, and nobody else holds one whose run was dropped.
_tasks: set[asyncio.Task[Any]] = set()


class _Denied(Exception):  # noqa: N818  (not an error: it tells the call that it is not allowed)
    """Raised within a call that was not approved, with what the model is told."""


def tool_message(call: ToolCall, content: str, outcome: ToolOutcome) -> Message:
    """Return the answer to a call of a tool, marked by its outcome if it has no result."""
    message = Message(role="tool", content=content, tool_name=call.function.name, tool_call_id=call.id)
    return message if outcome == "done" else message.model_copy(update={"outcome": outcome})


NOT_BEGUN = "aborted: the call was not begun"


class ToolRun:
    """One call of a tool: it is checked, approved, run, and over once.

    Attributes:
        call: What the model has asked for.
        outcome: How it ended; ``None`` until then.
        failure: What ends the run; ``None`` if nothing does. Taken out by whoever raises it.
        left: Whether it was still running when the grace period was over.
    """

    def __init__(self, call: ToolCall, terms: Terms, board: Board, token: CancelToken) -> None:
        self.call = call
        self.outcome: ToolOutcome | None = None
        self.failure: ToolError | None = None
        self.left: bool = False
        self._content = _ABORTED
        self._terms, self._board = terms, board
        self._token = token.child()
        self._timed_out = False
        self._thread: asyncio.Future[_Returned] | None = None
        self._observed: ObservedWork | None = None
        self._started_at: float | None = None
        # Of tool_timeout, and after an abort of the grace period.
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        task = self._loop.create_task(self._work(), name=f"tool {call.function.name}")
        # An error holds its frames, and they hold this object: it holds a task, a thread and an error only in between.
        self._task: asyncio.Task[_ForModel] | None = task
        _tasks.add(task)
        task.add_done_callback(self._task_done)
        self._registration = self._token.on_abort(lambda _: in_loop(self._loop, self._stop))

    def message(self) -> Message:
        """Return the answer to the call; one that is not over is answered as aborted."""
        return tool_message(self.call, self._content, self.outcome or "aborted")

    async def _work(self) -> _ForModel:
        name = self.call.function.name
        tool = self._terms.tools.get(name)
        if tool is None:
            known = ", ".join(self._terms.tools) or "none"
            raise UnknownTool(f"there is no tool {name!r}; there are: {known}", self.call)
        function = tool.bind(self.call, self._token)
        if self._terms.approve is not None:
            async with self._board.turn_to_ask:
                await self._ask(self._terms.approve)
            # Stopped meanwhile, which whoever was asked has not passed on: nothing is begun any more.
            self._token.raise_if_aborted()
        self._begin()
        with scope_of(self._observed):
            value = await function() if tool.is_async else await self._in_thread(function)
            # Of a function that is wrapped in a plain one.
            value = await value if inspect.isawaitable(value) else value
        return value if isinstance(value, _ForModel) else _for_model(value, self.call)

    async def _ask(self, approve: Approval) -> None:
        name = self.call.function.name
        try:
            said = approve(self.call)
            allowed = await said if inspect.isawaitable(said) else said
        except Exception as exc:
            text = f"approve() raised {type(exc).__name__} for {name}(), which was not called: {_text_of(exc)}"
            raise ApprovalError(text, self.call) from exc
        if isinstance(allowed, str):
            raise _Denied(f"denied: {allowed}")
        if not isinstance(allowed, bool):
            text = f"approve() returned {shown(allowed)} for {name}(): return True, False, or a str that says why not"
            raise ApprovalError(text, self.call)
        if not allowed:
            raise _Denied("denied: the call was not approved")

    def _begin(self) -> None:
        self._started_at = time.monotonic()
        details = {"tool_call_id": self.call.id, "arguments": self.call.function.arguments}
        self._observed = begin_work("execute_tool", self.call.function.name, details)
        if self._terms.tool_timeout is not None:
            self._timer = self._loop.call_later(self._terms.tool_timeout, self._expire, context=EmptyContext())
        self._board.post(ToolStarted(self.call))

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        """Run a function in a thread that nobody waits for: neither the interpreter's end nor that of the loop."""
        self._thread = self._loop.create_future()
        run = functools.partial(contextvars.copy_context().run, function)
        threading.Thread(
            target=_run_in_thread,
            args=(run, self.call, self._loop, self._thread),
            name=f"tool {self.call.function.name}",
            daemon=True,
        ).start()
        # Not `await self._thread`: a cancellation would cancel the future, and the result would be lost.
        await asyncio.wait([self._thread])
        value, error = self._thread.result()
        self._thread = None
        try:
            if error is not None:
                # SystemExit ends a thread, not the program.
                raise error if isinstance(error, Exception) else self._failure(error)
            return value
        finally:
            # Raised, it holds this frame.
            del error

    # -- its end --

    def _expire(self) -> None:
        self._timed_out = True
        self._token.abort(TimeoutError(f"the tool's {self._terms.tool_timeout:g} s have passed"))

    def _stop(self) -> None:
        if self.outcome is None and not self._stopping:
            self._stopping = True
            self._clear_timer()
            self._timer = self._loop.call_later(self._terms.grace, self._leave, context=EmptyContext())
            if self._task is not None:
                cancel_once(self._task)

    def _leave(self) -> None:
        self.left = True
        self._settle(None, asyncio.CancelledError())

    def _task_done(self, task: asyncio.Task[_ForModel]) -> None:
        _tasks.discard(task)
        self._task = None
        if not task.cancelled():
            error = task.exception()
            self._settle(None if error else task.result(), error)
        elif self._thread is None:
            self._settle(None, asyncio.CancelledError())
        else:
            # The thread goes on, and what it has done counts.
            self._thread.add_done_callback(self._thread_done)

    def _thread_done(self, returned: asyncio.Future[_Returned]) -> None:
        value, error = returned.result()
        if inspect.iscoroutine(value):
            value.close()
        if isinstance(value, _ForModel):
            self._settle(value, None)
        else:
            self._settle(None, error or asyncio.CancelledError())

    def _settle(self, content: _ForModel | None, error: BaseException | None) -> None:
        if self.outcome is not None:
            return
        self._clear_timer()
        self._registration.remove()
        self._thread = None
        self.outcome, self._content, failure = self._ending(content, error)
        if isinstance(failure, ApprovalError) or self._terms.on_tool_error == "raise":
            self.failure = failure
        seconds = 0.0 if self._started_at is None else time.monotonic() - self._started_at
        self._board.post(ToolFinished(self.call, self.outcome, self._content, failure, seconds, self.left))
        if self._observed is not None:
            cause = failure and (failure.__cause__ or failure)
            self._observed.ended(CallEnd(self.outcome, cause, seconds, None, self._content))

    def _ending(
        self, content: _ForModel | None, error: BaseException | None
    ) -> tuple[ToolOutcome, str, ToolError | None]:
        """Return outcome, content and error. What a tool returned although it was stopped is what it has done."""
        if content is not None:
            return "done", str(content), None
        if isinstance(error, _Denied):
            return "denied", str(error), None
        stopped = isinstance(error, (asyncio.CancelledError, AbortError)) and self._token.aborted
        if stopped and self._timed_out:
            failure: ToolError = ToolTimeout(
                f"{self.call.function.name}() did not finish within {self._terms.tool_timeout:g} s: ask it for less, "
                "or raise tool_timeout=",
                self.call,
            )
            return "timeout", f"error: {failure}", failure
        if stopped:
            return "aborted", _LEFT if self.left else _ABORTED, None
        assert error is not None
        failure = self._failure(error)
        return "error", f"error: {failure}", failure

    def _failure(self, error: BaseException) -> ToolError:
        if isinstance(error, ToolError):
            return error
        name, kind = self.call.function.name, type(error).__name__
        failure = ToolError(f"{name}() raised {kind}: {_text_of(error)}", self.call)
        failure.__cause__ = error
        return failure

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _text_of(error: BaseException) -> str:
    """Return the text of somebody else's error, which may fail to make it, as JSON can have it."""
    try:
        return str(error).encode(errors="replace").decode()
    except Exception:
        return "(its text cannot be made)"


_ABORTED = "aborted: the call was stopped before it had a result"
_LEFT = "aborted: the call was stopped before it had a result, and may still go on"


class _Returned(typing.NamedTuple):
    """What a function in a thread has returned, or raised."""

    value: Any
    error: BaseException | None


def _run_in_thread(
    run: Callable[[], Any], call: ToolCall, loop: asyncio.AbstractEventLoop, returned: asyncio.Future[_Returned]
) -> None:
    try:
        value = run()
        value = value if inspect.isawaitable(value) else _for_model(value, call)
    except BaseException as exc:
        in_loop(loop, _set_result, returned, _Returned(None, exc))
    else:
        in_loop(loop, _set_result, returned, _Returned(value, None))
    finally:
        # It holds the error, which holds this frame.
        del returned


def _set_result(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)
