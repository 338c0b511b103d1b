"""PeriodicEviction: eviction within a training stage."""

from __future__ import annotations

from collections.abc import Mapping

from recis_hybrid.embedding import EvictionRule
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Evict, Run
from recis_hybrid.validation import check_flag, check_integer


class PeriodicEviction(Callback):
    """Evicts rows every N steps, always or only if the tables have reached a size.

    The size is that of the tables to which the rule is applied, together, over all ranks. To evict seldom and much at
    once, let the rule keep fewer rows than the size: ``PeriodicEviction(Capacity(rows=800_000), steps=100,
    rows=1_000_000)`` for one table. List it before PeriodicCheckpoint, so that a checkpoint of the same step is written
    after the eviction; a resumed run does not repeat it.

    Args:
        rule: As for :class:`Evict`.
        steps: Steps between two evictions, or between two comparisons of the size, which count the rows.
        rows: Evict only if there are at least so many rows; None: regardless of their number.
        bytes: Evict only if the records, optimizer state included, take at least so many bytes. The IDMap, and memory
            that is free for new rows, do not count: without ``compact``, eviction frees no memory but reuses it.
        compact: Compact the tables afterwards, which frees memory.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        rule: EvictionRule | Mapping[str, EvictionRule],
        *,
        steps: int,
        rows: int | None = None,
        bytes: int | None = None,
        compact: bool = False,
    ) -> None:
        for name, number in (("steps", steps), ("rows", rows), ("bytes", bytes)):
            if number is not None or name == "steps":
                check_integer("PeriodicEviction", name, number, low=1)
        check_flag("PeriodicEviction", "compact", compact)
        self._stage = Evict(rule, compact=compact)
        self._steps, self._rows, self._bytes = steps, rows, bytes

    def after_step(self, trainer: Run) -> None:
        """Evict if an eviction is due."""
        if trainer.steps_done % self._steps == 0 and self._has_size(trainer):
            trainer.evict(self._stage)

    def _has_size(self, trainer: Run) -> bool:
        if self._rows is None and self._bytes is None:
            return True
        rows = bytes_used = 0
        for engine in trainer.engines:
            names = self._stage.tables_of(engine)
            for table, statistics in zip(engine.tables, engine.stats(), strict=True):
                own = sum(member.rows for name, member in statistics.members.items() if name in names)
                rows += own
                bytes_used += own * table.layout.whole.record_bytes
        return (self._rows is None or rows >= self._rows) and (self._bytes is None or bytes_used >= self._bytes)
