"""On other systems: what Python does not have on Windows and on macOS is taken away, in a process of its own.

That shows which names the package asks for. How their event loops and sockets behave it cannot show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ollama_async

ROOT = Path(ollama_async.__file__).parents[1]
BOUND = 120.0

# The names are taken away after the libraries have been imported, which look at sys.platform.
TAKE_AWAY = """
import asyncio, errno, os, selectors, signal, socket, stat, sys
import anyio, anyio._backends._asyncio, httptools, httpcore, httpx, pydantic, redis.asyncio

system, folder = sys.argv[1:]
there = os.listdir

def listdir(path="."):
    if path == "/proc/self/fd" or (path == "/dev/fd" and system == "windows"):
        raise FileNotFoundError(errno.ENOENT, "no such folder", path)
    return there(path)

def no_handlers(*args):
    raise NotImplementedError

def socketpair(*args):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]

dup = os.dup

def dup_of_files(descriptor):
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(errno.EBADF, "a socket is not a file here")
    return dup(descriptor)

NAMES = {
    "windows": {
        socket: "AF_UNIX SOCK_CLOEXEC SOCK_NONBLOCK MSG_DONTWAIT MSG_NOSIGNAL SO_REUSEPORT sendmsg_afalg",
        os: "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_PATH fchmod fchown fork geteuid getpgid getuid killpg mkfifo"
        " openpty pread pwrite register_at_fork setsid sysconf",
        signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGTSTP SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH"
        " ITIMER_REAL ITIMER_VIRTUAL alarm pause pthread_sigmask setitimer siginterrupt sigpending sigwait",
    },
    "macos": {
        socket: "SOCK_CLOEXEC SOCK_NONBLOCK",
        os: "O_PATH accept4 eventfd memfd_create pipe2 posix_fadvise sched_getaffinity splice",
        signal: "SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT sigtimedwait sigwaitinfo",
    },
}
socket.socketpair, os.listdir = socketpair, listdir
for module, names in NAMES[system].items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
if system == "windows":
    os.dup = dup_of_files
    asyncio.SelectorEventLoop.add_signal_handler = no_handlers
    for module in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
        sys.modules[module] = None
sys.modules["uvloop"] = None
"""

USE = """
import warnings
from pathlib import Path
from ollama_async import AbortError, AsyncClient, CancelToken, ConnectError
from ollama_async.registry import AbortRegistry
from ollama_async.testing import FakeOllama, LeakCheckWarning, Reply, check_teardown, nothing_left_behind

async def stop(client, server):
    stream = client.chat("fake", "hi", stream=True)
    await anext(stream)
    stream.abort("enough")
    assert server.requests[-1].connection.wait_left(), "the socket was not shut down by abort()"
    try:
        await anext(stream)
    except AbortError as error:
        assert error.reason == "enough"

async def use(server):
    file = Path(folder, "model.gguf")
    file.write_bytes(b"GGUF" + b"x" * 1000)
    async with nothing_left_behind(limit=20):
        async with AsyncClient(server.url) as client:
            assert (await client.chat("fake", "hi")).message.content
            assert (await client.create_blob(file)).startswith("sha256:")
            server.script("/api/chat", Reply.endless_chat(), always=True)
            await stop(client, server)
        async with httpx.AsyncClient() as foreign, AsyncClient(server.url, http_client=foreign) as client:
            await stop(client, server)
        async with AbortRegistry.from_url("memory://") as registry, registry.token("one") as token:
            assert await registry.abort("one") == "stopped"
            assert token.aborted
    if system == "windows":
        async with AsyncClient("http://localhost", uds=str(Path(folder, "s"))) as client:
            try:
                await client.version()
            except ConnectError as error:
                assert "no unix sockets" in str(error.__cause__), error
            else:
                raise AssertionError("there are unix sockets")
        try:
            FakeOllama(uds=str(Path(folder, "s"))).start()
        except OSError as error:
            assert "no unix sockets" in str(error), error
        else:
            raise AssertionError("there are unix sockets")

async def answer(url: str, token: CancelToken) -> None:
    async with AsyncClient(url) as client:
        await client.chat("fake", "hi", stream=True, token=token).collect()

async def careless(url: str) -> None:
    kept.append(AsyncClient(url))
    await asyncio.shield(kept[-1].chat("fake", "hi", stream=True).collect())

kept = []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    with FakeOllama(interval=0.001) as server:
        asyncio.run(use(server))
    report = check_teardown(answer, ticks=3, limit=20)
    try:
        check_teardown(careless, ways=["cancel"], ticks=3, limit=0.3, server=lambda: FakeOllama(interval=1))
    except AssertionError as error:
        assert "a task that still runs" in str(error), error
    else:
        raise AssertionError("a leak was not found")
told = {str(entry.message) for entry in told if entry.category is LeakCheckWarning}
unchecked = [text for text in told if text.startswith("not checked: descriptors")]
assert len(unchecked) == (system == "windows"), told
assert len(report.unchecked) == (system == "windows"), report
print("ok", report.total)
"""


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_package_works_without_the_names_that_a_system_does_not_have(system: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKE_AWAY + USE, system, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok"), done.stdout
