"""``batch``: every row of a file, asked of one server or many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live
from rich.text import Text

from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken
from ollama_async._client import AsyncClient
from ollama_async._errors import AbortError, NoHost, OllamaError, RequestError
from ollama_async.batch import BatchError, BatchProgress, BatchResult, HostsGone, OutputRefused, batch
from ollama_async.pool import Host
from ollama_async.testing import FakeOllama

from ._output import SafeConsole, write_error, write_json
from ._terminal import ERROR, Session, parse_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ollama_async.pool import Kind

__all__ = ["add_batch"]

_LINE_SECONDS = 10.0
_USAGE = 2
# How long a call waits for a host before the batch looks whether it has been too long.
_PATIENCE = 5.0
_EMBEDDED_LOOK = Timeouts(connect=2, total=2)


class _Stop:
    """What Ctrl-C and SIGTERM do: the first stops the batch and keeps the partial answers, the second leaves."""

    def __init__(self, token: CancelToken) -> None:
        self._token = token
        self.status: int | None = None

    def _come(self, number: int, _: object) -> None:
        if self.status is not None:
            # What was answered is in the file already.
            os._exit(128 + number)
        self.status = 128 + number
        self._token.abort(signal.Signals(number).name)

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Do so while the running loop is in the block."""
        loop = asyncio.get_running_loop()
        # A shell may have started this in the background: then Ctrl-C is not meant for us.
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        mine = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in mine:
            # It has the signal wake the loop, which may be just about to go to sleep; the handler is then replaced.
            # The loop of Windows has none of this, and looks for signals by itself.
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, lambda: None)
            signal.signal(number, self._come)
        try:
            yield
        finally:
            for number in mine:
                with contextlib.suppress(NotImplementedError):
                    loop.remove_signal_handler(number)
                signal.signal(number, before[number])


class _Display:
    """How far the batch is, on stderr: a line that changes on a terminal, otherwise a line every ten seconds."""

    def __init__(self, *, as_json: bool) -> None:
        self._console = SafeConsole(stderr=True)
        self._as_json = as_json
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._moves = self._console.is_terminal and not as_json
        self._told_at = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show it while in the block."""
        with self._live if self._moves else contextlib.nullcontext():
            yield

    def update(self, progress: BatchProgress) -> None:
        """Show how far it is now."""
        if self._moves:
            self._live.update(Text(_line(progress)), refresh=True)
        elif time.monotonic() - self._told_at >= _LINE_SECONDS:
            self._told_at = time.monotonic()
            if self._as_json:
                write_json(asdict(progress.result) | {"total": progress.total}, error=True)
            else:
                write_error(_line(progress) + "\n")


def _line(progress: BatchProgress) -> str:
    result, total = progress.result, progress.total
    ended = result.done + result.failed
    rate = ended / result.seconds if result.seconds else 0.0
    parts = [f"{ended + result.skipped}{'' if total is None else f'/{total}'}", f"{rate:.1f}/s"]
    parts.append(f"{result.tokens / max(result.seconds, 1e-9):.0f} tokens/s")
    if total is not None and rate:
        left = int((total - ended - result.skipped) / rate)
        parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    parts.append(f"{result.failed} failed")
    parts += [
        f"{host.url.partition('//')[2]} {host.running}/{host.slots}{' OUT' if host.why else ''}"
        for host in progress.hosts
    ]
    return "  ".join(parts)


def _hosts(given: list[str] | None, slots: int) -> list[Host]:
    hosts: list[Host] = []
    for each in given or ():
        url, equals, count = each.rpartition("=")
        if equals and not count.isdecimal():
            raise typer.BadParameter(f"{each!r}: write it as URL or URL=SLOTS", param_hint="--host")
        hosts.append(Host(url, int(count)) if equals else Host(each, slots))
    return hosts


def _format(given: str | None) -> Any:
    if given is None or given == "json":
        return given
    try:
        return json.loads(given if given.lstrip().startswith("{") else Path(given).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(f"{exc}: give json, a JSON schema, or a file with one", param_hint="--format") from exc


class _Server:
    """The server of a batch that names none: the user's, or an embedded one, and never one after the other."""

    def __init__(self, session: Session, output: Path, *, restart: bool) -> None:
        self._session = session
        self._mark = output.with_name(output.name + ".embedded")
        self._begun = not restart and output.exists() and output.stat().st_size > 0

    async def find(self, stack: contextlib.ExitStack, model: str | None, slots: int) -> Host:
        """Return the server, and have the embedded one run as long as the stack."""
        session = self._session
        answers = bool(session.host or os.environ.get("OLLAMA_HOST"))
        if not answers:
            async with AsyncClient(session.url) as client:
                with contextlib.suppress(OllamaError):
                    await client.version(timeout=_EMBEDDED_LOOK)
                    answers = True
        if answers:
            if self._begun and self._mark.exists():
                raise OutputRefused(
                    "the output has answers of the embedded fake server: name another one, or start over with --restart"
                )
            self._mark.unlink(missing_ok=True)
            return Host(session.url, slots)
        if self._begun and not self._mark.exists():
            raise HostsGone(f"no Ollama server answers at {session.url}: start it, and run the same command again")
        server = stack.enter_context(FakeOllama(models=[model or "fake"], interval=0.001))
        with contextlib.suppress(OSError):
            self._mark.touch()
        why = f"no Ollama server answers at {session.url}"
        session.screen.note(f"Using an embedded fake server (no model computes anything): {why}", "yellow")
        return Host(server.url, slots)


