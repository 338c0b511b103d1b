"""First values of rows: functions of (seed, member table's name, id), drawn by Philox4x32-10.

A growing table has no fixed number of rows, so fan in and fan out default to the D elements of a row.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from recis_hybrid.validation import check_integer, check_number

QUAD = 4
"""Elements drawn by one Philox call."""
_FARTHEST = 5.7682
"""Largest deviation from the mean that kernels draw for a normal, in standard deviations: √(48 ln 2)."""


class Draw(NamedTuple):
    """A distribution in the form kernels expect: a kind and up to four numbers."""

    kind: int
    """0 constant, 1 uniform, 2 normal, 3 truncated normal."""
    a: float
    """The value, the lower bound or the mean."""
    b: float = 0.0
    """The upper bound or the standard deviation."""
    low: float = 0.0
    """Lower bound of a truncated normal, in standard deviations."""
    high: float = 0.0
    """Upper bound of a truncated normal, in standard deviations."""


class Initializer(Protocol):
    """A distribution of first values."""

    def draw(self, dim: int) -> Draw:
        """Return the distribution for rows of ``dim`` elements, in the form kernels expect."""


@dataclass(frozen=True)
class Constant:
    """Constant ``value``."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, self.value)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(0, self.value)


@dataclass(frozen=True)
class Uniform:
    """Uniform between ``low`` and ``high``; rounding may yield either bound."""

    low: float = -0.05
    high: float = 0.05

    def __post_init__(self) -> None:
        _finite(self, self.low, self.high)
        if self.low > self.high:
            raise ValueError(f"Uniform: low must not exceed high, got low={self.low}, high={self.high}")

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(1, self.low, self.high)


