"""Abort of what takes long besides answers, on a real Ollama server: pull, push, create, upload, embed, load.

The registry that models are pulled from and pushed to is a fake one, which falls silent in the middle.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from real.ollama_server import RealOllama
from real.tiny_model import write_tiny_model
from teardown.harness import BOUND, Baseline, nothing_left_behind, registrations, until

from ollama_async import AbortError, AsyncClient, CancelToken
from ollama_async.testing import FakeOllama, Reply, Stall

pytestmark = pytest.mark.real

SIZE = 5000


def manifest(layer: str) -> dict[str, Any]:
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": "sha256:" + "0a" * 32, "size": 9}
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": config,
        "layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": layer, "size": SIZE}],
    }


@pytest.fixture
def registry() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest_asyncio.fixture
async def nothing_left(real_ollama: RealOllama, registry: FakeOllama) -> AsyncIterator[Baseline]:
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(real_ollama: RealOllama, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(real_ollama.url) as made:
        yield made


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()


async def abort_ends_it(
    server: RealOllama, path: str, call: Awaitable[Any], token: CancelToken, goes_on: Callable[[], object]
) -> AbortError:
    """Abort a call when it is under way, and see the server end it while this loop stands still."""
    mark = server.mark()
    task = asyncio.ensure_future(call)
    await until(lambda: bool(goes_on()) or task.done(), "the middle of the call")
    assert not task.done(), task
    token.abort("stop")
    server.wait_for_request_end(mark, path, timeout=BOUND)
    server.wait_for_connections(0, timeout=BOUND)
    with pytest.raises(AbortError) as caught:
        await asyncio.wait_for(task, BOUND)
    assert registrations(token) == 0
    return caught.value


def name_at(registry: FakeOllama, model: str) -> str:
    return f"{registry.url}/library/{model}:latest"


@pytest.mark.parametrize("how", ["call", "stream", "resume"])
async def test_pull(
    client: AsyncClient, real_ollama: RealOllama, registry: FakeOllama, token: CancelToken, how: str
) -> None:
    layer = f"sha256:{os.urandom(32).hex()}"  # the server keeps the part that it got, and would go on from there
    registry.script("/v2/library/x/manifests/latest", Reply.json(manifest(layer)))
    blob = f"/v2/library/x/blobs/{layer}"
    # A server follows redirects to the same host by itself; to another name it takes them for where the file is.
    elsewhere = registry.url.replace("127.0.0.1", "localhost")
    length = {"Content-Length": str(SIZE)}
    registry.script(blob, Reply(headers=length), Reply(status=307, headers={"Location": f"{elsewhere}/data"}))
    registry.script("/data", Reply([b"x" * 100, Stall()], status=206, headers=length, framing="close"))
    seen: list[int | None] = []

    async def read() -> None:
        async for step in client.pull(name_at(registry, "x"), insecure=True, stream=True, token=token):
            seen.append(step.completed)

    def under_way() -> bool:
        downloading = any(request.path == "/data" for request in registry.requests)
        return downloading and (100 in seen or how != "stream")

    if how == "stream":
        call: Awaitable[Any] = read()
    else:
        call = client.pull(name_at(registry, "x"), insecure=True, token=token, resume=how == "resume")
    await abort_ends_it(real_ollama, "/api/pull", call, token, under_way)
    # And the server has given the download up.
    assert await asyncio.to_thread(registry.connections[-1].wait_left, BOUND)


async def test_push(client: AsyncClient, real_ollama: RealOllama, registry: FakeOllama, token: CancelToken) -> None:
    name = name_at(registry, "p")
    await client.copy(real_ollama.model, name)
    uploads = "/v2/library/p/blobs/uploads/"
    registry.script(uploads, Reply(before_head=[Stall()]))
    call = client.push(name, insecure=True, token=token)
    try:
        await abort_ends_it(
            real_ollama,
            "/api/push",
            call,
            token,
            lambda: any(request.path.startswith(uploads) for request in registry.requests),
        )
        assert await asyncio.to_thread(registry.connections[-1].wait_left, BOUND)
    finally:
        await client.delete(name)


async def test_create(client: AsyncClient, real_ollama: RealOllama, token: CancelToken, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "big.gguf"
    write_tiny_model(path, blocks=1000)
    digest = await client.create_blob(path)
    stream = client.create("big", files={path.name: digest}, quantize="q4_K_M", stream=True, token=token)

    def under_way() -> bool:
        step = stream.response
        return step is not None and bool(step.completed)

    error = await abort_ends_it(real_ollama, "/api/create", stream.collect(), token, under_way)
    assert "quantizing" in error.partial.status
    assert error.partial.completed < error.partial.total


async def test_upload(client: AsyncClient, real_ollama: RealOllama, token: CancelToken, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.write(os.urandom(16))
        file.truncate(300_000_000)
    moved: list[int] = []

    def look(step: Any) -> None:
        if step.status.startswith("uploading") and step.completed:
            moved.append(step.completed)
            # From within: afterwards there is nothing that says how much the kernel has taken by now.
            token.abort("stop")

    mark = real_ollama.mark()
    with pytest.raises(AbortError):
        await asyncio.wait_for(client.upload(path, token=token, on_progress=look), BOUND)
    assert 0 < moved[0] < 300_000_000
    real_ollama.wait_for_connections(0, timeout=BOUND)
    real_ollama.wait_for_log(mark, r"\| POST +\"/api/blobs/sha256:", timeout=BOUND)
    digest = real_ollama.wait_for_log(mark, r"sha256:[0-9a-f]{64}")[0]
    assert not await client.blob_exists(digest)


async def test_embed(client: AsyncClient, real_ollama: RealOllama, token: CancelToken) -> None:
    texts = ["one two three"] * 20_000  # that is 15 seconds and more
    before = real_ollama.runner_cpu_seconds()
    call = client.embed(real_ollama.model, texts, options={"num_thread": 1}, token=token)
    await abort_ends_it(real_ollama, "/api/embed", call, token, lambda: real_ollama.runner_cpu_seconds() > before + 0.2)
    await asyncio.to_thread(real_ollama.wait_until_idle)


async def test_load(client: AsyncClient, real_ollama: RealOllama, token: CancelToken) -> None:
    await client.unload(real_ollama.model)
    await until(lambda: not real_ollama.runner_pids(), "the end of the runner")
    call = client.load(real_ollama.model, token=token)
    await abort_ends_it(real_ollama, "/api/generate", call, token, real_ollama.runner_pids)
    await asyncio.to_thread(real_ollama.make_ready)
