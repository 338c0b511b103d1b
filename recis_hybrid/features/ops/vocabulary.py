"""Vocabulary and Mask: positions of strings or ids in a list, and membership in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.common import FLOATS, LEAST, MOST, bits, ids_of, integers, numbers, one, without_strings
from recis_hybrid.features.op import Column, Form, Kernel, Lowered, Step
from recis_hybrid.features.ops.ids import id_form
from recis_hybrid.ragged import RaggedTensor


@dataclass(frozen=True)
class Vocabulary:
    """Strings or ids → their positions in a list, int64 from 0.

    A string column becomes int64 ``[B]``, lists of strings become lists of positions, and a column of integers keeps
    its shape. Lookups are exact: no two entries share a position.

    Args:
        source: Path of a UTF-8 file with an entry on each line, or the entries: all strings (or bytes), or all ints.
        unknown: Result for values that are not in the list; None refuses them.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> engine = FeatureEngine([Feature("city", ops=[Vocabulary(["rome", "oslo"], unknown=2)])])
        >>> engine({"city": RaggedTensor.from_strings(["oslo", "paris", "rome"])})
        {'city': tensor([1, 2, 0])}
    """

    source: str | PathLike[str] | Iterable[str | bytes | int]
    unknown: int | None = None
    entries: tuple[bytes | int, ...] = field(init=False, repr=False, compare=True)
    """The entries, in order; strings as UTF-8."""

    def __post_init__(self) -> None:
        listed: Iterable[str | bytes | int]
        if isinstance(self.source, str | PathLike):
            # Split at line feeds only: entries may contain other characters at which Python splits lines.
            lines = Path(self.source).read_bytes().split(b"\n")
            listed = [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]
        else:
            listed = [_as_int(entry) for entry in self.source]
            # Equality and hash use the source.
            object.__setattr__(self, "source", tuple(listed))
        entries = tuple(entry.encode() if isinstance(entry, str) else _as_int(entry) for entry in listed)
        object.__setattr__(self, "entries", entries)

    def fault(self) -> str | None:
        """Return what is wrong with the entries, or None."""
        if not self.entries:
            return f"there must be at least one entry, got none in {self.source!r}"
        kind = bytes if isinstance(self.entries[0], bytes) else int
        for place, entry in enumerate(self.entries):
            if not isinstance(entry, kind) or isinstance(entry, bool):
                return f"entries must be all strings or all ints, got {entry!r} at {place}"
            if isinstance(entry, int) and not LEAST <= entry <= MOST:
                return f"entries must be 64-bit ints, got {entry} at {place}"
        if len(set(self.entries)) != len(self.entries):
            seen: set[bytes | int] = set()
            duplicate = next(entry for entry in self.entries if entry in seen or seen.add(entry))  # type: ignore[func-returns-value]
            return f"entries must be distinct, got {duplicate!r} twice; drop one"
        whole = isinstance(self.unknown, int) and not isinstance(self.unknown, bool)
        if self.unknown is not None and not (whole and 0 <= self.unknown <= MOST):
            return f"unknown must be an int of at least 0, or None to refuse unknown values, got {self.unknown!r}"
        return None

    def check(self, form: Form) -> Form:
        """Return the form of the positions.

        Raises:
            TypeError: If the column and the entries are not both strings or both integers.
        """
        if form.strings != isinstance(self.entries[0], bytes):
            raise TypeError(
                f"Vocabulary has {'strings' if isinstance(self.entries[0], bytes) else 'integers'} as entries, and the "
                f"column has {'strings' if form.strings else f'{form.dtype}'}; list entries of the column's type"
            )
        return id_form("Vocabulary", form) if form.strings else integers("Vocabulary", form)

    def table(self) -> Tensor:
        """Return the table for ``csrc/core/vocabulary.h``, int64 words."""
        if isinstance(self.entries[0], bytes):
            strings = RaggedTensor.from_strings(self.entries)  # type: ignore[arg-type]
            keys = ops.hash.hash_bytes(strings.values, strings.offsets, "farm")
            hashes, offsets = keys, strings.offsets
            padded = torch.cat([strings.values, strings.values.new_zeros(-strings.values.numel() % 8)])
            words = padded.view(torch.int64)
        else:
            keys = torch.tensor(self.entries, dtype=torch.int64)
            hashes = ops.hash.hash_ids(keys, "murmur")
            offsets = words = torch.empty(0, dtype=torch.int64)
        slots = ops.program.vocabulary_slots(hashes)
        places = [6]
        for part in (slots, keys, offsets):
            places.append(places[-1] + part.numel())
        unknown = -1 if self.unknown is None else self.unknown
        header = torch.tensor([slots.numel() - 1, *places, unknown])
        return torch.cat([header, slots, keys, offsets, words])

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that looks values up."""
        form = one(forms)
        name = "vocabulary_string" if form.strings else "vocabulary_id"
        return Lowered(self.check(form), (Step(name, (), self.table()),))

    def kernel(self) -> Kernel:
        """Return the kernel."""
        places = {entry: place for place, entry in enumerate(self.entries)}

        def place_of(entry: bytes | int) -> int:
            place = places.get(entry, self.unknown)
            if place is None:
                raise ValueError(f"{entry!r} is not in the vocabulary; set unknown= to accept it")
            return place

        def kernel(column: Column) -> Column:
            form = Form.of(column)
            self.check(form)
            if form.strings:
                return _of_each_string(column, place_of, torch.int64)
            listed = [place_of(number) for number in ids_of(column).flatten().tolist()]
            found = torch.tensor(listed, dtype=torch.int64, device=column.values.device)
            return column._replace(values=found.view(column.values.shape))

        return kernel

    def __repr__(self) -> str:
        path = f"{str(self.source)!r}, " if isinstance(self.source, str | PathLike) else ""
        return f"Vocabulary({path}{len(self.entries)} entries, unknown={self.unknown!r})"

    def __str__(self) -> str:
        return f"vocabulary[{len(self.entries)} entries]"


