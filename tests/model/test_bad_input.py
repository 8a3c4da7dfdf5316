"""Bad input, from the server's side and from the caller's: a typed error that says what was wrong, and nothing left.

What had come before the error is in its ``partial``. After each test the fixture ``nothing_left`` looks for
descriptors, tasks, timers and calls of the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from teardown.harness import BOUND, nothing_left_behind, until

from ollama_async import (
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    CancelToken,
    ConnectError,
    ConnectionBroken,
    HostError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RequestError,
    ResponseError,
    ServerBusyError,
    ServerError,
    Stream,
    StreamBusy,
    StreamClosed,
    StreamError,
    StreamTruncated,
)
from ollama_async._errors import CONNECTION_ERROR_MESSAGE
from ollama_async._wire.phase import Phase
from ollama_async.testing import Block, Cut, Endless, FakeOllama, Gate, Pause, Raw, Reply, Reset, Stall

MAX_LINE_BYTES = 4096


def line(text: str, *, done: bool = False) -> dict[str, Any]:
    return {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}


def encoded(frame: dict[str, Any]) -> bytes:
    return json.dumps(frame, ensure_ascii=False).encode() + b"\n"


ONE = line("one ")
END = line("", done=True)
CUT_LINE = b'{"model":"fake","message":{"role":"assistant","content":"tw'


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(server: FakeOllama) -> AsyncIterator[None]:
    """Before and after each test the same is open, with the garbage collector off in between."""
    async with nothing_left_behind():
        yield


@pytest_asyncio.fixture
async def client(server: FakeOllama, nothing_left: None) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, max_line_bytes=MAX_LINE_BYTES) as made:
        yield made


streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])


async def chat(client: AsyncClient, *, streaming: bool) -> Any:
    if streaming:
        return await client.chat("fake", "hi", stream=True).collect()
    return await client.chat("fake", "hi")


async def failure(call: Any, kind: type[BaseException]) -> Any:
    """Await a call that must end with an error of exactly this type."""
    with pytest.raises(BaseException) as caught:
        await asyncio.wait_for(call, BOUND)
    assert type(caught.value) is kind, "".join(traceback.format_exception(caught.value))
    return caught.value


def came(error: Any) -> str | None:
    """The text that had come before an error."""
    return None if error.partial is None else error.partial.message.content


# -- no server --


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@streaming_or_not
async def test_a_refused_connection_names_the_address(streaming: bool) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with AsyncClient(address) as client:
        error = await failure(chat(client, streaming=streaming), ConnectError)
    assert isinstance(error, ConnectionError)
    assert "Failed to connect to Ollama" in str(error)
    assert address in error.detail
    assert str(error).endswith(f"({error.detail})")
    # As ollama-python's, with which programs compare it.
    assert str(error) == CONNECTION_ERROR_MESSAGE
    assert str(error) != CONNECTION_ERROR_MESSAGE + "!"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "http://no-such-host.invalid:8080", "x" * 64 + ".invalid"])
async def test_a_name_that_cannot_be_resolved(host: str) -> None:
    async with AsyncClient(host, trust_env=False) as client:
        error = await failure(client.version(), ConnectError)
    assert ".invalid" in error.detail


async def test_a_unix_socket_that_is_not_there() -> None:
    async with AsyncClient(uds="/nonexistent/ollama.sock") as client:
        error = await failure(client.version(), ConnectError)
    assert "/nonexistent/ollama.sock" in error.detail


@pytest.mark.parametrize(
    ("host", "wrong"),
    [
        ("ftp://127.0.0.1", "ftp"),
        ("unix:///run/ollama.sock", "unix"),
        ("127.0.0.1:eleven", "eleven"),
        ("127.0.0.1:0", "'0'"),
        ("127.0.0.1:65536", "65536"),
        ("127.0.0.1:-1", "-1"),
        ("127.0.0.1:\N{ARABIC-INDIC DIGIT EIGHT}\N{ARABIC-INDIC DIGIT ZERO}", "port"),
        ("no host", "no host"),
        ("http://[::1", "IPv6"),
        ("1:2:3:x", "IPv6"),
        ("-x-", "-x-"),
        ("http://127.0.0.1/a b", "path"),
        ("http://127.0.0.1/?key=1", "path"),
        ("127.0.0.1\r\nHost: other", "other"),
    ],
)
def test_an_invalid_host_is_refused_at_once(host: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError) as caught:
        AsyncClient(host)
    assert type(caught.value) is HostError
    assert wrong in str(caught.value)
    monkeypatch.setenv("OLLAMA_HOST", host)
    with pytest.raises(HostError):
        AsyncClient()


# -- TLS where there is none, and the reverse --


@streaming_or_not
async def test_tls_to_a_plain_port(server: FakeOllama, streaming: bool) -> None:
    async with AsyncClient(server.url.replace("http://", "https://")) as client:
        error = await failure(chat(client, streaming=streaming), ConnectError)
    assert f"127.0.0.1:{server.port}" in error.detail
    assert "http://" in error.detail


@streaming_or_not
async def test_plain_http_to_a_tls_port_that_hangs_up(server_tls: ssl.SSLContext, streaming: bool) -> None:
    with FakeOllama(ssl=server_tls) as server:
        async with AsyncClient(server.url.replace("https://", "http://")) as client:
            error = await failure(chat(client, streaming=streaming), ConnectionBroken)
    assert "before it answered" in str(error)
    assert "https://" in str(error), "the text does not say what may be wrong"


@streaming_or_not
async def test_plain_http_to_a_tls_port_that_answers_with_an_alert(
    server: FakeOllama, client: AsyncClient, streaming: bool
) -> None:
    server.script("/api/chat", Reply(raw=b"\x15\x03\x01\x00\x02\x02\x46", steps=[Cut()]))
    error = await failure(chat(client, streaming=streaming), ProtocolError)
    assert "TLS" in str(error)


async def test_plain_http_to_a_tls_port_that_says_so(server: FakeOllama, client: AsyncClient) -> None:
    text = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    server.script("/api/chat", Reply(raw=text, steps=[Cut()]))  # as every server written in Go
    error = await failure(client.chat("fake", "hi"), BadRequestError)
    assert error.error == "Client sent an HTTP request to an HTTPS server."


# -- error statuses --

BY_STATUS = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ResponseError,
    429: RateLimitError,
    500: ServerError,
    502: ServerError,
    503: ServerBusyError,
}
HTML = b"<!doctype html><html><head><title>Bad &amp; Gateway</title></head><body>long page</body></html>"
BODIES = {
    "json": (b'{"error":"model not found"}', "model not found"),
    "nested_json": (b'{"error":{"message":"not today","code":1}}', "not today"),
    "html": (HTML, "(HTML) Bad & Gateway"),
    "text": (b"404 page not found\n", "404 page not found"),
    "long_text": (b"x" * 10_000, "x" * 500 + "..."),
    "no_utf8": (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"),
    "deep_json": (b'{"error":' + b"[" * 100_000, '{"error":[['),
}


@pytest.mark.parametrize("status", BY_STATUS)
@streaming_or_not
async def test_each_error_status_has_its_own_type(
    server: FakeOllama, client: AsyncClient, status: int, streaming: bool
) -> None:
    server.script("/api/chat", Reply.error(status, "model 'fake' is not there"))
    error = await failure(chat(client, streaming=streaming), BY_STATUS[status])
    assert (error.status_code, error.error) == (status, "model 'fake' is not there")
    assert str(error) == f"model 'fake' is not there (status code: {status})"
    assert error.partial is None


@pytest.mark.parametrize("body", BODIES)
@streaming_or_not
async def test_an_error_has_a_useful_text_for_any_body(
    server: FakeOllama, client: AsyncClient, body: str, streaming: bool
) -> None:
    sent, text = BODIES[body]
    server.script("/api/chat", Reply([sent], status=500))
    error = await failure(chat(client, streaming=streaming), ServerError)
    assert error.error.startswith(text)
    assert len(error.error) < 600


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@streaming_or_not
async def test_an_error_without_a_body_has_the_phrase_of_its_status(
    server: FakeOllama, client: AsyncClient, framing: Any, streaming: bool
) -> None:
    server.script("/api/chat", Reply(status=502, framing=framing))
    error = await failure(chat(client, streaming=streaming), ServerError)
    assert str(error) == "Bad Gateway (status code: 502)"


# -- 200, but not what Ollama sends --

NO_NDJSON = {
    "html": b"<html>a captive portal</html>\n",
    "text": b"Ollama is running\n",
    "list": b"[1]\n",
    "number": b"5\n",
    "another_object": b'{"choices":[]}\n',
    "nul": b"\0\0\n",
    "no_utf8": b'{"message":{"role":"assistant","content":"\xff"}}\n',
    "deep": b"[" * 4000 + b"\n",
    "wrong_type": b'{"message":{"role":"assistant","content":5}}\n',
}


@pytest.mark.parametrize("body", NO_NDJSON)
@pytest.mark.parametrize("after_a_chunk", [False, True], ids=["first_line", "second_line"])
async def test_a_stream_with_a_line_that_is_not_a_chunk(
    server: FakeOllama, client: AsyncClient, body: str, after_a_chunk: bool
) -> None:
    bad = NO_NDJSON[body]
    server.script("/api/chat", Reply([Block(ONE, bad) if after_a_chunk else bad, Stall()]))
    seen = []
    stream = client.chat("fake", "hi", stream=True)

    async def read() -> None:
        async for chunk in stream:
            seen.append(chunk.message.content)

    error = await failure(read(), ProtocolError)
    assert seen == (["one "] if after_a_chunk else [])
    assert came(error) == ("one " if after_a_chunk else None)
    assert bad.decode("utf-8", "replace")[:20].strip().replace("\0", "\\x00") in str(error)
    assert stream.outcome == "error"
    assert server.connections[0].wait_left(BOUND)


@pytest.mark.parametrize("body", NO_NDJSON)
async def test_an_answer_that_is_not_an_answer(server: FakeOllama, client: AsyncClient, body: str) -> None:
    server.script("/api/chat", Reply([NO_NDJSON[body]]))
    error = await failure(client.chat("fake", "hi"), ProtocolError)
    assert "POST /api/chat" in str(error)
    assert len(str(error)) < 300


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}
MISFITS = {
    "a field": ({"message": {"role": "assistant", "content": 5}}, "message.content: expected a valid string, got 5"),
    "deep within": (
        {"message": CALLED},
        "message.tool_calls[0].function.arguments: expected an object, got an array",
    ),
    "a text": (
        {"message": {"role": "assistant"}, "eval_count": "many" * 30},
        "eval_count: expected a valid integer, unable to parse string as an integer, got the text 'manymany",
    ),
    "nothing": ({"model": "m"}, "message is missing"),
    "null": ({"message": None}, "message: expected an object, got null"),
    "an object": ({"message": {"role": {}}}, "message.role: expected a valid string, got an object"),
    "a long key": ({"message": {"role": "a", "images": {"k" * 500: 1}}}, "message.images: expected"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@streaming_or_not
async def test_the_error_names_the_field_the_expected_and_the_received(
    server: FakeOllama, client: AsyncClient, misfit: str, streaming: bool
) -> None:
    frame, says = MISFITS[misfit]
    server.script("/api/chat", Reply([frame]))
    error = await failure(chat(client, streaming=streaming), ProtocolError)
    assert says in str(error)
    assert "it begins with" in str(error)
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("texts", "vectors", "says"),
    [
        (["a", "b", "c"], [[1.0]], "1 vectors for 3 texts"),
        (["a", "b", "c"], [[1.0]] * 4, "4 vectors for 3 texts"),
        (["a", "b"], [], "0 vectors for 2 texts"),
        ("a", [], "0 vectors for 1 texts"),
        ("a", [[1.0], [2.0]], "2 vectors for 1 texts"),
        (["a", "b"], [[1.0], []], r"an empty vector for input\[1\]"),
        ([], [[1.0]], "1 vectors for 0 texts"),
        ("", [[1.0], [2.0]], "2 vectors for 1 texts"),
        ("", [], None),
        ("", [[1.0]], None),
        ([], [], None),
        (["a", "b"], [[1.0], [2.0]], None),
    ],
)
async def test_there_is_a_vector_for_each_text(
    server: FakeOllama, client: AsyncClient, texts: Any, vectors: Any, says: str | None
) -> None:
    server.script("/api/embed", Reply.json({"model": "m", "embeddings": vectors}))
    if says is None:
        assert (await client.embed("m", texts)).embeddings == vectors
        return
    with pytest.raises(ProtocolError, match=says) as caught:
        await client.embed("m", texts)
    assert caught.value.partial.embeddings == vectors


@streaming_or_not
async def test_an_empty_answer(server: FakeOllama, client: AsyncClient, streaming: bool) -> None:
    server.script("/api/chat", Reply())
    await failure(chat(client, streaming=streaming), ProtocolError)


async def test_an_error_frame_in_a_stream(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([ONE, {"error": "the runner died"}]))
    error = await failure(chat(client, streaming=True), StreamError)
    assert (error.error, error.status_code, came(error)) == ("the runner died", -1, "one ")


async def test_a_body_that_ends_properly_in_the_middle_of_a_line(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([ONE, CUT_LINE]))
    error = await failure(chat(client, streaming=True), ProtocolError)
    assert "ends in the middle of a line" in str(error)
    assert came(error) == "one "


async def test_a_stream_without_its_last_chunk(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([ONE]), Reply([ONE]))
    stream = client.chat("fake", "hi", stream=True)
    assert (await stream.collect()).message.content == "one "
    assert stream.outcome == "truncated"
    async with AsyncClient(server.url, strict=True) as strict:
        assert came(await failure(chat(strict, streaming=True), StreamTruncated)) == "one "


# -- over a limit --


@pytest.mark.parametrize("ended", [False, True], ids=["endless_line", "whole_line"])
@pytest.mark.parametrize("together", [False, True], ids=["later", "in_the_same_block"])
async def test_a_line_over_the_limit(server: FakeOllama, client: AsyncClient, ended: bool, together: bool) -> None:
    gate = Gate()
    long = encoded(line("x" * MAX_LINE_BYTES)) if ended else b'{"' + b"x" * MAX_LINE_BYTES
    server.script("/api/chat", Reply([Block(ONE, long), Stall()] if together else [ONE, gate, long, Stall()]))
    stream = client.chat("fake", "hi", stream=True)
    if not together:
        assert (await anext(stream)).message.content == "one "
        gate.open()
    error = await failure(stream.collect(), ProtocolError)
    assert f"{MAX_LINE_BYTES:,} bytes" in str(error)
    assert came(error) == stream.text == "one "
    assert server.connections[0].wait_left(BOUND)


async def test_a_line_just_within_the_limit(server: FakeOllama, client: AsyncClient) -> None:
    long = line("x" * (MAX_LINE_BYTES - len(encoded(line("")))))
    server.script("/api/chat", Reply([long, END]))
    assert (await chat(client, streaming=True)).message.content == long["message"]["content"]


HEADS = {
    "one_header": Reply(headers={"X": "y" * 70_000}),
    "many_headers": Reply(headers=[(f"X-{n}", "y" * 100) for n in range(1000)]),
    "endless_headers": Reply(raw=b"HTTP/1.1 200 OK\r\n", steps=[Endless(lambda n: b"X-%d: y\r\n" % n)]),
    "endless_header": Reply(raw=b"HTTP/1.1 200 OK\r\nX: ", steps=[Endless(lambda _: b"y" * 1000)]),
    "endless_status_line": Reply(raw=b"HTTP/1.1 200 ", steps=[Endless(lambda _: b"y" * 1000)]),
}


@pytest.mark.parametrize("head", HEADS)
@streaming_or_not
async def test_a_header_block_over_the_limit(
    server: FakeOllama, client: AsyncClient, head: str, streaming: bool
) -> None:
    server.script("/api/chat", HEADS[head])
    error = await failure(chat(client, streaming=streaming), ProtocolError)
    assert "head of the server's answer is over 65,536 bytes" in str(error)
    assert server.connections[0].wait_left(BOUND)
    assert server.connections[0].bytes_sent < 16 * 1024 * 1024


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at_once", "in_pieces"])
async def test_a_header_block_within_the_limit(server: FakeOllama, client: AsyncClient, in_pieces: bool) -> None:
    headers = [b"X-%d: %b\r\n" % (n, b"y" * 1000) for n in range(50)]
    body = encoded(line("whole", done=True))
    end = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    steps = [step for header in headers for step in (header, Pause(0.002))] if in_pieces else [b"".join(headers)]
    server.script("/api/chat", Reply(raw=b"HTTP/1.1 200 OK\r\n", steps=[*steps, end, Stall()]))
    assert (await client.chat("fake", "hi")).message.content == "whole"


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00\x01\x02\x03", b"HTTP/1.1 yes\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"],
    ids=["ssh", "binary", "no_status", "no_header"],
)
@streaming_or_not
async def test_an_answer_that_is_not_http(
    server: FakeOllama, client: AsyncClient, answer: bytes, streaming: bool
) -> None:
    server.script("/api/chat", Reply(raw=answer, steps=[Stall()]))
    error = await failure(chat(client, streaming=streaming), ProtocolError)
    assert "HTTP" in str(error)
    assert server.connections[0].wait_left(BOUND)


# -- cut off --

CUTS = {
    "mid_line": [CUT_LINE],
    "after_a_line": [],
    "mid_http_chunk": [Raw(b"ff\r\n" + CUT_LINE)],
    "mid_chunk_size": [Raw(b"f")],
    "mid_utf8": ['{"model":"fake","message":{"role":"assistant","content":"\N{GRINNING FACE}'.encode()[:-2]],
}


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("how", [Cut(), Reset()], ids=["fin", "rst"])
@streaming_or_not
async def test_a_connection_that_is_cut(
    server: FakeOllama, client: AsyncClient, where: str, how: Cut | Reset, streaming: bool
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([ONE, gate, *CUTS[where], how]))
    task = asyncio.create_task(chat(client, streaming=streaming))
    await until(lambda: gate.reached, "the first line")
    # The kernel drops what was not read when a RST comes: the first line must have been read before.
    await until(lambda: task.get_coro() is not None and client_has_read(client), "the first line read by the client")
    gate.open()
    error = await failure(task, ConnectionBroken)
    # Code that was written for ollama-python takes that for "no server", and would drop the partial answer.
    assert not isinstance(error, ConnectionError)
    assert "lost before the answer was complete" in str(error)
    assert came(error) == ("one " if streaming else None)


def client_has_read(client: AsyncClient) -> bool:
    """Whether a block of a body has arrived at the client's only connection."""
    [pool] = client._client._transport._pools.values()
    [connection] = pool._all
    return bool(connection._reader.phase >= Phase.BODY)


@pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize(
    "reply",
    [
        Reply(before_head=[Cut()]),
        Reply(before_head=[Reset()]),
        Reply(cut_at=20),
        Reply([ONE], headers={"Content-Length": "1000"}, framing="close"),
    ],
    ids=["before_the_head", "reset_before_the_head", "in_the_head", "short_of_its_length"],
)
async def test_a_connection_that_is_cut_at_its_edges(
    server: FakeOllama, client: AsyncClient, reply: Reply, streaming: bool
) -> None:
    server.script("/api/chat", reply)
    await failure(chat(client, streaming=streaming), ConnectionBroken)


@streaming_or_not
async def test_an_error_whose_body_is_cut_is_still_that_error(
    server: FakeOllama, client: AsyncClient, streaming: bool
) -> None:
    server.script("/api/chat", Reply([b'{"error":"half of an err', Cut()], status=503))
    error = await failure(chat(client, streaming=streaming), ServerBusyError)
    assert "half of an err" in error.error


async def test_an_invalid_chunk_size(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([Block(ONE), Raw(b'zz\r\n{"mess'), Stall()]))
    error = await failure(chat(client, streaming=True), ProtocolError)
    assert "HTTP" in str(error)
    assert came(error) == "one "
    assert server.connections[0].wait_left(BOUND)


