"""ReadAhead: the batches of steps that come later, read while a step is worked on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from recis_hybrid.pipelines.place import Place
from recis_hybrid.pipelines.reader import Reader
from recis_hybrid.pipelines.stages import Train
from recis_hybrid.pipelines.step import Prefetching, Step
from recis_hybrid.ragged import Batch


@dataclass(frozen=True)
class _Group:
    """The batches of one step, and where the stage is once they are trained on."""

    batches: list[Batch]
    stage_passes: int
    pass_batches: int
    place: dict[str, Any] | None
    """Of the reader; None where nothing is read ahead."""


class ReadAhead:
    """Reads the batches of a stage, a number of steps ahead, and never beyond its bound.

    What a checkpoint has of the reader is its place after the last batches that were taken.

    Args:
        stage: The bound.
        reader: Where batches come from.
        place: Where the stage is; is moved on as batches are taken.
        accumulate: Batches of a step.
        depth: Steps.
    """

    def __init__(self, stage: Train, reader: Reader, place: Place, accumulate: int, depth: int) -> None:
        self._stage, self._reader, self._place = stage, reader, place
        self._accumulate = accumulate
        self.depth = depth
        """Steps."""
        self._last = replace(place)
        """As the place will be when all that was read is trained on."""
        self._groups: deque[_Group] = deque()
        if depth > 0:
            reader.hold(reader.state_dict())

    def __len__(self) -> int:
        """Steps whose batches were read and not taken."""
        return len(self._groups)

    def wants_more(self) -> bool:
        """Whether to read the batches of one more step."""
        return len(self._groups) <= self.depth and not self._last.reached(self._stage)

    def read(self) -> list[Batch]:
        """Returns the batches of a step; fewer where a pass ends, none where it had already."""
        batches: list[Batch] = []
        last = self._last
        while len(batches) < self._accumulate:
            batch = self._reader.next()
            if batch is None:
                # A pass of which this stage has had nothing was an earlier one's.
                last.stage_passes += last.pass_batches > 0
                last.pass_batches = 0
                break
            batches.append(batch)
            last.pass_batches += 1
        last.stage_steps += bool(batches)
        return batches

    def put(self, batches: list[Batch]) -> None:
        """Keeps what was read, until its turn comes."""
        place = self._reader.state_dict(read=True) if self.depth > 0 else None
        self._groups.append(_Group(batches, self._last.stage_passes, self._last.pass_batches, place))

    def take(self) -> list[Batch]:
        """Returns the batches whose turn it is, and moves the place on."""
        group = self._groups.popleft()
        self._place.stage_passes, self._place.pass_batches = group.stage_passes, group.pass_batches
        if group.place is not None:
            self._reader.hold(group.place)
        return group.batches


def steps_ahead(step: Step, wanted: int | None, accumulate: int) -> int:
    """Returns how many steps ahead batches are read.

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
