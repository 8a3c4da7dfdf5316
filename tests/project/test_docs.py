"""The documentation: its programs and the examples run, and what it names exists.

Each Python block and each example is run in a process of its own against a fake server, with warnings as errors. What a
comment ``# prints: text`` says has to be in the output. CONTRIBUTING.md tells how a block says what it needs.
"""

import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from frameworks.conformance import answer_without_end
from snippets import PAGES, blocks, check_block, run

from ollama_async.testing import Cut, FakeOllama, Reply, Stall

ROOT = Path(__file__).parents[2]

WEATHER = {"name": "weather", "arguments": {"city": "Lima"}}
TOO_LONG = Reply.error(400, "the input length exceeds the context length")
PART = {"status": "pulling 00", "digest": "sha256:00", "total": 500}
SUCCESS = {"status": "success"}
SILENT = Reply(before_head=[Stall()])


CITIES = (
    *('{"na', 'me": "Pe', 'ru", "cities": [{"name": "Li', 'ma", "people": 10092000}, ', '{"name": "Cus'),
    *('co", "people": 428450}', "]}"),
)


def answer(content: str, **message: object) -> dict[str, object]:
    return {"model": "llama3.2", "message": {"role": "assistant", "content": content, **message}, "done": True}


SERVERS: dict[str, Callable[[FakeOllama], object]] = {
    "endless": lambda server: server.script("/api/chat", Reply.endless_chat(0.01), always=True),
    "silent": lambda server: server.script("/api/chat", SILENT, always=True),
    "truncated": lambda server: server.script("/api/chat", Reply.chat("Because", done=False), always=True),
    "country": lambda server: server.script("/api/chat", Reply.json(answer('{"name": "Peru", "capital": "Lima"}'))),
    "tool": lambda server: server.script(
        "/api/chat", Reply.json(answer("", tool_calls=[{"id": "call_1", "function": WEATHER}]))
    ),
    "pull": lambda server: server.script(
        "/api/pull", Reply([PART, Cut()]), Reply([{**PART, "completed": 500}, {"status": "success"}])
    ),
    "missing": lambda server: (
        server.script("/api/generate", Reply.error(404, "model 'llama3.2' not found")),
        server.script("/api/pull", Reply([{**PART, "completed": 250}, {**PART, "completed": 500}, SUCCESS])),
    ),
    "hung": lambda server: server.script("/api/chat", SILENT, SILENT, Reply.chat("Because.")),
    "too long": lambda server: server.script("/api/chat", TOO_LONG, TOO_LONG, Reply.chat("Because.")),
    "cut": lambda server: server.script(
        "/api/chat", Reply.chat("Once", "upon", done_reason="length"), Reply.chat(done_reason="load")
    ),
    "cities": lambda server: server.script("/api/chat", Reply.chat(*CITIES, *[" "] * 100), always=True),
    "prose": lambda server: server.script("/api/chat", Reply.chat("Sure! ", "Here it is: {}")),
    "race": lambda server: server.script("/api/chat", Reply.chat("Because."), Reply.endless_chat(0.01)),
}
EXAMPLES = {
    "await_answer": ([], "This answer comes from a fake Ollama server"),
    "stream_answer": ([], "[done: 41 chunks in "),
    "abort": (["endless"], "[the user pressed Stop; kept "),
    "timeout": (["endless"], "[time is up; kept "),
    "race": (["race"], " won: Because."),
}
# Those that do not simply run to their end.
IN_TEST_EXAMPLES = {"fastapi_stop.py", "notebook.ipynb", "queue_docket.py", "saved_answers.py", "supervisor.py"}


@pytest.mark.parametrize(
    ("needs", "language", "code"),
    [pytest.param(needs, language, code, id=f"{page.name}:{line}") for page, line, needs, language, code in blocks()],
)
def test_block(needs: str | None, language: str, code: str, tmp_path: Path) -> None:
    assert language in {"python", "sh", "text", "nginx", "haproxy", "yaml", "js", "javascript"}
    if language != "python":
        return
    kind, _, which = (needs or "").partition(": ")
    if kind != "pytest":
        prepare: Callable[[FakeOllama], object] = FakeOllama.forget
        if kind == "needs":
            pytest.importorskip(which)
            prepare = answer_without_end
        elif kind:
            assert kind == "server"
            prepare = SERVERS[which]
        check_block(code, tmp_path, prepare=prepare)
        return
    with FakeOllama(models=["llama3.2"], interval=0.01) as server:
        (tmp_path / "test_block.py").write_text(code, "utf-8")
        # The plugin by its module, as in tests/conftest.py: the installed package may be another one.
        plugins = ["-p", "no:ollama_async", "-p", "ollama_async.testing.pytest_plugin"]
        options = ["-q", "-o", "asyncio_default_fixture_loop_scope=function", *plugins]
        output = run("-m", "pytest", *options, "test_block.py", cwd=tmp_path, host=server.url)
    assert (which or f"{code.count('def test_')} passed") in output


