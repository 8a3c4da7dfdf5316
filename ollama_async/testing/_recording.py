"""The file of a recording: exchanges as lines of JSON, which can be read, written and changed by hand.

The first line is ``{"recording": 1}``. Each exchange is a line for the request, one for the head of the answer, one for
each block of its body, and one for how it ended. docs/record.md has the table of all of them.
"""

import base64
import binascii
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from ollama_async._errors import RequestError

from ._records import RequestRecord
from ._script import Block, Cut, Endless, Frame, NoEnd, Pause, Raw, Reply, Reset, Stall, Step, Trickle, encode

HEADER: Frame = {"recording": 1}

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(
    "auth(?!ors?([^a-z]|$))|cookie|(api|private)[-_]?key|passw|pwd|secret|credential|token|bearer", re.IGNORECASE
)

_ENDS: dict[str, tuple[Step, ...]] = {
    "complete": (),
    "cut": (Cut(),),
    "reset": (Reset(),),
    "stall": (Stall(),),
    # Nothing more is known of an answer that its client did not wait for.
    "client left": (Stall(),),
    "no end": (NoEnd(),),
}
# What ends an answer that has no head.
_WITHOUT_HEAD = {"cut", "reset", "stall", "client left"}
_FRAMINGS = ("chunked", "length", "close")


class RecordingError(RequestError):
    """A file is not a recording, or cannot be one.

    Attributes:
        path: The file.
        line: The number of the line, from 1; ``None`` if it is not about one.
    """

    def __init__(self, path: str, line: int | None, problem: str) -> None:
        where = f"{path}, line {line}" if line else path
        super().__init__(f"{where}: {problem}; docs/record.md says what a recording is made of")
        self.path = path
        self.line = line


class _Flaw(Exception):  # noqa: N818  (it becomes a RecordingError, with the file and line)
    """What is wrong with a line."""


# -- reading --


@dataclass(frozen=True, eq=False)
class _Exchange:
    """A request, and the reply to it."""

    request: tuple[str, str]
    body: Frame
    reply: Reply


class Recording:
    """What a file has recorded, to be played again.

    A request gets the reply of an exchange with its method and path. Of several that have not been played yet, it is
    the first one with the same body, or the first one that asks for a stream, or not, as the request does, or the
    first one. When all have been played, they start again.
    """

    def __init__(self, path: str | os.PathLike[str], speed: float) -> None:
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not speed > 0:  # type: ignore[redundant-expr]
            raise RequestError(f"speed={speed!r}: give how many times as fast to play; math.inf plays without pauses")
        self._exchanges = _load(os.fspath(path), speed)
        self._played: set[_Exchange] = set()

    def answer(self, request: RequestRecord) -> Reply | None:
        """Return what answers a request, ``None`` if the recording has nothing like it."""
        alike = [each for each in self._exchanges if each.request == (request.method, request.route)]
        if not alike:
            return None
        if self._played.issuperset(alike):
            self._played.difference_update(alike)
        left = [each for each in alike if each not in self._played]
        body = body_fields(request)
        same = [each for each in left if each.body == body]
        like = [each for each in left if _stream(each.body) == _stream(body)]
        [chosen, *_] = same or like or left
        self._played.add(chosen)
        return chosen.reply


def _stream(body: Frame) -> object:
    given: Any = body.get("body")
    return cast("Frame", given).get("stream") if isinstance(given, dict) else None


# -- lines of a file --


