"""The contract as a model: any order of what readers, stoppers and the server do is compared with what was promised.

The server is a socket in this very thread, so that the machine alone says what happens when, and what has arrived. Time
is the loop's, and passes when the machine says so.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from teardown.harness import live_timers, open_fds, registrations

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectionBroken,
    PhaseTimeout,
    ProtocolError,
    StreamBusy,
    StreamClosed,
    StreamError,
    Timeouts,
)
from ollama_async._wire.connection import Connection
from ollama_async._wire.phase import Phase

BOUND = 30.0
FIRST_CHUNK, IDLE, TOKEN = 50.0, 300.0, 100.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


class Loop(asyncio.SelectorEventLoop):
    """asyncio's, with a clock that can be put on."""

    skew = 0.0

    def time(self) -> float:
        return super().time() + self.skew


class Reason:
    """Told apart by identity."""


def frame(text: str, *, done: bool = False) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"model": "m", "message": message, "done": done}).encode() + b"\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Model:
    """What is promised, given what has happened so far."""

    started: bool = False
    # The server's doing that has arrived, and has not been read: texts, and ("done" | "error" | "broken" | "cut" |
    # "end" | "cut in a line" | "end in a line").
    waiting: list[tuple[str, str]] = field(default_factory=list)
    half: bool = False
    head: bool = False
    over: bool = False
    read: list[str] = field(default_factory=list)
    chunks: int = 0
    # How the stream itself ended, for which reason; and the text that is kept then.
    outcome: str | None = None
    reason: Any = None
    raised: type[Exception] | None = None
    text: str = ""
    # Of the loop's clock.
    sent_at: float = 0.0
    touched: float = 0.0
    line_came: bool = False
    token_due: float | None = None

    def end(self, outcome: str, reason: Any, raised: type[Exception] | None) -> None:
        """The first end stays."""
        if self.outcome is None:
            self.outcome, self.reason, self.raised = outcome, reason, raised
            self.text = "".join(self.read)
            if outcome in ("aborted", "closed", "cancelled", "timeout"):
                for kind, text in self.waiting:
                    if kind != "text":
                        break
                    self.text += text

    @property
    def live(self) -> bool:
        return self.outcome is None


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        gc.disable()
        self.fds = len(open_fds())
        self.loop = Loop()
        self.errors: list[Any] = []
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(BOUND)
        self.peer: socket.socket | None = None
        self.model = Model()
        self.reading: asyncio.Task[Any] | None = None
        self.received = self.sent = 0
        # Why the token was aborted before the stream was started.
        self.early: Reason | None = None
        self.take = Connection.received
        machine = self

        def counting(connection: Connection, data: bytes | memoryview) -> None:
            machine.received += len(data)
            machine.take(connection, data)

        Connection.received = counting  # type: ignore[method-assign]

    # -- how the machine moves the world --

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, BOUND + 1000))

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        for _ in range(8):
            await asyncio.sleep(0)

    def settle(self, condition: Callable[[], Any] = lambda: True) -> None:
        self.loop.run_until_complete(self.until(condition))

    def act(self, how: str, action: Callable[[], Any]) -> Any:
        """Do something from within the loop, from beside it, or from another thread."""
        if how == "in the loop":

            async def within() -> Any:
                return action()

            return self.loop.run_until_complete(within())
        if how == "beside it":
            return action()
        result: list[Any] = []
        thread = threading.Thread(target=lambda: result.append(action()))
        thread.start()
        thread.join(BOUND)
        return result[0]

    # -- the client --

    @initialize(kind=st.sampled_from(["none", "own", "child", "any", "timeout"]), stage=st.integers(0, 7))
    def call(self, kind: str, stage: int) -> None:
        self.a, self.b = CancelToken(), CancelToken()
        self.kind = kind
        self.token: CancelToken | None = {
            "none": lambda: None,
            "own": lambda: self.a,
            "child": lambda: self.a.child(),
            "any": lambda: CancelToken.any(self.a, self.b),
            "timeout": lambda: CancelToken.any(self.a, CancelToken.timeout(TOKEN)),
        }[kind]()
        port = self.listener.getsockname()[1]
        self.client = AsyncClient(f"http://127.0.0.1:{port}", trust_env=False)
        limits = Timeouts(connect=None, first_chunk=FIRST_CHUNK, idle=IDLE)
        self.stream = self.client.chat("m", "hi", stream=True, token=self.token, timeout=limits)
        # A reader that nobody but a loop holds; to drop it is to leave the loop.
        self.iterator: Any = aiter(self.stream)
        # Most of what there is to find is in the middle of an answer.
        if stage > 0:
            self.read()
        if stage > 1:
            self.send_the_head()
        if stage > 2:
            self.send_lines(stage - 2)

    @precondition(lambda self: self.reading is None and self.iterator is not None)
    @rule()
    def read(self) -> None:
        self.reading = self.loop.create_task(self.iterator.__anext__())
        if self.early is not None and self.model.live:
            self.model.started = True
            self.model.end("aborted", self.early, AbortError)
        elif not self.model.started and self.model.live:
            self.model.started = True
            self.settle(
                lambda: (
                    self.stream._reader.call.exchange
                    and self.stream._reader.call.exchange.reader.phase >= Phase.WAITING
                )
            )
            self.peer, _ = self.listener.accept()
            self.peer.settimeout(BOUND)
            request = b""
            while b"\r\n\r\n" not in request:
                request += self.peer.recv(65536)
            self.model.sent_at = self.loop.time()
            if self.kind == "timeout":
                self.model.token_due = self.loop.time() + TOKEN
        self.look()

    @precondition(lambda self: self.reading is not None)
    @rule()
    def a_second_reader_is_refused(self) -> None:
        with pytest.raises(StreamBusy):
            self.run(self.stream.__anext__())

    def look(self) -> None:
        """See what has become of the reading task, and whether that is right."""
        model, task = self.model, self.reading
        if task is None:
            return
        expects_end = model.outcome is not None
        if expects_end or model.waiting:
            if model.outcome == "done" and not model.over:
                # It waits for the rest of the body, for a moment.
                self.loop.skew += 1.0
            self.settle(task.done)
        else:
            self.settle()
            assert not task.done(), "there was nothing to read"
            return
        self.reading = None
        error = None if task.cancelled() else task.exception()
        if expects_end:
            assert type(error) is (model.raised or StopAsyncIteration), error
        else:
            self.read_one(task, error)
            error = None if error is None else error
        if isinstance(error, AbortError):
            assert error.reason is model.reason
        partial = getattr(error, "partial", None)
        if error is not None and not isinstance(error, StopAsyncIteration):
            assert (partial.message.content if partial else "") == model.text

    def read_one(self, task: asyncio.Task[Any], error: BaseException | None) -> None:
        model = self.model
        kind, text = model.waiting.pop(0)
        if kind in ("text", "done"):
            assert error is None, error
            model.read.append(text)
            model.chunks += 1
            assert task.result().message.content == text
            if kind == "done":
                model.end("done", None, None)
            return
        raised: type[Exception] | None = {
            "error": StreamError,
            "broken": ProtocolError,
            "cut": ConnectionBroken,
            "end in a line": ProtocolError,
        }.get(kind)
        assert type(error) is (raised or StopAsyncIteration), error
        model.end("error" if raised else "truncated", error if raised else None, raised)

    # -- ways to stop --

    hows = st.sampled_from(["in the loop", "beside it", "in a thread"])

    def aborted(self, reason: object, *, decided: bool, was_live: bool) -> None:
        assert decided is was_live
        self.model.end("aborted", reason, AbortError)
        # Nothing of the loop has run since: what is seen now was done by the abort itself.
        self.server_sees_the_end()
        self.look()

    @rule(way=st.sampled_from(["stream", "a", "b", "token", "client", "aclose", "leave"]), how=hows)
    def stop(self, way: str, how: str) -> None:
        if way == "stream":
            self.abort_the_stream(how)
        elif way == "aclose":
            self.close_from_another_task()
        elif way == "client" and self.model.started:
            self.abort_the_client(how)
        elif way == "leave" and self.model.started and self.reading is None:
            self.leave_the_loop()
        else:
            self.abort_a_token(how, way)

    def abort_the_stream(self, how: str) -> None:
        reason, live = Reason(), self.model.live
        self.aborted(reason, decided=self.act(how, lambda: self.stream.abort(reason)), was_live=live)

    def abort_a_token(self, how: str, which: str) -> None:
        reason, live = Reason(), self.model.live
        token = {"a": self.a, "b": self.b, "token": self.token}.get(which)
        if token is None:
            return
        earlier = token.aborted
        assert self.act(how, lambda: token.abort(reason)) is not earlier
        reaches = (which == "a" and self.kind != "none") or (which == "b" and self.kind == "any") or which == "token"
        if reaches and not earlier and live:
            if self.model.started:
                self.model.end("aborted", reason, AbortError)
                self.server_sees_the_end()
            elif self.early is None:
                self.early = reason
        self.look()

    def abort_the_client(self, how: str) -> None:
        reason = Reason()
        self.act(how, lambda: self.client.abort(reason))
        self.model.end("aborted", reason, AbortError)
        self.server_sees_the_end()
        self.look()

    def close_from_another_task(self) -> None:
        live = self.model.live
        if self.model.outcome == "done":
            self.loop.skew += 1.0
        self.run(self.stream.aclose())
        if live:
            self.model.end("closed", None, StreamClosed)
        self.look()

    @precondition(lambda self: self.reading is not None)
    @rule(times=st.integers(1, 2), gap=st.integers(0, 3))
    def cancel_the_reader(self, times: int, gap: int) -> None:
        task = self.reading
        assert task is not None

        async def cancel() -> None:
            for _ in range(times):
                task.cancel()
                for _ in range(gap):
                    await asyncio.sleep(0)
            await asyncio.wait([task], timeout=BOUND)

        self.loop.run_until_complete(cancel())
        assert task.cancelled()
        self.reading = None
        self.model.end("cancelled", None, StreamClosed)

    @precondition(lambda self: self.reading is not None)
    @rule()
    def a_timeout_around_the_reader_passes(self) -> None:
        # wait_for() cancels what it waits for, and says so by a TimeoutError of its own.
        task, self.reading = self.reading, None
        assert task is not None

        async def limited() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.001)
            current = asyncio.current_task()
            assert current is not None
            assert current.cancelling() == 0

        self.loop.run_until_complete(limited())
        self.model.end("cancelled", None, StreamClosed)

    def leave_the_loop(self) -> None:
        self.iterator = None
        self.model.end("closed", None, StreamClosed)
        self.server_sees_the_end()
        self.iterator = self.stream

    @precondition(lambda self: self.model.started)
    @rule(seconds=st.sampled_from([FIRST_CHUNK + 1, IDLE + 1]))
    def time_passes(self, seconds: float) -> None:
        model = self.model
        self.loop.skew += seconds
        self.settle()
        if not model.live:
            return
        now = self.loop.time()
        due: dict[str, float] = {}
        arrived = any(kind not in ("text", "done", "error", "broken") for kind, _ in model.waiting) or model.over
        if not arrived:
            if not model.line_came:
                due["first_chunk"] = model.sent_at + FIRST_CHUNK
            if model.head:
                due["idle"] = model.touched + IDLE
        possible = {phase for phase, at in due.items() if at <= now}
        token_is_due = model.token_due is not None and model.token_due <= now
        end = self.stream._reader.call.outcome
        if not possible and not token_is_due:
            assert end is None
        elif end is not None and end.kind == "aborted":
            assert token_is_due
            assert isinstance(end.cause, TimeoutError)
            model.end("aborted", end.cause, AbortError)
        else:
            assert end is not None
            assert end.kind == "timeout"
            assert end.cause in possible
            model.end("timeout", end.cause, PhaseTimeout)
        self.look()

    # -- the server --

    def arrives(self, data: bytes) -> None:
        assert self.peer is not None
        self.sent += len(data)
        with suppress(ConnectionError, BrokenPipeError):
            self.peer.sendall(data)
        self.settle(lambda: self.received == self.sent)

    serving = precondition(
        lambda self: self.model.started and self.model.live and self.model.head and not self.model.over
    )

    @precondition(lambda self: self.model.started and self.model.live and not self.model.head)
    @rule()
    def send_the_head(self) -> None:
        self.model.head = True
        self.arrives(HEAD)
        self.model.touched = self.loop.time()
        self.look()

    def line_arrives(self, data: bytes, *items: tuple[str, str]) -> None:
        rest = b""
        if self.model.half:
            rest, self.model.half = b'alf"},"done":false}\n', False
            items = (("text", "half"), *items)
        self.arrives(http_chunk(rest + data))
        self.model.waiting += items
        self.model.touched, self.model.line_came = self.loop.time(), True
        self.look()

    @serving
    @rule(count=st.integers(1, 5))
    def send_lines(self, count: int) -> None:
        texts = [f"{len(self.model.read)}.{len(self.model.waiting)}.{number} " for number in range(count)]
        self.line_arrives(b"".join(map(frame, texts)), *(("text", text) for text in texts))

    @serving
    @precondition(lambda self: not self.model.half)
    @rule()
    def send_half_a_line(self) -> None:
        self.arrives(http_chunk(b'{"model":"m","message":{"role":"assistant","content":"h'))
        self.model.half = True
        self.look()

    @serving
    @rule(before=st.integers(0, 2), after=st.integers(0, 2))
    def send_done(self, before: int, after: int) -> None:
        texts = [f"{number} " for number in range(before)]
        data = b"".join(map(frame, texts)) + frame("", done=True) + b"".join(frame("late") for _ in range(after))
        # What comes after the last chunk is no part of the answer.
        self.line_arrives(data, *(("text", text) for text in texts), ("done", ""))

    @serving
    @rule(before=st.integers(0, 2), broken=st.booleans())
    def send_an_error(self, before: int, broken: bool) -> None:
        texts = [f"{number} " for number in range(before)]
        what = b"[]\n" if broken else b'{"error":"no"}\n'
        data = b"".join(map(frame, texts)) + what + frame("late")
        self.line_arrives(data, *(("text", text) for text in texts), ("broken" if broken else "error", ""))

    @serving
    @rule()
    def cut(self) -> None:
        assert self.peer is not None
        self.model.over = True
        self.peer.shutdown(socket.SHUT_WR)
        exchange = self.stream._reader.call.exchange
        assert exchange is not None
        self.settle(lambda: exchange.reader.failed or exchange.reader.outcome is not None)
        self.model.waiting.append(("cut", ""))
        self.look()

    @serving
    @rule()
    def end_the_body(self) -> None:
        self.model.over = True
        self.arrives(b"0\r\n\r\n")
        self.model.waiting.append(("end in a line" if self.model.half else "end", ""))
        self.look()

    # -- what holds at any time --

    def server_sees_the_end(self) -> None:
        """The loop stands still."""
        model = self.model
        if self.peer is None or model.live or model.over or model.outcome in ("done", "truncated"):
            return
        with suppress(ConnectionError):
            assert self.peer.recv(1) == b""

    @invariant()
    def the_server_sees_what_is_true(self) -> None:
        self.server_sees_the_end()
        if self.peer is not None and self.model.live and not self.model.over:
            self.peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                self.peer.recv(1)
            self.peer.settimeout(BOUND)

    @invariant()
    def the_stream_says_what_is_true(self) -> None:
        model = self.model
        if not hasattr(self, "stream"):
            return
        if self.early is not None and model.live:
            # Its token is aborted, of which it has not heard before it starts.
            assert not model.started
            return
        assert self.stream.outcome == model.outcome
        if model.outcome == "aborted":
            assert self.stream.reason is model.reason
        if model.outcome == "timeout":
            assert self.stream.reason == model.reason
        assert self.stream.text == (model.text if model.outcome else "".join(model.read))
        assert self.stream.timing.chunks == model.chunks
        assert not self.errors

    @invariant()
    def nothing_is_registered_after_the_end(self) -> None:
        if hasattr(self, "stream") and not self.model.live:
            assert registrations(self.a) == registrations(self.b) == 0
            assert self.token is None or registrations(self.token) == 0

    def teardown(self) -> None:
        try:
            if hasattr(self, "stream"):
                self.leave_nothing()
        finally:
            Connection.received = self.take  # type: ignore[method-assign]
            if self.peer is not None:
                self.peer.close()
            self.listener.close()
            self.loop.close()
            gc.enable()

    def leave_nothing(self) -> None:
        task, self.reading = self.reading, None
        self.run(self.client.aclose())
        if task is not None:
            self.settle(task.done)
            assert isinstance(task.exception(), StreamClosed)
        del task
        if self.peer is not None:
            with suppress(ConnectionError):
                assert self.peer.recv(1) == b""
            self.peer.close()
            self.peer = None
        self.settle(lambda: not asyncio.all_tasks(self.loop) - {asyncio.current_task()})
        self.listener.close()
        self.iterator = None
        assert live_timers(self.loop) == []
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        assert len(open_fds()) == self.fds
        assert self.errors == []


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """The machine has a server and a loop of its own, and looks after each of its runs."""


def test_any_order_of_events_keeps_the_contract() -> None:
    run_state_machine_as_test(Machine, settings=settings(stateful_step_count=20))
