"""What a scripted server does: steps, and replies made of steps. Pure data, except for `Gate`."""

import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self, TypeAlias, cast

from ollama_async._secret import showable

Frame: TypeAlias = dict[str, Any]


@showable
@dataclass(frozen=True)
class Pause:
    """Wait for that many seconds."""

    seconds: float


@dataclass(frozen=True)
class Stall:
    """Do nothing more, until the client leaves or the server stops."""


@dataclass(frozen=True)
class Cut:
    """Send FIN now, wherever the reply is; under TLS without a close_notify. What was written before still arrives."""


@dataclass(frozen=True)
class Reset:
    """Send RST now, wherever the reply is. Unix sockets have no RST: there the client sees the end of the stream."""


@dataclass(frozen=True)
class NoEnd:
    """Play on, but never end the body: no terminating chunk, no FIN. The reply then stalls after its last step."""


@showable
@dataclass(frozen=True)
class Raw:
    """Write these bytes as they are, outside of the body's framing."""

    data: bytes


@showable
@dataclass(frozen=True)
class Trickle:
    """Write the data one byte at a time, each framed on its own.

    Attributes:
        data: the bytes.
        interval: seconds before each byte but the first.
    """

    data: bytes
    interval: float = 0.0


@showable
@dataclass(frozen=True)
class Endless:
    """Write body blocks for ever; the client's window is the only brake when there is no interval.

    Attributes:
        make: called with 0, 1, 2, … on the server's thread, returns the block.
        interval: seconds before each block but the first.
    """

    make: Callable[[int], Frame | bytes]
    interval: float = 0.0


@showable
@dataclass(frozen=True, init=False)
class Block:
    """Several lines or pieces in one body block: one HTTP chunk, one write."""

    parts: tuple[Frame | bytes, ...]

    def __init__(self, *parts: Frame | bytes) -> None:
        object.__setattr__(self, "parts", parts)


class Live:
    """Steps that are not known yet: those of an answer that is passed on while it comes."""

    def __init__(self, steps: AsyncIterator["Step"]) -> None:
        self.steps = steps


class Gate:
    """A place in a script where the server waits until the test calls `open()`; once open it stays open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._arrivals = 0
        # Called under the lock: a waiter that has not deregistered yet is still alive, and so is its event loop.
        self._waiters: list[Callable[[], object]] = []

    @property
    def reached(self) -> bool:
        """The server has reached this gate at least once."""
        return self._arrivals > 0

    def wait_reached(self, timeout: float = 5.0, *, count: int = 1) -> bool:
        """Block until the server has reached this gate.

        Args:
            timeout: seconds to wait.
            count: how many times, for a gate that several requests come to.

        Returns:
            True.

        Raises:
            TimeoutError: it did not come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrivals >= count, timeout):
                raise TimeoutError(f"the gate was reached {self._arrivals} of {count} times within {timeout} s")
        return True

    def open(self) -> None:
        """Let everyone through, now and later; callable from any thread."""
        with self._changed:
            self._open = True
            for wake in self._waiters:
                wake()

    def arrive(self, wake: Callable[[], object]) -> None:
        """Register a waiter (the server does): `wake` is called, on any thread, when the gate is open."""
        with self._changed:
            self._arrivals += 1
            self._waiters.append(wake)
            if self._open:
                wake()
            self._changed.notify_all()

    def depart(self, wake: Callable[[], object]) -> None:
        """Remove a waiter (the server does)."""
        with self._changed:
            self._waiters.remove(wake)


Step: TypeAlias = bytes | Frame | Block | Pause | Gate | Stall | Cut | Reset | NoEnd | Raw | Trickle | Endless | Live
_STEPS = (bytes, dict, Block, Pause, Gate, Stall, Cut, Reset, NoEnd, Raw, Trickle, Endless, Live)
_WRITE = (bytes, dict, Block, Raw, Trickle)

_JSON = ("Content-Type", "application/json; charset=utf-8")
_EVENTS = ("Content-Type", "text/event-stream")


