"""Bulk work: what is in the output is whole and there once, whatever ends the batch, and the same call resumes it."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("prompt_toolkit")

from cli.terminal import run

from ollama_async import AbortError, CancelToken, Host, Pool, RequestError
from ollama_async.batch import (
    BatchError,
    BatchProgress,
    BatchResult,
    HostsGone,
    InputRefused,
    OutputRefused,
    _run,
    batch,
)
from ollama_async.batch._journal import encode_line
from ollama_async.cli import _terminal as terminal
from ollama_async.pool import _hosts
from ollama_async.testing import Cut, FakeOllama, Reply, Stall

LIMIT = 60.0
KILLS = int(os.environ.get("BATCH_KILLS", "4"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hosts, "FIRST_OUTAGE", 0.05)
    monkeypatch.setattr(_hosts, "LONGEST_OUTAGE", 0.2)
    monkeypatch.setattr(_run, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_run, "_HOST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama(interval=0.0) as running:
        yield running


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def prompts(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "prompt": f"say {n}", "options": {"num_predict": 2}, **more} for n in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, of which each line is whole."""
    data = path.read_bytes() if path.exists() else b""
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def failed(output: Path) -> list[dict[str, Any]]:
    return lines(output.with_name(output.name + ".failed.jsonl"))


def asked(server: FakeOllama, route: str = "/api/chat") -> list[Any]:
    return [request.json() for request in server.requests if request.route == route]


# -- what is written --


async def test_each_row_gets_a_line(server: FakeOllama, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(30)), tmp_path / "out.jsonl"
    seen: list[BatchProgress] = []
    result = await batch(source, output, pool=server.url, model="fake", on_progress=seen.append)
    assert (result.done, result.skipped, result.failed, result.aborted, result.tokens) == (30, 0, 0, 0, 60)
    records = {record["id"]: record for record in lines(output)}
    assert set(records) == {f"r{n}" for n in range(30)}
    assert [records[f"r{n}"]["index"] for n in range(30)] == list(range(30))
    one = records["r7"]
    assert list(one) == ["id", "index", "status", "host", "model", "response", "input_hash"]
    assert (one["status"], one["host"], one["model"]) == ("ok", server.url, "fake")
    assert one["response"]["text"] == "This answer"
    assert one["response"]["done_reason"] == "length"
    assert (seen[-1].result.done, seen[-1].total, len(seen[-1].hosts)) == (30, 30, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.job.json",
        "out.jsonl.lock",
    ]


async def test_rows_are_prompts_chats_completions_and_embeddings(server: FakeOllama, tmp_path: Path) -> None:
    async def rows() -> AsyncIterator[Any]:
        yield "plain"
        yield {"messages": [{"role": "user", "content": "a"}], "think": True}
        yield {"input": "text"}
        yield {"input": ["two", "texts"], "id": "pair"}

    output = tmp_path / "out.jsonl"
    await batch(rows(), output, pool=server.url, model="fake", kind="generate", system="be brief", sort=True)
    records = lines(output)
    assert [record["id"] for record in records] == ["1", "2", "3", "pair"]
    assert [min(record["response"]) for record in records[2:]] == ["embedding", "embeddings"]
    assert asked(server, "/api/generate")[0]["system"] == "be brief"
    chat = asked(server)[0]
    assert [message["role"] for message in chat["messages"]] == ["system", "user"]
    assert chat["think"] is True


async def test_prompts_are_made_of_fields(server: FakeOllama, tmp_path: Path) -> None:
    row = {"name": "n1", "text": "hello", "lang": "French", "options": "not ours"}
    for name, settings, prompt in [
        ("a", {"template": "{lang}: {text} {0} {}"}, "French: hello"),
        ("b", {"prompt_field": "text"}, "hello"),
    ]:
        if "template" in settings:
            settings["template"] = "{lang}: {text}"
        await batch([row], tmp_path / name, pool=server.url, model="fake", id_field="name", **settings)
        assert [record["id"] for record in lines(tmp_path / name)] == ["n1"]
        assert asked(server)[-1]["messages"][-1]["content"] == prompt
    with pytest.raises(InputRefused, match="'nothing'"):
        await batch([row], tmp_path / "c", pool=server.url, model="fake", template="{nothing}")


