"""Reader: a source of batches whose place can be saved, whatever kind of iterable it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from recis_hybrid.pipelines.turns import digest_of, without_rows
from recis_hybrid.ragged import Batch


class Reader:
    """Reads a source pass after pass, and knows where it is.

    A source with ``state_dict`` and ``load_state_dict`` (a ColumnDataset, or a DataLoader over one) is set to its
    place; of any other the batches before that place are read and dropped.

    Args:
        data: Gives the batches of one pass each time it is iterated.
        together: Whether several ranks read, whose passes end together: :meth:`next` then gives None until
            :meth:`end_pass` is called.
    """

    def __init__(self, data: Iterable[Batch], *, together: bool = False) -> None:
        self.data = data
        self.empty: Batch | None = None
        """With several ranks, an empty batch with the first one's columns; None before it."""
        self.digest = 0
        """Where several ranks read, of the first batch, until it is taken."""
        self._together, self._ended = together, False
        self.passes = 0
        """Passes that have come to their end."""
        self.batches = 0
        """Batches of the pass under way."""
        self._iterator: Iterator[Batch] | None = None
        self._begun_at = 0
        self._held: dict[str, Any] | None = None
        loader = isinstance(data, DataLoader)
        self._source: Any = data.dataset if isinstance(data, DataLoader) else data
        # Workers read with copies: the place in the process's own source is what is said here, not what they do.
        self._in_workers = loader and data.num_workers > 0  # type: ignore[attr-defined]
        self._stateful = hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def next(self) -> Batch | None:
        """Return the next batch; None once at the end of each pass.

        Raises:
            ValueError: The pass had no batch.
        """
        if self._ended:
            return None
        if self._iterator is None:
            self._iterator = self._begin()
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
                    f"the source {type(self.data).__name__} gave no batch in pass {self.passes + 1}; give one that has "
                    f"batches each time that it is iterated"
                )
            self.end_pass()
            return None
        self.batches += 1
        return batch

    def skip(self) -> None:
        """Count a batch of other ranks after this rank's last one."""
        self.batches += 1

    @property
    def ended(self) -> bool:
        """Whether this rank has read its whole pass while others continue."""
        return self._ended

    def _keep_columns(self, batch: Batch) -> None:
        if self.empty is None:
            self.empty, self.digest = without_rows(batch), digest_of(batch)

    def _begin(self) -> Iterator[Batch]:
        # A DataLoader draws a seed as it begins: from a fork of the generator, or a pass that is begun in its middle by
        # a resumed run would leave the generator elsewhere.
        with torch.random.fork_rng(devices=[]):
            iterator = iter(self.data)
        self._begun_at = self.batches
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
    def can_be_left(self) -> bool:
        """Whether the reading position is cheap enough to allow interrupting any wait for a batch."""
        return not self._stateful or type(self._source).__module__.startswith("recis_hybrid.")

    def hold(self, state: dict[str, Any]) -> None:
        """Has :meth:`state_dict` give a place that was read past, since what comes after it was not used yet."""
        self._held = state

    def state_dict(self, *, read: bool = False) -> dict[str, Any]:
        """Return the place: the one that is held, unless asked for what was read."""
        if self._held is not None and not read:
            return self._held
        place = None
        if self._stateful and self._in_workers and self._iterator is not None:
            place = self._source.state_dict(self.batches - self._begun_at)
        elif self._stateful:
            place = self._source.state_dict()
        return {"passes": self.passes, "batches": self.batches, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make :meth:`next` give what was next when the state was taken."""
        self.close()
        self._held, self._ended = None, False
        self.passes, self.batches = state["passes"], state["batches"]
        if state["place"] is not None:
            self._source.load_state_dict(state["place"])

    def close(self) -> None:
        """Leaves the pass under way."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = None


def is_endless(data: Iterable[Batch]) -> bool:
    """Whether a pass over a source is known never to end."""
    return bool(getattr(data, "endless", False)) or isinstance(data, itertools.cycle | itertools.repeat)
