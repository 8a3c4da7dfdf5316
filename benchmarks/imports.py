"""How long the import takes, beside that of httpx and pydantic alone; in processes of its own, by turns."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys

PROGRAMS = {
    "nothing": "pass",
    "httpx and pydantic": "import httpx, pydantic; pydantic.BaseModel",
    "httpx, pydantic, one model": "import httpx, pydantic\nclass Model(pydantic.BaseModel):\n    field: int",
    "ollama_async": "import ollama_async",
    "ollama_async, its client": "from ollama_async import AsyncClient",
    "ollama-python": "import ollama",
    "openai": "import openai",
}


def cpu_ms(program: str) -> float:
    # Where a package is installed its byte code is there after the first import.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    seen: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(rounds + 1):
        for name, program in PROGRAMS.items():
            took = cpu_ms(program)
            if turn:  # the first one writes byte code
                seen[name].append(took)
    nothing = statistics.median(seen.pop("nothing"))
    return {name: {"cpu_ms": [took - nothing for took in all_of_it]} for name, all_of_it in seen.items()}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 9)))
