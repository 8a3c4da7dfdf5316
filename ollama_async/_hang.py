"""``recover=``: a model that has stopped to answer is told from one that is slow, and is loaded anew."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import anyio

from ._call.asked import full_name
from ._call.staged import Stage
from ._errors import AbortError, HungModel, OllamaError, PhaseTimeout, RequestError, StreamClosed
from ._model.input import checked
from ._session import beside

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._call.exchange import Exchange
    from ._call.timeouts import Timeouts
    from ._cancel import CancelToken
    from ._manage import ModelManagement
    from ._model.manage_types import LoadedModel
    from ._session import CallOptions

# How often the server is asked whether it has unloaded a model; that tells nobody.
_LOOK_AGAIN_SECONDS = 0.05


def hang_stages(client: ModelManagement, given: object, body: Mapping[str, Any], call: CallOptions) -> list[Stage]:
    """Read ``recover=`` of a call."""
    recover: bool | None = checked("flag", recover=given)["recover"]
    if recover is None:
        return []
    limits = client._limits(call)  # noqa: SLF001  (a part of the client, in a module of its own)
    if limits.first_chunk is None:
        raise RequestError(
            f"recover={recover} needs a limit for the first chunk, such as timeout=Timeouts(first_chunk=60)"
        )
    return [_NoticeHang(client, body, call, limits, recover=recover)]


class _Recovery:
    """What calls of one client have in common that recover from the same model's hang.

    Attributes:
        lock: Taken by the one that has the model unloaded.
        loop: The loop that the lock belongs to.
        at: When that was last done, by the loop's clock.
    """

    def __init__(self) -> None:
        self.lock: asyncio.Lock = asyncio.Lock()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.at: float = float("-inf")


# Each lasts as long as a call that has it.
_recoveries: WeakKeyDictionary[ModelManagement, WeakValueDictionary[str, _Recovery]] = WeakKeyDictionary()


def _recovery_of(client: ModelManagement, model: str) -> _Recovery:
    of_client = _recoveries.setdefault(client, WeakValueDictionary())
    found = of_client.get(model)
    if found is None or found.loop is not asyncio.get_running_loop():
        found = of_client[model] = _Recovery()
    return found


class _NoticeHang(Stage):
    """Asks the server, after the limit of the first chunk has passed, whether its model hangs.

    The request that has passed the limit is given up by then, which a hung model has to be for it to be unloaded.
    """

    def __init__(
        self, client: ModelManagement, body: Mapping[str, Any], call: CallOptions, limits: Timeouts, *, recover: bool
    ) -> None:
        self._client = client
        self._model: str = full_name(body["model"])
        self._options: Mapping[str, Any] | None = body.get("options")
        self._call = call
        self._limits = limits
        self._recover = recover
        self._shared: _Recovery | None = None
        self._asked_again = False

    async def before(self, token: CancelToken) -> None:
        if self._recover:
            self._shared = _recovery_of(self._client, self._model)
            if self._shared.lock.locked():
                # A new request to it would keep the model from being unloaded.
                await self._acquire(self._shared.lock, token, self._limits.total)
                self._shared.lock.release()

    def concerns(self, error: OllamaError) -> bool:
        return isinstance(error, PhaseTimeout) and error.phase == "first_chunk" and not isinstance(error, HungModel)

    async def mend(self, error: OllamaError, failed: Exchange, token: CancelToken) -> Mapping[str, Any]:
        if self._asked_again:
            raise self._hung("it was unloaded and asked again, and did not answer within that time either")
        if self._shared is None:
            await self._refuse_if_slow(failed, token)
            raise self._hung("unload it (keep_alive=0) and ask again, or have that done with recover=True")
        await self._acquire(self._shared.lock, token, self._left(failed))
        try:
            # Since this request began to wait, another call may have had it unloaded.
            if self._shared.at <= failed.reader.entered_at:
                await self._refuse_if_slow(failed, token)
                await self._unload(self._shared, failed, token)
        finally:
            self._shared.lock.release()
        self._asked_again = True
        return {}

    async def _refuse_if_slow(self, failed: Exchange, token: CancelToken) -> None:
        """Raise the error that there is, unless the model is loaded and the server answers."""
        try:
            await self._client.version(**self._look(failed, token))
            first, second = [await self._listed(failed, token) for _ in range(2)]
            slow = first is None or second is None
            # One that has not been idle since it was loaded would expire at its whole time from now, at each look. It
            # may also be loading: then the server keeps a question for it waiting.
            if first is not None and second is not None and first.expires_at != second.expires_at:
                await self._client.load(self._model, options=self._options, **self._look(failed, token))
        except (AbortError, StreamClosed):
            raise
        except OllamaError:
            slow = True
        if slow:
            # Not the one that there is: it would be held by frames that it holds.
            raise failed.error()

    async def _unload(self, shared: _Recovery, failed: Exchange, token: CancelToken) -> None:
        others = self._client._answering(self._model)  # noqa: SLF001  (as above)
        if others:
            raise self._hung(f"it was not unloaded: {others} other call(s) of this client get an answer from it")
        try:
            await self._client.load(self._model, 0, **self._look(failed, token))
            await self._wait_until_unloaded(failed, token)
        except (AbortError, StreamClosed):
            raise
        except OllamaError as exc:
            raise self._hung(f"it could not be unloaded: {exc}") from exc
        shared.at = failed.loop.time()

    async def _wait_until_unloaded(self, failed: Exchange, token: CancelToken) -> None:
        """Wait for it: a request that comes before would go to the model that hangs.

        It stays loaded as long as other requests wait for it, which give up at their limits.
        """
        until = failed.loop.time() + (self._limits.first_chunk or 0.0)
        while await self._listed(failed, token) is not None and failed.loop.time() < until:
            with token.scope():
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    async def _listed(self, failed: Exchange, token: CancelToken) -> LoadedModel | None:
        return await self._client._listed(self._model, self._look(failed, token))  # noqa: SLF001  (as above)

    def _look(self, failed: Exchange, token: CancelToken) -> CallOptions:
        return {**beside(self._call, self._left(failed)), "token": token}

    def _left(self, failed: Exchange) -> float | None:
        total = self._limits.total
        if total is None:
            return None
        left = failed.started_at + total - failed.loop.time()
        if left <= 0:
            raise PhaseTimeout("total", total)
        return left

    async def _acquire(self, lock: asyncio.Lock, token: CancelToken, left: float | None) -> None:
        with token.scope(), anyio.move_on_after(left) as scope:
            await lock.acquire()
        if scope.cancelled_caught:
            raise PhaseTimeout("total", self._limits.total or 0.0)

    def _hung(self, detail: str) -> HungModel:
        return HungModel(self._model, self._limits.first_chunk or 0.0, detail)
