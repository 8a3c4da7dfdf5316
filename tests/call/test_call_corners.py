"""Corners of `_cancel` and `_call` that no way to stop leads through: each step interrupted, each race lost."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import socket
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectError,
    RequestError,
    StreamBusy,
    StreamClosed,
    StreamTruncated,
    Timeouts,
    _cancel,
)
from ollama_async._call import observe
from ollama_async._call.awaitable import Guarded
from ollama_async._call.call import Call
from ollama_async._call.exchange import Exchange
from ollama_async._call.foreign import _WatchedUpload
from ollama_async._call.iterators import ClosingIterator
from ollama_async._call.retry import RetryBudget
from ollama_async._call.sender import Sender
from ollama_async._call.staged import StagedCall
from ollama_async._cancel import _Waker
from ollama_async._group import CallGroup
from ollama_async._loops import DeadlineTimer, in_loop, resolve
from ollama_async._wire.link import HIGH_WATER
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome, Framing
from ollama_async._wire.parser import Head
from ollama_async._wire.phase import Phase
from ollama_async._wire.reader import ResponseReader
from ollama_async.testing import FakeOllama, Reply, Stall
from ollama_async.testing._script import chat_frame
from ollama_async.until import max_seconds

BOUND = 20.0
ASK = [{"role": "user", "content": "Hi"}]


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, where a test wants it."""


@pytest.fixture
async def client(fake_ollama: FakeOllama) -> Any:
    async with AsyncClient(fake_ollama.url) as client:
        yield client


# -- tokens --


def test_a_registration_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    token = CancelToken()

    def interrupted(_: CancelToken) -> None:
        raise Interrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(CancelToken, "_decision", interrupted)
        token.on_abort(print)
    assert "0 registered" in repr(token)


def test_a_callback_that_could_not_be_called_is_called_by_the_next_abort() -> None:
    token, seen = CancelToken(), []
    registration = token.on_abort(seen.append)
    # As with a full stack: nothing of the callback is in the traceback. There is no room for so many bytes.
    registration._callback = bytes
    with pytest.raises(MemoryError):
        token.abort(1 << 60)
    registration._callback = seen.append
    assert not token.abort("again")
    assert seen == [1 << 60]


def test_a_callback_that_was_removed_as_it_could_not_be_called_stays_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    token = CancelToken()

    def full(_: object) -> None:
        registration._callback = None
        raise MemoryError

    registration = token.on_abort(full)
    # As with a full stack.
    monkeypatch.setattr("ollama_async._cancel._was_called", lambda _: False)
    with pytest.raises(MemoryError):
        token.abort()
    assert "0 registered" in repr(token)


def test_an_interrupt_out_of_an_abort_is_freed_without_the_collector() -> None:
    token, seen = CancelToken(), []

    def interrupted(_: object) -> None:
        raise Interrupt

    token.on_abort(interrupted)
    token.on_abort(seen.append)
    gc.disable()
    try:
        try:
            token.abort("stop")
        except Interrupt as exc:
            freed = weakref.ref(exc)
        assert seen == ["stop"]
        assert freed() is None
    finally:
        gc.enable()


def test_a_waker_whose_removal_is_interrupted_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    token, loop = CancelToken(), asyncio.new_event_loop()
    waker = _Waker(token, loop, print)
    waker.arm()
    removals = iter([Interrupt(), None])
    remove = _Waker.remove

    def interrupted(self: _Waker) -> bool:
        error = next(removals)
        if error is not None:
            raise error
        return remove(self)

    monkeypatch.setattr(_Waker, "remove", interrupted)
    with pytest.raises(Interrupt):
        waker.__exit__(None, None, None)
    assert "0 registered" in repr(token)
    loop.close()


@pytest.mark.parametrize(("seconds", "deadline"), [(1e9 - 0.5, True), (1e9, False), (1e9 + 0.5, False)])
def test_thirty_years_are_without_end(seconds: float, deadline: bool) -> None:
    assert (CancelToken.timeout(seconds)._deadline is not None) is deadline


@pytest.mark.parametrize("given", [True, False, "1", None, float("nan")])
def test_what_is_no_number_of_seconds_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="give a number of seconds"):
        CancelToken.timeout(given)


