"""The interactive chat, on a terminal whose screen is looked at, and what the server saw of each stop."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("prompt_toolkit")

from cli.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, ESC, UP, chat, environment, roles, run, spawn

from ollama_async.cli._markdown import Growing
from ollama_async.testing import Cut, FakeOllama, Gate, Reply, Stall


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


# -- stopping --


@pytest.mark.parametrize(
    ("key", "columns"),
    [(ESC, 80), (ESC, 200), (CTRL_C, 80), (CTRL_C, 20)],
    ids=["esc-80", "esc-200", "ctrl-c-80", "ctrl-c-20"],
)
def test_a_key_stops_the_answer_and_keeps_the_partial_answer(
    fake_ollama: FakeOllama, state: Path, key: str, columns: int
) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01), Reply.chat("Second answer."))
    with chat(fake_ollama, state, "--system", "Be brief.", columns=columns) as shown:
        before = shown.modes()
        shown.says("first")
        shown.shows(r"answering: \d+ tok")
        shown.shows("No model was")
        shown.type(key)
        connection = fake_ollama.wait_for_requests(path="/api/chat")[0].connection
        assert connection.wait_left(20)
        shown.shows(r"stopped by you after \d+ tokens in \d+\.\d s; the partial answer is kept")
        shown.says("second")
        shown.shows("Second answer.")
        shown.ready()
        assert shown.modes() != before
        shown.type(CTRL_D)
        assert shown.wait() == 0
        assert shown.modes() == before
    assert connection.bytes_after_left == 0
    system, first, partial, last = roles(fake_ollama.wait_for_requests(2, path="/api/chat")[1])
    assert (system, first, last) == (("system", "Be brief."), ("user", "first"), ("user", "second"))
    assert partial[0] == "assistant"
    assert partial[1].startswith("This answer comes from a fake Ollama server. No model was")
    # What is kept is what is shown.
    assert partial[1] in shown.text()


@pytest.mark.parametrize("key", [ESC, CTRL_C], ids=["esc", "ctrl-c"])
def test_a_key_stops_before_anything_came(fake_ollama: FakeOllama, state: Path, key: str) -> None:
    fake_ollama.script("/api/chat", Reply(before_head=[Stall()]), Reply.chat("Fine."))
    with chat(fake_ollama, state) as shown:
        shown.says("lost")
        shown.shows(r"waiting for the model fake \(it may be loading\), \d+ s")
        connection = fake_ollama.wait_for_requests(path="/api/chat")[0].connection
        shown.type(key)
        assert connection.wait_left(20)
        shown.shows(r"stopped by you after \d+\.\d s, before the first token")
        shown.says("kept")
        shown.shows(r"Fine\. done: 1 token in")
        shown.says("/quit")
        assert shown.wait() == 0
    assert roles(fake_ollama.wait_for_requests(2, path="/api/chat")[1]) == [("user", "kept")]


def test_keys_that_begin_with_esc_do_not_stop_and_what_is_typed_is_kept(fake_ollama: FakeOllama, state: Path) -> None:
    gate = Gate()
    steps = Reply.chat("One, ", "two.").steps
    fake_ollama.script("/api/chat", Reply([steps[0], gate, *steps[1:]]), Reply.chat("Three."))
    with chat(fake_ollama, state) as shown:
        shown.says("count")
        shown.shows("One,")
        # An arrow, Alt-x, a key that nobody knows, a paste with a line end in it.
        shown.type(UP + ESC + "x" + ESC + "[99~" + ESC + "[200~pasted\rlines" + ESC + "[201~")
        shown.shows(r"nothing for (?:[4-9]|\d\d) s")
        gate.open()
        shown.shows("One, two. done: 2 tokens")
        shown.shows("pasted.*lines")
        shown.type(ENTER)
        shown.shows("Three.")
        shown.says("/quit")
        assert shown.wait() == 0
    last = roles(fake_ollama.wait_for_requests(2, path="/api/chat")[1])[-1]
    assert last[0] == "user"
    assert last[1].endswith("pasted\nlines")


def test_what_was_typed_ahead_is_dropped_by_a_stop(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    with chat(fake_ollama, state) as shown:
        shown.says("go")
        shown.shows("No model was")
        shown.type("/quit" + ENTER)
        shown.type(CTRL_C)
        shown.shows("stopped by you")
        shown.ready()
        shown.says("/model")
        shown.shows("the model is fake; the server has: fake")
        shown.says("/quit")
        assert shown.wait() == 0


@pytest.mark.parametrize(
    ("number", "answering"), [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGHUP, True)]
)
def test_a_signal_leaves_the_terminal_as_it_was(
    fake_ollama: FakeOllama, state: Path, number: signal.Signals, answering: bool
) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    with chat(fake_ollama, state) as shown:
        before = shown.modes()
        shown.ready()
        if answering:
            shown.says("go")
            shown.shows("No model was")
        assert shown.modes() != before
        shown.process.send_signal(number)
        assert shown.wait() == 128 + number
        assert shown.modes() == before
        # The cursor is shown, and pasting is as it was.
        assert shown.output.rfind("\x1b[?25h") > shown.output.rfind("\x1b[?25l")
        assert shown.output.rfind("\x1b[?2004l") > shown.output.rfind("\x1b[?2004h")
    if answering:
        assert fake_ollama.wait_for_requests(path="/api/chat")[0].connection.wait_left(20)


def test_a_second_ctrl_c_leaves(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    with chat(fake_ollama, state) as shown:
        before = shown.modes()
        shown.says("go")
        shown.shows("No model was")
        shown.type(CTRL_C)
        shown.shows("stopped by you after ")
        shown.ready()
        shown.type(CTRL_C)
        assert shown.wait() == 130
        assert shown.modes() == before


def test_ctrl_c_at_the_prompt_leaves_only_when_it_is_pressed_twice(fake_ollama: FakeOllama, state: Path) -> None:
    with chat(fake_ollama, state) as shown:
        shown.ready()
        shown.type("half a prompt")
        shown.ready("half a prompt")
        shown.type(CTRL_C)
        shown.shows("press Ctrl-C once more to leave, or type /quit")
        shown.ready()
        shown.type(CTRL_C)
        assert shown.wait() == 130


def test_the_terminal_goes_away(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    with chat(fake_ollama, state) as shown:
        shown.says("go")
        shown.shows("No model was")
        os.close(shown.master)
        shown.master = os.open(os.devnull, os.O_RDWR)
        assert shown.process.wait(20) in (1, 128 + signal.SIGHUP)
    assert fake_ollama.wait_for_requests(path="/api/chat")[0].connection.wait_left(20)


# -- other ends --


def test_states_of_failure_are_told_and_the_chat_goes_on(fake_ollama: FakeOllama, state: Path) -> None:
    half = Reply.chat("Half", done=False).steps
    fake_ollama.script("/api/chat", Reply([*half, Stall()]), Reply([*half, Cut()]), Reply(half), Reply.error(500, "no"))
    with chat(fake_ollama, state, "--timeout-idle", "0.3") as shown:
        shown.says("a")
        shown.shows(r"Error: timed out after 1 token in \d\.\d s: the server at \S+ the server neither sent nor took")
        shown.says("b")
        shown.shows(r"Error: the server is gone after 1 token in \d\.\d s: ")
        shown.says("c")
        shown.shows("the answer is not complete: the server ended it after 1 token")
        shown.says("d")
        shown.shows(r"Error: the server at \S+ no \(status code: 500\)")
        shown.ready()
        fake_ollama.stop()
        shown.says("e")
        shown.shows("Error: no Ollama server at ")
        shown.says("/save " + str(state / "kept.json"))
        shown.shows("saved to")
        shown.says("/quit")
        assert shown.wait() == 0
    saved = json.loads((state / "kept.json").read_text())["messages"]
    assert [(message["content"], message.get("outcome")) for message in saved] == [
        *[("a", None), ("Half", "timeout"), ("b", None), ("Half", "error"), ("c", None), ("Half", "truncated")]
    ]


# -- what is shown --


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_is_lost_or_shown_twice(fake_ollama: FakeOllama, state: Path, columns: int) -> None:
    paragraphs = "".join(f"Paragraph {n} has words.\n\n" for n in range(40))
    rows = "".join(f"- item {n} of a list\n" for n in range(60))
    code = "```python\n" + "".join(f"line_{n} = {n}\n" for n in range(60)) + "```\n\n"
    text = f"# A heading\n\n{paragraphs}{rows}\n{code}The *end*."
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    fake_ollama.script("/api/chat", Reply.chat(*pieces, interval=0.002))
    with chat(fake_ollama, state, columns=columns) as shown:
        shown.says("go")
        shown.shows("done: ")
        shown.says("/quit")
        assert shown.wait() == 0
        lines = shown.lines()
    expected = [f"Paragraph {n} has words." for n in range(40)]
    expected += [f"• item {n} of a list" for n in range(60)]
    expected += [f"line_{n} = {n}" for n in range(60)]
    assert [line.strip() for line in lines if re.search(r"Paragraph|• item|line_", line)] == expected
    assert "The end." in lines
    assert sum("A heading" in line for line in lines) == 1


def test_of_a_long_block_the_end_is_seen_while_it_grows(fake_ollama: FakeOllama, state: Path) -> None:
    gate = Gate()
    texts = ["Before.\n\n- a\n- b\n\n| c |\n|---|\n| 1 |\n\n```\n", *(f"line {n}\n" for n in range(60)), "```\n"]
    steps = Reply.chat(*texts).steps
    fake_ollama.script("/api/chat", Reply([*steps[:-2], gate, *steps[-2:]]))
    with chat(fake_ollama, state) as shown:
        shown.says("go")
        shown.shows(r"line 59 answering: 61 tokens")
        lines = [line.strip() for line in shown.lines()]
        assert [line for line in lines if line.startswith("line")] == [f"line {n}" for n in range(60)]
        # The screen is full: the edge of the box and the state stand below.
        assert [line for line in lines[-24:] if line.startswith("line")] == [f"line {n}" for n in range(38, 60)]
        gate.open()
        shown.shows("done: ")
        shown.says("/quit")
        assert shown.wait() == 0
        lines = shown.lines()
    at = lines.index("Before.")
    shape = [line.strip(" ─━") for line in lines[at : at + 9]]
    assert shape == ["Before.", "", "• a", "• b", "", "c", "", "1", ""]
    assert [line.strip() for line in lines if "line " in line] == [f"line {n}" for n in range(60)]


def test_thinking_is_shown_apart_and_not_kept(fake_ollama: FakeOllama, state: Path) -> None:
    thinking = ["I have", " to\nthink", " of it."]
    fake_ollama.script("/api/chat", Reply.chat("Because.", thinking=thinking), Reply.chat("Again."))
    with chat(fake_ollama, state) as shown:
        shown.says("why")
        shown.shows("done: ")
        lines = shown.lines()
        at = lines.index("  I have to")
        assert lines[at : at + 4] == ["  I have to", "  think of it.", "", "Because."]
        assert re.search(r"\x1b\[2;3m *I have to", shown.output)
        shown.says("again")
        shown.shows("Again.")
        shown.says("/quit")
        assert shown.wait() == 0
    assert roles(fake_ollama.wait_for_requests(2, path="/api/chat")[1])[1] == ("assistant", "Because.")


def test_nothing_that_a_model_says_vanishes_or_controls_the_terminal(fake_ollama: FakeOllama, state: Path) -> None:
    text = "<div>\nraw\n</div>\n\n[1]: http://a.b\n\n![alt](http://c.d) a\x1b]0;title\x07b <b>c</b>\n"
    fake_ollama.script("/api/chat", Reply.chat(text, thinking=["\x1b[2Jhm"]))
    with chat(fake_ollama, state) as shown:
        shown.says("go")
        shown.shows("done: ")
        for line in ("<div>", "raw", "</div>", "[1]: http://a.b", "!alt (http://c.d) a\ufffd]0;title\ufffdb <b>c</b>"):
            assert line in shown.lines()
        assert "  \ufffd[2Jhm" in shown.lines()
        shown.says("/quit")
        assert shown.wait() == 0
    assert "\x1b]0" not in shown.output


@pytest.mark.parametrize("off", ["option", "variable"])
def test_colours_can_be_off(fake_ollama: FakeOllama, state: Path, off: str) -> None:
    fake_ollama.script("/api/chat", Reply.chat("# T\n\n```python\nx = 1\n```\n"))
    options, variables = (["--no-color"], {}) if off == "option" else ([], {"NO_COLOR": "1"})
    with chat(fake_ollama, state, *options, **variables) as shown:
        shown.says("/nonsense")
        shown.says("go")
        shown.shows("done: ")
        shown.says("/quit")
        assert shown.wait() == 0
    assert not re.search(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8])(?:;[0-9;]*)?m", shown.output)


def test_blocks_are_finished_only_when_nothing_can_change_them() -> None:
    text = "# T\n\npara\n#hash\nmore\n\n- a\n\n  b\n- c\n\n```\nx\n\ny\n```\n| a |\n|---|\n| 1 |\n\nlast"
    whole = ["# T\n\n", "para\n#hash\nmore\n\n", "- a\n\n  b\n- c\n\n", "```\nx\n\ny\n```\n"]
    for step in (1, 2, 3, 7):
        growing, finished = Growing(), []
        for at in range(0, len(text), step):
            growing.add(text[at : at + step])
            finished.append(growing.finished())
        assert [block for block in finished if block][:4] == whole
        assert "".join(finished) + growing.rest == text


# -- the prompt --


def test_prompts_of_several_lines(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.chat("A."), Reply.chat("B."), Reply.chat("C."))
    with chat(fake_ollama, state) as shown:
        shown.says(f"one{ALT_ENTER}two")
        shown.shows("A. done")
        shown.says('"""/three')
        shown.type(f'four"""{ENTER}')
        shown.shows("B. done")
        shown.says(" /five")
        shown.shows("C. done")
        shown.says("/quit")
        assert shown.wait() == 0
    asked = [roles(request)[-1][1] for request in fake_ollama.wait_for_requests(3, path="/api/chat")]
    assert asked == ["one\ntwo", "/three\nfour", "/five"]


