"""Column specs: conversion of the values of a column to a tensor, and replacement of nulls.

Letters: B rows of a batch, N values over all rows, L values of each row.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeAlias

import torch


def _short_repr(self: Any) -> str:
    """Return the call that creates an equal spec, without arguments that have their default values."""
    values = {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default}
    positional = fields(self)[0].name
    arguments = [repr(value) if name == positional else f"{name}={value!r}" for name, value in values.items()]
    return f"{type(self).__name__}({', '.join(arguments)})"


@dataclass(frozen=True)
class Dense:
    """One number per row, as a tensor [B]; or with ``length``, L numbers per row, as a tensor [B, L].

    Dates, timestamps, times of day and durations are read as int64 in a ``unit``: dates and timestamps since
    1970-01-01T00:00:00 UTC, times of day since midnight. A timestamp without a time zone is assumed to be in UTC.
    Values finer than the unit are rounded down.

    Args:
        dtype: Dtype of the tensor; None keeps that of the file. Conversions to floats round. Integers become narrower
            integers if every value fits, and unsigned 64-bit integers become int64 with the same bits, so that ids stay
            distinct. Floats and decimals become integers if every value is a whole number that the float type holds
            exactly (up to 2**53 for float64). None reads decimals as int64 if they have no decimal places, and as
            float64 otherwise.
        default: Value for a null (with ``length``, L copies of it for a null or empty list); None rejects nulls. A
            column of only nulls has no type, so it takes ``dtype``, or else int64 for an int default and float32 for a
            float default.
        length: L, the length of every list of a list column; None for a column of plain numbers.
        unit: ``"D"`` (days), ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``, for dates, timestamps, times of day and
            durations; None means seconds. With a unit, a column of strings is read as dates or times in ISO 8601.
        format: Format of strings that are dates or times, for ``datetime.strptime``: ``"%d/%m/%Y %H:%M"``. Without a
            date directive, they are times of day.
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
            raise ValueError(f"Dense: length must be at least 1, got {self.length}; omit it for one value per row")
        _check_units("Dense", self.unit, self.format, self.scale)

    __repr__ = _short_repr


@dataclass(frozen=True)
class Ragged:
    """A list of numbers per row, of any length: a RaggedTensor of [N] values and B rows.

    Lists of lists become a RaggedTensor of as many levels.

    Args:
        dtype: Dtype of the values, converted as by ``Dense``; None keeps that of the file.
        default: Value for a null inside a list; None rejects nulls.
        null_as_empty: Read a null list as an empty list; False rejects it.
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
        default: Value for a null, such as ``""``; a ``str`` is encoded as UTF-8. None rejects nulls.
        null_as_empty: Read a null list as an empty list; False rejects it.

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

    The column is a map from ids to weights, a list of structs of two fields, two list columns of equal lengths, or a
    list of strings ``"id:weight"``. The fields of a struct are recognized by the names ``id`` and ``weight``. If it has
    neither, a float field is the weight or a string field is the id, and the remaining field is the other. Ids of maps,
    structs and list columns may be strings, which form two levels.

    Args:
        dtype: Dtype of integer ids, converted as by ``Dense``; None keeps that of the file, or means int64 for
            ``"id:weight"``.
        weights: Name of the list column with the weights; None if the column itself has them.
        default: Value for a null among integer ids; None rejects nulls.
        default_weight: Weight for a null weight and for a string without a separator; None rejects both.
        null_as_empty: Read a null list as an empty list; False rejects it.
        separator: Separator of id and weight in a string; the last occurrence counts.

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
            raise ValueError('Weighted: separator must not be empty; the default is ":"')

    __repr__ = _short_repr


Column: TypeAlias = Dense | Ragged | Text | Weighted
"""Any column spec."""

UNITS: dict[str, int] = {"D": 86_400_000_000_000, "s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds per unit of time."""


def _check_default(spec: str, default: object) -> None:
    if not isinstance(default, int | float | None):
        raise TypeError(f"{spec}: default must be a number, got {default!r}")


def _check_units(spec: str, unit: object, time_format: object, scale: object) -> None:
    if unit is not None and unit not in UNITS:
        raise ValueError(f"{spec}: unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    if time_format is not None and not (isinstance(time_format, str) and "%" in time_format):
        raise ValueError(
            f'{spec}: format must have directives of datetime.strptime, such as "%Y-%m-%d", got {time_format!r}'
        )
    if scale is not None and (not isinstance(scale, int) or isinstance(scale, bool) or not 0 <= scale <= 38):
        raise ValueError(f"{spec}: scale must be an integer from 0 to 38, the decimal places, got {scale!r}")
    if scale is not None and (unit is not None or time_format is not None):
        raise ValueError(f"{spec}: scale is for decimals, unit and format are for dates and times; give one of them")
