"""Waits of the host for the device in operations of RaggedTensors, counted on the emulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid.ragged import RaggedTensor
from tests.support import emulated
from tests.support.devices import on_devices

ROWS = RaggedTensor.from_lists([[1, 2, 3], [], [4], [5, 6]], weights=[[0.1, 0.2, 0.3], [], [0.4], [0.5, 0.6]])
DEEP = RaggedTensor.from_lists([[[1, 2], []], [], [[3], [4, 5], [6]]])
STRINGS = RaggedTensor.from_strings([["ab", "c"], [], ["", "def"]])


def plain(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.tolist()
    return result.to_lists(), None if result.weights is None else result.weights.tolist()


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda r: r.to_padded(3), 0),
        (lambda r: r.to_padded(5, padding=-1, side="left"), 0),
        (lambda r: r.to_padded(), 1),
        (lambda r: r[1:3], 1),
        (lambda r: r[:0], 1),
        (lambda r: r[3], 1),
        (lambda r: r[::-1], 1),
        (lambda r: r[[3, 0, -2]], 1),
        (lambda r: r[torch.tensor([3, 0, -2])], 1),
        (lambda r: r[torch.tensor([3, 0, -2], device=r.device)], 2),  # and for the copy that makes the numbers
        (lambda r: r[torch.tensor([True, False, False, True])], 1),
        (lambda r: r[r.offsets[:-1] > 2], 1),
        (lambda r: RaggedTensor.concat([r, r, r[:2]]), 2),
    ],
)
def test_operations_on_rows_wait_at_most_once(call: Callable[[RaggedTensor], Any], waits: int) -> None:
    column = ROWS.to("emulated")
    results: list[Any] = []
    assert emulated.synchronizations(lambda: results.append(call(column))) == waits
    assert plain(results[0]) == plain(call(ROWS))


@pytest.mark.emulated
@pytest.mark.parametrize("column", [DEEP, STRINGS], ids=["lists", "strings"])
@pytest.mark.parametrize(
    "call",
    [
        lambda r: r[1:3],
        lambda r: r[0],
        lambda r: r[[2, 0]],
        lambda r: r[torch.tensor([True, False, True])],
        lambda r: RaggedTensor.concat([r, r]),
    ],
)
def test_rows_of_lists_wait_once(call: Callable[[RaggedTensor], Any], column: RaggedTensor) -> None:
    moved = column.to("emulated")
    results: list[Any] = []
    assert emulated.synchronizations(lambda: results.append(call(moved))) == 1
    assert plain(results[0]) == plain(call(column))


@on_devices
def test_bad_rows_are_refused(device: str) -> None:
    column = ROWS.to(device)
    for which in ([4], [0, -5], torch.tensor([1, 7], device=device), torch.tensor([-9], device=device)):
        with pytest.raises(IndexError, match="numbers from -4 to 3"):
            column[which]
    empty = column[:0]
    with pytest.raises(IndexError, match="numbers from"):
        empty[torch.tensor([0], device=device)]
    assert len(empty[torch.zeros(0, dtype=torch.int64, device=device)]) == 0
    assert len(empty[torch.zeros(0, dtype=torch.bool, device=device)]) == 0


@on_devices
def test_padding_drops_unused_values_and_passes_gradients(device: str) -> None:
    values = torch.arange(1.0, 9.0, device=device).requires_grad_()
    offsets = torch.tensor([0, 0, 3, 3, 5] if device != "cpu" else [0, 0, 3, 3, 8], device=device)
    padded = RaggedTensor.unchecked(values, offsets).to_padded(5)
    (padded * 2).sum().backward()
    used = int(offsets[-1])
    assert padded[:, :2].tolist() == [[0, 0], [1, 2], [0, 0], [4, 5]]
    assert values.grad is not None
    assert values.grad.tolist() == [2.0] * used + [0.0] * (8 - used)


@pytest.mark.emulated
def test_long_rows_are_cut_where_the_host_does_not_wait_for_lengths() -> None:
    column = ROWS.to("emulated")
    assert column.to_padded(2).tolist() == [[1, 2], [0, 0], [4, 0], [5, 6]]
    assert column.to_padded(2, side="left").tolist() == [[2, 3], [0, 0], [0, 4], [5, 6]]
    assert column.to_padded(0).shape == (4, 0)
    with pytest.raises(ValueError, match="length must be at least 3"):
        ROWS.to_padded(2)