def test_each_example_is_run_by_a_test() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.*")} == {
        f"{name}.py" for name in EXAMPLES
    } | IN_TEST_EXAMPLES
    tests = Path(__file__).with_name("test_examples.py").read_text("utf-8")
    tests += (ROOT / "tests" / "programs.py").read_text("utf-8")
    tests += (ROOT / "tests" / "queues" / "test_queues.py").read_text("utf-8")
    assert all(Path(name).stem in tests for name in IN_TEST_EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    needs, expected = EXAMPLES[name]
    with FakeOllama(models=["llama3.2", "qwen3"], interval=0.01) as server:
        for which in needs:
            SERVERS[which](server)
        assert expected in run(str(ROOT / "examples" / f"{name}.py"), cwd=tmp_path, host=server.url)
        for request in server.requests:
            assert request.connection.wait_left()


def test_the_loser_of_the_race_is_aborted(tmp_path: Path) -> None:
    with FakeOllama(models=["a", "b"]) as server:
        SERVERS["race"](server)
        output = run(str(ROOT / "examples" / "race.py"), "a", "b", cwd=tmp_path, host=server.url)
        first, second = [request.json()["model"] for request in server.requests]
    assert output.startswith(f"{second} lost: {first} was faster; it had written ")


def test_what_the_documentation_names_exists() -> None:
    names = set(re.findall(r"def (test_\w+)", "".join(file.read_text("utf-8") for file in ROOT.glob("tests/**/*.py"))))
    for page in PAGES:
        text = page.read_text("utf-8")
        for name in re.findall(r"`(test_\w+?)`", text):
            assert name in names, f"{page.name}: {name}"
        for path in re.findall(r"`((?:tests|docs|examples|ollama_async)/[\w/.-]*)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


# What no other client has, and the page that compares it with what they have.
COMPARED = ("agent", "structured", "until", "context", "continue", "readiness", "hung-model", "record", "conversation")
OTHERS = ("ollama-python", "ollama-js", "openai-python", "pydantic-ai", "instructor", "OllamaSharp", "ollama-rs")


@pytest.mark.parametrize("page", [*COMPARED, "cli"])
def test_a_comparison_has_all_other_clients(page: str) -> None:
    _, _, compared = (ROOT / "docs" / f"{page}.md").read_text("utf-8").partition("\n## Other clients\n")
    rows = " ".join(line.split("|")[1] for line in compared.splitlines() if line.startswith("|"))
    assert [name for name in OTHERS if name not in rows] == []


def test_each_scenario_of_the_contract_has_a_test() -> None:
    tested = {
        int(number)
        for file in ROOT.glob("tests/**/*.py")
        for number in re.findall(r"def test_s(\d+)_", file.read_text("utf-8"))
    }
    named: set[int] = set()
    for first, last in re.findall(r"\bS(\d+)(?: to S(\d+))?", (ROOT / "docs" / "contract.md").read_text("utf-8")):
        named |= set(range(int(first), int(last or first) + 1))
    assert named - tested == set()
    assert len(named) > 40


def test_links_lead_somewhere() -> None:
    links = runpy.run_path(str(ROOT / "docs" / "links.py"))
    assert {*PAGES} - {*ROOT.glob("docs/top-*.md")} <= {*links["pages"]()}
    for page in links["pages"]():
        assert links["broken"](page, links["without_code"](page.read_text("utf-8"))) == [], page.name


def test_a_link_that_leads_nowhere_is_found() -> None:
    links, page = runpy.run_path(str(ROOT / "docs" / "links.py")), ROOT / "README.md"
    text = '[a](docs/start.md) [b](docs/start.md#first-stop) <img src="docs/no.png"> [c](#nowhere)\n'
    text += "[d](../d) [e](docs/e.md) `[f](docs/f.md)`"
    found = [(line, link) for line, link, _ in links["broken"](page, links["without_code"](text))]
    assert found == [(1, "docs/no.png"), (1, "#nowhere"), (2, "../d"), (2, "docs/e.md")]


def test_each_error_of_httpx_is_in_the_table_of_the_migration() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text("utf-8")
    named = set(re.findall(r"`httpx\.(\w+)`", page.partition("## Errors of httpx")[2].partition("\n## ")[0]))
    errors = {name for name, value in vars(httpx).items() if isinstance(value, type) and issubclass(value, Exception)}
    # Not in the table: classes above the named ones, and errors of httpx's own bodies and cookies.
    above = {"RequestError", "ProtocolError", "NetworkError", "TimeoutException", "StreamError"}
    misuse = {"StreamConsumed", "StreamClosed", "ResponseNotRead", "RequestNotRead", "CookieConflict"}
    assert named == errors - above - misuse


def test_no_page_has_the_marks_of_a_merge() -> None:
    marked = [page.name for page in PAGES if re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text(), re.MULTILINE)]
    assert marked == []


def test_the_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r'"(?:ollama-async|\.)\[([\w,]+)\]"', page.read_text("utf-8")):
            assert set(named.split(",")) <= set(extras), f"{page.name}: {named}"
