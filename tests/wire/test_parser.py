"""The parser of answers alone: where its limits lie, and what it says of an answer that is not one."""

from __future__ import annotations

import gc
import weakref

import httpx
import pytest

from ollama_async._wire.http1 import MAX_HEAD_BYTES
from ollama_async._wire.parser import Head, PeerClosed, ResponseParser

STATUS = b"HTTP/1.1 200 OK\r\n"
BODY = b"Content-Length: 1\r\n\r\nx"
# As a head is counted: its reason, and each header with four bytes more.
COUNTED = len(b"OK") + len(b"Content-Length") + len(b"1") + 4


def fed(*pieces: bytes, method: str = "GET") -> tuple[ResponseParser, bytes]:
    parser = ResponseParser(method)
    return parser, b"".join(map(parser.feed_data, pieces))


def parts(head: Head | None) -> tuple[object, ...]:
    assert head is not None
    return head.status, head.reason, head.headers, head.version


def test_a_new_parser_has_nothing() -> None:
    parser = ResponseParser("GET")
    assert (parser.head, parser.error, parser.take_body()) == (None, None, b"")
    assert (parser.complete, parser.keep_alive, parser.trailing_data) == (False, False, False)
    assert parts(Head()) == (0, b"", (), b"HTTP/1.1")
    assert Head().names == frozenset()
    assert Head(200, b"OK", [(b"A-b", b"C")]).names == {b"a-b"}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("over", "refused"), [(0, False), (1, True)])
def test_a_head_has_a_limit(over: int, refused: bool, split: bool) -> None:
    value = b"v" * (MAX_HEAD_BYTES - COUNTED - len(b"ab") - 4 + over)
    values = [value[:1000], value[1000:]] if split else [value]
    if split:
        values[1] = values[1][: -len(b"ab") - 4]
    headers = b"".join(b"ab: %b\r\n" % part for part in values)
    parser, body = fed(STATUS + headers + BODY)
    assert (parser.error is not None) is refused
    assert body == (b"" if refused else b"x")
    if refused:
        assert str(parser.error) == f"the head of the server's answer is over {MAX_HEAD_BYTES:,} bytes"


@pytest.mark.parametrize(("over", "refused"), [(0, False), (1, True)])
@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 103 E\r\nX: a\r\n\r\n"])
def test_the_limit_is_for_all_heads_and_trailers_of_an_answer(interim: bytes, over: int, refused: bool) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    counted = len(b"OK") + len(b"Transfer-Encodingchunked") + 4 + (len(b"EXa") + 4 if interim else 0)
    left = MAX_HEAD_BYTES - counted - 2 * (len(b"ab") + 4) + over
    trailers = b"ab: %b\r\nab: %b\r\n\r\n" % (b"v" * (left // 2), b"v" * (left - left // 2))
    half = len(trailers) // 2
    parser, body = fed(interim + STATUS + chunked, b"1\r\nx\r\n0\r\n", trailers[:half], trailers[half:])
    assert body == b"x"
    assert (parser.error is not None, parser.complete) == (refused, not refused)


@pytest.mark.parametrize(("over", "refused"), [(0, False), (1, True)])
def test_a_reason_has_the_limit_of_a_head(over: int, refused: bool) -> None:
    reason = b"r" * (MAX_HEAD_BYTES - COUNTED + len(b"OK") + over)
    parser, _ = fed(b"HTTP/1.1 200 " + reason + b"\r\n" + BODY)
    assert (parser.error is not None) is refused
    alone = fed(b"HTTP/1.1 200 " + b"r" * (MAX_HEAD_BYTES + over) + b"\r\n\r\nx")[0]
    assert (alone.error is not None) is refused


@pytest.mark.parametrize(("over", "refused"), [(0, False), (1, True)])
def test_what_the_parser_holds_back_has_a_limit(over: int, refused: bool) -> None:
    head = (STATUS + b"X: ").ljust(MAX_HEAD_BYTES - 1, b"v")
    parser, _ = fed(head, b"v" * (1 + over))
    assert (parser.error is not None) is refused
    # A part of the body is given out: from there on it counts anew.
    parser, body = fed(STATUS + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n", b"1\r\ny\r\n")
    assert body == b"xy"
    parser.feed_data(b"0\r\nX: ".ljust(MAX_HEAD_BYTES + over, b"v"))
    assert (parser.error is not None) is refused


def test_much_behind_an_answer_is_no_head_without_an_end() -> None:
    parser, body = fed(STATUS + b"Content-Length: 0\r\n\r\n", b"\r\n" * MAX_HEAD_BYTES)
    assert (body, parser.error, parser.complete) == (b"", None, True)


def test_a_long_body_is_no_head_without_an_end() -> None:
    parser, body = fed(STATUS + b"\r\n", b"x" * (MAX_HEAD_BYTES + 1), b"y" * (MAX_HEAD_BYTES + 1))
    assert parser.error is None
    assert len(body) == 2 * (MAX_HEAD_BYTES + 1)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"SSH-2.0-OpenSSH", "the server's answer is not HTTP"),
        (b"HTTX/1.1 200", "the server's answer is not HTTP"),
        (b"HTTP/9.9 200 OK\r\n", "the server's answer is broken HTTP: "),
        (STATUS + b"Content-Length: x\r\n\r\n", "the server's answer is broken HTTP: "),
        (STATUS + b"Transfer-Encoding: chunked\r\n\r\nz", "the server's answer is broken HTTP: "),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "the server switched protocols, which was not asked for"),
        (b"HTTP/1.1 099 What\r\n\r\n", "the server's answer has the status 099, which HTTP does not know"),
        (b"HTTP/1.1 150 What\r\nContent-Length: 1\r\n\r\nx", "the server's answer has a body before its head"),
        (
            b"HTTP/1.1 150 What\r\nContent-Length: 1\r\n\r\nx" + STATUS + BODY,
            "the server's answer has a body before its",
        ),
        # The first thing that is wrong is told.
        (b"HTTP/1.1 150 What\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxz", "the server's answer is broken HTTP: "),
    ],
)
def test_an_answer_that_is_refused_says_why(sent: bytes, said: str) -> None:
    parser, body = fed(sent)
    assert body == b""
    assert isinstance(parser.error, httpx.RemoteProtocolError)
    assert str(parser.error).startswith(said)
    assert not parser.complete
    parser.feed_eof()
    assert str(parser.error).startswith(said)


