"""Operator that runs a program of element-wise operations over many columns in one call.

:class:`recis_hybrid.features.FeatureEngine` generates the programs. They are not validated: an incorrect program reads
and writes outside its tensors.

References:
    Vectorized interpretation: Boncz, Zukowski, Nes: MonetDB/X100: Hyper-Pipelining Query Execution, CIDR 2005.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = (
    "widen_8",
    "widen_16",
    "widen_32",
    "widen_u8",
    "hash_string",
    "hash_id",
    "mod",
    "multi_hash",
    "bucket_i64",
    "bucket_f32",
    "bucket_f64",
    "cross",
    "log_f32",
    "log_f64",
    "clip_i64",
    "clip_f32",
    "clip_f64",
    "normalize_f32",
    "normalize_f64",
    "fill_f32",
    "fill_f64",
    "i64_to_f32",
    "i64_to_f64",
    "f32_to_f64",
    "f64_to_f32",
    "f32_to_i64",
    "f64_to_i64",
    "i64_to_i32",
    "vocabulary_id",
    "vocabulary_string",
    "wrap_32",
    "time_part",
    "seconds_to",
    "seconds_between",
)
"""The instructions, in the order of their numbers in ``csrc/core/program.h``."""

_NO_INT64 = "is NaN or outside the range of int64; put FillNull or Clip before it"
_NO_LOGARITHM = "has no logarithm; put Clip before it, or set plus="
_UNKNOWN = "is not in the vocabulary; set unknown= to accept it"
_REFUSALS = {
    "hash_string": "has offsets that decrease or lie outside the bytes of its column",
    "log_f32": _NO_LOGARITHM,
    "log_f64": _NO_LOGARITHM,
    "f32_to_i64": _NO_INT64,
    "f64_to_i64": _NO_INT64,
    "vocabulary_id": _UNKNOWN,
    "vocabulary_string": f"{_UNKNOWN} (or correct its offsets, if they are invalid)",
}
"""Why an instruction refuses an element; all others refuse NaN only."""

SCRATCH_TILES = 8
"""Maximum number of intermediate results of a part of a program at a time."""

DTYPES = {torch.int32: 3, torch.int64: 4, torch.float32: 6, torch.float64: 7}
"""Dtypes of results, and their numbers in native code."""
_DTYPES_BY_NUMBER = {number: dtype for dtype, number in DTYPES.items()}


def _fake_feature_program(
    inputs: Sequence[Tensor],
    code: Tensor,
    params: Tensor,
    parts: Sequence[int],
    like: Sequence[int],
    dtypes: Sequence[int],
    refusals: str,
    parallel: bool,
) -> list[Tensor]:
    results = []
    for source, number in zip(like, dtypes, strict=True):
        shape = inputs[source].shape if source >= 0 else (inputs[-1 - source].shape[0] - 1,)
        results.append(inputs[0].new_empty(shape, dtype=_DTYPES_BY_NUMBER[number]))
    if code.device.type != "cpu":
        results.append(code.new_empty((code.shape[0],)))
    return results


def _fake_vocabulary_slots(hashes: Tensor, slots: int) -> Tensor:
    return hashes.new_empty(slots)


torch.library.register_fake("recis::feature_program", _fake_feature_program)
torch.library.register_fake("recis::vocabulary_slots", _fake_vocabulary_slots)


def divisor_words(divisor: int) -> tuple[int, int, int]:
    """Return the int64 parameters with which native code computes remainders without division.

    Args:
        divisor: 1 to 2^64 - 1.

    References:
        Granlund and Montgomery: Division by Invariant Integers using Multiplication, PLDI 1994, figure 4.1.
    """
    bits = (divisor - 1).bit_length()
    magic = ((((1 << bits) - divisor) << 64) // divisor + 1) % 2**64
    shift1, shift2 = min(bits, 1), max(bits - 1, 0)
    return as_int64(divisor), as_int64(magic), shift1 | shift2 << 8


def as_int64(word: int) -> int:
    """Return the int64 with the bits of an unsigned integer below 2^64."""
    return word - 2**64 if word >= 2**63 else word


def refusal(label: str, step: str) -> str:
    """Return the error of an instruction for an element that it refuses, in which ``{}`` stands for the element.

    Args:
        label: Names the operation.
        step: The instruction.
    """
    return f"{label}: element {{}} {_REFUSALS.get(step, 'is NaN; put FillNull before it')}"


def vocabulary_slots(hashes: Tensor) -> Tensor:
    """Return the hash table of a vocabulary's entries.

    Args:
        hashes: int64 ``[N]`` on the CPU, the hash of each entry.

    Returns:
        int64 ``[S]``, S a power of two and at least 2 N: 1 + the index of the entry, or 0 in an empty slot.
    """
    slots = 1 << max(1, (2 * hashes.numel()).bit_length())
    return torch.ops.recis.vocabulary_slots(hashes.contiguous(), slots)  # type: ignore[no-any-return]


def run(
    inputs: list[Tensor],
    code: Tensor,
    params: Tensor,
    parts: list[int],
    like: list[int],
    dtypes: list[int],
    refusals: str,
    parallel: bool = True,
) -> list[Tensor]:
    """Run a program.

    Args:
        inputs: Contiguous tensors on one device.
        code: int64 ``[K, 8]`` on the same device: the instructions.
        params: int64 ``[P]`` on the same device: tables used by instructions.
        parts: Five numbers for each part: its first instruction; one past its last; the input that has its length; 1 if
            that input holds offsets, otherwise 0; and an input of offsets whose last element is the number of rows in
            use, or -1 if all are. Elements after them raise no errors.
        like: For each result, the input that has its shape, or -1 - i for one element less than the offsets
            ``inputs[i]``.
        dtypes: For each result, the number of its dtype in ``DTYPES``.
        refusals: For each instruction a line, the result of :func:`refusal`.
        parallel: Whether to use torch's threads on the CPU.

    Returns:
        The results. On CUDA, one more follows, int64 ``[K]``: for each instruction, 1 + the index of a refused element,
        or 0.

    Raises:
        RuntimeError: On the CPU, if an instruction refuses an element.
    """
    return torch.ops.recis.feature_program(inputs, code, params, parts, like, dtypes, refusals, parallel)  # type: ignore[no-any-return]
