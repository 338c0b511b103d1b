from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from examples import demo
from recis_hybrid.metrics import auc

ROWS = 40_000


@pytest.fixture(scope="module")
def clicks() -> pa.Table:
    return demo.make_clicks(ROWS, seed=3)


def test_columns(clicks: pa.Table) -> None:
    expected = dict.fromkeys(demo.IDS, pa.int64()) | {"history": pa.list_(pa.int64()), "site": pa.string()}
    expected |= dict.fromkeys((*demo.NUMBERS, "label"), pa.float32()) | {"p_click": pa.float64()}
    assert {field.name: field.type for field in clicks.schema} == expected
    assert clicks.num_rows == ROWS
    assert all(clicks[name].null_count == 0 for name in clicks.column_names)
    assert set(clicks["label"].to_pylist()) == {0.0, 1.0}


def test_rows_are_deterministic(clicks: pa.Table) -> None:
    assert demo.make_clicks(ROWS, seed=3).equals(clicks)
    assert not demo.make_clicks(ROWS, seed=4)["label"].equals(clicks["label"])


def test_ids_that_other_tables_reserve_are_frequent(clicks: pa.Table) -> None:
    devices = clicks["device"].to_numpy()
    for reserved in (0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max):
        assert (devices == reserved).mean() > 0.03


def test_histories_contain_items(clicks: pa.Table) -> None:
    history = clicks["history"].combine_chunks()
    lengths = np.diff(history.offsets.to_numpy())
    assert (lengths.min(), lengths.max()) == (0, 20)
    assert set(history.values.to_pylist()) <= set(demo.make_clicks(10 * ROWS, seed=3)["item"].to_pylist())


def test_labels_are_sampled_from_p_click(clicks: pa.Table) -> None:
    labels, p_click = clicks["label"].to_numpy(), clicks["p_click"].to_numpy()
    assert 0.1 < labels.mean() < 0.4
    for group in np.array_split(np.argsort(p_click), 10):
        deviation = np.sqrt((p_click[group] * (1 - p_click[group])).sum()) / len(group)
        assert abs(labels[group].mean() - p_click[group].mean()) < 5 * deviation


def test_the_best_metrics_are_those_of_the_test_rows(tmp_path: Path, clicks: pa.Table) -> None:
    best = demo.write_clicks(tmp_path, ROWS, seed=3)
    train, test = (pq.read_table(tmp_path / f"{split}.parquet") for split in ("train", "test"))
    assert pa.concat_tables([train, test]).equals(clicks)
    assert test.num_rows == ROWS // 10
    labels, p_click = (torch.tensor(test[name].to_numpy()) for name in ("label", "p_click"))
    assert best["auc"] == auc(labels, p_click)
    # Noise in the true logits reduces the AUC.
    noise = torch.randn(len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert auc(labels, torch.special.expit(torch.logit(p_click) + noise)) < best["auc"] - 0.01
