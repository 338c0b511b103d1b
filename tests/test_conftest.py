from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.gpu import Machine, count_listed, verdict
from tests.support.quick import SHARE, cross_section


@pytest.mark.parametrize(
    ("needed", "machine", "action"),
    [
        (1, Machine(usable=0, listed=0, required=False), "skip"),
        (1, Machine(usable=0, listed=1, required=False), "fail"),
        (1, Machine(usable=0, listed=0, required=True), "fail"),
        (1, Machine(usable=1, listed=1, required=True), "run"),
        (2, Machine(usable=1, listed=1, required=True), "skip"),
        (2, Machine(usable=2, listed=2, required=False), "run"),
        (2, Machine(usable=0, listed=4, required=False), "fail"),
    ],
)
def test_a_listed_gpu_must_be_usable(needed: int, machine: Machine, action: str) -> None:
    decision = verdict(needed, machine)
    assert decision.action == action
    assert bool(decision.reason) == (action != "run")


def test_gpus_are_counted_in_the_drivers_listing() -> None:
    listing = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA L4\n"
    assert count_listed(listing) == 2
    assert count_listed("No devices were found\n") == 0


@pytest.mark.parametrize(("required", "closing"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_required_gpu_fails_the_run(tmp_path: Path, root: Path, required: str, closing: str) -> None:
    # CUDA_VISIBLE_DEVICES hides GPUs from torch, and the PATH hides the driver's tool.
    test = tmp_path / "test_kernel.py"
    test.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_kernel():\n    pass\n")
    environment = os.environ | {"RECIS_REQUIRE_GPU": required, "CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert closing in done.stdout, done.stdout + done.stderr
    assert done.returncode == int(required)
    assert ("RECIS_REQUIRE_GPU=1" in done.stdout) == (required == "1")


@pytest.mark.parametrize("order", ["first", "second"])
def test_each_test_draws_the_same_numbers(order: str) -> None:
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def marked(node: ast.AST) -> set[str]:
    """Return the names of the markers in an expression."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Attribute) and each.value.attr == "mark"
    }


def functions(root: Path) -> dict[str, set[str]]:
    """Return every test function of the repository, as ``file::function``, with its markers."""
    found: dict[str, set[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        body = ast.parse(path.read_text()).body
        file_marks = set().union(
            *(marked(node) for node in body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node))
        )
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = set().union(*(marked(decorator) for decorator in node.decorator_list))
                found[f"{path.relative_to(root)}::{node.name}"] = file_marks | marks
    return found


def test_the_sample_covers_every_file_and_the_essential_mechanisms(root: Path) -> None:
    marks = functions(root)
    chosen = cross_section(marks, str, lambda name: marks[name])
    files = {name.partition("::")[0] for name, its_marks in marks.items() if "slow" not in its_marks}
    assert {name.partition("::")[0] for name in chosen} == files
    assert len(chosen) < (SHARE + 0.05) * len(marks) + len(files)
    always = [name for name, its_marks in marks.items() if "quick" in its_marks]
    assert set(always) <= set(chosen)
    # A killed and resumed run, ranks that share tables, a JAX tower over tables.
    for room in ("pipelines", "embedding", "examples"):
        assert any(f"tests/{room}/" in name for name in always), room


def test_the_sample_includes_new_tests_and_one_set_of_parameters_each() -> None:
    names = [f"tests/a/test_{n % 20}.py::test_{n}[{case}]" for n in range(1000) for case in range(3)]
    chosen = cross_section(names, str, lambda name: set())
    assert 0.2 * 1000 < len(chosen) < 0.32 * 1000
    assert len({name.partition("[")[0] for name in chosen}) == len(chosen)
    assert chosen == [name for name in names if name in set(chosen)]
    # Sampled tests stay in the sample as others are added, except for the one that represents a file.
    more = cross_section([*names, *(name + "x" for name in names[:300])], str, lambda name: set())
    assert len({*chosen} - {*more}) <= 20
    alone = cross_section(["f::slow", "f::new[1]", "f::new[2]"], str, lambda name: {"slow"} & {name[3:]})
    assert len(alone) == 1
    assert alone[0].startswith("f::new")
    assert cross_section(names, str, lambda name: {"slow"}) == []
    assert len(cross_section(names, str, lambda name: {"quick"})) == 1000
