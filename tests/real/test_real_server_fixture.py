"""The fixture itself: what it reports about the server is what happened."""

import json
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from real.ollama_server import NotSeen, RealOllama, find_server
from real.tiny_model import write_tiny_model

pytestmark = pytest.mark.real

ENDLESS = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": -1}}


def open_stream(server: RealOllama) -> socket.socket:
    """Ask for an endless answer over a plain socket, and wait for its first bytes."""
    body = json.dumps(ENDLESS).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(head.encode() + body)
    assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
    return client


def test_closing_the_socket_ends_an_endless_answer(real_ollama: RealOllama) -> None:
    mark = real_ollama.mark()
    client = open_stream(real_ollama)
    assert real_ollama.client_connections() == 1
    assert real_ollama.request_ends(mark, "/api/chat") == []

    client.close()
    real_ollama.wait_for_connections(0)
    [end] = real_ollama.wait_for_request_end(mark)
    assert (end.status, end.method) == (200, "POST")
    real_ollama.wait_for_log(mark, "context for request finished")
    real_ollama.wait_until_idle()


def test_a_runner_that_makes_tokens_is_not_idle(real_ollama: RealOllama) -> None:
    with closing(open_stream(real_ollama)) as client:
        reader = threading.Thread(target=read_to_the_end, args=(client,))
        reader.start()
        with pytest.raises(NotSeen, match="idle runner"):
            real_ollama.wait_until_idle(timeout=1)
        client.shutdown(socket.SHUT_RDWR)
        reader.join(10)
    real_ollama.wait_until_idle()


def read_to_the_end(client: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while client.recv(65536):
            pass


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_an_answer_has_exactly_the_tokens_asked_for(real_ollama: RealOllama, tokens: int) -> None:
    answer = real_ollama.generate(tokens)
    assert answer["eval_count"] == tokens
    assert answer["done_reason"] == "length"
    assert len(answer["response"].split()) == tokens


def test_embedding(real_ollama: RealOllama) -> None:
    answer = real_ollama.post("/api/embed", {"model": real_ollama.model, "input": ["hi", "the sky"]})
    assert [len(vector) for vector in answer["embeddings"]] == [64, 64]


def test_slots_that_the_server_lost_are_given_back(real_ollama: RealOllama) -> None:
    before = real_ollama.runner_pids()
    real_ollama.unload()
    assert real_ollama.runner_pids() == []
    real_ollama.make_ready()
    assert len(real_ollama.runner_pids()) == 1
    assert real_ollama.runner_pids() != before


def test_a_stopped_server_leaves_nothing(tmp_path: Path, real_ollama: RealOllama) -> None:
    binary = find_server()
    assert binary is not None
    server = RealOllama(binary, tmp_path)
    with server:
        [runner] = server.runner_pids()
        assert server.runner_cpu_seconds() > 0
        assert runner not in real_ollama.runner_pids()
    assert not Path(f"/proc/{runner}").exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_the_model_is_the_same_each_time(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for file in files:
        write_tiny_model(file)
    assert files[0].read_bytes() == files[1].read_bytes()
