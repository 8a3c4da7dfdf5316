"""``DirectTransport`` by itself, under a plain ``httpx.AsyncClient``."""

from __future__ import annotations

import asyncio
import gc
import pickle
import socket
import ssl
import struct
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from teardown.harness import BOUND, Baseline, black_hole, in_thread, live_timers, nothing_left_behind, ticks, until
from wire.connection import Wire

from ollama_async import AsyncClient
from ollama_async._wire.http1 import MAX_HEAD_BYTES, encode_head
from ollama_async._wire.link import HIGH_WATER
from ollama_async._wire.reader import ResponseReader
from ollama_async._wire.transport import READER, DirectTransport
from ollama_async.testing import Cut, Endless, FakeOllama, Gate, Pause, Raw, Reply, Reset, Stall, Trickle

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
URL = "/x"


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(fake_ollama: FakeOllama) -> AsyncIterator[Baseline]:
    """Before and after each test the same is open, with the garbage collector off in between."""
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def http(fake_ollama: FakeOllama, nothing_left: Baseline) -> AsyncIterator[httpx.AsyncClient]:
    # What is closed in these tests is not closed because it was idle.
    async with client_of(fake_ollama, keepalive_expiry=60.0) as client:
        yield client


def client_of(server: FakeOllama, timeout: Any = BOUND, **options: Any) -> httpx.AsyncClient:
    transport = DirectTransport(uds=server.uds, **options)
    return httpx.AsyncClient(transport=transport, base_url=server.url, timeout=timeout, trust_env=False)


async def blocking(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Wait in a thread for the server, while the loop runs."""
    return await asyncio.to_thread(function, *args, **options)


async def left(server: FakeOllama, number: int) -> None:
    """Wait until the server has seen a client leave."""
    await blocking(server.wait_for_connections, number + 1)
    assert await blocking(server.connections[number].wait_left, BOUND)


async def post(http: httpx.AsyncClient, path: str, content: Any, headers: Any = None) -> httpx.Response:
    """Send a body; one from a sync iterator goes to the transport itself, httpx's client lets none through."""
    request = http.build_request("POST", path, content=content, headers=headers)
    if isinstance(request.stream, httpx.AsyncByteStream):
        return await http.send(request)
    answer = await http._transport.handle_async_request(request)
    await answer.aread()
    await answer.aclose()
    return answer


def raw(*pieces: bytes, end: bool = False) -> Reply:
    """An answer of exactly these bytes; with ``end`` the server closes after them."""
    return Reply([*map(Raw, pieces[1:]), *([Cut()] if end else [])], raw=pieces[0])


# -- answers --

# Name: method, what the server sends, whether it then closes, the status, body and headers of it, whether it is kept.
ANSWERS: dict[str, tuple[str, bytes, bool, int, bytes, list[tuple[str, str]], bool]] = {
    "chunked": (
        "GET",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA\r\n world\n\r\n!\r\n0\r\n\r\n",
        False, 200, b"hello world\n\r\n!", [("transfer-encoding", "chunked")], True,
    ),
    "chunked, with extensions and trailers": (
        "GET",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n",
        False, 200, b"hello", [("transfer-encoding", "chunked")], True,
    ),
    "content length": ("GET", HELLO, False, 200, b"hello", [("content-length", "5")], True),
    "content length 0": ("GET", OK + b"Content-Length: 0\r\n\r\n", False, 200, b"", [("content-length", "0")], True),
    "until close": ("GET", OK + b"\r\nhello", True, 200, b"hello", [], False),
    "nothing until close": ("GET", OK + b"\r\n", True, 200, b"", [], False),
    "header without a value": (
        "GET",
        OK + b"X-Empty:\r\nX-Blank: \r\nContent-Length: 2\r\nX-Last:  a b\r\n\r\nhi",
        False, 200, b"hi", [("x-empty", ""), ("x-blank", ""), ("content-length", "2"), ("x-last", "a b")], True,
    ),
    "several headers of a name": (
        "GET",
        OK + b"Set-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 2\r\n\r\nhi",
        False, 200, b"hi", [("set-cookie", "a"), ("set-cookie", "b"), ("content-length", "2")], True,
    ),
    "1xx before the answer": (
        "GET",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + HELLO,
        False, 200, b"hello", [("content-length", "5")], True,
    ),
    "204": ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b"", [], True),
    "304 with content length": (
        "GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        False, 304, b"", [("content-length", "5")], True,
    ),
    "HEAD with content length": (
        "HEAD", OK + b"Content-Length: 5\r\n\r\n", False, 200, b"", [("content-length", "5")], True,
    ),
    "HEAD, chunked": (
        "HEAD", OK + b"Transfer-Encoding: chunked\r\n\r\n", False, 200, b"", [("transfer-encoding", "chunked")], True,
    ),
    "connection: close": (
        "GET",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        False, 200, b"hello", [("connection", "close"), ("content-length", "5")], False,
    ),
    "HTTP/1.0": (
        "GET",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        False, 200, b"hello", [("content-length", "5")], False,
    ),
    "HTTP/1.0 until close": ("GET", b"HTTP/1.0 200 OK\r\n\r\nhello", True, 200, b"hello", [], False),
    "HTTP/1.0 kept alive": (
        "GET",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        False, 200, b"hello", [("connection", "keep-alive"), ("content-length", "5")], True,
    ),
    "no reason phrase": (
        "GET", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", False, 200, b"hi", [("content-length", "2")], True,
    ),
}  # fmt: skip

every_answer = pytest.mark.parametrize(
    ("method", "sent", "end", "status", "body", "headers", "kept"), ANSWERS.values(), ids=ANSWERS
)


@every_answer
async def test_answer(
    fake_ollama: FakeOllama,
    http: httpx.AsyncClient,
    method: str,
    sent: bytes,
    end: bool,
    status: int,
    body: bytes,
    headers: list[tuple[str, str]],
    kept: bool,
) -> None:
    fake_ollama.script(URL, raw(sent, end=end), raw(HELLO))
    answer = await http.request(method, URL)
    assert (answer.status_code, answer.content, answer.headers.multi_items()) == (status, body, headers)
    if not kept:
        await left(fake_ollama, 0)
    assert (await http.get(URL)).content == b"hello"
    assert len(fake_ollama.connections) == (1 if kept else 2)


