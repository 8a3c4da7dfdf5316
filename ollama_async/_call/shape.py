"""``Shape``: what a growing value is meant to be, and so which parts are shown before they are complete."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic_core import to_json

__all__ = ["ANY", "Shape", "shape_of"]

_LISTS = (list, Sequence, MutableSequence, Iterable)
_DICTS = (dict, Mapping, MutableMapping)
# What a string, or what comes in its place, is left as it is by.
_PLAIN = (str, int, float, bool)


class Shape:
    """What a value is meant to be.

    Args:
        annotation: Its type.
        metadata: Constraints besides those in the annotation.
        config: That of the model which has it as a field.
    """

    def __init__(self, annotation: Any, metadata: Sequence[Any] = (), config: ConfigDict | None = None) -> None:
        self._annotation = annotation
        self._metadata = tuple(metadata)
        self._config = config

    # -- what it is --

    @cached_property
    def _options(self) -> list[tuple[Any, tuple[Any, ...]]]:
        """The types that it may have, without None, each with its constraints."""
        return list(_options(self._annotation, self._metadata))

    @cached_property
    def _whole_model(self) -> type[BaseModel] | None:
        """The model that it is, if that is all that it is."""
        annotation = self._annotation
        return annotation if _is_model(annotation) and not self._metadata else None

    @cached_property
    def shows_text(self) -> bool:
        """Whether a string can be shown while it grows: one that is text, and is not changed when it is complete."""
        config = self._config or {}
        if any(config.get(key) for key in ("str_strip_whitespace", "str_to_lower", "str_to_upper")):
            return False
        text = [constraints for option, constraints in self._options if option in (str, Any)]
        plain = all(option in (*_PLAIN, Any) or _kind(option) for option, _ in self._options)
        return bool(text) and plain and not any(map(_changes_text, text[0]))

    def container(self, kind: str) -> Container | None:
        """Return what an object (``"{"``) or a list (``"["``) is here, ``None`` if it can be shown only as a whole."""
        made = [option for option, _ in self._options if _kind(option) in (kind, "any")]
        return _container(made[0], kind) if len(made) == 1 else None

    # -- when it is complete --

    @cached_property
    def _validate(self) -> Callable[[bytes], Any] | None:
        if self._annotation is Any and not self._metadata:
            return None
        if self._whole_model is not None:
            return self._whole_model.model_validate_json
        annotation: Any = Annotated[(self._annotation, *self._metadata)] if self._metadata else self._annotation
        # pydantic refuses a configuration for a type that has its own.
        of_its_own = any(_is_model(option) or hasattr(option, "__pydantic_config__") for option, _ in self._options)
        config = None if of_its_own else self._config
        return TypeAdapter[Any](annotation, config=config).validate_json

    def validated(self, value: Any) -> Any:
        """Return a complete value, made into the type of its place.

        Raises:
            ValidationError: It is not.
        """
        validate = self._validate
        # As JSON: a strict model, too, takes a date from that.
        return value if validate is None else validate(to_json(value, inf_nan_mode="constants"))


class Container:
    """An object or a list whose parts are shown as they come."""

    def part(self, key: str | int) -> Shape | None:
        """Return the shape of a part; ``None`` for one that is not shown."""
        raise NotImplementedError

    def parts(self) -> list[str] | None:
        """Return the keys that it may have, ``None`` if that is open."""
        return None

    def built(self, parts: Any) -> Any:
        """Return the value that has these parts, by key, or in order."""
        return parts


class _Of(Container):
    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def part(self, key: str | int) -> Shape:
        return self._shape


class _Model(Container):
    """A model; what has not come of it is None."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model
        model.model_rebuild()
        validators = model.__pydantic_decorators__.field_validators.values()
        # What a function makes of a field is seen when it has been called, with the whole object.
        changed = {name for validator in validators for name in validator.info.fields}
        self._shapes: dict[str, tuple[str, Shape]] = {}
        self._keys: list[str] = []
        for name, field in model.model_fields.items():
            alias = field.validation_alias if field.validation_alias is not None else field.alias
            key = alias if isinstance(alias, str) else name
            self._keys.append(key)
            if not changed & {name, "*"}:
                metadata = [*field.metadata]
                if field.discriminator is not None:
                    metadata.append(Field(discriminator=field.discriminator))
                self._shapes[key] = (name, Shape(field.annotation, metadata, model.model_config))

    def part(self, key: str | int) -> Shape | None:
        return self._shapes[key][1] if isinstance(key, str) and key in self._shapes else None

    def parts(self) -> list[str]:
        return self._keys

    def built(self, parts: dict[str, Any]) -> Any:
        came = {self._shapes[key][0]: value for key, value in parts.items()}
        # Not model_construct(): that fills in defaults, and what comes later in their place may be less.
        made = self._model.__new__(self._model)
        for name, value in {
            "__dict__": {**dict.fromkeys(self._model.model_fields), **came},
            "__pydantic_fields_set__": set(came),
            "__pydantic_extra__": {} if self._model.model_config.get("extra") == "allow" else None,
            "__pydantic_private__": None,
        }.items():
            object.__setattr__(made, name, value)
        return made


class _RootModel(Container):
    def __init__(self, model: type[BaseModel], inner: Container) -> None:
        self._model = model
        self._inner = inner

    def part(self, key: str | int) -> Shape | None:
        return self._inner.part(key)

    def parts(self) -> list[str] | None:
        return self._inner.parts()

    def built(self, parts: Any) -> Any:
        return self._model.model_construct(self._inner.built(parts))


ANY = Shape(Any)
_OPEN = _Of(ANY)


@lru_cache(maxsize=256)
def _model_container(model: type[BaseModel], kind: str) -> Container | None:
    if not model.__pydantic_root_model__:
        return _Model(model) if kind == "{" else None
    inner = Shape(model.model_fields["root"].annotation).container(kind)
    return None if inner is None else _RootModel(model, inner)


def shape_of(annotation: Any) -> Shape:
    """Return the shape of a value of some type."""
    return ANY if annotation is Any else Shape(annotation)


def _container(option: Any, kind: str) -> Container | None:
    if _is_model(option):
        return _model_container(option, kind)
    arguments = get_args(option)
    if option is Any or not arguments:
        return _OPEN
    return _Of(Shape(arguments[-1]))


def _is_model(option: Any) -> bool:
    return isinstance(option, type) and get_origin(option) is None and issubclass(option, BaseModel)


def _kind(option: Any) -> str:
    """Return the sign with which what a type is begins, ``"any"`` for what begins with either; else ``""``."""
    if option is Any or (_is_model(option) and cast("type[BaseModel]", option).__pydantic_root_model__):
        return "any"
    plain = get_origin(option) or option
    if _is_model(option) or plain in _DICTS:
        return "{"
    return "[" if plain in _LISTS else ""


def _options(annotation: Any, constraints: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _options(inner, (*constraints, *more))
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _options(option, constraints)
    elif hasattr(annotation, "__value__"):
        # A name for a type: `type Names = list[str]`.
        yield from _options(annotation.__value__, constraints)
    elif annotation is not type(None):
        yield annotation, constraints


def _changes_text(constraint: Any) -> bool:
    """Whether a constraint may make another text of one, or is a function, which may do anything."""
    changes = any(getattr(constraint, name, None) for name in ("strip_whitespace", "to_lower", "to_upper"))
    return changes or hasattr(constraint, "__get_pydantic_core_schema__")
