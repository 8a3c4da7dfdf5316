"""The terminal: what Ctrl-C does, what is written where, and one run of a command on it.

Prompts are read in the main thread while no event loop runs, and each answer has an event loop and a client of its own:
so no thread is ever left waiting for input, and Ctrl-C at a prompt is nothing but a ``KeyboardInterrupt``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import typer
from rich.console import Console
from rich.text import Text

from ollama_async._cancel import CancelToken
from ollama_async._client import AsyncClient
from ollama_async._errors import (
    AbortError,
    AuthenticationError,
    ConnectError,
    NotFoundError,
    OllamaError,
    RequestError,
)
from ollama_async._host import parse_host
from ollama_async._stream import Stream
from ollama_async._types import ChatResponse, GenerateResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = [
    "CTRL_C",
    "ERROR",
    "INTERRUPTED",
    "AnyStream",
    "CtrlC",
    "Screen",
    "Session",
    "parse_pairs",
    "printable",
    "product_version",
]

# Exit statuses.
ERROR, INTERRUPTED = 1, 130

CTRL_C = "Ctrl-C"
_TWICE_SECONDS = 1.0

AnyStream: TypeAlias = Stream[ChatResponse] | Stream[GenerateResponse]


def product_version() -> str:
    """Return the version of this program."""
    try:
        return importlib.metadata.version("ollama-async")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """Read the ``KEY=VALUE`` of an option that may be repeated; a value is JSON, else text."""
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r}: write it as key=value", param_hint=option)
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


class CtrlC:
    """What Ctrl-C does while an answer comes: it stops it; a second time within a second it leaves."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def again(self) -> bool:
        """Note that it has been pressed, and return whether it had been within the last second."""
        before, self._last = self._last, time.monotonic()
        return self._last - before < _TWICE_SECONDS

    @contextlib.contextmanager
    def aborts(self, token: CancelToken) -> Generator[None]:
        """Have Ctrl-C abort a token, while the running loop is in the block.

        The handler is called by the interpreter, not by the loop: the answer is stopped at once also while the loop
        is busy, or stuck in writing to a terminal that is held.
        """

        def pressed(*_: object) -> None:
            token.abort(CTRL_C)
            if self.again():
                raise KeyboardInterrupt

        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:  # a shell started this in the background: it is not meant for us
            yield
            return
        loop = asyncio.get_running_loop()
        # It has the signal wake the loop, which may be just about to go to sleep; the handler itself is replaced.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        signal.signal(signal.SIGINT, pressed)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)


class Screen:
    """The answer on stdout as it comes, what is to be said about it on stderr."""

    def __init__(self) -> None:
        self.out = Console(markup=False, emoji=False, highlight=False)
        self._notes = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._terminal = sys.stdout.isatty()

    @contextlib.contextmanager
    def waiting(self, model: str) -> Generator[None]:
        """Begin an answer: show that it is waited for, until its first text comes or the block ends."""
        self._shown, self._last, self._thinking = 0, "\n", False
        self._status = self._notes.status(Text(f"waiting for the model {model} (it may be loading)"))
        if self._notes.is_terminal:
            self._status.start()
        try:
            yield
        finally:
            self._status.stop()

    def add(self, chunk: ChatResponse | GenerateResponse) -> None:
        """Show a chunk. What the model thinks is for the eye only, it does not go to a file or pipe."""
        part = chunk.message if isinstance(chunk, ChatResponse) else chunk
        if part.thinking and self._terminal:
            self._status.stop()
            self.out.print(printable(part.thinking), style="dim", end="", soft_wrap=True)
            self._thinking, self._last = True, part.thinking[-1]
        self._write(chunk.response if isinstance(chunk, GenerateResponse) else chunk.message.content or "")

    def finish(self, whole: str) -> None:
        """Show the rest of the answer: what had arrived when it was stopped, and was not read. End the line."""
        self._write(whole[self._shown :])
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()

    def note(self, text: str, style: str = "") -> None:
        """Say something on stderr, in one line."""
        self._notes.print(printable(text.replace("\n", " ")), style=style)

    def _write(self, text: str) -> None:
        if not text:
            return
        self._status.stop()
        sys.stdout.write("\n\n" * self._thinking + (printable(text) if self._terminal else text))
        sys.stdout.flush()
        self._shown, self._last, self._thinking = self._shown + len(text), text[-1], False


