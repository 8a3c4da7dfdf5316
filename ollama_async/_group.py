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
    """

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens: list[CancelToken] = []

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

    def scope(self, token: CancelToken | None) -> AbstractContextManager[anyio.CancelScope]:
        """Put a block under the token of the calls that are under way, and under another one."""
        current = self.current()
        return (current if token is None else CancelToken.any(current, token)).scope()
