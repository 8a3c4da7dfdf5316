"""OpenTelemetry: a span and metrics for each ``chat``, ``generate``, ``embed`` and ``embeddings``, and for agents.

::

    from ollama_async import telemetry

    telemetry.instrument()      # with the providers that the program has set

The span begins when the request is about to be sent and ends once, however the call ends: at its natural end, by an
abort from any thread, a timeout, a cancelled task, ``break``, ``until=``, an error, or because its stream was dropped.
Prompts and answers are not recorded unless you ask for them.

OpenTelemetry takes locks when a span ends. So a call that ends in a signal handler, in another thread or in garbage
collection leaves that to its event loop's next round; the span's end is the moment at which the outcome was decided.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import __version__
from ._call.observe import set_observer
from ._errors import AbortError, PhaseTimeout, ResponseError
from ._extras import check_version

try:
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as _missing:
    raise ImportError(
        f'ollama_async.telemetry needs {_missing.name}; install it with: pip install "ollama-async[otel]"'
    ) from _missing

check_version("ollama_async.telemetry", "opentelemetry-api", (1, 31), "'ollama-async[otel]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from ._call.observe import CallEnd

__all__ = ["CONVENTIONS", "instrument", "uninstrument"]

CONVENTIONS = "semantic-conventions-genai, October 2026"
"""The state of OpenTelemetry's GenAI conventions that the names follow. Nothing in them is stable."""

# Every name that is recorded, so that a new state of the conventions is a change in one place.
_NAMES = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "request_model": "gen_ai.request.model",
    "stream": "gen_ai.request.stream",
    "output_type": "gen_ai.output.type",
    "reasoning_level": "gen_ai.request.reasoning.level",
    "response_model": "gen_ai.response.model",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "first_chunk": "gen_ai.response.time_to_first_chunk",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "agent": "gen_ai.agent.name",
    "tool": "gen_ai.tool.name",
    "tool_type": "gen_ai.tool.type",
    "tool_call_id": "gen_ai.tool.call.id",
    "tool_arguments": "gen_ai.tool.call.arguments",
    "tool_result": "gen_ai.tool.call.result",
    "input_messages": "gen_ai.input.messages",
    "output_messages": "gen_ai.output.messages",
    "system_instructions": "gen_ai.system_instructions",
    "tool_definitions": "gen_ai.tool.definitions",
    "address": "server.address",
    "port": "server.port",
    "error": "error.type",
    # Ours: the conventions have no word for them.
    "outcome": "ollama_async.outcome",
    "abort_reason": "ollama_async.abort.reason",
    "timeout_phase": "ollama_async.timeout.phase",
    "load": "ollama_async.server.load_duration",
    "prompt": "ollama_async.server.prompt_eval_duration",
    "decode": "ollama_async.server.eval_duration",
    "retry": "ollama_async.retry",
    "retry_delay": "ollama_async.retry.delay",
    "retry_number": "ollama_async.retry.number",
    "retries": "ollama_async.retries",
}
# The attributes of a request that are options of the model.
_OPTIONS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "num_predict": "gen_ai.request.max_tokens",
    "stop": "gen_ai.request.stop_sequences",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
