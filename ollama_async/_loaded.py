"""``client.loaded()``: a model that is loaded, as it was asked for, while a block runs."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable  # noqa: TC003  (these are for typing.get_type_hints())
from typing import TYPE_CHECKING

from ._call.asked import full_name
from ._call.hold import Hold
from ._errors import AbortError, ModelNotReady, NotFoundError, OllamaError, RequestError, StreamClosed, shown
from ._manage import KeepAlive, ModelManagement  # noqa: TC001
from ._model.input import checked, encoded, model_name, seconds_of
from ._model.progress import ProgressResponse  # noqa: TC001
from ._session import CallOptions, beside
from ._wire.tasks import cancel_once, join_cancelled

if TYPE_CHECKING:
    from types import TracebackType

    from ._files import Job
    from ._model.manage_types import LoadedModel

_log = logging.getLogger("ollama_async.loaded")

# Of the time that the server keeps a model, after how much it is asked to keep it longer; one answer may be lost.
_RENEW_AFTER = 1 / 3
_RENEW_AT_MOST_EVERY = 0.5


class Loaded:
    """Loads a model when it is entered, keeps it loaded, and unloads it when it is left; entered once.

    A parameter of ``AsyncClient.loaded()``, where they are described, is checked when this is made.
    """

    def __init__(
        self,
        client: ModelManagement,
        model: str,
        *,
        num_ctx: int | None,
        keep_alive: KeepAlive,
        min_vram_share: float | None,
        auto_pull: bool,
        on_progress: Callable[[ProgressResponse], object] | None,
        call: CallOptions,
    ) -> None:
        self._client = client
        self._model = model_name(model)
        self._name = full_name(model)
        self._num_ctx = _positive(num_ctx)
        self._keep_alive: float | str = _finite(keep_alive)
        self._min_vram_share = _share(min_vram_share)
        self._auto_pull = checked("flag", auto_pull=auto_pull)["auto_pull"]
        self._on_progress = on_progress
        self._call = call
        self._hold: Hold | None = None

    async def __aenter__(self) -> LoadedModel:
        """Load the model and return how the server lists it.

        Raises:
            OllamaError: As ``AsyncClient.loaded()`` says.

        Cancellation: closes the connection at once; what was loaded is unloaded.
        """
        if self._hold is not None:
            raise RequestError(f"loaded({self._model!r}) can be entered only once: call loaded() again")
        job = self._client._job(self._call, self._on_progress)  # noqa: SLF001  (a part of the client, in a module of its own)
        hold = self._hold = self._take()
        try:
            await self._client._step(job, hold.lock.acquire)  # noqa: SLF001  (as above)
            try:
                return await self._load(job, hold)
            finally:
                hold.lock.release()
        except BaseException as exc:
            await self._leave(hold, exc)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Unload the model, if this has loaded it and nothing else of this client uses it.

        Raises:
            AbortError: The token was aborted meanwhile, and no other error is on its way.

        Cancellation: closes the connection at once; the server then unloads the model after its ``keep_alive``.
        """
        if self._hold is not None:
            await self._leave(self._hold, exc)

    def _take(self) -> Hold:
        holds = self._client._holds  # noqa: SLF001  (as above)
        hold = holds.get(self._name) or Hold()
        if not hold.is_kept():
            hold.num_ctx = self._num_ctx
        elif self._num_ctx not in (None, hold.num_ctx):
            kept = "without num_ctx=" if hold.num_ctx is None else f"with num_ctx={hold.num_ctx}"
            raise RequestError(
                f"num_ctx={self._num_ctx}: another block of this client keeps {self._name} {kept}, and the server "
                "loads a model once; ask for the same, or leave that block first"
            )
        holds[self._name] = hold
        if not hold.is_kept() or _lasts(self._keep_alive) > _lasts(hold.keep_alive):
            hold.keep_alive = self._keep_alive
        hold.users += 1
        return hold

    async def _load(self, job: Job, hold: Hold) -> LoadedModel:
        before = await self._client._listed(self._name, job.part())  # noqa: SLF001  (as above)
        try:
            await self._client.load(self._model, **job.part())
        except NotFoundError:
            if not self._auto_pull:
                raise
            async for step in self._client.pull(self._model, stream=True, resume=True, **job.part()):
                job.report(step)
            await self._client.load(self._model, **job.part())
        # What was loaded before is somebody else's.
        hold.ours = hold.ours or before is None
        now = await self._client._listed(self._name, job.part())  # noqa: SLF001  (as above)
        if now is not None and before is not None and now.context_length != before.context_length:
            hold.ours = True
        flaw = self._flaw(now)
        if now is None or flaw is not None:
            raise ModelNotReady(self._model, now, flaw or "")
        self._renew(hold)
        return now

    def _flaw(self, now: LoadedModel | None) -> str | None:
        if now is None:
            return "the server does not list it (/api/ps); it may run elsewhere, as models in the cloud do"
        context, share = now.context_length, now.vram_share
        if self._num_ctx is not None and context is not None and context < self._num_ctx:
            return f"its context has {context} tokens, not {self._num_ctx}; it may have been trained with no more"
        if self._min_vram_share is not None and (share is None or share < self._min_vram_share):
            has = "an unknown share" if share is None else f"{share:.0%}"
            return (
                f"{has} of it is in VRAM, less than {self._min_vram_share:.0%}; unload other models, or ask for a "
                "smaller num_ctx"
            )
        return None

    # -- while the block runs --

    def _renew(self, hold: Hold) -> None:
        seconds = _lasts(hold.keep_alive)
        if hold.renewal is None and seconds < math.inf:
            every = max(seconds * _RENEW_AFTER, _RENEW_AT_MOST_EVERY)
            hold.renewal = asyncio.get_running_loop().create_task(self._keep(every))

    async def _keep(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            try:
                await self._client.load(self._model, **beside(self._call))
            except StreamClosed:
                return
            except OllamaError as exc:
                _log.warning("%s may be unloaded, since the server was not asked to keep it: %s", self._name, exc)

    # -- the end --

    async def _leave(self, hold: Hold, exc: BaseException | None) -> None:
        hold.users -= 1
        if hold.is_kept():
            return
        renewal, hold.renewal = hold.renewal, None
        if renewal is not None:
            cancel_once(renewal)
        try:
            if renewal is not None:
                await join_cancelled(renewal)
            # Another block may have come meanwhile; and what gets an answer goes on to use it.
            if hold.ours and not hold.is_kept() and not self._client._answering(self._name):  # noqa: SLF001  (as above)
                hold.ours = False
                async with hold.lock:
                    await self._unload(exc)
        finally:
            if not hold.is_kept() and not hold.lock.locked():
                self._client._holds.pop(self._name, None)  # noqa: SLF001  (as above)

    async def _unload(self, exc: BaseException | None) -> None:
        token = self._call.get("token")
        call = beside(self._call)
        if token is not None and not token.aborted:
            call["token"] = token
        try:
            await self._client.load(self._model, 0, **call)
        except AbortError:
            # If the token is why the block is left, this was not under it.
            if exc is None:
                raise
        except OllamaError as error:
            _log.warning("%s stays loaded until its keep_alive has passed: %s", self._name, error)


def _lasts(keep_alive: float | str) -> float:
    seconds = seconds_of(keep_alive)
    return math.inf if seconds < 0 else seconds


def _positive(num_ctx: object) -> int | None:
    number = checked("number", num_ctx=num_ctx)["num_ctx"]
    if number is not None and number <= 0:
        raise RequestError(f"num_ctx={shown(number)}: give a number of tokens above 0")
    return number  # type: ignore[no-any-return]


def _finite(keep_alive: KeepAlive) -> float | str:
    encoded_keep_alive: float | str = encoded(("keep_alive", keep_alive)).get("keep_alive", 0)
    if seconds_of(encoded_keep_alive) == 0:
        raise RequestError(f"keep_alive={shown(keep_alive)}: a model that is kept needs a time, such as '5m'")
    return encoded_keep_alive


def _share(given: object) -> float | None:
    if given is None:
        return None
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 <= given <= 1:
        raise RequestError(f"min_vram_share={shown(given)}: give a number from 0 to 1")
    return given
