"""How soon after Ctrl-C the streams of a batch are closed, as the server sees it.

``python benchmarks/batch_stop.py [--runs 10] [--streams 64] [--signal SIGINT]``: each run is an ``ollama-async batch``
whose answers have no end. The server is in this process, and its clock is the clock of the signal.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ollama_async.testing import FakeOllama, Reply


def stopped(streams: int, number: signal.Signals, folder: Path) -> tuple[list[float], float, int]:
    """Return the milliseconds until each stream was closed, and until the command ended, and its partial answers."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(2 * streams)))
    with FakeOllama() as server:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
        command = ["batch", str(source), "-o", str(output), "-m", "fake", "--host", f"{server.url}={streams}"]
        process = subprocess.Popen([sys.executable, "-m", "ollama_async", *command], stderr=subprocess.DEVNULL)
        server.wait_for_requests(streams, timeout=60)
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(number)
        status = process.wait(60)
        ended = time.monotonic()
        assert status == 128 + number, status
        closed = [connection.left_at or float("inf") for connection in server.connections]
    partial = len(output.with_name("out.jsonl.failed.jsonl").read_bytes().splitlines())
    return [(at - began) * 1e3 for at in closed], (ended - began) * 1e3, partial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--signal", choices=["SIGINT", "SIGTERM"], default="SIGINT")
    given = parser.parse_args()
    closed: list[float] = []
    ended: list[float] = []
    partial = 0
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            times, end, kept = stopped(given.streams, signal.Signals[given.signal], Path(folder))
        closed += times
        ended.append(end)
        partial += kept
    print(
        f"{len(closed)} streams closed {statistics.median(closed):.1f} ms after {given.signal}, max {max(closed):.1f}; "
        f"the command ended after {statistics.median(ended):.1f} ms (max {max(ended):.1f}); {partial} partial answers"
    )


if __name__ == "__main__":
    main()
