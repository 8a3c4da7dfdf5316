"""All questions to all clients in one run, by turns: ``python benchmarks/run.py [--quick] [--out FOLDER]``.

``--case TEXT`` asks only the questions with this text in their names, ``--client NAME`` only these clients; both may be
given several times.

Each measurement is a process of its own against a load server that is another one. In each round every case is put to
every client, in an order that turns from round to round, so that whatever else the machine is doing hits all alike.
Out come ``results.json``, ``results.md`` (medians, with the least and the most in brackets, and ratios to
ollama-python's median) and plots.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import imports

HERE = Path(__file__).parent
OURS = "ollama_async"
REFERENCE = "ollama-python"
JS, GO = "ollama-js", "ollama-go"
ALL = [OURS, "floor", "aiohttp", "httpx2", "httpx", "openai", REFERENCE, JS, GO]
DISTRIBUTIONS = ["ollama", "openai", "aiohttp", "httpx", "httpx2", "httptools", "pydantic", "uvloop"]
LONGEST = 600  # seconds for one client and one case; the longest that is known takes 150
OLLAMA_JS = "ollama@0.6.4"
OLLAMA_GO = "github.com/ollama/ollama@v0.17.4"


@dataclass
class Case:
    """A question: a script, its options, and whom it is put to."""

    name: str
    script: str
    options: dict[str, Any] = field(default_factory=dict)
    peers: list[str] = field(default_factory=lambda: ALL)
    loops: tuple[str, ...] = ("asyncio",)


def without(*names: str) -> list[str]:
    return [name for name in ALL if name not in names]


def cases(*, quick: bool) -> Iterator[Case]:
    both = ("asyncio", "uvloop")
    yield Case(
        "1 stream, burst", "streams.py", {"streams": 1, "tokens": 20_000 if quick else 100_000, "rate": 0}, loops=both
    )
    seconds = 2 if quick else 4
    for streams in (100, 500, 1000, 2000):
        options = {"streams": streams, "tokens": 50 * seconds, "rate": 50}
        # With 2,000 some would take longer than anybody waits.
        peers = [OURS, "floor", "aiohttp", REFERENCE, GO] if quick or streams == 2000 else ALL
        if not quick or streams == 500:
            yield Case(f"{streams} streams, 50 tokens/s each", "streams.py", options, peers)
    yield Case("a short request", "short.py", {"requests": 200 if quick else 2000}, loops=both)
    yield Case("a stream of one token", "first.py", {"streams": 200 if quick else 2000}, without(JS))
    for streams in (1000,) if quick else (1, 100, 1000, 2000):
        yield Case(
            f"{streams} streams that begin at once", "storm.py", {"streams": streams}, [OURS, "floor", "aiohttp", GO]
        )
    yield Case("abort", "abort.py", {"aborts": 30 if quick else 500}, without("floor", GO))
    # As many as ollama-python has open at a time, and so fast that it can just follow.
    yield Case(
        "abort beside 90 others, 30 tokens/s each",
        "abort.py",
        {"aborts": 30 if quick else 200, "others": 90, "rate": 30},
        [OURS, "aiohttp", "httpx2", *([] if quick else ["httpx", "openai"]), REFERENCE],
    )
    yield Case(
        "memory of an idle stream",
        "memory.py",
        {"streams": 100},  # the most that ollama-python opens at a time
        without(JS, GO),
    )
    yield Case("slow reader, endless stream", "memory.py", {"seconds": 1 if quick else 5}, [OURS, "aiohttp", REFERENCE])
    for streams in (1, 100, 1000) if quick else (1, 10, 100, 500, 1000, 2000):
        options = {"streams": streams, "tokens": 20 if quick else 50, "rate": 10, "watch": False}
        yield Case(f"growth: {streams} streams, 10 tokens/s each", "streams.py", options, [OURS, "floor"])
    for streams in (0, 500) if quick else (0, 500, 1000, 2000):
        yield Case(
            f"abort 1 beside {streams} others", "abort.py", {"aborts": 20 if quick else 100, "others": streams}, [OURS]
        )
    for streams in (500, 2000) if quick else (250, 500, 1000, 2000):
        yield Case(f"abort all of {streams}", "abort_all.py", {"streams": streams}, [OURS])
    yield Case("a token's registrations", "registrations.py", peers=[OURS])


@contextmanager
def load_server() -> Iterator[str]:
    with subprocess.Popen([sys.executable, HERE / "load_server.py"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def javascript(folder: Path) -> list[str] | None:
    """Install ollama-js; None where there is no Node."""
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    shutil.copy(HERE / "peer.mjs", folder)
    (folder / "package.json").write_text("{}")
    subprocess.run(["npm", "install", "--silent", "--no-fund", "--no-audit", OLLAMA_JS], cwd=folder, check=True)
    return ["node", str(folder / "peer.mjs")]


def go(folder: Path) -> list[str] | None:
    """Build Ollama's own client for Go; None where there is no Go."""
    if not shutil.which("go"):
        return None
    shutil.copy(HERE / "peer.go", folder)
    (folder / "go.mod").write_text("module peer\n\ngo 1.24\n")
    for command in (["get", OLLAMA_GO], ["build", "-o", "peer", "peer.go"]):
        subprocess.run(["go", *command], cwd=folder, check=True, capture_output=True)
    return [str((folder / "peer").absolute())]