def encode(block: Frame | bytes | Block) -> bytes:
    """Turn a body block into bytes: a dict is one NDJSON line."""
    match block:
        case bytes():
            return block
        case Block(parts=parts):
            return b"".join(map(encode, parts))
        case _:
            return _compact(block) + b"\n"


def _compact(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def _steps(steps: Sequence[object]) -> tuple[Step, ...]:
    if isinstance(steps, bytes | str | dict) or not all(isinstance(step, _STEPS) for step in steps):
        raise TypeError(f"a reply takes a sequence of steps, not {steps!r}")
    return cast("tuple[Step, ...]", tuple(steps))


@dataclass(frozen=True)
class Reply:
    r"""One scripted answer. `dataclasses.replace(reply, cut_at=7)` makes a variant of a ready-made one.

    Attributes:
        steps: the body, played in order. `bytes`, a `dict` (one NDJSON line) and a `Block` are one HTTP chunk and one
            write each.
        status: of the answer.
        headers: added to the usual ones, or in their place when the name is the same (a wrong `Content-Length`, say).
        framing: how the body's end is told: `"close"` sends FIN after the last step.
        before_head: steps played before the head is sent; what they write is unframed.
        raw: exact bytes instead of the head; the steps follow unframed and the end of the body is not told.
        cut_at: send FIN after exactly that many bytes of this answer (head, framing and body).
        read_body: False answers as soon as the request's head is there and stops reading from the socket until the
            reply has been played, then sends FIN. Bytes that arrive with the head are recorded. While it does not
            read, the server cannot see the client's FIN either, nor its RST before the next write.
        ignore_leave: go on writing after the client's FIN, to count what it would still have been sent.
        whole: what a request that asks for no stream is answered with, as one JSON object, after the steps that write
            nothing have been played; None plays the steps to every request.
    """

    steps: Sequence[Step] = ()
    _: KW_ONLY
    status: int = 200
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    framing: Literal["chunked", "length", "close"] = "chunked"
    before_head: Sequence[Step] = ()
    raw: bytes | None = None
    cut_at: int | None = None
    read_body: bool = True
    ignore_leave: bool = False
    whole: Frame | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _steps(self.steps))
        object.__setattr__(self, "before_head", _steps(self.before_head))
        if self.framing == "length" and any(isinstance(step, Endless) for step in self.steps):
            raise ValueError("an endless body has no length: use another framing")

    @property
    def header_pairs(self) -> tuple[tuple[str, str], ...]:
        """The headers as pairs, whichever way they were given."""
        return tuple(self.headers.items() if isinstance(self.headers, Mapping) else self.headers)

    @property
    def length(self) -> int:
        """The number of body bytes that the steps write, for `framing="length"`."""
        total = 0
        for step in self.steps:
            if isinstance(step, bytes | dict | Block):
                total += len(encode(step))
            elif isinstance(step, Trickle | Raw):
                total += len(step.data)
        return total

    def unstreamed(self) -> Self:
        """Return the reply to a request that asks for no stream."""
        if self.whole is None:
            return self
        # An answer that never ends is never whole.
        waits = [Stall() if isinstance(step, Endless) else step for step in self.steps if not isinstance(step, _WRITE)]
        pairs = [pair for pair in self.header_pairs if pair != _EVENTS]
        return replace(
            self,
            steps=[_compact(self.whole)],
            headers=pairs if any(name.lower() == "content-type" for name, _ in pairs) else [*pairs, _JSON],
            framing="length" if self.framing == "chunked" else self.framing,
            before_head=[*self.before_head, *waits],
            whole=None,
        )

    @classmethod
    def chat(
        cls,
        *texts: str,
        interval: float = 0.0,
        done: bool = True,
        model: str = "fake",
        thinking: Sequence[str] = (),
        tool_calls: Sequence[Frame] = (),
        done_reason: str = "stop",
    ) -> Self:
        """Make an answer of `/api/chat`, one frame a text; one JSON object if the request says `"stream": false`.

        Args:
            *texts: the contents of the frames.
            interval: seconds between two frames.
            done: send the final frame; without it the body ends properly, but too early.
            model: the name in each frame.
            thinking: thinking texts, one frame each, before the others.
            tool_calls: calls as in the server's `message.tool_calls`, all in one frame after the texts.
            done_reason: of the final frame.

        Returns:
            The reply.
        """
        messages: list[Frame] = [{"content": "", "thinking": text} for text in thinking]
        messages += [{"content": text} for text in texts]
        if tool_calls:
            messages.append({"content": "", "tool_calls": list(tool_calls)})
        frames = [chat_frame(n, model, **message) for n, message in enumerate(messages)]
        if done:
            frames.append(chat_frame(len(frames), model, content="") | ending(len(frames), done_reason))
        last = frames[-1] if frames else chat_frame(0, model)
        message: Frame = {"role": "assistant", "content": "".join(texts)}
        if thinking:
            message["thinking"] = "".join(thinking)
        if tool_calls:
            message["tool_calls"] = list(tool_calls)
        return cls(spaced(frames, interval), whole=last | {"message": message})

    @classmethod
    def generate(
        cls,
        *texts: str,
        interval: float = 0.0,
        done: bool = True,
        model: str = "fake",
        thinking: Sequence[str] = (),
        done_reason: str = "stop",
    ) -> Self:
        """Make an answer of `/api/generate`, one frame a text; one JSON object if the request says `"stream": false`.

        Args:
            *texts: the responses of the frames.
            interval: seconds between two frames.
            done: send the final frame; without it the body ends properly, but too early.
            model: the name in each frame.
            thinking: thinking texts, one frame each, before the others.
            done_reason: of the final frame.

        Returns:
            The reply.
        """
        parts: list[Frame] = [{"response": "", "thinking": text} for text in thinking]
        parts += [{"response": text} for text in texts]
        frames = [generate_frame(n, model, **part) for n, part in enumerate(parts)]
        if done:
            last = generate_frame(len(frames), model, response="") | ending(len(frames), done_reason)
            frames.append(last | {"context": [1, 2, 3]})
        whole = (frames[-1] if frames else generate_frame(0, model)) | {"response": "".join(texts)}
        if thinking:
            whole["thinking"] = "".join(thinking)
        return cls(spaced(frames, interval), whole=whole)

    @classmethod
    def openai_chat(
        cls,
        *texts: str,
        interval: float = 0.0,
        done: bool = True,
        model: str = "fake",
        thinking: Sequence[str] = (),
        tool_calls: Sequence[Frame] = (),
        finish_reason: str = "stop",
        usage: bool = False,
    ) -> Self:
        """Make an answer of `/v1/chat/completions`: server-sent events if the request says `"stream": true`.

        Args:
            *texts: the contents of the events, one each.
            interval: seconds between two events.
            done: send the event with the `finish_reason`, and `[DONE]`.
            model: the name in each event.
            thinking: texts of `reasoning`, one event each, before the others.
            tool_calls: calls as in `message.tool_calls` of that API, all in one event after the texts.
            finish_reason: of the last event; of one with tool calls it is `"tool_calls"`.
            usage: send the counts as well, in an event before `[DONE]`, as for `stream_options.include_usage`.

        Returns:
            The reply.
        """
        deltas: list[Frame] = [{"content": "", "reasoning": text} for text in thinking]
        deltas += [{"content": text} for text in texts]
        if tool_calls:
            deltas.append({"content": "", "tool_calls": list(tool_calls)})
            finish_reason = "tool_calls"
        count = len(deltas)
        counts = {"prompt_tokens": _PROMPT_TOKENS, "completion_tokens": count, "total_tokens": _PROMPT_TOKENS + count}
        head: Frame = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": int(_EPOCH.timestamp()),
            "model": model,
            "system_fingerprint": "fp_ollama",
        }
        choices: list[Frame] = [{"delta": {"role": "assistant", **delta}, "finish_reason": None} for delta in deltas]
        if done:
            choices.append({"delta": {"role": "assistant", "content": ""}, "finish_reason": finish_reason})
        events = [_event(_compact(head | {"choices": [{"index": 0, **choice}]})) for choice in choices]
        end = [_event(_compact(head | {"choices": list[Frame](), "usage": counts}))] if usage and done else []
        end += [_event(b"[DONE]")] if done else []
        message: Frame = {"role": "assistant", "content": "".join(texts)}
        if thinking:
            message["reasoning"] = "".join(thinking)
        if tool_calls:
            message["tool_calls"] = list(tool_calls)
        choice: Frame = {"index": 0, "message": message, "finish_reason": finish_reason if done else None}
        whole: Frame = head | {"object": "chat.completion", "choices": [choice], "usage": counts}
        return cls([*spaced(events, interval), *end], headers=[_EVENTS], whole=whole)

    @classmethod
    def endless_chat(cls, interval: float = 0.001, *, model: str = "fake") -> Self:
        """Make a `/api/chat` stream that never ends; with `"stream": false` nothing ever comes.

        Args:
            interval: seconds between two frames, 0 for as fast as the client reads.
            model: the name in each frame.

        Returns:
            The reply.
        """
        never_sent = chat_frame(0, model, content="")
        return cls([Endless(lambda n: chat_frame(n, model, content=word(n)), interval)], whole=never_sent)

    @classmethod
    def endless_generate(cls, interval: float = 0.001, *, model: str = "fake") -> Self:
        """Make a `/api/generate` stream that never ends; with `"stream": false` nothing ever comes.

        Args:
            interval: seconds between two frames, 0 for as fast as the client reads.
            model: the name in each frame.

        Returns:
            The reply.
        """
        never_sent = generate_frame(0, model, response="")
        return cls([Endless(lambda n: generate_frame(n, model, response=word(n)), interval)], whole=never_sent)

    @classmethod
    def json(cls, obj: object, status: int = 200) -> Self:
        """Make a JSON answer with a `Content-Length`.

        Args:
            obj: the value to encode.
            status: of the answer.

        Returns:
            The reply.
        """
        return cls([_compact(obj)], status=status, headers=[_JSON], framing="length")

    @classmethod
    def error(cls, status: int, message: str, **extra: object) -> Self:
        """Make an error answer as the server gives it before a stream begins.

        Args:
            status: of the answer.
            message: the text under `error`.
            **extra: more keys of the body.

        Returns:
            The reply.
        """
        return cls.json({"error": message, **extra}, status)


