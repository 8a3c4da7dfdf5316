"""Draws docs/images/phases.svg from the library's own table: `python docs/images/phases.py`."""

from pathlib import Path

from drawing import svg

from ollama_async._call.timeouts import LIMITS
from ollama_async._wire.phase import TRANSITIONS, Phase

BOX, GAP, TOP, HEIGHT = 96, 26, 150, 40
PICTURE = Path(__file__).with_suffix(".svg")


def middle(phase: Phase) -> int:
    """Return the middle of a phase's box."""
    return 20 + phase * (BOX + GAP) + BOX // 2


def box(phase: Phase) -> str:
    """Draw a phase, with its limits below."""
    x = middle(phase)
    lines = [
        f'<rect x="{x - BOX // 2}" y="{TOP}" width="{BOX}" height="{HEIGHT}"/>',
        f'<text x="{x}" y="{TOP + 25}">{phase.name}</text>',
    ]
    for row, limit in enumerate(sorted(LIMITS[phase] - {"total"})):
        lines.append(f'<text class="small" x="{x}" y="{TOP + HEIGHT + 18 + 15 * row}">{limit}</text>')
    return "\n  ".join(lines)


def arrow(begin: Phase, end: Phase) -> str:
    """Draw a transition: straight to the next phase, above past others, below on the way back."""
    a, b = middle(begin), middle(end)
    if end == begin + 1:
        y = TOP + HEIGHT // 2
        return f'<path class="arrow" d="M {a + BOX // 2} {y} L {b - BOX // 2 - 2} {y}"/>'
    rise = 22 + 13 * abs(end - begin)
    if end > begin:
        return f'<path class="arrow" d="M {a} {TOP} C {a} {TOP - rise}, {b} {TOP - rise}, {b} {TOP - 2}"/>'
    low = TOP + HEIGHT + 45
    return f'<path class="arrow" d="M {a} {low} C {a} {low + rise}, {b} {low + rise}, {b} {low + 2}"/>'


def picture() -> str:
    """Return the whole picture."""
    width = middle(Phase.CLOSED) + BOX // 2 + 20
    # Every phase can be closed: drawn, these arrows would hide the others.
    arrows = [
        arrow(begin, end) for begin, ends in TRANSITIONS.items() for end in sorted(ends) if end is not Phase.CLOSED
    ]
    note = "From every phase: CLOSED, when the outcome is decided. The limit `total` holds in all of them."
    foot = f'<text class="small" x="{width // 2}" y="320">{note}</text>'
    return svg(width, 330, "Phases", [*map(box, Phase), *arrows, foot])


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
