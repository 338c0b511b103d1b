from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from hypothesis import given, strategies as st

from recis_hybrid.columnio.reader import cut


def empty() -> Any:
    return pa.record_batch({"row": pa.array([], pa.int64())})


def chunks(sizes: list[int]) -> Iterator[tuple[int, Any]]:
    first = 0
    for size in sizes:
        yield first, pa.record_batch({"row": pa.array(range(first, first + size), pa.int64())})
        first += size


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.lists(st.integers(0, 50), max_size=12, unique=True))
def test_any_ranges_of_any_chunks(sizes: list[int], ends: list[int]) -> None:
    ends = sorted(end for end in ends if end <= sum(sizes))
    ranges = list(zip(ends[::2], ends[1::2], strict=False))
    got = [(first, rows.column("row").to_pylist()) for first, rows in cut(chunks(sizes), ranges, empty)]
    assert got == [(low, list(range(low, high))) for low, high in ranges]


def test_a_range_inside_a_chunk_is_a_slice_of_it() -> None:
    whole = list(chunks([10]))
    address = whole[0][1].column("row").buffers()[1].address
    ((_, rows),) = cut(iter(whole), [(3, 7)], empty)
    assert rows.column("row").buffers()[1].address == address
    assert rows.column("row").offset == 3


def test_chunks_after_the_last_range_are_not_asked_for() -> None:
    source = chunks([4, 4, 4])
    assert [first for first, _ in cut(source, [(1, 3), (5, 8)], empty)] == [1, 5]
    assert next(source)[0] == 8


def test_rows_that_a_stream_leaves_out_are_missing() -> None:
    source = ((first, rows) for first, rows in chunks([4, 4, 4]) if first != 4)
    got = [
        rows.column("row").to_pylist() for _, rows in cut(source, [(0, 3), (3, 6), (6, 7), (7, 10), (10, 14)], empty)
    ]
    assert got == [[0, 1, 2], [3], [], [8, 9], [10, 11]]
