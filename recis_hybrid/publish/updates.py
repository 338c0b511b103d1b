"""Updates of bundles: the rows of tables that changed since the latest bundle or update in a folder.

Letters: n rows of the earlier state of some buckets, m rows of the later one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, JSON, TableState
from recis_hybrid.publish.features import PublishError
from recis_hybrid.saver.actions.write import Target
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, link_to, open_checkpoint
from recis_hybrid.saver.checkpoint.table_reader import concatenate
from recis_hybrid.saver.export import exported_tables
from recis_hybrid.saver.format.manifest import Link
from recis_hybrid.saver.format.row_file import Reads
from recis_hybrid.saver.storage.resolve import storage_of

PART = "engine"
"""Name of the part with the tables, in bundles."""


@dataclass(frozen=True)
class Latest:
    """The latest bundle or update in a folder, on which an update builds."""

    stored: StoredCheckpoint
    """Its files, and those of the bundle and updates before it."""
    document: dict[str, Any]
    """Its part ``bundle``."""

    @property
    def link(self) -> Link:
        """Its step and digest."""
        return link_to(self.stored.root, self.stored.manifest.step)

    @property
    def source(self) -> Link | None:
        """Step and digest of the checkpoint that it was written from, if it names one."""
        source = self.document["source"]
        return Link(source["step"], source["sha256"]) if {"step", "sha256"} <= source.keys() else None

    def refuse_changed(self, document: Mapping[str, JSON]) -> None:
        """Raise PublishError if a model has changed in more than its tables' rows and its tower's weights."""
        before, after = _model_of(self.document), _model_of(json.loads(json.dumps(document)))
        changed = sorted(key for key in before | after if before.get(key) != after.get(key))
        if changed:
            raise PublishError(
                f"{self.stored.directory}: the {' and the '.join(changed)} of the model have changed since; an update "
                f"has rows and weights only. Write a full bundle, without --update"
            )


def latest_bundle(out: Target, step: int) -> Latest:
    """Return the latest bundle or update in a folder.

    Args:
        out: The folder or URL.
        step: Step of the update to write.

    Raises:
        CorruptCheckpoint: It is damaged, or one that it builds on is missing.
        PublishError: The folder has no bundle, or its latest is not older than ``step``.
    """
    if not storage_of(out).steps():
        raise PublishError(f"{out} holds no bundle to update; write one first, without --update")
    stored = open_checkpoint(out)
    part = stored.manifest.parts.get("bundle")
    document = None if part is None else part.meta.get("value")
    if not isinstance(document, dict) or PART not in stored.manifest.parts:
        raise PublishError(f"{stored.directory} is no bundle, but an export of tables; update another folder")
    if stored.manifest.step >= step:
        raise PublishError(
            f"{stored.directory}: an update must be of a later step than {stored.manifest.step}, got {step}. Train on, "
            f"or name another folder"
        )
    return Latest(stored, document)


def changed_tables(
    latest: Latest, now: StoredCheckpoint | Mapping[str, TableState]
) -> tuple[dict[str, TableState], dict[str, JSON]]:
    """Return the changes of all tables since the latest bundle or update, in the dtypes of the bundle.

    If the checkpoint is incremental, and builds on the one that the latest bundle or update was written from, only the
    rows of the incremental checkpoints in between are read. Otherwise the tables are compared row by row, some buckets
    at a time.

    Args:
        latest: The latest bundle or update.
        now: The checkpoint to write, or the tables themselves, by name.

    Returns:
        Changes by table, and the greatest error of an element of each quantized one, among the changed rows.

    Raises:
        CorruptCheckpoint: A file is damaged.
        CheckpointError: A row cannot be quantized.
        PublishError: Names, widths or dtypes of the tables have changed.
    """
    before = latest.stored.manifest.parts[PART].tables
    names = _tables_of(now)
    if sorted(names) != sorted(before):
        raise PublishError(
            f"{latest.stored.directory}: has the tables {sorted(before)}, the model has {sorted(names)}. Write a full "
            f"bundle, without --update"
        )
    tables: dict[str, TableState] = {}
    errors: dict[str, JSON] = {}
    for name in before:
        tables[name], error = _changes(latest, name, now)
        if error is not None:
            errors[name] = error
    return tables, errors


def _tables_of(now: StoredCheckpoint | Mapping[str, TableState]) -> dict[str, str]:
    """Return the tables with embeddings, and the parts that they are in."""
    if not isinstance(now, StoredCheckpoint):
        return dict.fromkeys((name for name, state in now.items() if "embedding" in state.columns), "")
    return {
        name: part
        for part, entry in now.manifest.parts.items()
        for name, table in entry.tables.items()
        if "embedding" in table.columns
    }


def _changes(latest: Latest, name: str, now: StoredCheckpoint | Mapping[str, TableState]) -> tuple[TableState, JSON]:
    """Return the changes of a table, and the greatest error of an element."""
    entry = latest.stored.manifest.parts[PART].tables[name]

    def exported(state: TableState) -> tuple[TableState, float | None]:
        dtype = str(entry.meta["dtype"])
        plain = replace(state, columns={key: state.columns[key] for key in ("ids", "embedding")}, removed=None)
        tables, errors = exported_tables({name: plain}, dtype)
        result = tables[name]
        specs = {key: (str(each.dtype).removeprefix("torch."), *each.shape[1:]) for key, each in result.columns.items()}
        if (
            specs != {key: (spec.dtype, *spec.shape) for key, spec in entry.columns.items()}
            or result.meta != entry.meta
        ):
            raise PublishError(
                f"{latest.stored.directory}: table {name!r} has changed its width or dtype. Write a full bundle, "
                f"without --update"
            )
        error = errors.get(name)
        return result, None if error is None else float(error)  # type: ignore[arg-type]

    if isinstance(now, StoredCheckpoint) and latest.source is not None:
        changes = now.changes_since(latest.source, _tables_of(now)[name], name)
        if changes is not None:
            state, error = exported(changes)
            assert changes.removed is not None
            return replace(state, removed=replace(changes.removed, meta={})), error
    parts, worst = list[TableState](), list[float]()
    for window, later in _windows(now, name):
        state, error = exported(later)
        earlier = concatenate(entry, list(latest.stored.pieces(PART, name, window, Reads())))
        parts.append(_difference(earlier, state))
        if error is not None:
            worst.append(error)
    return _joined(parts), max(worst) if worst else None


def _windows(
    now: StoredCheckpoint | Mapping[str, TableState], name: str
) -> Iterator[tuple[tuple[int, int], TableState]]:
    """Yield the rows of a table, those of some buckets at a time."""
    if not isinstance(now, StoredCheckpoint):
        yield (0, BUCKETS), now[name]
        return
    part = _tables_of(now)[name]
    entry = now.manifest.parts[part].tables[name]
    stops = sorted({0, BUCKETS, *(item.first_bucket for item in entry.ranges)})
    for window in zip(stops, stops[1:], strict=False):
        yield window, concatenate(entry, list(now.pieces(part, name, window, Reads())))


def _difference(earlier: TableState, later: TableState) -> TableState:
    """Return the rows of the later state ``[m]`` that differ from those of the earlier one ``[n]``, and removed ids."""
    old, new = earlier.columns["ids"].numpy(), later.columns["ids"].numpy()
    differs, stays = np.ones(new.size, bool), np.zeros(old.size, bool)
    if old.size:
        order = np.argsort(old, kind="stable")
        place = order[np.minimum(np.searchsorted(old, new, sorter=order), old.size - 1)]
        differs = old[place] != new
        stays[place[~differs]] = True
        for name, column in later.columns.items():
            if name != "ids":
                differs |= (_bytes(earlier.columns[name])[place] != _bytes(column)).any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(differs))
    gone = torch.from_numpy(np.flatnonzero(~stays))
    removed = TableState({"ids": earlier.columns["ids"][gone]}, earlier.buckets[gone], {})
    columns = {name: column[rows] for name, column in later.columns.items()}
    return TableState(columns, later.buckets[rows], later.meta, removed=removed)


def _bytes(column: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return rows as bytes, so that they are compared bit by bit."""
    return column.contiguous().view(len(column), -1).view(torch.uint8).numpy()


def _joined(parts: list[TableState]) -> TableState:
    removed = [part.removed for part in parts if part.removed is not None]
    ids = TableState(
        {"ids": torch.cat([part.columns["ids"] for part in removed])}, torch.cat([part.buckets for part in removed]), {}
    )
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return TableState(columns, torch.cat([part.buckets for part in parts]), parts[0].meta, removed=ids)


def _model_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change in the part ``bundle``."""
    tables = {name: {**table, "error": None} for name, table in document["tables"].items()}
    return {**{key: value for key, value in document.items() if key != "source"}, "tables": tables}
