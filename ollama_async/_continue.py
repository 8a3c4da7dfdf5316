"""Continuing an answer that ended early: the model reads what it has said already, and goes on from there.

In a chat the partial answer is the last message, of the assistant. In a completion it stands behind the prompt, which
is sent as the model reads it (``raw``). Both are checked before the model runs: a template that ends the message after
the partial answer would have the model begin a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ._errors import CannotContinue
from ._model.merge import ChatMerge, GenerateMerge
from ._model.types import ChatResponse, GenerateResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import BaseModel

    from ._call.staged import Stage
    from ._call.stream import Stream
    from ._cancel import CancelToken
    from ._manage import ModelManagement
    from ._session import CallOptions

    # Makes the stages of a call from its client and its body, and completes the body.
    Stages: TypeAlias = Callable[[ModelManagement, dict[str, Any]], Sequence[Stage]]

Partial: TypeAlias = ChatResponse | GenerateResponse | str | None


class Continuation:
    """What it takes to go on with a stream of ``chat`` or ``generate``.

    Args:
        client: The client to ask with.
        path: The endpoint.
        body: The body of the first request.
        call: Options of the first call.
        stages: Returns what the call does around its requests.
        response_model: What the answer's text is to be, if that was said.
    """

    __slots__ = ("_body", "_call", "_client", "_path", "_response_model", "_stages")

    def __init__(
        self,
        client: ModelManagement,
        path: str,
        body: dict[str, Any],
        call: CallOptions,
        stages: Stages,
        response_model: type[BaseModel] | None,
    ) -> None:
        self._client = client
        self._path = path
        self._body = body
        # As pairs, since each open stream holds this: a dict of one option is nearly twice as large.
        self._call = tuple(call.items())
        self._stages = stages
        self._response_model = response_model

    async def stream(
        self, partial: Any, *, token: CancelToken | None = None, until: Callable[[Any], object] | None = None
    ) -> Stream[Any]:
        """Return a stream that goes on behind a partial answer, and whose ``response`` has both.

        Raises:
            CannotContinue: That cannot be done; the text says why.
            OllamaError: As ``chat`` does.

        Cancellation: closes the connection at once.
        """
        call = cast("CallOptions", dict(self._call))
        if token is not None:
            call["token"] = token
        chat = self._path == "/api/chat"
        merge: ChatMerge | GenerateMerge = ChatMerge() if chat else GenerateMerge()
        body = dict(self._body)
        # Where nothing was said there is nothing to go on from: it is asked again.
        if partial is not None and _has_begun(partial):
            self._check(partial)
            continued = await (self._chat(partial, call) if chat else self._generate(partial, call))
            before, changes = continued
            merge = ChatMerge(cast("ChatResponse", before)) if chat else GenerateMerge(cast("GenerateResponse", before))
            body |= changes
        stages = self._stages(self._client, body)
        stream: Stream[Any] = self._client._stream(  # noqa: SLF001  (a part of the client, in a module of its own)
            cast("Any", merge), self._path, body, call, until, response_model=self._response_model, stages=stages
        )
        stream.continuation = self
        return stream

    def _check(self, partial: ChatResponse | GenerateResponse) -> None:
        part = partial.message if isinstance(partial, ChatResponse) else partial
        if partial.is_whole:
            flaw = "it is complete"
        elif partial.is_load:
            flaw = "it is none: the model was only loaded"
        elif part.tool_calls:
            flaw = "it has called tools; send their results as messages, and ask again"
        elif not partial.text:
            flaw = "the model was still thinking, and no server takes up a thought; ask again"
        elif self._body.get("format") is not None:
            flaw = "format= would have the model begin the JSON text anew; ask again"
        elif isinstance(partial, GenerateResponse) and part.thinking:
            flaw = "a prompt has no place for the model's thinking; use chat"
        elif isinstance(partial, GenerateResponse) and self._body.get("images"):
            flaw = "a raw prompt does not say where its images are; use chat"
        else:
            return
        raise CannotContinue(f"the answer cannot be continued: {flaw}", partial)

    async def _chat(self, partial: ChatResponse, call: CallOptions) -> tuple[ChatResponse, dict[str, Any]]:
        messages = list(self._body["messages"])
        # A caller may have begun the answer.
        begun = messages.pop() if messages and messages[-1].get("role") == "assistant" else {"role": "assistant"}
        last = {**begun, "content": (begun.get("content") or "") + partial.text}
        if partial.message.thinking:
            last["thinking"] = partial.message.thinking
        changes = {"messages": [*messages, last]}
        read = await self._rendered(ChatResponse, {**self._body, **changes}, call, partial)
        if read.endswith(last["content"]):
            return partial, changes
        # Some templates trim a message. White space at the end is then left to the model.
        trimmed = partial.text.rstrip()
        if trimmed and read.endswith(trimmed):
            return _with_text(partial, trimmed), changes
        raise CannotContinue(
            f"the answer cannot be continued: the template of {self._body['model']} ends the assistant's message, so "
            "the model would begin a new one; use generate, or a model whose template leaves the last message open",
            partial,
        )

    async def _generate(self, partial: GenerateResponse, call: CallOptions) -> tuple[GenerateResponse, dict[str, Any]]:
        prompt = self._body.get("prompt") or ""
        if not self._body.get("raw"):
            shown = await self._client.show(self._body["model"], **call)
            if shown.parser:
                raise CannotContinue(
                    f"the answer cannot be continued: the server parses the answers of {self._body['model']} "
                    f"({shown.parser}), but not those to a raw prompt; use chat",
                    partial,
                )
            prompt = await self._rendered(GenerateResponse, self._body, call, partial)
        # What they say is in the prompt.
        said = dict.fromkeys(("system", "template", "context", "suffix"))
        return partial, {**said, "prompt": prompt + partial.text, "raw": True}

    async def _rendered(
        self, model: type[Any], body: dict[str, Any], call: CallOptions, partial: ChatResponse | GenerateResponse
    ) -> str:
        """Return what the model would read."""
        # One token at most, if the server does not know the question and answers the prompt.
        options: dict[str, Any] = {**(body.get("options") or {}), "num_predict": 1}
        question: dict[str, Any] = {**body, "stream": False, "options": options, "_debug_render_only": True}
        reply = await self._client._request(model, "POST", self._path, question, call)  # noqa: SLF001  (as above)
        if reply.debug_info is None:
            raise CannotContinue(
                "the answer cannot be continued: the server does not say what the model would read "
                "(debug_render_only): it is old or not an Ollama server, or the model runs in the cloud; ask again",
                partial,
            )
        rendered: str = reply.debug_info.rendered_template
        return rendered


def _has_begun(partial: ChatResponse | GenerateResponse) -> bool:
    part = partial.message if isinstance(partial, ChatResponse) else partial
    return bool(partial.done or partial.text or part.thinking or part.tool_calls)


def _with_text(partial: ChatResponse, text: str) -> ChatResponse:
    return partial.model_copy(update={"message": partial.message.model_copy(update={"content": text})})
