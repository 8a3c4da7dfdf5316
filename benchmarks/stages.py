"""Where the time of a token goes: each stage of its way by itself, for one that comes alone and one among 64.

In microseconds: ``python benchmarks/stages.py``.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import timeit
from collections.abc import Callable
from typing import Any

import httptools
from load_server import token

from ollama_async import ChatResponse
from ollama_async._call.decoder import NdjsonDecoder
from ollama_async._call.ndjson import MAX_LINE_BYTES, LineSplitter
from ollama_async._model.merge import ChatMerge, validators
from ollama_async._wire.reader import ResponseReader
from ollama_async._wire.unpack import LINES

TOGETHER = 64
LINE = token("ollama").split(b"\r\n")[1].rstrip(b"\n")


def timed(function: Callable[[], Any], tokens: int = 1) -> float:
    """Microseconds a token, the best of seven runs."""
    number = 20_000 // tokens
    return min(timeit.repeat(function, number=number, repeat=7)) / number / tokens * 1e6


def reading(tokens: int, *, as_asyncio: bool = False) -> float:
    ours, theirs = socket.socketpair()
    block = token("ollama") * tokens
    buffer = memoryview(bytearray(64 * 1024))

    def go() -> None:
        theirs.send(block)
        if as_asyncio:
            ours.recv(256 * 1024)
        else:
            ours.recv_into(buffer)

    sent = timed(go, tokens)
    ours.close()
    theirs.close()
    return sent


def looking() -> float:
    selector = selectors.DefaultSelector()
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    theirs.send(b"x")
    took = timed(lambda: selector.select(0))
    for sock in (ours, theirs):
        sock.close()
    selector.close()
    return took


class Target:
    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.on_body = self.bodies.append


def parsing(tokens: int) -> float:
    target = Target()
    parser = httptools.HttpResponseParser(target)
    parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    block = token("ollama") * tokens

    def go() -> None:
        parser.feed_data(block)
        b"".join(target.bodies)
        target.bodies.clear()

    return timed(go, tokens)


def passing_on(tokens: int) -> float:
    reader = ResponseReader(asyncio.new_event_loop(), body_form=LINES)
    body = (LINE + b"\n") * tokens

    def go() -> None:
        reader.feed_data(body)
        reader.read_nowait()

    took = timed(go, tokens)
    reader.loop.close()
    return took


async def waking(rounds: int = 20_000) -> float:
    """A future is resolved, its task runs in the loop's next round."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(rounds):
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future
    return (loop.time() - begun) / rounds * 1e6


def splitting(tokens: int) -> float:
    splitter = LineSplitter()
    body = (LINE + b"\n") * tokens
    return timed(lambda: splitter.feed_data(body), tokens)


def validating(tokens: int) -> float:
    if tokens == 1:
        one = validators(ChatResponse).one
        return timed(lambda: one(LINE))
    decoder = NdjsonDecoder(validators(ChatResponse), tokens, MAX_LINE_BYTES)
    decoder.lines = [LINE] * tokens
    assert len(decoder.decode(alone=False)[0]) == tokens
    return timed(lambda: decoder.decode(alone=False), tokens)


def merging() -> float:
    merge, chunk = ChatMerge(), validators(ChatResponse).one(LINE)
    return timed(lambda: merge.add(chunk))


def main() -> None:
    # Before anything else: once a program has freed something big, malloc keeps so much.
    fresh = (reading(1, as_asyncio=True), reading(TOGETHER, as_asyncio=True))
    stages = {
        "kernel: the bytes are written and read": (reading(1), reading(TOGETHER)),
        "kernel: two looks for events": (2 * looking(), 2 * looking() / TOGETHER),
        "asyncio: the reader's task is woken": ((woken := asyncio.run(waking())), woken / TOGETHER),
        "httptools: HTTP chunks": (parsing(1), parsing(TOGETHER)),
        "reader: put in, taken out": (passing_on(1), passing_on(TOGETHER)),
        "NDJSON: lines": (splitting(1), splitting(TOGETHER)),
        "pydantic: JSON to a typed chunk": (validating(1), validating(TOGETHER)),
        "stream: merged into the answer": (merging(), merging()),
    }
    print(f"| stage, µs a token of {len(LINE)} bytes | alone | with {TOGETHER - 1} others |\n|---|---|---|")
    for name, (alone, together) in stages.items():
        print(f"| {name} | {alone:.2f} | {together:.2f} |")
    print(f"| sum | {sum(a for a, _ in stages.values()):.2f} | {sum(b for _, b in stages.values()):.2f} |")
    print(f"| the first, into a buffer of 256 KiB that is new each time | {fresh[0]:.2f} | {fresh[1]:.2f} |")


if __name__ == "__main__":
    main()
