"""How many instructions a durable answer adds to a token, whatever else the machine does.

    python benchmarks/durable_instructions.py [--answers 100] [--rate 100] [--calls] [--stream]

By valgrind, in three processes: the tokens are read by themselves, as durable answers that nobody watches over
``memory://``, and the same over Redis. Each process is run twice, and what the longer run takes more is the price of
the tokens that it has more. They come as in ``durable.py``: one timer, a few answers at a time, so that the process
wakes for few tokens.

Under valgrind everything is slower, so time passes more slowly in there as well (``SLOWER``): for the loop, and so for
the tokens, for the 40 ms between two entries of an answer, and for leases. So each entry has as many tokens as it has
without valgrind. The instructions leave out the kernel, and how long each one takes.

``--stream`` reads the streams of a client in place of the generator of ``durable.py``. ``--calls`` counts calls of
Python functions, too; ``--profile memory|redis|none`` runs one of them under ``cProfile``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from durable import Clock, redis_server
from run import load_server

from ollama_async import AsyncClient
from ollama_async.durable import DurableAnswers

VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
SLOWER = 50
FEW, MANY = 20, 60
KINDS = {"none": "the load", "memory": "memory://", "redis": "Redis"}


class SlowSelector(selectors.DefaultSelector):
    """Waits longer than it was told to."""

    def __init__(self, slower: float) -> None:
        super().__init__()
        self._slower = slower

    def select(self, timeout: float | None = None) -> Any:
        return super().select(timeout and timeout * self._slower)


class SlowLoop(asyncio.SelectorEventLoop):
    """A loop for which time passes more slowly."""

    def __init__(self, slower: float) -> None:
        super().__init__(SlowSelector(slower))
        self._slower = slower

    def time(self) -> float:
        return time.monotonic() / self._slower


@contextlib.asynccontextmanager
async def _sources(options: argparse.Namespace) -> AsyncIterator[tuple[list[Any], Any]]:
    """Make what is read, and what has the tokens come."""
    if not options.stream:
        clock = Clock(options.rate)
        yield [clock.load(options.tokens) for _ in range(options.answers)], clock
        return
    model = f"paced-{options.tokens}-{int(options.rate / options.slower)}"
    async with AsyncClient(options.stream) as client:
        yield [client.chat(model, "hi", stream=True) for _ in range(options.answers)], None


async def _run(options: argparse.Namespace) -> None:
    """The process that is counted."""

    async def read(source: Any) -> None:
        async for _ in source:
            pass

    async with contextlib.AsyncExitStack() as stack:
        sources, clock = await stack.enter_async_context(_sources(options))
        if options.kind == "none":
            running = [asyncio.create_task(read(source)) for source in sources]
        else:
            url = options.url or "memory://"
            answers = await stack.enter_async_context(DurableAnswers.from_url(url, keep=36_000, lease=600))
            made = [await answers.begin(source, str(number)) for number, source in enumerate(sources)]
            running = [asyncio.create_task(answer.wait()) for answer in made]
        await asyncio.sleep(0)
        if clock is not None:
            await clock.run()
        await asyncio.gather(*running)
        if options.kind != "none":
            await answers._carrier.drain()  # noqa: SLF001


def _calls(options: argparse.Namespace) -> None:
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    _in_loop(options)
    sys.setprofile(None)
    print(calls)


def _in_loop(options: argparse.Namespace) -> None:
    with asyncio.Runner(loop_factory=lambda: SlowLoop(options.slower)) as runner:
        runner.run(_run(options))


def _profile(options: argparse.Namespace) -> None:
    profile = cProfile.Profile()
    profile.runcall(_in_loop, options)
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


def _counted(options: argparse.Namespace, kind: str, tokens: int, url: str, address: str, *, calls: bool) -> int:
    """Count the instructions of a process, or its calls."""
    slower = 4 if calls else SLOWER
    given = [f"--answers={options.answers}", f"--rate={options.rate}", f"--tokens={tokens}", f"--slower={slower}"]
    command = [sys.executable, __file__, f"--kind={kind}", f"--url={url}", f"--stream={address}", *given]
    before = () if calls else VALGRIND
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [*before, *command, *(["--calls"] if calls else [])], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr)
    if calls:
        return int(done.stdout)
    found = re.search(r"I +refs: +([\d,]+)", done.stderr) or sys.exit("valgrind has counted nothing")
    return int(found[1].replace(",", ""))


def _compare(options: argparse.Namespace) -> None:
    what = "the client's streams" if options.stream else "the load"
    print(f"{options.answers} answers of {options.rate:g} tokens/s, a token:")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(redis_server())
        redis = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
        address = stack.enter_context(load_server()) if options.stream else ""
        for calls in (False, True) if options.calls else (False,):
            name, alone = "calls of Python functions" if calls else "instructions", 0.0
            for kind in options.only.split(",") if options.only else KINDS:
                url = redis if kind == "redis" else ""
                counts: list[int] = []
                for tokens in (FEW, MANY):
                    client.flushall()
                    counts.append(_counted(options, kind, tokens, url, address, calls=calls))
                each = (counts[1] - counts[0]) / (MANY - FEW) / options.answers
                alone = each if kind == "none" else alone
                added = "" if kind == "none" else f", {each - alone:,.1f} added"
                print(f"{KINDS[kind] if kind != 'none' else what:22} {each:>10,.1f} {name}{added}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0, help="tokens a second, of each answer")
    parser.add_argument("--only", default="", help="which of them, such as none,redis")
    parser.add_argument("--calls", action="store_true", help="count the calls of Python functions as well")
    parser.add_argument("--stream", nargs="?", const="yes", default="", help="read the streams of a client")
    parser.add_argument("--profile", choices=KINDS, help="what to run under cProfile")
    for hidden, default in (("kind", ""), ("url", "")):
        parser.add_argument(f"--{hidden}", default=default, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=MANY, help=argparse.SUPPRESS)
    parser.add_argument("--slower", type=float, default=4.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        (_calls if options.calls else _in_loop)(options)
    elif options.profile:
        options.kind = options.profile
        with contextlib.ExitStack() as stack:
            if options.kind == "redis":
                client = stack.enter_context(redis_server())
                options.url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}"
            options.stream = options.stream and stack.enter_context(load_server())
            _profile(options)
    elif not shutil.which("valgrind"):
        parser.error("this needs valgrind: apt-get install valgrind")
    else:
        _compare(options)


if __name__ == "__main__":
    main()
