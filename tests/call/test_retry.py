"""Requests that are sent again: when, how often, and how that is stopped."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, cast

import pytest
from teardown.harness import BOUND, registrations, until

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectError,
    ConnectionBroken,
    NotFoundError,
    PhaseTimeout,
    RateLimitError,
    RequestError,
    ResponseError,
    ServerBusyError,
    StreamError,
    Timeouts,
)
from ollama_async._call import call as _call
from ollama_async._call import retry as _retry
from ollama_async._call.retry import RetryBudget
from ollama_async._errors import response_error
from ollama_async.testing import Cut, FakeOllama, Gate, Reply

BUSY = Reply.error(503, "server busy, please try again.  maximum pending requests exceeded")
HI = Reply.json({"model": "fake", "message": {"role": "assistant", "content": "hi"}, "done": True})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_DELAY", 0.001)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[RetryBudget]:
    """Pauses are longer than any test waits: who gets on has not waited for it. Returns a list of those begun."""
    monkeypatch.setattr(_retry, "_FIRST_DELAY", 10 * BOUND)
    monkeypatch.setattr(_retry, "_LONGEST_DELAY", 10 * BOUND)
    begun: list[RetryBudget] = []
    monkeypatch.setattr(RetryBudget, "record_failure", lambda self: begun.append(self))
    return begun


Call = Callable[[AsyncClient, Any], Awaitable[Any]]


def plain(client: AsyncClient, **call: Any) -> Awaitable[Any]:
    return client.chat("fake", "hi", **call)


def streamed(client: AsyncClient, **call: Any) -> Awaitable[Any]:
    return client.chat("fake", "hi", stream=True, **call).collect()


both = pytest.mark.parametrize("ask", [plain, streamed])


@both
@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.usefixtures("quick")
async def test_a_passing_failure_is_tried_again(fake_ollama: FakeOllama, ask: Any, status: int) -> None:
    fake_ollama.script("/api/chat", *[Reply.error(status, "not now")] * 2, HI)
    async with AsyncClient(fake_ollama.url, retries=2) as client:
        reply = await ask(client)
    assert reply.done
    assert reply.status_code == 200
    assert len(fake_ollama.requests) == 3
    assert len({request.body for request in fake_ollama.requests}) == 1


@both
@pytest.mark.usefixtures("quick")
async def test_the_last_failure_is_raised(fake_ollama: FakeOllama, ask: Any) -> None:
    fake_ollama.script("/api/chat", BUSY, always=True)
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ServerBusyError):
            await ask(client, retries=3)
        assert len(fake_ollama.requests) == 4
        with pytest.raises(ServerBusyError):
            await ask(client)
        assert len(fake_ollama.requests) == 5


@both
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 499, 500])
@pytest.mark.usefixtures("slow")
async def test_other_errors_are_not_tried_again(fake_ollama: FakeOllama, ask: Any, status: int) -> None:
    fake_ollama.script("/api/chat", Reply.error(status, "no"))
    async with AsyncClient(fake_ollama.url, retries=5) as client:
        with pytest.raises(ResponseError) as caught:
            await ask(client)
    assert caught.value.status_code == status
    assert len(fake_ollama.requests) == 1


@both
@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_before_the_answer_is_tried_again(fake_ollama: FakeOllama, ask: Any) -> None:
    fake_ollama.script("/api/chat", Reply([], before_head=[Cut()]), HI)
    async with AsyncClient(fake_ollama.url, retries=1) as client:
        assert (await ask(client)).done
    assert len(fake_ollama.requests) == 2


@pytest.mark.usefixtures("slow")
async def test_nothing_is_tried_again_once_the_answer_has_begun(fake_ollama: FakeOllama) -> None:
    broken = Reply([*Reply.chat("Good", done=False).steps, Cut()])
    failed = Reply([*Reply.chat("Good", done=False).steps, {"error": "out of memory"}])
    fake_ollama.script("/api/chat", broken, failed)
    async with AsyncClient(fake_ollama.url, retries=5) as client:
        with pytest.raises(ConnectionBroken) as caught:
            await streamed(client)
        assert caught.value.partial.message.content == "Good"
        with pytest.raises(StreamError):
            await streamed(client)
    assert len(fake_ollama.requests) == 2


@both
@pytest.mark.usefixtures("quick")
async def test_a_server_that_is_not_there_yet(ask: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}", retries=2) as client:
        with pytest.raises(ConnectError):
            await ask(client)


@both
@pytest.mark.parametrize("way", ["token", "client", "thread", "cancel", "total", "close"])
async def test_s22_the_pause_between_two_attempts_can_be_ended(
    fake_ollama: FakeOllama, slow: list[RetryBudget], ask: Any, way: str
) -> None:
    fake_ollama.script("/api/chat", BUSY, always=True)
    token = CancelToken()
    limits = Timeouts(total=0.3 if way == "total" else None)
    client = AsyncClient(fake_ollama.url, retries=5)
    task = asyncio.create_task(_as_coroutine(ask(client, token=token, timeout=limits)))
    await until(lambda: bool(slow), "the pause")
    expected: type[BaseException] = AbortError
    if way == "token":
        token.abort("stop")
    elif way == "client":
        client.abort("stop")
    elif way == "thread":
        thread = threading.Thread(target=token.abort, args=("stop",))
        thread.start()
        thread.join(BOUND)
    elif way == "cancel":
        task.cancel()
        expected = asyncio.CancelledError
    elif way == "total":
        expected = PhaseTimeout
    else:
        await client.aclose()
        expected = RuntimeError
    with pytest.raises(expected):
        await asyncio.wait_for(asyncio.shield(task), BOUND)
    assert len(fake_ollama.requests) == 1
    assert registrations(token) == 0
    await client.aclose()


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def test_s22_a_stream_that_waits_for_its_next_attempt_can_be_aborted(
    fake_ollama: FakeOllama, slow: list[RetryBudget]
) -> None:
    fake_ollama.script("/api/chat", BUSY, always=True)
    async with AsyncClient(fake_ollama.url, retries=5) as client:
        stream = client.chat("fake", "hi", stream=True)
        task = asyncio.create_task(stream.collect())
        await until(lambda: bool(slow), "the pause")
        assert stream.outcome is None
        assert stream.abort("stop")
        assert not stream.abort("again")
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(task, BOUND)
        assert (caught.value.reason, stream.outcome) == ("stop", "aborted")
        with pytest.raises(AbortError):
            await anext(stream)
    assert len(fake_ollama.requests) == 1


@pytest.mark.usefixtures("quick")
async def test_an_abort_that_meets_the_failure_is_not_lost(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt has failed, and no other one has followed yet: the abort ends the second one."""
    fake_ollama.script("/api/chat", BUSY)
    async with AsyncClient(fake_ollama.url, retries=5) as client:
        stream = client.chat("fake", "hi", stream=True)
        decided: list[bool] = []
        retry = _call.Call.retry

        def aborted_first(call: _call.Call, error: Any = None) -> Any:
            decided.extend((stream.abort("stop"), stream.abort("again")))
            return retry(call, error)

        monkeypatch.setattr(_call.Call, "retry", aborted_first)
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(stream.collect(), BOUND)
        assert (decided[:2], caught.value.reason) == ([True, False], "stop")
    assert len(fake_ollama.requests) == 1


