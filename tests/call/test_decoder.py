"""The decoder of NDJSON alone: lines in, chunks out, and what is left."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from ollama_async import ProtocolError
from ollama_async._call.chunk import Validators
from ollama_async._call.decoder import ErrorFrame, NdjsonDecoder


class Word(BaseModel):
    n: int
    done: bool = False


VALIDATORS: Validators[Any] = Validators.of(Word)


def decoder(*lines: bytes, batch_size: int = 64) -> NdjsonDecoder[Any]:
    made: NdjsonDecoder[Any] = NdjsonDecoder(VALIDATORS, batch_size, 1000)
    # As a stream does: the next one last.
    made.lines = [*reversed(lines)]
    return made


def line(n: int, **fields: Any) -> bytes:
    return Word(n=n, **fields).model_dump_json().encode()


def numbers(chunks: list[Any]) -> list[int]:
    return [chunk.n for chunk in chunks]


class Counted:
    """Counts how often chunks are made together, and how often alone."""

    def __init__(self) -> None:
        self.alone = self.together = 0
        self.whole = VALIDATORS.whole

    def one(self, data: bytes) -> Any:
        self.alone += 1
        return VALIDATORS.one(data)

    def many(self, data: bytes) -> list[Any]:
        self.together += 1
        return VALIDATORS.many(data)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_lines_are_decoded_up_to_the_batch_size_in_order(count: int, batch_size: int) -> None:
    lines = [line(n) for n in range(count)]
    made = decoder(*lines, batch_size=batch_size)
    counted = made._validators = Counted()  # type: ignore[assignment]
    chunks, left, plain = made.decode(alone=False)
    taken = min(count, batch_size)
    assert numbers(chunks) == [*range(taken)]
    assert left == [*reversed(lines[taken:])]
    assert plain == taken
    assert (counted.together, counted.alone) == ((1, 0) if taken > 1 else (0, 1))
    # The lines are taken by whoever asks.
    assert made.lines == [*reversed(lines)]


def test_a_new_decoder_has_nothing() -> None:
    made: NdjsonDecoder[Any] = NdjsonDecoder(VALIDATORS, 64, 1000)
    assert (made.lines, made.eof, made.failure) == ([], False, None)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 64), (2, 1), (1, 1)])
def test_what_is_alone_anyway_is_not_tried_as_a_batch(count: int, batch_size: int) -> None:
    """It would be one call more for each token of a slow model."""

    class Tried(NdjsonDecoder[Any]):
        def _decode_batch(self, lines: list[bytes]) -> list[Any]:
            pytest.fail("tried")

    made = Tried(VALIDATORS, batch_size, 1000)
    made.lines = [line(n) for n in reversed(range(count))]
    assert numbers(made.decode(alone=False)[0]) == [0]


def test_a_chunk_that_has_to_be_alone_is_alone() -> None:
    chunks, left, plain = decoder(line(1), line(2), line(3)).decode(alone=True)
    assert (numbers(chunks), left, plain) == ([1], [line(3), line(2)], 1)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nothing_follows_the_last_chunk(place: int, alone: bool) -> None:
    lines = [line(n, done=n >= place) for n in range(5)]
    made = decoder(*lines)
    if alone and place:
        assert made.decode(alone=True) == ([Word(n=0)], [*reversed(lines[1:])], 1)
        return
    chunks, left, plain = made.decode(alone=alone)
    assert (numbers(chunks), left, plain) == ([*range(place + 1)], [], place)


def test_lines_up_to_one_with_a_list_or_an_error_are_decoded_together() -> None:
    for odd in (b'{"n":3,"x":[1]}', b'{"n":3,"error":null}'):
        for place in range(5):
            lines = [line(n) for n in range(5)]
            lines[place] = odd
            made = decoder(*lines)
            counted = made._validators = Counted()  # type: ignore[assignment]
            chunks, left, plain = made.decode(alone=False)
            taken = max(1, place)
            assert len(chunks) == plain == taken, (odd, place)
            assert left == [*reversed(lines[taken:])]
            assert (counted.together, counted.alone) == ((1, 0) if place > 1 else (0, 1))


@pytest.mark.parametrize(
    "lines",
    [
        # Each is no JSON; joined by a comma they are one, and in brackets a list of two.
        (b'{"n":1', b'"done":false}', b'{"n":2}'),
        (b'{"n":1},{"n":2}', b'{"n":3}'),
        (b' {"n":1', b'"done":false}'),
        # Two elements in two lines, cut in the wrong place.
        (b'{"n":1},{"n":2', b'"done":false}'),
    ],
)
def test_lines_that_are_only_valid_together_are_refused(lines: tuple[bytes, ...]) -> None:
    with pytest.raises(ProtocolError, match="not NDJSON"):
        decoder(*lines).decode(alone=False)


def test_what_is_wrong_in_a_later_line_leaves_the_first_ones() -> None:
    made = decoder(line(1), b'{"n":"x"}', line(3))
    chunks, left, _ = made.decode(alone=False)
    assert (numbers(chunks), left) == ([1], [line(3), b'{"n":"x"}'])


def test_two_chunks_in_one_line_are_not_taken_for_two_lines() -> None:
    made = decoder(line(1), line(2) + b"," + line(3), line(4))
    chunks, left, _ = made.decode(alone=False)
    assert numbers(chunks) == [1]
    assert len(left) == 2


# -- errors --


@pytest.mark.parametrize("frame", [b'{"error":"no"}', b'{"error":{"message":"no"},"n":1}', b'{"error":""}'])
def test_an_error_frame_is_raised_with_what_it_says(frame: bytes) -> None:
    with pytest.raises(ErrorFrame, match="error frame") as caught:
        decoder(frame).decode(alone=True)
    assert "error" in caught.value.frame


@pytest.mark.parametrize("frame", [b'{"n":1,"error":null}', b'{"n":1,"x":{"error":"no"}}'])
def test_a_chunk_with_an_error_that_is_none_is_a_chunk(frame: bytes) -> None:
    assert decoder(frame).decode(alone=True)[0] == [Word(n=1)]


def refused(given: bytes, *, eof: bool = False) -> str:
    made = decoder(given)
    made.eof = eof
    with pytest.raises(ProtocolError) as caught:
        made.decode(alone=True)
    assert caught.value.__cause__ is not None
    return str(caught.value)


def test_an_error_says_what_is_wrong_with_a_line() -> None:
    assert refused(b"<html>") == "the server's answer is not NDJSON, it has the line '<html>'"
    assert refused(b'{"n":', eof=True) == "the server's answer ends in the middle of a line: '{\"n\":'"
    deep = b"[" * 100_000
    assert refused(deep) == f"the server's answer is not NDJSON, it has the line '{'[' * 80}'..."
    misfit = "the server's answer has a line that is not a chunk of an answer: "
    assert refused(b'{"n":"x"}').startswith(f"{misfit}n: expected a valid integer")
    # Also at the end: it is JSON.
    assert refused(b'{"n":"x"}', eof=True).startswith(f"{misfit}n: expected a valid integer")


@pytest.mark.parametrize(("length", "more"), [(79, ""), (80, ""), (81, "...")])
def test_an_error_shows_eighty_bytes_of_a_line(length: int, more: str) -> None:
    assert refused(b"x" * length).endswith(f"the line '{'x' * min(80, length)}'{more}")


def test_a_line_that_another_check_accepts_is_shown() -> None:
    made = decoder(b'{"n":"x"}')
    made._validators = Validators(Word.__pydantic_core_schema__, whole=lambda _: None)
    with pytest.raises(ProtocolError, match=r"not a chunk of an answer: '\{\"n\":\"x\"\}'$"):
        made.decode(alone=True)


# -- the end, and another body --


def test_the_end_completes_the_last_line() -> None:
    made = decoder()
    assert made.lines == []
    assert not made.eof
    assert made.feed_data(b'{"n":1}\n{"n":') == [b'{"n":1}']
    assert made.feed_data(b"2}") == []
    assert made.feed_eof() == [b'{"n":2}']
    assert made.eof
    assert made.feed_eof() == []


def test_another_body_begins_anew() -> None:
    made = decoder(line(1))
    made.feed_data(b'{"n":')
    made.feed_eof()
    made.feed_data(b"half")
    made.feed_data(b"x" * 1001 + b"\n")
    assert made.failure is not None
    made.restart()
    assert (made.failure, made.eof, made.lines) == (None, False, [])
    assert made.feed_data(line(2) + b"\n") == [line(2)]
    assert made.feed_eof() == []


def test_what_a_body_left_is_not_put_before_the_next_one() -> None:
    made = decoder()
    made.feed_data(b"half")
    made.restart()
    assert made.feed_data(line(2) + b"\n") == [line(2)]
