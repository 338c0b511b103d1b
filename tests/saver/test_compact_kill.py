"""SIGKILL at every change on disk of a compaction, and of an incremental save."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from tests.saver.fakes import entries
from tests.support.kills import killed
from tests.support.toy import Toy

PROGRAM = textwrap.dedent(
    """
    import pathlib, shutil, sys
    import torch
    from recis_hybrid.saver import Saver, compact
    from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
    from recis_hybrid.saver.format import tensor_file
    from recis_hybrid.saver.storage import local
    from tests.support.kills import kill_at_every_moment
    from tests.support.toy import Toy

    torch.set_num_threads(1)
    what, root, base = sys.argv[1:]

    def work():
        if what == "compact":
            compact.compact(StoredCheckpoint(pathlib.Path(root), 4))
        else:
            saver.save(5, {'engine': toy.engine, 'note': 1}, delta=True)

    toy, saver = Toy(seed=3), Saver(root, keep=1)
    shutil.copytree(base, root)
    saver.load({'engine': toy.engine}, 4)
    toy.train_steps(1)
    calls = [(tensor_file, "write_file"), (local, "_exchange")]
    kill_at_every_moment(work, root, base, calls)
    """
)


def whole(root: Path, step: int) -> dict[str, dict[str, list[object]]]:
    """Return the tables of a checkpoint, with the changes of its chain applied."""
    checkpoint = StoredCheckpoint(root, step)
    for part in checkpoint.manifest.parts:
        checkpoint.verify(part)
    tables = checkpoint.read("engine").tables
    return {name: {c: values.tolist() for c, values in table.columns.items()} for name, table in tables.items()}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compact", "save"])
def test_a_kill_at_any_moment(what: str, tmp_path: Path, root: Path) -> None:
    base = tmp_path / "base"
    toy, saver = Toy(), Saver(base, keep=None)
    for step in (2, 4):
        toy.train_steps(2)
        toy.engine.tables[0].erase(0, torch.tensor([step]))
        saver.save(step, {"engine": toy.engine, "note": step}, delta=True)
    expected = {step: whole(base, step) for step in (2, 4)}
    runs = killed(PROGRAM, root, what, str(tmp_path / "run"), str(base))
    assert runs > 20
    if what == "save":
        expected[5] = whole(tmp_path / f"base.{runs - 1}", 5)
        assert expected[5] != expected[4]
    for moment in range(runs):
        place = tmp_path / f"base.{moment}"
        found = Saver(place, keep=2)
        assert found.steps() in ([2, 4], [2, 4, 5])
        for step in found.steps():
            assert whole(place, step) == expected[step], (moment, step)
        found.save(6, {"note": 1})
        assert entries(place) == [f"step_{step:06d}" for step in found.steps()]