@dataclass(frozen=True)
class Normal:
    """Normal with the given mean and standard deviation, drawn by the Box-Muller transform."""

    mean: float = 0.0
    std: float = 0.01

    def __post_init__(self) -> None:
        _finite(self, self.mean, self.std)
        _not_negative(self, "std", self.std)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(2, self.mean, self.std)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal, truncated to [low, high], drawn by inverting the cumulative distribution.

    Like ``torch.nn.init.trunc_normal_``, but the bounds are in standard deviations from the mean.
    """

    mean: float = 0.0
    std: float = 0.01
    low: float = -2.0
    """Lower bound, in standard deviations."""
    high: float = 2.0
    """Upper bound, in standard deviations."""

    def __post_init__(self) -> None:
        _finite(self, self.mean, self.std, self.low, self.high)
        _not_negative(self, "std", self.std)
        if not -4 <= self.low < self.high <= 4:
            raise ValueError(
                f"TruncatedNormal: the bounds must be -4 <= low < high <= 4 standard deviations from the mean, "
                f"got low={self.low}, high={self.high}"
            )

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(3, self.mean, self.std, self.low, self.high)


@dataclass(frozen=True)
class XavierUniform:
    """Uniform in ±gain √(6 / (fan in + fan out)).

    References:
        Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks. AISTATS 2010.
    """

    gain: float = 1.0
    fan_in: int | None = None
    fan_out: int | None = None

    def __post_init__(self) -> None:
        _fans(self, self.gain, self.fan_in, self.fan_out)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        bound = math.sqrt(3.0) * _xavier(self.gain, self.fan_in, self.fan_out, dim)
        return Draw(1, -bound, bound)


@dataclass(frozen=True)
class XavierNormal:
    """Normal with standard deviation gain √(2 / (fan in + fan out)); see :class:`XavierUniform`."""

    gain: float = 1.0
    fan_in: int | None = None
    fan_out: int | None = None

    def __post_init__(self) -> None:
        _fans(self, self.gain, self.fan_in, self.fan_out)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(2, 0.0, _xavier(self.gain, self.fan_in, self.fan_out, dim))


@dataclass(frozen=True)
class KaimingUniform:
    """Uniform in ±gain √(3 / fan in).

    References:
        He, Zhang, Ren, Sun: Delving deep into rectifiers. ICCV 2015.
    """

    gain: float = math.sqrt(2.0)
    fan_in: int | None = None

    def __post_init__(self) -> None:
        _fans(self, self.gain, self.fan_in)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        bound = self.gain * math.sqrt(3.0 / (self.fan_in or dim))
        return Draw(1, -bound, bound)


@dataclass(frozen=True)
class KaimingNormal:
    """Normal with standard deviation gain / √(fan in); see :class:`KaimingUniform`."""

    gain: float = math.sqrt(2.0)
    fan_in: int | None = None

    def __post_init__(self) -> None:
        _fans(self, self.gain, self.fan_in)

    def draw(self, dim: int) -> Draw:
        """Return the distribution in the form kernels expect."""
        return Draw(2, 0.0, self.gain / math.sqrt(self.fan_in or dim))


def table_key(seed: int, table: str) -> int:
    """Return the signed 64-bit Philox key of a member table."""
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def initializer_words(initializer: Initializer, dim: int, seed: int, table: str, first: int = 0) -> tuple[int, ...]:
    """Return the five int64 words of ``csrc/core/initializer.h`` for a member table.

    Args:
        initializer: Initializer of its rows.
        dim: Elements of a whole row.
        seed: Seed of first values.
        table: Name of the member table.
        first: First element of the row to draw, a multiple of ``QUAD``.
    """
    kind, a, b, low, high = initializer.draw(dim)
    erf_low, erf_high = math.erf(low / math.sqrt(2.0)), math.erf(high / math.sqrt(2.0))
    packed = struct.pack(
        "<i6fiq", kind, a, b, a + b * low, a + b * high, erf_low, erf_high, first // QUAD, table_key(seed, table)
    )
    return struct.unpack("<5q", packed)


def refuse_unrepresentable(where: str, initializer: Initializer, dim: int, dtype: torch.dtype) -> None:
    """Raise ValueError if first values, or intermediate results of the kernels, may overflow.

    Args:
        where: The feature or table, for the message.
        initializer: Initializer of its rows.
        dim: Elements of a row.
        dtype: Dtype in which they are stored.
    """
    kind, a, b, low, high = initializer.draw(dim)
    values, intermediates = [a], [a]
    if kind == 1:
        values, intermediates = [a, b], [b - a]
    elif kind == 2:
        values, intermediates = [a - _FARTHEST * b, a + _FARTHEST * b], [a, b]
    elif kind == 3:
        values, intermediates = [a + b * low, a + b * high], [a, b, b * max(abs(low), abs(high))]
    for numbers, limiting in ((values, dtype), (intermediates, torch.float32)):
        greatest = max(abs(number) for number in numbers)
        if not greatest < overflow_threshold(limiting):
            raise ValueError(
                f"{where}: {initializer!r} draws numbers up to {greatest:g}, which exceed the range of {limiting} "
                f"(up to {torch.finfo(limiting).max:g}); narrow it, or use a dtype with a larger range"
            )


def _xavier(gain: float, fan_in: int | None, fan_out: int | None, dim: int) -> float:
    return gain * math.sqrt(2.0 / ((fan_in or dim) + (fan_out or dim)))


def _finite(owner: object, *values: float) -> None:
    for value in values:
        check_number(type(owner).__name__, "values", value)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{type(owner).__name__}: values must be finite, got {values}")


def _not_negative(owner: object, name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{type(owner).__name__}: {name} must not be negative, got {value}")


def _fans(owner: object, gain: float, *fans: int | None) -> None:
    _finite(owner, gain)
    _not_negative(owner, "gain", gain)
    for fan in fans:
        if fan is not None:
            check_integer(type(owner).__name__, "a fan", fan, low=1)


def overflow_threshold(dtype: torch.dtype) -> float:
    """Return the smallest number that a floating-point dtype rounds to infinity."""
    greatest, spacing = torch.finfo(dtype).max, torch.finfo(dtype).eps
    return greatest * ((2 - spacing / 2) / (2 - spacing))
