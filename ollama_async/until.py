"""Ready conditions for ``until=``: when a stream has enough.

::

    stream = client.chat(model, messages, stream=True, until=max_chars(500) & sentence_end() | max_seconds(20))

When a condition is met, the connection is closed at once, so that the server stops, and the stream ends normally: its
``outcome`` is ``"until"`` and its ``reason`` the condition that was met. Conditions combine with ``|`` and ``&``, also
with functions of the merged answer. They look at the answer after each chunk but the last, at a cost that does not grow
with the answer; thinking is not part of its text.
"""

from __future__ import annotations

import re
import time
from typing import Any, cast

from ollama_async._call.condition import Condition, Predicate, Watch
from ollama_async._call.objects import JSON_COMPLETE
from ollama_async._errors import RequestError, shown

__all__ = [
    "Condition",
    "Predicate",
    "Watch",
    "json_complete",
    "matches",
    "max_chars",
    "max_seconds",
    "max_tokens",
    "repetition",
    "sentence_end",
]


def max_chars(count: int) -> Condition:
    """Make a condition: the answer's text has that many characters, or more, because chunks are never cut.

    Args:
        count: 1 or more.

    Raises:
        RequestError: ``count`` is something else.
    """
    return _MaxChars(_counted("max_chars", count))


def max_tokens(count: int) -> Condition:
    """Make a condition: that many tokens have arrived, thinking included.

    A chunk counts as one token: Ollama sends each token as a chunk, except where it holds some back to read them as a
    whole (tool calls, characters of several tokens). With ``logprobs=True`` the count is exact. For a limit that the
    server keeps, use the option ``num_predict``.

    Args:
        count: 1 or more.

    Raises:
        RequestError: ``count`` is something else.
    """
    return _MaxTokens(_counted("max_tokens", count))


def max_seconds(seconds: float) -> Condition:
    """Make a condition: that many seconds have passed since the first chunk, even if no further chunk comes.

    The time in which the server queues the request, loads the model and reads the prompt does not count: for a limit of
    the whole call, which raises ``PhaseTimeout``, use ``timeout=``. Joined to something else by ``&``, it is looked at
    when a chunk comes, as everything is.

    Args:
        seconds: Above 0.

    Raises:
        RequestError: ``seconds`` is something else.
    """
    if isinstance(seconds, bool) or not isinstance(cast("object", seconds), (int, float)) or not 0 < seconds < _ENDLESS:
        raise RequestError(f"max_seconds({shown(seconds)}): give a number of seconds above 0")
    return _MaxSeconds(seconds)


