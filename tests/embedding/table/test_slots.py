"""Slots that grow in place: every id is found at any time, in bounded steps and without a second map."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid import ops
from recis_hybrid.embedding import IdMap
from recis_hybrid.embedding.table.id_map import GROW_LOAD, GROWTH
from recis_hybrid.ops.id_map import LINE_SLOTS
from tests.support.chunks import hash_of, id_with_hash, tiny_chunks
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.schedules import Schedule, on_schedules


class Model:
    """A dict beside an IDMap."""

    def __init__(self, device: str) -> None:
        self.map = IdMap(torch.device(device), capacity=16)
        self.rows: dict[int, int] = {}

    def insert(self, ids: Sequence[int]) -> None:
        tensor = torch.tensor(ids, dtype=torch.int64, device=self.map.device)
        self.map.reserve(len(ids))
        rows, _ = self.map.find_or_insert([tensor], [0])
        self.map.commit()
        for i, row in zip(ids, rows.tolist(), strict=True):
            assert self.rows.setdefault(i, row) == row

    def erase(self, ids: Sequence[int]) -> None:
        tensor = torch.tensor(ids, dtype=torch.int64, device=self.map.device)
        self.map.erase_slots(self.map.slots_of([tensor], [0]))
        for i in ids:
            self.rows.pop(i, None)

    def check(self) -> None:
        known = [*self.rows, *(i for i in (12345, *EDGE_IDS) if i not in self.rows)]
        found = self.map.find([torch.tensor(known, dtype=torch.int64, device=self.map.device)], [0])
        assert found.tolist() == [self.rows.get(i, -1) for i in known]
        entries = self.map.entries()
        assert dict(zip(entries.ids.tolist(), entries.rows.tolist(), strict=True)) == self.rows
        assert len(set(self.rows.values())) == len(self.rows) == len(self.map)
        self.check_shares(1 + len(self.rows) % 5)

    def check_shares(self, count: int) -> None:
        for number in range(count):
            found = self.map.share(number, count)
            ids = {i for i in self.rows if (hash_of(i) >> 32) * count >> 32 == number}
            assert dict(zip(found.ids.tolist(), found.rows.tolist(), strict=True)) == {i: self.rows[i] for i in ids}
            slots = self.map.slots_of([found.ids], [0])
            assert torch.equal(found.slots, slots)


TOP = 2**64 - 1
# Hashes at the ends and near each other, so that probes run over many lines and wrap around.
some_hash = st.one_of(
    st.integers(0, TOP), st.integers(0, 200), st.integers(TOP - 200, TOP), st.integers(2**63 - 50, 2**63 + 50)
)
batch = st.lists(some_hash.map(id_with_hash), max_size=40, unique=True)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(batch, st.integers(0, 3)), max_size=12),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 9),
    st.sampled_from([3, 4096]),
)
def test_a_growing_map_behaves_like_a_dict(
    batches: list[tuple[list[int], int]], chunk: int, piece: int, slack: int
) -> None:
    with tiny_chunks(chunk, piece, slack):
        model = Model("cpu")
        for ids, erased in batches:
            model.insert(ids)
            model.check()
            if erased:
                model.erase(list(model.rows)[::erased])
                model.check()


@on_schedules(10)
def test_lines_move_under_any_schedule(schedule: Schedule) -> None:
    with schedule.running() as generator, tiny_chunks(2, 5):
        model = Model("emulated")
        for number in range(8):
            low, high = [(-(2**63), 2**63 - 1), (0, 200)][number % 2]
            hashes = torch.randint(low, high, (40,), generator=generator).unique()
            model.insert([id_with_hash(value & TOP) for value in hashes.tolist()])
            model.check()
            if number % 3 == 2:
                model.erase(list(model.rows)[::2])
                model.check()


@on_devices
def test_each_reservation_moves_few_lines(device: str) -> None:
    step, moved, most = 50, [0], 0
    move = ops.id_map.move_lines

    def counted(*args: object) -> None:
        first, end = args[3:5]
        assert isinstance(first, int)
        assert isinstance(end, int)
        moved[0] += end - first
        move(*args)  # type: ignore[arg-type]

    with tiny_chunks(16, 8), mock.patch.object(ops.id_map, "move_lines", counted):
        model = Model(device)
        model.map.rehash(1000)
        with mock.patch.object(ops.id_map, "rehash", side_effect=AssertionError("copied all slots")):
            for first in range(0, 4000, step):
                moved[0] = 0
                model.insert(range(first, first + step))
                most = max(most, moved[0])
                slots, ids = len(model.map.slots), first + step
                if ids > 1000:
                    assert ids / slots <= GROW_LOAD
                    assert slots <= (ids + step) * GROWTH / GROW_LOAD + 16 * LINE_SLOTS
    model.check()
    # The lines of `step` / (GROWTH - 1) ids at the lowest load; lines move up to 4/3 as fast where memory is in use.
    assert 0 < most <= 1.6 * step / (GROWTH - 1) / (GROW_LOAD / GROWTH * LINE_SLOTS)


@on_devices
def test_erased_slots_are_dropped_in_place(device: str) -> None:
    with tiny_chunks(16, 8):
        model = Model(device)
        model.map.rehash(200)
        capacity = model.map.capacity
        for number in range(60):
            ids = range(40 * number, 40 * (number + 1))
            model.insert(ids)
            model.erase(ids)
        model.check()
        assert model.map.capacity == capacity
        assert int(model.map.counters[ops.id_map.USED_SLOTS]) <= 0.75 * capacity


@on_devices
@pytest.mark.parametrize("hashes", [range(300), range(TOP - 299, TOP + 1), range(2**63 - 150, 2**63 + 150)])
def test_ids_crafted_to_collide_are_kept(device: str, hashes: range) -> None:
    """They fill more lines in a row than can be moved, so the map is copied instead."""
    with tiny_chunks(4, 4, slack=8):
        model = Model(device)
        others = [id_with_hash(number << 55) for number in range(1, 400)]
        ids = [id_with_hash(value) for value in hashes]
        for at in range(0, 300, 100):
            model.insert(ids[at : at + 100])
            model.insert(others[at : at + 100])
            model.check()


@on_devices
def test_running_out_of_memory_changes_nothing(device: str) -> None:
    with tiny_chunks(16, 8):
        model = Model(device)
        model.map.rehash(200)
        model.insert(range(150))
        before = model.map.nbytes
        with (
            mock.patch.object(ops.memory, "zero_bytes", side_effect=RuntimeError("out of memory")),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            model.insert(range(150, 400))
        assert model.map.nbytes == before
        model.check()
        model.insert(range(150, 400))
        model.check()


def test_growth_by_bulk_moves_all_lines_at_once() -> None:
    with tiny_chunks(16, 8):
        model = Model("cpu")
        model.map.rehash(100)
        model.insert(range(100))
        model.map.reserve(10_000)
        assert model.map.slots.work_to_do == 0
        assert model.map.capacity * GROW_LOAD >= 10_100
        model.check()
