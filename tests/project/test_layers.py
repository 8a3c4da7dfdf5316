"""The structure: imports point one way, the public names are a list, nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ollama_async

PACKAGE = Path(ollama_async.__file__).parent

# Each module of the core imports only from the floors below its own.
FLOORS = [
    ["_errors", "_extras", "_loops", "_secret"],
    ["_cancel", "_host", "_regular"],
    ["_group", "_wire.family", "_wire.outcome"],
    ["_wire.http1", "_wire.phase", "_wire.socket", "_wire.tasks", "_wire.tls"],
    ["_wire.intercept", "_wire.parser", "_wire.guard", "_wire.proxy"],
    ["_wire.link", "_wire.unpack"],
    ["_wire.release"],
    ["_wire.reader"],
    ["_wire.connection", "_wire.logged", "_wire.response", "_wire.watch"],
    ["_wire.dial", "_wire.upload"],
    ["_wire.pool"],
    ["_wire.transport"],
    ["_wire.routes"],
    ["_call.asked", "_call.hold", "_call.sender"],
    [
        "_call.awaitable",
        "_call.chunk",
        "_call.condition",
        "_call.jsontext",
        "_call.ndjson",
        "_call.observe",
        "_call.request",
        "_call.retry",
        "_call.shape",
        "_call.timeouts",
    ],
    ["_call.failures", "_call.partial"],
    ["_call.decoder", "_call.foreign", "_call.objects"],
    ["_call.exchange"],
    ["_call.answer", "_call.body"],
    ["_call.call"],
    ["_call.chunk_reader", "_call.staged"],
    ["_call.iterators"],
    ["_call.stream"],
    ["_model.types"],
    ["_model.manage_types", "_model.options", "_model.progress", "_model.systemone"],
    ["_model.input", "_model.merge"],
    ["_model.tools"],
    ["_session"],
    ["_files"],
    ["_manage"],
    ["_context", "_continue", "_hang", "_loaded", "_preflight"],
    ["_client"],
]
CORE = {module for floor in FLOORS for module in floor}


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, named as in ``FLOORS``."""
    folder = ".".join(path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 1:
            found.add(f"{folder}.{node.module}" if folder else node.module)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ollama_async."):
            found.add(node.module.removeprefix("ollama_async."))
    # What stands in the folder itself imports nothing.
    return found - {"_wire", "_call", "_model"}


@pytest.mark.parametrize("module", sorted(CORE))
def test_a_module_imports_only_from_the_floors_below(module: str) -> None:
    place = next(place for place, floor in enumerate(FLOORS) if module in floor)
    below = {name for floor in FLOORS[:place] for name in floor}
    assert imports(file_of(module)) <= below


def core_files() -> list[Path]:
    paths = [
        *PACKAGE.glob("_*.py"),
        *(path for folder in ("_wire", "_call", "_model") for path in (PACKAGE / folder).glob("*.py")),
    ]
    return [path for path in paths if path.stem not in ("__init__", "__main__")]


def test_each_module_of_the_core_has_its_floor() -> None:
    assert {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in core_files()} == CORE


@pytest.mark.parametrize("module", sorted(CORE))
def test_a_module_of_the_core_is_short_enough_to_be_read(module: str) -> None:
    if module.startswith(("_wire.", "_call.", "_cancel")):
        assert file_of(module).read_text().count("\n") < 450, module


def test_the_core_never_imports_a_leaf_or_an_optional_package() -> None:
    optional = {"typer", "rich", "prompt_toolkit", "markdown_it", "pytest", "uvloop", "redis", "starlette", "fastapi"}
    optional |= {"uvicorn", "httpx2", "ollama", "opentelemetry", "pyarrow", "ray"}
    for path in core_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.partition(".")[0] for name in names} & optional, path


# What each leaf may import of the library, besides the core's modules.
LEAVES = {
    "agent": {"pool"},
    "asgi": {"durable", "registry"},
    "batch": {"pool"},
    "conversation": {"pool"},
    "durable": {"registry"},
    "interop": set[str](),
    "pool": set[str](),
    "ray": {"pool"},
    "registry": set[str](),
    "telemetry": set[str](),
    "until": set[str](),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_the_core_and_what_it_is_built_on(leaf: str) -> None:
    files = [PACKAGE / f"{leaf}.py"] if (PACKAGE / f"{leaf}.py").exists() else [*(PACKAGE / leaf).glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            module = (isinstance(node, ast.ImportFrom) and node.module) or ""
            inside = file.parent != PACKAGE and isinstance(node, ast.ImportFrom) and node.level == 1
            version = isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["__version__"]
            if not (inside or version) and (module.startswith("ollama_async") or getattr(node, "level", 0)):
                name = module.removeprefix("ollama_async.")
                assert name in CORE or name.partition(".")[0] in LEAVES[leaf], (file, module)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_needs_only_its_own_extra(leaf: str) -> None:
    program = (
        f"import sys; sys.modules['redis'] = sys.modules['uvicorn'] = sys.modules['pyarrow'] = None\n"
        f"import ollama_async.{leaf} as leaf\n"
        "from ollama_async.registry import AbortRegistry; AbortRegistry.from_url('memory://')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_public_names_are_sorted_and_exist() -> None:
    assert ollama_async.__all__ == sorted(ollama_async.__all__)
    assert all(hasattr(ollama_async, name) for name in ollama_async.__all__)


def test_what_is_not_asked_for_is_not_imported() -> None:
    program = (
        "import sys; import importlib, typing; before = set(sys.modules)\n"
        "import ollama_async\n"
        "print(sorted(set(sys.modules) - before))\n"
        "ollama_async.CancelToken\n"
        "print('AsyncClient' in vars(ollama_async), 'ollama_async._model.manage_types' in sys.modules)\n"
        "from ollama_async import *\n"
        "print(all(name in globals() for name in ollama_async.__all__))\n"
        "try:\n    ollama_async.AsyncCleint\nexcept AttributeError as exc:\n    print(exc)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.splitlines() == [
        "['ollama_async']",
        "True False",
        "True",
        "module 'ollama_async' has no attribute 'AsyncCleint'",
    ]


def test_threads_may_ask_for_the_first_names_at_once() -> None:
    program = """if True:
        import sys, threading, ollama_async
        sys.setswitchinterval(1e-6)
        names, got, begin = ollama_async.__all__, [], threading.Barrier(8)

        def ask(first):
            begin.wait(30)
            got.append([getattr(ollama_async, name) for name in names[first:] + names[:first]])

        threads = [threading.Thread(target=ask, args=(9 * turn,), daemon=True) for turn in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        print([len(each) == len(names) for each in got] == [True] * 8)
    """
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "True"


def test_importing_touches_no_optional_package_and_makes_no_client() -> None:
    program = (
        "import sys, ssl; made = []; ssl.SSLContext.__init__ = lambda *a, **k: made.append(a)\n"
        # httpx tries to import what its own command needs.
        "import httpx; before = set(sys.modules)\n"
        "import ollama_async; [getattr(ollama_async, name) for name in ollama_async.__all__]\n"
        "new = set(sys.modules) - before\n"
        "optional = ('typer', 'rich', 'prompt_toolkit', 'pytest', 'uvloop', 'numpy', 'redis', 'starlette', 'uvicorn')\n"
        "print([name for name in optional if name in new], made)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[] []"
