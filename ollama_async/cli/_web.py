"""The chat page: who may use it, what it asks for, and the server that serves it on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
import warnings
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import typer
import uvicorn
from pydantic import BaseModel, FailFast, Field, ValidationError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ollama_async._cancel import CancelToken
from ollama_async._client import AsyncClient
from ollama_async._errors import OllamaError, RequestError, TruncationWarning
from ollama_async._model.types import ToolCall  # noqa: TC001  (pydantic needs it when the program runs)
from ollama_async.agent import Agent
from ollama_async.asgi import ID_HEADER, StreamResponse, attach_route, list_route, module_route, stop_route
from ollama_async.conversation import Chat
from ollama_async.durable import DurableAnswers, Listed, Result
from ollama_async.testing import FakeOllama, Reply

from ._demo import list_models, look, pick
from ._output import write
from ._tools import AgentStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ollama_async._call.stream import Stream
    from ollama_async._call.timeouts import Timeouts
    from ollama_async._model.types import ChatResponse

    from ._terminal import Session

__all__ = ["PORT", "Chats", "Guard", "Site", "parse_sites", "parse_unattended", "serve"]

PORT = 11480
"""Where the page is, unless something else is there."""

_PAGE = Path(__file__).with_name("web")

# Of a request: all of a conversation, of a million tokens and more. The page knows it as well.
_MAX_BODY = 4 * 1024 * 1024
_MAX_TURNS = 10_000

# Whatever a model gets into the page runs no script, loads nothing, sends nothing and goes nowhere; the page's own
# script can set markup only through the sanitiser; no other site can have the page in a frame.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        # The sanitiser's, and the one that names the only script that a worker may run.
        "trusted-types dompurify render",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # The page belongs to the version that serves it: a newer one is never mixed with files of an older one.
    "Cache-Control": "no-store",
}


class _TooLong(Exception):  # noqa: N818
    """A request's body has come to its limit."""


class Site(NamedTuple):
    """A proxy in front of the page, under whose name browsers open it."""

    name: str
    origins: tuple[str, ...]
    exact: bool
    """Whether an address was given, so that the page has no other under this name."""

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a name, as in ``chat.example.com``, or the address of a site, as in ``https://chat.example.com``.

        Raises:
            ValueError: It is neither.
        """
        scheme, separator, rest = text.strip().lower().rpartition("://")
        schemes = [scheme] if separator else ["http", "https"]
        url = urlsplit(f"//{rest.removesuffix('/')}")
        host, port = url.hostname or "", url.port
        if not {*schemes} <= {"http", "https"} or not re.fullmatch(r"[\w.-]+|[\da-f:.]+", host) or url.path + url.query:
            raise ValueError(text)
        if "@" in url.netloc or "#" in rest:
            raise ValueError(text)
        with contextlib.suppress(UnicodeError):  # browsers send it in this form
            host = host.encode("idna").decode() if not host.isascii() else host
        shown = f"[{host}]" if ":" in host else host
        ports = {each: "" if port in (None, _PORTS[each]) else f":{port}" for each in schemes}
        return cls(host, tuple(f"{each}://{shown}{ports[each]}" for each in schemes), bool(separator))


_PORTS = {"http": 80, "https": 443}


class Guard:
    """Keeps other web sites away from the user's models, and what is too long out of this process.

    A site that the user visits can have his browser send requests to this machine. It cannot hide that: the ``Host``
    shows the name of a site that has made its name point here (DNS rebinding), the ``Origin`` and ``Sec-Fetch-Site``
    who asks, and a body of JSON makes every browser ask first.

    A proxy in front of the page has a name, which the user has allowed: as ``Host``, if the proxy passes it on, and as
    ``Origin`` of the page.

    The limit of bodies is here, and counts what comes, so that it holds for each route, whatever a request says.
    """

    def __init__(self, app: ASGIApp, name: str, allowed: Sequence[Site] = ()) -> None:
        self._app = app
        self._names = {"localhost", name.lower(), *(site.name for site in allowed)} - {""}
        self._origins = {origin for site in allowed for origin in site.origins}
        self._exact = {site.name for site in allowed if site.exact}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun, taken = False, 0

        async def guarded(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > _MAX_BODY:
                raise _TooLong
            return message

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        app = self._app if refusal is None else _problem(*refusal)
        try:
            await app(scope, counted, guarded)
        except _TooLong:
            if begun:
                raise
            await _problem(*_TOO_LONG)(scope, receive, guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > _MAX_BODY):
            return _TOO_LONG
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        # Any port, for who forwards one; and any address, since only a name can be made to point elsewhere.
        if not (name in self._names or _is_address(name)):
            how = "open it under the address that 'ollama-async web' has printed, or allow this one with --allow-host"
            return 403, f"this page is not at {host!r}: {how}"
        own = set[str]() if name in self._exact else {f"http://{host}", f"https://{host}"}
        if origin is not None and origin not in own | self._origins:
            return 403, f"{_OTHER_SITE}; if {origin!r} is a proxy of yours, allow it with --allow-host"
        # A link from elsewhere to the page itself is fine.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and path != "/":
            return 403, _OTHER_SITE
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "send JSON, with Content-Type: application/json"
        return None


def _name(host: str) -> str:
    """Return the name in a ``Host``, without the port; none, where it cannot be read."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


