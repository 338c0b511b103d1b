"""The code of docs/bundles.md runs, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid.app import cli
from recis_hybrid.serving.features.program import OPERATORS


def test_the_code_blocks_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "bundles.md").read_text()
    (shell,) = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [line.split()[1:] for line in shell.splitlines() if line.startswith("recis-hybrid ")]
    assert [command[0] for command in commands] == ["init", "train", "export"]
    for command in commands:
        assert cli.main(command) == 0
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/bundles.md", "exec"), names)
    folder = re.search(r"`first/bundle/(step_\d+)`", text)
    assert folder is not None
    assert names["bundle"].path == Path("first/bundle") / folder[1]
    assert names["scores"].shape == (2,)
    computed = names["features"](names["batch"])
    vectors = names["engine"].eval()(computed)
    expected = names["tower"](vectors["user"], vectors["words"], computed["price"])
    np.testing.assert_allclose(names["found"], torch.sigmoid(expected).detach().numpy(), rtol=0, atol=1e-6)


def test_every_operator_is_listed(root: Path) -> None:
    text = (root / "docs" / "bundles.md").read_text()
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|", text[text.index("| `op` | parameters |") :], re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row)]
    assert sorted(listed) == sorted(["op", *OPERATORS])
