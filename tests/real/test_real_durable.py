"""Durable answers over a real Redis: what other processes see, and what happens when something dies or forgets."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from durable.harness import BOUND, check_whole, numbers_of, rest_of, some_of, telling, until, words
from programs import running
from real.redis_server import RealRedis
from redis.asyncio.client import Pipeline

from ollama_async import AsyncClient
from ollama_async.durable import (
    SUPERSEDED,
    UNATTENDED,
    AnswerGap,
    AnswerInUse,
    AnswersUnavailable,
    BadOffset,
    DurableAnswers,
    Event,
    RedisFull,
    RedisRefuses,
    RedisTooOld,
    Result,
    UnknownAnswer,
    Viewer,
    _server,
)
from ollama_async.registry import AbortRegistry, Name
from ollama_async.testing import FakeOllama, Gate, Reply

pytestmark = pytest.mark.real

# The waits of the contract at their full length, and more of what takes long: `nox -s durable`.
LONG = os.environ.get("OLLAMA_ASYNC_DURABLE") == "long"
WORKER = str(Path(__file__).with_name("durable_worker.py"))
LOG = "{ollama-async}:log:ann:one"


class Site:
    """A model's server, and as many web servers as a test wants: here, there, elsewhere."""

    def __init__(self, redis: RealRedis, fake: FakeOllama, client: AsyncClient, stack: AsyncExitStack) -> None:
        self.redis = redis
        self.fake = fake
        self.client = client
        self.results: list[Result] = []
        self._stack = stack

    async def process(self, url: str | None = None, **terms: Any) -> DurableAnswers:
        terms = {"on_end": self.results.append} | terms
        return await self._stack.enter_async_context(DurableAnswers.from_url(url or self.redis.url, **terms))

    async def begin(self, where: DurableAnswers, name: str = "one", reply: Reply | None = None, **terms: Any) -> Any:
        if reply is not None:
            self.fake.script("/api/chat", reply)
        return await where.begin(self.client.chat("fake", "hi", stream=True), name, owner="ann", **terms)

    def entries(self, key: str = LOG) -> list[str]:
        return [line for number, fields in self.redis.ask("XRANGE", key, "-", "+") for line in fields["e"].split("\n")]

    def ends(self, key: str = LOG) -> list[str]:
        lines = [json.loads(line) for line in self.entries(key)]
        return [line["end"]["outcome"] for line in lines if isinstance(line, dict) and "end" in line]


@pytest_asyncio.fixture
async def site(redis: RealRedis) -> AsyncIterator[Site]:
    with FakeOllama(interval=0) as fake:
        async with AsyncClient(fake.url) as client, AsyncExitStack() as stack:
            yield Site(redis, fake, client, stack)
        # Whoever is not closed by now is not closed by anybody.
        async with asyncio.timeout(BOUND):
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.001)


async def attach(where: DurableAnswers, name: str = "one", after: int = 0) -> Viewer:
    return await where.attach(name, owner="ann", after=after)


async def watch(where: DurableAnswers, events: list[Event], name: str = "one") -> None:
    async with asyncio.timeout(2 * BOUND), await attach(where, name) as viewer:
        async for event in viewer:
            events.append(event)


ENDLESS = Reply.endless_chat(0.005)


# -- two processes --


@pytest.mark.parametrize("protocol", [2, 3])
async def test_what_another_process_sees(site: Site, protocol: int) -> None:
    url = f"{site.redis.url.partition('?')[0]}?protocol={protocol}"
    here, there = await site.process(url), await site.process(url)
    await site.begin(here, reply=telling(100, 0.002))
    viewer = await attach(there)
    first = await some_of(viewer, 20)
    second = await attach(there, after=7)
    check_whole(first + await rest_of(viewer), "".join(words(100)))
    check_whole(await rest_of(second), "".join(words(100)), 7)
    late = await site.process(url)
    check_whole(await rest_of(await attach(late)), "".join(words(100)))
    assert [(each.id, each.state) for each in await late.list("ann")] == [("one", "ended")]


