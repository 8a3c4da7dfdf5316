"""What is shown of an answer: its text as it comes, JSON for scripts, and what is to be said about it on stderr."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from rich.spinner import Spinner
from rich.text import Text

from ollama_async._call.objects import JSON_COMPLETE
from ollama_async._call.stream import Stream
from ollama_async._errors import AbortError, ConnectionBroken, OllamaError, PhaseTimeout
from ollama_async._model.types import ChatResponse, GenerateResponse, Message, ToolCall

from ._footer import Footer
from ._output import SafeConsole, printable, write, write_json

if TYPE_CHECKING:
    from collections.abc import Generator

    from ollama_async._call.stream import Stream

    from ._tools import AgentStream

__all__ = ["Answer", "AnyChunk", "AnyStream", "JsonScreen", "Screen", "parts", "plural", "style_of"]

_SPIN_SECONDS = 0.08
# Of an argument or a result of a tool, this much is shown.
_LINE = 200

AnyChunk: TypeAlias = ChatResponse | GenerateResponse
AnyStream: TypeAlias = "Stream[ChatResponse] | Stream[GenerateResponse] | AgentStream"


def parts(chunk: AnyChunk) -> tuple[str, str]:
    """Return what a chunk has of the model's thinking, and of its answer; calls of tools are shown as thinking is."""
    part = chunk.message if isinstance(chunk, ChatResponse) else chunk
    if isinstance(part, Message) and part.role == "tool":
        return f"{part.tool_name}: {_short(part.content or '')}\n", ""
    if isinstance(part, Message) and part.tool_calls and not part.content:
        return "".join(f"\n{_called(call)}\n" for call in part.tool_calls), ""
    return part.thinking or "", (chunk.response if isinstance(chunk, GenerateResponse) else chunk.message.content) or ""


def _called(call: ToolCall) -> str:
    given = ", ".join(f"{name}={_short(repr(value))}" for name, value in call.function.arguments.items())
    return f"{call.function.name}({given})"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[:_LINE]}..."


