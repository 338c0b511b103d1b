import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, PartState, Saver, TableState
from tests.support.devices import EDGE_IDS
from tests.support.toy import Toy


def saved(path: Path, steps: int = 5) -> Toy:
    toy = Toy()
    toy.train_steps(steps)
    Saver(path).save(steps, **toy.parts(), note={"epoch": 1})
    return toy


def test_a_new_process_predicts_the_same_bits(tmp_path: Path, root: Path) -> None:
    toy = saved(tmp_path / "run")
    save_file({"predictions": toy.predictions()}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file\n"
        "from recis_hybrid.saver import Saver\nfrom tests.support.toy import Toy\n"
        "toy = Toy(seed=9)\nassert Saver(sys.argv[1]).load(**toy.parts()) == 5\n"
        "assert torch.equal(toy.predictions(), load_file(sys.argv[2])['predictions']), 'other predictions'\n"
        "toy.train_steps(3)\nprint(toy.predictions().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "expected.safetensors")],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Optimizer state came along: training on gives what the undisturbed run gives.
    toy.train_steps(3)
    assert float(done.stdout) == toy.predictions().sum().item()


def test_resuming_is_bitwise_the_undisturbed_run(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    again = Toy(seed=3)
    Saver(tmp_path).load(**again.parts())
    for each in (toy, again):
        each.train_steps(4)
    assert torch.equal(toy.predictions(), again.predictions())
    assert all(torch.equal(a, b) for a, b in zip(toy.state_dict().values(), again.state_dict().values(), strict=True))


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    dense = load_file(tmp_path / "step_000005" / "dense" / "model.safetensors")
    assert torch.equal(dense["tower.0.weight"], toy.tower[0].weight)
    tables = [load_file(p) for p in sorted((tmp_path / "step_000005" / "sparse" / "engine" / "user").iterdir())]
    assert sorted(torch.cat([table["ids"] for table in tables]).tolist()) == sorted(EDGE_IDS)
    assert {"embedding", "exp_avg", "exp_avg_sq", "bucket_offsets"} <= set(tables[0])
    assert Saver(tmp_path).read_json("note") == {"epoch": 1}


def test_rows_are_in_bucket_order_and_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    toy = saved(tmp_path / "a")
    again = Toy(seed=3)
    Saver(tmp_path / "a").load(**again.parts())
    Saver(tmp_path / "b").save(5, **again.parts())
    assert toy.engine.tables[0].id_map.slots.data_ptr() != again.engine.tables[0].id_map.slots.data_ptr()
    for kind in ("sparse", "dense"):
        for file in (tmp_path / "a" / "step_000005" / kind).rglob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    table = load_file(next((tmp_path / "a" / "step_000005" / "sparse" / "engine" / "item").iterdir()))
    from recis_hybrid.ops.id_map import bucket_of

    buckets = bucket_of(table["ids"])
    keys = list(zip(buckets.tolist(), table["ids"].tolist(), strict=True))
    assert keys == sorted(keys)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    saver, module = Saver(tmp_path, keep=2), torch.nn.Linear(2, 1)
    (tmp_path / ".step_000000.partial").mkdir()
    for step in (1, 2, 3):
        saver.save(step, module=module)
    assert sorted(os.listdir(tmp_path)) == ["step_000002", "step_000003"]
    assert saver.latest() == 3
    assert saver.load(2, module=module) == 2
    with pytest.raises(CheckpointError, match="step must be above the latest one"):
        saver.save(3, module=module)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("where", ["dense/model.safetensors", "sparse/engine/user", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_a_damaged_file_is_refused_by_name_and_nothing_changes(
    tmp_path: Path, where: str, harm: Callable[[Path], None]
) -> None:
    saved(tmp_path)
    path = tmp_path / "step_000005" / where
    path = next(path.iterdir()) if path.is_dir() else path
    harm(path)
    other = Toy(seed=7)
    before = other.predictions()
    with pytest.raises(CheckpointError) as caught:
        Saver(tmp_path).load(**other.parts())
    if where != "manifest.json" or harm is not remove:
        assert isinstance(caught.value, CorruptCheckpoint)
        assert path.name in str(caught.value)
    assert torch.equal(other.predictions(), before)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    (tmp_path / "step_000005" / "dense" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match="also holds"):
        Saver(tmp_path).load(model=toy)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Toy(dim=4)
    before = other.predictions()
    for part in ("engine", "model"):
        with pytest.raises(CheckpointMismatch) as caught:
            Saver(tmp_path).load(**{part: other.parts()[part]})
        assert "6" in str(caught.value) or "12" in str(caught.value)
        assert "4" in str(caught.value) or "8" in str(caught.value)
    with pytest.raises(CheckpointMismatch, match="'other' must be in the checkpoint, which has"):
        Saver(tmp_path).load(other=other)
    assert torch.equal(other.predictions(), before)


@pytest.mark.parametrize("path", ["../../outside.safetensors", "/etc/hostname", "dense/../../x.safetensors"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, path: str) -> None:
    toy = saved(tmp_path)
    manifest = tmp_path / "step_000005" / "manifest.json"
    text = manifest.read_text().replace("dense/model.safetensors", path)
    assert path in text
    manifest.write_text(text)
    with pytest.raises(CorruptCheckpoint, match="manifest.json"):
        Saver(tmp_path).load(model=toy)


def test_ids_twice_and_bad_parts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Twice:
        def checkpoint_state(self) -> PartState:
            ids = torch.tensor([4, 4])
            columns = {"ids": ids, "embedding": torch.zeros(2, 3)}
            return PartState(tables={"t": TableState(columns, torch.tensor([1, 1]), {"dim": 3})})

        def load_checkpoint_state(self, state: PartState) -> None:
            raise AssertionError

    with pytest.raises(CheckpointError, match="'t'"):
        Saver(tmp_path).save(1, part=Twice())
    with pytest.raises(CheckpointError, match="part"):
        Saver(tmp_path).save(1, part=object())
    assert not [name for name in os.listdir(tmp_path) if name.startswith("step_")]


@pytest.mark.parametrize("moment", range(0, 12, 2))
def test_a_kill_in_mid_save_leaves_the_last_checkpoint_whole(tmp_path: Path, root: Path, moment: int) -> None:
    # The process kills itself at its n-th fsync: every file, folder and rename of a save has one around it.
    saved(tmp_path)
    code = (
        "import os, signal, sys\nfrom recis_hybrid.saver import Saver\nfrom tests.support.toy import Toy\n"
        "toy = Toy()\ntoy.train_steps(6)\nleft = int(sys.argv[2])\nreal = os.fsync\n"
        "def fsync(fd):\n    global left\n    if left == 0:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left -= 1\n    real(fd)\n"
        "os.fsync = fsync\nSaver(sys.argv[1]).save(6, **toy.parts())\nprint('saved')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(moment)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL or done.stdout == "saved\n", done.stderr
    toy = Toy(seed=8)
    # Killed after the rename, the new checkpoint is there too, and as whole.
    assert Saver(tmp_path).load(**toy.parts()) in ((6,) if done.stdout else (5, 6))
    toy.train_steps(1)
    Saver(tmp_path).save(7, **toy.parts())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_manifest_is_json_of_a_stated_version(tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = json.loads((tmp_path / "step_000005" / "manifest.json").read_text())
    text = json.dumps(manifest)
    assert "recis_hybrid.checkpoint" in text
    assert manifest["format_version"] == 1
    assert manifest["world_size"] == 1
