"""The built-in behaviour: an Ollama server whose models say the same words each time."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, TypeAlias, cast

from ._records import RequestRecord
from ._script import (
    Endless,
    Frame,
    Pause,
    Reply,
    chat_frame,
    ending,
    generate_frame,
    spaced,
    stamp,
    word,
)

_TOKENS = 40
_DIMENSIONS = 32
_SIZE = 1_234_567_890
_CONTEXT = 4096
_DETAILS: Frame = {
    "parent_model": "",
    "format": "gguf",
    "family": "fake",
    "families": ["fake"],
    "parameter_size": "1.2B",
    "quantization_level": "Q4_K_M",
}
# What a server of Ollama has beside the routes that are answered here. The last part of some is a name.
_OTHER_PATHS = (
    "/api/pull",
    "/api/push",
    "/api/me",
    "/api/signout",
    "/api/status",
    "/api/web_search",
    "/api/web_fetch",
    "/api/experimental/model-recommendations",
    "/api/experimental/web_fetch",
    "/api/experimental/web_search",
    "/v1/audio/transcriptions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/messages",
    "/v1/models",
    "/v1/responses",
    "/v1/systemone",
)
_NAMED_PATHS = ("/api/blobs/", "/api/user/keys/", "/v1/models/")
Handler: TypeAlias = Callable[[RequestRecord], Reply]


class _Refused(Exception):  # noqa: N818 -- the request is at fault, and the answer says so
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.reply = Reply.error(status, message)


class Ollama:
    """Answers the requests that no script answers. Lives on the server's thread only."""

    def __init__(self, models: Sequence[str], interval: float) -> None:
        self._models = dict.fromkeys(map(_full, models))
        # With their tokens of context, and when they expire.
        self._loaded: dict[str, tuple[int, str]] = {}
        self._blobs: set[str] = set()
        self._interval = interval
        running: Handler = lambda _: _text(200, "Ollama is running")  # noqa: E731
        version: Handler = lambda _: Reply.json({"version": "0.0.0-fake"})  # noqa: E731
        self._routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": running, "HEAD": running},
            "/api/version": {"GET": version, "HEAD": version},
            "/api/tags": {"GET": self._tags, "HEAD": self._tags},
            "/api/ps": {"GET": self._ps},
            "/api/show": {"POST": self._show},
            "/api/chat": {"POST": self._chat},
            "/api/generate": {"POST": self._generate},
            "/api/embed": {"POST": self._embed},
            "/api/embeddings": {"POST": self._embeddings},
            "/api/create": {"POST": self._create},
            "/api/copy": {"POST": self._copy},
            "/api/delete": {"DELETE": self._delete},
        }

    def mistake_in(self, path: str) -> str | None:
        """Say what is wrong with a path that is to be scripted, if no client of Ollama would ever ask for it.

        Paths outside of `/api` and `/v1` are others' (a redirect's target, a registry's), unless they are cut ones of
        Ollama's.
        """
        known = [*self._routes, *_OTHER_PATHS]
        if path in known or path.startswith(_NAMED_PATHS):
            return None
        if path.startswith("/") and "?" not in path:
            like_ours = path.startswith(("/api/", "/v1/")) or any(route.endswith(path.rstrip("/")) for route in known)
            if not like_ours:
                return None
        near = get_close_matches(path, known, n=1, cutoff=0.5)
        return f"Ollama has no path {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")

    def answer(self, request: RequestRecord) -> Reply:
        """Answer one request."""
        if request.route.startswith("/api/blobs/"):
            methods: dict[str, Handler] = {"HEAD": self._find_blob, "POST": self._store_blob}
        else:
            methods = self._routes.get(request.route, {})
        if not methods:
            return _text(404, "404 page not found")
        handler = methods.get(request.method)
        if handler is None:
            return _text(405, "405 method not allowed")
        try:
            return handler(request)
        except _Refused as refused:
            return refused.reply

    # Models.

    def _tags(self, _: RequestRecord) -> Reply:
        return Reply.json({"models": [_card(name) | {"modified_at": stamp(0)} for name in self._models]})

    def _ps(self, _: RequestRecord) -> Reply:
        return Reply.json(
            {
                "models": [
                    _card(name) | {"expires_at": expires, "size_vram": _SIZE, "context_length": context}
                    for name, (context, expires) in self._loaded.items()
                ]
            }
        )

    def _show(self, request: RequestRecord) -> Reply:
        name = self._known(_body(request))
        return Reply.json(
            {
                "modelfile": f"FROM {name}\n",
                "parameters": "num_ctx                        4096",
                "template": "{{ .Prompt }}",
                "details": _DETAILS,
                "model_info": {"general.architecture": "fake", "fake.context_length": 4096},
                "capabilities": ["completion", "tools", "embedding"],
                "modified_at": stamp(0),
            }
        )

    def _create(self, request: RequestRecord) -> Reply:
        body = _body(request)
        name = _full(_name(body))
        if body.get("from"):
            self._known({"model": body["from"]})
        self._models[name] = None
        digest = _digest(name)
        told = [f"creating new layer {digest}", "writing manifest", "success"]
        frames: list[Frame] = [{"status": status} for status in told]
        return Reply(spaced(frames, self._interval), whole=frames[-1])

    def _copy(self, request: RequestRecord) -> Reply:
        body = _body(request)
        self._known({"model": body.get("source")})
        self._models[_full(_name({"model": body.get("destination")}))] = None
        return Reply(framing="length")

    def _delete(self, request: RequestRecord) -> Reply:
        name = self._known(_body(request))
        del self._models[name]
        self._loaded.pop(name, None)
        return Reply(framing="length")

    def _known(self, body: Frame) -> str:
        name = _name(body)
        if _full(name) not in self._models:
            raise _Refused(404, f"model '{name}' not found")
        return _full(name)

    # Generation.

    def _chat(self, request: RequestRecord) -> Reply:
        body = _body(request)
        name = _name(body)

        def frame(n: int, text: str) -> Frame:
            return chat_frame(n, name, content=text)

        messages: list[Frame] = body.get("messages") or []
        # As in a template that leaves the last message of the assistant open.
        read = "".join(f"{message.get('role')}: {message.get('content') or ''}\n" for message in messages)
        open_ended = bool(messages) and messages[-1].get("role") == "assistant"
        read = read.removesuffix("\n") if open_ended else f"{read}assistant: "
        return self._run(body, frame, read, begun=open_ended, idle=not messages)

    def _generate(self, request: RequestRecord) -> Reply:
        body = _body(request)
        name = _name(body)

        def frame(n: int, text: str) -> Frame:
            return generate_frame(n, name, response=text)

        prompt = body.get("prompt") or ""
        return self._run(body, frame, prompt, begun=bool(body.get("raw")), idle=not prompt)

    def _run(self, body: Frame, frame: Callable[[int, str], Frame], read: str, *, begun: bool, idle: bool) -> Reply:
        model = self._known(body)
        self._load(model, body)
        if body.get("keep_alive") in (0, "0", "0s"):
            del self._loaded[model]
        if idle:
            reason = "load" if model in self._loaded else "unload"
            return Reply.json(frame(0, "") | {"done": True, "done_reason": reason})
        if body.get("_debug_render_only"):
            return Reply.json(frame(0, "") | {"_debug_info": {"rendered_template": read}})
        limit = _option(body, "num_predict")
        # What the answer begins with, if it was begun.
        said = _words_at_the_end(read) if begun else 0
        count = _TOKENS - said if limit is None else limit
        # Like the real one, which sends the head with the first token.
        first = (Pause(self._interval),)
        if count < 0:
            return Reply(
                [Endless(lambda n: frame(n, word(said + n)), self._interval)], before_head=first, whole=frame(0, "")
            )
        frames = [frame(n, word(said + n)) for n in range(count)]
        end = ending(count, "stop" if limit is None else "length")
        whole = frame(count, "".join(map(word, range(said, said + count)))) | end
        return Reply([*spaced(frames, self._interval), frame(count, "") | end], before_head=first, whole=whole)

    def _load(self, model: str, body: Frame) -> None:
        """Have a model loaded as a call asks for it: at another context than it has, the real one loads it anew."""
        expires = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
        self._loaded[model] = (_option(body, "num_ctx") or _CONTEXT, expires)

    def _embed(self, request: RequestRecord) -> Reply:
        body = _body(request)
        name = self._known(body)
        self._load(name, body)
        texts = _texts(body)
        size = _integer(body, "dimensions") or _DIMENSIONS
        return Reply.json(
            {
                "model": body["model"],
                "embeddings": [_unit_vector(text, size) for text in texts],
                "total_duration": 14_000_000,
                "load_duration": 1_000_000,
                "prompt_eval_count": sum(len(text.split()) for text in texts),
            }
        )

    def _embeddings(self, request: RequestRecord) -> Reply:
        body = _body(request)
        self._load(self._known(body), body)
        prompt = body.get("prompt") or ""
        if not isinstance(prompt, str):
            raise _Refused(400, f"json: cannot unmarshal {type(prompt).__name__} into Go value of type string")
        return Reply.json({"embedding": _unit_vector(prompt, _DIMENSIONS) if prompt else []})

    # Blobs: only their digests are kept.

    def _find_blob(self, request: RequestRecord) -> Reply:
        digest = _blob_digest(request)
        return Reply(framing="length", status=200 if digest in self._blobs else 404)

    def _store_blob(self, request: RequestRecord) -> Reply:
        digest = _blob_digest(request)
        if digest in self._blobs:
            return Reply(framing="length")
        got = "sha256:" + hashlib.sha256(request.body).hexdigest()
        if got != digest:
            raise _Refused(400, f'digest mismatch, expected "{digest}", got "{got}"')
        self._blobs.add(digest)
        return Reply(framing="length", status=201)


