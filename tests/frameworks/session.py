"""One framework in an environment made for it: ``python session.py FRAMEWORK [--quick] [--write]``.

``nox -s frameworks`` makes the environments.
It runs the framework's own unit tests and our conformance, first with the client that the framework comes with and then
with ours, and the framework's recipe in docs/frameworks.md. ``--write`` puts its rows into the table on that page. It
fails if anything is worse with ours than with the original, or if ours leaves a connection open.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from conformance import answer_without_end  # noqa: E402
from snippets import blocks, check_block  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "frameworks.md"
MARKS = ("<!-- frameworks-table -->\n", "<!-- /frameworks-table -->\n")
FRAMEWORKS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "frameworks.toml").read_text("utf-8"))
HEAD = (
    "framework",
    "client",
    "its own tests",
    "uses",
    "cancelled once",
    "cancelled twice",
    "timeout",
    "`break`",
    "in `token.scope()`",
    "token of a call",
)
ROUNDS = {"original": 120, "ours": 120}
# The original is only asked for what ours is compared with.
QUICK_ROUNDS = {"original": 0, "ours": 20}
LIMIT = 1800.0  # seconds, for what is only ever this slow if it hangs
# The client has to be there before the framework looks for it.
PYTEST = {
    "original": "import sys, pytest; sys.exit(pytest.main())",
    "ours": "from ollama_async import interop; interop.install(); import sys, pytest; sys.exit(pytest.main())",
}
CLIENTS = {
    "ollama": {"original": "ollama", "ours": "`interop`"},
    "httpx2": {"original": "httpx2", "ours": "`DirectTransport`"},
}


class Session:
    """The runs of one framework."""

    def __init__(self, name: str, rounds: dict[str, int]) -> None:
        self.name = name
        self.about = FRAMEWORKS[name]
        self.rounds = rounds
        self.package = re.split(r"[\[=]", self.about["install"][0])[0]

    def own_tests(self, folder: Path) -> dict[str, dict[str, str]]:
        """Return the outcome of each of its unit tests, with either client."""
        if "tests" not in self.about:
            return {}
        release = f"{self.package}=={version(self.package)}"
        download = ("pip", "download", "--quiet", "--no-deps", "--no-binary", self.package, "--dest", str(folder))
        subprocess.run([sys.executable, "-m", *download, release], check=True, timeout=LIMIT)
        (archive,) = folder.glob("*.tar.gz")
        shutil.unpack_archive(archive, folder)
        source = folder / archive.name.removesuffix(".tar.gz")
        outcomes = {}
        for client, program in PYTEST.items():
            report = folder / f"{client}.xml"
            options = ["-q", "-p", "no:cacheprovider", "-p", "no:ollama_async", f"--junitxml={report}"]
            subprocess.run(
                [sys.executable, "-c", program, *options, *self.about["tests"]],
                cwd=source,
                stdout=subprocess.DEVNULL,
                check=False,
                timeout=LIMIT,
            )
            outcomes[client] = dict(_outcomes(report))
        return outcomes

    def conformance(self) -> dict[str, dict[str, Any]]:
        """Return what the checks have found with either client."""
        found = {}
        for client, rounds in self.rounds.items():
            command = [sys.executable, str(HERE / "conformance.py"), self.name, client, str(rounds)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT).stdout
            found[client] = json.loads(output.splitlines()[-1])
        return found

    def recipes(self) -> None:
        """Run the recipes of what this session is of.

        Not of all that is installed: another framework may have brought a release that a recipe is not for.
        """
        pinned = [_name(package) for package in self.about["install"] if "==" in package]
        of_module = packages_distributions()
        ran = 0
        for page, line, needs, language, code in blocks():
            kind, _, module = (needs or "").partition(": ")
            if page != PAGE or language != "python" or kind != "needs":
                continue
            packages = {_name(package) for package in of_module.get(module.partition(".")[0], ())}
            if packages.isdisjoint(pinned) or not _is_there(module):
                continue
            ran += 1
            with tempfile.TemporaryDirectory() as folder:
                # What they warn of at import is not ours to mend.
                check_block(code, Path(folder), prepare=answer_without_end, warnings="ignore")
            print(f"{page.name}:{line} ran")
        if not ran:
            raise SystemExit(f"{PAGE.name} has no recipe of {', '.join(pinned)}")


def _outcomes(report: Path) -> Iterator[tuple[str, str]]:
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        yield f"{case.get('classname')}.{case.get('name')}", outcome


def _name(package: str) -> str:
    """Return the name of a package without its extras and its version, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=]", package)[0]).lower()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _bad(counted: Any) -> bool:
    return any(counted.values()) if isinstance(counted, dict) else bool(counted)


