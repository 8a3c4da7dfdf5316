"""A parameter of a call stands in three places: what is missing in one of them is said here."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from ollama_async import AsyncClient
from ollama_async._client import _ChatOptions, _GenerateOptions
from ollama_async._manage import _CreateFromOptions
from ollama_async._session import CallOptions
from ollama_async.testing import FakeOllama

OPTIONS = {"chat": _ChatOptions, "generate": _GenerateOptions, "create": _CreateFromOptions}
# They are in the signatures of the overloads, since they decide what a call returns, or come first.
NAMED = {
    "self",
    "model",
    "messages",
    "prompt",
    "suffix",
    "stream",
    "until",
    "call",
    "files",
    "adapters",
    "from_",
    "format",
}
METHODS = pytest.mark.parametrize("name", OPTIONS)
GIVEN: dict[str, Any] = {
    "context": [1],
    "format": "json",
    "images": ["aGk="],
    "info": {"a": 1},
    "keep_alive": 5,
    "logprobs": True,
    "options": {"seed": 1},
    "raw": True,
    "shift": True,
    "truncate": True,
    "debug_render_only": True,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "think": True,
    "top_logprobs": 2,
    "width": 8,
    "height": 8,
    "steps": 2,
}


# They say what is done, not what is asked: tests/call/test_context.py, test_preflight.py, test_hang.py.
NOT_SENT = {"on_truncation", "preflight", "recover"}


def parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(AsyncClient, name)).parameters) - NAMED


@METHODS
def test_a_parameter_is_in_the_typed_options_and_in_the_signature(name: str) -> None:
    typed = set(OPTIONS[name].__annotations__) - set(CallOptions.__annotations__)
    given = parameters(name)
    assert given <= typed, f"add to {OPTIONS[name].__name__}, for the overloads of {name}(): {sorted(given - typed)}"
    if name != "create":
        assert typed <= given, f"add to the signature of {name}(): {sorted(typed - given)}"


@METHODS
def test_a_parameter_is_described(name: str) -> None:
    text = inspect.getdoc(getattr(AsyncClient, name)) or ""
    missing = [parameter for parameter in sorted(parameters(name)) if f"{parameter}:" not in text]
    assert not missing, f"describe in the docstring of {name}(), under Args: {missing}"


@pytest.mark.parametrize("name", ["chat", "generate"])
async def test_a_parameter_is_sent(fake_ollama: FakeOllama, name: str) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        for parameter in sorted(parameters(name) - NOT_SENT):
            value = GIVEN.get(parameter, "x")
            await getattr(client, name)("fake", "hi", **{parameter: value})
            body = json.loads(fake_ollama.requests[-1].body)
            sent = {key.strip("_") for key in body}
            assert parameter in sent, f"{name}({parameter}=...) does not reach the request: pass it to encoded()"
