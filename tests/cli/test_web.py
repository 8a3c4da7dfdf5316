"""The chat page's server, without a browser: who may use it, what it passes on, and the command. The page itself is in
tests/real/test_web.py."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from real.web_page import BOUND, environment, web_page
from typer.testing import CliRunner

import ollama_async.cli
from ollama_async import AsyncClient, Timeouts, TruncationWarning
from ollama_async.cli._web import _MAX_BODY, PORT, Chats, Guard, parse_sites, parse_unattended
from ollama_async.testing import FakeOllama, Gate, Reply, Stall, nothing_left_behind

ASKED = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
HELP = (["--help"], ["web", "--help"])
ID = "0123456789abcdefghijklmnopqrstuv"


class Said:
    """In place of the command line's session."""

    def explain(self, error: Exception) -> str:
        return f"explained: {error}"


def chats_of(fake_ollama: FakeOllama) -> list[Any]:
    return [request for request in fake_ollama.requests if request.route == "/api/chat"]


@pytest_asyncio.fixture
async def page(fake_ollama: FakeOllama) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the page's server, as its own page would be one."""
    async with AsyncClient(fake_ollama.url) as client:
        chats: Any = Chats(Said(), client, Timeouts(), "a notice")  # type: ignore[arg-type]
        transport = httpx.ASGITransport(chats.app("box.local"))
        base_url = "http://127.0.0.1:11480"
        async with chats.answers, httpx.AsyncClient(transport=transport, base_url=base_url) as made:
            yield made


# -- who may use it --


