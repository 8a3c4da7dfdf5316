"""Give an answer a limited time, and keep what had come.

python examples/timeout.py [MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import sys

from ollama_async import AsyncClient

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OLLAMA_MODEL", "llama3.2")


async def main() -> None:
    async with AsyncClient() as client:
        stream = client.chat(MODEL, "Tell me a long story.", stream=True)
        try:
            async with asyncio.timeout(1):
                async for chunk in stream:
                    print(chunk.message.content, end="", flush=True)
        except TimeoutError:
            print(f"\n[time is up; kept {len(stream.text)} characters]")


asyncio.run(main())
