"""A connect storm: many streams that begin at once, each over a new connection, and how soon they have a chunk.

The server sends a first chunk as soon as it has a request, so the wait is what the client does before it and beside it.
As a script that is given no client it compares ours with the floor, by turns: ``python benchmarks/storm.py``.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

from harness import Figures, Peer, cpu_seconds, measure_once


async def measure(peer: Peer, url: str, streams: int) -> Figures:
    waits: list[float] = []
    everyone = asyncio.Event()
    stall, last_round = 0.0, time.monotonic()

    def look() -> None:
        # In each round of the loop: the wait for a timer would hide a stall that is shorter than it.
        nonlocal stall, last_round
        now = time.monotonic()
        stall, last_round = max(stall, now - last_round), now
        if not everyone.is_set():
            asyncio.get_running_loop().call_soon(look)

    def tick() -> None:
        waits.append(time.monotonic() - begun)
        if len(waits) == streams:
            everyone.set()

    cpu, begun = cpu_seconds(), time.monotonic()
    tasks = [asyncio.create_task(peer.read("silent", tick)) for _ in range(streams)]
    last_round = time.monotonic()
    look()
    await everyone.wait()
    cpu = cpu_seconds() - cpu
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "first_chunk_p50_ms": statistics.median(waits) * 1e3,
        "first_chunk_last_ms": max(waits) * 1e3,
        "cpu_us_per_stream": cpu / streams * 1e6,
        "longest_stall_of_the_loop_ms": stall * 1e3,
    }


def compare(rounds: int = 7) -> None:
    """Print the medians of the floor and of ours, and what ours is times the floor's."""
    from run import Case, load_server
    from run import measure as measure_case

    peers = ("floor", "ollama_async")
    for streams in (1, 100, 1000, 2000):
        case = Case(f"{streams} streams at once", "storm.py", {"streams": streams})
        seen: dict[str, list[Figures]] = {peer: [] for peer in peers}
        with load_server() as url:
            for turn in range(rounds):
                for peer in peers[:: 1 if turn % 2 else -1]:
                    figures = measure_case(case, peer, "asyncio", url, {})
                    if figures is not None:
                        seen[peer].append(figures)
        print(case.name)
        for name in seen["floor"][0]:
            floor, ours = (statistics.median(figures[name] for figures in seen[peer]) for peer in peers)
            print(f"  {name:30} floor {floor:8.2f}  ours {ours:8.2f}  {ours / floor:.2f}x")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        compare()
    else:
        measure_once(measure)