_OPERATIONS = {
    "/api/chat": "chat",
    "/api/generate": "text_completion",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
# Name and unit of each metric.
_METRICS = {
    "duration": ("gen_ai.client.inference.duration", "s"),
    "first_chunk": ("gen_ai.client.inference.time_to_first_chunk", "s"),
    "input_tokens": ("gen_ai.client.inference.usage.input_tokens", "{token}"),
    "output_tokens": ("gen_ai.client.inference.usage.output_tokens", "{token}"),
    "invoke_agent": ("gen_ai.invoke_agent.duration", "s"),
    "execute_tool": ("gen_ai.execute_tool.duration", "s"),
    "embeddings_duration": ("gen_ai.client.embeddings.duration", "s"),
    "embeddings_input_tokens": ("gen_ai.client.embeddings.operation.input_tokens", "{token}"),
}
_SECONDS = [0.01 * 2**power for power in range(14)]
_TOKENS = [4**power for power in range(14)]

# A program that leaves its loop or presses Stop has got what it wanted.
_NEVER_ERRORS = {"done", "until", "closed", "stopped"}
_STOPS = {"aborted", "cancelled"}


def instrument(
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    *,
    record_content: bool = False,
    abort_is_error: bool = False,
) -> None:
    """Record the calls of all clients that are made from now on; called again, with the new settings.

    Args:
        tracer_provider: Where spans go; the program's global one by default.
        meter_provider: Where metrics go; the program's global one by default.
        record_content: Whether to record prompts, answers and tools on the spans.
        abort_is_error: Whether a call that was aborted, or whose task was cancelled, has the span status ``ERROR``.
    """
    tracer = trace.get_tracer("ollama_async", __version__, tracer_provider)
    instruments = _Instruments(metrics.get_meter("ollama_async", __version__, meter_provider))

    def observe(url: str, path: str, body: Mapping[str, Any], *, streaming: bool) -> Callable[[], _Observation] | None:
        operation = _OPERATIONS.get(path)
        if operation is None or (operation == "text_completion" and not body.get("prompt")):
            # Without a prompt the model is only loaded, or unloaded.
            return None
        common = _common(operation, url, body)
        asked = {**common, **_request(body, streaming=streaming)}
        if record_content:
            asked.update(_input(body))
        return lambda: _Observation(
            tracer, instruments, common, asked, record_content=record_content, abort_is_error=abort_is_error
        )

    def observe_work(operation: str, name: str | None, details: Mapping[str, Any]) -> _Work:
        common = _common_of_work(operation, name, details)
        asked = {**common, **_details(details, record_content=record_content)}
        settings = {"record_content": record_content, "abort_is_error": abort_is_error}
        return _Work(tracer, instruments, common, asked, name=name, **settings)

    set_observer(observe, observe_work)


def uninstrument() -> None:
    """Record no further calls; running calls are recorded to their end."""
    set_observer(None)


class _Instruments:
    """The metrics, by their names in the table."""

    def __init__(self, meter: metrics.Meter) -> None:
        def histogram(name: str, bounds: Sequence[float]) -> metrics.Histogram:
            full, unit = _METRICS[name]
            return meter.create_histogram(full, unit, explicit_bucket_boundaries_advisory=bounds)

        self.duration = histogram("duration", _SECONDS)
        self.first_chunk = histogram("first_chunk", _SECONDS)
        self.work = {operation: histogram(operation, _SECONDS) for operation in ("invoke_agent", "execute_tool")}
        self.embeddings_duration = histogram("embeddings_duration", _SECONDS)
        self.embeddings_input_tokens = histogram("embeddings_input_tokens", _TOKENS)
        self.input_tokens = meter.create_counter(*_METRICS["input_tokens"])
        self.output_tokens = meter.create_counter(*_METRICS["output_tokens"])


class _Observation:
    """The span and the metrics of one call."""

    _kind = SpanKind.CLIENT

    def __init__(
        self,
        tracer: trace.Tracer,
        instruments: _Instruments,
        common: Mapping[str, Any],
        asked: Mapping[str, Any],
        *,
        name: str | None = None,
        record_content: bool,
        abort_is_error: bool,
    ) -> None:
        self._instruments = instruments
        self._common = dict(common)
        self._record_content = record_content
        self._abort_is_error = abort_is_error
        self._retries = 0
        # That of the attempt that is under way, from the second one on.
        self._retry_span: trace.Span | None = None
        self._tracer = tracer
        self._began_at = time.time_ns()
        operation = common[_NAMES["operation"]]
        title = f"{operation} {name or common.get(_NAMES['request_model'], '')}".rstrip()
        self._span = tracer.start_span(title, kind=self._kind, attributes=asked, start_time=self._began_at)
        self._context = trace.set_span_in_context(self._span)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._context)
        self.headers: Mapping[str, str] = carrier

    def retrying(self, error: BaseException, delay: float) -> None:
        self._retries += 1
        now, failure = time.time_ns(), _class_of(error)
        self._end_retry(now, failure)
        self._span.add_event(_NAMES["retry"], {_NAMES["error"]: failure, _NAMES["retry_delay"]: delay}, now)
        # With the pause before it.
        self._retry_span = self._tracer.start_span(
            f"retry {self._retries}",
            self._context,
            attributes={_NAMES["retry_number"]: self._retries, _NAMES["retry_delay"]: delay},
            start_time=now,
        )

    def _end_retry(self, at: int, failed: str | None) -> None:
        span, self._retry_span = self._retry_span, None
        if span is not None:
            if failed is not None:
                span.set_attribute(_NAMES["error"], failed)
                span.set_status(Status(StatusCode.ERROR))
            span.end(at)

    def ended(self, end: CallEnd) -> None:
        # The moment of the outcome: this may run later than that.
        ended_at = self._began_at + int(end.seconds * 1e9)
        try:
            failed = self._class_of_failure(end)
            self._end_retry(ended_at, failed)
            shared = {**self._common, _NAMES["outcome"]: end.outcome}
            model = getattr(end.response, "model", None)
            if model:
                shared[_NAMES["response_model"]] = model
            if failed is not None:
                shared[_NAMES["error"]] = failed
            self._span.set_attributes({**shared, **self._result(end)})
            if failed is not None:
                # Not its text, which may quote what the server sent.
                self._span.set_status(Status(StatusCode.ERROR))
            self._measure(end, shared)
        finally:
            self._span.end(ended_at)

    def _class_of_failure(self, end: CallEnd) -> str | None:
        if end.outcome in _NEVER_ERRORS or (end.outcome in _STOPS and not self._abort_is_error):
            return None
        if end.error is None or end.outcome == "cancelled":
            return {"truncated": "StreamTruncated", "cancelled": "CancelledError"}.get(end.outcome, end.outcome)
        return _class_of(end.error)

    def _result(self, end: CallEnd) -> dict[str, Any]:
        response, error = end.response, end.error
        known: dict[str, Any] = {
            "first_chunk": end.first_chunk,
            "input_tokens": getattr(response, "prompt_eval_count", None),
            "output_tokens": getattr(response, "eval_count", None),
            "load": _seconds(getattr(response, "load_duration", None)),
            "prompt": _seconds(getattr(response, "prompt_eval_duration", None)),
            "decode": _seconds(getattr(response, "eval_duration", None)),
            "retries": self._retries or None,
            "timeout_phase": error.phase if isinstance(error, PhaseTimeout) else None,
        }
        if isinstance(error, AbortError) and error.reason is not None:
            # Its class only: the text may be a user's.
            known["abort_reason"] = type(error.reason).__name__
        if self._common[_NAMES["operation"]] != "embeddings":
            # The conventions prescribe "error" for a finish reason that was expected and did not come.
            reason = (getattr(response, "done_reason", None) or "stop") if end.outcome == "done" else "error"
            known["finish_reasons"] = [reason]
            if self._record_content and response is not None:
                known["output_messages"] = json.dumps([_output(response, reason)])
        return {_NAMES[name]: value for name, value in known.items() if value is not None}

    def _measure(self, end: CallEnd, attributes: dict[str, Any]) -> None:
        to, context = self._instruments, self._context
        read, written = (getattr(end.response, name, None) for name in ("prompt_eval_count", "eval_count"))
        if self._common[_NAMES["operation"]] == "embeddings":
            to.embeddings_duration.record(end.seconds, attributes, context)
            if read is not None:
                to.embeddings_input_tokens.record(read, attributes, context)
            return
        to.duration.record(end.seconds, attributes, context)
        if end.first_chunk is not None:
            to.first_chunk.record(end.first_chunk, attributes, context)
        if read is not None:
            to.input_tokens.add(read, attributes, context)
        if written is not None:
            to.output_tokens.add(written, attributes, context)


