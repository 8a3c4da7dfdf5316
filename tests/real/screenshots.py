"""Makes the pictures of docs/images anew: ``PYTHONPATH=tests python -m real.screenshots``, with a scripted server."""

import re
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect
from real.chromium import chromium, find_chromium
from real.web_page import web_page

from ollama_async.testing import FakeOllama, Gate, Reply

FOLDER = Path(__file__).parents[2] / "docs" / "images"

THOUGHTS = (
    "The user asks about scattering. Short waves scatter more than long ones, and the eye is more sensitive to blue."
)
BEGINNING = """\
Sunlight is a mixture of all colours. On its way through the air it meets molecules that are much smaller than its \
waves, and they scatter **short waves** far more than long ones:

| colour | wavelength | scattered |
|---|---|---|
| blue | 450 nm | 5.9 times as much |
| red | 700 nm | 1 |

The strength goes with the fourth power of the frequency:

```python
def scattered(nanometres: float) -> float:
    return (700 / nanometres) ** 4
```

So blue light comes from **all over the sky**"""
REST = (
    ", and the sun itself looks a little yellower than it is. *Violet* is scattered even more, but there is less of it."
)


def words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def picture(browser: Browser, name: str, scheme: Literal["light", "dark"], until: str) -> None:
    gate = Gate()
    reply = Reply.chat(*words(BEGINNING + REST), thinking=words(THOUGHTS), interval=0.01)
    place = 2 * (len(words(THOUGHTS)) + len(words(BEGINNING)))
    steps = [*reply.steps[:place], gate, *reply.steps[place:]]
    with FakeOllama(models=["llama3.2", "qwen3"]) as server, web_page(server.url) as served:
        server.script("/api/chat", Reply(steps))
        context = browser.new_context(viewport={"width": 780, "height": 760}, color_scheme=scheme)
        page = context.new_page()
        page.goto(served.url)
        status = page.get_by_role("status")
        expect(status).to_have_text("Ready")
        page.get_by_role("textbox", name="Your message").fill("Why is the sky blue?")
        page.keyboard.press("Enter")
        expect(page.locator(".written")).to_contain_text("all over the sky")
        page.emulate_media(reduced_motion="reduce")
        if until == "Stopped":
            page.get_by_role("button", name="Stop").click()
        elif until == "Done":
            gate.open()
        expect(status).to_contain_text(until)
        page.screenshot(path=FOLDER / f"{name}.png")
        gate.open()
        context.close()


def main() -> None:
    binary = find_chromium()
    if binary is None:
        print("the pictures of the chat page were not taken: no Chromium found")
        return
    with chromium(binary) as browser:
        picture(browser, "web-answering", "light", "Answering")
        picture(browser, "web-stopped", "light", "Stopped")
        picture(browser, "web-dark", "dark", "Done")


if __name__ == "__main__":
    main()
