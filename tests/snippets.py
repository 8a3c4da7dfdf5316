"""The blocks of Python in the documentation: run by test_docs.py, and written into a folder for type checkers.

``python tests/snippets.py FOLDER`` writes them, and the examples with them.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[Path, int, str | None, str, str]]:
    """Return each block: its page and line, what it needs, its language, its text."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            needs, language, code = match.groups()
            yield page, text.count("\n", 0, match.start(3)), needs, language, code


def write(folder: Path) -> None:
    """Write the blocks of Python, and the examples, into a folder; overwrites it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for page, line, needs, language, code in blocks():
        # What needs a framework is not checked: most have no types to check it with.
        if language == "python" and not (needs or "").startswith("needs: "):
            (folder / f"{page.stem}_{line}.py").write_text(code, "utf-8")
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}', "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
