"""Operations that produce ids: hashes of strings and ids, remainders, and strings of digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from recis_hybrid import ops
from recis_hybrid.features.common import MOST, ids_of, integers, one, without_strings
from recis_hybrid.features.op import Column, Form, Job, Kernel, Lowered, Step
from recis_hybrid.features.ops.primes import largest_prime_up_to
from recis_hybrid.features.ops.shaping import ShapingOp, exact_on
from recis_hybrid.ops.hash import HASH_KINDS, HashKind
from recis_hybrid.ops.program import divisor_words

_MULTIPLIERS = (1, 3, 5, 7)
_WIDENINGS = (29, 47, 67, 83)


def id_form(where: str, form: Form) -> Form:
    """Return the form of the ids of strings or integers.

    Raises:
        TypeError: If the column holds neither.
        ValueError: If the bytes of strings have weights.
    """
    if form.dtype != torch.uint8:
        return integers(where, form)
    if not form.strings:
        raise TypeError(
            "a dense uint8 column holds no strings; build a string column with RaggedTensor.from_strings, or "
            "convert numbers with .to(torch.int64)"
        )
    if form.dims != 1:
        raise TypeError(
            f"{where} takes strings whose bytes are [N], got values of {form.dims} dimensions; build string "
            f"columns with RaggedTensor.from_strings"
        )
    if form.weighted and form.levels == 1:
        raise ValueError("weights on a string column would apply to individual bytes; drop them")
    return form._replace(dtype=torch.int64, levels=form.levels - 1, dims=1)


@dataclass(frozen=True)
class Hash:
    """Strings or ids → ids distributed over all 64 bits.

    A string column (a RaggedTensor of uint8 whose rows are strings) becomes int64 ``[B]``, the hash of each string.
    Lists of strings become lists of ids and keep their weights. A column of integers keeps its shape; each integer is
    widened to int64 and replaced by the hash of its eight bytes in little-endian order. So the string "7" and the
    number 7 become different ids.

    Args:
        kind: ``"farm"`` (FarmHash Fingerprint64), ``"murmur"`` (MurmurHash64A, seed 0), ``"xxh64"`` (seed 0), or
            ``"djb2"`` or ``"sdbm"``, which are weak and meant for :class:`StringMultiHash`.

    Example:
        >>> Feature("user", ops=[Hash("murmur")])
        Feature('user', ops=[Hash(kind='murmur')])
    """

    kind: HashKind = "farm"

    def fault(self) -> str | None:
        """Return what is wrong with the kind, or None."""
        if not isinstance(self.kind, str) or self.kind not in HASH_KINDS:
            return f"kind must be one of {list(HASH_KINDS)}, got {self.kind!r}"
        return None

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that hashes strings or ids."""
        form = one(forms)
        name = "hash_string" if form.strings else "hash_id"
        return Lowered(id_form("Hash", form), (Step(name, (HASH_KINDS[self.kind],)),))

    def kernel(self) -> Kernel:
        """Return the kernel."""
        return self._hash

    def _hash(self, column: Column) -> Column:
        form = Form.of(column)
        id_form("Hash", form)
        if not form.strings:
            return column._replace(values=ops.hash.hash_ids(ids_of(column), self.kind))
        assert column.offsets is not None
        used = column.outer[-1].contiguous() if column.outer else None
        return without_strings(column, ops.hash.hash_bytes(column.values, column.offsets, self.kind, used=used))

    def __str__(self) -> str:
        return f"hash[{self.kind}]"


