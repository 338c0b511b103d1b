"""FBGEMM's table-batched embedding bags on the CPU: static tables, row indices, update fused into backward."""

from __future__ import annotations

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from protocol import Task

RULES = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "lookup": EmbOptimType.EXACT_SGD,
}


def main() -> None:
    task = Task()
    torch.set_num_threads(task.threads)
    features, size = task.ids.shape
    samples, dim = task.gradients.shape[1:]
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * features,
        optimizer=RULES[task.rule],
        learning_rate=task.lr,
        pooling_mode=PoolingMode.SUM,
    )
    tables.init_embedding_weights_uniform(-0.01, 0.01)
    indices = [torch.from_numpy(rows.reshape(-1)) for rows in task.rows]
    offsets = torch.arange(features * samples + 1)
    gradient = torch.from_numpy(np.ascontiguousarray(task.gradients.swapaxes(0, 1)).reshape(samples, features * dim))

    def train(batch: int) -> None:
        tables(indices[batch], offsets).backward(gradient)

    def lookup(batch: int) -> None:
        with torch.no_grad():
            tables(indices[batch], offsets)

    task.serve(lookup if task.rule == "lookup" else train)


if __name__ == "__main__":
    main()
