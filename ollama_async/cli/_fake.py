"""The command that serves a fake Ollama server: a recording that is played or made, or the built-in answers."""

from __future__ import annotations

from typing import Annotated

import typer

from ollama_async.testing.__main__ import serve

from ._output import write
from ._terminal import Session

__all__ = ["add_fake"]


def add_fake(app: typer.Typer) -> None:
    """Add the command ``fake``."""
    app.command()(fake)


def fake(
    context: typer.Context,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="The recording to play, or to make.")] = None,
    record: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Record the server at this address into FILE.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Play this many times as fast; 0 plays without pauses.", min=0.0)] = 1.0,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 0,
    model: Annotated[list[str] | None, typer.Option(help="Model that the server knows. Repeatable.")] = None,
) -> None:
    """Serve a fake Ollama server, for tests and demonstrations.

    It plays the recording in FILE, or with --record it passes requests on to a
    real server and records into FILE, which must not exist yet. Without FILE it
    answers by itself. Keys are never recorded.
    """
    session = Session(context, "")
    with session.running():
        serve(file, record=record, speed=speed, port=port, models=model or ["fake"], say=write)
