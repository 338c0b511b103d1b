"""Frequent ids and counts of lookups."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid.embedding.table import tracking
from recis_hybrid.embedding.table.lookup import FeatureIds, Request
from recis_hybrid.embedding.table.tracking import LookupTracker, SpaceSaving
from tests.support import emulated
from tests.support.devices import EDGE_IDS, no_synchronization, on_accelerators, on_devices

COUNTERS = 8


def request(*features: tuple[int, list[int]], device: str = "cpu") -> Request:
    """Return a request of (member table, ids) by feature."""
    if device == "emulated":
        emulated.load()
    return Request.of(
        [FeatureIds(torch.tensor(ids, dtype=torch.int64, device=device), len(ids), member) for member, ids in features]
    )


def small(monkeypatch: pytest.MonkeyPatch, members: int, device: str = "cpu") -> SpaceSaving:
    """Return a sketch whose map is merged often."""
    if device == "emulated":
        emulated.load()
    monkeypatch.setattr(tracking, "_LEAST_SLOTS", 16)
    return SpaceSaving(members, COUNTERS, torch.device(device))


def check(sketch: SpaceSaving, exact: list[Counter[int]]) -> None:
    """Check all guarantees of the counters against exact counts."""
    for member, hot in enumerate(sketch.top(COUNTERS)):
        counts = exact[member]
        bound = counts.total() / COUNTERS
        assert len(hot) == min(COUNTERS, len(counts))
        assert len({each.id for each in hot}) == len(hot)
        assert [each.frequency for each in hot] == sorted((each.frequency for each in hot), reverse=True)
        for each in hot:
            assert each.frequency - each.error <= counts[each.id] <= each.frequency
            assert each.error <= bound
        listed = {each.id for each in hot}
        assert {one for one, count in counts.items() if count > bound} <= listed
        if hot:
            assert all(count <= hot[-1].frequency for one, count in counts.items() if one not in listed)


@on_devices
def test_counts_are_exact_while_every_id_has_a_counter(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    sketch = small(monkeypatch, 2, device)
    for _ in range(20):  # each merges the map
        sketch.add(request((0, EDGE_IDS), (1, EDGE_IDS[:3]), (0, EDGE_IDS[:2]), device=device))
    first, second = sketch.top(COUNTERS)
    assert [(each.frequency, each.error) for each in first] == [(40, 0)] * 2 + [(20, 0)] * 6
    assert {each.id for each in first[:2]} == set(EDGE_IDS[:2])
    assert {each.id for each in first} == set(EDGE_IDS)
    assert sorted(second) == sorted((one, 20, 0) for one in EDGE_IDS[:3])
    assert [len(hot) for hot in sketch.top(1)] == [1, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([*range(30), *EDGE_IDS]), max_size=60),
            st.lists(st.integers(0, 3), max_size=20),
        ),
        max_size=12,
    )
)
def test_guarantees_hold_for_any_stream(batches: list[tuple[list[int], list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sketch = small(patch, 3)
        exact: list[Counter[int]] = [Counter(), Counter(), Counter()]
        for first, second in batches:
            sketch.add(request((0, first), (2, second)))
            exact[0].update(first)
            exact[2].update(second)
        check(sketch, exact)


@on_devices
def test_guarantees_hold_for_skewed_ids(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    sketch, exact = small(monkeypatch, 1, device), Counter[int]()
    draw = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, 501).double()
    for _ in range(40):
        ids = torch.multinomial(weights, 100, replacement=True, generator=draw).tolist()
        sketch.add(request((0, ids), device=device))
        exact.update(ids)
    check(sketch, [exact])
    assert sketch.top(1)[0][0].id == 0


@on_accelerators
def test_lookups_are_counted_without_waiting(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    sketch = small(monkeypatch, 1, device)
    ids = request((0, list(range(20))), device=device)
    sketch.add(ids)
    with no_synchronization(device):
        for _ in range(20):
            sketch.add(ids)
    assert min(each.frequency for each in sketch.top(COUNTERS)[0]) >= 21


@on_devices
def test_only_ids_in_use_count_with_their_occurrences(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(tracking, "_LEAST_SLOTS", 16)
    made = request((0, [5, 6, 7]), (1, [5, 8]), device=device)
    used = [torch.tensor([0, 2], device=device), torch.empty(0, dtype=torch.int64, device=device)]
    counts = torch.tensor([3, 1, 9, 2, 4], device=device)
    rows = torch.tensor([0, -1, -1, 1, -1], device=device)
    tracker = LookupTracker([4, 0], 2, torch.device(device))
    tracker.add(made._replace(used=used, counts=counts), rows, complete=False)
    tracker.add_loaded(0, 3)
    tracker.add_erased(1, 2)
    assert tracker.figures([9, 1]) == [
        {"ids": 4, "new_rows": 9 - 4 - 3, "rejected_ids": 1, "evicted_rows": 0},
        {"ids": 6, "new_rows": 1 - 0 + 2, "rejected_ids": 4, "evicted_rows": 2},
    ]
    assert tracker.top() == [[(5, 3, 0), (6, 1, 0)], [(8, 4, 0), (5, 2, 0)]]
