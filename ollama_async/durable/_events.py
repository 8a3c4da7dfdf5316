"""The events of an answer as they are kept: one fragment of JSON each, in memory and in Redis alike.

Nearly all chunks differ from the one before in nothing but their text (and the time at which they were made). Such a
chunk is kept as that text alone, a JSON string: a tenth of the whole. Every other event is an object with one key:
``{"open":{...}}``, ``{"chunk":{...}}``, ``{"end":{...}}``. Whoever holds the last whole chunk can make a whole one of
the text again, by putting it where the whole one has its text; no JSON is parsed or written for it.

An end has the whole answer, of which the chunks have nearly all. So it is kept with ``true`` in place of each text that
its chunks make together, and whoever shows it puts that there.

A fragment has no line breaks, so several are kept as lines.
"""

from __future__ import annotations

import json
import re
import secrets
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ollama_async._model.merge import ChatMerge, GenerateMerge
from ollama_async._model.types import ChatResponse, GenerateResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "TEXT",
    "Encoder",
    "Event",
    "Expander",
    "ends",
    "is_text",
    "is_whole_chunk",
    "kept_end",
    "merged",
    "named",
    "shown_end",
    "split",
    "taken_apart",
]

# A third of what json.loads() takes, and this runs for every token in each process that watches.
_JSON_TEXT = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"')
_OPEN, _CHUNK, _END = b'{"open":', b'{"chunk":', b'{"end":'
TEXT = b'"'[0]
"""How a chunk begins that is kept as its text alone."""
# The address of another server; it is nobody's business who watches.
_NOT_KEPT = {"remote_host"}
# What a chunk has that is nothing but a piece of text.
_CHAT = {"model", "created_at", "message", "done"}
_GENERATE = {"model", "created_at", "response", "done"}
_MESSAGE = {"role", "content"}
_THINKING_GENERATE = {*_GENERATE, "thinking"}
_THINKING_MESSAGE = {*_MESSAGE, "thinking"}
# Where an answer has its texts.
_TEXTS = ("content", "response", "thinking")


class Event(NamedTuple):
    """An event of an answer.

    Attributes:
        number: Its place in the answer, from 1 on; what ``attach(after=)`` takes. ``None`` for one that is not in the
            answer's log: it tells the viewers of this process that somebody else's log took the place of theirs.
        name: ``"open"``, ``"chunk"`` or ``"end"``.
        json: Its data, UTF-8.
    """

    number: int | None
    name: str
    json: bytes

    @property
    def data(self) -> dict[str, Any]:
        """Its data: of a chunk, what the model's server sent."""
        return cast("dict[str, Any]", json.loads(self.json))

    def __repr__(self) -> str:
        return f"<Event {self.number}: {self.name}>"


def named(name: str, data: object) -> bytes:
    """Make the fragment of an event that is not a chunk."""
    return f'{{"{name}":{json.dumps(data, ensure_ascii=False, separators=(",", ":"))}}}'.encode()


def is_text(fragment: bytes) -> bool:
    """Return whether it is a chunk that is kept as its text alone."""
    return fragment[0] == TEXT


def ends(fragment: bytes) -> bool:
    """Return whether it is the last event of an answer."""
    return fragment.startswith(_END)


def is_whole_chunk(fragment: bytes) -> bool:
    """Return whether it is a chunk from which those behind it are made again."""
    return fragment.startswith(_CHUNK)


def split(fragment: bytes) -> tuple[str, bytes]:
    """Take an event's fragment that is not a text apart: its name and its data."""
    for key, name in ((_CHUNK, "chunk"), (_END, "end"), (_OPEN, "open")):
        if fragment.startswith(key):
            return name, fragment[len(key) : -1]
    raise AssertionError(fragment[:10])


def taken_apart(lines: bytes) -> list[bytes]:
    """Return the fragments of an entry.

    Raises:
        ValueError: Something else wrote the entry.
    """
    fragments = lines.split(b"\n")
    for fragment in fragments:
        text = fragment.decode()
        if _JSON_TEXT.fullmatch(text):
            continue
        value: Any = json.loads(text)
        if not (fragment.startswith((_CHUNK, _OPEN, _END)) and fragment.endswith(b"}}") and len(value) == 1):
            raise ValueError("not an event")
        if is_whole_chunk(fragment):
            Expander(fragment)
    return fragments


class Encoder:
    """Makes the fragments of an answer's chunks, in their order."""

    def __init__(self) -> None:
        # What the chunk before was, besides its text.
        self._shape: object = None

    def chunk(self, chunk: ChatResponse | GenerateResponse) -> bytes:
        """Return the fragment of the next chunk."""
        # The usual case by itself, since this runs for every token. Its fields as dicts, as where they are merged: each
        # attribute of a pydantic model costs as much as all of this. Only a chat's token was made with four fields
        # (model, created_at, message, done) and its message with three (role, content, thinking).
        came = chunk.fields_that_came
        if len(came) == 4 and not came["done"]:
            part = came["message"].fields_that_came
            if len(part) == 3:
                text, thinking, kind = part["content"], part["thinking"], "text"
                if thinking:
                    text, thinking, kind = thinking, text, "thinking"
                if (came["model"], part["role"], kind, thinking) == self._shape:
                    return encode_basestring(text).encode()
        return self._unusual(chunk)

    def _unusual(self, chunk: ChatResponse | GenerateResponse) -> bytes:
        shape, text = _shape(chunk)
        if shape is not None and shape == self._shape:
            return encode_basestring(text).encode()
        self._shape = shape
        return b'{"chunk":%b}' % chunk.model_dump_json(exclude_none=True, exclude=_NOT_KEPT).encode()


