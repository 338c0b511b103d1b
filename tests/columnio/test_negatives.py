"""Negatives: no own items, the distribution, and reproducible draws."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader

from recis_hybrid.columnio import ColumnDataset, NegativeSampler, ReadOptions
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.workers import FORKED

ids = st.integers(-(2**63), 2**63 - 1)


def dense(batch: Batch, name: str = "negatives") -> torch.Tensor:
    column = batch[name]
    assert isinstance(column, torch.Tensor)
    return column


def ragged(batch: Batch, name: str = "negatives") -> RaggedTensor:
    column = batch[name]
    assert isinstance(column, RaggedTensor)
    return column.validate()


@given(
    table=st.lists(ids, min_size=12, max_size=40, unique=True),
    seed=st.integers(0, 9),
    count=st.integers(1, 5),
    in_batch=st.booleans(),
    data=st.data(),
)
def test_a_rows_own_items_are_never_drawn(table: list[int], seed: int, count: int, in_batch: bool, data: Any) -> None:
    size = data.draw(st.integers(12, 20)) if in_batch else data.draw(st.integers(0, 6))
    item = st.sampled_from(table)
    # The batch contains all of twelve items, of which a row excludes at most seven.
    positives = [*table[:12], *data.draw(st.lists(item, min_size=size - 12, max_size=size - 12))] if in_batch else None
    if positives is None:
        positives = data.draw(st.lists(item, min_size=size, max_size=size))
    seen = data.draw(st.lists(st.lists(item, max_size=6), min_size=size, max_size=size))
    items = None if in_batch else torch.tensor(table)
    sampler = NegativeSampler("item", count, items=items, exclude=["seen"], seed=seed)
    batch: Batch = {
        "item": torch.tensor(positives, dtype=torch.int64),
        "seen": RaggedTensor.from_lists(seen, dtype=torch.int64),
    }
    drawn = dense(sampler(batch))
    assert (drawn.shape, drawn.dtype) == ((size, count), torch.int64)
    allowed = set(positives if in_batch else table)
    for row, negatives in enumerate(drawn.tolist()):
        assert set(negatives) <= allowed - {positives[row], *seen[row]}
    assert torch.equal(dense(sampler(batch)), drawn)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("in_batch", [False, True])
def test_items_are_drawn_by_frequency_to_a_power(power: float, in_batch: bool) -> None:
    frequencies = {7: 1, 8: 16, 9: 3, 10: 80}
    batch: Batch
    if in_batch:
        sampler = NegativeSampler("item", 400, power=power, exclude=["seen"])
        positives = torch.tensor([item for item, count in frequencies.items() for _ in range(count)])
    else:
        sampler = NegativeSampler(
            "item",
            400,
            power=power,
            exclude=["seen"],
            items=torch.tensor([10, 7, 9, 8]),
            frequencies=torch.tensor([80, 1, 3, 16]),
        )
        positives = torch.full((100,), 7)
    batch = {"item": positives, "seen": torch.full_like(positives, 8)}
    rows = (positives == 7).nonzero().view(-1)
    drawn = torch.cat([dense(sampler({**batch}))[rows] for sampler in [sampler]]).view(-1).tolist()
    for epoch in range(1, 50 if in_batch else 1):
        sampler.set_epoch(epoch)
        drawn += dense(sampler(batch))[rows].view(-1).tolist()
    weights = {item: count**power for item, count in frequencies.items() if item not in (7, 8)}
    for item, weight in weights.items():
        share = weight / sum(weights.values())
        # Five standard deviations; the seed fixes the draws.
        assert Counter(drawn)[item] / len(drawn) == pytest.approx(share, abs=5 * (share / len(drawn)) ** 0.5)


def test_the_only_remaining_item_is_drawn_even_if_unlikely() -> None:
    items = torch.arange(1000)
    frequencies = torch.ones(1000)
    frequencies[5] = 1e-12
    seen = [item for item in range(1000) if item != 5]
    sampler = NegativeSampler("item", 3, items=items, frequencies=frequencies, power=1, exclude=["seen"])
    batch: Batch = {"item": torch.tensor([1, 2]), "seen": RaggedTensor.from_lists([seen, []], dtype=torch.int64)}
    drawn = dense(sampler(batch))
    assert drawn[0].tolist() == [5, 5, 5]
    assert 2 not in drawn[1]


def test_counts_per_row_and_several_positives_per_row() -> None:
    items = torch.arange(50)
    batch: Batch = {
        "item": RaggedTensor.from_lists([[1, 2], [], [3]]),
        "count": torch.tensor([2, 5, 0]),
    }
    by_row = ragged(NegativeSampler("item", "count", items=items)(batch))
    assert by_row.lengths().tolist() == [4, 0, 0]
    assert not {1, 2} & set(by_row.to_lists()[0])
    assert ragged(NegativeSampler("item", 3, items=items)(batch)).lengths().tolist() == [6, 0, 3]
    single: Batch = {"item": torch.tensor([1, 2, 3]), "count": torch.tensor([2, 0, 1])}
    assert ragged(NegativeSampler("item", "count", items=items)(single)).lengths().tolist() == [2, 0, 1]


def test_draws_depend_on_seed_epoch_and_batch() -> None:
    batch: Batch = {"item": torch.tensor([1, 2, 3])}

    def drawn(seed: int = 0, epoch: int = 0, batch: Batch = batch) -> list[int]:
        sampler = NegativeSampler("item", 20, items=torch.arange(1000), seed=seed)
        sampler.set_epoch(epoch)
        return dense(sampler(batch)).view(-1).tolist()

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(epoch=1), drawn(batch={"item": torch.tensor([1, 2, 4])})]
    assert len({tuple(each) for each in [drawn(), *others]}) == 4


@FORKED
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_follow_the_epoch(tmp_path: Path, context: str) -> None:
    pq.write_table(pa.table({"item": range(100)}), tmp_path / "a.parquet")
    sampler = copy.deepcopy(NegativeSampler("item", 5, items=torch.arange(1000)))
    other = copy.deepcopy(sampler)
    data = ColumnDataset(tmp_path, ["item"], 50, transforms=sampler)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=context)
    drawn = {}
    for epoch in (0, 3, 1, 3):
        sampler.set_epoch(epoch)
        other.set_epoch(7)
        drawn[epoch] = [dense(batch).tolist() for batch in loader]
        assert drawn[epoch] == [dense(batch).tolist() for batch in data]
    assert drawn[0] != drawn[3] != drawn[1] != drawn[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_reader_threads_draw_the_same_items(tmp_path: Path, threads: int) -> None:
    pq.write_table(pa.table({"item": range(100)}), tmp_path / "a.parquet")
    sampler = NegativeSampler("item", 4, items=torch.arange(100), seed=3)
    later = [dense(sampler(batch)) for batch in ColumnDataset(tmp_path, ["item"], 7, shuffle=True)]
    data = ColumnDataset(
        tmp_path, ["item"], 7, shuffle=True, transforms=sampler, read=ReadOptions(num_threads=threads, prefetch=5)
    )
    got = [dense(batch) for batch in data]
    assert len(got) == len(later)
    assert all(torch.equal(one, other) for one, other in zip(got, later, strict=True))


def test_rows_without_candidates_are_rejected() -> None:
    batch: Batch = {"item": torch.tensor([1, 1])}
    with pytest.raises(ValueError, match="all 1 candidates for 'negatives' are excluded in row 0 of the batch"):
        NegativeSampler("item", 1)(batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed and power must not be negative"),
        ({"count": 2.5}, TypeError, r"count must be an integer or the name of a column, got 2\.5"),
        ({"count": True}, TypeError, "count must be an integer or the name of a column, got True"),
        ({"power": float("nan")}, ValueError, "power must be finite, got 0 and nan"),
        ({"power": float("inf")}, ValueError, "power must be finite, got 0 and inf"),
        (
            {"items": torch.arange(3), "frequencies": torch.tensor([1e308, 1, 1], dtype=torch.float64), "power": 2},
            ValueError,
            r"frequencies from 1 to 1e\+308 to the power of 2 exceed the range of float64.*use a smaller power",
        ),
        (
            {"items": torch.arange(2), "frequencies": torch.tensor([1e-200, 1], dtype=torch.float64), "power": 2},
            ValueError,
            "some items would never be drawn",
        ),
        (
            # Each is finite, but their sum is not.
            {"items": torch.arange(2), "frequencies": torch.tensor([1e308, 1e308], dtype=torch.float64), "power": 1},
            ValueError,
            "exceed the range of float64",
        ),
        ({"exclude": "seen"}, TypeError, r"exclude must be a sequence of columns, got a str; write \['seen'\]"),
        ({"items": torch.tensor([1, 1])}, ValueError, "must be unique and at least one, got 2 with 1 distinct"),
        ({"items": torch.tensor([1.5])}, TypeError, r"items must be int64 \[C\]"),
        ({"frequencies": torch.tensor([1])}, ValueError, "but items is None; pass items"),
        ({"items": torch.tensor([1, 2]), "frequencies": torch.tensor([1])}, ValueError, r"got \[1\] for 2 items"),
        ({"items": torch.tensor([1]), "frequencies": torch.tensor([0])}, ValueError, "must be positive; omit"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NegativeSampler("item", **({"count": 1} | options))


def test_too_large_frequencies_in_the_batch_are_rejected() -> None:
    batch: Batch = {"item": torch.tensor([1] * 40 + [2])}
    with pytest.raises(ValueError, match="frequencies from 1 to 40 to the power of 500 exceed"):
        NegativeSampler("item", 1, power=500)(batch)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": torch.tensor([1])}, ValueError, "no column 'item', only x"),
        ({"item": torch.tensor([1.0])}, TypeError, "column 'item' must be int64"),
        ({"item": RaggedTensor.from_lists([[[1]]])}, TypeError, "with one level"),
        ({"item": torch.tensor([1]), "n": torch.tensor([-1])}, ValueError, "'n' has the negative count -1"),
        ({"item": torch.tensor([1])}, TypeError, r"column 'n' must be counts, integers \[B\], got None"),
    ],
)
def test_columns_of_wrong_types_are_rejected(batch: Batch, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NegativeSampler("item", "n", items=torch.arange(9))(batch)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        NegativeSampler("item", 1).set_epoch(-1)
