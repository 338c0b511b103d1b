"""Indexing and concatenation of RaggedTensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from recis_hybrid.accelerator import copied, is_accelerator
from recis_hybrid.ragged.checks import Parts
from recis_hybrid.ragged.dense import positions


def rows(parts: Parts, which: Any) -> Parts | torch.Tensor:
    """Return the parts, or the tensor, of ``RaggedTensor.__getitem__``."""
    if not isinstance(which, tuple):
        return _rows(parts, slice(None) if which is Ellipsis else which)
    values, _, _, outer = parts
    dims = 1 + len(outer) + values.dim()
    which = _without_ellipsis(which, dims)
    if len(which) > dims:
        raise IndexError(f"RaggedTensor: indices must be at most {dims}, for rows, lists and values, got {len(which)}")
    result = _rows(parts, which[0] if which else slice(None))
    inner = which[1:]
    if not inner:
        return result
    if isinstance(result, torch.Tensor):
        return _of_tensor(result, inner, 0)
    if _number(which[0]) is not None:
        return rows(result, inner)
    return _within(result, inner, 0)


def _without_ellipsis(which: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    places = [place for place, one in enumerate(which) if one is Ellipsis]
    if not places:
        return which
    if len(places) > 1:
        raise IndexError("RaggedTensor: there can be only one ... among the indices")
    full = (slice(None),) * max(dims - len(which) + 1, 0)
    return (*which[: places[0]], *full, *which[places[0] + 1 :])


def _number(which: Any) -> int | None:
    """Return an integer (of Python or numpy, or a tensor without dimensions) as an int; None for another index."""
    if isinstance(which, bool | np.bool_) or isinstance(which, slice | str | bytes):
        return None
    if isinstance(which, torch.Tensor | np.ndarray) and (which.ndim or not _whole(which)):
        return None
    return operator.index(which) if hasattr(which, "__index__") else None


def _whole(which: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(which, torch.Tensor):
        return not (which.is_floating_point() or which.is_complex() or which.dtype == torch.bool)
    return which.dtype.kind in "iu"


def _wrong_index(which: Any) -> TypeError:
    return TypeError(
        f"RaggedTensor: an index must be an integer, a slice, a bool mask or a list of integers, got {which!r}"
    )


def _of_tensor(tensor: torch.Tensor, which: Sequence[Any], dim: int) -> torch.Tensor:
    """Index a tensor from dimension ``dim`` on; slices may have negative steps."""
    for index in which:
        size = tensor.shape[dim]
        number = _number(index)
        if number is not None:
            if not -size <= number < size:
                raise IndexError(f"RaggedTensor: item {number} is out of range for {size} items")
            tensor = tensor.select(dim, number)
        elif isinstance(index, slice):
            start, stop, step = index.indices(size)
            if step == 1:
                tensor = tensor.narrow(dim, start, max(stop - start, 0))
            else:
                chosen = torch.tensor(range(start, stop, step), dtype=torch.int64, device=tensor.device)
                tensor = tensor.index_select(dim, chosen)
            dim += 1
        else:
            raise _wrong_inner_index(index)
    return tensor


def _wrong_inner_index(which: Any) -> Exception:
    if isinstance(which, torch.Tensor | np.ndarray | list | tuple):
        return IndexError("RaggedTensor: a list or a mask can only select rows; within rows use an integer or a slice")
    return _wrong_index(which)


def _rows(parts: Parts, which: Any) -> Parts | torch.Tensor:
    values, offsets, weights, outer = parts
    count = (outer[0] if outer else offsets).shape[0] - 1
    row = _number(which)
    if row is not None:
        if not -count <= row < count:
            raise IndexError(f"RaggedTensor: row {row} is out of range for {count} rows")
        row %= count
        first = _between(parts, row, row + 1)
        if not outer:
            return first[0]
        # Strings that are rows themselves would need a weight for each byte.
        weights = None if len(outer) == 1 and values.dtype == torch.uint8 else first[2]
        return first[0], first[1], weights, first[3][1:]
    if isinstance(which, slice):
        start, stop, step = which.indices(count)
        if step == 1:
            return _between(parts, start, max(start, stop))
        which = list(range(start, stop, step))
    numbers = _numbers(which, count)
    if is_accelerator(numbers):
        return _taken_on_device(parts, numbers, count, which)
    if numbers.dtype == torch.bool:
        numbers = numbers.nonzero().view(-1)
    if numbers.numel() and not (-count <= int(numbers.min()) and int(numbers.max()) < count):
        raise _no_such_rows(which, count)
    return _taken(parts, copied(numbers % max(count, 1), values.device))


def _numbers(which: Any, count: int) -> torch.Tensor:
    """Return a mask, bool ``[B]``, or row numbers, int64 ``[n]``, on their own device."""
    if which is None or isinstance(which, str | bytes | bool | np.bool_ | float | Mapping | Set):
        raise _wrong_index(which)
    try:
        numbers = torch.as_tensor(which)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong_index(which) from error
    if numbers.dtype == torch.bool:
        if numbers.shape != (count,):
            raise IndexError(f"RaggedTensor: a mask of rows must be [{count}], got {list(numbers.shape)}")
        return numbers
    if (numbers.is_floating_point() or numbers.is_complex()) and numbers.numel():
        raise TypeError(f"RaggedTensor: row numbers must be integers, got {numbers.dtype}; convert them")
    if numbers.dim() != 1:
        raise _no_such_rows(which, count)
    return numbers.to(torch.int64)


def _no_such_rows(which: Any, count: int) -> IndexError:
    return IndexError(f"RaggedTensor: rows must be a list of numbers from {-count} to {count - 1}, got {which}")


def _taken_on_device(parts: Parts, which: torch.Tensor, count: int, given: Any) -> Parts:
    """Take rows by a mask or numbers on a GPU. The host waits once: for the sizes, and to check the numbers."""
    values, offsets, _, outer = parts
    which = which.to(values.device)
    if which.dtype == torch.bool:
        # The rows of the mask come first.
        numbers, used = which.to(torch.uint8).argsort(descending=True, stable=True), which.sum()
        kept = torch.arange(len(numbers), device=which.device) < used
        bad = torch.zeros_like(used)
    else:
        bad = ((which < -count) | (which >= count)).sum()
        numbers = which.clamp(-count, max(count - 1, 0)) % max(count, 1)
        kept, used = torch.ones_like(numbers, dtype=torch.bool), torch.full_like(bad, len(numbers))
    if count == 0:
        numbers, kept = numbers[:0], kept[:0]
    *totals, taken, wrong = torch.stack([*_totals((*outer, offsets), numbers, kept), used, bad]).tolist()
    if wrong:
        raise _no_such_rows(given, count)
    return _taken(parts, numbers[:taken], totals)


def _totals(levels: Sequence[torch.Tensor], numbers: torch.Tensor, kept: torch.Tensor) -> list[torch.Tensor]:
    """Return for each level the number of items of the rows that are kept, int64 ``[]``."""
    totals, starts, stops = [], numbers, numbers + 1
    for level in levels:
        starts, stops = level[starts], level[stops]
        totals.append(torch.where(kept, stops - starts, 0).sum())
    return totals


def _within(parts: Parts, which: tuple[Any, ...], depth: int) -> Parts | torch.Tensor:
    """Index each list of a level, then the contents.

    Args:
        parts: The rows.
        which: An index for each level from ``depth`` on, then for the dimensions of the values.
        depth: Number of the level, 0 for rows.
    """
    values, offsets, weights, outer = parts
    levels = [*outer, offsets]
    index, rest = which[0], which[1:]
    if depth == len(levels):
        return _of_tensor(values, which, 1), offsets, weights, outer
    level = levels[depth]
    number = _number(index)
    if number is None and not isinstance(index, slice):
        if isinstance(index, torch.Tensor | np.ndarray | list | tuple):
            raise IndexError(
                "RaggedTensor: within rows, which differ in length, an index must be an integer or a slice, got a list"
            )
        raise _wrong_index(index)
    starts, lengths = level[:-1], level[1:] - level[:-1]
    if number is not None:
        short = lengths < (number + 1 if number >= 0 else -number)
        if bool(short.any()):
            row = int(short.nonzero()[0])
            raise IndexError(
                f"RaggedTensor: list {row} has {int(lengths[row])} items and no item {number}; use a slice"
            )
        taken = starts + (number if number >= 0 else lengths + number)
        new_offsets = torch.arange(len(taken) + 1, device=level.device)
    else:
        first, counts, step = _slices(index, lengths)
        new_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        list_of, place = positions(new_offsets, int(new_offsets[-1]))
        taken = (starts + first)[list_of] + place * step
    # The level holds values or the lists of the next level.
    of_strings = bool(outer) and values.dtype == torch.uint8
    if depth + 1 == len(levels):
        values = values[taken]
        if weights is not None and not of_strings:
            weights = weights[taken]
    else:
        by_string = weights is not None and of_strings and depth + 2 == len(levels)  # the lists are weighted strings
        below = tuple(levels[depth + 1 : -1])
        lists = values, levels[-1], None if by_string else weights, below
        values, inner, inner_weights, deeper = _taken(lists, taken)
        weights = weights[taken] if by_string and weights is not None else inner_weights
        levels = [*levels[:depth], new_offsets, *deeper, inner]
    levels[depth] = new_offsets
    if number is None:
        result: Parts = (values, levels[-1], weights, tuple(levels[:-1]))
        return _within(result, rest, depth + 1) if rest else result
    # A number replaces each list by one item, which removes the level.
    del levels[depth]
    if not levels:
        return _of_tensor(values, rest, 1)
    if len(levels) == 1 and values.dtype == torch.uint8:
        weights = None  # strings that are rows themselves have no weights
    result = (values, levels[-1], weights, tuple(levels[:-1]))
    return _within(result, rest, depth) if rest else result


def _slices(which: slice, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the start, number of items and step of a slice of each list of these lengths."""
    start, stop, step = (None if one is None else operator.index(one) for one in (which.start, which.stop, which.step))
    step = 1 if step is None else step
    if step == 0:
        raise ValueError("RaggedTensor: the step of a slice must not be 0")
    least = torch.zeros_like(lengths) if step > 0 else torch.full_like(lengths, -1)
    most = lengths if step > 0 else lengths - 1

    def bound(index: int | None, default: torch.Tensor) -> torch.Tensor:
        if index is None:
            return default
        # All numbers beyond the lengths are equivalent; clamp them so that sums do not overflow.
        index = max(min(index, 2**62), -(2**62))
        return (lengths + index if index < 0 else torch.full_like(lengths, index)).clamp(least, most)

    first = bound(start, least if step > 0 else most)
    last = bound(stop, most if step > 0 else least)
    step = max(min(step, 2**62), -(2**62))
    span = last - first if step > 0 else first - last
    return first, torch.div(span + abs(step) - 1, abs(step), rounding_mode="floor").clamp(min=0), step