# -- strange, but right --


@streaming_or_not
async def test_separators_of_unicode_inside_a_text_are_text(
    server: FakeOllama, client: AsyncClient, streaming: bool
) -> None:
    text = "a\u0085b\u2028c\u2029d\x0be\x1cf\N{GRINNING FACE}"
    # ensure_ascii=False in encoded(): they are on the wire as themselves, as Go sends U+0085.
    whole = encoded(line(text, done=True)).replace(b"\\u000b", b"\\u000B")
    server.script("/api/chat", Reply([whole]))
    assert text[1].encode() in whole
    assert (await chat(client, streaming=streaming)).message.content == text


async def test_blank_lines_and_crlf_between_chunks_are_skipped(server: FakeOllama, client: AsyncClient) -> None:
    crlf = encoded(ONE).replace(b"\n", b"\r\n")
    server.script("/api/chat", Reply([b"\n", crlf, b"\n\r\n  \n", encoded(line("two")), b"\n", END]))
    stream = client.chat("fake", "hi", stream=True)
    assert [chunk.message.content async for chunk in stream] == ["one ", "two", ""]
    assert (stream.outcome, stream.text) == ("done", "one two")


async def test_a_body_that_comes_byte_by_byte(server: FakeOllama, client: AsyncClient) -> None:
    frames = encoded(line("\N{GRINNING FACE}\u2028")) + encoded(END)
    server.script("/api/chat", Reply([frames[at : at + 1] for at in range(len(frames))]))
    assert (await chat(client, streaming=True)).message.content == "\N{GRINNING FACE}\u2028"


