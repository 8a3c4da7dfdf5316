"""A real Redis server for tests: started, killed, started again, and asked what it sees. Everything here blocks."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from real.ports import free_port

BOUND = 20.0


def find_redis() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


class RealRedis:
    """`redis-server` as a child process that keeps nothing but what `SAVE` wrote. A context manager."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        # `nox -s durable` runs the tests over RESP3 as well.
        protocol = os.environ.get("OLLAMA_ASYNC_RESP")
        return f"redis://127.0.0.1:{self.port}/0" + (f"?protocol={protocol}" if protocol else "")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it on its port; returns when it answers."""
        options = {"port": self.port, "bind": "127.0.0.1", "unixsocket": self._folder / "redis.sock"}
        options |= {"save": "", "appendonly": "no", "dir": self._folder}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + BOUND
        while True:
            with contextlib.suppress(redis.ConnectionError):
                self.ask("PING")
                return
            log_text = (self._folder / "redis.log").read_text()
            assert self._process.poll() is None, log_text
            assert time.monotonic() < end, log_text
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(BOUND)

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def forget_snapshot(self) -> None:
        """Have it start with nothing the next time, whatever `SAVE` has written."""
        (self._folder / "dump.rdb").unlink(missing_ok=True)

    def ask(self, *command: str) -> Any:
        """Give it a command."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*command)
