"""`ollama_async.testing`: driven by raw sockets and foreign HTTP clients, never by this package's own client."""

import asyncio
import contextlib
import hashlib
import http.client
import json
import logging
import math
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import httpx
import pytest
import trustme

import ollama_async.testing
from ollama_async.testing import (
    Block,
    Cut,
    Endless,
    FakeOllama,
    Gate,
    NoEnd,
    Pause,
    Raw,
    Reply,
    Reset,
    Stall,
    Trickle,
)

LIMIT = 5.0
ROOT = Path(ollama_async.testing.__file__).parents[2]


class Peer:
    """A client that does to its socket exactly what the test says, and nothing else."""

    def __init__(self, server: FakeOllama) -> None:
        if server.uds is None:
            self.sock: socket.socket = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(LIMIT)
            self.sock.connect(server.uds)
        self.got = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def ask(self, path: str = "/x", body: bytes = b"{}", *, method: str = "POST", version: str = "1.1") -> Self:
        head = f"{method} {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sock.sendall(head.encode() + body)
        return self

    def until(self, marker: bytes) -> bytes:
        """Read up to and including the marker, leaving the rest for later."""
        while marker not in self.got:
            data = self.sock.recv(65536)
            assert data, f"the server ended the connection after {self.got!r}"
            self.got += data
        before, _, self.got = self.got.partition(marker)
        return before + marker

    def head(self) -> str:
        return self.until(b"\r\n\r\n").decode()

    def rest(self) -> bytes:
        """Read to the server's FIN."""
        while data := self.sock.recv(65536):
            self.got += data
        return self.got

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.001)


def lines(body: bytes) -> list[dict]:
    return [json.loads(line) for line in body.splitlines()]


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama(interval=0) as server:
        yield server


@pytest.fixture
def peer(server: FakeOllama) -> Iterator[Peer]:
    with Peer(server) as peer:
        yield peer


def post(server: FakeOllama, path: str, body: object = None, *, method: str = "POST", **options: object):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(base_url=server.url, trust_env=False, timeout=LIMIT) as client:
        return client.request(method, path, content=content, **options)


# Life and records.


def test_all_lists_the_public_names():
    # Its order is looked after by ruff, which puts constants first.
    names = ollama_async.testing.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(ollama_async.testing, name) for name in names)


def test_it_does_not_import_pytest():
    code = "import sys, ollama_async.testing; sys.exit('pytest' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 0
    )


def test_start_and_stop_are_idempotent_and_the_port_survives():
    server = FakeOllama()
    server.stop()
    assert server.start() is server.start()
    port = server.port
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        Peer(server)
    with server:
        assert server.port == port
        assert post(server, "/", method="GET").text == "Ollama is running"


def test_an_address_in_use_is_told_by_start():
    threads = threading.active_count()
    with FakeOllama() as server, pytest.raises(OSError, match="in use"):
        FakeOllama(port=server.port).start()
    assert threading.active_count() == threads