@every_answer
async def test_answer_byte_by_byte_over_the_wire(
    fake_ollama: FakeOllama,
    http: httpx.AsyncClient,
    method: str,
    sent: bytes,
    end: bool,
    status: int,
    body: bytes,
    headers: list[tuple[str, str]],
    kept: bool,
) -> None:
    fake_ollama.script(URL, Reply([Trickle(sent[1:]), *([Cut()] if end else [])], raw=sent[:1]))
    answer = await http.request(method, URL)
    assert (answer.status_code, answer.content, answer.headers.multi_items()) == (status, body, headers)


async def fed(method: str, *pieces: bytes, end: bool) -> tuple[Any, ...]:
    """Return all that comes of an answer which arrives in these pieces."""
    wire = Wire()
    connection = wire.connection
    reader = ResponseReader(asyncio.get_running_loop())
    connection.begin(reader, method, b"", more=False)
    for piece in pieces:
        wire.receive(piece)
    if end:
        connection.eof_received()
    wire.sock.close()
    assert reader.eof
    return (
        reader.status,
        reader.head.reason,
        list(reader.head.headers),
        reader.read_buffered(),
        reader.head.version,
        wire.kept,
    )


@every_answer
async def test_answer_split_at_every_position_is_the_same(
    method: str,
    sent: bytes,
    end: bool,
    status: int,
    body: bytes,
    headers: list[tuple[str, str]],
    kept: bool,
) -> None:
    whole = await fed(method, sent, end=end)
    assert (whole[0], whole[3], whole[5]) == (status, body, kept)
    for at in range(1, len(sent)):
        assert await fed(method, sent[:at], sent[at:], end=end) == whole, at
    assert await fed(method, *(bytes([byte]) for byte in sent), end=end) == whole


async def test_blanks_around_a_header_are_not_a_part_of_its_value(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, raw(OK + b"X-A: \t a b \t \r\nContent-Length: 2\r\n\r\nhi"))
    assert (await http.get(URL)).headers["x-a"] == "a b"


async def test_nothing_but_the_final_answer_of_several_is_delivered(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply([gate, Raw(HELLO)], raw=b"HTTP/1.1 100 Continue\r\n\r\n"))
    task = asyncio.create_task(http.get(URL))
    await blocking(gate.wait_reached)
    await ticks(20)
    assert not task.done()
    gate.open()
    assert (await task).status_code == 200


# -- keep-alive --


