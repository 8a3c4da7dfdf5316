"""The registry of streams: in memory, and what one over Redis does while that is away."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from ollama_async import AbortError, AsyncClient, OllamaError, RequestError
from ollama_async.registry import AbortRegistry, Name, RegistryClosed, RegistryUnavailable, _local, _redis
from ollama_async.testing import FakeOllama, Reply, nothing_left_behind

BOUND = 20.0

# Texts that could be taken for something else on their way: separators, patterns, escapes, other namespaces.
NASTY = [
    "a:b",
    "a%3Ab",
    "*",
    "[a-z]",
    "x?",
    "\\*",
    "../x",
    "\0",
    "\r\nPUBLISH x y",
    "\u00fc\u2028\U0001f600",
    " ",
    "link",
]


@pytest_asyncio.fixture
async def registry() -> AsyncIterator[AbortRegistry]:
    async with AbortRegistry.from_url("memory://") as made:
        yield made


class Clock:
    """In place of ``time.monotonic``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_local, "time", made)
    return made


async def test_a_stream_is_stopped_by_its_id(registry: AbortRegistry, fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.01))
    async with AsyncClient(fake_ollama.url) as client, registry.token("one") as token:
        stream = client.chat("fake", "hi", stream=True, token=token)
        await anext(stream)
        stopping = registry.abort("one", "Stop was pressed")
        # A stream of this process is stopped before anything is awaited: not even a loop is needed to go round.
        with pytest.raises(StopIteration) as returned:
            stopping.send(None)
        assert returned.value.value == "stopped"
        assert fake_ollama.connections[0].wait_left()
        with pytest.raises(AbortError, match="Stop was pressed"):
            await anext(stream)
    assert await registry.list() == []


async def test_a_stop_that_comes_before_its_stream(registry: AbortRegistry) -> None:
    assert await registry.abort("early", "reason") == "kept"
    async with registry.token("early") as token:
        assert (token.aborted, token.reason) == (True, "reason")


async def test_a_stop_holds_for_its_time(clock: Clock) -> None:
    registry = AbortRegistry.from_url("memory://", ttl=60)
    await registry.abort("early")
    clock.now += 59
    async with registry.token("early") as token:
        assert token.aborted
    clock.now += 2
    async with registry.token("early") as token:
        assert not token.aborted


async def test_a_stop_of_an_ended_answer_stops_no_other(registry: AbortRegistry) -> None:
    async with registry.token("one"), registry.token("two") as two:
        pass
    assert await registry.abort("one") == "kept"
    async with registry.token("three") as three:
        assert not two.aborted
        assert not three.aborted


async def test_stopped_twice_the_first_reason_stays(registry: AbortRegistry) -> None:
    async with registry.token("one") as token:
        assert await registry.abort("one", "first") == "stopped"
        assert await registry.abort("one", "second") == "stopped"
        assert token.reason == "first"
    await registry.abort("one", "third")
    async with registry.token("one") as late:
        assert late.reason == "first"


async def test_a_stop_by_somebody_else(registry: AbortRegistry) -> None:
    async with registry.token("one", owner="ann") as token:
        for owner in ("bob", "", "ANN", "ann "):
            assert await registry.abort("one", owner=owner) == "kept"
        assert not token.aborted
        assert await registry.abort("one", owner="ann") == "stopped"
        assert token.aborted


async def test_owner_and_id_cannot_be_mixed_up(registry: AbortRegistry) -> None:
    async with registry.token("b", owner="a:") as token:
        await registry.abort(":b", owner="a")
        await registry.abort("a::b")
        assert not token.aborted


async def test_several_streams_under_one_id(registry: AbortRegistry) -> None:
    async with registry.token("one") as first:
        async with registry.token("one") as second:
            assert await registry.list() == [("", "one")]
        await registry.abort("one")
        assert (first.aborted, second.aborted) == (True, False)


async def test_the_list(registry: AbortRegistry) -> None:
    async with registry.token("2", owner="ann"), registry.token("1", owner="ann"), registry.token("1", owner="bob"):
        assert await registry.list() == [("ann", "1"), ("ann", "2"), ("bob", "1")]
        assert await registry.list("ann") == [Name("ann", "1"), Name("ann", "2")]
        assert await registry.list("") == []
    assert await registry.list() == []


@pytest.mark.parametrize("ending", [RuntimeError, asyncio.CancelledError])
async def test_a_registration_is_taken_back_on_every_way_out(
    registry: AbortRegistry, ending: type[BaseException]
) -> None:
    with pytest.raises(ending):
        async with registry.token("one"):
            raise ending
    assert await registry.list() == []


@pytest.mark.parametrize("bad", ["", "x" * 201, None, 7, b"bytes", "\ud800"])
async def test_an_invalid_id(registry: AbortRegistry, bad: Any) -> None:
    with pytest.raises(RequestError, match="id"):
        async with registry.token(bad):
            pass
    with pytest.raises(RequestError, match="id"):
        await registry.abort(bad)
    assert await registry.list() == []


