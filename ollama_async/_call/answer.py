"""``Answer``: what has arrived of a streamed answer: decoded, delivered, merged."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Generic

from ollama_async._errors import ProtocolError

from .chunk import ChunkT
from .decoder import Decoder, ErrorFrame

if TYPE_CHECKING:
    from collections.abc import Callable

    from .chunk import Merge
    from .exchange import Exchange


# One for all answers: it is rarely taken, and for a moment. Reentrant: a signal handler that looks at an answer may
# interrupt another look.
_ABSORBING = threading.RLock()


class Answer(Generic[ChunkT]):
    """Chunks on their way from the decoder to the reader of a stream, and into the merged answer.

    Chunks are merged one by one, by the reader alone: whoever looks at the answer meanwhile, from a thread or a signal
    handler, finds a beginning of it. After an early end, what had arrived and was not delivered is merged by whoever
    looks first.

    Attributes:
        merge: The merged answer.
        add: The merge's ``add()``.
        decoder: Makes the chunks.
        chunks: Chunks of lines that came together.
        index: Which of them is the next to be delivered.
        fast_until: Up to which of them nothing can happen at one but its delivery.
        last_at: When the last of what was decoded arrived, by the loop's clock.
        together: Whether the first chunk may be made together with those that came with it: nobody waits for it.
        taking: Whether the reader is making lines, or chunks, of what has arrived.
        absorbed: Whether everything that had arrived has been merged, after an early end.
    """

    __slots__ = (
        "_delivered_before",
        "_merging",
        "absorbed",
        "add",
        "chunks",
        "decoder",
        "fast_until",
        "index",
        "last_at",
        "merge",
        "taking",
        "together",
    )

    def __init__(self, merge: Merge[ChunkT], decoder: Decoder[ChunkT]) -> None:
        self.merge: Merge[ChunkT] = merge
        self.add: Callable[[ChunkT], None] = merge.add
        self.decoder: Decoder[ChunkT] = decoder
        self.chunks: list[ChunkT] = []
        self.index: int = 0
        self.fast_until: int = 0
        self.last_at: float = 0.0
        self.together: bool = False
        self.taking: bool = False
        self.absorbed: bool = False
        # How many chunks were delivered before those in `chunks`.
        self._delivered_before = 0
        self._merging = False

    @property
    def delivered(self) -> int:
        """How many chunks the reader has got."""
        return self._delivered_before + self.index

    def clear(self) -> None:
        """Let go of chunks that are delivered."""
        # Not by `delivered`: that would be a call for each chunk that arrives alone.
        self._delivered_before, self.chunks, self.index, self.fast_until = self._delivered_before + self.index, [], 0, 0

    def restart(self) -> None:
        """Go on with the body of another attempt; what was delivered stays merged."""
        self.clear()
        self.decoder.restart()
        self.absorbed = False

    def drop_rest(self) -> None:
        """Drop what follows the chunk that was delivered: it is not a part of the answer."""
        self.decoder.lines = []
        del self.chunks[self.index :]

    def next_chunk(self, received_at: float, *, plainly: bool) -> ChunkT:
        """Deliver the next chunk: decode it if need be, and merge it.

        Args:
            received_at: When what is decoded now arrived.
            plainly: Whether nothing but its delivery happens at a chunk that is not the last.

        Raises:
            ProtocolError, ErrorFrame: By the decoder.
        """
        if self.index == len(self.chunks):
            if self.index:
                self.clear()
            self.last_at = received_at
            # The first one alone: the reader waits for it, and it does not wait for those that came with it.
            chunks, lines, plain = self.decoder.decode(alone=not (self._delivered_before or self.together))
            # In one statement, within which no signal handler runs: none finds a line twice, or not at all.
            self.chunks, self.decoder.lines, self.fast_until = chunks, lines, plain if plainly else 0
        chunk = self.chunks[self.index]
        self.index += 1
        self.add(chunk)
        return chunk

    def interrupted(self) -> None:
        """After Ctrl-C or the like: a chunk that was kept from being merged waits again."""
        if self.merge.count() < self.delivered:
            self.index -= 1

    def absorb(self, exchange: Exchange) -> None:
        """After an early end, merge what had arrived and was not delivered, as far as it can be decoded."""
        if self.absorbed or self.taking or self.merge.count() < self.delivered:
            # The reader is at it: a signal handler has interrupted it, or this is another thread. It finds the end
            # right after, and merges the rest in order.
            return
        # Its reader, and the thread that aborted it, may both be here to see what has arrived.
        with _ABSORBING:
            self._absorb_once(exchange)

    def _absorb_once(self, exchange: Exchange) -> None:
        # A signal handler that looks may have interrupted another look: it sees what that has merged.
        if not (self.absorbed or self._merging):
            self._merging = True
            try:
                self._merge_rest(exchange)
                self.absorbed = True
            finally:
                self._merging = False

    def _merge_rest(self, exchange: Exchange) -> None:
        while (place := self.merge.count() - self._delivered_before) < len(self.chunks):
            self.add(self.chunks[place])
            if self.chunks[place].done:
                return
        decoder = self.decoder
        with suppress(ProtocolError, ErrorFrame):
            while True:
                while decoder.lines:
                    (chunk,), _, _ = decoder.decode(alone=True)
                    self.add(chunk)
                    decoder.lines.pop()
                    if chunk.done:
                        return
                data = exchange.reader.read_buffered() if decoder.failure is None else b""
                if not data:
                    return
                decoder.lines = decoder.feed_data(data)[::-1]
