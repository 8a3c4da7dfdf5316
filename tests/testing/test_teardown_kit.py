"""`check_teardown`: it passes code that ends cleanly, and finds what bad code leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollama_async import AbortError, AsyncClient, CancelToken, Stream
from ollama_async.testing import (
    WAYS,
    FakeOllama,
    LeakCheckWarning,
    Reply,
    TeardownCheck,
    TeardownFailure,
    check_teardown,
    nothing_left_behind,
)
from ollama_async.testing._left import Watch, task_groups

BOUND = 20.0

# What bad code leaves to the collector, it complains of.
bad = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a test has leaked on purpose is collected in that test, and not in one that is to find nothing."""
    yield
    gc.collect()


def endless() -> FakeOllama:
    server = FakeOllama()
    server.script("/api/chat", Reply.endless_chat(0.001), always=True)
    return server


def failure(call: Callable[..., Any], *ways: str, **options: Any) -> str:
    with pytest.raises(TeardownFailure) as caught:
        check_teardown(call, server=endless, ways=ways, limit=0.3, **options)
    return str(caught.value)


async def good(url: str, token: CancelToken) -> str:
    async with AsyncClient(url) as client:
        return (await client.chat("fake", "hi", stream=True, token=token).collect()).message.content or ""


async def good_iterator(url: str, token: CancelToken) -> AsyncIterator[str]:
    async with AsyncClient(url) as client:
        async for chunk in client.chat("fake", "hi", stream=True, token=token):
            yield chunk.message.content or ""


async def good_group(url: str) -> None:
    async with AsyncClient(url) as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(client.chat("fake", "hi"))


@pytest.mark.parametrize("server", [None, endless], ids=["ends", "endless"])
def test_a_good_call_passes(server: Any) -> None:
    report = check_teardown(good, server=server, limit=BOUND, ticks=20)
    assert set(report.runs) == set(WAYS) - {"aclose", "leave the loop"}
    assert report.total == sum(report.runs.values()) > 200


def test_an_async_generator_is_left_as_well() -> None:
    assert set(check_teardown(good_iterator, ticks=10, limit=BOUND).runs) == set(WAYS) - {"aclose"}


def test_a_call_without_a_token_is_not_aborted() -> None:
    assert set(check_teardown(good_group, ticks=20).runs) == {
        "cancel",
        "cancel twice",
        "asyncio.timeout",
        "loop shutdown",
    }


def test_a_good_call_passes_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop", reason="there is none for Windows")
    assert check_teardown(good, server=endless, ticks=10, limit=BOUND, loop_factory=uvloop.new_event_loop).total


@bad
def test_a_stream_is_closed_from_another_task() -> None:
    def call(url: str) -> Stream[Any]:
        # Its client is not closed, and for once that is no leak: a connection is there no longer than its stream.
        return AsyncClient(url).chat("fake", "hi", stream=True)

    report = check_teardown(call, server=endless, ways=["aclose", "leave the loop"], ticks=20, limit=BOUND)
    assert set(report.runs) == {"aclose", "leave the loop"}


def test_the_moments_reach_from_the_dial_into_the_answer() -> None:
    reached: set[str] = set()

    async def call(url: str, token: CancelToken) -> None:
        async with AsyncClient(url) as client:
            stream = client.chat("fake", "hi", stream=True, token=token)
            try:
                await stream.collect()
            except AbortError:
                reached.add("answer" if stream.text else "head" if stream.status_code else "dial")
                raise

    check_teardown(call, server=endless, ways=["abort"], limit=BOUND)
    assert reached >= {"dial", "answer"}


# What is bad about each, and what has to be said of it.


async def shields_a_task(url: str, token: CancelToken) -> None:
    client = AsyncClient(url)
    await asyncio.shield(client.chat("fake", "hi", stream=True).collect())


async def swallows(url: str) -> None:
    async with AsyncClient(url) as client:
        with contextlib.suppress(asyncio.CancelledError):
            await client.chat("fake", "hi", stream=True).collect()


async def never_gives_up(url: str) -> None:
    async with AsyncClient(url) as client:
        for _ in range(1000):
            with contextlib.suppress(asyncio.CancelledError):
                await client.chat("fake", "hi", stream=True).collect()


async def renames(url: str) -> None:
    async with AsyncClient(url) as client:
        try:
            await client.chat("fake", "hi", stream=True).collect()
        except BaseException as exc:
            raise ValueError("it did not work") from exc


