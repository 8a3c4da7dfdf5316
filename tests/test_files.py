"""Uploads, and models made of files on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from teardown.harness import BOUND, registrations, until

from ollama_async import AbortError, AsyncClient, CancelToken, PhaseTimeout, ProgressResponse, RequestError
from ollama_async.testing import FakeOllama, Gate, Reply

MIB = 1024 * 1024


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob(server: FakeOllama, data: bytes, *, there: bool) -> str:
    """Script the answers about one file."""
    digest = digest_of(data)
    replies = [Reply.json({}, 200 if there else 404)]
    if not there:
        replies.append(Reply.json({}, 201))
    server.script(f"/api/blobs/{digest}", *replies)
    return digest


def asked(server: FakeOllama) -> list[tuple[str, str]]:
    return [(request.method, request.path) for request in server.requests]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(2 * MIB + 77))
    return path


def monotonic(steps: list[ProgressResponse]) -> bool:
    done = [step.overall.completed for step in steps]
    fractions = [step.overall.fraction or 0.0 for step in steps]
    return done == sorted(done) and fractions == sorted(fractions)


async def test_an_upload_hashes_asks_and_sends(fake_ollama: FakeOllama, gguf: Path) -> None:
    data = gguf.read_bytes()
    digest = blob(fake_ollama, data, there=False)
    steps: list[ProgressResponse] = []
    async with AsyncClient(fake_ollama.url) as client:
        assert await client.upload(gguf, on_progress=steps.append) == digest
    assert asked(fake_ollama) == [("HEAD", f"/api/blobs/{digest}"), ("POST", f"/api/blobs/{digest}")]
    assert fake_ollama.requests[1].body == data
    assert list(dict.fromkeys(step.status for step in steps)) == ["hashing model.gguf", "uploading model.gguf"]
    assert monotonic(steps)
    assert {step.overall.total for step in steps} == {2 * len(data)}
    assert steps[-1].overall.fraction == 1.0
    assert (steps[-1].digest, steps[-1].completed, steps[-1].total) == (digest, len(data), len(data))


async def test_what_is_there_is_not_sent(fake_ollama: FakeOllama, gguf: Path) -> None:
    digest = blob(fake_ollama, gguf.read_bytes(), there=True)
    steps: list[ProgressResponse] = []
    async with AsyncClient(fake_ollama.url) as client:
        assert await client.upload(str(gguf), on_progress=steps.append) == digest
    assert asked(fake_ollama) == [("HEAD", f"/api/blobs/{digest}")]
    assert steps[-1].status == "already there: model.gguf"
    assert steps[-1].overall.fraction == 1.0


async def test_create_from_a_file(fake_ollama: FakeOllama, gguf: Path) -> None:
    digest = blob(fake_ollama, gguf.read_bytes(), there=False)
    frames = [{"status": "parsing GGUF"}, {"status": "success"}]
    fake_ollama.script("/api/create", Reply(frames))
    steps: list[ProgressResponse] = []
    async with AsyncClient(fake_ollama.url) as client:
        last = await client.create_from(
            "m", gguf, system="s", parameters={"seed": 1}, on_progress=steps.append, timeout=60, headers={"X-A": "1"}
        )
    assert last.status == "success"
    assert monotonic(steps)
    assert [step.status for step in steps][-2:] == ["parsing GGUF", "success"]
    assert json.loads(fake_ollama.requests[-1].body) == {
        "model": "m",
        "stream": True,
        "files": {"model.gguf": digest},
        "system": "s",
        "parameters": {"seed": 1},
    }
    assert {request.header("x-a") for request in fake_ollama.requests} == {"1"}


async def test_create_from_a_folder_and_an_adapter(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    folder, adapter = tmp_path / "model", tmp_path / "adapter.gguf"
    folder.mkdir()
    names = ["a.safetensors", "b.safetensors", "config.json", "tokenizer.model"]
    for name in [*names, "README.md"]:
        (folder / name).write_bytes(name.encode())
    adapter.write_bytes(b"adapter")
    digests = {name: blob(fake_ollama, name.encode(), there=False) for name in names}
    added = blob(fake_ollama, b"adapter", there=True)
    fake_ollama.script("/api/create", Reply([{"status": "success"}]))
    async with AsyncClient(fake_ollama.url) as client:
        await client.create_from("m", folder, adapter=adapter)
    body = json.loads(fake_ollama.requests[-1].body)
    assert (body["files"], body["adapters"]) == (digests, {"adapter.gguf": added})


async def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(
    fake_ollama: FakeOllama, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    async with AsyncClient(fake_ollama.url) as client:
        for path, says in [
            (tmp_path / "missing", "neither a file nor a folder"),
            (tmp_path, "has no model in it"),
            (7, "path=int"),
        ]:
            with pytest.raises(RequestError, match=says):
                await client.create_from("m", path)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="cannot read"):
            await client.upload(tmp_path / "missing")
        with pytest.raises(RequestError, match="on_progress=int"):
            await client.upload(tmp_path / "notes.txt", on_progress=1)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="model="):
            await client.create_from("", tmp_path)
    assert not fake_ollama.requests


@pytest.mark.parametrize("phase", ["hashing", "asking", "uploading", "creating"])
@pytest.mark.parametrize("way", ["token", "thread", "cancel", "client"])
async def test_each_part_can_be_stopped(fake_ollama: FakeOllama, gguf: Path, phase: str, way: str) -> None:
    data, gate = gguf.read_bytes(), Gate()
    digest = digest_of(data)
    never = Reply([gate, {"status": "success"}])
    if phase == "asking":
        fake_ollama.script(f"/api/blobs/{digest}", Reply([], before_head=[gate]))
    elif phase == "uploading":
        fake_ollama.script(f"/api/blobs/{digest}", Reply.json({}, 404), Reply([], read_body=False, before_head=[gate]))
    elif phase == "creating":
        blob(fake_ollama, data, there=False)
        fake_ollama.script("/api/create", never)
    token, begun = CancelToken(), asyncio.Event()

    def progress(step: ProgressResponse) -> None:
        if phase == "hashing":
            begun.set()

    async with AsyncClient(fake_ollama.url) as client:
        task = asyncio.create_task(client.create_from("m", gguf, token=token, on_progress=progress))
        if phase == "hashing":
            await asyncio.wait_for(begun.wait(), BOUND)
        else:
            await asyncio.to_thread(gate.wait_reached)
        stop(way, token, client, task)
        with pytest.raises(asyncio.CancelledError if way == "cancel" else AbortError):
            await asyncio.wait_for(asyncio.shield(task), BOUND)
        assert registrations(token) == 0
        gate.open()
        await until(lambda: not any(record.open for record in fake_ollama.connections), "the connections closed")
    assert not any(link.endswith("model.gguf") for link in open_files())


def stop(way: str, token: CancelToken, client: AsyncClient, task: asyncio.Task[Any]) -> None:
    if way == "token":
        token.abort("stop")
    elif way == "thread":
        thread = threading.Thread(target=token.abort)
        thread.start()
        thread.join(BOUND)
    elif way == "client":
        client.abort("stop")
    else:
        task.cancel()


def open_files() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return links


async def test_the_timeout_is_for_all_parts_together(fake_ollama: FakeOllama, gguf: Path) -> None:
    gate = Gate()
    blob(fake_ollama, gguf.read_bytes(), there=False)
    fake_ollama.script("/api/create", Reply([gate, {"status": "success"}]))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await asyncio.wait_for(client.create_from("m", gguf, timeout=0.5), BOUND)
        assert caught.value.phase == "total"
        assert caught.value.seconds <= 0.5
        with pytest.raises(PhaseTimeout):
            await client.upload(gguf, timeout=1e-6)


async def test_an_upload_is_sent_again_from_its_beginning(fake_ollama: FakeOllama, gguf: Path) -> None:
    data = gguf.read_bytes()
    digest = digest_of(data)
    busy = Reply.error(503, "busy")
    busy = Reply(busy.steps, status=503, headers={"Retry-After": "0"})
    fake_ollama.script(f"/api/blobs/{digest}", Reply.json({}, 404), busy, Reply.json({}, 201))
    steps: list[ProgressResponse] = []
    async with AsyncClient(fake_ollama.url, retries=1) as client:
        await client.upload(gguf, on_progress=steps.append)
    assert fake_ollama.requests[-1].body == data
    assert len(fake_ollama.requests) == 3
    assert monotonic(steps)


async def test_an_error_of_the_callers_function_comes_out(fake_ollama: FakeOllama, gguf: Path) -> None:
    blob(fake_ollama, gguf.read_bytes(), there=False)

    def fail_at(status: str) -> Any:
        def progress(step: ProgressResponse) -> None:
            if (step.status or "").startswith(status) and step.completed:
                raise LookupError(status)

        return progress

    async with AsyncClient(fake_ollama.url) as client:
        for status in ("hashing", "uploading"):
            with pytest.raises(LookupError, match=status):
                await client.upload(gguf, on_progress=fail_at(status))
        assert (await client.version()).version
