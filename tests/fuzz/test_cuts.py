"""The parser of answers and the decoder of lines, without a socket: whole, in pieces, and with more behind the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from call.test_ndjson import BODIES
from fuzz.targets import MAX_LINE_BYTES, parse_answer, split_lines
from wire.connection import POISON
from wire.test_transport import ANSWERS, BROKEN, CUT

# Those that do not end with the connection.
WITH_AN_END = [name for name, case in ANSWERS.items() if not case[2]]


def every_cut(data: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and in two at every place."""
    yield [data]
    yield [bytes([byte]) for byte in data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


@pytest.mark.parametrize(("method", "sent", "end", "status", "body", "headers", "kept"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_the_same_however_it_is_cut(
    method: str, sent: bytes, end: bool, status: int, body: bytes, headers: list[tuple[str, str]], kept: bool
) -> None:
    for pieces in every_cut(sent):
        read = parse_answer(method, pieces, closed=end)
        assert read.error is None, pieces
        assert read.head is not None
        assert read.head[0] == status
        assert [(name.decode().lower(), value.decode()) for name, value in read.head[2]] == headers
        assert (read.body, read.complete, read.kept) == (body, True, kept), pieces


@pytest.mark.parametrize("more", [b"\0", b"x", b"HTTP/1.1 2"], ids=repr)
@pytest.mark.parametrize("name", WITH_AN_END)
def test_bytes_behind_an_answer_are_not_a_part_of_it(name: str, more: bytes) -> None:
    followed(name, more)


@pytest.mark.parametrize("second", [POISON, b"HTTP/1.1 500 No\r\nX-A: 1\r\n\r\n"], ids=["answer", "error"])
@pytest.mark.parametrize("name", WITH_AN_END)
def test_a_second_answer_is_not_a_part_of_the_first(name: str, second: bytes) -> None:
    followed(name, second)


def followed(name: str, more: bytes) -> None:
    method, sent, *_ = ANSWERS[name]
    alone = parse_answer(method, [sent], closed=False)
    assert alone.complete
    for pieces in every_cut(sent + more):
        assert parse_answer(method, pieces, closed=True) == alone._replace(kept=False), pieces


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_refused_however_it_is_cut(sent: bytes) -> None:
    for pieces in [*every_cut(sent), *every_cut(sent + POISON)]:
        read = parse_answer("GET", pieces, closed=False)
        assert read.error, pieces
        assert (read.complete, read.kept) == (False, False)


@pytest.mark.parametrize("sent", CUT.values(), ids=CUT)
def test_half_an_answer_is_an_error_wherever_it_is_cut(sent: bytes) -> None:
    for pieces in every_cut(sent):
        assert not parse_answer("GET", pieces, closed=False).complete
        read = parse_answer("GET", pieces, closed=True)
        where = "before it answered" if read.head is None else "in the middle of its answer"
        assert read.error == f"the server closed the connection {where}"
        assert (read.complete, read.kept) == (False, False)


@pytest.mark.parametrize(("body", "lines"), BODIES.values(), ids=BODIES)
def test_a_body_has_the_same_lines_however_it_is_cut(body: bytes, lines: list[bytes]) -> None:
    for pieces in every_cut(body):
        assert split_lines(pieces, MAX_LINE_BYTES) == (lines, False), pieces


@pytest.mark.parametrize("more", [b"\n", b"\n{}", b"\n \n{}\n", b"\n\xff\n"], ids=repr)
@pytest.mark.parametrize(("body", "lines"), BODIES.values(), ids=BODIES)
def test_what_follows_a_body_is_further_lines(body: bytes, lines: list[bytes], more: bytes) -> None:
    further = [line for line in more.split(b"\n") if line.strip()]
    # A rest that is blank, or empty, is no line.
    for pieces in every_cut(body + more):
        assert split_lines(pieces, MAX_LINE_BYTES) == ([*lines, *further], False), pieces