def _shape(chunk: Any) -> tuple[object, str]:
    """Return what a chunk is besides its text, ``None`` for one that is more than that; and the text."""
    if isinstance(chunk, ChatResponse):
        holder: Any = chunk.message
        fields: set[str] = holder.model_fields_set
        if chunk.done or chunk.model_fields_set != _CHAT or (fields != _MESSAGE and fields != _THINKING_MESSAGE):
            return None, ""
        role, text = holder.role, holder.content
    else:
        holder, fields = chunk, chunk.model_fields_set
        if chunk.done or (fields != _GENERATE and fields != _THINKING_GENERATE):
            return None, ""
        role, text = "", holder.response
    thinking = holder.thinking
    if thinking:
        return (chunk.model, role, "thinking", text), thinking
    return (None, "") if text is None else ((chunk.model, role, "text", thinking), text)


class Expander:
    """Makes events of fragments, in their order."""

    def __init__(self, whole: bytes | None) -> None:
        """Begin behind a whole chunk, or at the start."""
        self._around = (b"", b"")
        if whole is not None:
            self._learn(whole)

    def event(self, number: int, fragment: bytes) -> Event:
        """Return the event of a fragment.

        Raises:
            ValueError: It is a text without a place to put it.
        """
        if is_text(fragment):
            before, behind = self._around
            if not before:
                raise ValueError("a text without a chunk that says what it is")
            return Event(number, "chunk", before + fragment + behind)
        name, data = split(fragment)
        if name == "chunk":
            self._learn(fragment)
        return Event(number, name, data)

    def _learn(self, whole: bytes) -> None:
        chunk: dict[str, Any] = json.loads(split(whole)[1])
        holder, place = _text_of(chunk)
        mark = secrets.token_hex(16)
        holder[place] = mark
        text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        before, _, behind = text.partition(f'"{mark}"')
        self._around = before.encode(), behind.encode()


def _text_of(chunk: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what has the text of a whole chunk or an answer, and under which name those behind a chunk have theirs."""
    holder: Any = chunk.get("message", chunk)
    if not isinstance(holder, dict):
        raise ValueError("a message that is not an object")  # noqa: TRY004  (what was read is wrong)
    holder = cast("dict[str, Any]", holder)
    return holder, "thinking" if holder.get("thinking") else "content" if holder is not chunk else "response"


def kept_end(data: dict[str, Any], fragments: Iterable[bytes]) -> bytes:
    """Make the fragment of an end, without the texts that the answer's chunks have."""
    texts = _texts(fragments)
    response = data["response"]
    if response is not None:
        holder = response.get("message", response)
        known = {key: True for key in _TEXTS if holder.get(key) and holder[key] == texts.get(key)}
        response = {**response, "message": {**holder, **known}} if "message" in response else {**response, **known}
    text = True if data["text"] and data["text"] == _shown_text(texts) else data["text"]
    return named("end", {**data, "text": text, "response": response})


def shown_end(kept: bytes, fragments: Iterable[bytes]) -> bytes:
    """Make the data of an end, as it is shown, of its fragment.

    Raises:
        ValueError: It is not a fragment that ``kept_end()`` has made.
    """
    data: dict[str, Any] = json.loads(split(kept)[1])
    response: Any = data.get("response")
    holder = _text_of(cast("dict[str, Any]", response))[0] if isinstance(response, dict) else dict[str, Any]()
    missing = [key for key in _TEXTS if holder.get(key) is True]
    if missing or data.get("text") is True:
        texts = _texts(fragments)
        for key in missing:
            holder[key] = texts.get(key, "")
        if data.get("text") is True:
            data["text"] = _shown_text(texts)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _shown_text(texts: dict[str, str]) -> str:
    return texts.get("content") or texts.get("response") or ""


def _texts(fragments: Iterable[bytes]) -> dict[str, str]:
    """Return the texts that the chunks among some events make together."""
    # A run of texts is made one JSON string, and read at once: an answer's end would otherwise cost as much a token as
    # its chunks do. In a fragment there is no line break, so this is where one ends and the next one begins.
    lines = b"\n".join(fragments)
    found: dict[str, list[str]] = {}
    key, at = "", 0
    while at < len(lines):
        end = lines.find(b"\n{" if lines[at] == TEXT else b"\n", at)
        part = lines[at:] if end < 0 else lines[at:end]
        at += len(part) + 1
        if is_text(part):
            found.setdefault(key, []).append(json.loads(part.replace(b'"\n"', b"")))
        elif is_whole_chunk(part):
            holder, key = _text_of(json.loads(split(part)[1]))
            for each in _TEXTS:
                if isinstance(holder.get(each), str):
                    found.setdefault(each, []).append(holder[each])
    return {key: "".join(parts) for key, parts in found.items()}


def merged(fragments: Sequence[bytes]) -> ChatResponse | GenerateResponse | None:
    """Return the answer that the chunks among some events make together, ``None`` if there are none."""
    merge: Any = None
    for chunk in _chunks(fragments):
        kind: Any = ChatResponse if b'"message":' in chunk.json else GenerateResponse
        if merge is None:
            merge = ChatMerge() if kind is ChatResponse else GenerateMerge()
        merge.add(kind.model_validate_json(chunk.json))
    return None if merge is None else cast("ChatResponse | GenerateResponse", merge.result())


def _chunks(fragments: Sequence[bytes]) -> Iterable[Event]:
    expander = Expander(None)
    events = (expander.event(number, fragment) for number, fragment in enumerate(fragments, 1))
    return (event for event in events if event.name == "chunk")
