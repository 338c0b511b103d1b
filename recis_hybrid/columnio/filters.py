"""Which rows of files are wanted. Imports pyarrow.

Conditions (column, operator, value) are computed exactly whatever the column's type: the value is brought to the type
of the column, never the column to that of the value, and what no value of the type can be is known to hold or not.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
import operator
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from .columns import UNITS
from .layouts import field_type, nested_names, resolve
from .numbers import ArrowType, is_text
from .temporal import is_temporal, tick_ns

Filters: TypeAlias = Any
"""A `pyarrow.compute.Expression`, or a list of (column, operator, value) of which all must hold, or a list of such
lists of which one must."""

Condition: TypeAlias = tuple[str, str, Any]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATORS = ("=", *_COMPARE, "in", "not in")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
# What pyarrow raises for expressions that do not suit, or cannot be computed.
_REFUSED = (pa.ArrowException, ValueError, TypeError, NotImplementedError, KeyError, OverflowError)


@dataclass(frozen=True)
class BoundFilter:
    """A condition on the columns of one file."""

    expression: Any
    """A `pyarrow.compute.Expression`."""
    columns: Sequence[str]
    """The columns that it looks at."""
    prunes: bool
    """Whether what a footer says of the columns may rule rows out: never more rows than the condition does."""
    text: str
    """The condition as it was given, for messages."""

    def __call__(self, batch: Any, file: str) -> Any:
        """Returns the rows of a RecordBatch for which the condition holds.

        Raises:
            ValueError: It cannot be computed.
        """
        try:
            return batch.filter(self.expression)
        except _REFUSED as error:
            raise ValueError(
                f"ColumnDataset: filters {self.text} cannot be computed for rows of {file} ({error}); change the "
                f"expression, or write it as (column, operator, value), which brings the value to the column's type"
            ) from error


@dataclass(frozen=True)
class RowFilter:
    """A condition on the columns of a row, whatever their types in a file."""

    expression: Any
    """A `pyarrow.compute.Expression`; None where there are conditions."""
    conditions: Sequence[Sequence[Condition]]
    """Of all conditions of one of these sequences each must hold."""

    @classmethod
    def of(cls, filters: Filters) -> RowFilter | None:
        """Reads what a user wrote.

        Args:
            filters: See `Filters`; None for all rows.

        Raises:
            TypeError: It is neither an expression nor such a list.
            ValueError: An operator is unknown.
        """
        if filters is None:
            return None
        if isinstance(filters, pc.Expression):
            return cls(filters, ())
        groups: Any = filters
        if isinstance(filters, Sequence) and not isinstance(filters, str) and filters:
            if _is_condition(filters):
                groups = [[filters]]
            elif all(map(_is_condition, filters)):
                groups = [filters]
            if all(isinstance(group, Sequence) and group and all(map(_is_condition, group)) for group in groups):
                made = tuple(tuple(_condition(*each) for each in group) for group in groups)
                return cls(None, made)
        raise TypeError(
            f"ColumnDataset: filters must be a pyarrow expression or a list of (column, operator, value), got "
            f"{filters!r}"
        )

    def __str__(self) -> str:
        """Returns the condition in words that tell it from every other one."""
        if self.expression is not None:
            text = str(self.expression)
            if "..." in text:
                # Long values are not written out; what is handed on by pickle is the whole expression.
                whole = self.expression.__reduce__()[1][0]
                text += f" #{hashlib.blake2b(memoryview(whole), digest_size=8).hexdigest()}"
            return text
        groups = [" and ".join(f"({name} {sign} {_shown(value)})" for name, sign, value in g) for g in self.conditions]
        return " or ".join(groups)

    def bound(self, opened: Any) -> BoundFilter:
        """Returns the condition on the columns of an OpenedFile.

        Raises:
            TypeError: A value cannot be compared with its column.
            ValueError: There is no such column, or the condition does not suit the columns.
        """
        if self.expression is not None:
            return self._bound_expression(opened.schema)
        made: Any = None
        names: dict[str, None] = {}
        prunes = True
        for group in self.conditions:
            together: Any = None
            for name, sign, value in group:
                names[name] = None
                arrow_type = opened.type_of(name)
                # A field of a struct has no name of its own in the footer.
                prunes &= name in opened.schema.names and _footer_decides(sign, value, arrow_type)
                one = _compiled(name, sign, value, arrow_type)
                together = one if together is None else together & one
            made = together if made is None else made | together
        return BoundFilter(made, list(names), prunes, str(self))

    def _bound_expression(self, schema: Any) -> BoundFilter:
        nested = _nested_types(schema)
        empty = pa.schema([*schema, *nested]).empty_table()
        try:
            empty.filter(self.expression)
        except _REFUSED as error:
            raise ValueError(
                f"ColumnDataset: filters {self} do not suit the columns {schema.names} ({error})"
            ) from error
        # An expression does not tell which columns it names, but fails where one of them is missing.
        names = [
            name
            for name in dict.fromkeys(empty.schema.names)
            if not _works(empty.drop_columns([name]), self.expression)
        ]
        prunes = all(name in schema.names for name in names)
        if prunes and any(_has_floats(schema.field(name).type) for name in names):
            text = str(self.expression)
            prunes = "!=" not in text and set(re.findall(r"(\w+)\(", text)) <= {"and_kleene", "or_kleene"}
        return BoundFilter(self.expression, names, prunes, str(self))

    def possible(self, opened: Any, pieces: int) -> list[int]:
        """Returns the pieces which may hold such rows, by what the names of folders and a Parquet footer say of them.

        Args:
            opened: An OpenedFile with this condition.
            pieces: How many it has.
        """
        condition, file, schema, footer = opened.condition, opened.file, opened.schema, opened.contents.footer
        if not condition.prunes or not (opened.partition or isinstance(footer, pq.FileMetaData)):
            return list(range(pieces))
        looked_at = [name for name in opened.partition if name in condition.columns]
        own = [name for name in looked_at if name in opened.contents.schema.names]
        if not all(_holds_only(footer, name, opened.partition_value(name)) for name in own):
            # A file that says otherwise than its folder is to be refused, not left out.
            return list(range(pieces))
        formats = ds.ParquetFileFormat()
        known = pc.scalar(True)
        for name in looked_at:
            value = opened.partition_value(name)
            known &= pc.field(name) == value if value.is_valid else pc.field(name).is_null()
        fragment = formats.make_fragment(file.path, file.filesystem, partition_expression=known)
        # Only asked for what it can rule out; it opens no file for that.
        folder = ds.FileSystemDataset([fragment], schema, formats, pafs.LocalFileSystem())
        try:
            if not list(folder.get_fragments(filter=condition.expression)):
                return []
            if not isinstance(footer, pq.FileMetaData):
                return list(range(pieces))
            return [group.id for group in fragment.subset(filter=condition.expression, schema=schema).row_groups]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            # An expression that cannot be computed for what a footer says: the rows themselves will tell.
            return list(range(pieces))


def _holds_only(footer: Any, name: str, value: Any) -> bool:
    """Returns whether a Parquet footer says that all values of a column are the same one."""
    if not isinstance(footer, pq.FileMetaData) or not value.is_valid:
        return False
    columns = [number for number in range(footer.num_columns) if footer.schema.column(number).path == name]
    for group in range(footer.num_row_groups):
        for number in columns:
            found = footer.row_group(group).column(number).statistics
            if found is None or not found.has_min_max or not found.has_null_count or found.null_count:
                return False
            if {found.min, found.max} != {value.as_py()}:
                return False
    return len(columns) == 1


def _works(table: Any, expression: Any) -> bool:
    try:
        table.filter(expression)
    except _REFUSED:
        return False
    return True


def _nested_types(schema: Any) -> list[Any]:
    found = []
    for name in nested_names(schema):
        place = resolve(schema, name)
        if place is not None:
            found.append(pa.field(name, field_type(schema.field(place[0]).type, place[1])))
    return found


def _has_floats(arrow_type: ArrowType) -> bool:
    if pa.types.is_nested(arrow_type):
        return any(_has_floats(arrow_type.field(number).type) for number in range(arrow_type.num_fields))
    return bool(pa.types.is_floating(arrow_type))


def _is_condition(thing: object) -> bool:
    return isinstance(thing, list | tuple) and len(thing) == 3 and all(isinstance(each, str) for each in thing[:2])


def _condition(name: str, sign: str, value: Any) -> Condition:
    if sign not in _OPERATORS:
        raise ValueError(
            f"ColumnDataset: filters know the operators {', '.join(_OPERATORS)}, got {sign!r} in {(name, sign, value)}"
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
        # In one order in every process.
        values.sort(key=repr)
    return name, sign, [_plain_value(each) for each in values]


def _plain_value(value: Any) -> Any:
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else value
    if isinstance(value, np.generic):
        return value.item()
    # pandas' missing values, without pandas.
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) <= 200:
        return text
    return f"{text[:80]}... #{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _compiled(name: str, sign: str, value: Any, arrow_type: ArrowType) -> Any:
    """Returns a condition as an expression over a column of a plain type."""
    column = pc.field(name)
    if sign in ("in", "not in"):
        found = _among(name, value, arrow_type)
        return found if sign == "in" else ~found
    if value is None:
        if sign not in ("==", "!="):
            raise ValueError(f"ColumnDataset: the filter ({name!r}, {sign!r}, None) orders a null; use == or !=")
        return column.is_null() if sign == "==" else column.is_valid()
    kind = _kind(name, arrow_type)
    if kind is None:
        # Of nothing but nulls, nothing is compared.
        return pc.is_valid(column)
    if isinstance(value, float) and math.isnan(value):
        if kind.floats and sign in ("==", "!="):
            return pc.is_nan(column) if sign == "==" else ~pc.is_nan(column)
        raise ValueError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, nan) compares {arrow_type} with NaN, which nothing is "
            f"less, greater or equal to; use == or != for floats that are NaN"
        )
    if not kind.ordered and sign not in ("==", "!="):
        raise TypeError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, {value!r}) orders {arrow_type}; use ==, != or in"
        )
    scalars = [None if v is None else kind.array([v])[0] for v in _bounds(kind, name, sign, value, arrow_type)]
    return _compare(_column(name, arrow_type), sign, *scalars)


@dataclass(frozen=True)
class _Kind:
    """How values are compared with a column."""

    number: Callable[[Any], Any]
    """Brings a Python value to what is compared; None where it is of another kind."""
    array: Callable[[list[Any]], Any]
    """Makes an array of the column's type of such numbers, strings or steps; of float64 for all floats."""
    expected: str
    """What a value must be, for messages."""
    ordered: bool = True
    floats: bool = False
    """Whether the column may hold NaN."""
    whole: tuple[int, int] | None = None
    """The smallest and largest step of a type whose values are whole steps; None for others."""