def faults(client: str, tests: dict[str, dict[str, str]], found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Name each way in which ours is worse than the original, or leaves a connection open."""
    if tests:
        for test, outcome in tests["original"].items():
            if tests["ours"].get(test) != outcome:
                yield f"{test}: {outcome} with the original, {tests['ours'].get(test)} with ours"
    original, ours = found["original"], found["ours"]
    for use, told in original["uses"].items():
        if ours["uses"].get(use) != told:
            yield f"{use}: {told!r} with the original, {ours['uses'].get(use)!r} with ours"
    for what in ("once", "twice", "timeout", "break"):
        # A framework that keeps its own stream after `break` leaves it open on whatever client.
        if _bad(ours[what]) and not (client == "httpx2" and what == "break" and _bad(original.get(what))):
            yield f"{what}: {ours[what]}"
    for what in ("scope", "token"):
        if "open" in (ours[what] or "") or ours[what] == "nothing":
            yield f"{what}: {ours[what]}"


def rows(session: Session, tests: dict[str, dict[str, str]], found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows of the table, one a client."""
    made = []
    for client, what in CLIENTS[session.about["client"]].items():
        given = found[client]
        outcomes = [*tests.get(client, {}).values()]
        same = sum(told == found["original"]["uses"][use] for use, told in given["uses"].items())
        cells = (
            f"{session.package} {version(session.package)}",
            what,
            f"{outcomes.count('passed')} passed, {outcomes.count('failed')} failed" if outcomes else "not published",
            f"{same} of {len(given['uses'])}",
            *(f"{given[times]['open']} open, {given[times]['refused']} refused" for times in ("once", "twice")),
            *(f"{given[way]} open" for way in ("timeout", "break")),
            f"`{given['scope']}`",
            f"`{given['token']}`" if given["token"] else "-",
        )
        made.append(row(cells))
    return made


def row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def write(package: str, made: list[str]) -> None:
    """Put the rows of a framework into the table."""
    text = PAGE.read_text("utf-8")
    begin, table, end = re.split(f"(?:{'|'.join(map(re.escape, MARKS))})", text)
    kept = [line + "\n" for line in table.splitlines()[2:] if line]
    order = [re.split(r"[\[=]", about["install"][0])[0] for about in FRAMEWORKS.values()]
    lines = [line for line in kept if _package(line) != package] + made
    lines.sort(key=lambda line: order.index(_package(line)))
    head = row(HEAD) + row(("---",) * len(HEAD))
    PAGE.write_text(f"{begin}{MARKS[0]}{head}{''.join(lines)}{MARKS[1]}{end}", "utf-8")


def _package(line: str) -> str:
    return line.split()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--quick", action="store_true", help="fewer cancellations, and none of the original")
    parser.add_argument("--write", action="store_true", help=f"put the rows into {PAGE.name}, too")
    parser.add_argument("--not-installed", action="store_true", help="the row of one that cannot be installed")
    given = parser.parse_args()
    if given.not_installed:
        name, _, release = re.sub(r"\[.*?\]", "", FRAMEWORKS[given.framework]["install"][0]).partition("==")
        write(name, [row((f"{name} {release}", "cannot be installed", *("-",) * (len(HEAD) - 2)))])
        return
    session = Session(given.framework, QUICK_ROUNDS if given.quick else ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        tests = session.own_tests(Path(folder))
    found = session.conformance()
    print(json.dumps({client: {**told, "uses": [*told["uses"]]} for client, told in found.items()}, indent=1))
    if not given.quick:
        made = rows(session, tests, found)
        print(*made, sep="", end="")
        if given.write:
            write(session.package, made)
    session.recipes()
    wrong = [*faults(session.about["client"], tests, found)]
    if wrong:
        raise SystemExit("\n".join(["ours is not as good as the original:", *wrong]))


if __name__ == "__main__":
    main()
