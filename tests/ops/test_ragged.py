"""Schemas and fakes of the operators on ragged columns; tests/features checks their results."""

from __future__ import annotations

import pytest
import torch

from recis_hybrid.ops import ragged
from recis_hybrid.ops.ragged import FIXED, NO_BOUND, STRICT
from tests.support.devices import on_devices

# Data-dependent sizes need a context that opcheck's AOT test lacks.
STATIC = ("test_schema", "test_faketensor")
RECIS = torch.ops.recis


def column(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.tensor([1, 0, 2, 2], device=device)
    return values, torch.tensor([0, 3, 3, 4], device=device), torch.tensor([0.5, 1, 2, 3], device=device)


@on_devices
@pytest.mark.parametrize("exact", [True, False])
def test_resize(device: str, exact: bool) -> None:
    if exact and device == "cuda":
        return
    values, offsets, weights = column(device)
    for least, most, flags in ((0, 2, 0), (2, NO_BOUND, 0), (3, 3, FIXED | STRICT)):
        arguments = ([offsets], [values, weights], [0, 0], [least], [most], [flags], [7, 0], "a", exact, True)
        torch.library.opcheck(RECIS.ragged_resize.default, arguments, test_utils=STATIC)


@on_devices
def test_bounded_results_end_in_zeros(device: str) -> None:
    values, offsets, _ = column(device)
    new_offsets, new_values = RECIS.ragged_resize([offsets], [values], [0], [0], [2], [0], [0], "a", False, True)
    assert new_offsets.tolist() == [0, 2, 2, 3]
    assert new_values.tolist() == [1, 0, 2, 0]


@on_devices
def test_other_operators(device: str) -> None:
    values, offsets, weights = column(device)
    rows = torch.tensor([2, -1, 0], device=device)
    exact = device == "cpu"
    bounds = [] if exact else [8]
    for op, arguments in (
        (RECIS.ragged_take, ([offsets], [rows], [values, weights], [0, 0], bounds, "a", exact, True)),
        (RECIS.ragged_cross, ([values, offsets, weights], [0, 1, 2, 0, 1, -1], [9], bounds, "a", exact, True)),
        (RECIS.ragged_topk, ([values], [offsets], [weights], [2], "a", exact, True)),
        (RECIS.ragged_distinct, ([values, values], [offsets, offsets], [weights], [0, -1], "a\nb", exact, True)),
        (RECIS.decimal_strings, ([values, offsets], [0, 1], exact, True)),
        (RECIS.ragged_concat, ([values, offsets, weights], [2, 0, 1, 2, 0, 1, -1], "a", True)),
        (RECIS.multi_hot, ([values, offsets, weights], [0, 1, 2], [3], "a", True)),
        (RECIS.ragged_tile, ([values, offsets, weights], [0, 1, 2, 0, -1, -1], [2, 3], "a", True)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=STATIC)


def test_native_checks() -> None:
    values, offsets, weights = column("cpu")
    with pytest.raises(RuntimeError, match="planes have different lengths"):
        RECIS.ragged_resize([offsets], [values, weights[:2]], [0, 0], [0], [1], [0], [0, 0], "a", True, True)
    with pytest.raises(RuntimeError, match="a: row 0 is not a row of the column"):
        RECIS.ragged_take([offsets], [torch.tensor([3])], [values], [0], [], "a", True, True)
    with pytest.raises(RuntimeError, match="has no upper bound"):
        RECIS.ragged_cross([values, offsets], [0, 1, -1, 0, 1, -1], [NO_BOUND], [NO_BOUND], "a", False, True)
    for op, arguments in (
        (RECIS.ragged_cross, ([values, offsets, weights[:2]], [0, 1, 2, 0, 1, -1], [9], [], "a", True, True)),
        (RECIS.ragged_concat, ([values, offsets, weights[:2]], [2, 0, 1, 2, 0, 1, -1], "a", True)),
        (RECIS.multi_hot, ([values, offsets, weights[:2]], [0, 1, 2], [3], "a", True)),
        (RECIS.ragged_tile, ([values, offsets, weights[:2]], [0, 1, 2], [2], "a", True)),
    ):
        with pytest.raises(RuntimeError, match="a: there must be one weight for each"):
            op(*arguments)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        RECIS.multi_hot([values[::2]], [0, -1, -1], [3], "a", True)


@pytest.mark.parametrize(
    ("offsets", "total", "valid"),
    [
        ([0], 0, True),
        ([0, 3, 3, 4], 4, True),
        ([0] * 40, 0, True),
        ([], 0, False),
        ([0], 1, False),
        ([1, 2], 2, False),
        ([0, 3, 2, 4], 4, False),
        ([0, 3, 3, 4], 5, False),
        ([0, 3, 3, 4], 3, False),
        ([0, -(2**63), 2**63 - 1, 4], 4, False),
        ([*range(50), 48], 48, False),
    ],
)
def test_first_bad_offsets(offsets: list[int], total: int, valid: bool) -> None:
    first, other = torch.tensor([0, 2]), torch.tensor(offsets, dtype=torch.int64)
    assert ragged.first_bad_offsets([first, other, other], [2, total, total]) == (-1 if valid else 1)
    torch.library.opcheck(RECIS.first_bad_offsets.default, ([first, other], [2, total]), test_utils=STATIC)
