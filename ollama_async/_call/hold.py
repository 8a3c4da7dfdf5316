"""``Hold``: a model that blocks of a program keep loaded, for all calls of their client."""

from __future__ import annotations

import asyncio
from typing import Any


class Hold:
    """What blocks of ``client.loaded()`` have in common that keep the same model.

    Attributes:
        users: How many blocks keep it, or are about to.
        num_ctx: Tokens of context that they asked for, if they did.
        keep_alive: How long the server keeps it after the last call, as the server is told.
        ours: Whether one of them has loaded it; then the last one unloads it.
        lock: Taken while one of them has it loaded or unloaded: a model that another block has just found loaded must
            not be unloaded.
        renewal: The task that keeps it loaded while no call is made.
    """

    __slots__ = ("keep_alive", "lock", "num_ctx", "ours", "renewal", "users")

    def __init__(self) -> None:
        self.users: int = 0
        self.num_ctx: int | None = None
        self.keep_alive: float | str = 0
        self.ours: bool = False
        self.lock: asyncio.Lock = asyncio.Lock()
        self.renewal: asyncio.Task[None] | None = None

    def is_kept(self) -> bool:
        """Whether a block keeps it."""
        return self.users > 0

    def complete(self, body: dict[str, Any]) -> None:
        """Add to the body of a call what the model is kept with, where the call does not say it.

        A call without ``num_ctx`` would have the server load the model anew, with its default.
        """
        if not self.is_kept():
            return
        options: dict[str, Any] = body.get("options") or {}
        if self.num_ctx is not None and options.get("num_ctx") is None:
            body["options"] = {**options, "num_ctx": self.num_ctx}
        if body.get("keep_alive") is None:
            body["keep_alive"] = self.keep_alive
