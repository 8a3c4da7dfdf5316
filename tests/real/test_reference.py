"""docs/reference.md against the server's source and against this package: whatever is missing on a side shows."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from real.needs import needs
from real.ollama_server import find_source

import ollama_async
from ollama_async import AsyncClient, Message, Tool, ToolCall

pytestmark = pytest.mark.real

PAGE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text("utf-8")
NEWER = "newer than 0.24"
# They stand inside of others and have no name of their own here.
INNER: dict[str, type[BaseModel]] = {
    "ToolCall.Function": ToolCall.Function,
    "Tool.Function": Tool.Function,
    "Tool.Function.Parameters": Tool.Function.Parameters,
    "Tool.Function.Parameters.Property": Tool.Function.Parameters.Property,
}
# What a method takes beside the fields of its request.
OURS = {"on_truncation", "preflight", "recover", "self", "call", "until", "resume"}

Row = tuple[str, str, str]


def table(text: str) -> list[Row]:
    """The rows of the first table in a text."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]
    return [(row[0].strip("`"), row[1].strip("`"), row[-1]) for row in cells[2:]]


def section(title: str) -> str:
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


TABLES = {
    match[1]: (match[2], table(match[3]))
    for match in re.finditer(r"^### (\w+): `([\w.]+(?:\(\))?)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
}


@pytest.fixture(scope="module")
def source() -> Path:
    folder = find_source()
    if folder is None:
        needs("the source of the Ollama server", how="run .ci/install-ollama (it needs Go)")
    return folder


@pytest.fixture(scope="module")
def structures(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Of each structure with fields on the wire: their names and types, also those of the structures it embeds."""
    text = (source / "types.go").read_text("utf-8")
    bodies = dict(re.findall(r"^type (\w+) struct \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def fields(name: str) -> list[tuple[str, str]]:
        found = []
        for line in bodies[name].splitlines():
            if embedded := re.fullmatch(r"\t(\w+)", line):
                found += fields(embedded[1])
            elif match := re.match(r"\t(\w+)\s+(.*?)\s*`json:\"([^\",]+)", line):
                found.append((match[3], match[2] or match[1]))
        return [field for field in found if field[0] != "-"]

    return {name: fields(name) for name in bodies}


def test_every_structure_has_a_table_or_a_reason(structures: dict[str, list[tuple[str, str]]]) -> None:
    explained = {name for name, _, reason in table(section("Structures without a table")) if reason}
    assert len(structures) > 40
    assert set(TABLES).isdisjoint(explained)
    assert set(TABLES) | explained == set(structures)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_field_of_the_server(name: str, structures: dict[str, list[tuple[str, str]]]) -> None:
    rows = TABLES[name][1]
    assert [(field, kind) for field, kind, _ in rows if kind != NEWER] == structures[name]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_name_of_ours(name: str) -> None:
    ours, rows = TABLES[name]
    if ours.endswith("()"):
        parameters = set(inspect.signature(getattr(AsyncClient, ours[:-2])).parameters) - OURS
        sent = {here: field for field, _, here in rows if not here.startswith("not sent: ")}
        assert set(sent) == {f"`{parameter}=`" for parameter in parameters}
    else:
        model = INNER.get(ours) or getattr(ollama_async, ours)
        names = {f"`{attribute}`": field.alias or attribute for attribute, field in model.model_fields.items()}
        assert {here: field for field, _, here in rows if here != "kept as an extra field"} == names
        assert model.model_config["extra"] == "allow"


def test_an_extra_field_is_kept() -> None:
    given = {"type": "object", "anyOf": [{"type": "string"}], "required": ["a"]}
    assert Tool.Function.Parameters.Property.model_validate(given).model_dump(exclude_none=True) == given
    assert Message.model_validate({"role": "user", "new": 1}).model_dump(exclude_none=True) == {
        "role": "user",
        "new": 1,
    }


def test_every_route_has_a_method_or_a_reason(source: Path) -> None:
    text = (source / "routes.go").read_text("utf-8")
    routes = {f"{method} {path}" for method, path in re.findall(r'\tr\.([A-Z]+)\("([^"]+)"', text)}
    assert len(routes) > 30
    told = {row[0]: row[1] for row in table(section("Routes"))}
    assert set(told) == {route for route in routes if " /v1/" not in route}
    for methods in told.values():
        for method in re.findall(r"(\w+)\(", methods):
            assert callable(getattr(AsyncClient, method))
        assert "()" in methods or "(via_server=True)" in methods or methods.startswith("none: ")
