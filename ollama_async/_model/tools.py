"""Tools: functions and pydantic models, turned into the JSON schemas that a model reads."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import pydantic_core
from pydantic import BaseModel, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

from ollama_async._errors import RequestError

from .input import sequence
from .types import Model, has_dump, plain


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


def encode_tools(given: Any, *, legacy: bool = False) -> Sequence[dict[str, Any]]:
    """Turn the tools of a chat into JSON schemas.

    Args:
        given: Functions, pydantic models, ``Tool``, or schemas as dicts.
        legacy: Whether functions are turned as ollama-python does.

    Raises:
        RequestError: There is something else among them, or something that no schema can be made of.
    """
    if given is None:
        # Not a list: each open stream holds what was asked, and most have no tools.
        return ()
    return [_encode_tool(tool, place, legacy=legacy) for place, tool in enumerate(sequence(given, "tools"))]


def _encode_tool(tool: Any, place: int, *, legacy: bool) -> dict[str, Any]:
    try:
        if legacy and inspect.isroutine(tool):
            return convert_function_to_tool(tool).model_dump(exclude_none=True)
        return tool_schema(tool)
    except RequestError as exc:
        raise RequestError(f"tools[{place}]: {exc}") from exc
    except Exception as exc:
        # Of the old converter: what pydantic and Python say of annotations.
        raise RequestError(f"tools[{place}] has no JSON schema: {_said(exc)}") from exc


def tool_schema(tool: Any, /) -> dict[str, Any]:
    """Return the JSON schema of a tool, as the server takes it.

    References are resolved, since the server drops them, unless a type contains itself. Parameters such as ``*args``
    and ``**kwargs``, and those that a ``functools.partial`` has filled in, are not the model's.

    Args:
        tool: A function (its docstring, in the style of Google, NumPy or Sphinx, describes it and its parameters), a
            method of an object, an object that can be called, a pydantic model class, a ``Tool`` (also
            ollama-python's), or a schema as a dict.

    Raises:
        RequestError: It is something else, a parameter is of a type that has no JSON schema, or it is a method without
            its object.
    """
    if isinstance(tool, Mapping) or has_dump(tool):
        return cast("dict[str, Any]", plain(tool))
    if isinstance(tool, type) and issubclass(tool, BaseModel):
        return _model_schema(tool)
    if isinstance(tool, type) or not callable(tool):
        raise RequestError(
            f"{tool!r} is not a tool: give a function, a pydantic model class, or a JSON schema (a dict)"
        )
    return _function_schema(tool)


def _tool(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    return {"type": "function", "function": {**function, "parameters": parameters}}


class _Schemas(GenerateJsonSchema):
    """pydantic's generator of JSON schemas, which leaves out in silence what JSON cannot say."""

    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  (pydantic has it so)


def _model_schema(model: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = model.model_json_schema(schema_generator=_Schemas)
    except Exception as exc:
        raise RequestError(f"{model.__name__} has no JSON schema: {_said(exc)}") from exc
    definitions = schema.get("$defs", {})
    resolved = _Resolver(definitions)
    # Of a model that contains itself the schema is but a reference.
    parameters = resolved(definitions[schema["$ref"].removeprefix(_DEFINITIONS)] if "$ref" in schema else schema)
    description = parameters.pop("description", "")
    kept = resolved.kept()
    common = {"$defs": kept} if kept else {}
    return _tool(model.__name__, description, {"type": "object", "properties": {}, **parameters, **common})


def _said(exc: Exception) -> str:
    """Return the text of an error without the address of a page of pydantic's."""
    return str(getattr(exc, "message", None) or exc) or type(exc).__name__


# -- functions --


def tool_parameters(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
    """Return the parameters of a function that a model fills in, each with its type.

    Raises:
        RequestError: They cannot be read, or it is a method without its object.
    """
    inner, filled = _unfilled(function)
    name, code = _name(inner), _code_of(inner)
    return [
        (parameter, _hint(parameter, code, name))
        for parameter in _signature(function, inner, name)
        if parameter.name not in filled
    ]


def _function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    inner, _ = _unfilled(function)
    name, code = _name(inner), _code_of(inner)
    description, described = _read_docstring(inspect.getdoc(code) or "")
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    required: list[str] = []
    for parameter, hint in tool_parameters(function):
        schema = _parameter_schema(parameter, hint, name, definitions)
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
        raise RequestError(f"{name} cannot be the name of a tool: give a function made with def")
    return name


def _signature(function: Callable[..., Any], inner: Any, name: str) -> list[inspect.Parameter]:
    """Return the parameters that a model can fill in."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        first = next(iter(inspect.signature(inner).parameters), None)
    except (ValueError, TypeError) as exc:
        raise RequestError(f"the parameters of {name}() cannot be read: {exc}") from exc
    owner = _owner(inner, first)
    if owner is not None and parameters and parameters[0].name == first:
        raise RequestError(f"{name}() is a method of {owner}, and lacks its object: give {owner}(...).{name}")
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _owner(function: Any, first: str | None) -> str | None:
    """Return the class that a function is a method of, if it was given as ``Class.method``."""
    owner: type | None = getattr(function, "__objclass__", None)
    if owner is not None:
        return owner.__name__
    if not inspect.isfunction(function):
        return None
    outer, _, _ = function.__qualname__.rpartition(".")
    # A static method looks the same but for its parameters' names.
    return outer.rpartition(".")[2] if first in ("self", "cls") and outer and not outer.endswith("<locals>") else None


def _hint(parameter: inspect.Parameter, code: Any, name: str) -> Any:
    """Return the annotation of a parameter as a type, also if it is a text.

    One by one, since those of the return value and of what no model gives may be of types that exist for type checkers
    only.
    """
    hint = getattr(code, "__annotations__", {}).get(parameter.name, parameter.annotation)
    if hint is inspect.Parameter.empty:
        return Any
    function = inspect.unwrap(code)
    outside = getattr(function, "__globals__", {})
    own = {kind.__name__: kind for kind in getattr(function, "__type_params__", ())}
    holder = SimpleNamespace(__annotations__={parameter.name: hint})
    try:
        return typing.get_type_hints(holder, outside, own, include_extras=True)[parameter.name]
    except Exception as exc:
        # It is an expression, which may fail in any way.
        raise RequestError(f"the parameters of {name}() cannot be read: {parameter.name}: {_said(exc)}") from exc


def _parameter_schema(
    parameter: inspect.Parameter, hint: Any, name: str, definitions: dict[str, Any]
) -> dict[str, Any]:
    """Return the schema of a parameter, and add the schemas that it still refers to."""
    try:
        schema = TypeAdapter(hint).json_schema(schema_generator=_Schemas)
    except Exception as exc:
        raise RequestError(
            f"the parameter {parameter.name!r} of {name}() is of a type that has no JSON schema: {_said(exc)}"
        ) from exc
    resolved = _resolved(schema, definitions)
    _add_default(resolved, parameter.default)
    return resolved


def _resolved(schema: dict[str, Any], definitions: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """Return a schema without references, and add the definitions of those that are left."""
    resolver = _Resolver(schema.get("$defs", {}), f"_{number}" if number > 1 else "")
    resolved, kept = resolver(schema), resolver.kept()
    # Another parameter may have another class of that name.
    if any(definitions.get(name, same) != same for name, same in kept.items()):
        return _resolved(schema, definitions, number + 1)
    definitions |= kept
    return resolved


def _add_default(schema: dict[str, Any], default: Any) -> None:
    if default is not inspect.Parameter.empty and default is not None:
        try:
            schema["default"] = _as_json(default)
        except ValueError:
            # It cannot be told to the model, which may still leave the parameter out.
            schema.pop("default", None)


def _as_json(value: Any) -> Any:
    """Return a value as it is when it has been written as JSON and read again.

    Raises:
        ValueError: JSON has no such value: it is not a number or text, or only Python has it.
    """
    try:
        written = pydantic_core.to_json(value, inf_nan_mode="constants")
    except Exception as exc:
        # Also what a property of somebody's object raises.
        raise ValueError(str(exc)) from exc
    return pydantic_core.from_json(written, allow_inf_nan=False)


def _description(hint: Any) -> str | None:
    """Return what ``Annotated`` says of a parameter: ``Field(description=...)``, or a plain text."""
    for said in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
        text = said if isinstance(said, str) else getattr(said, "description", None)
        if text:
            return str(text)
    return None


_DEFINITIONS = "#/$defs/"


# Keys whose value is a schema, a list of schemas, or schemas by name.
_ONE = {
    *("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"),
    *("additionalItems", "unevaluatedItems", "unevaluatedProperties"),
}
_SEVERAL = {"oneOf", "anyOf", "allOf", "prefixItems"}
_NAMED = {"properties", "patternProperties", "dependentSchemas"}
_OF_NO_USE = {"title", "$defs", "discriminator"}


class _Resolver:
    """Puts what a schema refers to in place of the references, and leaves out what is of no use to a model."""

    def __init__(self, definitions: Mapping[str, Any], suffix: str = "") -> None:
        self._definitions = definitions
        # What the names of the definitions get that are kept.
        self._suffix = suffix
        self._recursive = {name for name in definitions if name in self._reached(definitions[name], set())}
        self._used: set[str] = set()

    def __call__(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the schema without references, but for those to types that contain themselves."""
        resolved: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                resolved = {**self._refer(value), **resolved}
            elif key in _SEVERAL and isinstance(value, list):
                resolved["anyOf" if key == "oneOf" else key] = [self._part(part) for part in value]  # pyright: ignore[reportUnknownVariableType]
            elif key in _NAMED and isinstance(value, Mapping):
                parts = cast("Mapping[str, Any]", value)
                resolved[key] = {name: self._part(part) for name, part in parts.items()}
            elif key in _ONE:
                resolved[key] = self._part(value)
            elif key not in _OF_NO_USE:
                try:
                    resolved["enum" if key == "const" else key] = _as_json([value] if key == "const" else value)
                except ValueError:
                    # A default, an example or a limit that JSON does not have, such as infinity.
                    continue
        return resolved

    def _part(self, part: Any) -> Any:
        # True and False are schemas, too.
        return self(cast("Mapping[str, Any]", part)) if isinstance(part, Mapping) else part

    def kept(self) -> dict[str, Any]:
        """Return the definitions that references are left to."""
        definitions: dict[str, Any] = {}
        while self._used - set(definitions):
            name = min(self._used - set(definitions))
            definitions[name] = self(self._definitions[name])
        return {name + self._suffix: schema for name, schema in definitions.items()}

    def _refer(self, reference: str) -> dict[str, Any]:
        name = reference.removeprefix(_DEFINITIONS)
        if name in self._recursive:
            self._used.add(name)
            return {"$ref": reference + self._suffix}
        # What somebody's own schema refers to leads to where only they know.
        return self(self._definitions[name]) if name in self._definitions else {"$ref": reference}

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
    # Empty brackets are not a type, so what follows them is the text as it is.
    return line[:opened].strip(), True, (after.split(":", 1)[-1] if closed > opened + 1 else after).strip()
