"""Element-wise operators of features: from ids and numbers to small integers."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid.ops.program import as_int64

_MOST = 2**63 - 1
_FLOATS = (torch.float32, torch.float64)

MapKind: TypeAlias = Literal["log", "clip", "normalize", "fill"]
"""``"log"``: log(x + first); ``"clip"``: the nearest number in [first, second]; ``"normalize"``: (x - first) / second;
``"fill"``: first in place of NaN."""

MAP_KINDS: dict[str, int] = {"log": 0, "clip": 1, "normalize": 2, "fill": 3}
"""The kinds of maps and the numbers by which native code knows them."""


def _fake_ids(ids: Tensor, *_: object) -> Tensor:
    return ids.new_empty(ids.shape)


def _fake_bucketize(values: Tensor, boundaries: Tensor, right: bool, refuse_nan: bool = False) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int64)


def _fake_cast(values: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int64)


for _name in ("mod_ids", "multi_hash_ids", "cross_ids", "clip_ids", "map_values"):
    torch.library.register_fake(f"recis::{_name}", _fake_ids)
torch.library.register_fake("recis::bucketize", _fake_bucketize)
torch.library.register_fake("recis::cast_to_ids", _fake_cast)


def mod_ids(ids: Tensor, modulus: int) -> Tensor:
    """Return ``ids`` modulo ``modulus``, the 64 bits of an id read as an unsigned number.

    So a hash, which is unsigned, keeps its even spread, and the result is never negative. For ids below 0 it differs
    from Python's and torch's ``%``: the id -1 counts as 2^64 - 1.

    Args:
        ids: int64, any shape.
        modulus: 1 to 2^64 - 1.

    Returns:
        int64 of the shape of ``ids``, contiguous, each in ``[0, modulus)``, also as an unsigned number.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If the modulus is not in its range.

    Example:
        >>> mod_ids(torch.tensor([12, -1]), 10).tolist()
        [2, 5]
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"mod_ids: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
    if not 1 <= modulus < 2**64:
        raise ValueError(f"mod_ids: the modulus must be 1 to {2**64 - 1}, got {modulus}")
    return torch.ops.recis.mod_ids(ids.contiguous(), as_int64(modulus))  # type: ignore[no-any-return]


def bucketize(values: Tensor, boundaries: Tensor, *, right: bool = True, refuse_nan: bool = False) -> Tensor:
    """Return between which boundaries each value lies.

    The bucket of v is the number of boundaries b with b <= v (``right=True``) or b < v (``right=False``), as in
    :func:`torch.bucketize`. NaN goes to the last bucket, as there. Whether the boundaries are sorted is not checked,
    which would make the host wait for a GPU; where they are not, the buckets mean nothing.

    Args:
        values: int64, float32 or float64, any shape.
        boundaries: ``[K]`` of the dtype and on the device of ``values``, sorted.
        right: Whether a value that equals a boundary goes to the bucket above it.
        refuse_nan: Whether NaN is an error, on the CPU.

    Returns:
        int64 of the shape of ``values``, contiguous, each in ``[0, K]``.

    Raises:
        TypeError: If a dtype is another one.
        ValueError: If the boundaries have another number of dimensions or another device.
        RuntimeError: If a value is NaN and that is refused.

    Example:
        >>> bucketize(torch.tensor([0.5, 1.0, 7.0]), torch.tensor([1.0, 5.0])).tolist()
        [0, 1, 2]
    """
    if values.dtype not in (torch.int64, torch.float32, torch.float64):
        raise TypeError(f"bucketize: values must be int64, float32 or float64, got {values.dtype}; convert with .to()")
    if boundaries.dtype != values.dtype:
        raise TypeError(f"bucketize: boundaries must be {values.dtype} as the values are, got {boundaries.dtype}")
    if boundaries.dim() != 1 or boundaries.device != values.device:
        raise ValueError(
            f"bucketize: boundaries must be [K] on {values.device}, got {list(boundaries.shape)} on {boundaries.device}"
        )
    return torch.ops.recis.bucketize(values.contiguous(), boundaries.contiguous(), right, refuse_nan)  # type: ignore[no-any-return]


