"""Progress: the position of a training in its stages, as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from recis_hybrid.pipelines.metrics_record import RunningMeans
from recis_hybrid.pipelines.rng import generator_states, set_generator_states
from recis_hybrid.pipelines.stages import Stage, Train


@dataclass
class Progress:
    """Position of a training."""

    steps: int = 0
    """Training steps done."""
    samples: int = 0
    """Rows trained on, by this rank."""
    stages: int = 0
    """Stages started."""
    finished: bool = True
    """True if the last of these has ended."""
    window: str | None = None
    """Name of that stage's window."""
    stage_steps: int = 0
    """Training steps of the stage."""
    stage_passes: int = 0
    """Passes that have ended in the stage."""
    pass_batches: int = 0
    """Batches that the stage has taken from the current pass."""
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Results of evaluations by number of the stage; empty if stages come by window."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        return asdict(self)

    def start_stage(self, window: str | None) -> None:
        """Count the next stage."""
        self.stages, self.finished, self.window = self.stages + 1, False, window
        self.stage_steps = self.stage_passes = self.pass_batches = 0

    def remaining(self, stages: Iterable[Stage], figures: dict[str, dict[str, float]]) -> Iterator[Stage]:
        """Yield the stages that are still to run, the current one first, and count each as it starts.

        A stream that restores its own position yields the last stage again, first of its window. Any other is iterated
        from its beginning, with ``figures`` as they were then.
        """
        resumes, stream = self.stages > 0, iter(stages)
        if resumes and not hasattr(stages, "load_state_dict"):
            for number, _ in enumerate(islice(stream, self.stages - 1), 1):
                figures.update(self.figures.get(str(number), {}))
        for stage in stream:
            window: str | None = getattr(stages, "window", None)
            if resumes and window == self.window:
                resumes = False
                figures.update(self.figures.get(str(self.stages), {}))
                if self.finished:
                    continue
            else:
                self.start_stage(window)
            yield stage
            self.finished = True
        if resumes:  # more stages were done than there are now
            for done in sorted(self.figures, key=int):
                figures.update(self.figures[done])

    def reached(self, stage: Train) -> bool:
        """Return whether the current stage has reached its bound."""
        if stage.max_steps is not None and self.stage_steps >= stage.max_steps:
            return True
        # Without any bound it is one pass.
        epochs = stage.epochs or (None if stage.max_steps is not None or stage.endless else 1)
        return epochs is not None and self.stage_passes >= epochs

    def steps_left(self, stage: Train, batches: int | None, accumulate: int) -> int:
        """Return the number of steps left in the current stage; 0 if unknown.

        Args:
            stage: The current stage.
            batches: Batches of a pass; None if unknown.
            accumulate: Batches of a step.
        """
        bounds = [] if stage.max_steps is None else [stage.max_steps - self.stage_steps]
        if batches is not None and not stage.endless and (stage.max_steps is None or stage.epochs is not None):
            left = batches * ((stage.epochs or 1) - self.stage_passes) - self.pass_batches
            bounds.append(-(-left // accumulate))
        return max(min(bounds, default=0), 0)


class Generators:
    """Random generators of one rank, and its sums since the last line of the log, as a part of checkpoints.

    Checkpoints contain the name of this class.

    Args:
        means: The sums.
    """

    def __init__(self, means: RunningMeans) -> None:
        self._means = means

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators and the sums."""
        return {**generator_states(), "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        set_generator_states(state)
        if "means" in state:
            self._means.load_state_dict(state["means"])
