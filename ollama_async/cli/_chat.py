"""A chat: the conversation, its commands, and one turn after the other."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_async._errors import NotFoundError, OllamaError

from ._markdown import MarkdownScreen
from ._prompt import converse, read_line, use_readline
from ._screen import Answer, JsonScreen, Screen
from ._terminal import ERROR, INTERRUPTED, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer

    from ollama_async._call.timeouts import Timeouts
    from ollama_async._cancel import CancelToken
    from ollama_async._client import AsyncClient

    from ._screen import AnyStream

__all__ = ["Conversation", "run_chat"]

_CHECK_SECONDS = 10.0
_COMMANDS = {
    "/help": "show the commands and keys",
    "/model": "[NAME] show the model and what others there are, or go on with another one",
    "/system": "[TEXT] show the system prompt, or set it; '-' takes it away",
    "/save": "FILE save the conversation, as JSON if the name ends with .json, else as Markdown",
    "/clear": "forget the conversation, but for the system prompt",
    "/quit": "leave; so do /bye, /exit and Ctrl-D",
}
_ALIASES = {"/bye": "/quit", "/exit": "/quit", "/?": "/help"}
_KEYS = (
    "Esc or Ctrl-C stops an answer, and what came stays in the conversation; Ctrl-C twice within a second leaves. "
    'Enter sends, Alt-Enter begins a new line, and so does Enter after three quotes (""") until they are closed. '
    "A slash with a space before it is no command."
)
_STOPPED = {"aborted": "stopped", "timeout": "timed out", "truncated": "not complete"}


@dataclass(frozen=True)
class _Said:
    """A message of the conversation; an answer that is not whole is marked by its outcome."""

    role: str
    content: str
    outcome: str = "done"

    @property
    def mark(self) -> str:
        return "" if self.outcome == "done" else f" ({_STOPPED.get(self.outcome, 'broken off')})"


class Conversation:
    """What has been said so far."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.said: list[_Said] = []

    def messages(self, *more: _Said) -> list[dict[str, str]]:
        """Return it as the server wants it."""
        system = [_Said("system", self.system)] if self.system else []
        return [{"role": said.role, "content": said.content} for said in (*system, *self.said, *more)]

    def as_json(self, model: str) -> str:
        """Return it with the model's name and the marks."""
        messages: list[dict[str, str]] = self.messages()
        for message, said in zip(reversed(messages), reversed(self.said), strict=False):
            if said.role == "assistant":
                message["outcome"] = said.outcome
        return json.dumps({"model": model, "messages": messages}, ensure_ascii=False, indent=2) + "\n"

    def as_markdown(self, model: str) -> str:
        """Return it for people to read."""
        system = [_Said("system", self.system)] if self.system else []
        parts = [f"# Chat with {model}"]
        for said in (*system, *self.said):
            parts += [f"## {said.role}{said.mark}", said.content.strip("\n")]
        return "\n\n".join(parts) + "\n"


