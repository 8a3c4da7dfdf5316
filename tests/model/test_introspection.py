"""Tools that read annotations at run time (documentation, dependency injection, agents) can read all of ours."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

PARTS = ("agent", "asgi", "batch", "conversation", "durable", "pool", "registry", "testing")


def public() -> Iterator[Any]:
    """Every public class, function, and public method of a public class of ours."""
    for name in ("ollama_async", *(f"ollama_async.{part}" for part in PARTS)):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(f"{name} needs {error.name}"))
            continue
        for public_name in module.__all__:
            found = getattr(module, public_name)
            if not (inspect.isclass(found) or inspect.isfunction(found)):
                continue
            yield pytest.param(found, id=f"{name}.{public_name}")
            if not inspect.isclass(found):
                continue
            for method_name, method in inspect.getmembers(found, inspect.isroutine):
                ours = (getattr(method, "__module__", None) or "").startswith("ollama_async")
                if ours and (not method_name.startswith("_") or method_name == "__init__"):
                    yield pytest.param(method, id=f"{name}.{public_name}.{method_name}")


@pytest.mark.parametrize("found", [*public()])
def test_annotations_can_be_read_at_run_time(found: Any) -> None:
    typing.get_type_hints(found)
    if not inspect.isclass(found):
        inspect.signature(found, eval_str=True)
