"""``Chat``: what stays in a conversation after each way of stopping, what is sent, and what a file can hold."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest

from ollama_async import (
    AbortError,
    AsyncClient,
    CancelToken,
    Chat,
    ConnectionBroken,
    ConversationError,
    PhaseTimeout,
    Pool,
    RequestError,
    ServerError,
    StreamTruncated,
    Timeouts,
)
from ollama_async.conversation import Turn
from ollama_async.testing import Cut, FakeOllama, Reply, RequestRecord, Stall, nothing_left_behind

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CALL = {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
RESULT = {"role": "tool", "tool_name": "weather", "content": "11 degrees"}


def said(request: RequestRecord) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request.json()["messages"]]


def texts(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages]


def counted(text: str, prompt: int, answer: int) -> Reply:
    """Make a whole answer with the server's counts."""
    message = {"role": "assistant", "content": text}
    counts = {"prompt_eval_count": prompt, "eval_count": answer, "done_reason": "stop"}
    return Reply([{"model": "fake", "message": message, "done": True, **counts}])


# -- talking --


async def test_each_message_is_sent_with_those_before_it(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("One."), Reply.chat("T", "wo."), Reply.chat("Three."))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", system="Be brief.", options={"seed": 1})
        assert (await chat.send("a")).text == "One."
        assert [chunk.text async for chunk in chat.send("b", stream=True)] == ["T", "wo.", ""]
        async with chat.send({"role": "user", "content": "c"}, stream=True) as stream:
            assert (await stream.collect()).text == "Three."
    last = fake_ollama.requests[-1]
    assert said(last) == [
        ("system", "Be brief."),
        *[("user", "a"), ("assistant", "One."), ("user", "b"), ("assistant", "Two."), ("user", "c")],
    ]
    assert last.json()["options"] == {"seed": 1}
    assert [turn.outcome for turn in chat.turns] == ["done", "done", "done"]
    assert chat.messages[-1] == {"role": "assistant", "content": "Three."}


async def test_nothing_is_sent_before_the_answer_is_asked_for(fake_ollama: FakeOllama) -> None:
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        chat.send("a", stream=True)
        chat.send("b").close()
        await chat.send("c")
    [request] = fake_ollama.requests
    assert said(request) == [("user", "c")]


async def test_the_results_of_tools_belong_to_the_turn_of_the_call(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat(tool_calls=[CALL]), Reply.chat("Cold."))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        answer = await chat.send("How is it in Lima?")
        assert answer.message.tool_calls
        await chat.send([RESULT])
    [turn] = chat.turns
    assert [message["role"] for message in turn.messages] == ["user", "assistant", "tool", "assistant"]
    assert fake_ollama.requests[1].json()["messages"][1]["tool_calls"][0]["function"] == CALL["function"]
    assert fake_ollama.requests[1].json()["messages"][2] == RESULT


async def test_a_pool_keeps_the_conversation_at_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[object] = []
    chat_of_pool: Any = Pool.chat

    def noted(*args: Any, **options: Any) -> Any:
        names.append(options["sticky"])
        return chat_of_pool(*args, **options)

    monkeypatch.setattr(Pool, "chat", noted)
    with FakeOllama(interval=0) as first, FakeOllama(interval=0) as second:
        async with Pool([first.url, second.url], timeout=10) as pool:
            chats = [Chat(pool, "fake") for _ in range(2)]
            for _ in range(3):
                await asyncio.gather(*(chat.send("hi") for chat in chats))
        for server in (first, second):
            asked = [request for request in server.requests if request.route == "/api/chat"]
            assert [len(request.json()["messages"]) for request in asked] == [1, 3, 5]
    assert names[:2] == names[2:4] == names[4:]
    assert names[0] != names[1]


