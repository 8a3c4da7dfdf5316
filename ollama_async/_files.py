"""Files on their way to the server: hashed and read in worker threads, sent no faster than it takes them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import anyio
import anyio.to_thread
import httpx

from ._call.timeouts import Timeouts
from ._cancel import CancelToken
from ._errors import NotFoundError, PhaseTimeout, RequestError
from ._model.progress import Meter, ProgressResponse
from ._regular import RegularFile
from ._secret import Secret
from ._session import CallOptions, Session, check_call, given_headers, hide

_DIGEST = re.compile("sha256[:-][0-9a-fA-F]{64}")


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

    def expect(self, files: Iterable[RegularFile | ModelFile]) -> None:
        """Files that will be hashed and uploaded."""
        for file in files:
            self._meter.expect(f"hashing {file.name}", file.size)
            self._meter.expect(f"uploading {file.name}", file.size)

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
        left = self._left()
        return self.call if left is None else {**self.call, "timeout": replace(self._timeouts, total=left)}

    def _left(self) -> float | None:
        total = self._timeouts.total
        if total is None:
            return None
        left = self._started + total - self._loop.time()
        if left <= 0:
            raise PhaseTimeout("total", total)
        return left

    @contextmanager
    def limit(self) -> Generator[None]:
        """Put awaits that are not calls of the job under what is left of its time."""
        with anyio.move_on_after(self._left()) as scope:
            yield
        if scope.cancelled_caught:
            raise PhaseTimeout("total", self._timeouts.total or 0.0)


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
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, and the file; if a block of it is being read, when that has been
        read.

        Server: ``POST /api/blobs/:digest``
        """
        hide(call)
        job = self._job(call, None)
        with RegularFile(path) as file:
            await self._step(job, file.run, file.open)
            digest = await self._hash(file, file.path, job)
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
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, and the file; if a block of it is being read, when that has been
        read.

        Server: ``HEAD /api/blobs/:digest``, ``POST /api/blobs/:digest``
        """
        hide(call)
        job = self._job(call, on_progress)
        with RegularFile(path) as file:
            await self._step(job, file.run, file.open)
            job.expect([file])
            return await self._upload(file, file.name, job)

    async def blob_exists(self, digest: str, **call: Unpack[CallOptions]) -> bool:
        """Return whether the server has a file, so that it need not be uploaded.

        Args:
            digest: ``"sha256:"`` and 64 hexadecimal digits.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            RequestError: It is not a digest.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``HEAD /api/blobs/:digest``
        """
        hide(call)
        try:
            await self._command("HEAD", f"/api/blobs/{_checked_digest(digest)}", None, call)
        except NotFoundError:
            return False
        return True

    # -- inside --

    def _job(self, call: CallOptions, on_progress: Callable[[ProgressResponse], object] | None) -> Job:
        check_call(call)
        timeouts = self._limits(call)
        # One token for all parts: what aborts the client's calls now must also reach those that have not begun yet.
        tokens = (self._calls.current(), call.get("token"))
        token = CancelToken.any(*(token for token in tokens if token is not None))
        return Job({**call, "token": token}, timeouts, on_progress)

    async def _step(self, job: Job, run: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Do a step of a job that is not a call."""
        with self._scope(job.part()), job.limit():
            return await run(*args)

    async def _find(self, job: Job, path: object, *, follow_links: bool) -> list[ModelFile]:
        # Also to look into a folder may take long.
        return cast("list[ModelFile]", await self._step(job, _in_thread, _model_files, path, follow_links))

    async def _upload_all(self, files: list[ModelFile], job: Job) -> dict[str, str]:
        digests: dict[str, str] = {}
        for found in files:
            with RegularFile(found.path, found.within) as file:
                await self._step(job, file.run, file.open)
                digests[found.name] = await self._upload(file, found.name, job)
        return digests

    async def _upload(self, file: RegularFile, name: str, job: Job) -> str:
        digest = await self._hash(file, name, job)
        size = file.size

        def moved(done: int, status: str = f"uploading {name}") -> None:
            job.report(ProgressResponse(status=status, digest=digest, total=size, completed=done))

        job.same(digest, f"uploading {name}")
        if await self.blob_exists(digest, **job.part()):
            moved(size, f"already there: {name}")
        else:
            moved(0)
            await self._send_file(file, digest, moved, job)
        return digest

    async def _hash(self, file: RegularFile, name: str, job: Job) -> str:
        """Return the SHA-256 of a file, worked out in worker threads."""
        digest = hashlib.sha256()
        done = 0

        def step() -> int:
            block = file.read()
            digest.update(block)
            return len(block)

        with self._scope(job.part()), job.limit():
            while read := await file.run(step):
                done += read
                job.part()
                job.report(ProgressResponse(status=f"hashing {name}", total=file.size, completed=done))
        return f"sha256:{digest.hexdigest()}"

    async def _send_file(self, file: RegularFile, digest: str, moved: Callable[[int], None], job: Job) -> None:
        call = job.part()
        given = given_headers(call) or Secret[Mapping[str, str]]({})
        headers = Secret[Mapping[str, str]]({"Content-Length": str(file.size), **given.value})
        await self._send(self._build("POST", f"/api/blobs/{digest}", _FileBody(file, moved), headers), call)


