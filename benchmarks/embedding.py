"""One warm training step of tables: lookup, backward from a fixed gradient, update; beside static and dynamic peers.

    python -m benchmarks.embedding [--quick] [--threads 1] [--cases 65k/d64]

Ours takes random 64-bit ids and finds them in a growing hash table. The peer ``nn.EmbeddingBag`` (26 of them, sparse
gradients, torch.optim.Adagrad or SparseAdam) takes ready row numbers of tables of fixed size. The peer ``dict`` is a
Python dict from id to row and vectorised torch operations on the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from benchmarks import harness, workload
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

LR = 0.01
OURS = {"adagrad": optim.Adagrad, "adam": optim.Adam}
THEIRS = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam}


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
        torch.autograd.backward(list(outputs.values()), work.gradients)
        optimizer.step()

    return step


def embedding_bags(work: workload.Workload, dim: int, rule: str, device: torch.device) -> Callable[[], None]:
    bags = [
        torch.nn.EmbeddingBag(workload.IDS, dim, mode="sum", sparse=True, device=device)
        for _ in range(workload.FEATURES)
    ]
    optimizer = THEIRS[rule]([bag.weight for bag in bags], lr=LR)
    offsets = torch.arange(work.gradients[0].size(0), device=device)
    number = count()

    def step() -> None:
        optimizer.zero_grad()
        rows = work.rows[next(number) % workload.BATCHES]
        outputs = [bag(row, offsets) for bag, row in zip(bags, rows, strict=True)]
        torch.autograd.backward(outputs, work.gradients)
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
    number = count()

    def step() -> None:
        at = next(number)
        batch = work.batch(at)
        for table, ids, gradient in zip(tables, batch.values(), work.gradients, strict=True):
            rows = table.rows(ids)
            table.weight[rows]
            table.update(rows, gradient, at + 1)

    return step


def run(case: str, device: torch.device, rounds: int) -> None:
    size, dim, rule = case.split("/")
    width = int(dim.removeprefix("d"))
    work = workload.make(size, width, device)
    steps = {
        "ours": ours(work, width, rule, device),
        "nn.EmbeddingBag": embedding_bags(work, width, rule, device),
    }
    if device.type == "cpu":
        steps["dict"] = dicts(work, width, rule)
    rate = {name: r / 1e6 for name, r in harness.rates(steps, work.step_ids, rounds, device).items()}
    for peer in list(steps)[1:]:
        ratio = rate["ours"] / rate[peer]
        where = "" if device.type == "cpu" else f"{device.type}/"
        harness.Result(
            "embedding", where + case, "train_step", "M ids/s", round(rate["ours"], 3), round(rate[peer], 3), peer,
            round(ratio, 2),
        ).print()  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__ or "")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    cases = [f"{size}/d{dim}/{rule}" for size in workload.SIZES for dim in (16, 64, 128) for rule in OURS]
    if args.quick:
        cases = ["65k/d16/adam", "65k/d64/adagrad", "65k/d64/adam", "4k/d64/adam"]
    for case in cases:
        if args.cases in case:
            harness.progress(f"{case} on {args.device}, {args.threads} thread(s)")
            run(case, torch.device(args.device), rounds=7 if args.quick else 15)


if __name__ == "__main__":
    main()
