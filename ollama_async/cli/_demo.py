"""The demo: an answer is streamed and stopped, in three ways, and the result is shown."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ollama_async._call.timeouts import Timeouts
from ollama_async._cancel import CancelToken
from ollama_async._client import AsyncClient
from ollama_async._errors import AbortError, ConnectError, OllamaError, PhaseTimeout, RequestError
from ollama_async.testing import ConnectionRecord, FakeOllama

from ._terminal import CTRL_C, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ollama_async import ChatResponse, ListResponse
    from ollama_async._call.stream import Stream

    from ._screen import Screen

__all__ = ["list_models", "look", "pick", "run_demo"]

_SHOW_SECONDS = 1.0
_LOOK_TIMEOUTS = Timeouts(connect=2, total=4)
_ANSWER_TIMEOUTS = Timeouts(connect=5, first_chunk=120, idle=30, total=180)
_STOP = "you pressed Stop"


@dataclass
class _Stopped:
    """One way of stopping, and how it went; times are those of ``time.monotonic()``."""

    way: str
    expected: tuple[str, object]
    stream: Stream[ChatResponse]
    asked_at: float
    free_at: float
    connection: ConnectionRecord | None

    def row(self) -> list[str]:
        """Return the row of the summary."""
        chunks = str(self.stream.timing.chunks)
        row = [self.way, str(self.stream.outcome), chunks, _ms(self.free_at - self.asked_at)]
        if self.connection is not None:
            left_at = self.connection.left_at
            row += [_ms(left_at - self.asked_at) if left_at else "never", str(self.connection.bytes_after_left)]
        return row

    def failure(self) -> str | None:
        """Return what did not hold, if something did not."""
        came = (self.stream.outcome, self.stream.reason)
        if self.stream.outcome == "done":
            return "the answer was over before it could be stopped: pick another model with --model"
        if came != self.expected:
            return f"outcome and reason are {came}, not {self.expected}"
        if self.connection is not None and (self.connection.left_at is None or self.connection.bytes_after_left):
            return "the server did not see the client leave, or wrote on after that"
        return None


async def _by_abort(stream: Stream[ChatResponse], token: CancelToken, screen: Screen) -> float:
    flowing = asyncio.Event()

    async def press_stop() -> float:
        await flowing.wait()
        await asyncio.sleep(_SHOW_SECONDS)
        asked_at = time.monotonic()
        token.abort(_STOP)
        return asked_at

    other_task = asyncio.create_task(press_stop())
    try:
        async for chunk in stream:
            screen.add(chunk)
            flowing.set()
    except AbortError as exc:
        if exc.reason == CTRL_C:
            raise
    finally:
        other_task.cancel()
    return other_task.result() if other_task.done() else time.monotonic()


async def _by_timeout(stream: Stream[ChatResponse], _: CancelToken, screen: Screen) -> float:
    limit = asyncio.timeout(None)
    try:
        async with limit:
            async for chunk in stream:
                screen.add(chunk)
                if limit.when() is None:
                    limit.reschedule(asyncio.get_running_loop().time() + _SHOW_SECONDS)
    except PhaseTimeout:  # a limit of the call, which is a TimeoutError as well
        raise
    except TimeoutError:
        pass
    return limit.when() or time.monotonic()  # the clock of asyncio's loops is time.monotonic()


async def _by_break(stream: Stream[ChatResponse], _: CancelToken, screen: Screen) -> float:
    began = asked_at = 0.0
    async for chunk in stream:
        screen.add(chunk)
        asked_at = time.monotonic()
        began = began or asked_at
        if asked_at - began >= _SHOW_SECONDS:
            break
    return asked_at


_WAYS: list[tuple[str, tuple[str, object], Callable[..., Coroutine[Any, Any, float]]]] = [
    ("token.abort()", ("aborted", _STOP), _by_abort),
    ("asyncio.timeout()", ("cancelled", None), _by_timeout),
    ("break", ("closed", None), _by_break),
]


async def _stop_one(session: Session, client: AsyncClient, server: FakeOllama | None, number: int) -> _Stopped:
    """Stream an answer, have it stopped in one of the ways, and say how that went."""
    way, expected, stop = _WAYS[number]
    screen, token = session.screen, CancelToken()
    screen.out.print(f"\n{number + 1}. {way}{' from another task' if number == 0 else ''}", style="bold")
    prompt, options = "Tell me a long story about the sea.", {"num_predict": -1}
    stream = client.chat(session.model, prompt, options=options, stream=True, token=token, timeout=_ANSWER_TIMEOUTS)
    connection = None
    with screen.waiting(session.model):
        asked_at = await stop(stream, token, screen)
        free_at = time.monotonic()
        if server is not None:
            connection = server.requests[-1].connection
            # On purpose this blocks the event loop: the server still sees the client leave.
            connection.wait_left()
        screen.finish(stream.text)
    stopped = _Stopped(way, expected, stream, asked_at, free_at, connection)
    _, outcome, chunks, free, *seen = stopped.row()
    lines = [
        f"kept: {chunks} chunks, {len(stream.text)} characters, the last ones {stream.text[-20:]!r}",
        f"outcome {outcome!r}, reason {stream.reason!r}",
        f"the reader was free after {free}" + (f", the server saw it leave after {seen[0]}" if seen else ""),
    ]
    for line in lines:
        screen.out.print(f"   {line}", style="cyan")
    return stopped


def _summarise(all_stopped: list[_Stopped], screen: Screen) -> bool:
    """Show the table, and return whether everything held."""
    headings = ["stopped by", "outcome", "chunks", "reader free"]
    embedded = all_stopped[0].connection is not None
    if embedded:
        headings += ["server saw", "bytes then"]
    table = Table(*headings, title="Stopped, and the socket gone", title_justify="left", box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for stopped in all_stopped:
        table.add_row(*stopped.row())
    screen.out.print()
    screen.out.print(table)
    seen = "While the server saw it, this program's event loop was blocked."
    unseen = "When the server saw it cannot be known from here; its log has the end of the request."
    screen.out.print(seen if embedded else unseen, style="dim")
    failures = [f"{stopped.way}: {failure}" for stopped in all_stopped if (failure := stopped.failure())]
    for failure in failures:
        screen.note(f"This did not hold: {failure}", "red")
    return not failures


def pick(models: ListResponse, loaded: set[str], wanted: str | None) -> str | None:
    """Return the model to use: the wanted one, else one that can chat and will answer soon."""
    # Read like dicts: pyright mixes the nested classes up with their base, which has the same name.
    names = {str(model.get("name")): model for model in models.models}
    if wanted:
        if wanted not in names and f"{wanted}:latest" not in names:
            raise RequestError(f"the server has no model {wanted!r}; it has: {', '.join(names) or 'none'}")
        return wanted

    def can_chat(name: str) -> bool:
        known, details = names[name].get("capabilities"), names[name].get("details")
        family = (details and details.family) or ""
        return "completion" in known if known else not re.search("embed|bert", name + family)

    def slowness(name: str) -> tuple[bool, bool, int]:
        return name not in loaded, bool(names[name].get("remote_host")), names[name].get("size") or 0

    return min(filter(can_chat, names), key=slowness, default=None)


async def list_models(client: AsyncClient) -> tuple[ListResponse, set[str]]:
    """Return the models that the server has, and the names of those that are loaded."""
    models = await client.list(timeout=_LOOK_TIMEOUTS)
    return models, {str(model.get("name")) for model in (await client.ps(timeout=_LOOK_TIMEOUTS)).models}


async def look(session: Session, token: CancelToken, wanted: str | None) -> tuple[str | None, str]:
    """Look for a model on the user's server; return ``None`` if there is none, and why it is so."""
    async with AsyncClient(session.host, token=token) as client:
        try:
            models, loaded = await list_models(client)
        except AbortError:
            raise
        except OllamaError as exc:
            why = "" if isinstance(exc, ConnectError) else f" ({exc})"
            return None, f"no Ollama server answers at {session.url}{why}"
    model = pick(models, loaded, wanted)
    return model, f"it answers at {session.url}" if model else f"the server at {session.url} has no model that chats"


async def run_demo(session: Session, wanted: str | None) -> bool:
    """Show all ways, and return whether everything held."""
    token = CancelToken()
    with session.ctrl_c.aborts(token), contextlib.ExitStack() as stack:
        model, why = await look(session, token, wanted)
        server = None if model else stack.enter_context(FakeOllama())
        session.model = model or "fake"
        which = "an embedded fake server (no model computes anything)" if server else "your Ollama server"
        session.screen.out.print(f"Using {which}: {why}. Model: {session.model}")
        async with AsyncClient(server.url if server else session.host, token=token) as client:
            all_stopped = [await _stop_one(session, client, server, number) for number in range(len(_WAYS))]
    token.raise_if_aborted()
    return _summarise(all_stopped, session.screen)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
