"""Element-wise operators on ids and numbers of features.

An operator that refuses an element raises on the CPU. On a GPU, where the host would have to wait, a later call raises,
or :func:`recis_hybrid.ops.faults.check`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid.ops import faults
from recis_hybrid.ops.program import as_int64

_MOST = 2**63 - 1
_FLOATS = (torch.float32, torch.float64)

MapKind: TypeAlias = Literal["log", "clip", "normalize", "fill"]
"""``"log"``: log(x + first); ``"clip"``: the nearest number in [first, second]; ``"normalize"``: (x - first) / second;
``"fill"``: first instead of NaN."""

MAP_KINDS: dict[str, int] = {"log": 0, "clip": 1, "normalize": 2, "fill": 3}
"""Kinds of maps, and their numbers in native code."""

_REFUSED = {"log": "a value has no logarithm", "clip": "a value is NaN", "normalize": "a value is NaN"}


def _fake_ids(ids: Tensor, *_: object) -> Tensor:
    return ids.new_empty(ids.shape)


def _fake_new_ids(values: Tensor, *_: object) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int64)


for _name in ("mod_ids", "multi_hash_ids", "cross_ids", "clip_ids", "map_values"):
    torch.library.register_fake(f"recis::{_name}", _fake_ids)
torch.library.register_fake("recis::bucketize", _fake_new_ids)
torch.library.register_fake("recis::cast_to_ids", _fake_new_ids)


def mod_ids(ids: Tensor, modulus: int) -> Tensor:
    """Return ``ids`` modulo ``modulus``, with ids read as unsigned 64-bit integers.

    Hashes, which are unsigned, thus stay evenly distributed, and results are non-negative for moduli up to 2^63. For
    negative ids, the result differs from ``%`` in Python and torch: the id -1 counts as 2^64 - 1.

    Args:
        ids: int64, any shape.
        modulus: 1 to 2^64 - 1.

    Returns:
        int64 of the shape of ``ids``, contiguous, each in ``[0, modulus)`` as an unsigned integer.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If the modulus is out of range.

    Example:
        >>> mod_ids(torch.tensor([12, -1]), 10).tolist()
        [2, 5]
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"mod_ids: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
    if not 1 <= modulus < 2**64:
        raise ValueError(f"mod_ids: modulus must be from 1 to {2**64 - 1}, got {modulus}")
    return torch.ops.recis.mod_ids(ids.contiguous(), as_int64(modulus))  # type: ignore[no-any-return]


def bucketize(
    values: Tensor, boundaries: Tensor, *, right: bool = True, refuse_nan: bool = False, used: Tensor | None = None
) -> Tensor:
    """Return the bucket of each value.

    The bucket of v is the number of boundaries b with b <= v (``right=True``) or b < v (``right=False``), as in
    :func:`torch.bucketize`, also in that NaN goes to the last bucket. Boundaries must be sorted; this is not checked,
    because the host would have to wait for a GPU.

    Args:
        values: int64, float32 or float64, any shape.
        boundaries: ``[K]`` in the dtype and on the device of ``values``, sorted.
        right: Whether a value equal to a boundary goes to the bucket above.
        refuse_nan: Whether to refuse NaN.
        used: int64, on the same device: its last element is the number of rows of ``values`` in use, for callers that
            only know a bound; elements after them are never refused. None: all.

    Returns:
        int64 of the shape of ``values``, contiguous, each in ``[0, K]``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If the boundaries are not one-dimensional, or on another device.
        RuntimeError: If a value is NaN and ``refuse_nan`` is True.

    Example:
        >>> bucketize(torch.tensor([0.5, 1.0, 7.0]), torch.tensor([1.0, 5.0])).tolist()
        [0, 1, 2]
    """
    if values.dtype not in (torch.int64, torch.float32, torch.float64):
        raise TypeError(f"bucketize: values must be int64, float32 or float64, got {values.dtype}; convert with .to()")
    if boundaries.dtype != values.dtype:
        raise TypeError(f"bucketize: boundaries must be {values.dtype} like values, got {boundaries.dtype}")
    if boundaries.dim() != 1 or boundaries.device != values.device:
        raise ValueError(
            f"bucketize: boundaries must be [K] on {values.device}, got {list(boundaries.shape)} on {boundaries.device}"
        )
    refuse_nan = refuse_nan and values.dtype in _FLOATS
    word = faults.words(values, "bucketize: a value is NaN") if refuse_nan else None
    return torch.ops.recis.bucketize(values.contiguous(), boundaries.contiguous(), right, refuse_nan, used, word)  # type: ignore[no-any-return]


