"""Objects and list elements of an answer while it comes: what is shown, when it is checked, and when it all ends."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from growing import grown
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, StringConstraints, field_validator
from teardown.harness import BOUND, nothing_left_behind, saw_leave
from typing_extensions import TypeAliasType

from ollama_async import AbortError, AsyncClient, CancelToken, ParseError, Pool, RequestError, Stream, StreamBusy
from ollama_async._call.jsontext import JsonFault
from ollama_async._call.partial import Fault, Partial, PartialReader
from ollama_async._call.shape import ANY, shape_of
from ollama_async.testing import FakeOllama, Gate, Reply, Stall
from ollama_async.until import max_chars


class City(BaseModel):
    name: str = Field(min_length=2)
    people: int = Field(gt=0)


class Country(BaseModel):
    name: str
    founded: date | None = None
    cities: list[City] = []


PERU = {
    "name": 'Per\u00fa "x" \\ \U0001f600',
    "founded": "1821-07-28",
    "cities": [{"name": "Lima", "people": 10}, {"name": "Cusco", "people": 400000}],
}
TEXT = json.dumps(PERU)


def by_steps(text: str, step: int = 3) -> list[str]:
    return [text[at : at + step] for at in range(0, len(text), step)]


def partials(model: Any, pieces: Sequence[str], *, fail_fast: bool = False) -> list[Partial[Any]]:
    """What is shown after each piece."""
    reader = PartialReader(ANY if model is Any else shape_of(model), fail_fast=fail_fast)
    found: list[Partial[Any]] = []
    for piece in pieces:
        reader.feed(piece)
        partial = reader.changed()
        if partial is not None:
            found.append(partial)
    reader.feed_eof()
    return found


# -- what is shown --


class Mood(Enum):
    GOOD = "good"


class Changed(BaseModel):
    """Fields whose text changes when it is complete, or is no text then."""

    stripped: Annotated[str, StringConstraints(strip_whitespace=True)]
    shouted: Annotated[str, AfterValidator(str.upper)]
    validated: str
    mood: Mood
    choice: Literal["red", "redder"]
    day: date
    either: date | str
    numbers: set[int]
    pair: tuple[str, str]

    @field_validator("validated")
    @classmethod
    def _reversed(cls, value: str) -> str:
        return value[::-1]


class Tree(BaseModel):
    label: str
    children: list[Tree] = []
    best: Tree | None = None


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True, strict=True, extra="allow")
    full_name: str = Field(alias="fullName", pattern="^[A-Z]")
    when: date
    by_key: dict[str, City] = {}
    anything: Any = None


class Names(RootModel[list[str]]):
    pass


class Stripping(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)
    text: str


MODELS: list[tuple[Any, Any]] = [
    (Country, PERU),
    (Any, PERU),
    (Any, [1, "two", [{"three": None}]]),
    (Any, "text \u00e9"),
    (
        Changed,
        {
            "stripped": " a  ",
            "shouted": "hey",
            "validated": "abc",
            "mood": "good",
            "choice": "redder",
            "day": "2026-01-02",
            "either": "2026-01-02",
            "numbers": [3, 3, 1],
            "pair": ["a", "b"],
        },
    ),
    (Tree, {"label": "a", "children": [{"label": "b", "children": [{"label": "c"}]}], "best": {"label": "d"}}),
    (
        Aliased,
        {
            "fullName": "Ada L",
            "when": "2026-01-02",
            "by_key": {"x": PERU["cities"][0]},  # type: ignore[index]
            "anything": {"k": ["v"]},
            "more": "not a field",
        },
    ),
    (Names, ["Ada", "Bob"]),
    (Stripping, {"text": " a "}),
]


@pytest.mark.parametrize(("model", "value"), MODELS, ids=lambda part: getattr(part, "__name__", ""))
@pytest.mark.parametrize("escaped", [True, False])
def test_what_is_shown_stays_and_ends_as_the_validated_object(model: Any, value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    whole = value if model is Any else model.model_validate_json(text)
    for pieces in ([text], list(text), by_steps(text, 5), *([text[:at], text[at:]] for at in range(1, len(text), 5))):
        found = partials(model, pieces)
        before = None
        for partial in found:
            assert grown(before, partial.value), pieces
            before = partial.value
        assert found[-1].complete
        assert found[-1].value == whole
        assert not any(partial.complete for partial in found[:-1])


def test_a_partial_object_is_the_same_when_it_is_read_later() -> None:
    """Its value is made when it is asked for: of what it was, not of what has come since."""
    asked = [repr(partial) for partial in partials(Country, list(TEXT))]
    reader, shown = PartialReader(shape_of(Country)), list[Any]()
    for sign in TEXT:
        reader.feed(sign)
        partial = reader.changed()
        if partial is not None:
            shown.append((repr(partial.value), partial.state("cities.0"), partial.state("name"), partial.state()))
    assert [shown[at][0] for at in range(len(shown))] == [repr(p.value) for p in partials(Country, list(TEXT))]
    later = partials(Country, list(TEXT))
    assert [(repr(p.value), p.state("cities.0"), p.state("name"), p.state()) for p in later] == shown
    assert [repr(partial) for partial in later] == asked


def test_what_a_model_shows_while_it_grows() -> None:
    found = partials(Country, by_steps(TEXT, 1))
    assert [partial.value.name for partial in found[:4]] == [None, "", "P", "Pe"]
    assert found[0].value.model_fields_set == set()
    # Not its default: what comes may be less.
    assert found[3].value.cities is None
    days = [partial.value.founded for partial in found]
    assert set(days) == {None, date(1821, 7, 28)}
    cities = [partial.value.cities for partial in found if partial.value.cities]
    assert {type(each) for city in cities for each in city} == {City}
    assert [city[0].people for city in cities[:6]] == [None] * 6
    # A number may go on, so it is shown when it has ended.
    assert {city[1].people for city in cities if len(city) > 1} == {None, 400000}


def test_the_states_of_a_field() -> None:
    text = '{"name": "Peru", "cities": [{"name": "Lima", "people": 10}, {"na'
    reader = PartialReader(shape_of(Country))
    states: dict[str, list[str]] = {}
    for sign in text:
        reader.feed(sign)
        partial = reader.changed()
        if partial is not None:
            for path in ("name", "cities", "cities.0", "cities.0.people", "cities.1", "cities.0.name.x", "nothing", ""):
                seen = states.setdefault(path, [])
                if seen[-1:] != [partial.state(path)]:
                    seen.append(partial.state(path))
    assert states == {
        "name": ["absent", "growing", "complete"],
        "cities": ["absent", "growing"],
        "cities.0": ["absent", "growing", "complete"],
        "cities.0.people": ["absent", "complete"],
        "cities.1": ["absent", "growing"],
        "cities.0.name.x": ["absent"],
        "nothing": ["absent"],
        "": ["growing"],
    }
    assert partials(Country, list(TEXT))[-9].state(["cities", 0, "people"]) == "complete"
    whole = partials(Country, [TEXT])[-1]
    assert [whole.state(path) for path in ("", "cities.1.people", "cities.2", "x", "name.x")] == [
        *("complete", "complete", "absent", "absent", "absent")
    ]
    for path in (5, [None], b"name"):
        with pytest.raises(RequestError, match="give keys joined by dots"):
            whole.state(path)  # type: ignore[arg-type]


# -- what is wrong --

SHORT = '{"name": "Peru", "cities": [{"name": "L", "people": 10}, {"name": "Cusco", "people": -5}], "founded": null}'


def test_constraints_are_checked_when_a_field_is_complete() -> None:
    reader = PartialReader(shape_of(Country))
    seen: list[dict[str, str]] = []
    with pytest.raises(Fault, match=r"^cities\.0\.name: String should have at least 2 characters$"):
        for sign in SHORT:
            reader.feed(sign)
            partial = reader.changed()
            if partial is not None and partial.errors != (seen[-1] if seen else {}):
                seen.append(dict(partial.errors))
                # What is wrong is shown, as all that has come.
                assert partial.value.cities[0].name == "L"
    # Each once, where it is: not again for each object that it is in.
    assert seen == [
        {"cities.0.name": "String should have at least 2 characters"},
        {
            "cities.0.name": "String should have at least 2 characters",
            "cities.1.people": "Input should be greater than 0",
        },
    ]


@pytest.mark.parametrize(
    ("text", "taken", "reason"),
    [
        (SHORT, '{"name": "Peru", "cities": [{"name": "L"', "cities.0.name: String should have at least 2 characters"),
        ('{"cities": [{"people": 5}]}', '{"cities": [{"people": 5}', "cities.0.name: Field required"),
        ('{"cities": []}', '{"cities": []}', "name: Field required"),
        ('{"name": 5, "cities": []}', '{"name": 5,', "name: Input should be a valid string"),
        (
            '{"founded": "soon"}',
            '{"founded": "soon"',
            "founded: Input should be a valid date or datetime, input is too short",
        ),
        ("[1]", "[1]", "Input should be an object"),
        ("5", None, "Input should be an object"),
    ],
)
def test_fail_fast_ends_it_with_the_first_field_that_is_wrong(text: str, taken: str | None, reason: str) -> None:
    reader, at = PartialReader(shape_of(Country), fail_fast=True), 0
    with pytest.raises(Fault) as caught:
        for at, sign in enumerate(text, 1):  # noqa: B007
            reader.feed(sign)
        at = -1
        reader.feed_eof()
    assert str(caught.value) == reason
    assert taken == (None if at == -1 else text[:at])


def test_a_number_or_a_date_may_be_wrong_only_when_it_is_whole() -> None:
    class Ten(BaseModel):
        number: int = Field(ge=10)

    assert partials(Ten, list('{"number": 10}'), fail_fast=True)[-1].value == Ten(number=10)


# -- what it costs --


@pytest.mark.parametrize("model", [Any, Country], ids=["plain", "model"])
@pytest.mark.parametrize("kind", ["cities", "name"])
def test_a_chunk_costs_the_same_however_much_has_come(model: Any, kind: str) -> None:
    """Eight times the answer takes about eight times as long; read again for each chunk it would take 64 times."""

    def seconds(count: int) -> float:
        reader = PartialReader(ANY if model is Any else shape_of(model))
        pieces = ['{"name": "', *["word "] * count] if kind == "name" else ['{"cities": [']
        pieces += ['{"name": "Li', 'ma", "people"', ": 10}, "] * (0 if kind == "name" else count // 3)
        began = time.thread_time()
        for piece in pieces:
            reader.feed(piece)
            reader.changed()
        return time.thread_time() - began

    few, many = min(seconds(300) for _ in range(3)), min(seconds(2400) for _ in range(3))
    assert many < 24 * few


# -- over a connection --


def answering(server: FakeOllama, *pieces: str, **options: Any) -> None:
    server.script("/api/chat", Reply.chat(*pieces, **options))


SPACES = [" \n"] * 1000


async def test_objects_of_a_model(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(TEXT), *SPACES, thinking=["{", "not JSON"])
    async with nothing_left_behind(), AsyncClient(fake_ollama.url, strict=True) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        shown: list[Partial[Country]] = []
        async for partial in stream.objects():
            shown.append(partial)
            if partial.complete:
                # Before the last one is seen.
                saw_leave(fake_ollama)
        assert shown[-1].value == Country.model_validate(PERU)
        assert (stream.outcome, repr(stream.reason)) == ("until", "json_complete()")
        assert stream.response is not None
        assert stream.response.parsed == Country.model_validate(PERU)
        assert len(shown) == 20
        # What is whole stays whole: once more, and it is all there at once.
        again = [partial async for partial in stream.objects()]
        assert [partial.value for partial in again] == [shown[-1].value]


@pytest.mark.parametrize("kind", ["json", {"type": "object"}])
async def test_objects_without_a_model_are_plain(fake_ollama: FakeOllama, kind: Any) -> None:
    answering(fake_ollama, *by_steps(TEXT))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=kind, stream=True)
        shown = [partial.value async for partial in stream.objects()]
        assert shown[-1] == PERU
        assert shown[:2] == [{}, {"name": "Pe"}]


async def test_objects_of_generate(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/generate", Reply.generate(*by_steps(TEXT), *SPACES))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.generate("m", "x", format=Country, stream=True)
        shown = [partial async for partial in stream.objects()]
        saw_leave(fake_ollama)
        assert shown[-1].value == Country.model_validate(PERU)


async def test_items_come_one_by_one_whole_and_valid(fake_ollama: FakeOllama) -> None:
    gates = [Gate(), Gate()]
    frames = [
        {"message": {"role": "assistant", "content": text}, "done": False}
        for text in (
            '{"name": "Peru", "cities": [{"name": "Lima", "people": 1',
            "0}",
            ', {"name": "Cusco", "people": 5}]}',
        )
    ]
    fake_ollama.script("/api/chat", Reply([frames[0], frames[1], gates[0], frames[2], Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        cities: list[City] = []
        async for city in stream.items("cities"):
            cities.append(city)
            gates[0].open()
        saw_leave(fake_ollama)
        assert (
            cities
            == Country.model_validate(
                PERU | {"cities": [City(name="Lima", people=10), City(name="Cusco", people=5)]}
            ).cities
        )
        assert (stream.outcome, repr(stream.reason)) == ("until", "json_complete()")


@pytest.mark.parametrize(
    ("kind", "path", "item", "text", "found"),
    [
        ("json", "", None, "[1, [2], {}]", [1, [2], {}]),
        ("json", "", int, '[1, 2, "3"]', [1, 2, 3]),
        ("json", "a.b", None, '{"a": {"c": [0], "b": [1, 2]}, "b": [3]}', [1, 2]),
        ("json", "a.1", None, '{"a": [[0], [1, 2]]}', [1, 2]),
        ("json", ["a.b"], None, '{"a.b": ["x"]}', ["x"]),
        ("json", "a", None, '{"a": null}', []),
        ("json", "cities", City, TEXT, Country.model_validate(PERU).cities),
        (Names, "", None, '["Ada", "Bob"]', ["Ada", "Bob"]),
        (Country, "cities", None, '{"name": "Peru"}', []),
        (Country, "cities", None, '{"name": "Peru", "cities": []}', []),
        (Country, "cities", None, "null", []),
        (
            Tree,
            "children.0.children",
            None,
            '{"label": "a", "children": [{"label": "b", "children": [{"label": "c"}]}]}',
            [Tree(label="c")],
        ),
        (
            Tree,
            "best.children",
            None,
            '{"label": "a", "best": {"label": "b", "children": [{"label": "c"}]}}',
            [Tree(label="c")],
        ),
    ],
)
async def test_where_items_are_found(
    fake_ollama: FakeOllama, kind: Any, path: Any, item: Any, text: str, found: list[Any]
) -> None:
    answering(fake_ollama, *text)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream: Stream[Any] = client.chat("m", "x", format=kind, stream=True)
        items = stream.items(path, item) if item else stream.items(path)
        assert [each async for each in items] == found


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("name", "items('name'): that field of Country is not a list; give the path of a list"),
        ("", "items(''): that field of Country is not a list; give the path of a list"),
        ("towns", "items('towns'): Country has no 'towns'; it has name, founded, cities"),
        ("cities.0.mayor", "items('cities.0.mayor'): Country has no 'cities.0.mayor'; it has name, people"),
        ("name.x", "items('name.x'): Country has no 'name.x'"),
        (5, "path=5: give keys joined by dots, as 'answer.cities', or a list of keys"),
    ],
)
async def test_a_path_that_is_not_a_list_of_the_model_is_refused_at_once(
    fake_ollama: FakeOllama, path: Any, said: str
) -> None:
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        with pytest.raises(RequestError) as caught:
            stream.items(path)
        assert str(caught.value) == said
    assert not fake_ollama.requests


FAULTS: list[Any] = [
    pytest.param(
        Country, "Sure! Here is the JSON: {}", "the answer does not begin with JSON: 'Sure! ", id="prose before"
    ),
    pytest.param(Country, "```json\n{}\n```", "the answer does not begin with JSON: '```", id="a fence"),
    pytest.param(Country, '{"name": Peru}', "the JSON has 'P", id="not JSON"),
    pytest.param(Country, '{"name": 5}', "name: Input should be a valid string", id="another type"),
    pytest.param(Country, '{"cities": []}', "name: Field required", id="a field that is missing"),
    pytest.param(Country, "[]", "Input should be an object", id="another kind"),
    pytest.param(Country, '{"name": "Peru", "name": "x"}', "the JSON has the key 'name' twice", id="a key twice"),
    pytest.param(Country, "", "the answer has no JSON", id="nothing"),
    pytest.param(Country, '{"name": "Pe', "the answer ends before its JSON is complete", id="half of it"),
    pytest.param("json", "{'a': 1}", "the JSON has \"'", id="Python"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), FAULTS)
@pytest.mark.parametrize("step", [1, 1000])
async def test_what_is_not_the_object_ends_in_a_typed_error(
    fake_ollama: FakeOllama, kind: Any, text: str, reason: str, step: int
) -> None:
    answering(fake_ollama, *by_steps(text, step))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream: Stream[Any] = client.chat("m", "x", format=kind, stream=True)
        with pytest.raises(ParseError) as caught:
            async for _ in stream.objects():
                pass
        error = caught.value
        assert error.reason is not None
        assert error.reason.startswith(reason[:20] if step == 1 else reason)
        assert error.partial is not None
        assert error.partial.text == stream.text == error.text
        assert error.reason in str(error)
        assert text.startswith(error.text)
        assert stream.outcome in ("error", "done")


async def test_prose_behind_the_json_in_its_last_chunk_is_an_error(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, '{"a": ', "1} Is that what you want?", *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format="json", stream=True)
        with pytest.raises(ParseError, match="text follows the JSON: 'Is that what"):
            async for _ in stream.objects():
                pass
        saw_leave(fake_ollama)
        assert (stream.outcome, isinstance(stream.reason, ParseError)) == ("error", True)


async def test_a_number_alone_is_whole_at_the_end_of_the_answer(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, "4", "2")
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        steps = aiter(client.chat("m", "x", format="json", stream=True).objects())
        assert aiter(steps) is steps
        assert [(step.value, step.complete) async for step in steps] == [(42, True)]


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("", "7", "the value at '' is 7, not a list"),
        ("a", "7", "there is no list at 'a'"),
        ("", "[1, 2", "the answer ends before its JSON"),
    ],
)
async def test_items_of_an_answer_that_ends_without_the_list(
    fake_ollama: FakeOllama, path: str, text: str, reason: str
) -> None:
    answering(fake_ollama, text)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        with pytest.raises(ParseError, match=f"{reason}.*; ask again, and tell the model what is wrong"):
            async for _ in client.chat("m", "x", format="json", stream=True).items(path):
                pass


async def test_an_answer_that_is_cut_for_its_length_says_what_to_do(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, '{"name": "Pe', done_reason="length")
    async with AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        with pytest.raises(ParseError, match=r"raise num_predict, or num_ctx") as caught:
            async for _ in stream.objects():
                pass
        assert caught.value.reason == "the answer ends before its JSON is complete"
        assert stream.outcome == "done"


async def test_fail_fast_closes_the_connection_at_the_field(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(SHORT, 1), *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        shown: list[Partial[Country]] = []
        with pytest.raises(ParseError) as caught:
            async for partial in stream.objects(fail_fast=True):
                shown.append(partial)
        saw_leave(fake_ollama)
        assert caught.value.reason == "cities.0.name: String should have at least 2 characters"
        assert caught.value.partial.text == SHORT[: SHORT.index('"L"') + 3]
        assert (stream.outcome, isinstance(stream.reason, ParseError)) == ("error", True)
        assert not stream.abort()
        with pytest.raises(ParseError):
            await anext(stream)
    assert shown[-1].value.name == "Peru"


async def test_an_item_that_is_not_valid_ends_it(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(SHORT.replace('"L"', '"Lima"'), 1), *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        cities: list[City] = []
        with pytest.raises(ParseError) as caught:
            async for city in stream.items("cities"):
                cities.append(city)
        saw_leave(fake_ollama)
        assert caught.value.reason == "cities.1.people: Input should be greater than 0"
        assert cities == [City(name="Lima", people=10)]


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        ('{"a": "text"}', "a", "the value at 'a' is 'text', not a list"),
        ('{"a": {"b": 1}}', "a", "the value at 'a' is an object, not a list"),
        ('{"b": 1}', "a", "there is no list at 'a'"),
        ("{}", "", "the value at '' is an object, not a list"),
    ],
)
async def test_what_is_not_a_list_in_the_answer(fake_ollama: FakeOllama, text: str, path: str, reason: str) -> None:
    answering(fake_ollama, *text)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format="json", stream=True)
        with pytest.raises(ParseError) as caught:
            async for _ in stream.items(path):
                pass
        assert caught.value.reason == reason


class Raising(BaseModel):
    name: Annotated[str, AfterValidator(lambda _: 1 // 0)]


async def test_an_error_in_a_validator_ends_it_and_is_raised(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, '{"name": "x', '"', *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Raising, stream=True)
        with pytest.raises(ZeroDivisionError):
            async for _ in stream.objects():
                pass
        saw_leave(fake_ollama)
        assert stream.outcome == "error"


async def test_an_error_in_a_validator_at_the_end_of_the_answer_is_raised(fake_ollama: FakeOllama) -> None:
    def broken(_: int) -> int:
        raise ZeroDivisionError

    answering(fake_ollama, "42")
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=RootModel[Annotated[int, AfterValidator(broken)]], stream=True)
        with pytest.raises(ZeroDivisionError):
            async for _ in stream.objects():
                pass
        assert stream.outcome == "done"


# -- leaving, stopping --


def both(stream: Stream[Any]) -> list[AsyncIterator[Any]]:
    return [aiter(stream.objects()), aiter(stream.items("cities"))]


@pytest.mark.parametrize("view", ["objects", "items"])
@pytest.mark.parametrize("how", ["break", "raise", "return"])
async def test_leaving_the_loop_closes_the_stream_at_once(fake_ollama: FakeOllama, view: str, how: str) -> None:
    answering(fake_ollama, '{"name": "Peru", "cities": [{"name": "Lima", "people": 1}', *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        kept: Any = stream.objects() if view == "objects" else stream.items("cities")

        async def leave() -> None:
            async for _ in kept:
                if how == "break":
                    break
                if how == "return":
                    return
                raise ZeroDivisionError
            saw_leave(fake_ollama)

        gc.disable()
        try:
            if how == "raise":
                with pytest.raises(ZeroDivisionError):
                    await leave()
            else:
                await leave()
            saw_leave(fake_ollama)
        finally:
            gc.enable()
        assert stream.outcome == "closed"


@pytest.mark.parametrize("view", ["objects", "items"])
async def test_an_abort_ends_the_loop_and_nothing_is_delivered_after_it(fake_ollama: FakeOllama, view: str) -> None:
    answering(
        fake_ollama,
        '{"name": "Peru", "cities": [{"name": "Lima", "people": 1}, {"name": "Cusco", "people": 1}',
        *SPACES,
    )
    token = CancelToken()
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True, token=token)
        got = 0
        with pytest.raises(AbortError) as caught:
            async for _ in stream.objects() if view == "objects" else stream.items("cities"):
                got += 1
                token.abort("me")
                saw_leave(fake_ollama)
        # The second city had come with the first.
        assert got == 1
        assert (caught.value.reason, stream.outcome) == ("me", "aborted")
        assert caught.value.partial.text.startswith('{"name": "Peru"')


@pytest.mark.parametrize("steps", range(4))
async def test_a_cancelled_task_closes_the_stream(fake_ollama: FakeOllama, steps: int) -> None:
    fake_ollama.script("/api/chat", Reply([{"message": {"role": "assistant", "content": "{"}, "done": False}, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        iterator = aiter(stream.objects())
        if steps > 1:
            await anext(iterator)
        task = asyncio.ensure_future(anext(iterator))
        for _ in range(steps % 2):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.outcome == "cancelled"
        if fake_ollama.connections:
            saw_leave(fake_ollama)


async def test_until_ends_the_objects_where_it_ends_the_stream(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(TEXT), *SPACES)
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True, until=max_chars(20))
        shown = [partial async for partial in stream.objects()]
        saw_leave(fake_ollama)
        assert (stream.outcome, repr(stream.reason), shown[-1].complete) == ("until", "max_chars(20)", False)


async def test_a_second_reader_is_turned_away(fake_ollama: FakeOllama) -> None:
    fake_ollama.script("/api/chat", Reply([{"message": {"role": "assistant", "content": "{"}, "done": False}, Stall()]))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        first = aiter(stream.objects())
        await anext(first)
        waiting = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0)
        with pytest.raises(StreamBusy):
            await anext(stream)
        assert not waiting.done()
        await stream.aclose()
        with pytest.raises(Exception, match="closed"):
            await asyncio.wait_for(waiting, BOUND)


async def test_what_was_read_before_is_a_part_of_the_object(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(TEXT, 10))
    async with nothing_left_behind(), AsyncClient(fake_ollama.url) as client:
        stream = client.chat("m", "x", format=Country, stream=True)
        await anext(stream)
        shown = [partial.value async for partial in stream.objects()]
        assert shown[-1] == Country.model_validate(PERU)


async def test_the_stream_of_a_pool(fake_ollama: FakeOllama) -> None:
    answering(fake_ollama, *by_steps(TEXT), *SPACES)
    answering(fake_ollama, *by_steps(SHORT), *SPACES)
    answering(fake_ollama, *by_steps(TEXT), *SPACES)
    async with nothing_left_behind(), Pool([fake_ollama.url], models=["m"], slots=1) as pool:
        stream = pool.chat("m", "x", format=Country, stream=True)
        shown = [partial async for partial in stream.objects()]
        saw_leave(fake_ollama)
        assert (shown[-1].value, stream.outcome) == (Country.model_validate(PERU), "until")
        # The slot has been given back: the next call gets it.
        stream = pool.chat("m", "x", format=Country, stream=True)
        with pytest.raises(ParseError):
            async for _ in stream.objects(fail_fast=True):
                pass
        assert stream.outcome == "error"
        stream = pool.chat("m", "x", format=Country, stream=True)
        assert [city.name async for city in stream.items("cities")] == ["Lima", "Cusco"]


class Cat(BaseModel):
    kind: Literal["cat"]
    name: str


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    nick: Annotated[str, StringConstraints(min_length=1)] | None = None


Names = TypeAliasType("Names", list[str])


def test_a_union_with_a_discriminator_is_shown_when_it_is_whole() -> None:
    value = {"pet": {"kind": "dog", "name": "Rex"}, "nick": "R"}
    last = partials(Owner, by_steps(json.dumps(value)))[-1]
    assert last.value == Owner.model_validate(value)


@pytest.mark.parametrize(
    ("model", "value"),
    [
        (RootModel[Country], PERU),
        (RootModel[Annotated[list[str], Field(min_length=1)]], ["a"]),
        (RootModel[Names], ["a"]),
    ],
)
def test_what_a_root_model_wraps_is_shown_as_it_grows(model: Any, value: Any) -> None:
    reader = PartialReader(shape_of(model))
    container = shape_of(model).container("{" if isinstance(value, dict) else "[")
    assert container is not None
    assert container.parts() == ([*Country.model_fields] if isinstance(value, dict) else None)
    reader.feed(json.dumps(value))
    last = reader.changed()
    assert last is not None
    assert last.value == model.model_validate(value)


def test_random_objects_in_random_pieces() -> None:
    made = random.Random(3)
    for _ in range(60):
        cities = [
            {"name": "x" * made.randrange(2, 9), "people": made.randrange(1, 10**6)} for _ in range(made.randrange(5))
        ]
        text = json.dumps({"name": "n\u00e9\n" * made.randrange(5), "cities": cities}, indent=made.choice([None, 1]))
        cuts = sorted(made.choices(range(len(text)), k=12))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = partials(Country, pieces)
        for before, after in itertools.pairwise(found):
            assert grown(before.value, after.value)
        assert found[-1].value == Country.model_validate_json(text)


def test_json_that_is_broken_never_shows_less(  # the reader stops where it is wrong
) -> None:
    reader = PartialReader(shape_of(Country))
    with pytest.raises(JsonFault):
        for sign in TEXT[:40] + "}]":
            reader.feed(sign)