def test_the_history_is_kept_for_the_user_only(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.chat("A."), Reply.chat("B."))
    with chat(fake_ollama, state) as shown:
        shown.says("remember me")
        shown.shows("A. done")
        shown.says("/quit")
        assert shown.wait() == 0
    file = state / "ollama-async" / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    with chat(fake_ollama, state) as shown:
        shown.ready()
        shown.type(UP + UP)
        shown.ready("remember me")
        shown.type(ENTER)
        shown.shows("B. done")
        shown.says("/quit")
        assert shown.wait() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_it_chats_without_a_place_for_the_history(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fake_ollama.script("/api/chat", Reply.chat("A."))
    with chat(fake_ollama, tmp_path / "file") as shown:
        shown.says("a")
        shown.shows("A. done")
        shown.says("/quit")
        assert shown.wait() == 0


def test_input_that_is_not_utf_8(fake_ollama: FakeOllama, state: Path) -> None:
    fake_ollama.script("/api/chat", Reply.chat("A."))
    with chat(fake_ollama, state) as shown:
        shown.ready()
        os.write(shown.master, b"caf\xe9!\r")
        shown.shows("A. done")
        shown.says("/quit")
        assert shown.wait() == 0
    assert roles(fake_ollama.wait_for_requests(path="/api/chat")[0]) == [("user", "caf\ufffd!")]


# -- commands --


def test_commands(fake_ollama: FakeOllama, state: Path, tmp_path: Path) -> None:
    with FakeOllama(models=["fake", "other"]) as server:
        server.script("/api/chat", Reply.chat("A."), Reply.chat("B."))
        with chat(server, state) as shown:
            shown.says("/help")
            shown.shows(r"/save .* Esc or Ctrl-C stops an answer")
            shown.says("/mod x")
            shown.shows("there is no command /mod: did you mean /model?")
            shown.says("/model nope")
            shown.shows(r"has no model 'nope': get it with .*; the model is still fake")
            shown.says("/model other")
            shown.shows("the conversation goes on with other")
            shown.says("/system Be brief.")
            shown.shows("the system prompt is: Be brief.")
            shown.says("a")
            shown.shows("A. done")
            shown.says(f"/save {tmp_path}/chat.md")
            shown.shows("saved to")
            shown.says("/clear")
            shown.shows("the conversation is forgotten")
            shown.says("/system -")
            shown.shows("there is no system prompt")
            shown.says("b")
            shown.shows("B. done")
            shown.ready()
            shown.type("/sa")
            shown.shows(">>> /sa /save FILE save the conversation")
            shown.type("\t")
            shown.ready("/save")
            shown.type(CTRL_C)
            shown.says("/bye")
            assert shown.wait() == 0
        first, second = server.wait_for_requests(2, path="/api/chat")
    assert (first.json()["model"], roles(first)) == ("other", [("system", "Be brief."), ("user", "a")])
    assert roles(second) == [("user", "b")]
    saved = "# Chat with other\n\n## system\n\nBe brief.\n\n## user\n\na\n\n## assistant\n\nA.\n"
    assert (tmp_path / "chat.md").read_text() == saved


def test_save_neither_overwrites_nor_leaves_half_a_file(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), Reply.chat("x" * 100_000))
    there = tmp_path / "there.md"
    there.write_text("mine")
    commands = f"/save {there}\n/save {tmp_path}/no/such.md\n/save {tmp_path}/a.md\n/save {tmp_path}/a.md\n/save\n"
    result = spawn("--host", fake_ollama.url, "chat", "fake", "--timeout-total", "0.2", input=f"q\n{commands}")
    assert result.returncode == 1
    assert f"Error: {there} exists already: name another file\n" in result.stderr
    assert f"Error: cannot save to {tmp_path}/no/such.md: No such file or directory\n" in result.stderr
    assert result.stderr.count(f"saved to {tmp_path}/a.md\n") == 2
    assert "Error: name a file" in result.stderr
    assert there.read_text() == "mine"
    assert "## assistant (timed out)\n\nThis answer" in (tmp_path / "a.md").read_text()
    # A file may not be longer than that: for a program it is what a full disk is.
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    limited += "from ollama_async.__main__ import main; main()"
    folder = tmp_path / "empty"
    folder.mkdir()
    full = subprocess.run(
        [sys.executable, "-c", limited, "--host", fake_ollama.url, "chat", "fake"],
        input=f"q\n/save {folder}/b.md\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert full.returncode == 1
    assert full.stderr == f"Error: cannot save to {folder}/b.md: File too large\n"
    assert list(folder.iterdir()) == []


# -- without a terminal --


def test_without_a_terminal_there_are_no_codes_and_no_prompt_toolkit(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("# One"), Reply.chat("*Two*", thinking=["hm"]))
    program = "import sys, atexit\n"
    program += "atexit.register(lambda: sys.stderr.write(str('prompt_toolkit' in sys.modules)))\n"
    program += "from ollama_async.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--host", fake_ollama.url, "chat", "fake"],
        input="a\nb\n",
        env=environment(TERM="xterm-256color", COLORTERM="truecolor"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "# One\n*Two*\n", "False")


