"""What a chunk and a stream cost, in counts that are the same on every machine: calls, loop rounds, syscalls, objects.

No clock is read. Each count is taken from two runs of different length, so that what a stream costs once drops out. The
limits are a little above what was counted when they were written (see docs/performance.md); who makes a chunk dearer
meets them, and either finds a cheaper way or raises them with a reason.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real.needs import needs

from ollama_async.testing import FakeOllama, Reply, Stall

BOUND = 120.0
CLIENT = Path(__file__).with_name("costs_client.py")
FEW, MANY = 200, 1200

CHUNK = {"model": "m", "created_at": "now", "message": {"role": "assistant", "content": "x"}, "done": False}
LAST = {**CHUNK, "done": True}


def paced(chunks: int) -> Reply:
    """Chunks with pauses between them, so that each is read before the next comes.

    Where the machine is too slow for that, several are read at once, which is cheaper.
    """
    return Reply.chat(*["word "] * (chunks - 1), interval=0.002)


def burst(chunks: int) -> Reply:
    """Chunks that come together."""
    line = json.dumps(CHUNK).encode() + b"\n"
    return Reply([line * (chunks - 1) + json.dumps(LAST).encode() + b"\n"])


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


def client(server: FakeOllama, what: str, number: int, *before: str) -> dict[str, Any]:
    command = [*before, sys.executable, str(CLIENT), server.url, what, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == 0, done.stderr
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


def calls_a_chunk(server: FakeOllama, make: Callable[[int], Reply]) -> dict[str, float]:
    seen = []
    for chunks in (FEW, MANY):
        server.script("/api/chat", Reply.chat("x"), make(chunks))
        counted = client(server, "calls", chunks)
        assert counted.pop("chunks") == chunks
        seen.append(counted)
    few, many = seen
    return {name: (many[name] - few[name]) / (MANY - FEW) for name in many}


def test_a_chunk_that_comes_alone(server: FakeOllama) -> None:
    counted = calls_a_chunk(server, paced)
    assert counted["calls"] < 48, counted
    # One that brings the bytes, one that wakes the reader.
    assert counted["_run_once"] < 2.1
    # One timer a stream, none a chunk.
    assert counted["call_at"] < 0.01


def test_a_chunk_that_comes_with_others(server: FakeOllama) -> None:
    counted = calls_a_chunk(server, burst)
    assert counted["calls"] < 3, counted
    assert counted["_run_once"] < 0.5
    assert counted["call_at"] < 0.01


def test_what_an_idle_stream_holds(server: FakeOllama) -> None:
    server.script("/api/chat", Reply([CHUNK, Stall()]), always=True)
    counted = client(server, "idle", 200)
    # Its chunk, its connection and asyncio's part of that included.
    assert counted["bytes"] < 8.5 * 1024
    assert counted["objects"] < 90


def test_what_a_slow_reader_of_a_fast_server_holds(server: FakeOllama) -> None:
    chunks = 10_000
    server.script("/api/chat", Reply.chat("x"), burst(chunks))
    # The answer has 1 MB. Two reads of 64 KiB are enough that reading stops; what asyncio would read by itself is four
    # times as much.
    assert client(server, "slow", chunks)["peak"] < 512 * 1024


def syscalls(server: FakeOllama, what: str, number: int, report: Path) -> int:
    # Not those of files: how many an import takes depends on what is cached.
    strace = ("strace", "-c", "-f", "-e", "trace=!%file,read,fstat,lseek,ioctl,close,mmap,brk", "-o", str(report))
    client(server, what, number, *strace)
    total = re.search(r"^100\.00\s+\S+\s+(?:\d+\s+)?(\d+)\s+(?:\d+\s+)?total$", report.read_text(), re.MULTILINE)
    assert total is not None, report.read_text()
    return int(total[1])


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Where syscalls are counted."""
    if shutil.which("strace") is None:
        needs("strace", how="run .ci/install-parts, or sudo apt-get install strace")
    allowed = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, timeout=BOUND, check=False)
    if allowed.returncode:
        pytest.skip("this machine does not let processes be traced")
    return tmp_path / "report"


@pytest.mark.parametrize(("make", "limit"), [(burst, 0.1), (paced, 4.3)])
def test_syscalls_a_chunk(server: FakeOllama, make: Callable[[int], Reply], limit: float, report: Path) -> None:
    def counted(chunks: int) -> int:
        server.script("/api/chat", make(chunks))
        return syscalls(server, "plain", chunks, report)

    # A chunk that comes alone: two looks for events, one read, and one question of asyncio's for the process.
    assert (counted(MANY) - counted(FEW)) / (MANY - FEW) < limit


def test_syscalls_of_a_stream_that_is_aborted(server: FakeOllama, report: Path) -> None:
    server.script("/api/chat", Reply([CHUNK, Stall()]), always=True)
    few, many = (syscalls(server, "aborted", streams, report) for streams in (20, 120))
    # From its connecting on.
    assert (many - few) / 100 < 38
