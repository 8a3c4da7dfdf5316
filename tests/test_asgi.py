"""Answers served over HTTP: by a real uvicorn, to clients that read, stop, are slow, and leave.

Of a stop the model's server tells: what the response says of itself proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from serving import BOUND, Tab, events, served
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ollama_async import AsyncClient, RequestError, Timeouts
from ollama_async.asgi import ID_HEADER, StreamResponse, stop_route
from ollama_async.registry import AbortRegistry
from ollama_async.testing import Block, ConnectionRecord, Cut, Endless, FakeOllama, Gate, Reply, Stall

ID = "a-browser-chose-this-one-22"
QUESTION = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
SILENT = Reply(before_head=[Stall()])
# As fast as it is read, in pieces that fill the kernel's buffers soon.
FLOOD = Reply([Endless(lambda _: Reply.chat("x" * 8000, done=False).steps[0], 0)])


@dataclass
class Site:
    """A web application with a chat route and a Stop route; what a test changes is read at each request."""

    fake: FakeOllama
    client: AsyncClient
    registry: AbortRegistry
    port: int = 0
    call: dict[str, Any] = field(default_factory=dict)
    response: dict[str, Any] = field(default_factory=dict)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        stream = self.client.chat(body["model"], body["messages"], stream=True, **self.call)
        return StreamResponse(stream, registry=self.registry, owner=owner(request), **self.response)

    async def generate(self, request: Request) -> Response:
        return StreamResponse(self.client.generate("fake", "hi", stream=True), **self.response)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def model_saw_leave(self) -> ConnectionRecord:
        """Wait until the model's server has seen the client of its last connection leave."""
        connection = self.fake.connections[-1]
        assert await asyncio.to_thread(connection.wait_left, BOUND)
        return connection

    async def model_was_asked(self) -> None:
        await asyncio.to_thread(self.fake.wait_for_requests, 1, timeout=BOUND)


def owner(request: Request) -> str:
    user = request.headers.get("X-User", "")
    if user == "nobody":
        raise HTTPException(401, "who are you?")
    return user


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    with FakeOllama(interval=0) as fake:
        async with AsyncClient(fake.url) as client, AbortRegistry.from_url("memory://") as registry:
            made = Site(fake, client, registry)
            routes = [
                Route("/chat", made.chat, methods=["POST"]),
                Route("/generate", made.generate, methods=["POST"]),
                stop_route("/stop", registry, owner=owner),
            ]
            async with served(Starlette(routes=routes)) as made.port:
                before = asyncio.all_tasks()
                yield made
                await nothing_left(before, registry)


async def nothing_left(before: set[asyncio.Task[Any]], registry: AbortRegistry) -> None:
    """Nothing of any response is left: no task, no registration."""
    async with asyncio.timeout(BOUND):
        while asyncio.all_tasks() - before - {asyncio.current_task()} or await registry.list():
            await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def browser(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=site.url, timeout=BOUND) as made:
        yield made


async def ask(site: Site, path: str = "/chat", **headers: str) -> Tab:
    return await Tab.ask(site.port, path, QUESTION, **headers)


async def end_of(response: httpx.Response) -> dict[str, Any]:
    """Read to the end and return what the last event says."""
    name, data = events((await response.aread()).decode())[-1]
    assert name == "end"
    return dict(data)


# -- what is sent --


async def test_a_chat_as_events(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply.chat("Gr\u00fc\u00df\u2028\n", "Gott", thinking="hm"))
    response = await browser.post("/chat", json=QUESTION)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    (first, opened), *chunks, (last, end) = events(response.text)
    assert (first, last) == ("open", "end")
    assert opened == {"id": response.headers[ID_HEADER]}
    assert len(opened["id"]) >= 22
    assert {name for name, _ in chunks} == {"chunk"}
    assert "".join(chunk["message"].get("content", "") for _, chunk in chunks) == "Gr\u00fc\u00df\u2028\nGott"
    assert chunks[-1][1]["done"] is True
    assert "images" not in chunks[0][1]["message"]  # only what the server sent
    assert list(end) == ["outcome", "reason", "error", "text", "timing", "response"]
    assert (end["outcome"], end["reason"], end["error"]) == ("done", None, None)
    assert end["text"] == end["response"]["message"]["content"] == "Gr\u00fc\u00df\u2028\nGott"
    assert end["response"]["message"]["thinking"] == "hm"
    assert list(end["timing"]) == ["first_chunk", "total", "chunks", "chunks_per_second"]
    assert end["timing"]["chunks"] == len(chunks)


