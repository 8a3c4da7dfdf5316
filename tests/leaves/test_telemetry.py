"""Spans and metrics: each call has one span, which ends once, whatever ends the call."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from ollama_async import AbortError, AsyncClient, CancelToken, OllamaError, PhaseTimeout, StreamClosed, telemetry
from ollama_async._call import observe
from ollama_async.agent import Agent, AgentRun
from ollama_async.testing import Block, Cut, FakeOllama, Reply, Stall
from ollama_async.testing._left import live_timers

BOUND = 10.0
SECRET = "a secret prompt"
ANSWER = "a secret answer"


class Recorded:
    """Where spans and metrics go."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def instrument(self, **settings: bool) -> None:
        telemetry.instrument(self.tracers, self.meters, **settings)

    async def span(self) -> ReadableSpan:
        """Wait for the only span, and see that no second one follows."""
        (span,) = await self.spans(1)
        return span

    async def spans(self, count: int) -> tuple[ReadableSpan, ...]:
        """Wait for so many spans, in the order of their ends, and see that no other one follows."""
        async with asyncio.timeout(BOUND):
            while len(self.exporter.get_finished_spans()) < count:
                await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        spans = self.exporter.get_finished_spans()
        assert len(spans) == count
        return spans

    def metrics(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    recorded.instrument()
    yield recorded
    telemetry.uninstrument()
    recorded.tracers.shutdown()
    recorded.meters.shutdown()


def seen(span: ReadableSpan, name: str) -> Any:
    assert span.attributes is not None
    return span.attributes.get(name)


def outcome(span: ReadableSpan) -> tuple[str, bool, str | None]:
    """Its outcome, whether its status is that of an error, and the error's class."""
    assert span.end_time is not None
    assert span.start_time is not None
    assert 0 <= span.end_time - span.start_time < BOUND * 1e9
    is_error = span.status.status_code is StatusCode.ERROR
    assert is_error or span.status.status_code is StatusCode.UNSET
    return seen(span, "ollama_async.outcome"), is_error, seen(span, "error.type")


def traceparent(request: Any) -> str | None:
    return dict(request.headers).get("traceparent")


PART = Reply.chat(ANSWER, done=False).steps


# -- what it costs --


CLIENT = Path(__file__).parents[1] / "call" / "costs_client.py"


def counted(server: FakeOllama, what: str, reply: Reply, chunks: int) -> dict[str, Any]:
    # The first one is not counted.
    server.script("/api/chat", Reply.chat("x"), reply)
    command = [sys.executable, str(CLIENT), server.url, what, str(chunks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND * 6, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def together(chunks: int) -> Reply:
    return Reply([Block(*Reply.chat(*["word "] * (chunks - 1)).steps)])


def one_by_one(chunks: int) -> Reply:
    return Reply.chat(*["word "] * (chunks - 1), interval=0.002)


def test_a_chunk_costs_the_same_with_a_span(fake_ollama: FakeOllama) -> None:
    a_chunk, a_stream = {}, {}
    for what in ("calls", "watched"):
        few, many = (counted(fake_ollama, what, together(chunks), chunks)["calls"] for chunks in (200, 1200))
        a_chunk[what], a_stream[what] = (many - few) / 1000, few
    # Less than one call of a Python function. A span costs what it costs once.
    assert abs(a_chunk["watched"] - a_chunk["calls"]) < 0.5, a_chunk
    assert a_stream["watched"] > a_stream["calls"] + 50, a_stream


def test_a_chunk_that_comes_alone_is_not_told_to_whoever_watches(fake_ollama: FakeOllama) -> None:
    few, many = (counted(fake_ollama, "watched", one_by_one(chunks), chunks)["watching"] for chunks in (20, 220))
    assert few > 50
    assert abs(many - few) < 20, (few, many)


def test_without_instrument_nothing_of_opentelemetry_is_imported(fake_ollama: FakeOllama) -> None:
    packages = counted(fake_ollama, "plain", together(10), 10)["packages"]
    assert "ollama_async" in packages
    assert "opentelemetry" not in packages


# -- the natural end --


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat(recorded: Recorded, fake_ollama: FakeOllama, stream: bool) -> None:
    options = {"temperature": 0.5, "num_predict": 3, "stop": "END"}
    async with AsyncClient(fake_ollama.url) as client:
        call: Any = client.chat("fake", SECRET, stream=stream, options=options, format="json")
        reply = await (call.collect() if stream else call)
    span = await recorded.span()
    assert span.name == "chat fake"
    assert span.kind is trace.SpanKind.CLIENT
    assert outcome(span) == ("done", False, None)
    port = int(fake_ollama.url.rpartition(":")[2])
    assert span.attributes is not None
    attributes = dict(span.attributes)
    first = attributes.pop("gen_ai.response.time_to_first_chunk", None)
    assert (first is not None) is stream
    assert first is None or 0 < first < BOUND
    server = {name: attributes.pop(name) for name in list(attributes) if name.startswith("ollama_async.server.")}
    assert all(isinstance(value, float) for value in server.values())
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ollama",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        **({"gen_ai.request.stream": True} if stream else {}),
        "gen_ai.output.type": "json",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.response.finish_reasons": (reply.done_reason,),
        "gen_ai.usage.input_tokens": reply.prompt_eval_count,
        "gen_ai.usage.output_tokens": reply.eval_count,
        "server.address": "127.0.0.1",
        "server.port": port,
        "ollama_async.outcome": "done",
    }
    metrics = recorded.metrics()
    assert set(metrics) == {
        "gen_ai.client.inference.duration",
        "gen_ai.client.inference.usage.input_tokens",
        "gen_ai.client.inference.usage.output_tokens",
        *(["gen_ai.client.inference.time_to_first_chunk"] if stream else []),
    }
    (duration,) = metrics["gen_ai.client.inference.duration"]
    assert duration.count == 1
    assert duration.explicit_bounds[0] == 0.01
    assert duration.attributes["ollama_async.outcome"] == "done"
    assert metrics["gen_ai.client.inference.usage.output_tokens"][0].value == reply.eval_count


@pytest.mark.parametrize("stream", [True, False])
async def test_a_generate(recorded: Recorded, fake_ollama: FakeOllama, stream: bool) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        call: Any = client.generate("fake", SECRET, stream=stream)
        await (call.collect() if stream else call)
    span = await recorded.span()
    assert (span.name, *outcome(span)) == ("text_completion fake", "done", False, None)


@pytest.mark.parametrize("method", ["embed", "embeddings"])
async def test_embeddings(recorded: Recorded, fake_ollama: FakeOllama, method: str) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await getattr(client, method)("fake", SECRET)
    span = await recorded.span()
    assert (span.name, *outcome(span)) == ("embeddings fake", "done", False, None)
    assert seen(span, "gen_ai.response.finish_reasons") is None
    assert "gen_ai.client.embeddings.duration" in recorded.metrics()


async def test_other_calls_have_no_span(recorded: Recorded, fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        await client.list()
        await client.load("fake")
        client.chat("fake", SECRET, stream=True)
    assert recorded.exporter.get_finished_spans() == ()


# -- every other way out of a stream --


async def abort(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    assert stream.abort(ValueError(SECRET))
    with pytest.raises(AbortError):
        await anext(stream)


async def abort_in_thread(client: AsyncClient) -> None:
    token = CancelToken()
    stream = client.chat("fake", SECRET, stream=True, token=token)
    await anext(stream)
    thread = threading.Thread(target=token.abort, daemon=True)
    thread.start()
    thread.join(BOUND)
    assert token.aborted


async def abort_in_signal_handler(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    before = signal.signal(signal.SIGUSR1, lambda *_: stream.abort())
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stream.outcome == "aborted"


async def abort_client(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    client.abort()


async def abort_before_start(client: AsyncClient) -> None:
    token = CancelToken()
    token.abort()
    with pytest.raises(AbortError):
        await anext(client.chat("fake", SECRET, stream=True, token=token))


async def cancel(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_loop(client: AsyncClient) -> None:
    async for _ in client.chat("fake", SECRET, stream=True):
        break


async def aclose(client: AsyncClient) -> None:
    async with client.chat("fake", SECRET, stream=True) as stream:
        await anext(stream)


async def drop(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    held = [stream]
    del stream
    with pytest.warns(ResourceWarning, match="unclosed"):
        held.clear()


async def close_client(client: AsyncClient) -> None:
    stream = client.chat("fake", SECRET, stream=True)
    await anext(stream)
    await client.aclose()
    with pytest.raises(StreamClosed):
        await anext(stream)


async def enough(client: AsyncClient) -> None:
    async for _ in client.chat("fake", SECRET, stream=True, until=lambda answer: answer.message.content):
        pass


async def late(client: AsyncClient) -> None:
    with pytest.raises(PhaseTimeout):
        await client.chat("fake", SECRET, stream=True, timeout=0.05).collect()


async def read(client: AsyncClient) -> None:
    await client.chat("fake", SECRET, stream=True).collect()


async def read_and_fail(client: AsyncClient) -> None:
    with pytest.raises(OllamaError):
        await client.chat("fake", SECRET, stream=True).collect()


ENDLESS = Reply.endless_chat(0.01)
STREAMS: list[tuple[Callable[[AsyncClient], Any], Reply, tuple[str, bool, str | None]]] = [
    (abort, ENDLESS, ("aborted", False, None)),
    (abort_in_thread, ENDLESS, ("aborted", False, None)),
    (abort_in_signal_handler, ENDLESS, ("aborted", False, None)),
    (abort_client, ENDLESS, ("aborted", False, None)),
    (abort_before_start, ENDLESS, ("aborted", False, None)),
    (cancel, Reply([*PART, Stall()]), ("cancelled", False, None)),
    (leave_loop, ENDLESS, ("closed", False, None)),
    (aclose, ENDLESS, ("closed", False, None)),
    (drop, ENDLESS, ("closed", False, None)),
    (close_client, ENDLESS, ("closed", False, None)),
    (enough, ENDLESS, ("until", False, None)),
    (late, Reply([*PART, Stall()]), ("timeout", True, "PhaseTimeout")),
    (read, Reply(PART), ("truncated", True, "StreamTruncated")),
    (read_and_fail, Reply([*PART, Cut()]), ("error", True, "ConnectionBroken")),
    (read_and_fail, Reply([*PART, {"error": SECRET}]), ("error", True, "StreamError")),
    (read_and_fail, Reply([*PART, b"not JSON\n"]), ("error", True, "ProtocolError")),
    (read_and_fail, Reply.error(404, SECRET), ("error", True, "404")),
]


@pytest.mark.parametrize(("way", "reply", "expected"), STREAMS)
async def test_a_stream_that_ends_early(
    recorded: Recorded,
    fake_ollama: FakeOllama,
    way: Callable[[AsyncClient], Any],
    reply: Reply,
    expected: tuple[str, bool, str | None],
) -> None:
    fake_ollama.script("/api/chat", reply)
    async with AsyncClient(fake_ollama.url) as client:
        await way(client)
        # While the client is still open: its closing is not what ends the span.
        span = await recorded.span()
    assert outcome(span) == expected
    assert seen(span, "gen_ai.response.finish_reasons") == ("error",)
    assert seen(span, "ollama_async.abort.reason") == ("ValueError" if way is abort else None)
    assert seen(span, "ollama_async.timeout.phase") == ("total" if way is late else None)
    assert "secret" not in span.to_json()
    (duration,) = recorded.metrics()["gen_ai.client.inference.duration"]
    assert (duration.count, duration.attributes["ollama_async.outcome"]) == (1, expected[0])


# -- a plain call --


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed"])
@pytest.mark.parametrize("how", ["abort", "abort_in_thread", "cancel", "timeout", "error", "not_json", "cut"])
async def test_a_plain_call_that_ends_early(recorded: Recorded, fake_ollama: FakeOllama, path: str, how: str) -> None:
    replies = {"error": Reply.error(500, SECRET), "not_json": Reply([b"[]"]), "cut": Reply(before_head=[Cut()])}
    fake_ollama.script(path, replies.get(how, Reply(before_head=[Stall()])))
    token = CancelToken()
    async with AsyncClient(fake_ollama.url) as client:
        method = getattr(client, path.removeprefix("/api/"))
        task = asyncio.ensure_future(method("fake", SECRET, token=token, timeout=0.1 if how == "timeout" else BOUND))
        async with asyncio.timeout(BOUND):
            while not fake_ollama.requests and not task.done():
                await asyncio.sleep(0.001)
        if how == "abort":
            token.abort()
        elif how == "abort_in_thread":
            await asyncio.to_thread(token.abort)
        elif how == "cancel":
            task.cancel()
        async with asyncio.timeout(BOUND):
            await asyncio.wait([task])
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        span = await recorded.span()
    assert isinstance(error, OllamaError | asyncio.CancelledError)
    assert (
        outcome(span)
        == {
            "abort": ("aborted", False, None),
            "abort_in_thread": ("aborted", False, None),
            "cancel": ("cancelled", False, None),
            "timeout": ("timeout", True, "PhaseTimeout"),
            "error": ("error", True, "500"),
            "not_json": ("error", True, "ProtocolError"),
            "cut": ("error", True, "ConnectionBroken"),
        }[how]
    )
    assert "secret" not in span.to_json()


# -- retries --


BUSY = Reply.error(503, SECRET)
# What the server answers, how many requests it gets, the outcome, and the failures after which it was asked again.
RETRIES: dict[str, tuple[list[Reply], int, tuple[str, bool, str | None], list[str]]] = {
    "passing": (
        [BUSY, Reply(before_head=[Cut()]), Reply.chat("a")],
        3,
        ("done", False, None),
        ["503", "ConnectionBroken"],
    ),
    "used up": ([BUSY], 3, ("error", True, "503"), ["503", "503"]),
    "aborted": ([BUSY], 1, ("aborted", False, None), ["503"]),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", RETRIES)
async def test_a_retry_is_an_event_of_the_span_and_a_span_below_it(
    recorded: Recorded, fake_ollama: FakeOllama, how: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies, requests, expected, failures = RETRIES[how]
    for limit in ("_FIRST_DELAY", "_LONGEST_DELAY"):
        monkeypatch.setattr(f"ollama_async._call.retry.{limit}", 1000.0 if how == "aborted" else 0.01)
    fake_ollama.script("/api/chat", *replies, always=True)
    token = CancelToken()
    async with AsyncClient(fake_ollama.url, retries=2) as client:
        call: Any = client.chat("fake", SECRET, stream=stream, token=token)
        task = asyncio.ensure_future(call.collect() if stream else call)
        await asyncio.to_thread(fake_ollama.wait_for_requests, requests)
        if how == "aborted":
            # Once the pause before the next attempt has begun.
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(BOUND):
                while not any(timer.when() > loop.time() + 100 for timer in live_timers(loop)):
                    await asyncio.sleep(0.001)
            token.abort()
        async with asyncio.timeout(BOUND):
            await asyncio.wait([task])
        assert (task.exception() is None) is (how == "passing")
        *retries, span = await recorded.spans(1 + len(failures))
    assert outcome(span) == expected
    assert seen(span, "ollama_async.retries") == len(failures)
    assert [retry.name for retry in retries] == [f"retry {number}" for number in range(1, len(failures) + 1)]
    # Each ends by the failure before the next one, and the last as the call does.
    errors = [(retry.attributes or {}).get("error.type") for retry in retries]
    assert errors == [*failures[1:], expected[2]]
    assert [retry.status.status_code is StatusCode.ERROR for retry in retries] == [bool(error) for error in errors]
    times = [(retry.start_time or 0, retry.end_time or 0) for retry in retries]
    assert all(start <= end for start, end in times)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
    assert times[-1][1] == span.end_time
    for number, retry in enumerate(retries, 1):
        assert retry.parent is not None
        assert retry.parent.span_id == span.context.span_id
        assert seen(retry, "ollama_async.retry.number") == number
        assert seen(retry, "ollama_async.retry.delay") > 0
        assert "secret" not in retry.to_json()
    events = [(event.name, (event.attributes or {})["error.type"]) for event in span.events]
    assert events == [("ollama_async.retry", failure) for failure in failures]
    assert all((event.attributes or {})["ollama_async.retry.delay"] > 0 for event in span.events)
    assert len(fake_ollama.requests) == requests
    assert len({traceparent(request) for request in fake_ollama.requests}) == 1
    assert "secret" not in span.to_json()


# -- the context --


async def test_the_context_goes_to_the_server(recorded: Recorded, fake_ollama: FakeOllama) -> None:
    with recorded.tracers.get_tracer("test").start_as_current_span("parent") as parent:
        async with AsyncClient(fake_ollama.url) as client:
            for headers in (None, {"X-Mine": "1"}):
                await client.chat("fake", SECRET, headers=headers)
    spans = [span for span in recorded.exporter.get_finished_spans() if span.name == "chat fake"]
    assert len(spans) == 2
    for span, request in zip(spans, fake_ollama.requests, strict=True):
        assert span.parent is not None
        assert span.parent.span_id == parent.get_span_context().span_id
        context = span.get_span_context()
        assert context is not None
        assert traceparent(request) == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert request.json()["messages"][0]["content"] == SECRET


@pytest.mark.parametrize("given", ["client", "call"])
@pytest.mark.parametrize("name", ["traceparent", "TraceParent"])
@pytest.mark.parametrize("lent", [False, True], ids=["", "http_client="])
async def test_a_context_that_the_caller_sends_is_sent_alone(
    recorded: Recorded, fake_ollama: FakeOllama, given: str, name: str, lent: bool
) -> None:
    headers = {name: f"00-{'1' * 32}-{'2' * 16}-01"}
    async with httpx.AsyncClient() as http:
        options: dict[str, Any] = {"http_client": http} if lent else {}
        async with AsyncClient(fake_ollama.url, headers=headers if given == "client" else None, **options) as client:
            call: Any = {"headers": headers} if given == "call" else {}
            await client.chat("fake", SECRET, **call)
            await client.chat("fake", SECRET, stream=True, **call).collect()
    for request in fake_ollama.requests:
        sent = [value for header, value in request.headers if header.lower() == "traceparent"]
        assert sent == [*headers.values()]


# -- settings --


@pytest.mark.parametrize(("way", "expected"), [(abort, "AbortError"), (cancel, "CancelledError"), (leave_loop, None)])
async def test_an_abort_can_be_an_error(
    recorded: Recorded, fake_ollama: FakeOllama, way: Callable[[AsyncClient], Any], expected: str | None
) -> None:
    recorded.instrument(abort_is_error=True)
    fake_ollama.script("/api/chat", Reply([*PART, Stall()]))
    async with AsyncClient(fake_ollama.url) as client:
        await way(client)
        span = await recorded.span()
    assert outcome(span)[1:] == (expected is not None, expected)


@pytest.mark.parametrize("stream", [True, False])
async def test_content_is_recorded_where_that_is_asked_for(
    recorded: Recorded, fake_ollama: FakeOllama, stream: bool
) -> None:
    async def run() -> ReadableSpan:
        recorded.exporter.clear()
        fake_ollama.script("/api/chat", Reply.chat(ANSWER))
        async with AsyncClient(fake_ollama.url) as client:
            call: Any = client.chat("fake", [{"role": "user", "content": SECRET}], stream=stream, tools=[len_of])
            await (call.collect() if stream else call)
        return await recorded.span()

    assert "secret" not in (await run()).to_json()
    recorded.instrument(record_content=True)
    span = await run()
    assert SECRET in seen(span, "gen_ai.input.messages")
    assert ANSWER in seen(span, "gen_ai.output.messages")
    assert "len_of" in seen(span, "gen_ai.tool.definitions")


def len_of(text: str) -> int:
    """Count.

    Args:
        text: What to count.
    """
    return len(text)


async def test_uninstrument_takes_effect_for_later_calls(recorded: Recorded, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", SECRET, stream=True)
        await anext(stream)
        telemetry.uninstrument()
        await client.chat("fake", SECRET)
        assert traceparent(fake_ollama.requests[0]) is not None
        assert traceparent(fake_ollama.requests[1]) is None
        stream.abort()
        assert outcome(await recorded.span())[0] == "aborted"
    assert observe.observer is None


async def test_a_fault_of_the_observer_does_not_reach_the_call(
    recorded: Recorded, fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    async with AsyncClient(fake_ollama.url) as client:
        for name in ("__init__", "ended"):
            with monkeypatch.context() as patched:
                patched.setattr(telemetry._Observation, name, broken)
                assert (await client.chat("fake", "hi")).done
        monkeypatch.setattr(observe, "observer", broken)
        assert (await client.chat("fake", "hi")).done
    assert len(caplog.records) == 3


def test_a_span_ends_when_its_loop_ends(recorded: Recorded, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    held: list[Any] = []

    async def main() -> None:
        client = AsyncClient(fake_ollama.url)
        held.append(client.chat("fake", SECRET, stream=True))
        await anext(held[0])

    asyncio.run(main())
    (span,) = recorded.exporter.get_finished_spans()
    assert outcome(span)[0] == "closed"


async def test_the_end_is_that_of_the_outcome(recorded: Recorded, fake_ollama: FakeOllama) -> None:
    """A loop that is blocked after the abort ends the span late, but with the right time."""
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", SECRET, stream=True)
        await anext(stream)
        stream.abort()
        aborted_at = time.time_ns()
        assert recorded.exporter.get_finished_spans() == ()
        time.sleep(0.3)
        span = await recorded.span()
    assert span.end_time is not None
    assert span.end_time < aborted_at + 0.2e9


# -- agents --


def calling(name: str) -> Reply:
    return Reply.chat("I look.", tool_calls=[{"id": "1", "function": {"name": name, "arguments": {"text": SECRET}}}])


class Sitting:
    """A tool that waits, one that fails, one that answers, and what ends the run."""

    def __init__(self) -> None:
        self.run: AgentRun | None = None

    async def waits(self, text: str) -> str:
        assert self.run is not None
        self.run.abort(ValueError(SECRET))
        await asyncio.Event().wait()
        return text

    async def fails(self, text: str) -> str:
        raise LookupError(text)

    def answers(self, text: str) -> str:
        trace.get_current_span().add_event("inside")
        return ANSWER


@pytest.mark.parametrize(
    ("tool", "tool_outcome", "run_outcome"),
    [
        ("answers", ("done", False, None), ("done", False, None)),
        ("fails", ("error", True, "LookupError"), ("error", True, "ToolError")),
        ("waits", ("aborted", False, None), ("aborted", False, None)),
    ],
)
async def test_an_agent_and_its_tools(
    recorded: Recorded,
    fake_ollama: FakeOllama,
    tool: str,
    tool_outcome: tuple[str, bool, str | None],
    run_outcome: tuple[str, bool, str | None],
) -> None:
    fake_ollama.script("/api/chat", calling(tool), Reply.chat(ANSWER))
    sitting = Sitting()
    async with AsyncClient(fake_ollama.url) as client:
        tools = [sitting.waits, sitting.fails, sitting.answers]
        sitting.run = Agent(client, "fake", tools, name="clerk", on_tool_error="raise").run(SECRET)
        with suppress(OllamaError):
            async with asyncio.timeout(BOUND):
                await sitting.run
        await asyncio.sleep(0)
    spans = {span.name: span for span in recorded.exporter.get_finished_spans()}
    agent, executed = spans["invoke_agent clerk"], spans[f"execute_tool {tool}"]
    assert outcome(agent) == run_outcome
    assert outcome(executed) == tool_outcome
    for span in (executed, spans["chat fake"]):
        assert span.parent is not None
        assert span.parent.span_id == agent.get_span_context().span_id
    assert agent.kind is executed.kind is trace.SpanKind.INTERNAL
    assert seen(agent, "gen_ai.operation.name") == "invoke_agent"
    assert seen(agent, "gen_ai.agent.name") == "clerk"
    assert seen(agent, "gen_ai.request.model") == "fake"
    assert seen(agent, "gen_ai.usage.output_tokens") == (3 if tool == "answers" else 2)
    assert seen(executed, "gen_ai.tool.name") == tool
    assert seen(executed, "gen_ai.tool.call.id") == "1"
    assert [event.name for event in executed.events] == (["inside"] if tool == "answers" else [])
    assert not any("secret" in span.to_json() for span in spans.values())
    metrics = recorded.metrics()
    (lasted,) = metrics["gen_ai.execute_tool.duration"]
    assert lasted.attributes["ollama_async.outcome"] == tool_outcome[0]
    (lasted,) = metrics["gen_ai.invoke_agent.duration"]
    assert (lasted.count, lasted.attributes["ollama_async.outcome"]) == (1, run_outcome[0])
    await sitting.run.aclose()
    assert len(recorded.exporter.get_finished_spans()) == (4 if tool == "answers" else 3)


@pytest.mark.parametrize("leave", ["break", "drop", "thread"])
async def test_the_span_of_an_agent_that_is_left(recorded: Recorded, fake_ollama: FakeOllama, leave: str) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.005))
    async with AsyncClient(fake_ollama.url) as client:
        run = Agent(client, "fake").run(SECRET)
        if leave == "break":
            async for _ in run:
                break
        else:
            await anext(run)
            if leave == "thread":
                await asyncio.to_thread(run.abort)
            else:
                del run
        async with asyncio.timeout(BOUND):
            while len(recorded.exporter.get_finished_spans()) < 2:
                await asyncio.sleep(0)
    spans = {span.name: span for span in recorded.exporter.get_finished_spans()}
    assert outcome(spans["invoke_agent fake"]) == ("aborted" if leave == "thread" else "closed", False, None)


async def test_content_of_tools_only_if_asked_for(fake_ollama: FakeOllama) -> None:
    recorded = Recorded()
    recorded.instrument(record_content=True)
    try:
        fake_ollama.script("/api/chat", calling("answers"), Reply.chat(ANSWER))
        async with AsyncClient(fake_ollama.url) as client:
            await Agent(client, "fake", [Sitting().answers]).run(SECRET)
        spans = {span.name: span for span in recorded.exporter.get_finished_spans()}
        assert seen(spans["execute_tool answers"], "gen_ai.tool.call.arguments") == f'{{"text": "{SECRET}"}}'
        assert seen(spans["execute_tool answers"], "gen_ai.tool.call.result") == ANSWER
    finally:
        telemetry.uninstrument()


async def test_an_agent_survives_an_observer_that_fails(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise ValueError

    monkeypatch.setattr(observe, "work_observer", broken)
    fake_ollama.script("/api/chat", calling("answers"), Reply.chat(ANSWER))
    async with AsyncClient(fake_ollama.url) as client:
        assert (await Agent(client, "fake", [Sitting().answers]).run(SECRET)).outcome == "done"
