"""Rules for every native operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recis_hybrid.ops  # registers the operators
from tests.support.devices import on_accelerators

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("recis::"))


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def test_the_operators_are_found() -> None:
    assert recis_hybrid.ops.hash is not None
    assert {"recis::update_rows", "recis::gather_bags", "recis::hash_bytes"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_kernel_a_fake_and_an_opcheck(operator: str, root: Path) -> None:
    assert has_kernel(operator, "CPU")
    assert has_kernel(operator, "Meta"), "register a fake in recis_hybrid/ops"
    use = re.compile(rf"\b(torch\.ops\.recis|RECIS)\.{operator.removeprefix('recis::')}(\.default)?,")
    tests = [path.read_text() for path in (root / "tests" / "ops").glob("test_*.py")]
    checks = [text for text in tests if "opcheck" in text]
    assert any(use.search(text) for text in checks), "check it with torch.library.opcheck in tests/ops"


_ON_DISK = "Records on disk are used by the CPU."
# Operators without a kernel for accelerators, and the reason.
HOST_ONLY = {
    "recis::blocks_export": "Fills buffers that are written to files; blocks on a GPU are read part by part "
    "(`blocks_read`) and copied to pinned memory.",
    "recis::crc32_pages": "Checks bytes that are read from or written to files, which are in host memory.",
    "recis::disk_fetch": _ON_DISK,
    "recis::disk_figures": _ON_DISK,
    "recis::disk_forget": _ON_DISK,
    "recis::disk_insert_grouped": _ON_DISK,
    "recis::disk_open": _ON_DISK,
    "recis::disk_pin": _ON_DISK,
    "recis::disk_read": _ON_DISK,
    "recis::disk_read_pinned": _ON_DISK,
    "recis::disk_stage": _ON_DISK,
    "recis::disk_touched": _ON_DISK,
    "recis::disk_unpin": _ON_DISK,
    "recis::file_order": "Orders rows that are written to files; their ids are copied to the host first.",
    "recis::first_bad_offsets": "Raises for offsets that were overwritten; on a GPU the host would have to wait, so "
    "kernels check the offsets that they follow.",
    "recis::huge_empty": "Allocates host memory; on a GPU torch's caching allocator does.",
    "recis::huge_zeros": "Maps host memory; on a GPU torch's caching allocator allocates it.",
    "recis::record_steps": "Writes a few numbers for each step of an optimizer, which are copied to the device.",
    "recis::vocabulary_slots": "Builds a vocabulary once, when an engine is built; the result is copied to the device.",
}


def table_of_devices() -> str:
    """Return the table of benchmarks/GPU.md: for each operator, its devices or the reason why there is only one."""
    lines = ["| operator | CPU | CUDA | why not |", "|---|---|---|---|"]
    for operator in OPERATORS:
        reason = HOST_ONLY.get(operator, "")
        lines.append(f"| `{operator.removeprefix('recis::')}` | yes | {'no' if reason else 'yes'} | {reason} |")
    return "\n".join(lines)


def test_the_table_of_devices_is_documented(root: Path) -> None:
    table = table_of_devices()
    assert table in (root / "benchmarks" / "GPU.md").read_text(), f"benchmarks/GPU.md must have this table:\n{table}"


@on_accelerators
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_kernels_for_accelerators(operator: str, device: str) -> None:
    key = "CUDA" if device == "cuda" else "PrivateUse1"
    # Not a computed kernel, which may be a fallback.
    found = torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    assert found == (operator not in HOST_ONLY), "register a kernel in csrc/cuda, or give the reason in HOST_ONLY"