def _as_int(value: Any) -> Any:
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


def _of_each_string(column: Column, function: Callable[[bytes], int], dtype: torch.dtype) -> Column:
    """Return a column with each of its strings replaced by a number."""
    assert column.offsets is not None
    strings = RaggedTensor(column.values, column.offsets).to_strings(decode=False)
    results = torch.tensor([function(string) for string in strings], dtype=dtype, device=column.values.device)
    return without_strings(column, results)


def as_tuple(values: Any) -> Any:
    """Return distinct values as a tuple, strings as UTF-8; anything but a collection is returned unchanged."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        return values
    return tuple(dict.fromkeys(value.encode() if isinstance(value, str) else _as_int(value) for value in values))


@dataclass(frozen=True)
class Mask:
    """Values or strings → float32: 0 for the listed values, 1 for all others.

    A column of numbers keeps its shape; a string column becomes ``[B]``, and lists of strings become lists of numbers.
    Comparisons are exact.

    Args:
        values: All strings (or bytes), or all numbers. Numbers that an integer column cannot hold match nothing in it.

    Example:
        >>> engine = FeatureEngine([Feature("known", ops=[Mask([0, -1])], source="item")])
        >>> engine({"item": torch.tensor([[7, 0], [-1, 8]])})
        {'known': tensor([[1., 0.],
                [0., 1.]])}
    """

    values: Sequence[int | float | str | bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", as_tuple(self.values))

    def fault(self) -> str | None:
        """Return what is wrong with the values, or None."""
        if not isinstance(self.values, tuple):
            return f"values must be a list of numbers or of strings, got {self.values!r}"
        if not self.values:
            return "there must be at least one value, got none"
        strings = isinstance(self.values[0], bytes)
        for place, value in enumerate(self.values):
            if isinstance(value, bool) or not isinstance(value, bytes if strings else int | float):
                return f"values must be all strings or all numbers, got {value!r} at {place}"
            if isinstance(value, float) and math.isnan(value):
                return f"values must be numbers, got NaN at {place}; put FillNull before it"
        return None

    def check(self, form: Form) -> Form:
        """Return the form of the mask.

        Raises:
            TypeError: If the column and the values are not both strings or both numbers.
        """
        if form.strings != isinstance(self.values[0], bytes):
            raise TypeError(
                f"Mask has {'strings' if isinstance(self.values[0], bytes) else 'numbers'}, and the column has "
                f"{'strings' if form.strings else f'{form.dtype}'}; list values of the column's type"
            )
        result = id_form("Mask", form) if form.strings else numbers("Mask", form)
        return result._replace(dtype=torch.float32)

    def lower(self, forms: Sequence[Form]) -> Lowered | None:
        """Return the instructions that look values up; None for floats."""
        form = one(forms)
        result = self.check(form)
        if form.dtype in FLOATS:
            return None
        listed: Sequence[Any] = self.values if form.strings else self._whole()
        if not listed:
            return None
        table = Vocabulary(listed, unknown=len(listed)).table()
        last = len(listed) - 1
        steps = (
            Step("vocabulary_string" if form.strings else "vocabulary_id", (), table),
            Step("clip_i64", (last, last + 1)),
            Step("i64_to_f32"),
            Step("normalize_f32", (bits(float(last)), bits(1.0))),
        )
        return Lowered(result, steps)

    def _whole(self) -> tuple[int, ...]:
        """Return the values that are 64-bit integers."""
        whole = [int(value) for value in self.values if math.isfinite(value) and value == int(value)]  # type: ignore[arg-type]
        return tuple(dict.fromkeys(value for value in whole if LEAST <= value <= MOST))

    def kernel(self) -> Kernel:
        """Return a reference kernel in torch, which compares a column with each value."""

        def kernel(column: Column) -> Column:
            form = Form.of(column)
            self.check(form)
            if form.strings:
                return _of_each_string(column, lambda string: string not in self.values, torch.float32)
            listed = self.values if form.dtype in FLOATS else self._whole()
            values = column.values if form.dtype in FLOATS else ids_of(column)
            mask = torch.ones_like(values, dtype=torch.bool)
            for value in listed:
                mask &= values != value
            return column._replace(values=mask.float())

        return kernel

    def __str__(self) -> str:
        return f"mask[{len(self.values)} values]"
