"""The keyboard of an interactive chat: a prompt that is edited, and the keys that stop an answer while it comes.

This is the only module that imports prompt_toolkit; it is imported when an interactive chat begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from ._output import printable, valid
from ._prompt import PROMPT, is_open

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyPress, KeyPressEvent

    from ollama_async._cancel import CancelToken

__all__ = ["ESC", "Editor"]

ESC = "Esc"
# The keys with arrows and the like begin with Esc. If nothing follows for so long it was the key Esc itself.
_ESC_SECONDS = 0.1


class Editor:
    """Reads prompts, with history and completion, and while an answer comes the keys that stop it."""

    def __init__(
        self, commands: Mapping[str, str], models: Callable[[], Iterable[str]], told: Callable[[int], None]
    ) -> None:
        """Make it.

        Args:
            commands: What can be typed after a slash, and what it does.
            models: Returns the names to complete after ``/model``.
            told: Called with the row of the cursor, when the terminal says it while an answer comes.
        """
        self._told = told
        # It would ask the terminal for the place of its cursor, and some never answer. Nothing here needs to know.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._input = create_input()
        self._output = create_output()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="... ",
            history=_history(),
            completer=_Completer(commands, models),
            key_bindings=_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=4,
            input=self._input,
            output=self._output,
        )
        self._session.app.ttimeoutlen = _ESC_SECONDS
        # An Esc that comes too late to stop an answer makes no command of the letter that is typed next.
        self._session.app.timeoutlen = _ESC_SECONDS

    def read(self) -> str | None:
        """Return the next prompt, ``None`` at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        try:
            return valid(self._session.prompt())
        except EOFError:
            return None
        except SystemExit:
            # It may have been raised anywhere, also in the middle of drawing.
            self._output.enable_autowrap()
            self._output.show_cursor()
            self._output.disable_bracketed_paste()
            self._output.reset_attributes()
            self._output.flush()
            raise

    @contextlib.contextmanager
    def stops(self, token: CancelToken) -> Generator[None]:
        """Have the key Esc abort a token, while the running loop is in the block.

        What else is typed or pasted meanwhile is there at the next prompt, unless the answer is stopped.
        """
        loop = asyncio.get_running_loop()
        typed: list[KeyPress] = []
        timer: asyncio.TimerHandle | None = None

        def take(keys: list[KeyPress]) -> None:
            # With something after it, it was a sequence of an unknown terminal, or Alt and a key.
            if keys and all(key.key == Keys.Escape for key in keys):
                token.abort(ESC)
            for key in keys:
                if key.key == Keys.ControlC:  # on Windows it comes as a key
                    signal.raise_signal(signal.SIGINT)
                elif place := key.key == Keys.CPRResponse and re.match(r"\x1b\[(\d+)", key.data):
                    self._told(int(place[1]))
                else:
                    typed.append(key)

        def flush() -> None:
            take(self._input.flush_keys())

        def ready() -> None:
            nonlocal timer
            take(self._input.read_keys())
            if timer is not None:
                timer.cancel()
            timer = loop.call_later(_ESC_SECONDS, flush)

        with self._keys(), self._input.attach(ready):
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()
                self._input.flush_keys()
                if not token.aborted:
                    store_typeahead(self._input, typed)

    @contextlib.contextmanager
    def _keys(self) -> Generator[None]:
        """Have the terminal hand on each key as it is pressed, and what is pasted as one piece."""
        with self._input.raw_mode():
            _keep_signal(self._input.fileno())
            self._output.enable_bracketed_paste()
            self._output.flush()
            try:
                yield
            finally:
                self._output.disable_bracketed_paste()
                self._output.flush()


def _keep_signal(file: int) -> None:
    """Have Ctrl-C stay a signal on a terminal that is raw: it acts also while the loop is stuck in writing to it.

    Those that would leave the terminal as it is now are keys like all others.
    """
    try:
        termios: Any = importlib.import_module("termios")
    except ImportError:  # Windows: it comes as a key there
        return
    modes = termios.tcgetattr(file)
    modes[3] |= termios.ISIG
    modes[6][termios.VQUIT] = modes[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(file, termios.TCSANOW, modes)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline()
        else:
            buffer.validate_and_handle()

    # On Alt-Enter; a terminal that was read before it was raw has made the second one of it.
    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return bindings


class _Completer(Completer):
    """Completes commands, and what stands after them."""

    def __init__(self, commands: Mapping[str, str], models: Callable[[], Iterable[str]]) -> None:
        self._commands = commands
        self._models = models
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what the text before the cursor may become: no name that cannot be shown as it is."""
        for completion in self._all(document, complete_event):
            if printable(completion.text) == completion.text:
                yield completion

    def _all(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        if not space:
            for name, meaning in self._commands.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=meaning)
        elif command == "/model":
            for name in self._models():
                if name.startswith(rest):
                    yield Completion(name, -len(rest))
        elif command == "/save":
            yield from self._paths.get_completions(Document(rest), complete_event)


class _FileHistory(FileHistory):
    """The prompts of earlier chats. A disk that is full, or a file that is gone, does not keep anyone from chatting."""

    def store_string(self, string: str) -> None:
        """Append a prompt to the file."""
        with contextlib.suppress(OSError):
            super().store_string(valid(string))


def _history() -> History:
    """Return the history in the user's state folder, which only the user may read; an empty one if there is none."""
    state = os.environ.get("XDG_STATE_HOME") or ""
    folder = (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "ollama-async"
    file = folder / "chat-history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        file.chmod(0o600)
    except (OSError, RuntimeError):  # the latter when there is no home
        return InMemoryHistory()
    return _FileHistory(str(file))