def _text(status: int, text: str) -> Reply:
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    return Reply([text.encode()], status=status, headers=headers, framing="length")


def _body(request: RequestRecord) -> Frame:
    data = request.body
    if not data:
        raise _Refused(400, "missing request body")
    try:
        body: Any = json.loads(data)
    except json.JSONDecodeError as exc:
        rest = exc.doc[exc.pos :]
        message = f"invalid character {rest[0]!r} looking for beginning of value" if rest else "unexpected EOF"
        raise _Refused(400, message) from exc
    except UnicodeDecodeError as exc:
        raise _Refused(400, "invalid character in string literal") from exc
    except RecursionError as exc:
        raise _Refused(400, "exceeded max depth") from exc
    if not isinstance(body, dict):
        raise _Refused(400, f"json: cannot unmarshal {type(body).__name__} into Go value")
    return cast("Frame", body)


def _name(body: Frame) -> str:
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise _Refused(400, "model is required")
    return name


def _full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _option(body: Frame, name: str) -> int | None:
    options: Any = body.get("options", {})
    if options is None:
        return None
    if not isinstance(options, dict):
        raise _Refused(400, "json: cannot unmarshal options into Go value")
    try:
        return _integer(cast("Frame", options), name)
    except _Refused:
        raise _Refused(500, f'option "{name}" must be of type integer') from None


