"""First values of rows: functions of (seed, member table's name, id), drawn by Philox4x32-10."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol


class Initializer(Protocol):
    """What a kernel needs to know of an initializer."""

    @property
    def kind(self) -> int:
        """0 constant, 1 uniform, 2 normal."""

    @property
    def values(self) -> tuple[float, float]:
        """The two numbers that the kind takes."""


@dataclass(frozen=True)
class Constant:
    """Every element starts as ``value``."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, self.value)

    @property
    def kind(self) -> int:
        """Which kernel draws the values."""
        return 0

    @property
    def values(self) -> tuple[float, float]:
        """What that kernel takes."""
        return self.value, 0.0


@dataclass(frozen=True)
class Uniform:
    """Elements are uniform in [low, high)."""

    low: float = -0.05
    high: float = 0.05

    def __post_init__(self) -> None:
        _finite(self, self.low, self.high)
        if self.low > self.high:
            raise ValueError(f"Uniform: low must not exceed high, got low={self.low}, high={self.high}")

    @property
    def kind(self) -> int:
        """Which kernel draws the values."""
        return 1

    @property
    def values(self) -> tuple[float, float]:
        """What that kernel takes."""
        return self.low, self.high


@dataclass(frozen=True)
class Normal:
    """Elements are normal with the given mean and standard deviation (Box and Muller's transform)."""

    mean: float = 0.0
    std: float = 0.01

    def __post_init__(self) -> None:
        _finite(self, self.mean, self.std)
        if self.std < 0:
            raise ValueError(f"Normal: std must not be negative, got {self.std}")

    @property
    def kind(self) -> int:
        """Which kernel draws the values."""
        return 2

    @property
    def values(self) -> tuple[float, float]:
        """What that kernel takes."""
        return self.mean, self.std


def table_key(seed: int, table: str) -> int:
    """Returns the signed 64-bit Philox key of a member table."""
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _finite(owner: object, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{type(owner).__name__}: values must be finite, got {values}")
