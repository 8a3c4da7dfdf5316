"""This tree beside an older commit, by turns: ``python benchmarks/versions.py COMMIT [--rounds 15 | --instructions]``.

``--case TEXT`` asks only what has this text in its name.

Each measurement is a process of its own. A round asks both, and the next one asks them in the other order. Out comes a
table with both medians and the median of the rounds' ratios, so that a machine whose speed drifts does not decide.
Where there is ``taskset``, the server has the first core and the client the second one: a request that is answered at
once costs up to twice as much in a run in which both change places.

``--instructions`` counts the machine's instructions in place of the time, by valgrind, without the kernel. A difference
of one in a hundred shows, if little else runs: on a busy machine an answer arrives in more reads or in fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run import HERE, OURS, load_server

# A script, its options, and which of its figures are shown under which names.
CASES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("streams.py", {"streams": 1, "tokens": 100_000, "rate": 0}, {"cpu_us_per_token": "CPU a token, burst, us"}),
    ("streams.py", {"streams": 500, "tokens": 150, "rate": 50}, {"cpu_us_per_token": "CPU a token, 500 streams, us"}),
    ("short.py", {"requests": 1500}, {"cpu_us_per_request": "CPU a short request, us"}),
    ("first.py", {"streams": 1000}, {"cpu_us_per_stream": "CPU a stream of one token, us"}),
    ("memory.py", {"streams": 100}, {"held_kib_per_stream": "memory of an idle stream, KiB"}),
    (
        "abort.py",
        {"aborts": 300},
        {"seen_p50_us": "abort until the server sees it, p50, us", "call_p50_us": "abort, the call alone, p50, us"},
    ),
]

# A script, its other options, the option that is the number of calls or tokens, two numbers, the name of the figure.
# What the second run takes more than the first is the price of the calls that it has more. What an older commit does
# not have yet is left out.
COUNTED: list[tuple[str, dict[str, Any], str, tuple[int, int], str]] = [
    ("streams.py", {"streams": 1, "rate": 0}, "tokens", (20_000, 60_000), "instructions a token, burst"),
    ("short.py", {}, "requests", (100, 400), "instructions a short request"),
    ("first.py", {}, "streams", (100, 400), "instructions a stream of one token"),
    ("many.py", {}, "prompts", (200, 800), "instructions a prompt of a batch"),
]
VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")


def run_script(
    tree: Path, script: str, url: str, options: dict[str, Any], *before: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of this tree with the package of another one."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}
    command = [*before, sys.executable, "-c", _RUN, str(HERE), script, OURS, url, "--options", json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def measured(tree: Path, script: str, url: str, options: dict[str, Any], *before: str) -> dict[str, float]:
    """Ask one tree."""
    figures: dict[str, float] = json.loads(run_script(tree, script, url, options, *before).stdout.splitlines()[-1])
    return figures


def cores() -> tuple[str, ...]:
    """Leave this process, and so the server, one core; return what has a client use another one."""
    if not shutil.which("taskset") or len(os.sched_getaffinity(0)) < 2:
        return ()
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {first})
    return "taskset", "-c", str(second)


def instructions(tree: Path, script: str, url: str, options: dict[str, Any]) -> int:
    """Count the instructions of a run."""
    found = re.search(r"I +refs: +([\d,]+)", run_script(tree, script, url, options, *VALGRIND).stderr)
    assert found, "valgrind has counted nothing"
    return int(found[1].replace(",", ""))


def print_instructions(before: Path, after: Path) -> None:
    """Print the table of instructions."""
    print("| | before | after | after / before |\n|---|---|---|---|")
    with load_server() as url:
        for script, options, number, (few, many), name in COUNTED:
            if script == "many.py" and not (before / "ollama_async/batch").exists():
                continue
            old, new = [
                (
                    instructions(tree, script, url, {**options, number: many})
                    - instructions(tree, script, url, {**options, number: few})
                )
                / (many - few)
                for tree in (before, after)
            ]
            print(f"| {name} | {old:,.0f} | {new:,.0f} | {new / old:.3f} |", flush=True)


# The scripts import each other from their folder; the package has to come from the tree that is asked.
_RUN = (
    "import sys, runpy; folder = sys.argv.pop(1); sys.path.append(folder); sys.argv.pop(0); "
    "runpy.run_path(folder + '/' + sys.argv[0], run_name='__main__')"
)


def compare(before: Path, after: Path, rounds: int, text: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return the figures of both trees, one a round."""
    cases = [case for case in CASES if any(text in name for name in case[2].values())]
    seen: dict[str, tuple[list[float], list[float]]] = {
        name: ([], []) for _, _, names in cases for name in names.values()
    }
    pinned = cores()
    with load_server() as url:
        for turn in range(rounds):
            for script, options, names in cases:
                trees = [(0, before), (1, after)]
                for which, tree in trees if turn % 2 else reversed(trees):
                    figures = measured(tree, script, url, options, *pinned)
                    for figure, name in names.items():
                        seen[name][which].append(figures[figure])
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", default="", help="text in the name of a figure")
    parser.add_argument("--instructions", action="store_true", help="count instructions, which needs valgrind")
    given = parser.parse_args()
    if given.instructions and not shutil.which("valgrind"):
        parser.error("--instructions needs valgrind: apt-get install valgrind")
    here = HERE.parent
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        archive = subprocess.run(["git", "archive", given.commit], cwd=here, capture_output=True, check=True).stdout
        before.mkdir()
        subprocess.run(["tar", "-x"], cwd=before, input=archive, check=True)
        if given.instructions:
            print_instructions(before, here)
            return
        seen = compare(before, here, given.rounds, given.case)
    print("| | before | after | after / before, median of the rounds | least | most |\n|---|---|---|---|---|---|")
    for name, (old, new) in seen.items():
        ratios = sorted(b / a for a, b in zip(old, new, strict=True))
        cells = (statistics.median(old), statistics.median(new), statistics.median(ratios), ratios[0], ratios[-1])
        print(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
