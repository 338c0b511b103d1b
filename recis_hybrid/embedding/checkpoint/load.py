"""Loads rows of tables: from checkpoints, in pieces, straight into the records, or from vectors.

Letters: n rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.embedding.checkpoint.ownership import ALL, Buckets, OwnedTables, within
from recis_hybrid.embedding.checkpoint.state import tables_layout
from recis_hybrid.embedding.checkpoint.vectors import VectorLoader, load_vectors
from recis_hybrid.embedding.distributed.column_split import own_columns
from recis_hybrid.embedding.gate import ADMISSION_COLUMNS
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.record_layout import META
from recis_hybrid.embedding.table.row_validation import refuse_meta

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LoadedTables(OwnedTables):
    """The methods of an engine that load rows: those that ``Saver`` calls, and ``load_rows``."""

    def checkpoint_loader(self, saved: PartState) -> TablesLoader:
        """Return a loader that takes the rows of a checkpoint in pieces; ``saved`` describes it, without rows."""
        return TablesLoader(self.tables, saved)

    def checkpoint_buckets(self, table: str) -> Buckets | None:
        """Return the buckets of a member table whose rows this rank loads from a checkpoint.

        Args:
            table: Name in the checkpoint.

        Returns:
            The first bucket, and the one after the last; None if ranks do not share the tables.
        """
        if self._shares is None:
            return None
        place = self._places.get(table.removesuffix(COUNTS))
        return (0, 0) if place is None else self._shares.loaded(*place)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the rows of every member table; with several ranks, each loads its own from all rows."""
        load_tables_state(self.tables, state, self.checkpoint_buckets)

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some member tables; see :func:`load_some_tables`."""
        load_some_tables(self.tables, tables)

    def load_rows(self, table: str, ids: Any, vectors: Any = None) -> int:
        """Write vectors that were computed elsewhere into a table, also into one with ``trainable=False``.

        Ids without a row get one, regardless of admission. Other rows stay, and the optimizer state of rows that exist
        already is kept. The vectors are converted to the table's dtype.

        If ranks share the tables, the call is collective. Every rank must pass the rows of all ranks, e.g. read from
        one file; each keeps its own.

        Args:
            table: Name of the table: ``EmbeddingConfig.table``, or else the feature's name.
            ids: Integers ``[n]``, distinct: a tensor, or an array of numpy or another library, as for
                :meth:`EmbeddingEngine.forward`. Without ``vectors``, an iterable of pairs (ids, vectors), such as
                ``columnio.read_vectors(path, ids="id", vectors="embedding")``; one pair at a time is in memory.
            vectors: Floats ``[n, dim]``, finite.

        Returns:
            Number of rows written on this process.

        Raises:
            ExchangeError: If ranks passed different rows.
            OtherRankError: If another rank failed.
            TypeError: If ids or vectors are no arrays, or there are no pairs.
            ValueError: If there is no such table, shapes do not fit, an id occurs twice, or a value is not finite in
                the table's dtype. The rows of earlier pairs stay; those of the pair in question are not written.

        Example:
            >>> from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, trainable=False, unknown="zeros")})
            >>> engine.load_rows("item", [7, 8], torch.tensor([[0.5, 1.0], [2.0, 3.0]]))
            2
            >>> engine({"item": torch.tensor([8, 9])})["item"].tolist()
            [[2.0, 3.0], [0.0, 0.0]]
        """
        if table not in self._places:
            raise ValueError(f"load_rows: there is no table {table!r}; the tables are {sorted(self._places)}")
        number, member = self._places[table]
        shares = self._shares
        loader = VectorLoader(self.tables[number], member, ALL if shares is None else shares.loaded(number, member))
        load_vectors(loader, ids, vectors, None if self._sharded is None else self._sharded.exchange.group)
        return loader.rows

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Numbers of the logical table and of the member table in it, by the member table's name."""
        return {member.name: (t, m) for t, table in enumerate(self.tables) for m, member in enumerate(table.members)}


