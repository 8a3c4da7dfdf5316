"""Serve a model with FastAPI: a route that streams answers, and one that stops them.

uvicorn --app-dir examples fastapi_stop:app --timeout-graceful-shutdown 5

    curl --no-buffer localhost:8000/chat -H 'X-User: ann' --json '{"model": "llama3.2", "messages":
        [{"role": "user", "content": "Tell me a long story."}]}'
    curl localhost:8000/stop/<the id in its first event> -H 'X-User: ann' --json '{}'

With several processes the Stop may land in another one than the stream. REGISTRY_URL=redis://localhost and --workers 2.
"""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from ollama_async import AsyncClient
from ollama_async.asgi import StreamResponse, stop_route
from ollama_async.registry import AbortRegistry

client = AsyncClient()
registry = AbortRegistry.from_url(os.environ.get("REGISTRY_URL", "memory://"))


def user(request: Request) -> str:
    """Say who asks; in your program, look at the session or the token instead."""
    name = request.headers.get("X-User")
    if not name:
        raise HTTPException(401, "who are you?")
    return name


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # uvicorn waits for open responses before it ends the lifespan, so it is the signal that ends the streams.
    shut_down = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: Any) -> None:
        client.abort("the server is shutting down")
        if callable(shut_down):
            shut_down(number, frame)

    signal.signal(signal.SIGTERM, on_signal)
    async with client, registry:
        yield


app = FastAPI(lifespan=lifespan, routes=[stop_route("/stop", registry, owner=user)])


class Question(BaseModel):
    model: str
    messages: list[dict[str, Any]]


@app.post("/chat")
async def chat(question: Question, request: Request) -> StreamResponse:
    stream = client.chat(question.model, question.messages, stream=True)
    return StreamResponse(stream, registry=registry, owner=user(request))
