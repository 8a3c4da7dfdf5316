"""Answers served over HTTP: by a real uvicorn, to clients that read, stop, are slow, and leave.

Of a stop the model's server tells: what the response says of itself proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from serving import BOUND, Tab, events, port_of, served, uvicorn_server
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ollama_async import AsyncClient, OllamaError, RequestError, Timeouts
from ollama_async.asgi import CLIENT_LEFT, CLIENT_STUCK, ID_HEADER, RECONNECTED, StreamResponse, stop_route
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
    assert list(end) == ["outcome", "reason", "error", "error_type", "text", "timing", "context_usage", "response"]
    assert (end["outcome"], end["reason"], end["error"], end["error_type"]) == ("done", None, None, None)
    assert end["text"] == end["response"]["message"]["content"] == "Gr\u00fc\u00df\u2028\nGott"
    assert end["response"]["message"]["thinking"] == "hm"
    assert list(end["timing"]) == ["first_chunk", "total", "chunks", "chunks_per_second"]
    assert end["timing"]["chunks"] == len(chunks)


async def test_each_stream_has_its_own_id(site: Site, browser: httpx.AsyncClient) -> None:
    ids = {(await browser.post("/chat", json=QUESTION)).headers[ID_HEADER] for _ in range(3)}
    assert len(ids) == 3


async def test_an_id_that_the_browser_chose(site: Site, browser: httpx.AsyncClient) -> None:
    response = await browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID})
    assert response.headers[ID_HEADER] == ID
    assert events(response.text)[0] == ("open", {"id": ID})


@pytest.mark.parametrize("bad", ["short", "x" * 129, "../../etc/passwd-and-more", "with spaces in it, and long"])
async def test_an_id_that_could_be_guessed_or_is_invalid(site: Site, browser: httpx.AsyncClient, bad: str) -> None:
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


@pytest.mark.parametrize("bad", [{"format": "xml"}, {"heartbeat": 0}, {"head_within": -1}, {"send_timeout": 0}])
async def test_bad_parameters(site: Site, bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        StreamResponse(site.client.chat("fake", "hi", stream=True), **bad)


# -- errors --


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (Reply.error(400, "does not support thinking"), 400, "does not support thinking"),
        (Reply.error(404, "model 'x' not found"), 404, "model 'x' not found"),
        (Reply.error(413, "(a picture of 30 MB)"), 413, "(a picture of 30 MB)"),
        # What is wrong between this server and that of the model is nothing that the browser could put right.
        (Reply.error(429, "your organisation"), 429, "try again later"),
        (Reply.error(503, "llama queue"), 503, "busy"),
        (Reply.error(401, "unauthorized"), 502, "failed"),
        (Reply.error(403, "forbidden"), 502, "failed"),
        (Reply.error(407, "the proxy"), 502, "failed"),
        (Reply.error(500, "the runner crashed"), 502, "failed"),
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
        ([{"error": "out of memory"}], {}, {"outcome": "error", "reason": None, "error_type": "StreamError"}),
        ([Cut()], {}, {"outcome": "error", "reason": None, "error_type": "ConnectionBroken"}),
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


SCOPE: dict[str, Any] = {
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


# -- a client that connects again --


@pytest_asyncio.fixture
async def events_site(site: Site) -> AsyncIterator[str]:
    """An address whose events a browser reads with GET, as EventSource does."""

    async def chat(request: Request) -> Response:
        return StreamResponse(site.client.chat("fake", "hi", stream=True), registry=site.registry, **site.response)

    async with served(Starlette(routes=[Route("/events", chat, methods=["GET", "POST"])])) as port:
        yield f"http://127.0.0.1:{port}/events"


async def test_a_browser_that_connects_again_does_not_ask_the_model_again(site: Site, events_site: str) -> None:
    """As the standard has it: a browser sends the id of its last event, and only 204 has it stop."""
    last, answers = "", []
    async with httpx.AsyncClient(timeout=BOUND) as browser:
        for _ in range(4):
            answers.append(await browser.get(events_site, headers={"Last-Event-ID": last} if last else {}))
            if answers[-1].status_code != 200:
                break
            last = [line for line in answers[-1].text.splitlines() if line.startswith("id: ")][-1][4:]
    assert [answer.status_code for answer in answers] == [200, 204]
    assert last == str(len(events(answers[0].text)))
    assert (answers[1].content, answers[1].headers["cache-control"]) == (b"", "no-store")
    assert len(site.fake.requests) == 1


@pytest.mark.parametrize("form", ["sse", "ndjson"])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("at", ["1", "7", "an id of another server"])
async def test_no_request_that_continues_a_response_reaches_the_model(
    site: Site, events_site: str, form: str, method: str, at: str
) -> None:
    site.response["format"] = form
    async with httpx.AsyncClient(timeout=BOUND) as browser:
        by_header = await browser.request(method, events_site, headers={"Last-Event-ID": at})
        by_query = await browser.request(method, events_site, params={"lastEventId": at})
        # An id of a stream that is not valid changes nothing.
        with_id = await browser.request(method, events_site, headers={"Last-Event-ID": at, ID_HEADER: "short"})
    assert [answer.status_code for answer in (by_header, by_query, with_id)] == [204] * 3
    assert len(site.fake.requests) == 0
    assert await site.registry.list() == []


async def test_a_stream_that_was_opened_is_aborted_when_its_client_connects_again(site: Site) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    ran = []

    async def chat(request: Request) -> Response:
        stream = await site.client.chat("fake", "hi", stream=True)
        task = BackgroundTask(lambda: ran.append((stream.outcome, stream.reason)))
        return StreamResponse(stream, background=task)

    async with served(Starlette(routes=[Route("/", chat)])) as port, httpx.AsyncClient(timeout=BOUND) as browser:
        answer = await browser.get(f"http://127.0.0.1:{port}/", headers={"Last-Event-ID": "3"})
        assert answer.status_code == 204
        await site.model_saw_leave()
    assert ran == [("aborted", RECONNECTED)]


@pytest.mark.parametrize("headers", [{"Last-Event-ID": ""}, {}])
async def test_a_question_without_an_event_id_is_answered(
    site: Site, events_site: str, headers: dict[str, str]
) -> None:
    async with httpx.AsyncClient(timeout=BOUND) as browser:
        answer = await browser.get(events_site, headers=headers, params={"lastEventId": ""})
    assert answer.status_code == 200
    assert len(site.fake.requests) == 1


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
async def test_stop_of_an_invalid_id(site: Site, browser: httpx.AsyncClient, bad: str) -> None:
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
    from fastapi import FastAPI

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


# -- what a client is told of an error --

TELLING = "no upstream at http://10.1.2.3:4567"
SECRETS = ["10.1.2.3", ":4567", "inner.svc", ".ollama", "s3cret", "127.0.0.1"]


@pytest.mark.parametrize(
    "reply",
    [
        *(Reply.error(status, TELLING) for status in (400, 401, 403, 404, 407, 413, 429, 500, 502, 503)),
        *(Reply.error(status, "Incorrect API key provided: sk-s3cret***") for status in (400, 401, 429)),
        *(Reply.error(status, "open /root/.ollama/models/x: no such file") for status in (404, 500)),
        Reply.error(404, "no route to 10.1.2.3"),
        Reply.error(400, "ollama-7.inner.svc is not there"),
        Reply.error(413, "ollama-7:4567 has no room"),
        Reply(status=307, headers={"Location": "http://10.1.2.3:4567x/"}),
        Reply(status=307, headers={"Location": "ftp://10.1.2.3:4567/"}),
        Reply([{"error": TELLING}], status=503, headers={"Retry-After": TELLING}),
        Reply([{"error": TELLING}]),
        Reply([{"error": TELLING, "StatusCode": 401}]),
        Reply([{"error": TELLING, "StatusCode": 400}]),
        Reply(raw=b"HTTP/1.1 http://10.1.2.3:4567\r\n\r\n"),
        Reply(raw=b"HTTP/1.1 200 OK\r\n\r\n<title>http://10.1.2.3:4567</title>\n"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_an_error_says_neither_where_the_server_is_nor_what_opens_it(
    site: Site, browser: httpx.AsyncClient, reply: Reply, begun: bool
) -> None:
    gate = Gate()
    site.response = {"head_within": 0.01} if begun else {}
    site.fake.script("/api/chat", replace(reply, before_head=[gate]))
    asked = asyncio.create_task(browser.send(browser.build_request("POST", "/chat", json=QUESTION), stream=True))
    if begun:
        await asked
    gate.open()
    response = await asked
    await response.aread()
    in_events = response.status_code == 200
    assert in_events or not begun
    told = f"{response.text} {dict(response.headers)}".replace(f"127.0.0.1:{site.port}", "")
    assert not [secret for secret in SECRETS if secret in told]
    end = events(response.text)[-1][1] if in_events else response.json()
    assert end["error"]
    assert end.get("error_type", "Error")[0].isupper()


async def test_no_server_later(site: Site, browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """What stands in the note of an error, or in its class, does not go out either; it is in the log."""

    class TenOneTwoThree(OllamaError):
        pass

    def start() -> Any:
        raise TenOneTwoThree("at http://10.1.2.3:4567")

    site.fake.stop()
    end = await browser.post("/chat", json=QUESTION)
    assert "127.0.0.1" in caplog.text
    stream: Any = site.client.chat("fake", "hi", stream=True)
    stream._reader.call._begin = start
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(StreamResponse(stream)(SCOPE, never, send), BOUND)
    assert sent[0]["status"] == end.status_code == 502
    assert json.loads(sent[1]["body"]) == {"error": "the answer failed", "status_code": 502}
    assert "10.1.2.3" in caplog.text


async def test_a_log_has_what_the_client_is_not_told(
    site: Site, browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ollama_async.asgi")
    site.fake.script(
        "/api/chat",
        Reply.error(500, "open /root/.ollama/x\n\x1b[2Jfaked: line, sk-s3cret, 0123456789abcdef0123"),
        Reply.error(400, "the prompt 'a secret plan' is too long"),
        Reply(raw=b"HTTP/1.1 200 OK\r\n\r\n{'content': 'a secret plan'}\n"),
    )
    for _ in range(3):
        await browser.post("/chat", json=QUESTION, headers={ID_HEADER: ID})
    broken, refused, unreadable = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert broken[0] == "WARNING"
    assert broken[1] == f"stream {ID}: ServerError, status 500: open /root/.ollama/x ?[2Jfaked: line, [...] [...]"
    assert refused == (
        "INFO",
        f"stream {ID}: BadRequestError, status 400: the model's server does not accept the request",
    )
    assert unreadable[0] == "WARNING"
    assert "ProtocolError" in unreadable[1]
    assert "secret" not in caplog.text


async def test_what_a_client_is_told_can_be_chosen(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply.error(500, "the runner crashed"))
    site.response = {"explain": lambda error: f"it said: {error.error}"}
    response = await browser.post("/chat", json=QUESTION)
    assert (response.status_code, response.json()["error"]) == (502, "it said: the runner crashed")


@pytest.mark.parametrize(
    ("reason", "told"),
    [("enough", "enough"), (7, "7"), (ConnectionError("10.1.2.3:4567 is gone"), "ConnectionError"), (Site, "type")],
)
async def test_a_reason_that_was_not_written_to_be_shown(
    site: Site, browser: httpx.AsyncClient, reason: object, told: str
) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    async with browser.stream("POST", "/chat", json=QUESTION) as response:
        await anext(response.aiter_lines())
        site.client.abort(reason)
        await response.aclose()
    site.fake.script("/api/chat", SILENT)
    asked = asyncio.create_task(browser.post("/chat", json=QUESTION))
    await asyncio.to_thread(site.fake.wait_for_requests, 2, timeout=BOUND)
    site.client.abort(reason)
    end = await end_of(await asked)
    assert (end["outcome"], end["reason"], end["error"]) == ("aborted", told, None)


async def test_where_else_a_model_runs_is_not_sent(site: Site, browser: httpx.AsyncClient) -> None:
    chunk = Reply.chat("Good", done=False).steps[0]
    assert isinstance(chunk, dict)
    last = Reply.chat("").steps[-1]
    assert isinstance(last, dict)
    site.fake.script("/api/chat", Reply([{**chunk, "remote_host": "http://10.1.2.3"}, {**last, "remote_host": "x"}]))
    response = await browser.post("/chat", json=QUESTION)
    assert (await end_of(response))["text"] == "Good"
    assert "remote_host" not in response.text


async def test_a_registry_that_fails(site: Site, browser: httpx.AsyncClient) -> None:
    for path in ("/chat", f"/stop/{ID}"):
        refused = await browser.post(path, json=QUESTION, headers={"X-User": "s3cret" * 100})
        assert (refused.status_code, "s3cret" in refused.text) == (400, False)
    site.registry = AbortRegistry()
    await site.registry.aclose()
    routes = [Route("/chat", site.chat, methods=["POST"]), stop_route("/stop", site.registry)]
    async with served(Starlette(routes=routes)) as site.port:
        for path in ("/chat", f"/stop/{ID}"):
            response = await browser.post(site.url + path, json=QUESTION)
            assert response.json() == {"error": "this server is shutting down", "status_code": 503}
    assert site.fake.requests == ()


# -- the client takes nothing --


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_client_that_stops_reading(site: Site, http: str, caplog: pytest.LogCaptureFixture) -> None:
    site.fake.script("/api/chat", FLOOD)
    left: list[bool] = []

    async def afterwards() -> None:
        # The whole server stands still meanwhile.
        left.append(site.fake.connections[-1].wait_left(BOUND))

    responses: list[StreamResponse] = []

    async def chat(_: Request) -> Response:
        stream = site.client.chat("fake", "hi", stream=True)
        responses.append(StreamResponse(stream, send_timeout=0.3, background=BackgroundTask(afterwards)))
        return responses[0]

    async with uvicorn_server(Starlette(routes=[Route("/chat", chat, methods=["POST"])]), http) as server:
        tab = await ask(replace(site, port=port_of(server)))
        tab.stop_reading()
        await site.model_was_asked()
        await site.model_saw_leave()
        async with asyncio.timeout(BOUND):
            while server.server_state.connections or server.server_state.tasks:
                await asyncio.sleep(0.001)
        stream = responses[0].stream
        assert (stream.outcome, stream.reason) == ("aborted", CLIENT_STUCK)
        assert left == [True]
        assert stream.text  # what came is kept
        tab.leave()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_stops_reading_behind_a_middleware(site: Site) -> None:
    async def pass_on(request: Request, call_next: Callable[[Request], Any]) -> Response:
        response: Response = await call_next(request)
        return response

    site.fake.script("/api/chat", FLOOD)
    site.response = {"send_timeout": 0.3}
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    app = Starlette(routes=[Route("/chat", site.chat, methods=["POST"])], middleware=middleware)
    async with served(app) as site.port:
        tab = await ask(site)
        tab.stop_reading()
        await site.model_was_asked()
        await site.model_saw_leave()
        tab.leave()


class Blockade:
    """A server's ``send`` that gets stuck at a message, as one does whose client takes nothing."""

    def __init__(self, at: Callable[[Any], bool]) -> None:
        self.at = at
        self.sent: list[Any] = []
        self.stuck = asyncio.Event()
        self.go_on = asyncio.Event()
        self.left: list[type[BaseException]] = []
        self.when_left: Callable[[], object] = bool

    async def send(self, message: Any) -> None:
        if self.at(message):
            self.stuck.set()
            try:
                await asyncio.sleep(0)
                await self.go_on.wait()
            except BaseException as exc:
                self.left.append(type(exc))
                self.when_left()
                raise
        self.sent.append(message)


