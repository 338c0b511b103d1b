"""Full checkpoints from incremental ones, and exports, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver import Saver
from recis_hybrid.saver.cli import main
from recis_hybrid.saver.storage import local as storage
from tests.saver.fakes import entries
from tests.support.toy import Toy


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*.safetensors")}


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Toy]:
    """Return a run with steps 2 (full), 4 and 6; ``whole`` has step 6 in full, from another saver."""
    toy, saver = Toy(), Saver(tmp_path / "run")
    for step in (2, 4, 6):
        toy.train_steps(2)
        toy.engine.tables[0].erase(step % 2, torch.tensor([-1, 2**52 + 1]))
        toy.engine.tables[0].insert(0, torch.tensor([step]))
        saver.save(step, {**toy.parts(), "note": {"epoch": step}}, delta=True)
    Saver(tmp_path / "whole").save(6, {**toy.parts(), "note": {"epoch": 6}})
    return tmp_path / "run", toy


@pytest.mark.parametrize("swaps", [True, False])
def test_compact_writes_the_bytes_of_a_full_save(
    run: tuple[Path, Toy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], swaps: bool
) -> None:
    root = run[0]
    if not swaps:
        monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_, **__: object())
    assert "removed" in {path.parts[-4] for path in (root / "step_000006").rglob("*.safetensors")}
    assert main(["diff", str(root), str(root.parent / "whole")]) == 0
    assert main(["compact", str(root)]) == 0
    assert "step_000006 is a full checkpoint" in capsys.readouterr().out
    assert files(root / "step_000006") == files(root.parent / "whole" / "step_000006")
    ours, theirs = (json.loads((p / "step_000006/manifest.json").read_bytes()) for p in (root, root.parent / "whole"))
    assert ours["parts"] == theirs["parts"]
    assert "previous" not in ours
    assert entries(root) == ["step_000002", "step_000004", "step_000006"]
    assert main(["verify", str(root)]) == 0
    assert main(["compact", str(root)]) == 0  # nothing to do
    again = Toy(seed=4)
    saver = Saver(root, keep=1)
    saver.load(again.parts())
    assert torch.equal(again.predictions(), run[1].predictions())
    saver.save(7, again.parts())
    assert entries(root) == ["step_000007"]


def test_compact_a_step_to_another_directory(run: tuple[Path, Toy], capsys: pytest.CaptureFixture[str]) -> None:
    root = run[0]
    assert main(["compact", str(root), "--step", "4"]) == 1
    assert "step 6 builds on it" in capsys.readouterr().err
    saver = Saver(root, keep=None)
    saver.save(8, {"note": 1})
    assert main(["compact", str(root)]) == 0  # it is full already
    assert main(["compact", str(root), "--step", "6"]) == 1
    assert "another saver saves here" in capsys.readouterr().err
    assert main(["compact", "--json", str(root / "step_000004"), "--to", str(root.parent / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(root.parent / "out" / "step_000004")
    assert main(["diff", str(root / "step_000004"), found["path"]]) == 0
    assert main(["compact", str(root / "step_000004"), "--to", str(root.parent / "out")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_damaged_base_is_named_and_nothing_written(run: tuple[Path, Toy], capsys: pytest.CaptureFixture[str]) -> None:
    root = run[0]
    path = next((root / "step_000002" / "sparse" / "engine" / "item").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for command in (["compact", str(root)], ["verify", str(root)], ["export", str(root), str(root.parent / "out")]):
        assert main(command) == 1
        assert str(path) in capsys.readouterr().err
    assert entries(root) == ["step_000002", "step_000004", "step_000006"]
    assert entries(root.parent / "out") == []


def test_inspect_lists_changes(run: tuple[Path, Toy], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run[0])]) == 0
    text = capsys.readouterr().out
    assert "builds on step 4" in text
    assert "table user: 7 rows changed, 2 removed" in text
    assert main(["inspect", "--json", str(run[0]), "--step", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["previous"]) == (4, 2)


def test_a_failed_exchange_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "step_000004", tmp_path / ".step_000004.partial"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *_, **__: None)  # no atomic exchange
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="the disk is gone"):
        storage._exchange(new, old)
    assert (old / "name").read_text() == old.name
    monkeypatch.setattr(Path, "rename", rename)
    storage._exchange(new, old)
    assert (old / "name").read_text() == new.name
