"""Checks of bulk changes, made before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from recis_hybrid.embedding.table.record_layout import META, META_BITS, MemberTable


def checked_member(what: str, members: int, member: int) -> None:
    """Raise ValueError unless ``member`` is 0 to ``members`` - 1."""
    if not isinstance(member, Integral) or isinstance(member, bool) or not 0 <= member < members:
        raise ValueError(f"{what}: member must be 0 to {members - 1}, the number of a table, got {member!r}")


def checked_ids(what: str, members: Sequence[MemberTable], member: int, ids: Tensor) -> Tensor:
    """Return contiguous ids.

    Raises:
        TypeError: If ids are not a tensor.
        ValueError: If the member table does not exist, or ids are not int64 ``[n]``.
    """
    checked_member(what, len(members), member)
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"table {members[member].name!r}: {what}: ids must be a tensor, got a {type(ids).__name__}; "
            f"make it one with torch.tensor(ids)"
        )
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(
            f"table {members[member].name!r}: {what}: ids must be int64 [n], got {ids.dtype} {list(ids.shape)}; "
            f"convert them with .to(torch.int64).flatten()"
        )
    return ids.contiguous()


def refuse_columns(table: str, ids: Tensor, columns: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Raise unless columns fit the rows of ``ids`` (int64 ``[n]``); waits for the device.

    Args:
        table: Name of the member table.
        ids: Ids of the rows.
        columns: Columns by name.
        widths: Widths of the parts of a record.

    Raises:
        TypeError: If a column is not a tensor, or metadata are not integers.
        ValueError: If columns are unknown or have another shape, metadata are out of range, or ids repeat.
    """
    where, n = f"table {table!r}: insert", ids.numel()
    expected = {part: [n, width] for part, width in widths.items()} | dict.fromkeys(META, [n])
    unknown = sorted(set(columns) - set(expected))
    if unknown:
        raise ValueError(f"{where}: unknown columns {unknown}; a row has {list(expected)}")
    if 0 < sum(name in columns for name in META) < len(META):
        raise ValueError(f"{where}: columns must include all of {list(META)} or none of them, got {sorted(columns)}")
    for name, values in columns.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got a {type(values).__name__}")
        if list(values.shape) != expected[name]:
            raise ValueError(f"{where}: {name} must have shape {expected[name]}, got {list(values.shape)}")
        if name in META:
            refuse_meta(where, name, values)
    if columns and ids.unique().numel() < n:
        raise ValueError(f"{where}: ids must be distinct if columns are given; drop repeated ids")


def refuse_meta(where: str, name: str, values: Tensor) -> None:
    """Raise unless metadata (``[n]``) or admission counts are in range; waits for the device.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they are out of range.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be integers, got {values.dtype}; convert them with .to(torch.int64)")
    if values.numel() == 0:
        return
    least, greatest = (int(end) for end in values.aminmax())
    bits = META_BITS.get(name, 40)
    if least < 0 or greatest >> bits:
        got = least if least < 0 else greatest
        raise ValueError(f"{where}: {name} must be 0 to 2**{bits} - 1, got {got}")