async def test_each_token_is_carried_though_no_other_follows(site: Site) -> None:
    here, there = await site.process(), await site.process()
    gates = [Gate() for _ in range(6)]
    steps = zip(gates, telling(6).steps, strict=False)
    await site.begin(here, reply=Reply([each for pair in steps for each in pair]))
    async with asyncio.timeout(BOUND), await attach(there) as viewer:
        assert (await anext(viewer)).name == "open"
        for gate, word in zip(gates, words(6), strict=True):
            gate.open()
            assert (await anext(viewer)).data["message"]["content"] == word


async def test_bug_02_a_stop_works_after_redis_was_restarted(site: Site) -> None:
    here, there = await site.process(), await site.process()
    answer = await site.begin(here, reply=ENDLESS)
    seen: list[Event] = []
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 10, "some events")
    site.redis.kill()
    site.redis.start()
    before = len(seen)
    await until(lambda: len(seen) > before + 50, "more events")
    async with asyncio.timeout(BOUND):
        while await there.stop("one", "why", owner="ann") == "queued":
            await asyncio.sleep(0.01)
    await asyncio.wait_for(answer.wait(), BOUND)
    await watching
    assert seen[-1].data["reason"] == "why"


async def test_bug_03_a_stop_that_lands_in_another_process(site: Site) -> None:
    here, there = await site.process(), await site.process()
    answer = await site.begin(here, reply=ENDLESS)
    viewer = await attach(there)
    await some_of(viewer, 5)
    assert await there.stop("one", "Stop was pressed", owner="ann") == "stopped"
    assert await asyncio.to_thread(site.fake.connections[0].wait_left, BOUND)
    end = (await rest_of(viewer))[-1].data
    await answer.wait()
    assert (end["outcome"], end["reason"], end["text"]) == ("aborted", "Stop was pressed", site.results[0].text)


async def test_bug_12_a_producer_that_is_killed(site: Site) -> None:
    """Each of its answers gets exactly one end, by whichever process notices; each viewer gets it."""
    site.fake.script("/api/chat", ENDLESS, always=True)
    readers = [await site.process(lease=1.5) for _ in range(2)]
    with running(WORKER, site.redis.url, site.fake.url, "10", "1.5") as producer:
        await asyncio.to_thread(producer.said, "begun")
        seen: dict[tuple[int, int], list[Event]] = {}
        watching = []
        for number in range(10):
            for place, reader in enumerate(readers):
                events = seen[number, place] = []
                watching.append(asyncio.create_task(watch(reader, events, str(number))))
        await until(lambda: all(len(events) > 5 for events in seen.values()), "events for all")
        producer.process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        await asyncio.gather(*watching)
        assert time.monotonic() - begun < 10
    for (number, _), events in seen.items():
        assert events[-1].data["outcome"] == "lost"
        check_whole(events, events[-1].data["text"])
        assert site.ends(f"{{ollama-async}}:log:ann:{number}") == ["lost"]
    assert {each.state for each in await readers[0].list("ann")} == {"ended"}


VIEWER = """
import asyncio, sys
from ollama_async.durable import DurableAnswers

async def main():
    async with DurableAnswers.from_url(sys.argv[1], lease=1.2) as answers:
        async with await answers.attach("one", owner="ann") as viewer:
            async for event in viewer:
                print(event.number, flush=True)

asyncio.run(main())
"""


async def test_viewers_that_are_killed(site: Site) -> None:
    """The answer goes on for the others; and once there are none, nobody counts as one that watches."""
    here, there = await site.process(lease=1.2), await site.process(lease=1.2)
    answer = await site.begin(here, reply=ENDLESS, unattended=1)
    with running("-c", VIEWER, site.redis.url) as one, running("-c", VIEWER, site.redis.url) as other:
        async with await attach(there) as viewer:
            for program in (one, other):
                await asyncio.to_thread(program.said, "10\n")
                program.process.send_signal(signal.SIGKILL)
                program.process.wait(BOUND)
            events = await some_of(viewer, 300)
            assert numbers_of(events) == list(range(1, 301))
            assert site.results == []
    await asyncio.wait_for(answer.wait(), BOUND)
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", UNATTENDED)
    check_whole(await rest_of(await attach(there)), site.results[0].text)