async def test_openai_lines_in_and_out(server: FakeOllama, tmp_path: Path) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    rows = [
        {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "c2", "method": "POST", "url": "/v1/embeddings", "body": {"model": "fake", "input": "x"}},
        {"custom_id": "c3", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "model": "absent"}},
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = await batch(source, output, pool=server.url, openai=True)
    assert (result.done, result.failed) == (2, 1)
    by_id = {record["custom_id"]: record for record in lines(output)}
    completion = by_id["c1"]["response"]
    assert (completion["status_code"], by_id["c1"]["error"]) == (200, None)
    assert completion["body"]["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "This answer comes"},
        "finish_reason": "length",
    }
    assert completion["body"]["usage"]["completion_tokens"] == 3
    assert len(by_id["c2"]["response"]["body"]["data"][0]["embedding"]) == 32
    assert asked(server)[0]["options"] == {"temperature": 0, "num_predict": 3}
    error = failed(output)[0]
    assert (error["custom_id"], error["response"]["status_code"], error["error"]["code"]) == (
        "c3",
        404,
        "NotFoundError",
    )
    assert (await batch(source, output, pool=server.url, openai=True)).skipped == 3


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        1e-7,
        5e-324,
        1e16,
        1.7976931348623157e308,
        2**70,
        -0.0,
        "\ud800",
        "\u2028\u00fc\U0001f600\0\n",
        None,
        [],
        {"": 1},
    ],
)
def test_a_line_of_the_output_holds_a_value_exactly(value: Any) -> None:
    line = encode_line({"id": "1", "value": value})
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert repr(json.loads(line)["value"]) == repr(value)


async def test_vectors_are_made_together_and_can_be_base64(server: FakeOllama, tmp_path: Path) -> None:
    rows = [{"prompt": f"text {n}"} for n in range(40)]
    plain, packed = tmp_path / "a", tmp_path / "b"
    await batch(rows, plain, pool=server.url, model="fake", kind="embed", sort=True)
    assert sorted(len(call["input"]) for call in asked(server, "/api/embed")) == [8, 16, 16]
    await batch(rows, packed, pool=server.url, model="fake", kind="embed", sort=True, embedding="base64")
    for one, other in zip(lines(plain), lines(packed), strict=True):
        vector = struct.unpack("<32f", base64.b64decode(other["response"]["embedding"]))
        assert one["response"]["embedding"] == pytest.approx(vector, rel=1e-6)
    assert lines(plain)[0]["response"]["embedding"] != lines(plain)[1]["response"]["embedding"]


async def test_a_text_that_is_too_long_fails_alone(server: FakeOllama, tmp_path: Path) -> None:
    too_long = Reply.error(400, "the input length exceeds the context length")
    vectors = {"model": "fake", "total_duration": 1, "load_duration": 1, "prompt_eval_count": 4}

    def good(count: int) -> Reply:
        return Reply.json({**vectors, "embeddings": [[float(n)] for n in range(count)]})

    # 8 fail; of 4 and 4 the second; of 2 and 2 the first; of 1 and 1 the second.
    server.script("/api/embed", too_long, good(4), too_long, too_long, good(1), too_long, good(2))
    output = tmp_path / "out"
    result = await batch([f"t{n}" for n in range(8)], output, pool=server.url, model="fake", kind="embed", sort=True)
    assert (result.done, result.failed) == (7, 1)
    assert [(record["id"], record["error"]["type"]) for record in failed(output)] == [("6", "ContextLengthError")]
    assert [record["response"]["embedding"] for record in lines(output)] == [
        [0.0],
        [1.0],
        [2.0],
        [3.0],
        [0.0],
        [0.0],
        [1.0],
    ]


