"""Admission by frequency, with exact counts or with a sketch of fixed memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.admission.sketch import LEAST_BYTES, Sketch, false_positive_rate
from recis_hybrid.embedding.gate import Gate, TableShare
from recis_hybrid.embedding.table.id_map import MAX_ROWS, IdCounts
from recis_hybrid.validation import check_integer


@dataclass(frozen=True)
class MinFrequency:
    """Admits an id once it has been looked up ``count`` times in training.

    The lookup in which an id reaches the count inserts it. Until then, the id has its first value or zeros, depending
    on the config's ``unknown``, and its gradients are dropped. Ids that have a row are not counted, and an evicted id
    is counted from zero.

    Exact counts take 21 to 53 bytes for each id that waits for its row, and without ``half_life`` an id that never
    reaches ``count`` waits forever. With ``sketch_bytes``, counts are in a count-min sketch of that size. Its counts
    are never too low, so that no id waits longer than with exact counts; some are too high, so that a share of the ids
    gets its row too early (:meth:`false_positives`). The sketch keeps what it counted for ids that have got a row, so
    an evicted id returns sooner; it needs a ``half_life``, because it fills up otherwise.

    ``memory()["admission"]`` reports the bytes of the counts, and ``table.store.gate.clear(None)`` drops those of a
    table: its ids are then counted from zero.

    Example:
        >>> config = EmbeddingConfig(dim=2, admission=MinFrequency(3), unknown="zeros")
        >>> config = EmbeddingConfig(dim=2, admission=MinFrequency(3, sketch_bytes=1 << 24, half_life=10_000))

    References:
        Cormode, Muthukrishnan: An improved data stream summary: the count-min sketch and its applications. Journal of
        Algorithms 55, 2005. Putze, Sanders, Singler: Cache-, hash- and space-efficient Bloom filters. WEA 2007.
    """

    count: int
    """Number of lookups, at least 1; an id that occurs twice in a batch counts twice."""
    half_life: int | None = None
    """All counts are halved, rounding down, whenever the table's number of optimizer steps reaches a multiple of this
    number. Exact counts that become 0 free their memory. None: never."""
    sketch_bytes: int | None = None
    """Bytes of the sketch of each member table, over all ranks: a power of two, at least 64 KiB. None: exact counts. A
    sketch below 4 MiB takes up to 4.5 MiB in a checkpoint, and with numbers of ranks that are no powers of two, it
    admits slightly fewer ids too early than on one rank."""

    def __post_init__(self) -> None:
        check_integer("MinFrequency", "count", self.count, low=1)
        if self.count >= MAX_ROWS:
            raise ValueError(f"MinFrequency: count must be below 2**40, got {self.count}")
        if self.half_life is not None:
            check_integer("MinFrequency", "half_life", self.half_life, low=1)
        if (size := self.sketch_bytes) is None:
            return
        check_integer("MinFrequency", "sketch_bytes", size, low=LEAST_BYTES)
        if size & (size - 1) or size > 1 << 45:
            raise ValueError(f"MinFrequency: sketch_bytes must be a power of two, at most 2**45, got {size}")
        if self.count >= 1 << max(ops.id_map.CELL_BITS):
            raise ValueError(
                f"MinFrequency: a sketch counts up to {(1 << max(ops.id_map.CELL_BITS)) - 1}, got count={self.count}; "
                f"omit sketch_bytes for exact counts"
            )

    @property
    def cell_bits(self) -> int:
        """Bits of a cell of the sketch: the fewest that can hold ``count``."""
        return next(bits for bits in ops.id_map.CELL_BITS if self.count < 1 << bits)

    def false_positives(self, ids: int) -> float:
        """Return the probability that the sketch admits an id at its first occurrence, though it has to wait.

        Args:
            ids: Number of other distinct ids of the member table that were counted, once each, since the counts were
                last halved to zero; an id that was counted several times weighs at most as much as several ids.

        Returns:
            With K blocks of 4 rows of w cells, and thus ``ids / K`` ids in a block on average: the expectation over a
            Poisson number j of ids in the block of ``P(Binomial(j, 1 / w) >= count - 1) ** 4``.

        Example:
            >>> f"{MinFrequency(2, sketch_bytes=1 << 24).false_positives(4_000_000):.4f}"
            '0.0027'
        """
        if self.sketch_bytes is None or self.count == 1:
            return 0.0
        return false_positive_rate(self.sketch_bytes, self.cell_bits, self.count, ids)

    def gate(self, share: TableShare) -> Gate:
        """Return a gate without counts."""
        if self.sketch_bytes is None:
            return FrequencyGate(self.count, share.device, self.half_life)
        return SketchGate(self.count, Sketch(self.sketch_bytes, self.cell_bits, share), self.half_life)


class _Ageing:
    """Counts how often counts must be halved."""

    def __init__(self, half_life: int | None) -> None:
        self._half_life = half_life
        self._halvings: int | None = None

    def halvings(self, step: int) -> int:
        """Return how often to halve the counts at a step; 0 in the first call."""
        if self._half_life is None:
            return 0
        before, self._halvings = self._halvings, step // self._half_life
        return 0 if before is None else max(self._halvings - before, 0)


class FrequencyGate:
    """Exact counts of the ids that have no row; a count is dropped when its id gets a row."""

    def __init__(self, count: int, device: torch.device, half_life: int | None = None) -> None:
        self._least = count
        self._counts = IdCounts(device)
        self._ageing = _Ageing(half_life)
        self._admitted_slots: Tensor | None = None
        """Slots of the counts of the last admitted ids, which have no row yet; negative: none."""

    @property
    def nbytes(self) -> int:
        """Bytes of the counts."""
        return self._counts.nbytes

    def age(self, step: int) -> None:
        """Halve the counts if that is due."""
        if halvings := self._ageing.halvings(step):
            self._counts.halve(halvings)

    def admitted(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count the ids that have no row, and admit those that reach the count."""
        exact = self._counts
        exact.count(ids, members, rows, used, counts)
        admitted = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)
        ops.id_map.admit(exact.slots.header, ids, members, rows, self._least, admitted, used=used)
        # Inserting the admitted ids may fail, so keep their counts until they have rows.
        self._admitted_slots = torch.where((admitted == 1) & (rows < 0), exact.slots_of(ids, members), -1)
        return admitted

    def confirm(self) -> None:
        """Drop the counts of the ids that were admitted last."""
        if self._admitted_slots is not None:
            self._counts.erase_slots(self._admitted_slots)
            self._admitted_slots = None

    def forget(self, member: int, ids: Tensor) -> None:
        """Drop the counts of ids."""
        if ids.numel() > 0:
            self._counts.erase_slots(self._counts.slots_of([ids], [member]))

    def clear(self, member: int | None) -> None:
        """Drop the counts of a member table, or of all member tables."""
        if member is None:
            self._counts = IdCounts(self._counts.device)
            return
        entries = self._counts.entries()
        self._counts.erase_slots(entries.slots[entries.members == member])

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of :meth:`state_dict` without rows."""
        none = torch.empty(0, dtype=torch.int64, device=self._counts.device)
        return {"ids": none, "count": none}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return columns ``ids`` (ascending) and ``count``."""
        entries = self._counts.entries()
        mine = entries.members == member
        ids, order = entries.ids[mine].sort()
        return {"ids": ids, "count": entries.rows[mine][order]}

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Load counts of ids that have none."""
        device = self._counts.device
        self._counts.set(state["ids"].to(device).contiguous(), member, state["count"].to(device).contiguous())


class SketchGate:
    """Approximate counts of ids in a sketch."""

    def __init__(self, count: int, sketch: Sketch, half_life: int | None) -> None:
        self._least, self._sketch = count, sketch
        self._ageing = _Ageing(half_life)

    @property
    def nbytes(self) -> int:
        """Bytes of the sketch on this rank."""
        return self._sketch.nbytes

    def age(self, step: int) -> None:
        """Halve the counts if that is due."""
        if halvings := self._ageing.halvings(step):
            self._sketch.halve(halvings)

    def admitted(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count the ids that have no row, and admit those that may have reached the count."""
        return self._sketch.admit(ids, members, rows, used, counts, self._least)

    def confirm(self) -> None:
        """Do nothing: lowering the cells of an id that was admitted too early would make other counts too low."""

    def forget(self, member: int, ids: Tensor) -> None:
        """Do nothing; see :meth:`confirm`."""

    def clear(self, member: int | None) -> None:
        """Drop the counts of a member table, or of all member tables."""
        self._sketch.clear(member)

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of :meth:`state_dict` without rows."""
        return self._sketch.columns()

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return the blocks of a member table that are not empty; see :meth:`Sketch.state_dict`."""
        return self._sketch.state_dict(member)

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Load blocks, of a sketch of any size."""
        self._sketch.load_state_dict(member, state)
