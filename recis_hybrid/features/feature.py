"""Feature: the name of an output column, and how it comes about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recis_hybrid.features.op import Op


@dataclass(frozen=True)
class Feature:
    """One column that the engine gives: a column of the batch, through operations.

    Args:
        name: The column's name in the batch that the engine returns.
        ops: Operations, the first one first; none gives the column as it is.
        source: The column that it is made of; None stands for the column called ``name``.

    Raises:
        TypeError: If a name is not a string, or what is in ``ops`` is no operation.
        ValueError: If a name is empty, or an operation's parameters are not right.

    Example:
        >>> Feature("user_small", ops=[Hash("farm"), Mod(1000)], source="user")
        Feature(name='user_small', ops=(Hash(kind='farm'), Mod(n=1000)), source='user')
    """

    name: str
    ops: Sequence[Op] = ()
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.name if self.source is None else self.source)
        for field, value in (("name", self.name), ("source", self.source)):
            if not isinstance(value, str):
                raise TypeError(f"Feature {self.name!r}: {field} must be a string, got {type(value).__name__}")
            if not value:
                raise ValueError(f"Feature {self.name!r}: {field} must not be empty; it names a column")
        if isinstance(self.ops, str) or not isinstance(self.ops, Sequence):
            raise TypeError(
                f"Feature {self.name!r}: ops must be a list of operations, got {self.ops!r}; write ops=[...]"
            )
        object.__setattr__(self, "ops", tuple(self.ops))
        for position, op in enumerate(self.ops):
            if isinstance(op, type) or not (hasattr(op, "fault") and hasattr(op, "kernel")):
                raise TypeError(
                    f"Feature {self.name!r}: ops[{position}] must be an operation such as Hash('farm') or Mod(1000), "
                    f"got {op!r}"
                )
            fault = op.fault()
            if fault is not None:
                raise ValueError(f"Feature {self.name!r}: {type(op).__name__}: {fault}")

    @property
    def column(self) -> str:
        """The name of the column that it is made of."""
        assert self.source is not None  # __post_init__ has put the name there
        return self.source