async def test_parquet_in_and_out(server: FakeOllama, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source, output, table = tmp_path / "in.parquet", tmp_path / "out.jsonl", tmp_path / "out.parquet"
    parquet.write_table(pa.table({"id": [f"r{n}" for n in range(2500)], "prompt": ["x"] * 2500}), source)
    options = {"num_predict": 1}
    with FakeOllama(interval=0.0) as other:
        result = await batch(
            source, output, pool=[server.url, other.url], model="fake", options=options, parquet=table, limit=1200
        )
    assert result.done == 1200
    written = parquet.read_table(table).to_pylist()
    assert {row["id"] for row in written} == {f"r{n}" for n in range(1200)}
    assert written[0]["text"] == "This"


# -- resuming --


async def test_the_same_call_goes_on_where_it_was(server: FakeOllama, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(20)), tmp_path / "out.jsonl"
    assert (await batch(source, output, pool=server.url, model="fake", limit=12)).done == 12
    result = await batch(source, output, pool=server.url, model="fake")
    assert (result.done, result.skipped) == (8, 12)
    assert len(asked(server)) == 20
    # A last line that a full disk or a power loss has cut short is cut off, and asked for again.
    whole = output.read_bytes()
    last = json.loads(whole.splitlines()[-1])["id"]
    output.write_bytes(whole[:-7])
    result = await batch(source, output, pool=server.url, model="fake")
    assert (result.done, result.skipped) == (1, 19)
    assert asked(server)[-1]["messages"][0]["content"] == f"say {last[1:]}"
    assert len({record["id"] for record in lines(output)}) == len(lines(output)) == 20
    # A hole is no such thing.
    output.write_bytes(whole.replace(b"{", b"", 1))
    with pytest.raises(OutputRefused, match="line 1, is not a record"):
        await batch(source, output, pool=server.url, model="fake")
    assert (await batch(source, output, pool=server.url, model="fake", restart=True)).done == 20


async def test_a_changed_row_is_asked_for_again_only_if_told(server: FakeOllama, tmp_path: Path) -> None:
    rows, output = prompts(5), tmp_path / "out"
    await batch(rows, output, pool=server.url, model="fake")
    rows[3]["prompt"] = "say something else"
    result = await batch(rows, output, pool=server.url, model="fake")
    assert (result.done, result.skipped, result.changed) == (0, 5, 1)
    assert (await batch(rows, output, pool=server.url, model="fake", changed=True)).done == 1
    assert sorted(record["id"] for record in lines(output)) == [f"r{n}" for n in range(5)]
    assert asked(server)[-1]["messages"][0]["content"] == "say something else"


async def test_what_can_pass_is_asked_for_again_and_what_lasts_only_if_told(server: FakeOllama, tmp_path: Path) -> None:
    output = tmp_path / "out"
    half = Reply([*Reply.chat("half", done=False).steps, Cut()])
    server.script(
        "/api/chat",
        *[Reply.error(500, "out of memory")] * 3,
        *[half] * 3,
        *[Reply.chat("cut", done=False)] * 3,
        Reply.error(400, "no such thing"),
    )
    result = await batch(prompts(5), output, pool=server.url, model="fake", concurrency=1)
    assert (result.done, result.failed) == (1, 4)
    found = failed(output)
    assert [(record["status"], record["error"]["type"], record["attempts"]) for record in found] == [
        ("error", "ServerError", 3),
        ("error", "ConnectionBroken", 3),
        ("truncated", "StreamTruncated", 3),
        ("error", "BadRequestError", 1),
    ]
    assert [record["partial"] and record["partial"]["text"] for record in found] == [None, "half", "cut", None]
    result = await batch(prompts(5), output, pool=server.url, model="fake", concurrency=1)
    assert (result.done, result.skipped) == (3, 2)
    # What lasts is there once.
    assert [record["error"]["type"] for record in failed(output)] == ["BadRequestError"]
    result = await batch(prompts(5), output, pool=server.url, model="fake", retry_failed=True)
    assert (result.done, result.skipped) == (1, 4)
    assert failed(output) == []


# -- what is refused --


async def refusal(expected: type[Exception], text: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(expected, match=text):
        await batch(*arguments, **{"model": "fake", **options})


async def test_bad_input_is_refused_before_the_first_call(server: FakeOllama, tmp_path: Path) -> None:
    output = tmp_path / "out"
    source = tmp_path / "in.jsonl"
    for content, text in [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2, is not JSON"),
        (b'{"prompt": "a"}\n[1]\n', "line 2, is not an object"),
        (b'{"prompt": "a"}\n\n{"no": 1}\n', "line 3, needs one of the fields"),
        (b'{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n', "two items have the id '1'"),
        (b'{"id": [], "prompt": "a"}\n', "invalid id"),
        (b"\xff\xfe\n", "line 1, is not JSON"),
        (b'{"custom_id": "a", "body": {"messages": [], "model": "m", "logit_bias": {}}}\n', "'logit_bias'"),
        (b'{"custom_id": "a", "url": "/v1/other", "body": {}}\n', "/v1/other"),
    ]:
        source.write_bytes(content)
        await refusal(InputRefused, text, source, output, pool=server.url)
    await refusal(InputRefused, "has no model", ["a"], output, pool=server.url, model=None)
    await refusal(InputRefused, "cannot read the input", tmp_path / "absent", output, pool=server.url)
    await refusal(InputRefused, "both the input and the output", source, source, pool=server.url)
    await refusal(InputRefused, "give a path", 7, output, pool=server.url)
    await refusal(RequestError, "embed_size", ["a"], output, pool=server.url, embed_size=0)
    assert not server.requests
    assert not output.exists()


async def test_an_output_that_is_not_ours_is_refused(server: FakeOllama, tmp_path: Path) -> None:
    output = tmp_path / "out"
    await batch(["a"], output, pool=server.url, model="fake", options={"num_predict": 1})
    await refusal(OutputRefused, "another model, options", ["a"], output, pool=server.url, model="other")
    await refusal(
        OutputRefused, "another kind", ["a"], output, pool=server.url, kind="embed", options={"num_predict": 1}
    )
    with open(tmp_path / "out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        await refusal(OutputRefused, "another batch is writing", ["a"], output, pool=server.url)
    await refusal(OutputRefused, "cannot write the output", ["a"], tmp_path / "absent" / "out", pool=server.url)
    await refusal(OutputRefused, "cannot write the output", ["a"], tmp_path, pool=server.url)
    (tmp_path / "foreign").write_text("my diary\n")
    await refusal(OutputRefused, "line 1, is not a record", ["a"], tmp_path / "foreign", pool=server.url)
    assert (tmp_path / "foreign").read_text() == "my diary\n"
    result = await batch(["a"], output, pool=server.url, model="other", force=True)
    assert (result.done, result.skipped, result.changed) == (0, 1, 1)


async def test_a_model_that_is_not_there_ends_it_early(server: FakeOllama, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(BatchError, match="the first 20 items failed alike") as raised:
        await batch(prompts(500), output, pool=server.url, model="absent")
    assert raised.value.exit_code == 1
    assert len(failed(output)) == raised.value.partial.failed <= 25


# -- hosts that go --


async def test_a_host_that_dies_hangs_or_comes_back_does_not_end_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        good, hung, dying = (stack.enter_context(FakeOllama(interval=0.001)) for _ in range(3))
        hung.script("/api/chat", *[Reply.chat("a")] * 3, Reply(before_head=[Stall()]), always=True)
        hung.script("/api/generate", Reply(before_head=[Stall()]), always=True)
        pool = Pool([good.url, hung.url, dying.url], slots=2, timeout=0.3)
        seen: list[int] = []

        def on_progress(progress: BatchProgress) -> None:
            seen.append(progress.result.done)

        output = tmp_path / "out"
        async with pool:
            work = asyncio.create_task(
                batch(prompts(150), output, pool=pool, model="fake", retries=5, on_progress=on_progress)
            )
            async with asyncio.timeout(LIMIT):
                while len(asked(dying)) < 5:
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(dying.stop)
                while len(asked(good)) < 60:
                    await asyncio.sleep(0.005)
                dying.start()
                result = await work
        assert (result.done, result.failed) == (150, 0)
        assert len({record["id"] for record in lines(output)}) == len(lines(output)) == 150


async def test_it_waits_for_all_hosts_to_come_back_and_then_no_longer(tmp_path: Path) -> None:
    server, output = FakeOllama(interval=0.0), tmp_path / "out"
    with server:
        await batch(prompts(3), output, pool=server.url, model="fake")
    began = time.monotonic()
    with pytest.raises(HostsGone) as raised:
        await batch(prompts(6), output, pool=server.url, model="fake", wait_hosts=0.3)
    assert time.monotonic() - began > 0.3
    assert (raised.value.exit_code, raised.value.partial.done, raised.value.partial.skipped) == (69, 0, 3)
    assert failed(output) == []
    work = asyncio.create_task(batch(prompts(6), output, pool=server.url, model="fake", wait_hosts=LIMIT))
    await asyncio.sleep(0.1)
    with server:
        async with asyncio.timeout(LIMIT):
            assert (await work).done == 3


async def test_all_hosts_may_go_and_come_back_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # They are away for longer than a call waits for one.
    monkeypatch.setattr(sys.modules[batch.__module__], "_PATIENCE", 0.02)
    output = tmp_path / "out"
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeOllama(interval=0.001)) for _ in range(2)]
        hosts = [Host(server.url, slots=2) for server in servers]
        work = asyncio.create_task(batch(prompts(200), output, pool=hosts, model="fake", wait_hosts=LIMIT))
        async with asyncio.timeout(LIMIT):
            while not all(len(asked(server)) > 5 for server in servers):
                await asyncio.sleep(0.005)
            for server in servers:
                await asyncio.to_thread(server.stop)
            had = len(lines(output))
            await asyncio.sleep(0.3)
            assert len(lines(output)) <= had + 4
            for server in servers:
                server.start()
            result = await work
        assert (result.done, result.failed) == (200, 0)
        assert len({record["id"] for record in lines(output)}) == len(lines(output)) == 200


async def test_there_are_never_more_calls_than_slots_and_input_is_read_as_it_is_needed(tmp_path: Path) -> None:
    read = 0

    def rows() -> Iterator[str]:
        nonlocal read
        for n in range(200):
            read = n + 1
            yield str(n)

    with FakeOllama(interval=0.001) as server:
        server.script("/api/chat", Reply.endless_chat(0.001), always=True)
        token = CancelToken()
        work = asyncio.create_task(
            batch(rows(), tmp_path / "out", pool=Pool(server.url, slots=3), model="fake", token=token)
        )
        await asyncio.to_thread(server.wait_for_requests, 3)
        await asyncio.sleep(0.05)
        assert (len(server.connections), len(asked(server)), read) == (3, 3, 3)
        token.abort()
        with pytest.raises(AbortError):
            await work


# -- stopping --


async def test_an_abort_keeps_the_partial_answers(server: FakeOllama, tmp_path: Path) -> None:
    server.script("/api/chat", Reply.chat("whole"), Reply.endless_chat(0.001), always=True)
    token, output = CancelToken(), tmp_path / "out"
    async with Pool(server.url, slots=8) as pool:
        work = asyncio.create_task(batch(prompts(50), output, pool=pool, model="fake", token=token))
        await asyncio.to_thread(server.wait_for_requests, 9)
        await asyncio.sleep(0.1)
        token.abort("that will do")
        for request in server.requests[1:]:
            assert request.connection.wait_left()  # the loop is blocked
        with pytest.raises(AbortError) as raised:
            await work
        result = raised.value.partial
        assert isinstance(result, BatchResult)
        assert (raised.value.reason, result.done, result.aborted, result.failed) == ("that will do", 1, 8, 0)
        assert [record["status"] for record in failed(output)] == ["aborted"] * 8
        assert all(record["partial"]["text"].startswith("This answer") for record in failed(output))
        assert len(asyncio.all_tasks()) == 1
        assert all(host.running == host.waiting == 0 for host in pool.hosts)
        # They are asked for again.
        server.forget()
        assert (await batch(prompts(50), output, pool=pool, model="fake")).done == 49
        assert failed(output) == []


async def test_cancelling_keeps_the_partial_answers_and_lets_go_of_the_output(
    server: FakeOllama, tmp_path: Path
) -> None:
    server.script("/api/chat", Reply.endless_chat(0.001), always=True)
    output = tmp_path / "out"
    work = asyncio.create_task(batch(prompts(9), output, pool=Pool(server.url, slots=4), model="fake"))
    await asyncio.to_thread(server.wait_for_requests, 4)
    await asyncio.sleep(0.1)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [record["status"] for record in failed(output)] == ["aborted"] * 4
    assert len(asyncio.all_tasks()) == 1
    server.forget()
    assert (await batch(prompts(9), output, pool=server.url, model="fake")).done == 9


async def test_an_abort_does_not_wait_for_the_input(server: FakeOllama, tmp_path: Path) -> None:
    async def rows() -> AsyncIterator[str]:
        yield "one"
        await asyncio.Event().wait()

    token = CancelToken()
    work = asyncio.create_task(batch(rows(), tmp_path / "out", pool=server.url, model="fake", token=token))
    await asyncio.to_thread(server.wait_for_requests, 1)
    token.abort()
    async with asyncio.timeout(LIMIT):
        with pytest.raises(AbortError):
            await work


# -- the command, killed and interrupted --


def command(*arguments: str | Path, program: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start ``ollama-async batch``."""
    begin = ["-c", program] if program else ["-m", "ollama_async"]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()]))
    if os.environ.get("PYTHONSAFEPATH"):
        path = os.environ.get("PYTHONPATH", "")
    inherited = {name: value for name, value in os.environ.items() if name != "OLLAMA_HOST"}
    return subprocess.Popen(
        [sys.executable, *begin, "batch", *map(str, arguments)],
        env={**inherited, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for_lines(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_killed_batch_loses_no_answer_and_has_none_twice(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(100 * KILLS)), tmp_path / "out.jsonl"
    by_chance, slots = random.Random(1), 8
    with FakeOllama(interval=0.002) as server:
        had = 0
        for kill in range(KILLS):
            process = command(source, "-o", output, "-m", "fake", "--host", f"{server.url}={slots}")
            if kill % 2:
                # At any moment: while it starts, looks at what is done, or works.
                time.sleep(by_chance.random() * 1.2)
            else:
                wait_for_lines(output, had + 20, process)
                time.sleep(by_chance.random() * 0.05)
            process.kill()
            process.communicate()
            had = output.read_bytes().count(b"\n") if output.exists() else 0
        code, out, err = finish(
            command(source, "-o", output, "-m", "fake", "--host", f"{server.url}={slots}", "--json")
        )
        assert code == 0, err
        assert json.loads(out)["done"] + json.loads(out)["skipped"] == 100 * KILLS
        records = lines(output)
        assert len(records) == 100 * KILLS
        assert {record["id"] for record in records} == {f"r{n}" for n in range(100 * KILLS)}
        # At most what ran is asked for twice.
        assert 100 * KILLS <= len(asked(server)) <= (100 + slots) * KILLS


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from ollama_async import __main__
__main__.main()
"""


def test_a_full_disk_ends_it_with_whole_lines(server: FakeOllama, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(200)), tmp_path / "out.jsonl"
    options = [source, "-o", output, "-m", "fake", "--host", f"{server.url}=4"]
    code, _, err = finish(command(*options, program=LIMITED))
    assert code == 74, err
    assert "cannot write" in err
    before = lines(output)
    assert 20 < len(before) < 200
    assert output.stat().st_size <= 20000
    code, _, err = finish(command(*options))
    assert code == 0, err
    assert lines(output)[: len(before)] == before
    assert len({record["id"] for record in lines(output)}) == len(lines(output)) == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or os.geteuid()
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode
    ):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_ends_it_with_whole_lines(
    server: FakeOllama, tmp_path: Path, small_disk: Path
) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(200)), small_disk / "out.jsonl"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 16384)
    options = [source, "-o", output, "-m", "fake", "--host", f"{server.url}=4"]
    code, _, err = finish(command(*options))
    assert code == 74, err
    assert "No space left on device" in err
    before = lines(output)
    assert 20 < len(before) < 200
    # It is not full any more, and holds all that there is.
    filler.unlink()
    code, _, err = finish(command(*options, "--limit", str(len(before) + 20)))
    assert code == 0, err
    assert lines(output)[: len(before)] == before
    assert len({record["id"] for record in lines(output)}) == len(lines(output)) == len(before) + 20


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_closes_all_streams_at_once_and_keeps_the_partial_answers(
    tmp_path: Path, number: int, status: int
) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(100)), tmp_path / "out.jsonl"
    with FakeOllama() as server:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
        process = command(source, "-o", output, "-m", "fake", "--host", f"{server.url}=64")
        server.wait_for_requests(64, timeout=LIMIT)
        time.sleep(0.3)
        stopped_at = time.monotonic()
        process.send_signal(number)
        code, _, err = finish(process)
        assert code == status, err
        left = [connection.left_at or float("inf") for connection in server.connections]
        assert len(left) == 64
        # Within 100 ms on an idle machine; here others may have the processor.
        assert max(left) - stopped_at < 1.0
        assert len({record["id"] for record in failed(output)}) == len(failed(output)) == 64
        assert all(record["partial"]["text"] for record in failed(output))
        assert "64 stopped, partial answers kept" in err


