"""What stands below all that is printed and is drawn anew as it changes: the end of an answer, a bar of progress."""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import TYPE_CHECKING

from rich.cells import get_character_cell_size
from rich.console import RenderHook
from rich.control import Control
from rich.segment import ControlType, Segment, Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console, ConsoleRenderable, RenderableType

__all__ = ["Footer", "reflows", "stripped"]

# Of the loop's time, at most that part goes into drawing.
_SHARE = 0.2
# How long a terminal may take to say where its cursor is; some never do.
_ANSWER_SECONDS = 1.0


class Footer(RenderHook):
    """Lines below all that a console prints, of a terminal whose width may change while they stand there.

    In place of rich's ``Live``, which takes away as many rows as it has drawn lines: most terminals break lines anew
    when they are made narrower, so the lines have more rows than that, and what remains of them is seen twice.

    Args:
        console: What is printed on.
        shown: What stands there.
        asks: Whether the terminal is asked where its cursor is, when its size has changed: somebody reads what it
            answers, and hands it to ``told()``. How much has scrolled off cannot be known otherwise; some terminals
            have rows leave at the top although there is room below.
    """

    def __init__(self, console: Console, shown: RenderableType = "", *, asks: bool = False) -> None:
        self.shown = shown
        self._asks = self._wraps = asks
        # The terminal's size when the lines were drawn, and when it was asked for its cursor, last.
        self._size: object = None
        self._asked_size: object = None
        self._answers_due: int = 0
        self._answer_until = 0.0
        self._row: int | None = None
        self._console = console
        self._reflows = reflows(os.environ)
        # The lines that stand on the terminal. The cursor is at the beginning of the last one, where it is whether
        # that line has one row or several.
        self._drawn: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._on = False

    def start(self, seconds: float, draw: Callable[[], None] | None = None) -> None:
        """Draw now, and again and again in the running loop.

        Args:
            seconds: Between two drawings; more, if drawing takes long.
            draw: Draws, in place of ``refresh()``.
        """
        if not self._console.is_interactive:
            return
        loop, draw = asyncio.get_running_loop(), draw or self.refresh

        def tick() -> None:
            began = time.monotonic()
            draw()
            spent = time.monotonic() - began
            self._timer = loop.call_later(max(seconds, spent / _SHARE), tick)

        self._on = True
        self._console.show_cursor(False)
        self._console.push_render_hook(self)
        tick()

    def stop(self) -> None:
        """Take the lines away."""
        if self._timer is not None:
            self._timer.cancel()
        if self._on:
            self._on = False
            self._console.pop_render_hook()
            self._console.control(_codes(self._erase()))
            self._console.show_cursor(True)

    def refresh(self) -> None:
        """Draw what is shown now."""
        self._console.print(Control())

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put what is printed in the place of the lines, and the lines below it."""
        erase = _codes(self._erase())
        # Without answers only one line is safe: what is above the cursor's may have left the terminal.
        options = self._console.options
        options = options if self._wraps else options.update(no_wrap=True, overflow="ellipsis")
        lines = [stripped(line) for line in self._console.render_lines(self.shown, options, pad=False)]
        self._drawn = ["".join(part.text for part in line) for line in lines]
        self._size, self._asked_size = self._console.size, None
        below = [part for line in lines for part in (Segment.line(), *line)][1:]
        return [erase, *renderables, Segments(below), _codes("\r")]

    def can_draw(self) -> bool:
        """Return whether the lines can be drawn anew: not while the terminal is asked what has become of them."""
        size = self._console.size
        if not self._asks or not self._drawn or size == self._size:
            return True
        now = time.monotonic()
        if size != self._asked_size:
            self._asked_size, self._row = size, None
            self._answers_due += 1
            self._answer_until = now + _ANSWER_SECONDS
            self._console.control(_codes("\x1b[6n"))
        elif self._row is None:
            self._asks = now < self._answer_until
        return self._row is not None or not self._asks

    def told(self, row: int) -> None:
        """Take the terminal's answer: the row of its cursor, from 1 on."""
        self._answers_due = max(0, self._answers_due - 1)
        if not self._answers_due:  # else its size has changed since
            self._row = row

    def scrolled_off(self) -> str:
        """Return the text of the lines that stay: they have left the terminal at its top, at least in part.

        It is what had no room any more when the terminal was made smaller. Of a line that has rows of both kinds
        nothing is taken away: the terminal would go on to take what comes in its place for the end of that line.
        """
        return "".join(self._drawn[: self._split()[0]])

    def _split(self) -> tuple[int, int, int]:
        """Return how many lines stay, how many rows above the cursor are to be erased, and how many below it."""
        rows = [self._rows(line) for line in self._drawn] or [1]
        above, below = sum(rows[:-1]), rows[-1] - 1
        if self._row is not None and self._asked_size == self._console.size:
            hidden = above + 1 - self._row
        else:
            hidden = above + 1 + below - self._console.height
        stay = 0
        while hidden > 0 and stay < len(rows) - 1:
            hidden -= rows[stay]
            stay += 1
        return stay, sum(rows[stay:-1]), below

    def _rows(self, line: str) -> int:
        """Return how many rows a line has on the terminal as wide as it is now."""
        width, rows, used = self._console.width, 1, 0
        if not self._reflows:
            return 1
        for sign in line:
            cells = get_character_cell_size(sign)
            used += cells
            if used > width:
                rows, used = rows + 1, cells
        return rows

    def _erase(self) -> str:
        _, above, below = self._split()
        self._drawn = []
        # Row by row: some terminals save what stands on them when all of it is erased at once.
        down = "\x1b[B\x1b[2K" * below + f"\x1b[{below}A" * bool(below)
        return "\r\x1b[2K" + down + "\x1b[A\x1b[2K" * above


def reflows(environ: Mapping[str, str]) -> bool:
    """Return whether the terminal breaks lines anew when its width changes. Few do not, and cut them off."""
    if "TMUX" in environ:
        return True
    cuts = "XTERM_VERSION" in environ or "STY" in environ
    return not cuts and not re.match("linux|screen|putty", environ.get("TERM", ""))


def _codes(codes: str) -> Control:
    control = Control()
    control.segment = Segment(codes, None, [(ControlType.CARRIAGE_RETURN,)])
    return control


def stripped(line: list[Segment]) -> list[Segment]:
    """Return a line without spaces at its end that nobody sees: they make extra rows in a narrower one."""
    line = [part for part in line if not part.control]
    while line and not (line[-1].style and line[-1].style.bgcolor):
        last = line.pop()
        if text := last.text.rstrip(" "):
            return [*line, Segment(text, last.style)]
    return line
