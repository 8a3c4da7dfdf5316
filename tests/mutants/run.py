"""Break the core in small ways, one at a time, in copies of the tree, and see whether a test notices.

``nox -s mutants`` runs this; mutants.toml says what is broken and which tests have to notice. A run that was
interrupted goes on where it was. It fails if under 95 % are killed, or if one survives that
docs/testing-the-library.md does not list with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from mutants.operators import Provider
from parso.tree import NodeOrLeaf, search_ancestor

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())
PAGE = ROOT / "docs" / "testing-the-library.md"
ENOUGH = 0.95
BATCH = 100

plugins.OPERATOR_PROVIDERS["ours"] = Provider()


# -- what is broken --


@dataclass(frozen=True)
class Mutant:
    module: str
    operator: str
    line: int
    code: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.module}\n{self.code}".encode()).hexdigest()[:16]

    @property
    def change(self) -> tuple[str, str, str]:
        return self.module, self.before, self.after


def path_of(module: str) -> str:
    return f"ollama_async/{module}.py"


def mutants_of(module: str, most: int | None) -> list[Mutant]:
    """The mutants of a module in an order that is random and always the same: the first ones are a fair sample."""
    source = (ROOT / path_of(module)).read_text()
    tree = get_ast(source)
    operators = {name: plugins.get_operator(name)() for name in plugins.operator_names() if is_used(name)}
    places = []
    for name, operator in operators.items():
        found = ((node, at) for node in ast_nodes(tree) for at, _ in operator.mutation_positions(node))
        places += [(name, number, at) for number, (node, at) in enumerate(found) if not is_noise(node, at)]
    random.Random(15).shuffle(places)
    mutants: dict[str, Mutant] = {}
    for name, number, at in places:
        code = mutate_code(source, operators[name], number)
        # Two operators may lead to the same.
        if code is not None and code not in mutants and is_python(code):
            mutants[code] = Mutant(module, name, at[0], code, *changed(source, code))
        if len(mutants) == most:
            break
    return list(mutants.values())


def is_used(operator: str) -> bool:
    return any(re.fullmatch(pattern, operator) for pattern in SETTINGS["operators"])


def is_noise(node: NodeOrLeaf, at: tuple[int, int]) -> bool:
    """Whether no test could or should notice: annotations, texts for people, and what only a type checker reads."""
    leaf = (node.get_leaf_for_position(at) if hasattr(node, "children") else node) or node
    below, above = leaf, leaf.parent
    while above is not None:
        match above.type:
            case "parameters":
                # The marks between parameters.
                return True
            case "param" if below is leaf or below is above.annotation:
                return True
            case "annassign" if below is above.children[1]:
                return True
            case "tfpdef" if below is above.children[-1]:
                return True
            case "funcdef" if below is above.annotation or above.name.value == "__repr__":
                return True
            case "fstring":
                return True
            case "classdef" if "Protocol" in above.get_code().partition(":")[0]:
                return True
            case "if_stmt" if above.children[1].get_code().strip() == "TYPE_CHECKING":
                return True
        below, above = above, above.parent
    statement = search_ancestor(leaf, "expr_stmt")
    return statement is not None and statement.get_first_leaf().value == "__slots__"


def is_python(code: str) -> bool:
    try:
        compile(code, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def changed(source: str, code: str) -> tuple[str, str]:
    """The lines that differ, before and after."""
    before, after = source.splitlines(), code.splitlines()
    gone: list[str] = []
    come: list[str] = []
    for kind, first, behind, first_after, behind_after in difflib.SequenceMatcher(None, before, after).get_opcodes():
        if kind != "equal":
            gone += before[first:behind]
            come += after[first_after:behind_after]
    return " ".join(" ".join(gone).split()), " ".join(" ".join(come).split())


# -- whether a test notices --


class Bench:
    """A copy of the tree in which one mutant at a time is tried."""

    def __init__(self, folder: Path, under: list[str]) -> None:
        self.folder = folder
        self.under = under

    def make(self, modules: Iterable[str]) -> None:
        """Copy the tree, see the tests green without a mutant, and compile everything but what is going to change."""
        shutil.rmtree(self.folder, ignore_errors=True)
        leave_out = shutil.ignore_patterns("__pycache__", ".*", "build")
        for name in ("ollama_async", "tests", "docs", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=leave_out)
        for name in ("pyproject.toml", "noxfile.py", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, self.folder / name)
        whole = [Mutant(module, "", 0, (ROOT / path_of(module)).read_text(), "", "") for module in modules]
        while whole:
            for result in self.results(whole, compile_all=True):
                module = whole.pop(0).module
                if not result["green"]:
                    raise SystemExit(f"the tests of {module} fail without a mutant: {result['red']}")
        for module in SETTINGS["modules"]:
            path = self.folder / path_of(module)
            for compiled in path.parent.joinpath("__pycache__").glob(f"{path.stem}.*.pyc"):
                compiled.unlink()

    def copy(self, other: Bench) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(other.folder, self.folder)

    def results(self, mutants: list[Mutant], *, compile_all: bool = False) -> Iterator[dict[str, Any]]:
        """What became of the first of some mutants: of as many as one process gets through in its turn."""
        env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(self.folder)}
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        jobs = [
            {
                "key": mutant.key,
                "path": path_of(mutant.module),
                "code": mutant.code,
                "tests": SETTINGS["modules"][mutant.module],
                "cut": SETTINGS["cut"],
                "compile": compile_all,
            }
            for mutant in mutants
        ]
        command = [*self.under, sys.executable, str(Path(__file__).with_name("worker.py"))]
        with subprocess.Popen(
            command, cwd=self.folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            with contextlib.suppress(BrokenPipeError), worker.stdin:
                worker.stdin.write("".join(json.dumps(job) + "\n" for job in jobs))
            yield from map(json.loads, worker.stdout)


class Results:
    """What became of each mutant, in a file that outlives the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self.killed: dict[str, bool] = {entry["key"]: entry["killed"] for entry in map(json.loads, lines)}

    def add(self, mutant: Mutant, result: dict[str, Any]) -> None:
        killed = not result["green"]
        entry = {"key": mutant.key, "module": mutant.module, "line": mutant.line, "operator": mutant.operator}
        entry |= {"before": mutant.before, "after": mutant.after, "killed": killed, "by": killed and result["red"]}
        with self._lock, self._path.open("a") as file:
            self.killed[mutant.key] = killed
            file.write(json.dumps(entry) + "\n")
            if not killed:
                print(f"survived: {mutant.module}:{mutant.line}: {mutant.before} -> {mutant.after}", flush=True)


