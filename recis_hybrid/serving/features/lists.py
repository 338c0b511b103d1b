"""Operators that change the number of values in rows, or join columns.

Letters: B rows, N values over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recis_hybrid.serving.columns import Array, Column, offsets_of
from recis_hybrid.serving.features.hashes import cross_ids
from recis_hybrid.serving.features.values import Kernel, ids_of, number


def _resized(
    offsets: Array, planes: Sequence[tuple[Array, Any]], least: int, most: int | None, drop_first: bool, pad_first: bool
) -> tuple[Array, list[Array]]:
    """Return the offsets and planes of rows of ``least`` to ``most`` values, cut and padded on one side."""
    lengths = np.diff(offsets)
    kept = lengths if most is None else np.minimum(lengths, most)
    new = np.maximum(kept, least)
    target = offsets_of(new)
    rows = np.repeat(np.arange(len(new)), new)
    place = np.arange(target[-1]) - target[rows]
    if pad_first:
        place -= (new - kept)[rows]
    real = (place >= 0) & (place < kept[rows])
    first = offsets[:-1] + (lengths - kept if drop_first else 0)
    source = (first[rows] + place)[real]
    results = []
    for plane, fill in planes:
        out = np.full((len(rows), *plane.shape[1:]), fill, plane.dtype)
        out[real] = plane[source]
        results.append(out)
    return target, results


def _resize(column: Column, level: int, least: int, most: int | None, side: str, value: Any, weight: float) -> Column:
    assert column.offsets is not None
    flags = {"drop_first": side == "left", "pad_first": side == "left"}
    if len(column.outer) == 1 and level == 1:
        return _resize_lists(column, least, most, flags, weight)
    planes = [(column.values, number(value))]
    # The weights of lists of strings belong to the strings, not to their bytes.
    weighted = column.weights is not None and not (column.strings and column.outer)
    if weighted:
        planes.append((column.weights, weight))  # type: ignore[arg-type]
    offsets, results = _resized(column.offsets, planes, least, most, **flags)
    return Column(results[0], offsets, results[1] if weighted else column.weights, column.outer)


def _resize_lists(column: Column, least: int, most: int | None, flags: dict[str, bool], weight: float) -> Column:
    """Resize rows of lists: the indices of lists as if they were values, then take the lists; -1 is an empty one."""
    assert column.offsets is not None
    planes: list[tuple[Array, Any]] = [(np.arange(len(column.offsets) - 1), -1)]
    of_lists = column.weights is not None and column.strings
    if of_lists:
        planes.append((column.weights, weight))  # type: ignore[arg-type]
    outer, results = _resized(column.outer[0], planes, least, most, **flags)
    chosen = results[0]
    taken = np.maximum(chosen, 0)
    lengths = np.append(np.diff(column.offsets), 0)[chosen]
    offsets = offsets_of(lengths)
    source = np.arange(offsets[-1]) + np.repeat(column.offsets[taken] - offsets[:-1], lengths)
    weights = column.weights
    if of_lists:
        weights = results[1]
    elif weights is not None:
        weights = weights[source]
    return Column(column.values[source], offsets, weights, (outer,))


def truncate(length: int, side: str, level: int) -> Kernel:
    """Rows → rows of at most ``length`` values."""
    return lambda column: _resize(column, level, 0, length, side, 0, 0.0)


def pad(length: int, value: Any, side: str, level: int) -> Kernel:
    """Rows → rows of at least ``length`` values."""
    return lambda column: _resize(column, level, length, None, side, value, 0.0)


def fill_empty(value: Any) -> Kernel:
    """Rows → rows of at least one value; dense columns are unchanged."""
    return lambda column: column if column.offsets is None else _resize(column, 1, 1, None, "right", value, 1.0)


def to_dense(length: int, value: Any, side: str) -> Kernel:
    """Rows → ``[B, length]``."""

    def kernel(column: Column) -> Column:
        assert column.offsets is not None
        lengths = np.diff(column.offsets)
        if len(lengths) and lengths.max() > length:
            row = int(np.argmax(lengths > length))
            raise ValueError(f"row {row} has {lengths[row]} values, more than {length}; send fewer")
        dense = _resize(column, 1, length, length, side, value, 0.0)
        return Column(dense.values.reshape(len(lengths), length, *column.values.shape[1:]))

    return kernel


def _rows_of(offsets: Array) -> Array:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def top_k(k: int) -> Kernel:
    """Rows of weighted values → those with the greatest weights, in descending order."""

    def kernel(column: Column) -> Column:
        assert column.offsets is not None
        assert column.weights is not None
        rows = _rows_of(column.offsets)
        if np.isnan(column.weights).any():
            raise ValueError(f"row {rows[np.argmax(np.isnan(column.weights))]} has a weight that is NaN; send a number")
        order = np.lexsort((-column.weights, rows))  # stable, so equal weights keep their order
        kept = order[np.arange(len(order)) - column.offsets[rows] < k]
        offsets = offsets_of(np.minimum(np.diff(column.offsets), k))
        return Column(column.values[kept], offsets, column.weights[kept])

    return kernel


def distinct() -> Kernel:
    """Rows of ids → the first occurrence of each id."""

    def kernel(column: Column) -> Column:
        if column.offsets is None:
            return column
        ids, rows = ids_of(column), _rows_of(column.offsets)
        order = np.lexsort((ids, rows))
        first = np.ones(len(ids), bool)
        first[1:] = (np.diff(rows[order]) != 0) | (ids[order][1:] != ids[order][:-1])
        kept = np.sort(order[first])
        offsets = np.searchsorted(kept, column.offsets).astype(np.int64)
        return Column(ids[kept], offsets, None if column.weights is None else column.weights[kept])

    return kernel


def list_lengths(level: int) -> Kernel:
    """List → its length."""

    def kernel(column: Column) -> Column:
        assert column.offsets is not None
        levels = (*column.outer, column.offsets)
        lengths = np.diff(levels[level - 1])
        return Column(lengths) if level == 1 else Column(lengths, levels[level - 2], None, levels[: level - 2])

    return kernel


def count_ones() -> Kernel:
    """Masks → the number of ones in each list."""

    def kernel(column: Column) -> Column:
        ones = column.values != 0
        if column.offsets is None:
            return Column(ones.sum(1))
        counts = np.diff(offsets_of(ones)[column.offsets])
        return Column(counts, column.outer[-1], None, column.outer[:-1]) if column.outer else Column(counts)

    return kernel


def multi_hot(classes: int) -> Kernel:
    """Rows of ids → float32 ``[B, classes]``."""

    def kernel(column: Column) -> Column:
        ids = ids_of(column)
        if column.offsets is None:
            rows, ids = np.repeat(np.arange(len(ids)), int(np.prod(ids.shape[1:]))), ids.reshape(-1)
        else:
            rows = _rows_of(column.offsets)
        bad = (ids < 0) | (ids >= classes)
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(f"row {rows[at]}: ids must be 0 to {classes - 1}, got {ids[at]}; send one of these")
        out = np.zeros((column.rows, classes), np.float32)
        np.add.at(out, (rows, ids), np.float32(1) if column.weights is None else column.weights)
        return Column(out)

    return kernel


def tile(times: int) -> Kernel:
    """Rows → every row repeated."""

    def kernel(column: Column) -> Column:
        if column.offsets is None:
            return Column(np.repeat(column.values, times, axis=0))
        begin, lengths = np.repeat(column.offsets[:-1], times), np.repeat(np.diff(column.offsets), times)
        offsets = offsets_of(lengths)
        source = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
        return Column(column.values[source], offsets, None if column.weights is None else column.weights[source])

    return kernel


def cross(limit: int | None) -> Kernel:
    """Ids of two columns → an id for each pair of a row."""

    def kernel(x: Column, y: Column) -> Column:
        if x.offsets is None and y.offsets is None:
            return Column(cross_ids(ids_of(x), ids_of(y)))
        (x_begin, x_lengths), (y_begin, y_lengths) = _spans(x), _spans(y)
        pairs = x_lengths * y_lengths
        if limit is not None and len(pairs) and pairs.max() > limit:
            row = int(np.argmax(pairs > limit))
            raise ValueError(f"row {row} has {pairs[row]} pairs, more than {limit}; send fewer values")
        offsets = offsets_of(pairs)
        rows = np.repeat(np.arange(len(pairs)), pairs)
        place = np.arange(offsets[-1]) - offsets[rows]
        width = y_lengths[rows]
        a, b = x_begin[rows] + place // width, y_begin[rows] + place % width
        weights = None
        if x.weights is not None or y.weights is not None:
            weights = np.ones(len(rows), np.float32)
            weights = weights if x.weights is None else x.weights[a]
            weights = weights if y.weights is None else weights * y.weights[b]
        return Column(cross_ids(ids_of(x)[a], ids_of(y)[b]), offsets, weights)

    return kernel


def _spans(column: Column) -> tuple[Array, Array]:
    """Return the first value of each row, and the number of its values."""
    if column.offsets is None:
        return np.arange(len(column.values)), np.ones(len(column.values), np.int64)
    return column.offsets[:-1], np.diff(column.offsets)


def concat() -> Kernel:
    """Columns → one, with the values of each column in turn in every row."""

    def kernel(*columns: Column) -> Column:
        dtype = columns[0].values.dtype
        dtype = np.dtype(np.int64) if dtype.kind == "i" else dtype
        if all(column.offsets is None for column in columns):
            parts = [column.values.reshape(column.rows, int(np.prod(column.values.shape[1:]))) for column in columns]
            return Column(np.concatenate([part.astype(dtype) for part in parts], axis=1))
        flat = [_as_rows(column) for column in columns]
        lengths = [np.diff(offsets) for _, offsets, _ in flat]
        target = offsets_of(np.sum(lengths, axis=0))
        values = np.empty(target[-1], dtype)
        weighted = any(column.weights is not None for column in columns)
        weights = np.ones(target[-1], np.float32) if weighted else None
        begin = target[:-1]
        for (own, offsets, own_weights), length in zip(flat, lengths, strict=True):
            to = np.arange(len(own)) + np.repeat(begin - offsets[:-1], length)
            values[to] = own
            if weights is not None and own_weights is not None:
                weights[to] = own_weights
            begin = begin + length
        return Column(values, target, weights)

    return kernel


def _as_rows(column: Column) -> tuple[Array, Array, Array | None]:
    if column.offsets is not None:
        return column.values, column.offsets, column.weights
    width = int(np.prod(column.values.shape[1:]))
    return column.values.reshape(-1), np.arange(len(column.values) + 1) * width, None
