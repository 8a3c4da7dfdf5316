"""What an ``async for`` holds of a stream: leaving the loop drops it, and dropping it closes the stream."""

from __future__ import annotations

import dis
import sys
from typing import TYPE_CHECKING, Any, Generic

from ollama_async._errors import StreamBusy

from .awaitable import Guarded
from .chunk import ChunkT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Self

    from .chunk_reader import ChunkReader


class ClosingIterator(Generic[ChunkT]):
    """An iterator over a stream. When it is dropped, that closes the stream."""

    __slots__ = ("_reader", "_stream", "_turned_away")

    def __init__(self, stream: object, reader: ChunkReader[ChunkT]) -> None:
        # Held: a stream that is dropped closes as well.
        self._stream = stream
        # A second reader that was turned away must not take the stream from the first.
        self._turned_away = False
        self._reader = reader

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, ChunkT]:
        # The step holds this iterator: `anext(aiter(stream))` gets its chunk before the stream is closed.
        return Guarded(self._step(), self._reader_cancelled, "Stream.__anext__")

    async def _step(self) -> ChunkT:
        try:
            chunk = await self._reader.read()
        except StreamBusy:
            self._turned_away = True
            raise
        self._turned_away = False
        return chunk

    def _reader_cancelled(self) -> None:
        self._reader.reader_cancelled()

    def __del__(self) -> None:
        # None if Ctrl-C came before it was made.
        reader = getattr(self, "_reader", None)
        # In a loop, one that is turned away is dropped while the first reader still waits.
        if reader is not None and not reader.busy and not self._turned_away:
            reader.dropped()


class LoopIterator(ClosingIterator[ChunkT]):
    """What an ``async for`` holds of a stream; leaving the loop drops it."""

    # Its __anext__ is a method of the reader. Python looks it up in the class, where a slot stands for what the object
    # has; a method that calls the reader's would be one more call for each token.
    __slots__ = ("__anext__",)

    __anext__: Callable[[], Coroutine[Any, Any, ChunkT]]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, stream: object, reader: ChunkReader[ChunkT]) -> None:
        super().__init__(stream, reader)
        self.__anext__ = reader.read


_GET_AITER = dis.opmap.get("GET_AITER")


def called_by_async_for() -> bool:
    """Whether the caller's caller is at the head of an ``async for``, not at a call.

    Where that cannot be told it is taken for a call, which is right for both and costs more for each chunk.
    """
    try:
        frame = sys._getframe(2)  # noqa: SLF001  (the one that leads to nothing but the code's own instruction)
    except ValueError:
        return False
    return frame.f_code.co_code[frame.f_lasti] == _GET_AITER
