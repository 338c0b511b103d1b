"""Scaled tolerances: rounding differences pass, and larger ones are reported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support.near import assert_near, magnitude, roundings

EPS = 2.0**-23  # the spacing of float32 at 1


def test_an_element_near_zero_is_compared_on_the_scale_of_its_row() -> None:
    row = torch.tensor([[0.5, -0.25, 3e-7]])
    off = row + torch.tensor([[0.0, 0.0, 1e-8]])  # a thirtieth of the element, a sixth of a rounding of the row
    assert float(roundings(off, row).max()) == pytest.approx(1e-8 / (EPS * 0.5), rel=0.01)
    assert_near(off, row, 1)
    with pytest.raises(
        AssertionError, match=r"table: 1 of 3 .*the worst, at \[0, 1\]: got -0.2499\d*, expected -0.25,"
    ):
        assert_near(row + torch.tensor([[0.0, 2e-5, 0.0]]), row, where="table")


def test_a_zero_row_is_compared_on_the_scale_of_its_table_and_a_zero_table_exactly() -> None:
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert magnitude(table).tolist() == [[4.0], [math.sqrt(25 / 4)]]
    assert_near(table + torch.tensor([[0.0], [EPS]]), table, 0.5)
    assert_near(torch.zeros(2, 2), torch.zeros(2, 2), 0)
    with pytest.raises(AssertionError, match="inf roundings"):
        assert_near(torch.full((2,), 1e-30), torch.zeros(2))


def test_explicit_terms_set_the_scale() -> None:
    terms = torch.tensor([1.0, 2.0**-20, -1.0])
    assert_near(terms.sum(), 2.0**-20 + 3 * EPS, 1, terms=terms.abs().sum() * 2)
    with pytest.raises(AssertionError):
        assert_near(terms.sum(), 2.0**-20 + 3 * EPS, 1)


def test_sums_in_any_order_agree_and_a_missing_term_is_detected() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(500, 8, generator=generator)
    forth, back = (torch.from_numpy(np.cumsum(each.numpy(), 0)[-1].copy()) for each in (terms, terms.flip(0)))
    assert not torch.equal(forth, back)
    assert_near(forth, back)
    assert_near(forth, terms.double().sum(0))  # float32 is the coarser
    with pytest.raises(AssertionError):
        assert_near(forth - 1e-2 * terms[0], back)


def test_nonfinite_numbers_must_be_equal() -> None:
    values = [1.0, math.nan, math.inf, -math.inf]
    assert_near(values, torch.tensor(values), 0)
    for at, other in ((1, 0.0), (2, 1e38), (3, math.inf), (0, math.nan)):
        wrong = list(values)
        wrong[at] = other
        with pytest.raises(AssertionError, match=rf"1 of 4 .* at \[{at}\]"):
            assert_near(wrong, values)


def test_shapes_integers_and_nested_values() -> None:
    with pytest.raises(AssertionError, match=r"shapes differ: got \[1\], expected \[2\]"):
        assert_near([1.0], [1.0, 2.0])
    with pytest.raises(AssertionError, match=r"\['ids'\]: integers differ"):
        assert_near({"ids": torch.tensor([2**53 + 1])}, {"ids": torch.tensor([2**53])})
    with pytest.raises(AssertionError, match=r"a\[1\]\['b'\]: 1 of 2"):
        assert_near((1.0, {"b": np.array([1.0, 2.0])}), (1.0, {"b": np.array([1.0, 2.1])}), where="a")
    assert_near(torch.zeros(0, 3), torch.zeros(0, 3))
    assert_near([], [])
