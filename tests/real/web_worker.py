"""A web server of its own process, that streams answers and stops them through Redis.

python web_worker.py REDIS_URL OLLAMA_URL     prints its port when it listens
"""

import contextlib
import socket
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from ollama_async import AsyncClient
from ollama_async.asgi import StreamResponse, stop_route
from ollama_async.registry import AbortRegistry

client = AsyncClient(sys.argv[2])
registry = AbortRegistry.from_url(sys.argv[1])


async def chat(request: Request) -> StreamResponse:
    body = await request.json()
    stream = client.chat(body["model"], body["messages"], stream=True)
    return StreamResponse(stream, registry=registry)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with client, registry:
        yield


app = Starlette(
    routes=[Route("/chat", chat, methods=["POST"]), stop_route("/stop", registry)],
    lifespan=lifespan,
)

with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, backlog=2048)
    uvicorn.Server(config).run(sockets=[listener])
