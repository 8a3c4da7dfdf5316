"""Tools: functions and pydantic models, turned into the JSON schemas that a model reads."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import pydantic_core
from pydantic import BaseModel, Field, PydanticUserError, TypeAdapter

from ollama_async._errors import RequestError

from .input import sequence
from .types import Model


class Tool(Model):
    """A tool that a model may call, in the form of ollama-python."""

    class Function(Model):
        """A function."""

        class Parameters(Model):
            """Its parameters."""

            class Property(Model):
                """One of them."""

                type: str | Sequence[str] | None = None
                """Kind of value, or kinds."""
                items: Any | None = None
                """Of a list: schema of its items."""
                description: str | None = None
                """What it is."""
                enum: Sequence[Any] | None = None
                """The values that are allowed."""

            type: Literal["object"] | None = "object"
            """Always this."""
            defs: Any | None = Field(default=None, alias="$defs")
            """Schemas that others refer to."""
            items: Any | None = None
            """Not used."""
            required: Sequence[str] | None = None
            """Names of those that must be given."""
            properties: Mapping[str, Property] | None = None
            """The parameters by name."""

        name: str | None = None
        """Its name."""
        description: str | None = None
        """What it does."""
        parameters: Parameters | None = None
        """Its parameters."""

    type: str | None = "function"
    """Always this."""
    function: Function | None = None
    """The function."""


def encode_tools(given: Any, *, legacy: bool = False) -> list[dict[str, Any]]:
    """Turn the tools of a chat into JSON schemas.

    Args:
        given: Functions, pydantic models, ``Tool``, or schemas as dicts.
        legacy: Whether functions are turned as ollama-python does.

    Raises:
        RequestError: There is something else among them, or something that no schema can be made of.
    """
    if given is None:
        return []
    return [_encode_tool(tool, place, legacy=legacy) for place, tool in enumerate(sequence(given, "tools"))]


def _encode_tool(tool: Any, place: int, *, legacy: bool) -> dict[str, Any]:
    try:
        if legacy and inspect.isroutine(tool):
            return convert_function_to_tool(tool).model_dump(exclude_none=True)
        return tool_schema(tool)
    except RequestError as exc:
        raise RequestError(f"tools[{place}]: {exc}") from exc


def tool_schema(tool: Any, /) -> dict[str, Any]:
    """Return the JSON schema of a tool, as the server takes it.

    References are resolved, since the server drops them, unless a type contains itself. Parameters such as ``*args``
    and ``**kwargs``, and those that a ``functools.partial`` has filled in, are not the model's.

    Args:
        tool: A function (its docstring, in the style of Google, NumPy or Sphinx, describes it and its parameters), a
            method, an object that can be called, a pydantic model class, a ``Tool``, or a schema as a dict.

    Raises:
        RequestError: It is none of these, or a parameter is of a type that has no JSON schema.
    """
    if isinstance(tool, BaseModel):
        return tool.model_dump(exclude_none=True, by_alias=True)
    if isinstance(tool, Mapping):
        return dict(cast("Mapping[str, Any]", tool))
    if isinstance(tool, type) and issubclass(tool, BaseModel):
        return _model_schema(tool)
    if isinstance(tool, type) or not callable(tool):
        raise RequestError(f"{tool!r} is no tool: give a function, a pydantic model class, or a JSON schema as a dict")
    return _function_schema(tool)


def _tool(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    return {"type": "function", "function": {**function, "parameters": parameters}}


def _model_schema(model: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = model.model_json_schema()
    except PydanticUserError as exc:
        raise RequestError(f"{model.__name__} has no JSON schema: {exc.message}") from exc
    definitions = schema.get("$defs", {})
    resolved = _Resolver(definitions)
    # Of a model that contains itself the schema is but a reference.
    parameters = resolved(definitions[schema["$ref"].removeprefix(_DEFINITIONS)] if "$ref" in schema else schema)
    description = parameters.pop("description", "")
    return _tool(model.__name__, description, {"type": "object", "properties": {}, **parameters, **resolved.kept()})


# -- functions --


def _function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    inner, filled = _unfilled(function)
    name, code = _name(inner), _code_of(inner)
    description, described = _read_docstring(inspect.getdoc(code) or "")
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    required: list[str] = []
    for parameter, hint in _parameters(function, code, name):
        if parameter.name in filled:
            continue
        schema, kept = _parameter_schema(parameter, hint, name)
        definitions |= kept
        said = _description(hint) or described.get(parameter.name)
        if said:
            schema["description"] = said
        properties[parameter.name] = schema
        if parameter.default is inspect.Parameter.empty and "default" not in schema:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    if definitions:
        parameters["$defs"] = definitions
    return _tool(name, description, parameters)


def _unfilled(function: Any) -> tuple[Any, set[str]]:
    """Return what is inside of ``functools.partial``, and the names of the parameters that are filled in there."""
    filled: set[str] = set()
    while isinstance(function, functools.partial):
        filled.update(function.keywords)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        function = function.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return function, filled  # pyright: ignore[reportUnknownVariableType]


def _code_of(function: Any) -> Any:
    """Return what has the annotations and the docstring."""
    return function if inspect.isroutine(function) else type(function).__call__


def _name(function: Any) -> str:
    name = str(getattr(function, "__name__", type(function).__name__))
    if not name.isidentifier():
        raise RequestError(f"a tool needs a name, and {name} is none: give a function made with def")
    return name


def _parameters(function: Callable[..., Any], code: Any, name: str) -> Iterator[tuple[inspect.Parameter, Any]]:
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(code, include_extras=True)
    except (ValueError, TypeError, NameError) as exc:
        raise RequestError(f"the parameters of {name}() cannot be read: {exc}") from exc
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield parameter, hints.get(parameter.name, Any)


def _parameter_schema(parameter: inspect.Parameter, hint: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a parameter, and the schemas that it still refers to."""
    try:
        schema = TypeAdapter(hint).json_schema()
    except PydanticUserError as exc:
        raise RequestError(
            f"the parameter {parameter.name!r} of {name}() is of a type that has no JSON schema: {exc.message}"
        ) from exc
    resolver = _Resolver(schema.get("$defs", {}))
    resolved = resolver(schema)
    if parameter.default not in (inspect.Parameter.empty, None):
        try:
            resolved["default"] = pydantic_core.to_jsonable_python(parameter.default)
        except pydantic_core.PydanticSerializationError:
            # It cannot be told to the model, which may leave the parameter out all the same.
            resolved.pop("default", None)
    return resolved, resolver.kept().get("$defs", {})


