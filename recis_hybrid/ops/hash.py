"""Operators that hash strings and ids to 64-bit ids.

Shapes: T bytes in total, B strings. A hash is an unsigned 64-bit integer, returned as the int64 with the same bits.

References:
    FarmHash, Geoff Pike, 2014 (Fingerprint64). MurmurHash2, Austin Appleby, 2008 (MurmurHash64A, here with seed 0).
    xxHash, Yann Collet, 2012 (XXH64, here with seed 0). djb2 by Dan Bernstein and sdbm by Ozan Yigit, both with a
    64-bit state.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid.ops import faults

HashKind: TypeAlias = Literal["farm", "murmur", "xxh64", "djb2", "sdbm"]
"""``"farm"``: FarmHash Fingerprint64; ``"murmur"``: MurmurHash64A with seed 0; ``"xxh64"``: XXH64 with seed 0;
``"djb2"`` and ``"sdbm"``: weak byte-wise hashes, meant for several hashes of the same string."""

HASH_KINDS: dict[str, int] = {"farm": 0, "murmur": 1, "xxh64": 2, "djb2": 3, "sdbm": 4}
"""Kinds of hashes, and their numbers in native code."""


def _fake_hash_bytes(
    values: Tensor, offsets: Tensor, kind: int, used: Tensor | None = None, faults: Tensor | None = None
) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, dtype=torch.int64)


def _fake_hash_ids(ids: Tensor, kind: int) -> Tensor:
    return ids.new_empty(ids.shape)


torch.library.register_fake("recis::hash_bytes", _fake_hash_bytes)
torch.library.register_fake("recis::hash_ids", _fake_hash_ids)


def hash_bytes(values: Tensor, offsets: Tensor, kind: HashKind = "farm", *, used: Tensor | None = None) -> Tensor:
    """Return the hash of each string of a column.

    Args:
        values: uint8 ``[T]``: the bytes of all strings.
        offsets: int64 ``[B + 1]`` on the device of ``values``: string i is ``values[offsets[i]:offsets[i + 1]]``.
        kind: One of ``HASH_KINDS``.
        used: int64, on the same device: its last element is the number of strings in use, for callers that only know a
            bound; the offsets of strings after them may be invalid. None: all.

    Returns:
        int64 ``[B]``, identical on all devices and machines.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong, the devices differ, or ``kind`` is unknown.
        RuntimeError: If offsets decrease or point outside the values. On a GPU the hash of the string is 0, and a later
            call raises, or ``ops.faults.check()``.

    Example:
        >>> hash_bytes(torch.tensor([0, 1, 2], dtype=torch.uint8), torch.tensor([0, 3])).tolist()
        [-7736835464683084646]
    """
    if values.dtype != torch.uint8 or offsets.dtype != torch.int64:
        raise TypeError(
            f"hash_bytes: values must be uint8 and offsets int64, got {values.dtype} and {offsets.dtype}; "
            f"pass strings as their bytes, and hash ids with hash_ids"
        )
    if values.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(
            f"hash_bytes: values must be [T] and offsets [B + 1], got {list(values.shape)} and {list(offsets.shape)}"
        )
    if values.device != offsets.device:
        raise ValueError(
            f"hash_bytes: values and offsets must be on one device, got {values.device} and {offsets.device}"
        )
    number = _number("hash_bytes", kind)
    word = faults.words(values, "hash_bytes: offsets decrease or lie outside the bytes")
    return torch.ops.recis.hash_bytes(values.contiguous(), offsets.contiguous(), number, used, word)  # type: ignore[no-any-return]


def hash_ids(ids: Tensor, kind: HashKind = "farm") -> Tensor:
    """Return the hash of each id, i.e. of the string of its eight bytes in little-endian order.

    Args:
        ids: int64, any shape.
        kind: One of ``HASH_KINDS``.

    Returns:
        int64 of the shape of ``ids``, contiguous.

    Raises:
        TypeError: If ``ids`` is not int64.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> as_bytes = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)
        >>> bool(hash_ids(torch.tensor([1])) == hash_bytes(as_bytes, torch.tensor([0, 8])))
        True
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"hash_ids: ids must be int64, got {ids.dtype}; convert with .to(torch.int64)")
    return torch.ops.recis.hash_ids(ids.contiguous(), _number("hash_ids", kind))  # type: ignore[no-any-return]


def _number(where: str, kind: str) -> int:
    if kind not in HASH_KINDS:
        raise ValueError(f"{where}: kind must be one of {list(HASH_KINDS)}, got {kind!r}")
    return HASH_KINDS[kind]
