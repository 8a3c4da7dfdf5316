"""The engines, as a program sees them that puts jobs in and asks for what came of them.

Where the servers are is in the environment, for tests, workers and drivers alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from queues import recipes

from ollama_async.durable import DurableAnswers, UnknownAnswer

BOUND = 30.0
T = TypeVar("T")


def load(folder: str | Path) -> ModuleType:
    """Import the module that `recipes.write()` wrote into a folder; another folder has another one by that name."""
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("recipe")
    finally:
        sys.path.remove(str(folder))
        for name in ("recipe", "connections"):
            sys.modules.pop(name, None)


async def until(ask: Callable[[], Awaitable[T | None]]) -> T:
    """Ask again and again until there is an answer."""
    end = time.monotonic() + BOUND
    while (said := await ask()) is None:
        assert time.monotonic() < end, "nothing came"
        await asyncio.sleep(0.02)
    return said


class Engine:
    """One engine, connected. A job is named by its id alone: whoever put it in may be dead."""

    name: ClassVar[str]
    package: ClassVar[str]
    # Longer than any limit of the engine, or of the recipe as the tests have it, that is not for an answer.
    limit: ClassVar[float] = 1.0

    @classmethod
    def command(cls, folder: Path) -> list[str | Path]:
        """What starts a worker; it prints `ready`."""
        return [Path(__file__).with_name("worker.py"), cls.name, folder]

    @classmethod
    def connected(cls, folder: str | Path) -> contextlib.AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def submit(self, job_id: str) -> None:
        """Put a job in the queue whose question is its id; a second time with the same id may be refused."""
        raise NotImplementedError

    async def cancel(self, job_id: str) -> None:
        """Cancel it by what the engine has for that."""
        raise NotImplementedError

    async def result(self, job_id: str) -> dict[str, Any]:
        """What the job returned, once it has."""
        raise NotImplementedError

    async def result_of_cancelled(self, job_id: str) -> dict[str, Any]:
        """What is known of a job that the engine was told to cancel."""
        return await self.result(job_id)

    async def result_of_dead(self, job_id: str) -> dict[str, Any]:
        """What is known of a job whose worker is dead, once another worker has taken it."""
        return await self.result(job_id)

    async def kept(self, job_id: str, text: str) -> None:
        """Wait until that text is where it survives the worker."""
        raise NotImplementedError


class WithLog(Engine):
    """One whose jobs are durable answers."""

    def __init__(self, answers: DurableAnswers) -> None:
        self.answers = answers

    @staticmethod
    @asynccontextmanager
    async def log() -> AsyncIterator[DurableAnswers]:
        async with DurableAnswers.from_url(os.environ["REDIS_URL"], lease=recipes.LEASE) as answers:
            yield answers

    async def read(self, job_id: str, text: str | None = None) -> dict[str, Any]:
        """Read the log to its end, or until that text is there."""

        async def attach() -> Any:
            with contextlib.suppress(UnknownAnswer):
                return await self.answers.attach(job_id)
            return None

        read = ""
        async with asyncio.timeout(BOUND), await until(attach) as viewer:
            async for event in viewer:
                if event.name == "chunk":
                    read += event.data["message"]["content"]
                if read == text:
                    return {}
                if event.name == "end":
                    return {key: event.data[key] for key in ("text", "outcome", "reason", "error")}
        raise AssertionError("a log without an end")

    async def result_of_cancelled(self, job_id: str) -> dict[str, Any]:
        return await self.read(job_id)

    async def kept(self, job_id: str, text: str) -> None:
        await self.read(job_id, text)


class Docket(WithLog):
    """Through the example: its worker, its job."""

    name = "docket"
    package = "docket"

    @classmethod
    def command(cls, folder: Path) -> list[str | Path]:
        return [recipes.EXAMPLE, "work"]

    @classmethod
    @asynccontextmanager
    async def connected(cls, folder: str | Path) -> AsyncIterator[Docket]:
        import docket

        async def answer(job_id: str, question: str) -> dict[str, Any]:
            raise NotImplementedError("it runs in the worker")

        async with cls.log() as answers, docket.Docket(name="answers", url=os.environ["REDIS_URL"]) as queue:
            made = cls(answers)
            made.queue, made.answer = queue, answer
            queue.register(answer)
            yield made

    queue: Any
    answer: Any

    async def submit(self, job_id: str) -> None:
        await self.queue.add(self.answer, key=job_id)(job_id, job_id)

    async def cancel(self, job_id: str) -> None:
        await self.queue.cancel(job_id)

    async def result(self, job_id: str) -> dict[str, Any]:
        execution = await self.queue.get_execution(job_id)
        result: dict[str, Any] = await asyncio.wait_for(execution.get_result(), BOUND)
        return result


class Saq(WithLog):
    name = "saq"
    package = "saq"
    limit = 11.0  # a job has 10 s unless it is given more

    recipe: ModuleType
    queue: Any

    @classmethod
    @asynccontextmanager
    async def connected(cls, folder: str | Path) -> AsyncIterator[Saq]:
        import saq

        async with cls.log() as answers:
            made = cls(answers)
            made.recipe = load(folder)
            made.queue = saq.Queue.from_url(os.environ["REDIS_URL"])
            await made.queue.connect()
            try:
                yield made
            finally:
                await made.queue.disconnect()

    async def submit(self, job_id: str) -> None:
        await self.recipe.ask(self.queue, job_id, job_id)

    async def cancel(self, job_id: str) -> None:
        await (await self.queue.job(job_id)).abort("cancelled")

    async def result(self, job_id: str) -> dict[str, Any]:
        # Not refresh(until_complete=...): that waits for ever for a job that ends before it has begun to listen.
        async def ended() -> Any:
            job = await self.queue.job(job_id)
            return job if job.completed and job.error != "swept" else None  # such a job is run again

        job = await until(ended)
        assert job.error is None, job.error
        result: dict[str, Any] = job.result
        return result

    async def result_of_dead(self, job_id: str) -> dict[str, Any]:
        in_the_log = await self.read(job_id)
        await self.sweep(job_id)  # in place of an hour
        assert await self.result(job_id) == in_the_log
        return in_the_log

    async def sweep(self, job_id: str) -> None:
        """Have it swept as when its worker has not yet said that it runs, by this sweep or the worker's."""

        async def swept() -> bool | None:
            job = await self.queue.job(job_id)
            if job.error == "swept" and job.status != "aborting":
                return True
            job.status = "queued"
            await self.queue.redis.set(job.id, self.queue.serialize(job))
            await self.queue.redis.delete(self.queue._sweep)  # there is one sweep a minute
            await self.queue.sweep()
            return None

        await until(swept)


