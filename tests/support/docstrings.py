"""Docstring rules, as functions from sources to violations."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.imports import Source

# A first line says what a function does or what a thing is. A clause that starts with one of these words does neither.
OPENINGS = ("What", "Whose", "How", "Of", "Which", "Whether", "That", "Whoever", "Where", "When", "Who")
SECTIONS = (
    "Args",
    "Attributes",
    "Example",
    "Examples",
    "Note",
    "Raises",
    "References",
    "Returns",
    "Warns",
    "Yields",
)
# Valid backticks: examples with their output, and literals, roles and links of reStructuredText.
_LITERALS = re.compile(r">>> .*?(?:\n\s*\n|$)|``.+?``|:\w+(?::\w+)*:`[^`]+`|`[^`]+`_", re.DOTALL)
_HEADER = re.compile(r"^ *([A-Za-z]+):$", re.MULTILINE)


@dataclass(frozen=True)
class Docstring:
    """A docstring of a module, a class, a function or an attribute, and its first line number."""

    line: int
    text: str


def docstrings(source: Source) -> Iterator[Docstring]:
    """Yield the docstrings of a file, including those of attributes, below assignments in modules and classes."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documented = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for before, statement in zip([None, *node.body], node.body, strict=False):
            first = before is None
            attribute = documented and isinstance(before, ast.Assign | ast.AnnAssign)
            if (first or attribute) and isinstance(statement, ast.Expr):
                value = statement.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield Docstring(statement.lineno, value.value)


def form_violations(source: Source) -> Iterator[str]:
    """Yield violations of the rules on opening words, section headers and backticks."""
    for docstring in docstrings(source):
        where = f"{source.path}:{docstring.line}"
        text = docstring.text.strip()
        opening = re.match(r"\w+", text)
        if opening and opening[0] in OPENINGS:
            yield f"{where}: opens with {opening[0]!r}; say what the function does or what the thing is"
        if "`" in _LITERALS.sub("", text):
            yield f"{where}: has code in single backticks; use double ones"
        if any(re.match(r"\w", after) for after in text.split("``")[2::2]):
            yield f"{where}: has a letter directly after a literal, which does not end there; reword"
        for header in _HEADER.findall(text):
            if header not in SECTIONS and header.capitalize() in SECTIONS:
                yield f"{where}: capitalize the section {header!r}"
