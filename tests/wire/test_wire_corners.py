"""Corners of `_wire` that no way to stop leads through: each step interrupted, each race lost, each odd input."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import socket
import ssl
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import trustme
from wire.connection import Wire

from ollama_async import AbortError, AsyncClient, ConnectError, DirectTransport, RequestError
from ollama_async._call.foreign import ForeignRequest
from ollama_async._secret import Secret
from ollama_async._wire import dial, release
from ollama_async._wire.dial import SocketDial
from ollama_async._wire.guard import _nothing, guarded, limited
from ollama_async._wire.http1 import EncodedRequest, Origin
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome
from ollama_async._wire.parser import ResponseParser
from ollama_async._wire.phase import Phase
from ollama_async._wire.pool import ConnectionPool
from ollama_async._wire.proxy import ProxyTransport
from ollama_async._wire.reader import ResponseReader
from ollama_async._wire.response import Body, _ClosingReads, _Elapsed, body_of
from ollama_async._wire.routes import is_direct
from ollama_async._wire.socket import GuardedSocket
from ollama_async._wire.tls import TlsOptions
from ollama_async._wire.transport import _begin
from ollama_async._wire.unpack import LINES, BodyForm
from ollama_async._wire.upload import Upload
from ollama_async.testing import FakeOllama

BOUND = 20.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
TLS = TlsOptions(True, Secret(None), False)


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, where a test wants it."""


def interrupted(*_: object, **__: object) -> Any:
    raise Interrupt


@pytest.fixture
def wire() -> Any:
    wire = Wire()
    yield wire
    wire.sock.close()
    wire.connection.sock.close()


async def asked(wire: Wire) -> ResponseReader:
    reader = ResponseReader(asyncio.get_running_loop(), body_form=LINES)
    wire.connection.begin(reader, "GET", b"", more=False)
    return reader


# -- the socket --


def test_a_forked_child_leaves_the_connection_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with theirs, GuardedSocket(socket.AF_INET) as sock:
        sock.close()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        sock.shutdown()
        assert not sock._shut_down
    ours.close()


def test_a_socket_that_cannot_be_read_is_stale() -> None:
    with GuardedSocket(socket.AF_INET) as sock:
        assert sock.stale()
        sock.close()
        assert sock.stale()


# -- the reader --


async def test_a_consumer_that_is_cancelled_as_bytes_arrive_is_left_alone() -> None:
    class Decided:
        def done(self) -> bool:
            return False

        def set_result(self, _: object) -> None:
            raise asyncio.InvalidStateError

    reader = ResponseReader(asyncio.get_running_loop())
    reader._waiter = cast("Any", Decided())
    assert reader.feed_data(b"1")
    reader._waiter = None
    assert reader.read_nowait() == b"1"


async def test_packed_bytes_that_arrive_after_the_end_are_dropped() -> None:
    reader = ResponseReader(asyncio.get_running_loop())
    reader.body_form = BodyForm(reader.body_form.framing, cast("Any", object()))
    reader.close(ExchangeOutcome("aborted"))
    assert reader.feed_data(b"packed")
    assert reader.read_buffered() == b""


async def test_reading_on_without_a_link_is_harmless() -> None:
    reader = ResponseReader(asyncio.get_running_loop())
    reader.paused = True
    reader.resume_reading()
    assert not reader.paused
    reader.pause_reading()
    assert not reader.paused


async def test_an_interrupted_end_is_completed_by_the_next_look() -> None:
    reader = ResponseReader(asyncio.get_running_loop())
    reader.decide(ExchangeOutcome("complete"))
    assert not reader.close_threadsafe(ExchangeOutcome("aborted"))
    assert not reader.tidied
    await asyncio.sleep(0)
    assert reader.tidied
    assert reader.phase is Phase.CLOSED
    # Twice: by then somebody else was through with it.
    reader._release_if_not_tidied()
    assert reader.tidied


