"""A pytest plugin: whoever imports ollama gets ollama_async, so that ollama-python's own tests run against it.

Kept is what concerns ``AsyncClient``, ``convert_function_to_tool`` and ``Image``; there is no ``Client`` that blocks,
and requests are no classes.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import ollama_async
from ollama_async import _errors

# How many tests of AsyncClient, of functions as tools and of images the release that noxfile.py names has, by a part of
# their names.
TESTS = {"async": 31, "test_utils": 10, "test_image": 10}
# A text that is neither base64 nor a file goes to the server there, which refuses it; here it is refused at once.
# docs/migrating.md says so.
DIFFERENT = "test_image_serialization_plain_string"


class NoClient:
    """Stands for the client that blocks, which this library does not have."""


def _alias(name: str, **names: object) -> None:
    module = ModuleType(name)
    module.__dict__.update({name: getattr(ollama_async, name) for name in ollama_async.__all__}, Client=NoClient)
    module.__dict__.update(names)
    sys.modules[name] = module


_alias("ollama", systemone=None)
_alias("ollama._client", CONNECTION_ERROR_MESSAGE=_errors.CONNECTION_ERROR_MESSAGE, _copy_tools=None)
_alias("ollama._types", ChatRequest=None, CreateRequest=None, GenerateRequest=None)
_alias("ollama._utils")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of what we have."""
    kept = {kind: [item for item in items if kind in item.nodeid.lower()] for kind in TESTS}
    if found := {kind: len(items) for kind, items in kept.items() if len(items) != TESTS[kind]}:
        raise pytest.UsageError(f"ollama-python was said to have other numbers of tests, {TESTS}; it has {found}")
    ours = [item for group in kept.values() for item in group if item.name != DIFFERENT]
    chosen = [item for item in items if item in ours]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
