"""Construction of trainers, models and datasets from configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from recis_hybrid import optim
from recis_hybrid.accelerator import is_available
from recis_hybrid.app.config import ColumnConfig, Config, ConfigError, CsvConfig, FeatureConfig
from recis_hybrid.app.model import ConfigModel
from recis_hybrid.app.resume import Changes, RunRecord
from recis_hybrid.columnio import Column, ColumnDataset, CsvOptions, Dense, Ragged, ReadOptions, Text, Weighted
from recis_hybrid.embedding import (
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Normal,
    OptimizerSpec,
    Placement,
    Unused,
    dense_parameters,
)
from recis_hybrid.features import Feature, FeatureEngine, make_op
from recis_hybrid.metrics import AUC, GAUC, MSE, BinnedAUC, Calibration, LogLoss, Metric, NormalizedEntropy
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.callbacks.checkpoint import PeriodicCheckpoint
from recis_hybrid.pipelines.callbacks.early_stop import EarlyStop
from recis_hybrid.pipelines.callbacks.json_log import JsonLog
from recis_hybrid.pipelines.callbacks.mlflow import MLflow
from recis_hybrid.pipelines.callbacks.progress_bar import ProgressBar
from recis_hybrid.pipelines.callbacks.tensorboard import TensorBoard
from recis_hybrid.pipelines.callbacks.wandb import WandB
from recis_hybrid.pipelines.rng import seed_everything
from recis_hybrid.pipelines.stages import Evaluate, Evict, SaveCheckpoint, Stage, Train
from recis_hybrid.pipelines.steps.torch_step import TorchStep
from recis_hybrid.pipelines.trainer import Trainer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from recis_hybrid.saver.storage.resolve import storage_of

METRICS: dict[str, type[Metric]] = {
    "auc": AUC,
    "binned_auc": BinnedAUC,
    "gauc": GAUC,
    "logloss": LogLoss,
    "normalized_entropy": NormalizedEntropy,
    "calibration": Calibration,
    "mse": MSE,
}
SPARSE: Mapping[str, Any] = {
    "adam": optim.Adam,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "sgd": optim.SGD,
    "adagrad_sum": optim.AdagradSum,
    "adam_l2": optim.AdamL2,
    "adamw": optim.AdamW,
    "adamw_tf": optim.AdamWTF,
    "amsgrad": optim.AMSGrad,
    "ftrl": optim.FTRL,
    "lamb": optim.LAMB,
    "lion": optim.Lion,
    "rmsprop": optim.RMSprop,
    "rowwise_adam": optim.RowwiseAdam,
}
LOWER_IS_BETTER = {"logloss", "normalized_entropy", "mse"}


def trainer_of(config: Config, *, quiet: bool = False, changes: Changes | None = None) -> Trainer:
    """Return the trainer of a configuration.

    Args:
        config: The configuration.
        quiet: True for no progress bar.
        changes: Changes to a resumed run, for its log.

    Raises:
        ConfigError: The configuration of an operation or the model is invalid.
    """
    refuse_device(config.train.device)
    features = features_of(config)
    step = step_of(config)
    log = JsonLog(storage_of(config.run).root / "log.jsonl")
    data, evaluate = config.data, config.data.evaluate
    return Trainer(
        step,
        dataset_of(config, features, data.train, shuffle=data.shuffle),
        None if evaluate is None else dataset_of(config, features, evaluate),
        metrics=metrics_of(config),
        saver=Saver(config.run, keep=config.train.keep),
        callbacks=[log, RunRecord(config, changes or {}, log), *_callbacks(config, quiet)],
        accumulate=config.train.accumulate,
        log_every=config.train.log_every,
        seed=config.seed,
    )


def step_of(config: Config) -> TorchStep:
    """Return a training step with a new model of a configuration."""
    seed_everything(config.seed)
    model = ConfigModel(config, _engine(config)).to(config.train.device)
    return _step(
        config,
        model,
        {
            "dense": torch.optim.Adam(dense_parameters(model), lr=config.optimizer.dense_lr),
            "sparse": SPARSE[config.optimizer.sparse](model.engine.parameters(), lr=config.optimizer.sparse_lr),
        },
    )


def scoring_step_of(config: Config) -> TorchStep:
    """Return a step for prediction with a frozen model of a configuration, without optimizer state."""
    model = ConfigModel(config, _engine(config, trainable=False)).to(config.train.device).requires_grad_(False)
    return _step(config, model.eval(), {})


def _step(config: Config, model: ConfigModel, optimizers: dict[str, torch.optim.Optimizer]) -> TorchStep:
    return TorchStep(
        model,
        torch.nn.functional.binary_cross_entropy_with_logits,
        optimizers,
        label=config.data.label,
        groups=config.data.groups,
        precision=config.train.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        check_gradients=config.train.check_gradients,
        compile=[model.tower] if config.model.compile else [],
    )


def metrics_of(config: Config) -> dict[str, Metric]:
    """Return the metrics of a configuration, by name."""
    return {str(name): METRICS[name]() for name in config.train.metrics}


def stages_of(config: Config) -> Iterator[Stage]:
    """Yield the stages of a configuration: each epoch is followed by optional evaluation and eviction, and a save."""
    for number in range(config.train.epochs):
        yield Train(epochs=1, name=f"epoch {number + 1}")
        if config.data.evaluate is not None:
            yield Evaluate()
        if evicted := config.evicted_tables():
            yield Evict({table: Unused(steps) for table, steps in evicted.items()})
        yield SaveCheckpoint()


def refuse_device(name: str) -> None:
    """Raise ConfigError if a device is not available."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device must be a torch device, got {name!r}: {error}") from error
    if not is_available(device):
        raise ConfigError(f"train.device is {name!r}, but torch {torch.__version__} finds no GPU; use cpu")


