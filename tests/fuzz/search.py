"""Search for inputs that break a target: ``python -m fuzz.search [--seconds N] [target ...]``.

Each target is searched for N seconds by hypothesis, which changes cases in ways that make sense. Where atheris can be
imported it gets half of that time, and looks for inputs that reach new lines of the package. What breaks a target is
made small and put into its corpus, where the tests find it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuzz.cases import CASES, WORDS
from fuzz.oracles import ORACLES
from fuzz.strategies import CORPUS, inputs, stored
from hypothesis import HealthCheck, given, settings

__all__: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.search")
    parser.add_argument("--seconds", type=float, default=10, help="how long each target is searched (default: 10)")
    parser.add_argument("targets", nargs="*", choices=[[], *ORACLES], help="default: all")
    options = parser.parse_args()
    has_atheris = importlib.util.find_spec("atheris") is not None
    means = "hypothesis and atheris" if has_atheris else "hypothesis; atheris is not installed"
    print(f"{options.seconds:g} seconds a target, by {means}", flush=True)
    broken = 0
    for target in options.targets or ORACLES:
        seconds = options.seconds / 2 if has_atheris else options.seconds
        found = by_hypothesis(target, seconds)
        try:
            if found is None and has_atheris:
                found = by_atheris(target, seconds)
        except subprocess.CalledProcessError:
            # The other targets are searched all the same.
            broken += 1
        if found is not None:
            broken += 1
            keep(target, smaller(target, found))
    return int(broken > 0)


def by_hypothesis(target: str, seconds: float) -> bytes | None:
    end, tried, found = time.monotonic() + seconds, 0, b""

    @settings(
        max_examples=200, deadline=None, database=None, derandomize=False, suppress_health_check=list(HealthCheck)
    )
    @given(inputs(target))
    def attempt(data: bytes) -> None:
        nonlocal tried, found
        tried += 1
        try:
            ORACLES[target](data)
        except Exception:
            # The last of them is the smallest.
            found = data
            raise

    while time.monotonic() < end:
        try:
            attempt()
        except Exception:
            print(f"{target}: hypothesis tried {tried:,} inputs and broke it", flush=True)
            return found
    print(f"{target}: hypothesis tried {tried:,} inputs", flush=True)
    return None


def by_atheris(target: str, seconds: float) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        corpus, artifacts, words = Path(folder, "corpus"), Path(folder, "artifacts"), Path(folder, "words")
        corpus.mkdir()
        artifacts.mkdir()
        for known in [*CASES[target], *(path.read_bytes() for path in stored(target))]:
            (corpus / name(known)).write_bytes(known)
        began_with = len([*corpus.iterdir()])
        words.write_text("".join(f'"{escaped(word)}"\n' for word in WORDS[target] if word))
        limits = ["-max_len=600", "-timeout=30", f"-max_total_time={max(1, round(seconds))}"]
        paths = [f"-dict={words}", f"-artifact_prefix={artifacts}/", str(corpus)]
        command = [sys.executable, "-m", "fuzz.under_atheris", target, *limits, *paths]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        broken = [path.read_bytes() for path in artifacts.iterdir()]
        if ran.returncode and not broken:
            print(f"{target}: atheris failed with {ran.returncode}:\n{ran.stderr[-3000:]}", flush=True)
            raise subprocess.CalledProcessError(ran.returncode, command)
        new = len([*corpus.iterdir()]) - began_with
    print(f"{target}: atheris kept {new} new inputs{' and broke it' if broken else ''}", flush=True)
    return broken[0] if broken else None


def escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def smaller(target: str, data: bytes) -> bytes:
    """Leave out of an input what is not needed to break its target in the same way."""
    kind = type(failure(target, data))
    size = len(data)
    while size := size // 2:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if type(failure(target, shorter)) is kind:
                data = shorter
            else:
                at += size
    return data


def failure(target: str, data: bytes) -> Exception | None:
    try:
        ORACLES[target](data)
    except Exception as exc:
        return exc
    return None


def keep(target: str, data: bytes) -> None:
    path = CORPUS / target / f"found-{name(data)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"{target}: {failure(target, data)!r}\n{target}: of {data!r}\n{target}: kept in {path}", flush=True)


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