async def test_each_stream_has_an_id_of_its_own(site: Site, browser: httpx.AsyncClient) -> None:
    ids = {(await browser.post("/chat", json=QUESTION)).headers[ID_HEADER] for _ in range(3)}
    assert len(ids) == 3


async def test_an_id_that_the_browser_chose(site: Site, browser: httpx.AsyncClient) -> None:
    response = await browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID})
    assert response.headers[ID_HEADER] == ID
    assert events(response.text)[0] == ("open", {"id": ID})


@pytest.mark.parametrize("bad", ["short", "x" * 129, "../../etc/passwd-and-more", "with spaces in it, and long"])
async def test_an_id_that_could_be_guessed_or_is_no_id(site: Site, browser: httpx.AsyncClient, bad: str) -> None:
    response = await browser.post("/chat", json=QUESTION, headers={ID_HEADER: bad})
    assert response.status_code == 400
    assert ID_HEADER in response.json()["error"]
    assert site.fake.requests == ()
    with pytest.raises(RequestError, match="stream_id"):
        StreamResponse(site.client.chat("fake", "hi", stream=True), stream_id=bad)


async def test_generate_as_lines(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/generate", Reply.generate("Good", " day"))
    site.response = {"format": "ndjson", "headers": {"X-More": "1"}}
    response = await browser.post("/generate")
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["x-more"] == "1"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["event"] for line in lines] == ["open", "chunk", "chunk", "chunk", "end"]
    assert lines[1]["data"]["response"] == "Good"
    assert lines[-1]["data"]["text"] == "Good day"


async def test_a_background_task_runs_when_all_is_sent(site: Site, browser: httpx.AsyncClient) -> None:
    ran = asyncio.Event()
    site.response = {"background": BackgroundTask(ran.set)}
    await browser.post("/chat", json=QUESTION)
    await asyncio.wait_for(ran.wait(), BOUND)


@pytest.mark.parametrize("bad", [{"format": "xml"}, {"heartbeat": 0}, {"head_within": -1}])
async def test_bad_parameters(site: Site, bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        StreamResponse(site.client.chat("fake", "hi", stream=True), **bad)


# -- errors --


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (Reply.error(400, "does not support thinking"), 400, "does not support thinking"),
        (Reply.error(404, "model 'x' not found"), 404, "model 'x' not found"),
        (Reply.error(429, "slowly"), 429, "slowly"),
        (Reply.error(503, "busy"), 503, "busy"),
        # What is wrong between this server and that of the model is nothing that the browser could put right.
        (Reply.error(401, "unauthorized"), 502, "unauthorized"),
        (Reply.error(403, "forbidden"), 502, "forbidden"),
        (Reply.error(500, "the runner crashed"), 502, "the runner crashed"),
        (Reply([Cut()], before_head=[Cut()]), 502, "connection"),
        (Reply(raw=b"HTTP/1.1 nonsense\r\n\r\n"), 502, ""),
    ],
)
async def test_an_error_before_the_first_token_is_an_http_error(
    site: Site, browser: httpx.AsyncClient, reply: Reply, status: int, text: str
) -> None:
    site.fake.script("/api/chat", reply)
    response = await browser.post("/chat", json=QUESTION)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    said = response.json()
    assert said["status_code"] == status
    assert text in said["error"]


async def test_when_to_come_again_is_passed_on(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply([{"error": "busy"}], status=503, headers=[("Retry-After", "7")]))
    assert (await browser.post("/chat", json=QUESTION)).headers["retry-after"] == "7"