def body_has(text: bytes) -> Callable[[Any], bool]:
    return lambda message: text in message.get("body", b"")


@pytest.mark.parametrize(
    ("reply", "at", "options"),
    [
        (Reply.endless_chat(0.01), lambda message: "status" in message, {}),
        (Reply.endless_chat(0.01), body_has(b"event: open"), {}),
        (Reply.endless_chat(0.01), body_has(b"event: chunk"), {}),
        (Reply([*Reply.chat("Good", done=False).steps, Stall()]), body_has(b": ping"), {"heartbeat": 0.01}),
        (SILENT, body_has(b"event: open"), {"head_within": 0.01}),
        (SILENT, body_has(b": ping"), {"head_within": 0.01, "heartbeat": 0.01}),
        (Reply([{"error": "x"}, Stall()]), body_has(b'"error"'), {}),
        (Reply.chat("Good"), body_has(b"event: end"), {}),
        (Reply.error(500, "x"), lambda message: "status" in message, {}),
        (Reply.error(500, "x"), body_has(b"failed"), {}),
    ],
)
async def test_a_send_that_gets_stuck(
    site: Site, reply: Reply, at: Callable[[Any], bool], options: dict[str, Any]
) -> None:
    site.fake.script("/api/chat", reply)
    blockade = Blockade(at)
    ends = reply.status == 200 and reply.steps != Reply.chat("Good").steps and b"error" not in repr(reply).encode()
    if ends:
        # When the send is left, the model has been already, with this loop standing still.
        blockade.when_left = lambda: site.fake.connections[-1].wait_left(BOUND) or pytest.fail("still there")
    ran: list[None] = []

    async def background() -> None:
        ran.append(None)

    before = asyncio.all_tasks()
    stream = site.client.chat("fake", "hi", stream=True)
    response = StreamResponse(
        stream, registry=site.registry, send_timeout=0.1, background=BackgroundTask(background), **options
    )
    await asyncio.wait_for(response(SCOPE, never, blockade.send), BOUND)
    assert blockade.left == [GeneratorExit]
    assert ran == [None]
    sent = len(blockade.sent)
    if ends:
        assert (stream.outcome, stream.reason) == ("aborted", CLIENT_STUCK)
    else:
        assert stream.outcome in {"done", "error"}
    await nothing_left(before, site.registry)
    assert len(blockade.sent) == sent  # nothing after it


