"""Draws docs/images/terminal.svg, an answer that Esc has stopped, from a real chat on a terminal."""

from __future__ import annotations

import html
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from drawing import svg

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from cli.terminal import ESC, Screen  # noqa: E402

from ollama_async.testing import FakeOllama, Gate, Reply  # noqa: E402

if TYPE_CHECKING:
    from pyte.screens import Char

PICTURE = Path(__file__).with_suffix(".svg")
ROWS, CELL, LINE, EDGE, BAR = 14, 8.4, 19, 16, 30
ANSWER = """\
Sunlight is a mixture of all colours. The molecules of the air scatter **short waves** far more than long ones, by \
`(700 / 450) ** 4`:

- blue light **5.9 times** as much as red,
- violet even"""
STYLE = """
    .window { fill: #ffffff; stroke: #d1d9e0 } .bar { fill: #d1d9e0; stroke: none }
    .cell { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; text-anchor: start; white-space: pre }
    .bold { font-weight: 700 } .italics { font-style: italic } .cyan { fill: #0550ae } .brown { fill: #9a6700 }
    .red { fill: #b42318 } .green { fill: #1a7f37 }
    @media (prefers-color-scheme: dark) {
      .window { fill: #0d1117; stroke: #3d444d } .bar { fill: #3d444d } .cyan { fill: #79c0ff } .brown { fill: #d29922 }
      .red { fill: #ff7b72 } .green { fill: #3fb950 }
    }
"""


class Run(NamedTuple):
    """Cells of a line that look alike."""

    row: int
    column: int
    text: str
    looks: str


def looks(cell: Char) -> str:
    """Return the classes of a cell."""
    return " ".join(
        ["cell", *(name for name in ("bold", "italics") if getattr(cell, name)), *([cell.fg] * (cell.fg != "default"))]
    )


def stopped_chat() -> list[list[Char]]:
    """Return the screen of a chat whose answer was stopped by Esc, and in which the next prompt can be typed."""
    words = re.findall(r"\S+\s*", ANSWER)
    with FakeOllama(models=["llama3.2"]) as server, tempfile.TemporaryDirectory() as state:
        server.script("/api/chat", Reply([*Reply.chat(*words, interval=0.03).steps[: 2 * len(words)], Gate()]))
        shown = Screen("--host", server.url, "chat", "llama3.2", rows=ROWS, XDG_STATE_HOME=state)
        try:
            shown.says("Why is the sky blue?")
            shown.shows("violet even")
            shown.type(ESC)
            shown.shows("stopped by you")
            shown.ready()
            return shown.cells()
        finally:
            shown.close()


def runs(screen: list[list[Char]]) -> list[Run]:
    """Return what is on a screen, without its empty end."""
    found = []
    for row, line in enumerate(screen):
        column = 0
        for look, group in groupby(line, looks):
            text = "".join(cell.data for cell in group)
            # Where a server is, but for the port that this one had.
            shown = re.sub(r"(127\.0\.0\.1:)\d{5}", r"\g<1>11434", text)
            if shown.strip():
                found.append(Run(row, column, shown.rstrip(), look))
            column += len(text)
    return found


def picture(found: list[Run]) -> str:
    """Return the whole picture."""
    width, rows = round(80 * CELL) + 2 * EDGE, max(run.row for run in found) + 1
    height = BAR + LINE * rows + 2 * EDGE
    body = [f'<rect class="window" x="1" y="1" width="{width - 2}" height="{height - 2}"/>']
    body += [f'<circle class="bar" cx="{EDGE + 4 + 18 * dot}" cy="18" r="5"/>' for dot in range(3)]
    for run in found:
        place = f'x="{EDGE + run.column * CELL:.1f}" y="{BAR + EDGE + LINE * run.row + 12}"'
        # So wide on every machine, whichever font it has.
        size = f'textLength="{len(run.text) * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
        body.append(f'<text class="{run.looks}" {place} {size}>{html.escape(run.text)}</text>')
    said = "A chat on a terminal: Esc has stopped the answer, and the partial answer is kept"
    return svg(width, height, said, body, STYLE)


if __name__ == "__main__":
    PICTURE.write_text(picture(runs(stopped_chat())), "utf-8")
