"""The project's checks: `pip install nox && nox` runs them all, on each supported Python that is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # they are skipped, and named in nox's summary
nox.options.sessions = ["lint", "types", "dropin", "tests", "tests-min-deps"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
OLDEST = PYTHONS[0]
EXTRAS = ",".join(PYPROJECT["project"]["optional-dependencies"])
TEARDOWN = ["tests/teardown", "tests/test_cancel.py"]
INJECTION = "tests/injection"
# All of it waits more than it works: for sockets, servers, programs on a terminal, and pools that have lost a place.
# What belongs together stays in one process: tests/conftest.py says what.
AT_ONCE = ["-n", "4", "--dist", "loadgroup"]
FULL = ["-n", "4", *TEARDOWN]


# The whole runs on the oldest Python. Beside it each other one, and the oldest dependencies, run a cut: nothing with
# the real server or the browser, and nothing that is the same everywhere. What each is there for is not cut.
def files(*names: str) -> str:
    return " or ".join(f"test_{name}.py" for name in names)


SAME_EVERYWHERE = files(
    "cli_markdown", "costs", "hostile", "injection", "layers", "linear", "matrix", "model", "output", "soak"
)
NOT_ASYNCIO = files(
    *("asgi", "batch", "chat", "cli", "cli_models", "cli_platforms", "docs", "endpoints", "input", "tools", "web"),
    *("teardown_kit", "unpack"),
)
NOT_OTHERS = files("cancel", "docs", "phases", "retry", "teardown_kit", "unpack")
CUT_OF = {
    # The newest: the code as it is today, and every way to stop on uvloop as well.
    "3.13": f"(not uvloop or test_stops.py) and not ({SAME_EVERYWHERE} or test_teardown_kit.py)",
    # In between: what rests on asyncio.
    "3.12": f"not uvloop and not tls and not ({SAME_EVERYWHERE} or {NOT_ASYNCIO})",
    # What rests on others: httpx, anyio, pydantic, typer, rich, starlette, redis.
    "min-deps": f"not uvloop and (not tls or test_foreign.py) and not ({SAME_EVERYWHERE} or {NOT_OTHERS})",
    # 3.14 and 3.15, where they are installed.
    "other": f"not uvloop and not ({SAME_EVERYWHERE})",
}
# What every system has, without a terminal, without /proc and without a server that somebody has to install.
PLATFORM = [
    f"tests/{name}.py"
    for name in (
        "test_batches",
        "test_client",
        "test_host",
        "test_input",
        "test_ndjson",
        "test_platforms",
        "test_registry",
        "test_request",
        "test_retry",
        "test_sparse",
        "test_tools",
        # Windows does not tell which descriptors are open.
        *(["test_teardown_kit"] if sys.platform != "win32" else []),
    )
]
# The release of ollama-python that we can stand in for.
OLLAMA_PYTHON = "0.6.3"
COVERAGE = Path(".nox", "coverage-data").absolute()


def is_installed(python: str) -> bool:
    command = shutil.which(f"python{python}")
    # pyenv puts commands on PATH for versions that are not switched on; those only fail.
    return command is not None and subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode == 0


# On the other systems CI runs one session, on the Python that it has.
if os.environ.get("CI") == "true" and sys.platform == "linux" and not is_installed(OLDEST):
    raise SystemExit(f"with CI=true, Python {OLDEST} has to be there")


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and spelling."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Types, by two checkers."""
    session.install(f".[{EXTRAS}]", *group("types"))
    session.run("mypy")
    session.run("pyright")
    # Where no test of ours has run, the types at least are looked at.
    session.run("mypy", "--platform", "win32")
    session.run("mypy", "--platform", "darwin")
    session.run("pyright", "--pythonplatform", "Windows")
    session.run("pyright", "--pythonplatform", "Darwin")
    # As a user's checker sees the installed package, which the configuration of this project would hide.
    folder = Path(session.create_tmp(), "snippets")
    session.run("python", "tests/snippets.py", str(folder))
    with session.chdir(folder):
        session.run("pyright", "--verifytypes", "ollama_async", "--ignoreexternal")
        session.run("pyright")


