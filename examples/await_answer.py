"""Ask, and wait for the whole answer.

python examples/await_answer.py [MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import sys

from ollama_async import AsyncClient

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OLLAMA_MODEL", "llama3.2")


async def main() -> None:
    async with AsyncClient() as client:
        reply = await client.chat(MODEL, "Why is the sky blue?")
        print(reply.message.content)


asyncio.run(main())
