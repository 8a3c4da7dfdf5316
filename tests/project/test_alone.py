"""Each module of tests can be run without packages that it does not use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
