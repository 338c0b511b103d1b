"""ReadAhead: the batches of steps that come later, read while a step is worked on."""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.data.resumable_source import Reader
from recis_hybrid.pipelines.interruption import Interruption, WaitInterrupted
from recis_hybrid.pipelines.progress import Place
from recis_hybrid.pipelines.stages import Train
from recis_hybrid.pipelines.steps.step import Prefetching, Step
from recis_hybrid.pipelines.turns import Announcement, announce
from recis_hybrid.ragged import Batch


@dataclass(frozen=True)
class _Group:
    """The batches of one step, and where the stage is once they are trained on."""

    batches: list[Batch]
    rows: list[list[int]]
    """For each batch, its rows on each rank; none on one process."""
    stage_passes: int
    pass_batches: int
    place: dict[str, Any] | None
    """Reading position of the reader; None if nothing is read ahead and waits cannot be interrupted."""


class ReadAhead:
    """Reads the batches of a stage, a number of steps ahead, and never beyond its bound.

    What a checkpoint has of the reader is its place after the last batches that were taken. Several ranks agree on each
    step: the batches of the step after those that were read are read, too, and announced, so that the answers of the
    other ranks are there when they are wanted.

    Args:
        stage: The bound.
        reader: Where batches come from.
        place: Where the stage is; is moved on as batches are taken.
        accumulate: Batches of a step.
        depth: Steps.
        interruption: Ends waits for batches.
    """

    def __init__(
        self, stage: Train, reader: Reader, place: Place, accumulate: int, depth: int, interruption: Interruption
    ) -> None:
        self._stage, self._reader, self._place = stage, reader, place
        self._accumulate = accumulate
        self.depth = depth
        """Steps."""
        self.rows: list[list[int]] = []
        """For each batch that was taken last, its rows on each rank; none on one process."""
        self._interruption = interruption
        self._together = distributed.world_size() > 1
        self._last = replace(place)
        """As the place will be when all that was read is trained on."""
        self._groups: deque[_Group] = deque()
        self._announced: tuple[list[Batch], Announcement, dict[str, Any]] | None = None
        self._failure: Exception | None = None
        self._agreed_rows: list[list[int]] = []
        self._read_place: dict[str, Any] | None = None
        self._holds = self._together or depth > 0 or reader.can_be_left
        if self._holds:
            reader.hold(reader.state_dict())

    def __len__(self) -> int:
        """Step whose batches were read and not taken."""
        return len(self._groups)

    def wants_more(self) -> bool:
        """Whether to read the batches of one more step."""
        return len(self._groups) <= self.depth and not self._last.reached(self._stage)

    def read(self) -> list[Batch]:
        """Return the batches of a step, equally many on all ranks; fewer where a pass ends, none where it had already.

        Raises:
            ExchangeError: Another rank has failed or died.
            RanksInterrupted: A signal has asked some rank to end.
            ValueError: There is no batch in a pass, or a rank has none at all.
            WaitInterrupted: A signal has asked this process to end, and it is alone.
        """
        if self._together:
            return self._read_together()
        with self._interruption.waiting() if self._holds else nullcontext():
            batches, ended = self._read_own()
        self._count(len(batches), ended)
        if self._holds:
            self._read_place = self._reader.state_dict(read=True)
        return batches

    def _read_own(self) -> tuple[list[Batch], bool]:
        """Return this rank's batches of a step, and whether its pass has ended."""
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
            # A pass of which this stage has had nothing was an earlier one's.
            last.stage_passes += last.pass_batches > 0
            last.pass_batches = 0
        last.stage_steps += batches > 0

    def _read_together(self) -> list[Batch]:
        if self._announced is None:
            self._announce()
        assert self._announced is not None
        (batches, announcement, self._read_place), self._announced = self._announced, None
        # Raised when its turn comes: the other ranks are at the steps before it until then, and so is this one.
        agreed = announcement.agreed(self._failure)
        if agreed.alike and distributed.rank() == 0:
            warnings.warn(
                f"Trainer: all {distributed.world_size()} ranks have the same first batch, so that each row "
                f"seems to be trained on by every rank; give each rank its own, as batches[rank::world_size], or a "
                f"ColumnDataset",
                RuntimeWarning,
                stacklevel=2,
            )
        for _ in range(len(agreed.rows) - len(batches)):
            assert self._reader.empty is not None
            batches.append(self._reader.empty)
            self._reader.skip()
        if agreed.ended:
            if self._reader.batches == 0:
                raise ValueError(
                    f"the source {type(self._reader.data).__name__} gave no rank a batch in pass "
                    f"{self._reader.passes + 1}; give one that has batches each time that it is iterated"
                )
            self._reader.end_pass()
        if len(agreed.rows) > announcement.batches or agreed.ended:
            self._read_place = self._reader.state_dict(read=True)
        self._count(len(batches), agreed.ended)
        self._agreed_rows = agreed.rows
        if not self._last.reached(self._stage):
            self._announce()
        return batches

    def _announce(self) -> None:
        """Read this rank's batches of one more step, and tells the other ranks."""
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
            bare=self._reader.empty is None,
            failed=self._failure is not None,
            interrupted=interrupted or self._interruption.requested is not None,
            digest=self._reader.digest,
        )
        self._reader.digest = 0
        self._announced = batches, announcement, self._reader.state_dict(read=True)

    def put(self, batches: list[Batch]) -> None:
        """Keep what was read, until its turn comes."""
        last = self._last
        self._groups.append(_Group(batches, self._agreed_rows, last.stage_passes, last.pass_batches, self._read_place))

    def take(self) -> list[Batch]:
        """Return the batches whose turn it is, and move the place on."""
        group = self._groups.popleft()
        self._place.stage_passes, self._place.pass_batches = group.stage_passes, group.pass_batches
        if group.place is not None:
            self._reader.hold(group.place)
        self.rows = group.rows
        return group.batches


def steps_ahead(step: Step, wanted: int | None, accumulate: int) -> int:
    """Return how many steps ahead batches are read.

    Args:
        step: Sends ids ahead, if it can.
        wanted: As many; None: as many as its engines can send.
        accumulate: Batches of a step.

    Raises:
        ValueError: If engines that send ids ahead cannot send so many batches.
    """
    depths = [engine.prefetch_depth for engine in step.engines] if isinstance(step, Prefetching) else []
    if wanted is None:
        return max(min(depths, default=0) // accumulate - 1, 0)
    needed = (wanted + 1) * accumulate
    if wanted > 0 and any(0 < depth < needed for depth in depths):
        raise ValueError(
            f"Trainer: prefetch={wanted} with accumulate={accumulate} has {needed} batches on their way, and an engine "
            f"sends at most {min(depth for depth in depths if depth)} ahead; build it with prefetch_depth={needed}"
        )
    return wanted
