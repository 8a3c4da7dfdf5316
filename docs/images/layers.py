"""Draws docs/images/layers.svg, the house of the code, from the modules in it."""

from pathlib import Path

from drawing import svg

PICTURE = Path(__file__).with_suffix(".svg")
PACKAGE = Path(__file__).parents[2] / "ollama_async"
# From the top: what imports, above what is imported. A folder stands for the modules in it.
STOREYS = [
    ("the leaves, each needs only its own extra", None),
    ("the front: one method an endpoint", ["_client", "_manage", "_files", "_session"]),
    ("_model/: values, no I/O, no asyncio", "_model"),
    ("_call/: one call, knows no endpoint", "_call"),
    ("_wire/: bytes, knows no Ollama", "_wire"),
    ("the ground: tokens and errors", ["_cancel", "_errors", "_loops", "_secret"]),
]
WIDTH, COLUMN, ROW = 860, 128, 18


def names_of(storey: str | list[str] | None) -> list[str]:
    """Return what is in a storey."""
    if isinstance(storey, list):
        return storey
    if isinstance(storey, str):
        return sorted(path.stem for path in (PACKAGE / storey).glob("*.py") if path.stem != "__init__")
    paths = [path for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.name != "py.typed"]
    return sorted(f"{path.name}/" if path.is_dir() else path.stem for path in paths)


def picture() -> str:
    """Return the whole picture."""
    y, body, columns = 12, [], (WIDTH - 40) // COLUMN
    for title, storey in STOREYS:
        names = names_of(storey)
        height = 34 + ROW * (-(-len(names) // columns))
        body.append(f'<rect x="10" y="{y}" width="{WIDTH - 20}" height="{height}"/>')
        body.append(f'<text class="strong left" x="24" y="{y + 20}">{title}</text>')
        for place, name in enumerate(names):
            x, row = 24 + COLUMN * (place % columns), place // columns
            body.append(f'<text class="small left" x="{x}" y="{y + 38 + ROW * row}">{name}</text>')
        y += height
        if title != STOREYS[-1][0]:
            body.append(f'<path class="arrow" d="M {WIDTH // 2} {y} L {WIDTH // 2} {y + 14}"/>')
            y += 16
    body.append(
        f'<text class="small" x="{WIDTH // 2}" y="{y + 18}">An arrow: imports, and only in this direction</text>'
    )
    return svg(WIDTH, y + 28, "The layers of the code", body)


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
