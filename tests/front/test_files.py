"""Uploads, and models made of files on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from teardown.harness import BOUND, registrations, until

from ollama_async import AbortError, AsyncClient, CancelToken, Image, PhaseTimeout, ProgressResponse, RequestError
from ollama_async._regular import RegularFile
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"parameters": {"temperature": float("inf")}}, "parameters.temperature cannot be written as JSON"),
        ({"parameters": {"num_ctx": "many"}}, "parameters: num_ctx"),
        ({"system": 5}, "system=int"),
        ({"messages": [5]}, r"messages\[0\] is not a message"),
        ({"license": [5]}, "license: give"),
        ({"info": {"a": object()}}, "info.a cannot be written as JSON"),
    ],
)
async def test_what_the_last_step_would_refuse_is_refused_before_the_first(
    fake_ollama: FakeOllama, gguf: Path, given: dict[str, Any], says: str
) -> None:
    steps: list[ProgressResponse] = []
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match=says):
            await client.create_from("m", gguf, on_progress=steps.append, **given)
    assert (fake_ollama.requests, steps) == ((), [])


@pytest.mark.parametrize("of", ["model", "folder", "adapter"])
async def test_a_name_that_is_not_utf8_is_refused_before_anything_is_hashed(
    fake_ollama: FakeOllama, gguf: Path, tmp_path: Path, of: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    bad = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.gguf"))
    try:
        bad.write_bytes(b"GGUF")
    except OSError:
        pytest.skip("this file system has no such names")
    steps: list[ProgressResponse] = []
    path, adapter = {"model": (bad, None), "folder": (folder, None), "adapter": (gguf, bad)}[of]
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match="not UTF-8; rename the file"):
            await client.create_from("m", path, adapter=adapter, on_progress=steps.append)
    assert (fake_ollama.requests, steps) == ((), [])


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
            (tmp_path / "missing", "no such file or folder"),
            (tmp_path, "has no model: it needs a file"),
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
    # A read that is under way in a thread ends first.
    await until(lambda: not any(link.endswith("model.gguf") for link in open_files()), "the file closed")


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


# -- what is not a regular file, or not in its folder --


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a" / "model"
    path.mkdir(parents=True)
    (path / "m.safetensors").write_bytes(b"weights")
    return path


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


IRREGULAR = pytest.mark.parametrize(
    ("make", "kind"), [(fifo, "FIFO"), (device, "device"), (listening, "socket"), (Path.mkdir, "folder")]
)


@IRREGULAR
@pytest.mark.parametrize("call", ["create_from", "folder", "adapter", "upload", "create_blob"])
async def test_only_regular_files_are_opened(
    fake_ollama: FakeOllama, folder: Path, make: Callable[[Path], None], kind: str, call: str
) -> None:
    if call == "create_from" and kind == "folder":
        pytest.skip("a folder is what it takes")
    path = folder / "config.json"
    make(path)
    async with AsyncClient(fake_ollama.url) as client:
        calls: dict[str, Callable[[], Any]] = {
            "create_from": lambda: client.create_from("m", path),
            "folder": lambda: client.create_from("m", folder),
            "adapter": lambda: client.create_from("m", folder / "m.safetensors", adapter=folder),
            "upload": lambda: client.upload(path),
            "create_blob": lambda: client.create_blob(path),
        }
        with pytest.raises(RequestError, match=f"config.json.*: this is a {kind}; give a regular file"):
            await asyncio.wait_for(calls[call](), BOUND)
    # All files are looked at before the first one is sent.
    assert not fake_ollama.requests


@IRREGULAR
async def test_an_image_is_a_regular_file(
    fake_ollama: FakeOllama, tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"picture")
    image = Image(value=path)
    path.unlink()
    make(path)
    async with AsyncClient(fake_ollama.url) as client:
        for given in (path, str(path)):
            with pytest.raises(RequestError, match="give a regular file"):
                await asyncio.wait_for(client.generate("m", "p", images=[given]), BOUND)
        # What it was when it was given, it need not be any more when it is read.
        with pytest.raises(RequestError, match=f"this is a {kind}"):
            await asyncio.wait_for(client.generate("m", "p", images=[image]), BOUND)
    assert not any(request.body for request in fake_ollama.requests)


async def test_a_link_out_of_the_folder_is_followed_on_demand_only(fake_ollama: FakeOllama, folder: Path) -> None:
    secret = folder.parent / "id_rsa"
    secret.write_bytes(b"private")
    # Beside the folder, with a name that begins alike.
    (folder.parent / "model-2").mkdir()
    (folder.parent / "model-2" / "id_rsa").write_bytes(b"private")
    link = folder / "tokenizer.json"
    async with AsyncClient(fake_ollama.url) as client:
        for target in (secret, "../id_rsa", "../model-2/id_rsa"):
            link.symlink_to(target)
            with pytest.raises(RequestError, match=r"tokenizer.json.*id_rsa.*outside .* follow_links=True"):
                await client.create_from("m", folder)
            with pytest.raises(RequestError, match="follow_links=True"):
                await client.create_from("m", folder / "m.safetensors", adapter=folder)
            link.unlink()
        assert not fake_ollama.requests
        link.symlink_to(secret)
        digests = [blob(fake_ollama, data, there=False) for data in (b"weights", b"private")]
        fake_ollama.script("/api/create", Reply([{"status": "success"}]))
        await client.create_from("m", folder, follow_links=True)
        with pytest.raises(RequestError, match="follow_links"):
            await client.create_from("m", folder, follow_links="yes")  # type: ignore[arg-type]
    assert json.loads(fake_ollama.requests[-1].body)["files"] == dict(
        zip(["m.safetensors", "tokenizer.json"], digests, strict=True)
    )


async def test_a_link_within_the_folder_or_to_it_is_followed(fake_ollama: FakeOllama, folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "parts" / "t").write_bytes(b"tokens")
    (folder / "tokenizer.json").symlink_to("parts/t")
    latest = folder.parent / "latest"
    latest.symlink_to(folder)
    digests = [blob(fake_ollama, data, there=True) for data in (b"weights", b"tokens")]
    fake_ollama.script("/api/create", Reply([{"status": "success"}]))
    async with AsyncClient(fake_ollama.url) as client:
        await client.create_from("m", latest)
    assert list(json.loads(fake_ollama.requests[-1].body)["files"].values()) == digests


@pytest.mark.parametrize("below", ["", "sub"])
async def test_the_cache_of_hugging_face_is_a_folder_of_links(
    fake_ollama: FakeOllama, tmp_path: Path, below: str
) -> None:
    snapshot, blobs = tmp_path / "models--m" / "snapshots" / "1" / below, tmp_path / "models--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "w").write_bytes(b"weights")
    link = snapshot / "m.safetensors"
    link.symlink_to(os.path.relpath(blobs / "w", snapshot))
    digest = blob(fake_ollama, b"weights", there=True)
    fake_ollama.script("/api/create", Reply([{"status": "success"}]))
    async with AsyncClient(fake_ollama.url) as client:
        await client.create_from("m", snapshot)
        assert json.loads(fake_ollama.requests[-1].body)["files"] == {"m.safetensors": digest}
        # That of another model is not this one's.
        other = tmp_path / "models--other" / "blobs"
        other.mkdir(parents=True)
        (other / "w").write_bytes(b"weights")
        link.unlink()
        link.symlink_to(other / "w")
        with pytest.raises(RequestError, match="follow_links=True"):
            await client.create_from("m", snapshot)


@pytest.mark.parametrize("when", ["before it is opened", "while it is opened"])
@pytest.mark.parametrize("proc", [True, False], ids=["by descriptor", "by path"])
async def test_only_opened_streams_count(
    fake_ollama: FakeOllama, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, proc: bool
) -> None:
    secret = folder.parent / "id_rsa"
    secret.write_bytes(b"private")
    path, real = folder / "config.json", folder / "real"
    path.write_bytes(b"{}")
    real.write_bytes(b"{}")
    opening, turns = os.open, iter(range(100))

    def exchange(target: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    def open_it(name: Any, *rest: Any) -> int:
        if name != str(path) or next(turns) == 0:
            return opening(name, *rest)
        exchange(secret)
        descriptor = opening(name, *rest)
        if when == "while it is opened":
            exchange(real)
        return descriptor

    monkeypatch.setattr(os, "open", open_it)
    if not proc:
        monkeypatch.setattr(os, "readlink", failing(os.readlink, "/proc/self/fd"))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match=r"follow_links=True|replaced"):
            await client.create_from("m", folder)
    assert not any(request.body == b"private" for request in fake_ollama.requests)


def failing(function: Callable[..., str], start: str) -> Callable[..., str]:
    def instead(path: Any, **rest: Any) -> str:
        if str(path).startswith(start):
            raise FileNotFoundError(path)
        return function(path, **rest)

    return instead


@pytest.mark.parametrize("change", ["longer", "shorter"])
async def test_a_file_that_changes_while_it_is_read_is_refused(
    fake_ollama: FakeOllama, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * (2 * MIB))

    def progress(step: ProgressResponse) -> None:
        os.truncate(path, 5 * MIB if change == "longer" else MIB)

    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match="it changed while it was read; give a complete file"):
            await client.upload(path, on_progress=progress)
    assert not fake_ollama.requests


# -- file systems that do not answer --


class Hang:
    """Where a worker thread stands until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        self.threads = 0

    def __call__(self, function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def instead(*args: Any, **rest: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and when(*args) and not self._go.is_set():
                self.threads += 1
                self.reached.set()
                assert self._go.wait(BOUND)
            return function(*args, **rest)

        return instead

    def go_on(self) -> None:
        self._go.set()


@pytest.mark.parametrize("where", ["listing", "stat", "open", "reading", "sending"])
@pytest.mark.parametrize("way", ["token", "thread", "cancel", "client", "timeout"])
async def test_a_stop_leaves_a_thread_behind_that_hangs_in_the_file_system(
    fake_ollama: FakeOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch, where: str, way: str
) -> None:
    hang, token = Hang(), CancelToken()
    digest = digest_of(gguf.read_bytes())
    fake_ollama.script(f"/api/blobs/{digest}", Reply.json({}, 404), Reply.json({}, 201))
    # A raw file's read() cannot be replaced.
    step = {"listing": "is_dir", "stat": "stat", "open": "open", "reading": "read", "sending": "rewind"}[where]
    home: Any = {"listing": Path, "stat": os, "open": os}.get(where, RegularFile)
    monkeypatch.setattr(home, step, hang(getattr(home, step), lambda *args: home is not os or args[0] == str(gguf)))
    async with AsyncClient(fake_ollama.url) as client:
        call = client.create_from("m", gguf, token=token, timeout=1.0 if way == "timeout" else 60)
        task = asyncio.create_task(call)
        assert await asyncio.to_thread(hang.reached.wait, BOUND)
        if way != "timeout":
            stop(way, token, client, task)
        expected = {"cancel": asyncio.CancelledError, "timeout": PhaseTimeout}.get(way, AbortError)
        with pytest.raises(expected):
            await asyncio.wait_for(asyncio.shield(task), BOUND)
        assert registrations(token) == 0
        hang.go_on()
        await until(lambda: not any(link.endswith("model.gguf") for link in open_files()), "the file closed")
        await until(lambda: not any(record.open for record in fake_ollama.connections), "the connections closed")
    assert hang.threads == 1


async def test_an_upload_that_was_answered_early_is_sent_again_when_its_thread_is_back(
    fake_ollama: FakeOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go, again = threading.Event(), threading.Event(), threading.Event()
    data = gguf.read_bytes()
    digest = digest_of(data)
    gate = Gate()
    busy = Reply([b"{}"], status=503, headers={"Retry-After": "0"}, read_body=False, before_head=[gate])
    fake_ollama.script(f"/api/blobs/{digest}", Reply.json({}, 404), busy, Reply.json({}, 201))
    reading, rewinding, turns = RegularFile.read, RegularFile.rewind, itertools.count()

    def read(file: RegularFile) -> bytes:
        # Hashing takes four reads, of which the last is empty; the sixth is in the middle of the first attempt.
        if next(turns) == 5:
            reached.set()
            assert go.wait(BOUND)
        return reading(file)

    def rewind(file: RegularFile) -> None:
        if reached.is_set():
            again.set()
        rewinding(file)

    monkeypatch.setattr(RegularFile, "read", read)
    monkeypatch.setattr(RegularFile, "rewind", rewind)
    async with AsyncClient(fake_ollama.url, retries=1) as client:
        task = asyncio.create_task(client.upload(gguf))
        assert await asyncio.to_thread(reached.wait, BOUND)
        gate.open()
        await until(lambda: len(fake_ollama.requests) == 3, "the second attempt")
        # Both would read from one position.
        assert not await asyncio.to_thread(again.wait, 0.3)
        go.set()
        assert await asyncio.wait_for(task, BOUND) == digest
    assert fake_ollama.requests[-1].body == data
