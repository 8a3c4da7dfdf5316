"""Durable answers in one process: numbered events, viewers that come and go, Stop, and what is left behind.

The tests named after a bug are the reports of other people's users; those that need Redis are with the real ones.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from durable.harness import BOUND, check_whole, numbers_of, rest_of, some_of, telling, until, words

from ollama_async import AsyncClient, OllamaError, RequestError
from ollama_async.durable import (
    CLOSED,
    TOO_LONG,
    UNATTENDED,
    AnswerGap,
    AnswerInUse,
    AnswersClosed,
    BadOffset,
    DurableAnswers,
    Event,
    Result,
    UnknownAnswer,
    Viewer,
    _events,
    _log,
)
from ollama_async.registry import AbortRegistry, Name
from ollama_async.testing import Block, Cut, FakeOllama, Gate, Reply


class Site:
    """A model's server, a client of it, and durable answers."""

    def __init__(self, fake: FakeOllama, client: AsyncClient, answers: DurableAnswers) -> None:
        self.fake = fake
        self.client = client
        self.answers = answers
        self.results: list[Result] = []

    def stream(self) -> Any:
        return self.client.chat("fake", "hi", stream=True)

    async def begin(self, name: str = "one", reply: Reply | None = None, **terms: Any) -> Any:
        if reply is not None:
            self.fake.script("/api/chat", reply)
        return await self.answers.begin(
            self.stream(), name, **({"owner": "ann", "on_end": self.results.append} | terms)
        )

    async def attach(self, name: str = "one", *, owner: str = "ann", after: int = 0) -> Viewer:
        return await self.answers.attach(name, owner=owner, after=after)

    async def model_saw_leave(self) -> None:
        assert await asyncio.to_thread(self.fake.connections[-1].wait_left, BOUND)


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    with FakeOllama(interval=0) as fake:
        async with AsyncClient(fake.url) as client, DurableAnswers.from_url("memory://") as answers:
            yield Site(fake, client, answers)
            await answers.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


ENDLESS = Reply.endless_chat(0.001)


# -- the reports --


async def test_bug_01_a_stop_ends_an_answer_that_is_watched_again(site: Site) -> None:
    await site.begin(reply=ENDLESS)
    async with await site.attach() as first:
        seen = await some_of(first, 5)
    viewer = await site.attach(after=first.after)
    assert await site.answers.stop("one", "Stop was pressed", owner="ann") == "stopped"
    await site.model_saw_leave()
    end = (await rest_of(viewer))[-1]
    assert numbers_of(seen) == [1, 2, 3, 4, 5]
    assert (end.name, end.data["outcome"], end.data["reason"]) == ("end", "aborted", "Stop was pressed")


async def test_bug_04_all_of_several_answers_are_stopped(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS, always=True)
    for number in range(5):
        await site.begin(str(number))
    await until(lambda: len(site.fake.requests) == 5, "all requests")
    for listed in await site.answers.list("ann"):
        assert await site.answers.stop(listed.id, owner="ann") == "stopped"
    for connection in site.fake.connections:
        assert await asyncio.to_thread(connection.wait_left, BOUND)
    await until(lambda: len(site.results) == 5, "all ends")


async def test_bug_05_a_stop_holds_for_what_begins_after_it(site: Site) -> None:
    assert await site.answers.stop("one", "early", owner="ann") == "kept"
    answer = await site.begin(reply=ENDLESS)
    await answer.wait()
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", "early")
    assert site.fake.requests == ()


async def test_bug_06_a_viewer_that_leaves_ends_nothing(site: Site) -> None:
    gate = Gate()
    answer = await site.begin(reply=Reply([*telling(3).steps[:1], gate, *telling(3).steps[1:]]))
    async with await site.attach() as viewer:
        await some_of(viewer, 2)
    gate.open()
    await answer.wait()
    assert site.results[0].outcome == "done"
    check_whole(await rest_of(await site.attach()), "".join(words(3)))


async def test_bug_07_no_text_comes_twice(site: Site) -> None:
    await site.begin(reply=telling(50))
    whole = await rest_of(await site.attach())
    for after in (1, 7, 51, len(whole) - 1):
        rest = await rest_of(await site.attach(after=after))
        assert rest == whole[after:]


