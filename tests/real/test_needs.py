"""What is missing is named at the end of a run, and is a failure under CI."""

import pytest

TESTS = """
    import pytest
    from real.needs import needs

    @pytest.fixture(scope="session")
    def horse():
        needs("a horse", how="buy one")

    def test_ride(horse): ...
    def test_jump(horse): ...
    def test_fly():
        needs("a kite", how="build one")
    def test_other():
        pytest.skip("not today")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    tests = pytestconfig.rootpath / "tests"
    pytester.makeconftest("from real.needs import pytest_terminal_summary")
    pytester.makepyprojecttoml(
        f"""
        [tool.pytest.ini_options]
        addopts = ["-p", "no:ollama_async", "-p", "no:asyncio"]
        pythonpath = ["{tests}"]
        """
    )
    pytester.makepyfile(TESTS)
    monkeypatch.delenv("CI", raising=False)
    return pytester


def test_what_is_missing_is_counted_and_named(run: pytest.Pytester) -> None:
    result = run.runpytest()
    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines(
        [
            "*= Not tested here =*",
            "2 tests for want of a horse; to get it: buy one",
            "1 test for want of a kite; to get it: build one",
        ],
        consecutive=True,
    )


def test_nothing_is_said_when_nothing_is_missing(run: pytest.Pytester) -> None:
    result = run.runpytest("-k", "other")
    result.stdout.no_fnmatch_line("*Not tested here*")


def test_under_ci_a_missing_part_is_a_failure(run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run.runpytest()
    result.assert_outcomes(skipped=1, errors=2, failed=1)
    result.stdout.fnmatch_lines(["*needs a horse; to get it: buy one*"])
