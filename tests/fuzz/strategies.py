"""Inputs by hypothesis: a case, or an input of the corpus, with something changed in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fuzz.cases import CASES, WORDS
from hypothesis import strategies as st

__all__ = ["CORPUS", "inputs", "stored"]

CORPUS = Path(__file__).parent / "corpus"


def stored(target: str) -> list[Path]:
    """Return the inputs of a target that have been found, in order."""
    return sorted(path for path in (CORPUS / target).glob("*") if path.is_file())


@cache
def inputs(target: str) -> st.SearchStrategy[bytes]:
    """Return what a target is tried with."""
    known = [*CASES[target], *(path.read_bytes() for path in stored(target))]
    words = st.sampled_from(WORDS[target])
    made_of_words = st.tuples(st.binary(max_size=1), st.lists(words | st.binary(max_size=3), max_size=20).map(b"".join))
    return _changed(known, words) | made_of_words.map(b"".join)


@st.composite
def _changed(draw: st.DrawFn, known: list[bytes], words: st.SearchStrategy[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["insert", "flip", "delete", "truncate", "repeat", "splice"])):
            case "insert":
                data[at:at] = draw(words | st.binary(max_size=4))
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "truncate":
                del data[at:]
            case "repeat":
                data[at:at] = data[max(0, at - draw(st.integers(1, 40))) : at]
            case "splice":
                data[at:] = draw(st.sampled_from(known))[at:]
    return bytes(data[:1000])
