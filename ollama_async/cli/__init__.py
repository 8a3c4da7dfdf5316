"""The command line: ``demo``, ``generate``, ``chat``, ``batch``, ``web``, and the commands that manage models."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated

import typer

from ollama_async._call.timeouts import Timeouts

from ._batch import add_batch
from ._chat import run_chat
from ._demo import run_demo
from ._models import add_commands
from ._output import open_streams, valid, write, write_error, write_failure
from ._prompt import converse, read_line, use_readline
from ._screen import Answer, JsonScreen
from ._terminal import ERROR, INTERRUPTED, Session, give_up_stdout, parse_pairs, product_version

__all__ = ["app", "run"]

app: typer.Typer = typer.Typer(
    help="Talk to an Ollama server, and stop its answers: the socket is gone when they are.",
    epilog="Exit status: 0 all went well, 1 an error, 2 wrong usage, 130 ended by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """Run the command line and exit with its status."""
    open_streams()
    try:
        app(prog_name="ollama-async")
    except OSError as exc:  # outside of a command: its help, or the version, could not be written
        give_up_stdout()
        write_error(f"Error: cannot read or write: {exc}\n")
        sys.exit(ERROR)
    except Exception as exc:
        write_failure(exc)
        sys.exit(ERROR)


# -- options --


def _set_no_color(wanted: bool) -> None:
    if wanted:  # rich looks at it, also where typer writes
        os.environ["NO_COLOR"] = "1"


_NoColor = Annotated[
    bool, typer.Option("--no-color", help="No colours, as with NO_COLOR.", callback=_set_no_color, is_eager=True)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"ollama-async {product_version()}\n")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address of the server, as in OLLAMA_HOST.")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    no_color: _NoColor = False,
) -> None:
    context.obj = host


_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]


def _valid(text: str | None) -> str | None:
    return None if text is None else valid(text)


_System = Annotated[
    str | None, typer.Option("--system", help="System prompt, in place of the model's.", callback=_valid)
]
_Idle = Annotated[float, typer.Option("--timeout-idle", help="Seconds between two chunks.", min=0.001)]
_Total = Annotated[float | None, typer.Option("--timeout-total", help="Seconds for a whole answer.", min=0.001)]
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the model: JSON, else text. Repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="A line of JSON for each chunk, and one for how it ended.")]

# -- generate and chat --


@app.command()
def generate(
    context: typer.Context,
    model: _Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; '-' reads it from stdin.", callback=_valid)
    ] = None,
    system: _System = None,
    timeout_idle: _Idle = 300.0,
    timeout_total: _Total = None,
    option: _Option = None,
    as_json: _Json = False,
    no_color: _NoColor = False,
) -> None:
    """Have a model complete a prompt, streaming the answer to stdout.

    What comes through a pipe is put before PROMPT. Without PROMPT it is all
    of the prompt; on a terminal, one prompt after the other is asked for.

    Ctrl-C stops the answer and keeps what came. The exit status is 130 then.
    Where prompts are asked for it goes on to the next one, and a second
    Ctrl-C within a second leaves.
    """
    session, options = (
        Session(context, model, screen=JsonScreen() if as_json else None),
        parse_pairs(option, "--option"),
    )
    limits = Timeouts(idle=timeout_idle, total=timeout_total)

    def answer(text: str) -> Answer:
        return session.answer(
            lambda client, token: client.generate(
                model, text, system=system, options=options, stream=True, token=token, timeout=limits
            )
        )

    def take(text: str) -> bool:
        return text not in ("/bye", "/quit", "/exit") and bool(answer(text.strip()))

    with session.running():
        if prompt is None and sys.stdin.isatty():
            use_readline()
            session.screen.note(f"{model} at {session.url}: Ctrl-C stops an answer, /quit or Ctrl-D leaves", "dim")
            converse(session, read_line, take, "/quit")
            return
        text = _whole_prompt(prompt)
        if not text.strip():
            raise typer.BadParameter("it is empty", param_hint="PROMPT")
        outcome = answer(text).outcome
        if outcome != "done":
            raise typer.Exit(INTERRUPTED if outcome == "aborted" else ERROR)


def _whole_prompt(prompt: str | None) -> str:
    if prompt in (None, "-"):
        return sys.stdin.read()
    if not prompt.strip() or sys.stdin.isatty():
        return prompt
    piped = sys.stdin.read().rstrip("\n")
    return f"{piped}\n\n{prompt}" if piped else prompt


@app.command()
def chat(
    context: typer.Context,
    model: _Model,
    system: _System = None,
    timeout_idle: _Idle = 300.0,
    timeout_total: _Total = None,
    option: _Option = None,
    as_json: _Json = False,
    no_color: _NoColor = False,
) -> None:
    """Chat with a model; /help shows what else can be done.

    Esc or Ctrl-C stops the answer and keeps what came in the conversation; a
    second Ctrl-C within a second leaves. What comes through a pipe is a prompt
    a line.
    """
    limits = Timeouts(idle=timeout_idle, total=timeout_total)
    status = run_chat(context, model, system, parse_pairs(option, "--option"), limits, as_json=as_json)
    if status:
        raise typer.Exit(status)


# -- demo --


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Which of the server's models to use.")] = None,
) -> None:
    """Stream an answer and stop it: by abort() from another task, by asyncio.timeout(), by break.

    It uses your Ollama server when one answers and has a model, else an embedded one, which also shows when it saw the
    client leave. The exit status is 1 when something did not hold.
    """
    session = Session(context, "")
    with session.running():
        if not asyncio.run(run_demo(session, model)):
            raise typer.Exit(ERROR)


# -- web --


@app.command()
def web(
    context: typer.Context,
    address: Annotated[
        str, typer.Option("--host", help="Address to listen on; the Ollama server's --host stands before 'web'.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on: 0 for a free one; 11480 unless told.", min=0, max=65535),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            "--origin",
            metavar="SITE",
            help="Name or address of a proxy in front of the page, as https://chat.example.com. Repeatable.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Show the page in a browser.")] = True,
    timeout_idle: _Idle = 300.0,
    timeout_total: _Total = None,
) -> None:
    """Serve a chat page for this machine: models, streaming answers, and Stop.

    It uses your Ollama server when one answers and has a model, else an embedded one, and says so. Needs the extra web.
    """
    session = Session(context, "")
    try:
        from ._web import parse_sites, serve
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "ollama_async":
            raise
        how = 'install it with: pip install "ollama-async[web]"'
        session.screen.note(f"Error: the chat page needs {exc.name}; {how}", "red")
        raise typer.Exit(ERROR) from None
    limits = Timeouts(idle=timeout_idle, total=timeout_total)
    with session.running():
        serve(session, address, port, limits, allowed=parse_sites(allow_host), open_browser=browser)


add_batch(app)
add_commands(app)