class Procrastinate(WithLog):
    name = "procrastinate"
    package = "procrastinate"

    recipe: ModuleType

    @classmethod
    @asynccontextmanager
    async def connected(cls, folder: str | Path) -> AsyncIterator[Procrastinate]:
        async with cls.log() as answers:
            made = cls(answers)
            made.recipe = load(folder)
            async with made.recipe.app.open_async():
                yield made

    async def submit(self, job_id: str) -> None:
        await self.recipe.ask(job_id, job_id)

    async def _jobs(self, job_id: str) -> list[Any]:
        jobs = await self.recipe.app.job_manager.list_jobs_async()
        return [job for job in jobs if job.task_kwargs["job_id"] == job_id]

    async def cancel(self, job_id: str) -> None:
        [job] = await self._jobs(job_id)
        assert await self.recipe.app.job_manager.cancel_job_by_id_async(job.id, abort=True)

    async def result(self, job_id: str) -> dict[str, Any]:
        async def ended() -> Any:
            jobs = await self._jobs(job_id)
            return jobs if jobs and all(job.status in {"succeeded", "failed", "aborted"} for job in jobs) else None

        jobs = await until(ended)
        assert all(job.status != "failed" for job in jobs), jobs
        return await self.read(job_id)

    async def result_of_dead(self, job_id: str) -> dict[str, Any]:
        # What its page on stalled jobs says, without the wait.
        manager = self.recipe.app.job_manager
        stalled = list(await manager.get_stalled_jobs(seconds_since_heartbeat=0))
        assert [job.task_kwargs["job_id"] for job in stalled] == [job_id]
        await manager.retry_job(stalled[0])
        return await self.result(job_id)


class Temporal(Engine):
    name = "temporal"
    package = "temporalio"
    limit = 6.0  # two times what a worker may be silent

    recipe: ModuleType
    server: Any

    @classmethod
    @asynccontextmanager
    async def connected(cls, folder: str | Path) -> AsyncIterator[Temporal]:
        from temporalio.client import Client

        made = cls()
        made.recipe = load(folder)
        made.server = await Client.connect(os.environ["TEMPORAL"])
        yield made

    async def submit(self, job_id: str) -> None:
        from temporalio.exceptions import WorkflowAlreadyStartedError

        with contextlib.suppress(WorkflowAlreadyStartedError):
            await self.recipe.ask(self.server, job_id, job_id)

    async def cancel(self, job_id: str) -> None:
        await self.server.get_workflow_handle(job_id).cancel()

    async def result(self, job_id: str) -> dict[str, Any]:
        handle = self.server.get_workflow_handle(job_id)
        result: dict[str, Any] = await asyncio.wait_for(handle.result(), BOUND)
        return result

    async def kept(self, job_id: str, text: str) -> None:
        handle = self.server.get_workflow_handle(job_id)

        async def heard() -> bool | None:
            pending = (await handle.describe()).raw_description.pending_activities
            texts = [
                self.server.data_converter.payload_converter.from_payloads(one.heartbeat_details.payloads)
                for one in pending
            ]
            return True if [text] in texts else None

        await until(heard)


ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Docket, Saq, Procrastinate, Temporal)}
