"""One warm training step of tables: lookup, backward from a fixed gradient, update; beside static and dynamic peers.

    python -m benchmarks.embedding [--quick] [--threads 1] [--cases 65k/d64] [--clock wall]

Ours takes random 64-bit ids and finds them in a growing hash table. Static peers take ready row numbers of tables of
fixed size: ``fbgemm`` (SplitTableBatchedEmbeddingBagsCodegen) and ``nn.EmbeddingBag`` (26 of them, sparse gradients,
torch.optim). Dynamic peers take the same ids as ours: ``tfra`` (cuckoo tables) and ``dict``, a Python dict from id to
row with vectorised torch operations on the rows. A peer is held beside ours alone, and the two step in turn. The case
``threads`` sets two threads of ours against one.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, workload
from benchmarks.peers.worker import Worker, installed
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

LR = 0.01
OURS = {
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adagrad": optim.Adagrad,
    "adam": optim.Adam,
    "sgd": optim.SGD,
    "lookup": optim.SGD,
}
BAGS = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD}
PEERS = {
    "rowwise_adagrad": ["fbgemm"],
    "adagrad": ["fbgemm", "nn.EmbeddingBag", "dict"],
    "adam": ["nn.EmbeddingBag", "tfra", "dict"],
    "sgd": ["fbgemm", "nn.EmbeddingBag"],
    "lookup": ["fbgemm", "tfra", "dict"],
}
QUICK = ["65k/d64/rowwise_adagrad", "4k/d64/rowwise_adagrad", "65k/d64/adagrad", "65k/d16/adam/threads"]


class FixedGradient(torch.autograd.Function):
    """A loss whose gradients are given: one root for all outputs, as a model's loss is."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def ours(work: workload.Workload, dim: int, rule: str, device: torch.device) -> Callable[[], None]:
    engine = EmbeddingEngine(
        {workload.name(f): EmbeddingConfig(dim=dim) for f in range(workload.FEATURES)},
        optimizer_state=OURS[rule].row_state(),
        device=device,
    )
    optimizer = OURS[rule](engine.parameters(), lr=LR)
    with torch.no_grad():
        for part in range(0, workload.IDS, 10_000):
            engine({workload.name(f): work.ids[f][part : part + 10_000] for f in range(workload.FEATURES)})
    batches, number = [work.batch(b) for b in range(workload.BATCHES)], count()

    def step() -> None:
        outputs = engine(batches[next(number) % workload.BATCHES])
        FixedGradient.apply(work.gradients, *outputs.values()).backward()
        optimizer.step()

    @torch.no_grad()
    def lookup() -> None:
        engine(batches[next(number) % workload.BATCHES])

    if rule == "lookup":
        engine.eval()
        return lookup
    return step


def embedding_bags(work: workload.Workload, dim: int, rule: str, device: torch.device) -> Callable[[], None]:
    bags = [
        torch.nn.EmbeddingBag(workload.IDS, dim, mode="sum", sparse=True, device=device)
        for _ in range(workload.FEATURES)
    ]
    optimizer = BAGS[rule]([bag.weight for bag in bags], lr=LR)
    offsets = torch.arange(work.gradients[0].size(0), device=device)
    number = count()

    def step() -> None:
        optimizer.zero_grad()
        rows = work.rows[next(number) % workload.BATCHES]
        outputs = [bag(row, offsets) for bag, row in zip(bags, rows, strict=True)]
        FixedGradient.apply(work.gradients, *outputs).backward()
        optimizer.step()

    return step


