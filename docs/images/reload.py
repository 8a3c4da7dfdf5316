"""Draws docs/images/reload.svg, a reload in mid-answer with two workers: `python docs/images/reload.py`."""

from pathlib import Path
from typing import Literal, NamedTuple

LANES = ("browser", "worker 1", "Redis", "worker 2")
WIDTH, LEFT, TOP, ROW = 190, 90, 66, 34
PICTURE = Path(__file__).with_suffix(".svg")
STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
    .lane { font-size: 14px; font-weight: 600 }
    .box { fill: #eef4ff; stroke: #3b6fd4; rx: 8 }
    .life { stroke: #afb8c1; stroke-dasharray: 4 4 }
    .sent, .back { fill: none; stroke: #3b6fd4; marker-end: url(#head) }
    .back { stroke-dasharray: 6 4 }
    .runs { fill: #d3e2ff }
    .event { fill: #b3261e; font-weight: 600 }
    .cross { stroke: #b3261e; stroke-width: 2 }
    marker path { fill: #3b6fd4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .box { fill: #16233d; stroke: #6f9df5 } .life { stroke: #4d5661 }
      .sent, .back { stroke: #6f9df5 } .runs { fill: #24385f } .event { fill: #ff8f87 } .cross { stroke: #ff8f87 }
      marker path { fill: #6f9df5 }
    }
"""


class Step(NamedTuple):
    """A message from one lane to another, or what happens in one."""

    begin: int
    end: int
    text: str
    kind: Literal["sent", "back", "event"] = "sent"


STEPS = (
    Step(0, 1, "POST /chat, X-Stream-Id: I"),
    Step(1, 2, "begin: XADD 1-0"),
    Step(1, 0, "id: 1 open, 2, 3 ... 57", "back"),
    Step(1, 2, "events 2, 3 ... every 40 to 70 ms"),
    Step(0, 0, "reload: detached", "event"),
    Step(1, 2, "the answer goes on: 58 ..."),
    Step(0, 3, "GET /answers/I?after=57"),
    Step(3, 2, "XRANGE, XREAD"),
    Step(2, 3, "58, 59 ...", "back"),
    Step(3, 0, "id: 58, 59 ...", "back"),
    Step(0, 3, "POST /answers/I: Stop"),
    Step(3, 1, "PUBLISH, through Redis"),
    Step(1, 1, "the model's socket is closed", "event"),
    Step(1, 2, "event 73: end, aborted"),
    Step(2, 3, "73", "back"),
    Step(3, 0, "id: 73 end, aborted", "back"),
)


def middle(lane: int) -> int:
    """Return the middle of a lane."""
    return LEFT + lane * WIDTH


def height(row: int) -> int:
    """Return where the arrow of a step is."""
    return TOP + 32 + row * ROW


def draw(row: int, step: Step) -> str:
    """Draw a step."""
    x, y = middle(step.begin), height(row)
    if step.kind == "event":
        cross = f'<path class="cross" d="M {x - 5} {y - 5} l 10 10 m -10 0 l 10 -10"/>'
        return f'{cross}\n  <text class="event" x="{x + 10}" y="{y + 4}" style="text-anchor: start">{step.text}</text>'
    ahead = 5 if step.end > step.begin else -5
    arrow = f'<path class="{step.kind}" d="M {x + ahead} {y} L {middle(step.end) - ahead} {y}"/>'
    # Beside the lane that it begins at, where it goes past others.
    near = x + (middle(step.end) - x) // abs(step.end - step.begin) // 2
    return f'{arrow}\n  <text x="{near}" y="{y - 6}">{step.text}</text>'


def picture() -> str:
    """Return the whole picture."""
    bottom = height(len(STEPS))
    width = middle(len(LANES) - 1) + LEFT
    stopped = next(row for row, step in enumerate(STEPS) if step.kind == "event" and step.begin == 1)
    parts: list[str] = []
    for lane, name in enumerate(LANES):
        x = middle(lane)
        parts += [
            f'<path class="life" d="M {x} {TOP} L {x} {bottom}"/>',
            f'<rect class="box" x="{x - 60}" y="{TOP - 40}" width="120" height="36"/>',
            f'<text class="lane" x="{x}" y="{TOP - 17}">{name}</text>',
        ]
    # The time in which the model answers.
    begun = height(1)
    parts.append(f'<rect class="runs" x="{middle(1) - 4}" y="{begun}" width="8" height="{height(stopped) - begun}"/>')
    parts += [draw(row, step) for row, step in enumerate(STEPS)]
    body = "\n  ".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 10}" role="img" \
aria-label="A reload in mid-answer, and a Stop, with two workers">
  <style>{STYLE}  </style>
  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
    <path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>
  {body}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
