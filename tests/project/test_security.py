"""What is secret stays so, who is asked is who answers, and nothing is read or sent that was not named."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import importlib
import inspect
import logging
import os
import re
import socket
import ssl
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import trustme
from teardown.harness import BOUND, nothing_left_behind

from ollama_async import (
    AsyncClient,
    CancelToken,
    ChatResponse,
    ConnectError,
    DirectTransport,
    HostError,
    OllamaError,
    ProtocolError,
    RequestError,
)
from ollama_async._wire.guard import _at_home
from ollama_async._wire.http1 import Origin
from ollama_async.testing import Cut, FakeOllama, Reply, Stall

SECRET = "s3cret"
PART = {"model": "m", "message": {"role": "assistant", "content": "one "}, "done": False}
ANSWER = {**PART, "done": True}
TEXT = {"role": "assistant", "content": "x"}


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(server: FakeOllama) -> AsyncIterator[None]:
    async with nothing_left_behind(BOUND):
        yield


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def everything(error: BaseException) -> str:
    """All that a log or a terminal would show of an error: its text, notes, attributes, causes and contexts."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        exc = queue.pop()
        if exc is not None and exc not in seen:
            seen.append(exc)
            queue += [exc.__cause__, exc.__context__]
    shown = [f"{exc!r} {exc} {vars(exc) if isinstance(exc, OllamaError) else ''}" for exc in seen]
    return "\n".join([*shown, *traceback.format_exception(error)])


async def asked(client: AsyncClient, *, streaming: bool) -> Any:
    """What comes of a question: the answer, or the error."""
    call: Any = client.chat("m", "hi", stream=streaming)
    try:
        return await asyncio.wait_for(call.collect() if streaming else call, BOUND)
    except OllamaError as error:
        return error


streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["call", "stream"])


# -- credentials --


@pytest.mark.parametrize(
    "host",
    [
        "ftp://user:s3cret@127.0.0.1",
        "http://user:s3cret@127.0.0.1:x",
        "http://user:s3cret@no host",
        "http://user:s3cret@[::1",
        "http://user:s3cret@1:2:3:x",
        "http://user:s3cret@127.0.0.1/a b",
        "http://user:s3cret@\N{LATIN SMALL LETTER U WITH DIAERESIS} x",
        "user:s3cret@http://127.0.0.1",
        "http://user:s3cret/word@127.0.0.1",
        "//user:s3cret@127.0.0.1",
        "http:/user:s3cret@127.0.0.1",
    ],
)
def test_a_wrong_host_is_refused_without_showing_its_credentials(host: str) -> None:
    with pytest.raises(HostError) as caught:
        print(repr(AsyncClient(host)))
    assert SECRET not in everything(caught.value)


@streaming_or_not
@pytest.mark.parametrize("reply", ["ok", "error", "cut", "nonsense", "refused", "unresolvable", "redirect"])
async def test_credentials_of_the_host_are_sent_and_never_shown(
    server: FakeOllama, caplog: pytest.LogCaptureFixture, reply: str, streaming: bool
) -> None:
    caplog.set_level(0)
    address = {"refused": f"127.0.0.1:{free_port()}", "unresolvable": "no-such-host.invalid"}
    replies = {
        "ok": Reply([ANSWER]),
        "error": Reply.error(401, "unauthorized"),
        "cut": Reply([PART, Cut()]),
        "nonsense": Reply([b"nonsense\n"]),
        "redirect": Reply(status=307, headers={"Location": f"ftp://user:{SECRET}@127.0.0.1/"}),
    }
    if reply in replies:
        server.script("/api/chat", replies[reply])
    host = f"http://user:{SECRET}@{address.get(reply, f'127.0.0.1:{server.port}')}"
    async with AsyncClient(host, trust_env=False) as client:
        call: Any = client.chat("fake", "hi", stream=streaming)
        shown = [repr(client), repr(call)]
        try:
            await (call.collect() if streaming else call)
        except OllamaError as exc:
            assert reply != "ok"
            shown.append(everything(exc))
        else:
            assert reply == "ok"
        shown += [repr(client), repr(call), caplog.text]
    assert SECRET not in "\n".join(shown)
    if reply in replies:
        assert server.requests[0].header("authorization") == "Basic dXNlcjpzM2NyZXQ="
    else:
        assert server.requests == ()


KEYS: dict[str, dict[str, str]] = {
    "Authorization": {"Authorization": f"Bearer {SECRET}"},
    "X-API-Key": {"X-API-Key": SECRET},
    "Proxy-Authorization": {"Proxy-Authorization": f"Basic {SECRET}"},
    "Cookie": {"Cookie": f"session={SECRET}"},
}
FAILURES = {
    "ok": Reply([ANSWER]),
    "error": Reply.error(401, "unauthorized"),
    "cut": Reply([PART, Cut()]),
    "no answer": Reply(before_head=[Cut()]),
    "nonsense": Reply([b"nonsense\n"]),
    "no HTTP": Reply(raw=b"220 mail ESMTP\r\n", steps=[Cut()]),
}


