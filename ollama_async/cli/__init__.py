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
from ._fake import add_fake
from ._models import add_commands
from ._output import open_streams, valid, write, write_error, write_failure
from ._prompt import converse, read_line, use_readline
from ._screen import Answer, JsonScreen
from ._terminal import ERROR, INTERRUPTED, Session, give_up_stdout, parse_pairs, product_version
from ._tools import load_tools
from ._until import FORMS, ObjectScreen, parse_format, parse_until

__all__ = ["app", "run"]

app: typer.Typer = typer.Typer(
    help="Talk to an Ollama server. Stopping an answer closes its connection at once.",
    epilog="Exit status: 0 success, 1 an error, 2 wrong usage, 130 ended by Ctrl-C.",
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
    host: Annotated[str | None, typer.Option(help="Address of the server, instead of OLLAMA_HOST.")] = None,
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
    str | None, typer.Option("--system", help="System prompt, instead of the model's own.", callback=_valid)
]
_Idle = Annotated[
    float, typer.Option("--timeout-idle", metavar="SECONDS", help="Limit for the time between two chunks.", min=0.001)
]
_Total = Annotated[
    float | None,
    typer.Option("--timeout-total", metavar="SECONDS", help="Limit for the time of a whole answer.", min=0.001),
]
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the model: JSON, or else text. Repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="Write a line of JSON for each chunk, and one for how it ended.")]
_Until = Annotated[
    list[str] | None,
    typer.Option(
        "--until",
        metavar="CONDITION",
        help=f"Stop the answer, and keep it, when this is met: {FORMS}. Repeatable; the first that is met counts.",
    ),
]
_MaxSeconds = Annotated[
    float | None,
    typer.Option(
        "--max-seconds",
        metavar="SECONDS",
        help="Stop the answer, and keep it, this long after its first chunk.",
        min=0.001,
    ),
]
_Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="MODULE:FUNCTION",
        help="A function that the model may call without asking you. Repeatable.",
    ),
]

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
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FILE",
            help="Answer in JSON: FILE is a JSON schema, or 'json' for any. Stops when the object is complete.",
        ),
    ] = None,
    until: _Until = None,
    max_seconds: _MaxSeconds = None,
    as_json: _Json = False,
    no_color: _NoColor = False,
) -> None:
    """Let a model complete a prompt, and stream the answer to stdout.

    Text from a pipe comes before PROMPT. Without PROMPT it is the whole
    prompt. On a terminal the command asks for one prompt after the other.

    Ctrl-C stops the answer and keeps the partial answer; the exit status is
    then 130. On a terminal the next prompt follows, and a second Ctrl-C within
    a second leaves.

    With --format, a terminal shows the object while it grows. A pipe gets the
    whole object, or nothing.
    """
    schema, options = parse_format(output_format), parse_pairs(option, "--option")
    enough = parse_until(until, max_seconds, as_object=schema is not None)
    whole = ObjectScreen() if schema is not None and not as_json else None
    session = Session(context, model, screen=JsonScreen() if as_json else whole)
    limits = Timeouts(idle=timeout_idle, total=timeout_total)

    def answer(text: str) -> Answer:
        answer = session.answer(
            lambda client, token: client.generate(
                model,
                text,
                system=system,
                options=options,
                format=schema,
                stream=True,
                until=enough,
                token=token,
                timeout=limits,
            )
        )
        if whole is not None:
            whole.check(answer)
        return answer

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
        ended = answer(text)
        if ended.error is not None or ended.outcome not in ("done", "until"):
            raise typer.Exit(INTERRUPTED if ended.outcome == "aborted" else ERROR)


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
    tools: _Tools = None,
    until: _Until = None,
    max_seconds: _MaxSeconds = None,
    as_json: _Json = False,
    no_color: _NoColor = False,
) -> None:
    """Chat with a model; /help lists the commands and keys.

    Esc or Ctrl-C stops the answer and keeps the partial answer in the
    conversation; a second Ctrl-C within a second leaves. From a pipe, each
    line is a prompt.
    """
    limits = Timeouts(idle=timeout_idle, total=timeout_total)
    options, functions = parse_pairs(option, "--option"), load_tools(tools or (), "--tools")
    enough = parse_until(until, max_seconds)
    status = run_chat(context, model, system, options, limits, until=enough, as_json=as_json, tools=functions)
    if status:
        raise typer.Exit(status)


# -- demo --


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Which of the server's models to use.")] = None,
) -> None:
    """Stream an answer and stop it in three ways: abort(), asyncio.timeout(), break.

    It uses your Ollama server if one answers and has a model. If not, it uses
    an embedded fake server, and also shows when that saw the client leave. The
    exit status is 1 if a stop did not work as promised.
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
        str, typer.Option("--host", help="Address to listen on. Give the Ollama server's --host before 'web'.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on; 0 for a free one. Default: 11480, or a free one.", min=0, max=65535),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="SITE",
            help="Name or address of a proxy in front of the page. Repeatable.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    unattended: Annotated[
        str,
        typer.Option(
            metavar="SECONDS",
            help="How long an answer goes on while no tab shows it; 0 ends it at once, none lets it finish.",
        ),
    ] = "30",
    tools: _Tools = None,
    timeout_idle: _Idle = 300.0,
    timeout_total: _Total = None,
) -> None:
    """Serve a chat page for this machine: models, streaming answers, and Stop.

    It uses your Ollama server if one answers and has a model. If not, it uses
    an embedded fake server, and says so. Needs the extra web.
    """
    session = Session(context, "")
    try:
        from ._web import parse_sites, parse_unattended, serve
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "ollama_async":
            raise
        how = 'install it with: pip install "ollama-async[web]"'
        session.screen.note(f"Error: the chat page needs {exc.name}; {how}", "red")
        raise typer.Exit(ERROR) from None
    limits = Timeouts(idle=timeout_idle, total=timeout_total)
    functions = load_tools(tools or (), "--tools")
    with session.running():
        serve(
            session,
            address,
            port,
            limits,
            unattended=parse_unattended(unattended),
            allowed=parse_sites(allow_host),
            tools=functions,
            open_browser=browser,
        )


add_batch(app)
add_fake(app)
add_commands(app)
