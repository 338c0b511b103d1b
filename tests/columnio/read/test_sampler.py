from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, strategies as st

from recis_hybrid.columnio.read.sampler import Batches, permutation

counts = st.integers(0, 60)
sizes = st.integers(1, 9)
# permutation(8, 0, 0, 0), pinned.
PINNED = [7, 2, 0, 4, 3, 5, 6, 1]


@given(counts, st.integers(0, 2**70), st.lists(st.integers(0, 9), max_size=3))
def test_a_permutation_contains_each_number_once(count: int, seed: int, path: list[int]) -> None:
    assert sorted(permutation(count, seed, *path).tolist()) == list(range(count))


def test_a_permutation_depends_on_all_arguments() -> None:
    first = permutation(100, 1, 2, 3)
    assert np.array_equal(first, permutation(100, 1, 2, 3))
    for other in (permutation(100, 2, 2, 3), permutation(100, 1, 3, 3), permutation(100, 1, 2, 4)):
        assert not np.array_equal(first, other)


def test_a_permutation_stays_the_same_in_all_versions() -> None:
    # Derived from the published PCG64 of numpy; a resumed job depends on it.
    words = np.random.PCG64(np.random.SeedSequence(7, spawn_key=(1,))).random_raw(6).tolist()
    assert permutation(6, 7, 1).tolist() == sorted(range(6), key=words.__getitem__)
    assert permutation(8, 0, 0, 0).tolist() == PINNED


def test_a_permutation_is_near_uniform() -> None:
    # 6 orders of 3 elements in 6,000 draws: 1,000 each, with a standard deviation of 29.
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(permutation(3, seed).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert all(abs(times - 1000) < 150 for times in seen.values())


@given(counts, sizes, st.integers(1, 5), st.data())
def test_ranks_together_take_each_row_once_in_order(
    rows: int, batch_size: int, world_size: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows))
    ranks = [Batches(rows, batch_size, start, rank, world_size) for rank in range(world_size)]
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
    alone = list(Batches(rows, batch_size, start))
    assert list(chain.from_iterable(range(*each) for each in alone)) == list(range(start, rows))
    assert len({len(rank) for rank in ranks}) == 1
    turns = list(zip(*ranks, strict=True))
    assert list(chain.from_iterable(range(*each) for turn in turns for each in turn)) == list(range(start, rows))
    for turn in turns:
        sizes_of_turn = [high - low for low, high in turn]
        assert max(sizes_of_turn) <= batch_size
        assert max(sizes_of_turn) - min(sizes_of_turn) <= 1
        assert sizes_of_turn == sorted(sizes_of_turn, reverse=True)
        # A rank gets no row only if there are fewer rows than ranks, or a batch is one row.
        assert min(sizes_of_turn) > 0 or rows - start < world_size or batch_size == 1


@given(counts, sizes, st.integers(1, 5))
def test_with_drop_remainder_ranks_get_the_same_number_of_full_batches(
    rows: int, batch_size: int, world_size: int
) -> None:
    ranks = [list(Batches(rows, batch_size, 0, rank, world_size, True)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {rows // (batch_size * world_size)}
    assert all(stop - first == batch_size for rank in ranks for first, stop in rank)


@given(counts, sizes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 8))
def test_any_number_of_ranks_continues_after_some_turns(
    rows: int, batch_size: int, before: int, now: int, turns: int
) -> None:
    consumed = [list(Batches(rows, batch_size, 0, rank, before))[:turns] for rank in range(before)]
    row = Batches(rows, batch_size, 0, 0, before).after(turns)
    remaining = [list(Batches(rows, batch_size, row, rank, now)) for rank in range(now)]
    ranges = sorted(chain.from_iterable(consumed + remaining))
    assert list(chain.from_iterable(range(*each) for each in ranges)) == list(range(rows))


@given(st.integers(1, 60), sizes, st.integers(1, 5), st.booleans(), st.data())
def test_wants_rows_that_overlap_a_batch(
    rows: int, batch_size: int, world_size: int, drop: bool, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows))
    rank = data.draw(st.integers(0, world_size - 1))
    first = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(first + 1, rows))
    batches = Batches(rows, batch_size, start, rank, world_size, drop)
    assert batches.wants(first, stop) == any(low < high and low < stop and first < high for low, high in batches)


@pytest.mark.parametrize("turns", [0, 1, 2, 100])
def test_after_is_never_past_the_end(turns: int) -> None:
    assert Batches(10, 4).after(turns) == min(4 * turns, 10)
