"""EmbeddingConfig: what a user says of one feature's embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recis_hybrid.embedding.initializers import Initializer, Normal
from recis_hybrid.ops.blocks import COMBINERS


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How a feature's ids become vectors.

    Example:
        >>> EmbeddingConfig(dim=16, table="item", combiner="mean").combiner
        'mean'
    """

    dim: int
    """Elements of a vector."""
    table: str | None = None
    """Member table; features that name the same one share rows. None: a table of the feature's own name."""
    combiner: Literal["sum", "mean"] = "sum"
    """How the vectors of a bag become one; an empty bag gives zeros."""
    initializer: Initializer = field(default_factory=Normal)
    """First values of rows."""

    def __post_init__(self) -> None:
        if self.dim <= 0:
            raise ValueError(f"EmbeddingConfig: dim must be positive, got {self.dim}")
        if self.combiner not in COMBINERS:
            raise ValueError(f"EmbeddingConfig: combiner must be one of {sorted(COMBINERS)}, got {self.combiner!r}")
        if self.table == "":
            raise ValueError("EmbeddingConfig: table must not be an empty name; leave it out for one of its own")