async def test_a_goodbye_that_gets_stuck(site: Site) -> None:
    site.fake.script("/api/chat", SILENT)
    blockade = Blockade(lambda message: message.get("status") == 499)
    stream = site.client.chat("fake", "hi", stream=True)

    async def receive() -> Any:
        await site.model_was_asked()
        return {"type": "http.disconnect"}

    before = asyncio.all_tasks()
    await asyncio.wait_for(StreamResponse(stream, send_timeout=0.1)(SCOPE, receive, blockade.send), BOUND)
    assert blockade.left == [GeneratorExit]
    assert (stream.outcome, stream.reason) == ("aborted", CLIENT_LEFT)
    await nothing_left(before, site.registry)


async def test_a_bad_id_whose_answer_gets_stuck(site: Site) -> None:
    blockade = Blockade(lambda message: "status" in message)
    scope = {**SCOPE, "headers": [(b"x-stream-id", b"short")]}
    response = StreamResponse(site.client.chat("fake", "hi", stream=True), send_timeout=0.1)
    await asyncio.wait_for(response(scope, never, blockade.send), BOUND)
    assert blockade.left == [GeneratorExit]


async def test_a_send_that_does_not_want_to_be_left(site: Site) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    tried: list[type[BaseException]] = []

    async def send(message: Any) -> None:
        try:
            await asyncio.Event().wait()
        except BaseException as exc:
            tried.append(type(exc))
            await asyncio.Event().wait()

    stream = site.client.chat("fake", "hi", stream=True)
    await asyncio.wait_for(StreamResponse(stream, send_timeout=0.05)(SCOPE, never, send), BOUND)
    assert (tried, stream.reason) == ([GeneratorExit], CLIENT_STUCK)
    await site.model_saw_leave()


