"""What holds for each value that is shown while an answer grows."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def grown(before: Any, after: Any) -> bool:
    """Whether nothing of a value has changed, shrunk or vanished in one that follows it."""
    if before is None:
        return True
    if isinstance(before, str):
        return isinstance(after, str) and after.startswith(before)
    if isinstance(before, list):
        return isinstance(after, list) and len(after) >= len(before) and all(map(grown, before, after))
    if isinstance(before, BaseModel):
        return type(before) is type(after) and all(
            grown(getattr(before, name), getattr(after, name)) for name in before.model_fields_set
        )
    if isinstance(before, dict):
        return isinstance(after, dict) and all(key in after and grown(before[key], after[key]) for key in before)
    return before == after and type(before) is type(after)
