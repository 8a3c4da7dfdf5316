"""`Timeouts` alone: their values, and which limit holds when."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest

from ollama_async import RequestError, Timeouts
from ollama_async._call.timeouts import DEFAULT_TIMEOUTS, LIMITS, TO_COME, look_timeouts
from ollama_async._wire.phase import Phase

NAMES = [field.name for field in dataclasses.fields(Timeouts)]


def test_the_defaults() -> None:
    assert dataclasses.asdict(DEFAULT_TIMEOUTS) == {
        "connect": 10.0,
        "upload": None,
        "first_chunk": None,
        "idle": 300.0,
        "total": None,
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1e9 - 0.5, None])
def test_a_time_is_kept(name: str, value: Any) -> None:
    assert getattr(Timeouts(**{name: value}), name) == value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -0.5, True, False, float("nan"), float("inf"), 1e9, 1e9 + 0.5, "5", [5]])
def test_what_is_no_time_is_refused_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"timeout {name}=.*: give a number of seconds above 0, or None"):
        Timeouts(**{name: value})


@pytest.mark.parametrize("value", [0, -0.5, True, 1e9, "5"])
def test_a_total_that_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"timeout=.*: give Timeouts"):
        Timeouts.of(value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (Timeouts(idle=1), Timeouts(idle=1)),
        (None, Timeouts(connect=None, upload=None, first_chunk=None, idle=None, total=None)),
        (0.5, Timeouts(connect=0.5, idle=None, total=0.5)),
        (10, Timeouts(connect=10, idle=None, total=10)),
        (10.5, Timeouts(connect=10.0, idle=None, total=10.5)),
        (30, Timeouts(connect=10.0, idle=None, total=30)),
        (httpx.Timeout(5, connect=1), Timeouts(connect=1, first_chunk=5, idle=5)),
    ],
)
def test_what_a_timeout_means(given: Any, meant: Timeouts) -> None:
    assert Timeouts.of(given) == meant


def test_timeouts_stay_what_they_are() -> None:
    times = Timeouts()
    with pytest.raises(dataclasses.FrozenInstanceError):
        times.idle = 1.0  # type: ignore[misc]
    assert not hasattr(times, "__dict__")
    assert repr(times).startswith("Timeouts(connect=10.0")
    # What failed may be its making, and a traceback may show it.
    assert repr(Timeouts.__new__(Timeouts)) == "<Timeouts, not made yet>"


def test_what_may_still_come_is_what_holds_now_or_later() -> None:
    assert TO_COME[Phase.NEW] == {"connect", "upload", "first_chunk", "idle", "total"}
    assert TO_COME[Phase.WAITING] == {"first_chunk", "idle", "total"}
    assert TO_COME[Phase.BODY] == {"idle", "total"}
    assert TO_COME[Phase.EOF] == LIMITS[Phase.EOF] == {"total"}
    assert TO_COME[Phase.CLOSED] == set()


@pytest.mark.parametrize(("left", "connect", "total"), [(None, 2, 5), (1, 1, 1), (3, 2, 3), (5.5, 2, 5)])
def test_what_is_asked_beside_a_call_takes_little_of_its_time(left: float | None, connect: int, total: int) -> None:
    times = look_timeouts(left)
    assert (times.connect, times.total, times.idle) == (connect, total, 300.0)
