"""The reader of growing JSON, with text alone: whole, character by character, at each split, and from the wrong end."""

from __future__ import annotations

import itertools
import json
import random
import string
import time
from collections.abc import Iterator
from typing import Any

import pytest
from growing import grown
from pydantic_core import from_json

from ollama_async._call.jsontext import MAX_DEPTH, Frame, JsonFault, JsonReader

VALUES: list[Any] = [
    {},
    [],
    [[]],
    {"a": {}},
    {"a": [], "b": [{}], "": {"": [[], {"c": None}]}},
    [1, -0.5, 1e3, 12345678901234567890, True, False, None],
    {"text": 'a "quote", a \\ and a / and\nlines\t\b\f\r', "\u00e9\U0001f600": "\u00e9\U0001f600\u2028"},
    "only a string",
    "",
    {"number": 0, "next": [0, 1]},
]
TEXTS = [
    *(
        json.dumps(value, ensure_ascii=escaped, indent=indent)
        for value in VALUES
        for escaped in (True, False)
        for indent in (None, 2)
    ),
    ' \n\t{ "a" : [ 1 , 2 ] , "b" : "\\/" }\r\n ',
    '"\\ud83d\\ude00 \\u00e9"',
]


def read(*pieces: str) -> JsonReader:
    reader = JsonReader()
    for piece in pieces:
        reader.feed(piece)
    reader.feed_eof()
    return reader


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_the_same_however_its_text_is_split(text: str) -> None:
    value = from_json(text)
    assert read(text).value == value
    assert read(*text).value == value
    for at in range(len(text) + 1):
        assert read(text[:at], text[at:]).value == value
    for first, second in itertools.combinations(range(0, len(text), 3), 2):
        assert read(text[:first], text[first:second], text[second:]).value == value


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip()[-1] in ']}"'])
def test_it_is_complete_with_the_character_that_closes_the_root(text: str) -> None:
    reader, end = JsonReader(), len(text.rstrip())
    for at, sign in enumerate(text, 1):
        reader.feed(sign)
        assert reader.complete == (at >= end)


def shown(reader: JsonReader) -> Any:
    """What can be shown of a value so far."""
    if reader.complete:
        return reader.value
    growing = reader.growing_string
    value = None if growing is None else "".join(growing)
    for frame in reversed(reader.stack):
        if frame.kind == "{":
            value = {**frame.value, **({} if value is None else {frame.key: value})}
        else:
            value = [*frame.value, *([] if value is None else [value])]
    return value


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_shown_never_shrinks_and_is_what_pydantic_would_show(text: str) -> None:
    reader, before = JsonReader(), None
    for at, sign in enumerate(text, 1):
        reader.feed(sign)
        now = shown(reader)
        assert grown(before, now), text[:at]
        before = now
        if text[:at].strip() and reader.stack:
            # pydantic also shows a number that may grow, which is all that it shows more.
            assert grown(now, from_json(text[:at], allow_partial="trailing-strings")), text[:at]


def words(seed: int) -> Iterator[Any]:
    """Values of all kinds, at random."""
    made = random.Random(seed)
    signs = string.ascii_letters + '"\\/\b\n\u00e9\u2028\U0001f600 {}[],:'

    def value(depth: int) -> Any:
        kind = made.randrange(7 if depth < 4 else 5)
        if kind == 0:
            return made.choice([True, False, None])
        if kind == 1:
            return made.choice([made.randrange(-99, 10**12), made.random() * 10 ** made.randrange(-20, 20)])
        if kind <= 4:
            return "".join(made.choices(signs, k=made.randrange(9)))
        if kind == 5:
            return [value(depth + 1) for _ in range(made.randrange(4))]
        return {"".join(made.choices(signs, k=5)): value(depth + 1) for _ in range(made.randrange(4))}

    while True:
        yield {"root": value(0)}