class _Work(_Observation):
    """The span and the duration of a run of an agent, or of one of its tools."""

    _kind = SpanKind.INTERNAL

    def scope(self) -> AbstractContextManager[object]:
        return trace.use_span(self._span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def _result(self, end: CallEnd) -> dict[str, Any]:
        known = {
            "input_tokens": getattr(end.response, "prompt_eval_count", None),
            "output_tokens": getattr(end.response, "eval_count", None),
            "timeout_phase": "total" if end.outcome == "timeout" else None,
            "tool_result": end.response if self._record_content and isinstance(end.response, str) else None,
        }
        return {_NAMES[name]: value for name, value in known.items() if value is not None}

    def _measure(self, end: CallEnd, attributes: dict[str, Any]) -> None:
        self._instruments.work[self._common[_NAMES["operation"]]].record(end.seconds, attributes, self._context)


def _common_of_work(operation: str, name: str | None, details: Mapping[str, Any]) -> dict[str, Any]:
    model, tool = details.get("model"), {"tool": name, "tool_type": "function"}
    agent = {"provider": "ollama", "agent": name, "request_model": model}
    known: dict[str, Any] = {"operation": operation, **(tool if operation == "execute_tool" else agent)}
    return {_NAMES[key]: value for key, value in known.items() if value is not None}


def _details(details: Mapping[str, Any], *, record_content: bool) -> dict[str, Any]:
    known = {"tool_call_id": details.get("tool_call_id")}
    if record_content and "arguments" in details:
        known["tool_arguments"] = json.dumps(details["arguments"])
    return {_NAMES[key]: value for key, value in known.items() if value is not None}


def _class_of(error: BaseException) -> str:
    """Return one of a few classes of errors: the status where there is one, otherwise the name of the class."""
    if isinstance(error, ResponseError) and error.status_code > 0:
        return str(error.status_code)
    return type(error).__name__


def _seconds(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9


def _common(operation: str, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    # Without credentials: they do not belong to the session's URL.
    server = urlsplit(url)
    return {
        _NAMES["operation"]: operation,
        _NAMES["provider"]: "ollama",
        **({_NAMES["request_model"]: body["model"]} if body.get("model") else {}),
        _NAMES["address"]: server.hostname or "",
        _NAMES["port"]: server.port or (443 if server.scheme == "https" else 80),
    }


def _request(body: Mapping[str, Any], *, streaming: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {_NAMES["stream"]: True} if streaming else {}
    if body.get("format"):
        asked[_NAMES["output_type"]] = "json"
    if isinstance(body.get("think"), str):
        asked[_NAMES["reasoning_level"]] = body["think"]
    options: Mapping[str, Any] = body.get("options") or {}
    for option, name in _OPTIONS.items():
        value = options.get(option)
        if value is not None:
            asked[name] = [value] if option == "stop" and isinstance(value, str) else value
    return asked


def _input(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if messages is None and "prompt" in body:
        messages = [{"role": "user", "content": body["prompt"]}]
    known: dict[str, Any] = {
        "input_messages": messages and [_message(message) for message in messages],
        "system_instructions": body.get("system") and [{"type": "text", "content": body["system"]}],
        "tool_definitions": body.get("tools"),
    }
    return {_NAMES[name]: json.dumps(value) for name, value in known.items() if value}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in the form of the conventions, without images."""
    role, text = message.get("role", ""), message.get("content") or ""
    parts: list[dict[str, Any]] = []
    if message.get("thinking"):
        parts.append({"type": "reasoning", "content": message["thinking"]})
    if role == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "response": text})
    elif text:
        parts.append({"type": "text", "content": text})
    for call in message.get("tool_calls") or ():
        function: Mapping[str, Any] = call.get("function") or {}
        parts.append({"type": "tool_call", "id": call.get("id"), **{key: function.get(key) for key in _CALL}})
    return {"role": role, "parts": parts}


_CALL = ("name", "arguments")


def _output(response: Any, reason: str) -> dict[str, Any]:
    message = getattr(response, "message", None)
    if message is not None:
        given = message.model_dump(mode="json", exclude_none=True)
    else:
        given = {"content": response.response, "thinking": getattr(response, "thinking", None)}
    return {**_message({**given, "role": "assistant"}), "finish_reason": reason}
