"""One run of a scene with something injected, and what the contract says of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from injection.lines import Injector, Place, Recorder
from injection.scenes import PATH, SCENES, SECOND, World

from ollama_async import OllamaError, _retry
from ollama_async.testing import FakeOllama
from ollama_async.testing._left import live_timers, open_fds

KINDS = ("KeyboardInterrupt", "SystemExit", "abort", "abort in a thread", "cancel")

# Seconds that a run, and what it leaves to the background, may take.
_BOUND = 3.0
SETTLE = 0.5
# A thread may have to wait for what the interrupted code holds.
_JOIN = 0.05


@dataclass
class Servers:
    """The servers of all runs, one in the clear and one with TLS."""

    plain: FakeOllama
    secure: FakeOllama
    client_tls: Any


@dataclass
class Run:
    """One run.

    Attributes:
        found: What is wrong, one line each.
        reached: Whether it came to the place.
        ended: How the scene ended.
    """

    name: str
    servers: Servers
    place: Place | None = None
    kind: str = ""
    natural: str = ""
    found: list[str] = field(default_factory=list)
    reached: bool = False
    ended: str = ""
    places: list[Place] = field(default_factory=list)

    def go(self) -> Run:
        self.scene = SCENES[self.name]
        self.server = self.servers.secure if self.scene.tls else self.servers.plain
        self.server.forget()
        for number, path in enumerate((PATH, PATH + "2")):
            replies = self.scene.replies if number == 0 else (SECOND.get(self.name),)
            if replies and replies[0] is not None:
                self.server.script(path, *replies, always=True)
        self.thread: threading.Thread | None = None
        self.noise: list[str] = []
        self.stopped: BaseException | None = None
        self.fds = len(open_fds())
        with self._listening():
            self.loop = asyncio.new_event_loop()
            self.loop.set_exception_handler(self._on_loop_error)
            try:
                self._run()
            finally:
                self._close_loop()
            self._after_the_loop()
        return self

    # -- the parts --

    def _run(self) -> None:
        client, http = self.scene.client(self.server, self.servers.client_tls)
        self.world = world = World(self.server, client, http)
        if self.scene.kept:
            self._do(client.ps())
        self.known = {record.number for record in self.server.connections}
        self.main = self.loop.create_task(self._play(world), name="main")
        with self._instrument():
            self._drive(self.main)
        if self.kind in ("KeyboardInterrupt", "SystemExit") and self.reached and self.stopped is None:
            if not (self._unraisable_here() and any(self.kind in line for line in self.noise)):
                self.found.append(f"{self.kind} did not come out: {self.ended or 'still running'}")
        if self.stopped is not None:
            # Whoever catches it lets go of it, with the frames that it came through.
            traceback.clear_frames(self.stopped.__traceback__)
            self.stopped = None
        if self.kind == "SystemExit" and self.reached:
            return
        self._loop_goes_on()

    async def _play(self, world: World) -> str:
        try:
            await self.scene.play(world)
        except OllamaError as exc:
            partial = getattr(getattr(getattr(exc, "partial", None), "message", None), "content", "") or ""
            if not partial.startswith("".join(world.seen)):
                self.found.append(f"delivered {''.join(world.seen)!r}, but the partial answer is {partial!r}")
            return type(exc).__name__
        return "its end"

    @contextlib.contextmanager
    def _instrument(self) -> Iterator[None]:
        if self.place is None:
            with Recorder() as recorder:
                yield
            self.places = recorder.places()
            return
        with Injector(self.place, getattr(self, "_" + self.kind.replace(" ", "_").lower())) as injector:
            yield
        self.reached = injector.fired
        self.inside = injector.inside

    def _drive(self, main: asyncio.Task[str]) -> None:
        """Run the scene to its end, or until what was injected comes out."""
        hang = self.loop.call_later(_BOUND, self._hangs, main)
        try:
            self.loop.run_until_complete(main)
        except (KeyboardInterrupt, SystemExit) as exc:
            self.stopped = exc
            if self.kind != type(exc).__name__:
                raise
        except (Exception, asyncio.CancelledError):
            assert main.done()
        finally:
            hang.cancel()
        self._note_end(main)

    def _note_end(self, main: asyncio.Task[str]) -> None:
        if not main.done():
            return
        if main.cancelled():
            self.ended = "CancelledError"
        elif (error := main.exception()) is not None:
            self.ended = type(error).__name__
            if self.ended != self.kind:
                self.found.append(f"it raised {error!r}")
            traceback.clear_frames(error.__traceback__)
        else:
            self.ended = main.result()

    def _hangs(self, main: asyncio.Task[str]) -> None:
        self.found.append("it hangs: " + "; ".join(_stack(task) for task in asyncio.all_tasks(self.loop)))
        main.cancel()

    def _loop_goes_on(self) -> None:
        main, world = self.main, self.world
        if not main.done():
            main.cancel()
            self._finish(main, 1.0)
            if not main.done():
                self.found.append("it does not end when it is cancelled")
                return
            self._note_end(main)
        self._judge_end()
        del self.main, main
        if self.thread is not None:
            self.thread.join(_BOUND)
            if self.thread.is_alive():
                self.found.append("abort() in a thread never returns")
        if self.kind == "KeyboardInterrupt":
            # What held them is gone.
            world.streams.clear()
        left = [] if self.scene.keeps and self.kind == "KeyboardInterrupt" else self._settle(self._left)
        if self.scene.keeps and self.reached:
            self._do(_call(world.abort))
            left = self._settle(self._left)
            if left:
                self.found.append("left behind after another abort(): " + ", ".join(left))
        elif left and self.place is not None:
            self.found.append("left behind: " + ", ".join(left))
            self._do(_call(world.abort))
            still = self._settle(self._left)
            if still:
                self.found.append("left behind after another abort(): " + ", ".join(still))
        elif left:
            self.found.append("left behind: " + ", ".join(left))
        if world.late and not self._at_its_end():
            self.found.append(f"delivered after abort() had returned: {world.late}")
        if not self.scene.closes and "127.0.0.1:1" not in repr(world.client):
            self._do(world.client.ps(), "a following call")
        world.streams.clear()
        self._do(world.client.close(), "client.close()")
        if world.http is not None:
            self._do(world.http.aclose(), "http.aclose()")
        left = self._settle(lambda: self._left(closed=True))
        if left:
            self.found.append("left behind after client.close(): " + ", ".join(left))

    def _judge_end(self) -> None:
        if self.place is None or not self.reached:
            return
        if self.kind.startswith("abort"):
            expected = {self.natural, "AbortError", *self.scene.ends}
        elif self.kind == "cancel":
            expected = {"CancelledError"} if self.landed else {self.natural}
        else:
            return
        if self.ended not in expected:
            self.found.append(f"it ended with {self.ended}, expected {' or '.join(sorted(expected))}")

    def _close_loop(self) -> None:
        """Do as ``asyncio.run()`` does."""
        loop = self.loop
        for _ in range(3):
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            try:
                if tasks:
                    loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
            except (KeyboardInterrupt, SystemExit) as exc:
                # Of a task of ours that it came out of: it is in its result now as well.
                if self.kind != type(exc).__name__:
                    raise
                continue
            except RuntimeError:
                continue
            break
        for task in tasks:
            if task.done() and not task.cancelled():
                error = task.exception()
                if error is not None:
                    traceback.clear_frames(error.__traceback__)
        loop.close()

    def _after_the_loop(self) -> None:
        if self.scene.keeps:
            self.world.abort()
        tokens = self.world.tokens
        self.world = self.main = None  # type: ignore[assignment]

        def left() -> list[str]:
            found = []
            if (fds := len(open_fds())) > self.fds:
                found.append(f"{fds - self.fds} descriptors")
            found += [
                f"an open connection ({len(record.requests)} requests)"
                for record in self.server.connections
                if record.open
            ]
            found += [f"{len(token._callbacks)} registrations" for token in tokens if token._callbacks]
            return found

        deadline = time.monotonic() + SETTLE
        while (found := left()) and time.monotonic() < deadline:
            time.sleep(0.001)
        if found:
            self.found.append("left behind after the loop: " + ", ".join(found))
        self.found += [f"noise: {line}" for line in self.noise if not self._excused(line)]
        if self.found:
            gc.collect()

    # -- what is injected --

    def _keyboardinterrupt(self) -> None:
        raise KeyboardInterrupt("injected")

    def _systemexit(self) -> None:
        raise SystemExit("injected")

    def _abort(self) -> None:
        # What was connected before is seen by the server as opened before.
        time.sleep(0.001)
        before = time.monotonic()
        try:
            self.world.abort()
        except BaseException as exc:
            self.found.append(f"abort() raised {exc!r}")
        self._aborted(before)

    def _abort_in_a_thread(self) -> None:
        time.sleep(0.001)
        before = time.monotonic()
        world = self.world
        self.thread = thread = threading.Thread(target=world.abort, daemon=True)
        thread.start()
        thread.join(_JOIN)
        if not thread.is_alive():
            self._aborted(before)

    def _aborted(self, before: float) -> None:
        world = self.world
        world.aborted = True
        if not self.scene.stalls or self._at_its_end():
            return
        for record in self.server.connections:
            asked = [request for request in record.requests if request.route == PATH]
            if asked and record.open and not record.wait_left(0.3):
                self.found.append("the server has not seen the FIN when abort() returned")

    def _at_its_end(self) -> bool:
        """Whether the abort came too late to end anything."""
        return any(stream.outcome in ("done", "until") for stream in self.world.streams)

    def _cancel(self) -> None:
        self.landed = self.main.cancel()

    # -- what is left --

    def _left(self, *, closed: bool = False) -> list[str]:
        world, loop = self.world, self.loop
        tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
        found = [f"a task {_stack(task)}" for task in tasks]
        timers = [_name(handle) for handle in live_timers(loop) if _name(handle) != "BaseEventLoop.stop"]
        idle, pooled, dialling = 0, 0, 0
        client = world.client
        transports = [client._direct, getattr(world.http, "_transport", None)]
        for transport in transports:
            for pool in getattr(transport, "_pools", {}).values():
                idle += sum(map(len, pool._idle.values()))
                pooled += len(pool._all)
                dialling += len(pool.dialling)
        foreign = world.http is not None and not hasattr(world.http._transport, "_pools")
        # That of idle connections finds out itself that there are none any more.
        found += [f"a timer {name}" for name in timers if closed or "_sweep" not in name]
        if pooled > idle:
            found.append(f"{pooled - idle} connections in the pool that are not idle")
        if dialling:
            found.append(f"{dialling} connections in the making")
        found += [f"{len(token._callbacks)} registrations" for token in world.tokens if token._callbacks]
        for token in [client._closing, *client._calls]:
            if token._callbacks:
                found.append(f"{len(token._callbacks)} registrations on the client's tokens")
        opened = [record for record in self.server.connections if record.open]
        if len(opened) > idle and (closed or not foreign):
            found.append(f"{len(opened) - idle} connections that the server sees open and the pool does not have")
        return found

    def _settle(self, look: Any) -> list[str]:
        async def settle() -> list[str]:
            deadline = time.monotonic() + SETTLE
            while (found := look()) and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            return found

        return self._do(settle()) or []

    def _do(self, coroutine: Coroutine[Any, Any, Any], what: str = "") -> Any:
        """Run something, however often what was injected comes out of a task once more."""
        task = self.loop.create_task(coroutine)
        self._finish(task, _BOUND)
        if not task.done():
            self.found.append(f"{what} hangs: {_stack(task)}")
            task.cancel()
            return None
        if task.cancelled() or task.exception() is not None:
            self.found.append(f"{what} failed: {'cancelled' if task.cancelled() else repr(task.exception())}")
            return None
        return task.result()

    def _finish(self, task: asyncio.Task[Any], seconds: float) -> None:
        bound = self.loop.call_later(seconds, self.loop.stop)
        for _ in range(5):
            try:
                self.loop.run_until_complete(task)
            except (KeyboardInterrupt, SystemExit):
                if self.kind not in ("KeyboardInterrupt", "SystemExit"):
                    raise
                if not task.done():
                    continue
            except RuntimeError:
                # The stop of the run that was interrupted, which had been scheduled.
                if not task.done():
                    continue
            except (Exception, asyncio.CancelledError):
                pass
            break
        bound.cancel()

    # -- what is said meanwhile --

    def _on_loop_error(self, _: Any, context: dict[str, Any]) -> None:
        self.noise.append(f"{context.get('message')}: {context.get('exception')!r}")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        before = sys.unraisablehook

        def unraisable(args: Any) -> None:
            self.noise.append(f"unraisable in {args.object!r}: {args.exc_value!r}")

        def said(message: Any, category: Any, *_: Any, **__: Any) -> None:
            self.noise.append(f"{category.__name__}: {message}")

        sys.unraisablehook = unraisable
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = said
                yield
        finally:
            sys.unraisablehook = before

    def _unraisable_here(self) -> bool:
        return "__del__" in self.inside

    def _excused(self, line: str) -> bool:
        if self.place is None:
            # What is noisy by itself (a stream that is dropped) says so.
            return self.name == "drop" and "unclosed <Stream" in line
        if self.kind in ("KeyboardInterrupt", "SystemExit"):
            if "was never awaited" in line or "unclosed <Stream" in line:
                return True
            if line.startswith("unraisable") and self.kind in line and "__del__" in self.inside:
                return True
        return self.name == "drop" and "unclosed <Stream" in line


async def _call(function: Any) -> None:
    function()


def _name(handle: Any) -> str:
    callback = getattr(handle, "_callback", None)
    return str(getattr(callback, "__qualname__", callback))


def _stack(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            frames.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None)
    return f"{name}() at {' > '.join(frames)}"


@contextlib.contextmanager
def soon_again() -> Iterator[None]:
    """Have requests sent again without the usual pause."""
    before = _retry._FIRST_DELAY
    _retry._FIRST_DELAY = 0.002
    try:
        yield
    finally:
        _retry._FIRST_DELAY = before
