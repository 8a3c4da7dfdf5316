"""Markdown that is hostile: drawn in bounded time, as plain text where it cannot be drawn, and with nothing lost."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("prompt_toolkit")

from cli.terminal import chat

from ollama_async.cli import _markdown
from ollama_async.cli._limit import Limit
from ollama_async.cli._markdown import Growing, _Drawing
from ollama_async.cli._output import SafeConsole
from ollama_async.testing import FakeOllama, Reply

# The signal may come while a finaliser runs, or hypothesis's hook into the garbage collector: Python prints and drops
# what it raises there, and the signal comes again.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LENGTH = 60_000
LIMIT = 0.2

# Each makes a text of about so many characters, with the letter z at its end.
HOSTILE: dict[str, Callable[[int], str]] = {
    "quotes": lambda n: ">" * n,
    "spaced quotes": lambda n: "> " * (n // 2),
    "bullets in bullets": lambda n: "- " * (n // 2),
    "numbers in numbers": lambda n: "1. " * (n // 3),
    "nested by indentation": lambda n: "".join(" " * 2 * level + "- x\n" for level in range(int(n**0.5))),
    "quoted lazily": lambda n: "> " * 15 + "a\n" + "b\n" * (n // 2),
    "stars": lambda n: "*" * n,
    "stars around": lambda n: "*" * (n // 2) + "a" + "*" * (n // 2),
    "emphasis opened": lambda n: "*a " * (n // 3),
    "emphasis nested": lambda n: "*a **b " * (n // 14) + "c" + " b** a*" * (n // 14),
    "underscores": lambda n: "_a" * (n // 2),
    "struck": lambda n: "~~a" * (n // 3),
    "brackets": lambda n: "[" * n,
    "pairs of brackets": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "links opened": lambda n: "[a](" * (n // 4),
    "addresses opened": lambda n: "[a](<b" * (n // 6),
    "images": lambda n: "![" * (n // 2),
    "backticks": lambda n: "`" * n + "\n",
    "backticks of each length": lambda n: "".join("`" * size + "a" for size in range(1, int((2 * n) ** 0.5))),
    "rows": lambda n: "|a|b|\n|-|-|\n" + "|x|y|\n" * (n // 6),
    "columns": lambda n: "|" * (n // 3) + "\n" + "|-" * (n // 3) + "|\n",
    "cells that are not there": lambda n: (
        "|".join("x" * (n // 40)) + "\n" + "|".join("-" * (n // 40)) + "\n" + "a\n" * n
    ),
    "angles": lambda n: "<" * n,
    "tags": lambda n: "<a " * (n // 3),
    "comments": lambda n: "<!--" * (n // 4),
    "entities": lambda n: "&" * n,
    "backslashes": lambda n: "\\" * n,
    "fences": lambda n: "```\n" * (n // 4),
    "code": lambda n: "```python\n" + "x = (1)\n" * (n // 8) + "```\n",
    "code in a line": lambda n: "```python\n" + "x" * n + "\n```\n",
    "code with comments opened": lambda n: "```c++\n" + "/*" * (n // 2) + "\n```\n",
    "a long line": lambda n: "a" * n,
    "short lines": lambda n: "a\n" * (n // 2),
    "paragraphs": lambda n: "a\n\n" * (n // 3),
    "headings": lambda n: "# a\n" * (n // 4),
    "rules": lambda n: "---\n" * (n // 4),
    "spaces": lambda n: " " * n,
    "tabs": lambda n: "\t" * n,
    "marks": lambda n: "a" + "\u0301" * n,
}


def drawn(text: str, *, columns: int = 80, pieces: int = 1) -> str:
    """What is on a terminal after an answer has come in so many pieces, without codes for colours and the cursor."""
    console = SafeConsole(force_terminal=True, width=columns, height=24)
    console.file = shown = io.StringIO()
    drawing = _Drawing(console, "fake")
    size = -(-len(text) // pieces)
    with drawing._limit.ready():
        for at in range(0, len(text), size):
            drawing.add("", text[at : at + size], 1)
            drawing._draw()
        drawing.finish()
    # What grows is drawn by the live display only, which is not on here.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


def letters(text: str) -> int:
    return sum(map(str.isalnum, text))


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_markdown, "_LIMIT_SECONDS", LIMIT)
    monkeypatch.setattr(_markdown, "_AGAIN_SECONDS", LIMIT)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("name", HOSTILE)
def test_drawing_has_a_limit_and_loses_nothing(name: str) -> None:
    text = HOSTILE[name](LENGTH) + " z"
    began = time.process_time()
    shown = drawn(text)
    # To look for what is finished, to parse that, to draw it, and what grows: each has its limit. The rest is linear.
    assert time.process_time() - began < 4 * LIMIT + 2
    assert "z" in shown
    # The names of languages are not shown, and numbers of lists are counted anew.
    assert letters(shown) >= letters(text.replace("```python", "").replace("```c++", "").replace("1. ", ""))


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize("marker", ["> ", "- ", "1. ", "> - "])
@pytest.mark.parametrize("depth", [1, 5, 9, 10, 15, 19, 20, 21, 50])
def test_what_is_nested_too_deep_is_shown_as_it_is(marker: str, depth: int, columns: int) -> None:
    """The parser drops what is too deep for it, and rich what the terminal is too narrow for."""
    shown = drawn(f"before\n\n{marker * depth}inside of it\n\nafter", columns=columns)
    # A narrow terminal breaks words, too, and draws a bar before each line of a quote.
    assert re.search(r"before.*insideofit.*after", re.sub(r"[\s\u258c]", "", shown))


@pytest.mark.usefixtures("_soon")
def test_cells_that_do_not_fit_are_shown_as_they_are() -> None:
    text = "|" + "|".join(f"head{n}" for n in range(60)) + "|\n" + "|-" * 60 + "|\n"
    assert [f"head{n}" in drawn(text) for n in range(60)] == [True] * 60


def test_work_that_takes_too_long_is_ended() -> None:
    """Also where it is one regular expression, as those that colour code are, or swallows errors."""

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                re.fullmatch("(a+)+", "a" * 40 + "b")

    limit = Limit()
    before = signal.getsignal(signal.SIGVTALRM)
    began = time.process_time()
    with limit.ready():
        assert limit.run(lambda: re.fullmatch("(a+)+", "a" * 40 + "b"), 0.1) is None
        assert limit.run(stubborn, 0.1) is None
        assert limit.run(lambda: "done", 0.1) == "done"
        assert limit.run(lambda: 1 // 0, 0.1) is None
        assert limit.run(lambda: "late", 0.0) is None
    assert time.process_time() - began < 5
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("error", [RecursionError, MemoryError, AssertionError, KeyError])
@pytest.mark.parametrize("where", ["_PARSER.parse", "Markdown.__rich_console__"])
def test_what_fails_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception]) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"ollama_async.cli._markdown.{where}", fail)
    shown = drawn("# One\n\n*two*\n\n- three\n", pieces=4)
    assert re.findall(r"# One|\*two\*|- three", shown) == ["# One", "*two*", "- three"]


def test_what_is_finished_is_taken_out_once() -> None:
    """By lines as the parser counts them: other characters that Python ends lines at are no ends there."""
    text = "one\u2028two\n\nthree\x85\n\n- four\n\nfive\n"
    growing = Growing()
    taken = ""
    for sign in text:
        growing.add(sign)
        taken += growing.finished()
    assert taken + growing.rest == text
    assert growing.rest == "five\n"


def test_a_long_block_is_not_copied_for_each_token() -> None:
    growing = Growing()
    began = time.process_time()
    for _ in range(200_000):
        growing.add("token ")
    assert len(growing.rest) == 1_200_000
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["quotes", "emphasis nested", "cells that are not there", "quoted lazily"])
def test_a_chat_goes_on_after_it(fake_ollama: FakeOllama, tmp_path: Path, name: str) -> None:
    text = HOSTILE[name](20_000)
    pieces = [text[at : at + 999] for at in range(0, len(text), 999)]
    fake_ollama.script("/api/chat", Reply.chat(*pieces, " z"), Reply.chat("Fine."))
    with chat(fake_ollama, tmp_path) as shown:
        shown.says("go")
        shown.shows("done: ")
        shown.says("again")
        shown.shows("Fine. done")
        shown.says("/quit")
        assert shown.wait() == 0
