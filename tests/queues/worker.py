"""A worker that runs the recipe of an engine: `worker.py ENGINE FOLDER`; the folder has its modules."""

import asyncio
import importlib
import os
import signal
import sys
from contextlib import AsyncExitStack
from types import ModuleType


async def saq(recipe: ModuleType) -> None:
    from saq import Queue, Worker

    queue = Queue.from_url(os.environ["REDIS_URL"])
    worker = Worker(queue, [("job", recipe.job)], concurrency=4, dequeue_timeout=1)
    print("ready", flush=True)
    await worker.start()


async def procrastinate(recipe: ModuleType) -> None:
    async with recipe.app.open_async():
        print("ready", flush=True)
        await recipe.app.run_worker_async(concurrency=4, shutdown_graceful_timeout=0)


async def temporal(recipe: ModuleType) -> None:
    from temporalio.client import Client
    from temporalio.worker import Worker

    server = await Client.connect(os.environ["TEMPORAL"])
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    async with Worker(
        server,
        task_queue=os.environ["QUEUE"],
        workflows=[recipe.Answer],
        activities=[recipe.answer],
        max_concurrent_activities=4,
    ):
        print("ready", flush=True)
        await told_to_end.wait()


async def main(engine: str, folder: str) -> None:
    sys.path.insert(0, folder)
    recipe = importlib.import_module("recipe")
    connections = importlib.import_module("connections") if engine == "temporal" else recipe
    async with AsyncExitStack() as stack:
        for connection in (connections.client, connections.registry, connections.answers):
            await stack.enter_async_context(connection)
        await globals()[engine](recipe)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
