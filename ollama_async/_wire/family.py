"""httpx or httpx2: an answer, and an error, is of the package that the request is of.

httpx2 continues httpx, under the same names of classes. Each of the two takes only its own objects. httpx2
is optional, so it is never imported here: a request that is made of it has imported it.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from types import ModuleType


def package_of(value: object, base: str) -> ModuleType:
    """Return httpx or httpx2, whichever defines the class ``base`` that a value is an instance of; else httpx."""
    kind: Any = type(value)
    return _package_of(kind, base)


# Bounded, since a program may make classes as it runs.
@lru_cache(64)
def _package_of(kind: Any, base: str) -> ModuleType:
    for each in kind.__mro__:
        if each.__name__ == base and each.__module__.partition(".")[0] == "httpx2":
            return sys.modules["httpx2"]
    return httpx


def as_error_of(package: ModuleType, error: BaseException) -> BaseException:
    """Return an error of httpx as the error of the same name of that package; any other error as it is."""
    if package is httpx or not isinstance(error, httpx.TransportError):
        return error
    theirs: BaseException = getattr(package, type(error).__name__)(str(error))
    theirs.__cause__ = error
    return theirs


@lru_cache(64)
def mixed(kind: type, base: type) -> type:
    """Return a class of ours as a subclass of one of httpx or httpx2."""
    return type(kind.__name__.strip("_"), (kind, base), {"__module__": kind.__module__})
