"""``Sender``: what the requests of a client are sent with, the same for all its calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

    from ollama_async._group import CallGroup
    from ollama_async._wire.transport import DirectTransport


class Sender:
    """What the requests of a client are sent with.

    Attributes:
        client: The httpx client.
        transport: The ``DirectTransport`` under it, if requests can be sent in the caller's task; else None.
        calls: The calls of the client that are under way.
        unpackable: How an answer may be compressed.
    """

    __slots__ = ("calls", "client", "transport", "unpackable")

    def __init__(
        self,
        client: httpx.AsyncClient,
        transport: DirectTransport | None,
        calls: CallGroup,
        unpackable: frozenset[str] = frozenset(),
    ) -> None:
        self.calls: CallGroup = calls
        self.client: httpx.AsyncClient = client
        self.transport: DirectTransport | None = transport
        self.unpackable: frozenset[str] = unpackable