@streaming_or_not
@pytest.mark.parametrize("reply", FAILURES)
@pytest.mark.parametrize("way", ["direct", "foreign", "proxy"])
async def test_a_key_is_in_no_log_error_or_repr(
    server: FakeOllama, caplog: pytest.LogCaptureFixture, reply: str, way: str, streaming: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    loop = asyncio.get_running_loop()
    loop.set_debug(True)  # it tells of what it runs
    loop.slow_callback_duration = 0.0
    options: dict[str, Any] = {}
    if way == "foreign":
        options["transport"] = httpx.AsyncHTTPTransport()
    if way == "proxy":
        options["proxy"] = f"http://user:{SECRET}@127.0.0.1:{server.port}"
    host = "http://models.example" if way == "proxy" else server.url
    headers = {name: value for pairs in KEYS.values() for name, value in pairs.items()}
    server.script("/api/chat", FAILURES[reply])
    try:
        async with AsyncClient(host, headers=headers, **options) as client:
            stream = client.chat("m", "hi", stream=True)
            answer = await asked(client, streaming=streaming)
            assert isinstance(answer, ChatResponse if reply == "ok" else OllamaError)
            shown = [repr(client), repr(stream), repr(answer), repr(client._client)]
            if isinstance(answer, OllamaError):
                shown.append(everything(answer))
    finally:
        loop.set_debug(False)
    assert SECRET not in "\n".join([*shown, caplog.text])
    assert server.requests[0].header("x-api-key") == SECRET


@pytest.mark.parametrize("key", [f"{SECRET}\r\nX: y", f"{SECRET}\x00"], ids=["CRLF", "NUL"])
async def test_a_key_of_the_environment_that_cannot_be_sent_is_not_shown(
    server: FakeOllama, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "OLLAMA_API_KEY": key})
    with pytest.raises(RequestError) as caught:
        async with AsyncClient(server.url, compat=True) as client:
            await client.version()
    assert SECRET not in everything(caught.value)
    assert server.requests == ()


@pytest.mark.parametrize("name", ["X-Key", "Authorization"])
@pytest.mark.parametrize("value", [f"{SECRET}\r\nX: y", f"{SECRET}\n", f"{SECRET}\0", f"{SECRET}\N{EURO SIGN}"])
@pytest.mark.parametrize("foreign", [False, True], ids=["direct", "foreign"])
async def test_a_header_cannot_break_out_of_its_place(server: FakeOllama, name: str, value: str, foreign: bool) -> None:
    transport = httpx.AsyncHTTPTransport() if foreign else None
    async with AsyncClient(server.url, transport=transport) as client:
        with pytest.raises(RequestError) as caught:
            await client.version(headers={name: value})
    assert SECRET not in everything(caught.value)
    assert server.requests == ()


# -- redirects --


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("way", ["direct", "foreign"])
async def test_no_key_is_sent_to_another_origin(server: FakeOllama, key: dict[str, str], status: int, way: str) -> None:
    transport = httpx.AsyncHTTPTransport() if way == "foreign" else None
    with FakeOllama() as other:
        server.script("/api/chat", Reply(status=status, headers={"Location": f"{other.url}/api/chat"}))
        async with AsyncClient(server.url, headers=key, transport=transport) as client:
            await asked(client, streaming=False)
        [first], [second] = server.requests, other.requests
    assert any(SECRET in value for _, value in first.headers)
    assert not any(SECRET in value for _, value in second.headers)
    assert second.header("host") == f"127.0.0.1:{other.port}"
    # The rest of the request is what it was.
    assert second.header("user-agent") == first.header("user-agent")


@pytest.mark.parametrize("way", ["direct", "foreign"])
async def test_a_redirect_that_makes_another_call_of_it_is_not_followed(server: FakeOllama, way: str) -> None:
    transport = httpx.AsyncHTTPTransport() if way == "foreign" else None
    with FakeOllama() as other:
        server.script("/api/chat", Reply(status=303, headers={"Location": f"{other.url}/api/chat"}))
        async with AsyncClient(server.url, transport=transport) as client:
            with pytest.raises(ProtocolError, match=f"redirects POST /api/chat to a GET of 127.0.0.1:{other.port}"):
                await client.chat("fake", "hi")
        assert other.requests == ()


@pytest.mark.parametrize("status", [301, 302])
async def test_a_call_that_is_moved_stays_the_call_that_it_was(server: FakeOllama, status: int) -> None:
    server.script("/api/chat", Reply(status=status, headers={"Location": "/api/generate"}))
    async with AsyncClient(server.url) as client:
        await asked(client, streaming=False)
    assert [(request.method, request.path) for request in server.requests] == [
        ("POST", "/api/chat"),
        ("POST", "/api/generate"),
    ]
    assert server.requests[1].body == server.requests[0].body


