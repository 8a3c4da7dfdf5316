"""The map of the code: docs/design.md names each module, and what it draws and names is what is there."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
from project.test_layers import CORE, FLOORS, PACKAGE, core_files

from ollama_async import PhaseTimeout
from ollama_async._call.timeouts import LIMITS, Limit
from ollama_async._wire.phase import TRANSITIONS, Phase

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "design.md").read_text("utf-8")
ROWS = [match.split("|") for match in re.findall(r"^\| (.*) \|$", PAGE, re.MULTILINE)]
MODULES = {row[0].strip().strip("`"): row[1].strip() for row in ROWS if len(row) == 2}
# Their last names tell them apart: `reader.ResponseReader` is in `_wire.reader`.
BY_LAST_NAME = {module.rpartition(".")[2]: module for module in CORE}


@pytest.mark.parametrize("name", ["cost", "layers", "phases", "stop"])
def test_a_picture_is_drawn_from_what_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "images"))
    drawn = runpy.run_path(str(DOCS / "images" / f"{name}.py"))["picture"]()
    assert (DOCS / "images" / f"{name}.svg").read_text("utf-8") == drawn, (
        f"docs/images/{name}.svg is not what the code and the pages say: run `nox -s pictures`"
    )


def test_the_picture_of_a_reload_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "images" / "reload.py"))["picture"]()
    assert (DOCS / "images" / "reload.svg").read_text("utf-8") == drawn, "run `python docs/images/reload.py`"


def test_each_phase_has_its_transitions_and_its_limits() -> None:
    assert set(TRANSITIONS) == set(LIMITS) == set(Phase)


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_has_its_row(phase: Phase) -> None:
    rows = {row[0].strip(): row for row in ROWS if len(row) == 3}
    assert f"`{phase.name}`" in rows, f"add a row for {phase.name} to the table of the phases in docs/design.md"
    limits = set(re.findall(r"`(\w+)`", rows[f"`{phase.name}`"][2]))
    assert limits == LIMITS[phase] - {"total"}, (
        f"correct the limits of {phase.name} in the table of the phases in docs/design.md"
    )


@pytest.mark.parametrize("limit", get_args(Limit))
def test_a_limit_that_passes_says_so(limit: str) -> None:
    try:
        error = PhaseTimeout(limit, 1.5)
    except KeyError:
        pytest.fail(f"add a text for the limit {limit!r} to _PHASE_TEXT in ollama_async/_errors.py")
    assert "1.5 s" in str(error)
    assert f"({limit} timeout)" in str(error)


@pytest.mark.parametrize("module", sorted(CORE))
def test_a_module_of_the_core_has_its_line(module: str) -> None:
    name = module.replace(".", "/")
    assert MODULES.get(name), f"add a line for `{name}` to the tables of modules in docs/design.md: say what it is for"


def test_the_lines_follow_the_floors() -> None:
    floors = {module.replace(".", "/"): place for place, floor in enumerate(FLOORS) for module in floor}
    places = [floors[name] for name in MODULES if name in floors]
    assert places == sorted(places), (
        "order the lines of modules in docs/design.md as FLOORS in tests/project/test_layers.py has them"
    )


def test_the_map_has_no_line_for_a_module_that_is_gone() -> None:
    lines = {name for name in MODULES if re.fullmatch(r"_\w+(/\w+)?", name)}
    gone = lines - {module.replace(".", "/") for module in CORE}
    assert not gone, f"docs/design.md has lines for modules that do not exist: {sorted(gone)}; remove them"


def named() -> list[str]:
    """Return the functions and methods that the page names with their module."""
    names = re.findall(r"`(\w+(?:\.\w+)+)\(\)`", PAGE)
    return sorted({name for name in names if name.partition(".")[0] in BY_LAST_NAME})


@pytest.mark.parametrize("name", named())
def test_a_function_that_the_map_names_exists(name: str) -> None:
    module, *path = name.split(".")
    place: Any = importlib.import_module(f"ollama_async.{BY_LAST_NAME[module]}")
    for part in path:
        place = getattr(place, part, None)
        assert place is not None, f"docs/design.md names {name}(), but {BY_LAST_NAME[module]} has no such function"


def test_the_four_places_and_the_four_ways_name_functions() -> None:
    assert {
        "socket.GuardedSocket.shutdown",
        "exchange.Exchange._check_limits",
        "decoder.NdjsonDecoder.decode",
        "call.Call.retry",
    } <= {*named()}
    for way in ("a chunk", "an abort", "a timeout", "a retry"):
        _, heading, rest = PAGE.partition(f"\n## The way of {way}\n")
        assert heading, f"docs/design.md has no section 'The way of {way}'"
        assert len(re.findall(r"^\d\. ", rest.partition("\n## ")[0], re.MULTILINE)) >= 4


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_first_line_of_a_module_says_what_it_is_for(path: Path) -> None:
    lines = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()
    where = path.relative_to(PACKAGE)
    assert lines, f"{where} has no docstring: begin it with one sentence that says what the module is for"
    assert lines[1:2] in ([], [""]), f"the first sentence of {where} goes on in its second line: make it shorter"
    assert lines[0].endswith("."), f"the docstring of {where} does not begin with a sentence: {lines[0]!r}"
    assert ". " not in lines[0], f"the docstring of {where} begins with more than one sentence: move the rest below"
