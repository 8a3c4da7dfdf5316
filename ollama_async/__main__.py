"""The command line's way in, which says so when the extra is not installed."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        try:
            from .cli import run
        except ModuleNotFoundError as exc:
            # What is missing can be had with the extra, unless it is a module of ours.
            if (exc.name or "").partition(".")[0] == "ollama_async":
                raise
            sys.stderr.write(
                f'ollama-async: the command line needs {exc.name}; install it with: pip install "ollama-async[cli]"\n'
            )
            sys.exit(1)
        run()
    except KeyboardInterrupt:
        # While modules were imported or arguments read, nothing was under way that would have to be said.
        sys.exit(130)


if __name__ == "__main__":
    main()
