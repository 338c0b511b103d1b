"""How Sphinx makes the documentation: `make docs`."""

project = "recis_hybrid"
copyright = "the recis_hybrid authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "recis_hybrid"

# Names are shown as rooms re-export them, with the docstrings as they are written (Google's style).
autodoc_default_options = {"members": True, "imported-members": True, "undoc-members": False, "show-inheritance": True}
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
myst_heading_anchors = 3
