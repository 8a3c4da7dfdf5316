"""Local files: regular ones are read in worker threads, to be sent; one is written as a whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from ._errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO
    from types import TracebackType
    from typing import Self

Result = TypeVar("Result")

# How many bytes of a file one step reads, hashes or sends in a worker thread.
_BLOCK = 1024 * 1024

# An image is read as a whole, into memory. A thread that a stop leaves behind reads it to its end.
_MAX_IMAGE = 256 * 1024 * 1024

# Those that the system has. Without O_NONBLOCK, opening a FIFO would wait for a writer.
_FLAGS: int = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


class RegularFile:
    """A file that is read from its beginning to its end, in steps, each in a worker thread.

    A stop leaves a step behind at once, however long the file system holds it up. The user of the file closes it; if a
    step was left behind, that step closes the file when it returns.

    Args:
        path: The file.
        within: Real paths of folders. The file must be in one of them after all links; empty allows any place.
    """

    def __init__(self, path: str | bytes | os.PathLike[Any], within: tuple[str, ...] = ()) -> None:
        try:
            self.path = os.fsdecode(path)
        except TypeError:
            raise RequestError(f"path={type(path).__name__}: give the path of a file") from None
        self.name = os.path.basename(self.path)
        self.size = 0
        self._within = within
        self._done = 0
        self._file: FileIO | None = None
        # Held by the thread of a step, also of one that was left behind: two steps would share one position.
        self._busy = threading.Lock()
        self._closed = False

    # -- in the event loop --

    async def run(self, step: Callable[..., Result], *args: Any) -> Result:
        """Run a step, one of the methods below or a function that uses them, in a worker thread.

        Cancellation: the thread is left behind at once.
        """
        return await anyio.to_thread.run_sync(self._run, step, args, abandon_on_cancel=True)

    def close(self) -> None:
        """Close the file; if a step still runs, the file is closed when it returns."""
        self._closed = True
        self._close_if_free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, step: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        try:
            with self._busy:
                return step(*args)
        finally:
            # After the lock is free: close() sets the mark before it tries the lock, so one of the two closes the file.
            if self._closed:
                self._close_if_free()

    def _close_if_free(self) -> None:
        if self._busy.acquire(blocking=False):
            try:
                file, self._file = self._file, None
                if file is not None:
                    file.close()
            finally:
                self._busy.release()

    # -- steps, in a worker thread --

    def open(self) -> None:
        """Open the file; raises ``RequestError``."""
        if self._closed:
            return
        try:
            # Before it is opened, since opening a device may start it; and after that, since the file may have been
            # replaced in between.
            self._check_kind(os.stat(self.path))
            descriptor = os.open(self.path, _FLAGS)
            try:
                found = os.fstat(descriptor)
                self._check_kind(found)
                self._check_place(descriptor, found)
                self._file = os.fdopen(descriptor, "rb", buffering=0)
            except BaseException:
                os.close(descriptor)
                raise
        except (OSError, ValueError) as exc:
            if isinstance(exc, RequestError):
                raise
            raise RequestError(f"cannot read {self.path!r}: {exc}") from exc
        self.size = found.st_size

    def _check_kind(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise RequestError(f"cannot read {self.path!r}: this is {kind}; give a regular file")

    def _check_place(self, descriptor: int, found: os.stat_result) -> None:
        if not self._within:
            return
        place = _place(descriptor, self.path, found)
        if not any(place.startswith(os.path.join(folder, "")) for folder in self._within):
            raise RequestError(
                f"cannot read {self.path!r}: it leads to {place!r}, outside of the model's folder; put the file itself "
                "there, or allow this with follow_links=True"
            )

    def rewind(self) -> None:
        """Go back to the beginning."""
        if self._file is not None:
            self._file.seek(0)
            self._done = 0

    def read(self) -> bytes:
        """Return the next block, ``b""`` at the end; raises ``RequestError``."""
        if self._file is None:
            raise RequestError(f"cannot read {self.path!r}: the file is closed")
        try:
            block: bytes | None = self._file.read(_BLOCK)
        except OSError as exc:
            raise RequestError(f"cannot read {self.path!r}: {exc}") from exc
        # Some files of /proc and /sys look regular, and wait for more data.
        self._done += len(block or b"")
        if block is None or self._done > self.size or (not block and self._done < self.size):
            raise RequestError(f"cannot read {self.path!r}: it changed while it was read; give a complete file")
        return block


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


def _place(descriptor: int, path: str, opened: os.stat_result) -> str:
    """Return the real path of the opened file."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        place = os.path.realpath(path)
    if not os.path.samestat(os.lstat(place), opened):
        raise RequestError(f"cannot read {path!r}: it was replaced while it was opened; try again")
    return place


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file; call it in a worker thread."""
    with RegularFile(path) as file:
        file.open()
        if file.size > _MAX_IMAGE:
            raise RequestError(
                f"cannot read {file.path!r}: it has {file.size:,} bytes; the limit for an image is {_MAX_IMAGE:,}"
            )
        return b"".join(iter(file.read, b""))


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as a whole or not at all, so that only the user can read it; call it in a worker thread.

    Raises:
        OSError: It cannot be written; what was there is there still.
    """
    folder, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name[:100]}.", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
