"""Names of ``import recis_hybrid as rh``: imported on first use, visible to type checkers, listed by ``dir``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import recis_hybrid as rh
from tests.support.imports import imports, parse

DECLARED = {
    item.name: item.target
    for item in imports(parse(Path(rh.__file__).read_text(), "recis_hybrid/__init__.py"))
    if item.alias is not None and item.alias == item.name
}
PARAMETERS = [
    pytest.param(name, target, marks=[pytest.mark.jax] if name == "bridge" else []) for name, target in DECLARED.items()
]


@pytest.mark.parametrize(("name", "target"), PARAMETERS)
def test_names_are_those_that_type_checkers_see(name: str, target: str) -> None:
    module = f"recis_hybrid.{name}"
    expected = importlib.import_module(module) if target == "recis_hybrid" else getattr(sys.modules[target], name)
    assert getattr(rh, name) is expected


def test_all_names_are_declared_and_listed() -> None:
    assert set(DECLARED) == {*rh._NAMES, *rh._PACKAGES}
    assert {*DECLARED, "__version__"} <= set(dir(rh))


def test_the_version() -> None:
    assert rh.__version__ == metadata.version("recis_hybrid")


def test_unknown_names_raise_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'recis_hybrid' has no attribute 'ColumnDataSet'"):
        _ = rh.ColumnDataSet  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("use", "absent"),
    [
        ("dir(rh); rh.__version__", ["torch", "pyarrow", "jax", "numpy"]),
        ("rh.serving", ["torch", "pyarrow", "jax"]),
        ("rh.EmbeddingEngine; rh.optim.Adam; rh.RaggedTensor", ["pyarrow", "jax"]),
        ("rh.ColumnDataset; rh.Trainer; rh.Saver", ["jax"]),
    ],
)
def test_unused_packages_are_not_loaded(use: str, absent: list[str], root: Path) -> None:
    code = f"import sys; import recis_hybrid as rh; {use}; print(*({set(absent)} & sys.modules.keys()))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