@nox.session(python=OLDEST)
def teardown(session: nox.Session) -> None:
    """Every way to stop, on every path, and cuts of the matrix and of `injection`; `tests` has them as well.

    `-- --full` runs all of the matrix, on each installed Python.
    """
    session.install(f".[{EXTRAS}]", *group("tests"))
    if "--full" not in session.posargs:
        run_tests(session, *AT_ONCE, *TEARDOWN, *session.posargs)
        if not session.posargs:
            run_tests(session, "-n", "2", INJECTION)
        return
    run_tests(session, *FULL, *session.posargs)
    for python in PYTHONS[1:]:
        session.notify(f"teardown-full-{python}", session.posargs)
    session.notify("teardown-full-min-deps", session.posargs)


@nox.session(name="teardown-full", python=PYTHONS[1:])
def teardown_full(session: nox.Session) -> None:
    """The teardown matrix on a newer Python; follows `teardown -- --full` by itself."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    run_tests(session, *FULL, *session.posargs)


@nox.session(name="teardown-full-min-deps", python=OLDEST)
def teardown_full_min_deps(session: nox.Session) -> None:
    """The teardown matrix with the oldest dependencies; follows `teardown -- --full` by itself."""
    session.install(f".[{EXTRAS}]", *group("tests"), *map(oldest_version, requirements()))
    run_tests(session, *FULL, *session.posargs)


@nox.session(python=OLDEST)
def injection(session: nox.Session) -> None:
    """Ctrl-C, an abort and a cancellation at every line of the core, in every scene; half an hour."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    run_tests(session, "-n", "2", "--timeout=0", "--full", INJECTION, *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, against the built and installed wheel: all of them on the oldest Python, a cut on the others."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    if session.posargs:
        run_tests(session, *session.posargs)
    elif session.python == OLDEST:
        run_tests(session, *AT_ONCE, f"--ignore={INJECTION}", "tests", measured=True)
        # Not measured: coverage sits where the instrument has to.
        run_tests(session, "-n", "2", INJECTION)
        session.notify("coverage")
    else:
        run_tests(session, *cut(str(session.python)))


@nox.session(name="tests-min-deps", python=OLDEST)
def tests_min_deps(session: nox.Session) -> None:
    """A cut of the tests with the oldest versions of our dependencies that pyproject.toml allows."""
    session.install(f".[{EXTRAS}]", *group("tests"), *map(oldest_version, requirements()))
    run_tests(session, *(session.posargs or cut("min-deps")))


@nox.session(name="tests-platform")
def tests_platform(session: nox.Session) -> None:
    """What can be tested on macOS and Windows as well, on the Python that nox has; not part of the gate on Linux."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    # On Windows nothing tells which descriptors are open, and the checks say so.
    run_tests(session, "-W", "default:not checked", *(session.posargs or PLATFORM))


@nox.session(python=OLDEST)
def dropin(session: nox.Session) -> None:
    """What ollama-python's own tests demand of its AsyncClient, tools and images, demanded of ours."""
    session.install(".", "anyio", "httpx", "pytest>=8.4", "pytest-httpserver>=1.1")
    folder = session.create_tmp()
    download = ("pip", "download", "--quiet", "--no-deps", "--no-binary", "ollama", "--dest", folder)
    session.run("python", "-m", *download, f"ollama=={OLLAMA_PYTHON}")
    shutil.unpack_archive(Path(folder, f"ollama-{OLLAMA_PYTHON}.tar.gz"), folder)
    tests = Path(folder, f"ollama-{OLLAMA_PYTHON}", "tests")
    # Not its configuration, which would import ollama from beside its tests.
    options = ("-q", "-c", os.devnull, "--rootdir", str(tests), "--import-mode=importlib", "-p", "ollama_aliases")
    aliases = str(Path("tests", "dropin").absolute())
    files = [
        str(tests / name)
        for name in ("test_client.py", "test_systemone.py", "test_type_serialization.py", "test_utils.py")
    ]
    session.run("python", "-m", "pytest", *options, *files, env={"PYTHONPATH": aliases})


