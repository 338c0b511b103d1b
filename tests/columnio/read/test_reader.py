from __future__ import annotations

from collections.abc import Generator

import pyarrow as pa
import torch
from hypothesis import given, strategies as st

from recis_hybrid.columnio import Dense
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.columnio.convert.row_slice import Rows, concat_rows
from recis_hybrid.columnio.read.reader import cut

CONVERTERS = {"row": converter(Dense(), pa.int64(), Place("row", "x.parquet"))}


def rows(first: int, stop: int) -> Rows:
    return Rows.of(pa.record_batch({"row": pa.array(range(first, stop), pa.int64())}), CONVERTERS)


def join(parts: list[Rows]) -> Rows:
    return concat_rows(parts or [rows(0, 0)], CONVERTERS)


def numbers(part: Rows) -> list[int]:
    """Return the row numbers, on which tensor and array must agree."""
    column = part.tensors(CONVERTERS)["row"]
    assert isinstance(column, torch.Tensor)
    assert column.tolist() == part.arrow().column("row").to_pylist()
    return column.tolist()


def chunks(sizes: list[int], *missing: int) -> Generator[tuple[int, Rows], None, None]:
    first = 0
    for size in sizes:
        if first not in missing:
            yield first, rows(first, first + size)
        first += size


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.lists(st.integers(0, 50), max_size=12, unique=True))
def test_any_ranges_of_any_chunks(sizes: list[int], ends: list[int]) -> None:
    ends = sorted(end for end in ends if end <= sum(sizes))
    ranges = list(zip(ends[::2], ends[1::2], strict=False))
    got = [(first, numbers(part)) for first, part in cut(chunks(sizes), ranges, join)]
    assert got == [(low, list(range(low, high))) for low, high in ranges]


def test_a_range_inside_a_chunk_is_a_slice_of_it() -> None:
    ((_, whole),) = chunks([10])
    address = whole.batch.column("row").buffers()[1].address
    ((_, part),) = cut((each for each in [(0, whole)]), [(3, 7)], join)
    column = part.tensors(CONVERTERS)["row"]
    assert isinstance(column, torch.Tensor)
    assert column.data_ptr() == address + 3 * 8
    assert numbers(part) == [3, 4, 5, 6]


def test_chunks_after_the_last_range_are_not_requested() -> None:
    source = chunks([4, 4, 4])
    assert [first for first, _ in cut(source, [(1, 3), (5, 8)], join)] == [1, 5]
    assert next(source)[0] == 8


def test_rows_missing_from_the_stream_are_missing_from_ranges() -> None:
    ranges = [(0, 3), (3, 6), (6, 7), (7, 10), (10, 14)]
    got = [numbers(part) for _, part in cut(chunks([4, 4, 4], 4), ranges, join)]
    assert got == [[0, 1, 2], [3], [], [8, 9], [10, 11]]
