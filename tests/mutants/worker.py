"""Try mutants one after the other, each in a fork of this process, which has imported what all of them need.

Each line of the input is a mutant and its tests, each line of the output what became of one. Starting Python and pytest
anew for each would take four times as long.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

# What neither imports the package nor is a test.
SHARED = ["anyio._backends._asyncio", "asyncio", "httptools", "httpx", "hypothesis.strategies", "pydantic", "respx"]
PLUGINS = ["pytest_asyncio.plugin", "pytest_timeout", "xdist.plugin"]
OPTIONS = [
    *("-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-o", "timeout_method=thread"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
    *(option for plugin in PLUGINS for option in ("-p", plugin)),
]
# A test that takes longer than this hangs, which counts as noticed; on a busy machine a test may wait for long.
TEST_SECONDS = 30
CPU_SECONDS = 120
# After that the rest of the input is left to another process, so that others get their turn.
TURN_SECONDS = 120


def main() -> None:
    for name in [*SHARED, *PLUGINS, "pytest"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    begun = time.monotonic()
    # All of it is read first, so that the other side does not wait with its writing.
    for line in sys.stdin.readlines():
        job = json.loads(line)
        print(json.dumps({"key": job["key"], **attempt(job)}), flush=True)
        if time.monotonic() - begun > TURN_SECONDS:
            return


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    path = Path(job["path"])
    source = path.read_text()
    output = Path("output.txt")
    try:
        path.write_text(job["code"])
        child = os.fork()
        if not child:
            run(job, output)
        _, status = os.waitpid(child, 0)
    finally:
        path.write_text(source)
    text = output.read_text(errors="replace")
    red = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return {"green": status == 0, "red": red[1] if red else " ".join(text.split()[-12:])}


def run(job: dict[str, Any], output: Path) -> None:
    """Run the tests, and end the process."""
    with output.open("w") as file, open(os.devnull) as nothing:
        for ours, theirs in ((file, 1), (file, 2), (nothing, 0)):
            os.dup2(ours.fileno(), theirs)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(10 * TEST_SECONDS)
    # Nothing is written that a later mutant could be taken for.
    sys.dont_write_bytecode = not job["compile"]
    import pytest

    status = 1
    try:
        status = int(pytest.main([*OPTIONS, f"--timeout={TEST_SECONDS}", "-k", job["cut"], *job["tests"]]))
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
