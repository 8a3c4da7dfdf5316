"""The contract's promises as checks, run on several clients: ``nox -s contract-table`` prints the table of the docs.

Each check asks the same of each client, by the means that client has: a token here, ``close()`` there, and
``task.cancel()`` where there is nothing else. The answers come from `FakeOllama`, which says what the server saw. Right
after a stop the client's loop is blocked; what the server sees then happened "at once". The garbage collector is off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import re
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ollama_async.testing import Cut, FakeOllama, NoEnd, Pause, Reply, Stall

PAGE = Path(__file__).parents[1] / "docs" / "contract.md"
MARKS = ("<!-- contract-table -->\n", "<!-- /contract-table -->\n")
MESSAGES = [{"role": "user", "content": "hi"}]
TICKS = 61
AT_ONCE, SOON = 0.5, 1.5  # seconds for which to wait for what takes no time, or never happens


class Client:
    """A client under test: ``open()`` makes the request, ``iterate()`` is what its users loop over."""

    package = ""
    path = "/api/chat"
    handle: Any = None

    def frame(self, text: str, *, done: bool = False) -> bytes:
        line = {"model": "m", "message": {"role": "assistant", "content": text}, "done": done}
        return json.dumps(line).encode() + b"\n"

    def last(self) -> list[bytes]:
        return [self.frame("", done=True)]

    async def open(self) -> Any:
        """Make the request and return what can be iterated."""
        raise NotImplementedError

    def iterate(self, handle: Any) -> AsyncIterator[Any]:
        return aiter(handle)

    def stop(self, task: asyncio.Task[Any]) -> Awaitable[None] | None:
        """Stop the stream in another task than its reader's, by the client's own means; else by cancelling."""
        task.cancel()
        return None

    stops_by = "`task.cancel()`"
    thread_stop: Callable[[], object] | None = None

    def kept(self) -> str:
        """What the client has of an answer that was stopped."""
        return "no"

    async def close(self) -> None:
        raise NotImplementedError

    async def read(self) -> int:
        """Read an answer from its beginning to its end."""
        count = 0
        self.handle = await self.open()
        async for _ in self.iterate(self.handle):
            count += 1
            self.on_chunk()
        return count

    on_chunk: Callable[[], object] = staticmethod(lambda: None)


class Ours(Client):
    package = "ollama-async"
    stops_by = "`token.abort()`"

    def __init__(self, url: str) -> None:
        from ollama_async import AsyncClient, CancelToken

        self._client = AsyncClient(url)
        self._token = CancelToken()
        self.thread_stop = self._token.abort

    async def open(self) -> Any:
        self.handle = self._client.chat("m", MESSAGES, stream=True, token=self._token)
        return self.handle

    def stop(self, task: asyncio.Task[Any]) -> Awaitable[None] | None:
        self._token.abort()
        return None

    def kept(self) -> str:
        return f"yes ({self.handle.text!r})" if self.handle.text else "no"

    async def close(self) -> None:
        await self._client.close()


class OllamaPython(Client):
    package = "ollama"

    def __init__(self, url: str) -> None:
        import httpx
        import ollama

        limits = httpx.Limits(max_connections=1)
        self._client = ollama.AsyncClient(url, limits=limits, timeout=httpx.Timeout(None, pool=SOON))

    async def open(self) -> Any:
        return await self._client.chat("m", MESSAGES, stream=True)

    async def close(self) -> None:
        await self._client.close()


class OpenAI(Client):
    package = "openai"
    path = "/v1/chat/completions"
    stops_by = "`await stream.close()`"

    def __init__(self, url: str) -> None:
        import httpx2
        import openai

        limits = httpx2.Limits(max_connections=1)
        http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=httpx2.Timeout(None, pool=SOON))
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)

    def frame(self, text: str, *, done: bool = False) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if done else None}
        body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def last(self) -> list[bytes]:
        return [self.frame("", done=True), b"data: [DONE]\n\n"]

    async def open(self) -> Any:
        return await self._client.chat.completions.create(model="m", messages=MESSAGES, stream=True)  # type: ignore[call-overload]

    def stop(self, task: asyncio.Task[Any]) -> Awaitable[None] | None:
        if self.handle is None:  # there is no stream to close before the headers
            task.cancel()
            return None
        closing: Awaitable[None] = self.handle.close()
        return closing

    async def close(self) -> None:
        await self._client.close()


class Httpx(Client):
    package = "httpx"
    stops_by = "`await response.aclose()`"

    def __init__(self, url: str) -> None:
        import httpx

        limits = httpx.Limits(max_connections=1)
        self._client = httpx.AsyncClient(base_url=url, limits=limits, timeout=httpx.Timeout(None, pool=SOON))

    async def open(self) -> Any:
        request = self._client.build_request("POST", self.path, json={"model": "m", "messages": MESSAGES})
        return await self._client.send(request, stream=True)

    def iterate(self, handle: Any) -> AsyncIterator[Any]:
        lines: AsyncIterator[Any] = handle.aiter_lines()
        return lines

    def stop(self, task: asyncio.Task[Any]) -> Awaitable[None] | None:
        if self.handle is None:
            task.cancel()
            return None
        closing: Awaitable[None] = self.handle.aclose()
        return closing

    async def close(self) -> None:
        await self._client.aclose()


CLIENTS: list[type[Client]] = [Ours, OllamaPython, OpenAI, Httpx]


# -- what the checks have in common


class Scene:
    """A server that plays a reply, and a client of it."""

    def __init__(self, kind: type[Client], reply: str) -> None:
        self.server = FakeOllama(silent=reply == "handshake")
        self.server.start()
        url = self.server.url.replace("http://", "https://") if reply == "handshake" else self.server.url
        self.client = kind(url)
        one = self.client.frame("one")
        last = self.client.last()
        head = {"headers": [("Content-Type", "text/event-stream")]} if kind is OpenAI else {}
        replies = {
            "silent": Reply([one, Stall()], **head),
            "before_headers": Reply(before_head=[Stall()], **head),
            "short": Reply([one, Pause(0.001), one, Pause(0.001), *last], **head),
            "no_end": Reply([one, *last, NoEnd()], **head),
            "cut": Reply([one, Cut()], **head),
            "truncated": Reply([one], **head),
        }
        if reply != "handshake":
            self.server.script(self.client.path, replies[reply], always=True)

    def left(self) -> str:
        """Whether the server sees the client leave, now that the client's loop is blocked."""
        return "at once" if self.server.connections[-1].wait_left(AT_ONCE) else ""

    async def left_later(self) -> str:
        """The same, with the client's loop running on."""
        if now := self.left():
            return now
        later = await asyncio.to_thread(self.server.connections[-1].wait_left, SOON)
        return "in a later round of the loop" if later else "**no**"

    async def reading(self) -> asyncio.Task[int]:
        """A task that reads, and has read one chunk if one comes."""
        came = asyncio.Event()
        self.client.on_chunk = came.set
        task = asyncio.create_task(self.client.read())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(came.wait(), 0.2)
        return task

    async def end(self, task: asyncio.Task[Any] | None = None) -> None:
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=SOON)
            with contextlib.suppress(BaseException):
                task.exception()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.client.close(), SOON)
        self.server.stop()