async def keeps_a_plain_response(url: str) -> None:
    client = httpx.AsyncClient(timeout=None)
    request = client.build_request("POST", f"{url}/api/chat", json={"model": "fake"})
    response = await client.send(request, stream=True)
    kept.append(response)
    async for _ in response.aiter_lines():
        pass


kept: list[httpx.Response] = []


async def forgets_a_callback(url: str, token: CancelToken) -> None:
    token.on_abort(print)
    async with AsyncClient(url) as client:
        await client.chat("fake", "hi", stream=True).collect()


async def forgets_a_timer(url: str) -> None:
    asyncio.get_running_loop().call_later(3600, print)
    async with AsyncClient(url) as client:
        await client.chat("fake", "hi", stream=True).collect()


async def uncancels(url: str) -> None:
    async with AsyncClient(url) as client:
        try:
            await client.chat("fake", "hi", stream=True).collect()
        finally:
            asyncio.current_task().uncancel()  # type: ignore[union-attr]


async def fails(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.chat("", "hi", stream=True).collect()


async def goes_nowhere(url: str) -> None:
    await asyncio.Event().wait()


async def loses_an_exception(url: str) -> None:
    lost = asyncio.get_running_loop().create_future()
    lost.set_exception(OSError("lost"))
    del lost
    async with AsyncClient(url) as client:
        await client.chat("fake", "hi", stream=True).collect()


BAD: list[tuple[Callable[..., Any], str, str]] = [
    (shields_a_task, "cancel", r"a task that still runs: Stream.collect\(\) at stream.py:\d+; .*"),
    (shields_a_task, "abort", r"it still runs 0.3 s later"),
    (keeps_a_plain_response, "loop shutdown", r"descriptors: \d+, \d+ before; new are .*socket to 127.0.0.1:\d+"),
    (swallows, "cancel", r"it swallowed its cancellation: it ended normally"),
    (swallows, "asyncio.timeout", r"it swallowed the cancellation by asyncio.timeout\(\): it ended normally"),
    (never_gives_up, "cancel", r"it still runs 0.3 s later"),
    (never_gives_up, "loop shutdown", r"it still runs 0.3 s after it was cancelled"),
    (renames, "cancel", r"it swallowed its cancellation: it raised ValueError: it did not work"),
    (
        keeps_a_plain_response,
        "cancel",
        r"a connection that the server still sees open: number 1 \((POST /api/chat|no request)\)",
    ),
    (keeps_a_plain_response, "cancel", r"descriptors: \d+, \d+ before"),
    (forgets_a_callback, "cancel", r"callbacks on the token: 1"),
    (forgets_a_timer, "cancel", r"timers: 1, 0 before, of print"),
    (uncancels, "cancel", r"task.cancelling\(\) is 0 in the end, and not 1"),
    (fails, "cancel", r"it failed before it was stopped: it raised RequestError"),
    (goes_nowhere, "cancel", r"no run came as far as a request to the server"),
    (loses_an_exception, "cancel", r"a call of the loop's exception handler: .*never retrieved: OSError\('lost'\)"),
]


@bad
@pytest.mark.parametrize(("call", "way", "said"), BAD, ids=[f"{call.__name__}-{way}" for call, way, _ in BAD])
def test_the_error_names_what_a_bad_call_leaves_behind(call: Callable[..., Any], way: str, said: str) -> None:
    text = failure(call, way, ticks=2 if call is goes_nowhere else 10)
    assert text.startswith(f"{call.__name__} does not end cleanly (")
    assert re.search(said, text), text
    assert f"- {way}" in text or call is goes_nowhere
    kept.clear()


@bad
def test_a_generator_that_leaves_its_source_running_is_found_when_it_is_left() -> None:
    async def call(url: str) -> AsyncIterator[str]:
        client, lines = AsyncClient(url), asyncio.Queue[str]()

        async def fill() -> None:
            async for chunk in client.chat("fake", "hi", stream=True):
                lines.put_nowait(chunk.message.content or "")

        filling = asyncio.create_task(fill())
        while not filling.done():
            yield await lines.get()

    said = r"leave the loop, .*: a task that still runs: .*fill\(\) at test_teardown_kit.py:\d+"
    assert re.search(said, failure(call, "leave the loop", ticks=2))


@bad
def test_a_failure_stops_early_and_lists_what_it_found() -> None:
    with pytest.raises(TeardownFailure) as caught:
        check_teardown(swallows, server=endless, ways=["cancel"])
    assert len(caught.value.findings) == 4
    assert caught.value.findings[-1] == "cancel: the moments after that were not tried"


def test_an_unknown_way() -> None:
    with pytest.raises(ValueError, match="no such way to stop a call: 'shout'"):
        check_teardown(good, ways=["shout"])


async def test_within_a_loop_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
        check_teardown(good)
    assert (await asyncio.to_thread(check_teardown, good, ticks=2, ways=["cancel"])).total


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated late from Python 3.14 on")
def test_annotations_that_only_a_type_checker_can_evaluate() -> None:
    source = "def call(url: OnlyForTheChecker, token: CancelToken): return good(url, token)"
    scope: dict[str, Any] = {"good": good}
    exec(compile(source, "annotated", "exec", dont_inherit=True), scope)
    assert check_teardown(scope["call"], server=endless, ways=["abort"], ticks=2).runs["abort"]


def test_the_collector_is_on_again() -> None:
    import gc

    check_teardown(good, ticks=1, ways=["cancel"])
    assert gc.isenabled()


def test_a_script_that_fails_is_not_taken_for_the_calls_fault() -> None:
    def broken() -> FakeOllama:
        from ollama_async.testing import Endless

        server = FakeOllama()
        server.script("/api/chat", Reply([Endless(lambda n: 1 / 0)]), always=True)  # type: ignore[arg-type, return-value]
        return server

    with pytest.raises(RuntimeError, match="the fake server failed"):
        check_teardown(good, server=broken, ways=["cancel"])


class Words:
    """A good iterator that others can close."""

    def __init__(self, url: str, token: CancelToken) -> None:
        self._client = AsyncClient(url)
        self._stream = self._client.chat("fake", "hi", stream=True, token=token)

    def __aiter__(self) -> AsyncIterator[Any]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()


def test_the_fixture_runs_a_test_for_each_way(teardown_check: TeardownCheck) -> None:
    assert teardown_check(lambda url, token: Words(url, token), ticks=3, limit=BOUND).total


OPTION = ("-o", "asyncio_default_fixture_loop_scope=function")


def test_the_fixture_skips_what_has_no_use_for_a_way(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "async def call(url): ...\n"
        "def test_call(teardown_check):\n"
        "    try:\n        teardown_check(call, ticks=1)\n    except AssertionError:\n        pass\n"
    )
    result = pytester.runpytest("-p", "ollama_async.testing.pytest_plugin", "-p", "no:ollama_async", "-rs", *OPTION)
    result.assert_outcomes(passed=4, skipped=4)
    result.stdout.fnmatch_lines(["*this call cannot be stopped by 'abort': it takes no token*"])


@bad
async def test_a_block_that_leaves_something_behind_says_so(fake_ollama: FakeOllama) -> None:
    leftover: list[Any] = []
    with pytest.raises(AssertionError, match=r"(?s)left behind:\n- a task that still runs: Event.wait\(\) at"):
        async with nothing_left_behind(limit=0.1):
            leftover.append(asyncio.create_task(asyncio.Event().wait()))
            await asyncio.sleep(0)
    leftover.pop().cancel()


def test_threads_are_not_left_behind_either() -> None:
    before = threading.active_count()
    check_teardown(good, ticks=2)
    assert threading.active_count() == before


# What passes, but not at once.


def runs_on(seconds: float) -> Callable[..., Any]:
    """A tool that ends so long after its stop."""

    async def tool(url: str) -> None:
        async with AsyncClient(url) as client:
            try:
                await client.chat("fake", "hi", stream=True).collect()
            finally:
                await asyncio.shield(asyncio.sleep(seconds))

    return tool


def leaves_running(seconds: float) -> Callable[..., Any]:
    async def tool(url: str) -> None:
        async with AsyncClient(url) as client:
            try:
                await client.chat("fake", "hi", stream=True).collect()
            finally:
                kept_tasks.append(asyncio.create_task(asyncio.sleep(seconds)))

    return tool


kept_tasks: list[asyncio.Task[None]] = []


def test_a_tool_that_runs_on_for_seconds_fails_by_default() -> None:
    with pytest.raises(TeardownFailure, match="it still runs 1 s later"):
        check_teardown(runs_on(3), server=endless, ways=["asyncio.timeout"], ticks=1)


@pytest.mark.parametrize(
    ("call", "way", "what"),
    [
        (runs_on(0.2), "asyncio.timeout", r"for .*call\(\) at .*, which still ran"),
        (runs_on(0.2), "loop shutdown", r"for .*call\(\) at .*, which still ran"),
        (leaves_running(0.2), "cancel", r"for a task that still runs: sleep\(\) at tasks.py:\d+"),
    ],
    ids=["the call", "the call at loop shutdown", "a task behind it"],
)
def test_a_pass_that_had_to_wait_says_for_what(call: Callable[..., Any], way: str, what: str) -> None:
    with pytest.warns(LeakCheckWarning, match=r"tool ends cleanly, but not at once:\n- ") as caught:
        report = check_teardown(call, server=endless, ways=[way], ticks=1, limit=BOUND)
    [line] = report.waited
    assert line in str(caught[0].message)
    assert caught[0].filename == __file__
    assert re.match(
        rf"{way}: \d of 3 runs; [0-9.]+ s at most \({way}, 0 rounds of the loop after .*\), {what}", line
    ), line
    kept_tasks.clear()


def test_a_pass_that_waits_each_time_is_cut_short_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollama_async.testing._teardown._ENOUGH_WAITING", 0.02)
    with pytest.warns(LeakCheckWarning, match="after 0.4 s of waiting most moments were left out"):
        report = check_teardown(runs_on(0.15), server=endless, ways=["asyncio.timeout"], ticks=20, limit=BOUND)
    assert 3 <= report.runs["asyncio.timeout"] <= 10


def test_a_pass_at_once_says_nothing() -> None:
    report = check_teardown(good, server=endless, ticks=2, limit=BOUND)
    assert report.waited == ()
    assert report.unchecked == ()


def test_an_iterator_whose_aclose_takes_its_time() -> None:
    class Slow(Words):
        async def aclose(self) -> None:
            await super().aclose()
            await asyncio.sleep(seconds)
            await self._client.aclose()

    def call(url: str, token: CancelToken) -> Slow:
        return Slow(url, token)

    seconds = 0.2
    with pytest.warns(LeakCheckWarning, match="for its aclose()"):
        check_teardown(call, server=endless, ways=["aclose"], ticks=1, limit=BOUND)
    seconds = 60
    assert re.search(r"aclose\(\) did not return within 0.3 s", failure(call, "aclose", ticks=1))


async def test_a_block_that_had_to_wait_says_for_what() -> None:
    async def slow() -> Watch:
        async with nothing_left_behind(limit=BOUND) as watch:
            kept_tasks.append(asyncio.create_task(asyncio.sleep(0.2)))
            await asyncio.sleep(0)
        return watch

    with pytest.warns(LeakCheckWarning, match=r"only after \d+\.\d+ s: a task that still runs: sleep\(\)") as caught:
        watch = await slow()
    assert caught[0].filename == __file__
    assert watch.wait is not None
    assert watch.wait.seconds < BOUND
    assert kept_tasks.pop().done()


async def test_a_block_waits_for_a_second_by_default() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="a task that still runs: sleep"):
        async with nothing_left_behind():
            task = asyncio.create_task(asyncio.sleep(60))
            await asyncio.sleep(0)
    assert 0.9 < time.monotonic() - started < 4
    task.cancel()