@pytest.mark.parametrize("send_timeout", [0.5, None])
async def test_a_send_that_is_slow(site: Site, send_timeout: float | None) -> None:
    """Each has its own time, whatever it waits for."""
    site.fake.script("/api/chat", Reply.chat(*"abcdefgh"))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.04)
        await asyncio.wait_for(asyncio.sleep(0.04, None), 1)
        await asyncio.create_task(asyncio.sleep(0.01))
        sent.append(message)

    stream = site.client.chat("fake", "hi", stream=True)
    await asyncio.wait_for(StreamResponse(stream, send_timeout=send_timeout)(SCOPE, never, send), BOUND)
    assert stream.outcome == "done"
    assert sent[-1]["more_body"] is False


async def test_a_response_that_is_cancelled_while_it_sends(site: Site) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    blockade = Blockade(body_has(b"event: chunk"))
    stream = site.client.chat("fake", "hi", stream=True)
    before = asyncio.all_tasks()
    running = asyncio.create_task(StreamResponse(stream, send_timeout=BOUND)(SCOPE, never, blockade.send))
    await asyncio.wait_for(blockade.stuck.wait(), BOUND)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert blockade.left == [asyncio.CancelledError]
    await site.model_saw_leave()
    await nothing_left(before, site.registry)


async def test_a_client_that_leaves_while_a_send_is_stuck(site: Site) -> None:
    site.fake.script("/api/chat", Reply.endless_chat(0.01))
    blockade = Blockade(body_has(b"event: chunk"))
    stream = site.client.chat("fake", "hi", stream=True)

    async def receive() -> Any:
        await blockade.stuck.wait()
        return {"type": "http.disconnect"}

    running = asyncio.create_task(StreamResponse(stream, send_timeout=0.5)(SCOPE, receive, blockade.send))
    await site.model_was_asked()
    await site.model_saw_leave()
    await asyncio.wait_for(running, BOUND)
    assert stream.reason == CLIENT_LEFT


