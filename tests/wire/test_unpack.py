"""Answers that come packed where the caller allows it: read as they come, in bounded memory, or refused."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from teardown.harness import BOUND, nothing_left_behind

from ollama_async import AsyncClient, NotFoundError, ProtocolError
from ollama_async._wire import unpack
from ollama_async._wire.parser import Head
from ollama_async._wire.unpack import Unpacker, encoding_of, encodings_asked_for
from ollama_async.testing import FakeOllama, Gate, Reply, Stall

ALLOWED = {"Accept-Encoding": "gzip, deflate"}


def line(text: str, *, done: bool = False) -> bytes:
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": done}).encode() + b"\n"


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate_without_a_header": ("deflate", raw_deflate),
    "gzip_in_two_parts": ("gzip", lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:])),
}


# -- bytes alone --


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("identity", set()),
        ("", set()),
        ("gzip", {"gzip"}),
        ("X-GZIP", {"gzip"}),
        ("br, gzip;q=0.5 , deflate; q=1", {"gzip", "deflate"}),
        ("gzip;q=0, deflate;q=0.0", set()),
        ("*", {"gzip", "deflate"}),
        ("zstd", set()),
    ],
)
def test_what_a_header_allows(header: str, allowed: set[str]) -> None:
    assert encodings_asked_for(header) == allowed


def test_how_a_body_is_packed() -> None:
    assert encoding_of(Head(200, b"OK", [(b"X", b"gzip")])) is None
    assert encoding_of(Head(200, b"OK", [(b"content-encoding", b" Identity ")])) is None
    assert encoding_of(Head(200, b"OK", [(b"Content-Encoding", b"X-Gzip")])) == "gzip"
    assert encoding_of(Head(200, b"OK", [(b"Content-Encoding", b"gzip, gzip")])) == "gzip, gzip"


@pytest.mark.parametrize("how", PACKERS)
@given(data=st.binary(max_size=300), cut=st.integers(1, 50))
def test_cuts_do_not_matter(how: str, data: bytes, cut: int) -> None:
    name, pack = PACKERS[how]
    packed = pack(data)
    unpacker = Unpacker(name.removeprefix("x-"))
    assert unpacker.whole
    got = b"".join(unpacker.feed(packed[at : at + cut]) for at in range(0, len(packed), cut))
    assert (got, unpacker.whole) == (data, True)


@pytest.mark.parametrize("how", ["gzip", "deflate", "deflate_without_a_header"])
def test_a_beginning_is_not_the_whole(how: str) -> None:
    name, pack = PACKERS[how]
    packed = pack(b"some text")
    for size in range(1, len(packed)):
        unpacker = Unpacker(name)
        unpacker.feed(packed[:size])
        assert not unpacker.whole


@pytest.mark.parametrize(("encoding", "data"), [("gzip", b"plain text"), ("deflate", b"\xff\xff\xff")])
def test_what_is_not_packed_is_refused(encoding: str, data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"not valid {encoding}"):
        Unpacker(encoding).feed(data)


def test_nothing_follows_the_end_of_deflate() -> None:
    with pytest.raises(ProtocolError, match="has data after the end"):
        Unpacker("deflate").feed(zlib.compress(b"a") + b"b")


@pytest.mark.parametrize("parts", [1, 40])
def test_a_block_unpacks_to_a_limit(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(unpack, "MAX_UNPACKED", 1000)
    assert len(Unpacker("gzip").feed(gzip.compress(bytes(999)))) == 999
    with pytest.raises(ProtocolError, match="more than 1,000 bytes"):
        Unpacker("gzip").feed(gzip.compress(bytes(1200 // parts)) * parts)


# -- over a connection --


@pytest_asyncio.fixture(params=["direct", "foreign"])
async def client(fake_ollama: FakeOllama, request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    transport = httpx.AsyncHTTPTransport() if request.param == "foreign" else None
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, headers=ALLOWED, transport=transport) as made:
        yield made


def packed_reply(data: bytes, how: str = "gzip", **options: Any) -> Reply:
    name, pack = PACKERS[how]
    return Reply([pack(data)], headers={"Content-Encoding": name}, **options)


@pytest.mark.parametrize("how", PACKERS)
async def test_a_packed_answer_is_read(fake_ollama: FakeOllama, client: AsyncClient, how: str) -> None:
    fake_ollama.script("/api/chat", packed_reply(line("one", done=True), how), always=True)
    assert (await client.chat("m", "hi")).message.content == "one"
    assert (await client.chat("m", "hi", stream=True).collect()).message.content == "one"
    assert fake_ollama.requests[0].header("accept-encoding") == "gzip, deflate"


async def test_a_packed_stream_is_read_as_it_comes(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    packer, gate = zlib.compressobj(wbits=31), Gate()
    first = packer.compress(line("one ")) + packer.flush(zlib.Z_SYNC_FLUSH)
    last = packer.compress(line("two", done=True)) + packer.flush()
    fake_ollama.script("/api/chat", Reply([first, gate, last], headers={"Content-Encoding": "gzip"}))
    stream = client.chat("m", "hi", stream=True)
    assert (await asyncio.wait_for(anext(stream), BOUND)).message.content == "one "
    gate.open()
    assert (await stream.collect()).message.content == "one two"
    assert stream.outcome == "done"


async def test_a_connection_is_used_again_after_a_packed_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", packed_reply(line("one", done=True)), always=True)
    async with AsyncClient(fake_ollama.url, headers=ALLOWED) as client:
        for _ in range(3):
            await client.chat("m", "hi")
            await client.chat("m", "hi", stream=True).collect()
    assert len(fake_ollama.connections) == 1


async def test_a_call_may_allow_it_or_not(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", packed_reply(line("one", done=True)), always=True)
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ProtocolError, match="not asked for"):
            await client.chat("m", "hi")
        assert (await client.chat("m", "hi", headers={"accept-encoding": "gzip"})).message.content == "one"
        with pytest.raises(ProtocolError, match="not asked for"):
            await client.chat("m", "hi", headers={"Accept-Encoding": "br"})
    async with AsyncClient(fake_ollama.url, headers=ALLOWED) as client:
        with pytest.raises(ProtocolError, match="not asked for"):
            await client.chat("m", "hi", headers={"Accept-Encoding": "identity"})


async def test_a_packed_error_is_that_error(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    fake_ollama.script("/api/chat", packed_reply(b'{"error":"no such model"}', status=404))
    with pytest.raises(NotFoundError, match="no such model"):
        await client.chat("m", "hi")


@pytest.mark.parametrize("stalls", [False, True], ids=["ends", "goes on"])
async def test_a_packed_answer_that_is_damaged(fake_ollama: FakeOllama, client: AsyncClient, stalls: bool) -> None:
    packer = zlib.compressobj(wbits=31)
    good = packer.compress(line("one ")) + packer.flush(zlib.Z_SYNC_FLUSH)
    gate = Gate()
    steps = [good, gate, b"\xff" * 50, *([Stall()] if stalls else [])]
    fake_ollama.script("/api/chat", Reply(steps, headers={"Content-Encoding": "gzip"}))
    stream = client.chat("m", "hi", stream=True)
    await anext(stream)
    gate.open()
    with pytest.raises(ProtocolError, match="not valid gzip") as caught:
        await asyncio.wait_for(stream.collect(), BOUND)
    assert caught.value.partial.message.content == "one "
    assert fake_ollama.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
async def test_a_packed_answer_that_ends_early(fake_ollama: FakeOllama, client: AsyncClient, streaming: bool) -> None:
    cut = gzip.compress(line("one", done=not streaming))[:-9]
    fake_ollama.script("/api/chat", Reply([cut], headers={"Content-Encoding": "gzip"}))
    with pytest.raises(ProtocolError, match="in the middle of its compressed body"):
        call: Any = client.chat("m", "hi", stream=streaming)
        await asyncio.wait_for(call.collect() if streaming else call, BOUND)


@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
async def test_a_bomb_that_was_allowed_is_not_unpacked_to_its_end(
    fake_ollama: FakeOllama, client: AsyncClient, streaming: bool
) -> None:
    bomb = gzip.compress(b'{"model":"' + bytes(64 * 1024 * 1024))
    fake_ollama.script("/api/chat", Reply([bomb, Stall()], headers={"Content-Encoding": "gzip"}))
    # The limit of a line or that of a block, whichever is met first.
    with pytest.raises(ProtocolError, match="more than 16,777,216 bytes"):
        call: Any = client.chat("m", "hi", stream=streaming)
        await asyncio.wait_for(call.collect() if streaming else call, BOUND)
    assert fake_ollama.connections[0].wait_left(BOUND)


async def test_a_packed_answer_can_be_aborted(fake_ollama: FakeOllama, client: AsyncClient) -> None:
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(line("one ")) + packer.flush(zlib.Z_SYNC_FLUSH)
    fake_ollama.script("/api/chat", Reply([first, Stall()], headers={"Content-Encoding": "gzip"}))
    stream = client.chat("m", "hi", stream=True)
    await anext(stream)
    assert stream.abort("enough")
    assert fake_ollama.connections[0].wait_left(BOUND)
    assert (stream.outcome, stream.text) == ("aborted", "one ")
    await stream.aclose()


async def test_an_answer_of_a_mock_that_httpx_has_unpacked() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=gzip.compress(line("one", done=True)), headers={"Content-Encoding": "gzip"})

    async with AsyncClient("http://h", headers=ALLOWED, transport=httpx.MockTransport(answer)) as client:
        assert (await client.chat("m", "hi")).message.content == "one"
        assert (await client.chat("m", "hi", stream=True).collect()).message.content == "one"