async def test_no_server(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.stop()
    response = await browser.post("/chat", json=QUESTION)
    assert response.status_code == 502
    assert "Failed to connect to Ollama" in response.json()["error"]
    assert "127.0.0.1" not in response.text  # where it is is nobody's business


async def test_a_model_that_takes_too_long_is_a_504(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", SILENT)
    site.call = {"timeout": Timeouts(first_chunk=0.05)}
    response = await browser.post("/chat", json=QUESTION)
    assert response.status_code == 504
    assert "first_chunk" in response.json()["error"]


async def test_a_client_that_is_closed_is_a_503(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", SILENT)
    asked = asyncio.create_task(browser.post("/chat", json=QUESTION))
    await site.model_was_asked()
    await site.client.close()
    assert (await asked).status_code == 503


@pytest.mark.parametrize(
    ("reply", "call", "expected"),
    [
        ([{"error": "out of memory"}], {}, {"outcome": "error", "reason": None}),
        ([Cut()], {}, {"outcome": "error", "reason": None}),
        ([Stall()], {"timeout": Timeouts(idle=0.05)}, {"outcome": "timeout", "reason": "idle"}),
    ],
)
async def test_an_error_later_is_in_the_last_event(
    site: Site, browser: httpx.AsyncClient, reply: list[Any], call: dict[str, Any], expected: dict[str, Any]
) -> None:
    site.fake.script("/api/chat", Reply([*Reply.chat("Good", done=False).steps, *reply]))
    site.call = call
    end = await end_of(await browser.post("/chat", json=QUESTION))
    assert expected.items() <= end.items()
    assert end["error"]
    assert end["text"] == "Good"
    assert end["response"]["message"]["content"] == "Good"


async def test_a_stream_without_its_last_chunk(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply.chat("Good", done=False))
    end = await end_of(await browser.post("/chat", json=QUESTION))
    assert (end["outcome"], end["error"], end["text"]) == ("truncated", None, "Good")


# -- the client leaves --


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("registered", [True, False])
async def test_a_client_that_leaves_while_the_prompt_is_read(site: Site, how: Any, registered: bool) -> None:
    site.fake.script("/api/chat", SILENT)
    site.fake.script("/api/generate", SILENT)
    tab = await ask(site, "/chat" if registered else "/generate")
    await site.model_was_asked()
    tab.leave(how)
    await site.model_saw_leave()


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_leaves_in_the_middle_of_the_answer(site: Site, how: Any) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    tab = await ask(site)
    await tab.until("event: chunk")
    tab.leave(how)
    assert (await site.model_saw_leave()).bytes_after_left == 0


async def test_a_client_that_leaves_while_the_model_is_silent(site: Site) -> None:
    site.fake.script("/api/chat", Reply([*Reply.chat("Good", done=False).steps, Stall()]))
    tab = await ask(site)
    await tab.until("Good")
    tab.leave()
    await site.model_saw_leave()


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_leaves_without_having_read(site: Site, how: Any) -> None:
    site.fake.script("/api/chat", FLOOD)
    tab = await ask(site)
    await standstill(site)
    tab.leave(how)
    await site.model_saw_leave()


async def test_a_slow_browser_slows_the_model_down(site: Site) -> None:
    site.fake.script("/api/chat", FLOOD)
    tab = await ask(site)
    sent = await standstill(site)
    # It goes on when the browser reads on.
    async with asyncio.timeout(BOUND):
        while site.fake.connections[-1].bytes_sent == sent:
            await tab.reader.read(100_000)
    tab.leave()


async def standstill(site: Site) -> int:
    """Wait until the model's server cannot send any more; return how many bytes it has sent."""
    await site.model_was_asked()
    before, since = -1, 0
    async with asyncio.timeout(BOUND):
        while since < 25:
            sent = site.fake.connections[-1].bytes_sent
            before, since = sent, since + 1 if sent == before else 0
            # That nothing happens shows in no event.
            await asyncio.sleep(0.02)
    return before


@pytest.mark.parametrize("reply", [SILENT, Reply.endless_chat(0.01)])
async def test_a_client_that_leaves_behind_a_middleware(site: Site, reply: Reply) -> None:
    async def pass_on(request: Request, call_next: Callable[[Request], Any]) -> Response:
        response: Response = await call_next(request)
        return response

    site.fake.script("/api/chat", reply)
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    app = Starlette(routes=[Route("/chat", site.chat, methods=["POST"])], middleware=middleware)
    async with served(app) as site.port:
        tab = await ask(site)
        if reply is SILENT:
            await site.model_was_asked()
        else:
            await tab.until("event: chunk")
        tab.leave()
        await site.model_saw_leave()


SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [],
    "asgi": {"version": "3.0", "spec_version": "2.4"},
}


async def never() -> Any:
    await asyncio.Event().wait()


async def test_a_server_that_says_so_when_it_sends(site: Site) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))

    async def send(message: Any) -> None:
        if b"chunk" in message.get("body", b""):
            raise OSError("gone")

    response = StreamResponse(site.client.chat("fake", "hi", stream=True))
    await asyncio.wait_for(response(SCOPE, never, send), BOUND)
    await site.model_saw_leave()
    assert (response.stream.outcome, response.stream.reason) == ("aborted", "the client left")


