"""What ``search.py`` runs in a process: ``python -m fuzz.under_atheris TARGET``, and what libFuzzer takes."""

from __future__ import annotations

import sys

import atheris

if __name__ == "__main__":
    program, target, *options = sys.argv
    with atheris.instrument_imports(include=["ollama_async"]):
        from fuzz.oracles import ORACLES
    atheris.Setup([program, *options], ORACLES[target])
    atheris.Fuzz()
