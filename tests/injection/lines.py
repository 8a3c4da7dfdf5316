"""Which lines of the core a piece of code runs through, and something done at one of them, by ``sys.settrace``.

A place is an instruction: the first of a line, and the one after each point at which Python runs signal handlers and
switches threads (the start of a function, the end of a call, a jump back). A handler or a thread really comes at the
latter only; where a line begins is looked at as well, since what lies between two lines changes with each edit.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import ollama_async

PACKAGE = Path(ollama_async.__file__).parent

Trace = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True)
class Place:
    """An instruction of the core, at its n-th execution in a scene.

    Attributes:
        code: The function.
        offset: The instruction within it.
        line: Where that is in the file.
        hit: At which execution, from 1.
        real: Whether Python runs signal handlers just before it.
    """

    code: CodeType
    offset: int
    line: int
    hit: int
    real: bool

    def __str__(self) -> str:
        path = Path(self.code.co_filename).relative_to(PACKAGE)
        after = "" if self.offset in _line_starts(self.code) else f"+{self.offset}"
        return f"{path}:{self.line}{after} {self.code.co_qualname}() #{self.hit}{'' if self.real else ' (no handler)'}"

    @property
    def where(self) -> tuple[CodeType, int]:
        return self.code, self.offset

    @property
    def on(self) -> tuple[CodeType, int]:
        """The function and the line."""
        return self.code, self.line


@cache
def _is_core(filename: str) -> bool:
    path = Path(filename)
    if not path.is_relative_to(PACKAGE):
        return False
    first = path.relative_to(PACKAGE).parts[0]
    return first.startswith("_") and not first.startswith("__")


@cache
def _line_starts(code: CodeType) -> dict[int, int]:
    return {offset: line for offset, line in dis.findlinestarts(code) if line is not None}


@cache
def _awaits(code: CodeType) -> frozenset[int]:
    """Where what a call has returned is going to be awaited.

    Nobody has a coroutine there but the stack of the frame, ``async with`` included: an exception leaves it unawaited
    whatever the code does. And no handler comes: a call that makes a coroutine is not one that Python looks after.
    """
    return frozenset(at.offset for at in dis.get_instructions(code) if at.opname == "GET_AWAITABLE")


@cache
def _lets_handlers_run(code: CodeType) -> frozenset[int]:
    """The instructions after which Python looks whether a signal has come."""
    found: set[int] = set()
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        # After an await nobody looks: the loop has done so.
        begins = name == "RESUME" and (instruction.arg or 0) < 2
        jumps_back = "JUMP_BACKWARD" in name and "NO_INTERRUPT" not in name
        if begins or jumps_back or (name.startswith("CALL") and not name.startswith("CALL_INTRINSIC")):
            found.add(instruction.offset)
    return frozenset(found)


class Recorder:
    """Notes all places that a thread comes to; ``with recorder:`` around the code."""

    def __init__(self) -> None:
        self._hits: Counter[tuple[CodeType, int]] = Counter()
        self._lines: dict[tuple[CodeType, int], int] = {}
        self._real: set[tuple[CodeType, int]] = set()
        # The last instruction of each frame that runs; by number, since to hold a frame is to hold all that is in it.
        self._last: dict[int, int] = {}
        # Frames whose call has called a function of Python's; when that returns, nobody looks for signals.
        self._called: set[int] = set()

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def places(self) -> list[Place]:
        """What was come to, in order; of what was come to often, the first time and the last."""
        found = []
        for (code, offset), hits in self._hits.items():
            real = (code, offset) in self._real
            line = self._lines[code, offset]
            found += [Place(code, offset, line, hit, real) for hit in dict.fromkeys((1, hits))]
        return found

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Trace | None:
        if frame.f_back is not None:
            self._called.add(id(frame.f_back))
        code = frame.f_code
        if not _is_core(code.co_filename) or code.co_name == "<module>":
            return None
        frame.f_trace_opcodes = True
        # Of a generator that goes on it is where it stopped.
        self._last[id(frame)] = frame.f_lasti
        self._called.discard(id(frame))
        return self._at

    def _at(self, frame: FrameType, event: str, arg: Any) -> Trace:
        if event == "opcode":
            code, offset, key = frame.f_code, frame.f_lasti, id(frame)
            before = self._last.get(key, -1)
            real = before in _lets_handlers_run(code) and key not in self._called
            self._last[key] = offset
            self._called.discard(key)
            if offset in _line_starts(code) or (real and offset not in _awaits(code)):
                where = code, offset
                self._hits[where] += 1
                self._lines[where] = frame.f_lineno or code.co_firstlineno
                if real:
                    self._real.add(where)
        elif event == "return":
            self._last.pop(id(frame), None)
        return self._at


class Injector:
    """Does something when a thread comes to a place; ``with injector:`` around the code.

    Attributes:
        fired: Whether it has come there.
        inside: The functions that it was in then, the outermost first.
    """

    def __init__(self, place: Place, action: Callable[[], object]) -> None:
        self.fired = False
        self.inside: list[str] = []
        self._place = place
        self._action = action
        self._left = place.hit

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Trace | None:
        if frame.f_code is not self._place.code:
            return None
        frame.f_trace_opcodes = True
        return self._at

    def _at(self, frame: FrameType, event: str, arg: Any) -> Trace | None:
        if event == "opcode" and frame.f_lasti == self._place.offset:
            self._left -= 1
            if self._left == 0:
                self.fired = True
                sys.settrace(None)
                outer: FrameType | None = frame
                while outer is not None:
                    self.inside.insert(0, outer.f_code.co_name)
                    outer = outer.f_back
                self._action()
        return self._at
