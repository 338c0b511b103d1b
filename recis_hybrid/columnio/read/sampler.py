"""The rows of each batch: arithmetic on row numbers, without files.

The rows of an epoch have one order, which depends only on (seed, epoch). Batches are consecutive rows in that order,
and ranks take them in turn, so the order is the same for any number of ranks. In a turn, each rank takes one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from recis_hybrid.columnio.options import Uneven


def permutation(count: int, seed: int, *path: int) -> npt.NDArray[np.int64]:
    """Return a random permutation that depends only on the arguments.

    It sorts raw 64-bit words of PCG64, which are the same in all versions of numpy; numpy's own samplers may change.

    Args:
        count: Number of elements.
        seed: Not negative.
        path: Further numbers, not negative; different sequences give independent permutations.

    Returns:
        [count] int64, a permutation of 0 to count - 1.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path)).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Batches:
    """The batches of one rank in the rows ``start`` to ``rows`` of an epoch, as ranges of row numbers."""

    rows: int
    """Rows of the epoch on all ranks together."""
    batch_size: int
    """Rows of a batch on one rank."""
    start: int = 0
    """First row that no rank has taken."""
    rank: int = 0
    """This rank."""
    world_size: int = 1
    """Number of ranks."""
    drop_remainder: bool = False
    """Drop the short last batch, and the last turn unless it fills a batch for every rank."""
    uneven: Uneven = None
    """Handling of a last turn that does not fill a batch for every rank; see ``ShardOptions``."""
    worker: int = 0
    """Number of this process among those that share the turns of the rank."""
    workers: int = 1
    """Number of processes that share the turns."""

    @property
    def turns(self) -> int:
        """Number of batches of the rank."""
        left = max(self.rows - self.start, 0)
        turn = self.batch_size * self.world_size
        if self.drop_remainder:
            return left // turn
        if self.uneven in ("wrap", "pad"):
            return -(-left // turn)
        batches = -(-left // self.batch_size)
        if self.uneven == "drop":
            return batches // self.world_size
        return -(-batches // self.world_size)

    @cached_property
    def _shared(self) -> tuple[int, ...]:
        """Rows of the last turns (at most two) divided evenly, because not every rank would get a full batch."""
        turn = self.batch_size * self.world_size
        full, rest = divmod(max(self.rows - self.start, 0), turn)
        if self.world_size == 1 or self.drop_remainder or self.uneven is not None or rest == 0:
            return ()
        if rest >= self.world_size or full == 0 or self.batch_size == 1:
            return (rest,)
        # Fewer rows than ranks: divide the previous turn as well, so that every rank gets a row in both.
        return (turn + rest + 1) // 2, (turn + rest) // 2

    def __len__(self) -> int:
        return -(-max(self.turns - self.worker, 0) // self.workers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for turn in range(self.worker, self.turns, self.workers):
            yield self._range(turn)

    def _range(self, turn: int) -> tuple[int, int]:
        if turn >= self.turns - len(self._shared):
            low = self.after(turn)
            each, more = divmod(self.after(turn + 1) - low, self.world_size)
            # The first ranks get one extra row.
            first = low + each * self.rank + min(self.rank, more)
            return first, first + each + (self.rank < more)
        first = min(self.start + (turn * self.world_size + self.rank) * self.batch_size, self.rows)
        return first, min(first + self.batch_size, self.rows)

    def after(self, turns: int) -> int:
        """Return the first row that no rank has taken after a number of turns."""
        if len(self._shared) == 2 and turns == self.turns - 1:
            return self.rows - self._shared[1]
        return min(self.start + turns * self.world_size * self.batch_size, self.rows)

    def padding(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of rows that pad a batch.

        The missing rows of a turn are numbered over all ranks, so that ranks get different rows. They start at the
        first row of the epoch, and wrap around if the epoch is too short.

        Args:
            low: First row of the batch.
            high: End of the batch.
        """
        missing = self.batch_size - (high - low)
        if self.uneven not in ("wrap", "pad") or missing <= 0:
            return
        turn = self.batch_size * self.world_size
        of_turn = (self.rows - self.start - 1) // turn * turn + self.start + self.rank * self.batch_size
        row = of_turn + (high - low) - self.rows
        while missing:
            first = row % self.rows
            stop = min(first + missing, self.rows)
            yield first, stop
            missing -= stop - first
            row = stop

    def wants(self, first: int, stop: int) -> bool:
        """Return whether a batch of this rank contains one of the rows ``first`` to ``stop`` - 1."""
        stop = min(stop, self.rows)
        if stop <= max(self.start, first):
            return False
        regular = self.turns - len(self._shared)
        for turn in range(regular, self.turns):
            low, high = self._range(turn)
            if turn % self.workers == self.worker and low < high and first < high and low < stop:
                return True
        low = max(first - self.start, 0) // self.batch_size
        high = (stop - 1 - self.start) // self.batch_size
        # A batch has the number turn * world_size + rank, in every ``workers``-th turn from ``worker`` on.
        mine, step = self.worker * self.world_size + self.rank, self.workers * self.world_size
        number = mine + (-(-(low - mine) // step) * step if low > mine else 0)
        return number <= high and number // self.world_size < regular
