"""`check_teardown`: stop a coroutine in every way, at every moment, and say what it leaves behind."""

import asyncio
import gc
import inspect
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

from ollama_async._cancel import CancelToken
from ollama_async._secret import showable

from ._fake import FakeOllama
from ._left import AT_ONCE, FDS_UNTOLD, LeakCheckWarning, Wait, Watch, task_groups, task_shown

MakeCall: TypeAlias = Callable[..., Awaitable[Any] | AsyncIterable[Any]]

WAYS = (
    "abort",
    "abort from a thread",
    "cancel",
    "cancel twice",
    "asyncio.timeout",
    "aclose",
    "leave the loop",
    "loop shutdown",
)
"""The ways in which `check_teardown` stops a call."""

_OF_ITERATORS = ("aclose", "leave the loop")

# Ticks between the two cancellations of "cancel twice".
_GAPS = (0, 1, 2, 3)

# A server that says nothing has no moment at which it has begun to answer.
_WAIT_FOR_ANSWER = 1.0

# One way that fails at many moments mostly fails for one reason.
_ENOUGH = 3

_STOP_STUBBORN = 0.5

# After so many times the limit, waited within one way in all, its other moments would mostly be as slow.
_ENOUGH_WAITING = 10


class TeardownFailure(AssertionError):  # noqa: N818  (pytest shows it as what it is, an assertion that failed)
    """A call leaves something behind when it is stopped, or does not stop.

    Attributes:
        findings: what was found, one for each run that failed.
    """

    def __init__(self, message: str, findings: Sequence[str]) -> None:
        super().__init__(message)
        self.findings: tuple[str, ...] = tuple(findings)


@showable
@dataclass(frozen=True)
class TeardownReport:
    """What a `check_teardown` that found nothing has done.

    Attributes:
        runs: how often the call was made and stopped, by way.
        waited: for each way in which it did not end at once, how often, how long at most, and for what.
        unchecked: what could not be looked at on this system or with this event loop.
    """

    runs: dict[str, int]
    waited: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How often in all."""
        return sum(self.runs.values())


class TeardownCheck(Protocol):
    """What the fixture `teardown_check` is: `check_teardown` for one of the ways."""

    def __call__(
        self,
        make_call: MakeCall,
        *,
        server: Callable[[], FakeOllama] | None = None,
        ticks: int = 40,
        limit: float = 1.0,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> TeardownReport:
        """Stop a call in that way, at every moment; the parameters are those of `check_teardown`."""
        ...


def check_teardown(
    make_call: MakeCall,
    *,
    server: Callable[[], FakeOllama] | None = None,
    ways: Sequence[str] = WAYS,
    ticks: int = 40,
    limit: float = 1.0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> TeardownReport:
    """Run a call again and again, stop it in every way at every moment, and check that nothing of it is left.

    Each run has its own server, token and event loop; the garbage collector is off meanwhile. The moments are
    the first `ticks` rounds of the event loop, then some rounds from when the server has the request on, and some from
    when it has begun to answer.

    Args:
        make_call: called with the URL of a server, and with `token=` if it has a parameter of that name; returns what
            is run: a coroutine, or something to iterate with `async for` (a `Stream`, an async generator). What it
            opens, it has to close; so the client is best made in there.
        server: makes the server for one run, not started; without it, one that answers with 40 tokens.
        ways: the names of the ways to stop it. Those that the call has no use for are left out: the aborts if it takes
            no token, "aclose" and "leave the loop" if it is nothing to iterate.
        ticks: at how many rounds of the loop.
        limit: seconds that a stopped call, and what it leaves to the background, may take to end. What passes, but
            not at once, is named by a `LeakCheckWarning`.
        loop_factory: makes the event loop, asyncio's own without it.

    Returns:
        How many runs there were.

    Raises:
        TeardownFailure: something was left behind, or a cancellation was swallowed; the text says what, after which
            stop.
        ValueError: there is no such way.
        RuntimeError: an event loop runs in this thread; call it through `asyncio.to_thread`, or in a test that is not a
            coroutine.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ValueError(f"no such way to stop a call: {unknown[0]!r}; there are {', '.join(map(repr, WAYS))}")
    if asyncio._get_running_loop() is not None:  # noqa: SLF001
        raise RuntimeError("check_teardown() runs its own event loops: call it through asyncio.to_thread()")
    make_server = server or (lambda: FakeOllama(interval=0.001))
    takes_token = "token" in _signature(make_call).parameters
    name = getattr(make_call, "__qualname__", repr(make_call))
    runs: dict[str, int] = {}
    findings: list[str] = []
    waited: list[str] = []
    unchecked: set[str] = set()
    asked = False
    collecting = gc.isenabled()
    gc.disable()
    try:
        for way in ways:
            failed = 0
            slow: list[tuple[Wait, _Run]] = []
            for moment, gap in _moments(way, ticks):
                if moment.ticks and _seconds(slow) > _ENOUGH_WAITING * limit:
                    continue
                run = _Run(make_call, takes_token, make_server, way, moment, gap, limit)
                if not run.go(loop_factory or asyncio.new_event_loop):
                    break
                runs[way] = runs.get(way, 0) + 1
                asked = asked or run.asked
                unchecked.update(run.unchecked)
                slow += [(wait, run) for wait in run.waits]
                if run.found:
                    failed += 1
                    findings.append(f"{run.what()}: {'; '.join(run.found)}")
                    gc.collect()
                if failed == _ENOUGH:
                    findings.append(f"{way}: the moments after that were not tried")
                    break
            if slow:
                waited.append(_waited(way, runs[way], slow, _ENOUGH_WAITING * limit))
    finally:
        gc.collect()
        if collecting:
            gc.enable()
    if runs and not asked and not findings:
        findings.append("no run came as far as a request to the server: does it use the URL that it is given?")
    if findings:
        text = "".join(f"\n- {finding}" for finding in findings)
        raise TeardownFailure(f"{name} does not end cleanly ({sum(runs.values())} runs):{text}", findings)
    report = TeardownReport(runs, tuple(waited), tuple(sorted(unchecked)))
    _warn(name, report)
    return report


