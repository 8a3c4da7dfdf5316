"""What a prompt of a batch costs: rate, CPU and memory, beside other ways to ask for many answers.

``python benchmarks/batch.py [--prompts 100000] [--at-once 64] [--peer ollama]``. The server is another process,
which answers at once. The peers are ollama-python with a semaphore (``ollama``), and what flexllm and distilabel have
for this; run them with the Python of an environment that has them: ``pip install flexllm``, ``pip install
"distilabel[ollama]" requests``. ``--peer ray`` is a batch over a ``RayPool`` with two actors; the processes of Ray
count, without their start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Peer = Callable[[str, Path, Path, int], None]


def _answer(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


def _frame(text: str, **last: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"model": "m", "message": message, "done": bool(last), **last}).encode() + b"\n"


LAST = {"done_reason": "stop", "prompt_eval_count": 3, "eval_count": 3}
STREAM = _answer(b"application/x-ndjson", _frame("one") + _frame(" two") + _frame(" three", **LAST))
WHOLE = _answer(b"application/json", _frame("one two three", **LAST))
MESSAGE = {"role": "assistant", "content": "one two three"}
OPENAI = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
}
OPENAI_WHOLE = _answer(b"application/json", json.dumps(OPENAI).encode())
UNSTREAMED = (b'"stream":false', b'"stream": false')


class _Answers(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self._transport, self._data = transport, b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (head := self._data.find(b"\r\n\r\n")) >= 0:
            fields = self._data[:head].lower().split(b"content-length: ")
            end = head + 4 + (int(fields[1].split(b"\r\n")[0]) if len(fields) > 1 else 0)
            if len(self._data) < end:
                return
            whole = self._data.startswith(b"POST /v1/")
            body = self._data[head:end]
            self._data = self._data[end:]
            if whole:
                self._transport.write(OPENAI_WHOLE)
            else:
                self._transport.write(WHOLE if any(said in body for said in UNSTREAMED) else STREAM)


def serve(told: Connection) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Answers, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def ours(url: str, source: Path, output: Path, at_once: int) -> None:
    from ollama_async import Host
    from ollama_async.batch import batch

    await batch(source, output, pool=Host(url, slots=at_once), model="m")


async def ray(url: str, source: Path, output: Path, at_once: int) -> None:
    from ollama_async.batch import batch
    from ollama_async.ray import RayHost, RayPool

    hosts = [RayHost(url, at_once // 2, {name: 1}) for name in ("one", "two")]
    async with RayPool(hosts) as pool:
        await batch(source, output, pool=pool, model="m")


def start_ray() -> None:
    import ray

    ray.init(
        num_cpus=2, resources={"one": 1, "two": 1}, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )


async def ollama(url: str, source: Path, output: Path, at_once: int) -> None:
    import ollama

    client, free = ollama.AsyncClient(url), asyncio.Semaphore(at_once)
    with output.open("w") as file:

        async def ask(line: str) -> None:
            async with free:
                text = ""
                prompt = [{"role": "user", "content": json.loads(line)["prompt"]}]
                async for chunk in await client.chat("m", prompt, stream=True):
                    text += chunk.message.content or ""
            file.write(json.dumps({"text": text}) + "\n")

        with source.open() as lines:
            await asyncio.gather(*(ask(line) for line in lines))


def flexllm(url: str, source: Path, output: Path, at_once: int) -> None:
    # It speaks OpenAI's API only, which Ollama's server has, too.
    command = [str(Path(sys.executable).with_name("flexllm")), "batch", str(source), "-o", str(output)]
    command += ["-m", "m", "--base-url", f"{url}/v1", "--api-key", "none", "-c", str(at_once)]
    subprocess.run(command, check=True, cwd=output.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def distilabel(url: str, source: Path, output: Path, at_once: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from distilabel.models.llms import OllamaLLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    with source.open() as lines:
        rows = [{"instruction": json.loads(line)["prompt"]} for line in lines]
    with Pipeline("bench", cache_dir=output.parent / "cache") as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=at_once)
        load >> TextGeneration(llm=OllamaLLM(model="m", host=url), input_batch_size=at_once)
    # It runs its steps in processes, with an event loop each.
    done = pipeline.run(use_cache=False)
    with output.open("w") as file:
        for row in done["default"]["train"]:
            file.write(json.dumps({"text": row["generation"]}) + "\n")


def in_loop(peer: Callable[[str, Path, Path, int], Coroutine[Any, Any, None]]) -> Peer:
    return lambda url, source, output, at_once: asyncio.run(peer(url, source, output, at_once))


PEERS: dict[str, Peer] = {
    "ollama_async": in_loop(ours),
    "ollama": in_loop(ollama),
    "ray": in_loop(ray),
    "flexllm": flexllm,
    "distilabel": distilabel,
}


def cost(server: int, peer: str) -> tuple[float, float]:
    """The CPU seconds and the MB of this process, and of those that it has waited for; of all of Ray's, too.

    Args:
        server: Id of the process that does not count.
        peer: Who is measured.
    """
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu, memory = sum(each.ru_utime + each.ru_stime for each in both), max(each.ru_maxrss for each in both) / 1024
    if peer != "ray":
        return cpu, memory
    below, tick = {os.getpid()}, os.sysconf("SC_CLK_TCK")
    # Ids grow, so that a parent comes before its children.
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in below and int(folder.name) != server:
            below.add(int(folder.name))
            cpu += (int(fields[11]) + int(fields[12])) / tick
            memory += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return cpu, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--peer", choices=PEERS, default="ollama_async")
    given = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=[there], daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}"
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(given.prompts)))
        if given.peer == "ray":
            start_ray()
        assert server.pid is not None
        before, began = cost(server.pid, given.peer)[0], time.monotonic()
        PEERS[given.peer](url, source, output, given.at_once)
        seconds, (after, memory) = time.monotonic() - began, cost(server.pid, given.peer)
        cpu = after - before
        records = output.read_bytes().splitlines()
        assert len(records) >= given.prompts
        assert sum(b"one two three" in record for record in records) == given.prompts
    server.terminate()
    print(
        f"{given.peer}: {given.prompts / seconds:.0f} prompts/s, {cpu / given.prompts * 1e6:.0f} us of CPU each, "
        f"{memory:.0f} MB"
    )


if __name__ == "__main__":
    main()
