"""From a configuration to a training that is ready to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.columnio import Column, ColumnDataset, Dense
from recis_hybrid.embedding import (
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Normal,
    Unused,
    dense_parameters,
    leave_out_of_ddp,
)
from recis_hybrid.features import Feature, FeatureEngine, make_op
from recis_hybrid.metrics import AUC, GAUC, MSE, BinnedAUC, Calibration, LogLoss, Metric, NormalizedEntropy
from recis_hybrid.pipelines.callback import Callback, ranks
from recis_hybrid.pipelines.checkpoint import Checkpoint
from recis_hybrid.pipelines.config import Config, ConfigError, FeatureConfig
from recis_hybrid.pipelines.config_model import ConfigModel
from recis_hybrid.pipelines.json_log import JsonLog
from recis_hybrid.pipelines.on_metric import EarlyStop
from recis_hybrid.pipelines.progress_bar import ProgressBar
from recis_hybrid.pipelines.randomness import seed_everything
from recis_hybrid.pipelines.stages import Evaluate, Evict, Save, Stage, Train
from recis_hybrid.pipelines.tensorboard import TensorBoard
from recis_hybrid.pipelines.torch_step import TorchStep
from recis_hybrid.pipelines.trainer import Trainer
from recis_hybrid.saver import Saver

METRICS: dict[str, type[Metric]] = {
    "auc": AUC, "binned_auc": BinnedAUC, "gauc": GAUC, "logloss": LogLoss, "normalized_entropy": NormalizedEntropy,
    "calibration": Calibration, "mse": MSE,
}  # fmt: skip
SPARSE: Mapping[str, Any] = {
    "adam": optim.Adam, "adagrad": optim.Adagrad, "rowwise_adagrad": optim.RowwiseAdagrad, "sgd": optim.SGD
}  # fmt: skip
LOWER_IS_BETTER = {"logloss", "normalized_entropy", "mse"}


def trainer_of(config: Config, *, quiet: bool = False) -> Trainer:
    """Returns the trainer of a configuration.

    Args:
        config: The configuration.
        quiet: Whether to leave out the progress bar.

    Raises:
        ConfigError: An operation or the model cannot be made as the configuration says.
    """
    _refuse_device(config.train.device)
    if "gauc" in config.train.metrics and config.data.groups is None:
        raise ConfigError("train.metrics has gauc, which is by group; name the column of groups in data.groups")
    features = [_feature(name, feature) for name, feature in config.features.items()]
    seed_everything(config.seed)
    model = ConfigModel(config, _engine(config)).to(config.train.device)
    kind = SPARSE[config.optimizer.sparse]
    if ranks() > 1:
        leave_out_of_ddp(model)
    step = TorchStep(
        DistributedDataParallel(model) if ranks() > 1 else model, torch.nn.functional.binary_cross_entropy_with_logits,
        {
            "dense": torch.optim.Adam(dense_parameters(model), lr=config.optimizer.dense_lr),
            "sparse": kind(model.engine.parameters(), lr=config.optimizer.sparse_lr),
        },
        label=config.data.label, groups=config.data.groups, precision=config.train.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm, compile=[model.tower] if config.model.compile else [],
    )  # fmt: skip
    evaluated = config.data.evaluate
    return Trainer(
        step, _dataset(config, features, config.data.train, shuffle=config.data.shuffle),
        None if evaluated is None else _dataset(config, features, evaluated, shuffle=False),
        metrics={str(name): METRICS[name]() for name in config.train.metrics},
        saver=Saver(config.run, keep=config.train.keep), callbacks=_callbacks(config, quiet),
        accumulate=config.train.accumulate, log_every=config.train.log_every, seed=config.seed,
    )  # fmt: skip


def stages_of(config: Config) -> Iterator[Stage]:
    """Yields the stages of a configuration: after each pass an evaluation, an eviction if asked for, a checkpoint."""
    for number in range(config.train.epochs):
        yield Train(epochs=1, name=f"epoch {number + 1}")
        if config.data.evaluate is not None:
            yield Evaluate()
        if config.train.evict_unused is not None:
            yield Evict(Unused(config.train.evict_unused))
        yield Save()


def _refuse_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device must be a device of torch's, got {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name!r}, and torch {torch.__version__} finds no GPU here; take cpu")


def _engine(config: Config) -> EmbeddingEngine:
    embeddings = {
        name: EmbeddingConfig(
            dim=feature.dim, table=feature.table, combiner=feature.combiner, initializer=Normal(0.0, feature.std),
            admission=None if feature.min_frequency is None else MinFrequency(feature.min_frequency),
        )
        for name, feature in config.features.items()
        if feature.dim is not None
    }  # fmt: skip
    if not embeddings:
        raise ConfigError("features: at least one must have a dim, which is that of its embedding")
    state = SPARSE[config.optimizer.sparse].row_state()
    return EmbeddingEngine(embeddings, optimizer_state=state, seed=config.seed, device=config.train.device)


def _feature(name: str, config: FeatureConfig) -> Feature:
    ops = []
    for number, entry in enumerate(config.ops):
        key = f"features.{name}.ops[{number}]"
        if len(entry) != 1:
            raise ConfigError(f"{key} must be one operation, {{name: {{parameter: value}}}}, got {entry}")
        ((kind, parameters),) = entry.items()
        try:
            ops.append(make_op(kind, **(parameters or {})))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: {error}") from error
    try:
        return Feature(name, ops=ops, source=config.source)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"features.{name}: {error}") from error


def _dataset(config: Config, features: list[Feature], paths: str, *, shuffle: bool) -> ColumnDataset:
    data = config.data
    wanted = dict.fromkeys(column for feature in features for column in feature.columns)
    columns: dict[str, Column | None] = dict.fromkeys(wanted)
    columns[data.label] = _label_column(paths, data.label)
    if data.groups is not None:
        columns.setdefault(data.groups, None)
    # Where a feature has its name, the groups are what the feature makes of the column.
    keep = [name for name in (data.groups,) if name in wanted and name not in config.features]
    return ColumnDataset(
        paths, columns, data.batch_size, shuffle=shuffle, seed=config.seed, num_threads=data.threads,
        transforms=FeatureEngine(features, keep=[name for name in keep if name is not None], parallel=False),
        device=None if config.train.device == "cpu" else config.train.device,
        # Ranks work together at each step, so that all have equally many.
        uneven="pad" if ranks() > 1 else None,
    )  # fmt: skip


def _label_column(paths: str, label: str) -> Column | None:
    """Return how labels are read: as numbers; but ``true`` and ``false`` of a text file as they are."""
    try:
        # Alone, whatever the ranks: it is one row.
        sample = ColumnDataset(paths, [label], 1, rank=0, world_size=1, prefetch=0, decoded_rows=1)
        column = next(iter(sample))[label]
    except Exception:  # which the training's own reading meets, and names
        return Dense(torch.float32)
    return None if column.dtype is torch.bool else Dense(torch.float32)


def _callbacks(config: Config, quiet: bool) -> list[Callback]:
    train = config.train
    callbacks: list[Callback] = [JsonLog(Path(config.run) / "log.jsonl")]
    if not quiet:
        callbacks.append(ProgressBar())
    if train.tensorboard:
        callbacks.append(TensorBoard(Path(config.run) / "tensorboard"))
    if train.checkpoint_steps is not None:
        callbacks.append(Checkpoint(steps=train.checkpoint_steps, whole_every=train.checkpoint_whole_every))
    if train.patience is not None:
        first = train.metrics[0]
        callbacks.append(
            EarlyStop(f"eval/{first}", mode="min" if first in LOWER_IS_BETTER else "max", patience=train.patience)
        )
    return callbacks
