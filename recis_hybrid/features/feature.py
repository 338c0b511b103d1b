"""Feature: the name of an output column, and the operations that compute it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral
from typing import Any, TypeAlias

from recis_hybrid.features.op import Compound, Op, missing_method

Source: TypeAlias = "str | Feature"
"""The name of a column of the batch, or a feature that is computed but not returned."""


def with_ints(op: Op | Compound) -> Op | Compound:
    """Return an operation with NumPy integers replaced by Python integers."""
    if isinstance(op, type) or not is_dataclass(op):
        return op
    values = {field.name: getattr(op, field.name) for field in fields(op) if field.init}
    plain = {name: _plain(value) for name, value in values.items()}
    changed = {name: value for name, value in plain.items() if value is not values[name]}
    return replace(op, **changed) if changed else op


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        plain = tuple(_plain(one) for one in value)
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else plain
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


@dataclass(frozen=True)
class Feature:
    """A column of the output, computed from columns of the batch by a chain of operations.

    With several sources each operation applies to every column, until one joins them (:class:`Cross`,
    :class:`Concat`). :class:`MultiHash` splits a column into several. If several are left at the end of the chain, they
    are named ``name_0``, ``name_1``, and so on, or as the last operation names them (:class:`Tokenize`).

    Args:
        name: Name of the column in the batch that the engine returns.
        ops: Operations in the order in which they apply; an empty list returns the column unchanged.
        source: The name of a column, or a list of names and features; None for the column ``name``.
        optional: Whether to omit the feature, instead of raising, if the batch lacks one of its columns.

    Raises:
        TypeError: If a name is not a string, ``optional`` is not a bool, or an element of ``ops`` is not an operation.
        ValueError: If a name is empty, or a parameter of an operation is invalid.

    Example:
        >>> Feature("user_small", ops=[Hash("farm"), Mod(1000)], source="user")
        Feature('user_small', ops=[Hash(kind='farm'), Mod(n=1000)], source='user')
        >>> Feature("pair", ops=[Hash(), Cross()], source=["user", "item"]).columns
        ('user', 'item')
    """

    name: str
    ops: Sequence[Op | Compound] = ()
    source: Source | Sequence[Source] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        source = self.name if self.source is None else self.source
        if not isinstance(self.name, str):
            raise TypeError(f"Feature {self.name!r}: name must be a string, got {type(self.name).__name__}")
        if not isinstance(source, str | Feature):
            if not isinstance(source, Sequence):
                raise TypeError(f"Feature {self.name!r}: source must be a string, got {type(source).__name__}")
            source = tuple(source)
            if not source:
                raise ValueError(f"Feature {self.name!r}: source must name at least one column, got none")
        object.__setattr__(self, "source", source)
        if not isinstance(self.optional, bool):
            raise TypeError(f"Feature {self.name!r}: optional must be True or False, got {self.optional!r}")
        for field, value in (("name", self.name), *(("source", one) for one in self.sources)):
            if field == "source" and isinstance(value, Feature):
                continue
            if not isinstance(value, str):
                raise TypeError(f"Feature {self.name!r}: {field} must be a string, got {type(value).__name__}")
            if not value:
                raise ValueError(f"Feature {self.name!r}: {field} must not be empty; name a column")
        if isinstance(self.ops, str) or not isinstance(self.ops, Sequence):
            raise TypeError(
                f"Feature {self.name!r}: ops must be a list of operations, got {self.ops!r}; write ops=[...]"
            )
        object.__setattr__(self, "ops", tuple(with_ints(op) for op in self.ops))
        for position, op in enumerate(self.ops):
            if isinstance(op, type) or missing_method(op) is not None:
                raise TypeError(
                    f"Feature {self.name!r}: ops[{position}] must be an operation such as Hash('farm') or Mod(1000), "
                    f"got {op!r}"
                )
            fault = op.fault()
            if fault is not None:
                raise ValueError(f"Feature {self.name!r}: {type(op).__name__}: {fault}")
            try:
                hash(op)
            except TypeError:
                raise TypeError(
                    f"Feature {self.name!r}: ops[{position}] must be hashable, because equal operations are computed "
                    f"once, got {type(op).__name__}; make it a @dataclass(frozen=True) with hashable parameters"
                ) from None

    def __repr__(self) -> str:
        source = list(self.sources) if isinstance(self.source, tuple) else self.source
        parts = [
            repr(self.name),
            f"ops={list(self.ops)!r}" if self.ops else "",
            f"source={source!r}" if source != self.name else "",
            "optional=True" if self.optional else "",
        ]
        return f"Feature({', '.join(filter(None, parts))})"

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, one or several."""
        assert self.source is not None  # __post_init__ replaced None by the name
        return self.source if isinstance(self.source, tuple) else (self.source,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that the feature reads, each once."""
        return tuple(dict.fromkeys(self._columns()))

    def _columns(self) -> Iterator[str]:
        for source in self.sources:
            if isinstance(source, Feature):
                yield from source._columns()
            else:
                yield source
