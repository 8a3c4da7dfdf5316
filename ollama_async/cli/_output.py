"""The one way to the terminal: nothing that others wrote can make it do anything.

What a server, a model, a file or an argument says goes through here last, behind whatever lays it out. No other module
of the command line writes to stdout or stderr, which ``tests/cli/test_output.py`` checks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType
    from rich.text import Text

__all__ = ["SafeConsole", "open_streams", "printable", "valid", "write", "write_error", "write_failure", "write_json"]

# Control characters begin what changes a terminal's title, clipboard or cursor. Those for the direction of text show a
# line in another order than it has. Joiners and marks stay: whole scripts need them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str) -> str:
    """Replace what makes a terminal do things: a model or server has no business with its title or clipboard."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def valid(text: str) -> str:
    """Replace what is not UTF-8 in an argument or a typed line: its surrogates fit into no request."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class SafeConsole(Console):
    """A console for text of others: markup in it is text, and so are the characters that control a terminal."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        # The codes are this console's own, and the text between them is filtered here.
        file = stream.unfiltered if isinstance(stream, _Filter) else None
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn text into what is drawn: filtered here, too, so that its width is the one that is seen."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the pieces that something is drawn with."""
        for piece in super().render(renderable, options):
            if piece.control or piece.text.isprintable() or piece.text == "\n":
                yield piece
            else:
                yield Segment(printable(piece.text), piece.style)


def write(text: str) -> None:
    """Write to stdout: to a terminal what is printable, to a file or pipe the text as it is."""
    _write(sys.stdout, text)


def write_error(text: str) -> None:
    """Write to stderr, in the same way."""
    _write(sys.stderr, text)


def write_json(value: object, *, error: bool = False) -> None:
    """Write a line of JSON to stdout, or to stderr. It is ASCII, so a terminal gets all of it as well."""
    _write(sys.stderr if error else sys.stdout, json.dumps(value) + "\n")


def write_failure(exc: BaseException) -> None:
    """Write the traceback of an exception that nothing has handled."""
    write_error("".join(traceback.format_exception(exc)))


def _write(stream: TextIO, text: str) -> None:
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def open_streams() -> None:
    """Make stdin, stdout and stderr fit for use, also by libraries that write to them on their own."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # A shell can start a program without any of them ("<&-"): then Python has None there.
        stream: Any = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        # What the terminal cannot show becomes a question mark, and input that is not text U+FFFD.
        stream.reconfigure(errors="replace")
        setattr(sys, name, _Filter(stream) if mode == "w" and stream.isatty() else stream)
    logging.lastResort = _Log(logging.WARNING)


class _Filter(io.TextIOWrapper):
    """A terminal as libraries see it: what they write of others' text is filtered, only colours come through."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=True, write_through=True)
        self.unfiltered = stream

    def write(self, text: str, /) -> int:
        """Write a text."""
        pieces = _COLOUR.split(text)
        pieces[::2] = map(printable, pieces[::2])
        return super().write("".join(pieces))


class _Log(logging.Handler):
    """What libraries log, where nobody has said what is to become of it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to stderr."""
        with contextlib.suppress(OSError):  # there may be nobody to tell any more
            write_error(self.format(record) + "\n")
