"""``PoolStream``: a stream whose call waits for a host first."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ollama_async._call.chunk import ChunkT
from ollama_async._call.chunk_reader import ChunkReader
from ollama_async._call.decoder import NdjsonDecoder
from ollama_async._call.ndjson import MAX_LINE_BYTES
from ollama_async._call.staged import Stage, StagedCall
from ollama_async._call.stream import Continuation, Stream
from ollama_async._errors import AbortError, CannotContinue, OllamaError, StreamClosed
from ollama_async._model.input import format_model
from ollama_async._model.merge import ChatMerge, GenerateMerge
from ollama_async._secret import showable
from ollama_async._wire.outcome import ExchangeOutcome

from ._calls import Ask, Calls, Lease

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from ollama_async._call.answer import Answer
    from ollama_async._call.exchange import Exchange
    from ollama_async._call.staged import Begin, T
    from ollama_async._cancel import CancelToken

__all__ = ["PoolStream"]


class _AtHosts(Stage):
    """Has a call wait for a slot, and for one at another host where the first has failed before the first byte.

    Around a request at a host it does what the call of that host's client would do around it.

    Attributes:
        ask: The call.
        answer: What arrives; the reader's.
        lease: The slot that it has, or had last.
        made: What the client of that host would read the answer with; ``None`` while the call waits for a slot.
    """

    answer: Answer[Any]

    def __init__(self, calls: Calls, ask: Ask) -> None:
        self._calls = calls
        self.ask: Ask = ask
        self.lease: Lease | None = None
        self.made: ChunkReader[Any] | None = None
        # What may mend the failure of a request at the same host.
        self._mending: Stage | None = None

    def make(self, changes: Mapping[str, Any]) -> Begin:
        """Return what begins a request at the host that the call has got."""

        def begin() -> tuple[Exchange, Sequence[CancelToken]]:
            assert self.made is not None
            call = self.made.call
            first = call._begin  # noqa: SLF001  (as that call would, were it run)
            if isinstance(call, StagedCall) and (changes or first is None):
                first = call._make({**call._body, **changes})  # noqa: SLF001  (as above)
            assert first is not None
            begun = first()
            # It holds the request.
            call._begin = None  # noqa: SLF001  (as above)
            return begun

        return begin

    async def before(self, token: CancelToken) -> None:
        while True:
            self.made = None
            self.lease = await self._calls.acquire(self.ask, token)
            method = getattr(self.lease.server.client, self.ask.kind)
            made = method(self.ask.model, *self.ask.arguments, stream=True, **self.ask.options)._reader  # noqa: SLF001
            mine, its = self.answer, made.answer
            mine.merge, mine.add, mine.decoder = its.merge, its.add, its.decoder
            self.made = made
            try:
                for stage in self._stages():
                    await stage.before(token)
            except OllamaError as exc:
                if not self._calls.goes_on(self.lease, exc):
                    raise
            else:
                return

    async def opened(self, exchange: Exchange, token: CancelToken) -> None:
        for stage in self._stages():
            await stage.opened(exchange, token)

    def concerns(self, error: OllamaError) -> bool:
        self._mending = next((stage for stage in self._stages() if stage.concerns(error)), None)
        return self._mending is not None or self._goes_on(error)

    async def mend(self, error: OllamaError, failed: Exchange, token: CancelToken) -> Mapping[str, Any]:
        if self._mending is not None:
            try:
                return await self._mending.mend(error, failed, token)
            except OllamaError as exc:
                if not self._goes_on(exc):
                    raise
        await self.before(token)
        return {}

    def _stages(self) -> Sequence[Stage]:
        call = None if self.made is None else self.made.call
        return call._stages if isinstance(call, StagedCall) else ()  # noqa: SLF001  (as above)

    def _goes_on(self, error: OllamaError) -> bool:
        return self.made is not None and self.lease is not None and self._calls.goes_on(self.lease, error)


class _PoolCall(StagedCall):
    """A call that is made at one host after the other until one gives a first byte."""

    __slots__ = ("_paused_under", "hosts")

    def __init__(self, calls: Calls, ask: Ask) -> None:
        self.hosts = _AtHosts(calls, ask)
        self._paused_under: CancelToken | None = None
        super().__init__({}, self.hosts.make, [self.hosts], ask.token)
        self._first_tokens: Sequence[CancelToken] | None = ask.tokens
        self._begin = None

    async def run(self, work: Callable[[Exchange], Awaitable[T]], partial: Callable[[], Any] | None = None) -> T:
        """Make attempts, as any call does; the slot stays with the exchange only where it has been opened.

        Cancellation: the socket is closed at once.
        """
        try:
            return await super().run(work, partial)
        except BaseException as exc:
            if self.hosts.lease is not None:
                self.hosts.lease.release()
            if self.exchange is None and isinstance(exc, OllamaError):
                self._outcome_between.try_set(ExchangeOutcome("error", copy.copy(exc)))
            raise

    def _start(self) -> Exchange:
        if self.hosts.made is None:
            raise self._end_of_wait()
        # Made here, since it holds this call.
        self._begin = self._under_first_tokens(self._make(self._body))
        return super()._start()

    def _pause_token(self) -> CancelToken:
        # Once for all pauses: what it is made of does not change.
        if self._paused_under is None:
            self._paused_under = super()._pause_token()
        return self._paused_under

    def _under_first_tokens(self, begin: Begin) -> Begin:
        def begun() -> tuple[Exchange, Sequence[CancelToken]]:
            exchange, tokens = begin()
            exchange.started_at = self._began
            return exchange, [*tokens, *(self._first_tokens or ())]

        return begun

    def _end_of_wait(self) -> OllamaError:
        """Return what has ended the call while no host had it."""
        outcome = self._outcome_between.value
        if outcome.kind == "aborted":
            return AbortError(outcome.cause)
        if isinstance(outcome.cause, OllamaError):
            return copy.copy(outcome.cause)
        if outcome.kind == "cancelled":
            return StreamClosed("the stream is closed: the task that read it was cancelled")
        return StreamClosed(outcome.cause or "the stream is closed")


class _PoolReader(ChunkReader[ChunkT]):
    """Reads an answer as the reader of a host's stream would, whose place it takes once the answer has begun."""

    __slots__ = ("hosts",)

    def __init__(self, call: _PoolCall) -> None:
        ask = call.hosts.ask
        super().__init__(call, *_NOTHING[ask.kind], response_model=format_model(ask.options.get("format")))
        self.hosts: _AtHosts = call.hosts
        # Once there is a host it is decoded and merged as its client would.
        call.hosts.answer = self.answer

    async def _note_opened(self, exchange: Exchange) -> Exchange:
        made = self.hosts.made
        assert made is not None
        assert self.hosts.lease is not None
        self._until, self._deadline, self._strict = made._until, made._deadline, made._strict  # noqa: SLF001
        self.hosts.lease.hold_for(exchange, self.answer)
        return await super()._note_opened(exchange)