def multi_hash_ids(ids: Tensor, multiplier: int, prime: int, buckets: int) -> Tensor:
    """Return ``(((ids * multiplier) % prime + prime) % prime) % buckets``, products wrapping at 64 bits.

    Args:
        ids: int64, any shape.
        multiplier: Factor of the ids.
        prime: 1 to 2^63 - 1.
        buckets: 1 to 2^63 - 1.

    Returns:
        int64 of the shape of ``ids``, contiguous, each in ``[0, buckets)``.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If ``prime`` or ``buckets`` is out of range.

    Example:
        >>> multi_hash_ids(torch.tensor([1001, -1]), 3, 46997, 1000).tolist()
        [3, 994]
    """
    _check_ids("multi_hash_ids", ids)
    if not (1 <= prime <= _MOST and 1 <= buckets <= _MOST):
        raise ValueError(f"multi_hash_ids: prime and buckets must be from 1 to {_MOST}, got {prime} and {buckets}")
    return torch.ops.recis.multi_hash_ids(ids.contiguous(), multiplier, prime, buckets)  # type: ignore[no-any-return]


def cross_ids(x: Tensor, y: Tensor) -> Tensor:
    """Return the id of each pair: MurmurHash64A (seed 0) of the eight bytes of x followed by those of y.

    Args:
        x: int64, any shape.
        y: int64 of the shape and on the device of ``x``.

    Returns:
        int64 of that shape, contiguous.

    Raises:
        TypeError: If one of them is not int64.
        ValueError: If shapes or devices differ.

    Example:
        >>> cross_ids(torch.tensor([1001]), torch.tensor([1])).tolist()
        [-7808879811642834040]
    """
    _check_ids("cross_ids", x)
    _check_ids("cross_ids", y)
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(
            f"cross_ids: x and y must have the same shape and device, got {list(x.shape)} on {x.device} and "
            f"{list(y.shape)} on {y.device}"
        )
    return torch.ops.recis.cross_ids(x.contiguous(), y.contiguous())  # type: ignore[no-any-return]


def map_values(
    values: Tensor, kind: MapKind, first: float, second: float = 0.0, *, used: Tensor | None = None
) -> Tensor:
    """Apply a map to each number.

    Args:
        values: float32 or float64, any shape.
        kind: The map; see ``MapKind``.
        first: First parameter of the map, rounded to the dtype of ``values``.
        second: Second parameter of the map, also rounded.
        used: As for :func:`bucketize`.

    Returns:
        A contiguous tensor of the shape and dtype of ``values``.

    Raises:
        TypeError: If the dtype is wrong.
        ValueError: If ``kind`` is unknown.
        RuntimeError: If a value is NaN (other than for ``"fill"``) or has no logarithm.

    Example:
        >>> map_values(torch.tensor([-1.0, 0.5, 9.0]), "clip", 0, 1)
        tensor([0.0000, 0.5000, 1.0000])
    """
    if values.dtype not in _FLOATS:
        raise TypeError(f"map_values: values must be float32 or float64, got {values.dtype}; convert with .to()")
    if kind not in MAP_KINDS:
        raise ValueError(f"map_values: kind must be one of {list(MAP_KINDS)}, got {kind!r}")
    word = faults.words(values, f"map_values: {_REFUSED[kind]}") if kind in _REFUSED else None
    return torch.ops.recis.map_values(values.contiguous(), MAP_KINDS[kind], first, second, used, word)  # type: ignore[no-any-return]


def clip_ids(ids: Tensor, least: int, most: int) -> Tensor:
    """Return the integers clipped to ``[least, most]``.

    Args:
        ids: int64, any shape.
        least: An int64.
        most: An int64.

    Returns:
        int64 of the shape of ``ids``, contiguous.

    Raises:
        TypeError: If ``ids`` is not int64.

    Example:
        >>> clip_ids(torch.tensor([-3, 2, 9]), 0, 5)
        tensor([0, 2, 5])
    """
    _check_ids("clip_ids", ids)
    return torch.ops.recis.clip_ids(ids.contiguous(), least, most)  # type: ignore[no-any-return]


def cast_to_ids(values: Tensor, *, used: Tensor | None = None) -> Tensor:
    """Return the numbers truncated toward zero, as int64.

    Args:
        values: float32 or float64, any shape.
        used: As for :func:`bucketize`.

    Returns:
        int64 of that shape, contiguous.

    Raises:
        TypeError: If the dtype is wrong.
        RuntimeError: If a value is NaN or out of the range of int64. On a GPU it becomes 0 first.

    Example:
        >>> cast_to_ids(torch.tensor([1.9, -1.9]))
        tensor([ 1, -1])
    """
    if values.dtype not in _FLOATS:
        raise TypeError(f"cast_to_ids: values must be float32 or float64, got {values.dtype}")
    word = faults.words(values, "cast_to_ids: a value is NaN or outside the range of int64")
    return torch.ops.recis.cast_to_ids(values.contiguous(), used, word)  # type: ignore[no-any-return]


def _check_ids(where: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{where}: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
