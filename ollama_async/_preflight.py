"""``preflight=`` and ``require()``: what a model or a server cannot do is said before a request is sent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ._call.asked import full_name
from ._call.staged import Stage
from ._errors import AbortError, CapabilityError, OllamaError, RequestError, StreamClosed
from ._model.input import checked
from ._session import beside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._cancel import CancelToken
    from ._manage import ModelManagement
    from ._session import CallOptions

# Part of a call's body, and what a model needs for it.
_NEEDED_FOR: dict[str, str] = {"tools": "tools", "images": "vision", "think": "thinking", "suffix": "insert"}
_VERSION = re.compile(r"v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)
# What a server says that was not built as a release.
_NO_RELEASE = (0, 0, 0)


def preflight_stages(client: ModelManagement, given: object, body: Mapping[str, Any], call: CallOptions) -> list[Stage]:
    """Read ``preflight=`` of a call."""
    if not checked("flag", preflight=given)["preflight"]:
        return []
    limits = client._limits(call)  # noqa: SLF001  (a part of the client, in a module of its own)
    return [_Preflight(client, body["model"], _needs(body), beside(call, limits.total))]


def _needs(body: Mapping[str, Any]) -> list[str]:
    """Return what a model must be able to do for a call."""
    if "input" in body:
        return ["embedding"]
    needs = [capability for part, capability in _NEEDED_FOR.items() if body.get(part)]
    if "vision" not in needs and any(message.get("images") for message in body.get("messages") or ()):
        needs.append("vision")
    return ["completion", *needs]


class _Preflight(Stage):
    """Raises ``CapabilityError`` instead of sending a request that the model, or the server, cannot answer."""

    def __init__(self, client: ModelManagement, model: str, needs: Sequence[str], call: CallOptions) -> None:
        self._client = client
        self._model = model
        self._needs = needs
        self._call = call

    async def before(self, token: CancelToken) -> None:
        try:
            await check(self._client, self._model, self._needs, None, {**self._call, "token": token})
        except (CapabilityError, AbortError, StreamClosed):
            raise
        except OllamaError:
            # A server that does not tell (a gateway may not) is asked for the answer.
            pass


async def require(client: ModelManagement, model: str, needs: Sequence[Any], version: Any, call: CallOptions) -> None:
    """Do what ``AsyncClient.require()`` says."""
    for need in needs:
        if not isinstance(need, str) or not need:
            raise RequestError(f"capability {need!r}: give names such as 'tools' or 'vision'")
    if version is not None and (not isinstance(version, str) or _parsed(version) is None):
        raise RequestError(f"version={version!r}: give one such as '0.12' or '0.12.3'")
    await check(client, model, needs, version, call, unknown_passes=False)


async def check(
    client: ModelManagement,
    model: str,
    needs: Sequence[str],
    version: str | None,
    call: CallOptions,
    *,
    unknown_passes: bool = True,
) -> None:
    """Raise ``CapabilityError`` if a model lacks something, or the server is older than it, or the caller, needs.

    Only what suffices is taken from the cache. What does not is asked for again: models are pulled anew, and servers
    are updated.
    """

    def missing(known: tuple[frozenset[str] | None, str | None]) -> tuple[str, ...]:
        abilities = known[0]
        if abilities is None:
            return () if unknown_passes else tuple(needs)
        return tuple(need for need in needs if need not in abilities)

    async def ask() -> tuple[frozenset[str] | None, str | None]:
        shown = await client.show(model, **call)
        return None if shown.capabilities is None else frozenset(shown.capabilities), shown.requires

    abilities, requires = known = await _known(client, full_name(model), ask, lambda known: not missing(known))
    lacks = missing(known)
    if lacks:
        does = ", ".join(sorted(abilities)) if abilities else "nothing that the server tells (/api/show)"
        text = f"{model} cannot do what the call needs: {', '.join(lacks)}; it can: {does}"
        raise CapabilityError(model, lacks, tuple(sorted(abilities or ())), text)
    for wanted, why in ((version, "the call needs"), (requires, f"{model} needs")):
        if wanted is not None:
            await _check_version(client, model, wanted, why, call)


async def _check_version(client: ModelManagement, model: str, wanted: str, why: str, call: CallOptions) -> None:
    at_least = _parsed(wanted)

    def is_enough(known: tuple[frozenset[str] | None, str | None]) -> bool:
        has = _parsed(known[1] or "")
        # What cannot be compared is not refused.
        return has is None or at_least is None or has == _NO_RELEASE or has >= at_least

    async def ask() -> tuple[frozenset[str] | None, str | None]:
        return None, (await client.version(**call)).version

    known = await _known(client, "", ask, is_enough)
    if not is_enough(known):
        has = known[1] or ""
        text = f"the server's version is {has}, and {why} {wanted}: update the server"
        raise CapabilityError(model, ("version",), (has,), text)


async def _known(
    client: ModelManagement,
    name: str,
    ask: Callable[[], Any],
    suffices: Callable[[tuple[frozenset[str] | None, str | None]], bool],
) -> tuple[frozenset[str] | None, str | None]:
    known = client._abilities.get(name)  # noqa: SLF001  (as above)
    if known is None or not suffices(known):
        known = client._abilities[name] = await ask()  # noqa: SLF001  (as above)
    return known


def _parsed(version: str) -> tuple[int, int, int] | None:
    found = _VERSION.match(version)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))