class DictTable:
    """The table that a Python dict makes: rows by id, records in one tensor of a fixed size."""

    def __init__(self, dim: int, rule: str) -> None:
        self.row_of: dict[int, int] = {}
        self.rule = rule
        self.weight = torch.randn(workload.IDS, dim)
        self.state = [torch.zeros(workload.IDS, dim) for _ in range(2 if rule == "adam" else 1)]

    def rows(self, ids: Tensor) -> Tensor:
        row_of = self.row_of
        return torch.tensor([row_of.setdefault(i, len(row_of)) for i in ids.tolist()])

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        unique, inverse = torch.unique(rows, return_inverse=True)
        g = torch.zeros(unique.numel(), gradient.size(1)).index_add_(0, inverse, gradient)
        if self.rule == "adagrad":
            total = self.state[0][unique] + g * g
            self.state[0][unique] = total
            self.weight[unique] -= LR * g / (total.sqrt() + 1e-10)
            return
        first = self.state[0][unique].lerp_(g, 0.1)
        second = self.state[1][unique].mul_(0.999).addcmul_(g, g, value=0.001)
        self.state[0][unique], self.state[1][unique] = first, second
        size = LR * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        self.weight[unique] -= size * first / (second.sqrt() + 1e-8)


def dicts(work: workload.Workload, dim: int, rule: str) -> Callable[[], None]:
    tables = [DictTable(dim, rule) for _ in range(workload.FEATURES)]
    for table, ids in zip(tables, work.ids, strict=True):
        table.rows(ids)
    batches, number = [work.batch(b) for b in range(workload.BATCHES)], count()

    def step() -> None:
        at = next(number)
        for table, ids, gradient in zip(tables, batches[at % workload.BATCHES].values(), work.gradients, strict=True):
            rows = table.rows(ids)
            table.weight[rows]
            if rule != "lookup":
                table.update(rows, gradient, at + 1)

    return step


@contextmanager
def peer_step(
    peer: str, work: workload.Workload, dim: int, rule: str, args: argparse.Namespace
) -> Iterator[Callable[[], float | None]]:
    """Makes a peer's step, and lets go of its tables at the end."""
    if peer == "nn.EmbeddingBag":
        yield embedding_bags(work, dim, rule, torch.device(args.device))
    elif peer == "dict":
        yield dicts(work, dim, rule)
    else:
        with Worker(peer, work, rule, lr=LR, threads=args.threads, clock=args.clock) as worker:
            worker.wait()
            yield worker.step


def with_threads(step: Callable[[], None], threads: int) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(threads)
        step()

    return run


def run(case: str, args: argparse.Namespace) -> Iterator[harness.Result]:
    size, width, rule, *threads = case.split("/")
    dim, device = int(width.removeprefix("d")), torch.device(args.device)
    work = workload.make(size, dim, device)
    step = ours(work, dim, rule, device)
    # Bursts that outlast what the other left in the caches: what is measured is warm.
    rounds, burst = (7 if args.quick else 12, 6) if size == "65k" else (20 if args.quick else 50, 5)

    def result(peer: str, steps: dict[str, Callable[[], float | None]], clock: str) -> harness.Result:
        rate = {name: r / 1e6 for name, r in harness.rates(steps, work.step_ids, rounds, device, burst, clock).items()}
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

    if threads:
        # CPU time would add the threads' up.
        yield result("1 thread", {"ours": with_threads(step, 2), "1 thread": with_threads(step, 1)}, "wall")
        torch.set_num_threads(args.threads)
        return
    for peer in PEERS[rule]:
        # Beside a GPU only nn.EmbeddingBag has a place: the other peers here are builds for the CPU.
        if peer in ("fbgemm", "tfra") and not installed(peer) or device.type != "cpu" and peer != "nn.EmbeddingBag":
            yield result(peer, {"ours": step}, args.clock)
        else:
            with peer_step(peer, work, dim, rule, args) as other:
                yield result(peer, {"ours": step, peer: other}, args.clock)
                del other  # or its tables would stay while the next peer makes its own


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument(
        "--clock", default="wall", choices=list(harness.CLOCKS), help="cpu: CPU time, for a machine that others share"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu is for one thread on the CPU")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    rules = [rule for rule in OURS if rule != "lookup"]
    cases = [f"{size}/d{dim}/{rule}" for size in workload.SIZES for dim in (16, 64, 128) for rule in rules]
    cases = QUICK if args.quick else [*cases, "65k/d64/lookup", "65k/d16/adam/threads"]
    results = []
    for case in cases:
        if args.cases in case:
            harness.progress(f"{case} on {args.device}, {args.threads} thread(s)")
            for result in run(case, args):
                result.print()
                results.append(result)
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
