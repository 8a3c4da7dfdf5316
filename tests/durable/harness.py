"""What the tests of durable answers have in common: texts that tell their place, and checks of what viewers get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ollama_async.durable import Event, Viewer
from ollama_async.testing import Reply

BOUND = 30.0


def words(count: int, start: int = 0) -> list[str]:
    """Texts of which each tells its number, with letters that JSON and SSE have to escape."""
    return [f"{number} \u00fc\u2028\n" for number in range(start, start + count)]


def telling(count: int, interval: float = 0.0) -> Reply:
    return Reply.chat(*words(count), interval=interval)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.data["message"].get("content", "") for event in events if event.name == "chunk")


def numbers_of(events: Sequence[Event]) -> list[int | None]:
    return [event.number for event in events]


async def rest_of(viewer: Viewer) -> list[Event]:
    """Read to the end."""
    async with asyncio.timeout(BOUND), viewer:
        return [event async for event in viewer]


async def some_of(viewer: Viewer, count: int) -> list[Event]:
    """Read so many events."""
    async with asyncio.timeout(BOUND):
        return [await anext(viewer) for _ in range(count)]


def check_whole(events: Sequence[Event], sent: str, after: int = 0) -> dict[str, Any]:
    """See that nothing is missing, doubled or changed, and return the end."""
    assert numbers_of(events) == list(range(after + 1, after + 1 + len(events)))
    *_, end = events
    assert end.name == "end"
    assert end.data["text"] == sent
    if not after:
        assert text_of(events) == sent
    else:
        assert sent.endswith(text_of(events))
    return end.data


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND} s: {what}"
        await asyncio.sleep(0.005)
