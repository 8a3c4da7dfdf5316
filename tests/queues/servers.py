"""PostgreSQL and Temporal's development server, as child processes. Everything here blocks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from real.ports import free_port

BOUND = 60.0


def find_postgres() -> Path | None:
    """Return the folder of initdb and postgres; Debian's is not on PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


@contextmanager
def running(command: list[str | Path], answers: Callable[[], bool], log: Path, **options: object) -> Iterator[None]:
    """Run a server, from when it answers; it is killed afterwards, with what it started."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
    try:
        end = time.monotonic() + BOUND
        while not answers():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        # SIGINT to postgres is a fast shutdown, in which it ends its own processes.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(BOUND)
        finally:
            process.kill()
            process.wait(BOUND)


@contextmanager
def postgres(binaries: Path) -> Iterator[dict[str, str]]:
    """Run PostgreSQL; the variables are those that libpq connects by."""
    import psycopg

    # It refuses to run as root, and the user that it runs as instead cannot look into pytest's folders.
    options: dict[str, object] = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="queues-postgres-"))
    try:
        if options:
            shutil.chown(folder, "nobody")
        data = folder / "data"
        initialise = [binaries / "initdb", "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initialise, check=True, stdout=subprocess.DEVNULL, **options)
        variables = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port()), "PGUSER": "test", "PGDATABASE": "postgres"}
        command = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", variables["PGPORT"], "-k", "", "-F"]

        def answers() -> bool:
            try:
                psycopg.connect(address(variables)).close()
            except psycopg.OperationalError:
                return False
            return True

        with running(command, answers, folder / "log", **options):
            yield variables
    finally:
        shutil.rmtree(folder)


def address(variables: dict[str, str]) -> str:
    names = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGDATABASE": "dbname"}
    return " ".join(f"{names[name]}={value}" for name, value in variables.items())


def new_database(variables: dict[str, str], name: str) -> dict[str, str]:
    """Make a database with Procrastinate's tables; returns the variables for it."""
    import psycopg
    from procrastinate import App, SyncPsycopgConnector

    with psycopg.connect(address(variables), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    variables = {**variables, "PGDATABASE": name}
    with App(connector=SyncPsycopgConnector(conninfo=address(variables))).open() as app:
        app.schema_manager.apply_schema()
    return variables


@contextmanager
def temporal(binary: Path, folder: Path) -> Iterator[str]:
    """Run Temporal's server for development, which keeps all in memory; returns its address."""
    port = free_port()

    def answers() -> bool:
        said = subprocess.run(
            [binary, "operator", "cluster", "health", "--address", f"127.0.0.1:{port}"],
            capture_output=True,
            check=False,
        )
        return b"SERVING" in said.stdout

    command = [binary, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port)]
    with running([*command, "--log-level", "error"], answers, folder / "temporal.log"):
        yield f"127.0.0.1:{port}"
