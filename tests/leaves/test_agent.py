"""Agents: the loop of model and tools, every way to stop it, and the conversation that is left after each."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectionBroken,
    Message,
    PhaseTimeout,
    Pool,
    RequestError,
    ServerError,
    StreamBusy,
    StreamClosed,
    StreamTruncated,
    Timeouts,
)
from ollama_async.agent import (
    Agent,
    AgentResult,
    AgentRun,
    ApprovalError,
    Done,
    LimitReached,
    Text,
    Thinking,
    ToolArgumentError,
    ToolError,
    ToolFinished,
    ToolResultError,
    ToolStarted,
    ToolTimeout,
    TurnEnded,
    UnknownTool,
)
from ollama_async.testing import Cut, FakeOllama, Gate, Reply, Stall, nothing_left_behind
from ollama_async.testing._left import registrations
from ollama_async.until import max_chars

BOUND = 10.0


def calling(*names: str, **arguments: Any) -> Reply:
    """An answer that calls tools, all with the same arguments."""
    calls = [{"id": f"{n}", "function": {"name": name, "arguments": arguments}} for n, name in enumerate(names)]
    return Reply.chat("I look.", tool_calls=calls)


def assert_valid(messages: list[Message]) -> None:
    """Each call of a tool has its answer, in order, right after the message that has the call."""
    open_calls: list[Any] = []
    for message in messages:
        if message.role == "tool":
            call = open_calls.pop(0)
            assert (message.tool_name, message.tool_call_id) == (call.function.name, call.id)
            assert isinstance(message.content, str)
        else:
            assert open_calls == []
            open_calls = [*(message.tool_calls or ())]
    assert open_calls == []


def mark(message: Message) -> Any:
    return message.get("outcome")


@pytest.fixture
async def client(fake_ollama: FakeOllama) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_ollama.url) as client:
        yield client


async def events(run: AgentRun) -> list[Any]:
    async with asyncio.timeout(BOUND):
        return [event async for event in run]


async def result(run: AgentRun) -> AgentResult:
    async with asyncio.timeout(BOUND):
        return await run


async def failure(run: AgentRun, kind: type[BaseException]) -> Any:
    with pytest.raises(kind) as caught:
        await result(run)
    return caught.value


# -- the loop --


def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    Args:
        city: The city.
    """
    return f"{city}: 20 {unit}"


async def rain(city: str) -> dict[str, Any]:
    return {"city": city, "mm": 3}


