"""What a training is to be, as a file says it: typed, and whatever is wrong is named by its key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

import yaml

from recis_hybrid.app.config_yaml import read_yaml
from recis_hybrid.columnio import CsvOptions


class ConfigError(ValueError):
    """A configuration is wrong; the message names the file, the key, the rule and what was found."""


@dataclass(frozen=True)
class Range:
    """Which numbers a key takes."""

    least: float
    below: float = math.inf
    """What it must be less than."""
    above: bool = False
    """Whether it must be above ``least``."""

    def fault(self, number: float) -> str | None:
        """Return the rule that a number breaks, or None."""
        if not math.isfinite(number):
            return f"finite, {self}"
        if number >= self.below:
            return str(self) if self.below < _MOST else f"less than {self.below}"
        return None if (self.least < number if self.above else self.least <= number) else str(self)

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        return least + (f" and less than {self.below}" if self.below < _MOST else "")


_MOST = 2**31
Count: TypeAlias = Annotated[int, Range(1, _MOST)]
Positive: TypeAlias = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """Spec of a column, where its type does not determine it."""

    default: bool | int | float | str | None = None
    """Replaces nulls; null: nulls are refused."""
    length: Count | None = None
    """Length of all lists of the column; empty lists count as missing if there is a default."""
    null_as_empty: bool = False
    """Whether null lists are read as empty lists; false: they are refused."""
    unit: Literal["D", "s", "ms", "us", "ns"] | None = None
    """Unit of dates, times and durations, read as integers: days to nanoseconds; None: seconds."""
    format: str | None = None
    """How strings write dates or times, by the directives of strptime: ``%d/%m/%Y``; None: by ISO 8601, if ``unit`` is
    given."""
    scale: Annotated[int, Range(0, 39)] | None = None
    """Reads decimals as integers, times 10**scale; None: as floats, or as integers if all are whole."""


@dataclass(frozen=True, kw_only=True)
class CsvConfig:
    """How CSV files are written."""

    delimiter: str | None = None
    """Delimiter of fields, one character; None: a tab for ``.tsv``, a comma for others."""
    quote: str | None = '"'
    """Quote around fields with delimiters or line breaks; None: no quoting."""
    escape: str | None = None
    """Escape character, as a backslash; None: none."""
    column_names: list[str] | None = None
    """Names of columns of files without a header; None: those of the first line."""
    comment: str | None = None
    """Prefix of lines to skip; None: none."""
    encoding: str = "utf-8"
    """Encoding, by Python's name."""
    null_values: list[str] | None = None
    """Spellings of nulls, also of text; None: the empty field and the usual spellings, for numbers only."""

    def __post_init__(self) -> None:
        CsvOptions(**vars(self))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from."""

    train: str | list[str]
    """File, folder, pattern or URL, or a list of these."""
    evaluate: str | list[str] | None = None
    """As ``train``; None: nothing is evaluated."""
    label: str = "label"
    """Column of labels, 0 or 1."""
    groups: str | None = None
    """Column of int64 groups, for the metric gauc."""
    columns: dict[str, ColumnConfig] = field(default_factory=dict)
    """Specs of columns, by name, that differ from the default of their type."""
    csv: CsvConfig = CsvConfig()
    """How CSV files are written."""
    partitions: bool = True
    """Whether folders named ``key=value`` give their files a column."""
    batch_size: Count = 4096
    """Rows of a batch, on each rank."""
    shuffle: bool = True
    """Whether each pass has a random order of its own."""
    threads: Count = 1
    """Threads that read."""

    def __post_init__(self) -> None:
        if self.train in ("", []) or self.evaluate in ("", []):
            raise ValueError("train and evaluate must name a file, a folder, a pattern or a URL, got nothing")


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

    def sources(self, name: str) -> list[str]:
        """Return the columns that a feature reads."""
        return self.source if isinstance(self.source, list) else [self.source or name]

    def __post_init__(self) -> None:
        for key in ("table", "combiner", "min_frequency", "std"):
            if self.dim is None and getattr(self, key) != getattr(FeatureConfig, key):
                raise ValueError(f"{key} is of an embedding; give the feature a dim, or leave {key} out")


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
    clip_grad_norm: Annotated[float, Range(0, above=True)] | None = None
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

    def __post_init__(self) -> None:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must differ, got {self.metrics}")
        if self.checkpoint_whole_every > 1 and self.checkpoint_steps is None:
            raise ValueError("checkpoint_whole_every counts the checkpoints of checkpoint_steps; give both or none")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training."""

    run: str
    """Folder for checkpoints and log.jsonl. It may be a URL."""
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
    seed: Annotated[int, Range(0, 2**63)] = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run must name a folder, got ''")
        train, data = self.train, self.data
        if train.tensorboard and is_url(self.run):
            raise ValueError(f"train.tensorboard writes into a folder, and run is a URL, {self.run}; leave one out")
        if train.patience is not None and not train.metrics:
            raise ValueError("train.patience waits for the first of train.metrics; name one, or leave patience out")
        if "gauc" in train.metrics and data.groups is None:
            raise ValueError("train.metrics has gauc, which is by group; name the column of groups in data.groups")
        read = {name for name in (data.label, data.groups) if name is not None}
        for name, feature in self.features.items():
            sources = feature.sources(name)
            read |= set(sources)
            if data.label in sources:
                raise ValueError(
                    f"features.{name} reads the label column {data.label!r}, which the model is to predict; leave the "
                    f"feature out, or name another column in data.label"
                )
        for name in data.columns:
            if name not in read:
                close = difflib.get_close_matches(name, read, 1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"data.columns.{name} is not used; {hint}Columns are {sorted(read)}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Paths in the file are relative to the folder that it lies in, those in overrides to the current directory; absolute
    paths and URLs stay as they are, and ``~`` is the home directory.

    Args:
        path: A YAML file, read by the core schema of YAML 1.2.
        overrides: Each ``a.b=value``, the value in YAML; of several for one key the last counts.

    Raises:
        ConfigError: It cannot be read, a key is unknown, missing or of a wrong type.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except IsADirectoryError as error:
        there = path / "config.yaml"
        hint = f"; did you mean {there}?" if there.is_file() else ""
        raise ConfigError(f"{path}: must be a YAML file, this is a folder{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_config(raw, str(path), path.parent, overrides)


def parse_config(raw: bytes, where: str, folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that a file holds; see :func:`load_config`.

    Args:
        raw: What is in the file.
        where: The file, for messages.
        folder: Where relative paths in it begin.
        overrides: As of :func:`load_config`.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    try:
        tree = read_yaml(raw, where)
    except yaml.YAMLError as error:
        hint = "\nindent by spaces" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{where}: cannot be read as YAML: {error}{hint}") from error
    if tree is None:
        raise ConfigError(f"{where}: the file is empty; `recis-hybrid init` writes one to begin with")
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, got a {_kind_of(tree)}")
    _resolve(tree, folder)
    for override in overrides:
        _override(tree, override)
    _resolve(tree, Path())
    return parse(Config, tree, where)


def is_url(path: str) -> bool:
    """Whether a path is a URL, as ``s3://bucket/clicks`` is."""
    return "://" in path


def _resolve(tree: Mapping[str, Any], folder: Path) -> None:
    """Resolve relative paths in a tree; values of a wrong type are left for :func:`parse`."""

    def resolve(mapping: Any, key: str) -> None:
        if not isinstance(mapping, dict):
            return
        value = mapping.get(key)
        if isinstance(value, str):
            mapping[key] = resolved(value)
        elif isinstance(value, list):
            mapping[key] = [resolved(each) if isinstance(each, str) else each for each in value]

    def resolved(text: str) -> str:
        return text if not text or is_url(text) else os.path.normpath(folder / Path(text).expanduser())

    resolve(tree, "run")
    resolve(tree.get("data"), "train")
    resolve(tree.get("data"), "evaluate")
    features = tree.get("features")
    for feature in features.values() if isinstance(features, dict) else ():
        ops = feature.get("ops") if isinstance(feature, dict) else None
        for op in ops if isinstance(ops, list) else ():
            vocabulary = op.get("vocabulary") if isinstance(op, dict) else None
            if isinstance(vocabulary, dict) and isinstance(vocabulary.get("source"), str):
                resolve(vocabulary, "source")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, as train.epochs=3")
    try:
        value = read_yaml(text, key)
    except yaml.YAMLError as error:
        quoted = text.replace("'", "''")
        raise ConfigError(
            f"override {override!r}: the value is no YAML; a string goes into quotes that the shell leaves, "
            f"{key}=\"'{quoted}'\": {error}"
        ) from error
    parts, done = key.split("."), 0
    while True:
        # A name, of a feature for instance, may have dots of its own.
        names = {stop: ".".join(parts[done:stop]) for stop in range(len(parts), done, -1)}
        done = next((stop for stop, name in names.items() if name in tree), done + 1)
        name = names[done]
        if done == len(parts):
            tree[name] = value
            return
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            raise ConfigError(f"override {override!r}: {name} is {_shown(tree[name])}, which has no keys below it")
        tree = tree[name]


T = TypeVar("T")


def parse(cls: type[T], tree: Mapping[str, Any], where: str, key: str = "") -> T:
    """Make a dataclass of a tree of plain values, checking types all the way down.

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
            close = _meant(str(name), cls)
            hint = f"; did you mean {inner}{close}?" if close else "."
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
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{error}") from error


def _meant(name: str, cls: type) -> str | None:
    """Return the nearest key to an unknown one, in this section or one below."""
    hints = typing.get_type_hints(cls)
    below = {
        key: f"{part}.{key}" for part, of in hints.items() if dataclasses.is_dataclass(of) for key in of.__annotations__
    }
    known = {**below, **{key: key for key in hints}}
    close = difflib.get_close_matches(name, known, 1)
    return known[close[0]] if close else None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _value(arguments[0], value, where, key)
        if (rule := arguments[1].fault(number)) is not None:
            raise _wrong(where, key, rule, value)
        return number
    if dataclasses.is_dataclass(hint):
        value = {} if value is None else value  # a section or feature of which nothing is said
        if not isinstance(value, Mapping):
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
        if not isinstance(value, Mapping):
            raise _wrong(where, key, "a mapping of keys", value)
        return {str(name): _value(arguments[1], each, where, f"{key}.{name}") for name, each in value.items()}
    if hint is float and type(value) is int:
        return float(value) if abs(value) < 2**1023 else math.inf
    if hint is Any or (type(value) is hint):
        return value
    raise _wrong(where, key, _RULES[hint], value)


_RULES = {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "null"}


def _one_of(hints: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    if len(kinds) == 1 or (isinstance(value, list) and typing.get_origin(kinds[-1]) is list):
        return _value(kinds[-1], value, where, key)
    for hint in kinds:
        if type(value) is hint:
            return value
    rules = [_RULES.get(hint, "a list") for hint in kinds]
    raise _wrong(where, key, f"{', '.join(rules[:-1])} or {rules[-1]}", value)


def _wrong(where: str, key: str, rule: str, value: Any) -> ConfigError:
    hint = ""
    if isinstance(value, str) and rule.startswith(("a number", "an integer", "at least")):
        plain = value.replace("_", "")
        quoted = re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?", plain) is not None
        hint = f"; write {plain}, without {'quotes' if plain == value else 'underscores'}" if quoted else ""
    elif isinstance(value, float) and rule == "an integer" and value.is_integer():
        hint = f"; write {int(value)}"
    elif rule == "a mapping of keys" and isinstance(value, str) and ".ops[" in key:
        hint = f"; write {{{value}: {{}}}}"
    elif rule.startswith("a string") and isinstance(value, int | float):
        hint = "; put it into quotes"
    return ConfigError(f"{where}: {key} must be {rule}, got {_shown(value)}{hint}")


def _shown(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)


def _kind_of(value: Any) -> str:
    return {str: "string", type(None): "null", int: "number", float: "number"}.get(type(value), type(value).__name__)