async def test_bug_08_what_is_replayed_and_what_is_live_are_in_order(site: Site) -> None:
    await site.begin(reply=telling(200, 0.001))
    viewers = []
    for after in range(0, 100, 20):
        await until(lambda after=after: len(site.answers._carrier._kept[Name("ann", "one")].producer.log) > after, "")
        viewers.append((after, asyncio.create_task(rest_of(await site.attach(after=after)))))
    for after, viewer in viewers:
        check_whole(await viewer, "".join(words(200)), after)


async def test_bug_09_the_tail_is_not_lost(site: Site) -> None:
    """A Stop finds chunks that have arrived and were not delivered: they are events, too."""
    parts = telling(60).steps[:60]
    for number in range(20):
        name = f"stopped {number}"
        answer = await site.begin(name, Reply([Block(*parts), *ENDLESS.steps]))
        async with await site.attach(name) as viewer:
            await some_of(viewer, 2)
            await site.answers.stop(name, owner="ann")
            await answer.wait()
        events = await rest_of(await site.attach(name))
        check_whole(events, site.results[-1].text)
        assert len(site.results[-1].text) > 0


async def test_bug_10_an_id_that_is_used_again(site: Site) -> None:
    await (await site.begin(reply=telling(5), keep=0.5)).wait()
    with pytest.raises(AnswerInUse):
        await site.begin()
    await until(lambda: not site.answers._carrier._kept, "the end of its life")
    await site.begin(reply=telling(7))
    check_whole(await rest_of(await site.attach()), "".join(words(7)))
    assert len(site.fake.requests) == 2


async def test_bug_11_the_end_is_an_event(site: Site) -> None:
    await (await site.begin(reply=telling(3))).wait()
    for _ in range(2):
        check_whole(await rest_of(await site.attach()), "".join(words(3)))


@pytest.mark.parametrize("bad", [-1, 10**15, 1.5, "7", None, True, 999])
async def test_bug_13_a_bad_offset_is_refused(site: Site, bad: Any) -> None:
    answer = await site.begin(reply=telling(3))
    await answer.wait()
    with pytest.raises(BadOffset, match="after="):
        await site.attach(after=bad)
    with pytest.raises(BadOffset, match="after="):
        answer.attach(after=bad)


async def test_bug_15_an_answer_that_is_not_kept_any_more_is_not_begun_anew(site: Site) -> None:
    await (await site.begin(reply=telling(3), keep=0.01)).wait()
    await until(lambda: not site.answers._carrier._kept, "the end of its life")
    with pytest.raises(UnknownAnswer):
        await site.attach(after=2)
    assert len(site.fake.requests) == 1


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (telling(3), "done"),
        (Reply.error(404, "model not found"), "error"),
        (Reply([*telling(3).steps[:2], Cut()]), "error"),
        (Reply.chat("cut short", done=False), "truncated"),
        (ENDLESS, "aborted"),
    ],
)
async def test_bug_16_each_end_is_told_once(site: Site, reply: Reply, outcome: str) -> None:
    answer = await site.begin(reply=reply)
    if outcome == "aborted":
        async with await site.attach() as viewer:
            await some_of(viewer, 3)
        await site.answers.stop("one", "why", owner="ann")
    await answer.wait()
    (result,) = site.results
    assert (result.owner, result.id, result.outcome) == ("ann", "one", outcome)
    assert isinstance(result.error, OllamaError) == (outcome == "error")
    assert answer.error is result.error
    end = check_whole(await rest_of(await site.attach()), result.text)
    assert end["outcome"] == outcome
    assert (end["error"] is not None) == (outcome == "error")
    assert site.fake.url.removeprefix("http://") not in json.dumps(end)
    assert result.text not in repr(result) or not result.text


async def test_bug_20_a_viewer_that_does_not_read_holds_up_nothing(site: Site) -> None:
    answer = await site.begin(reply=Reply.chat(*["x" * 10_000] * 300))
    idle = await site.attach()
    await asyncio.wait_for(answer.wait(), BOUND)
    assert site.results[0].outcome == "done"
    check_whole(await rest_of(idle), "x" * 3_000_000)