async def test_many_attach_at_once(site: Site) -> None:
    """Whoever waits for a turn is not told that Redis is away."""
    here, there = await site.process(), await site.process()
    site.fake.script("/api/chat", telling(2), always=True)
    for start in range(0, 300, 50):
        await asyncio.gather(*(site.begin(here, str(number)) for number in range(start, start + 50)))
    await here._carrier.drain()
    real = there._carrier._reader._read_all

    async def slowly(mirror: Any) -> None:
        await asyncio.sleep(0.03)  # together more than anybody waits for a connection
        await real(mirror)

    there._carrier._reader._read_all = slowly
    viewers = await asyncio.gather(*(attach(there, str(number)) for number in range(300)))
    for events in await asyncio.gather(*map(rest_of, viewers)):
        check_whole(events, "".join(words(2)))


async def test_beginning_many_takes_no_longer_than_beginning_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip for each would hold up the leases of those that run."""
    here = await site.process()
    site.fake.script("/api/chat", telling(1), always=True)
    await site.begin(here, "first")
    sent = 0
    real = Pipeline.execute

    async def counted(self: Any, raise_on_error: bool = True) -> Any:
        nonlocal sent
        sent += 1
        return await real(self, raise_on_error)

    monkeypatch.setattr(Pipeline, "execute", counted)
    await asyncio.gather(*(site.begin(here, str(number)) for number in range(50)))
    # Two for those that come together; each of them ends meanwhile.
    assert sent < 25


async def test_a_user_who_may_not_run_scripts(site: Site) -> None:
    site.redis.ask("ACL", "SETUSER", "plain", "on", ">secret", "~*", "&*", "+@all", "-eval")
    url = site.redis.url.replace("//", "//plain:secret@")
    here, there = await site.process(url), await site.process(url)
    await site.begin(here, reply=telling(50, 0.005))
    check_whole(await rest_of(await attach(there)), "".join(words(50)))


async def test_bug_14_a_hole_is_told(site: Site) -> None:
    here, there = await site.process(), await site.process()
    await (await site.begin(here, reply=telling(500, 0.001))).wait()
    await here._carrier.drain()
    entries = site.redis.ask("XRANGE", LOG, "-", "+")
    assert len(entries) > 4
    site.redis.ask("XDEL", LOG, entries[2][0])
    viewer = await attach(there)
    with pytest.raises(AnswerGap, match="are missing"):
        async with viewer:
            async for _ in viewer:
                pass


async def test_bug_17_nothing_stays_for_ever(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS, always=True)
    with running(WORKER, site.redis.url, site.fake.url, "3", "1") as producer:
        await asyncio.to_thread(producer.said, "begun")
        producer.process.send_signal(signal.SIGKILL)
        producer.process.wait(BOUND)
    there = await site.process(keep=0.2, unattended=60)
    await (await site.begin(there, reply=telling(3))).wait()
    await rest_of(await attach(there))
    keys = site.redis.ask("KEYS", "*")
    assert len(keys) > 6
    assert [key for key in keys if site.redis.ask("PTTL", key) == -1] == []


async def test_bug_18_connections_do_not_grow_with_viewers(site: Site) -> None:
    here, there = await site.process(), await site.process()
    site.fake.script("/api/chat", telling(100, 0.01), always=True)
    for number in range(20):
        await site.begin(here, str(number))
    viewers = await asyncio.gather(*(attach(there, str(number % 20)) for number in range(200)))
    # For each process: the writer's, the reader's, at most four for commands, and two of the registry.
    assert len(site.redis.ask("CLIENT", "LIST").splitlines()) - 1 <= 2 * 8
    for events in await asyncio.gather(*map(rest_of, viewers)):
        check_whole(events, "".join(words(100)))


async def test_many_answers_are_followed_over_one_connection(site: Site) -> None:
    """Attaching takes some more, which are closed once all have attached; and opened again for whoever comes."""
    here, there = await site.process(), await site.process()
    gate = Gate()
    steps = Reply.chat("0", "1").steps
    site.fake.script("/api/chat", Reply([steps[0], gate, *steps[1:]]), always=True)
    for number in range(100):
        await site.begin(here, str(number))

    def connections() -> int:
        return len(site.redis.ask("CLIENT", "LIST").splitlines())

    before = connections()
    viewers = await asyncio.gather(*(attach(there, str(number)) for number in range(100)))
    assert connections() > before + 1
    await until(lambda: connections() == before + 1, "that one connection is left")
    late = await attach(there, "7")
    gate.open()
    for events in await asyncio.gather(*map(rest_of, [*viewers, late])):
        check_whole(events, "01")
    check_whole(await rest_of(await attach(there, "7")), "01")


async def test_bug_19_connections_that_are_lost(site: Site) -> None:
    """300 viewers in two processes come and go at random offsets over 20 answers, while connections are killed."""
    here, there, elsewhere = [await site.process(lease=5) for _ in range(3)]
    site.fake.script("/api/chat", telling(400, 0.008), always=True)
    for number in range(20):
        await site.begin(here, str(number))
    sent, luck = "".join(words(400)), random.Random(3)

    async def kill() -> None:
        # Not until all have ended: on a slow machine 300 viewers need longer than 0.3 s to come back.
        for _ in range(20):
            await asyncio.sleep(0.3)
            site.redis.ask("CLIENT", "KILL", "TYPE", "normal")

    async def come_and_go(turn: int) -> None:
        events = list[Event]()
        while not events or events[-1].name != "end":
            where = luck.choice([there, elsewhere])
            try:
                viewer = await attach(where, str(turn % 20), len(events))
            except AnswersUnavailable:
                await asyncio.sleep(0.05)
                continue
            async with viewer:
                for _ in range(luck.randrange(1, 40)):
                    new = await viewer.read()
                    events += new
                    if events[-1].name == "end":
                        break
        check_whole(events, sent)

    async with asyncio.timeout(4 * BOUND):
        await asyncio.gather(kill(), *map(come_and_go, range(300)))
    assert {result.outcome for result in site.results} == {"done"}
    assert not there._carrier._reader._mirrors
    assert not elsewhere._carrier._reader._mirrors


async def test_bug_21_deployments_are_apart(site: Site) -> None:
    here, there = await site.process(), await site.process(namespace="other")
    await (await site.begin(here, reply=telling(3))).wait()
    with pytest.raises(UnknownAnswer):
        await attach(there)
    assert await there.list("ann") == []
    await site.begin(there, reply=telling(4))
    check_whole(await rest_of(await attach(there)), "".join(words(4)))


async def test_bug_22_a_producer_that_does_not_move_is_not_needed_to_attach(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS, always=True)
    there = await site.process(lease=30)
    with running(WORKER, site.redis.url, site.fake.url, "1", "30") as producer:
        await asyncio.to_thread(producer.said, "begun")
        async with await attach(there, "0") as viewer:
            await some_of(viewer, 10)
        producer.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(2), await attach(there, "0") as viewer:
            await some_of(viewer, 10)


@pytest.mark.parametrize("which", ["reader", "writer"])
async def test_closing_though_redis_py_loses_the_cancellation(
    site: Site, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """On Python 3.11 it does, when a command has just been sent."""
    here, there = await site.process(), await site.process()
    await site.begin(here, reply=ENDLESS)
    await some_of(await attach(there), 5)
    talks = there._carrier._reader if which == "reader" else here._carrier._writer
    step = "_look" if which == "reader" else "_flush"
    real, reached = getattr(talks, step), asyncio.Event()

    async def lose(*arguments: Any) -> None:
        reached.set()
        try:
            await asyncio.sleep(BOUND)
        except asyncio.CancelledError:
            monkeypatch.undo()
        await real(*arguments)

    monkeypatch.setattr(talks, step, lose)
    viewer = await attach(there)
    async with asyncio.timeout(BOUND):
        await reached.wait()
        async with asyncio.timeout(BOUND / 2):
            await (there if which == "reader" else here).aclose(drain=0.1)
    viewer.detach()
    assert talks._task is None


# -- what Redis does --


@pytest.mark.parametrize("seconds", [4.0, *[10.0] * LONG])
async def test_redis_is_frozen(site: Site, seconds: float) -> None:
    here, there = await site.process(lease=2), await site.process(lease=2)
    sent = words(int(200 * seconds))
    answer = await site.begin(here, reply=Reply.chat(*sent, interval=0.005))
    seen, at_home = list[Event](), list[Event]()
    watching = [asyncio.create_task(watch(there, seen)), asyncio.create_task(watch(here, at_home))]
    await until(lambda: len(seen) > 50, "events")
    site.redis.freeze()
    home = len(at_home)
    await asyncio.sleep(0.5)
    assert len(at_home) > home + 30  # the model is not slowed, nor those who watch here
    await asyncio.sleep(seconds)  # longer than a lease, and than anybody waits for an answer
    site.redis.thaw()
    await asyncio.gather(*watching)
    await answer.wait()
    check_whole(seen, "".join(sent))
    assert seen == at_home
    await here._carrier.drain()
    assert site.ends() == ["done"]


@pytest.mark.parametrize("away", [0.5, 3.0])
async def test_redis_comes_back_empty(site: Site, away: float) -> None:
    here, there = await site.process(lease=4), await site.process(lease=4)
    await site.begin(here, reply=telling(700, 0.008))
    seen = list[Event]()
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 100, "events")
    site.redis.kill()
    await asyncio.sleep(away)
    with pytest.raises(AnswersUnavailable):
        await attach(await site.process())
    assert (await attach(here, after=50)).after == 50
    site.redis.start()
    await watching
    check_whole(seen, "".join(words(700)))
    late = await site.process()
    check_whole(await rest_of(await attach(late)), "".join(words(700)))
    assert site.ends() == ["done"]


async def test_redis_comes_back_from_an_old_snapshot(site: Site) -> None:
    here, there = await site.process(), await site.process()
    await site.begin(here, reply=telling(600, 0.005))
    seen = list[Event]()
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 100, "events")
    site.redis.ask("SAVE")
    before = len(seen)
    await until(lambda: len(seen) > before + 100, "more events")
    site.redis.kill()
    site.redis.start()
    assert len(site.entries()) < len(seen)
    await watching
    check_whole(seen, "".join(words(600)))
    late = await site.process()
    check_whole(await rest_of(await attach(late)), "".join(words(600)))
    assert numbers_of(seen) == list(range(1, len(site.entries()) + 1))


async def test_redis_is_another_one_while_nothing_is_sent(site: Site) -> None:
    """redis-py connects anew in silence; what follows must not be appended to a log that lacks what was before."""
    here = await site.process(registry=AbortRegistry.from_url("memory://"))
    steps = telling(200).steps
    early, late = Gate(), Gate()
    await site.begin(here, reply=Reply([*steps[:50], early, *steps[50:100], late, *steps[100:]]))
    await until(lambda: len(site.entries()) == 51, "the first part")
    site.redis.ask("SAVE")
    early.open()
    await until(lambda: len(site.entries()) == 101, "the second part")
    site.redis.kill()
    site.redis.start()
    assert len(site.entries()) == 51
    late.open()
    seen = await rest_of(await attach(await site.process()))
    check_whole(seen, "".join(words(200)))


WITHOUT_TAIL = """
local entries = redis.call('XRANGE', KEYS[1], '-', '+')
redis.call('DEL', KEYS[1])
for place = 1, #entries - 1 do redis.call('XADD', KEYS[1], entries[place][1], unpack(entries[place][2])) end
"""


async def test_redis_loses_a_tail_and_no_connection_breaks(site: Site) -> None:
    """As behind a proxy that hides a failover."""
    here = await site.process(lease=0.6)
    gate = Gate()
    await site.begin(here, reply=Reply([*telling(200).steps[:100], gate, *telling(200).steps[100:]]))
    await until(lambda: len(site.entries()) == 101, "the log")
    site.redis.ask("EVAL", WITHOUT_TAIL, "1", LOG)
    await until(lambda: len(site.entries()) == 101, "the tail again")
    gate.open()
    there = await site.process()
    check_whole(await rest_of(await attach(there)), "".join(words(200)))


async def test_redis_is_emptied_and_no_connection_breaks(site: Site) -> None:
    here, there = await site.process(), await site.process()
    await site.begin(here, reply=telling(400, 0.005))
    seen = list[Event]()
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 50, "events")
    site.redis.ask("FLUSHALL")
    await until(lambda: site.redis.ask("EXISTS", LOG), "the log again")
    assert site.redis.ask("XRANGE", LOG, "-", "+", "COUNT", "1")[0][0] == "1-0"
    check_whole(await rest_of(await attach(await site.process())), "".join(words(400)))
    await watching
    check_whole(seen, "".join(words(400)))


async def test_begun_while_redis_is_away(site: Site) -> None:
    here, there = await site.process(), await site.process()
    site.redis.kill()
    answer = await site.begin(here, reply=telling(300, 0.005))
    assert not answer.claimed
    async with await attach(here) as viewer:
        await some_of(viewer, 5)
    with pytest.raises(AnswersUnavailable):
        await attach(there)
    with pytest.raises(AnswersUnavailable):
        await there.list("ann")
    site.redis.start()
    seen = list[Event]()
    async with asyncio.timeout(BOUND):
        while not seen:
            try:
                seen = await rest_of(await attach(there))
            except AnswersUnavailable:
                await asyncio.sleep(0.01)
    check_whole(seen, "".join(words(300)))


async def test_begun_twice_at_once(site: Site) -> None:
    here, there = await site.process(), await site.process()
    site.fake.script("/api/chat", telling(2), always=True)
    for number in range(50):
        both = (site.begin(where, str(number)) for where in (here, there))
        got = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(each).__name__ for each in got) == ["Answer", "AnswerInUse"]
    await until(lambda: len(site.results) == 50, "all ends")
    assert len(site.fake.requests) == 50


async def test_begun_twice_while_redis_is_away(site: Site) -> None:
    """One of both ends when Redis is back; the log has the text of the other, and nothing else."""
    here, there = await site.process(), await site.process()
    site.redis.kill()
    site.fake.script("/api/chat", ENDLESS, always=True)
    both = [await site.begin(where) for where in (here, there)]
    viewers = [answer.attach() for answer in both]
    for viewer in viewers:
        await some_of(viewer, 10)
    site.redis.start()
    await until(lambda: site.results, "that one is superseded")
    assert (site.results[0].outcome, site.results[0].reason) == ("superseded", SUPERSEDED)
    loser = next(place for place, answer in enumerate(both) if answer._producer.task.done())
    end = (await rest_of(viewers[loser]))[-1]
    assert (end.number, end.name, end.data["outcome"]) == (None, "end", "superseded")
    assert await asyncio.to_thread(site.fake.connections[loser].wait_left, BOUND)
    await (await site.process()).stop("one", owner="ann")
    await both[1 - loser].wait()
    await until(lambda: len(site.results) == 2, "both ends")
    seen = await rest_of(await attach(await site.process()))
    check_whole(seen, site.results[1].text)


async def test_a_frozen_producer_that_wakes(site: Site) -> None:
    site.fake.script("/api/chat", ENDLESS, always=True)
    there = await site.process(lease=1.2)
    with running(WORKER, site.redis.url, site.fake.url, "1", "1.2") as producer:
        await asyncio.to_thread(producer.said, "begun")
        seen = list[Event]()
        watching = asyncio.create_task(watch(there, seen, "0"))
        await until(lambda: len(seen) > 10, "events")
        producer.process.send_signal(signal.SIGSTOP)
        await watching
        assert seen[-1].data["outcome"] == "lost"
        producer.process.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(site.fake.connections[0].wait_left, BOUND)
        await asyncio.to_thread(producer.said, "superseded")
    assert site.ends("{ollama-async}:log:ann:0") == ["lost"]
    assert len(site.entries("{ollama-async}:log:ann:0")) == len(seen)


async def test_nobody_watches_in_any_process(site: Site) -> None:
    here, there = await site.process(lease=1.2), await site.process(lease=1.2)
    answer = await site.begin(here, reply=ENDLESS, unattended=0.6)
    async with await attach(there) as viewer:
        async with asyncio.timeout(BOUND):
            begun = time.monotonic()
            while time.monotonic() - begun < 2:
                assert await viewer.read()
        assert site.results == []
    await asyncio.wait_for(answer.wait(), BOUND)
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", UNATTENDED)
    assert (await rest_of(await attach(there)))[-1].data["reason"] == UNATTENDED


async def test_an_offset_that_redis_does_not_have_yet(site: Site) -> None:
    """Whoever watched in the producer's process was ahead of Redis; a reload lands elsewhere."""
    here, there = await site.process(), await site.process()
    gate, later = Gate(), Gate()
    steps = telling(60).steps
    await site.begin(here, reply=Reply([*steps[:50], gate, *steps[50:55], later, *steps[55:]]))
    await until(lambda: len(site.entries()) == 51, "the log")
    attaching = asyncio.create_task(attach(there, after=55))
    await asyncio.sleep(0.1)
    assert not attaching.done()
    gate.open()
    viewer = await attaching
    later.open()
    check_whole(await rest_of(viewer), "".join(words(60)), 55)
    with pytest.raises(BadOffset):
        await attach(there, after=64)