def _integer(body: Frame, key: str) -> int | None:
    value = body.get(key)
    if value is not None and not isinstance(value, int):
        raise _Refused(400, f"json: cannot unmarshal {key} into Go value of type int")
    return value


def _words_at_the_end(read: str) -> int:
    """Count the words of an answer that a prompt ends with."""
    text, most = "", 0
    for n in range(_TOKENS):
        text += word(n)
        if read.endswith(text):
            most = n + 1
    return most


def _texts(body: Frame) -> list[str]:
    given = body.get("input")
    if not given:
        return []
    texts: list[Any] = body["input"] if isinstance(given, list) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise _Refused(400, "invalid input type")
    return texts


def _digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def _card(name: str) -> Frame:
    return {
        "name": name,
        "model": name,
        "size": _SIZE,
        "digest": _digest(name).removeprefix("sha256:"),
        "details": _DETAILS,
    }


def _blob_digest(request: RequestRecord) -> str:
    digest = request.route.removeprefix("/api/blobs/")
    if not re.fullmatch("sha256[:-][0-9a-fA-F]{64}", digest):
        raise _Refused(400, "invalid digest format")
    return digest.replace("-", ":").lower()


def _unit_vector(text: str, size: int) -> list[float]:
    seed = text.encode()
    raw = [hashlib.sha256(b"%d:%b" % (n, seed)).digest()[0] - 127.5 for n in range(size)]
    norm = math.sqrt(math.fsum(value * value for value in raw))
    return [value / norm for value in raw]
