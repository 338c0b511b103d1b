"""Docstrings: examples run, every public name has one, and all follow the same rules."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from recis_hybrid.features import registry
from tests.support.docstrings import form_violations
from tests.support.imports import imports, parse, read_package

ROOT = Path(__file__).resolve().parents[1]
SOURCES = read_package(ROOT)


def of_bridge(module: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.jax] if module.startswith("recis_hybrid.bridge") else []


MODULES = [pytest.param(s.module, marks=of_bridge(s.module), id=s.module) for s in SOURCES if ">>>" in s.text]
NAMES = [
    (source.module, item.name)
    for source in SOURCES
    if source.is_package
    for item in imports(source)
    if item.name is not None and item.alias == item.name
]
PUBLIC = [pytest.param(*pair, marks=of_bridge(pair[0]), id=".".join(pair)) for pair in NAMES]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The example of register_op must not register its operation for other tests.
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    # Examples may use torch and the public names of their room without importing them.
    room = importlib.import_module(".".join(module.split(".")[:2]))
    known = {"torch": torch} | {name: getattr(room, name) for room_name, name in NAMES if room_name == room.__name__}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(module), extraglobs=known, optionflags=flags)
    assert not result.failed


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_names_are_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing):
        assert (inspect.getdoc(thing) or "").strip(), f"{module}.{name} has no docstring"


def test_docstrings_of_the_package_follow_the_rules() -> None:
    faults = [list(form_violations(source)) for source in SOURCES]
    assert [fault for found in faults for fault in found] == []


def test_docstrings_of_programs_and_tests_follow_the_rules() -> None:
    folders = ("benchmarks", "examples", "scripts", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    faults = [list(form_violations(parse(path.read_text(), str(path.relative_to(ROOT))))) for path in paths]
    assert [fault for found in faults for fault in found] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('"""What is read."""', ":1: opens with 'What'"),
        ('class C:\n    """Whose rows these are."""', ":2: opens with 'Whose'"),
        ('def f():\n    """How to read.\n\n    More."""', ":2: opens with 'How'"),
        ('async def f():\n    """Whether it is read."""', ":2: opens with 'Whether'"),
        ('class C:\n    x: int\n    """Of the rows."""', ":3: opens with 'Of'"),
        ('X = 1\n"""That which is read."""', ":2: opens with 'That'"),
        ('def f():\n    class C:\n        """Which rows."""', ":3: opens with 'Which'"),
        ('"""Read `path`."""', ":1: has code in single backticks"),
        ('"""Read ``path`` of `file`, not ``other``."""', ":1: has code in single backticks"),
        ('"""Read all ``path``s."""', ":1: has a letter directly after a literal"),
        ('def f():\n    """Read.\n\n    returns:\n        Rows.\n    """', ":2: capitalize the section 'returns'"),
    ],
)
def test_violations_are_found(text: str, fault: str) -> None:
    (found,) = form_violations(parse(text, "recis_hybrid/ops/x.py"))
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        '"""Return whether ``x`` is what :class:`Reader` and `the manual <https://example.org>`_ say."""',
        'class C:\n    """Rows.\n\n    Args:\n        x: Whether to read.\n    """\n    x = 1\n    """Whatever."""',
        'def f():\n    """Read.\n\n    Returns:\n        Rows.\n    """\n    x = 1\n    "What is no docstring"',
        "x = f(1)\nprint(x)",
        '"""Read.\n\nExample:\n    >>> read(1)\n    ValueError: use `load`\n"""',
    ],
)
def test_valid_docstrings_pass(text: str) -> None:
    assert list(form_violations(parse(text, "recis_hybrid/ops/x.py"))) == []
