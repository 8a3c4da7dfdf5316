"""Answers of a real Ollama server, served to clients that leave: its log says when it has noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from real.ollama_server import RealOllama
from serving import BOUND, Tab, events, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from ollama_async import AsyncClient
from ollama_async.asgi import ID_HEADER, StreamResponse, stop_route
from ollama_async.registry import AbortRegistry

pytestmark = pytest.mark.real

ENDLESS = {"num_predict": -1, "num_thread": 1}


@pytest_asyncio.fixture
async def port(real_ollama: RealOllama) -> AsyncIterator[int]:
    async with AsyncClient(real_ollama.url) as client, AbortRegistry.from_url("memory://") as registry:

        async def chat(request: Request) -> StreamResponse:
            body = await request.json()
            options = {**ENDLESS, **body.get("options", {})}
            stream = client.chat(real_ollama.model, body["prompt"], stream=True, options=options)
            return StreamResponse(stream, registry=registry)

        routes = [Route("/chat", chat, methods=["POST"]), stop_route("/stop", registry)]
        async with served(Starlette(routes=routes)) as made:
            yield made


async def saw_end(server: RealOllama, mark: int, before: int) -> None:
    """Wait until the server has logged the request's end, and its connection is gone."""
    await asyncio.to_thread(server.wait_for_request_end, mark, timeout=BOUND)
    await asyncio.to_thread(server.wait_for_connections, before, timeout=BOUND)


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_leaves_in_the_middle_of_the_answer(real_ollama: RealOllama, port: int, how: Any) -> None:
    # Those that the fixture has used may be on their way out.
    await asyncio.to_thread(real_ollama.wait_for_connections, 0, timeout=BOUND)
    mark, before = real_ollama.mark(), 0
    tab = await Tab.ask(port, "/chat", {"prompt": "hi"})
    await tab.until("event: chunk")
    assert real_ollama.request_ends(mark, "/api/chat") == []
    tab.leave(how)
    await saw_end(real_ollama, mark, before)
    await asyncio.to_thread(real_ollama.wait_until_idle, timeout=BOUND)


async def test_a_client_that_leaves_while_the_model_is_silent(real_ollama: RealOllama, port: int) -> None:
    # Silent because it is loaded first: that is the longest silence there is.
    await asyncio.to_thread(real_ollama.unload)
    # Those that the fixture has used may be on their way out.
    await asyncio.to_thread(real_ollama.wait_for_connections, 0, timeout=BOUND)
    mark, before = real_ollama.mark(), 0
    tab = await Tab.ask(port, "/chat", {"prompt": "hi"})
    await asyncio.to_thread(real_ollama.wait_for_load, mark, timeout=BOUND)
    tab.leave()
    await saw_end(real_ollama, mark, before)


async def test_stop(real_ollama: RealOllama, port: int) -> None:
    # Those that the fixture has used may be on their way out.
    await asyncio.to_thread(real_ollama.wait_for_connections, 0, timeout=BOUND)
    mark, before = real_ollama.mark(), 0
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=BOUND) as browser,
        browser.stream("POST", "/chat", json={"prompt": "hi"}) as response,
    ):
        blocks = response.aiter_text()
        seen = await anext(blocks) + await anext(blocks)
        stopped = await browser.post(f"/stop/{response.headers[ID_HEADER]}", json={"reason": "enough"})
        assert stopped.json() == {"stopped": True}
        await saw_end(real_ollama, mark, before)
        seen += "".join([block async for block in blocks])
    name, end = events(seen)[-1]
    assert (name, end["outcome"], end["reason"]) == ("end", "aborted", "enough")
    assert end["text"]
