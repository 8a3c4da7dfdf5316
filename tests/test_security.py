"""What is secret stays so, who is asked is who answers, and nothing is read or sent that was not named."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import socket
import ssl
import traceback
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
    ChatResponse,
    ConnectError,
    HostError,
    OllamaError,
    ProtocolError,
    RequestError,
)
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


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("way", ["direct", "foreign"])
async def test_no_key_goes_along_to_another_origin(
    server: FakeOllama, key: dict[str, str], status: int, way: str
) -> None:
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


async def test_a_key_goes_along_within_one_origin(server: FakeOllama) -> None:
    server.script("/api/version", Reply(status=307, headers={"Location": "/elsewhere"}))
    server.script("/elsewhere", Reply.json({"version": "1"}))
    async with AsyncClient(server.url, headers=KEYS["X-API-Key"] | KEYS["Authorization"]) as client:
        assert (await client.version()).version == "1"
    assert server.requests[1].header("x-api-key") == SECRET
    assert server.requests[1].header("authorization") == f"Bearer {SECRET}"


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
async def test_a_certificate_that_is_not_good_is_refused_before_anything_is_said(
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
async def test_a_digest_that_is_none_never_gets_into_the_path(server: FakeOllama, digest: str) -> None:
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
    monkeypatch.setattr(os, "open", lambda path, *rest: (read.append(Path(path)), opening(path, *rest))[1])
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