@contextlib.asynccontextmanager
async def scene(kind: type[Client], reply: str) -> AsyncIterator[Scene]:
    made = Scene(kind, reply)
    try:
        yield made
    finally:
        await made.end()


async def outcome(task: asyncio.Task[Any]) -> str:
    """How a reader ended."""
    done, _ = await asyncio.wait([task], timeout=SOON)
    if not done:
        task.cancel()
        await asyncio.wait([task], timeout=SOON)
        return "**it hangs**"
    if task.cancelled():
        return "`CancelledError`"
    error = task.exception()
    return f"`{type(error).__name__}`" if error else "**a normal end**"


async def stopped(made: Scene, task: asyncio.Task[Any]) -> str:
    """Stop, and say when the server saw it."""
    if (closing := made.client.stop(task)) is not None:
        with contextlib.suppress(Exception):
            await closing
    return await made.left_later()


# -- the checks


async def stop_by(kind: type[Client]) -> str:
    return kind.stops_by


async def stop_in_silence(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        task = await made.reading()
        seen = await stopped(made, task)
        await outcome(task)
        return seen


async def stop_before_headers(kind: type[Client]) -> str:
    async with scene(kind, "before_headers") as made:
        task = await made.reading()
        seen = await stopped(made, task)
        await outcome(task)
        return seen


async def stop_in_handshake(kind: type[Client]) -> str:
    async with scene(kind, "handshake") as made:
        task = await made.reading()
        seen = await stopped(made, task)
        await outcome(task)
        return seen


async def reader_gets(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        task = await made.reading()
        await stopped(made, task)
        return await outcome(task)


async def from_a_thread(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        task = await made.reading()
        stop = made.client.thread_stop
        if stop is None:
            # The only way from another thread is to ask the loop for it.
            loop = asyncio.get_running_loop()
            stop = lambda: loop.call_soon_threadsafe(made.client.stop, task)  # noqa: E731
        thread = threading.Thread(target=stop)
        thread.start()
        thread.join()
        seen = made.left() or "**no**"
        await asyncio.sleep(0.05)
        return seen


async def kept(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        task = await made.reading()
        await stopped(made, task)
        await outcome(task)
        return made.client.kept()


async def break_kept(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        handle = await made.client.open()
        async for _ in made.client.iterate(handle):
            break
        return await made.left_later()


async def break_dropped(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:

        async def leave() -> None:
            async for _ in made.client.iterate(await made.client.open()):
                break

        await leave()
        return await made.left_later()


async def exception_kept(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:

        async def fail() -> None:
            async for _ in made.client.iterate(await made.client.open()):
                raise LookupError

        kept: BaseException | None = None
        try:
            await fail()
        except LookupError as exc:
            kept = exc
        seen = await made.left_later()
        assert kept is not None
        return seen


async def close_while_reading(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        handle = await made.client.open()
        iterator = made.client.iterate(handle)
        await anext(iterator)
        task = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0.01)
        close = getattr(handle, "aclose", None) or handle.close
        try:
            await asyncio.wait_for(close(), SOON)
        except Exception as exc:
            said = f"**`{type(exc).__name__}`**"
        else:
            said = await made.left_later()
        task.cancel()
        await asyncio.wait([task], timeout=SOON)
        with contextlib.suppress(BaseException):
            task.exception()
        return said


async def read_after_stop(kind: type[Client]) -> str:
    async with scene(kind, "silent") as made:
        handle = made.client.handle = await made.client.open()
        iterator = made.client.iterate(handle)
        await anext(iterator)
        if kind in (Ours, OpenAI, Httpx):
            if (closing := made.client.stop(asyncio.create_task(asyncio.sleep(0)))) is not None:
                await closing
        else:
            reader = asyncio.ensure_future(anext(iterator))
            await asyncio.sleep(0.01)
            reader.cancel()
            await asyncio.wait([reader])
        try:
            await asyncio.wait_for(anext(iterator), SOON)
        except StopAsyncIteration:
            return "**a normal end**"
        except Exception as exc:
            return f"`{type(exc).__name__}`"
        return "**a chunk**"


async def body_never_ends(kind: type[Client]) -> str:
    async with scene(kind, "no_end") as made:
        task = asyncio.create_task(made.client.read())
        return (await outcome(task)).replace("**a normal end**", "it ends")


async def cut_off(kind: type[Client]) -> str:
    async with scene(kind, "cut") as made:
        return await outcome(asyncio.create_task(made.client.read()))


async def scan(kind: type[Client], *, times: int) -> str:
    """Cancel at each of the first rounds of the loop; count what was swallowed, and what is left behind."""
    bad = {"swallowed": 0, "no further request": 0, "socket left open": 0}
    for tick in range(TICKS):
        async with scene(kind, "short") as made:
            task = asyncio.create_task(made.client.read())
            for _ in range(tick):
                await asyncio.sleep(0)
                time.sleep(0.0002)  # the server's turn, so that not all rounds pass before it answers
            accepted = task.cancel()
            for _ in range(times - 1):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task], timeout=SOON)
            bad["swallowed"] += accepted and not task.cancelled()
            with contextlib.suppress(BaseException):
                task.exception()
            following = await outcome(asyncio.create_task(made.client.read()))
            bad["no further request"] += following != "**a normal end**"
            with contextlib.suppress(Exception):
                await asyncio.wait_for(made.client.close(), SOON)
            left = [await asyncio.to_thread(record.wait_left, 0.2) for record in made.server.connections]
            bad["socket left open"] += not all(left)
    return ", ".join(f"**{count} {what}**" for what, count in bad.items() if count) or "0"


async def cancelled_once(kind: type[Client]) -> str:
    return await scan(kind, times=1)


async def cancelled_twice(kind: type[Client]) -> str:
    return await scan(kind, times=2)


CHECKS: dict[str, Callable[[type[Client]], Awaitable[str]]] = {
    "a stream is stopped from another task by": stop_by,
    "the server sees that stop: reader waits in mid-stream": stop_in_silence,
    "... before the headers": stop_before_headers,
    "... in the TLS handshake": stop_in_handshake,
    "... from another thread, while the loop is blocked": from_a_thread,
    "the stopped reader gets": reader_gets,
    "the partial answer is kept": kept,
    "reading on after the stop gives": read_after_stop,
    "the server sees a `break`, the stream being kept": break_kept,
    "... a `break`, the stream being dropped": break_dropped,
    "... an exception in the loop, the exception being kept": exception_kept,
    "... `aclose()`/`close()` while another task reads": close_while_reading,
    f"`task.cancel()` at each of {TICKS} rounds of the loop: failures": cancelled_once,
    "the same, cancelled again one round later: failures": cancelled_twice,
    "the last chunk has come, the body does not end": body_never_ends,
    "the connection is cut in mid-stream": cut_off,
}


def run(check: Callable[[type[Client]], Awaitable[str]], kind: type[Client]) -> str:
    """One check in a loop of its own, with the collector off and whatever noise it makes kept quiet."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda *_: None)
            return runner.run(check(kind))  # type: ignore[arg-type]
    finally:
        gc.enable()


def table() -> Iterator[str]:
    yield "| check | " + " | ".join(f"{kind.package} {version(kind.package)}" for kind in CLIENTS) + " |\n"
    yield "|---" * (len(CLIENTS) + 1) + "|\n"
    for what, check in CHECKS.items():
        yield f"| {what} | " + " | ".join(run(check, kind) for kind in CLIENTS) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}, too")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for row in table():
        print(row, end="", flush=True)
        rows.append(row)
    if given.write:
        begin, end = map(re.escape, MARKS)
        text = PAGE.read_text("utf-8")
        new, count = re.subn(f"({begin}).*?({end})", f"\\1\n{''.join(rows)}\n\\2", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"contract_table: {PAGE} has no marks {MARKS}")
        PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
