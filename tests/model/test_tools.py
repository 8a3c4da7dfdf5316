"""Tools: what becomes of functions, pydantic models and dicts."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import httpx
import pytest
import respx
from pydantic import BaseModel, Field, WithJsonSchema

from ollama_async import AsyncClient, Message, RequestError, Tool, convert_function_to_tool, tool_schema

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    """A place."""

    x: float = Field(description="to the right", ge=0)
    title: str = "t"


class Node(BaseModel):
    value: int
    children: list[Node] = []


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


@dataclass
class Size:
    width: int
    height: int = 1


POINT = {
    "type": "object",
    "description": "A place.",
    "properties": {
        "x": {"type": "number", "description": "to the right", "minimum": 0},
        "title": {"type": "string", "default": "t"},
    },
    "required": ["x"],
}
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "default": []},
    },
    "required": ["value"],
}


def parameters(tool: Any) -> dict[str, Any]:
    schema: dict[str, Any] = tool_schema(tool)["function"]["parameters"]
    return schema


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (int, {"type": "integer"}),
        (Any, {}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a"], {"type": "string", "enum": ["a"]}),
        (Color, {"type": "string", "enum": ["red", "blue"]}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Point, POINT),
        (list[Point], {"type": "array", "items": POINT}),
        (Point | None, {"anyOf": [POINT, {"type": "null"}]}),
        (
            Size,
            {
                "type": "object",
                "properties": {"width": {"type": "integer"}, "height": {"type": "integer", "default": 1}},
                "required": ["width"],
            },
        ),
        (
            Annotated[Cat | Dog, Field(discriminator="kind")],
            {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"type": "string", "enum": [kind]}},
                        "required": ["kind"],
                    }
                    for kind in ("cat", "dog")
                ]
            },
        ),
        (
            Annotated[int, Field(description="how many", ge=1, le=9)],
            {"type": "integer", "description": "how many", "minimum": 1, "maximum": 9},
        ),
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
    ],
)
def test_types(hint: Any, schema: dict[str, Any]) -> None:
    def function(value: Any) -> None: ...

    function.__annotations__["value"] = hint
    assert parameters(function) == {"type": "object", "properties": {"value": schema}, "required": ["value"]}


def test_a_type_that_contains_itself_stays_a_reference() -> None:
    def grow(tree: Node, trees: list[Node] | None = None) -> None: ...

    reference = {"$ref": "#/$defs/Node"}
    assert parameters(grow) == {
        "type": "object",
        "properties": {
            "tree": reference,
            "trees": {"anyOf": [{"type": "array", "items": reference}, {"type": "null"}]},
        },
        "required": ["tree"],
        "$defs": {"Node": NODE},
    }


def test_defaults() -> None:
    strange = object()

    def function(
        a: int, b: int = 3, c: Any = None, d: Any = strange, *more: int, e: Color = Color.RED, **rest: int
    ) -> None: ...

    assert parameters(function) == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "default": 3},
            "c": {},
            "d": {},
            "e": {"type": "string", "enum": ["red", "blue"], "default": "red"},
        },
        "required": ["a"],
    }


def google(city: str, days: int = 1) -> str:
    """Tell the weather.

    From today on.

    Args:
        city: The city,
            not the country.
        days (int): How many days.

    Returns:
        A text.
    """
    return city * days


def numpy(city: str, days: int = 1) -> str:
    """Tell the weather.

    From today on.

    Parameters
    ----------
    city : str
        The city,
        not the country.
    days : int, optional
        How many days.

    Returns
    -------
    str
        A text.
    """
    return city * days


def sphinx(city: str, days: int = 1) -> str:
    """Tell the weather.

    From today on.

    :param city: The city,
        not the country.
    :param int days: How many days.
    :returns: A text.
    """
    return city * days


@pytest.mark.parametrize("function", [google, numpy, sphinx])
def test_docstrings(function: Any) -> None:
    assert tool_schema(function) == {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": "Tell the weather.\n\nFrom today on.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city, not the country."},
                    "days": {"type": "integer", "description": "How many days.", "default": 1},
                },
                "required": ["city"],
            },
        },
    }


def test_which_description_wins() -> None:
    def function(a: Annotated[int, Field(description="field")], b: Point, c: Point) -> None:
        """Do.

        Args:
            a: docstring
            b: docstring
        """

    properties = parameters(function)["properties"]
    assert [properties[name]["description"] for name in "abc"] == ["field", "docstring", "A place."]


class Robot:
    """A robot."""

    def move(self, steps: int) -> None:
        """Move it."""

    @classmethod
    def build(cls, kind: str) -> None:
        """Build one."""

    @staticmethod
    def static(word: str) -> None:
        """Need none."""

    def __call__(self, word: str) -> None:
        """Obey."""


async def asynchronous(city: str) -> None:
    """Wait."""


@pytest.mark.parametrize(
    ("tool", "name", "description", "names"),
    [
        (Robot().move, "move", "Move it.", ["steps"]),
        (Robot.build, "build", "Build one.", ["kind"]),
        (Robot(), "Robot", "Obey.", ["word"]),
        (asynchronous, "asynchronous", "Wait.", ["city"]),
        (functools.partial(google, days=2), "google", "Tell the weather.\n\nFrom today on.", ["city"]),
        (functools.partial(google, "Rome"), "google", "Tell the weather.\n\nFrom today on.", ["days"]),
    ],
)
def test_what_can_be_called(tool: Any, name: str, description: str, names: list[str]) -> None:
    function = tool_schema(tool)["function"]
    assert (function["name"], function["description"]) == (name, description)
    assert list(function["parameters"]["properties"]) == names


def test_a_function_without_anything() -> None:
    def nothing() -> None: ...

    assert tool_schema(nothing) == {
        "type": "function",
        "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}},
    }


def test_pydantic_models() -> None:
    about = {key: value for key, value in POINT.items() if key != "description"}
    assert tool_schema(Point) == {
        "type": "function",
        "function": {"name": "Point", "description": "A place.", "parameters": about},
    }
    assert parameters(Node) == {**NODE, "$defs": {"Node": NODE}}


def test_what_is_given_as_schema_goes_as_it_is() -> None:
    given = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "x", "title": "t"}}, "new": None}
    assert tool_schema(given) == given
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "$defs": {"x": {}},
                "properties": {"a": {"type": ["string", "null"], "minimum": 1}},
            },
        },
        "strict": True,
    }
    assert tool_schema(Tool.model_validate(tool)) == tool


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (google, "tools=function: give a list"),
        ("google", "tools=str: give a list"),
        ({"type": "function"}, "tools=dict: give a list"),
        ([google, 1], r"tools\[1\]: 1 is not a tool"),
        ([int], r"tools\[0\]: .* is not a tool"),
        ([lambda city: city], r"tools\[0\]: .* cannot be the name of a tool"),
    ],
)
async def test_an_invalid_tool_is_refused(tools: Any, says: str) -> None:
    async with AsyncClient() as client:
        with pytest.raises(RequestError, match=says):
            await client.chat("m", "x", tools=tools, stream=True)


def test_a_type_without_a_schema_is_named() -> None:
    def function(fine: int, bad: inspect.Signature) -> None: ...

    with pytest.raises(RequestError, match=r"the parameter 'bad' of function\(\)"):
        tool_schema(function)

    def unknown(bad: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(RequestError, match=r"the parameters of unknown\(\) cannot be read: bad: .*Missing"):
        tool_schema(unknown)


def test_only_what_is_sent_has_to_be_a_type() -> None:
    def method(self: Nothing, city: str, /, *more: Nothing, days: Nothing = 1, **rest: Nothing) -> Nothing: ...

    bound = functools.partial(method, object(), days=2)
    assert parameters(bound)["properties"] == {"city": {"type": "string"}}


@pytest.mark.parametrize("text", ["(", "Missing", "dt.missing", "1 / 0", "dt.date[5]", "[][0]"])
def test_an_annotation_that_is_not_a_type_is_named(text: str) -> None:
    def function(fine: int, bad: Any) -> None: ...

    function.__annotations__["bad"] = text
    with pytest.raises(RequestError, match=r"parameters of function\(\) cannot be read: bad: "):
        tool_schema(function)


@pytest.mark.parametrize(
    "hint",
    [
        Annotated[dt.date, Field(ge=1)],
        Annotated[int | str, Field(discriminator="kind")],
        Annotated[str, Field(pattern="(")],
        inspect.Signature,
    ],
)
async def test_an_error_of_pydantic_is_a_request_error(hint: Any) -> None:
    def function(bad: Any) -> None: ...

    function.__annotations__["bad"] = hint
    for compat in (False, True):
        async with AsyncClient(compat=compat) as client:
            with pytest.raises(RequestError, match=r"tools\[0\]"):
                await client.chat("m", "x", tools=[function], stream=True)


def test_a_method_without_its_object_is_refused() -> None:
    with pytest.raises(RequestError, match=r"move\(\) is a method of Robot, .*give Robot\(...\).move"):
        tool_schema(Robot.move)
    with pytest.raises(RequestError, match="is a method of str"):
        tool_schema(str.upper)
    assert list(parameters(functools.partial(Robot.move, Robot()))["properties"]) == ["steps"]
    assert list(parameters(Robot.static)["properties"]) == ["word"]

    def function(self: int) -> None: ...

    assert list(parameters(function)["properties"]) == ["self"]


def test_enumerated_keys() -> None:
    def paint(weights: dict[Color, float], points: dict[Literal["a"], Point]) -> None: ...

    properties = parameters(paint)["properties"]
    assert "$ref" not in json.dumps(properties)
    assert properties["weights"]["propertyNames"]["enum"] == ["red", "blue"]


def node_of_others() -> type[BaseModel]:
    class Node(BaseModel):
        word: str
        below: list[Node] = []

    Node.model_rebuild(_types_namespace={"Node": Node})
    return Node


def test_two_classes_of_one_name_keep_their_schemas() -> None:
    def grow(a: Any, b: Any, c: Any, d: Any) -> None: ...

    other = node_of_others()
    grow.__annotations__ |= {"a": Node, "b": other, "c": list[Node], "d": other}
    schema = parameters(grow)
    reference, another = {"$ref": "#/$defs/Node"}, {"$ref": "#/$defs/Node_2"}
    assert schema["properties"] == {
        "a": reference,
        "b": another,
        "c": {"type": "array", "items": reference},
        "d": another,
    }
    assert schema["$defs"]["Node"] == NODE
    assert schema["$defs"]["Node_2"]["properties"]["below"] == {"type": "array", "items": another, "default": []}


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("neither equal nor not")

    __hash__ = None  # type: ignore[assignment]


class Numbers(BaseModel):
    most: float = float("inf")
    least: Annotated[float, Field(ge=float("-inf"))] = 0.0


@pytest.mark.parametrize(
    "default",
    [float("nan"), float("inf"), [1, float("inf")], b"\xff", "\ud800", len, Incomparable(), {"a": {float("nan")}}],
    ids=["nan", "inf", "list", "bytes", "surrogate", "function", "incomparable", "nested"],
)
def test_a_default_that_json_does_not_have_is_left_out(default: Any) -> None:
    def function(a: Any = default, b: int = 1) -> None: ...

    assert parameters(function)["properties"] == {"a": {}, "b": {"type": "integer", "default": 1}}
    assert "required" not in parameters(function)


def test_numbers_that_json_does_not_have_are_left_out_within_models() -> None:
    def function(a: Numbers, b: Annotated[float, Field(le=float("inf"))]) -> None: ...

    properties = parameters(function)["properties"]
    assert properties["b"] == {"type": "number"}
    for schema in (properties["a"], parameters(Numbers)):
        assert schema["properties"] == {
            "most": {"type": "number"},
            "least": {"type": "number", "default": 0.0},
        }


def test_what_somebodys_own_schema_refers_to_stays() -> None:
    own = {"$ref": "https://example.com/point", "not": {"title": "t", "type": "null"}, "if": True}

    def function(a: Any) -> None: ...

    function.__annotations__["a"] = Annotated[Any, WithJsonSchema(own)]
    assert parameters(function)["properties"]["a"] == {**own, "not": {"type": "null"}}


# -- as ollama-python does it --


def legacy(
    a: int,
    b: str = "x",
    c: Optional[int] = None,  # noqa: UP045
    d: int | str = 1,
    e: list[int] | None = None,
    f: Any = None,
) -> None:
    """Do it.

    Slowly.

    Args:
        a (integer): the first
          goes on
        b: the second: with a colon
        d : spaced

    Returns:
        Nothing.
    """


legacy.__annotations__ = {
    "a": int,
    "b": str,
    "c": Optional[int],  # noqa: UP045
    "d": int | str,
    "e": list[int] | None,
    "f": inspect.Parameter.empty,
}


def test_the_old_converter() -> None:
    def field(kind: str, description: str = "") -> dict[str, Any]:
        return {"type": kind, "items": None, "description": description, "enum": None}

    assert convert_function_to_tool(legacy).model_dump() == {
        "type": "function",
        "function": {
            "name": "legacy",
            "description": "Do it.\n\nSlowly.",
            "parameters": {
                "type": "object",
                "defs": None,
                "items": None,
                "required": ["a", "b", "d", "f"],
                "properties": {
                    "a": field("integer", "the first goes on"),
                    "b": field("string", "the second: with a colon"),
                    "c": field("integer"),
                    "d": field("integer, string", "spaced"),
                    "e": field("array"),
                    "f": field("string"),
                },
            },
        },
    }


# -- over the wire --


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(assert_all_called=False)


@pytest.fixture
async def clients(router: respx.MockRouter) -> AsyncIterator[tuple[AsyncClient, AsyncClient]]:
    transport = httpx.MockTransport(router.async_handler)
    async with AsyncClient(transport=transport) as new, AsyncClient(transport=transport, compat=True) as old:
        yield new, old


async def test_what_chat_sends(router: respx.MockRouter, clients: tuple[AsyncClient, AsyncClient]) -> None:
    call = {"id": "call_1", "function": {"index": 0, "name": "google", "arguments": {"city": "Rome"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    router.post("/api/chat").respond(json={"message": message, "done": True})
    new, old = clients
    reply = await new.chat("m", "x", tools=[google, Point])
    assert json.loads(router.calls.last.request.content)["tools"] == [tool_schema(google), tool_schema(Point)]
    assert reply.message.tool_calls is not None
    assert reply.message.tool_calls[0].id == "call_1"
    result = Message(role="tool", content="sun", tool_name="google", tool_call_id=reply.message.tool_calls[0].id)
    await old.chat("m", [reply.message, result], tools=[google])
    sent = json.loads(router.calls.last.request.content)
    assert sent["tools"] == [convert_function_to_tool(google).model_dump(exclude_none=True)]
    assert sent["messages"] == [
        message,
        {"role": "tool", "content": "sun", "tool_name": "google", "tool_call_id": "call_1"},
    ]
