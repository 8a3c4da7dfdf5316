"""Draws docs/images/cost.svg, what a token costs, from the tables of docs/performance.md."""

import math
import re
from pathlib import Path

from drawing import svg

PICTURE = Path(__file__).with_suffix(".svg")
PAGE = Path(__file__).parents[1] / "performance.md"
COLOURS = {
    "ollama_async": "#3b6fd4",
    "ollama-python": "#b42318",
    "aiohttp": "#1a7f37",
    "httpx": "#9a6700",
    "openai": "#8250df",
}
LEFT, RIGHT, TOP, BOTTOM = 60, 620, 24, 300
LEAST, MOST = 8.0, 400.0


def table(page: str, title: str) -> dict[str, float]:
    """Return the medians of a table's first column, by client."""
    _, _, rest = page.partition(f"**{title}**\n")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.,]+) ", rest.partition("\n**")[0], re.MULTILINE)
    return {client: float(median.replace(",", "")) for client, median in rows}


def stages(page: str) -> list[tuple[str, float, float]]:
    """Return the stages of a token's way: name, alone, with 63 others."""
    _, _, rest = page.partition("<!-- stages -->")
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \|$", rest.partition("<!-- /stages -->")[0], re.MULTILINE)
    return [(name, float(alone), float(others)) for name, alone, others in rows if not name.startswith(("sum", "the "))]


def height(cost: float) -> float:
    """Return where a cost is drawn; each step up is a doubling."""
    share = math.log(cost / LEAST) / math.log(MOST / LEAST)
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)


def costs(page: str) -> list[str]:
    """Draw the cost of a token over the number of streams."""
    streams = [int(number) for number in re.findall(r"^\*\*(\d+) streams, 50 tokens/s each\*\*$", page, re.MULTILINE)]
    at = {count: table(page, f"{count} streams, 50 tokens/s each") for count in streams}
    x = {count: LEFT + 30 + place * (RIGHT - LEFT - 60) // (len(streams) - 1) for place, count in enumerate(streams)}
    body = [f'<path d="M {LEFT} {TOP} L {LEFT} {BOTTOM} L {RIGHT} {BOTTOM}"/>']
    body += [f'<text class="small" x="{x[count]}" y="{BOTTOM + 18}">{count:,}</text>' for count in streams]
    body.append(f'<text class="small" x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 36}">streams, 50 tokens/s each</text>')
    for mark in (10, 20, 50, 100, 200):
        y = height(mark)
        body.append(f'<path class="dashed" d="M {LEFT} {y} L {RIGHT} {y}" opacity="0.3"/>')
        body.append(f'<text class="small right" x="{LEFT - 6}" y="{y + 4}">{mark}</text>')
    body.append(f'<text class="small left" x="10" y="{TOP - 8}">µs of CPU a token</text>')
    for client, colour in COLOURS.items():
        points = [(x[count], height(at[count][client])) for count in streams if client in at[count]]
        line = " L ".join(f"{a} {b}" for a, b in points)
        body.append(f'<path style="stroke:{colour};stroke-width:2.5" d="M {line}"/>')
        body += [f'<circle cx="{a}" cy="{b}" r="3.5" fill="{colour}"/>' for a, b in points]
    for place, (client, colour) in enumerate(COLOURS.items()):
        y = TOP + 8 + 20 * place
        body.append(f'<circle cx="{RIGHT + 24}" cy="{y}" r="5" fill="{colour}"/>')
        body.append(f'<text class="left" x="{RIGHT + 36}" y="{y + 4}">{client}</text>')
    return body


def bars(page: str, top: int) -> list[str]:
    """Draw where the time of a token goes."""
    body = [f'<text class="strong left" x="10" y="{top}">Where the time of a token goes, µs</text>']
    for place, (name, alone, others) in enumerate(stages(page)):
        y = top + 16 + 24 * place
        body.append(f'<text class="small right" x="290" y="{y + 13}">{name}</text>')
        body.append(f'<rect class="bar" x="300" y="{y}" width="{round(alone * 100)}" height="9"/>')
        body.append(f'<rect class="bar others" x="300" y="{y + 10}" width="{round(others * 100)}" height="7"/>')
        body.append(f'<text class="small left" x="{308 + round(alone * 100)}" y="{y + 9}">{alone:g}</text>')
        if others >= 0.5:
            body.append(f'<text class="small left" x="{308 + round(others * 100)}" y="{y + 19}">{others:g}</text>')
    foot = top + 30 + 24 * len(stages(page))
    body.append(f'<text class="small left" x="300" y="{foot}">above: alone; below: together with 63 others</text>')
    return body


def picture() -> str:
    """Return the whole picture."""
    page = PAGE.read_text("utf-8")
    style = ".bar { rx: 2 } .others { fill: #3b6fd4; opacity: 0.6 }\n"
    return svg(780, 612, "CPU time of a token", [*costs(page), *bars(page, 372)], style)


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