async def test_a_key_is_sent_within_one_origin(server: FakeOllama) -> None:
    server.script("/api/version", Reply(status=307, headers={"Location": "/elsewhere"}))
    server.script("/elsewhere", Reply.json({"version": "1"}))
    async with AsyncClient(server.url, headers=KEYS["X-API-Key"] | KEYS["Authorization"]) as client:
        assert (await client.version()).version == "1"
    assert server.requests[1].header("x-api-key") == SECRET
    assert server.requests[1].header("authorization") == f"Bearer {SECRET}"


async def asks_for_a_key(request: Any) -> None:
    request.headers["X-Hook"] = SECRET


def adds_a_key(request: httpx.Request) -> httpx.Request:
    request.headers["X-Flow"] = SECRET
    return request


# What of httpx, or of the caller's own code, writes headers, and when it does.
WRITERS: dict[str, dict[str, Any]] = {
    "cookies=": {"cookies": {"session": SECRET}},
    "auth=": {"auth": ("user", SECRET)},
    "Digest": {"auth": httpx.DigestAuth("user", SECRET)},
    "event hook": {"event_hooks": {"request": [asks_for_a_key]}},
    "auth flow": {"auth": adds_a_key},
    "Set-Cookie": {},
}


def own(server: FakeOllama, options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(server.url, trust_env=False, **options)


def foreign(server: FakeOllama, options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(server.url, trust_env=False, transport=httpx.AsyncHTTPTransport(), **options)


def lent(server: FakeOllama, options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(server.url, http_client=httpx.AsyncClient(follow_redirects=True, **options))


CLIENTS = pytest.mark.parametrize("make", [own, foreign, lent])


async def closed(client: AsyncClient) -> None:
    await client.aclose()
    await client._client.aclose()


@CLIENTS
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["another port", "another host"])
async def test_a_key_stays_with_its_origin(
    server: FakeOllama, make: Callable[..., AsyncClient], writer: str, host: str
) -> None:
    with FakeOllama(host=host) as other:
        headers = {"Location": f"{other.url}/api/version"}
        if writer == "Set-Cookie":
            headers["Set-Cookie"] = f"session={SECRET}"
        server.script("/api/version", Reply(status=307, headers=headers))
        client = make(server, WRITERS[writer])
        assert (await client.version(headers={"X-API-Key": SECRET})).version
        await closed(client)
        [first], [second] = server.requests, other.requests
    assert any(SECRET in value for _, value in first.headers)
    assert not any(SECRET in value or "Basic" in value for _, value in second.headers)


@CLIENTS
@pytest.mark.parametrize("writer", WRITERS)
async def test_within_an_origin_a_redirect_changes_nothing(
    server: FakeOllama, make: Callable[..., AsyncClient], writer: str
) -> None:
    headers = {
        "Location": "/elsewhere",
        **({"Set-Cookie": f"session={SECRET}; Path=/"} if writer == "Set-Cookie" else {}),
    }
    server.script("/api/version", Reply(status=307, headers=headers))
    server.script("/elsewhere", Reply.json({"version": "1"}))
    client = make(server, WRITERS[writer])
    assert (await client.version(headers={"X-API-Key": SECRET})).version == "1"
    await closed(client)
    first, second = server.requests
    ours = {"host", "x-api-key"} if writer in ("Set-Cookie", "Digest") else {name.lower() for name, _ in first.headers}
    assert {name.lower() for name, _ in second.headers} >= ours
    assert second.header("x-api-key") == SECRET
    if writer in ("cookies=", "Set-Cookie"):
        assert second.header("cookie") == f"session={SECRET}"


async def test_what_is_asked_of_ollama_com_has_no_key_of_this_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "for-ollama")
    asked_for: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked_for.append(request)
        return httpx.Response(200, json={"results": []})

    async with AsyncClient(
        "http://gate.example",
        headers={name: value for pairs in KEYS.values() for name, value in pairs.items()},
        cookies={"session": SECRET},
        transport=httpx.MockTransport(answer),
    ) as client:
        await client.web_search("q", headers={"X-Mine": "of this call"})
    [request] = asked_for
    assert not any(SECRET in value for value in request.headers.values())
    assert request.headers["authorization"] == "Bearer for-ollama"
    assert request.headers["x-mine"] == "of this call"


async def _writes_a_key(request: httpx.Request) -> None:
    request.headers["X-API-Key"] = SECRET


@pytest.mark.parametrize("lent", [False, True], ids=["own client", "lent client"])
@pytest.mark.parametrize(
    "options",
    [
        {"auth": ("user", SECRET)},
        {"params": {"key": SECRET}},
        {"event_hooks": {"request": [_writes_a_key]}},
        {"cookies": {"session": SECRET}},
    ],
    ids=["auth=", "params=", "event_hooks=", "cookies="],
)
async def test_an_instrumented_client_adds_nothing_to_requests_to_ollama_com(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], lent: bool
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "for-ollama")
    asked_for: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked_for.append(request)
        return httpx.Response(200, json={"results": [], "version": "1"})

    transport = httpx.MockTransport(answer)
    if lent:
        given = httpx.AsyncClient(transport=transport, **options)
        client = AsyncClient("http://gate.example", http_client=given)
    else:
        client = AsyncClient("http://gate.example", transport=transport, **options)
    await client.web_search("q")
    await client.version()
    await closed(client)
    abroad, home = asked_for
    basic = b64encode(f"user:{SECRET}".encode()).decode()
    shown = f"{abroad.url} {abroad.headers.raw}"
    assert SECRET not in shown
    assert basic not in shown
    assert abroad.headers["authorization"] == "Bearer for-ollama"
    # It does add to those that stay here.
    assert any(secret in f"{home.url} {home.headers.raw}" for secret in (SECRET, basic))


