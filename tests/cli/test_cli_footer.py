"""A terminal that is made narrower, wider and shorter while an answer comes: all of it is there once, in its order.

The terminal here breaks its lines anew, as tmux does it: what has no room leaves at the top, also where rows at the
bottom are empty.
"""

import io
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("markdown_it")

from cli.terminal import environment
from rich.progress import Progress
from rich.spinner import Spinner

from ollama_async.cli._footer import Footer, reflows
from ollama_async.cli._markdown import _Drawing
from ollama_async.cli._output import SafeConsole
from ollama_async.testing import FakeOllama, Reply

WORDS = 80
WORD = re.compile(r"w\d{3}")


class Reflowing:
    """A terminal that breaks its lines anew."""

    def __init__(self, columns: int, height: int) -> None:
        self.columns, self.height = columns, height
        # Each row, and whether the next one continues it; those before the top have scrolled off.
        self._rows: list[tuple[str, bool]] = [("", False)]
        self._top = self._y = self._x = 0
        self.answers: list[int] = []

    def feed(self, text: str) -> None:
        for number, code, sign in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", text, re.DOTALL):
            count = int(number) if number.isdecimal() else 1
            if code == "A":
                self._y = max(self._top, self._y - count)
            elif code == "B":
                self._down(min(self._top + self.height - 1, self._y + count))
            elif code == "K":
                self._rows[self._y] = ("", False)
            elif code == "n":
                self.answers.append(self._y - self._top + 1)
            elif sign == "\n":
                self._down(self._y + 1)
                self._x = 0
            elif sign == "\r":
                self._x = 0
            elif sign:
                self._write(sign)

    def resize(self, columns: int, height: int) -> None:
        used, whole, at = len(self._rows), [""], (0, 0)
        for number, (text, goes_on) in enumerate(self._rows):
            if number == self._y:
                at = len(whole) - 1, len(whole[-1]) + self._x
            whole[-1] += text
            if not goes_on:
                whole.append("")
        rows: list[tuple[str, bool]] = []
        for number, text in enumerate(whole[:-1] or [""]):
            pieces = [text[begin : begin + columns] for begin in range(0, len(text), columns)] or [""]
            if number == at[0]:
                piece = min(at[1] // columns, len(pieces) - 1)
                self._y, self._x = len(rows) + piece, at[1] - piece * columns
            rows += [(piece, piece is not pieces[-1]) for piece in pieces]
        end = self._top + self.height
        empty = max(0, min(self.height - height, end - used))
        self._rows, self.columns, self.height = rows, columns, height
        self._top = min(self._y, max(0, end + len(rows) - used - empty - height))
        self._down(self._y)

    def text(self) -> str:
        return "".join(text + "\n" * (not goes_on) for text, goes_on in self._rows)

    def _down(self, to: int) -> None:
        self._y = to
        self._rows += [("", False)] * (to + 1 - len(self._rows))
        self._top = max(self._top, to - self.height + 1)

    def _write(self, sign: str) -> None:
        if self._x == self.columns:
            self._rows[self._y] = (self._rows[self._y][0], True)
            self._down(self._y + 1)
            self._x = 0
        text, goes_on = self._rows[self._y]
        self._rows[self._y] = (text[: self._x].ljust(self._x) + sign + text[self._x + 1 :], goes_on)
        self._x += 1


class Pane:
    """A console on such a terminal."""

    def __init__(self, columns: int, height: int) -> None:
        self.terminal = Reflowing(columns, height)
        self.console = SafeConsole(force_terminal=True, color_system=None)
        self.console.file = self._file = io.StringIO()
        self.console.size = (columns, height)

    def resize(self, columns: int, height: int) -> None:
        self.show()
        self.terminal.resize(columns, height)
        self.console.size = (columns, height)

    def show(self) -> None:
        self.terminal.feed(self._file.getvalue())
        self._file.seek(0)
        self._file.truncate()


async def answer(
    pieces: list[str], sizes: dict[int, tuple[int, int]], *, thinking: bool = False, before: int = 0
) -> str:
    """What is on the terminal after an answer during which its size has changed, at some of the pieces."""
    pane = Pane(*sizes.pop(0))
    pane.terminal.feed("earlier\n" * before)
    drawing = _Drawing(pane.console, "fake")
    with drawing._limit.ready():
        drawing._footer.start(3600, drawing._draw)
        for number, piece in enumerate(pieces):
            if number in sizes:
                pane.resize(*sizes[number])
            drawing.add(piece if thinking else "", "" if thinking else piece, number)
            if number % 3 and number not in sizes:
                continue
            drawing._draw()
            pane.show()
            while pane.terminal.answers:
                drawing.told(pane.terminal.answers.pop(0))
                drawing._draw()
                pane.show()
        drawing.finish()
        drawing._footer.stop()
    pane.show()
    assert "; Esc stops" not in pane.terminal.text()
    return pane.terminal.text()


def words(before: str = "", between: str = " ", after: str = "") -> list[str]:
    middle = [f"w{number:03}{between}" for number in range(WORDS)]
    return [before + middle[0], *middle[1:-1], middle[-1].rstrip() + after]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "a paragraph": words,
    "several": lambda: [word + "\n\n" * (number % 25 == 24) for number, word in enumerate(words())],
    "with punctuation": lambda: words(between=", "),
    "a list": lambda: words("- ", "\n- "),
    "a list of paragraphs": lambda: [
        f"- {word}" * (number % 9 == 0) or word + "\n" * (number % 9 == 8) for number, word in enumerate(words())
    ],
    "code": lambda: words("```\n", "\n", "\n```\n"),
    "a quote": lambda: words("> "),
    "bold at its end": lambda: [*words()[:-20], "**", *words()[-20:], "**"],
}
SIZES: dict[str, dict[int, tuple[int, int]]] = {
    "narrower": {0: (60, 12), 20: (25, 12)},
    "narrower and wider": {0: (60, 12), 20: (25, 12), 40: (60, 12)},
    "much narrower": {0: (120, 10), 50: (30, 10)},
    "low": {0: (40, 8), 30: (20, 8), 50: (33, 8)},
    "shorter": {0: (50, 20), 50: (50, 5)},
    "narrower and shorter": {0: (80, 24), 50: (20, 5), 60: (90, 30)},
    "step by step": {0: (60, 12)} | {10 + step: (60 - step, 12) for step in range(40)},
    "wider": {0: (30, 10), 50: (70, 10)},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", TEXTS)
async def test_an_answer_is_there_once_whatever_the_terminal_does(name: str, sizes: str) -> None:
    shown = await answer(TEXTS[name](), dict(SIZES[sizes]))
    assert WORD.findall(shown) == WORD.findall("".join(TEXTS[name]())), shown


@pytest.mark.parametrize("seed", range(8))
async def test_sizes_at_random(seed: int) -> None:
    chance = random.Random(seed)
    sizes = {number: (chance.randint(12, 130), chance.randint(4, 40)) for number in (0, *chance.sample(range(80), 12))}
    thinking = chance.random() < 0.3
    pieces = words() if thinking else TEXTS[chance.choice([*TEXTS])]()
    shown = await answer(pieces, sizes, thinking=thinking, before=chance.randrange(40))
    assert WORD.findall(shown) == WORD.findall("".join(pieces)), shown


async def test_a_terminal_that_does_not_say_where_its_cursor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, and waited for; then what it does is guessed, and nothing is lost."""
    monkeypatch.setattr("ollama_async.cli._footer._ANSWER_SECONDS", 0.0)
    pane = Pane(60, 30)
    drawing = _Drawing(pane.console, "fake")
    with drawing._limit.ready():
        drawing._footer.start(3600, drawing._draw)
        for number, word in enumerate(words()):
            if number in (30, 60):
                pane.resize(40 - number // 3, 30)
            drawing.add("", word, number)
            drawing._draw()
        drawing.finish()
    pane.show()
    assert len(pane.terminal.answers) == 1
    assert sorted({*WORD.findall(pane.terminal.text())}) == WORD.findall("".join(words()))


@pytest.mark.parametrize("kind", ["a bar", "a mark"])
async def test_other_lines_that_are_drawn_anew_leave_nothing(kind: str) -> None:
    pane = Pane(80, 10)
    shown = Spinner("dots", "waiting for the model fake (it may be loading)")
    if kind == "a bar":
        shown = Progress(console=pane.console)
        shown.add_task("waiting for a layer with a long name", total=100)
    footer = Footer(pane.console, shown)
    pane.terminal.feed("before\n")
    footer.start(3600)
    for columns in (60, 41, 33, 20, 80, 14):
        pane.resize(columns, 10)
        footer.refresh()
        pane.show()
        assert pane.terminal.text().count("wai") == 1
    footer.stop()
    pane.show()
    assert pane.terminal.text().split() == ["before"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({}, True),
        ({"TERM": "xterm-256color", "XTERM_VERSION": "XTerm(390)"}, False),
        ({"TERM": "tmux-256color", "XTERM_VERSION": "XTerm(390)", "TMUX": "/tmp/t,1,0"}, True),
        ({"TERM": "screen", "STY": "1.pts"}, False),
        ({"TERM": "screen", "TMUX": "/tmp/t,1,0"}, True),
        ({"TERM": "linux"}, False),
        ({"TERM": "putty-256color"}, False),
    ],
)
def test_which_terminals_break_lines_anew(variables: dict[str, str], expected: bool) -> None:
    assert reflows(variables) is expected


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_real_terminal(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """Gates hold the answer while the size changes; tmux tells the program of it a little later than it does it."""
    fake_ollama.script("/api/chat", Reply.chat(*words(), interval=0.03), always=True)
    name = f"ollama-async-{os.getpid()}"

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-L", name, "-f", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout

    variables = environment(XDG_STATE_HOME=str(tmp_path), OLLAMA_HOST=fake_ollama.url, LC_ALL="C.UTF-8")
    del variables["TERM"]
    (tmp_path / "go.py").write_text(
        f"import os\nterminal = {{name: os.environ[name] for name in ('TERM', 'TMUX')}}\nos.environ.clear()\n"
        f"os.environ |= {variables!r} | terminal\nfrom ollama_async import __main__\n__main__.main()\n"
    )
    tmux("new-session", "-d", "-x", "60", "-y", "12", f"{sys.executable} {tmp_path / 'go.py'} chat fake")
    try:
        tmux("set", "-g", "window-size", "manual")
        wait(lambda: ">>>" in tmux("capture-pane", "-p"))
        tmux("send-keys", "hi", "Enter")
        for word, columns in (("w020", 25), ("w040", 60), ("w060", 33)):
            wait(lambda word=word: word in tmux("capture-pane", "-p", "-J", "-S", "-500"))  # type: ignore[misc]
            tmux("resize-window", "-x", str(columns), "-y", "12")
        wait(lambda: "done:" in tmux("capture-pane", "-p"))
        shown = tmux("capture-pane", "-p", "-J", "-S", "-500")
    finally:
        tmux("kill-server")
    assert WORD.findall(shown) == WORD.findall("".join(words())), shown


def wait(done: Callable[[], bool]) -> None:
    for _ in range(400):
        if done():
            return
    raise AssertionError("it did not come")
