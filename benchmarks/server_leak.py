"""How soon a real Ollama server with one slot hangs, by who leaves its answers early: ``nox -s server-leak``.

The server hands each token to the response over an unbuffered channel; when the client leaves while a token is on its
way there, the slot is never given back. That is a fault of the server (seen with v0.24.0), which every client meets.
Each client in turn leaves answers at random moments; after each time the server is asked for one token. When that
does not come, and other routes answer, a slot has been lost; unloading the model gives it back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from real.ollama_server import RealOllama, find_server

HUNG_AFTER = 5.0  # seconds for one token, which takes 3 ms
OPTIONS = {"num_predict": -1, "num_thread": 1}
MESSAGES = [{"role": "user", "content": "hi"}]
Leave = Callable[[RealOllama], Awaitable[None]]


async def some_time() -> None:
    """Let the answer go on for a random time, so that it is left at no particular point of a token's way."""
    await asyncio.sleep(random.uniform(0.002, 0.05))


async def ours_abort_in_the_loop(server: RealOllama) -> None:
    from ollama_async import AbortError, AsyncClient

    async with AsyncClient(server.url) as client:
        stream = client.chat(server.model, MESSAGES, stream=True, options=OPTIONS)
        left = random.randint(1, 30)
        with contextlib.suppress(AbortError):
            async for _ in stream:
                left -= 1
                if not left:
                    stream.abort()


async def ours_abort(server: RealOllama) -> None:
    from ollama_async import AbortError, AsyncClient

    async with AsyncClient(server.url) as client:
        stream = client.chat(server.model, MESSAGES, stream=True, options=OPTIONS)
        await anext(stream)
        reader = asyncio.create_task(stream.collect())
        await some_time()
        stream.abort()
        with contextlib.suppress(AbortError):
            await reader


async def ours_cancel(server: RealOllama) -> None:
    from ollama_async import AsyncClient

    async with AsyncClient(server.url) as client:
        await cancel(client.chat(server.model, MESSAGES, stream=True, options=OPTIONS))


async def ollama_python_cancel(server: RealOllama) -> None:
    import ollama

    client = ollama.AsyncClient(server.url)
    await cancel(await client.chat(server.model, MESSAGES, stream=True, options=OPTIONS))
    await client.close()


async def cancel(stream: AsyncIterator[Any]) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    await anext(stream)
    reader = asyncio.create_task(read())
    await some_time()
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader


async def curl_killed(server: RealOllama) -> None:
    body = json.dumps({"model": server.model, "messages": MESSAGES, "options": OPTIONS})
    command = ("curl", "--silent", "--no-buffer", "--noproxy", "*", "--data", body, f"{server.url}/api/chat")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    await process.stdout.readline()
    await some_time()
    process.kill()
    await process.communicate()


def bare_socket(*, reset: bool) -> Leave:
    """A client without any library, which leaves by a FIN or by an RST."""

    async def leave(server: RealOllama) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({"model": server.model, "messages": MESSAGES, "options": OPTIONS}).encode()
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.read(65536)
        rest = asyncio.create_task(reader.read())
        await some_time()
        sock = writer.get_extra_info("socket")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            sock.shutdown(socket.SHUT_RDWR)
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await rest

    return leave


WAYS: dict[str, Leave] = {
    "ollama_async, `stream.abort()`, right after a chunk": ours_abort_in_the_loop,
    "ollama_async, `stream.abort()`": ours_abort,
    "ollama_async, `task.cancel()`": ours_cancel,
    "ollama-python, `task.cancel()`": ollama_python_cancel,
    "curl, killed": curl_killed,
    "a bare socket, FIN": bare_socket(reset=False),
    "a bare socket, RST": bare_socket(reset=True),
}


@dataclass
class Figures:
    left: int = 0
    lost: int = 0
    recovered_after: list[float] = field(default_factory=list)

    def row(self, way: str) -> str:
        every = f"{self.left / self.lost:.0f}" if self.lost else f"more than {self.left}"
        back = f"{statistics.median(self.recovered_after):.2f} s" if self.recovered_after else ""
        return f"| {way} | {self.left} | {self.lost} | {every} | {back} |"


def hangs(server: RealOllama) -> bool:
    """Whether a request for one token hangs."""
    try:
        server.generate(1, timeout=HUNG_AFTER)
    except TimeoutError:
        server.get("/api/version")  # it answers: else this is something else, and raises
        return True
    return False


def recover(server: RealOllama) -> float:
    """Unload the model, which gives the slots back, and return after how many seconds it has answered again."""
    begun = time.monotonic()
    server.unload()
    server.generate(1, timeout=30)
    return time.monotonic() - begun


async def provoke(server: RealOllama, leave: Leave, seconds: float, most_lost: int) -> Figures:
    figures = Figures()
    end = time.monotonic() + seconds
    while time.monotonic() < end and figures.lost < most_lost:
        mark = server.mark()
        await asyncio.wait_for(leave(server), 30)
        server.wait_for_request_end(mark)
        figures.left += 1
        if hangs(server):
            figures.lost += 1
            figures.recovered_after.append(recover(server))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="for each client, at most (default: 40)")
    parser.add_argument("--losses", type=int, default=5, help="of slots, after which a client is done (default: 5)")
    given = parser.parse_args()
    binary = find_server()
    if binary is None:
        raise SystemExit("server_leak: no Ollama server; .ci/install-ollama builds one (it needs Go)")
    print("| who leaves, and how | answers left | slots lost | one in | after unloading, the next answer within |")
    print("|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        RealOllama(binary, Path(folder), OLLAMA_NUM_PARALLEL="1") as server,
    ):
        for way, leave in WAYS.items():
            if leave is curl_killed and not shutil.which("curl"):
                print(f"| {way} | not tried: there is no curl | | | |")
                continue
            print(asyncio.run(provoke(server, leave, given.seconds, given.losses)).row(way), flush=True)


if __name__ == "__main__":
    main()
