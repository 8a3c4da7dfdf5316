"""What a token costs: to register on one that has many registrations already, and to abort it."""

from __future__ import annotations

import gc
import time

from harness import Figures, Peer, measure_once


def of_one(registered: int, rounds: int = 2000) -> float:
    """Microseconds for one more registration and its removal."""
    from ollama_async import CancelToken

    token = CancelToken()
    kept = [token.on_abort(print) for _ in range(registered)]
    begun = time.process_time()
    for _ in range(rounds):
        token.on_abort(print).remove()
    took = time.process_time() - begun
    assert len(kept) == registered
    return took / rounds * 1e6


def of_abort(registered: int) -> float:
    """Microseconds of an abort for each callback."""
    from ollama_async import CancelToken

    token = CancelToken()
    called: list[object] = []
    kept = [token.on_abort(called.append) for _ in range(registered)]
    gc.collect()
    begun = time.process_time()
    token.abort("stop")
    took = time.process_time() - begun
    assert len(called) == len(kept) == registered
    return took / registered * 1e6


async def measure(peer: Peer, url: str) -> Figures:
    figures: Figures = {}
    for registered in (1, 100, 10_000):
        figures[f"registration_beside_{registered}_us"] = of_one(registered)
        figures[f"abort_of_{registered}_us_each"] = min(of_abort(registered) for _ in range(3))
    return figures


if __name__ == "__main__":
    measure_once(measure)
