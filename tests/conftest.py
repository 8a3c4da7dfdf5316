import asyncio
import gc
import signal
import ssl
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from real.needs import pytest_terminal_summary

if TYPE_CHECKING:
    import trustme
    from real.ollama_server import RealOllama

try:
    import uvloop
except ModuleNotFoundError:  # there is none for Windows
    uvloop = None

# Imported where a test needs it, here and below: each module of tests runs alone without packages that it does not use.
try:
    from hypothesis import HealthCheck, Phase, settings
except ModuleNotFoundError:
    pass
else:
    # The same examples each time, so that what is red is red for everybody; `--hypothesis-profile=full` searches on.
    _SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile(
        "ci",
        max_examples=150,
        deadline=None,
        derandomize=True,
        suppress_health_check=_SLOW,
        # A failure that takes its time would take it again for each attempt to make it smaller.
        phases=[Phase.explicit, Phase.generate],
    )
    settings.register_profile("full", max_examples=1500, deadline=None, print_blob=True, suppress_health_check=_SLOW)
    settings.load_profile("ci")

__all__ = ["pytest_terminal_summary"]  # pytest takes its hooks from here

ON_BOTH_LOOPS = ("teardown", "test_soak.py", "test_transport.py", "test_real_stops.py")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    """Run what is about sockets on uvloop as well."""
    factories: dict[str, Callable[[], Any]] = {"asyncio": asyncio.new_event_loop}
    if uvloop is not None and any(part in ON_BOTH_LOOPS for part in item.path.parts):
        factories["uvloop"] = uvloop.new_event_loop
    if config.getoption("full") and "teardown" in item.path.parts and sys.version_info >= (3, 12):
        # uvloop passes eager_start on, which asyncio's factory takes from 3.13.3 on.
        takes_it = sys.version_info < (3, 13) or sys.version_info >= (3, 13, 3)
        able = factories if takes_it else {"asyncio": factories["asyncio"]}
        factories |= {f"{name}-eager": partial(eager, factory) for name, factory in able.items()}
    return factories


def eager(factory: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    """A loop whose tasks begin to run when they are made."""
    loop = factory()
    # No function of ours around it: anyio knows it by its code, and would mix up whose cancel scope is whose.
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="leave nothing of the teardown matrix out; it takes hours")


def pytest_configure() -> None:
    """Let signals through to what the tests start, who would inherit that they are ignored.

    What a shell runs with ``&`` ignores Ctrl-C, and what nohup runs ignores the end of its terminal.
    """
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say what stays in one process under ``--dist loadgroup``: a file, and all that share the real Ollama server."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            shares = "_ollama_server" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("ollama" if shares else item.path.name))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without the garbage collector, which would take a third of the time and find nothing.

    Then take what is there for good out of its way: the tests collect garbage by hand, thousands of times.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


pytest_plugins = ("ollama_async.testing.pytest_plugin", "pytester")


@pytest.fixture(scope="session")
def authority() -> "trustme.CA":
    """Whose certificates `client_tls` trusts."""
    import trustme

    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: "trustme.CA") -> ssl.SSLContext:
    """For a server on this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(authority: "trustme.CA") -> ssl.SSLContext:
    """For its clients."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="session")
def _ollama_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[RealOllama]":
    from real.ollama_server import RealOllama, need_server

    with RealOllama(need_server(), tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture
def real_ollama(_ollama_server: "RealOllama") -> "RealOllama":
    """The session's real Ollama server, with its model loaded and slots free, and nobody connected."""
    _ollama_server.make_ready()
    # Tests count from here: one that is on its way out would be counted as there.
    _ollama_server.wait_for_connections(0, timeout=20)
    return _ollama_server
