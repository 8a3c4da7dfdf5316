"""Lines that arrive together become chunks together: nothing but the speed may tell them from lines that come alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from teardown.harness import BOUND, nothing_left_behind, saw_leave, until

from ollama_async import (
    AbortError,
    AsyncClient,
    ChatResponse,
    ProtocolError,
    Stream,
    StreamBusy,
    StreamClosed,
    StreamError,
)
from ollama_async._call.chunk import Merge
from ollama_async._call.decoder import NdjsonDecoder
from ollama_async._call.ndjson import MAX_LINE_BYTES
from ollama_async._model.merge import ChatMerge, GenerateMerge
from ollama_async.testing import Block, FakeOllama, Reply, Stall


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": False, **fields}


DONE = part("", done=True, done_reason="stop")
WORDS = [f"w{n} " for n in range(10)]
TEN = [part(word) for word in WORDS]


# -- the bytes --

PIECES = [
    b'{"model":"m","message":{"role":"assistant","content":"a"},"done":false}',
    b'{"model":"m","response":"a","done":true,"context":[1,2]}',
    b'{"message":{"role":"assistant","content":"[b]"}}',
    b'{"message":{"role":"assistant","content":"x","tool_calls":[',
    b'{"function":{"name":"f","arguments":{"a":[1]}}}',
    b'{"error":"no"}',
    b'{"message":{"content":"',
    b'"role":"assistant"',
    b'"done":false',
    *(bytes([byte]) for byte in b'{}[],:"\\ \r\t0n'),
    b"null",
    b'"a"',
    b"\xc3",
    b"\xa4",
    b"\x00",
    b"1e999",
    b"NaN",
]
lines_of_pieces = st.lists(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b"".join), min_size=1, max_size=6
)
torn = st.builds(
    lambda text, cuts: [line for line in _cut(text, cuts) if line and not line.isspace()],
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b",".join),
    st.lists(st.integers(0, 400), max_size=5),
)


def _cut(text: bytes, cuts: list[int]) -> list[bytes]:
    """Cut at some commas, as if they had been the line ends: joined again, it is what it was."""
    commas = [at for at, byte in enumerate(text) if byte == ord(",")]
    places = sorted({commas[cut % len(commas)] for cut in cuts}) if commas else []
    return [text[start:end] for start, end in zip([0, *(at + 1 for at in places)], [*places, len(text)], strict=True)]


def decode_batch(merge: Merge[Any], lines: list[bytes]) -> list[Any]:
    """Make chunks of as many of the first lines as can be decoded together."""
    return NdjsonDecoder(merge.validators, len(lines), MAX_LINE_BYTES)._decode_batch(lines)


@pytest.mark.parametrize("merge", [ChatMerge(), GenerateMerge()], ids=["chat", "generate"])
@given(lines=lines_of_pieces | torn | st.lists(st.binary(min_size=1).map(lambda b: b.replace(b"\n", b"")), min_size=1))
@example(lines=[PIECES[0] + b',{"message":{"role":"assistant","content":"x"}', b'"done":false}'])
@example(lines=[b'{"message":{"role":"assistant","content":"x', b'{"}}', PIECES[0] + b"," + PIECES[0]])
@example(lines=[PIECES[3] + PIECES[4], PIECES[4] + b"]}}", PIECES[0] + b"," + PIECES[0]])
@example(lines=[b'{"a":[{"c":1}', b'{"d":2}]}', PIECES[0] + b"," + PIECES[0]])
@example(lines=[PIECES[0], b" " + PIECES[0], PIECES[0] + b"\r"])
def test_made_together_they_are_what_they_are_alone(merge: Merge[Any], lines: list[bytes]) -> None:
    together = decode_batch(merge, lines)
    assert 0 <= len(together) <= len(lines)
    validate = merge.model.__pydantic_validator__.validate_json
    for line, chunk in zip(lines, together, strict=False):
        assert chunk == validate(line)
        assert chunk.model_fields_set == validate(line).model_fields_set
        assert b'"error"' not in line


def test_usual_lines_are_made_together() -> None:
    lines = [json.dumps(frame).encode() for frame in [*TEN, DONE]]
    assert len(decode_batch(ChatMerge(), lines)) == 11
    # Up to one with a list in it, of which the bytes do not tell whether it is whole.
    lines[5] = json.dumps(part("a [b]")).encode()
    assert len(decode_batch(ChatMerge(), lines)) == 5
    assert len(decode_batch(ChatMerge(), lines[6:])) == 5


HOSTILE: dict[str, list[bytes]] = {
    "an object over two lines": [PIECES[0] + b',{"message":{"role":"assistant","content":"x"}', b'"done":false}'],
    "a list over two lines": [PIECES[3] + PIECES[4], PIECES[4] + b"]}}", PIECES[0] + b"," + PIECES[0]],
    "a string over two lines": [b'{"message":{"role":"assistant","content":"x', b'{"}}', PIECES[0] + b"," + PIECES[0]],
}


@pytest.mark.parametrize("lines", HOSTILE.values(), ids=HOSTILE)
async def test_what_is_whole_only_together_is_broken(fake_ollama: FakeOllama, lines: list[bytes]) -> None:
    fake_ollama.script("/api/chat", Reply([Block(TEN[0], *(line + b"\n" for line in lines), DONE)]))
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("fake", "hi", stream=True)
        assert (await anext(stream)).message.content == "w0 "
        with pytest.raises(ProtocolError):
            await anext(stream)


# -- the contract, in the middle of them --


@pytest.fixture(params=["together", "alone"], autouse=True)
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The same has to come out when no lines are made together."""
    if request.param == "alone":
        monkeypatch.setattr(ChatMerge, "batch_size", 1)
    return bool(request.param == "together")