# -- a Redis that refuses --


async def test_a_redis_without_room(site: Site) -> None:
    here = await site.process()
    running_one = await site.begin(here, "other", reply=telling(300, 0.005))
    site.redis.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(RedisFull, match="maxmemory"):
        await site.begin(here)
    await asyncio.sleep(0.2)
    site.redis.ask("CONFIG", "SET", "maxmemory", "0")
    await running_one.wait()
    await here._carrier.drain()
    check_whole(await rest_of(await attach(await site.process(), "other")), "".join(words(300)))
    assert len(site.fake.requests) == 1


@pytest.mark.parametrize("command", ["xadd", "set", "zadd"])
async def test_a_redis_without_a_right(site: Site, command: str) -> None:
    site.redis.ask("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", f"-{command}")
    url = site.redis.url.replace("//", "//app:pw@")
    here = await site.process(url, registry=(await site.process()).registry)
    with pytest.raises(RedisRefuses, match="rights"):
        await site.begin(here)
    assert site.fake.requests == ()
    assert site.redis.ask("EXISTS", LOG) == 0


async def test_a_redis_with_a_wrong_password(site: Site) -> None:
    site.redis.ask("CONFIG", "SET", "requirepass", "right")
    here = await site.process(site.redis.url.replace("//", "//:wrong-secret@"))
    with pytest.raises(RedisRefuses, match="password") as caught:
        await site.begin(here)
    assert "wrong-secret" not in f"{caught.value}"
    with pytest.raises(RedisRefuses, match="password"):
        await attach(here)
    assert site.fake.requests == ()


