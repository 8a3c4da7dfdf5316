"""One run of a scene with something injected at a line of the core, and what the contract says of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
from injection.lines import Injector, Place, Recorder
from injection.scenes import ELSEWHERE, PATH, Scene, World

from ollama_async import OllamaError
from ollama_async.testing import FakeOllama
from ollama_async.testing._left import live_timers, open_fds, registrations

# KeyboardInterrupt is caught where it comes out, and the loop goes on, as in a notebook; after SystemExit it is closed
# as asyncio.run() does. Abort and cancel are what a signal handler does; asyncio.run() has such a one, which cancels.
STOPS = ("KeyboardInterrupt", "SystemExit")
KINDS = (*STOPS, "abort", "abort in a thread", "cancel")

# Seconds that a run may take, and what it leaves to the background.
_BOUND = 5.0
_SETTLE = 2.0
# A thread may have to wait for what the interrupted code holds: then it comes after it.
_JOIN = 0.05


class Excuse(NamedTuple):
    """What something injected leaves, whatever the code there does, and why."""

    text: str
    kinds: tuple[str, ...]
    # Whether only where no handler really comes.
    unreal: bool
    why: str
    # The functions in which; anywhere if none is named.
    functions: tuple[str, ...] = ()


EXCUSED = (
    Excuse("was never awaited", STOPS, False, "while a coroutine is being passed on, nobody has it"),
    Excuse("Task exception was never retrieved: {kind}(", STOPS, False, "asyncio raises it and keeps it in the task"),
    Excuse("unclosed <Stream", STOPS, False, "who held the stream was interrupted; a stream that is dropped says so"),
    Excuse(
        "delivered after abort() had returned", KINDS, True, "no handler comes between the last look and the return"
    ),
    Excuse(
        "timer Timeout._on_timeout", STOPS, True, "an `async with` is not yet in its block when it has been entered"
    ),
    Excuse(
        "",
        STOPS,
        False,
        "asyncio calls it once: what comes at its first instruction, it never does; client.close() does the rest",
        ("Connection.connection_made", "Connection.connection_lost", "ConnectionPool.connection_lost"),
    ),
    Excuse("", STOPS, False, "a lost round is made up for by a later one, after a second", ("_ReleaseQueue._round",)),
    Excuse(
        "", STOPS, False, "at its first instruction an `__exit__` has not caught anything yet", ("_Waker.__exit__",)
    ),
    Excuse("", STOPS, False, "Python drops what comes at the first instruction of a __del__", ("Stream.__del__",)),
    Excuse(
        "ResourceWarning: unclosed",
        STOPS,
        False,
        "it is closed by being dropped, and says so",
        (
            "GuardedSocket.__init__",
            "GuardedSocket.close",
            "_connect_socket",
            "ForeignRequest.shutdown_for",
            "RegularFile.close",
            "RegularFile.__exit__",
            "RegularFile._close_if_free",
            "FileTransfer.create_blob",
        ),
    ),
    Excuse(
        "descriptors",
        STOPS,
        False,
        "a number that nobody has got yet cannot be closed",
        ("ForeignRequest.shutdown_for",),
    ),
    Excuse(
        "registrations",
        STOPS,
        False,
        "the traceback holds the stream, whose answer has come as a whole: it is open until that is dropped",
        ("ChunkReader.read", "ChunkReader.ready"),
    ),
    Excuse(
        "",
        STOPS,
        True,
        "the first line of a `finally` is the last resort",
        ("CancelToken.scope", "Job.limit", "Registration._fire"),
    ),
    Excuse(
        "",
        STOPS,
        True,
        "Python lets no handler of a `try` cover the line of a `try` or `while` in it",
        ("ChunkReader._fill",),
    ),
)


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
        scene: What is done.
        place: Where something is injected; nowhere without one, and all places are noted.
        kind: What is.
        natural: How the scene ends when nothing is.
        found: What is wrong, a line each.
        reached: Whether it came to the place.
        ended: How the scene ended.
        places: What it came to.
    """

    scene: Scene
    servers: Servers
    place: Place | None = None
    kind: str = ""
    natural: str = ""
    found: list[str] = field(default_factory=list)
    reached: bool = False
    ended: str = ""
    places: list[Place] = field(default_factory=list)

    def go(self) -> Run:
        self.server = self.servers.secure if self.scene.tls else self.servers.plain
        self.server.forget()
        if self.scene.replies:
            self.server.script(PATH, *self.scene.replies, always=True)
        if self.scene.elsewhere is not None:
            self.server.script(ELSEWHERE, self.scene.elsewhere, always=True)
        self.noise: list[str] = []
        self.inside: list[str] = []
        self.thread: threading.Thread | None = None
        self.landed = self.unseen = False
        fds = len(open_fds())
        with self._listening():
            self.loop = asyncio.new_event_loop()
            self.loop.set_exception_handler(self._on_loop_error)
            try:
                tokens = self._in_the_loop()
            finally:
                self._close_loop()
            self._note(
                "left behind when the loop is closed", self._settle_outside(lambda: self._left_outside(fds, tokens))
            )
            # What is in circles has something to say as well, and the next run is not to hear it. All of it is young.
            gc.collect(0)
        for line in self.noise:
            if not self._is_ours_in_del(line):
                self._note(line)
        return self

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}: {'; '.join(self.found)}"

    # -- its parts --

    def _in_the_loop(self) -> list[Any]:
        client, http = self.scene.client(self.server, self.servers.client_tls)
        self.world = world = World(self.server, client, http)
        if self.scene.kept:
            self._do(client.ps())
        self.main = self.loop.create_task(self._play(world), name="main")
        with self._instrument():
            stopped = self._drive()
        if self.reached and self.kind in STOPS and not stopped and not any(map(self._is_ours_in_del, self.noise)):
            self._note(f"{self.kind} did not come out: {self.ended or 'it goes on'}")
        if not self.reached or self.kind != "SystemExit":
            self._go_on()
        else:
            self._let_go()
        tokens = world.tokens
        # All that it held is let go of; the collector is off.
        del self.world, self.main
        return tokens

    async def _play(self, world: World) -> str:
        try:
            await self.scene.play(world)
        except OllamaError as exc:
            partial = getattr(getattr(getattr(exc, "partial", None), "message", None), "content", None) or ""
            delivered = "".join(world.seen)
            if not partial.startswith(delivered):
                self._note(f"delivered {delivered!r}, but the partial answer is {partial!r}")
            return type(exc).__name__
        return "its end"

    @contextlib.contextmanager
    def _instrument(self) -> Iterator[None]:
        if self.place is None:
            with Recorder() as recorder:
                yield
            self.places = recorder.places()
            return
        action: Callable[[], None] = {
            "KeyboardInterrupt": self._interrupt,
            "SystemExit": self._exit,
            "abort": self._abort,
            "abort in a thread": self._abort_in_a_thread,
            "cancel": self._cancel,
        }[self.kind]
        with Injector(self.place, action) as injector:
            yield
        self.reached, self.inside = injector.fired, injector.inside

    def _drive(self) -> bool:
        """Run the scene to its end, or until what was injected comes out.

        Returns:
            Whether it did.
        """
        stopped = False
        hang = self.loop.call_later(_BOUND, self._hangs)
        try:
            next(_alone(self.loop.run_until_complete, self.main))
        except (KeyboardInterrupt, SystemExit) as exc:
            if type(exc).__name__ != self.kind:
                raise
            stopped = True
            # Whoever catches it lets go of it, and of the frames that it came through.
            traceback.clear_frames(exc.__traceback__)
        except (Exception, asyncio.CancelledError):
            assert self.main.done()
        finally:
            hang.cancel()
        self._note_end()
        return stopped

    def _hangs(self) -> None:
        self._note("it hangs: " + "; ".join(map(_stack, asyncio.all_tasks(self.loop))))
        self.main.cancel()

    def _note_end(self) -> None:
        main = self.main
        if not main.done():
            return
        if main.cancelled():
            self.ended = "CancelledError"
        elif (error := main.exception()) is None:
            self.ended = main.result()
        else:
            self.ended = type(error).__name__
            # Whoever goes on reading after the interruption is told so.
            if self.ended != self.kind and not (self.kind in STOPS and isinstance(error, httpx.HTTPError)):
                self._note(f"it raised {error!r}")
            traceback.clear_frames(error.__traceback__)

    def _go_on(self) -> None:
        """Look at what is left in the loop, use the client again, and close it."""
        world = self.world
        if not self.main.done():
            self.main.cancel()
            if not self._finish(self.main):
                self._note("it does not end when it is cancelled: " + _stack(self.main))
                return
            self._note_end()
        self._judge_end()
        if self.thread is not None:
            self.thread.join(_BOUND)
            if self.thread.is_alive():
                self._note("abort() in a thread does not return")
        self._look_for_what_is_left()
        if not self._at_its_end():
            if world.late:
                self._note(f"delivered after abort() had returned: {world.late}")
            if self.unseen:
                self._note("the server had not seen the client leave when abort() returned")
        if self.scene.answers and not self.scene.closes:
            self._do(world.client.ps(), "a following call")
        world.streams.clear()
        self._do(world.client.close(), "client.close()")
        if world.http is not None:
            self._do(world.http.aclose(), "the httpx client's aclose()")
        self._note("left behind after client.close()", self._settle(closed=True))

    def _judge_end(self) -> None:
        if not self.reached or self.kind in STOPS:
            return
        expected = {self.natural}
        if self.kind != "cancel":
            expected |= {"AbortError", *self.scene.ends}
        elif self.landed:
            expected = {"CancelledError"}
        if self.ended not in expected:
            self._note(f"it ended with {self.ended}, and not with {' or '.join(sorted(expected))}")

    def _look_for_what_is_left(self) -> None:
        world = self.world
        if self.kind in STOPS:
            # What held them has been interrupted.
            world.streams.clear()
        if not self.scene.keeps:
            self._note("left behind", self._settle())
        if self.found or self.scene.keeps:
            # That another abort finishes what the first did not is worth knowing.
            self._do(_call(world.abort))
            self._note("left behind after another abort()", self._settle())

    def _let_go(self) -> None:
        """After ``SystemExit``: what nobody promises to end with the loop."""
        world = self.world
        # What held them has been interrupted. The world itself is in a circle, and the collector is off.
        world.streams.clear()
        if self.scene.keeps:
            world.abort()
        if world.http is not None and not hasattr(world.http._transport, "_pools"):
            self._do(world.http.aclose())

    def _close_loop(self) -> None:
        """Do as ``asyncio.run()`` does."""
        loop = self.loop
        for _ in range(5):
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            try:
                if tasks:
                    loop.run_until_complete(asyncio.wait(tasks, timeout=_SETTLE))
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
            except (KeyboardInterrupt, SystemExit) as exc:
                # Once more, out of a task of ours that it had come out of.
                if type(exc).__name__ != self.kind:
                    raise
                traceback.clear_frames(exc.__traceback__)
            except RuntimeError:
                # The stop of the run that was interrupted was on its way.
                continue
            else:
                break
        loop.close()

    # -- what is injected --

    def _interrupt(self) -> None:
        raise KeyboardInterrupt("injected")

    def _exit(self) -> None:
        raise SystemExit("injected")

    def _abort(self) -> None:
        try:
            self.world.abort()
        except BaseException as exc:
            self._note(f"abort() raised {exc!r}")
        self._aborted()

    def _abort_in_a_thread(self) -> None:
        self.thread = threading.Thread(target=self.world.abort, daemon=True)
        self.thread.start()
        self.thread.join(_JOIN)
        if not self.thread.is_alive():
            self._aborted()

    def _aborted(self) -> None:
        world = self.world
        world.aborted = True
        if not self.scene.stalls or self._at_its_end():
            return
        # The loop stands still: what the server sees now has been done by abort().
        for record in self.server.connections:
            asked = [request for request in record.requests if request.route == PATH]
            if asked and record.open and not record.wait_left(_SETTLE):
                self.unseen = True

    def _at_its_end(self) -> bool:
        """Whether the abort came too late to end anything."""
        return any(stream.outcome in ("done", "until") for stream in self.world.streams)

    def _cancel(self) -> None:
        self.landed = self.main.cancel()

    # -- what is left --

    def _left(self, *, closed: bool) -> list[str]:
        world, loop = self.world, self.loop
        found = [f"a task {_stack(task)}" for task in asyncio.all_tasks(loop) - {asyncio.current_task(loop)}]
        for handle in live_timers(loop):
            name = getattr(handle._callback, "__qualname__", str(handle._callback))
            # That of idle connections finds out itself that there are none any more. The other is that of this look.
            if name != "BaseEventLoop.stop" and (closed or not name.endswith("_sweep")):
                found.append(f"a timer {name}")
        found += [f"{count} registrations" for count in map(registrations, world.tokens) if count]
        ours = sum(map(registrations, [world.client._closing, *world.client._calls.tokens]))
        if ours:
            found.append(f"{ours} registrations on the client's tokens")
        return found + self._left_in_pools(closed=closed)

    def _left_in_pools(self, *, closed: bool) -> list[str]:
        found, idle = [], 0
        http = self.world.http
        transports = [self.world.client._direct, getattr(http, "_transport", None)]
        for transport in transports:
            for pool in getattr(transport, "_pools", {}).values():
                waiting = sum(map(len, pool._idle.values()))
                idle += waiting
                if len(pool._all) > waiting:
                    found.append(f"{len(pool._all) - waiting} connections in the pool that are not idle")
                if pool.dialling:
                    found.append(f"{len(pool.dialling)} connections in the making")
        opened = sum(record.open for record in self.server.connections)
        foreign = http is not None and not hasattr(http._transport, "_pools")
        if opened > idle and (closed or not foreign):
            found.append(f"{opened - idle} connections that the server sees open")
        return found

    def _left_outside(self, fds: int, tokens: list[Any]) -> list[str]:
        found = [f"{more} descriptors"] if (more := len(open_fds()) - fds) > 0 else []
        opened = sum(record.open for record in self.server.connections)
        if opened:
            found.append(f"{opened} connections that the server sees open")
        return found + [f"{count} registrations" for count in map(registrations, tokens) if count]

    def _settle(self, *, closed: bool = False) -> list[str]:
        async def settle() -> list[str]:
            deadline = time.monotonic() + _SETTLE
            while (found := self._left(closed=closed)) and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            return found

        return self._do(settle()) or []

    def _settle_outside(self, look: Callable[[], list[str]]) -> list[str]:
        deadline = time.monotonic() + _SETTLE
        while (found := look()) and time.monotonic() < deadline:
            time.sleep(0.001)
        return found

    # -- running things --

    def _do(self, coroutine: Coroutine[Any, Any, Any], what: str = "what looks after it") -> Any:
        task = self.loop.create_task(coroutine)
        if not self._finish(task):
            self._note(f"{what} hangs: {_stack(task)}")
            task.cancel()
        elif task.cancelled() or task.exception() is not None:
            self._note(f"{what} failed: {'cancelled' if task.cancelled() else repr(task.exception())}")
        else:
            return task.result()
        return None

    def _finish(self, task: asyncio.Task[Any]) -> bool:
        """Run a task to its end, however often what was injected comes out of another one once more."""
        bound = self.loop.call_later(_BOUND, self.loop.stop)
        for _ in range(5):
            try:
                self.loop.run_until_complete(task)
            except (KeyboardInterrupt, SystemExit) as exc:
                if type(exc).__name__ != self.kind:
                    raise
                traceback.clear_frames(exc.__traceback__)
            except (Exception, asyncio.CancelledError):
                # Its own; or the stop of the run that was interrupted, which was on its way.
                pass
            if task.done():
                break
        bound.cancel()
        return task.done()

    # -- what is said of it --

    def _note(self, what: str, details: list[str] | None = None) -> None:
        if details is not None:
            if not details:
                return
            what = f"{what}: {', '.join(details)}"
        for text, kinds, unreal, _, functions in EXCUSED:
            somewhere = self.place is not None and not (unreal and self.place.real)
            if functions:
                somewhere = self.place is not None and self.place.code.co_qualname in functions and somewhere
            alone = bool(functions) or details is None or len(details) == 1
            if somewhere and alone and self.kind in kinds and text.format(kind=self.kind) in what:
                return
        self.found.append(what)

    def _is_ours_in_del(self, line: str) -> bool:
        # What comes in a __del__ Python prints, wherever that was called.
        return "__del__" in self.inside and line.startswith("unraisable") and f"{self.kind}('injected')" in line

    def _on_loop_error(self, _: Any, context: dict[str, Any]) -> None:
        self.noise.append(f"{context.get('message')}: {context.get('exception')!r}")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def unraisable(args: Any) -> None:
            self.noise.append(f"unraisable in {args.object!r}: {args.exc_value!r}")

        def said(message: Any, category: Any, *_: Any, **__: Any) -> None:
            self.noise.append(f"{category.__name__}: {message}")

        before = sys.unraisablehook
        sys.unraisablehook = unraisable
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = said
                yield
        finally:
            sys.unraisablehook = before


def _alone(function: Callable[..., object], *args: object) -> Iterator[object]:
    """Call a function in a generator.

    What is raised at the first instruction of an ``except`` leaves CPython with the exception that was handled there as
    one that is still being handled, and with all that its frames hold. A generator has such a state of its own.
    """
    yield function(*args)


async def _call(function: Callable[[], object]) -> None:
    function()


def _stack(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    frames = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append(f"{frame.f_code.co_qualname}():{frame.f_lineno}")
        coroutine = coroutine.cr_await
    return " > ".join(frames)
