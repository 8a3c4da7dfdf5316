"""Draws docs/images/stop.svg, a Stop that passes through two processes: `python docs/images/stop.py`."""

from pathlib import Path

from drawing import svg

PICTURE = Path(__file__).with_suffix(".svg")
LANES = {"browser": 70, "worker 2": 240, "Redis": 400, "worker 1": 560, "Ollama": 740}
TOP, STEP = 70, 38
STEPS = [
    ("browser", "worker 1", "POST /chat, X-Stream-Id: I", ""),
    ("worker 1", "Ollama", "POST /api/chat", ""),
    ("Ollama", "worker 1", "chunk, chunk, ...", ""),
    ("worker 1", "browser", "event: chunk", ""),
    ("browser", "worker 2", "POST /stop/I", "stop"),
    ("worker 2", "Redis", "I is stopped", "stop"),
    ("Redis", "worker 1", "I is stopped", "stop"),
    ("worker 1", "Ollama", "abort(): FIN", "stop"),
    ("worker 1", "browser", "event: end, aborted", ""),
    ("worker 2", "browser", "200 stopped: true", ""),
]


def picture() -> str:
    """Return the whole picture."""
    bottom = TOP + STEP * len(STEPS) + 10
    body = []
    for name, x in LANES.items():
        body += [
            f'<path class="dashed" d="M {x} 50 L {x} {bottom}"/>',
            f'<rect x="{x - 50}" y="14" width="100" height="34"/>',
            f'<text class="strong" x="{x}" y="36">{name}</text>',
        ]
    for row, (begin, end, text, kind) in enumerate(STEPS):
        a, b, y = LANES[begin], LANES[end], TOP + STEP * (row + 1) - 10
        red = " red" if kind else ""
        body.append(f'<path class="arrow{red}" d="M {a} {y} L {b + (-3 if b > a else 3)} {y}"/>')
        body.append(f'<text class="small {kind}" x="{(a + b) // 2}" y="{y - 6}">{text}</text>')
    return svg(820, bottom + 16, "A Stop through two processes", body)


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
