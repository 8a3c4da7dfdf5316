"""Whatever comes at a line of the core, the contract holds: an exception, an abort, a cancellation.

Without ``--full`` each line is tried once for exceptions and once for the rest, in the first scene that comes to it.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property

import pytest
from injection import runs
from injection.lines import Place
from injection.runs import KINDS, STOPS, Run, Servers
from injection.scenes import ANSWER, PACED, SCENES, WHOLE, Scene, World, plain, read_to_end

from ollama_async import AbortError
from ollama_async._call import retry as _retry
from ollama_async.testing import FakeOllama


class Recorded:
    """All scenes, played once with nothing injected."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers

    @cached_property
    def runs(self) -> dict[str, Run]:
        # Twice: the first one imports, and fills caches.
        return {name: [Run(scene, self.servers).go() for _ in range(2)][-1] for name, scene in SCENES.items()}

    @cached_property
    def cut(self) -> dict[tuple[str, str], list[Place]]:
        """The places that are tried of each scene, by kind."""
        found: dict[tuple[str, str], list[Place]] = {(name, kind): [] for name in SCENES for kind in KINDS}
        tried: set[object] = set()
        others = [kind for kind in KINDS if kind not in STOPS]
        for name, run in self.runs.items():
            for place in run.places:
                if place.on not in tried:
                    tried.add(place.on)
                    found[name, STOPS[place.line % len(STOPS)]].append(place)
                    found[name, others[place.line % len(others)]].append(place)
        return found


@pytest.fixture(scope="session")
def recorded(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> Iterator[Recorded]:
    with pytest.MonkeyPatch.context() as patch, FakeOllama() as plain, FakeOllama(ssl=server_tls) as secure:
        patch.setattr(_retry, "_FIRST_DELAY", 0.002)
        yield Recorded(Servers(plain, secure, client_tls))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is left, not to wait long for it to go."""
    monkeypatch.setattr(runs, "_SETTLE", 0.05)


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", [*SCENES])
def test_a_scene_leaves_nothing_by_itself(recorded: Recorded, name: str) -> None:
    run = recorded.runs[name]
    assert run.found == []
    assert len(run.places) > 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SCENES])
def test_any_interruption_at_any_line(
    recorded: Recorded,
    pytestconfig: pytest.Config,
    name: str,
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    scene, natural = SCENES[name], recorded.runs[name].ended
    if kind.startswith("abort") and not scene.abortable:
        pytest.skip("nothing in it can be aborted")
    places = recorded.runs[name].places if pytestconfig.getoption("full") else recorded.cut[name, kind]
    wrong: list[str] = []
    reached = 0
    for place in places:
        run = Run(scene, recorded.servers, place, kind, natural).go()
        reached += run.reached
        if run.found:
            wrong.append(str(run))
    record_property("runs", reached)
    assert not wrong, f"{len(wrong)} of {len(places)} runs:\n" + "\n".join(wrong)
    # How bytes fall into reads differs from run to run, and the lines that are come to with them.
    assert reached >= 0.8 * len(places) - 5


# -- the instrument --


async def swallow(world: World) -> None:
    with suppress(KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        await plain(world)


async def keep_on(world: World) -> None:
    world.token.on_abort(world.seen.append)
    await plain(world)


async def deliver_late(world: World) -> None:
    stream = world.stream()
    chunk = await anext(stream)
    with suppress(AbortError):
        await stream.collect()
    world.deliver(chunk)


@pytest.mark.parametrize(
    ("play", "reply", "kind", "says"),
    [
        (swallow, ANSWER, "KeyboardInterrupt", "KeyboardInterrupt did not come out"),
        (swallow, ANSWER, "SystemExit", "SystemExit did not come out"),
        (swallow, ANSWER, "cancel", "it ended with its end, and not with CancelledError"),
        (keep_on, ANSWER, "cancel", "left behind: 1 registrations"),
        (keep_on, ANSWER, "SystemExit", "left behind when the loop is closed: 1 registrations"),
        (deliver_late, WHOLE, "abort", "delivered after abort() had returned"),
        (deliver_late, WHOLE, "abort in a thread", "delivered after abort() had returned"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_the_instrument_sees_what_is_wrong(
    recorded: Recorded, play: Callable[[World], object], reply: object, kind: str, says: str
) -> None:
    scene = Scene(play, (reply,))  # type: ignore[arg-type]
    undisturbed = Run(scene, recorded.servers).go()
    # How bytes fall into reads differs from run to run, so every 25th place may miss what a few places show.
    places = [place for first in (0, 12, 6, 18) for place in undisturbed.places[first::25]]
    tried: list[str] = []
    for place in places:
        run = Run(scene, recorded.servers, place, kind, undisturbed.ended).go()
        tried.append(str(run))
        if any(says in line for line in run.found):
            return
    pytest.fail(f"nothing says {says!r}: {tried}")


def test_each_place_is_come_to_again(recorded: Recorded) -> None:
    scene = Scene(read_to_end, (PACED,))
    # Twice, as in Recorded.runs.
    places = [Run(scene, recorded.servers).go() for _ in range(2)][-1].places
    assert any(place.real for place in places)
    assert any(not place.real for place in places)
    assert {place.hit for place in places} > {1, 2}
    for place in [place for place in places if place.hit == 1][::40]:
        assert Run(scene, recorded.servers, place, "cancel", "its end").go().reached
