"""Element-wise operators of features: from ids and numbers to small integers."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 2**63 - 1


def _fake_mod_ids(ids: Tensor, modulus: int) -> Tensor:
    return ids.new_empty(ids.shape)


def _fake_bucketize(values: Tensor, boundaries: Tensor, right: bool) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int64)


torch.library.register_fake("recis::mod_ids", _fake_mod_ids)
torch.library.register_fake("recis::bucketize", _fake_bucketize)


def mod_ids(ids: Tensor, modulus: int) -> Tensor:
    """Returns ``ids`` modulo ``modulus``, the 64 bits of an id read as an unsigned number.

    So a hash, which is unsigned, keeps its even spread, and the result is never negative. For ids below 0 it differs
    from Python's and torch's ``%``: the id -1 counts as 2^64 - 1.

    Args:
        ids: int64, any shape.
        modulus: 1 to 2^63 - 1.

    Returns:
        int64 of the shape of ``ids``, contiguous, each in ``[0, modulus)``.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If the modulus is not in its range.

    Example:
        >>> mod_ids(torch.tensor([12, -1]), 10).tolist()
        [2, 5]
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"mod_ids: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
    if not 1 <= modulus <= _MOST:
        raise ValueError(f"mod_ids: the modulus must be 1 to {_MOST}, got {modulus}")
    return torch.ops.recis.mod_ids(ids.contiguous(), modulus)  # type: ignore[no-any-return]


def bucketize(values: Tensor, boundaries: Tensor, *, right: bool = True) -> Tensor:
    """Returns between which boundaries each value lies.

    The bucket of v is the number of boundaries b with b <= v (``right=True``) or b < v (``right=False``), as in
    :func:`torch.bucketize`. NaN goes to the last bucket, as there. Whether the boundaries are sorted is not checked,
    which would make the host wait for a GPU; where they are not, the buckets mean nothing.

    Args:
        values: int64, float32 or float64, any shape.
        boundaries: ``[K]`` of the dtype and on the device of ``values``, sorted.
        right: Whether a value that equals a boundary goes to the bucket above it.

    Returns:
        int64 of the shape of ``values``, contiguous, each in ``[0, K]``.

    Raises:
        TypeError: If a dtype is another one.
        ValueError: If the boundaries have another number of dimensions or another device.

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
    return torch.ops.recis.bucketize(values.contiguous(), boundaries.contiguous(), right)  # type: ignore[no-any-return]