def embeddings_of(config: Config, *, trainable: bool = True) -> dict[str, EmbeddingConfig]:
    """Return the embedding configs of a configuration by feature.

    Raises:
        ConfigError: No feature has an embedding, or a setting is invalid.
    """
    try:
        embeddings = {
            name: EmbeddingConfig(
                dim=feature.dim,
                table=feature.table,
                combiner=feature.combiner,
                initializer=Normal(0.0, feature.std),
                trainable=trainable,
                optimizer=_own_optimizer(config, feature),
                optimizer_overrides=None if feature.lr is None else {"lr": feature.lr},
                admission=MinFrequency(feature.min_frequency) if feature.min_frequency and trainable else None,
                placement=_placement(feature),
            )
            for name, feature in config.features.items()
            if feature.dim is not None
        }
        if not embeddings:
            raise ConfigError("features: at least one must have a dim, the dimension of its embedding")
        return embeddings
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"features: {error}") from error


def _engine(config: Config, *, trainable: bool = True) -> EmbeddingEngine:
    embeddings = embeddings_of(config, trainable=trainable)
    try:
        sparse = SPARSE[config.optimizer.sparse] if trainable else None
        return EmbeddingEngine(embeddings, optimizer=sparse, seed=config.seed, device=config.train.device)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"features: {error}") from error


def _own_optimizer(config: Config, feature: FeatureConfig) -> OptimizerSpec | None:
    if feature.optimizer is None:
        return None
    spec: OptimizerSpec = SPARSE[feature.optimizer].spec(lr=config.optimizer.sparse_lr)
    return spec


def _placement(feature: FeatureConfig) -> Placement | None:
    if feature.disk is None or feature.cache_bytes is None:
        return None
    return Placement(blocks="disk", path=feature.disk, cache_bytes=feature.cache_bytes)


def features_of(config: Config) -> list[Feature]:
    """Return the features of a configuration.

    Raises:
        ConfigError: The configuration of an operation is invalid.
    """
    return [_feature(name, feature) for name, feature in config.features.items()]


def _feature(name: str, config: FeatureConfig) -> Feature:
    ops = []
    for number, entry in enumerate(config.ops):
        key = f"features.{name}.ops[{number}]"
        if len(entry) != 1:
            raise ConfigError(f"{key} must be one operation, {{name: {{parameter: value}}}}, got {entry}")
        ((kind, parameters),) = entry.items()
        if not isinstance(parameters, dict | None):
            raise ConfigError(f"{key}.{kind} must be a mapping of parameters, got {parameters!r}")
        try:
            ops.append(make_op(kind, **(parameters or {})))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{key}: {error}") from error
    try:
        return Feature(name, ops=ops, source=config.source)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"features.{name}: {error}") from error


def dataset_of(
    config: Config,
    features: list[Feature],
    paths: str | list[str],
    *,
    shuffle: bool = False,
    label: bool = True,
    columns: Sequence[str] = (),
    transforms: Callable[[Batch], Batch] | None = None,
    **options: Any,
) -> ColumnDataset:
    """Return a dataset of the columns that a configuration reads.

    Args:
        config: The configuration.
        features: Its features.
        paths: Files, folders, patterns or URLs.
        shuffle: True to read each epoch in a new random order.
        label: True to also read label and groups.
        columns: Additional columns, passed through unchanged.
        transforms: Applied to each batch. None computes the features.
        options: Further arguments of ColumnDataset.

    Raises:
        ConfigError: The options of a column do not fit its type.
    """
    data = config.data
    inputs = dict.fromkeys(column for feature in features for column in feature.columns)
    read = dict.fromkeys([*inputs, *columns])
    if label:
        read |= dict.fromkeys([data.label, *([] if data.groups is None else [data.groups])])
    # If a feature has the name of the groups column, the groups are its output instead of the column.
    keep = [data.groups] if label and data.groups in inputs and data.groups not in config.features else []
    engine = FeatureEngine(features, keep=[name for name in keep if name is not None], parallel=False)
    return ColumnDataset(
        paths,
        _specs(config, paths, read, label),
        **{
            "batch_size": data.batch_size,
            "shuffle": shuffle,
            "seed": config.seed,
            "transforms": transforms or engine,
            "read": read_options(config),
            "device": None if config.train.device == "cpu" else config.train.device,
            **options,
        },
    )


