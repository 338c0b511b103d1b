"""Column specs: how the values of a column become a tensor, and which value replaces a null.

Letters: B rows of a batch, N values over all rows, L values of each row.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeAlias

import torch


def _short_repr(self: Any) -> str:
    """Return the call that makes an equal spec, without arguments that are left at their defaults."""
    values = {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default}
    positional = fields(self)[0].name
    arguments = [repr(value) if name == positional else f"{name}={value!r}" for name, value in values.items()]
    return f"{type(self).__name__}({', '.join(arguments)})"


@dataclass(frozen=True)
class Dense:
    """One number per row, a tensor [B]; or with ``length`` L numbers per row, a tensor [B, L].

    Dates, timestamps, times of day and durations are int64 in a ``unit``: dates and timestamps since
    1970-01-01T00:00:00 UTC, times of day since midnight. A timestamp without a time zone is taken as UTC. Values finer
    than the unit are rounded down.

    Args:
        dtype: Dtype of the tensor; None takes that of the file. Integers become floats, and floats other floats, by
            rounding; integers become narrower integers if every value fits; unsigned 64-bit integers become int64 bit
            for bit, since an id is its bits. Floats and decimals become integers if every value is a whole number that
            such a float holds exactly (up to 2**53 for float64). None reads decimals as int64 if they have no decimal
            places, and as float64 otherwise.
        default: Value for a null (with ``length``, L copies of it for a null or empty list); None refuses nulls. A
            column of nothing but nulls has no type: it takes ``dtype``, or else int64 for an int default and float32
            for a float.
        length: L, the length of every list of a list column; None for a column of plain numbers.
        unit: ``"D"`` (days), ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``, for dates, timestamps, times of day and
            durations; None means seconds. With a unit, a column of strings is read as dates or times in ISO 8601.
        format: Format of strings that are dates or times, in the directives of ``datetime.strptime``:
            ``"%d/%m/%Y %H:%M"``. Without a date directive they are times of day.
        scale: Read decimals as int64: the value times 10**scale, which must be a whole number.

    Raises:
        TypeError: The default is not a number.
        ValueError: The length is less than 1, the unit is unknown, the format has no directive, the scale is negative,
            or both a scale and a unit are given.

    Example:
        >>> Dense(torch.float32, default=0.0)
        Dense(torch.float32, default=0.0)
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

    __repr__ = _short_repr


@dataclass(frozen=True)
class Ragged:
    """A list of numbers per row, of any length: a RaggedTensor of [N] values and B rows.

    Lists of lists become a RaggedTensor of as many levels.

    Args:
        dtype: Dtype of the values, converted as by ``Dense``; None takes that of the file.
        default: Value for a null inside a list; None refuses nulls.
        null_as_empty: Read a null instead of a list as an empty list; False refuses it.
        unit: Unit of dates and times; see ``Dense``.
        format: Format of strings that are dates or times; see ``Dense``.
        scale: Scale of decimals; see ``Dense``.

    Raises:
        TypeError: The default is not a number.
        ValueError: The unit, format or scale is invalid; see ``Dense``.
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

    __repr__ = _short_repr


@dataclass(frozen=True)
class Text:
    """A string or bytes per row: a RaggedTensor of B rows of uint8.

    Lists of strings become a RaggedTensor of two levels, lists of such lists one of three.

    Args:
        default: Value for a null, such as ``""``; a ``str`` is encoded as UTF-8. None refuses nulls.
        null_as_empty: Read a null instead of a list as an empty list; False refuses it.

    Raises:
        TypeError: The default is neither str nor bytes.
    """

    default: str | bytes | None = None
    _: KW_ONLY
    null_as_empty: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.default, str | bytes | None):
            raise TypeError(f"Text: default must be str or bytes, got {self.default!r}")

    __repr__ = _short_repr


@dataclass(frozen=True)
class Weighted:
    """A list of weighted ids per row: a RaggedTensor of [N] values, [N] float32 weights and B rows.

    It is read from a map of ids to weights, a list of structs of two fields, two list columns of equal lengths, or a
    list of strings ``"id:weight"``. The fields of a struct are recognized by the names ``id`` and ``weight``; if it has
    neither, a float field is the weight, a string field the id, and the other field the other part. Ids of maps,
    structs and list columns may be strings, which make two levels.

    Args:
        dtype: Dtype of integer ids, converted as by ``Dense``; None takes that of the file, and int64 for
            ``"id:weight"``.
        weights: Name of the list column with the weights; None if the column itself has them.
        default: Value for a null among integer ids; None refuses nulls.
        default_weight: Value for a null among the weights, and weight of a string without a separator; None refuses
            both.
        null_as_empty: Read a null instead of a list as an empty list; False refuses it.
        separator: Separator of id and weight in a string; its last occurrence counts.

    Raises:
        TypeError: A default is not a number.
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

    __repr__ = _short_repr


Column: TypeAlias = Dense | Ragged | Text | Weighted
"""Any column spec."""

UNITS: dict[str, int] = {"D": 86_400_000_000_000, "s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds by unit of time."""


def _check_default(spec: str, default: object) -> None:
    if not isinstance(default, int | float | None):
        raise TypeError(f"{spec}: default must be a number, got {default!r}")


def _check_units(spec: str, unit: object, form: object, scale: object) -> None:
    if unit is not None and unit not in UNITS:
        raise ValueError(f"{spec}: unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    if form is not None and not (isinstance(form, str) and "%" in form):
        raise ValueError(f'{spec}: format must have directives of datetime.strptime, such as "%Y-%m-%d", got {form!r}')
    if scale is not None and (not isinstance(scale, int) or isinstance(scale, bool) or not 0 <= scale <= 38):
        raise ValueError(f"{spec}: scale must be an integer from 0 to 38, the decimal places, got {scale!r}")
    if scale is not None and (unit is not None or form is not None):
        raise ValueError(f"{spec}: scale is for decimals, unit and format are for dates and times; give one of them")