@both
@pytest.mark.usefixtures("quick")
async def test_the_limit_of_the_whole_call_is_over_all_attempts(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    monkeypatch.setattr(_retry, "_LONGEST_DELAY", 0.01)
    fake_ollama.script("/api/chat", BUSY, always=True)
    async with AsyncClient(fake_ollama.url, retries=1_000_000) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await asyncio.wait_for(_as_coroutine(ask(client, timeout=1.0)), BOUND)
    assert caught.value.phase == "total"
    assert len(fake_ollama.requests) > 1


@pytest.mark.usefixtures("quick")
async def test_attempts_leave_nothing_behind(fake_ollama: FakeOllama) -> None:
    token = CancelToken()
    gc.disable()
    try:
        async with AsyncClient(fake_ollama.url, retries=2) as client:
            for _ in range(20):
                fake_ollama.script("/api/chat", BUSY, BUSY, HI)
                await streamed(client, token=token)
            assert registrations(token) == 0
            assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert len([record for record in fake_ollama.connections if record.open]) <= 1
    finally:
        gc.enable()


@pytest.mark.parametrize("value", [-1, True, 1.5, "2"])
async def test_a_wrong_number_of_retries_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="retries="):
        AsyncClient(retries=value)
    async with AsyncClient() as client:
        with pytest.raises(RequestError, match="retries="):
            await client.version(retries=value)


