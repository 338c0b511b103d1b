"""What a training is to be, as a file says it: typed, and whatever is wrong is named by its key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

import yaml


class ConfigError(ValueError):
    """A configuration is wrong; the message names the file, the key, the rule and what was found."""


@dataclass(frozen=True)
class Range:
    """Which numbers a key takes."""

    least: float
    below: float = math.inf
    """What it must be less than."""

    def __str__(self) -> str:
        return f"at least {self.least:g}" + (f" and less than {self.below:g}" if self.below < math.inf else "")


Count: TypeAlias = Annotated[int, Range(1)]
Positive: TypeAlias = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from."""

    train: str
    """File, folder or pattern."""
    evaluate: str | None = None
    """As ``train``; None: nothing is evaluated."""
    label: str = "label"
    """Column of labels, 0 or 1."""
    groups: str | None = None
    """Column of int64 groups, for the metric gauc."""
    batch_size: Count = 4096
    """Rows of a batch, on each rank."""
    shuffle: bool = True
    """Whether each pass has a random order of its own."""
    threads: Count = 1
    """Threads that read."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One input of the model."""

    source: str | list[str] | None = None
    """Column or columns that it is made of; None: the one of its name."""
    ops: list[dict[str, Any]] = field(default_factory=list)
    """Operations, each ``{name: {parameter: value}}``, by the names of ``features.registered_ops()``."""
    dim: Count | None = None
    """Elements of its embedding; None: a number that the tower takes as it is."""
    table: str | None = None
    """Table of the embedding; features that name the same one share it. None: one of its own."""
    combiner: Literal["sum", "mean", "sqrtn", "max"] = "sum"
    """How the vectors of a list of ids become one."""
    min_frequency: Count | None = None
    """How often an id must be met until it gets a row; None: at once."""
    std: Positive = 0.01
    """Spread of the first values."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is made of the inputs."""

    kind: Literal["mlp", "deepfm"] = "mlp"
    """``mlp``: a tower over all inputs. ``deepfm``: beside it a factorization machine; all ``dim`` are equal then."""
    hidden: list[Count] = field(default_factory=lambda: [128, 64])
    """Widths of the tower's layers."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Share of what each layer gives that is dropped in training."""
    batch_norm: bool = False
    """Whether layers are normalised by batch."""
    compile: bool = False
    """Whether torch.compile takes the tower."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated."""

    dense_lr: Positive = 1e-3
    """Learning rate of the tower (Adam)."""
    sparse: Literal["adam", "adagrad", "rowwise_adagrad", "sgd"] = "adam"
    """Optimizer of the tables."""
    sparse_lr: Positive = 1e-3
    """Learning rate of the tables."""
    clip_grad_norm: Positive | None = None
    """Largest norm of all gradients; None: any."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how."""

    epochs: Count = 1
    """Passes over the training rows; after each there is an evaluation and a checkpoint."""
    accumulate: Count = 1
    """Batches of an update."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the tower computes in."""
    device: str = "cpu"
    """Where model and tables are."""
    checkpoint_steps: Count | None = None
    """Steps between two checkpoints within a pass; None: at its end only."""
    checkpoint_whole_every: Count = 1
    """Of so many of ``checkpoint_steps`` one is whole, the others hold what changed in tables; 1: all are whole."""
    keep: Count = 2
    """How many checkpoints stay."""
    log_every: Count = 50
    """Steps between two lines of the log."""
    patience: Count | None = None
    """After how many evaluations without a better first metric training stops; None: never."""
    evict_unused: Count | None = None
    """After each pass rows are given up that were not met in so many steps; None: none."""
    metrics: list[Literal["auc", "binned_auc", "gauc", "logloss", "normalized_entropy", "calibration", "mse"]] = field(
        default_factory=lambda: ["auc", "logloss"]
    )
    """What is evaluated."""
    tensorboard: bool = False
    """Whether the log is written for TensorBoard, too (needs the extra ``tensorboard``)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training."""

    run: str
    """Folder for checkpoints and log.jsonl."""
    data: DataConfig
    """Where rows come from."""
    features: dict[str, FeatureConfig]
    """The inputs of the model, by name."""
    model: ModelConfig = ModelConfig()
    """What is made of them."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How parameters are updated."""
    train: TrainConfig = TrainConfig()
    """How long and how."""
    seed: int = 0
    """Of everything random."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: A YAML file.
        overrides: Each ``a.b=value``, the value in YAML.

    Raises:
        ConfigError: It cannot be read, a key is unknown, missing or of a wrong type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse(Config, tree, str(path))


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, as train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is no YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {parent} is {below!r}, which has no keys below it")
        tree = below
    tree[last] = value


T = TypeVar("T")


def parse(cls: type[T], tree: Mapping[str, Any], where: str, key: str = "") -> T:
    """Makes a dataclass of a tree of plain values, checking types all the way down.

    Args:
        cls: The dataclass.
        tree: By key.
        where: What messages begin with.
        key: The place of the tree.

    Raises:
        ConfigError: A key is unknown or missing, or a value of a wrong type.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    inner = f"{key}." if key else ""
    for name in tree:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, 1)
            hint = f"; did you mean {inner}{close[0]}?" if close else ""
            raise ConfigError(f"{where}: unknown key {inner}{name}{hint} There are {sorted(hints)}")
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    missing = [
        f"{inner}{each.name}"
        for each in fields
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and each.name not in tree
    ]
    if missing:
        raise ConfigError(f"{where}: the keys {missing} must be given")
    try:
        return cls(**{name: _value(hints[name], value, where, f"{inner}{name}") for name, value in tree.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {key or 'it'}: {error}") from error


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _value(arguments[0], value, where, key)
        if not arguments[1].least <= number < arguments[1].below:  # nor NaN, nor infinite
            raise _wrong(where, key, str(arguments[1]), value)
        return number
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(where, key, "a mapping of keys", value)
        return parse(hint, value, where, key)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where, key)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, key, f"one of {list(arguments)}", value)
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(where, key, "a list", value)
        return [_value(arguments[0], each, where, f"{key}[{n}]") for n, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, key, "a mapping of keys", value)
        return {str(name): _value(arguments[1], each, where, f"{key}.{name}") for name, each in value.items()}
    if hint is float:
        return _number(value, where, key)
    if hint is Any or (type(value) is hint):
        return value
    names = {int: "an integer", bool: "true or false", str: "a string", type(None): "null"}
    raise _wrong(where, key, names[hint], value)


def _one_of(hints: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    for hint in kinds[:-1]:
        try:
            return _value(hint, value, where, key)
        except ConfigError:
            continue
    return _value(kinds[-1], value, where, key)


def _number(value: Any, where: str, key: str) -> float:
    # YAML 1.1 takes 1e-3, without a point, for a string.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(where, key, "a number", value)
    try:
        return float(value)
    except ValueError:
        raise _wrong(where, key, "a number", value) from None


def _wrong(where: str, key: str, rule: str, value: Any) -> ConfigError:
    return ConfigError(f"{where}: {key} must be {rule}, got {value!r}")