async def test_a_server_that_fails_while_the_client_is_watched(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.fake.script("/api/chat", SILENT)

    async def receive() -> Any:
        raise RuntimeError("a bug")

    async def send(message: Any) -> None:
        pass

    response = StreamResponse(site.client.chat("fake", "hi", stream=True))
    await asyncio.wait_for(response(SCOPE, receive, send), BOUND)
    assert response.stream.outcome == "aborted"
    assert "a bug" in caplog.text


@pytest.mark.parametrize("reply", [SILENT, Reply.endless_chat(0.01)])
async def test_a_server_that_cancels_the_response(site: Site, reply: Reply) -> None:
    site.fake.script("/api/chat", reply)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    response = StreamResponse(site.client.chat("fake", "hi", stream=True), registry=site.registry)
    running = asyncio.create_task(response(SCOPE, never, send))
    await site.model_was_asked()
    async with asyncio.timeout(BOUND):
        while reply is not SILENT and len(sent) < 3:
            await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert response.stream.outcome == "cancelled"
    await site.model_saw_leave()


# -- silence --


async def test_heartbeats_while_the_model_is_silent(site: Site) -> None:
    site.response = {"heartbeat": 0.02}
    go_on = Gate()
    site.fake.script("/api/chat", Reply([*Reply.chat("Good", done=False).steps, go_on, *Reply.chat(" day").steps]))
    tab = await ask(site)
    seen = await tab.until(": ping\n\n")
    assert "Good" in seen
    assert " day" not in seen
    go_on.open()
    rest = seen.partition("\r\n\r\n")[2] + await tab.until('"outcome": "done"')
    tab.leave()
    assert rest.index("event: open") < rest.index("event: chunk") < rest.index(": ping")


async def test_no_heartbeat_before_the_model_has_answered(site: Site, browser: httpx.AsyncClient) -> None:
    site.response = {"heartbeat": 0.01}
    site.fake.script("/api/chat", SILENT)
    site.call = {"timeout": Timeouts(first_chunk=0.3)}
    assert (await browser.post("/chat", json=QUESTION)).status_code == 504


@pytest.mark.parametrize("form", ["sse", "ndjson"])
async def test_a_head_that_does_not_wait_for_the_model(site: Site, browser: httpx.AsyncClient, form: str) -> None:
    site.response = {"heartbeat": 0.01, "head_within": 0.01, "format": form}
    site.fake.script("/api/chat", SILENT)
    site.call = {"timeout": Timeouts(first_chunk=0.3)}
    response = await browser.post("/chat", json=QUESTION)
    assert response.status_code == 200
    if form == "sse":
        (_, opened), *pings, (_, end) = events(response.text)
        assert set(pings) == {("comment", "ping")}
    else:
        opened, *pings, end = [json.loads(line) for line in response.text.splitlines()]
        assert {ping["event"] for ping in pings} == {"ping"}
        opened, end = opened["data"], end["data"]
    assert opened["id"] == response.headers[ID_HEADER]
    assert (end["outcome"], end["reason"], end["text"], end["response"]) == ("timeout", "first_chunk", "", None)


# -- Stop --


async def test_stop_in_the_middle_of_the_answer(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    async with browser.stream("POST", "/chat", json=QUESTION) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if line == "event: chunk":
                break
        stopped = await browser.post(f"/stop/{response.headers[ID_HEADER]}", json={"reason": "enough"})
        assert (stopped.status_code, stopped.json()) == (200, {"stopped": True})
        *_, last = [line async for line in lines if line]
    end = json.loads(last.removeprefix("data: "))
    assert (end["outcome"], end["reason"], end["error"]) == ("aborted", "enough", None)
    assert end["text"] == end["response"]["message"]["content"]
    assert end["text"]
    await site.model_saw_leave()


async def test_stop_while_the_prompt_is_read(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", SILENT)
    asked = asyncio.create_task(browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID}))
    await site.model_was_asked()
    assert (await browser.post(f"/stop/{ID}")).json() == {"stopped": True}
    await site.model_saw_leave()
    response = await asked
    assert response.status_code == 200
    assert [name for name, _ in events(response.text)] == ["open", "end"]
    end = await end_of(response)
    assert (end["outcome"], end["reason"], end["text"], end["response"]) == ("aborted", None, "", None)


async def test_stop_before_the_stream_begins(site: Site, browser: httpx.AsyncClient) -> None:
    early = await browser.post(f"/stop/{ID}", json={"reason": "changed my mind"})
    assert (early.status_code, early.json()["stopped"]) == (404, False)
    end = await end_of(await browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID}))
    assert (end["outcome"], end["reason"]) == ("aborted", "changed my mind")
    assert site.fake.requests == ()  # the model was never asked


async def test_stop_twice_and_after_the_end(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", SILENT)
    asked = asyncio.create_task(browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID}))
    await site.model_was_asked()
    first, second = await asyncio.gather(
        browser.post(f"/stop/{ID}", json={"reason": "first"}), browser.post(f"/stop/{ID}", json={"reason": "second"})
    )
    assert first.status_code == 200
    assert second.status_code in {200, 404}
    assert (await end_of(await asked))["reason"] in {"first", "second"}
    assert (await browser.post(f"/stop/{ID}")).status_code == 404


