"""A chunk that was made with only the fields that came is, to whoever looks, the same as one that has them all."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ollama_async import ChatResponse, GenerateResponse, Message
from ollama_async._call.chunk import ResponseInfo
from ollama_async._model import merge as _merge
from ollama_async._model import types as _types
from ollama_async._model.merge import validators

CHAT = {"model": "m", "created_at": "2026", "message": {"role": "assistant", "content": "a"}, "done": False}
THOUGHT = {**CHAT, "message": {"role": "assistant", "content": "", "thinking": "b"}}
GENERATED = {"model": "m", "created_at": "2026", "response": "a", "done": False}
SPARSE: list[tuple[type[Any], dict[str, Any]]] = [
    (ChatResponse, CHAT),
    (ChatResponse, THOUGHT),
    (GenerateResponse, GENERATED),
    (GenerateResponse, {**GENERATED, "thinking": "b"}),
]
each_sparse = pytest.mark.parametrize(("model", "frame"), SPARSE, ids=["chat", "thought", "generate", "both"])


def made(model: type[Any], frame: Any) -> tuple[Any, Any]:
    """Return a chunk as streams make it, and one of all fields."""
    line = json.dumps(frame).encode()
    return validators(model).one(line), model.model_validate_json(line)


@each_sparse
def test_it_is_made_of_the_partial_answer(model: type[Any], frame: dict[str, Any]) -> None:
    chunk, whole = made(model, frame)
    assert len(chunk.fields_that_came) < 6
    assert len(whole.fields_that_came) == len(model.model_fields)
    # Also where many are made.
    assert len(validators(model).many(json.dumps([frame]).encode())[0].fields_that_came) < 6


class Holder(BaseModel):
    """Somebody else's model that has a chunk in it."""

    model_config = ConfigDict(revalidate_instances="always")
    chunk: ChatResponse | GenerateResponse


class Kept(BaseModel):
    """As ``Holder``, but pydantic takes instances as they are."""

    chunk: ChatResponse | GenerateResponse


def changed(chunk: Any) -> Any:
    chunk.done_reason = "stop"
    chunk["eval_count"] = 3
    return chunk


def through_vars(chunk: Any) -> Any:
    vars(chunk)["eval_count"] = 3
    return chunk.eval_count, chunk


LOOKS: dict[str, Callable[[Any], Any]] = {
    "model_dump": lambda chunk: (chunk.model_dump(), list(chunk.model_dump())),
    "model_dump(exclude_unset)": lambda chunk: chunk.model_dump(exclude_unset=True),
    "model_dump(exclude_none)": lambda chunk: chunk.model_dump(exclude_none=True),
    "model_dump(mode=json, by_alias)": lambda chunk: chunk.model_dump(mode="json", by_alias=True),
    "model_dump_json": lambda chunk: chunk.model_dump_json(),
    "model_dump_json(round_trip)": lambda chunk: chunk.model_dump_json(round_trip=True),
    "a list of them": lambda chunk: TypeAdapter(list[type(chunk)]).dump_json([chunk]),  # type: ignore[misc]
    "in a list of anything": lambda chunk: TypeAdapter(list[Any]).dump_json([chunk]),
    "in another model": lambda chunk: Kept(chunk=chunk).model_dump_json(),
    "validated again": lambda chunk: Holder(chunk=chunk).chunk.model_dump(),
    "from attributes": lambda chunk: type(chunk).model_validate(chunk, from_attributes=True).model_dump(),
    "repr": repr,
    "str": str,
    "iter": list,
    "rich": lambda chunk: list(chunk.__rich_repr__()),
    "vars": lambda chunk: (vars(chunk), list(vars(chunk))),
    "model_copy": lambda chunk: chunk.model_copy(),
    "model_copy(update)": lambda chunk: chunk.model_copy(update={"eval_count": 1}),
    "replaced": lambda chunk: chunk.replaced(eval_count=1),
    "model_copy(deep)": lambda chunk: chunk.model_copy(deep=True),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda chunk: pickle.loads(pickle.dumps(chunk)),
    "fields set": lambda chunk: chunk.model_fields_set,
    "extra": lambda chunk: (chunk.model_extra, chunk.__pydantic_extra__, chunk.__pydantic_private__),
    "each field": lambda chunk: [getattr(chunk, name) for name in type(chunk).model_fields],
    "each field as a key": lambda chunk: [chunk.get(name) for name in type(chunk).model_fields],
    "fields there": lambda chunk: [(hasattr(chunk, name), name in chunk) for name in type(chunk).model_fields],
    "another name": lambda chunk: (hasattr(chunk, "nothing"), chunk.get("nothing"), "nothing" in chunk),
    "changed": changed,
    "changed behind its back": through_vars,
    "an absent field deleted after it was looked at": lambda chunk: (vars(chunk), delattr(chunk, "eval_count"))[1],
}


