"""Hostile servers: whatever they send is an answer or a typed error, how ever it is cut, in bounded memory."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import itertools
import json
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from teardown.harness import BOUND, nothing_left_behind
from wire.connection import OK, POISON, Wire

from ollama_async import (
    AsyncClient,
    ChatResponse,
    DirectTransport,
    OllamaError,
    ProtocolError,
    ResponseError,
    StreamError,
)
from ollama_async._call.ndjson import LineSplitter
from ollama_async._wire.http1 import MAX_HEAD_BYTES
from ollama_async._wire.reader import ResponseReader
from ollama_async.testing import Cut, Endless, FakeOllama, Reply, Stall

CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
URL = "/x"


def line(text: str, *, done: bool = False) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"model": "m", "message": message, "done": done}).encode() + b"\n"


# -- lines --


@given(body=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_lines_do_not_depend_on_how_they_are_cut(body: bytes, cuts: list[int]) -> None:
    splitter, lines = LineSplitter(), []
    for piece in pieces(body, cuts):
        lines += splitter.feed_data(piece)
    rest = splitter.flush()
    assert [*lines, *([rest] if rest else [])] == [part for part in body.split(b"\n") if part.strip(b" \t\r\v\f")]


@given(body=st.binary(max_size=120), cuts=st.lists(st.integers(0, 120), max_size=8), limit=st.integers(1, 20))
def test_what_is_held_of_a_line_has_a_limit(body: bytes, cuts: list[int], limit: int) -> None:
    body = body.replace(b"\x01", b"\n")
    splitter, lines = LineSplitter(limit), []
    for piece in pieces(body, cuts):
        lines += splitter.feed_data(piece)
        assert sum(map(len, splitter._parts)) <= limit + len(piece)
        if splitter.failure is not None:
            break
    refused = splitter.failure is not None
    whole = body.split(b"\n")
    first_long = next((place for place, part in enumerate(whole) if len(part) > limit), None)
    assert refused is (first_long is not None)
    if refused:
        assert lines == [part for part in whole[:first_long] if part.strip(b" \t\r\v\f")]


def pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    return [body[start:end] for start, end in itertools.pairwise(places)]


# -- HTTP --

ANSWERS = [
    HELLO,
    CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    CHUNKED + b"3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nX-T: 1\r\n\r\n",
    OK + b"Connection: close\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO,
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    HELLO + POISON,
]
TRICKS = [
    b"Content-Length: 5\r\n",
    b"Content-Length: 6\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Connection: keep-alive\r\n",
    b"Upgrade: x\r\nConnection: upgrade\r\n",
    b" folded\r\n",
    b"\tfolded\r\n",
    b"\r",
    b"\n",
    b"\r\n",
    b"\x00",
    b"0\r\n\r\n",
    b"fffffffffffffffff\r\n",
    b"-1\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b": \r\n",
    b"\xff",
    b"5",
]


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """An answer, with something wrong with it."""
    data = bytearray(draw(st.sampled_from(ANSWERS)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["insert", "flip", "delete", "truncate", "repeat"])):
            case "insert":
                data[at:at] = draw(st.sampled_from(TRICKS) | st.binary(max_size=4))
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "truncate":
                del data[at:]
            case "repeat":
                data[at:at] = data[max(0, at - draw(st.integers(1, 40))) : at]
    return bytes(data)


async def fed(*received: bytes) -> tuple[Any, ...]:
    """All that comes of an answer which arrives like this, up to its end."""
    wire = Wire()
    connection = wire.connection
    reader = ResponseReader(asyncio.get_running_loop())
    connection.begin(reader, "GET", b"", more=False)
    for block in received:
        # As asyncio: nothing is read from what has been closed.
        if not wire.closed:
            wire.receive(block)
    kept = wire.kept and not wire.closed
    if not wire.closed:
        connection.eof_received()
    wire.sock.close()
    assert reader.eof != (reader._failure is not None)
    assert reader._failure is None or isinstance(reader._failure, httpx.RemoteProtocolError)
    assert reader._buffered_bytes <= sum(map(len, received))
    return reader.status, list(reader.head.headers), reader.eof, reader.read_buffered(), kept


@given(sent=mangled(), cuts=st.lists(st.integers(0, 300), max_size=6))
@settings(max_examples=300)
@example(sent=HELLO + POISON, cuts=[10])
@example(sent=OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", cuts=[40])
def test_a_mangled_answer_is_the_same_how_ever_it_is_cut(sent: bytes, cuts: list[int]) -> None:
    async def both() -> None:
        whole, cut = await fed(sent), await fed(*pieces(sent, cuts))
        # Bytes after the answer close an idle connection as well as one that is just done.
        assert cut == whole

    asyncio.run(both())


SMUGGLED = {
    "after the answer": HELLO + POISON,
    "two lengths, the same": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 11\r\n\r\nhello",
    "a length and chunks": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "a blank before the colon": OK + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "chunked is not the last": OK + b"Transfer-Encoding: chunked, identity\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "no such encoding": OK + b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\nhello",
    "a folded header": OK + b"X-A: b\r\n Content-Length: 40\r\nContent-Length: 5\r\n\r\nhello",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "a bare carriage return": OK + b"X-A: b\rContent-Length: 40\r\nContent-Length: 5\r\n\r\nhello",
    "a length in a trailer": CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 40\r\n\r\n",
    "a line feed in a chunk's extension": CHUNKED + b"5;a\n;b\r\nhello\r\n0\r\n\r\n",
    "NUL": OK + b"X-A: b\x00\r\nContent-Length: 5\r\n\r\nhello",
    "204 with a body": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
    "304 with chunks": b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
    "1xx with a length": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n" + HELLO,
}


@pytest.mark.parametrize("sent", SMUGGLED.values(), ids=SMUGGLED)
async def test_no_answer_is_smuggled_to_the_next_request(fake_ollama: FakeOllama, sent: bytes) -> None:
    # Whatever one takes the first answer for: what stands behind it was meant for the next request.
    fake_ollama.script(URL, Reply([Stall()], raw=sent + POISON), Reply(raw=HELLO))
    async with httpx.AsyncClient(transport=DirectTransport(), base_url=fake_ollama.url) as http:
        try:
            first = await asyncio.wait_for(http.get(URL), BOUND)
        except httpx.RemoteProtocolError:
            first = None
        assert first is None or b"poison" not in first.content
        second = await asyncio.wait_for(http.get(URL), BOUND)
        assert second.content == b"hello"
        assert len(fake_ollama.connections) == 2


ENDLESS = {
    "an extension of a chunk": (CHUNKED + b"5;", b"x" * 1000),
    "the size of a chunk": (CHUNKED, b"0" * 1000),
    "blanks before the answer": (b"\r\n", b"\r\n" * 500),
    "the version": (b"HTTP/1.", b"1" * 1000),
}


@pytest.mark.parametrize(("start", "more"), ENDLESS.values(), ids=ENDLESS)
async def test_an_endless_invalid_answer_ends(fake_ollama: FakeOllama, start: bytes, more: bytes) -> None:
    fake_ollama.script("/api/version", Reply([Endless(lambda _: more)], raw=start))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ProtocolError):
            await asyncio.wait_for(client.version(), BOUND)
        assert await asyncio.to_thread(fake_ollama.connections[0].wait_left, BOUND)
        # Some of it is in the kernel's buffers.
        assert fake_ollama.connections[0].bytes_sent < 16 * 1024 * 1024 + MAX_HEAD_BYTES


# -- whole answers --

STREAM = b"".join(map(line, ["one ", "two "])) + line("", done=True)


@st.composite
def mangled_body(draw: st.DrawFn) -> bytes:
    data = bytearray(STREAM)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "delete", "truncate", "nest", "number", "error", "bytes"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "delete":
                del data[at : at + draw(st.integers(1, 20))]
            case "truncate":
                del data[max(1, at) :]
            case "nest":
                data[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([1, 300, 60_000]))
            case "number":
                data[at:at] = draw(st.sampled_from([b"9" * 5000, b"1e999", b"-0", b"NaN", b"0.1" * 9]))
            case "error":
                data[at:at] = draw(
                    st.sampled_from([b'{"error":"\\ud800"}\n', b'{"error":[[{}]]}\n', b'{"error":{"message":1}}\n'])
                )
            case "bytes":
                data[at:at] = draw(st.binary(max_size=5))
        if not data:
            return b"\n"
    return bytes(data)


async def outcome(client: AsyncClient, *, streaming: bool) -> Any:
    try:
        if streaming:
            return await client.chat("m", "hi", stream=True).collect()
        return await client.chat("m", "hi")
    except OllamaError as error:
        return error


async def attacked(replies: list[Reply], *, streaming: bool) -> None:
    with FakeOllama() as server:
        async with nothing_left_behind(BOUND), AsyncClient(server.url) as client:
            for reply in replies:
                server.script("/api/chat", reply)
                answer = await asyncio.wait_for(outcome(client, streaming=streaming), BOUND)
                assert isinstance(answer, ChatResponse | OllamaError)
                # An error can be shown.
                str(answer).encode("utf-8")
            # A kept connection whose FIN is still on its way costs one attempt.
            assert (await client.version(retries=3)).version


@given(bodies=st.lists(mangled_body(), min_size=1, max_size=8), streaming=st.booleans())
@settings(max_examples=40)
def test_a_mangled_body_is_an_answer_or_a_typed_error(bodies: list[bytes], streaming: bool) -> None:
    asyncio.run(attacked([Reply([body]) for body in bodies], streaming=streaming))


@given(answers=st.lists(mangled(), min_size=1, max_size=8), streaming=st.booleans())
@settings(max_examples=40)
def test_mangled_http_is_an_answer_or_a_typed_error(answers: list[bytes], streaming: bool) -> None:
    asyncio.run(attacked([Reply([Cut()], raw=sent or b"H") for sent in answers], streaming=streaming))


@pytest.mark.parametrize(
    "frame", [b'{"error":"\\ud800"}\n', b'{"error":' + b"[" * 5000 + b"]" * 5000 + b"}\n"], ids=["surrogate", "deep"]
)
async def test_an_error_frame_that_cannot_be_shown_can_be_shown(fake_ollama: FakeOllama, frame: bytes) -> None:
    fake_ollama.script("/api/chat", Reply([frame]))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises((StreamError, ProtocolError)) as caught:
            await client.chat("m", "hi", stream=True).collect()
    assert str(caught.value).encode("utf-8")


async def test_an_error_body_with_a_lone_surrogate_can_be_shown(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([b'{"error":"\\ud800", "signin_url": "\\ud800"}'], status=500))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ResponseError) as caught:
            await client.chat("m", "hi")
    assert str(caught.value).encode("utf-8")


# -- bombs --


def bomb(form: str) -> tuple[bytes, str]:
    zeros = b'{"model":"' + b"0" * 16 * 1024 * 1024
    if form == "gzip":
        return gzip.compress(zeros), "gzip"
    return zlib.compress(zeros), "deflate"


@pytest.mark.parametrize("form", ["gzip", "deflate"])
@pytest.mark.parametrize("foreign", [False, True], ids=["direct", "foreign"])
@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
async def test_a_compressed_bomb_is_never_unpacked(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, form: str, foreign: bool, streaming: bool
) -> None:
    def unpack(*_: object) -> bytes:
        raise AssertionError("it was unpacked")

    packed, name = bomb(form)
    monkeypatch.setattr("httpx._decoders.GZipDecoder.decode", unpack)
    monkeypatch.setattr("httpx._decoders.DeflateDecoder.decode", unpack)
    fake_ollama.script("/api/chat", Reply([packed], headers={"Content-Encoding": name}))
    transport = httpx.AsyncHTTPTransport() if foreign else None
    async with AsyncClient(fake_ollama.url, transport=transport) as client:
        with pytest.raises(ProtocolError, match=f"encoded as '{name}', which was not asked for"):
            call: Any = client.chat("m", "hi", stream=streaming)
            await (call.collect() if streaming else call)


async def test_an_endless_line_is_held_up_to_the_limit(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([Endless(lambda _: b"x" * 65536)]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, max_line_bytes=1024 * 1024) as client:
        with pytest.raises(ProtocolError, match="1,048,576"):
            await asyncio.wait_for(client.chat("m", "hi", stream=True).collect(), BOUND)


async def test_blank_lines_for_ever_starve_nobody_and_can_be_aborted(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([Endless(lambda _: b"\n" * 65536)]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "hi", stream=True)
        reading = asyncio.create_task(stream.collect())
        for _ in range(40):
            await asyncio.sleep(0.001)
        stream.abort("enough")
        with pytest.raises(OllamaError):
            await asyncio.wait_for(reading, BOUND)


async def test_redirects_in_a_circle_end(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/version", Reply(status=307, headers={"Location": "/api/version"}), always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ProtocolError):
            await asyncio.wait_for(client.version(), BOUND)
    assert len(fake_ollama.requests) < 30


async def test_a_body_without_an_end_is_held_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ollama_async._call.body"], "MAX_BODY_BYTES", 1024 * 1024)

    async def forever() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=forever())

    async with AsyncClient(transport=httpx.MockTransport(handler)) as client:
        with pytest.raises(ProtocolError, match="1,048,576"):
            await asyncio.wait_for(client.version(), BOUND)


# -- bodies that httpx reads by itself --

CHALLENGE = {"WWW-Authenticate": 'Digest realm="a", nonce="b", qop="auth"'}


async def reads(response: Any) -> None:
    await response.aread()


def reads_answers(home: Any) -> Any:
    """A flow of credentials that wants to see what the server says."""
    flow = home.Auth()
    flow.requires_response_body = True
    return flow


def client_of(url: str, way: str, make: Callable[[Any], dict[str, Any]]) -> AsyncClient:
    home = importlib.import_module("httpx2" if way == "httpx2" else "httpx")
    if way in ("lent", "httpx2"):
        return AsyncClient(url, http_client=home.AsyncClient(follow_redirects=True, **make(home)))
    transport = {"transport": httpx.AsyncHTTPTransport()} if way == "foreign" else {}
    return AsyncClient(url, **transport, **make(home))


async def closed(client: AsyncClient) -> None:
    await client.aclose()
    await client._client.aclose()


def nothing(home: Any) -> dict[str, Any]:
    return {}


# What the server says, and who reads it before the library does.
READ_BY_OTHERS: dict[str, tuple[int, dict[str, str], Callable[[Any], dict[str, Any]]]] = {
    "a redirect": (307, {"Location": "/b"}, nothing),
    "Digest": (401, CHALLENGE, lambda home: {"auth": home.DigestAuth("a", "b")}),
    "an auth flow": (403, {}, lambda home: {"auth": reads_answers(home)}),
    "an event hook": (500, {}, lambda home: {"event_hooks": {"response": [reads]}}),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("way", ["direct", "foreign", "lent", "httpx2"])
@pytest.mark.parametrize("what", READ_BY_OTHERS)
async def test_a_body_that_others_read_has_a_limit(
    fake_ollama: FakeOllama, what: str, way: str, streaming: bool
) -> None:
    status, headers, options = READ_BY_OTHERS[what]
    fake_ollama.script("/api/chat", Reply([Endless(lambda _: b"x" * 65536)], status=status, headers=headers))
    client = client_of(fake_ollama.url, way, options)
    async with nothing_left_behind():
        answer = await asyncio.wait_for(outcome(client, streaming=streaming), BOUND)
        assert isinstance(answer, ProtocolError)
        assert "over 1,048,576 bytes" in str(answer)
        assert await asyncio.to_thread(fake_ollama.connections[0].wait_left, BOUND)
        await closed(client)
    # The rest is in the kernel's buffers.
    assert fake_ollama.connections[0].bytes_sent < 16 * 1024 * 1024
    assert len(fake_ollama.requests) == 1


# 64 MiB of nothing, packed once and twice.
@cache
def zeros(encoding: str) -> bytes:
    packed = gzip.compress(bytes(64 * 1024 * 1024))
    return gzip.compress(packed) if encoding == "gzip, gzip" else packed


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip"])
@pytest.mark.parametrize("way", ["direct", "foreign", "lent", "httpx2"])
@pytest.mark.parametrize("what", READ_BY_OTHERS)
async def test_a_packed_body_that_others_read_is_not_unpacked(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, what: str, way: str, encoding: str
) -> None:
    status, headers, options = READ_BY_OTHERS[what]
    packed = {**headers, "Content-Encoding": encoding}
    fake_ollama.script("/api/chat", Reply([zeros(encoding)], status=status, headers=packed))
    fake_ollama.script("/b", Reply.error(418, "here"))
    unpacked: list[int] = []
    for home in {"httpx", way} & {"httpx", "httpx2"}:
        decoders = importlib.import_module(f"{home}._decoders")
        decode = decoders.GZipDecoder.decode

        def counted(self: Any, data: bytes, decode: Any = decode) -> bytes:
            unpacked.append(len(data))
            return decode(self, data)

        monkeypatch.setattr(decoders.GZipDecoder, "decode", counted)
    client = client_of(fake_ollama.url, way, options)
    answer = await asyncio.wait_for(outcome(client, streaming=False), BOUND)
    assert isinstance(answer, OllamaError)
    assert sum(unpacked) == 0
    await closed(client)


@pytest.mark.parametrize("status", [307, 401])
async def test_a_bare_client_unpacks_nothing_that_httpx_reads_unasked(fake_ollama: FakeOllama, status: int) -> None:
    headers = {"Location": "/b", "Content-Encoding": "gzip"}
    fake_ollama.script("/a", Reply([zeros("gzip")], status=status, headers=headers))
    fake_ollama.script("/b", Reply.json({}))
    async with httpx.AsyncClient(transport=DirectTransport(), follow_redirects=True) as client:
        response = await client.get(f"{fake_ollama.url}/a")
        assert [*response.history, response][0].content == b""


async def test_an_answer_that_a_hook_reads_has_the_limit_of_an_answer(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ollama_async._wire.guard"], "MAX_BODY_BYTES", 2 * 1024 * 1024)
    fake_ollama.script("/api/chat", Reply([Endless(lambda _: b"x" * 65536)]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, event_hooks={"response": [reads]}) as client:
        answer = await asyncio.wait_for(outcome(client, streaming=True), BOUND)
    assert isinstance(answer, ProtocolError)
    assert "over 2,097,152 bytes" in str(answer)


@pytest.mark.parametrize("way", ["direct", "foreign", "lent"])
async def test_a_stream_has_no_limit_where_others_are_on_its_way(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async def looks(response: Any) -> None:
        assert response.status_code == 200

    monkeypatch.setattr(sys.modules["ollama_async._wire.guard"], "MAX_BODY_BYTES", 10)
    fake_ollama.script("/api/chat", Reply.chat("a ", "long ", "answer", interval=0))
    client = client_of(fake_ollama.url, way, lambda home: {"event_hooks": {"response": [looks]}})
    assert (await outcome(client, streaming=True)).message.content == "a long answer"
    await closed(client)


@pytest.mark.parametrize("status", [307, 401])
async def test_a_bare_client_has_the_limit_where_httpx_reads_unasked(fake_ollama: FakeOllama, status: int) -> None:
    headers = {"Location": "/b"} if status == 307 else CHALLENGE
    fake_ollama.script("/a", Reply([Endless(lambda _: b"x" * 65536)], status=status, headers=headers))
    async with nothing_left_behind(), httpx.AsyncClient(transport=DirectTransport(), follow_redirects=True) as http:
        with pytest.raises(httpx.RemoteProtocolError, match="over 1,048,576 bytes"):
            await asyncio.wait_for(http.get(f"{fake_ollama.url}/a", auth=httpx.DigestAuth("a", "b")), BOUND)
    assert fake_ollama.connections[0].bytes_sent < 16 * 1024 * 1024


@pytest.mark.parametrize("way", ["direct", "foreign", "lent", "httpx2"])
@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
async def test_after_a_small_body_of_a_redirect_its_connection_is_used_again(
    fake_ollama: FakeOllama, way: str, streaming: bool
) -> None:
    page = [b"<html>" * 1000, b"</html>" * 1000]
    fake_ollama.script("/api/chat", Reply(page, status=307, headers={"Location": "/b"}))
    fake_ollama.script("/b", Reply([line("hi", done=True)]))
    client = client_of(fake_ollama.url, way, nothing)
    assert isinstance(await outcome(client, streaming=streaming), ChatResponse)
    assert [request.path for request in fake_ollama.requests] == ["/api/chat", "/b"]
    assert len(fake_ollama.connections) == 1
    await closed(client)
