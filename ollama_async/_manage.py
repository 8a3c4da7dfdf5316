"""The endpoints that manage models and files; ``AsyncClient`` is made on this.

What they answer is imported by the call that wants it: see ``_manage_types``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Unpack, cast, overload

from pydantic import BaseModel

from ._call.asked import full_name
from ._call.stream import Stream
from ._errors import BadRequestError, ProtocolError, RequestError
from ._files import FileTransfer
from ._model import Later
from ._model.input import (
    checked,
    checked_stream,
    encode_json,
    encode_messages,
    encode_options,
    encoded,
    model_name,
    sequence,
)
from ._model.merge import ProgressMerge
from ._model.options import Options
from ._model.progress import ProgressResponse
from ._model.types import Dumpable, EmbedResponse, GenerateResponse, Message, StatusResponse
from ._session import CallOptions, deferred, hide

if TYPE_CHECKING:
    from ._model import manage_types
else:
    manage_types = Later("manage_types")

OptionsLike: TypeAlias = Mapping[str, Any] | Options | Dumpable | None
KeepAlive: TypeAlias = float | str | timedelta | None

WebT = TypeVar("WebT", "manage_types.WebSearchResponse", "manage_types.WebFetchResponse")


class _CreateOptions(CallOptions, total=False):
    """What ``create`` takes besides what ollama-python's takes; described there."""

    renderer: str | None
    parser: str | None
    requires: str | None
    info: Mapping[str, Any] | None
    remote_host: str | None
    draft_files: Mapping[str, str] | None
    draft_quantize: str | None


class _CreateFromOptions(_CreateOptions, total=False):
    quantize: str | None
    template: str | None
    license: str | Sequence[str] | None
    system: str | None
    parameters: Mapping[str, Any] | BaseModel | None
    messages: Sequence[Mapping[str, Any] | Message] | None


_CALL = set(CallOptions.__optional_keys__)
_CREATE_FROM = set(_CreateFromOptions.__optional_keys__)


