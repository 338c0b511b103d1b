"""Operators that change the number of values in rows of ragged columns, many columns in one call.

A column consists of ``values`` (row after row) and ``offsets`` ``[B + 1]``; a plane is its values or its weights.
Results whose size depends on data have their exact size on the CPU. On CUDA, where the host would have to wait for the
size, they have an upper bound instead (``exact=False``), with zeros after the values that the offsets cover.

Tensors are passed in one list and referred to by number (``index``), -1 for none. ``labels`` holds a line for each
column, which names it in errors. Errors are RuntimeErrors, raised on the CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_BOUND = 2**63 - 1
"""Maximum length of rows without a limit."""

DROP_FIRST, PAD_FIRST, STRICT, FIXED = 1, 2, 4, 8
"""Flags of ``resize``: drop the first values of long rows, pad short rows at the start, refuse long rows, and return
dense ``[B, most, ...]``."""


def _fake_resize(
    offsets: Sequence[Tensor],
    planes: Sequence[Tensor],
    owner: Sequence[int],
    least: Sequence[int],
    most: Sequence[int],
    flags: Sequence[int],
    fills: Sequence[int],
    labels: str,
    exact: bool,
    parallel: bool,
) -> list[Tensor]:
    results = [column.new_empty(column.shape) for column in offsets]
    sizes: dict[int, int | torch.SymInt] = {}
    for plane, k in zip(planes, owner, strict=True):
        rows = offsets[k].shape[0] - 1
        if flags[k] & FIXED:
            results.append(plane.new_empty((rows, most[k], *plane.shape[1:])))
            continue
        if k not in sizes:
            if exact:
                sizes[k] = torch.library.get_ctx().new_dynamic_size()
            elif least[k]:
                sizes[k] = plane.shape[0] + rows * least[k]
            else:
                sizes[k] = min(plane.shape[0], rows * most[k])
        results.append(plane.new_empty((sizes[k], *plane.shape[1:])))
    return results


def _fake_take(
    offsets: Sequence[Tensor],
    rows: Sequence[Tensor],
    planes: Sequence[Tensor],
    owner: Sequence[int],
    bounds: Sequence[int],
    labels: str,
    exact: bool,
    parallel: bool,
) -> list[Tensor]:
    results = [taken.new_empty((taken.shape[0] + 1,)) for taken in rows]
    sizes: dict[int, int | torch.SymInt] = {}
    for plane, k in zip(planes, owner, strict=True):
        if k not in sizes:
            sizes[k] = torch.library.get_ctx().new_dynamic_size() if exact else bounds[k]
        results.append(plane.new_empty((sizes[k], *plane.shape[1:])))
    return results


def _fake_cross(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    most: Sequence[int],
    bounds: Sequence[int],
    labels: str,
    exact: bool,
    parallel: bool,
) -> list[Tensor]:
    results = []
    for k in range(len(most)):
        x, xo, xw, _, _, yw = index[6 * k : 6 * k + 6]
        rows = tensors[xo].shape[0] - 1 if xo >= 0 else tensors[x].shape[0]
        size: int | torch.SymInt
        size = torch.library.get_ctx().new_dynamic_size() if exact else bounds[k]
        results += [tensors[x].new_empty((rows + 1,)), tensors[x].new_empty((size,))]
        if xw >= 0 or yw >= 0:
            results.append(tensors[xw if xw >= 0 else yw].new_empty((size,)))
    return results


def _fake_topk(
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weights: Sequence[Tensor],
    most: Sequence[int],
    labels: str,
    exact: bool,
    parallel: bool,
) -> list[Tensor]:
    results = []
    for mine, column, weight, k in zip(values, offsets, weights, most, strict=True):
        rows = column.shape[0] - 1
        size = torch.library.get_ctx().new_dynamic_size() if exact else min(mine.shape[0], rows * k)
        results += [column.new_empty(column.shape), mine.new_empty((size,)), weight.new_empty((size,))]
    return results


def _fake_distinct(
    ids: Sequence[Tensor],
    offsets: Sequence[Tensor],
    planes: Sequence[Tensor],
    weights: Sequence[int],
    labels: str,
    exact: bool,
    parallel: bool,
) -> list[Tensor]:
    results = []
    for mine, column, weight in zip(ids, offsets, weights, strict=True):
        size = torch.library.get_ctx().new_dynamic_size() if exact else mine.shape[0]
        results += [column.new_empty(column.shape), mine.new_empty((size,))]
        if weight >= 0:
            results.append(planes[weight].new_empty((size,)))
    return results


def _fake_decimal(ids: Sequence[Tensor], is_unsigned: Sequence[int], exact: bool, parallel: bool) -> list[Tensor]:
    results = []
    for mine in ids:
        size = torch.library.get_ctx().new_dynamic_size() if exact else mine.numel() * 20
        results += [mine.new_empty((mine.numel() + 1,)), mine.new_empty((size,), dtype=torch.uint8)]
    return results


def _fake_concat(tensors: Sequence[Tensor], index: Sequence[int], labels: str, parallel: bool) -> list[Tensor]:
    results, at = [], 0
    while at < len(index):
        inputs = [index[at + 1 + 3 * k : at + 4 + 3 * k] for k in range(index[at])]
        at += 1 + 3 * len(inputs)
        ragged = [offsets for _, offsets, _ in inputs if offsets >= 0]
        like = tensors[inputs[0][0]]
        shape: tuple[int, ...]
        if ragged:
            results.append(tensors[ragged[0]].new_empty(tensors[ragged[0]].shape))
            shape = (sum(tensors[values].numel() for values, _, _ in inputs),)
        else:
            wide = sum(tensors[values].shape[1] if tensors[values].dim() == 2 else 1 for values, _, _ in inputs)
            shape = (like.shape[0], wide)
        results.append(like.new_empty(shape))
        if any(weights >= 0 for _, _, weights in inputs):
            results.append(like.new_empty(shape, dtype=torch.float32))
    return results


def _fake_multi_hot(
    tensors: Sequence[Tensor], index: Sequence[int], classes: Sequence[int], labels: str, parallel: bool
) -> list[Tensor]:
    results = []
    for k, count in enumerate(classes):
        ids, offsets, _ = index[3 * k : 3 * k + 3]
        rows = tensors[ids].shape[0] if offsets < 0 else tensors[offsets].shape[0] - 1
        results.append(tensors[ids].new_empty((rows, count), dtype=torch.float32))
    return results


def _fake_tile(
    tensors: Sequence[Tensor], index: Sequence[int], times: Sequence[int], labels: str, parallel: bool
) -> list[Tensor]:
    results = []
    for k, count in enumerate(times):
        values, offsets, weights = index[3 * k : 3 * k + 3]
        if offsets >= 0:
            results.append(tensors[offsets].new_empty(((tensors[offsets].shape[0] - 1) * count + 1,)))
        for plane in (values, weights):
            if plane >= 0:
                shape = tensors[plane].shape
                results.append(tensors[plane].new_empty((shape[0] * count, *shape[1:])))
    return results


for _name, _fake in (
    ("ragged_resize", _fake_resize),
    ("ragged_take", _fake_take),
    ("ragged_cross", _fake_cross),
    ("ragged_topk", _fake_topk),
    ("ragged_distinct", _fake_distinct),
    ("decimal_strings", _fake_decimal),
    ("ragged_concat", _fake_concat),
    ("multi_hot", _fake_multi_hot),
    ("ragged_tile", _fake_tile),
    ("first_bad_offsets", lambda offsets, totals: offsets[0].new_empty(1)),
):
    torch.library.register_fake(f"recis::{_name}", _fake)


def shorten(offsets: Tensor, planes: Sequence[Tensor], most: int, label: str) -> tuple[Tensor, list[Tensor]]:
    """Return the first ``most`` values of each row; does not wait for a GPU.

    Args:
        offsets: int64 ``[B + 1]``, contiguous.
        planes: ``[N]`` each, contiguous, on the device of the offsets.
        most: Maximum number of values in a row.
        label: Names the column in errors.

    Returns:
        The new offsets and planes; on a GPU, zeros follow the values in use.
    """
    owner = [0] * len(planes)
    exact = offsets.is_cpu
    results = torch.ops.recis.ragged_resize([offsets], planes, owner, [0], [most], [0], owner, label, exact, True)
    return results[0], results[1:]


def first_bad_offsets(offsets: Sequence[Tensor], totals: Sequence[int]) -> int:
    """Return the index of the first invalid offsets, -1 if all are valid.

    Args:
        offsets: At least one tensor, int64 ``[lists + 1]``, contiguous, on the CPU. Valid offsets begin with 0 and do
            not decrease.
        totals: For each tensor, its required last element.
    """
    return int(torch.ops.recis.first_bad_offsets(offsets, totals).item())
