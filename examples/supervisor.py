"""Answer questions one after the other, three at a time; on SIGTERM or Ctrl-C abort all of them, and keep what came.

python examples/supervisor.py [MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

from ollama_async import AbortError, AsyncClient, CancelToken

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OLLAMA_MODEL", "llama3.2")


async def work(client: AsyncClient, questions: Iterator[str]) -> None:
    for question in questions:
        stream = client.chat(MODEL, question, stream=True)
        try:
            await stream.collect()
        except AbortError as error:
            print(f"{question} {error}; kept {len(stream.text)} characters", flush=True)
            return
        print(f"{question} {stream.text}", flush=True)


async def main() -> None:
    shutdown = CancelToken()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A signal that comes just before the loop goes to sleep wakes it only if the loop knows of the signal.
        loop.add_signal_handler(number, lambda: None)
        # In the very handler: the sockets are closed when it returns, whatever the event loop is busy with.
        signal.signal(number, lambda *_: shutdown.abort("the service is shutting down"))
    questions = iter([f"What is {number} times {number}?" for number in range(1, 7)])
    async with AsyncClient(token=shutdown) as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(work(client, questions))
    print("all workers are done")


asyncio.run(main())
