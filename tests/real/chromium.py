"""A real Chromium for tests, driven from the test's own thread.

Playwright's blocking interface keeps an event loop running in that thread: it must be closed before any other test
needs one of its own. So a module that uses it has no tests with a loop, and a fixture of that module closes it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

BOUND = 30.0
"""Seconds that anything may take at most: a busy machine is slow, and only a failure gets there."""

FLAGS = [
    "--no-sandbox",  # it does not start as root with one
    "--disable-gpu",
    "--disable-dev-shm-usage",  # in a container it may be too small
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A name that points to this machine although it is another site's.
    "--host-resolver-rules=MAP rebound.test 127.0.0.1",
]


def find_chromium() -> Path | None:
    """The browser named by OLLAMA_ASYNC_TEST_CHROMIUM, else PATH's."""
    named = os.environ.get("OLLAMA_ASYNC_TEST_CHROMIUM")
    if named:
        return Path(named)
    installed = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return Path(installed) if installed else None


@contextlib.contextmanager
def chromium(binary: Path) -> Iterator[Browser]:
    """Start the browser, and end it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary, headless=True, args=FLAGS, timeout=2 * BOUND * 1000, chromium_sandbox=False
        )
        try:
            yield browser
        finally:
            browser.close()