# CPython's own TaskGroup, before 3.13.


async def fail_in_a_group() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())


async def test_what_a_task_group_of_cpython_forgets_is_not_a_finding() -> None:
    leave = asyncio.TaskGroup.__aexit__
    task = asyncio.current_task()
    assert task is not None
    for _ in range(2):  # what is pending before a block is not the block's
        async with nothing_left_behind():
            await fail_in_a_group()
    if sys.version_info < (3, 13):
        assert task.cancelling() == 2, "the flaw that this is about"
    assert asyncio.TaskGroup.__aexit__ is leave
    with pytest.raises(AssertionError, match=r"task.cancelling\(\) is \d, \d before"):
        async with nothing_left_behind():
            await fail_in_a_group()
            with contextlib.suppress(asyncio.CancelledError):
                task.cancel()
                await asyncio.sleep(0)
    while task.cancelling():
        task.uncancel()


def test_a_call_with_a_task_group_whose_child_fails() -> None:
    async def call(url: str) -> None:
        try:
            async with AsyncClient(url) as client:
                await client.chat("fake", "hi", stream=True).collect()
        finally:
            await fail_in_a_group()

    async def cancels_itself(url: str) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(0)
        await call(url)

    assert check_teardown(call, ways=["cancel", "asyncio.timeout"], ticks=20, limit=BOUND).total
    assert re.search(r"task.cancelling\(\) is \d in the end, and not 1", failure(cancels_itself, "cancel", ticks=9))