STUCK = """
import time
from ollama_async import __main__
from ollama_async.batch._journal import Journal
Journal.sync = lambda self: time.sleep(60)
__main__.main()
"""


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(9)), tmp_path / "out.jsonl"
    with FakeOllama() as server:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
        options = [source, "-o", output, "-m", "fake", "--host", server.url, "--fsync", "1000"]
        process = command(*options, program=STUCK)
        (request,) = server.wait_for_requests(1, timeout=LIMIT)
        process.send_signal(signal.SIGINT)
        assert request.connection.wait_left()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130


def test_the_command_says_what_is_wrong(server: FakeOllama, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    host = ("--host", server.url)
    assert run("batch", str(source), "-o", str(output), "-m", "fake", *host).exit_code == 0
    bad, twice, many = tmp_path / "bad.jsonl", tmp_path / "twice.jsonl", tmp_path / "many.jsonl"
    bad.write_text("{")
    write(twice, prompts(1) * 2)
    write(many, prompts(100))
    before = output.read_bytes()
    locked = write(tmp_path / "locked", [])
    lock = (tmp_path / "locked.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    for arguments, status, text in [
        ((bad, "-o", tmp_path / "x", "-m", "fake", *host), 2, "line 1, is not JSON"),
        ((twice, "-o", tmp_path / "x", "-m", "fake", *host), 2, "two items have the id 'r0'"),
        ((bad, "-o", output, "-m", "fake", *host), 2, "line 1, is not JSON"),
        ((source, "-o", locked, "-m", "fake", *host), 73, "another batch is writing"),
        ((many, "-o", tmp_path / "w", "-m", "absent", *host), 1, "the first 20 items failed alike"),
        ((source, "-o", output, "-m", "other", *host), 73, "another model"),
        ((source, "-o", tmp_path / "no" / "x", "-m", "fake", *host), 73, "cannot write the output"),
        ((source, "-o", tmp_path / "y", "-m", "absent", *host), 1, "3 failed"),
        ((source, "-o", tmp_path / "z", "-m", "fake", "--host", "127.0.0.1:1", "--wait-hosts", "0.1"), 69, "no host"),
        ((source, "-o", output, "-m", "fake", "--host", "a=b"), 2, "URL=SLOTS"),
        ((source, "-o", output, "-m", "fake", "--host", "http://a:b:c"), 2, "a:b:c"),
        ((source, "-o", output, "-m", "fake", "--format", "{", *host), 2, "JSON schema"),
        ((source, "-o", output, "-m", "fake", "--embed", "--generate", *host), 2, "give only one of them"),
        ((source, "-o", output, "-m", "fake", "--option", "seed", *host), 2, "--option: 'seed': write it as key=value"),
    ]:
        result = run("batch", *map(str, arguments))
        assert result.exit_code == status, (arguments, result.output)
        assert text in " ".join(result.stderr.replace("│", " ").split()), (arguments, result.stderr)
    # Whatever was refused, nothing is lost.
    assert output.read_bytes() == before
    lock.close()


def test_the_command_takes_the_options_of_a_model_as_chat_does(server: FakeOllama, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "Why?"}])
    output = tmp_path / "out.jsonl"
    given = ("--option", "seed=7", "--option", "stop=END", "--system", "Be brief.")
    result = run("batch", str(source), "-o", str(output), "-m", "fake", "--host", server.url, *given)
    assert result.exit_code == 0, result.output
    [asked] = [request.json() for request in server.requests if request.route == "/api/chat"]
    assert asked["options"] == {"seed": 7, "stop": ["END"]}
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_command_tells_in_json(server: FakeOllama, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    result = run("batch", str(source), "-o", str(output), "-m", "fake", "--host", server.url, "--json", "--sorted")
    told = json.loads(result.stdout)
    assert told.pop("seconds") > 0
    counts = {"done": 3, "skipped": 0, "changed": 0, "failed": 0, "aborted": 0, "tokens": 6}
    assert told == {**counts, "status": 0, "error": None}
    assert [record["index"] for record in lines(output)] == [0, 1, 2]


def test_without_a_server_it_uses_an_embedded_one_but_never_in_the_middle(
    server: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", prompts(4))

    def run_at(default: str, output: str) -> tuple[int, str]:
        # Named by neither option nor variable, it stands in for the server at the usual address.
        with monkeypatch.context() as patch:
            patch.setattr(terminal, "parse_host", lambda _: SimpleNamespace(url=default))
            result = run("batch", str(source), "-o", str(tmp_path / output), "-m", "fake", OLLAMA_HOST="")
        return result.exit_code, " ".join(result.stderr.split())

    code, told = run_at("http://127.0.0.1:1", "a")
    assert (code, "embedded fake server" in told) == (0, True)
    assert run_at("http://127.0.0.1:1", "a")[0] == 0
    code, told = run_at(server.url, "a")
    assert (code, "answers of the embedded fake server" in told) == (73, True)
    code, told = run_at(server.url, "b")
    assert code == 0, told
    code, told = run_at("http://127.0.0.1:1", "b")
    assert (code, "no Ollama server answers" in told) == (69, True)
    assert not (tmp_path / "b.embedded").exists()
