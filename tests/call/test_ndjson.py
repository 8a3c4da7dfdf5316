from __future__ import annotations

import itertools

import pytest

from ollama_async import ProtocolError
from ollama_async._call.ndjson import MAX_LINE_BYTES, LineSplitter

BODIES = {
    "nothing": (b"", []),
    "one line": (b'{"a":1}\n', [b'{"a":1}']),
    "two lines": (b'{"a":1}\n{"b":2}\n', [b'{"a":1}', b'{"b":2}']),
    "no line end at the end": (b'{"a":1}\n{"b":2}', [b'{"a":1}', b'{"b":2}']),
    "one line without line end": (b'{"a":1}', [b'{"a":1}']),
    "blank lines": (b'\n\n{"a":1}\n\n \t\n{"b":2}\n\n', [b'{"a":1}', b'{"b":2}']),
    "only blank lines": (b"\n \n\r\n", []),
    "blank rest": (b'{"a":1}\n \r', [b'{"a":1}']),
    # The carriage return is white space to JSON: it may stay.
    "CRLF": (b'{"a":1}\r\n\r\n{"b":2}\r\n', [b'{"a":1}\r', b'{"b":2}\r']),
    "U+0085 and U+2028": (
        '{"a":"x\u0085y\u2028z\u2029"}\n{}\n'.encode(),
        ['{"a":"x\u0085y\u2028z\u2029"}'.encode(), b"{}"],
    ),
    "VT, FF, FS and a lone CR": (b'{"a":"\x0b\x0c\x1c\r"}\n{}\n', [b'{"a":"\x0b\x0c\x1c\r"}', b"{}"]),
    "characters of four bytes": ('{"a":"😀"}\n{"b":"é"}\n'.encode(), ['{"a":"😀"}'.encode(), '{"b":"é"}'.encode()]),
}

body = pytest.mark.parametrize(("data", "expected"), BODIES.values(), ids=BODIES)


def split(*blocks: bytes, limit: int = MAX_LINE_BYTES) -> list[bytes]:
    splitter = LineSplitter(limit)
    lines = [line for block in blocks for line in splitter.feed_data(block)]
    rest = splitter.flush()
    return [*lines, rest] if rest else lines


@body
def test_a_whole_body_is_cut_into_its_lines(data: bytes, expected: list[bytes]) -> None:
    assert split(data) == expected


@body
def test_it_does_not_matter_where_a_block_ends(data: bytes, expected: list[bytes]) -> None:
    for at in range(len(data) + 1):
        assert split(data[:at], data[at:]) == expected, at


@body
def test_it_does_not_matter_where_three_blocks_end(data: bytes, expected: list[bytes]) -> None:
    for first, second in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        assert split(data[:first], data[first:second], data[second:]) == expected, (first, second)


@body
def test_blocks_of_one_byte(data: bytes, expected: list[bytes]) -> None:
    assert split(*(data[at : at + 1] for at in range(len(data)))) == expected


def test_lines_come_as_soon_as_they_are_whole() -> None:
    splitter = LineSplitter()
    assert splitter.feed_data(b"one\ntw") == [b"one"]
    assert splitter.feed_data(b"") == []
    assert splitter.feed_data(b"o\nthree\n") == [b"two", b"three"]
    assert splitter.flush() == b""


def test_flush_returns_the_rest_once_and_the_splitter_can_go_on() -> None:
    splitter = LineSplitter()
    splitter.feed_data(b"re")
    splitter.feed_data(b"st")
    assert splitter.flush() == b"rest"
    assert splitter.flush() == b""
    assert splitter.feed_data(b"new\n") == [b"new"]


LIMIT = 8
AT = b"12345678"


@pytest.mark.parametrize(
    "blocks",
    [
        [AT + b"\n"],
        [AT, b"\n"],
        [AT],
        [b"1\n" + AT + b"\n" + AT],
        [AT + b"\n"] * 3,
        [b"1234", b"5678\n1234", b"5678\n"],
        [b"1234", b"5678\n12345", b"678\n1"],
        [b"\n" * 100],
    ],
)
def test_a_line_as_long_as_the_limit_passes(blocks: list[bytes]) -> None:
    assert all(len(line) <= LIMIT for line in split(*blocks, limit=LIMIT))
    assert sum(map(len, split(*blocks, limit=LIMIT))) == len(b"".join(blocks).replace(b"\n", b""))


@pytest.mark.parametrize(
    "blocks",
    [
        [AT + b"9\n"],
        [AT, b"9"],
        [AT, b"9\n"],
        [AT + b"9"],
        [b"1\n" + AT + b"9\n"],
        [b"1\n" + AT + b"9"],
        [b"1234", b"56789\n"],
        [AT + b"\n" + AT, b"9"],
        [bytes([byte]) for byte in AT + b"9"],
    ],
)
def test_a_line_of_one_byte_more_is_refused_whether_it_has_ended_or_not(blocks: list[bytes]) -> None:
    splitter = LineSplitter(LIMIT)
    for block in blocks:
        assert splitter.failure is None
        splitter.feed_data(block)
    assert isinstance(splitter.failure, ProtocolError)
    assert "a line of more than 8 bytes" in str(splitter.failure)


def test_a_long_line_in_small_blocks_costs_no_more_than_its_length() -> None:
    """Joining at each block would copy 16 GB here; it takes minutes then."""
    splitter = LineSplitter()
    block = b"x" * 1024
    for _ in range(MAX_LINE_BYTES // 1024):
        assert splitter.feed_data(block) == []
    assert splitter.feed_data(b"\n") == [block * (MAX_LINE_BYTES // 1024)]
