"""Admission by counts: speed, memory and false positives of a sketch beside exact counts.

    python -m benchmarks.admission [--quick]

Training lookups of one feature in a stream of ids without a row: Zipf-distributed ids (exponent 1.05), of which most
occur once. ``lookups``: millions of ids per second, and without admission as a reference. ``memory``: bytes for each id
that waits. ``false positives``: the share of new ids that a sketch admits at their first occurrence, beside the formula
of ``MinFrequency.false_positives``.
"""

from __future__ import annotations

import torch

from benchmarks import harness
from benchmarks.harness import Result
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Probability

BENCH = "admission"


def engine_of(admission: MinFrequency | Probability | None, device: torch.device) -> EmbeddingEngine:
    """Return an engine with one table of 16 elements."""
    config = EmbeddingConfig(dim=16, admission=admission, unknown="zeros")
    return EmbeddingEngine({"id": config}, device=device)


def stream(batch: int, steps: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """Return batches of ids, Zipf-distributed over 2^26 ids."""
    generator = torch.Generator().manual_seed(seed)
    low = (1 << 26) ** -0.05
    uniform = torch.rand(steps, batch, generator=generator, dtype=torch.float64) * (1 - low) + low
    ranks = uniform.pow(-20).long()
    return [(ids * 0x9E3779B97F4A7C1).to(device) for ids in ranks]


def speed(batch: int, rounds: int, device: torch.device) -> None:
    """Measure lookups with exact counts, a sketch, chance, and without admission."""
    rules = {
        "sketch": MinFrequency(3, sketch_bytes=1 << 24),
        "exact": MinFrequency(3),
        "probability": Probability(0.1),
        "none": None,
    }
    engines = {name: engine_of(rule, device) for name, rule in rules.items()}
    batches = {name: iter(stream(batch, rounds + 3, 1, device)) for name in rules}
    steps = {name: lambda e=engine, b=batches[name]: e({"id": next(b)}) and None for name, engine in engines.items()}
    found = {name: rate / 1e6 for name, rate in harness.rates(steps, batch, rounds, device).items()}
    for name in ("sketch", "probability", "none"):
        ratio = found[name] / found["exact"]
        Result(BENCH, f"lookups {name}", "rate", "M ids/s", found[name], found["exact"], "exact counts", ratio).print()
    waiting = engines["exact"].tables[0].admission_states()[0]["ids"].numel()
    ours, theirs = (engines[name].memory()["admission"] / waiting for name in ("sketch", "exact"))
    case = f"memory, {waiting:,} ids wait"
    Result(BENCH, case, "memory", "bytes/id", ours, theirs, "exact counts", theirs / ours).print()


def false_positives(count: int, ids: int, device: torch.device) -> None:
    """Measure the false positives after ``ids`` ids were counted once each in a sketch of 4 MiB."""
    rule, asked = MinFrequency(count, sketch_bytes=1 << 22), 200_000
    engine = engine_of(rule, device)
    for part in torch.arange(ids, device=device).split(1 << 16):
        engine({"id": part})
    before = len(engine.tables[0])
    for part in torch.arange(ids, ids + asked, device=device).split(1 << 12):
        engine({"id": part})
    found, stated = (len(engine.tables[0]) - before) / asked, rule.false_positives(ids + asked // 2)
    case = f"count={count}, {ids:,} ids in 4 MiB"
    Result(BENCH, case, "false positives", "share", found, stated, "formula", stated / found if found else None).print()


def main() -> None:
    """Run all cases."""
    arguments = harness.parser("Admission by exact counts and by a sketch.").parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.cases in "lookups memory":
        speed(65_536, 8 if arguments.quick else 60, device)
    for count, ids in (
        ((2, 500_000), (2, 1_000_000))
        if arguments.quick
        else (
            *((2, n) for n in (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)),
            *((count, 4_000_000) for count in (3, 5)),
        )
    ):
        if arguments.cases in f"count={count}":
            false_positives(count, ids, device)


if __name__ == "__main__":
    main()
