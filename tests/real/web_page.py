"""``ollama-async web`` in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

BOUND = 30.0


def environment(**variables: str) -> dict[str, str]:
    """The variables for a program that runs this package, the installed one where that is what is tested."""
    path = os.environ.get("PYTHONPATH", "")
    if not os.environ.get("PYTHONSAFEPATH"):
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), path]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", "NO_COLOR": "1", **variables}


class WebPage:
    """The process that serves the page.

    Attributes:
        url: where the page is.
        said: what it has written, on stdout and stderr, until it said where the page is.
    """

    def __init__(self, host: str, *options: str, browser: str | None, cwd: Path | None) -> None:
        command = [sys.executable, "-m", "ollama_async", "--host", host, "web", *options]
        self.process = subprocess.Popen(
            [*command, "--no-browser"] if browser is None else command,
            env=environment(BROWSER=browser or ""),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # So that a read of its output ends, whatever it does.
        watchdog = threading.Timer(2 * BOUND, self.process.kill)
        watchdog.start()
        self.said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"The chat page is at (http://\S+/)", line):
                self.url = found[1]
                break
        watchdog.cancel()
        if not hasattr(self, "url"):
            self.end(signal.SIGKILL)
            raise AssertionError(f"it did not start: {self.said}")

    def end(self, how: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """End it; return its exit status, and what it has written since it said where the page is."""
        self.process.send_signal(how)
        try:
            written, _ = self.process.communicate(timeout=BOUND)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, written


@contextlib.contextmanager
def web_page(
    host: str, *options: str, port: int | None = 0, browser: str | None = None, cwd: Path | None = None
) -> Iterator[WebPage]:
    """Have the page served, on a free port unless told, and shown in a browser if one is given."""
    ports = [] if port is None else ["--port", str(port)]
    served = WebPage(host, *ports, *options, browser=browser, cwd=cwd)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.end()
        elif served.process.stdout is not None:
            served.process.stdout.close()
