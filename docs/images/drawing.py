"""What the drawn pictures have in common: colours, light and dark, arrows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
    .small { font-size: 11px; fill: #59636e } .left { text-anchor: start } .right { text-anchor: end }
    .strong { font-weight: 600 } .stop { fill: #b42318; font-weight: 600 }
    rect { fill: #eef4ff; stroke: #3b6fd4; rx: 8 }
    path { fill: none; stroke: #59636e } .arrow { marker-end: url(#head) } .red { stroke: #b42318; stroke-width: 2 }
    .dashed { stroke-dasharray: 4 4 } marker path { fill: #59636e; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9198a1 } rect { fill: #16233d; stroke: #6f9df5 } .stop { fill: #ff7b72 }
      path { stroke: #9198a1 } .red { stroke: #ff7b72 } marker path { fill: #9198a1 }
    }
"""


def svg(width: int, height: int, label: str, body: Iterable[str], more_style: str = "") -> str:
    """Return a whole picture, with the style that all of them have."""
    lines = "\n  ".join(body)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
  <style>{STYLE}{more_style}  </style>
  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
    markerUnits="userSpaceOnUse" orient="auto">
    <path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>
  {lines}
</svg>
"""