@pytest.mark.parametrize("bad", ["x" * 201, None, 7, "\ud800"])
async def test_an_invalid_owner(registry: AbortRegistry, bad: Any) -> None:
    with pytest.raises(RequestError, match="owner"):
        await registry.abort("one", owner=bad)


@pytest.mark.parametrize("bad", ["x" * 1001, 7, ["why"]])
async def test_an_invalid_reason(registry: AbortRegistry, bad: Any) -> None:
    async with registry.token("one") as token:
        with pytest.raises(RequestError, match="reason"):
            await registry.abort("one", bad)
        assert not token.aborted


async def test_there_is_an_end_to_the_stops_that_are_kept(
    registry: AbortRegistry, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(_local, "_MAX_STOPS", 3)
    for number in range(5):
        await registry.abort(str(number))
    aborted = []
    for number in range(5):
        async with registry.token(str(number)) as token:
            aborted.append(token.aborted)
    assert aborted == [False, False, True, True, True]
    clock.now += 601
    await registry.abort("new")
    assert len(registry._book._stops) == 1


async def test_a_closed_registry(registry: AbortRegistry) -> None:
    assert registry.connected
    async with registry.token("one"):
        await registry.aclose()
        await registry.aclose()
        with pytest.raises(RegistryClosed):
            await registry.abort("one")
    with pytest.raises(RegistryClosed):
        async with registry.token("two"):
            pass
    with pytest.raises(RegistryClosed):
        await registry.list()
    assert not registry.connected


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("", {}, "must begin with memory://"),
        ("http://secret@x", {}, "must begin with memory://"),
        (None, {}, "must begin with memory://"),
        ("memory://", {"ttl": 0}, "ttl"),
        ("memory://", {"ttl": float("nan")}, "ttl"),
        ("redis://x", {"ttl": True}, "ttl"),
        ("redis://x", {"namespace": ""}, "namespace"),
        ("redis://x", {"namespace": "x" * 101}, "namespace"),
        ("redis://:secret@x?db=x", {}, "'db'"),
        ("redis://:secret@x?no_such_option=1", {}, "no_such_option"),
        ("redis://x?max_connections=secret", {}, "max_connections"),
        ("rediss://x?ssl_cert_reqs=secret", {}, "one of its options"),
        # Not every redis-py names the option.
        ("redis://x?protocol=secret&password=secret", {}, "protocol|one of its options"),
        # What was not escaped, so that a password ends where it should not, or stands where it should not.
        ("redis://:secret/word@x:6379/0", {}, "%2F"),
        ("redis://ann:secret#word@x:6379", {}, "%23"),
        ("rediss://ann:secret?word@x:6379", {}, "%3F"),
        ("redis://ann:12/secret@x", {}, "%2F"),
        ("redis://ann:pass/word?secret@x", {}, "%2F"),
        ("redis://x?password=secret@word", {}, "%40"),
        ("unix://ann:secret/word@/run/redis.sock", {}, "%2F"),
        ("redis://ann:secret", {}, "port"),
        ("redis://:secret[word]@x", {}, "%5B"),
        ("redis://:secret]@x", {}, "%5B"),
        ("redis://ann:secret\u2100@x", {}, "cannot be read"),
        ("redis://:p@x:secret", {}, "port"),
        ("redis://:secret@x:99999", {}, "port"),
    ],
)
def test_bad_parameters(url: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        AbortRegistry.from_url(url, **options)
    error = caught.value
    assert "secret" not in f"{error} {error!r} {error.__cause__} {error.__context__}"


@pytest.mark.parametrize("password", ["s3cret-word", "s3cret" * 50, "a%20s3cret"])
async def test_a_redis_that_shows_the_password(caplog: pytest.LogCaptureFixture, password: str) -> None:
    """As one does that does not know the command it is in."""

    async def show(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read(2000)
        shown = " ".join(asked.decode().split("\r\n")[2::2])[:150]
        writer.write(f"-ERR what is '{shown}'\r\n".encode() * 3)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(show, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with AbortRegistry.from_url(f"redis://:{password}@127.0.0.1:{port}") as registry, asyncio.timeout(BOUND):
            async with registry.token("one"):
                pass
            with pytest.raises(RegistryUnavailable) as caught:
                await registry.list()
    error = caught.value
    assert "s3cret" not in f"{error} {error!r} {error.__cause__} {error.__context__} {caplog.text}"
    assert "Redis is away" in caplog.text


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ollama_async.registry._redis")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ImportError, match=r'pip install "ollama-async\[redis\]"'):
        AbortRegistry.from_url("redis://x")


def test_names_in_redis_cannot_be_taken_for_others() -> None:
    book = _local.Book(1)
    link = _redis.Link("redis://127.0.0.1", book, "a:*")
    names = [Name(owner, stream_id) for owner in ["", *NASTY] for stream_id in NASTY]
    channels = [link._channel(name) for name in names]
    assert len(set(channels)) == len(names)
    assert [link._name(channel.encode()) for channel in channels] == names
    for channel in channels:
        assert channel.startswith("a%3A%2A:stop:")
        assert channel.count(":") == 3
        assert not set(channel) & set("*?[]\\ \r\n\0")
        assert channel.isascii()
    for foreign in (b"a%3A%2A:link", b"b:stop:x:y", b"a%3A%2A:stop:x", b"a%3A%2A:stop:%ff:x", b"\xff", "text", None):
        assert link._name(foreign) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'"x"', b'{"reason": 7}', b"\xff", b"[" * 100_000, None, 7])
def test_an_invalid_message(data: Any) -> None:
    assert _redis._reason(data) is None


@pytest.mark.parametrize("reason", [None, "", "why", '\u00fc\u2028\U0001f600\0\n"', "\ud800"])
def test_a_message_brings_its_reason_and_not_much_else(reason: str | None) -> None:
    message = _redis._message(reason)
    assert _redis._reason(message) == reason
    assert len(message) <= len((reason or "").encode("utf-8", "surrogatepass")) + 40


# -- over Redis, while there is none --


@pytest.fixture
def nowhere() -> Any:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield f"redis://:secret@127.0.0.1:{taken.getsockname()[1]}/0"


async def test_while_redis_is_away(nowhere: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ollama_async.registry"):
        async with AbortRegistry.from_url(nowhere) as registry:
            async with registry.token("one") as token:
                assert not token.aborted
                assert registry.connected is False
                assert await registry.abort("two") == "queued"
                assert await registry.abort("one", "here") == "stopped"
                assert token.reason == "here"
                with pytest.raises(RegistryUnavailable, match="Redis does not answer") as caught:
                    await registry.list()
                assert isinstance(caught.value, OllamaError)
                assert isinstance(caught.value, ConnectionError)
            async with registry.token("two") as token:
                assert token.aborted
            # What comes and goes meanwhile is not collected.
            assert registry._link is not None
            assert {name.id for name in registry._link._changed} <= {"one"}
    assert "until it is back" in caplog.text
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


async def test_before_it_has_tried_a_registry_does_not_know_whether_it_is_connected(nowhere: str) -> None:
    registry = AbortRegistry.from_url(nowhere)
    assert registry.connected is None
    async with registry:
        assert registry.connected is False, "entering it is a try"
    assert registry.connected is False
    with pytest.raises(RegistryClosed):
        async with registry:
            pass
    assert AbortRegistry.from_url("memory://").connected is True


async def test_entering_a_registry_waits_for_a_silent_redis_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis, "_PATIENCE", 0.05)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    asked = asyncio.Event()
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(BOUND), AbortRegistry.from_url(url) as registry:
            assert registry.connected is None
            await asked.wait()
        assert registry.connected is False


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
async def test_entering_a_registry_that_is_cancelled_leaves_nothing(rounds: int) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    asked = asyncio.Event()
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(BOUND), nothing_left_behind():
            registry = AbortRegistry.from_url(url)
            entering = asyncio.create_task(registry.__aenter__())
            await asked.wait()
            # redis-py loses a cancellation in some of them.
            for _ in range(rounds):
                await asyncio.sleep(0)
            began = time.monotonic()
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            assert time.monotonic() - began < 4, "socket_timeout= has ended it, not aclose()"
            assert registry.connected is False


async def test_a_redis_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis, "_PATIENCE", 0.05)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        registry = AbortRegistry.from_url(f"redis://127.0.0.1:{port}")
        async with registry, asyncio.timeout(BOUND), registry.token("one") as token:
            assert await registry.abort("two") == "queued"
            assert await registry.abort("one") == "stopped"
            assert token.aborted