async def arrived(server: FakeOllama, client: AsyncClient, *frames: Any, **options: Any) -> Stream[ChatResponse]:
    """A stream of which these lines have arrived, in one block, and none is read."""
    server.script("/api/chat", Reply([Block(*frames), Stall()]))
    stream = client.chat("fake", "hi", stream=True, **options)
    await stream
    exchange = stream._reader.call.exchange
    assert exchange is not None
    await until(lambda: b"".join(exchange.reader._blocks).count(b"\n") == len(frames), "the lines to arrive")
    return stream


async def read(stream: Stream[ChatResponse], count: int) -> list[str]:
    return [(await anext(stream)).message.content or "" for _ in range(count)]


def by_signal(stop: Callable[[], Any]) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def by_thread(stop: Callable[[], Any]) -> None:
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()


@pytest.mark.parametrize("how", [lambda stop: stop(), by_thread, by_signal], ids=["loop", "thread", "signal"])
@pytest.mark.parametrize("read_before", [0, 1, 5, 9, 10])
async def test_abort_between_two_of_them(fake_ollama: FakeOllama, read_before: int, how: Callable[..., None]) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        assert await read(stream, read_before) == WORDS[:read_before]
        assert stream.text == "".join(WORDS[:read_before])
        how(lambda: stream.abort("stop"))
        saw_leave(fake_ollama)
        for _ in range(2):
            with pytest.raises(AbortError) as caught:
                await anext(stream)
            assert caught.value.reason == "stop"
            assert caught.value.partial.message.content == stream.text == "".join(WORDS)
        assert (stream.outcome, stream.timing.chunks) == ("aborted", read_before)
        del caught


@pytest.mark.parametrize("read_before", [1, 9])
async def test_abort_inside_the_loop_that_reads_them(fake_ollama: FakeOllama, read_before: int) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        seen = []
        with pytest.raises(AbortError):
            async for chunk in stream:
                seen.append(chunk.message.content)
                if len(seen) == read_before:
                    stream.abort("enough")
        assert seen == WORDS[:read_before]
        assert stream.text == "".join(WORDS)


