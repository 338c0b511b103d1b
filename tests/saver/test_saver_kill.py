"""SIGKILL at every change on disk of a save."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from recis_hybrid.saver import Saver
from tests.saver.fakes import empty_shelf, entries, example_shelf
from tests.support.kills import killed

PROGRAM = textwrap.dedent(
    """
    import sys
    import torch
    from torch import nn
    from recis_hybrid.saver import Saver, saver as saver_module
    from recis_hybrid.saver.format import tensor_file
    from tests.saver.fakes import example_shelf
    from tests.support.kills import kill_at_every_moment

    torch.set_num_threads(1)

    def work():
        saver = Saver(sys.argv[1], keep=2)
        saver.save(30, {'engine': example_shelf(), 'model': nn.Linear(2, 2), 'note': 30})
        saver.wait()

    calls = [(tensor_file, "write_file"), (saver_module, "obsolete_steps")]
    kill_at_every_moment(work, *sys.argv[1:], calls)
    """
)


def sound(root: Path, step: int) -> bool:
    model = nn.Linear(2, 2)
    engine = empty_shelf()
    saver = Saver(root)
    saver.load({"engine": engine, "model": model}, step)
    assert engine.loaded is not None
    ids = engine.loaded.tables["user/country"].columns["ids"]
    return saver.read_json("note", step) == step and torch.equal(ids.sort().values, example_ids())


def example_ids() -> torch.Tensor:
    return example_shelf().state.tables["user/country"].columns["ids"].sort().values


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save(tmp_path: Path, root: Path) -> None:
    base = tmp_path / "base"
    for step in (10, 20):
        Saver(base).save(step, {"engine": example_shelf(), "model": nn.Linear(2, 2), "note": step})
    # Leftovers of an earlier crash, which the save must remove.
    shutil.copytree(base / "step_000010", base / ".step_000025.partial")
    (base / ".step_000005.deleted").mkdir()
    runs = killed(PROGRAM, root, str(tmp_path / "run"), str(base))
    assert runs > 25

    outcomes: set[tuple[int, ...]] = set()
    for moment in range(runs):
        found = Saver(tmp_path / f"base.{moment}", keep=2)
        steps = found.steps()
        outcomes.add(tuple(steps))
        # Never fewer than before, and never an incomplete one.
        assert 20 in steps
        assert all(sound(tmp_path / f"base.{moment}", step) for step in steps), moment
        found.save(31, {"engine": example_shelf(), "model": nn.Linear(2, 2), "note": 31})
        found.wait()
        after = entries(tmp_path / f"base.{moment}")
        assert after == [f"step_{step:06d}" for step in found.steps()]
        assert found.steps() == [max(steps), 31]
    assert outcomes == {(10, 20), (10, 20, 30), (20, 30)}