class TablesLoader:
    """Replaces the rows of tables by those of a checkpoint, piece by piece.

    Placement, coalescing, dtype and optimizer may differ from those saved: values are converted, optimizer state is
    loaded where name and width agree, and state that the checkpoint lacks starts with its first value.

    Args:
        tables: Logical tables.
        saved: Description of the checkpoint, its tables without rows.

    Raises:
        ValueError: If the checkpoint has no valid seed or steps.
    """

    def __init__(self, tables: Sequence[HashTable], saved: PartState) -> None:
        self._tables = tables
        self._saved = saved
        self._members = {m.name: (table, number) for table in tables for number, m in enumerate(table.members)}
        self.differences: list[str] = []
        """Reasons why the checkpoint cannot be loaded."""
        self.changes: list[str] = []
        """Differences between the checkpoint and what is loaded from it."""
        self.unneeded: list[str] = []
        """Those of ``changes`` that drop the optimizer state of read-only tables, which keep none."""
        self.holds_rows = any(len(table) > 0 or _counts(table) > 0 for table in tables)
        """True if there are rows, or counts of ids without one, that loading would replace."""
        self._compare(tables_layout(tables).tables)
        _refuse_meta(saved, self._members.keys() & saved.tables.keys())

    def begin(self, rows: Mapping[str, int]) -> None:
        """Remove all rows and reserve memory.

        Args:
            rows: By table, about how many rows will be loaded.
        """
        for table in self._tables:
            table.discard()
            expected = sum(rows.get(member.name, 0) for member in table.members)
            table.store.id_map.reserve(expected)
            table.store.blocks.reserve(expected)

    def check(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Check rows before they are loaded.

        Args:
            name: Name of the table in the checkpoint.
            columns: As for :meth:`load`.

        Raises:
            ValueError: If steps or counts are negative, or too large for a row.
        """
        refuse_counts(name, columns)

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Load rows.

        Args:
            name: Name of the table in the checkpoint.
            columns: Columns ``[n, ...]`` on the CPU; ``ids`` (int64 ``[n]``) are distinct and new.

        Raises:
            ValueError: As :meth:`check`.
        """
        if columns["ids"].numel() == 0:
            return
        self.check(name, columns)
        if name in self._members:
            _load_rows(*self._members[name], columns)
        elif (counted := self._members.get(name.removesuffix(COUNTS))) is not None:
            table, number = counted
            if table.store.gate is not None and set(table.admission_columns()) <= columns.keys():
                table.store.gate.load_state_dict(number, dict(columns))

    def end(self) -> None:
        """Set seed and steps, after all rows are loaded."""
        seed, steps = self._saved.meta.get("seed"), self._saved.meta.get("steps")
        for table in self._tables:
            if isinstance(seed, int):
                table.store.reseed(seed)
            done = [steps.get(member.name, 0) for member in table.members] if isinstance(steps, dict) else []
            table.step = max((step for step in done if isinstance(step, int)), default=0)
            for member, recorded in zip(table.members, table.step_times, strict=True):
                recorded.samples = _times_of(self._saved, member.name)

    def abandon(self) -> None:
        """Remove all rows, because the rest cannot be loaded."""
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
            kinds = saved[name].columns.keys(), live[name].columns.keys()
            if name.endswith(COUNTS) and kinds[0] != kinds[1] and kinds[0] - {"ids"} <= ADMISSION_COLUMNS:
                self.changes.append(f"table {name!r} has the state of another admission rule, which is not loaded")
                continue
            member = self._members.get(name)
            read_only = member is not None and member[0].read_only
            self._compare_columns(f"table {name!r}, column", saved[name].columns, live[name].columns, read_only)

    def _compare_columns(
        self, where: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor], read_only: bool
    ) -> None:
        for column in sorted(saved.keys() | live.keys()):
            a, b = saved.get(column), live.get(column)
            if a is None or b is None:
                text = f"{where} {column!r} is in the {'live object' if a is None else 'checkpoint'} only"
                essential = column in ("ids", "embedding", "count")
                (self.differences if essential else self.changes).append(text)
                if read_only and b is None and not essential:
                    self.unneeded.append(text)
            elif a.shape[1:] != b.shape[1:] or (a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(_FLOATS)):
                text = f"{where} {column!r}: checkpoint {_spec(a)}, live object {_spec(b)}"
                essential = column in ("ids", "embedding", "count", *META)
                (self.differences if essential else self.changes).append(text)
            elif a.dtype != b.dtype:
                self.changes.append(f"{where} {column!r}: checkpoint {_spec(a)}, live object {_spec(b)}")


def load_tables_state(
    tables: Sequence[HashTable], state: PartState, buckets_of: Callable[[str], Buckets | None] = lambda _: None
) -> None:
    """Replace the rows of every member table.

    Args:
        tables: This rank's tables.
        state: The rows.
        buckets_of: Returns, for the name of a table in the state, the buckets that this rank loads; None for all.

    Raises:
        ValueError: If tables are missing or unknown, their width or optimizer state differs, or steps or counts are
            invalid; nothing is changed.
    """
    loader = TablesLoader(tables, state)
    changes = [text for text in loader.changes if text not in loader.unneeded]
    if loader.differences or changes:
        raise ValueError(f"the state is of other tables: {'; '.join([*loader.differences, *changes])}")
    for name, table in state.tables.items():
        loader.check(name, table.columns)
    loader.begin({})
    for name, table in state.tables.items():
        loader.load(name, within(table.buckets, buckets_of(name) or ALL, table.columns))
    loader.end()


