"""One warm training step of embedding tables: lookup, backward from a fixed gradient, and update.

    python -m benchmarks.embedding [--quick] [--threads 1] [--cases 65k/d64] [--clock wall]

Ours looks up random 64-bit ids in growing hash tables. Static peers are given row indices into tables of fixed size:
``fbgemm`` (SplitTableBatchedEmbeddingBagsCodegen) and ``nn.EmbeddingBag`` (26 of them, sparse gradients, torch.optim).
Dynamic peers take the same ids as ours: ``tfra`` (cuckoo tables) and ``dict``, a Python dict from id to row with
vectorized torch operations on the rows. Steps of ours and one peer alternate. The case ``threads`` compares ours with
two threads and one; ``counted`` and ``hottest`` compare an engine that counts ids, or also finds the 100 most frequent
of each table, with one that does not; ``family`` compares an optimizer with Adam, whose rate is scaled down by the size
of a record where the optimizer has a larger one, and with the memory bound, the rate of a step that took no longer than
moving its bytes (``step_bytes``) as fast as our gather copies random records of the same size.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, workload
from benchmarks.peers.worker import Worker, installed
from recis_hybrid import ops, optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, OptimizerSpec, RecordLayout

LR = 0.01
OURS = {
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adagrad": optim.Adagrad,
    "adam": optim.Adam,
    "sgd": optim.SGD,
    "lookup": optim.SGD,
}
FAMILY = {
    "adam": optim.Adam,
    "sgd": optim.SGD.spec(weight_decay=0.01),
    "momentum": optim.SGD.spec(momentum=0.9),
    "nesterov": optim.SGD.spec(momentum=0.9, weight_decay=0.01, nesterov=True),
    "adagrad": optim.Adagrad,
    "adagrad_decay": optim.Adagrad.spec(lr_decay=0.01, weight_decay=0.01),
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "rowwise_adagrad_decay": optim.RowwiseAdagrad.spec(weight_decay=0.01),
    "rowwise_adagrad_counter": optim.RowwiseAdagrad.spec(weight_decay=0.01, counter_halflife=100.0),
    "rmsprop": optim.RMSprop,
    "adamw": optim.AdamW,
    "adamw_tf": optim.AdamWTF.spec(weight_decay=0.01),
    "adam_l2": optim.AdamL2.spec(weight_decay=0.01),
    "amsgrad": optim.AMSGrad,
    "rowwise_adam": optim.RowwiseAdam,
    "lamb": optim.LAMB.spec(weight_decay=0.01),
    "lion": optim.Lion.spec(weight_decay=0.01),
    "ftrl": optim.FTRL.spec(l1=0.01, l2=0.01),
}
"""Optimizers of the cases ``family``. AdagradSum is Adagrad in one process."""
PEERS = {
    "rowwise_adagrad": ["fbgemm"],
    "adagrad": ["fbgemm", "nn.EmbeddingBag", "dict"],
    "adam": ["nn.EmbeddingBag", "tfra", "dict"],
    "sgd": ["fbgemm", "nn.EmbeddingBag"],
    "lookup": ["fbgemm", "tfra", "dict"],
}
TRACKED = {"counted": 0, "hottest": 100}
"""Argument of ``EmbeddingEngine.track`` by case."""
ALONE = {"threads": ["1 thread"], "family": ["Adam at its bytes", "memory bound"]}
"""Other sides of a case of ours alone."""
QUICK = ["65k/d64/rowwise_adagrad", "4k/d64/rowwise_adagrad", "65k/d64/adagrad", "65k/d16/adam/threads"]


class FixedGradient(torch.autograd.Function):
    """A loss with fixed gradients: a single root for all outputs, like a model's loss."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def ours(
    work: workload.Workload,
    dim: int,
    kind: Any,
    device: torch.device,
    hottest: int | None = None,
    *,
    trains: bool = True,
) -> Callable[[], None]:
    engine = EmbeddingEngine(
        {workload.name(f): EmbeddingConfig(dim=dim) for f in range(workload.FEATURES)},
        optimizer=kind,
        device=device,
    )
    optimizer = engine.make_optimizer(lr=LR)
    with torch.no_grad():
        for part in range(0, workload.IDS, 10_000):
            engine({workload.name(f): work.ids[f][part : part + 10_000] for f in range(workload.FEATURES)})
    engine.track(hottest)
    batches, number = [work.batch(b) for b in range(workload.BATCHES)], itertools.count()

    def step() -> None:
        outputs = engine(batches[next(number) % workload.BATCHES])
        FixedGradient.apply(work.gradients, *outputs.values()).backward()
        optimizer.step()

    @torch.no_grad()
    def lookup() -> None:
        engine(batches[next(number) % workload.BATCHES])

    if not trains:
        engine.eval()
        return lookup
    return step


def record_bytes(kind: Any, dim: int) -> int:
    """Return the size of a record."""
    spec = OptimizerSpec.of("record_bytes", kind)
    assert spec is not None
    return RecordLayout(dim=dim, state=spec.row_state).record_bytes


def distinct_rows(work: workload.Workload) -> list[int]:
    """Return the number of distinct ids of each batch."""
    return [sum(rows.unique().numel() for rows in batch) for batch in work.rows]


def step_bytes(work: workload.Workload, dim: int, kind: Any) -> float:
    """Return the bytes that the mean step has to move.

    These are, for each id, itself, its vector and its gradient; for each distinct id, a cache line of the map, its
    embedding, read by the lookup, and its record, read and written by the update.
    """
    distinct = sum(distinct_rows(work)) / workload.BATCHES
    return work.step_ids * (8 + 2 * 4 * dim) + distinct * (64 + 4 * dim + 2 * record_bytes(kind, dim))


