"""The endpoints that manage models and files; ``AsyncClient`` is made on this."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from ._errors import NotFoundError
from ._input import (
    FileBody,
    blob_digest,
    encode_json,
    encode_messages,
    encode_options,
    hash_file,
    model_name,
    open_file,
)
from ._merge import ProgressMerge
from ._session import CallOptions, Session
from ._types import (
    ListResponse,
    Message,
    ProcessResponse,
    ProgressResponse,
    ShowResponse,
    StatusResponse,
    VersionResponse,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence
    from pathlib import Path

    from pydantic import BaseModel

    from ._stream import Stream

__all__ = ["ModelManagement"]


class ModelManagement(Session):
    """Lists, shows, makes, copies and deletes models; moves files and models."""

    async def list(self, **call: Unpack[CallOptions]) -> ListResponse:
        """Return the models that the server has.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``GET /api/tags``
        """
        return await self._request(ListResponse, "GET", "/api/tags", None, call)

    async def ps(self, **call: Unpack[CallOptions]) -> ProcessResponse:
        """Return the models that are loaded.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``GET /api/ps``
        """
        return await self._request(ProcessResponse, "GET", "/api/ps", None, call)

    async def version(self, **call: Unpack[CallOptions]) -> VersionResponse:
        """Return the server's version.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``GET /api/version``
        """
        return await self._request(VersionResponse, "GET", "/api/version", None, call)

    async def show(self, model: str, *, verbose: bool | None = None, **call: Unpack[CallOptions]) -> ShowResponse:
        """Return what the server knows of a model.

        Args:
            model: Name of the model.
            verbose: Whether to include the tensors and the long fields of the metadata.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/show``
        """
        body = {"model": model_name(model), "verbose": verbose}
        return await self._request(ShowResponse, "POST", "/api/show", body, call)

    async def copy(self, source: str, destination: str, **call: Unpack[CallOptions]) -> StatusResponse:
        """Give a model a second name.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/copy``
        """
        body = {"source": model_name(source, "source"), "destination": model_name(destination, "destination")}
        await self._send(self._build("POST", "/api/copy", encode_json(body), call.get("headers")), call)
        return StatusResponse(status="success")

    async def delete(self, model: str, **call: Unpack[CallOptions]) -> StatusResponse:
        """Delete a model.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``DELETE /api/delete``
        """
        body = {"model": model_name(model)}
        await self._send(self._build("DELETE", "/api/delete", encode_json(body), call.get("headers")), call)
        return StatusResponse(status="success")

    @overload
    def create(
        self,
        model: str,
        quantize: str | None = None,
        from_: str | None = None,
        files: Mapping[str, str] | None = None,
        adapters: Mapping[str, str] | None = None,
        template: str | None = None,
        license: str | Sequence[str] | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        messages: Sequence[Mapping[str, Any] | Message] | None = None,
        *,
        stream: Literal[True],
        **call: Unpack[CallOptions],
    ) -> Stream[ProgressResponse]: ...

    @overload
    def create(
        self,
        model: str,
        quantize: str | None = None,
        from_: str | None = None,
        files: Mapping[str, str] | None = None,
        adapters: Mapping[str, str] | None = None,
        template: str | None = None,
        license: str | Sequence[str] | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        messages: Sequence[Mapping[str, Any] | Message] | None = None,
        *,
        stream: Literal[False] = False,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

    def create(
        self,
        model: str,
        quantize: str | None = None,
        from_: str | None = None,
        files: Mapping[str, str] | None = None,
        adapters: Mapping[str, str] | None = None,
        template: str | None = None,
        license: str | Sequence[str] | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        messages: Sequence[Mapping[str, Any] | Message] | None = None,
        *,
        stream: bool = False,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Make a model out of another one, or out of files that were uploaded with ``create_blob``.

        Args:
            model: Name of the new model.
            quantize: Quantization, such as ``"q4_K_M"``.
            from_: Name of the model to make it from.
            files: Digests of uploaded files by file name.
            adapters: Digests of uploaded adapters by file name.
            template: Prompt template.
            license: Licence text, or several.
            system: System prompt.
            parameters: Default options of the model.
            messages: Messages that each chat begins with.
            stream: Whether to return the progress as a ``Stream``.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/create``
        """
        body = {
            "model": model_name(model),
            "stream": stream,
            "quantize": quantize,
            "from": from_,
            "files": files,
            "adapters": adapters,
            "template": template,
            "license": license,
            "system": system,
            "parameters": encode_options(parameters, "parameters"),
            "messages": None if messages is None else encode_messages(messages),
        }
        return self._progress("/api/create", body, call)

    async def create_blob(self, path: str | Path, **call: Unpack[CallOptions]) -> str:
        """Upload a file for ``create``.

        Args:
            path: The file. It is hashed and read in worker threads.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Returns:
            The file's digest, ``"sha256:..."``.

        Raises:
            RequestError: The file cannot be read.
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection and the file at once.

        Server: ``POST /api/blobs/:digest``
        """
        with open_file(path) as file:
            with self._scope(call):
                digest = f"sha256:{await hash_file(file)}"
            file.seek(0)
            headers = {"Content-Length": str(os.fstat(file.fileno()).st_size), **(call.get("headers") or {})}
            await self._send(self._build("POST", f"/api/blobs/{digest}", FileBody(file), headers), call)
        return digest

    async def blob_exists(self, digest: str, **call: Unpack[CallOptions]) -> bool:
        """Return whether the server has a file, so that it need not be uploaded.

        Args:
            digest: ``"sha256:"`` and 64 hexadecimal digits.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            RequestError: It is no digest.
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``HEAD /api/blobs/:digest``
        """
        path = f"/api/blobs/{blob_digest(digest)}"
        try:
            await self._send(self._build("HEAD", path, None, call.get("headers")), call)
        except NotFoundError:
            return False
        return True

    @overload
    def pull(
        self, model: str, *, insecure: bool = False, stream: Literal[True], **call: Unpack[CallOptions]
    ) -> Stream[ProgressResponse]: ...

    @overload
    def pull(
        self, model: str, *, insecure: bool = False, stream: Literal[False] = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

    def pull(
        self, model: str, *, insecure: bool = False, stream: bool = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Have the server download a model.

        An interrupted download goes on where it was when it is asked for again.

        Args:
            model: Name of the model.
            insecure: Whether a registry without TLS is allowed.
            stream: Whether to return the progress as a ``Stream``.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once; the server may finish the part that it is at.

        Server: ``POST /api/pull``
        """
        body = {"model": model_name(model), "stream": stream, "insecure": insecure}
        return self._progress("/api/pull", body, call)

    @overload
    def push(
        self, model: str, *, insecure: bool = False, stream: Literal[True], **call: Unpack[CallOptions]
    ) -> Stream[ProgressResponse]: ...

    @overload
    def push(
        self, model: str, *, insecure: bool = False, stream: Literal[False] = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

    def push(
        self, model: str, *, insecure: bool = False, stream: bool = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Have the server upload a model.

        Args:
            model: Name of the model.
            insecure: Whether a registry without TLS is allowed.
            stream: Whether to return the progress as a ``Stream``.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once; the server may finish the part that it is at.

        Server: ``POST /api/push``
        """
        body = {"model": model_name(model), "stream": stream, "insecure": insecure}
        return self._progress("/api/push", body, call)

    def _progress(
        self, path: str, body: dict[str, Any], call: CallOptions
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Return the last step of a long operation, or the stream of its steps, as the body asks for."""
        if body["stream"]:
            return self._stream(ProgressMerge(), path, body, call)
        return self._request(ProgressResponse, "POST", path, body, call)
