"""The operations that come with the package."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.op import Column, Kernel
from recis_hybrid.ops.hash import HASH_KINDS, HashKind

_LEAST, _MOST = -(2**63), 2**63 - 1
_NARROW = (torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Hash:
    """Strings or ids → ids spread over all 64 bits.

    A string column (a RaggedTensor of uint8, a row a string) becomes int64 ``[B]``, one id a row: the hash of its
    bytes. A column of integers keeps its form, and each becomes the hash of its eight bytes, the lowest first; int8 to
    int32 are widened to int64 before. So the string "7" and the number 7 become different ids.

    Args:
        kind: ``"farm"`` (FarmHash Fingerprint64) or ``"murmur"`` (MurmurHash64A, seed 0).

    Example:
        >>> Feature("user", ops=[Hash("murmur")])
        Feature(name='user', ops=(Hash(kind='murmur'),), source='user')
    """

    kind: HashKind = "farm"

    def fault(self) -> str | None:
        """Returns what is wrong with the kind, or None."""
        if not isinstance(self.kind, str) or self.kind not in HASH_KINDS:
            return f"kind must be one of {list(HASH_KINDS)}, got {self.kind!r}"
        return None

    def kernel(self) -> Kernel:
        """Returns what hashes a column."""
        return self._hash

    def _hash(self, column: Column) -> Column:
        if column.values.dtype != torch.uint8:
            return column._replace(values=ops.hash.hash_ids(_ids("Hash", column.values), self.kind))
        if column.offsets is None:
            raise TypeError(
                "a dense uint8 column has no strings in it; a string column is a RaggedTensor of uint8 "
                "(RaggedTensor.from_strings makes one), numbers are converted with .to(torch.int64)"
            )
        if column.weights is not None:
            raise ValueError("weights on a string column would be one a byte; drop them")
        return Column(ops.hash.hash_bytes(column.values, column.offsets, self.kind))

    def __str__(self) -> str:
        return f"hash[{self.kind}]"


@dataclass(frozen=True)
class Mod:
    """Ids → ids in ``[0, n)``: the remainder of the id read as an unsigned number of 64 bits.

    The column keeps its form. For ids below 0 the result is not Python's ``%``: -1 counts as 2^64 - 1. int8 to int32
    are widened to int64 before.

    Args:
        n: The modulus, 1 to 2^63 - 1.
    """

    n: int

    def fault(self) -> str | None:
        """Returns what is wrong with the modulus, or None."""
        if not isinstance(self.n, int) or isinstance(self.n, bool) or not 1 <= self.n <= _MOST:
            return f"n must be an int from 1 to {_MOST}, got {self.n!r}; n is the number of different ids to keep"
        return None

    def kernel(self) -> Kernel:
        """Returns what reduces a column."""
        return lambda column: column._replace(values=ops.transform.mod_ids(_ids("Mod", column.values), self.n))

    def __str__(self) -> str:
        return f"mod[{self.n}]"


@dataclass(frozen=True)
class Bucketize:
    """Numbers → the number of the bucket that they lie in, int64 from 0 to ``len(boundaries)``.

    The column keeps its form. The bucket of v is the number of boundaries b with b <= v, or b < v where ``right`` is
    False (``right`` as in :func:`torch.bucketize`). Integers are compared exactly, also with fractional boundaries; for
    a float32 or float64 column the boundaries are rounded to its dtype first, so that a value written as 0.7 equals the
    boundary 0.7 in either. NaN goes to the last bucket, as in torch.

    Args:
        boundaries: At least one number, never decreasing. Equal ones have an empty bucket between them.
        right: Whether a value that equals a boundary goes to the bucket above it.

    Example:
        >>> engine = FeatureEngine([Feature("age", ops=[Bucketize([18, 65])])])
        >>> engine({"age": torch.tensor([17, 18, 70])})
        {'age': tensor([0, 1, 2])}
    """

    boundaries: Sequence[float]
    right: bool = True

    def __post_init__(self) -> None:
        listed = self.boundaries.tolist() if hasattr(self.boundaries, "tolist") else self.boundaries
        # A tuple, so that equal specs are found by their hash and nobody changes them afterwards.
        object.__setattr__(self, "boundaries", tuple(listed) if isinstance(listed, Iterable) else listed)

    def fault(self) -> str | None:
        """Returns what is wrong with the boundaries, or None."""
        if not isinstance(self.boundaries, tuple):
            return f"boundaries must be a list of numbers, got {self.boundaries!r}"
        if not self.boundaries:
            return "boundaries must be at least one number, got none; without boundaries there is but one bucket"
        for i, boundary in enumerate(self.boundaries):
            if not isinstance(boundary, numbers.Real) or isinstance(boundary, bool):
                return f"boundaries must be numbers, got {boundary!r} at {i}"
            if math.isnan(boundary):
                return f"boundaries must be numbers, got NaN at {i}; drop it, for nothing compares with NaN"
        for i, (before, after) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            if after < before:
                return f"boundaries must not decrease, got {before} and then {after} at {i + 1}; sort them"
        return None

    def kernel(self) -> Kernel:
        """Returns what puts a column into buckets."""
        return _BucketizeKernel(self)

    def __str__(self) -> str:
        return f"bucketize[{len(self.boundaries)} boundaries{'' if self.right else ', right=False'}]"


class _BucketizeKernel:
    """Keeps the boundaries as tensors: one for each dtype, on each device that asked."""

    def __init__(self, spec: Bucketize) -> None:
        self._right = spec.right
        floats = [float(boundary) for boundary in spec.boundaries]
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for dtype, numbers_of in (
            (torch.int64, _first_above(spec)),
            (torch.float32, floats),
            (torch.float64, floats),
        ):
            self._tables[dtype, torch.device("cpu")] = torch.tensor(numbers_of, dtype=dtype, device="cpu")

    def __call__(self, column: Column) -> Column:
        values = column.values.to(torch.int64) if column.values.dtype in _NARROW else column.values
        dtype, device = values.dtype, values.device
        if (dtype, torch.device("cpu")) not in self._tables:
            raise TypeError(
                f"Bucketize takes int8 to int64, float32 or float64, got {dtype}; have the reader give numbers where "
                f"these are strings, else convert the column with .float()"
            )
        if (dtype, device) not in self._tables:
            self._tables[dtype, device] = self._tables[dtype, torch.device("cpu")].to(device)
        # What _first_above says of an integer is always "at or above".
        right = self._right or dtype == torch.int64
        return column._replace(values=ops.transform.bucketize(values, self._tables[dtype, device], right=right))


def _first_above(spec: Bucketize) -> list[int]:
    """Returns for each boundary the least int64 above it (as ``right`` says); without those that none is above."""
    firsts: list[int] = []
    for boundary in spec.boundaries:
        if boundary == math.inf:
            continue
        if boundary == -math.inf:
            firsts.append(_LEAST)
            continue
        first = math.ceil(boundary) if spec.right else math.floor(boundary) + 1
        if first <= _MOST:
            firsts.append(max(first, _LEAST))
    return firsts


def _ids(where: str, values: Tensor) -> Tensor:
    """Returns the ids as int64."""
    if values.dtype in _NARROW:
        return values.to(torch.int64)
    if values.dtype == torch.uint8:
        raise TypeError(f"{where} takes integers, not the bytes of strings; put a Hash before it")
    if values.dtype != torch.int64:
        remedy = "put a Bucketize before it" if values.dtype.is_floating_point else "convert it with .to(torch.int64)"
        raise TypeError(f"{where} takes integers, got {values.dtype}; {remedy}")
    return values
