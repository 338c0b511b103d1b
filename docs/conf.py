"""Sphinx configuration; ``make docs`` builds the documentation."""

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

# Document the names that packages re-export, with Google-style docstrings.
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# Napoleon parses the words before a colon in an attribute's docstring as its type. Our docstrings state no types there.
docstring.GoogleDocstring._parse_attribute_docstring = lambda self: list(self._lines)  # type: ignore[method-assign]


def convert_formulas(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert formulas in docstrings, ``$$formula$$`` on one line, to reStructuredText."""
    lines[:] = [re.sub(r"^( *)\$\$(.+?)\$\$$", r"\1.. math:: \2", line) for line in lines]


def setup(app: Any) -> None:
    """Register the conversion with Sphinx."""
    app.connect("autodoc-process-docstring", convert_formulas, priority=400)  # before Napoleon
