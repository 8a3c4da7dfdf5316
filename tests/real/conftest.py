"""A real browser and a real Redis, for the modules that need one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from real.needs import needs

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, BrowserContext
    from real.redis_server import RealRedis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RealRedis]:
    # Only now: not all that is tested here needs redis-py.
    from real.redis_server import RealRedis, find_redis

    binary = find_redis()
    if binary is None:
        needs("a Redis server", how="sudo apt-get install redis-server")
    with RealRedis(binary, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Only now: not all that is tested here needs a browser.
    from playwright.sync_api import expect
    from real.chromium import BOUND, chromium, find_chromium

    binary = find_chromium()
    if binary is None:
        needs("a Chromium", how="run .ci/install-parts (Debian), or set OLLAMA_ASYNC_TEST_CHROMIUM")
    expect.set_options(timeout=BOUND * 1000)
    with chromium(binary) as started:
        yield started


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser window of its own, in which no script fails."""
    from real.chromium import BOUND

    context = browser.new_context(viewport={"width": 820, "height": 720}, color_scheme="light")
    context.set_default_timeout(BOUND * 1000)
    failures: list[str] = []
    context.on("weberror", lambda failure: failures.append(str(failure.error)))
    yield context
    context.close()
    assert failures == []