async def test_a_last_line_without_a_line_end(server: FakeOllama, client: AsyncClient) -> None:
    server.script("/api/chat", Reply([ONE, encoded(END).rstrip()]))
    stream = client.chat("fake", "hi", stream=True)
    assert (await stream.collect()).message.content == "one "
    assert stream.outcome == "done"


# -- misuse --


@pytest.mark.parametrize("second", ["anext", "await", "collect", "async_for"])
@pytest.mark.parametrize("phase", ["opening", "reading"])
async def test_a_second_reader_is_refused_and_the_first_reads_on(
    server: FakeOllama, client: AsyncClient, second: str, phase: str
) -> None:
    gate = Gate()
    server.script("/api/chat", Reply([gate, ONE, END], before_head=[gate] if phase == "opening" else []))
    stream = client.chat("fake", "hi", stream=True)

    async def loop() -> None:
        async for _ in stream:
            raise AssertionError("a chunk for the second reader")

    if phase == "reading":
        await stream
        if second == "await":
            pytest.skip("to await an open stream is no reading")
    first = asyncio.create_task(stream.collect())
    await until(lambda: gate.reached and stream._reader.busy, "the first reader at work")
    others: dict[str, Callable[[], Any]] = {
        "anext": stream.__anext__,
        "await": lambda: opened(stream),
        "collect": stream.collect,
        "async_for": loop,
    }
    error = await failure(others[second](), StreamBusy)
    assert "reader" in str(error)
    gate.open()
    assert (await asyncio.wait_for(first, BOUND)).message.content == "one "
    assert stream.outcome == "done"


