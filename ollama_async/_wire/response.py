"""An answer as httpx or httpx2 hands it to its caller; leaving it, in any way, closes the connection at once."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar, cast

import httpx

from ollama_async._errors import AbortError
from ollama_async._loops import EmptyContext, in_loop

from .family import as_error_of, mixed
from .outcome import ExchangeEnded, ExchangeOutcome

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
    from datetime import timedelta
    from types import ModuleType

    from .reader import ResponseReader

    # The class it is mixed into; that of httpx2 is alike.
    _Response = httpx.Response
else:
    _Response = object

Part = TypeVar("Part")
T = TypeVar("T")


def as_httpx_error(outcome: ExchangeOutcome, package: ModuleType) -> BaseException:
    """Return what to raise to a caller of httpx or httpx2 for how an exchange ended."""
    if outcome.kind == "aborted":
        # Not an error of httpx: a client that is built on it would try again.
        return AbortError(outcome.cause)
    if isinstance(outcome.cause, BaseException):
        return as_error_of(package, outcome.cause)
    return as_error_of(package, httpx.ReadError(f"the exchange was ended: {outcome.kind}"))


class Body:
    """The body of an answer, for a caller that reads it through httpx.

    Args:
        reader: Where it comes from.
        read_timeout: Seconds that each read may wait, ``None`` for no limit.
        package: httpx or httpx2, whichever the caller reads it through.
        ours: Whether only the reader of this body decides how the exchange ends.
    """

    def __init__(self, reader: ResponseReader, read_timeout: float | None, package: ModuleType, *, ours: bool) -> None:
        self._package = package
        self._reader = reader
        self._read_timeout = read_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._ours = ours

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _ClosingReads(self, self._blocks())

    async def _blocks(self) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                block = await self.in_time(self._reader.read())
            except ExchangeEnded as ended:
                raise as_httpx_error(ended.outcome, self._package) from ended
            if not block:
                return
            yield block

    async def in_time(self, awaitable: Awaitable[T]) -> T:
        """Wait for something, for as long as httpx lets a read wait."""
        seconds, loop = self._read_timeout, self._reader.loop
        try:
            if seconds is not None:
                late = ExchangeOutcome("error", httpx.ReadTimeout(f"the server sent nothing for {seconds:g} s"))
                self._timer = loop.call_later(seconds, self._reader.close, late, context=EmptyContext())
            return await awaitable
        finally:
            self._stop_timer()

    async def aclose(self) -> None:
        """Close the connection, unless the whole answer has arrived.

        Cancellation: safe; there is nothing to wait for.
        """
        if self._reader.eof:
            return
        if self._ours:
            self._reader.close(ExchangeOutcome("closed"))
        else:
            # httpx closes a redirect that it does not follow before it says why: that will be the outcome.
            self._reader.drop_link()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close_threadsafe(self) -> None:
        """Close the connection, unless the whole answer has arrived; from any thread."""
        if self._ours:
            self._reader.close_threadsafe(ExchangeOutcome("closed"))
        if self._timer is not None:
            # A Ctrl-C came before it was stopped.
            in_loop(self._reader.loop, self._stop_timer)

    def __del__(self) -> None:
        if hasattr(self, "_ours"):
            self.close_threadsafe()


class _ClosingReads(Generic[Part]):
    """What a loop holds while it reads a body. When it is dropped before the end, the connection is closed at once.

    An async generator alone is finished by the event loop some rounds later, and each that it reads from later still.
    """

    __slots__ = ("_begun", "_body", "_generator")

    def __init__(self, body: Body, generator: AsyncIterator[Part]) -> None:
        # One that has not begun has left nothing: the body can still be read by another one.
        self._begun = False
        self._body = body
        self._generator = generator

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        # What is waited for holds this: ``await anext(response.aiter_lines())`` drops it before the first line comes.
        self._begun = True
        return await self._generator.__anext__()

    async def aclose(self) -> None:
        """Close the connection, as leaving the loop does.

        Cancellation: safe; the connection is closed before anything is waited for.
        """
        self._leave()
        await cast("AsyncGenerator[Part, None]", self._generator).aclose()

    def _leave(self) -> None:
        if self._begun:
            self._body.close_threadsafe()

    def __del__(self) -> None:
        if hasattr(self, "_generator"):
            self._leave()


class ClosingResponse(_Response):
    """A response of httpx or httpx2, but dropping it unread, or what reads it, closes the connection."""

    # Not in its __dict__, which is what is pickled of a response.
    __slots__ = ("_body",)

    def __init__(self, reader: ResponseReader, body: Body, stream: Any) -> None:
        self._body = body
        head = reader.head
        extensions = {"http_version": head.version, "reason_phrase": head.reason}
        super().__init__(head.status, headers=list(head.headers), stream=stream, extensions=extensions)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # As a plain response: this class is made as the program runs, and a copy has no connection to close.
        plain = next(each for each in type(self).__mro__ if each.__name__ == "Response")
        return object.__new__, (plain,), self.__getstate__()

    # httpx's client puts a stream around the body that notes how long the answer took. It holds the response, which
    # holds it: only the garbage collector would free the two.
    @property
    def stream(self) -> httpx.SyncByteStream | httpx.AsyncByteStream:
        stream: httpx.SyncByteStream | httpx.AsyncByteStream = self.__dict__["stream"]
        return stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        if getattr(stream, "_response", None) is self:
            stream._response = _Elapsed(self)  # noqa: SLF001  (httpx has no other name for it)
        self.__dict__["stream"] = stream

    def aiter_raw(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._reading(super().aiter_raw(chunk_size))

    def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._reading(super().aiter_bytes(chunk_size))

    def aiter_text(self, chunk_size: int | None = None) -> AsyncIterator[str]:
        return self._reading(super().aiter_text(chunk_size))

    def aiter_lines(self) -> AsyncIterator[str]:
        return self._reading(super().aiter_lines())

    def _reading(self, generator: AsyncIterator[Part]) -> AsyncIterator[Part]:
        return _ClosingReads(self._body, generator)


def body_of(package: ModuleType, reader: ResponseReader, read_timeout: float | None, *, ours: bool) -> Body:
    """Return the body of an answer, as httpx or httpx2 takes it."""
    made: Body = mixed(Body, package.AsyncByteStream)(reader, read_timeout, package, ours=ours)
    return made


def response_of(package: ModuleType, reader: ResponseReader, body: Body, stream: Any) -> Any:
    """Return an answer whose head has arrived, as httpx or httpx2 hands it to its caller."""
    return mixed(ClosingResponse, package.Response)(reader, body, stream)


class _Elapsed:
    """Where httpx notes how long an answer took; it does not keep the response alive."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = weakref.ref(response)

    def _note(self, elapsed: timedelta) -> None:
        response = self._response()
        if response is not None:
            response.elapsed = elapsed

    elapsed = property(fset=_note)
