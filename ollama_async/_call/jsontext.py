"""``JsonReader``: the text of growing JSON in, its value so far out; sans-IO.

It takes each character once, so that a piece of the text costs the same however much has come before it. What it has
once shown stays: of a string it shows what comes before an escape that is not whole, and a number counts when something
follows it, since more digits would make it another one. For the same reason a key may not come twice.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, Protocol

from pydantic_core import from_json

__all__ = ["Frame", "JsonFault", "JsonReader", "Listener"]

MAX_DEPTH: Final = 200
"""How deep values may nest; pydantic reads no more either."""

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"[-+.eE0-9]*")
_WORD = re.compile(r"[a-z]*")
_WORDS = {"true": True, "false": False, "null": None}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = re.compile(r"[0-9a-fA-F]*")

Expected = Literal["value", "first", "first key", "key", "colon", "next", "end"]

_WANTED: dict[Expected, str] = {
    "value": "a value",
    "first": "a value or ]",
    "first key": "a key or }",
    "key": "a key",
    "colon": "a colon",
    "next": "a comma or the end of what is open",
    "end": "nothing",
}


class JsonFault(Exception):  # noqa: N818  (it becomes the reason of a ParseError)
    """The text is not JSON, or not JSON alone."""


class Frame:
    """An object or a list that is open.

    Attributes:
        kind: ``"{"`` or ``"["``.
        value: The dict or list of what is complete in it; nothing is ever taken out of it or replaced.
        key: The key, or the index, of the value that is next or has begun.
        note: What the listener keeps of it.
    """

    __slots__ = ("key", "kind", "note", "value")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.value: Any = {} if kind == "{" else []
        self.key: str | int | None = None if kind == "{" else 0
        self.note: Any = None


class Listener(Protocol):
    """Told of values as they begin and are complete."""

    def opened(self, parent: Frame | None, frame: Frame) -> None:
        """An object or a list has begun, under ``parent.key``; the root has no parent."""

    def completed(self, parent: Frame | None, value: Any, frame: Frame | None) -> None:
        """A value is complete; it is put into its parent, under ``parent.key``, after this.

        ``frame`` is that of an object or a list.
        """


class JsonReader:
    """Reads one JSON value.

    Args:
        listener: Told of what is in it.

    Attributes:
        stack: What is open, from the root on.
        begun: Whether the value has begun.
        complete: Whether it is complete.
        value: The value, when it is complete.
    """

    __slots__ = ("_escape", "_expected", "_listener", "_scalar", "_string", "begun", "complete", "stack", "value")

    def __init__(self, listener: Listener | None = None) -> None:
        self.stack: list[Frame] = []
        self.begun = False
        self.complete = False
        self.value: Any = None
        self._listener = listener
        self._expected: Expected = "value"
        # The parts of a string, and of a number or word, that is being read.
        self._string: list[str] | None = None
        self._scalar: list[str] | None = None
        # The part of an escape in the string that has arrived.
        self._escape = ""

    @property
    def growing(self) -> bool:
        """Whether the value that ``stack[-1].key`` names, or the root, has begun as neither an object nor a list."""
        return self._scalar is not None or self.growing_string is not None

    @property
    def growing_string(self) -> list[str] | None:
        """The parts of the string that is being read, if it is a value; only ever appended to."""
        return self._string if self._expected in ("value", "first") else None

    def feed(self, text: str) -> None:
        """Take the next piece of the text.

        Raises:
            JsonFault: It is not JSON, or something other than white space follows the value.
        """
        at = 0
        while at < len(text):
            if self._string is not None:
                at = self._feed_string(text, at, self._string)
            elif self._scalar is not None:
                at = self._feed_scalar(text, at, self._scalar)
            else:
                space = _SPACE.match(text, at)
                at = space.end() if space else at
                if at < len(text):
                    at = self._begin(text, at)

    def feed_eof(self) -> None:
        """Take the end of the text: only there is a number that is the whole value complete.

        Raises:
            JsonFault: The value is not complete.
        """
        if self._scalar is not None and not self.stack:
            self._end_scalar(self._scalar)
        if not self.complete:
            raise JsonFault("the answer ends before its JSON is complete" if self.begun else "the answer has no JSON")

    # -- tokens --

    def _begin(self, text: str, at: int) -> int:
        """Take the first character of a token."""
        sign, expected = text[at], self._expected
        if expected in ("value", "first"):
            if sign == "]" and expected == "first":
                return self._close(at)
            return self._begin_value(text, at)
        if sign == '"' and expected in ("key", "first key"):
            self._string = []
        elif sign == ":" and expected == "colon":
            self._expected = "value"
        elif sign == "," and expected == "next":
            self._expected = "key" if self.stack[-1].kind == "{" else "value"
        elif (sign == "}" and expected in ("first key", "next") and self.stack[-1].kind == "{") or (
            sign == "]" and expected == "next" and self.stack[-1].kind == "["
        ):
            return self._close(at)
        else:
            raise self._fault(text[at:])
        return at + 1

    def _begin_value(self, text: str, at: int) -> int:
        sign = text[at]
        if sign in "{[":
            self._open(sign)
        elif sign == '"':
            self._string = []
        elif sign in "-0123456789tfn":
            # A number or a word, which takes its first character as all others.
            self.begun = True
            self._scalar = []
            return at
        else:
            raise self._fault(text[at:])
        self.begun = True
        return at + 1

    def _open(self, kind: str) -> None:
        if len(self.stack) == MAX_DEPTH:
            raise JsonFault(f"the JSON nests deeper than {MAX_DEPTH} levels")
        frame = Frame(kind)
        if self._listener is not None:
            self._listener.opened(self.stack[-1] if self.stack else None, frame)
        self.stack.append(frame)
        self._expected = "first key" if kind == "{" else "first"

    def _close(self, at: int) -> int:
        frame = self.stack.pop()
        self._complete(frame.value, frame)
        return at + 1

    def _complete(self, value: Any, frame: Frame | None = None) -> None:
        """Put a value that is complete where it belongs."""
        parent = self.stack[-1] if self.stack else None
        if self._listener is not None:
            self._listener.completed(parent, value, frame)
        if parent is None:
            self.value, self.complete, self._expected = value, True, "end"
            return
        if isinstance(parent.key, int):
            parent.value.append(value)
            parent.key += 1
        else:
            parent.value[parent.key] = value
            parent.key = None
        self._expected = "next"

    # -- strings --

    def _feed_string(self, text: str, at: int, string: list[str]) -> int:
        if self._escape:
            return self._feed_escape(text, at, string)
        plain = _PLAIN.match(text, at)
        end = plain.end() if plain else at
        if end > at:
            string.append(text[at:end])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escape = "\\"
        elif text[end] == '"':
            self._end_string("".join(string))
        else:
            raise JsonFault(f"the JSON has the control character {text[end]!r} in a string")
        return end + 1

    def _end_string(self, string: str) -> None:
        self._string = None
        if self._expected in ("value", "first"):
            self._complete(string)
            return
        frame = self.stack[-1]
        if string in frame.value:
            raise JsonFault(f"the JSON has the key {string[:50]!r} twice in one object")
        frame.key = string
        self._expected = "colon"

    def _feed_escape(self, text: str, at: int, string: list[str]) -> int:
        """Take what belongs to an escape, or to two of them that are one character."""
        while at < len(text):
            self._escape += text[at]
            at += 1
            whole = _unescaped(self._escape)
            if whole is not None:
                string.append(whole)
                self._escape = ""
                break
        return at

    # -- numbers and words --

    def _feed_scalar(self, text: str, at: int, scalar: list[str]) -> int:
        first = scalar[0] if scalar else text[at]
        more = (_WORD if first[0] in "tfn" else _NUMBER).match(text, at)
        end = more.end() if more else at
        if end > at:
            scalar.append(text[at:end])
        if end < len(text):
            self._end_scalar(scalar)
        return end

    def _end_scalar(self, scalar: list[str]) -> None:
        token, self._scalar = "".join(scalar), None
        if token in _WORDS:
            self._complete(_WORDS[token])
            return
        try:
            self._complete(from_json(token, allow_inf_nan=False))
        except ValueError:
            raise JsonFault(f"the JSON has {token[:50]!r} where {_WANTED['value']} belongs") from None

    def _fault(self, rest: str) -> JsonFault:
        shown = f"{rest[:50]!r}{'...' if len(rest) > 50 else ''}"
        if self._expected == "end":
            return JsonFault(f"text follows the JSON: {shown}")
        if not self.begun:
            return JsonFault(f"the answer does not begin with JSON: {shown}")
        return JsonFault(f"the JSON has {shown} where {_WANTED[self._expected]} belongs")


def _unescaped(escape: str) -> str | None:
    """Return the character that an escape is, ``None`` if it is not whole."""
    if escape[1] != "u":
        if escape[1] not in _ESCAPES:
            raise JsonFault(f"the JSON has the invalid escape {escape!r} in a string")
        return _ESCAPES[escape[1]]
    digits = _HEX.fullmatch(escape[2:6])
    if digits is None:
        raise JsonFault(f"the JSON has the invalid escape {escape!r} in a string")
    if len(escape) < 6:
        return None
    first = int(escape[2:6], 16)
    if not 0xD800 <= first < 0xE000:
        return chr(first)
    # Half a character; the other half has to follow.
    if first >= 0xDC00 or not r"\u".startswith(escape[6:8]) or _HEX.fullmatch(escape[8:12]) is None:
        raise JsonFault(f"the JSON has half a surrogate pair in a string: {escape!r}")
    if len(escape) < 12:
        return None
    second = int(escape[8:12], 16)
    if not 0xDC00 <= second < 0xE000:
        raise JsonFault(f"the JSON has half a surrogate pair in a string: {escape!r}")
    return chr(0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00))
