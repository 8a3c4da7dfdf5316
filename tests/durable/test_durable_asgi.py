"""Durable answers over HTTP: begun, left, attached to again, listed, stopped; by a real uvicorn."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from durable.harness import BOUND, telling, until, words
from serving import Tab, served
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ollama_async import AsyncClient, RequestError
from ollama_async.asgi import (
    BROWSER_MODULE,
    CLIENT_LEFT,
    CLIENT_STUCK,
    ID_HEADER,
    AnswerResponse,
    StreamResponse,
    attach_route,
    list_route,
    module_route,
    stop_route,
)
from ollama_async.durable import (
    AnswerGap,
    AnswerGone,
    AnswersUnavailable,
    DurableAnswers,
    RedisFull,
    RedisRefuses,
    RedisTooOld,
    Result,
)
from ollama_async.registry import AbortRegistry
from ollama_async.testing import Endless, FakeOllama, Gate, Reply

ID = "a-browser-chose-this-one-22"
ENDLESS = Reply.endless_chat(0.002)
FLOOD = Reply([Endless(lambda _: Reply.chat("x" * 8000, done=False).steps[0], 0)])


class Site:
    def __init__(self, fake: FakeOllama, client: AsyncClient, answers: DurableAnswers) -> None:
        self.fake = fake
        self.client = client
        self.answers = answers
        self.results: list[Result] = []
        self.response: dict[str, Any] = {"on_leave": "continue"}
        self.port = 0

    async def chat(self, request: Request) -> Response:
        stream = self.client.chat("fake", "hi", stream=True)
        return StreamResponse(stream, answers=self.answers, owner=owner(request), **self.response)

    async def model_saw_leave(self) -> None:
        assert await asyncio.to_thread(self.fake.connections[-1].wait_left, BOUND)

    def viewers(self) -> int:
        return sum(kept.producer.log.viewers for kept in self.answers._carrier._kept.values())


def owner(request: Request) -> str:
    user = request.headers.get("X-User", "ann")
    if user == "nobody":
        raise HTTPException(401, "who are you?")
    return user


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    with FakeOllama(interval=0) as fake:
        results: list[Result] = []
        async with (
            AsyncClient(fake.url) as client,
            DurableAnswers.from_url("memory://", on_end=results.append, max_bytes=10**8) as answers,
        ):
            made = Site(fake, client, answers)
            made.results = results
            routes = [
                Route("/chat", made.chat, methods=["POST"]),
                list_route("/answers", answers, owner=owner),
                attach_route("/answers", answers, owner=owner),
                stop_route("/answers", answers.registry, owner=owner),
            ]
            async with served(Starlette(routes=routes)) as made.port:
                yield made
                await until(lambda: made.viewers() == 0, "that all viewers are detached")


@pytest_asyncio.fixture
async def browser(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{site.port}"
    async with httpx.AsyncClient(base_url=url, timeout=BOUND, headers={ID_HEADER: ID}) as made:
        yield made


def events(text: str) -> list[tuple[int | None, str, Any]]:
    """What a browser makes of Server-Sent Events with ids."""
    found: list[tuple[int | None, str, Any]] = []
    for block in text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            number = int(fields["id"]) if "id" in fields else None
            found.append((number, fields["event"], json.loads(fields["data"])))
    return found


def text_of(found: list[tuple[int | None, str, Any]]) -> str:
    return "".join(data["message"].get("content", "") for _, name, data in found if name == "chunk")


async def test_a_durable_answer_as_events(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", telling(5))
    response = await browser.post("/chat")
    assert (response.status_code, response.headers[ID_HEADER]) == (200, ID)
    found = events(response.text)
    assert [number for number, _, _ in found] == list(range(1, 9))
    assert (found[0][1], found[0][2]["id"], "nonce" in found[0][2], "away" in found[0][2]) == ("open", ID, False, False)
    assert (found[-1][1], found[-1][2]["outcome"]) == ("end", "done")
    assert text_of(found) == found[-1][2]["text"] == "".join(words(5))
    again = await browser.get(f"/answers/{ID}")
    assert again.status_code == 200
    assert again.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert again.headers["cache-control"] == "no-store"
    assert events(again.text) == found


async def test_lines_have_numbers(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", telling(2))
    site.response["format"] = "ndjson"
    lines = [json.loads(line) for line in (await browser.post("/chat")).text.split("\n")[:-1]]
    assert [(line["number"], line["event"]) for line in lines] == [
        (1, "open"),
        (2, "chunk"),
        (3, "chunk"),
        (4, "chunk"),
        (5, "end"),
    ]
    again = await browser.get(f"/answers/{ID}?format=ndjson&after=3")
    assert [json.loads(line) for line in again.text.split("\n")[:-1]] == lines[3:]
    assert (await browser.get(f"/answers/{ID}?format=xml")).status_code == 400


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_reload_in_the_middle(site: Site, browser: httpx.AsyncClient, how: Any) -> None:
    gate = Gate()
    steps = telling(20).steps
    site.fake.script("/api/chat", Reply([*steps[:10], gate, *steps[10:]]))
    tab = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await tab.until("id: 11\n")
    tab.leave(how)
    await until(lambda: site.viewers() == 0, "that the tab has left")
    assert site.results == []
    async with browser.stream("GET", f"/answers/{ID}", headers={"Last-Event-ID": "4"}) as response:
        gate.open()
        found = events((await response.aread()).decode())
    assert [number for number, _, _ in found] == list(range(5, 24))
    assert "".join(words(20)).endswith(text_of(found))
    assert site.results[0].outcome == "done"
    assert len(site.fake.requests) == 1


async def test_leaving_aborts_by_default(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", ENDLESS)
    site.response = {}
    tab = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await tab.until("event: chunk")
    tab.leave()
    await site.model_saw_leave()
    await until(lambda: site.results, "the end")
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", CLIENT_LEFT)
    assert events((await browser.get(f"/answers/{ID}")).text)[-1][2]["reason"] == CLIENT_LEFT


@pytest.mark.parametrize("on_leave", ["continue", "abort"])
async def test_a_client_that_takes_nothing(site: Site, on_leave: str) -> None:
    site.fake.script("/api/chat", FLOOD)
    site.response = {"on_leave": on_leave, "send_timeout": 0.3}
    tab = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await tab.until("event: chunk")
    tab.stop_reading()
    await until(lambda: site.viewers() == 0, "that it is detached")
    if on_leave == "abort":
        await until(lambda: site.results, "the end")
        assert site.results[0].reason == CLIENT_STUCK
    else:
        assert site.results == []
    tab.leave()
    await site.answers.stop(ID, owner="ann")


async def test_stop_from_another_tab(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", ENDLESS)
    first = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await first.until("event: chunk")
    async with browser.stream("GET", f"/answers/{ID}") as second:
        stopped = await browser.post(f"/answers/{ID}", json={"reason": "enough"})
        assert stopped.json() == {"stopped": True}
        await site.model_saw_leave()
        found = events((await second.aread()).decode())
    assert (found[-1][1], found[-1][2]["reason"]) == ("end", "enough")
    assert "event: end" in await first.until('"enough"')
    first.leave()


async def test_the_list(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", ENDLESS)
    tab = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await tab.until("event: chunk")
    tab.leave()
    response = await browser.get("/answers")
    (listed,) = response.json()
    assert (listed["id"], listed["state"], list(listed)) == (ID, "running", ["id", "state", "begun"])
    assert (await browser.get("/answers", headers={"X-User": "bob"})).json() == []
    assert (await browser.get("/answers", headers={"X-User": "nobody"})).status_code == 401


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        (f"/answers/{ID}", {"Last-Event-ID": "-1"}, 400, "bad_offset"),
        (f"/answers/{ID}", {"Last-Event-ID": "7x"}, 400, "bad_offset"),
        (f"/answers/{ID}", {"Last-Event-ID": "9" * 400}, 400, "bad_offset"),
        (f"/answers/{ID}", {"Last-Event-ID": "6"}, 400, "bad_offset"),
        (f"/answers/{ID}?after=1.5", {}, 400, "bad_offset"),
        (f"/answers/{ID}?after=%D9%A1", {}, 400, "bad_offset"),
        (f"/answers/{ID}?after=4", {"Last-Event-ID": "99"}, 400, "bad_offset"),
        (f"/answers/{ID}", {"X-User": "bob"}, 404, "unknown"),
        ("/answers/another-id-that-nobody-has-22", {}, 404, "unknown"),
        ("/answers/short", {}, 404, "unknown"),
        (f"/answers/{ID}", {"X-User": "nobody"}, 401, None),
    ],
)
async def test_bug_13_and_15_what_cannot_be_attached_to(
    site: Site, browser: httpx.AsyncClient, path: str, headers: dict[str, str], status: int, code: str | None
) -> None:
    site.fake.script("/api/chat", telling(2))
    await browser.post("/chat")
    response = await browser.get(path, headers=headers)
    assert response.status_code == status
    if code is not None:
        assert (response.json()["code"], response.json()["status_code"]) == (code, status)
    assert len(site.fake.requests) == 1


async def test_an_event_source_stops_when_all_is_read(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", telling(2))
    await browser.post("/chat")
    response = await browser.get(f"/answers/{ID}", headers={"Last-Event-ID": "5"})
    assert (response.status_code, response.content) == (204, b"")
    assert (await browser.get(f"/answers/{ID}?after=5")).status_code == 204


async def test_an_id_that_is_in_use(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", telling(2))
    await browser.post("/chat")
    response = await browser.post("/chat")
    assert (response.status_code, response.json()["code"]) == (409, "in_use")
    assert len(site.fake.requests) == 1


async def test_an_error_of_the_model_before_its_first_chunk(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", Reply.error(404, "model 'x' not found"))
    response = await browser.post("/chat")
    assert (response.status_code, response.json()["error"]) == (404, "model 'x' not found")
    found = events((await browser.get(f"/answers/{ID}")).text)
    assert [(number, name) for number, name, _ in found] == [(1, "open"), (2, "end")]
    assert found[1][2]["error"] == "model 'x' not found"


async def test_an_error_of_the_model_after_the_head(site: Site, browser: httpx.AsyncClient) -> None:
    gate = Gate()
    reply = Reply.error(404, "model 'x' not found")
    site.fake.script("/api/chat", Reply(reply.steps, status=404, before_head=[gate], framing="length"))
    site.response["head_within"] = 0.01
    async with browser.stream("POST", "/chat") as response:
        assert response.status_code == 200
        gate.open()
        found = events((await response.aread()).decode())
    assert [(number, name) for number, name, _ in found] == [(1, "open"), (2, "end")]
    assert (found[1][2]["outcome"], found[1][2]["error"]) == ("error", "model 'x' not found")


async def test_a_heartbeat_while_nothing_comes(site: Site, browser: httpx.AsyncClient) -> None:
    gate = Gate()
    site.fake.script("/api/chat", Reply([*telling(2).steps[:1], gate, *telling(2).steps[1:]]))
    site.response["heartbeat"] = 0.02
    async with browser.stream("POST", "/chat") as response:
        seen = ""
        async for block in response.aiter_text():
            seen += block
            if ": ping" in seen:
                gate.open()
    assert events(seen)[-1][1] == "end"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (AnswersUnavailable("redis://secret"), 503, "away"),
        (RedisTooOld("secret"), 501, "too_old"),
        (RedisFull("secret"), 507, "full"),
        (RedisRefuses("secret"), 500, "refused"),
        (AnswerGap("secret"), 500, "gap"),
    ],
)
async def test_what_is_wrong_with_redis(
    site: Site, browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, error: Any, status: int, code: str
) -> None:
    async def fail(*_: object) -> Any:
        raise error

    for method in ("find", "names", "claim"):
        monkeypatch.setattr(site.answers._carrier, method, fail)
    for response in (
        await browser.get(f"/answers/{ID}"),
        await browser.get("/answers"),
        await browser.post("/chat"),
    ):
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status == 503)
    assert site.fake.requests == ()


@pytest.mark.parametrize("error", [AnswerGap("secret"), AnswerGone("secret")])
async def test_what_goes_wrong_in_the_middle(site: Site, browser: httpx.AsyncClient, error: Any) -> None:
    site.fake.script("/api/chat", ENDLESS)
    tab = await Tab.ask(site.port, "/chat", {}, **{ID_HEADER: ID})
    await tab.until("event: chunk")
    tab.leave()
    async with browser.stream("GET", f"/answers/{ID}") as response:
        await until(lambda: site.viewers(), "that somebody watches")
        (kept,) = site.answers._carrier._kept.values()
        kept.producer.log.fail(error)
        found = events((await response.aread()).decode())
    number, name, data = found[-1]
    assert (number, name, data["code"]) == (None, "error", error.code)
    assert "secret" not in data["error"]


async def test_a_reconnect_to_where_it_began_asks_the_model_nothing(site: Site, browser: httpx.AsyncClient) -> None:
    response = await browser.post("/chat", headers={"Last-Event-ID": "3"})
    assert response.status_code == 204
    assert site.fake.requests == ()
    assert await site.answers.list("ann") == []


async def test_without_answers_all_is_as_ever(site: Site, browser: httpx.AsyncClient) -> None:
    site.fake.script("/api/chat", telling(2))

    async def chat(request: Request) -> Response:
        return StreamResponse(site.client.chat("fake", "hi", stream=True))

    async with served(Starlette(routes=[Route("/chat", chat, methods=["POST"])])) as port:
        response = await browser.post(f"http://127.0.0.1:{port}/chat")
    assert response.text.startswith(f'id: 1\nevent: open\ndata: {{"id": "{ID}"}}\n\n')
    assert await site.answers.list("") == []


async def test_the_module_for_browsers_is_served(site: Site) -> None:
    async with served(Starlette(routes=[module_route("/static/answers.js")])) as port, httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port}/static/answers.js")
        assert (response.status_code, response.text) == (200, BROWSER_MODULE.read_text("utf-8"))
        assert response.headers["content-type"] == "text/javascript; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert (await client.post(f"http://127.0.0.1:{port}/static/answers.js")).status_code == 405
    # All that it needs is in it, and its types are checked where somebody checks them.
    assert "import " not in re.sub(r"/\*.*?\*/", "", response.text, flags=re.DOTALL)
    assert response.text.startswith("// @ts-check\n")


async def test_without_answers_nothing_of_them_runs(site: Site) -> None:
    """What it costs is what it costs without them: none of their code runs for a chunk."""
    site.fake.script("/api/chat", telling(100))
    calls: list[str] = []

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and "/ollama_async/durable/" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [], "query_string": b""}
    response = StreamResponse(site.client.chat("fake", "hi", stream=True))
    sys.setprofile(note)
    try:
        await response(scope, receive, send)
    finally:
        sys.setprofile(None)
    # The text of the end is made there, whoever sends it.
    assert set(calls) <= {"summary", "told_reason"}
    assert len(calls) <= 2


async def test_bad_parameters(site: Site) -> None:
    stream = site.client.chat("fake", "hi", stream=True)
    async with AbortRegistry.from_url("memory://") as registry:
        for bad in (
            {"on_leave": "stay"},
            {"on_leave": "continue"},
            {"answers": site.answers, "registry": registry},
        ):
            with pytest.raises(RequestError, match=r"on_leave|registry"):
                StreamResponse(stream, **bad)
        StreamResponse(stream, answers=site.answers, registry=site.answers.registry)
    for bad in ({"format": "xml"}, {"heartbeat": 0}, {"send_timeout": -1}):
        with pytest.raises(RequestError, match=next(iter(bad))):
            AnswerResponse(None, **bad)
