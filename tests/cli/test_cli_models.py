"""The commands that manage models: what they write, what they return, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from cli.terminal import DEADLINE, Terminal, environment, run

from ollama_async.cli._models import _processor, _span, _until, _when
from ollama_async.testing import Cut, FakeOllama, Gate, Reply

SUCCESS = {"status": "success"}


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama(models=["llama3.2"], interval=0.001) as made:
        yield made


def part(completed: int) -> dict[str, Any]:
    return {"status": "pulling 00", "digest": "sha256:00", "total": 2000, "completed": completed}


LISTED = {
    "name": "llama3.2:latest",
    "digest": "sha256:0123456789abcdef",
    "size": 2_019_393_189,
    "modified_at": f"{datetime.now(UTC) - timedelta(days=3):%Y-%m-%dT%H:%M:%SZ}",
    "new_field": 1,
}
LOADED = {
    "name": "llama3.2:latest",
    "digest": "0123456789abcdef",
    "size": 100,
    "size_vram": 25,
    "context_length": 4096,
    "expires_at": "2318-01-01T00:00:00.123456Z",
}
SHOWN = {
    "details": {"family": "llama", "parameter_size": "3.2B", "quantization_level": "Q4_K_M"},
    "capabilities": ["completion", "tools"],
    "parameters": 'stop    "<|eot_id|>"',
    "model_info": {"general.architecture": "llama"},
    "tensors": [{"name": "output.weight", "type": "F32", "shape": [4, 2]}],
}


@pytest.mark.parametrize(
    ("arguments", "path", "answer", "words"),
    [
        (
            ["list"],
            "/api/tags",
            {"models": [LISTED]},
            ["NAME", "llama3.2:latest", "0123456789ab ", "2.0 GB", "3 days ago"],
        ),
        (["ps"], "/api/ps", {"models": [LOADED]}, ["PROCESSOR", "75%/25% CPU/GPU", "4096", "Forever"]),
        (["show", "m"], "/api/show", SHOWN, ["family", "llama", "parameter size", "3.2B", '["completion", "tools"]']),
        (["show", "m", "--verbose"], "/api/show", SHOWN, ["general.architecture", "F32 [4, 2]"]),
        (["load", "m", "--keep-alive", "-1"], "/api/generate", {"done": True}, ["m is loaded"]),
        (["unload", "m"], "/api/generate", {"done": True}, ["m is unloaded"]),
        (["cp", "a", "b"], "/api/copy", {}, ["a is b as well"]),
        (["rm", "m"], "/api/delete", {}, ["m is deleted"]),
    ],
)
def test_a_command_for_the_eye_and_for_scripts(
    server: FakeOllama, arguments: list[str], path: str, answer: dict[str, Any], words: list[str]
) -> None:
    server.script(path, Reply.json(answer), always=True)
    shown = run("--host", server.url, *arguments)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for word in words:
        assert word in shown.stdout
    assert "\x1b" not in shown.stdout
    for_scripts = run("--host", server.url, *arguments, "--json")
    assert (for_scripts.exit_code, for_scripts.stderr) == (0, "")
    expected = answer or {"status": "success"}
    assert json.loads(for_scripts.stdout).items() >= expected.items()


def test_what_is_asked_of_the_server(server: FakeOllama) -> None:
    server.script("/api/generate", Reply.json({"done": True}), always=True)
    run("--host", server.url, "load", "m", "--keep-alive", "10m")
    run("--host", server.url, "load", "m", "--keep-alive", "90")
    assert [request.json().get("keep_alive") for request in server.requests] == ["10m", 90.0]
    wrong = run("--host", server.url, "load", "m", "--keep-alive", "soon")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "keep_alive='soon'" in wrong.stderr


def test_version(server: FakeOllama) -> None:
    server.script("/api/version", Reply.json({"version": "1.2.3"}), always=True)
    assert "Ollama 1.2.3 at http" in run("--host", server.url, "version").stdout
    assert json.loads(run("--host", server.url, "version", "--json").stdout)["version"] == "1.2.3"
    nobody = run("version")
    assert nobody.exit_code == 1
    assert "no Ollama server at http://127.0.0.1:1" in nobody.stderr


def test_errors(server: FakeOllama) -> None:
    missing = run("--host", server.url, "show", "absent")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "no model 'absent': 'ollama-async list' shows what it has" in " ".join(missing.stderr.split())
    as_json = run("--host", server.url, "show", "absent", "--json")
    assert (as_json.exit_code, as_json.stdout) == (1, "")
    assert "no model 'absent'" in json.loads(as_json.stderr)["error"]
    assert run("--host", server.url, "show").exit_code == 2
    assert run("--host", server.url, "create", "m").exit_code == 2
    assert run("--host", server.url, "create", "m", "--from", "a", "--parameter", "seed").exit_code == 2


def test_rm_goes_on_after_a_failure(server: FakeOllama) -> None:
    server.script("/api/delete", Reply.error(404, "model 'a' not found"), Reply.json({}))
    result = run("--host", server.url, "rm", "a", "b")
    assert (result.exit_code, result.stdout) == (1, "b is deleted\n")
    assert "no model 'a'" in result.stderr


def test_pull_as_lines(server: FakeOllama) -> None:
    server.script("/api/pull", Reply([{"status": "pulling manifest"}, part(500), part(2000), SUCCESS]), always=True)
    assert run("--host", server.url, "pull", "m").stdout == "pulling manifest\npulling 00\nsuccess\n"
    lines = [json.loads(line) for line in run("--host", server.url, "pull", "m", "--json").stdout.splitlines()]
    assert [line["status"] for line in lines] == ["pulling manifest", "pulling 00", "pulling 00", "success"]
    assert [line["overall"]["completed"] for line in lines] == [0, 500, 2000, 2000]
    assert lines[-1]["overall"]["fraction"] == 1.0


def test_pull_resumes_by_default(server: FakeOllama) -> None:
    server.script("/api/pull", Reply([part(500), Cut()]), Reply([part(2000), SUCCESS]), Reply([part(500), Cut()]))
    assert run("--host", server.url, "pull", "m").exit_code == 0
    broken = run("--host", server.url, "pull", "m", "--no-resume")
    assert broken.exit_code == 1
    assert "connection was lost" in " ".join(broken.stderr.split())


def test_push_and_create(server: FakeOllama, tmp_path: Path) -> None:
    server.script("/api/push", Reply([SUCCESS]))
    server.script("/api/create", Reply([SUCCESS]), always=True)
    assert run("--host", server.url, "push", "m", "--insecure").stdout == "success\n"
    made = ["--system", "s", "--quantize", "q4_0", "--license", "l", "--parameter", "seed=1", "--parameter", "stop=x"]
    assert run("--host", server.url, "create", "m", "--from", "a", *made).exit_code == 0
    pushed, created = [request.json() for request in server.requests]
    assert pushed == {"model": "m", "stream": True, "insecure": True}
    assert created == {
        "model": "m",
        "stream": True,
        "from": "a",
        "system": "s",
        "quantize": "q4_0",
        "license": "l",
        "parameters": {"seed": 1, "stop": ["x"]},
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    result = run("--host", server.url, "create", "m", "--file", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == "hashing model.gguf"
    assert result.stdout.splitlines()[-1] == "success"


def test_a_pull_on_a_terminal_shows_one_bar(server: FakeOllama) -> None:
    gate = Gate()
    server.script("/api/pull", Reply([{"status": "pulling manifest"}, part(500), gate, part(2000), SUCCESS]))
    terminal = Terminal("--host", server.url, "pull", "m", TERM="xterm")
    terminal.until("500 bytes of 2.0 kB")
    gate.open()
    assert terminal.wait() == 0
    assert "success" in terminal.output


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_aborts_a_pull(server: FakeOllama, options: list[str]) -> None:
    gate = Gate()
    server.script("/api/pull", Reply([part(500), gate, SUCCESS]))
    command = [sys.executable, "-m", "ollama_async", "--host", server.url, "pull", "m", *options]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert "pulling 00" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        assert server.requests[0].connection.wait_left(DEADLINE)
        _, complaint = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    text = json.loads(complaint)["error"] if options else " ".join(complaint.split())
    assert text == "stopped by you: pull it again to go on where it was"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (60, "1 minute"), (7199, "1 hour"), (7200, "2 hours"), (86400 * 400, "1 year")],
)
def test_spans(seconds: float, text: str) -> None:
    assert _span(seconds) == text


def test_times() -> None:
    assert _when(None) == ""
    assert _when(datetime(2318, 1, 1)) == "Forever"
    assert _when(datetime.now(UTC) + timedelta(seconds=250)) == "4 minutes from now"
    assert _when(datetime.now(UTC) - timedelta(seconds=250)) == "4 minutes ago"


def test_how_long_a_model_stays_loaded() -> None:
    """One that gives an answer stays, although the time that the server names is over."""
    now = datetime.now(UTC)
    assert _until(None) == ""
    assert _until(datetime(2318, 1, 1)) == "Forever"
    assert _until(now + timedelta(seconds=250)) == "4 minutes from now"
    assert _until(now - timedelta(minutes=3)) == "in use, or being unloaded"
    assert _until(datetime(1, 1, 1)) == "in use, or being unloaded"


def test_ps_of_a_model_that_answers(server: FakeOllama) -> None:
    """Its time to stay loaded ended while it answers: the server goes on naming that time."""
    over = (datetime.now(UTC) - timedelta(minutes=3)).isoformat()
    server.script("/api/ps", Reply.json({"models": [{**LOADED, "expires_at": over}]}), always=True)
    shown = run("--host", server.url, "ps", COLUMNS="200")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[1].endswith("in use, or being unloaded")
    assert "ago" not in shown.stdout
    assert json.loads(run("--host", server.url, "ps", "--json").stdout)["models"][0]["expires_at"].startswith(over[:19])


@pytest.mark.parametrize(("vram", "text"), [(0, "100% CPU"), (None, "100% CPU"), (100, "100% GPU")])
def test_processors(vram: int | None, text: str) -> None:
    assert _processor(100, vram) == text
