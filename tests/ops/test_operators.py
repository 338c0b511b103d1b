"""Rules for every native operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recis_hybrid.ops  # registers the operators

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("recis::"))


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def test_the_operators_are_found() -> None:
    assert recis_hybrid.ops.hash is not None
    assert {"recis::adam_update", "recis::gather_bags", "recis::hash_bytes"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_kernel_a_fake_and_an_opcheck(operator: str, root: Path) -> None:
    assert has_kernel(operator, "CPU")
    assert has_kernel(operator, "Meta"), "register a fake in recis_hybrid/ops"
    use = re.compile(rf"\b(torch\.ops\.recis|RECIS)\.{operator.removeprefix('recis::')}(\.default)?,")
    tests = [path.read_text() for path in (root / "tests" / "ops").glob("test_*.py")]
    checks = [text for text in tests if "opcheck" in text]
    assert any(use.search(text) for text in checks), "check it with torch.library.opcheck in tests/ops"


# CPU-only operators: they build vocabularies and checkpoint files. On a GPU, distinct ids are found by torch's sort.
ON_THE_HOST = {
    f"recis::{name}" for name in ("vocabulary_slots", "distinct_ids", "file_order", "crc32_pages", "blocks_export")
}


@pytest.mark.gpu
@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - ON_THE_HOST))
def test_every_operator_has_a_cuda_kernel(operator: str) -> None:
    assert has_kernel(operator, "CUDA")
