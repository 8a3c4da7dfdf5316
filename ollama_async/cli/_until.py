"""``--until``, ``--max-seconds`` and ``--format``: what ends an answer early, and what it has to be."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from ollama_async._call.jsontext import JsonFault, JsonReader
from ollama_async._errors import ParseError, RequestError
from ollama_async.until import json_complete, matches, max_chars, max_seconds, max_tokens, repetition, sentence_end

from ._output import valid, write
from ._screen import Answer, Screen, parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ollama_async.until import Condition

    from ._screen import AnyChunk

__all__ = ["FORMS", "ObjectScreen", "parse_format", "parse_until"]

FORMS = "chars=N, tokens=N, sentence, repetition, match=REGEX, or 'A & B' for both at once"

_READY: dict[str, Callable[[], Condition]] = {"sentence": sentence_end, "repetition": repetition}
_COUNTED: dict[str, Callable[[int], Condition]] = {"chars": max_chars, "tokens": max_tokens}


def parse_until(given: list[str] | None, seconds: float | None, *, as_object: bool = False) -> Condition | None:
    """Read ``--until``, which may be repeated, and ``--max-seconds``; ``as_object`` is for ``--format``."""
    conditions = [_parse(valid(text)) for text in given or ()]
    if seconds is not None:
        conditions.append(max_seconds(seconds))
    if as_object:
        conditions.append(json_complete())
    return reduce(lambda one, other: one | other, conditions) if conditions else None


def _parse(text: str) -> Condition:
    # A regular expression may have the sign in it, so it comes last.
    before, is_match, pattern = text.partition("match=")
    names = [name.strip() for name in before.split("&")]
    if is_match and names[-1] == "":
        names.pop()
    elif is_match:
        raise typer.BadParameter(f"{text!r}: write {FORMS}", param_hint="--until")
    conditions = [_named(name, text) for name in names]
    try:
        if is_match:
            conditions.append(matches(pattern))
    except RequestError as exc:
        raise typer.BadParameter(f"{text!r}: {exc.error}", param_hint="--until") from exc
    return reduce(lambda one, other: one & other, conditions)


def _named(name: str, text: str) -> Condition:
    kind, _, count = name.partition("=")
    if name in _READY:
        return _READY[name]()
    if kind in _COUNTED and count.isdecimal() and int(count):
        return _COUNTED[kind](int(count))
    raise typer.BadParameter(f"{text!r}: write {FORMS}", param_hint="--until")


def parse_format(given: str | None) -> str | dict[str, Any] | None:
    """Read ``--format``: ``json``, or the name of a file with a JSON schema."""
    if given is None or given == "json":
        return given
    try:
        schema: Any = json.loads(Path(given).read_bytes())
    except OSError as exc:
        raise typer.BadParameter(f"{given}: cannot read it: {exc.strerror or exc}", param_hint="--format") from exc
    except (ValueError, RecursionError) as exc:
        raise typer.BadParameter(f"{given}: it is not JSON: {exc}", param_hint="--format") from exc
    if type(schema) is not dict:
        raise typer.BadParameter(f"{given}: this is not a JSON schema: a schema is an object", param_hint="--format")
    return cast("dict[str, Any]", schema)


class ObjectScreen(Screen):
    """An answer that has to be JSON: as it grows on a terminal, elsewhere when it is whole, or not at all."""

    def _begin(self) -> None:
        super()._begin()
        self._reader = JsonReader()
        self._texts: list[str] = []
        self._is_json = True

    def add(self, chunk: AnyChunk) -> None:
        """Take a chunk.

        Raises:
            ParseError: It is not JSON.
        """
        _, text = parts(chunk)
        self._texts.append(text)
        self._try(lambda: self._reader.feed(text))
        if self._terminal:
            super().add(chunk)
        else:
            self.tokens += any(parts(chunk))

    def finish(self, whole: str) -> None:
        """Write what is whole; on a terminal, end what has been shown."""
        if self._terminal:
            super().finish(whole)
        elif self._reader.complete and self._is_json:
            write(f"{whole.strip()}\n")

    def check(self, answer: Answer) -> None:
        """Raise an error if the answer has ended by itself and is not whole.

        Raises:
            ParseError: It is not.
        """
        if answer.error is None:
            response = answer.stream.response
            self._try(self._reader.feed_eof, cut=response is not None and response.is_cut)

    def _try(self, feed: Callable[[], None], *, cut: bool = False) -> None:
        try:
            feed()
        except JsonFault as exc:
            self._is_json = False
            raise ParseError("JSON", "".join(self._texts), reason=str(exc), cut=cut) from None
