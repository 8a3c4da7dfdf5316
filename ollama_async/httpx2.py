"""``DirectTransport`` for httpx2, which the clients of OpenAI and Anthropic are made on.

It needs ``httpx2``; without it the import says so. See ``ollama_async.DirectTransport`` for what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._wire.transport import ClosableTransport

try:
    import httpx2
except ImportError as _missing:
    raise ImportError("ollama_async.httpx2 needs httpx2; install it with: pip install httpx2") from _missing

__all__ = ["DirectTransport"]


class DirectTransport(ClosableTransport, httpx2.AsyncBaseTransport):
    """An httpx2 transport; its arguments and methods are those of ``ollama_async.DirectTransport``."""

    if TYPE_CHECKING:

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            """Send a request and return its answer as soon as its head has arrived."""
            raise NotImplementedError