@dataclass(frozen=True)
class Mod:
    """Ids → ids in ``[0, n)``: the remainder of each id, read as an unsigned 64-bit integer.

    The column keeps its shape; integers are widened to int64 first. For ids below 0 the result differs from ``%`` in
    Python: -1 counts as 2^64 - 1. A power of two keeps the lowest bits: ``Mod(2**52)`` is ``id & (2**52 - 1)``, as in
    the coalesced tables of RecIS.

    Args:
        n: The modulus, 1 to 2^64 - 1. Remainders from 2^63 on are returned as negative int64 with the same bits.
    """

    n: int

    def fault(self) -> str | None:
        """Return what is wrong with the modulus, or None."""
        if not isinstance(self.n, int) or isinstance(self.n, bool) or not 1 <= self.n < 2**64:
            return f"n must be an int from 1 to {2**64 - 1}, got {self.n!r}; n is the number of distinct ids to keep"
        return None

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that computes remainders."""
        return Lowered(integers("Mod", one(forms)), (Step("mod", divisor_words(self.n)),))

    def kernel(self) -> Kernel:
        """Return the kernel."""
        return self._reduce

    def _reduce(self, column: Column) -> Column:
        integers("Mod", Form.of(column))
        return column._replace(values=ops.transform.mod_ids(ids_of(column), self.n))

    def __str__(self) -> str:
        return f"mod[{self.n}]"


class DecimalCall:
    """All :class:`DecimalString` of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._unsigned = [int(job.op.unsigned) for job in jobs]
        self._parallel = parallel

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        ids = [ids_of(column).contiguous() for (column,) in columns]
        outputs = torch.ops.recis.decimal_strings(ids, self._unsigned, exact_on(ids[0].device), self._parallel)
        results = []
        for k, (column,) in enumerate(columns):
            outer = () if column.offsets is None else (*column.outer, column.offsets)
            results.append(Column(outputs[2 * k + 1], outputs[2 * k], column.weights, outer))
        return results


@dataclass(frozen=True)
class DecimalString(ShapingOp):
    """Ids → strings of their decimal digits, as :class:`str` returns them.

    A column ``[B]`` becomes a string column; rows of ids become lists of strings, which keep their weights. A
    :class:`Hash` after this operation maps 7 to the id of "7".

    Args:
        unsigned: Whether to read ids as unsigned 64-bit integers.

    Example:
        >>> engine = FeatureEngine([Feature("user", ops=[DecimalString()])])
        >>> engine({"user": torch.tensor([42, -7])})["user"].to_strings()
        ['42', '-7']
    """

    unsigned: bool = False
    kind: ClassVar[type[DecimalCall]] = DecimalCall

    def fault(self) -> str | None:
        """Return what is wrong with ``unsigned``, or None."""
        return None if isinstance(self.unsigned, bool) else f"unsigned must be True or False, got {self.unsigned!r}"

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the strings."""
        form = integers("DecimalString", one(forms))
        if form.dims != 1:
            raise TypeError(
                f"DecimalString takes one id for each row ([B]) or rows of ids, got values of {form.dims} dimensions; "
                f"convert ids [B, L] to rows with RaggedTensor.from_padded"
            )
        return form._replace(dtype=torch.uint8, levels=form.levels + 1)

    def __str__(self) -> str:
        return "decimal_string[unsigned]" if self.unsigned else "decimal_string"


@dataclass(frozen=True)
class MultiHashPart:
    """One of the hashes of :class:`MultiHash`: ids → ids in ``[0, buckets)``.

    The result is ``(((id * m) % p + p) % p) % buckets`` in signed 64-bit arithmetic that wraps, with the multiplier m
    1, 3, 5 or 7 and the largest prime p up to 29, 47, 67 or 83 times ``buckets``.

    Args:
        buckets: Number of distinct ids.
        which: Number of the hash, 0 to 3.
    """

    buckets: int
    which: int

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        most = MOST // max(_WIDENINGS)
        if not isinstance(self.buckets, int) or isinstance(self.buckets, bool) or not 1 <= self.buckets <= most:
            return f"buckets must be ints from 1 to {most}, got {self.buckets!r}; each is a number of distinct ids"
        if not isinstance(self.which, int) or not 0 <= self.which < len(_WIDENINGS):
            return f"which must be 0 to {len(_WIDENINGS) - 1}, got {self.which!r}"
        return None

    def parameters(self) -> tuple[int, int]:
        """Return the multiplier and the prime."""
        return _MULTIPLIERS[self.which], largest_prime_up_to(_WIDENINGS[self.which] * self.buckets)

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that hashes."""
        multiplier, prime = self.parameters()
        table = torch.tensor([multiplier, *divisor_words(prime), *divisor_words(self.buckets)])
        return Lowered(integers("MultiHash", one(forms)), (Step("multi_hash", (), table),))

    def kernel(self) -> Kernel:
        """Return the kernel."""
        multiplier, prime = self.parameters()

        def kernel(column: Column) -> Column:
            integers("MultiHash", Form.of(column))
            return column._replace(values=ops.transform.multi_hash_ids(ids_of(column), multiplier, prime, self.buckets))

        return kernel

    def __str__(self) -> str:
        return f"multi_hash[{self.buckets}, {self.which}]"


