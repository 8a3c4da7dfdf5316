"""The web program of docs/tutorial.md and the browser's half of docs/stop-button.md, together in a real Chromium.

No test here has an event loop: see `real.chromium`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from programs import BOUND, running
from real.chromium import chromium, find_chromium
from real.needs import needs
from snippets import blocks

from ollama_async.testing import FakeOllama, Reply

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.browser

ASK = """() => {
    window.stopButton = {};
    window.shown = [];
    %s
    const show = (name, data) => shown.push([name, data]);
    ask("Tell me a long story.", show).catch((error) => show("error", error));
}"""


def block(page: str, language: str, having: str) -> str:
    [code] = [code for path, _, _, of, code in blocks() if path.name == page and of == language and having in code]
    return code


def test_the_stop_button_of_the_documentation_stops_the_answer(tmp_path: Path) -> None:
    binary = find_chromium()
    if binary is None:
        needs("a Chromium", how="run .ci/install-parts (Debian), or set OLLAMA_ASYNC_TEST_CHROMIUM")
    (tmp_path / "app.py").write_text(block("tutorial.md", "python", "stop_route("), "utf-8")
    with FakeOllama(models=["llama3.2"]) as server, chromium(binary) as browser:
        server.script("/api/chat", Reply.endless_chat(0.02), always=True)
        command = ("-m", "uvicorn", "--app-dir", str(tmp_path), "app:app", "--port", "0")
        with running(*command, OLLAMA_HOST=server.url) as program:
            url = program.said(r"running on (http://\S+)")[1]
            page = browser.new_page(extra_http_headers={"X-User": "ann"})
            page.set_default_timeout(BOUND * 1000)
            page.goto(f"{url}/openapi.json")  # any page of the same origin
            page.evaluate(ASK % block("stop-button.md", "javascript", "async function ask"))
            page.wait_for_function("shown.some(([name]) => name === 'chunk')")
            assert page.evaluate("stopButton.onclick().then((response) => response.json())") == {"stopped": True}
            page.wait_for_function("shown.at(-1)[0] !== 'chunk'")
            name, data = page.evaluate("shown.at(-1)")
            assert (name, data["outcome"]) == ("end", "aborted")
            assert data["text"].startswith(
                page.evaluate("shown.find(([name]) => name === 'chunk')")[1]["message"]["content"]
            )
            assert server.connections[0].wait_left(BOUND)