def printable(text: str) -> str:
    """Take out what makes a terminal do things: a model or server has no business with its title or clipboard."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))


class Session:
    """One run of a command."""

    def __init__(self, context: typer.Context, model: str, kept: str = "is above") -> None:
        self.host: str | None = context.obj
        self.model = model
        self.ctrl_c = CtrlC()
        self.screen = Screen()
        self._kept = kept
        try:
            self.url = parse_host(os.environ.get("OLLAMA_HOST") if self.host is None else self.host).url
        except RequestError as exc:
            raise typer.BadParameter(str(exc), param_hint="--host / OLLAMA_HOST") from exc

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Turn what ends the command early into one line and an exit status."""
        try:
            yield
            sys.stdout.flush()
        except AbortError:
            self.screen.note("stopped by you", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except OllamaError as exc:
            self.screen.note(f"Error: {self.explain(exc)}", "red")
            raise typer.Exit(ERROR) from None
        except KeyboardInterrupt:
            # It may be stuck in writing to stdout, and Python would write the rest when it exits.
            _give_up_stdout()
            raise typer.Exit(INTERRUPTED) from None
        except (OSError, UnicodeDecodeError) as exc:
            _give_up_stdout()
            if not isinstance(exc, BrokenPipeError):
                self.screen.note(f"Error: cannot read or write: {exc}", "red")
            raise typer.Exit(ERROR) from None

    def explain(self, exc: OllamaError) -> str:
        """Say what happened, to what, and what to do."""
        what_to_do = "start one with 'ollama serve', or name another with --host or OLLAMA_HOST"
        if isinstance(exc, ConnectError):
            return f"no Ollama server at {self.url} ({exc.detail}): {what_to_do}"
        if isinstance(exc, NotFoundError) and self.model in exc.error:
            return f"the server at {self.url} has no model {self.model!r}: get it with 'ollama-async pull {self.model}'"
        if isinstance(exc, AuthenticationError) and exc.signin_url:
            return f"the server at {self.url} wants you to sign in first: {exc.signin_url}"
        return str(exc) if isinstance(exc, RequestError) else f"the server at {self.url}: {exc}"

    def answer(self, make: Callable[[AsyncClient, CancelToken], AnyStream]) -> AnyStream:
        """Show an answer as it comes, until it ends or Ctrl-C stops it; return its stream, which is over.

        Raises:
            OllamaError: It ended by an error; what had come has been shown.
        """
        stream = asyncio.run(self._answer(make))
        chunks, seconds = stream.timing.chunks, f"{stream.timing.total:.1f} s"
        if stream.outcome == "aborted" and chunks:
            self.screen.note(f"stopped by you after {chunks} chunks in {seconds}; what came {self._kept}", "yellow")
        elif stream.outcome == "aborted":
            self.screen.note(f"stopped by you after {seconds}, before anything came", "yellow")
        elif stream.outcome == "truncated":
            self.screen.note("the answer is not complete: the server ended it without its last chunk", "yellow")
        return stream

    async def _answer(self, make: Callable[[AsyncClient, CancelToken], AnyStream]) -> AnyStream:
        token = CancelToken()
        with self.ctrl_c.aborts(token), self.screen.waiting(self.model):
            async with AsyncClient(self.host) as client:
                stream = make(client, token)
                try:
                    async for chunk in stream:
                        self.screen.add(chunk)
                except OllamaError as exc:
                    self.screen.finish(stream.text)
                    if not isinstance(exc, AbortError):
                        raise
                else:
                    self.screen.finish(stream.text)
        return stream

    def converse(self, answer: Callable[[str], object]) -> None:
        """Read one prompt after the other and answer it, until the end of the input or ``/bye``."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # gives input() line editing and history
            self.screen.note(f"{self.model} at {self.url}: Ctrl-C stops an answer, /bye or Ctrl-D leaves", "dim")
        while True:
            try:
                prompt = _read_prompt()
                if prompt is None or prompt == "/bye":
                    return
                if prompt:
                    answer(prompt)
            except OllamaError as exc:
                self.screen.note(f"Error: {self.explain(exc)}", "red")
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                if self.ctrl_c.again():
                    raise
                self.screen.note("press Ctrl-C once more to leave, or type /bye", "dim")


def _read_prompt() -> str | None:
    """Return the next line of the input, ``None`` at its end."""
    shown = ">>> " if sys.stdin.isatty() else ""
    # Only with both on a terminal does input() edit lines; elsewhere it would put the prompt into the output.
    if shown and sys.stdout.isatty():
        with contextlib.suppress(EOFError):
            return input(shown).strip()
        line = ""
    else:
        sys.stderr.write(shown)
        sys.stderr.flush()
        line = sys.stdin.readline()
    if shown and not line:
        sys.stderr.write("\n")
    return line.strip() if line else None


def _give_up_stdout() -> None:
    """Let what is still to be written go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
