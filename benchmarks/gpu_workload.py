"""Sizes, ids and timing of ``benchmarks/gpu.py``.

Ids are numbered from 0; id k is the hash of k, so ids are distinct and spread over the 64-bit space. Rows and frequent
ids are drawn by number, and numbers are scattered so that frequent ones are not adjacent in memory.

Letters: N positions (ids of a call), R rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks import harness
from recis_hybrid import ops
from recis_hybrid.accelerator import accelerator

EXPONENT = 1.05
_ODD = 0x9E3779B1


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases; see :data:`FULL`."""

    rows: int
    """Rows of a table, a power of two; fewer if memory is short."""
    host_rows: int
    """Rows of a table in pinned host memory, a power of two; fewer if memory is short."""
    ids: int
    """Ids of a call, N."""
    distinct: int
    """Distinct ids of a training step."""
    batches: int
    """Batches that are used in turn, so that none is in the L2 cache."""
    calls: int
    """Calls per timed measurement, so that waiting for the device at its end counts little."""
    rounds: int
    """Timed measurements, after three to warm up."""
    copied: int
    """Bytes of a copy that measures bandwidth."""
    features_each: int
    """Features of each of the four kinds."""
    features_rows: int
    """Rows of their batch."""
    tower: tuple[int, ...]
    """Widths of the layers of the tower after its input."""
    tower_rows: int
    """Samples of its batch."""
    tower_ids: int
    """Ids of each of its features."""


FULL = Sizes(
    rows=1 << 26,
    host_rows=1 << 24,
    ids=1 << 20,
    distinct=350_000,
    batches=8,
    calls=10,
    rounds=7,
    copied=1 << 30,
    features_each=50,
    features_rows=8192,
    tower=(1024, 512, 256, 1),
    tower_rows=8192,
    tower_ids=100_000,
)
TINY = Sizes(
    rows=1 << 10,
    host_rows=1 << 10,
    ids=64,
    distinct=24,
    batches=2,
    calls=1,
    rounds=1,
    copied=1 << 12,
    features_each=2,
    features_rows=16,
    tower=(16, 1),
    tower_rows=8,
    tower_ids=100,
)


@dataclass(frozen=True)
class Measured:
    """The figure of a case."""

    case: str
    value: float | None
    """None if the case cannot run here."""
    detail: str
    """Sizes and absolute figures; or why the case cannot run."""


class Bench:
    """A device with the sizes of a run."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        self.device = torch.device("cpu") if kind == "cpu" else accelerator()
        self.sizes = sizes

    def rates(self, steps: dict[str, Callable[[], object]], calls: int | None = None) -> dict[str, float]:
        """Return the calls per second of each step; steps alternate in bursts of ``calls``, by default ``sizes.calls``.

        The host waits for the device at the end of a burst only.
        """
        sizes = self.sizes
        count = calls or sizes.calls
        bursts = {name: _repeated(step, count) for name, step in steps.items()}
        return harness.rates(bursts, count, sizes.rounds, self.device)

    def copy(self) -> Callable[[], object]:
        """Return a step that copies ``sizes.copied`` bytes on the device."""
        source = torch.rand(self.sizes.copied // 4, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def bandwidth(self, copies: float) -> float:
        """Return the bytes per second that so many copies per second read and write."""
        return 2 * self.sizes.copied * copies

    def rows_that_fit(self, rows: int, row_bytes: int, *, pinned: bool = False) -> int:
        """Return ``rows``, halved until they take at most 85 % of the free memory of the GPU, or 60 % of the host's."""
        if self.device.type == "cuda" and not pinned:
            free = 0.85 * torch.cuda.mem_get_info(self.device)[0]
        else:
            free = 0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        while rows * row_bytes > free and rows > 1:
            rows //= 2
        return rows

    def ids(self, numbers: Tensor) -> Tensor:
        """Return the ids of numbers (int64 ``[N]``), on the device."""
        return ops.hash.hash_ids(numbers.to(self.device), "murmur")

    def id_chunks(self, first: int, end: int) -> Iterator[Tensor]:
        """Yield the ids of the numbers from ``first`` to ``end`` - 1, in pieces."""
        step = max(self.sizes.ids, 1)
        for begin in range(first, end, step):
            yield self.ids(torch.arange(begin, min(begin + step, end), device=self.device))

    def drawn(self, distribution: str, count: int) -> list[Tensor]:
        """Return the numbers of ``sizes.batches`` batches, int64 ``[N]``, below ``count``, a power of two."""
        generator = torch.Generator().manual_seed(0)
        draw = {"uniform": uniform, "zipf": zipf}[distribution]
        batches = (draw(count, self.sizes.ids, generator, self.device) for _ in range(self.sizes.batches))
        return [scattered(numbers, count) for numbers in batches]


def uniform(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw ``size`` numbers below ``count``, all equally likely; the generator is of the CPU."""
    return torch.randint(count, (size,), generator=generator).to(device)


def zipf(count: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw ``size`` numbers below ``count``; number k has the weight ``(k + 1) ** -EXPONENT``."""
    cumulated = _cumulated(count, device)
    shares = torch.rand(size, dtype=torch.float64, generator=generator).to(device)
    return torch.searchsorted(cumulated, shares * cumulated[-1])


def scattered(numbers: Tensor, count: int) -> Tensor:
    """Permute the numbers below ``count``, a power of two."""
    return numbers * _ODD & count - 1


@cache
def _cumulated(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64, device=device).pow_(-EXPONENT).cumsum_(0)


def _repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run