# -- a second request behind the first --


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("when", ["the model is silent", "it answers", "it pauses"])
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_leaves_behind_a_second_request(site: Site, http: str, when: str, how: Any) -> None:
    pausing = Reply([*Reply.chat("Good", done=False).steps, Stall()])
    reply = {"the model is silent": SILENT, "it answers": Reply.endless_chat(0.01), "it pauses": pausing}[when]
    site.fake.script("/api/chat", reply, Reply.error(500, "nobody is there for it"))
    async with uvicorn_server(Starlette(routes=[Route("/chat", site.chat, methods=["POST"])]), http) as server:
        tab = await Tab.ask(port_of(server), "/chat", QUESTION, times=2, Connection="keep-alive")
        await site.model_was_asked()
        if reply is not SILENT:
            await tab.until("Good" if reply is pausing else "event: chunk")
        tab.leave(how)
        assert await asyncio.to_thread(site.fake.connections[0].wait_left, BOUND)


@pytest.mark.parametrize(("version", "expected"), [("1.1", "close"), ("1.0", "close"), ("2", None), ("3", None)])
async def test_a_connection_is_for_one_stream(site: Site, version: str, expected: str | None) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    response = StreamResponse(
        site.client.chat("fake", "hi", stream=True),
    )
    await asyncio.wait_for(response({**SCOPE, "http_version": version}, never, send), BOUND)
    assert httpx.Headers(sent[0]["headers"]).get("connection") == expected