def _load(path: str, speed: float) -> list[_Exchange]:
    """Read a file."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as exc:
        raise RecordingError(path, None, f"the file cannot be read: {exc.strerror or exc}") from exc
    drafts: list[_Draft] = []
    number, begun = 1, False
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            entry = _entry(line)
            if not begun:
                begun = _check_first(entry)
            elif "request" in entry:
                drafts.append(_Draft(entry, number, speed))
            elif drafts:
                drafts[-1].add(entry)
            else:
                raise _Flaw("the first exchange does not begin with a line that has a 'request'")
        if not begun:
            _check_first({})
        exchanges: list[_Exchange] = []
        for draft in drafts:
            number = draft.number
            exchanges.append(draft.exchange())
    except _Flaw as flaw:
        raise RecordingError(path, number, str(flaw)) from flaw.__cause__
    return exchanges


def _entry(line: bytes) -> Frame:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise _Flaw(f"this is not JSON ({exc}); a recording has one JSON object a line") from None
    if not isinstance(entry, dict):
        raise _Flaw("this is not a JSON object; a recording has one a line")
    return cast("Frame", entry)


def _check_first(entry: Frame) -> bool:
    if entry != HEADER:
        newer = ": a newer version has written it" if "recording" in entry else ""
        raise _Flaw(f"this is not a recording that this version reads{newer}; it begins with {json.dumps(HEADER)}")
    return True


class _Draft:
    """An exchange, as far as its lines have been read."""

    def __init__(self, entry: Frame, number: int, speed: float) -> None:
        self.number = number
        self._speed = speed
        fields = _fields(entry, "request", "body", "text", "size", "sha256")
        method, space, path = _text(fields, "request").partition(" ")
        if not space or not method.isupper() or not path.startswith("/"):
            raise _Flaw(f"request={entry['request']!r}: give a method and a path, as in 'POST /api/chat'")
        self._request = (method, unquote(path.partition("?")[0]))
        self._body = {name: value for name, value in fields.items() if name != "request"}
        self._at = 0.0
        self._before: list[Step] = []
        self._steps: list[Step] | None = None
        self._reply: dict[str, Any] = {}
        self._end: str | None = None

    def add(self, entry: Frame) -> None:
        """Take the next line of the answer."""
        if self._end is not None:
            raise _Flaw("this answer has ended in the line before; begin an exchange with a 'request'")
        kinds = [kind for kind in entry if kind in _LINES]
        if len(kinds) != 1:
            known = ", ".join(_LINES)
            near = get_close_matches(next(iter(entry), ""), _LINES, 1)
            raise _Flaw(f"a line of an answer needs one of: {known}" + (f"; did you mean {near[0]!r}?" if near else ""))
        fields = _fields(entry, kinds[0], "at", *_LINES[kinds[0]])
        self._wait(_number(fields, "at", self._at))
        if kinds[0] == "end":
            self._end = _one_of(fields, "end", _ENDS)
        elif kinds[0] in ("status", "head"):
            self._begin(fields)
        else:
            self._into().append(_STEPS[kinds[0]](fields))

    def _wait(self, at: float) -> None:
        if at < self._at:
            raise _Flaw(f"at={at:g} is before the line above ({self._at:g}); it counts ms from the request")
        seconds = (at - self._at) / 1000 / self._speed
        self._at = at
        if seconds:
            self._into().append(Pause(seconds))

    def _into(self) -> list[Step]:
        return self._before if self._steps is None else self._steps

    def _begin(self, fields: Frame) -> None:
        if self._steps is not None:
            raise _Flaw("this answer has a head already; begin an exchange with a 'request'")
        self._steps = []
        if "head" in fields:
            self._reply["raw"] = _bytes(fields, "head")
        else:
            self._reply["status"] = _status(fields)
            self._reply["framing"] = _one_of(fields, "framing", _FRAMINGS) if "framing" in fields else "chunked"
            self._reply["headers"] = _headers(fields.get("headers", {}))
        if "cut_at" in fields:
            self._reply["cut_at"] = _integer(fields, "cut_at")
        self._reply["ignore_leave"] = fields.get("ignore_leave") is True

    def exchange(self) -> _Exchange:
        """Return it, now that all its lines have been read."""
        end = list(_ENDS[self._end or "complete"])
        if self._steps is None and self._end not in _WITHOUT_HEAD:
            raise _Flaw("this exchange has no answer: add a line with a 'status', or an 'end' that needs none ('cut')")
        try:
            if self._steps is None:
                reply = Reply([*self._before, *end], raw=b"")
            else:
                reply = Reply([*self._steps, *end], before_head=self._before, **self._reply)
        except ValueError as exc:
            raise _Flaw(str(exc)) from exc
        return _Exchange(self._request, self._body, reply)


_LINES: dict[str, tuple[str, ...]] = {
    "status": ("headers", "framing", "cut_at", "ignore_leave"),
    "head": ("cut_at", "ignore_leave"),
    "line": (),
    "lines": (),
    "json": (),
    "data": (),
    "raw": (),
    "trickle": ("interval",),
    "endless": ("interval",),
    "end": (),
}
"""What a line of an answer is, and what else it may say."""


def _endless(fields: Frame) -> Step:
    frame = _object(fields, "endless")
    return Endless(lambda _: frame, _number(fields, "interval", 0.0) / 1000)


_STEPS: dict[str, Callable[[Frame], Step]] = {
    "line": lambda fields: _object(fields, "line"),
    "lines": lambda fields: Block(*_objects(fields, "lines")),
    "json": lambda fields: encode(fields["json"])[:-1],
    "data": lambda fields: _bytes(fields, "data"),
    "raw": lambda fields: Raw(_bytes(fields, "raw")),
    "trickle": lambda fields: Trickle(_bytes(fields, "trickle"), _number(fields, "interval", 0.0) / 1000),
    "endless": _endless,
}


# -- fields of a line --


def _fields(entry: Frame, *known: str) -> Frame:
    for name in entry:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise _Flaw(f"{name!r} does not belong here" + (f"; did you mean {near[0]!r}?" if near else ""))
    return entry


def _text(fields: Frame, name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _Flaw(f"{name}={value!r}: give a text")
    return value


def _one_of(fields: Frame, name: str, known: Collection[str]) -> str:
    value = _text(fields, name)
    if value not in known:
        raise _Flaw(f"{name}={value!r}: give one of {', '.join(known)}")
    return value


def _number(fields: Frame, name: str, default: float) -> float:
    value: Any = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise _Flaw(f"{name}={value!r}: give milliseconds")
    return float(value)


def _integer(fields: Frame, name: str) -> int:
    value: Any = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _Flaw(f"{name}={value!r}: give a whole number")
    return value


def _status(fields: Frame) -> int:
    status = _integer(fields, "status")
    if not 100 <= status <= 999:
        raise _Flaw(f"status={status}: give three digits, or the whole head as 'head'")
    return status


def _object(fields: Frame, name: str) -> Frame:
    value: Any = fields[name]
    if not isinstance(value, dict):
        raise _Flaw(f"{name}={value!r}: give a JSON object, or use 'data' for text")
    return cast("Frame", value)


def _objects(fields: Frame, name: str) -> list[Frame]:
    value: Any = fields[name]
    if not isinstance(value, list):
        raise _Flaw(f"{name}={value!r}: give a list of JSON objects")
    items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
    return [_object({name: each}, name) for each in items]


def _bytes(fields: Frame, name: str) -> bytes:
    """Return a text as UTF-8, or the bytes of ``{"base64": "..."}``."""
    value: Any = fields[name]
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    try:
        return base64.b64decode(value["base64"], validate=True)
    except (KeyError, TypeError, binascii.Error, ValueError):
        raise _Flaw(f'{name}={value!r}: give a text, or {{"base64": "..."}}') from None


def _headers(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in cast("Frame", value).values()):
        raise _Flaw(f"headers={value!r}: give an object with a text for each name")
    return [*cast("dict[str, str]", value).items()]


# -- writing --


def body_fields(request: RequestRecord) -> Frame:
    """Return what a recording has of the body of a request: JSON without secrets, text, or a digest."""
    data = request.body
    if not data:
        return {}
    digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        return {"body": without_secrets(json.loads(data.decode()))}
    except (UnicodeDecodeError, RecursionError):
        # Nested too deeply for the secrets in it to be found.
        return digest
    except ValueError:
        text = data.decode()
        return digest if SECRET_NAME.search(text) else {"text": text}


def without_secrets(value: Any, *, secret: bool = False) -> Any:
    """Return a JSON value in which texts under names such as ``password`` are hidden, also in lists and objects."""
    if isinstance(value, dict):
        return {
            name: without_secrets(field, secret=secret or SECRET_NAME.search(name) is not None)
            for name, field in cast("Frame", value).items()
        }
    if isinstance(value, list):
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [without_secrets(each, secret=secret) for each in items]
    return HIDDEN if secret and isinstance(value, str) else value


def block_line(data: bytes) -> Frame:
    """Return the line for a block of a body: readable if it can be, and always so that it gives the same bytes."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {"data": {"base64": base64.b64encode(data).decode()}}
    frames: list[Any] = []
    try:
        frames = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    except (ValueError, RecursionError):
        return {"data": text}
    made: Frame = {"data": text}
    if len(frames) == 1:
        made = {"line": frames[0]} if text.endswith("\n") else {"json": frames[0]}
    elif frames:
        made = {"lines": frames}
    kind = next(iter(made))
    try:
        same = kind != "data" and _written(_STEPS[kind](made)) == data
    except _Flaw:
        same = False
    return made if same else {"data": text}


def _written(step: Step) -> bytes:
    return encode(cast("bytes", step))
