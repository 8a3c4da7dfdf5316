"""Programs that stand between a client and servers: Toxiproxy, which injects faults, nginx, HAProxy and Envoy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from real.needs import needs
from real.ollama_server import NotSeen, poll
from real.ports import free_port

TOXIPROXY = "v2.12.0"
"""The version that .ci/install-parts builds."""

ENVOY = "1.40.0"
"""The version that .ci/install-parts takes out of its package."""

DOCS = Path(__file__).parents[2] / "docs"
DEPLOYING = DOCS / "deploying.md"
BACKENDS = DOCS / "proxies.md"
UPSTREAM = "127.0.0.1:11434"
BIND = "127.0.0.1:8080"


def find_program(name: str) -> Path | None:
    """A program of .ci/install-parts: two in the cache folder, the others on PATH or in Debian's sbin."""
    versions = {"toxiproxy": TOXIPROXY, "envoy": ENVOY}
    if name in versions:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        built = cache / "ollama-async" / f"{name}-{versions[name]}" / name
        return built if built.is_file() else None
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")
    return Path(found) if found else None


def need_program(name: str) -> Path:
    found = find_program(name)
    if found is None:
        needs(name, how="run .ci/install-parts")
    return found


def snippet(language: str, page: Path = DEPLOYING) -> str:
    """The configuration that a page of the docs tells users to take."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)


def without(config: str, setting: str) -> str:
    """The same configuration without the lines of one setting."""
    lines = config.splitlines(keepends=True)
    kept = [line for line in lines if not line.strip().startswith(setting)]
    assert len(kept) < len(lines), f"{setting} is not in the configuration"
    return "".join(kept)


class Program:
    """A program that listens on a port of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.port = 0
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str | Path]:
        """What to run, for the port that has been chosen."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        for _ in range(5):
            self.port = free_port()
            with (self._folder / "output").open("wb") as output:
                self._process = subprocess.Popen(
                    self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            try:
                poll(self._listens, f"{self._process.args!r} to listen", timeout=20)
            except NotSeen:
                self.stop()
                raise
            if self._process.poll() is None:
                return self
        raise RuntimeError(f"no start: {(self._folder / 'output').read_text()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the program, and with it all its connections."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return True  # it ended by itself, for example because the port is taken
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class Nginx(Program):
    """nginx as one process, with a server block of its configuration."""

    def __init__(self, folder: Path, config: str, upstream: int) -> None:
        super().__init__(folder)
        self._program = need_program("nginx")
        self._config = config.replace(UPSTREAM, f"127.0.0.1:{upstream}")
        assert BIND in config

    def command(self) -> list[str | Path]:
        return nginx_command(self._program, self._folder, self._config.replace(BIND, f"127.0.0.1:{self.port}"))


def nginx_command(program: Path, folder: Path, config: str) -> list[str | Path]:
    """Write a configuration of nginx around blocks of it, and return what runs it as one process."""
    temporary = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n    access_log off;\n{temporary}"
        f"{config}}}\n"
    )
    return [program, "-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf"]


class Haproxy(Program):
    """HAProxy as one process, with its configuration but for a global section, which it does not need."""

    def __init__(self, folder: Path, config: str, upstream: int) -> None:
        super().__init__(folder)
        self._program = need_program("haproxy")
        self._config = config.replace(UPSTREAM, f"127.0.0.1:{upstream}")
        assert BIND in config

    def command(self) -> list[str | Path]:
        file = self._folder / "haproxy.cfg"
        file.write_text(self._config.replace(BIND, f"127.0.0.1:{self.port}"))
        return [self._program, "-db", "-f", file]


class Balancer(Program):
    """A proxy in front of two servers, with its configuration in docs/proxies.md."""

    def __init__(self, folder: Path, kind: str, upstreams: list[int]) -> None:
        super().__init__(folder)
        self._kind = kind
        self._program = need_program(kind)
        self._config = snippet("yaml" if kind == "envoy" else kind, BACKENDS)
        for port, upstream in zip(("11434", "11435"), upstreams, strict=True):
            assert self._config.count(port) == 1
            self._config = self._config.replace(port, str(upstream))

    def command(self) -> list[str | Path]:
        config = self._config.replace("8080", str(self.port))
        if self._kind == "nginx":
            return nginx_command(self._program, self._folder, config)
        file = self._folder / ("envoy.yaml" if self._kind == "envoy" else "haproxy.cfg")
        file.write_text(config)
        if self._kind == "haproxy":
            return [self._program, "-db", "-f", file]
        return [self._program, "-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warn"]


class Toxiproxy(Program):
    """Toxiproxy with one link to a server; its faults are switched on and off over HTTP.

    Attributes:
        link: The port that leads to the server.
    """

    def __init__(self, folder: Path, upstream: int) -> None:
        super().__init__(folder)
        self.link = 0
        self._program = need_program("toxiproxy")
        self._upstream = upstream

    def command(self) -> list[str | Path]:
        return [self._program, "-host", "127.0.0.1", "-port", str(self.port)]

    def __enter__(self) -> Self:
        super().__enter__()
        body = {"name": "link", "listen": "127.0.0.1:0", "upstream": f"127.0.0.1:{self._upstream}", "enabled": True}
        self.link = int(self._ask("POST", "/proxies", body)["listen"].rpartition(":")[2])
        return self

    @property
    def link_url(self) -> str:
        """The server's address, by way of the faults."""
        return f"http://127.0.0.1:{self.link}"

    def add(self, kind: str, stream: str = "downstream", **attributes: int) -> None:
        """Switch a fault on, for connections that stand already too.

        Args:
            kind: Toxiproxy's name of it.
            stream: "downstream" for what the server sends, "upstream" for what the client sends.
            **attributes: Its settings.
        """
        body = {"name": f"{kind}_{stream}", "type": kind, "stream": stream, "attributes": attributes}
        self._ask("POST", "/proxies/link/toxics", body)

    def enable(self, enabled: bool) -> None:
        """Listen, or refuse connections and break those that stand."""
        self._ask("POST", "/proxies/link", {"enabled": enabled})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=20) as answer:
            content = answer.read()
        return json.loads(content) if content else None
