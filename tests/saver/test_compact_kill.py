"""SIGKILL at every moment of a compaction, and of an incremental save, at which something on the disk changes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver import Saver
from recis_hybrid.saver.chain import Checkpoint
from tests.saver.fakes import entries
from tests.support.toy import Toy

# As in test_saver_kill.py: a fork for each moment, which counts its way to the call at which it kills itself.
PROGRAM = textwrap.dedent(
    """
    import json, os, pathlib, shutil, signal, sys
    import torch
    from recis_hybrid.saver import Saver, compact, row_files, storage, tensors
    from recis_hybrid.saver.chain import Checkpoint
    from tests.support.toy import Toy

    torch.set_num_threads(1)
    what, root, base = sys.argv[1:]

    def counted(owner, name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            if state["left"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            state["left"] -= 1
            return real(*args, **kwargs)
        setattr(owner, name, call)

    def act():
        if what == "compact":
            compact.compact(Checkpoint(pathlib.Path(root), 4))
        else:
            saver.save(5, delta=True, engine=toy.engine, note=1)

    def work(moment):
        state["left"] = moment
        for owner, names in ((os, ("fsync", "unlink", "rmdir")), (pathlib.Path, ("mkdir", "rename")),
                             (tensors, ("write_file",)), (row_files, ("write_file",)), (storage, ("_exchange",))):
            for name in names:
                counted(owner, name)
        act()

    toy, saver = Toy(seed=3), Saver(root, keep=1)
    shutil.copytree(base, root)
    saver.load(4, engine=toy.engine)
    toy.train_steps(1)
    state = {"left": -1}
    moment, verdicts = 0, []
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        child = os.fork()
        if child == 0:
            try:
                work(moment)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        shutil.copytree(root, f"{base}.{moment}")
        verdicts.append(status)
        if os.WIFEXITED(status):
            break
        moment += 1
    print(json.dumps(verdicts))
    """
)


def whole(root: Path, step: int) -> dict[str, dict[str, list[object]]]:
    """The tables of a checkpoint, with whatever it builds on."""
    checkpoint = Checkpoint(root, step)
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
        saver.save(step, delta=True, engine=toy.engine, note=step)
    expected = {step: whole(base, step) for step in (2, 4)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(tmp_path / "run"), str(base)],
        cwd=root, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert all(os.WTERMSIG(status) == signal.SIGKILL for status in verdicts[:-1])
    assert len(verdicts) > 20
    for moment in range(len(verdicts)):
        place = tmp_path / f"base.{moment}"
        found = Saver(place, keep=2)
        assert found.steps() in ([2, 4], [2, 4, 5])
        for step in found.steps():
            assert whole(place, step) == expected.get(step, whole(place, step)), (moment, step)
        found.save(6, note=1)
        assert entries(place) == [f"step_{step:06d}" for step in found.steps()]