async def _run(
    session: Session,
    stop: _Stop,
    token: CancelToken,
    display: _Display,
    hosts: list[Host],
    server: _Server,
    slots: int,
    settings: dict[str, Any],
    ray: str | None,
) -> BatchResult:
    with stop.watching(), contextlib.ExitStack() as stack:
        if ray is not None:
            return await _run_on_ray(ray, session.url, token, display, hosts, slots, settings)
        pool = hosts or [await server.find(stack, settings["model"], slots)]
        with display.shown():
            return await batch(pool=pool, token=token, on_progress=display.update, **settings)


async def _run_on_ray(
    address: str,
    url: str,
    token: CancelToken,
    display: _Display,
    hosts: list[Host],
    slots: int,
    settings: dict[str, Any],
) -> BatchResult:
    from ollama_async.ray import RayHost, RayPool

    # Without --host there is a server on each machine, at the address that is the user's own.
    given = [RayHost(host.url, host.slots or slots) for host in hosts] or None
    options = {"timeout": settings.pop("timeout"), "patience": min(settings["wait_hosts"], _PATIENCE)}
    try:
        async with RayPool(given, address=address, url=url, slots=slots, token=token, **options) as pool:
            with display.shown():
                return await batch(pool=pool, token=token, on_progress=display.update, **settings)
    except NoHost as exc:
        # The batch itself waits for hosts: this is the cluster.
        raise HostsGone(f"{exc.detail}; start one with 'ray start --head', or name another with --ray") from exc


def _summary(result: BatchResult | None, output: Path) -> str:
    if result is None:
        return ""
    parts = [f"{result.done} answered"]
    parts += [f"{result.skipped} were there already"] if result.skipped else []
    parts += [f"{result.changed} of them for another row (--changed asks again)"] if result.changed else []
    parts += [f"{result.failed} failed"] if result.failed else []
    parts += [f"{result.aborted} stopped, partial answers kept"] if result.aborted else []
    where = f"; see {output}.failed.jsonl" if result.failed or result.aborted else ""
    return ", ".join(parts) + f" in {result.seconds:.1f} s{where}"


