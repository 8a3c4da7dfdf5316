"""``CallGroup``: the calls under way on a client or a transport, which one ``abort()`` ends."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ._cancel import CancelToken

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import anyio


class CallGroup:
    """The calls that are under way are under the token in here; an abort does not touch the calls that follow it.

    Attributes:
        tokens: The token; two if two calls begin at once in two threads.
        closed: Why no call may begin any more; ``None`` as long as one may.
    """

    __slots__ = ("closed", "tokens")

    def __init__(self) -> None:
        self.tokens: list[CancelToken] = []
        self.closed: str | None = None

    def current(self) -> CancelToken:
        """Return the token for a call that begins now."""
        for token in self.tokens:
            if not token.aborted:
                return token
        token = CancelToken()
        self.tokens.append(token)
        return token

    def abort(self, reason: object) -> None:
        """End the calls that are under way, from any thread or signal handler."""
        for token in tuple(self.tokens):
            token.abort(reason)
            # Once it is aborted, so that an abort that Ctrl-C interrupts is repeated by the next one.
            with suppress(ValueError):
                self.tokens.remove(token)

    def close(self, why: str) -> None:
        """End the calls that are under way as closed, from any thread; idempotent.

        This does not abort their token: a ``scope()`` under it may be what closes.
        """
        # First: a call that registers now looks at it afterwards, and ends itself.
        self.closed = why
        for token in tuple(self.tokens):
            token._fire(closed=why)  # noqa: SLF001  (what is under the token is the group)

    def scope(self, token: CancelToken | None) -> AbstractContextManager[anyio.CancelScope]:
        """Put a block under the token of the calls that are under way, and under another one."""
        current = self.current()
        return (current if token is None else CancelToken.any(current, token)).scope()
