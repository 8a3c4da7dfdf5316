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
from hypothesis import example, given, settings
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
from ollama_async._merge import ChatMerge, GenerateMerge, Merge
from ollama_async._stream import _parse_together
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
lines_of_pieces = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b"".join), min_size=1, max_size=6)
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


@pytest.mark.parametrize("merge", [ChatMerge(), GenerateMerge()], ids=["chat", "generate"])
@given(lines=lines_of_pieces | torn | st.lists(st.binary(min_size=1).map(lambda b: b.replace(b"\n", b"")), min_size=1))
@example(lines=[PIECES[0] + b',{"message":{"role":"assistant","content":"x"}', b'"done":false}'])
@example(lines=[b'{"message":{"role":"assistant","content":"x', b'{"}}', PIECES[0] + b"," + PIECES[0]])
@example(lines=[PIECES[3] + PIECES[4], PIECES[4] + b"]}}", PIECES[0] + b"," + PIECES[0]])
@example(lines=[b'{"a":[{"c":1}', b'{"d":2}]}', PIECES[0] + b"," + PIECES[0]])
@example(lines=[PIECES[0], b" " + PIECES[0], PIECES[0] + b"\r"])
@settings(max_examples=300, deadline=None, derandomize=True)
def test_made_together_they_are_what_they_are_alone(merge: Merge[Any], lines: list[bytes]) -> None:
    together = _parse_together(merge, lines)
    assert 0 <= len(together) <= len(lines)
    validate = merge.model.__pydantic_validator__.validate_json
    for line, chunk in zip(lines, together, strict=False):
        assert chunk == validate(line)
        assert chunk.model_fields_set == validate(line).model_fields_set
        assert b'"error"' not in line


def test_usual_lines_are_made_together() -> None:
    lines = [json.dumps(frame).encode() for frame in [*TEN, DONE]]
    assert len(_parse_together(ChatMerge(), lines)) == 11
    # Up to one with a list in it, of which the bytes do not tell whether it is whole.
    lines[5] = json.dumps(part("a [b]")).encode()
    assert len(_parse_together(ChatMerge(), lines)) == 5
    assert len(_parse_together(ChatMerge(), lines[6:])) == 5


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
