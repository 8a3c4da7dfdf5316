"""The matrix: a call is stopped at each of its first rounds of the loop, and again some rounds later, on every path.

Each run has a server and a client of its own. Rounds are slow, so that server and kernel get on between two of them:
the scan crosses dialling, sending, waiting, reading and the end. ``pytest --full`` does not leave any round, gap or
combination out; without it a cut is made. How many runs there were is told at the end.

Where a foreign pool is on the way it has one place. A call of ours that is stopped cancels the task that runs the
request once. What comes of that is said in ``LOSES``, ``FORGETS_IN_HANDSHAKE`` and ``LOOKS_TWICE``, and in
docs/contract.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import ssl
import time
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import httpx2
import pytest
from teardown.harness import BOUND, Baseline, client_of, open_fds, read_all, registrations, through_proxy, ticks, until
from wire.tunnel import TunnelProxy

from ollama_async import AbortError, AsyncClient, CancelToken, PhaseTimeout, Stream, Timeouts
from ollama_async.testing import FakeOllama, Pause, Reply

TICKS = range(61)
GAPS = range(6)
POOL = Timeouts(connect=1.0)  # of a foreign pool's connect limit: so long is a place in it waited for


def line(text: str, *, done: bool = False) -> bytes:
    frame = {"model": "fake", "message": {"role": "assistant", "content": text}, "done": done}
    return json.dumps(frame).encode() + b"\n"


BODY = [line("one "), Pause(0.001), line("two"), Pause(0.001), line("", done=True)]


def over_httpx(module: Any, server: FakeOllama, tls: ssl.SSLContext) -> Any:
    return module.AsyncHTTPTransport(verify=tls, uds=server.uds, limits=module.Limits(max_connections=1))


@contextlib.asynccontextmanager
async def path_to(
    server: FakeOllama, path: str, tls: ssl.SSLContext, tunnel: TunnelProxy
) -> AsyncIterator[AsyncClient]:
    """A client that takes that path to the server."""
    if path == "direct":
        async with client_of(server, verify=tls) as client:
            yield client
    elif path == "proxy":
        async with through_proxy(server, tunnel, tls) as client:
            yield client
    elif path == "httpx":
        async with AsyncClient(server.url, transport=over_httpx(httpx, server, tls), timeout=POOL) as client:
            yield client
    else:
        limits = httpx2.Timeout(None, pool=1.0)
        async with (
            httpx2.AsyncClient(transport=over_httpx(httpx2, server, tls), timeout=limits) as foreign,
            AsyncClient(server.url, http_client=foreign, timeout=POOL) as client,
        ):
            yield client


def stop_abort(token: CancelToken, stream: Stream[Any], task: asyncio.Task[None], client: AsyncClient) -> None:
    token.abort("stop")


def stop_cancel(token: CancelToken, stream: Stream[Any], task: asyncio.Task[None], client: AsyncClient) -> None:
    task.cancel()


def stop_client(token: CancelToken, stream: Stream[Any], task: asyncio.Task[None], client: AsyncClient) -> None:
    client.abort("stop")


Stop = Callable[[CancelToken, Stream[Any], "asyncio.Task[None]", AsyncClient], None]
STOPS: dict[str, tuple[Stop, Stop | None]] = {
    "abort": (stop_abort, None),
    "cancel": (stop_cancel, None),
    "client_abort": (stop_client, None),
    "abort_abort": (stop_abort, stop_client),
    "abort_cancel": (stop_abort, stop_cancel),
    "cancel_abort": (stop_cancel, stop_abort),
    "cancel_cancel": (stop_cancel, stop_cancel),
}

# Where a connection that was stopped is closed before the next request: nobody else's pool decides it.
OWN = {"direct", "proxy"}
# Whose pool loses its place when it is cancelled in a certain round or two, so that the next request waits in vain.
LOSES = {"httpx"}
# Whose socket stays open until the garbage collector comes, when the call is stopped during the TLS handshake.
FORGETS_IN_HANDSHAKE = {"httpx", "httpx2"}
# What asyncio's exception handler is told when a call is stopped while anyio, under these two, connects to a unix
# socket: it looks at the socket once more than it should.
LOOKS_TWICE = asyncio.InvalidStateError


class Runs:
    """What a scan has found."""

    def __init__(self) -> None:
        self.count = 0
        self.lost: list[tuple[int, int]] = []
        self.forgotten: list[tuple[int, int]] = []


async def one_run(
    server: FakeOllama, client: AsyncClient, path: str, stops: tuple[Stop, Stop | None], tick: int, gap: int, runs: Runs
) -> None:
    where = f"tick {tick}, gap {gap}"
    server.script("/api/chat", Reply(BODY))
    token = CancelToken()
    stream = client.chat("fake", "hi", stream=True, token=token)
    seen: list[Any] = []
    task = asyncio.create_task(read_all(stream, seen))
    for _ in range(tick):
        await asyncio.sleep(0)
        time.sleep(0.0002)
    over = task.done()
    first, second = stops
    first(token, stream, task, client)
    cancelled = first is stop_cancel and not over
    if second is not None:
        await ticks(gap)
        cancelled |= second is stop_cancel and not task.done()
        second(token, stream, task, client)
    delivered = len(seen)
    await asyncio.wait([task], timeout=BOUND)
    assert task.done(), f"{where}: it hangs"
    assert task.cancelled() is cancelled, f"{where}: a cancellation was swallowed, or made up"
    if not cancelled and task.exception() is not None:
        assert isinstance(task.exception(), AbortError), where
        assert stream.outcome == "aborted", where
    if stream.outcome == "aborted":
        assert len(seen) == delivered, f"{where}: a chunk was delivered after abort()"
    assert stream.text.startswith("".join(chunk.message.content for chunk in seen)), where
    assert registrations(token) == 0, where
    runs.count += 1
    try:
        assert (await asyncio.wait_for(client.version(), BOUND)).version
    except PhaseTimeout:
        runs.lost.append((tick, gap))
    if path in OWN:
        # The connection that was stopped has been left, and this one is new; or it is whole, and used again.
        for record in server.connections[:-1]:
            assert record.wait_left(BOUND), f"{where}: {record!r} was left open"


async def look_for_sockets(server: FakeOllama, path: str, where: tuple[int, int], runs: Runs) -> None:
    """See to it that every connection is closed, now that the client is."""
    foreign_tls = path in FORGETS_IN_HANDSHAKE and server.url.startswith("https")
    for record in server.connections:
        if foreign_tls and not record.requests:
            if await asyncio.to_thread(record.wait_left, 0.3):
                continue
            runs.forgotten.append(where)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()
        assert await asyncio.to_thread(record.wait_left, BOUND), f"{where}: {record!r} outlived the client"


@pytest.mark.parametrize("stops", [*STOPS])
@pytest.mark.parametrize("path", ["direct", "httpx", "httpx2", "proxy"])
async def test_stops_at_every_tick(
    server: FakeOllama,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    path: str,
    stops: str,
    full: bool,
    count_runs: Callable[[int], None],
    tmp_path: Any,
    tunnel: TunnelProxy,
    nothing_left: Baseline,
) -> None:
    if path == "proxy" and server.uds:
        pytest.skip("a proxy is not asked for a unix socket")
    act = STOPS[stops]
    step = 1 if full else 4 if path == "direct" else 12
    gaps = (GAPS if full else range(2)) if act[1] else range(1)
    runs = Runs()
    before = len(open_fds())
    for tick in TICKS[::step]:
        for gap in gaps:
            context = server_tls if server.url.startswith("https") else None
            uds = str(tmp_path / "s") if server.uds else None
            with FakeOllama(ssl=context, uds=uds) as fresh:
                async with path_to(fresh, path, client_tls, tunnel) as client:
                    await one_run(fresh, client, path, act, tick, gap, runs)
                await look_for_sockets(fresh, path, (tick, gap), runs)
    await until(lambda: len(open_fds()) <= before, f"descriptors left: {open_fds()}, {before} before")
    count_runs(runs.count)
    if path not in OWN and server.uds:
        others = [told for told in nothing_left.errors if not isinstance(told.get("exception"), LOOKS_TWICE)]
        nothing_left.errors[:] = others
    assert path in LOSES or not runs.lost, f"the next request does not work after {runs.lost}"
    print(f"{path}: {runs.count} runs, place lost at {runs.lost}, socket forgotten at {runs.forgotten}")


class Body(httpx.AsyncByteStream):
    """An answer out of a mock, which tells whether it was closed."""

    def __init__(self) -> None:
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in BODY:
            if isinstance(piece, bytes):
                yield piece
            await asyncio.sleep(0)

    async def aclose(self) -> None:
        self.ended = True


@pytest.mark.parametrize("server", ["tcp"], indirect=True)
@pytest.mark.parametrize("stops", [*STOPS])
async def test_stops_at_every_tick_over_a_mock(
    server: FakeOllama, stops: str, full: bool, count_runs: Callable[[int], None]
) -> None:
    runs, act = Runs(), STOPS[stops]
    for tick in TICKS[:: 1 if full else 3]:
        for gap in GAPS if act[1] else range(1):
            bodies: list[Body] = []

            async def answer(request: httpx.Request, bodies: list[Body] = bodies) -> httpx.Response:
                await asyncio.sleep(0)
                if request.url.path == "/api/version":
                    return httpx.Response(200, json={"version": "0"})
                bodies.append(Body())
                return httpx.Response(200, stream=bodies[-1])

            async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
                await one_run(server, client, "mock", act, tick, gap, runs)
            assert all(body.ended for body in bodies), f"tick {tick}, gap {gap}: the answer was not closed"
    server.forget()
    count_runs(runs.count)