def test_the_step_up_to_tls_is_the_only_other_place_that_is_home() -> None:
    here = Origin("http", "h", 80)
    assert _at_home(here, here)
    assert _at_home(here, Origin("https", "h", 443))
    others = [
        Origin("http", "h", 443),
        Origin("https", "h", 80),
        Origin("https", "other", 443),
        Origin("http", "h", 81),
    ]
    assert not any(_at_home(here, other) for other in others)
    assert not _at_home(Origin("https", "h", 80), Origin("http", "h", 443))


LOCATIONS = [
    "http://127.0.0.1:65536/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:99999999999999999999/",
    f"http://127.0.0.1:{'9' * 4000}/",
    "http://127.0.0.1:x/",
    "http://[::1]:70000/",
    "http://[::1/",
    "http://[::zz]/",
    "http://xn--.invalid/",
    "http://xn--a-ecp.invalid/",
    f"http://{'a' * 64}.invalid/",
    f"http://{'a.' * 200}invalid/",
    "http://./",
    "http://..invalid/",
    "http://%00/",
    "http:///api/chat",
    "http:",
    "//",
    "",
    "?",
    "#fragment",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "ftp://127.0.0.1/",
    "https://127.0.0.1:1/",
    f"http://user:{SECRET}@127.0.0.1:70000/",
    "/" + "x" * 10_000,
    "/\u00fc",
    "http://\u00fc.invalid/",
    "http://1.2.3.4.5.6.7/",
    "http://0x7f.1:1/",
]


@CLIENTS
@pytest.mark.parametrize("location", LOCATIONS, ids=lambda location: location[:24] or "empty")
async def test_wherever_a_server_redirects_to_it_ends_in_an_ollama_error(
    server: FakeOllama, make: Callable[..., AsyncClient], location: str
) -> None:
    client = make(server, {})
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("/api/chat", lambda: client.chat("m", "hi", timeout=BOUND)),
        ("/api/chat", lambda: client.chat("m", "hi", stream=True, timeout=BOUND).collect()),
        ("/api/pull", lambda: client.pull("m", stream=True, timeout=BOUND).collect()),
        ("/api/push", lambda: client.push("m", timeout=BOUND)),
    ]
    raw = b"HTTP/1.1 307 X\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % location.encode()
    for path, call in calls:
        server.script(path, Reply(raw=raw))
        with pytest.raises(OllamaError) as caught:
            # What has a path alone is asked of this server, which says that it does not know it.
            if (await call()) is not None and location in ("", "?", "#fragment", "http:///api/chat", "http:", "//"):
                raise ProtocolError("answered by this server")
        assert SECRET not in everything(caught.value)
    await closed(client)


CHALLENGES = [
    'Digest realm="a"',
    "Digest realm",
    "Digest a",
    'Digest realm="a", nonce="b", algorithm="x"',
    'Digest realm="a", nonce="b", qop="auth-int"',
    'Digest realm="a", nonce="b", qop="x"',
]


@pytest.mark.parametrize("challenge", CHALLENGES)
async def test_an_invalid_digest_from_a_server_is_an_ollama_error(server: FakeOllama, challenge: str) -> None:
    server.script("/api/version", Reply(status=401, headers={"WWW-Authenticate": challenge}))
    async with AsyncClient(server.url, auth=httpx.DigestAuth("user", SECRET)) as client:
        with pytest.raises(OllamaError) as caught:
            await client.version()
    assert SECRET not in everything(caught.value)


@pytest.mark.parametrize("body", [[], [b"<html>", Stall()]], ids=["whole", "still on its way"])
async def test_nothing_goes_from_https_to_plain_http(
    server: FakeOllama, authority: trustme.CA, client_tls: ssl.SSLContext, body: list[Any]
) -> None:
    with FakeOllama(ssl=context_of(authority.issue_cert("127.0.0.1"))) as secure:
        location = f"http://user:pw@127.0.0.1:{server.port}/api/chat"
        secure.script("/api/chat", Reply(body, status=307, headers={"Location": location}))
        async with AsyncClient(secure.url, verify=client_tls, headers=KEYS["X-API-Key"]) as client:
            error = await asked(client, streaming=False)
    assert isinstance(error, ProtocolError)
    assert str(error) == f"the server redirects from https to plain http, to 127.0.0.1:{server.port}"
    assert server.connections == ()