@each_sparse
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_viewer_sees_everything(look: Callable[[Any], Any], model: type[Any], frame: dict[str, Any]) -> None:
    chunk, whole = made(model, frame)
    seen, wanted = look(chunk), look(whole)
    assert seen == wanted
    if isinstance(wanted, BaseModel):
        # Equality of models is pydantic's to say; this is not.
        assert repr(seen) == repr(wanted)
        assert seen.model_fields_set == wanted.model_fields_set
    # What the look has left behind is the same as well.
    assert list(vars(chunk).items()) == list(vars(whole).items())
    assert chunk == whole
    assert whole == chunk


def test_two_of_them_are_compared_by_all_fields() -> None:
    one, _ = made(ChatResponse, CHAT)
    two, _ = made(ChatResponse, CHAT)
    assert one == two
    two.done_reason = "stop"
    assert one != two
    assert two != one


@each_sparse
def test_a_replaced_one_is_a_copy_with_an_update(model: type[Any], frame: dict[str, Any]) -> None:
    whole = model.model_validate({**frame, "new": [1]})
    whole.set_response_info(ResponseInfo(200, []))
    replaced, copied = whole.replaced(eval_count=2), whole.model_copy(update={"eval_count": 2})
    assert (repr(replaced), replaced.model_fields_set) == (repr(copied), copied.model_fields_set)
    assert (replaced, replaced.model_extra) == (copied, copied.model_extra)
    assert replaced._response_info() is copied._response_info()
    assert (whole.eval_count, "eval_count" in whole.model_fields_set) == (None, False)
    replaced.model_extra["new"] = 1
    assert whole.model_extra == {"new": [1]}


def test_a_message_of_one_is_a_message() -> None:
    chunk, whole = made(ChatResponse, CHAT)
    assert chunk.message == whole.message == Message(role="assistant", content="a")
    assert Message.model_validate(chunk.message).model_dump() == whole.message.model_dump()


frames = st.dictionaries(
    st.sampled_from(
        ["model", "created_at", "done", "response", "thinking", "eval_count", "logprobs", "new", "message"]
    ),
    st.sampled_from(["a", "", None, True, False, 1, 0.5, [], {}])
    | st.dictionaries(
        st.sampled_from(["role", "content", "thinking", "tool_calls", "images", "new"]),
        st.sampled_from(["a", "", None, True, 1, [], {}]),
    ),
)


@pytest.mark.parametrize(("model", "usual"), [(ChatResponse, CHAT), (GenerateResponse, GENERATED)])
@given(frame=frames, without=st.sets(st.sampled_from(["model", "created_at", "done", "response", "message"])))
def test_any_line(model: type[Any], usual: dict[str, Any], frame: dict[str, Any], without: set[str]) -> None:
    frame = {name: value for name, value in {**usual, **frame}.items() if name not in without}
    line = json.dumps(frame).encode()
    try:
        whole = model.model_validate_json(line)
    except ValidationError:
        with pytest.raises(ValidationError):
            validators(model).one(line)
        return
    chunk = validators(model).one(line)
    assert chunk.model_fields_set == whole.model_fields_set
    assert chunk.model_extra == whole.model_extra
    assert chunk.model_dump_json() == whole.model_dump_json()
    assert chunk == whole


@each_sparse
def test_what_is_deleted_is_gone(model: type[Any], frame: dict[str, Any]) -> None:
    chunk, whole = made(model, frame)
    for deleted in ("done_reason", "done"):
        delattr(chunk, deleted)
        delattr(whole, deleted)
        assert not hasattr(chunk, deleted)
        assert chunk.model_dump_json() == whole.model_dump_json()
    with pytest.raises(AttributeError):
        del chunk.done


