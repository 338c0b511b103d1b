"""Cases of ``benchmarks/gpu.py`` for the parts of a table: gathering rows, finding ids, inserting ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, cycle

import torch
from torch import Tensor

from benchmarks.gpu_workload import Bench, Measured
from recis_hybrid import ops, optim
from recis_hybrid.embedding import EmbeddingBlocks, IdMap, RecordLayout

LOADS = (0.5, 0.75)


def gather(bench: Bench, dim: int) -> Iterator[Measured]:
    """Gather the embeddings of N rows from records that also hold the moments of Adam.

    The floor is the time of a copy that moves as many bytes as must be moved: the distinct rows' embeddings are read
    once; the vectors are written; the row numbers, 8 bytes each, are read.
    """
    layout = RecordLayout(dim=dim, state=optim.Adam.row_state())
    n = bench.sizes.ids
    rows = bench.rows_that_fit(bench.sizes.rows, layout.record_bytes)
    blocks = EmbeddingBlocks(layout, bench.device)
    blocks.reserve(rows)
    for block in blocks.blocks:
        block.view(torch.float32).uniform_()
    out = torch.empty(n, dim, device=bench.device)
    none = torch.zeros(1, 5, dtype=torch.int64, device=bench.device)
    bags = ops.gather.Bags.single([n])

    def step(batches: Iterator[Tensor]) -> Callable[[], None]:
        def run() -> None:
            ops.gather.gather_bags(
                blocks.whole(), layout.element, dim, next(batches), bags, [], [-1], none, out, [0], None
            )

        return run

    for distribution in ("uniform", "zipf"):
        batches = bench.drawn(distribution, rows)
        rates = bench.rates({"ours": step(cycle(batches)), "copy": bench.copy()})
        step(iter(batches[:1]))()
        _check_equal(out, blocks.read(batches[0], "embedding"), f"gather/d{dim}/{distribution}")
        distinct = sum(batch.unique().numel() for batch in batches) / len(batches)
        moved = distinct * 4 * dim + n * (4 * dim + 8)
        copied = bench.bandwidth(rates["copy"])
        yield Measured(
            f"gather/d{dim}/{distribution}",
            moved * rates["ours"] / copied,
            f"{moved * rates['ours'] / 1e9:,.4g} of {copied / 1e9:,.4g} GB/s; {rows:,} rows, "
            f"{distinct:,.0f} distinct of {n:,}",
        )


def ids(bench: Bench) -> Iterator[Measured]:
    """Find N ids that have a row, and find or insert N ids of which half are new, in a map on the device."""
    capacity = 2 * bench.rows_that_fit(bench.sizes.rows, 2 * 16)
    id_map = IdMap(bench.device, capacity)
    filled = 0
    for load in LOADS:
        filled = _fill(bench, id_map, filled, int(load * capacity))
        for distribution in ("uniform", "zipf"):
            yield _find(bench, id_map, load, distribution)
        if load == LOADS[0]:
            measured, filled = _find_or_insert(bench, id_map, filled)
            yield measured


def _fill(bench: Bench, id_map: IdMap, first: int, end: int) -> int:
    """Insert the ids of the numbers from ``first`` to ``end`` - 1, and return ``end``."""
    for chunk in bench.id_chunks(first, end):
        id_map.reserve(chunk.numel())
        id_map.find_or_insert([chunk], [0])
        id_map.commit()
    return end


def _find(bench: Bench, id_map: IdMap, load: float, distribution: str) -> Measured:
    n, case = bench.sizes.ids, f"find/{load:g}/{distribution}"
    # Numbers are drawn below a power of two, all of which have rows.
    below = 1 << int(load * id_map.capacity).bit_length() - 1
    batches = [bench.ids(numbers) for numbers in bench.drawn(distribution, below)]
    turns = cycle(batches)
    rows = torch.empty(n, dtype=torch.int64, device=bench.device)
    rates = bench.rates({"ours": lambda: ops.id_map.find(id_map.slots.header, [next(turns)], [0], rows)})
    if bool((rows < 0).any()):
        raise AssertionError(f"{case}: an id was not found")
    live = len(id_map)
    return Measured(case, n * rates["ours"] / 1e9, f"{n:,} ids of {live:,}, load {live / id_map.capacity:.3f}")


def _find_or_insert(bench: Bench, id_map: IdMap, filled: int) -> tuple[Measured, int]:
    n, sizes = bench.sizes.ids, bench.sizes
    burst = max(sizes.calls // 3, 1)  # ids are new only once, so calls are few
    calls = (sizes.rounds + 3) * burst
    known, new = n - n // 2, n // 2
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(bench.device)
    old = [numbers[:known] for numbers in bench.drawn("uniform", 1 << filled.bit_length() - 1)]
    batches = [
        bench.ids(torch.cat([old[call % len(old)], torch.arange(begin, begin + new, device=bench.device)])[order])
        for call, begin in enumerate(range(filled, filled + calls * new, new))
    ]
    capacity, begun, calls_done = id_map.capacity, len(id_map), count()

    def step() -> None:
        id_map.reserve(n)
        id_map.find_or_insert([batches[next(calls_done)]], [0])
        id_map.commit()

    rates = bench.rates({"ours": step}, burst)
    inserted = len(id_map) - begun
    if inserted != calls * new or id_map.capacity != capacity:
        raise AssertionError(f"find_or_insert: {inserted} ids were inserted into {capacity} slots, not {calls * new}")
    measured = Measured(
        "find_or_insert/half new",
        n * rates["ours"] / 1e9,
        f"{n:,} ids into {begun:,}, load {begun / capacity:.2f} to {len(id_map) / capacity:.2f}",
    )
    return measured, filled + calls * new


def _check_equal(ours: Tensor, expected: Tensor, case: str) -> None:
    if not torch.equal(ours, expected):
        raise AssertionError(f"{case}: wrong values")