class _FileBody(httpx.AsyncByteStream):
    """A file as the body of a request; each time that it is sent it is read from its beginning."""

    def __init__(self, file: RegularFile, moved: Callable[[int], None]) -> None:
        self._file = file
        self._moved = moved

    async def __aiter__(self) -> AsyncIterator[bytes]:
        done = 0
        await self._file.run(self._file.rewind)
        while block := await self._file.run(self._file.read):
            yield block
            # Whoever asks for the next block has sent this one.
            done += len(block)
            self._moved(done)


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def _checked_digest(value: object) -> str:
    # It goes into a path.
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise RequestError(f"digest={value!r}: give 'sha256:' and 64 hexadecimal digits")
    return value


# What the server makes a model of: one kind of weights, and what is beside them. Of the first that is there.
_WEIGHTS = ("*.gguf", "*.safetensors")
_BESIDE = ("*.json", "tokenizer.model")


class ModelFile(NamedTuple):
    """A file of a model.

    Attributes:
        name: What the server shall know it by.
        path: Where it is.
        within: Where it must be when it is opened; see ``RegularFile``.
        size: Its bytes.
    """

    name: str
    path: Path
    within: tuple[str, ...]
    size: int


def _model_files(path: Any, follow_links: bool) -> list[ModelFile]:
    """Return the files that make a model; in a worker thread."""
    try:
        return _files_of(Path(path), follow_links=follow_links)
    except TypeError as exc:
        raise RequestError(f"path={type(path).__name__}: give the path of a file or folder") from exc
    except OSError as exc:
        raise RequestError(f"cannot read {str(path)!r}: {exc}") from exc


def _files_of(given: Path, *, follow_links: bool) -> list[ModelFile]:
    if not given.is_dir():
        if not given.exists():
            raise RequestError(f"no such file or folder: {str(given)!r}")
        return [_checked_file(given, ())]
    within = () if follow_links else _places(given)
    for pattern in _WEIGHTS:
        weights = sorted(given.glob(pattern))
        if weights:
            beside = [] if pattern == "*.gguf" else [file for kind in _BESIDE for file in sorted(given.glob(kind))]
            return [_checked_file(file, within) for file in [*weights, *beside]]
    raise RequestError(f"the folder {str(given)!r} has no model: it needs a file *.gguf or *.safetensors")


def _checked_file(path: Path, within: tuple[str, ...]) -> ModelFile:
    # All are looked at before the first one is hashed, which may take minutes; and each again when it is opened to be
    # read.
    try:
        path.name.encode()
    except UnicodeEncodeError:
        # The server is told the names, in JSON.
        raise RequestError(f"cannot send {str(path)!r}: the file's name is not UTF-8; rename the file") from None
    with RegularFile(path, within) as file:
        file.open()
        return ModelFile(path.name, path, within, file.size)


def _places(folder: Path) -> tuple[str, ...]:
    """Return where the files of a model may be: in its folder; in the cache of Hugging Face, also in that of blobs.

    There the folder is ``models--NAME/snapshots/REVISION``, and has links to ``models--NAME/blobs``.
    """
    real = Path(os.path.realpath(folder))
    snapshots = next((parent for parent in real.parents if parent.name == "snapshots"), None)
    return (str(real),) if snapshots is None else (str(real), str(snapshots.with_name("blobs")))