def test_checks_that_overlap_leave_task_groups_as_they_were() -> None:
    leave = asyncio.TaskGroup.__aexit__

    async def two() -> None:
        task = asyncio.current_task()
        with task_groups.watched(task) as forgotten:
            with task_groups.watched(task) as in_between:
                await fail_in_a_group()
            await fail_in_a_group()
            flawed = sys.version_info < (3, 13)
            assert (forgotten(), in_between()) == ((2, 2) if flawed else (0, 0))

    asyncio.run(two())
    assert asyncio.TaskGroup.__aexit__ is leave


# Where there is no /proc.


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take folders away, as on systems that do not have them."""

    def hide(*folders: str) -> None:
        there = os.listdir

        def listdir(path: Any = ".") -> list[str]:
            if path in folders:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return there(path)

        monkeypatch.setattr(os, "listdir", listdir)

    return hide


async def test_descriptors_are_found_in_dev_fd_as_well(hide: Callable[..., None], tmp_path: Path) -> None:
    hide("/proc/self/fd")
    with contextlib.ExitStack() as stack:
        with pytest.raises(AssertionError, match=r"descriptors: \d+, \d+ before; new are ") as caught:
            async with nothing_left_behind(limit=0):
                opened = stack.enter_context(FakeOllama())
                stack.enter_context(socket.create_connection(("127.0.0.1", opened.port)))
                file = stack.enter_context((tmp_path / "x").open("w"))
                opened.wait_for_connections()
        assert f"(socket to 127.0.0.1:{opened.port})" in str(caught.value)
        assert f"{file.fileno()} (file {os.fstat(file.fileno()).st_dev}:" in str(caught.value)
    async with nothing_left_behind():
        for end in os.pipe():
            stack.callback(os.close, end)
        await asyncio.sleep(0)
    stack.close()


@bad
def test_a_socket_that_is_left_is_found_in_dev_fd_as_well(hide: Callable[..., None]) -> None:
    hide("/proc/self/fd")
    assert re.search(
        r"descriptors: \d+, \d+ before; new are .*socket to 127.0.0.1:\d+",
        failure(keeps_a_plain_response, "loop shutdown", ticks=10),
    )
    kept.clear()
    assert check_teardown(good, server=endless, ticks=2, limit=BOUND).unchecked == ()


async def test_where_no_folder_tells_the_descriptors_a_block_says_so(hide: Callable[..., None]) -> None:
    hide("/proc/self/fd", "/dev/fd")

    async def look() -> Watch:
        async with nothing_left_behind() as watch:
            pass
        return watch

    with pytest.warns(LeakCheckWarning, match="not checked: descriptors, for this system has neither /proc") as caught:
        watch = await look()
    assert caught[0].filename == __file__
    assert watch.unchecked[0].startswith("descriptors")


@bad
def test_where_no_folder_tells_the_descriptors_a_check_says_so(hide: Callable[..., None]) -> None:
    hide("/proc/self/fd", "/dev/fd")
    with pytest.warns(LeakCheckWarning, match="not checked: descriptors, for this system has neither /proc"):
        report = check_teardown(good, server=endless, ticks=1, ways=["cancel"], limit=BOUND)
    assert len(report.unchecked) == 1

    async def keeps_a_connection(url: str) -> None:
        address = httpx.URL(url)
        writers.append((await asyncio.open_connection(address.host, address.port))[1])
        await asyncio.Event().wait()

    writers: list[asyncio.StreamWriter] = []
    # What the server sees is still looked at.
    assert "a connection that the server still sees open" in failure(keeps_a_connection, "cancel", ticks=10)


def test_a_loop_that_does_not_tell_its_timers_is_named() -> None:
    uvloop = pytest.importorskip("uvloop", reason="there is none for Windows")
    report = check_teardown(good, ticks=1, ways=["cancel"], limit=BOUND, loop_factory=uvloop.new_event_loop)
    assert report.unchecked == ("timers, for this event loop does not tell which it has",)
