"""A web server of durable answers, for uvicorn: `OLLAMA_HOST=... ANSWERS_URL=... uvicorn durable_site:app --workers 2`.

Each response says in `X-Worker` which process it is from.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_async import AsyncClient
from ollama_async.asgi import StreamResponse, attach_route, list_route, stop_route
from ollama_async.durable import DurableAnswers

client = AsyncClient()
answers = DurableAnswers.from_url(os.environ["ANSWERS_URL"], lease=5)
MODEL = os.environ.get("MODEL", "fake")


class Signed:
    """Says which process answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Worker"] = str(os.getpid())
            await send(message)

        await self.app(scope, receive, signed)


def owner(request: Request) -> str:
    return request.headers["X-User"]


async def chat(request: Request) -> Response:
    stream = client.chat(MODEL, "hi", stream=True, options={"num_predict": -1, "num_thread": 1})
    leave = "abort" if "abort" in request.query_params else "continue"
    return StreamResponse(stream, answers=answers, owner=owner(request), on_leave=leave)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with client, answers:
        yield


app = Starlette(
    routes=[
        Route("/chat", chat, methods=["POST"]),
        list_route("/answers", answers, owner=owner),
        attach_route("/answers", answers, owner=owner),
        stop_route("/answers", answers.registry, owner=owner),
    ],
    middleware=[Middleware(Signed)],
    lifespan=lifespan,
)
