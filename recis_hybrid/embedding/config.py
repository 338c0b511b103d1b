"""EmbeddingConfig: the settings of one feature's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from recis_hybrid import ops
from recis_hybrid.embedding.gate import Admission
from recis_hybrid.embedding.initializers import Initializer, Normal
from recis_hybrid.embedding.optimizer import OptimizerSpec
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.validation import check_choice, check_flag, check_integer, check_method, check_type, describe_value

COMBINERS = ("sum", "mean", "sqrtn", "max", "tile", None)
SHARDINGS = ("row", "table", "column", "replicated", "auto")
TABLE_SETTINGS = (
    "dim",
    "dtype",
    "state_dtype",
    "initializer",
    "admission",
    "optimizer",
    "optimizer_overrides",
    "placement",
    "sharding",
    "expected_rows",
)
"""Settings that must be equal for all features of a table."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Settings of a feature's embedding: its table, and how ids become vectors.

    Example:
        >>> EmbeddingConfig(dim=16, table="item", combiner="mean").combiner
        'mean'
    """

    dim: int
    """Elements of a vector."""
    table: str | None = None
    """Name of the member table; features with the same table share its rows. None: the feature's name."""
    dtype: torch.dtype = torch.float32
    """Dtype in which embeddings are stored: float32, bfloat16 or float16. Outputs are always float32."""
    state_dtype: torch.dtype | None = None
    """Dtype in which optimizer state is stored: float32 (None), or that of the embedding."""
    combiner: Literal["sum", "mean", "sqrtn", "max", "tile"] | None = "sum"
    """Combiner of the vectors of a bag. ``sum``: their weighted sum; ``mean``: divided by the sum of weights;
    ``sqrtn``: divided by the root of the sum of squared weights; ``max``: the maximum of each element; ``tile``: the
    first ``max_length`` vectors concatenated; None: not combined, one vector for each id. An empty bag yields zeros."""
    max_length: int | None = None
    """Number of ids of a bag that are used, from the start; None: all."""
    weights: str | None = None
    """Column with a weight for each id, in the shape of the ids. For ids in a RaggedTensor: a RaggedTensor with equal
    offsets, or ``[n]`` in the order of the ids. None: the weights of the RaggedTensor of ids, if it has any."""
    initializer: Initializer = field(default_factory=Normal)
    """First values of rows."""
    unknown: Literal["first_value", "zeros"] = "first_value"
    """Vector of an id without a row, in evaluation and in training before it is admitted: the first value that its row
    would have, or zeros."""
    admission: Admission | None = None
    """Rule for which ids get a row; None: every id that occurs in training."""
    trainable: bool = True
    """False freezes the feature: its lookups insert nothing, count nothing and take no gradients, as in evaluation. A
    table whose features are all frozen is read-only, and its rows have no optimizer state. If features of a table
    differ, those that are not frozen train it, and in each batch they are looked up first."""
    optimizer: type[Any] | OptimizerSpec | None = None
    """Optimizer of this table, e.g. ``optim.RowwiseAdagrad`` or ``optim.Adagrad.spec(lr=0.1)``; None: that of the
    engine. Its hyperparameters are those of the spec, and otherwise the class's defaults. Any optimizer that is built
    over the engine's tables updates this one by this rule, in a parameter group of its own."""
    optimizer_overrides: Mapping[str, float | tuple[float, float]] | None = None
    """Hyperparameters of the optimizer for this table only, e.g. ``{"lr": 0.1}``."""
    placement: Placement | None = None
    """Memory of the table's rows; None: that of the engine's device."""
    sharding: Literal["row", "table", "column", "replicated", "auto"] = "row"
    """Distribution of rows over several ranks. ``row``: over all ranks by the hash of their ids; ``table``: all on
    one rank; ``column``: some elements of every row, at least 4, on each rank; ``replicated``: all on every rank, so
    that lookups need no exchange of rows; ``auto``: the fastest according to
    :func:`recis_hybrid.embedding.sharding_of`, which needs ``expected_rows``. Results do not depend on it."""
    expected_rows: int | None = None
    """Approximate number of ids; used by ``sharding="auto"`` only."""
    optional: bool = False
    """True if a batch may lack the feature's column; the output then lacks it too."""

    def __post_init__(self) -> None:
        self._refuse_types()
        check_choice("EmbeddingConfig", "combiner", self.combiner, COMBINERS)
        if self.table == "":
            raise ValueError("EmbeddingConfig: table must not be an empty name; omit it to use the feature's name")
        if self.dtype not in ops.blocks.ELEMENTS:
            raise ValueError(f"EmbeddingConfig: dtype must be one of {list(ops.blocks.ELEMENTS)}, got {self.dtype}")
        if self.state_dtype not in (None, torch.float32, self.dtype):
            raise ValueError(
                f"EmbeddingConfig: state_dtype must be torch.float32 or the dtype {self.dtype}, got {self.state_dtype}"
            )
        if self.combiner == "tile" and self.max_length is None:
            raise ValueError(
                "EmbeddingConfig: the combiner 'tile' needs max_length, the number of concatenated vectors"
            )
        if self.weights is not None and self.combiner in ("max", "tile", None):
            raise ValueError(f"EmbeddingConfig: the combiner {self.combiner!r} takes no weights; omit them")
        if self.optimizer_overrides is not None:
            fixed = {name: tuple(v) if isinstance(v, list) else v for name, v in self.optimizer_overrides.items()}
            object.__setattr__(self, "optimizer_overrides", fixed)
        check_choice("EmbeddingConfig", "sharding", self.sharding, SHARDINGS)
        check_choice("EmbeddingConfig", "unknown", self.unknown, ("first_value", "zeros"))

    def _refuse_types(self) -> None:
        where = "EmbeddingConfig"
        object.__setattr__(self, "dim", check_integer(where, "dim", self.dim, low=1))  # also converts numpy integers
        for name in ("max_length", "expected_rows"):
            if getattr(self, name) is not None:
                check_integer(where, name, getattr(self, name), low=1)
        for name in ("table", "weights"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{where}: {name} must be a name or None, got {getattr(self, name)!r}")
        for name in ("trainable", "optional"):
            check_flag(where, name, getattr(self, name))
        check_method(where, "initializer", self.initializer, "draw", "Constant(0.5)")
        if self.admission is not None:
            check_method(where, "admission", self.admission, "gate", "MinFrequency(3)")
        object.__setattr__(self, "optimizer", OptimizerSpec.of(where, self.optimizer))
        overrides, placement = self.optimizer_overrides, self.placement
        if overrides is not None:
            check_type(where, "optimizer_overrides", overrides, Mapping, "a mapping, e.g. {'lr': 0.1}, or None")
        if placement is not None:
            expected = "a Placement, e.g. Placement(id_map='cpu', blocks='cpu'), or None"
            check_type(where, "placement", placement, Placement, expected)

    @property
    def optimizer_spec(self) -> OptimizerSpec | None:
        """The table's own optimizer; None if it has none, or is not trained."""
        return OptimizerSpec.of("EmbeddingConfig", self.optimizer) if self.trainable else None

    @property
    def width(self) -> int:
        """Elements of the output of a bag, or of an id if there is no combiner."""
        return self.dim * (self.max_length or 1) if self.combiner == "tile" else self.dim


def check_configs(configs: object) -> None:
    """Raise TypeError or ValueError unless configs are a non-empty mapping by feature name."""
    if not isinstance(configs, Mapping):
        raise TypeError(
            f"EmbeddingEngine: configs must be a mapping from features to configs, e.g. "
            f"{{'item': EmbeddingConfig(dim=16)}}, got {describe_value(configs)}"
        )
    for name in configs:
        if not isinstance(name, str):
            raise TypeError(f"EmbeddingEngine: the names of features must be strings, got {name!r}")
    if not configs:
        raise ValueError("EmbeddingEngine: configs must have at least one feature, got none")