def test_an_ipv6_address():
    with FakeOllama(host="::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert post(server, "/", method="GET").status_code == 200


def test_nothing_is_left_after_stop(tmp_path):
    def once(number: int) -> None:
        with FakeOllama(uds=str(tmp_path / "s") if number % 2 else None) as server:
            server.script("/x", Reply([b"a", Stall()]))
            peers = [Peer(server).ask() for _ in range(3)]
            peers[0].until(b"a\r\n")
        for peer in peers:
            peer.sock.close()

    once(0)
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(100):
        once(number)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == fds
    assert not list(tmp_path.iterdir())


def test_stop_while_connections_arrive():
    for _ in range(20):
        with FakeOllama() as server:
            peers = [Peer(server) for _ in range(20)]
        for peer in peers:
            with contextlib.suppress(ConnectionResetError):  # those that were never accepted
                assert peer.rest() == b""
            peer.sock.close()


def test_records_of_a_request(server, peer):
    before = time.monotonic()
    head = b"POST /x?a=1 HTTP/1.1\r\nHost: x\r\nX-Two: a\r\nx-two: b\r\nContent-Length: 7\r\n\r\n"
    peer.sock.sendall(head)
    [request] = server.wait_for_requests(path="/x")
    assert (request.method, request.path, request.route) == ("POST", "/x?a=1", "/x")
    assert request.headers == [("host", "x"), ("x-two", "a"), ("x-two", "b"), ("content-length", "7")]
    assert (request.header("X-Two"), request.header("nope")) == ("a", None)
    assert before <= request.at <= time.monotonic()
    assert (request.body, request.complete) == (b"", False)
    with pytest.raises(TimeoutError, match="POST /x"):
        request.json(timeout=0.01)
    peer.sock.sendall(b'{"a":')
    eventually(lambda: request.body == b'{"a":')
    threading.Timer(0.01, peer.sock.sendall, [b"1}"]).start()
    assert request.json() == {"a": 1}
    assert request.complete
    [connection] = server.connections
    assert (request.connection, connection.requests) == (connection, [request])
    peer.head()
    assert connection.bytes_received == len(head) + 7
    assert connection.open


def test_a_chunked_request_body_and_keep_alive(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    for number in range(3):
        connection.request("POST", "/x", iter([b"one", b"two"]), encode_chunked=True)
        assert connection.getresponse().read() == b"404 page not found"
        assert server.requests[number].body == b"onetwo"
    connection.close()
    [record] = server.wait_for_connections()
    assert record.wait_left()
    assert len(record.requests) == 3


def test_requests_in_one_packet_are_answered_in_order(server, peer):
    server.script("/x", Reply.json(1), Reply.json(2))
    peer.sock.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\nGET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answers = peer.rest()
    assert answers.index(b"\r\n\r\n1") < answers.index(b"\r\n\r\n2")


def test_a_wait_that_times_out_shows_what_was_received(server, peer):
    with pytest.raises(TimeoutError, match="nothing"):
        FakeOllama().wait_for_connections(timeout=0.01)
    peer.ask("/y").head()
    with pytest.raises(TimeoutError, match=r"requests to /x: 0 of 1 .*\n.*ConnectionRecord.*\n.*'/y'"):
        server.wait_for_requests(path="/x", timeout=0.01)


def test_forget_keeps_what_is_open(server, peer):
    server.script("/x", Reply.json(1), always=True)
    with Peer(server) as gone:
        gone.ask().head()
    peer.ask().head()
    assert server.connections[1].wait_left()
    server.forget()
    [kept] = server.connections
    assert (kept.number, kept.open, server.requests) == (1, True, tuple(kept.requests))
    assert post(server, "/x").status_code == 404


def test_bad_requests_are_refused(server, peer):
    peer.sock.sendall(b"NONSENSE\r\n\r\n")
    assert peer.rest().startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert server.connections[0].closed_at is not None


def test_nonsense_after_a_request_ends_its_answer(server, peer):
    server.script("/x", Reply([b"a", Stall()]))
    peer.ask().until(b"a\r\n")
    peer.sock.sendall(b"NONSENSE\r\n\r\n")
    assert peer.rest().startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_an_upgrade_wish_is_ignored(server, peer):
    peer.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert "200 OK" in peer.head()


@pytest.mark.parametrize("target", ["/x", "http://h:1/x", "/%78", "/x?y=//z"])
def test_targets_that_lead_to_a_path(server, peer, target):
    server.script("/x", Reply.json("here"))
    peer.ask(target)
    peer.head()
    peer.until(b'"here"')


@pytest.mark.parametrize("target", ["//[", "http://[bad", "//x/y"])
def test_odd_targets_do_no_harm(server, peer, target):
    assert peer.ask(target).head().split(" ", 2)[1] in {"400", "404"}


# Scripts.


def test_scripts_are_played_in_order_then_the_built_in_answers(server):
    server.script("/api/version", Reply.json(1), Reply.json(2))
    assert [post(server, "/api/version", method="GET").json() for _ in range(2)] == [1, 2]
    assert "version" in post(server, "/api/version", method="GET").json()


def test_the_last_reply_can_repeat(server):
    server.script("/x", Reply.json(1), Reply.json(2), always=True)
    assert [post(server, "/x").json() for _ in range(4)] == [1, 2, 2, 2]
    server.script("/x", Reply.json(3))
    assert [post(server, "/x").json() for _ in range(2)] == [3, 2]


def test_misuse_is_told():
    with pytest.raises(ValueError, match="at least one"):
        FakeOllama().script("/x")
    for steps in (b"abc", {"a": 1}, ["abc"], [None]):
        with pytest.raises(TypeError, match="sequence of steps"):
            Reply(steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="endless"):
        Reply([Endless(lambda _: b"")], framing="length")


def test_the_wire_of_a_chunked_reply(server, peer):
    server.script("/x", Reply([b"raw", b"", {"ä": [1, 2]}, Block({"a": 1}, b"\n", {"b": 2}), Raw(b"3\r\nxyz\r\n")]))
    peer.ask()
    assert peer.head().splitlines()[0] == "HTTP/1.1 200 OK"
    body = '3\r\nraw\r\nd\r\n{"ä":[1,2]}\n\r\n11\r\n{"a":1}\n\n{"b":2}\n\r\n3\r\nxyz\r\n0\r\n\r\n'
    assert peer.until(b"0\r\n\r\n") == body.encode()
    peer.ask("/api/version", method="GET")  # the connection goes on
    assert "200 OK" in peer.head()


def test_heads(server, peer):
    server.script("/x", Reply([b"ab"]), Reply([b"ab"], framing="length"), Reply.error(499, "no", code=7))
    server.script("/x", Reply(headers=[("content-type", "a/b"), ("X", "1"), ("X", "2")], framing="length"))
    heads: list[dict[str, str]] = []
    for end in (b"0\r\n\r\n", b"ab"):
        heads.append(dict(line.split(": ", 1) for line in peer.ask().head().splitlines()[1:-1]))
        peer.until(end)
    assert [sorted(head) for head in heads] == [
        ["Content-Type", "Date", "Transfer-Encoding"],
        ["Content-Length", "Content-Type", "Date"],
    ]
    assert heads[0]["Content-Type"] == "application/x-ndjson"
    assert heads[0]["Date"].endswith(" GMT")
    assert heads[1]["Content-Length"] == "2"
    response = post(server, "/x")
    assert (response.status_code, response.json()) == (499, {"error": "no", "code": 7})
    headers = post(server, "/x").headers
    assert headers.get_list("content-type") == ["a/b"]
    assert headers.get_list("x") == ["1", "2"]


def test_framing_close_ends_with_fin(server, peer):
    server.script("/x", Reply([b"a", b"b"], framing="close"))
    answer = peer.ask().rest()
    assert answer.endswith(b"\r\n\r\nab")
    assert b"Connection: close" in answer
    assert b"chunked" not in answer


def test_http_1_0_and_connection_close_get_fin(server, peer):
    server.script("/x", Reply([b"a"]), Reply([b"b"], headers={"Connection": "close"}))
    assert peer.ask(version="1.0").rest().endswith(b"\r\n\r\na")
    with Peer(server) as other:
        assert other.ask().rest().endswith(b"1\r\nb\r\n0\r\n\r\n")


def test_head_requests_and_204_have_no_body(server, peer):
    server.script("/x", Reply([b"abc", Raw(b"")]), Reply(status=204))
    for method in ("HEAD", "GET"):
        peer.ask(method=method)
        assert "chunked" not in peer.head()
    assert "200" in peer.ask("/", method="GET").head()


def test_raw_replaces_head_and_framing(server, peer):
    server.script("/x", Reply([b"abc", Trickle(b"de"), Cut()], raw=b"HTTP/9 what\r\n"))
    assert peer.ask().rest() == b"HTTP/9 what\r\nabcde"


def test_before_head_is_unframed(server, peer):
    gate = Gate()
    server.script("/x", Reply.json(1))
    server.script("/y", Reply([b"a"], before_head=[b"HTTP/1.1 102 Processing\r\n\r\n", gate]))
    peer.ask("/y")
    assert peer.head().startswith("HTTP/1.1 102")
    assert gate.wait_reached()
    gate.open()
    assert peer.head().startswith("HTTP/1.1 200")


def test_pause(server, peer):
    server.script("/x", Reply([b"a", Pause(0.05), b"b"]))
    peer.ask().until(b"a\r\n")
    begin = time.monotonic()
    peer.until(b"b\r\n")
    assert time.monotonic() - begin > 0.03


def test_gate_waits_for_the_test_and_stays_open(server, peer):
    gate = Gate()
    server.script("/x", Reply([b"a", gate, b"b"]), always=True)
    with pytest.raises(TimeoutError, match="0 of 1"):
        gate.wait_reached(0.01)
    with Peer(server) as other:
        for one in (peer, other):
            one.ask().until(b"a\r\n")
        assert gate.wait_reached(count=2)
        assert gate.reached
        assert peer.got + other.got == b""
        gate.open()
        for one in (peer, other):
            one.until(b"b\r\n1\r\n" if one.got else b"b\r\n")
    with Peer(server) as late:
        late.ask().until(b"b\r\n")


def test_a_gate_nobody_opens_does_not_hold_up_stop(server, peer):
    gate = Gate()
    server.script("/x", Reply([gate]))
    peer.ask().head()
    assert gate.wait_reached()
    server.stop()
    gate.open()  # nobody waits any more, the server's loop is closed


def test_stall_and_no_end_keep_the_body_open(server, peer):
    server.script("/x", Reply([b"a", Stall(), b"b"]))
    server.script("/y", Reply([NoEnd(), b"a", b"b"]))
    with Peer(server) as other:
        other.ask("/y").until(b"1\r\nb\r\n")
        peer.ask().until(b"a\r\n")
        for one in (peer, other):
            one.sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                one.sock.recv(1)


def test_cut_sends_fin_and_the_connection_is_watched_on(server, peer):
    server.script("/x", Reply([b"a", Cut(), b"b"]))
    assert peer.ask().rest().endswith(b"1\r\na\r\n")
    [connection] = server.connections
    assert connection.closed_at is not None
    assert not connection.open
    assert connection.left_at is None
    peer.sock.sendall(b"more")  # no RST: the FIN is all the client gets
    assert peer.sock.recv(1) == b""
    peer.sock.close()
    assert connection.wait_left()


def test_reset(server, peer):
    server.script("/x", Reply([b"a", Reset(), b"b"]))
    peer.ask().until(b"1\r\na\r\n")
    with pytest.raises(ConnectionResetError):
        peer.sock.recv(1)
    [connection] = server.connections
    eventually(lambda: connection.closed_at is not None)
    assert connection.left_at is None


def test_trickle_frames_each_byte(server, peer):
    server.script("/x", Reply([Trickle(b"abc", 0.001)]), Reply([Trickle(b"abc")], framing="length"))
    peer.ask().head()
    assert peer.until(b"0\r\n\r\n") == b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n"
    assert post(server, "/x").content == b"abc"


def test_cut_at_every_byte(server):
    reply = Reply.json("abc")
    server.script("/x", reply)
    with Peer(server) as peer:
        whole = peer.ask().until(b'"abc"')
    for at in range(len(whole) + 1):
        server.script("/x", replace(reply, cut_at=at))
        with Peer(server) as peer:
            got = peer.ask().rest()
        assert len(got) == at
        assert got.split(b"Date")[0] == whole[:at].split(b"Date")[0]
        assert server.connections[-1].bytes_sent == at
    server.script("/x", replace(reply, cut_at=len(whole) + 1))
    with Peer(server) as peer:
        peer.ask().until(b'"abc"')
        peer.ask("/", method="GET").head()


def test_cut_at_counts_the_framing(server, peer):
    server.script("/x", Reply([b"a"], raw=b"", cut_at=1), Reply([b"abc"], before_head=[Raw(b"zz")], cut_at=3))
    assert peer.ask().rest() == b"a"
    with Peer(server) as other:
        assert other.ask().rest() == b"zzH"


def test_read_body_false_answers_at_once_and_stops_reading(server, peer):
    gate = Gate()
    server.script("/x", Reply([b"early", gate], read_body=False))
    peer.sock.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\nsome")
    assert "Connection: close" in peer.head()
    peer.until(b"early\r\n")
    peer.sock.setblocking(False)
    with pytest.raises(BlockingIOError):  # the kernel's buffers fill up, then nothing moves
        while True:
            peer.sock.send(b"x" * 65536)
    assert gate.wait_reached()
    [request] = server.requests
    assert (request.body, request.complete) == (b"some", False)
    assert request.connection.bytes_received < 1000
    peer.sock.settimeout(LIMIT)
    gate.open()
    assert peer.rest() == b"0\r\n\r\n"
    peer.sock.close()
    assert request.connection.wait_left()


def test_a_failing_script_is_told_by_stop():
    server = FakeOllama().start()
    server.script("/x", Reply([Endless(lambda n: b"%d" % (1 // (1 - n)))]))
    with Peer(server) as peer, pytest.raises(ConnectionResetError):
        peer.ask().rest()
    with pytest.raises(RuntimeError, match="failed") as caught:
        server.stop()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    server.stop()


def test_a_defect_of_the_server_itself_is_told_by_stop(monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ollama_async.testing._connection.Connection.on_body", broken)
    server = FakeOllama().start()
    with Peer(server) as peer, contextlib.suppress(ConnectionResetError):
        assert peer.ask().rest() == b""
    with pytest.raises(RuntimeError, match="failed"):
        server.stop()


def test_a_script_that_blocks_the_server_is_told_by_stop(monkeypatch):
    monkeypatch.setattr("ollama_async.testing._fake._STOP_TIMEOUT", 0.05)
    begun, end = threading.Event(), threading.Event()

    def block(_: int) -> bytes:
        begun.set()
        end.wait(LIMIT)
        return b""

    threads = threading.active_count()
    server = FakeOllama().start()
    server.script("/x", Reply([Endless(block)]))
    with Peer(server) as peer:
        peer.ask()
        assert begun.wait(LIMIT)
        with pytest.raises(RuntimeError, match="still busy"):
            server.stop()
        end.set()
        eventually(lambda: threading.active_count() == threads)


def test_a_start_that_fails_leaves_no_socket(monkeypatch):
    def fail() -> None:
        raise OSError("no more descriptors")

    monkeypatch.setattr(asyncio, "SelectorEventLoop", fail)
    server = FakeOllama()
    with pytest.raises(OSError, match="descriptors"):
        server.start()
    monkeypatch.undo()
    with server:
        assert post(server, "/", method="GET").status_code == 200


# The client leaves.


def leave_by_close(peer: Peer) -> None:
    peer.sock.close()


def leave_by_shutdown(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_RDWR)


def leave_by_half_close(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_WR)


LEAVES = [(leave_by_close, "fin"), (leave_by_shutdown, "fin"), (leave_by_half_close, "fin"), (Peer.reset, "reset")]


@pytest.mark.parametrize(("leave", "how"), LEAVES)
@pytest.mark.parametrize("moment", ["connected", "in the request", "stalled", "between requests"])
def test_a_leave_is_seen_at_once(server, peer, leave, how, moment):
    server.script("/x", Reply([b"a", Stall()]))
    [connection] = server.wait_for_connections()
    if moment == "in the request":
        peer.sock.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        server.wait_for_requests()
    elif moment == "stalled":
        peer.ask().until(b"a\r\n")
    elif moment == "between requests":
        peer.ask("/none").until(b"not found")
    assert not connection.wait_left(0.01)
    begin = time.monotonic()
    leave(peer)
    assert connection.wait_left()
    assert begin < connection.left_at < begin + 0.5
    assert (connection.left_how, connection.bytes_after_left, connection.open) == (how, 0, False)
    eventually(lambda: connection.closed_at is not None)


@pytest.mark.parametrize(("leave", "how"), [(leave_by_shutdown, "fin"), (Peer.reset, "reset")])
def test_a_leave_interrupts_an_endless_script(server, peer, leave, how):
    server.script("/x", Reply.endless_chat(0), Reply.json(1))
    peer.ask().until(b"done")
    leave(peer)
    [connection] = server.connections
    assert connection.wait_left()
    assert (connection.left_how, connection.bytes_after_left) == (how, 0)
    sent = connection.bytes_sent
    assert post(server, "/x").json() == 1
    assert connection.bytes_sent == sent


def test_a_client_that_closes_with_unread_input_resets(server, peer):
    server.script("/x", Reply([b"a" * 1000, Stall()]))
    peer.ask()
    [connection] = server.wait_for_connections()
    eventually(lambda: connection.bytes_sent > 1000)
    peer.sock.close()
    assert connection.wait_left()
    assert connection.left_how == "reset"


def test_a_leave_interrupts_a_script_that_waits(server, peer):
    here, beyond = Gate(), Gate()
    server.script("/x", Reply([here, beyond]))
    peer.ask().head()
    assert here.wait_reached()
    peer.sock.close()
    [connection] = server.connections
    assert connection.wait_left()
    assert post(server, "/", method="GET").status_code == 200  # the server's loop has gone round since
    here.open()
    assert post(server, "/", method="GET").status_code == 200
    assert not beyond.reached


@pytest.mark.parametrize("fin_first", [True, False])
def test_a_leave_that_only_a_write_finds_out(server, peer, fin_first):
    begun, end = threading.Event(), threading.Event()

    def block(_: int) -> bytes:
        begun.set()
        end.wait(LIMIT)
        return b"a"

    server.script("/x", Reply([Endless(block)]))
    peer.ask().head()
    assert begun.wait(LIMIT)
    if fin_first:
        peer.sock.shutdown(socket.SHUT_WR)
    peer.reset()
    end.set()
    [connection] = server.connections
    assert connection.wait_left()
    assert (connection.left_how, connection.bytes_after_left) == ("fin" if fin_first else "reset", 0)


def test_ignore_leave_counts_what_is_written_after_it(server, peer):
    gate = Gate()
    server.script("/y", Reply([gate, b"abc"], ignore_leave=True))
    peer.ask("/y")
    assert gate.wait_reached()
    peer.sock.shutdown(socket.SHUT_WR)
    [connection] = server.connections
    assert connection.wait_left()
    assert connection.closed_at is None
    peer.head()
    gate.open()
    assert peer.rest() == b"3\r\nabc\r\n0\r\n\r\n"
    assert connection.bytes_after_left == 13
    eventually(lambda: connection.closed_at is not None)


def test_ignore_leave_ends_when_the_client_is_really_gone(server, peer):
    server.script("/x", replace(Reply.endless_chat(0.001), ignore_leave=True))
    peer.ask().until(b"done")
    peer.sock.shutdown(socket.SHUT_WR)
    [connection] = server.connections
    eventually(lambda: connection.bytes_after_left > 1000)
    peer.sock.close()
    eventually(lambda: connection.closed_at is not None)
    assert connection.left_how == "fin"


# Back-pressure and fairness.


def test_endless_without_interval_stops_when_nobody_reads(server, peer):
    server.script("/x", Reply([Endless(lambda _: b"x" * 10_000)]))
    peer.ask().head()
    [connection] = server.connections
    seen = [0]

    def stopped() -> bool:
        time.sleep(0.05)  # only the window of the measurement
        seen.append(connection.bytes_sent)
        return seen[-1] == seen[-2]

    eventually(stopped)
    assert post(server, "/", method="GET").status_code == 200  # others are served
    peer.sock.settimeout(LIMIT)
    for _ in range(200):
        peer.sock.recv(65536)
    eventually(lambda: connection.bytes_sent > seen[-1])  # and it goes on when the client reads
    peer.sock.close()
    assert connection.wait_left()


@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_endless_nothing_does_not_starve_the_server(server, peer, method):
    server.script("/x", Reply([Endless(lambda _: b"a" if method == "HEAD" else b"")]))
    peer.ask(method=method).head()
    assert post(server, "/", method="GET").status_code == 200
    peer.sock.close()
    assert server.connections[0].wait_left()


def test_endless_does_not_starve_other_connections(server):
    server.script("/x", Reply.endless_generate(0), always=True)
    stop = threading.Event()

    def drain(peer: Peer) -> None:
        while not stop.is_set():
            peer.sock.recv(1 << 20)

    peers = [Peer(server).ask() for _ in range(3)]
    threads = [threading.Thread(target=drain, args=[peer]) for peer in peers]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert post(server, "/", method="GET").status_code == 200
    finally:
        stop.set()
        for thread, peer in zip(threads, peers, strict=True):
            thread.join()
            peer.sock.close()


def test_the_server_answers_and_observes_while_the_clients_loop_is_blocked(server):
    async def main() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"a\r\n")
        writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        assert server.connections[0].wait_left(1.0)  # blocks this loop
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server.script("/x", Reply([b"a", Stall()]))
    asyncio.run(asyncio.wait_for(main(), LIMIT))


# Other sockets.


def test_unix_socket(tmp_path):
    path = str(tmp_path / "ollama.sock")
    server = FakeOllama(uds=path)
    with server:
        assert (server.url, server.port, server.uds) == ("http://localhost", 0, path)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url=server.url, timeout=LIMIT) as client:
            assert client.get("/api/version").status_code == 200
        server.script("/x", Reply([b"a", Stall()]), Reply([b"b", Cut()]), Reply([b"c", Reset()]))
        with Peer(server) as peer:
            peer.ask().until(b"a\r\n")
        assert server.connections[1].wait_left()
        assert server.connections[1].left_how == "fin"
        for last in (b"b\r\n", b"c\r\n"):
            with Peer(server) as peer:
                assert peer.ask().rest().endswith(last)
        with pytest.raises(OSError, match="in use"):
            FakeOllama(uds=path).start()
    assert not os.path.exists(path)


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def secure(tls, caplog) -> Iterator[FakeOllama]:
    with FakeOllama(ssl=tls[0], interval=0) as server:
        yield server
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def secured(server: FakeOllama, context: ssl.SSLContext) -> Peer:
    peer = Peer(server)
    peer.sock = context.wrap_socket(peer.sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
    return peer


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls(secure, tls, version):
    assert secure.url == f"https://127.0.0.1:{secure.port}"
    tls[1].maximum_version = version
    with httpx.Client(base_url=secure.url, verify=tls[1], timeout=LIMIT, trust_env=False) as client:
        for _ in range(2):
            assert client.get("/api/version").json() == {"version": "0.0.0-fake"}
        answer = client.post("/api/chat", json={"model": "fake", "messages": [{}], "options": {"num_predict": 5000}})
        assert len(lines(answer.content)) == 5001
        client.post("/none", content=b"x" * 1_000_000)
        assert len(secure.requests[-1].body) == 1_000_000
    [connection] = secure.connections
    assert connection.wait_left()
    assert connection.left_how == "fin"


@pytest.mark.parametrize("how", ["fin without close_notify", "close_notify", "reset"])
def test_leaves_under_tls(secure, tls, how):
    secure.script("/x", Reply([b"a", Stall()]))
    with secured(secure, tls[1]) as peer:
        peer.ask().until(b"a\r\n")
        if how == "close_notify":
            # A blocking unwrap() would wait for the server's answer: it has to come.
            assert isinstance(peer.sock, ssl.SSLSocket)
            peer.sock.unwrap().close()
        elif how == "reset":
            peer.reset()
        else:
            peer.sock.shutdown(socket.SHUT_RDWR)
        [connection] = secure.connections
        assert connection.wait_left()
    assert connection.left_how == ("reset" if how == "reset" else "fin")
    assert connection.bytes_after_left == 0
    eventually(lambda: connection.closed_at is not None)


def test_an_asyncio_client_closes_cleanly_under_tls(secure, tls):
    async def main() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", secure.port, ssl=tls[1])
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"a\r\n")
        writer.close()
        await writer.wait_closed()

    secure.script("/x", Reply([b"a", Stall()]))
    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert secure.connections[0].wait_left()


def test_cuts_under_tls(secure, tls):
    secure.script("/x", Reply([b"a", Cut()]), Reply([b"b"], framing="close"), Reply([b"abc"], raw=b"", cut_at=2))
    with secured(secure, tls[1]) as peer, pytest.raises(ssl.SSLEOFError):
        peer.ask().rest()
    assert peer.got.endswith(b"a\r\n")
    with secured(secure, tls[1]) as peer:
        assert peer.ask().rest().endswith(b"\r\n\r\nb")
    with secured(secure, tls[1]) as peer, pytest.raises(ssl.SSLEOFError):
        peer.ask().rest()
    assert peer.got == b"ab"
    assert secure.connections[-1].bytes_sent == 2


def test_ignore_leave_under_tls(secure, tls):
    secure.script("/x", replace(Reply.endless_chat(0.001), ignore_leave=True))
    with secured(secure, tls[1]) as peer:
        peer.ask().until(b"done")
        peer.sock.shutdown(socket.SHUT_WR)
        [connection] = secure.connections
        eventually(lambda: connection.bytes_after_left > 1000)
    eventually(lambda: connection.closed_at is not None)


def test_a_handshake_that_is_invalid_or_refused_or_left(secure, tls):
    with Peer(secure) as peer:
        peer.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        peer.rest()
    untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLCertVerificationError):
        secured(secure, untrusting)
    with Peer(secure) as peer:
        secure.wait_for_connections(3)
    assert all(connection.wait_left() for connection in secure.connections)
    assert secure.requests == ()


def test_silent(tls):
    with FakeOllama(silent=True, ssl=tls[0]) as server:
        with Peer(server) as peer:
            peer.sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                tls[1].wrap_socket(peer.sock, server_hostname="127.0.0.1")
        [connection] = server.wait_for_connections()
        assert connection.wait_left()
        assert connection.bytes_received > 100
        assert connection.bytes_sent == 0
        assert server.requests == ()


# The built-in behaviour.

MESSAGES = [{"role": "user", "content": "hi"}]


def test_root_version_and_routes(server):
    assert post(server, "/", method="GET").text == "Ollama is running"
    assert post(server, "/", method="HEAD").headers["content-length"] == "17"
    assert post(server, "/api/version", method="GET").json() == {"version": "0.0.0-fake"}
    assert (post(server, "/nope").status_code, post(server, "/nope").text) == (404, "404 page not found")
    assert (post(server, "/api/chat", method="GET").status_code, post(server, "/api/tags").status_code) == (405, 405)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"x", 400, "invalid character 'x' looking for beginning of value"),
        ("/api/chat", b"{", 400, "unexpected EOF"),
        ("/api/chat", b"\xff", 400, "invalid character in string literal"),
        ("/api/chat", [], 400, "json: cannot unmarshal list into Go value"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/chat", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/generate", {"model": "x"}, 404, "model 'x' not found"),
        (
            "/api/generate",
            {"model": "fake", "prompt": "a", "options": []},
            400,
            "json: cannot unmarshal options into Go value",
        ),
        (
            "/api/generate",
            {"model": "fake", "prompt": "a", "options": {"num_predict": "1"}},
            500,
            'option "num_predict" must be of type integer',
        ),
        ("/api/embed", {"model": "fake", "input": 1}, 400, "invalid input type"),
        (
            "/api/embed",
            {"model": "fake", "dimensions": "1"},
            400,
            "json: cannot unmarshal dimensions into Go value of type int",
        ),
        ("/api/create", {"model": "y", "from": "x"}, 404, "model 'x' not found"),
        ("/api/copy", {"source": "x", "destination": "y"}, 404, "model 'x' not found"),
        ("/api/show", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/blobs/sha256:1", b"", 400, "invalid digest format"),
    ],
)
def test_errors_of_the_built_in_behaviour(server, path, body, status, message):
    response = post(server, path, body)
    assert (response.status_code, response.json()) == (status, {"error": message})
    assert response.headers["content-type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/api/chat", {"messages": MESSAGES}, lambda frame: frame["message"]["content"]),
        ("/api/generate", {"prompt": "hi"}, lambda frame: frame["response"]),
    ],
)
def test_generation(server, path, body, text):
    body = {"model": "fake", **body}
    response = post(server, path, body)
    frames = lines(response.content)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["transfer-encoding"] == "chunked"
    assert [frame["done"] for frame in frames] == [False] * 40 + [True]
    answer = "".join(map(text, frames))
    assert answer.startswith("This answer comes from a fake Ollama server. ")
    last = frames[-1]
    assert (last["done_reason"], last["eval_count"], text(last)) == ("stop", 40, "")
    assert last["total_duration"] > last["eval_duration"] > 0
    whole = post(server, path, body | {"stream": False})
    assert whole.headers["content-type"] == "application/json; charset=utf-8"
    assert text(whole.json()) == answer
    few = lines(post(server, path, body | {"options": {"num_predict": 3}}).content)
    assert (len(few), few[-1]["done_reason"], few[0]["model"]) == (4, "length", "fake")
    assert post(server, path, body).content == response.content
    assert len(lines(post(server, path, body | {"options": None}).content)) == 41


def test_generation_keeps_its_interval_and_sends_the_head_with_the_first_token():
    with FakeOllama(interval=0.03) as server, Peer(server) as peer:
        begin = time.monotonic()
        peer.ask("/api/chat", b'{"model":"fake","messages":[{}],"options":{"num_predict":3}}').head()
        first = time.monotonic()
        peer.until(b"0\r\n\r\n")
        assert first - begin > 0.02
        assert time.monotonic() - first > 0.04


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_endless_generation(server, path):
    body = {"model": "fake", "prompt": "hi", "messages": MESSAGES, "options": {"num_predict": -1}}
    with Peer(server) as peer, Peer(server) as other:
        peer.ask(path, json.dumps(body).encode())
        for _ in range(200):
            peer.until(b'"done":false')
        other.ask(path, json.dumps(body | {"stream": False}).encode())
        server.wait_for_requests(2)
        other.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            other.sock.recv(1)
    assert all(connection.wait_left() for connection in server.connections)


def test_load_unload_and_ps(server):
    def running() -> list[str]:
        return [model["name"] for model in post(server, "/api/ps", method="GET").json()["models"]]

    assert running() == []
    loaded = post(server, "/api/generate", {"model": "fake"}).json()
    assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")
    assert running() == ["fake:latest"]
    unloaded = post(server, "/api/chat", {"model": "fake", "messages": [], "keep_alive": 0}).json()
    assert unloaded["done_reason"] == "unload"
    assert running() == []
    post(server, "/api/chat", {"model": "fake", "messages": MESSAGES, "keep_alive": [1]})
    assert running() == ["fake:latest"]


def test_embed(server):
    def embed(**body: object) -> list[list[float]]:
        return post(server, "/api/embed", {"model": "fake", **body}).json()["embeddings"]

    [one] = embed(input="a")
    assert math.isclose(math.hypot(*one), 1)
    assert embed(input=["a", "b"])[0] == one != embed(input="b")[0]
    assert [len(vector) for vector in embed(input="a", dimensions=4)] == [4]
    assert embed(input="") == embed() == []


def test_models_can_be_made_copied_shown_and_deleted(server):
    def names() -> list[str]:
        return [model["name"] for model in post(server, "/api/tags", method="GET").json()["models"]]

    frames = lines(post(server, "/api/create", {"model": "mine:1", "from": "fake"}).content)
    assert [frame["status"] for frame in frames][-2:] == ["writing manifest", "success"]
    assert post(server, "/api/create", {"model": "ns/other", "stream": False}).json() == {"status": "success"}
    assert names() == ["fake:latest", "mine:1", "ns/other:latest"]
    copied = post(server, "/api/copy", {"source": "mine:1", "destination": "yours"})
    assert (copied.status_code, copied.content) == (200, b"")
    assert post(server, "/api/show", {"model": "yours"}).json()["details"]["format"] == "gguf"
    assert post(server, "/api/delete", {"model": "yours"}, method="DELETE").status_code == 200
    assert post(server, "/api/delete", {"model": "yours"}, method="DELETE").status_code == 404
    assert names() == ["fake:latest", "mine:1", "ns/other:latest"]


def test_blobs(server):
    digest = hashlib.sha256(b"data").hexdigest()
    path = f"/api/blobs/sha256:{digest}"
    assert post(server, path, method="HEAD").status_code == 404
    wrong = post(server, path, b"other")
    assert wrong.status_code == 400
    assert wrong.json()["error"].startswith(f'digest mismatch, expected "sha256:{digest}", got "sha256:')
    assert post(server, path, b"data").status_code == 201
    assert post(server, path.replace(":", "%3A"), b"data").status_code == 200
    assert post(server, path.replace(":", "-"), method="HEAD").status_code == 200


def test_ready_made_replies(server):
    call = {"function": {"name": "f", "arguments": {}}}
    server.script("/x", Reply.chat("a", "b", thinking=["t"], tool_calls=[call], model="m", interval=0.001))
    frames = lines(post(server, "/x").content)
    assert [frame["message"] for frame in frames] == [
        {"role": "assistant", "content": "", "thinking": "t"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": ""},
    ]
    assert {frame["model"] for frame in frames} == {"m"}
    assert (frames[-1]["done"], frames[-1]["eval_count"]) == (True, 4)
    server.script("/x", Reply.generate("a", "b", thinking=["t"]), Reply.generate("a", done=False), Reply.chat())
    frames = lines(post(server, "/x").content)
    assert [frame["response"] for frame in frames] == ["", "a", "b", ""]
    assert (frames[0]["thinking"], frames[-1]["context"]) == ("t", [1, 2, 3])
    assert [frame["done"] for frame in lines(post(server, "/x").content)] == [False]
    [only] = lines(post(server, "/x").content)
    assert "eval_count" not in only


# The plugin.


CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
FINAL = {"done": True, "done_reason": "stop", "eval_count": 4, "prompt_eval_count": 11}


@pytest.mark.parametrize("stream", [False, True, None])
def test_a_ready_made_chat_is_one_object_where_no_stream_is_asked_for(server, stream):
    server.script("/api/chat", Reply.chat("Hel", "lo", thinking=["Hm", "."], tool_calls=[CALL]))
    got = post(server, "/api/chat", {"model": "fake"} if stream is None else {"model": "fake", "stream": stream})
    if stream is not False:
        assert got.headers["Content-Type"] == "application/x-ndjson"
        assert len(lines(got.content)) == 6
        return
    assert got.headers["Content-Type"] == "application/json; charset=utf-8"
    assert int(got.headers["Content-Length"]) == len(got.content)
    assert b"\n" not in got.content
    answer = got.json()
    assert answer["message"] == {"role": "assistant", "content": "Hello", "thinking": "Hm.", "tool_calls": [CALL]}
    assert answer.items() >= (FINAL | {"eval_count": 5}).items()


def test_a_ready_made_completion_is_one_object_where_no_stream_is_asked_for(server):
    server.script("/api/generate", Reply.generate("a", "b", thinking=["x", "y"]), Reply.generate("half", done=False))
    whole = post(server, "/api/generate", {"model": "fake", "stream": False}).json()
    assert (whole["response"], whole["thinking"], whole["context"]) == ("ab", "xy", [1, 2, 3])
    assert whole.items() >= FINAL.items()
    half = post(server, "/api/generate", {"model": "fake", "stream": False}).json()
    assert (half["response"], half["done"]) == ("half", False)


def test_what_is_scripted_around_a_ready_made_reply_holds_without_a_stream_as_well(server, peer):
    gate = Gate()
    slow = replace(Reply.chat("Hi"), before_head=[gate], headers={"X-Own": "1", "content-type": "text/odd"}, status=203)
    server.script("/api/chat", slow, replace(Reply.chat("Hi"), cut_at=10), Reply.endless_chat(), Reply.chat("a", "b"))
    peer.ask("/api/chat", b'{"stream":false}')
    gate.wait_reached()
    gate.open()
    head = peer.head()
    assert head.startswith("HTTP/1.1 203")
    assert "X-Own: 1" in head
    assert head.lower().count("content-type") == 1
    peer.until(b'"prompt_eval_duration":12000000,"eval_count":1,"eval_duration":20000000}')
    assert peer.ask("/api/chat", b'{"stream":false}').rest() == b"HTTP/1.1 2"
    with Peer(server) as other:
        other.ask("/api/chat", b'{"stream":false}')
        server.wait_for_requests(3)
        other.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.sock.recv(1)
    # A request without a body, or with one that is not JSON, is no wish for one object.
    assert len(lines(post(server, "/api/chat", b"", method="GET").content)) == 3


def test_the_pauses_of_a_ready_made_reply_are_kept_without_a_stream(server):
    server.script("/api/chat", Reply.chat("a", "b", "c", interval=0.1))
    started = time.monotonic()
    assert post(server, "/api/chat", {"stream": False}).json()["message"]["content"] == "abc"
    assert time.monotonic() - started >= 0.29


def test_steps_that_were_put_together_by_hand_are_played_as_they_are(server):
    server.script("/api/chat", Reply([*Reply.chat("a", "b").steps]))
    assert len(lines(post(server, "/api/chat", {"stream": False}).content)) == 3


def events(body: bytes) -> list:
    *blocks, last = body.decode().split("\n\n")
    assert last == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(data) if (data := block.removeprefix("data: ")) != "[DONE]" else data for block in blocks]


def test_a_ready_made_stream_of_the_openai_api(server):
    call = {"id": "call_1", "index": 0, "type": "function", "function": {"name": "add", "arguments": "{}"}}
    reply = Reply.openai_chat("Hel", "lo", thinking=["Hm."], tool_calls=[call], model="m", usage=True)
    server.script("/v1/chat/completions", reply, reply, Reply.openai_chat("x", done=False))
    got = post(server, "/v1/chat/completions", {"model": "m", "stream": True})
    assert got.headers["Content-Type"] == "text/event-stream"
    *chunks, usage, done = events(got.content)
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    assert {(chunk["object"], chunk["model"], chunk["choices"][0]["index"]) for chunk in chunks} == {
        ("chat.completion.chunk", "m", 0)
    }
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert all(delta["role"] == "assistant" for delta in deltas)
    assert [delta["content"] for delta in deltas] == ["", "Hel", "lo", "", ""]
    assert (deltas[0]["reasoning"], deltas[3]["tool_calls"]) == ("Hm.", [call])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["tool_calls"]
    # That API streams only if it is asked to.
    whole = post(server, "/v1/chat/completions", {"model": "m"})
    assert whole.headers["Content-Type"] == "application/json; charset=utf-8"
    [choice] = whole.json()["choices"]
    assert whole.json()["object"] == "chat.completion"
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Hello")
    assert (choice["message"]["reasoning"], choice["message"]["tool_calls"]) == ("Hm.", [call])
    assert whole.json()["usage"] == {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    [unfinished] = events(post(server, "/v1/chat/completions", {"stream": True}).content)
    assert unfinished["choices"][0]["finish_reason"] is None


def test_embeddings_of_the_older_api(server):
    new = post(server, "/api/embed", {"model": "fake", "input": "hello"}).json()["embeddings"][0]
    assert post(server, "/api/embeddings", {"model": "fake", "prompt": "hello"}).json() == {"embedding": new}
    assert post(server, "/api/embeddings", {"model": "fake"}).json() == {"embedding": []}
    assert post(server, "/api/embeddings", {"model": "other", "prompt": "x"}).status_code == 404
    assert post(server, "/api/embeddings", {"model": "fake", "prompt": 5}).status_code == 400


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/api/chats", "/api/chat"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("api/chat", "/api/chat"),
        ("/chat", "/api/chat"),
        ("/api/chat/", "/api/chat"),
        ("/api/chat?x=1", "/api/chat"),
        ("/api/embeddins", "/api/embeddings"),
    ],
)
def test_a_path_that_ollama_does_not_have_is_refused(server, path, meant):
    with pytest.raises(ValueError, match=f"no path '{path.replace('?', '.')}'; did you mean '{meant}") as caught:
        server.script(path, Reply.chat("never"))
    assert f"FakeOllama(paths=['{path}'])" in str(caught.value)


