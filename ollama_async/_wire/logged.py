"""A reader whose phases are logged, and where that is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .link import NO_OWNER
from .phase import Phase, log_phase, phases_are_logged
from .reader import ResponseReader
from .unpack import WHOLE, BodyForm

if TYPE_CHECKING:
    import asyncio

    from .link import Owner


class LoggedReader(ResponseReader):
    """A reader that logs its phases."""

    __slots__ = ()

    def enter(self, phase: Phase) -> None:
        """Note how far the attempt is, and log it."""
        if self.phase is not Phase.CLOSED:
            super().enter(phase)
            log_phase(id(self), phase, self.outcome)


def new_reader(loop: asyncio.AbstractEventLoop, owner: Owner = NO_OWNER, body_form: BodyForm = WHOLE) -> ResponseReader:
    """Return a reader; whether its phases are logged is asked once, not at each of them."""
    return (LoggedReader if phases_are_logged() else ResponseReader)(loop, owner, body_form)