def _batch(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSONL or Parquet file with a prompt in each row.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write the answers to.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to ask, for rows that name none.")] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="URL[=SLOTS]",
            help="A server, and how many calls it runs at once (its OLLAMA_NUM_PARALLEL). Repeatable.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster whose machines call the servers: auto or HOST:PORT."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Calls at once at each host without =SLOTS.", min=1)] = 1,
    embed: Annotated[bool, typer.Option("--embed", help="Turn the prompts into vectors (embeddings).")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Complete the prompts, instead of chatting.")] = False,
    id_field: Annotated[str, typer.Option("--id", metavar="FIELD", help="Field with the id of a row.")] = "id",
    prompt_field: Annotated[
        str | None,
        typer.Option("--prompt", metavar="FIELD", help="Field with the prompt; the other fields are ignored."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", help='Make the prompt from fields: "Translate: {text}".')
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt of each call.")] = None,
    answer_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="SCHEMA", help="What each answer must be: json, a JSON schema, or a file with one."
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Option of the model: JSON, or else text. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read only this many rows, to try it out.", min=1)] = None,
    retries: Annotated[int, typer.Option(help="Further attempts after an error that can pass.", min=0)] = 2,
    wait_hosts: Annotated[float, typer.Option(help="Seconds to wait while no server answers.", min=0)] = 300.0,
    timeout_first: Annotated[
        float, typer.Option("--timeout-first", help="Seconds within which an answer must begin.", min=0.001)
    ] = 300.0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also ask again for rows that failed for good.")
    ] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Also ask again for rows that have changed.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what is in OUTPUT, and start over.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Continue even if OUTPUT belongs to another job.")] = False,
    fsync: Annotated[float, typer.Option(help="Seconds between two syncs to the disk.", min=0.01)] = 1.0,
    openai: Annotated[bool, typer.Option("--openai", help="Write lines of an OpenAI batch.")] = False,
    embedding: Annotated[
        Literal["list", "base64"], typer.Option(help="How to write vectors; base64 has 32-bit floats.")
    ] = "list",
    in_order: Annotated[bool, typer.Option("--sorted", help="At the end, put OUTPUT in the order of INPUT.")] = False,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="At the end, also write a Parquet file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write progress and summary as lines of JSON.")] = False,
) -> None:
    """Ask a model for an answer to each row of a file, and write the answers to another file.

    A row is {"id": ..., "prompt": ...}, or has "messages" (a chat) or "input"
    (a text to embed); lines of an OpenAI batch work, too. Each answer is a
    line of OUTPUT. What fails is in OUTPUT.failed.jsonl, with its error.

    Run the same command again to resume. Ctrl-C closes all streams and keeps
    the partial answers; a second Ctrl-C leaves at once.

    Exit status: 0 all rows are answered, 1 some failed, 2 wrong usage or
    input, 69 no server, 73 OUTPUT is locked, belongs to another job, or cannot
    be created, 74 the disk is full, 130 Ctrl-C, 143 SIGTERM.
    """
    session, token = Session(context, model or ""), CancelToken()
    if embed and generate:
        raise typer.BadParameter("give only one of them", param_hint="--embed / --generate")
    kind: Kind = "embed" if embed else "generate" if generate else "chat"
    settings: dict[str, Any] = {
        "input": source,
        "output": output,
        "model": model,
        "kind": kind,
        "id_field": id_field,
        "prompt_field": prompt_field,
        "template": template,
        "system": system,
        "format": _format(answer_format),
        "options": parse_pairs(options, "--option") or None,
        "limit": limit,
        "retries": retries,
        "wait_hosts": wait_hosts,
        "timeout": Timeouts(connect=5, first_chunk=timeout_first),
        "retry_failed": retry_failed,
        "changed": changed,
        "restart": restart,
        "force": force,
        "fsync": fsync,
        "openai": openai,
        "embedding": embedding,
        "sort": in_order,
        "parquet": parquet,
    }
    stop, display = _Stop(token), _Display(as_json=as_json)
    hosts, server = _hosts(host, slots), _Server(session, output, restart=restart)
    result: BatchResult | None = None
    with session.running():
        try:
            result = asyncio.run(_run(session, stop, token, display, hosts, server, slots, settings, ray))
            status, error = (ERROR if result.failed else 0), None
        except AbortError as exc:
            result, status, error = exc.partial, stop.status or ERROR, f"stopped by {exc.reason}"
        except BatchError as exc:
            result, status, error = exc.partial, exc.exit_code, str(exc)
        except (RequestError, ImportError) as exc:
            # Ray or pyarrow is not installed.
            status, error = _USAGE, str(exc)
        _tell(result, status, error, output, session.screen.note, as_json=as_json)
    if status:
        raise typer.Exit(status)


def _tell(
    result: BatchResult | None,
    status: int,
    error: str | None,
    output: Path,
    note: Callable[[str, str], object],
    *,
    as_json: bool,
) -> None:
    """Say how it ended."""
    if as_json:
        counts = {} if result is None else asdict(result)
        write_json({**counts, "status": status, "error": error})
        return
    if error is not None:
        note(
            f"{error[:1].upper()}{error[1:]}" if status > 128 else f"Error: {error}",
            "yellow" if status > 128 else "red",
        )
    summary = _summary(result, output)
    if summary:
        note(summary, "red" if status == ERROR else "dim")


def add_batch(app: typer.Typer) -> None:
    """Add the command."""
    app.command("batch")(_batch)