def _between(parts: Parts, start: int, stop: int) -> Parts:
    """Return the rows from start to stop; they share the values."""
    if is_accelerator(parts[1]):
        return _cut(parts, start, stop, _bounds(parts, start, stop).tolist())
    bounds, first, last = [], start, stop
    for level in (*parts[3], parts[1]):
        first, last = int(level[first]), int(level[last])
        bounds.append((first, last))
    return _cut(parts, start, stop, bounds)


def _bounds(parts: Parts, start: int, stop: int) -> torch.Tensor:
    """Return for each level the first and the last offset of the rows from start to stop, int64 ``[levels, 2]``."""
    _, offsets, _, outer = parts
    first, *rest = (*outer, offsets)
    found = [torch.stack([first[start], first[stop]])]
    for level in rest:
        found.append(level[found[-1]])
    return torch.stack(found)


def _cut(parts: Parts, start: int, stop: int, bounds: Sequence[Sequence[int]]) -> Parts:
    values, offsets, weights, outer = parts
    levels = []
    for level, (first, last) in zip((*outer, offsets), bounds, strict=True):
        levels.append(level[start : stop + 1] - first)
        start, stop = first, last
        if len(levels) == len(outer):
            strings = start, stop
    if weights is not None:
        # A weight belongs to a value, or to a string if strings are in lists.
        weights = weights[slice(*strings)] if outer and values.dtype == torch.uint8 else weights[start:stop]
    return values[start:stop], levels[-1], weights, tuple(levels[:-1])