def load_some_tables(tables: Sequence[HashTable], states: Mapping[str, TableState]) -> None:
    """Replace the rows of some member tables with those of another run; the seed and other tables stay.

    A table that has done no step takes the step of its rows (``step`` in the state's meta), so that an optimizer
    continues from the step of their moments. Otherwise its step stays, and the steps of rows are clamped to it, as if
    they had just been looked up. Missing optimizer state starts as in a new row.

    Args:
        tables: The logical tables.
        states: By name of the member table, or that name and ``.admission``.

    Raises:
        ValueError: If a member table is unknown, or counts are negative or too large; nothing is changed.
    """
    members = {member.name: (table, number) for table in tables for number, member in enumerate(table.members)}
    counted = {name + COUNTS: place for name, place in members.items() if place[0].admission_columns()}
    unknown = sorted(set(states) - set(members) - set(counted))
    if unknown:
        raise ValueError(f"the state is of other tables: unknown {unknown}, there are {sorted(members)}")
    for name, state in states.items():
        refuse_counts(name, state.columns)
    fresh = [table for table in tables if table.step == 0]
    for name, state in states.items():
        steps = state.meta.get("step")
        if name in members and members[name][0] in fresh and isinstance(steps, int):
            table, _ = members[name]
            table.record_lookup()
            table.step = max(table.step, steps)
    for name, state in states.items():
        if name in members:
            table, number = members[name]
            columns = {column: values for column, values in state.columns.items() if column != "ids"}
            for column in META[:2]:
                if column in columns:
                    columns[column] = columns[column].clamp(max=table.step)
            table.discard(number)
            table.load(number, state.columns["ids"], own_columns(columns, table.layout))
    for name, (table, number) in counted.items():
        if name in states and set(table.admission_columns()) <= states[name].columns.keys():
            assert table.store.gate is not None
            table.store.gate.clear(number)
            table.store.gate.load_state_dict(number, states[name].columns)


def refuse_counts(name: str, columns: Mapping[str, Tensor]) -> None:
    """Raise ValueError if steps or counts (int64 ``[n]``) of a table's rows are out of range."""
    for column in (*META, "count"):
        if column in columns:
            refuse_meta(f"table {name!r}", column, columns[column])


def _refuse_meta(saved: PartState, names: Collection[str]) -> None:
    seed, steps = saved.meta.get("seed"), saved.meta.get("steps")
    if type(seed) is not int:
        raise ValueError(f"the state must have a seed that is an integer, it has {seed!r}")
    if not isinstance(steps, dict) or not all(_is_step(steps.get(name)) for name in names):
        raise ValueError(f"the state must have the steps of {sorted(names)}, each from 0 to 2**40 - 1")
    times = saved.meta.get("times", {})
    if not isinstance(times, dict) or not all(
        isinstance(samples, list) and all(_is_sample(sample) for sample in samples) for samples in times.values()
    ):
        raise ValueError("the state's times must be lists of [step, seconds] by table")


def _is_sample(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_step(value[0]) and isinstance(value[1], int | float)


def _times_of(saved: PartState, name: str) -> list[tuple[int, float]]:
    """Return the samples of a member table's StepTimes; none if they were not saved."""
    times: Any = saved.meta.get("times", {})
    return [(int(step), float(seconds)) for step, seconds in times.get(name, [])]


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _counts(table: HashTable) -> int:
    return sum(state["ids"].numel() for state in table.admission_states())


def _load_rows(table: HashTable, number: int, columns: Mapping[str, Tensor]) -> None:
    piece = table.store.blocks.piece_rows
    if columns["ids"].numel() > piece:
        for parts in zip(*(values.split(piece) for values in columns.values()), strict=True):
            _load_rows(table, number, dict(zip(columns, parts, strict=True)))
        return
    layout = table.layout
    # State of another width belongs to another optimizer, even if its name is the same.
    widths = {part: (layout.whole.width(part),) for part in layout.parts}
    loaded = [part for part, width in widths.items() if part in columns and tuple(columns[part].shape[1:]) == width]
    columns = own_columns(
        {name: values for name, values in columns.items() if name in loaded or name not in widths}, layout
    )
    ids = columns["ids"].to(table.store.map_device).contiguous()
    table.store.id_map.reserve(ids.numel())
    table.store.blocks.reserve(table.store.id_map.row_bound + ids.numel())
    if len(loaded) == len(layout.parts):
        rows, _ = table.store.id_map.find_or_insert([ids], [number])
        table.store.id_map.commit()
        rows = rows.to(table.device)
    else:
        rows = table.load(number, ids, {})
    for part in loaded:
        table.store.blocks.write(rows, part, columns[part])
    if set(META) <= columns.keys():
        meta = torch.stack([columns[name] for name in META]).to(table.device)
        table.store.blocks.write_meta(rows, meta)


def _described(columns: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {_spec(values)}" for name, values in columns.items())


def _spec(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape[1:])}"
