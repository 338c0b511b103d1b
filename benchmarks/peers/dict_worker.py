"""Tables with a Python dict from ids to rows of fixed-size tensors, updated with torch operations."""

from __future__ import annotations

import torch
from protocol import Task
from torch import Tensor


class DictTable:
    """One table of ``size`` rows."""

    def __init__(self, size: int, dim: int, rule: str, lr: float) -> None:
        self.row_of: dict[int, int] = {}
        self.rule = rule
        self.lr = lr
        self.weight = torch.randn(size, dim)
        self.state = [torch.zeros(size, dim) for _ in range(2 if rule == "adam" else 1)]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids; a new id gets the next free row."""
        row_of = self.row_of
        return torch.tensor([row_of.setdefault(i, len(row_of)) for i in ids.tolist()])

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """Sum gradients by row and update weights and state."""
        unique, inverse = torch.unique(rows, return_inverse=True)
        g = torch.zeros(unique.numel(), gradient.size(1)).index_add_(0, inverse, gradient)
        if self.rule == "adagrad":
            total = self.state[0][unique] + g * g
            self.state[0][unique] = total
            self.weight[unique] -= self.lr * g / (total.sqrt() + 1e-10)
            return
        first = self.state[0][unique].lerp_(g, 0.1)
        second = self.state[1][unique].mul_(0.999).addcmul_(g, g, value=0.001)
        self.state[0][unique], self.state[1][unique] = first, second
        size = self.lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        self.weight[unique] -= size * first / (second.sqrt() + 1e-8)


def main() -> None:
    task = Task()
    torch.set_num_threads(task.threads)
    ids, gradients = torch.from_numpy(task.ids), torch.from_numpy(task.gradients)
    tables = [DictTable(ids.size(1), gradients.size(2), task.rule, task.lr) for _ in ids]
    for table, own in zip(tables, ids, strict=True):
        table.rows(own)
    batches = [[own[rows] for own, rows in zip(ids, batch, strict=True)] for batch in torch.from_numpy(task.rows)]
    steps = 0

    @torch.no_grad()
    def step(batch: int) -> None:
        nonlocal steps
        steps += 1
        for table, own, gradient in zip(tables, batches[batch], gradients, strict=True):
            rows = table.rows(own)
            table.weight[rows]
            if task.rule != "lookup":
                table.update(rows, gradient, steps)

    task.serve(step)


if __name__ == "__main__":
    main()
