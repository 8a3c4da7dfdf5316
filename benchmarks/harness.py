"""What the scripts that measure have in common: a process measures one client once and prints its figures."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from peers import PEERS, Peer

Figures = dict[str, float]


def cpu_seconds() -> float:
    """The CPU time that this process has used, in the kernel as well."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def get(url: str, path: str) -> Any:
    """Ask the load server for what it has noted."""
    address = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(address[0], int(address[1]))
    writer.write(b"GET %b HTTP/1.1\r\n\r\n" % path.encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    return json.loads(body)


async def open_streams(peer: Peer, streams: int, model: str = "silent") -> list[asyncio.Task[int]]:
    """Open streams, and return when each has its first chunk."""
    waiting = set(range(streams))
    everyone = asyncio.Event()

    def tick(number: int) -> None:
        waiting.discard(number)
        if not waiting:
            everyone.set()

    tasks = [asyncio.create_task(peer.read(model, partial(tick, number))) for number in range(streams)]
    if streams:
        await everyone.wait()
    return tasks


def measure_once(measure: Callable[..., Awaitable[Figures]]) -> None:
    """Be the process that measures: ``script.py PEER URL --loop uvloop --options '{"streams": 5}'``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("url")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    async def run() -> Figures:
        peer = PEERS[given.peer](given.url)
        try:
            # Imports, pools and caches are made at the first request.
            await peer.ask()
            await peer.read("burst-10", lambda: None)
            return await measure(peer, given.url, **given.options)
        finally:
            await peer.close()

    if given.loop == "uvloop":
        import uvloop

        figures = uvloop.run(run())
    else:
        figures = asyncio.run(run())
    print(json.dumps(figures))


__all__ = ["Figures", "Peer", "cpu_seconds", "get", "measure_once", "open_streams"]
