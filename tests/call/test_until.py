"""Conditions of ``until=``: what each is met by, what it costs, and that the server's connection is closed by it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from teardown.harness import BOUND, nothing_left_behind, saw_leave

from ollama_async import AbortError, AsyncClient, ChatResponse, PhaseTimeout, RequestError, StreamTruncated, Timeouts
from ollama_async._model.merge import ChatMerge, GenerateMerge
from ollama_async.testing import FakeOllama, Reply, Stall
from ollama_async.until import (
    Condition,
    json_complete,
    matches,
    max_chars,
    max_seconds,
    max_tokens,
    repetition,
    sentence_end,
)

WORDS = ["One ", "two. ", "Three", " four", ". Five ", "six."]


def met_after(condition: Condition, *parts: str) -> tuple[str, Condition] | None:
    """The text with which a condition is met, and which; as a stream asks it."""
    watch, text = condition.watch(), ""
    for part in parts:
        text += part
        met = watch(SimpleNamespace(text=text, logprobs=None))
        if met is not None:
            return text, met
    return None


def text_of(condition: Condition, *parts: str) -> str | None:
    met = met_after(condition, *parts)
    return met and met[0]


# -- what each is met by --


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (max_chars(1), "One "),
        (max_chars(5), "One two. "),
        (max_chars(9), "One two. "),
        (max_chars(10), "One two. Three"),
        (max_chars(1000), None),
        (max_tokens(1), "One "),
        (max_tokens(4), "One two. Three four"),
        (max_tokens(7), None),
        (sentence_end(), "One two. "),
        (max_chars(10) & sentence_end(), "One two. Three four. Five six."),
        (sentence_end() & max_chars(10), "One two. Three four. Five six."),
        (matches("T"), "One two. Three"),
        (matches(r"e\s+t"), "One two. "),
        (matches(re.compile("FIVE", re.IGNORECASE)), "One two. Three four. Five "),
        (matches("^Three"), None),
        (matches(r"(?m)^One"), "One "),
        (matches(r"(?<=two\. )Th"), "One two. Three"),
        # Once found it stays found.
        (matches("One") & max_chars(12), "One two. Three"),
        (matches("nothing") | max_tokens(2), "One two. "),
        (json_complete(), None),
    ],
)
def test_what_a_condition_is_met_by(condition: Condition, text: str | None) -> None:
    assert text_of(condition, *WORDS) == text


@pytest.mark.parametrize(
    "text",
    [
        "End.",
        "End!",
        "End?",
        "End\u2026",
        "\u7d42\u308f\u308a\u3002",
        "End.\u201d",
        'He said "End."',
        "(End.)\n\n",
        "*End.*",
        "End...",
    ],
)
def test_where_a_sentence_ends(text: str) -> None:
    assert text_of(sentence_end(), text) == text


@pytest.mark.parametrize(
    "text", ["", " ", "no end", "in 3.", "1984.", "1.", "by e.g.", "J.", "End, ", "End. And", "."[:0]]
)
def test_where_no_sentence_ends(text: str) -> None:
    assert text_of(sentence_end(), text) is None


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("Well. " + "and so on, " * 10, True),
        ("x" + "and so on, " * 9, False),
        (" " * 100, True),
        (" " * 99, False),
        ("-" * 99 + "\n", False),
        ("The same sentence again and again. " * 4, True),
        ("The same sentence again and again. " * 3, False),
        # Also where a part of the piece is repeated in it.
        ("aa ab aa ab aa ab aa ab aa ab aa ab aa ab aa cd. " * 4, True),
        ("a long piece " + "b" * 480 + ("c" * 495 + "d") * 4, True),
        (("c" * 501 + "d") * 4, False),
        ("".join(f"line {n} of a list that goes on\n" for n in range(100)), False),
        ("", False),
    ],
)
def test_what_repeats_itself(text: str, repeats: bool) -> None:
    assert (text_of(repetition(), text) is not None) == repeats


@pytest.mark.parametrize("seed", range(20))
def test_repetition_finds_what_looking_at_every_length_finds(seed: int) -> None:
    made = random.Random(seed)

    def naive(text: str) -> bool:
        return any(
            len(text) >= max(3 * size, 8)
            and all(text[-n] == text[-n - size] for n in range(1, max(3 * size, 8) - size + 1))
            for size in range(1, 6)
        )

    for _ in range(300):
        text = "".join(made.choices("ab", [3, 1], k=made.randrange(30)))
        assert (text_of(repetition(3, chars=8, longest=5), text) is not None) == naive(text), text


def test_a_match_that_comes_in_pieces_is_found_however_it_is_split() -> None:
    text = "The answer is here: 42, and that is it."
    for at in range(len(text)):
        parts = [text[:at], *text[at:]]
        found = text_of(matches(r"is here: \d+,", within=14), *parts)
        assert found is not None
        assert found[-1] == "," or at > found.index(",")
    # One that is longer than was said may be missed: that is what it costs no more for.
    assert text_of(matches("x.{20}x", within=4), *("x" + "-" * 20 + "x")) is None
    assert text_of(matches("x.{20}x", within=4), "x" + "-" * 20 + "x") is not None


def test_which_was_met_is_told() -> None:
    first, second = max_chars(5), matches("two")
    for condition, parts, met in [
        (first | second, ["12345"], first),
        (first | second, ["two"], second),
        (second | first, ["two 5"], second),
        (first | (second | max_tokens(1)), ["x"], None),
    ]:
        found = met_after(condition, *parts)
        assert found is not None
        assert found[1] is met or repr(found[1]) == "max_tokens(1)"
    both = first & second
    found = met_after(both, "two", " more")
    assert found is not None
    assert found[1] is both


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (max_chars(5), "max_chars(5)"),
        (max_tokens(5), "max_tokens(5)"),
        (max_seconds(0.5), "max_seconds(0.5)"),
        (matches("a'"), 'matches("a\'")'),
        (sentence_end(), "sentence_end()"),
        (repetition(), "repetition(4, chars=100, longest=500)"),
        (json_complete(), "json_complete()"),
        (max_chars(5) & sentence_end() | max_seconds(9), "(max_chars(5) & sentence_end()) | max_seconds(9)"),
        (max_chars(5) & (sentence_end() | max_seconds(9)), "max_chars(5) & (sentence_end() | max_seconds(9))"),
        (max_chars(1) | max_chars(2) | max_chars(3), "max_chars(1) | max_chars(2) | max_chars(3)"),
        (max_chars(1) | text_of, "max_chars(1) | text_of"),
        (text_of & max_chars(1), "text_of & max_chars(1)"),
    ],
)
def test_a_condition_says_what_it_is(condition: Condition, text: str) -> None:
    assert repr(condition) == text


def test_a_condition_is_a_function_of_an_answer() -> None:
    answer = SimpleNamespace(text="One. Two.", logprobs=None)
    assert (max_chars(5) & sentence_end())(answer)
    assert not max_chars(50)(answer)


def test_functions_combine_with_conditions() -> None:
    def long(answer: Any) -> bool:
        return len(answer.text) > 5

    assert text_of(long | max_tokens(9), *WORDS) == "One two. "
    assert text_of(max_tokens(4) & long, *WORDS) == "One two. Three four"
    for combined in (lambda: max_chars(1) | 5, lambda: "x" & max_chars(1)):
        with pytest.raises(RequestError, match=r"give a condition of ollama_async.until, or a function of the answer"):
            combined()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: max_chars(0), "max_chars(0): give a whole number, 1 or more"),
        (lambda: max_chars(-1), "max_chars(-1): give a whole number, 1 or more"),
        (lambda: max_chars(True), "max_chars(True): give a whole number, 1 or more"),
        (lambda: max_chars("5"), "max_chars('5'): give a whole number, 1 or more"),  # type: ignore[arg-type]
        (lambda: max_tokens(2.5), "max_tokens(2.5): give a whole number, 1 or more"),  # type: ignore[arg-type]
        (lambda: max_seconds(0), "max_seconds(0): give a number of seconds above 0"),
        (lambda: max_seconds(-3), "max_seconds(-3): give a number of seconds above 0"),
        (lambda: max_seconds(float("nan")), "max_seconds(nan): give a number of seconds above 0"),
        (lambda: max_seconds(float("inf")), "max_seconds(inf): give a number of seconds above 0"),
        (lambda: max_seconds(None), "max_seconds(None): give a number of seconds above 0"),  # type: ignore[arg-type]
        (lambda: matches("(a"), "matches('(a'): give a valid regular expression: "),
        (lambda: matches(b"a"), "matches(b'a'): give a pattern of str, not of bytes: answers are text"),  # type: ignore[arg-type]
        (lambda: matches(5), "matches(5): give a valid regular expression: "),  # type: ignore[arg-type]
        (lambda: matches("a", within=0), "matches(within=0): give a whole number, 1 or more"),
        (lambda: repetition(1), "repetition(times=1): give a whole number, 2 or more"),
        (lambda: repetition(0), "repetition(times=0): give a whole number, 1 or more"),
        (lambda: repetition(chars=-1), "repetition(chars=-1): give a whole number, 1 or more"),
        (lambda: repetition(longest=0), "repetition(longest=0): give a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_a_limit_is_refused(make: Callable[[], Condition], text: str) -> None:
    with pytest.raises(RequestError) as caught:
        make()
    assert str(caught.value).startswith(text)


async def test_an_invalid_condition_is_refused_before_anything_is_sent(fake_ollama: FakeOllama) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        with pytest.raises(RequestError, match=r"^until=int: give a condition of ollama_async.until"):
            await client.chat("m", "x", stream=True, until=5)  # type: ignore[call-overload]
        with pytest.raises(RequestError, match="until= needs stream=True"):
            await client.chat("m", "x", until=max_chars(1))  # type: ignore[call-overload]
    assert not fake_ollama.requests


# -- what it costs --


@pytest.mark.parametrize(
    "condition",
    [
        max_chars(10**9),
        max_tokens(10**9),
        max_seconds(10**6),
        matches("[^ ]{40}nothing"),
        sentence_end() & max_chars(10**9),
        repetition(),
        json_complete(),
        max_chars(10**9) | (max_tokens(10**9) & matches("nothing")),
    ],
    ids=repr,
)
def test_a_chunk_costs_the_same_however_long_the_answer_is(condition: Condition) -> None:
    """Ten times the chunks take about ten times as long; read again for each, the text would take a hundred times."""

    def seconds(chunks: int) -> float:
        watch, merge = condition.watch(), ChatMerge()
        made = random.Random(1)
        parts = [merge.validators.one(_line("".join(made.choices("abc de.", k=5)), "think")) for _ in range(chunks)]
        began = time.thread_time()
        for part in parts:
            merge.add(part)
            answer = merge.growing_result()
            assert watch(answer) is None
            del answer
        return time.thread_time() - began

    few, many = min(seconds(300) for _ in range(3)), min(seconds(3000) for _ in range(2))
    assert many < 30 * few


def _line(content: str, thinking: str = "") -> bytes:
    return json.dumps(
        {"model": "m", "message": {"role": "assistant", "content": content, "thinking": thinking}}
    ).encode()


@pytest.mark.parametrize("merge", [ChatMerge(), GenerateMerge()], ids=["chat", "generate"])
def test_the_growing_answer_is_the_answer(merge: Any) -> None:
    for number in range(9):
        content, thinking = f"w{number} ", f"t{number} " if number % 3 else ""
        part = {"message": {"role": "assistant", "content": content, "thinking": thinking}}
        merge.add(merge.validators.one(json.dumps({"response": content, "thinking": thinking, **part}).encode()))
        # Not after each: it catches up.
        if number != 4:
            assert merge.growing_result() == merge.result()


# -- over a connection --


@pytest.mark.parametrize(
    ("condition", "reason", "text"),
    [
        (max_chars(20), "max_chars(20)", "This answer comes from"),
        (max_tokens(3) | max_chars(500), "max_tokens(3)", "This answer comes"),
        (
            max_chars(30) & sentence_end(),
            "max_chars(30) & sentence_end()",
            "This answer comes from a fake Ollama server.",
        ),
        (matches("comes? fr"), "matches('comes? fr')", "This answer comes from"),
        (repetition(2), "repetition(2, chars=100, longest=500)", None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("strict", [False, True])
async def test_the_stream_ends_normally_and_names_it(
    fake_ollama: FakeOllama, condition: Condition, reason: str, text: str | None, strict: bool
) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.0005))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, strict=strict) as client:
        stream = client.chat("m", "x", stream=True, until=condition)
        assert stream.reason is None
        answer = await asyncio.wait_for(stream.collect(), BOUND)
        saw_leave(fake_ollama)
        assert (stream.outcome, repr(stream.reason)) == ("until", reason)
        assert answer.text == stream.text
        assert text is None or answer.text == text
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_function_works_as_before_and_gives_no_reason(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.endless_chat(0.0005))
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, until=lambda answer: len(answer.text) > 9)
        await stream.collect()
        assert (stream.outcome, stream.reason, stream.text) == ("until", None, "This answer")


async def test_an_answer_that_is_done_first_has_no_reason(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Done."))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, until=max_chars(500) | max_seconds(60))
        await stream.collect()
        assert (stream.outcome, stream.reason) == ("done", None)


async def test_one_condition_serves_many_streams_at_once(fake_ollama: FakeOllama) -> None:
    """What one stream has had is not what another has had."""
    fake_ollama.script("/api/chat", Reply.endless_chat(0.001), always=True)
    condition = max_tokens(5) | matches("never") | max_seconds(50)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        streams = [client.chat("m", "x", stream=True, until=condition) for _ in range(8)]
        answers = await asyncio.wait_for(asyncio.gather(*(stream.collect() for stream in streams)), BOUND)
    assert {answer.text for answer in answers} == {"This answer comes from a"}
    assert {stream.timing.chunks for stream in streams} == {5}


async def test_logprobs_count_tokens(fake_ollama: FakeOllama) -> None:
    tokens = [{"token": "x", "logprob": -0.1}] * 2
    frame = {"message": {"role": "assistant", "content": "xx"}, "logprobs": tokens, "done": False}
    fake_ollama.script("/api/chat", Reply([frame] * 9))
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, logprobs=True, until=max_tokens(6))
        assert (await stream.collect()).text == "xxxxxx"


# -- max_seconds --


PART = {"model": "m", "message": {"role": "assistant", "content": "part "}, "done": False}


@pytest.mark.parametrize(
    "condition", [max_seconds(0.05), max_chars(500) | max_seconds(0.05) | max_seconds(70)], ids=repr
)
async def test_max_seconds_is_met_while_no_chunk_comes(fake_ollama: FakeOllama, condition: Condition) -> None:
    fake_ollama.script("/api/chat", Reply([PART, PART, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, strict=True) as client:
        stream = client.chat("m", "x", stream=True, until=condition)
        answer = await asyncio.wait_for(stream.collect(), BOUND)
        saw_leave(fake_ollama)
        assert (stream.outcome, repr(stream.reason), answer.text) == ("until", "max_seconds(0.05)", "part part ")
        assert not stream.abort()


async def test_max_seconds_is_met_while_nobody_reads(fake_ollama: FakeOllama) -> None:
    """The connection is closed then; whoever reads on comes to the end."""
    fake_ollama.script("/api/chat", Reply([PART, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, until=max_seconds(0.05))
        await anext(stream)
        left = asyncio.get_running_loop().run_in_executor(None, fake_ollama.connections[0].wait_left, BOUND)
        assert await left
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert (stream.outcome, repr(stream.reason), stream.text) == ("until", "max_seconds(0.05)", "part ")


async def test_max_seconds_does_not_count_what_is_before_the_first_chunk(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply(before_head=[Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=0.3) as client:
        stream = client.chat("m", "x", stream=True, until=max_seconds(0.01))
        with pytest.raises(PhaseTimeout):
            await stream.collect()
        assert stream.outcome == "timeout"


async def test_max_seconds_and_something_else_wait_for_a_chunk(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([PART, Stall()]))
    async with AsyncClient(fake_ollama.url, timeout=0.3) as client:
        with pytest.raises(PhaseTimeout):
            await client.chat("m", "x", stream=True, until=max_seconds(0.01) & max_chars(1)).collect()


async def test_what_ends_a_stream_before_max_seconds_leaves_no_timer(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([PART, Stall()]), always=True)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, until=max_seconds(1000))
        await anext(stream)
        stream.abort("me")
        saw_leave(fake_ollama)
        with pytest.raises(AbortError):
            await anext(stream)
        assert (stream.outcome, stream.reason) == ("aborted", "me")
        async for _ in client.chat("m", "x", stream=True, until=max_seconds(1000)):
            break
        saw_leave(fake_ollama)


async def test_the_limits_of_a_stream_hold_beside_max_seconds(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([PART, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, timeout=Timeouts(idle=0.3)) as client:
        with pytest.raises(PhaseTimeout) as caught:
            await client.chat("m", "x", stream=True, until=max_seconds(1000)).collect()
        assert caught.value.phase == "idle"


async def test_a_truncated_stream_is_still_told_with_a_condition(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat("Half", done=False), always=True)
    async with AsyncClient(fake_ollama.url, strict=True) as client:
        with pytest.raises(StreamTruncated):
            await client.chat("m", "x", stream=True, until=max_seconds(50)).collect()


async def test_json_complete_ends_a_plain_stream(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply.chat('{"a": ', "[1]", "}", *[" "] * 1000, thinking=["{}"]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", stream=True, format="json", until=json_complete())
        answer: ChatResponse = await stream.collect()
        saw_leave(fake_ollama)
        assert (answer.text, stream.outcome, repr(stream.reason)) == ('{"a": [1]}', "until", "json_complete()")
