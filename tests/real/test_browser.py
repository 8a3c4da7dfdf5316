"""The browser's part of durable answers in a real Chromium: what a page shows, byte for byte, over any network.

No test here has an event loop: see `real.chromium`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from durable.harness import telling, words
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from real.answers_site import Fault, Site

from ollama_async.testing import FakeOllama, Gate, Reply

pytestmark = pytest.mark.browser

BOUND = 30.0
ENDLESS = Reply.endless_chat(0.005)
ID = "a-browser-chose-this-one-22"
DOCS = Path(__file__).parents[2] / "docs" / "durable.md"


@pytest.fixture(scope="module")
def _ollama() -> Iterator[FakeOllama]:
    with FakeOllama(models=["fake"]) as server:
        yield server


@pytest.fixture(scope="module")
def _site(_ollama: FakeOllama) -> Iterator[Site]:
    with Site(_ollama.url) as site:
        yield site


@pytest.fixture
def ollama(_ollama: FakeOllama) -> FakeOllama:
    _ollama.stop()
    _ollama.forget()
    return _ollama.start()


@pytest.fixture
def site(_site: Site, ollama: FakeOllama) -> Iterator[Site]:
    _site.requests.clear()
    _site.results.clear()
    _site.head = ""
    yield _site
    assert not _site.faults


@pytest.fixture
def page(context: BrowserContext, site: Site) -> Page:
    # Each test is somebody else, so that none sees the answers of another.
    context.add_cookies([{"name": "user", "value": f"user-{time.monotonic_ns()}", "url": site.url}])
    return opened(context, site)


def opened(context: BrowserContext, site: Site) -> Page:
    page = context.new_page()
    page.goto(site.url)
    page.wait_for_function("() => window.watch !== undefined")
    return page


def shown(page: Page) -> str:
    text: str = page.evaluate("page.textContent")
    return text


def until_shown(page: Page, text: str) -> None:
    page.wait_for_function("text => page.textContent.includes(text)", arg=text)


def until(site: Site, condition: Any) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, site.requests
        time.sleep(0.005)


def asked_once(ollama: FakeOllama, site: Site) -> None:
    assert len(ollama.requests) == 1
    assert sum(request.startswith("POST /chat") for request in site.requests) == 1


# -- a network that breaks --


def test_a_connection_that_is_cut_again_and_again_costs_no_byte(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(400))
    chance = random.Random(1)
    # Within an event, a letter, a line's end; and before anything came.
    site.faults.extend(
        Fault(bytes=count) for count in (chance.randrange(9000), 0, *chance.choices(range(1, 9000), k=6))
    )
    assert page.evaluate("watch(answers.start('/chat', { text: 'hi' }))") == "done"
    assert shown(page) == "".join(words(400))
    asked_once(ollama, site)
    offsets = [int(request.partition("after=")[2]) for request in site.requests if request.startswith("GET /answers/")]
    assert len(offsets) == 8
    assert offsets == sorted(offsets)
    assert site.results[-1].outcome == "done"


def test_a_silent_connection_is_given_up(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(40))
    site.faults.extend([Fault(bytes=0, hang=True), Fault(bytes=900, hang=True), Fault(bytes=1500, hang=True)])
    page.evaluate("answers.stall = 600")
    assert page.evaluate("watch(answers.start('/chat', { text: 'hi' }))") == "done"
    assert shown(page) == "".join(words(40))
    asked_once(ollama, site)
    assert page.evaluate("states.filter((state) => state === 'waiting').length") == 3


def test_a_model_that_is_silent_is_waited_for(page: Page, site: Site, ollama: FakeOllama) -> None:
    """The heartbeat, every 0.2 s here, tells a model that loads from a connection that is dead."""
    gate = Gate()
    steps = telling(4).steps
    ollama.script("/api/chat", Reply([*steps[:2], gate, *steps[2:]]))
    page.evaluate("answers.stall = 900")
    page.evaluate("window.outcome = watch(answers.start('/chat', { text: 'hi' })), null")
    until_shown(page, "1 ")
    page.wait_for_timeout(1500)
    gate.open()
    assert page.evaluate("outcome") == "done"
    assert page.evaluate("states") == ["receiving", "over"]


@pytest.mark.parametrize("event", ["visibilitychange", "online", "offline", "pageshow"])
def test_a_page_or_a_network_that_is_back_connects_at_once(
    page: Page, site: Site, ollama: FakeOllama, event: str
) -> None:
    ollama.script("/api/chat", telling(40))
    site.faults.append(Fault(bytes=1500, hang=True))
    page.evaluate("window.outcome = watch(answers.start('/chat', { text: 'hi' })), null")
    until_shown(page, "3 ")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))")
    page.evaluate(
        """(name) => {
            const now = Date.now;
            if (name === "visibilitychange") Date.now = () => now() + 30_000;
            const event = new Event(name, { bubbles: true });
            if (name === "pageshow") Object.assign(event, { persisted: true });
            (name === "visibilitychange" ? document : window).dispatchEvent(event);
        }""",
        event,
    )
    assert page.evaluate("outcome") == "done"
    assert shown(page) == "".join(words(40))
    # Nothing else than this made it connect again.
    assert sum(request.startswith("GET /answers/") for request in site.requests) == 1


def test_a_server_that_is_away_for_a_while(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(40))
    site.faults.extend([Fault(bytes=700), Fault(status=503), Fault(bytes=-1), Fault(status=502)])
    assert page.evaluate("watch(answers.start('/chat', { text: 'hi' }))") == "done"
    assert shown(page) == "".join(words(40))
    asked_once(ollama, site)


def test_a_server_that_stays_away_has_an_end(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(40))
    site.faults.extend([Fault(bytes=700), Fault(status=503), Fault(status=503)])
    page.evaluate("answers.patience = 300")
    wrong = page.evaluate("wrong(answers.start('/chat', { text: 'hi' }))")
    site.faults.clear()
    assert (wrong["name"], wrong["code"], wrong["message"]) == (
        "AnswerError",
        "away",
        "the server answered with status 503",
    )


def test_a_proxy_that_does_not_wait_for_the_model(page: Page, site: Site, ollama: FakeOllama) -> None:
    """It tells the page 504; the answer goes on."""
    gate = Gate()
    ollama.script("/api/chat", Reply(telling(5).steps, before_head=[gate]))
    site.faults.append(Fault(status=504, passes=True))
    page.evaluate("window.outcome = watch(answers.start('/chat', { text: 'hi' })), null")
    page.wait_for_function("states.includes('receiving')")
    gate.open()
    assert page.evaluate("outcome") == "done"
    assert shown(page) == "".join(words(5))
    asked_once(ollama, site)


def test_a_slow_network(page: Page, context: BrowserContext, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(60))
    slow = {"offline": False, "latency": 200, "downloadThroughput": 8000, "uploadThroughput": 4000}
    context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    assert page.evaluate("watch(answers.start('/chat', { text: 'hi' }))") == "done"
    assert shown(page) == "".join(words(60))
    assert page.evaluate("states") == ["receiving", "over"]


def test_a_network_that_is_gone_for_a_while(
    page: Page, context: BrowserContext, site: Site, ollama: FakeOllama
) -> None:
    gate = Gate()
    steps = telling(40).steps
    ollama.script("/api/chat", Reply([*steps[:20], gate, *steps[20:]]))
    page.evaluate("window.outcome = watch(answers.start('/chat', { text: 'hi' })), null")
    until_shown(page, "19 ")
    context.set_offline(True)
    page.wait_for_function("states.includes('waiting')")
    gate.open()
    until(site, lambda: site.results)
    context.set_offline(False)
    assert page.evaluate("outcome") == "done"
    assert shown(page) == "".join(words(40))
    asked_once(ollama, site)


# -- a question that is not sure to have arrived --


def test_a_question_that_never_arrives_is_not_sent_again(page: Page, site: Site, ollama: FakeOllama) -> None:
    page.route("**/chat", lambda route: route.abort())
    page.evaluate("window.asked = answers.start('/chat', { text: 'hi' })")
    wrong = page.evaluate("wrong(asked)")
    assert (wrong["name"], wrong["status"], wrong["code"]) == ("AnswerError", 404, "unknown")
    until(site, lambda: len(site.requests) >= 6)
    answer = page.evaluate("asked.id")
    assert site.requests[2:] == [*[f"GET /answers/{answer}?after=0"] * 3, f"POST /answers/{answer}"]
    # If it arrives after all, its answer is not for nobody.
    response = page.request.post(f"{site.url}/chat", data={"text": "hi"}, headers={"X-Stream-Id": answer})
    assert '"its page has given up"' in response.text()
    assert [result.reason for result in site.results] == ["its page has given up"]


def test_a_question_whose_answer_is_refused_is_not_stopped(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply.error(404, "model 'x' not found"))
    wrong = page.evaluate("wrong(answers.start('/chat', { text: 'hi' }))")
    assert (wrong["status"], wrong["message"]) == (404, "model 'x' not found")
    assert not [request for request in site.requests if request.startswith(("POST /answers", "GET /answers/"))]


def test_an_answer_that_is_not_one(page: Page, site: Site) -> None:
    """A page to log in, say."""
    page.route("**/answers/*", lambda route: route.fulfill(body="<h1>Log in", content_type="text/html"))
    wrong = page.evaluate(f"wrong(answers.attach('{ID}'))")
    assert (wrong["name"], wrong["status"]) == ("AnswerError", 200)


def test_a_refusal_is_not_asked_for_twice(page: Page, site: Site) -> None:
    for status in (400, 401, 403, 404, 409, 410, 500, 501, 507):
        for how in ("start('/chat', { text: 'hi' })", f"attach('{ID}')"):
            site.requests.clear()
            site.faults.append(Fault(status=status))
            wrong = page.evaluate(f"wrong(answers.{how})")
            assert (wrong["name"], wrong["status"]) == ("AnswerError", status)
            assert len(site.requests) == 1


def body(*events: tuple[int | None, str, Any]) -> str:
    return "".join(
        f"{'' if number is None else f'id: {number}'}\nevent: {name}\ndata: {json.dumps(data)}\n\n".lstrip()
        for number, name, data in events
    )


OPEN = (1, "open", {"id": ID})
END = {"outcome": "done"}


def chunk(number: int) -> tuple[int, str, Any]:
    return number, "chunk", {"message": {"content": f"{number} "}}


COMING: dict[str, tuple[list[tuple[int | None, str, Any]], dict[str, str]]] = {
    "twice": ([OPEN, chunk(2), OPEN, chunk(2), (3, "end", END)], END),
    "a hole": ([OPEN, chunk(2), chunk(4), (5, "end", END)], {"code": "gap"}),
    "no number": ([OPEN, chunk(2), (None, "chunk", {})], {"code": "gap"}),
    "gap": ([OPEN, chunk(2), (None, "error", {"error": "parts are missing", "code": "gap"})], {"code": "gap"}),
    "gone": ([OPEN, chunk(2), (None, "error", {"error": "not kept", "code": "gone"})], {"code": "gone"}),
    "superseded": ([OPEN, chunk(2), (None, "end", {"outcome": "superseded"})], {"outcome": "superseded"}),
    "lost": ([OPEN, chunk(2), (3, "end", {"outcome": "lost"})], {"outcome": "lost"}),
}


def test_events_as_they_may_come(page: Page, site: Site) -> None:
    def come(route: Route) -> None:
        name = unquote(route.request.url.partition("/answers/")[2].partition("?")[0])
        route.fulfill(body=body(*COMING[name][0]), content_type="text/event-stream")

    page.route("**/answers/*", come)
    for name, (_, expected) in COMING.items():
        page.evaluate("page.textContent = ''")
        found = page.evaluate("id => wrong(answers.attach(id))", name)
        assert shown(page) == "2 ", name
        assert {key: found.get(key) for key in expected} == expected, name


# -- three gestures --


def test_nothing_connects_again_after_a_stop(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    page.evaluate("window.answer = answers.start('/chat', { text: 'hi' })")
    page.evaluate("window.outcome = watch(answer), null")
    until_shown(page, "fake Ollama")
    site.requests.clear()
    site.faults.extend([Fault(status=503), Fault(bytes=-1)])
    assert page.evaluate("answer.stop('enough')") is True
    assert page.evaluate("outcome") == "detached"
    for event in ("online", "pageshow"):
        page.evaluate("name => dispatchEvent(new Event(name))", event)
    assert ollama.wait_for_requests(timeout=BOUND)[0].connection.wait_left(BOUND)
    until(site, lambda: site.results)
    assert (site.results[0].outcome, site.results[0].reason) == ("aborted", "enough")
    answer = page.evaluate("answer.id")
    assert site.requests == [f"POST /answers/{answer}"] * 3
    assert page.evaluate("states") == ["receiving", "over"]
    assert page.evaluate("answer.stop()") is False  # it has ended


def test_a_stop_while_the_connection_is_lost(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    site.faults.extend([Fault(bytes=2000), *[Fault(status=503)] * 3])
    page.evaluate("window.answer = answers.start('/chat', { text: 'hi' })")
    page.evaluate("window.outcome = watch(answer), null")
    until(site, lambda: not site.faults)
    page.wait_for_function("states.at(-1) === 'waiting'")
    page.evaluate("""() => {
        const send = window.fetch;
        window.sent = [];
        window.fetch = (url, init) => {
            sent.push(init.method ?? "GET");
            return send(url, init);
        };
        window.stopped = answer.stop();
    }""")
    assert page.evaluate("outcome") == "detached"
    assert page.evaluate("stopped") is True
    assert page.evaluate("sent") == ["POST"]
    assert ollama.wait_for_requests(timeout=BOUND)[0].connection.wait_left(BOUND)
    assert site.requests[-1].startswith("POST /answers/")


def test_leaving_the_loop_detaches_and_the_answer_goes_on(page: Page, site: Site, ollama: FakeOllama) -> None:
    gate = Gate()
    steps = telling(20).steps
    ollama.script("/api/chat", Reply([*steps[:10], gate, *steps[10:]]))
    page.evaluate("window.answer = answers.start('/chat', { text: 'hi' })")
    page.evaluate("""async () => {
        for await (const { number, data } of answer) {
            window.page.append(data.message?.content ?? "");
            if (number === 7) break;
        }
    }""")
    [running] = page.evaluate("answers.running()")
    assert (running["id"], running["state"]) == (page.evaluate("answer.id"), "running")
    gate.open()
    assert page.evaluate("watch(answers.attach(answer.id, { after: answer.after }))") == "done"
    assert shown(page) == "".join(words(20))
    assert page.evaluate("answers.running()") == []
    # Behind its end nothing comes, and that is not a failure.
    assert page.evaluate("watch(answers.attach(answer.id, { after: 23 }))") == "detached"


def test_nothing_comes_after_a_detach_even_if_the_request_cannot_be_aborted(
    page: Page, site: Site, ollama: FakeOllama
) -> None:
    gate = Gate()
    ollama.script("/api/chat", Reply(telling(3).steps, before_head=[gate]))
    page.evaluate("AbortController.prototype.abort = () => {}")
    page.evaluate("window.answer = answers.start('/chat', { text: 'hi' })")
    page.evaluate("window.outcome = watch(answer), null")
    assert gate.wait_reached(BOUND)
    page.evaluate("answer.detach()")
    gate.open()
    assert page.evaluate("outcome") == "detached"
    assert (shown(page), page.evaluate("states")) == ("", ["over"])


# -- without the module, and as the documentation has it --


def test_an_event_source(page: Page, site: Site, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", telling(40))
    assert page.evaluate("id => watch(answers.start('/chat', { text: 'hi' }, { id }))", ID) == "done"
    site.requests.clear()
    # It connects again where it was cut; behind the end it is told to stop.
    site.faults.append(Fault(bytes=1500))
    text = page.evaluate(
        """(id) => new Promise((resolve) => {
            const source = new EventSource(`/answers/${id}`);
            let text = "";
            source.addEventListener("chunk", ({ data }) => (text += JSON.parse(data).message.content ?? ""));
            source.addEventListener("end", ({ lastEventId }) => {
                source.close();
                const behind = new EventSource(`/answers/${id}?after=${lastEventId}`);
                behind.onerror = () => behind.readyState === EventSource.CLOSED && resolve(text);
            });
        })""",
        ID,
    )
    assert text == "".join(words(40))
    assert site.requests == [f"GET /answers/{ID}", f"GET /answers/{ID}", f"GET /answers/{ID}?after=43"]


def test_the_page_of_the_docs(
    browser: Browser, page: Page, context: BrowserContext, site: Site, ollama: FakeOllama
) -> None:
    """A reload goes on, a phone shows the same, Stop there ends both."""
    [script] = re.findall(r"^```js\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    site.head = f"<script type='module'>{script}</script>"
    first, second, rest = Gate(), Gate(), Gate()
    steps = telling(30).steps
    ollama.script("/api/chat", Reply([*steps[:10], first, *steps[10:20], second, *steps[20:-1], rest]))
    page.reload()
    page.locator("input").fill("hi")
    page.keyboard.press("Enter")
    until_shown(page, "9 ")
    page.reload()
    until_shown(page, "9 ")
    first.open()
    until_shown(page, "19 ")
    phone = browser.new_context()
    try:
        phone.add_cookies([{"name": "user", "value": context.cookies()[0]["value"], "url": site.url}])
        other = opened(phone, site)
        until_shown(other, "19 ")
        second.open()
        until_shown(other, "29 ")
        until_shown(page, "29 ")
        assert shown(other) == shown(page) == "".join(words(30))
        other.get_by_role("button", name="Stop").click()
        expect(page.locator("#page")).to_contain_text("aborted")
        assert ollama.wait_for_requests(timeout=BOUND)[0].connection.wait_left(BOUND)
    finally:
        phone.close()
    asked_once(ollama, site)