def _specs(config: Config, paths: str | list[str], read: Iterable[str], label: bool) -> dict[str, Column | None]:
    """Return the specs of columns."""
    from recis_hybrid.columnio.files.schema import column_types, default_spec

    types = column_types(paths, read_options(config))
    specs: dict[str, Column | None] = {}
    for name in read:
        is_label = label and name == config.data.label
        kind = types.get(name)
        if is_label and isinstance(None if kind is None else default_spec(name, kind), Text):
            raise ConfigError(f"data.label {name!r} contains strings in {paths}; it must be a number, 0 or 1")
        dtype = torch.float32 if is_label and str(kind) != "bool" else None
        column = config.data.columns.get(name, ColumnConfig())
        if column == ColumnConfig():
            specs[name] = Dense(dtype) if dtype is not None else None
        else:
            specs[name] = _spec(f"data.columns.{name}", name, column, kind, dtype)
    return specs


def _spec(key: str, name: str, column: ColumnConfig, kind: Any, dtype: torch.dtype | None) -> Column | None:
    """Return the spec of a column from its Arrow type and the configuration."""
    from recis_hybrid.columnio.files.schema import default_spec

    inferred = None if kind is None else default_spec(name, kind)
    if isinstance(column.default, float) and not column.default.is_integer():
        dtype = dtype or torch.float64  # a fractional default turns integers into floats
    times = column.unit is not None or column.format is not None
    text = (isinstance(inferred, Text) and not times) or isinstance(column.default, str)
    if text and not isinstance(column.default, str | None):
        raise ConfigError(f"{key}.default must be a string, because the column holds strings, got {column.default!r}")
    if text and (times or column.scale is not None):
        raise ConfigError(f"{key}: unit, format and scale need a default that is a number, got {column.default!r}")
    if column.length is not None and (text or column.null_as_empty):
        raise ConfigError(f"{key}: length applies to lists of numbers of that length only, without null_as_empty")
    if text:
        return Text(column.default if isinstance(column.default, str) else None, null_as_empty=column.null_as_empty)
    if isinstance(inferred, Weighted):
        if column.length is not None or column.scale is not None or times:
            raise ConfigError(f"{key}: length, unit, format and scale do not apply to ids with weights; remove them")
        return replace(inferred, dtype=None, default=_number(column), null_as_empty=column.null_as_empty)
    options: dict[str, Any] = {
        "dtype": dtype,
        "default": _number(column),
        "unit": column.unit,
        "format": column.format,
        "scale": column.scale,
    }
    try:
        if column.length is None and (isinstance(inferred, Ragged) or column.null_as_empty):
            return Ragged(**options, null_as_empty=column.null_as_empty)
        return Dense(**options, length=column.length or (inferred.length if isinstance(inferred, Dense) else None))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def read_options(config: Config) -> ReadOptions:
    """Return the read options of a configuration."""
    data = config.data
    csv = None if data.csv == CsvConfig() else CsvOptions(**vars(data.csv))
    return ReadOptions(num_threads=data.threads, csv=csv, partitions=data.partitions)


def _number(column: ColumnConfig) -> float | None:
    return None if isinstance(column.default, str) else column.default


def trackers_of(config: Config) -> list[Callback]:
    """Return the callbacks that log the training to trackers of experiments.

    Raises:
        ImportError: The package of one of them is not installed.
    """
    train, trackers = config.train, list[Callback]()
    if train.tensorboard:
        trackers.append(TensorBoard(Path(config.run) / "tensorboard"))
    if train.mlflow is not None:
        trackers.append(MLflow(train.mlflow, config=asdict(config)))
    if train.wandb is not None:
        trackers.append(WandB(train.wandb, config=asdict(config)))
    return trackers


def _callbacks(config: Config, quiet: bool) -> list[Callback]:
    train = config.train
    callbacks: list[Callback] = [*([] if quiet else [ProgressBar()]), *trackers_of(config)]
    if train.checkpoint_steps is not None:
        callbacks.append(PeriodicCheckpoint(steps=train.checkpoint_steps, whole_every=train.checkpoint_whole_every))
    if train.patience is not None:
        first = train.metrics[0]
        callbacks.append(
            EarlyStop(f"eval/{first}", mode="min" if first in LOWER_IS_BETTER else "max", patience=train.patience)
        )
    return callbacks
