"""What an open stream holds in memory, and what a slow reader of a fast endless one does."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import suppress
from pathlib import Path

from harness import Figures, Peer, measure_once, open_streams


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def idle(peer: Peer, streams: int) -> Figures:
    gc.collect()
    rss = resident()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tasks = await open_streams(peer, streams)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    grown = resident() - rss
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"held_kib_per_stream": held / streams / 1024, "resident_kib_per_stream": grown / streams / 1024}


async def slow(peer: Peer, seconds: float) -> Figures:
    """Read an endless stream, 500 chunks a second of the million that the server would send."""
    peer.pause = 0.002
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    task = asyncio.create_task(peer.read("endless", lambda: None))
    await asyncio.sleep(seconds)
    held = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    task.cancel()
    with suppress(Exception, asyncio.CancelledError):
        await task
    return {"most_held_kib": held / 1024}


async def measure(peer: Peer, url: str, streams: int = 0, seconds: float = 0) -> Figures:
    return await (idle(peer, streams) if streams else slow(peer, seconds))


if __name__ == "__main__":
    measure_once(measure)