def plural(count: int, noun: str) -> str:
    """Return a number with what it counts."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Answer:
    """An answer that is over, whichever way it ended."""

    stream: AnyStream
    error: OllamaError | None
    tokens: int

    @property
    def outcome(self) -> str:
        """How it ended."""
        return self.stream.outcome or "error"

    @property
    def speed(self) -> float | None:
        """Tokens per second: as the server measured it, else as they came."""
        response = self.stream.response
        if response is not None and response.eval_count and response.eval_duration:
            return response.eval_count / response.eval_duration * 1e9
        return self.stream.timing.chunks_per_second

    def ending(self, kept: str, explained: str) -> str:
        """Say how it ended.

        Args:
            kept: Where the answer so far is.
            explained: What the error is, and what to do.
        """
        seconds = f"{self.stream.timing.total:.1f} s"
        so_far = f"after {plural(self.tokens, 'token')} in {seconds}" if self.tokens else f"after {seconds}"
        if self.outcome == "aborted":
            rest = f"; the partial answer {kept}" if self.stream.text else ", before the first token"
            return f"stopped by you {so_far}{rest}"
        if self.outcome == "until" and self.error is None:
            return f"ended by {self.stream.reason!r} {so_far}"
        if self.outcome == "truncated":
            return f"the answer is not complete: the server ended it {so_far} without its last chunk"
        if isinstance(self.error, PhaseTimeout):
            return f"Error: timed out {so_far}: {explained}"
        if isinstance(self.error, ConnectionBroken):
            return f"Error: the server is gone {so_far}: {explained}"
        if self.error is not None:
            return f"Error: {explained}"
        speed = f", {self.speed:.1f} tokens/s" if self.speed else ""
        return f"done: {plural(self.tokens, 'token')} in {seconds}{speed}"


class Screen:
    """The answer on stdout as it comes, what is to be said about it on stderr."""

    def __init__(self) -> None:
        # Tokens as far as can be told: some chunks are more than one.
        self.tokens: int = 0
        self._shown: int = 0
        self._last, self._thinking = "\n", False
        self._terminal = sys.stdout.isatty()
        # What is half a pipe gets no codes at all, also not on the half that is a terminal.
        codes = None if self._terminal and sys.stdin.isatty() else False
        self.out = SafeConsole(force_terminal=codes)
        self._notes = SafeConsole(stderr=True, soft_wrap=True, force_terminal=codes)

    @contextlib.contextmanager
    def waiting(self, model: str) -> Generator[None]:
        """Begin an answer: show that it is waited for, until its first text comes or the block ends."""
        self._begin()
        text = f"waiting for the model {model} (it may be loading)"
        spinner = Spinner("dots", Text(printable(text)), style="status.spinner")
        self._status = Footer(self._notes, spinner)
        if self._notes.is_terminal:
            self._status.start(_SPIN_SECONDS)
        elif self._terminal and sys.stderr.isatty():
            self.note(text)
        try:
            yield
        finally:
            self._status.stop()

    def add(self, chunk: AnyChunk) -> None:
        """Show a chunk. What the model thinks is for the eye only, it does not go to a file or pipe."""
        thinking, text = parts(chunk)
        self.tokens += bool(thinking or text)
        if thinking and self._terminal:
            self._status.stop()
            self.out.print(thinking, style="dim", end="", soft_wrap=True)
            self._thinking, self._last = True, thinking[-1]
        self._write(text)

    def finish(self, whole: str) -> None:
        """Show the rest of the answer: what had arrived when it was stopped, and was not read. End the line."""
        self._write(whole[self._shown :])
        if self._last != "\n":
            write("\n")

    def end(self, answer: Answer, said: str) -> None:
        """Say how an answer ended, if that needs to be said."""
        whole = answer.outcome == "done" or answer.stream.reason is JSON_COMPLETE
        if answer.error is not None or not whole:
            self.note(said, style_of(answer))

    def note(self, text: str, style: str = "") -> None:
        """Say something on stderr, in one line."""
        self._notes.print(text.replace("\n", " "), style=style)

    def _begin(self) -> None:
        self._shown, self._last, self._thinking = 0, "\n", False
        self.tokens = 0

    def _write(self, text: str) -> None:
        if not text:
            return
        self._status.stop()
        write("\n\n" * self._thinking + text)
        self._shown, self._last, self._thinking = self._shown + len(text), text[-1], False


def style_of(answer: Answer) -> str:
    if answer.error is not None and not isinstance(answer.error, AbortError):
        return "red"
    return "dim" if answer.outcome in ("done", "until") else "yellow"


class JsonScreen(Screen):
    """Each chunk as one line of JSON on stdout, and after the last one a line that tells how the answer ended."""

    @contextlib.contextmanager
    def waiting(self, model: str) -> Generator[None]:
        """Begin an answer."""
        self._begin()
        yield

    def add(self, chunk: AnyChunk) -> None:
        """Write a chunk."""
        self.tokens += any(parts(chunk))
        write_json(chunk.model_dump(mode="json", exclude_none=True))

    def finish(self, whole: str) -> None:
        """Write nothing: the line with the outcome has the whole text."""

    def end(self, answer: Answer, said: str) -> None:
        """Write how it ended."""
        stream, timing = answer.stream, answer.stream.timing
        ended: dict[str, object] = {
            "outcome": answer.outcome,
            "reason": None if stream.reason is None else str(stream.reason),
            "error": None if answer.error is None or answer.outcome == "aborted" else said.removeprefix("Error: "),
            "tokens": answer.tokens,
            "seconds": round(timing.total, 3),
            "first_chunk_seconds": None if timing.first_chunk is None else round(timing.first_chunk, 3),
            "tokens_per_second": None if answer.speed is None else round(answer.speed, 1),
            "text": stream.text,
        }
        write_json(ended)
        if ended["error"]:
            self.note(said)

    def note(self, text: str, style: str = "") -> None:
        """Say something on stderr, as JSON."""
        write_json({"error": text.removeprefix("Error: ")}, error=True)
