"""``on_truncation=``: a prompt that does not fit into the context is noticed, not cut in silence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._call.staged import Stage
from ._call.timeouts import look_timeouts
from ._errors import ContextLengthError, OllamaError, RequestError, TruncationWarning

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._call.exchange import Exchange
    from ._cancel import CancelToken
    from ._manage import ModelManagement

OnTruncation: TypeAlias = Literal["ignore", "warn", "raise"]


def truncation_stages(client: ModelManagement, mode: OnTruncation, body: dict[str, Any]) -> list[Stage]:
    """Read ``on_truncation=``: have the body say that the prompt may not be cut, and return what follows from that."""
    if mode == "ignore":
        return []
    if mode not in ("warn", "raise"):
        raise RequestError(f"on_truncation={mode!r}: give 'ignore', 'warn' or 'raise'")
    if body.get("truncate") is True:
        raise RequestError(f"truncate=True and on_truncation={mode!r} contradict each other: leave truncate= out")
    body["truncate"] = False
    return [_NoticeTruncation(client, mode)]


class _NoticeTruncation(Stage):
    """Has the server refuse a prompt that is too long, since only that shows it.

    By its figures alone a cut prompt is not known: of a chat the server leaves out the oldest messages, and counts what
    is left.
    """

    def __init__(self, client: ModelManagement, mode: OnTruncation) -> None:
        self._client = client
        self._mode = mode
        self._cut = False

    async def opened(self, exchange: Exchange, token: CancelToken) -> None:
        asked = exchange.asked
        if asked is None:
            return
        asked.cut = self._cut
        if asked.num_ctx is None and asked.model not in asked.lengths:
            try:
                await self._client.context_length(asked.model, token=token, timeout=look_timeouts())
            except OllamaError:
                # The answer is worth more than the figure.
                asked.lengths[asked.model] = None

    def concerns(self, error: OllamaError) -> bool:
        return self._mode == "warn" and isinstance(error, ContextLengthError) and not self._cut

    async def mend(self, error: OllamaError, failed: Exchange, token: CancelToken) -> Mapping[str, Any]:
        self._cut = True
        model = failed.asked.model if failed.asked else "the model"
        text = f"the prompt is longer than the context of {model}: the server cuts it, and the model reads the rest"
        warnings.warn(text, TruncationWarning, stacklevel=2)
        return {"truncate": None}
