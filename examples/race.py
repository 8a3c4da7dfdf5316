"""Ask two models: the first whole answer wins, the other one is aborted.

python examples/race.py [MODEL MODEL]     (the server is the one in OLLAMA_HOST, else the local one)
"""

import asyncio
import os
import sys

from ollama_async import AbortError, AsyncClient, CancelToken, ChatResponse

MODELS = sys.argv[1:] or os.environ.get("OLLAMA_MODEL", "llama3.2 qwen3").split()


async def race(client: AsyncClient, models: list[str], question: str) -> ChatResponse:
    token = CancelToken()  # one for all: the winner's own answer is complete, so its abort ends only the others
    winner: list[ChatResponse] = []

    async def run(model: str) -> None:
        stream = client.chat(model, question, stream=True, token=token)
        try:
            reply = await stream.collect()
        except AbortError as error:
            print(f"{model} lost: {error.reason}; it had written {len(stream.text)} characters")
            return
        if token.abort(f"{model} was faster"):  # True for one call only, whoever comes first
            winner.append(reply)

    async with asyncio.TaskGroup() as group:
        for model in models:
            group.create_task(run(model))
    return winner[0]


async def main() -> None:
    async with AsyncClient() as client:
        reply = await race(client, MODELS, "Why is the sky blue?")
        print(f"{reply.model} won: {reply.message.content}")


asyncio.run(main())
