"""Which rows come when: arithmetic on row numbers, which knows nothing of files.

The rows of an epoch have one order, a function of (seed, epoch) alone. Batches are consecutive rows of it, and ranks
take them in turn, so that the order is the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from recis_hybrid.columnio.options import Uneven


def permutation(count: int, seed: int, *path: int) -> npt.NDArray[np.int64]:
    """Return a random order of `count` things that only the arguments decide.

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
    uneven: Uneven = None
    """What happens in a last turn that has no full batch for every rank."""
    worker: int = 0
    """Which of the processes that share the turns of this rank."""
    workers: int = 1
    """How many processes share them."""

    @property
    def turns(self) -> int:
        """How many batches the rank gets."""
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
        """Rows of the last turns (at most two), which are split evenly for want of a full batch for every rank."""
        turn = self.batch_size * self.world_size
        full, rest = divmod(max(self.rows - self.start, 0), turn)
        if self.world_size == 1 or self.drop_remainder or self.uneven is not None or rest == 0:
            return ()
        if rest >= self.world_size or full == 0 or self.batch_size == 1:
            return (rest,)
        # Too few rows for every rank to have one: the turn before, shared out with them, leaves none without.
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
            # The first ranks have one row more.
            first = low + each * self.rank + min(self.rank, more)
            return first, first + each + (self.rank < more)
        first = min(self.start + (turn * self.world_size + self.rank) * self.batch_size, self.rows)
        return first, min(first + self.batch_size, self.rows)

    def after(self, turns: int) -> int:
        """Return the first row that no rank has taken once each has had that many turns."""
        if len(self._shared) == 2 and turns == self.turns - 1:
            return self.rows - self._shared[1]
        return min(self.start + turns * self.world_size * self.batch_size, self.rows)

    def filling(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of rows that fill a batch up where batches are to be full: others of the same order.

        In a last turn all missing rows are counted through, so that ranks are filled with rows that differ, from the
        first of the epoch on, and again from there where the epoch has too few.

        Args:
            low: The batch's first row.
            high: The row after its last.
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
        """Return whether a batch of this rank holds one of the rows `first` to `stop` - 1."""
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
        # A batch's number is (turn * world_size + rank), of every `workers`th turn from `worker` on.
        mine, step = self.worker * self.world_size + self.rank, self.workers * self.world_size
        number = mine + (-(-(low - mine) // step) * step if low > mine else 0)
        return number <= high and number // self.world_size < regular
