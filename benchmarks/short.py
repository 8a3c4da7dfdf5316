"""What a short request costs: one after the other over a kept connection."""

from __future__ import annotations

import time

from harness import Figures, Peer, cpu_seconds, measure_once


async def measure(peer: Peer, url: str, requests: int) -> Figures:
    cpu, begun = cpu_seconds(), time.monotonic()
    for _ in range(requests):
        await peer.ask()
    wall = time.monotonic() - begun
    return {"cpu_us_per_request": (cpu_seconds() - cpu) / requests * 1e6, "wall_us_per_request": wall / requests * 1e6}


if __name__ == "__main__":
    measure_once(measure)
