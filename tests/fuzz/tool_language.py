"""Functions as text, so that any bytes are one: what the fuzzing of tools is fed.

The first line is the function's name. Then a line for each parameter: its name (``*name`` and ``**name`` as in Python,
``/name`` by position only, ``!name`` by keyword only), its type in postfix notation, and perhaps ``=`` and a default.
An empty line ends them, the rest is the docstring. Words that mean nothing are left out::

    weather
    city str
    days int list opt = none

    Tell the weather.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import inspect
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, Field, create_model

__all__ = ["WORDS", "Unreadable", "read_function", "without_others"]


class Unreadable(Exception):
    """The text is no function of Python."""


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Only(enum.Enum):
    ONE = "one"


class Point(BaseModel):
    """A place."""

    x: float = Field(description="to the right", ge=0)
    title: str = "t"


class Node(BaseModel):
    """One of three classes with this name."""

    value: int
    children: list[Node] = []


class Other:
    class Node(BaseModel):
        """The other one."""

        word: str
        below: list[Other.Node] = []


Other.Node.model_rebuild()
OtherNode = create_model("Node", __doc__="The third.", word=(str, ...), inner=(Node | None, None))


class Incomparable:
    """As an array of numpy is."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise ValueError("it is neither equal nor not")


class Mixed(BaseModel):
    """Fields that look like parts of a schema."""

    model_config = ConfigDict(extra="forbid")

    const: Literal["c"] = "c"
    properties: dict[str, int] = {}
    ref: str = Field(default="", alias="$ref")
    defs: int = Field(default=0, alias="$defs")
    colors: dict[Color, Point] = {}


class Even(BaseModel):
    odd: Odd | None = None


class Odd(BaseModel):
    even: Even | None = None


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]
    friend: Cat | Dog | None = None


@dataclass
class Size:
    width: int
    height: Level = Level.LOW


class Pair(NamedTuple):
    left: int
    right: Color = Color.RED


class Row(TypedDict, total=False):
    name: str
    rows: list[Row]


TYPES: dict[str, Any] = {
    "int": int,
    "str": str,
    "float": float,
    "bool": bool,
    "bytes": bytes,
    "none": None,
    "any": Any,
    "object": object,
    "list": list,
    "dict": dict,
    "color": Color,
    "level": Level,
    "only": Only,
    "point": Point,
    "node": Node,
    "othernode": OtherNode,
    "othertree": Other.Node,
    "mixed": Mixed,
    "even": Even,
    "cat": Cat,
    "dog": Dog,
    "size": Size,
    "pair": Pair,
    "row": Row,
    "date": dt.date,
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "nothing": inspect.Signature,
    "call": Callable[[int], int],
    "'int'": "int",
    "'missing'": "Missing",
    "'('": "(",
}
ONE: dict[str, Callable[[Any], Any]] = {
    "listof": lambda kind: list[kind],
    "setof": lambda kind: set[kind],
    "seq": lambda kind: Sequence[kind],
    "opt": lambda kind: typing.Optional[kind],  # noqa: UP045
    "many": lambda kind: tuple[kind, ...],
    "said": lambda kind: Annotated[kind, "what it is"],
    "saidnothing": lambda kind: Annotated[kind, ""],
    "field": lambda kind: Annotated[kind, Field(description="a field", ge=1)],
    "fielddefault": lambda kind: Annotated[kind, Field(default=1)],
    "titled": lambda kind: Annotated[kind, Field(title="T", examples=[{"a": 1}], json_schema_extra={"const": 1})],
}
TWO: dict[str, Callable[[Any, Any], Any]] = {
    "dictof": lambda key, value: dict[key, value],
    "or": lambda one, other: typing.Union[one, other],  # noqa: UP007
    "tupleof": lambda one, other: tuple[one, other],
    "kindof": lambda one, other: Annotated[typing.Union[one, other], Field(discriminator="kind")],  # noqa: UP007
}
DEFAULTS: dict[str, Any] = {
    "none": None,
    "1": 1,
    "text": "text",
    "nan": float("nan"),
    "inf": float("inf"),
    "object": object(),
    "bytes": b"\xff",
    "red": Color.RED,
    "point": Point(x=1),
    "list": [1, "a"],
    "dict": {1: 2},
    "set": {1},
    "function": len,
    "ellipsis": ...,
    "surrogate": "\ud800",
    "incomparable": Incomparable(),
}
WORDS = [*TYPES, *ONE, *TWO, "literal", "="]


def read_function(text: str) -> Any:
    """Make the function that a text describes; raises ``Unreadable``."""
    head, _, docstring = text.partition("\n\n")
    name, *lines = head.split("\n")[:8]
    parameters = [_read_parameter(line) for line in lines if line.strip()]
    # In the order that Python demands.
    parameters.sort(key=lambda p: (p.kind, p.kind < p.VAR_POSITIONAL and p.default is not p.empty))
    return _made(name, parameters, docstring)


def without_others(function: Any) -> Iterator[tuple[str, Any]]:
    """Make of a function one for each of its parameters, which has nothing but that."""
    for parameter in function.__signature__.parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield parameter.name, _made(function.__name__, [parameter], function.__doc__)


def _made(name: str, parameters: list[inspect.Parameter], docstring: str) -> Any:
    def function() -> None: ...

    try:
        signature = inspect.Signature(parameters)
    except ValueError as exc:
        raise Unreadable(str(exc)) from exc
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
    function.__doc__ = docstring
    function.__name__ = name
    return function


KINDS = {
    "**": inspect.Parameter.VAR_KEYWORD,
    "*": inspect.Parameter.VAR_POSITIONAL,
    "/": inspect.Parameter.POSITIONAL_ONLY,
    "!": inspect.Parameter.KEYWORD_ONLY,
    "": inspect.Parameter.POSITIONAL_OR_KEYWORD,
}


def _read_parameter(line: str) -> inspect.Parameter:
    declared, _, default = line.partition("=")
    name, *words = declared.split() or [""]
    sign = next(sign for sign in KINDS if name.startswith(sign))
    hint = _read_hint(words)
    given = DEFAULTS.get(default.strip(), inspect.Parameter.empty)
    if KINDS[sign] in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
        given = inspect.Parameter.empty
    try:
        return inspect.Parameter(name.removeprefix(sign), KINDS[sign], default=given, annotation=hint)
    except (ValueError, IndexError) as exc:
        raise Unreadable(str(exc)) from exc


def _read_hint(words: list[str]) -> Any:
    stack: list[Any] = []
    for word in words[:12]:
        try:
            if word in TYPES:
                stack.append(TYPES[word])
            elif word in ONE and stack:
                stack.append(ONE[word](stack.pop()))
            elif word in TWO and len(stack) > 1:
                second = stack.pop()
                stack.append(TWO[word](stack.pop(), second))
            elif word == "literal":
                stack.append(Literal["a", 1, Color.RED])
        except (TypeError, SyntaxError):
            # Not even Python takes it for a type.
            continue
    return stack[-1] if stack else inspect.Parameter.empty
