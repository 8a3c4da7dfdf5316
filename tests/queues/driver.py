"""Puts a job in the queue, says so, and waits to be killed: `driver.py ENGINE FOLDER ID`."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from queues import engines


async def main(engine: str, folder: str, job_id: str) -> None:
    async with engines.ENGINES[engine].connected(folder) as queue:
        await queue.submit(job_id)
        print("submitted", flush=True)
        await asyncio.sleep(600)


asyncio.run(main(*sys.argv[1:]))
