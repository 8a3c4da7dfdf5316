"""The project's checks: `nox` gives a verdict in minutes, `nox -s all` runs the whole gate."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|venv"  # where uv is, it installs in a third of the time
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # they are skipped, and named in nox's summary
nox.options.sessions = ["quick"]

# Each of the processes of a session would compile and rewrite all modules of tests again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["UV_COMPILE_BYTECODE"] = "1"  # as pip does

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
OLDEST = PYTHONS[0]
# Ray alone is ten times the rest; `ray` has a session for it.
EXTRAS = ",".join(name for name in PYPROJECT["project"]["optional-dependencies"] if name != "ray")
INJECTION = "tests/injection"
# All of it waits more than it works: for sockets, servers, programs on a terminal, and pools that have lost a place.
# What belongs together stays in one process: tests/conftest.py says what.
AT_ONCE = ["-n", "4", "--dist", "loadgroup"]


def modules(*names: str) -> list[str]:
    """Return where modules of tests lie, in whichever folder."""
    found = {name: sorted(map(str, Path("tests").rglob(f"test_{name}.py"))) for name in names}
    assert all(found.values()), f"missing of {found}"
    return [path for paths in found.values() for path in paths]


TEARDOWN = ["tests/teardown", *modules("cancel")]
FULL = ["-n", "4", *TEARDOWN]


# The whole runs on the oldest Python. Beside it each other one, and the oldest dependencies, run a cut: nothing with
# the real server or the browser, and nothing that is the same everywhere. What each is there for is not cut.
def files(*names: str) -> str:
    return " or ".join(f"test_{name}.py" for name in names)


SAME_EVERYWHERE = files(
    *("alone", "cli_markdown", "costs", "design", "hostile", "injection", "jsontext", "layers", "linear", "matrix"),
    *("model", "output", "soak"),
)
NOT_ASYNCIO = files(
    *(
        "asgi",
        "batch",
        "chat",
        "cli",
        "cli_models",
        "cli_platforms",
        "cli_until",
        "context",
        "continue",
        "conversation",
    ),
    *("docs", "endpoints", "input", "objects", "record", "teardown_kit", "tools", "unpack", "until", "web"),
)
NOT_OTHERS = files(
    *("agent", "call_corners", "cancel", "conversation", "docs", "phases", "record", "retry", "teardown_kit", "unpack"),
    *("context", "continue", "until", "wire_corners"),
)
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
# The gate; what measures, searches or releases is asked for by name.
FRAMEWORKS_CI = ("langchain-ollama", "llama-index", "openai")
GATE = [
    *("lint", "types", "docs", "dropin"),
    *(f"frameworks-ci({name})" for name in FRAMEWORKS_CI),
    *(f"tests-{python}" for python in PYTHONS),
    "tests-min-deps",
]
# A verdict within minutes, with nothing but Python: each layer once, and the stops that a user presses.
QUICK = modules(
    *("client", "host", "input", "introspection", "layers", "ndjson", "phases", "pool", "registry", "request"),
    *("retry", "stops", "tools", "platforms"),
)
LEFT_OUT = (
    "the teardown matrix, injection at every line, a real Ollama server, Redis, proxies, a browser, other Pythons"
)
# What every system has, without a terminal, without /proc and without a server that somebody has to install.
PLATFORM = modules(
    *("batches", "client", "host", "input", "ndjson", "platforms", "registry", "request", "retry", "sparse", "tools"),
    # Windows does not tell which descriptors are open.
    *(["teardown_kit"] if sys.platform != "win32" else []),
)
# The release of ollama-python that we can stand in for.
OLLAMA_PYTHON = "0.6.3"
# The last release of Temporal's command line that `go install` alone can build.
TEMPORAL = "v1.5.1"
FRAMEWORKS = nox.project.load_toml("tests/frameworks/frameworks.toml")
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
def quick(session: nox.Session) -> None:
    """A verdict in a few minutes on any machine with Python: the tests that need nothing else, on the built wheel."""
    # Few packages, so that it is quick on a machine that has none of them.
    session.install(".[asgi,interop,otel,redis,testing]", *group("quick"))
    run_tests(session, *AT_ONCE, "-m", "not real and not browser", "-k", "not uvloop and not tls", *QUICK)
    session.log(f"Works here. Not run: {LEFT_OUT}. `nox -s all` runs these, and names what this machine lacks.")


@nox.session(name="all", venv_backend="none")
def all_(session: nox.Session) -> None:
    """The whole gate: style, types, documentation, and the tests on each supported Python that is installed."""
    for name in GATE:
        session.notify(name)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and spelling; workflows and issue forms, by their schemas."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")
    forms = Path(".github/ISSUE_TEMPLATE")
    for schema, paths in {
        "workflows": sorted(Path(".github/workflows").glob("*.yml")),
        "issue-forms": [forms / "bug.yml", forms / "idea.yml"],
        "issue-config": [forms / "config.yml"],
    }.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.github-{schema}", *map(str, paths))


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
        # The longest part of the gate: its log says where the time goes.
        run_tests(session, *AT_ONCE, "--durations=40", f"--ignore={INJECTION}", "tests", measured=True)
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
    if not session.posargs:
        # Of the tests' tools openai asks for a newer one.
        session.install("httpx2==2.0")
        run_tests(session, *AT_ONCE, "-k", "not uvloop and not tls", *modules("httpx2"))


@nox.session(name="tests-platform")
def tests_platform(session: nox.Session) -> None:
    """What can be tested on macOS and Windows as well, on the Python that nox has; not part of the gate on Linux."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    # On Windows nothing tells which descriptors are open, and the checks say so.
    run_tests(session, "-W", "default:not checked", *(session.posargs or PLATFORM))