_OTHER_SITE = "another web site asked for this: only the page itself may"
_TOO_LONG = (413, f"the request has more than {_MAX_BODY // 1024 // 1024} MB: begin a new chat")


def _problem(status: int, text: str) -> JSONResponse:
    # What else comes of a body that is too long is not read.
    headers = {"Connection": "close"} if status == 413 else None
    return JSONResponse({"error": text, "status_code": status}, status, headers)


# -- what the page asks for --


class _Said(BaseModel):
    """A message of the conversation; it has no picture, since the client would read its path from this disk."""

    role: Literal["user", "assistant"]
    content: str
    tool_calls: list[ToolCall] | None = None


class _Result(BaseModel):
    """What a tool has returned."""

    role: Literal["tool"]
    content: str
    tool_name: str
    tool_call_id: str | None = None


_Message = Annotated[_Said | _Result, Field(discriminator="role")]


class _Asked(BaseModel):
    """What the page sends to have an answer."""

    model: str
    # The first one that is wrong is enough to refuse all.
    messages: Annotated[list[_Message], Field(max_length=_MAX_TURNS), FailFast()]


def _owner(request: Request) -> str:
    """Say whose answers a request is about: those of one browser, which has made up this name for itself."""
    return request.headers.get("x-chat-owner", "")