def test_a_copy_of_a_token_is_the_token_and_it_cannot_be_pickled() -> None:
    token = CancelToken()
    assert copy.copy(token) is copy.deepcopy(token) is token
    with pytest.raises(TypeError, match="cannot pickle 'CancelToken'"):
        pickle.dumps(token)


def test_a_deadline_has_passed_at_its_very_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(_cancel.time, "monotonic", lambda: now)
    token = CancelToken.timeout(2.5)
    now = 1002.4
    assert not token.aborted
    now = 1002.5
    assert token.aborted
    assert str(token.reason) == "the token's 2.5 s have passed"
    assert token._decision().order[0] == 1002.5  # type: ignore[union-attr]


def test_a_timer_that_fires_a_moment_early_by_a_coarse_clock_counts() -> None:
    token, seen = CancelToken.timeout(3600.0), []
    token.on_abort(seen.append)
    token._expire()
    assert token.aborted
    assert len(seen) == 1


@pytest.mark.parametrize("derived", [True, False])
def test_a_token_that_is_aborted_starts_no_timer(monkeypatch: pytest.MonkeyPatch, derived: bool) -> None:
    timed = CancelToken.timeout(3600.0)
    timed.abort("stop")
    monkeypatch.setattr(_cancel, "DeadlineTimer", None)
    seen: list[object] = []
    (timed.child() if derived else timed).on_abort(seen.append)
    assert seen == ["stop"]


async def test_a_block_under_a_token_that_is_aborted_does_not_begin() -> None:
    token, begun = CancelToken(), []
    token.abort("stop")
    with pytest.raises(AbortError), token.scope():
        begun.append(True)
    assert not begun


def test_what_leads_to_a_token_in_many_ways_is_asked_once() -> None:
    # Each level has two tokens, and both are derived from both of the level above: 2**60 ways lead up.
    roots = level = [CancelToken(), CancelToken()]
    for _ in range(60):
        level = [CancelToken.any(*level), CancelToken.any(*level)]
    last = CancelToken.any(*level)
    assert not last.aborted
    assert len(last._ancestors()) == 122
    seen: list[object] = []
    last.on_abort(seen.append)
    roots[1].abort("stop")
    assert seen == ["stop"]
    assert last.reason == "stop"


def test_calls_that_begin_at_once_may_be_under_two_tokens() -> None:
    group, aborted = CallGroup(), CancelToken()
    aborted.abort()
    group.tokens.append(aborted)
    current = group.current()
    assert not current.aborted
    assert group.tokens == [aborted, current]


# -- loops --


