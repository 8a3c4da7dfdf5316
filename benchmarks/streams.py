"""What a token costs: one stream as fast as it goes (``rate`` 0), or many streams at a pace."""

from __future__ import annotations

import asyncio
import time

from harness import Figures, Peer, cpu_seconds, get, measure_once


async def measure(peer: Peer, url: str, streams: int, tokens: int, rate: int, watch: bool = True) -> Figures:
    model = f"paced-{tokens}-{rate}" if rate else f"burst-{tokens}"
    first: list[float] = []
    worst_gap, last_look = 0.0, time.monotonic()

    async def one() -> int:
        begun = time.monotonic()
        seen = 0

        def tick() -> None:
            nonlocal seen
            if not seen:
                first.append(time.monotonic() - begun)
            seen = 1

        return await peer.read(model, tick)

    async def look() -> None:
        nonlocal worst_gap, last_look
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            worst_gap, last_look = max(worst_gap, now - last_look - 0.005), now

    # Looking is work, too: where there are few streams, most of it.
    looking = asyncio.create_task(look()) if rate and watch else None
    await get(url, "/pace")
    cpu, begun = cpu_seconds(), time.monotonic()
    chunks = sum(await asyncio.gather(*(one() for _ in range(streams))))
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - begun
    if looking:
        looking.cancel()
    if chunks < streams * tokens:
        raise RuntimeError(f"{chunks} chunks of {streams * tokens} came")
    first.sort()
    figures = {
        "cpu_us_per_token": cpu / (streams * tokens) * 1e6,
        "wall_s": wall,
        "first_chunk_p50_ms": first[len(first) // 2] * 1e3,
    }
    if rate:
        figures["times_the_pace"] = wall / (tokens / rate)
        figures["server_times_the_pace"] = await get(url, "/pace") / (tokens / rate)
    if looking:
        figures["longest_stall_of_the_loop_ms"] = worst_gap * 1e3
    return figures


if __name__ == "__main__":
    measure_once(measure)