class Mine(ChatResponse):
    """A class of somebody's own, with a field that has another default."""

    done_reason: str | None = "none yet"
    mark: int = 7


def test_a_class_derived_from_one_is_as_any_model() -> None:
    validators(ChatResponse)
    mine = Mine.model_validate_json(json.dumps(CHAT))
    assert (mine.done_reason, mine.mark, mine.eval_count) == ("none yet", 7, None)
    assert mine.model_dump()["mark"] == 7
    with pytest.raises(AttributeError, match="nothing"):
        _ = mine.nothing  # type: ignore[attr-defined]


def test_one_that_somebody_constructed_without_what_has_to_come() -> None:
    validators(ChatResponse)
    constructed = ChatResponse.model_construct(model="m")
    assert "message" not in vars(constructed)
    with pytest.raises(AttributeError):
        _ = constructed.message
    assert constructed.done is False
    assert vars(constructed) is vars(constructed)


def test_threads_that_look_at_once_all_see_all() -> None:
    line = json.dumps(CHAT).encode()
    begin = threading.Barrier(4)
    chunks = [validators(ChatResponse).one(line) for _ in range(300)]
    wanted = ChatResponse.model_validate_json(line).model_dump_json()
    seen: list[set[str]] = []

    def look() -> None:
        begin.wait(10)
        seen.append({chunk.model_dump_json() for chunk in chunks})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert seen == [{wanted}] * 4


def test_what_one_sets_is_not_lost_when_another_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, _ = made(ChatResponse, CHAT)
    write_down = _types._write_down

    def interrupted(looked_at: Any, fields: dict[str, Any]) -> None:
        # A thread, or a signal handler, that comes right between two steps of a look.
        monkeypatch.setattr(_types, "_write_down", write_down)
        chunk.eval_count = 5
        write_down(looked_at, fields)

    monkeypatch.setattr(_types, "_write_down", interrupted)
    assert chunk.model_dump()["eval_count"] == 5
    assert chunk.eval_count == 5
    assert list(vars(chunk)) == list(ChatResponse.model_fields)


def test_a_class_that_somebody_builds_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = _merge._token
    meanwhile = [lambda: ChatResponse.model_rebuild(force=True), lambda: Message.model_rebuild(force=True)]

    def interrupted(model: type[Any]) -> Any:
        if meanwhile:
            meanwhile.pop()()
        return describe(model)

    monkeypatch.setattr(_merge, "_token", interrupted)
    chunk = _merge._sparse(ChatResponse).one(json.dumps(CHAT).encode())
    assert not meanwhile
    assert len(chunk.fields_that_came) == 4
    assert len(chunk.message.fields_that_came) == 3
    assert ChatResponse.__pydantic_complete__
    assert Message.__pydantic_complete__


@pytest.mark.parametrize(
    "before",
    ["", "Message(role='a'); ChatResponse.model_validate({'message': {'role': 'a'}})", "ChatResponse.model_rebuild()"],
    ids=["first of all", "after others", "built"],
)
def test_it_does_not_matter_when_the_validators_are_made(before: str) -> None:
    program = f"""
from ollama_async import ChatResponse, GenerateResponse, Message
from ollama_async._model.merge import validators
{before}
chunk = validators(ChatResponse).one(b'{json.dumps(CHAT)}')
assert len(chunk.fields_that_came) == 4, chunk.fields_that_came
assert len(chunk.message.fields_that_came) == 3, chunk.message.fields_that_came
assert len(validators(GenerateResponse).one(b'{json.dumps(GENERATED)}').fields_that_came) == 5
whole = ChatResponse.model_validate({CHAT!r})
assert len(whole.fields_that_came) == len(ChatResponse.model_fields)
assert len(whole.message.fields_that_came) == len(Message.model_fields)
assert ChatResponse.__pydantic_complete__
assert chunk.model_dump_json() == whole.model_dump_json()
Message(role="a", content="b").model_dump_json()
assert Message.__pydantic_complete__
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