Others = dict[str, list[str] | None]  # what runs a client that is not in Python


def measure(case: Case, peer: str, loop: str, url: str, others: Others) -> dict[str, float] | None:
    options = json.dumps(case.options)
    if peer in (JS, GO):
        program = others.get(peer)
        if program is None or loop == "uvloop":
            return None
        command = [*program, case.script, url, options]
    else:
        command = [sys.executable, str(HERE / case.script), peer, url, "--loop", loop, "--options", options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        print(f"{case.name}, {peer}: nothing after {LONGEST} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{case.name}, {peer}: failed\n{done.stderr}", file=sys.stderr)
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def machine() -> dict[str, Any]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


Results = dict[str, dict[str, dict[str, list[float]]]]  # case, client, figure: one value a round


def run(rounds: int, folder: Path, chosen: list[Case]) -> Results:
    """Put each of the cases to each of its clients, so many times."""
    asked = {peer for case in chosen for peer in case.peers}
    others: Others = {name: build(folder) for name, build in ((JS, javascript), (GO, go)) if name in asked}
    results: Results = {}
    with load_server() as url:
        for turn in range(rounds):
            for case in chosen:
                peers = case.peers[turn % len(case.peers) :] + case.peers[: turn % len(case.peers)]
                for loop in case.loops:
                    for peer in peers:
                        figures = measure(case, peer, loop, url, others)
                        name = peer if loop == "asyncio" else f"{peer}, {loop}"
                        for figure, value in (figures or {}).items():
                            results.setdefault(case.name, {}).setdefault(name, {}).setdefault(figure, []).append(value)
                print(f"round {turn + 1} of {rounds}: {case.name}", file=sys.stderr)
    return results


def choose(given: argparse.Namespace) -> list[Case]:
    chosen = []
    for case in cases(quick=given.quick):
        peers = [peer for peer in case.peers if not given.client or peer in given.client]
        if peers and (not given.case or any(text in case.name for text in given.case)):
            chosen.append(replace(case, peers=peers))
    return chosen


def shown(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def markdown(results: Results, about: dict[str, Any], command: str, reference_name: str = REFERENCE) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['cores']} cores of {about['cpu']}, Python {about['python']}, {about['system']}"
    lines = [f"`{command}` on {where}; {versions}; load average at the start {about['load']:.1f}."]
    for case, clients in results.items():
        figures = list(dict.fromkeys(figure for seen in clients.values() for figure in seen))
        reference = clients.get(reference_name, {})
        lines += ["", f"**{case}**", "", "| client | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
        for client, seen in clients.items():
            cells = []
            for figure in figures:
                values = seen.get(figure)
                cell = shown(values) if values else ""
                if values and client != reference_name and reference.get(figure):
                    ratio = statistics.median(reference[figure]) / max(statistics.median(values), 1e-9)
                    cell += f", {ratio:.2f}x"
                cells.append(cell)
            lines.append(f"| {client} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Results, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for client in (OURS, "floor"):
        points = sorted(
            (int(case.split()[1]), statistics.median(clients[client]["cpu_us_per_token"]))
            for case, clients in results.items()
            if case.startswith("growth") and client in clients
        )
        left.plot(*zip(*points, strict=True), marker="o", label=client)
    left.set(title="CPU per token", xlabel="streams, 10 tokens/s each", ylabel="µs", xscale="log", ylim=(0, None))
    left.legend()
    case = next(name for name in results if name.endswith("50 tokens/s each") and "500" in name)
    clients = results[case]
    names = sorted(clients, key=lambda name: statistics.median(clients[name]["cpu_us_per_token"]))
    right.barh(names, [statistics.median(clients[name]["cpu_us_per_token"]) for name in names])
    right.set(title=f"CPU per token, {case}", xlabel="µs")
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of smaller cases, in under 3 minutes")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 1")
    parser.add_argument("--case", action="append", help="text in the name of a question")
    parser.add_argument("--client", action="append", choices=ALL)
    parser.add_argument("--reference", choices=ALL, default=REFERENCE, help="the client that the ratios are to")
    parser.add_argument("--out", type=Path, default=Path("build", "bench"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rounds = given.rounds or (1 if given.quick else 5)
    about = machine()
    begun = time.monotonic()
    results = run(rounds, given.out, choose(given))
    command = f"nox -s bench -- {'--quick ' if given.quick else ''}--rounds {rounds}"
    whole = not (given.case or given.client)
    if whole:
        results["import"] = imports.measure(3 if given.quick else 15)
    else:
        names = {"--case": given.case, "--client": given.client}
        command += "".join(f" {shlex.join([name, each])}" for name, some in names.items() for each in some or [])
    if given.reference != REFERENCE:
        command += f" --reference {given.reference}"
    (given.out / "results.json").write_text(
        json.dumps({"machine": about, "command": command, "results": results}, indent=1)
    )
    text = markdown(results, about, command, given.reference)
    (given.out / "results.md").write_text(text)
    if whole:
        plot(results, given.out)
    print(text)
    print(f"{time.monotonic() - begun:.0f} s; everything is in {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
