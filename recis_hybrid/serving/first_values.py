"""First values of rows, which ids without a row have: those of ``csrc/core/initializer.h``, bit for bit.

Letters: n ids, D dim.

References:
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC11 (Philox4x32-10).
    Giles: Approximating the erfinv function. GPU Computing Gems, 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_F = np.float32
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_UNIT = _F(2.0**-24)
_CENTRAL = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503)
_CENTRAL_END = (-0.00417768164, 0.246640727, 1.50140941)
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613)
_TAIL_END = (0.00943887047, 1.00167406, 2.83297682)


class FirstValues:
    """The first values of a table's rows.

    Args:
        document: ``kind`` (0 constant, 1 uniform, 2 normal, 3 truncated normal), ``a``, ``b``, ``low``, ``high``,
            ``erf_low``, ``erf_high``, ``key`` and ``dtype``.
        dim: D.
    """

    def __init__(self, document: Mapping[str, Any], dim: int) -> None:
        self.form = int(document["kind"]), dim, str(document["dtype"])
        """Kind, width and dtype; tables of equal ones are drawn together."""
        numbers = [document[name] for name in ("a", "b", "low", "high", "erf_low", "erf_high")]
        self.numbers = np.array(numbers, np.float32)
        key = int(document["key"]) % 2**64
        self.key = np.array([key & 0xFFFFFFFF, key >> 32], np.uint64)


def first_values(parts: Sequence[tuple[FirstValues, npt.NDArray[np.int64]]]) -> list[Floats]:
    """Return the first values of ids of several tables, float32 ``[n, D]`` each, rounded to the dtype of the table.

    Args:
        parts: For each table, the ids, int64 ``[n]``.
    """
    # Tables are drawn together: with few ids, the calls of array operations take most of the time.
    groups: dict[tuple[int, int, str], list[int]] = {}
    for number, (table, _) in enumerate(parts):
        groups.setdefault(table.form, []).append(number)
    results: dict[int, Floats] = {}
    for (kind, dim, dtype), members in groups.items():
        ids = np.concatenate([parts[number][1] for number in members])
        counts = [len(parts[number][1]) for number in members]
        numbers = np.repeat(np.array([parts[number][0].numbers for number in members]), counts, axis=0)
        keys = np.repeat(np.array([parts[number][0].key for number in members]), counts, axis=0)
        drawn = rounded(_drawn(kind, dim, ids, numbers, keys), dtype)
        ends = np.cumsum(counts)
        results |= dict(zip(members, np.split(drawn, ends[:-1]), strict=True))
    return [results[number] for number in range(len(parts))]


def _drawn(kind: int, dim: int, ids: npt.NDArray[np.int64], numbers: Floats, keys: npt.NDArray[np.uint64]) -> Floats:
    a, b, low, high, erf_low, erf_high = (numbers[:, place, None] for place in range(6))
    if kind == 0:
        return np.repeat(a, dim, axis=1)
    words = philox(keys, ids, -(-dim // 4))[:, :dim] if kind == 1 else philox(keys, ids, -(-dim // 4))
    words = words >> np.uint64(8)
    if kind == 2:
        return (a + b * _normal(words))[:, :dim]
    unit = words.astype(np.float32) * _UNIT
    if kind == 1:
        return a + (b - a) * unit
    x = a + b * (_F(1.41421356) * _inverse_erf(erf_low + (erf_high - erf_low) * unit))
    return np.where(x < low, low, np.where(x > high, high, x))[:, :dim]


def philox(keys: npt.NDArray[np.uint64], ids: npt.NDArray[np.int64], quads: int) -> npt.NDArray[np.uint64]:
    """Return random words of 32 bits for each id, uint64 ``[n, 4 * quads]``.

    Args:
        keys: Both halves of the key of each id, uint64 ``[n, 2]``.
        ids: int64 ``[n]``.
        quads: Groups of four words.
    """
    low = np.ascontiguousarray(ids).view(np.uint64)[:, None]
    count = np.arange(quads, dtype=np.uint64)[None, :]
    a, b = np.broadcast_to(low & _LOW, (len(ids), quads)), np.broadcast_to(low >> _SHIFT, (len(ids), quads))
    c, d = np.broadcast_to(count, (len(ids), quads)), np.zeros((len(ids), quads), np.uint64)
    k0, k1 = keys[:, :1], keys[:, 1:]
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> _SHIFT) ^ b ^ k0, q & _LOW, (p >> _SHIFT) ^ d ^ k1, p & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([a, b, c, d], axis=2).reshape(len(ids), 4 * quads)


def rounded(values: Floats, dtype: str) -> Floats:
    """Return float32 numbers rounded to float32, float16 or bfloat16."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    value = np.full(x.shape, coefficients[0], np.float32)
    for coefficient in coefficients[1:]:
        value = value * x + _F(coefficient)
    return value


def _log(x: Floats) -> Floats:
    """Return the logarithm of normal numbers above 0 as ``csrc/core/normal.h`` rounds it."""
    shifted = x.view(np.uint32) - np.uint32(0x3F3504F3)
    exponent = (shifted.view(np.int32) >> np.int32(23)).astype(np.float32)
    m = ((shifted & np.uint32(0x007FFFFF)) + np.uint32(0x3F3504F3)).view(np.float32)
    s = (m - _F(1)) / (m + _F(1))
    z = s * s
    tail = s * z * _polynomial(z, (0.2958039581, 0.3998800962, 0.6666669621))
    logarithm: Floats = exponent * _F(0.693145751953125) + (_F(2) * s + (tail + exponent * _F(1.42860677e-6)))
    return logarithm


def _turn(u: Floats) -> tuple[Floats, Floats]:
    """Return cos and sin of 2 pi u."""
    v = u * _F(4)
    quarter = (v + _F(0.5)).astype(np.int32)
    t = v - quarter.astype(np.float32)
    y = t * t
    s = t * (_polynomial(y, (1.58323377e-4, -4.681319e-3, 7.96925900e-2, -0.645964096)) * y + _F(1.57079633))
    c = _polynomial(y, (9.04446404e-4, -2.08604382e-2, 0.253669255, -1.23370054, 1.0))
    quarter &= 3
    odd = quarter % 2 == 1
    a, b = np.where(odd, s, c), np.where(odd, c, s)
    return np.where((quarter == 1) | (quarter == 2), -a, a), np.where(quarter >= 2, -b, b)


def _normal(words: npt.NDArray[np.uint64]) -> Floats:
    """Return standard normal numbers from words of 24 bits, by the Box-Muller transform of adjacent ones."""
    u = (words[:, 0::2] + np.uint64(1)).astype(np.float32) * _UNIT
    radius = np.sqrt(_F(-2) * _log(u))
    cos, sin = _turn(words[:, 1::2].astype(np.float32) * _UNIT)
    return np.stack([radius * cos, radius * sin], axis=2).reshape(words.shape)


def _inverse_erf(x: Floats) -> Floats:
    end = np.nextafter(_F(1), _F(0))
    x = np.clip(x, -end, end)
    w = -_log((_F(1) - x) * (_F(1) + x))
    central = _polynomial(w - _F(2.5), (*_CENTRAL, *_CENTRAL_END))
    tail = _polynomial(np.sqrt(np.maximum(w, _F(0))) - _F(3), (*_TAIL, *_TAIL_END))
    return np.where(w < _F(5), central, tail) * x