@dataclass(frozen=True)
class MultiHash:
    """Ids → up to four columns of ids, by hashes with different primes: two ids rarely collide in all of them.

    A feature ``f`` that ends with it becomes the columns ``f_0``, ``f_1``, and so on; later operations apply to each.

    Args:
        buckets: For each hash, one to four, the number of distinct ids.

    Example:
        >>> engine = FeatureEngine([Feature("user", ops=[MultiHash([1000, 1000])])])
        >>> engine({"user": torch.tensor([1001, 1002, 1003])})
        {'user_0': tensor([1, 2, 3]), 'user_1': tensor([3, 6, 9])}

    References:
        Svenstrup, Hansen, Winther: Hash Embeddings for Efficient Word Representations, NeurIPS 2017.
    """

    buckets: Sequence[int]

    def __post_init__(self) -> None:
        if isinstance(self.buckets, Sequence) and not isinstance(self.buckets, str):
            object.__setattr__(self, "buckets", tuple(self.buckets))

    def fault(self) -> str | None:
        """Return what is wrong with the buckets, or None."""
        if not isinstance(self.buckets, tuple) or not 1 <= len(self.buckets) <= len(_WIDENINGS):
            return f"buckets must be a list of one to {len(_WIDENINGS)} ints, got {self.buckets!r}"
        return next((fault for chain in self.expand() if (fault := chain[0].fault()) is not None), None)

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return a chain for each hash."""
        return [[MultiHashPart(buckets, which)] for which, buckets in enumerate(self.buckets)]


@dataclass(frozen=True)
class StringMultiHash:
    """Strings → several columns of ids, one for each hash: two strings rarely collide in all of them.

    A feature ``f`` that ends with it becomes the columns ``f_0``, ``f_1``, and so on; later operations apply to each.

    Args:
        buckets: For each hash, the number of distinct ids; None keeps all 64 bits.
        kinds: The hashes; see :class:`Hash`.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("word", ops=[StringMultiHash([100, 100], ["djb2", "sdbm"])])])
        >>> engine({"word": RaggedTensor.from_strings(["a", "b"])})
        {'word_0': tensor([70, 71]), 'word_1': tensor([97, 98])}
    """

    buckets: Sequence[int | None] = (None, None, None, None)
    kinds: Sequence[HashKind] = ("farm", "murmur", "djb2", "sdbm")

    def __post_init__(self) -> None:
        for name in ("buckets", "kinds"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        if not isinstance(self.kinds, tuple) or not self.kinds:
            return f"kinds must be a list of at least one of {list(HASH_KINDS)}, got {self.kinds!r}"
        if not isinstance(self.buckets, tuple) or len(self.buckets) != len(self.kinds):
            return f"buckets must hold one element for each of kinds, got {self.buckets!r} for {list(self.kinds)}"
        return next((fault for chain in self.expand() for op in chain if (fault := op.fault()) is not None), None)

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return a chain for each hash."""
        chains: list[list[Any]] = []
        for kind, buckets in zip(self.kinds, self.buckets, strict=True):
            chains.append([Hash(kind)] if buckets is None else [Hash(kind), Mod(buckets)])
        return chains
