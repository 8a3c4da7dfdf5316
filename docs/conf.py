"""The documentation's site: ``nox -s docs`` builds it into ``build/docs``."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pygments.lexers.special import TextLexer

import ollama_async

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "ollama_async"
release = version = ollama_async.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["images/*"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"ollama_async {release}"
html_copy_source = False
html_show_copyright = False

# What a class has beside its own: pydantic's, which pydantic's documentation describes.
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Fields of models have the names of builtins, such as `type`: Sphinx would ask which of them an annotation means.
suppress_warnings = ["ref.python"]

# Files at the top of the repository that are pages of the site as well: GitHub looks for them there.
TOP_PAGES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "security": "SECURITY.md"}
ROOT = Path(__file__).parents[1]


def write_top_pages(app: Sphinx) -> None:
    """Write a page for each file at the top that is one; links lead from docs/ instead of the top."""
    for page, name in TOP_PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        for other, file in TOP_PAGES.items():
            text = text.replace(f"]({file})", f"](top-{other}.md)")
        target = Path(app.srcdir, f"top-{page}.md")
        # Written only where it differs, or each build would read it again.
        if not target.exists() or target.read_text("utf-8") != text:
            target.write_text(text, "utf-8")


def link_top_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links to files at the top to their pages."""
    for page, name in TOP_PAGES.items():
        source[0] = source[0].replace(f"](../{name}", f"](top-{page}.md")


def list_other_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """List the pages that the index does not name, so that a new page needs no change of the index."""
    if docname == "index":
        pages = {path.stem for path in Path(app.srcdir).glob("*.md")}
        named = set(re.findall(r"^   ([\w-]+)$", source[0], re.MULTILINE))
        source[0] = source[0].replace("OTHER-PAGES", "\n   ".join(sorted(pages - named)))


def cancellation_as_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a field of a docstring's "Cancellation:" line, beside those of its arguments and errors."""
    for place, line in enumerate(lines):
        if line.startswith("Cancellation: "):
            lines[place] = f":{line}"
            for behind in range(place + 1, len(lines)):
                if not lines[behind].strip():
                    break
                lines[behind] = f"    {lines[behind]}"
            return


def only_public_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Leave out what a class inherits from the inside: users cannot name it."""
    public = {id(getattr(importlib.import_module(module), name)) for module, name in public_names()}
    inside = [base for base in bases if str(getattr(base, "__module__", "")).startswith("ollama_async")]
    bases[:] = [base for base in bases if base not in inside or id(base) in public] or [object]


def public_names() -> list[tuple[str, str]]:
    """Return each public name with the module that it is imported from."""
    return [
        (module, name)
        for module in public_modules()
        for name in getattr(importlib.import_module(module), "__all__", ())
    ]


def public_modules() -> list[str]:
    """Return the modules that users import."""
    modules = [module.name for module in pkgutil.iter_modules(ollama_async.__path__)]
    leaves = [name for name in modules if not name.startswith("_") and name != "cli"]
    return ["ollama_async", *(f"ollama_async.{name}" for name in sorted(leaves))]


def import_everything() -> None:
    """Import what is described, as a user's program does.

    Autodoc imports a module that is not there yet as a type checker would see it, which pydantic's models do not bear.
    """
    for module, name in public_names():
        getattr(importlib.import_module(module), name)


def check_the_site(app: Sphinx, exception: Exception | None) -> None:
    """Fail the build if a public name is on no page of the reference, or a page needs the network."""
    if exception is not None or app.builder.name != "html":
        return
    described = {name.rpartition(".")[2] for name in app.env.domaindata["py"]["objects"]}
    missing = [f"{module}.{name}" for module, name in public_names() if name not in described]
    if missing:
        raise SystemExit(f"no page in docs/api describes {', '.join(missing)}")
    elsewhere = re.compile(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="(?:https?:)?//')
    loading = [page.name for page in Path(app.outdir).rglob("*.html") if elsewhere.search(page.read_text("utf-8"))]
    if loading:
        raise SystemExit(f"these pages load something from elsewhere, so they fail offline: {', '.join(loading)}")


def setup(app: Sphinx) -> None:
    """Register what this file does beside setting names."""
    import_everything()
    app.add_lexer("haproxy", TextLexer)  # Pygments has none
    app.connect("builder-inited", write_top_pages)
    app.connect("source-read", link_top_pages)
    app.connect("source-read", list_other_pages)
    # Before napoleon, which takes an unknown section for text.
    app.connect("autodoc-process-docstring", cancellation_as_field, priority=100)
    app.connect("autodoc-process-bases", only_public_bases)
    app.connect("build-finished", check_the_site)