async def test_bug_21_an_answer_belongs_to_its_owner(site: Site) -> None:
    await site.begin(reply=ENDLESS)
    for owner in ("bob", "", "ANN"):
        with pytest.raises(UnknownAnswer):
            await site.attach(owner=owner)
        assert await site.answers.list(owner) == []
        assert await site.answers.stop("one", owner=owner) == "kept"
    await site.begin(owner="eve", reply=telling(3))
    assert [listed.id for listed in await site.answers.list("ann")] == ["one"]
    assert site.results == [] or site.results[0].owner == "eve"


# -- viewers --


async def test_many_viewers_that_come_and_go(site: Site) -> None:
    """300 of them, at random offsets, over 20 answers; some never read to the end."""
    site.fake.script("/api/chat", telling(150, 0.002), always=True)
    for number in range(20):
        await site.begin(str(number))
    sent, luck = "".join(words(150)), random.Random(7)

    async def watch(turn: int) -> int:
        name, events = str(turn % 20), list[Event]()
        while not events or events[-1].name != "end":
            async with await site.attach(name, after=len(events)) as viewer:
                for _ in range(luck.randrange(1, 120)):
                    await asyncio.sleep(luck.choice([0, 0, 0.001]))
                    new = await viewer.read()
                    events += new
                    if not new or new[-1].name == "end":
                        break
        check_whole(events, sent)
        return len(events)

    async with asyncio.timeout(2 * BOUND):
        counts = await asyncio.gather(*map(watch, range(300)))
    assert set(counts) == {153}
    logs = [kept.producer.log for kept in site.answers._carrier._kept.values()]
    assert [log.viewers for log in logs] == [0] * 20
    assert not any(log.waiting for log in logs)


async def test_a_viewer_that_is_cancelled_loses_nothing(site: Site) -> None:
    gate = Gate()
    await site.begin(reply=Reply([*telling(3).steps[:1], gate, *telling(3).steps[1:]]))
    viewer = await site.attach()
    await some_of(viewer, 2)
    waiting = asyncio.create_task(viewer.read())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    rest = await rest_of(viewer)
    assert numbers_of(rest) == [3, 4, 5, 6]


async def test_a_viewer_that_is_detached_by_another_task(site: Site) -> None:
    await site.begin(reply=Reply([*telling(1).steps[:1], Gate()]))
    viewer = await site.attach()
    await some_of(viewer, 2)
    waiting = asyncio.create_task(viewer.read())
    await asyncio.sleep(0)
    viewer.detach()
    viewer.detach()
    assert await asyncio.wait_for(waiting, BOUND) == []
    assert site.answers._carrier._kept[Name("ann", "one")].producer.log.viewers == 0


async def test_a_viewer_that_is_dropped_is_detached(site: Site) -> None:
    gc.disable()
    try:
        await site.begin(reply=ENDLESS)
        async for event in await site.attach():
            if event.number == 3:
                break
        log = site.answers._carrier._kept[Name("ann", "one")].producer.log
        await asyncio.sleep(0)
        assert log.viewers == 0
    finally:
        gc.enable()


async def test_reading_in_both_ways(site: Site) -> None:
    await (await site.begin(reply=telling(5))).wait()
    viewer = await site.attach()
    assert (await anext(viewer)).name == "open"
    assert viewer.after == 1
    rest = await viewer.read()
    assert numbers_of(rest) == [2, 3, 4, 5, 6, 7, 8]
    assert viewer.after == 8
    assert await viewer.read() == []
    with pytest.raises(StopAsyncIteration):
        await anext(viewer)


# -- beginning and ending --


async def test_the_same_id_twice(site: Site) -> None:
    await site.begin(reply=ENDLESS)
    second = site.stream()
    with pytest.raises(AnswerInUse):
        await site.answers.begin(second, "one", owner="ann")
    assert second.outcome == "closed"
    await asyncio.sleep(0.01)
    assert len(site.fake.requests) == 1
    assert site.results == []


