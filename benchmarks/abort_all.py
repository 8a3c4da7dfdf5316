"""What it costs to stop many streams at once: the call itself, the longest stall of the loop, until all have ended."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time

from harness import Figures, Peer, measure_once, open_streams


async def measure(peer: Peer, url: str, streams: int) -> Figures:
    tasks = await open_streams(peer, streams)
    # Or the pass over all that has just been made, which is due any time, would be taken for the abort's.
    gc.collect()
    await asyncio.sleep(0.1)

    loop = asyncio.get_running_loop()
    rounds = [(time.monotonic(), time.thread_time())]
    looking = True

    def look() -> None:
        rounds.append((time.monotonic(), time.thread_time()))
        if looking:
            loop.call_soon(look)

    loop.call_soon(look)
    await asyncio.sleep(0)
    begun, busy = rounds[-1]
    peer.leave_all(tasks)
    called, call_cpu = time.monotonic() - begun, time.thread_time() - busy
    await asyncio.gather(*tasks, return_exceptions=True)
    looking = False
    ended = time.monotonic() - begun
    stalls = [(wall - wall_0, cpu - cpu_0) for (wall_0, cpu_0), (wall, cpu) in itertools.pairwise(rounds)]
    return {
        "call_ms": called * 1e3,
        "call_cpu_us_per_stream": call_cpu / streams * 1e6,
        "all_ended_ms": ended * 1e3,
        "longest_stall_of_the_loop_ms": max(wall for wall, _ in stalls) * 1e3,
        "longest_stall_of_the_loop_cpu_ms": max(cpu for _, cpu in stalls) * 1e3,
    }


if __name__ == "__main__":
    measure_once(measure)
