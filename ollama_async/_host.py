"""The server's address: the rules of ``OLLAMA_HOST``, as the server and ollama-python read it."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import urllib.parse
import urllib.request
from typing import NamedTuple

import httpx

from ._errors import HostError
from ._secret import Secret

_DEFAULT_PORT = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


class ServerAddress(NamedTuple):
    """A server's address.

    Attributes:
        url: Base URL, without credentials and without a slash at its end.
        name: Host name or IP address.
        credentials: The value of an ``Authorization`` header, if the address has a user name.
    """

    url: str
    name: str
    credentials: str | None

    def __repr__(self) -> str:
        return f"<ServerAddress {self.url}>"


def parse_host(given: str | None) -> ServerAddress:
    """Read an address in the form of ``OLLAMA_HOST``.

    Scheme, port and path may be left out: the defaults are ``http``, 11434 and no path; with a scheme, the port is that
    scheme's. An address that only a server can listen on (``0.0.0.0``, ``::``) is dialled as loopback.

    Args:
        given: The address; ``None`` and ``""`` are ``http://127.0.0.1:11434``.

    Raises:
        HostError: The address is invalid. The text never shows credentials.
    """
    secret, given = Secret(given), None
    scheme, address, path, credentials = _taken_apart(secret)
    if scheme is None:
        # Not shown: it may be a password.
        raise HostError("invalid host: it has an '@' in the wrong place; write a '/' in a password as %2F")
    if scheme not in ("", "http", "https"):
        raise HostError(f"invalid host: it has the scheme {scheme!r}; give http or https")
    name, port = _split_port(address)
    if name.lower() == "ollama.com" and not scheme and not port:
        scheme = "https"
    number = _port(port) if port else _DEFAULT_PORT[scheme] if scheme else 11434
    name = _name(name)
    shown = f"[{name}]" if ":" in name else name
    url = f"{scheme or 'http'}://{shown}:{number}{_path(path)}"
    try:
        # Some labels cannot be decoded; httpx finds out only when it is asked for the name.
        _ = httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError) as exc:
        raise HostError(f"invalid host {address!r}: {exc}") from exc
    return ServerAddress(url, name, credentials.value)


def _taken_apart(given: Secret[str | None]) -> tuple[str | None, str, str, Secret[str | None]]:
    """Return scheme, address, path and ``Authorization`` value; the scheme is ``None`` if that is unclear."""
    text = (given.value or "").strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    scheme = scheme.lower()
    authority, _, path = rest.partition("/")
    if "@" in path or ("@" in text and not re.fullmatch("[a-z]*", scheme)):
        return None, "", "", Secret(None)
    userinfo, _, address = authority.rpartition("@")
    return scheme, address, path, Secret(_basic(userinfo) if userinfo else None)


def _split_port(address: str) -> tuple[str, str]:
    if address.startswith("["):
        name, bracket, port = address[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise HostError(f"invalid host {address!r}: write an IPv6 address as [::1]:11434")
        return name, port[1:]
    if address.count(":") > 1:
        return address, ""
    name, _, port = address.partition(":")
    return name, port


def _port(text: str) -> int:
    # isdecimal() alone also takes digits of other scripts.
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or not 0 < int(text) < 65536:
        raise HostError(f"invalid host: it has the port {text[:20]!r}; give a number from 1 to 65535")
    return int(text)


def _name(name: str) -> str:
    if not name:
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        if ":" in name:
            return _loose_ipv6(name)
        return _dns_name(name)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return name


def _loose_ipv6(name: str) -> str:
    # Leading zeros ("0001:002:...") and zones are for the resolver to judge.
    if re.fullmatch(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?", name):
        return name
    raise HostError(f"invalid host {name!r}: it is not an IPv6 address")


def _dns_name(name: str) -> str:
    try:
        ascii_name = name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError as exc:
        raise HostError(f"invalid host {name!r}: it is not a host name") from exc
    if ascii_name != name and _is_address(ascii_name):
        # Made of letters that IDNA drops or changes: no real name looks like this.
        raise HostError(f"invalid host {name!r}: it is not a host name")
    if not _HOST_NAME.fullmatch(ascii_name):
        raise HostError(f"invalid host {name!r}: it is not a host name")
    return ascii_name.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _path(path: str) -> str:
    path = path.strip("/")
    if not path:
        return ""
    if re.search(r"[\x00-\x20\x7f?#]", path):
        raise HostError("invalid host: its path has a character that is not allowed in a path")
    return "/" + path


def _basic(userinfo: str) -> str:
    plain = urllib.parse.unquote(userinfo)
    # Lone surrogates cannot be encoded; a password that has one gets a 401.
    return "Basic " + base64.b64encode(plain.encode("utf-8", "replace")).decode("ascii")


def is_loopback(name: str) -> bool:
    """Whether a host name is this machine."""
    if name.lower() == "localhost" or name.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def env_proxy(host: ServerAddress, *, even_local: bool = False) -> str | None:
    """Return the proxy that the environment names for a host; none for this machine unless ``even_local``."""
    return EnvironmentProxies(even_local=even_local).for_url(httpx.URL(host.url))


class EnvironmentProxies:
    """The proxies that the environment names, as it is when this is made; false if it names none.

    ``NO_PROXY`` is read as Go and curl read it: names (with their subdomains), ``*.name`` and ``.name`` (the subdomains
    alone), addresses, networks such as ``10.0.0.0/8``, each with a port if wanted, and ``*``.

    Args:
        even_local: Whether a server on this machine is reached through a proxy, too.
    """

    def __init__(self, *, even_local: bool = False) -> None:
        named = urllib.request.getproxies_environment()
        self._even_local = even_local
        self._spared = [entry.strip() for entry in named.pop("no", "").split(",") if entry.strip()]
        self._proxies = {
            scheme: proxy if "://" in proxy else f"http://{proxy}" for scheme, proxy in named.items() if proxy
        }

    def __bool__(self) -> bool:
        return bool(self._proxies)

    @property
    def urls(self) -> list[str]:
        """The proxies, each once."""
        return [*dict.fromkeys(self._proxies.values())]

    def for_url(self, url: httpx.URL) -> str | None:
        """Return the proxy for a URL, ``None`` for none."""
        name = url.raw_host.decode("ascii")
        proxy = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not proxy or (is_loopback(name) and not self._even_local):
            return None
        port = _DEFAULT_PORT.get(url.scheme) if url.port is None else url.port
        return None if any(_spares(entry, name, port) for entry in self._spared) else proxy


def _spares(entry: str, name: str, port: int | None) -> bool:
    """Whether an entry of ``NO_PROXY`` names a host and its port."""
    if entry == "*":
        return True
    if "/" in entry:
        return _in_network(name, entry)
    host, colon, wanted = entry.rpartition(":")
    # Not the last part of an IPv6 address without brackets.
    if colon and wanted.isdecimal() and (":" not in host or host.endswith("]")):
        if int(wanted) != port:
            return False
        entry = host
    entry = entry.strip("[]").lower()
    if _is_address(entry):
        return _is_address(name) and ipaddress.ip_address(name) == ipaddress.ip_address(entry)
    entry = entry.removeprefix("*")
    return name.lower().endswith(entry if entry.startswith(".") else f".{entry}") or name.lower() == entry


def _in_network(name: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def env_api_key(host: ServerAddress, *, anywhere: bool = False) -> str | None:
    """Return ``OLLAMA_API_KEY`` if the host is ollama.com over TLS; for any other host only if ``anywhere``."""
    if not anywhere and not is_ollama_com(host):
        return None
    return os.environ.get("OLLAMA_API_KEY", "").strip() or None


def is_ollama_com(host: ServerAddress) -> bool:
    """Whether a host is ollama.com over TLS."""
    return host.url.startswith("https://") and (host.name == "ollama.com" or host.name.endswith(".ollama.com"))