def try_all(todo: list[Mutant], benches: list[Bench], results: Results) -> None:
    todo.reverse()
    lock = threading.Lock()

    def work(bench: Bench) -> None:
        while True:
            with lock:
                batch = [todo.pop() for _ in range(min(BATCH, len(todo)))]
            if not batch:
                return
            known = {mutant.key: mutant for mutant in batch}
            for result in bench.results(batch):
                results.add(known.pop(result["key"]), result)
            with lock:
                todo.extend(reversed(known.values()))

    with ThreadPoolExecutor() as threads:
        list(threads.map(work, benches))


# -- the verdict --


def listed() -> set[tuple[str, ...]]:
    """The survivors that the documentation explains: module, line, and what the line is changed into."""
    if not PAGE.exists():
        return set()
    rows = (re.split(r"(?<!\\)\|", line.strip()) for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    return {tuple(cell.strip().strip("`").strip().replace("\\|", "|") for cell in row[1:4]) for row in rows}


def report(module: str, mutants: list[Mutant], results: Results, equivalent: set[tuple[str, ...]]) -> bool:
    """Print the figures of a module and its survivors; return whether they are good enough."""
    tried = [mutant for mutant in mutants if mutant.key in results.killed]
    killed = sum(results.killed[mutant.key] for mutant in tried)
    alive = [mutant for mutant in tried if not results.killed[mutant.key]]
    unlisted = [mutant for mutant in alive if mutant.change not in equivalent]
    for mutant in unlisted:
        print(f"{module}:{mutant.line}: {mutant.before}  ->  {mutant.after}")
    share = killed / len(tried) if tried else 0.0
    counts = f"{len(alive) - len(unlisted)} equivalent, {len(unlisted)} survived"
    print(f"{module}: {share:.1%} of {len(tried)} killed ({len(mutants)} chosen); {counts}")
    counted = killed + len(unlisted)
    return not unlisted and counted > 0 and killed >= ENOUGH * counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as in mutants.toml; all, if none is named")
    parser.add_argument("--sample", type=int, help="only so many mutants of each module, always the same ones")
    parser.add_argument("--grep", default="", help="try only mutants that change such a line")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    parser.add_argument("--at-once", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--under", default="", help="a command to run the tests under, such as nice")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants", help="where copies and results go")
    parser.add_argument("--report", action="store_true", help="only tell what is known")
    given = parser.parse_args()
    chosen = {
        module: [mutant for mutant in mutants_of(module, given.sample) if given.grep in mutant.before]
        for module in given.modules or SETTINGS["modules"]
    }
    given.work.mkdir(parents=True, exist_ok=True)
    results = Results(given.work / "results.jsonl")
    todo = [
        mutant
        for mutants in chosen.values()
        for mutant in mutants
        if mutant.key not in results.killed or (given.again and not results.killed[mutant.key])
    ]
    print(f"{sum(map(len, chosen.values()))} mutants, {len(todo)} to try", flush=True)
    if todo and not given.report:
        benches = [Bench(given.work / f"tree{number}", shlex.split(given.under)) for number in range(given.at_once)]
        benches[0].make(dict.fromkeys(mutant.module for mutant in todo))
        for bench in benches[1:]:
            bench.copy(benches[0])
        try_all(todo, benches, results)
    equivalent = listed()
    good = [report(module, mutants, results, equivalent) for module, mutants in chosen.items()]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
