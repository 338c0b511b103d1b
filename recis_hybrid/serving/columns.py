"""Columns of a request: their description, and the conversion of what clients send.

Letters: B rows of a request, N values over all rows, M strings, k values of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import InputError

Array = npt.NDArray[Any]
Dtype: TypeAlias = Literal["int64", "int32", "float32", "float64", "bool", "string"]
DTYPES: tuple[Dtype, ...] = ("int64", "int32", "float32", "float64", "bool", "string")
"""Dtypes of input columns."""
_EXACT = 2**53
_HUGE = 2**1023
_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class InputColumn:
    """A column that a bundle reads."""

    name: str
    """Name of the column."""
    dtype: Dtype
    """Dtype of a value. Ids and times are ``int64``."""
    levels: int = 0
    """Levels of lists: 0 for one value (or ``length`` values) a row, 1 for a list a row, 2 for lists of lists."""
    length: int | None = None
    """Number of values of each row of a column without lists; None for one value."""
    weighted: bool = False
    """True if each value of a list has a weight."""
    default: bool | int | float | str | None = None
    """Value that replaces a null; None refuses nulls."""
    null_as_empty: bool = False
    """True if a null list is an empty list."""
    optional: bool = False
    """True if a request may omit the column; its rows are then nulls."""


class Ragged(NamedTuple):
    """A column of lists in flat form.

    Example:
        >>> Ragged([7, 8, 9], np.array([2, 0, 1]))  # the rows [7, 8], [] and [9]
        Ragged(values=[7, 8, 9], lengths=array([2, 0, 1]), weights=None)
    """

    values: Any
    """``[N]``: an array, or a list of strings."""
    lengths: Any
    """int64 ``[B]``; for several levels a tuple of such arrays, the outermost (``[B]``) first."""
    weights: Any = None
    """``[N]``, a weight for each value, or None."""


class Column(NamedTuple):
    """A column between operators: values, and the offsets of its lists. A string is a list of bytes."""

    values: Array
    """``[B, ...]`` if ``offsets`` is None, else ``[N, ...]``."""
    offsets: Array | None = None
    """int64 offsets of the innermost lists into ``values``."""
    weights: Array | None = None
    """float32 ``[N]``, or ``[M]`` if the values are the bytes of M strings in lists."""
    outer: tuple[Array, ...] = ()
    """int64 offsets of the outer levels, the outermost (``[B + 1]``) first."""

    @property
    def rows(self) -> int:
        """The number of rows, B."""
        if self.offsets is None:
            return len(self.values)
        return len(self.outer[0] if self.outer else self.offsets) - 1

    @property
    def strings(self) -> bool:
        """True if the innermost lists are strings."""
        return self.offsets is not None and self.values.dtype == np.uint8


class Rows:
    """Validated columns of equal numbers of rows; immutable, so threads may share it.

    Args:
        columns: The columns by name; must be valid.
        rows: Number of rows.
    """

    def __init__(self, columns: Mapping[str, Column], rows: int) -> None:
        self.columns = dict(columns)
        """The columns by name."""
        self.rows = rows
        """Number of rows, B."""

    def __len__(self) -> int:
        return self.rows

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """Return the rows of several requests to the same bundle, one after another.

        Args:
            parts: At least one.
        """
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        joined = {name: _concat([part.columns[name] for part in parts]) for name in names}
        return Rows(joined, sum(part.rows for part in parts))


def _concat(columns: Sequence[Column]) -> Column:
    first = columns[0]
    values = np.concatenate([column.values for column in columns])
    if first.offsets is None:
        return Column(values)
    weights = None
    if first.weights is not None:
        weights = np.concatenate([column.weights for column in columns if column.weights is not None])
    of_levels = zip(*[(*column.outer, column.offsets) for column in columns if column.offsets is not None], strict=True)
    levels = [_joined(offsets) for offsets in of_levels]
    return Column(values, levels[-1], weights, tuple(levels[:-1]))


def _joined(offsets: Sequence[Array]) -> Array:
    ends = np.cumsum([0, *[part[-1] for part in offsets[:-1]]])
    return np.concatenate([offsets[0], *[part[1:] + end for part, end in zip(offsets[1:], ends[1:], strict=True)]])


def offsets_of(lengths: Any) -> Array:
    """Return the offsets of lists, int64 ``[n + 1]``.

    Args:
        lengths: Integers ``[n]``, not negative.
    """
    lengths = np.asarray(lengths, np.int64)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def joined_offsets(columns: Sequence[Column]) -> Array:
    """Return the offsets of the innermost lists of several columns whose values are joined."""
    return _joined([column.offsets for column in columns if column.offsets is not None])


def read_column(column: InputColumn, given: Any) -> Column:
    """Return a column of a request in the form that operators take.

    Args:
        column: Description of the column.
        given: An array ``[B]`` or ``[B, k]``, a list of values or of lists, or :class:`Ragged`.

    Raises:
        InputError: The values do not fit the description.
    """
    where = f"column {column.name!r}"
    if column.levels == 0:
        return _read_dense(where, column, given)
    flat, levels, weights = _flattened(where, column, given)
    rows = levels[0]
    if column.weighted and weights is None:
        raise InputError(
            f"{where}: every value needs a weight, got none; send rows of [id, weight] pairs, or Ragged(..., weights)"
        )
    if not column.weighted and weights is not None:
        raise InputError(f"{where}: takes lists without weights, got weights; send only the values")
    weights = None if weights is None else _weights(where, weights, len(flat))

    def row_of(place: int) -> int:
        for offsets in reversed(levels):
            place = int(np.searchsorted(offsets, place, side="right")) - 1
        return place

    if column.dtype == "string":
        values, offsets = _strings(where, column, flat, row_of)
        return Column(values, offsets, weights, tuple(levels))
    assert rows is not None
    return Column(_numbers(where, column, flat, row_of), levels[-1], weights, tuple(levels[:-1]))


def read_nulls(column: InputColumn, rows: int) -> Column:
    """Return an optional column that a request omits: a null in each row.

    Args:
        column: Description of the column.
        rows: B.

    Raises:
        InputError: The column has no default.
    """
    return read_column(column, [None] * rows)


def read_integers(given: Sequence[Any]) -> list[Column] | None:
    """Return columns with one int64 for each row, converted together: three of them take longer one by one.

    Args:
        given: The columns of a request, any values.

    Returns:
        The columns, or None unless all are lists of integers, of the same length.
    """
    if set(map(type, given)) != {list} or set(map(type, chain.from_iterable(given))) != {int}:
        return None
    lengths = set(map(len, given))
    if len(lengths) != 1:
        return None
    try:
        values = np.fromiter(chain.from_iterable(given), np.int64, len(given) * len(given[0]))
    except OverflowError:
        return None
    return [Column(each) for each in values.reshape(len(given), -1)]


def _read_dense(where: str, column: InputColumn, given: Any) -> Column:
    if column.length is None and (values := _unconverted(column, given)) is not None:
        return Column(values)
    if isinstance(given, Ragged):
        raise InputError(f"{where}: takes {_shape(column)}, got lists of any length; send an array or a list")
    given = _elements(where, given, "must be a list or an array with an element for each row")
    if column.length is not None:
        return _read_fixed(where, column, given)
    if isinstance(given, np.ndarray) and given.ndim != 1:
        raise InputError(f"{where}: takes {_shape(column)}, got an array {list(given.shape)}; send [B]")
    if column.dtype == "string":
        return Column(*_strings(where, column, given, _same))
    return Column(_numbers(where, column, given, _same))


def _unconverted(column: InputColumn, given: Any) -> Array | None:
    """Return one value for each row if nothing is to be converted, the usual case, in about 1 µs."""
    if type(given) is np.ndarray:
        return given if given.ndim == 1 and given.dtype.name == column.dtype else None
    if type(given) is list and column.dtype == "int64" and set(map(type, given)) == {int}:
        try:
            return np.array(given, np.int64)
        except OverflowError:
            return None
    return None


def _read_fixed(where: str, column: InputColumn, given: Any) -> Column:
    length = column.length
    assert length is not None
    if isinstance(given, np.ndarray) and given.dtype != object:
        if given.ndim != 2 or given.shape[1] != length:
            raise InputError(f"{where}: takes {_shape(column)}, got an array {list(given.shape)}; send [B, {length}]")
        return Column(_numbers(where, column, given.reshape(-1), lambda place: place // length).reshape(given.shape))
    listed: list[Any] = []
    for row, values in enumerate(given):
        if values is None or (_is_list(values) and len(values) == 0):
            if column.default is None:
                raise InputError(f"{where}: row {row} is null; send {length} values")
            values = [column.default] * length
        if not _is_list(values) or len(values) != length:
            got = f"{len(values)} values" if _is_list(values) else _short(values)
            raise InputError(f"{where}: row {row}: must be a list of {length} values, got {got}")
        listed.extend(values)
    return Column(_numbers(where, column, listed, lambda place: place // length).reshape(-1, length))


def _elements(where: str, given: Any, rule: str) -> Any:
    """Return a list or an array of at least one dimension."""
    no_list = isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable)
    if no_list or (isinstance(given, np.ndarray) and given.ndim == 0):
        raise InputError(f"{where}: {rule}, got {_short(given)}")
    return given if isinstance(given, list | np.ndarray) else list(given)


def _flattened(where: str, column: InputColumn, given: Any) -> tuple[Any, list[Array], Any]:
    """Return the values of lists, the offsets of each level, and weights if there are any."""
    if isinstance(given, Ragged):
        return _flattened_ragged(where, column, given)
    if isinstance(given, np.ndarray) and given.dtype != object and given.ndim == column.levels + 1:
        counts = [int(np.prod(given.shape[: level + 1])) for level in range(column.levels)]
        levels = [
            np.arange(count + 1, dtype=np.int64) * width for count, width in zip(counts, given.shape[1:], strict=True)
        ]
        return given.reshape(-1), levels, None
    given = _elements(where, given, "must be a list with a list for each row")
    flat: list[Any] = list(given)
    levels = []
    for level in range(column.levels):
        for place, values in enumerate(flat):
            if values is None and column.null_as_empty:
                flat[place] = ()
            elif not _is_list(values):
                at = f"row {place}" if level == 0 else f"list {place}"
                remedy = "send [] for no values" if values is None else f"send {_shape(column)}"
                raise InputError(f"{where}: {at}: must be a list, got {_short(values)}; {remedy}")
        levels.append(offsets_of([len(values) for values in flat]))
        flat = list(chain.from_iterable(flat))
    if not column.weighted:
        return flat, levels, None
    for place, pair in enumerate(flat):
        if not _is_list(pair) or len(pair) != 2:
            raise InputError(f"{where}: value {place}: must be a pair [id, weight], got {_short(pair)}")
    return [pair[0] for pair in flat], levels, [pair[1] for pair in flat]


def _flattened_ragged(where: str, column: InputColumn, given: Ragged) -> tuple[Any, list[Array], Any]:
    given = given._replace(values=_elements(where, given.values, "values must be a list or an array [N]"))
    given_lengths = given.lengths if isinstance(given.lengths, tuple) else (given.lengths,)
    if len(given_lengths) != column.levels:
        raise InputError(f"{where}: takes {column.levels} levels of lists, got {len(given_lengths)} arrays of lengths")
    levels: list[Array] = []
    for level, lengths in enumerate(given_lengths):
        try:
            numbers = np.asarray(lengths)
        except ValueError as error:
            raise InputError(f"{where}: lengths must be integers [B], got {_short(lengths)}") from error
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise InputError(f"{where}: lengths must be integers [B], got {numbers.dtype} {list(numbers.shape)}")
        if levels and len(numbers) != levels[-1][-1]:
            raise InputError(
                f"{where}: level {level + 1} must have {levels[-1][-1]} lengths, as many as lists above, got "
                f"{len(numbers)}"
            )
        count = len(given.values)
        # Compared one by one first, so that their sum cannot overflow.
        if numbers.size and (int(numbers.min()) < 0 or (level + 1 == column.levels and int(numbers.max()) > count)):
            raise InputError(f"{where}: lengths must be 0 to {count}, the number of values, got {_short(lengths)}")
        if numbers.size and int(numbers.max()) > 2**31:
            raise InputError(f"{where}: lengths must be at most {2**31}, got {int(numbers.max())}")
        levels.append(offsets_of(numbers))
    if levels[-1][-1] != len(given.values):
        raise InputError(
            f"{where}: the lengths add up to {levels[-1][-1]}, but there are {len(given.values)} values; send one "
            f"length for each row"
        )
    return given.values, levels, given.weights


def _weights(where: str, weights: Any, count: int) -> Array:
    try:
        numbers = np.asarray(weights)
    except ValueError as error:
        raise InputError(f"{where}: weights must be numbers, got {_short(weights)}") from error
    if numbers.shape != (count,):
        raise InputError(f"{where}: there must be one weight for each of {count} values, got {list(numbers.shape)}")
    if count and numbers.dtype.kind not in "iuf":
        raise InputError(f"{where}: weights must be numbers, got {_short(weights)}")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


def _numbers(where: str, column: InputColumn, given: Any, row_of: Callable[[int], int]) -> Array:
    """Return values as an array ``[N]`` in the column's dtype."""
    values = given if isinstance(given, np.ndarray) else _as_array(given)
    kind = values.dtype.kind
    if values.ndim != 1 and len(values) == 0:
        raise InputError(f"{where}: takes {_shape(column)}, got an array {list(values.shape)}; send [] for no rows")
    if values.ndim != 1:
        place = next((place for place, value in enumerate(given) if _is_list(value)), 0)
        raise InputError(
            f"{where}: row {row_of(place)}: must be {column.dtype}, got {_short(given[place])}; send {_shape(column)}"
        )
    target = np.dtype(column.dtype)
    if len(values) == 0:
        return np.empty(0, target)
    if kind == "O":
        values = _replace_nulls(where, column, values, row_of)
        kind = values.dtype.kind
    if kind == "O" or kind in "US":
        with np.errstate(over="ignore"):
            return _from_objects(where, column, values, row_of).astype(target, copy=False)
    if target.kind == "b":
        if kind == "b":
            return values
        raise _wrong(where, column, values, row_of, "send true or false")
    if kind == "b":
        raise _wrong(where, column, values, row_of, "send 1 or 0")
    if target.kind == "f":
        if kind in "iuf":
            with np.errstate(over="ignore"):
                return values.astype(target, copy=False)
        raise _wrong(where, column, values, row_of, "send numbers")
    if kind == "f":
        values = values.astype(np.float64)
        whole = (values == np.trunc(values)) & (np.abs(values) <= _EXACT)
        if not whole.all():
            bad = int(np.argmin(whole))
            raise InputError(
                f"{where}: row {row_of(bad)}: must be an integer, got {values[bad]!s}; send integers, which "
                f"are exact in JSON up to 64 bits"
            )
        values = values.astype(np.int64)
    elif kind == "u" and values.dtype.itemsize == 8:
        values = values.astype("<u8", copy=False).view(np.int64)
    elif kind not in "iu":
        raise _wrong(where, column, values, row_of, "send integers")
    values = values.astype(np.int64, copy=False)
    if target.itemsize == 4:
        wide = (values < -(2**31)) | (values >= 2**31)
        if wide.any():
            bad = int(np.argmax(wide))
            raise InputError(f"{where}: row {row_of(bad)}: must be a 32-bit integer, got {values[bad]}")
    return values.astype(target, copy=False)


