"""Checks the links within the repository: ``python docs/links.py``. It needs no network.

Sphinx checks those of the site. These pages are read on GitHub as well, which has other anchors and no site: README and
the files beside it, issue templates, pictures, files. ``nox -s docs -- --links`` tries the links to elsewhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CODE = re.compile(r"^(```|~~~).*?^\1[ ]*$|``[^`\n]+``|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(<?([^()<>\s]+(?:\([^()\s]*\))?)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_OUTSIDE = re.compile(r"https://")


def pages() -> list[Path]:
    """Return the pages of Markdown that people read on GitHub."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]
    return sorted(page for page in found if not page.name.startswith("top-"))  # copies that conf.py makes


def without_code(text: str) -> str:
    """Return a page with its code blanked, so that lines stay where they are."""
    return _CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def anchors(page: Path) -> set[str]:
    """Return what ``#`` may name in a page: its headings as GitHub writes them, with numbers for those that recur."""
    found: dict[str, int] = {}
    names = set()
    fenced = re.compile(r"^(```|~~~).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
    for heading in _HEADING.findall(fenced.sub("", page.read_text("utf-8"))):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def broken(page: Path, text: str) -> list[tuple[int, str, str]]:
    """Return the links of a page that lead nowhere in this repository: line, link, what is wrong."""
    wrong = []
    for match in _LINK.finditer(text):
        link = match[1] or match[2]
        if _OUTSIDE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        said = None
        if not target.is_relative_to(ROOT):
            said = "leads out of the repository"
        elif not target.exists():
            said = "there is no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            said = "there is no such heading"
        if said:
            wrong.append((text.count("\n", 0, match.start()) + 1, link, said))
    return wrong


def main() -> int:
    """Check, list what is broken, and return the exit status."""
    inside = outside = failed = 0
    for page in pages():
        text = without_code(page.read_text("utf-8"))
        for line, link, said in broken(page, text):
            failed += 1
            print(f"{page.relative_to(ROOT)}:{line}: {link}: {said}")
        links = [bool(_OUTSIDE.match(match[1] or match[2])) for match in _LINK.finditer(text)]
        outside += sum(links)
        inside += len(links) - sum(links)
    print(f"{inside} links within the repository, {failed} broken; {outside} links to elsewhere, not tried here")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
