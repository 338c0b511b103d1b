"""Keys of a configuration, with their types, defaults and meanings."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from recis_hybrid.columnio import CsvOptions


@dataclass(frozen=True)
class Range:
    """Range of valid numbers for a key."""

    least: float
    below: float = math.inf
    """Exclusive upper bound."""
    above: bool = False
    """True if ``least`` itself is excluded."""

    def fault(self, number: float) -> str | None:
        """Return the rule that a number violates, or None."""
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
Bytes: TypeAlias = Annotated[int, Range(1, 2**63)]
Positive: TypeAlias = Annotated[float, Range(0)]
Sparse: TypeAlias = Literal[
    "adam",
    "adagrad",
    "rowwise_adagrad",
    "sgd",
    "adagrad_sum",
    "adam_l2",
    "adamw",
    "adamw_tf",
    "amsgrad",
    "ftrl",
    "lamb",
    "lion",
    "rmsprop",
    "rowwise_adam",
]


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """Options of a column that its type does not determine."""

    default: bool | int | float | str | None = None
    """Replaces nulls; None: nulls are refused."""
    length: Count | None = None
    """Length of all lists in the column; an empty list counts as missing if there is a default."""
    null_as_empty: bool = False
    """True to read null lists as empty lists; false: they are refused."""
    unit: Literal["D", "s", "ms", "us", "ns"] | None = None
    """Unit of dates, times and durations, read as integers: days to nanoseconds; None: seconds."""
    format: str | None = None
    """Format of dates or times in strings, with the directives of strptime, such as ``%d/%m/%Y``; None: ISO 8601 if
    ``unit`` is set."""
    scale: Annotated[int, Range(0, 39)] | None = None
    """Read decimals as integers, multiplied by 10**scale; None: as floats, or as integers if all are whole."""


@dataclass(frozen=True, kw_only=True)
class CsvConfig:
    """Dialect of CSV files."""

    delimiter: str | None = None
    """Delimiter of fields, one character; None: a tab in ``.tsv`` files, a comma in others."""
    quote: str | None = '"'
    """Quote character for fields with delimiters or line breaks; None: no quoting."""
    escape: str | None = None
    """Escape character, such as a backslash; None: none."""
    column_names: list[str] | None = None
    """Column names of files without a header; None: they are in the first line."""
    comment: str | None = None
    """Prefix of lines to skip; None: none."""
    encoding: str = "utf-8"
    """Encoding, by its Python name."""
    null_values: list[str] | None = None
    """Spellings of null, also in text columns; None: empty fields and the usual spellings, in number columns only."""

    def __post_init__(self) -> None:
        CsvOptions(**vars(self))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data to train on and to evaluate on."""

    train: str | list[str]
    """File, folder, pattern or URL, or a list of these."""
    evaluate: str | list[str] | None = None
    """As ``train``; None: no evaluations."""
    label: str = "label"
    """Label column, 0 or 1."""
    groups: str | None = None
    """Column of groups, int64, for the metric gauc."""
    columns: dict[str, ColumnConfig] = field(default_factory=dict)
    """Column options by name, where they differ from the defaults of the column's type."""
    csv: CsvConfig = CsvConfig()
    """Dialect of CSV files."""
    partitions: bool = True
    """True if folders named ``key=value`` add a column to their files."""
    batch_size: Count = 4096
    """Rows per batch on each rank."""
    shuffle: bool = True
    """True to read the rows in a new random order in each epoch."""
    threads: Count = 1
    """Reader threads."""

    def __post_init__(self) -> None:
        if self.train in ("", []) or self.evaluate in ("", []):
            raise ValueError("train and evaluate must name a file, a folder, a pattern or a URL, got nothing")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One input of the model."""

    source: str | list[str] | None = None
    """Column or columns to read; None: the column of the same name."""
    ops: list[dict[str, Any]] = field(default_factory=list)
    """Operations, each ``{name: {parameter: value}}``; ``features.registered_ops()`` lists the names."""
    dim: Count | None = None
    """Dimension of the embedding; None: a number that is passed to the tower unchanged."""
    table: str | None = None
    """Table of the embedding; features with the same table share it. None: a separate table."""
    combiner: Literal["sum", "mean", "sqrtn", "max"] = "sum"
    """Reduction of the vectors of a list of ids."""
    min_frequency: Count | None = None
    """Number of occurrences at which an id gets a row; None: the first."""
    evict_unused: Count | None = None
    """``train.evict_unused`` for the table; None: as there."""
    std: Positive = 0.01
    """Standard deviation of initial values."""
    optimizer: Sparse | None = None
    """Optimizer of the table; None: ``optimizer.sparse``."""
    lr: Positive | None = None
    """Learning rate of the table; None: ``optimizer.sparse_lr``."""
    disk: str | None = None
    """Existing folder on a local SSD for the records of the table, if it is larger than the memory; None: in memory."""
    cache_bytes: Bytes | None = None
    """Memory of each rank for the records of a table on disk that are used most; must hold all rows of a batch."""

    def sources(self, name: str) -> list[str]:
        """Return the columns that a feature reads."""
        return self.source if isinstance(self.source, list) else [self.source or name]

    def __post_init__(self) -> None:
        for key in ("table", "combiner", "min_frequency", "evict_unused", "std", "optimizer", "lr", "disk"):
            if self.dim is None and getattr(self, key) != getattr(FeatureConfig, key):
                raise ValueError(f"{key} applies to embeddings only; give the feature a dim, or remove {key}")
        if (self.disk is None) != (self.cache_bytes is None):
            raise ValueError(
                f"disk and cache_bytes belong together, got disk={self.disk!r}, cache_bytes={self.cache_bytes}; "
                f"set both, or neither for a table in memory"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model."""

    kind: Literal["mlp", "deepfm"] = "mlp"
    """``mlp``: a tower over all inputs. ``deepfm``: a tower plus a factorization machine; all ``dim`` must be equal."""
    hidden: list[Count] = field(default_factory=lambda: [128, 64])
    """Widths of the tower's layers."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout probability after each layer."""
    batch_norm: bool = False
    """True to use batch normalization."""
    compile: bool = False
    """True to compile the tower with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizers of the tower and of the tables."""

    dense_lr: Positive = 1e-3
    """Learning rate of the tower (Adam)."""
    sparse: Sparse = "adam"
    """Optimizer of the tables whose features name none."""
    sparse_lr: Positive = 1e-3
    """Learning rate of the tables whose features name none."""
    clip_grad_norm: Annotated[float, Range(0, above=True)] | None = None
    """Maximum global norm of gradients; None: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training schedule."""

    epochs: Count = 1
    """Passes over the training rows, each followed by an evaluation and a checkpoint."""
    accumulate: Count = 1
    """Batches per update."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the tower."""
    check_gradients: bool = False
    """True to check all gradients before each update; the error names tables, features and ids, or parameters."""
    device: str = "cpu"
    """Device of model and tables."""
    checkpoint_steps: Count | None = None
    """Steps between checkpoints within an epoch; None: only at its end."""
    checkpoint_whole_every: Count = 1
    """Every n-th checkpoint within an epoch is full, the others hold only changed table rows; 1: all are full."""
    keep: Count = 2
    """Number of checkpoints to keep."""
    log_every: Count = 50
    """Steps between log entries."""
    patience: Count | None = None
    """Evaluations without an improvement of the first metric before training stops; None: never stop."""
    evict_unused: Count | None = None
    """Evict, after each epoch, rows that were not seen for this number of steps; None: no eviction."""
    metrics: list[Literal["auc", "binned_auc", "gauc", "logloss", "normalized_entropy", "calibration", "mse"]] = field(
        default_factory=lambda: ["auc", "logloss"]
    )
    """Metrics of evaluations."""
    tensorboard: bool = False
    """True to also write the log for TensorBoard (needs the extra ``tensorboard``)."""
    mlflow: str | None = None
    """Experiment of MLflow to also write the log to (needs the extra ``mlflow``); None: none."""
    wandb: str | None = None
    """Project of Weights & Biases to also write the log to (needs the extra ``wandb``); None: none."""

    def __post_init__(self) -> None:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be distinct, got {self.metrics}")
        if self.checkpoint_whole_every > 1 and self.checkpoint_steps is None:
            raise ValueError("checkpoint_whole_every counts the checkpoints of checkpoint_steps; set both or neither")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a training run."""

    run: str
    """Folder or URL for checkpoints and log.jsonl."""
    data: DataConfig
    """Data to train on and to evaluate on."""
    features: dict[str, FeatureConfig]
    """Inputs of the model, by name."""
    model: ModelConfig = ModelConfig()
    """The model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizers of the tower and of the tables."""
    train: TrainConfig = TrainConfig()
    """Training schedule."""
    seed: Annotated[int, Range(0, 2**63)] = 0
    """Seed of all random numbers."""

    def evicted_tables(self) -> dict[str, int]:
        """Return, for each table with eviction, the number of steps after which unused rows are evicted."""
        found: dict[str, int | None] = {}
        for name, feature in self.features.items():
            if feature.dim is not None:
                steps = feature.evict_unused or self.train.evict_unused
                table = feature.table or name
                if found.setdefault(table, steps) != steps:
                    raise ValueError(
                        f"features.{name}.evict_unused must be that of the other features of the table {table}, "
                        f"{found[table]}, got {steps}"
                    )
        return {table: steps for table, steps in found.items() if steps is not None}

    def __post_init__(self) -> None:
        self.evicted_tables()  # raises if features of a table differ
        if not self.run:
            raise ValueError("run must name a folder, got ''")
        train, data = self.train, self.data
        if train.tensorboard and is_url(self.run):
            raise ValueError(f"train.tensorboard needs a folder, but run is a URL, {self.run}; change one of them")
        if train.patience is not None and not train.metrics:
            raise ValueError("train.patience needs a metric; name one in train.metrics, or remove patience")
        if "gauc" in train.metrics and data.groups is None:
            raise ValueError("train.metrics has gauc, which needs groups; name their column in data.groups")
        read = {name for name in (data.label, data.groups) if name is not None}
        for name, feature in self.features.items():
            sources = feature.sources(name)
            read |= set(sources)
            if data.label in sources:
                raise ValueError(
                    f"features.{name} reads {data.label!r}, the label that the model predicts; remove the feature, "
                    f"or name another column in data.label"
                )
        for name in data.columns:
            if name not in read:
                close = difflib.get_close_matches(name, read, 1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"data.columns.{name} is not used; {hint}Columns are {sorted(read)}")


def is_url(path: str) -> bool:
    """Return whether a path is a URL, such as ``s3://bucket/clicks``."""
    return "://" in path