# -- when --


def with_headers(status: int, **headers: str) -> ResponseError:
    error = response_error("no", status)
    error.headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return error


def test_pauses_grow_up_to_a_limit() -> None:
    attempts = RetryBudget(10)
    delays = []
    for _ in range(10):
        delay = attempts.backoff(ConnectError(), answered=False)
        assert delay is not None
        delays.append(delay)
        attempts.record_failure()
    assert attempts.backoff(ConnectError(), answered=False) is None
    for place, delay in enumerate(delays):
        longest = min(8.0, 0.5 * 2**place)
        assert 0.75 * longest <= delay <= longest


def test_a_pause_stays_what_it_is_however_often_it_fails() -> None:
    attempts = RetryBudget(10**6)
    for _ in range(1100):
        attempts.record_failure()
    delay = attempts.backoff(ConnectError(), answered=False)
    assert delay is not None
    assert 6.0 <= delay <= 8.0


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("0", 0, 0), ("7", 7, 7), (formatdate(0, usegmt=True), 0, 0), ("soon", 0.375, 0.5), ("-1", 0.375, 0.5)],
)
def test_what_the_server_asks_for_counts(value: str, low: float, high: float) -> None:
    delay = RetryBudget(1).backoff(with_headers(429, retry_after=value), answered=True)
    assert delay is not None
    assert low <= delay <= high


def test_a_server_that_asks_for_too_much_is_not_waited_for() -> None:
    assert RetryBudget(1).backoff(with_headers(503, retry_after="3600"), answered=True) is None


def test_retry_after_as_a_date() -> None:
    delay = RetryBudget(1).backoff(
        with_headers(503, retry_after=formatdate(time.time() + 60, usegmt=True)), answered=True
    )
    assert delay is not None
    assert 50 < delay <= 60


@pytest.mark.parametrize(
    ("error", "plain", "resumed"),
    [
        (RateLimitError("x", 429), True, True),
        (NotFoundError("x", 404), False, False),
        (ConnectError(), True, True),
        (ConnectionBroken("x"), False, True),
        (PhaseTimeout("connect", 1), True, True),
        (PhaseTimeout("idle", 1), False, True),
        (PhaseTimeout("total", 1), False, False),
        (StreamError("max retries exceeded: EOF", 200), False, True),
        (StreamError("pull model manifest: file does not exist", 200), False, False),
        (AbortError("x"), False, False),
        (ValueError("x"), False, False),
    ],
)
def test_what_is_worth_another_attempt(error: BaseException, plain: bool, resumed: bool) -> None:
    assert (RetryBudget(1).backoff(error, answered=True) is not None) is plain
    assert (RetryBudget(0, resume=True).backoff(error, answered=True) is not None) is resumed


@pytest.mark.parametrize(("failures", "longest"), [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0)])
def test_a_pause_is_random_between_three_quarters_and_the_whole(
    monkeypatch: pytest.MonkeyPatch, failures: int, longest: float
) -> None:
    attempts = RetryBudget(10)
    for _ in range(failures):
        attempts.record_failure()
    for share in (0.75, 1.0):
        monkeypatch.setattr(_retry.random, "uniform", lambda low, high, share=share: (low, high).count(share) * share)
        assert attempts.backoff(ConnectError(), answered=False) == share * longest


