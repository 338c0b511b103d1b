"""Vocabulary: strings or ids to their places in a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.common import LEAST, MOST, ids_of, integers, one
from recis_hybrid.features.ids import hashed, without_strings
from recis_hybrid.features.op import Column, Form, Kernel, Lowered, Step
from recis_hybrid.ragged import RaggedTensor


@dataclass(frozen=True)
class Vocabulary:
    """Strings or ids → their places in a list, int64 from 0.

    A string column becomes int64 ``[B]``, lists of strings become lists of places, and a column of integers keeps its
    form. It is exact: no two entries share a place.

    Args:
        source: A UTF-8 file of an entry a line, or the entries: all strings (or bytes), or all ints.
        unknown: What becomes of a value that is no entry; None refuses it. A number past the last entry makes one more.

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
        given: Iterable[str | bytes | int]
        if isinstance(self.source, str | PathLike):
            # Of lines that end with a line feed: other characters that end lines for Python may be part of an entry.
            lines = Path(self.source).read_bytes().split(b"\n")
            given = [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]
        else:
            given = list(self.source)
            # What it was made of is what it is compared by, and must be hashable.
            object.__setattr__(self, "source", tuple(given))
        entries = tuple(entry.encode() if isinstance(entry, str) else entry for entry in given)
        object.__setattr__(self, "entries", entries)

    def fault(self) -> str | None:
        """Returns what is wrong with the entries, or None."""
        if not self.entries:
            return f"there must be at least one entry, got none in {self.source!r}"
        kind = bytes if isinstance(self.entries[0], bytes) else int
        for place, entry in enumerate(self.entries):
            if not isinstance(entry, kind) or isinstance(entry, bool):
                return f"entries must be all strings or all ints, got {entry!r} at {place}"
            if isinstance(entry, int) and not LEAST <= entry <= MOST:
                return f"entries must be ints of 64 bits, got {entry} at {place}"
        if len(set(self.entries)) != len(self.entries):
            seen: set[bytes | int] = set()
            twice = next(entry for entry in self.entries if entry in seen or seen.add(entry))  # type: ignore[func-returns-value]
            return f"entries must differ, got {twice!r} twice; drop one"
        if self.unknown is not None and (not isinstance(self.unknown, int) or not 0 <= self.unknown <= MOST):
            return f"unknown must be an int from 0, or None to refuse what is no entry, got {self.unknown!r}"
        return None

    def check(self, form: Form) -> Form:
        """Returns the form of the places.

        Raises:
            TypeError: If the column and the entries are not both strings or both integers.
        """
        if form.strings != isinstance(self.entries[0], bytes):
            raise TypeError(
                f"Vocabulary has {'strings' if isinstance(self.entries[0], bytes) else 'integers'} for entries, and "
                f"the column {'strings' if form.strings else f'{form.dtype}'}; list the entries as the column has them"
            )
        return hashed("Vocabulary", form) if form.strings else integers("Vocabulary", form)

    def table(self) -> Tensor:
        """Returns the words that ``csrc/core/vocabulary.h`` reads."""
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
        """Returns the instruction that looks up."""
        form = one(forms)
        name = "vocabulary_string" if form.strings else "vocabulary_id"
        return Lowered(self.check(form), (Step(name, (), self.table()),))

    def kernel(self) -> Kernel:
        """Returns what looks a column up, by a dict: slow, and independent of the native table."""
        places = {entry: place for place, entry in enumerate(self.entries)}

        def place_of(entry: bytes | int) -> int:
            place = places.get(entry, self.unknown)
            if place is None:
                raise ValueError(f"{entry!r} is not in the vocabulary, and none was given for unknown")
            return place

        def kernel(column: Column) -> Column:
            form = Form.of(column)
            self.check(form)
            device = column.values.device
            if form.strings:
                assert column.offsets is not None
                strings = RaggedTensor(column.values, column.offsets).to_strings()
                listed = [place_of(string) for string in strings]
                return without_strings(column, torch.tensor(listed, dtype=torch.int64, device=device))
            listed = [place_of(number) for number in ids_of(column).flatten().tolist()]
            found = torch.tensor(listed, dtype=torch.int64, device=device)
            return column._replace(values=found.view(column.values.shape))

        return kernel

    def __str__(self) -> str:
        return f"vocabulary[{len(self.entries)} entries]"
