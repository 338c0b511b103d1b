"""Padding to size classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402

DIMS = [("batch",), ("batch", "length")]


def pooled(params: Any, x: Any, sequence: Any, *, masks: Any) -> Any:
    """Return x with the mean of each sequence, the mean over the batch, and attention weights (batch, length)."""
    weights = jnp.where(masks["length"], sequence @ params["w"], -jnp.inf)
    attention = jax.nn.softmax(weights, axis=1)
    rows = x + (attention[:, :, None] * sequence).sum(1)
    real = masks["batch"][:, None]
    return rows, (rows * real).sum(0) / real.sum(), attention


def tower(**options: Any) -> JaxTower:
    classes = {"batch": (4, 16), "length": None}
    return JaxTower(pooled, {"w": np.arange(3, dtype=np.float32)}, dims=DIMS, classes=classes, **options)


def terms_of_gradients(x: torch.Tensor, sequence: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """Return the magnitude of the terms of the gradients: softmax's, a·(g - Σ a·g), cancels.

    The loss is the sum of the squares of the rows and of their mean.
    """
    x, sequence, w = x.detach().abs(), sequence.detach(), w.detach()
    attention = (sequence @ w).softmax(1)[:, :, None]
    sequence = sequence.abs()
    of_rows = 2 * (x + (attention * sequence).sum(1)) + 1 / len(x)
    of_attention = sequence @ of_rows[:, :, None]
    of_weights = attention * (of_attention + (attention * of_attention).sum(1, keepdim=True))
    return [of_rows, attention * of_rows[:, None] + of_weights * w, (of_weights * sequence).sum((0, 1))]


def test_varying_sizes_compile_a_bounded_number_of_times_and_padding_has_no_effect() -> None:
    module = tower()
    random = np.random.default_rng(0)
    for _ in range(30):
        batch, length = int(random.integers(1, 17)), int(random.integers(1, 17))
        x = torch.randn(batch, 3, requires_grad=True)
        sequence = torch.randn(batch, length, 3, requires_grad=True)
        w = torch.arange(3.0, requires_grad=True)
        rows, mean, attention = module(x, sequence)
        expected_attention = (sequence @ w).softmax(1)
        expected = x + (expected_attention[:, :, None] * sequence).sum(1)
        assert_near(attention, expected_attention)
        assert_near(rows, expected)
        assert_near(mean, expected.mean(0))
        loss, expected_loss = rows.square().sum() + mean.sum(), expected.square().sum() + expected.mean(0).sum()
        ours = torch.autograd.grad(loss, [x, sequence, *module.parameters()])
        theirs = torch.autograd.grad(expected_loss, [x, sequence, w])
        terms = terms_of_gradients(x, sequence, w)
        for mine, other, each in zip(ours, theirs, terms, strict=True):
            assert_near(mine, other, terms=each)
    # 2 classes of batches × 2 of lengths (8, 16), forward and backward
    assert module.compilations == 8


def test_sizes_that_are_classes_are_not_copied() -> None:
    module = tower()
    x, sequence = torch.randn(4, 3), torch.randn(4, 8, 3)
    (grown_x, grown_sequence), found, padded = module._padding.pad((x, sequence))
    assert grown_x is x
    assert grown_sequence is sequence
    assert found == padded == {"batch": 4, "length": 8}


def test_bad_sizes_are_refused() -> None:
    module = tower(name="ranker")
    with pytest.raises(ValueError, match=r"ranker.*'batch' is 17, which exceeds its largest class 16"):
        module(torch.ones(17, 3), torch.ones(17, 2, 3))
    with pytest.raises(ValueError, match=r"input\[1\]: 'batch' is 3 here, but 2 before"):
        module(torch.ones(2, 3), torch.ones(3, 2, 3))
    with pytest.raises(ValueError, match=r"input\[1\]: must be a tensor with dimensions .* got \(2,\)"):
        module(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="dims is for 2 inputs, got 1"):
        module(torch.ones(2, 3))


def joined(params: Any, x: Any, y: Any) -> Any:
    return {"mean": x.mean(), "rows": [x, jnp.concatenate([x, y])]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda params, x, y: jnp.concatenate([x, x]), r"axis 0 of output has size 16, and 18 if 'batch' is 9 "),
        (lambda params, x, y: (x, x.reshape(-1)), r"axis 0 of output\[1\] has size 16, and 18 if 'batch' is 9 "),
        # A prepended token, a window: these grow with the batch, but have another size.
        (lambda params, x, y: jnp.concatenate([x[:1], x]), r"axis 0 of output has size 9, and 10 if 'batch' is 9 "),
        (lambda params, x, y: x[2:] + x[:-2], r"axis 0 of output has size 6, and 7 if 'batch' is 9 "),
        (joined, r"axis 0 of output\['rows'\]\[1\] has .* 13 if 'batch' is 9 .* and 11 if 'length' is 3 "),
        # This depends on two dimensions, but has the size of one of them.
        (lambda params, x, y: jnp.concatenate([x, y])[4:], r"has size 8, and 9 if 'batch' .* and 7 if 'length'"),
    ],
)
def test_outputs_that_cannot_be_trimmed_are_refused(function: Any, message: str) -> None:
    dims: Any = [("batch",), ("length",)]
    module = JaxTower(function, {}, dims=dims, classes={"batch": None, "length": (4,)}, name="ranker")
    for sizes in ((5, 3), (8, 4)):  # with padding and without
        with pytest.raises(ValueError, match=f"(?s)ranker.*{message}.*join them outside"):
            module(torch.ones(sizes[0], 2), torch.ones(sizes[1], 2))


def test_dimensions_with_equal_padded_sizes_are_distinguished() -> None:
    module = JaxTower(
        lambda params, x, y: (x @ y.T, y @ x.T, jnp.zeros((8, x.shape[0]))),
        {},
        dims=[("batch",), ("length",)],
        classes={"batch": (8,), "length": (8,)},
    )
    x, y = torch.rand(3, 2), torch.rand(5, 2)
    outer, other, constant = module(x, y)
    assert_near(outer, x @ y.T)
    assert_near(other, y @ x.T)
    assert constant.shape == (8, 3)  # this 8 is a constant of the function


@pytest.mark.parametrize("classes", [(1,), (2,), (1, 2), (4, 6)])
def test_a_function_may_refuse_sizes_beyond_the_largest_class(classes: tuple[int, ...]) -> None:
    positions = np.arange(classes[-1] + 1, dtype=np.float32)

    def add_positions(params: Any, x: Any) -> Any:
        assert x.shape[1] <= max(2, *classes)
        return x + params["positions"][: x.shape[1]]

    module = JaxTower(add_positions, {"positions": positions}, dims=[(None, "length")], classes={"length": classes})
    for length in {1, *classes}:
        assert_near(module(torch.ones(2, length)), torch.ones(2, length) + torch.arange(length))


def test_errors_of_a_function_that_refuses_a_size_name_the_size() -> None:
    module = JaxTower(
        lambda params, x: x.reshape(-1, 4, 2).sum((1, 2)), {}, dims=[("batch",)], classes={"batch": (8,)}, name="ranker"
    )
    with pytest.raises(TypeError) as caught:
        module(torch.ones(5, 2))
    assert any("JaxTower 'ranker' for sizes {'batch': 7}" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": DIMS, "classes": {"batch": None}}, "set sizes for each name"),
        ({"dims": [("batch",)], "classes": {"batch": (0,)}}, "must be positive integers"),
        ({}, "the function takes masks"),
    ],
)
def test_bad_classes_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JaxTower(pooled, {}, **options)
