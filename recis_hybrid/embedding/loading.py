"""Rows of tables on their way from files: in pieces, straight into the records.

Letters: n rows of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.coalesce import COUNTS
from recis_hybrid.embedding.hash_table import HashTable
from recis_hybrid.embedding.protocols import META
from recis_hybrid.embedding.state import tables_layout
from recis_hybrid.state import PartState, TableState

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class TablesLoader:
    """Replaces the rows of tables by those of a checkpoint, piece by piece.

    Placement, coalescing, dtype and optimizer may be others than they were: values are converted, optimizer state is
    kept where name and width agree, and what the checkpoint lacks starts with its first value.

    Args:
        tables: Logical tables.
        saved: What the checkpoint holds, its tables without rows.
    """

    def __init__(self, tables: Sequence[HashTable], saved: PartState) -> None:
        self._tables = tables
        self._saved = saved
        self._members = {m.name: (table, number) for table in tables for number, m in enumerate(table.members)}
        self.differences: list[str] = []
        """What keeps the checkpoint from being loaded, a text each."""
        self.changes: list[str] = []
        """What is loaded in another way than it was saved, a text each."""
        self.holds_rows = any(len(table) > 0 or _counts(table) > 0 for table in tables)
        """Whether there are rows, or counts of ids without one, that the checkpoint's would replace."""
        self._compare(tables_layout(tables).tables)

    def begin(self, rows: Mapping[str, int]) -> None:
        """Removes all rows and makes room for others.

        Args:
            rows: By table, about how many will come.
        """
        for table in self._tables:
            table.discard()
            coming = sum(rows.get(member.name, 0) for member in table.members)
            table.id_map.reserve(coming)
            table.blocks.reserve(coming)

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Takes rows.

        Args:
            name: Of the table in the checkpoint.
            columns: Of one first dimension n, on the CPU; "ids" (int64 ``[n]``) are distinct and new.
        """
        if columns["ids"].numel() == 0:
            return
        if name in self._members:
            _load_rows(*self._members[name], columns)
        elif (counted := self._members.get(name.removesuffix(COUNTS))) is not None:
            table, number = counted
            if table.gate is not None:
                table.gate.load(number, dict(columns))

    def end(self) -> None:
        """Takes over seed and steps: the last thing, when all rows have come."""
        seed, steps = self._saved.meta.get("seed"), self._saved.meta.get("steps")
        for table in self._tables:
            if isinstance(seed, int):
                table.reseed(seed)
            done = [steps.get(member.name, 0) for member in table.members] if isinstance(steps, dict) else []
            table.step = max((step for step in done if isinstance(step, int)), default=0)

    def abandon(self) -> None:
        """Leaves the tables without rows: the rest of them will not come."""
        for table in self._tables:
            table.discard()

    def _compare(self, live: Mapping[str, TableState]) -> None:
        saved = self._saved.tables
        for name in sorted(saved.keys() ^ live.keys()):
            text = _described((saved.get(name) or live[name]).columns)
            where = f"in the {'checkpoint' if name in saved else 'live object'} only"
            if name.endswith(COUNTS) and name.removesuffix(COUNTS) in saved.keys() & live.keys():
                self.changes.append(f"table {name!r} is {where}")
            else:
                self.differences.append(f"table {name!r} is {where} ({text})")
        for name in sorted(saved.keys() & live.keys()):
            self._compare_columns(f"table {name!r}, column", saved[name].columns, live[name].columns)

    def _compare_columns(self, where: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
        for column in sorted(saved.keys() | live.keys()):
            a, b = saved.get(column), live.get(column)
            if a is None or b is None:
                text = f"{where} {column!r} is in the {'live object' if a is None else 'checkpoint'} only"
                essential = column in ("ids", "embedding", "count")
                (self.differences if essential else self.changes).append(text)
            elif a.shape[1:] != b.shape[1:] or (a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(_FLOATS)):
                text = f"{where} {column!r}: checkpoint {_spec(a)}, live object {_spec(b)}"
                essential = column in ("ids", "embedding", "count", *META)
                (self.differences if essential else self.changes).append(text)
            elif a.dtype != b.dtype:
                self.changes.append(f"{where} {column!r}: checkpoint {_spec(a)}, live object {_spec(b)}")


def _counts(table: HashTable) -> int:
    gate = table.gate
    return 0 if gate is None else sum(gate.state(number)["ids"].numel() for number in range(len(table.members)))


def _load_rows(table: HashTable, number: int, columns: Mapping[str, Tensor]) -> None:
    layout = table.layout
    # Whatever has another width is no state of this optimizer, even if its name is the same.
    held = [
        part for part in layout.parts if part in columns and tuple(columns[part].shape[1:]) == (layout.width(part),)
    ]
    ids = columns["ids"].to(table.map_device).contiguous()
    table.id_map.reserve(ids.numel())
    table.blocks.reserve(table.id_map.row_bound + ids.numel())
    if len(held) == len(layout.parts):
        rows, _ = table.id_map.find_or_insert([ids], [number])
        table.id_map.commit()
        rows = rows.to(table.device)
    else:
        rows = table.load(number, ids, {})
    for part in held:
        table.blocks.write(rows, part, columns[part])
    if set(META) <= columns.keys():
        meta = torch.stack([columns[name] for name in META]).to(table.device)
        ops.blocks.write_meta(table.blocks.handle, rows, meta)


def _described(columns: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {_spec(values)}" for name, values in columns.items())


def _spec(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape[1:])}"
