"""Writes bundles: tables, the features' program and the tower of a trained model, for ``recis_hybrid.serving``."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid import distributed
from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.columnio import Column as ColumnSpec
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.features import FeatureEngine
from recis_hybrid.publish.features import PublishError, program_of
from recis_hybrid.publish.towers import written_tower
from recis_hybrid.publish.updates import PART, changed_tables, latest_bundle
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.saver.actions.write import CapturedPart, Target, publish
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.export import exported_tables
from recis_hybrid.saver.format.location import Location

VERSION = 1
"""Version of the part ``bundle``, see ``docs/bundles.md``."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint64)
_DTYPES = {
    **dict.fromkeys(_INTEGERS, "int64"),
    torch.int32: "int32",
    torch.float16: "float32",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bool: "bool",
}


@torch.no_grad()
def write_bundle(
    out: Target,
    step: int,
    *,
    features: FeatureEngine | None,
    engine: EmbeddingEngine,
    tower: nn.Module,
    inputs: Sequence[str],
    batch: Mapping[str, Tensor | RaggedTensor],
    outputs: Sequence[str] = ("score",),
    logits: bool = False,
    columns: Mapping[str, ColumnSpec | None] | None = None,
    dtype: str | None = None,
    source: Mapping[str, JSON] | None = None,
    update: bool = False,
    checkpoint: StoredCheckpoint | None = None,
) -> Location:
    """Write a bundle, which ``recis_hybrid.serving.Bundle`` scores without torch.

    Args:
        out: Directory or URL; the bundle is a folder ``step_…`` in it, which appears complete.
        step: Training step of the model.
        features: Computes the features of a batch of columns; None if the model reads columns as they are.
        engine: The tables.
        tower: A torch module or a :class:`recis_hybrid.bridge.JaxTower` that computes the outputs from tensors, in
            evaluation mode: the embeddings of a feature as the engine returns them, and other features as they are,
            ``[B]`` or ``[B, k]``. Each row of an output must depend on the same row of the inputs only.
        inputs: Names of the features that the tower takes, in the order of its arguments.
        batch: At least two rows of columns as the reader yields them. They determine dtypes and shapes, and must be
            accepted by the features' operations.
        outputs: Names of the outputs, float ``[B]`` or ``[B, k]``.
        logits: True if the outputs are logits; the bundle then returns their sigmoid.
        columns: Specs of the columns, whose defaults replace nulls in requests; None: nulls are refused.
        dtype: Dtype of the embeddings: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4``; None keeps that of
            each table.
        source: The checkpoint of the model: its ``step`` and the ``sha256`` of its manifest.
        update: Whether to write only what has changed since the latest bundle or update in ``out``: rows, removed ids,
            and the tower; see ``docs/updates.md``.
        checkpoint: Checkpoint to read the tables from, with the engine as its part ``engine``; None for those of the
            engine. An update from an incremental checkpoint reads only the changed rows, if ``source`` of the latest
            bundle or update names a checkpoint that it builds on.

    Returns:
        Directory of the bundle.

    Raises:
        PublishError: An operation, a feature or the tower cannot be in a bundle.
        CheckpointError: A bundle of this step exists already, or it cannot be written.
    """
    if distributed.world_size() > 1:
        raise PublishError(
            "write_bundle: ranks share the tables. Save a checkpoint, load it in one process, and write the bundle "
            "there"
        )
    if update and dtype is not None:
        raise PublishError("write_bundle: an update has the dtypes of its bundle; omit dtype")
    latest = latest_bundle(out, step) if update else None
    embedded = [name for name in inputs if name in engine.configs]
    if unused := [name for name in engine.configs if name not in inputs]:
        raise PublishError(f"write_bundle: inputs must name all features of the engine, {unused} are missing")
    weights = [config.weights for config in engine.configs.values() if config.weights is not None]
    needed = list(dict.fromkeys([*inputs, *weights]))
    program = program_of(features, needed)
    _refuse_optional(features, engine)
    read: list[str] = [str(name) for name in program["columns"]]  # type: ignore[union-attr]
    if missing := [name for name in read if name not in batch]:
        raise PublishError(f"write_bundle: batch lacks the columns {missing}; pass columns as the reader yields them")
    specs = columns or {}
    described = [_input(name, batch[name], specs.get(name)) for name in read]
    computed = {name: batch[name] for name in read} if features is None else features({n: batch[n] for n in read})
    engine.eval()
    vectors = engine(computed)
    tensors = [_tensor(name, vectors if name in embedded else computed) for name in inputs]
    rows = {len(tensor) for tensor in tensors}
    expected = _rows_of(batch[read[0]])
    if rows != {expected} or expected < 2:
        raise PublishError(
            f"write_bundle: the tower's inputs must have a row for each of the batch's {expected} rows, at least 2, "
            f"got {[list(tensor.shape) for tensor in tensors]}. A feature over lists of lists yields one vector for "
            f"each inner list, and Tile repeats rows: leave them out, or compute them before the request"
        )
    written = written_tower(tower, tensors)
    results = written.outputs
    if len(results) != len(outputs) or any(len(result) != expected or result.dim() > 2 for result in results):
        raise PublishError(
            f"write_bundle: the tower must return {list(outputs)}, [B] or [B, k] each, got "
            f"{[list(result.shape) for result in results]} for {expected} rows"
        )
    document: dict[str, JSON] = {
        "version": VERSION,
        "inputs": described,
        "program": program,
        "lookups": [_lookup(name, engine.configs[name]) for name in embedded],
        "tables": {name: {"first_value": first, "error": None} for name, first in _first_values(engine).items()},
        "tower": {
            "kind": written.kind,
            "logits": logits,
            "inputs": [
                _tower_input(name, name in embedded, tensor) for name, tensor in zip(inputs, tensors, strict=True)
            ],
            "outputs": [
                {"name": name, "shape": list(result.shape[1:])} for name, result in zip(outputs, results, strict=True)
            ],
        },
        "source": dict(source or {}),
    }
    if latest is not None:
        latest.refuse_changed(document)
    now = engine.checkpoint_state().tables if checkpoint is None else checkpoint
    if latest is not None:
        tables, errors = changed_tables(latest, now)
    else:
        whole = now.read(PART).tables if isinstance(now, StoredCheckpoint) else now
        tables, errors = exported_tables({n: s for n, s in whole.items() if "embedding" in s.columns}, dtype)
    for name, error in errors.items():
        document["tables"][name]["error"] = error  # type: ignore[call-overload,index]
    parts = {
        "engine": CapturedPart("saveable", partial(PartState, tables)),
        "tower": CapturedPart("saveable", partial(PartState, tensors=written.tensors)),
        "bundle": CapturedPart("json", partial(PartState, meta={"value": document})),
    }
    return publish(out, step, parts, None if latest is None else latest.link)


