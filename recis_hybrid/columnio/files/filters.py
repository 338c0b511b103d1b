"""Conditions on rows, and the pieces that footers and folder names rule out. Imports pyarrow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recis_hybrid.columnio.convert.layouts import field_type, nested_names, resolve
from recis_hybrid.columnio.convert.numbers import ArrowType
from recis_hybrid.columnio.files.comparisons import COMPARE, condition_expression, footer_decides

Filters: TypeAlias = Any
"""A ``pyarrow.compute.Expression``, a list of (column, operator, value) conditions that must all hold, or a list of
such lists, of which at least one must hold."""

Condition: TypeAlias = tuple[str, str, Any]

_OPERATORS = ("=", *COMPARE, "in", "not in")
# Errors that pyarrow raises for expressions that do not fit the columns or cannot be computed.
_FILTER_ERRORS = (pa.ArrowException, ValueError, TypeError, NotImplementedError, KeyError, OverflowError)


@dataclass(frozen=True)
class BoundFilter:
    """A condition on the columns of one file."""

    expression: Any
    """A ``pyarrow.compute.Expression``."""
    columns: Sequence[str]
    """Columns of the expression."""
    prunes: bool
    """True if footer statistics may rule out pieces; False if they could rule out a row that the condition keeps."""
    text: str
    """Text of the condition, for messages."""

    def __call__(self, batch: Any, file: str) -> Any:
        """Return the rows of a RecordBatch for which the condition holds.

        Raises:
            ValueError: The condition cannot be computed.
        """
        try:
            return batch.filter(self.expression)
        except _FILTER_ERRORS as error:
            raise ValueError(
                f"ColumnDataset: filters {self.text} cannot be computed for rows of {file} ({error}); change the "
                f"expression, or write it as (column, operator, value), which converts the value to the column's type"
            ) from error


@dataclass(frozen=True)
class RowFilter:
    """A condition on rows, independent of the types of the columns in a file."""

    expression: Any
    """A ``pyarrow.compute.Expression``; None if there are conditions."""
    conditions: Sequence[Sequence[Condition]]
    """A row is kept if all conditions of at least one sequence hold."""

    @classmethod
    def of(cls, filters: Filters) -> RowFilter:
        """Return the filter of the argument ``filters``.

        Args:
            filters: See ``Filters``; not None.

        Raises:
            TypeError: ``filters`` is neither an expression nor such a list.
            ValueError: An operator is unknown.
        """
        if isinstance(filters, pc.Expression):
            return cls(filters, ())
        groups: Any = filters
        if isinstance(filters, Sequence) and not isinstance(filters, str) and filters:
            if _is_condition(filters):
                groups = [[filters]]
            elif all(map(_is_condition, filters)):
                groups = [filters]
            if all(isinstance(group, Sequence) and group and all(map(_is_condition, group)) for group in groups):
                conditions = tuple(tuple(_condition(*each) for each in group) for group in groups)
                return cls(None, conditions)
        raise TypeError(
            f"ColumnDataset: filters must be a pyarrow expression or a list of (column, operator, value), got "
            f"{filters!r}"
        )

    def __str__(self) -> str:
        """Return a unique description of the condition."""
        if self.expression is not None:
            text = str(self.expression)
            if "..." in text:
                # pyarrow abbreviates long values in its text, but not in the pickled expression.
                pickled = self.expression.__reduce__()[1][0]
                text += f" #{hashlib.blake2b(memoryview(pickled), digest_size=8).hexdigest()}"
            return text
        groups = [
            " and ".join(f"({name} {sign} {_abbreviated(value)})" for name, sign, value in g) for g in self.conditions
        ]
        return " or ".join(groups)

    def bound(self, opened: Any) -> BoundFilter:
        """Return the condition for the columns of an OpenedFile.

        Raises:
            TypeError: A value cannot be compared with its column.
            ValueError: A column is missing, or the condition does not fit the columns.
        """
        if self.expression is not None:
            return self._bound_expression(opened.schema)
        expression: Any = None
        names: dict[str, None] = {}
        prunes = True
        for group in self.conditions:
            group_expression: Any = None
            for name, sign, value in group:
                names[name] = None
                arrow_type = opened.type_of(name)
                # The footer does not list fields of structs by dotted names.
                prunes &= name in opened.schema.names and footer_decides(sign, value, arrow_type)
                one = condition_expression(name, sign, value, arrow_type)
                group_expression = one if group_expression is None else group_expression & one
            expression = group_expression if expression is None else expression | group_expression
        return BoundFilter(expression, list(names), prunes, str(self))

    def _bound_expression(self, schema: Any) -> BoundFilter:
        nested = _nested_types(schema)
        empty = pa.schema([*schema, *nested]).empty_table()
        try:
            empty.filter(self.expression)
        except _FILTER_ERRORS as error:
            raise ValueError(
                f"ColumnDataset: filters {self} do not fit the columns {schema.names} ({error}); change the expression"
            ) from error
        # An expression does not expose its columns, but fails if one of them is missing.
        names = [
            name
            for name in dict.fromkeys(empty.schema.names)
            if not _is_computable(empty.drop_columns([name]), self.expression)
        ]
        prunes = all(name in schema.names for name in names)
        if prunes and any(_has_floats(schema.field(name).type) for name in names):
            text = str(self.expression)
            prunes = "!=" not in text and set(re.findall(r"(\w+)\(", text)) <= {"and_kleene", "or_kleene"}
        return BoundFilter(self.expression, names, prunes, str(self))

    def possible_pieces(self, opened: Any, pieces: int) -> list[int]:
        """Return the pieces that may have matching rows, according to folder names and the Parquet footer.

        Args:
            opened: An OpenedFile with this condition.
            pieces: Number of its pieces.
        """
        condition, file, schema, footer = opened.condition, opened.file, opened.schema, opened.contents.footer
        if not condition.prunes or not (opened.partition or isinstance(footer, pq.FileMetaData)):
            return list(range(pieces))
        folders = [name for name in opened.partition if name in condition.columns]
        in_file = [name for name in folders if name in opened.contents.schema.names]
        if not all(_holds_only(footer, name, opened.partition_value(name)) for name in in_file):
            # A file that contradicts its folder name must raise, not be skipped.
            return list(range(pieces))
        formats = ds.ParquetFileFormat()
        known = pc.scalar(True)
        for name in folders:
            value = opened.partition_value(name)
            known &= pc.field(name) == value if value.is_valid else pc.field(name).is_null()
        fragment = formats.make_fragment(file.path, file.filesystem, partition_expression=known)
        # Used only to evaluate the filter on statistics; it opens no file.
        dataset = ds.FileSystemDataset([fragment], schema, formats, pafs.LocalFileSystem())
        try:
            if not list(dataset.get_fragments(filter=condition.expression)):
                return []
            if not isinstance(footer, pq.FileMetaData):
                return list(range(pieces))
            return [group.id for group in fragment.subset(filter=condition.expression, schema=schema).row_groups]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            # The expression cannot be evaluated on the statistics of the footer; read the rows.
            return list(range(pieces))


def _holds_only(footer: Any, name: str, value: Any) -> bool:
    """Return whether the Parquet footer proves that all values of a column equal ``value``."""
    if not isinstance(footer, pq.FileMetaData) or not value.is_valid:
        return False
    columns = [number for number in range(footer.num_columns) if footer.schema.column(number).path == name]
    for group in range(footer.num_row_groups):
        for number in columns:
            statistics = footer.row_group(group).column(number).statistics
            if (
                statistics is None
                or not statistics.has_min_max
                or not statistics.has_null_count
                or statistics.null_count
            ):
                return False
            if {statistics.min, statistics.max} != {value.as_py()}:
                return False
    return len(columns) == 1


def _is_computable(table: Any, expression: Any) -> bool:
    try:
        table.filter(expression)
    except _FILTER_ERRORS:
        return False
    return True


def _nested_types(schema: Any) -> list[Any]:
    fields = []
    for name in nested_names(schema):
        place = resolve(schema, name)
        if place is not None:
            fields.append(pa.field(name, field_type(schema.field(place[0]).type, place[1])))
    return fields


def _has_floats(arrow_type: ArrowType) -> bool:
    if pa.types.is_nested(arrow_type):
        return any(_has_floats(arrow_type.field(number).type) for number in range(arrow_type.num_fields))
    return bool(pa.types.is_floating(arrow_type))


def _is_condition(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(each, str) for each in value[:2])


def _condition(name: str, sign: str, value: Any) -> Condition:
    if sign not in _OPERATORS:
        raise ValueError(
            f"ColumnDataset: filters must use one of {', '.join(_OPERATORS)}, got {sign!r} in {(name, sign, value)}"
        )
    if sign not in ("in", "not in"):
        return name, "==" if sign == "=" else sign, _plain_value(value)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, {value!r}) needs a list, set or array of values; write "
            f"[{value!r}]"
        )
    values = value.to_pylist() if isinstance(value, pa.Array | pa.ChunkedArray) else list(value)
    if isinstance(value, set | frozenset):
        # Use the same order in every process.
        values.sort(key=repr)
    return name, sign, [_plain_value(each) for each in values]


def _plain_value(value: Any) -> Any:
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else value
    if isinstance(value, np.generic):
        return value.item()
    # Missing values of pandas, without importing pandas.
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _abbreviated(value: Any) -> str:
    text = repr(value)
    if len(text) <= 200:
        return text
    return f"{text[:80]}... #{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
