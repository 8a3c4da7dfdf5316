"""Through a proxy: the fake server is the proxy, and is asked for addresses that are not its own; or a tunnel is."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from teardown.harness import BOUND, ELSEWHERE, black_hole, in_thread, nothing_left_behind, through_proxy, ticks
from wire.tunnel import ESTABLISHED, TunnelProxy

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    ConnectError,
    DirectTransport,
    PhaseTimeout,
    RequestError,
    Timeouts,
)
from ollama_async.testing import Block, FakeOllama, Reply, Stall

ONE = {"model": "fake", "message": {"role": "assistant", "content": "one "}, "done": False}
SECRET = "pass:word/1"


@pytest.fixture
def tls_server(server_tls: ssl.SSLContext) -> Iterator[FakeOllama]:
    with FakeOllama(ssl=server_tls) as server:
        yield server


@pytest.fixture
def tunnel() -> Iterator[TunnelProxy]:
    with TunnelProxy() as proxy:
        yield proxy


class Case:
    """A client that reaches a fake server through a proxy."""

    def __init__(self, server: FakeOllama, *, ours: bool, make: Callable[[], AsyncClient]) -> None:
        self.server, self.ours, self.make = server, ours, make


@pytest.fixture(params=["http", "https", "tunnel"])
def case(
    request: pytest.FixtureRequest,
    fake_ollama: FakeOllama,
    tls_server: FakeOllama,
    client_tls: ssl.SSLContext,
    tunnel: TunnelProxy,
) -> Case:
    """Through a proxy of HTTP in the clear; through one over TLS, which httpx does; to a server over TLS."""
    if request.param == "https":
        proxy = httpx.Proxy(tls_server.url, ssl_context=client_tls)
        return Case(tls_server, ours=False, make=lambda: AsyncClient(ELSEWHERE, proxy=proxy))
    server = fake_ollama if request.param == "http" else tls_server
    return Case(server, ours=True, make=lambda: through_proxy(server, tunnel, client_tls))


async def test_a_request_goes_to_the_proxy_and_names_the_server(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(ELSEWHERE, proxy=fake_ollama.url) as client:
        assert (await client.version()).version
        await client.version(headers={"X-Of-This-Call": "1"})
        assert (await client.chat("fake", "hi", stream=True).collect()).done
    assert [request.path for request in fake_ollama.requests] == [
        f"{ELSEWHERE}/api/version",
        f"{ELSEWHERE}/api/version",
        f"{ELSEWHERE}/api/chat",
    ]
    assert {dict(request.headers)["host"] for request in fake_ollama.requests} == {"models.example:8080"}
    assert len(fake_ollama.connections) == 1


async def test_a_server_over_tls_is_reached_through_a_tunnel(
    tls_server: FakeOllama, tunnel: TunnelProxy, client_tls: ssl.SSLContext
) -> None:
    async with nothing_left_behind(), AsyncClient(tls_server.url, proxy=tunnel.url, verify=client_tls) as client:
        await client.version()
        assert (await client.chat("fake", "hi", stream=True).collect()).done
    where = tls_server.url.removeprefix("https://").encode()
    assert tunnel.heads == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (where, where)]
    assert [request.path for request in tls_server.requests] == ["/api/version", "/api/chat"]


async def test_the_certificate_in_a_tunnel_is_that_of_the_server_asked_for(
    tls_server: FakeOllama, tunnel: TunnelProxy, client_tls: ssl.SSLContext
) -> None:
    async with AsyncClient(f"https://127.0.0.2:{tls_server.port}", proxy=tunnel.url, verify=client_tls) as client:
        with pytest.raises(ConnectError):
            await client.version()
    assert tls_server.requests == ()


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
def test_port_0_of_a_proxy_is_refused(scheme: str) -> None:
    with pytest.raises(RequestError, match="port 0"):
        AsyncClient("http://models.example", proxy=f"{scheme}://127.0.0.1:0")


async def test_the_proxy_of_the_environment(fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake_ollama.url)
    monkeypatch.setenv("http_proxy", fake_ollama.url)
    async with AsyncClient(ELSEWHERE) as client:
        assert (await client.version()).version
    assert len(fake_ollama.requests) == 1


async def test_one_client_in_several_loops_one_after_the_other(case: Case) -> None:
    client = case.make()

    async def twice() -> list[str]:
        return [(await client.version()).version for _ in range(2)]

    def run() -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return asyncio.run(twice())

    for number in range(3):
        assert len(in_thread(run)) == 2
        assert case.server.connections[number].wait_left(BOUND), "what was idle is closed when its loop ends"
    assert [len(record.requests) for record in case.server.connections] == [2, 2, 2]
    await client.aclose()


async def test_two_loops_at_once(case: Case) -> None:
    client = case.make()
    await client.version()
    assert in_thread(lambda: asyncio.run(client.version())).version
    await client.version()
    assert [len(record.requests) for record in case.server.connections] == [2, 1]
    await client.aclose()


@pytest.mark.parametrize("by", ["token", "thread"])
@pytest.mark.parametrize("stage", ["before_the_head", "within"])
async def test_an_abort_closes_the_connection_to_the_proxy(case: Case, stage: str, by: str) -> None:
    stall: list[Any] = [Stall()]
    reply = Reply(before_head=stall) if stage == "before_the_head" else Reply([Block(ONE), Stall()])
    case.server.script("/api/chat", reply)
    token = CancelToken()
    async with nothing_left_behind(), case.make() as client:
        stream = client.chat("fake", "hi", stream=True, token=token)
        if stage == "within":
            await anext(stream)
        reading = asyncio.create_task(stream.collect())
        await asyncio.to_thread(case.server.wait_for_requests)
        await ticks(10)
        if by == "thread":
            assert in_thread(lambda: token.abort("stop"))
        else:
            token.abort("stop")
        record = case.server.connections[0]
        if case.ours:
            assert record.wait_left(BOUND), "not before the loop, which is blocked by this very wait, runs again"
        with pytest.raises(AbortError):
            await asyncio.wait_for(reading, BOUND)
        assert await asyncio.to_thread(record.wait_left, BOUND)


async def test_a_proxy_that_is_not_there() -> None:
    async with AsyncClient(ELSEWHERE, proxy="http://127.0.0.1:1") as client:
        with pytest.raises(ConnectError, match=r"the proxy 127\.0\.0\.1:1"):
            await client.version()


async def test_a_proxy_that_does_not_answer_the_dial() -> None:
    with black_hole() as url:
        async with nothing_left_behind(), AsyncClient("https://models.example", proxy=url) as client:
            with pytest.raises(PhaseTimeout) as caught:
                await client.version(timeout=Timeouts(connect=0.1))
    assert caught.value.phase == "connect"


@pytest.mark.parametrize("how", ["abort", "cancel", "timeout"])
async def test_a_proxy_that_does_not_answer_to_connect(how: str, client_tls: ssl.SSLContext) -> None:
    token = CancelToken()
    # Enough for a slow machine to get to the proxy: the limit has to pass there.
    limit = Timeouts(connect=1 if how == "timeout" else None)
    with TunnelProxy(b"") as proxy:
        made = AsyncClient("https://models.example", proxy=proxy.url, verify=client_tls)
        async with nothing_left_behind(), made as client:
            task = asyncio.create_task(client.version(token=token, timeout=limit))
            assert await asyncio.to_thread(proxy.asked.wait, BOUND)
            if how == "abort":
                token.abort("stop")
                assert proxy.left.wait(BOUND), "the loop is blocked by this very wait"
            elif how == "cancel":
                task.cancel()
            await asyncio.wait([task], timeout=BOUND)
            assert task.cancelled() if how == "cancel" else isinstance(task.exception(), AbortError | PhaseTimeout)
            assert await asyncio.to_thread(proxy.left.wait, BOUND)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
            "407 Proxy Authentication",
        ),
        (b"HTTP/1.1 502\r\n\r\n", "the proxy refused: 502"),
        (b"HTTP/1.1 503 \xff\r\n\r\n", "503"),
        (b"HTTP/1.1 200 OK\r\n", "complete HTTP head"),
        (b"nonsense\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 407 No\r\nContent-Length: 9\r\n\r\nWho's it?", "the proxy refused: 407 No"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 No\r\n\r\nmore", "the proxy refused: 403 No"),
        (b"HTTP/1.1 101 Other\r\n\r\n", "the proxy refused: 101"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3_000, "complete HTTP head"),
        (b"HTTP/1.1 100 Continue\r\n\r\nnonsense\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nmore", "more than an HTTP head"),
        (b"HTTP/1.1 999999 OK\r\n\r\n", "not HTTP"),
        (b"SSH-2.0-OpenSSH_9\r\n", "complete HTTP head"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "complete HTTP head"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 20_000, "complete HTTP head"),
    ],
)
async def test_a_proxy_that_makes_no_tunnel(answer: bytes, said: str) -> None:
    with TunnelProxy(answer) as proxy:
        async with nothing_left_behind(), AsyncClient("https://models.example", proxy=proxy.url) as client:
            with pytest.raises(ConnectError, match=said):
                await client.version()


async def test_a_tunnel_that_ends_at_once_is_told_of_server_and_proxy() -> None:
    def hang_up() -> None:
        taken, _ = listener.accept()
        with taken:
            # asked for a tunnel, and then for TLS
            for answer in (ESTABLISHED, b""):
                taken.recv(65536)
                taken.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(BOUND)
        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        proxy = f"127.0.0.1:{listener.getsockname()[1]}"
        async with nothing_left_behind(), AsyncClient("https://models.example", proxy=f"http://{proxy}") as client:
            with pytest.raises(ConnectError) as caught:
                await client.version()
        await asyncio.to_thread(thread.join, BOUND)
    said = caught.value.detail
    assert said.startswith(f"cannot connect to models.example:443 through the proxy {proxy}: ")
    assert not said.endswith(": ")


@pytest.mark.parametrize("by_byte", [False, True])
async def test_a_tunnel_that_is_announced_in_pieces(
    by_byte: bool, tls_server: FakeOllama, client_tls: ssl.SSLContext
) -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX: 1\r\n\r\n" + ESTABLISHED
    with TunnelProxy(answer, by_byte=by_byte) as proxy:
        async with nothing_left_behind(), AsyncClient(tls_server.url, proxy=proxy.url, verify=client_tls) as client:
            assert (await client.version()).version


async def test_the_credentials_of_a_proxy_are_sent_to_the_proxy_alone(
    fake_ollama: FakeOllama, tls_server: FakeOllama, tunnel: TunnelProxy, client_tls: ssl.SSLContext
) -> None:
    expected = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    proxy = httpx.Proxy(tunnel.url, auth=("user", SECRET), headers={"X-Proxy": "1"})
    async with AsyncClient(tls_server.url, proxy=proxy, verify=client_tls) as client:
        await client.version()
    assert f"X-Proxy: 1\r\nProxy-Authorization: {expected}\r\n".encode() in tunnel.heads[0]
    [request] = tls_server.requests
    assert request.header("proxy-authorization") is None
    async with AsyncClient(
        ELSEWHERE, proxy=f"http://user:{SECRET.replace('/', '%2F')}@127.0.0.1:{fake_ollama.port}"
    ) as client:
        await client.version()
        await client.chat("fake", "hi")
    assert {request.header("proxy-authorization") for request in fake_ollama.requests} == {expected}


async def test_no_header_is_sent_twice(
    fake_ollama: FakeOllama, tls_server: FakeOllama, tunnel: TunnelProxy, client_tls: ssl.SSLContext
) -> None:
    told = {"Host": "elsewhere.example", "User-Agent": "mine", "X-Proxy": "1"}
    async with AsyncClient(ELSEWHERE, proxy=httpx.Proxy(fake_ollama.url, headers=told)) as client:
        await client.version()
        await client.version(headers={"X-Proxy": "2"})
    sent = [[name.lower() for name, _ in request.headers] for request in fake_ollama.requests]
    assert [sorted(set(names)) for names in sent] == [sorted(names) for names in sent]
    assert [request.header("x-proxy") for request in fake_ollama.requests] == ["1", "2"]
    assert {request.header("host") for request in fake_ollama.requests} == {"models.example:8080"}
    proxy = httpx.Proxy(tunnel.url, headers=told)
    async with AsyncClient(tls_server.url, proxy=proxy, verify=client_tls) as client:
        await client.version()
    where = tls_server.url.removeprefix("https://").encode()
    asked = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nUser-Agent: mine\r\nX-Proxy: 1\r\n\r\n" % (where, where)
    assert tunnel.heads == [asked]


@pytest.mark.parametrize("proxy", ["nonsense", "ftp://a", "http://", "https://a:b"])
def test_an_address_that_is_not_a_proxys(proxy: str) -> None:
    with pytest.raises(RequestError, match="proxy"):
        AsyncClient(ELSEWHERE, proxy=proxy)


@pytest.mark.parametrize(
    "proxy",
    [
        f"http://user:{SECRET}@127.0.0.1:1",
        f"user:{SECRET}@127.0.0.1:1",
        f" http://user:{SECRET}@127.0.0.1:1",
        f"ftp://user:{SECRET}@127.0.0.1:1",
        f"http://user:{SECRET}@127.0.0.1:1".encode(),
        httpx.Proxy("http://127.0.0.1:1", auth=("user", f"{SECRET}\udc80")),
    ],
    ids=["slash", "no scheme", "blank", "scheme", "bytes", "half a character"],
)
def test_an_invalid_proxy_keeps_its_password(proxy: Any) -> None:
    with pytest.raises(RequestError) as caught:
        AsyncClient(ELSEWHERE, proxy=proxy)
    assert "word" not in "".join(traceback.format_exception(caught.value)).replace("password", "")


def test_a_proxy_is_shown_without_its_password() -> None:
    proxy = DirectTransport(proxy="http://user:word@127.0.0.1:1").proxy
    assert repr(proxy) == "<HttpProxy 127.0.0.1:1>"


@pytest.mark.parametrize("options", [{"proxy": "https://a"}, {"proxy": "http://a", "uds": "/tmp/s"}])
def test_what_the_direct_transport_does_not_take(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="proxy="):
        DirectTransport(**options)


@pytest.mark.parametrize(("status", "times"), [(b"407", 1), (b"403", 1), (b"502", 3)])
async def test_a_refusal_that_will_not_pass_is_not_asked_for_again(
    status: bytes, times: int, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_async._call.retry._FIRST_DELAY", 0.001)
    with TunnelProxy(b"HTTP/1.1 %b No\r\n\r\n" % status) as proxy:
        async with AsyncClient("https://models.example", proxy=proxy.url, verify=client_tls, retries=2) as client:
            with pytest.raises(ConnectError):
                await client.version()
    assert len(proxy.heads) == times


# -- the environment: a proxy for each request --


@pytest.fixture
async def connects(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """A proxy that notes what it is asked for and refuses it; the environment names it for https alone."""
    asked: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode().strip())
        while (await reader.readline()).strip():
            pass
        writer.write(b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.setenv("OLLAMA_API_KEY", "k")
    yield asked
    server.close()


async def test_a_search_goes_through_the_proxy_of_ollama_com_not_of_the_session(
    fake_ollama: FakeOllama, connects: list[str]
) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        assert (await client.chat("fake", "hi")).done
        with pytest.raises(ConnectError, match="proxy"):
            await client.web_search("x")
        with pytest.raises(ConnectError, match="proxy"):
            await client.web_fetch("http://x.test")
    assert connects == ["CONNECT ollama.com:443 HTTP/1.1"] * 2
    assert len(fake_ollama.connections) == 1


async def test_a_redirect_goes_through_the_proxy_of_where_it_leads(
    fake_ollama: FakeOllama, connects: list[str]
) -> None:
    fake_ollama.script("/api/chat", Reply(status=307, headers={"Location": "https://other.test/api/chat"}))
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ConnectError, match="proxy"):
            await client.chat("fake", "hi")
    assert connects == ["CONNECT other.test:443 HTTP/1.1"]


@pytest.mark.parametrize(
    "options", [{"http2": True}, {"limits": httpx.Limits(max_connections=1)}], ids=["http2", "limits"]
)
def test_an_option_of_httpx_that_has_no_effect_says_so(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=next(iter(options))) as caught:
        AsyncClient(**options)
    assert caught[0].filename == __file__
