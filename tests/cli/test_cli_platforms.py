"""The command line where a system lacks what Linux has: Windows, whose loop knows no signals, and which has no termios.

It is simulated: the names are taken away, and the commands run.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("prompt_toolkit")

from cli.terminal import DEADLINE, ON_TERMINAL, Terminal, environment
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ollama_async import CancelToken
from ollama_async.cli import _editor
from ollama_async.cli._limit import Limit
from ollama_async.cli._terminal import CTRL_C, CtrlC
from ollama_async.testing import FakeOllama, Reply, Stall

WITHOUT = """\
import asyncio, os, signal, sys, tempfile
for module in ("termios", "fcntl", "pty", "tty", "pwd", "grp", "resource", "readline"):
    sys.modules[module] = None
for owner, names in (
    (signal, "SIGHUP SIGVTALRM SIGALRM SIGUSR1 SIGKILL setitimer getitimer ITIMER_VIRTUAL ITIMER_REAL pthread_sigmask"),
    (os, "fchmod fchown geteuid getuid getppid O_CLOEXEC O_NONBLOCK O_NOCTTY register_at_fork fork setsid killpg"),
):
    for name in names.split():
        delattr(owner, name)
def refuse(*_):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = asyncio.SelectorEventLoop.remove_signal_handler = refuse
"""
MAIN = "from ollama_async import __main__\n__main__.main()\n"


def without(server: FakeOllama, *arguments: str, piped: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + MAIN, "--host", server.url, *arguments],
        input=piped,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "piped", "status", "shown"),
    [
        (["--help"], "", 0, "Talk to an Ollama server"),
        (["list"], "", 0, "fake:latest"),
        (["list", "--json"], "", 0, '"fake:latest"'),
        (["ps"], "", 0, "UNTIL"),
        (["version"], "", 0, "Ollama "),
        (["generate", "fake", "Why?"], "", 0, "No model was asked"),
        (["generate", "fake"], "Why?", 0, "No model was asked"),
        (["generate", "fake", "--json", "Why?"], "", 0, '"outcome": "done"'),
        (["chat", "fake"], "one\n/help\ntwo\n", 0, "No model was asked"),
        (["pull", "fake"], "", 0, "success"),
        (["load", "fake"], "", 0, "fake is loaded"),
        (["demo"], "", 0, "Stopped, and the socket gone"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_runs_without_what_windows_lacks(
    fake_ollama: FakeOllama, arguments: list[str], piped: str, status: int, shown: str
) -> None:
    fake_ollama.script("/api/pull", Reply([{"status": "success"}]))
    if arguments == ["demo"]:
        fake_ollama.script("/api/chat", Reply.endless_chat(0.01), always=True)
    result = without(fake_ollama, *arguments, piped=piped)
    assert (result.returncode, "Traceback" in result.stderr) == (status, False), result.stderr
    assert shown in result.stdout


def test_a_conversation_is_saved(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    assert without(fake_ollama, "chat", "fake", piped=f"one\n/save {file}\n").returncode == 0
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "one"}


@contextlib.contextmanager
def begun(server: FakeOllama, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WITHOUT + MAIN, "--host", server.url, *arguments]
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("reply", [Reply.endless_generate(0.01), Reply(before_head=[Stall()])], ids=["text", "loading"])
def test_ctrl_c_stops_an_answer_without_a_handler_of_the_loop(fake_ollama: FakeOllama, reply: Reply) -> None:
    fake_ollama.script("/api/generate", reply)
    with begun(fake_ollama, "generate", "fake", "Why?") as process:
        [request] = fake_ollama.wait_for_requests(timeout=DEADLINE)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, said
    assert said.startswith("stopped by you after ")
    assert request.connection.wait_left(DEADLINE)


def test_sigterm_ends_it(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01))
    with begun(fake_ollama, "generate", "fake", "Why?") as process:
        [request] = fake_ollama.wait_for_requests(timeout=DEADLINE)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM
    assert request.connection.wait_left(DEADLINE)


def test_the_page_is_served_and_ended(fake_ollama: FakeOllama) -> None:
    pytest.importorskip("uvicorn")
    with begun(fake_ollama, "web", "--no-browser", "--port", "0") as process:
        assert process.stdout is not None
        assert "The chat page is at http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE)
    assert (process.returncode, said) == (130, "")


def test_generate_on_a_terminal(fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mark that it waits, and a text that is stopped by Ctrl-C."""
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01))
    monkeypatch.setattr(
        "cli.terminal.ON_TERMINAL", ON_TERMINAL.replace("from ollama_async", WITHOUT + "from ollama_async", 1)
    )
    shown = Terminal("--host", fake_ollama.url, "generate", "fake", "Why?", TERM="xterm-256color")
    try:
        shown.until("No model was asked")
        shown.type("\x03")
        shown.until("stopped by you after ")
        assert shown.wait() == 130
        assert "Traceback" not in shown.output
    finally:
        shown.close()


# -- the keyboard --


@pytest.mark.parametrize(("key", "reason"), [("\x03", CTRL_C), ("\x1b", _editor.ESC)])
def test_a_key_stops_an_answer_where_no_key_is_a_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, reason: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    async def press(editor: _editor.Editor, send: Any) -> CancelToken:
        token = CancelToken()
        with CtrlC().aborts(token), editor.stops(token):
            send(key)
            async with asyncio.timeout(DEADLINE):
                await token.wait()
        return token

    with create_pipe_input() as keyboard:
        monkeypatch.setattr(_editor, "create_input", lambda: keyboard)
        monkeypatch.setattr(_editor, "create_output", DummyOutput)
        monkeypatch.setitem(sys.modules, "termios", None)
        editor = _editor.Editor({}, list, lambda _: None)
        assert asyncio.run(press(editor, keyboard.send_text)).reason == reason


def test_the_history_is_kept_without_fchmod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delattr(os, "fchmod")
    monkeypatch.delattr(os, "O_CLOEXEC")
    history = _editor._history()
    history.append_string("asked before")
    file = tmp_path / "ollama-async" / "chat-history"
    assert "asked before" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


# -- the limit of work --


def test_work_is_ended_without_a_timer_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread: between instructions, not in one regular expression."""
    for name in ("setitimer", "SIGVTALRM"):
        monkeypatch.delattr(signal, name)

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                re.fullmatch("a+", "a" * 40)

    limit, before = Limit(), signal.getsignal(signal.SIGABRT)
    began = time.monotonic()
    with limit.ready():
        assert limit.run(stubborn, 0.1) is None
        assert limit.run(lambda: "done", 5) == "done"
        assert limit.run(lambda: 1 // 0, 5) is None
        assert limit.run(lambda: "late", 0.0) is None
    assert time.monotonic() - began < DEADLINE
    assert signal.getsignal(signal.SIGABRT) is before