class Chats:
    """The page's routes.

    Attributes:
        answers: Those that the page has asked for; whoever uses it closes them.
    """

    def __init__(
        self,
        session: Session,
        client: AsyncClient,
        limits: Timeouts,
        notice: str = "",
        *,
        unattended: float | None = None,
        tools: Sequence[Any] = (),
    ) -> None:
        self._session = session
        self._client = client
        self._limits = limits
        self._notice = notice
        self._tools = tools
        # By owner and id, while the answer comes: another tab shows what it is an answer to.
        self._questions: dict[tuple[str, str], dict[str, Any]] = {}
        self.answers = DurableAnswers.from_url("memory://", unattended=unattended, on_end=self._forget)

    def app(self, name: str = "", allowed: Sequence[Site] = ()) -> Starlette:
        """Make the application.

        Args:
            name: By which this machine is reached, beside ``localhost`` and its addresses.
            allowed: Proxies in front of the page.
        """
        routes = [
            Route("/", self._page),
            Route("/api/models", self._models),
            Route("/api/chat", self._chat, methods=["POST"]),
            list_route("/api/answers", self.answers, owner=_owner),
            attach_route("/api/answers", self.answers, owner=_owner),
            stop_route("/api/answers", self.answers.registry, owner=_owner),
            Route("/api/questions/{id}", self._question),
            module_route("/answers.js"),
            Mount("/", StaticFiles(directory=_PAGE)),
        ]
        return Starlette(routes=routes, middleware=[Middleware(Guard, name=name, allowed=allowed)])

    async def _page(self, _: Request) -> Response:
        return FileResponse(_PAGE / "index.html")

    async def _models(self, _: Request) -> Response:
        try:
            models, loaded = await list_models(self._client)
        except OllamaError as exc:
            return _problem(502, self._session.explain(exc))
        names = [str(model.get("name")) for model in models.models]
        return JSONResponse({"models": names, "default": pick(models, loaded, None), "notice": self._notice})

    async def _chat(self, request: Request) -> Response:
        try:
            asked = _Asked.model_validate_json(await request.body())
            chat, question = self._conversation(asked)
            stream = self._answer(chat, question)
        except ValidationError as exc:
            return _problem(400, f"this is not a question to a model: {exc.errors()[0]['msg']}")
        except RequestError as exc:
            return _problem(400, str(exc))
        owner, answer_id = _owner(request), request.headers.get(ID_HEADER, "")
        told = {"model": chat.model, "messages": [*chat.window, *question]}
        self._questions.setdefault((owner, answer_id), told)
        return StreamResponse(
            stream,
            answers=self.answers,
            owner=owner,
            on_leave="continue",
            # The reader of this page is the one who runs the server.
            explain=lambda exc: getattr(exc, "error", str(exc)),
            background=BackgroundTask(self._forget_unless_running, owner, answer_id),
        )

    def _conversation(self, asked: _Asked) -> tuple[Chat, list[dict[str, Any]]]:
        """Return the conversation so far, and the question, with as much of its answer as is to be continued."""
        messages = asked.model_dump(exclude_none=True)["messages"]
        at = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=0)
        chat = Chat(self._client, asked.model, messages=messages[:at], timeout=self._limits, on_truncation="warn")
        return chat, messages[at:]

    def _answer(self, chat: Chat, question: list[dict[str, Any]]) -> Stream[ChatResponse]:
        # What is wrong with it otherwise is said when it is read, by the response.
        if not self._tools:
            return chat.send(question, stream=True)
        agent = Agent(self._client, chat.model, self._tools, timeout=self._limits, on_truncation="warn")
        # A durable answer asks no more of a stream than this one has.
        return cast("Stream[ChatResponse]", AgentStream(agent.run([*chat.window, *question])))

    async def _question(self, request: Request) -> Response:
        asked = self._questions.get((_owner(request), request.path_params["id"]))
        if asked is None:
            return _problem(404, "you have no answer with this id that is under way")
        return JSONResponse(asked)

    def _forget(self, result: Result) -> None:
        self._questions.pop((result.owner, result.id), None)

    async def _forget_unless_running(self, owner: str, answer_id: str) -> None:
        """Forget a question whose answer was not begun; one that only lost its first viewer goes on."""
        listed: list[Listed] = []
        with contextlib.suppress(OllamaError):  # no answer can have such an owner
            listed = await self.answers.list(owner)
        if not any(each.id == answer_id and each.state == "running" for each in listed):
            self._questions.pop((owner, answer_id), None)


# -- serving --


class _Server(uvicorn.Server):
    """A server that ends at the first Ctrl-C, also while answers come: they are aborted first."""

    def __init__(self, app: Starlette, token: CancelToken, started: Callable[[], None]) -> None:
        # What it logs goes where all else goes. With h11, always at hand, the head of a request has a limit, too.
        options: Any = {"log_config": None, "log_level": "warning", "access_log": False}
        super().__init__(uvicorn.Config(app, http="h11", ws="none", lifespan="off", **options))
        self._token = token
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and tell."""
        await super().startup(sockets)
        self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: at once, since uvicorn waits for the answers that are under way."""
        self._token.abort("ollama-async web is ending")
        super().handle_exit(sig, frame)


def parse_sites(texts: Sequence[str] | None) -> list[Site]:
    """Read the names of ``--allow-host``."""
    sites: list[Site] = []
    for text in texts or ():
        try:
            sites.append(Site.parse(text))
        except ValueError:
            how = "give a name such as chat.example.com, or an address such as https://chat.example.com"
            raise typer.BadParameter(f"invalid site {text!r}: {how}", param_hint="--allow-host") from None
    return sites


# In less, the page that asks for an answer could not even begin to watch it.
_SHORTEST = 0.1
# A year.
_LONGEST = 366 * 86400.0