def test_half_a_terminal_is_not_a_terminal(fake_ollama: FakeOllama) -> None:
    """With its input from a pipe, what goes to the terminal has no codes in it."""
    fake_ollama.script("/api/generate", Reply.generate("Yes.", thinking=["hm"]))
    program = f'echo hi | "{sys.executable}" -m ollama_async --host {fake_ollama.url} generate fake'
    master, slave = os.openpty()
    with subprocess.Popen(["sh", "-c", program], stdin=-3, stdout=slave, stderr=slave, env=environment(TERM="xterm")):
        os.close(slave)
        output = b""
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                output += data
    os.close(master)
    assert b"\x1b" not in output
    assert output.decode().splitlines() == ["waiting for the model fake (it may be loading)", "hm", "", "Yes."]


def test_a_script_is_told_that_a_turn_failed(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.error(500, "no"), Reply.chat("Two."))
    result = spawn("--host", fake_ollama.url, "chat", "fake", input="a\nb\n")
    assert (result.returncode, result.stdout) == (1, "Two.\n")
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["Sum it up."], "a\nb\n", "a\nb\n\nSum it up."),
        (["Why?"], "", "Why?"),
        (["-"], "all\n", "all\n"),
        ([], "all\n", "all\n"),
    ],
)
def test_a_pipe_and_the_prompt_go_together(
    fake_ollama: FakeOllama, arguments: list[str], stdin: str, prompt: str
) -> None:
    result = run("--host", fake_ollama.url, "generate", "fake", *arguments, stdin=stdin)
    assert result.exit_code == 0
    assert fake_ollama.requests[0].json()["prompt"] == prompt


