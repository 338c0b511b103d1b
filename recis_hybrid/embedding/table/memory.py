"""The memory of a table as plain data, for programs that use it without torch."""

from __future__ import annotations

from typing import NamedTuple

from recis_hybrid.embedding.table.store import RowStore


class TableMemory(NamedTuple):
    """Addresses and sizes of a table, valid until it is next used through torch; see ``csrc/core/table_kernels.h``."""

    header: int
    """Address of the header of the IDMap."""
    counters: int
    """Address."""
    free_rows: int
    """Address."""
    max_rows: int
    """Rows that fit into the blocks."""
    max_slots: int
    """Slots that may be in use."""
    blocks: tuple[int, int, int, int]
    """Address of the block addresses, log2 of a block's rows, offset of the metadata, bytes of a record."""
    element: tuple[int, int, int]
    """Element types of embedding and state, and the dim."""
    initializers: int
    """Address."""
    fields: list[tuple[int, int, int, int]]
    """For each state field: offset, width, element size, bits of the first value."""
    generation: int
    """As ``HashTable.generation``."""
    step: int
    """As ``HashTable.step``."""
    seed: int
    """Seed of the stochastic rounding, 64 bits."""

    @staticmethod
    def of(store: RowStore, more: int, generation: int, step: int) -> TableMemory:
        """Describe the memory of a table in which there is room for ``more`` ids."""
        layout, id_map, state = store.layout, store.id_map, store.layout.state_args
        handle = store.blocks.whole()
        return TableMemory(
            id_map.slots.header.data_ptr(),
            id_map.counters.data_ptr(),
            id_map.free_rows.data_ptr(),
            store.blocks.capacity,
            id_map.slots_within(more),
            (handle.addresses.data_ptr(), handle.block_shift, handle.meta_offset, handle.record_bytes),
            (layout.element, layout.state_element, layout.dim),
            store.initializers.data_ptr(),
            list(zip(state.offsets, state.widths, state.sizes, state.first_values, strict=True)),
            generation,
            step,
            store.seed & (1 << 64) - 1,
        )
