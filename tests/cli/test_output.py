"""What others wrote reaches the terminal through one place, and cannot make it do anything."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("prompt_toolkit")

from cli.terminal import CTRL_C, chat, run, terminal
from rich.table import Table
from rich.text import Text

import ollama_async.cli
from ollama_async.cli._output import SafeConsole, printable
from ollama_async.testing import FakeOllama, Reply

CLI = Path(ollama_async.cli.__file__).parent

# Titles, the clipboard, the cursor, 8-bit codes, the order of what is shown.
ATTACKS = [
    "\x1b]52;c;aGk=\x1b\\",
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9d0;owned\x9c",
    "\x9b2J",
    "\x7f",
    "\u202e",
    "\u2066",
]
EVIL = "evil" + "".join(ATTACKS)


def is_safe(output: str) -> bool:
    """Whether a terminal got none of the attacks, each of which has something that no code of ours has."""
    return not any(attack in output for attack in ATTACKS)


# -- one writer --

# What a module may do with a stream, apart from writing.
HARMLESS = {"isatty", "fileno", "flush", "read", "readline"}
WRITERS = {"print", "echo", "secho", "writelines", "print_exc", "Console", "RichHandler", "StreamHandler"}
# They draw on a console, and make one if they are given none.
DRAWERS = {"Live", "Progress", "Status", "Prompt"}


def raw_writers(source: str) -> Iterator[str]:
    """What in a module writes to the terminal by itself."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if text in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"):
            use = parents[node]
            if not (isinstance(use, ast.Attribute) and use.attr in HARMLESS):
                yield ast.unparse(use)
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        on_console = owner.endswith((".out", "_notes", "_console")) or owner.startswith("SafeConsole(")
        if name in WRITERS and not on_console:
            yield text
        if name in DRAWERS and "console" not in {keyword.arg for keyword in node.keywords}:
            yield text
        if text.startswith(("os.write(", "logging.", "warnings.warn", "warnings.show")) or "/dev/tty" in text:
            yield text
        if name == "create_output" and owner:
            yield text


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_only_one_module_writes_to_the_terminal(path: Path) -> None:
    if path.stem == "_output":
        return
    assert list(raw_writers(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "print(text)",
        "typer.echo(text)",
        "click.secho(text)",
        "sys.stdout.write(text)",
        "out = sys.stderr",
        "print(text, file=sys.stderr)",
        "Console().print(text)",
        "rich.print(text)",
        "Live(shown)",
        "os.write(1, text)",
        "logging.warning(text)",
        "open('/dev/tty', 'w').write(text)",
    ],
)
def test_a_raw_writer_is_found(source: str) -> None:
    assert list(raw_writers(source))


# -- what is filtered --


@pytest.mark.parametrize("attack", [*ATTACKS, "\r", "\x00", "\x85"])
def test_controls_are_replaced(attack: str) -> None:
    assert attack not in printable(f"a{attack}b")
    console = SafeConsole(force_terminal=True, width=80)
    console.file = shown = io.StringIO()
    console.print(f"a{attack}b", soft_wrap=True)
    console.print(Text(f"a{attack}b", style="bold"))
    table = Table(f"head{attack}", title=f"title{attack}")
    table.add_row(f"cell{attack}", Text(f"cell{attack}"))
    console.print(table)
    console.print(f"a{attack}b", style="red", end=f"end{attack}")
    assert attack not in shown.getvalue().replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert shown.getvalue().count("\ufffd") >= 6


@pytest.mark.parametrize(
    "text", ["a\tb\nc", "\u200d\u200c\u200e\u200f", "\U0001f468\u200d\U0001f469", "\u0628\u05d0", "e\u0301"]
)
def test_what_scripts_need_stays(text: str) -> None:
    assert printable(text) == text


def test_of_markup_and_names_of_pictures_nothing_is_made() -> None:
    console = SafeConsole(force_terminal=True, width=80)
    console.file = shown = io.StringIO()
    console.print("[bold]a[/bold] :smile: 'x' 12 [link=http://x.test]b[/link]")
    assert shown.getvalue() == "[bold]a[/bold] :smile: 'x' 12 [link=http://x.test]b[/link]\n"


# -- each command, on a terminal --


def tags(name: str = EVIL) -> Reply:
    return Reply.json({"models": [{"name": name, "model": name, "size": 1, "digest": name}]})


def error() -> Reply:
    return Reply.json({"error": EVIL}, 500)


def shown(server: FakeOllama, *arguments: str, until: str = "", **variables: str) -> str:
    with terminal("--host", server.url, *arguments, **variables) as opened:
        if until:
            opened.until(until)
            opened.type(CTRL_C)
        opened.wait()
        return opened.output


