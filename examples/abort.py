"""Stop an answer from another task, and keep what had come.

python examples/abort.py [MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import sys

from ollama_async import AbortError, AsyncClient, CancelToken

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OLLAMA_MODEL", "llama3.2")


async def press_stop(token: CancelToken) -> None:
    await asyncio.sleep(1)
    token.abort("the user pressed Stop")
    # Here the socket has been shut down, and the loop below gets no further chunk.


async def main() -> None:
    token = CancelToken()
    async with AsyncClient() as client:
        stream = client.chat(MODEL, "Tell me a long story.", stream=True, token=token)
        button = asyncio.create_task(press_stop(token))
        try:
            async for chunk in stream:
                print(chunk.message.content, end="", flush=True)
        except AbortError as error:
            print(f"\n[{error.reason}; kept {len(stream.text)} characters]")
        button.cancel()


asyncio.run(main())
