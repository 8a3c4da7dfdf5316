"""Files on their way to the server: hashed and read in worker threads, sent no faster than it takes them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import anyio.to_thread
import httpx

from ._cancel import CancelToken
from ._errors import NotFoundError, PhaseTimeout, RequestError
from ._progress import Meter, ProgressResponse
from ._session import CallOptions, Session, check_call
from ._timeouts import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from typing import BinaryIO

__all__ = ["FileTransfer", "Job", "model_files"]

_DIGEST = re.compile("sha256[:-][0-9a-fA-F]{64}")

# How much of a file is read and hashed in one go in a worker thread.
_FILE_BLOCK = 1024 * 1024


class Job:
    """A call that is made of several: they have one limit of time, and one figure of progress.

    Args:
        call: What was given to the call.
        timeouts: The limits of the whole.
        on_progress: Called with each step.
    """

    def __init__(
        self, call: CallOptions, timeouts: Timeouts, on_progress: Callable[[ProgressResponse], object] | None
    ) -> None:
        if on_progress is not None and not callable(on_progress):
            raise RequestError(f"on_progress={type(on_progress).__name__}: give a function of a step")
        self.call = call
        self._timeouts = timeouts
        self._on_progress = on_progress
        self._meter = Meter()
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    def expect(self, files: Iterable[Path]) -> None:
        """Files that will be hashed and uploaded."""
        for file in files:
            size = _size(file)
            self._meter.expect(f"hashing {file.name}", size)
            self._meter.expect(f"uploading {file.name}", size)

    def same(self, digest: str, name: str) -> None:
        """What was expected under a name is the file with this digest."""
        self._meter.rename(name, digest)

    def report(self, step: ProgressResponse) -> None:
        """Note a step, and pass it on."""
        self._meter.add(step)
        if self._on_progress is not None:
            self._on_progress(step)

    def part(self) -> CallOptions:
        """Return what to give to the next call of the job, if there is time left for one.

        Raises:
            PhaseTimeout: The limit of the whole has passed.
        """
        total = self._timeouts.total
        if total is None:
            return self.call
        left = self._started + total - self._loop.time()
        if left <= 0:
            raise PhaseTimeout("total", total)
        return {**self.call, "timeout": replace(self._timeouts, total=left)}


class FileTransfer(Session):
    """Uploads files."""

    async def create_blob(self, path: str | os.PathLike[str], **call: Unpack[CallOptions]) -> str:
        """Upload a file for ``create``, also if the server has it; ``upload`` asks first.

        Args:
            path: The file. It is hashed and read in worker threads.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Returns:
            The file's digest, ``"sha256:..."``.

        Raises:
            RequestError: The file cannot be read.
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection and the file at once.

        Server: ``POST /api/blobs/:digest``
        """
        job = self._job(call, None)
        with open_file(path) as file:
            digest = await self._hash(file, os.fsdecode(path), job)
            await self._send_file(file, digest, lambda _: None, job)
        return digest

    async def upload(
        self,
        path: str | os.PathLike[str],
        *,
        on_progress: Callable[[ProgressResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> str:
        """Upload a file for ``create``, unless the server has it.

        Args:
            path: The file. It is hashed and read in worker threads.
            on_progress: Called in the event loop with each step: ``"hashing NAME"``, then ``"uploading NAME"`` or
                ``"already there: NAME"``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call; the timeout is for all of it.

        Returns:
            The file's digest, ``"sha256:..."``.

        Raises:
            RequestError: The file cannot be read.
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection and the file at once.

        Server: ``HEAD /api/blobs/:digest``, ``POST /api/blobs/:digest``
        """
        job = self._job(call, on_progress)
        with open_file(path) as file:
            job.expect([Path(path)])
            return await self._upload(file, Path(path).name, job)

    async def blob_exists(self, digest: str, **call: Unpack[CallOptions]) -> bool:
        """Return whether the server has a file, so that it need not be uploaded.

        Args:
            digest: ``"sha256:"`` and 64 hexadecimal digits.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            RequestError: It is no digest.
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``HEAD /api/blobs/:digest``
        """
        try:
            await self._command("HEAD", f"/api/blobs/{_checked_digest(digest)}", None, call)
        except NotFoundError:
            return False
        return True

    # -- inside --

    def _job(self, call: CallOptions, on_progress: Callable[[ProgressResponse], object] | None) -> Job:
        check_call(call)
        timeouts = Timeouts.of(call["timeout"]) if "timeout" in call else self._timeouts
        # One token for all parts: what aborts the client's calls now must also reach those that have not begun yet.
        tokens = (self._current(), call.get("token"))
        token = CancelToken.any(*(token for token in tokens if token is not None))
        return Job({**call, "token": token}, timeouts, on_progress)

    async def _upload_all(self, files: Mapping[str, Path], job: Job) -> dict[str, str]:
        digests: dict[str, str] = {}
        for name, path in files.items():
            with open_file(path) as file:
                digests[name] = await self._upload(file, name, job)
        return digests

    async def _upload(self, file: BinaryIO, name: str, job: Job) -> str:
        digest = await self._hash(file, name, job)
        size = os.fstat(file.fileno()).st_size

        def moved(done: int, status: str = f"uploading {name}") -> None:
            job.report(ProgressResponse(status=status, digest=digest, total=size, completed=done))

        job.same(digest, f"uploading {name}")
        if await self.blob_exists(digest, **job.part()):
            moved(size, f"already there: {name}")
        else:
            moved(0)
            await self._send_file(file, digest, moved, job)
        return digest

    async def _hash(self, file: BinaryIO, name: str, job: Job) -> str:
        """Return the SHA-256 of a file, worked out in worker threads; a stop waits for one block at most."""
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        done = 0

        def step() -> int:
            block = file.read(_FILE_BLOCK)
            digest.update(block)
            return len(block)

        with self._scope(job.part()):
            while read := await anyio.to_thread.run_sync(step):
                done += read
                job.part()
                job.report(ProgressResponse(status=f"hashing {name}", total=size, completed=done))
        return f"sha256:{digest.hexdigest()}"

    async def _send_file(self, file: BinaryIO, digest: str, moved: Callable[[int], None], job: Job) -> None:
        call = job.part()
        headers = {"Content-Length": str(os.fstat(file.fileno()).st_size), **(call.get("headers") or {})}
        await self._send(self._build("POST", f"/api/blobs/{digest}", _FileBody(file, moved), headers), call)


class _FileBody(httpx.AsyncByteStream):
    """A file as the body of a request; each time that it is sent it is read from its beginning."""

    def __init__(self, file: BinaryIO, moved: Callable[[int], None]) -> None:
        self._file = file
        self._moved = moved

    async def __aiter__(self) -> AsyncIterator[bytes]:
        done = 0
        await anyio.to_thread.run_sync(self._file.seek, 0)
        while block := await anyio.to_thread.run_sync(self._file.read, _FILE_BLOCK):
            yield block
            # Whoever asks for the next block has sent this one.
            done += len(block)
            self._moved(done)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that is to be uploaded."""
    try:
        return Path(path).open("rb")
    except (OSError, TypeError, ValueError, AttributeError) as exc:
        raise RequestError(f"cannot read {str(path)!r}: {exc}") from exc


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as exc:
        raise RequestError(f"cannot read {str(path)!r}: {exc}") from exc


def _checked_digest(value: object) -> str:
    # It goes into a path.
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise RequestError(f"digest={value!r}: give 'sha256:' and 64 hexadecimal digits")
    return value


# What the server makes a model of: one kind of weights, and what is beside them. Of the first that is there.
_WEIGHTS = ("*.gguf", "*.safetensors")
_BESIDE = ("*.json", "tokenizer.model")


def model_files(path: Any) -> dict[str, Path]:
    """Return the files that make a model, by the names that the server shall know them by."""
    try:
        given = Path(path)
    except TypeError as exc:
        raise RequestError(f"path={type(path).__name__}: give the path of a file or folder") from exc
    if given.is_file():
        return {given.name: given}
    if not given.is_dir():
        raise RequestError(f"there is neither a file nor a folder {str(given)!r}")
    for pattern in _WEIGHTS:
        weights = sorted(given.glob(pattern))
        if weights:
            beside = [] if pattern == "*.gguf" else [file for kind in _BESIDE for file in sorted(given.glob(kind))]
            return {file.name: file for file in [*weights, *beside]}
    raise RequestError(f"the folder {str(given)!r} has no model in it: neither *.gguf nor *.safetensors")
