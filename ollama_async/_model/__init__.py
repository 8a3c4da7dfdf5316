"""What goes to the server and comes from it, as values: no I/O, no asyncio."""

from importlib import import_module
from typing import Any


class Later:
    """A module in here that is imported when one of its names is first asked for, also by ``typing.get_type_hints()``.

    The models of endpoints that most programs never use are half of all models, and of the time that it takes to make
    them.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"{__name__}.{self._name}"), name)