def test_json_is_a_line_a_chunk_and_the_outcome_last(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate("Be", "cause.", thinking=["hm"]))
    result = run("--host", fake_ollama.url, "generate", "fake", "Why?", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    *chunks, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert [chunk["response"] for chunk in chunks] == ["", "Be", "cause.", ""]
    assert chunks[0]["thinking"] == "hm"
    assert chunks[-1]["done"] is True
    assert (end["outcome"], end["reason"], end["error"]) == ("done", None, None)
    assert (end["text"], end["tokens"], end["tokens_per_second"]) == ("Because.", 3, 50.0)
    assert end["seconds"] >= end["first_chunk_seconds"] >= 0


@pytest.mark.parametrize(
    ("reply", "outcome", "text", "error"),
    [
        (Reply([*Reply.chat("Half", done=False).steps, Stall()]), "timeout", "Half", "idle timeout"),
        (Reply([*Reply.chat("Half", done=False).steps, Cut()]), "error", "Half", "the server is gone"),
        (Reply.chat("Half", done=False), "truncated", "Half", None),
        (Reply.error(500, "it crashed"), "error", "", "it crashed"),
    ],
)
def test_json_tells_what_went_wrong(
    fake_ollama: FakeOllama, reply: Reply, outcome: str, text: str, error: str | None
) -> None:
    fake_ollama.script("/api/chat", reply, Reply.chat("Whole."))
    result = spawn("--host", fake_ollama.url, "chat", "fake", "--json", "--timeout-idle", "0.3", input="a\nb\n")
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    ends = [line for line in lines if "outcome" in line]
    assert [(end["outcome"], end["text"]) for end in ends] == [(outcome, text), ("done", "Whole.")]
    assert lines[-1] == ends[1]
    if error:
        assert error in ends[0]["error"]
        assert json.loads(result.stderr)["error"] == ends[0]["error"]


def test_json_of_an_answer_that_is_stopped(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.endless_generate(0.01))
    command = [sys.executable, "-m", "ollama_async", "--host", fake_ollama.url, "generate", "fake", "Why?", "--json"]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert fake_ollama.requests[0].connection.wait_left(20)
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    end = json.loads(rest.splitlines()[-1])
    assert (end["outcome"], end["reason"], end["error"]) == ("aborted", "Ctrl-C", None)
    assert end["text"].startswith("This")
    assert fake_ollama.requests[0].connection.bytes_after_left == 0


# -- tools --

TOOLS = """
import pathlib, time

def weather(city: str) -> str:
    return city + ": 20 C"

async def waits() -> str:
    import asyncio
    try:
        await asyncio.Event().wait()
    finally:
        pathlib.Path("stopped").touch()

class Search:
    def find(self) -> str:
        return ""

needs_object = Search.find
data = {}
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    (tmp_path / "mytools.py").write_text(TOOLS, "utf-8")
    return tmp_path


def calling(name: str, **arguments: str) -> Reply:
    return Reply.chat(tool_calls=[{"id": "1", "function": {"name": name, "arguments": arguments}}])


def test_tools_are_called_and_shown(
    fake_ollama: FakeOllama, state: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.chat("It is **20**."))
    monkeypatch.chdir(tools)
    with chat(fake_ollama, state, "--tools", "mytools:weather") as shown:
        shown.says("Weather?")
        shown.shows(r"weather\(city='Lima'\).*weather: Lima: 20 C.*It is 20\..*done: ")
    sent = fake_ollama.requests[-1].json()
    assert sent["messages"][-1]["content"] == "Lima: 20 C"
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["weather"]


def test_a_key_stops_a_tool(fake_ollama: FakeOllama, state: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ollama.script("/api/chat", calling("waits"), Reply.chat("Again."))
    monkeypatch.chdir(tools)
    with chat(fake_ollama, state, "--tools", "mytools:waits") as shown:
        shown.says("Wait.")
        shown.shows(r"waits\(\)")
        shown.type(CTRL_C)
        shown.shows("waits: aborted: the call was stopped.*stopped by you")
        assert (tools / "stopped").exists()
        shown.says("And now?")
        shown.shows("Again")


def test_json_of_tools(fake_ollama: FakeOllama, tools: Path) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.chat("It is ", "20."))
    arguments = ["--host", fake_ollama.url, "chat", "fake", "--json", "--tools", "mytools:weather"]
    result = spawn(*arguments, input="Weather?\n", cwd=tools)
    assert (result.returncode, result.stderr) == (0, "")
    *chunks, end = [json.loads(line) for line in result.stdout.splitlines()]
    messages = [chunk["message"] for chunk in chunks]
    assert messages[0]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Lima"}}
    assert (messages[1]["role"], messages[1]["content"]) == ("tool", "Lima: 20 C")
    assert (end["outcome"], end["text"], end["error"]) == ("done", "It is 20.", None)


def test_until_ends_the_answer_that_follows_a_tool(fake_ollama: FakeOllama, tools: Path) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply.endless_chat(0.001))
    arguments = ["--host", fake_ollama.url, "chat", "fake", "--tools", "mytools:weather", "--until", "chars=12"]
    result = spawn(*arguments, input="Weather?\n", cwd=tools)
    assert (result.returncode, result.stdout) == (0, "This answer comes\n")
    assert result.stderr.startswith("ended by max_chars(12) after ")
    assert fake_ollama.requests[-1].json()["messages"][-1]["content"] == "Lima: 20 C"
    assert fake_ollama.requests[-1].connection.wait_left()


def test_a_model_that_only_calls_tools(fake_ollama: FakeOllama, tools: Path) -> None:
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), always=True)
    arguments = ["--host", fake_ollama.url, "chat", "fake", "--tools", "mytools:weather"]
    result = spawn(*arguments, input="Weather?\n", cwd=tools)
    assert (result.returncode, result.stdout.strip()) == (1, "")
    assert result.stderr.startswith("Error: the run ended without an answer: max_turns=10")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mytools", "write it as module:function"),
        ("nothing:weather", "ModuleNotFoundError"),
        ("mytools:nothing", "AttributeError"),
        ("mytools:data", "an agent calls its tools itself"),
        ("mytools:needs_object", "its object"),
    ],
)
def test_tools_that_cannot_be_loaded(fake_ollama: FakeOllama, tools: Path, name: str, error: str) -> None:
    result = spawn("--host", fake_ollama.url, "chat", "fake", "--tools", name, input="Hi\n", cwd=tools)
    assert result.returncode == 2
    assert error in " ".join(result.stderr.replace("│", " ").split())
    assert fake_ollama.requests == ()
