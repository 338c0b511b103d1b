"""Prediction with runs of ``recis-hybrid train``. Letters: B rows of a batch."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from recis_hybrid.app.build import (
    dataset_of,
    features_of,
    metrics_of,
    read_options,
    refuse_device,
    scoring_step_of,
)
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.app.resume import NAME, recorded_config
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.columnio.files.schema import column_types
from recis_hybrid.features import FeatureEngine
from recis_hybrid.pipelines.evaluate import evaluate
from recis_hybrid.pipelines.predict import predict
from recis_hybrid.pipelines.scores import ROWS_PER_FILE, write_scores
from recis_hybrid.pipelines.steps.metrics import Metrics
from recis_hybrid.pipelines.steps.torch_step import TorchStep
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import CheckpointError, Location, Saver
from recis_hybrid.saver.checkpoint.chain import link_to
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import STEP

Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedRun:
    """A trained model with its features and data; :func:`load_run` creates it.

    Example:
        >>> run = load_run("first/run")  # doctest: +SKIP
        >>> run.evaluate("first/clicks/eval.csv")  # doctest: +SKIP
        {'auc': 0.78, 'logloss': 0.52}
        >>> for batch in run.predict("first/clicks/eval.csv", columns=["user", "item"]):  # doctest: +SKIP
        ...     batch["user"], batch["score"]
    """

    path: str
    """The run's folder or URL."""
    step: int
    """The checkpoint's step."""
    config: Config
    """The run's configuration."""
    model: nn.Module
    """Batch of features → logits ``[B]``; frozen, in evaluation mode, without optimizer state."""
    features: FeatureEngine
    """Computes the features of a batch of columns."""
    scorer: TorchStep
    """The model as a step for evaluation and prediction only."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the model reads from files, excluding label and groups."""
        return self.features.columns

    def __call__(self, batch: Batch) -> Tensor:
        """Return the scores of a batch of columns.

        Args:
            batch: Batch with the columns :attr:`columns`, as yielded by :meth:`data`.

        Returns:
            Probabilities, float32 ``[B]``.
        """
        return self.scorer.score(self.features(batch))[""]

    def data(self, paths: Paths, *, columns: Sequence[str] = (), label: bool = False, **options: Any) -> ColumnDataset:
        """Open files with the columns that the model needs, read as in training.

        Args:
            paths: Files, folders, patterns or URLs, as in ColumnDataset.
            columns: Additional columns.
            label: True to also read the label, and groups if the run has them.
            options: Further arguments of ColumnDataset, such as ``batch_size`` (by default that of the run) or
                ``shard``. ``read`` replaces the run's options, including its CSV dialect.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: A column is missing.
        """
        options = {"transforms": _identity, **options}
        features = list(self.features.features)
        return dataset_of(self.config, features, _as_paths(paths), columns=columns, label=label, **options)

    def evaluate(self, paths: Paths | None = None, metrics: Metrics | None = None) -> dict[str, float]:
        """Compute metrics. On the run's evaluation data they are bitwise those of its evaluation at this step.

        Args:
            paths: Data with the label column. None uses the run's ``data.evaluate``.
            metrics: None uses those of the run.

        Raises:
            ConfigError: ``paths`` is None, and the run has no ``data.evaluate``.
        """
        source = self.config.data.evaluate if paths is None else _as_paths(paths)
        if source is None:
            raise ConfigError(f"{self.path} has no data.evaluate; name the files to evaluate on")
        features = list(self.features.features)
        return evaluate(
            self.scorer,
            dataset_of(self.config, features, source),
            metrics_of(self.config) if metrics is None else metrics,
        )

    def predict(self, paths: Paths, *, columns: Sequence[str] = (), **options: Any) -> Iterator[Batch]:
        """Yield scores batch by batch, in the order of the rows; see :func:`recis_hybrid.pipelines.predict`.

        Args:
            paths: Data, with or without the label column.
            columns: Columns of the files to include in the output, such as row ids.
            options: Further arguments of ColumnDataset.
        """
        return predict(
            self.scorer, self.data(paths, columns=columns, **options), columns=columns, transforms=[self.features]
        )

    def write_scores(
        self,
        folder: str | os.PathLike[str],
        paths: Paths,
        *,
        columns: Sequence[str] = (),
        rows_per_file: int = ROWS_PER_FILE,
        quiet: bool = True,
        **options: Any,
    ) -> int:
        """Write scores as Parquet files into a folder, and continue there after an interruption.

        On several ranks, each scores a share of the rows and writes its own files. See
        :func:`recis_hybrid.pipelines.write_scores` for the names of the files, and for what is raised.

        Args:
            folder: Folder that all ranks share.
            paths: Data, with or without the label column.
            columns: Columns of the files to include in the output, such as row ids.
            rows_per_file: Number of rows after which new files begin.
            quiet: False to show the progress on stderr.
            options: Further arguments of ColumnDataset.

        Returns:
            The number of rows.
        """
        data = self.data(paths, columns=columns, **options)
        types = column_types(_as_paths(paths), read_options(self.config))
        digest = link_to(storage_of(self.path).root, self.step).sha256
        return write_scores(
            folder,
            data,
            lambda batches: predict(self.scorer, batches, columns=columns, transforms=[self.features]),
            source={"checkpoint": digest, "step": self.step, "columns": list(columns)},
            types={name: kind for name, kind in types.items() if name in columns},
            rows_per_file=rows_per_file,
            quiet=quiet,
        )


