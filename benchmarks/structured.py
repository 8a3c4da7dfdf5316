"""How many tokens it saves to close the connection when the JSON is whole (ollama#4446), on a real server and model.

``python benchmarks/structured.py --model NAME [--host URL] [--gguf FILE]``; the model is made of FILE first, if given.
Each prompt is answered twice, at temperature 0: read to its end, and by ``objects()``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from pydantic import BaseModel

from ollama_async import AsyncClient, GenerateResponse, Stream

PROMPTS = ["Peru", "Canada", "Japan", "Kenya", "Norway"]
# As a model that follows no instructions has to be asked.
EXAMPLES = """Each country as one line of JSON.
France: {"name": "France", "capital": "Paris", "languages": ["French"]}
Austria: {"name": "Austria", "capital": "Vienna", "languages": ["German"]}
"""


class Country(BaseModel):
    """What the model is asked for, with a schema."""

    name: str
    capital: str
    languages: list[str]


async def measure(
    client: AsyncClient, given: argparse.Namespace, kind: Any, prompt: str
) -> tuple[int, float, int, float] | None:
    """Return tokens and seconds to the end, and until the object is whole; None if it never is."""
    asked = f"{EXAMPLES}{prompt}:"

    def stream() -> Stream[GenerateResponse]:
        options = {"temperature": 0, "seed": 1, "num_predict": given.num_predict}
        answer: Stream[GenerateResponse] = client.generate(
            given.model, asked, format=kind, options=options, stream=True
        )
        return answer

    began = time.monotonic()
    whole = await stream().collect()
    to_the_end = time.monotonic() - began
    print(f"  {prompt} {whole.done_reason}: {whole.text!r}")
    closed, began = stream(), time.monotonic()
    try:
        async for _ in closed.objects():
            pass
    except ValueError as exc:
        print(f"  {prompt} {exc}")
        return None
    return whole.eval_count, to_the_end, closed.timing.chunks, time.monotonic() - began


async def main() -> None:
    """Measure with a schema and with format="json"."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True)
    options.add_argument("--host")
    options.add_argument("--gguf")
    options.add_argument("--prompts", type=int, default=len(PROMPTS))
    options.add_argument("--num-predict", type=int, default=300)
    given = options.parse_args()
    async with AsyncClient(given.host) as client:
        if given.gguf:
            await client.create_from(given.model, given.gguf)
        await client.generate(given.model, "")
        for name, kind in (("a schema", Country), ('"json"', "json")):
            found = [await measure(client, given, kind, prompt) for prompt in PROMPTS[: given.prompts]]
            rows = [row for row in found if row is not None]
            if not rows:
                print(f"format={name}: no answer was whole")
                continue
            tokens, seconds, kept, kept_seconds = (sum(column) for column in zip(*rows, strict=True))
            print(
                f"format={name}: {len(rows)} of {len(found)} answers whole; {tokens} tokens in {seconds:.1f} s to the "
                f"end, {kept} in {kept_seconds:.1f} s with objects(): {1 - kept / tokens:.0%} of the tokens saved"
            )


asyncio.run(main())