def multi_hash_ids(ids: Tensor, multiplier: int, prime: int, buckets: int) -> Tensor:
    """Return ``(((ids * multiplier) % prime + prime) % prime) % buckets``, products wrapping at 64 bits.

    Args:
        ids: int64, any shape.
        multiplier: Of the ids.
        prime: 1 to 2^63 - 1; what is left of a product below 0 is made positive by it.
        buckets: 1 to 2^63 - 1.

    Returns:
        int64 of the shape of ``ids``, contiguous, each in ``[0, buckets)``.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If a number is not in its range.

    Example:
        >>> multi_hash_ids(torch.tensor([1001, -1]), 3, 46997, 1000).tolist()
        [3, 994]
    """
    _check_ids("multi_hash_ids", ids)
    if not (1 <= prime <= _MOST and 1 <= buckets <= _MOST):
        raise ValueError(f"multi_hash_ids: prime and buckets must be 1 to {_MOST}, got {prime} and {buckets}")
    return torch.ops.recis.multi_hash_ids(ids.contiguous(), multiplier, prime, buckets)  # type: ignore[no-any-return]


def cross_ids(x: Tensor, y: Tensor) -> Tensor:
    """Return the id of each pair: MurmurHash64A (seed 0) of the eight bytes of x and then those of y.

    Args:
        x: int64, any shape.
        y: int64 of the shape and on the device of ``x``.

    Returns:
        int64 of that shape, contiguous.

    Raises:
        TypeError: If one is not int64.
        ValueError: If shapes or devices differ.

    Example:
        >>> cross_ids(torch.tensor([1001]), torch.tensor([1])).tolist()
        [-7808879811642834040]
    """
    _check_ids("cross_ids", x)
    _check_ids("cross_ids", y)
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(
            f"cross_ids: x and y must have one shape and device, got {list(x.shape)} on {x.device} and {list(y.shape)} "
            f"on {y.device}"
        )
    return torch.ops.recis.cross_ids(x.contiguous(), y.contiguous())  # type: ignore[no-any-return]


def map_values(values: Tensor, kind: MapKind, first: float, second: float = 0.0) -> Tensor:
    """Map each number to one of its dtype.

    Args:
        values: float32 or float64, any shape.
        kind: Which map, see ``MapKind``.
        first: Its first number, rounded to the dtype of ``values``.
        second: Its second number.

    Returns:
        The shape and dtype of ``values``, contiguous.

    Raises:
        TypeError: If the dtype is another one.
        ValueError: If there is no such kind.
        RuntimeError: On the CPU, if a value is NaN (other than for ``"fill"``) or has no logarithm.

    Example:
        >>> map_values(torch.tensor([-1.0, 0.5, 9.0]), "clip", 0, 1)
        tensor([0.0000, 0.5000, 1.0000])
    """
    if values.dtype not in _FLOATS:
        raise TypeError(f"map_values: values must be float32 or float64, got {values.dtype}; convert with .to()")
    if kind not in MAP_KINDS:
        raise ValueError(f"map_values: kind must be one of {list(MAP_KINDS)}, got {kind!r}")
    return torch.ops.recis.map_values(values.contiguous(), MAP_KINDS[kind], first, second)  # type: ignore[no-any-return]


def clip_ids(ids: Tensor, least: int, most: int) -> Tensor:
    """Return the nearest integer within ``[least, most]``.

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


def cast_to_ids(values: Tensor) -> Tensor:
    """Return the numbers without their fractions, as int64.

    Args:
        values: float32 or float64, any shape.

    Returns:
        int64 of that shape, contiguous.

    Raises:
        TypeError: If the dtype is another one.
        RuntimeError: On the CPU, if a value is NaN or outside the range of int64 (0 on CUDA).

    Example:
        >>> cast_to_ids(torch.tensor([1.9, -1.9]))
        tensor([ 1, -1])
    """
    if values.dtype not in _FLOATS:
        raise TypeError(f"cast_to_ids: values must be float32 or float64, got {values.dtype}")
    return torch.ops.recis.cast_to_ids(values.contiguous())  # type: ignore[no-any-return]


def _check_ids(where: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{where}: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