@nox.session(python=OLDEST, venv_backend="venv")  # it calls pip
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


@nox.session(python=OLDEST, venv_backend="venv")  # it calls pip
@nox.parametrize("framework", [nox.param(name, id=name) for name in FRAMEWORKS])
def frameworks(session: nox.Session, framework: str) -> None:
    """Each framework's own tests and our conformance, with its client and with ours; half an hour.

    `-- --write` puts the table into docs/frameworks.md. A large one runs where it is named:
    `-- semantic-kernel --write`; with a name no other one runs.
    """
    named = [argument for argument in session.posargs if argument in FRAMEWORKS]
    if framework not in named and (named or FRAMEWORKS[framework].get("large")):
        session.skip("not asked for")
    options = [argument for argument in session.posargs if argument not in FRAMEWORKS]
    try:
        install_framework(session, framework)
    except nox.command.CommandFailed:
        if "--write" in options:
            session.run("python", "tests/frameworks/session.py", framework, "--not-installed")
        session.error(f"{framework} cannot be installed")
    session.run("python", "tests/frameworks/session.py", framework, *options, env={"PYTHONSAFEPATH": "1"})


@nox.session(name="frameworks-ci", python=OLDEST, venv_backend="venv")  # it calls pip
@nox.parametrize("framework", [nox.param(name, id=name) for name in FRAMEWORKS_CI])
def frameworks_ci(session: nox.Session, framework: str) -> None:
    """A cut of `frameworks`."""
    install_framework(session, framework)
    session.run("python", "tests/frameworks/session.py", framework, "--quick", env={"PYTHONSAFEPATH": "1"})


@nox.session(python=OLDEST)
def traces(session: nox.Session) -> None:
    """The spans of stopped calls, by our telemetry and by opentelemetry-instrumentation-ollama."""
    others = ("opentelemetry-instrumentation-ollama==0.62.4", "opentelemetry-sdk")
    session.install(".[otel]", f"ollama=={OLLAMA_PYTHON}", *others)
    session.run("python", "benchmarks/traces.py")


@nox.session(python=OLDEST)
def docs(session: nox.Session) -> None:
    """The documentation's site, into build/docs; warnings are errors. `-- --links` tries links to elsewhere too."""
    session.install(f".[{EXTRAS}]", *group("docs"))
    session.run("python", "docs/english.py")
    session.run("python", "docs/links.py")
    build = ("sphinx-build", "-W", "--keep-going", "-q", "-j", "2", "-d", "build/doctrees")
    session.run(*build, "-b", "html", "docs", "build/docs")
    session.run("python", "docs/look.py")
    if "--links" in session.posargs:
        session.run(*build, "-b", "linkcheck", "docs", "build/links")


