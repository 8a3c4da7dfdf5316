"""The recipes of docs/queue.md as modules: what the page says is what the workers run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "queue.md"
EXAMPLE = ROOT / "examples" / "queue_docket.py"
LEASE = 1.0

# What a program has around a recipe.
_HEAD = """
import asyncio
import os
from datetime import timedelta
from typing import Any
"""
_CONNECTIONS = """
from ollama_async import AsyncClient, OllamaError
from ollama_async.durable import AnswerInUse, DurableAnswers
from ollama_async.registry import AbortRegistry

REDIS = os.environ["REDIS_URL"]
MODEL = "fake"
DAY = 86_400.0
"""
_TEMPORAL = """
from temporalio import activity, workflow
from temporalio.common import RetryPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from ollama_async import OllamaError
    from connections import MODEL, client, registry
"""
# Times that a test does not wait for, and a queue that only one test has.
_SHORTER = {
    "The job": {"keep=DAY)": f"keep=DAY, lease={LEASE})"},
    "Temporal": {"heartbeat_timeout=timedelta(seconds=10)": "heartbeat_timeout=timedelta(seconds=3)"},
}


def block(heading: str) -> str:
    """Return the first block of a section of the page."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert section, heading
    code = re.search(r"^```text\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert code, heading
    return code[1]


def functions(source: str) -> dict[str, str]:
    """Return the functions of a module, each without what is not code."""
    found = [node for node in ast.parse(source).body if isinstance(node, (ast.AsyncFunctionDef, ast.FunctionDef))]
    return {node.name: ast.unparse(node) for node in found}


def shorter(heading: str) -> str:
    code = block(heading)
    for long, short in _SHORTER.get(heading, {}).items():
        assert code.count(long) == 1, long
        code = code.replace(long, short)
    return code


def modules(engine: str, queue: str) -> dict[str, str]:
    """Return the modules of an engine's worker by their names; `queue` is the name of Temporal's queue."""
    job = _HEAD + _CONNECTIONS + shorter("The job")
    if engine == "temporal":
        recipe = shorter("Temporal").replace('task_queue="answers"', f'task_queue="{queue}"')
        return {"connections": job, "recipe": _HEAD + _TEMPORAL + recipe}
    imports = "from procrastinate import App, PsycopgConnector\n" if engine == "procrastinate" else ""
    title = {"saq": "SAQ", "procrastinate": "Procrastinate"}[engine]
    return {"recipe": imports + job + shorter(title)}


def write(engine: str, folder: Path, queue: str) -> None:
    """Write the modules into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in modules(engine, queue).items():
        (folder / f"{name}.py").write_text(source, "utf-8")