def _as_array(given: Any) -> Array:
    listed = given if isinstance(given, list) else list(given)
    # An array of strings would have the width of the longest one for every value, numbers included.
    if any(issubclass(kind, str | bytes) for kind in set(map(type, listed))):
        return _objects(listed)
    try:
        values = np.array(listed)
    except (ValueError, OverflowError):
        return _objects(listed)
    # Integers beyond 64 bits would become floats.
    if values.dtype.kind == "f" and any(isinstance(value, int) and abs(value) > _EXACT for value in listed):
        return _objects(listed)
    return values


def _objects(listed: list[Any]) -> Array:
    values = np.empty(len(listed), object)
    values[:] = listed
    return values


def _replace_nulls(where: str, column: InputColumn, values: Array, row_of: Callable[[int], int]) -> Array:
    listed = values.tolist()
    for place, value in enumerate(listed):
        if value is None:
            listed[place] = _default(where, column, row_of(place))
    return _as_array(listed)


def _default(where: str, column: InputColumn, row: int) -> Any:
    if column.default is None:
        raise InputError(
            f"{where}: row {row} has a null, and the column has no default; send a value, or train with a default"
        )
    return column.default


def _from_objects(where: str, column: InputColumn, values: Array, row_of: Callable[[int], int]) -> Array:
    """Return values of mixed types, such as integers of 64 bits and floats, in the column's dtype."""
    converted: list[Any] = []
    for place, value in enumerate(values.tolist()):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and column.dtype in ("int64", "int32"):
            fits = isinstance(value, int) or (value == value and abs(value) <= _EXACT and value == int(value))
            fits = fits and -(2**63) <= value < 2**64
            value = int(value) if fits else value
            value = value - 2**64 if fits and value >= 2**63 else value
            fits = fits and (column.dtype == "int64" or -(2**31) <= value < 2**31)
        elif fits and isinstance(value, int):
            fits = abs(value) < _HUGE
        if not fits or column.dtype == "bool":
            hint = f"send {_shape(column)}"
            if column.dtype == "int64" and isinstance(value, str):
                hint = "send integers, which are exact in JSON up to 64 bits"
            raise InputError(f"{where}: row {row_of(place)}: must be {column.dtype}, got {_short(value)}; {hint}")
        converted.append(value)
    return np.array(converted, np.int64 if column.dtype in ("int64", "int32") else np.float64)


