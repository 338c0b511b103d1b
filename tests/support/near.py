"""Comparison of sums up to rounding, with a tolerance that scales with their terms.

A float sum in another order, on another processor or on another number of ranks, differs by a few roundings of its
terms, even if it is close to zero (N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). A
tolerance that is absolute, or relative to the sum, holds on one processor and fails on another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 64
"""Default tolerance, for sums of up to a few thousand terms, whose errors mostly cancel."""
OF_ADAM = 8 * ROUNDINGS
"""Tolerance after steps of Adam, which divides gradients by their size and so amplifies rounding in small ones."""


def magnitude(values: Tensor) -> Tensor:
    """Return the scale of each row: its largest absolute value, at least the tensor's root mean square.

    Args:
        values: ``[..., D]``, float; a one-dimensional tensor is one row.

    Returns:
        ``[..., 1]``, float64; zero-dimensional for a zero-dimensional tensor.
    """
    sizes = values.detach().double().abs()
    if sizes.numel() == 0:
        return sizes
    row = sizes.amax(-1, keepdim=True) if sizes.dim() else sizes
    return torch.maximum(row, sizes.square().mean().sqrt())


def roundings(got: Any, expected: Any, terms: Any = None) -> Tensor:
    """Return the difference of each element in roundings: ``|got - expected| / (eps * terms)``, float64.

    The arguments are those of ``assert_near``.
    """
    ours, theirs = as_tensor(got), as_tensor(expected)
    assert ours.shape == theirs.shape, f"shapes differ: got {list(ours.shape)}, expected {list(theirs.shape)}"
    eps = max(torch.finfo(each.dtype).eps for each in (ours, theirs) if each.dtype.is_floating_point)
    ours, theirs = ours.double(), theirs.double()
    scale = magnitude(theirs.nan_to_num(0.0, 0.0, 0.0)) if terms is None else as_tensor(terms).double()
    # Nonfinite numbers must be equal. The division is 0 / 0 where all numbers are 0.
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return torch.where(same, 0.0, (ours - theirs).abs() / (eps * scale)).nan_to_num(torch.inf, torch.inf)


def assert_near(got: Any, expected: Any, allowed: float = ROUNDINGS, *, terms: Any = None, where: str = "") -> None:
    """Assert ``|got - expected| <= allowed * eps * terms`` for every element.

    Args:
        got: A tensor, a numpy or jax array, a float or a list of floats (converted to float32); or a dict, tuple or
            list of these.
        expected: The same shape. The tolerance uses the ``eps`` (the spacing of numbers at 1) of the coarser dtype.
            Integers must be equal.
        allowed: The tolerance in roundings. A sum of n terms has an error of about ``sqrt(n)``, at most n; the errors
            of successive sums add up.
        terms: The magnitude of the terms, broadcast against ``expected``; by default its ``magnitude``.
        where: Prefix of the message.

    Raises:
        AssertionError: With the worst element, its values and its difference in roundings.
    """
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), f"{where}: {list(got)} is not {list(expected)}"
        for name, values in expected.items():
            assert_near(got[name], values, allowed, terms=terms, where=f"{where}[{name!r}]")
        return
    if isinstance(expected, (list, tuple)) and not all(isinstance(each, (int, float)) for each in expected):
        assert len(got) == len(expected), f"{where}: {len(got)} is not {len(expected)}"
        for number, values in enumerate(expected):
            assert_near(got[number], values, allowed, terms=terms, where=f"{where}[{number}]")
        return
    ours, theirs = as_tensor(got), as_tensor(expected)
    if not (ours.dtype.is_floating_point or theirs.dtype.is_floating_point):
        assert torch.equal(ours, theirs), f"{where}: integers differ".lstrip(": ")
        return
    found = roundings(ours, theirs, terms)
    if found.numel() and not bool((found <= allowed).all()):
        worst = int(found.argmax())
        position = [int(index) for index in torch.unravel_index(torch.tensor(worst), found.shape)]
        raise AssertionError(
            f"{where + ': ' if where else ''}{int((found > allowed).sum())} of {found.numel()} elements differ by more "
            f"than {allowed:g} roundings of the terms; the worst, at {position}: got "
            f"{float(ours.flatten()[worst])!r}, expected {float(theirs.flatten()[worst])!r}, which is "
            f"{float(found.flatten()[worst]):.3g} roundings"
        )


def as_tensor(values: Any) -> Tensor:
    """Return the values as a tensor on the CPU; Python floats become float32."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if isinstance(values, (int, float, list, tuple)):
        return torch.tensor(values)
    import numpy as np

    return torch.from_numpy(np.array(values))
