"""Programs that run beside a test: the examples, and uvicorn with the one that is a web server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from ollama_async.testing import FakeOllama

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BOUND = 30.0


class Program:
    """A program that runs beside the test, and is ended with it; what it says is in one place."""

    def __init__(self, *command: str, **environment: str) -> None:
        path = [] if os.environ.get("PYTHONSAFEPATH") else [str(ROOT)]
        path += filter(None, [os.environ.get("PYTHONPATH")])
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode()

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until it has said something."""
        end = time.monotonic() + BOUND
        while not (match := re.search(pattern, self.output())):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)
        return match

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, and return with which status it ends."""
        self.process.send_signal(number)
        return self.process.wait(BOUND)

    def clean_up(self) -> None:
        # It, and the processes that it has started.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(BOUND)
        self._output.close()


@contextmanager
def running(*command: str, **environment: str) -> Iterator[Program]:
    program = Program(*command, **environment)
    try:
        yield program
    finally:
        program.clean_up()


@contextmanager
def serving(server: FakeOllama, *options: str, **environment: str) -> Iterator[tuple[Program, httpx.Client]]:
    command = ("-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_stop:app", "--port", "0", *options)
    with running(*command, OLLAMA_HOST=server.url, **environment) as program:
        url = program.said(r"running on (http://\S+)")[1]
        with httpx.Client(base_url=url, timeout=BOUND, headers={"X-User": "ann"}) as browser:
            wait_until_it_listens(browser)
            yield program, browser


def wait_until_it_listens(browser: httpx.Client) -> None:
    # With several workers the address is known before one of them is ready.
    end = time.monotonic() + BOUND
    while True:
        try:
            browser.get("/openapi.json")
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.01)
        else:
            return


QUESTION = {"model": "llama3.2", "messages": [{"role": "user", "content": "Tell me a long story."}]}


def last_event(lines: Iterator[str]) -> dict[str, Any]:
    *_, data = [line for line in lines if line]
    return dict(json.loads(data.removeprefix("data: ")))
