"""The commands that manage models: tables and progress for the eye, JSON for scripts."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ollama_async._errors import AbortError, NotFoundError, OllamaError

from ._footer import Footer
from ._output import SafeConsole, valid, write_json
from ._terminal import ERROR, INTERRUPTED, Session, parse_pairs, product_version

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterable

    from ollama_async._cancel import CancelToken
    from ollama_async._client import AsyncClient
    from ollama_async._model.progress import ProgressResponse
    from ollama_async._model.types import Model

    from ._screen import Screen

__all__ = ["add_commands"]

T = TypeVar("T")

_DRAW_SECONDS = 0.1

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and errors as JSON to stderr.")]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Allow a registry without TLS.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for name, command in (
        ("list", list_models),
        ("ps", ps),
        ("show", show),
        ("pull", pull),
        ("push", push),
        ("create", create),
        ("cp", cp),
        ("rm", rm),
        ("load", load),
        ("unload", unload),
        ("version", version),
    ):
        app.command(name)(command)


class _Run:
    """One run of a command: what it asks the server for, and what it says of that."""

    def __init__(self, context: typer.Context, *, as_json: bool, model: str = "", stopped: str = "") -> None:
        self.session = Session(context, model)
        self.as_json = as_json
        self._stopped = stopped

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Turn what ends the command early into one line and an exit status."""
        with self.session.running():
            try:
                yield
            except AbortError:
                self.complain(f"stopped by you{self._stopped}")
                raise typer.Exit(INTERRUPTED) from None
            except OllamaError as exc:
                self.complain(self.explain(exc))
                raise typer.Exit(ERROR) from None

    def explain(self, exc: OllamaError) -> str:
        """Say what happened, and what to do."""
        if isinstance(exc, NotFoundError) and self.session.model:
            url, model = self.session.url, self.session.model
            return f"the server at {url} has no model {model!r}: 'ollama-async list' shows what it has"
        return self.session.explain(exc)

    def complain(self, text: str) -> None:
        """Say on stderr what went wrong."""
        if self.as_json:
            write_json({"error": text}, error=True)
        else:
            self.session.screen.note(f"Error: {text}" if not text.startswith("stopped") else text, "red")

    def show(self, answer: Model) -> bool:
        """Write an answer as JSON, if that is wanted."""
        if self.as_json:
            write_json(answer.model_dump(mode="json", exclude_none=True))
        return self.as_json

    def say(self, answer: Model, text: str) -> None:
        """Say what has been done."""
        if not self.show(answer):
            self.session.screen.out.print(text, soft_wrap=True)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # What goes into a pipe is not cut to the width of a terminal.
    width = None if sys.stdout.isatty() else 1000
    SafeConsole(width=width).print(table)


# -- the models --


def list_models(context: typer.Context, as_json: _Json = False) -> None:
    """List the models that the server has."""
    run = _Run(context, as_json=as_json)
    with run.running():
        answer = run.session.ask(lambda client, token: client.list(token=token))
        if not run.show(answer):
            rows = [
                (model.name or "", _short(model.digest), _size(model.size), _when(model.modified_at))
                for model in answer.models
            ]
            _table(("NAME", "ID", "SIZE", "MODIFIED"), rows)


def ps(context: typer.Context, as_json: _Json = False) -> None:
    """List the models that are loaded."""
    run = _Run(context, as_json=as_json)
    with run.running():
        answer = run.session.ask(lambda client, token: client.ps(token=token))
        if not run.show(answer):
            rows = [
                (
                    model.name or "",
                    _short(model.digest),
                    _size(model.size),
                    _processor(model.size, model.size_vram),
                    str(model.context_length or ""),
                    _until(model.expires_at),
                )
                for model in answer.models
            ]
            _table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), rows)


def show(
    context: typer.Context,
    model: _Model,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show all metadata and tensors.")] = False,
    as_json: _Json = False,
) -> None:
    """Show what the server knows about a model."""
    run = _Run(context, as_json=as_json, model=model)
    with run.running():
        answer = run.session.ask(lambda client, token: client.show(model, verbose=verbose, token=token))
        if run.show(answer):
            return
        details = answer.details.model_dump(exclude_none=True) if answer.details is not None else {}
        rows = [(name.replace("_", " "), _shown(value)) for name, value in details.items() if value]
        rows += [
            (name, _shown(getattr(answer, name))) for name in ("capabilities", "requires") if getattr(answer, name)
        ]
        rows += [("parameters", " ".join(line.split())) for line in (answer.parameters or "").splitlines()]
        if verbose:
            rows += [(name, _shown(value)) for name, value in (answer.model_info or {}).items()]
            rows += [(tensor.name, f"{tensor.type} {list(tensor.shape)}") for tensor in answer.tensors or ()]
        _table(("", ""), rows)


