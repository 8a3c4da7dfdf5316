"""The blocks of Python in the documentation: run by test_docs.py, and written into a folder for type checkers.

``python tests/snippets.py FOLDER`` writes them, and the examples with them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ollama_async.testing import FakeOllama

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TIMEOUT = 60.0


def blocks() -> Iterator[tuple[Path, int, str | None, str, str]]:
    """Return each block: its page and line, what it needs, its language, its text."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            needs, language, code = match.groups()
            yield page, text.count("\n", 0, match.start(3)), needs, language, code


def run(*command: str, cwd: Path, host: str, warnings: str = "error") -> str:
    """Run a program of Python in a process of its own, and return its output; nothing may go to its stderr."""
    path = [] if os.environ.get("PYTHONSAFEPATH") else [str(ROOT)]  # with a safe path the installed package is tested
    path += filter(None, [os.environ.get("PYTHONPATH")])
    process = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": warnings, "OLLAMA_HOST": host},
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, ""), process.stdout + process.stderr
    return process.stdout


def check_block(
    code: str, folder: Path, *, prepare: Callable[[FakeOllama], object] = FakeOllama.forget, warnings: str = "error"
) -> None:
    """Run a block against a fake server, and see that it prints what its comments say."""
    with FakeOllama(models=["llama3.2"], interval=0.01) as server:
        prepare(server)
        (folder / "block.py").write_text(code, "utf-8")
        output = run("block.py", cwd=folder, host=server.url, warnings=warnings)
    for text in re.findall(r"# prints: (.*)", code):
        assert text in output


def write(folder: Path) -> None:
    """Write the blocks of Python, and the examples, into a folder; overwrites it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for page, line, needs, language, code in blocks():
        # What needs a framework is not checked: most have no types to check it with.
        if language == "python" and not (needs or "").startswith("needs: "):
            (folder / f"{page.stem}_{line}.py").write_text(code, "utf-8")
    for example in (ROOT / "examples").glob("*.py"):
        # A queue is checked where it is installed: by the session that runs it.
        if not example.stem.startswith("queue_"):
            shutil.copy(example, folder)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}', "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
