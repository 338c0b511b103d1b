"""PeriodicEviction: evictions within a training stage, at once or spread over its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recis_hybrid.embedding import EvictionRule, EvictionSweep
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Evict, Run
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_flag, check_integer


class PeriodicEviction(Callback):
    """Evicts rows every N steps, always or only if the tables have reached a size.

    The size is that of the tables to which the rule is applied, together, over all ranks. To evict seldom and much at
    once, let the rule keep fewer rows than the size: ``PeriodicEviction(Capacity(rows=800_000), steps=100,
    rows=1_000_000)`` for one table. An eviction at once comes after the step. List it before PeriodicCheckpoint, so
    that a checkpoint of the same step is written after the eviction; a resumed run does not repeat it.

    With ``rows_per_step``, an eviction is spread over the following steps, so that none has to wait long. It works
    before steps, and a checkpoint contains its state, so a resumed run continues with it.

    Args:
        rule: As for :class:`Evict`.
        steps: Steps between two evictions, or between two comparisons of the size, which count the rows. An eviction
            that has not ended is not begun anew.
        rows: Evict only if there are at least so many rows; None: regardless of their number.
        bytes: Evict only if the records, optimizer state included, take at least so many bytes. The IDMap, and memory
            that is free for new rows, do not count: without ``compact``, eviction frees no memory but reuses it.
        rows_per_step: Rows, of all ranks, to which the rule is applied before each step, a few hundred nanoseconds
            each; a function must decide about each row by itself. ``Capacity`` ranks all rows before the first of these
            steps. None: evict all at once.
        compact: Compact the tables afterwards, which frees memory; with ``rows_per_step``, likewise about so many rows
            of each process before each step.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is below 1.

    Example:
        >>> from recis_hybrid.embedding import Unused
        >>> callback = PeriodicEviction(Unused(steps=100_000), steps=10_000, rows_per_step=50_000)
    """

    def __init__(
        self,
        rule: EvictionRule | Mapping[str, EvictionRule],
        *,
        steps: int,
        rows: int | None = None,
        bytes: int | None = None,
        rows_per_step: int | None = None,
        compact: bool = False,
    ) -> None:
        numbers = {"steps": steps, "rows": rows, "bytes": bytes, "rows_per_step": rows_per_step}
        for name, number in numbers.items():
            if number is not None or name == "steps":
                check_integer("PeriodicEviction", name, number, low=1)
        check_flag("PeriodicEviction", "compact", compact)
        self._stage = Evict(rule, compact=compact)
        self._steps, self._rows, self._bytes, self._rows_per_step = steps, rows, bytes, rows_per_step
        self._sweeps: list[EvictionSweep] = []
        """Evictions in progress, one for each engine."""
        self._compactions: list[Iterator[int]] = []
        self._saved: Sequence[Mapping[str, Any]] = ()

    def before_fit(self, trainer: Run) -> None:
        """Check the names of tables, and continue the evictions of a checkpoint."""
        self._stage.refuse_unknown(trainer.engines)
        self._sweeps, self._compactions = [], []
        if self._rows_per_step is not None and len(self._saved) == len(trainer.engines):
            self._begin(trainer, self._rows_per_step)
            for sweep, state in zip(self._sweeps, self._saved, strict=True):
                sweep.load_state_dict(state)
        self._saved = ()

    def after_step(self, trainer: Run) -> None:
        """Evict all at once if an eviction is due."""
        if self._rows_per_step is None and self._due(trainer):
            trainer.evict(self._stage)

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Begin a spread eviction if one is due, and continue the one in progress.

        Before the step, not after it, so that a checkpoint that another callback saves after a step does not depend on
        the order of the callbacks.
        """
        if self._rows_per_step is None:
            return
        # Compactions end on each rank at a step of its own, so that they must not decide whether an eviction begins.
        if not self._sweeps and trainer.steps_done > 0 and self._due(trainer):
            self._begin(trainer, self._rows_per_step)
        for sweep in self._sweeps:
            trainer.count_evicted(next(sweep, 0))
        if self._sweeps and all(sweep.done == sweep.calls for sweep in self._sweeps):
            self._sweeps = []
            if self._stage.compact:
                self._compactions = [engine.compact(rows_per_call=self._rows_per_step) for engine in trainer.engines]
            return
        self._compactions = [each for each in self._compactions if next(each, None) is not None]

    def _begin(self, trainer: Run, rows_per_step: int) -> None:
        self._sweeps = [
            engine.evict(self._stage.rule_of(engine), rows_per_call=rows_per_step) for engine in trainer.engines
        ]

    def _due(self, trainer: Run) -> bool:
        if trainer.steps_done % self._steps != 0:
            return False
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the evictions in progress. Compactions have none: a loaded table has no gaps."""
        return {"sweeps": [sweep.state_dict() for sweep in self._sweeps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the evictions of :meth:`state_dict` in ``before_fit``."""
        self._saved = list(state.get("sweeps", []))
