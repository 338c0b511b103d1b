"""Inserts that end early, for lack of memory or of free slots, leave a correct table."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, IdMap, MinFrequency, Placement, StateField
from recis_hybrid.embedding.table.lookup import FeatureIds, Request
from recis_hybrid.ops.gather import MEAN, RowGroups
from tests.support import emulated
from tests.support.devices import on_devices
from tests.support.tables import feature, make_table

SUM = (StateField("sum", first_value=0.25),)
MANY = 70  # more features than fit into the arguments of any kernel


def request_of(features: int, first: int, device: str) -> list[FeatureIds]:
    """Return ``features`` features of 6 ids in 3 bags; 5 ids of each are new if ``first`` advances by 5."""
    offsets = [0, 2, 2, 6]
    return [
        feature([first + k, *range(first, first + 5)], offsets, combiner=MEAN, device=device) for k in range(features)
    ]


def entry_words(id_map: IdMap) -> Tensor:
    """Return the words that hold state and row of all slots, int64 ``[S]``."""
    return torch.cat([part.view(-1, 2)[:, 1] for part in id_map.slots.memory])


def assert_consistent(table: HashTable) -> None:
    """Check counters, the host's bounds, rows, and that every record has been given its first values."""
    id_map = table.store.id_map
    counters = id_map.counters.tolist()
    entries = id_map.entries()
    rows = entries.rows.tolist()
    assert counters[ops.id_map.FRESH] == counters[ops.id_map.OVERFLOW] == 0
    full = (entry_words(id_map) >> 62) & 3 == 2
    assert counters[ops.id_map.LIVE] == len(rows) == int(full.sum())
    assert len(set(rows)) == len(rows)
    assert all(row < counters[ops.id_map.ROWS] for row in rows)
    for counter in (ops.id_map.ROWS, ops.id_map.USED_SLOTS, ops.id_map.LIVE):
        assert id_map._bounds.bound(counter) >= counters[counter]
    assert id_map.row_bound <= table.store.blocks.capacity
    columns = table.export(0)
    fresh = make_table(dim=6, state=SUM)
    fresh.insert(0, columns["ids"].cpu())
    expected = fresh.export(0)
    for name in ("ids", "embedding", "sum"):
        assert torch.equal(columns[name].cpu(), expected[name]), name


def groups_of(groups: RowGroups, rows: Tensor) -> dict[int, tuple[list[int], list[float]]]:
    """Return sources and scales by the position where a row occurs first."""
    found, count = {}, int(groups.count)
    offsets, sources = groups.offsets.tolist(), groups.sources.tolist()
    scales = [1.0] * len(sources) if groups.scales is None else groups.scales.tolist()
    for row, start, end in zip(groups.unique[:count].tolist(), offsets, offsets[1 : count + 1], strict=False):
        found[rows.tolist().index(row)] = (sources[start:end], scales[start:end])
    return found


@pytest.mark.emulated
@pytest.mark.parametrize("features", [1, MANY])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"admission": MinFrequency(1)},
        {"placement": Placement(id_map="cpu", blocks="cuda")},
        {"placement": Placement(id_map="cuda", blocks="pinned", cache_bytes=1 << 14)},
    ],
)
def test_a_lookup_without_memory_changes_nothing_that_is_visible(features: int, more: dict[str, Any]) -> None:
    table = make_table(dim=6, state=SUM, device="emulated", **more)
    twin = make_table(dim=6, state=SUM)
    table.lookup(request_of(features, 0, "emulated"), train=True)
    failures = 0
    for number in itertools.count(1):
        emulated.clear_counts()
        batch = request_of(features, 5 * number, "emulated")
        with emulated.failing_allocation(number):
            with suppress(RuntimeError):
                table.lookup(batch, train=True)
        if not emulated.counts()["failed_allocations"]:
            break
        failures += 1
        assert_consistent(table)
        # The same ids again, with memory.
        lookup = table.lookup(batch, train=True)
        assert_consistent(table)
        expected = twin.lookup(request_of(features, 5 * number, "cpu"), train=True)
        assert lookup.grouped is not None
        assert expected.grouped is not None
        assert bool((lookup.rows >= 0).all())
        assert groups_of(lookup.grouped, lookup.rows) == groups_of(expected.grouped, expected.rows)
    assert failures >= 5
    assert set(twin.ids(0).tolist()) <= set(table.ids(0).tolist())


@on_devices
def test_a_full_map_ends_every_probe(device: str) -> None:
    """No slot is empty, so nothing but the round itself ends a probe."""
    table = make_table(dim=6, state=SUM, device=device)
    table.lookup([feature(range(1000), device=device)], train=True)
    id_map = table.store.id_map
    capacity = id_map.capacity
    table.store.blocks.reserve(2 * capacity)
    id_map.reserve = lambda more: None  # type: ignore[method-assign]
    ids = torch.arange(2 * capacity)
    request = Request.of([feature(ids, device=device)])
    if device == "cpu":
        with pytest.raises(RuntimeError, match="insert_grouped: the IDMap is full; its caller must reserve slots"):
            table.store.insert_grouped(request, None, [])
    else:
        rows, _, _ = table.store.insert_grouped(request, None, [])
        assert int((rows >= 0).sum()) == capacity
        with pytest.raises(RuntimeError, match="an insert found no free slot, and its ids have no row"):
            id_map.row_bound_after_inserts()
    assert int(id_map.counters[ops.id_map.OVERFLOW]) == 1
    assert int((entry_words(id_map) == 0).sum()) == 0
    # A probe for an absent id passes every slot, which takes the emulated device long.
    some = ids if device == "cpu" else ids[:: capacity // 32].to(device)
    found = id_map.find([some], [0])
    assert found[found >= 0].unique().numel() == (found >= 0).sum()
    assert device != "cpu" or int((found >= 0).sum()) == capacity
    assert bool((id_map.find([some + 2 * capacity], [0]) == -1).all())
    assert id_map.capacity == capacity


@pytest.mark.emulated
@pytest.mark.parametrize("seed", range(3))
def test_the_host_hears_of_a_full_map_without_waiting(seed: int) -> None:
    with emulated.schedule(seed=seed, late=1):
        table = make_table(dim=6, state=SUM, device="emulated")
        id_map = table.store.id_map
        id_map.reserve = lambda more: None  # type: ignore[method-assign]
        features = [[feature(range(n), device="emulated")] for n in (2 * id_map.capacity, 1)]
        table.lookup(features[0], train=True)
        torch.accelerator.synchronize()
        emulated.clear_counts()
        with pytest.raises(RuntimeError, match="an insert found no free slot"):
            table.lookup(features[1], train=True)
        assert emulated.counts()["synchronizations"] == 0


@on_devices
def test_an_insert_that_raises_is_counted(device: str) -> None:
    """The bound of rows holds even if a call inserts ids and then raises."""
    table = make_table(dim=6, state=SUM, device=device)
    id_map = table.store.id_map
    before = id_map.row_bound
    id_map.count_inserts(9)
    ids = [torch.arange(9, device=device)]
    rows, fresh = torch.empty(2, 9, dtype=torch.int64, device=device).unbind()
    ops.id_map.find_or_insert(id_map.slots.header, id_map.counters, id_map.free_rows, None, ids, [0], rows, fresh)
    id_map.commit()
    # It raises here: the counters are not copied.
    assert id_map.row_bound == before + 9
    assert int(id_map.counters[ops.id_map.ROWS]) == 9
