"""Compares a saved state with the live object to load it into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypeVar

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.saver.errors import CheckpointMismatch
from recis_hybrid.saver.format.manifest import TensorSpec

_MOST = 8
_T = TypeVar("_T")


def refuse_differences(where: str, differences: Iterable[str]) -> None:
    """Raise if there are differences.

    Args:
        where: Checkpoint and part, for the message.
        differences: Descriptions of the differences, each with both values.

    Raises:
        CheckpointMismatch: There are differences; the first eight are listed.
    """
    found = list(differences)
    if found:
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise CheckpointMismatch(
            f"{where} does not fit the live object: {'; '.join(found[:_MOST])}{more}. Nothing was loaded. Build the "
            "object as it was when it was saved, or load a checkpoint of this one."
        )


def named_differences(what: str, saved: Mapping[str, _T], live: Mapping[str, _T]) -> list[str]:
    """Compare two mappings by name.

    Args:
        what: Kind of the values, such as ``tensor``.
        saved: Values of the checkpoint.
        live: Values of the live object.

    Returns:
        One text for each name that is on one side only, or whose values differ.
    """
    texts: list[str] = []
    for name in sorted(saved.keys() | live.keys()):
        if name not in live:
            texts.append(f"{what} {name!r} is in the checkpoint only ({saved[name]})")
        elif name not in saved:
            texts.append(f"{what} {name!r} is in the live object only ({live[name]})")
        elif saved[name] != live[name]:
            texts.append(f"{what} {name!r}: checkpoint {saved[name]}, live object {live[name]}")
    return texts


def state_differences(saved: PartState, live: PartState) -> list[str]:
    """Compare tables and tensors of two states; ``PartState.meta`` may differ.

    Args:
        saved: State of the checkpoint.
        live: State of the live object.

    Returns:
        One text per difference in names, dtypes, widths, shapes or table metadata. Numbers of rows may differ.
    """
    texts = named_differences(
        "tensor",
        {name: TensorSpec.of(tensor) for name, tensor in saved.tensors.items()},
        {name: TensorSpec.of(tensor) for name, tensor in live.tensors.items()},
    )
    saved_tables, live_tables = saved.tables, live.tables
    only_saved = {name: _described(table) for name, table in saved_tables.items() if name not in live_tables}
    only_live = {name: _described(table) for name, table in live_tables.items() if name not in saved_tables}
    texts += named_differences("table", only_saved, only_live)
    for name in sorted(saved_tables.keys() & live_tables.keys()):
        texts += named_differences(f"table {name!r}, column", _columns(saved_tables[name]), _columns(live_tables[name]))
        texts += named_differences(f"table {name!r}, meta", _meta(saved_tables[name]), _meta(live_tables[name]))
    return texts


def _columns(table: TableState) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor, skip=1) for name, tensor in table.columns.items()}


def _described(table: TableState) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in _columns(table).items())


def _meta(table: TableState) -> dict[str, str]:
    """Return values as text, in which 1, 1.0 and true differ."""
    return {name: json.dumps(value, sort_keys=True) for name, value in table.meta.items()}
