"""Ports for the programs that the tests start."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# Below the ports that the kernel gives to whoever asks for any, so that a port is free again after a restart.
FIRST = 20_000
SLICE = 600
SLICES = 18

# HAProxy shares a port with whoever listens there, and nginx waits for it, so two processes of pytest-xdist must not
# take the same one: each counts through a slice of its own.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(range(FIRST + _worker % SLICES * SLICE, FIRST + (_worker % SLICES + 1) * SLICE))


def free_port() -> int:
    """A port of this process's slice that nobody listens on."""
    for port in itertools.islice(_ports, SLICE):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")