@nox.session(python=OLDEST)
def bench(session: nox.Session) -> None:
    """All benchmarks against all clients, an hour; `-- --quick` is a smaller one of under 3 minutes."""
    session.install(".", *group("bench"))
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session(name="bench-real", python=OLDEST)
def bench_real(session: nox.Session) -> None:
    """The benchmarks that need a real Ollama server: what reading costs, how soon a stop is felt."""
    session.install(".", *group("bench"), *group("tests"))
    session.run("python", "benchmarks/real_server.py", *session.posargs)


@nox.session(python=OLDEST)
def soak(session: nox.Session) -> None:
    """10,000 streams that are stopped at random moments, and 1,000 of a real server; a few minutes."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    session.env["OLLAMA_ASYNC_SOAK"] = "10000"
    run_tests(session, "-s", "--timeout=0", "tests/test_soak.py", *session.posargs)


@nox.session(python=OLDEST)
def fuzz(session: nox.Session) -> None:
    """Search for inputs that break what reads bytes, 10 seconds a target; `-- --seconds 600 [target ...]` is longer."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    # There are wheels for some machines only. Where it is missing hypothesis searches alone.
    session.run("python", "-m", "pip", "install", "--only-binary=atheris", "atheris>=3", success_codes=[0, 1])
    # What breaks a target is put into the corpus in this folder.
    env = {"PYTHONPATH": "tests", "PYTHONSAFEPATH": "1"}
    session.run("python", "-m", "fuzz.search", *session.posargs, env=env)


@nox.session(name="server-leak", python=OLDEST)
def server_leak(session: nox.Session) -> None:
    """How soon a real server with one slot hangs when answers are left early, by several clients; a few minutes."""
    session.install(".", *group("tests"), f"ollama=={OLLAMA_PYTHON}")
    session.run("python", "benchmarks/server_leak.py", *session.posargs)


@nox.session(name="contract-table", python=OLDEST)
def contract_table(session: nox.Session) -> None:
    """The contract's checks on other clients as well; `-- --write` puts the table into docs/contract.md."""
    session.install(".[testing]", "httpx2>=2", f"ollama=={OLLAMA_PYTHON}", "openai>=3")
    session.run("python", "benchmarks/contract_table.py", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """What the tests have covered."""
    session.install("coverage[toml]")
    session.env["COVERAGE_FILE"] = str(COVERAGE / ".coverage")
    session.run("coverage", "combine", "--keep", *map(str, COVERAGE.glob("tests-3*/.coverage*")))
    session.run("coverage", "report")


def cut(of: str) -> tuple[str, ...]:
    return *AT_ONCE, "-m", "not real and not browser", "-k", CUT_OF.get(of, CUT_OF["other"])


def run_tests(session: nox.Session, *arguments: str, measured: bool = False) -> None:
    # A safe path is one without the working folder: what is imported is the installed wheel.
    env = {"PYTHONSAFEPATH": "1"}
    if not measured:
        session.run("python", "-m", "pytest", "-q", *arguments, env=env)
        return
    data = COVERAGE / session.name
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    env["COVERAGE_FILE"] = str(data / ".coverage")
    # By pytest-cov, which measures in each of the processes.
    session.run("python", "-m", "pytest", "-q", "--cov", "--cov-report=", *arguments, env=env)


def requirements() -> list[str]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    return sorted({*project["dependencies"], *(need for extra in extras for need in extra)})


def oldest_version(requirement: str) -> str:
    need = Requirement(requirement)
    [bound] = [specifier.version for specifier in need.specifier if specifier.operator == ">="]
    return f"{need.name}=={bound}"
