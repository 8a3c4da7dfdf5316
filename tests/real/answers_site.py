"""A site that serves durable answers, in a thread, over a network that does as it is told."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Self

import uvicorn
from serving import port_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_async import AsyncClient
from ollama_async.asgi import StreamResponse, attach_route, list_route, module_route, stop_route
from ollama_async.durable import DurableAnswers, Result

BOUND = 30.0

PAGE = """<!doctype html>
<meta charset="utf-8"><link rel="icon" href="data:,">
<form id="form"><input name="text"></form><button id="stop">Stop</button><pre id="page"></pre>
<script type="module">
  import * as module from "/answers.js";
  Object.assign(window, module);
  window.answers = new Answers("/answers");
  window.states = [];
  /** Write what comes of an answer into the page, and return how it ended. */
  window.watch = async (answer) => {
    answer.onstate = (state) => states.push(state);
    for await (const { name, data } of answer) {
      if (name === "chunk") page.append(data.message.content ?? "");
      if (name === "end") return data.outcome;
    }
    return "detached";
  };
  /** Return what is wrong with an answer. */
  window.wrong = (answer) => watch(answer).then(
    (outcome) => ({ outcome }), ({ name, message, status, code }) => ({ name, message, status, code }));
</script>
"""


class Fault(NamedTuple):
    """What happens to one request for an answer, or for a Stop.

    Attributes:
        status: it is answered with this, by something before the server.
        passes: the server gets it, which nobody waits for.
        bytes: so many bytes of its response get through, then the connection is closed; -1 for none of the request.
        hang: in place of that, the connection stays open, and is silent.
    """

    status: int = 0
    passes: bool = False
    bytes: int | None = None
    hang: bool = False


class Site:
    """The site.

    Attributes:
        url: where it is.
        requests: what came, as "METHOD path?query".
        faults: what happens to the next requests under /chat and /answers/, one after the other.
        results: how answers ended.
        head: more of the page's HTML.
    """

    def __init__(self, ollama: str, **options: Any) -> None:
        self.url = ""
        self.head = ""
        self.requests: list[str] = []
        self.faults: deque[Fault] = deque()
        self.results: list[Result] = []
        self._ollama = ollama
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(BOUND)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(BOUND)
        assert not self._thread.is_alive()

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Do something in the site's loop."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(BOUND)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.answers = DurableAnswers.from_url("memory://", on_end=self.results.append, **self._options)
        async with AsyncClient(self._ollama) as client, self.answers:
            config = uvicorn.Config(
                self._app(client), port=0, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=5
            )
            self._server = uvicorn.Server(config)
            # Not serve(), which takes the process's signals.
            serving = asyncio.create_task(self._server._serve())
            while not self._server.started:
                await asyncio.sleep(0.001)
            self.url = f"http://127.0.0.1:{port_of(self._server)}"
            self._started.set()
            await serving

    def _app(self, client: AsyncClient) -> ASGIApp:
        def user(request: Request) -> str:
            return request.cookies.get("user", "")

        async def page(_: Request) -> Response:
            return HTMLResponse(PAGE + self.head)

        async def chat(request: Request) -> Response:
            question = await request.json()
            stream = client.chat("fake", question["text"], stream=True)
            return StreamResponse(stream, answers=self.answers, owner=user(request), on_leave="continue", heartbeat=0.2)

        routes = [
            Route("/", page),
            module_route("/answers.js"),
            list_route("/answers", self.answers, owner=user),
            attach_route("/answers", self.answers, owner=user),
            stop_route("/answers", self.answers.registry, owner=user),
            Route("/chat", chat, methods=["POST"]),
        ]
        return _Network(Starlette(routes=routes), self)


class _Network:
    def __init__(self, app: ASGIApp, site: Site) -> None:
        self._app = app
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, query = scope["path"], scope["query_string"].decode()
        self._site.requests.append(f"{scope['method']} {path}{'?' if query else ''}{query}")
        if not path.startswith(("/answers/", "/chat")) or not self._site.faults:
            await self._app(scope, receive, send)
            return
        fault = self._site.faults.popleft()
        connection: Any = getattr(receive, "__self__", None)
        if fault.status:
            received = await receive()
            await HTMLResponse("<p>not now", fault.status)(scope, receive, send)
            if fault.passes:
                await self._app(scope, _once(received), _nowhere)
            return
        left = fault.bytes
        if left is not None and left < 0:
            connection.transport.close()
            return

        async def limited(message: Message) -> None:
            nonlocal left
            body = message.get("body", b"")
            if left is None or (message["type"] == "http.response.start" and left):
                await send(message)
                return
            if len(body) < left:
                left -= len(body)
                await send(message)
                return
            if left:
                await send({"type": "http.response.body", "body": body[:left], "more_body": True})
            left = 0
            if not fault.hang:
                connection.transport.close()
            while not connection.transport.is_closing():
                await asyncio.sleep(0.01)

        await self._app(scope, receive, limited)


def _once(message: Message) -> Receive:
    """Give a request's body, then nothing but that the client has left."""
    messages = deque([message])

    async def receive() -> Message:
        return messages.popleft() if messages else {"type": "http.disconnect"}

    return receive


async def _nowhere(_: Message) -> None:
    pass