# -- TLS --


def context_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def self_signed(tmp_path: Path) -> ssl.SSLContext:
    authority = trustme.CA()
    file = tmp_path / "certificate.pem"
    file.write_bytes(authority.private_key_pem.bytes() + authority.cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


YEAR = dt.timedelta(days=365)
NOW = dt.datetime.now(dt.UTC)
BAD_CERTIFICATES: dict[str, tuple[Callable[[trustme.CA, Path], ssl.SSLContext], bool, str]] = {
    "unknown authority": (lambda _, path: context_of(trustme.CA().issue_cert("127.0.0.1")), True, "certificate"),
    "not trusted by the system": (lambda ca, path: context_of(ca.issue_cert("127.0.0.1")), False, "certificate"),
    "self-signed": (lambda _, path: self_signed(path), True, "self-signed certificate"),
    "another host": (lambda ca, path: context_of(ca.issue_cert("localhost")), True, "127.0.0.1"),
    "expired": (
        lambda ca, path: context_of(ca.issue_cert("127.0.0.1", not_before=NOW - 2 * YEAR, not_after=NOW - YEAR)),
        True,
        "certificate has expired",
    ),
    "not yet valid": (
        lambda ca, path: context_of(ca.issue_cert("127.0.0.1", not_before=NOW + YEAR, not_after=NOW + 2 * YEAR)),
        True,
        "certificate is not yet valid",
    ),
}


@pytest.mark.parametrize(("make", "trusts", "said"), BAD_CERTIFICATES.values(), ids=BAD_CERTIFICATES)
async def test_an_invalid_certificate_is_refused_before_anything_is_sent(
    authority: trustme.CA,
    client_tls: ssl.SSLContext,
    tmp_path: Path,
    make: Callable[[trustme.CA, Path], ssl.SSLContext],
    trusts: bool,
    said: str,
) -> None:
    verify: Any = client_tls if trusts else True
    with FakeOllama(ssl=make(authority, tmp_path)) as server:
        async with AsyncClient(server.url, verify=verify, headers=KEYS["Authorization"]) as client:
            error = await asked(client, streaming=False)
    assert isinstance(error, ConnectError)
    assert said in error.detail
    assert f"127.0.0.1:{server.port}" in error.detail
    assert server.requests == ()
    assert sum(record.bytes_received for record in server.connections) == 0


async def test_a_certificate_for_another_name_is_refused(authority: trustme.CA, client_tls: ssl.SSLContext) -> None:
    with FakeOllama(ssl=context_of(authority.issue_cert("127.0.0.1"))) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        async with AsyncClient(url, verify=client_tls) as client:
            error = await asked(client, streaming=False)
    assert isinstance(error, ConnectError)
    assert "localhost" in error.detail


async def test_a_good_certificate_is_accepted_and_a_bad_one_only_on_demand(
    authority: trustme.CA, client_tls: ssl.SSLContext
) -> None:
    with FakeOllama(ssl=context_of(authority.issue_cert("127.0.0.1"))) as server:
        for verify in (client_tls, False):
            async with AsyncClient(server.url, verify=verify) as client:
                assert (await client.version()).version


# What is false, and not False.
FALSE: list[Any] = [None, 0, 0.0, "", b"", [], (), {}, "no such file"]


@pytest.mark.parametrize("verify", FALSE, ids=repr)
@pytest.mark.parametrize("way", ["direct", "proxy", "uds", "bare", "TLS proxy"])
async def test_nothing_but_an_explicit_false_weakens_tls(way: str, verify: Any, tmp_path: Path) -> None:
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(4096))
        if received[-1].startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            received.append(await reader.read(4096))
        writer.close()
        await writer.wait_closed()

    uds = str(tmp_path / "s")
    listen = asyncio.start_unix_server(serve, uds) if way == "uds" else asyncio.start_server(serve, "127.0.0.1", 0)
    async with await listen as listening:
        port = 0 if way == "uds" else listening.sockets[0].getsockname()[1]
        options: dict[str, dict[str, Any]] = {
            "uds": {"host": "https://models.invalid", "uds": uds},
            "proxy": {"host": "https://models.invalid", "proxy": f"http://127.0.0.1:{port}"},
            "TLS proxy": {"host": "https://models.invalid", "proxy": f"https://127.0.0.1:{port}"},
        }
        if way == "bare":
            with pytest.raises(httpx.ConnectError if verify is None else RequestError):
                transport = DirectTransport(verify=verify)
                async with httpx.AsyncClient(transport=transport) as http:
                    await http.get(f"https://127.0.0.1:{port}", headers=KEYS["X-API-Key"])
        else:
            with pytest.raises(OllamaError) as caught:
                given = options.get(way, {"host": f"https://127.0.0.1:{port}"})
                async with AsyncClient(**given, verify=verify, trust_env=False, headers=KEYS["X-API-Key"]) as client:
                    await client.chat("m", "hi", timeout=BOUND)
            assert isinstance(caught.value, RequestError) is (verify is not None)
    assert SECRET.encode() not in b"".join(received)
    # Where something came, it was TLS: that is what None means for httpx.
    expected = {True: {b"\x16"}, False: set[bytes]()}[verify is None]
    assert {block[:1] for block in received if not block.startswith(b"CONNECT")} == expected