def test_each_path_that_the_client_asks_for_may_be_scripted(server):
    sources = "".join(path.read_text() for path in (ROOT / "ollama_async").glob("_*.py"))
    paths = set(re.findall(r"\"(/(?:api|v1)/[a-z_/-]+[a-z])\"", sources))
    assert len(paths) > 15
    for path in paths:
        server.script(path, Reply.json({}))


def test_paths_that_may_be_scripted():
    with FakeOllama(paths=["/api/of-tomorrow"]) as server:
        digest = "sha256:" + "0" * 64
        paths = ["/", "/api/pull", "/v1/models/m", f"/api/blobs/{digest}", "/elsewhere", "/moved/chat"]
        for path in [*paths, "/api/of-tomorrow"]:
            server.script(path, Reply.json(path))
            assert post(server, path).json() == path


@pytest.mark.parametrize("wrong", [{"message": {}}, "text", [Reply.chat("x")], None])
def test_a_script_that_is_not_of_replies_is_refused(server, wrong):
    with pytest.raises(TypeError, match="a script takes replies, such as"):
        server.script("/api/chat", Reply.chat("x"), wrong)
    asked = {"model": "fake", "messages": [{}]}
    assert len(lines(post(server, "/api/chat", asked).content)) == 41, "none of it may be queued"


def test_the_fixture(fake_ollama):
    assert post(fake_ollama, "/api/tags", method="GET").json()["models"][0]["name"] == "fake:latest"


def test_the_fixture_in_another_project(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(
        """
        servers = []

        def test_one(fake_ollama):
            servers.append(fake_ollama)
            assert fake_ollama.port

        def test_other(fake_ollama):
            assert fake_ollama is not servers[0]
            assert not any(record.open for record in servers[0].connections)
        """
    )
    arguments = ["-p", "no:ollama_async", "-p", "no:asyncio", "-p", "ollama_async.testing.pytest_plugin", "-W", "error"]
    pytester.runpytest_subprocess(*arguments, timeout=60).assert_outcomes(passed=2)
