"""Counts stilted phrases in the documentation, docstrings and comments: ``python docs/english.py [PATH ...]``.

It lists each phrase with its place and fails above one in 1,000 words. What to write instead is in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
LIMIT = 1.0
"""Phrases in 1,000 words, at most."""

_FENCE = re.compile(r"^(?:<!-- [^\n]* -->\n)?```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
_SENTENCE = r"(?:^|(?<=[.!?:;|] )|(?<=\n\n))"
PHRASES = {
    # "To leave the loop closes the connection": in "To stop, call abort()" a comma follows.
    "infinitive as a subject": _SENTENCE
    + r"To (?!be\b)[a-z]+\b[^.,:;|?!]*?\b(?:is|was|does|has|takes|costs|[a-z]{3,}es)\b",
    "'who' for 'whoever'": _SENTENCE + r"Who [a-z][^.?|:]{25,}[.]",
    "what had come": r"\b[Ww]hat (?:has |had )?(?:come|came)\b|\bhad come\b",
    "is none": r"(?<!there )\b(?:is|are|was|were) none\b",
    "is no X": r"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!longer\b|more\b|one\b|matter\b)[a-z]+",
    "nobody asks": r"\b[Nn]obody (?:asks|tells|knows|wants|has asked|orders)\b",
    "of its own": r"\bof (?:its|our|your|their|one's|his) own\b",
    "all the same": r"\ball the same\b",
    "unless told": r"\bunless (?:told|asked)\b",
    "all there is": r"\b(?:all|what) there is\b(?! to)",
    "what it was": r"\bas what (?:it|they) (?:was|were|is|are)\b",
    "so is": r"(?:^|(?<=[.;:,] ))(?:[Ss]o|[Nn]either|[Nn]or) (?:is|are|does|do|has|have|was|were) (?:it|that|the)\b",
    "is to": r"\bis to (?!be\b)(?:[a-z]+) (?:its|the|a)\b",
    "else": r"(?:, |\bor )else (?:it|the|he|they|a|that|is)\b",
    "has what": r"\b(?:has|have) what\b",
}
_PATTERNS = {name: re.compile(pattern, re.MULTILINE) for name, pattern in PHRASES.items()}


def prose_of_page(text: str) -> str:
    """Return a page without its blocks of code, its links' targets, and code within sentences."""
    text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    # Tables of figures are no prose.
    return _CODE.sub("X", text)


def prose_of_module(text: str) -> str:
    """Return the docstrings and comments of a module, each at its line."""
    lines = [""] * (text.count("\n") + 2)
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                for place, line in enumerate(value.value.splitlines()):
                    lines[value.lineno - 1 + place] += line.strip()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# (?:noqa|type:|pyright|prints:|mypy)", token.string):
            lines[token.start[0] - 1] += token.string.lstrip("# ")
    return _CODE.sub("X", "\n".join(lines))


def files() -> Iterator[Path]:
    """Return what is read: pages and the package."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").glob("*.md"))
    yield from sorted((ROOT / "ollama_async").rglob("*.py"))


def stilted(text: str) -> list[tuple[int, str, str]]:
    """Return the stilted phrases of a text: their line, which phrase it is, and its words."""
    found = []
    for name, pattern in _PATTERNS.items():
        # A sentence may go on in the next line, but not past an empty one.
        joined = re.sub(r"(?<=\S)\n(?=[^\n|#*\-\d])", " ", text)
        for match in pattern.finditer(joined):
            words = match[0].strip()
            # Joining lines keeps the length: a space stands for each line end.
            found.append((text.count("\n", 0, match.start()) + 1, name, words[:70]))
    return sorted(found)


def main(paths: list[str]) -> int:
    """Count, list, and return the exit status."""
    words = count = 0
    for path in [Path(path).resolve() for path in paths] or files():
        if path.name.startswith("top-"):  # a copy that conf.py makes
            continue
        text = path.read_text("utf-8")
        prose = prose_of_module(text) if path.suffix == ".py" else prose_of_page(text)
        words += len(re.findall(r"[A-Za-z][\w'-]*", prose))
        for line, name, phrase in stilted(prose):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: {name}: {phrase}")
    rate = 1000 * count / max(words, 1)
    print(f"{count} stilted phrases in {words:,} words: {rate:.2f} in 1,000, of {LIMIT:g} allowed")
    return int(rate > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
