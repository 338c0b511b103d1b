"""Reader: makes any iterable of batches resumable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from recis_hybrid.pipelines.lockstep import digest_of, without_rows
from recis_hybrid.ragged import Batch


class Reader:
    """Reads a source pass after pass, with a position that can be saved.

    A source with ``state_dict`` and ``load_state_dict`` (a ColumnDataset, or a DataLoader over one) is restored to its
    position. From any other source, the batches before that position are read and discarded.

    Args:
        data: Yields the batches of one pass each time it is iterated.
        together: Whether several ranks read and end their passes together. At the end of its data, :meth:`next` then
            returns None until :meth:`end_pass` is called.
    """

    def __init__(self, data: Iterable[Batch], *, together: bool = False) -> None:
        self.data = data
        self.empty: Batch | None = None
        """With several ranks, an empty batch with the columns of the first batch; None before the first batch."""
        self.digest = 0
        """With several ranks, the digest of the first batch until it is announced."""
        self._together, self._ended = together, False
        self.passes = 0
        """Completed passes."""
        self.batches = 0
        """Batches read from the current pass."""
        self._iterator: Iterator[Batch] | None = None
        self._start = 0
        self._checkpoint: dict[str, Any] | None = None
        loader = isinstance(data, DataLoader)
        self._source: Any = data.dataset if isinstance(data, DataLoader) else data
        # Workers read copies of the source, so the source itself does not know the position.
        self._in_workers = loader and data.num_workers > 0  # type: ignore[attr-defined]
        self._stateful = hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def __repr__(self) -> str:
        return f"Reader({type(self.data).__name__}, passes={self.passes}, batches={self.batches})"

    def next(self) -> Batch | None:
        """Return the next batch, or None once at the end of each pass.

        Raises:
            ValueError: The pass has no batch.
        """
        if self._ended:
            return None
        if self._iterator is None:
            self._iterator = self._start_pass()
        batch = next(self._iterator, None)
        if self._together:
            self._ended = batch is None
            if batch is None:
                self._iterator = None
                return None
            self._keep_columns(batch)
        elif batch is None:
            if self.batches == 0:
                raise ValueError(
                    f"the source {type(self.data).__name__} yielded no batch in pass {self.passes + 1}; use one that "
                    f"yields batches each time it is iterated"
                )
            self.end_pass()
            return None
        self.batches += 1
        return batch

    def skip(self) -> None:
        """Count a batch that only other ranks have."""
        self.batches += 1

    @property
    def ended(self) -> bool:
        """True if this rank has read its whole pass while others continue."""
        return self._ended

    def _keep_columns(self, batch: Batch) -> None:
        if self.empty is None:
            self.empty, self.digest = without_rows(batch), digest_of(batch)

    def _start_pass(self) -> Iterator[Batch]:
        # A DataLoader draws a seed when it starts. Without the fork, a restarted run, which starts in the middle of a
        # pass, would leave the generator in a different state.
        with torch.random.fork_rng(devices=[]):
            iterator = iter(self.data)
        self._start = self.batches
        if not self._stateful:
            for batch in itertools.islice(iterator, self.batches):
                if self._together:
                    self._keep_columns(batch)
        return iterator

    def end_pass(self) -> None:
        """Start the next pass."""
        self._iterator, self._ended = None, False
        self.passes, self.batches = self.passes + 1, 0
        if self._in_workers and hasattr(self._source, "set_epoch"):
            self._source.set_epoch(self._source.epoch + 1)

    @property
    def has_cheap_position(self) -> bool:
        """True if the position can be taken at every step, which allows interrupting any wait."""
        return not self._stateful or type(self._source).__module__.startswith("recis_hybrid.")

    def set_checkpoint(self, state: dict[str, Any]) -> None:
        """Set the position that :meth:`state_dict` returns if later batches were read but not used yet."""
        self._checkpoint = state

    def state_dict(self) -> dict[str, Any]:
        """Return the position for a checkpoint: that of :meth:`set_checkpoint`, or the current one."""
        return self.position() if self._checkpoint is None else self._checkpoint

    def position(self) -> dict[str, Any]:
        """Return the current position, after the last batch read."""
        place = None
        if self._stateful and self._in_workers and self._iterator is not None:
            place = self._source.state_dict(self.batches - self._start)
        elif self._stateful:
            place = self._source.state_dict()
        return {"passes": self.passes, "batches": self.batches, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""
        self.close()
        self._checkpoint, self._ended = None, False
        self.passes, self.batches = state["passes"], state["batches"]
        if state["place"] is not None:
            self._source.load_state_dict(state["place"])

    def close(self) -> None:
        """Close the iterator of the current pass."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = None


def is_endless(data: Iterable[Batch]) -> bool:
    """Return whether a pass over a source is known to be infinite."""
    return bool(getattr(data, "endless", False)) or isinstance(data, itertools.cycle | itertools.repeat)