@pytest.mark.parametrize("cert", [0, "", (), ("a", ""), ("a", 5), ["a"], 5, ("a", "b", "c", "d")], ids=repr)
def test_an_invalid_client_certificate_is_refused(cert: Any) -> None:
    with pytest.raises(RequestError, match="cert="):
        AsyncClient("https://models.invalid", cert=cert)
    with pytest.raises(RequestError, match="cert="):
        DirectTransport(cert=cert)


async def test_https_never_connects_without_a_context(server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: object, loop: object) -> None:
        return None

    monkeypatch.setattr(DirectTransport, "_context", nothing)
    async with AsyncClient(f"https://127.0.0.1:{server.port}", headers=KEYS["X-API-Key"]) as client:
        assert isinstance(await asked(client, streaming=False), ConnectError)
    assert [record.bytes_received for record in server.connections] in ([0], [])


# -- paths --

ESCAPES = ["../../x", "m\r\nX: y", "m HTTP/1.1", "m?a=b#c", "m\0", "m/../../x", "http://127.0.0.1/", "\N{EURO SIGN}"]


@pytest.mark.parametrize("name", ESCAPES)
async def test_a_models_name_never_gets_into_the_path(server: FakeOllama, name: str) -> None:
    calls: list[tuple[str, Callable[[AsyncClient], Any]]] = [
        ("/api/chat", lambda client: client.chat(name, "hi")),
        ("/api/generate", lambda client: client.generate(name, "hi")),
        ("/api/embed", lambda client: client.embed(name, "hi")),
        ("/api/show", lambda client: client.show(name)),
        ("/api/copy", lambda client: client.copy(name, name)),
        ("/api/delete", lambda client: client.delete(name)),
        ("/api/pull", lambda client: client.pull(name)),
        ("/api/push", lambda client: client.push(name)),
        ("/api/create", lambda client: client.create(name, from_=name)),
    ]
    async with AsyncClient(server.url) as client:
        for path, call in calls:
            server.script(path, Reply.json({"error": "no"}, 400))
            before = len(server.requests)
            with pytest.raises(OllamaError):
                await asyncio.wait_for(call(client), BOUND)
            assert [request.path for request in server.requests[before:]] in ([path], [])


@pytest.mark.parametrize(
    "digest",
    [
        *ESCAPES,
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "0" * 62 + "/.",
        "sha256:" + "0" * 64 + "\n",
        "SHA256:../x",
    ],
)
async def test_an_invalid_digest_never_gets_into_the_path(server: FakeOllama, digest: str) -> None:
    async with AsyncClient(server.url) as client:
        with pytest.raises(RequestError):
            await client.blob_exists(digest)
    assert server.connections == ()


# -- files --


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "abcd"  # as base64 has it
    file.write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    return file


@streaming_or_not
@pytest.mark.parametrize("form", ["absolute", "relative", "with slashes", "data"])
async def test_a_server_cannot_have_a_file_read_by_naming_it_in_its_answer(
    server: FakeOllama, private: Path, streaming: bool, form: str
) -> None:
    path = str(private)
    image: Any = {
        "absolute": path,
        "relative": private.name,
        # As long as base64 has to be.
        "with slashes": "/" * (4 - len(path) % 4) + path,
        "data": {"value": path},
    }[form]
    server.script("/api/chat", Reply([{**ANSWER, "message": {**TEXT, "images": [image]}}]), Reply([ANSWER]))
    async with AsyncClient(server.url) as client:
        answer = await asked(client, streaming=streaming)
        if isinstance(answer, ChatResponse):
            # As conversations are led.
            await client.chat("m", [answer.message, answer.message.model_dump()])
    assert isinstance(answer, ProtocolError)
    assert len(server.requests) == 1


async def test_images_in_an_answer_are_kept(server: FakeOllama) -> None:
    server.script("/api/chat", Reply([{**ANSWER, "message": {**TEXT, "images": ["aGk="]}}]), Reply([ANSWER]))
    async with AsyncClient(server.url) as client:
        answer = await client.chat("m", "hi")
        await client.chat("m", [answer.message])
    assert server.requests[1].json()["messages"][0]["images"] == ["aGk="]