def _seconds(slow: Sequence[tuple[Wait, "_Run"]]) -> float:
    return sum(wait.seconds for wait, _ in slow)


def _waited(way: str, runs: int, slow: Sequence[tuple[Wait, "_Run"]], enough: float) -> str:
    longest, run = max(slow, key=lambda entry: entry[0].seconds)
    count = len({id(run) for _, run in slow})
    text = f"{way}: {count} of {runs} runs; {longest.seconds:.2f} s at most ({run.what()}), for {longest.what}"
    return text if _seconds(slow) <= enough else f"{text}; after {enough:g} s of waiting most moments were left out"


def _warn(name: str, report: TeardownReport) -> None:
    # The test is behind check_teardown().
    if report.waited:
        text = "".join(f"\n- {line}" for line in report.waited)
        warnings.warn(f"{name} ends cleanly, but not at once:{text}", LeakCheckWarning, stacklevel=3)
    if FDS_UNTOLD in report.unchecked:
        warnings.warn(f"not checked: {FDS_UNTOLD}", LeakCheckWarning, stacklevel=3)


@dataclass(frozen=True)
class _Moment:
    """When to stop a call: so many rounds of the loop after something was seen."""

    after: str
    ticks: int

    def __str__(self) -> str:
        return f"{self.ticks} rounds of the loop after {self.after}"


def _signature(make_call: MakeCall) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        # Annotations are evaluated when they are asked for, and a name may be there for the type checker only.
        return inspect.signature(make_call, annotation_format=Format.FORWARDREF)
    return inspect.signature(make_call)


def _moments(way: str, ticks: int) -> Iterator[tuple[_Moment, int]]:
    few = min(ticks, 8)
    for after, count in (("its start", ticks), ("the request had come", few), ("the answer had begun", few)):
        for tick in range(count):
            for gap in _GAPS if way == "cancel twice" else (0,):
                yield _Moment(after, tick), gap


