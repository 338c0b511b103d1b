"""Pooling, compared with a loop over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.towers import pool
from tests.support.near import assert_near


def reference(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    rows = []
    for row, kept in zip(hidden, mask, strict=True):
        tokens = row[kept != 0]
        rows.append({"cls": tokens[0], "mean": tokens.mean(0), "last": tokens[-1]}[how])
    return torch.stack(rows)


@st.composite
def masks(draw: Any) -> torch.Tensor:
    length = draw(st.integers(1, 5))
    rows = draw(st.lists(st.integers(1, length), min_size=1, max_size=4))
    ones = [[1] * count + [0] * (length - count) for count in rows]
    return torch.tensor([row[::-1] for row in ones] if draw(st.booleans()) else ones)


@given(mask=masks(), how=st.sampled_from(["cls", "mean", "last"]), dtype=st.sampled_from([torch.int64, torch.bool]))
def test_pooling_skips_padding_on_either_side(mask: torch.Tensor, how: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got, expected = pool(hidden, mask.to(dtype), how), reference(hidden, mask, how)
    assert_near(got, expected)
    weights = torch.arange(got.numel(), dtype=got.dtype).reshape(got.shape)
    gradients = [torch.autograd.grad((each * weights).sum(), hidden)[0] for each in (got, expected)]
    assert_near(*gradients)
    assert not gradients[0][mask == 0].any()


@pytest.mark.parametrize("how", ["cls", "mean", "last"])
def test_no_mask_means_no_padding(how: str) -> None:
    hidden = torch.randn(2, 3, 4)
    assert_near(pool(hidden, None, how), reference(hidden, torch.ones(2, 3), how))


def test_the_mean_of_no_tokens_is_zero() -> None:
    assert pool(torch.ones(1, 2, 3), torch.zeros(1, 2), "mean").tolist() == [[0, 0, 0]]
    assert pool(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2), "mean").dtype == torch.bfloat16


def test_another_way_to_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="how must be 'cls', 'mean' or 'last', got 'max'"):
        pool(torch.ones(1, 2, 3), None, "max")