def version(context: typer.Context, as_json: _Json = False) -> None:
    """Show the versions of the server and of this program."""
    run = _Run(context, as_json=as_json)
    with run.running():
        answer = run.session.ask(lambda client, token: client.version(token=token, timeout=10))
        if as_json:
            write_json({"version": answer.version, "ollama-async": product_version()})
        else:
            versions = f"Ollama {answer.version} at {run.session.url}\nollama-async {product_version()}"
            run.session.screen.out.print(versions, soft_wrap=True)


# -- changing it --


def cp(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Name of the model.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="Its second name.")],
    as_json: _Json = False,
) -> None:
    """Give a model a second name."""
    run = _Run(context, as_json=as_json, model=source)
    with run.running():
        answer = run.session.ask(lambda client, token: client.copy(source, destination, token=token))
        run.say(answer, f"{source} is {destination} as well")


def rm(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names of the models.")],
    as_json: _Json = False,
) -> None:
    """Delete models. If one cannot be deleted, the others are still deleted."""
    failed = False
    for model in models:
        run = _Run(context, as_json=as_json, model=model)
        with run.running():
            try:
                answer = run.session.ask(lambda client, token, model=model: client.delete(model, token=token))  # type: ignore[misc]
                run.say(answer, f"{model} is deleted")
            except NotFoundError as exc:
                run.complain(run.explain(exc))
                failed = True
    if failed:
        raise typer.Exit(ERROR)