def test_the_longest_pause_is_a_limit_and_not_only_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_DELAY", 3.0)
    attempts = RetryBudget(10)
    for _ in range(3):
        attempts.record_failure()
    assert 6.0 <= cast("float", attempts.backoff(ConnectError(), answered=False)) <= 8.0


@pytest.mark.parametrize("status", range(400, 600))
def test_these_statuses_pass(status: int) -> None:
    pause = RetryBudget(1).backoff(ResponseError("x", status), answered=True)
    assert (pause is not None) is (status in (429, 502, 503, 504))


@pytest.mark.parametrize(("asked", "pause"), [("119", 119.0), ("120", 120.0), ("121", None), (" 7 ", 7.0)])
def test_two_minutes_are_waited_if_the_server_asks_for_them(asked: str, pause: float | None) -> None:
    assert RetryBudget(1).backoff(with_headers(503, retry_after=asked), answered=True) == pause


def test_a_date_is_counted_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry.time, "time", lambda: 1000.0)
    for at, pause in ((1000.0, 0.0), (1001.0, 1.0), (990.0, 0.0), (1120.0, 120.0), (1121.0, None)):
        error = with_headers(503, retry_after=formatdate(at, usegmt=True))
        assert RetryBudget(1).backoff(error, answered=True) == pause, at


@pytest.mark.parametrize(
    "value",
    ["", "\u0664", "1.5", "Mon, 99 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT", ","],
)
def test_what_is_neither_seconds_nor_a_date_is_as_if_nothing_was_asked(value: str) -> None:
    pause = RetryBudget(1).backoff(with_headers(503, retry_after=value), answered=True)
    assert pause is not None
    assert 0.375 <= pause <= 0.5


def test_a_connection_that_broke_before_the_answer_may_be_tried_again() -> None:
    assert RetryBudget(1).backoff(ConnectionBroken("x"), answered=False) is not None


class ProxyError(Exception):
    pass


@pytest.mark.parametrize(
    ("cause", "again"),
    [(ProxyError("407 No"), False), (ProxyError("502 Bad"), True), (ValueError("4"), True), (None, True)],
)
def test_what_a_proxy_refuses_is_not_tried_again(cause: Exception | None, again: bool) -> None:
    error = ConnectError()
    error.__cause__ = cause
    assert (RetryBudget(1).backoff(error, answered=False) is not None) is again


@pytest.mark.parametrize(
    ("retries", "resume", "limit"), [(0, False, 0), (3, False, 3), (0, True, 8), (8, True, 8), (9, True, 9)]
)
def test_so_often_a_request_may_be_sent_again(retries: int, resume: bool, limit: int) -> None:
    attempts = RetryBudget.of(retries, resume=resume)
    assert attempts.limit == limit
    for _ in range(limit):
        assert attempts.remaining
        assert not attempts.exhausted
        attempts.record_failure()
    assert not attempts.remaining
    assert attempts.exhausted is not resume
    if limit:
        attempts.note_progress()
        for _ in range(limit):
            assert attempts.remaining
            attempts.record_failure()
        assert not attempts.remaining


def test_calls_without_retries_share_a_budget() -> None:
    assert RetryBudget.of(0, resume=False) is RetryBudget.of(0, resume=False)
    assert RetryBudget.of(1, resume=False) is not RetryBudget.of(1, resume=False)
    assert RetryBudget(1).exhausted is False


# -- pull(resume=True) --


def layer(completed: int | None, digest: str = "sha256:a", total: int = 100) -> dict[str, Any]:
    frame: dict[str, Any] = {"status": f"pulling {digest[-1]}", "digest": digest, "total": total}
    if completed is not None:
        frame["completed"] = completed
    return frame


START = {"status": "pulling manifest"}
SUCCESS = {"status": "success"}


