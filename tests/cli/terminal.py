"""The command line as tests run it: in this process, in its own, and on a terminal that can be looked at."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import inspect
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_async.testing import FakeOllama

if TYPE_CHECKING:
    import pyte
    from typer.testing import Result

DEADLINE = 20.0
NOBODY = "127.0.0.1:1"
CTRL_C, CTRL_D = "\x03", "\x04"
ESC = "\x1b"
UP = "\x1b[A"
ENTER, ALT_ENTER = "\r", "\x1b\r"
# The terminal has to be the controlling one of its session for ^C to become a signal. On a busy machine two presses may
# be more than a second apart; that the limit is a second is tested by itself.
ON_TERMINAL = """\
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ollama_async import __main__
from ollama_async.cli import _terminal
_terminal._TWICE_SECONDS = 60.0
__main__.main()
"""


def environment(**variables: str) -> dict[str, str]:
    unwanted = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "OLLAMA_HOST", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    if os.environ.get("PYTHONSAFEPATH"):  # the installed package is what is tested
        path = os.environ.get("PYTHONPATH", "")
    return {
        **inherited,
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "error",
        "TERM": "dumb",
        "OLLAMA_HOST": NOBODY,
    } | variables


def run(*arguments: str, stdin: str | bytes | None = None, **variables: str) -> Result:
    """Run the command in this process, without a terminal."""
    # Only here: a terminal does not need it.
    from typer.testing import CliRunner

    from ollama_async.cli import app

    # Before click 8.2 the runner had to be told to keep the two outputs apart.
    old = "mix_stderr" in inspect.signature(CliRunner.__init__).parameters
    runner: CliRunner = CliRunner(**{"mix_stderr": False} if old else {})
    return runner.invoke(app, list(arguments), input=stdin, env={"OLLAMA_HOST": NOBODY, "COLUMNS": "80", **variables})


def spawn(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "ollama_async", *arguments]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=False, **options
    )


class Terminal:
    """The command on a terminal of its own, 80 columns wide."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment(**variables),
        )
        os.close(slave)
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two reads
        self._seen = 0
        self._deadline = time.monotonic() + DEADLINE

    def until(self, text: str) -> None:
        """Read until a text has come after what was waited for before."""
        while text not in self.output[self._seen :]:
            assert self._read(), f"{text!r} did not come, but:\n{self.output}"
        self._seen = self.output.index(text, self._seen) + len(text)

    def until_prompt(self) -> None:
        """Read until it asks for input, and wait until it sleeps.

        Python's readline and input() look for signals when they are woken from their sleep, not before it: a ^C in the
        few microseconds between the prompt and the sleep would be acted on with the next key only.
        """
        self.until(">>> ")
        while not re.search(r"\) S ", Path(f"/proc/{self.process.pid}/stat").read_text()):
            assert time.monotonic() < self._deadline, "it is still busy"
            time.sleep(0.001)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self) -> int:
        """Read all the rest, and return the exit status."""
        while self._read():
            pass
        return self.process.wait(max(0.1, self._deadline - time.monotonic()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(0.0, self._deadline - time.monotonic()))
        assert ready, f"nothing came for too long after:\n{self.output}"
        try:
            data = os.read(self.master, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.output += self._decoder.decode(data)
        return bool(data)


@contextlib.contextmanager
def terminal(*arguments: str, **variables: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments, **variables)
    try:
        yield opened
    finally:
        opened.close()


class Screen(Terminal):
    """A terminal that can be looked at: what it shows, and what has scrolled off."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24, **variables: str) -> None:
        import pyte  # only here, too

        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.Stream(self._screen)
        self._fed = 0
        super().__init__(*arguments, TERM="xterm-256color", **variables)
        self._deadline += 40  # it does more than others
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def lines(self) -> list[str]:
        """All lines from the first one on."""
        self._stream.feed(self.output[self._fed :])
        self._fed = len(self.output)
        columns = range(self._screen.columns)
        scrolled = ["".join(line[column].data for column in columns) for line in self._screen.history.top]
        return [line.rstrip() for line in (*scrolled, *self._screen.display)]

    def cells(self) -> list[list[pyte.screens.Char]]:
        """What the screen shows now, with how it looks."""
        self.lines()
        return [
            [line[column] for column in range(self._screen.columns)]
            for line in map(self._screen.buffer.__getitem__, range(self._screen.lines))
        ]

    def text(self) -> str:
        """All that is shown, as one text with single spaces."""
        return " ".join(" ".join(self.lines()).split())

    def shows(self, pattern: str) -> None:
        """Read until the pattern is shown somewhere."""
        while not re.search(pattern, self.text()):
            assert self._read(), f"{pattern!r} is not shown, but:\n" + "\n".join(self.lines())

    def ready(self, typed: str = "") -> None:
        """Read until it asks for input, and has taken what was typed."""
        while self._prompt() != f">>> {typed}".rstrip():
            assert self._read(), "it does not ask, but shows:\n" + "\n".join(self.lines())

    def says(self, text: str) -> None:
        """Type a prompt."""
        self.ready()
        self.type(text + ENTER)

    def _prompt(self) -> str:
        self.lines()
        return self._screen.display[self._screen.cursor.y].rstrip()

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.master)


@contextlib.contextmanager
def chat(server: FakeOllama, state: Path, *options: str, columns: int = 80, **variables: str) -> Iterator[Screen]:
    shown = Screen(
        *("--host", server.url, "chat", "fake", *options), columns=columns, XDG_STATE_HOME=str(state), **variables
    )
    try:
        yield shown
        assert "Traceback" not in shown.output
    finally:
        shown.close()


def roles(request: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request.json()["messages"]]
