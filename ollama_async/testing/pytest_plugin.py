"""The pytest plugin that comes with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ollama_async.testing import WAYS, FakeOllama, TeardownCheck, TeardownReport, check_teardown

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fake_ollama() -> Iterator[FakeOllama]:
    """A running `FakeOllama` with one model, `fake`; stopped after the test."""
    with FakeOllama() as server:
        yield server


@pytest.fixture(params=WAYS, ids=lambda way: way.replace(" ", "_"))
def teardown_check(request: pytest.FixtureRequest) -> TeardownCheck:
    """`check_teardown` for one way to stop a call: the test runs once for each, and is skipped where it has no use."""

    def check(make_call: Any, **options: Any) -> TeardownReport:
        report = check_teardown(make_call, ways=[request.param], **options)
        if not report.runs:
            pytest.skip(f"this call cannot be stopped by {request.param!r}: it takes no token, or nothing iterates it")
        return report

    return check
