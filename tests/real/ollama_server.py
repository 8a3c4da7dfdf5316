"""A real Ollama server for tests: found, started, given a tiny model, observed from outside and stopped.

Everything here blocks, with a bound, and needs no event loop: a test calls it from its own thread, also while the
client's loop stands still.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from real.needs import needs
from real.tiny_model import CONTEXT, TEMPLATE, write_tiny_model

VERSION = "v0.24.0"
"""The version that .ci/install-ollama builds."""

SLOTS = 64
MODEL = "tiny"

# The server may lose a slot when a client leaves: its generating goroutine then waits for ever to hand over a token
# that nobody takes. That was one abort in ten at worst, so this many answers cannot use the slots up.
ANSWERS_BEFORE_UNLOAD = 100

POLL_INTERVAL = 0.005
IDLE_SAMPLE_INTERVAL = 0.1  # ten ticks of the CPU clock

ANSWER_LINE = re.compile(
    r"^\[GIN\] (?P<at>\S+ - \S+) \| +(?P<status>\d+) \| +(?P<duration>\S+) \| +(?P<client>\S+) \| "
    r'(?P<method>\S+) +"(?P<path>[^"]*)"$',
    re.MULTILINE,
)
LOADING = re.compile("starting runner|starting go runner|runner starting")
LISTENING = re.compile(r"Listening on 127\.0\.0\.1:(\d+)")
TCP_ESTABLISHED = "01"

T = TypeVar("T")


@dataclass(frozen=True)
class RequestEnd:
    """A line of the server's access log, which it writes when a request is over, whoever ended it."""

    status: int
    duration: str
    method: str
    path: str


class NotSeen(AssertionError):
    """What a test waited for did not happen in time."""


def _installed() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ollama-async" / f"ollama-{VERSION}"


def find_source() -> Path | None:
    """The folder with what .ci/install-ollama keeps of the server's source."""
    folder = _installed() / "source"
    return folder if folder.is_dir() else None


def find_server() -> Path | None:
    """The server named by OLLAMA_ASYNC_TEST_SERVER, else the one that .ci/install-ollama built, else PATH's."""
    named = os.environ.get("OLLAMA_ASYNC_TEST_SERVER")
    if named:
        return Path(named)
    built = _installed() / "ollama"
    if built.is_file():
        return built
    installed = shutil.which("ollama")
    return Path(installed) if installed else None


def need_server() -> Path:
    """The same, or a skip that says how to get one."""
    binary = find_server()
    if binary is None:
        needs("an Ollama server", how="run .ci/install-ollama (it needs Go), or set OLLAMA_ASYNC_TEST_SERVER")
    return binary