async def test_cancelled_between_two_of_them(fake_ollama: FakeOllama) -> None:
    seen: list[Any] = []

    async def reader(stream: Stream[ChatResponse]) -> None:
        async for chunk in stream:
            seen.append(chunk.message.content)
            if len(seen) == 4:
                await asyncio.Event().wait()

    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        task = asyncio.create_task(reader(stream))
        await until(lambda: len(seen) == 4, "the fourth")
        task.cancel()
        await asyncio.wait([task], timeout=BOUND)
        assert task.cancelled()
        saw_leave(fake_ollama)
        assert (stream.outcome, stream.text, stream.timing.chunks) == ("closed", "".join(WORDS), 4)


async def test_left_in_the_middle_and_asked_for_more(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        async for chunk in stream:
            if chunk.message.content == WORDS[3]:
                break
        saw_leave(fake_ollama)
        for _ in range(2):
            with pytest.raises(StreamClosed) as caught:
                await anext(stream)
            assert caught.value.partial.message.content == "".join(WORDS)
        assert (stream.outcome, stream.text, stream.timing.chunks) == ("closed", "".join(WORDS), 4)


async def test_two_readers_take_turns_while_something_is_there_and_one_is_refused_when_one_waits(
    fake_ollama: FakeOllama,
) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        assert [*await read(stream, 6), *await asyncio.create_task(read(stream, 4))] == WORDS
        waiting = asyncio.create_task(read(stream, 1))
        await asyncio.sleep(0)
        with pytest.raises(StreamBusy):
            await anext(stream)
        assert not waiting.done()
        stream.abort()
        with pytest.raises(AbortError):
            await asyncio.wait_for(waiting, BOUND)


async def test_until_has_enough_in_the_middle(fake_ollama: FakeOllama) -> None:
    asked: list[str] = []

    def until_four(answer: ChatResponse) -> bool:
        asked.append(answer.message.content or "")
        return len(asked) == 4

    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN, until=until_four)
        assert [chunk.message.content async for chunk in stream] == WORDS[:4]
        assert asked == list(itertools.accumulate(WORDS[:4]))
        saw_leave(fake_ollama)
        assert (stream.outcome, stream.text, stream.timing.chunks) == ("until", "".join(WORDS[:4]), 4)
        assert not stream.abort()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_until_aborts_in_the_middle(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(
            fake_ollama, client, *TEN, until=lambda answer: answer.message.content == "w0 w1 " and stream.abort("me")
        )
        assert await read(stream, 1) == WORDS[:1]
        with pytest.raises(AbortError) as caught:
            await anext(stream)
        assert (caught.value.reason, caught.value.partial.message.content) == ("me", "".join(WORDS))


AFTER: dict[str, list[Any]] = {
    "nothing": [],
    "more": TEN[5:],
    "an error": [{"error": "late"}],
    "nonsense": [b"nonsense\n"],
    "half a line": [b"\n{"],
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
async def test_done_in_the_middle(fake_ollama: FakeOllama, after: list[Any]) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN[:5], DONE, *after)
        assert await read(stream, 5) == WORDS[:5]
        assert stream.outcome is None
        assert (await anext(stream)).done
        assert (stream.outcome, stream.text, stream.timing.chunks) == ("done", "".join(WORDS[:5]), 6)
        assert not stream.abort("late")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.outcome == "done"


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
async def test_abort_before_done_in_the_middle_keeps_what_is_the_answers(
    fake_ollama: FakeOllama, after: list[Any]
) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN[:5], DONE, *after)
        assert await read(stream, 2) == WORDS[:2]
        assert stream.abort("stop")
        with pytest.raises(AbortError) as caught:
            await anext(stream)
        assert caught.value.partial.message.content == "".join(WORDS[:5])
        assert caught.value.partial.done


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        ({"error": "out of memory"}, StreamError),
        (b"nonsense\n", ProtocolError),
        (b"[]\n", ProtocolError),
        (b'{"message": 1}\n', ProtocolError),
    ],
    ids=["error frame", "nonsense", "another JSON", "no chunk"],
)
@pytest.mark.parametrize("place", [1, 5, 9])
async def test_something_broken_in_the_middle(
    fake_ollama: FakeOllama, broken: Any, kind: type[Exception], place: int
) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN[:place], broken, *TEN[place:])
        assert await read(stream, place) == WORDS[:place]
        assert stream.outcome is None
        for _ in range(2):
            with pytest.raises(kind) as caught:
                await anext(stream)
            assert caught.value.partial.message.content == "".join(WORDS[:place])  # type: ignore[attr-defined]
            del caught
        saw_leave(fake_ollama)
        assert (stream.outcome, stream.timing.chunks) == ("error", place)
        assert not stream.abort()


