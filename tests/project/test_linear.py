"""No regular expression, and nothing else that reads what others send, takes more than linear time."""

from __future__ import annotations

import ast
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import ollama_async
from ollama_async import AsyncClient, RequestError, ResponseError
from ollama_async._model.input import encoded
from ollama_async._model.tools import _split_legacy
from ollama_async.testing import FakeOllama, Reply

PACKAGE = Path(ollama_async.__file__).parent
# A quadratic pattern needs seconds for so many characters, a linear one needs milliseconds.
LENGTH = 20_000
BOUND = 0.5


# The pattern that a user gives to `matches()`.
THE_USERS = ("until", "re.compile(pattern)")


def processor_seconds(work: Callable[[], object]) -> float:
    """The processor's time that this thread spends: a busy machine does not change it much."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def patterns() -> Iterator[tuple[str, str | bytes, str]]:
    """Each regular expression of the package: its module, itself, and what it is used for (search, match ...)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        assert "from re import" not in text, path
        if "import re\n" not in text:
            continue  # each process that collects tests would parse the whole package
        nodes = list(ast.walk(ast.parse(text)))
        calls = [node for node in nodes if isinstance(node, ast.Call) and (path.stem, ast.unparse(node)) != THE_USERS]
        named: dict[str, str | bytes] = {}
        for node in nodes:
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.value).startswith("re.compile(")
                and (path.stem, ast.unparse(node.value)) != THE_USERS
            ):
                named[ast.unparse(node.targets[0])] = pattern_of(cast("ast.Call", node.value))
        for node in calls:
            owner, _, use = ast.unparse(node.func).rpartition(".")
            if owner == "re" and use != "compile":
                yield path.stem, pattern_of(node), use
            elif owner in named:
                yield path.stem, named[owner], use
        assert len(named) == sum(ast.unparse(node.func) == "re.compile" for node in calls), path


def pattern_of(call: ast.Call) -> str | bytes:
    given = call.args[0]
    assert isinstance(given, ast.Constant), f"this test cannot read {ast.unparse(call)}"
    return cast("str | bytes", given.value)


def hostile(pattern: str) -> Iterator[str]:
    """Long texts out of what the pattern has in it, each piece and pair of pieces many times, that do not fit."""
    pieces = sorted({*re.findall(r"[a-z0-9]+|[^\w\s\\]", pattern, re.IGNORECASE), "1", "a", " ", "\n", "\x00"})
    for first, second in itertools.product(pieces, repeat=2):
        unit = first if first == second else first + second
        yield unit * (LENGTH // len(unit)) + "\x01"


FOUND = sorted(set(patterns()), key=str)


@pytest.mark.parametrize(
    ("module", "pattern", "use"), FOUND, ids=[f"{module}-{use}-{n}" for n, (module, _, use) in enumerate(FOUND)]
)
def test_no_pattern_is_quadratic(module: str, pattern: str | bytes, use: str) -> None:
    known = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    compiled = re.compile(known, re.IGNORECASE)
    for text in hostile(known):
        seconds = processor_seconds(lambda text=text: use_it(compiled, use, text))  # type: ignore[misc]
        assert seconds < BOUND, (pattern, text[:20])


def use_it(compiled: re.Pattern[str], use: str, text: str) -> None:
    if use == "sub":
        compiled.sub("", text)
    else:
        assert use in ("search", "match", "fullmatch", "split", "finditer", "findall"), use
        getattr(compiled, use)(text)


@pytest.mark.parametrize("keep_alive", ["1" * LENGTH, "1." * LENGTH, "1h" * LENGTH + "x", "." * LENGTH])
def test_a_long_duration_is_refused_in_linear_time(keep_alive: str) -> None:
    def refused() -> None:
        with pytest.raises(RequestError):
            encoded(("keep_alive", keep_alive))

    assert processor_seconds(refused) < BOUND


@pytest.mark.parametrize("line", ["(" * LENGTH + ":", "a(" * LENGTH + ":", "():" * LENGTH, ":" * LENGTH])
def test_a_long_line_of_a_docstring(line: str) -> None:
    assert processor_seconds(lambda: _split_legacy(line)) < BOUND


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"<title>" * 9300, "(HTML page without a title)"),
        (b"<" + b"<title" * 10800, "(HTML page without a title)"),
        (b"<title>" + b"<" * 65000, "(HTML page without a title)"),
        (b"<p>" * 21000 + b"<TITLE lang=en> Bad &amp; Gateway </TITLE>", "(HTML) Bad & Gateway"),
        (b"<title>" + b" " * 65000 + b"</title>", "(HTML) "),
        # A reference to a character that no int can be made of.
        (b"<title>&#" + b"9" * 60000 + b";</title>", "(HTML) "),
        (b"<title>" + b"&" * 60000 + b"</title>", "(HTML) &&&"),
        (b"<title>" * 5000 + b"</title>" * 3000, "(HTML) <title><title>"),
    ],
)
async def test_an_error_page_is_read_in_linear_time(fake_ollama: FakeOllama, page: bytes, said: str) -> None:
    fake_ollama.script("/api/version", Reply([page], status=500))
    async with AsyncClient(fake_ollama.url) as client:
        began = time.thread_time()
        with pytest.raises(ResponseError) as caught:
            await client.version()
        assert time.thread_time() - began < BOUND
    assert caught.value.error.startswith(said)
    assert len(caught.value.error) < 600