async def opened(stream: Stream[Any]) -> Stream[Any]:
    return await stream


@pytest.mark.parametrize("use", ["anext", "await", "collect", "async_with"])
@pytest.mark.parametrize("begun", [False, True], ids=["before_it_began", "in_the_middle"])
async def test_a_closed_stream_says_so(server: FakeOllama, client: AsyncClient, use: str, begun: bool) -> None:
    server.script("/api/chat", Reply([ONE, Stall()]))
    stream = client.chat("fake", "hi", stream=True)
    if begun:
        await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert stream.outcome == "closed"

    async def enter() -> None:
        async with stream:
            await anext(stream)

    uses: dict[str, Callable[[], Any]] = {
        "anext": stream.__anext__,
        "await": lambda: opened(stream),
        "collect": stream.collect,
        "async_with": enter,
    }
    if use == "await" and begun:
        pytest.skip("to await an open stream is no reading")
    error = await failure(uses[use](), StreamClosed)
    assert "closed" in str(error)
    assert came(error) == ("one " if begun else None)
    assert len(server.requests) == int(begun)


@pytest.mark.parametrize("call", ["chat", "stream", "version", "create_blob"])
async def test_a_closed_client_says_so(server: FakeOllama, tmp_path: Any, call: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    client = AsyncClient(server.url)
    await client.close()
    await client.close()
    calls: dict[str, Callable[[], Any]] = {
        "chat": lambda: chat(client, streaming=False),
        "stream": lambda: chat(client, streaming=True),
        "version": client.version,
        "create_blob": lambda: client.create_blob(tmp_path / "file"),
    }
    error = await failure(calls[call](), StreamClosed)
    assert "client" in str(error)
    assert "closed" in str(error)
    assert server.connections == ()


async def chat_with(client: AsyncClient, **parameters: Any) -> Any:
    given = {"model": "fake", "messages": "hi", **parameters}
    call: Any = client.chat(**given)
    return await (call.collect() if given.get("stream") else call)


async def test_until_must_be_a_function_and_needs_a_stream(server: FakeOllama, client: AsyncClient) -> None:
    await failure(chat_with(client, until=5, stream=True), RequestError)
    await failure(chat_with(client, until=lambda _: True), RequestError)
    assert server.requests == ()


@pytest.mark.parametrize(
    "options",
    [
        {"host": 5},
        {"timeout": "5"},
        {"timeout": 0},
        {"headers": 5},
        {"token": "token"},
        {"max_line_bytes": "1"},
        {"http_client": 5},
        {"transport": 5},
        {"proxy": "nonsense"},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_a_client_option_of_the_wrong_type_is_refused(server: FakeOllama, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        AsyncClient(**{"host": server.url, **options})


def test_a_token_is_made_of_tokens() -> None:
    with pytest.raises(RequestError):
        CancelToken.any()
    with pytest.raises(RequestError):
        CancelToken.any("token")  # type: ignore[arg-type]