_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_TOKEN_NS = 20_000_000
_PROMPT_TOKENS = 11
_TEXT = (
    "This answer comes from a fake Ollama server. No model was asked, nothing was computed, and every word is the same "
    "each time. It streams one token after the other until it is done, or until somebody stops it."
)
_WORDS = _TEXT.split()


def word(n: int) -> str:
    """Return the n-th token of an answer that repeats for ever."""
    return (" " if n else "") + _WORDS[n % len(_WORDS)]


def stamp(n: int) -> str:
    """Return a time as Go writes it: the same for the n-th frame of every answer, so that answers can be compared."""
    moment = _EPOCH + timedelta(microseconds=n * _TOKEN_NS // 1000)
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}000Z"


def chat_frame(n: int, model: str, **message: object) -> Frame:
    """Make the n-th frame of a chat."""
    return {"model": model, "created_at": stamp(n), "message": {"role": "assistant", **message}, "done": False}


def generate_frame(n: int, model: str, **fields: object) -> Frame:
    """Make the n-th frame of a completion."""
    return {"model": model, "created_at": stamp(n), **fields, "done": False}


def ending(tokens: int, reason: str) -> Frame:
    """Make what the final frame of a generation has on top of the others."""
    load, prompt = 5_000_000, 12_000_000
    counts = {"eval_count": tokens, "eval_duration": tokens * _TOKEN_NS} if tokens else {}
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": load + prompt + tokens * _TOKEN_NS,
        "load_duration": load,
        "prompt_eval_count": _PROMPT_TOKENS,
        "prompt_eval_duration": prompt,
        **counts,
    }


def spaced(frames: Sequence[Frame | bytes], interval: float) -> list[Step]:
    """Put a pause between every two frames."""
    if not interval:
        return list(frames)
    steps: list[Step] = [step for frame in frames for step in (Pause(interval), frame)]
    return steps[1:]