async def test_a_redis_that_is_too_old(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_OLDEST", (99, 0))
    here = await site.process()
    with pytest.raises(RedisTooOld, match=r"too old.*6\.2"):
        await site.begin(here)
    with pytest.raises(RedisTooOld):
        await attach(here)
    assert site.fake.requests == ()


async def test_the_rights_that_the_documentation_names(site: Site) -> None:
    rights = Path(__file__).parents[2] / "docs" / "durable.md"
    line = next(line for line in rights.read_text().splitlines() if line.startswith("ACL SETUSER"))
    site.redis.ask("ACL", *line.removeprefix("ACL ").split())
    url = site.redis.url.replace("//", "//app:secret@")
    here, there = await site.process(url, unattended=30, lease=0.6), await site.process(url, unattended=30, lease=0.6)
    await site.begin(here, reply=telling(100, 0.02))
    seen = list[Event]()
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 10, "events")
    assert (await there.list("ann"))[0].state == "running"
    site.redis.ask("CLIENT", "KILL", "TYPE", "normal")
    await watching
    check_whole(seen, "".join(words(100)))


@pytest.mark.parametrize(
    "write",
    [
        ["SET", LOG, "text"],
        ["XADD", LOG, "*", "e", '{"open":{}}'],
        ["XADD", LOG, "1-0", "other", "x"],
        ["XADD", LOG, "1-0", "e", "not json"],
        ["XADD", LOG, "1-0", "e", '{"chunk":{"message":7}}'],
        ["XADD", LOG, "1-1", "e", '{"open":{}}'],
    ],
)
async def test_a_log_that_somebody_else_wrote(site: Site, write: list[str]) -> None:
    here = await site.process()
    site.redis.ask(*write)
    with pytest.raises(AnswerGap):
        await rest_of(await attach(here))
    with pytest.raises(AnswerInUse):
        await site.begin(here)
    assert site.fake.requests == ()