async def test_only_whoever_started_it_may_stop_it(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", SILENT)
    asked = asyncio.create_task(browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID, "X-User": "ann"}))
    await site.model_was_asked()
    known = await browser.post(f"/stop/{ID}", headers={"X-User": "bob"})
    unknown = await browser.post(f"/stop/{ID[::-1]}", headers={"X-User": "bob"})
    assert known.status_code == unknown.status_code == 404
    assert known.content == unknown.content  # nor does he learn that there is one
    assert (await browser.post(f"/stop/{ID}", headers={"X-User": "nobody"})).status_code == 401
    assert not site.fake.connections[-1].left_at
    assert (await browser.post(f"/stop/{ID}", headers={"X-User": "ann"})).status_code == 200
    assert (await end_of(await asked))["outcome"] == "aborted"


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b'{"reason": 7}', b'{"reason": "%s"}' % (b"x" * 1001), b"x" * 5000, b"[" * 4000]
)
async def test_a_bad_stop(site: Site, browser: httpx.AsyncClient, body: bytes) -> None:
    response = await browser.post(f"/stop/{ID}", content=body)
    assert response.status_code == 400
    assert response.json()["status_code"] == 400


@pytest.mark.parametrize("bad", ["short", "x" * 500, "%2e%2e%2fetc", "a-browser-chose-this-one-22%0a", "%00" * 30])
async def test_stop_of_what_is_no_id(site: Site, browser: httpx.AsyncClient, bad: str) -> None:
    assert (await browser.post(f"/stop/{bad}")).status_code == 404


async def test_a_stop_while_redis_is_away(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        async with AbortRegistry.from_url(f"redis://127.0.0.1:{taken.getsockname()[1]}") as registry:
            site.registry = registry
            app = Starlette(routes=[Route("/chat", site.chat, methods=["POST"]), stop_route("/stop", registry)])
            async with served(app) as site.port, httpx.AsyncClient(base_url=site.url, timeout=BOUND) as browser:
                site.fake.script("/api/chat", SILENT)
                asked = asyncio.create_task(browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID}))
                await site.model_was_asked()
                assert (await browser.post(f"/stop/{ID}")).status_code == 200  # its own streams it can stop
                assert (await end_of(await asked))["outcome"] == "aborted"
                elsewhere = await browser.post(f"/stop/{ID[::-1]}")
                assert (elsewhere.status_code, elsewhere.json()["stopped"]) == (202, False)


async def test_in_fastapi(site: Site) -> None:
    async def who(request: Request) -> str:
        return request.headers["X-User"]

    app = FastAPI(routes=[stop_route("/stop", site.registry, owner=who)])

    @app.post("/chat")
    async def chat(question: dict[str, Any]) -> StreamResponse:
        stream = site.client.chat(question["model"], question["messages"], stream=True)
        return StreamResponse(stream, registry=site.registry, owner="ann")

    async with served(app) as site.port, httpx.AsyncClient(base_url=site.url, timeout=BOUND) as browser:
        missing = await browser.post("/chat", json={**QUESTION, "model": "missing"})
        assert (missing.status_code, missing.json()["status_code"]) == (404, 404)
        site.fake.script("/api/chat", SILENT)
        asked = asyncio.create_task(browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID}))
        await asyncio.to_thread(site.fake.wait_for_requests, 2, timeout=BOUND)
        assert (await browser.post(f"/stop/{ID}", headers={"X-User": "bob"})).status_code == 404
        assert (await browser.post(f"/stop/{ID}", headers={"X-User": "ann"})).status_code == 200
        assert (await end_of(await asked))["outcome"] == "aborted"
        site.fake.script("/api/chat", SILENT)
        tab = await ask(site, Content_Type="application/json")
        await asyncio.to_thread(site.fake.wait_for_requests, 3, timeout=BOUND)
        tab.leave()
        await site.model_saw_leave()


async def test_many_chunks_that_arrive_together(site: Site, browser: httpx.AsyncClient) -> None:
    steps = Reply.chat(*(f"{number} " for number in range(200))).steps
    site.fake.script("/api/chat", Reply([Block(*steps)]))
    response = await browser.post("/chat", json=QUESTION)
    *_, (_, end) = events(response.text)
    assert end["text"] == "".join(f"{number} " for number in range(200))
    assert response.text.count("event: chunk\n") == 201