async def test_an_abort_before_something_broken_is_reached_is_an_abort(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN[:5], {"error": "no"}, *TEN[5:])
        await read(stream, 2)
        assert stream.abort("stop")
        with pytest.raises(AbortError) as caught:
            await anext(stream)
        assert caught.value.partial.message.content == "".join(WORDS[:5])


async def test_what_is_asked_at_each_chunk_is_what_has_been_delivered(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = await arrived(fake_ollama, client, *TEN)
        for count in range(1, 11):
            await read(stream, 1)
            answer = stream.response
            assert answer is not None
            assert answer.message.content == stream.text == "".join(WORDS[:count])
            assert stream.timing.chunks == count
            assert stream.outcome is None
        await stream.aclose()


async def test_a_signal_handler_may_look_at_the_text_while_a_chunk_is_merged(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    add = ChatMerge.add

    def interrupted(merge: ChatMerge, chunk: ChatResponse) -> None:
        by_signal(lambda: looked.append(stream.text))
        add(merge, chunk)
        by_signal(lambda: looked.append(stream.text))

    async with AsyncClient(fake_ollama.url) as client:
        # Before there is a stream, which looks it up once.
        monkeypatch.setattr(ChatMerge, "add", interrupted)
        stream = await arrived(fake_ollama, client, *TEN)
        for count in range(1, 11):
            assert await read(stream, 1) == [WORDS[count - 1]]
            assert stream.text == "".join(WORDS[:count])
        assert set(looked) == {"".join(WORDS[:count]) for count in range(11)}
        stream.abort()
        assert stream.text == "".join(WORDS)


async def test_a_chunk_that_an_interrupt_kept_from_being_merged_waits_again(
    fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    add = ChatMerge.add

    def interrupted(merge: ChatMerge, chunk: ChatResponse) -> None:
        added.append(chunk.message.content or "")
        if len(added) == 4:
            raise KeyboardInterrupt
        add(merge, chunk)

    async with AsyncClient(fake_ollama.url) as client:
        monkeypatch.setattr(ChatMerge, "add", interrupted)
        stream = await arrived(fake_ollama, client, *TEN)
        with pytest.raises(KeyboardInterrupt):
            await stream.collect()
        assert added[:4] == WORDS[:4]
        assert stream.text == "".join(WORDS)
    saw_leave(fake_ollama)


async def test_another_thread_may_look_at_the_text_at_any_moment(fake_ollama: FakeOllama) -> None:
    frames = [part(f"w{n} ") for n in range(3000)]
    texts: list[str] = []
    over = threading.Event()
    fake_ollama.script("/api/chat", Reply([Block(*frames[at : at + 50]) for at in range(0, 3000, 50)] + [DONE]))
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        async with AsyncClient(fake_ollama.url) as client:
            stream = client.chat("fake", "hi", stream=True)

            def look() -> None:
                while not over.is_set():
                    texts.append(stream.text)
                    del texts[:-50]

            thread = threading.Thread(target=look)
            thread.start()
            try:
                async for _ in stream:
                    stream.text
            finally:
                over.set()
                thread.join()
    finally:
        sys.setswitchinterval(switch)
    whole = "".join(f"w{n} " for n in range(3000))
    assert stream.text == whole
    assert all(whole.startswith(text) for text in texts)