async def test_a_call_that_registers_as_its_client_is_closed_is_closed(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = CallGroup.current

    def closed_meanwhile(group: CallGroup) -> CancelToken:
        token = current(group)
        # By another thread, which finds no call on it.
        group.close("the client was closed")
        return token

    monkeypatch.setattr(CallGroup, "current", closed_meanwhile)
    with pytest.raises(StreamClosed, match="the client was closed"):
        await client.version()
    assert not fake_ollama.connections


async def test_a_block_under_a_client_may_close_it(client: AsyncClient) -> None:
    stream = client.chat("fake", ASK, stream=True)
    with client.scope():
        await stream.__aenter__()
        await client.aclose()
        await asyncio.sleep(0)
    assert stream.outcome == "closed"
    assert all(token._registrations == {} for token in client._calls.tokens)


def test_a_loop_that_refuses_a_call_although_it_is_open_is_not_passed_over() -> None:
    class Loop:
        def call_soon_threadsafe(self, *_: object) -> None:
            raise RuntimeError("no")

        def is_closed(self) -> bool:
            return False

    with pytest.raises(RuntimeError, match="no"):
        in_loop(Loop(), print)  # type: ignore[arg-type]


class Decided:
    """A future that something decides between the look and the deed."""

    def done(self) -> bool:
        return False

    def set_result(self, _: object) -> None:
        raise asyncio.InvalidStateError


def test_a_waiter_that_is_cancelled_in_between_is_left_alone() -> None:
    resolve(Decided())  # type: ignore[arg-type]


def test_a_timer_that_fires_as_it_is_cancelled_does_nothing() -> None:
    fired: list[int] = []
    timer = DeadlineTimer(0.0, lambda: fired.append(1))
    timer.cancel()
    timer._pass()
    assert not fired


# -- a guarded coroutine --


async def test_a_guarded_coroutine_is_an_iterator_and_takes_exceptions_in_parts() -> None:
    async def step() -> None:
        await asyncio.sleep(BOUND)

    for parts in ((ValueError,), (ValueError, "why"), (ValueError, ValueError("why"))):
        guarded = Guarded(step(), lambda: None, "step")
        assert iter(guarded) is guarded
        with pytest.raises(ValueError, match="why" if len(parts) > 1 else "^$"):
            guarded.throw(*parts)


# -- calls --


async def test_a_stream_without_a_token_has_one_that_ends_it(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    for opened in (False, True):
        fake_ollama.script("/api/chat", Reply([*_first(), Stall()]))
        stream = client.chat("fake", ASK, stream=True)
        if opened:
            await anext(stream)
        token = stream.token
        assert stream.token is token
        assert token.abort("stop")
        with pytest.raises(AbortError):
            await anext(stream)
        assert stream.outcome == "aborted"


def _first() -> Iterator[bytes]:
    yield b'{"model":"fake","message":{"role":"assistant","content":"a"},"done":false}\n'


async def test_an_abort_after_the_end_does_not_retry(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a"))
    stream = client.chat("fake", ASK, stream=True, retries=1)
    assert stream.reason is None
    await stream.collect()
    assert not stream.abort("late")
    assert (stream.outcome, stream.reason) == ("done", None)


class Attempt:
    """Stands for an exchange of a call."""

    def __init__(self, registered: Callable[[], None] = lambda: None) -> None:
        self.reader = self
        self.budget = self
        self.limit = self.remaining = 1
        self.observed = None
        self.outcome: ExchangeOutcome | None = None
        self.registered = registered

    @property
    def failure_outcome(self) -> ExchangeOutcome | None:
        return self.outcome

    def error(self) -> BaseException:
        return httpx.ConnectError("refused")

    def backoff(self, _: BaseException) -> float:
        return 0.0

    def register(self, *_: object) -> None:
        self.registered()

    def close(self, outcome: ExchangeOutcome) -> None:
        self.outcome = self.outcome or outcome

    def close_threadsafe(self, outcome: ExchangeOutcome) -> bool:
        first = self.outcome is None
        self.close(outcome)
        return first


def test_an_abort_between_two_attempts_ends_the_one_that_another_thread_makes_meanwhile() -> None:
    failed, new = Attempt(), Attempt()
    call = Call(lambda: (failed, ()))  # type: ignore[arg-type,return-value]
    call._start()
    failed.outcome = ExchangeOutcome("error")

    def backoff(_: BaseException) -> float:
        # The loop's thread is just through with making it.
        call.exchange = new  # type: ignore[assignment]
        return 0.0

    failed.backoff = backoff  # type: ignore[method-assign]
    stop = ExchangeOutcome("aborted", "stop")
    assert call.close_threadsafe(stop)
    assert new.outcome is stop


def test_an_abort_that_finds_no_attempt_ends_the_first_one_as_it_is_registered() -> None:
    stop = ExchangeOutcome("aborted", "stop")
    attempt = Attempt(lambda: call._outcome_between.try_set(stop) and None)
    call = Call(lambda: (attempt, ()), CancelToken())  # type: ignore[arg-type,return-value]
    call._start()
    assert attempt.outcome is stop


def test_an_attempt_whose_registration_is_interrupted_is_closed() -> None:
    def interrupted() -> None:
        raise Interrupt

    attempt = Attempt(interrupted)
    call = Call(lambda: (attempt, ()), CancelToken())  # type: ignore[arg-type,return-value]
    with pytest.raises(Interrupt):
        call._start()
    assert attempt.outcome is not None
    assert attempt.outcome.kind == "cancelled"


# -- streams --


@pytest.mark.parametrize(
    ("streaming", "status", "framing"),
    [
        (True, 200, Framing.LINES),
        (True, 299, Framing.LINES),
        # Each byte of a page is progress, and none is the first line of the answer.
        (True, 300, Framing.PAGE),
        (True, 307, Framing.PAGE),
        (True, 404, Framing.PAGE),
        (False, 200, Framing.WHOLE),
        (False, 299, Framing.WHOLE),
        # It arrives as a whole, and is not the answer.
        (False, 300, Framing.PAGE),
        (False, 399, Framing.PAGE),
        (False, 400, Framing.WHOLE),
    ],
)
async def test_the_head_tells_what_the_body_is_made_of(streaming: bool, status: int, framing: Framing) -> None:
    exchange = _attempt(streaming=streaming)
    exchange.head_arrived(Head(status))
    assert exchange.reader.body_form.framing is framing
    exchange.reader.close(ExchangeOutcome("closed"))


async def test_silence_counts_from_the_last_line_and_not_while_reading_is_paused() -> None:
    exchange = _attempt(Timeouts(connect=None, idle=10.0))
    reader, now = exchange.reader, exchange.loop.time()
    reader.enter(Phase.WAITING)
    for at in (now - 9.0, now - 4.0):
        reader.received_at = at
        if not reader.status:
            reader.feed_head(Head(200))
        reader.feed_data(b"{}\n")
    assert exchange._due() == (now + 6.0, "idle")
    reader.received_at = now - 3600.0
    reader.feed_data(b"x" * HIGH_WATER + b"\n")
    assert reader.paused
    due = exchange._due()
    assert due is not None
    assert due[0] >= now + 10.0
    reader.close(ExchangeOutcome("closed"))


async def test_an_abort_in_a_pause_leaves_no_timer_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = _attempt().again(3600.0)
    timers: list[asyncio.TimerHandle] = []
    call_at = exchange.loop.call_at

    def noted(*arguments: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(call_at(*arguments, **options))
        return timers[-1]

    monkeypatch.setattr(exchange.loop, "call_at", noted)
    task = asyncio.create_task(exchange.open())
    while not exchange.reader.is_read:
        await asyncio.sleep(0)
    assert exchange.reader.close_threadsafe(ExchangeOutcome("aborted"))
    with pytest.raises(ExchangeEnded):
        await asyncio.wait_for(task, BOUND)
    assert len(timers) > 0
    assert all(timer.cancelled() for timer in timers)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_refused_connection_is_an_error_to_the_outcome(streaming: bool) -> None:
    with socket.socket() as sock:
        # Bound and not listening: it refuses, and nobody else gets the port.
        sock.bind(("127.0.0.1", 0))
        async with AsyncClient(f"http://127.0.0.1:{sock.getsockname()[1]}") as client:
            stream = client.chat("fake", ASK, stream=True)
            with pytest.raises(ConnectError):
                await (stream.collect() if streaming else anext(stream))
    assert stream.outcome == "error"
    assert stream.status_code is None


def _attempt(timeouts: Timeouts | None = None, *, streaming: bool = True) -> Exchange:
    request = SimpleNamespace(discard=lambda **_: None)
    return Exchange(
        Sender(cast("Any", None), None, CallGroup()),
        cast("Any", request),
        streaming=streaming,
        timeouts=timeouts or Timeouts.of(None),
        budget=RetryBudget(1),
    )


async def test_a_stream_is_read_in_its_own_loop_only(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", Reply([*_first(), Stall()]))
    stream = client.chat("fake", ASK, stream=True)
    await anext(stream)

    async def read() -> None:
        with pytest.raises(StreamBusy, match="another event loop"):
            await anext(stream)

    await asyncio.wait_for(asyncio.to_thread(asyncio.run, read()), BOUND)
    assert stream.outcome is None
    await stream.aclose()


async def test_a_strict_stream_that_was_truncated_says_so_each_time(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([*_first()]))
    async with AsyncClient(fake_ollama.url, strict=True) as client:
        stream = client.chat("fake", ASK, stream=True)
        await anext(stream)
        for _ in range(2):
            with pytest.raises(StreamTruncated):
                await anext(stream)


async def test_an_abort_that_comes_as_the_last_chunk_is_taken_wins(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ResponseReader.commit

    def aborted_first(reader: ResponseReader) -> bool:
        # By another thread.
        reader.close_threadsafe(ExchangeOutcome("aborted", "stop"))
        return commit(reader)

    monkeypatch.setattr(ResponseReader, "commit", aborted_first)
    fake_ollama.script("/api/chat", Reply.chat("a"))
    stream = client.chat("fake", ASK, stream=True)
    with pytest.raises(AbortError) as caught:
        await stream.collect()
    assert (caught.value.reason, stream.outcome, stream.text) == ("stop", "aborted", "a")


async def test_a_chunk_whose_merge_is_interrupted_is_merged_once(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", Reply([*_first(), Stall()]))
    stream = client.chat("fake", ASK, stream=True)
    answer = stream._reader.answer
    add, errors = answer.add, iter([Interrupt()])

    def interrupted(chunk: Any) -> None:
        for error in errors:
            raise error
        add(chunk)

    answer.add = interrupted
    with pytest.raises(Interrupt):
        await anext(stream)
    await stream.aclose()
    assert stream.text == "a"


async def test_an_error_in_until_closes_the_stream(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", Reply([*_first(), Stall()]))

    def until(_: object) -> bool:
        raise ZeroDivisionError

    stream = client.chat("fake", ASK, stream=True, until=until)
    with pytest.raises(ZeroDivisionError):
        await anext(stream)
    assert stream.outcome == "closed"
    assert "its until= raised an error" in str(stream.reason)
    (record,) = fake_ollama.requests
    assert await asyncio.to_thread(record.connection.wait_left, BOUND)


@pytest.mark.parametrize("error", [Interrupt, ZeroDivisionError])
async def test_a_dropped_stream_whose_closing_is_interrupted_is_closed(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    fake_ollama.script("/api/chat", Reply([*_first(), Stall()]))
    stream = client.chat("fake", ASK, stream=True)
    await anext(stream)
    errors = iter([error()])
    reader = stream._reader
    abandon = type(reader)._abandon

    def interrupted(self: Any, *kind: Any) -> None:
        for each in errors:
            raise each
        abandon(self, *kind)

    raised: list[Any] = []
    monkeypatch.setattr(type(reader), "_abandon", interrupted)
    monkeypatch.setattr("ollama_async._call.chunk_reader.raise_in_loop", lambda _, exc: raised.append(exc))
    if error is Interrupt:
        assert reader.dropped()
    else:
        with pytest.raises(error):
            reader.dropped()
    assert [type(each) for each in raised] == [Interrupt] * (error is Interrupt)
    assert stream.outcome == "closed"
    (record,) = fake_ollama.requests
    assert await asyncio.to_thread(record.connection.wait_left, BOUND)


async def test_an_iterator_of_an_unknown_caller_is_guarded(
    fake_ollama: FakeOllama, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_frame(_: int) -> None:
        raise ValueError

    fake_ollama.script("/api/chat", Reply.chat("a"))
    monkeypatch.setattr("ollama_async._call.iterators.sys", SimpleNamespace(_getframe=no_frame))
    stream = client.chat("fake", ASK, stream=True)
    assert type(aiter(stream)) is ClosingIterator
    assert [chunk.done async for chunk in client.chat("fake", ASK, stream=True)][-1]


# -- observers --


class Watching:
    """An observer that notes each end, and fails at each retry."""

    def __init__(self) -> None:
        self.ends: list[observe.CallEnd] = []
        self.headers: dict[str, str] = {}

    def __call__(self, *_: object, **__: object) -> Callable[[], Watching]:
        return lambda: self

    def retrying(self, error: BaseException, delay: float) -> None:
        raise ZeroDivisionError

    def ended(self, end: observe.CallEnd) -> None:
        self.ends.append(end)


@pytest.fixture
def watching() -> Iterator[Watching]:
    watching = Watching()
    observe.set_observer(watching)
    yield watching
    observe.set_observer(None)


def test_an_end_after_the_end_of_the_loop_is_told(watching: Watching) -> None:
    loop = asyncio.new_event_loop()
    parts: Any = {"sender": Sender(cast("Any", None), None, CallGroup()), "request": None, "streaming": True}

    async def begin() -> Exchange:
        return Exchange(**parts, timeouts=Timeouts(), budget=RetryBudget.of(0, resume=False))

    exchange = loop.run_until_complete(begin())
    exchange.observed = observe.Observed(watching, lambda: None)
    loop.close()
    assert exchange.reader.close_threadsafe(ExchangeOutcome("aborted", "late"))
    assert [end.outcome for end in watching.ends] == ["aborted"]


def test_an_observer_that_fails_within_work_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise ZeroDivisionError

    work = observe.ObservedWork(SimpleNamespace(scope=broken, headers={}))  # type: ignore[arg-type]
    with work.scope() as scope:
        assert scope is None
    assert "the observer failed within work" in caplog.text


async def test_an_end_is_told_once(fake_ollama: FakeOllama, client: AsyncClient, watching: Watching) -> None:
    stream = client.chat("fake", ASK, stream=True)
    await stream.collect()
    exchange = stream._reader.call.exchange
    assert exchange is not None
    exchange.report_end("error")
    exchange.discard_body_soon()
    assert [end.outcome for end in watching.ends] == ["done"]


async def test_an_observer_that_fails_at_a_retry_changes_nothing(
    fake_ollama: FakeOllama,
    client: AsyncClient,
    watching: Watching,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ollama_async._call.retry._FIRST_DELAY", 0.001)
    fake_ollama.script("/api/chat", Reply.json({"error": "busy"}, status=503), Reply.chat("a"))
    assert (await client.chat("fake", ASK, retries=1)).message.content == "a"
    assert "the observer failed at a retry" in caplog.text
    assert [end.outcome for end in watching.ends] == ["done"]


# -- limits, uploads, heads --


async def test_the_seconds_of_until_need_no_other_limit(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([chat_frame(0, "fake", content="a"), Stall()]))
    async with AsyncClient(fake_ollama.url, timeout=None) as client:
        stream = client.chat("fake", ASK, stream=True, until=max_seconds(0.05))
        assert (await asyncio.wait_for(stream.collect(), BOUND)).text == "a"
        assert stream.outcome == "until"


async def test_an_upload_that_ends_after_its_answer_has_begun_changes_no_phase() -> None:
    async def blocks() -> Any:
        yield b"a"

    reader = ResponseReader(asyncio.get_running_loop())
    upload = aiter(_WatchedUpload(reader, blocks()))
    assert await anext(upload) == b"a"
    reader.enter(Phase.BODY)
    with pytest.raises(StopAsyncIteration):
        await anext(upload)
    assert reader.phase is Phase.BODY


async def test_headers_that_a_client_gets_later_and_cannot_send_are_refused(
    fake_ollama: FakeOllama, client: AsyncClient
) -> None:
    # As programs do that were written for ollama-python.
    client._client.headers["X y"] = "a"
    with pytest.raises(RequestError, match="illegal header name"):
        await client.version()
    assert not fake_ollama.requests


async def test_a_look_at_the_answer_that_interrupts_another_look_merges_nothing_twice(
    fake_ollama: FakeOllama, client: AsyncClient
) -> None:
    fake_ollama.script("/api/chat", Reply([chat_frame(0, "fake", content="a"), Stall()]))
    stream = client.chat("fake", ASK, stream=True)
    await anext(stream)
    stream.abort()
    answer, exchange = stream._reader.answer, stream._reader.call.exchange
    assert exchange is not None
    answer._merging = True
    answer.absorb(exchange)
    assert not answer.absorbed
    answer._merging = False
    answer.absorb(exchange)
    assert answer.absorbed


# -- calls with stages --


def staged(failed: Any) -> StagedCall:
    """A call whose request has failed, in a loop that has not gone on since."""
    call = StagedCall({}, lambda _: lambda: (failed, ()), ())  # type: ignore[arg-type, return-value]
    call.exchange, call._began = failed, 1.0
    return call


def over(outcome: ExchangeOutcome | None) -> Any:
    budget = RetryBudget.of(0, resume=False)
    reader = SimpleNamespace(outcome=outcome, failure_outcome=outcome, close_threadsafe=lambda _: False)
    return SimpleNamespace(reader=reader, budget=budget, backoff=lambda _: None)


async def test_an_abort_in_another_thread_as_a_request_fails_ends_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = over(ExchangeOutcome("error", StreamTruncated("late")))
    call = staged(failed)
    steps = iter([StreamTruncated("late"), AbortError("stop")])

    async def attempts(self: Call, *_: object) -> None:
        error = next(steps)
        if isinstance(error, StreamTruncated):
            assert self.close_threadsafe(ExchangeOutcome("aborted", "stop"))
        raise error

    monkeypatch.setattr(Call, "_attempts", attempts)
    with pytest.raises(AbortError, match="stop"):
        await call.run(None, None)  # type: ignore[arg-type]
    assert call.exchange is None
    # It is over now.
    assert not call.close_threadsafe(ExchangeOutcome("aborted", "again"))


async def test_an_error_of_mending_a_request_without_an_outcome_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    call = staged(over(None))

    async def pause(*_: object) -> None:
        raise RequestError("no")

    monkeypatch.setattr(StagedCall, "_pause", pause)
    with pytest.raises(RequestError, match="no"):
        await call._mend(None, RequestError("why"))  # type: ignore[arg-type]
    assert call.exchange is not None
