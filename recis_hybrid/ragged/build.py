"""Conversions between RaggedTensors and Python lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from recis_hybrid.ragged.checks import Parts


def offsets_of(lengths: Sequence[int]) -> torch.Tensor:
    """Return the offsets, int64 ``[B + 1]``, of rows of these lengths."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def _is_list(item: object) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str | bytes)


def _flatten(rows: Iterable[Any]) -> tuple[list[Any], list[list[int]]]:
    """Return the values, and for each level the lengths of its lists."""
    flat = [list(row) for row in rows]
    items, lengths = _unnest("from_lists", [item for row in flat for item in row])
    return items, [[len(row) for row in flat], *lengths]


def _unnest(where: str, items: list[Any]) -> tuple[list[Any], list[list[int]]]:
    """Return the innermost items of lists, and for each level of lists their lengths."""
    lengths = []
    while any(_is_list(item) for item in items):
        if not all(_is_list(item) for item in items):
            wrong = next(item for item in items if not _is_list(item))
            raise ValueError(f"RaggedTensor.{where}: all lists must have the same depth, got {wrong!r} and a list")
        lengths.append([len(item) for item in items])
        items = [value for item in items for value in item]
    return items, lengths


def from_lists(rows: Iterable[Any], dtype: torch.dtype | None, weights: Iterable[Any] | None) -> Parts:
    """Return the parts of :meth:`RaggedTensor.from_lists`."""
    flat, lengths = _flatten(rows)
    values = torch.tensor(flat, dtype=torch.int64 if dtype is None and not flat else dtype)
    flat_weights = None
    if weights is not None:
        listed, weight_lengths = _flatten(weights)
        if weight_lengths != lengths:
            raise ValueError(
                f"RaggedTensor.from_lists: each row must have as many weights as values, got rows of {lengths[-1]} "
                f"values and {weight_lengths[-1]} weights"
            )
        flat_weights = torch.tensor(listed, dtype=torch.float32)
    *outer, offsets = [offsets_of(level) for level in lengths]
    return values, offsets, flat_weights, tuple(outer)


def from_strings(strings: Iterable[Any]) -> Parts:
    """Return the parts of :meth:`RaggedTensor.from_strings`."""
    items, lengths = _unnest("from_strings", list(strings))
    encoded = [item.encode() if isinstance(item, str) else bytes(item) for item in items]
    # torch shares only writable memory, such as that of a bytearray.
    joined = bytearray(b"".join(encoded))
    values = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return values, offsets_of([len(string) for string in encoded]), None, tuple(map(offsets_of, lengths))


def listed(values: Any, levels: Sequence[torch.Tensor]) -> list[Any]:
    """Split a sequence of values into nested lists, given the offsets of each level, the outermost first."""
    for offsets in reversed(levels):
        values = [values[start:stop] for start, stop in pairwise(offsets.tolist())]
    return values  # type: ignore[no-any-return]


def row_of(place: int, outer: Sequence[torch.Tensor]) -> int:
    """Return the row that holds an innermost list, given the int64 offsets of the levels above it."""
    for offsets in reversed(outer):
        place = int(torch.searchsorted(offsets.cpu(), place, right=True)) - 1
    return place


def decoded(where: str, strings: Sequence[bytes], outer: Sequence[torch.Tensor], remedy: str = "") -> list[str]:
    """Decode strings as UTF-8.

    Args:
        where: Prefix of the message.
        strings: The strings of all rows.
        outer: The int64 offsets of the lists that hold them, the outermost first.
        remedy: A further remedy, for the end of the message.

    Raises:
        ValueError: If a string is not UTF-8; the message names its row.
    """
    try:
        return [string.decode() for string in strings]
    except UnicodeDecodeError:
        place, fault = next(found for found in enumerate(map(_decoding_fault, strings)) if found[1] is not None)
        raise ValueError(
            f"{where}: strings must be UTF-8, got {strings[place][:60]!r} in row {row_of(place, outer)} ({fault}); "
            f"correct it where the column is read{remedy}"
        ) from None


def _decoding_fault(string: bytes) -> str | None:
    try:
        string.decode()
    except UnicodeDecodeError as error:
        return f"{error.reason} at byte {error.start}"
    return None
