"""Answers as jobs in a queue: docket runs them, Redis has what came of each, and a Stop reaches them anywhere.

python examples/queue_docket.py work                  a worker; start as many as you like, on any machine
python examples/queue_docket.py ask ID QUESTION       put a job in the queue, and show its answer as it comes
python examples/queue_docket.py stop ID               stop it, whether it waits in the queue or runs

REDIS_URL names the Redis server, OLLAMA_HOST the Ollama server of the workers. Needs pydocket and ollama-async[redis].
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from datetime import timedelta
from typing import Any

from docket import Docket, Worker

from ollama_async import AsyncClient
from ollama_async.durable import AnswerInUse, DurableAnswers, UnknownAnswer
from ollama_async.registry import AbortRegistry

REDIS = os.environ.get("REDIS_URL", "redis://localhost")
MODEL = os.environ.get("OLLAMA_MODEL", "llama3.2")
LEASE = float(os.environ.get("LEASE", "15"))  # seconds after which a worker without a sign of life is taken for dead
DAY = 86_400.0  # longer than a job waits in the queue, and than it takes until a dead worker's job is delivered again

client = AsyncClient()
registry = AbortRegistry.from_url(REDIS, ttl=DAY)
answers = DurableAnswers.from_url(REDIS, registry=registry, keep=DAY, lease=LEASE)


async def answer(job_id: str, question: str) -> dict[str, Any]:
    """The job. Its id is the id of its log and of its token: whoever knows it can watch the answer, and stop it."""
    try:
        begun = await answers.begin(client.chat(MODEL, question, stream=True), job_id)
    except AnswerInUse:  # delivered again: the model has been asked
        return await watch(job_id)
    try:
        await begun.wait()
    finally:
        begun.stop("the queue cancelled the job")  # after the answer's end this changes nothing
    return await watch(job_id)


async def watch(job_id: str, *, show: bool = False) -> dict[str, Any]:
    """Read an answer from its start to its end, wherever it is produced."""
    end: dict[str, Any] = {}
    async with await answers.attach(job_id) as viewer:
        async for event in viewer:
            if event.name == "end":
                end = event.data
            elif event.name == "chunk" and show:
                print(event.data["message"].get("content", ""), end="", flush=True)
    return {key: end[key] for key in ("text", "outcome", "reason", "error")}


async def work(docket: Docket) -> None:
    async with Worker(docket, concurrency=4, redelivery_timeout=timedelta(seconds=2 * LEASE)) as worker:
        running = asyncio.create_task(worker.run_forever())

        def end() -> None:
            running.cancel()  # docket takes no more jobs, and waits for those that run
            client.abort("the worker ends")

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end)
        print("ready", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def ask(docket: Docket, job_id: str, question: str) -> None:
    # No Retry: a job that failed has its text and its reason, and asking the model again is your decision.
    await docket.add(answer, key=job_id)(job_id, question)
    while True:
        try:
            result = await watch(job_id, show=True)
            break
        except UnknownAnswer:  # still in the queue
            await asyncio.sleep(0.1)
    print(json.dumps(result))


async def main(command: str, *given: str) -> None:
    async with client, registry, answers, Docket(name="answers", url=REDIS) as docket:
        docket.register(answer)
        if command == "work":
            await work(docket)
        elif command == "ask":
            await ask(docket, *given)
        else:
            print(await answers.stop(*given, reason="Stop was pressed"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