async def test_somebody_else_writes_into_a_log(site: Site) -> None:
    """The refusal of the next entry tells of it, long before the lease is renewed; other answers go on."""
    here, there = await site.process(lease=300), await site.process(lease=300)
    site.fake.script("/api/chat", ENDLESS, always=True)
    before, answer, behind = [await site.begin(here, name) for name in ("before", "one", "behind")]
    seen = list[Event]()
    watching = asyncio.create_task(watch(there, seen))
    await until(lambda: len(seen) > 5, "events")
    site.redis.ask("XADD", LOG, "100000-0", "e", '"x"')
    await asyncio.wait_for(answer.wait(), BOUND)
    assert [(result.id, result.outcome) for result in site.results] == [("one", "superseded")]
    with pytest.raises(AnswerGap):
        await watching
    for other in (before, behind):
        other.stop()
        await other.wait()
    await here._carrier.drain()
    for name in ("before", "behind"):
        assert check_whole(await rest_of(await attach(there, name)), site.results.pop(1).text)["outcome"] == "aborted"


# -- names --


def test_keys_cannot_be_taken_for_others() -> None:
    keys = _server.Keys("a:{b}*", shards=16)
    names = [
        Name(owner, each) for owner in ("", "a", "a:", "}", "{x}") for each in ("b", ":b", "*", "}:log:", "\u00fc")
    ]
    made = {getattr(keys, kind)(name) for name in names for kind in ("log", "run", "seen")}
    assert len(made) == 3 * len(names)
    for name in names:
        tags = {getattr(keys, kind)(name).partition("}")[0] for kind in ("log", "run", "seen")}
        assert len(tags) == 1
        assert keys.log(name).startswith("{a%3A%7Bb%7D%2A:")
    assert len({keys.log(name).partition("}")[0] for name in names}) > 5
    assert _server.Keys("n").log(Name("o", "i")) == "{n}:log:o:i"


async def test_nothing_is_left_behind(site: Site) -> None:
    here, there = await site.process(keep=6), await site.process(keep=6)
    site.fake.script("/api/chat", telling(5), always=True)
    for start in range(0, 300, 50):
        await asyncio.gather(*(site.begin(here, str(number)) for number in range(start, start + 50)))
        for number in range(start, start + 50, 10):
            await rest_of(await attach(there, str(number)))
    await here._carrier.drain()
    writer, reader = here._carrier._writer, there._carrier._reader
    await until(lambda: not (reader._mirrors or reader._jobs), "that no viewer is left")
    assert not any([writer._writings, writer._urgent, writer._news, writer._claims])
    await here.aclose()
    await there.aclose()
    # The index lives as long as a lease more.
    await until(lambda: all(":of:" in key for key in site.redis.ask("KEYS", "*")), "the end of all keys")
    await until(lambda: len(site.redis.ask("CLIENT", "LIST").splitlines()) == 1, "that Redis sees nobody but this")