async def test_a_release_that_could_not_be_scheduled_is_scheduled_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    readers = [ResponseReader(loop), ResponseReader(loop)]
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(release, "in_loop", interrupted)
        readers[0].close_threadsafe(ExchangeOutcome("aborted"))
    readers[1].close_threadsafe(ExchangeOutcome("aborted"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert [reader.phase for reader in readers] == [Phase.CLOSED] * 2


def test_the_queues_of_closed_loops_are_dropped_and_those_of_others_stay() -> None:
    closed, other, new = (asyncio.new_event_loop() for _ in range(3))
    queues = release._release_queues
    for loop in (closed, other):
        release.release_in_turn(ResponseReader(loop))
    closed.close()
    release.release_in_turn(ResponseReader(new))
    assert closed not in queues
    assert other in queues
    for loop in (other, new):
        loop.close()
        queues.pop(loop)


# -- a connection --


async def test_a_connection_says_what_it_is_doing(wire: Wire) -> None:
    connection = wire.connection
    assert "idle, 0 answered" in repr(connection)
    await asked(wire)
    assert "waiting, 0 answered" in repr(connection)
    connection.shutdown()
    assert "closed, 0 answered" in repr(connection)


async def test_a_connection_that_was_lost_has_nothing_to_shut_down_or_resume(wire: Wire) -> None:
    wire.connection.connection_lost(None)
    wire.connection.shutdown()
    wire.connection.resume_reading()
    assert not wire.connection._shut_down
    assert not wire.paused


async def test_an_end_of_the_peer_that_is_interrupted_breaks_the_answer(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException] = []
    monkeypatch.setattr("ollama_async._wire.connection.raise_in_loop", lambda _, exc: raised.append(exc))
    reader = await asked(wire)
    monkeypatch.setattr(ResponseParser, "feed_eof", interrupted)
    wire.connection.eof_received()
    with pytest.raises(ExchangeEnded):
        reader.check()
    assert isinstance(raised[0], Interrupt)
    assert wire.closed


async def test_an_answer_whose_end_was_interrupted_is_at_its_end(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = []
    monkeypatch.setattr("ollama_async._wire.connection.raise_in_loop", lambda _, exc: raised.append(exc))
    reader = await asked(wire)
    with monkeypatch.context() as patch:
        patch.setattr(type(wire.connection), "_finished", interrupted)
        wire.receive(HEAD + b"ab")
    assert reader.eof
    assert reader.read_nowait() == b"ab"
    assert wire.closed
    assert not wire.kept


async def test_a_connection_that_is_let_go_twice_has_no_parser_left(wire: Wire) -> None:
    await asked(wire)
    wire.connection._let_go()
    wire.connection._let_go()
    assert wire.connection._parser is None


# -- the parser --


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (UPGRADE, "switched protocols"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "switched protocols"),
        (b"HTTP/1.1 099 Odd\r\n\r\n", "HTTP does not know"),
    ],
)
def test_an_answer_that_leaves_http_is_refused(head: bytes, why: str) -> None:
    parser = ResponseParser("GET")
    parser.feed_data(head)
    assert parser.error is not None
    assert why in str(parser.error)


def test_another_protocol_behind_an_answer_spoils_the_connection_and_not_the_answer() -> None:
    parser = ResponseParser("GET")
    assert parser.feed_data(HEAD + b"ab" + UPGRADE) == b"ab"
    assert (parser.complete, parser.trailing_data, parser.error) == (True, True, None)


# -- the pool --


async def test_a_pool_says_what_it_has_and_takes_nothing_back_once_it_is_closed() -> None:
    pool = ConnectionPool(asyncio.get_running_loop(), 5.0)
    closed: list[str] = []
    connection = cast("Any", SimpleNamespace(origin=Origin("http", "h", 80), close=lambda: closed.append("closed")))
    pool._idle[connection.origin] = []
    # Lost as soon as it was asked.
    pool.taken(connection)
    assert repr(pool) == "<ConnectionPool: 0 connections, 0 idle, 0 dialling>"
    pool.close()
    pool.release(connection)
    assert closed == ["closed"]
    assert repr(pool) == "<ConnectionPool: closed>"


# -- dialling --


class Idle:
    """A connection that is idle, and the clock and the timers of its pool."""

    def __init__(self, pool: ConnectionPool, port: int) -> None:
        self.origin = Origin("http", "h", port)
        self.idle_since = 0.0
        self.closed = False
        pool.add(cast("Any", self))
        pool.release(cast("Any", self))

    def close(self) -> None:
        self.closed = True

    def close_exchange(self, why: str) -> None:
        self.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.due: float | None = None
        self.sweep: Any = None

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, sweep: Any, context: object) -> Any:
        assert self.due is None, "two timers"
        self.due, self.sweep = due, sweep
        return SimpleNamespace(cancel=lambda: setattr(self, "due", None))

    def call_later(self, seconds: float, sweep: Any, context: object) -> Any:
        return self.call_at(self.now + seconds, sweep, context)

    def go_on(self) -> float:
        """Let time pass up to the one timer, and let it fire."""
        assert self.due is not None
        self.now, self.due = self.due, None
        self.sweep()
        return self.now


