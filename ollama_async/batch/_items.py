"""The input of a batch: rows of files or of Python, as calls to make."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import from_json

from ._errors import InputRefused

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from ollama_async.pool import Kind

__all__ = ["Item", "Reader", "Shape", "read_parquet"]

_ROWS = 1000

_ANSWER_FIELDS = ("think", "format", "options", "keep_alive", "logprobs", "top_logprobs", "truncate", "shift")
_FIELDS: dict[str, tuple[str, ...]] = {
    "chat": (*_ANSWER_FIELDS, "tools"),
    "generate": (*_ANSWER_FIELDS, "suffix", "system", "template", "raw", "images"),
    "embed": ("truncate", "options", "keep_alive", "dimensions"),
}
_TAKEN = {kind: frozenset(("model", *names)) for kind, names in _FIELDS.items()}
_OPENAI_KINDS: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "generate",
    "/v1/embeddings": "embed",
}
# What OpenAI has beside the messages, as options of Ollama.
_OPENAI_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(slots=True)
class Item:
    """One call to make.

    Attributes:
        id: Its name in the output.
        index: Its place in the input, from 0.
        kind: Which call.
        parameters: Those of the call.
    """

    id: str
    index: int
    kind: Kind
    parameters: dict[str, Any]
    _hash: str = ""

    @property
    def input_hash(self) -> str:
        """What the call is, in 16 digits."""
        # Not for each row: the first look at an input of millions needs none.
        if not self._hash:
            self._hash = hashlib.sha256(_canonical([self.kind, self.parameters]).encode()).hexdigest()[:16]
        return self._hash


_canonical = json.JSONEncoder(sort_keys=True, default=repr).encode


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows become calls.

    Attributes:
        kind: What prompts are for.
        model: The model of rows that name none.
        id_field: The field of a row with its id.
        prompt_field: The field of a row with its prompt; the others are then data.
        template: The prompt, with ``{field}`` for fields of the row, which are all data then.
        system: System prompt of chats and completions.
        defaults: Parameters of calls whose rows do not have them.
    """

    kind: Kind = "chat"
    model: str | None = None
    id_field: str = "id"
    prompt_field: str | None = None
    template: str | None = None
    system: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    # What a row's call has that the row does not name, by kind.
    _fitting: dict[Kind, dict[str, Any]] = field(init=False, repr=False, default_factory=dict["Kind", dict[str, Any]])

    def __post_init__(self) -> None:
        named = {} if self.model is None else {"model": self.model}
        for kind, taken in _FIELDS.items():
            fitting = {name: value for name, value in self.defaults.items() if name in taken}
            self._fitting[cast("Kind", kind)] = {**named, **fitting}

    def item(self, row: object, index: int, where: object) -> Item:
        """Return the call that a row stands for.

        Args:
            row: The row.
            index: Its place in the input, from 0.
            where: What an error says of its place.

        Raises:
            InputRefused: It stands for none.
        """
        fields = cast("dict[str, Any]", {"prompt": row} if isinstance(row, str) else row)
        if not isinstance(fields, Mapping):
            raise InputRefused(f"{where} is not an object: give {{'prompt': ...}} or {{'messages': [...]}}")
        if "custom_id" in fields and "body" in fields:
            kind, parameters = _openai_call(fields, where)
            given: object = fields["custom_id"]
        else:
            kind, parameters = self._call(fields, where)
            given = fields.get(self.id_field)
        parameters = {**self._fitting[kind], **parameters}
        if not isinstance(parameters.get("model"), str) or not parameters["model"]:
            raise InputRefused(f"{where} has no model: name one for all with model= or --model")
        if given is None:
            given = str(index + 1)
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise InputRefused(f"{where}: invalid id {given!r}: give a text or a whole number")
        return Item(str(given), index, kind, parameters)

    def _call(self, fields: Mapping[str, Any], where: object) -> tuple[Kind, dict[str, Any]]:
        if self.template is not None:
            return self._of_prompt(_filled(self.template, fields, where), {})
        if self.prompt_field is not None:
            if self.prompt_field not in fields:
                raise InputRefused(f"{where} has no field {self.prompt_field!r}")
            return self._of_prompt(fields[self.prompt_field], {})
        found = [name for name in ("messages", "prompt", "input") if fields.get(name) is not None]
        if len(found) != 1:
            raise InputRefused(f"{where} needs one of the fields messages, prompt or input, but has {len(found)}")
        if found[0] == "prompt":
            return self._of_prompt(fields["prompt"], fields)
        kind: Kind = "chat" if found[0] == "messages" else "embed"
        parameters = _picked(kind, fields) | {found[0]: fields[found[0]]}
        if kind == "chat" and self.system is not None:
            parameters["messages"] = [{"role": "system", "content": self.system}, *parameters["messages"]]
        return kind, parameters

    def _of_prompt(self, prompt: object, fields: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
        parameters = _picked(self.kind, fields)
        if self.kind == "embed":
            return self.kind, parameters | {"input": prompt}
        system = fields.get("system", self.system)
        if self.kind == "generate":
            return self.kind, parameters | {"prompt": prompt} | ({} if system is None else {"system": system})
        message: dict[str, Any] = {"role": "user", "content": prompt}
        if fields.get("images") is not None:
            message["images"] = fields["images"]
        first = [] if system is None else [{"role": "system", "content": system}]
        return self.kind, parameters | {"messages": [*first, message]}


def _picked(kind: Kind, fields: Mapping[str, Any]) -> dict[str, Any]:
    taken = _TAKEN[kind]
    return {name: value for name, value in fields.items() if value is not None and name in taken}


def _filled(template: str, fields: Mapping[str, Any], where: object) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise InputRefused(f"{where} has no field {match[1]!r}, which the template names")
        return str(fields[match[1]])

    return _PLACE.sub(value, template)


# -- lines of OpenAI's batches --


def _openai_call(line: Mapping[str, Any], where: object) -> tuple[Kind, dict[str, Any]]:
    kind = _OPENAI_KINDS.get(str(line.get("url", "/v1/chat/completions")))
    body: object = line["body"]
    if kind is None or not isinstance(body, Mapping):
        raise InputRefused(f"{where}: url is {line.get('url')!r}; give one of {', '.join(_OPENAI_KINDS)}, and a body")
    rest = dict(cast("Mapping[str, Any]", body))
    for harmless in ("stream", "user", "store", "metadata", "encoding_format"):
        rest.pop(harmless, None)
    if rest.pop("n", 1) != 1:
        raise InputRefused(f"{where}: n is not 1; give a line for each answer")
    parameters: dict[str, Any] = {}
    if "model" in rest:
        parameters["model"] = rest.pop("model")
    options = {name: rest.pop(theirs) for theirs, name in _OPENAI_OPTIONS.items() if theirs in rest}
    if options:
        parameters["options"] = options
    if "response_format" in rest:
        parameters["format"] = _openai_format(rest.pop("response_format"), where)
    for name in {"chat": ("messages", "tools"), "generate": ("prompt", "suffix"), "embed": ("input", "dimensions")}[
        kind
    ]:
        if name in rest:
            parameters[name] = rest.pop(name)
    if rest:
        raise InputRefused(f"{where}: the body has {min(rest)!r}, which Ollama does not support")
    if kind == "chat":
        parameters["messages"] = [_openai_message(message, where) for message in parameters.get("messages", ())]
    return kind, {name: value for name, value in parameters.items() if value is not None}


def _openai_format(given: Any, where: object) -> Any:
    form = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    if form.get("type") == "json_schema":
        return form["json_schema"]["schema"]
    if form.get("type") in ("json_object", "text"):
        return "json" if form["type"] == "json_object" else None
    raise InputRefused(f"{where}: response_format is {given!r}")


def _openai_message(message: Any, where: object) -> Any:
    """Return a message whose parts are put together: texts, and images as data URLs."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):  # pyright: ignore[reportUnknownMemberType]
        return cast("Any", message)
    whole = cast("dict[str, Any]", message)
    texts: list[str] = []
    images: list[str] = []
    for part in cast("list[dict[str, Any]]", whole["content"]):
        url = str(part["image_url"]["url"]) if part.get("type") == "image_url" else ""
        if part.get("type") == "text":
            texts.append(part["text"])
        elif url.startswith("data:"):
            images.append(url.partition(",")[2])
        else:
            raise InputRefused(f"{where}: a message has a part of type {part.get('type')!r} that is not a data URL")
    return {**whole, "content": "\n".join(texts)} | ({"images": images} if images else {})


# -- files and iterables --


class Reader:
    """Reads an input, once or more often.

    Args:
        source: The path of a JSONL or Parquet file, or an iterable of rows, also an asynchronous one.
        shape: How rows become calls.
        limit: How many rows are read at most.
    """

    def __init__(self, source: object, shape: Shape, limit: int | None) -> None:
        self._shape = shape
        self._limit = limit
        self._rows: Callable[[], Iterator[tuple[object, int]]] | None = None
        self._where = _Where(lambda index: f"item {index}")
        self._source = source
        if isinstance(source, (str, Path)):
            path = Path(source)
            parquet = path.suffix == ".parquet"
            self._rows = lambda: _parquet_rows(path) if parquet else _lines(path)
            self._where = _Where(lambda index: f"{path}, {'row' if parquet else 'line'} {index + 1},")
        elif isinstance(source, (list, tuple)):
            rows = list(cast("list[object]", source))
            self._rows = lambda: ((row, index) for index, row in enumerate(rows))
        elif not isinstance(source, (Iterable, AsyncIterable)):
            raise InputRefused(f"input={type(source).__name__}: give a path, or an iterable of rows")

    @property
    def waits(self) -> bool:
        """Whether the next row may be long in coming."""
        return self._rows is None and isinstance(self._source, AsyncIterable)

    def check(self, output: Path) -> int | None:
        """Read all of it, if it can be read again.

        Args:
            output: Path that is written to.

        Returns:
            How many items it has; ``None`` if that is not known.

        Raises:
            InputRefused: A row is not a call, two have the same id, or it is the output.
        """
        if self._rows is None:
            return None
        source = self._source
        if isinstance(source, (str, Path)) and Path(source).resolve() == output.resolve():
            raise InputRefused(f"{output} is both the input and the output")
        seen: set[str] = set()
        for item in self._items(self._rows()):
            _only_once(item, seen)
        return len(seen)

    def items(self) -> Generator[Item]:
        """Yield the calls to make, of an input that does not wait."""
        if self._rows is not None:
            yield from self._items(self._rows())
            return
        seen: set[str] = set()
        rows = ((row, index) for index, row in enumerate(cast("Iterable[object]", self._source)))
        for item in self._items(rows):
            _only_once(item, seen)
            yield item

    async def items_as_they_come(self) -> AsyncGenerator[Item]:
        """Yield the calls to make, of an input that waits."""
        seen: set[str] = set()
        index = 0
        async for row in cast("AsyncIterable[object]", self._source):
            if self._limit is not None and index >= self._limit:
                return
            item = self._item(row, index)
            _only_once(item, seen)
            yield item
            index += 1

    def _items(self, rows: Iterator[tuple[object, int]]) -> Iterator[Item]:
        for row, index in itertools.islice(rows, self._limit):
            yield self._item(row, index)

    def _item(self, row: object, index: int) -> Item:
        self._where.index = index
        return self._shape.item(row, index, self._where)


class _Where:
    """The place of a row, as an error says it: the text is made only for an error, not for each row."""

    def __init__(self, say: Callable[[int], str]) -> None:
        self._say = say
        self.index: int = 0

    def __str__(self) -> str:
        return self._say(self.index)


def _only_once(item: Item, seen: set[str]) -> None:
    if item.id in seen:
        raise InputRefused(f"two items have the id {item.id!r}: give each row a different id")
    seen.add(item.id)


def _lines(path: Path) -> Iterator[tuple[object, int]]:
    try:
        with path.open("rb") as file:
            for index, line in enumerate(file):
                text = line.removeprefix(b"\xef\xbb\xbf").strip() if index == 0 else line.strip()
                if text:
                    yield _decoded(text, path, index), index
    except OSError as exc:
        raise InputRefused(f"cannot read the input {path}: {exc.strerror}") from exc


def _decoded(line: bytes, path: Path, index: int) -> object:
    try:
        # In a third of the time that json takes.
        return from_json(line)
    except ValueError:
        pass
    try:
        # It takes more (half of a surrogate pair, deep nesting), and says better what is wrong.
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InputRefused(f"{path}, line {index + 1}, is not JSON: {exc}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[object, int]]:
    for index, row in enumerate(read_parquet(path)):
        yield row, index


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, read in groups.

    Raises:
        InputRefused: It cannot be read, or the extra is not installed.
    """
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as exc:
        raise InputRefused(f'Parquet needs {exc.name}; install it with: pip install "ollama-async[parquet]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(_ROWS):
                yield from rows.to_pylist()
    except (OSError, ValueError) as exc:
        raise InputRefused(f"cannot read the input {path}: {exc}") from exc