@nox.session(python=OLDEST)
def pictures(session: nox.Session) -> None:
    """All pictures of the documentation; those of the chat page need a Chromium, and are named if there is none."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    for picture in sorted(Path("docs/images").glob("*.svg")):
        session.run("python", str(picture.with_suffix(".py")))
    session.run("python", "-m", "real.screenshots", env={"PYTHONPATH": "tests", "PYTHONSAFEPATH": "1"})


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
    run_tests(session, "-s", "--timeout=0", *modules("soak"), *session.posargs)


@nox.session(python=OLDEST)
@nox.parametrize("redis", ["6.4", "7.0", "8.0"])
def durable(session: nox.Session, redis: str) -> None:
    """Durable answers and the registry at full length, on redis-py 6.4 to 8, over RESP2 and RESP3; 5 minutes each.

    `-- --write` puts the results into docs/log.md.
    """
    session.install(f".[{EXTRAS}]", *group("tests"), f"redis~={redis}")
    modules = [f"tests/real/test_real_{name}.py" for name in ("durable", "durable_web", "redis")]
    cells = [session.run("python", "-c", "import redis; print(redis.__version__)", silent=True).strip()]
    for resp in ("2", "3"):
        env = {"OLLAMA_ASYNC_DURABLE": "long", "OLLAMA_ASYNC_RESP": resp, "PYTHONSAFEPATH": "1"}
        said = session.run("python", "-m", "pytest", "-q", "--timeout=300", *modules, env=env, silent=True)
        cells.append(re.sub(r" in .*", "", said.strip().splitlines()[-1]))
        session.log(f"redis-py {cells[0]}, RESP{resp}: {said.strip().splitlines()[-1]}")
    if "--write" in session.posargs:
        page = Path("docs/log.md")
        row = re.compile(rf"^\| {redis.partition('.')[0]}\.\S+ \|.*$", re.MULTILINE)
        text, count = row.subn(f"| {' | '.join(cells)} |", page.read_text("utf-8"))
        if count != 1:
            session.error(f"{page} has {count} rows for redis-py {redis}")
        page.write_text(text, "utf-8")


@nox.session(python=OLDEST)
def ray(session: nox.Session) -> None:
    """RayPool on a real cluster of two nodes on this machine; 3 minutes, 250 MB to install."""
    session.install(".[ray,testing]", *group("quick"))
    run_tests(session, "tests/cluster", *session.posargs)


@nox.session(python=OLDEST)
def queues(session: nox.Session) -> None:
    """Jobs that stream, in docket, SAQ, Procrastinate and Temporal, with real servers; 4 minutes.

    Redis and PostgreSQL are Debian's; Temporal's server for development is built by Go, once, in 10 minutes.
    """
    engines = ("pydocket>=0.27", "saq>=0.26", "procrastinate>=3.10", "psycopg[binary]>=3.3", "temporalio>=1.35")
    session.install(".[redis,testing]", *group("quick"), *engines)
    temporal = Path(".nox", f"temporal-{TEMPORAL}").absolute()
    if not shutil.which("temporal") and not (temporal / "temporal").exists() and shutil.which("go"):
        build = ("go", "install", f"github.com/temporalio/cli/cmd/temporal@{TEMPORAL}")
        session.run(*build, external=True, env={"GOBIN": str(temporal)})
    session.env["PATH"] = f"{session.env.get('PATH') or os.environ['PATH']}{os.pathsep}{temporal}"
    run_tests(session, "tests/queues", *session.posargs)


@nox.session(python=OLDEST, venv_backend="venv")  # it calls pip
def fuzz(session: nox.Session) -> None:
    """Search for inputs that break what reads bytes, 10 seconds a target; `-- --seconds 600 [target ...]` is longer."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    # There are wheels for some machines only. Where it is missing hypothesis searches alone.
    session.run("python", "-m", "pip", "install", "--only-binary=atheris", "atheris>=3", success_codes=[0, 1])
    # What breaks a target is put into the corpus in this folder.
    env = {"PYTHONPATH": "tests", "PYTHONSAFEPATH": "1"}
    session.run("python", "-m", "fuzz.search", *session.posargs, env=env)


@nox.session(python=OLDEST)
def mutants(session: nox.Session) -> None:
    """The core, broken in small ways one at a time: a test has to notice; hours, and it goes on where it was.

    A module is named as in tests/mutants/mutants.toml: `-- _call/retry`. `-- --sample 150` tries a part.
    """
    session.install(f".[{EXTRAS}]", *group("tests"), *group("mutants"))
    session.run(
        "python",
        "tests/mutants/run.py",
        *session.posargs,
        env={"PYTHONPATH": str(Path("tests").absolute()), "PYTHONSAFEPATH": "1"},
    )


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


