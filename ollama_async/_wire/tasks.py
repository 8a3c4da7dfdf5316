"""How the library stops its own task; it never cancels the tasks of others."""

from __future__ import annotations

import asyncio
from typing import Any

# How long a caller waits for a task of ours that has been told to stop.
_JOIN_SECONDS = 0.5


def cancel_once(task: asyncio.Task[Any]) -> None:
    """Tell a task of ours to stop, unless it has been told.

    A second cancellation would interrupt foreign code in it (the caller's generator, the pool of a foreign transport)
    while that cleans up after the first.
    """
    if not task.cancelling():
        task.cancel()


async def join_cancelled(task: asyncio.Task[Any]) -> None:
    """Give a task of ours that has been told to stop the few rounds it needs, so that nothing of it is left behind.

    Cancellation: safe; everything decisive has been done, and the task ends anyway.
    """
    if not task.done():
        # Foreign code may be on its way out in it: abort() waits for nobody.
        await asyncio.wait([task], timeout=_JOIN_SECONDS)
