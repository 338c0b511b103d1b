"""A state that nobody changes any more."""

from dataclasses import replace

from torch import Tensor

from recis_hybrid.saver.protocol import PartState, TableState


def snapshot(state: PartState) -> PartState:
    """Return a state on the CPU that shares no memory with live objects.

    Args:
        state: what a part hands out.

    Returns:
        The same values; its tensors are copies, unless they are the state's own and on the CPU already.
    """

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.cpu() if state.owned or not tensor.is_cpu else tensor.clone()

    def rows(table: TableState) -> TableState:
        columns = {column: copy(values) for column, values in table.columns.items()}
        removed = None if table.removed is None else rows(table.removed)
        return TableState(columns, copy(table.buckets), table.meta, removed)

    tables = {name: rows(table) for name, table in state.tables.items()}
    return replace(state, tables=tables, tensors={name: copy(tensor) for name, tensor in state.tensors.items()})