async def test_each_idle_connection_is_closed_when_its_own_time_is_over() -> None:
    clock = Clock()
    pool = ConnectionPool(cast("Any", clock), expiry=10.0)
    made: list[tuple[float, Idle]] = []
    # To two servers; of one, two become idle at once, and of the other the first one is not the oldest of all.
    for at, port in [(1.0, 1), (1.0, 1), (2.0, 2), (3.0, 1), (3.0, 2), (7.0, 2)]:
        clock.now = at
        made.append((at, Idle(pool, port)))
    fired = []
    while clock.due is not None:
        fired.append(clock.go_on())
        assert [idle.closed for _, idle in made] == [clock.now >= at + 10.0 for at, _ in made]
    assert fired == [11.0, 12.0, 13.0, 17.0]
    later = Idle(pool, 1)
    assert clock.due == 27.0
    pool.close()
    assert later.closed
    assert clock.due is None


def test_requests_that_wait_for_their_turn_end_with_a_closed_loop() -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[ConnectionPool, ResponseReader]:
        pool, reader = ConnectionPool(loop, 5.0), ResponseReader(loop)
        pool._waiting[reader] = None
        return pool, reader

    pool, reader = loop.run_until_complete(begin())
    loop.close()
    pool.close_threadsafe()
    assert reader.outcome is not None
    assert reader.outcome.kind == "closed"
    assert not pool._waiting


async def test_a_system_without_sockets_to_spare_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(dial, "GuardedSocket", none_left)
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(ConnectError, match="Too many open files"):
            await client.version()


async def test_a_system_without_unix_sockets_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "_AF_UNIX", None)
    async with AsyncClient(uds="/run/ollama.sock") as client:
        with pytest.raises(ConnectError, match="no unix sockets"):
            await client.version()


@pytest.mark.parametrize("made", [None, "closing"])
async def test_tls_over_a_connection_that_is_lost_at_once(monkeypatch: pytest.MonkeyPatch, made: object) -> None:
    loop, aborted = asyncio.get_running_loop(), []

    async def create(factory: Any, *, sock: object) -> None:
        factory().connection_made(SimpleNamespace(abort=lambda: aborted.append("aborted")))

    async def no_tls(*_: object, **__: object) -> Any:
        return made and SimpleNamespace(is_closing=lambda: True)

    monkeypatch.setattr(loop, "start_tls", no_tls)
    context = ssl.create_default_context()
    with pytest.raises(ConnectionResetError):
        await dial.start_tls(cast("Any", None), create, cast("Any", None), context, "h")
    assert aborted == ["aborted"]


async def test_tls_over_a_connection_that_was_never_made() -> None:
    async def create(_: Any, *, sock: object) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await dial.start_tls(cast("Any", None), create, cast("Any", None), ssl.create_default_context(), "h")


def test_an_error_of_tls_is_told_by_its_reason() -> None:
    error = ssl.SSLError(1, "boring text")
    error.reason = "TLSV1_ALERT_INTERNAL_ERROR"
    assert dial.explain_tls_error(error) == "TLSV1_ALERT_INTERNAL_ERROR"


# -- the guard --


