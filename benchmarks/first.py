"""How soon the first chunk of a stream is there, and what a stream of one token costs: one after the other."""

from __future__ import annotations

import statistics
import time

from harness import Figures, Peer, cpu_seconds, measure_once


async def measure(peer: Peer, url: str, streams: int) -> Figures:
    waits: list[float] = []
    cpu = cpu_seconds()
    for _ in range(streams):
        begun = time.monotonic()
        came: list[float] = []
        await peer.read("burst-1", lambda came=came: came.append(time.monotonic()))
        waits.append(came[0] - begun)
    return {
        "cpu_us_per_stream": (cpu_seconds() - cpu) / streams * 1e6,
        "first_chunk_p50_us": statistics.median(waits) * 1e6,
    }


if __name__ == "__main__":
    measure_once(measure)
