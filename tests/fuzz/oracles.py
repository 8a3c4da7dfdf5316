"""The fuzz targets: functions of any bytes that return, or raise an ``AssertionError`` when the package is wrong.

An error that the package does not document goes through, which is a failure as well.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import h11
import httpx
from fuzz import targets
from fuzz.tool_language import Unreadable, read_function, without_others
from pydantic import ValidationError

__all__ = ["ORACLES", "cuts", "pieces_at"]

# -- cutting --

EVERY_SPLIT = 160


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """Cut bytes byte by byte, in two (at every place if they are few), and in several."""
    chance = random.Random(data)
    yield [bytes([byte]) for byte in data]
    everywhere = range(1, len(data))
    for at in everywhere if len(data) <= EVERY_SPLIT else sorted(chance.sample(everywhere, 16)):
        yield [data[:at], data[at:]]
    for count in (2, 3, 8):
        yield pieces_at(data, [chance.randint(0, len(data)) for _ in range(count)])


def pieces_at(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at these places, none of the pieces empty."""
    ends = sorted({place for place in places if 0 < place < len(data)} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


# -- the answer of a server --


def http_response(data: bytes) -> None:
    """First byte: whether it answers a HEAD, whether the server closes; then the answer."""
    head, closed, sent = bool(data[:1] and data[0] & 1), bool(data[:1] and data[0] & 2), data[1:]
    method = "HEAD" if head else "GET"
    whole = targets.parse_answer(method, [sent], closed=closed)
    _answer_makes_sense(whole, sent)
    for pieces in cuts(sent):
        cut = targets.parse_answer(method, pieces, closed=closed)
        assert _facts(cut) == _facts(whole), f"another answer when cut into {pieces}"
        assert cut.kept == whole.kept or _swallowed(method, sent), f"kept or not, when cut into {pieces}"
    _trailing_data(method, sent)
    _as_h11_reads_it(method, sent, whole, closed=closed)


def _facts(answer: targets.Answer) -> tuple[Any, ...]:
    # Errors are told with what the parser had just been fed: whether there is one is what must not depend on it.
    return answer.head, answer.body, answer.complete, answer.error is None


def _swallowed(method: str, sent: bytes) -> bool:
    """Whether the answer is followed by nothing but what the parser takes without a word, if it comes with the answer.

    Those are blank lines, and after the head that answers a HEAD the end of the body that it announces.
    """
    ends = (at for at in range(len(sent) + 1) if targets.parse_answer(method, [sent[:at]], closed=False).complete)
    end = next(ends, len(sent))
    return method == "HEAD" or not sent[end:].strip(b"\r\n")


def _answer_makes_sense(answer: targets.Answer, sent: bytes) -> None:
    assert not (answer.complete and answer.error)
    assert answer.complete or not answer.kept
    assert len(answer.body) <= len(sent)
    if answer.head is None:
        assert not answer.body
        assert not answer.complete
    else:
        status, reason, headers, version = answer.head
        assert 200 <= status <= 999
        assert version in (b"HTTP/0.9", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0"), version
        assert not set(reason) & set(b"\r\n")
        for name, value in headers:
            assert name, "a header without a name"
            assert not set(name + value) & set(b"\r\n\0")
            assert value == value.strip(b" \t")


def _trailing_data(method: str, sent: bytes) -> None:
    """What follows a whole answer changes nothing of it, but keeps the connection from being used again."""
    alone = targets.parse_answer(method, [sent], closed=False)
    if not alone.complete:
        return
    for extra in (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", b"\0", b"\r\n", b"0\r\n\r\n"):
        for pieces in ([sent + extra], [sent, extra], [sent[:-1], sent[-1:] + extra]):
            followed = targets.parse_answer(method, pieces, closed=True)
            assert _facts(followed) == _facts(alone), f"another answer when followed: {pieces}"
            assert not followed.kept or _swallowed(method, sent + extra), f"kept although followed: {pieces}"


def _as_h11_reads_it(method: str, sent: bytes, ours: targets.Answer, *, closed: bool) -> None:
    """Two parsers may differ in what they refuse; what both take is the same, or somebody could smuggle an answer."""
    theirs = _read_by_h11(method, sent, closed=closed)
    if theirs is not None and ours.complete and ours.head is not None:
        assert (ours.head[0], ours.body) == theirs, "h11 reads another answer"


def _read_by_h11(method: str, sent: bytes, *, closed: bool) -> tuple[int, bytes] | None:
    """Return status and body of a complete answer; ``None`` if it is not, or is refused."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    connection.send(h11.EndOfMessage())
    status, body = 0, b""
    try:
        connection.receive_data(sent)
        while True:
            match connection.next_event():
                case h11.Response() as response:
                    status = response.status_code
                case h11.Data() as data:
                    body += bytes(data.data)
                case h11.EndOfMessage():
                    return status, body
                case h11.NEED_DATA if closed:
                    closed = False
                    connection.receive_data(b"")
                case h11.InformationalResponse():
                    pass
                case _:
                    return None
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        return None


FILLER = b"x" * 30_000


def http_limits(data: bytes) -> None:
    """As ``http_response``, each byte 0xFF of it many letters: the limit of a head does not depend on cuts either."""
    closed, sent = bool(data[:1] and data[0] & 2), data[1:200].replace(b"\xff", FILLER, 6)
    whole = targets.parse_answer("GET", [sent], closed=closed)
    for size in (1_448, 16_384, 65_536, 262_144):
        pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
        cut = targets.parse_answer("GET", pieces, closed=closed)
        assert _facts(cut) == _facts(whole), f"another answer in pieces of {size} bytes"
        # Not even a parser that refuses nothing may wait for ever for the end of a head, or of the trailers.
        assert cut.error or cut.complete or cut.body or len(sent) <= targets.MAX_HEAD_BYTES
    if whole.head is not None:
        _, reason, headers, *_ = whole.head
        assert len(reason) + sum(len(name) + len(value) for name, value in headers) <= targets.MAX_HEAD_BYTES


# -- the lines and chunks of a stream --


def ndjson(data: bytes) -> None:
    """First byte: the limit of a line, 0 for a high one; then the body."""
    limit, body = (data[0] if data[:1] else 0) or targets.MAX_LINE_BYTES, data[1:]
    expected = _lines(body, limit)
    assert targets.split_lines([body], limit) == expected
    assert targets.split_lines([b"", body, b""], limit) == expected
    for pieces in cuts(body):
        assert targets.split_lines(pieces, limit) == expected, f"other lines when cut into {pieces}"


def _lines(body: bytes, limit: int) -> tuple[list[bytes], bool]:
    lines: list[bytes] = []
    for line in body.split(b"\n"):
        if len(line) > limit:
            return lines, True
        if line.strip(b" \t\r\v\f"):
            lines.append(line)
    return lines, False


def batches(data: bytes) -> None:
    """First byte: of chat or generate; then lines: made together they are what they are one by one."""
    merge = targets.MODELS[data[0] % len(targets.MODELS) if data[:1] else 0]
    lines = _lines(data[1:], targets.MAX_LINE_BYTES)[0]
    together = targets.make_together(merge, lines)
    assert len(together) <= len(lines)
    for line, chunk in zip(lines, together, strict=False):
        alone = targets.make_alone(merge, line)
        assert _content(chunk) == _content(alone)
        assert b'"error"' not in line
    for line in lines[len(together) :]:
        try:
            targets.make_alone(merge, line)
        except ValidationError:
            continue


def _content(chunk: Any) -> tuple[str, set[str]]:
    # As text: what is not a number is not even itself.
    return repr(chunk.model_dump()), chunk.model_fields_set


# Small enough for the lines of a corpus to get over it.
STREAM_LIMIT = 200


def stream(data: bytes) -> None:
    """The body of a chat, read as a program reads it."""
    asyncio.run(_stream(data))


async def _stream(body: bytes) -> None:
    expected = _chunks(body)
    ways = list(cuts(body))
    for pieces in [[body], ways[0], ways[len(ways) // 2], ways[-1]]:
        chunks, outcome = await targets.read_stream(pieces, STREAM_LIMIT)
        assert ([*map(_content, chunks)], outcome) == expected, f"another stream when cut into {pieces}"


def _chunks(body: bytes) -> tuple[list[Any], str]:
    """Read a body as simply as can be."""
    chunks: list[tuple[str, set[str]]] = []
    lines, too_long = _lines(body, STREAM_LIMIT)
    for line in lines:
        if _is_error(line):
            return chunks, "StreamError"
        try:
            chunk = targets.make_alone(targets.MODELS[0], line)
        except ValidationError:
            return chunks, "ProtocolError"
        chunks.append(_content(chunk))
        if chunk.done:
            return chunks, "done"
    return chunks, "ProtocolError" if too_long else "truncated"


def _is_error(line: bytes) -> bool:
    try:
        frame = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(frame, dict) and frame.get("error") is not None


# -- addresses --

SECRET = "hunter2hunter2"


def host(data: bytes) -> None:
    """An address as the environment may have it, in UTF-8."""
    given = os.fsdecode(data)
    read = _only(targets.HostError, targets.parse_host, given)
    if read is not None:
        _host_makes_sense(read)
    marked = _with_secret(given)
    if marked is not None:
        hidden = _only(targets.HostError, targets.parse_host, marked)
        if hidden is not None:
            _host_makes_sense(hidden)
            assert SECRET not in f"{hidden!r} {hidden.url} {hidden.name}"


def _host_makes_sense(read: Any) -> None:
    again = targets.parse_host(read.url)
    assert (again.url, again.name, again.credentials) == (read.url, read.name, None)
    assert read.name.isascii()
    assert not _is_unspecified(read.name), "only a server can listen there"
    assert not set(read.url) & set(map(chr, [*range(33), 127]))
    assert read.credentials is None or read.credentials.startswith("Basic ")
    assert httpx.URL(read.url).host.lower() == httpx.URL(f"http://{_bracketed(read.name)}").host.lower()
    first, *headers, end, nothing = targets.request_head(read).split(b"\r\n")
    assert (first.split(b" ")[::2], end, nothing) == ([b"POST", b"HTTP/1.1"], b"", b"")
    assert all(b": " in header for header in headers)
    assert not set(b"".join([first, *headers])) & set(b"\r\n\0")


def _is_unspecified(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def proxy(data: bytes) -> None:
    """A proxy as ``proxy=`` and the environment may have it, in UTF-8."""
    given = os.fsdecode(data)
    _only(targets.RequestError, targets.read_proxy, given)
    marked = _with_secret(given)
    if marked is not None:
        read = _only(targets.RequestError, targets.read_proxy, marked)
        if read is not None:
            origin, headers = read
            assert SECRET not in f"{origin}{origin!r}"
            assert headers.count(b"\n") <= 1
    if "\0" in given:
        return
    with mock.patch.dict(os.environ, {"HTTP_PROXY": given, "http_proxy": given, "NO_PROXY": "", "no_proxy": ""}):
        named = targets.proxy_of_environment(targets.parse_host("http://models.example"))
    if named is not None:
        assert "://" in named
        _only(targets.RequestError, targets.read_proxy, named)


def tunnel(data: bytes) -> None:
    """What a proxy answers to CONNECT."""
    whole = targets.open_tunnel([data])
    for pieces in cuts(data):
        cut = targets.open_tunnel(pieces)
        assert (cut is None) == (whole is None)
        if whole and cut:
            assert whole[0] == cut[0]
            assert whole[1].startswith(cut[1])


def _with_secret(given: str) -> str | None:
    """Put a password before the last ``@``: all that stands there may be part of one."""
    before, at, after = given.rpartition("@")
    return f"{before}{SECRET}{at}{after}" if at else None


def _only(kind: type[Exception], function: Callable[[str], Any], given: str) -> Any:
    """Call a function that may raise errors of one kind, which do not show a secret to anybody."""
    try:
        return function(given)
    except kind as exc:
        _is_no_leak(exc, kind)
        return None


def _is_no_leak(error: Exception, kind: type[Exception]) -> None:
    assert type(error) is kind
    assert str(error)
    assert SECRET not in "".join(_shown(error)), "the secret is shown"


def _shown(error: BaseException | None) -> Iterator[str]:
    """All that a crash reporter has of an error: its text, and the variables of the package's frames."""
    while error is not None:
        yield f"{error} {error!r} {getattr(error, '__notes__', '')}"
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if targets.is_of_the_package(frame.f_code.co_filename):
                yield repr(frame.f_locals)
        error = error.__cause__ or error.__context__


# -- tools --


def tools(data: bytes) -> None:
    """A function, as ``tool_language.py`` reads it."""
    try:
        function = read_function(os.fsdecode(data))
    except Unreadable:
        return
    try:
        schema = targets.tool_schema(function)
    except targets.RequestError:
        return
    assert targets.tool_schema(function) == schema
    assert targets.encode_tools([function]) == [schema]
    json.dumps(schema, allow_nan=False)
    _tool_makes_sense(schema, function)
    for name, alone in without_others(function):
        parameters = targets.tool_schema(alone)["function"]["parameters"]
        whole = schema["function"]["parameters"]
        expected = _expanded(parameters["properties"][name], parameters.get("$defs", {}))
        assert _expanded(whole["properties"][name], whole.get("$defs", {})) == expected, f"{name} is another one alone"


def _tool_makes_sense(schema: dict[str, Any], function: Any) -> None:
    assert schema["type"] == "function"
    described = schema["function"]
    assert described["name"] == function.__name__
    assert isinstance(described.get("description", ""), str)
    parameters = described["parameters"]
    of_python = function.__signature__.parameters.values()
    fillable = [p for p in of_python if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert list(parameters["properties"]) == [p.name for p in fillable]
    assert set(parameters.get("required", [])) <= {p.name for p in fillable if p.default is p.empty}
    for reference in _references(parameters):
        assert reference.removeprefix("#/$defs/") in parameters.get("$defs", {}), f"{reference} leads nowhere"


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _expanded(node: Any, definitions: dict[str, Any], depth: int = 14) -> Any:
    """Return a schema with its references followed, so deep, whether or not the package has followed them."""
    if not depth:
        return "..."
    if isinstance(node, list):
        return [_expanded(value, definitions, depth - 1) for value in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("$ref"), str):
        referred = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _expanded({**referred, **{key: node[key] for key in node if key != "$ref"}}, definitions, depth)
    return {key: _expanded(value, definitions, depth - 1) for key, value in node.items()}


def legacy_tools(data: bytes) -> None:
    """A function, converted as ollama-python does it."""
    try:
        function = read_function(os.fsdecode(data))
    except Unreadable:
        return
    try:
        with warnings.catch_warnings():
            # As with ollama-python, pydantic warns of a parameter that is called as one of its methods.
            warnings.simplefilter("ignore", UserWarning)
            [schema] = targets.encode_tools([function], legacy=True)
    except targets.RequestError:
        return
    json.dumps(schema, allow_nan=False)


ORACLES: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (http_response, http_limits, ndjson, batches, stream, host, proxy, tunnel, tools, legacy_tools)
}