async def test_no_file_is_opened_but_the_one_that_was_named(
    server: FakeOllama, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = private.parent / "named.png"
    named.write_bytes(b"picture")
    read: list[Path] = []
    opening = os.open

    def open_it(path: str, *rest: int) -> int:
        read.append(Path(path))
        return opening(path, *rest)

    monkeypatch.setattr(os, "open", open_it)
    monkeypatch.setattr("builtins.open", None)
    server.script("/api/chat", Reply([ANSWER]))
    async with AsyncClient(server.url) as client:
        await client.chat("m", [{"role": "user", "content": str(private), "images": [str(named)]}])
    assert read == [named]
    assert server.requests[0].json()["messages"][0]["images"] == ["cGljdHVyZQ=="]


async def test_a_blob_is_the_file_that_was_named(server: FakeOllama, private: Path) -> None:
    other = private.parent / "other"
    other.write_bytes(b"weights")
    async with AsyncClient(server.url) as client:
        await client.create_blob(other)
    assert server.requests[-1].body == b"weights"
    with pytest.raises(RequestError):
        async with AsyncClient(server.url) as client:
            await client.create_blob(private.parent)


# -- frames --


def in_frames(error: BaseException) -> set[str]:
    """The variables of the library's frames, on an error's way, in which a crash reporter finds a secret."""
    found: set[str] = set()
    queue = [traceback.TracebackException.from_exception(error, capture_locals=True)]
    while queue:
        told = queue.pop()
        for frame in told.stack:
            if "/ollama_async/" in frame.filename:
                hits = {name for name, shown in (frame.locals or {}).items() if any(key in shown for key in HIDDEN)}
                found |= {f"{frame.name}.{name}" for name in hits}
        queue += [part for part in (told.__cause__, told.__context__) if part is not None]
    return found


HIDDEN = (SECRET, "dXNlcjpzM2NyZXQ")  # user:s3cret, as Basic has it
MANY_KEYS = {name: value for pairs in KEYS.values() for name, value in pairs.items()}

# By the names of parameters without a default, something that goes.
GOOD: dict[str, Any] = {
    "model": "m", "source": "m", "destination": "m", "digest": f"sha256:{'0' * 64}", "query": "q", "url": "u",
    "state": "s", "questions": {"q": {"type": "noul", "instructions": "?"}}, "path": __file__,
    "via_server": True,
}  # fmt: skip


def endpoints() -> list[str]:
    return [
        name
        for name, method in inspect.getmembers(AsyncClient, inspect.isfunction)
        if not name.startswith("_")
        and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values())
    ]


async def fails(client: AsyncClient, endpoint: str, given: dict[str, Any]) -> BaseException:
    """Call an endpoint in each form that it has; return the error."""
    method = getattr(client, endpoint)
    parameters = inspect.signature(method).parameters
    call = {name: GOOD[name] for name, p in parameters.items() if name in GOOD and p.kind is not p.VAR_KEYWORD}
    call |= {"model": "m"} if "model" in parameters else {}
    if "stream" not in parameters:
        given = {name: value for name, value in given.items() if name != "stream"}
    with pytest.raises((OllamaError, TypeError)) as caught:
        made = method(**{**call, **given})
        if endpoint == "loaded":
            made = made.__aenter__()
        await asyncio.wait_for(made.collect() if given.get("stream") else made, BOUND)
    return caught.value


SILENT = Reply(before_head=[Stall()])
WRONG: dict[str, Any] = {
    "401": Reply.error(401, "no"),
    "cut": Reply(before_head=[Cut()]),
    "no HTTP": Reply(raw=b"220 mail ESMTP\r\n", steps=[Cut()]),
    "redirect": Reply(status=307, headers={"Location": "http://127.0.0.1:70000/"}),
    "timeout": {"timeout": 0.05},
    "aborted": {"token": CancelToken.timeout(0)},
    "bad token": {"token": 5},
    "bad timeout": {"timeout": "x"},
    "unknown": {"nonsense": 5},
    "bad headers": {"headers": {"X-Key": f"{SECRET}\n"}},
    "headers that are none": {"headers": [("X-Key", SECRET)]},
    "not text": {"headers": {"X-Key": f"{SECRET}\N{EURO SIGN}"}},
    "bad first": {"model": 5, "source": 5, "digest": 5, "query": 5, "url": 5, "path": 5},
}