@pytest.mark.parametrize(
    "host", ["127.0.0.1:11480", "127.0.0.1", "localhost:9", "[::1]:11480", "192.168.1.7:80", "box.local", "LOCALHOST"]
)
async def test_hosts_that_nobody_else_can_have(page: httpx.AsyncClient, host: str) -> None:
    answer = await page.get("/", headers={"Host": host})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host",
    ["", "attacker.test", "attacker.test:11480", "localhost.attacker.test", "127.0.0.1.attacker.test", "[::1", "a b"],
)
@pytest.mark.parametrize("path", ["/", "/page.js", "/api/models", "/nowhere"])
async def test_other_hosts_are_refused(page: httpx.AsyncClient, host: str, path: str) -> None:
    answer = await page.get(path, headers={"Host": host})
    assert answer.status_code == 403
    assert "open it under the address" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://attacker.test"},
        {"Origin": "null"},
        {"Origin": "http://localhost:11480"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/chat"), ("POST", f"/api/answers/{ID}"), ("GET", "/page.js")]
)
async def test_other_sites_are_refused(
    page: httpx.AsyncClient, fake_ollama: FakeOllama, headers: dict[str, str], method: str, path: str
) -> None:
    answer = await page.request(method, path, json=ASKED, headers=headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert fake_ollama.requests == ()


async def test_the_page_itself_may(page: httpx.AsyncClient) -> None:
    headers = {"Origin": "http://127.0.0.1:11480", "Sec-Fetch-Site": "same-origin"}
    assert (await page.post("/api/chat", json=ASKED, headers=headers)).status_code == 200


async def test_a_link_from_elsewhere_leads_to_the_page(page: httpx.AsyncClient) -> None:
    assert (await page.get("/", headers={"Sec-Fetch-Site": "cross-site"})).status_code == 200


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_only_json_is_taken(page: httpx.AsyncClient, fake_ollama: FakeOllama, media_type: str) -> None:
    answer = await page.post("/api/chat", content=json.dumps(ASKED), headers={"Content-Type": media_type})
    assert answer.status_code == 415
    assert fake_ollama.requests == ()


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/models", "/nowhere", "/vendor/marked.js"])
async def test_each_answer_has_the_policy(page: httpx.AsyncClient, path: str) -> None:
    headers = (await page.get(path)).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


async def test_a_refusal_has_it_too(page: httpx.AsyncClient) -> None:
    assert "content-security-policy" in (await page.get("/", headers={"Host": "attacker.test"})).headers


async def test_what_is_not_a_request_is_passed_on() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    await Guard(app, "")({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert passed == ["lifespan"]


# -- behind a proxy that has a name --

OWN, NAME = "127.0.0.1:11480", "chat.example.com"


@contextlib.asynccontextmanager
async def behind_proxy(fake: FakeOllama, *allowed: str) -> AsyncIterator[httpx.AsyncClient]:
    async with AsyncClient(fake.url) as client:
        chats: Any = Chats(Said(), client, Timeouts())  # type: ignore[arg-type]
        transport = httpx.ASGITransport(chats.app("127.0.0.1", parse_sites(allowed)))
        async with chats.answers, httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as made:
            yield made


async def statuses(page: httpx.AsyncClient, host: str, origin: str) -> tuple[int, int]:
    """What the page and a question are answered: the proxy passes the name on as Host, or it does not, as nginx."""
    headers = {"Host": host, "Origin": origin, "Sec-Fetch-Site": "same-origin"}
    shown = await page.get("/", headers={"Host": host})
    return shown.status_code, (await page.post("/api/chat", json=ASKED, headers=headers)).status_code


@pytest.mark.parametrize(
    ("allowed", "host", "origin", "expected"),
    [
        # As an address.
        (f"https://{NAME}", NAME, f"https://{NAME}", (200, 200)),
        (f"https://{NAME}", OWN, f"https://{NAME}", (200, 200)),
        (f"https://{NAME}/", f"{NAME}:443", f"https://{NAME}", (200, 200)),
        (f"https://{NAME}:8443", f"{NAME}:8443", f"https://{NAME}:8443", (200, 200)),
        (f"https://{NAME}:8443", OWN, f"https://{NAME}:8443", (200, 200)),
        (f"https://{NAME}:8443", OWN, f"https://{NAME}", (200, 403)),
        (f"https://{NAME}", OWN, f"http://{NAME}", (200, 403)),
        (f"https://{NAME}", NAME, f"http://{NAME}", (200, 403)),
        (f"HTTPS://{NAME.upper()}", NAME, f"https://{NAME}", (200, 200)),
        # As a name.
        (NAME, NAME, f"https://{NAME}", (200, 200)),
        (NAME, OWN, f"https://{NAME}", (200, 200)),
        (NAME, OWN, f"http://{NAME}", (200, 200)),
        (NAME, f"{NAME}:8443", f"https://{NAME}:8443", (200, 200)),
        (NAME, OWN, f"https://{NAME}:8443", (200, 403)),
        # Others.
        (NAME, NAME, "https://attacker.test", (200, 403)),
        (NAME, OWN, "https://attacker.test", (200, 403)),
        (NAME, OWN, f"https://a.{NAME}", (200, 403)),
        (NAME, OWN, f"https://{NAME}.attacker.test", (200, 403)),
        (NAME, OWN, "null", (200, 403)),
        (NAME, f"a.{NAME}", f"https://a.{NAME}", (403, 403)),
        (NAME, "attacker.test", f"https://{NAME}", (403, 403)),
        # And as without a proxy.
        (NAME, OWN, f"http://{OWN}", (200, 200)),
    ],
)
async def test_a_proxy_that_is_allowed_and_no_other_site(
    fake_ollama: FakeOllama, allowed: str, host: str, origin: str, expected: tuple[int, int]
) -> None:
    async with behind_proxy(fake_ollama, allowed) as page:
        assert await statuses(page, host, origin) == expected
    assert len(chats_of(fake_ollama)) == (expected[1] == 200)


async def test_a_refusal_names_the_option(fake_ollama: FakeOllama) -> None:
    async with behind_proxy(fake_ollama) as page:
        by_host = await page.get("/", headers={"Host": NAME})
        by_origin = await page.post("/api/chat", json=ASKED, headers={"Origin": f"https://{NAME}"})
    for answer in (by_host, by_origin):
        assert answer.status_code == 403
        assert NAME in answer.json()["error"]
        assert "--allow-host" in answer.json()["error"]


@pytest.mark.parametrize(
    "site", ["*", "", "https://", "ftp://a", "a/b", "http://a/b", "a?b", "u@a", "a b", "a:99999", "a:x", "*.a", "://a"]
)
def test_a_site_that_cannot_be_one(fake_ollama: FakeOllama, site: str) -> None:
    result = CliRunner().invoke(
        ollama_async.cli.app,
        ["--host", fake_ollama.url, "web", "--no-browser", "--allow-host", site],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 2
    assert f"invalid site {site!r}: give a name such as" in result.output


def test_sites_are_given_to_the_command(fake_ollama: FakeOllama) -> None:
    options = ["--allow-host", "one.test", "--allow-host", "https://two.test"]
    with web_page(fake_ollama.url, *options) as served, httpx.Client(base_url=served.url, trust_env=False) as client:
        assert "Everyone whom the proxy lets in at one.test, two.test can use this page and your models" in served.said
        found = [client.get("/", headers={"Host": host}).status_code for host in ("one.test", "two.test", "three.test")]
    assert found == [200, 200, 403]


# -- what it serves --


async def test_all_of_the_page_is_in_the_package(page: httpx.AsyncClient) -> None:
    """Nothing is loaded from elsewhere: each file that a file names is there."""
    seen: set[str] = set()
    left = ["index.html"]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = await page.get(f"/{path}")
        assert answer.status_code == 200, path
        if path.endswith(".js"):
            assert "javascript" in answer.headers["content-type"]
        if not path.startswith("vendor/"):
            assert not re.search(r"""(src|href|from|url)\W{1,3}(https?:)?//""", answer.text), path
        left += re.findall(r"""(?:src|href)="([\w./]+)\"""", answer.text) if path.endswith(".html") else []
        left += re.findall(r"""^import .* from "\./([\w./]+)";$""", answer.text, re.MULTILINE)
    assert {"page.js", "answers.js", "page.css", "icon.svg", "vendor/marked.js", "vendor/purify.js"} <= seen
    folder = Path(ollama_async.cli.__file__).with_name("web") / "vendor"
    assert sorted(file.name for file in folder.glob("LICENSE*")) == ["LICENSE-dompurify.txt", "LICENSE-marked.txt"]


async def test_the_models(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    answer = await page.get("/api/models")
    assert answer.json() == {"models": ["fake:latest"], "default": "fake:latest", "notice": "a notice"}
    fake_ollama.stop()
    answer = await page.get("/api/models")
    assert answer.status_code == 502
    assert answer.json()["error"].startswith("explained: Failed to connect")


@pytest.mark.parametrize(
    "asked",
    [
        "hi",
        [],
        {"model": "fake"},
        {"model": 1, "messages": []},
        {"model": "", "messages": []},
        {"model": "fake", "messages": []},
        {"model": "fake", "messages": [{"role": "tool", "content": "x"}]},
        {"model": "fake", "messages": [{"role": "user", "content": ["x"]}]},
    ],
)
async def test_an_invalid_question_is_refused(page: httpx.AsyncClient, fake_ollama: FakeOllama, asked: Any) -> None:
    answer = await page.post("/api/chat", json=asked)
    assert answer.status_code == 400
    wrong = ("this is not a question to a model: ", "model='': give the name", "message=[]: there is no message")
    assert answer.json()["error"].startswith(wrong)
    assert fake_ollama.requests == ()


async def test_a_conversation_has_the_rules_of_chat(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    kept = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A, and th"}]
    # The answers to these ended before their first word.
    dropped = [{"role": "user", "content": "b"}, {"role": "assistant", "content": ""}] * 2
    # The last answer is to go on where it broke off.
    last = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "C, and"}]
    answer = await page.post("/api/chat", json={"model": "fake", "messages": [*kept, *dropped, *last]})
    assert answer.status_code == 200
    [request] = chats_of(fake_ollama)
    assert request.json()["messages"] == [*kept, *last]


async def pieces(size: int, *, of: int = 65536) -> AsyncIterator[bytes]:
    """A body without a length: of so many bytes."""
    for _ in range(size // of):
        yield b" " * of


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
@pytest.mark.parametrize("path", ["/api/chat", f"/api/answers/{ID}"])
async def test_a_body_has_a_limit(page: httpx.AsyncClient, fake_ollama: FakeOllama, path: str, declared: bool) -> None:
    headers = {"Content-Type": "application/json", **({"Content-Length": str(_MAX_BODY + 1)} if declared else {})}
    answer = await page.post(path, content=pieces(2 * _MAX_BODY), headers=headers)
    if path.startswith("/api/answers") and not declared:
        assert answer.status_code == 400  # its own limit is lower
        return
    assert answer.status_code == 413
    assert answer.json()["error"] == "the request has more than 4 MB: begin a new chat"
    assert answer.headers["connection"] == "close"
    assert "content-security-policy" in answer.headers
    assert fake_ollama.requests == ()


async def test_a_body_up_to_the_limit_is_taken(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    body = json.dumps(ASKED)
    answer = await page.post(
        "/api/chat", content=body + " " * (_MAX_BODY - len(body)), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("body", ['{"model":"m","messages":[' + "1," * 2_000_000 + "1]}", "[" * _MAX_BODY])
async def test_what_is_wrong_in_many_places_is_refused_at_the_first(page: httpx.AsyncClient, body: str) -> None:
    began = time.process_time()
    answer = await page.post("/api/chat", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert time.process_time() - began < 1


def test_the_page_knows_the_limits_of_its_server() -> None:
    script = (Path(ollama_async.cli.__file__).with_name("web") / "page.js").read_text()
    assert f"const LONGEST_QUESTION = {_MAX_BODY // 1024 // 1024} * 1024 * 1024;" in script


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_a_long_body_is_not_read_to_its_end(fake_ollama: FakeOllama, declared: bool) -> None:
    """By a real server: it answers, closes the connection, and keeps no more than the limit."""
    size, block = 200 * 2**20, b"x" * 2**20
    length = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
    with web_page(fake_ollama.url) as served:
        url = httpx.URL(served.url)
        assert url.port is not None
        with socket.create_connection((url.host, url.port), BOUND) as client:
            head = f"POST /api/chat HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
            client.sendall(head.encode())
            sent = 0
            try:
                while sent < size:
                    client.sendall(block if declared else b"%x\r\n%b\r\n" % (len(block), block))
                    sent += len(block)
            except ConnectionError:
                pass
            assert sent < 64 * 2**20
        assert httpx.get(served.url, trust_env=False).status_code == 200
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        assert int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) < 200 * 1024
    assert fake_ollama.wait_for_requests(path="/api/tags")
    assert not [request for request in fake_ollama.requests if request.route == "/api/chat"]


async def test_only_text_is_passed_on(page: httpx.AsyncClient, fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """A picture could be a path, and the client would read that from this disk."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    said = {"role": "user", "content": "hi", "images": [str(secret)]}
    answer = await page.post("/api/chat", json={"model": "fake", "messages": [said], "options": {"num_predict": -1}})
    assert answer.status_code == 200
    [request] = [request for request in fake_ollama.requests if request.route == "/api/chat"]
    assert request.json()["messages"] == [{"role": "user", "content": "hi"}]
    assert "options" not in request.json()


async def test_a_stop_that_comes_before_its_question(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    assert (await page.post(f"/api/answers/{ID}", json={"reason": "early"})).status_code == 404
    answer = await page.post("/api/chat", json=ASKED, headers={"X-Stream-Id": ID})
    end = json.loads(answer.text.rpartition("event: end\ndata: ")[2])
    assert (end["outcome"], end["reason"], end["text"]) == ("aborted", "early", "")


ANN, BOB = {"X-Chat-Owner": "a" * 32}, {"X-Chat-Owner": "b" * 32}


async def test_an_answer_that_runs_is_shown_to_its_own_browser_with_its_question(
    fake_ollama: FakeOllama,
) -> None:
    gate = Gate()
    fake_ollama.script("/api/chat", Reply([*Reply.chat("Half", done=False).steps, gate, *Reply.chat(".").steps]))
    with web_page(fake_ollama.url) as page:
        async with httpx.AsyncClient(base_url=page.url, trust_env=False, timeout=BOUND) as client:
            async with client.stream("POST", "/api/chat", json=ASKED, headers=ANN | {"X-Stream-Id": ID}) as response:
                assert response.status_code == 200
            # It was left in mid-answer.
            [listed] = (await client.get("/api/answers", headers=ANN)).json()
            assert (listed["id"], listed["state"]) == (ID, "running")
            assert (await client.get(f"/api/questions/{ID}", headers=ANN)).json() == ASKED
            other = [{"role": "user", "content": "other"}]
            again = await client.post("/api/chat", json=ASKED | {"messages": other}, headers=ANN | {"X-Stream-Id": ID})
            assert again.status_code == 409
            assert (await client.get(f"/api/questions/{ID}", headers=ANN)).json() == ASKED
            for headers in (BOB, {}):
                assert (await client.get("/api/answers", headers=headers)).json() == []
                for path in (f"/api/questions/{ID}", f"/api/answers/{ID}"):
                    assert (await client.get(path, headers=headers)).status_code == 404
                assert (await client.post(f"/api/answers/{ID}", json={}, headers=headers)).status_code == 404
            gate.open()
            rest = await client.get(f"/api/answers/{ID}?after=2", headers=ANN)
            end = json.loads(rest.text.rpartition("event: end\ndata: ")[2])
            assert (end["outcome"], end["text"]) == ("done", "Half.")
            # What nobody needs any more is not kept.
            assert (await client.get(f"/api/questions/{ID}", headers=ANN)).status_code == 404


async def test_a_question_without_an_answer_is_not_kept(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        chats: Any = Chats(Said(), client, Timeouts())  # type: ignore[arg-type]
        transport = httpx.ASGITransport(chats.app())
        async with chats.answers, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as page:
            for headers in (ANN | {"X-Stream-Id": ID}, {"X-Chat-Owner": "x" * 500, "X-Stream-Id": ID}, {}):
                for asked in (ASKED, ASKED | {"model": "nope"}, ASKED | {"model": ""}):
                    await page.post("/api/chat", json=asked, headers=headers)
                    assert chats._questions == {}


# -- tools --


class Tools:
    """Functions that a model may call."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.stopped = False

    async def weather(self, city: str) -> str:
        """Tell the weather."""
        return f"{city}: 20 C"

    async def hang(self) -> str:
        """Wait for ever."""
        self.reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True
        return ""


def calling(*names: str, **arguments: str) -> Reply:
    calls = [{"id": str(n), "function": {"name": name, "arguments": arguments}} for n, name in enumerate(names)]
    return Reply.chat("I look.", tool_calls=calls)


@contextlib.asynccontextmanager
async def page_with(tools: Tools, fake_ollama: FakeOllama) -> AsyncIterator[httpx.AsyncClient]:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        chats: Any = Chats(Said(), client, Timeouts(), tools=[tools.weather, tools.hang])  # type: ignore[arg-type]
        transport = httpx.ASGITransport(chats.app())
        async with chats.answers, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as made:
            yield made
        assert chats._questions == {}


def events(text: str) -> list[tuple[str, Any]]:
    return [(name, json.loads(data)) for name, data in re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)]


def told(text: str) -> list[tuple[Any, ...]]:
    """What a page is told of an answer: texts, calls, results and their outcomes."""
    found: list[tuple[Any, ...]] = []
    for name, data in events(text):
        message = data.get("message", {})
        if message.get("role") == "tool":
            found.append((message["tool_name"], message["content"], message.get("outcome", "done")))
        elif name == "chunk" and message.get("tool_calls"):
            found += [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        elif name == "chunk" and message.get("content"):
            found.append((message["content"],))
    return found


async def test_calls_of_tools_are_part_of_the_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", "nothing", city="Lima"), Reply.chat("It is ", "20 C."))
    async with AsyncClient(fake_ollama.url) as client:
        await client.load("fake")
    async with page_with(Tools(), fake_ollama) as page:
        answer = await page.post("/api/chat", json=ASKED)
        again = events((await page.get(f"/api/answers/{answer.headers['x-stream-id']}")).text)
    assert again == events(answer.text)
    assert sorted(told(answer.text)[1:5], key=str) == [
        ("nothing", "error: there is no tool 'nothing'; there are: weather, hang", "error"),
        ("nothing", {"city": "Lima"}),
        ("weather", "Lima: 20 C", "done"),
        ("weather", {"city": "Lima"}),
    ]
    assert [told(answer.text)[0], *told(answer.text)[5:]] == [("I look.",), ("It is ",), ("20 C.",)]
    name, end = again[-1]
    assert (name, end["outcome"], end["text"]) == ("end", "done", "I look.It is 20 C.")
    usage = end["context_usage"]
    assert usage["prompt"] == end["response"]["prompt_eval_count"]
    assert (usage["limit"], usage["cut"]) == (4096, False)
    assert [tool["function"]["name"] for tool in chats_of(fake_ollama)[0].json()["tools"]] == ["weather", "hang"]


async def test_a_stop_ends_a_running_tool(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", calling("weather", "hang", city="Lima"), calling("hang"))
    tools = Tools()
    async with page_with(tools, fake_ollama) as page:
        asking = asyncio.create_task(page.post("/api/chat", json=ASKED, headers={"X-Stream-Id": ID}))
        async with asyncio.timeout(BOUND):
            await tools.reached.wait()
            assert (await page.post(f"/api/answers/{ID}", json={"reason": "Stop"})).status_code == 200
            answer = await asking
    assert tools.stopped
    aborted = "aborted: the call was stopped before it had a result"
    assert told(answer.text)[-2:] == [("hang", {}), ("hang", aborted, "aborted")]
    end = events(answer.text)[-1][1]
    assert (end["outcome"], end["reason"]) == ("aborted", "Stop")
    assert len(chats_of(fake_ollama)) == 2


async def test_a_stop_ends_the_model_behind_a_tool(fake_ollama: FakeOllama) -> None:
    gate = Gate()
    half = [*Reply.chat("Half", done=False).steps, gate, Stall()]
    fake_ollama.script("/api/chat", calling("weather", city="Lima"), Reply(half))
    async with page_with(Tools(), fake_ollama) as page:
        asking = asyncio.create_task(page.post("/api/chat", json=ASKED, headers={"X-Stream-Id": ID}))
        async with asyncio.timeout(BOUND):
            await asyncio.to_thread(gate.wait_reached, BOUND)
            assert (await page.post(f"/api/answers/{ID}", json={})).status_code == 200
            assert await asyncio.to_thread(chats_of(fake_ollama)[1].connection.wait_left, BOUND)
            answer = await asking
        gate.open()
    assert told(answer.text)[-2:] == [("weather", "Lima: 20 C", "done"), ("Half",)]
    assert events(answer.text)[-1][1]["text"] == "I look.Half"


async def test_a_conversation_with_tools_is_passed_on(fake_ollama: FakeOllama) -> None:
    asked = {"id": "7", "function": {"name": "weather", "arguments": {"city": "Lima", "unit": None}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [asked]},
        {"role": "tool", "content": "20 C", "tool_name": "weather", "tool_call_id": "7"},
        {"role": "user", "content": "And now?"},
    ]
    async with page_with(Tools(), fake_ollama) as page:
        answer = await page.post("/api/chat", json={"model": "fake", "messages": messages})
        assert answer.status_code == 200
    assert chats_of(fake_ollama)[0].json()["messages"] == messages


async def test_what_is_no_conversation_with_tools_is_refused(fake_ollama: FakeOllama) -> None:
    async with page_with(Tools(), fake_ollama) as page:
        for said in (
            {"role": "tool", "content": "x"},
            {"role": "tool", "content": "x", "tool_name": 1},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]},
            {"role": "assistant", "content": "", "tool_calls": "x"},
        ):
            answer = await page.post("/api/chat", json={"model": "fake", "messages": [said]})
            assert answer.status_code == 400
            assert answer.json()["error"].startswith("this is not a question to a model: ")
        assert (await page.post("/api/chat", json=ASKED | {"model": ""})).status_code == 400
    assert fake_ollama.requests == ()


async def test_a_conversation_that_was_cut_is_told(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    too_long = Reply.error(400, "the input length exceeds the context length")
    fake_ollama.script("/api/chat", too_long, Reply.chat("So."))
    with pytest.warns(TruncationWarning):
        answer = await page.post("/api/chat", json=ASKED)
    assert events(answer.text)[-1][1]["context_usage"]["cut"] is True


@pytest.mark.parametrize(
    ("name", "error"), [("mytools", "write it as module:function"), ("nothing:weather", "ModuleNotFoundError")]
)
def test_tools_that_cannot_be_loaded(fake_ollama: FakeOllama, name: str, error: str) -> None:
    arguments = ["--host", fake_ollama.url, "web", "--no-browser", "--tools", name]
    result = CliRunner().invoke(ollama_async.cli.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert error in result.output


def test_ctrl_c_ends_a_running_tool(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    (tmp_path / "mytools.py").write_text(
        "import asyncio, pathlib\n"
        "async def hang() -> str:\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    (folder / 'reached').touch()\n"
        "    try:\n"
        "        await asyncio.Event().wait()\n"
        "    finally:\n"
        "        (folder / 'stopped').touch()\n"
    )
    fake_ollama.script("/api/chat", calling("hang"))
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(web_page(fake_ollama.url, "--tools", "mytools:hang", cwd=tmp_path))
        client = stack.enter_context(httpx.Client(base_url=page.url, trust_env=False, timeout=BOUND))
        response = stack.enter_context(client.stream("POST", "/api/chat", json=ASKED))
        for line in response.iter_lines():
            if '"tool_calls"' in line:
                break
        assert page.end()[0] == 130
        assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("0.5", 0.5), ("0", 0.1), ("none", None), ("NONE", None), (" 5 ", 5)]
)
def test_how_long_an_answer_goes_on_that_nobody_watches(text: str, seconds: float | None) -> None:
    assert parse_unattended(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "x", "1e99", "30s"])
def test_a_time_that_is_not_one(fake_ollama: FakeOllama, text: str) -> None:
    result = CliRunner().invoke(
        ollama_async.cli.app,
        ["--host", fake_ollama.url, "web", "--no-browser", f"--unattended={text}"],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 2
    assert f"invalid time {text!r}: give seconds" in result.output


async def test_an_error_of_the_model_server_keeps_its_words(page: httpx.AsyncClient, fake_ollama: FakeOllama) -> None:
    answer = await page.post("/api/chat", json=ASKED | {"model": "nope"})
    assert (answer.status_code, answer.json()["error"]) == (404, "model 'nope' not found")


# -- the command --


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ollama_async", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=BOUND, check=False)


def test_help_shows_it() -> None:
    assert re.search(
        r"^\W*web +Serve a chat page", CliRunner().invoke(ollama_async.cli.app, ["--help"]).output, re.MULTILINE
    )
    assert str(PORT) in CliRunner().invoke(ollama_async.cli.app, ["web", "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_how_to_install_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from ollama_async.__main__ import main; main()"
    command = [sys.executable, "-c", code, "web"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=BOUND, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert 'pip install "ollama-async[web]"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken(fake_ollama: FakeOllama) -> None:
    result = run("--host", fake_ollama.url, "web", "--no-browser", "--port", str(fake_ollama.port))
    assert result.returncode == 2
    assert f"cannot listen at port {fake_ollama.port} of 127.0.0.1" in " ".join(result.stderr.replace("│", "").split())


def test_the_usual_port_or_another_one(fake_ollama: FakeOllama) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", PORT))
            other.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        with web_page(fake_ollama.url, port=None) as served:
            assert str(PORT) not in served.url
            assert httpx.get(served.url, trust_env=False).status_code == 200


@pytest.mark.parametrize("address", ["localhost", "::1"])
def test_other_names_of_this_machine(fake_ollama: FakeOllama, address: str) -> None:
    with web_page(fake_ollama.url, "--host", address) as served:
        assert httpx.get(served.url, trust_env=False).status_code == 200
        assert "Everyone" not in served.said


def test_an_address_that_others_can_reach_is_warned_about(fake_ollama: FakeOllama) -> None:
    with web_page(fake_ollama.url, "--host", "0.0.0.0") as served:
        assert served.url.startswith("http://127.0.0.1:")
        assert "Everyone who can reach this machine can use this page and your models." in served.said


def test_the_embedded_server_stands_in(tmp_path: Path) -> None:
    with FakeOllama(models=[]) as empty, web_page(empty.url) as served:
        assert f"the server at {empty.url} has no model that chats" in served.said
        answer = httpx.get(f"{served.url}api/models", trust_env=False).json()
        assert answer["models"] == ["demonstration:latest"]
        assert "no model computes anything" in answer["notice"]


def test_a_browser_is_shown_the_page(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """The one that BROWSER names, as in Python's webbrowser."""
    shown = tmp_path / "shown"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {shown}.part && mv {shown}.part {shown}\n')
    browser.chmod(0o755)
    with web_page(fake_ollama.url, browser=str(browser)) as served:
        asyncio.run(asyncio.wait_for(_exists(shown), BOUND))
        assert shown.read_text().strip() == served.url


async def _exists(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "reply", [Reply.endless_chat(0.01), Reply(before_head=[Stall()])], ids=["answering", "loading"]
)
def test_ctrl_c_ends_it_and_the_answers(fake_ollama: FakeOllama, reply: Reply) -> None:
    fake_ollama.script("/api/chat", reply)
    with web_page(fake_ollama.url) as served:
        url = httpx.URL(served.url)
        body = json.dumps(ASKED).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((url.host, url.port), BOUND) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            [request] = fake_ollama.wait_for_requests(path="/api/chat", timeout=BOUND)
            assert served.end() == (130, "")
            assert request.connection.wait_left(BOUND)
            came = b""
            while part := client.recv(65536):
                came += part
    assert b"ollama-async web is ending" in came