def load(
    context: typer.Context,
    model: _Model,
    keep_alive: Annotated[
        str | None, typer.Option("--keep-alive", help="How long it stays loaded: '10m', seconds, or -1 for ever.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Load a model, so that the next answer can begin at once."""
    run = _Run(context, as_json=as_json, model=model, stopped=": the server gives the load up")
    with run.running():
        kept = _number(keep_alive)
        answer = run.session.ask(lambda client, token: client.load(model, kept, token=token))
        run.say(answer, f"{model} is loaded")


def unload(context: typer.Context, model: _Model, as_json: _Json = False) -> None:
    """Unload a model, once its running answers are done."""
    run = _Run(context, as_json=as_json, model=model)
    with run.running():
        answer = run.session.ask(lambda client, token: client.unload(model, token=token))
        run.say(answer, f"{model} is unloaded")


# -- what takes long --


def pull(
    context: typer.Context,
    model: _Model,
    insecure: _Insecure = False,
    resume: Annotated[bool, typer.Option(help="Continue by itself when the download breaks off.")] = True,
    as_json: _Json = False,
) -> None:
    """Let the server download a model. Ctrl-C stops it and keeps the part that has arrived."""
    run = _Run(context, as_json=as_json, stopped=": pull it again to go on where it was")
    with run.running():
        _follow(
            run,
            lambda client, token: client.pull(model, insecure=insecure, resume=resume, stream=True, token=token),
        )


def push(context: typer.Context, model: _Model, insecure: _Insecure = False, as_json: _Json = False) -> None:
    """Let the server upload a model."""
    run = _Run(context, as_json=as_json, model=model, stopped=": push it again to go on where it was")
    with run.running():
        _follow(run, lambda client, token: client.push(model, insecure=insecure, stream=True, token=token))


def create(
    context: typer.Context,
    model: _Model,
    base: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="Make it from this model.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="PATH", help="Make it from this GGUF file or folder.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantization, such as q4_K_M.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Text of the licence.")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="KEY=VALUE", help="Default option: JSON, or else text. Repeatable."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a model from another one, or from files on this machine, which are uploaded."""
    if (base is None) == (file is None):
        raise typer.BadParameter("give one of --from and --file")
    run = _Run(context, as_json=as_json, model=base or "")
    texts = {"system": system, "template": template, "quantize": quantize, "license": licence}
    given: dict[str, Any] = {name: text and valid(text) for name, text in texts.items()}
    given["parameters"] = parse_pairs(parameter, "--parameter") or None
    with run.running():
        if file is None:
            _follow(run, lambda client, token: client.create(model, from_=base, stream=True, token=token, **given))
        else:

            async def upload(client: AsyncClient, token: CancelToken) -> None:
                with _display(run) as display:
                    await client.create_from(model, file, on_progress=display, token=token, **given)

            run.session.ask(upload)


def _follow(run: _Run, start: Callable[[AsyncClient, CancelToken], AsyncIterator[ProgressResponse]]) -> None:
    async def work(client: AsyncClient, token: CancelToken) -> None:
        with _display(run) as display:
            async for step in start(client, token):
                display(step)

    run.session.ask(work)


@contextlib.contextmanager
def _display(run: _Run) -> Generator[Callable[[ProgressResponse], None]]:
    """Yield what shows a step: a line of JSON, a bar on a terminal, a line for each new status elsewhere.

    An event loop has to be running.
    """
    if run.as_json:
        yield _json_line
        return
    console = SafeConsole()
    if not console.is_interactive:
        yield _StatusLines(run.session.screen)
        return
    columns = [TextColumn("{task.fields[status]}", markup=False), BarColumn()]
    # It is drawn by the footer, and not started.
    progress = Progress(*columns, TextColumn("{task.fields[figures]}", markup=False), console=console)
    task = progress.add_task("", total=None, status="", figures="")

    def display(step: ProgressResponse) -> None:
        overall = step.overall
        total = None if overall.fraction is None else 1.0
        done, text = overall.fraction or 0, step.status or ""
        progress.update(task, total=total, completed=done, status=text, figures=_figures(step))

    footer = Footer(console, progress)
    footer.start(_DRAW_SECONDS)
    try:
        yield display
    finally:
        footer.stop()
        SafeConsole().print(progress)


def _json_line(step: ProgressResponse) -> None:
    overall = step.overall
    figures = {name: getattr(overall, name) for name in ("completed", "total", "fraction", "bytes_per_second", "eta")}
    write_json({**step.model_dump(exclude_none=True), "overall": figures})


class _StatusLines:
    """A line for each new status."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._last = ""

    def __call__(self, step: ProgressResponse) -> None:
        if step.status and step.status != self._last:
            self._last = step.status
            self._screen.out.print(step.status, soft_wrap=True)


def _figures(step: ProgressResponse) -> str:
    overall = step.overall
    if not overall.total:
        return ""
    parts = [f"{decimal(overall.completed)} of {decimal(overall.total)}"]
    if overall.bytes_per_second:
        parts.append(f"{decimal(int(overall.bytes_per_second))}/s")
    if overall.eta is not None and not step.done:
        parts.append(f"{_span(overall.eta)} left")
    return ", ".join(parts)


# -- words for numbers --


def _short(digest: str | None) -> str:
    return (digest or "").removeprefix("sha256:")[:12]


def _size(size: int | None) -> str:
    return "" if size is None else decimal(size)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(text: str | None) -> float | str | None:
    return float(text) if text is not None and re.fullmatch(r"-?\d+(\.\d+)?", text) else text


def _processor(size: int | None, vram: int | None) -> str:
    if not size or not vram:
        return "100% CPU"
    on_gpu = min(100, round(100 * vram / size))
    return "100% GPU" if on_gpu == 100 else f"{100 - on_gpu}%/{on_gpu}% CPU/GPU"


_DAY = 86400
_SPANS = (
    (365 * _DAY, "year"),
    (30 * _DAY, "month"),
    (7 * _DAY, "week"),
    (_DAY, "day"),
    (3600, "hour"),
    (60, "minute"),
)
# A model that is kept for ever has a date beyond this many seconds.
_FOREVER = 50 * 365 * _DAY


def _span(seconds: float) -> str:
    for length, name in _SPANS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''}"
    return f"{int(seconds)} s"


def _from_now(moment: datetime) -> float:
    """Return how many seconds it is from now; negative for what is over."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()


def _when(moment: datetime | None) -> str:
    """Say when, from now."""
    if moment is None:
        return ""
    seconds = _from_now(moment)
    if seconds > _FOREVER:
        return "Forever"
    return f"{_span(seconds)} from now" if seconds >= 0 else f"{_span(-seconds)} ago"


def _until(moment: datetime | None) -> str:
    """Say how long a model stays loaded.

    The server counts the time from the end of the last answer. A model whose time is over, and that is still there,
    gives an answer, after which the time is counted anew, or is just being unloaded.
    """
    over = moment is not None and _from_now(moment) < 0
    return "in use, or being unloaded" if over else _when(moment)
