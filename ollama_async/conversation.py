"""``Chat``: a conversation with a model: its messages, one answer after the other, Stop, and a file to keep it in."""

import json
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias, Unpack, cast, overload

import anyio.to_thread
import pydantic_core
from pydantic import BaseModel, NonNegativeInt, ValidationError

from ._call.chunk_reader import Outcome
from ._call.stream import Stream
from ._cancel import LiveObject
from ._client import AsyncClient, ImageLike, _ChatOptions
from ._errors import OllamaError, RequestError, StreamTruncated
from ._model.input import encode_messages, first_error, model_name
from ._model.types import ChatResponse, Dumpable, Message
from ._regular import RegularFile, write_file
from ._secret import showable
from ._session import CallOptions, hide
from .pool import Pool
from .pool._pool import check_talk

__all__ = ["Chat", "ConversationError", "Turn"]

Said: TypeAlias = str | Mapping[str, Any] | Message | Dumpable

_VERSION = 1
_HOW = "give a file that Chat.save() has written, or '/save FILE.json' of 'ollama-async chat'"

# What a message weighs besides its text, and an image, in characters. Only the proportions count.
_FRAME_SIZE, _IMAGE_SIZE = 16, 3000


class ConversationError(OllamaError, ValueError):
    """A file is not a saved conversation, or a conversation cannot be saved.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path!r} {problem}")
        self.path = path


@dataclass(frozen=True)
class Turn:
    """A message of the user and everything that belongs to it: tool calls, their results, the answer.

    Attributes:
        messages: The messages, as the server takes them.
        outcome: How the last answer ended, as ``Stream.outcome``; ``"done"`` if it is whole.
    """

    messages: tuple[dict[str, Any], ...]
    outcome: Outcome = "done"

    @property
    def size(self) -> int:
        """How much the turn weighs against others, in characters."""
        return sum(map(_size, self.messages))


class _Count(NamedTuple):
    """What the server counted, and what the counted part of the conversation weighs."""

    tokens: int
    size: int


@dataclass(frozen=True)
class _Asked:
    """A message that was sent, and the stream of its answer."""

    messages: list[dict[str, Any]]
    stream: Stream[ChatResponse]


@showable
class Chat(LiveObject):
    """A conversation with one model.

    It has one answer at a time: ``send()`` stops an answer that is still open. The chat holds the stream of its last
    answer, so that it knows how that ended; a stream that you drop without an end is closed by the next ``send()``, by
    ``abort()``, or with the chat.

    A question without an answer (an error came first, or a stop) is not kept: ask it again. In ``messages``, that is
    one whose answer is an empty message of the assistant. Of an answer that was stopped, timed out or broke off, the
    text so far is kept, with its outcome in ``turns``; with ``keep_stopped=False`` the question and the partial answer
    are dropped.

    With ``context_limit=`` only as much is sent as fits: whole turns are left out, the oldest first, never the system
    message, the new message, or part of a turn (a tool call and its results stay together). They stay in ``messages``
    and in the file.

    Use a chat from one task at a time; ``abort()`` works from anywhere.

    Args:
        client: Makes the calls: an ``AsyncClient``, or a ``Pool``, at which the conversation keeps to one host.
        model: Name of the model.
        system: System prompt.
        messages: The conversation so far.
        keep_stopped: Whether a partial answer stays in the conversation.
        context_limit: Tokens that are sent at most, as far as the server's counts tell; ``None`` for no limit. Leave
            room for the answer: less than the ``num_ctx`` of the model.
        **options: Options of every call, as ``AsyncClient.chat`` takes them: ``tools``, ``options``, ``think`` ...

    Attributes:
        client: Makes the calls.
        model: Name of the model.
        system: System prompt; ``None`` for the model's own.
        context_limit: Tokens that are sent at most.
    """

    def __init__(
        self,
        client: AsyncClient | Pool,
        model: str,
        *,
        system: str | None = None,
        messages: Iterable[Said] = (),
        keep_stopped: bool = True,
        context_limit: int | None = None,
        **options: Unpack[_ChatOptions],
    ) -> None:
        hide(options)
        check_talk(client, system)
        _check_limit(context_limit)
        self._options = options
        self.client = client
        self.model: str = model_name(model)
        self.system = system
        self.context_limit = context_limit
        self._keep_stopped = keep_stopped
        self._turns: list[Turn] = []
        # How many of the turns are not sent any more.
        self._left_out = 0
        self._count: _Count | None = None
        self._asked: _Asked | None = None
        # Names the conversation at a pool. Not the chat itself: the pool would keep that.
        self._name = object()
        self._extend(encode_messages(_listed(messages)))

    # -- talking --

    @overload
    def send(
        self,
        message: Said | Sequence[Said],
        *,
        images: Sequence[ImageLike] | None = None,
        stream: Literal[True],
        until: Callable[[ChatResponse], object] | None = None,
        **options: Unpack[_ChatOptions],
    ) -> Stream[ChatResponse]: ...

    @overload
    def send(
        self,
        message: Said | Sequence[Said],
        *,
        images: Sequence[ImageLike] | None = None,
        stream: Literal[False] = False,
        until: Callable[[ChatResponse], object] | None = None,
        **options: Unpack[_ChatOptions],
    ) -> Coroutine[Any, Any, ChatResponse]: ...

    def send(
        self,
        message: Said | Sequence[Said],
        *,
        images: Sequence[ImageLike] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Coroutine[Any, Any, ChatResponse] | Stream[ChatResponse]:
        """Say something and let the model answer.

        An answer that is still open is stopped first.

        Args:
            message: A text of the user, a message, or several: the results of tools, say, which belong to the same
                turn as the call.
            images: Images that go with a text, as ``AsyncClient.generate`` takes them. An image given as a path is
                read each time that it is sent.
            stream: Whether to return the answer as a ``Stream``.
            **options: Options of this call: ``token=``, ``timeout=``, ``until=`` and all others of
                ``AsyncClient.chat``; they go before those of the chat.

        Returns:
            The answer; with ``stream=True`` a stream of its chunks. Nothing is sent before it is awaited or iterated.

        Raises:
            StreamTruncated: Without ``stream=True``: the answer ended without its last chunk.
            OllamaError: As ``AsyncClient.chat``; the partial answer is in ``partial`` and, if kept, in the chat.

        Cancellation: closes the connection at once; the partial answer is kept as after any stop.

        Server: ``POST /api/chat``
        """
        hide(cast("CallOptions", options))
        given = _given(message, images)
        return self._begin(given, options) if stream else self._whole(given, options)

    async def _whole(self, given: list[Any], options: dict[str, Any]) -> ChatResponse:
        # A stream underneath: so a stop keeps the partial answer.
        stream = self._begin(given, options)
        answer = await stream.collect()
        if stream.outcome == "truncated":
            raise StreamTruncated("the answer ended without a last chunk that says that it is done", answer)
        return answer

    def _begin(self, given: list[Any], options: dict[str, Any]) -> Stream[ChatResponse]:
        self.abort("another message was sent in this chat")
        self._settle()
        try:
            # Once: an open file can be read once.
            asked = encode_messages(given)
        except RequestError:
            # The call says what is wrong, when it is awaited.
            asked = given
        else:
            self._leave_out(asked)
        call: dict[str, Any] = {**self._options, **options}
        if isinstance(self.client, Pool):
            call.setdefault("sticky", self._name)
        messages = [*self.window, *asked]
        stream: Stream[ChatResponse] = cast("Any", self.client).chat(self.model, messages, stream=True, **call)
        self._asked = _Asked(asked, stream)
        return stream

    def abort(self, reason: object = None) -> bool:
        """Stop the answer that is open, from any task, thread or signal handler.

        Args:
            reason: What ``AbortError.reason`` will be.

        Returns:
            True if this call stopped an answer.
        """
        asked = self._asked
        return asked is not None and asked.stream.abort(reason)

    # -- the conversation --

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation, as ``AsyncClient.chat`` takes it; an open answer is not part of it yet."""
        self._settle()
        return [*self._head(), *_flat(self._turns)]

    @property
    def window(self) -> list[dict[str, Any]]:
        """The part of the conversation that is sent with the next message, before ``context_limit`` is looked at."""
        self._settle()
        return [*self._head(), *_flat(self._turns[self._left_out :])]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the conversation, the oldest first."""
        self._settle()
        return tuple(self._turns)

    @property
    def context_tokens(self) -> int | None:
        """Tokens that ``window`` has in the model's context; ``None`` before the first whole answer.

        The server counts them with each answer (``prompt_eval_count`` and ``eval_count``). What has changed since then
        (a stopped answer, a turn that was left out) is estimated from the tokens a character of what was counted.
        """
        self._settle()
        return self._estimate(self._window_size())

    def extend(self, messages: Iterable[Said]) -> None:
        """Add messages that were exchanged elsewhere, such as those of an agent's run, after stopping an open answer.

        Args:
            messages: As ``AsyncClient.chat`` takes them, and as ``AgentResult.messages`` has them: ``outcome`` in a
                message says how it ended.

        Raises:
            RequestError: One of them is not a message.
        """
        self.abort("other messages were added to this chat")
        self._settle()
        self._extend(encode_messages(_listed(messages)))

    def undo(self) -> Turn | None:
        """Remove the last turn from the conversation, after stopping an open answer.

        Returns:
            The turn; ``None`` if there was none.
        """
        self.abort("the turn was taken back")
        self._settle()
        turn = self._turns.pop() if self._turns else None
        self._left_out = min(self._left_out, len(self._turns))
        return turn

    def clear(self) -> None:
        """Forget the conversation except the system prompt, after stopping an open answer."""
        self.abort("the conversation was cleared")
        self._asked = None
        self._turns.clear()
        self._left_out = 0
        self._count = None

    # -- files --

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, as JSON: as a whole or not at all; only the user can read it.

        The file has the model's name, all messages, and how answers ended. Images are in it as base64, also those that
        were given as paths. Options of calls, such as headers, are not.

        Args:
            path: The file; it is replaced if it exists.

        Raises:
            ConversationError: An image cannot be read.
            OSError: The file cannot be written.

        Cancellation: the file is the old one or the new one.
        """
        self._settle()
        saved = {
            "version": _VERSION,
            "model": self.model,
            "context_tokens": self.context_tokens,
            "left_out": self._left_out,
            "messages": [*self._head(), *(message for turn in self._turns for message in _marked(turn))],
        }
        await anyio.to_thread.run_sync(_write, os.fspath(path), saved)

    @classmethod
    async def load(
        cls,
        path: str | os.PathLike[str],
        client: AsyncClient | Pool,
        *,
        model: str | None = None,
        keep_stopped: bool = True,
        context_limit: int | None = None,
        **options: Unpack[_ChatOptions],
    ) -> Self:
        """Read a conversation that ``save()`` has written.

        Args:
            path: The file.
            client: As for the class.
            model: Name of the model to go on with; ``None`` for that of the file.
            keep_stopped: As for the class.
            context_limit: As for the class.
            **options: As for the class.

        Returns:
            The chat.

        Raises:
            ConversationError: The file is not a saved conversation.
            RequestError: The file cannot be read.

        Cancellation: the file is closed.
        """
        hide(options)
        saved = await anyio.to_thread.run_sync(_read, os.fspath(path), abandon_on_cancel=True)
        chat = cls(client, model or saved.model, keep_stopped=keep_stopped, context_limit=context_limit, **options)
        chat._extend(encode_messages(saved.messages))
        chat._left_out = min(saved.left_out, len(chat._turns))
        if saved.context_tokens is not None:
            chat._count = _Count(saved.context_tokens, chat._window_size())
        return chat

    def __repr__(self) -> str:
        open_answer = self._asked is not None and self._asked.stream.outcome is None
        return f"<Chat with {self.model}: {len(self._turns)} turns{', answering' if open_answer else ''}>"

    # -- inside --

    def _head(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _extend(self, messages: list[dict[str, Any]]) -> None:
        """Add a conversation, in turns: each begins with what the user says."""
        if messages and messages[0]["role"] == "system" and self.system is None:
            self.system = messages.pop(0).get("content")
        found: list[list[dict[str, Any]]] = []
        outcomes: list[Outcome] = []
        for message in messages:
            if not found or (message["role"] == "user" and found[-1][-1]["role"] != "user"):
                found.append([])
                outcomes.append("done")
            outcomes[-1] = message.pop("outcome", "done")
            found[-1].append(message)
        for each, outcome in zip(found, outcomes, strict=True):
            said = [message for message in each if not _says_nothing(message)]
            # Without them a question is left that has no answer.
            if said and (len(said) == len(each) or said[-1]["role"] != "user"):
                self._turns.append(Turn(tuple(said), outcome))

    def _settle(self) -> None:
        """Take the last answer into the conversation, if it is over."""
        asked = self._asked
        outcome = None if asked is None else asked.stream.outcome
        if asked is None or outcome is None:
            return
        self._asked = None
        response, whole = asked.stream.response, outcome in ("done", "until")
        if response is None or not (whole or self._keep_stopped):
            return
        [answer] = encode_messages([response.message])
        if not whole:
            # Nothing will answer them, and a model does not go on without the answers.
            answer.pop("tool_calls", None)
        if _says_nothing(answer):
            return
        before: tuple[dict[str, Any], ...] = ()
        if self._turns and asked.messages[0]["role"] == "tool":
            before = self._turns.pop().messages
        self._turns.append(Turn((*before, *asked.messages, answer), outcome))
        if outcome == "done" and response.prompt_eval_count is not None:
            self._count = _Count(response.prompt_eval_count + (response.eval_count or 0), self._window_size())

    def _leave_out(self, asked: list[dict[str, Any]]) -> None:
        """Leave out turns until the rest and a new message fit into the limit."""
        size = self._window_size() + sum(map(_size, asked))
        # The turn that the new message belongs to stays.
        last = len(self._turns) - (asked[:1] != [] and asked[0]["role"] == "tool")
        while self.context_limit is not None and self._left_out < last:
            tokens = self._estimate(size)
            if tokens is None or tokens <= self.context_limit:
                return
            size -= self._turns[self._left_out].size
            self._left_out += 1

    def _window_size(self) -> int:
        return sum(map(_size, self._head())) + sum(turn.size for turn in self._turns[self._left_out :])

    def _estimate(self, size: int) -> int | None:
        return None if self._count is None else round(self._count.tokens * size / max(self._count.size, 1))


def _check_limit(limit: object) -> None:
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RequestError(f"context_limit={limit!r}: give a number of tokens, 1 or more, or None")


def _listed(messages: Any) -> list[Any]:
    if not isinstance(messages, Iterable):
        raise RequestError(f"messages={type(messages).__name__}: give a list")
    return [*messages]


def _given(message: Said | Sequence[Said], images: Sequence[ImageLike] | None) -> list[Any]:
    if isinstance(message, str):
        return [{"role": "user", "content": message, **({} if images is None else {"images": images})}]
    if images is not None:
        raise RequestError("images= needs a text; put the images of a message into the message itself")
    given = [*message] if isinstance(message, Sequence) else [message]
    if not given:
        raise RequestError("message=[]: there is no message in it; give a text, a message, or several")
    return given


def _says_nothing(message: Mapping[str, Any]) -> bool:
    """Whether it is an answer that was ended before its first word."""
    empty = not (message.get("content") or message.get("tool_calls") or message.get("images"))
    return empty and message["role"] == "assistant"


def _flat(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    return [dict(message) for turn in turns for message in turn.messages]


def _size(message: Mapping[str, Any]) -> int:
    """Return how much a message weighs against others, in characters."""
    text = len(message.get("content") or "") + len(message.get("thinking") or "")
    calls = len(json.dumps(message.get("tool_calls") or "", default=str))
    return text + calls + _FRAME_SIZE + _IMAGE_SIZE * len(message.get("images") or ())


# -- the file, in a worker thread --


class _SavedMessage(Message):
    outcome: Outcome = "done"


class _Saved(BaseModel):
    version: Literal[1] = 1
    model: str
    messages: list[_SavedMessage]
    context_tokens: NonNegativeInt | None = None
    left_out: NonNegativeInt = 0


def _marked(turn: Turn) -> list[dict[str, Any]]:
    """Return the messages of a turn, its last answer with how it ended."""
    *before, last = turn.messages
    return [*before, {**last, "outcome": turn.outcome} if last["role"] == "assistant" else last]


def _write(path: str, saved: dict[str, Any]) -> None:
    try:
        data = pydantic_core.to_json(saved, indent=2)
    except (ValueError, pydantic_core.PydanticSerializationError) as exc:
        raise ConversationError(path, f"is not written: {exc}") from exc
    write_file(path, data + b"\n")


def _read(path: str) -> _Saved:
    with RegularFile(path) as file:
        file.open()
        data = b"".join(iter(file.read, b""))
    try:
        # As JSON: an image in it is base64, never the path of a file on this machine.
        return _Saved.model_validate_json(data)
    except ValidationError as exc:
        raise ConversationError(path, f"is not a saved conversation: {first_error(exc)}; {_HOW}") from None
