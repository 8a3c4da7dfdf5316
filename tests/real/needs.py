"""What a test needs and cannot bring itself: a server, a browser. Without it the test is skipped, and named at the end.

With `CI` set to true nothing is skipped: what is missing there is a failure.
"""

import os
import re
from collections import Counter
from typing import NoReturn

import pytest

_REASON = re.compile(r"needs (.+?); to get it: (.+)", re.DOTALL)


def needs(what: str, *, how: str) -> NoReturn:
    """Skip the present test, or every test that uses the present fixture, for want of something.

    Args:
        what: What is missing, as in "an Ollama server".
        how: How to get it, as in "run .ci/install-ollama".
    """
    __tracebackhide__ = True
    reason = f"needs {what}; to get it: {how}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Name what was skipped by `needs`, most tests first."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    missing = Counter(match.groups() for reason in reasons if (match := _REASON.search(reason)))
    if missing:
        terminalreporter.section("Not tested here")
    for (what, how), count in missing.most_common():
        terminalreporter.line(f"{count} test{'s' * (count > 1)} for want of {what}; to get it: {how}")