async def test_a_client_that_is_not_of_httpx_is_used_as_it_is() -> None:
    client = object()
    assert guarded(client) is client
    assert _nothing(client) is None  # type: ignore[func-returns-value]


async def test_a_guarded_client_sends_for_its_other_users_too(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        answer = await client._client.get("/api/version")
        assert "version" in answer.json()


async def test_a_body_without_a_close_is_limited_as_well() -> None:
    class Blocks(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            yield b"ab"

    class Iterator:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> bytes:
            raise StopAsyncIteration

    class Iterable(httpx.AsyncByteStream):
        def __aiter__(self) -> Any:
            return Iterator()

    assert [block async for block in limited(Blocks(), 200, None)] == [b"ab"]
    assert [block async for block in limited(Iterable(), 200, None)] == []


# -- requests of others --


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"Transfer-Encoding": "chunked"}, "its body is bytes"),
        ({"Transfer-Encoding": "chunked", "Content-Length": "2"}, "a Content-Length and a Transfer-Encoding"),
        ({"Content-Length": "two"}, "Content-Length"),
    ],
)
async def test_a_request_that_contradicts_itself_is_not_sent(
    fake_ollama: FakeOllama, headers: dict[str, str], why: str
) -> None:
    async with httpx.AsyncClient(transport=DirectTransport()) as client:
        request = httpx.Request("POST", f"{fake_ollama.url}/x", headers=headers, stream=httpx.ByteStream(b"ab"))
        with pytest.raises(httpx.LocalProtocolError, match=why):
            await client.send(request)
    assert not fake_ollama.requests


# -- responses --


async def test_a_timer_that_was_left_behind_is_stopped_as_the_body_is_dropped() -> None:
    loop = asyncio.get_running_loop()
    reader = ResponseReader(loop)
    body = body_of(httpx, reader, 5.0, ours=False)
    timer = body._timer = loop.call_later(BOUND, print)
    del body
    await asyncio.sleep(0)
    assert timer.cancelled()


async def test_a_reading_that_never_began_closes_nothing() -> None:
    reader = ResponseReader(asyncio.get_running_loop())
    body = body_of(httpx, reader, None, ours=True)
    reading = _ClosingReads(body, body._blocks())
    await reading.aclose()
    assert reader.outcome is None
    del reading
    assert reader.outcome is None


def test_a_body_whose_making_was_interrupted_has_nothing_to_close() -> None:
    for kind in (Body, _ClosingReads):
        made: Any = kind.__new__(kind)
        made.__del__()


def test_the_time_of_an_answer_that_is_gone_is_noted_nowhere() -> None:
    response = httpx.Response(200)
    elapsed = _Elapsed(response)
    elapsed.elapsed = "1 s"
    assert response.elapsed == "1 s"  # type: ignore[comparison-overlap]
    del response
    elapsed.elapsed = "2 s"


# -- routes, proxies, TLS --


def test_an_invalid_proxy_is_reported_when_it_is_used() -> None:
    assert is_direct("http://")
    assert is_direct("http://proxy:1")
    assert not is_direct("socks5://proxy:1")


