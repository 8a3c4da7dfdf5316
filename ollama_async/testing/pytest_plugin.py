"""The pytest plugin that comes with the package."""

from collections.abc import Callable, Iterator

import pytest

from ollama_async.testing import WAYS, FakeOllama, TeardownReport, check_teardown


@pytest.fixture
def fake_ollama() -> Iterator[FakeOllama]:
    """A running `FakeOllama` with one model, `fake`; stopped after the test."""
    with FakeOllama() as server:
        yield server


@pytest.fixture(params=WAYS, ids=lambda way: way.replace(" ", "_"))
def teardown_check(request: pytest.FixtureRequest) -> Callable[..., TeardownReport]:
    """`check_teardown` for one way to stop a call: the test runs once for each, and is skipped where it has no use."""

    def check(*args: object, **options: object) -> TeardownReport:
        report = check_teardown(*args, ways=[request.param], **options)  # type: ignore[arg-type]
        if not report.runs:
            pytest.skip(f"this call cannot be stopped by {request.param!r}: it takes no token, or nothing iterates it")
        return report

    return check
