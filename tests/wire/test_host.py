from __future__ import annotations

import pytest

from ollama_async import AsyncClient, HostError
from ollama_async._host import env_api_key, env_proxy, parse_host

V6 = "[0001:002:003:0004::1]"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("  ", "http://127.0.0.1:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":56789", "http://127.0.0.1:56789"),
        ("1.2.3.4:56789", "http://1.2.3.4:56789"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("HTTPS://example.com", "https://example.com:443"),
        ("example.com", "http://example.com:11434"),
        ("example.com/", "http://example.com:11434"),
        ("example.com:56789/path/", "http://example.com:56789/path"),
        ("https://example.com:56789/a/b", "https://example.com:56789/a/b"),
        (V6, f"http://{V6}:11434"),
        (f"{V6}:56789/path", f"http://{V6}:56789/path"),
        (f"https://{V6}", f"https://{V6}:443"),
        ("1.2.3", "http://1.2.3:11434"),
        ("::1", "http://[::1]:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:11434"),
        ("[::]:8080", "http://[::1]:8080"),
        ("ollama.com", "https://ollama.com:443"),
        ("http://ollama.com", "http://ollama.com:80"),
        ("bücher.example", "http://xn--bcher-kva.example:11434"),
    ],
)
def test_an_address_is_read_as_the_server_reads_it(given: str | None, url: str) -> None:
    assert parse_host(given).url == url


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ftp://example.com", "scheme 'ftp'"),
        ("example.com:port", "port 'port'"),
        ("example.com:0", "port '0'"),
        ("example.com:65536", "port '65536'"),
        ("example.com:-1", "port '-1'"),
        ("example.com:\u0661", "port"),
        ("exa mple.com", "not a host name"),
        ("-a-", "not a host name"),
        ("[::1", "IPv6"),
        ("[::1]x", "IPv6"),
        ("1:2:zz", "IPv6"),
        # Of numbers alone, and not an address: httpx takes it for one.
        ("999.1.1.1", "invalid host '999.1.1.1'"),
        ("http://1.2.3.256:80", "invalid host '1.2.3.256:80'"),
        ("example.com/a b", "path"),
        ("example.com/a?b=c", "path"),
    ],
)
def test_an_invalid_address_is_refused_with_the_reason(given: str, said: str) -> None:
    with pytest.raises(HostError, match=said):
        AsyncClient(given)


def test_credentials_become_a_header_and_are_never_shown() -> None:
    host = parse_host("https://user:se%20cret@example.com/path")
    assert host.url == "https://example.com:443/path"
    assert host.credentials == "Basic dXNlcjpzZSBjcmV0"
    client = AsyncClient("https://user:secret@example.com")
    assert "secret" not in repr(client)
    with pytest.raises(HostError) as caught:
        AsyncClient("https://user:secret@example.com:port")
    assert "secret" not in str(caught.value)


def test_the_environment_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "example.com:1234")
    assert repr(AsyncClient()) == "<AsyncClient http://example.com:1234>"
    assert repr(AsyncClient("127.0.0.1")) == "<AsyncClient http://127.0.0.1:11434>"


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "127.8.9.1", "0.0.0.0", "ollama.localhost"])
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("ALL_PROXY", "socks5h://proxy.example:1080")
    assert env_proxy(parse_host(name)) is None


def test_other_hosts_are_reached_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    assert env_proxy(parse_host("https://example.com")) == "http://proxy.example:3128"
    assert env_proxy(parse_host("http://example.com")) is None
    assert env_proxy(parse_host("https://internal.example")) is None


@pytest.mark.parametrize(
    ("host", "spared"),
    [
        ("http://models.example:8080", True),
        ("http://models.example:8081", False),
        ("http://gpu.models.example:8080", True),
        ("http://plain.example", True),
        ("http://plain.example:8080", False),
        ("http://[fd00::1]:8080", True),
        ("http://[fd00::2]:8080", False),
    ],
)
def test_what_goes_past_the_proxy_may_be_named_with_its_port(
    monkeypatch: pytest.MonkeyPatch, host: str, spared: bool
) -> None:
    for name in ("http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "models.example:8080,plain.example:80,fd00::1")
    assert (env_proxy(parse_host(host)) is None) is spared


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("https://ollama.com", True),
        ("ollama.com", True),
        ("http://ollama.com", False),
        ("https://ollama.com.evil.example", False),
        ("https://notollama.com", False),
        ("127.0.0.1", False),
    ],
)
def test_the_key_of_the_environment_goes_to_ollama_over_tls_only(
    monkeypatch: pytest.MonkeyPatch, host: str, sent: bool
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "key")
    assert (env_api_key(parse_host(host)) == "key") is sent


@pytest.mark.parametrize(
    ("entry", "host", "spared"),
    [
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("192.168.5.1/16", "http://192.168.200.9:11434", True),
        ("fd00::/8", "http://[fd12::1]", True),
        ("fd00::/8", "http://10.1.2.3", False),
        ("10.0.0.0/8", "http://ten.example", False),
        ("10.0.0.0/99", "http://10.1.2.3", False),
        ("*.models.example", "http://gpu.models.example", True),
        ("*.models.example", "http://models.example", False),
        (".models.example", "http://gpu.models.example", True),
        (".models.example", "http://models.example", False),
        ("models.example", "http://othermodels.example", False),
        ("MODELS.example", "http://models.EXAMPLE", True),
        ("10.1.2.3:8080", "http://10.1.2.3:8080", True),
        ("10.1.2.3:8080", "http://10.1.2.3:8081", False),
        ("[fd00::1]:8080", "http://[fd00::1]:8080", True),
        ("[fd00::1]:8080", "http://[fd00::1]:8081", False),
        ("fd00:0:0::1", "http://[fd00::1]", True),
        ("a.example, *", "http://b.example", True),
        ("*", "http://b.example", True),
    ],
)
def test_no_proxy_is_read_as_go_and_curl_read_it(
    monkeypatch: pytest.MonkeyPatch, entry: str, host: str, spared: bool
) -> None:
    for name in ("http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", entry)
    assert (env_proxy(parse_host(host)) is None) is spared
