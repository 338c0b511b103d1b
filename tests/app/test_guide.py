"""The code blocks of docs/training.md run in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within tensorboard
def test_the_code_blocks_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), names)
    assert names["figures"]["eval"]["auc"] > 0.9
    assert (tmp_path / "run" / "trace.json").exists()
    assert list((tmp_path / "run").glob("step_*"))
    # The log leads from a checkpoint to its training.
    saver = names["saver"]
    assert f'"digest": "{saver.digest(saver.latest())}"' in (tmp_path / "traced" / "log.jsonl").read_text()