def _bounds(kind: _Kind, name: str, sign: str, value: Any, arrow_type: ArrowType) -> tuple[Any, Any, Any]:
    """Returns what a value is in the type, or None; then its neighbours there, None where it has none."""
    number = kind.number(value)
    if number is None:
        raise TypeError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, {value!r}) compares {arrow_type} with "
            f"{type(value).__name__}; give it {kind.expected}"
        )
    if kind.floats:
        return _float_bounds(number)
    if kind.whole is None:
        return number, None, None
    least, most = kind.whole
    if isinstance(number, float):
        return None, *((most, None) if number > 0 else (None, least))
    below, above = math.floor(number), math.ceil(number)
    if below == above and least <= below <= most:
        return below, None, None
    if below == above:
        below, above = below - 1, above + 1
    return None, min(below, most) if below >= least else None, max(above, least) if above <= most else None


def _float_bounds(number: Any) -> tuple[Any, Any, Any]:
    if isinstance(number, float):
        return number, None, None
    try:
        near = float(number)
    except OverflowError:
        near = math.inf if number > 0 else -math.inf
    if math.isinf(near):
        edge = math.copysign(sys.float_info.max, near)
        return None, *((edge, near) if near > 0 else (near, edge))
    if Fraction(near) == number:
        return near, None, None
    if near < number:
        return None, near, math.nextafter(near, math.inf)
    return None, math.nextafter(near, -math.inf), near