@nox.session(name="release-check", python=OLDEST, venv_backend="venv")  # it calls pip
def release_check(session: nox.Session) -> None:
    """What a release needs: one version, its changelog entry, and archives that build alike, are whole and work.

    `-- --unreleased` does without the entry, `--tag=v1.2.3` compares a tag, `--keep=FOLDER` keeps the archives there.
    """
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in session.posargs)
    version = re.search(r'^__version__ = "(.+)"$', Path("ollama_async/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
    changelog = Path("CHANGELOG.md").read_text("utf-8")
    if options.get("tag", f"v{version}") != f"v{version}":
        session.error(f"the tag is {options['tag']}, the version {version}")
    if f"\n## [{version}]" not in changelog and "unreleased" not in options:
        session.error(f"CHANGELOG.md has no entry for {version}; before a release is cut: -- --unreleased")
    session.install("build", "twine")
    # Time and order of the files come from here, so that two builds are the same bytes.
    epoch = subprocess.run(["git", "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False).stdout
    env = {"SOURCE_DATE_EPOCH": epoch.strip() or "315532800"}
    folders = [Path(session.create_tmp(), name) for name in ("first", "second")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        session.run("python", "-m", "build", "--outdir", str(folder), env=env, silent=True)
    first, second = ({path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders)
    if first != second:
        session.error("two builds of the same files differ")
    for name, content in first.items():
        if version not in name:
            session.error(f"{name} is not of version {version}")
        session.log(f"{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    archives = sorted(folders[0].iterdir())
    session.run("twine", "check", "--strict", *map(str, archives))
    check_contents(session, *archives)
    # The wheel, with the tests' tools and nothing else, in an environment that has seen no checkout.
    empty = Path(session.create_tmp(), "empty")
    shutil.rmtree(empty, ignore_errors=True)
    session.run("python", "-m", "venv", str(empty), silent=True)
    python = str(empty.absolute() / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    wheel = next(path for path in archives if path.suffix == ".whl")
    extra = f"ollama-async[testing] @ {wheel.absolute().as_uri()}"
    session.run(python, "-m", "pip", "install", "--quiet", extra, "pytest-asyncio", "pytest-timeout", external=True)
    session.run(
        python, "-c", "import ollama_async; print(ollama_async.AsyncClient, ollama_async.__file__)", external=True
    )
    alone = modules("host", "ndjson", "request", "retry")
    session.run(python, "-m", "pytest", "-q", *alone, external=True, env={"PYTHONSAFEPATH": "1"})
    if "keep" in options:
        shutil.copytree(folders[0], options["keep"], dirs_exist_ok=True)


def check_contents(session: nox.Session, *archives: Path) -> None:
    """List what the archives have, and fail for what may not be missing or be there."""
    for archive in archives:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                names = wheel.namelist()
            needed = {"ollama_async/py.typed", "ollama_async/cli/web/page.js"}
        else:
            with tarfile.open(archive) as sdist:
                names = [name.partition("/")[2] for name in sdist.getnames()]
            needed = {"README.md", "CHANGELOG.md", "LICENSE", "noxfile.py", "tests/conftest.py", "docs/conf.py"}
        folders: dict[str, int] = {}
        for name in names:
            folders[name.rpartition("/")[0]] = folders.get(name.rpartition("/")[0], 0) + 1
        session.log(f"{archive.name}: " + ", ".join(f"{folder or '.'} {count}" for folder, count in folders.items()))
        if missing := needed - {*names}:
            session.error(f"{archive.name} lacks {', '.join(sorted(missing))}")
        if stray := [name for name in names if re.search(r"(^|/)(__pycache__|\.nox|\.env|build)/|\.pyc$", name)]:
            session.error(f"{archive.name} has {', '.join(stray)}")


# Whose next release is tried. httpx 1.0 is another library by the same name, without AsyncClient.
NEXT = ["anyio", "httptools", "httpx<1", "httpx2", "ollama", "pydantic", "redis", "starlette"]


@nox.session(name="pre-releases", python=OLDEST, venv_backend="venv")  # it calls pip
def pre_releases(session: nox.Session) -> None:
    """The cut of the tests with what comes next: pre-releases of what the library rests on; not part of the gate."""
    session.install(f".[{EXTRAS}]", *group("tests"))
    session.install("--upgrade", "--pre", *NEXT)
    session.run("python", "-m", "pip", "freeze")
    # A deprecation there is what this session is for: shown, no failure.
    warnings = ("-W", "default::DeprecationWarning", "-W", "default::PendingDeprecationWarning")
    run_tests(session, *warnings, *(session.posargs or cut("min-deps")))


@nox.session
def coverage(session: nox.Session) -> None:
    """What the tests have covered."""
    session.install("coverage[toml]")
    session.env["COVERAGE_FILE"] = str(COVERAGE / ".coverage")
    session.run("coverage", "combine", "--keep", *map(str, COVERAGE.glob("tests-3*/.coverage*")))
    session.run("coverage", "report")
    # What teardown rests on; an exclusion has its reason beside it.
    core = ",".join(f"*/ollama_async/{part}" for part in ("_cancel.py", "_wire/*", "_call/*"))
    session.run("coverage", "report", f"--include={core}", "--fail-under=100")


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


def install_framework(session: nox.Session, name: str) -> None:
    framework = FRAMEWORKS[name]
    session.install(".[testing]", "httpx2>=2", *framework["install"], *framework.get("needs", ()))


def requirements() -> list[str]:
    project = PYPROJECT["project"]
    extras = [needs for name, needs in project["optional-dependencies"].items() if name in EXTRAS.split(",")]
    return sorted({*project["dependencies"], *(need for extra in extras for need in extra)})


def oldest_version(requirement: str) -> str:
    need = Requirement(requirement)
    [bound] = [specifier.version for specifier in need.specifier if specifier.operator == ">="]
    return f"{need.name}=={bound}"
