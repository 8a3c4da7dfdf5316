"""``Call``: the attempts of one call, under the same tokens and limits; here each retry is decided."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from ollama_async._cancel import SetOnce
from ollama_async._errors import ResponseError
from ollama_async._wire.outcome import ExchangeEnded, ExchangeOutcome

from .body import raise_for_status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ollama_async._cancel import CancelToken

    from .exchange import Exchange

T = TypeVar("T")

_log = logging.getLogger("ollama_async.retry")


class Call:
    """One call: nothing is sent before it is first ``run()``.

    Args:
        begin: Makes the first attempt, and returns the tokens that end it.
        token: The caller's token, if one was given.

    Attributes:
        exchange: The attempt that is under way, or the last one.
        token: The caller's token.
    """

    __slots__ = ("_begin", "_outcome_between", "_tokens", "exchange", "token")

    def __init__(
        self,
        begin: Callable[[], tuple[Exchange, Sequence[CancelToken]]],
        token: CancelToken | None = None,
    ) -> None:
        self._begin: Callable[[], tuple[Exchange, Sequence[CancelToken]]] | None = begin
        self.token = token
        self.exchange: Exchange | None = None
        self._tokens: Sequence[CancelToken] = ()
        # How it was ended before an attempt was made, or between two.
        self._outcome_between = SetOnce()

    @property
    def outcome(self) -> ExchangeOutcome | None:
        """How it ended, ``None`` while it is open."""
        outcome: ExchangeOutcome | None = (
            self._outcome_between.value if self.exchange is None else self.exchange.reader.outcome
        )
        return outcome

    async def run(self, work: Callable[[Exchange], Awaitable[T]], partial: Callable[[], Any] | None = None) -> T:
        """Make attempts until one is through with the work, or no other is allowed.

        Args:
            work: What is done with an answer whose status is a success.
            partial: Returns the partial answer, for the error.

        Raises:
            OllamaError: How the last attempt failed.

        Cancellation: the socket is closed at once.
        """
        # Apart: Python lets no handler of a `try` cover the line of a `try` or `while` in it. So nothing is left open
        # after Ctrl-C at any line.
        try:
            return await self._attempts(work, partial)
        except BaseException as exc:
            if self.exchange is not None:
                if not isinstance(exc, Exception):
                    self.exchange.reader.close(ExchangeOutcome("cancelled", exc))
                if self.exchange.observed is not None:
                    self.exchange.report_error(exc)
            raise

    async def _attempts(self, work: Callable[[Exchange], Awaitable[T]], partial: Callable[[], Any] | None) -> T:
        exchange = self.exchange or self._start()
        error: ResponseError | None = None
        try:
            while True:
                error = None
                try:
                    await exchange.open()
                    if exchange.reader.status >= 300:
                        await raise_for_status(exchange)
                    return await work(exchange)
                except ExchangeEnded:
                    pass
                except ResponseError as exc:
                    error = exc
                if not self.retry(error):
                    raise error or exchange.error(partial and partial())
                exchange = self.exchange or exchange
        finally:
            # Raised, it holds this frame.
            del error

    def retry(self, error: BaseException | None = None) -> bool:
        """Put another attempt in the place of one that has failed, if that is allowed.

        Args:
            error: What the answer said, where that had arrived as a whole: then the exchange has not ended early.

        Returns:
            Whether there is another attempt.
        """
        failed = self.exchange
        delay = self._retry_delay(error)
        if failed is None or delay is None:
            return False
        failed.budget.record_failure()
        cause = error or failed.error()
        if failed.observed is not None:
            failed.observed.retrying(cause, delay)
        _log.info("attempt again in %.2f s, after %s", delay, type(cause).__name__)
        self._use(failed.again(delay), self._tokens)
        return True

    def register(self, token: CancelToken) -> None:
        """Put the call under a token of the caller."""
        self.token = token
        if self.exchange is not None:
            self.exchange.register(token)

    def close_threadsafe(self, outcome: ExchangeOutcome) -> bool:
        """End the call now, whichever attempt is under way; from any task, thread or signal handler.

        Returns:
            Whether this call ended it.
        """
        failed = self.exchange
        if failed is not None:
            if failed.reader.close_threadsafe(outcome):
                return True
            if self._retry_delay() is None:
                return False
        decided = self._outcome_between.try_set(outcome)
        # The next attempt may have been made by its own loop in this very moment, while this is another thread.
        exchange = self.exchange
        if decided and exchange is not None and exchange is not failed:
            exchange.reader.close_threadsafe(outcome)
        return decided

    def close(self, exchange: Exchange, outcome: ExchangeOutcome) -> None:
        """End the attempt that is under way, in its loop's thread."""
        exchange.reader.close(outcome)

    def _start(self) -> Exchange:
        assert self._begin is not None
        exchange, tokens = self._begin()
        # Where there is only one attempt, they are not needed again.
        self._tokens = tokens if exchange.budget.limit else ()
        self._use(exchange, tokens)
        # It holds the request and its body, which an answer of minutes does not need.
        self._begin = None
        return exchange

    def _use(self, exchange: Exchange, tokens: Sequence[CancelToken]) -> None:
        """Make an attempt the present one, and register it with every token."""
        # First: from here on, whatever ends the call or interrupts this finds it.
        self.exchange = exchange
        try:
            # An outcome between the attempts is older than an abort of the tokens.
            if self._outcome_between:
                exchange.reader.close(self._outcome_between.value)
            for token in tokens:
                exchange.register(token)
            if self.token is not None:
                exchange.register(self.token)
            # Ended by another thread, which found the attempt before this one, or none.
            if self._outcome_between:
                exchange.reader.close(self._outcome_between.value)
        except BaseException as exc:
            exchange.reader.close(ExchangeOutcome("cancelled", exc))
            raise

    def _retry_delay(self, error: BaseException | None = None) -> float | None:
        exchange = self.exchange
        if exchange is None or not exchange.budget.remaining:
            return None
        if error is None and exchange.reader.failure_outcome is None:
            return None
        return exchange.backoff(error or exchange.error())