class ModelManagement(FileTransfer):
    """Lists, shows, makes, copies and deletes models; moves files and models."""

    async def list(self, **call: Unpack[CallOptions]) -> manage_types.ListResponse:
        """Return the models that the server has.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/tags``
        """
        hide(call)
        return await self._request(manage_types.ListResponse, "GET", "/api/tags", None, call)

    async def ps(self, **call: Unpack[CallOptions]) -> manage_types.ProcessResponse:
        """Return the models that are loaded.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/ps``
        """
        hide(call)
        return await self._request(manage_types.ProcessResponse, "GET", "/api/ps", None, call)

    async def context_length(self, model: str, **call: Unpack[CallOptions]) -> int | None:
        """Return how many tokens of context a model has been loaded with; ``None`` if it is not loaded.

        ``context_usage`` of the answers of this client then knows it, where a request says no ``num_ctx``.

        Args:
            model: Name of the model.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/ps``
        """
        hide(call)
        name = full_name(model_name(model))
        listed = await self._listed(name, call)
        length = self._context_lengths[name] = None if listed is None else listed.context_length
        return length

    async def _listed(self, name: str, call: CallOptions) -> manage_types.LoadedModel | None:
        """Return how the server lists a model that is loaded, by its name with the tag."""
        return next((one for one in (await self.ps(**call)).models if one.model == name), None)

    async def load(
        self, model: str, keep_alive: KeepAlive = None, *, options: OptionsLike = None, **call: Unpack[CallOptions]
    ) -> GenerateResponse:
        """Load a model, so that the next answer can begin at once; ``loaded()`` also keeps it and unloads it.

        Args:
            model: Name of the model.
            keep_alive: How long it stays loaded, as in ``chat``.
            options: Options to load it with, such as ``{"num_ctx": 8192}``; a call that says another ``num_ctx``, or
                leaves it out, has it loaded anew.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once; the server then gives the load up.

        Server: ``POST /api/generate`` without a prompt; for a model that can only embed, ``POST /api/embed``
        """
        hide(call)
        body: dict[str, Any] = {"model": model_name(model), **encoded(("keep_alive", keep_alive), ("options", options))}
        if self._holds:
            self._complete(body)
        try:
            return await self._request(GenerateResponse, "POST", "/api/generate", {**body, "stream": False}, call)
        except BadRequestError as exc:
            if "does not support generate" not in exc.error:
                raise
        await self._request(EmbedResponse, "POST", "/api/embed", {**body, "input": ""}, call)
        return GenerateResponse(model=model, response="", done=True, done_reason="load")

    async def unload(self, model: str, **call: Unpack[CallOptions]) -> GenerateResponse:
        """Unload a model as soon as the answers that it is giving are done; those are not ended.

        Args:
            model: Name of the model.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            RequestError: A block of ``loaded()`` of this client keeps it.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/generate`` without a prompt, with ``keep_alive`` 0
        """
        hide(call)
        hold = self._holds.get(full_name(model_name(model)))
        if hold is not None and hold.is_kept():
            raise RequestError(
                f"unload({model!r}): {hold.users} loaded() block(s) of this client keep it; leave them first"
            )
        return await self.load(model, 0, **call)

    async def version(self, **call: Unpack[CallOptions]) -> manage_types.VersionResponse:
        """Return the server's version.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/version``
        """
        hide(call)
        return await self._request(manage_types.VersionResponse, "GET", "/api/version", None, call)

    async def status(self, **call: Unpack[CallOptions]) -> manage_types.CloudStatusResponse:
        """Return whether the server uses models in the cloud.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/status``
        """
        hide(call)
        return await self._request(manage_types.CloudStatusResponse, "GET", "/api/status", None, call)

    async def recommendations(self, **call: Unpack[CallOptions]) -> manage_types.RecommendationsResponse:
        """Return the models that the server recommends.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``GET /api/experimental/model-recommendations``
        """
        hide(call)
        path = "/api/experimental/model-recommendations"
        return await self._request(manage_types.RecommendationsResponse, "GET", path, None, call)

    async def whoami(self, **call: Unpack[CallOptions]) -> manage_types.UserResponse:
        """Return the account at ollama.com that the server is signed in to.

        Raises:
            AuthenticationError: To none; ``signin_url`` says where to sign in.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/me``
        """
        hide(call)
        return await self._request(manage_types.UserResponse, "POST", "/api/me", None, call)

    async def signout(self, **call: Unpack[CallOptions]) -> StatusResponse:
        """Sign the server out of its account at ollama.com.

        Raises:
            AuthenticationError: It is not signed in.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/signout``
        """
        hide(call)
        return await self._command("POST", "/api/signout", None, call)

    async def show(
        self,
        model: str,
        *,
        verbose: bool | None = None,
        system: str | None = None,
        template: str | None = None,
        options: Mapping[str, Any] | BaseModel | None = None,
        **call: Unpack[CallOptions],
    ) -> manage_types.ShowResponse:
        """Return what the server knows of a model.

        Args:
            model: Name of the model.
            verbose: Whether to include the tensors and the long fields of the metadata.
            system: System prompt to show instead of the model's own.
            template: Prompt template to show instead of the model's own (deprecated by the server).
            options: Options to show besides the model's.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/show``
        """
        hide(call)
        given = encoded(("options", options), ("verbose", verbose), ("system", system), ("template", template))
        body = {"model": model_name(model), **given}
        return await self._request(manage_types.ShowResponse, "POST", "/api/show", body, call)

    async def copy(self, source: str, destination: str, **call: Unpack[CallOptions]) -> StatusResponse:
        """Give a model a second name.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/copy``
        """
        hide(call)
        body = {"source": model_name(source, "source"), "destination": model_name(destination, "destination")}
        return await self._command("POST", "/api/copy", body, call)

    async def delete(self, model: str, **call: Unpack[CallOptions]) -> StatusResponse:
        """Delete a model.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``DELETE /api/delete``
        """
        hide(call)
        return await self._command("DELETE", "/api/delete", {"model": model_name(model)}, call)

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
        **options: Unpack[_CreateOptions],
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
        **options: Unpack[_CreateOptions],
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

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
        stream: bool,
        **options: Unpack[_CreateOptions],
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]: ...

    @deferred(ProgressMerge)
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
        renderer: str | None = None,
        parser: str | None = None,
        requires: str | None = None,
        info: Mapping[str, Any] | None = None,
        remote_host: str | None = None,
        draft_files: Mapping[str, str] | None = None,
        draft_quantize: str | None = None,
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
            renderer: Name of the built-in renderer of prompts.
            parser: Name of the built-in parser of answers.
            requires: The server version that the model needs.
            info: Metadata of the model.
            remote_host: The server that ``from_`` is a model of.
            draft_files: Digests of the files of a draft model by file name (servers newer than 0.24).
            draft_quantize: Quantization of the draft model.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/create``
        """
        body = _create_body(
            model,
            stream=stream,
            from_=from_,
            license=license,
            parameters=parameters,
            messages=messages,
            quantize=quantize,
            template=template,
            system=system,
            renderer=renderer,
            parser=parser,
            requires=requires,
            remote_host=remote_host,
            draft_quantize=draft_quantize,
            files=files,
            adapters=adapters,
            info=info,
            draft_files=draft_files,
        )
        return self._progress("/api/create", body, call)

    async def create_from(
        self,
        model: str,
        path: str | os.PathLike[str],
        *,
        adapter: str | os.PathLike[str] | None = None,
        follow_links: bool = False,
        on_progress: Callable[[ProgressResponse], object] | None = None,
        **options: Unpack[_CreateFromOptions],
    ) -> ProgressResponse:
        """Make a model out of files on this machine: hash them, upload what the server does not have, and create it.

        Args:
            model: Name of the new model.
            path: A GGUF file, or a folder with GGUF files or with safetensors and what belongs to them.
            adapter: The same of an adapter.
            follow_links: Whether links in a folder may lead out of it. Without it that is refused, except to where the
                cache of Hugging Face keeps the files of this model.
            on_progress: Called in the event loop with each step; its ``overall`` is over all files and all steps.
            **options: As ``create``; a ``timeout`` is for all of it together.

        Returns:
            The last step.

        Raises:
            RequestError: A file cannot be read, is not a regular file, or is outside of the folder; or the folder
                has no model.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection and the file at once.

        Server: ``HEAD /api/blobs/:digest``, ``POST /api/blobs/:digest``, ``POST /api/create``
        """
        hide(options)
        model_name(model)
        checked("flag", follow_links=follow_links)
        if not options.keys() <= _CREATE_FROM:
            # Else told by create(), when everything has been uploaded.
            raise TypeError(f"unknown parameter {min(options.keys() - _CREATE_FROM)!r}")
        given: dict[str, Any] = dict(options)
        call = cast("CallOptions", {name: given.pop(name) for name in _CALL & set(given)})
        job = self._job(call, on_progress)
        files = await self._find(job, path, follow_links=follow_links)
        adapters = None if adapter is None else await self._find(job, adapter, follow_links=follow_links)
        # What create() would refuse when all has been uploaded.
        named = [
            None if found is None else dict.fromkeys((file.name for file in found), "") for found in (files, adapters)
        ]
        encode_json(_create_body(model, stream=True, files=named[0], adapters=named[1], **given))
        job.expect([*files, *(adapters or [])])
        uploaded = await self._upload_all(files, job)
        extra = None if adapters is None else await self._upload_all(adapters, job)
        given |= job.part()
        steps: Stream[ProgressResponse] = self.create(model, files=uploaded, adapters=extra, stream=True, **given)
        async for step in steps:
            job.report(step)
        last = steps.response
        if last is None:
            raise ProtocolError("the server's answer is empty")
        return last

    @overload
    def pull(
        self,
        model: str,
        *,
        insecure: bool = False,
        stream: Literal[True],
        resume: bool = False,
        **call: Unpack[CallOptions],
    ) -> Stream[ProgressResponse]: ...

    @overload
    def pull(
        self,
        model: str,
        *,
        insecure: bool = False,
        stream: Literal[False] = False,
        resume: bool = False,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

    @overload
    def pull(
        self,
        model: str,
        *,
        insecure: bool = False,
        stream: bool,
        resume: bool = False,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]: ...

    @deferred(ProgressMerge)
    def pull(
        self,
        model: str,
        *,
        insecure: bool = False,
        stream: bool = False,
        resume: bool = False,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Have the server download a model.

        An interrupted download continues when you pull the model again.

        Args:
            model: Name of the model.
            insecure: Whether a registry without TLS is allowed.
            stream: Whether to return the progress as a ``Stream``.
            resume: Whether to go on by itself, with growing pauses, when the connection or the download breaks off; it
                gives up after eight times in a row without a byte more.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once; the server may finish the part that it is at.

        Server: ``POST /api/pull``
        """
        body = {"model": model_name(model), "stream": checked_stream(stream), **checked("flag", insecure=insecure)}
        if not checked("flag", resume=resume)["resume"]:
            return self._progress("/api/pull", body, call)
        body["stream"] = True
        if stream:
            return self._stream(ProgressMerge(), "/api/pull", body, call, resume=True)
        # A caller that waits only for the last step must not take another one for it.
        return self._stream(ProgressMerge(), "/api/pull", body, call, resume=True, strict=True).collect()

    @overload
    def push(
        self, model: str, *, insecure: bool = False, stream: Literal[True], **call: Unpack[CallOptions]
    ) -> Stream[ProgressResponse]: ...

    @overload
    def push(
        self, model: str, *, insecure: bool = False, stream: Literal[False] = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse]: ...

    @overload
    def push(
        self, model: str, *, insecure: bool = False, stream: bool, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]: ...

    @deferred(ProgressMerge)
    def push(
        self, model: str, *, insecure: bool = False, stream: bool = False, **call: Unpack[CallOptions]
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Have the server upload a model.

        Args:
            model: Name of the model.
            insecure: Whether a registry without TLS is allowed.
            stream: Whether to return the progress as a ``Stream``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Returns:
            The last step; with ``stream=True`` a stream of all steps.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once; the server may finish the part that it is at.

        Server: ``POST /api/push``
        """
        body = {"model": model_name(model), "stream": checked_stream(stream), **checked("flag", insecure=insecure)}
        return self._progress("/api/push", body, call)

    async def web_search(
        self, query: str, max_results: int = 3, *, via_server: bool = False, **call: Unpack[CallOptions]
    ) -> manage_types.WebSearchResponse:
        """Search the web with ollama.com.

        Args:
            query: What to look for.
            max_results: Most pages to return, 1 to 10.
            via_server: Whether to ask through the server, with the account that it is signed in to; else ollama.com is
                asked with your key (see ``web_fetch``).
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            RequestError: There is no key.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST https://ollama.com/api/web_search``, ``POST /api/experimental/web_search``
        """
        hide(call)
        body = {"query": _required(query, "query"), **checked("number", max_results=max_results)}
        return await self._web(manage_types.WebSearchResponse, "search", body, call, via_server=via_server)

    async def web_fetch(
        self, url: str, *, via_server: bool = False, **call: Unpack[CallOptions]
    ) -> manage_types.WebFetchResponse:
        """Read a web page with ollama.com.

        The key is the first of these: the ``Authorization`` of the call's headers, ``OLLAMA_API_KEY``, the
        ``Authorization`` of the client's headers. A key of the client for another host than this machine or ollama.com
        is not sent there, unless with ``compat=True``.

        Args:
            url: Address of the page.
            via_server: As in ``web_search``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            RequestError: There is no key.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST https://ollama.com/api/web_fetch``, ``POST /api/experimental/web_fetch``
        """
        hide(call)
        return await self._web(
            manage_types.WebFetchResponse, "fetch", {"url": _required(url, "url")}, call, via_server=via_server
        )

    async def _web(
        self, model: type[WebT], what: str, body: dict[str, Any], call: CallOptions, *, via_server: bool
    ) -> WebT:
        if checked("flag", via_server=via_server)["via_server"]:
            return await self._request(model, "POST", f"/api/experimental/web_{what}", body, call)
        headers = self._web_headers(call)
        if not headers.value.get("Authorization", "").startswith("Bearer "):
            # Word for word what ollama-python says.
            raise RequestError(f"Authorization header with Bearer token is required for web {what}")
        outside: CallOptions = {**call, "headers": cast("Any", headers)}
        return await self._request(model, "POST", f"https://ollama.com/api/web_{what}", body, outside)

    def _progress(
        self, path: str, body: dict[str, Any], call: CallOptions
    ) -> Coroutine[Any, Any, ProgressResponse] | Stream[ProgressResponse]:
        """Return the last step of a long operation, or the stream of its steps, as the body asks for."""
        if body["stream"]:
            return self._stream(ProgressMerge(), path, body, call)
        return self._request(ProgressResponse, "POST", path, body, call)


def _create_body(
    model: str,
    *,
    stream: object,
    from_: object = None,
    license: object = None,
    parameters: object = None,
    messages: object = None,
    **given: object,
) -> dict[str, Any]:
    """Check what ``create`` was given, and return the body of its request."""
    kinds = {kind: {name: given[name] for name in names if name in given} for kind, names in _CREATE_KINDS.items()}
    return {
        "model": model_name(model),
        "stream": checked_stream(stream),
        "from": from_ if from_ is None else model_name(from_, "from_"),
        "license": _licenses(license),
        "parameters": encode_options(parameters, "parameters"),
        "messages": None if messages is None else encode_messages(messages),
        **checked("text", **kinds["text"]),
        **checked("mapping", **kinds["mapping"]),
    }


_CREATE_KINDS = {
    "text": (
        *("quantize", "template", "system", "renderer", "parser", "requires"),
        *("remote_host", "draft_quantize"),
    ),
    "mapping": ("files", "adapters", "info", "draft_files"),
}


def _required(value: object, parameter: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{parameter}={type(value).__name__}: give a str")
    return value


def _licenses(value: object) -> object:
    if isinstance(value, str | None):
        return value
    licenses = list(sequence(value, "license"))
    if not all(isinstance(text, str) for text in licenses):
        raise RequestError("license: give a str, or a list of str")
    return licenses
