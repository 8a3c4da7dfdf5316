"""``AsyncClient``: one method an endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeVar, Unpack, cast, overload

from pydantic import BaseModel, ValidationError

from ._call.stream import Stream
from ._context import OnTruncation, truncation_stages
from ._continue import Continuation, Partial
from ._errors import ProtocolError, RequestError
from ._hang import hang_stages
from ._loaded import Loaded
from ._manage import KeepAlive, ModelManagement, OptionsLike
from ._model import Later
from ._model.input import (
    Image,
    checked_stream,
    encode_input,
    encode_messages,
    encoded,
    first_error,
    format_model,
    model_name,
)
from ._model.merge import ChatMerge, GenerateMerge
from ._model.progress import ProgressResponse
from ._model.tools import encode_tools
from ._model.types import ChatResponse, Dumpable, EmbeddingsResponse, EmbedResponse, GenerateResponse, Message, plain
from ._preflight import preflight_stages, require
from ._session import CallOptions, deferred, hide

if TYPE_CHECKING:
    from ._call.chunk import ChunkT, Merge
    from ._call.staged import Stage
    from ._continue import Stages
    from ._model import systemone as systemone_types
    from ._model.types import ParsedChatResponse, ParsedGenerateResponse
else:
    systemone_types = Later("systemone")

Messages: TypeAlias = str | Sequence[Mapping[str, Any] | Message | Dumpable] | None
Format: TypeAlias = str | Mapping[str, Any] | Dumpable | type[BaseModel] | None
ImageLike: TypeAlias = str | bytes | os.PathLike[str] | BinaryIO | Image | Dumpable


ParsedT = TypeVar("ParsedT", bound=BaseModel)


class _AnswerOptions(CallOptions, total=False):
    """What ``chat`` and ``generate`` have in common; described there."""

    think: bool | str | None
    logprobs: bool | None
    top_logprobs: int | None
    options: OptionsLike
    keep_alive: KeepAlive
    truncate: bool | None
    shift: bool | None
    debug_render_only: bool | None
    on_truncation: OnTruncation
    preflight: bool
    recover: bool | None


class _ChatOptions(_AnswerOptions, total=False):
    tools: Sequence[Any] | None


class _GenerateOptions(_AnswerOptions, total=False):
    system: str | None
    template: str | None
    context: Sequence[int] | None
    raw: bool | None
    images: Sequence[ImageLike] | None
    width: int | None
    height: int | None
    steps: int | None


class AsyncClient(ModelManagement):
    """A client of an Ollama server, all of whose calls can be aborted.

    You can use a client from several tasks at once, and in several event loops one after the other. Close it with
    ``await client.close()`` or ``async with``. When an event loop ends, the client's open connections in it are closed.

    Without ``stream=True`` a call is a coroutine. With it, a call is a ``Stream``, and nothing is sent before you
    iterate over it, await it or enter it. Every call takes ``token=`` (a ``CancelToken``), ``timeout=`` (``Timeouts``,
    an ``httpx.Timeout``, or a number of seconds for the whole call; ``None`` for no limit) and ``headers=``.

    Args:
        host: Address of the server, as in ``OLLAMA_HOST``, which is used when none is given; by default
            ``http://127.0.0.1:11434``.
        headers: Headers for every request; they replace the library's own of the same name.
        timeout: Default for every call.
        token: A token for every call, in addition to the call's own.
        retries: How often a call is sent again when it fails before the first byte of its answer: no connection, or the
            statuses 429, 502, 503 and 504; with growing pauses, or after the time that the server asks for.
        compat: Whether to behave like ollama-python where this library's default is safer or better; the migration
            guide lists the differences.
        strict: Whether a stream that ends without its last chunk raises ``StreamTruncated``.
        max_line_bytes: How long one line of a stream may be.
        transport: An httpx transport to use instead of ``DirectTransport``.
        http_client: An ``httpx.AsyncClient`` to use; it is not closed with this client.
        proxy: URL of a proxy, or an ``httpx.Proxy``. Without it those of the environment are followed, but never for
            this machine.
        verify: As httpx: True (also for None), False, an ``ssl.SSLContext``, or the path of a file of certificates.
        cert: As httpx: a client certificate.
        uds: Path of a unix socket to connect to.
        trust_env: Whether to use the environment (proxies, certificate store, ``OLLAMA_API_KEY``).
        follow_redirects: As httpx.
        **options: Further options of ``httpx.AsyncClient``: ``auth``, ``cookies``, ``event_hooks`` ...

    Raises:
        HostError: The host is not a usable address.
        RequestError: Options that cannot be combined.
    """

    # -- generating --

    @overload
    def chat(  # pyright: ignore[reportOverlappingOverload]  (the narrower type is right for what is given)
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[True],
        format: type[ParsedT],
        until: Callable[[ChatResponse], object] | None = None,
        **options: Unpack[_ChatOptions],
    ) -> Stream[ParsedChatResponse[ParsedT]]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[False] = False,
        format: type[ParsedT],
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ParsedChatResponse[ParsedT]]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[True],
        until: Callable[[ChatResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_ChatOptions],
    ) -> Stream[ChatResponse]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[False] = False,
        format: Format = None,
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: bool,
        until: Callable[[ChatResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse]: ...

    # For mypy a Stream of the narrower type is no Stream of the wider.
    @deferred(ChatMerge)  # type: ignore[misc]
    def chat(
        self,
        model: str = "",
        messages: Messages = None,
        *,
        tools: Sequence[Any] | None = None,
        stream: bool = False,
        think: bool | str | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        format: Format = None,
        options: OptionsLike = None,
        keep_alive: KeepAlive = None,
        truncate: bool | None = None,
        shift: bool | None = None,
        debug_render_only: bool | None = None,
        on_truncation: OnTruncation = "ignore",
        preflight: bool = False,
        recover: bool | None = None,
        until: Callable[[ChatResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse]:
        """Let a model answer a chat.

        Args:
            model: Name of the model.
            messages: The chat so far; a ``str`` is one message of the user.
            tools: Tools that the model may call: functions (their docstrings say what they do), pydantic model classes,
                or JSON schemas as dicts.
            stream: Whether to return the answer as a ``Stream``.
            think: Whether, or how hard (``"low"``, ``"medium"``, ``"high"``, ``"max"``), to think before answering.
            logprobs: Whether to return log probabilities.
            top_logprobs: Number of most likely tokens to return for each token, 0 to 20.
            format: ``"json"``, or what the answer must be: a JSON schema, or a pydantic model class, an instance of
                which is then ``parsed`` of the answer.
            options: Options of the model: ``Options`` or a dict such as ``{"temperature": 0}``.
            keep_alive: How long the model stays loaded: seconds, a timedelta, or a text such as ``"5m"``; negative is
                for ever, 0 unloads it after this.
            truncate: Whether a prompt that is too long is cut (the server's default) or refused.
            shift: Whether old tokens make room when the context is full (the server's default), or the answer ends.
            debug_render_only: Whether to return, in ``debug_info``, what the model would read, and not run it.
            on_truncation: What to do when the prompt is longer than the context: ``"ignore"`` lets the server cut it,
                ``"warn"`` gives a ``TruncationWarning`` and lets it, ``"raise"`` raises ``ContextLengthError``.
            preflight: Whether to raise ``CapabilityError``, and send nothing, if the model or the server lacks what the
                call needs. The server is asked once a model and client.
            recover: What to do when the limit of the first chunk has passed: ``False`` asks the server whether the
                model hangs, and then raises ``HungModel``; ``True`` also unloads it and asks again, once; ``None`` does
                neither.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.
            until: With ``stream=True``: called with the merged answer after each chunk; when it returns something
                true, the answer is aborted and the stream ends normally, with the outcome ``"until"``.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/chat``
        """
        body = {
            "model": model_name(model),
            "stream": checked_stream(stream),
            "messages": encode_messages(messages),
            "tools": encode_tools(tools, legacy=self._compat),
            **encoded(
                ("think", think),
                ("format", format),
                ("options", options),
                ("keep_alive", keep_alive),
                ("logprobs", logprobs),
                ("truncate", truncate),
                ("shift", shift),
                ("top_logprobs", top_logprobs),
                ("debug_render_only", debug_render_only),
            ),
        }
        stages = _around(on_truncation, call, preflight=preflight, recover=recover)
        form = format_model(format)
        if stream:
            return self._answer(ChatMerge(), "/api/chat", body, call, until, response_model=form, stages=stages)
        _only_for_streams(until)
        if recover is not None:
            return self._whole(ChatMerge(), "/api/chat", body, call, response_model=form, stages=stages)
        return self._request(
            ChatResponse, "POST", "/api/chat", body, call, response_model=form, stages=stages(self, body)
        )

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  (the narrower type is right for what is given)
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[True],
        format: type[ParsedT],
        until: Callable[[GenerateResponse], object] | None = None,
        **options: Unpack[_GenerateOptions],
    ) -> Stream[ParsedGenerateResponse[ParsedT]]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[False] = False,
        format: type[ParsedT],
        **options: Unpack[_GenerateOptions],
    ) -> Coroutine[Any, Any, ParsedGenerateResponse[ParsedT]]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[True],
        until: Callable[[GenerateResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_GenerateOptions],
    ) -> Stream[GenerateResponse]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[False] = False,
        format: Format = None,
        **options: Unpack[_GenerateOptions],
    ) -> Coroutine[Any, Any, GenerateResponse]: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: bool,
        until: Callable[[GenerateResponse], object] | None = None,
        format: Format = None,
        **options: Unpack[_GenerateOptions],
    ) -> Coroutine[Any, Any, GenerateResponse] | Stream[GenerateResponse]: ...

    # For mypy a Stream of the narrower type is no Stream of the wider.
    @deferred(GenerateMerge)  # type: ignore[misc]
    def generate(
        self,
        model: str = "",
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        context: Sequence[int] | None = None,
        stream: bool = False,
        think: bool | str | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        raw: bool | None = None,
        format: Format = None,
        images: Sequence[ImageLike] | None = None,
        options: OptionsLike = None,
        keep_alive: KeepAlive = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        truncate: bool | None = None,
        shift: bool | None = None,
        debug_render_only: bool | None = None,
        on_truncation: OnTruncation = "ignore",
        preflight: bool = False,
        recover: bool | None = None,
        until: Callable[[GenerateResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, GenerateResponse] | Stream[GenerateResponse]:
        """Have a model complete a prompt.

        Args:
            model: Name of the model.
            prompt: The prompt; an empty one loads the model.
            suffix: What comes after the answer, for models that can insert.
            system: System prompt, instead of the model's own.
            template: Prompt template, instead of the model's own.
            context: The ``context`` of an earlier answer (deprecated by the server).
            stream: Whether to return the answer as a ``Stream``.
            think: Whether, or how hard (``"low"``, ``"medium"``, ``"high"``, ``"max"``), to think before answering.
            logprobs: Whether to return log probabilities.
            top_logprobs: Number of most likely tokens to return for each token, 0 to 20.
            raw: Whether the prompt is used as it is, without a template.
            format: ``"json"``, or what the answer must be: a JSON schema, or a pydantic model class, an instance of
                which is then ``parsed`` of the answer.
            images: Images: each a path, bytes, base64, or an open file; files are read in a worker thread.
            options: Options of the model: ``Options`` or a dict such as ``{"temperature": 0}``.
            keep_alive: How long the model stays loaded: seconds, a timedelta, or a text such as ``"5m"``; negative is
                for ever, 0 unloads it after this.
            width: Width of the image to make, in pixels (image models; experimental).
            height: Height of the image to make, in pixels.
            steps: Steps of making the image.
            truncate: Whether a prompt that is too long is cut (the server's default) or refused.
            shift: Whether old tokens make room when the context is full (the server's default), or the answer ends.
            debug_render_only: Whether to return, in ``debug_info``, what the model would read, and not run it.
            on_truncation: As in ``chat``.
            preflight: As in ``chat``.
            recover: As in ``chat``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.
            until: As in ``chat``.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/generate``
        """
        body = {
            "model": model_name(model),
            "stream": checked_stream(stream),
            **encoded(
                ("prompt", prompt),
                ("suffix", suffix),
                ("system", system),
                ("template", template),
                ("context", context),
                ("think", think),
                ("format", format),
                ("images", images),
                ("options", options),
                ("keep_alive", keep_alive),
                ("logprobs", logprobs),
                ("raw", raw),
                ("truncate", truncate),
                ("shift", shift),
                ("top_logprobs", top_logprobs),
                ("width", width),
                ("height", height),
                ("steps", steps),
                ("debug_render_only", debug_render_only),
            ),
        }
        stages = _around(on_truncation, call, preflight=preflight, recover=recover)
        form = format_model(format)
        if stream:
            return self._answer(GenerateMerge(), "/api/generate", body, call, until, response_model=form, stages=stages)
        _only_for_streams(until)
        if recover is not None:
            return self._whole(GenerateMerge(), "/api/generate", body, call, response_model=form, stages=stages)
        return self._request(
            GenerateResponse, "POST", "/api/generate", body, call, response_model=form, stages=stages(self, body)
        )

    def _answer(
        self,
        merge: Merge[ChunkT],
        path: str,
        body: dict[str, Any],
        call: CallOptions,
        until: Callable[[ChunkT], object] | None,
        *,
        response_model: type[BaseModel] | None,
        stages: Stages,
    ) -> Stream[ChunkT]:
        """Return the stream of an answer, which can be continued."""
        stream = self._stream(merge, path, body, call, until, response_model=response_model, stages=stages(self, body))
        stream.continuation = Continuation(self, path, body, call, stages, response_model)
        return stream

    def _whole(
        self,
        merge: Merge[ChunkT],
        path: str,
        body: dict[str, Any],
        call: CallOptions,
        *,
        response_model: type[BaseModel] | None,
        stages: Stages,
    ) -> Coroutine[Any, Any, ChunkT]:
        """Return a whole answer that streams inside: else the limit of the first chunk would be one of the answer."""
        body["stream"] = True
        return self._stream(
            merge, path, body, call, response_model=response_model, strict=True, stages=stages(self, body)
        ).collect()

    @overload
    async def continue_from(
        self,
        partial: ChatResponse | str | None,
        messages: Messages,
        *,
        model: str = "",
        **options: Unpack[_ChatOptions],
    ) -> Stream[ChatResponse]: ...

    @overload
    async def continue_from(
        self,
        partial: GenerateResponse | str | None,
        *,
        prompt: str,
        model: str = "",
        **options: Unpack[_GenerateOptions],
    ) -> Stream[GenerateResponse]: ...

    async def continue_from(
        self, partial: Partial, messages: Messages = None, *, prompt: str | None = None, model: str = "", **options: Any
    ) -> Stream[Any]:
        """Go on with an answer that ended early, also in another process (docs/continue.md).

        Args:
            partial: The partial answer: ``partial`` of an error, ``response`` of a stream, or its text; ``None`` asks
                anew.
            messages: The chat that it answers; else
            prompt: the prompt that it completes.
            model: Name of the model; by default that of the partial answer.
            **options: As ``chat`` or ``generate``; those of the first call.

        Returns:
            A stream of new chunks, whose ``response`` and ``text`` have the partial answer as well.

        Raises:
            CannotContinue: The partial answer cannot be continued; the text says why.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/chat`` or ``POST /api/generate``
        """
        hide(options)
        if (messages is None) == (prompt is None):
            raise RequestError("continue_from: give either messages or prompt=, as in the first call")
        name = model or (not isinstance(partial, str) and partial is not None and partial.model) or ""
        ask = cast("Callable[..., Stream[Any]]", self.generate if messages is None else self.chat)
        stream = ask(name, prompt if messages is None else messages, stream=True, **options)
        if stream.continuation is None:
            # Its options are wrong, which it says when it is opened.
            await stream
            raise AssertionError
        return await stream.continuation.stream(
            _partial_of(partial, name, chat=messages is not None), token=None, until=None
        )

    async def embed(
        self,
        model: str = "",
        input: str | Sequence[str] = "",
        truncate: bool | None = None,
        options: OptionsLike = None,
        keep_alive: KeepAlive = None,
        dimensions: int | None = None,
        *,
        preflight: bool = False,
        **call: Unpack[CallOptions],
    ) -> EmbedResponse:
        """Turn texts into vectors.

        Args:
            model: Name of the model.
            input: A text, or several.
            truncate: Whether a text that is too long is cut (the server's default) or refused.
            options: Options of the model.
            keep_alive: As in ``chat``.
            dimensions: Length of the vectors, if they shall be cut.
            preflight: As in ``chat``: whether the model is made to embed.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/embed``
        """
        hide(call)
        body = {
            "model": model_name(model),
            "input": encode_input(input),
            **encoded(
                ("options", options), ("keep_alive", keep_alive), ("truncate", truncate), ("dimensions", dimensions)
            ),
        }
        if self._holds:
            self._complete(body)
        stages = () if preflight is False else preflight_stages(self, preflight, body, call)
        reply = await self._request(EmbedResponse, "POST", "/api/embed", body, call, stages=stages)
        _check_vectors(reply, body["input"])
        return reply

    async def embeddings(
        self,
        model: str = "",
        prompt: str | None = None,
        options: OptionsLike = None,
        keep_alive: KeepAlive = None,
        **call: Unpack[CallOptions],
    ) -> EmbeddingsResponse:
        """Turn one text into a vector that is not normalised; the server has replaced this by ``embed``.

        Args:
            model: Name of the model.
            prompt: The text.
            options: Options of the model.
            keep_alive: As in ``chat``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/embeddings``
        """
        hide(call)
        body = {
            "model": model_name(model),
            **encoded(("prompt", prompt), ("options", options), ("keep_alive", keep_alive)),
        }
        if self._holds:
            self._complete(body)
        return await self._request(EmbeddingsResponse, "POST", "/api/embeddings", body, call)

    def loaded(
        self,
        model: str,
        *,
        num_ctx: int | None = None,
        keep_alive: KeepAlive = "5m",
        min_vram_share: float | None = None,
        auto_pull: bool = False,
        on_progress: Callable[[ProgressResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Loaded:
        """Keep a model loaded while a block runs: ``async with client.loaded("llama3.2", num_ctx=8192) as model:``.

        Calls of this client in the block that name the model without ``num_ctx`` get that of the block. Otherwise the
        server would load the model again. The last block that keeps a model unloads it, if one of them has loaded it
        and no call of this client is getting an answer from it.

        Args:
            model: Name of the model.
            num_ctx: Tokens of context to load it with; by default the server's.
            keep_alive: How long the server keeps the model without a sign of this program, as in ``chat``. While the
                block runs the time is renewed, so a program that dies leaves the model for this long at most.
            min_vram_share: How much of it must be on the GPU, 0 to 1.
            auto_pull: Whether a model that the server does not have is pulled first.
            on_progress: Called in the event loop with each step of that.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=``; the timeout is for all until the block begins.

        Returns:
            What the block is entered with; there it gives a ``LoadedModel``: how the server lists the model.

        Raises:
            RequestError: A parameter is not allowed, or another block keeps the model with another ``num_ctx``.
            NotFoundError: On entering: the server does not have the model.
            ModelNotReady: On entering: it has less context, or less of it is on the GPU, than was asked for.
            OllamaError: On entering: see the tree in docs/errors.md.

        Cancellation: closes the connection at once; what the block has loaded is unloaded.

        Server: ``GET /api/ps``, ``POST /api/generate``, ``POST /api/pull``
        """
        hide(call)
        return Loaded(
            self,
            model,
            num_ctx=num_ctx,
            keep_alive=keep_alive,
            min_vram_share=min_vram_share,
            auto_pull=auto_pull,
            on_progress=on_progress,
            call=call,
        )

    async def require(
        self, model: str, *capabilities: str, version: str | None = None, **call: Unpack[CallOptions]
    ) -> None:
        """Make sure that a model can do something; what it can do is kept, so that the server is asked once.

        Args:
            model: Name of the model.
            *capabilities: What it must be able to do: ``"completion"``, ``"tools"``, ``"vision"``, ``"thinking"``,
                ``"insert"``, ``"embedding"``, or another word that the server uses.
            version: The version that the server must have at least, such as ``"0.12"``. One that was built without a
                version (``0.0.0``) passes.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            CapabilityError: The model, or the version of the server, does not have it.
            NotFoundError: The server does not have the model.
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/show``, ``GET /api/version``
        """
        hide(call)
        await require(self, model_name(model), capabilities, version, call)

    async def systemone(
        self,
        model: str,
        state: systemone_types.SystemOneContent,
        questions: Mapping[str, systemone_types.SystemOneQuestion | Mapping[str, Any] | Dumpable],
        keep_alive: KeepAlive = None,
        **call: Unpack[CallOptions],
    ) -> systemone_types.SystemOneResponse:
        """Have a System One model answer questions by a choice, a yes or no, or a score.

        Args:
            model: Name of the model.
            state: What the questions are about: a text, or JSON.
            questions: The questions by names that you choose: dicts, ``SystemOneChoiceQuestion`` and its sisters.
            keep_alive: As in ``chat``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /v1/systemone`` (from 0.35 on)
        """
        hide(call)
        # Not at the top: see the package's __getattr__.
        try:
            given = {"model": model_name(model), "state": plain(state), "questions": plain(questions)}
            request = systemone_types.SystemOneRequest.model_validate({**given, **encoded(("keep_alive", keep_alive))})
        except ValidationError as exc:
            raise RequestError(f"systemone: {first_error(exc)}") from exc
        # Of a choice without a description the null says that its name describes it.
        body = request.model_dump(exclude_none=True)
        return await self._request(systemone_types.SystemOneResponse, "POST", "/v1/systemone", body, call)


def _around(on_truncation: OnTruncation, call: CallOptions, *, preflight: bool, recover: bool | None) -> Stages:
    """Return what makes the stages of a call from its client and its body, and completes the body."""
    # Each open stream holds it: what most have is one for all.
    if on_truncation == "ignore" and preflight is False and recover is None:
        return _plain

    def stages(client: ModelManagement, body: dict[str, Any]) -> Sequence[Stage]:
        return [
            *_plain(client, body),
            *preflight_stages(client, preflight, body, call),
            *truncation_stages(client, on_truncation, body),
            *hang_stages(client, recover, body, call),
        ]

    return stages


def _plain(client: ModelManagement, body: dict[str, Any]) -> Sequence[Stage]:
    if client._holds:  # noqa: SLF001  (that of the client whose methods are in this module)
        client._complete(body)  # noqa: SLF001  (as above)
    return ()


def _partial_of(partial: Partial, model: str, *, chat: bool) -> ChatResponse | GenerateResponse | None:
    if isinstance(partial, str):
        message = Message(role="assistant", content=partial)
        return ChatResponse(model=model, message=message) if chat else GenerateResponse(model=model, response=partial)
    if partial is not None and not isinstance(partial, ChatResponse if chat else GenerateResponse):
        kind = type(cast("object", partial)).__name__
        raise RequestError(f"partial={kind}: give a {'ChatResponse' if chat else 'GenerateResponse'}, or its text")
    return partial


def _only_for_streams(until: object) -> None:
    if until is not None:
        raise RequestError("until= needs stream=True")


def _check_vectors(reply: EmbedResponse, texts: str | list[str]) -> None:
    """Refuse an answer that has not one vector for each text: each would be taken for that of another text."""
    count = 1 if isinstance(texts, str) else len(texts)
    came = len(reply.embeddings)
    # Without a text the model is only loaded.
    if came != count and (texts != "" or came):
        raise ProtocolError(f"the server sent {came} vectors for {count} texts", reply)
    empty = next((at for at, vector in enumerate(reply.embeddings) if not vector), None)
    if empty is not None:
        raise ProtocolError(f"the server sent an empty vector for input[{empty}]", reply)