def parse_unattended(text: str) -> float | None:
    """Read the seconds of ``--unattended``; ``None`` stands for ever."""
    if text.strip().lower() == "none":
        return None
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds <= _LONGEST:
            return max(seconds, _SHORTEST)
    how = "give seconds, 0 to end an answer at once when no tab shows it, or none to let it come to its end"
    raise typer.BadParameter(f"invalid time {text!r}: {how}", param_hint="--unattended")


def serve(
    session: Session,
    address: str,
    port: int | None,
    limits: Timeouts,
    *,
    unattended: float | None,
    allowed: Sequence[Site] = (),
    tools: Sequence[Any] = (),
    open_browser: bool,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        session: What the command line was told.
        address: What to listen on.
        port: Which; 0 for a free one, ``None`` for the usual one, or a free one if that is taken.
        limits: For each answer.
        unattended: After how many seconds in which no tab shows it an answer is aborted; ``None`` for never.
        allowed: Proxies in front of the page.
        tools: Functions that the model may call.
        open_browser: Show the page.
    """
    with _listen(address, port) as listener:
        bound, number = listener.getsockname()[:2]
        ip = ipaddress.ip_address(bound)
        what = "this page, your models and your tools" if tools else "this page and your models"
        if allowed:
            names = ", ".join(site.name for site in allowed)
            session.screen.note(f"Everyone whom the proxy lets in at {names} can use {what}.", "yellow")
        if not ip.is_loopback:
            session.screen.note(f"Everyone who can reach this machine can use {what}.", "yellow")
        if ip.is_unspecified:  # no browser goes there
            bound = "::1" if ip.version == 6 else "127.0.0.1"
        url = f"http://{bound if ':' not in bound else f'[{bound}]'}:{number}/"

        def started() -> None:
            write(f"The chat page is at {url} (Ctrl-C ends it)\n")
            if open_browser:
                # A browser for terminals stays in the call until it is left.
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        with warnings.catch_warnings():
            # The page shows it.
            warnings.simplefilter("ignore", TruncationWarning)
            asyncio.run(_serve(session, listener, address, allowed, limits, unattended, tools, started))


async def _serve(
    session: Session,
    listener: socket.socket,
    name: str,
    allowed: Sequence[Site],
    limits: Timeouts,
    unattended: float | None,
    tools: Sequence[Any],
    started: Callable[[], None],
) -> None:
    token = CancelToken()
    with contextlib.ExitStack() as stack:
        with session.ctrl_c.aborts(token):
            model, why = await look(session, token, None)
        host, notice = session.host, ""
        if model is None:
            server = stack.enter_context(FakeOllama(models=["demonstration"]))
            server.script("/api/chat", _DEMONSTRATION, always=True)
            host, notice = server.url, f"This is a demonstration, no model computes anything: {why}."
            write(f"{notice}\n")
        async with AsyncClient(host, token=token) as client:
            chats = Chats(session, client, limits, notice, unattended=unattended, tools=tools)
            async with chats.answers:
                await _Server(chats.app(name, allowed), token, started).serve(sockets=[listener])


def _listen(address: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if port is None:
        with contextlib.suppress(OSError):
            return socket.create_server((address, PORT), family=family)
    try:
        return socket.create_server((address, port or 0), family=family)
    except OSError as exc:
        where = f"port {port} of {address}" if port else address
        raise typer.BadParameter(f"cannot listen at {where}: {exc.strerror}") from exc


# -- what the embedded server says --

_TEXT = """\
This answer is **always the same**: no Ollama server was found, so a small one inside of `ollama-async` plays it.

## What you can try

- Press **Stop**, or `Esc`: the connection is closed at once, and the partial answer is kept.
- Then *Continue*, or *Retry*.

```python
async for chunk in client.chat("llama3.2", "Why?", stream=True):
    print(chunk.message.content, end="")
```

| to get a real answer | |
|---|---|
| install a server | see [ollama.com](https://ollama.com/download) |
| start it | `ollama serve` |
| get a model | `ollama-async pull llama3.2` |

Then start `ollama-async web` anew.
"""
_DEMONSTRATION = Reply.chat(
    *_TEXT.replace(" ", "\0 ").split("\0"),
    interval=0.05,
    model="demonstration",
    thinking="The user has no server yet. So I say what this page can do.".replace(" ", "\0 ").split("\0"),
)
