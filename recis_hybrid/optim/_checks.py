"""Checks of hyperparameters."""

from __future__ import annotations

from numbers import Real

from recis_hybrid.validation import check_number


def check_positive(owner: str, **values: float) -> None:
    """Raise TypeError if a hyperparameter is not a number, and ValueError if it is negative."""
    for name, value in values.items():
        check_number(owner, name, value)
        if not value >= 0:
            raise ValueError(f"{owner}: {name} must not be negative, got {value}")


def check_betas(owner: str, betas: tuple[float, float]) -> None:
    """Raise TypeError unless ``betas`` are two numbers, and ValueError unless they are in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(isinstance(beta, Real) for beta in betas):
        raise TypeError(f"{owner}: betas must be two numbers, e.g. (0.9, 0.999), got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{owner}: betas must be in [0, 1), got {betas}")
