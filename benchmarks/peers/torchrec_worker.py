"""TorchRec's DistributedModelParallel on the CPU: one of two ranks, over Gloo, row-wise Adagrad fused into backward."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
import torchrec
from protocol import Task
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

CPU = torch.device("cpu")


def main() -> None:
    task = Task()
    sharding = task.rule
    torch.set_num_threads(task.threads)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    features, size = task.ids.shape
    samples, dim = task.gradients.shape[1:]
    names = [f"feature{f:02d}" for f in range(features)]
    collection = torchrec.EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            torchrec.EmbeddingBagConfig(
                name=f"table_{name}", embedding_dim=dim, num_embeddings=size, feature_names=[name]
            )
            for name in names
        ],
    )
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, collection.parameters(), {"lr": task.lr})
    sharder = EmbeddingBagCollectionSharder()
    # The planner does not support row-wise tables on CPUs, so write the plan manually.
    rules = {
        f"table_{name}": table_wise(rank=f % ranks, compute_kernel="fused")
        if sharding == "table_wise"
        else row_wise(compute_kernel="fused")
        for f, name in enumerate(names)
    }
    plan = construct_module_sharding_plan(
        collection, rules, sharder=sharder, local_size=ranks, world_size=ranks, device_type="cpu"
    )
    model = torchrec.distributed.DistributedModelParallel(
        collection, device=CPU, plan=ShardingPlan({"": plan}), sharders=[sharder]
    )
    lengths = torch.ones(features * samples, dtype=torch.int32)
    mine = [task.rows[number] for number in range(rank, len(task.rows), ranks)]
    batches = [
        torchrec.KeyedJaggedTensor(keys=names, values=torch.from_numpy(rows.reshape(-1).copy()), lengths=lengths)
        for rows in mine
    ]
    gradient = torch.from_numpy(np.ascontiguousarray(task.gradients.swapaxes(0, 1)).reshape(samples, features * dim))

    def step(number: int) -> None:
        values = model(batches[number % len(batches)]).wait().values()
        values.backward(gradient)

    task.serve(step)


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
