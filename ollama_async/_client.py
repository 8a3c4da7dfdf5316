"""``AsyncClient``: one method an endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, overload

from ._errors import RequestError
from ._input import encode_images, encode_messages, encode_options, encode_tools, model_name
from ._manage import ModelManagement
from ._merge import ChatMerge, GenerateMerge
from ._session import CallOptions
from ._types import ChatResponse, EmbeddingsResponse, EmbedResponse, GenerateResponse, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from pydantic import BaseModel

    from ._stream import Stream

    Messages: TypeAlias = str | Sequence[Mapping[str, Any] | Message] | None
    Options: TypeAlias = Mapping[str, Any] | BaseModel | None

__all__ = ["AsyncClient"]


class _AnswerOptions(CallOptions, total=False):
    """What ``chat`` and ``generate`` have in common; described there."""

    think: bool | str | None
    logprobs: bool | None
    top_logprobs: int | None
    format: str | dict[str, Any] | None
    options: Options
    keep_alive: float | str | None


class _ChatOptions(_AnswerOptions, total=False):
    tools: Sequence[Any] | None


class _GenerateOptions(_AnswerOptions, total=False):
    system: str | None
    template: str | None
    context: Sequence[int] | None
    raw: bool | None
    images: Sequence[str | bytes] | None


class AsyncClient(ModelManagement):
    """A client of an Ollama server, all of whose calls can be aborted.

    A client may be used from several tasks at once, and in several event loops one after the other. Close it with
    ``await client.close()`` or ``async with``; what is open when its event loop ends is closed then.

    Without ``stream=True`` a call is a coroutine. With it, it is a ``Stream``, and nothing is sent before that is
    iterated, awaited or entered. Every call takes ``token=`` (a ``CancelToken``), ``timeout=`` (``Timeouts`` or a
    number of seconds for the whole call; ``None`` for no limit) and ``headers=``.

    Args:
        host: Address of the server, as in ``OLLAMA_HOST``, which is used when none is given; by default
            ``http://127.0.0.1:11434``.
        headers: Headers for every request; they go before the client's own.
        timeout: Default for every call.
        token: A token that every call is under, besides its own.
        strict: Whether a stream that ends without its last chunk raises ``StreamTruncated``.
        max_line_bytes: How long one line of a stream may be.
        transport: An httpx transport to use in place of ``DirectTransport``.
        http_client: An ``httpx.AsyncClient`` to use; it is not closed with this client.
        proxy: URL of a proxy. Without it those of the environment are followed, but never for this machine.
        verify: As httpx: True, False, or an ``ssl.SSLContext``.
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
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[True],
        until: Callable[[ChatResponse], object] | None = None,
        **options: Unpack[_ChatOptions],
    ) -> Stream[ChatResponse]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse]: ...

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
        format: str | dict[str, Any] | None = None,
        options: Options = None,
        keep_alive: float | str | None = None,
        until: Callable[[ChatResponse], object] | None = None,
        **call: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse]:
        """Have a model answer a chat.

        Args:
            model: Name of the model.
            messages: The chat so far; a ``str`` is one message of the user.
            tools: Tools that the model may call, as JSON schemas.
            stream: Whether to return the answer as a ``Stream``.
            think: Whether, or how hard (``"low"``, ``"medium"``, ``"high"``), to think before answering.
            logprobs: Whether to return log probabilities.
            top_logprobs: Number of most likely tokens to return for each token, 0 to 20.
            format: ``"json"``, or a JSON schema that the answer must follow.
            options: Options of the model, such as ``{"temperature": 0}``.
            keep_alive: How long the model stays loaded: seconds, or a text such as ``"5m"``; 0 unloads it after this.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.
            until: With ``stream=True``: called with the merged answer after each chunk; when it returns something
                true, the answer is aborted and the stream ends normally, with the outcome ``"until"``.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/chat``
        """
        body = {
            "model": model_name(model),
            "stream": stream,
            "messages": encode_messages(messages),
            "tools": encode_tools(tools),
            "think": think,
            "logprobs": logprobs,
            "top_logprobs": top_logprobs,
            "format": format,
            "options": encode_options(options),
            "keep_alive": keep_alive,
        }
        if stream:
            return self._stream(ChatMerge(), "/api/chat", body, call, until)
        _only_for_streams(until)
        return self._request(ChatResponse, "POST", "/api/chat", body, call)

    @overload
    def generate(
        self,
        model: str,
        prompt: str | None = None,
        suffix: str | None = None,
        *,
        stream: Literal[True],
        until: Callable[[GenerateResponse], object] | None = None,
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
        **options: Unpack[_GenerateOptions],
    ) -> Coroutine[Any, Any, GenerateResponse]: ...

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
        format: str | dict[str, Any] | None = None,
        images: Sequence[str | bytes] | None = None,
        options: Options = None,
        keep_alive: float | str | None = None,
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
            think: Whether, or how hard (``"low"``, ``"medium"``, ``"high"``), to think before answering.
            logprobs: Whether to return log probabilities.
            top_logprobs: Number of most likely tokens to return for each token, 0 to 20.
            raw: Whether the prompt is used as it is, without a template.
            format: ``"json"``, or a JSON schema that the answer must follow.
            images: Images, as bytes or base64.
            options: Options of the model, such as ``{"temperature": 0}``.
            keep_alive: How long the model stays loaded: seconds, or a text such as ``"5m"``; 0 unloads it after this.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.
            until: As in ``chat``.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once, so that the server stops.

        Server: ``POST /api/generate``
        """
        body = {
            "model": model_name(model),
            "stream": stream,
            "prompt": prompt,
            "suffix": suffix,
            "system": system,
            "template": template,
            "context": context,
            "think": think,
            "logprobs": logprobs,
            "top_logprobs": top_logprobs,
            "raw": raw,
            "format": format,
            "images": encode_images(images),
            "options": encode_options(options),
            "keep_alive": keep_alive,
        }
        if stream:
            return self._stream(GenerateMerge(), "/api/generate", body, call, until)
        _only_for_streams(until)
        return self._request(GenerateResponse, "POST", "/api/generate", body, call)

    async def embed(
        self,
        model: str = "",
        input: str | Sequence[str] = "",
        truncate: bool | None = None,
        options: Options = None,
        keep_alive: float | str | None = None,
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
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/embed``
        """
        body = {
            "model": model_name(model),
            "input": input,
            "truncate": truncate,
            "options": encode_options(options),
            "keep_alive": keep_alive,
            "dimensions": dimensions,
        }
        return await self._request(EmbedResponse, "POST", "/api/embed", body, call)

    async def embeddings(
        self,
        model: str = "",
        prompt: str | None = None,
        options: Options = None,
        keep_alive: float | str | None = None,
        **call: Unpack[CallOptions],
    ) -> EmbeddingsResponse:
        """Turn one text into a vector that is not normalised; the server has replaced this by ``embed``.

        Args:
            model: Name of the model.
            prompt: The text.
            options: Options of the model.
            keep_alive: As in ``chat``.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/embeddings``
        """
        body = {
            "model": model_name(model),
            "prompt": prompt,
            "options": encode_options(options),
            "keep_alive": keep_alive,
        }
        return await self._request(EmbeddingsResponse, "POST", "/api/embeddings", body, call)

    async def load(
        self, model: str, keep_alive: float | str | None = None, **call: Unpack[CallOptions]
    ) -> GenerateResponse:
        """Load a model, so that the next answer does not wait for that.

        Args:
            model: Name of the model.
            keep_alive: How long it stays loaded: seconds, or a text such as ``"5m"``; negative for ever.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once; the server then gives the load up.

        Server: ``POST /api/generate`` without a prompt
        """
        body = {"model": model_name(model), "stream": False, "keep_alive": keep_alive}
        return await self._request(GenerateResponse, "POST", "/api/generate", body, call)

    async def unload(self, model: str, **call: Unpack[CallOptions]) -> GenerateResponse:
        """Unload a model as soon as the answers that it is giving are done; those are not ended.

        Args:
            model: Name of the model.
            **call: ``token=``, ``timeout=``, ``headers=`` of this call.

        Raises:
            OllamaError: See the tree in the reference.

        Cancellation: closes the connection at once.

        Server: ``POST /api/generate`` without a prompt, with ``keep_alive`` 0
        """
        return await self.load(model, 0, **call)


def _only_for_streams(until: object) -> None:
    if until is not None:
        raise RequestError("until= needs stream=True")
