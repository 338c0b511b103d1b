"""Rows of RaggedTensors: slices, numbers, and one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recis_hybrid.ragged.checks import Parts
from recis_hybrid.ragged.dense import positions


def rows(parts: Parts, which: Any) -> Parts | torch.Tensor:
    """See `RaggedTensor.__getitem__`."""
    values, offsets, weights, outer = parts
    count = (outer[0] if outer else offsets).shape[0] - 1
    if isinstance(which, int):
        if not -count <= which < count:
            raise IndexError(f"RaggedTensor: there is no row {which} among {count}")
        row = which % count
        first = _between(parts, row, row + 1)
        if not outer:
            return first[0]
        # A row of one level of strings would have a weight for each byte.
        weights = None if len(outer) == 1 and values.dtype == torch.uint8 else first[2]
        return first[0], first[1], weights, first[3][1:]
    if isinstance(which, slice):
        start, stop, step = which.indices(count)
        if step == 1:
            return _between(parts, start, max(start, stop))
        which = list(range(start, stop, step))
    numbers = torch.as_tensor(which, device=values.device)
    if numbers.dtype == torch.bool:
        if numbers.shape != (count,):
            raise IndexError(f"RaggedTensor: a mask of rows must be [{count}], got {list(numbers.shape)}")
        numbers = numbers.nonzero().view(-1)
    if numbers.is_floating_point() and numbers.numel():
        raise TypeError(f"RaggedTensor: rows are numbered by integers, got {numbers.dtype}; convert them")
    numbers = numbers.to(torch.int64)
    if numbers.dim() != 1 or (numbers.numel() and not (-count <= int(numbers.min()) and int(numbers.max()) < count)):
        raise IndexError(f"RaggedTensor: rows must be a list of numbers from {-count} to {count - 1}, got {which}")
    return _taken(parts, numbers % max(count, 1))


def _between(parts: Parts, start: int, stop: int) -> Parts:
    """Returns the rows from start to stop, over the same values."""
    values, offsets, weights, outer = parts
    levels = []
    for level in (*outer, offsets):
        part = level[start : stop + 1]
        start, stop = int(part[0]), int(part[-1])
        levels.append(part - start)
        if len(levels) == len(outer):
            strings = start, stop
    if weights is not None:
        # A weight belongs to a value, or to a string where these are in lists.
        weights = weights[slice(*strings)] if outer and values.dtype == torch.uint8 else weights[start:stop]
    return values[start:stop], levels[-1], weights, tuple(levels[:-1])


def _taken(parts: Parts, numbers: torch.Tensor) -> Parts:
    values, offsets, weights, outer = parts
    of_strings = bool(outer) and values.dtype == torch.uint8
    levels = []
    for depth, level in enumerate((*outer, offsets)):
        lengths = (level[1:] - level[:-1])[numbers]
        made = torch.zeros(len(numbers) + 1, dtype=torch.int64, device=values.device)
        made[1:] = lengths.cumsum(0)
        levels.append(made)
        if of_strings and depth == len(outer) and weights is not None:
            weights = weights[numbers]
        which, places = positions(made, int(made[-1]))
        numbers = level[:-1][numbers][which] + places
    if weights is not None and not of_strings:
        weights = weights[numbers]
    return values[numbers], levels[-1], weights, tuple(levels[:-1])


def concat(parts: Sequence[Parts]) -> Parts:
    """See `RaggedTensor.concat`."""
    if not parts:
        raise ValueError("RaggedTensor.concat: takes at least one RaggedTensor, got none")
    kinds = {
        (values.dtype, values.shape[1:], values.device, weights is not None, len(outer))
        for values, _, weights, outer in parts
    }
    if len(kinds) > 1:
        raise ValueError(
            f"RaggedTensor.concat: takes RaggedTensors of one dtype, shape of values, device and number of levels, all "
            f"weighted or none, got {sorted(map(str, kinds))}"
        )
    # What a GPU has made may have more values than its offsets reach. A trace has no offsets to look at.
    if not torch.compiler.is_compiling():
        parts = [_between(one, 0, (*one[3], one[1])[0].shape[0] - 1) for one in parts]
    levels = [
        _joined([(*outer, offsets)[depth] for _, offsets, _, outer in parts]) for depth in range(len(parts[0][3]) + 1)
    ]
    given = [weights for _, _, weights, _ in parts if weights is not None]
    return torch.cat([one[0] for one in parts]), levels[-1], torch.cat(given) if given else None, tuple(levels[:-1])


def _joined(offsets: Sequence[torch.Tensor]) -> torch.Tensor:
    moved, before = [offsets[0][:1]], offsets[0].new_zeros(())
    for one in offsets:
        moved.append(one[1:] + before)
        before = before + one[-1]
    return torch.cat(moved)
