"""``--check``: checks of a configuration against a sample of its data, before training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from recis_hybrid.app.build import dataset_of, features_of, read_options, refuse_device, step_of, trackers_of
from recis_hybrid.app.config import Config, ConfigError, FeatureConfig
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.features import Feature, FeatureEngine
from recis_hybrid.pipelines.steps.loss_guard import non_finite_columns
from recis_hybrid.pipelines.steps.step import loss_of
from recis_hybrid.pipelines.steps.torch_step import TorchStep
from recis_hybrid.ragged import Batch, RaggedTensor

ROWS = 100_000
"""Number of rows searched for two different labels."""


def check(config: Config) -> Iterator[str]:
    """Check a configuration against a sample of its data, without writing anything.

    Reads a sample of every column, computes the features, and runs the model forward.

    Args:
        config: The configuration.

    Yields:
        Remarks: a summary of the data, and warnings about what may be a mistake.

    Raises:
        ConfigError: The data do not fit the configuration; lists all problems.
        FileNotFoundError: There is no such file.
        ValueError: A file cannot be read as the configuration says.
    """
    refuse_device(config.train.device)
    trackers_of(config)  # raises if a package is missing
    features = features_of(config)
    step = step_of(config)
    for name in ("train", "evaluate"):
        paths = getattr(config.data, name)
        if paths is not None:
            yield from _check_source(config, features, step, f"data.{name}", paths)


def _check_source(
    config: Config, features: list[Feature], step: TorchStep, key: str, paths: str | list[str]
) -> Iterator[str]:
    from recis_hybrid.columnio.files.schema import column_types

    engine = FeatureEngine(features, keep=_kept(config), parallel=False)
    data = dataset_of(config, features, paths, transforms=_identity, read=replace(read_options(config), prefetch=0))
    unsigned = {name for name, kind in column_types(paths, read_options(config)).items() if "uint64" in str(kind)}
    label = config.data.label
    faults: list[str] = []
    sample: Batch | None = None
    rows, low, high = 0, float("inf"), float("-inf")
    for batch in data:
        sample = batch if sample is None else sample
        values = batch[label]
        if isinstance(values, RaggedTensor) or values.dim() > 2 or values.numel() != len(values):
            faults.append(f"data.label {label!r} must be one number per row, got {_form(values)}")
            break
        numbers = values.double()
        if not bool(numbers.isfinite().all()):
            faults.append(f"data.label {label!r} contains NaN or infinities; remove these rows")
            break
        rows, low, high = rows + len(values), min(low, float(numbers.min())), max(high, float(numbers.max()))
        if low < high or rows >= ROWS:
            break
    assert sample is not None  # a dataset without a row is refused
    remark = _label_remark(config, data, faults, rows, low, high)
    faults += _column_faults(config, sample)
    computed = engine(sample)
    warnings = [] if remark is None else [remark]
    for name, feature in config.features.items():
        fault, warning = _feature_fault(name, feature.dim, computed[name], _raw(feature, name, sample, unsigned))
        faults += [] if fault is None else [fault]
        warnings += [] if warning is None else [warning]
    if not faults:
        faults += [f"{column} not finite" for column in non_finite_columns(computed)]
    if faults:
        raise ConfigError(
            f"{key} {_shown(paths)} does not fit the configuration:" + "".join(f"\n  {f}" for f in faults)
        )
    labels = computed[label]
    assert isinstance(labels, Tensor)  # otherwise a fault was raised above
    loss = loss_of(step({**computed, label: labels.float()}))
    if not bool(loss.isfinite()):
        raise ConfigError(f"{key} {_shown(paths)}: the loss of the first batch is {float(loss)}")
    yield f"{key}: {data.num_rows:,} rows, {len(data):,} batches; the first has a loss of {float(loss):.4f}"
    for warning in warnings:
        yield f"{key}: {warning}"


def _label_remark(
    config: Config, data: ColumnDataset, faults: list[str], rows: int, low: float, high: float
) -> str | None:
    """Append errors in the labels to the faults, and return a warning or None."""
    label = config.data.label
    if faults:
        return None
    if low < 0 or high > 1:
        faults.append(
            f"data.label {label!r} must be 0 or 1 for binary cross entropy, got values from {low:g} to {high:g}"
        )
    elif low == high and rows >= data.num_rows:
        faults.append(f"data.label {label!r} is {low:g} in all {rows:,} rows: there is nothing to learn")
    elif low == high:
        return f"data.label {label!r} is {low:g} in the first {rows:,} rows"
    return None


def _column_faults(config: Config, sample: Batch) -> Iterator[str]:
    groups = config.data.groups
    if groups is not None and groups not in config.features:
        column = sample[groups]
        if isinstance(column, RaggedTensor) or column.dtype not in (torch.int64, torch.int32):
            yield (
                f"data.groups {groups!r} must be one integer per row, got {_form(column)}; use a feature that hashes it"
            )


def _feature_fault(
    name: str, dim: int | None, computed: Tensor | RaggedTensor, raw: list[Tensor | RaggedTensor]
) -> tuple[str | None, str | None]:
    """Return an error and a warning about a feature, each None if there is none."""
    values = computed.values if isinstance(computed, RaggedTensor) else computed
    strings = isinstance(computed, RaggedTensor) and values.dtype == torch.uint8
    if dim is None:
        if strings:
            return f"features.{name} is text and has no dim: hash it and give it a dim, or remove it", None
        if isinstance(computed, RaggedTensor):
            return f"features.{name} is a list of any length and has no dim: the tower takes one number per row", None
        return None, None
    if strings:
        return f"features.{name} is text: ids must be integers; hash it with ops: [{{hash: {{kind: farm}}}}]", None
    if values.dtype not in (torch.int64, torch.int32):
        return (
            f"features.{name} is {values.dtype}: ids must be integers; bucketize it, or remove dim to use it as number"
        ), None
    if isinstance(computed, RaggedTensor) and computed.levels > 1:
        return f"features.{name} has {computed.levels} levels of lists: a row must be one list of ids", None
    for column in raw:
        ids = column.values if isinstance(column, RaggedTensor) else column
        if ids.dtype in (torch.int64, torch.int32) and (negative := int((ids < 0).sum())):
            return None, (
                f"features.{name}: {negative:,} of {ids.numel():,} ids are negative, such as {int(ids.min())}; they "
                f"are ordinary ids, even if they mark missing values"
            )
    return None, None


def _raw(feature: FeatureConfig, name: str, sample: Batch, unsigned: set[str]) -> list[Tensor | RaggedTensor]:
    """Return the signed source columns if they are used as ids without an operation."""
    return [] if feature.ops else [sample[source] for source in feature.sources(name) if source not in unsigned]


def _kept(config: Config) -> list[str]:
    groups = config.data.groups
    read = {source for name, feature in config.features.items() for source in feature.sources(name)}
    return [] if groups is None or groups not in read or groups in config.features else [groups]


def _form(column: Tensor | RaggedTensor) -> str:
    if not isinstance(column, RaggedTensor):
        return f"{column.dtype} {list(column.shape)}"
    return "text" if column.values.dtype == torch.uint8 else f"lists of {column.values.dtype}"


def _shown(paths: str | list[str]) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)


def _identity(batch: Batch) -> Batch:
    return batch