def matches(pattern: str | re.Pattern[str], *, within: int = 1000) -> Condition:
    r"""Make a condition: a regular expression has matched anywhere in the answer's text.

    Args:
        pattern: The expression, searched for as ``re.search()`` does; compile it to give flags. It is tried at each
            chunk: ``$`` and ``\b`` match at the end of the text so far.
        within: The most characters that a match has, 1 or more. Only so much of the text is searched again when more
            of it comes.

    Raises:
        RequestError: It is not a regular expression, or ``within`` is not such a number.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as exc:
        raise RequestError(f"matches({shown(pattern)}): give a valid regular expression: {exc}") from exc
    if not isinstance(compiled.pattern, str):
        raise RequestError(f"matches({shown(pattern)}): give a pattern of str, not of bytes: answers are text")
    return _Matches(compiled, _counted("matches", within, "within="))


def sentence_end() -> Condition:
    """Make a condition: the answer's text ends with the end of a sentence.

    That is a full stop, question or exclamation mark (also those of Chinese, Japanese, Hindi and Arabic), or an
    ellipsis, with closing quotes or brackets behind it. A full stop behind a digit or a single letter is not taken for
    one: it may be a part of a number, of a list or of an abbreviation. Alone it ends the answer after its first
    sentence; ``max_chars(500) & sentence_end()`` ends it with the first sentence that ends after 500 characters.
    """
    return _SentenceEnd()


def repetition(times: int = 4, *, chars: int = 100, longest: int = 500) -> Condition:
    """Make a condition: the answer's text has begun to repeat itself, so its end is the same piece again and again.

    Args:
        times: How often in a row, 2 or more.
        chars: How many characters the copies have together at least, 1 or more: a line of dashes is not a fault.
        longest: The most characters that the piece has, 1 or more.

    Raises:
        RequestError: One of them is something else.
    """
    if _counted("repetition", times, "times=") < 2:
        raise RequestError(f"repetition(times={times}): give a whole number, 2 or more")
    return _Repetition(times, _counted("repetition", chars, "chars="), _counted("repetition", longest, "longest="))


def json_complete() -> Condition:
    """Make a condition: the answer's text is a complete JSON value, after which text is useless.

    ``stream.objects()`` and ``stream.items()`` do this by themselves. An answer that is not JSON never meets it.
    """
    return JSON_COMPLETE


def _counted(name: str, count: object, parameter: str = "") -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RequestError(f"{name}({parameter}{shown(count)}): give a whole number, 1 or more")
    return count


# Thirty years.
_ENDLESS = 1e9


class _MaxChars(Condition):
    def __init__(self, count: int) -> None:
        self._count = count

    def watch(self) -> Watch:
        return lambda answer: self if len(answer.text) >= self._count else None

    def __repr__(self) -> str:
        return f"max_chars({self._count})"


class _MaxTokens(Condition):
    def __init__(self, count: int) -> None:
        self._count = count

    def watch(self) -> Watch:
        chunks = 0

        def look(answer: Any) -> Condition | None:
            nonlocal chunks
            chunks += 1
            tokens = len(answer.logprobs) if answer.logprobs else chunks
            return self if tokens >= self._count else None

        return look

    def __repr__(self) -> str:
        return f"max_tokens({self._count})"


class _MaxSeconds(Condition):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def watch(self) -> Watch:
        began: float | None = None

        def look(_: Any) -> Condition | None:
            nonlocal began
            now = time.monotonic()
            began = now if began is None else began
            return self if now - began >= self._seconds else None

        return look

    def deadline(self) -> tuple[float, Condition]:
        return self._seconds, self

    def __repr__(self) -> str:
        return f"max_seconds({self._seconds:g})"


class _Matches(Condition):
    def __init__(self, pattern: re.Pattern[str], within: int) -> None:
        self._pattern = pattern
        self._within = within

    def watch(self) -> Watch:
        found, seen = False, 0

        def look(answer: Any) -> Condition | None:
            nonlocal found, seen
            if not found:
                text = answer.text
                # By a position, not of a part: so ^ and what looks back see the text as it is.
                found = self._pattern.search(text, max(0, seen - self._within)) is not None
                seen = len(text)
            return self if found else None

        return look

    def __repr__(self) -> str:
        return f"matches({self._pattern.pattern!r})"


class _SentenceEnd(Condition):
    # Only of the end of a text: a sentence ends with less than this.
    _TAIL = 16
    _END = re.compile(
        r"(?:[!?\u2026\u3002\uff01\uff1f\u0964\u061f]|(?<![0-9])(?<!\b[^\W\d_])\.)"
        r"[\"'\u201d\u2019\u00bb\u300d\u300f)\]*_]{0,4}\s{0,8}\Z"
    )

    def watch(self) -> Watch:
        return lambda answer: self if self._END.search(answer.text[-self._TAIL :]) else None

    def __repr__(self) -> str:
        return "sentence_end()"


class _Repetition(Condition):
    def __init__(self, times: int, chars: int, longest: int) -> None:
        self._times = times
        self._chars = chars
        self._longest = longest

    def watch(self) -> Watch:
        reach = max(self._times * self._longest, self._chars)
        return lambda answer: self if self._repeats(answer.text[-reach:]) else None

    def _repeats(self, end: str) -> bool:
        """Whether a text ends with copies of one piece, as many and as long as they have to be."""
        # The text ends as it did one copy before; so much of it does at least, whatever the length of a copy is.
        tail = end[-max(1, min(16, self._chars * (self._times - 1) // self._times)) :]
        place = len(end)
        while place and (place := end.rfind(tail, 0, place - 1)) >= 0:
            piece = len(end) - len(tail) - place
            if piece > self._longest:
                return False
            copies = max(self._times * piece, self._chars)
            if copies <= len(end) and end[-copies:-piece] == end[-copies + piece :]:
                return True
            place += len(tail)
        return False

    def __repr__(self) -> str:
        return f"repetition({self._times}, chars={self._chars}, longest={self._longest})"
