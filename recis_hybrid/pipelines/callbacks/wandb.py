"""WandB: the log as a run of Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.callbacks.record_values import digest_of, figures_of
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.validation import check_type


class WandB(Callback):
    """Logs a training to Weights & Biases, on rank 0.

    Every number of the log is a value over ``step``, as in :class:`TensorBoard`. The digest of each complete checkpoint
    is a value ``checkpoint/digest``, so that a bundle, which names step and digest of its checkpoint, leads back to the
    run; its summary has that of the latest one. A resumed training continues the run.

    Requires ``pip install recis_hybrid[wandb]``.

    Args:
        project: Name of the project.
        config: Configuration of the run, possibly nested.
        options: Further arguments of ``wandb.init``, such as ``mode="offline"``, ``dir`` or ``name``.

    Raises:
        ImportError: wandb is not installed.
        TypeError: An argument has the wrong type.
    """

    def __init__(self, project: str, *, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        check_type("WandB", "project", project, str, "the name of a project")
        check_type("WandB", "config", config, (Mapping, type(None)), "a mapping, or None")
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ImportError(
                f"WandB: there is no module {error.name!r}; run `pip install recis_hybrid[wandb]`"
            ) from error
        self._init: Any = wandb.init
        self._options = {"project": project, "config": dict(config or {}), **options}
        self._run: Any = None
        self._outer: BaseException | None = None
        self.run_id: str | None = None
        """Id of the run on rank 0, once the training has begun."""

    def before_fit(self, trainer: Run) -> None:
        """Start a run, or continue that of a resumed training."""
        if distributed.rank() != 0:
            return
        self._outer = sys.exception()
        resumed = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
        # Leave a run of the user's own, in the same process, as it is.
        self._run = self._init(**{"reinit": "create_new", **self._options, **resumed})
        self.run_id = self._run.id
        # By wandb's own step, a resumed run could not log the steps that it repeats.
        self._run.define_metric("*", step_metric="step")

    def on_log(self, trainer: Run, record: Record) -> None:
        """Log the numbers of a record, or the digest of a checkpoint."""
        if self._run is None:
            return
        values: dict[str, Any] = dict(figures_of(record))
        if (digest := digest_of(record)) is not None:
            values["checkpoint/digest"] = digest
        if values:
            self._run.log({"step": record["step"], **values})

    def after_fit(self, trainer: Run) -> None:
        """End the run."""
        if self._run is not None:
            # The trainer calls this while it handles the exception that ended the training, if there is one.
            self._run.finish(exit_code=0 if sys.exception() is self._outer else 1)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the id of the run."""
        self.run_id = state["run_id"]
