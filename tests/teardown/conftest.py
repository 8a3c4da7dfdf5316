from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
from teardown.harness import Baseline, client_of, nothing_left_behind, through_proxy
from wire.tunnel import TunnelProxy

from ollama_async import AsyncClient, CancelToken
from ollama_async.testing import FakeOllama

# Of HTTP, to a server in the clear and to one over TLS.
THROUGH_PROXIES = ["proxy", "tunnel"]


@pytest.fixture(scope="session")
def tunnel() -> Iterator[TunnelProxy]:
    """A proxy on the way to servers that are reached over TLS."""
    with TunnelProxy() as proxy:
        yield proxy


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test over TCP and TLS, with --full over a unix socket and through proxies as well."""
    direct = any("server" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "server" in metafunc.fixturenames and not direct:
        over = ["tcp", "tls"]
        if metafunc.config.getoption("full"):
            over += ["uds", *(THROUGH_PROXIES if "client" in metafunc.fixturenames else [])]
        metafunc.parametrize("server", over, indirect=True)


@pytest.fixture
def server(
    request: pytest.FixtureRequest, server_tls: ssl.SSLContext, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FakeOllama]:
    """A fake server that listens as the parameter says."""
    if request.param in THROUGH_PROXIES:
        # Before anybody looks at what is open.
        request.getfixturevalue("tunnel")
    context = server_tls if request.param in ("tls", "tunnel") else None
    path = str(tmp_path_factory.mktemp("s") / "s") if request.param == "uds" else None
    with FakeOllama(ssl=context, uds=path) as fake:
        yield fake


@pytest.fixture
def full(pytestconfig: pytest.Config) -> bool:
    """Whether nothing may be left out."""
    return bool(pytestconfig.getoption("full"))


@pytest.fixture
def count_runs(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Tell how often a test has run its scenario, when that is not once."""
    return lambda count: record_property("runs", count)


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(server: FakeOllama) -> AsyncIterator[Baseline]:
    """Before and after each test the same is open, with the garbage collector off in between."""
    async with nothing_left_behind(limit=5.0) as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(
    request: pytest.FixtureRequest, server: FakeOllama, client_tls: ssl.SSLContext, nothing_left: Baseline
) -> AsyncIterator[AsyncClient]:
    if request.node.callspec.params["server"] in THROUGH_PROXIES:
        made = through_proxy(server, request.getfixturevalue("tunnel"), client_tls)
    else:
        made = client_of(server, verify=client_tls)
    async with made:
        yield made


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how often which scenarios of the contract were run."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if "teardown/" in report.nodeid]
    runs = sum(dict(report.user_properties).get("runs", 1) for report in passed)
    numbers = {number for report in passed for number in re.findall(r"::test_s(\d\d)_", report.nodeid)}
    if passed:
        terminalreporter.section("Teardown")
        terminalreporter.line(
            f"{runs} runs in {len(passed)} tests, of {len(numbers)} numbered scenarios and the matrix"
        )