def _wrong(where: str, column: InputColumn, values: Array, row_of: Callable[[int], int], remedy: str) -> InputError:
    return InputError(
        f"{where}: row {row_of(0)}: must be {column.dtype}, got {_short(values[0])} ({values.dtype}); {remedy}"
    )


def _strings(where: str, column: InputColumn, given: Any, row_of: Callable[[int], int]) -> tuple[Array, Array]:
    """Return the bytes of strings, and their offsets."""
    if isinstance(given, np.ndarray) and given.dtype.kind == "S":
        given = given.tolist()
    encoded: list[bytes] = []
    for place, value in enumerate(given):
        if value is None:
            value = _default(where, column, row_of(place))
        if isinstance(value, str):
            try:
                encoded.append(value.encode())
            except UnicodeEncodeError as error:
                raise InputError(f"{where}: row {row_of(place)}: must be valid Unicode, got {_short(value)}") from error
        elif isinstance(value, bytes):
            encoded.append(value)
        else:
            raise InputError(
                f"{where}: row {row_of(place)}: must be a string, got {_short(value)}; send {_shape(column)}"
            )
    offsets = offsets_of(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _same(place: int) -> int:
    return place


def _shape(column: InputColumn) -> str:
    """Return a description of the values of a row."""
    if column.levels == 0 and column.length is None:
        return f"one {column.dtype} for each row"
    values = (
        "[id, weight] pairs" if column.weighted else "strings" if column.dtype == "string" else f"{column.dtype} values"
    )
    if column.length is not None:
        return f"a list of {column.length} {values} for each row"
    return f"a list of {'lists of ' * (column.levels - 1)}{values} for each row"


def _short(value: Any) -> str:
    try:
        text = repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a huge integer"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
