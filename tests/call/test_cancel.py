"""``CancelToken`` by itself: no server, no client."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

import pytest

from ollama_async import AbortError, CancelToken, OllamaError, Timeouts, _cancel
from ollama_async._call import exchange as _exchange
from ollama_async._call.retry import RetryBudget
from ollama_async._call.sender import Sender
from ollama_async._errors import RequestError
from ollama_async._group import CallGroup
from ollama_async._wire.outcome import ExchangeOutcome

BOUND = 20.0


def registered(token: CancelToken) -> int:
    return len(token._registrations)


def timers(loop: asyncio.AbstractEventLoop) -> list[Any]:
    return [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]


def in_thread(function: Callable[[], Any]) -> Any:
    """Run in another thread, where no loop runs, and return or raise what came of it."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(BOUND)
    assert not thread.is_alive()
    if failure:
        raise failure[0]
    return result[0]


async def rounds(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


# -- the reason --


def test_s26_the_second_abort_is_a_no_op_and_the_first_reason_stays(token: CancelToken) -> None:
    assert (token.aborted, token.reason) == (False, None)
    assert token.abort("first") is True
    assert token.abort("second") is False
    assert token.abort() is False
    assert (token.aborted, token.reason) == (True, "first")


def test_s26_abort_without_a_reason_stays_without_one(token: CancelToken) -> None:
    assert token.abort() is True
    assert token.abort("late") is False
    assert (token.aborted, token.reason) == (True, None)
    with pytest.raises(AbortError, match=r"^aborted$"):
        token.raise_if_aborted()


@pytest.mark.parametrize("reason", [None, "", "a text", 0, False, ("a", 1), ValueError("an exception"), object()])
def test_s27_the_reason_is_the_very_object_and_each_consumer_gets_its_own_error(
    token: CancelToken, reason: object
) -> None:
    given: list[object] = []
    for _ in range(3):
        token.on_abort(given.append)
    token.raise_if_aborted()
    token.abort(reason)
    assert len(given) == 3
    assert all(one is reason for one in given)
    errors = []
    for _ in range(3):
        with pytest.raises(AbortError) as caught:
            token.raise_if_aborted()
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    assert all(error.reason is reason for error in errors)
    assert all(error.__cause__ is (reason if isinstance(reason, BaseException) else None) for error in errors)
    assert isinstance(errors[0], OllamaError)


def test_s27_an_exception_as_reason_is_not_raised_itself_and_collects_no_traceback(token: CancelToken) -> None:
    reason = ValueError("why")
    token.abort(reason)
    for _ in range(3):
        with pytest.raises(AbortError):
            token.raise_if_aborted()
    assert reason.__traceback__ is None


@pytest.mark.parametrize("order", ["any_first", "looked_at_late"])
@pytest.mark.parametrize("winner", [0, 1])
def test_s29_any_takes_the_reason_of_the_member_that_was_aborted_first(winner: int, order: str) -> None:
    members = CancelToken(), CancelToken()
    derived = CancelToken.any(*members)
    assert not derived.aborted
    members[winner].abort("first")
    if order == "any_first":
        assert derived.aborted
    members[1 - winner].abort("second")
    assert (derived.aborted, derived.reason) == (True, "first")
    assert CancelToken.any(*members).reason == "first"
    assert CancelToken.any(*reversed(members)).reason == "first"


@pytest.mark.parametrize("position", [0, 1, 2])
def test_s29_any_with_a_member_that_is_aborted_already_is_aborted_at_once(position: int) -> None:
    members = [CancelToken() for _ in range(3)]
    members[position].abort("before")
    seen: list[object] = []
    CancelToken.any(*members).on_abort(seen.append)
    assert seen == ["before"]
    assert [registered(member) for member in members] == [0, 0, 0]


@pytest.mark.parametrize("first", ["inner", "outer", "lone"])
def test_s29_nested_any_takes_the_first_reason_wherever_it_comes_from(first: str) -> None:
    tokens = {name: CancelToken() for name in ("inner", "outer", "lone")}
    nested = CancelToken.any(CancelToken.any(tokens["inner"], CancelToken()).child(), tokens["outer"])
    derived = CancelToken.any(nested, tokens["lone"])
    seen: list[object] = []
    derived.on_abort(seen.append)
    tokens[first].abort(first)
    for name in tokens:
        tokens[name].abort(f"late {name}")
    assert seen == [first]
    assert derived.reason == first
    assert [registered(one) for one in tokens.values()] == [0, 0, 0]


@pytest.mark.parametrize("looked", [False, True])
def test_s29_any_counts_a_deadline_from_when_it_passed_not_from_when_it_was_looked_at(looked: bool) -> None:
    deadline, member = CancelToken.timeout(0.001), CancelToken()
    derived = CancelToken.any(member, deadline)
    time.sleep(0.005)
    if looked:
        assert deadline.aborted
    member.abort("after the deadline")
    assert isinstance(derived.reason, TimeoutError)


def test_s29_any_takes_an_abort_that_came_before_the_deadline() -> None:
    deadline, member = CancelToken.timeout(0.3), CancelToken()
    derived = CancelToken.any(deadline, member)
    member.abort("before the deadline")
    time.sleep(0.31)
    assert isinstance(deadline.reason, TimeoutError)
    assert derived.reason == "before the deadline"


def test_s29_derived_tokens_do_not_touch_their_parents() -> None:
    one, other = CancelToken(), CancelToken()
    derived, child = CancelToken.any(one, other), one.child()
    assert derived.abort("derived") is True
    assert child.abort("child") is True
    assert not one.aborted
    assert not other.aborted
    assert one.abort("one") is True
    assert (derived.reason, child.reason) == ("derived", "child")


def test_s29_a_child_of_an_aborted_token_cannot_be_aborted_again(token: CancelToken) -> None:
    child, grandchild = token.child(), token.child().child()
    token.abort("parent")
    assert child.abort("own") is False
    assert grandchild.abort("own") is False
    assert (child.reason, grandchild.reason) == ("parent", "parent")


def test_s29_any_of_the_same_token_twice_runs_the_callback_once(token: CancelToken) -> None:
    seen: list[object] = []
    CancelToken.any(token, token).on_abort(seen.append)
    token.abort("once")
    assert seen == ["once"]
    assert registered(token) == 0


@pytest.mark.parametrize("arguments", [(), (None,), ("token",), (CancelToken(), 3)])
def test_any_refuses_anything_but_tokens(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError, match=r"CancelToken\.any\(\)"):
        CancelToken.any(*arguments)


# -- deadlines --


async def test_s30_a_deadline_fires_with_a_timeout_error_as_reason() -> None:
    loop = asyncio.get_running_loop()
    token = CancelToken.timeout(0.3)
    assert timers(loop) == []
    fired: asyncio.Future[object] = loop.create_future()
    token.on_abort(fired.set_result)
    assert len(timers(loop)) == 1
    reason = await asyncio.wait_for(fired, BOUND)
    assert isinstance(reason, TimeoutError)
    assert str(reason) == "the token's 0.3 s have passed"
    assert token.reason is reason
    assert token.abort("late") is False
    assert (timers(loop), registered(token)) == ([], 0)


async def test_s30_no_timer_is_left_when_the_users_are_done() -> None:
    loop = asyncio.get_running_loop()
    token = CancelToken.timeout(60)
    registrations = [token.on_abort(print), token.child().on_abort(print)]
    assert len(timers(loop)) == 2
    for registration in registrations:
        assert registration.remove() is True
    assert timers(loop) == []
    token.on_abort(lambda _: None)
    token.abort("before the time")
    assert (timers(loop), registered(token)) == ([], 0)
    assert token.reason == "before the time"


async def test_s30_no_timer_is_left_when_another_thread_removes_or_aborts() -> None:
    loop = asyncio.get_running_loop()
    token = CancelToken.timeout(60)
    removed = token.on_abort(print)
    token.on_abort(lambda _: None)
    assert in_thread(removed.remove) is True
    assert in_thread(token.abort) is True
    await rounds()
    assert (timers(loop), registered(token)) == ([], 0)


def test_s30_a_deadline_passes_without_any_loop() -> None:
    token = CancelToken.timeout(0.3)
    assert not token.aborted
    time.sleep(0.31)
    assert token.aborted
    assert isinstance(token.reason, TimeoutError)
    assert token.reason is token.reason
    with pytest.raises(AbortError):
        token.raise_if_aborted()


def test_s30_without_a_loop_the_callback_of_a_deadline_comes_in_a_thread() -> None:
    token = CancelToken.timeout(0.3)
    called = threading.Event()
    where: list[threading.Thread] = []

    def callback(_: object) -> None:
        where.append(threading.current_thread())
        called.set()

    token.on_abort(callback)
    assert called.wait(BOUND)
    assert where != [threading.current_thread()]
    where[0].join(BOUND)
    assert registered(token) == 0


def test_s30_without_a_loop_no_thread_is_left_when_the_users_are_done() -> None:
    before = threading.active_count()
    token = CancelToken.timeout(60)
    registrations = [token.on_abort(print) for _ in range(3)]
    assert threading.active_count() == before + 3
    for registration in registrations:
        registration.remove()
    deadline = time.monotonic() + BOUND
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_s30_a_deadline_over_two_loops_fires_once_a_registration() -> None:
    token = CancelToken.timeout(0.3)
    seen: list[str] = []

    def user(name: str) -> None:
        async def main() -> None:
            registration = token.on_abort(lambda _: seen.append(name))
            await asyncio.wait_for(token.wait(), BOUND)
            await rounds()
            assert registration.remove() is False
            assert timers(asyncio.get_running_loop()) == []

        asyncio.run(main())

    threads = [threading.Thread(target=user, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    assert sorted(seen) == ["one", "other"]
    assert registered(token) == 0


@pytest.mark.parametrize("seconds", [0, 0.0, -1, -1e9])
def test_s30_no_time_at_all_is_an_aborted_token(seconds: float) -> None:
    token = CancelToken.timeout(seconds)
    assert token.aborted
    assert token.abort("late") is False
    seen: list[object] = []
    token.on_abort(seen.append)
    assert [type(reason) for reason in seen] == [TimeoutError]


@pytest.mark.parametrize(
    "seconds", [pytest.param(sign * 10**size, id=f"{sign}e{size}") for sign in (1, -1) for size in (400, 5000)]
)
def test_s30_a_number_that_no_clock_has_is_refused(seconds: int) -> None:
    with pytest.raises(RequestError, match="give a number of seconds"):
        CancelToken.timeout(seconds)


@pytest.mark.parametrize("seconds", [1e10, float("inf")])
@pytest.mark.parametrize("looped", [True, False])
def test_s30_a_deadline_beyond_all_time_is_a_token_that_waits(seconds: float, looped: bool) -> None:
    async def use() -> None:
        touch()
        await rounds()

    def touch() -> None:
        token = CancelToken.timeout(seconds)
        registration = token.on_abort(print)
        time.sleep(0.01)
        assert not token.aborted
        assert registration.remove() is True

    failures: list[Any] = []
    before, threading.excepthook = threading.excepthook, failures.append
    try:
        if looped:
            asyncio.run(use())
        else:
            touch()
    finally:
        threading.excepthook = before
    assert failures == []


@pytest.mark.parametrize("seconds", [float("nan"), None, "soon"])
def test_s30_a_deadline_that_is_not_a_number_is_refused(seconds: Any) -> None:
    with pytest.raises((RequestError, TypeError, ValueError)):
        CancelToken.timeout(seconds)


async def test_s30_a_child_and_an_any_of_a_deadline_fire_with_it() -> None:
    deadline = CancelToken.timeout(0.02)
    reasons = await asyncio.wait_for(
        asyncio.gather(deadline.child().wait(), CancelToken.any(CancelToken(), deadline).wait()), BOUND
    )
    assert reasons == [deadline.reason, deadline.reason]
    assert timers(asyncio.get_running_loop()) == []


# -- nothing stays on long-lived tokens --


def test_s31_one_token_and_100_000_users_leave_nothing(token: CancelToken) -> None:
    for _ in range(100_000):
        token.on_abort(print).remove()
    assert registered(token) == 0


def test_s31_a_removed_callback_is_let_go(token: CancelToken) -> None:
    class User:
        def stop(self, _: object) -> None: ...

    gc.disable()
    try:
        user = User()
        seen = weakref.ref(user)
        registration = token.on_abort(user.stop)
        del user
        assert seen() is not None
        registration.remove()
        assert seen() is None
    finally:
        gc.enable()


def test_s31_a_called_callback_is_let_go(token: CancelToken) -> None:
    class User:
        def stop(self, _: object) -> None: ...

    gc.disable()
    try:
        user = User()
        seen = weakref.ref(user)
        registrations = [token.on_abort(user.stop), token.child().on_abort(user.stop)]
        del user
        token.abort()
        assert seen() is None
        assert [registration.remove() for registration in registrations] == [False, False]
    finally:
        gc.enable()


@pytest.mark.parametrize("out", ["fired", "removed", "dropped", "aborted_itself"])
def test_s32_derived_tokens_leave_nothing_on_a_long_lived_parent(token: CancelToken, out: str) -> None:
    gc.disable()
    try:
        for _ in range(10_000):
            short = CancelToken()
            derived = CancelToken.any(token, short)
            child = token.child()
            dead = weakref.ref(derived), weakref.ref(child)
            if out == "fired":
                derived.on_abort(id)
                short.abort()
                del child
            elif out == "removed":
                registrations = derived.on_abort(id), child.on_abort(id)
                assert registered(token) == 2
                for registration in registrations:
                    registration.remove()
                del registrations, registration
            elif out == "aborted_itself":
                derived.on_abort(id)
                child.on_abort(id)
                derived.abort()
                child.abort()
            assert registered(token) == 0
            del derived
            child = None
            assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()
    assert registered(token) == 0
    assert not token.aborted


def test_s32_a_parent_that_fires_leaves_nothing_on_the_other_one() -> None:
    one, other = CancelToken(), CancelToken()
    for _ in range(3):
        CancelToken.any(one, other).child().on_abort(id)
    assert (registered(one), registered(other)) == (3, 3)
    one.abort()
    assert (registered(one), registered(other)) == (0, 0)


# -- callbacks --


def test_callbacks_run_in_the_order_of_registration_before_abort_returns(token: CancelToken) -> None:
    seen: list[int] = []
    for number in range(5):
        token.on_abort(lambda _, number=number: seen.append(number))
    token.abort()
    assert seen == [0, 1, 2, 3, 4]


def test_callbacks_run_in_the_thread_that_aborts(token: CancelToken) -> None:
    where: list[int] = []
    token.on_abort(lambda _: where.append(threading.get_ident()))
    ident: list[int] = []
    in_thread(lambda: (ident.append(threading.get_ident()), token.abort()))
    assert where == ident


def test_reading_a_derived_token_does_not_take_the_callbacks_from_an_abort(
    token: CancelToken,
) -> None:
    """Else ``abort()`` would return before the sockets are shut down: the other thread may be anywhere."""
    child = token.child()
    token.on_abort(lambda _: in_thread(lambda: child.aborted))
    where: list[threading.Thread] = []
    child.on_abort(lambda _: where.append(threading.current_thread()))
    token.abort()
    assert where == [threading.current_thread()]


async def test_s33_a_callback_that_raises_is_reported_to_the_loop_and_the_others_run(token: CancelToken) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    error = ValueError("the callback's")

    def bad(_: object) -> None:
        raise error

    seen: list[object] = []
    token.on_abort(seen.append)
    token.on_abort(bad)
    token.on_abort(seen.append)
    assert token.abort("why") is True
    assert seen == ["why", "why"]
    assert [report["exception"] for report in reports] == [error]
    assert "bad" in reports[0]["message"]
    assert registered(token) == 0


def test_s33_without_a_loop_it_is_reported_as_unraisable(token: CancelToken, unraisable: list[Any]) -> None:
    def bad(_: object) -> None:
        raise ValueError("the callback's")

    seen: list[object] = []
    token.on_abort(bad)
    token.child().on_abort(bad)
    token.on_abort(seen.append)
    assert token.abort("why") is True
    token.on_abort(bad)
    assert seen == ["why"]
    assert [str(report.exc_value) for report in unraisable] == ["the callback's"] * 3
    assert "callback of a CancelToken raised" in unraisable[0].err_msg


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_s33_ctrl_c_in_a_callback_goes_on_after_all_others_have_run(
    token: CancelToken, error: type[BaseException]
) -> None:
    def interrupted(_: object) -> None:
        raise error

    seen: list[object] = []
    token.on_abort(seen.append)
    token.on_abort(interrupted)
    token.child().on_abort(interrupted)
    token.child().on_abort(seen.append)
    token.on_abort(seen.append)
    with pytest.raises(error):
        token.abort("why")
    assert seen == ["why", "why", "why"]
    assert (token.reason, registered(token)) == ("why", 0)


def test_s34_a_callback_may_abort_register_and_remove(token: CancelToken) -> None:
    seen: list[str] = []
    aborted: list[bool] = []

    def busy(_: object) -> None:
        seen.append("busy")
        aborted.append(token.abort("again"))
        token.on_abort(lambda reason: seen.append(f"late {reason}"))
        assert own.remove() is False

    own = token.on_abort(busy)
    token.on_abort(lambda _: seen.append("after"))
    assert token.abort("why") is True
    assert aborted == [False]
    # An abort() that comes second returns when all callbacks have been called, too.
    assert seen == ["busy", "after", "late why"]
    assert registered(token) == 0


def test_s34_registrations_that_register_again_come_to_an_end(token: CancelToken) -> None:
    seen: list[int] = []

    def again(_: object) -> None:
        seen.append(len(seen))
        if len(seen) < 10:
            token.child().on_abort(again)

    token.on_abort(again)
    token.abort()
    assert seen == list(range(10))
    assert registered(token) == 0


def test_s34_a_callback_may_abort_parents_and_children(token: CancelToken) -> None:
    child, other = token.child(), CancelToken()
    derived = CancelToken.any(child, other)
    seen: list[object] = []
    derived.on_abort(seen.append)
    derived.on_abort(lambda _: token.abort("from below"))
    child.on_abort(lambda _: other.abort("from the side"))
    assert derived.abort("own") is True
    assert (token.reason, child.reason, other.reason) == ("from below", "from below", "from the side")
    assert seen == ["own"]
    assert [registered(one) for one in (token, child, other, derived)] == [0, 0, 0, 0]


def test_s34_late_registration_runs_at_once(token: CancelToken) -> None:
    token.abort("why")
    seen: list[object] = []
    registration = token.on_abort(seen.append)
    assert seen == ["why"]
    assert registration.remove() is False


def test_s35_a_callback_that_is_removed_while_others_fire_is_not_called(token: CancelToken) -> None:
    seen: list[str] = []
    removed: list[bool] = []
    token.on_abort(lambda _: removed.append(later.remove()))
    later = token.on_abort(lambda _: seen.append("removed, and yet called"))
    token.abort()
    assert removed == [True]
    assert seen == []


def test_s35_remove_is_idempotent_and_tells_the_first_time_only(token: CancelToken) -> None:
    registration = token.child().on_abort(print)
    assert [registration.remove() for _ in range(3)] == [True, False, False]
    assert token.abort() is True
    assert registration.remove() is False


# -- threads --


def test_s37_of_50_threads_that_abort_at_once_one_decides(token: CancelToken) -> None:
    for _ in range(20):
        token = CancelToken()
        derived = CancelToken.any(token, CancelToken()).child()
        seen: list[object] = []
        for number in range(20):
            (token if number % 2 else derived).on_abort(seen.append)
        start = threading.Barrier(50)
        decided: list[int] = []

        def race(
            number: int, token: CancelToken = token, start: threading.Barrier = start, decided: list[int] = decided
        ) -> None:
            start.wait(BOUND)
            if token.abort(number):
                decided.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
        assert decided == [token.reason]
        assert seen == decided * 20
        assert derived.reason == token.reason
        assert registered(token) == 0


def test_s37_threads_that_register_and_remove_while_others_abort(switch_often: None) -> None:
    """Every callback is called exactly once, or ``remove()`` said that it will not be."""
    for _ in range(30):
        token = CancelToken()
        parent = CancelToken()
        derived = CancelToken.any(token, parent)
        called: list[int] = []
        prevented: list[int] = []
        failures: list[BaseException] = []
        numbers = itertools.count()
        start = threading.Barrier(6)

        def user(
            derived: CancelToken = derived,
            called: list[int] = called,
            prevented: list[int] = prevented,
            failures: list[BaseException] = failures,
            numbers: Iterator[int] = numbers,
            start: threading.Barrier = start,
        ) -> None:
            try:
                start.wait(BOUND)
                for number in itertools.islice(numbers, 40):
                    registration = derived.on_abort(lambda _, number=number: called.append(number))
                    if registration.remove():
                        prevented.append(number)
            except BaseException as exc:
                failures.append(exc)

        def stop(one: CancelToken, start: threading.Barrier = start, failures: list[BaseException] = failures) -> None:
            try:
                start.wait(BOUND)
                one.abort(one)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=user) for _ in range(4)]
        threads += [threading.Thread(target=stop, args=(one,)) for one in (token, parent)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
            assert not thread.is_alive()
        assert failures == []
        assert sorted(called + prevented) == list(range(next(numbers)))
        assert [registered(one) for one in (token, parent, derived)] == [0, 0, 0]


@pytest.fixture
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# -- loops --


def test_s39_abort_after_the_loop_is_closed_sets_the_flag_and_raises_nothing() -> None:
    token = CancelToken()
    deadline = CancelToken.timeout(60)
    loop = asyncio.new_event_loop()

    async def leave() -> None:
        waiting.append(asyncio.ensure_future(token.wait()))
        waiting.append(asyncio.ensure_future(deadline.wait()))
        await rounds()

    waiting: list[asyncio.Future[Any]] = []
    loop.run_until_complete(leave())
    tasks = list(waiting)
    loop.close()
    assert token.abort("late") is True
    assert deadline.abort("late") is True
    assert (token.reason, deadline.reason) == ("late", "late")
    for task in tasks:
        assert not task.done()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()  # type: ignore[attr-defined]
    assert (registered(token), registered(deadline)) == (0, 0)


def test_s39_abort_at_interpreter_exit_is_silent() -> None:
    program = """
import asyncio, atexit
from ollama_async import CancelToken
token = CancelToken.any(CancelToken(), CancelToken.timeout(60))
class Last:
    def __del__(self):
        assert token.abort("at exit") is False
last = Last()
def leave():
    assert token.abort("atexit") is True, token
    print("aborted", token.reason)
atexit.register(leave)
async def main():
    asyncio.get_running_loop().slow_callback_duration = 20.0  # on a busy machine -X dev would say what was slow
    asyncio.ensure_future(token.wait())
    await asyncio.sleep(0)
asyncio.run(main())
token.on_abort(lambda reason: print("called", reason))
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("called atexit\naborted atexit\n", "", 0)


def test_s40_a_token_wakes_the_waiters_of_two_loops_each_in_its_own(token: CancelToken) -> None:
    ready = threading.Barrier(3)
    woken: list[tuple[object, bool]] = []

    def user() -> None:
        async def main() -> None:
            waiter = asyncio.ensure_future(token.wait())
            await rounds()
            await asyncio.to_thread(ready.wait, BOUND)
            reason = await asyncio.wait_for(waiter, BOUND)
            woken.append((reason, waiter.get_loop() is asyncio.get_running_loop()))

        asyncio.run(main())

    threads = [threading.Thread(target=user) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(BOUND)
    assert token.abort("both") is True
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    assert woken == [("both", True), ("both", True)]
    assert registered(token) == 0


async def test_wait_returns_the_reason_and_at_once_when_aborted(token: CancelToken) -> None:
    waiters = [asyncio.ensure_future(one.wait()) for one in (token, token.child(), CancelToken.any(token))]
    await rounds()
    assert not any(waiter.done() for waiter in waiters)
    token.abort("why")
    assert await asyncio.wait_for(asyncio.gather(*waiters), BOUND) == ["why"] * 3
    assert await asyncio.wait_for(token.wait(), BOUND) == "why"
    assert registered(token) == 0


async def test_wait_wakes_a_loop_that_sleeps_when_another_thread_aborts(token: CancelToken) -> None:
    thread = threading.Timer(0.02, token.abort, ("from a thread",))
    thread.start()
    assert await asyncio.wait_for(token.wait(), BOUND) == "from a thread"
    thread.join()


@pytest.mark.parametrize("derived", [False, True])
async def test_s43_a_waiter_that_is_cancelled_leaves_the_token_as_it_was(token: CancelToken, derived: bool) -> None:
    waited = token.child() if derived else token
    waiter = asyncio.ensure_future(waited.wait())
    await rounds()
    assert registered(token) == 1
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not token.aborted
    assert (registered(token), registered(waited)) == (0, 0)


async def test_s43_cancelled_and_aborted_in_the_same_tick_is_cancelled_in_both_orders(token: CancelToken) -> None:
    for order in ("cancel first", "abort first"):
        token = CancelToken()
        waiter = asyncio.ensure_future(token.wait())
        await rounds()
        if order == "cancel first":
            waiter.cancel()
            token.abort()
        else:
            token.abort()
            waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert registered(token) == 0


async def test_s44_to_drop_a_token_aborts_nothing() -> None:
    gc.disable()
    try:
        token = CancelToken()
        child = token.child()
        seen: list[object] = []
        child.on_abort(seen.append)
        alive = weakref.ref(token)
        del token
        assert alive() is not None, "a child needs its parent"
        assert not child.aborted
        del child
        assert alive() is None or not alive().aborted  # type: ignore[union-attr]
    finally:
        gc.enable()
    gc.collect()
    assert seen == []


def test_the_repr_tells_the_state_and_shows_no_callback(token: CancelToken) -> None:
    token.on_abort(print)
    assert repr(token) == "<CancelToken open, 1 registered>"
    token.on_abort(id)
    token.abort("why")
    assert repr(token) == "<CancelToken aborted, reason='why', 0 registered>"


# -- every interleaving --


class World:
    """A token with one callback, and everything that somebody may do to it."""

    def __init__(self, kind: str) -> None:
        self.parent = CancelToken()
        self.other = CancelToken()
        if kind == "plain":
            self.token = CancelToken()
        elif kind == "child":
            self.token = self.parent.child()
        elif kind == "any":
            self.token = CancelToken.any(self.other, self.parent)
        else:
            self.token = CancelToken.any(CancelToken.timeout(3600), self.parent).child()
        self.called: list[object] = []
        self.late: list[object] = []
        # Lists: `+=` on a number is several bytecodes, between which a handler may come.
        self.registered: list[int] = []
        self.decided: list[str] = []
        self.removing = False
        self.prevented: list[int] = []
        self.too_late: list[str] = []
        self.registration = self.token.on_abort(self.called.append)

    def abort(self) -> None:
        self._aborted(self.token.abort("token"), "token")

    def abort_parent(self) -> None:
        self._aborted(self.parent.abort("parent"), "parent")

    def _aborted(self, decided: bool, who: str) -> None:
        if decided and who == "token":
            self.decided.append(who)
        if decided and not self.called and not self.removing and self.token.aborted:
            self.too_late.append(f"{who}.abort() returned before the callback had been called")

    def remove(self) -> None:
        self.removing = True
        if self.registration.remove():
            self.prevented.append(1)

    def register(self) -> None:
        self.registered.append(1)
        self.token.on_abort(self.late.append)

    def register_and_remove(self) -> None:
        assert self.token.on_abort(lambda _: None).remove() in (True, False)

    def look(self) -> None:
        assert self.token.aborted in (True, False)

    def check(self) -> None:
        """Whatever happened: one decided, each callback was called once with the one reason, or taken back."""
        self._aborted(self.token.abort("the end"), "token")
        reason = self.token.reason
        assert len(self.decided) == (0 if reason == "parent" else 1)
        assert len(self.prevented) <= 1
        assert self.called == ([] if self.prevented else [reason])
        assert self.late == [reason] * len(self.registered)
        assert [registered(one) for one in (self.token, self.parent, self.other)] == [0, 0, 0]


DOINGS = ["abort", "abort_parent", "remove", "register", "register_and_remove", "look"]


class Stepper:
    """Runs a function of a module up to its n-th bytecode there, does something else, and goes on."""

    def __init__(self, at: int, then: Callable[[], object], module: ModuleType = _cancel) -> None:
        self.left = at
        self._then = then
        self._file = module.__file__

    def run(self, function: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            function()
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                self._then()
        return self._trace


@pytest.mark.parametrize("kind", ["plain", "child", "any", "deadline"])
@pytest.mark.parametrize("inner", DOINGS)
@pytest.mark.parametrize("outer", DOINGS)
def test_a_signal_handler_may_come_between_any_two_bytecodes(kind: str, outer: str, inner: str) -> None:
    """Also twice: what comes in the middle is done whole, as a handler of a signal does it."""
    # A deadline without a loop is a thread, each time.
    for at in itertools.count(1, 7 if kind == "deadline" else 1):
        world = World(kind)
        stepper = Stepper(at, getattr(world, inner))
        try:
            stepper.run(getattr(world, outer))
            world.check()
        except BaseException as exc:
            exc.add_note(f"{inner}() in the middle of {outer}(), before bytecode {at}")
            raise
        if stepper.left > 0:
            # From 3.12 on fewer bytecodes are traced: of a frame that is new, or of one that has been left, none.
            assert at > 10 or sys.version_info >= (3, 12)
            return


PAIRS = [
    ("abort", "abort_parent"),
    ("abort", "register"),
    ("abort", "remove"),
    ("abort_parent", "abort"),
    ("abort_parent", "look"),
    ("abort_parent", "register"),
    ("abort_parent", "remove"),
    ("register_and_remove", "abort"),
    ("register_and_remove", "abort_parent"),
    ("remove", "abort"),
    ("remove", "abort_parent"),
    ("remove", "remove"),
]


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_a_second_thread_may_be_anywhere_at_the_same_time(outer: str, inner: str) -> None:
    """The outer one gets to a bytecode, the inner one starts and gets to one, the outer ends, then the inner."""
    step, inner_step = 3, 13
    for at in itertools.count(1, step):
        left = 0
        # Starts elsewhere for each outer position, so that all inner ones come by.
        for inner_at in range(1 + at // step % inner_step, 600, inner_step):
            world = World("any")
            left, inner_left, failures = _both(world, outer, inner, at, inner_at)
            try:
                assert failures == []
                world.check()
                # Two that abort at once share the work: only who has nobody beside him answers for all of it.
                if inner in ("look", "register"):
                    assert world.too_late == []
            except BaseException as exc:
                exc.add_note(f"{outer}() before bytecode {at}, {inner}() before bytecode {inner_at}")
                raise
            if left > 0 or inner_left > 0:
                break
        if left > 0:
            return


def _both(world: World, outer: str, inner: str, at: int, inner_at: int) -> tuple[int, int, list[BaseException]]:
    paused, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def inner_pauses() -> None:
        paused.set()
        assert go_on.wait(BOUND)

    inner_stepper = Stepper(inner_at, inner_pauses)

    def run_inner() -> None:
        try:
            inner_stepper.run(getattr(world, inner))
        except BaseException as exc:
            failures.append(exc)
        finally:
            paused.set()

    thread = threading.Thread(target=run_inner)

    def start_inner() -> None:
        thread.start()
        assert paused.wait(BOUND)

    stepper = Stepper(at, start_inner)
    try:
        stepper.run(getattr(world, outer))
    except BaseException as exc:
        failures.append(exc)
    go_on.set()
    if stepper.left <= 0:
        thread.join(BOUND)
        assert not thread.is_alive()
    return stepper.left, inner_stepper.left, failures


def test_a_storm_of_signals_while_tokens_are_used() -> None:
    """Real signals, wherever they come; each handler aborts the token that is in use."""
    current: list[World] = [World("any")]
    doings = itertools.cycle(["abort", "remove", "abort_parent", "register"])

    def handler(*_: object) -> None:
        getattr(current[0], next(doings))()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            world = World("any")
            current[0] = world
            world.register()
            world.register_and_remove()
            world.remove()
            world.abort_parent()
            # A mask would not do: it is of one thread, and another one of the process would get the signal.
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0)
            world.check()
            signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("meanwhile", ["commit", "close", "leave"])
@pytest.mark.parametrize("by", ["token", "own"])
async def test_a_thread_that_aborts_may_meet_the_reader_anywhere(
    unraisable: list[Any], by: str, meanwhile: str
) -> None:
    """The thread gets to a bytecode of the exchange, the reader ends it by itself, the thread goes on."""
    for at in itertools.count(1):
        token = CancelToken()
        exchange = _exchange.Exchange(
            Sender(None, None, CallGroup()),
            None,
            streaming=True,
            timeouts=Timeouts(),
            budget=RetryBudget(0),
        )
        for _ in range(3):
            exchange.register(token)
        reader = {
            "commit": exchange.reader.commit,
            "close": lambda exchange=exchange: exchange.reader.close(ExchangeOutcome("closed")),
            "leave": exchange.outcome_decided,
        }[meanwhile]
        failures: list[BaseException] = []
        stepper = Stepper(at, lambda reader=reader: _attempt(reader, failures), _exchange)  # noqa: B023
        stop = (
            token.abort
            if by == "token"
            else lambda exchange=exchange: exchange.reader.close_threadsafe(ExchangeOutcome("aborted"))
        )
        in_thread(lambda stepper=stepper, stop=stop: stepper.run(stop))
        await rounds()
        where = f"{meanwhile} in the middle of an abort by {by}, before bytecode {at}"
        assert [*failures, *(report.exc_value for report in unraisable)] == [], where
        assert exchange.reader.outcome is not None, where
        assert registered(token) == 0, where
        if stepper.left > 0:
            return


def _attempt(function: Callable[[], object], failures: list[BaseException]) -> None:
    try:
        function()
    except BaseException as exc:
        failures.append(exc)
