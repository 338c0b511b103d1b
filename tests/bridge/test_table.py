"""The dtype table in README.md, compared with the conversions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import to_jax, to_torch  # noqa: E402
from recis_hybrid.bridge.exchange.dlpack import DTYPES  # noqa: E402


def outcomes(dtype: torch.dtype, x64: bool) -> tuple[str, str]:
    """Return the outcomes of the conversions of a dtype to JAX and back: "shared", "copied" or "refused"."""
    tensor = torch.zeros(16, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    with jax.enable_x64(True):
        array = to_jax(tensor)
    with jax.enable_x64(x64):
        back = to_torch(array)
        out = "shared" if back.data_ptr() == tensor.data_ptr() and back.dtype == dtype else "copied"
        try:
            there = to_jax(tensor)
        except ValueError:
            return "refused", out
    same = there.unsafe_buffer_pointer() == tensor.data_ptr() and there.dtype.itemsize == dtype.itemsize
    return "shared" if same else "copied", out


def test_the_documented_table_is_correct(root: Path) -> None:
    documented = {}
    for row in re.findall(
        r"^\| (.*?) \| (\w+) \| (\w+) \| (\w+) \|$", (root / "bridge" / "README.md").read_text(), re.M
    ):
        documented |= dict.fromkeys(row[0].split(", "), row[1:])
    actual = {}
    for dtype in DTYPES:
        (off, back), (on, back_on) = outcomes(dtype, x64=False), outcomes(dtype, x64=True)
        assert back == back_on
        actual[str(dtype).removeprefix("torch.")] = (off, on, back)
    assert documented == actual
