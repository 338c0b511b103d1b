"""Online learning in windows, with and without admission and eviction."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples import online


def test_rows_stay_flat_while_new_ids_keep_coming(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "online.png"
    monkeypatch.setattr(sys, "argv", ["online.py", "--quick", "--plot", str(plot)])
    online.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    users, kept = online.USERS, 500
    assert figures["all"]["rows"][1] > 1.6 * figures["all"]["rows"][0] > users + 4 * 1000
    assert figures["bounded"]["rows"][1] <= users + kept
    assert figures["bounded"]["mib"][1] < 1.01 * figures["bounded"]["mib"][0]
    assert 0.52 < figures["bounded"]["auc"] < figures["best_auc"]
    assert figures["bounded"]["auc"] > figures["all"]["auc"] - 0.02
    assert plot.read_bytes().startswith(b"\x89PNG")
