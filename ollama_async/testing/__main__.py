"""``python -m ollama_async.testing [FILE]``: a fake Ollama server in a separate process.

It plays a recording, makes one, or answers by itself: docs/record.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

from ollama_async._errors import RequestError

from ._fake import FakeOllama

__all__ = ["main", "serve"]


def serve(
    file: str | None,
    *,
    record: str | None,
    speed: float,
    port: int,
    models: Sequence[str],
    say: Callable[[str], object],
) -> None:
    """Serve until Ctrl-C.

    Args:
        file: the recording to play, or to make; None for the built-in behaviour alone.
        record: address of the server to record; None to play.
        speed: how many times as fast it is played, 0 for without pauses.
        port: to listen on, 0 for a free one.
        models: the names that the built-in behaviour knows.
        say: is told where the server is.

    Raises:
        RequestError: what was given does not go together, or the file is not a recording (a `RecordingError`).
        OSError: the address cannot be used.
    """
    if record is not None and file is None:
        raise RequestError("a server that records needs a file: name one that does not exist yet")
    if record is not None and file is not None:
        server, does = FakeOllama.record(record, file, port=port), f"records {record} into {file}"
    elif file is not None:
        server = FakeOllama.replay(file, speed=speed or math.inf, port=port, models=models)
        does = f"plays {file}"
    else:
        server, does = FakeOllama(port=port, models=models), f"has the models: {', '.join(models)}"
    with server:
        say(f"The fake Ollama server is at {server.url} and {does} (Ctrl-C ends it)\n")
        while True:
            time.sleep(3600)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ollama_async.testing", description="Serve a fake Ollama server.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the recording to play, or to make")
    parser.add_argument("--record", metavar="ADDRESS", help="record the server at this address into FILE")
    parser.add_argument("--speed", type=float, default=1.0, help="play this many times as fast; 0 plays without pauses")
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0 for a free one")
    parser.add_argument("--model", action="append", metavar="NAME", help="that the server knows; repeatable; 'fake'")
    return parser.parse_args(given)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(given: Sequence[str] | None = None) -> int:
    """Serve, and return the exit status."""
    asked = _arguments(given)
    models = asked.model or ["fake"]
    try:
        serve(asked.file, record=asked.record, speed=asked.speed, port=asked.port, models=models, say=_say)
    except (RequestError, OSError, OverflowError) as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