class _Vanishing(weakref.WeakKeyDictionary[Any, Any]):
    """Knows a loop whose pool somebody has taken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop

    def keyrefs(self) -> list[weakref.ref[Any]]:
        return [weakref.ref(self._loop)]


async def test_a_proxy_is_closed_in_each_of_its_loops() -> None:
    transport = ProxyTransport("https://127.0.0.1:9", tls=TLS)
    there = asyncio.new_event_loop()
    closed: list[str] = []

    class Pool:
        def __init__(self, name: str) -> None:
            self.name = name
            self.guard = self.http = self

        async def aclose(self) -> None:
            closed.append(self.name)

    transport._pools[asyncio.get_running_loop()] = cast("Any", Pool("ours"))
    transport._pools[there] = cast("Any", Pool("another's"))
    await transport.aclose()

    async def rounds() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    await asyncio.to_thread(there.run_until_complete, rounds())
    assert closed == ["ours", "another's"]
    await transport.aclose()
    assert len(closed) == 2
    # Another thread has closed one meanwhile.
    transport._pools = cast("Any", _Vanishing(there))
    await transport.aclose()
    there.close()


def test_certificates_come_from_a_folder_and_a_client_has_its_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own = authority.issue_cert("client")
    own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    assert TlsOptions(str(tmp_path), Secret(str(tmp_path / "own.pem")), False).context().verify_mode
    with pytest.raises(RequestError, match="cannot be used"):
        TlsOptions(True, Secret(str(tmp_path / "missing.pem")), False).context()


# -- the transport --


async def test_a_pool_whose_closing_is_interrupted_is_closed_by_the_next_close(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = DirectTransport()
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get(f"{fake_ollama.url}/api/version")
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(ConnectionPool, "close_threadsafe", interrupted)
            transport.close()
        (connection,) = fake_ollama.connections
        assert connection.open
        transport.close()
        assert await asyncio.to_thread(connection.wait_left, BOUND)


@pytest.mark.parametrize(
    ("host", "step"), [("localhost", (DirectTransport, "_connect")), ("127.0.0.1", (SocketDial, "connect"))]
)
async def test_the_kernels_own_timeout_is_an_error_of_connecting(
    host: str, step: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def timed_out(*_: object, **__: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(*step, timed_out)
    async with AsyncClient(f"http://{host}:9") as client:
        with pytest.raises(ConnectError, match="Connection timed out"):
            await client.version()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), httpx.ConnectError),
        (TimeoutError(), httpx.ConnectTimeout),
    ],
    ids=["the kernel's", "ours"],
)
async def test_the_kernels_own_timeout_is_told_from_the_limit_of_connecting(
    monkeypatch: pytest.MonkeyPatch, error: TimeoutError, raised: type[httpx.TransportError]
) -> None:
    async def timed_out(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(DirectTransport, "_connect", timed_out)
    async with httpx.AsyncClient(transport=DirectTransport(), timeout=BOUND) as http:
        with pytest.raises(httpx.TransportError) as caught:
            await http.get("http://127.0.0.1:9")
    assert type(caught.value) is raised


async def test_a_request_with_a_body_in_blocks_is_not_sent_at_once() -> None:
    async def blocks() -> Any:
        yield b"a"

    transport = DirectTransport()
    request = EncodedRequest("POST", Origin("http", "h", 80), b"")
    request.blocks = blocks()
    assert not transport.send_at_once(ResponseReader(asyncio.get_running_loop()), request)
    transport.close()


async def test_a_request_over_a_connection_that_was_lost_as_soon_as_it_was_made(wire: Wire) -> None:
    wire.closed = True
    reader = ResponseReader(asyncio.get_running_loop())
    with pytest.raises(httpx.ReadError, match="as soon as it was made"):
        _begin(wire.connection, reader, EncodedRequest("GET", Origin("http", "h", 80), b""))
    assert wire.connection._shut_down or wire.closed


async def test_an_upload_pauses_and_resumes_its_connection(wire: Wire) -> None:
    async def blocks() -> Any:
        await asyncio.sleep(BOUND)
        yield b"a"

    reader = await asked(wire)
    upload = Upload(reader, wire.connection, blocks(), 1)
    upload.pause_reading()
    assert wire.paused
    upload.resume_reading()
    assert not wire.paused
    upload.stop()
    await asyncio.wait([upload._task])
    reader.close(ExchangeOutcome("closed"))


async def test_a_foreign_request_that_was_closed_before_it_began_never_begins() -> None:
    reader = ResponseReader(asyncio.get_running_loop())
    request = ForeignRequest(reader, cast("Any", None), httpx.Request("GET", "http://h"))
    request.close_for(reader)
    request.start()
    await request.wait_closed()
    assert request._task is None


# -- many connections at once --


async def test_no_more_than_32_connections_are_begun_in_a_round_of_the_loop(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = [0]
    connect = GuardedSocket.connect

    def counted(self: GuardedSocket, address: Any) -> None:
        rounds[-1] += 1
        connect(self, address)

    def next_round() -> None:
        rounds.append(0)
        if sum(rounds) < 100:
            loop.call_soon(next_round)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(GuardedSocket, "connect", counted)
    loop.call_soon(next_round)
    async with AsyncClient(fake_ollama.url) as client:
        await asyncio.wait_for(asyncio.gather(*(client.version() for _ in range(100))), BOUND)
    assert sum(rounds) == 100
    assert max(rounds) <= 32


@pytest.mark.parametrize("way", ["abort", "cancel"])
async def test_calls_that_wait_for_their_turn_end_at_once_and_connect_to_nothing(
    way: str, fake_ollama: FakeOllama
) -> None:
    client = AsyncClient(fake_ollama.url)
    tasks = [asyncio.create_task(client.version()) for _ in range(100)]
    await asyncio.sleep(0)  # their first step: 32 are begun
    if way == "abort":
        client.abort("enough")
    else:
        for task in tasks:
            task.cancel()
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
    assert {type(error) for error in ended} == {AbortError if way == "abort" else asyncio.CancelledError}
    assert len(fake_ollama.connections) <= 32
    # The turns go on for whoever comes next.
    await asyncio.wait_for(asyncio.gather(*(client.version() for _ in range(100))), BOUND)
    await client.aclose()


async def test_turns_go_on_after_ctrl_c_in_their_round(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    pool = ConnectionPool(loop, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_next_turns", lambda: None)  # interrupted at its first line
        readers = [ResponseReader(loop) for _ in range(33)]
        waiting = asyncio.gather(*(pool.turn(reader) for reader in readers))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not waiting.done()
    await pool.turn(ResponseReader(loop))  # whoever comes next
    await asyncio.wait_for(waiting, BOUND)
    pool.close()


async def test_a_coroutine_in_another_context_gets_what_is_thrown_into_it() -> None:
    caught: list[BaseException] = []

    async def inside() -> str:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as exc:
            caught.append(exc)
        return "its result"

    async def outside() -> Any:
        return await dial.in_context(contextvars.Context(), inside())

    task = asyncio.create_task(outside())
    await asyncio.sleep(0)
    task.cancel()
    assert await asyncio.wait_for(task, BOUND) == "its result"
    assert len(caught) == 1


async def raced(monkeypatch: pytest.MonkeyPatch, connect: Any) -> Any:
    """Connect to the addresses 0 and 1, which begin together; return the first that succeeds."""
    monkeypatch.setattr(dial, "_connect_socket", connect)
    monkeypatch.setattr(dial, "_STAGGER", 0.0)
    addresses: Any = [(number, 0, None) for number in range(2)]
    return await dial._first_connected(asyncio.get_running_loop(), addresses, cast("Any", set()))


async def test_of_two_connections_that_stand_in_one_round_the_second_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    closed: list[int] = []
    both = asyncio.Event()

    async def connect(loop: Any, number: int, *_: Any) -> Any:
        begun.append(number)
        if len(begun) == 2:
            both.set()
        await both.wait()
        return SimpleNamespace(number=number, close=lambda: closed.append(number))

    async with asyncio.timeout(BOUND):
        first = await raced(monkeypatch, connect)
    assert {first.number, *closed} == {0, 1}
    assert len(closed) == 1


async def test_an_address_that_fails_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    both = asyncio.Event()

    async def connect(loop: Any, number: int, *_: Any) -> Any:
        if number:
            both.set()
            await asyncio.sleep(0.01)
            return SimpleNamespace(number=number)
        await both.wait()
        raise ConnectionRefusedError

    async with asyncio.timeout(BOUND):
        first = await raced(monkeypatch, connect)
    assert first.number == 1


async def test_a_cancellation_while_the_slower_address_ends_closes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    told, late = asyncio.Event(), asyncio.Event()

    async def connect(loop: Any, number: int, *_: Any) -> Any:
        made = SimpleNamespace(close=lambda: closed.append(number))
        if number == 0:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # Connected in this moment.
                told.set()
                await late.wait()
        return made

    connecting = asyncio.create_task(raced(monkeypatch, connect))
    async with asyncio.timeout(BOUND):
        await told.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert closed == [1]
        late.set()
        while len(closed) < 2:
            await asyncio.sleep(0)
    assert closed == [1, 0]