def copy_records(work: workload.Workload, size: int) -> tuple[Callable[[], None], float]:
    """Return a function that copies random records, as many as a batch has distinct ids, and the bytes that it moves.

    The records are on huge pages, 1 GiB of them at most.
    """
    cpu = torch.device("cpu")
    total = min(len(work.ids) * workload.IDS, 2**30 // size)
    count = distinct_rows(work)[0]
    records, out = ops.memory.empty_bytes(total * size, cpu).zero_(), ops.memory.empty_bytes(count * size, cpu).zero_()
    blocks = ops.blocks.Blocks(torch.tensor([records.data_ptr()]), 40, size - 16, size)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(total, (count,), generator=generator) for _ in range(workload.BATCHES)]
    bags, floats, number = ops.gather.Bags.single([count]), size // 4, itertools.count()
    none = torch.zeros(0, 5, dtype=torch.int64)

    def copy() -> None:
        rows = draws[next(number) % workload.BATCHES]
        ops.gather.gather_bags(blocks, 0, floats, rows, bags, [], [-1], none, out.view(torch.float32), [0], None)
        assert records.numel() == total * size  # kept alive: the kernel has its address alone

    return copy, 2.0 * count * size


def with_threads(step: Callable[[], None], threads: int) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(threads)
        step()

    return run


def measure(case: str, peer: str, args: argparse.Namespace) -> harness.Result:
    """Time alternating steps of ours and a peer; the peer of a case of ours alone is ours, too."""
    size, width, rule, *alone = case.split("/")
    dim, device = int(width.removeprefix("d")), torch.device(args.device)
    one_core = args.threads == 1 and alone != ["threads"] and device.type == "cpu"
    cores = sorted(os.sched_getaffinity(0))
    if one_core:
        os.sched_setaffinity(0, cores[:1])
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    work = workload.make(size, dim, device)
    kind = FAMILY[rule] if alone == ["family"] else OURS[rule]
    step = ours(work, dim, kind, device, TRACKED.get(*alone) if alone else None, trains=rule != "lookup")
    # Bursts are long enough to refill the caches after the other side's turn.
    rounds, burst = (7 if args.quick else 12, 6) if size == "65k" else (20 if args.quick else 50, 5)

    def rates(steps: dict[str, Callable[[], float | None]], clock: str) -> dict[str, float]:
        return {name: r / 1e6 for name, r in harness.rates(steps, work.step_ids, rounds, device, burst, clock).items()}

    if alone == ["threads"]:
        # CPU time would count both threads.
        rate = rates({"ours": with_threads(step, 2), peer: with_threads(step, 1)}, "wall")
    elif peer == "memory bound":
        copy, moved = copy_records(work, record_bytes(kind, dim))
        rate = rates({"ours": step, peer: copy}, args.clock)
        rate[peer] *= moved / step_bytes(work, dim, kind)
    elif alone == ["family"]:
        rate = rates({"ours": step, peer: ours(work, dim, optim.Adam, device)}, args.clock)
        rate[peer] *= min(1.0, record_bytes(optim.Adam, dim) / record_bytes(kind, dim))
    elif alone:
        rate = rates({"ours": step, peer: ours(work, dim, kind, device)}, args.clock)
    elif present(peer, device):
        peer_cores = set(cores[1:2] if one_core and len(cores) > 1 else cores)
        with Worker(
            peer, work, rule, lr=LR, device=device, threads=args.threads, clock=args.clock, cores=peer_cores
        ) as other:
            other.wait()
            rate = rates({"ours": step, peer: other.step}, args.clock)
    else:
        rate = rates({"ours": step}, args.clock)
    first, theirs = rate["ours"], rate.get(peer)
    return harness.Result(
        "embedding",
        case if device.type == "cpu" else f"{device.type}/{case}",
        "lookup" if rule == "lookup" else "train_step",
        "M ids/s",
        round(first, 3),
        None if theirs is None else round(theirs, 3),
        peer,
        None if theirs is None else round(first / theirs, 2),
    )


def present(peer: str, device: torch.device) -> bool:
    """Return whether a peer can run on a device. Only nn.EmbeddingBag runs on a GPU; the others are CPU builds."""
    return installed(peer) and (peer == "nn.EmbeddingBag" or device.type == "cpu")


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument(
        "--clock", default="wall", choices=list(harness.CLOCKS), help="cpu: CPU time, for shared machines"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu requires one thread on the CPU")
    rules = [rule for rule in OURS if rule != "lookup"]
    cases = [f"{size}/d{dim}/{rule}" for size in workload.SIZES for dim in (16, 64, 128) for rule in rules]
    cases = QUICK if args.quick else [*cases, "65k/d64/lookup", "65k/d16/adam/threads"]
    if not args.quick:
        cases += [f"{size}/d16/adam/{name}" for size in workload.SIZES for name in TRACKED]
        cases += [f"65k/d{dim}/{rule}/family" for dim in (16, 64, 128) for rule in FAMILY]
    results = []
    for case in cases:
        if args.cases not in case:
            continue
        harness.progress(f"{case} on {args.device}, {args.threads} thread(s)")
        _, _, rule, *alone = case.split("/")
        for peer in ALONE.get(*alone, ["untracked"]) if alone else PEERS[rule]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result = process.submit(measure, case, peer, args).result()
            result.print()
            results.append(result)
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
