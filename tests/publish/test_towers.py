"""Torch towers as ONNX files: those that begin by concatenating their inputs take one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from recis_hybrid.publish import towers  # noqa: E402
from recis_hybrid.publish.towers import written_tower  # noqa: E402
from recis_hybrid.serving.files import Tensor as StoredTensor  # noqa: E402
from recis_hybrid.serving.towers import JOINED, load_tower  # noqa: E402


class Tower(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(7, 2)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.function(self.layer, a, b, c)


def joined(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return layer(torch.cat(inputs, dim=1)).relu()


def joined_by_last_dimension(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return layer(torch.cat(inputs, dim=-1)) + 1


def used_again(layer: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return layer(torch.cat([a, b, c], dim=1)) * a[:, :1]


def in_another_order(layer: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return layer(torch.cat([b, a, c], dim=1))


def one_twice(layer: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return layer(torch.cat([a, b, c], dim=1)) + torch.cat([a, a], dim=1)[:, :2]


def joined_and_read_twice(layer: nn.Module, *inputs: Tensor) -> Tensor:
    x = torch.cat(inputs, dim=1)
    return layer(x) + x[:, 2:4]


def not_joined(layer: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a[:, :2] + b[:, :2] * c


def only_joined(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, dim=1)


CASES = {
    joined: 1,
    joined_by_last_dimension: 1,
    joined_and_read_twice: 1,
    used_again: 3,
    in_another_order: 3,
    one_twice: 3,
    not_joined: 3,
    only_joined: 3,
}


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_towers_have_their_outputs(function: Any) -> None:
    torch.manual_seed(0)
    tower = Tower(function)
    written = written_tower(tower, [torch.randn(3, width) for width in (4, 2, 1)])
    data = written.tensors["model"].numpy()
    names = [each.name for each in onnxruntime.InferenceSession(data.tobytes()).get_inputs()]
    assert len(names) == CASES[function]
    assert (names == [JOINED]) == (len(names) == 1)
    assert towers.JOINED == JOINED
    run = load_tower("here", "onnx", {"model": StoredTensor(data, False)}, 1)
    for rows in (1, 2, 65):
        inputs = [torch.randn(rows, width) for width in (4, 2, 1)]
        (found,) = run([each.numpy() for each in inputs])
        expected = tower(*inputs).detach().numpy()
        assert found.shape == expected.shape
        # Sums of eight products of numbers of about 1.
        assert np.abs(found - expected).max() <= 32 * np.finfo(np.float32).eps * max(1, np.abs(expected).max())


def test_integers_are_not_joined() -> None:
    class Counted(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], dim=1).to(torch.float32)

    written = written_tower(Counted(), [torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64)])
    run = load_tower("here", "onnx", {"model": StoredTensor(written.tensors["model"].numpy(), False)}, 1)
    (found,) = run([np.array([[1, 2]]), np.array([[2**40]])])
    assert found.tolist() == [[1, 2, 2**40]]
