"""Incremental checkpoints: base and deltas restore tables exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Placement, Unused
from recis_hybrid.embedding.table.change_log import _FEW
from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, PartState, Saver, TableState
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.checkpoint.delta import apply_changes, merge_changes
from tests.saver.fakes import entries
from tests.support.devices import on_devices

NAMES = ("a", "b", "counted")


def engine_of(
    seed: int = 0, coalesce: bool = True, device: str = "cpu", placement: Placement | None = None
) -> EmbeddingEngine:
    plain = EmbeddingConfig(dim=3, placement=placement)
    counted = EmbeddingConfig(dim=3, placement=placement, admission=MinFrequency(2))
    return EmbeddingEngine(
        {"a": plain, "b": plain, "counted": counted},
        optimizer=optim.Adam,
        seed=seed,
        coalesce=coalesce,
        device=device,
    )


def rows_of(state: PartState) -> dict[str, Any]:
    """Return every column of every table by id, as plain numbers, and the meta."""
    tables = {}
    for name, table in state.tables.items():
        order = table.columns["ids"].argsort()
        assert table.removed is None
        tables[name] = {column: values[order].tolist() for column, values in table.columns.items()}
    return {"tables": tables, "meta": state.meta}


def same(saver: Saver, engine: EmbeddingEngine, step: int) -> None:
    """Check that loading into another engine replaces its rows by those of ``engine``."""
    other = engine_of(seed=9)
    other.train()({name: torch.tensor([5, 77]) for name in NAMES})
    saver.load({"engine": other}, step)
    assert rows_of(other.checkpoint_state()) == rows_of(engine.checkpoint_state())


def trained(engine: EmbeddingEngine, steps: int = 1, first: int = 0) -> None:
    """Train; each step looks up ten new ids."""
    optimizer = optim.Adam(engine.parameters(), lr=0.1)
    for step in range(first, first + steps):
        ids = torch.arange(10 * step, 10 * step + 10, device=engine.device)
        sum(out.sum() for out in engine.train()(dict.fromkeys(NAMES, ids)).values()).backward()
        optimizer.step()


def written(root: Path, step: int, table: str, above: str = "sparse") -> list[int]:
    """Return the ids in the files of a table."""
    files = (root / f"step_{step:06d}" / above / "engine" / table).iterdir()
    return sorted(torch.cat([load_file(file)["ids"] for file in files]).tolist())


@on_devices
def test_only_changes_are_written(tmp_path: Path, device: str) -> None:
    engine, saver = engine_of(device=device), Saver(tmp_path)
    trained(engine, 5)
    saver.save(5, {"engine": engine}, delta=True)  # the first is full
    assert written(tmp_path, 5, "a") == list(range(50))
    trained(engine, 1, first=5)
    engine.evict(Unused(4))  # rows last seen in steps 1 and 2
    engine.tables[0].erase(0, torch.tensor([31, 999]))
    engine.tables[0].insert(0, torch.tensor([45]), {"embedding": torch.ones(1, 3)})
    saver.save(6, {"engine": engine}, delta=True)
    assert written(tmp_path, 6, "a") == [45, *range(50, 60)]
    assert written(tmp_path, 6, "a", "removed") == [*range(20), 31, 999]
    assert written(tmp_path, 6, "b", "removed") == list(range(20))
    same(Saver(tmp_path), engine, 6)
    saver.save(7, {"engine": engine}, delta=True)
    assert written(tmp_path, 7, "b") == []
    # Rows of the last step before a save are in that save, and not written again.
    same(Saver(tmp_path), engine, 7)


@on_devices
def test_admission_counts_are_added_and_removed(tmp_path: Path, device: str) -> None:
    engine, saver = engine_of(device=device), Saver(tmp_path)
    none = torch.empty(0, dtype=torch.int64, device=device)

    def look_up(*ids: int) -> None:
        engine.train()({"a": none, "b": none, "counted": torch.tensor(ids, device=device)})

    look_up(1, 2, 3)
    saver.save(1, {"engine": engine}, delta=True)
    assert written(tmp_path, 1, "counted.admission") == [1, 2, 3]
    look_up(2, 9)  # 2 gets its row
    saver.save(2, {"engine": engine}, delta=True)
    assert written(tmp_path, 2, "counted.admission") == [9]
    assert written(tmp_path, 2, "counted.admission", "removed") == [2]
    same(Saver(tmp_path), engine, 2)
    table = next(t for t in engine.tables if t.store.gate is not None)
    table.clear(0)
    saver.save(3, {"engine": engine}, delta=True)
    same(Saver(tmp_path), engine, 3)


def test_nothing_is_recorded_before_the_first_delta_and_little_after(tmp_path: Path) -> None:
    engine, saver = engine_of(), Saver(tmp_path)
    table = engine.tables[0]
    saver.save(1, {"engine": engine})
    assert len(table.change_logs) == 0
    saver.save(2, {"engine": engine}, delta=True)
    (log,) = table.change_logs
    for _ in range(20):  # the same ids are inserted and erased
        table.insert(0, torch.arange(_FEW))
        table.erase(0, torch.arange(_FEW))
    assert log._ids[0]._added_size + log._ids[0]._sizes.sum() <= 2 * 2.5 * _FEW
    assert log.ids(0).tolist() == list(range(_FEW))
    # More ids than the table has rows: writing the whole table is cheaper.
    table.erase(0, torch.arange(3 * _FEW))
    assert log.whole == {0}
    assert log.ids(0).numel() == 0
    table.insert(0, torch.arange(5))
    saver.save(3, {"engine": engine}, delta=True)
    assert StoredCheckpoint(tmp_path, 3).manifest.parts["engine"].tables["a"].removed is None
    same(Saver(tmp_path), engine, 3)
    del log, saver
    assert len(table.change_logs) == 0


def test_two_savers_are_independent(tmp_path: Path) -> None:
    engine, one, two = engine_of(), Saver(tmp_path / "one"), Saver(tmp_path / "two")
    for step in range(1, 5):
        trained(engine, 1, first=step)
        engine.tables[0].erase(0, torch.tensor([10 * step]))
        one.save(step, {"engine": engine}, delta=True)
        if step % 2:
            two.save(step, {"engine": engine}, delta=True)
    same(one, engine, 4)  # replaces the rows of another engine
    same(Saver(tmp_path / "one"), engine, 4)
    two.save(5, {"engine": engine}, delta=True)
    same(Saver(tmp_path / "two"), engine, 5)
    assert StoredCheckpoint(tmp_path / "two", 5).manifest.previous is not None


def test_a_failed_save_loses_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asynchronous in (False, True):
        root = tmp_path / str(asynchronous)
        engine, saver = engine_of(), Saver(root, async_save=asynchronous)
        trained(engine, 2)
        saver.save(1, {"engine": engine}, delta=True)
        saver.wait()
        engine.tables[0].erase(0, torch.tensor([3]))
        trained(engine, 1, first=2)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(CheckpointError, match="No space left"):  # noqa: PT012 - either of the two
                saver.save(2, {"engine": engine}, delta=True)
                saver.wait()
        trained(engine, 1, first=3)
        saver.save(3, {"engine": engine}, delta=True)
        saver.wait()
        link = StoredCheckpoint(root, 3).manifest.previous
        assert link is not None
        assert link.step == 1
        same(Saver(root), engine, 3)


def test_keep_spares_base_checkpoints(tmp_path: Path) -> None:
    engine, saver = engine_of(), Saver(tmp_path, keep=2)
    saver.save(1, {"note": 1})
    for step in range(2, 6):
        trained(engine, 1, first=step)
        saver.save(step, {"engine": engine}, delta=True)
    assert saver.steps() == [2, 3, 4, 5]
    saver.save(6, {"engine": engine})
    assert saver.steps() == [2, 3, 4, 5, 6]
    saver.save(7, {"engine": engine}, delta=True)
    assert saver.steps() == [6, 7]
    assert entries(tmp_path) == ["step_000006", "step_000007"]


def test_checkpoints_are_deleted_before_their_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, saver = engine_of(), Saver(tmp_path, keep=1)
    for step in range(1, 4):
        saver.save(step, {"engine": engine}, delta=True)
    seen, rename = [], Path.rename

    def look(path: Path, target: Path) -> Path:
        result = rename(path, target)
        seen.append(saver.steps())
        return result

    monkeypatch.setattr(Path, "rename", look)
    saver.save(4, {"engine": engine})
    assert seen == [[1, 2, 3, 4], [1, 2, 4], [1, 4], [4]]


def test_new_or_replaced_parts_are_written_in_full(tmp_path: Path) -> None:
    engine, other, saver = engine_of(), engine_of(seed=2), Saver(tmp_path)
    trained(engine), trained(other, 2)
    saver.save(1, {"engine": engine}, delta=True)
    saver.save(2, {"engine": other, "more": engine}, delta=True)
    assert all(
        t.removed is None for p in StoredCheckpoint(tmp_path, 2).manifest.parts.values() for t in p.tables.values()
    )
    same(Saver(tmp_path), other, 2)


@pytest.mark.parametrize("harm", ["missing", "changed", "file", "truncated"])
def test_a_chain_with_a_bad_link_is_refused(tmp_path: Path, harm: str) -> None:
    engine, saver = engine_of(), Saver(tmp_path)
    saver.save(1, {"engine": engine})
    for step in (2, 3, 4):
        trained(engine, 1, first=step)
        saver.save(step, {"engine": engine, "note": step}, delta=True)
    middle = tmp_path / "step_000003"
    if harm == "missing":
        shutil.rmtree(middle)
    elif harm == "changed":  # by a checkpoint of another run
        shutil.rmtree(middle)
        again = Saver(tmp_path / "other")
        again.save(2, {"engine": engine}, delta=True)
        again.save(3, {"engine": engine}, delta=True)
        (tmp_path / "other" / "step_000003").rename(middle)
    else:
        file = next((middle / "sparse" / "engine" / "a").iterdir())
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data if harm == "file" else data[:-3])
    fresh = engine_of(seed=3)
    with pytest.raises(CorruptCheckpoint) as caught:
        Saver(tmp_path).load({"engine": fresh})
    message = str(caught.value)
    assert {
        "missing": f"{tmp_path / 'step_000004'}: holds changes since step 3, which is missing in",
        "changed": f"{tmp_path / 'step_000004'}: holds changes since step 3, which has changed: the SHA-256 of",
        "file": f"{middle}/sparse/engine/a/00000-65535.safetensors (part 'engine', table 'a'): bytes 0 to",
        "truncated": f"{middle}/sparse/engine/a/00000-65535.safetensors (part 'engine'): must have",
    }[harm] in message
    assert "Of these, the last one with all its files is 2." in message
    assert len(fresh.tables[0]) == 0
    assert Saver(tmp_path).read_json("note", step=4) == 4  # JSON needs no base checkpoint
    assert Saver(tmp_path).load({"engine": fresh}, 2) == 2


def test_deltas_continue_after_a_load(tmp_path: Path) -> None:
    engine, saver = engine_of(), Saver(tmp_path)
    for step in (1, 2):
        trained(engine, 1, first=step)
        saver.save(step, {"engine": engine}, delta=True)
    del saver
    engine, saver = engine_of(seed=4), Saver(tmp_path)
    saver.load({"engine": engine})
    trained(engine, 1, first=3)
    saver.save(3, {"engine": engine}, delta=True)
    assert written(tmp_path, 3, "a") == list(range(30, 40))
    same(Saver(tmp_path), engine, 3)
    shutil.rmtree(tmp_path / "step_000003")
    saver.save(4, {"engine": engine}, delta=True)  # its base is gone
    assert StoredCheckpoint(tmp_path, 4).manifest.previous is None


def table_state(rows: dict[int, float], removed: list[int] | None) -> TableState:
    ids = torch.tensor(sorted(rows), dtype=torch.int64)
    removed_state = None
    if removed is not None:
        r = torch.tensor(sorted(removed, key=lambda i: (i % 7, i)), dtype=torch.int64)
        removed_state = TableState({"ids": r}, r % 7, {})
    columns = {"ids": ids, "x": torch.tensor([rows[i] for i in ids.tolist()], dtype=torch.bfloat16)[:, None]}
    columns["flag"] = columns["x"][:, 0] > 50
    order = (ids % 7 * 1000 + ids).argsort()
    return TableState({n: c[order] for n, c in columns.items()}, (ids % 7)[order], {}, removed=removed_state)


@given(st.data())
def test_applied_changes_equal_a_dictionary(data: st.DataObject) -> None:
    ids, values = st.integers(0, 60), st.integers(0, 100).map(float)
    expected = data.draw(st.dictionaries(ids, values))
    states = [table_state(expected, None)]
    expected = dict(expected)
    for _ in range(data.draw(st.integers(0, 4))):
        rows = data.draw(st.dictionaries(ids, values))
        erased = [i for i in data.draw(st.lists(ids, unique=True)) if i not in rows]
        states.append(table_state(rows, erased))
        expected = {i: v for i, v in (expected | rows).items() if i not in erased}
    found, wanted = states[0], table_state(expected, None)
    if len(states) > 1:
        found = apply_changes(found, merge_changes(states[1:]))
    assert torch.equal(found.buckets, wanted.buckets)
    assert all(torch.equal(found.columns[name], column) for name, column in wanted.columns.items())


def test_a_step_that_is_saved_again_may_have_another_base(tmp_path: Path) -> None:
    engine, saver = engine_of(), Saver(tmp_path, keep=1)
    saver.save(1, {"engine": engine}, delta=True)
    saver.save(2, {"engine": engine})
    saver.save(3, {"engine": engine})
    shutil.rmtree(tmp_path / "step_000003")
    Saver(tmp_path / "aside").save(2, {"engine": engine})
    (tmp_path / "aside" / "step_000002").rename(tmp_path / "step_000002")
    saver.load({"engine": engine}, 2)
    saver.save(3, {"engine": engine}, delta=True)  # the first step 3 had no base
    saver.wait()
    assert saver.steps() == [2, 3]
    same(Saver(tmp_path), engine, 3)