class RealOllama:
    """`ollama serve` as a child process, with everything it writes in one folder; a context manager.

    Settings are further variables of its environment. A server that is started again takes the same port again.
    """

    def __init__(self, binary: Path, folder: Path, **settings: str) -> None:
        self.model = MODEL
        self.port = 0
        self._settings = settings
        self._binary = binary
        self._folder = folder
        self._log_file = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded_at = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- life

    def start(self) -> None:
        """Start the server and load the tiny model."""
        with self._log_file.open("wb") as log:
            # A session of its own: the runners it starts are in its process group, and a Ctrl-C does not reach it.
            self._process = subprocess.Popen(
                [self._binary, "serve"],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.port = int(self.wait_for_log(0, LISTENING, timeout=20)[1])
            poll(self._answers, "the server's first answer", timeout=20)
            self._create_model()
            self.generate(1, timeout=30)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """Have the server and its runners die without a word; returns when they are gone."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End the server and its runners; returns when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # The server ends its runners when it has the time to. What is left is in its group, the server included.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        poll(lambda: not _group(process.pid), "the end of the server's runners", timeout=10)

    def unload(self) -> None:
        """Unload the model, which ends its runner; the next request loads it again, in about 0.3 s.

        This gives back every slot that the server has lost. Requests that hang for want of one must have been given up.
        """
        self.post("/api/generate", {"model": self.model, "keep_alive": 0})
        poll(lambda: not self.runner_pids(), "the end of the runner", timeout=10)

    def make_ready(self) -> None:
        """Between tests: see to it that the model is loaded and has slots to give."""
        if self._answers_since_load() < ANSWERS_BEFORE_UNLOAD:
            with contextlib.suppress(OSError):
                self.generate(1, timeout=5)
                return
        self.unload()
        self.generate(1, timeout=30)
        self._loaded_at = self.mark()

    def generate(self, tokens: int, *, timeout: float = 10) -> dict[str, Any]:
        """Have the model say exactly so many tokens, without streaming."""
        body = {"model": self.model, "prompt": "hi", "stream": False, "options": {"num_predict": tokens}}
        return self.post("/api/generate", body, timeout=timeout)

    def post(self, path: str, body: dict[str, Any], *, timeout: float = 10) -> dict[str, Any]:
        """Ask the server for something, over a connection that is closed afterwards."""
        answer: dict[str, Any] = json.loads(self._request("POST", path, json.dumps(body).encode(), timeout=timeout))
        return answer

    def send(self, path: str, data: bytes, *, timeout: float = 60) -> None:
        """Send the server a file."""
        self._request("POST", path, data, timeout=timeout)

    def get(self, path: str, *, timeout: float = 10) -> dict[str, Any]:
        """Ask the server what it says of itself."""
        answer: dict[str, Any] = json.loads(self._request("GET", path, timeout=timeout))
        return answer

    # -- what the server saw

    def log(self, mark: int = 0) -> str:
        """What the server has logged since the mark."""
        with self._log_file.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    def mark(self) -> int:
        """The present end of the log."""
        return self._log_file.stat().st_size

    def wait_for_log(self, mark: int, pattern: str | re.Pattern[str], *, timeout: float = 10) -> re.Match[str]:
        """Wait until the pattern is in the log after the mark."""
        return poll(lambda: re.search(pattern, self.log(mark)), f"{pattern!r} in the server's log", timeout=timeout)

    def wait_for_load(self, mark: int, *, timeout: float = 10) -> None:
        """Wait until a model is being loaded, that is until the scheduler has taken the request that asks for it.

        One that is left before is never answered, and its end not logged: the scheduler skips it, and tells nobody.
        """
        self.wait_for_log(mark, LOADING, timeout=timeout)

    def loads(self, mark: int) -> int:
        """How often a model has been loaded since the mark: each time by a runner of its own."""
        return len(re.findall("starting runner.* --model ", self.log(mark)))

    def request_ends(self, mark: int, path: str) -> list[RequestEnd]:
        """The requests to the path that have ended since the mark, oldest first."""
        lines = ANSWER_LINE.finditer(self.log(mark))
        ends = [RequestEnd(int(line["status"]), line["duration"], line["method"], line["path"]) for line in lines]
        return [end for end in ends if end.path == path]

    def wait_for_request_end(
        self, mark: int, path: str = "/api/chat", *, count: int = 1, timeout: float = 10
    ) -> list[RequestEnd]:
        """Wait until so many requests to the path have ended since the mark."""

        def ends() -> list[RequestEnd] | None:
            found = self.request_ends(mark, path)
            return found if len(found) >= count else None

        return poll(ends, f"the end of {count} requests to {path}", timeout=timeout)

    def client_connections(self) -> int:
        """How many connections to the server are open at both ends, by the kernel's table of the server's sockets.

        A client's FIN or RST takes its connection off this count at once, before the server has read it.
        """
        return established(self.port)

    def wait_for_connections(self, count: int, *, timeout: float = 10) -> None:
        """Wait until the server has so many open connections."""
        poll(lambda: self.client_connections() == count, f"{count} open connections", timeout=timeout)

    def runner_pids(self) -> list[int]:
        """The processes that run models: one a loaded model."""
        if self._process is None:
            return []
        return [pid for pid in _group(self._process.pid) if b"--model" in _command_line(pid)]

    def runner_cpu_seconds(self) -> float:
        """The CPU time that the runners have used so far."""
        ticks = sum(_cpu_ticks(pid) for pid in self.runner_pids())
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self, *, timeout: float = 10) -> None:
        """Wait until the runners use no CPU time, that is until no token is being made."""

        def idle() -> bool:
            before = self.runner_cpu_seconds()
            # Idleness shows in no event: only two looks some time apart tell.
            time.sleep(IDLE_SAMPLE_INTERVAL)
            return self.runner_cpu_seconds() == before

        poll(idle, "an idle runner", timeout=timeout)

    # -- inner parts

    def _environment(self) -> dict[str, str]:
        home = self._folder / "home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "OLLAMA_HOST": f"127.0.0.1:{self.port}",  # with 0 the server takes a free port and logs which
            "OLLAMA_MODELS": str(self._folder / "models"),
            "OLLAMA_NUM_PARALLEL": str(SLOTS),
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_DEBUG": "1",  # "context for request finished" is a debug line
            "OLLAMA_NO_CLOUD": "1",  # asks nothing of ollama.com
            **self._settings,
        }

    def _create_model(self) -> None:
        file = self._folder / "tiny.gguf"
        write_tiny_model(file)
        data = file.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._request("POST", f"/api/blobs/{digest}", data, timeout=10)
        body = {
            "model": self.model,
            "files": {file.name: digest},
            "template": TEMPLATE,
            # Several threads wait for each other in busy loops: on a loaded machine 300 tokens then take over 10 s.
            "parameters": {"num_ctx": CONTEXT, "num_thread": 1},
            "stream": False,
        }
        self.post("/api/create", body)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"the Ollama server ended by itself:\n{self.log()}")
        with contextlib.suppress(OSError):
            self._request("GET", "/api/version", timeout=1)
            return True
        return False

    def _answers_since_load(self) -> int:
        return sum(len(self.request_ends(self._loaded_at, path)) for path in ("/api/chat", "/api/generate"))

    def _request(self, method: str, path: str, data: bytes | None = None, *, timeout: float) -> bytes:
        request = urllib.request.Request(self.url + path, data, method=method)
        # Proxy settings of the environment are not for a loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as answer:
            content: bytes = answer.read()
        return content


def established(port: int) -> int:
    """How many sockets of this machine with that local port are open at both ends."""
    return sum(1 for local, state in _tcp_sockets() if local == port and state == TCP_ESTABLISHED)


def poll(look: Callable[[], T | None], what: str, *, timeout: float) -> T:
    """Look until there is something to see: the server is another process, and it tells nobody."""
    end = time.monotonic() + timeout
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() >= end:
            raise NotSeen(f"waited {timeout:g} s for {what}")
        time.sleep(POLL_INTERVAL)


def _group(leader: int) -> list[int]:
    """The living processes of a process group."""
    fields = {pid: _stat(pid) for pid in _pids()}
    return [pid for pid, stat in fields.items() if stat and stat[0] != "Z" and int(stat[2]) == leader]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets


def _cpu_ticks(pid: int) -> int:
    stat = _stat(pid)
    return int(stat[11]) + int(stat[12]) if stat else 0  # utime and stime


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _tcp_sockets() -> Iterator[tuple[int, str]]:
    """Local port and state of each TCP socket of this machine."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                yield int(local.rpartition(":")[2], 16), state
