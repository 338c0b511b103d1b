"""Progress: the position of a training in its stages, as stored in checkpoints."""

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
    """Completed training steps."""
    samples: int = 0
    """Rows trained on, by this rank."""
    stages: int = 0
    """Stages started."""
    finished: bool = True
    """True if the last started stage has ended."""
    window: str | None = None
    """Name of the window of the last started stage."""
    stage_steps: int = 0
    """Training steps of the current stage."""
    stage_passes: int = 0
    """Passes completed in the current stage."""
    pass_batches: int = 0
    """Batches that the current stage has taken from the current pass."""
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Results of evaluations by stage number; empty for WindowStages."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        return asdict(self)

    def start_stage(self, window: str | None) -> None:
        """Count the next stage."""
        self.stages, self.finished, self.window = self.stages + 1, False, window
        self.stage_steps = self.stage_passes = self.pass_batches = 0

    def remaining(self, stages: Iterable[Stage], figures: dict[str, dict[str, float]]) -> Iterator[Stage]:
        """Yield the remaining stages, the current one first, and count each as it starts.

        A stream that restores its own position starts with the last stage that it yielded. Any other stream is iterated
        from its beginning, and sees ``figures`` as they were in the first run.
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
        if resumes:  # the stream has fewer stages than have been run
            for key in sorted(self.figures, key=int):
                figures.update(self.figures[key])

    def reached(self, stage: Train) -> bool:
        """Return whether the current stage has reached its bound."""
        if stage.max_steps is not None and self.stage_steps >= stage.max_steps:
            return True
        # A stage without a bound is one pass.
        epochs = stage.epochs or (None if stage.max_steps is not None or stage.endless else 1)
        return epochs is not None and self.stage_passes >= epochs

    def steps_left(self, stage: Train, batches: int | None, accumulate: int) -> int:
        """Return the number of steps left in the current stage; 0 if unknown.

        Args:
            stage: The current stage.
            batches: Number of batches in a pass; None if unknown.
            accumulate: Number of batches in a step.
        """
        bounds = [] if stage.max_steps is None else [stage.max_steps - self.stage_steps]
        if batches is not None and not stage.endless and (stage.max_steps is None or stage.epochs is not None):
            left = batches * ((stage.epochs or 1) - self.stage_passes) - self.pass_batches
            bounds.append(-(-left // accumulate))
        return max(min(bounds, default=0), 0)


class Generators:
    """Part of checkpoints: one rank's random generators, and its sums since the last record of the log.

    Checkpoints contain the name of this class, so renaming it breaks them.

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