@pytest.mark.parametrize(("first", "asked"), [(0x14, False), (0x15, True), (0x16, True), (0x17, False), (0x53, False)])
@pytest.mark.parametrize("more", [b"", b"\x03\x01"])
def test_an_alert_or_a_greeting_of_another_layer_is_asked_about(first: int, asked: bool, more: bytes) -> None:
    parser, _ = fed(bytes([first]) + more)
    assert str(parser.error) == "the server's answer is not HTTP" + ("; is this a TLS port?" if asked else "")


def test_an_error_that_comes_later_is_told_of_the_whole_answer() -> None:
    parser, body = fed(STATUS + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", b"zz\r\n")
    assert body == b"x"
    assert str(parser.error).startswith("the server's answer is broken HTTP: ")
    assert parser.error is not None
    assert parser.error.__cause__ is not None


def test_interim_answers_leave_nothing_in_the_final_one() -> None:
    interim = b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n"
    parser, body = fed(interim, b"HTTP/1.1 199 What\r\n\r\n" + STATUS + BODY)
    assert parts(parser.head) == (200, b"OK", [(b"Content-Length", b"1")], b"HTTP/1.1")
    assert (body, parser.complete, parser.keep_alive) == (b"x", True, True)


def test_headers_lose_the_white_space_around_their_values_and_no_other() -> None:
    parser, _ = fed(b"HTTP/1.0 404 Not Found\r\nX: \t a b \t \r\n\r\n")
    assert parts(parser.head) == (404, b"Not Found", [(b"X", b"a b")], b"HTTP/1.0")
    assert not parser.complete


@pytest.mark.parametrize(
    ("headers", "complete"),
    [(b"", True), (b"Content-Length: 3\r\n", False), (b"Transfer-Encoding: chunked\r\n", False)],
)
def test_the_end_of_the_connection_completes_only_what_has_no_other_end(headers: bytes, complete: bool) -> None:
    parser, _ = fed(STATUS + headers + b"\r\n")
    parser.feed_eof()
    assert (parser.complete, parser.error is None) == (complete, complete)
    if not complete:
        assert isinstance(parser.error, PeerClosed)
        assert str(parser.error) == "the server closed the connection in the middle of its answer"


def test_the_end_of_the_connection_before_an_answer_says_so() -> None:
    parser, _ = fed(b"HTTP/1.1 2")
    parser.feed_eof()
    assert isinstance(parser.error, PeerClosed)
    assert str(parser.error) == "the server closed the connection before it answered"


def test_an_end_of_the_connection_after_an_answer_changes_nothing() -> None:
    parser, _ = fed(STATUS + BODY)
    parser.feed_eof()
    assert (parser.complete, parser.error) == (True, None)


def test_an_answer_to_head_is_complete_with_its_head() -> None:
    parser, body = fed(STATUS + b"Content-Length: 5\r\n\r\n", method="HEAD")
    assert (parser.complete, parser.keep_alive, parser.trailing_data, body) == (True, True, False, b"")


@pytest.mark.parametrize("more", [b"x", STATUS, STATUS + BODY, b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"])
def test_what_follows_an_answer_spoils_the_connection_and_is_no_part_of_it(more: bytes) -> None:
    parser, body = fed(STATUS + BODY + more)
    assert (body, parser.complete, parser.error, parser.trailing_data) == (b"x", True, None, True)
    assert parts(parser.head) == (200, b"OK", [(b"Content-Length", b"1")], b"HTTP/1.1")


def test_an_interrupt_in_a_callback_comes_through_and_the_body_is_still_there() -> None:
    class Interrupted(ResponseParser):
        def on_message_complete(self) -> None:
            raise KeyboardInterrupt

    parser = Interrupted("GET")
    with pytest.raises(KeyboardInterrupt) as caught:
        parser.feed_data(STATUS + BODY)
    assert caught.value.__suppress_context__
    assert parser.take_body() == b"x"
    assert parser.take_body() == b""


def test_a_closed_parser_is_freed_without_the_collector() -> None:
    class Watched(ResponseParser):
        __slots__ = ("__weakref__",)

    parser = Watched("GET")
    parser.feed_data(STATUS + BODY)
    freed = weakref.ref(parser)
    gc.disable()
    try:
        parser.close()
        del parser
        assert freed() is None
    finally:
        gc.enable()
