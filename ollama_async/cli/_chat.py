"""A chat on a terminal: its commands, and one turn after the other."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_async._client import AsyncClient
from ollama_async._errors import NotFoundError, OllamaError
from ollama_async._regular import write_file
from ollama_async.agent import Agent
from ollama_async.conversation import Chat

from ._markdown import MarkdownScreen
from ._prompt import converse, read_line, use_readline
from ._screen import Answer, JsonScreen, Screen
from ._terminal import ERROR, INTERRUPTED, Session
from ._tools import AgentStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import typer

    from ollama_async._call.timeouts import Timeouts
    from ollama_async._cancel import CancelToken
    from ollama_async.until import Condition

    from ._screen import AnyStream

__all__ = ["run_chat"]

_CHECK_SECONDS = 10.0
_COMMANDS = {
    "/help": "show the commands and keys",
    "/model": "[NAME] show the model and the others that the server has, or continue with another one",
    "/system": "[TEXT] show the system prompt, or set it; '-' removes it",
    "/save": "FILE save the conversation, as JSON if the name ends with .json, otherwise as Markdown",
    "/clear": "forget the conversation, but keep the system prompt",
    "/quit": "leave; so do /bye, /exit and Ctrl-D",
}
_ALIASES = {"/bye": "/quit", "/exit": "/quit", "/?": "/help"}
_KEYS = (
    "Esc or Ctrl-C stops an answer and keeps the partial answer; Ctrl-C twice within a second leaves. "
    'Enter sends, Alt-Enter begins a new line, and so does Enter after three quotes (""") until they are closed. '
    "To begin a prompt with a slash, put a space before it."
)
_STOPPED = {"aborted": "stopped", "timeout": "timed out", "truncated": "not complete", "until": "ended early"}


def _as_markdown(chat: Chat) -> str:
    """Return a conversation for people to read."""
    parts = [f"# Chat with {chat.model}"]
    if chat.system:
        parts += ["## system", chat.system.strip("\n")]
    for turn in chat.turns:
        for message in turn.messages:
            marked = message["role"] == "assistant" and turn.outcome != "done"
            mark = f" ({_STOPPED.get(turn.outcome, 'broken off')})" if marked else ""
            parts += [f"## {message['role']}{mark}", (message.get("content") or "").strip("\n")]
    return "\n\n".join(parts) + "\n"


class _Prompt:
    """What is typed in a chat: prompts, and commands."""

    def __init__(
        self, session: Session, chat: Chat, agent: Callable[[AsyncClient], Agent] | None, until: Condition | None
    ) -> None:
        self.models: list[str] = []
        self.worst = 0
        self._session = session
        self._chat = chat
        # Makes what runs the tools, if there are any.
        self._agent = agent
        self._until = until
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
        before = self._chat.messages

        def start(client: AsyncClient, token: CancelToken) -> AnyStream:
            self._chat.client = client
            if self._agent is not None:
                asked = [*before, {"role": "user", "content": text}]
                return AgentStream(self._agent(client).run(asked, token=token, until=self._until))
            return self._chat.send(text, stream=True, token=token, until=self._until)

        answer = self._session.answer(start)
        if isinstance(answer.stream, AgentStream):
            added = answer.stream.messages[len(before) :]
            # A question without any answer may be asked again.
            self._chat.extend(added if len(added) > 1 else ())
        self._note_status(answer)

    def _note_status(self, answer: Answer) -> None:
        if answer.outcome == "aborted":
            self.worst = self.worst or INTERRUPTED
        elif answer.outcome not in ("done", "until"):
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
        self._session.model = self._chat.model = name
        self._say(f"the conversation goes on with {name}")

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == "-" else text
        system = self._chat.system
        self._say(f"the system prompt is: {system}" if system else "there is no system prompt but the model's own")

    def _save(self, name: str) -> None:
        if not name:
            self._complain("name a file: /save chat.md, or /save chat.json")
            return
        try:
            path = Path(name).expanduser().absolute()
            if path not in self._saved and os.path.lexists(path):
                self._complain(f"{path} exists already: name another file")
                return
            if path.suffix == ".json":
                asyncio.run(self._chat.save(path))
            else:
                write_file(path, _as_markdown(self._chat).encode(errors="replace"))
        except (OSError, RuntimeError, ValueError) as exc:  # of the file, its '~user', a NUL in its name
            self._complain(f"cannot save to {name}: {getattr(exc, 'strerror', None) or exc}")
            return
        self._saved.add(path)
        self._say(f"saved to {path}")

    def _clear(self, _: str) -> None:
        self._chat.clear()
        self._say("the conversation is forgotten")

    def _say(self, text: str) -> None:
        self._session.screen.note(text, "cyan")

    def _complain(self, text: str) -> None:
        self.worst = self.worst or ERROR
        self._session.screen.note(f"Error: {text}", "red")


async def _names(client: AsyncClient, token: CancelToken) -> list[str]:
    return [str(model.get("name")) for model in (await client.list(token=token, timeout=_CHECK_SECONDS)).models]


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
    until: Condition | None,
    as_json: bool,
    tools: Sequence[Any] = (),
) -> int:
    """Chat until the user leaves or the input ends; return the exit status."""
    screen = JsonScreen() if as_json else Screen()
    drawn = MarkdownScreen() if not as_json and _is_interactive(screen) else None
    screen = drawn or screen
    session = Session(context, model, "is kept", screen)
    chat = Chat(AsyncClient(session.host), model, system=system, options=options, timeout=limits)

    def agent(client: AsyncClient) -> Agent:
        return Agent(client, chat.model, tools, options=options, timeout=limits)

    prompt = _Prompt(session, chat, agent if tools else None, until)
    with session.running():
        session.ask(lambda client, token: client.show(model, token=token, timeout=_CHECK_SECONDS))
        read: Callable[[], str | None] = read_line
        if drawn:
            # Only here: it takes a tenth of a second to import.
            from ._editor import Editor

            editor = Editor(_COMMANDS, lambda: prompt.models, drawn.told)
            read, session.keys = editor.read, editor.stops
            with contextlib.suppress(OllamaError):  # they are for completion only
                prompt.models = session.ask(_names)
        if sys.stdin.isatty():
            if not drawn:
                use_readline()
            keys = "Esc or Ctrl-C stops" if drawn else "Ctrl-C stops"
            screen.note(f"{model} at {session.url}: {keys} an answer, /help shows more, /quit or Ctrl-D leaves", "dim")
        converse(session, read, prompt.take, "/quit")
    # Whoever types has seen what failed; a script has not.
    return 0 if sys.stdin.isatty() else prompt.worst
