"""Ask, and print the answer as it comes.

python examples/stream_answer.py [MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import sys

from ollama_async import AsyncClient

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OLLAMA_MODEL", "llama3.2")


async def main() -> None:
    async with AsyncClient() as client:
        stream = client.chat(MODEL, "Why is the sky blue?", stream=True)
        async for chunk in stream:
            print(chunk.message.content, end="", flush=True)
        print(f"\n[{stream.outcome}: {stream.timing.chunks} chunks in {stream.timing.total:.1f} s]")


asyncio.run(main())
