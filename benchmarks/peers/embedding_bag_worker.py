"""torch's own modules: one ``nn.EmbeddingBag`` per feature with sparse gradients, row indices, and ``torch.optim``."""

from __future__ import annotations

import torch
from protocol import Task

RULES = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD}


def main() -> None:
    task = Task()
    torch.set_num_threads(task.threads)
    features, size = task.ids.shape
    samples, dim = task.gradients.shape[1:]
    bags = [torch.nn.EmbeddingBag(size, dim, mode="sum", sparse=True, device=task.device) for _ in range(features)]
    optimizer = RULES[task.rule]([bag.weight for bag in bags], lr=task.lr)
    rows = torch.from_numpy(task.rows).to(task.device)
    gradients = list(torch.from_numpy(task.gradients).to(task.device))
    offsets = torch.arange(samples, device=task.device)

    def step(batch: int) -> None:
        optimizer.zero_grad()
        torch.autograd.backward([bag(ids, offsets) for bag, ids in zip(bags, rows[batch], strict=True)], gradients)
        optimizer.step()
        if task.device == "cuda":
            torch.cuda.synchronize()

    task.serve(step)


if __name__ == "__main__":
    main()
