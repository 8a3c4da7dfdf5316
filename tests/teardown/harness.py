"""What the teardown tests have in common: scenes to stop in, and a look at what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wire.tunnel import TunnelProxy

from ollama_async import AbortError, AsyncClient, CancelToken, Stream, StreamClosed
from ollama_async.testing import ConnectionRecord, FakeOllama, nothing_left_behind
from ollama_async.testing._left import Watch as Baseline
from ollama_async.testing._left import live_timers, open_fds, registrations

__all__ = [
    "BOUND",
    "ELSEWHERE",
    "STOPS",
    "Baseline",
    "black_hole",
    "client_of",
    "in_thread",
    "live_timers",
    "nothing_left_behind",
    "open_fds",
    "over_the_network",
    "paths",
    "read_all",
    "registrations",
    "saw_leave",
    "stop_the_reader",
    "through_proxy",
    "ticks",
    "until",
]

over_the_network = pytest.mark.parametrize("server", ["tcp", "tls"], indirect=True)
"""For what has no meaning over a unix socket, or makes clients of its own that know an address only."""

BOUND = 20.0
"""Seconds after which a wait for something that must come counts as failed."""

ELSEWHERE = "http://models.example:8080"
"""Where nobody is: what is sent there gets only as far as a proxy."""


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until something is so, or fail."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND} s: {what}"
        await asyncio.sleep(0.001)


async def ticks(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


def saw_leave(server: FakeOllama, number: int = -1) -> ConnectionRecord:
    """Block this thread (and with it the loop that runs in it) until the server has seen a client leave.

    What closes the socket must have happened before: nothing of the loop runs in the meantime.
    """
    record = server.connections[number]
    assert record.wait_left(BOUND), "the server did not see the client leave while the client's loop was blocked"
    assert record.bytes_after_left == 0
    return record


def paths(server: FakeOllama) -> list[str]:
    """What was asked for, in order; of a target as a proxy is sent it, the part after the server."""
    return [request.path.removeprefix(ELSEWHERE) for request in server.requests]


def in_thread(function: Callable[[], Any]) -> Any:
    """Run in another thread, while this one is blocked, and return what it returned."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)
    thread.start()
    thread.join(BOUND)
    assert result, "it did not end, or raised"
    return result[0]


async def read_all(stream: Stream[Any], seen: list[Any]) -> None:
    """Be a stream's reader."""
    async for chunk in stream:
        seen.append(chunk)


STOPS = ["token", "abort", "client", "aclose", "cancel", "cancel twice"]
"""Ways to stop a stream that a task reads to its end."""


async def stop_the_reader(
    way: str,
    reader: asyncio.Task[Any],
    stream: Stream[Any],
    token: CancelToken,
    client: AsyncClient,
    server: FakeOllama,
) -> None:
    """Stop a stream in one of `STOPS`; its reader gets the error of that way, and the server sees it leave."""
    if way == "aclose":
        await stream.aclose()
    elif way.startswith("cancel"):
        reader.cancel()
        if way == "cancel twice":
            await asyncio.sleep(0)
            reader.cancel()
    else:
        {"token": token.abort, "abort": stream.abort, "client": client.abort}[way]()
        # The loop stands still: the socket is shut down already.
        assert server.connections[-1].wait_left(BOUND)
    expected = StreamClosed if way == "aclose" else asyncio.CancelledError if "cancel" in way else AbortError
    with pytest.raises(expected):
        await asyncio.wait_for(reader, BOUND)
    assert server.requests[-1].connection.wait_left(BOUND)
    outcomes = {"aclose": "closed", "cancel": "cancelled", "cancel twice": "cancelled"}
    assert stream.outcome == outcomes.get(way, "aborted")


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address where a SYN is never answered: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def through_proxy(server: FakeOllama, tunnel: TunnelProxy, tls: ssl.SSLContext) -> AsyncClient:
    """A client that reaches a fake server through a proxy of HTTP: over TLS through a tunnel, else it is the proxy."""
    if server.url.startswith("https"):
        return AsyncClient(server.url, proxy=tunnel.url, verify=tls)
    # What a proxy is sent where no tunnel is needed, the fake server takes as well.
    return AsyncClient(ELSEWHERE, proxy=server.url)


def client_of(server: FakeOllama, **options: Any) -> AsyncClient:
    """A client of a fake server, whatever it listens on."""
    if server.uds is not None:
        return AsyncClient(server.url, uds=server.uds, **options)
    return AsyncClient(server.url, **options)
