"""Rows for ids that have none: the map gives them, first values fill them.

Letters: N positions (ids of a call over all features).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.admission import Gate, admitted_often
from recis_hybrid.embedding.table.lookup import Lookup, Request, gradient_bags

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable


def insert_grouped(table: HashTable, request: Request, out: Tensor | None, starts: Sequence[int]) -> Lookup:
    """Look features up in training: gives ids rows as far as they are admitted, and groups positions by row.

    Args:
        table: The table.
        request: The ids of all features.
        out: float32: where to write vectors along with it, if that can be done; None not to.
        starts: For each feature, where in ``out`` its vectors begin.
    """
    ids, members, layout = request.ids, request.members, table.layout
    gathered = None
    if table.gate is not None or table.map_device != table.device:
        rows = insert_rows(table, ids, members, table.gate, request.used, request.counts)
        groups = ops.gather.group_rows(rows, members, table.id_map.row_bound, gradient_bags(request.bags))
    else:
        bound = _reserve(table, sum(request.bags.lengths))
        # Rows that something advances before they are read, and bags of several ids, are gathered later.
        gathered = out if table.before_read is None and request.bags.plain else None
        rows, groups = ops.gather.insert_grouped(
            table.id_map.slots,
            table.id_map.counters,
            table.id_map.free_rows,
            table.blocks.handle,
            layout.element,
            layout.dim,
            table.initializers,
            layout.state_args,
            ids,
            members,
            bound,
            gradient_bags(request.bags),
            used=request.used,
            out=gathered,
            starts=() if gathered is None else starts,
        )
        table.id_map.inserted(rows.numel())
    return Lookup(
        request, rows, table.id_map.row_bound, table.generation, table.gate is None, table.step + 1, groups, gathered
    )


def insert_rows(
    table: HashTable,
    ids: Sequence[Tensor],
    members: list[int],
    gate: Gate | None,
    used: Sequence[Tensor] = (),
    counts: Tensor | None = None,
) -> Tensor:
    """Give ids rows that have none, with first values.

    Args:
        table: The table.
        ids: For each feature, int64.
        members: For each feature, the number of its member table.
        gate: Which ids are admitted; None for all.
        used: As ``Request.used``.
        counts: As ``Request.counts``.

    Returns:
        int64 ``[N]``: the rows; -1 for an id that is not admitted.
    """
    near, used = table.on_map(ids), table.on_map(used)
    _reserve(table, sum(part.numel() for part in ids))
    admitted = None
    if gate is not None:
        found = table.id_map.find(near, members, used)
        if counts is None:
            admitted = gate.admitted(near, members, found, used)
        else:
            admitted = admitted_often(gate, near, members, found, counts.to(table.map_device))
    new_rows, new = table.id_map.find_or_insert(near, members, admitted, used)
    try:
        rows, fresh = table.on_blocks(new_rows), table.on_blocks(new)
        if table.id_map.may_have_fresh:
            ops.blocks.init_fresh(
                table.blocks.handle,
                table.layout.element,
                table.on_blocks(table.id_map.counters),
                rows,
                fresh,
                ids,
                members,
                table.initializers,
                table.layout.dim,
                table.layout.state_args,
            )
    except BaseException:
        # An interrupt, or no memory for a copy: the new ids go again, for their records hold nothing.
        table.id_map.withdraw(near, members, new)
        raise
    table.id_map.commit()
    if gate is not None:
        gate.settle()
    return rows


def _reserve(table: HashTable, more: int) -> int:
    """Make room for more ids; whatever may run out of memory, before anything is changed."""
    bound = table.id_map.row_bound + more
    table.blocks.reserve(bound)
    table.id_map.reserve(more)
    return bound
