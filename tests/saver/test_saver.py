from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recis_hybrid.checkpointing import tables_apart
from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, PartState, Saver, TableState
from tests.saver.fakes import Shelf, entries
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.programs import run_code
from tests.support.toy import Toy


def saved(path: Path, steps: int = 5, device: str = "cpu") -> Toy:
    toy = Toy(device=device)
    toy.train_steps(steps)
    Saver(path).save(steps, {**toy.parts(), "note": {"epoch": 1}})
    return toy


def test_a_new_process_predicts_the_same_bits(tmp_path: Path) -> None:
    toy = saved(tmp_path / "run")
    save_file({"predictions": toy.predictions()}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file\n"
        "from recis_hybrid.saver import Saver\nfrom tests.support.toy import Toy\n"
        "toy = Toy(seed=9)\nassert Saver(sys.argv[1]).load(toy.parts()) == 5\n"
        "assert torch.equal(toy.predictions(), load_file(sys.argv[2])['predictions']), 'other predictions'\n"
        "toy.train_steps(3)\nprint(toy.predictions().sum().item())"
    )
    done = run_code(code, str(tmp_path / "run"), str(tmp_path / "expected.safetensors"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    # Optimizer state is restored: further training equals that of the undisturbed run.
    toy.train_steps(3)
    assert float(done.stdout) == toy.predictions().sum().item()


@on_devices
def test_a_resumed_run_is_bitwise_identical(tmp_path: Path, device: str) -> None:
    toy = saved(tmp_path, device=device)
    again = Toy(seed=3, device=device)
    Saver(tmp_path).load(again.parts())
    for each in (toy, again):
        each.train_steps(4)
    assert torch.equal(toy.predictions(), again.predictions())
    with tables_apart():
        states = toy.state_dict(), again.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    dense = load_file(tmp_path / "step_000005" / "dense" / "model.safetensors")
    assert torch.equal(dense["tower.0.weight"], toy.tower[0].weight)
    tables = [load_file(p) for p in sorted((tmp_path / "step_000005" / "sparse" / "engine" / "user").iterdir())]
    assert sorted(torch.cat([table["ids"] for table in tables]).tolist()) == sorted(EDGE_IDS)
    assert {"embedding", "exp_avg", "exp_avg_sq", "bucket_offsets"} <= set(tables[0])
    assert Saver(tmp_path).read_json("note") == {"epoch": 1}


@on_devices
def test_rows_are_in_bucket_order_and_equal_tables_give_equal_bytes(tmp_path: Path, device: str) -> None:
    toy = saved(tmp_path / "a")
    again = Toy(seed=3, device=device)
    Saver(tmp_path / "a").load(again.parts())
    Saver(tmp_path / "b").save(5, again.parts())
    maps = [engine.tables[0].store.id_map for engine in (toy.engine, again.engine)]
    assert maps[0].slots.memory[0].data_ptr() != maps[1].slots.memory[0].data_ptr()
    for kind in ("sparse", "dense"):
        for file in (tmp_path / "a" / "step_000005" / kind).rglob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    table = load_file(next((tmp_path / "a" / "step_000005" / "sparse" / "engine" / "item").iterdir()))
    from recis_hybrid.ops.id_map import bucket_of

    buckets = bucket_of(table["ids"])
    keys = list(zip(buckets.tolist(), table["ids"].tolist(), strict=True))
    assert keys == sorted(keys)


def test_only_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    saver, module = Saver(tmp_path, keep=2), torch.nn.Linear(2, 1)
    (tmp_path / ".step_000000.partial").mkdir()
    for step in (1, 2, 3):
        saver.save(step, {"module": module})
    assert entries(tmp_path) == ["step_000002", "step_000003"]
    assert saver.latest() == 3
    assert saver.load({"module": module}, 2) == 2


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
def test_a_damaged_file_is_named_and_nothing_changes(tmp_path: Path, where: str, harm: Callable[[Path], None]) -> None:
    saved(tmp_path)
    path = tmp_path / "step_000005" / where
    path = next(path.iterdir()) if path.is_dir() else path
    harm(path)
    other = Toy(seed=7)
    before = other.predictions()
    with pytest.raises(CheckpointError) as caught:
        Saver(tmp_path).load(other.parts())
    if where != "manifest.json" or harm is not remove:
        assert isinstance(caught.value, CorruptCheckpoint)
        assert path.name in str(caught.value)
    assert torch.equal(other.predictions(), before)


@pytest.mark.parametrize(
    ("part", "messages"),
    [
        (
            "engine",
            ["table 'user', column 'embedding': checkpoint float32 [6], live object float32 [4]", "table 'item', "],
        ),
        ("model", ["tensor 'tower.0.weight': checkpoint float32 [8, 12], live object float32 [8, 8]"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, part: str, messages: list[str]) -> None:
    saved(tmp_path)
    other = Toy(dim=4)
    before = other.predictions()
    with pytest.raises(CheckpointMismatch) as caught:
        Saver(tmp_path).load({part: other.parts()[part]})
    for message in (*messages, f"step_000005/manifest.json: part '{part}'", "Build the object as it was when it was"):
        assert message in str(caught.value)
    assert torch.equal(other.predictions(), before)


def test_a_missing_part_is_named_along_with_the_saved_ones(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"part 'other' must be in the checkpoint, which has \['dense', "):
        Saver(tmp_path).load({"other": toy})


def test_a_table_with_duplicate_ids_is_not_written(tmp_path: Path) -> None:
    columns = {"ids": torch.tensor([4, 4]), "embedding": torch.zeros(2, 3)}
    state = PartState(tables={"t": TableState(columns, torch.tensor([1, 1]), {"dim": 3})})
    with pytest.raises(CheckpointError, match="part 'part', table 't'.* an id must have one row, 4 has more"):
        Saver(tmp_path).save(1, {"part": Shelf(state)})
    assert entries(tmp_path) == []