async def test_a_registration_that_is_cancelled(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before it is known that Redis is away: entering the registry would tell.
    registry = AbortRegistry.from_url(nowhere)

    async def register() -> None:
        async with registry.token("one"):
            raise AssertionError

    task = asyncio.create_task(register())
    await asyncio.sleep(0)
    assert "one" in [name.id for name in registry._book.names()]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert registry._book.names() == []
    assert registry._link is not None
    assert not registry._link._entering
    await registry.aclose()


async def test_a_registry_has_one_event_loop(nowhere: str) -> None:
    caught: list[BaseException] = []

    async def use(registry: AbortRegistry) -> None:
        try:
            await registry.abort("one")
        except RequestError as exc:
            caught.append(exc)

    async with AbortRegistry.from_url(nowhere) as registry:
        await registry.abort("one")
        thread = threading.Thread(target=lambda: asyncio.run(use(registry)))
        thread.start()
        await asyncio.to_thread(thread.join, BOUND)
    assert "another event loop" in str(caught[0])


async def test_closing_leaves_nothing(nowhere: str) -> None:
    before = asyncio.all_tasks()
    registry = AbortRegistry.from_url(nowhere)
    async with registry.token("one"):
        await registry.aclose()
    assert asyncio.all_tasks() == before
    unused = AbortRegistry.from_url(nowhere)
    await unused.aclose()
