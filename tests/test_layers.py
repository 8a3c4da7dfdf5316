"""The structure: imports point one way, the public names are a list, nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ollama_async

PACKAGE = Path(ollama_async.__file__).parent

LAYERS = [
    ["_errors"],
    ["_retry", "_timeouts", "_types", "_ndjson", "_host", "_cancel"],
    ["_channel", "_options", "_progress", "_proxy", "_systemone"],
    ["_merge", "_input"],
    ["_tools"],
    ["_http"],
    ["_dial", "_upload", "_failures"],
    ["_transport", "_request"],
    ["_exchange"],
    ["_stream"],
    ["_session"],
    ["_files"],
    ["_manage"],
    ["_client"],
]


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


@pytest.mark.parametrize("module", [module for layer in LAYERS for module in layer])
def test_a_module_imports_only_from_the_layers_below(module: str) -> None:
    place = next(place for place, layer in enumerate(LAYERS) if module in layer)
    below = {name for layer in LAYERS[:place] for name in layer}
    assert imports(module) <= below


def test_each_module_of_the_core_has_its_layer() -> None:
    found = {path.stem for path in PACKAGE.glob("_*.py")} - {"__init__", "__main__"}
    assert found == {module for layer in LAYERS for module in layer}


def test_the_core_never_imports_a_leaf_or_an_optional_package() -> None:
    optional = {"typer", "rich", "pytest", "uvloop", "redis", "starlette", "httpx2"}
    for path in PACKAGE.glob("_*.py"):
        if path.stem == "__main__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.partition(".")[0] for name in names} & optional, path


def test_public_names_are_sorted_and_exist() -> None:
    assert ollama_async.__all__ == sorted(ollama_async.__all__)
    assert all(hasattr(ollama_async, name) for name in ollama_async.__all__)


def test_importing_touches_no_optional_package_and_makes_no_client() -> None:
    program = (
        "import sys, ssl; made = []; ssl.SSLContext.__init__ = lambda *a, **k: made.append(a)\n"
        # httpx tries to import what its own command needs.
        "import httpx; before = set(sys.modules)\n"
        "import ollama_async\n"
        "new = set(sys.modules) - before\n"
        "print([name for name in ('typer', 'rich', 'pytest', 'uvloop', 'numpy') if name in new], made)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[] []"
