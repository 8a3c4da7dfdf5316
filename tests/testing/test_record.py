"""Recordings: what is kept of a real exchange, what never is, how it is played again, and what a file has wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from cli.terminal import environment, run

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectionBroken,
    OllamaError,
    PhaseTimeout,
    ProtocolError,
    RequestError,
    ServerBusyError,
    StreamError,
    Timeouts,
)
from ollama_async.testing import (
    Cut,
    FakeOllama,
    Gate,
    Pause,
    RecordingError,
    Reply,
    Reset,
    Stall,
    nothing_left_behind,
)
from ollama_async.testing.__main__ import main
from ollama_async.testing._recording import _STEPS, _load, _written, block_line

HEADER = '{"recording": 1}\n'
ASKED = '{"request": "POST /api/chat"}\n'
HEAD = '{"at": 1, "status": 200}\n'
FRAME: dict[str, Any] = {"model": "fake", "message": {"role": "assistant", "content": "Half"}, "done": False}
HALF = json.dumps({"at": 2, "line": FRAME}) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


@pytest.fixture
def recorder(fake_ollama: FakeOllama, path: Path) -> Iterator[FakeOllama]:
    """Records `fake_ollama`."""
    with FakeOllama.record(fake_ollama.url, path) as server:
        yield server


def client_of(server: FakeOllama, **options: Any) -> AsyncClient:
    return AsyncClient(server.url, timeout=10, **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ends_of(path: Path) -> list[str]:
    return [line["end"] for line in lines_of(path) if "end" in line]


async def chunks_of(server: FakeOllama) -> list[dict[str, Any]]:
    async with client_of(server) as client:
        stream = client.chat("fake", "hi", stream=True)
        return [chunk.model_dump(exclude_none=True) async for chunk in stream]


# -- recorded and played --


async def test_what_is_recorded_is_played_again(fake_ollama: FakeOllama, recorder: FakeOllama, path: Path) -> None:
    streamed = Reply.chat("Grüße <b>", "\u2028", "!", thinking=["hm"], tool_calls=[{"function": {"name": "f"}}])
    fake_ollama.script("/api/chat", streamed, Reply.chat("whole"))

    async def all_of(server: FakeOllama) -> list[object]:
        async with client_of(server) as client:
            return [
                await chunks_of(server),
                (await client.chat("fake", "hi")).model_dump(),
                (await client.embed("fake", ["a", "b"])).model_dump(),
                (await client.list()).model_dump(),
                await client.blob_exists("sha256:" + "0" * 64),
            ]

    recorded = await all_of(recorder)
    recorder.stop()
    with FakeOllama.replay(path, speed=math.inf) as server:
        assert await all_of(server) == recorded
    assert ends_of(path) == ["complete"] * 5
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_recording_can_be_read(fake_ollama: FakeOllama, recorder: FakeOllama, path: Path) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Grüße", interval=0.05))
    await chunks_of(recorder)
    recorder.stop()
    first, asked, head, line, last, end = lines_of(path)
    assert first == {"recording": 1}
    assert asked["request"] == "POST /api/chat"
    assert asked["body"]["messages"] == [{"role": "user", "content": "hi"}]
    assert (head["status"], head["headers"]) == (200, {"content-type": "application/x-ndjson"})
    assert "Grüße" in path.read_text("utf-8")
    assert (line["line"]["message"]["content"], last["line"]["done"], end["end"]) == ("Grüße", True, "complete")
    # The pause of the server, in ms; both timers count in their own way.
    assert last["at"] - line["at"] > 45
    assert head["at"] <= line["at"] <= last["at"] <= end["at"]


def test_a_recording_is_played_with_its_timing(path: Path) -> None:
    path.write_text(f'{HEADER}{ASKED}{{"at": 100, "status": 200}}\n{{"at": 400, "line": {{}}}}\n{{"line": {{}}}}\n')
    for speed, pauses in [(1.0, [0.1, 0.3]), (2.0, [0.05, 0.15]), (math.inf, [])]:
        [exchange] = _load(str(path), speed)
        reply = exchange.reply
        found = [step.seconds for step in (*reply.before_head, *reply.steps) if isinstance(step, Pause)]
        assert found == pytest.approx(pauses)


@pytest.mark.parametrize("speed", [0, -1, math.nan, "2", True])
def test_an_invalid_speed_is_refused(path: Path, speed: Any) -> None:
    path.write_text(HEADER)
    with pytest.raises(RequestError, match="speed="):
        FakeOllama.replay(path, speed=speed)


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (b'{"a":1}\n', "line"),
        (b'{"a":1}\n{"b":2}\n', "lines"),
        ('{"a":"\u2028"}\n'.encode(), "line"),
        (b'{"a":1}', "json"),
        (b"[1,2]", "json"),
        (b'{"a": 1}\n', "data"),
        (b'{"a":"\\u003c"}\n', "data"),
        (b'{"a":1}\r\n', "data"),
        (b'{"a":1}\n\n', "data"),
        (b'{"a":1}\n{"b":2', "data"),
        (b'{"a":1,"a":1}\n', "data"),
        (b"7\n", "data"),
        (b"data: [DONE]\n\n", "data"),
        (b"\xff\x00", "data"),
        ("\u2028".encode(), "data"),
        (b'{"a":NaN}\n', "line"),
    ],
)
def test_a_block_gives_the_same_bytes_again(block: bytes, kind: str) -> None:
    line = json.loads(json.dumps(block_line(block)))
    assert (list(line), _written(_STEPS[kind](line))) == ([kind], block)


async def test_exchanges_at_the_same_time_are_kept_apart(
    fake_ollama: FakeOllama, recorder: FakeOllama, path: Path
) -> None:
    gates = [Gate(), Gate()]
    for gate, text in zip(gates, "ab", strict=True):
        fake_ollama.script("/api/chat", Reply([*Reply.chat(text, done=False).steps, gate, *Reply.chat(text).steps]))
    async with client_of(recorder) as client:
        streams = [client.chat("fake", text, stream=True) for text in "ab"]
        for stream in streams:
            assert (await anext(stream)).text in "ab"
        for gate, stream in reversed([*zip(gates, streams, strict=True)]):
            gate.open()
            await stream.collect()
    recorder.stop()
    asked = [line["body"]["messages"][0]["content"] for line in lines_of(path) if "request" in line]
    frames = [frame for line in lines_of(path) for frame in line.get("lines", [line["line"]] if "line" in line else [])]
    contents = [frame["message"]["content"] for frame in frames]
    assert (asked, contents) == (["b", "a"], ["b", "b", "", "a", "a", ""])
    with FakeOllama.replay(path, speed=math.inf) as server:
        async with client_of(server) as client:
            answers = [(await client.chat("fake", text, stream=True).collect()).text for text in "abab"]
    assert answers == ["aa", "bb", "aa", "bb"]


async def test_a_request_gets_the_answer_that_is_most_like_it(path: Path) -> None:
    def exchange(content: str, *, stream: bool, text: str) -> str:
        body = {"model": "fake", "messages": [{"role": "user", "content": content}], "stream": stream, "tools": []}
        line = {"json": {**FRAME, "message": {"role": "assistant", "content": text}, "done": True}}
        lines = [{"request": "POST /api/chat", "body": body}, {"status": 200}, line]
        return "".join(json.dumps(each) + "\n" for each in lines)

    one, two = exchange("x", stream=True, text="1"), exchange("y", stream=False, text="2")
    path.write_text(HEADER + one + two + exchange("z", stream=True, text="3"))
    with FakeOllama.replay(path) as server:
        async with client_of(server) as client:
            asked = [(False, "new"), (True, "new"), (True, "z"), (True, "z"), (True, "new"), (True, "new")]
            answers: list[str] = []
            for stream, content in asked:
                call = client.chat("fake", content, stream=True).collect() if stream else client.chat("fake", content)
                answers.append((await call).text)
            # What is not in the recording has the built-in answer.
            assert (await client.version()).version == "0.0.0-fake"
    assert answers == ["2", "1", "3", "3", "1", "2"]


async def test_scripts_go_before_the_real_server_and_are_not_recorded(
    fake_ollama: FakeOllama, recorder: FakeOllama, path: Path
) -> None:
    recorder.script("/api/chat", Reply.error(503, "busy"))
    async with client_of(recorder) as client:
        with pytest.raises(ServerBusyError):
            await client.chat("fake", "hi")
        await client.version()
    recorder.stop()
    assert [request.route for request in fake_ollama.requests] == ["/api/version"]
    assert [line["request"] for line in lines_of(path) if "request" in line] == ["GET /api/version"]


# -- stops and faults --


@pytest.mark.parametrize("reply", [Reply(before_head=[Stall()]), Reply.endless_chat(0.001)], ids=["prefill", "answer"])
async def test_an_abort_is_passed_on_at_once(
    fake_ollama: FakeOllama, recorder: FakeOllama, path: Path, reply: Reply
) -> None:
    fake_ollama.script("/api/chat", reply)
    token = CancelToken()
    async with client_of(recorder) as client:
        answer = asyncio.create_task(client.chat("fake", "hi", stream=True, token=token).collect())
        [request] = await asyncio.to_thread(fake_ollama.wait_for_requests, path="/api/chat")
        token.abort("enough")
        # This blocks the event loop: nothing but the recorder can have closed its connection.
        assert request.connection.wait_left()
        assert request.connection.bytes_after_left == 0
        with pytest.raises(AbortError):
            await answer
    recorder.stop()
    assert ends_of(path) == ["client left"]


async def test_an_upload_that_is_aborted_is_not_begun_at_the_server(
    fake_ollama: FakeOllama, recorder: FakeOllama, path: Path
) -> None:
    with socket.create_connection(("127.0.0.1", recorder.port)) as sock:
        sock.sendall(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        recorder.wait_for_requests()
    assert recorder.connections[0].wait_left()
    recorder.stop()
    assert (fake_ollama.requests, lines_of(path)) == ((), [{"recording": 1}])


async def test_a_recorder_leaves_nothing_behind(fake_ollama: FakeOllama, path: Path) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), always=True)
    threads = threading.active_count()
    async with nothing_left_behind():
        with FakeOllama.record(fake_ollama.url, path) as recorder:
            async with client_of(recorder) as client:
                async for _ in client.chat("fake", "hi", stream=True):
                    break
                await client.version()
                stream = client.chat("fake", "hi", stream=True)
                await anext(stream)
                recorder.stop()
                with pytest.raises(ConnectionBroken):
                    await stream.collect()
        for connection in fake_ollama.connections:
            assert connection.wait_left()
    assert threading.active_count() == threads
    assert ends_of(path) == ["client left", "complete", "client left"]


@pytest.mark.parametrize(
    ("reply", "error", "end"),
    [
        (Reply([*Reply.chat("Half", done=False).steps, Cut()]), ConnectionBroken, "cut"),
        (Reply([*Reply.chat("Half", done=False).steps, Reset()]), ConnectionBroken, "cut"),
        (Reply(before_head=[Cut()]), ConnectionBroken, "cut"),
        (Reply([b'{"model":"fa', Cut()], framing="length", headers={"Content-Length": "50"}), OllamaError, "cut"),
        (Reply([*Reply.chat("Half", done=False).steps, {"error": "it crashed"}]), StreamError, "complete"),
        (Reply.error(503, "busy"), ServerBusyError, "complete"),
    ],
)
async def test_a_fault_of_the_server_is_recorded_and_played_again(
    fake_ollama: FakeOllama, recorder: FakeOllama, path: Path, reply: Reply, error: type[OllamaError], end: str
) -> None:
    fake_ollama.script("/api/chat", reply)
    with pytest.raises(error) as recorded:
        await chunks_of(recorder)
    recorder.stop()
    with FakeOllama.replay(path, speed=math.inf) as server, pytest.raises(error) as played:
        await chunks_of(server)
    assert ends_of(path) == [end]
    assert str(played.value) == str(recorded.value)
    assert played.value.partial == recorded.value.partial


async def test_a_server_that_cannot_be_reached_is_named_and_not_recorded(path: Path) -> None:
    with FakeOllama.record("http://127.0.0.1:1", path) as recorder:
        async with client_of(recorder) as client:
            with pytest.raises(OllamaError, match=r"the recorder cannot reach http://127\.0\.0\.1:1"):
                await client.version()
    assert lines_of(path) == [{"recording": 1}]


FAULTS: dict[str, tuple[str, type[Exception]]] = {
    "cut": (HEAD + HALF + '{"end": "cut"}', ConnectionBroken),
    "reset": (HEAD + HALF + '{"end": "reset"}', ConnectionBroken),
    "stall": (HEAD + HALF + '{"end": "stall"}', PhaseTimeout),
    "client left": (HEAD + HALF + '{"end": "client left"}', PhaseTimeout),
    "no end": (HEAD + HALF + '{"end": "no end"}', PhaseTimeout),
    "cut before the head": ('{"at": 1, "end": "cut"}', ConnectionBroken),
    "stall before the head": ('{"end": "stall"}', PhaseTimeout),
    "cut_at": ('{"status": 200, "cut_at": 150}\n' + HALF * 9, ConnectionBroken),
    "garbage line": (HEAD + HALF + '{"data": "garbage\\n"}', ProtocolError),
    "garbage bytes": (HEAD + '{"data": {"base64": "//79Cg=="}}', ProtocolError),
    "garbage before the head": ('{"raw": "garbage\\r\\n\\r\\n"}\n' + HEAD, ProtocolError),
    "garbage outside of the framing": (HEAD + HALF + '{"raw": "zz\\r\\n"}', ProtocolError),
    "a head by hand": ('{"head": "HTTP/1.1 xx\\r\\n\\r\\n"}', ProtocolError),
    "an error frame": (HEAD + HALF + '{"line": {"error": "out of memory"}}', StreamError),
    "a trickle": (HEAD + '{"trickle": "{\\"error\\": \\"slow\\"}\\n", "interval": 1}', StreamError),
    "endless": (HEAD + json.dumps({"endless": FRAME, "interval": 1}), PhaseTimeout),
    "a wrong length": (
        '{"status": 200, "headers": {"Content-Length": "999"}, "framing": "length"}\n' + HALF + '{"end": "cut"}',
        ConnectionBroken,
    ),
    "status": ('{"status": 503}\n{"json": {"error": "busy"}}', ServerBusyError),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_file_can_say_each_fault(path: Path, name: str) -> None:
    lines, error = FAULTS[name]
    path.write_text(HEADER + ASKED + lines + "\n")
    with FakeOllama.replay(path) as server:
        async with (
            nothing_left_behind(),
            AsyncClient(server.url, timeout=Timeouts(first_chunk=0.5, idle=0.3, total=0.8)) as client,
        ):
            with pytest.raises(error):
                await client.chat("fake", "hi", stream=True).collect()
        for connection in server.connections:
            assert connection.closed_at is not None or connection.wait_left()


async def test_several_lines_in_one_write(path: Path) -> None:
    path.write_text(f"{HEADER}{ASKED}{HEAD}{json.dumps({'lines': [FRAME, FRAME]})}\n\n{HALF}")
    with FakeOllama.replay(path) as server:
        assert [chunk["message"]["content"] for chunk in await chunks_of(server)] == ["Half"] * 3


# -- keys --


async def test_keys_are_never_recorded(fake_ollama: FakeOllama, path: Path) -> None:
    secrets = ["sk-bearer-1", "session-2", "api-key-3", "query-key-4", "pass word-5", "basic-pw-6", "set-cookie-7"]
    echoes = [Reply.json({"error": f"no such key: {text}"}) for text in (" ".join(secrets[:4]), secrets[5])]
    headers = {"Set-Cookie": f"s={secrets[6]}", "WWW-Authenticate": f"Bearer realm={secrets[6]}"}
    fake_ollama.script("/api/push", *echoes)
    fake_ollama.script("/api/chat", Reply([FRAME | {"done": True, "model": "upstream-pw-8"}], headers=headers))
    with FakeOllama.record(fake_ollama.url.replace("://", "://me:upstream-pw-8@"), path) as recorder:
        async with httpx.AsyncClient(base_url=recorder.url, trust_env=False) as client:
            given = {"Authorization": f"Bearer {secrets[0]}", "Cookie": f"a=1; s={secrets[1]}", "X-Api-Key": secrets[2]}
            body = {"model": "fake", "password": secrets[4], "options": [{"api_key": secrets[4], "num_ctx": 7}]}
            answer = await client.post(f"/api/push?key={secrets[3]}&x=1", headers=given, json=body)
            assert secrets[0] in answer.text
            await client.post("/api/push", auth=("me", secrets[5]))
            await client.post("/api/chat", json={"model": "fake"})
    first, second, third = fake_ollama.requests
    assert (first.header("authorization"), first.path) == (f"Bearer {secrets[0]}", f"/api/push?key={secrets[3]}&x=1")
    # What is compressed could not be read in the file.
    assert first.header("accept-encoding") == "identity"
    assert base64.b64decode((second.header("authorization") or "")[6:]).decode() == f"me:{secrets[5]}"
    assert base64.b64decode((third.header("authorization") or "")[6:]).decode() == "me:upstream-pw-8"
    text = path.read_text("utf-8")
    for secret in [
        *secrets,
        "upstream-pw-8",
        second.header("authorization") or "",
        third.header("authorization") or "",
    ]:
        assert secret not in text
        assert secret.removeprefix("Basic ") not in text
    asked = lines_of(path)[1]
    assert asked["request"] == "POST /api/push?key=[hidden]&x=[hidden]"
    assert asked["body"] == {
        "model": "fake",
        "password": "[hidden]",
        "options": [{"api_key": "[hidden]", "num_ctx": 7}],
    }
    # A request with another password is the same one.
    with FakeOllama.replay(path) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            again = await client.post("/api/push?key=other", json=body | {"password": "x"})
            assert again.json() == {"error": "no such key: [hidden] [hidden] [hidden] [hidden]"}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"api_keys": ["a-key-9"], "max_tokens": 7}', {"body": {"api_keys": ["[hidden]"], "max_tokens": 7}}),
        (b'{"login": {"password": {"value": "a-key-9"}}}', {"body": {"login": {"password": {"value": "[hidden]"}}}}),
        (b'{"private_key": "a-key-9", "author": "Kafka"}', {"body": {"private_key": "[hidden]", "author": "Kafka"}}),
        (b'{"api_key": "a-key-9", ', {"size": 23}),
        (b"user=me&password=a-key-9", {"size": 24}),
        (b"what is no JSON", {"text": "what is no JSON"}),
    ],
)
async def test_a_key_in_a_body_of_another_form_is_not_recorded(
    fake_ollama: FakeOllama, path: Path, body: bytes, kept: dict[str, Any]
) -> None:
    with FakeOllama.record(fake_ollama.url, path) as recorder:
        async with httpx.AsyncClient(base_url=recorder.url, trust_env=False) as client:
            await client.post("/api/push", content=body)
    asked = lines_of(path)[1]
    assert {name: asked[name] for name in kept} == kept
    assert "a-key-9" not in path.read_text("utf-8")
    # It is found again by its digest.
    with FakeOllama.replay(path) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            assert (await client.post("/api/push", content=body)).status_code in (400, 404)


async def test_a_key_in_a_body_that_is_nested_too_deeply_is_not_recorded(fake_ollama: FakeOllama, path: Path) -> None:
    deep = "[" * 20_000 + "]" * 20_000
    with FakeOllama.record(fake_ollama.url, path) as recorder:
        async with httpx.AsyncClient(base_url=recorder.url, trust_env=False) as client:
            answer = await client.post("/api/show", content=f'{{"api_key": "a-key-9", "model": {deep}}}'.encode())
    assert answer.json() == {"error": "exceeded max depth"}
    assert lines_of(path)[1]["request"] == "POST /api/show"
    assert "a-key-9" not in path.read_text("utf-8")


# -- files --


def test_a_recording_is_not_overwritten(fake_ollama: FakeOllama, path: Path) -> None:
    recorder = FakeOllama.record(fake_ollama.url, path)
    assert not path.exists()
    for _ in range(2):
        with recorder:
            assert httpx.get(f"{recorder.url}/api/version", trust_env=False).status_code == 200
    assert ends_of(path) == ["complete", "complete"]
    with pytest.raises(RecordingError, match="the file exists: name another one, or delete it"):
        FakeOllama.record(fake_ollama.url, path).start()
    with pytest.raises(FileNotFoundError):
        FakeOllama.record(fake_ollama.url, path.parent / "no" / "run.jsonl").start()


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, 'it begins with {"recording": 1}'),
        ("# Chat with fake\n", 1, "this is not JSON"),
        ('{"model": "fake", "messages": []}\n', 1, "this is not a recording"),
        ('{"recording": 2}\n', 1, "a newer version has written it"),
        ("[" * 100_000 + "\n", 1, "this is not JSON"),
        (HEADER + "[]\n", 2, "this is not a JSON object"),
        (HEADER + HEAD, 2, "does not begin with a line that has a 'request'"),
        (HEADER + '{"request": "/api/chat"}\n' + HEAD, 2, "give a method and a path"),
        (HEADER + '{"request": 7}\n' + HEAD, 2, "request=7: give a text"),
        (HEADER + '{"request": "POST /api/chat", "boody": {}}\n', 2, "did you mean 'body'?"),
        (HEADER + ASKED, 2, "this exchange has no answer"),
        (HEADER + ASKED + '{"end": "complete"}\n', 2, "this exchange has no answer"),
        (HEADER + ASKED + ASKED + HEAD, 2, "this exchange has no answer"),
        (HEADER + ASKED + '{"sttatus": 200}\n', 3, "did you mean 'status'?"),
        (HEADER + ASKED + "{}\n", 3, "a line of an answer needs one of: status, head, line"),
        (HEADER + ASKED + '{"status": 200, "line": {}}\n', 3, "a line of an answer needs one of"),
        (HEADER + ASKED + '{"status": "200"}\n', 3, "status='200': give a whole number"),
        (HEADER + ASKED + '{"status": 20}\n', 3, "status=20: give three digits, or the whole head as 'head'"),
        (HEADER + ASKED + '{"status": 200, "framing": "chunks"}\n', 3, "give one of chunked, length, close"),
        (HEADER + ASKED + '{"status": 200, "headers": []}\n', 3, "headers=[]"),
        (HEADER + ASKED + '{"status": 200, "cut_at": -1}\n', 3, "cut_at=-1"),
        (HEADER + ASKED + HEAD + HEAD, 4, "has a head already"),
        (HEADER + ASKED + HEAD + '{"at": "1", "line": {}}\n', 4, "at='1': give milliseconds"),
        (HEADER + ASKED + HEAD + '{"at": 0, "line": {}}\n', 4, "is before the line above (1)"),
        (HEADER + ASKED + HEAD + '{"at": 1e999, "line": {}}\n', 4, "at=inf"),
        (HEADER + ASKED + HEAD + '{"line": "text"}\n', 4, "use 'data' for text"),
        (HEADER + ASKED + HEAD + '{"lines": {}}\n', 4, "give a list of JSON objects"),
        (HEADER + ASKED + HEAD + '{"data": {"base64": "?"}}\n', 4, 'or {"base64": "..."}'),
        (HEADER + ASKED + HEAD + '{"data": 7}\n', 4, "data=7"),
        (HEADER + ASKED + HEAD + '{"end": "stal"}\n', 4, "give one of complete, cut, reset, stall"),
        (HEADER + ASKED + HEAD + '{"end": "cut"}\n' + HALF, 5, "has ended in the line before"),
        (
            HEADER + ASKED + '{"status": 200, "framing": "length"}\n{"endless": {}}\n',
            2,
            "an endless body has no length",
        ),
    ],
)
def test_a_file_that_is_not_a_recording_is_refused_with_its_line(
    path: Path, text: str, line: int, problem: str
) -> None:
    path.write_text(text)
    with pytest.raises(RecordingError) as caught:
        FakeOllama.replay(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith("docs/record.md says what a recording is made of")
    assert (caught.value.path, caught.value.line) == (str(path), line)


def test_a_file_that_cannot_be_read_is_refused(path: Path) -> None:
    with pytest.raises(RecordingError, match="the file cannot be read: No such file or directory"):
        FakeOllama.replay(path)


# -- the commands --

COMMANDS = [["ollama_async", "fake"], ["ollama_async.testing"]]


class Served:
    """A command that serves, until it is interrupted."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        self._process = subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1, text=True)
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline()
        self.url = next((word for word in self.said.split() if word.startswith("http://")), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        output = self._process.communicate(timeout=20)
        assert (self._process.returncode, output) == (130, ("", ""))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_a_command_records_and_plays(fake_ollama: FakeOllama, path: Path, command: list[str]) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Hello."))

    async def ask(url: str) -> str:
        async with AsyncClient(url, timeout=10) as client:
            return (await client.chat("fake", "hi")).text

    with Served(*command, str(path), "--record", fake_ollama.url) as served:
        assert await ask(served.url) == "Hello."
    with Served(*command, str(path), "--speed", "0") as served:
        assert served.said == f"The fake Ollama server is at {served.url} and plays {path} (Ctrl-C ends it)\n"
        assert await ask(served.url) == "Hello."
    with Served(*command, "--model", "mine") as served:
        async with AsyncClient(served.url, timeout=10) as client:
            assert [model.model for model in (await client.list()).models] == ["mine:latest"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["README.md"], "Error: README.md, line 1: this is not JSON"),
        (["--record", "localhost"], "Error: a server that records needs a file"),
        (["pyproject.toml", "--record", "localhost"], "Error: pyproject.toml: the file exists"),
    ],
)
def test_a_command_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run("fake", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    for said in (result.stderr, output.err):
        assert said.startswith(error)
        assert said.count("\n") == 1
