from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import trustme
from teardown.harness import Baseline, client_of, nothing_left_behind

from ollama_async import AsyncClient, CancelToken
from ollama_async.testing import FakeOllama


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(params=["tcp", "tls"])
def server(request: pytest.FixtureRequest, server_tls: ssl.SSLContext) -> Iterator[FakeOllama]:
    """A fake server, over TCP and over TLS."""
    with FakeOllama(ssl=server_tls if request.param == "tls" else None) as fake:
        yield fake


@pytest_asyncio.fixture(autouse=True)
async def nothing_left(server: FakeOllama) -> AsyncIterator[Baseline]:
    """Before and after each test the same is open, with the garbage collector off in between."""
    async with nothing_left_behind() as baseline:
        yield baseline


@pytest_asyncio.fixture
async def client(server: FakeOllama, client_tls: ssl.SSLContext, nothing_left: Baseline) -> AsyncIterator[AsyncClient]:
    async with client_of(server, verify=client_tls) as made:
        yield made


@pytest.fixture
def token() -> CancelToken:
    return CancelToken()
