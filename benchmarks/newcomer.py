"""How long a newcomer waits: from nothing to the first stopped answer, and from a clone to a green test run.

``python benchmarks/newcomer.py [PYTHON]`` does what README.md says, in a fresh clone of this checkout, in empty virtual
environments and without pip's cache. What takes the time is PyPI and the machine, so the last line names the machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of the one who runs this: not of a newcomer.
OURS = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV", "OLLAMA_HOST", "CI")


class Newcomer:
    """Somebody with a Python and a checkout, who types what README.md says."""

    def __init__(self, folder: Path, python: str) -> None:
        self._folder = folder
        self._venv = folder / ".venv"
        self._python = python
        self._env = {name: value for name, value in os.environ.items() if name not in OURS}
        self._env |= {"PIP_NO_CACHE_DIR": "1", "PATH": f"{self._venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def clone(self) -> float:
        return self._run("git", "clone", "--quiet", str(ROOT), str(self._folder), cwd=ROOT)

    def make_venv(self) -> float:
        return self._run(self._python, "-m", "venv", "--clear", str(self._venv))

    def types(self, command: str) -> float:
        return self._run("sh", "-c", command)

    def _run(self, *command: str, cwd: Path | None = None) -> float:
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=cwd or self._folder, env=self._env, capture_output=True, encoding="utf-8", check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return time.perf_counter() - began


def commands() -> list[list[str]]:
    """Return the commands that README.md gives: one block after the other."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [block.strip().split(" && ") for block in blocks]


def main(python: str) -> None:
    demo, tests = commands()
    with tempfile.TemporaryDirectory() as folder:
        newcomer = Newcomer(Path(folder, "ollama_async"), python)
        cloned = newcomer.clone()
        print("| step | seconds |\n|---|---|")
        for title, steps, before in (
            ("Install to the first stopped answer", demo, 0.0),
            ("Clone to a green test run", tests, cloned),
        ):
            waited = before + newcomer.make_venv()
            for command in steps:
                waited += (took := newcomer.types(command))
                print(f"| `{command}` | {took:.0f} |", flush=True)
            print(f"| **{title}** | **{waited:.0f}** |", flush=True)
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.executable)
