"""Each module of tests can be run without packages that it does not use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# What ollama_async itself needs, what these bring along, and what every module of tests has.
BASICS = {"anyio", "docstring_parser", "h11", "httpcore", "httptools", "httpx", "pydantic", "pydantic_core"}
BASICS |= {"_pytest", "ollama_async", "pytest", "pytest_asyncio", *sys.stdlib_module_names}
# Parts of ollama_async that want more than it does.
PARTS = {f"ollama_async.{name}" for name in ("asgi", "cli", "httpx2", "interop", "telemetry")}
# What the tests of one part need, and those of the others do not.
HEAVY = ["fastapi", "gguf", "hypothesis", "httpx2", "numpy", "ollama", "openai", "opentelemetry", "playwright", "pyte"]
HEAVY += ["redis", "respx", "rich", "starlette", "trustme", "typer", "uvicorn", "uvloop"]
NAMES = ("ndjson", "host", "request", "retry", "phases", "needs")
MODULES = [str(path) for name in NAMES for path in ROOT.glob(f"tests/**/test_{name}.py")]
COLLECT = """
import sys
import pytest

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refused())
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:hypothesispytest", *sys.argv[1:]]))
"""


def test_the_core_is_tested_without_what_the_leaves_need() -> None:
    path = [] if os.environ.get("PYTHONSAFEPATH") else [str(ROOT)]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "pytest_timeout"]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT.format(names=set(HEAVY)), *plugins, *MODULES],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imported(node: ast.AST, *, at_once: bool) -> Iterator[str]:
    """What a module imports: all of it, or only what to import it imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Call) and getattr(child.func, "attr", "") == "importorskip":
            yield from (str(name.value) for name in child.args if isinstance(name, ast.Constant))
        elif at_once and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try):
            continue  # later, or not if it is missing
        elif at_once and isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        yield from imported(child, at_once=at_once)


@cache
def imports(path: Path, *, at_once: bool) -> tuple[set[Path], set[str]]:
    """The files of tests/ that a module of tests imports, and the packages."""
    files: set[Path] = set()
    packages: set[str] = set()
    for name in imported(ast.parse(path.read_text("utf-8")), at_once=at_once):
        parts = name.split(".")
        local = [TESTS.joinpath(*parts[:length]).with_suffix(".py") for length in range(1, len(parts) + 1)]
        if found := [file for file in local if file.exists()]:
            files.update(found)
        elif not TESTS.joinpath(parts[0]).is_dir():
            packages.add(".".join(parts[:2]) if ".".join(parts[:2]) in PARTS else parts[0])
    return files, packages - BASICS


def reached(path: Path) -> set[Path]:
    """The files of tests/ that to import a module of tests imports, and itself."""
    found: set[Path] = set()
    new = {path}
    while new:
        found |= new
        new = {file for known in new for file in imports(known, at_once=True)[0]} - found
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_a_module_needs_only_packages_that_it_or_a_helper_of_it_names(path: Path) -> None:
    files, named = imports(path, at_once=False)
    # Another module of tests is asked for what it defines, not for what its tests need.
    for helper in files:
        if not helper.stem.startswith("test_"):
            named = named | imports(helper, at_once=False)[1]
    wanted = {file: imports(file, at_once=True)[1] - named for file in reached(path)}
    assert not any(wanted.values()), {file.name: names for file, names in wanted.items() if names}