def _refuse_optional(features: FeatureEngine | None, engine: EmbeddingEngine) -> None:
    optional = [name for name, config in engine.configs.items() if config.optional]
    optional += [] if features is None else [feature.name for feature in features.features if feature.optional]
    if optional:
        raise PublishError(
            f"write_bundle: features {optional} are optional, but a tower in a bundle has a fixed number of inputs. "
            f"Declare them without optional=True"
        )


def _input(name: str, column: Any, spec: ColumnSpec | None) -> JSON:
    """Return the description of a column, ``serving.InputColumn``."""
    if not isinstance(column, Tensor | RaggedTensor):
        raise PublishError(f"write_bundle: column {name!r} must be a tensor or a RaggedTensor, got {type(column)}")
    ragged = isinstance(column, RaggedTensor)
    values = column.values if isinstance(column, RaggedTensor) else column
    strings = ragged and values.dtype == torch.uint8
    levels = (column.levels if isinstance(column, RaggedTensor) else 0) - (1 if strings else 0)
    if values.dtype not in _DTYPES:
        raise PublishError(f"write_bundle: column {name!r} has the dtype {values.dtype}, which a request cannot have")
    if values.dim() > (1 if ragged else 2):
        raise PublishError(
            f"write_bundle: column {name!r} has values {list(values.shape)}; a bundle reads [B], [B, k] and lists"
        )
    default = getattr(spec, "default", None)
    return {
        "name": name,
        "dtype": "string" if strings else _DTYPES[values.dtype],
        "levels": levels,
        "length": values.shape[1] if values.dim() == 2 else None,
        "weighted": isinstance(column, RaggedTensor) and column.weights is not None,
        "default": default.decode() if isinstance(default, bytes) else default,
        "null_as_empty": bool(getattr(spec, "null_as_empty", False)),
        "optional": False,
    }


def _rows_of(column: Tensor | RaggedTensor) -> int:
    return column.batch_size if isinstance(column, RaggedTensor) else len(column)


def _tensor(name: str, batch: Batch | dict[str, Tensor]) -> Tensor:
    column = batch[name]
    if isinstance(column, RaggedTensor):
        kind = "strings" if column.dtype == torch.uint8 else "lists of any length"
        raise PublishError(
            f"write_bundle: feature {name!r} yields {kind}, but the tower takes tensors; add an embedding for it, or "
            f"end its operations with ToDense"
        )
    # Requests have no narrower numbers.
    wider = {torch.int8: torch.int64, torch.int16: torch.int64, torch.uint8: torch.int64, torch.float16: torch.float32}
    return column.detach().cpu().to(wider.get(column.dtype, column.dtype))


def _tower_input(name: str, embedded: bool, tensor: Tensor) -> JSON:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"feature": name, "embedded": embedded, "dtype": dtype, "shape": list(tensor.shape[1:])}


def _lookup(name: str, config: EmbeddingConfig) -> JSON:
    return {
        "feature": name,
        "table": config.table or name,
        "combiner": config.combiner,
        "max_length": config.max_length,
        "weights": config.weights,
        "unknown": config.unknown,
    }


def _first_values(engine: EmbeddingEngine) -> dict[str, JSON]:
    """Return the initializers of the member tables, in the form of ``csrc/core/initializer.h``."""
    found: dict[str, JSON] = {}
    names = ("kind", "a", "b", "low", "high", "erf_low", "erf_high")
    for plan, table in zip(engine.plans, engine.tables, strict=True):
        dtype = str(plan.layout.dtype).removeprefix("torch.")
        for member, words in zip(plan.members, table.store.initializers.cpu().tolist(), strict=True):
            *numbers, _, key = struct.unpack("<i6fiq", struct.pack("<5q", *words))
            found[member.name] = {**dict(zip(names, numbers, strict=True)), "key": key, "dtype": dtype}
    return found
