"""MLflow: the log as metrics, parameters and tags of an MLflow run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.callbacks.record_values import digest_of, figures_of, flattened
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.validation import check_type

_VALUE_LENGTH = 6000  # MLflow refuses longer values of parameters


class MLflow(Callback):
    """Logs a training to MLflow, on rank 0.

    Every number of the log is a metric, as in :class:`TensorBoard`. The configuration is the run's parameters. The
    digest of each complete checkpoint is a tag ``checkpoint.step_000100``, so that a bundle, which names step and
    digest of its checkpoint, leads back to the run; ``checkpoint.digest`` is that of the latest one. A resumed training
    continues the MLflow run. Parameters of MLflow cannot change, so keys that have changed since become tags
    ``resumed.KEY``.

    Requires ``pip install recis_hybrid[mlflow]``.

    Args:
        experiment: Name of the experiment, which is created if needed.
        config: Configuration of the run, possibly nested; keys become ``train.epochs``.
        name: Name of the run; None lets MLflow choose one.
        tracking_uri: The tracking server or database; None uses MLflow's setting, such as ``MLFLOW_TRACKING_URI``.

    Raises:
        ImportError: mlflow is not installed.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        experiment: str,
        *,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        check_type("MLflow", "experiment", experiment, str, "the name of an experiment")
        check_type("MLflow", "config", config, (Mapping, type(None)), "a mapping, or None")
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise ImportError(
                f"MLflow: there is no module {error.name!r}; run `pip install recis_hybrid[mlflow]`"
            ) from error
        self._make: Any = lambda: MlflowClient(tracking_uri=tracking_uri)
        self._experiment, self._config, self._name = experiment, flattened(config or {}), name
        self._client: Any = None
        self._outer: BaseException | None = None
        self.run_id: str | None = None
        """Id of the MLflow run on rank 0, once the training has begun."""

    def before_fit(self, trainer: Run) -> None:
        """Start an MLflow run, or continue that of a resumed training, and log the configuration."""
        if distributed.rank() != 0:
            return
        from mlflow.entities import Param, RunTag

        self._outer = sys.exception()
        self._client = self._make()
        if self.run_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            place = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
            self.run_id = self._client.create_run(place, run_name=self._name).info.run_id
        else:
            self._client.update_run(self.run_id, status="RUNNING")
        before = self._client.get_run(self.run_id).data.params
        now = {key: str(value)[:_VALUE_LENGTH] for key, value in self._config.items()}
        self._client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in now.items() if key not in before],
            tags=[RunTag(f"resumed.{key}", value) for key, value in now.items() if before.get(key, value) != value],
        )

    def on_log(self, trainer: Run, record: Record) -> None:
        """Log the numbers of a record, or the digest of a checkpoint."""
        if self._client is None:
            return
        from mlflow.entities import Metric, RunTag

        now, tags = int(time.time() * 1000), []
        if (digest := digest_of(record)) is not None:
            tags = [RunTag(f"checkpoint.step_{record['step']:06d}", digest), RunTag("checkpoint.digest", digest)]
        metrics = [Metric(name, float(value), now, record["step"]) for name, value in figures_of(record).items()]
        if metrics or tags:
            self._client.log_batch(self.run_id, metrics=metrics, tags=tags)

    def after_fit(self, trainer: Run) -> None:
        """End the MLflow run."""
        if self._client is not None:
            # The trainer calls this while it handles the exception that ended the training, if there is one.
            self._client.set_terminated(self.run_id, "FINISHED" if sys.exception() is self._outer else "FAILED")
            self._client = None

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the MLflow run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the id of the MLflow run."""
        self.run_id = state["run_id"]