@dataclass
class _Run:
    """One call, on its own loop and server, and its stop."""

    make_call: MakeCall
    takes_token: bool
    make_server: Callable[[], FakeOllama]
    way: str
    moment: _Moment
    gap: int
    limit: float
    found: list[str] = field(default_factory=list[str])
    waits: list[Wait] = field(default_factory=list[Wait])
    unchecked: tuple[str, ...] = ()
    asked: bool = False
    _token: CancelToken = field(default_factory=CancelToken)
    # When "asyncio.timeout" is due; its scope, once the task is in it; whether that has let its TimeoutError out.
    _due: float | None = None
    _scope: asyncio.Timeout | None = None
    _leave: bool = False
    _landed: int = 0

    def what(self) -> str:
        again = f", and again {self.gap} rounds later" if self.way == "cancel twice" else ""
        return f"{self.way}, {self.moment}{again}"

    def go(self, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> bool:
        """Do it; return False if the call cannot be stopped in that way."""
        if self.way.startswith("abort") and not self.takes_token:
            return False
        with self.make_server() as server:
            loop = new_loop()
            try:
                made = self.make_call(server.url, **({"token": self._token} if self.takes_token else {}))
                if self.way in ("aclose", "leave the loop") and not _iterable(
                    made, closed_by_others=self.way == "aclose"
                ):
                    _drop(made)
                    return False
                # In the loop: uvloop opens some descriptors when it first runs.
                watch = loop.run_until_complete(self._watch(server))
                self.unchecked = watch.unchecked
                task = loop.create_task(self._call(made))
                with task_groups.watched(task) as forgotten:
                    loop.run_until_complete(self._stop(server, task, made))
                del made
                if self.way == "loop shutdown":
                    self._shut_down(loop)
                    self.found += self._settle_outside(watch)
                else:
                    self._judge(task, forgotten())
                    # Both hold the exception, with the frames that it came through.
                    self._scope = None
                    del task
                    self.found += loop.run_until_complete(watch.settle(self.limit))
                    self.waits += [watch.wait] if watch.wait is not None else []
                    self._shut_down(loop)
                self.asked = bool(server.requests)
            finally:
                loop.close()
        return True

    async def _watch(self, server: FakeOllama) -> Watch:
        return Watch(asyncio.get_running_loop(), servers=[server], tokens=[self._token])

    async def _call(self, made: Any) -> None:
        if self.way == "asyncio.timeout":
            async with asyncio.timeout_at(self._due) as self._scope:
                await self._use(made)
        else:
            await self._use(made)

    async def _use(self, made: Any) -> None:
        if not hasattr(made, "__aiter__"):
            await made
        elif inspect.isasyncgen(made):
            async with aclosing(made):
                await self._read(made)
        else:
            await self._read(made)

    async def _read(self, made: AsyncIterable[Any]) -> None:
        async for _ in made:
            if self._leave:
                break

    async def _stop(self, server: FakeOllama, task: asyncio.Task[None], made: Any) -> None:
        await self._come_to_the_moment(server, task)
        if task.done() and not task.cancelled() and task.exception() is not None:
            self.found.append(f"it failed before it was stopped: it {_how(task.exception())}")
        await self._act(task, made)
        if self.way != "loop shutdown":
            await self._wait_for([task], self.limit)

    async def _wait_for(self, tasks: Iterable[asyncio.Task[Any]], limit: float) -> set[asyncio.Task[Any]]:
        """Wait until tasks have ended; return those that have not."""
        _, pending = await asyncio.wait(tasks, timeout=min(limit, AT_ONCE))
        if not pending or limit <= AT_ONCE:
            return pending
        what = ", ".join(f"{task_shown(task)}, which still ran" for task in pending)
        started = time.monotonic()
        _, pending = await asyncio.wait(pending, timeout=limit - AT_ONCE)
        self.waits.append(Wait(AT_ONCE + time.monotonic() - started, what))
        return pending

    async def _come_to_the_moment(self, server: FakeOllama, task: asyncio.Task[None]) -> None:
        deadline = time.monotonic() + _WAIT_FOR_ANSWER
        if self.moment.after != "its start":
            answered = self.moment.after == "the answer had begun"
            while not task.done() and time.monotonic() < deadline:
                if server.requests and (not answered or any(record.bytes_sent for record in server.connections)):
                    break
                await asyncio.sleep(0)
        for _ in range(self.moment.ticks):
            await asyncio.sleep(0)

    async def _act(self, task: asyncio.Task[None], made: Any) -> None:
        match self.way:
            case "abort":
                self._token.abort("check_teardown")
            case "abort from a thread":
                thread = threading.Thread(target=self._token.abort, args=["check_teardown"])
                thread.start()
                thread.join()
            case "cancel":
                self._landed += task.cancel()
            case "cancel twice":
                self._landed += task.cancel()
                for _ in range(self.gap):
                    await asyncio.sleep(0)
                self._landed += task.cancel()
            case "asyncio.timeout":
                self._due = asyncio.get_running_loop().time()
                if self._scope is not None and not task.done():
                    self._scope.reschedule(self._due)
            case "aclose":
                await self._close(made)
            case _:
                self._leave = True

    async def _close(self, made: Any) -> None:
        started = time.monotonic()
        scope = asyncio.timeout(self.limit)
        try:
            async with scope:
                await made.aclose()
        except TimeoutError:
            if not scope.expired():
                raise
            self.found.append(f"aclose() did not return within {self.limit:g} s")
        else:
            seconds = time.monotonic() - started
            if seconds >= AT_ONCE:
                self.waits.append(Wait(seconds, "its aclose()"))

    def _judge(self, task: asyncio.Task[None], forgotten: int) -> None:
        if not task.done():
            self.found.append(f"it still runs {self.limit:g} s later")
            return
        ended = "was cancelled" if task.cancelled() else _how(task.exception())
        if self._landed and not task.cancelled():
            self.found.append(f"it swallowed its cancellation: it {ended}")
        expired = self._scope is not None and self._scope.expired()
        # A cancellation that a task group has forgotten keeps asyncio.timeout() from knowing its own.
        excused = forgotten and task.cancelled()
        if expired and not excused and (task.cancelled() or not isinstance(task.exception(), TimeoutError)):
            self.found.append(f"it swallowed the cancellation by asyncio.timeout(): it {ended}")
        if not 0 <= task.cancelling() - self._landed <= forgotten:
            self.found.append(f"task.cancelling() is {task.cancelling()} in the end, and not {self._landed}")

    def _settle_outside(self, watch: Watch) -> list[str]:
        # The loop is closed: what the server has not seen by now, it has only not got round to.
        started = time.monotonic()
        before: list[str] = []
        while (found := watch.left_outside()) and time.monotonic() < started + self.limit:
            before = found
            time.sleep(0.001)
        seconds = time.monotonic() - started
        if not found and seconds >= AT_ONCE:
            self.waits.append(Wait(seconds, "; ".join(before)))
        return found

    def _shut_down(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do as `asyncio.run()` does in the end, but for ever waiting for a task that will not be cancelled."""
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            if self.way == "loop shutdown":
                pending = loop.run_until_complete(self._wait_for(tasks, self.limit))
                if pending:
                    self.found.append(f"it still runs {self.limit:g} s after it was cancelled")
            else:
                _, pending = loop.run_until_complete(asyncio.wait(tasks, timeout=_STOP_STUBBORN))
            for task in tasks - pending:
                if not task.cancelled():
                    task.exception()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())


def _iterable(made: object, *, closed_by_others: bool) -> bool:
    if not hasattr(made, "__aiter__"):
        return False
    # Another task's aclose() of an async generator that is running is refused by Python itself.
    return not closed_by_others or (hasattr(made, "aclose") and not inspect.isasyncgen(made))


def _drop(made: object) -> None:
    if inspect.iscoroutine(made):
        made.close()
    elif inspect.isasyncgen(made):
        with suppress(StopIteration):
            cast("AsyncGenerator[Any, None]", made).aclose().send(None)


def _how(error: BaseException | None) -> str:
    return "ended normally" if error is None else f"raised {type(error).__name__}: {error}"
