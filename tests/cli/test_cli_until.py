"""``--format``, ``--until`` and ``--max-seconds``: what is written, and that the server sees the client leave."""

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from cli.terminal import run, terminal

from ollama_async.testing import FakeOllama, Gate, Reply, Stall

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.fixture
def schema(tmp_path: Path) -> str:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


def test_generate_writes_the_object_whole_to_a_pipe(fake_ollama: FakeOllama, schema: str) -> None:
    fake_ollama.script("/api/generate", Reply.generate('\n{"na', 'me": "Peru"', "}", *[" \n"] * 1000, thinking=["{"]))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--format", schema)
    assert (result.exit_code, result.stdout, result.stderr) == (0, '{"name": "Peru"}\n', "")
    assert fake_ollama.requests[0].json()["format"] == SCHEMA
    assert fake_ollama.requests[0].connection.wait_left()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["Sure! ", "{}"], "the answer does not match JSON: the answer does not begin with JSON: 'Sure! '"),
        (['{"name": "Pe'], "the answer does not match JSON: the answer ends before its JSON is complete"),
        (["{} and", " more"], "the answer does not match JSON: text follows the JSON: 'and'"),
    ],
)
def test_generate_writes_nothing_that_is_not_the_whole_object(
    fake_ollama: FakeOllama, texts: list[str], said: str
) -> None:
    fake_ollama.script("/api/generate", Reply.generate(*texts))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--format", "json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: the server at {fake_ollama.url}: {said}")
    assert fake_ollama.requests[0].json()["format"] == "json"


def test_an_object_that_was_cut_for_its_length_says_so(fake_ollama: FakeOllama, schema: str) -> None:
    fake_ollama.script("/api/generate", Reply.generate('{"name": "Pe', done_reason="length"))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--format", schema)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the server cut it for its length: raise num_predict, or num_ctx" in result.stderr


def test_generate_shows_the_object_as_it_grows_on_a_terminal(fake_ollama: FakeOllama, schema: str) -> None:
    gate = Gate()
    first, last = ({"response": text, "done": False} for text in ('{"name": ', '"Peru"}'))
    fake_ollama.script("/api/generate", Reply([first, gate, last, Stall()]))
    with terminal("--host", fake_ollama.url, "generate", "fake", "Why?", "--format", schema) as shown:
        shown.until('{"name":')
        gate.open()
        shown.until('"Peru"}')
        assert fake_ollama.requests[0].connection.wait_left()
        assert shown.wait() == 0
        assert "ended" not in shown.output


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read it"), ("{", "it is not JSON"), ("[1]", "a schema is an object")],
)
def test_a_file_that_is_not_a_schema(fake_ollama: FakeOllama, tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--format", str(path), COLUMNS="400")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not fake_ollama.requests


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        (["--until", "chars=10"], "This answer", "max_chars(10)"),
        (["--until", "tokens=2"], "This answer", "max_tokens(2)"),
        (["--until", "match=f.k"], "This answer comes from a fake", "matches('f.k')"),
        (["--until", "sentence"], "This answer comes from a fake Ollama server.", "sentence_end()"),
        (
            ["--until", "chars=15 & sentence & match=a|b & c"],
            "This answer comes from a fake Ollama server.",
            "max_chars(15) & sentence_end() & matches('a|b & c')",
        ),
        (["--until", "repetition", "--until", "tokens=3", "--max-seconds", "90"], "This answer comes", "max_tokens(3)"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_until_ends_an_answer_and_keeps_it(
    fake_ollama: FakeOllama, command: str, options: list[str], text: str, reason: str
) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.001))
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    given = ["Why?"] if command == "generate" else []
    result = run("--host", fake_ollama.url, command, "fake", *given, *options, stdin="Why?\n" if not given else None)
    assert (result.exit_code, result.stdout) == (0, f"{text}\n")
    assert result.stderr.replace("\n", " ").replace(">>> ", "").startswith(f"ended by {reason} after ")
    assert fake_ollama.requests[-1].connection.wait_left()


def test_max_seconds_ends_an_answer_that_has_stalled(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply([{"response": "Half", "done": False}, Stall()]))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--max-seconds", "0.05", "--json")
    assert result.exit_code == 0
    ended = json.loads(result.stdout.splitlines()[-1])
    assert (ended["outcome"], ended["reason"], ended["text"]) == ("until", "max_seconds(0.05)", "Half")
    assert fake_ollama.requests[0].connection.wait_left()


@pytest.mark.parametrize(
    "given", ["", "chars", "chars=0", "chars=-5", "tokens=x", "words=5", "sentence &", "match=(", "chars=5 match=x"]
)
def test_an_invalid_condition_is_refused(fake_ollama: FakeOllama, given: str) -> None:
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--until", given, COLUMNS="400")
    assert result.exit_code == 2
    assert "match=REGEX" in result.stderr or "give a valid regular expression" in result.stderr
    assert not fake_ollama.requests
