"""What a prompt of a batch costs: rows of a file to lines of a file, 16 calls at once, answers of three tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import Figures, Peer, cpu_seconds, measure_once

from ollama_async import Host
from ollama_async.batch import batch

AT_ONCE = 16


async def measure(_: Peer, url: str, prompts: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(f'{{"prompt": "say {number}"}}\n' for number in range(prompts)))
        cpu = cpu_seconds()
        result = await batch(source, Path(folder, "out.jsonl"), pool=Host(url, slots=AT_ONCE), model="burst-3")
        assert result.done == prompts
        return {"cpu_us_per_prompt": (cpu_seconds() - cpu) / prompts * 1e6}


if __name__ == "__main__":
    measure_once(measure)
