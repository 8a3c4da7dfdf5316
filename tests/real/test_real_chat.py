"""Esc in the interactive chat, on a terminal, seen from a real Ollama server."""

import contextlib
from pathlib import Path

import pytest
from cli.terminal import CTRL_C, ESC, Screen
from real.ollama_server import RealOllama

pytestmark = pytest.mark.real


@pytest.mark.parametrize("key", [ESC, CTRL_C], ids=["esc", "ctrl-c"])
def test_a_key_ends_the_request_and_the_model_rests(real_ollama: RealOllama, tmp_path: Path, key: str) -> None:
    mark, before = real_ollama.mark(), real_ollama.client_connections()
    endless = ("--option", "num_predict=-1", "--option", "num_thread=1")
    arguments = ("--host", real_ollama.url, "chat", real_ollama.model, *endless)
    with contextlib.closing(Screen(*arguments, XDG_STATE_HOME=str(tmp_path))) as shown:
        shown.says("hi")
        shown.shows(r"answering: \d+ tokens, ")
        assert real_ollama.request_ends(mark, "/api/chat") == []
        shown.type(key)
        real_ollama.wait_for_request_end(mark, "/api/chat", timeout=20)
        real_ollama.wait_for_connections(before, timeout=20)
        real_ollama.wait_until_idle(timeout=20)
        shown.shows(r"stopped by you after \d+ tokens in \d+\.\d s; the partial answer is kept")
        shown.says("/quit")
        assert shown.wait() == 0
