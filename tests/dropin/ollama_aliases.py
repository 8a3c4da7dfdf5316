"""A pytest plugin: whoever imports ollama gets ollama_async, so that ollama-python's own tests run against it.

Only what concerns ``AsyncClient`` is kept; there is no ``Client`` that blocks.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import ollama_async
from ollama_async import _errors

# How many tests of AsyncClient the release of ollama-python that noxfile.py names has.
TESTS = 31


class NoClient:
    """Stands for the client that blocks, which this library does not have."""


def _alias(name: str, **names: object) -> None:
    module = ModuleType(name)
    module.__dict__.update({name: getattr(ollama_async, name) for name in ollama_async.__all__}, Client=NoClient)
    module.__dict__.update(names)
    sys.modules[name] = module


_alias("ollama", systemone=None)
_alias("ollama._client", CONNECTION_ERROR_MESSAGE=_errors.CONNECTION_ERROR_MESSAGE, _copy_tools=None)
_alias("ollama._types")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of ``AsyncClient``."""
    kept = [item for item in items if "async" in item.nodeid.lower()]
    if len(kept) != TESTS:
        raise pytest.UsageError(f"ollama-python was said to have {TESTS} tests of AsyncClient, and has {len(kept)}")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
