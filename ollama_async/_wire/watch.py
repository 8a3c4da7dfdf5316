"""What an abort ends an exchange through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_async._cancel import Watch

from .outcome import ExchangeOutcome

if TYPE_CHECKING:
    from ollama_async._cancel import CancelToken

    from .reader import ResponseReader


class EndByToken(Watch):
    """Ends an exchange with a token.

    Attributes:
        reader: The reader of the exchange.
    """

    __slots__ = ("reader",)

    def __init__(self, token: CancelToken, reader: ResponseReader) -> None:
        super().__init__(token)
        self.reader = reader

    def end(self, reason: object) -> None:
        self.reader.close_threadsafe(ExchangeOutcome("aborted", reason))

    def _close(self, reason: object) -> None:
        self.reader.close_threadsafe(ExchangeOutcome("closed", reason))