async def test_a_stopped_answer_gives_its_slot_back() -> None:
    with FakeOllama(interval=0.001) as server:
        server.script("/api/chat", Reply.endless_chat(0.001), Reply.endless_chat(0.001))
        async with nothing_left_behind(), Pool(server.url, slots=1, timeout=10) as pool:
            chat = Chat(pool, "fake")
            async for _ in chat.send("a", stream=True):
                break
            await anext(chat.send("b", stream=True))
            await chat.send("c")
        first, second, _ = server.requests
        assert first.connection.wait_left()
        assert second.connection.wait_left()
    assert [turn.outcome for turn in chat.turns] == ["closed", "aborted", "done"]


# -- stopping --


async def _abort(chat: Chat, stream: Any) -> None:
    assert chat.abort("enough")
    with pytest.raises(AbortError):
        await anext(stream)


async def _abort_by_token(chat: Chat, stream: Any) -> None:
    stream.token.abort("enough")
    with pytest.raises(AbortError):
        await anext(stream)


async def _close(chat: Chat, stream: Any) -> None:
    await stream.aclose()


async def _cancel(chat: Chat, stream: Any) -> None:
    task = asyncio.ensure_future(stream.collect())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _send_another(chat: Chat, stream: Any) -> None:
    answer = await chat.send("another")
    assert answer.text == "Fine."
    with pytest.raises(AbortError, match="another message was sent in this chat"):
        await anext(stream)
    chat.undo()


STOPS = [_abort, _abort_by_token, _close, _cancel, _send_another]
OUTCOMES = ["aborted", "aborted", "closed", "cancelled", "aborted"]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize(("stop", "outcome"), [*zip(STOPS, OUTCOMES, strict=True)])
async def test_a_stopped_answer_is_kept_or_dropped(
    fake_ollama: FakeOllama, stop: Any, outcome: str, keep: bool
) -> None:
    half = Reply([*Reply.chat("Half", " an", done=False).steps, Stall()])
    fake_ollama.script("/api/chat", Reply.chat("Fine."), half, Reply.chat("Fine."), Reply.chat("Fine."))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", keep_stopped=keep)
        await chat.send("a")
        stream = chat.send("b", stream=True, token=CancelToken())
        await anext(stream)
        await anext(stream)
        await stop(chat, stream)
        connection = fake_ollama.requests[1].connection
        assert connection.wait_left()
        assert connection.bytes_after_left == 0
        kept = ["a", "Fine.", "b", "Half an"] if keep else ["a", "Fine."]
        assert texts(chat) == kept
        assert [turn.outcome for turn in chat.turns] == (["done", outcome] if keep else ["done"])
        await chat.send("c")
    assert [text for _, text in said(fake_ollama.requests[-1])] == [*kept, "c"]


