"""The terminal: what Ctrl-C does, and one run of a command on it.

Prompts are read in the main thread while no event loop runs, and each answer has its own event loop and client:
so no thread is ever left waiting for input, and Ctrl-C at a prompt is nothing but a ``KeyboardInterrupt``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

import typer

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
from ollama_async.agent import LimitReached

from ._output import valid
from ._screen import Answer, AnyStream, Screen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from contextlib import AbstractContextManager

__all__ = [
    "CTRL_C",
    "ERROR",
    "INTERRUPTED",
    "CtrlC",
    "Session",
    "give_up_stdout",
    "parse_pairs",
    "product_version",
]

T = TypeVar("T")

# Exit statuses.
ERROR, INTERRUPTED = 1, 130

CTRL_C = "Ctrl-C"
_TWICE_SECONDS = 1.0


def product_version() -> str:
    """Return the version of this program."""
    try:
        return importlib.metadata.version("ollama-async")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """Read the ``KEY=VALUE`` of an option that may be repeated; a value is JSON, else text."""
    values: dict[str, Any] = {}
    for pair in map(valid, pairs or ()):
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
        with contextlib.ExitStack() as stack:
            # Windows' loop cannot, and is woken by each signal.
            with contextlib.suppress(NotImplementedError):
                # It has the signal wake the loop, which may be just about to go to sleep; the handler itself is
                # replaced.
                loop.add_signal_handler(signal.SIGINT, lambda: None)
                stack.callback(loop.remove_signal_handler, signal.SIGINT)
            signal.signal(signal.SIGINT, pressed)
            try:
                yield
            finally:
                stack.close()
                signal.signal(signal.SIGINT, before)


class Session:
    """One run of a command."""

    def __init__(
        self, context: typer.Context, model: str, kept: str = "is above", screen: Screen | None = None
    ) -> None:
        self.host: str | None = context.obj
        self.model = model
        self.ctrl_c = CtrlC()
        self.screen = screen or Screen()
        self.kept = kept
        # What else than Ctrl-C stops an answer, while it comes.
        self.keys: Callable[[CancelToken], AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
        try:
            self.url = parse_host(os.environ.get("OLLAMA_HOST") if self.host is None else self.host).url
        except RequestError as exc:
            raise typer.BadParameter(str(exc), param_hint="--host / OLLAMA_HOST") from exc

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Turn what ends the command early into one line and an exit status."""
        try:
            with _ended_by_signals():
                yield
                sys.stdout.flush()
        except AbortError:
            self.screen.note("stopped by you", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except OllamaError as exc:
            self.screen.note(f"Error: {self.explain(exc)}", "red")
            raise typer.Exit(ERROR) from None
        except (KeyboardInterrupt, SystemExit) as exc:
            # It may be stuck in writing to stdout, and Python would write the rest when it exits.
            give_up_stdout()
            if isinstance(exc, SystemExit):
                raise
            raise typer.Exit(INTERRUPTED) from None
        except OSError as exc:
            give_up_stdout()
            if not isinstance(exc, BrokenPipeError):
                # Where the terminal itself is gone there is nobody to tell.
                with contextlib.suppress(OSError):
                    self.screen.note(f"Error: cannot read or write: {exc}", "red")
            raise typer.Exit(ERROR) from None

    def explain(self, exc: OllamaError, model: str | None = None) -> str:
        """Say what happened, to what, and what to do."""
        what_to_do = "start one with 'ollama serve', or name another with --host or OLLAMA_HOST"
        model = model or self.model
        if isinstance(exc, ConnectError):
            return f"no Ollama server at {self.url} ({exc.detail}): {what_to_do}"
        if isinstance(exc, NotFoundError) and model in exc.error:
            return f"the server at {self.url} has no model {model!r}: get it with 'ollama-async pull {model}'"
        if isinstance(exc, AuthenticationError) and exc.signin_url:
            return f"the server at {self.url} wants you to sign in first: {exc.signin_url}"
        if isinstance(exc, (RequestError, LimitReached)):
            return str(exc)
        return f"the server at {self.url}: {exc}"

    def ask(self, work: Callable[[AsyncClient, CancelToken], Awaitable[T]]) -> T:
        """Do something with a client, until Ctrl-C aborts it."""

        async def run() -> T:
            token = CancelToken()
            with self.ctrl_c.aborts(token):
                async with AsyncClient(self.host) as client:
                    return await work(client, token)

        return asyncio.run(run())

    def answer(self, make: Callable[[AsyncClient, CancelToken], AnyStream]) -> Answer:
        """Show an answer as it comes, until it ends or is stopped, and say how it ended."""
        answer = asyncio.run(self._answer(make))
        explained = "" if answer.error is None else self.explain(answer.error)
        self.screen.end(answer, answer.ending(self.kept, explained))
        return answer

    async def _answer(self, make: Callable[[AsyncClient, CancelToken], AnyStream]) -> Answer:
        token, error = CancelToken(), None
        with self.ctrl_c.aborts(token), self.keys(token), self.screen.waiting(self.model):
            async with AsyncClient(self.host) as client:
                stream = make(client, token)
                try:
                    async for chunk in stream:
                        self.screen.add(chunk)
                except OllamaError as exc:
                    error = exc
                self.screen.finish(stream.text)
        response = stream.response
        return Answer(stream, error, (response and response.eval_count) or self.screen.tokens)


@contextlib.contextmanager
def _ended_by_signals() -> Generator[None]:
    """Have signals end the program as an exception does: what was changed on the terminal is put back."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    # Each system has two of them.
    known = [number for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if (number := getattr(signal, name, None))]
    mine = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def give_up_stdout() -> None:
    """Let what is still to be written go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