def _taken(parts: Parts, numbers: torch.Tensor, totals: Sequence[int] | None = None) -> Parts:
    """Return rows by their numbers; ``totals`` as from :func:`_totals`, None to compute them."""
    values, offsets, weights, outer = parts
    if totals is None and is_accelerator(numbers):
        kept = torch.ones_like(numbers, dtype=torch.bool)
        totals = torch.stack(_totals((*outer, offsets), numbers, kept)).tolist()
    of_strings = bool(outer) and values.dtype == torch.uint8
    levels = []
    for depth, level in enumerate((*outer, offsets)):
        lengths = (level[1:] - level[:-1])[numbers]
        new_offsets = torch.zeros(len(numbers) + 1, dtype=torch.int64, device=values.device)
        new_offsets[1:] = lengths.cumsum(0)
        levels.append(new_offsets)
        if of_strings and depth == len(outer) and weights is not None:
            weights = weights[numbers]
        which, places = positions(new_offsets, int(new_offsets[-1]) if totals is None else totals[depth])
        numbers = level[:-1][numbers][which] + places
    if weights is not None and not of_strings:
        weights = weights[numbers]
    return values[numbers], levels[-1], weights, tuple(levels[:-1])


def concat(parts: Sequence[Parts]) -> Parts:
    """Return the parts of :meth:`RaggedTensor.concat`."""
    if not parts:
        raise ValueError("RaggedTensor.concat: parts must contain at least one RaggedTensor, got none")
    kinds = {
        (values.dtype, values.shape[1:], values.device, weights is not None, len(outer))
        for values, _, weights, outer in parts
    }
    if len(kinds) > 1:
        raise ValueError(
            f"RaggedTensor.concat: parts must agree in dtype, shape of values, device and number of levels, and all "
            f"have weights or none, got {sorted(map(str, kinds))}"
        )
    # Operations on a GPU may leave unused values after the last offset; drop them. A trace has no offsets to read.
    if not torch.compiler.is_compiling():
        ends = [(*outer, offsets)[0].shape[0] - 1 for _, offsets, _, outer in parts]
        if is_accelerator(parts[0][1]):
            bounds = torch.stack([_bounds(one, 0, end) for one, end in zip(parts, ends, strict=True)]).tolist()
            parts = [_cut(one, 0, end, found) for one, end, found in zip(parts, ends, bounds, strict=True)]
        else:
            parts = [_between(one, 0, end) for one, end in zip(parts, ends, strict=True)]
    levels = [
        _concat_offsets([(*outer, offsets)[depth] for _, offsets, _, outer in parts])
        for depth in range(len(parts[0][3]) + 1)
    ]
    weighted = [weights for _, _, weights, _ in parts if weights is not None]
    weights = torch.cat(weighted) if weighted else None
    return torch.cat([one[0] for one in parts]), levels[-1], weights, tuple(levels[:-1])


def _concat_offsets(offsets: Sequence[torch.Tensor]) -> torch.Tensor:
    moved, before = [offsets[0][:1]], offsets[0].new_zeros(())
    for one in offsets:
        moved.append(one[1:] + before)
        before = before + one[-1]
    return torch.cat(moved)
