"""The command line: in this process where output is all that matters, in a real one on a real terminal for Ctrl-C."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from cli.terminal import CTRL_C, CTRL_D, DEADLINE, NOBODY, environment, roles, run, spawn, terminal

from ollama_async.cli._terminal import CtrlC
from ollama_async.testing import FakeOllama, Reply, Stall

COLOUR_CODES = r"\x1b\[[0-9;]*3[0-7]m"


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text


# -- demo --


def test_demo_brings_its_own_server_when_there_is_none() -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "embedded fake server" in text
    assert f"no Ollama server answers at http://{NOBODY}" in text
    assert "outcome 'aborted', reason 'you pressed Stop'" in text
    assert "outcome 'cancelled', reason None" in text
    assert "outcome 'closed', reason None" in text
    assert text.count("the server saw it leave after") == 3
    rows = [line.split() for line in result.stdout.splitlines() if " ms " in line and line.endswith(" ")]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("token.abort()", "aborted", "0"),
        ("asyncio.timeout()", "cancelled", "0"),
        ("break", "closed", "0"),
    ]
    assert max(map(len, result.stdout.partition("Stopped, and")[2].splitlines())) <= 80


def test_demo_uses_a_server_that_answers(fake_ollama: FakeOllama) -> None:
    result = run("--host", fake_ollama.url, "demo")
    assert result.exit_code == 0, result.output
    assert "your Ollama server" in result.stdout
    assert "fake:latest" in result.stdout
    # What the server saw is not known to the command, and it does not claim to know it.
    assert "server saw it leave" not in result.stdout
    assert "cannot be known from here" in result.stdout
    answers = fake_ollama.wait_for_requests(3, path="/api/chat")
    assert [request.connection.wait_left() for request in answers] == [True] * 3
    assert [request.connection.bytes_after_left for request in answers] == [0] * 3


def test_demo_takes_the_server_from_the_environment(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("short"), always=True)
    result = run("demo", OLLAMA_HOST=fake_ollama.url)
    assert result.exit_code == 1
    assert "the answer was over before it could be stopped" in result.stderr
    assert len(fake_ollama.wait_for_requests(3, path="/api/chat")) == 3


@pytest.mark.parametrize(
    ("cards", "running", "chosen"),
    [
        ([{"name": "nomic-embed-text", "size": 1}, {"name": "b", "size": 9}, {"name": "a", "size": 5}], [], "a"),
        ([{"name": "x", "capabilities": ["embedding"]}, {"name": "y", "capabilities": ["completion"]}], [], "y"),
        ([{"name": "minilm", "details": {"family": "bert"}}, {"name": "z"}], [], "z"),
        ([{"name": "small", "size": 1}, {"name": "loaded", "size": 9}], ["loaded"], "loaded"),
        ([{"name": "cloud", "remote_host": "https://ollama.com"}, {"name": "here", "size": 9}], [], "here"),
    ],
)
def test_demo_picks_a_model_that_chats_and_answers_soon(
    fake_ollama: FakeOllama, cards: list[dict[str, Any]], running: list[str], chosen: str
) -> None:
    fake_ollama.script("/api/tags", Reply.json({"models": cards}))
    fake_ollama.script("/api/ps", Reply.json({"models": [{"name": name} for name in running]}))
    fake_ollama.script("/api/chat", Reply.error(500, "enough seen"))
    result = run("--host", fake_ollama.url, "demo")
    assert result.exit_code == 1
    assert "enough seen" in result.stderr
    assert fake_ollama.wait_for_requests(path="/api/chat")[0].json()["model"] == chosen


def test_demo_says_why_it_does_not_use_a_server(fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollama_async.cli._demo._SHOW_SECONDS", 0.05)
    fake_ollama.script("/api/tags", Reply.json({"models": []}), Reply.error(502, "no upstream"))
    empty, broken = run("--host", fake_ollama.url, "demo"), run("--host", fake_ollama.url, "demo")
    assert (empty.exit_code, broken.exit_code) == (0, 0)
    assert "has no model that chats" in " ".join(empty.stdout.split())
    assert "no upstream (status code: 502)" in " ".join(broken.stdout.split())
    assert empty.stdout.startswith("Using an embedded fake server")
    assert broken.stdout.startswith("Using an embedded fake server")


def test_demo_with_a_model_that_the_server_does_not_have(fake_ollama: FakeOllama) -> None:
    result = run("--host", fake_ollama.url, "demo", "--model", "nope")
    assert result.exit_code == 1
    assert result.stderr == "Error: the server has no model 'nope'; it has: fake:latest\n"


def test_demo_is_ended_by_ctrl_c(fake_ollama: FakeOllama) -> None:
    with terminal("--host", fake_ollama.url, "demo") as shown:
        shown.until("This answer comes")
        shown.type(CTRL_C)
        assert shown.wait() == 130
        assert "stopped by you" in shown.output
        assert "Traceback" not in shown.output
    assert fake_ollama.requests[-1].connection.wait_left()


# -- generate --


def test_generate_streams_the_answer_to_stdout(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate("Because", " it", " is.", thinking=["Hm."]))
    result = run(
        *("--host", fake_ollama.url, "generate", "fake", "Why?", "--system", "Be brief."),
        *("--option", "temperature=0", "--option", 'stop=["\\n"]', "--option", "name=x=y"),
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Because it is.\n", "")
    sent = fake_ollama.requests[0].json()
    assert (sent["prompt"], sent["system"]) == ("Why?", "Be brief.")
    assert sent["options"] == {"temperature": 0, "stop": ["\n"], "name": "x=y"}


@pytest.mark.parametrize("arguments", [["-"], []])
def test_generate_reads_the_prompt_from_stdin(fake_ollama: FakeOllama, arguments: list[str]) -> None:
    result = run("--host", fake_ollama.url, "generate", "fake", *arguments, stdin="two\nlines\n")
    assert result.exit_code == 0
    assert fake_ollama.requests[0].json()["prompt"] == "two\nlines\n"


BAD, SHOWN = b"caf\xe9 au lait", "caf\ufffd au lait"


@pytest.mark.parametrize(
    ("arguments", "path", "piped", "key", "sent"),
    [
        (["generate", "fake"], "/api/generate", BAD, "prompt", SHOWN),
        (["generate", "fake", "-"], "/api/generate", BAD, "prompt", SHOWN),
        (["generate", "fake", "Sum it up."], "/api/generate", BAD, "prompt", f"{SHOWN}\n\nSum it up."),
        (["generate", "fake", "--json"], "/api/generate", BAD, "prompt", SHOWN),
        (["chat", "fake"], "/api/chat", BAD, "messages", [{"role": "user", "content": SHOWN}]),
        (["chat", "fake", "--json"], "/api/chat", BAD, "messages", [{"role": "user", "content": SHOWN}]),
        (["generate", "fake", BAD], "/api/generate", b"", "prompt", SHOWN),
        (["generate", "fake", "x", "--system", BAD], "/api/generate", b"", "system", SHOWN),
        (["generate", "fake", "x", "--option", b"stop=" + BAD], "/api/generate", b"", "options", {"stop": [SHOWN]}),
        (["create", "m", "--from", "fake", "--system", BAD], "/api/create", b"", "system", SHOWN),
        (["create", "m", "--from", "fake", "--template", BAD], "/api/create", b"", "template", SHOWN),
    ],
)
def test_what_is_not_utf_8_is_sent_with_replacements(
    fake_ollama: FakeOllama, arguments: list[str | bytes], path: str, piped: bytes, key: str, sent: object
) -> None:
    """From a pipe and from an argument, as it has always been where a prompt is typed."""
    fake_ollama.script("/api/create", Reply([{"status": "success"}]))
    result = subprocess.run(
        [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, *arguments],
        input=piped,
        env=environment(PYTHONUTF8="1"),
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert fake_ollama.wait_for_requests(path=path)[0].json()[key] == sent


def test_generate_is_stopped_by_ctrl_c_and_keeps_the_partial_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01))
    with terminal("--host", fake_ollama.url, "generate", "fake", "Why?") as shown:
        shown.until("No model was asked")
        shown.type(CTRL_C)
        assert fake_ollama.requests[0].connection.wait_left()
        shown.until("stopped by you after ")
        shown.until("the partial answer is above")
        assert shown.wait() == 130
        assert re.search(r"after \d+ tokens in \d+\.\d s; the partial answer", shown.output)
        assert "Traceback" not in shown.output
    assert fake_ollama.requests[0].connection.bytes_after_left == 0


def test_generate_is_stopped_by_ctrl_c_before_anything_came(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply(before_head=[Stall()]))
    with terminal("--host", fake_ollama.url, "generate", "fake", "Why?", TERM="xterm-256color") as shown:
        shown.until("waiting for the model fake")
        connection = fake_ollama.wait_for_requests()[0].connection
        shown.type(CTRL_C)
        assert connection.wait_left()
        assert shown.wait() == 130
        assert "before the first token" in shown.output


def test_a_signal_stops_generate_without_a_terminal(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01))
    command = [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, "generate", "fake", "Why?"]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 4)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert (first + rest).startswith(b"This")
    assert (first + rest).endswith(b"\n")
    assert errors.startswith(b"stopped by you after ")
    assert errors.count(b"\n") == 1


def test_ctrl_c_is_immediate_while_writing_is_stuck_and_twice_leaves(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply([*Reply.generate("x" * 300_000, done=False).steps, Stall()]))
    command = [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, "generate", "fake", "Why?"]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        try:
            wait_until_full(process.stdout.fileno())
            process.send_signal(signal.SIGINT)
            # The command cannot say so: nobody reads. The server knows all the same.
            assert fake_ollama.requests[0].connection.wait_left()
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 130
        finally:
            process.kill()


def wait_until_full(pipe: int) -> None:
    capacity, deadline = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ), time.monotonic() + DEADLINE
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0] < capacity:
        assert time.monotonic() < deadline, "the pipe did not fill up"
        time.sleep(0.005)


def test_generate_asks_for_one_prompt_after_the_other_on_a_terminal(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01), Reply.generate("All good."))
    with terminal("--host", fake_ollama.url, "generate", "fake") as shown:
        shown.until_prompt()
        shown.type("first\n")
        shown.until("No model was asked")
        shown.type(CTRL_C)
        shown.until("stopped by you after ")
        shown.until_prompt()
        shown.type("second\n")
        shown.until("All good.")
        shown.until_prompt()
        shown.type("/bye\n")
        assert shown.wait() == 0
    assert [request.json()["prompt"] for request in fake_ollama.requests] == ["first", "second"]


def test_generate_keeps_the_partial_answer_at_a_timeout(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply([*Reply.generate("So far", done=False).steps, Stall()]))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--timeout-idle", "0.1")
    assert (result.exit_code, result.stdout) == (1, "So far\n")
    assert "idle timeout" in result.stderr
    assert one_line(result.stderr)


def test_generate_tells_an_incomplete_answer_from_a_whole_one(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate("Half", done=False))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?")
    assert (result.exit_code, result.stdout) == (1, "Half\n")
    assert "not complete" in result.stderr


def test_a_broken_pipe_ends_it_quietly(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.005))
    command = [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, "generate", "fake", "Why?"]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 4) == b"This"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(DEADLINE) == 1
    assert fake_ollama.requests[0].connection.wait_left()


@pytest.mark.parametrize("arguments", [["generate", "fake", "Why?"], ["--help"]])
def test_a_full_disk_is_an_error_in_one_line(fake_ollama: FakeOllama, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, *arguments],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert one_line(result.stderr)


def test_it_works_with_its_streams_closed(fake_ollama: FakeOllama) -> None:
    command = f'exec "{sys.executable}" -m ollama_async --host {fake_ollama.url} generate fake Why? <&- >&- 2>&-'
    result = subprocess.run(["sh", "-c", command], env=environment(), timeout=DEADLINE, check=False)
    assert result.returncode == 0


def test_an_answer_cannot_control_the_terminal(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate("a\x1b]0;title\x07b\x9bc\x7f\td\n", thinking=["\x1b[2Jhm"]))
    with terminal("--host", fake_ollama.url, "generate", "fake", "Why?") as shown:
        assert shown.wait() == 0
        assert "\ufffd[2Jhm\r\n\r\na\ufffd]0;title\ufffdb\ufffdc\ufffd\td\r\n" in shown.output
    fake_ollama.script("/api/generate", Reply.generate("a\x1b]0;title\x07\n"))
    assert run("--host", fake_ollama.url, "generate", "fake", "Why?").stdout == "a\x1b]0;title\x07\n"


# -- chat --


def test_chat_goes_on_after_ctrl_c_with_the_partial_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01), Reply.chat("Second answer."))
    with terminal("--host", fake_ollama.url, "chat", "fake", "--system", "Be brief.") as shown:
        shown.until_prompt()
        shown.type("first\n")
        shown.until("No model was asked")
        shown.type(CTRL_C)
        assert fake_ollama.wait_for_requests(path="/api/chat")[0].connection.wait_left()
        shown.until("stopped by you after ")
        shown.until("the partial answer is kept")
        shown.until_prompt()
        shown.type("second\n")
        shown.until("Second answer.")
        shown.until_prompt()
        shown.type(CTRL_D)
        assert shown.wait() == 0
        assert "Traceback" not in shown.output
    _, second = fake_ollama.wait_for_requests(2, path="/api/chat")
    system, first, partial, last = roles(second)
    assert (system, first, last) == (("system", "Be brief."), ("user", "first"), ("user", "second"))
    assert partial[0] == "assistant"
    assert partial[1].startswith("This answer comes from a fake Ollama server. No model was asked")


def test_chat_is_left_by_ctrl_c_twice_at_the_prompt(fake_ollama: FakeOllama) -> None:
    with terminal("--host", fake_ollama.url, "chat", "fake") as shown:
        shown.until_prompt()
        shown.type(CTRL_C)
        shown.until("press Ctrl-C once more to leave")
        shown.until_prompt()
        shown.type(CTRL_C)
        assert shown.wait() == 130
        assert "Traceback" not in shown.output


def test_chat_is_left_by_ctrl_c_in_an_answer_and_again(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    with terminal("--host", fake_ollama.url, "chat", "fake") as shown:
        shown.until_prompt()
        shown.type("first\n")
        shown.until("No model was asked")
        shown.type(CTRL_C)
        shown.until("stopped by you after ")
        shown.until_prompt()
        shown.type(CTRL_C)
        assert shown.wait() == 130
        assert "Traceback" not in shown.output


def test_only_a_second_ctrl_c_within_a_second_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.5, 102.4])
    monkeypatch.setattr("ollama_async.cli._terminal.time.monotonic", lambda: next(now))
    ctrl_c = CtrlC()
    assert [ctrl_c.again() for _ in range(3)] == [False, False, True]


def test_chat_shows_the_error_of_a_turn_and_goes_on(fake_ollama: FakeOllama) -> None:
    broken = Reply([*Reply.chat("Half", done=False).steps, {"error": "out of memory"}])
    fake_ollama.script("/api/chat", Reply.error(500, "it crashed"), broken, Reply.chat("Fine."))
    with terminal("--host", fake_ollama.url, "chat", "fake") as shown:
        shown.until_prompt()
        shown.type("lost\n")
        shown.until(f"Error: the server at {fake_ollama.url}: it crashed (status code: 500)")
        shown.until_prompt()
        shown.type("half\n")
        shown.until("Half")
        shown.until("out of memory")
        shown.until_prompt()
        shown.type("whole\n")
        shown.until("Fine.")
        shown.until_prompt()
        fake_ollama.stop()
        shown.type("anybody?\n")
        shown.until(f"Error: no Ollama server at {fake_ollama.url}")
        shown.until_prompt()
        shown.type("/bye\n")
        assert shown.wait() == 0
        assert "Traceback" not in shown.output
    # What was never answered is not part of the conversation; what was answered by half is.
    assert roles(fake_ollama.requests[3]) == [("user", "half"), ("assistant", "Half"), ("user", "whole")]


def test_chat_reads_its_prompts_from_a_pipe(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("One."), Reply.chat("Two."))
    result = spawn("--host", fake_ollama.url, "chat", "fake", input="a\n\nb\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "One.\nTwo.\n", "")
    assert roles(fake_ollama.requests[2]) == [("user", "a"), ("assistant", "One."), ("user", "b")]


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_missing_model_is_an_error_in_one_line(fake_ollama: FakeOllama, command: str) -> None:
    result = spawn("--host", fake_ollama.url, command, "nope", input="x")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: the server at {fake_ollama.url} has no model 'nope': get it with 'ollama-async pull nope'\n"
    )


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_missing_server_is_an_error_in_one_line(command: str) -> None:
    result = spawn(command, "fake", input="x")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: no Ollama server at http://{NOBODY} (")
    assert "ollama serve" in result.stderr
    assert one_line(result.stderr)


# -- all commands --


def test_colours_are_for_terminals_that_want_them(fake_ollama: FakeOllama) -> None:
    def output(*options: str, **variables: str) -> str:
        arguments = (*options, "--host", fake_ollama.url, "generate", "nope", "Why?")
        with terminal(*arguments, TERM="xterm-256color", **variables) as shown:
            assert shown.wait() == 1
        assert "has no model 'nope'" in shown.output
        return shown.output

    assert re.search(COLOUR_CODES, output())
    assert not re.search(COLOUR_CODES, output("--no-color"))
    assert not re.search(COLOUR_CODES, output(NO_COLOR="1"))


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("ollama-async ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["nonsense"],
        ["generate", "fake", "x", "--option", "temperature"],
        ["generate", "fake", "x", "--timeout-idle", "0"],
        ["generate", "fake", ""],
        ["--host", "ftp://user:secret@x", "generate", "fake", "x"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "secret" not in result.output
    assert "Traceback" not in result.output


def test_credentials_in_the_host_are_never_shown() -> None:
    result = run("--host", f"http://user:secret@{NOBODY}", "generate", "fake", "x")
    assert result.exit_code == 1
    assert "secret" not in result.output


def test_help_needs_no_usable_host() -> None:
    assert run("generate", "--help", OLLAMA_HOST="ftp://x").exit_code == 0


@pytest.mark.parametrize("missing", ["typer", "rich", "markdown_it"])
def test_without_the_extra_it_says_how_to_install_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from ollama_async.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert 'pip install "ollama-async[cli]"' in result.stderr
    assert one_line(result.stderr)


def test_the_library_does_not_need_the_extra() -> None:
    # (rich may be there: httpx imports it for a command of its own where it can)
    code = "import sys, ollama_async; assert not {'typer', 'ollama_async.testing'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], env=environment(), timeout=DEADLINE, check=True)
