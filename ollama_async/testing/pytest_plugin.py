"""The pytest plugin that comes with the package."""

from collections.abc import Iterator

import pytest

from ollama_async.testing import FakeOllama


@pytest.fixture
def fake_ollama() -> Iterator[FakeOllama]:
    """A running `FakeOllama` with one model, `fake`; stopped after the test."""
    with FakeOllama() as server:
        yield server