class _Chat:
    """A chat with a model."""

    def __init__(self, session: Session, conversation: Conversation, options: dict[str, Any], limits: Timeouts) -> None:
        self.models: list[str] = []
        self.worst = 0
        self._session = session
        self._conversation = conversation
        self._options = options
        self._limits = limits
        self._saved: set[Path] = set()
        self._run: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/model": self._model,
            "/system": self._system,
            "/save": self._save,
            "/clear": self._clear,
        }

    def take(self, text: str) -> bool:
        """Answer a prompt or do a command; return False for the one that leaves."""
        if not text.startswith("/"):
            self._turn(text.strip())
            return True
        name, _, rest = text.strip().partition(" ")
        name = _ALIASES.get(name, name)
        if name == "/quit":
            return False
        if name in self._run:
            self._run[name](rest.strip())
        else:
            near = difflib.get_close_matches(name, [*_COMMANDS, *_ALIASES], 1)
            meant = f"did you mean {near[0]}? " if near else ""
            self._complain(
                f"there is no command {name}: {meant}/help shows all; put a space before it to say it to the model"
            )
        return True

    # -- one turn --

    def _turn(self, text: str) -> None:
        asked = _Said("user", text)
        messages = self._conversation.messages(asked)

        def start(client: AsyncClient, token: CancelToken) -> AnyStream:
            model, limits = self._session.model, self._limits
            return client.chat(model, messages, options=self._options, stream=True, token=token, timeout=limits)

        answer = self._session.answer(start)
        said = answer.stream.text
        if said:  # a question that got no answer at all is not kept, it may be asked again
            self._conversation.said += [asked, _Said("assistant", said, answer.outcome)]
        self._note_status(answer)

    def _note_status(self, answer: Answer) -> None:
        if answer.outcome == "aborted":
            self.worst = self.worst or INTERRUPTED
        elif answer.outcome != "done":
            self.worst = ERROR

    # -- commands --

    def _help(self, _: str) -> None:
        for name, meaning in _COMMANDS.items():
            self._say(f"{name:8} {meaning}")
        self._say(_KEYS)

    def _model(self, name: str) -> None:
        if not name:
            self.models = self._session.ask(_names)
            self._say(f"the model is {self._session.model}; the server has: {', '.join(self.models) or 'none'}")
            return
        try:
            self._session.ask(lambda client, token: client.show(name, token=token, timeout=_CHECK_SECONDS))
        except NotFoundError as exc:
            self._complain(f"{self._session.explain(exc, name)}; the model is still {self._session.model}")
            return
        self._session.model = name
        self._say(f"the conversation goes on with {name}")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        system = self._conversation.system
        self._say(f"the system prompt is: {system}" if system else "there is no system prompt but the model's own")

    def _save(self, name: str) -> None:
        if not name:
            self._complain("name a file: /save chat.md, or /save chat.json")
            return
        model = self._session.model
        try:
            path = Path(name).expanduser().absolute()
            if path not in self._saved and os.path.lexists(path):
                self._complain(f"{path} exists already: name another file")
                return
            as_json = path.suffix == ".json"
            _write(path, self._conversation.as_json(model) if as_json else self._conversation.as_markdown(model))
        except (OSError, RuntimeError, ValueError) as exc:  # of the file, its '~user', a NUL in its name
            self._complain(f"cannot save to {name}: {getattr(exc, 'strerror', None) or exc}")
            return
        self._saved.add(path)
        self._say(f"saved to {path}")

    def _clear(self, _: str) -> None:
        self._conversation.said.clear()
        self._say("the conversation is forgotten")

    def _say(self, text: str) -> None:
        self._session.screen.note(text, "cyan")

    def _complain(self, text: str) -> None:
        self.worst = self.worst or ERROR
        self._session.screen.note(f"Error: {text}", "red")


async def _names(client: AsyncClient, token: CancelToken) -> list[str]:
    return [str(model.get("name")) for model in (await client.list(token=token, timeout=_CHECK_SECONDS)).models]


def _write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; only the user can read it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _is_interactive(screen: Screen) -> bool:
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and screen.out.is_terminal
    # Windows has no such variable; its terminals before Windows 10 know no codes.
    named = bool(os.environ.get("TERM")) or sys.platform == "win32"
    return terminal and named and not screen.out.is_dumb_terminal and not screen.out.legacy_windows


def run_chat(
    context: typer.Context,
    model: str,
    system: str | None,
    options: dict[str, Any],
    limits: Timeouts,
    *,
    as_json: bool,
) -> int:
    """Chat until the user leaves or the input ends; return the exit status."""
    screen = JsonScreen() if as_json else Screen()
    drawn = MarkdownScreen() if not as_json and _is_interactive(screen) else None
    screen = drawn or screen
    session = Session(context, model, "stays in the conversation", screen)
    chat = _Chat(session, Conversation(system), options, limits)
    with session.running():
        session.ask(lambda client, token: client.show(model, token=token, timeout=_CHECK_SECONDS))
        read: Callable[[], str | None] = read_line
        if drawn:
            # Only here: it takes a tenth of a second to import.
            from ._editor import Editor

            editor = Editor(_COMMANDS, lambda: chat.models, drawn.told)
            read, session.keys = editor.read, editor.stops
            with contextlib.suppress(OllamaError):  # they are for completion only
                chat.models = session.ask(_names)
        if sys.stdin.isatty():
            if not drawn:
                use_readline()
            keys = "Esc or Ctrl-C stops" if drawn else "Ctrl-C stops"
            screen.note(f"{model} at {session.url}: {keys} an answer, /help shows more, /quit or Ctrl-D leaves", "dim")
        converse(session, read, chat.take, "/quit")
    # Whoever types has seen what failed; a script has not.
    return 0 if sys.stdin.isatty() else chat.worst
