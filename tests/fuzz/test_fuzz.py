"""Each fuzz target with its cases, with the inputs that were found, and with some others; ``search.py`` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from fuzz.cases import CASES
from fuzz.oracles import ORACLES
from fuzz.strategies import CORPUS, inputs, stored
from hypothesis import given
from hypothesis import strategies as st

# What is wrong with the package, by the target that finds it. Whoever mends it takes the entry out, and "fault-" off
# the names of its inputs in the corpus.
NOT_MENDED = {
    "http_limits": "what follows the size of a chunk passes over the limit if it comes in one read",
}


def marked(target: str, *values: object, name: str, strict: bool = False) -> ParameterSet:
    """Expect the fault of a target, which not all of its inputs show."""
    reason = NOT_MENDED.get(target)
    marks = [pytest.mark.xfail(strict=strict, reason=reason)] if reason else []
    return pytest.param(target, *values, id=name, marks=marks)


FOUND = [(target, path) for target in ORACLES for path in stored(target)]
FAULTS = [(target, path) for target, path in FOUND if path.name.startswith("fault-")]
targets = pytest.mark.parametrize("target", [marked(target, name=target) for target in ORACLES])


@pytest.mark.parametrize(
    ("target", "path"),
    [pytest.param(*found, id=f"{found[0]}-{found[1].name}") for found in FOUND if found not in FAULTS],
)
def test_an_input_that_was_found(target: str, path: Path) -> None:
    ORACLES[target](path.read_bytes())


@pytest.mark.parametrize(
    ("target", "path"),
    [marked(target, path, name=f"{target}-{path.name}", strict=True) for target, path in FAULTS],
)
def test_an_input_that_shows_a_fault(target: str, path: Path) -> None:
    ORACLES[target](path.read_bytes())


@targets
def test_the_cases_of_the_other_tests(target: str) -> None:
    for data in CASES[target]:
        ORACLES[target](data)


@targets
@given(data=st.data())
def test_other_inputs(target: str, data: st.DataObject) -> None:
    ORACLES[target](data.draw(inputs(target)))


def test_each_target_has_cases_and_each_corpus_a_target() -> None:
    assert set(CASES) == set(ORACLES)
    assert {folder.name for folder in CORPUS.iterdir()} <= set(ORACLES)
