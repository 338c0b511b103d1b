"""Cases of ``benchmarks/gpu.py`` for whole calls: training steps, cached host memory, features, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks import features as of_features
from benchmarks.embedding import FixedGradient
from benchmarks.gpu_workload import Bench, Measured, scattered, uniform, zipf
from csrc.test.emulated import device as emulated
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement, RecordLayout
from recis_hybrid.features import FeatureEngine

DIM = 128
LR = 0.01
HOT_SHARE = 0.01
CACHED_SHARE = 0.1


def steps(bench: Bench) -> Iterator[Measured]:
    """Train on N ids of which a fixed number is distinct: lookup, backward from a fixed gradient, Adam.

    The repeated positions are drawn from the distinct ids, uniformly or by Zipf's law; or uniformly, but for one id
    that has 1 % of all positions.
    """
    sizes, n = bench.sizes, bench.sizes.ids
    engine = EmbeddingEngine({"f": EmbeddingConfig(dim=DIM)}, optimizer=optim.Adam, device=bench.device)
    optimizer = engine.make_optimizer(lr=LR)
    (table,) = engine.tables
    record = table.layout.record_bytes
    rows = bench.rows_that_fit(sizes.rows, record + 64)
    for chunk in bench.id_chunks(0, rows):
        table.insert(0, chunk)
    gradient = torch.randn(n, DIM, device=bench.device)
    batches = {kind: list(_training_batches(bench, kind, rows)) for kind in ("uniform", "zipf", "hot")}

    def step_of(kind: str) -> Callable[[], None]:
        turns = cycle(batches[kind])

        def step() -> None:
            FixedGradient.apply([gradient], engine({"f": next(turns)})["f"]).backward()
            optimizer.step()

        return step

    rates = bench.rates({**{kind: step_of(kind) for kind in batches}, "copy": bench.copy()})
    if len(table) != rows:
        raise AssertionError(f"step: the table has {len(table):,} rows, not {rows:,}")
    # Each distinct record is read and written, and its embedding read before; N vectors are written and N gradients
    # read.
    moved = sizes.distinct * (2 * record + 4 * DIM) + 2 * n * 4 * DIM
    floor = f"floor {1e3 * moved / bench.bandwidth(rates['copy']):.3g} ms"
    detail = f"{n:,} ids, {sizes.distinct:,} distinct; {rows:,} rows"
    for kind in ("uniform", "zipf"):
        yield Measured(f"step/{kind}", 1e3 / rates[kind], f"{floor}; {detail}")
    yield Measured("step/one id at 1 %", rates["uniform"] / rates["hot"], f"{1e3 / rates['hot']:.3g} ms; {detail}")


def _training_batches(bench: Bench, kind: str, rows: int) -> Iterator[Tensor]:
    """Yield batches of N ids, int64 ``[N]``, with ``sizes.distinct`` distinct ones in random order."""
    sizes = bench.sizes
    generator = torch.Generator().manual_seed(2)
    again = sizes.ids - sizes.distinct
    for number in range(sizes.batches):
        distinct = torch.arange(sizes.distinct, device=bench.device)
        numbers = scattered((number * sizes.distinct + distinct) % rows, rows)
        draw = zipf if kind == "zipf" else uniform
        repeated = draw(sizes.distinct, again, generator, bench.device)
        if kind == "hot":
            repeated[: max(int(HOT_SHARE * sizes.ids), 1)] = 0
        order = torch.randperm(sizes.ids, generator=generator).to(bench.device)
        ids = bench.ids(numbers[torch.cat([distinct, repeated])[order]])
        if ids.unique().numel() != sizes.distinct:
            raise AssertionError(f"step/{kind}: a batch has {ids.unique().numel()} distinct ids, not {sizes.distinct}")
        yield ids


def host(bench: Bench) -> Iterator[Measured]:
    """Look up N ids by Zipf's law in a table in pinned host memory, of which the GPU caches a tenth.

    Training lookups fill the cache. Lookups in evaluation mode, which leave it as it is, are measured.
    """
    case, sizes = "host/zipf", bench.sizes
    if bench.device.type == "cpu":
        yield Measured(case, None, "pinned blocks need a GPU")
        return
    record = RecordLayout(dim=DIM).record_bytes
    # Blocks of pinned memory are rounded up to powers of two.
    rows = bench.rows_that_fit(sizes.host_rows, 2 * record, pinned=True)
    cached = int(CACHED_SHARE * rows * record)
    placement = Placement(id_map="cuda", blocks="pinned", cache_bytes=cached)
    engine = EmbeddingEngine({"f": EmbeddingConfig(dim=DIM, placement=placement)}, device=bench.device)
    (table,) = engine.tables
    for chunk in bench.id_chunks(0, rows):
        table.insert(0, chunk)
    batches = [bench.ids(numbers) for numbers in bench.drawn("zipf", rows)]
    turns = cycle(batches)

    @torch.no_grad()
    def lookup() -> Tensor:
        return engine({"f": next(turns)})["f"]

    for _ in range(4 * sizes.batches):
        lookup()
    filled = table.cache_statistics()
    engine.eval()
    rates = bench.rates({"ours": lookup})
    yield Measured(
        case,
        sizes.ids * rates["ours"] / 1e6,
        f"{rows:,} rows, {cached / 2**20:,.0f} MiB cached; hit rate of distinct rows while filling "
        f"{filled.hit_rate:.2f}; {sizes.ids:,} ids",
    )


def features(bench: Bench) -> Iterator[Measured]:
    """Compute features by one engine; the peer computes the same in eager torch, on the same device."""
    each, rows = bench.sizes.features_each, bench.sizes.features_rows
    declared, batch = of_features.workload(each, rows, bench.device)
    engine = FeatureEngine(declared)

    def eager() -> Any:
        return of_features.in_eager_torch(batch, each)

    of_features.check_equal(engine(batch), eager(), "eager torch")
    rates = bench.rates({"ours": lambda: engine(batch), "eager": eager})
    yield Measured(
        "features/eager",
        rates["ours"] / rates["eager"],
        f"{1e3 / rates['ours']:.3g} against {1e3 / rates['eager']:.3g} ms; {len(declared)} features, {rows:,} rows",
    )


def launches(bench: Bench) -> Iterator[Measured]:
    """Count the kernels of this package that a warm training step of 100 coalesced features launches."""
    case, rows = "launches/100 features", 256
    if bench.device.type == "cpu":
        yield Measured(case, None, "the CPU launches nothing")
        return
    configs = {f"f{number}": EmbeddingConfig(dim=16) for number in range(100)}
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, device=bench.device)
    optimizer = engine.make_optimizer(lr=LR)
    batch = {name: (torch.arange(rows) * 7919 % (100 + number)).to(bench.device) for number, name in enumerate(configs)}
    gradients = [torch.ones(rows, 16, device=bench.device) for _ in configs]

    def step() -> None:
        FixedGradient.apply(gradients, *engine(batch).values()).backward()
        optimizer.step()

    for _ in range(3):
        step()
    if bench.device.type == "cuda":
        yield counted_by_name(case, _kernels_of(step))
        return
    emulated.clear_counts()
    step()
    of = emulated.counts()
    yield Measured(case, of["launches"], f"and {of['cub_calls']} calls of CUB, {of['memsets']} memsets")


def _kernels_of(step: Callable[[], None]) -> list[str]:
    """Return the names of what a GPU runs in a step: kernels, copies, memsets."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first session sets up the profiler
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            step()
            torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Ranges that torch.optim names are listed beside the kernels in them.
    return [event.name for event in on_gpu if not getattr(event, "is_user_annotation", False)]


def counted_by_name(case: str, names: Iterable[str]) -> Measured:
    """Count what a GPU ran, by its names in a profile: ``void recis::...<...>(...)`` are kernels of this package."""
    kinds = {"ours": 0, "CUB": 0, "copies and memsets": 0, "others": 0}
    for name in names:
        function = name.removeprefix("void ").split("<")[0].split("(anonymous")[0]
        if function.startswith("recis::"):
            kinds["ours"] += 1
        elif function.startswith(("Memcpy", "Memset")):
            kinds["copies and memsets"] += 1
        else:
            kinds["CUB" if "cub::" in function else "others"] += 1
    if kinds["ours"] == 0:
        return Measured(case, None, f"torch's profiler recorded no kernel of this package, but {kinds}; see CUPTI")
    return Measured(case, kinds.pop("ours"), ", ".join(f"{number} {kind}" for kind, number in kinds.items()))