def test_random_values_in_random_pieces() -> None:
    made = random.Random(7)
    for value in itertools.islice(words(1), 300):
        text = json.dumps(value, ensure_ascii=made.random() < 0.5, indent=made.choice([None, 1]))
        reader, at, before = JsonReader(), 0, None
        while at < len(text):
            step = made.randrange(1, 9)
            reader.feed(text[at : at + step])
            at += step
            now = shown(reader)
            assert grown(before, now)
            before = now
        assert reader.complete
        assert before == from_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Here is the JSON: {}", "the answer does not begin with JSON: 'Here is the JSON: {}'"),
        ("```json\n{}", "the answer does not begin with JSON: '```json\\n{}'"),
        ("this is it", "the JSON has 'this' where a value belongs"),
        ('{"a": 1} and so on', "text follows the JSON: 'and so on'"),
        ("{} {}", "text follows the JSON: '{}'"),
        ('{"a" 1}', "the JSON has '1}' where a colon belongs"),
        ('{"a": 1 "b"', "the JSON has '\"b\"' where a comma or the end of what is open belongs"),
        ('{"a": 1,}', "the JSON has '}' where a key belongs"),
        ("{,", "the JSON has ',' where a key or } belongs"),
        ("{1", "the JSON has '1' where a key or } belongs"),
        ("[1,]", "the JSON has ']' where a value belongs"),
        ("[,", "the JSON has ',' where a value or ] belongs"),
        ("[1}", "the JSON has '}' where a comma or the end of what is open belongs"),
        ('{"a": 1]', "the JSON has ']' where a comma or the end of what is open belongs"),
        ("[truth]", "the JSON has 'truth' where a value belongs"),
        ("[NaN]", "the JSON has 'NaN]' where a value or ] belongs"),
        ("[01]", "the JSON has '01' where a value belongs"),
        ("[1.]", "the JSON has '1.' where a value belongs"),
        ("[-]", "the JSON has '-' where a value belongs"),
        ('["a\nb"]', "the JSON has the control character '\\n' in a string"),
        ('["\\x"]', "the JSON has the invalid escape '\\\\x' in a string"),
        ('["\\u12g4"]', "the JSON has the invalid escape '\\\\u12g' in a string"),
        ('["\\ud83d"]', "the JSON has half a surrogate pair in a string: '\\\\ud83d\"'"),
        ('["\\ude00"]', "the JSON has half a surrogate pair in a string: '\\\\ude00'"),
        ('["\\ud83d\\u0041"]', "the JSON has half a surrogate pair in a string: '\\\\ud83d\\\\u0041'"),
        ('{"a": 1, "a": 2}', "the JSON has the key 'a' twice in one object"),
        ("[" * 201, f"the JSON nests deeper than {MAX_DEPTH} levels"),
        ("", "the answer has no JSON"),
        (" \n", "the answer has no JSON"),
        ('{"a": [1', "the answer ends before its JSON is complete"),
        ('"half', "the answer ends before its JSON is complete"),
        ("nul", "the JSON has 'nul' where a value belongs"),
    ],
)
def test_a_fault_is_found_at_its_place_and_named(text: str, reason: str) -> None:
    with pytest.raises(JsonFault) as caught:
        read(text)
    assert str(caught.value) == reason
    # In pieces its place is the same; how much of what follows is shown depends on what has come.
    with pytest.raises(JsonFault) as caught:
        read(*text)
    assert str(caught.value)[:13] == reason[:13]


@pytest.mark.parametrize("text", ["5", "5 ", " -1.5e2", "true", "null\n"])
def test_a_number_or_word_alone_is_complete_at_the_end(text: str) -> None:
    assert read(text).value == from_json(text)
    assert read(*text).value == from_json(text)


class Log:
    """What a reader tells."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object, object]] = []

    def opened(self, parent: Frame | None, frame: Frame) -> None:
        self.told.append(("opened", parent and parent.key, frame.kind))

    def completed(self, parent: Frame | None, value: Any, frame: Frame | None) -> None:
        assert (frame is not None) == isinstance(value, (dict, list))
        self.told.append(("completed", parent and parent.key, value))


def test_the_listener_is_told_in_order() -> None:
    log = Log()
    reader = JsonReader(log)
    for sign in '{"a": [7, "x"]}':
        reader.feed(sign)
    assert log.told == [
        ("opened", None, "{"),
        ("opened", "a", "["),
        ("completed", 0, 7),
        ("completed", 1, "x"),
        ("completed", "a", [7, "x"]),
        ("completed", None, {"a": [7, "x"]}),
    ]


@pytest.mark.parametrize("unit", ['{"a": "text", "b": [1, 2.5, true]}, ', "x", "1", "\\n", "\\ud83d\\ude00", " "])
def test_a_character_costs_the_same_however_long_the_text_is(unit: str) -> None:
    """Four times the text takes about four times as long; were the whole read again for each, it would be sixteen."""
    before, _ = {"x": ('"', '"'), "\\": ('"', '"'), "1": ("", " "), " ": ("[", "]")}.get(unit[0], ("[", "0]"))

    def seconds(count: int) -> float:
        reader = JsonReader()
        began = time.thread_time()
        reader.feed(before)
        for _ in range(count):
            for sign in unit:
                reader.feed(sign)
        assert not reader.complete
        return time.thread_time() - began

    signs = 1500 // len(unit)
    few, many = min(seconds(signs) for _ in range(3)), min(seconds(8 * signs) for _ in range(3))
    assert many < 24 * few
