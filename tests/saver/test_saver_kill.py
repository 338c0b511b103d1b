"""SIGKILL at every moment of a save at which something on the disk changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from recis_hybrid.saver import Saver
from tests.saver.fakes import empty_shelf, entries, example_shelf

# The parent forks a child for each moment, so that torch is imported once. The child counts its way through all calls
# that change the disk and kills itself at the given one, before it or, of a call that writes data, half way through.
PROGRAM = textwrap.dedent(
    """
    import json, os, pathlib, shutil, signal, sys
    import torch
    from torch import nn
    from recis_hybrid.saver import Saver, row_files, saver as saver_module, tensors
    from tests.saver.fakes import entries, example_shelf

    torch.set_num_threads(1)
    root, base = sys.argv[1:]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(owner, name, half=None):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            if state["left"] == 0:
                state["left"] = -1
                if half is not None:
                    half(real, *args, **kwargs)
                die()
            state["left"] -= 1
            return real(*args, **kwargs)
        setattr(owner, name, call)

    def half_a_file(real, path, pieces):
        real(path, pieces)
        os.truncate(path, os.path.getsize(path) // 2)

    def save(moment):
        state["left"] = moment
        counted(os, "fsync")
        counted(os, "unlink")
        counted(os, "rmdir")
        counted(pathlib.Path, "mkdir")
        counted(pathlib.Path, "rename")
        counted(tensors, "write_file", half_a_file)
        counted(row_files, "write_file", half_a_file)
        counted(saver_module, "superfluous")
        saver = Saver(root, keep=2)
        saver.save(30, engine=example_shelf(), model=nn.Linear(2, 2), note=30)
        saver.wait()

    state = {"left": -1}
    verdicts = []
    moment = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        child = os.fork()
        if child == 0:
            save(moment)
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


def sound(root: Path, step: int) -> bool:
    model = nn.Linear(2, 2)
    engine = empty_shelf()
    saver = Saver(root)
    saver.load(step, engine=engine, model=model)
    assert engine.loaded is not None
    ids = engine.loaded.tables["user/country"].columns["ids"]
    return saver.read_json("note", step) == step and torch.equal(ids.sort().values, example_ids())


def example_ids() -> torch.Tensor:
    return example_shelf().state.tables["user/country"].columns["ids"].sort().values


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save(tmp_path: Path, root: Path) -> None:
    base = tmp_path / "base"
    for step in (10, 20):
        Saver(base).save(step, engine=example_shelf(), model=nn.Linear(2, 2), note=step)
    # Remains of an earlier crash, which the save is to remove.
    shutil.copytree(base / "step_000010", base / ".step_000025.partial")
    (base / ".step_000005.deleted").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(base)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert [os.WTERMSIG(status) for status in verdicts[:-1]] == [signal.SIGKILL] * (len(verdicts) - 1)
    assert os.WEXITSTATUS(verdicts[-1]) == 0
    assert len(verdicts) > 25

    ways: set[tuple[int, ...]] = set()
    for moment in range(len(verdicts)):
        found = Saver(tmp_path / f"base.{moment}", keep=2)
        steps = found.steps()
        ways.add(tuple(steps))
        # Never fewer than before, never one that only looks whole.
        assert 20 in steps
        assert all(sound(tmp_path / f"base.{moment}", step) for step in steps), moment
        found.save(31, engine=example_shelf(), model=nn.Linear(2, 2), note=31)
        found.wait()
        after = entries(tmp_path / f"base.{moment}")
        assert after == [f"step_{step:06d}" for step in found.steps()]
        assert found.steps() == [max(steps), 31]
    assert ways == {(10, 20), (10, 20, 30), (20, 30)}
