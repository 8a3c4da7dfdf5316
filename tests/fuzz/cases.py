"""What the fuzzing starts from: the cases of the other tests, and words that targets know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from call import test_batches, test_ndjson
from fuzz import tool_language
from model import test_bad_input
from wire import test_host, test_hostile, test_proxy, test_transport
from wire.connection import OK

__all__ = ["CASES", "WORDS"]


def _first_values(test: Any) -> Iterator[str]:
    """Take what a test is called with first, of all its parameters."""
    for mark in test.pytestmark:
        for values in mark.args[1]:
            first = values[0] if isinstance(values, tuple) else values
            if isinstance(first, str):
                yield first


def _answers() -> Iterator[bytes]:
    for method, sent, closed, *_ in test_transport.ANSWERS.values():
        yield bytes([(method == "HEAD") | closed << 1]) + sent
    sources = (test_transport.BROKEN, test_transport.CUT, test_hostile.SMUGGLED)
    for sent in [*(sent for source in sources for sent in source.values()), *test_hostile.ANSWERS]:
        for flags in range(4):
            yield bytes([flags]) + sent


def _blanks() -> Iterator[bytes]:
    for blank in (b" ", b"\t", b" \t "):
        yield b"\0" + OK + b"X-A:" + blank + b"a b" + blank + b"\r\nContent-Length: 0\r\n\r\n"


def _limits() -> Iterator[bytes]:
    """Answers with something long at each of their edges."""
    several = OK + b"X-A: a\r\nX-B: b\r\nContent-Length: 2\r\n\r\nhi"
    for answer in (*test_hostile.ANSWERS[1:3], several):
        for at in range(len(answer)):
            for filler in (b"\xff\xff", b"\xff\xff\xff"):
                yield b"\x00" + answer[:at] + filler + answer[at:]


def _bodies() -> Iterator[bytes]:
    for body, _ in test_ndjson.BODIES.values():
        for limit in (0, 7, 8, 9):
            yield bytes([limit]) + body
    for mark in test_ndjson.test_a_line_of_one_byte_more_is_refused_whether_it_has_ended_or_not.pytestmark:
        for blocks in mark.args[1]:
            yield bytes([test_ndjson.LIMIT]) + b"".join(blocks)


def _lines() -> Iterator[bytes]:
    whole = test_batches.PIECES[0]
    for lines in [*test_batches.HOSTILE.values(), [whole] * 3, [whole, b" " + whole, whole + b"\r"]]:
        yield b"\n".join(lines)
    done = whole.replace(b'"done":false', b'"done":true')
    for lines in [[whole + b"," + whole, whole], [whole, whole, done, whole], [whole, done, b"nonsense"]]:
        yield b"\n".join(lines)
    for piece in test_batches.PIECES:
        yield b"\n".join([whole, piece, whole])
        yield b"\n".join([piece, whole, whole])


def _streams() -> Iterator[bytes]:
    yield from _lines()
    yield from test_bad_input.NO_NDJSON.values()
    yield from (body for body, _ in test_ndjson.BODIES.values())


def _hosts() -> Iterator[bytes]:
    tests = (
        test_host.test_an_address_is_read_as_the_server_reads_it,
        test_host.test_an_invalid_address_is_refused_with_the_reason,
        test_bad_input.test_an_invalid_host_is_refused_at_once,
    )
    for test in tests:
        for given in _first_values(test):
            yield given.encode()
            yield f"user:pass%20word@{given}".encode()
            yield given.replace("://", "://user:pass/word@").encode()


def _proxies() -> Iterator[bytes]:
    yield from _hosts()
    for scheme in (b"http", b"https", b"socks5", b"socks5h", b"socks4", b""):
        yield from (scheme + b"://" + host for host in _hosts())


def _tunnels() -> Iterator[bytes]:
    for mark in test_proxy.test_a_proxy_that_makes_no_tunnel.pytestmark:
        yield from (answer[:400] for answer, _ in mark.args[1])
    yield from test_transport.BROKEN.values()


DOCSTRINGS = [
    "Do it.\n\nArgs:\n    a: first\n    b (int, optional): second. Defaults to 3.\n\nReturns:\n    c: it",
    "Do it.\n\nParameters\n----------\na : int\n    first\nb : str, optional\n    second\n",
    "Do it.\n\n:param int a: first\n:param b: second\n:type b: str\n:returns: it\n:raises X: no",
    "@param a: first\n@type a: int\n@return: it",
]


def _functions() -> Iterator[bytes]:
    kinds = list(tool_language.TYPES)
    for place, kind in enumerate(kinds):
        other = kinds[(place + 1) % len(kinds)]
        yield f"f\na {kind}\nb {other} opt = none\n\n{DOCSTRINGS[place % 4]}".encode()
        yield f"f\na {kind} listof\nb {kind} {other} dictof\nc {kind} {other} or\nd {kind} said".encode()
        yield f"f\na {kind} {other} kindof\nb {kind} field = 1\n!c {kind} titled\n**d int".encode()
    for default in tool_language.DEFAULTS:
        yield f"f\n/a color = {default}\nb\n*c int".encode()
    yield from (f"f\na int\nb str\n\n{text}".encode() for text in DOCSTRINGS)


CASES: dict[str, list[bytes]] = {
    "http_response": [*_answers(), *_blanks()],
    "http_limits": [*_limits()],
    "ndjson": [*_bodies()],
    "batches": [bytes([model]) + lines for lines in _lines() for model in (0, 1)],
    "stream": [*_streams()],
    "host": [*_hosts()],
    "proxy": [*_proxies()],
    "tunnel": [*_tunnels()],
    "tools": [*_functions()],
    "legacy_tools": [*_functions()],
}

_HTTP = [
    *test_hostile.TRICKS,
    b"HTTP/1.1 ",
    b"Content-Length: ",
    b"chunked\r\n",
    b"Connection: close\r\n",
    b"100",
    b"204",
]
_ADDRESS = [
    b"http://",
    b"https://",
    b"socks5://",
    b"@",
    b":",
    b"[::1]",
    b"%00",
    b"%2F",
    b"xn--",
    b"\xc2\xad",
    b"0.0.0.0",
]
_TOOL = [
    *(f" {word}".encode() for word in tool_language.WORDS),
    *(f" = {word}".encode() for word in tool_language.DEFAULTS),
    *(b"\n" + sign.encode() + b"a" for sign in tool_language.KINDS),
    *(
        b"\n\nArgs:\n    ",
        b"\n\nParameters\n----------\n",
        b"\n:param a: ",
        b"\n@param a: ",
        b"\nReturns:\n",
        b" : int, optional",
    ),
]
WORDS: dict[str, list[bytes]] = {
    "http_response": _HTTP,
    "http_limits": [*_HTTP, b"\xff\xff\xff"],
    "ndjson": [b"\n", b"\r\n", b" ", b"\t", b"12345678"],
    "batches": [*test_batches.PIECES, b"\n"],
    "stream": [*test_batches.PIECES, b"\n", b'"done":true'],
    "host": _ADDRESS,
    "proxy": _ADDRESS,
    "tunnel": _HTTP,
    "tools": _TOOL,
    "legacy_tools": _TOOL,
}
