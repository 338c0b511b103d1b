"""The examples in the docstrings run, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from tests.support.imports import imports, read_package

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
def test_examples_run(module: str) -> None:
    # An example is read by someone who has imported torch and the public names of its room, and nothing else.
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