async def test_leaving_the_loop_keeps_what_has_arrived(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([*Reply.chat("Half", " an", done=False).steps, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        async for _ in chat.send("a", stream=True):
            break
        assert fake_ollama.requests[0].connection.wait_left()
        [turn] = chat.turns
        assert turn.outcome == "closed"
        assert turn.messages[1]["content"].startswith("Half")


async def test_a_stream_that_is_dropped_half_read_ends_with_the_chat(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    gc.disable()
    try:
        async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
            chat = Chat(client, "fake")
            await anext(chat.send("a", stream=True))
            connection = fake_ollama.requests[0].connection
            assert connection.open
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # a stream that is dropped says so
                del chat
            assert connection.wait_left()
    finally:
        gc.enable()


async def test_a_stop_of_a_plain_send_keeps_the_partial_answer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        task = asyncio.create_task(chat.send("a"))
        await asyncio.to_thread(fake_ollama.wait_for_requests)
        while not chat.abort("enough"):
            await asyncio.sleep(0)
        with pytest.raises(AbortError, match="enough") as caught:
            await task
        assert fake_ollama.requests[0].connection.wait_left()
    partial = caught.value.partial
    assert texts(chat) == ([] if partial is None else ["a", partial.text])


@pytest.mark.parametrize(
    ("reply", "error", "outcome"),
    [
        (Reply([*Reply.chat("Half", done=False).steps, Stall()]), PhaseTimeout, "timeout"),
        (Reply([*Reply.chat("Half", done=False).steps, Cut()]), ConnectionBroken, "error"),
        (Reply.chat("Half", done=False), StreamTruncated, "truncated"),
    ],
)
async def test_an_answer_that_breaks_off_is_kept(
    fake_ollama: FakeOllama, reply: Reply, error: type[Exception], outcome: str
) -> None:
    fake_ollama.script("/api/chat", reply)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", timeout=Timeouts(idle=0.2))
        with pytest.raises(error):
            await chat.send("a")
        assert (texts(chat), chat.turns[0].outcome) == (["a", "Half"], outcome)


async def test_a_question_without_an_answer_is_not_kept(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.error(500, "no"), Reply.chat("", thinking=["hm"], done=False))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        with pytest.raises(ServerError):
            await chat.send("a")
        async for _ in chat.send("b", stream=True):
            pass
        with pytest.raises(RequestError, match="must be the path of an existing file"):
            await chat.send("c", images=["??"])
        with pytest.raises(RequestError, match="images= needs a text"):
            await chat.send({"role": "user", "content": "c"}, images=[PNG])
        assert chat.messages == []


async def test_a_partial_answer_has_no_tool_calls(fake_ollama: FakeOllama) -> None:
    """Nothing would answer them."""
    steps = Reply.chat("I look.", tool_calls=[CALL], done=False).steps
    fake_ollama.script("/api/chat", Reply([*steps, Stall()]))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        stream = chat.send("a", stream=True)
        await anext(stream)
        assert (await anext(stream)).message.tool_calls
        chat.abort()
        assert chat.messages[1] == {"role": "assistant", "content": "I look."}


async def test_until_ends_an_answer_and_its_outcome_is_until(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", keep_stopped=False)
        await chat.send("a", until=lambda answer: len(answer.text) > 10)
        assert fake_ollama.requests[0].connection.wait_left()
        assert chat.turns[0].outcome == "until"


async def test_undo_and_clear_stop_the_answer_first(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("One."), Reply.endless_chat(0.001), Reply.endless_chat(0.001))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", system="Be brief.")
        await chat.send("a")
        await anext(chat.send("b", stream=True))
        turn = chat.undo()
        assert turn is not None
        assert (turn.messages[0]["content"], turn.outcome) == ("b", "aborted")
        assert fake_ollama.requests[1].connection.wait_left()
        assert texts(chat) == ["Be brief.", "a", "One."]
        stream = chat.send("c", stream=True)
        await anext(stream)
        chat.clear()
        assert fake_ollama.requests[2].connection.wait_left()
        assert (texts(chat), chat.undo(), chat.context_tokens) == (["Be brief."], None, None)


# -- the context --


async def test_the_context_is_what_the_server_counted(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", counted("x" * 84, 60, 40), Reply.endless_chat(0.001))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake")
        assert chat.context_tokens is None
        await chat.send("y" * 84)
        assert chat.context_tokens == 100
        await anext(chat.send("z" * 84, stream=True))
        chat.abort()
        # Half as much again, and a little of an answer.
        assert 150 < (chat.context_tokens or 0) < 250
        chat.undo()
        assert chat.context_tokens == 100


async def test_whole_turns_are_left_out_the_oldest_first(fake_ollama: FakeOllama) -> None:
    replies = [
        *[counted("A" * 100, 60, 40), Reply.chat(tool_calls=[CALL]), counted("B" * 100, 200, 40)],
        *[counted("C" * 100, 280, 40), counted("D", 200, 40)],
    ]
    fake_ollama.script("/api/chat", *replies)
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", system="S", context_limit=300)
        await chat.send("a" * 100)
        await chat.send("b" * 100)
        await chat.send([RESULT])
        await chat.send("c" * 100)
        await chat.send("d" * 100)
    sent = [[text[:1] for _, text in said(request)] for request in fake_ollama.requests]
    assert sent[3] == ["S", "a", "A", "b", "", "1", "B", "c"]
    # The oldest turn is enough; the call and its result are part of one turn.
    assert sent[4] == ["S", "b", "", "1", "B", "c", "C", "d"]
    assert [text[:1] for text in texts(chat)] == ["S", "a", "A", "b", "", "1", "B", "c", "C", "d", "D"]
    assert chat.context_tokens == 240


async def test_a_limit_leaves_the_system_message_and_the_new_one(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", counted("A" * 100, 600, 40), Reply.chat(tool_calls=[CALL]), Reply.chat("Cold."))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", system="S", context_limit=1)
        await chat.send("a")
        await chat.send("b")
        await chat.send([RESULT])
        assert chat.undo() is not None
        assert chat.undo() is not None
        await chat.send("c")
        assert [message["content"] for message in chat.window][:2] == ["S", "c"]
    assert said(fake_ollama.requests[1]) == [("system", "S"), ("user", "b")]
    assert [role for role, _ in said(fake_ollama.requests[2])] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize("limit", [0, -1, 1.5, "4096", True])
def test_an_invalid_number_of_tokens_is_refused(limit: Any) -> None:
    with pytest.raises(RequestError, match="context_limit="):
        Chat(AsyncClient(), "fake", context_limit=limit)


async def test_what_is_of_the_wrong_kind_is_refused(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        for given, text in (
            ({"client": None}, "client=NoneType: give an AsyncClient or a Pool"),
            ({"client": fake_ollama.url}, "client=str: give an AsyncClient or a Pool"),
            ({"model": 3}, "model=3: give the name of a model"),
            ({"system": 3}, "system=3: give a str, or None"),
            ({"messages": 3}, "messages=int: give a list"),
        ):
            with pytest.raises(RequestError, match=text):
                Chat(**{"client": client, "model": "fake", **given})  # type: ignore[arg-type]
        chat = Chat(client, "fake")
        await chat.send("hi")
        with pytest.raises(RequestError, match="there is no message in it"):
            chat.send([], stream=True)
        assert len(chat.turns) == 1


# -- files --


async def test_a_saved_conversation_is_the_same_when_it_is_loaded(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    path, picture = tmp_path / "chat.json", tmp_path / "dot.png"
    picture.write_bytes(PNG)
    replies = [Reply.chat("A", thinking=["hm"]), Reply.chat(tool_calls=[CALL]), Reply.chat("Cold."), Reply.chat("B")]
    fake_ollama.script("/api/chat", *replies, Reply.endless_chat(0.001), Reply.chat("C"))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", system="S", headers={"X-Api-Key": "hidden-key"})
        await chat.send("a", images=[picture, io.BytesIO(PNG)])
        await chat.send("b")
        await chat.send([RESULT])
        await chat.send("c")
        await anext(chat.send("d", stream=True))
        chat.abort()
        await chat.save(path)
        picture.unlink()
        loaded = await Chat.load(path, client, context_limit=100_000)
        assert loaded.turns[1:] == chat.turns[1:]
        assert [turn.outcome for turn in loaded.turns] == ["done", "done", "done", "aborted"]
        assert (loaded.model, loaded.system, loaded.context_tokens) == ("fake", "S", chat.context_tokens)
        await loaded.send("e")
    encoded = base64.b64encode(PNG).decode()
    assert fake_ollama.requests[-1].json()["messages"][1]["images"] == [encoded, encoded]
    assert "outcome" not in json.dumps(fake_ollama.requests[-1].json())
    text = path.read_text("utf-8")
    assert "hidden-key" not in text + repr(vars(chat))
    assert str(picture) not in text
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_what_is_left_out_stays_left_out(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    fake_ollama.script("/api/chat", counted("A" * 100, 600, 40), counted("B", 30, 10), Reply.chat("C"))
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", context_limit=100)
        await chat.send("a")
        await chat.send("b")
        await chat.save(tmp_path / "chat.json")
        loaded = await Chat.load(tmp_path / "chat.json", client, model="other")
        assert texts(loaded) == ["a", "A" * 100, "b", "B"]
        assert [message["content"] for message in loaded.window] == ["b", "B"]
        assert (loaded.context_tokens, loaded.model) == (40, "other")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "EOF while parsing"),
        (b"# Chat with fake\n", "expected value at line 1"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"{}", "model: Field required"),
        (b'{"model": "fake"}', "messages: Field required"),
        (b'{"model": "fake", "messages": [{"content": "a"}]}', "messages.0.role: Field required"),
        (b'{"model": "fake", "messages": [{"role": "user", "content": 7}]}', "messages.0.content"),
        (b'{"model": "fake", "messages": [], "left_out": -1}', "left_out"),
        (b'{"version": 2, "model": "fake", "messages": []}', "version"),
        (b'{"model": "fake", "messages": [{"role": "assistant", "content": "a", "outcome": "x"}]}', "outcome"),
        (b'{"model": "fake", "messages": [{"role": "user", "images": ["/etc/passwd"]}]}', "never the path of a file"),
    ],
)
async def test_a_file_that_is_not_a_conversation_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    async with nothing_left_behind(), AsyncClient() as client:
        with pytest.raises(ConversationError, match="is not a saved conversation") as caught:
            await Chat.load(path, client)
    assert problem in str(caught.value)
    assert "give a file that Chat.save() has written" in str(caught.value)
    assert caught.value.path == str(path)


async def test_a_file_that_cannot_be_read_or_written_says_so(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    gone.write_bytes(PNG)
    async with AsyncClient() as client:
        with pytest.raises(RequestError, match="No such file"):
            await Chat.load(tmp_path / "none.json", client)
        with pytest.raises(RequestError, match="give a regular file"):
            await Chat.load(tmp_path, client)
        chat = Chat(client, "fake", messages=[{"role": "user", "content": "a", "images": [gone]}])
        gone.unlink()
        old = tmp_path / "chat.json"
        old.write_text("mine")
        with pytest.raises(ConversationError, match=r"is not written: .*gone\.png"):
            await chat.save(old)
        assert old.read_text() == "mine"
        with pytest.raises(FileNotFoundError):
            await Chat(client, "fake").save(tmp_path / "no" / "chat.json")
    assert list(tmp_path.iterdir()) == [old]


async def test_a_conversation_can_begin_with_messages(fake_ollama: FakeOllama) -> None:
    before = [
        {"role": "system", "content": "S"},
        *[{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}],
        *[{"role": "user", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "B"}],
    ]
    async with AsyncClient(fake_ollama.url, timeout=10) as client:
        chat = Chat(client, "fake", messages=before)
        assert chat.system == "S"
        assert chat.messages == before
        assert [len(turn.messages) for turn in chat.turns] == [2, 3]
        chat.messages[1]["content"] = "changed"
        assert chat.turns[0] == Turn(({"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}))
    with pytest.raises(RequestError, match=r"messages\[0\] is not a message"):
        Chat(client, "fake", messages=[{"content": "no role"}])


async def test_a_question_whose_answer_says_nothing_is_not_kept(fake_ollama: FakeOllama) -> None:
    nothing = {"role": "assistant", "content": ""}
    call = {"function": {"name": "weather", "arguments": {}}}
    asked = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    async with AsyncClient(fake_ollama.url) as client:
        chat = Chat(client, "fake", messages=[nothing, {"role": "user", "content": "a"}, nothing, *asked, nothing])
        assert chat.messages == asked
        assert [turn.messages for turn in chat.turns] == [tuple(asked)]
        # One that nobody has answered yet is kept.
        chat.extend([{"role": "user", "content": "b"}])
        assert chat.messages == [*asked, {"role": "user", "content": "b"}]


async def test_messages_of_elsewhere_are_added_in_turns(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        chat = Chat(client, "fake")
        call = {"function": {"name": "weather", "arguments": {}}}
        chat.extend(
            [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "rain"},
                {"role": "assistant", "content": "It r", "outcome": "aborted"},
            ]
        )
        (turn,) = chat.turns
        assert [message["role"] for message in turn.messages] == ["user", "assistant", "tool", "assistant"]
        assert turn.outcome == "aborted"
        assert "outcome" not in chat.messages[-1]
