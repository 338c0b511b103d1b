"""What bulk changes of a table refuse, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis_hybrid.embedding.protocols import META, MemberTable


def checked_ids(what: str, members: Sequence[MemberTable], member: int, ids: Tensor) -> Tensor:
    """Returns ids as kernels take them, contiguous.

    Raises:
        ValueError: If there is no such member table, or ids are not int64 ``[n]``.
    """
    if not 0 <= member < len(members):
        raise ValueError(f"{what}: member must be 0 to {len(members) - 1}, the number of a table, got {member}")
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(
            f"table {members[member].name!r}: {what}: ids must be int64 [n], got {ids.dtype} {list(ids.shape)}; "
            f"convert them with .to(torch.int64).flatten()"
        )
    return ids.contiguous()


def refuse_columns(table: str, ids: Tensor, columns: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Raises ValueError for columns that the rows of ``ids`` (int64 ``[n]``) cannot hold.

    Args:
        table: Name of the member table.
        ids: Whose rows they are.
        columns: By name.
        widths: Of the parts of a record.
    """
    where, n = f"table {table!r}: insert", ids.numel()
    expected = {part: [n, width] for part, width in widths.items()} | dict.fromkeys(META, [n])
    unknown = sorted(set(columns) - set(expected))
    if unknown:
        raise ValueError(f"{where}: no such columns: {unknown}; a row has {list(expected)}")
    if 0 < sum(name in columns for name in META) < len(META):
        raise ValueError(f"{where}: {list(META)} come together or not at all, got {sorted(columns)}")
    for name, values in columns.items():
        if list(values.shape) != expected[name]:
            raise ValueError(f"{where}: {name} must have shape {expected[name]}, got {list(values.shape)}")
    if columns and ids.unique().numel() < n:
        raise ValueError(f"{where}: ids must be distinct where columns say what they hold; drop repeated ones")