@pytest.mark.usefixtures("quick")
async def test_a_pull_goes_on_after_it_has_broken_off(fake_ollama: FakeOllama) -> None:
    fake_ollama.script(
        "/api/pull",
        Reply([START, layer(None), layer(40), Cut()]),
        Reply.error(502, "bad gateway"),
        Reply([START, layer(None), layer(30), layer(60), {"error": "max retries exceeded: EOF"}]),
        Reply([START, layer(100), layer(None, "sha256:b", 300), layer(300, "sha256:b", 300), SUCCESS]),
    )
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.pull("m", stream=True, resume=True)
        steps = [step async for step in stream]
        assert stream.outcome == "done"
        assert steps[-1].status == "success"
        overall = [step.overall for step in steps]
        assert [progress.completed for progress in overall] == sorted(progress.completed for progress in overall)
        fractions = [progress.fraction for progress in overall if progress.fraction is not None]
        assert fractions == sorted(fractions)
        assert (overall[-1].completed, overall[-1].total, overall[-1].fraction) == (400, 400, 1.0)
    assert len(fake_ollama.requests) == 4


@pytest.mark.usefixtures("quick")
async def test_a_pull_that_is_awaited_resumes_as_well(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/pull", Reply([START, layer(1), Cut()]), Reply([START, layer(100), SUCCESS]))
    async with AsyncClient(fake_ollama.url) as client:
        last = await client.pull("m", resume=True)
    assert (last.status, last.overall.completed) == ("success", 100)


@pytest.mark.usefixtures("quick")
async def test_a_pull_that_gets_on_may_break_off_any_number_of_times(fake_ollama: FakeOllama) -> None:
    drops = [Reply([START, layer(done), Cut()]) for done in range(1, 31)]
    fake_ollama.script("/api/pull", *drops, Reply([START, layer(100), SUCCESS]))
    async with AsyncClient(fake_ollama.url) as client:
        assert (await client.pull("m", resume=True)).done
    assert len(fake_ollama.requests) == 31


@pytest.mark.usefixtures("quick")
async def test_the_last_attempt_of_a_pull_that_gets_on_is_not_the_last(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "_LONGEST_DELAY", 0.001)
    stuck = [Reply([START, layer(5), Cut()])] * 8
    fake_ollama.script("/api/pull", *stuck, Reply([START, layer(50), Cut()]), Reply([START, layer(100), SUCCESS]))
    async with AsyncClient(fake_ollama.url) as client:
        assert (await client.pull("m", resume=True)).done
    assert len(fake_ollama.requests) == 10


@pytest.mark.usefixtures("quick")
async def test_a_pull_that_does_not_get_on_is_given_up(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "_LONGEST_DELAY", 0.001)
    fake_ollama.script("/api/pull", Reply([START, layer(50), Cut()]), always=True)
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ConnectionBroken) as caught:
            await client.pull("m", resume=True)
    assert caught.value.partial.overall.completed == 50
    assert len(fake_ollama.requests) == 1 + 8


@pytest.mark.usefixtures("quick")
async def test_a_pull_of_what_is_not_there_is_not_resumed(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/pull", Reply([START, {"error": "pull model manifest: file does not exist"}]))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(StreamError, match="does not exist"):
            await client.pull("m", resume=True)
    assert len(fake_ollama.requests) == 1


async def test_a_pull_that_is_not_resumed_breaks_off(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/pull", Reply([START, layer(1), Cut()]))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ConnectionBroken):
            await client.pull("m", stream=True).collect()


@pytest.mark.usefixtures("quick")
async def test_a_resumed_pull_can_be_aborted(fake_ollama: FakeOllama) -> None:
    gate = Gate()
    fake_ollama.script("/api/pull", Reply([START, layer(1), Cut()]), Reply([START, layer(2), gate, SUCCESS]))
    async with AsyncClient(fake_ollama.url) as client:
        token = CancelToken()
        stream = client.pull("m", stream=True, resume=True, token=token)
        task = asyncio.create_task(stream.collect())
        await asyncio.to_thread(gate.wait_reached)
        await until(lambda: stream.timing.chunks == 4, "what came after the reconnect")
        token.abort("stop")
        assert fake_ollama.requests[1].connection.wait_left()
        with pytest.raises(AbortError) as caught:
            await asyncio.wait_for(task, BOUND)
        assert caught.value.partial.overall.completed == 2
        assert registrations(token) == 0
