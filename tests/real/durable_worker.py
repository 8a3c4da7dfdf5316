"""A process that produces answers, to be frozen and killed: `durable_worker.py REDIS OLLAMA COUNT LEASE`."""

import asyncio
import sys

from ollama_async import AsyncClient
from ollama_async.durable import DurableAnswers


async def main(redis: str, ollama: str, count: str, lease: str) -> None:
    async with AsyncClient(ollama) as client, DurableAnswers.from_url(redis, lease=float(lease), keep=60) as answers:
        begun = [
            await answers.begin(client.chat("fake", "hi", stream=True), str(number), owner="ann", on_end=print)
            for number in range(int(count))
        ]
        print("begun", flush=True)
        for answer in begun:
            await answer.wait()
        await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:]))