@pytest.mark.parametrize("stream", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("way", ["direct", "foreign", "auth", "proxy"])
async def test_no_frame_of_the_library_has_a_key_in_a_variable(
    server: FakeOllama, wrong: str, way: str, stream: bool
) -> None:
    options: dict[str, dict[str, Any]] = {
        "direct": {},
        "foreign": {"transport": httpx.AsyncHTTPTransport()},
        "auth": {"auth": ("user", SECRET), "cookies": {"a": SECRET}},
        "proxy": {"proxy": f"http://user:{SECRET}@127.0.0.1:{server.port}"},
    }
    case = WRONG[wrong]
    host = f"http://user:{SECRET}@" + ("models.invalid" if way == "proxy" else f"127.0.0.1:{server.port}")
    leaks: set[str] = set()
    async with AsyncClient(host, headers=dict(MANY_KEYS), trust_env=False, **options[way]) as client:
        for endpoint in endpoints():
            given: dict[str, Any] = {"stream": stream, "headers": dict(MANY_KEYS)}
            for path in server_paths(endpoint):
                server.script(path, case if isinstance(case, Reply) else SILENT, always=True)
            if isinstance(case, dict):
                parameters = inspect.signature(getattr(client, endpoint)).parameters
                given |= {name: value for name, value in case.items() if wrong != "bad first" or name in parameters}
                if wrong == "bad first" and not set(case) & set(parameters):
                    continue
            error = await fails(client, endpoint, given)
            leaks |= {f"{endpoint}: {leak}" for leak in in_frames(error)}
    assert not leaks


def server_paths(endpoint: str) -> list[str]:
    """Whatever an endpoint may ask for first."""
    blob = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    paths = re.findall(r"``[A-Z]+ (/[^`]*)``", inspect.getdoc(getattr(AsyncClient, endpoint)) or "")
    return [path.replace("/:digest", f"/sha256:{each}") for path in paths for each in (blob, "0" * 64)]


MAKINGS: dict[str, Callable[[], object]] = {
    "a header": lambda: AsyncClient(f"http://user:{SECRET}@127.0.0.1", headers={**MANY_KEYS, "X": "a\nb"}),
    "a header's value": lambda: AsyncClient(headers={"X": f"{SECRET}\n"}),
    "headers": lambda: AsyncClient(headers=[("X", SECRET)] * 3 + [5]),  # type: ignore[list-item, arg-type]
    "the port": lambda: AsyncClient(f"http://user:{SECRET}@127.0.0.1:x"),
    "the scheme": lambda: AsyncClient(f"ftp://user:{SECRET}@127.0.0.1"),
    "the name": lambda: AsyncClient(f"http://user:{SECRET}@no host"),
    "the label": lambda: AsyncClient(f"http://user:{SECRET}@xn--.invalid"),
    "the path": lambda: AsyncClient(f"http://user:{SECRET}@127.0.0.1/a b"),
    "an @": lambda: AsyncClient(f"http://user:{SECRET}/word@127.0.0.1"),
    "the host's type": lambda: AsyncClient(f"http://user:{SECRET}@127.0.0.1".encode()),  # type: ignore[arg-type]
    "the proxy": lambda: AsyncClient("http://h.invalid", proxy=f"http://user:{SECRET}@no host:x"),
    "the proxy's scheme": lambda: AsyncClient("http://h.invalid", proxy=f"gopher://user:{SECRET}@h"),
    "the proxy's port": lambda: AsyncClient("http://h.invalid", proxy=f"http://user:{SECRET}@h:70000"),
    "the proxy's header": lambda: DirectTransport(proxy=httpx.Proxy("http://", headers={"X-Key": SECRET})),
    "proxy and uds": lambda: AsyncClient(proxy=f"http://user:{SECRET}@h", uds="/s"),
    "proxy and transport": lambda: AsyncClient(proxy=f"http://user:{SECRET}@h", transport=DirectTransport()),
    "the certificate": lambda: AsyncClient(cert=("a", "b", SECRET, 5)),
    "verify": lambda: AsyncClient(verify=0, auth=("user", SECRET), cert=("a", "b", SECRET), headers=MANY_KEYS),
    "an option": lambda: AsyncClient(nonsense=5, auth=("user", SECRET), cookies={"a": SECRET}),
    "options of a given client": lambda: AsyncClient(http_client=httpx.AsyncClient(), auth=("user", SECRET)),
    "the timeout": lambda: AsyncClient(f"http://user:{SECRET}@h", timeout=0, headers=MANY_KEYS, auth=("u", SECRET)),
    "a transport's proxy": lambda: DirectTransport(proxy=f"socks5://user:{SECRET}@h", cert=("a", "b", SECRET)),
    "a transport's certificate": lambda: DirectTransport(cert=("a", "b", SECRET, 5)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("make", MAKINGS.values(), ids=MAKINGS)
def test_a_client_that_cannot_be_made_has_no_secret_in_a_variable(make: Callable[[], object]) -> None:
    with pytest.raises((OllamaError, TypeError)) as caught:
        make()
    assert not in_frames(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["\N{EURO SIGN}s3cret", "s3cret\ud800"])
def test_a_key_of_the_environment_that_is_not_ascii_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "OLLAMA_API_KEY": key})
    with pytest.raises(RequestError) as caught:
        AsyncClient("https://ollama.com")
    assert not in_frames(caught.value)
    assert SECRET not in everything(caught.value)


@pytest.mark.parametrize(
    "module", ["ollama_async", "ollama_async.testing", "ollama_async.registry", "ollama_async.asgi"]
)
def test_what_is_not_made_yet_has_a_repr(module: str) -> None:
    home = importlib.import_module(module)
    for name in home.__all__:
        kind = getattr(home, name)
        if inspect.isclass(kind) and not issubclass(kind, tuple):
            assert repr(kind.__new__(kind))
