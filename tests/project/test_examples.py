"""The examples that do not simply run to their end: a web server, a service that is shut down, a notebook."""

from __future__ import annotations

import ast
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import BOUND, EXAMPLES, QUESTION, last_event, running, serving

from ollama_async.testing import FakeOllama, Reply

# As Jupyter does it: one event loop, in which cell after cell is run.
RUN_NOTEBOOK = """
import asyncio, json, sys
from IPython.core.interactiveshell import InteractiveShell

async def main():
    shell = InteractiveShell.instance()
    for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            ran = await shell.run_cell_async(source, transformed_cell=shell.transform_cell(source))
            ran.raise_error()

asyncio.run(main())
"""


@pytest.fixture
def endless() -> Iterator[FakeOllama]:
    with FakeOllama(models=["llama3.2"], interval=0.01) as server:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
        yield server


def test_fastapi_with_a_stop_route(endless: FakeOllama) -> None:
    with serving(endless) as (program, browser):
        with browser.stream("POST", "/chat", json=QUESTION) as response:
            lines = response.iter_lines()
            while next(lines) != "event: chunk":
                pass
            path = f"/stop/{response.headers['X-Stream-Id']}"
            assert browser.post(path, headers={"X-User": "bob"}).status_code == 404
            assert browser.post(path, json={"reason": "enough"}).json() == {"stopped": True}
            end = last_event(lines)
        assert (end["outcome"], end["reason"]) == ("aborted", "enough")
        assert endless.connections[0].wait_left(BOUND)
        assert browser.post("/chat", json=QUESTION, headers={"X-User": ""}).status_code == 401
        # It can be shut down while it streams.
        with browser.stream("POST", "/chat", json=QUESTION) as response:
            lines = response.iter_lines()
            while next(lines) != "event: chunk":
                pass
            program.process.send_signal(signal.SIGTERM)
            assert last_event(lines)["reason"] == "the server is shutting down"
        program.process.wait(BOUND)
        assert "Traceback" not in program.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_supervisor_aborts_all_on_shutdown(endless: FakeOllama, number: int) -> None:
    with running(str(EXAMPLES / "supervisor.py"), OLLAMA_HOST=endless.url) as program:
        requests = endless.wait_for_requests(3, timeout=BOUND)
        assert program.end(number) == 0, program.output()
        output = program.output()
        for number_, request in enumerate(requests, 1):
            assert request.connection.wait_left(BOUND)
            assert f"What is {number_} times {number_}? aborted: the service is shutting down; kept " in output
        assert output.endswith("all workers are done\n")
        assert len(endless.requests) == 3


def test_a_signal_wakes_the_loop_of_the_supervisor() -> None:
    calls = {
        (node.func.attr, ast.unparse(node.args[0])): node.lineno
        for node in ast.walk(ast.parse((EXAMPLES / "supervisor.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
    }
    # In this order: the loop would replace the handler.
    assert calls["add_signal_handler", "number"] < calls["signal", "number"]


def test_a_supervisor_that_nobody_shuts_down() -> None:
    with FakeOllama(models=["llama3.2"], interval=0) as server:
        with running(str(EXAMPLES / "supervisor.py"), OLLAMA_HOST=server.url) as program:
            assert program.process.wait(BOUND) == 0, program.output()
            assert program.output().count("times") == 6
        assert len(server.requests) == 6


def test_saved_answers_are_in_the_database(tmp_path: Path) -> None:
    database = tmp_path / "conversations.db"
    with FakeOllama(models=["llama3.2"], interval=0) as server:
        server.script("/api/chat", Reply.chat("Be", "cause."), Reply.endless_chat(0.01))
        with running(str(EXAMPLES / "saved_answers.py"), str(database), OLLAMA_HOST=server.url) as program:
            assert program.process.wait(BOUND) == 0, program.output()
            assert "Why is the sky blue? [done] 'Because.'" in program.output()
        assert server.requests[1].connection.wait_left(BOUND)
    connection = sqlite3.connect(database)
    try:
        rows = connection.execute("SELECT owner, question, answer, outcome, reason FROM turns").fetchall()
    finally:
        connection.close()
    whole, partial = rows
    assert whole == ("ann", "Why is the sky blue?", "Because.", "done", None)
    assert partial[3:] == ("aborted", "Stop was pressed")
    assert partial[2].startswith("This answer")


def test_a_notebook(tmp_path: Path) -> None:
    with FakeOllama(models=["llama3.2"], interval=0.01) as server:
        server.script("/api/chat", Reply.json(Reply.chat("Because.").steps[0]), Reply.endless_chat(0.01))
        environment = {"OLLAMA_HOST": server.url, "IPYTHONDIR": str(tmp_path)}
        with running("-c", RUN_NOTEBOOK, str(EXAMPLES / "notebook.ipynb"), **environment) as program:
            assert program.process.wait(BOUND) == 0, program.output()
            output = program.output()
        assert "Because." in output
        assert "aborted: read enough (" in output
        assert server.requests[1].connection.wait_left(BOUND)