def _nothing(merge: Any) -> tuple[Any, NdjsonDecoder[Any]]:
    return merge, NdjsonDecoder(merge.validators, 1, MAX_LINE_BYTES)


# What a stream has before it has a host; nothing is ever added to it.
_NOTHING = {"chat": _nothing(ChatMerge()), "generate": _nothing(GenerateMerge())}


class _Unresumable:
    """Stands where the continuation of an answer would."""

    async def stream(self, partial: Any, **_: Any) -> Any:
        """Refuse, since the new stream would have no slot of the pool."""
        text = "a stream of a pool cannot be resumed; use pool.client(stream.host).continue_from(stream.response, ...)"
        raise CannotContinue(text, partial)


_UNRESUMABLE = _Unresumable()


@showable
class PoolStream(Stream[ChunkT]):
    """A ``Stream`` whose call waits for a host first: the same in all else."""

    _reader: _PoolReader[ChunkT]

    def __init__(self, calls: Calls, ask: Ask) -> None:
        super().__init__(_PoolReader(_PoolCall(calls, ask)))
        self.continuation: Continuation | None = _UNRESUMABLE

    @property
    def host(self) -> str | None:
        """URL of the host that has the call, or had it last; ``None`` until there was one."""
        lease = self._reader.hosts.lease
        return None if lease is None else lease.server.url

    def __repr__(self) -> str:
        reader = self._reader
        if reader.call.exchange is not None:
            return f"<Pool{super().__repr__()[1:-1]} at {self.host}>"
        return (
            f"<PoolStream of {reader.hosts.ask.kind}: {self.outcome or ('waiting' if reader.busy else 'not started')}>"
        )