async def test_begun_twice_at_once(site: Site) -> None:
    got = await asyncio.gather(*(site.begin() for _ in range(20)), return_exceptions=True)
    assert sorted(type(each).__name__ for each in got) == ["Answer"] + ["AnswerInUse"] * 19
    await until(lambda: site.results, "the end")
    assert len(site.fake.requests) == 1


async def test_begin_that_is_cancelled(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS)
    beginning = asyncio.create_task(site.begin())
    await asyncio.sleep(0)
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    await until(lambda: site.results, "the end")
    assert site.results[0].outcome == "aborted"


@pytest.mark.parametrize(
    "bad", [{"id": ""}, {"id": 7}, {"owner": None}, {"keep": 0}, {"unattended": -1}, {"keep": "x"}]
)
async def test_a_bad_beginning(site: Site, bad: dict[str, Any]) -> None:
    stream = site.stream()
    with pytest.raises(RequestError):
        await site.answers.begin(stream, **({"id": "one"} | bad))
    assert stream.outcome == "aborted"
    assert site.fake.requests == ()


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("http://x", {}, "must begin with memory://"),
        ("memory://", {"keep": 0}, "keep"),
        ("memory://", {"lease": -1}, "lease"),
        ("memory://", {"lease": 0.4}, "lease=0.4: give 0.5 seconds or more"),
        ("memory://", {"unattended": float("nan")}, "unattended"),
        ("memory://", {"max_bytes": True}, "max_bytes"),
        ("redis://x", {"namespace": ""}, "namespace"),
        ("redis://:secret@x?no_such_option=1", {}, "no_such_option"),
    ],
)
def test_bad_parameters(url: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        DurableAnswers.from_url(url, **options)
    assert "secret" not in f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"


async def test_nobody_watches(site: Site) -> None:
    answer = await site.begin(reply=ENDLESS, unattended=0.05)
    async with await site.attach() as viewer:
        end = None
        async with asyncio.timeout(0.2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await rest_of(viewer)
        assert end is None
    await site.model_saw_leave()
    await answer.wait()
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", UNATTENDED)
    end = (await rest_of(await site.attach()))[-1].data
    assert (end["outcome"], end["reason"]) == ("aborted", UNATTENDED)


async def test_an_answer_that_is_too_long(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with DurableAnswers.from_url("memory://", max_bytes=1000, on_end=site.results.append) as small:
        site.fake.script("/api/chat", ENDLESS)
        answer = await small.begin(site.stream(), "one")
        await answer.wait()
        await site.model_saw_leave()
        events = await rest_of(answer.attach())
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", TOO_LONG)
    check_whole(events, site.results[0].text)


async def test_closing_ends_what_runs(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS, always=True)
    for number in range(5):
        await site.begin(str(number))
    viewer = await site.attach("3")
    await some_of(viewer, 3)
    await until(lambda: len(site.fake.requests) == 5, "all requests")
    site.answers.close()
    # Before anything is awaited.
    for connection in site.fake.connections:
        assert connection.wait_left(BOUND)
    await site.answers.aclose()
    assert {(result.outcome, result.reason) for result in site.results} == {("aborted", CLOSED)}
    assert (await rest_of(viewer))[-1].data["reason"] == CLOSED
    for call in (
        site.begin("new"),
        site.attach(),
        site.answers.stop("one"),
        site.answers.list(),
    ):
        with pytest.raises(AnswersClosed):
            await call


async def test_on_end_that_fails_is_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(result: Result) -> None:
        await asyncio.sleep(0)
        raise ValueError("no database")

    await (await site.begin(reply=telling(2), on_end=fail)).wait()
    assert "on_end failed" in caplog.text
    assert "no database" in caplog.text
    check_whole(await rest_of(await site.attach()), "".join(words(2)))


async def test_a_loop_that_ends_in_the_middle(site: Site) -> None:
    """As asyncio.run() does: it cancels all tasks."""
    answer = await site.begin(reply=ENDLESS)
    viewer = await site.attach()
    await some_of(viewer, 3)
    answer._producer.task.cancel()
    await answer.wait()
    assert answer._producer.task.cancelled()
    await site.model_saw_leave()
    assert site.results[0].outcome == "cancelled"
    assert (await rest_of(viewer))[-1].data["outcome"] == "cancelled"


async def test_a_stop_through_a_registry_that_others_use(site: Site) -> None:
    async with (
        AbortRegistry.from_url("memory://") as registry,
        DurableAnswers.from_url("memory://", registry=registry) as answers,
    ):
        site.fake.script("/api/chat", ENDLESS)
        answer = await answers.begin(site.stream(), "one", owner="ann")
        assert await registry.list() == [Name("ann", "one")]
        assert await registry.abort("one", "why", owner="ann") == "stopped"
        await answer.wait()
        assert await registry.list() == []
        await answers.aclose()
        assert registry.connected


async def test_the_list(site: Site) -> None:
    assert await site.answers.list("ann") == []
    await (await site.begin("first", telling(2))).wait()
    await site.begin("second", ENDLESS)
    listed = await site.answers.list("ann")
    assert [(each.id, each.state) for each in listed] == [("first", "ended"), ("second", "running")]
    assert listed[0].begun <= listed[1].begun


async def test_nothing_is_left_behind_when_its_time_is_over(site: Site) -> None:
    site.fake.script("/api/chat", telling(2), always=True)
    before = asyncio.all_tasks()
    answers = [await site.begin(str(number), keep=0.05) for number in range(100)]
    for answer in answers:
        await answer.wait()
    await until(lambda: not site.answers._carrier._kept, "the end of their lives")
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await site.answers.registry.list() == []
    assert not site.answers._running
    assert asyncio.all_tasks() == before


# -- how events are kept --


CHATS = [
    Reply.chat("a", "b", "", "c", thinking=["hm", " so", ""]),
    Reply.chat("a", "b", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}]),
    Reply.chat("", "a", '"\\\u2028\U0001f600\0', done=False),
    Reply(
        [{"model": "a", "created_at": "x", "message": {"role": "assistant", "content": "a"}, "done": False, "new": 1}]
        * 3
    ),
]


@pytest.mark.parametrize("reply", CHATS)
async def test_chunks_are_what_the_server_sent(site: Site, reply: Reply) -> None:
    site.fake.script("/api/chat", reply, reply)
    sent = [json.loads(chunk.model_dump_json(exclude_none=True)) async for chunk in site.stream()]
    await site.begin()
    chunks = [event.data for event in await rest_of(await site.attach()) if event.name == "chunk"]
    for chunk in [*sent, *chunks]:
        del chunk["created_at"]
    assert chunks == sent


async def test_chunks_of_a_completion(site: Site) -> None:
    reply = Reply.generate("a", "b", "", "c", thinking=["hm", " so"])
    site.fake.script("/api/generate", reply, reply)
    sent = [
        json.loads(chunk.model_dump_json(exclude_none=True))
        async for chunk in site.client.generate("fake", "hi", stream=True)
    ]
    await site.answers.begin(site.client.generate("fake", "hi", stream=True), "one")
    events = await rest_of(await site.answers.attach("one"))
    chunks = [event.data for event in events if event.name == "chunk"]
    for chunk in [*sent, *chunks]:
        del chunk["created_at"]
    assert chunks == sent
    assert events[-1].data["text"] == "abc"


async def test_the_texts_of_an_end_are_joined_whatever_is_in_them(site: Site) -> None:
    """They are read as one JSON string, so what divides two fragments must not be found within one."""
    texts = ["a", '"', "\\", '\\"', "{", '"\n"', "\n{", "}", "[", ",", "\u2028", "\u00fc", "", '","', "\\n"]
    random.Random(7).shuffle(texts)
    answer = await site.begin(reply=Reply.chat(*texts))
    events = await rest_of(await site.attach())
    await answer.wait()
    assert events[-1].data["text"] == "".join(texts)
    assert events[-1].data["response"]["message"]["content"] == "".join(texts)
    # All of it was left out of what is kept.
    kept = json.loads(_events.split(answer._producer.log.fragments[-1])[1])
    assert (kept["text"], kept["response"]["message"]["content"]) == (True, True)


async def test_most_chunks_are_kept_as_their_text(site: Site) -> None:
    answer = await site.begin(reply=Reply.chat(*"abcdefgh", thinking=["hm", "so"]))
    await answer.wait()
    kept = answer._producer.log.fragments
    assert [fragment[:1] for fragment in kept] == [b"{", b"{", b'"', b"{", *[b'"'] * 7, b"{", b"{"]


def test_an_end_is_kept_without_the_text_of_its_chunks() -> None:
    """And is shown with it, whatever in it is not what the chunks have."""
    chunk = {"model": "m", "created_at": "x", "done": False}
    log = _log.Log()
    for data in ({"content": "", "thinking": "hm"}, {"content": "a\u2028", "thinking": ""}):
        log.append(_events.named("chunk", {**chunk, "message": data}))
        log.append('" \u00fc\\n"'.encode())
    texts = {"content": "a\u2028 \u00fc\n", "thinking": "hm \u00fc\n"}
    for changed in ({}, {"content": "other"}, {"thinking": "other"}, {"content": ""}, {"tool_calls": [1]}):
        message = {**texts, **changed}
        for text in (texts["content"], "other", ""):
            end = {"outcome": "done", "text": text, "response": {**chunk, "message": message}}
            kept = _events.kept_end(end, log.fragments)
            assert json.loads(_events.shown_end(kept, log.fragments)) == end
            if not changed and text != "other":
                assert b"\\n" not in kept
    nothing = {"outcome": "error", "text": "", "response": None}
    assert json.loads(_events.shown_end(_events.kept_end(nothing, []), [])) == nothing


@pytest.mark.parametrize("end", [{"text": True}, {"response": {"message": 7}}, {"response": {"response": True}}, {}])
async def test_an_end_that_somebody_else_wrote(end: dict[str, Any]) -> None:
    log = _log.Log()
    log.extend([b'{"open":{}}', _events.named("end", end)])
    viewer = Viewer(log, 1)
    if end == {"response": {"message": 7}}:
        with pytest.raises(AnswerGap):
            await viewer.read()
    else:
        [event] = await viewer.read()
        assert True not in [event.data.get("text"), *(event.data.get("response") or {}).values()]


async def test_an_address_is_not_kept(site: Site) -> None:
    frame = {"model": "a", "created_at": "x", "message": {"role": "assistant", "content": "a"}, "done": True}
    answer = await site.begin(reply=Reply([frame | {"remote_host": "https://secret.internal:8080"}]))
    await answer.wait()
    assert b"secret" not in b"".join(answer._producer.log.fragments)


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"x",
        b"7",
        b"null",
        b'"a"\n',
        b' "a"',
        b'{"chunk":{}, "end":{}}',
        b'{"chunk":{"message":"x"}}',
        b'{"end":7}',
        b'{"chunk": {}}\n\n"a"',
        b'{"other":{}}',
        b"\xff",
        b'"a"\r\n"b',
        b'"a"x',
        b'"a" ',
        b'"\\x"',
        b'"\t"',
        '"a"'.encode("utf-16-le"),
    ],
)
def test_what_is_not_an_entry(lines: bytes) -> None:
    with pytest.raises(ValueError):
        _events.taken_apart(lines)


async def test_a_text_without_a_place() -> None:
    log = _log.Log()
    log.extend([b'{"open":{}}', b'"a"'])
    viewer = Viewer(log, 0)
    assert [event.name for event in await viewer.read()] == ["open"]
    with pytest.raises(AnswerGap):
        await viewer.read()


def test_events_show_no_text() -> None:
    assert repr(Event(7, "chunk", b'"secret"')) == "<Event 7: chunk>"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_relay", "_reader", "_writer", "_server"):
        monkeypatch.delitem(sys.modules, f"ollama_async.durable.{module}", raising=False)
    monkeypatch.delitem(sys.modules, "ollama_async.registry._redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ImportError, match=r'pip install "ollama-async\[redis\]"'):
        DurableAnswers.from_url("redis://x")
