"""What a prompt of a batch costs: rate, CPU and memory, beside ollama-python with a semaphore.

``python benchmarks/batch.py [--prompts 100000] [--at-once 64] [--peer ollama]``. The server is another process,
which answers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FRAMES = b"".join(
    json.dumps(
        {"model": "m", "message": {"role": "assistant", "content": text}, "done": done, "eval_count": 3}
    ).encode()
    + b"\n"
    for text, done in [("one", False), (" two", False), (" three", True)]
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n%b" % (
    len(FRAMES),
    FRAMES,
)


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
            self._data = self._data[end:]
            self._transport.write(ANSWER)


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


PEERS: dict[str, Callable[[str, Path, Path, int], Awaitable[None]]] = {"ollama_async": ours, "ollama": ollama}


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
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        asyncio.run(PEERS[given.peer](url, source, output, given.at_once))
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert len(output.read_bytes().splitlines()) == given.prompts
    server.terminate()
    print(
        f"{given.peer}: {given.prompts / seconds:.0f} prompts/s, {cpu / given.prompts * 1e6:.0f} us of CPU each, "
        f"{after.ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
