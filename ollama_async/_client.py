"""``AsyncClient``: one method an endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeVar, Unpack, overload

from pydantic import BaseModel, ValidationError

from ._call.stream import Stream
from ._errors import ProtocolError, RequestError
from ._manage import ModelManagement
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
from ._model.options import Options
from ._model.tools import encode_tools
from ._model.types import ChatResponse, Dumpable, EmbeddingsResponse, EmbedResponse, GenerateResponse, Message, plain
from ._session import CallOptions, deferred, hide

if TYPE_CHECKING:
    from ._model import systemone as systemone_types
    from ._model.types import ParsedChatResponse, ParsedGenerateResponse
else:
    systemone_types = Later("systemone")

Messages: TypeAlias = str | Sequence[Mapping[str, Any] | Message | Dumpable] | None
OptionsLike: TypeAlias = Mapping[str, Any] | Options | Dumpable | None
Format: TypeAlias = str | Mapping[str, Any] | Dumpable | type[BaseModel] | None
KeepAlive: TypeAlias = float | str | timedelta | None
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

    A client may be used from several tasks at once, and in several event loops one after the other. Close it with
    ``await client.close()`` or ``async with``; what is open when its event loop ends is closed then.

    Without ``stream=True`` a call is a coroutine. With it, it is a ``Stream``, and nothing is sent before that is
    iterated, awaited or entered. Every call takes ``token=`` (a ``CancelToken``), ``timeout=`` (``Timeouts``, an
    ``httpx.Timeout``, or a number of seconds for the whole call; ``None`` for no limit) and ``headers=``.

    Args:
        host: Address of the server, as in ``OLLAMA_HOST``, which is used when none is given; by default
            ``http://127.0.0.1:11434``.
        headers: Headers for every request; they go before the client's own.
        timeout: Default for every call.
        token: A token that every call is under, besides its own.
        retries: How often a call is sent again when it fails before the first byte of its answer: no connection, or the
            statuses 429, 502, 503 and 504; with growing pauses, or after the time that the server asks for.
        compat: Whether to do as ollama-python where this library is safer or better by default; the migration guide
            lists what that is.
        strict: Whether a stream that ends without its last chunk raises ``StreamTruncated``.
        max_line_bytes: How long one line of a stream may be.
        transport: An httpx transport to use in place of ``DirectTransport``.
        http_client: An ``httpx.AsyncClient`` to use; it is not closed with this client.
        proxy: URL of a proxy, or an ``httpx.Proxy``. Without it those of the environment are followed, but never for
            this machine.
        verify: As httpx: True (also for None), False, an ``ssl.SSLContext``, or the path of a file of certificates.
        cert: As httpx: a client certificate.
        uds: Path of a unix socket to connect to.
        trust_env: Whether the environment is looked at (proxies, certificate store, ``OLLAMA_API_KEY``).
        follow_redirects: As httpx.
        **options: Further options of ``httpx.AsyncClient``: ``auth``, ``cookies``, ``event_hooks`` ...

    Raises:
        HostError: The host is no usable address.
        RequestError: Options that do not go together.
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
        until: Callable[[ChatResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse]:
        """Have a model answer a chat.

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
        hide(call)
        body = {
            "model": model_name(model),
            "stream": checked_stream(stream),
            "messages": encode_messages(messages),
            "tools": encode_tools(tools, legacy=self._compat),
            **encoded(
                think=think,
                format=format,
                options=options,
                keep_alive=keep_alive,
                logprobs=logprobs,
                truncate=truncate,
                shift=shift,
                top_logprobs=top_logprobs,
                debug_render_only=debug_render_only,
            ),
        }
        form = format_model(format)
        if stream:
            return self._stream(ChatMerge(), "/api/chat", body, call, until, response_model=form)
        _only_for_streams(until)
        return self._request(ChatResponse, "POST", "/api/chat", body, call, response_model=form)

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
        until: Callable[[GenerateResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, GenerateResponse] | Stream[GenerateResponse]:
        """Have a model complete a prompt.

        Args:
            model: Name of the model.
            prompt: The prompt; an empty one loads the model.
            suffix: What comes after the answer, for models that can insert.
            system: System prompt, in place of the model's.
            template: Prompt template, in place of the model's.
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
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.
            until: As in ``chat``.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/generate``
        """
        hide(call)
        body = {
            "model": model_name(model),
            "stream": checked_stream(stream),
            **encoded(
                prompt=prompt,
                suffix=suffix,
                system=system,
                template=template,
                context=context,
                think=think,
                format=format,
                images=images,
                options=options,
                keep_alive=keep_alive,
                logprobs=logprobs,
                raw=raw,
                truncate=truncate,
                shift=shift,
                top_logprobs=top_logprobs,
                width=width,
                height=height,
                steps=steps,
                debug_render_only=debug_render_only,
            ),
        }
        form = format_model(format)
        if stream:
            return self._stream(GenerateMerge(), "/api/generate", body, call, until, response_model=form)
        _only_for_streams(until)
        return self._request(GenerateResponse, "POST", "/api/generate", body, call, response_model=form)

    async def embed(
        self,
        model: str = "",
        input: str | Sequence[str] = "",
        truncate: bool | None = None,
        options: OptionsLike = None,
        keep_alive: KeepAlive = None,
        dimensions: int | None = None,
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
            **encoded(options=options, keep_alive=keep_alive, truncate=truncate, dimensions=dimensions),
        }
        reply = await self._request(EmbedResponse, "POST", "/api/embed", body, call)
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
        body = {"model": model_name(model), **encoded(prompt=prompt, options=options, keep_alive=keep_alive)}
        return await self._request(EmbeddingsResponse, "POST", "/api/embeddings", body, call)

    async def load(self, model: str, keep_alive: KeepAlive = None, **call: Unpack[CallOptions]) -> GenerateResponse:
        """Load a model, so that the next answer does not wait for that.

        Args:
            model: Name of the model.
            keep_alive: How long it stays loaded, as in ``chat``.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once; the server then gives the load up.

        Server: ``POST /api/generate`` without a prompt
        """
        hide(call)
        body = {"model": model_name(model), "stream": False, **encoded(keep_alive=keep_alive)}
        return await self._request(GenerateResponse, "POST", "/api/generate", body, call)

    async def unload(self, model: str, **call: Unpack[CallOptions]) -> GenerateResponse:
        """Unload a model as soon as the answers that it is giving are done; those are not ended.

        Args:
            model: Name of the model.
            **call: ``token=``, ``timeout=``, ``headers=``, ``retries=`` of this call.

        Raises:
            OllamaError: See the tree in docs/errors.md.

        Cancellation: closes the connection at once.

        Server: ``POST /api/generate`` without a prompt, with ``keep_alive`` 0
        """
        hide(call)
        return await self.load(model, 0, **call)

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
            questions: The questions by names of your own, as dicts or as ``SystemOneChoiceQuestion`` and its sisters.
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
            request = systemone_types.SystemOneRequest.model_validate({**given, **encoded(keep_alive=keep_alive)})
        except ValidationError as exc:
            raise RequestError(f"systemone: {first_error(exc)}") from exc
        # Of a choice without a description the null says that its name describes it.
        body = request.model_dump(exclude_none=True)
        return await self._request(systemone_types.SystemOneResponse, "POST", "/v1/systemone", body, call)


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