async def test_the_model_calls_tools_until_it_has_answered(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    calls = calling("weather", "rain", city="Lima").whole["message"]["tool_calls"]  # type: ignore[index]
    first = Reply.chat("I ", "look.", thinking=["Hm."], tool_calls=calls)
    fake_ollama.script("/api/chat", first, Reply.chat("It is ", "20."))
    agent = Agent(client, "fake", [weather, rain], system="Be brief.", think=True)
    got = await events(agent.run("Weather?"))
    kinds = [type(event) for event in got]
    assert kinds[:3] == [Thinking, Text, Text]
    assert sorted(kind.__name__ for kind in kinds[3:7]) == ["ToolFinished"] * 2 + ["ToolStarted"] * 2
    assert kinds[7:] == [TurnEnded, Text, Text, TurnEnded, Done]
    finished = {event.call.function.name: event for event in got if isinstance(event, ToolFinished)}
    assert finished["weather"].content == "Lima: 20 C"
    assert finished["rain"].content == '{"city":"Lima","mm":3}'
    whole = got[-1].result
    assert_valid(whole.messages)
    assert [message.role for message in whole.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (whole.text, whole.outcome, whole.reason, whole.left) == ("It is 20.", "done", None, ())
    assert all(mark(message) is None for message in whole.messages)
    usage = whole.usage
    assert (usage.turns, usage.tool_calls, usage.prompt_eval_count, usage.eval_count) == (2, 2, 22, 6)
    one, two = (request.json() for request in fake_ollama.requests)
    assert [tool["function"]["name"] for tool in one["tools"]] == ["weather", "rain"]
    assert one["think"] is True
    assert one["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    assert [message["role"] for message in two["messages"]] == ["system", "user", "assistant", "tool", "tool"]


async def test_a_pool_serves_an_agent(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.chat("20."))
    async with nothing_left_behind(), Pool(fake_ollama.url) as pool:
        assert (await result(Agent(pool, "fake", [weather], sticky="c").run("Weather?"))).text == "20."


async def test_a_run_can_be_a_task_or_be_gathered(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Hi."), always=True)
    agent = Agent(client, "fake")
    async with asyncio.timeout(BOUND), asyncio.TaskGroup() as group:
        task = group.create_task(agent.run("a").collect())
    assert [each.text for each in await asyncio.gather(agent.run("b"), agent.run("c"))] == ["Hi.", "Hi."]
    assert task.result().text == "Hi."


async def test_the_given_messages_are_not_changed_and_not_lost(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    given = [{"role": "user", "content": "Hi"}]
    fake_ollama.script("/api/chat", Reply.chat("Hello."))
    run = Agent(client, "fake").run(given)
    run.abort("before it began")
    error = await failure(run, AbortError)
    assert [message.content for message in error.partial.messages] == ["Hi"]
    assert fake_ollama.requests == ()
    whole = await result(Agent(client, "fake").run(given))
    assert given == [{"role": "user", "content": "Hi"}]
    assert [message.content for message in whole.messages] == ["Hi", "Hello."]


async def test_a_run_leaves_nothing_on_a_token_that_outlives_it(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    token = CancelToken()
    agent = Agent(client, "fake", [weather], max_turns=1, tool_timeout=BOUND)
    fake_ollama.script("/api/chat", Reply.chat("Hi."), calling("weather", city="Lima"))
    await result(agent.run("Go", token=token))
    assert registrations(token) == 0
    await failure(agent.run("Go", token=token), LimitReached)
    assert registrations(token) == 0


async def test_tools_run_at_the_same_time(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    both = threading.Barrier(2)
    here: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]

    def one() -> str:
        both.wait(BOUND)
        return "1"

    def two() -> str:
        both.wait(BOUND)
        return "2"

    async def three() -> str:
        here[0].set()
        await here[1].wait()
        return "3"

    async def four() -> str:
        here[1].set()
        await here[0].wait()
        return "4"

    fake_ollama.script("/api/chat", calling("one", "two", "three", "four"), Reply.chat("Done."))
    whole = await result(Agent(client, "fake", [one, two, three, four]).run("Go"))
    assert [message.content for message in whole.messages if message.role == "tool"] == ["1", "2", "3", "4"]


# -- every way to stop, at every place --

ENDLESS = Reply.endless_chat(0.005)


class Boom(Exception):
    """Raised in the body of a loop."""


class Scene:
    """A run that is stopped at a place."""

    def __init__(self, client: AsyncClient, server: FakeOllama, place: str) -> None:
        self.client, self.server, self.place = client, server, place
        self.reached = asyncio.Event()
        self.never = asyncio.Event()
        self.tools_ended: list[str] = []
        self.token = CancelToken()
        tools = [self.wait, self.work, self.quick]
        name = {"async tool": "wait", "thread tool": "work", "between turns": "quick", "approval": "wait"}.get(place)
        if place == "stream":
            server.script("/api/chat", ENDLESS)
        elif place == "approval":
            server.script("/api/chat", calling("wait", "quick"))
        elif name is not None:
            server.script("/api/chat", calling(name))
        self.agent = Agent(client, "fake", tools, approve=self.approve if place == "approval" else None)
        self.run = self.agent.run("Go", token=self.token)
        self.loop = asyncio.get_running_loop()

    async def wait(self) -> str:
        try:
            if self.place == "async tool":
                self.reached.set()
            await self.never.wait()
        finally:
            # A clean-up that takes its rounds.
            for _ in range(3):
                await asyncio.sleep(0)
            self.tools_ended.append("wait")
        return "never"

    def work(self, token: CancelToken) -> str:
        stopped = threading.Event()
        token.on_abort(lambda _: stopped.set())
        self.loop.call_soon_threadsafe(self.reached.set)
        assert stopped.wait(BOUND)
        self.tools_ended.append("work")
        token.raise_if_aborted()
        return "never"

    def quick(self) -> str:
        return "quick"

    async def approve(self, call: Any) -> bool:
        if call.function.name == "quick":
            self.reached.set()
            await self.never.wait()
        return True

    def is_there(self, event: object) -> bool:
        """Whether a body that gets the event is at the place."""
        wanted = {"stream": Text, "between turns": TurnEnded}.get(self.place, ToolStarted)
        return isinstance(event, wanted)

    async def read(self, leave: str = "") -> None:
        async for event in self.run:
            if self.is_there(event):
                if leave:
                    if self.place not in ("stream", "between turns"):
                        await self.reached.wait()
                    if leave == "raise":
                        raise Boom
                    break
                if self.place in ("stream", "between turns"):
                    self.reached.set()
                if self.place == "between turns":
                    await self.never.wait()
                    # Not by the cancellation of the reader, which is in here then.
                    self.never.clear()

    def assert_stopped_at_once(self) -> None:
        """While the loop stands still, as it does in here."""
        if self.place == "stream":
            (request,) = self.server.requests
            assert request.connection.wait_left()


Stop = Callable[[Scene, "asyncio.Task[None]"], Awaitable[object]]


async def abort(scene: Scene, reader: asyncio.Task[None]) -> object:
    assert scene.run.abort("Stop")
    assert not scene.run.abort("again")
    return AbortError


async def abort_in_thread(scene: Scene, reader: asyncio.Task[None]) -> object:
    threading.Thread(target=scene.run.abort, args=("Stop",)).start()
    scene.assert_stopped_at_once()
    while scene.run.outcome is None:
        await asyncio.sleep(0)
    return AbortError


async def abort_token(scene: Scene, reader: asyncio.Task[None]) -> object:
    scene.token.abort("Stop")
    return AbortError


async def abort_client(scene: Scene, reader: asyncio.Task[None]) -> object:
    scene.client.abort("Stop")
    return AbortError


async def cancel(scene: Scene, reader: asyncio.Task[None]) -> object:
    reader.cancel()
    if scene.place == "stream":
        await asyncio.wait([reader], timeout=BOUND)
    return asyncio.CancelledError


async def aclose(scene: Scene, reader: asyncio.Task[None]) -> object:
    async with asyncio.timeout(BOUND):
        await scene.run.aclose()
    return StreamClosed


PLACES = ["stream", "async tool", "thread tool", "between turns", "approval"]
RAN = {"async tool": ["wait"], "approval": ["wait"], "thread tool": ["work"]}
OUTCOMES = {AbortError: "aborted", StreamClosed: "closed"}


async def assert_goes_on(scene: Scene) -> None:
    """What is left is a valid conversation, which the agent can continue."""
    kept = scene.run.result
    assert_valid(kept.messages)
    assert kept.usage.turns == 1
    last = kept.messages[-1]
    if scene.place == "stream":
        assert last.role == "assistant"
        assert last.content
        assert mark(last) == scene.run.outcome
    else:
        assert last.role == "tool"
        assert mark(last) == (None if scene.place == "between turns" else "aborted")
        assert kept.usage.eval_count > 0
    scene.server.script("/api/chat", Reply.chat("On."))
    scene.never.set()
    after = await result(scene.agent.run(kept.messages))
    assert after.text == "On."
    assert after.messages[: len(kept.messages)] == kept.messages
    sent = scene.server.requests[-1].json()["messages"]
    assert [message["role"] for message in sent] == [message.role for message in kept.messages]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stop", [abort, abort_in_thread, abort_token, abort_client, cancel, aclose])
async def test_a_stop_from_outside(fake_ollama: FakeOllama, place: str, stop: Stop) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, place)
        reader = asyncio.create_task(scene.read())
        async with asyncio.timeout(BOUND):
            await scene.reached.wait()
        expected: Any = await stop(scene, reader)
        scene.assert_stopped_at_once()
        if place == "between turns":
            scene.never.set()
        with pytest.raises(expected) as caught:
            await asyncio.wait_for(reader, BOUND)
        # Before the reader got its error, every tool had ended.
        assert scene.tools_ended == RAN.get(place, [])
        outcome = OUTCOMES.get(expected, "closed" if place == "between turns" else "cancelled")
        assert scene.run.outcome == outcome
        if expected is AbortError:
            assert caught.value.reason == scene.run.result.reason == "Stop"
            assert caught.value.partial == scene.run.result
        assert len(fake_ollama.requests) == 1
        assert registrations(scene.token) == 0
        await assert_goes_on(scene)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("leave", ["break", "raise"])
async def test_a_loop_that_is_left_stops_everything_at_once(fake_ollama: FakeOllama, place: str, leave: str) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, place)
        async with asyncio.timeout(BOUND):
            if leave == "raise":
                with pytest.raises(Boom):
                    await scene.read(leave)
            else:
                await scene.read(leave)
            # Nothing has run since.
            assert scene.run.outcome == "closed"
            scene.assert_stopped_at_once()
            assert_valid(scene.run.result.messages)
            await scene.run.aclose()
        assert scene.tools_ended == RAN.get(place, [])
        with pytest.raises(StreamClosed):
            await anext(scene.run)
        assert registrations(scene.token) == 0
        await assert_goes_on(scene)


@pytest.mark.parametrize("place", PLACES)
async def test_a_timeout_around_a_run_stops_it(fake_ollama: FakeOllama, place: str) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, place)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:

                async def pass_it() -> None:
                    await scene.reached.wait()
                    limit.reschedule(0)

                passing = asyncio.create_task(pass_it())
                await scene.read()
        scene.assert_stopped_at_once()
        await passing
        await scene.run.aclose()
        assert scene.run.outcome == ("closed" if place == "between turns" else "cancelled")
        await assert_goes_on(scene)


@pytest.mark.parametrize("place", PLACES)
async def test_the_time_of_a_run_passes(fake_ollama: FakeOllama, place: str) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, place)
        scene.agent = Agent(
            client, "fake", [scene.wait, scene.work, scene.quick], timeout=0.3,
            approve=scene.approve if place == "approval" else None,
        )  # fmt: skip
        scene.run = scene.agent.run("Go", token=scene.token)
        reader = asyncio.create_task(scene.read())
        async with asyncio.timeout(BOUND):
            await scene.reached.wait()
            while scene.run.outcome is None:
                await asyncio.sleep(0.01)
            scene.never.set() if place == "between turns" else None
            with pytest.raises(PhaseTimeout, match=r"0\.3 s") as caught:
                await reader
        assert (caught.value.phase, scene.run.outcome, scene.run.result.reason) == ("total", "timeout", "total")
        scene.assert_stopped_at_once()
        await assert_goes_on(scene)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
async def test_a_reader_that_is_cancelled_again_and_again(fake_ollama: FakeOllama, place: str, rounds: int) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, place)
        reader = asyncio.create_task(scene.read())
        async with asyncio.timeout(BOUND):
            await scene.reached.wait()
            while not reader.done():
                reader.cancel()
                for _ in range(rounds):
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
            scene.assert_stopped_at_once()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert_valid(scene.run.result.messages)
            # Nobody waited for the tools, and they end by themselves.
            while len(scene.tools_ended) < len(RAN.get(place, [])):
                await asyncio.sleep(0)
        await assert_goes_on(scene)


async def test_a_run_that_is_dropped_is_stopped(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        for place in ("stream", "async tool"):
            scene = Scene(client, fake_ollama, place)
            async with asyncio.timeout(BOUND):
                while not scene.is_there(await anext(scene.run)):
                    pass
            dropped = weakref.ref(scene.run)
            del scene.run
            assert dropped() is None
            scene.assert_stopped_at_once()
            if place == "async tool":
                async with asyncio.timeout(BOUND):
                    while not scene.tools_ended:
                        await asyncio.sleep(0)


async def test_a_step_that_is_cancelled_before_it_begins_closes_the_run(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, "stream")
        await anext(scene.run)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(scene.run), 0)
        scene.assert_stopped_at_once()
        assert scene.run.outcome == "cancelled"


async def test_a_second_reader_is_turned_away_and_stops_nothing(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        scene = Scene(client, fake_ollama, "async tool")
        reader = asyncio.create_task(scene.read())
        async with asyncio.timeout(BOUND):
            await scene.reached.wait()
            await asyncio.sleep(0)
            with pytest.raises(StreamBusy):
                async for _ in scene.run:
                    pass
            assert scene.run.outcome is None
            scene.run.abort()
            with pytest.raises(AbortError):
                await reader


async def test_a_second_reader_that_is_forgotten_later_stops_nothing(
    client: AsyncClient, fake_ollama: FakeOllama
) -> None:
    """Its error holds what was turned away, and is dropped while the first reader does something else."""
    turned_away: list[StreamBusy] = []

    async def read_too() -> str:
        try:
            await run
        except StreamBusy as exc:
            turned_away.append(exc)
        return "turned away"

    fake_ollama.script("/api/chat", calling("read_too"), Reply.chat("On."))
    run = Agent(client, "fake", [read_too]).run("Go")
    async with asyncio.timeout(BOUND):
        async for event in run:
            if isinstance(event, ToolFinished):
                assert (event.content, len(turned_away)) == ("turned away", 1)
                turned_away.clear()
                gc.collect()
    assert (run.outcome, run.result.text) == ("done", "On.")


# -- stop after the turn, and what is finished --


async def test_stop_after_the_turn_finishes_model_and_tools(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"))
    run = Agent(client, "fake", [weather]).run("Weather?")
    got = []
    async with asyncio.timeout(BOUND):
        async for event in run:
            got.append(event)
            if len(got) == 1:
                assert run.stop("that is enough")
                assert not run.stop("again")
    assert isinstance(got[-2], TurnEnded)
    assert isinstance(got[-1], Done)
    whole = got[-1].result
    assert whole == run.result
    assert (whole.outcome, whole.reason, whole.usage.turns) == ("stopped", "that is enough", 1)
    assert whole.messages[-1].content == "Lima: 20 C"
    assert len(fake_ollama.requests) == 1
    assert not run.abort()
    fake_ollama.script("/api/chat", Reply.chat("It is 20."))
    assert (await result(Agent(client, "fake", [weather]).run(whole.messages))).text == "It is 20."


async def test_stop_in_the_last_turn_changes_nothing(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Hello."))
    run = Agent(client, "fake").run("Hi")
    await anext(run)
    run.stop("late")
    whole = await result(run)
    assert (whole.outcome, whole.reason, whole.text) == ("done", None, "Hello.")


async def test_stop_takes_only_what_it_knows(client: AsyncClient) -> None:
    with pytest.raises(RequestError, match="abort"):
        Agent(client, "fake").run("Hi").stop(after="tool")  # type: ignore[arg-type]


async def test_an_abort_after_the_last_chunk_throws_nothing_away(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Hello."))
    run = Agent(client, "fake").run("Hi", token=(token := CancelToken()))
    got = []
    async with asyncio.timeout(BOUND):
        async for event in run:
            got.append(event)
            if isinstance(event, TurnEnded):
                assert not run.abort("late")
                token.abort("late")
    assert isinstance(got[-1], Done)
    assert (run.outcome, run.result.text) == ("done", "Hello.")


async def test_an_abort_behind_the_last_chunk_throws_nothing_away(fake_ollama: FakeOllama) -> None:
    whole = Reply.chat("Hello.")
    fake_ollama.script("/api/chat", Reply([*whole.steps, Stall()]), Reply.chat("On."))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake").run("Hi")
        assert await anext(run) == Text("Hello.")
        # The body has not ended, and its end is waited for.
        step = asyncio.ensure_future(anext(run))
        async with asyncio.timeout(BOUND):
            while run.outcome is None:
                await asyncio.sleep(0)
            assert not run.abort("late")
            assert isinstance(await step, TurnEnded)
            assert (await run).usage.eval_count == 1
        assert (run.outcome, run.result.text, mark(run.result.messages[-1])) == ("done", "Hello.", None)


async def test_turns_share_a_connection(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.chat("It is 20."))
    await result(Agent(client, "fake", [weather]).run("Weather?"))
    assert len(fake_ollama.connections) == 1


# -- tools that do not do as they should --


async def bad(client: AsyncClient, server: FakeOllama, tool: Any, reply: Reply, **terms: Any) -> Any:
    """Return how the call of a tool ended when the model reads its errors, and see that the run raises it if asked."""
    server.script("/api/chat", reply, Reply.chat("I see."))
    got = await events(Agent(client, "fake", [tool], **terms).run("Go"))
    (finished,) = [event for event in got if isinstance(event, ToolFinished)]
    assert got[-1].result.text == "I see."
    assert_valid(got[-1].result.messages)
    told = server.requests[-1].json()["messages"][-1]
    assert (told["role"], told["content"]) == ("tool", finished.content)
    assert told["outcome"] == finished.outcome
    server.script("/api/chat", reply)
    run = Agent(client, "fake", [tool], on_tool_error="raise", **terms).run("Go")
    error = await failure(run, type(finished.error))
    assert str(error) == str(finished.error)
    assert error.call == finished.call
    assert error.partial == run.result
    assert run.outcome == "error"
    assert str(run.result.reason) == str(error)
    assert_valid(run.result.messages)
    assert mark(run.result.messages[-1]) == finished.outcome
    return finished


async def test_a_tool_that_raises(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    async def fails() -> str:
        raise ValueError("no such city")

    def fails_in_thread() -> str:
        raise SystemExit("no such city")

    for tool, kind in ((fails, ValueError), (fails_in_thread, SystemExit)):
        finished = await bad(client, fake_ollama, tool, calling(tool.__name__))
        assert finished.outcome == "error"
        assert finished.content == f"error: {tool.__name__}() raised {kind.__name__}: no such city"
        assert isinstance(finished.error.__cause__, kind)


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("text", [None, "half a character: \ud83d"])
async def test_an_error_whose_text_cannot_be_sent(
    client: AsyncClient, fake_ollama: FakeOllama, thread: bool, text: str | None
) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            if text is None:
                raise RuntimeError("no text")
            return text

    def fails() -> str:
        raise Odd

    async def fails_too() -> str:
        raise Odd

    fake_ollama.script("/api/chat", calling("fails" if thread else "fails_too"), Reply.chat("On."))
    whole = await result(Agent(client, "fake", [fails, fails_too]).run("Go"))
    said = "(its text cannot be made)" if text is None else "half a character: ?"
    assert str(whole.messages[2].content).endswith(f"raised Odd: {said}")
    assert whole.text == "On."


async def test_a_tool_that_cancels_itself(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    async def gives_up() -> str:
        raise asyncio.CancelledError

    finished = await bad(client, fake_ollama, gives_up, calling("gives_up"))
    assert finished.content == "error: gives_up() raised CancelledError: "


class Opaque:
    """JSON has no such thing."""


@pytest.mark.parametrize("value", [Opaque(), float("nan"), {"x": [float("inf")]}, "\ud800", b"\xff", object])
@pytest.mark.parametrize("thread", [True, False])
async def test_a_result_that_is_not_json(
    client: AsyncClient, fake_ollama: FakeOllama, value: object, thread: bool
) -> None:
    async def lookup() -> object:
        return value

    tool: Any = lookup
    if thread:

        def lookup() -> object:  # type: ignore[no-redef]
            return value

        tool = lookup
    finished = await bad(client, fake_ollama, tool, calling("lookup"))
    assert isinstance(finished.error, ToolResultError)
    assert "cannot be written as JSON" in finished.content
    assert type(value).__name__ in finished.content


@dataclass
class Point:
    """A place."""

    x: int


async def test_a_number_that_json_does_not_have_is_named(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    def lookup() -> dict[str, float]:
        return {"celsius": float("nan")}

    finished = await bad(client, fake_ollama, lookup, calling("lookup"))
    assert "it has a NaN or an infinity" in finished.content


async def test_results_that_are_json(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    values: list[tuple[object, str]] = [(None, "null"), ("", ""), (Point(1), '{"x":1}'), ({1}, "[1]"), (True, "true")]
    for value, text in values:

        async def lookup(value: object = value) -> object:
            return value

        fake_ollama.script("/api/chat", calling("lookup"), Reply.chat("I see."))
        whole = await result(Agent(client, "fake", [lambda_free(lookup)]).run("Go"))
        assert [message.content for message in whole.messages if message.role == "tool"] == [text]


def lambda_free(tool: Any) -> Any:
    """A plain function around a coroutine function, as decorators leave it."""

    def lookup() -> Any:
        return tool()

    return lookup


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "city: it is missing"),
        ({"city": 1}, "city: Input should be a valid string"),
        ({"city": "Lima", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"city": "Lima", "town": "x"}, "town: there is no such argument"),
        ({"unit": 1, "x": 2}, "city: it is missing; unit: Input should be 'C' or 'F'; x: there is no such argument"),
    ],
)
async def test_wrong_arguments(
    client: AsyncClient, fake_ollama: FakeOllama, arguments: dict[str, Any], text: str
) -> None:
    finished = await bad(client, fake_ollama, weather, calling("weather", **arguments), approve=never_asked)
    assert isinstance(finished.error, ToolArgumentError)
    assert finished.content == f"error: weather() does not take these arguments: {text}"


def never_asked(call: Any) -> bool:
    raise AssertionError(f"asked about {call}")


async def test_an_unknown_tool(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    finished = await bad(client, fake_ollama, weather, calling("whether_report", city="Lima"), approve=never_asked)
    assert isinstance(finished.error, UnknownTool)
    assert finished.content == "error: there is no tool 'whether_report'; there are: weather"


async def test_arguments_are_of_the_annotated_types(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    got: list[object] = []

    def take(a: int, /, p: Point, n: Annotated[int, Field(default=7)], *, token: CancelToken, **more: Any) -> str:
        got.extend([a, p, n, more, token])
        return ""

    reply = calling("take", a="3", p={"x": "4"}, other=[1])
    fake_ollama.script("/api/chat", reply, Reply.chat("I see."))
    agent = Agent(client, "fake", [take])
    await result(agent.run("Go"))
    assert got[:4] == [3, Point(4), 7, {"other": [1]}]
    assert isinstance(got[4], CancelToken)
    (schema,) = fake_ollama.requests[0].json()["tools"]
    assert set(schema["function"]["parameters"]["properties"]) == {"a", "p", "n"}


async def test_a_model_cannot_give_the_token(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    def take(token: CancelToken | None = None, **more: Any) -> str:
        return f"{token is not None} {more}"

    finished = await bad(client, fake_ollama, take, calling("take", token="x"))
    assert isinstance(finished.error, ToolArgumentError)


@pytest.mark.parametrize("thread", [False, True])
async def test_a_tool_that_hangs(fake_ollama: FakeOllama, thread: bool) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:

        async def hangs() -> str:
            await asyncio.Event().wait()
            return "never"

        def hangs_in_thread(token: CancelToken) -> str:
            stopped = threading.Event()
            token.on_abort(lambda _: stopped.set())
            stopped.wait(BOUND)
            token.raise_if_aborted()
            return "never"

        tool: Any = hangs_in_thread if thread else hangs
        finished = await bad(client, fake_ollama, tool, calling(tool.__name__), tool_timeout=0.02)
        assert isinstance(finished.error, ToolTimeout)
        assert (finished.outcome, finished.left) == ("timeout", False)
        text = "did not finish within 0.02 s: ask it for less, or raise tool_timeout="
        assert finished.content == f"error: {tool.__name__}() {text}"


@pytest.mark.parametrize("thread", [False, True])
async def test_a_tool_that_does_not_stop_is_left_after_the_grace(fake_ollama: FakeOllama, thread: bool) -> None:
    let_go, here = threading.Event(), asyncio.Event()
    ended: list[str] = []

    async def stubborn() -> str:
        while not let_go.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                ended.append("cancelled")
        here.set()
        return "late"

    def stubborn_thread() -> str:
        let_go.wait(BOUND)
        ended.append("thread")
        loop.call_soon_threadsafe(here.set)
        return "late"

    loop = asyncio.get_running_loop()
    tool: Any = stubborn_thread if thread else stubborn
    fake_ollama.script("/api/chat", calling(tool.__name__))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [tool], grace=0.05).run("Go")
        async with asyncio.timeout(BOUND):
            with pytest.raises(AbortError) as caught:
                async for event in run:
                    if isinstance(event, ToolStarted):
                        run.abort("Stop")
        kept = caught.value.partial
        assert [call.function.name for call in kept.left] == [tool.__name__]
        assert_valid(kept.messages)
        assert kept.messages[-1].content == "aborted: the call was stopped before it had a result, and may still go on"
        assert ended == ([] if thread else ["cancelled"])
        let_go.set()
        async with asyncio.timeout(BOUND):
            await here.wait()
        # What comes later changes nothing.
        await asyncio.sleep(0)
        assert run.result == kept


async def test_a_thread_that_is_left_keeps_neither_loop_nor_interpreter(tmp_path: Any) -> None:
    program = tmp_path / "left.py"
    program.write_text(
        """if True:
        import asyncio, threading
        from ollama_async import AsyncClient, AbortError
        from ollama_async.agent import Agent, ToolStarted
        from ollama_async.testing import FakeOllama, Reply

        def hangs():
            threading.Event().wait()

        async def main(url):
            async with AsyncClient(url) as client:
                run = Agent(client, "fake", [hangs], grace=0.05).run("Go")
                try:
                    async for event in run:
                        if isinstance(event, ToolStarted):
                            run.abort()
                except AbortError as exc:
                    print(len(exc.partial.left))

        with FakeOllama() as server:
            server.script("/api/chat", Reply.chat(tool_calls=[{"function": {"name": "hangs", "arguments": {}}}]))
            asyncio.run(main(server.url))
        """
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, str(program)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("thread", [False, True])
async def test_a_tool_that_swallows_its_cancellation_does_not_make_the_run_succeed(
    fake_ollama: FakeOllama, thread: bool
) -> None:
    async def pays() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return "paid"

    def pays_in_thread(token: CancelToken) -> str:
        stopped = threading.Event()
        token.on_abort(lambda _: stopped.set())
        stopped.wait(BOUND)
        return "paid"

    tool: Any = pays_in_thread if thread else pays
    fake_ollama.script("/api/chat", calling(tool.__name__))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [tool]).run("Go")
        async with asyncio.timeout(BOUND):
            with pytest.raises(AbortError):
                async for event in run:
                    if isinstance(event, ToolStarted):
                        run.abort("Stop")
        assert run.outcome == "aborted"
        # What it has done is not lost: the model must know that it is paid.
        assert (run.result.messages[-1].content, mark(run.result.messages[-1])) == ("paid", None)
        assert len(fake_ollama.requests) == 1


async def test_one_failure_stops_the_other_tools(fake_ollama: FakeOllama) -> None:
    ended: list[str] = []

    async def waits() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")
        return "never"

    async def fails() -> str:
        raise ValueError("no")

    fake_ollama.script("/api/chat", calling("waits", "fails"))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [waits, fails], on_tool_error="raise").run("Go")
        await failure(run, ToolError)
        assert ended == ["waits"]
        assert [mark(message) for message in run.result.messages[-2:]] == ["aborted", "error"]
        assert_valid(run.result.messages)


async def test_a_failed_tool_holds_nothing_when_the_run_is_forgotten(
    client: AsyncClient, fake_ollama: FakeOllama
) -> None:
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    async def fails() -> str:
        mine = Held()
        held.append(weakref.ref(mine))
        raise ValueError("no")

    def fails_in_thread() -> str:
        mine = Held()
        held.append(weakref.ref(mine))
        raise ValueError("no")

    gc.disable()
    try:
        for tool in (fails, fails_in_thread):
            for mode in ("feed", "raise"):
                fake_ollama.script("/api/chat", calling(tool.__name__), Reply.chat("I see."))
                run = Agent(client, "fake", [tool], on_tool_error=mode).run("Go")  # type: ignore[arg-type]
                with suppress(ToolError):
                    await result(run)
                del run
                fake_ollama.forget()
        await asyncio.sleep(0)
        for thread in threading.enumerate():
            if thread.name.startswith("tool "):
                thread.join(BOUND)
        assert [each() for each in held] == [None] * 4
    finally:
        gc.enable()


# -- approval --


@pytest.mark.parametrize(
    ("said", "content"), [(False, "denied: the call was not approved"), ("not today", "denied: not today")]
)
@pytest.mark.parametrize("later", [True, False])
async def test_a_call_that_is_denied(
    client: AsyncClient, fake_ollama: FakeOllama, said: bool | str, content: str, later: bool
) -> None:
    asked: list[Any] = []

    async def approve_later(call: Any) -> bool | str:
        return approve(call)

    def approve(call: Any) -> bool | str:
        asked.append(call.function.arguments)
        return said

    def deletes(path: str) -> str:
        raise AssertionError

    fake_ollama.script("/api/chat", calling("deletes", path="/"), Reply.chat("I see."))
    agent = Agent(client, "fake", [deletes], approve=approve_later if later else approve, on_tool_error="raise")
    got = await events(agent.run("Go"))
    assert asked == [{"path": "/"}]
    assert not [event for event in got if isinstance(event, ToolStarted)]
    (finished,) = [event for event in got if isinstance(event, ToolFinished)]
    assert (finished.outcome, finished.content, finished.error) == ("denied", content, None)
    assert mark(got[-1].result.messages[-2]) == "denied"


async def test_approvals_are_asked_for_one_at_a_time(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    asking: list[int] = []

    async def approve(call: Any) -> bool:
        asking.append(1)
        assert len(asking) == 1
        for _ in range(5):
            await asyncio.sleep(0)
        asking.pop()
        return True

    fake_ollama.script("/api/chat", calling("weather", "weather", "weather", city="Lima"), Reply.chat("I see."))
    whole = await result(Agent(client, "fake", [weather], approve=approve, on_tool_error="raise").run("Go"))
    assert whole.usage.tool_calls == 3


@pytest.mark.parametrize("said", [None, 1, ValueError("broken")])
async def test_an_approval_that_fails_runs_nothing_and_ends_the_run(
    client: AsyncClient, fake_ollama: FakeOllama, said: Any
) -> None:
    def approve(call: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    def deletes() -> str:
        raise AssertionError

    fake_ollama.script("/api/chat", calling("deletes"))
    run = Agent(client, "fake", [deletes], approve=approve).run("Go")
    error = await failure(run, ApprovalError)
    assert "deletes()" in str(error)
    assert_valid(run.result.messages)
    assert len(fake_ollama.requests) == 1


# -- limits --


@pytest.mark.parametrize("kind", ["async", "at once", "of a thread"])
async def test_nothing_is_begun_after_a_stop_that_an_approval_does_not_pass_on(
    fake_ollama: FakeOllama, kind: str
) -> None:
    begun: list[str] = []
    asked = asyncio.Event()

    async def pay() -> str:
        begun.append("paid")
        return "paid"

    def pay_in_thread() -> str:
        begun.append("paid")
        return "paid"

    async def wait_for_user() -> bool:
        asked.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return True

    def approve(call: Any) -> Any:
        if kind == "async":
            return wait_for_user()
        asked.set()
        run.abort("Stop")
        return True

    fake_ollama.script("/api/chat", calling("pay_in_thread" if kind == "of a thread" else "pay"))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [pay, pay_in_thread], approve=approve).run("Go")
        reader = asyncio.create_task(failure(run, AbortError))
        async with asyncio.timeout(BOUND):
            await asked.wait()
            run.abort("Stop")
            await reader
        assert begun == []
        assert [mark(message) for message in run.result.messages] == [None, None, "aborted"]


async def test_too_many_turns(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), always=True)
    run = Agent(client, "fake", [weather], max_turns=2).run("Go")
    error = await failure(run, LimitReached)
    assert (error.limit, error.value, run.outcome, run.result.reason) == ("max_turns", 2, "limit", "max_turns")
    assert len(fake_ollama.requests) == 2
    assert_valid(error.partial.messages)
    assert error.partial.messages[-1].content == "Lima: 20 C"


async def test_too_many_tokens(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.chat("a", "b", done_reason="length"))
    run = Agent(client, "fake", [weather], max_tokens=4, options={"num_predict": 3, "seed": 1}).run("Go")
    error = await failure(run, LimitReached)
    assert (error.limit, run.result.usage.eval_count, run.result.text) == ("max_tokens", 4, "ab")
    asked = [request.json()["options"] for request in fake_ollama.requests]
    assert asked == [{"num_predict": 3, "seed": 1}, {"num_predict": 2, "seed": 1}]


async def test_tokens_that_are_spent_when_the_answer_is_done(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a", "b"))
    assert (await result(Agent(client, "fake", max_tokens=2).run("Go"))).outcome == "done"


async def test_tokens_that_are_spent_on_calls(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"))
    run = Agent(client, "fake", [weather], max_tokens=2).run("Go")
    await failure(run, LimitReached)
    assert run.result.messages[-1].content == "Lima: 20 C"
    assert len(fake_ollama.requests) == 1


# -- the model fails --


@pytest.mark.parametrize(
    ("reply", "kind", "outcome"),
    [
        (Reply.error(500, "no memory"), ServerError, "error"),
        (Reply([*Reply.chat("Hel", done=False).steps, Cut()]), ConnectionBroken, "error"),
        (Reply.chat("Hel", done=False), StreamTruncated, "truncated"),
        (Reply([*Reply.chat("Hel", done=False).steps, Stall()]), PhaseTimeout, "timeout"),
    ],
)
async def test_an_answer_that_breaks_off(
    fake_ollama: FakeOllama, reply: Reply, kind: type[Exception], outcome: str
) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), reply)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [weather], timeout=Timeouts(idle=0.2)).run("Go")
        error = await failure(run, kind)
        assert (run.outcome, error.partial) == (outcome, run.result)
        assert_valid(run.result.messages)
        last = run.result.messages[-1]
        assert (last.content, mark(last)) == (("Lima: 20 C", None) if kind is ServerError else ("Hel", outcome))
        assert run.result.usage.tool_calls == 1
        with pytest.raises(kind):
            await anext(run)


async def test_calls_of_an_answer_that_breaks_off_are_answered(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    calls = calling("weather", "weather", city="Lima").whole["message"]["tool_calls"]  # type: ignore[index]
    whole = Reply.chat("I look.", tool_calls=calls, done=False)
    gate = Gate()
    fake_ollama.script("/api/chat", Reply([*whole.steps, gate]))
    run = Agent(client, "fake", [weather]).run("Go")
    await anext(run)
    reader = asyncio.ensure_future(anext(run))
    async with asyncio.timeout(BOUND):
        await asyncio.to_thread(gate.wait_reached)
        run.abort()
        with pytest.raises(AbortError):
            await reader
    assert_valid(run.result.messages)
    assert [mark(message) for message in run.result.messages] == [None, "aborted", "aborted", "aborted"]
    gate.open()


@pytest.mark.parametrize("kind", ["client", "pool", "pool itself"])
async def test_what_aborts_the_calls_of_its_client_aborts_the_tools(fake_ollama: FakeOllama, kind: str) -> None:
    token, reached = CancelToken(), asyncio.Event()

    async def hang() -> str:
        reached.set()
        await asyncio.Event().wait()
        return ""

    fake_ollama.script("/api/chat", calling("hang"))
    made = AsyncClient(fake_ollama.url, token=token) if kind == "client" else Pool([fake_ollama.url], token=token)
    async with nothing_left_behind(), made as client:
        run = Agent(client, "fake", [hang]).run("Go")
        reader = asyncio.create_task(failure(run, AbortError))
        async with asyncio.timeout(BOUND):
            await reached.wait()
            (client if kind == "pool itself" else token).abort("Stop")
            error = await reader
        assert (error.reason, run.outcome) == ("Stop", "aborted")
        assert [mark(message) for message in run.result.messages] == [None, None, "aborted"]
        assert len(fake_ollama.requests) == 1
        assert registrations(token) == 0


# -- enough --


async def test_a_condition_that_is_met_ends_the_run(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), ENDLESS)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        enough = max_chars(20)
        run = Agent(client, "fake", [weather]).run("Go", until=enough)
        found = await events(run)
        assert fake_ollama.requests[1].connection.wait_left()
        kinds = [type(event) for event in found]
        assert kinds[:4] == [Text, ToolStarted, ToolFinished, TurnEnded]
        assert kinds[-2:] == [TurnEnded, Done]
        whole = found[-1].result
        assert (whole.outcome, run.outcome, whole.reason) == ("until", "until", enough)
        assert [message.role for message in whole.messages] == ["user", "assistant", "tool", "assistant"]
        assert [mark(message) for message in whole.messages] == [None, None, None, "until"]
        # The first answer is shorter.
        assert whole.text == whole.messages[-1].content
        assert len(whole.text) >= 20
        assert whole.usage.turns == 2


async def test_calls_of_an_answer_that_is_enough_are_not_begun(fake_ollama: FakeOllama) -> None:
    def never(city: str) -> str:
        raise AssertionError("the call was begun")

    asked = [{"id": "1", "function": {"name": "never", "arguments": {"city": "Lima"}}}]
    fake_ollama.script("/api/chat", Reply([*Reply.chat("I look.", tool_calls=asked, done=False).steps, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake", [never]).run("Go", until=lambda answer: bool(answer.message.tool_calls))
        whole = await result(run)
        assert fake_ollama.requests[0].connection.wait_left()
        assert [mark(message) for message in whole.messages] == [None, "until", "aborted"]
        assert_valid(whole.messages)
        assert (whole.outcome, whole.left) == ("until", ())


async def test_a_condition_is_checked_before_anything_is_sent(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    error = await failure(Agent(client, "fake").run("Go", until=3), RequestError)  # type: ignore[arg-type]
    assert "until=int: give a condition" in str(error)
    assert fake_ollama.requests == ()


# -- what cannot be --


async def test_bad_input(client: AsyncClient) -> None:
    class Held:
        def find(self) -> str:
            return ""

    for tools, text in (
        ([{"type": "function"}], "an agent calls its tools"),
        ([Point], "an agent calls its tools"),
        ([1], "an agent calls its tools"),
        ([Held.find], "lacks its object"),
        ([weather, weather], "same name"),
        (weather, "tools=function"),
    ):
        with pytest.raises(RequestError, match=text):
            Agent(client, "fake", tools)  # type: ignore[arg-type]
    for terms, text in (
        ({"max_turns": 0}, "max_turns=0"),
        ({"max_tokens": 1.5}, r"max_tokens=1\.5"),
        ({"grace": -1}, "grace=-1"),
        ({"tool_timeout": "1"}, "tool_timeout='1'"),
        ({"timeout": 0}, "timeout=0"),
        ({"on_tool_error": "ignore"}, "on_tool_error='ignore'"),
        ({"stream": True}, "no stream="),
        ({"system": 1}, "system=1: give a str"),
        ({"approve": "yes"}, "approve='yes': give a function"),
    ):
        with pytest.raises(RequestError, match=text):
            Agent(client, "fake", **terms)
    with pytest.raises(RequestError, match="model=''"):
        Agent(client, "")
    with pytest.raises(RequestError, match="client=str: give an AsyncClient or a Pool"):
        Agent("http://localhost:11434", "fake")  # type: ignore[arg-type]
    run = Agent(client, "fake").run([{"content": "no role"}])
    error = await failure(run, RequestError)
    assert "messages[0]" in str(error)
    with pytest.raises(RequestError, match="CancelTokens"):
        Agent(client, "fake").run("Hi", token="x")  # type: ignore[arg-type]


async def test_reprs_have_no_text_of_the_conversation(client: AsyncClient, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("a secret"))
    agent = Agent(client, "fake", [weather], name="clerk")
    run = agent.run("a secret")
    assert repr(agent) == "<Agent clerk: weather>"
    assert repr(run) == "<AgentRun with fake: not started, turn 0>"
    whole = await result(run)
    assert "secret" not in repr(run) + repr(whole)
    assert repr(run) == "<AgentRun with fake: done, turn 1>"
