from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import ctr_log
from tests.support.near import assert_near

ROWS = 40_000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return ctr_log.make_rows(ROWS, seed=3)


def column(table: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = table[name].to_numpy()
    return values


def test_columns(table: pa.Table) -> None:
    expected = dict.fromkeys(ctr_log.FIELDS, pa.int64())
    expected |= {"history": pa.list_(pa.int64()), "site": pa.string()}
    expected |= dict.fromkeys(("price", "age_hours", "similarity", "label"), pa.float32())
    expected |= {"p_click": pa.float64()}
    assert {field.name: field.type for field in table.schema} == expected
    assert table.num_rows == ROWS
    assert all(table[name].null_count == 0 for name in table.column_names)
    assert set(column(table, "label")) == {0.0, 1.0}
    assert 0 < column(table, "p_click").min() < column(table, "p_click").max() < 1
    assert column(table, "price").min() > 0
    assert column(table, "age_hours").min() >= 0
    assert np.abs(column(table, "similarity")).max() <= 1


def test_the_same_seed_gives_the_same_rows(table: pa.Table) -> None:
    assert ctr_log.make_rows(ROWS, seed=3).equals(table)
    other = ctr_log.make_rows(ROWS, seed=4)
    assert not any(other[name].equals(table[name]) for name in table.column_names)


def test_ids_are_spread_over_64_bits_and_never_shared_by_two_fields() -> None:
    ids = np.concatenate([ctr_log.ids_of(name, seed=3) for name in ctr_log.FIELDS])
    assert len(np.unique(ids)) == sum(field.ids for field in ctr_log.FIELDS.values())
    # Of 2n words drawn evenly about n are negative, with a deviation of sqrt(n / 2); so it is with every other bit.
    set_bits = (ids[:, None].view(np.uint64) >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(set_bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(ids))


def test_the_ids_that_other_tables_reserve_are_common(table: pa.Table) -> None:
    devices = column(table, "device_id")
    for reserved in (0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max):
        assert (devices == reserved).mean() > 0.05


@pytest.mark.parametrize("name", ["user_id", "app_id", "hour_id"])
def test_ids_follow_zipfs_law(table: pa.Table, name: str) -> None:
    field = ctr_log.FIELDS[name]
    share = np.arange(1, field.ids + 1) ** -field.exponent
    share /= share.sum()
    for rank in (0, 1, 7, 50):
        seen = (column(table, name) == ctr_log.ids_of(name, seed=3)[rank]).sum()
        assert abs(seen - ROWS * share[rank]) < 5 * np.sqrt(ROWS * share[rank])


def test_histories_hold_items_and_lean_to_the_users_taste(table: pa.Table) -> None:
    history = table["history"].combine_chunks()
    lengths = np.diff(history.offsets.to_numpy())
    assert lengths.min() == 0
    assert lengths.max() == ctr_log.HISTORY
    order = np.argsort(ctr_log.ids_of("item_id", seed=3))
    items = ctr_log.ids_of("item_id", seed=3)[order]
    at = np.searchsorted(items, history.values.to_numpy())
    assert (items[at] == history.values.to_numpy()).all()
    users = {id_: rank for rank, id_ in enumerate(ctr_log.ids_of("user_id", seed=3))}
    ranks = np.array([users[id_] for id_ in column(table, "user_id")])
    taste = np.repeat(ctr_log.World.of(3).taste[ranks], lengths)
    liked = (order[at] % ctr_log.KINDS == taste).mean()
    assert abs(liked - (0.6 + 0.4 / ctr_log.KINDS)) < 0.01


def test_labels_are_drawn_by_p_click(table: pa.Table) -> None:
    labels, p_click = column(table, "label"), column(table, "p_click")
    assert 0.15 < labels.mean() < 0.3
    for group in np.array_split(np.argsort(p_click), 10):
        expected = p_click[group].mean()
        deviation = np.sqrt((p_click[group] * (1 - p_click[group])).sum()) / len(group)
        assert abs(labels[group].mean() - expected) < 5 * deviation


def test_every_part_of_the_logit_counts() -> None:
    # The logit of one row computed term by term, without the vectorised bookkeeping of offsets and ranks.
    world = ctr_log.World.of(5)
    ranks = {name: np.array([k + 1, k + 3]) for k, name in enumerate([*ctr_log.FIELDS, "site"])}
    ranks["slot_id"], kinds = np.array([2, 7]), ctr_log.KINDS
    history, offsets = np.array([8, 3, 10, 10, 4]), np.array([0, 2, 5])
    numbers = {
        "price": np.array([0.5, 3.0], np.float32),
        "age_hours": np.array([0.0, 24.0], np.float32),
        "similarity": np.array([-1.0, 0.25], np.float32),
    }
    found = ctr_log.logits(world, ranks, history, offsets, numbers)
    for row, clicked in enumerate(([8, 3], [10, 10, 4])):
        kind = ranks["item_id"][row] % kinds
        expected = -2.4 + sum(world.effects[name][rank[row]] for name, rank in ranks.items())
        expected += 0.9 if world.taste[ranks["user_id"][row]] == kind else 0.0
        expected += sum(item % kinds == kind for item in clicked) / len(clicked)
        expected += world.pairs[ranks["slot_id"][row], ranks["device_id"][row]]
        expected -= 0.45 * np.log(numbers["price"][row])
        expected += 0.9 * np.exp(-numbers["age_hours"][row] / 24) + 0.5 * numbers["similarity"][row]
        assert_near(found[row], expected, 4, terms=2.4)


def test_effects_do_not_hang_on_the_seed() -> None:
    for seed in range(3):
        for name, field in ctr_log.FIELDS.items():
            share, effects = ctr_log.shares(field), ctr_log.World.of(seed).effects[name]
            assert share @ effects == pytest.approx(0, abs=1e-12 * (share @ np.abs(effects)))
            assert share @ effects**2 == pytest.approx(field.spread**2)


def test_auc_counts_the_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.3).astype(np.float32)
    scores = np.round(rng.random(300) + 0.2 * labels, 1).astype(np.float64)
    clicks, others = scores[labels == 1][:, None], scores[labels == 0][None, :]
    assert ctr_log.auc(labels, scores) == pytest.approx(((clicks > others) + 0.5 * (clicks == others)).mean())
    assert ctr_log.auc(np.array([0.0, 1.0]), np.array([0.1, 0.2])) == 1.0
    assert ctr_log.auc(np.array([0.0, 1.0]), np.array([0.2, 0.2])) == 0.5
    with pytest.raises(ValueError, match="got 2 and 0"):
        ctr_log.auc(np.ones(2), np.zeros(2))


def test_logloss_is_the_entropy_of_the_truth() -> None:
    assert ctr_log.logloss(np.array([1.0, 0.0]), np.array([0.8, 0.4])) == pytest.approx(-np.log(0.8 * 0.6) / 2)


def test_the_bound_is_a_bound(tmp_path: Path) -> None:
    figures = ctr_log.write_log(tmp_path, rows=ROWS, seed=3)
    test = pq.read_table(tmp_path / "test")
    labels, p_click = column(test, "label"), column(test, "p_click")
    assert figures["bayes_auc"] == ctr_log.auc(labels, p_click)
    assert figures["bayes_logloss"] == ctr_log.logloss(labels, p_click)
    # The AUC expected of the truth: each pair weighed by the chance that its first clicks and its second does not.
    low_first = np.sort(p_click)
    missed = np.cumsum(1 - low_first) - (1 - low_first)
    expected = (low_first * missed).sum() / (
        low_first.sum() * (1 - low_first).sum() - (low_first * (1 - low_first)).sum()
    )
    assert figures["bayes_auc"] == pytest.approx(expected, abs=0.02)
    assert 0.80 < expected < 0.86
    # Any other order is worse, if only by as much as the noise in it.
    rng = np.random.default_rng(0)
    blurred = np.log(p_click / (1 - p_click)) + rng.normal(0, 1, len(p_click))
    assert ctr_log.auc(labels, blurred) < figures["bayes_auc"] - 0.01


def test_the_files(tmp_path: Path, table: pa.Table) -> None:
    ctr_log.write_log(tmp_path, rows=ROWS, seed=3)
    sizes = {}
    for split in ("train", "valid", "test"):
        files = sorted((tmp_path / split).iterdir())
        assert [file.name for file in files] == [f"part-{n:05d}.parquet" for n in range(4 if split == "train" else 2)]
        sizes[split] = [pq.ParquetFile(file).metadata.num_rows for file in files]
    assert [sum(sizes[split]) for split in sizes] == [32_000, 4_000, 4_000]
    read = pa.concat_tables([pq.read_table(tmp_path / split) for split in sizes])
    assert read.equals(table)


def test_a_file_has_several_row_groups(tmp_path: Path) -> None:
    ctr_log.write_log(tmp_path, rows=100_000, seed=3)
    assert pq.ParquetFile(tmp_path / "train" / "part-00000.parquet").metadata.num_row_groups == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"rows": 999}, "rows must be at least 1000.*got 999"), ({"seed": -1}, "seed must be at least 0, got -1")],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ctr_log.write_log(tmp_path, **arguments)


def test_the_program(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, str(root / "examples" / "ctr_log.py"), str(tmp_path)]
    done = subprocess.run([*command, "--rows", "5000", "--seed", "1"], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["rows"] == 5000
    assert {"label_rate", "bayes_auc", "bayes_logloss", "samples_per_s", "seconds"} <= figures.keys()
    refused = subprocess.run([*command, "--rows", "5"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "rows must be at least 1000" in refused.stderr
    assert "Traceback" not in refused.stderr
