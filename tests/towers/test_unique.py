"""Towers on distinct rows: equal outputs and gradients, and fewer rows computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.towers import hf_tower, on_distinct_rows
from tests.support.devices import on_devices
from tests.support.near import assert_near
from tests.support.pretrained import model_of

ROWS = st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=12)


class Bag(nn.Module):
    """The mean of embeddings of tokens, with the rows of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, dtype=torch.float64)
        self.rows = -1

    def forward(self, ids: torch.Tensor | RaggedTensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.rows = len(ids)
        if isinstance(ids, RaggedTensor):
            lengths = ids.lengths()
            ids = ids.to_padded(4)
            mask = (torch.arange(4) < lengths[:, None]).long()
        vectors = self.table(ids)
        mask = torch.ones_like(ids) if mask is None else mask
        pooled: torch.Tensor = (vectors * mask[:, :, None]).sum(1)
        return pooled.tanh()


def compare(inputs: list[Any], distinct: int, call: Callable[..., torch.Tensor] = on_distinct_rows) -> None:
    """Compare outputs and gradients with those of the tower itself."""
    torch.manual_seed(0)
    tower = Bag()
    weights = torch.randn(len(inputs[0]), 3, dtype=torch.float64)
    (tower(*inputs) * weights).sum().backward()
    want, tower.table.weight.grad = tower.table.weight.grad, None
    output = call(tower, *inputs)
    assert tower.rows == distinct
    assert torch.equal(output, tower(*inputs))
    (output * weights).sum().backward()
    assert want is not None
    # The weights of equal rows are added first, and may cancel.
    assert_near(tower.table.weight.grad, want, terms=weights.abs().sum(0))


@given(ROWS)
def test_rows_of_unequal_length(rows: list[list[int]]) -> None:
    compare([RaggedTensor.from_lists(rows)], len({tuple(row) for row in rows}))


@given(ROWS)
def test_padded_rows_with_a_mask(rows: list[list[int]]) -> None:
    # Rows that differ in the mask alone are not equal.
    padded = torch.tensor([[*row, *[0] * (3 - len(row))] for row in rows]).view(-1, 3).long()
    mask = torch.tensor([[1] * len(row) + [0] * (3 - len(row)) for row in rows]).view(-1, 3).long()
    compare([padded, mask], len({tuple(row) for row in rows}))
    compare([padded, None], len({tuple(row) for row in padded.tolist()}))


def test_rows_in_the_order_of_their_first_occurrence() -> None:
    seen = []
    rows = torch.tensor([[3], [1], [3], [2], [1]])
    on_distinct_rows(lambda ids: seen.append(ids) or ids.double(), rows)  # type: ignore[func-returns-value]
    assert seen[0].tolist() == [[3], [1], [2]]
    on_distinct_rows(lambda ids: seen.append(ids) or ids.double(), rows[:2])  # type: ignore[func-returns-value]
    assert seen[1].data_ptr() == rows.data_ptr()


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.bool])
def test_values_of_any_dtype(device: str, dtype: torch.dtype) -> None:
    images = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 0]], dtype=dtype, device=device).view(4, 1, 2)
    sizes = []
    output = on_distinct_rows(lambda x: sizes.append(len(x)) or x.sum(2), images)  # type: ignore[func-returns-value]
    assert (sizes, output.device.type) == ([3], images.device.type)
    assert torch.equal(output, images.sum(2))


def test_rows_without_values() -> None:
    assert on_distinct_rows(lambda x: x.sum(1), torch.ones(3, 0)).tolist() == [0, 0, 0]
    assert on_distinct_rows(lambda x: x.sum(1), torch.ones(0, 3)).shape == (0,)


def test_equal_rows_are_bitwise_equal() -> None:
    sizes = []
    rows = torch.tensor([[0.0], [-0.0], [torch.nan], [torch.nan]])
    on_distinct_rows(lambda x: sizes.append(len(x)) or x, rows)  # type: ignore[func-returns-value]
    assert sizes == [3]


@pytest.mark.parametrize(
    ("tower", "inputs", "error", "message"),
    [
        (None, (), ValueError, "at least one input"),
        (None, (None,), ValueError, "at least one input"),
        (None, ([1],), TypeError, r"inputs must be tensors \[B, ...\] or RaggedTensors, got a list"),
        (None, (torch.tensor(1),), TypeError, "inputs must be tensors"),
        (None, (torch.ones(2), torch.ones(3)), ValueError, "equally many rows, got 2 and 3"),
        (None, (torch.ones(2, requires_grad=True),), TypeError, "must not require gradients"),
        (None, (torch.ones(2, dtype=torch.complex64),), TypeError, "inputs must be real, got complex numbers"),
        (None, (RaggedTensor.from_lists([[[1]]]),), TypeError, "rows must hold values without weights"),
        (lambda x: (x,), (torch.ones(2),), TypeError, "must return a tensor, got a tuple"),
        (lambda x: x.sum(), (torch.ones(2, 1),), ValueError, r"a row for each of 1, got \[\]"),
        (lambda x: torch.cat([x, x]), (torch.ones(2, 1),), ValueError, r"a row for each of 1, got \[2, 1\]"),
    ],
)
def test_refused_inputs_and_outputs(tower: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        on_distinct_rows(tower, *inputs)


@pytest.mark.jax
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_pretrained_tower(framework: Any) -> None:
    pytest.importorskip("jax")
    transformers = pytest.importorskip("transformers")
    fields = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_of(transformers.BertConfig(**fields, intermediate_size=24, max_position_embeddings=12))
    plain, unique = (hf_tower(model, framework, pool="mean", unique=each) for each in (False, True))
    titles = RaggedTensor.from_lists([[1, 2, 3], [4, 5], [1, 2, 3], [1, 2], [4, 5], [1, 2, 3]])
    weights = torch.linspace(-1, 1, 6 * 16).view(6, 16)

    def gradients(tower: nn.Module) -> dict[str, Any]:
        tower.zero_grad()
        (tower(titles) * weights).sum().backward()
        return {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}

    want, output = gradients(plain), plain(titles)
    rows: list[int] = []
    unique.model.register_forward_pre_hook(
        lambda module, inputs, named: rows.append(len((inputs[0] if inputs else named)["input_ids"])), with_kwargs=True
    )
    assert_near(unique(titles), output, 256)
    got = gradients(unique)
    assert rows == [3, 3]
    assert got.keys() == want.keys()
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():
        # Gradients that are 0, such as those of the keys' bias, are sums of others.
        assert_near(got[name], gradient, 64, terms=torch.full_like(gradient, largest), where=name)
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        unique(titles.values[:2, None], torch.tensor([[1], [0]]))