def _compare(column: Any, sign: str, exact: Any, low: Any, high: Any) -> Any:
    """Returns the comparison of a column with a scalar of its type, or with what lies between two of these."""
    if exact is None:
        if sign in ("==", "!="):
            return pc.scalar(False) if sign == "==" else column.is_valid()
        below = sign in ("<", "<=")
        edge = low if below else high
        if edge is None:
            return pc.scalar(False)
        return column <= edge if below else column >= edge
    return _COMPARE[sign](column, exact)


def _among(name: str, values: Sequence[Any], arrow_type: ArrowType) -> Any:
    kind = _kind(name, arrow_type)
    column, found = _column(name, arrow_type), pc.scalar(False)
    if kind is not None:
        wanted = []
        for value in values:
            if isinstance(value, float) and math.isnan(value):
                wanted += [value] * kind.floats
            elif value is not None:
                exact, _, _ = _bounds(kind, name, "in", value, arrow_type)
                wanted += [] if exact is None else [exact]
        if wanted:
            found = column.isin(kind.array(wanted))
    return found | column.is_null() if None in values else found


def _column(name: str, arrow_type: ArrowType) -> Any:
    if pa.types.is_floating(arrow_type) and arrow_type != pa.float64():
        # A narrow float is compared as the number that it is.
        return pc.field(name).cast(pa.float64())
    wide = _wide_decimal(arrow_type)
    return pc.field(name) if wide == arrow_type else pc.field(name).cast(wide)


def _wide_decimal(arrow_type: ArrowType) -> ArrowType:
    """Returns the type in which decimals are compared: pyarrow does not look for the narrow ones in a list."""
    narrow = pa.types.is_decimal32(arrow_type) or pa.types.is_decimal64(arrow_type)
    return pa.decimal128(arrow_type.precision, arrow_type.scale) if narrow else arrow_type


