"""Looks at the built site in a Chromium, from its files: ``python docs/look.py``. Without a Chromium it says so.

Each page at the width of a phone, light and dark: nothing may be wider than the screen, and nothing may come from
elsewhere. Then the search, by keyboard, has to find what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import expect

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from real.chromium import chromium, find_chromium  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

SITE = ROOT / "build" / "docs"
PHONE = 390
# Words, and the page that has to be among those found.
SEARCHED = {"slot leak": "stopping", "partial answer": "contract", "CancelToken": "token", "HAProxy": "deploying"}
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def look_at(page: Page, path: Path) -> list[str]:
    """Return what is wrong with a page on a phone."""
    page.goto(path.as_uri())
    wrong = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        if wider := page.evaluate(WIDER):
            wrong.append(f"{path.relative_to(SITE)}: {wider} pixels wider than a phone, {scheme}")
    return wrong


def search(page: Page, words: str, found: str) -> list[str]:
    """Return what is wrong with the search for some words."""
    page.goto((SITE / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    # The extract below each title is read by fetch(), which no browser allows for files; the titles need none.
    links = page.locator("ul.search li a")
    try:
        expect(page.locator(f'ul.search li a[href*="{found}.html"]').first).to_be_visible(timeout=20_000)
    except AssertionError:
        return [f"the search for {words!r} finds {links.count()} pages, without {found}.html"]
    return []


def look(browser: Browser) -> list[str]:
    """Return what is wrong with the site."""
    wrong = []

    def note(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(f"{page.url} loads {request.url}")

    page = browser.new_page(viewport={"width": PHONE, "height": 800})
    page.on("request", note)
    for path in sorted(SITE.rglob("*.html")):
        wrong += look_at(page, path)
    # The search stands in the page from this width on; on a phone it is behind the menu.
    page.set_viewport_size({"width": 1400, "height": 900})
    for words, found in SEARCHED.items():
        wrong += search(page, words, found)
    return wrong


def main() -> int:
    """Look, list what is wrong, and return the exit status."""
    binary = find_chromium()
    if binary is None:
        print("the site was not looked at: no Chromium found")
        return 0
    with chromium(binary) as browser:
        wrong = look(browser)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    pages = len(list(SITE.rglob("*.html")))
    print(f"looked at {pages} pages at {PHONE} pixels, searched for {len(SEARCHED)} terms: {len(wrong)} faults")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
