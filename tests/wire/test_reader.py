"""The reader of one answer alone: what its link and its owner are told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from ollama_async import ProtocolError
from ollama_async._wire.link import HIGH_WATER
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome, Framing
from ollama_async._wire.parser import Head
from ollama_async._wire.phase import Phase
from ollama_async._wire.reader import ResponseReader
from ollama_async._wire.unpack import FORMS, BodyForm

BOUND = 5.0
HEAD = Head(200, b"OK")


class Clock:
    """The loop that a reader is told of: time stands still, and what is scheduled runs when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.loop = asyncio.get_running_loop()
        self.scheduled: list[Callable[[], object]] = []

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[None]:
        return self.loop.create_future()

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        self.scheduled.append(lambda: function(*args))

    call_soon_threadsafe = call_soon

    def is_closed(self) -> bool:
        return False

    def run(self) -> None:
        while self.scheduled:
            self.scheduled.pop(0)()


class Both:
    """A link and an owner in one, which note what they are told, in its order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def shutdown_for(self, reader: ResponseReader) -> None:
        self.told.append("shutdown")

    def close_for(self, reader: ResponseReader) -> None:
        self.told.append("close")

    def pause_reading(self) -> None:
        self.told.append("pause")

    def resume_reading(self) -> None:
        self.told.append("resume")

    def head_arrived(self, head: Head) -> None:
        assert head is HEAD
        self.told.append("head")

    def outcome_decided(self) -> None:
        self.told.append("decided")

    def link_released(self) -> None:
        self.told.append("released")

    def pop(self) -> list[str]:
        told, self.told = self.told, []
        return told


class Rig:
    def __init__(self, framing: Framing = Framing.LINES, *, attached: bool = True) -> None:
        self.clock, self.both = Clock(), Both()
        self.reader = ResponseReader(cast("Any", self.clock), self.both, FORMS[framing])
        if attached:
            self.reader.attach(self.both)

    async def waiting(self, step: Callable[[], Any] | None = None) -> asyncio.Task[Any]:
        """A task that waits for what arrives."""
        task = asyncio.create_task((step or self.reader.wait)())
        while not self.reader.is_read:
            assert not task.done()
            await asyncio.sleep(0)
        return task


ABORT = ExchangeOutcome("aborted", "stop")


async def test_a_new_reader_has_nothing() -> None:
    rig = Rig(attached=False)
    reader = rig.reader
    assert (reader.phase, reader.status, reader.outcome, reader.failure_outcome) == (Phase.NEW, 0, None, None)
    flags = (reader.paused, reader.eof, reader.failed, reader.is_attached, reader.is_read, reader.tidied)
    assert flags == (False,) * 6
    assert (reader.entered_at, reader.first_line_at, reader.last_activity_at, reader.received_at) == (0, 0, 0, 0)
    assert reader.read_nowait() is None
    assert reader.body_form.unpacker is None
    reader.check()


# -- the times --


async def test_up_to_the_head_a_phase_counts_from_when_it_began() -> None:
    rig = Rig()
    for phase in (Phase.CONNECTING, Phase.SENDING, Phase.WAITING):
        rig.clock.now += 1
        rig.reader.enter(phase)
        assert rig.reader.phase is phase
        assert rig.reader.entered_at == rig.reader.last_activity_at == rig.clock.now
    rig.reader.received_at = 150.0
    rig.clock.now = 160.0
    rig.reader.feed_head(HEAD)
    assert (rig.reader.phase, rig.reader.status, rig.reader.head) == (Phase.HEAD, 200, HEAD)
    # From the head on the time of the data counts.
    assert (rig.reader.entered_at, rig.reader.last_activity_at) == (103.0, 150.0)
    assert rig.both.told == ["head"]


async def test_nothing_follows_the_end() -> None:
    rig = Rig()
    rig.reader.close(ABORT)
    rig.reader.enter(Phase.WAITING)
    assert rig.reader.phase is Phase.CLOSED
    assert rig.reader.entered_at == 0.0


@pytest.mark.parametrize("framing", list(Framing))
async def test_progress_is_a_whole_line_where_the_answer_is_made_of_lines(framing: Framing) -> None:
    rig = Rig(framing)
    reader = rig.reader
    reader.received_at = 1.0
    reader.feed_head(HEAD)
    for at, block in [(2.0, b"{"), (3.0, b"}\n"), (4.0, b"{"), (5.0, b"}\n{")]:
        reader.received_at = at
        assert reader.feed_data(block)
        if framing is Framing.LINES:
            assert reader.first_line_at == (0.0 if at == 2.0 else 3.0)
            assert reader.last_activity_at == {2.0: 1.0, 4.0: 3.0}.get(at, at)
            assert reader.phase is (Phase.HEAD if at == 2.0 else Phase.BODY)
        else:
            assert (reader.first_line_at, reader.last_activity_at, reader.phase) == (2.0, at, Phase.BODY)


async def test_a_pause_of_the_consumer_is_not_the_silence_of_the_server() -> None:
    rig = Rig()
    reader = rig.reader
    reader.received_at = 1.0
    reader.feed_data(b"x" * HIGH_WATER + b"\n")
    assert reader.paused
    rig.clock.now = 500.0
    reader.resume_reading()
    assert not reader.paused
    assert reader.last_activity_at == 500.0
    assert rig.both.told == ["resume"]


async def test_another_answer_begins_anew() -> None:
    rig = Rig()
    reader = rig.reader
    reader.feed_head(HEAD)
    reader.received_at = 7.0
    reader.body_form = BodyForm(reader.body_form.framing, cast("Any", Unpacks()))
    reader.feed_data(b"x\n" * HIGH_WATER)
    reader.restart()
    assert (reader.status, reader.head.headers, reader.body_form.unpacker, reader.paused) == (0, (), None, False)
    assert reader.first_line_at == 0.0
    assert reader.read_nowait() is None
    assert reader.feed_data(b"x" * HIGH_WATER)
    reader.received_at = 9.0
    assert not reader.feed_data(b"\n")
    assert reader.first_line_at == 9.0


# -- the buffer --


@pytest.mark.parametrize("read", [ResponseReader.read_nowait, ResponseReader.read_buffered])
async def test_what_has_arrived_is_read_at_once_and_counted_anew(read: Callable[[ResponseReader], bytes]) -> None:
    reader = Rig().reader
    for _ in range(2):
        assert reader.feed_data(b"1")
        assert reader.feed_data(b"2\n")
        assert reader.feed_data(b"3")
        assert read(reader) == b"12\n3"
        assert reader.feed_data(b"x" * (HIGH_WATER - 1))
        assert reader.feed_data(b"x")
        assert read(reader) == b"x" * HIGH_WATER
        assert not reader.paused
    assert not reader.feed_data(b"x" * (HIGH_WATER + 1))
    assert reader.paused


async def test_reading_goes_on_when_nothing_is_left_and_the_consumer_wants_more() -> None:
    rig = Rig()
    reader = rig.reader
    assert not reader.feed_data(b"x" * HIGH_WATER + b"\n")
    task = await rig.waiting()
    # There is something to read: not yet.
    assert rig.both.pop() == []
    reader.wake()
    await task
    reader.read_nowait()
    assert reader.paused
    task = await rig.waiting()
    assert rig.both.pop() == ["resume"]
    assert not reader.paused
    reader.wake()
    await task
    task = await rig.waiting()
    assert rig.both.pop() == []
    reader.wake()
    await task


@pytest.mark.parametrize(
    "event",
    [
        lambda reader: reader.feed_head(HEAD),
        lambda reader: reader.feed_data(b"x"),
        lambda reader: reader.feed_eof(),
        lambda reader: reader.wake(),
    ],
    ids=["head", "data", "eof", "wake"],
)
@pytest.mark.parametrize("times", [1, 2])
async def test_the_consumer_is_woken_by_what_happens(event: Callable[[ResponseReader], object], times: int) -> None:
    rig = Rig()
    task = await rig.waiting()
    for _ in range(times):
        event(rig.reader)
    await asyncio.wait_for(task, BOUND)
    assert not rig.reader.is_read


async def test_the_head_and_the_bytes_are_waited_for() -> None:
    rig = Rig()
    reader = rig.reader
    task = await rig.waiting(reader.wait_for_head)
    reader.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    reader.feed_head(HEAD)
    await asyncio.wait_for(task, BOUND)
    await reader.wait_for_head()
    task = await rig.waiting(reader.read)
    reader.feed_data(b"x\n")
    assert await asyncio.wait_for(task, BOUND) == b"x\n"
    reader.feed_data(b"y\n")
    reader.feed_eof()
    assert await reader.read() == b"y\n"
    assert await reader.read() == b""


# -- the end of the answer --


@pytest.mark.parametrize("framing", list(Framing))
async def test_the_end_of_the_answer_is_the_outcome_of_one_that_is_read_as_a_whole(framing: Framing) -> None:
    rig = Rig(framing)
    reader = rig.reader
    reader.feed_head(HEAD)
    rig.both.pop()
    reader.feed_eof()
    assert reader.eof
    assert not reader.is_attached
    assert reader.failure_outcome is None
    if framing is Framing.WHOLE:
        assert reader.outcome is not None
        assert reader.outcome.kind == "complete"
        assert (reader.phase, reader.tidied) == (Phase.CLOSED, True)
        assert rig.both.told == ["decided", "decided", "released"]
    else:
        assert (reader.outcome, reader.phase, reader.tidied) == (None, Phase.EOF, False)
        assert rig.both.pop() == []
        assert reader.commit()
        assert (reader.phase, reader.tidied) == (Phase.CLOSED, True)
        assert rig.both.told == ["decided", "released"]
    # The outcome stands.
    assert not reader.close_threadsafe(ABORT)
    assert reader.read_nowait() == b""


async def test_the_consumer_may_commit_before_the_connection_is_at_its_end() -> None:
    rig = Rig()
    reader = rig.reader
    assert reader.commit()
    assert reader.tidied
    # The rest of the body may still be taken in.
    assert reader.is_attached
    assert reader.phase is not Phase.CLOSED
    assert rig.both.pop() == ["decided", "released"]
    reader.detach()
    assert (reader.is_attached, reader.phase) == (False, Phase.CLOSED)
    assert rig.both.pop() == ["decided", "released"]
    assert reader.tidied


async def test_a_commit_that_comes_second_changes_nothing() -> None:
    rig = Rig()
    assert rig.reader.decide(ABORT)
    assert not rig.reader.decide(ExchangeOutcome("closed"))
    assert rig.both.pop() == ["decided"]
    assert not rig.reader.commit()
    # Whoever decided may have been interrupted before the owner was told.
    assert rig.both.pop() == ["decided", "released"]
    assert not rig.reader.tidied
    assert rig.reader.outcome is rig.reader.failure_outcome is ABORT


async def test_an_answer_that_arrives_after_an_abort_is_let_go_and_tidied_by_the_abort() -> None:
    rig = Rig()
    rig.reader.decide(ABORT)
    rig.reader.detach()
    assert not rig.reader.tidied
    assert rig.reader.phase is Phase.CLOSED
    assert rig.both.told == ["decided", "decided", "released"]


async def test_a_link_that_comes_after_the_end_is_closed() -> None:
    rig = Rig(attached=False)
    rig.reader.decide(ABORT)
    rig.both.pop()
    rig.reader.attach(rig.both)
    assert rig.both.told == ["shutdown", "close"]


async def test_a_link_is_dropped_without_an_outcome() -> None:
    rig = Rig()
    rig.reader.drop_link()
    assert rig.both.pop() == ["shutdown", "close"]
    assert not rig.reader.is_attached
    assert rig.reader.outcome is None
    rig.reader.drop_link()
    assert rig.both.told == []


async def test_a_pause_is_passed_on_while_there_is_a_link() -> None:
    rig = Rig()
    rig.reader.pause_reading()
    assert rig.both.pop() == ["pause"]
    rig.reader.detach()
    rig.reader.pause_reading()
    rig.reader.resume_reading()
    assert rig.both.told == []


# -- stops --


async def test_a_stop_in_the_loop_releases_at_once_and_once() -> None:
    rig = Rig()
    task = await rig.waiting()
    rig.reader.close(ABORT)
    assert rig.both.pop() == ["decided", "shutdown", "decided", "released", "close"]
    assert (rig.reader.tidied, rig.reader.is_attached, rig.reader.phase) == (True, False, Phase.CLOSED)
    with pytest.raises(ExchangeEnded) as caught:
        await asyncio.wait_for(task, BOUND)
    assert caught.value.outcome is ABORT
    rig.reader.close(ExchangeOutcome("closed"))
    assert rig.both.told == []
    assert rig.reader.outcome is ABORT
    for step in (rig.reader.check, rig.reader.read_nowait):
        with pytest.raises(ExchangeEnded):
            step()
    with pytest.raises(ExchangeEnded):
        await asyncio.wait_for(rig.reader.wait(), BOUND)


async def test_a_stop_from_anywhere_sends_the_fin_and_releases_in_a_later_round() -> None:
    rig = Rig()
    task = await rig.waiting()
    assert rig.reader.close_threadsafe(ABORT)
    assert rig.both.pop() == ["shutdown", "decided"]
    assert rig.reader.tidied
    assert rig.reader.is_attached
    assert not rig.reader.close_threadsafe(ABORT)
    assert rig.both.told == []
    rig.clock.run()
    assert rig.both.pop() == ["decided", "released", "close"]
    assert (rig.reader.is_attached, rig.reader.phase) == (False, Phase.CLOSED)
    with pytest.raises(ExchangeEnded):
        await asyncio.wait_for(task, BOUND)


async def test_a_stop_from_anywhere_without_a_link_releases_as_well() -> None:
    rig = Rig(attached=False)
    assert rig.reader.close_threadsafe(ABORT)
    rig.clock.run()
    assert rig.both.told == ["decided", "decided", "released"]
    assert rig.reader.phase is Phase.CLOSED


async def test_a_stop_that_another_outcome_preceded_says_so_and_still_sends_the_fin() -> None:
    rig = Rig()
    rig.reader.decide(ExchangeOutcome("timeout"))
    assert not rig.reader.close_threadsafe(ABORT)
    assert "shutdown" in rig.both.told
    assert rig.reader.tidied
    rig.clock.run()


async def test_a_fin_that_fails_is_still_followed_by_the_release() -> None:
    rig = Rig()

    def fails(reader: ResponseReader) -> None:
        raise KeyboardInterrupt

    rig.both.shutdown_for = fails  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rig.reader.close_threadsafe(ABORT)
    assert not rig.reader.tidied
    rig.clock.run()
    assert rig.both.told == ["decided", "released", "close"]


async def test_a_natural_end_that_was_left_undone_is_finished_by_an_abort() -> None:
    rig = Rig(attached=False)
    rig.reader._outcome.try_set(ExchangeOutcome("complete"))
    assert not rig.reader.close_threadsafe(ABORT)
    assert rig.both.pop() == ["decided"]
    assert not rig.reader.tidied
    rig.clock.run()
    assert rig.both.pop() == ["decided", "released"]
    assert rig.reader.tidied
    rig.reader._release_if_not_tidied()
    assert rig.both.told == []


async def test_a_cancelled_consumer_closes_and_gets_its_cancellation() -> None:
    rig = Rig()
    task = await rig.waiting()
    task.cancel("mine")
    with pytest.raises(asyncio.CancelledError, match="mine"):
        await task
    assert rig.reader.outcome is not None
    assert rig.reader.outcome.kind == "cancelled"
    assert rig.both.told == ["decided", "shutdown", "decided", "released", "close"]
    assert not rig.reader.is_read


# -- failures --


async def test_what_has_arrived_is_delivered_before_the_error() -> None:
    rig = Rig()
    error = ProtocolError("broken")
    rig.reader.feed_data(b"1\n")
    rig.reader.set_exception(error)
    assert rig.reader.failed
    assert rig.reader.outcome is None
    # An abort may still come first.
    rig.reader.check()
    assert rig.reader.read_nowait() == b"1\n"
    rig.reader.phase = Phase.EOF
    with pytest.raises(ExchangeEnded) as caught:
        rig.reader.read_nowait()
    assert (caught.value.outcome.kind, caught.value.outcome.cause) == ("error", error)
    assert rig.reader.tidied


async def test_an_error_that_a_consumer_waits_for_is_the_outcome_at_once() -> None:
    rig = Rig()
    task = await rig.waiting()
    rig.reader.set_exception(ProtocolError("broken"))
    assert rig.reader.outcome is not None
    assert not rig.reader.close_threadsafe(ABORT)
    with pytest.raises(ExchangeEnded, match="error"):
        await asyncio.wait_for(task, BOUND)


async def test_an_error_behind_bytes_that_a_consumer_is_about_to_read_is_not_the_outcome_yet() -> None:
    rig = Rig()
    task = await rig.waiting()
    rig.reader.feed_data(b"1\n")
    rig.reader.set_exception(ProtocolError("broken"))
    assert rig.reader.outcome is None
    await asyncio.wait_for(task, BOUND)
    assert rig.reader.outcome is None
    assert rig.reader.read_nowait() == b"1\n"
    with pytest.raises(ExchangeEnded, match="error"):
        await asyncio.wait_for(rig.reader.wait(), BOUND)


async def test_an_error_wakes_a_consumer_that_leaves_bytes_where_they_are() -> None:
    rig = Rig()
    rig.reader.feed_data(b"1\n")
    task = await rig.waiting()
    rig.reader.set_exception(ProtocolError("broken"))
    await asyncio.wait_for(task, BOUND)


async def test_an_error_without_a_consumer_is_raised_to_the_next_one() -> None:
    rig = Rig()
    rig.reader.set_exception(ProtocolError("broken"))
    assert rig.reader.outcome is None
    with pytest.raises(ExchangeEnded, match="error"):
        await asyncio.wait_for(rig.reader.wait(), BOUND)


# -- packed bodies --


class Unpacks:
    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole

    def feed(self, data: bytes) -> bytes:
        if data == b"bad":
            raise ProtocolError("cannot be unpacked")
        return data.replace(b"-", b"")


async def test_a_packed_body_is_unpacked_and_a_part_that_brings_nothing_is_no_progress() -> None:
    rig = Rig(Framing.WHOLE)
    rig.reader.body_form = BodyForm(rig.reader.body_form.framing, cast("Any", Unpacks()))
    rig.reader.received_at = 5.0
    assert rig.reader.feed_data(b"--")
    assert rig.reader.first_line_at == 0.0
    assert rig.reader.read_nowait() is None
    assert rig.reader.feed_data(b"-1-")
    assert rig.reader.read_nowait() == b"1"
    assert not rig.reader.feed_data(b"x" * (HIGH_WATER + 1))
    assert not rig.reader.feed_data(b"--")


async def test_a_body_that_cannot_be_unpacked_ends_the_exchange_in_a_later_round() -> None:
    rig = Rig()
    rig.reader.body_form = BodyForm(rig.reader.body_form.framing, cast("Any", Unpacks()))
    assert rig.reader.feed_data(b"bad")
    assert rig.reader.failure_outcome is not None
    assert rig.reader.failure_outcome.kind == "error"
    assert rig.both.told == ["shutdown", "decided"]
    # The writer is in the middle of a read.
    assert rig.reader.is_attached
    rig.clock.run()
    assert not rig.reader.is_attached
    assert rig.reader.feed_data(b"more")
    assert rig.reader.read_buffered() == b""


@pytest.mark.parametrize("whole", [True, False])
async def test_a_packed_body_has_to_be_whole(whole: bool) -> None:
    rig = Rig()
    rig.reader.body_form = BodyForm(rig.reader.body_form.framing, cast("Any", Unpacks(whole=whole)))
    task = await rig.waiting(rig.reader.read)
    rig.reader.feed_eof()
    assert not rig.reader.is_attached
    if whole:
        assert await asyncio.wait_for(task, BOUND) == b""
        return
    with pytest.raises(ExchangeEnded) as caught:
        await asyncio.wait_for(task, BOUND)
    assert "in the middle of its compressed body" in str(caught.value.outcome.cause)


async def test_a_packed_body_that_is_not_whole_is_an_error_also_if_it_is_read_later() -> None:
    rig = Rig(Framing.WHOLE)
    rig.reader.body_form = BodyForm(rig.reader.body_form.framing, cast("Any", Unpacks(whole=False)))
    rig.reader.feed_eof()
    assert rig.reader.outcome is None
    assert rig.reader.phase < Phase.EOF
    with pytest.raises(ExchangeEnded, match="error"):
        rig.reader.check()


async def test_a_closed_reader_holds_neither_its_link_nor_its_owner() -> None:
    rig = Rig()
    rig.reader.close(ABORT)
    rig.reader.feed_head(HEAD)
    assert "head" not in rig.both.told
