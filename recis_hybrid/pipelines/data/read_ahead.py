"""ReadAhead: reads the batches of later steps in advance."""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.data.resumable_source import Reader
from recis_hybrid.pipelines.interruption import Interruption, WaitInterrupted
from recis_hybrid.pipelines.lockstep import Announcement, announce
from recis_hybrid.pipelines.progress import Progress
from recis_hybrid.pipelines.stages import Train
from recis_hybrid.pipelines.steps.step import Prefetching, Step
from recis_hybrid.ragged import Batch


@dataclass(frozen=True)
class _Group:
    """The batches of one step and the progress of the stage after it."""

    batches: list[Batch]
    rows: list[list[int]]
    """For each batch, its number of rows on each rank; empty on one process."""
    stage_passes: int
    pass_batches: int
    position: dict[str, Any] | None
    """Position of the reader; None if nothing is read ahead and waits cannot be interrupted."""


class ReadAhead:
    """Reads the batches of a stage a number of steps ahead, but not beyond the stage's bound.

    A checkpoint stores the position after the last batches taken. Several ranks agree on each step. The batches of the
    following step are read and announced early, so that the announcements of the other ranks have arrived by the time
    they are needed.

    Args:
        stage: The stage.
        reader: Source of the batches.
        progress: Progress of the training; updated as batches are taken.
        accumulate: Number of batches per step.
        depth: Number of steps to read ahead.
        interruption: Interrupts waits for batches.
    """

    def __init__(
        self, stage: Train, reader: Reader, progress: Progress, accumulate: int, depth: int, interruption: Interruption
    ) -> None:
        self._stage, self._reader, self._progress = stage, reader, progress
        self._accumulate = accumulate
        self.depth = depth
        """Number of steps to read ahead."""
        self.rows: list[list[int]] = []
        """For each batch of the last step taken, its number of rows on each rank; empty on one process."""
        self._interruption = interruption
        self._together = distributed.world_size() > 1
        self._last = replace(progress)
        """Progress after all batches read so far."""
        self._groups: deque[_Group] = deque()
        self._announcement: tuple[list[Batch], Announcement, dict[str, Any]] | None = None
        self._failure: Exception | None = None
        self._agreed_rows: list[list[int]] = []
        self._read_position: dict[str, Any] | None = None
        self._tracks_position = self._together or depth > 0 or reader.has_cheap_position
        if self._tracks_position:
            reader.set_checkpoint(reader.state_dict())

    def __len__(self) -> int:
        """Return the number of steps whose batches are read but not taken."""
        return len(self._groups)

    def wants_more(self) -> bool:
        """Return whether to read the batches of another step."""
        return len(self._groups) <= self.depth and not self._last.reached(self._stage)

    def read(self) -> list[Batch]:
        """Return the batches of a step, the same number on all ranks: fewer at the end of a pass, none after it.

        Raises:
            ExchangeError: Another rank failed or died.
            RanksInterrupted: A rank received a signal to terminate.
            ValueError: A pass has no batch, or a rank has none at all.
            WaitInterrupted: This process, the only one, received a signal to terminate.
        """
        if self._together:
            return self._read_together()
        with self._interruption.waiting() if self._tracks_position else nullcontext():
            batches, ended = self._read_own()
        self._count(len(batches), ended)
        if self._tracks_position:
            self._read_position = self._reader.position()
        return batches

    def _read_own(self) -> tuple[list[Batch], bool]:
        """Return this rank's batches of a step and whether its pass has ended."""
        batches: list[Batch] = []
        while len(batches) < self._accumulate:
            batch = self._reader.next()
            if batch is None:
                return batches, True
            batches.append(batch)
        return batches, False

    def _count(self, batches: int, ended: bool) -> None:
        last = self._last
        last.pass_batches += batches
        if ended:
            # If this stage took no batch, an earlier stage has read the pass.
            last.stage_passes += last.pass_batches > 0
            last.pass_batches = 0
        last.stage_steps += batches > 0

    def _read_together(self) -> list[Batch]:
        if self._announcement is None:
            self._announce()
        assert self._announcement is not None
        (batches, announcement, self._read_position), self._announcement = self._announcement, None
        # A failure is raised only now, because until now all ranks were still training on earlier steps.
        agreement = announcement.wait(self._failure)
        if agreement.alike and distributed.rank() == 0:
            warnings.warn(
                f"Trainer: all {distributed.world_size()} ranks have the same first batch and seem to train on the "
                f"same rows; give each rank its own rows, such as batches[rank::world_size], or use a ColumnDataset",
                RuntimeWarning,
                stacklevel=2,
            )
        for _ in range(len(agreement.rows) - len(batches)):
            assert self._reader.empty is not None
            batches.append(self._reader.empty)
            self._reader.skip()
        if agreement.ended:
            if self._reader.batches == 0:
                raise ValueError(
                    f"the source {type(self._reader.data).__name__} yielded no batch on any rank in pass "
                    f"{self._reader.passes + 1}; use one that yields batches each time it is iterated"
                )
            self._reader.end_pass()
        if len(agreement.rows) > announcement.batches or agreement.ended:
            self._read_position = self._reader.position()
        self._count(len(batches), agreement.ended)
        self._agreed_rows = agreement.rows
        if not self._last.reached(self._stage):
            self._announce()
        return batches

    def _announce(self) -> None:
        """Read this rank's batches of another step and announce them to the other ranks."""
        batches: list[Batch] = []
        interrupted = False
        try:
            with self._interruption.waiting():
                batches, _ = self._read_own()
        except WaitInterrupted:
            batches, interrupted = [], True
        except Exception as error:
            batches, self._failure = [], error
        announcement = announce(
            batches,
            self._accumulate,
            ended=self._reader.ended,
            no_columns=self._reader.empty is None,
            failed=self._failure is not None,
            interrupted=interrupted or self._interruption.requested is not None,
            digest=self._reader.digest,
        )
        self._reader.digest = 0
        self._announcement = batches, announcement, self._reader.position()

    def put(self, batches: list[Batch]) -> None:
        """Store the batches read last until :meth:`take` returns them."""
        last = self._last
        self._groups.append(
            _Group(batches, self._agreed_rows, last.stage_passes, last.pass_batches, self._read_position)
        )

    def take(self) -> list[Batch]:
        """Return the batches of the next step and update the progress."""
        group = self._groups.popleft()
        self._progress.stage_passes, self._progress.pass_batches = group.stage_passes, group.pass_batches
        if group.position is not None:
            self._reader.set_checkpoint(group.position)
        self.rows = group.rows
        return group.batches


def steps_ahead(step: Step, requested: int | None, accumulate: int) -> int:
    """Return the number of steps to read ahead.

    Args:
        step: The step, whose engines may send ids ahead.
        requested: Number of steps; None: as many as the step's engines can send.
        accumulate: Number of batches per step.

    Raises:
        ValueError: An engine that sends ids ahead cannot send that many batches.
    """
    depths = [engine.prefetch_depth for engine in step.engines] if isinstance(step, Prefetching) else []
    if requested is None:
        return max(min(depths, default=0) // accumulate - 1, 0)
    needed = (requested + 1) * accumulate
    if requested > 0 and any(0 < depth < needed for depth in depths):
        raise ValueError(
            f"Trainer: prefetch={requested} with accumulate={accumulate} sends {needed} batches ahead, but an engine "
            f"sends at most {min(depth for depth in depths if depth)}; build it with prefetch_depth={needed}"
        )
    return requested
