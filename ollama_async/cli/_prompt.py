"""One prompt after the other: lines of a terminal or pipe, and what happens between them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING

from ollama_async._errors import OllamaError

from ._output import write_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._terminal import Session

__all__ = ["PROMPT", "converse", "is_open", "read_line", "use_readline"]

PROMPT = ">>> "
_QUOTES = '"""'


def converse(session: Session, read: Callable[[], str | None], take: Callable[[str], bool], leave: str) -> None:
    """Read one prompt after the other and have it answered, until the end of the input.

    Args:
        session: Of the command.
        read: Returns the next prompt, ``None`` at the end.
        take: Answers a prompt, and returns whether to go on.
        leave: The command that leaves, to be told of.
    """
    while True:
        try:
            prompt = read()
            if prompt is None:
                return
            prompt = _unquoted(prompt)
            if prompt.strip() and not take(prompt):
                return
        except OllamaError as exc:
            session.screen.note(f"Error: {session.explain(exc)}", "red")
        except KeyboardInterrupt:
            write_error("\n")
            if session.ctrl_c.again():
                raise
            session.screen.note(f"press Ctrl-C once more to leave, or type {leave}", "dim")


def is_open(text: str) -> bool:
    """Return whether a prompt that begins with three quotes has not come to its closing ones."""
    text = text.strip()
    return text.startswith(_QUOTES) and not (len(text) >= 2 * len(_QUOTES) and text.endswith(_QUOTES))


def _unquoted(text: str) -> str:
    whole = text.strip()
    if whole.startswith(_QUOTES):
        # With the space, no slash at its beginning makes it a command.
        return " " + whole.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text.rstrip()


def use_readline() -> None:
    """Give ``input()`` line editing and a history."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")


def read_line() -> str | None:
    """Return the next line of the input, or all lines between three quotes; ``None`` at its end."""
    text = _one_line(PROMPT)
    while text is not None and is_open(text):
        line = _one_line("... ")
        if line is None:
            break
        text += "\n" + line
    return text


def _one_line(prompt: str) -> str | None:
    shown = prompt if sys.stdin.isatty() else ""
    # Only with both on a terminal does input() edit lines; elsewhere it would put the prompt into the output.
    if shown and sys.stdout.isatty():
        with contextlib.suppress(EOFError):
            return input(shown)
        line = ""
    else:
        write_error(shown)
        line = sys.stdin.readline()
    if shown and not line:
        write_error("\n")
    return line.rstrip("\n") if line else None
