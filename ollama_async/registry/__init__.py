"""``AbortRegistry``: streams are registered under an id, and stopped by it from anywhere.

In memory that is another task of the same process; over Redis (extra ``redis``) it is another process, or machine.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeAlias
from urllib.parse import parse_qs, urlsplit

from ollama_async._cancel import CancelToken, LiveObject
from ollama_async._errors import RequestError

from ._errors import RegistryClosed, RegistryUnavailable
from ._local import Book, Name, checked_reason

if TYPE_CHECKING:
    from ._redis import Link

__all__ = ["AbortRegistry", "Name", "RegistryClosed", "RegistryUnavailable", "Stopped"]

Stopped: TypeAlias = Literal["stopped", "kept", "queued"]

_MAX_NAMESPACE = 100
# Thirty years.
_ENDLESS = 1e9


class AbortRegistry(LiveObject):
    """Streams by owner and id, and the Stops for them.

    An id is for one stream: a Stop holds for its ttl, and whatever is registered under that owner and id meanwhile is
    aborted at once. That is what keeps a Stop from being lost that comes before its stream. The owner is part of the
    address, so that a Stop by anybody else concerns another stream, and learns nothing of this one.

    A registry belongs to one event loop. ``async with registry`` connects and closes it. Without that it connects when
    it is first used; close it with ``await registry.aclose()``.

    Example:
        >>> registry = AbortRegistry.from_url("memory://")
        >>> async with registry.token("4f1c", owner="ann") as token:
        ...     answer = await client.chat("llama3.2", "hi", stream=True, token=token).collect()
        >>> await registry.abort("4f1c", "Stop was pressed", owner="ann")  # meanwhile, from anywhere
        'stopped'
    """

    def __init__(self, *, ttl: float = 600.0) -> None:
        given: object = ttl
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < _ENDLESS:
            raise RequestError(f"ttl={ttl!r}: give a number of seconds above 0")
        self._book = Book(ttl)
        self._link: Link | None = None
        self._closed = False

    @classmethod
    def from_url(cls, url: str, *, ttl: float = 600.0, namespace: str = "ollama-async") -> AbortRegistry:
        """Return a registry; nothing is connected before it is entered by ``async with``, or first used.

        Args:
            url: ``memory://`` for this process alone; ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads
                them, for all processes that use the same Redis.
            ttl: How many seconds a Stop holds: longer than the time between a Stop and its stream's registration, and
                than any time in which Redis is away.
            namespace: What the names of keys and channels begin with, in Redis.

        Raises:
            RequestError: The url, the ttl or the namespace is not valid. The text shows nothing of the url but names of
                options.
            ImportError: The extra ``redis`` is not installed.
        """
        registry = cls(ttl=ttl)
        scheme = str(url).partition("://")[0]
        if scheme == "memory":
            return registry
        if scheme not in {"redis", "rediss", "unix"}:
            raise RequestError(
                "invalid url for the registry: it must begin with memory://, redis://, rediss:// or unix://"
            )
        _check_url(url)
        if not namespace or len(namespace) > _MAX_NAMESPACE:
            raise RequestError(f"namespace={namespace!r}: give a text of 1 to {_MAX_NAMESPACE} characters")
        try:
            from ._redis import Link
        except ModuleNotFoundError as exc:
            raise ImportError(
                f'{scheme}:// needs {exc.name}; install it with: pip install "ollama-async[redis]"'
            ) from exc
        registry._link = _link(Link, url, registry._book, namespace)
        return registry

    @asynccontextmanager
    async def token(self, id: str, *, owner: str = "") -> AsyncGenerator[CancelToken]:  # noqa: A002
        """Register a stream for the duration of the block, and return the token that a Stop for it aborts.

        If a Stop for it has already arrived, the token is aborted when the block begins. While Redis is away the block
        still begins: Stops that are given in this process work, others when Redis is back.

        Args:
            id: The stream's, of at most 200 characters; one that cannot be guessed, used for this stream only.
            owner: Who may stop it.

        Raises:
            RequestError: The id or the owner is not valid.
            RegistryClosed: The registry is closed.

        Cancellation: safe; the registration is taken back at once.
        """
        name = Name.of(owner, id)
        self._check_open()
        token = CancelToken()
        self._book.add(name, token)
        try:
            if self._link is not None:
                await self._link.added(name)
            yield token
        finally:
            self._book.remove(name, token)
            if self._link is not None:
                self._link.removed(name)

    async def abort(self, id: str, reason: str | None = None, *, owner: str = "") -> Stopped:  # noqa: A002
        """Stop the stream of an owner and id, wherever it is; in this process, before anything is awaited.

        Args:
            id: The stream's.
            reason: What ``AbortError.reason`` will be; of at most 1,000 characters.
            owner: Who started the stream.

        Returns:
            ``"stopped"``: the stream exists, and was told to stop. ``"kept"``: there is none (any more, or yet); one
            that begins while the Stop holds is aborted. ``"queued"``: there is none in this process, and Redis is away;
            the Stop is given to Redis when that is back.

        Raises:
            RequestError: The id, the owner or the reason is not valid.
            RegistryClosed: The registry is closed.

        Cancellation: safe; the Stop still holds.
        """
        name, reason = Name.of(owner, id), checked_reason(reason)
        self._check_open()
        self._book.keep(name, reason)
        here = self._book.abort(name, reason)
        if self._link is None:
            return "stopped" if here else "kept"
        elsewhere = await self._link.send(name)
        if here or elsewhere:
            return "stopped"
        return "queued" if elsewhere is None else "kept"

    async def list(self, owner: str | None = None) -> list[Name]:
        """Return owner and id of all streams that are registered now, sorted; over Redis those of all processes.

        Args:
            owner: Whose; ``None`` for all owners.

        Raises:
            RegistryUnavailable: Redis is away.
            RegistryClosed: The registry is closed.
        """
        self._check_open()
        names = self._book.names() if self._link is None else await self._link.names()
        return sorted(name for name in names if owner in (None, name.owner))

    @property
    def connected(self) -> bool | None:
        """Whether Stops reach all processes now: False while Redis is away, and when the registry is closed.

        None before the registry has tried: it connects when it is entered by ``async with``, or first used. In memory
        there is nothing to connect to: True until it is closed.
        """
        if self._closed:
            return False
        return True if self._link is None else self._link.connected

    def _check_open(self) -> None:
        if self._closed:
            raise RegistryClosed("the registry is closed")

    async def aclose(self) -> None:
        """Close the connections to Redis; idempotent. Registered streams go on, but no Stop reaches them here any more.

        Cancellation: safe, it is closed in any case.
        """
        self._closed = True
        if self._link is not None:
            await self._link.aclose()

    async def __aenter__(self) -> Self:
        """Connect to Redis; while that is away, the block begins without it.

        Raises:
            RegistryClosed: The registry is closed.
            RequestError: It belongs to another event loop.

        Cancellation: safe; the registry is closed.
        """
        self._check_open()
        if self._link is not None:
            try:
                await self._link.connect()
            except BaseException:
                await self.aclose()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _check_url(url: str) -> None:
    """Refuse an address that cannot be taken apart.

    Nothing of it is shown, nor what others say of it: where its parts are not clear, any of them may be a password.
    """
    # Options can follow the host at once.
    if "@" in "".join(re.split("([/?#])", url.partition("://")[2], maxsplit=1)[1:]):
        raise RequestError(
            "the registry's url has an '@' in the wrong place; "
            "write a '/' in a password as %2F, a '#' as %23, a '?' as %3F, and an '@' elsewhere as %40"
        )
    port = 0
    with suppress(ValueError):
        port = urlsplit(url).port or 6379
    if not port:
        raise RequestError(
            "the registry's url cannot be read: write redis://user:password@host:port/0, and in user and password a "
            "'[' as %5B and a ']' as %5D; the port is a number from 1 to 65535"
        )


def _link(make: type[Link], url: str, book: Book, namespace: str) -> Link:
    try:
        # It makes a connection, without opening it, which raises redis-py's own errors and built-in ones.
        return make(url, book, namespace)
    except Exception as exc:
        said = str(exc)
    # Out here, without what redis-py said: the value of an option may be in it, and one of them is ``password``.
    options = list(parse_qs(urlsplit(url).query, keep_blank_values=True))
    blamed = ", ".join(repr(option) for option in options if option in said) or "one of its options"
    raise RequestError(f"the registry's url cannot be used: redis-py does not accept {blamed}")
