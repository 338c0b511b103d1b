"""Which rows come when: arithmetic on row numbers, which knows nothing of files.

The rows of an epoch have one order, a function of (seed, epoch) alone. Batches are consecutive rows of it, and ranks
take them in turn, so that the order is the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def permutation(count: int, seed: int, *path: int) -> npt.NDArray[np.int64]:
    """Returns a random order of `count` things that only the arguments decide.

    It sorts raw 64-bit words of PCG64, which numpy keeps the same in all versions; what its samplers make of such words
    may change with a version.

    Args:
        count: How many things.
        seed: Not negative.
        path: Further numbers, none negative, each sequence of which gives an order independent of the others.

    Returns:
        [count] int64, each of 0 to count - 1 once.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path)).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Batches:
    """The batches that one rank takes of the rows `start` to `rows` of an epoch, as ranges of row numbers."""

    rows: int
    """Rows of the epoch, on all ranks together."""
    batch_size: int
    """Rows of a batch on one rank."""
    start: int = 0
    """The first row that no rank has taken."""
    rank: int = 0
    """This rank."""
    world_size: int = 1
    """How many ranks take turns."""
    drop_remainder: bool = False
    """Whether to leave out the short last batch and the turn in which not every rank gets one."""

    def __len__(self) -> int:
        left = self.rows - self.start
        if self.drop_remainder:
            return left // (self.batch_size * self.world_size)
        batches = -(-left // self.batch_size)
        return -(-max(batches - self.rank, 0) // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for turn in range(len(self)):
            first = self.start + (turn * self.world_size + self.rank) * self.batch_size
            yield first, min(first + self.batch_size, self.rows)

    def after(self, turns: int) -> int:
        """Returns the first row that no rank has taken once each has had that many turns."""
        return min(self.start + turns * self.world_size * self.batch_size, self.rows)

    def wants(self, first: int, stop: int) -> bool:
        """Returns whether a batch of this rank holds one of the rows `first` to `stop` - 1."""
        if stop <= self.start:
            return False
        low = max(first - self.start, 0) // self.batch_size
        high = (stop - 1 - self.start) // self.batch_size
        turn = -(-(low - self.rank) // self.world_size) if low > self.rank else 0
        return turn < len(self) and turn * self.world_size + self.rank <= high