async def test_one_connection_serves_requests_one_after_the_other(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    for _ in range(5):
        assert (await http.get("/api/version")).status_code == 200
    assert [len(record.requests) for record in fake_ollama.connections] == [5]


async def test_two_requests_at_once_have_two_connections_and_both_are_used_again(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    for _ in range(3):
        gate = Gate()
        fake_ollama.script(URL, *[Reply([b"hello"], before_head=[gate])] * 2)
        pair = asyncio.gather(http.get(URL), http.get(URL))
        await blocking(gate.wait_reached, count=2)
        gate.open()
        assert [answer.content for answer in await pair] == [b"hello"] * 2
    assert [len(record.requests) for record in fake_ollama.connections] == [3, 3]


async def test_expiry_closes_the_idle_connection_without_another_request(fake_ollama: FakeOllama) -> None:
    async with client_of(fake_ollama, keepalive_expiry=0.05) as http:
        await http.get("/api/version")
        assert fake_ollama.connections[0].open
        await left(fake_ollama, 0)
        assert (await http.get("/api/version")).status_code == 200
    assert len(fake_ollama.connections) == 2


async def test_an_expired_connection_is_not_used_although_its_timer_has_not_run(fake_ollama: FakeOllama) -> None:
    async with client_of(fake_ollama, keepalive_expiry=0.05) as http:
        await http.get("/api/version")
        time.sleep(0.1)  # blocks the loop: its timers are late
        await http.get("/api/version")
        assert len(fake_ollama.connections) == 2
        await left(fake_ollama, 0)


async def test_a_connection_that_the_server_closed_while_the_loop_was_blocked_is_not_used(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply([gate, Cut()], raw=HELLO), raw(HELLO))
    assert (await http.get(URL)).content == b"hello"
    await blocking(gate.wait_reached)
    gate.open()
    deadline = time.monotonic() + BOUND
    while fake_ollama.connections[0].closed_at is None:  # blocks the loop: it does not learn of the FIN
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert (await http.get(URL)).content == b"hello"
    assert [len(record.requests) for record in fake_ollama.connections] == [1, 1]


POISON = OK + b"Content-Length: 6\r\n\r\npoison"


async def test_bytes_that_nobody_asked_for_close_the_idle_connection(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply([gate, Raw(POISON), Stall()], raw=HELLO), raw(HELLO))
    assert (await http.get(URL)).content == b"hello"
    gate.open()
    await left(fake_ollama, 0)
    assert (await http.get(URL)).content == b"hello"


async def test_bytes_that_nobody_asked_for_are_not_the_answer_to_the_next_request(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate, behind = Gate(), Gate()
    fake_ollama.script(URL, Reply([gate, Raw(POISON), behind], raw=HELLO), raw(HELLO))
    assert (await http.get(URL)).content == b"hello"
    gate.open()
    behind.wait_reached()  # blocks the loop: the bytes wait in the socket
    assert (await http.get(URL)).content == b"hello"
    assert len(fake_ollama.connections) == 2


@pytest.mark.parametrize(
    "extra", [POISON, b"HTTP/1.1 200 O", b"x", b"\x00", b"hello"], ids=["answer", "half", "x", "nul", "body"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_extra_bytes_after_the_answer_spoil_the_connection_but_not_the_answer(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, extra: bytes, method: str
) -> None:
    answer = HELLO if method == "GET" else OK + b"Content-Length: 5\r\n\r\n"
    fake_ollama.script(URL, raw(answer + extra), raw(HELLO))
    assert (await http.request(method, URL)).content == (b"hello" if method == "GET" else b"")
    await left(fake_ollama, 0)
    assert (await http.get(URL)).content == b"hello"
    assert len(fake_ollama.connections) == 2


async def test_a_response_closed_in_mid_body_closes_its_connection(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, Reply([b"one", Stall()]))
    async with http.stream("GET", URL) as answer:
        assert await anext(answer.aiter_raw()) == b"one"
    assert fake_ollama.connections[0].wait_left(BOUND)


# -- responses that are left without aclose() --

READ: dict[str, Callable[[httpx.Response], Any]] = {
    "raw": lambda answer: answer.aiter_raw(),
    "bytes": lambda answer: answer.aiter_bytes(),
    "text": lambda answer: answer.aiter_text(),
    "lines": lambda answer: answer.aiter_lines(),
}


async def by_break(reading: Any) -> None:
    async for _ in reading:
        break


async def by_an_exception(reading: Any) -> None:
    with pytest.raises(ValueError, match="enough"):
        async for _ in reading:
            raise ValueError("enough")


async def by_dropping_it(reading: Any) -> None:
    await anext(reading)


async def by_its_aclose(reading: Any) -> None:
    await anext(reading)
    await reading.aclose()


@pytest_asyncio.fixture(params=["tcp", "tls"])
async def over(
    request: pytest.FixtureRequest, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> AsyncIterator[tuple[FakeOllama, httpx.AsyncClient]]:
    """A server and a bare httpx client of it."""
    tls = request.param == "tls"
    with FakeOllama(ssl=server_tls if tls else None) as server:
        async with client_of(server, verify=client_tls if tls else True, keepalive_expiry=60.0) as client:
            yield server, client


@pytest.mark.parametrize("kept", [True, False], ids=["response kept", "response dropped"])
@pytest.mark.parametrize("leave", [by_break, by_an_exception, by_dropping_it, by_its_aclose])
@pytest.mark.parametrize("what", [*READ])
async def test_leaving_a_response_closes_its_connection_at_once(
    over: tuple[FakeOllama, httpx.AsyncClient], what: str, leave: Callable[[Any], Any], kept: bool
) -> None:
    server, http = over
    server.script(URL, Reply([b"one\ntwo\n", Stall()]))
    answer: httpx.Response | None = await http.send(http.build_request("GET", URL), stream=True)
    assert answer is not None
    reading = READ[what](answer)
    if not kept:
        answer = None
    iterator = [reading]
    del reading
    await leave(iterator.pop())
    # The loop stands still meanwhile.
    assert server.connections[0].wait_left(BOUND)


async def test_dropping_a_response_that_was_never_read_closes_its_connection_at_once(
    over: tuple[FakeOllama, httpx.AsyncClient],
) -> None:
    server, http = over
    server.script(URL, Reply([b"one", Stall()]))
    answer: httpx.Response | None = await http.send(http.build_request("GET", URL), stream=True)
    assert answer is not None
    del answer
    assert server.connections[0].wait_left(BOUND)


async def test_dropping_a_response_in_another_thread_closes_its_connection_at_once(
    over: tuple[FakeOllama, httpx.AsyncClient],
) -> None:
    """As the garbage collector may, which runs in whatever thread allocates."""
    server, http = over
    server.script(URL, Reply([b"one", Stall()]))
    held = [await http.send(http.build_request("GET", URL), stream=True)]
    in_thread(lambda: held.pop() is None)
    assert server.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("leave", [by_break, by_an_exception, by_dropping_it, by_its_aclose])
async def test_leaving_the_stream_of_the_transport_itself_closes_its_connection_at_once(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, leave: Callable[[Any], Any]
) -> None:
    fake_ollama.script(URL, Reply([b"one", Stall()]))
    answer = await http._transport.handle_async_request(http.build_request("GET", URL))
    await leave(aiter(answer.stream))
    assert fake_ollama.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("what", [*READ])
async def test_a_response_read_to_its_end_and_dropped_keeps_its_connection(
    over: tuple[FakeOllama, httpx.AsyncClient], what: str
) -> None:
    server, http = over
    server.script(URL, Reply([b"one\n", Pause(0.01), b"two\n"]), always=True)
    for _ in range(2):
        answer = await http.send(http.build_request("GET", URL), stream=True)
        parts = [part async for part in READ[what](answer)]
        assert "".join(part if isinstance(part, str) else part.decode() for part in parts).split() in (
            ["one", "two"],
            ["onetwo"],
        )
        assert answer.elapsed.total_seconds() > 0.01
        del answer
    assert [record.open for record in server.connections] == [True]


async def test_a_response_that_has_arrived_and_is_left_keeps_its_connection(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, raw(HELLO), always=True)
    for _ in range(2):
        answer = await http.send(http.build_request("GET", URL), stream=True)
        await by_break(answer.aiter_bytes())
        del answer
    assert [record.open for record in fake_ollama.connections] == [True]


@pytest.mark.parametrize("what", [*READ])
async def test_an_iterator_that_has_not_begun_leaves_nothing(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, what: str
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply([b"one", gate, b"two"]))
    answer = await http.send(http.build_request("GET", URL), stream=True)
    READ[what](answer)
    await READ[what](answer).aclose()
    gate.open()
    assert await answer.aread() == b"onetwo"
    assert fake_ollama.connections[0].open


async def test_the_library_says_itself_how_its_own_exchanges_end(fake_ollama: FakeOllama) -> None:
    """A response that httpx hands to the library is dropped at once; what it is read through goes on."""
    fake_ollama.script(URL, Reply([b"one", Stall()]))
    async with client_of(fake_ollama) as http:
        reader = ResponseReader(asyncio.get_running_loop())
        request = http.build_request("GET", URL, extensions={READER: reader})
        answer: httpx.Response | None = await http.send(request, stream=True)
        del answer
        assert await reader.read() == b"one"
        assert reader.outcome is None
        assert fake_ollama.connections[0].open


async def test_a_response_can_be_pickled_when_it_has_been_read(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, raw(HELLO))
    answer = pickle.loads(pickle.dumps(await http.get(URL)))
    assert [part async for part in answer.aiter_bytes()] == [b"hello"]
    assert (answer.status_code, answer.content) == (200, b"hello")


async def test_timer_of_idle_connections_is_gone_with_the_transport(fake_ollama: FakeOllama) -> None:
    loop = asyncio.get_running_loop()
    before = len(live_timers(loop))
    async with client_of(fake_ollama) as http:
        await http.get("/api/version")
    assert len(live_timers(loop)) == before
    assert fake_ollama.connections[0].wait_left(BOUND)


# -- bad answers --

CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BROKEN = {
    "no HTTP": b"220 mail.example.org ESMTP\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "both lengths": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "both lengths, other order": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "conflicting lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "length is a list": OK + b"Content-Length: 5, 6\r\n\r\nhello",
    "huge length": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "chunk size is no number": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
    "chunk size negative": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "chunk size too large": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n",
    "header name with a space": OK + b"X A: 1\r\nContent-Length: 2\r\n\r\nhi",
    "NUL in a header": OK + b"X-A: 1\x002\r\nContent-Length: 2\r\n\r\nhi",
    "header on two lines": OK + b"X-A: 1\r\n 2\r\nContent-Length: 2\r\n\r\nhi",
    "no colon": OK + b"X-A\r\nContent-Length: 2\r\n\r\nhi",
    "status is no number": b"HTTP/1.1 2xx OK\r\nContent-Length: 2\r\n\r\nhi",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
}
CUT = {
    "before the head": b"",
    "in the status line": b"HTTP/1.1 20",
    "in the head": OK + b"Content-Len",
    "in a body with a length": OK + b"Content-Length: 5\r\n\r\nhel",
    "in a chunk": CHUNKED + b"5\r\nhel",
    "between two chunks": CHUNKED + b"5\r\nhello\r\n",
    "before the last chunk's end": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "after 1xx": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
async def test_a_broken_answer_is_a_protocol_error(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, sent: bytes, bytewise: bool
) -> None:
    steps = [Trickle(sent[1:]), Stall()] if bytewise else [Stall()]
    fake_ollama.script(URL, Reply(steps, raw=sent[:1] if bytewise else sent))
    with pytest.raises(httpx.RemoteProtocolError):
        await http.get(URL)
    assert fake_ollama.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
async def test_a_cut_answer_is_a_protocol_error(fake_ollama: FakeOllama, http: httpx.AsyncClient, sent: bytes) -> None:
    fake_ollama.script(URL, raw(sent, end=True))
    with pytest.raises(httpx.RemoteProtocolError, match="the server closed the connection"):
        await http.get(URL)
    assert fake_ollama.connections[0].wait_left(BOUND)


async def test_the_chunks_before_the_cut_are_delivered_before_the_error(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, raw(CHUNKED + b"5\r\nhello\r\n", end=True))
    body = b""
    with pytest.raises(httpx.RemoteProtocolError):
        async with http.stream("GET", URL) as answer:
            async for block in answer.aiter_raw():
                body += block
    assert body == b"hello"


async def test_a_reset_is_a_read_error(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    fake_ollama.script(URL, Reply([b"one", Reset()]))
    with pytest.raises(httpx.ReadError):
        await http.get(URL)


ENDLESS = {
    "one huge header": (b"", lambda _: b"X-Huge: " + b"x" * 256 * 1024),
    "header line without an end": (b"X-Huge: ", lambda _: b"x" * 100),
    "header name without an end": (b"", lambda _: b"x" * 100),
    "headers": (b"", lambda n: b"X-%d: %b\r\n" % (n, b"x" * 50)),
    "short headers": (b"", lambda _: b"a:\r\n"),
    "1xx": (b"Content-Length: 0\r\n\r\n", None),
    "trailers": (b"Transfer-Encoding: chunked\r\n\r\n0\r\n", lambda n: b"X-%d: %b\r\n" % (n, b"x" * 50)),
    "trailer without an end": (b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Huge: ", lambda _: b"x" * 1000),
}


@pytest.mark.parametrize(("start", "more"), ENDLESS.values(), ids=ENDLESS)
async def test_a_head_without_an_end_is_refused(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, start: bytes, more: Callable[[int], bytes] | None
) -> None:
    if more is None:
        reply = Reply([Endless(lambda _: b"HTTP/1.1 103 Early Hints\r\n\r\n")], raw=b"HTTP/1.1 100 Continue\r\n\r\n")
    else:
        reply = Reply([Endless(more)], raw=OK + start)
    fake_ollama.script(URL, reply)
    with pytest.raises(httpx.RemoteProtocolError, match="over 65,536 bytes"):
        await asyncio.wait_for(http.get(URL), BOUND)
    await left(fake_ollama, 0)


async def test_a_status_line_without_an_end_is_refused(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    fake_ollama.script(URL, Reply([Endless(lambda _: b"x" * 100)], raw=b"HTTP/1.1 200 "))
    with pytest.raises(httpx.RemoteProtocolError, match="over 65,536 bytes"):
        await asyncio.wait_for(http.get(URL), BOUND)
    await left(fake_ollama, 0)


@pytest.mark.parametrize("step", [512, 1448, 16 * 1024, 1024 * 1024])
async def test_the_limit_of_a_head_does_not_depend_on_how_it_is_cut(step: int) -> None:
    """A head of some size passes or does not; segments of a network are no reason."""
    pairs = b"".join(b"X-%05d: %b\r\n" % (number, b"v" * 1000) for number in range(MAX_HEAD_BYTES // 1024 - 2))
    head = OK + pairs + b"Content-Length: 2\r\n\r\n"
    assert MAX_HEAD_BYTES * 0.9 < len(head) < MAX_HEAD_BYTES
    sent = head + b"hi"
    pieces = [sent[at : at + step] for at in range(0, len(sent), step)]
    assert (await fed("GET", *pieces, end=False))[3] == b"hi"


# -- requests --

BLOCKS = [b"one", b"", b"two" * 1000, b"three"]


def sync_body() -> Iterator[bytes]:
    yield from BLOCKS


async def async_body() -> AsyncIterator[bytes]:
    for block in BLOCKS:
        await asyncio.sleep(0)
        yield block


@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize("make", [sync_body, async_body, lambda: b"".join(BLOCKS)], ids=["sync", "async", "bytes"])
async def test_a_body_arrives_as_it_was_given(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, make: Callable[[], Any], length: bool
) -> None:
    body = b"".join(BLOCKS)
    headers = {"Content-Length": str(len(body))} if length else {}
    for _ in range(2):
        fake_ollama.script(URL, raw(HELLO))
        assert (await post(http, URL, make(), headers)).content == b"hello"
    for request in fake_ollama.requests:
        assert request.body == body
        assert request.complete
        chunked = not length and not isinstance(make(), bytes)
        assert request.header("transfer-encoding") == ("chunked" if chunked else None)
        assert request.header("content-length") == (None if chunked else str(len(body)))
    assert len(fake_ollama.connections) == 1


@pytest.mark.parametrize("make", [sync_body, async_body, lambda: b"".join(BLOCKS)], ids=["sync", "async", "bytes"])
@pytest.mark.parametrize("difference", [-1, -3000, 1, 3000])
async def test_a_body_of_another_length_than_it_says_is_refused(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, make: Callable[[], Any], difference: int
) -> None:
    """Too long, and the rest would be the next request; too short, and the next request would be the rest."""
    headers = {"Content-Length": str(len(b"".join(BLOCKS)) + difference)}
    with pytest.raises(httpx.LocalProtocolError, match="Content-Length"):
        await post(http, "/api/chat", make(), headers)
    # The connection is of no further use: refused before one was opened, or left.
    for record in fake_ollama.connections:
        assert record.wait_left(BOUND)
    assert not [request for request in fake_ollama.requests if request.complete]


class Source:
    """A body without an end that notes what was taken of it."""

    def __init__(self, block: bytes = b"x" * 64 * 1024) -> None:
        self.block = block
        self.taken = 0
        self.closed = False

    async def blocks(self) -> AsyncIterator[bytes]:
        try:
            while True:
                self.taken += len(self.block)
                yield self.block
        finally:
            self.closed = True


async def steady(value: Callable[[], int]) -> int:
    """Wait until a number does not grow any more."""
    deadline = time.monotonic() + BOUND
    last, since = value(), time.monotonic()
    while time.monotonic() - since < 0.3:
        assert time.monotonic() < deadline, "it grows and grows"
        await asyncio.sleep(0.01)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


async def test_an_upload_is_not_faster_than_the_server_reads(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply(before_head=[gate], read_body=False))
    source = Source()
    task = asyncio.create_task(http.post(URL, content=source.blocks()))
    await blocking(fake_ollama.wait_for_requests)
    assert await steady(lambda: source.taken) < 16 * 1024 * 1024  # what the kernel takes on loopback, and a little
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()  # until then the server does not read, and does not see the client leave either


async def test_a_cancelled_upload_closes_the_callers_generator(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply(before_head=[gate], read_body=False))
    source = Source()
    body = source.blocks()
    task = asyncio.create_task(http.post(URL, content=body))
    await blocking(fake_ollama.wait_for_requests)
    await steady(lambda: source.taken)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()  # until then the server does not read, and does not see the client leave either
    assert source.closed


async def test_an_answer_that_comes_early_ends_the_upload_and_closes_the_callers_generator(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    head = b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 9\r\n\r\n"
    fake_ollama.script(URL, Reply([Raw(b"too large"), gate], raw=head, read_body=False))
    source = Source()
    body = source.blocks()
    answer = await asyncio.wait_for(http.post(URL, content=body), BOUND)
    assert (answer.status_code, answer.content) == (413, b"too large")
    taken = source.taken
    await ticks(20)
    assert source.taken == taken
    assert source.closed
    # Not over the connection that is in the middle of a request, although its answer does not forbid it.
    assert (await http.get("/api/version")).status_code == 200
    gate.open()  # until then the server does not read, and does not see the client leave either
    await left(fake_ollama, 0)


async def test_an_early_answer_is_streamed_to_its_end_although_the_upload_was_cut(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    gate = Gate()
    fake_ollama.script(URL, Reply([b"one", gate, b"two"], status=413, read_body=False))
    async with http.stream("POST", URL, content=Source().blocks()) as answer:
        blocks = answer.aiter_raw()
        assert await anext(blocks) == b"one"
        gate.open()
        assert [block async for block in blocks] == [b"two"]


class TheBodysOwnError(Exception):
    pass


async def test_the_error_of_a_body_is_raised_and_closes_the_connection(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise TheBodysOwnError

    with pytest.raises(TheBodysOwnError):
        await http.post("/api/chat", content=body())
    await left(fake_ollama, 0)
    assert not [request for request in fake_ollama.requests if request.complete]


async def test_the_error_of_a_sync_body_is_raised_and_closes_the_connection(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    def body() -> Iterator[bytes]:
        yield b"one"
        raise TheBodysOwnError

    with pytest.raises(TheBodysOwnError):
        await post(http, "/api/chat", body())
    await left(fake_ollama, 0)


async def test_a_body_that_raises_cancelled_error_does_not_hang_the_request(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    """As one that reads from a task which somebody has cancelled."""

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        producer = asyncio.create_task(asyncio.sleep(BOUND))
        producer.cancel()
        await producer

    task = asyncio.create_task(http.post("/api/chat", content=body(), timeout=None))
    done, _ = await asyncio.wait([task], timeout=BOUND / 2)
    if not done:
        task.cancel()
        await asyncio.wait([task])
    assert done, "the request hangs"
    assert task.cancelled() or task.exception() is not None
    await left(fake_ollama, 0)


async def test_a_body_is_not_drained_when_the_connection_is_gone(nothing_left: Baseline) -> None:
    """A generator that never waits is not asked for more and more blocks that go nowhere."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b"one"
        peer, _ = listener.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        while taken < 10_000:
            taken += 1
            yield b"x"

    async with httpx.AsyncClient(transport=DirectTransport(), timeout=BOUND) as http:
        with pytest.raises(httpx.TransportError):
            await http.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", content=body())
    listener.close()
    assert taken < 10_000


# -- what would break out of a request --

GOOD = httpx.URL("http://h/x")


def request_of(method: str = "GET", headers: Any = None, raw_path: bytes = b"/x") -> Any:
    return SimpleNamespace(
        method=method, url=SimpleNamespace(raw_path=raw_path), headers=httpx.Headers(headers), extensions={}
    )


@pytest.mark.parametrize("path", [b"/a b", b"/a\r\nX: y", b"/a\n", b"/\x00", b"/\t", b"/\x7f"])
def test_an_illegal_path_is_refused(path: bytes) -> None:
    with pytest.raises(httpx.LocalProtocolError, match="path"):
        encode_head(request_of(raw_path=path))


BAD_REQUESTS: dict[str, tuple[str, list[tuple[bytes, bytes]]]] = {
    "method with a space": ("GET / HTTP/1.1\r\nX: y\r\n\r\nGET", []),
    "method with a newline": ("GET\n", []),
    "empty method": ("", []),
    "method beyond ASCII": ("GÉT", []),
    "header name with a colon": ("GET", [(b"X: y", b"1")]),
    "header name with a newline": ("GET", [(b"X\r\nY", b"1")]),
    "empty header name": ("GET", [(b"", b"1")]),
    "header name with a space": ("GET", [(b"X ", b"1")]),
    "header name beyond ASCII": ("GET", [(b"X\xe9", b"1")]),
    "header value with CRLF": ("GET", [(b"X", b"secret\r\nY: z")]),
    "header value with CR": ("GET", [(b"X", b"secret\rY: z")]),
    "header value with LF": ("GET", [(b"X", b"secret\nY: z")]),
    "header value with NUL": ("GET", [(b"X", b"secret\x00")]),
}


@pytest.mark.parametrize(("method", "headers"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
@pytest.mark.parametrize("warm", [False, True], ids=["new", "kept"])
async def test_a_request_that_would_break_out_of_its_place_is_refused_before_anything_is_sent(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, method: str, headers: list[tuple[bytes, bytes]], warm: bool
) -> None:
    if warm:
        await http.get("/api/version")
    received = sum(record.bytes_received for record in fake_ollama.connections)
    request = httpx.Request(method, fake_ollama.url + "/x", headers=headers)
    with pytest.raises(httpx.LocalProtocolError) as caught:
        await http.send(request)
    assert "secret" not in str(caught.value)
    # Nor is a kept connection taken for it, or a new one made.
    assert [record.open for record in fake_ollama.connections] == [True] * warm
    assert sum(record.bytes_received for record in fake_ollama.connections) == received


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http:///x", "ws://127.0.0.1/"])
async def test_a_url_that_is_not_http_is_refused(http: httpx.AsyncClient, url: str) -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        await DirectTransport().handle_async_request(httpx.Request("GET", url))


# -- back-pressure --


def kernel_buffers() -> int:
    """The most bytes that the kernel may hold between the two ends of a connection."""
    return sum(int(Path(f"/proc/sys/net/ipv4/tcp_{end}mem").read_text().split()[2]) for end in "rw")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_slow_reader_of_a_fast_server_holds_little_and_loses_nothing(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, secure: bool
) -> None:
    def block(number: int) -> bytes:
        return b"%08d" % number * 128

    with FakeOllama(ssl=server_tls if secure else None) as server:
        server.script(URL, Reply([Endless(block)]))
        reader = ResponseReader(asyncio.get_running_loop())
        async with (
            client_of(server, verify=client_tls) as http,
            http.stream("GET", URL, extensions={READER: reader}) as answer,
        ):
            (record,) = server.connections
            blocks = answer.aiter_raw()
            got = bytearray(await anext(blocks))
            for _ in range(3):
                sent = await steady(lambda: record.bytes_sent)
                assert sent - len(got) < kernel_buffers() + 1024 * 1024
                assert reader.paused
                # What one read brings comes on top of it.
                assert reader._buffered_bytes <= HIGH_WATER + (256 * 1024 if secure else HIGH_WATER)
                goal = len(got) + 8 * 1024 * 1024
                while len(got) < goal:
                    got += await anext(blocks)
        assert await blocking(record.wait_left, BOUND)
    expected = b"".join(block(number) for number in range(len(got) // 1024 + 1))
    assert got == expected[: len(got)]


# -- httpx's timeouts --


async def test_connect_timeout() -> None:
    with black_hole() as url:
        async with httpx.AsyncClient(transport=DirectTransport(), timeout=httpx.Timeout(BOUND, connect=0.05)) as http:
            with pytest.raises(httpx.ConnectTimeout):
                await asyncio.wait_for(http.get(url), BOUND)


@pytest.mark.parametrize("steps", [[], [b"one"]], ids=["before the head", "in the body"])
async def test_read_timeout(fake_ollama: FakeOllama, http: httpx.AsyncClient, steps: list[bytes]) -> None:
    fake_ollama.script(URL, Reply([*steps, Stall()], before_head=[] if steps else [Stall()]))
    with pytest.raises(httpx.ReadTimeout):
        await asyncio.wait_for(http.get(URL, timeout=httpx.Timeout(BOUND, read=0.05)), BOUND)
    assert fake_ollama.connections[0].wait_left(BOUND)


async def test_read_timeout_is_for_silence_and_not_for_the_whole(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    fake_ollama.script(URL, Reply([Trickle(b"x" * 20, interval=0.05)]))
    answer = await http.get(URL, timeout=httpx.Timeout(BOUND, read=0.5))
    assert answer.content == b"x" * 20


async def test_no_timer_is_left_of_a_timeout(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    loop = asyncio.get_running_loop()
    before = len(live_timers(loop))
    fake_ollama.script(URL, Reply([b"one", b"two"], headers={"Connection": "close"}))
    assert (await http.get(URL, timeout=60)).content == b"onetwo"
    assert len(live_timers(loop)) == before


# -- connecting --


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Have the name of these tests resolve to these addresses."""
    really = asyncio.get_running_loop().getaddrinfo

    async def getaddrinfo(host: Any, *args: Any, **options: Any) -> list[tuple[Any, ...]]:
        if host != "name.test":
            return await really(host, *args, **options)
        families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host, _ in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", where) for family, where in zip(families, addresses, strict=True)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)


def where(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


async def test_localhost_is_found_although_only_one_family_listens(
    fake_ollama: FakeOllama, http: httpx.AsyncClient
) -> None:
    assert (await http.get(f"http://localhost:{fake_ollama.port}/api/version")).status_code == 200


async def test_the_second_address_is_tried_when_the_first_refuses(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        refusing = unused.getsockname()
    resolve_to(monkeypatch, ("::1", fake_ollama.port), refusing, where(fake_ollama.url))
    assert (await http.get("http://name.test/api/version")).status_code == 200


async def test_the_second_address_is_tried_beside_the_first_that_does_not_answer(
    fake_ollama: FakeOllama, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with black_hole() as url:
        resolve_to(monkeypatch, where(url), where(url), where(fake_ollama.url))
        assert (await http.get("http://name.test/api/version")).status_code == 200
    assert len(fake_ollama.connections) == 1


async def test_when_no_address_answers_the_first_error_is_told(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        refusing = unused.getsockname()
    resolve_to(monkeypatch, refusing, refusing)
    with pytest.raises(httpx.ConnectError, match="refused"):
        await http.get("http://name.test/")


@pytest.mark.parametrize("count", [1, 3])
async def test_cancelled_while_several_addresses_are_tried(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """At every tick: with a black hole first and a good address behind."""
    with black_hole() as url:
        resolve_to(monkeypatch, *[where(url)] * (count - 1), where(fake_ollama.url))
        for tick in range(25):
            async with httpx.AsyncClient(transport=DirectTransport(), timeout=BOUND) as http:
                task = asyncio.create_task(http.get("http://name.test/api/version"))
                await ticks(tick)
                if task.done():
                    break
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
    await until(lambda: not any(record.open for record in fake_ollama.connections), "all connections closed")


async def test_unix_socket(tmp_path: Any) -> None:
    with FakeOllama(uds=str(tmp_path / "s")) as server:
        async with client_of(server) as http:
            for _ in range(2):
                assert (await http.get("/api/version")).status_code == 200
        assert len(server.connections) == 1
        assert server.connections[0].wait_left(BOUND)


async def test_a_missing_unix_socket_is_named(tmp_path: Any) -> None:
    async with httpx.AsyncClient(transport=DirectTransport(uds=str(tmp_path / "none"))) as http:
        with pytest.raises(httpx.ConnectError, match="none"):
            await http.get("http://localhost/")


# -- loops, threads, lifetime --


def new_uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": new_uvloop}


@pytest.fixture(params=LOOPS.values(), ids=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_one_transport_in_several_loops_one_after_the_other(fake_ollama: FakeOllama, new_loop: Any) -> None:
    http = client_of(fake_ollama)

    async def twice() -> list[int]:
        return [(await http.get("/api/version")).status_code for _ in range(2)]

    def run() -> list[int]:
        with warnings.catch_warnings(), asyncio.Runner(loop_factory=new_loop) as runner:
            warnings.simplefilter("error")
            return runner.run(twice())

    for number in range(3):
        assert in_thread(run) == [200, 200]
        assert fake_ollama.connections[number].wait_left(BOUND), "what was idle is closed when its loop ends"
    assert [len(record.requests) for record in fake_ollama.connections] == [2, 2, 2]
    await http.aclose()


async def test_two_loops_at_once_have_their_own_connections(fake_ollama: FakeOllama, new_loop: Any) -> None:
    http = client_of(fake_ollama)
    await http.get("/api/version")

    async def other() -> int:
        return (await http.get("/api/version")).status_code

    def run() -> int:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(other())

    assert in_thread(run) == 200
    assert (await http.get("/api/version")).status_code == 200
    assert [len(record.requests) for record in fake_ollama.connections] == [2, 1]
    await http.aclose()


async def test_aclose_from_another_thread_closes_at_once_while_the_loop_is_blocked(
    fake_ollama: FakeOllama, new_loop: Any
) -> None:
    http = client_of(fake_ollama)
    await http.get("/api/version")
    fake_ollama.script(URL, Reply([b"one", Stall()]))
    task = asyncio.create_task(http.get("/api/version"))
    await task
    stalled = asyncio.create_task(http.get(URL))
    await blocking(fake_ollama.wait_for_requests, 1, path=URL)
    await http.get("/api/version")  # on a connection of its own, which is idle then

    def close() -> bool:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(http.aclose())
        return True

    assert in_thread(close)
    assert len(fake_ollama.connections) == 2
    for record in fake_ollama.connections:
        assert record.wait_left(BOUND)
    with pytest.raises(httpx.TransportError):
        await asyncio.wait_for(stalled, BOUND)


async def test_aclose_ends_what_is_under_way(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    fake_ollama.script(URL, Reply([b"one", Stall()]))
    task = asyncio.create_task(http.get(URL))
    await blocking(fake_ollama.wait_for_requests)
    await http.aclose()
    assert fake_ollama.connections[0].wait_left(BOUND)
    with pytest.raises(httpx.TransportError):
        await asyncio.wait_for(task, BOUND)


async def test_aclose_ends_a_connection_in_the_making() -> None:
    with FakeOllama(silent=True) as silent, black_hole() as hole:
        for url in (silent.url.replace("http", "https"), hole):
            http = httpx.AsyncClient(transport=DirectTransport(), timeout=None)
            task = asyncio.create_task(http.get(url))
            await ticks(30)
            await http.aclose()
            done, _ = await asyncio.wait([task], timeout=BOUND)
            task.cancel()
            await asyncio.wait([task])
            assert done, f"still connecting after aclose(): {url}"
            assert isinstance(task.exception(), httpx.TransportError)


async def test_a_transport_that_is_dropped_closes_its_sockets(fake_ollama: FakeOllama) -> None:
    transport = DirectTransport()
    request = httpx.Request("GET", f"{fake_ollama.url}/api/version")
    answer = await transport.handle_async_request(request)
    await answer.aread()
    assert fake_ollama.connections[0].open
    del transport
    assert fake_ollama.connections[0].wait_left(BOUND)


async def test_a_transport_that_is_dropped_after_its_loop_was_closed_closes_its_sockets(
    fake_ollama: FakeOllama,
) -> None:
    """A loop that is closed without the steps that ``asyncio.run()`` takes before."""

    def run() -> DirectTransport:
        transport = DirectTransport()
        loop = asyncio.new_event_loop()
        answer = loop.run_until_complete(
            transport.handle_async_request(httpx.Request("GET", f"{fake_ollama.url}/api/version"))
        )
        loop.run_until_complete(answer.aread())
        loop.close()
        return transport

    transport = in_thread(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's own, for its transport in a closed loop
        del transport
        gc.collect()
    assert fake_ollama.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("then", ["close", "use"])
# What asyncio and Python say of tasks in a loop that was closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
async def test_a_connection_in_the_making_in_a_loop_that_was_closed(fake_ollama: FakeOllama, then: str) -> None:
    """It is closed, and in nobody's way, when the transport is closed or used in another loop."""
    transport = DirectTransport()
    url = f"{fake_ollama.url}/api/version"

    async def begin() -> tuple[asyncio.Task[httpx.Response], socket.socket]:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        task = asyncio.create_task(transport.handle_async_request(httpx.Request("GET", address)))
        peer, _ = await asyncio.to_thread(silent.accept)
        peer.settimeout(BOUND)
        # The beginning of the TLS handshake, to which nobody answers.
        assert await asyncio.to_thread(peer.recv, 1)
        return task, peer

    async def go_on() -> None:
        if then == "use":
            answer = await transport.handle_async_request(httpx.Request("GET", url))
            assert (await answer.aread()) != b""
        await transport.aclose()

    def run() -> bool:
        loop = asyncio.new_event_loop()
        task, peer = loop.run_until_complete(begin())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        with peer:
            # The task is held: nothing of it is closed because nobody has it any more.
            asyncio.run(go_on())
            while peer.recv(65536):
                pass
        return not task.done()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(BOUND)
        assert in_thread(run)
    gc.collect()


@pytest.mark.parametrize("size", [150_000, 600_000])
@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
async def test_nothing_that_came_over_tls_is_lost_when_the_server_has_closed(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, framing: str, size: int
) -> None:
    """Neither by asyncio, which hands over one buffer of it, nor by uvloop, which hands over nothing while paused."""
    body = bytes(index % 251 for index in range(size))
    heads = {
        "length": (b"Content-Length: %d\r\n\r\n" % size, b""),
        "chunks": (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size, b"\r\n0\r\n\r\n"),
        "close": (b"\r\n", b""),
    }
    head, end = heads[framing]
    with FakeOllama(ssl=server_tls) as secure:
        secure.script(URL, Reply([Raw(body), Raw(end)], raw=OK + b"Connection: close\r\n" + head))
        got: list[bytes] = []
        async with client_of(secure, verify=client_tls) as http:
            answer: httpx.Response
            async with http.stream("GET", URL, headers={"Connection": "close"}) as answer:
                async for block in answer.aiter_raw():
                    got.append(block)
                    # Time enough to notice the end while reading is paused.
                    await asyncio.sleep(0.01)
    assert b"".join(got) == body


async def test_a_unix_socket_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "full")
    before: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        server.settimeout(BOUND)
        while len(before) < 100:
            before.append(socket.socket(socket.AF_UNIX))
            before[-1].setblocking(False)
            try:
                before[-1].connect(path)
            except BlockingIOError:
                break
        async with httpx.AsyncClient(transport=DirectTransport(uds=path), timeout=BOUND) as http:
            task = asyncio.create_task(http.get("http://x/"))
            await ticks(20)
            assert not task.done()
            for sock in before[:-1]:
                server.accept()[0].close()
                sock.close()
            before[-1].close()
            peer, _ = await blocking(server.accept)
            with peer:
                assert await blocking(peer.recv, 65536)
                peer.sendall(HELLO)
                assert (await task).content == b"hello"


async def test_a_pause_does_not_end_the_stream(fake_ollama: FakeOllama, http: httpx.AsyncClient) -> None:
    fake_ollama.script(URL, Reply([b"one", Pause(0.05), b"two"]))
    assert (await http.get(URL)).content == b"onetwo"


async def test_small_writes_are_not_held_back(fake_ollama: FakeOllama) -> None:
    """Nagle's algorithm would hold the second of two small writes back for 40 ms."""
    transport = DirectTransport()
    async with httpx.AsyncClient(transport=transport) as http:
        await http.get(fake_ollama.url + "/api/version")
        [pool] = transport._pools.values()
        [connection] = pool._all
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_transport_that_is_derived_from_ours_is_asked(fake_ollama: FakeOllama) -> None:
    """The quick way past httpx is for the transports that a client has made itself."""
    asked: list[str] = []

    class Watching(DirectTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            asked.append(request.url.path)
            return await super().handle_async_request(request)

    async with AsyncClient(fake_ollama.url, transport=Watching()) as client:
        await client.chat("fake", "hi")
        await client.version()
    assert asked == ["/api/chat", "/api/version"]
