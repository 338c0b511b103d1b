"""Place: how far a training is, as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from recis_hybrid.pipelines.stages import Stage, Train


@dataclass
class Place:
    """How far a training is."""

    steps: int = 0
    """Training steps done."""
    samples: int = 0
    """Rows trained on, by this rank."""
    stages: int = 0
    """Stages begun."""
    finished: bool = True
    """Whether the last of these has come to its end."""
    window: str | None = None
    """The window that it was of."""
    stage_steps: int = 0
    """Training steps of the stage."""
    stage_passes: int = 0
    """Passes that have ended in the stage."""
    pass_batches: int = 0
    """Batches that the stage has had of the pass under way."""
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By number of the stage, what evaluations gave; not kept where stages come by window."""

    def state_dict(self) -> dict[str, Any]:
        """Return it as JSON could hold it."""
        return asdict(self)

    def begin(self, window: str | None) -> None:
        """Goes on to the next stage."""
        self.stages, self.finished, self.window = self.stages + 1, False, window
        self.stage_steps = self.stage_passes = self.pass_batches = 0

    def remaining(self, stages: Iterable[Stage], figures: dict[str, dict[str, float]]) -> Iterator[Stage]:
        """Yield the stages that are still to run, and begins each, the one under way excepted.

        A stream that was set to its place itself gives the last stage begun again, first of its window. Any other is
        gone through from its beginning, with ``figures`` as they were then.
        """
        under_way, stream = self.stages > 0, iter(stages)
        if under_way and not hasattr(stages, "load_state_dict"):
            for number, _ in enumerate(islice(stream, self.stages - 1), 1):
                figures.update(self.figures.get(str(number), {}))
        for stage in stream:
            window: str | None = getattr(stages, "window", None)
            if under_way and window == self.window:
                under_way = False
                figures.update(self.figures.get(str(self.stages), {}))
                if self.finished:
                    continue
            else:
                self.begin(window)
            yield stage
            self.finished = True
        if under_way:  # more stages were done than there are now
            for done in sorted(self.figures, key=int):
                figures.update(self.figures[done])

    def reached(self, stage: Train) -> bool:
        """Whether the stage under way has come to its bound."""
        if stage.max_steps is not None and self.stage_steps >= stage.max_steps:
            return True
        # One pass where nothing is said.
        epochs = stage.epochs or (None if stage.max_steps is not None or stage.endless else 1)
        return epochs is not None and self.stage_passes >= epochs

    def left(self, stage: Train, batches: int | None, accumulate: int) -> int:
        """Return how many steps the stage still has; 0 if that cannot be known.

        Args:
            stage: The stage under way.
            batches: How many a pass has; None if that is not known.
            accumulate: Batches of a step.
        """
        bounds = [] if stage.max_steps is None else [stage.max_steps - self.stage_steps]
        if batches is not None and not stage.endless and (stage.max_steps is None or stage.epochs is not None):
            left = batches * ((stage.epochs or 1) - self.stage_passes) - self.pass_batches
            bounds.append(-(-left // accumulate))
        return max(min(bounds, default=0), 0)