def load_run(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest"] = "latest",
    device: str | None = None,
    tables: bool = True,
) -> LoadedRun:
    """Load a run of ``recis-hybrid train`` for evaluation and prediction.

    If torch.distributed is initialized, the ranks share the tables, and all ranks must call this.

    Args:
        path: The run's folder or URL, or one of its checkpoints ``step_…``.
        step: Step of the checkpoint, the latest by default.
        device: Device of model and tables. None uses the device of the training.
        tables: False to leave the tables empty, for a caller that needs the features and the tower only.

    Raises:
        CheckpointError: The checkpoint does not exist or is damaged.
        ConfigError: The folder is not a run, or the device does not exist.
        FileNotFoundError: The folder does not exist.
    """
    place, path_step = run_and_step(path)
    if path_step is not None and step not in ("latest", path_step):
        raise CheckpointError(f"{os.fspath(path)} is not of step {step}; name the run's folder, or omit the step")
    folder, step = storage_of(place).root, step if path_step is None else path_step
    saver = _saver(place, folder)
    config = recorded_config(place)
    config = config if device is None else replace(config, train=replace(config.train, device=device))
    try:
        refuse_device(config.train.device)
    except ConfigError as error:
        raise (
            error
            if device is not None
            else ConfigError(
                f"{place} was trained on {config.train.device!r}: {error}, with load_run(device=) or --device"
            )
        ) from error
    scorer = scoring_step_of(config)
    with warnings.catch_warnings():
        # The tables are read-only, so optimizer state and admission counts are intentionally not loaded.
        warnings.filterwarnings("ignore", ".*is loaded into tables of another kind", UserWarning)
        parts = scorer.parts()
        loaded = saver.load({name: parts[name] for name in (("engine", "model") if tables else ("model",))}, step)
    features = FeatureEngine(features_of(config), parallel=False)
    return LoadedRun(
        path=place, step=loaded, config=config, model=scorer.model.eval(), features=features, scorer=scorer
    )


def run_and_step(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """Return the run of a path, and the step if the path is a checkpoint, else None."""
    text = os.fspath(path)
    match = STEP.fullmatch(storage_of(text).root.name)
    if match is None:
        return text, None
    return text.rstrip("/").rpartition("/")[0] or ".", int(match[1])


def _saver(place: str, folder: Location) -> Saver:
    """Return the saver of a run that has checkpoints."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{place}: there is no such folder; name the folder of a run of `recis-hybrid train`")
    saver = Saver(place)
    if saver.steps():
        return saver
    hint = "train first"
    if isinstance(folder, Path) and (folder / NAME).is_file():
        with contextlib.suppress(ConfigError):
            run = load_config(Path(place) / NAME).run
            if os.path.isdir(run) and not folder.samefile(run):
                hint = f"did you mean {run}, the run of {Path(place) / NAME}?"
    raise CheckpointError(f"{place} has no complete checkpoint; {hint}")


def _as_paths(paths: Paths) -> str | list[str]:
    return os.fspath(paths) if isinstance(paths, str | os.PathLike) else [os.fspath(path) for path in paths]


def _identity(batch: Batch) -> Batch:
    return batch
