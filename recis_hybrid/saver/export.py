"""Exports of checkpoints for serving: ids and embeddings, optionally quantized, modules and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from recis_hybrid.checkpointing import JSON, PartState, TableState
from recis_hybrid.saver.actions.write import CapturedPart, Target, publish
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.quantized import LEVELS, quantize

_FLOATS = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
EXPORT_DTYPES = (*_FLOATS, *LEVELS)
"""Dtypes of embeddings in an export."""
_EXPORTED_KINDS = ("saveable", "module", "json")


def export(checkpoint: StoredCheckpoint, out: Target, dtype: str | None = None) -> Location:
    """Write the contents of a checkpoint that serving needs: ids and embeddings, modules and JSON.

    Optimizers, generators, schedules and reading positions are omitted, as are the optimizer state and metadata of rows
    and the admission counts. The result is a checkpoint in the same format, for ``recis_hybrid.serving``.

    Args:
        checkpoint: A checkpoint, incremental or full.
        out: Directory or URL of the export; created if missing.
        dtype: Dtype of the embeddings, one of ``EXPORT_DTYPES``; None keeps that of each table. ``int8`` and ``int4``
            quantize each row, see :func:`quantize`.

    Returns:
        Directory of the export, named after the step, in ``out``.

    Raises:
        CorruptCheckpoint: The checkpoint, or one that it builds on, is damaged.
        CheckpointError: The export exists already, or cannot be written, a row cannot be quantized, or the checkpoint
            is itself a quantized export.
    """
    captured = {
        name: CapturedPart(part.kind, partial(_exported_state, checkpoint, name, dtype))
        for name, part in checkpoint.manifest.parts.items()
        if part.kind in _EXPORTED_KINDS
    }
    return publish(out, checkpoint.manifest.step, captured)


def _exported_state(checkpoint: StoredCheckpoint, part: str, dtype: str | None) -> PartState:
    """Return the exported state of a part.

    Tables are read one at a time, so that the columns that are not exported are freed before the next.
    """
    state = checkpoint.read(part, ())
    tables: dict[str, TableState] = {}
    for name, entry in checkpoint.manifest.parts[part].tables.items():
        if entry.meta.get("dtype") in LEVELS:
            raise CheckpointError(
                f"{checkpoint.directory}: table {name!r} is quantized already. Export the checkpoint that it was "
                "exported from."
            )
        if "embedding" in entry.columns:
            tables[name] = _exported_table(name, checkpoint.read(part, (name,)).tables[name], dtype)
    return replace(state, tables=tables)


def exported_tables(
    tables: Mapping[str, TableState], dtype: str | None
) -> tuple[dict[str, TableState], dict[str, JSON]]:
    """Return the tables of an export, and the greatest error of an element of each quantized one.

    Args:
        tables: States of tables by name.
        dtype: As for :func:`export`.

    Raises:
        CheckpointError: A row cannot be quantized.
    """
    exported = {name: _exported_table(name, table, dtype) for name, table in tables.items()}
    errors: dict[str, JSON] = {}
    for name, table in exported.items():
        if "scale" in table.columns:
            # Half a step of the widest row.
            errors[name] = float(table.columns["scale"].max()) / 2 if len(table.columns["ids"]) else 0.0
    return exported, errors


def _exported_table(name: str, table: TableState, dtype: str | None) -> TableState:
    ids, embedding = table.columns["ids"], table.columns["embedding"]
    if dtype in LEVELS:
        quantized: dict[str, JSON] = {"dim": embedding.shape[1], "dtype": dtype}
        meta = {key: value for key, value in table.meta.items() if key != "optimizer_state"} | quantized
        return TableState({"ids": ids, **quantize(name, ids, embedding, dtype)}, table.buckets, meta)
    embedding = embedding if dtype is None else embedding.to(_FLOATS[dtype])
    meta = table.meta | {"dtype": str(embedding.dtype).removeprefix("torch."), "optimizer_state": []}
    meta = {key: value for key, value in meta.items() if key in table.meta}
    return TableState({"ids": ids, "embedding": embedding}, table.buckets, meta)
