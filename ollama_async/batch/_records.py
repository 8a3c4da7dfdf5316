"""What an answer, or a failure, looks like in the output of a batch."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, Literal

from ollama_async._errors import OllamaError, ResponseError

from ._items import Item

__all__ = ["Form", "can_pass"]

Embedding = Literal["list", "base64"]

_FIGURES = (
    "done_reason",
    "prompt_eval_count",
    "eval_count",
    "total_duration",
    "load_duration",
    "prompt_eval_duration",
    "eval_duration",
)
_PASSING = {"ConnectError", "NoHost", "ConnectionBroken", "PhaseTimeout", "StreamTruncated", "RateLimitError"}


def can_pass(kind: str, status_code: int | None) -> bool:
    """Whether an error is worth another attempt: it says something of the moment, not of the request."""
    return kind in _PASSING or status_code == 429 or (status_code is not None and status_code >= 500)


class Form:
    """How records are written.

    Args:
        openai: Whether lines are those of OpenAI's batches.
        embedding: How vectors are written: as lists, or as base64 of little-endian 32-bit floats.
    """

    def __init__(self, *, openai: bool, embedding: Embedding) -> None:
        self._openai = openai
        self._embedding = embedding

    def answer(self, item: Item, answer: Any, host: str | None) -> dict[str, Any]:
        """Return the record of an answer; for an embedding, ``answer`` is that of the item's texts alone."""
        if self._openai:
            response = {"status_code": 200, "request_id": item.id, "body": self._openai_body(item, answer)}
            return self._openai_record(item, "ok", response, None)
        return {
            "id": item.id,
            "index": item.index,
            "status": "ok",
            "host": host,
            "model": item.parameters["model"],
            "response": self._response(item, answer),
            "input_hash": item.input_hash,
        }

    def failure(self, item: Item, status: str, error: Exception, host: str | None, attempts: int) -> dict[str, Any]:
        """Return the record of a failure, with the partial answer where there is one."""
        kind = type(error).__name__
        code = error.status_code if isinstance(error, ResponseError) else None
        reached = error.partial if isinstance(error, OllamaError) else None
        partial = None if reached is None else self._response(item, reached)
        if self._openai:
            response = None if code is None else {"status_code": code, "request_id": item.id, "body": None}
            record = self._openai_record(item, status, response, {"code": kind, "message": str(error)})
            return record | {"partial": partial, "attempts": attempts}
        return {
            "id": item.id,
            "index": item.index,
            "status": status,
            "host": host,
            "model": item.parameters["model"],
            "error": {"type": kind, "text": str(error), "status_code": code},
            "partial": partial,
            "attempts": attempts,
            "input_hash": item.input_hash,
        }

    def _response(self, item: Item, answer: Any) -> dict[str, Any]:
        if item.kind == "embed":
            vectors = [self._vector(vector) for vector in answer.embeddings]
            single = isinstance(item.parameters["input"], str)
            response: dict[str, Any] = {"embedding": vectors[0]} if single else {"embeddings": vectors}
        elif item.kind == "chat":
            message = answer.message
            response = {"text": message.content or ""}
            if message.thinking:
                response["thinking"] = message.thinking
            if message.tool_calls:
                response["tool_calls"] = [
                    call.model_dump(mode="json", exclude_none=True) for call in message.tool_calls
                ]
        else:
            response = {"text": answer.response or ""}
            if answer.thinking:
                response["thinking"] = answer.thinking
        if getattr(answer, "logprobs", None):
            response["logprobs"] = [each.model_dump(mode="json", exclude_none=True) for each in answer.logprobs]
        for name in _FIGURES:
            value = getattr(answer, name, None)
            if value is not None:
                response[name] = value
        return response

    def _vector(self, vector: Sequence[float]) -> Any:
        if self._embedding == "list":
            return list(vector)
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    # -- OpenAI --

    def _openai_record(self, item: Item, status: str, response: Any, error: Any) -> dict[str, Any]:
        return {
            "id": f"batch_req_{item.input_hash}",
            "custom_id": item.id,
            "response": response,
            "error": error,
            # Beside what OpenAI has there: what the batch needs to resume.
            "index": item.index,
            "status": status,
            "input_hash": item.input_hash,
        }

    def _openai_body(self, item: Item, answer: Any) -> dict[str, Any]:
        prompt, completion = answer.get("prompt_eval_count") or 0, answer.get("eval_count") or 0
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        head = {"id": f"chatcmpl-{item.input_hash}", "model": item.parameters["model"], "usage": usage}
        if item.kind == "embed":
            rows = [
                {"object": "embedding", "index": index, "embedding": self._vector(vector)}
                for index, vector in enumerate(answer.embeddings)
            ]
            return head | {"object": "list", "data": rows}
        finish = "length" if answer.get("done_reason") == "length" else "stop"
        if item.kind == "generate":
            choice: dict[str, Any] = {"index": 0, "text": answer.response or "", "finish_reason": finish}
            return head | {"object": "text_completion", "choices": [choice]}
        message = {"role": "assistant", "content": answer.message.content or ""}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        calls = self._response(item, answer).get("tool_calls")
        if calls:
            message["tool_calls"] = calls
            choice["finish_reason"] = "tool_calls"
        return head | {"object": "chat.completion", "choices": [choice]}
