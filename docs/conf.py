"""Configuration of Sphinx; ``make docs`` builds the documentation."""

from __future__ import annotations

import re
from typing import Any

from sphinx.ext.napoleon import docstring

project = "recis_hybrid"
copyright = "the recis_hybrid authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = "recis_hybrid"
myst_heading_anchors = 3

# Show names as the packages re-export them, and docstrings as they are written (Google style).
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# Napoleon takes the words before a colon in an attribute's docstring for its type; our docstrings state no type there.
docstring.GoogleDocstring._parse_attribute_docstring = lambda self: list(self._lines)  # type: ignore[method-assign]


def as_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn what docstrings have of Markdown into reStructuredText: `code` and $$formulas$$."""
    text = "\n".join(lines)
    # What is a literal, or has a role before it, as :class:`Name`, stays.
    text = re.sub(
        r"``.+?``|:\w+:`[^`]+`|`([^`]+)`(?=(\w?))",
        lambda m: m[0] if m[1] is None else f"``{m[1]}``" + ("\\ " if m[2] else ""),
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r"^( *)\$\$(.+?)\$\$$", r"\1.. math:: \2", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Register the conversion with Sphinx."""
    app.connect("autodoc-process-docstring", as_markdown, priority=400)  # before Napoleon