DETAILS = {"details": {"family": EVIL}, "parameters": EVIL, "capabilities": [EVIL], "model_info": {EVIL: EVIL}}
COMMANDS: list[tuple[str, Reply, list[str]]] = [
    ("/api/tags", tags(), ["list"]),
    ("/api/tags", tags(), ["list", "--json"]),
    ("/api/tags", error(), ["list"]),
    ("/api/tags", error(), ["list", "--json"]),
    ("/api/ps", tags(), ["ps"]),
    ("/api/ps", tags(), ["ps", "--json"]),
    ("/api/show", Reply.json(DETAILS), ["show", "fake"]),
    ("/api/show", Reply.json(DETAILS), ["show", "fake", "--verbose"]),
    ("/api/show", error(), ["show", "fake"]),
    ("/api/version", Reply.json({"version": EVIL}), ["version"]),
    ("/api/version", Reply.json({"version": EVIL}), ["version", "--json"]),
    ("/api/pull", Reply([{"status": EVIL, "total": 9}]), ["pull", "fake"]),
    ("/api/pull", Reply([{"status": EVIL}, {"error": EVIL}]), ["pull", "fake", "--json"]),
    ("/api/push", Reply([{"status": "x"}, {"error": EVIL}]), ["push", "fake"]),
    ("/api/copy", error(), ["cp", "fake", "other"]),
    ("/api/delete", error(), ["rm", "fake"]),
    ("/api/generate", error(), ["load", "fake"]),
    ("/api/generate", Reply.generate(EVIL, "\x1b", "]0;owned", thinking=[EVIL]), ["generate", "fake", "x"]),
    ("/api/generate", Reply.generate(EVIL, thinking=[EVIL]), ["generate", "fake", "x", "--json"]),
    ("/api/generate", error(), ["generate", "fake", "x"]),
    ("/api/generate", Reply([b"<title>" + EVIL.encode() + b"</title>"], status=500), ["generate", "fake", "x"]),
]


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
@pytest.mark.parametrize(
    ("route", "reply", "arguments"), COMMANDS, ids=lambda value: "-".join(value) if isinstance(value, list) else None
)
def test_a_command_shows_but_does_not_obey_a_server(
    fake_ollama: FakeOllama, route: str, reply: Reply, arguments: list[str], term: str
) -> None:
    fake_ollama.script(route, reply, always=True)
    output = shown(fake_ollama, *arguments, TERM=term)
    assert is_safe(output)
    assert "evil" in output


@pytest.mark.parametrize("reply", [tags, error, lambda: tags("evil-embed" + EVIL)], ids=["name", "error", "no-chat"])
@pytest.mark.parametrize(
    "arguments", [["demo"], ["demo", "--model", "nope"], ["web", "--no-browser", "--port", "0"]], ids="-".join
)
def test_demo_and_web_do_not_obey_a_server(
    fake_ollama: FakeOllama, reply: Callable[[], Reply], arguments: list[str]
) -> None:
    pytest.importorskip("uvicorn")
    fake_ollama.script("/api/tags", reply(), always=True)
    until = "" if "nope" in arguments else "Ctrl-C ends" if "web" in arguments else "token.abort()"
    output = shown(fake_ollama, *arguments, until=until)
    assert is_safe(output)


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL],
        ["generate", "fake", "x", "--option", f"={EVIL}"],
        ["--host", EVIL, "list"],
        ["show", "fake", f"--{EVIL}"],
    ],
    ids=["command", "option", "host", "unknown"],
)
def test_wrong_usage_does_not_control_the_terminal(fake_ollama: FakeOllama, arguments: list[str]) -> None:
    """A script passes on what strangers gave it."""
    output = shown(fake_ollama, *arguments, TERM="xterm-256color")
    assert is_safe(output)
    assert "evil" in output


def test_help_keeps_its_colours(fake_ollama: FakeOllama) -> None:
    assert "\x1b[1m" in shown(fake_ollama, "--help", TERM="xterm-256color")


def test_an_interactive_chat_does_not_obey_a_server(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    cards = {"models": [{"name": name} for name in ("fake", "fake-good", f"fake-{EVIL}")]}
    fake_ollama.script("/api/tags", Reply.json(cards), always=True)
    broken: list[Any] = [*Reply.chat(f"# {EVIL}\n\n```{EVIL}\n{EVIL}\n```\n", thinking=[EVIL], done=False).steps]
    fake_ollama.script("/api/chat", Reply([*broken, {"error": EVIL}]))
    with chat(fake_ollama, tmp_path) as opened:
        opened.says("go")
        opened.shows("Error: .*evil")
        opened.says("/model")
        opened.shows("the server has: fake, fake-good, fake-evil")
        opened.ready()
        opened.type("/model fake-")
        opened.type("\t")
        # The name that cannot be shown as it is is not offered.
        opened.shows(">>> /model fake-(good)? fake-good")
        opened.type(CTRL_C)
        opened.says("/quit")
        assert opened.wait() == 0
        assert is_safe(opened.output)


# -- what libraries write by themselves --

AS_COMMAND = f"""\
EVIL = {EVIL!r}
import sys
from ollama_async import cli

@cli.app.command()
def do(code: str):
    exec(code, globals())

cli.run()
"""


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError(EVIL)",
        "import logging; logging.getLogger('x').warning(EVIL)",
        "import warnings; warnings.simplefilter('always'); warnings.warn(EVIL)",
        "print(EVIL); print(EVIL, file=sys.stderr)",
        "sys.stdout.writelines([EVIL])",
        "class A:\n def __del__(self): raise ValueError(EVIL)\nA()",
        "import threading; t = threading.Thread(target=lambda: 1 / len(EVIL[:0]), name=EVIL); t.start(); t.join()",
    ],
)
def test_what_libraries_write_is_filtered_too(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("cli.terminal.ON_TERMINAL", AS_COMMAND)
    with terminal("do", code) as opened:
        opened.wait()
        assert is_safe(opened.output)
        assert "evil" in opened.output


# -- files and pipes --


def test_a_pipe_gets_the_answer_as_it_is(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate(EVIL))
    assert run("--host", fake_ollama.url, "generate", "fake", "x").stdout == f"{EVIL}\n"


@pytest.mark.parametrize("command", ["list", "ps"])
def test_json_keeps_what_a_terminal_must_not_get(fake_ollama: FakeOllama, command: str) -> None:
    fake_ollama.script({"list": "/api/tags", "ps": "/api/ps"}[command], tags())
    output = run("--host", fake_ollama.url, command, "--json").stdout
    assert output.isascii()
    assert json.loads(output)["models"][0]["name"] == EVIL
