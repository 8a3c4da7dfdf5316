"""``StagedCall``: a call that may ask the server something else before its request, or between two requests.

What is asked in a pause is under the tokens of the call, and an end that comes in a pause ends the next request before
it is sent. So it makes no difference to a caller in which request, or between which two, the call is.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, TypeVar

from ollama_async._cancel import CancelToken
from ollama_async._errors import AbortError, OllamaError, PhaseTimeout, StreamClosed
from ollama_async._wire.outcome import ExchangeOutcome, Kind

from .call import Call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from .exchange import Exchange

    Begin = Callable[[], tuple[Exchange, Sequence[CancelToken]]]

T = TypeVar("T")


class Stage:
    """One thing that a call may do around its requests; by itself it does nothing."""

    async def before(self, token: CancelToken) -> None:
        """Do what comes before the first request; an error ends the call."""

    async def opened(self, exchange: Exchange, token: CancelToken) -> None:
        """Do what comes when an answer has begun (has arrived, where it is not a stream)."""

    def concerns(self, error: OllamaError) -> bool:
        """Whether this may mend what a request failed by; then ``mend()`` is next."""
        return False

    async def mend(self, error: OllamaError, failed: Exchange, token: CancelToken) -> Mapping[str, Any]:
        """Return what is different in the body of the next request, or raise an error."""
        raise NotImplementedError


class StagedCall(Call):
    """A call with stages.

    Args:
        body: The body of its request.
        make: Returns what begins an attempt at a request with a body.
        stages: What it does around its requests.
        token: The caller's token, if one was given.
    """

    __slots__ = ("_began", "_body", "_first_tokens", "_make", "_settled", "_stages", "_stop")

    def __init__(
        self,
        body: Mapping[str, Any],
        make: Callable[[Mapping[str, Any]], Begin],
        stages: Sequence[Stage],
        token: CancelToken | None = None,
    ) -> None:
        super().__init__(self._under_first_tokens(make(body)), token)
        self._body: Mapping[str, Any] = body
        self._make = make
        self._stages = stages
        # By the loop's clock; the limit of the whole call counts from here.
        self._began = 0.0
        # The tokens of the first request: what ends that ends what follows it.
        self._first_tokens: Sequence[CancelToken] | None = None
        # Ends what is asked in a pause.
        self._stop = CancelToken()
        # Whether no other request can follow.
        self._settled = False

    def close_threadsafe(self, outcome: ExchangeOutcome) -> bool:
        """End the call now, also between two requests; from any task, thread or signal handler."""
        decided = super().close_threadsafe(outcome)
        if not decided and not self._settled:
            # In another thread than the loop's, which has a request that has failed and may be about to mend it.
            decided = self._outcome_between.try_set(outcome)
        if decided:
            self._stop.abort(outcome.cause)
        return decided

    def close(self, exchange: Exchange, outcome: ExchangeOutcome) -> None:
        """End the attempt that is under way, and what is asked beside it."""
        super().close(exchange, outcome)
        self._stop.abort(outcome.cause)

    async def _attempts(self, work: Callable[[Exchange], Awaitable[T]], partial: Callable[[], Any] | None) -> T:
        if not self._began:
            self._began = asyncio.get_running_loop().time()
            await self._pause(self._before)
        try:
            while True:
                try:
                    return await super()._attempts(self._opening(work), partial)
                except OllamaError as exc:
                    stage = next((stage for stage in self._stages if stage.concerns(exc)), None)
                    if stage is not None:
                        await self._mend(stage, exc)
                    elif not self._ended_between():
                        raise
        finally:
            self._settled = True

    def _ended_between(self) -> bool:
        """Whether another thread has ended the call since its request has failed; the next one then says so."""
        self._settled = True
        outcome, failed = self._outcome_between, self.exchange
        if not outcome or failed is None or failed.reader.outcome is outcome.value:
            return False
        self.exchange = None
        self._begin = self._under_first_tokens(self._make(self._body))
        return True

    async def _before(self, token: CancelToken) -> None:
        try:
            for stage in self._stages:
                await stage.before(token)
        except AbortError:
            raise
        except OllamaError as exc:
            kind: Kind = "timeout" if isinstance(exc, PhaseTimeout) else "error"
            # A copy, as in _mend().
            cause: object = copy.copy(exc)
            if isinstance(exc, StreamClosed):
                kind, cause = "closed", str(exc)
            self._outcome_between.try_set(ExchangeOutcome(kind, cause))
            raise

    def _opening(self, work: Callable[[Exchange], Awaitable[T]]) -> Callable[[Exchange], Awaitable[T]]:
        async def opened(exchange: Exchange) -> T:
            result = await work(exchange)
            self._settled = True
            for stage in self._stages:
                await stage.opened(exchange, self._pause_token())
            return result

        return opened

    async def _mend(self, stage: Stage, error: OllamaError) -> None:
        failed = self.exchange
        assert failed is not None
        # From here on whoever ends the call finds no request, and ends the one that is to come.
        self.exchange = None
        try:
            changes = await self._pause(lambda token: stage.mend(error, failed, token))
        except OllamaError as exc:
            self.exchange = failed
            if failed.reader.outcome is not None:
                # What this error says of the failure is more than what the request itself could tell. A copy, since the
                # frames that the error holds hold the exchange.
                failed.reader.outcome.cause = copy.copy(exc)
            raise
        self._body = {**self._body, **(changes or {})}
        self._begin = self._under_first_tokens(self._make(self._body))

    async def _pause(self, ask: Callable[[CancelToken], Awaitable[T]]) -> T | None:
        """Ask something, unless the call ends; then the next request is ended as the call was."""
        try:
            return await ask(self._pause_token())
        except AbortError as exc:
            self._outcome_between.try_set(ExchangeOutcome("aborted", exc.reason))
            return None
        except BaseException as exc:
            if self.exchange is None and not isinstance(exc, OllamaError):
                kind: Kind = "error" if isinstance(exc, Exception) else "cancelled"
                self._outcome_between.try_set(ExchangeOutcome(kind, exc))
            raise

    def _pause_token(self) -> CancelToken:
        # Else one that the stream makes meanwhile would not end the pause.
        token = self.token = self.token or CancelToken()
        return CancelToken.any(self._stop, token, *(self._first_tokens or ()))

    def _under_first_tokens(self, begin: Begin) -> Begin:
        def begun() -> tuple[Exchange, Sequence[CancelToken]]:
            exchange, tokens = begin()
            exchange.started_at = self._began
            if self._first_tokens is None:
                self._first_tokens = tokens
            return exchange, self._first_tokens

        return begun