def _description(hint: Any) -> str | None:
    """Return what ``Annotated`` says of a parameter: ``Field(description=...)``, or a plain text."""
    for said in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
        text = said if isinstance(said, str) else getattr(said, "description", None)
        if text:
            return str(text)
    return None


_DEFINITIONS = "#/$defs/"


class _Resolver:
    """Puts what a schema refers to in place of the references, and leaves out what is of no use to a model."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._recursive = {name for name in definitions if name in self._reached(definitions[name], set())}
        self._used: set[str] = set()

    def __call__(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the schema without references, but for those to types that contain themselves."""
        resolved: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "$ref":
                resolved = {**self._refer(value), **resolved}
            elif key == "const":
                resolved["enum"] = [value]
            elif key in ("oneOf", "anyOf", "allOf", "prefixItems"):
                resolved["anyOf" if key == "oneOf" else key] = [self(part) for part in value]
            elif key in ("properties", "patternProperties"):
                resolved[key] = {name: self(part) for name, part in value.items()}
            elif key in ("items", "additionalProperties") and isinstance(value, Mapping):
                resolved[key] = self(cast("Mapping[str, Any]", value))
            elif key not in ("title", "$defs", "discriminator"):
                resolved[key] = value
        return resolved

    def kept(self) -> dict[str, Any]:
        """Return the ``$defs`` of the references that are left."""
        definitions: dict[str, Any] = {}
        while self._used - set(definitions):
            name = min(self._used - set(definitions))
            definitions[name] = self(self._definitions[name])
        return {"$defs": definitions} if definitions else {}

    def _refer(self, reference: str) -> dict[str, Any]:
        name = reference.removeprefix(_DEFINITIONS)
        if name in self._recursive:
            self._used.add(name)
            return {"$ref": reference}
        return self(self._definitions[name])

    def _reached(self, node: Any, seen: set[str]) -> set[str]:
        """Return the names of all definitions that a part of a schema refers to, directly or not."""
        if isinstance(node, Mapping):
            mapping = cast("Mapping[str, Any]", node)
            reference = mapping.get("$ref")
            if isinstance(reference, str):
                name = reference.removeprefix(_DEFINITIONS)
                if name not in seen:
                    seen.add(name)
                    self._reached(self._definitions.get(name), seen)
            for value in mapping.values():
                self._reached(value, seen)
        elif isinstance(node, list):
            for value in node:  # pyright: ignore[reportUnknownVariableType]
                self._reached(value, seen)
        return seen


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of a function, and of its parameters by name."""
    # It is not free to import, and few calls have tools.
    import docstring_parser

    try:
        parsed = docstring_parser.parse(text)
    except docstring_parser.ParseError:
        return text, {}
    about = [part for part in (parsed.short_description, parsed.long_description) if part]
    described = {
        parameter.arg_name: " ".join(parameter.description.split())
        for parameter in parsed.params
        if parameter.description
    }
    return "\n\n".join(about), described


# -- as ollama-python does it --


def convert_function_to_tool(func: Callable[..., Any]) -> Tool:
    """Turn a function into a tool exactly as ollama-python does.

    That loses enumerations, items of lists, nested models and defaults, and takes a parameter with a default for
    required; ``tool_schema`` does not.

    Args:
        func: The function; its docstring is in the style of Google.
    """
    about, described = _read_legacy_docstring(inspect.getdoc(func) or "")
    annotations = {
        name: str if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        for name, parameter in inspect.signature(func).parameters.items()
    }
    namespace = {"__annotations__": annotations, "__doc__": about, "__module__": func.__module__}
    schema = cast("type[BaseModel]", type(func.__name__, (BaseModel,), namespace)).model_json_schema()
    for name, field in schema.get("properties", {}).items():
        parts = field.get("anyOf") or [field]
        # In the order that they are written in, each once.
        types = list(dict.fromkeys(part.get("type", "string") for part in parts))
        if "null" in types:
            schema["required"].remove(name)
            types.remove("null")
        schema["properties"][name] = {"description": described.get(name, ""), "type": ", ".join(types)}
    parameters = {key: schema[key] for key in ("type", "$defs", "items", "required", "properties") if key in schema}
    function = {"name": func.__name__, "description": schema.get("description", ""), "parameters": parameters}
    return Tool.model_validate({"type": "function", "function": function})


_LEGACY_ENDS = ("returns:", "yields:", "raises:")


def _read_legacy_docstring(text: str) -> tuple[str, dict[str, str]]:
    about: list[str] = []
    arguments: list[str] = []
    section: list[str] = about
    for line in text.splitlines():
        start = line.lower().strip()
        if start.startswith("args:"):
            section = arguments
        elif start.startswith(_LEGACY_ENDS):
            section = []
        else:
            section.append(line.strip())
    described: dict[str, str] = {}
    last = ""
    for line in arguments:
        name, found, rest = _split_legacy(line)
        if found:
            last = name
            described[last] = rest
        elif last and line:
            described[last] += f" {line}"
    return "".join(f"{line}\n" for line in about), described


def _split_legacy(line: str) -> tuple[str, bool, str]:
    """Split ``name (type): text`` or ``name: text``."""
    if ":" not in line:
        return "", False, ""
    colon, opened = line.find(":"), line.find("(")
    closed = line.find(")", opened) if opened >= 0 else -1
    if closed < 0 or colon < opened:
        return line[:colon].strip(), True, line[colon + 1 :].strip()
    after = line[closed + 1 :]
    # Empty brackets are no type, so what follows them is the text as it is.
    return line[:opened].strip(), True, (after.split(":", 1)[-1] if closed > opened + 1 else after).strip()
