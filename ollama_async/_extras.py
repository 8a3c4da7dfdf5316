"""The oldest release of an optional package that a leaf module can work with, and what to do about an older one."""

from __future__ import annotations

import importlib.metadata


def check_version(module: str, package: str, oldest: tuple[int, ...], install: str) -> str:
    """Refuse a package that is too old.

    Args:
        module: The module of ours that needs it.
        package: Its name on PyPI.
        oldest: The numbers of the oldest release that will do.
        install: What pip is to be told.

    Returns:
        The version that is installed.

    Raises:
        ImportError: It is too old.
    """
    version = importlib.metadata.version(package)
    numbers = tuple(int(part) for part in version.split(".")[: len(oldest)] if part.isdecimal())
    if numbers < oldest:
        raise ImportError(
            f"{module} needs {package} {'.'.join(map(str, oldest))} or newer, {version} is installed: "
            f"pip install --upgrade {install}",
            name=package,
        )
    return version
