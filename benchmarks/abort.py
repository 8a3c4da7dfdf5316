"""How long it takes from a stop until the server sees the client leave; each client is stopped as it is meant to be."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time

from harness import Figures, Peer, get, measure_once, open_streams


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


async def measure(peer: Peer, url: str, aborts: int, others: int = 0, rate: int = 10) -> Figures:
    """Stop that many streams one after the other, with others open that get so many tokens a second each."""
    # All of them, before the first one is stopped: some clients have one response that is the last one opened.
    background = await open_streams(peer, others, f"paced-100000-{rate}")
    await get(url, "/left")
    seen_after, took = [], []
    for _ in range(aborts):
        came = asyncio.Event()
        task = asyncio.create_task(peer.read("silent", came.set))
        await came.wait()
        await asyncio.sleep(0.002)  # so that nothing is left to do but to wait for the next token
        begun = time.monotonic_ns()
        stopping = peer.leave(task)
        took.append((time.monotonic_ns() - begun) / 1e3)
        if inspect.isawaitable(stopping):
            await stopping
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await task
        left: list[int] = []
        while not left:
            await asyncio.sleep(0.002)
            left = await get(url, "/left")
        seen_after.append((left[0] - begun) / 1e3)
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    return {
        "seen_p50_us": percentile(seen_after, 0.5),
        "seen_p99_us": percentile(seen_after, 0.99),
        "call_p50_us": percentile(took, 0.5),
        "call_p99_us": percentile(took, 0.99),
    }


if __name__ == "__main__":
    measure_once(measure)
