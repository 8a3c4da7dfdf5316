"""The files of a batch: an answer that is in them stays there, whatever happens, and is there once.

Both are only appended to, a whole line at a ``write()``. What a process that was killed has written is with the kernel;
``sync()`` gives it to the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import PydanticSerializationError, to_json

from ._errors import DiskError, OutputRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Journal", "encode_line", "records"]

# Windows makes two bytes of a line end in a file that is not opened so.
_BINARY: int = getattr(os, "O_BINARY", 0)


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line."""
    try:
        # A fifth of the time that json takes for a short answer, a tenth for a vector.
        return to_json(record) + b"\n"
    except PydanticSerializationError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the records of a file with their lines.

    Raises:
        OutputRefused: A line is not a record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["status"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise OutputRefused(
                    f"{path}, line {number}, is not a record of a batch: correct it or remove it, or "
                    "start over with restart"
                ) from None
            yield record, line


def _take(lock: int) -> None:
    """Lock an open file; raises ``OSError`` if another process has it."""
    # Imported where it is needed: each system has one of the two, and other commands need neither.
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _Lines:
    """A file of lines that is appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
        self._size = 0
        self._synced = True
        try:
            self._mend()
        except BaseException:
            os.close(self._fd)
            raise

    def _mend(self) -> None:
        """Cut off a last line that has no end: a write that a full disk or a power loss cut short."""
        end = os.fstat(self._fd).st_size
        self._size = end
        while self._size:
            begin = max(0, self._size - 65536)
            # What is written later goes to the end, wherever this leaves the place.
            os.lseek(self._fd, begin, os.SEEK_SET)
            block = os.read(self._fd, self._size - begin)
            last = block.rfind(b"\n")
            if last >= 0:
                self._size = begin + last + 1
                break
            self._size = begin
        if self._size != end:
            os.ftruncate(self._fd, self._size)

    def append(self, line: bytes) -> None:
        """Write a whole line, or nothing."""
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(28, os.strerror(28))
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise DiskError(f"cannot write {self.path}: {exc.strerror}; the same command continues from here") from exc
        self._size += written
        self._synced = False

    def clear(self) -> None:
        """Forget all lines."""
        os.ftruncate(self._fd, 0)
        self._size = 0

    @property
    def is_empty(self) -> bool:
        """Whether it has no lines."""
        return not self._size

    def sync(self) -> None:
        """Give what was written to the disk; in any thread."""
        if not self._synced:
            self._synced = True
            try:
                os.fsync(self._fd)
            except OSError as exc:
                raise DiskError(f"cannot write {self.path}: {exc.strerror}") from exc

    def close(self) -> None:
        os.close(self._fd)


class Journal:
    """The output of a batch, the file of what failed, and what keeps a second batch away from both.

    Args:
        path: The output; the others are named after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed_path = path.with_name(path.name + ".failed.jsonl")
        self._job_path = path.with_name(path.name + ".job.json")
        self._lock = self._locked()
        try:
            self._done = _Lines(path)
            try:
                self._failed = _Lines(self.failed_path)
            except BaseException:
                self._done.close()
                raise
        except OSError as exc:
            os.close(self._lock)
            raise OutputRefused(f"cannot write the output {path}: {exc.strerror}") from exc

    def _locked(self) -> int:
        path = self.path.with_name(self.path.name + ".lock")
        try:
            # It stays: a lock whose file is removed is one that two can have.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
        except OSError as exc:
            raise OutputRefused(f"cannot write the output {self.path}: {exc.strerror}") from exc
        try:
            _take(lock)
        except OSError:
            os.close(lock)
            raise OutputRefused(f"another batch is writing {self.path}: wait for it, or name another output") from None
        return lock

    def check_job(self, job: Mapping[str, Any], *, force: bool) -> None:
        """Refuse to go on with another job than the one that was begun.

        Raises:
            OutputRefused: It is another one.
        """
        text = json.dumps(job, sort_keys=True, default=repr)
        begun = self._job_path.read_text("utf-8") if self._job_path.exists() else None
        if begun is not None and not force:
            before, now = _object(begun), _object(text)
            if before != now:
                names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
                raise OutputRefused(
                    f"{self.path} belongs to a job with another {', '.join(names)}: "
                    "name another output, start over with restart, or continue with force"
                )
        if begun is None or force:
            self._replace(self._job_path, [text.encode() + b"\n"])

    def restart(self) -> None:
        """Forget all that was done."""
        self._done.clear()
        self._failed.clear()
        with contextlib.suppress(FileNotFoundError):
            self._job_path.unlink()

    def done(self) -> Iterator[dict[str, Any]]:
        """Yield the records of what is done."""
        return (record for record, _ in records(self.path))

    def failed(self) -> Iterator[dict[str, Any]]:
        """Yield the records of what failed."""
        return (record for record, _ in records(self.failed_path))

    def rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Leave records out of the output."""
        self._replace(self.path, (line for record, line in records(self.path) if keep(record)))
        self._done.close()
        self._done = _Lines(self.path)

    def rewrite_failed(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Leave records out of the file of what failed."""
        if self._failed.is_empty:
            return
        self._replace(self.failed_path, (line for record, line in records(self.failed_path) if keep(record)))
        self._failed.close()
        self._failed = _Lines(self.failed_path)

    def sort(self) -> None:
        """Put the output in the order of the input. Only the places of its lines are held."""
        places: list[tuple[int, int, int]] = []
        offset = 0
        for record, line in records(self.path):
            places.append((record["index"], offset, len(line)))
            offset += len(line)
        with self.path.open("rb") as file:

            def line_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            self._replace(self.path, (line_at(offset, length) for _, offset, length in sorted(places)))
        self._done.close()
        self._done = _Lines(self.path)

    def _replace(self, path: Path, lines: Any) -> None:
        """Write a file anew: whoever looks finds the old one or the new one."""
        new = path.with_name(path.name + ".new")
        try:
            with new.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                new.unlink()
            raise DiskError(f"cannot write {path}: {exc.strerror}") from exc

    def add_done(self, record: Mapping[str, Any]) -> None:
        """Write the record of an answer."""
        self._done.append(encode_line(record))

    def add_failed(self, record: Mapping[str, Any]) -> None:
        """Write the record of what failed."""
        self._failed.append(encode_line(record))

    def sync(self) -> None:
        """Give what was written to the disk; in any thread."""
        self._done.sync()
        self._failed.sync()

    def close(self) -> None:
        """Close the files, and let others have them."""
        self._done.close()
        self._failed.close()
        if self._failed.is_empty:
            with contextlib.suppress(OSError):
                self.failed_path.unlink()
        os.close(self._lock)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