def _footer_decides(sign: str, value: Any, arrow_type: ArrowType) -> bool:
    """Returns whether the smallest and largest value of a row group may rule it out.

    Of floats they leave NaN out, which differs from everything, and do not tell 0.0 from -0.0.
    """
    if not pa.types.is_floating(arrow_type):
        return True
    nan = isinstance(value, float) and math.isnan(value)
    return sign not in ("!=", "in", "not in") and not nan


def _kind(name: str, arrow_type: ArrowType) -> _Kind | None:
    types = pa.types
    if types.is_null(arrow_type):
        return None
    if types.is_boolean(arrow_type):
        return _Kind(lambda v: v if isinstance(v, bool) else None, pa.array, "True or False")
    if types.is_integer(arrow_type):
        signed, bits = types.is_signed_integer(arrow_type), arrow_type.bit_width
        whole = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return _Kind(_number, lambda vs: pa.array(vs, arrow_type), "a number", whole=whole)
    if types.is_floating(arrow_type):
        return _Kind(_number, lambda vs: pa.array(vs, pa.float64()), "a number", floats=True)
    if types.is_decimal(arrow_type):
        scale, most, wide = arrow_type.scale, 10**arrow_type.precision - 1, _wide_decimal(arrow_type)
        return _Kind(
            lambda v: _times(_number(v), Fraction(10) ** scale),
            lambda vs: pa.array([_CONTEXT.create_decimal(v).scaleb(-scale, _CONTEXT) for v in vs], wide),
            "a number or decimal.Decimal",
            whole=(-most, most),
        )
    if is_temporal(arrow_type):
        raw = pa.int32() if types.is_date32(arrow_type) or types.is_time32(arrow_type) else pa.int64()
        tick, most = tick_ns(arrow_type), 2 ** (raw.bit_width - 1) - 1
        return _Kind(
            lambda v: _times(_nanoseconds(v, arrow_type), Fraction(1, tick)),
            lambda vs: pa.array(vs, raw).view(arrow_type),
            _EXPECTED[_of(arrow_type)],
            whole=(-most - 1, most),
        )
    if is_text(arrow_type):
        strings = types.is_string(arrow_type) or types.is_large_string(arrow_type)
        return _Kind(
            _text if strings else _bytes, lambda vs: pa.array(vs, arrow_type), "a str" if strings else "bytes or a str"
        )
    raise TypeError(
        f"ColumnDataset: filters compare columns of single values, and {name!r} is {arrow_type}; name a field of it, "
        f"or give a pyarrow expression"
    )


_CONTEXT = decimal.Context(prec=100)
_EXPECTED = {
    "timestamp": "a datetime.date, datetime.datetime, numpy.datetime64 or a string of ISO 8601",
    "time": "a datetime.time or a string of ISO 8601",
    "duration": "a datetime.timedelta or numpy.timedelta64",
}


def _of(arrow_type: ArrowType) -> str:
    if pa.types.is_time(arrow_type):
        return "time"
    return "duration" if pa.types.is_duration(arrow_type) else "timestamp"


def _number(value: Any) -> Any:
    """Returns a number exactly, floats that are finite as fractions."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isinf(value) else Fraction(value)
    if isinstance(value, decimal.Decimal | Fraction):
        return Fraction(value) if not isinstance(value, decimal.Decimal) or value.is_finite() else float(value)
    return None


def _times(number: Any, factor: Fraction) -> Any:
    return number if number is None or isinstance(number, float) else number * factor


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, uuid.UUID):
        return value.bytes
    if isinstance(value, str):
        return value.encode()
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else None


def _nanoseconds(value: Any, arrow_type: ArrowType) -> int | None:
    """Returns a date, time or duration in nanoseconds; dates since 1970 in UTC, as which naive ones are taken."""
    of = _of(arrow_type)
    if isinstance(value, np.datetime64 | np.timedelta64):
        if isinstance(value, np.datetime64) != (of == "timestamp") or of == "time":
            return None
        unit = np.datetime_data(value.dtype)[0]
        steps = {"W": 7 * UNITS["D"], "h": 3600 * UNITS["s"], "m": 60 * UNITS["s"], **UNITS}
        if unit not in steps:
            value, unit = value.astype("datetime64[D]"), "D"
        return int(value.astype(np.int64)) * np.datetime_data(value.dtype)[1] * steps[unit]
    if isinstance(value, str) and of != "duration":
        try:
            value = (datetime.time if of == "time" else datetime.datetime).fromisoformat(value)
        except ValueError:
            return None
    if of == "duration":
        return _steps(value) if isinstance(value, datetime.timedelta) else None
    if of == "time":
        if not isinstance(value, datetime.time):
            return None
        return _steps(
            datetime.timedelta(
                hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond
            )
        )
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if not isinstance(value, datetime.datetime):
        return None
    value = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
    return _steps(value - _EPOCH)


def _steps(duration: datetime.timedelta) -> int:
    micro = (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds
    return micro * 1_000 + getattr(duration, "nanoseconds", 0)
