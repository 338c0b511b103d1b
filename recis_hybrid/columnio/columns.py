"""What a user says of a column: how its values become a tensor, and what stands for a null.

Letters: B rows of a batch, N values over all rows, L values of each row.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class Dense:
    """One number for each row, or as many for every row: a tensor [B], or [B, L] with a `length`.

    Dates, timestamps, times of day and durations are int64 in a `unit`: dates and timestamps since
    1970-01-01T00:00:00 UTC, times of day since midnight. A timestamp without a time zone is taken as UTC. What is finer
    than the unit is rounded down.

    Args:
        dtype: Of the tensor; None takes the file's. Integers become floats and floats become other floats by rounding,
            integers become narrower ones if every value fits, and unsigned 64-bit integers become int64 bit for bit,
            since an id is its bits. Floats and decimals become integers if every value is whole, and small enough for
            a float of that width to hold every integer (2**53 for float64). None reads decimals as int64 where they
            have no places after the point, and as float64 otherwise.
        default: What stands for a null (in a column with a `length`, for a null or empty list by L copies too); None
            refuses nulls. A column that holds nothing but nulls, and so has no type, takes it for every row: as
            `dtype`, or else int64 for an int and float32 for a float.
        length: L, the length of every list of a list column; None for a column of plain numbers.
        unit: `"D"` (days), `"s"`, `"ms"`, `"us"` or `"ns"`, for dates, timestamps, times of day and durations; None
            takes seconds. Given for a column of strings, these are read as dates or times by ISO 8601.
        format: How strings write dates or times, in the directives of `datetime.strptime`: `"%d/%m/%Y %H:%M"`. Without
            a directive of a date they are times of day.
        scale: Makes int64 of decimals: the value times 10**scale, which must be whole.

    Raises:
        TypeError: The default is not of a number's type.
        ValueError: The length is less than 1, the unit is unknown, the format has no directive, the scale is negative,
            or both a scale and a unit are given.

    Example:
        >>> Dense(torch.float32, default=0.0)
        Dense(dtype=torch.float32, default=0.0, length=None, unit=None, format=None, scale=None)
    """

    dtype: torch.dtype | None = None
    _: KW_ONLY
    default: float | None = None
    length: int | None = None
    unit: str | None = None
    format: str | None = None
    scale: int | None = None

    def __post_init__(self) -> None:
        _check_default("Dense", self.default)
        if self.length is not None and self.length < 1:
            raise ValueError(f"Dense: length must be at least 1, got {self.length}; leave it out for one value a row")
        _check_units("Dense", self.unit, self.format, self.scale)


@dataclass(frozen=True)
class Ragged:
    """A list of numbers for each row, of any length: a RaggedTensor of [N] values and B rows.

    Lists of lists become a RaggedTensor of as many levels.

    Args:
        dtype: Of the values, by the rules of `Dense`; None takes the file's.
        default: What stands for a null inside a list; None refuses them.
        null_as_empty: Whether a row (or a list in it) without a list is read as an empty list, or refused.
        unit: Of dates and times, by the rules of `Dense`.
        format: Of strings that are dates or times, by the rules of `Dense`.
        scale: Of decimals, by the rules of `Dense`.

    Raises:
        TypeError: The default is not of a number's type.
        ValueError: The unit, format or scale is invalid; see `Dense`.
    """

    dtype: torch.dtype | None = None
    _: KW_ONLY
    default: float | None = None
    null_as_empty: bool = False
    unit: str | None = None
    format: str | None = None
    scale: int | None = None

    def __post_init__(self) -> None:
        _check_default("Ragged", self.default)
        _check_units("Ragged", self.unit, self.format, self.scale)


@dataclass(frozen=True)
class Text:
    """Strings or bytes, one a row: a RaggedTensor of B rows of uint8.

    Lists of strings become a RaggedTensor of two levels, lists of these of three.

    Args:
        default: What stands for a null, `""` for instance; `str` is encoded as UTF-8. None refuses nulls.
        null_as_empty: Whether a null where a list should be is read as an empty list, or refused.

    Raises:
        TypeError: The default is neither str nor bytes.
    """

    default: str | bytes | None = None
    _: KW_ONLY
    null_as_empty: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.default, str | bytes | None):
            raise TypeError(f"Text: default must be str or bytes, got {self.default!r}")


@dataclass(frozen=True)
class Weighted:
    """A list of ids with a weight each for each row: a RaggedTensor of [N] values, [N] float32 weights and B rows.

    It is read from a map of ids to weights; from a list of structs of two fields; from two columns of lists as long as
    each other; or from a list of strings `"id:weight"`. Of a struct the fields `id` and `weight` are known by their
    names, in any order; where it has neither, floats are the weights, strings the ids, and what stands beside them the
    other one. Maps, structs and columns may have strings for ids, which then make two levels.

    Args:
        dtype: Of integer ids, by the rules of `Dense`; None takes the file's, and int64 of `"id:weight"`.
        weights: The column of lists that holds the weights; None where the column itself does.
        default: What stands for a null among ids that are numbers; None refuses them.
        default_weight: What stands for a null among the weights, and for the weight of a string without a separator;
            None refuses both.
        null_as_empty: Whether a row without a list is read as an empty list, or refused.
        separator: Between id and weight of a string; the last one counts.

    Raises:
        TypeError: A default is not of a number's type.
        ValueError: The separator is empty.
    """

    dtype: torch.dtype | None = None
    _: KW_ONLY
    weights: str | None = None
    default: float | None = None
    default_weight: float | None = None
    null_as_empty: bool = False
    separator: str = ":"

    def __post_init__(self) -> None:
        _check_default("Weighted", self.default)
        _check_default("Weighted", self.default_weight)
        if not self.separator:
            raise ValueError('Weighted: separator must not be empty; the usual one is ":"')


Column: TypeAlias = Dense | Ragged | Text | Weighted
"""Any of the specs that a column may have."""


def _check_default(spec: str, default: object) -> None:
    if not isinstance(default, int | float | None):
        raise TypeError(f"{spec}: default must be a number, got {default!r}")


UNITS: dict[str, int] = {"D": 86_400_000_000_000, "s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds by unit of time."""


def _check_units(spec: str, unit: object, form: object, scale: object) -> None:
    if unit is not None and unit not in UNITS:
        raise ValueError(f"{spec}: unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    if form is not None and not (isinstance(form, str) and "%" in form):
        raise ValueError(f'{spec}: format must have directives of datetime.strptime, "%Y-%m-%d" for one, got {form!r}')
    if scale is not None and (not isinstance(scale, int) or isinstance(scale, bool) or not 0 <= scale <= 38):
        raise ValueError(f"{spec}: scale must be an integer of 0 to 38, the places after the point, got {scale!r}")
    if scale is not None and (unit is not None or form is not None):
        raise ValueError(f"{spec}: scale is for decimals, unit and format are for dates and times; give one of them")
